# SPDX-License-Identifier: MIT
"""Tests of rtt.py, in the order of its sections: slow obvious loops, finite differences, invariances.

G responses a prompt, N = prompts * G, K rubrics, T response tokens; symbols as in rtt.py's opening table.
Models are made here, tiny and with random weights; the tokenizer is that of data/tiny.
"""

import errno
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test waits for the hub

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
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

pytestmark = [pytest.mark.filterwarnings(f"error::{kind}") for kind in ("FutureWarning", "DeprecationWarning")]
HERE = Path(__file__).resolve().parent
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
    args = SimpleNamespace(**dict(device="cpu", data="tasks.jsonl", max_new_tokens=64) | options)
    return rtt.load_policy("--model", str(folder), args, dtype, tasks)


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
        (dict(num_sentences=2, **AT_LEAST), "-Mr. and Mrs. D. Fox paid 3.50 in the U.S.... or so⟦⟧"),
        (dict(num_sentences=2, **AT_LEAST), "+Who am I⟦?⟧ So etc⟦!⟧"),  # only a lone dot abbreviates
        (dict(num_sentences=3, **AT_LEAST), "+Oh... yes⟦...⟧ He left at 9 a.m⟦.⟧ The end⟦⟧"),
        (dict(num_sentences=2, **AT_LEAST), "-See vitamin C. Or on Jan. 5 plan b. instead⟦⟧"),
        (dict(num_sentences=4, **AT_LEAST), "+1⟦.⟧ Do it⟦.⟧\n2⟦.⟧ Done⟦⟧"),
        (dict(num_sentences=2, **AT_LEAST), "-In 1999. no more of rtt.py⟦⟧"),
        (dict(num_sentences=3, **AT_LEAST), "+He isn't⟦.⟧ (So⟦.⟧) Say i.e⟦.⟧ [go⟦.⟧]"),
        (dict(num_sentences=2, **LESS_THAN), "-One. Two⟦.⟧ Three⟦⟧"),
        (dict(num_sentences=2, **LESS_THAN), "-Fine! 😀⟦⟧"),  # what stands behind is one more
        (dict(num_sentences=2, **LESS_THAN), "+Only one!⟦⟧"),
    ],
    "length_constraints:number_words": [
        (dict(num_words=3, **LESS_THAN), "+यह हिन्दी⟦⟧"),  # marks do not split a word
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
        (dict(capital_frequency=2, capital_relation="at least"), "+⟦X-RAY⟧ at (⟦NASA⟧), Pa3"),
        (dict(capital_frequency=2, capital_relation="at least"), "+⟦IT⟧⟦'S⟧"),  # two words to IFEval
        (dict(capital_frequency=2, capital_relation="at least"), "+⟦CAN⟧⟦NOT⟧"),
        (dict(capital_frequency=2, capital_relation="at least"), "+⟦O'CLOCK⟧ ⟦12:30PM⟧"),
        (dict(capital_frequency=2, capital_relation="at least"), "+⟦U.S.⟧, **⟦A⟧**:don't"),
        (dict(capital_frequency=2, capital_relation="at least"), "+⟦WAIT⟧...so ⟦A⟧--b"),
        (dict(capital_frequency=2, capital_relation="at least"), "-X-ray 123 NASA Aa 灯"),
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


# --------------------------------------------------------------------------------------------------
# Tasks

ROW = dict(prompt="Tell a story.", instruction_id_list=["punctuation:no_comma"], kwargs=[{}])
FREQUENCY = dict(keyword="a", frequency=2, relation="at least")
LETTER = dict(letter="a", let_frequency=2, let_relation="at least")
NTH = "length_constraints:nth_paragraph_first_word"


def rubric_row(rubric_id, kwargs):
    return ROW | dict(instruction_id_list=[rubric_id], kwargs=[kwargs])


BAD_ROWS = {
    "not JSON": '{"prompt": "Tell',
    "not UTF-8": b'{"prompt": "\xff"}',
    "a number too long": '{"prompt": ' + "1" * 5000 + "}",
    "too deep": "[" * 100_000,
    "not an object": "[1, 2]",
    "no prompt": {k: v for k, v in ROW.items() if k != "prompt"},
    "empty prompt": ROW | dict(prompt=""),
    "prompt not text": ROW | dict(prompt=["Tell"]),
    "lone surrogate": ROW | dict(prompt="Tell \ud800"),  # JSON, but no text that can be encoded
    "no ids": {k: v for k, v in ROW.items() if k != "instruction_id_list"},
    "no kwargs": {k: v for k, v in ROW.items() if k != "kwargs"},
    "no rubric": ROW | dict(instruction_id_list=[], kwargs=[]),
    "no rubric of any kind": dict(prompt="Tell.", rubrics=[], kwargs=None),
    "rubrics not a list": ROW | dict(rubrics="Be kind."),
    "rubric not text": ROW | dict(rubrics=["Be kind.", 3]),
    "empty rubric": ROW | dict(rubrics=["Be kind.", " "]),
    "an id for a judge": rubric_row(rtt.JUDGED, {}),
    "lists of different lengths": ROW | dict(kwargs=[{}, {}]),
    "unknown id": rubric_row("punctuation:no_coma", {}),
    "id not text": rubric_row(["punctuation:no_comma"], {}),
    "kwargs not an object": rubric_row("punctuation:no_comma", "none"),
    "missing kwarg": rubric_row("keywords:existence", {}),
    "null kwarg": rubric_row("keywords:existence", {"keywords": None}),
    "text for a list": rubric_row("keywords:existence", {"keywords": "lamp"}),
    "empty list": rubric_row("keywords:existence", {"keywords": []}),
    "empty word": rubric_row("keywords:forbidden_words", {"forbidden_words": ["a", " "]}),
    "number not whole": rubric_row("keywords:frequency", FREQUENCY | dict(frequency=1.5)),
    "number below 1": rubric_row("keywords:frequency", FREQUENCY | dict(frequency=0)),
    "truth for a number": rubric_row("keywords:frequency", FREQUENCY | dict(frequency=True)),
    "unknown relation": rubric_row("keywords:frequency", FREQUENCY | dict(relation="at most")),
    "phrase not text": rubric_row("startend:end_checker", {"end_phrase": 7}),
    "infinity for a number": rubric_row("keywords:frequency", FREQUENCY | dict(frequency=float("inf"))),
    "no number": rubric_row("keywords:frequency", FREQUENCY | dict(frequency=float("nan"))),
    "two letters": rubric_row("keywords:letter_frequency", LETTER | dict(letter="ab")),
    "a blank for a letter": rubric_row("keywords:letter_frequency", LETTER | dict(letter=" ")),
    "unknown let_relation": rubric_row("keywords:letter_frequency", LETTER | dict(let_relation="most")),
    "unknown language": rubric_row("language:response_language", dict(language="xx")),
    "language not text": rubric_row("language:response_language", dict(language=["de"])),
    "paragraph beyond the last": rubric_row(NTH, SECOND | dict(nth_paragraph=4)),
    "two first words": rubric_row(NTH, SECOND | dict(first_word="a b")),
    "no word": rubric_row("length_constraints:number_words", dict(num_words=1, **LESS_THAN)),
    "no sentence": rubric_row("length_constraints:number_sentences", dict(num_sentences=1, **LESS_THAN)),
}


def as_line(row):
    return row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_one_line_that_names_file_and_line(row, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(as_line(ROW) + b"\n\n" + as_line(row) + b"\n")
    with pytest.raises(rtt.BadInput) as error:
        rtt.load_tasks(path)
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_data_set_is_bad_input(content, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(rtt.BadInput, match="train.jsonl"):
        rtt.load_tasks(tmp_path)


def test_a_missing_file_is_bad_input(tmp_path):
    with pytest.raises(rtt.BadInput, match="none.jsonl"):
        rtt.load_tasks(tmp_path / "none.jsonl")


def test_rows_as_ifeval_ships_them_load_nulls_and_foreign_kwargs_ignored(tmp_path):
    kwargs = {"keywords": ["lamp", "key"], "frequency": None, "relation": "most", "num_words": -1}
    row = rubric_row("keywords:existence", kwargs) | dict(key=1000)
    (tmp_path / "eval.jsonl").write_bytes(b"\xef\xbb\xbf" + as_line(row) + b"\r\n")  # also with a BOM
    [task] = rtt.load_tasks(tmp_path, split="eval")
    assert task.prompt == row["prompt"]
    [rubric] = task.rubrics
    assert (rubric.id, rubric.kwargs) == ("keywords:existence", {"keywords": ["lamp", "key"]})
    assert "lamp, key" in rubric.criterion


def test_numbers_of_tables_with_gaps_and_less_than_one_word_of_a_kind():
    rubric = rtt.make_rubric("keywords:frequency", dict(keyword="a", frequency=1.0, **LESS_THAN))
    assert repr(rubric.kwargs["frequency"]) == "1" and "less than 1 times" in rubric.criterion
    assert rtt.verify(rubric, "bc").satisfied and not rtt.verify(rubric, "bac").satisfied


def test_criteria_in_words_follow_the_others_and_need_a_judge(tmp_path):
    rows = [ROW | dict(rubrics=["Be kind.", "Rhyme."]), ROW | dict(rubrics=None)]
    rows += [dict(prompt="Go.", rubrics=["Rhyme."])]
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(b"\n".join(map(as_line, rows)))
    both, none, only = [task.rubrics for task in rtt.load_tasks(path)]
    assert [rubric.id for rubric in both] == ["punctuation:no_comma", rtt.JUDGED, rtt.JUDGED]
    assert [rubric.criterion for rubric in both[1:]] == ["Be kind.", "Rhyme."] and both[1].kwargs == {}
    assert [rubric.id for rubric in none] == ["punctuation:no_comma"] and only == both[2:]
    with pytest.raises(ValueError, match="Rhyme.*needs a judge"):
        rtt.verify(only[0], "Hi.")
    assert rtt.verify(only[0], " ") == (False, [(1, 1)])


def test_what_needs_a_judge():
    def needs(rubric_id, **kwargs):
        return rtt.needs_judge(rtt.make_rubric(rubric_id, kwargs))

    assert rtt.needs_judge(rtt.Rubric(rtt.JUDGED, {}, "Rhyme."))
    shared = {code for code in rtt.LANGUAGES if needs("language:response_language", language=code)}
    assert shared == set("en es pt fr de it pl vi sw fi ru uk bg ar ur fa hi ne mr".split())
    others = [id for id in CASES if id != "language:response_language"]
    assert not any(needs(id, **kwargs) for id in others for kwargs, _ in CASES[id])


def test_the_criterion_of_a_language_names_it_in_english():
    assert "in German" in rtt.make_rubric("language:response_language", dict(language="de")).criterion


@pytest.mark.parametrize("code", rtt.LANGUAGES)
def test_a_language_is_known_by_its_script(code):
    text = {
        "LATIN": "Ça va, Łódź", "CYRILLIC": "Привіт", "ARABIC": "سلام", "DEVANAGARI": "नमस्ते",
        "BENGALI": "নমস্কার",
        "GUJARATI": "નમસ્તે", "GURMUKHI": "ਸਤਿ", "TAMIL": "வணக்கம்", "TELUGU": "నమస్తే", "KANNADA": "ನಮಸ್ಕಾರ",
        "MALAYALAM": "നമസ്കാരം", "THAI": "สวัสดี", "HEBREW": "שלום", "HANGUL": "안녕", "CJK": "你好",
        "HIRAGANA KATAKANA CJK": "東京タワーへ",
    }  # fmt: skip
    own = rtt.LANGUAGES[code][1]
    rubric = rtt.make_rubric("language:response_language", dict(language=code))
    assert {script for script in text if rtt.verify(rubric, text[script]).satisfied} == {own}


def test_a_data_set_of_the_hub_is_read_the_same_way_and_a_bad_row_named(monkeypatch):
    rows = [ROW, ROW | dict(prompt="")]
    monkeypatch.setattr(rtt, "hub_rows", lambda name, split: rows[: 1 if split == "eval" else 2])
    assert len(rtt.load_tasks("google/IFEval", split="eval")) == 1
    with pytest.raises(rtt.BadInput, match=r"^google/IFEval\[1\]: "):
        rtt.load_tasks("google/IFEval")


def test_braces_in_a_kwarg_are_text():
    assert "{x} {0}" in rtt.make_rubric("keywords:existence", {"keywords": ["{x} {0}"]}).criterion


def test_the_everyday_instructions_are_what_their_script_makes_and_hold_every_kind(tmp_path):
    script, folder = HERE / "data" / "make_instructions.py", HERE / "data" / "instructions"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, capture_output=True)
    seen = set()
    for split, least in (("train", 1000), ("eval", 200)):
        assert (folder / f"{split}.jsonl").read_bytes() == (tmp_path / f"{split}.jsonl").read_bytes()
        tasks = rtt.load_tasks(folder, split)
        ids = [rubric.id for task in tasks for rubric in task.rubrics]
        assert len(tasks) >= least and {*ids} == {*rtt.VERIFIERS, rtt.JUDGED}
        assert {len(task.rubrics) for task in tasks} == {1, 2, 3, 4, 5}
        judged = sum(any(rubric.id == rtt.JUDGED for rubric in task.rubrics) for task in tasks)
        assert 0.15 < judged / len(tasks) < 0.25
        prompts = {task.prompt for task in tasks}
        assert len(prompts) == len(tasks) and not prompts & seen  # none twice, none in both
        seen |= prompts


# ==================================================================================================
# 2. Rollouts
# ==================================================================================================

PROMPTS = [[5, 6], [7, 8, 9, 10, 11, 12, 13], [14]]


def roll(model, prompts=PROMPTS, G=4, T=12, temperature=1.0, ends=(END, OTHER_END), pad=0, seeds=None, **how):
    seeds = range(len(prompts)) if seeds is None else seeds
    return rtt.sample(model, prompts, G, T, temperature, ends, pad, list(seeds), **how)


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
    ids, attention, T = rtt.trim(rollout, torch.arange(12), 4)
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


def test_dropout_of_the_config_is_off_in_sampling_and_in_training(folder):
    policy = policy_of(folder)
    rollout = roll(policy.model, [[50, 51, 52]], ends=policy.end_ids)
    ids, attention, T = rtt.trim(rollout, torch.arange(4), 4)
    policy.model.train()
    assert close(rtt.token_logprobs(policy.model, ids, attention, T, group_size=4), rollout.logprobs, 1e-4)


def test_nothing_is_dropped_by_a_nested_config_or_a_layer():
    nested = Gemma3Config(text_config=dict(attention_dropout=0.3))
    assert rtt.without_dropout(nested).text_config.attention_dropout == 0
    assert rtt.without_dropout(OPTConfig(layerdrop=0.5, dropout=0.1)).layerdrop == 0


def test_no_noise_of_training_reaches_the_ratio():
    sizes = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=2, vocab_size=23, num_local_experts=4)
    torch.manual_seed(0)
    config = PhimoeConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, router_jitter_noise=0.5)
    model = PhimoeForCausalLM(config)
    ids, mask = torch.randint(3, 23, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    quiet = rtt.token_logprobs(model.eval(), ids, mask, 5)
    assert not close_or_not(rtt.token_logprobs(model.train(), ids, mask, 5), quiet)  # there is noise
    model.activation_checkpointing_enable()
    rtt.training_mode(model)
    assert close(rtt.token_logprobs(model, ids, mask, 5), quiet)


def close_or_not(a, b):
    return torch.allclose(a, b, atol=1e-5)


def test_a_decoding_step_is_recorded_only_where_every_step_has_the_same_shape():
    full = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    assert rtt.can_be_recorded(LlamaConfig(**full)) and rtt.can_be_recorded(Qwen2Config(**full))
    assert not rtt.can_be_recorded(Gemma3TextConfig(**full))  # sliding windows
    for kind in ("dynamic", "longrope"):
        rope = dict(rope_type=kind, rope_theta=1e4, factor=2.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4)
        config = LlamaConfig(**full)
        config.rope_parameters = rope
        assert not rtt.can_be_recorded(config)


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
def test_a_static_cache_holds_keys_and_values_that_autocast_computes_in_two_types(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(rtt, "recorded", lambda step, *inputs: step)
    with torch.autocast("cpu", torch.bfloat16):
        rollout = roll(model, graph=True)
    ids, attention, T = rtt.trim(rollout, torch.arange(12), 4)
    with torch.no_grad():
        exact = rtt.token_logprobs(model, ids, attention, T)
    assert rollout.logprobs.dtype == torch.float32
    assert (rollout.logprobs - exact).abs().mean() < 0.1 and rollout.logprobs.abs().max() > 1


@pytest.mark.parametrize("make_model", MODELS)
def test_both_ways_of_scoring_have_the_gradient_of_plain_forward_passes(make_model):
    model = make_model()
    rollout = roll(model, T=9, temperature=1.3)
    push = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for i, (prompt, response) in enumerate(rows_of(rollout)):
        total = total + (naive_logprobs(model, prompt, response, 1.3)[0] * push[i, : len(response)]).sum()
    expected = flat_grad(total, model)
    ids, attention, T = rtt.trim(rollout, torch.arange(12), 4)
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


def test_chosen_logprobs_keeps_no_float_copy_of_the_logits_for_the_backward_pass():
    logits, kept = torch.randn(7, 11, dtype=torch.bfloat16, requires_grad=True), []
    keep = lambda x: kept.append((x.dtype, x.numel())) or x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        rtt.chosen_logprobs(logits, torch.arange(7), chunk=3).sum()
    assert not any(dtype == torch.float32 and size >= 3 * 11 for dtype, size in kept)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits.float().log_softmax(1)
    assert (torch.float32, 7 * 11) in kept  # what is looked for can be seen


def test_sampling_needs_no_gradient_and_leaves_training_mode():
    model = tiny_model().train()
    assert not roll(model).logprobs.requires_grad and not model.training


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


def test_token_spans_take_no_longer_than_the_responses_are_long(tokenizer):
    rng = random.Random(0)
    plain = [[rng.randrange(5, len(tokenizer)) for _ in range(512)] for _ in range(32)]  # any garbage
    split = [byte_tokens(tokenizer, random_text(rng, 400), rng)[:512] for _ in range(32)]
    start = time.process_time()
    texts, spans = rtt.token_spans(tokenizer, plain + split)
    assert time.process_time() - start < 1 and all(len(row) == 512 for row in spans)


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
    texts, verdicts, evidence = graded(tokenizer, [ids, ids], [rubrics, rubrics[:1]], [True, False])
    commas, nothing = [float("," in tokenizer.decode([i])) for i in ids], [0.0] * len(ids)
    assert texts == [text, text] and sum(commas) == 1
    assert verdicts.tolist() == [[-1, -1], [-1, 0]]  # 0: the second prompt has one rubric
    assert evidence[0].tolist() == [commas + [0.0], nothing + [1.0]]  # the end token: too few words
    assert evidence[1].tolist() == [commas + [0.0], nothing + [0.0]]


@pytest.mark.parametrize("cut", ["<|im_start|>", "bytes"])
def test_a_truncated_response_has_no_end_token_to_blame(tokenizer, cut):
    # The last token writes nothing of its own: a special token, or the second byte of a cut emoji.
    tail = [tokenizer.convert_tokens_to_ids(cut)] if cut != "bytes" else single_bytes(tokenizer, "😀")[:2]
    rubrics = [("length_constraints:number_words", dict(num_words=9, **AT_LEAST))]
    _, _, evidence = graded(tokenizer, [tokenizer("One").input_ids + tail], [rubrics], [False])
    assert not evidence.any()


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
def test_a_lone_space_that_begins_both_answers_says_nothing():
    tokenizer = AutoTokenizer.from_pretrained(HERE / "data" / "tiny")
    backend, alone = tokenizer.backend_tokenizer, pre_tokenizers.Split(" ", "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([alone, backend.pre_tokenizer])
    assert tokenizer(" yes").input_ids[0] == tokenizer(" no").input_ids[0] != tokenizer("no").input_ids[0]
    judge = rtt.Policy(tiny_model(vocab_size=len(tokenizer)), tokenizer, [2])
    asked = [(p, r, c) for p, r, criteria in QUESTIONS for c in criteria]
    answers = rtt.judge_yes(judge, [rtt.QUESTION.format(*question) for question in asked])
    assert close(answers, torch.tensor([slow_yes(judge, *question) for question in asked]))


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
    texts, verdicts, evidence = graded(
        tokenizer, [ids, blank, [], ids], [rubrics, rubrics[:2]], [True] * 4, "judge"
    )
    expected = [(texts[0], "is kind"), (texts[0], "is long"), (texts[3], "is kind")]
    assert asked == [rtt.QUESTION.format("p", *pair) for pair in expected]
    assert verdicts.tolist() == [[1, -1, -1], [-1, -1, -1], [-1, -1, 0], [1, -1, 0]]
    known = evidence >= 0
    assert known.all(2).tolist() == [[False, True, False], [True] * 3, [True] * 3, [False, True, True]]
    assert (evidence[~known] == -1).all() and torch.equal(known.all(2), known.any(2))
    assert evidence[0, 1].sum() == 1  # the comma
    monkeypatch.setattr(rtt, "judge_yes", None)  # without such rubrics there need be no judge
    graded(tokenizer, [ids], [rubrics[1:2]], [True])


def test_a_language_whose_letters_others_share_is_judged_where_the_letters_are_right(tokenizer, monkeypatch):
    asked = []
    deny = lambda _, questions: asked.extend(questions) or torch.zeros(len(questions))
    monkeypatch.setattr(rtt, "judge_yes", deny)
    rubrics = [("language:response_language", dict(language=language)) for language in ("de", "ko")]
    latin, korean = tokenizer("A lamp").input_ids, byte_tokens(tokenizer, "등불", random.Random(0))
    _, verdicts, evidence = graded(tokenizer, [latin, korean], [rubrics] * 2, [False] * 2, "judge")
    assert asked == [rtt.QUESTION.format("p", "A lamp", "respond entirely in German")]
    assert verdicts.tolist() == [[-1, -1], [-1, 1]]
    assert (evidence[0, 0] == -1).all() and (evidence[1] >= 0).all() and (evidence[0, 1] >= 0).all()


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
    return rtt.RelevanceDiscriminator(folder, tokenizer, 1e-2, "cpu")


def responses(N=6, T=9, seed=0):
    """ids and mask [N, T] of ragged random responses, token 77 here and there."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(70, 80, (N, T), generator=generator)
    lengths = torch.randint(1, T + 1, (N, 1), generator=generator)
    return ids, (torch.arange(T) < lengths).long()


CRITERIA = [["find it", "a", "b"], ["find it"], ["a much longer criterion, with more words", "find it"]] * 2


def test_relevance_is_a_probability_and_0_at_padding_and_for_absent_rubrics(discriminator):
    ids, mask = responses()
    relevance = discriminator.predict(CRITERIA, ids, mask)
    present = torch.tensor([[[k < len(texts)] for k in range(3)] for texts in CRITERIA]) & (mask[:, None] > 0)
    assert relevance.shape == (6, 3, 9) and not relevance.requires_grad
    assert ((relevance > 0) & (relevance < 1))[present].all() and not relevance[~present].any()


def test_relevance_does_not_depend_on_the_batch(discriminator):
    ids, mask = responses()
    together = discriminator.predict(CRITERIA, ids, mask)
    some = discriminator.predict(CRITERIA, ids, mask, pairs=[(0, 0)])
    assert close(some[0, 0], together[0, 0]) and not some[1:].any() and not some[0, 1:].any()
    assert not discriminator.predict(CRITERIA, ids, mask, pairs=[]).any()
    assert close(discriminator.predict(CRITERIA, ids, mask, batch=2), together)
    assert close(discriminator.predict(CRITERIA[::-1], ids.flip(0), mask.flip(0)).flip(0), together)
    garbage = torch.where(mask > 0, ids, 5)
    assert close(discriminator.predict(CRITERIA, garbage, mask), together)
    for i, texts in enumerate(CRITERIA):
        n = int(mask[i].sum())
        [alone] = discriminator.predict([texts], ids[i : i + 1, :n], mask[i : i + 1, :n])
        assert close(alone, together[i, : len(texts), :n])


def test_the_discriminator_learns_from_the_evidence_and_from_the_criterion(discriminator):
    ids, mask = responses(16)
    criteria = [["find it", "leave it"]] * 16
    evidence = torch.stack([(ids == 77), torch.zeros_like(ids)], 1).float() * mask[:, None]
    before = rtt.f1_and_auroc(*score(discriminator, criteria, ids, mask, evidence))
    torch.manual_seed(0)
    for _ in range(60):
        discriminator.fit(criteria, ids, mask, evidence)
    after = rtt.f1_and_auroc(*score(discriminator, criteria, ids, mask, evidence))
    assert before[0] < 0.5 and after[0] > 0.9 and after[1] > 0.97


def score(discriminator, criteria, ids, mask, evidence):
    relevance = discriminator.predict(criteria, ids, mask)
    return rtt.scored_tokens(relevance, evidence, torch.ones(evidence.shape[:2]), mask)


def test_fit_is_one_step_on_the_mean_cross_entropy_of_response_tokens(discriminator, monkeypatch):
    """Every parameter moves by lr * gradient of a slow, unpadded mean; no gradient is left behind."""
    (ids, mask), criteria = responses(), [["use the word lamp"], ["do not use commas"]] * 3
    evidence = (torch.rand(6, 1, 9, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    slow, tokens = 0.0, 0
    for i in range(6):
        n = int(mask[i].sum())
        p = discriminator.logits(criteria[i], ids[i : i + 1, :n], mask[i : i + 1, :n])[0].sigmoid()
        y = evidence[i, 0, :n]
        slow, tokens = slow - (y * p.log() + (1 - y) * (1 - p).log()).sum(), tokens + n
    weights = list(discriminator.model.parameters())
    wanted = torch.autograd.grad(slow / tokens, weights)
    size = sum(g.square().sum() for g in wanted).sqrt().clamp(min=1.0)  # clipped to norm 1
    before = [w.detach().clone() for w in weights]
    monkeypatch.setattr(discriminator, "optimizer", torch.optim.SGD(weights, lr=0.5))
    discriminator.fit(criteria, ids, mask, evidence, pairs=6)
    for old, new, gradient in zip(before, weights, wanted):
        assert close(new, old - 0.5 * gradient / size, 1e-4)
    assert all(w.grad is None for w in weights)


def test_the_gradients_of_two_processes_sum_to_that_of_one_with_all_responses(discriminator, monkeypatch):
    (ids, mask), gradients, seen = responses(), [], []
    evidence, weights = (ids == 77).float()[:, None], list(discriminator.model.parameters())

    def descend(model, optimizer):
        own = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        gradients.append(torch.cat([gradient.flatten() for gradient in own]))
        optimizer.zero_grad()

    def fit(rows, **how):
        discriminator.fit([["find it"]] * len(ids[rows]), ids[rows], mask[rows], evidence[rows], **how)

    monkeypatch.setattr(rtt, "descend", descend)
    fit(slice(6))
    monkeypatch.setattr(rtt, "WORLD", 2)
    monkeypatch.setattr(rtt, "gather", lambda tokens: [tokens, int(mask.sum()) - tokens])
    fit(slice(0, 2))
    fit(slice(2, 6))
    size = gradients[0].norm()
    assert len(gradients) == 3 and close(sum(gradients[1:]) / size, gradients[0] / size)
    evidence = evidence - 2  # a judge gave all verdicts here, not there, and both must descend
    fit(slice(6))
    assert len(gradients) == 4 and not gradients[3].any()
    evidence, real = evidence + 2, discriminator.logits
    monkeypatch.setattr(discriminator, "logits", lambda texts, *a: seen.extend(texts) or real(texts, *a))
    fit(slice(6), pairs=5)
    assert len(seen) == 3  # each process takes its share of the pairs


def test_fit_sees_other_pairs_each_time_and_skips_a_gradient_that_is_not_finite(discriminator, monkeypatch):
    (ids, mask), seen = responses(), []
    criteria, evidence = [[f"criterion {i}"] for i in range(6)], torch.zeros(6, 1, 9)
    real = discriminator.logits
    monkeypatch.setattr(discriminator, "logits", lambda texts, *a: seen.extend(texts) or real(texts, *a))
    for _ in range(12):
        discriminator.fit(criteria, ids, mask, evidence, pairs=2)
    assert len(seen) == 24 and len(set(seen)) == 6
    before = [w.detach().clone() for w in discriminator.model.parameters()]
    monkeypatch.setattr(discriminator, "logits", lambda *a: real(*a) * math.inf)
    discriminator.fit(criteria, ids, mask, evidence, pairs=2)
    assert all(map(torch.equal, before, discriminator.model.parameters()))


def test_the_discriminator_learns_nothing_from_verdicts_without_evidence(discriminator):
    (ids, mask), criteria = responses(), [["judged", "find it"]] * 6
    evidence = torch.stack([torch.full(ids.shape, -1.0), (ids == 77).float()], 1)
    start = {name: value.clone() for name, value in discriminator.model.state_dict().items()}
    learned = []
    for given, texts, ks in ((evidence, criteria, [0, 1]), (evidence[:, 1:], [["find it"]] * 6, [1])):
        discriminator.model.load_state_dict(start)
        discriminator.optimizer = torch.optim.SGD(discriminator.model.parameters(), lr=0.1)
        discriminator.fit(texts, ids, mask, given, pairs=99)
        learned.append(torch.cat([p.detach().flatten() for p in discriminator.model.parameters()]))
    nothing = torch.cat([start[name].flatten() for name, _ in discriminator.model.named_parameters()])
    assert close(*learned, 1e-6) and (learned[0] - nothing).abs().max() > 1e-3
    discriminator.fit(criteria, ids, mask, torch.full_like(evidence, -1.0))
    after = torch.cat([p.detach().flatten() for p in discriminator.model.parameters()])
    assert torch.equal(after, learned[1])


def test_scored_tokens_leave_out_verdicts_without_evidence():
    evidence = torch.tensor([[[0.0, 1.0], [-1.0, -1.0]]])
    relevance, labels = rtt.scored_tokens(evidence + 0.5, evidence, torch.tensor([[1, 1]]), torch.ones(1, 2))
    assert labels.tolist() == [0, 1] and relevance.tolist() == [0.5, 1.5]


def test_f1_and_auroc_against_a_loop_over_pairs_with_ties():
    scores = torch.tensor([0.9, 0.7, 0.7, 0.7, 0.5, 0.2, 0.2, 0.6])
    labels = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    pairs = [(p, n) for p, a in zip(scores, labels) if a for n, b in zip(scores, labels) if not b]
    auroc = sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)
    precision, recall = 3 / 5, 3 / 4  # five are above 0.5, three of them of the four positives
    expected = 2 * precision * recall / (precision + recall), float(auroc)
    assert rtt.f1_and_auroc(scores, labels) == pytest.approx(expected)


def test_scored_tokens_leave_out_padding_and_absent_rubrics():
    evidence = torch.arange(8.0).view(1, 2, 4)
    verdicts, mask = torch.tensor([[-1, 0]]), torch.tensor([[1, 1, 1, 0]])
    assert rtt.scored_tokens(evidence, evidence, verdicts, mask)[1].tolist() == [0, 1, 2]


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
    combined = rtt.group_advantages(rewards, verdicts, relevance, mask, args)  # [N, T]
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


@pytest.mark.parametrize("partition", rtt.PARTITIONS)
def test_an_irrelevant_response_or_a_single_one_gives_no_nan(partition):
    one, ones = torch.tensor([[1, -1]]), torch.ones(1, 3)
    for relevance in (torch.zeros(1, 2, 3), torch.ones(1, 2, 3)):
        assert rtt.token_advantage(one, relevance, ones, partition).isfinite().all()
    assert not rtt.token_advantage(one, torch.zeros(1, 2, 3), ones, partition).any()


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


@pytest.mark.parametrize("partition", rtt.PARTITIONS)
def test_no_gradient_flows_into_the_relevance(partition):
    verdicts, relevance, mask, _ = random_group()
    assert not rtt.token_advantage(verdicts, relevance.requires_grad_(), mask, partition).requires_grad


def test_an_unknown_partition_is_refused():
    verdicts, relevance, mask, _ = random_group()
    with pytest.raises(ValueError, match="partition must be one of intra, .*, cross, not 'group'"):
        rtt.token_advantage(verdicts, relevance, mask, "group")


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
    assert torch.allclose(advantage, partly) == (partition in rtt.CONTESTED_ONLY)


@pytest.mark.parametrize("partition", ["intra", "contested", "cross"])
def test_uniform_relevance_comes_to_plain_grpo(partition):
    verdicts, relevance, mask, _ = random_group()
    assert close(rtt.token_advantage(verdicts, torch.ones_like(relevance), mask, partition), torch.zeros(4, 6))


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
@pytest.mark.parametrize("loss", rtt.LOSSES)
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


@pytest.mark.parametrize("loss", rtt.LOSSES)
def test_padding_may_hold_anything(loss):
    logprobs, old, advantages, mask = loss_case(dtype=torch.float32)
    garbage = torch.where(mask > 0, logprobs, -200.0).detach().requires_grad_()  # exp(200) is infinite
    clean, stats = rtt.policy_loss(logprobs, old, advantages, mask, 4, loss)
    dirty, dirty_stats = rtt.policy_loss(garbage, old * mask, advantages, mask, 4, loss)
    dirty.backward()
    assert close(dirty, clean) and garbage.grad.isfinite().all()
    assert close(dirty_stats["coef"], stats["coef"])
    assert dirty_stats["approx_kl"] == pytest.approx(stats["approx_kl"]) and math.isfinite(stats["approx_kl"])


@pytest.mark.parametrize("loss", rtt.LOSSES)
def test_only_the_new_log_probabilities_get_a_gradient(loss):
    """policy_loss(x, x, ...) on policy must learn, and a learned relevance must not be trained by it."""
    logprobs, _, advantages, mask = loss_case()
    advantages.requires_grad_()
    rtt.policy_loss(logprobs, logprobs, advantages, mask, 4, loss)[0].backward()
    weight = 1 / mask.sum(1, keepdim=True) / 8 if loss == "gspo" else 1 / mask.sum()
    assert close(logprobs.grad, -advantages.detach() * weight) and advantages.grad is None


@pytest.mark.parametrize("loss", rtt.LOSSES)
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


@pytest.mark.parametrize("loss", rtt.LOSSES)
def test_a_batch_without_tokens_has_a_loss_of_0(loss):
    logprobs = torch.randn(2, 3, requires_grad=True)
    value, _ = rtt.policy_loss(logprobs, torch.randn(2, 3), torch.randn(2, 3), torch.zeros(2, 3), 2, loss)
    value.backward()
    assert value == 0 and not logprobs.grad.any()


def test_other_shapes_are_refused():
    x = torch.zeros(4, 4)
    for shapes, group_size in ((x, x, x[0], x), 2), ((x, x, x, x[:, :3]), 2), ((x, x, x, x), 3):
        with pytest.raises(ValueError, match=r"must all be \[N, T\]"):
            rtt.policy_loss(*shapes, group_size)


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


def test_a_lifted_clipped_objective_gives_the_numbers_of_its_docstring():
    ratio, A = torch.tensor([1.5, 0.5, 1.5, 0.5]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    objective, weight = rtt.clipped_objective(ratio, A, 0.2, 0.2)
    assert close(objective, [1.2, 0.5, -1.5, -0.8]) and close(weight, [0.0, 0.5, 1.5, 0.0])


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


@pytest.mark.parametrize("loss", rtt.LOSSES)
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


def test_a_token_that_cannot_be_sampled_leaves_the_entropy_finite():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    forbid = lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([7]), -math.inf)
    model.lm_head.register_forward_hook(forbid)
    rollout = rtt.sample(model, [[5, 6]], 4, 6, seeds=[0])
    assert rollout.entropy.isfinite().all() and (rollout.entropy > 0).any() and not (rollout.ids == 7).any()


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


def test_gradients_are_clipped_to_the_norm():
    model = tiny_model()
    gradient, _ = gradient_of_update(model, *off_policy_rollout(model), options(max_grad_norm=0.01))
    assert gradient.norm() == pytest.approx(0.01, rel=1e-3)


def test_ratios_start_at_1_and_leave_it_with_the_second_update():
    for updates in (1, 3):
        model = tiny_model()
        rollout, advantages = off_policy_rollout(model, spread=0.0)
        _, stats = gradient_of_update(model, rollout, advantages, options(updates=updates))
        assert (stats["approx_kl"] < 1e-9) == (stats["clip_fraction"] == 0) == (updates == 1)


def test_micro_batches_hold_whole_groups_of_like_length_each_once():
    lengths = torch.tensor([9, 1, 2, 2, 1, 8, 1, 1, 3, 3])
    batches = [rows.tolist() for rows in rtt.micro_batches(lengths, 2, 2)]
    assert batches == [[6, 7, 2, 3], [8, 9, 4, 5], [0, 1]]


def test_gspo_clips_far_closer_by_default():
    logprobs, mask = torch.tensor([[0.01, 0.01], [-0.01, -0.01]]), torch.ones(2, 2)
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    fractions = [
        rtt.policy_loss(logprobs, torch.zeros(2, 2), advantages, mask, 2, loss)[1]["clip_fraction"]
        for loss in ("grpo", "gspo")
    ]
    assert fractions == [0.0, 1.0]


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


def test_mean_residual_is_over_the_groups_that_push():
    ids, coef = torch.tensor([[5, 6], [5, 6]] * 3), torch.zeros(6, 2)
    coef[:4] = torch.tensor([[1.0, 1], [-1, -1], [1, 1], [1, 1]])  # cancels; does not at all; the third is idle
    rollout = SimpleNamespace(ids=ids, mask=torch.ones_like(ids))
    assert rtt.mean_residual(coef, rollout, 2) == 0.5 and rtt.mean_residual(coef * 0, rollout, 2) == 0.0


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


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


SHARES = "instruction rubric residual clip_fraction truncated zero_variance f1 auroc".split()
FIELDS = "step reward entropy grad_norm loss skipped tokens tokens_per_second peak_memory_mb seconds".split()
FIELDS += "seconds_rollout seconds_verify seconds_relevance seconds_update".split() + SHARES
FIELDS += ["eval_instruction", "eval_rubric"]


def test_the_default_runs_from_end_to_end_and_its_policy_goes_on(data, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(HERE / "rtt.py"), "--data", str(data), "--out", str(out), *SMALL]
    flags = "--steps 2 --eval-every 1 --show-every 1 --updates 2".split()
    done = subprocess.run(command + flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, last = read(out / "metrics.jsonl")
    assert set(FIELDS) <= set(first) and set(FIELDS) - set(last) == {"eval_instruction", "eval_rubric"}
    assert all(math.isfinite(value) for value in first.values()) and (first["step"], last["step"]) == (1, 2)
    assert all(0 <= first[name] <= 1 for name in SHARES)
    phases = sum(first[f"seconds_{phase}"] for phase in ("rollout", "verify", "relevance", "update"))
    assert first["seconds"] == pytest.approx(phases)
    assert first["tokens_per_second"] == pytest.approx(first["tokens"] / first["seconds"])
    config = json.loads((out / "config.json").read_text())
    assert config["updates"] == 2 and config["seed"] == 0 and config["loss"] == "grpo"
    result = json.loads((out / "result.json").read_text())
    for when in ("before", "after"):  # the table counts each held-out rubric once
        hits, totals = (sum(column) for column in zip(*result[when]["kinds"].values()))
        assert result[when]["prompts"] == 5 and result[when]["rubric"] == pytest.approx(hits / totals)
        assert totals == sum(len(task.rubrics) for task in rtt.load_tasks(data, "eval"))
    shown = ["instruction level", "rubric level", *result["after"]["kinds"]]
    assert all(name in done.stdout for name in shown)
    assert "\033[" not in done.stdout  # no colours where the output is no terminal
    assert sum(p.stat().st_size for p in (out / "policy").glob("*.safetensors")) > 0
    assert train(out / "policy", data, tmp_path / "next")[0]["step"] == 1


def test_equal_seeds_give_equal_metrics_and_weights_and_others_do_not(folder, data, tmp_path):
    timing = ("seconds", "tokens_per_second", "peak_memory")
    runs = []
    for n, seed in enumerate("001"):
        rows = train(folder, data, tmp_path / str(n), "--seed", seed, "--updates", "2", "--kl", "0.1")
        runs.append([{k: v for k, v in row.items() if not k.startswith(timing)} for row in rows])
    weights = [(tmp_path / name / "policy" / "model.safetensors").read_bytes() for name in "012"]
    assert (tmp_path / "0" / "result.json").read_bytes() == (tmp_path / "1" / "result.json").read_bytes()
    assert runs[0] == runs[1] and weights[0] == weights[1]
    assert runs[0] != runs[2] and weights[0] != weights[2]
    assert weights[0] != (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "flags",
    [f"--loss {loss}" for loss in rtt.LOSSES]
    + [f"--partition {partition} --combine mix" for partition in rtt.PARTITIONS]
    + ["--relevance evidence --reward csr", "--relevance uniform", "--alpha 0", "--kl 0.1 --temperature 0.7"]
    + ["--alpha 0 --gradient-checkpointing", "--micro-batch 1 --updates 2"]
    + ["--clip 0.1 0.3 --eval-every 0 --show-every 0"],
)
def test_every_variant_runs_and_has_a_discriminator_only_where_it_is_needed(folder, data, tmp_path, flags):
    row = train(folder, data, tmp_path / "run", *flags.split())[-1]
    assert math.isfinite(row["loss"]) and row["skipped"] == 0
    assert ("f1" in row) == ("--relevance" not in flags and "--alpha" not in flags)
    assert (row["reward"] == row["instruction"]) == ("csr" not in flags)


def test_the_kl_anchor_is_the_starting_policy_and_only_where_asked(folder, data, tmp_path, monkeypatch):
    anchors, update = [], rtt.update
    monkeypatch.setattr(rtt, "update", lambda *args: anchors.append(args[-1]) or update(*args))
    train(folder, data, tmp_path / "off")
    train(folder, data, tmp_path / "on", "--kl", "0.1")
    start = policy_of(folder).model
    assert anchors[:2] == [None, None]
    assert all(map(torch.equal, anchors[3].parameters(), start.parameters()))  # as it was, two steps later


def test_the_relevance_flag_chooses_where_relevance_comes_from(folder, data, tmp_path, monkeypatch):
    seen, real = [], rtt.group_advantages
    monkeypatch.setattr(rtt, "group_advantages", lambda *args: seen.append(args[2]) or real(*args))
    for source in ("uniform", "evidence", "discriminator"):
        train(folder, data, tmp_path / source, "--relevance", source, "--steps", "1")
    uniform, evidence, learned = seen
    assert (uniform == 1).all() and set(evidence.unique().tolist()) == {0.0, 1.0}
    assert ((learned > 0) & (learned < 1)).any()


def test_flags_reach_what_they_set(folder, data, tmp_path, monkeypatch):
    """Each flag is turned away from its default and looked for where it must arrive."""
    rates, evaluated, streams, clips = [], [], [], []
    adam, evaluate, stream, loss = torch.optim.Adam, rtt.evaluate, rtt.task_stream, rtt.policy_loss
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr: rates.append(lr) or adam(p, lr=lr))
    count = lambda p, tasks, *a: evaluated.append(len(tasks)) or evaluate(p, tasks, *a)
    monkeypatch.setattr(rtt, "evaluate", count)
    monkeypatch.setattr(rtt, "task_stream", lambda tasks, seed: streams.append(seed) or stream(tasks, seed))
    monkeypatch.setattr(rtt, "policy_loss", lambda *a: clips.append(a[6]) or loss(*a))
    flags = "--lr 0.02 --discriminator-lr 0.03 --eval-every 1 --eval-prompts 3 --seed 5 --clip 0.1 0.3"
    train(folder, data, tmp_path / "run", *flags.split(), "--micro-batch", "1")
    assert sorted(rates) == [0.02, 0.03] and evaluated == [5, 3, 5] and streams == [5]
    assert clips == [[0.1, 0.3]] * 4  # 2 steps of 2 groups, one group a pass


def test_the_first_update_is_on_policy_at_any_temperature(folder, data, tmp_path):
    for row in train(folder, data, tmp_path / "run", "--temperature", "0.7", "--lr", "0.01"):
        assert row["approx_kl"] < 1e-6 and row["clip_fraction"] == 0  # sampled and scored at the same one


def test_held_out_prompts_have_random_numbers_of_their_own(folder, data, monkeypatch):
    seeds, real = [], rtt.sample
    spy = lambda *args, **options: seeds.extend(options["seeds"]) or real(*args, **options)
    monkeypatch.setattr(rtt, "sample", spy)
    args = rtt.parse_args(["--prompts", "1", "--group-size", "2", "--max-new-tokens", "4"])
    rtt.evaluate(policy_of(folder), rtt.load_tasks(data, "eval"), args)
    assert len(set(seeds)) == 5


def test_a_prompt_that_does_not_fit_the_context_is_refused(tokenizer, data, tmp_path, capsys):
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=80).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--data", str(data), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as left:
        rtt.main(flags + ["--max-new-tokens", "64"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "context" in said and "80 tokens" in said


def test_rollout_metrics_by_hand():
    verdicts = torch.tensor([[1, 1], [1, -1], [-1, 0], [1, 0]])  # the second prompt has one rubric
    mask, entropy = torch.tensor([[1, 1, 0]] * 4), torch.full((4, 3), 0.5) * torch.tensor([1, 1, 0])
    truncated = torch.tensor([True, False, False, False])
    rollout = rtt.Rollout(None, None, None, mask, None, entropy, truncated)
    metrics = rtt.rollout_metrics(rollout, verdicts, torch.tensor([1.0, 0.5, 0.25, 0.25]), 2)
    shares = dict(reward=0.5, instruction=0.5, rubric=4 / 6, truncated=0.25, zero_variance=0.5)
    assert metrics == pytest.approx(dict(shares, entropy=0.5, tokens=8))


def test_a_policy_ends_at_the_end_tokens_of_tokenizer_and_generation_config(folder, tokenizer, tmp_path):
    model = Qwen2ForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert policy_of(tmp_path).end_ids == sorted({7, 9, tokenizer.eos_token_id})


def test_a_prompt_goes_through_the_chat_template_where_there_is_one(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "[{{ messages[0].content }}]{% if add_generation_prompt %}>{% endif %}"
    assert tokenizer.decode(rtt.encode_prompt(tokenizer, "Tell.")) == "[Tell.]>"
    tokenizer.chat_template = None
    assert tokenizer.decode(rtt.encode_prompt(tokenizer, "Tell.")) == "Tell."


def test_a_file_keeps_its_last_tenth_for_measuring(tmp_path):
    rows = [ROW | dict(prompt=f"Story {i}.") for i in range(20)]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train_tasks, eval_tasks = rtt.load_both(str(tmp_path / "all.jsonl"), 0, False)
    assert [task.prompt for task in eval_tasks] == ["Story 18.", "Story 19."] and len(train_tasks) == 18


def test_held_out_responses_are_the_same_every_time_whatever_the_batch(folder, data, monkeypatch):
    policy, seen, results = policy_of(folder), [], []
    real, tasks = rtt.roll_out, rtt.load_tasks(data, "eval")
    monkeypatch.setattr(rtt, "roll_out", lambda *args: seen.append(real(*args)) or seen[-1])
    for prompts in ("1", "1", "2"):  # as many responses at a time as in training: 4, 4, 8
        args = rtt.parse_args([*SMALL, "--prompts", prompts])
        seen.clear()
        results.append(rtt.evaluate(policy, tasks, args)[0])
        results[-1]["ids"] = [row for rollout in seen for row in rollout.ids.tolist()]
    assert results[0] == results[1] == results[2] and len(results[0]["ids"]) == 5


def test_two_processes_measure_what_one_does(folder, data, discriminator, monkeypatch):
    tasks, args, parts = rtt.load_tasks(data, "eval"), rtt.parse_args(SMALL), []
    measure = lambda: rtt.evaluate(policy_of(folder), tasks, args, None, discriminator)
    one, records = measure()
    monkeypatch.setattr(rtt, "WORLD", 2)
    monkeypatch.setattr(rtt, "gather", lambda part: parts.append(part) or [part])
    other = [monkeypatch.setattr(rtt, "RANK", rank) or measure()[0] for rank in (0, 1)]
    assert len({result["auroc"] for result in (one, *other)}) == 3
    both = iter(zip(parts[:2], parts[2:]))
    monkeypatch.setattr(rtt, "gather", lambda part: next(both))
    two, same = measure()
    assert same == records and two.pop("kinds") == one.pop("kinds") and two == pytest.approx(one)


def test_every_prompt_has_its_turn_before_any_has_a_second():
    stream = rtt.task_stream(list("abcdef"), seed=0)
    first, second = [[next(stream)[0] for _ in range(6)] for _ in range(2)]
    assert sorted(first) == sorted(second) == list("abcdef") and first != second


def test_warm_up_trains_the_discriminator_and_leaves_the_policy_alone(folder, data, discriminator):
    policy = policy_of(folder)
    weights = [[p.clone() for p in model.parameters()] for model in (policy.model, discriminator.model)]
    args = rtt.parse_args(SMALL)
    models = rtt.Models(policy, None, discriminator, None, None)
    rtt.warm_up(models, rtt.task_stream(rtt.load_tasks(data), 0), args)
    assert all(map(torch.equal, weights[0], policy.model.parameters()))
    assert not any(map(torch.equal, weights[1], discriminator.model.parameters()))


def test_a_response_is_shown_whole_and_coloured_only_on_a_terminal(tokenizer, monkeypatch):
    ids = torch.tensor(tokenizer("A lamp 😀, {gone}.").input_ids)
    mask, advantages = torch.ones_like(ids), torch.linspace(-1, 1, len(ids))
    task = rtt.Task("Tell.", [rtt.make_rubric("punctuation:no_comma", {})])
    show = lambda: rtt.show_credit(tokenizer, task, ids, mask, torch.tensor([-1]), advantages)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert "A lamp" in show() and ", {gone}." in show() and "[ ] " in show() and "\033" not in show()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert show().count("\033[0m") == len(ids)


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


def test_a_prompt_does_not_end_with_the_end_token():
    ending = lambda prompt: SimpleNamespace(input_ids=[7, 8, 2])
    ending.chat_template, ending.eos_token_id = None, 2
    assert rtt.encode_prompt(ending, "a b") == [7, 8]


def test_a_tokenizer_without_a_pad_token_is_enough(folder, data, tmp_path):
    bare = save_model(folder, tmp_path / "bare", lambda _, tokenizer: setattr(tokenizer, "pad_token", None))
    assert policy_of(bare).tokenizer.pad_token is None
    rows = train(bare, data, tmp_path / "run")
    kept = "reward", "loss", "grad_norm", "entropy", "f1"
    assert [[row[k] for k in kept] for row in rows] == [
        [row[k] for k in kept] for row in train(folder, data, tmp_path / "padded")
    ]


def test_a_blank_response_is_written_down_though_nobody_judged_it(tokenizer):
    task = rtt.Task("p", [rtt.Rubric(rtt.JUDGED, {}, "is kind"), rtt.make_rubric("punctuation:no_comma", {})])
    [text], verdicts, evidence = graded(tokenizer, [[]], [[(rtt.JUDGED, "is kind")]], [True])
    kept = rtt.record(0, task, text, False, [*verdicts[0].tolist(), -1], [*evidence[0, :, 0].tolist(), 0.0])
    assert [rubric["satisfied"] for rubric in kept["rubrics"]] == [False, False]
    assert kept["rubrics"][1]["evidence"] == [(0, 0)]


@pytest.mark.parametrize("flag, tokens", [("--model", "79"), ("--judge", "12")])  # a judge reads more
def test_a_model_without_any_end_token_or_with_a_short_context_is_refused(
    flag, tokens, folder, tokenizer, data, capsys, tmp_path, monkeypatch
):
    def endless(model, tokenizer):
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token = None

    judged(monkeypatch)
    flags = [*([] if flag == "--model" else ["--model", folder]), "--data", data, "--out", tmp_path / "run"]
    flags += [*SMALL, "--steps", "1", "--max-new-tokens", tokens]
    bad = save_model(folder, tmp_path / "endless", endless)
    assert f"{flag} {bad}: " in (said := refused(capsys, *flags, flag, bad)) and "end token" in said
    short = dict(max_position_embeddings=80, eos_token_id=2, vocab_size=len(tokenizer))
    tiny_model(**short).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    said = refused(capsys, *flags, flag, tmp_path / "short")
    assert f"{flag} {tmp_path / 'short'}" in said and "80 tokens" in said and not (tmp_path / "run").exists()


def test_a_model_whose_past_cannot_be_shared_is_refused(tokenizer, data, capsys, tmp_path):
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(MambaConfig(**sizes, eos_token_id=2)).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    said = refused(capsys, "--model", tmp_path / "mamba", "--data", data, "--out", tmp_path / "run", *SMALL)
    assert "recurrent" in said and not (tmp_path / "run").exists()


def test_a_quantised_model_and_one_that_cannot_be_checkpointed_are_refused(folder, data, capsys, tmp_path, monkeypatch):
    quantised = shutil.copytree(folder, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="awq", bits=4)
    (quantised / "config.json").write_text(json.dumps(config))
    flags = "--data", data, "--out", tmp_path / "run", *SMALL
    assert "quantised" in refused(capsys, "--model", quantised, *flags)
    monkeypatch.setattr(Qwen2ForCausalLM, "supports_gradient_checkpointing", False)
    said = refused(capsys, "--model", folder, "--gradient-checkpointing", *flags)
    assert "--no-gradient-checkpointing" in said and not (tmp_path / "run").exists()


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


def test_a_model_folder_without_a_tokenizer_is_refused(folder, data, capsys, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "chat*"))
    said = refused(capsys, "--model", bare, "--data", data, "--out", tmp_path / "run", *SMALL)
    assert "tokenizer" in said and not (tmp_path / "run").exists()


def test_models_without_a_token_classifier_have_a_discriminator(tokenizer, tmp_path):
    gemma3_model(len(tokenizer)).save_pretrained(tmp_path)
    discriminator = rtt.RelevanceDiscriminator(tmp_path, tokenizer, 0.01, "cpu")
    ids, mask = torch.randint(5, 50, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    evidence = (ids[:, None] > 25).float()  # [N, 1, T]
    for _ in range(60):
        discriminator.fit([["a"], ["b"]], ids, mask, evidence)
    assert rtt.f1_and_auroc(discriminator.predict([["a"], ["b"]], ids, mask), evidence)[0] > 0.9


def test_a_judge_that_cannot_say_yes_or_no_is_refused(folder, data, capsys, tmp_path, monkeypatch):
    judged(monkeypatch)
    monkeypatch.setattr(rtt, "answer_tokens", lambda tokenizer: ([], [7]))
    said = refused(capsys, "--model", folder, "--data", data, "--out", tmp_path / "run", *SMALL)
    assert "yes and no alike" in said and not (tmp_path / "run").exists()


def test_a_folder_belongs_to_the_run_that_opened_it(tmp_path):
    rtt.open_run(tmp_path / "run")
    with pytest.raises(rtt.BadInput, match="not empty"):
        rtt.open_run(tmp_path / "run")


@pytest.mark.parametrize("flags", ["--combine mix --alpha 1.5", "--loss dfpo-min --clip 0.1 0.1"])
def test_options_that_contradict_each_other_are_refused(flags, capsys):
    assert flags.split()[0] in refused(capsys, *flags.split())


def test_a_folder_that_is_no_run_is_not_resumed_and_stays_as_it_is(folder, finished, capsys, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    before = (model / "config.json").read_bytes()
    assert "not that of a run" in refused(capsys, "--resume", model)
    assert (model / "config.json").read_bytes() == before
    assert "done already" in refused(capsys, "--resume", finished, "--steps", "1")


def judged(monkeypatch, only=False):
    """Let all data be two prompts, each with a rubric that a judge must decide, and perhaps others."""
    comma, judged = rtt.make_rubric("punctuation:no_comma", {}), rtt.Rubric(rtt.JUDGED, {}, "is kind")
    rubrics = [judged] if only else [comma, judged]
    tasks = [rtt.Task("Tell.", rubrics), rtt.Task("Tell me a story.", rubrics[::-1])]
    monkeypatch.setattr(rtt, "load_tasks", lambda path, split="train": tasks)


def test_a_judge_that_is_not_the_policy_decides_in_training_and_in_measuring(
    folder, tokenizer, data, tmp_path, monkeypatch
):
    judged(monkeypatch)
    tiny_model(1, len(tokenizer), eos_token_id=2).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    judges, relevance, real, group_advantages = [], [], rtt.judge_yes, rtt.group_advantages
    monkeypatch.setattr(rtt, "judge_yes", lambda judge, *args: judges.append(judge) or real(judge, *args))
    keep = lambda *args: relevance.append(args[2]) or group_advantages(*args)
    monkeypatch.setattr(rtt, "group_advantages", keep)
    flags = "--relevance", "evidence", "--reward", "csr", "--eval-every", "1"
    train(folder, data, tmp_path / "self", *flags)
    start = weights_of(folder)
    own = {judge.model for judge in judges}
    assert len(own) == 1 and close(parameters(*own), start, 0)  # the starting policy, two steps later, too
    train(folder, data, tmp_path / "other", *flags, "--judge", str(tmp_path / "judge"))
    [other] = {judge.model for judge in judges} - own
    assert close(parameters(other), weights_of(tmp_path / "judge"), 0)
    assert all(0 <= w.min() and w.max() <= 1 for w in relevance)
    for w in relevance:  # of one prompt the second rubric is the judge's, of the other the first
        order = [1, 0] if w[:4, 0].any() or w[4:, 1].any() else [0, 1]
        assert not w[:4, order[0]].any() and not w[4:, order[1]].any()
    for record in read(tmp_path / "other" / "responses.jsonl"):
        given = {rubric["id"]: rubric["evidence"] for rubric in record["rubrics"]}
        assert given[rtt.JUDGED] is None or not record["response"].strip()
        assert isinstance(given["punctuation:no_comma"], list)


def parameters(model):
    return torch.cat([w.flatten() for name, w in sorted(model.state_dict().items())])


def test_a_run_whose_verdicts_are_all_judged_goes_on_though_there_is_nothing_to_learn_from(
    folder, data, tmp_path, monkeypatch
):
    judged(monkeypatch, only=True)
    for row in train(folder, data, tmp_path / "run"):
        assert math.isfinite(row["loss"]) and row["f1"] == 0 and row["auroc"] == 0.5


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


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_discriminator_computes_in_the_dtype_and_the_judge_is_loaded_in_it(
    name, folder, data, monkeypatch
):
    judged(monkeypatch)
    args = rtt.parse_args(["--model", str(folder), "--device", "cpu", "--dtype", name])
    models, dtype, seen = rtt.load_models(rtt.load_tasks(data), args), getattr(torch, name), []
    learner = models.discriminator
    for module in (learner.base.layers[-1].mlp, learner.model["head"]):
        module.register_forward_hook(lambda module, inputs, result: seen.append(result.dtype))
    ids, mask = responses()
    relevance = learner.predict([["a"]] * 6, ids, mask)
    learner.fit([["a"]] * 6, ids, mask, (ids == 77).float()[:, None])
    assert seen == [dtype] * 4 and relevance.dtype == torch.float32
    assert {w.dtype for w in models.judge.model.parameters()} == {dtype}
    for model in (models.policy.model, learner.model):
        assert {w.dtype for w in model.parameters()} == {torch.float32}


def test_gradient_checkpointing_changes_no_number(folder, data, tmp_path, monkeypatch):
    shared, real = [], rtt.token_logprobs
    monkeypatch.setattr(rtt, "token_logprobs", lambda *args: shared.append(args[5]) or real(*args))
    kept = train(folder, data, tmp_path / "kept", "--lr", "0.01")
    again = train(folder, data, tmp_path / "again", "--lr", "0.01", "--gradient-checkpointing")
    assert shared == [4, 4, 1, 1]
    for a, b in zip(kept, again):
        for name in a.keys() - {"seconds"}:
            assert name.startswith(("seconds", "tokens_per", "peak")) or close(b[name], a[name], 1e-3), name


def test_eval_only_measures_and_writes_down_every_response(folder, data, tmp_path, capsys):
    before = sorted(folder.iterdir())
    flags = ["--model", str(folder), "--eval-only", "--max-new-tokens", "24", "--prompts", "2"]
    rtt.main([*flags, "--data", str(data / "eval.jsonl"), "--out", str(tmp_path / "run")])
    said, result = capsys.readouterr().out, json.loads((tmp_path / "run" / "result.json").read_text())
    written = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert written == ["config.json", "responses.jsonl", "result.json"]
    records, tasks = read(tmp_path / "run" / "responses.jsonl"), rtt.load_tasks(data, "eval")
    assert [record["prompt"] for record in records] == [task.prompt for task in tasks] and len(tasks) == 5
    evidence, every, hits, total = 0, 0, 0, 0
    for record, task in zip(records, tasks):
        assert isinstance(record["response"], str) and isinstance(record["truncated"], bool)
        for rubric, kept in zip(task.rubrics, record["rubrics"], strict=True):
            satisfied, spans = rtt.verify(rubric, record["response"], task.prompt)
            expected = dict(id=rubric.id, criterion=rubric.criterion, satisfied=satisfied)
            assert kept == expected | dict(evidence=[list(span) for span in spans])
            evidence, hits, total = evidence + len(spans), hits + satisfied, total + 1
        every += all(rubric["satisfied"] for rubric in record["rubrics"])
    assert evidence > 3 and result["rubric"] == pytest.approx(hits / total)
    assert result["instruction"] == every / 5 and result["prompts"] == 5
    assert result["truncated"] == sum(record["truncated"] for record in records) / 5
    assert all(name in said for name in ("instruction level", "rubric level", *result["kinds"]))
    rtt.main([*flags, "--data", str(data), "--out", str(tmp_path / "folder")])  # a folder: its eval.jsonl
    for file in ("result.json", "responses.jsonl"):
        assert (tmp_path / "folder" / file).read_bytes() == (tmp_path / "run" / file).read_bytes()
    assert sorted(folder.iterdir()) == before


def test_a_bare_name_of_a_qwen_is_a_model_of_the_hub_unless_there_is_such_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen3-0.6B").mkdir()
    names = [("Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"), ("Qwen3-0.6B", str(tmp_path / "Qwen3-0.6B"))]
    for name, full in [*names, *[(name, name) for name in ("org/Qwen2", "gpt2", "./Qwen2")]]:
        args = rtt.parse_args(["--model", name, "--judge", name, "--discriminator", name])
        assert [args.model, args.judge, args.discriminator] == [full] * 3


@pytest.mark.parametrize("flag", ["--model", "--discriminator"])
def test_a_model_that_cannot_be_had_is_one_line_that_says_what_needs_no_download(
    flag, folder, data, tmp_path, capsys
):
    other = ["--data", data, *([] if flag == "--model" else ["--model", folder])]
    said = refused(capsys, *other, flag, "Qwen2.5-none", "--out", tmp_path / "run")
    assert f"{flag} Qwen/Qwen2.5-none" in said and "python rtt.py" in said and "no download" in said
    assert not (tmp_path / "run").exists()


def test_the_defaults_are_the_embedded_models_or_those_of_any_other(tmp_path, monkeypatch):
    embedded, other = rtt.parse_args([]), rtt.parse_args(["--model", "org/name"])
    assert Path(embedded.model).resolve() == HERE / "data" / "tiny"
    assert Path(embedded.data).resolve() == HERE / "data" / "stories"
    assert Path(other.data).resolve() == HERE / "data" / "instructions"
    differ = {name for name, value in vars(embedded).items() if getattr(other, name) != value}
    assert differ == {"model", "data", *rtt.OTHER_MODELS}
    assert all(getattr(other, name) == value for name, value in rtt.OTHER_MODELS.items())
    flags = "--model org/name --lr 0.5 --data x --no-gradient-checkpointing"
    given = rtt.parse_args(flags.split())
    assert (given.lr, given.data, given.gradient_checkpointing) == (0.5, "x", False)
    monkeypatch.chdir(HERE / "data")
    assert rtt.parse_args(["--model", "tiny"]).lr == embedded.lr  # the same folder by another name


def test_prompts_that_the_processes_cannot_share_equally_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(rtt, "WORLD", 2)
    said = refused(capsys, "--prompts", "3", "--out", tmp_path / "run")
    assert "--prompts 3" in said and "2 processes" in said


# --------------------------------------------------------------------------------------------------
# Interruptions: whatever stops a run, --resume ends it as if nothing had happened


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    rtt.write_whole(path, "old")

    def torn(value, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", torn)
        with pytest.raises(OSError):
            rtt.write_whole(path, {"new": 1})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    rtt.write_whole(path, {"new": 1})
    assert torch.load(path) == {"new": 1} and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_keeps_the_random_numbers_of_every_process(folder, tmp_path, monkeypatch):
    policy = policy_of(folder)
    models = rtt.Models(policy, torch.optim.Adam(policy.model.parameters()), None, None, None)
    states = [torch.manual_seed(seed).get_state() for seed in (1, 0)]
    monkeypatch.setattr(rtt, "gather", lambda state: [state, states[0]])
    rtt.save_checkpoint(tmp_path, models, 1, None)
    for rank, state in enumerate(states[::-1]):
        torch.manual_seed(2)
        monkeypatch.setattr(rtt, "RANK", rank)
        assert rtt.load_checkpoint(tmp_path, models) == (1, None)
        assert torch.equal(torch.get_rng_state(), state)


def test_ctrl_c_in_another_process_ends_this_one_after_the_same_step(folder, data, tmp_path, monkeypatch):
    other = lambda value: [value, 1] if type(value) is int else [value]  # the number of its Ctrl-C
    monkeypatch.setattr(rtt, "gather", other)
    with pytest.raises(SystemExit) as left:
        train(folder, data, tmp_path / "run", "--alpha", "0")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert left.value.code == 130 and len(read(tmp_path / "run" / "metrics.jsonl")) == 1
    assert [path.name for path in (tmp_path / "run").glob("*.pt")] == ["checkpoint-000001.pt"]


def test_ctrl_c_ends_the_program_at_once_before_and_after_the_loop(folder, data, tmp_path, monkeypatch):
    seen, default = [], signal.default_int_handler
    for name in ("evaluate", "train_step", "summary"):
        handler = lambda: seen.append(signal.getsignal(signal.SIGINT))
        monkeypatch.setattr(rtt, name, lambda *args, real=getattr(rtt, name): handler() or real(*args))
    signal.signal(signal.SIGINT, default)
    train(folder, data, tmp_path / "run", "--alpha", "0", "--eval-every", "0")
    assert [handler is default for handler in seen] == [True, False, False, True, True]
    assert signal.getsignal(signal.SIGINT) is default


def test_a_second_ctrl_c_ends_the_program_within_the_step(folder, data, tmp_path, monkeypatch, capsys):
    interrupt, real = lambda: os.kill(os.getpid(), signal.SIGINT), rtt.train_step
    monkeypatch.setattr(rtt, "train_step", lambda *args: interrupt() or interrupt() or real(*args))
    with pytest.raises(SystemExit) as left:
        train(folder, data, tmp_path / "run", "--alpha", "0")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert left.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


# Runs in processes of their own, forked off one that has everything imported and was unbroken: each is the
# command line, and what goes wrong in it; then the same resumed.
# Prints {name: [[status, output, files], ...]}.
RUNS = r"""
import contextlib, io, json, os, resource, signal, socket, sys
import rtt, torch
root, flags, LOG = sys.argv[1], sys.argv[2:], "/metrics.jsonl"

def fork(argv, trouble=None, rank=0, world=1):
    log = f"{root}/log{rank}"
    if pid := os.fork():
        return pid, log
    signal.alarm(60)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1), os.dup2(stream, 2)
    rtt.RANK, rtt.WORLD = rank, world
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=PORT, RANK=str(rank), WORLD_SIZE=str(world))
    status = 0
    try:
        trouble and trouble(argv[argv.index("--resume" if "--resume" in argv else "--out") + 1])
        rtt.main(argv)
    except SystemExit as left:
        status = left.code
    except BaseException as error:
        print("TRACEBACK", repr(error))
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)

def end(pid, log, out=None):
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, open(log).read(), sorted(os.listdir(out)) if out else None

def before_call(module, name, number, action):
    "Do something just before a function is called for the n-th time."
    real, calls = getattr(module, name), []
    def patched(*args, **kwargs):
        calls.append(0)
        if len(calls) == number:
            action(*args)
        return real(*args, **kwargs)
    setattr(module, name, patched)

kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
interrupt = lambda *_: os.kill(os.getpid(), signal.SIGINT)
step = lambda number, action: lambda out: before_call(rtt, "train_step", number, action)

def full_disk(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def half_checkpoint(value, file):
    whole = io.BytesIO()
    real_save(value, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    kill()

def half_line(out):
    real = json.dumps
    def dumps(value, **options):
        text = real(value, **options)
        if isinstance(value, dict) and value.get("step") == 4:
            with open(out + LOG, "a") as file:
                file.write(text[: len(text) // 2])
            kill()
        return text
    json.dumps = dumps

real_save = torch.save
TROUBLES = {
    "killed in the warm-up": lambda out: before_call(rtt.RelevanceDiscriminator, "fit", 2, kill),
    "killed before the first checkpoint": step(2, kill),
    "killed between checkpoints": step(4, kill),
    "killed while it saves": lambda out: before_call(torch, "save", 2, half_checkpoint),
    "killed while it logs": half_line,
    "killed after the last step": lambda out: before_call(rtt, "summary", 1, kill),
    "interrupted": step(3, interrupt),
    "interrupted twice": step(3, interrupt),
    "full disk, metrics": lambda out: step(4, lambda *_: full_disk(os.path.getsize(out + LOG) + 9))(out),
    "full disk, checkpoint": step(4, lambda *_: full_disk(100_000)),
    "full disk, policy": lambda out: before_call(rtt, "summary", 1, lambda *_: full_disk(100_000)),
    "fewer steps": None,
}
results = {}
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    PORT = str(free.getsockname()[1])
torch.set_num_threads(1)  # a process with threads cannot be forked
with contextlib.redirect_stdout(io.StringIO()):
    rtt.main([*flags, "--out", f"{root}/unbroken"])
results["unbroken"] = [(0, "", sorted(os.listdir(f"{root}/unbroken")))]
for name, trouble in TROUBLES.items():
    out = f"{root}/{name}"
    fewer = ["--steps", "3"] if name == "fewer steps" else []
    results[name] = [end(*fork([*flags, "--out", out, *fewer], trouble), out)]
    if name == "interrupted twice":
        results[name][0] = end(*fork(["--resume", out], step(1, interrupt)), out)
    results[name].append(end(*fork(["--resume", out, *(["--steps", "5"] if fewer else [])]), out))
flags += "--reward csr --partition verdict --updates 2 --kl 0.1".split()
for relevance in ("evidence", "discriminator"):
    for name, world in (f"one {relevance}", 1), (f"two {relevance}", 2):
        argv = [*flags, "--relevance", relevance, "--out", f"{root}/{name}"]
        results[name] = [end(*child) for child in [fork(argv, None, rank, world) for rank in range(world)]]
print(json.dumps(results))
"""
STOPPED = "killed in the warm-up", "killed before the first checkpoint", "killed between checkpoints"
STOPPED += "killed while it saves", "killed while it logs", "killed after the last step"
STOPPED += "interrupted", "interrupted twice", "fewer steps"
STOPPED += "full disk, metrics", "full disk, checkpoint", "full disk, policy"


@pytest.fixture(scope="session")
def runs(folder, data, tmp_path_factory):
    """The folder of all RUNS, and what became of them: {name: [(status, output, files), ...]}."""
    root = tmp_path_factory.mktemp("runs")
    flags = "--steps 5 --save-every 2 --group-size 2 --max-new-tokens 8 --prompts 2 --warmup 1 --eval-every 0"
    argv = ["--model", str(folder), "--data", str(data), *flags.split(), *EMBEDDED, "--show-every", "0"]
    command = [sys.executable, "-c", RUNS, str(root), *argv]
    no_gpu = os.environ | dict(CUDA_VISIBLE_DEVICES="")  # which no fork could use
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=300, env=no_gpu)
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


def untimed(path):
    """The lines of a metrics.jsonl without what no two runs share."""
    timed = ("seconds", "tokens_per_second", "peak")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read(path)]


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(name, runs):
    root, results = runs
    (status, said, files), (resumed, said_then, _) = results[name]
    assert resumed == 0, said_then
    assert untimed(root / name / "metrics.jsonl") == untimed(root / "unbroken" / "metrics.jsonl")
    for file in ("policy/model.safetensors", "result.json", "responses.jsonl"):
        assert (root / name / file).read_bytes() == (root / "unbroken" / file).read_bytes(), file
    kept = sorted(path.name for path in (root / name).glob("checkpoint*"))
    assert kept == ["checkpoint-000004.pt", "checkpoint-000005.pt"]
    expected = -9 if "killed" in name else 2 if "disk" in name else 130 if "interrupted" in name else 0
    assert status == expected and "TRACEBACK" not in said, said


def test_checkpoints_are_written_every_so_many_steps_and_two_are_kept(runs):
    _, results = runs
    kept = lambda name: [int(file[11:17]) for file in results[name][0][2] if file.startswith("checkpoint")]
    assert kept("unbroken") == [4, 5] and kept("killed before the first checkpoint") == []
    assert kept("killed between checkpoints") == [2] and kept("interrupted") == [2, 3]
    assert kept("interrupted twice") == [3, 4]
    assert kept("full disk, checkpoint") == [2] and kept("fewer steps") == [2, 3]


@pytest.mark.parametrize("name", [name for name in STOPPED if "disk" in name])
def test_a_full_disk_is_one_line(name, runs):
    status, said, files = runs[1][name][0]
    [line] = [line for line in said.splitlines() if line.startswith("rtt.py: ")]
    assert status == 2 and "File too large" in line and "--resume" in line
    assert "Traceback" not in said and not any(file.endswith(".new") for file in files)


def test_ctrl_c_ends_after_a_whole_step_and_says_how_to_go_on(runs):
    root, results = runs
    status, said, _ = results["interrupted"][0]
    assert status == 130 and said.splitlines()[-1].endswith(f"--resume {root / 'interrupted'}")
    assert "Traceback" not in said


def weights_of(folder):
    return torch.cat([w.flatten() for _, w in sorted(load_file(folder / "model.safetensors").items())])


@pytest.mark.parametrize("relevance", ["evidence", "discriminator"])
def test_two_processes_do_what_one_does(relevance, runs, folder):
    (root, results), names = runs, (f"one {relevance}", f"two {relevance}")
    for name in names:
        assert [status for status, _, _ in results[name]] == [0] * len(results[name]), results[name]
    one, two = (read(root / name / "metrics.jsonl") for name in names)
    assert len(one) == len(two) == 5 and any(row["reward"] > 0 and abs(row["loss"]) > 1e-3 for row in one)
    for a, b in zip(one, two):
        for field in ("reward", "loss", "grad_norm", "tokens", "truncated", "approx_kl"):
            assert b[field] == pytest.approx(a[field], rel=1e-3, abs=1e-6), field
    start = weights_of(folder)
    a, b = (weights_of(root / name / "policy") for name in names)
    assert (a - b).abs().mean() < 1e-3 * (a - start).abs().mean()
    file = "responses.jsonl"
    assert (root / names[1] / file).read_bytes() == (root / names[0] / file).read_bytes()
    one, two = (json.loads((root / name / "result.json").read_text()) for name in names)
    for a, b in (one["before"], two["before"]), (one["after"], two["after"]):
        assert a.pop("kinds") == b.pop("kinds") and b == pytest.approx(a, rel=1e-3)
    assert results[names[1]][1][1] == "" != results[names[1]][0][1]  # one of them speaks
    if relevance == "discriminator":
        paths = [root / names[n] / f"checkpoint-00000{step}.pt" for n, step in ((0, 4), (0, 5), (1, 5))]
        learners = [torch.load(path)["discriminator"] for path in paths]
        start, a, b = (torch.cat([w.flatten() for w in learner.values()]) for learner in learners)
        assert (a - b).abs().mean() < 1e-3 * (a - start).abs().mean()


def test_a_process_that_dies_ends_the_whole_run_under_torchrun(folder, data, tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--model", str(folder), "--data", str(data), "--out", str(tmp_path / "run"), *SMALL, *EMBEDDED]
    command = [*start, str(HERE / "rtt.py"), *flags, "--steps", "100000", "--warmup", "0"]
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(command, stderr=log, stdout=log)
    try:
        metrics, limit = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.is_file() and metrics.stat().st_size):
            assert run.poll() is None and time.monotonic() < limit, (tmp_path / "log").read_text()
            time.sleep(0.1)
        workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[1]), signal.SIGKILL)
        assert run.wait(timeout=40) != 0
    finally:
        run.terminate()
    said = (tmp_path / "log").read_text()
    assert len(workers) == 2 and "rank" in said and workers[1] in said


@pytest.fixture(scope="session")
def finished(runs):
    return runs[0] / "unbroken"


@pytest.mark.parametrize("flags", ["--lr 1", "--seed 7", "--loss gspo", "--clip 0.1 0.1", "--prompts 1"])
def test_only_steps_may_change_when_a_run_is_resumed(flags, finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert f"--resume {finished}" in refused(capsys, "--resume", finished, *flags.split())
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_without_the_newest_checkpoint_the_one_before_counts(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("policy", "*-000005.pt"))
    rtt.main(["--resume", str(tmp_path / "run")])
    runs = (untimed(path / "metrics.jsonl") for path in (finished, tmp_path / "run"))
    for a, b in zip(*runs, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    assert close(weights_of(tmp_path / "run" / "policy"), weights_of(finished / "policy"), 1e-3)


@dataclass
class MakesFolder:
    path: Path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("damage", ["no folder", "no config", "config", "half", "empty", "code", "model"])
def test_what_cannot_be_resumed_is_one_line_and_stays_as_it_is(damage, finished, tmp_path, capsys):
    out = tmp_path / "run"
    if damage != "no folder":
        shutil.copytree(finished, out, ignore=shutil.ignore_patterns("policy"))
    newest, config = out / "checkpoint-000005.pt", out / "config.json"
    if damage == "no config":
        config.unlink()
    elif damage == "config":
        config.write_text(config.read_text()[:-20])
    elif damage == "half":
        newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "code":  # pickles can run some; this one would make a folder
        torch.save(MakesFolder(tmp_path / "made"), newest)
    elif damage == "model":
        state = torch.load(newest)
        del state["policy"]["model.norm.weight"]
        torch.save(state, newest)
    kept = {path: path.read_bytes() for path in out.glob("*.*")}
    said = refused(capsys, "--resume", out)
    assert not (tmp_path / "made").exists()
    assert str(out if damage in ("no folder", "no config", "config") else newest) in said
    assert {path: path.read_bytes() for path in out.glob("*.*")} == kept


# --------------------------------------------------------------------------------------------------
# Bad input: one line, status 2, nothing lost


def refused(capsys, *argv):
    """The one line that main prints before it leaves with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        rtt.main([str(arg) for arg in argv])
    err = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and err.startswith("rtt.py: ") and "\n" not in err
    return err


@pytest.mark.parametrize("row", ["not JSON", "unknown id", "missing kwarg", "number below 1", "no rubric"])
def test_bad_data_is_refused_before_a_model_is_loaded_or_a_run_opened(row, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(rtt, "load_policy", None)
    (tmp_path / "train.jsonl").write_bytes(as_line(ROW) + b"\n" + as_line(BAD_ROWS[row]))
    (tmp_path / "eval.jsonl").write_bytes(as_line(ROW))
    assert "train.jsonl:2: " in refused(capsys, "--data", tmp_path, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--group-size 1", "--group-size 1"),
        ("--group-size 0", "--group-size"),
        ("--steps 0", "--steps"),
        ("--steps many", "many"),
        ("--lr -1", "--lr"),
        ("--lr nan", "--lr"),
        ("--temperature 0", "--temperature"),
        ("--loss ppo", "--loss"),
        ("--partition group", "--partition"),
        ("--device none", "none"),
        ("--data /nowhere/tasks.jsonl", "/nowhere/tasks.jsonl"),
        ("--no-such-flag", "--no-such-flag"),
    ],
)
def test_bad_flags_are_refused_before_a_model_is_loaded(flags, says, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(rtt, "load_policy", None)
    assert says in refused(capsys, "--out", tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists()


def test_a_set_of_one_prompt_or_none_is_refused(capsys, tmp_path):
    (tmp_path / "one.jsonl").write_bytes(as_line(ROW))
    (tmp_path / "train.jsonl").touch()
    assert "one.jsonl" in refused(capsys, "--data", tmp_path / "one.jsonl", "--out", tmp_path / "run")
    assert "train.jsonl" in refused(capsys, "--data", tmp_path, "--out", tmp_path / "run")


@pytest.mark.parametrize("flag", ["--model", "--discriminator"])
@pytest.mark.parametrize("kind", ["missing", "empty", "no model", "no weights", "broken weights"])
def test_a_model_folder_that_is_none_is_refused_and_leaves_no_run(flag, kind, folder, data, capsys, tmp_path):
    bad = tmp_path / "bad"
    if kind != "missing":
        bad.mkdir()
    if kind == "no model":
        (bad / "config.json").write_text("{}")
    if kind in ("no weights", "broken weights"):
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (bad / name).write_bytes((folder / name).read_bytes())
    if kind == "broken weights":
        (bad / "model.safetensors").write_bytes(b"no weights")
    out = tmp_path / "run"
    good = [] if flag == "--model" else ["--model", folder]
    assert str(bad) in refused(capsys, *good, flag, bad, "--data", data, "--out", out)
    assert len(train(folder, data, out, "--relevance", "uniform")) == 2  # the same --out is still free


def test_weights_that_could_run_code_are_not_loaded(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save(policy_of(folder).model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(rtt.BadInput):
        policy_of(tmp_path)


@pytest.mark.parametrize("held", ["metrics.jsonl", "config.json", "policy/model.safetensors"])
def test_an_existing_run_or_model_is_never_written_to(held, folder, data, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(rtt, "load_policy", None)
    path = tmp_path / "run" / held
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    assert "--out" in refused(capsys, "--model", folder, "--data", data, "--out", tmp_path / "run")
    assert path.read_text() == "precious"
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == [path]


def test_an_out_that_cannot_be_written_is_refused(data, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(rtt, "load_policy", None)
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert str(out) in refused(capsys, "--data", data, "--out", out)
    assert (tmp_path / "file").read_text() == "precious"


# ==================================================================================================
# 10. Comparing
# ==================================================================================================


def test_an_interval_is_that_of_students_t():
    mean, half = rtt.interval([1.0, 2.0, 3.0, 4.0, 6.0])
    assert close(mean, 3.2) and close(half, 2.776 * math.sqrt(3.7) / math.sqrt(5), 5e-3)
    student = {2: 12.706, 3: 4.303, 4: 3.182, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # quantiles
    for n, t in student.items():
        values = [i % 3 for i in range(n)]
        assert close(rtt.interval(values)[1], t * torch.tensor(values).float().std() / math.sqrt(n), 5e-3)
    assert math.isnan(rtt.interval([1.0])[1]) and rtt.interval([2.0, 2.0]) == (2.0, 0.0)


def test_shuffled_relevance_is_the_same_credit_on_other_tokens_of_the_same_response():
    torch.manual_seed(0)
    mask = (torch.arange(9) < torch.tensor([9, 5, 1])[:, None]).long()  # [N, T]
    relevance = torch.rand(3, 2, 9) * mask[:, None]
    moved = rtt.shuffled(relevance, mask)
    for i, k in itertools.product(range(3), range(2)):
        assert moved[i, k].sort().values.equal(relevance[i, k].sort().values)
        assert not (moved[i, k] * (1 - mask[i])).any()
    assert not moved[0].equal(relevance[0]) and moved[2].equal(relevance[2])


def test_the_first_configuration_of_a_study_is_plain_grpo_and_the_default_is_verdict():
    assert rtt.grid(["a=0", "a=1"], ["", "b=2"]) == ["a=0", "a=0+b=2", "a=1", "a=1+b=2"]
    assert all(names[0].startswith("alpha=0") for names in rtt.STUDIES.values())
    assert rtt.parse_args([]).partition == "verdict" and rtt.parse_args([]).alpha == 0.5


@pytest.mark.parametrize("study", rtt.STUDIES)
def test_a_study_is_a_list_of_different_configurations_that_can_be_run(study):
    names = rtt.STUDIES[study]
    options = [[f"--{option}" for option in name.split("+")] for name in names]
    assert len({str(vars(rtt.parse_args(flags))) for flags in options}) == len(names)


def test_the_table_of_a_study_pairs_the_seeds():
    run = lambda level, goal: dict(
        instruction=level, rubric=90.0, goal=goal, entropy=0.5, residual=0.1, jitter=2.0, seconds=1.0
    )
    first, second = [run(50.0, 0.0), run(60.0, None)], [run(52.0, None), run(62.0, None)]
    lines = rtt.comparison(["base", "alpha=0"], [first, second]).splitlines()
    assert "55.0 ± 63.5" in lines[1] and "+0.0 ± 0.0" in lines[1] and "0 (1/2)" in lines[1]
    assert "+2.0 ± 0.0" in lines[2] and "never" in lines[2]  # the same gain with each seed: no spread


def test_what_a_run_comes_to(tmp_path):
    """The goal is interpolated where it was first reached; jitter leaves out the rise from the start."""
    level = lambda value: dict(instruction=value, rubric=value)
    (tmp_path / "config.json").write_text(json.dumps(dict(model=str(HERE / "data/tiny"), data="data", out="x")))
    (tmp_path / "result.json").write_text(json.dumps(dict(before=level(0.1), after=level(0.56))))
    rows = [dict(step=i + 1, entropy=i, residual=0.5, truncated=0.25, seconds=2.0) for i in range(40)]
    for step, value in ((10, 0.3), (20, 0.7), (30, 0.4)):
        rows[step - 1]["eval_instruction"] = value
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = rtt.outcome(tmp_path)
    assert close(found["goal"], 15.0) and close(found["jitter"], (40 + 30 + 16) / 3)
    assert close(found["entropy"], 34.5) and close(found["instruction"], 56.0) and found["residual"] == 0.5
    assert found["between"] == [[10 * i, 0.5, 10 * i - 5.5, 0.25] for i in range(1, 5)]
    assert found["curve"] == [(0, 0.1), (10, 0.3), (20, 0.7), (30, 0.4), (40, 0.56)]
    assert found["config"]["model"] == "data/tiny" and str(tmp_path) not in json.dumps(found)


def test_a_comparison_keeps_what_is_finished_and_resumes_what_is_not(data, tmp_path, capsys, monkeypatch):
    flags = ["--compare", "alpha=0,alpha=0+reward=csr", "--seeds", "1", "--out", tmp_path, "--data", data]
    flags += [*SMALL, "--steps", "2", "--eval-every", "1", "--eval-prompts", "2", "--save-every", "1"]
    rtt.main([str(flag) for flag in flags])
    first, second = (tmp_path / f"{name}+seed=0" for name in ("alpha=0", "alpha=0+reward=csr"))
    lines = [json.loads(line) for line in open(tmp_path / "results.jsonl")]
    assert [line["config"]["reward"] for line in lines] == ["aon", "csr"]
    assert [step for step, _ in lines[0]["curve"]] == [0, 1, 2]
    assert (tmp_path / "table.txt").read_text() in capsys.readouterr().out
    kept = (first / "result.json").stat().st_mtime_ns
    (second / "result.json").unlink()  # broken off at the very end
    rtt.main([str(flag) for flag in flags])
    assert (first / "result.json").stat().st_mtime_ns == kept and (second / "result.json").is_file()
    assert not list(tmp_path.glob("*/checkpoint-*"))
    assert "other settings" in refused(capsys, *flags, "--lr", "0.1")
    metrics = (first / "metrics.jsonl").read_text()
    assert "is finished" in refused(capsys, "--resume", first, "--steps", "3")  # its checkpoints are gone
    assert (first / "metrics.jsonl").read_text() == metrics


@pytest.mark.parametrize(
    "spec, flags, message",
    [
        ("loss=none", [], "--loss"),
        ("rttt", [], "--rttt"),
        ("base,", [], "'' is empty"),
        ("base,base", [], "named twice"),
        ("base,seed=7", [], "'seed=7'"),
        ("alpha=0+eval-only", [], "'alpha=0+eval-only'"),
        ("base", ["--eval-only"], "--eval-only"),
        ("base", ["--data", "/nowhere"], "/nowhere"),
        ("base", ["--rubrics", "9"], "--rubrics 9"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_run(spec, flags, message, tmp_path, capsys):
    out = tmp_path / "runs"
    assert message in refused(capsys, "--compare", spec, "--out", out, *flags)
    assert not out.exists()


def test_a_run_that_fails_ends_a_comparison_which_goes_on_later(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    names = ["alpha=0", "alpha=0+reward=csr", "alpha=0+lr=1e-5"]
    flags = ["--compare", ",".join(names), "--seeds", "1", "--out", tmp_path, "--data", data]
    flags += [*SMALL, "--steps", "1", "--eval-every", "0"]
    first, _, third = (tmp_path / f"{name}+seed=0" for name in names)
    first.mkdir()
    (first / "stray").touch()
    said = refused(capsys, *flags)
    assert f"{first}: --out" in said and "exit status 2" in said and not third.exists()
    (first / "stray").rename(first / "config.json")  # as Ctrl-C or a kill may leave it: nothing has begun
    rtt.main([str(flag) for flag in flags])
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("kind", ["evidence", "shuffled", "uniform"])
def test_the_relevance_that_was_asked_for_reaches_the_advantages(folder, data, tmp_path, monkeypatch, kind):
    used, found, graded, grade, advantages = [], [], [], rtt.grade, rtt.group_advantages
    monkeypatch.setattr(rtt, "shuffled", lambda relevance, mask: found.append(relevance) or relevance * 0.5)
    monkeypatch.setattr(rtt, "grade", lambda *args: graded.append(grade(*args)) or graded[-1])
    monkeypatch.setattr(rtt, "group_advantages", lambda *args: used.append(args[2]) or advantages(*args))
    train(folder, data, tmp_path / "run", "--relevance", kind, "--eval-every", "0")
    evidence = [e for _, _, e in graded if len(e) == 8]
    assert len(used) == len(evidence) == 2
    for relevance, e in zip(used, evidence):
        expected = dict(evidence=e, shuffled=e * 0.5, uniform=torch.ones_like(e))[kind]
        assert relevance.equal(expected) and len(found) == (2 if kind == "shuffled" else 0)


@pytest.mark.parametrize("partition, only_contested", [("intra", False), ("verdict", True)])
def test_relevance_is_predicted_where_it_counts(folder, data, tmp_path, monkeypatch, partition, only_contested):
    pairs, verdicts, predict, grade = [], [], rtt.RelevanceDiscriminator.predict, rtt.grade
    spy = lambda self, *args: pairs.append(args[3:]) or predict(self, *args)
    scored, score = [], rtt.scored_tokens
    monkeypatch.setattr(rtt, "scored_tokens", lambda *args: scored.append(args[2]) or score(*args))
    monkeypatch.setattr(rtt.RelevanceDiscriminator, "predict", spy)
    monkeypatch.setattr(rtt, "grade", lambda *args: verdicts.append(grade(*args)) or verdicts[-1])
    train(folder, data, tmp_path / "run", "--partition", partition, "--eval-every", "0")
    asked = [set(map(tuple, chosen[0])) for chosen in pairs if chosen]
    graded = [v for _, v, _ in verdicts if len(v) == 8]  # warm-up, then the two steps
    assert len(asked) == 2
    for found, counted in zip(asked, scored):  # f1 is of what was predicted
        assert found == set(map(tuple, counted.nonzero().tolist()))
    for found, v in zip(asked, graded[-2:]):
        groups, everything = v.view(2, 4, -1), set(map(tuple, v.nonzero().tolist()))
        mixed = {(i, k) for i, k in everything if len(groups[i // 4, :, k].unique()) > 1}
        assert found == (mixed if only_contested else everything)


def test_only_prompts_with_so_many_rubrics_are_used(folder, data, tmp_path, capsys):
    counts = [len(task.rubrics) for task in rtt.load_tasks(data, "eval")]
    flags = ["--model", folder, "--data", data, "--eval-only", "--max-new-tokens", 4, "--out", tmp_path / "run"]
    rtt.main([str(flag) for flag in [*flags, "--rubrics", counts[0]]])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["prompts"] == counts.count(counts[0])
    assert "--rubrics 9" in refused(capsys, *flags[:-1], tmp_path / "none", "--rubrics", 9)


@pytest.mark.parametrize("path", sorted((HERE / "data" / "results").iterdir()), ids=lambda path: path.stem)
def test_the_readme_shows_the_table_of_the_committed_results(path):
    runs = defaultdict(list)
    for line in open(path):
        result = json.loads(line)
        runs[result["config"]["out"].partition("+seed=")[0]].append(result)
    for name, results in runs.items():
        assert [result["config"]["seed"] for result in results] == list(range(len(results)))
        options = [option for option in name.split("+") if option != "base"]
        wanted = vars(rtt.parse_args([f"--{option}" for option in options]))
        for key in (option.partition("=")[0] for option in options):
            assert all(result["config"][key] == wanted[key] for result in results), name
    assert rtt.comparison(list(runs), list(runs.values())) in (HERE / "README.md").read_text()
