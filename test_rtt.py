# SPDX-License-Identifier: MIT
"""Tests of rtt.py, in the order of its sections: slow obvious loops, finite differences, invariances.

G responses a prompt, N = prompts * G, K rubrics, T response tokens; symbols as in rtt.py's opening table.
Models are made here, tiny and with random weights; the tokenizer is that of data/tiny.
A test whose name begins with test_trap holds a mistake that was found in a real code base.
"""

import builtins
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import symtable
import sys
from pathlib import Path
from statistics import fmean, geometric_mean, pstdev

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test waits for the hub
os.environ["OMP_NUM_THREADS"] = "1"  # equal runs need equal numbers of threads

import filelock
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parameters_to_vector
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel
from transformers import MambaConfig, MambaForCausalLM, PhimoeConfig, PhimoeForCausalLM
from transformers import Qwen2Config, Qwen2ForCausalLM

import rtt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "data"))
import compare
import explain

# test_trap_14: transformers moves; whatever will be gone in its next release is an error here.
pytestmark = pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")

LOSSES = ["grpo", "grpo-mask", "gspo", "grpo-fix", "dfpo-min", "dfpo-orth"]
GROUP_CLIPPED = ["grpo-fix", "dfpo-min", "dfpo-orth"]
PARTITIONS = ["intra", "inter", "rubric", "verdict", "contested", "cross"]


@pytest.fixture(autouse=True)
def equal_random_numbers_in_every_run():
    torch.manual_seed(0)


def assert_close(a, b, tolerance=1e-5):
    a = torch.as_tensor(a)
    b = torch.as_tensor(b)
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, check_dtype=False)


# Models: random weights, large enough that the distributions are far from uniform.

END = 3  # the end tokens of the tiny models
OTHER_END = 4
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)


def qwen(vocab_size=23, seed=0, **options):
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=vocab_size, num_hidden_layers=2, **SIZES, **options)
    return Qwen2ForCausalLM(config).eval()


def gpt2(vocab_size=23):
    """Its positions are absolute, so a wrong position id shows (Qwen2's are relative)."""
    torch.manual_seed(0)
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **sizes)).eval()


def gemma3(vocab_size=23):
    """Every other layer sees the last 6 tokens only."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=vocab_size,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=6,
        head_dim=8,
        tie_word_embeddings=False,
        **SIZES,
    )
    return Gemma3ForCausalLM(config).eval()


MODELS = [qwen, gpt2, gemma3]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(HERE / "data" / "tiny")


@pytest.fixture(scope="session")
def folder(tokenizer, tmp_path_factory):
    """A model folder: random weights, data/tiny's tokenizer, and dropout in its config."""
    path = tmp_path_factory.mktemp("model")
    model = qwen(len(tokenizer), attention_dropout=0.5, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def flat_gradient(value, model):
    gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


# ======== 1. Rubrics =============================================================================

# For each id and its arguments, responses that satisfy ("+") or violate it ("-"), their evidence in
# brackets. An empty bracket at the end is the evidence of the end token. \n is a new line.
TABLE = r"""
keywords:existence {"keywords": ["lamp", "key"]}
+ A ⟦LAMP⟧, two ⟦key⟧s, a c⟦lamp⟧.
- A lamp and no other.
keywords:forbidden_words {"forbidden_words": ["dog", "élan"]}
+ A hotdog and a doghouse.
- The ⟦Dog⟧'s ⟦dog⟧-house, 😀 ⟦Élan⟧
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
+ ⟦д⟧⟦а⟧ 😀 ab
- да ⟦a⟧⟦b⟧⟦c⟧
language:response_language {"language": "hi"}
+ ⟦न⟧⟦म⟧⟦स⟧⟦्⟧⟦त⟧⟦े⟧ abcdef
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
+ ⟦X⟧-⟦RAY⟧ at (⟦NASA⟧), Pa3
- x-ray 123 NASA Aa 灯
change_case:capital_word_frequency {"capital_frequency": 2, "capital_relation": "less than"}
+ x-ray 123 NASA Aa 灯
- X-⟦RAY⟧ at (⟦NASA⟧), Pa3
change_case:english_capital {}
+ ALL LARGE, 灯 😀 İ
- A⟦l⟧⟦ß⟧ ⟦ǅ⟧ B
- 123 !
change_case:english_lowercase {}
+ all small, ß 灯 😀
- ⟦A⟧ll ⟦İ⟧
- 123 !
punctuation:no_comma {}
+ One; two、three.
- One⟦,⟧ two⟦,⟧⟦,⟧
"""


def unmark(marked):
    """"a ⟦lamp⟧" -> "a lamp", [(2, 6)]"""
    spans = []
    for n, match in enumerate(re.finditer("⟦(.*?)⟧", marked, flags=re.DOTALL)):
        start = match.start() - 2 * n  # without the brackets before it
        spans.append((start, start + len(match[1])))
    return re.sub("[⟦⟧]", "", marked), spans


def read_table():
    """TABLE -> a list of (rubric, text, verdict)."""
    cases = []
    for line in TABLE.strip().splitlines():
        if line[:2] in ("+ ", "- "):
            text, evidence = unmark(line[2:].replace(r"\n", "\n"))
            cases.append((rubric, text, rtt.Verdict(line[0] == "+", evidence)))
        else:
            rubric_id, _, kwargs = line.partition(" ")
            rubric = rtt.Rubric(rubric_id, json.loads(kwargs), "")
    return cases


CASES = read_table()


def test_every_verifier_has_cases_of_both_verdicts():
    covered = {(rubric.id, verdict.satisfied) for rubric, _, verdict in CASES}
    for rubric_id in rtt.VERIFIERS:
        assert {(rubric_id, True), (rubric_id, False)} <= covered


@pytest.mark.parametrize("rubric, text, verdict", CASES)
def test_verdict_and_evidence(rubric, text, verdict):
    assert rtt.verify(rubric, text) == verdict


# Pieces that verifiers stumble over, and what they look for.
PIECES = [
    *("lamp ", "KEY", "Dog", "ow", "The End.", "a", "Z", ",", "Mr. ", "! ", "...", '"', "p. s.", "P.P.S"),
    *("<<", ">>", "<<a>>", "\n* ", "\n- ", "\n", " ", "İ", "é", "灯", "😀", "e\u0301", "\u200d", "\ufffd"),
    *("***", "******", "*", "\n\n", "x", "[", "]", "[a]", "SECTION 1", "3", "'s ", "{", "}", "[1]", "\0"),
    *("```json\n", "```", "My answer is no.", 'Say "hi".', "東", "へ", "привет ", "नमस्ते "),
]


@pytest.mark.parametrize("rubric, example, _", CASES)
def test_fuzzed_evidence_lies_in_the_text_and_removing_it_ends_a_satisfied_verdict(rubric, example, _):
    rng = random.Random(0)
    for _ in range(100):
        text = "".join(rng.choices([*PIECES, example], k=rng.randint(0, 12)))
        satisfied, evidence = rtt.verify(rubric, text)
        assert type(satisfied) is bool
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


NO_COMMA = rtt.Rubric("punctuation:no_comma", {}, "do not use commas")


@pytest.mark.parametrize("thought", ["<think>\nOkay, go.\n</think>\n\n", "Okay, go.</think>"])
def test_trap_16_a_thought_is_not_judged_and_evidence_counts_from_its_beginning(thought):
    n = len(thought)
    assert rtt.verify(NO_COMMA, thought + "Hi.") == (True, [])
    assert rtt.verify(NO_COMMA, thought + "Hi, you.") == (False, [(n + 2, n + 3)])
    for still_open in ("<think>\nOkay", "<think>a</think>  "):
        assert rtt.verify(NO_COMMA, still_open) == (False, [(len(still_open), len(still_open))])


ROW = dict(prompt="Tell a story.", instruction_id_list=["punctuation:no_comma"], kwargs=[{}])


def test_rows_as_ifeval_ships_them_load_and_other_fields_are_ignored(tmp_path):
    row = dict(ROW, key=1, rubrics=["is kind"], ground_truth="{}")
    row["instruction_id_list"] = ["length_constraints:number_words", "punctuation:no_comma"]
    row["kwargs"] = [dict(num_words=3.0, relation="at least", keywords=None, frequency=2), None]
    path = tmp_path / "a.jsonl"
    rtt.write_rows(path, [row, row])
    tasks = rtt.load_tasks(path)
    words, no_comma, kind = tasks[1].rubrics
    arguments = dict(num_words=3, relation="at least")
    assert words == rtt.Rubric("length_constraints:number_words", arguments, "write at least 3 words")
    assert no_comma == NO_COMMA
    assert kind.criterion == "is kind"
    with pytest.raises(ValueError, match="needs a judge"):
        rtt.verify(kind, "Hi.")


BAD_ROWS = {
    "not a JSON object": "{",
    "'prompt'": dict(ROW, prompt=" "),
    "unknown instruction id": dict(ROW, instruction_id_list=["punctuation:none"]),
    "lists of one length": dict(ROW, kwargs=[]),
    "'keywords' must be": dict(ROW, instruction_id_list=["keywords:existence"]),
    "no rubric": dict(prompt="Go."),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(reason, tmp_path):
    bad = BAD_ROWS[reason]
    line = bad if isinstance(bad, str) else json.dumps(bad)
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}")
    with pytest.raises(rtt.BadInput) as error:
        rtt.load_tasks(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert reason in str(error.value)


def test_a_name_that_is_no_file_is_asked_of_the_hub(monkeypatch):
    def load_dataset(name, split):
        return [dict(ROW, prompt=f"{name} {split}")]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert rtt.load_tasks("google/IFEval")[0].prompt == "google/IFEval train"


def test_trap_13_no_code_of_a_data_file_runs(tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    row = dict(ROW, kwargs=[dict(func=code)], functions=[code])
    rtt.write_rows(tmp_path / "a.jsonl", [row])
    [task] = rtt.load_tasks(tmp_path / "a.jsonl")
    [rubric] = task.rubrics
    assert rubric == NO_COMMA
    assert not rtt.verify(rubric, code).satisfied
    assert not (tmp_path / "ran").exists()
    source = (HERE / "rtt.py").read_text(encoding="utf-8")
    assert not re.search(r"(?<![.\w])(eval|exec)\(|trust_remote_code=True|import pickle", source)


# ======== 2. Rollouts ============================================================================

PROMPTS = [[5, 6], [7, 8, 9, 10, 11, 12, 13], [14]]


def roll(model, prompts=PROMPTS, G=4, T=12, temperature=1.0, pad=0, seeds=(0, 1, 2)):
    return rtt.sample(model, prompts, G, T, temperature, (END, OTHER_END), pad, list(seeds))


def responses_of(rollout):
    """(prompt, response without padding) of each of the N rows."""
    G = len(rollout.ids) // len(PROMPTS)
    pairs = []
    for i, ids in enumerate(rollout.ids.tolist()):
        length = int(rollout.mask[i].sum())
        pairs.append((PROMPTS[i // G], ids[:length]))
    return pairs


def plain_distributions(model, prompt, response, temperature):
    """No padding, cache or batch: log-probabilities [n, V] where the response's n tokens are predicted."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def plain_logprobs(model, prompt, response, temperature=1.0):
    """The log-probabilities [n] of the response's tokens, by one forward pass of one row."""
    return plain_distributions(model, prompt, response, temperature)[range(len(response)), response]


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("make_model", MODELS)
@torch.no_grad()
def test_trap_7_sampler_and_scorer_agree_with_a_plain_forward_pass(make_model, temperature):
    model = make_model()
    rollout = roll(model, temperature=temperature)
    T = rollout.ids.shape[1]
    ids = torch.cat([rollout.prompt_ids.repeat_interleave(4, 0), rollout.ids], 1)
    attention = torch.cat([rollout.prompt_mask.repeat_interleave(4, 0), rollout.mask], 1)
    shared = rtt.token_logprobs(model, ids, attention, T, temperature, group_size=4)
    single = rtt.token_logprobs(model, ids, attention, T, temperature)
    assert shared.dtype == rollout.logprobs.dtype == torch.float32
    assert rollout.mask.sum(1).unique().numel() > 2  # ragged
    assert not shared[rollout.mask == 0].any()
    assert not single[rollout.mask == 0].any()
    for i, (prompt, response) in enumerate(responses_of(rollout)):
        n = len(response)
        logp = plain_distributions(model, prompt, response, temperature)
        expected = logp[range(n), response]
        assert_close(rollout.logprobs[i, :n], expected, 1e-4)
        assert_close(shared[i, :n], expected, 1e-4)
        assert_close(single[i, :n], expected, 1e-4)
        assert_close(rollout.entropy[i, :n], -(logp.exp() * logp).sum(-1), 1e-4)


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


def test_draw_gives_each_token_its_share_of_the_unit_interval():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    uniform = (torch.arange(1000) + 0.5) / 1000
    tokens = rtt.draw(p.log().expand(1000, -1), uniform)
    assert tokens.bincount(minlength=6).tolist() == [0, 250, 0, 500, 250, 0]


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
        assert not rollout.logprobs[i, n:].any()
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
        rows = slice(4 * p, 4 * p + 4)
        assert torch.equal(alone.ids, batch.ids[rows, :n])
        assert not batch.mask[rows, n:].any()
        assert_close(alone.logprobs, batch.logprobs[rows, :n])
    assert len(batch.ids.unique(dim=0)) > 8  # and differ within a group
    for seeds in (range(12), []):  # one a prompt, not one a response
        with pytest.raises(ValueError, match="as many seeds"):
            roll(model, seeds=seeds)


def test_chosen_logprobs_is_log_softmax_at_the_target_however_many_rows_are_taken_at_a_time():
    logits = 4 * torch.randn(7, 11)
    targets = torch.randint(11, (7,))
    expected = (logits / 0.7).log_softmax(1)[range(7), targets]
    for chunk in (1, 3, 512):
        assert_close(rtt.chosen_logprobs(logits, targets, 0.7, chunk), expected)


@pytest.mark.parametrize("prompt", [" 😀\n", "\nA <tag> [INST]", "<|im_start|>Go<|im_end|>", " <|im_end|>\n"])
@pytest.mark.parametrize("templated", [True, False])
def test_trap_17_what_reads_like_a_special_token_in_a_prompt_stays_text(prompt, templated, folder):
    """The tokenizer begins every text with <|im_start|>; so does its template, which strips the prompt."""
    coder = AutoTokenizer.from_pretrained(folder)
    begin = ("<|im_start|>", 1)
    coder.backend_tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [begin])
    coder.chat_template = "<|im_start|>[INST] {{ messages[0].content | trim }} [/INST]"
    written = f"<|im_start|>[INST] {prompt.strip()} [/INST]"
    if not templated:
        coder.chat_template = None
        written = f"<|im_start|>{prompt}"
    ids = rtt.encode_prompt(coder, prompt)
    assert coder.decode(ids) == written
    assert ids[0] == coder.convert_tokens_to_ids("<|im_start|>")
    assert not set(ids[1:]) & set(coder.all_special_ids)  # only the first is special, and it comes once
    if "<|" not in prompt:
        assert ids == coder(written, add_special_tokens=False).input_ids  # as a whole


def test_trap_15_a_turn_ends_where_the_chat_template_ends_it_though_eos_is_another(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path)
    qwen(len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path)
    policy = rtt.load_policy(tmp_path, rtt.Config(device="cpu"), torch.float32)
    assert policy.tokenizer.decode(policy.end_ids) == "<|endoftext|><|im_end|>"
    policy.tokenizer.chat_template = "<|im_start|>{{ messages[0].content }}"  # without the answer
    assert rtt.turn_end(policy.tokenizer) is None


def test_trap_16_thinking_is_switched_off_by_the_template_or_closed(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    opened = "{{ '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}"
    switched = "<|im_start|>assistant\n<think>\n{{ '\n</think>\n\n' if not enable_thinking | default(true) }}"
    for ending in (opened, switched):
        tokenizer.chat_template = turns + ending
        ids = rtt.encode_prompt(tokenizer, "Go.")
        assert tokenizer.decode(ids).endswith("assistant\n<think>\n\n</think>\n\n")


# ======== 3. Reward: characters to tokens, the judge, verdicts ===================================

def byte_tokens(tokenizer, text, rng):
    """A tokenization of the text that its tokenizer would never choose, down to single bytes."""
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    letters = "".join(piece for piece, _ in pieces)
    assert len(letters) == len(text.encode())  # byte-level BPE: one letter of its alphabet a byte
    vocabulary = tokenizer.get_vocab()
    ids = []
    while letters:
        sizes = [n for n in range(1, 6) if letters[:n] in vocabulary]
        n = rng.choice(sizes)
        ids.append(vocabulary[letters[:n]])
        letters = letters[n:]
    return ids


def test_trap_10_token_spans_are_the_characters_whose_bytes_a_token_holds(tokenizer):
    rng = random.Random(0)
    pieces = ["lamp", " and", " ", "a", "灯", "😀", "é", ",", " 😀", "👩‍🚀", "\n"]
    for _ in range(60):
        text = "".join(rng.choices(pieces, k=12))
        owner = []  # for each byte, its character
        for place, character in enumerate(text):
            owner += [place] * len(character.encode())
        ids = byte_tokens(tokenizer, text, rng)
        expected = []
        start = 0
        for token in tokenizer.convert_ids_to_tokens(ids):
            end = start + len(token)  # one letter a byte
            expected.append((owner[start], owner[end - 1] + 1))
            start = end
        assert rtt.token_spans(tokenizer, [ids, []]) == ([text, ""], [expected, []])
    first, second, third = "".join(tokenizer.tokenize("灯"))
    cut_off = tokenizer.convert_tokens_to_ids(["a", first, second])  # by the length limit
    assert rtt.token_spans(tokenizer, [cut_off]) == (["a\ufffd"], [[(0, 1), (1, 2), (1, 2)]])


def test_token_spans_of_a_sentencepiece_tokenizer():
    """As LLaMA's: a space is ▁ and is dropped before a text, unknown characters are bytes."""
    pieces = ["<unk>", "▁", "a"]
    for byte in range(256):
        pieces.append(f"<0x{byte:02X}>")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    llama = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = " a灯"
    spans = [(0, 1), (1, 2), *[(2, 3)] * 3]  # 灯 is three bytes
    assert rtt.token_spans(llama, [llama(text).input_ids]) == ([text], [spans])


@pytest.mark.parametrize("make_model", MODELS)
@torch.no_grad()
def test_the_judge_is_as_sure_as_one_forward_pass_a_question_says(tokenizer, make_model):
    judge = rtt.Policy(make_model(len(tokenizer)), tokenizer, [2])
    questions = ["Is it kind?", "A fox, 😀, and then " * 5, "x", "The end. " * 9, "A" + "😀" * 400 + "Z"]
    expected = []
    for question in questions:
        ids = rtt.encode_prompt(tokenizer, question)
        if make_model is gpt2 and len(ids) > 512:  # its context: the middle is lost
            ids = ids[:256] + ids[-256:]
        p = judge.model(torch.tensor([ids])).logits[0, -1].softmax(0)
        chance = {}
        for word in ("yes", "no"):
            first = set()
            for form in (word, word.capitalize(), f" {word}", f" {word.capitalize()}"):
                first.add(tokenizer(form, add_special_tokens=False).input_ids[0])
            chance[word] = float(p[list(first)].sum())
        expected.append(chance["yes"] / (chance["yes"] + chance["no"]))
    assert len(set(expected)) == 5
    for batch in (1, 3, 16):
        assert_close(rtt.judge_yes(judge, questions, batch), expected)
    assert_close(rtt.judge_yes(judge, questions[::-1]), expected[::-1])


def rollout_of(tokenizer, responses, ended):
    """A Rollout of responses given as token ids; the end token is added where ended."""
    rows = []
    for ids, end in zip(responses, ended):
        rows.append(torch.tensor(ids + [tokenizer.eos_token_id] * end, dtype=torch.long))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=tokenizer.eos_token_id)
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    return rtt.Rollout(None, None, ids, mask, None, None, ~torch.tensor(ended))


def test_trap_10_grade_marks_every_token_of_a_split_character_and_no_other_without_encoding_again(tokenizer):
    text = "😀 One, two."
    rng = random.Random(2)
    lamp = byte_tokens(tokenizer, "😀", rng)
    rest = byte_tokens(tokenizer, " One, two.", rng)
    existence = rtt.Rubric("keywords:existence", dict(keywords=["😀"]), "")
    words = rtt.Rubric("length_constraints:number_words", dict(num_words=3, relation="at least"), "")
    tasks = [rtt.Task("p", [existence, words]), rtt.Task("q", [NO_COMMA])]
    rollout = rollout_of(tokenizer, [lamp + rest, lamp + rest], [True, False])
    texts, verdicts, evidence, known = rtt.grade(tokenizer, rollout, tasks)
    assert len(lamp) > 1
    assert texts == [text, text]
    assert verdicts.tolist() == [[1, -1], [-1, 0]]
    assert known.tolist() == [[True, True], [True, False]]
    at_lamp = [1] * len(lamp) + [0] * len(rest)
    at_comma = ["," in tokenizer.decode([i]) for i in lamp + rest]
    nowhere = [0] * len(at_comma)
    assert evidence[0].tolist() == [at_lamp + [0], nowhere + [1]]  # the end token: too few words
    assert evidence[1].tolist() == [at_comma + [0], nowhere + [0]]


def test_the_judge_decides_what_no_rule_can_without_evidence(tokenizer, monkeypatch):
    asked = []

    def judge_yes(judge, questions):
        asked.extend(questions)
        return torch.tensor([0.1, 0.9])

    monkeypatch.setattr(rtt, "judge_yes", judge_yes)
    german = rtt.make_rubric("language:response_language", dict(language="de"))  # letters that others share
    korean = rtt.make_rubric("language:response_language", dict(language="ko"))
    kind = rtt.Rubric(rtt.JUDGED, {}, "is kind")
    assert not rtt.needs_judge(rtt.Rubric("mine:code", dict(language="python"), ""))  # somebody's own rule
    task = rtt.Task("Tell.", [NO_COMMA, german, korean, kind])
    ids = tokenizer("A lamp, a key.").input_ids
    rollout = rollout_of(tokenizer, [ids, []], [True, True])  # an empty response satisfies nothing
    texts, verdicts, evidence, known = rtt.grade(tokenizer, rollout, [task], "judge")
    assert verdicts.tolist() == [[-1, -1, -1, 1], [-1, -1, -1, -1]]
    assert known.tolist() == [[True, False, True, False], [True] * 4]
    assert not evidence[~known].any()
    assert evidence[0, 0].sum() == 1  # the comma
    assert len(asked) == 2
    for question, criterion in zip(asked, ["respond entirely in German", "is kind"]):
        assert question == rtt.QUESTION.format("Tell.", texts[0], criterion)


def test_response_reward_counts_only_rubrics_that_exist():
    rows = [[1, 1, 1], [1, -1, 0], [1, 0, 0], [-1, -1, -1]]
    verdicts = torch.tensor(rows)
    all_or_nothing = rtt.response_reward(verdicts)
    share = rtt.response_reward(verdicts, "csr")
    for i, row in enumerate(rows):
        satisfied = row.count(1)
        violated = row.count(-1)
        assert all_or_nothing[i] == (violated == 0)
        assert share[i] == satisfied / (satisfied + violated)
    with pytest.raises(ValueError, match="not Booleans"):  # False would count as "no such rubric"
        rtt.response_reward(verdicts > 0)


# ======== 4. Relevance ===========================================================================

@pytest.fixture
def discriminator(folder, tokenizer):
    torch.manual_seed(0)
    base = AutoModel.from_pretrained(folder, attention_dropout=0.0)
    return rtt.RelevanceDiscriminator(base, tokenizer, 1e-2)


def random_responses():
    """ids and mask [N, T] of ragged random responses."""
    ids = torch.randint(70, 80, (6, 9))
    lengths = torch.randint(1, 10, (6, 1))
    return ids, (torch.arange(9) < lengths).long()


def test_relevance_is_0_where_nothing_is_and_does_not_depend_on_the_batch(discriminator):
    ids, mask = random_responses()
    longer = "a much longer criterion, with more words"
    criteria = [["find it", "a", "b"], ["find it"], [longer, "find it"]] * 2
    exist = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]] * 2)  # [N, K] 1 where there is a criterion
    together = discriminator.predict(criteria, ids, mask, exist)
    present = exist[:, :, None] * mask[:, None, :] > 0
    assert (together[present] > 0).all()
    assert not together[~present].any()
    assert_close(discriminator.predict(criteria, ids, mask, exist, batch=2), together)
    garbage = torch.where(mask > 0, ids, 5)
    assert_close(discriminator.predict(criteria, garbage, mask, exist), together)
    for i, k in exist.nonzero().tolist():
        n = int(mask[i].sum())
        alone = discriminator([criteria[i][k]], ids[i : i + 1, :n], mask[i : i + 1, :n])
        assert_close(alone[0].sigmoid(), together[i, k, :n])


def test_fit_is_one_step_on_the_mean_cross_entropy_of_response_tokens(discriminator):
    """Every parameter moves by lr * gradient of a slow, unpadded mean; no gradient is left behind."""
    ids, mask = random_responses()
    criteria = [["use the word lamp"], ["do not use commas"]] * 3
    evidence = (torch.rand(6, 1, 9) < 0.3).float()
    total = 0.0
    for i in range(6):
        n = int(mask[i].sum())
        logits = discriminator(criteria[i], ids[i : i + 1, :n], mask[i : i + 1, :n])
        p = logits[0].sigmoid()
        right = torch.where(evidence[i, 0, :n] == 1, p, 1 - p)
        total = total - right.log().sum()
    weights = list(discriminator.parameters())
    wanted = torch.autograd.grad(total / mask.sum(), weights)
    norm = torch.cat([gradient.flatten() for gradient in wanted]).norm()
    before = [w.detach().clone() for w in weights]
    discriminator.optimizer = torch.optim.SGD(weights, lr=0.5)
    discriminator.fit(criteria, ids, mask, evidence, torch.ones(6, 1), pairs=6)
    for old, new, gradient in zip(before, weights, wanted):
        assert_close(new, old - 0.5 * gradient / max(float(norm), 1.0), 1e-4)  # clipped to norm 1
        assert new.grad is None


def test_f1_and_auroc_against_a_loop_over_pairs_with_ties():
    scores = torch.tensor([0.9, 0.7, 0.7, 0.7, 0.5, 0.2, 0.2, 0.6])
    labels = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    wins = 0.0
    for positive in scores[labels == 1]:
        for negative in scores[labels == 0]:
            wins += float(positive > negative) + 0.5 * float(positive == negative)
    precision = 3 / 5  # five are above 0.5, three of them of the four positives
    recall = 3 / 4
    f1, auroc = rtt.f1_and_auroc(scores, labels)
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert auroc == pytest.approx(wins / 16)


# ======== 5. Advantages ==========================================================================

def normalize(values, eps):
    """(x - mean) / (std + eps) of a list."""
    mean = fmean(values)
    std = pstdev(values)
    return [(x - mean) / (std + eps) for x in values]


def normalize_over(tensor, places, eps=0.1):
    """The entries of a tensor at these places, normalised together; 0 elsewhere."""
    result = torch.zeros_like(tensor)
    values = [float(tensor[place]) for place in places]
    for place, value in zip(places, normalize(values, eps)):
        result[place] = value
    return result


def slow_token_advantage(verdicts, relevance, mask, partition, pool="mean"):
    """The definition of the partitions: verdicts [G, K], relevance [G, K, T], mask [G, T] -> [G, T]."""
    G, K, T = relevance.shape
    rows = []  # for each response, the places of its tokens
    for i in range(G):
        rows.append([(i, t) for t in range(T) if mask[i, t]])
    everywhere = sum(rows, [])
    total = torch.zeros(G, T)
    for k in range(K):
        reward = verdicts[:, k, None] * relevance[:, k]  # [G, T]
        signs = torch.tensor(normalize(verdicts[:, k].tolist(), 0.1))[:, None]  # [G, 1]
        if partition == "rubric":
            total += reward
        elif partition == "inter":
            total += normalize_over(reward, everywhere)
        elif partition == "cross":
            total += signs * normalize_over(relevance[:, k], everywhere)
        elif partition == "verdict":
            total += signs * relevance[:, k]
        elif partition == "intra" or signs.any():  # contested: only where the group does not agree
            for row in rows:
                total += normalize_over(reward, row)
    if pool == "mean":
        total = total / K
    if partition == "rubric":
        total = normalize_over(total, everywhere)
    return total * mask


def random_group(G=4, K=3, T=6):
    """verdicts [G, K] int, relevance [G, K, T], mask [G, T] ragged."""
    verdicts = torch.randint(2, (G, K)) * 2 - 1
    relevance = torch.rand(G, K, T)
    lengths = torch.randint(1, T + 1, (G, 1))
    lengths[0] = T
    return verdicts, relevance, (torch.arange(T) < lengths).long()


def test_response_advantage_against_a_loop():
    rewards = torch.tensor([[1.0, 0.0, 0.25, 1.0, 0.5], [9.0, 1.0, 1.0, 1.0, 1.0]])  # [P, G]
    for group, advantages in zip(rewards, rtt.response_advantage(rewards)):
        assert_close(advantages, normalize(group.tolist(), 1e-6))


@pytest.mark.parametrize("rewards", [[0, 0, 0], [0.1, 0.1, 0.1], [1 / 3] * 7, [0.7]])
def test_trap_3_equal_rewards_give_exactly_0_and_a_group_of_1_no_nan(rewards):
    assert rtt.response_advantage(torch.tensor(rewards)).tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize("pool", ["mean", "sum"])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_trap_6_partitions_against_loops_with_1_2_and_7_rubrics(partition, pool):
    for K in (1, 2, 7):
        verdicts, relevance, mask = random_group(K=K)
        expected = slow_token_advantage(verdicts, relevance, mask, partition, pool)
        padded_verdicts = torch.zeros(4, 7, dtype=torch.long)  # in a batch K is that of the longest
        padded_verdicts[:, :K] = verdicts
        garbage = torch.full((4, 7, 6), math.nan)
        garbage[:, :K] = relevance.masked_fill(mask[:, None] == 0, math.nan)
        advantage = rtt.token_advantage(padded_verdicts, garbage, mask, partition, pool=pool)
        assert_close(advantage, expected)
    with pytest.raises(ValueError, match="relevance must be"):  # [G, T] would be spread over the responses
        rtt.token_advantage(verdicts, relevance[:, 0], mask, partition)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_permuting_the_group_permutes_the_advantages(partition):
    verdicts, relevance, mask = random_group()
    order = torch.tensor([2, 0, 3, 1])
    rewards = rtt.response_reward(verdicts, "csr")
    assert_close(rtt.response_advantage(rewards[order]), rtt.response_advantage(rewards)[order])
    permuted = rtt.token_advantage(verdicts[order], relevance[order], mask[order], partition)
    assert_close(permuted, rtt.token_advantage(verdicts, relevance, mask, partition)[order])


def test_trap_1_reshape_for_permute_mixes_the_rubrics_of_different_responses():
    """The authors' release turns [G, K, T] into [K, G, T] by reshape; that is another, wrong, number."""
    verdicts, relevance, _ = random_group()
    everywhere = torch.ones(4, 6)
    reward = verdicts[..., None] * relevance  # [G, K, T]
    mixed = reward.reshape(3, 4, 6).permute(1, 0, 2)  # not what stood there: [G, K, T] again
    advantage = rtt.token_advantage(verdicts, relevance, everywhere, "inter")
    right = slow_token_advantage(torch.ones(4, 3), reward, everywhere, "inter")
    wrong = slow_token_advantage(torch.ones(4, 3), mixed, everywhere, "inter")
    assert_close(advantage, right)
    assert (advantage - wrong).abs().max() > 0.1


@pytest.mark.parametrize("partition", PARTITIONS)
def test_trap_2_float_relevance_in_an_integer_tensor_is_cut_to_0(partition):
    """The authors' release writes relevance into a tensor of the verdicts' type, so 0.5 becomes 0."""
    verdicts, relevance, mask = random_group()
    advantage = rtt.token_advantage(verdicts, relevance, mask, partition)
    assert advantage.dtype == torch.float32
    assert advantage.abs().max() > 0.05
    of_floats = rtt.token_advantage(verdicts.float(), relevance, mask.float(), partition)
    assert torch.equal(advantage, of_floats)


def test_trap_3_the_noise_of_a_relevance_that_sees_nothing_is_not_blown_up_to_unit_size():
    noise = 0.01 + 0.01 * torch.randn(4, 3, 40)
    mask = torch.ones(4, 40)
    agree = torch.ones(4, 3)
    blown_up = rtt.token_advantage(agree, noise, mask, "intra", eps=1e-6)
    kept_small = rtt.token_advantage(agree, noise, mask, "intra")
    assert blown_up.std() > 0.4  # what it would be
    assert kept_small.std() < 0.1
    found = torch.zeros(4, 3, 40)
    found[:, :, 7] = 1.0  # one relevant token of 40
    advantage = rtt.token_advantage(agree, found, mask, "intra")
    assert (advantage[:, 7] > 3).all()


@pytest.mark.parametrize("how, share", [("add", 1.0), ("mix", 0.75)])
def test_combine_advantages(how, share):
    response = torch.tensor([2.0, -1.0])
    token = torch.tensor([[1.0, -1.0], [0.0, math.nan]])
    mask = torch.tensor([[1, 1], [1, 0]])
    combined = rtt.combine_advantages(response, token, mask, alpha=0.25, how=how)
    assert combined.tolist() == [[share * 2 + 0.25, share * 2 - 0.25], [-share, 0.0]]


# ======== 6. Exchangeability =====================================================================

def test_min_replace_gives_each_group_its_minimum():
    weights = torch.tensor([[3.0, 1, 2], [5, 6, 4]])
    assert rtt.min_replace(weights).tolist() == [[1, 1, 1], [4, 4, 4]]


def test_adv_orthogonal_weights_cancel_and_move_no_more_than_they_must():
    w = torch.rand(5, 8) + 0.5
    adv = torch.randn(5, 8)
    new = rtt.adv_orthogonal(w, adv)
    assert_close((adv * new).sum(1), torch.zeros(5))
    for i in range(5):
        dot = sum(a * x for a, x in zip(adv[i], w[i]))
        size = sum(a * a for a in adv[i])
        assert_close(new[i], w[i] - dot / size * adv[i])
    nothing = torch.zeros(5, 8)
    half = w.half()
    assert rtt.adv_orthogonal(w, nothing).equal(w)
    assert rtt.adv_orthogonal(half, nothing.half()).equal(half.float())


def slow_residual(coef, ids, mask):
    """The learning tax: the tokens that all responses share, one after the other."""
    tax = 0.0
    push = 0.0
    for token in ids.unique():
        places = (ids == token) & (mask > 0)  # [G, T]
        if places.any(1).all():
            means = []
            for of_response, here in zip(coef, places):
                means.append(float(of_response[here].mean()))
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
    lengths = torch.randint(1, 6, (8, 1))
    mask = (torch.arange(5) < lengths).long()
    return logprobs.requires_grad_(), old, A.view(8, 1) * mask, mask


def ppo_weight(ratio, A, low, high):
    """PPO: the gradient is dead only where the clip makes the objective smaller."""
    if A > 0 and ratio > 1 + high:
        return 0.0
    if A < 0 and ratio < 1 - low:
        return 0.0
    return ratio


def slow_weights(ratios, advantages, loss, low, high):
    """The table of the losses for one group: for each response its tokens' ratios, and advantages."""
    s = [geometric_mean(row) for row in ratios]
    m = [fmean(row) for row in advantages]
    along = sum(a * x for a, x in zip(m, s)) / sum(a * a for a in m)
    clipped = s if loss.startswith("dfpo") else sum(ratios, [])
    group_inside = all(1 - low <= x <= 1 + high for x in clipped)
    weights = []
    for i in range(len(ratios)):
        row = []
        for ratio, A in zip(ratios[i], advantages[i]):
            if loss == "grpo":
                weight = ppo_weight(ratio, A, low, high)
            elif loss == "grpo-mask":
                weight = ratio if 1 - low <= ratio <= 1 + high else 0.0
            elif loss == "gspo":
                weight = ppo_weight(s[i], A, low, high) / len(ratios[i])
            elif not group_inside:
                weight = 0.0
            elif loss == "grpo-fix":
                weight = min(max(ratio, 0.8), 1.2)
            elif loss == "dfpo-min":
                weight = min(s)
            elif loss == "dfpo-orth":
                weight = s[i] - along * m[i]
            row.append(weight)
        weights.append(row)
    return weights


def slow_coef(logprobs, old, advantages, mask, G, loss, low, high):
    """Advantage * weight [N, T]."""
    coef = torch.zeros(mask.shape, dtype=torch.float64)
    lengths = mask.sum(1).tolist()
    ratio = (logprobs - old).exp()
    for start in range(0, len(mask), G):
        group = range(start, start + G)
        ratios = [ratio[i, : lengths[i]].tolist() for i in group]
        given = [advantages[i, : lengths[i]].tolist() for i in group]
        for i, weights in zip(group, slow_weights(ratios, given, loss, low, high)):
            coef[i, : lengths[i]] = torch.tensor(weights) * advantages[i, : lengths[i]]
    return coef


@pytest.mark.parametrize("token_level", [False, True])
# What leaves the first range: tokens of each group, not all responses; the second, less; the last, nothing.
@pytest.mark.parametrize("clip", [(0.2, 0.3), (0.35, 0.6), (1.0, math.inf)])
@pytest.mark.parametrize("loss", LOSSES)
def test_coef_is_the_table_of_the_losses_and_minus_the_gradient(loss, clip, token_level):
    logprobs, old, advantages, mask = loss_case(spread=0.2)
    if token_level:
        noise = torch.randn(mask.shape)
        advantages = advantages + 0.3 * noise * mask
    value, stats = rtt.policy_loss(logprobs, old, advantages, mask, 4, loss, clip)
    value.backward()
    expected = slow_coef(logprobs, old, advantages, mask, 4, loss, *clip)
    divisor = len(mask) if loss == "gspo" else mask.sum()
    assert_close(stats["coef"], expected)
    let_go = expected[mask > 0] == 0
    assert stats["clip_fraction"] == pytest.approx(float(let_go.double().mean()))
    moved = (logprobs - old).detach()[mask > 0]
    assert stats["approx_kl"] == pytest.approx(float((moved.exp() - moved - 1).mean()))
    assert_close(logprobs.grad, -expected / divisor)


@pytest.mark.parametrize("shape, G", [((4, 5), 3), ((2, 2, 5), 2), ((5,), 5)])
def test_other_shapes_than_whole_groups_of_rows_are_refused(shape, G):
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match="multiple of group_size"):
        rtt.policy_loss(x, x, x, x, G)


@pytest.mark.parametrize("loss", GROUP_CLIPPED)
@pytest.mark.parametrize("ratio, inside", [(0.801, True), (0.799, False), (1.199, True), (1.201, False)])
def test_one_ratio_outside_the_range_lets_go_of_its_whole_group_and_of_no_other(loss, ratio, inside):
    log_ratio = torch.zeros(4, 3)  # two groups of two responses
    log_ratio[0] = math.log(ratio)
    advantages = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).expand(4, 3)
    mask = torch.ones(4, 3)
    _, stats = rtt.policy_loss(log_ratio, 0 * log_ratio, advantages, mask, 2, loss, (0.2, 0.2))
    assert stats["coef"][:2].any() == inside
    assert stats["coef"][2:].all()
    assert stats["clip_fraction"] == (0.0 if inside else 0.5)


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_may_hold_anything(loss):
    logprobs, old, advantages, mask = loss_case()
    garbage = torch.where(mask > 0, logprobs, -200.0).detach().requires_grad_()  # exp(200) is infinite
    clean, stats = rtt.policy_loss(logprobs, old, advantages, mask, 4, loss)
    dirty, dirty_stats = rtt.policy_loss(garbage, old * mask, advantages, mask, 4, loss)
    dirty.backward()
    assert_close(dirty, clean)
    assert garbage.grad.isfinite().all()
    assert_close(dirty_stats["coef"], stats["coef"])
    assert dirty_stats["approx_kl"] == pytest.approx(stats["approx_kl"])


@pytest.mark.parametrize("loss", LOSSES)
def test_only_the_new_log_probabilities_get_a_gradient(loss):
    """policy_loss(x, x, ...) on policy must learn, and a learned relevance must not be trained by it."""
    logprobs, _, advantages, mask = loss_case()
    advantages.requires_grad_()
    rtt.policy_loss(logprobs, logprobs, advantages, mask, 4, loss)[0].backward()
    weight = 1 / mask.sum(1, keepdim=True) / 8 if loss == "gspo" else 1 / mask.sum()
    assert_close(logprobs.grad, -advantages.detach() * weight)
    assert advantages.grad is None


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.5])
def test_trap_4_ppo_clip_is_one_sided_for_either_sign_of_the_advantage(loss, A, ratio):
    def value_at(logprob):
        advantages = torch.full((1, 1), A)
        old = torch.zeros(1, 1)
        value, _ = rtt.policy_loss(logprob, old, advantages, torch.ones(1, 1), 1, loss, (0.2, 0.2))
        return value

    h = 1e-6
    logprob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    value_at(logprob).backward()
    slope = (value_at(logprob + h) - value_at(logprob - h)) / (2 * h)
    assert_close(slope, -A * ppo_weight(ratio, A, 0.2, 0.2), 1e-6)
    assert_close(logprob.grad, slope.view(1, 1), 1e-6)


def test_trap_5_k3_is_the_kl_on_average_and_never_negative():
    p, q = torch.randn(2, 7, dtype=torch.float64).log_softmax(1)
    for log_p, log_q, value in zip(p, q, rtt.k3(p, q)):
        difference = float(log_q - log_p)
        assert value == pytest.approx(math.exp(difference) - difference - 1)
    kl = (p.exp() * (p - q)).sum()  # KL(p || q)
    assert_close((p.exp() * rtt.k3(p, q)).sum(), kl, 1e-9)  # tokens sampled from p
    small = torch.linspace(-1e-3, 1e-3, 1001)  # float32, where exp(d) - d - 1 is rounding
    assert_close(rtt.k3(0, small) * 1e6, small.square() / 2 * 1e6, 1e-2)
    assert (rtt.k3(0, small) >= 0).all()


def settings(**given):
    """The settings of an update."""
    fixed = dict(device="cpu", dtype="float32", group_size=4, temperature=1.3, max_grad_norm=1e9)
    free = dict(micro_batch=9, gradient_checkpointing=False)
    return rtt.Config(**fixed, **free | given)


def off_policy_rollout(model, spread=0.3):
    """Three groups of different lengths, their log-probs perturbed as if the policy had moved."""
    rollout = roll(model, temperature=1.3)
    noise = torch.randn(rollout.mask.shape)
    rollout.logprobs += spread * noise * rollout.mask
    A = torch.randn(12, 1)
    return rollout, A * rollout.mask


def gradient_of_update(model, rollout, advantages, config, reference=None):
    """What one step of SGD at learning rate 1 subtracts from the weights, and the statistics."""
    before = parameters_to_vector(model.parameters()).detach()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    stats = rtt.update(model, optimizer, rollout, advantages, config, reference)
    return before - parameters_to_vector(model.parameters()).detach(), stats


@pytest.mark.parametrize("loss", LOSSES)
def test_trap_12_update_follows_the_gradient_of_plain_forward_passes_in_micro_batches_of_any_size(loss):
    model = qwen()
    clip = (0.15, 0.2) if loss == "gspo" else (0.4, 0.6)
    rollout, advantages = off_policy_rollout(model, spread=0.2)
    logprobs = torch.zeros(rollout.mask.shape)
    for i, (prompt, response) in enumerate(responses_of(rollout)):
        logprobs[i, : len(response)] = plain_logprobs(model, prompt, response, 1.3)
    value, stats = rtt.policy_loss(logprobs, rollout.logprobs, advantages, rollout.mask, 4, loss, clip)
    expected = flat_gradient(value, model)
    residuals = []
    for coef, ids, mask in zip(stats["coef"].split(4), rollout.ids.split(4), rollout.mask.split(4)):
        if coef.any():
            residuals.append(slow_residual(coef, ids, mask))
    stats |= dict(loss=value.item(), grad_norm=float(expected.norm()), residual=fmean(residuals))
    for micro_batch, checkpointing in ((1, False), (2, False), (9, False), (2, True)):
        model = qwen()
        if checkpointing:
            model.activation_checkpointing_enable()
        config = settings(loss=loss, micro_batch=micro_batch, clip=clip, gradient_checkpointing=checkpointing)
        gradient, means = gradient_of_update(model, rollout, advantages, config)
        assert_close(gradient / expected.norm(), expected / expected.norm())
        for name in ("loss", "grad_norm", "residual", "clip_fraction", "approx_kl"):
            assert means[name] == pytest.approx(stats[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trap_11_no_noise_of_training_reaches_the_ratio(checkpointing):
    """A mixture of experts with dropout, whose router adds noise in training mode."""
    noise = dict(router_jitter_noise=0.5, attention_dropout=0.5)
    sizes = PhimoeConfig(vocab_size=23, num_hidden_layers=2, num_local_experts=4, **noise, **SIZES)
    model = PhimoeForCausalLM(sizes).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    for updates in (1, 2):  # with the second the policy has left the sampler
        rollout = roll(model, temperature=1.3)
        model.train()
        push = torch.ones(rollout.mask.shape)
        config = settings(updates=updates, gradient_checkpointing=checkpointing)
        _, stats = gradient_of_update(model, rollout, push, config)
        assert (stats["approx_kl"] < 1e-9) == (updates == 1)


@pytest.mark.parametrize("loss", ["grpo", "gspo"])  # the penalty is a mean over tokens in both
def test_trap_5_the_kl_penalty_has_the_gradient_of_its_definition(loss):
    model = qwen()
    reference = qwen(seed=1)
    rollout, advantages = off_policy_rollout(model)
    penalty = 0.0
    for prompt, response in responses_of(rollout):
        logp = plain_logprobs(model, prompt, response, 1.3)
        difference = plain_logprobs(reference, prompt, response, 1.3).detach() - logp
        penalty = penalty + (difference.exp() - difference - 1).sum() / rollout.mask.sum()
    expected = 0.2 * flat_gradient(penalty, model)
    config = settings(kl=0.2, micro_batch=1, loss=loss)
    gradient, _ = gradient_of_update(model, rollout, 0 * advantages, config, reference)
    assert_close(gradient / expected.norm(), expected / expected.norm())


# ---- The cancellation condition (TGC), by autograd: a group shares four tokens, then diverges

SHARED = 4
LENGTHS = torch.tensor([[12], [6], [9], [7]])
MASK = torch.arange(12) < LENGTHS  # [G, T]
A = torch.tensor([[1.5], [-0.5], [-0.5], [-0.5]])
CANCELS = 1e-5
TAXED = 0.05
NO_CLIP = (1.0, math.inf)


def tax_on_shared_tokens(loss, advantages, shared_ratio=1.1, spread=0.5, clip=(0.2, 0.2)):
    """|sum_i g_i| / sum_i |g_i|, where g_i is the gradient that comes from response i's shared tokens.

    The shared tokens have one ratio, for their context is the same; after them the ratios differ.
    """
    model = qwen()
    prompt = torch.tensor([[5, 6, 7]]).expand(4, -1)
    ids = torch.randint(5, 23, (4, 12))
    ids[:, :SHARED] = ids[0, :SHARED]
    attention = torch.cat([torch.ones_like(prompt), MASK], 1)
    logprobs = rtt.token_logprobs(model, torch.cat([prompt, ids], 1), attention, 12)
    old = logprobs.detach().clone()
    old[:, :SHARED] -= math.log(shared_ratio)
    old[:, SHARED:] -= spread * torch.randn(4, 8)
    pushes = []
    for i in range(4):
        only = logprobs.detach().clone()
        only[i, :SHARED] = logprobs[i, :SHARED]
        value, _ = rtt.policy_loss(only, old, advantages * MASK, MASK, 4, loss, clip)
        pushes.append(flat_gradient(value, model))
    size = sum(push.norm() for push in pushes)
    assert size > 1e-3  # there is something to cancel
    return float(sum(pushes).norm() / size)


@pytest.mark.parametrize("loss", GROUP_CLIPPED)
def test_shared_tokens_cancel_under_the_papers_losses_off_policy(loss):
    for shared_ratio in (0.5, 1.1, 2.0):
        assert tax_on_shared_tokens(loss, A, shared_ratio, clip=NO_CLIP) < CANCELS
    for shared_ratio in (0.801, 1.199):  # just inside the group clip
        assert tax_on_shared_tokens(loss, A, shared_ratio, spread=0.02) < CANCELS


def test_shared_tokens_pay_under_gspo_because_each_response_has_its_own_weight():
    assert tax_on_shared_tokens("gspo", A, clip=(9.0, 9.0)) > TAXED
    assert tax_on_shared_tokens("gspo", A, shared_ratio=1.0, spread=0.0) > TAXED  # and its own length


def test_shared_tokens_pay_under_grpo_where_the_clip_takes_one_sign_only():
    assert tax_on_shared_tokens("grpo", A, shared_ratio=1.1) < CANCELS  # inside the range
    assert tax_on_shared_tokens("grpo", A, shared_ratio=0.5) > TAXED
    assert tax_on_shared_tokens("grpo", A, shared_ratio=2.0) > TAXED
    assert tax_on_shared_tokens("grpo-mask", A) < CANCELS  # takes both


@pytest.mark.parametrize("advantages, taxed", [(A, False), (A / LENGTHS, True)])
def test_shared_tokens_pay_for_a_length_normalisation_on_policy_and_the_residual_says_so(advantages, taxed):
    tax = tax_on_shared_tokens("grpo", advantages, shared_ratio=1.0, spread=0.0)
    ids = torch.arange(48).view(4, 12)
    ids[:, :SHARED] = ids[0, :SHARED]
    assert tax > TAXED if taxed else tax < CANCELS
    assert rtt.cancellation_residual(advantages * MASK, ids, MASK) == pytest.approx(tax, abs=1e-5)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_only_verdict_and_cross_cancel_where_verdicts_do_not_balance(partition):
    relevance = torch.rand(4, 1, 12)
    relevance[:, :, :SHARED] = relevance[0, :, :SHARED]  # as a causal reader's
    unbalanced = torch.tensor([[1], [1], [1], [-1]])
    advantages = rtt.token_advantage(unbalanced, relevance, MASK, partition)
    tax = tax_on_shared_tokens("dfpo-min", advantages, clip=NO_CLIP)
    assert tax < CANCELS if partition in ("verdict", "cross") else tax > TAXED
    agree = torch.ones(4, 1)  # there is nothing to learn
    agreeing = rtt.token_advantage(agree, relevance, MASK, partition, eps=0)
    assert agreeing.any() == (partition in ("intra", "inter", "rubric"))


# ======== 8. The loop: whole runs ================================================================

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """data/stories, cut to a few prompts."""
    path = tmp_path_factory.mktemp("data")
    for name, count in (("train.jsonl", 6), ("eval.jsonl", 5)):
        lines = (HERE / "data" / "stories" / name).read_bytes().splitlines(keepends=True)
        (path / name).write_bytes(b"".join(lines[:count]))
    return path


SMALL = "--steps 2 --prompts 2 --group-size 4 --max-new-tokens 12 --warmup 1 --device cpu --lr 3e-4".split()
SMALL += "--discriminator-lr 1e-3 --micro-batch 4 --no-gradient-checkpointing".split()


def small_run(folder, data, out, flags=""):
    """The command line of a small run."""
    return ["--model", str(folder), "--data", str(data), "--out", str(out), *SMALL, *flags.split()]


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def train(folder, data, out, flags=""):
    """A small run in this process; its metrics."""
    rtt.main(small_run(folder, data, out, flags))
    return read(out / "metrics.jsonl")


def python(*command):
    """A process of its own."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE)


def spy(monkeypatch, name):
    """The calls of a function of rtt from now on: pairs of its arguments and its result."""
    calls = []
    real = getattr(rtt, name)

    def noted(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append((args, result))
        return result

    monkeypatch.setattr(rtt, name, noted)
    return calls


@pytest.mark.parametrize("relevance", ["evidence", "discriminator"])
def test_a_step_is_the_opening_picture(relevance, folder, data, tmp_path, monkeypatch):
    """Sampled, graded, rewarded, credited: what reaches `update`, and token_share, by slow loops."""
    graded = spy(monkeypatch, "grade")
    updated = spy(monkeypatch, "update")

    def predict(self, criteria, ids, mask, wanted):
        for text in sum(criteria, []):
            assert text.startswith(("yes: ", "no: "))
        return (ids % 7 / 7)[:, None].expand(*wanted.shape, -1)

    monkeypatch.setattr(rtt.RelevanceDiscriminator, "predict", predict)
    flags = f"--steps 1 --reward csr --alpha 0.3 --pool sum --relevance {relevance}"
    [row] = train(folder, data, tmp_path / "run", flags)
    [((_, _, rollout, advantages, *_), _)] = updated
    [(_, verdicts, evidence, _)] = [result for args, result in graded if args[1] is rollout]
    credit = evidence if relevance == "evidence" else predict(None, [], rollout.ids, rollout.mask, verdicts)
    response_level = 0.0
    token_level = 0.0
    for group in (slice(0, 4), slice(4, 8)):
        mask = rollout.mask[group]
        response = rtt.response_advantage(rtt.response_reward(verdicts[group], "csr"))
        token = rtt.token_advantage(verdicts[group], credit[group], mask, "verdict", pool="sum")
        assert_close(advantages[group], rtt.combine_advantages(response, token, mask, 0.3))
        for i, t in mask.nonzero().tolist():
            response_level += abs(response[i])
            token_level += abs(0.3 * token[i, t])
    assert advantages.any()
    assert row["token_share"] == pytest.approx(float(token_level / response_level))


@pytest.fixture(scope="session")
def finished(folder, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    train(folder, data, out, "--steps 4 --eval-every 2")
    return out


def test_a_run_writes_down_what_it_did_and_its_policy_is_an_ordinary_folder(finished, data, tmp_path):
    result = json.loads((finished / "result.json").read_text())
    rows = read(finished / "metrics.jsonl")
    records = read(finished / "responses.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "eval_instruction" in rows[1]
    names = "reward instruction rubric entropy truncated zero_variance token_share tokens f1 auroc loss "
    names += "grad_norm clip_fraction approx_kl residual seconds"
    assert set(names.split()) <= rows[0].keys()
    assert len(records) == 5
    met = 0
    for record in records:
        met += all(rubric["satisfied"] for rubric in record["rubrics"])
    assert result["after"]["instruction"] == met / 5
    outcome = compare.outcome(finished)
    assert outcome["instruction"] == 100 * met / 5
    assert outcome["residual"] == fmean(row["residual"] for row in rows)
    assert [step for step, _ in outcome["curve"]] == [0, 2, 4]
    rtt.main([*small_run(finished / "policy", data, tmp_path), "--eval-only"])
    assert read(tmp_path / "responses.jsonl") == records
    assert not (tmp_path / "policy").exists()


KILLED = """
import os, sys
import rtt
real = rtt.train_step
calls = []
def train_step(*args):
    calls.append(args)
    if len(calls) == 4:
        os.kill(os.getpid(), 9)  # after the checkpoint of step 2 and the metrics of step 3
    return real(*args)
rtt.train_step = train_step
rtt.main(sys.argv[1:])
"""


def test_trap_14_no_warning_and_a_run_killed_and_resumed_to_the_bit(folder, data, finished, tmp_path):
    out = tmp_path / "run"
    killed = python("-c", KILLED, *small_run(folder, data, out, "--steps 4 --eval-every 2"))
    assert killed.returncode == -9
    assert len(read(out / "metrics.jsonl")) == 3
    resumed = python(HERE / "rtt.py", "--resume", out)
    assert resumed.stderr == ""
    assert resumed.returncode == 0
    for row, whole in zip(read(out / "metrics.jsonl"), read(finished / "metrics.jsonl"), strict=True):
        for name, value in whole.items():
            assert row[name] == value or "second" in name, name
    for name in ("responses.jsonl", "result.json", "policy/model.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_two_processes_do_what_one_does(folder, data, tmp_path):
    flags = "--alpha 0 --reward csr --updates 2 --clip 1e-4 1e-4"
    torchrun = "-m torch.distributed.run --nproc_per_node 2 --standalone".split()
    ended = python(*torchrun, HERE / "rtt.py", *small_run(folder, data, tmp_path / "two", flags))
    assert ended.returncode == 0, ended.stderr
    rows = train(folder, data, tmp_path / "one", flags)
    first = read(tmp_path / "two" / "metrics.jsonl")[0]
    for name in ("loss", "grad_norm", "clip_fraction", "approx_kl"):
        assert first[name] == pytest.approx(rows[0][name], rel=1e-2, abs=1e-6)
    assert first["clip_fraction"] > 0.1
    two = load_file(tmp_path / "two" / "policy" / "model.safetensors")
    for name, weight in load_file(tmp_path / "one" / "policy" / "model.safetensors").items():
        assert_close(two[name], weight, 1e-4)


def test_a_run_in_bfloat16_has_weights_in_float32_and_first_ratios_of_1(folder, data, tmp_path, monkeypatch):
    scored = spy(monkeypatch, "chosen_logprobs")
    rows = train(folder, data, tmp_path / "run", "--dtype bfloat16")
    for (logits, *_), _ in scored:
        assert logits.dtype == torch.bfloat16
    for weight in load_file(tmp_path / "run" / "policy" / "model.safetensors").values():
        assert weight.dtype == torch.float32
    assert rows[0]["approx_kl"] == 0  # scored anew in training precision


def page_data(path):
    """The JSON in a page: there is one script of data, and no text in it can end it."""
    page = path.read_text(encoding="utf-8")
    data = re.findall('<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(data[0])


def test_criteria_in_words_are_judged_in_a_run_and_a_file_keeps_its_last_tenth_held_out(folder, tmp_path):
    nasty = '</script><b>"Hi"</b> \u2028 שלום 😀 <!--'  # it must not break the page
    rows = [dict(ROW, prompt=f"Tell {n}. {nasty}", rubrics=["is kind"]) for n in range(20)]
    rtt.write_rows(tmp_path / "a.jsonl", rows)
    train(folder, tmp_path / "a.jsonl", tmp_path / "run")
    records = read(tmp_path / "run" / "responses.jsonl")
    assert [record["prompt"] for record in records] == [rows[18]["prompt"], rows[19]["prompt"]]
    for record in records:
        by_rule, judged = record["rubrics"]
        assert judged["criterion"] == "is kind"
        assert by_rule["evidence"] is not None
        assert (judged["evidence"] is None) == bool(record["response"].strip())
    page = page_data(tmp_path / "run" / "credit.html")
    assert page["groups"][0]["prompt"] in [row["prompt"] for row in rows]


def test_a_step_that_is_not_finite_is_not_made_and_is_said(capsys):
    model = qwen()
    rollout, advantages = off_policy_rollout(model)
    advantages[0, 0] = math.nan
    gradient, stats = gradient_of_update(model, rollout, advantages, settings())
    assert not gradient.any()
    assert stats["grad_norm"] is None  # null in the metrics, which stay JSON
    assert "skipped" in "".join(capsys.readouterr())


def test_the_page_of_a_run_holds_the_numbers_of_the_functions(folder, data, tmp_path, monkeypatch):
    steps = spy(monkeypatch, "train_step")
    train(folder, data, tmp_path / "run", "--steps 3 --eval-every 2")
    page = page_data(tmp_path / "run" / "credit.html")
    assert [group["step"] for group in page["groups"]] == [1, 2, 3]
    assert page["metrics"] == read(tmp_path / "run" / "metrics.jsonl")
    for group, (_, (_, example)) in zip(page["groups"], steps):
        task, rollout, verdicts, used, evidence, _ = example
        G = len(group["ids"])
        K = len(task.rubrics)
        ids = rollout.ids[:G]
        mask = rollout.mask[:G]
        assert_close(torch.tensor(group["evidence"]), evidence[:G, :K])
        relevance = torch.tensor(group["relevance"])
        for k in range(K):
            if len(set(verdicts[:G, k].tolist())) > 1:  # the step itself needed it
                assert_close(relevance[:, k], used[:G, k])
        written = [row[:n].tolist() for row, n in zip(ids, mask.sum(1))]
        assert group["ids"] == written
        texts, spans = rtt.token_spans(AutoTokenizer.from_pretrained(folder), written)
        assert group["texts"] == texts
        assert group["spans"] == [[list(span) for span in row] for row in spans]
        A = rtt.response_advantage(rtt.response_reward(verdicts[:G]))
        ratio = torch.tensor(group["ratio"])
        inside = (ratio >= 0.8) & (ratio <= 1.2)
        smallest = min(geometric_mean(row[:n]) for row, n in zip(group["ratio"], mask.sum(1)))
        for partition in PARTITIONS:
            part = group["partitions"][partition]
            token_adv = rtt.token_advantage(verdicts[:G, :K], relevance, mask, partition)
            advantage = rtt.combine_advantages(A, token_adv, mask)
            assert_close(torch.tensor(part["advantage"]), advantage)
            assert_close(torch.tensor(part["coef"]["grpo-mask"]), advantage * ratio * inside)
            assert_close(torch.tensor(part["coef"]["dfpo-min"]), advantage * smallest)  # no group clip
            residual = rtt.cancellation_residual(torch.tensor(part["coef"]["gspo"]), ids, mask)
            assert part["residual"]["gspo"] == pytest.approx(residual, abs=1e-3)


def test_explain_shows_the_tensors_of_each_section_and_keeps_the_page(data, tmp_path, capsys):
    explain.main(["--data", str(data), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    for number in "1234567":
        assert re.search(rf"^{number}\. ", said, re.MULTILINE)
    sums = [float(value) for value in re.findall("cancel: ([-+.0-9]+)", said)]
    assert abs(sums[1]) < 1e-4 and abs(sums[2]) < 1e-4  # min_replace and adv_orthogonal
    assert page_data(tmp_path / "credit.html")["groups"][0]["ids"]


def test_the_embedded_settings_hold_only_without_another_model():
    assert rtt.parse(["--lr", "1e-5"]).max_new_tokens == rtt.EMBEDDED["max_new_tokens"]
    assert rtt.parse(["--model=Qwen2.5-0.5B"]).max_new_tokens == rtt.Config().max_new_tokens
    assert rtt.parse(["--model=Qwen2.5-0.5B"]).model == "Qwen/Qwen2.5-0.5B"


def refused(capsys, *argv):
    """The one line that main prints before it leaves with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        rtt.main([str(arg) for arg in argv])
    err = capsys.readouterr().err.strip()
    assert exit.value.code == 2
    assert err.startswith("rtt.py: ") and "\n" not in err
    return err


def test_bad_flags_are_one_line(capsys, tmp_path):
    assert "--steps 0: must be above 0" in refused(capsys, "--steps", "0")
    assert "at least 2" in refused(capsys, "--group-size", "1")
    assert "two numbers" in refused(capsys, "--clip", "0.1")
    assert "nowhere.jsonl" in refused(capsys, "--data", "nowhere.jsonl")
    assert "no/such/model" in refused(capsys, "--model", "no/such/model")
    rtt.write_rows(tmp_path / "bad.jsonl", [dict(prompt="Go.")])
    bad = refused(capsys, "--data", tmp_path / "bad.jsonl", "--model", "no/such/model")
    assert "bad.jsonl:1: no rubric" in bad  # before any model is looked for


def test_bad_resumes_are_one_line(finished, folder, data, capsys):
    assert "not empty" in refused(capsys, *small_run(folder, data, finished))
    assert "only --steps" in refused(capsys, "--resume", finished, "--lr", "1")
    with open(finished / "credit.jsonl", "ab") as file:
        file.write('{"step": 4, "prompt": "cut off 灯'.encode()[:-1])  # within a character
    assert "4 are done" in refused(capsys, "--resume", finished, "--steps", "3")
    assert [row["step"] for row in read(finished / "credit.jsonl")] == [1, 2, 4]  # what was cut off is gone
    with filelock.FileLock(finished / ".lock0"):  # another process is at work
        assert "lock" in refused(capsys, "--resume", finished)


def test_trap_13_a_model_that_is_of_no_use_or_could_run_code_is_one_line(folder, data, capsys, tmp_path):
    """Spoiled more and more: each time another check comes first."""
    bad = shutil.copytree(folder, tmp_path / "bad")
    command = small_run(bad, data, tmp_path / "run")
    weights = load_file(bad / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, bad / "model.safetensors", metadata=dict(format="pt"))
    assert "not numbers" in refused(capsys, *command)
    (bad / "chat_template.jinja").write_text("{{ raise_exception('no system turn') }}")
    assert "its chat template fails" in refused(capsys, *command)
    (bad / "model.safetensors").unlink()
    torch.save(weights, bad / "pytorch_model.bin")  # pickled
    assert "no file named model.safetensors" in refused(capsys, *command)
    config = MambaConfig(vocab_size=1024, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(bad)
    assert "other layers" in refused(capsys, *command)
    config.quantization_config = dict(quant_method="awq", bits=4)
    config.save_pretrained(bad)
    assert "quantised" in refused(capsys, *command)


def test_a_message_that_the_terminal_cannot_show_is_shown_as_far_as_it_can(monkeypatch):
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(stream, encoding="latin-1", write_through=True))
    with pytest.raises(SystemExit):
        rtt.main(["--data", "灯.jsonl"])
    assert b"?.jsonl" in stream.getvalue()


def test_trap_18_cudnn_attention_is_off(capsys):
    torch.backends.cuda.enable_cudnn_sdp(True)
    refused(capsys, "--steps", "0")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# ======== README.md and data/compare.py ==========================================================

def test_the_snippets_of_the_readme_run_and_say_what_is_so(capsys):
    text = (HERE / "README.md").read_text(encoding="utf-8")
    names = dict(rtt=rtt)
    for snippet in re.findall("```python\n(.*?)```", text, re.DOTALL):
        exec(snippet, names)
    assert "tensor(-0.4000)" in capsys.readouterr().out
    exclaim = rtt.VERIFIERS.pop("mine:exclaim")
    assert exclaim("Hi! You!", 2) == (True, [(2, 3), (7, 8)])


def globals_of(table):
    """The names outside of a function or class that it needs, builtins aside."""
    names = set()
    for symbol in table.get_symbols():
        if symbol.is_global() and symbol.is_referenced():
            names.add(symbol.get_name())
    for inner in table.get_children():
        names |= globals_of(inner)
    return names - set(dir(builtins))


def test_each_piece_to_lift_is_named_with_all_that_it_needs():
    source = (HERE / "rtt.py").read_text(encoding="utf-8")
    pieces = {}
    for table in symtable.symtable(source, "", "exec").get_children():
        pieces[table.get_name()] = globals_of(table)
    section = (HERE / "README.md").read_text(encoding="utf-8").partition("## Lift a piece")[2]
    lines = section.partition("\n\n`verify`")[0].split("\n- ")[1:]
    assert len(lines) == 5
    for line in lines:
        named = {"torch"}
        for name in re.findall("`(.*?)`", line):
            named.add(name.split()[-1].split(".")[-1])
        given = named - pieces.keys() if line.startswith("Alone") else named
        for name in named & pieces.keys():
            assert pieces[name] <= given, name


def test_the_tables_of_the_committed_results_are_in_their_text(capsys, tmp_path):
    folder = HERE / "data" / "results"
    text = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.glob("*.jsonl"):
        compare.main(["--table", str(path), "--page", str(tmp_path / "curves.html")])
        assert capsys.readouterr().out in text, path
        assert page_data(tmp_path / "curves.html")["curves"]


def test_the_page_of_a_study_has_means_and_intervals_over_its_seeds(tmp_path):
    first = dict(config=dict(out="base+seed=0"), curve=[[0, 0.1], [5, 0.3]])
    second = dict(config=dict(out="base+seed=1"), curve=[[0, 0.1], [5, 0.5]])
    compare.write_page([first, second], tmp_path / "curves.html")
    curve = page_data(tmp_path / "curves.html")["curves"]["base"]["eval_instruction"]
    assert curve == [[0, 0.1, 0], [5, 0.4, pytest.approx(12.71 * 0.1)]]


def test_a_study_is_summed_up_by_the_means_and_intervals_of_its_seeds():
    assert compare.flags_of("base+alpha=0+clip=1~inf") == ["--alpha", "0", "--clip", "1", "inf"]
    mean, half_width = compare.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half_width == pytest.approx(4.30 / math.sqrt(3))
    assert math.isnan(compare.interval([math.nan, math.nan])[0])  # a half without an evaluation
    levels = dict(instruction=50.0, rubric=80.0, goal=None, entropy=1.0, residual=0.0, seconds=1.0)
    first = dict(levels, curve=[[0, 0.1], [50, 0.2], [100, 0.4]])
    better = dict(levels, curve=[[0, 0.1], [50, 0.3], [100, 0.7]])
    row = compare.cells("better", [better, better], [first, first])
    assert row[1:5] == ["30.0 ± 0.0", "+10.0 ± 0.0", "70.0 ± 0.0", "+30.0 ± 0.0"]
