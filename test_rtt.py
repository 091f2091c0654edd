# SPDX-License-Identifier: MIT
"""Tests of rtt.py, in the order of its sections: slow obvious loops, finite differences, invariances.

G responses a prompt, N = prompts * G, K rubrics, T response tokens; symbols as in rtt.py's opening table.
Models are made here, tiny and with random weights; the tokenizer is that of data/tiny.
A test whose name begins with test_trap holds a mistake that was found in a real code base.
"""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, geometric_mean
from types import SimpleNamespace
from unittest.mock import Mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test waits for the hub
os.environ["OMP_NUM_THREADS"] = "1"  # equal runs need equal numbers of threads

import filelock
import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.rnn import pad_sequence
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel
from transformers import MambaConfig, MambaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import rtt

HERE = Path(__file__).resolve().parent

# test_trap_14: transformers moves; whatever will be gone in its next release is an error here.
pytestmark = pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")

LOSSES = ["grpo", "grpo-mask", "gspo", "grpo-fix", "dfpo-min", "dfpo-orth"]
PARTITIONS = ["intra", "inter", "rubric", "verdict"]


@pytest.fixture(autouse=True)
def equal_random_numbers_in_every_run():
    torch.manual_seed(0)


def assert_close(a, b, tolerance=1e-5):
    options = dict(atol=tolerance, rtol=tolerance, check_dtype=False)
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), **options)


# Models: random weights, large enough that the distributions are far from uniform.

END = 3  # the end tokens of the tiny models
OTHER_END = 4
SIZES = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(num_hidden_layers=2, initializer_range=0.3)


def qwen(vocab_size=23, seed=0, **options):
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab_size, **SIZES, **options)).eval()


def gpt2(vocab_size=23, seed=0):
    """Its positions are absolute, so a wrong position id shows (Qwen2's are relative). It has dropout."""
    torch.manual_seed(seed)
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **sizes)).eval()


def gemma3(vocab_size=23):
    """Every other layer sees the last 6 tokens only."""
    torch.manual_seed(0)
    layers = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=6, head_dim=8)
    layers |= dict(vocab_size=vocab_size, tie_word_embeddings=False)
    return Gemma3ForCausalLM(Gemma3TextConfig(**layers, **SIZES)).eval()


MODELS = [qwen, gpt2, gemma3]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(HERE / "data" / "tiny")


@pytest.fixture(scope="session")
def folder(tokenizer, tmp_path_factory):
    """A model folder: random weights, data/tiny's tokenizer, dropout in its config, many end tokens."""
    path = tmp_path_factory.mktemp("model")
    ends = [tokenizer.eos_token_id, *range(1300, len(tokenizer))]  # so that responses differ in length
    model = qwen(len(tokenizer), attention_dropout=0.5, eos_token_id=ends)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def weights_of(model):
    return parameters_to_vector(model.parameters()).detach()


def flat_gradient(value, model):
    gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


# ======== 1. Rubrics =============================================================================
# For each id and its arguments, responses that satisfy it ("+"), violate it ("-") or need a judge ("?"), the
# evidence in brackets. An empty bracket at the end is the evidence of the end token. \n is a new line.
TABLE = r"""
judge {"criterion": "is {kind}"}
? Anything.
-  ⟦⟧
keywords:existence {"keywords": ["lamp", "key"]}
+ A ⟦LAMP⟧, two ⟦key⟧s, a c⟦lamp⟧.
- A lamp and no other.
keywords:forbidden_words {"forbidden_words": ["dog", "élan"]}
+ A hotdog and a doghouse.
- The ⟦Dog⟧'s ⟦dog⟧-house, 😀 ⟦Élan⟧
keywords:forbidden_words {"forbidden_words": ["C++", "$5", "#ad", "U.S.", "e.g.", "猫", "हि"]}
+ C+ $55 x#ads U.S ae.g. हिन्दी
- ⟦C++⟧ ⟦$5⟧ ⟦#ad⟧ ⟦U.S.⟧ ⟦e.g.⟧ 我喜欢⟦猫⟧咪 ⟦हि⟧
keywords:frequency {"keyword": "ow", "frequency": 2, "relation": "at least"}
+ The c⟦ow⟧, the ⟦OW⟧l.
- The cow.
keywords:frequency {"keyword": "ow", "frequency": 2, "relation": "less than"}
+ The cow.
- The cow, the ⟦ow⟧l, n⟦ow⟧.
keywords:letter_frequency {"letter": "T", "let_frequency": 2, "let_relation": "at least"}
+ ⟦T⟧o ge⟦t⟧
- To go
language:response_language {"language": "ru"}
? да 😀 ab
- да ⟦a⟧⟦b⟧⟦c⟧
language:response_language {"language": "bn"}
+ ⟦ন⟧⟦ম⟧⟦স⟧⟦্⟧⟦ত⟧⟦ে⟧ abcdef
language:response_language {"language": "ja"}
+ ⟦東⟧⟦京⟧⟦へ⟧
- 东京
length_constraints:number_sentences {"num_sentences": 2, "relation": "at least"}
+ "One⟦.⟧" Two⟦!?⟧
+ One⟦.⟧ Two⟦⟧
- In 3.50 no more of rtt.py⟦⟧
length_constraints:number_sentences {"num_sentences": 2, "relation": "less than"}
+ Only one!⟦⟧
- One. Two⟦.⟧ Three⟦⟧
length_constraints:number_words {"num_words": 3, "relation": "at least"}
+ one two_2 drei⟦⟧
- ... one, -- two !⟦⟧
- हिन्दी state-of-the-art 👨‍👩‍👧‍👦 ❤️⟦⟧
+ the.fox and⟦⟧
length_constraints:number_paragraphs {"num_paragraphs": 2}
+ One\n⟦***⟧\nTwo
- One\n\nTwo
- One *** Two ⟦***⟧ Three ⟦***⟧ Four
- One *** ⟦***⟧ Two
length_constraints:nth_paragraph_first_word {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "x"}
+ One.⟦\n\n⟧⟦X⟧, two.⟦\n\n⟧Three.
- One.\n\n⟦Two⟧.\n\nThree.
- One.\n\nx\n\nThree.⟦\n\n⟧Four.
detectable_content:number_placeholders {"num_placeholders": 2}
+ Dear ⟦[name]⟧, ⟦[[x]⟧] and [
- Dear [name], [so\nlong] (
detectable_content:postscript {"postscript_marker": "P.S."}
+ Bye. ⟦p. s.⟧ see you
- Bye. PS: see you
detectable_format:constrained_response {}
+ Well. ⟦My answer is maybe.⟧
- my answer is yes. My answer is No.
detectable_format:number_bullet_lists {"num_bullets": 2}
+ So:\n⟦*⟧ a\n  ⟦-⟧ b\n** no bullet **
- * a\nnot * this - one
- * a\n- b\n⟦*⟧ c\n⟦-⟧ d
detectable_format:number_highlighted_sections {"num_highlights": 2}
+ A ⟦*⟧b⟦*⟧ and ⟦**⟧c d⟦**⟧
- *a* * * ** ** *b\nc*
detectable_format:multiple_sections {"section_spliter": "SECTION", "num_sections": 2}
+ ⟦SECTION 1⟧: a ⟦SECTION2⟧
- Section 1 SECTION 2 SECTION X
detectable_format:json_format {}
+  ```json\n⟦{⟧"a": [1, "b"]⟦}⟧\n```\n
- ⟦S⟧ure: {}
- {"a": ⟦⟧
detectable_format:title {}
+ ⟦<<The Lamp>>⟧\nOnce
- <<>>\n<< >>\n<<The\nLamp>>
combination:two_responses {}
+ One ⟦******⟧ Two
- One *** Two
- One ****** Two ⟦******⟧ Three
- Same ****** ⟦Same⟧\n
combination:repeat_prompt {"prompt_to_repeat": " Say \"hi\". "}
+ ⟦SAY "hi".⟧ Hi.
- Say ⟦h⟧i. Say "hi".
- Say⟦⟧
startend:end_checker {"end_phrase": "The End."}
+ So. ⟦the end.⟧
+ İİ "⟦The End.⟧"\n
- The end. Or not.⟦⟧
startend:quotation {}
+  ⟦"⟧She said "yes"⟦"⟧\n
- ⟦S⟧he said "yes"
- "⟦⟧
change_case:capital_word_frequency {"capital_frequency": 2, "capital_relation": "at least"}
+ ⟦X-RAY⟧ at (⟦NASA⟧), Pa3, ⟦U.S.A⟧.
- x-ray 123 NASA Aa 灯
change_case:capital_word_frequency {"capital_frequency": 2, "capital_relation": "less than"}
+ x-ray 123 NASA Aa 灯
- X-RAY at (⟦NASA⟧), Pa3
change_case:english_capital {}
+ ALL LARGE, 灯 😀 İ
- A⟦l⟧⟦ß⟧ ⟦ǅ⟧ B
- ⟦Д⟧⟦А⟧ A
- 123 !
change_case:english_lowercase {}
+ all small, ß 灯 😀
- ⟦A⟧ll ⟦İ⟧
- ⟦д⟧⟦а⟧ ⟦灯⟧ ab
- 123 !
punctuation:no_comma {}
+ One; two、three.
- One⟦,⟧ two⟦,⟧⟦,⟧
"""


def read_table():
    """TABLE -> a list of (rubric, text, verdict)."""
    cases = []
    for line in TABLE.strip().splitlines():
        first, _, rest = line.partition(" ")
        if first in ("+", "-", "?"):
            marked = rest.replace(r"\n", "\n")
            evidence = []
            for n, match in enumerate(re.finditer("⟦(.*?)⟧", marked, re.DOTALL)):
                start = match.start() - 2 * n  # without the brackets before it
                evidence.append((start, start + len(match[1])))
            satisfied = {"+": True, "-": False, "?": None}[first]
            cases.append((rubric, re.sub("[⟦⟧]", "", marked), rtt.Verdict(satisfied, evidence)))
        else:
            rubric = rtt.Rubric(first, json.loads(rest), "")
    return cases


CASES = read_table()
NO_COMMA = rtt.Rubric("punctuation:no_comma", {}, "do not use commas")
ROW = dict(prompt="Tell a story.", instruction_id_list=["punctuation:no_comma"], kwargs=[{}])
# Pieces that verifiers stumble over, and what they look for.
PIECES = [
    *("lamp ", "KEY", "Dog", "ow", "The End.", "a", "Z", ",", "Mr. ", "! ", "...", '"', "p. s.", "P.P.S"),
    *("<<", ">>", "<<a>>", "\n* ", "\n- ", "\n", " ", "İ", "é", "灯", "😀", "e\u0301", "\u200d", "\ufffd"),
    *("***", "******", "*", "\n\n", "x", "[", "]", "[a]", "SECTION 1", "3", "'s ", "{", "}", "[1]", "\0"),
    *("```json\n", "```", "My answer is no.", 'Say "hi".', "東", "へ", "привет ", "नमस्ते "),
]


def test_every_verifier_has_cases_of_both_verdicts():
    covered = {(rubric.id, verdict.satisfied) for rubric, _, verdict in CASES}
    for rubric_id in rtt.VERIFIERS:
        assert {(rubric_id, rubric_id != rtt.JUDGED or None), (rubric_id, False)} <= covered
    assert {rubric_id for rubric_id, satisfied in covered if satisfied is None} == set(rtt.MAY_NEED_JUDGE)


@pytest.mark.parametrize("rubric, example, verdict", CASES)
def test_evidence_is_that_of_the_table_and_removing_it_ends_a_satisfied_verdict(rubric, example, verdict):
    assert rtt.verify(rubric, example) == verdict
    rng = random.Random(0)
    for _ in range(100):
        text = "".join(rng.choices([*PIECES, example], k=rng.randint(0, 12)))
        satisfied, evidence = rtt.verify(rubric, text)
        assert type(satisfied) is bool or satisfied is None and rubric.id in rtt.MAY_NEED_JUDGE
        assert evidence == sorted(evidence)
        letters = list(text)
        to_the_end = False  # then only a longer response could flip the verdict
        for start, end in evidence:
            assert 0 <= start <= end <= len(text)
            letters[start:end] = "\0" * (end - start)
            to_the_end = to_the_end or start == end
        # A sentence without its full stop goes on with the next.
        if satisfied and evidence and not to_the_end and "sentences" not in rubric.id:
            assert not rtt.verify(rubric, "".join(letters)).satisfied


@pytest.mark.parametrize("thought", ["<think>\nOkay, go.\n</think>\n\n", "<think>a</think> b, </think>"])
def test_trap_16_a_thought_is_not_judged_and_evidence_counts_from_its_beginning(thought):
    n = len(thought)
    assert rtt.verify(NO_COMMA, thought + "Hi.") == (True, [])
    assert rtt.verify(NO_COMMA, thought + "Hi, you.") == (False, [(n + 2, n + 3)])
    for still_open in ("<think>\nOkay", "<think>a</think>  "):
        assert rtt.verify(NO_COMMA, still_open) == (False, [(len(still_open), len(still_open))])


def test_trap_13_rows_as_ifeval_ships_them_load_and_no_code_in_them_runs(tmp_path, monkeypatch):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    row = dict(ROW, key=1, rubrics=["is {kind}"], functions=[code])
    row["instruction_id_list"] = ["length_constraints:number_words", "punctuation:no_comma"]
    row["kwargs"] = [dict(num_words=3.0, relation="at least", keywords=None, func=code), None]
    rtt.write_rows(tmp_path / "train.jsonl", [row, row])
    tasks = rtt.load_tasks(tmp_path)
    words, no_comma, kind = tasks[1].rubrics
    assert words.criterion == "write at least 3 words"
    assert repr(words.kwargs) == "{'num_words': 3, 'relation': 'at least'}"
    assert no_comma == NO_COMMA
    assert kind == rtt.Rubric(rtt.JUDGED, dict(criterion="is {kind}"), "is {kind}")
    assert not rtt.verify(NO_COMMA, code).satisfied
    assert not (tmp_path / "ran").exists()
    source = (HERE / "rtt.py").read_text(encoding="utf-8")
    assert not re.search(r"(?<![.\w])(eval|exec)\(|trust_remote_code=True|import pickle", source)
    assert rtt.load_tasks(tmp_path / "train.jsonl") == tasks
    assert rtt.load_data(rtt.Config(data=str(tmp_path / "train.jsonl"), eval_only=True)) == ([], tasks)
    of_hub = Mock(return_value=[row])
    monkeypatch.setattr("datasets.load_dataset", of_hub)
    assert rtt.load_tasks("google/IFEval") == tasks[:1]
    of_hub.assert_called_with("google/IFEval", split="train")


def row_of(rubric_id, **kwargs):
    return json.dumps(dict(ROW, instruction_id_list=[rubric_id], kwargs=[kwargs]))


SOME = dict(num_words=1, num_sentences=1, relation="less than")
LETTER = dict(letter="th", let_frequency=2, let_relation="at least")
PARAGRAPH = dict(num_paragraphs=3, nth_paragraph=5, first_word="x")
BAD_ROWS = [
    ("not a row", "[1]"),
    ("surrogates", r'{"prompt": "\ud800"}'),
    ("'prompt'", '{"prompt": " "}'),
    ("lists of one length", '{"prompt": "Go.", "instruction_id_list": ["punctuation:no_comma"]}'),
    ("no rubric", '{"prompt": "Go."}'),
    ("'rubrics', a list", '{"prompt": "Go.", "rubrics": "is kind"}'),
    ("'criterion' must be", '{"prompt": "Go.", "rubrics": [" "]}'),
    ("less than 1 word", row_of("length_constraints:number_words", **SOME)),
    ("less than 1 sentence", row_of("length_constraints:number_sentences", **SOME)),
    ("must be one character", row_of("keywords:letter_frequency", **LETTER)),
    ("no paragraph 5 of 3", row_of("length_constraints:nth_paragraph_first_word", **PARAGRAPH)),
    ("unknown instruction id", row_of("punctuation:none")),
    ("'keywords' must be a list", row_of("keywords:existence", keywords=["a", ""])),
    ("'num_bullets' must be", row_of("detectable_format:number_bullet_lists", num_bullets=True)),
    ("not 1.5", row_of("detectable_format:number_bullet_lists", num_bullets=1.5)),
    ("must be one of en, es", row_of("language:response_language", language="xx")),
]


@pytest.mark.parametrize("reason, line", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(reason, line, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}")
    with pytest.raises(rtt.BadInput) as error:
        rtt.load_tasks(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert reason in str(error.value)


# ======== 2. Rollouts ============================================================================
PROMPTS = [[5, 6], [7, 8, 9, 10, 11, 12, 13], [14]]


def roll(model, prompts=PROMPTS, G=4, T=12, temperature=1.0, pad=0, seeds=(0, 1, 2)):
    return rtt.sample(model, prompts, G, T, temperature, (END, OTHER_END), pad, list(seeds))


def responses_of(rollout):
    """(prompt, response without padding) of each of the N rows."""
    G = len(rollout.ids) // len(rollout.prompts)
    responses = [ids[:n].tolist() for ids, n in zip(rollout.ids, rollout.mask.sum(1))]
    return [(rollout.prompts[i // G], response) for i, response in enumerate(responses)]


def plain_distributions(model, prompt, response, temperature):
    """No padding, cache or batch: log-probabilities [n, V] where the response's n tokens are predicted."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("make_model", MODELS)
@torch.no_grad()
def test_trap_7_trap_11_sampler_and_scorer_agree_with_plain_passes(make_model, temperature, monkeypatch):
    monkeypatch.setattr(rtt.chosen_logprobs, "__defaults__", (1.0, 5))  # chunks of 5 rows
    model = make_model().train()  # trap 11: with dropout, which must not reach the samples
    rollout = roll(model, temperature=temperature)
    T = rollout.ids.shape[1]
    prompt_ids, prompt_mask = rtt.left_padded(rollout.prompts, 0, "cpu")
    ids = torch.cat([prompt_ids.repeat_interleave(4, 0), rollout.ids], 1)
    attention = torch.cat([prompt_mask.repeat_interleave(4, 0), rollout.mask], 1)
    shared = rtt.token_logprobs(model, ids, attention, T, temperature, group_size=4)
    single = rtt.token_logprobs(model, ids, attention, T, temperature)
    assert shared.dtype == rollout.logprobs.dtype == torch.float32
    assert rollout.mask.sum(1).unique().numel() > 2  # ragged
    expected = torch.zeros(12, T)
    entropy = torch.zeros(12, T)
    for i, (prompt, response) in enumerate(responses_of(rollout)):
        n = len(response)
        logp = plain_distributions(model, prompt, response, temperature)
        expected[i, :n] = logp[range(n), response]
        entropy[i, :n] = -(logp.exp() * logp).sum(-1)
    for given in (rollout.logprobs, shared, single):
        assert_close(given, expected, 1e-4)
    assert_close(rollout.entropy, entropy, 1e-4)


@torch.no_grad()
def test_trap_7_samples_follow_the_softmax_at_that_temperature_whatever_the_generation_config_says():
    model = qwen()
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, repetition_penalty=9.0)
    G = 20_000
    rollout = roll(model, [[5, 6]], G, T=1, temperature=2.0, seeds=[0])
    share = rollout.ids[:, 0].bincount(minlength=23) / G
    p = plain_distributions(model, [5, 6], [0], 2.0)[0].exp()
    deviation = (p * (1 - p) / G).sqrt()
    assert ((share - p).abs() < 4 * deviation + 1e-4).all()
    assert rtt.draw(torch.tensor([[-math.inf, 0.0]]), torch.zeros(1)) == 1  # token 0 has no share


@pytest.mark.parametrize("pad", [0, END])
def test_trap_8_end_tokens_are_in_the_mask_and_the_pad_token_confuses_nothing(pad):
    rollout = roll(qwen(), G=16, pad=pad)
    ends = {END, OTHER_END}
    last = set()
    for i, (_, response) in enumerate(responses_of(rollout)):
        n = len(response)
        assert rollout.mask[i, :n].all()
        assert (rollout.ids[i, n:] == pad).all()
        assert not ends & set(response[:-1])
        assert rollout.truncated[i] == (response[-1] not in ends)
        assert n == 12 or not rollout.truncated[i]
        last.add(response[-1])
    assert ends < last
    assert rollout.truncated.any()


@pytest.mark.parametrize("make_model", MODELS)
def test_trap_9_samples_of_a_prompt_do_not_depend_on_the_rest_of_the_batch(make_model):
    model = make_model()
    batch = roll(model, seeds=[1, 2, 3])
    for p in range(3):
        alone = roll(model, [PROMPTS[p]], seeds=[1 + p])
        n = alone.ids.shape[1]
        assert alone.mask[:, -1].any()  # the length of the longest
        rows = range(4 * p, 4 * p + 4)
        assert alone.ids.equal(batch.ids[rows, :n])
        assert not batch.mask[rows, n:].any()
        assert_close(alone.logprobs, batch.logprobs[rows, :n])
    assert len(batch.ids.unique(dim=0)) > 8  # and differ within a group
    with pytest.raises(ValueError, match="as many seeds"):  # one a prompt, not one a response
        roll(model, seeds=range(12))


@pytest.mark.parametrize("prompt", [" 😀\n", "\nA <tag>", "<|im_start|>Go<|im_end|>", " <|im_end|>"])
@pytest.mark.parametrize("around", ["<|im_start|> $A", "<|im_start|> $A <|im_end|>"])
def test_trap_17_without_a_chat_template_what_reads_like_a_special_token_stays_text(around, prompt, folder):
    coder = AutoTokenizer.from_pretrained(folder, chat_template=None)
    specials = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    coder.backend_tokenizer.post_processor = processors.TemplateProcessing(around, None, specials)
    begin, *ids = rtt.encode_prompt(coder, prompt)
    assert begin == 1
    assert coder.decode(ids) == prompt  # some tokenizers end every text; a prompt goes on
    assert not set(ids) & set(coder.all_special_ids)


def test_trap_15_a_turn_ends_where_the_chat_template_ends_it_though_eos_is_another(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path)
    model = qwen(len(tokenizer), attention_dropout=0.5, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(tmp_path)
    policy = rtt.load_policy(tmp_path, rtt.Config(device="cpu"), torch.float32)
    assert policy.model.config.attention_dropout == 0  # trap 11
    assert policy.tokenizer.decode(policy.end_ids) == "<|endoftext|><|im_end|>"
    tokenizer.add_tokens(["<done>"])  # an added token, but not a special one
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }} :<done>\n{% endfor %}"
    assert tokenizer.decode(rtt.turn_end(tokenizer)) == "<done>"


def test_trap_16_thinking_is_switched_off_by_the_template_or_closed(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    opened = "{{ '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}"
    switched = "<|im_start|>assistant\n{{ '<think>\n\n</think>\n\n' if enable_thinking is false }}"
    for ending in (opened, switched):
        tokenizer.chat_template = turns + ending
        ids = rtt.encode_prompt(tokenizer, "Go.")
        assert tokenizer.decode(ids).endswith("assistant\n<think>\n\n</think>\n\n")


# ======== 3. Reward: characters to tokens, the judge, verdicts ===================================
def byte_tokens(tokenizer, text, rng):
    """A tokenization of the text that its tokenizer would never choose, down to single bytes."""
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    letters = "".join(piece for piece, _ in pieces)  # byte-level BPE: one letter of its alphabet a byte
    vocabulary = tokenizer.get_vocab()
    ids = []
    while letters:
        n = rng.choice([n for n in range(1, 6) if letters[:n] in vocabulary])
        ids.append(vocabulary[letters[:n]])
        letters = letters[n:]
    return ids


def test_trap_10_token_spans_are_the_characters_whose_bytes_a_token_holds(tokenizer):
    rng = random.Random(0)
    pieces = ["lamp", " and", " ", "a", "灯", "😀", "é", ",", " 😀", "👩‍🚀", "\n"]
    for _ in range(60):
        text = "".join(rng.choices(pieces, k=12))
        owner = [place for place, character in enumerate(text) for _ in character.encode()]  # of each byte
        ids = byte_tokens(tokenizer, text, rng)
        expected = []
        start = 0
        for token in tokenizer.convert_ids_to_tokens(ids):
            end = start + len(token)  # one letter a byte
            expected.append((owner[start], owner[end - 1] + 1))
            start = end
        assert rtt.token_spans(tokenizer, ids) == (text, expected)
    first, second, third = "".join(tokenizer.tokenize("灯"))
    cut_off = tokenizer.convert_tokens_to_ids(["a", first, second])  # by the length limit
    assert rtt.token_spans(tokenizer, cut_off) == ("a\ufffd", [(0, 1), (1, 2), (1, 2)])


def test_token_spans_of_a_sentencepiece_tokenizer():
    """As LLaMA's: a space is ▁ and is dropped before a text, unknown characters are bytes."""
    pieces = ["<unk>", "▁", "a"] + [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    llama = PreTrainedTokenizerFast(tokenizer_object=backend)
    spans = [(0, 1), (1, 2), *[(2, 3)] * 3]  # 灯 is three bytes
    assert rtt.token_spans(llama, llama(" a灯").input_ids) == (" a灯", spans)


@torch.no_grad()
def test_the_judge_is_as_sure_as_one_forward_pass_a_question_says(tokenizer):
    judge = rtt.Policy(gpt2(len(tokenizer)), tokenizer, [2])
    questions = ["Is it kind?", "A fox, 😀, and then " * 5, "x", "The end. " * 9, "A" + "😀" * 400 + "Z"]
    expected = []
    for question in questions:
        ids = rtt.encode_prompt(tokenizer, question)[-512:]  # its context: the beginning is lost
        p = judge.model(torch.tensor([ids])).logits[0, -1].softmax(0)
        chances = []
        for words in (["yes", "Yes", " yes", " Yes"], ["no", "No", " no", " No"]):
            first = {ids[0] for ids in tokenizer(words).input_ids}
            chances.append(float(p[list(first)].sum()))
        expected.append(chances[0] / sum(chances))
    assert len(set(expected)) == 5
    assert_close(rtt.judge_yes(judge, questions, batch=3), expected)


def grade(tokenizer, responses, ended, tasks, judge=None):
    """rtt.grade of responses given as token ids; the end token is added where ended."""
    rows = []
    for ids, end in zip(responses, ended):
        rows.append(torch.tensor(ids + [tokenizer.eos_token_id] * end, dtype=torch.long))
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    rollout = rtt.Rollout(None, ids, mask, None, None, ~torch.tensor(ended))
    return rtt.grade(tokenizer, rollout, tasks, judge)


def test_trap_10_grade_marks_every_token_of_a_split_character_and_no_other_without_encoding_again(tokenizer):
    rng = random.Random(2)
    lamp = byte_tokens(tokenizer, "😀", rng)
    rest = byte_tokens(tokenizer, " One, two.", rng)
    existence = rtt.Rubric("keywords:existence", dict(keywords=["😀"]), "")
    words = rtt.Rubric("length_constraints:number_words", dict(num_words=3, relation="at least"), "")
    tasks = [rtt.Task("p", [existence, words]), rtt.Task("q", [NO_COMMA])]
    texts, found, verdicts, evidence = grade(tokenizer, [lamp + rest] * 2, [True, False], tasks)
    assert len(lamp) > 1
    assert texts == ["😀 One, two."] * 2
    assert found == [[(True, [(0, 1)]), (False, [(11, 11)])], [(False, [(5, 6)])]]
    assert verdicts.tolist() == [[1, -1], [-1, 0]]
    at_lamp = [1] * len(lamp) + [0] * len(rest)
    at_comma = ["," in tokenizer.decode([i]) for i in lamp + rest]
    nowhere = [0] * len(at_comma)
    assert evidence[0].tolist() == [at_lamp + [0], nowhere + [1]]  # the end token: too few words
    assert evidence[1, 0].tolist() == at_comma + [0]
    assert evidence[1, 1].isnan().all()  # no such rubric


def test_the_judge_decides_what_no_rule_can_without_evidence(tokenizer, monkeypatch):
    def judge_yes(judge, questions):
        criteria = ["respond entirely in German", "is kind"]
        assert questions == [rtt.QUESTION.format("Tell.", "A lamp, a key.", text) for text in criteria]
        return torch.tensor([0.1, 0.9])

    monkeypatch.setattr(rtt, "judge_yes", judge_yes)
    german = rtt.make_rubric("language:response_language", dict(language="de"))  # letters that others share
    kind = rtt.make_rubric(rtt.JUDGED, dict(criterion="is kind"))
    task = rtt.Task("Tell.", [NO_COMMA, german, kind])
    ids = tokenizer("Hm.</think> A lamp, a key.").input_ids  # an empty response satisfies nothing
    _, found, verdicts, evidence = grade(tokenizer, [ids, []], [True, True], [task], "judge")
    assert verdicts.tolist() == [[-1, -1, 1], [-1, -1, -1]]
    assert found[0] == [(False, [(18, 19)]), (False, None), (True, None)]
    assert evidence[0, 1:].isnan().all()
    assert evidence[0, 0].sum() == 1  # the comma
    assert not evidence[1].isnan().any()


def test_response_reward_counts_only_rubrics_that_exist():
    verdicts = torch.tensor([[1, 1, 1], [1, -1, 0], [1, 0, 0], [-1, -1, -1]])
    assert rtt.response_reward(verdicts).tolist() == [1, 0, 1, 0]
    assert rtt.response_reward(verdicts, "csr").tolist() == [1, 0.5, 1, 0]
    with pytest.raises(ValueError, match="not Booleans"):  # False would count as "no such rubric"
        rtt.response_reward(verdicts > 0)


# ======== 4. Relevance ===========================================================================
@pytest.fixture
def discriminator(tokenizer):
    """Of a model with absolute positions and, in training mode, dropout."""
    return rtt.RelevanceDiscriminator(gpt2(len(tokenizer)).base_model.train(), tokenizer, 1e-2)


def random_responses():
    """Six tasks of a response each: tasks, verdicts [N, K], ids and mask [N, T]."""
    criteria = ["find it", "a much longer criterion, with many more words", "b"]
    tasks = [rtt.Task("", [rtt.Rubric("", {}, text) for text in criteria[:K]]) for K in (3, 1, 2)] * 2
    verdicts = torch.tensor([[1, -1, 1], [-1, 0, 0], [1, 1, 0], [1, 1, -1], [1, 0, 0], [-1, 1, 0]])
    mask = (torch.arange(9) < torch.randint(1, 10, (6, 1))).long()
    return tasks, verdicts, torch.randint(70, 80, (6, 9)), mask


def plain_relevance(discriminator, tasks, verdicts, ids, mask, i, k):
    """Of response i's tokens for rubric k, alone and without padding."""
    n = int(mask[i].sum())
    answer = "yes" if verdicts[i, k] == 1 else "no"
    text = f"{answer}: {tasks[i].rubrics[k].criterion}\n"
    return discriminator([text], ids[i : i + 1, :n], mask[i : i + 1, :n])[0].sigmoid()


def test_relevance_is_0_where_nothing_is_and_does_not_depend_on_the_batch(discriminator):
    tasks, verdicts, ids, mask = case = random_responses()
    together = discriminator.predict(*case)
    garbage = torch.where(mask > 0, ids, 5)
    assert_close(discriminator.predict(tasks, verdicts, garbage, mask, batch=2), together)
    expected = torch.zeros(6, 3, 9)
    for i, k in verdicts.nonzero().tolist():
        expected[i, k, : int(mask[i].sum())] = plain_relevance(discriminator, *case, i, k)
    assert_close(together, expected)


def test_fit_is_one_step_on_the_mean_cross_entropy_of_tokens_whose_evidence_is_known(discriminator):
    """The weights move by lr * gradient of a slow, unpadded mean."""
    torch.nn.init.normal_(discriminator.head.weight)  # large, so that there is something to clip
    case = random_responses()
    evidence = (torch.rand(6, 3, 9) < 0.3).float()
    evidence[[0, 2, 5], [1, 1, 0]] = math.nan  # a judge's verdicts
    discriminator.eval()
    entropies = []
    for i, k in (~evidence.isnan().all(2) & (case[1] != 0)).nonzero().tolist():
        p = plain_relevance(discriminator, *case, i, k)
        entropies.append(-torch.where(evidence[i, k, : len(p)] == 1, p, 1 - p).log())
    gradient = flat_gradient(torch.cat(entropies).mean(), discriminator)
    before = weights_of(discriminator)
    discriminator.optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.5)
    discriminator.train()
    discriminator.fit(*case, evidence, batch=2)
    after = weights_of(discriminator)
    assert gradient.norm() > 1
    assert_close(after, before - 0.5 * gradient / gradient.norm(), 1e-4)  # clipped to norm 1
    discriminator.fit(*case, evidence * math.nan)
    assert weights_of(discriminator).equal(after)


def test_shuffled_relevance_is_the_evidence_on_other_tokens_of_the_same_response():
    rollout = SimpleNamespace(mask=(torch.arange(8) < torch.arange(1, 41)[:, None]).long())  # 1 to 8 tokens
    columns = torch.arange(1.0, 9) * rollout.mask  # [N, T]
    evidence = torch.stack([columns, -columns], 1)
    moved, _ = rtt.token_relevance(None, [], rollout, None, evidence, rtt.Config(relevance="shuffled"))
    assert moved[:, 1].equal(-moved[:, 0])  # the rubrics of a response together
    assert moved[:, 0].sort().values.equal(columns.sort().values)
    assert not moved[:, 0][rollout.mask == 0].any()
    assert len(moved[7:, 0].unique(dim=0)) > 30


# ======== 5. Advantages ==========================================================================
def normalize(x, eps=0.1):
    return (x - x.mean()) / (x.std(correction=0) + eps)


def slow_token_advantage(verdicts, relevance, mask, partition):
    """The definition of the partitions: verdicts [G, K], relevance [G, K, T], mask [G, T] -> [G, T]."""
    G, K, T = relevance.shape
    reward = verdicts[..., None] * relevance
    real = mask > 0
    total = torch.zeros(G, T)
    for k in range(K):
        signs = normalize(verdicts[:, k].float())
        if partition == "inter":
            total[real] += normalize(reward[:, k][real])
        for i in range(G):
            if partition == "intra":
                total[i, real[i]] += normalize(reward[i, k, real[i]])
            elif partition == "verdict":
                total[i, real[i]] += signs[i] * relevance[i, k, real[i]]
    if partition == "rubric":
        total[real] = K * normalize(reward.mean(1)[real])
    return total / K


@pytest.mark.parametrize("partition", PARTITIONS)
def test_trap_1_trap_2_trap_6_partitions_against_loops_with_1_2_and_7_rubrics(partition):
    """RTT's release reshapes [G, K, T] to [K, G, T] and puts relevance into the verdicts' integer tensor."""
    for K in (1, 2, 7):
        verdicts = torch.randint(2, (4, K)) * 2 - 1
        relevance = torch.rand(4, K, 6)
        mask = (torch.arange(6) < torch.tensor([[6], [1], [4], [3]])).long()
        expected = slow_token_advantage(verdicts, relevance, mask, partition)
        padded_verdicts = torch.zeros(4, 7, dtype=torch.long)  # in a batch K is that of the longest
        padded_verdicts[:, :K] = verdicts
        garbage = torch.full((4, 7, 6), math.nan)
        garbage[:, :K] = relevance.masked_fill(mask[:, None] == 0, math.nan)
        assert_close(rtt.token_advantage(padded_verdicts, garbage, mask, partition), expected)
        assert_close(rtt.token_advantage(verdicts.double(), relevance, mask > 0, partition), expected)
    with pytest.raises(ValueError, match="relevance \\[G, K, T\\]"):  # [G, T] would be spread over the responses
        rtt.token_advantage(verdicts, relevance[:, 0], mask, partition)


def test_trap_3_equal_rewards_give_exactly_0_and_the_noise_of_a_relevance_that_sees_nothing_stays_small():
    rewards = torch.tensor([[1.0, 0.0, 0.25] + [1.0] * 4, [0.1] * 7, [0.7] * 7, [9.0] + [1.0] * 6])  # [P, G]
    advantages = rtt.response_advantage(rewards)
    assert_close(advantages[[0, 3]], torch.stack([normalize(group, 1e-6) for group in rewards[[0, 3]]]))
    assert not advantages[[1, 2]].any()  # 7 * 0.1 / 7 is not 0.1 in float32
    assert rtt.response_advantage(torch.tensor([0.7])) == 0  # a group of 1
    noise = 0.01 + 0.01 * torch.randn(4, 1, 40)
    found = (torch.arange(40) == 7).float().expand(4, 1, 40)  # one relevant token of 40
    agree = torch.ones(4, 1)
    mask = torch.ones(4, 40)
    assert rtt.token_advantage(agree, noise, mask, "intra", eps=1e-6).std() > 0.4  # what it would be
    assert rtt.token_advantage(agree, noise, mask, "intra").std() < 0.1
    assert rtt.token_advantage(agree, found, mask, "intra")[:, 7].min() > 3


# ======== 6. Exchangeability =====================================================================
def test_min_replace_gives_the_minimum_and_adv_orthogonal_cancels_and_moves_no_more_than_it_must():
    assert rtt.min_replace(torch.tensor([[3, 1, 2], [5, 6, 4]])).tolist() == [[1, 1, 1], [4, 4, 4]]
    w = torch.rand(5, 8) + 0.5
    adv = torch.randn(5, 8)
    new = rtt.adv_orthogonal(w, adv)
    assert_close((adv * new).sum(1), torch.zeros(5))
    for moved, direction in zip(new - w, adv):  # along the advantages and nowhere else
        assert_close(moved, (moved @ direction) / (direction @ direction) * direction)
    assert rtt.adv_orthogonal(w.half(), 0 * adv.half()).equal(w.half().float())


def slow_residual(coef, ids, mask):
    """The learning tax: the tokens that all responses share, one after the other."""
    tax = 0.0
    push = 0.0
    for token in ids.unique():
        places = (ids == token) & (mask > 0)  # [G, T]
        if places.any(1).all():
            means = [float(of_response[here].mean()) for of_response, here in zip(coef, places)]
            tax += abs(sum(means))
            push += sum(map(abs, means))
    return tax / push if push else 0.0


def test_cancellation_residual_against_a_loop():
    for _ in range(20):
        ids = torch.randint(50, 56, (3, 8))
        coef = torch.randn(3, 8)
        mask = torch.randint(2, (3, 8))
        assert_close(rtt.cancellation_residual(coef, ids, mask), slow_residual(coef, ids, mask))
    assert math.isnan(rtt.cancellation_residual(coef * math.nan, ids, mask))


# ======== 7. The update ==========================================================================
def loss_case(spread=0.4):
    """logprobs, old, advantages constant in each response, mask: [8, 5]; ratios far from 1."""
    old = -3 * torch.rand(8, 5).double()
    logprobs = old + spread * torch.randn(8, 5).double()
    A = torch.randn(2, 4, 1).double()
    A = A - A.mean(1, keepdim=True)
    mask = (torch.arange(5) < torch.randint(1, 6, (8, 1))).long()
    return logprobs.requires_grad_(), old, A.view(8, 1) * mask, mask


def slow_weights(ratio, advantages, mask, loss, low, high):
    """The table of the losses for one group, a token after the other: [G, T] each."""
    n = mask.sum(1).tolist()
    s = [geometric_mean(row[:length].tolist()) for row, length in zip(ratio, n)]
    m = [fmean(row[:length].tolist()) for row, length in zip(advantages, n)]
    along = sum(a * x for a, x in zip(m, s)) / sum(a * a for a in m)
    clipped = s if loss.startswith("dfpo") else ratio[mask > 0].tolist()
    group_inside = min(clipped) >= 1 - low and max(clipped) <= 1 + high
    weights = torch.zeros_like(ratio)
    for i, t in mask.nonzero().tolist():
        own = s[i] if loss == "gspo" else float(ratio[i, t])
        # PPO: the gradient is dead only where the clip makes the objective smaller.
        dead = own > 1 + high if advantages[i, t] > 0 else own < 1 - low
        if loss == "grpo":
            weights[i, t] = 0 if dead else own
        elif loss == "grpo-mask":
            weights[i, t] = own if 1 - low <= own <= 1 + high else 0
        elif loss == "gspo":
            weights[i, t] = 0 if dead else own / n[i]
        elif not group_inside:
            weights[i, t] = 0
        elif loss == "grpo-fix":
            weights[i, t] = min(max(own, 0.8), 1.2)
        elif loss == "dfpo-min":
            weights[i, t] = min(s)
        elif loss == "dfpo-orth":
            weights[i, t] = s[i] - along * m[i]
    return weights


@pytest.mark.parametrize("token_level", [0.0, 0.3])
# What leaves the first range: tokens of each group, not all responses; the second, less; the last, nothing.
@pytest.mark.parametrize("clip", [(0.2, 0.3), (0.35, 0.6), (1.0, math.inf)])
@pytest.mark.parametrize("loss", LOSSES)
def test_policy_weights_are_the_table_of_the_losses_and_the_gradient_is_minus_c(loss, clip, token_level):
    logprobs, old, advantages, mask = loss_case(spread=0.2)
    advantages += token_level * torch.randn(mask.shape) * mask
    groups = zip((logprobs - old).detach().exp().split(4), advantages.split(4), mask.split(4))
    expected = torch.cat([slow_weights(*group, loss, *clip) for group in groups])
    advantages.requires_grad_()  # as of a relevance that is being learned
    weights = rtt.policy_weights(logprobs, old, advantages, mask, 4, loss, clip)
    assert_close(weights, expected)
    assert not weights.requires_grad
    denominator = len(mask) if loss == "gspo" else int(mask.sum())
    (-(weights * logprobs * advantages).sum() / denominator).backward()
    assert_close(logprobs.grad, -expected * advantages / denominator)


def test_a_loss_that_is_unknown_and_shapes_other_than_whole_groups_of_rows_are_refused():
    for shape, G, loss in (((4, 5), 3, "grpo"), ((2, 2, 5), 2, "grpo"), ((4, 5), 2, "ppo")):
        with pytest.raises(ValueError, match="multiple of group_size, and a loss of grpo, grpo-mask"):
            rtt.policy_weights(*[torch.zeros(shape)] * 4, G, loss)


@pytest.mark.parametrize("garbage", [-math.inf, math.nan, 1e30, -1e30])
@pytest.mark.parametrize("loss", LOSSES)
def test_padding_may_hold_anything(loss, garbage):
    *clean, mask = loss_case()
    mask[0] = 0  # not one token
    weights = rtt.policy_weights(*clean, mask, 4, loss, (0.9, 9.0))
    assert ((weights != 0) == (mask > 0)).all()
    for spoiled in ([0], [1], [2], [0, 1, 2]):
        given = list(clean)
        for place in spoiled:
            given[place] = clean[place].masked_fill(mask == 0, garbage)
        assert rtt.policy_weights(*given, mask, 4, loss, (0.9, 9.0)).equal(weights)


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
@pytest.mark.parametrize("A", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.5])
def test_trap_4_weight_times_advantage_is_the_slope_of_ppos_objective(loss, A, ratio):
    """At the first of three tokens of one ratio, for both signs of A and on both sides of the range."""
    start = math.log(ratio)

    def objective(moved):
        own = math.exp(moved if loss == "grpo" else (moved + 2 * start) / 3)
        return min(own * A, min(max(own, 1 - 0.2), 1 + 0.3) * A)

    slope = (objective(start + 1e-6) - objective(start - 1e-6)) / 2e-6
    moved = torch.full((1, 3), start).double()
    mask = torch.ones(1, 3)
    weights = rtt.policy_weights(moved, 0 * moved, A * mask, mask, 1, loss, (0.2, 0.3))
    assert weights[0, 0] * A == pytest.approx(slope, abs=1e-6)


def test_trap_5_k3_is_the_kl_on_average_and_never_negative():
    p, q = torch.randn(2, 7, dtype=torch.float64).log_softmax(1)
    kl = (p.exp() * (p - q)).sum()  # KL(p || q)
    assert_close((p.exp() * rtt.k3(p, q)).sum(), kl, 1e-9)  # tokens sampled from p
    small = torch.linspace(-1e-3, 1e-3, 1001)  # float32, where exp(d) - d - 1 is rounding
    assert_close(rtt.k3(0, small) * 1e6, small.square() / 2 * 1e6, 1e-2)
    assert (rtt.k3(0, small) >= 0).all()


def off_policy_rollout(model):
    """Three groups, one of them short, their log-probs perturbed as if the policy had moved; advantages."""
    rollout = roll(model, temperature=1.3)
    rollout.mask[8:, 7:] = 0
    rollout.logprobs += 0.2 * torch.randn(rollout.mask.shape)
    rollout.logprobs *= rollout.mask
    advantages = torch.randn(12, 1) * rollout.mask
    advantages[:4] = 0  # equal rewards
    return rollout, advantages


def updated(model, *given):
    """The weights after rtt.update with plain SGD at learning rate 1, and its statistics."""
    stats = rtt.update(model, torch.optim.SGD(model.parameters(), 1.0), *given)
    return weights_of(model), stats


def slowly_updated(model, rollout, advantages, config, reference):
    """The same by forward passes of one row without padding, and loops."""
    mask = rollout.mask
    old = rollout.logprobs
    totals = dict.fromkeys(["clip_fraction", "approx_kl", "grad_norm", "residual"], 0.0)
    for _ in range(config.updates):
        logprobs = torch.zeros(mask.shape)
        anchors = torch.zeros(mask.shape)  # the reference's
        for i, (prompt, response) in enumerate(responses_of(rollout)):
            n = len(response)
            logprobs[i, :n] = plain_distributions(model, prompt, response, 1.3)[range(n), response]
            anchors[i, :n] = plain_distributions(reference, prompt, response, 1.3)[range(n), response]
        away = anchors.detach() - logprobs
        penalty = (away.exp() - away - 1).sum() / mask.sum()  # a mean over tokens for each loss
        weights = rtt.policy_weights(logprobs, old, advantages, mask, 4, config.loss, config.clip)
        denominator = len(mask) if config.loss == "gspo" else mask.sum()
        value = -(weights * logprobs * advantages).sum() / denominator
        gradient = flat_gradient(value + config.kl * penalty, model)
        groups = zip((weights * advantages).split(4), rollout.ids.split(4), mask.split(4))
        totals["residual"] += fmean(slow_residual(*group) for group in groups if group[0].any())
        totals["clip_fraction"] += float((weights == 0)[mask > 0].float().mean())
        moved = (logprobs - old).detach()
        totals["approx_kl"] += float((moved.exp() - moved - 1).sum() / mask.sum())
        totals["grad_norm"] += float(gradient.norm())
        step = gradient * min(1, config.max_grad_norm / gradient.norm())
        vector_to_parameters(weights_of(model) - step, model.parameters())
    return weights_of(model), {name: total / config.updates for name, total in totals.items()}


@pytest.mark.parametrize("kl", [0.0, 0.2])
@pytest.mark.parametrize("loss", LOSSES)
def test_trap_5_trap_11_trap_12_update_is_that_of_plain_forward_passes_in_any_micro_batches(loss, kl):
    """Without dropout. Two steps: the second weighs its tokens against the sampler, too."""
    model = gpt2()
    start = weights_of(model)
    reference = gpt2(seed=1)
    rollout, advantages = off_policy_rollout(model)
    clip = [0.15, 0.2] if loss == "gspo" else [0.4, 0.6]
    options = dict(loss=loss, clip=clip, kl=kl, updates=2, max_grad_norm=0.02)
    config = rtt.Config(device="cpu", dtype="float32", group_size=4, temperature=1.3, **options)
    expected, stats = slowly_updated(model, rollout, advantages, config, reference)
    size = (expected - start).norm()
    for micro_batch, checkpointing in ((1, False), (2, True), (9, False)):
        model = gpt2().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        config = replace(config, micro_batch=micro_batch, gradient_checkpointing=checkpointing)
        weights, means = updated(model, rollout, advantages, config, reference if kl else None)
        assert_close((weights - start) / size, (expected - start) / size, 1e-4)
        assert means == pytest.approx(stats, rel=1e-3, abs=1e-5)


# ---- The cancellation condition (TGC): the responses of a group share four tokens, then diverge

IDS = torch.arange(48).view(4, 12)
IDS[:, :4] = IDS[0, :4]
MASK = (torch.arange(12) < torch.tensor([[12], [6], [9], [7]])).long()
A = torch.tensor([[1.5], [-0.5], [-0.5], [-0.5]])


def learning_tax(loss, shared_ratio, spread=0.5, clip=(1.0, math.inf)):
    """Shared tokens have one ratio, for their context is the same; after them the ratios differ."""
    log_ratio = spread * torch.randn(4, 12)
    log_ratio[:, :4] = math.log(shared_ratio)
    weights = rtt.policy_weights(log_ratio, 0 * log_ratio, A * MASK, MASK, 4, loss, clip)
    assert weights[:, :4].any()  # there is something to cancel
    return slow_residual(A * weights, IDS, MASK)


def test_shared_tokens_cancel_under_the_papers_losses_and_pay_under_gspo_and_a_clip_of_one_sign():
    for loss in ("grpo-fix", "dfpo-min", "dfpo-orth"):
        for shared_ratio in (0.5, 1.1, 2.0):
            assert learning_tax(loss, shared_ratio) < 1e-5
        for shared_ratio in (0.801, 1.199):  # just inside the group clip
            assert learning_tax(loss, shared_ratio, 0.02, (0.2, 0.2)) < 1e-5
    assert learning_tax("gspo", 1.1) > 0.05  # each response has its own weight,
    assert learning_tax("gspo", 1.0, spread=0.0) > 0.05  # and its own length
    assert learning_tax("grpo", 1.1, clip=(0.2, 0.2)) < 1e-5  # inside the range
    assert learning_tax("grpo", 0.5, clip=(0.2, 0.2)) > 0.05
    assert learning_tax("grpo", 2.0, clip=(0.2, 0.2)) > 0.05
    assert learning_tax("grpo-mask", 1.1, clip=(0.2, 0.2)) < 1e-5  # takes both


@pytest.mark.parametrize("partition", PARTITIONS)
def test_only_verdict_cancels_where_verdicts_do_not_balance(partition):
    relevance = torch.rand(4, 1, 12)
    relevance[:, :, :4] = relevance[0, :, :4]  # as a causal reader's
    unbalanced = torch.tensor([[1], [1], [1], [-1]])
    tax = slow_residual(rtt.token_advantage(unbalanced, relevance, MASK, partition), IDS, MASK)
    assert tax < 1e-5 if partition == "verdict" else tax > 0.05
    agree = torch.ones(4, 1)  # there is nothing to learn
    agreeing = rtt.token_advantage(agree, relevance, MASK, partition, eps=0)
    assert agreeing.any() == (partition != "verdict")


# ======== 8. The loop: whole runs ================================================================
def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A few prompts of data/stories, with one more rubric, for the judge."""
    path = tmp_path_factory.mktemp("data")
    for name, count in (("train.jsonl", 6), ("eval.jsonl", 5)):
        rows = read(HERE / "data" / "stories" / name)[:count]
        rtt.write_rows(path / name, [dict(row, rubrics=["is kind"]) for row in rows])
    return path


SMALL = "--steps 2 --prompts 2 --group-size 4 --max-new-tokens 12 --warmup 1 --device cpu --lr 3e-4 "
SMALL += "--discriminator-lr 1e-3 --micro-batch 4 --no-gradient-checkpointing "
LONGER = "--steps 4 --eval-every 2 --reward csr --partition intra"  # in which all relevance counts
KILLED = """
import os, sys, rtt
real = rtt.step_tasks
def step_tasks(tasks, step, config):
    if step == 4:  # after the checkpoint of step 2 and the metrics of step 3
        os.kill(os.getpid(), 9)
    return real(tasks, step, config)
rtt.step_tasks = step_tasks
rtt.main(sys.argv[1:])
"""
MINE = '''
from rtt import counted, spans, verifier
VOWELS = "[aeiou]"
@verifier("mine:vowels")
def vowels(text, number: int):
    """use {number} vowels"""
    return counted(spans(VOWELS, text), "at least", number)
'''


def small_run(folder, data, out, flags=""):
    """The command line of a small run."""
    return ["--model", str(folder), "--data", str(data), "--out", str(out), *(SMALL + flags).split()]


def python(*command, cwd=HERE):
    """A process of its own."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def spy(monkeypatch, name, owner=rtt):
    """The calls of a function from now on: pairs of its arguments and its result."""
    calls = []
    real = getattr(owner, name)

    def noted(*args, **kwargs):
        calls.append((args, real(*args, **kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, noted)
    return calls


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("relevance", ["discriminator", "evidence"])
def test_a_step_is_the_opening_picture(relevance, partition, folder, data, tmp_path, monkeypatch):
    """Sampled, graded, rewarded, credited: what reaches `update`, and the metrics, by slow loops."""
    graded = spy(monkeypatch, "grade")
    updates = spy(monkeypatch, "update")
    asked = spy(monkeypatch, "predict", rtt.RelevanceDiscriminator)
    learned = spy(monkeypatch, "fit", rtt.RelevanceDiscriminator)
    flags = f"--reward csr --alpha 0.3 --relevance {relevance} --partition {partition}"
    flags += " --steps 1 --discriminator-lr 1e-9"  # which does not learn yet to say no everywhere
    rtt.main(small_run(folder, data, tmp_path / "run", flags))
    [row] = read(tmp_path / "run" / "metrics.jsonl")
    [((_, _, rollout, advantages, *_), _)] = updates
    [(_, _, verdicts, evidence)] = [grades for args, grades in graded if args[1] is rollout]
    credit = evidence.nan_to_num()
    if relevance == "discriminator":
        [((_, _, wanted, *_), credit)] = asked
        for group, answers in zip(verdicts.split(4), wanted.split(4)):
            for column, answer in zip(group.T.tolist(), answers.T.tolist()):
                agree = partition == "verdict" and len(set(column)) == 1
                assert answer == ([0] * 4 if agree else column)
        known = (wanted[..., None] != 0) & (rollout.mask[:, None] > 0) & ~evidence.isnan()
        relevant = evidence[known] == 1
        predicted = credit[known] > 0.5
        both = float((relevant & predicted).sum())
        assert both > 0
        assert row["f1"] == pytest.approx(2 * both / float(relevant.sum() + predicted.sum()))
        assert learned[-1][0][-1] is evidence
        assert len(learned) == 4 + 1  # the warm-up's, and the step's
    shares = [given.count(1) / (given.count(1) + given.count(-1)) for given in verdicts.tolist()]
    rewards = torch.tensor(shares).view(2, 4)
    response = rtt.response_advantage(rewards).view(8, 1) * rollout.mask
    groups = zip(verdicts.split(4), credit.split(4), rollout.mask.split(4))
    token = 0.3 * torch.cat([rtt.token_advantage(*group, partition) for group in groups])
    assert (rollout.mask == 0).any() and token.any()
    assert_close(advantages, response + token)
    assert row["token_share"] == pytest.approx(float(token.abs().sum() / response.abs().sum()))
    assert row["reward"] == pytest.approx(fmean(shares))
    assert row["instruction"] == fmean(share == 1 for share in shares)
    assert row["rubric"] == pytest.approx(float((verdicts == 1).sum() / (verdicts != 0).sum()))
    assert row["zero_variance"] == fmean(len(set(part)) == 1 for part in (shares[:4], shares[4:]))
    assert row["entropy"] == pytest.approx(float(rollout.entropy[rollout.mask > 0].mean()))


@pytest.fixture(scope="session")
def finished(folder, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    rtt.main(small_run(folder, data, out, LONGER))
    return out


def test_a_run_writes_down_what_it_did_and_its_policy_is_an_ordinary_folder(
    finished, folder, data, tmp_path, monkeypatch
):
    result = json.loads((finished / "result.json").read_text())
    rows = read(finished / "metrics.jsonl")
    records = read(finished / "responses.jsonl")
    assert {"grad_norm", "clip_fraction", "approx_kl", "seconds_rollout"} <= rows[3].keys()
    assert [record["prompt"] for record in records] == [row["prompt"] for row in read(data / "eval.jsonl")]
    shares = dict(instruction=[], rubric=[], truncated=[])
    for record in records:
        shares["instruction"].append(all(rubric["satisfied"] for rubric in record["rubrics"]))
        shares["truncated"].append(record["truncated"])
        for rubric in record["rubrics"]:
            shares["rubric"].append(rubric["satisfied"])
            shares.setdefault(rubric["id"], []).append(rubric["satisfied"])
    assert result["after"] == {name: fmean(values) for name, values in shares.items()}
    loaded = spy(monkeypatch, "load_policy")
    rtt.main(small_run(finished / "policy", data, tmp_path, f"--eval-only --judge {folder}"))
    assert [args[0] for args, _ in loaded] == [str(finished / "policy"), str(folder)]
    assert read(tmp_path / "responses.jsonl") == records


def test_trap_14_no_warning_and_a_run_killed_and_resumed_to_the_bit(folder, data, finished, tmp_path):
    out = tmp_path / "run"
    killed = python("-c", KILLED, *small_run(folder, data, out, LONGER))
    assert killed.returncode == -9
    with open(out / "metrics.jsonl", "ab") as file:
        file.write('{"step": 4, "cut off": "灯'.encode()[:-1])  # within a character
    resumed = python(HERE / "rtt.py", "--resume", out)
    assert resumed.stderr == ""
    for row, whole in zip(read(out / "metrics.jsonl"), read(finished / "metrics.jsonl"), strict=True):
        for name, value in whole.items():
            assert row[name] == value or "second" in name, name
    for name in ("responses.jsonl", "result.json", "policy/model.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_run_killed_before_its_first_checkpoint_begins_anew(finished, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(finished / name, tmp_path)
    rtt.main(["--resume", str(tmp_path)])
    assert len(read(tmp_path / "metrics.jsonl")) == 4
    assert (tmp_path / "result.json").read_bytes() == (finished / "result.json").read_bytes()


def test_a_run_in_bfloat16_has_weights_in_float32_and_first_ratios_of_1(folder, data, tmp_path, monkeypatch):
    scored = spy(monkeypatch, "chosen_logprobs")
    weighted = spy(monkeypatch, "policy_weights")
    rtt.main(small_run(folder, data, tmp_path / "run", "--dtype bfloat16 --updates 2 --steps 1"))
    assert {args[0].dtype for args, _ in scored} == {torch.bfloat16}
    (first, old, *_), (second, still_old, *_) = [args for args, _ in weighted]
    assert first.equal(old)  # scored anew in training precision
    assert still_old.equal(old) and not second.equal(old)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}


def test_rtt_py_alone_runs_with_its_five_verifiers_a_judge_and_a_file_of_ones_own(folder, tmp_path):
    shutil.copy(HERE / "rtt.py", tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    arguments = {rubric.id: rubric.kwargs for rubric, _, _ in CASES} | {"mine:vowels": dict(number=1)}
    ids = ["keywords:existence", "keywords:forbidden_words", "length_constraints:number_sentences"]
    ids += ["startend:end_checker", "change_case:english_lowercase", "mine:vowels"]
    row = dict(instruction_id_list=ids, kwargs=[arguments[each] for each in ids], rubrics=["is kind"])
    rtt.write_rows(tmp_path / "a.jsonl", [dict(row, prompt=f"Tell {n}.") for n in range(3)])
    flags = "--steps 1 --verifiers mine.py"
    ended = python("rtt.py", *small_run(folder, "a.jsonl", "run", flags), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    [record] = read(tmp_path / "run" / "responses.jsonl")
    assert record["prompt"] == "Tell 2."  # the last tenth is held out
    assert [rubric["id"] for rubric in record["rubrics"]] == [*ids, "judge"]
    *_, mine, kind = record["rubrics"]
    places = [list(match.span()) for match in re.finditer("(?i)[aeiou]", record["response"])]
    assert mine["criterion"] == "use 1 vowels"
    assert (mine["satisfied"], mine["evidence"]) == (places != [], places)
    assert kind["criterion"] == "is kind" and kind["evidence"] is None
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["verifiers"] == str(tmp_path / "mine.py")  # found from anywhere


def test_a_lifted_copy_under_any_name_has_all_verifiers(tmp_path):
    package = tmp_path / "rtt"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()  # a package that is called rtt, too
    shutil.copy(HERE / "rtt.py", package / "copied.py")
    shutil.copy(HERE / "data" / "ifeval.py", package / "data")
    code = "import rtt.copied, rtt; print(len(rtt.copied.VERIFIERS), hasattr(rtt, 'VERIFIERS'))"
    assert python("-c", code, cwd=tmp_path).stdout.split() == [str(len(rtt.VERIFIERS)), "False"]


def test_a_verdict_left_to_a_judge_needs_one(tokenizer):
    with pytest.raises(rtt.BadInput, match="there is none"):
        grade(tokenizer, [[5]], [True], [rtt.make_task(dict(prompt="Go.", rubrics=["is kind"]))])


def test_a_step_that_is_not_finite_is_not_made_and_is_said(capsys):
    model = qwen()
    before = weights_of(model)
    rollout, advantages = off_policy_rollout(model)
    advantages[0, 0] = math.nan
    config = rtt.Config(device="cpu", dtype="float32", group_size=4)
    after, stats = updated(model, rollout, advantages, config)
    assert after.equal(before)
    assert all(weight.grad is None for weight in model.parameters())
    assert stats["grad_norm"] is None  # null in the metrics, which stay JSON
    assert "skipped" in "".join(capsys.readouterr())


def test_a_step_without_a_residual_is_null_in_the_metrics_and_the_run_goes_on(
    folder, data, tmp_path, capsys, monkeypatch
):
    real = rtt.update
    monkeypatch.setattr(rtt, "update", lambda *args: real(*args) | dict(residual=None))
    rtt.main(small_run(folder, data, tmp_path / "run", "--steps 2 --eval-every 1"))
    assert [row["residual"] for row in read(tmp_path / "run" / "metrics.jsonl")] == [None, None]
    assert "residual nan" in "".join(capsys.readouterr())


# ======== 9. The command line ====================================================================
def test_the_embedded_settings_hold_only_without_another_model():
    assert rtt.parse(["--lr", "1e-5"]).max_new_tokens == rtt.EMBEDDED["max_new_tokens"]
    other = rtt.parse(["--model=Qwen2.5-0.5B"])
    assert (other.model, other.max_new_tokens) == ("Qwen/Qwen2.5-0.5B", rtt.Config().max_new_tokens)


def refused(capsys, *argv):
    """The one line that main prints before it leaves with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        rtt.main([str(arg) for arg in argv])
    err = capsys.readouterr().err.strip()
    assert exit.value.code == 2
    assert err.startswith("rtt.py: ") and "\n" not in err
    return err


def test_bad_flags_are_one_line_and_trap_18_cudnn_attention_is_off(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert "--steps 0: must be above 0" in refused(capsys, "--steps", "0")
    assert "--lr nan: must be above 0" in refused(capsys, "--lr", "nan")
    assert "at least 2" in refused(capsys, "--group-size", "1")
    assert "two numbers" in refused(capsys, "--clip", "0.1")
    assert "nowhere.jsonl" in refused(capsys, "--data", "nowhere.jsonl")
    assert "nowhere.py" in refused(capsys, "--verifiers", "nowhere.py")
    assert "no/such/model" in refused(capsys, "--model", "no/such/model")
    rtt.write_rows(tmp_path / "one.jsonl", [ROW])
    assert "one that is held out" in refused(capsys, "--data", "one.jsonl", "--model", "no/such/model")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_bad_resumes_are_one_line(finished, folder, data, capsys, tmp_path):
    assert "not empty" in refused(capsys, *small_run(folder, data, finished))
    assert "only --steps" in refused(capsys, "--resume", finished, "--lr", "1")
    with filelock.FileLock(finished / ".lock"):  # another process is at work
        assert "lock" in refused(capsys, "--resume", finished)
    (tmp_path / "config.json").write_text('{"lr": 1}')
    assert "not that of a run of this version" in refused(capsys, "--resume", tmp_path)
    kept = (finished / "config.json").read_bytes()
    assert "4 are done" in refused(capsys, "--resume", finished, "--steps", "3")
    assert (finished / "config.json").read_bytes() == kept
    rows = read(data / "eval.jsonl")
    rtt.write_rows(data / "eval.jsonl", rows[:-1])
    assert "is not what it was" in refused(capsys, "--resume", finished)
    rtt.write_rows(data / "eval.jsonl", rows)


def test_the_trained_policy_is_kept_whatever_its_folder_said_of_sampling_and_whatever_comes_after(
    folder, data, tmp_path, monkeypatch
):
    odd = shutil.copytree(folder, tmp_path / "odd")
    (odd / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7, "top_p": 0.9}')
    real = rtt.evaluate
    results = [real, Mock(side_effect=KeyboardInterrupt)]  # the second is after training
    monkeypatch.setattr(rtt, "evaluate", lambda *args: results.pop(0)(*args))
    with pytest.raises(SystemExit):
        rtt.main(small_run(odd, data, tmp_path / "run"))
    assert not results
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy").num_parameters() > 1000


def test_a_folder_in_which_another_run_began_meanwhile_is_left_alone(
    folder, data, tmp_path, capsys, monkeypatch
):
    real = rtt.evaluate

    def evaluate(*args):
        (tmp_path / "config.json").write_text("another's")
        return real(*args)

    monkeypatch.setattr(rtt, "evaluate", evaluate)
    assert "another run has begun" in refused(capsys, *small_run(folder, data, tmp_path))
    assert (tmp_path / "config.json").read_text() == "another's"


def test_a_run_that_is_broken_off_before_it_began_leaves_nothing(folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(rtt, "evaluate", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit):
        rtt.main(small_run(folder, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line_and_leaves_what_was_whole(folder, data, tmp_path, capsys, monkeypatch):
    real = torch.save
    saved = []

    def save(state, path):
        if saved:
            path.write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:626] unexpected pos")
        saved.append(path)
        real(state, path)

    monkeypatch.setattr(torch, "save", save)
    out = tmp_path / "run"
    said = refused(capsys, *small_run(folder, data, out, "--steps 2 --eval-every 1"))
    assert "checkpoint.pt: cannot be written" in said
    assert not list(out.glob("*.new"))
    monkeypatch.setattr(torch, "save", real)
    assert torch.load(out / "checkpoint.pt")["done"] == 1
    rtt.main(["--resume", str(out)])
    assert [row["step"] for row in read(out / "metrics.jsonl")] == [1, 2]

    def save_pretrained(self, path):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
        raise Exception("I/O error: No space left on device (os error 28)")  # safetensors' is no OSError

    monkeypatch.setattr(Qwen2ForCausalLM, "save_pretrained", save_pretrained)
    said = refused(capsys, "--resume", out)
    assert "policy: cannot be written" in said
    assert not list(out.glob("*.new"))
    assert (out / "policy" / "model.safetensors").stat().st_size > 1000  # the last one

    def write_text(self, text):
        self.write_bytes(b"{")
        raise OSError("No space left on device")

    monkeypatch.setattr(rtt.Path, "write_text", write_text)
    kept = (out / "config.json").read_bytes()
    assert "config.json: cannot be written" in refused(capsys, "--resume", out)
    assert (out / "config.json").read_bytes() == kept


def test_a_criterion_that_does_not_fit_is_refused_before_training(tokenizer, data, tmp_path, capsys):
    small = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=4, n_positions=128)
    model = GPT2LMHeadModel(small)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    rtt.write_rows(tmp_path / "a.jsonl", [dict(ROW, prompt="Go.", rubrics=["be kind " * 60])] * 3)
    command = small_run(tmp_path / "gpt2", tmp_path / "a.jsonl", tmp_path / "run")
    assert "criterion of" in refused(capsys, *command)
    rtt.main([*command, "--alpha", "0"])  # where none is read


def test_fields_that_are_not_read_are_named_once(tmp_path, capsys):
    rows = [dict(ROW, key=1), dict(ROW, key=2, ground_truth="{}")]
    rtt.write_rows(tmp_path / "a.jsonl", rows)
    rtt.load_tasks(tmp_path / "a.jsonl")
    said = capsys.readouterr().err
    assert said == f"{tmp_path / 'a.jsonl'}: fields that are not read: ground_truth, key\n"


def test_trap_13_a_model_that_is_of_no_use_is_one_line_and_leaves_no_folder(folder, data, capsys, tmp_path):
    """Spoiled more and more: each time another check comes first. No pickle is loaded."""
    bad = shutil.copytree(folder, tmp_path / "bad")

    def reason(flags=""):
        said = refused(capsys, *small_run(bad, data, tmp_path / "run", flags))
        assert not (tmp_path / "run").exists()
        return said

    assert "do not fit into its context of 32768" in reason("--max-new-tokens 32768")
    model = AutoModelForCausalLM.from_pretrained(bad)
    model.model.norm.weight.data[0] = math.nan
    model.save_pretrained(bad)
    assert "not numbers" in reason()
    (bad / "chat_template.jinja").write_text("{{ messages[0].role }}")
    assert "leaves the prompt out" in reason()
    config = MambaConfig(vocab_size=1024, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(bad)
    assert "other layers" in reason()
    (bad / "model.safetensors").unlink()
    torch.save(model.state_dict(), bad / "pytorch_model.bin")
    assert "no file named model.safetensors" in reason()
    config.quantization_config = dict(quant_method="awq", bits=4)
    config.save_pretrained(bad)
    assert "quantised" in reason()
