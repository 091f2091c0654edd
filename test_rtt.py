# SPDX-License-Identifier: MIT
"""Tests of rtt.py, in the order of its sections: slow obvious loops, finite differences, invariances.

G responses a prompt, N = prompts * G, K rubrics, T response tokens; symbols as in rtt.py's opening table.
Models are made here, tiny and with random weights; the tokenizer is that of data/tiny.
"""

import itertools
import io
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test waits for the hub
os.environ["OMP_NUM_THREADS"] = "1"  # models this small gain nothing from more, and equal runs need equal numbers

import filelock
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import rtt

sys.path.insert(0, str(Path(__file__).resolve().parent / "data"))
import compare

pytestmark = [pytest.mark.filterwarnings(f"error::{kind}") for kind in ("FutureWarning", "DeprecationWarning")]
HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def unwarned():
    """No warning of transformers, either, which writes most of its own to a log."""
    handler = logging.Handler(logging.WARNING)
    said = []
    handler.emit = said.append
    logging.getLogger("transformers").addHandler(handler)
    yield
    logging.getLogger("transformers").removeHandler(handler)
    assert not [record.getMessage() for record in said if not re.search("token_id|LOAD REPORT", record.getMessage())]


END, OTHER_END = 3, 4  # two end tokens of the tiny models


def tiny_model(seed=0, vocab_size=23, **options):
    """A Qwen2 with random weights, large enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=vocab_size)
    options |= dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **options)).eval()


def absolute_model(vocab_size=23):
    """A GPT-2: its positions are absolute, so a wrong position id shows (Qwen2's are relative)."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=512)
    return GPT2LMHeadModel(rtt.without_dropout(GPT2Config(initializer_range=0.3, **sizes))).eval()


SIZES = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, initializer_range=0.3)
WINDOW = dict(head_dim=8, sliding_window=6, tie_word_embeddings=False)


def llama_model(vocab_size=23):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_hidden_layers=2, **SIZES)).eval()


def gemma2_model(vocab_size=23):
    """Some layers see the last 6 tokens only."""
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=vocab_size, num_hidden_layers=2, **WINDOW, **SIZES)
    return Gemma2ForCausalLM(config).eval()


def gemma3_model(vocab_size=23):
    torch.manual_seed(0)
    windows = dict(WINDOW, layer_types=["sliding_attention", "full_attention"] * 2)
    config = Gemma3TextConfig(vocab_size=vocab_size, num_hidden_layers=4, **windows, **SIZES)
    return Gemma3ForCausalLM(config).eval()


MODELS = [tiny_model, absolute_model, llama_model, gemma2_model, gemma3_model]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(HERE / "data" / "tiny")


@pytest.fixture(scope="session")
def folder(tokenizer, tmp_path_factory):
    """A model folder: random weights, data/tiny's tokenizer, and dropout in its config."""
    path = tmp_path_factory.mktemp("model")
    ends = dict(eos_token_id=tokenizer.eos_token_id)
    tiny_model(vocab_size=len(tokenizer), attention_dropout=0.5, **ends).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def policy_of(folder, dtype=torch.float32, tasks=(rtt.Task("Tell.", []),), **options):
    """The Policy of a model folder, loaded as a run does it."""
    config = rtt.Config(**dict(device="cpu", max_new_tokens=64) | options)
    return rtt.load_policy("--model", str(folder), config, dtype, tasks)


def close(a, b, tolerance=1e-5):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, check_dtype=False)
    return True


# ==================================================================================================
# 1. Rubrics
# ==================================================================================================


def check(rubric_id, text, **kwargs):
    return rtt.verify(rtt.make_rubric(rubric_id, kwargs), text)


def unmark(marked):
    """"a ⟦lamp⟧" -> "a lamp", [(2, 6)]; an empty ⟦⟧ at the end is the evidence of the end token."""
    text, spans = "", []
    for piece in marked.split("⟦"):
        if "⟧" in piece:
            inner, piece = piece.split("⟧")
            spans.append((len(text), len(text) + len(inner)))
            text += inner
        text += piece
    return text, spans


# For each id: arguments, and responses with their evidence marked, satisfied ("+") or violated ("-").
WORDS = dict(keywords=["lamp", "key"])
AT_LEAST, LESS_THAN = dict(relation="at least"), dict(relation="less than")
SECOND = dict(num_paragraphs=3, nth_paragraph=2, first_word="x")
SECTIONS = dict(section_spliter="SECTION", num_sections=2)
REPEAT = dict(prompt_to_repeat=' Say "hi". ')
CASES = {
    "keywords:existence": [
        (WORDS, "+A ⟦LAMP⟧, two ⟦key⟧s, a c⟦lamp⟧."),  # any case, inside longer words
        (WORDS, "-A lamp and no other."),  # a word that is missing has no characters
        (dict(keywords=["a.b"]), "-axb"),  # literal text, no regular expression
        (dict(keywords=["灯"]), "+😀 一盏⟦灯⟧"),
    ],
    "keywords:forbidden_words": [
        (dict(forbidden_words=["dog", "cat"]), "+A hotdog and a category."),  # whole words only
        (dict(forbidden_words=["dog", "cat"]), "-The ⟦Cat⟧'s ⟦dog⟧-house, a ⟦DOG⟧"),
        (dict(forbidden_words=["élan"]), "-😀 ⟦Élan⟧"),
    ],
    "keywords:frequency": [
        (dict(keyword="ow", frequency=2, **AT_LEAST), "+The c⟦ow⟧, the ⟦OW⟧l."),
        (dict(keyword="ow", frequency=2, **AT_LEAST), "-The cow."),
        (dict(keyword="ow", frequency=2, **LESS_THAN), "+The cow."),
        (dict(keyword="ow", frequency=2, **LESS_THAN), "-The cow, the ⟦ow⟧l, n⟦ow⟧."),  # the surplus
    ],
    "keywords:letter_frequency": [
        (dict(letter="T", let_frequency=2, let_relation="at least"), "+⟦T⟧o ge⟦t⟧"),
        (dict(letter="T", let_frequency=2, let_relation="at least"), "-To go"),
        (dict(letter="#", let_frequency=2, let_relation="less than"), "-#a ⟦#⟧b"),  # IFEval has signs
        (dict(letter="k", let_frequency=1, let_relation="less than"), "-0 ⟦\u212a⟧"),  # Kelvin's sign
        (dict(letter="i", let_frequency=1, let_relation="less than"), "-ı ⟦İ⟧"),  # lower() has an i
    ],
    "language:response_language": [
        (dict(language="de"), "+⟦G⟧⟦u⟧⟦t⟧ 123"),
        (dict(language="de"), "-Gut ⟦х⟧⟦о⟧⟦р⟧⟦о⟧⟦ш⟧⟦о⟧"),
        (dict(language="ru"), "+⟦д⟧⟦а⟧ 😀 ab"),  # half
        (dict(language="ru"), "-да ⟦a⟧⟦b⟧⟦c⟧"),
        (dict(language="hi"), "+⟦न⟧⟦म⟧⟦स⟧⟦्⟧⟦त⟧⟦े⟧ abcdef"),  # vowel signs count
        (dict(language="ja"), "+⟦東⟧⟦京⟧⟦へ⟧"),
        (dict(language="ja"), "-东京"),  # no kana: this is Chinese
        (dict(language="zh-cn"), "-⟦へ⟧東⟦の⟧"),
        (dict(language="ko"), "-123 😀"),
    ],
    "length_constraints:number_sentences": [
        (dict(num_sentences=2, **AT_LEAST), "+One⟦.⟧ Two⟦!?⟧"),
        (dict(num_sentences=2, **AT_LEAST), '+"One⟦.⟧" Two⟦...⟧'),  # a quotation mark behind the dot
        (dict(num_sentences=2, **AT_LEAST), "+One⟦.⟧ Two⟦⟧"),  # the last one without a full stop
        (dict(num_sentences=2, **AT_LEAST), "+Who am I⟦?⟧ So etc⟦!⟧"),
        (dict(num_sentences=4, **AT_LEAST), "+1⟦.⟧ Do it⟦.⟧\n2⟦.⟧ Done⟦⟧"),
        (dict(num_sentences=2, **AT_LEAST), "-In 3.50 no more of rtt.py⟦⟧"),  # a dot inside a word ends nothing
        (dict(num_sentences=2, **LESS_THAN), "-One. Two⟦.⟧ Three⟦⟧"),
        (dict(num_sentences=2, **LESS_THAN), "-Fine! 😀⟦⟧"),  # what stands behind is one more
        (dict(num_sentences=2, **LESS_THAN), "+Only one!⟦⟧"),
    ],
    "length_constraints:number_words": [
        (dict(num_words=3, **AT_LEAST), "+one two_2 drei⟦⟧"),
        (dict(num_words=3, **AT_LEAST), "-... one, -- two !⟦⟧"),
        (dict(num_words=3, **LESS_THAN), "+!?⟦⟧"),
        (dict(num_words=3, **LESS_THAN), "-don't go⟦⟧"),  # three runs of letters
    ],
    "length_constraints:number_paragraphs": [
        (dict(num_paragraphs=2), "+One\n⟦***⟧\nTwo"),
        (dict(num_paragraphs=2), "+***\nOne⟦***⟧Two ***\n"),  # one may stand at either end
        (dict(num_paragraphs=2), "-One\n\nTwo"),
        (dict(num_paragraphs=2), "-One *** Two ⟦***⟧ Three ⟦***⟧ Four"),
        (dict(num_paragraphs=2), "-One *** ⟦***⟧ Two"),  # an empty paragraph
        (dict(num_paragraphs=3), "-One\n***⟦***⟧\nTwo"),
        (dict(num_paragraphs=1), "-***⟦⟧"),
    ],
    "length_constraints:nth_paragraph_first_word": [
        (SECOND, "+One.⟦\n\n⟧⟦X⟧, two.⟦\n\n⟧Three."),
        (SECOND, '+One.⟦\n\n⟧ \'"⟦x⟧" two.⟦\n\n⟧Three.\n\n \n'),  # and an empty one
        (SECOND, "-One.\n\n⟦Two⟧.\n\nThree."),
        (SECOND, "-One.\n\n⟦.⟧x\n\nThree."),
        (SECOND, "-One.\n\nx two."),  # too few
        (SECOND, "-One.\n\nx\n\nThree.⟦\n\n⟧Four."),
        (SECOND, "-One.\n\n⟦xy⟧\n\nThree.⟦\n\n⟧Four."),
        (SECOND, "-One."),
        (SECOND, "-One.\n\n\n\nx\n\nThree."),  # the second is empty
    ],
    "detectable_content:number_placeholders": [
        (dict(num_placeholders=2), "+Dear ⟦[name]⟧, ⟦[[x]⟧] and ["),
        (dict(num_placeholders=2), "-Dear [name], [so\nlong] ("),
    ],
    "detectable_format:constrained_response": [
        ({}, "+Well. ⟦My answer is maybe.⟧"),
        ({}, "-my answer is yes. My answer is No."),
    ],
    "detectable_format:number_highlighted_sections": [
        (dict(num_highlights=2), "+A ⟦*⟧b⟦*⟧ and ⟦**⟧c d⟦**⟧"),
        (dict(num_highlights=2), "+⟦*⟧a⟦*⟧,⟦*⟧b⟦*⟧"),
        (dict(num_highlights=2), "-*a* * * ** ** *b\nc*"),  # nothing in between, or a new line
    ],
    "detectable_format:multiple_sections": [
        (SECTIONS, "+⟦SECTION 1⟧: a ⟦SECTION2⟧"),
        (SECTIONS, "+SUB⟦SECTION\n1⟧, ⟦SECTION 10⟧"),
        (SECTIONS, "-Section 1 SECTION 2 SECTION X"),
        (SECTIONS | dict(section_spliter="."), "-a 1 b 2"),  # literal text, no regular expression
    ],
    "detectable_format:json_format": [
        ({}, '+ ```json\n⟦{⟧"a": [1, "b"]⟦}⟧\n```\n'),
        ({}, "+⟦[⟧⟦]⟧"),
        ({}, "+```\n⟦7⟧```"),
        ({}, '-```json\n{"a": 1, ⟦}⟧\n```'),
        ({}, "-⟦S⟧ure: {}"),
        ({}, "-{} ⟦D⟧one."),
        ({}, '-{"a": ⟦⟧'),
        ({}, "-⟦[⟧" + "[" * 20_000),
    ],
    "combination:two_responses": [
        ({}, "+One ⟦******⟧ Two"),
        ({}, "+******One ⟦******⟧ Two"),
        ({}, "-One *** Two"),
        ({}, "-One ****** Two ⟦******⟧ Three"),
        ({}, "-One ******⟦******⟧ Two"),
        ({}, "-Same ****** ⟦Same⟧\n"),
    ],
    "combination:repeat_prompt": [
        (REPEAT, '+⟦SAY "hi".⟧ Hi.'),
        (REPEAT, '-Say ⟦h⟧i. Say "hi".'),
        (REPEAT, '-⟦"⟧Say'),
        (REPEAT, "-Say⟦⟧"),
        (REPEAT, "-  s⟦İ⟧"),
    ],
    "punctuation:no_comma": [({}, "+One; two、three."), ({}, "-One⟦,⟧ two⟦,⟧⟦,⟧")],
    "startend:end_checker": [
        (dict(end_phrase="The End."), "+So. ⟦the end.⟧"),
        (dict(end_phrase=" The End. "), '+"So. ⟦The End.⟧"\n '),  # white space and outer quotes aside
        (dict(end_phrase="The End."), "-The end. Or not.⟦⟧"),
        (dict(end_phrase="so"), "+İİ ⟦so⟧"),  # lower() makes İ two characters
        (dict(end_phrase="i̇"), "+⟦İ⟧"),
    ],
    "startend:quotation": [
        ({}, '+ ⟦"⟧She said "yes"⟦"⟧\n'),
        ({}, '-"She said "yes".⟦⟧'),
        ({}, '-⟦S⟧he said "yes"'),
        ({}, '-"⟦⟧'),  # one mark does not both open and close
        ({}, "-⟦x⟧⟦⟧"),
    ],
    "change_case:capital_word_frequency": [
        (dict(capital_frequency=2, capital_relation="at least"), "+⟦X⟧-⟦RAY⟧ at (⟦NASA⟧), Pa3"),
        (dict(capital_frequency=2, capital_relation="at least"), "+⟦IT⟧'⟦S⟧"),
        (dict(capital_frequency=2, capital_relation="at least"), "-x-ray 123 NASA Aa 灯"),
        (dict(capital_frequency=2, capital_relation="less than"), "+NASA"),
        (dict(capital_frequency=2, capital_relation="less than"), "-A ⟦B⟧,⟦C⟧"),
    ],
    "change_case:english_capital": [
        ({}, "+ALL LARGE, 灯 😀 İ"),
        ({}, "-A⟦l⟧⟦ß⟧ ⟦ǅ⟧ B"),
        ({}, "-123 !"),  # no letters at all
    ],
    "change_case:english_lowercase": [
        ({}, "+all small, ß 灯 😀"),
        ({}, "-⟦A⟧ll ⟦İ⟧"),
        ({}, "-123 !"),
    ],
    "detectable_content:postscript": [
        (dict(postscript_marker="P.S."), "+Bye. ⟦p. s.⟧ see you"),
        (dict(postscript_marker="P.S."), "-Bye. PS: see you"),
        (dict(postscript_marker="P.P.S"), "+P.S. one ⟦P.P.S⟧ two ⟦p. p. s⟧"),
        (dict(postscript_marker="P.P.S"), "-P.S. one"),
    ],
    "detectable_format:title": [
        ({}, "+⟦<<The Lamp>>⟧\nOnce"),
        ({}, "-<<>>\n<< >>\n<<<>>>"),  # empty ones
        ({}, "-<<The\nLamp>>"),
        ({}, "-<The Lamp>"),
    ],
    "detectable_format:number_bullet_lists": [
        (dict(num_bullets=2), "+So:\n⟦*⟧ a\n  ⟦-⟧ b\n** no bullet **"),
        (dict(num_bullets=2), "-* a\nnot * this - one"),
        (dict(num_bullets=2), "-* a\n- b\n⟦*⟧ c\n⟦-⟧ d"),  # the surplus
    ],
}
FLAT = [
    pytest.param(rubric_id, *case, id=f"{rubric_id}-{n}")
    for rubric_id, cases in CASES.items()
    for n, case in enumerate(cases)
]


def test_every_verifier_has_cases_of_both_verdicts():
    assert set(CASES) == set(rtt.VERIFIERS)
    assert all({text[0] for _, text in cases} == {"+", "-"} for cases in CASES.values())


@pytest.mark.parametrize("rubric_id, kwargs, case", FLAT)
def test_verdict_and_evidence(rubric_id, kwargs, case):
    text, evidence = unmark(case[1:])
    assert check(rubric_id, text, **kwargs) == (case[0] == "+", evidence)


@pytest.mark.parametrize("text", ["", " \n\t"])
@pytest.mark.parametrize("rubric_id", CASES)
def test_an_empty_response_satisfies_nothing_and_the_end_token_is_to_blame(rubric_id, text):
    assert check(rubric_id, text, **CASES[rubric_id][0][0]) == (False, [(len(text), len(text))])


# What to put in the place of a violation's evidence; for a satisfied rubric, an x ruins it.
CURES = {"startend:quotation": '"', "change_case:english_capital": "X"}
# There is no such character: these violations end only when the right text takes the evidence's place,
# or have two faults, an empty paragraph and the wrong number of them.
INCURABLE = {
    "language:response_language", "length_constraints:nth_paragraph_first_word",
    "detectable_format:json_format", "combination:repeat_prompt", "combination:two_responses",
    "length_constraints:number_paragraphs",
}


def flips(rubric_id, kwargs, text, verdict):
    """Is the verdict another one after each character of the evidence was replaced?"""
    new = "x" if verdict.satisfied else CURES.get(rubric_id, "x")
    new = "1" if rubric_id == "language:response_language" else new
    chars = list(text)
    for start, end in verdict.evidence:
        chars[start:end] = new * (end - start)
    return check(rubric_id, "".join(chars), **kwargs).satisfied != verdict.satisfied


# Pieces that verifiers stumble over, and what they look for.
PIECES = ["lamp ", "KEY", "cat ", "Dog", "ow", "The End.", "a", "Z", ",", "Mr. ", "! ", "? ", ". "]
PIECES += ["...", '"', "p. s.", "P.P.S", "<<", ">>", "<<a>>", "\n* ", "\n- ", "\n** ", "\n", " "]
PIECES += ["İ", "é", "灯", "😀", "e\u0301", "\u200d", "\ufffd"]
PIECES += ["***", "******", "*", "**", "\n\n", "x", "[", "]", "[a]", "SECTION 1", "SECTION ", "3", "'s "]
PIECES += ["{", "}", "[1]", "```json\n", "```", "My answer is no.", 'Say "hi".']
PIECES += ["東", "へ", "привет ", "नमस्ते "]


@pytest.mark.parametrize("rubric_id", CASES)
def test_fuzzed_evidence_lies_in_the_text_and_changing_it_flips_the_verdict(rubric_id):
    rng, flipped = random.Random(0), 0
    texts = [unmark(case[1:])[0] for _, case in CASES[rubric_id] if len(case) < 1000]
    for _ in range(600):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 12)))
        text = rng.choice([text, rng.choice(texts) + text, text + rng.choice(texts), rng.choice(texts)])
        kwargs = rng.choice(CASES[rubric_id])[0]
        verdict = check(rubric_id, text, **kwargs)
        assert all(0 <= start <= end <= len(text) for start, end in verdict.evidence)
        assert verdict.evidence == sorted(verdict.evidence)
        # Where the evidence holds the end, only a longer response could flip it. Sentences left out: a
        # response without a sentence's full stop goes on with the next, and its last sentence needs none.
        whole = verdict.evidence and all(start < end for start, end in verdict.evidence)
        curable = verdict.satisfied or rubric_id not in INCURABLE
        if whole and curable and rubric_id != "length_constraints:number_sentences":
            assert flips(rubric_id, kwargs, text, verdict), (text, verdict)
            flipped += 1
    assert flipped >= 5 or rubric_id.endswith(("number_sentences", "number_words"))


@pytest.mark.parametrize("rubric_id", CASES)
def test_no_text_makes_a_verifier_raise(rubric_id):
    rng = random.Random(1)
    rubrics = [rtt.make_rubric(rubric_id, kwargs) for kwargs, _ in CASES[rubric_id]]
    for _ in range(10_000):
        strange = [chr(rng.randrange(128)), chr(rng.randrange(0xD800)), chr(rng.randrange(0xE000, 0x110000))]
        pieces = rng.choices(strange + rng.choices(PIECES, k=3), k=rng.randrange(9))
        satisfied, evidence = rtt.verify(rng.choice(rubrics), "".join(pieces))
        assert type(satisfied) is bool and all(type(span) is tuple for span in evidence)


UNITS = ["<", "<<", ">>", ".", "...", "!?", "!)", '."', ". ", "a.", "A. ", "Mr.", "Mr. ", "U.S", "p. ", "1,"]
UNITS += ["[", "]", "*", "**", "***", "*** ", "* ", "*a", "\n", "\n\n", "\n*", "\n-", "a\n\n", " "]
UNITS += ["SECTION ", "SECTION 1", "1", '"', "'", "'s", "n't ", "IT'S ", "{", '{"a":', '["a",', "(", "-"]
UNITS += ["`", "```", "```json", "My answer is ", "İ", "ß", "灯", "я", "e\u0301", "lamp ", "1. ", "\t", "\r\n"]


@pytest.mark.parametrize("rubric_id", CASES)
def test_verifiers_stay_fast_on_a_long_response(rubric_id):
    rubric = rtt.make_rubric(rubric_id, CASES[rubric_id][0][0])
    for unit in UNITS:
        for head, tail in ("", "a"), ("[", "\n"):
            text, times = head + unit * (20_000 // len(unit)) + tail, []
            while len(times) < 3 and min(times, default=1) > 0.05:  # what backtracks over it takes seconds
                start = time.process_time()
                rtt.verify(rubric, text)
                times.append(time.process_time() - start)
            assert min(times) < 0.05, (unit, times)


def test_a_thought_is_not_judged_and_evidence_counts_from_its_beginning():
    rubric = rtt.make_rubric("punctuation:no_comma", {})
    thought = "<think>\nOkay, go.\n</think>\n\n"
    assert rtt.verify(rubric, thought + "Hi.") == (True, [])
    assert rtt.verify(rubric, thought + "Hi, you.") == (False, [(len(thought) + 2, len(thought) + 3)])
    assert rtt.verify(rubric, "a</think> b, <think>c</think>Hi.").satisfied  # the template wrote the first mark
    for open_thought in ("<think>\nOkay", "<think>a</think>  "):
        assert rtt.verify(rubric, open_thought) == (False, rtt.end_of(open_thought))
    one = dict(num_paragraphs=1, nth_paragraph=1, first_word="Hi")
    nth = rtt.make_rubric("length_constraints:nth_paragraph_first_word", one)
    assert rtt.verify(nth, thought + "Hi.").satisfied  # there is no empty line before it


# --------------------------------------------------------------------------------------------------
# Tasks

ROW = dict(prompt="Tell a story.", instruction_id_list=["punctuation:no_comma"], kwargs=[{}])

def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_as_ifeval_ships_them_load_and_other_fields_are_named_once(tmp_path, capsys):
    kwargs = [dict(num_words=3.0, relation="at least", keywords=None, frequency=2), None]
    rules = dict(instruction_id_list=["length_constraints:number_words", "punctuation:no_comma"], kwargs=kwargs)
    rows = [dict(prompt="Go.", key=n, ground_truth="{}", rubrics=["is kind"], **rules) for n in range(2)]
    path = write_rows(tmp_path / "a.jsonl", *rows)
    path.write_text(path.read_text().replace("\n", "\n\n"))  # blank lines are nothing
    task = rtt.load_tasks(path)[1]
    words = rtt.Rubric("length_constraints:number_words", dict(num_words=3, relation="at least"), "write at least 3 words")
    no_comma = rtt.Rubric("punctuation:no_comma", {}, "do not use commas")
    assert task == rtt.Task("Go.", [words, no_comma, rtt.Rubric(rtt.JUDGED, {}, "is kind")])
    [line] = capsys.readouterr().err.splitlines()
    assert "a.jsonl" in line and "ground_truth" in line and "key" not in line
    assert rtt.needs_judge(task.rubrics[2]) and not rtt.needs_judge(words)
    with pytest.raises(ValueError, match="needs a judge"):
        rtt.verify(task.rubrics[2], "Hi.")


BAD_ROWS = {
    "not JSON": b"{",
    "not UTF-8": b'{"prompt": "\xff"}',
    "not an object": b"3",
    "not text": b'{"prompt": "half of an emoji \\ud83d"}',
    "not so deep": b"[" * 100_000,
    "no prompt": dict(ROW, prompt=" "),
    "'messages' are not read": dict(messages=[dict(role="user", content="Go.")], ground_truth="{}"),
    "unknown instruction id": dict(ROW, instruction_id_list=["punctuation:none"]),
    "lists of one length": dict(ROW, kwargs=[]),
    "'num_words' must be a whole number": dict(
        ROW, instruction_id_list=["length_constraints:number_words"], kwargs=[dict(num_words=0, relation="at least")]
    ),
    "one of at least, less than": dict(
        ROW, instruction_id_list=["length_constraints:number_words"], kwargs=[dict(num_words=1, relation="about")]
    ),
    "'keywords' must be a list of words": dict(
        ROW, instruction_id_list=["keywords:existence"], kwargs=[dict(keywords="lamp")]
    ),
    "'rubrics' must be": dict(ROW, rubrics=[""]),
    "no rubric": dict(prompt="Go."),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_one_line_that_names_file_and_line(reason, tmp_path, capsys, monkeypatch):
    bad = BAD_ROWS[reason] if isinstance(BAD_ROWS[reason], bytes) else json.dumps(BAD_ROWS[reason]).encode()
    (tmp_path / "train.jsonl").write_bytes(json.dumps(ROW).encode() + b"\n" + bad)
    write_rows(tmp_path / "eval.jsonl", ROW)
    monkeypatch.setattr(rtt, "load_policy", None)  # no model is loaded
    said = refused(capsys, "--data", tmp_path, "--out", tmp_path / "run")
    assert f"{tmp_path / 'train.jsonl'}:2: " in said and not (tmp_path / "run").exists()
    if not reason.startswith(("not ", "no prompt")):
        assert reason in said


def test_a_file_keeps_its_last_tenth_for_measuring_and_a_hub_name_is_asked_for(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", *(dict(ROW, prompt=f"{n}") for n in range(20)))
    train_tasks, eval_tasks = rtt.load_both(path, 0, False)
    assert [task.prompt for task in eval_tasks] == ["18", "19"] and len(train_tasks) == 18
    assert len(rtt.load_both(path, 1, True)[1]) == 20
    for rubrics, what in ((2, "2 rubrics"), (0, "holds no prompt")):
        with pytest.raises(rtt.BadInput, match=what):
            rtt.load_both(path if rubrics else write_rows(tmp_path / "b.jsonl"), rubrics, False)
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [dict(ROW, prompt=f"{name} {split}")])
    assert rtt.load_tasks("google/IFEval")[0].prompt == "google/IFEval train"



@pytest.mark.parametrize("code", rtt.LANGUAGES)
def test_a_language_is_known_by_its_script(code):
    text = {
        "LATIN": "Ça va, Łódź", "CYRILLIC": "Привіт", "ARABIC": "سلام", "DEVANAGARI": "नमस्ते",
        "BENGALI": "নমস্কার",
        "GUJARATI": "નમસ્તે", "GURMUKHI": "ਸਤਿ", "TAMIL": "வணக்கம்", "TELUGU": "నమస్తే", "KANNADA": "ನಮಸ್ಕಾರ",
        "MALAYALAM": "നമസ്കാരം", "THAI": "สวัสดี", "HEBREW": "שלום", "HANGUL": "안녕", "CJK": "你好",
        "HIRAGANA KATAKANA CJK": "東京タワーへ",
    }  # fmt: skip
    own, _ = rtt.script_of(code)
    rubric = rtt.make_rubric("language:response_language", dict(language=code))
    assert {script for script in text if rtt.verify(rubric, text[script]).satisfied} == {own}


# ==================================================================================================
# 2. Rollouts
# ==================================================================================================

PROMPTS = [[5, 6], [7, 8, 9, 10, 11, 12, 13], [14]]


def roll(model, prompts=PROMPTS, G=4, T=12, temperature=1.0, ends=(END, OTHER_END), pad=0, seeds=None, **how):
    seeds = range(len(prompts)) if seeds is None else seeds
    return rtt.sample(model, prompts, G, T, temperature, ends, pad, list(seeds), **how)


def joined(rollout):
    """ids and attention mask [N, L + T] of prompts and responses, and T."""
    G = len(rollout.ids) // len(rollout.prompt_ids)
    ids = torch.cat([rollout.prompt_ids.repeat_interleave(G, 0), rollout.ids], 1)
    return ids, torch.cat([rollout.prompt_mask.repeat_interleave(G, 0), rollout.mask], 1), rollout.ids.shape[1]


def naive_logprobs(model, prompt, ids, temperature=1.0):
    """No padding, no cache, no batch: one row through the model. Returns [len(ids)] and the entropies."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
    logp = logits.log_softmax(-1)
    return logp[range(len(ids)), ids], -(logp.exp() * logp).sum(-1)


def rows_of(rollout, prompts=PROMPTS):
    """(prompt, response ids without padding) of each of the N rows."""
    G = len(rollout.ids) // len(prompts)
    lengths = rollout.mask.sum(1).tolist()
    return [(prompts[i // G], ids[:n]) for i, (ids, n) in enumerate(zip(rollout.ids.tolist(), lengths))]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("make_model", MODELS)
@torch.no_grad()
def test_sampler_and_scorer_agree_with_a_plain_forward_pass(make_model, temperature):
    model = make_model()
    rollout = roll(model, temperature=temperature)
    ids, attention, T = joined(rollout)
    shared = rtt.token_logprobs(model, ids, attention, T, temperature, group_size=4)
    single = rtt.token_logprobs(model, ids, attention, T, temperature)
    assert shared.dtype == rollout.logprobs.dtype == torch.float32
    assert rollout.mask.sum(1).unique().numel() > 2  # ragged
    assert not shared[rollout.mask == 0].any() and not single[rollout.mask == 0].any()
    for i, (prompt, response) in enumerate(rows_of(rollout)):
        logp, entropy = naive_logprobs(model, prompt, response, temperature)
        n = len(response)
        assert close(rollout.logprobs[i, :n], logp, 1e-4) and close(rollout.entropy[i, :n], entropy, 1e-4)
        assert close(shared[i, :n], logp, 1e-4) and close(single[i, :n], logp, 1e-4)


@pytest.mark.parametrize("make_model", MODELS)
def test_samples_of_a_prompt_do_not_depend_on_the_rest_of_the_batch(make_model):
    model = make_model()
    batch = roll(model, seeds=[1, 2, 3])
    for p in range(3):
        alone = roll(model, [PROMPTS[p]], seeds=[1 + p])
        rows = slice(4 * p, 4 * p + 4)
        n = alone.ids.shape[1]
        assert torch.equal(alone.ids, batch.ids[rows, :n]) and not batch.mask[rows, n:].any()
        assert close(alone.logprobs, batch.logprobs[rows, :n])
    assert len({tuple(row) for row in batch.ids.tolist()}) > 8  # and differ within a group


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@torch.no_grad()
def test_sampled_tokens_follow_the_softmax_at_that_temperature(temperature):
    model, G = tiny_model(), 20_000
    counts = roll(model, [[5, 6]], G, T=1, temperature=temperature).ids[:, 0].bincount(minlength=23)
    p = (model(torch.tensor([[5, 6]])).logits[0, -1] / temperature).softmax(-1)
    assert ((counts / G - p).abs() < 4 * (p * (1 - p) / G).sqrt() + 1e-4).all()


def test_draw_gives_each_token_its_share_of_the_unit_interval():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    uniform = (torch.arange(1000) + 0.5) / 1000
    tokens = rtt.draw(p.log().expand(1000, -1), uniform)
    assert tokens.bincount(minlength=6).tolist() == [0, 250, 0, 500, 250, 0]
    assert rtt.draw(p.log()[None], torch.zeros(1)) == 1  # not token 0, which has no share
    half = torch.randn(4, 5000).log_softmax(1).bfloat16()  # a sum of 5000 in half precision would be off
    assert torch.equal(rtt.draw(half, uniform[::250]), rtt.draw(half.float(), uniform[::250]))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_of_0_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        roll(tiny_model(), temperature=temperature)


@pytest.mark.parametrize("pad", [0, END])
def test_end_tokens_are_in_the_mask_and_the_pad_token_confuses_nothing(pad):
    rollout = roll(tiny_model(), G=16, pad=pad)
    last = []
    for ids, mask, truncated in zip(rollout.ids.tolist(), rollout.mask.tolist(), rollout.truncated.tolist()):
        n = sum(mask)
        assert mask == [1] * n + [0] * (len(mask) - n)
        assert not {END, OTHER_END} & set(ids[: n - 1])  # ended where it ended
        assert truncated == (ids[n - 1] not in (END, OTHER_END)) and (n == 12 or not truncated)
        assert set(ids[n:]) <= {pad}
        last.append("truncated" if truncated else ids[n - 1])
    assert set(last) == {END, OTHER_END, "truncated"}
    assert not rollout.logprobs[rollout.mask == 0].any() and (rollout.logprobs[rollout.mask > 0] < 0).all()


def test_sampling_ignores_the_generation_config():
    model = tiny_model()
    expected = roll(model).ids
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, repetition_penalty=9.0)
    assert torch.equal(roll(model).ids, expected)


def test_no_noise_of_training_reaches_the_ratio():
    sizes = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=2, vocab_size=23, num_local_experts=4)
    torch.manual_seed(0)
    config = PhimoeConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, router_jitter_noise=0.5)
    model = PhimoeForCausalLM(config)
    ids, mask = torch.randint(3, 23, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    quiet = rtt.token_logprobs(model.eval(), ids, mask, 5)
    assert not torch.allclose(rtt.token_logprobs(model.train(), ids, mask, 5), quiet, atol=1e-5)  # there is noise
    model.activation_checkpointing_enable()
    rtt.training_mode(model)
    assert close(rtt.token_logprobs(model, ids, mask, 5), quiet)


def test_a_decoding_step_is_recorded_only_where_every_step_has_the_same_shape():
    full = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    assert rtt.can_be_recorded(LlamaConfig(**full)) and rtt.can_be_recorded(Qwen2Config(**full))
    assert not rtt.can_be_recorded(Gemma3TextConfig(**full))  # sliding windows
    for kind in ("dynamic", "linear"):
        rope = dict(rope_type=kind, rope_theta=1e4, factor=2.0)
        assert rtt.can_be_recorded(LlamaConfig(**full, rope_parameters=rope)) == (kind == "linear")
    assert not rtt.can_be_recorded(GPT2Config())


def test_a_step_that_cannot_be_recorded_is_said_with_the_way_out(monkeypatch):
    def graph(graph, capture_error_mode):
        assert capture_error_mode == "thread_local"
        raise RuntimeError("operation not permitted\nand much more")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(rtt.BadInput, match="operation not permitted.*--no-graph$"):
        rtt.recorded(None, torch.zeros(1))


def test_the_slots_of_a_static_cache_are_a_multiple_of_64(monkeypatch):
    slots = []
    real = rtt.StaticCache
    monkeypatch.setattr(rtt, "recorded", lambda step, *inputs: step)
    monkeypatch.setattr(
        rtt, "StaticCache", lambda config, max_cache_len: slots.append(max_cache_len) or real(config, max_cache_len)
    )
    for T in (56, 57, 58):  # after 7 tokens of prompt
        roll(tiny_model(), T=T, graph=True)
    assert slots == [64, 64, 128]


@pytest.mark.parametrize("ends, pad", [((END, OTHER_END), 0), ((END,), END), (range(3, 14), 3), ((), 0)])
@pytest.mark.parametrize("make_model", MODELS)
def test_a_static_cache_gives_the_same_rollout_as_a_growing_one(make_model, ends, pad, monkeypatch):
    model, seen = make_model(), []
    grown = roll(model, G=3, T=40, ends=ends, pad=pad)
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    monkeypatch.setattr(rtt, "recorded", lambda step, *inputs: step)  # a graph needs CUDA
    fixed = roll(model, G=3, T=40, ends=ends, pad=pad, graph=True)
    for name in ("ids", "mask", "truncated", "prompt_ids", "prompt_mask"):
        assert torch.equal(getattr(fixed, name), getattr(grown, name)), name
    assert close(fixed.logprobs, grown.logprobs, 1e-4) and close(fixed.entropy, grown.entropy, 1e-4)
    longest = int(grown.mask.sum(1).max())
    assert seen == [(9, 6)] + [(9, 1)] * longest
    assert (longest < 16) == (len(ends) > 2) and bool(fixed.truncated.all()) == (not ends)


@pytest.mark.parametrize("make_model", MODELS)
def test_both_ways_of_scoring_have_the_gradient_of_plain_forward_passes(make_model):
    model = make_model()
    rollout = roll(model, T=9, temperature=1.3)
    push = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for i, (prompt, response) in enumerate(rows_of(rollout)):
        total = total + (naive_logprobs(model, prompt, response, 1.3)[0] * push[i, : len(response)]).sum()
    expected = flat_grad(total, model)
    ids, attention, T = joined(rollout)
    for group_size in (1, 4):
        logprobs = rtt.token_logprobs(model, ids, attention, T, 1.3, group_size)
        assert close(flat_grad((logprobs * push).sum(), model) / expected.norm(), expected / expected.norm())
    model.activation_checkpointing_enable()
    rtt.training_mode(model)
    again = rtt.token_logprobs(model, ids, attention, T, 1.3)
    assert close(flat_grad((again * push).sum(), model) / expected.norm(), expected / expected.norm())
    with pytest.raises(ValueError, match="group_size must be 1"):
        rtt.token_logprobs(model, ids, attention, T, 1.3, 4)


@pytest.mark.parametrize("chunk", [1, 3, 7, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_logprobs_is_log_softmax_at_the_target(dtype, chunk):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, 11, generator=generator)).to(dtype).requires_grad_()
    targets, push = torch.randint(11, (7,), generator=generator), torch.randn(7, generator=generator)
    chosen = rtt.chosen_logprobs(logits, targets, 0.7, chunk)
    plain = (logits.float() / 0.7).log_softmax(1)[range(7), targets]
    assert chosen.dtype == torch.float32 and close(chosen, plain)
    [gradient] = torch.autograd.grad((chosen * push).sum(), logits)
    [expected] = torch.autograd.grad((plain * push).sum(), logits)
    assert close(gradient, expected, 1e-5 if dtype == torch.float32 else 1e-2)


def test_prompts_are_prefilled_once_and_ended_responses_cost_nothing():
    model, seen = tiny_model(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    lengths = roll(model).mask.sum(1).tolist()
    expected = [(3, 6)]  # P prompts of up to 7 tokens but the last, then one token of each row that goes on
    for t in range(12):
        going = sum(n > t for n in lengths)
        expected += [(going, 1)] if going else []
    assert seen == expected and expected[1][0] > expected[-1][0]


# ==================================================================================================
# 3. Verdicts, and characters to tokens
# ==================================================================================================


def byte_tokens(tokenizer, text, rng):
    """A tokenization of the text that its tokenizer would never choose, down to single bytes."""
    mapped = "".join(piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text))
    assert len(mapped) == len(text.encode())  # byte-level BPE: one letter of its alphabet a byte
    vocabulary, ids = tokenizer.get_vocab(), []
    while mapped:
        sizes = [n for n in range(1, 6) if mapped[:n] in vocabulary]
        n = rng.choice(sizes)
        ids, mapped = ids + [vocabulary[mapped[:n]]], mapped[n:]
    return ids


def single_bytes(tokenizer, text):
    [(mapped, _)] = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return tokenizer.convert_tokens_to_ids(list(mapped))


TEXTS = ["A lamp 😀 and 灯。 élan", "😀😀", "", " x", "é 👩‍🚀 \n\n end.", "İ ß “quoted”"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("how", ["canonical", "bytes", "truncated"])
def test_token_spans_are_the_characters_whose_bytes_a_token_holds(tokenizer, text, how):
    rng = random.Random(0)
    for _ in range(1 if how == "canonical" else 5):
        ids = tokenizer(text).input_ids if how == "canonical" else byte_tokens(tokenizer, text, rng)
        ids = ids[: rng.randint(0, len(ids))] if how == "truncated" else ids
        sizes = [len(tokenizer.convert_ids_to_tokens(i)) for i in ids]  # in bytes
        shown = text.encode()[: sum(sizes)].decode(errors="replace")  # a cut character shows as \ufffd
        owner, byte = [], 0  # for each byte, its character
        for c, char in enumerate(shown):
            width = len(char.encode()) if text.startswith(shown[: c + 1]) else sum(sizes) - byte
            owner, byte = owner + [c] * width, byte + width
        expected, start = [], 0
        for n in sizes:
            expected.append((owner[start], owner[start + n - 1] + 1))
            start += n
        assert rtt.token_spans(tokenizer, [ids]) == ([shown], [expected])


def sentencepiece():
    """A tokenizer as LLaMA's: a space is ▁, before every text comes one, unknown characters are bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁alampndky.,é"]
    pieces += ["la", "mp", "▁a", "▁la", "lamp", "▁lamp", "an"]
    merges = [("l", "a"), ("m", "p"), ("▁", "a"), ("▁", "la"), ("la", "mp"), ("▁la", "mp"), ("a", "n")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def random_text(rng, size=12):
    return "".join(rng.choices(["lamp", " and", " ", "a", "灯", "😀", "é", ",", " 😀", "👩‍🚀", "\n"], k=size))


def spans_by_bytes(texts_of_tokens, text):
    """For each token (given as its bytes) the characters of the text that it has a byte of."""
    owner = [c for c, char in enumerate(text) for _ in char.encode()]
    ends = [0, *itertools.accumulate(map(len, texts_of_tokens))]
    assert ends[-1] == len(owner)
    return [(owner[a], owner[b - 1] + 1) for a, b in zip(ends, ends[1:])]


def test_token_spans_of_random_texts_in_both_kinds_of_tokenizer(tokenizer):
    rng, llama, unknown = random.Random(0), sentencepiece(), re.compile("<0x(..)>")
    for _ in range(60):
        text = random_text(rng)
        ids = byte_tokens(tokenizer, text, rng)
        pieces = [b" " * len(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]  # a letter is a byte
        assert rtt.token_spans(tokenizer, [ids]) == ([text], [spans_by_bytes(pieces, text)])
        ids = llama("," + text).input_ids[2:]  # a response begins in the middle of a text: no ▁ is put before
        names = llama.convert_ids_to_tokens(ids)
        found = [unknown.match(name) for name in names]
        pieces = [bytes.fromhex(x[1]) if x else n.replace("▁", " ").encode() for n, x in zip(names, found)]
        assert b"".join(pieces).decode() == text and any(found)
        assert rtt.token_spans(llama, [ids]) == ([text], [spans_by_bytes(pieces, text)])


@pytest.mark.parametrize("make", ["bytes", "sentencepiece"])
def test_token_spans_of_a_response_cut_in_a_character_lie_in_its_text(tokenizer, make):
    rng, coder = random.Random(0), tokenizer if make == "bytes" else sentencepiece()
    for _ in range(60):
        text = random_text(rng) + "灯"
        ids = coder("," + text, add_special_tokens=False).input_ids
        cut = ids[: rng.randint(1, len(ids) - 1)]
        [shown], [spans] = rtt.token_spans(coder, [cut])
        [text], [whole] = rtt.token_spans(coder, [ids])
        assert len(spans) == len(cut) and all(0 <= start <= end <= len(shown) for start, end in spans)
        sound = len(os.path.commonprefix([shown, text]))  # what comes before the cut is as it was
        before = lambda spans: [(start, end) for start, end in spans[: len(cut)] if end <= sound]
        assert before(spans) == before(whole) and not shown[sound:].strip("\ufffd")


def test_evidence_reaches_every_token_of_a_split_character_and_no_other(tokenizer):
    ids = byte_tokens(tokenizer, "灯a", random.Random(1))
    [text], [tokens] = rtt.token_spans(tokenizer, [ids])
    assert rtt.evidence_to_tokens([(0, 1)], tokens) == [1.0] * (len(ids) - 1) + [0.0]
    assert rtt.evidence_to_tokens([(1, 2)], tokens) == [0.0] * (len(ids) - 1) + [1.0]
    assert rtt.evidence_to_tokens([], tokens) == [0.0] * len(ids)


def graded(tokenizer, responses, rubric_lists, ended, judge=None):
    """`grade` on responses given as token ids; the end token is added where ended."""
    responses = [ids + [tokenizer.eos_token_id] * end for ids, end in zip(responses, ended)]
    T = max(map(len, responses))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (T - len(row)) for row in responses])
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in responses])
    rollout = rtt.Rollout(None, None, ids, mask, None, None, ~torch.tensor(ended))
    make = lambda i, kw: rtt.Rubric(i, {}, kw) if i == rtt.JUDGED else rtt.make_rubric(i, kw)
    tasks = [rtt.Task("p", [make(*rubric) for rubric in rubrics]) for rubrics in rubric_lists]
    return rtt.grade(tokenizer, rollout, tasks, judge)


def test_grade_marks_the_tokens_of_the_evidence_without_encoding_again(tokenizer):
    text = "😀 One, two."
    ids = byte_tokens(tokenizer, text, random.Random(2))
    words = ("length_constraints:number_words", dict(num_words=3, **AT_LEAST))
    rubrics = [("punctuation:no_comma", {}), words]
    texts, verdicts, evidence, known = graded(tokenizer, [ids, ids], [rubrics, rubrics[:1]], [True, False])
    commas, nothing = [float("," in tokenizer.decode([i])) for i in ids], [0.0] * len(ids)
    assert texts == [text, text] and sum(commas) == 1
    assert verdicts.tolist() == [[-1, -1], [-1, 0]]  # 0: the second prompt has one rubric
    assert evidence[0].tolist() == [commas + [0.0], nothing + [1.0]]  # the end token: too few words
    assert evidence[1].tolist() == [commas + [0.0], nothing + [0.0]]


ANSWERS = ("yes", "Yes"), ("no", "No")


def slow_yes(judge, prompt, response, criterion):
    """One question, one forward pass over all of it, the softmax over the vocabulary."""
    ids = rtt.encode_prompt(judge.tokenizer, rtt.QUESTION.format(prompt, response, criterion))
    p = judge.model(torch.tensor([ids])).logits[0, -1].softmax(0)
    first = lambda word: judge.tokenizer(word, add_special_tokens=False).input_ids[0]
    yes, no = ({first(before + word) for word in words for before in ("", " ")} for words in ANSWERS)
    yes, no = float(p[list(yes - no)].sum()), float(p[list(no - yes)].sum())
    return yes / (yes + no)


QUESTIONS = [
    ("Tell.", "A lamp.", ["is kind"]),
    ("Tell a story of a fox.", "A fox, 😀, and then " * 5, ["is kind", "is about a fox and a lamp", "is"]),
    ("Tell.", "x", ["is", "is"]),
    ("A fox.", "The end. " * 9, ["has two sentences that rhyme with each other, at least", "is kind"]),
]


@pytest.mark.parametrize("make_model", MODELS)
@torch.no_grad()
def test_the_judge_is_as_sure_as_one_forward_pass_a_question_says(tokenizer, make_model):
    judge = rtt.Policy(make_model(vocab_size=len(tokenizer)), tokenizer, [2])
    asked = [(p, r, c) for p, r, criteria in QUESTIONS for c in criteria]
    expected = torch.tensor([slow_yes(judge, *question) for question in asked])
    assert expected.unique().numel() == 7 and len(expected) == 8  # one is asked twice
    questions = [rtt.QUESTION.format(*question) for question in asked]
    for batch in (1, 2, 16):
        assert close(rtt.judge_yes(judge, questions, batch), expected)
    assert close(rtt.judge_yes(judge, questions[::-1]), expected.flip(0))


@torch.no_grad()
def test_a_question_longer_than_the_judges_context_loses_its_middle(tokenizer):
    judge = rtt.Policy(absolute_model(vocab_size=len(tokenizer)), tokenizer, [2])  # 512 positions, no more
    questions = [rtt.QUESTION.format("Tell.", response, "is kind") for response in ("A" + "😀" * 400 + "Z", "A lamp.")]
    row = rtt.encode_prompt(tokenizer, questions[0])
    p = judge.model(torch.tensor([row[:256] + row[-256:]])).logits[0, -1].softmax(0)
    yes, no = (float(p[list(rtt.first_tokens(tokenizer, word))].sum()) for word in ("yes", "no"))
    expected = [yes / (yes + no), slow_yes(judge, "Tell.", "A lamp.", "is kind")]
    assert len(row) > 512 and close(rtt.judge_yes(judge, questions), expected)


def test_the_judge_decides_its_rubrics_without_evidence_and_is_not_asked_about_an_empty_response(
    tokenizer, monkeypatch
):
    asked = []

    def judge_yes(judge, questions):
        asked.extend(questions)
        return torch.tensor([0.9 if "is kind" in question else 0.1 for question in questions])

    monkeypatch.setattr(rtt, "judge_yes", judge_yes)
    rubrics = [(rtt.JUDGED, "is kind"), ("punctuation:no_comma", {}), (rtt.JUDGED, "is long")]
    ids = tokenizer("A lamp, a key.").input_ids
    blank = tokenizer(" ").input_ids
    texts, verdicts, evidence, known = graded(
        tokenizer, [ids, blank, [], ids], [rubrics, rubrics[:2]], [True] * 4, "judge"
    )
    expected = [(texts[0], "is kind"), (texts[0], "is long"), (texts[3], "is kind")]
    assert asked == [rtt.QUESTION.format("p", *pair) for pair in expected]
    assert verdicts.tolist() == [[1, -1, -1], [-1, -1, -1], [-1, -1, 0], [1, -1, 0]]
    assert known.tolist() == [[False, True, False], [True] * 3, [True, True, False], [False, True, False]]
    assert not evidence[~known].any()
    assert evidence[0, 1].sum() == 1  # the comma
    monkeypatch.setattr(rtt, "judge_yes", None)  # without such rubrics there need be no judge
    graded(tokenizer, [ids], [rubrics[1:2]], [True])


def test_a_language_whose_letters_others_share_is_judged_where_the_letters_are_right(tokenizer, monkeypatch):
    asked = []
    deny = lambda _, questions: asked.extend(questions) or torch.zeros(len(questions))
    monkeypatch.setattr(rtt, "judge_yes", deny)
    rubrics = [("language:response_language", dict(language=language)) for language in ("de", "ko")]
    latin, korean = tokenizer("A lamp").input_ids, byte_tokens(tokenizer, "등불", random.Random(0))
    _, verdicts, evidence, known = graded(tokenizer, [latin, korean], [rubrics] * 2, [False] * 2, "judge")
    assert asked == [rtt.QUESTION.format("p", "A lamp", "respond entirely in German")]
    assert verdicts.tolist() == [[-1, -1], [-1, 1]]
    assert known.tolist() == [[False, True], [True, True]]


def test_response_reward_counts_only_rubrics_that_exist():
    verdicts = torch.tensor([[1, 1, 1], [1, -1, 0], [1, 0, 0], [-1, -1, -1]])
    assert rtt.response_reward(verdicts).tolist() == [1, 0, 1, 0]
    assert rtt.response_reward(verdicts, "csr").tolist() == [1, 0.5, 1, 0]
    assert rtt.response_reward(verdicts[:, None].float(), "csr").tolist() == [[1], [0.5], [1], [0]]
    with pytest.raises(ValueError, match="not Booleans"):  # False would count as "no such rubric"
        rtt.response_reward(verdicts > 0)


# ==================================================================================================
# 4. Relevance
# ==================================================================================================


@pytest.fixture
def discriminator(folder, tokenizer):
    torch.manual_seed(0)
    config = rtt.without_dropout(AutoConfig.from_pretrained(folder))
    return rtt.RelevanceDiscriminator(AutoModel.from_pretrained(folder, config=config), tokenizer, 1e-2)


def responses(N=6, T=9, seed=0):
    """ids and mask [N, T] of ragged random responses, token 77 here and there."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(70, 80, (N, T), generator=generator)
    lengths = torch.randint(1, T + 1, (N, 1), generator=generator)
    return ids, (torch.arange(T) < lengths).long()


def exist(criteria):
    """[N, K] 1 where there is a rubric."""
    K = max(map(len, criteria))
    return torch.tensor([[int(k < len(texts)) for k in range(K)] for texts in criteria])


CRITERIA = [["find it", "a", "b"], ["find it"], ["a much longer criterion, with more words", "find it"]] * 2


def test_relevance_is_a_probability_and_0_at_padding_and_for_absent_rubrics(discriminator):
    ids, mask = responses()
    relevance = discriminator.predict(CRITERIA, ids, mask, exist(CRITERIA))
    present = torch.tensor([[[k < len(texts)] for k in range(3)] for texts in CRITERIA]) & (mask[:, None] > 0)
    assert relevance.shape == (6, 3, 9) and not relevance.requires_grad
    assert ((relevance > 0) & (relevance < 1))[present].all() and not relevance[~present].any()


def test_relevance_does_not_depend_on_the_batch(discriminator):
    ids, mask = responses()
    together = discriminator.predict(CRITERIA, ids, mask, exist(CRITERIA))
    first = torch.zeros(6, 3)
    assert not discriminator.predict(CRITERIA, ids, mask, first).any()
    first[0, 0] = 1
    some = discriminator.predict(CRITERIA, ids, mask, first)
    assert close(some[0, 0], together[0, 0]) and not some[1:].any() and not some[0, 1:].any()
    assert close(discriminator.predict(CRITERIA, ids, mask, exist(CRITERIA), batch=2), together)
    backwards = discriminator.predict(CRITERIA[::-1], ids.flip(0), mask.flip(0), exist(CRITERIA[::-1]))
    assert close(backwards.flip(0), together)
    garbage = torch.where(mask > 0, ids, 5)
    assert close(discriminator.predict(CRITERIA, garbage, mask, exist(CRITERIA)), together)
    for i, texts in enumerate(CRITERIA):
        n = int(mask[i].sum())
        [alone] = discriminator.predict([texts], ids[i : i + 1, :n], mask[i : i + 1, :n], exist([texts]))
        assert close(alone, together[i, : len(texts), :n])


def test_the_discriminator_learns_from_the_evidence_and_from_the_criterion(discriminator):
    ids, mask = responses(16)
    criteria = [["find it", "leave it"]] * 16
    evidence = torch.stack([(ids == 77), torch.zeros_like(ids)], 1).float() * mask[:, None]
    before = rtt.f1_and_auroc(*score(discriminator, criteria, ids, mask, evidence))
    torch.manual_seed(0)
    for _ in range(60):
        discriminator.fit(criteria, ids, mask, evidence, exist(criteria))
    after = rtt.f1_and_auroc(*score(discriminator, criteria, ids, mask, evidence))
    assert before[0] < 0.5 and after[0] > 0.9 and after[1] > 0.97


def score(discriminator, criteria, ids, mask, evidence):
    relevance = discriminator.predict(criteria, ids, mask, exist(criteria))
    return rtt.scored_tokens(relevance, evidence, torch.ones(evidence.shape[:2]), mask)


def test_fit_is_one_step_on_the_mean_cross_entropy_of_response_tokens(discriminator, monkeypatch):
    """Every parameter moves by lr * gradient of a slow, unpadded mean; no gradient is left behind."""
    (ids, mask), criteria = responses(), [["use the word lamp"], ["do not use commas"]] * 3
    evidence = (torch.rand(6, 1, 9, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    slow, tokens = 0.0, 0
    for i in range(6):
        n = int(mask[i].sum())
        p = discriminator(criteria[i], ids[i : i + 1, :n], mask[i : i + 1, :n])[0].sigmoid()
        y = evidence[i, 0, :n]
        slow, tokens = slow - (y * p.log() + (1 - y) * (1 - p).log()).sum(), tokens + n
    weights = list(discriminator.parameters())
    wanted = torch.autograd.grad(slow / tokens, weights)
    size = sum(g.square().sum() for g in wanted).sqrt().clamp(min=1.0)  # clipped to norm 1
    before = [w.detach().clone() for w in weights]
    monkeypatch.setattr(discriminator, "optimizer", torch.optim.SGD(weights, lr=0.5))
    discriminator.fit(criteria, ids, mask, evidence, exist(criteria), pairs=6)
    for old, new, gradient in zip(before, weights, wanted):
        assert close(new, old - 0.5 * gradient / size, 1e-4)
    assert all(w.grad is None for w in weights)


def test_f1_and_auroc_against_a_loop_over_pairs_with_ties():
    scores = torch.tensor([0.9, 0.7, 0.7, 0.7, 0.5, 0.2, 0.2, 0.6])
    labels = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    pairs = [(p, n) for p, a in zip(scores, labels) if a for n, b in zip(scores, labels) if not b]
    auroc = sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)
    precision, recall = 3 / 5, 3 / 4  # five are above 0.5, three of them of the four positives
    expected = 2 * precision * recall / (precision + recall), float(auroc)
    assert rtt.f1_and_auroc(scores, labels) == pytest.approx(expected)


# ==================================================================================================
# 5. Advantages
# ==================================================================================================


def normalize(values, eps):
    """(x - mean) / (std + eps) of a list."""
    mean = sum(values) / len(values)
    std = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))
    return [(x - mean) / (std + eps) for x in values]


def loop_token_advantage(verdicts, relevance, lengths, partition, eps=0.1):
    """The definition, one number at a time: verdicts [G][K], relevance [G][K][T] -> {(i, t): advantage}."""
    G, K = len(verdicts), len(verdicts[0])
    places = [(i, t) for i in range(G) for t in range(lengths[i])]
    reward = {(i, k, t): verdicts[i][k] * relevance[i][k][t] for i, t in places for k in range(K)}
    total = dict.fromkeys(places, 0.0)
    if partition == "rubric":
        means = [sum(reward[i, k, t] for k in range(K)) / K for i, t in places]
        return dict(zip(places, normalize(means, eps)))
    for k in range(K):
        if partition == "intra":
            for i in range(G):
                row = normalize([reward[i, k, t] for t in range(lengths[i])], eps)
                for t, value in enumerate(row):
                    total[i, t] += value / K
        elif partition == "inter":
            for (i, t), value in zip(places, normalize([reward[i, k, t] for i, t in places], eps)):
                total[i, t] += value / K
        elif partition == "contested":
            if len({verdicts[i][k] for i in range(G)}) == 2:
                for i in range(G):
                    row = normalize([reward[i, k, t] for t in range(lengths[i])], eps)
                    for t, value in enumerate(row):
                        total[i, t] += value / K
        else:
            signs = normalize([verdicts[i][k] for i in range(G)], eps)
            spread = [relevance[i][k][t] for i, t in places]
            for (i, t), w in zip(places, normalize(spread, eps) if partition == "cross" else spread):
                total[i, t] += signs[i] * w / K
    return total


def random_group(G=4, K=3, T=6, seed=0):
    """verdicts [G, K] int, relevance [G, K, T], mask [G, T] ragged, and the lengths."""
    generator = torch.Generator().manual_seed(seed)
    verdicts = torch.randint(2, (G, K), generator=generator) * 2 - 1
    relevance = torch.rand(G, K, T, generator=generator)
    lengths = [T] + torch.randint(1, T, (G - 1,), generator=generator).tolist()
    return verdicts, relevance, (torch.arange(T) < torch.tensor(lengths)[:, None]).long(), lengths


def test_response_advantage_against_a_loop():
    rewards = [1.0, 0.0, 0.25, 1.0, 0.5]
    assert close(rtt.response_advantage(torch.tensor(rewards)), normalize(rewards, 1e-6))
    groups = torch.tensor([rewards, [10 * reward for reward in rewards], [0.3] * 5])  # [P, G]
    assert close(rtt.response_advantage(groups), [normalize(row, 1e-6) for row in groups.tolist()], 1e-4)
    assert not rtt.response_advantage(groups)[2].any()


@pytest.mark.parametrize("rewards", [[0, 0, 0], [1, 1], [0.1, 0.1, 0.1], [1 / 3] * 7, [0.7]])
def test_equal_rewards_give_exactly_0_and_a_group_of_1_no_nan(rewards):
    assert rtt.response_advantage(torch.tensor(rewards)).tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize("partition", rtt.PARTITIONS)
def test_partitions_against_loops_with_1_2_and_7_rubrics_in_one_ragged_batch(partition):
    G, T, sizes = 4, 6, (1, 7, 2)
    groups = [random_group(G, K, T, seed=K) for K in sizes]
    verdicts, relevance = torch.zeros(3 * G, 7, dtype=torch.long), torch.full((3 * G, 7, T), 0.3)
    for p, (v, w, _, _) in enumerate(groups):
        rows = slice(p * G, p * G + G)
        verdicts[rows, : sizes[p]], relevance[rows, : sizes[p]] = v, w
    mask = torch.cat([m for _, _, m, _ in groups])
    relevance += 100.0 * (1 - mask[:, None])  # garbage at padding
    args = SimpleNamespace(group_size=G, partition=partition, alpha=0.25, combine="mix")
    rewards = rtt.response_reward(verdicts, "csr")
    combined = rtt.batch_advantages(rewards, verdicts, relevance, mask, args)  # [N, T]
    for p, (v, w, _, lengths) in enumerate(groups):
        rows = slice(p * G, p * G + G)
        token_adv = rtt.token_advantage(verdicts[rows], relevance[rows], mask[rows], partition)
        assert not token_adv[mask[rows] == 0].any()
        expected = loop_token_advantage(v.tolist(), w.tolist(), lengths, partition)
        response = normalize([((row > 0).sum() / len(row)).item() for row in v], 1e-6)
        for i in range(G):
            for t in range(T):
                value = 0.75 * response[i] + 0.25 * expected[i, t] if t < lengths[i] else 0.0
                assert close(combined[p * G + i, t], value), (p, i, t)


@pytest.mark.parametrize("partition", rtt.PARTITIONS)
def test_permuting_the_group_permutes_the_advantages(partition):
    verdicts, relevance, mask, _ = random_group()
    order = torch.tensor([2, 0, 3, 1])
    rewards = rtt.response_reward(verdicts, "csr")
    assert close(rtt.response_advantage(rewards[order]), rtt.response_advantage(rewards)[order])
    permuted = rtt.token_advantage(verdicts[order], relevance[order], mask[order], partition)
    assert close(permuted, rtt.token_advantage(verdicts, relevance, mask, partition)[order])


def test_release_trap_reshape_for_permute_mixes_the_rubrics_of_different_responses():
    """The authors' release turns [G, K, T] into [K, G, T] by reshape; that is another, wrong, number."""
    verdicts, relevance, mask, _ = random_group()
    mask = torch.ones_like(mask)
    reward = verdicts[..., None] * relevance  # [G, K, T]
    row = lambda entries: torch.tensor(normalize(entries.flatten().tolist(), 0.1)).view(4, 6)
    inter = lambda reward: torch.stack([row(of_rubric) for of_rubric in reward]).mean(0)  # -> [G, T]
    advantage = rtt.token_advantage(verdicts, relevance, mask, "inter")
    assert close(advantage, inter(reward.permute(1, 0, 2)))
    assert (advantage - inter(reward.reshape(3, 4, 6))).abs().max() > 0.1


@pytest.mark.parametrize("partition", rtt.PARTITIONS)
def test_release_trap_float_relevance_in_an_integer_tensor_is_cut_to_0(partition):
    """The authors' release writes relevance into a tensor of the verdicts' type, so 0.5 becomes 0."""
    verdicts, _, mask, _ = random_group()
    relevance = torch.full((4, 3, 6), 0.5)
    relevance[:, :, ::2] = 0.25
    advantage = rtt.token_advantage(verdicts, relevance, mask, partition)
    assert advantage.dtype == torch.float32 and advantage.abs().max() > 0.05
    assert torch.equal(advantage, rtt.token_advantage(verdicts.float(), relevance, mask.float(), partition))


def test_masked_normalize_against_a_list():
    x, mask = torch.tensor([[3.0, 5.0, 99.0], [1.0, 7.0, 4.0]]), torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    assert close(rtt.masked_normalize(x, mask, 1, 0.1)[0, :2], normalize([3.0, 5.0], 0.1))
    assert close(rtt.masked_normalize(x, mask, 1, 0.1)[1], normalize([1.0, 7.0, 4.0], 0.1))
    every = rtt.masked_normalize(x, mask, (0, 1), 0.1)
    assert close(every[mask > 0], normalize([3.0, 5.0, 1.0, 7.0, 4.0], 0.1)) and every[0, 2] == 0


def test_the_noise_of_a_relevance_that_sees_nothing_is_not_blown_up_to_unit_size():
    noise = 0.01 + 0.01 * torch.randn(4, 3, 40, generator=torch.Generator().manual_seed(0))
    verdicts, mask = random_group(T=40)[0], torch.ones(4, 40)
    blown_up = rtt.token_advantage(verdicts, noise, mask, "intra", eps=1e-6)
    assert rtt.token_advantage(verdicts, noise, mask, "intra").square().mean().sqrt() < 0.1
    assert blown_up.square().mean().sqrt() > 0.4  # what it would be
    found = torch.zeros(4, 3, 40).index_fill(2, torch.tensor([7]), 1.0)  # one relevant token of 40
    assert (rtt.token_advantage(torch.ones(4, 3), found, mask, "intra")[:, 7] > 3).all()


def test_verdict_partition_gives_nothing_where_irrelevant_or_where_the_group_agrees():
    verdicts = torch.tensor([[1, 1], [1, -1]])  # the group agrees on the first rubric
    relevance = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).expand(2, 2, 3)
    advantage = rtt.token_advantage(verdicts, relevance, torch.ones(2, 3), "verdict")
    assert (advantage[:, [0, 2]] == 0).all() and close(advantage[:, 1], torch.tensor([0.5, -0.5]) / 1.1)


@pytest.mark.parametrize("partition", rtt.PARTITIONS)
def test_only_these_partitions_do_without_the_relevance_of_rubrics_on_which_the_group_agrees(partition):
    verdicts = torch.tensor([[1, -1, 1, 0], [1, -1, -1, 0], [1, -1, 1, 0], [1, -1, 1, 0]])
    others = torch.tensor([[1, 1, -1, -1], [-1, 1, -1, 1]]).repeat(2, 1)  # of another group
    asked = rtt.contested(torch.cat([verdicts, others]), 4)
    assert asked[:4].tolist() == [[0, 0, s, 0] for s in (1, -1, 1, 1)]
    assert asked[4:].tolist() == [[1, 0, 0, -1], [-1, 0, 0, 1]] * 2
    _, relevance, mask, _ = random_group(K=4)
    advantage = rtt.token_advantage(verdicts, relevance, mask, partition)
    partly = rtt.token_advantage(verdicts, relevance * (asked[:4] != 0)[..., None], mask, partition)
    assert torch.allclose(advantage, partly) == (partition in ("verdict", "contested", "cross"))


@pytest.mark.parametrize("how, share", [("add", 1.0), ("mix", 0.75)])
def test_combine_advantages(how, share):
    response, token = torch.tensor([2.0, -1.0]), torch.tensor([[1.0, -1.0], [0.0, 9.0]])
    combined = rtt.combine_advantages(response, token, torch.tensor([[1, 1], [1, 0]]), alpha=0.25, how=how)
    assert combined.tolist() == [[share * 2 + 0.25, share * 2 - 0.25], [-share, 0.0]]


# ==================================================================================================
# 6. Exchangeability
# ==================================================================================================


def test_min_replace_gives_each_group_its_minimum():
    assert rtt.min_replace(torch.tensor([[3.0, 1, 2], [5, 6, 4]])).tolist() == [[1, 1, 1], [4, 4, 4]]


def test_adv_orthogonal_weights_cancel_and_move_no_more_than_they_must():
    w, adv = torch.rand(5, 8) + 0.5, torch.randn(5, 8)
    new = rtt.adv_orthogonal(w, adv)
    assert close((adv * new).sum(1), torch.zeros(5))
    change = w - new  # the change is along adv: no other weights that cancel are nearer
    assert close(change, adv * (change * adv).sum(1, keepdim=True) / adv.square().sum(1, keepdim=True))
    assert rtt.adv_orthogonal(w, torch.zeros(5, 8)).equal(w)
    assert not rtt.adv_orthogonal(w, adv.requires_grad_()).requires_grad


def loop_residual(coef, ids, mask):
    G, T = ids.shape
    groups = [{} for _ in range(G)]
    for i in range(G):
        for t in range(T):
            if mask[i, t]:
                groups[i].setdefault(int(ids[i, t]), []).append(float(coef[i, t]))
    tax = push = 0.0
    for v in set.intersection(*map(set, groups)):
        means = [sum(g[v]) / len(g[v]) for g in groups]
        tax, push = tax + abs(sum(means)), push + sum(map(abs, means))
    return tax / push if push else 0.0


def test_cancellation_residual_against_a_loop():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        ids, coef = torch.randint(50, 56, (3, 8), generator=generator), torch.randn(3, 8, generator=generator)
        mask = torch.randint(2, (3, 8), generator=generator)
        assert close(rtt.cancellation_residual(coef, ids, mask), loop_residual(coef, ids, mask))


def test_cancellation_residual_is_0_when_balanced_1_when_all_push_alike():
    ids, mask = torch.tensor([[5, 6, 7], [5, 8, 6]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    balanced = torch.tensor([[1.0, 9, 9], [-1, 9, 9]])  # 5 is shared; 6 is padding in one; 7 and 8 are not
    assert rtt.cancellation_residual(balanced, ids, mask) == 0.0
    assert rtt.cancellation_residual(balanced.abs(), ids, mask) == 1.0
    assert rtt.cancellation_residual(balanced, torch.tensor([[1, 2, 3], [4, 5, 6]]), mask) == 0.0
    balanced[1, 2] = math.nan  # padding
    assert rtt.cancellation_residual(balanced, ids, mask) == 0.0


# ==================================================================================================
# 7. The update
# ==================================================================================================

CLIPS = {"gspo": (0.1, 0.15)}  # the others: (0.2, 0.3)


def loss_case(seed=0, P=2, G=4, T=5, spread=0.4, dtype=torch.float64):
    """logprobs, old, advantages constant in each response, mask: [N, T]; ratios far from 1."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(P * G, T, generator=generator, dtype=dtype)
    logprobs = (old + spread * torch.randn(P * G, T, generator=generator, dtype=dtype)).requires_grad_()
    A = torch.randn(P, G, generator=generator, dtype=dtype)
    A = (A - A.mean(1, keepdim=True)).view(-1, 1)
    mask = (torch.arange(T) < torch.randint(1, T + 1, (P * G, 1), generator=generator)).long()
    return logprobs, old, A * mask, mask


def loop_coef(logprobs, old, advantages, mask, G, loss, low, high):
    """DESIGN's table, one token at a time: advantage * weight, [N, T]."""
    N, T = mask.shape
    coef = torch.zeros(N, T, dtype=logprobs.dtype)
    lengths = [int(n) for n in mask.sum(1)]
    log_ratio = (logprobs - old).tolist()
    s = [math.exp(sum(log_ratio[i][: lengths[i]]) / lengths[i]) for i in range(N)]
    mean = [sum(advantages[i].tolist()) / lengths[i] for i in range(N)]
    clip = lambda x: min(max(x, 1 - low), 1 + high)
    # PPO: the gradient is dead only where the clip makes the objective smaller
    ppo = lambda x, A: 0.0 if (A > 0 and x > 1 + high) or (A < 0 and x < 1 - low) else x
    for i in range(N):
        group = range(i // G * G, i // G * G + G)
        dot = sum(mean[j] * s[j] for j in group) / sum(mean[j] ** 2 for j in group)
        for t in range(lengths[i]):
            A, rho = float(advantages[i, t]), math.exp(log_ratio[i][t])
            coef[i, t] = A * {
                "grpo": ppo(rho, A),
                "grpo-fix": clip(rho),
                "grpo-mask": rho if 1 - low <= rho <= 1 + high else 0.0,
                "gspo": ppo(s[i], A) / lengths[i],
                "dfpo-min": min(s[j] for j in group),
                "dfpo-orth": s[i] - dot * mean[i],
            }[loss]
    return coef


@pytest.mark.parametrize("constant", [True, False], ids=["response-level", "token-level"])
@pytest.mark.parametrize("loss", rtt.CLIP)
def test_coef_is_the_table_of_the_methods_and_minus_the_gradient(loss, constant):
    logprobs, old, advantages, mask = loss_case()
    if not constant:
        advantages = advantages + 0.3 * torch.randn_like(advantages) * mask
    clip = CLIPS.get(loss, (0.2, 0.3))
    value, stats = rtt.policy_loss(logprobs, old, advantages, mask, 4, loss, clip)
    value.backward()
    denominator = len(mask) if loss == "gspo" else mask.sum()
    assert close(stats["coef"], loop_coef(logprobs, old, advantages, mask, 4, loss, *clip))
    assert close(logprobs.grad, -stats["coef"] / denominator)
    assert not logprobs.grad[mask == 0].any()


@pytest.mark.parametrize("loss", rtt.CLIP)
def test_padding_may_hold_anything(loss):
    logprobs, old, advantages, mask = loss_case(dtype=torch.float32)
    garbage = torch.where(mask > 0, logprobs, -200.0).detach().requires_grad_()  # exp(200) is infinite
    clean, stats = rtt.policy_loss(logprobs, old, advantages, mask, 4, loss)
    dirty, dirty_stats = rtt.policy_loss(garbage, old * mask, advantages, mask, 4, loss)
    dirty.backward()
    assert close(dirty, clean) and garbage.grad.isfinite().all()
    assert close(dirty_stats["coef"], stats["coef"])
    assert dirty_stats["approx_kl"] == pytest.approx(stats["approx_kl"]) and math.isfinite(stats["approx_kl"])


@pytest.mark.parametrize("loss", rtt.CLIP)
def test_only_the_new_log_probabilities_get_a_gradient(loss):
    """policy_loss(x, x, ...) on policy must learn, and a learned relevance must not be trained by it."""
    logprobs, _, advantages, mask = loss_case()
    advantages.requires_grad_()
    rtt.policy_loss(logprobs, logprobs, advantages, mask, 4, loss)[0].backward()
    weight = 1 / mask.sum(1, keepdim=True) / 8 if loss == "gspo" else 1 / mask.sum()
    assert close(logprobs.grad, -advantages.detach() * weight) and advantages.grad is None


@pytest.mark.parametrize("loss", rtt.CLIP)
@pytest.mark.parametrize("A", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("old", [-95.0, -9999.0, -math.inf])
def test_a_ratio_beyond_all_bounds_spoils_no_gradient(loss, A, old):
    logprobs = torch.full((2, 2), -1.0, requires_grad=True)
    olds, mask = torch.full((2, 2), -1.0), torch.ones(2, 2)
    olds[0, 0] = old
    value, stats = rtt.policy_loss(logprobs, olds, torch.tensor([[A], [-A]]) * mask, mask, 2, loss)
    value.backward()
    assert value.isfinite() and math.isfinite(stats["approx_kl"])
    assert close(logprobs.grad, -stats["coef"] / rtt.loss_denominator(mask, loss))
    assert not (loss in ("grpo", "gspo") and A > 0 and logprobs.grad[0, 0])  # let go


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("ratio, side", [(0.5, "below"), (0.9, "inside"), (1.1, "inside"), (1.5, "above")])
def test_ppo_clip_is_one_sided_for_either_sign_of_the_advantage(loss, A, ratio, side):
    alive = not (A > 0 and side == "above") and not (A < 0 and side == "below")
    expected, h = -A * ratio if alive else 0.0, 1e-6
    old, advantage = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), A)
    at = lambda logprob: rtt.policy_loss(logprob, old, advantage, torch.ones(1, 1), 1, loss, (0.2, 0.2))
    logprob = torch.full_like(old, math.log(ratio), requires_grad=True)
    value, stats = at(logprob)
    value.backward()
    slope = (at(logprob + h)[0] - at(logprob - h)[0]) / (2 * h)
    assert close(slope, expected, 1e-6) and close(logprob.grad, [[expected]], 1e-6)
    assert stats["clip_fraction"] == (not alive)


def test_on_policy_the_token_mean_losses_have_the_same_gradient():
    gradients = []
    for loss in ("grpo", "grpo-fix", "dfpo-min", "dfpo-orth", "grpo-mask"):
        logprobs, _, advantages, mask = loss_case()
        value, stats = rtt.policy_loss(logprobs, logprobs.detach(), advantages, mask, 4, loss)
        value.backward()
        gradients.append(logprobs.grad)
        assert stats["clip_fraction"] == 0 and stats["approx_kl"] == 0
    assert close(gradients[0], -advantages / mask.sum())
    assert all(close(gradient, gradients[0]) for gradient in gradients)


def test_gspo_token_by_token_is_the_gradient_of_the_sequence_objective():
    logprobs, old, advantages, mask = loss_case(spread=0.2)
    low, high = CLIPS["gspo"]

    def objective(x):  # mean over responses of min(s A, clip(s) A), s the geometric mean ratio
        s = (((x - old) * mask).sum(1) / mask.sum(1)).exp()
        return torch.min(s * advantages[:, 0], s.clamp(1 - low, 1 + high) * advantages[:, 0]).mean()

    value, stats = rtt.policy_loss(logprobs, old, advantages, mask, 4, "gspo", (low, high))
    value.backward()
    assert close(value, -objective(logprobs)) and 0 < stats["clip_fraction"] < 1
    for i, t in ((i, t) for i in range(8) for t in range(5)):
        step = torch.zeros_like(old)
        step[i, t] = 1e-6
        slope = (objective(logprobs + step) - objective(logprobs - step)) / 2e-6
        assert close(logprobs.grad[i, t], -slope, 1e-7)


def test_k3_is_the_kl_on_average_and_never_negative():
    p, q = torch.randn(2, 7, dtype=torch.float64).log_softmax(1)
    assert (rtt.k3(p, q) > 0).all() and (rtt.k3(p, p) == 0).all()
    small = torch.linspace(-1e-3, 1e-3, 1001)  # float32, where exp(d) - d - 1 is rounding
    assert close(rtt.k3(0, small) * 1e6, small.square() / 2 * 1e6, 1e-2) and (rtt.k3(0, small) >= 0).all()
    kl = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist()))  # KL(p || q)
    assert float((p.exp() * rtt.k3(p, q)).sum()) == pytest.approx(kl, rel=1e-9)  # tokens sampled from p


def options(**given):
    defaults = dict(updates=1, group_size=4, micro_batch=9, loss="grpo", clip=None, temperature=1.3)
    defaults |= dict(max_grad_norm=1e9, kl=0.0, gradient_checkpointing=False, device="cpu", dtype="float32")
    return SimpleNamespace(**defaults | given)


def off_policy_rollout(model, spread=0.3):
    """Three groups of different lengths, their log-probs perturbed as if the policy had moved."""
    rollout = roll(model, temperature=1.3)
    noise = torch.randn(rollout.logprobs.shape, generator=torch.Generator().manual_seed(0))
    rollout.logprobs += spread * noise * rollout.mask
    A = torch.randn(12, 1, generator=torch.Generator().manual_seed(1))
    return rollout, A * rollout.mask


def gradient_of_update(model, rollout, advantages, args, reference=None):
    """What one step of SGD at learning rate 1 subtracts from the weights, and the statistics."""
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    stats = rtt.update(model, torch.optim.SGD(model.parameters(), 1.0), rollout, advantages, args, reference)
    return before - torch.cat([p.detach().flatten() for p in model.parameters()]), stats


def flat_grad(value, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


@pytest.mark.parametrize("loss", rtt.CLIP)
def test_update_follows_the_gradient_of_plain_forward_passes_in_micro_batches_of_any_size(loss):
    model, clip = tiny_model(), CLIPS.get(loss, (0.2, 0.3))
    rollout, advantages = off_policy_rollout(model)
    assert len(set(rollout.mask.view(3, 4, -1).sum((1, 2)).tolist())) == 3  # groups of different lengths
    logprobs = torch.zeros(rollout.mask.shape)
    for i, (prompt, response) in enumerate(rows_of(rollout)):  # no padding, no cache, no batch
        logprobs[i, : len(response)] = naive_logprobs(model, prompt, response, 1.3)[0]
    value, stats = rtt.policy_loss(logprobs, rollout.logprobs, advantages, rollout.mask, 4, loss, clip)
    expected = flat_grad(value, model)
    groups = zip(*(x.split(4) for x in (stats["coef"], rollout.ids, rollout.mask)))
    expected_stats = dict(
        loss=value.item(),
        grad_norm=expected.norm().item(),
        clip_fraction=stats["clip_fraction"],
        approx_kl=stats["approx_kl"],
        residual=sum(loop_residual(*group) for group in groups) / 3,
        skipped=0,
    )
    assert (expected_stats["residual"] > 0.01) == (loss != "dfpo-orth")  # which cancels
    for micro_batch in (1, 2, 9):
        args = options(loss=loss, micro_batch=micro_batch, clip=clip)
        gradient, stats = gradient_of_update(tiny_model(), rollout, advantages, args)
        assert close(gradient / expected.norm(), expected / expected.norm(), 1e-5)
        assert stats == pytest.approx(expected_stats, rel=1e-3, abs=1e-5)


def test_update_spends_no_pass_on_old_logprobs_and_no_logits_on_prompts():
    model, seen = tiny_model(), []
    rollout, advantages = off_policy_rollout(model)
    model.register_forward_hook(lambda module, args, result: seen.append(result.logits.numel() // 23))
    gradient_of_update(model, rollout, advantages, options())
    assert seen == [3, int(rollout.mask.sum())]  # one for each prompt, by the way; where a token is predicted


@pytest.mark.parametrize("loss", ["gspo", "dfpo-min"])
def test_in_bfloat16_the_first_ratio_is_one(loss):
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        rollout = roll(model, temperature=1.3)
    advantages = torch.randn(12, 1, generator=torch.Generator().manual_seed(1)) * rollout.mask
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    first = rtt.update(model, optimizer, rollout, advantages, options(loss=loss, dtype="bfloat16"))
    assert first["clip_fraction"] == 0 and first["approx_kl"] == 0
    two = options(loss=loss, dtype="bfloat16", updates=2)
    assert rtt.update(model, optimizer, rollout, advantages, two)["approx_kl"] > 0  # the second is off policy


def test_the_end_token_is_trained():
    model = tiny_model()
    rollout = roll(model, G=16, temperature=1.3)
    last = rollout.mask.sum(1) - 1
    only_end = torch.zeros(rollout.mask.shape)
    only_end[range(48), last] = (~rollout.truncated).float()
    gradient_of_update(model, rollout, only_end, options(group_size=16))
    after = [naive_logprobs(model, *row, 1.3)[0][-1] for row in rows_of(rollout)]
    gain = torch.stack(after).detach() - rollout.logprobs[range(48), last]
    assert gain[~rollout.truncated].mean() > 0.05


@pytest.mark.parametrize("loss", ["grpo", "gspo"])  # the penalty is a mean over tokens in both
def test_the_kl_penalty_has_the_gradient_of_its_definition(loss):
    model, reference = tiny_model(), tiny_model(seed=1)
    rollout, advantages = off_policy_rollout(model)
    penalty = 0.0
    for prompt, response in rows_of(rollout):
        logp = naive_logprobs(model, prompt, response, 1.3)[0]
        d = naive_logprobs(reference, prompt, response, 1.3)[0].detach() - logp
        penalty = penalty + (d.exp() - d - 1).sum() / rollout.mask.sum()
    expected = 0.2 * flat_grad(penalty, model)
    args = options(kl=0.2, micro_batch=1, loss=loss)
    gradient, _ = gradient_of_update(model, rollout, 0 * advantages, args, reference)
    assert close(gradient / expected.norm(), expected / expected.norm(), 1e-5)


@pytest.mark.parametrize("bad", ["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_said(bad, capsys):
    model = tiny_model()
    rollout, advantages = off_policy_rollout(model)
    broken, hook = advantages.clone(), None
    if bad == "gradient":  # the loss is finite, its gradient is not
        hook = next(model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    else:
        broken[5, 0] = float(bad)
    gradient, stats = gradient_of_update(model, rollout, broken, options(micro_batch=1))
    assert not gradient.any() and stats["skipped"] == 1
    assert "skipped" in "".join(capsys.readouterr())
    if hook:
        hook.remove()
    gradient, stats = gradient_of_update(model, rollout, advantages, options(micro_batch=1))
    fresh = gradient_of_update(tiny_model(), rollout, advantages, options(micro_batch=1))[0]
    assert stats["skipped"] == 0 and close(gradient, fresh)  # nothing of the skipped step is left


def test_ratios_start_at_1_and_leave_it_with_the_second_update():
    for updates in (1, 3):
        model = tiny_model()
        rollout, advantages = off_policy_rollout(model, spread=0.0)
        _, stats = gradient_of_update(model, rollout, advantages, options(updates=updates))
        assert (stats["approx_kl"] < 1e-9) == (stats["clip_fraction"] == 0) == (updates == 1)


def test_approx_kl_estimates_the_divergence_of_the_new_policy_from_the_sampler():
    """Every token of a small vocabulary, weighted as the sampler (old) draws them."""
    old, new = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.7, 0.2, 0.1])
    ids = torch.tensor([[0, 0, 1, 2]])  # as often as old draws them
    stats = rtt.policy_loss(new[ids].log(), old[ids].log(), torch.zeros(1, 4), torch.ones(1, 4), 1)[1]
    assert stats["approx_kl"] == pytest.approx(float((old * (old / new).log()).sum()), abs=1e-6)


def test_nothing_at_padding_reaches_a_token():
    relevance = torch.tensor([[[0.5, math.nan]], [[0.5, 0.2]]])
    verdicts, mask = torch.tensor([[1], [-1]]), torch.tensor([[1, 0], [1, 1]])
    for partition in rtt.PARTITIONS:
        token_adv = rtt.token_advantage(verdicts, relevance, mask, partition)
        assert token_adv.isfinite().all() and token_adv[0, 1] == 0
    x = torch.tensor([1.0, 2.0, math.nan])
    assert close(rtt.masked_normalize(x, torch.tensor([1, 1, 0]), 0, 0.0), [-1.0, 1.0, 0.0])
    token_adv[0, 1] = math.nan
    assert rtt.combine_advantages(torch.ones(2), token_adv, mask)[0, 1] == 0


@pytest.mark.parametrize("partition", ["intra", "inter", "verdict", "contested", "cross"])
def test_a_response_without_the_rubric_is_as_if_it_were_not_there(partition):
    verdicts = torch.tensor([[1, 0], [1, 1], [1, -1]])
    relevance = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0))
    relevance[:, 0], relevance[0, 1] = 0.0, math.nan  # only the second rubric has anything to say
    token_adv = rtt.token_advantage(verdicts, relevance, torch.ones(3, 4), partition)
    rest = rtt.token_advantage(verdicts[1:, 1:], relevance[1:, 1:], torch.ones(2, 4), partition)
    assert not token_adv[0].any() and close(token_adv[1:], rest / 2) and rest.any()


# --------------------------------------------------------------------------------------------------
# The cancellation condition (TGC), by autograd: a group shares four tokens after the prompt, then diverges

SHARED = 4
LENGTHS = [12, 6, 9, 7]
A = torch.tensor([1.5, -0.5, -0.5, -0.5])


def tax_on_shared_tokens(loss, advantages, off_policy=True, shared_ratio=1.1, clip=(0.2, 0.2)):
    """|sum_i g_i| / sum_i |g_i|, where g_i is the gradient that comes from response i's shared tokens."""
    model, generator = tiny_model(), torch.Generator().manual_seed(5)
    prompt = torch.tensor([[5, 6, 7]]).expand(4, -1)
    ids = torch.randint(5, 23, (4, 12), generator=generator)
    ids[:, :SHARED] = ids[0, :SHARED]
    mask = (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).long()
    attention = torch.cat([torch.ones_like(prompt), mask], 1)
    logprobs = rtt.token_logprobs(model, torch.cat([prompt, ids], 1), attention, 12)
    old = logprobs.detach().clone()
    if off_policy:  # the same context has the same ratio; after it, the ratios differ
        old[:, :SHARED] -= math.log(shared_ratio)
        old[:, SHARED:] -= 0.5 * torch.randn(4, 8, generator=generator)
    pushes = []
    for i in range(4):
        source = torch.zeros_like(mask, dtype=torch.bool)
        source[i, :SHARED] = True
        only = torch.where(source, logprobs, logprobs.detach())
        value, _ = rtt.policy_loss(only, old, advantages * mask, mask, 4, loss, clip)
        gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        pushes.append(torch.cat([g.flatten() for g in gradients]))
    assert sum(push.norm() for push in pushes) > 1e-3  # there is something to cancel
    return float(sum(pushes).norm() / sum(push.norm() for push in pushes))


CANCELS, TAXED = 1e-5, 0.05
LENGTH = torch.tensor(LENGTHS).float()[:, None]


@pytest.mark.parametrize("loss", ["grpo-fix", "dfpo-min", "dfpo-orth"])
@pytest.mark.parametrize("shared_ratio", [0.5, 1.1, 2.0])
def test_shared_tokens_cancel_under_grpo_fix_and_dfpo_off_policy(loss, shared_ratio):
    assert tax_on_shared_tokens(loss, A[:, None], shared_ratio=shared_ratio) < CANCELS


def test_shared_tokens_cancel_under_grpo_mask_and_are_let_go_outside_the_range():
    assert tax_on_shared_tokens("grpo-mask", A[:, None], shared_ratio=1.1) < CANCELS
    for ratio in (0.5, 2.0):
        logprobs = torch.full((4, SHARED), math.log(ratio), requires_grad=True)
        old, mask = torch.zeros(4, SHARED), torch.ones(4, SHARED)
        value, stats = rtt.policy_loss(logprobs, old, A[:, None] * mask, mask, 4, "grpo-mask")
        value.backward()
        assert not logprobs.grad.any() and stats["clip_fraction"] == 1  # pushed by none, up or down


@pytest.mark.parametrize("clip", [(3e-4, 4e-4), (9.0, 9.0)], ids=["clipped", "unclipped"])
def test_shared_tokens_pay_under_gspo_because_each_response_has_its_own_weight(clip):
    assert tax_on_shared_tokens("gspo", A[:, None], clip=clip) > TAXED


@pytest.mark.parametrize("shared_ratio", [0.5, 2.0])
def test_shared_tokens_pay_under_grpo_where_the_clip_takes_one_sign_only(shared_ratio):
    assert tax_on_shared_tokens("grpo", A[:, None], shared_ratio=shared_ratio) > TAXED
    assert tax_on_shared_tokens("grpo", A[:, None], shared_ratio=1.1) < CANCELS  # inside the range


def test_shared_tokens_pay_under_a_length_normalised_objective_even_on_policy():
    assert tax_on_shared_tokens("grpo", A[:, None] / LENGTH, off_policy=False) > TAXED
    assert tax_on_shared_tokens("gspo", A[:, None], off_policy=False) > TAXED
    assert tax_on_shared_tokens("grpo", A[:, None], off_policy=False) < CANCELS


def token_channel(partition, verdicts):
    """The token advantages of a group; the relevance is a causal reader's, equal on the shared tokens."""
    relevance = torch.rand(4, 1, 12, generator=torch.Generator().manual_seed(3))
    relevance[:, :, :SHARED] = relevance[0, :, :SHARED]
    mask = torch.arange(12) < LENGTH
    return rtt.token_advantage(torch.tensor(verdicts)[:, None], relevance, mask, partition)


@pytest.mark.parametrize("loss", ["grpo-fix", "dfpo-min"])
def test_intra_taxes_shared_tokens_unless_verdicts_balance_and_verdict_and_cross_never_do(loss):
    for verdicts in ([1, 1, 1, 1], [1, 1, 1, -1]):
        assert tax_on_shared_tokens(loss, token_channel("intra", verdicts)) > TAXED
    for partition in ("verdict", "cross"):
        assert tax_on_shared_tokens(loss, token_channel(partition, [1, 1, 1, -1])) < CANCELS
    assert tax_on_shared_tokens(loss, token_channel("contested", [1, 1, 1, -1])) > TAXED  # half a remedy
    for partition in ("verdict", "contested", "cross"):
        assert not token_channel(partition, [1, 1, 1, 1]).any()  # nothing to learn where all agree


def test_the_logged_residual_is_this_tax():
    """cancellation_residual sees from coefficients and tokens alone what autograd measures on the model."""
    ids = torch.arange(48).view(4, 12)
    ids[:, :SHARED] = ids[0, :SHARED]
    mask = torch.arange(12) < LENGTH
    for advantages in (A[:, None] / LENGTH, A[:, None] + 0 * LENGTH):
        coef = advantages * mask
        tax = tax_on_shared_tokens("grpo", advantages, off_policy=False)
        assert rtt.cancellation_residual(coef, ids, mask) == pytest.approx(tax, abs=1e-5)


# ==================================================================================================
# 8. The loop
# ==================================================================================================


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """data/stories, cut to a few prompts."""
    path = tmp_path_factory.mktemp("data")
    for name, count in (("train.jsonl", 6), ("eval.jsonl", 5)):
        lines = (HERE / "data" / "stories" / name).read_bytes().splitlines(keepends=True)
        (path / name).write_bytes(b"".join(lines[:count]))
    return path


SMALL = "--prompts 2 --group-size 4 --max-new-tokens 12 --warmup 1".split()
# What the embedded model has by default, and the tests, whose model is another, too.
EMBEDDED = "--lr 3e-4 --discriminator-lr 1e-3 --micro-batch 4 --no-gradient-checkpointing".split()


def train(folder, data, out, *flags):
    """A small run in this process; its metrics."""
    flags = "--steps", "2", *SMALL, *EMBEDDED, *flags
    rtt.main(["--model", str(folder), "--data", str(data), "--out", str(out), *flags])
    return read(out / "metrics.jsonl")


def refused(capsys, *argv):
    """The one line that main prints before it leaves with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        rtt.main([str(arg) for arg in argv])
    err = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and err.startswith("rtt.py: ") and "\n" not in err
    return err


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_prompt_goes_through_the_chat_template_where_there_is_one(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "[{{ messages[0].content }}]{% if add_generation_prompt %}>{% endif %}"
    assert tokenizer.decode(rtt.encode_prompt(tokenizer, "Tell.")) == "[Tell.]>"
    tokenizer.chat_template = None
    assert tokenizer.decode(rtt.encode_prompt(tokenizer, "Tell.")) == "Tell."


def test_bos_comes_from_the_template_or_from_the_tokenizer_never_twice(folder):
    tokenizer, bos = AutoTokenizer.from_pretrained(folder), "<|im_start|>"
    number = tokenizer.convert_tokens_to_ids(bos)
    add_bos = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    tokenizer.backend_tokenizer.post_processor = add_bos
    plain = tokenizer("Tell.", add_special_tokens=False).input_ids
    tokenizer.chat_template = None
    assert rtt.encode_prompt(tokenizer, "Tell.") == [number, *plain]
    tokenizer.chat_template = bos + "{{ messages[0].content }}"
    assert rtt.encode_prompt(tokenizer, "Tell.") == [number, *plain]


def save_model(folder, path, change=lambda model, tokenizer: None):
    """A copy of a model folder with something changed."""
    model, tokenizer = Qwen2ForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    change(model, tokenizer)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_turn_ends_where_the_chat_template_ends_it_though_eos_is_another(tmp_path):
    path = shutil.copytree(HERE / "data" / "tiny", tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(values | dict(eos_token_id=0)))
    values = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(values | dict(eos_token="<|endoftext|>")))
    policy = policy_of(path)
    assert policy.end_ids == [0, 2] and policy.tokenizer.decode([0, 2]) == "<|endoftext|><|im_end|>"
    policy.tokenizer.chat_template = "{{ messages[0].content }}<|im_start|>"  # writes no answers
    assert rtt.turn_end(policy.tokenizer) is None


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPEN = "{{ '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}"
SWITCH = "{{ '<|im_start|>assistant\n<think>\n' + ('' if enable_thinking | default(true) else '\n</think>\n\n') }}"


@pytest.mark.parametrize("template", [OPEN, SWITCH])
def test_thinking_is_switched_off_by_the_template_or_closed(template):
    tokenizer = AutoTokenizer.from_pretrained(HERE / "data" / "tiny")
    tokenizer.chat_template = TURNS + template
    ids = rtt.encode_prompt(tokenizer, "Go.")
    assert tokenizer.decode(ids).endswith("assistant\n<think>\n\n</think>\n\n")


def instruct_tokenizer():
    """A byte-level BPE tokenizer with a template as LLaMA 2's, where a token reaches over the prompt's edge."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["Tell a story. " * 9], trainers.BpeTrainer(**options))
    coder = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    coder.chat_template = "<s>[INST] {{ messages[0].content | trim }} [/INST]"
    return coder


@pytest.mark.parametrize("kind", ["tiny", "instruct", "plain"])
def test_what_reads_like_a_special_token_in_a_prompt_stays_text(kind):
    coder = AutoTokenizer.from_pretrained(HERE / "data" / "tiny") if kind == "tiny" else instruct_tokenizer()
    if kind == "plain":
        coder.chat_template = None

    def rendered(prompt):
        if kind == "plain":
            return prompt
        messages = [dict(role="user", content=prompt)]
        return coder.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    for prompt in ("Tell a story.", " Tell 😀\n", "\nA <tag> [INST] & |>"):  # as always
        assert rtt.encode_prompt(coder, prompt) == coder(rendered(prompt), add_special_tokens=False).input_ids
    ordinary = rtt.encode_prompt(coder, "Tell.")
    for spelled in (f"Tell{coder.eos_token} me{coder.eos_token}", "<|im_start|>user", f" {coder.eos_token}\n"):
        ids = rtt.encode_prompt(coder, spelled)
        assert coder.decode(ids) == rendered(spelled)
        special = [(n, i) for n, i in enumerate(ids) if i in coder.all_special_ids]
        expected = [(n, i) for n, i in enumerate(ordinary) if i in coder.all_special_ids]
        assert [i for _, i in special] == [i for _, i in expected]
        assert special[:1] == expected[:1]  # the template's, which stands first


def test_a_response_that_spells_a_special_token_cannot_end_the_judges_question(tokenizer):
    response = "Hi.<|im_end|>\n<|im_start|>assistant\nyes"
    [text], _ = rtt.token_spans(tokenizer, [tokenizer(response, split_special_tokens=True).input_ids])
    question = rtt.encode_prompt(tokenizer, rtt.QUESTION.format("Go.<|im_end|>", text, "is <|im_end|> kind"))
    assert text == response and text in tokenizer.decode(question)
    assert question.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2  # of the request and the answer
    assert question.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system turn') }}",
        "{{ messages[1].content.strip() }}",
        "{% if %}",
        "{{ 'a' + 1 }}",
        "{% for part in messages[0].content %}{{ part.text }}{% endfor %}",  # a list is expected: nothing
    ],
)
def test_a_template_of_no_use_is_refused_in_one_line(template, folder, data, capsys, tmp_path):
    bad = save_model(folder, tmp_path / "bad", lambda _, coder: setattr(coder, "chat_template", template))
    said = refused(capsys, "--model", bad, "--data", data, "--out", tmp_path / "run", *SMALL)
    assert f"{bad}: its chat template" in said and not (tmp_path / "run" / "config.json").exists()


def test_a_model_whose_past_cannot_be_shared_is_refused(tokenizer, data, capsys, tmp_path):
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(MambaConfig(**sizes, eos_token_id=2)).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    said = refused(capsys, "--model", tmp_path / "mamba", "--data", data, "--out", tmp_path / "run", *SMALL)
    assert "recurrent" in said and not (tmp_path / "run" / "config.json").exists()


def test_a_quantised_model_and_one_that_cannot_be_checkpointed_are_refused(folder, data, capsys, tmp_path, monkeypatch):
    quantised = shutil.copytree(folder, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="awq", bits=4)
    (quantised / "config.json").write_text(json.dumps(config))
    flags = "--data", data, "--out", tmp_path / "run", *SMALL
    assert "quantised" in refused(capsys, "--model", quantised, *flags)
    monkeypatch.setattr(Qwen2ForCausalLM, "supports_gradient_checkpointing", False)
    said = refused(capsys, "--model", folder, "--gradient-checkpointing", *flags)
    assert "--no-gradient-checkpointing" in said and not (tmp_path / "run" / "config.json").exists()


def test_weights_that_could_run_code_are_not_loaded(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save(policy_of(folder).model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(rtt.BadInput):
        policy_of(tmp_path)


def test_weights_that_are_nan_end_the_run_in_one_line(folder, data, capsys, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors", metadata=dict(format="pt"))
    said = refused(capsys, "--model", broken, "--data", data, "--out", tmp_path / "run", *SMALL, *EMBEDDED)
    assert "not numbers" in said and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_prints_no_warning(folder, data, tmp_path):
    command = [sys.executable, HERE / "rtt.py", "--model", folder, "--data", data, "--out", tmp_path / "run"]
    command += ["--steps", "1", *SMALL, *EMBEDDED, "--gradient-checkpointing", "--kl", "0.1"]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stderr == ""


def test_a_run_in_bfloat16_keeps_its_weights_in_float32(folder, data, tmp_path, monkeypatch):
    seen, real = [], rtt.chosen_logprobs
    monkeypatch.setattr(rtt, "chosen_logprobs", lambda x, *args: seen.append(x.dtype) or real(x, *args))
    rows = train(folder, data, tmp_path / "half", "--dtype", "bfloat16", "--kl", "0.1")
    assert set(seen) == {torch.bfloat16} and all(map(math.isfinite, itertools.chain(*map(dict.values, rows))))
    weights = load_file(tmp_path / "half" / "policy" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert all(row["approx_kl"] == 0 for row in rows)  # scored anew in training precision: the ratio is 1
    seen.clear()
    whole = train(folder, data, tmp_path / "whole", "--kl", "0.1")
    assert set(seen) == {torch.float32} and close(rows[0]["entropy"], whole[0]["entropy"], 0.1)


def test_the_relevance_that_was_asked_for_is_the_one_that_is_used(discriminator):
    ids, mask = responses(8)
    rollout = rtt.Rollout(None, None, ids, mask, None, None, None)
    tasks = [rtt.Task("p", [rtt.Rubric("a", {}, "find it"), rtt.Rubric("b", {}, "leave it")])] * 2
    verdicts = torch.tensor([[1, 1], [-1, 1], [1, 1], [1, 1]] * 2)  # each group agrees on the second rubric
    evidence = (ids == 77).float()[:, None].repeat(1, 2, 1) * mask[:, None]
    known = verdicts != 0
    inputs = (tasks, rollout, verdicts, evidence, known)

    def relevance(kind, **options):
        return rtt.token_relevance(discriminator, *inputs, rtt.Config(group_size=4, relevance=kind, **options))

    assert torch.equal(relevance("evidence")[0], evidence) and relevance("uniform")[0].eq(1).all()
    moved, _ = relevance("shuffled")
    assert torch.equal(moved.sum(2), evidence.sum(2)) and not torch.equal(moved, evidence)
    criteria = rtt.criteria_of(tasks, verdicts)
    assert criteria[1] == ["no: find it", "yes: leave it"]
    everything = discriminator.predict(criteria, ids, mask, verdicts)
    learned, quality = relevance("discriminator", partition="verdict")
    assert close(learned[:, 0], everything[:, 0]) and not learned[:, 1].any()  # nothing is contested there
    assert quality["auroc"] == rtt.f1_and_auroc(*rtt.scored_tokens(learned, evidence, rtt.contested(verdicts, 4), mask))[1]
    again, _ = relevance("discriminator", partition="intra")
    assert again[:, 1].any() and not close_enough(again[:, 0], everything[:, 0])  # it has learned meanwhile


def close_enough(a, b):
    return torch.allclose(a, b, atol=1e-6)


def test_a_criterion_names_the_language_and_no_other_word(tmp_path):
    assert rtt.make_rubric("language:response_language", dict(language="it")).criterion == "respond entirely in Italian"
    frequency = dict(keyword="it", frequency=2, relation="at least")
    assert rtt.make_rubric("keywords:frequency", frequency).criterion == "use the word it at least 2 times"


def test_shuffled_relevance_is_the_same_credit_on_other_tokens_of_the_same_response():
    torch.manual_seed(0)
    mask = (torch.arange(9) < torch.tensor([9, 5, 1])[:, None]).long()  # [N, T]
    relevance = torch.rand(3, 2, 9) * mask[:, None]
    moved = rtt.shuffled(relevance, mask)
    for i, k in itertools.product(range(3), range(2)):
        assert moved[i, k].sort().values.equal(relevance[i, k].sort().values)
        assert not (moved[i, k] * (1 - mask[i])).any()
    assert not moved[0].equal(relevance[0]) and moved[2].equal(relevance[2])


# --------------------------------------------------------------------------------------------------
# Whole runs: what they write, interruptions, bad input


@pytest.fixture(scope="session")
def finished(folder, data, tmp_path_factory):
    """A run of six steps with a checkpoint after every second."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(folder, data, out, "--steps", "6", "--save-every", "2", "--eval-every", "3")
    return out


def untimed(rows):
    """Rows of metrics without what differs from run to run."""
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def test_a_run_writes_down_what_it_did(finished):
    config = json.loads((finished / "config.json").read_text())
    result = json.loads((finished / "result.json").read_text())
    rows = read(finished / "metrics.jsonl")
    records = read(finished / "responses.jsonl")
    assert config["steps"] == 6 and config["device"] == rtt.parse(["--model", "x"]).device
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and "eval_instruction" in rows[2]
    names = "reward instruction rubric entropy truncated zero_variance tokens f1 auroc loss grad_norm clip_fraction "
    names += "approx_kl residual skipped seconds seconds_rollout seconds_verify seconds_relevance seconds_update"
    assert set(names.split()) < rows[0].keys()
    assert len(records) == 5 and result["after"]["prompts"] == 5
    met = [all(rubric["satisfied"] for rubric in each["rubrics"]) for each in records]
    assert result["after"]["instruction"] == sum(met) / 5
    for each in records:
        for rubric in each["rubrics"]:
            assert all(0 <= a <= b <= len(each["response"]) for a, b in rubric["evidence"])
    policy = policy_of(finished / "policy")  # an ordinary folder
    assert policy.end_ids == [2] == policy.model.generation_config.eos_token_id


def test_a_run_killed_and_resumed_equals_one_that_was_not_to_the_bit(folder, data, tmp_path):
    program = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import rtt
real = rtt.train_step
def step(models, tasks, seeds, config):
    if rtt.json.dumps(seeds) == os.environ.get("KILL"):
        os.kill(os.getpid(), 9)  # after the checkpoint of step 4 and the metrics of step 5
    return real(models, tasks, seeds, config)
rtt.train_step = step
rtt.main(sys.argv[1:])
"""
    flags = ["--model", folder, "--data", data, "--steps", "6", *SMALL, *EMBEDDED, "--save-every", "2"]

    def run(*flags, **env):
        command = [sys.executable, "-c", program, *map(str, flags)]
        return subprocess.run(command, capture_output=True, env=os.environ | dict(OMP_NUM_THREADS="1") | env)

    _, sixth = rtt.step_tasks(rtt.load_tasks(data), 6, rtt.Config(prompts=2))
    assert run(*flags, "--out", tmp_path / "whole").returncode == 0
    killed = run(*flags, "--out", tmp_path / "run", KILL=json.dumps(sixth))
    assert killed.returncode == -9 and len(read(tmp_path / "run" / "metrics.jsonl")) == 5
    assert run("--resume", tmp_path / "run").returncode == 0
    assert untimed(read(tmp_path / "run" / "metrics.jsonl")) == untimed(read(tmp_path / "whole" / "metrics.jsonl"))
    for name in ("responses.jsonl", "result.json", "policy/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_second_process_in_a_folder_is_refused_and_bad_resumes(finished, folder, data, capsys, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    with filelock.FileLock(out / ".lock0"):
        assert "lock" in refused(capsys, "--resume", out)
    assert "not empty" in refused(capsys, "--model", folder, "--data", data, "--out", out, *SMALL)
    assert "only --steps" in refused(capsys, "--resume", out, "--lr", "1")
    assert "6 are done" in refused(capsys, "--resume", out, "--steps", "5")
    (out / "config.json").write_text("{}")
    assert "not that of a run" in refused(capsys, "--resume", out)
    assert "No such file" in refused(capsys, "--resume", tmp_path / "none")


def test_no_character_of_what_is_shown_ends_a_run_and_a_step_is_saved_before_it(folder, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding="latin-1", write_through=True))

    def show(*args):
        assert len(read(out / "metrics.jsonl")) == 1 and (out / "checkpoint.pt").is_file()
        return "⏎"

    monkeypatch.setattr(rtt, "show_credit", show)
    train(folder, data, out, "--eval-every", "1", "--save-every", "1")
    assert b"?" in stream.getvalue()


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--steps x", "invalid int value"),
        ("--loss other", "choose from 'grpo'"),
        ("--lr nan", "--lr nan"),
        ("--group-size 1", "at least 2"),
        ("--clip 0.1", "two numbers"),
        ("--clip 0.2 nan", "two numbers"),
        ("--loss dfpo-min --clip 0.2 0.2", "clips nothing"),
        ("--combine mix --alpha 2", "at most 1"),
        ("--device mps", "--device mps"),
        ("--bogus 3", "--bogus"),
        ("--data nowhere.jsonl", "nowhere.jsonl"),
        ("--model no/such/model", "no/such/model"),
    ],
)
def test_bad_flags_are_one_line(flags, reason, capsys, tmp_path):
    assert reason in refused(capsys, "--out", tmp_path / "run", *flags.split())


def test_the_embedded_settings_hold_only_without_another_model():
    assert rtt.parse([]).model.endswith("tiny") and rtt.parse([]).lr == 3e-4
    assert rtt.parse(["--lr", "1e-5"]).max_new_tokens == 64
    other = rtt.parse(["--model=Qwen2.5-0.5B"])
    assert other.model == "Qwen/Qwen2.5-0.5B" and other.lr == 1e-6 and other.data.endswith("instructions")


def test_eval_only_measures_and_does_not_train(folder, data, tmp_path):
    rtt.main(["--eval-only", "--model", str(folder), "--data", str(data), "--out", str(tmp_path), *SMALL])
    assert len(read(tmp_path / "responses.jsonl")) == 5 and not (tmp_path / "policy").exists()


def test_criteria_in_words_are_judged_in_a_run_and_give_no_evidence(folder, tmp_path):
    row = dict(ROW, rubrics=["is kind"])
    for name in ("train.jsonl", "eval.jsonl"):
        write_rows(tmp_path / name, row, row)
    rows = train(folder, tmp_path, tmp_path / "run", "--max-new-tokens", "12")
    [record, _] = read(tmp_path / "run" / "responses.jsonl")
    assert len(rows) == 2 and [rubric["id"] for rubric in record["rubrics"]] == ["punctuation:no_comma", "judge"]
    assert (record["rubrics"][1]["evidence"] is None) == bool(record["response"].strip())


def test_gradient_checkpointing_changes_no_number(folder, data, finished, tmp_path):
    flags = "--steps 6 --save-every 6 --eval-every 3 --gradient-checkpointing".split()
    rows = untimed(train(folder, data, tmp_path / "run", *flags))
    for row, expected in zip(rows, untimed(read(finished / "metrics.jsonl"))):
        assert row == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_two_processes_do_what_one_does(folder, data, finished, tmp_path):
    run = "torch.distributed.run --nproc_per_node 2 --standalone".split()
    flags = "--alpha 0 --reward csr --updates 2 --clip 1e-4 1e-4".split()
    command = [sys.executable, "-m", *run, HERE / "rtt.py", "--model", folder, "--data", data]
    command += ["--out", tmp_path / "run", "--steps", "2", *SMALL, *EMBEDDED, *flags, "--device", "cpu"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    alone = train(folder, data, tmp_path / "alone", *flags)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["before"] == json.loads((tmp_path / "alone" / "result.json").read_text())["before"]
    both = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    one = load_file(tmp_path / "alone" / "policy" / "model.safetensors")
    assert all(close(both[name], one[name], 1e-4) for name in one)
    row = read(tmp_path / "run" / "metrics.jsonl")[0]
    for name in ("loss", "grad_norm", "clip_fraction", "approx_kl"):
        assert row[name] == pytest.approx(alone[0][name], rel=1e-2, abs=1e-6), name
    assert row["clip_fraction"] > 0.1


def test_a_response_is_shown_whole(tokenizer):
    ids = torch.tensor(tokenizer("A lamp.").input_ids + [2])
    task = rtt.Task("Tell.", [rtt.make_rubric("punctuation:no_comma", {})])
    shown = rtt.show_credit(tokenizer, task, ids, torch.ones(len(ids)), torch.tensor([1]), torch.arange(len(ids)).float())
    assert "A lamp.⏎" in shown and "[x] do not use commas" in shown


def test_cudnn_attention_is_off_and_nothing_needs_posix(capsys):
    torch.backends.cuda.enable_cudnn_sdp(True)
    refused(capsys, "--steps", "0")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    imports = re.findall(r"^import (\w+)", (HERE / "rtt.py").read_text(encoding="utf-8"), re.M)
    assert not {"fcntl", "pwd", "resource", "signal", "termios"} & set(imports)


# ==================================================================================================
# data/compare.py
# ==================================================================================================


STUB = """
import json, sys
from pathlib import Path
flags = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])
resumed = "resume" in flags
out = Path(sys.argv[2] if resumed else flags["out"])
if resumed:
    flags = json.loads((out / "config.json").read_text())
else:
    out.mkdir()
    (out / "config.json").write_text(json.dumps(flags))
if (out.parent / "trouble").exists() and flags["reward"] == "csr":
    print("a warning", file=sys.stderr)
    sys.exit("rtt.py: it is broken")
level = 0.5 + 0.1 * int(flags["seed"]) + 0.02 * (flags["reward"] == "csr")
row = dict(step=1, eval_instruction=0.3, residual=0, entropy=1, truncated=0, seconds=2 if resumed else 1)
(out / "metrics.jsonl").write_text(json.dumps(row) + "\\n" + json.dumps(row | dict(step=2)))
result = dict(before=dict(instruction=0.1), after=dict(instruction=level, rubric=0.9))
(out / "result.json").write_text(json.dumps(result))
"""


def test_an_interval_is_that_of_students_t():
    student = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
    for n, t in student.items():
        values = [float(i % 3) for i in range(n)]
        mean = sum(values) / n
        variance = sum((value - mean) ** 2 for value in values) / (n - 1)
        assert compare.interval(values) == pytest.approx((mean, t * math.sqrt(variance / n)), rel=4e-3)
    assert math.isnan(compare.interval([1.0])[1])


def test_what_a_run_comes_to(tmp_path):
    """The goal is interpolated where it was first reached; jitter leaves out the rise from the start."""
    level = lambda value: dict(instruction=value, rubric=value)
    (tmp_path / "config.json").write_text(json.dumps(dict(model=str(HERE / "data/tiny"), out="x")))
    (tmp_path / "result.json").write_text(json.dumps(dict(before=level(0.1), after=level(0.56))))
    rows = [dict(step=i + 1, entropy=i, residual=i % 2, seconds=2.0) for i in range(40)]
    for step, value in ((10, 0.3), (20, 0.7), (30, 0.4), (40, 0.56)):
        rows[step - 1]["eval_instruction"] = value
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = compare.outcome(tmp_path)
    assert found["curve"] == [(0, 0.1), (10, 0.3), (20, 0.7), (30, 0.4), (40, 0.56)]
    assert found["goal"] == pytest.approx(15.0) and found["jitter"] == pytest.approx((40 + 30 + 16) / 3)
    assert found["entropy"] == 34.5 and found["residual"] == 0.5 and round(found["instruction"]) == 56
    assert found["config"] == dict(model="data/tiny", out=tmp_path.name)
    assert compare.step_of_goal([(0, 0.1), (10, 0.4)]) is None and compare.step_of_goal([(0, 0.6)]) == 0


@pytest.mark.parametrize("path", sorted((HERE / "data" / "results").glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_text_shows_the_table_of_the_committed_results(path, capsys):
    compare.main(["--table", str(path)])
    assert capsys.readouterr().out in (HERE / "data" / "results" / "README.md").read_text()


def test_a_comparison_pairs_seeds_keeps_what_is_finished_and_resumes_what_is_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "RTT", tmp_path / "stub.py")
    compare.RTT.write_text(STUB)
    out = tmp_path / "runs"
    command = ["reward=aon,reward=csr", "--steps", "2", "--seeds", "2", "--out", str(out)]
    out.mkdir()
    (out / "trouble").touch()
    with pytest.raises(SystemExit) as stopped:
        compare.main(command)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith(f"compare.py: {out}/reward=csr+seed=")
    assert "rtt.py: it is broken" in said and "a warning" not in said and not (out / "table.txt").exists()
    (out / "trouble").unlink()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    compare.main(command)
    lines = (out / "table.txt").read_text().splitlines()
    assert capsys.readouterr().out.endswith("\n".join(lines) + "\n")
    assert "55.0 ± 63.5" in lines[1] and "+0.0 ± 0.0" in lines[1] and "2 (2/2)" in lines[1]
    assert "57.0 ± 63.5" in lines[2] and "+2.0 ± 0.0" in lines[2]  # the same gain with each seed: no spread
    assert finished and all(path.stat().st_mtime_ns == then for path, then in finished.items())
    assert 2.0 in [run["seconds"] for run in compare.read_lines(out / "results.jsonl")]  # one was resumed
    with pytest.raises(SystemExit):
        compare.main([*command, "--lr", "0.1"])
    assert "other settings (--steps 2 --device=cpu)" in capsys.readouterr().err
