# SPDX-License-Identifier: MIT
r"""Rubrics to Tokens: reinforcement learning from rubrics with token-level credit, in one file.

A prompt comes with several rubrics (criteria). A reward for the whole response says how many were met, not
where. RTT (Rubrics to Tokens, arXiv:2604.02795) asks a small discriminator which tokens are responsible for
each verdict, and adds a token-level advantage to GRPO's response-level one. TGC (Token Gradient Cancellation,
arXiv:2604.13088) says that tokens which all responses of a group share should not move, and changes the
weights of the responses so that they do not. Both speak of one tensor: the coefficient with which each
token's log-probability is pushed up or down.

In GRPO the policy (the language model in training) answers each prompt with a group of rollouts (sampled
responses). A response's advantage says how far its reward lies above the group's mean, in standard
deviations. It multiplies the gradient of each token's log-probability. The ratio of the new to the old
probability weighs tokens that an older policy sampled. The clip lets a token go (it is pushed no further):
its weight becomes 0 once its ratio has gone too far from 1.

    prompts with rubrics (1)
       | sample G responses to each (2)
       v
    ids [N, T] -- grade (3) ---> verdicts [N, K] --> rewards R [N] --> A [G] ------------.
       |                           | evidence [N, K, T]                                  |
       '--> discriminator (4) <----'                                                     v
                 '---> relevance w [N, K, T] ---> token advantage a [G, T] (5) ---> A + alpha * a
                                                                                         |
    policy <-- update (7) <-- coefficient c = advantage * weight [N, T] <----------------'
                                  weight: ratio, clipped, made exchangeable (6)

    symbol      shape      name in the code    meaning
    P, G, N                                    prompts; responses to each (a group); N = P * G, all responses
    K, L, T, V                                 rubrics; prompt tokens; response tokens; vocabulary
    M, n                                       some rows picked from a batch
    s           [N, K]     verdicts            +1 satisfied, -1 violated, 0 no such rubric
    w           [N, K, T]  relevance           in [0, 1]: is the token responsible for the verdict?
    R           [N]        rewards             "aon": all rubrics or nothing; "csr": share satisfied
    A           [G]        response_adv        (R - mean) / std over the group
    r = s * w   [G, K, T]  token_reward        three-dimensional reward space: response, rubric, token
    a           [G, T]     token_adv           r normalised over a partition of it, mean over rubrics
    A + alpha*a [N, T]     advantages          alpha: how much the token level counts
    -           [N, T]     ratio               new over old probability, of a token or of its whole response
    c           [N, T]     coef                advantage * weight: multiplies each grad log pi
    -           [N, T]     mask                1 at the tokens of a response, 0 at padding

    python rtt.py                         the embedded model and stories: minutes on a laptop, no download
    python rtt.py --model Qwen2.5-0.5B    a model of the hub, on data/instructions: on a GPU

Simpler than the papers, or different: rules verify the rubrics that they can (IFEval's); for the others a
model is asked whether they are met. The discriminator is not trained beforehand on labelled data, but online,
from the evidence that the rules give. `token_advantage` and `policy_loss` name what is ours. Adam, a constant
learning rate.
"""

import argparse
import copy
import functools
import inspect
import json
import math
import os
import random
import re
import sys
import time
import unicodedata
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import filelock
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

DATA = Path(__file__).resolve().parent / "data"
RANK = int(os.environ.get("RANK", 0))  # set by torchrun: which of WORLD processes this is
WORLD = int(os.environ.get("WORLD_SIZE", 1))
PARTITIONS = ("intra", "inter", "rubric", "verdict", "contested", "cross")  # see token_advantage
CONTESTED = ("verdict", "contested", "cross")  # those in which a rubric counts only if its group disagrees


def setting(default, text, *choices):
    """One line of Config: the default of a setting, what --help says of it, and what it may be."""
    return field(default=default, metadata=dict(help=text) | (dict(choices=choices) if choices else {}))


@dataclass
class Config:
    """The settings of a run. These defaults suit a model of half a billion parameters on one GPU."""

    model: str = setting("", "model folder, or name on the hub such as Qwen2.5-0.5B; none: the embedded one")
    data: str = setting(str(DATA / "instructions"), "folder of train and eval.jsonl, a file, or a hub name")
    rubrics: int = setting(0, "use only prompts with exactly so many rubrics; 0: all")
    judge: str = setting("", "model that decides what no rule can; none: the starting policy")
    out: str = setting("", "new folder for all that the run writes; none: runs/<time>")
    resume: str = setting("", "folder of a run to go on with; only --steps, --device beside it")
    eval_only: bool = setting(False, "measure the model on the held-out prompts, do not train")
    seed: int = setting(0, "of everything random; on the CPU, equal seeds give equal runs")
    device: str = setting("auto", "auto: the best there is", "auto", "cpu", "cuda", "mps")
    dtype: str = setting("auto", "of forward passes; auto: bfloat16 on cuda", "auto", "float32", "bfloat16")

    steps: int = setting(100, "RL steps")
    prompts: int = setting(8, "prompts a step")
    group_size: int = setting(8, "responses to each prompt")
    max_new_tokens: int = setting(512, "length limit of a response, in tokens")
    temperature: float = setting(1.0, "of sampling")

    reward: str = setting("aon", "all rubrics or nothing; or the share of them satisfied", "aon", "csr")
    relevance: str = setting(
        "discriminator", "learned; or what the rules say, that on other tokens, 1 everywhere",
        "discriminator", "evidence", "shuffled", "uniform",
    )
    partition: str = setting("verdict", "what token rewards are normalised over; intra is RTT's", *PARTITIONS)
    alpha: float = setting(0.5, "weight of the token level; 0 is plain GRPO")
    pool: str = setting("mean", "of the rubrics' token advantages: their mean, or their sum", "mean", "sum")
    discriminator_lr: float = setting(1e-5, "learning rate of the discriminator")
    warmup: int = setting(24, "rollouts that the discriminator learns from before the first step")

    loss: str = setting(
        "grpo", "see policy_loss in rtt.py", "grpo", "grpo-fix", "grpo-mask", "gspo", "dfpo-min", "dfpo-orth"
    )
    clip: list[float] | None = setting(None, "how far below and above 1 a ratio may go; none: rtt.py's CLIP")
    updates: int = setting(1, "optimiser steps on each rollout")
    lr: float = setting(1e-6, "learning rate of the policy")
    max_grad_norm: float = setting(1.0, "limit of the gradient's norm")
    kl: float = setting(0.0, "weight of the KL divergence to the starting policy; 0 costs nothing")
    micro_batch: int = setting(1, "groups in one forward and backward pass")
    gradient_checkpointing: bool = setting(True, "compute layers twice: slower, but less memory")

    eval_every: int = setting(25, "steps between evaluations, and checkpoints; 0: only before and after")
    eval_prompts: int = setting(256, "held-out prompts in each of these; before and after use all")


EMBEDDED = dict(  # what differs for the embedded model: a million parameters, on a CPU
    model=str(DATA / "tiny"),
    data=str(DATA / "stories"),
    steps=75,
    max_new_tokens=64,
    discriminator_lr=1e-3,
    lr=3e-4,
    micro_batch=4,
    gradient_checkpointing=False,
)


class BadInput(Exception):
    """What the user gave is wrong. The message's first line says what, where, and what is allowed."""


# ==================================================================================================
# 1. Rubrics: tasks, verdicts, evidence
#
# In: a data file; later a response.  Out: tasks (a prompt with its rubrics); later, for each rubric, a
# verdict and its *evidence*, the characters that it rests on: with others there, it would flip.  The verdict
# becomes the reward (section 3); the evidence is what the discriminator learns to find (section 4).  Data
# schema and verdicts are IFEval's (arXiv:2311.07911), in its strict reading.
#
# The five verifiers here show the kinds of evidence: a word that is there, a word that must not be there,
# what is counted, the end of the response, and a property of the whole text.  A verdict that rests on no
# character (a forbidden word that is absent) has no evidence.  One that rests on the response ending where it
# does has the empty span (len, len), which stands for the end token.  IFEval's other twenty: the appendix.

JUDGED = "judge"  # the id of a rubric that is a criterion in words, which no rule can check
VERIFIERS = {}  # rubric id -> a function (text, **kwargs) -> (satisfied, evidence)


class Verdict(NamedTuple):
    satisfied: bool
    evidence: list[tuple[int, int]]  # spans: [start, end) in characters of the response


class Rubric(NamedTuple):
    id: str  # IFEval's instruction id, for example "keywords:existence", or JUDGED
    kwargs: dict  # its arguments, for example {"keywords": ["lamp"]}
    criterion: str  # the rubric in words: what the discriminator reads, and a judge


class Task(NamedTuple):
    prompt: str
    rubrics: list[Rubric]


def verifier(rubric_id):
    """Register the decorated function for `rubric_id`. Its docstring is the criterion, over its arguments."""

    def register(function):
        VERIFIERS[rubric_id] = function
        return function

    return register


def end_of(text):
    """The evidence of a verdict that rests on the response ending where it does."""
    return [(len(text), len(text))]


def spans(pattern, text, flags=re.IGNORECASE | re.MULTILINE):
    """Where the regular expression matches, or its group where it has one: a list of spans."""
    return [match.span(match.re.groups) for match in re.finditer(pattern, text, flags)]


def counted(found, relation, bound):
    """The verdict on "at least", "less than" or "exactly `bound` things", given the spans of those found.

    Enough rests on all that were found, too many on the surplus, too few on no character.
    """
    if relation == "less than":
        surplus = found[bound - 1 :]
        return not surplus, surplus
    if relation == "exactly" and len(found) > bound:
        return False, found[bound:]
    return (True, found) if len(found) >= bound else (False, [])


def all_of(verdicts):
    """The verdict that all are satisfied. It rests on all of them, or on those that are not."""
    satisfied = all(met for met, _ in verdicts)
    return satisfied, sum([found for met, found in verdicts if met == satisfied], [])


@verifier("keywords:existence")
def keywords_existence(text, keywords: list):
    """use the word {keywords}"""
    return all_of([counted(spans(re.escape(word), text), "at least", 1) for word in keywords])


@verifier("keywords:forbidden_words")
def keywords_forbidden_words(text, forbidden_words: list):
    """do not use the word {forbidden_words}"""
    found = sum([spans(rf"\b{re.escape(word)}\b", text) for word in forbidden_words], [])
    return not found, found


RELATION = ("at least", "less than")
SENTENCE_END = r"(?<![.!?])[.!?]+(?=[\s\"')\]*]|$)"


@verifier("length_constraints:number_sentences")
def number_sentences(text, num_sentences: int, relation: RELATION):
    """write {relation} {num_sentences} sentences"""
    found = spans(SENTENCE_END, text, flags=0)
    rest = text[found[-1][1] :] if found else text
    if rest.strip(" \n\t\"')]"):
        found += end_of(text)  # an unfinished sentence counts
    satisfied, evidence = counted(found, relation, num_sentences)
    return satisfied, evidence or end_of(text)


@verifier("startend:end_checker")
def end_checker(text, end_phrase: str):
    """end with the words {end_phrase}"""
    body = text.strip().strip('"')
    phrase = end_phrase.strip()
    if not body.lower().endswith(phrase.lower()):
        return False, end_of(text)
    end = text.rindex(body) + len(body)
    return True, [(max(end - len(phrase), 0), end)]


@verifier("change_case:english_lowercase")
def english_lowercase(text):
    """write in lowercase letters only"""
    return text.islower(), [(i, i + 1) for i, char in enumerate(text) if char.istitle()]


def answer_start(response):
    """Where the answer begins: behind the last </think>, if any; at the end if a thought stays open."""
    _, mark, answer = response.rpartition("</think>")
    if mark:
        return len(response) - len(answer.lstrip())
    return len(response) if response.lstrip().startswith("<think>") else 0


def verify(rubric, response, prompt=""):
    """Verdict and evidence of one rubric on one response; as in IFEval, a blank response satisfies none.

    prompt: not used, for no rule needs it. Raises ValueError for a criterion in words.
    """
    offset = answer_start(response)
    answer = response[offset:]
    if not answer.strip():
        return Verdict(False, end_of(response))
    if rubric.id == JUDGED:
        raise ValueError(f"no rule can verify {rubric.criterion!r}: it needs a judge")
    satisfied, evidence = VERIFIERS[rubric.id](answer, **rubric.kwargs)
    return Verdict(bool(satisfied), sorted((offset + start, offset + end) for start, end in evidence))


def needs_judge(rubric):
    """Must a model judge it? A criterion in words, and a language whose letters others share."""
    if rubric.id == "language:response_language":
        _, sharing = script_of(rubric.kwargs["language"])
        return len(sharing) > 1
    return rubric.id == JUDGED


KINDS = {int: "a whole number of at least 1", str: "a text that is not blank", list: "a list of texts"}


def fits(value, kind):
    """Is the value what a verifier's annotation asks for: one of KINDS, or one of a few words?"""
    if kind is int:
        return type(value) in (int, float) and value >= 1 and value % 1 == 0
    if kind is str:
        return isinstance(value, str) and bool(value.strip())
    if kind is list:
        return isinstance(value, list) and bool(value) and all(fits(word, str) for word in value)
    return value in kind


def make_rubric(rubric_id, kwargs):
    """A checked Rubric; kwargs that are null or of another instruction are left out. Raises BadInput."""
    if rubric_id not in VERIFIERS:
        raise BadInput(f"unknown instruction id {rubric_id!r}; known are: {', '.join(sorted(VERIFIERS))}")
    function = VERIFIERS[rubric_id]
    kept = {}
    words = {}
    for name, kind in function.__annotations__.items():
        value = kwargs.get(name)
        if not fits(value, kind):
            allowed = KINDS[kind] if isinstance(kind, type) else f"one of {', '.join(kind)}"
            raise BadInput(f"{rubric_id}: {name!r} must be {allowed}, not {json.dumps(value)}")
        kept[name] = int(value) if kind is int else value  # 3.0 is 3
        words[name] = ", ".join(value) if kind is list else kept[name]
        if isinstance(kind, dict):  # of codes and names
            words[name] = kind[value]
    return Rubric(rubric_id, kept, function.__doc__.format(**words))


def make_task(row):
    """A checked Task from one row of data. Raises BadInput."""
    ids = row.get("instruction_id_list") or []
    kwargs = [each or {} for each in row.get("kwargs") or []]
    criteria = row.get("rubrics") or []
    if not fits(row.get("prompt"), str):
        raise BadInput("'prompt' must be a text that is not blank")
    if len(ids) != len(kwargs):
        raise BadInput("'instruction_id_list' and 'kwargs' must be lists of one length")
    if not (ids or criteria) or criteria and not fits(criteria, list):
        raise BadInput("no rubric: needs 'instruction_id_list' and 'kwargs', or 'rubrics', a list of texts")
    rubrics = [make_rubric(*each) for each in zip(ids, kwargs)]
    return Task(row["prompt"], rubrics + [Rubric(JUDGED, {}, criterion) for criterion in criteria])


def load_tasks(path_or_hub_id, split="train"):
    """The tasks of a .jsonl file, of `split`.jsonl in a folder, or of a data set of that name on the hub.

    One JSON object a line, with IFEval's fields `prompt`, `instruction_id_list` and `kwargs`, and with
    `rubrics`, a list of criteria in words for a judge; either of the two kinds of rubric may be absent. Other
    fields are ignored. Raises BadInput, naming file and line, for the first row that is wrong, and for an
    empty set.
    """
    path = Path(path_or_hub_id)
    path = path / f"{split}.jsonl" if path.is_dir() else path
    if path.suffix in (".json", ".jsonl") or path.exists():
        lines = path.read_bytes().splitlines()
    else:
        import datasets  # slow to import, and local files do not need it

        try:
            lines = [json.dumps(row) for row in datasets.load_dataset(str(path_or_hub_id), split=split)]
        except Exception as error:  # the hub has many ways to fail; all mean that the data cannot be had
            raise BadInput(f"{path}: neither a local file nor to be had from the hub: {error}") from None
    tasks = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # fails for half of a surrogate pair
            tasks.append(make_task(row))
        except BadInput as error:
            raise BadInput(f"{path}:{number}: {error}") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"{path}:{number}: not a JSON object of this schema: {error}") from None
    if not tasks:
        raise BadInput(f"{path}: holds no prompt; at least one line is needed")
    return tasks


# ==================================================================================================
# 2. Rollouts: sampling, and scoring what was sampled
#
# In: P prompts as token ids.  Out: G responses to each, N = P*G rows, with the log-probability of every
# sampled token.  Temperature is the only knob: a hidden top-k or repetition penalty would make the
# distribution that is sampled differ from the one that is scored, and every ratio wrong from the start.
# `token_logprobs` scores the same tokens again, with gradients.  A prompt is computed once for its group: all
# of it but the last token, whose output predicts the first of the response, goes into a cache, which is then
# repeated for the group's rows.  (Not so in training with gradient checkpointing, which allows no cache.)


class Policy(NamedTuple):
    model: torch.nn.Module
    tokenizer: object
    end_ids: list[int]  # tokens that end a response


@dataclass
class Rollout:
    prompt_ids: torch.Tensor  # [P, L] left-padded
    prompt_mask: torch.Tensor  # [P, L] 1 where there is a prompt token
    ids: torch.Tensor  # [N, T] sampled tokens, the end token among them; right-padded
    mask: torch.Tensor  # [N, T] 1 where there is a sampled token
    logprobs: torch.Tensor  # [N, T] float32, of each sampled token when it was sampled
    entropy: torch.Tensor  # [N, T] float32, in nats, of the distribution that it was sampled from
    truncated: torch.Tensor  # [N] True where the response hit the length limit before its end token


def token_ids(tokenizer, text, special=True):
    """A piece of text as token ids. special: what reads like a special token is one; else it stays text."""
    options = dict(add_special_tokens=False, split_special_tokens=not special, verbose=False)
    return tokenizer(text, **options).input_ids


def render(tokenizer, *turns):
    """A user's turn, and perhaps an answer, in the chat template: a text. Raises BadInput where that fails.

    Thinking is switched off: by the template where it can, else by closing the thought that it opens.
    """
    messages = [dict(role=role, content=text) for role, text in zip(("user", "assistant"), turns)]
    options = dict(tokenize=False, add_generation_prompt=len(turns) == 1, enable_thinking=False)
    try:
        text = tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template is a program that comes with the model: it may raise anything
        raise BadInput(f"{tokenizer.name_or_path}: its chat template fails: {error}") from None
    if text.rstrip().endswith("<think>"):
        text = f"{text.rstrip()}\n\n</think>\n\n"
    return text


def encode_prompt(tokenizer, prompt):
    """A prompt as token ids: through the chat template where there is one, as plain text where not.

    What reads like a special token in the prompt ("<|im_end|>") stays text; only the template's are special.
    Raises BadInput for a template that fails, or leaves the prompt out.
    """
    if not tokenizer.chat_template:
        ids = tokenizer(prompt, split_special_tokens=True, verbose=False).input_ids
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers end every text
    text = render(tokenizer, prompt)
    if prompt.strip() not in text:
        raise BadInput(f"{tokenizer.name_or_path}: its chat template leaves the prompt out")
    if token_ids(tokenizer, prompt) == token_ids(tokenizer, prompt, special=False):  # nothing looks special
        return token_ids(tokenizer, text)  # as a whole: a token may reach over the prompt's edge
    # what does the template put before and behind a prompt?
    before, after = render(tokenizer, "~prompt~").split("~prompt~", 1)
    content = text.removeprefix(before).removesuffix(after)  # a template may strip what it is given
    content_ids = token_ids(tokenizer, content, special=False)
    return token_ids(tokenizer, before) + content_ids + token_ids(tokenizer, after)


def left_padded(rows, pad_id, device):
    """Lists of token ids -> ids [P, L], mask [P, L]."""
    options = dict(batch_first=True, padding_side="left")
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(rows, padding_value=pad_id, **options)
    mask = pad_sequence([torch.ones_like(row) for row in rows], **options)
    return ids.to(device), mask.to(device)


def positions(attention_mask):
    """[N, L] position ids that count the real tokens, so that left padding moves nothing."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def prompt_cache(model, prompt_ids, prompt_mask, group_size):
    """A cache of prompts [P, L], all but their last token, for N = P * group_size rows, with gradients.

    transformers calls it `cache` now (once `past_key_values`); `logits_to_keep` may be a number or a mask.
    """
    cache = DynamicCache()
    if prompt_ids.shape[1] > 1:
        mask = prompt_mask[:, :-1]
        options = dict(attention_mask=mask, position_ids=positions(mask), use_cache=True, logits_to_keep=1)
        model(prompt_ids[:, :-1], cache=cache, **options)
    cache.batch_repeat_interleave(group_size)
    return cache


def draw(logp, uniform):
    """One token a row: logp [N, V] log-probabilities, uniform [N] in [0, 1) -> [N].

    The first whose cumulative probability exceeds the row's uniform number (inverse CDF). Not
    torch.multinomial: one number a token, drawn beforehand, makes a row independent of the others.
    """
    cdf = logp.float().exp().cumsum(-1)  # [N, V], up to 1 or, by rounding, nearly so
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)  # [N, 1]
    return token.squeeze(1).clamp(max=logp.shape[-1] - 1)


@torch.no_grad()
def sample(model, prompts, group_size, max_new_tokens, temperature=1.0, end_ids=(), pad_id=0, seeds=None):
    """Sample `group_size` responses to each prompt -> a Rollout, with T = length of the longest.

    prompts: P lists of token ids. end_ids: tokens that end a response. seeds: one integer a prompt, whose
    samples depend on it and on nothing else in the batch. Rows that have ended leave the batch.
    Leaves the model in evaluation mode. Raises ValueError for a temperature not above 0 and for other than
    one seed a prompt, and FloatingPointError where the model's probabilities are not numbers.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    model.eval()
    seeds = torch.randint(2**62, (len(prompts),)).tolist() if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
    shape = (group_size, max_new_tokens)
    uniform = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    uniform = torch.cat(uniform).to(model.device)  # [N, max_new_tokens]
    ends = torch.tensor(list(end_ids), dtype=torch.long, device=model.device)
    prompt_ids, prompt_mask = left_padded(prompts, pad_id, model.device)  # [P, L]
    cache = prompt_cache(model, prompt_ids, prompt_mask, group_size)
    attention = prompt_mask.repeat_interleave(group_size, 0)  # [N, L], and a column more at every step
    place = attention.sum(1, keepdim=True) - 1  # [N, 1] of the token that the model reads next
    token = prompt_ids.repeat_interleave(group_size, 0)[:, -1:]  # [N, 1]
    alive = torch.arange(len(token), device=model.device)  # the rows that have not ended
    ids = torch.full_like(uniform, pad_id, dtype=torch.long)  # [N, max_new_tokens], cut to [N, T] at the end
    mask = torch.zeros_like(ids)
    logprobs = torch.zeros_like(uniform)
    entropy = torch.zeros_like(uniform)
    for t in range(max_new_tokens):
        options = dict(attention_mask=attention, position_ids=place, use_cache=True)
        logits = model(token, cache=cache, **options).logits[:, -1]  # [alive, V]
        logp = (logits.float() / temperature).log_softmax(-1)
        token = draw(logp, uniform[alive, t])[:, None]  # [alive, 1]
        ids[alive, t] = token[:, 0]
        mask[alive, t] = 1
        logprobs[alive, t] = logp.gather(1, token)[:, 0]
        entropy[alive, t] = torch.special.entr(logp.exp()).sum(-1)
        going = ~torch.isin(token[:, 0], ends)  # [alive]
        alive = alive[going]
        if len(alive) == 0:
            break
        if len(alive) < len(going):
            cache.batch_select_indices(going.nonzero()[:, 0])
        token = token[going]
        place = place[going] + 1
        attention = F.pad(attention[going], (0, 1), value=1)

    if not (logprobs + entropy).isfinite().all():
        raise FloatingPointError("the model's probabilities are not numbers: NaN or infinite weights")
    truncated = torch.zeros(len(ids), dtype=torch.bool, device=model.device)
    truncated[alive] = True
    sampled = [tensor[:, : t + 1] for tensor in (ids, mask, logprobs, entropy)]  # [N, T] each
    return Rollout(prompt_ids, prompt_mask, *sampled, truncated)


def chosen_logprobs(logits, targets, temperature=1.0, chunk=512):
    """log_softmax(logits [M, V] / temperature) at targets [M] -> [M] float32.

    `chunk` rows at a time, and those once more in the backward pass: what autograd would keep of a large
    vocabulary (float32 copies, softmax, gradients) never exists for more than one chunk.
    """

    def chosen(logits, targets):
        logits = logits.float() / temperature
        return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)

    parts = zip(logits.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(chosen, *part, use_reentrant=False) for part in parts])


def token_logprobs(model, ids, attention_mask, num_response_tokens, temperature=1.0, group_size=1):
    """Log-probabilities of the last T = `num_response_tokens` tokens: [N, T] float32, 0 at padding.

    ids, attention_mask: [N, L + T], prompts left-padded to L, responses right-padded to T.
    group_size: G > 1 consecutive rows share their prompt, which is then computed once for all of them.
    Raises ValueError for G > 1 with gradient checkpointing: layers that run twice would fill the cache twice.
    """
    if group_size > 1 and model.is_activation_checkpointing and torch.is_grad_enabled():
        raise ValueError("with gradient checkpointing group_size must be 1")
    L = ids.shape[1] - num_response_tokens
    mask = attention_mask[:, L:].bool()  # [N, T]
    cache = None
    start = 0  # the first column that each row computes for itself
    if group_size > 1:
        start = L - 1
        cache = prompt_cache(model, ids[::group_size, :L], attention_mask[::group_size, :L], group_size)
    logits = model(
        ids[:, start:-1],
        attention_mask=attention_mask[:, :-1],
        position_ids=positions(attention_mask)[:, start:-1],
        cache=cache,
        use_cache=group_size > 1,
        logits_to_keep=F.pad(mask, (L - 1 - start, 0)),  # a token is predicted at the place before its own
    ).logits  # [M, V]
    logprobs = chosen_logprobs(logits, ids[:, L:][mask], temperature)  # [M]
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, logprobs)


# ==================================================================================================
# 3. Reward: verdicts on what was sampled
#
# In: a rollout and its tasks.  Out: verdicts [N, K] in {+1, -1}, the evidence as tokens [N, K, T], and one
# reward a response.  Prompts have different numbers of rubrics: K is the largest in the batch, and a verdict
# of 0 means "no such rubric".  What no rule can verify, a model judges (RTT): is "yes" its likelier answer to
# whether the response meets the criterion?  A judge gives no evidence.

QUESTION = (
    "Here is a request, and a response to it.\n\nRequest:\n{}\n\nResponse:\n{}\n\n"
    "Does the response meet this criterion: {}\nAnswer yes or no. Answer:"
)


def response_reward(verdicts, kind="aon"):
    """verdicts [..., K] in {+1, -1}, 0 for no such rubric -> rewards [...] float32 in [0, 1] (RTT).

    "aon", all or nothing: 1 if every rubric is satisfied, else 0 (so 1 where there is none).
    "csr", constraint satisfaction rate: the share of the rubrics that are satisfied (0 where there is none).
    Raises ValueError for another kind, and for Booleans, which must first be made 2 * v - 1.
    """
    if verdicts.dtype == torch.bool:
        raise ValueError("verdicts must be +1 and -1, and 0 for no such rubric, not Booleans")
    if kind == "aon":
        return (verdicts >= 0).all(-1).float()
    if kind == "csr":
        return (verdicts > 0).sum(-1) / (verdicts != 0).sum(-1).clamp(min=1)
    raise ValueError(f"kind must be 'aon' or 'csr', not {kind!r}")


def token_spans(tokenizer, responses):
    """Lists of token ids -> texts, and for each token the span [start, end) of characters that it writes.

    Nothing is encoded again. A character that is spread over several tokens (byte-level BPE, emoji, Chinese)
    is written by each of them: "a" and two tokens that share one emoji have the spans (0, 1), (1, 2), (1, 2).
    """
    anchor = token_ids(tokenizer, "a")[-1:]

    @functools.cache
    def decoded(ids):
        """What these tokens write behind an "a": at the beginning of a text SentencePiece drops a space."""
        options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return tokenizer.decode(anchor + list(ids), **options)[1:]

    texts = []
    tokens = []
    for ids in responses:
        text = ""  # all whole characters so far
        row = []
        pending = ()  # tokens since then
        start = 0  # of the next token
        for token in ids:
            pending = (*pending, token)
            piece = decoded(pending)
            whole = piece.rstrip("\ufffd")  # U+FFFD: bytes that are no character, or not yet
            end = len(text) + len(whole)
            row.append((start, end if whole == piece else end + 1))
            start = end
            if whole == piece:
                text += piece
                pending = ()
        texts.append(text + piece if pending else text)
        tokens.append(row)
    return texts, tokens


def evidence_to_tokens(evidence, tokens):
    """Spans of characters, spans of tokens -> 0.0/1.0 a token: does it write one of these characters?

    An empty span counts as one character long: (len, len) then meets the end token, (len, len + 1).
    [(4, 7), (12, 12)] on tokens [(0, 3), (3, 7), (7, 12), (12, 13)] -> [0.0, 1.0, 0.0, 1.0].
    """
    characters = set()
    for start, end in evidence:
        characters.update(range(start, max(end, start + 1)))
    return [float(not characters.isdisjoint(range(start, end))) for start, end in tokens]


def first_tokens(tokenizer, word):
    """The ids of the tokens that can begin a word in an answer: small or capital, with or without a space."""
    forms = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
    return {token_ids(tokenizer, form)[0] for form in forms}


def context_length(config):
    """How many tokens a model can read; a huge number where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


@torch.no_grad()
def judge_yes(judge, questions, batch=64):
    """How sure a judge is of "yes": P(yes) / (P(yes) + P(no)) of its next token (RTT; no generation).

    judge: a Policy. questions: M texts -> [M]. A question too long for the judge loses its middle.
    """
    yes = first_tokens(judge.tokenizer, "yes")
    no = first_tokens(judge.tokenizer, "no")
    half = context_length(judge.model.config) // 2
    sure = []
    for start in range(0, len(questions), batch):
        rows = [encode_prompt(judge.tokenizer, question) for question in questions[start : start + batch]]
        rows = [row if len(row) <= 2 * half else row[:half] + row[-half:] for row in rows]
        ids, mask = left_padded(rows, 0, judge.model.device)
        options = dict(attention_mask=mask, position_ids=positions(mask), use_cache=False, logits_to_keep=1)
        logits = judge.model(ids, **options).logits[:, -1].float()  # [m, V]
        yes_logits = logits[:, list(yes - no)]  # what can begin both says nothing
        no_logits = logits[:, list(no - yes)]
        sure.append((yes_logits.logsumexp(1) - no_logits.logsumexp(1)).sigmoid().cpu())
    return torch.cat(sure)


def grade(tokenizer, rollout, tasks, judge=None):
    """Verdicts on every response of a rollout, for every rubric of its prompt.

    judge: a Policy, needed where no rule decides. Returns texts (N strings), verdicts [N, K] in {+1, -1, 0},
    evidence [N, K, T] in {0, 1}, and known [N, K]: False where there is no evidence, for there is no such
    rubric, or the judge gave the verdict.
    """
    N, T = rollout.ids.shape
    G = N // len(tasks)
    K = max(len(task.rubrics) for task in tasks)
    verdicts = torch.zeros(N, K, dtype=torch.long)
    evidence = torch.zeros(N, K, T)
    known = torch.zeros(N, K, dtype=torch.bool)
    lengths = rollout.mask.sum(1) - (~rollout.truncated).long()  # [N] without the end token
    written = [ids[:n] for ids, n in zip(rollout.ids.tolist(), lengths.tolist())]
    texts, tokens = token_spans(tokenizer, written)
    questions = {}  # (response, rubric) -> question for the judge
    for i, text in enumerate(texts):
        task = tasks[i // G]
        answer = text[answer_start(text) :]
        if not rollout.truncated[i]:
            tokens[i].append((len(text), len(text) + 1))  # the end token
        for k, rubric in enumerate(task.rubrics):
            in_words = rubric.id == JUDGED and answer.strip()  # on a blank answer verify decides
            verdict = None if in_words else verify(rubric, text)
            if in_words or verdict.satisfied and needs_judge(rubric):  # a rule that says no is final
                questions[i, k] = QUESTION.format(task.prompt, answer, rubric.criterion)
                continue
            verdicts[i, k] = 1 if verdict.satisfied else -1
            known[i, k] = True
            marks = evidence_to_tokens(verdict.evidence, tokens[i])
            evidence[i, k, : len(marks)] = torch.tensor(marks)
    if questions:
        for (i, k), sure in zip(questions, judge_yes(judge, list(questions.values()))):
            verdicts[i, k] = 1 if sure > 0.5 else -1
    device = rollout.ids.device
    return texts, verdicts.to(device), evidence.to(device), known.to(device)


# ==================================================================================================
# 4. Relevance: which tokens are responsible for a verdict?  (RTT, the token-level relevance discriminator)
#
# In: a criterion with its verdict, and a response.  Out: a relevance in [0, 1] for each response token.
# The discriminator is a language model, a copy of the starting policy, with a head that gives one number a
# token.  It reads criterion and verdict, then the response, from left to right: without the verdict it could
# not know, at the first "lamp", whether there will be too few of them.  It learns from the rules' evidence on
# the policy's own rollouts, a little before RL and one step alongside each RL step.  For criteria in words,
# which have no evidence, it relies on what it learned from the others.
#
# First come four helpers of training, its own and the policy's (section 7).


def precision(device, dtype):
    """The context of forward passes: autocast to bfloat16, or nothing. The weights stay in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def training_mode(model):
    """Training mode for layers that checkpoint, which need it; evaluation mode for all else.

    Dropout, or a router's noise, would turn the ratios into noise.
    """
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)


def gather(value):
    """The values that all processes of the run have here, a list in the order of their ranks."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def descend(model, optimizer, max_norm=1.0):
    """Sum the gradients over processes, clip, step, unless the norm is not finite. Returns the norm."""
    if WORLD > 1:
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(weight.grad)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    if math.isfinite(norm):
        optimizer.step()
    else:
        tqdm.write(f"step of {type(model).__name__} skipped: gradient norm {norm}")
    optimizer.zero_grad()
    return norm


def criteria_of(tasks, verdicts):
    """What the discriminator reads of each rubric: "yes: use the word lamp", or "no: ..." if violated.

    verdicts [N, K] -> for each of the N responses a list of texts.
    """
    G = len(verdicts) // len(tasks)
    criteria = []
    for i, row in enumerate(verdicts.tolist()):
        answers = ["yes" if verdict > 0 else "no" for verdict in row]
        rubrics = tasks[i // G].rubrics
        criteria.append([f"{answer}: {rubric.criterion}" for answer, rubric in zip(answers, rubrics)])
    return criteria


class RelevanceDiscriminator(torch.nn.Module):
    """criterion with verdict + response -> relevance of each response token."""

    def __init__(self, base, tokenizer, learning_rate, dtype="float32"):
        """base: a language model without its head; tokenizer: the policy's, and so that of `base`."""
        super().__init__()
        self.base = base
        self.head = torch.nn.Linear(base.get_input_embeddings().embedding_dim, 1)
        torch.nn.init.normal_(self.head.weight, std=0.02)
        self.to(base.device)
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)

    def forward(self, criteria, ids, mask):
        """criteria: M texts, as of criteria_of; ids, mask: [M, T] -> [M, T] float32 logits of relevance."""
        rows = [token_ids(self.tokenizer, f"{criterion}\n", special=False) for criterion in criteria]
        criterion_ids, criterion_mask = left_padded(rows, 0, ids.device)  # [M, C]
        attention = torch.cat([criterion_mask, mask], 1)  # [M, C + T]
        joined = torch.cat([criterion_ids, ids], 1)  # [M, C + T] the response's tokens are the policy's own
        options = dict(attention_mask=attention, position_ids=positions(attention), use_cache=False)
        with precision(ids.device, self.dtype):
            hidden = self.base(joined, **options).last_hidden_state  # [M, C + T, H]
            return self.head(hidden[:, -ids.shape[1] :]).squeeze(2).float()

    def logits_in_batches(self, pairs, criteria, ids, mask, size):
        """For pairs (response i, rubric k), `size` at a time: their i, their k, T, and logits [size, T]."""
        lengths = mask.sum(1).tolist()
        pairs = sorted(pairs, key=lambda pair: lengths[pair[0]])  # like lengths together: less padding
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            i = [response for response, _ in part]
            k = [rubric for _, rubric in part]
            T = lengths[i[-1]]
            texts = [criteria[response][rubric] for response, rubric in part]
            yield i, k, T, self(texts, ids[i, :T], mask[i, :T])

    @torch.no_grad()
    def predict(self, criteria, ids, mask, wanted, batch=64):
        """criteria: for each response K texts or fewer; ids, mask [N, T] -> relevance [N, K, T] in [0, 1].

        wanted [N, K]: 0 where nothing needs to be known; there, and at padding, the relevance is 0.
        """
        self.eval()
        relevance = torch.zeros(*wanted.shape, ids.shape[1], device=ids.device)
        pairs = wanted.nonzero().tolist()
        for i, k, T, logits in self.logits_in_batches(pairs, criteria, ids, mask, batch):
            relevance[i, k, :T] = logits.sigmoid() * mask[i, :T]
        return relevance

    def fit(self, criteria, ids, mask, evidence, known, pairs=48, batch=16):
        """One step of cross-entropy towards evidence [N, K, T] on random (response, rubric) pairs.

        known [N, K]: where there is evidence. At most `batch` pairs are in memory at a time. Of several
        processes each takes its share of the pairs.
        """
        training_mode(self)
        every = known.nonzero().tolist()
        order = torch.randperm(len(every))[: math.ceil(pairs / WORLD)]
        chosen = [every[j] for j in order.tolist()]
        tokens = sum(int(mask[i].sum()) for i, _ in chosen)
        total = sum(gather(tokens))  # of all processes
        for i, k, T, logits in self.logits_in_batches(chosen, criteria, ids, mask, batch):
            weight = mask[i, :T].float()
            options = dict(weight=weight, reduction="sum")
            loss = F.binary_cross_entropy_with_logits(logits, evidence[i, k, :T], **options)
            (loss / total).backward()
        if total:
            descend(self, self.optimizer)


def shuffled(relevance, mask):
    """relevance [N, K, T] with the tokens of each response in a random order: the same credit, misplaced."""
    keys = torch.rand(mask.shape).to(mask.device) - mask.float()  # [N, T] below 0 at tokens, not at padding
    order = keys.argsort(1)[:, None].expand_as(relevance)  # [N, K, T]
    return relevance.gather(2, order) * mask[:, None]


def f1_and_auroc(relevance, evidence):
    """Token-level F1 (at 0.5) and area under the ROC curve of scores [M] against labels [M] in {0, 1}.

    AUROC is the chance that a relevant token scores above an irrelevant one, ties counted half; 0.5,
    which says nothing, where either kind is missing.
    """
    positive = evidence > 0.5
    predicted = relevance > 0.5
    right = (positive & predicted).sum()
    f1 = 2 * right / (positive.sum() + predicted.sum()).clamp(min=1)
    hits = relevance[positive]
    misses = relevance[~positive].sort().values
    if len(hits) == 0 or len(misses) == 0:
        return float(f1), 0.5
    below = torch.searchsorted(misses, hits)  # how many irrelevant tokens score below each relevant one
    up_to = torch.searchsorted(misses, hits, right=True)  # and how many not above it
    wins = (below + up_to).double() / 2  # of each relevant token, a tie counted half
    return float(f1), float(wins.mean() / len(misses))


# ==================================================================================================
# 5. Advantages: response level, token level, combined
#
# In: for one prompt, rewards [G], verdicts [G, K], relevance [G, K, T].  Out: one advantage a token [G, T].
# The response-level advantage is GRPO's.  The token level lives in RTT's three-dimensional reward space
# r[i, k, t] = verdict * relevance.  Which entries of r share one mean and one standard deviation?  That is
# RTT's group partitioning problem; the partitions below differ in one line.


def response_advantage(rewards, eps=1e-6):
    """rewards [..., G] -> (R - mean) / (std + eps) over the group: [..., G]  (GRPO; RTT's response level).

    std is the population's (divided by G). Exactly 0 where all rewards are equal, so also for G = 1.
    """
    rewards = rewards.float()
    std = rewards.std(-1, correction=0, keepdim=True)
    advantage = (rewards - rewards.mean(-1, keepdim=True)) / (std + eps)
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    return advantage.masked_fill(equal, 0.0)


def masked_normalize(x, mask, dim, eps):
    """(x - mean) / (std + eps) over the entries along `dim` where mask is 1; x must be 0 where it is 0."""
    count = mask.sum(dim, keepdim=True).clamp(min=1)
    mean = x.sum(dim, keepdim=True) / count
    centred = (x - mean) * mask
    std = (centred.square().sum(dim, keepdim=True) / count).sqrt()
    return centred / (std + eps).clamp(min=1e-12)


@torch.no_grad()
def token_advantage(verdicts, relevance, mask, partition="intra", eps=0.1, pool="mean"):
    """Token-level advantage [G, T] of one group: token rewards, normalised over a partition of them (RTT).

    verdicts [G, K] in {+1, -1}, 0 for no rubric; relevance [G, K, T] in [0, 1]; mask [G, T]. No gradient.
    partition: see the branches; the default is RTT's, that of the command line is "verdict". pool: "mean"
    over a response's rubrics, or "sum" (RTT's release has both), in which rubrics that have nothing to do
    with a token do not make its push smaller. Raises ValueError for another partition, pool or shape.

    One rubric, satisfied by two responses for their third token, violated by the last for its second. All
    begin with the same token: its pushes should sum to 0. verdicts [[1], [1], [-1]], relevance
    [[[0, 0, 1, 0]], [[0, 0, 1, 0]], [[0, 1, 0, 0]]], eps near 0, give
                            the first response         the last response           sum at the first token
      "intra", "contested"  [-.58, -.58, 1.73, -.58]   [.58, -1.73, .58, .58]      -.58
      "inter", "rubric"     [-.17, -.17, 1.86, -.17]   [-.17, -2.20, -.17, -.17]   -.51
      "cross"               [-.41, -.41, 1.22, -.41]   [.82, -2.45, .82, .82]      0
      "verdict"             [0, 0, .71, 0]             [0, -1.41, 0, 0]            0
    Were all satisfied, "intra", "inter" and "rubric" would still push (sum -1.73), the others not at all.

    eps is large on purpose. r lies in [-1, 1]. One relevant token of 40 makes a std of 0.16, while a
    discriminator that sees nothing anywhere still makes one of 0.01 from noise: with eps = 0.1 the first
    keeps most of its credit, and the noise is not blown up to full size.
    """
    if pool not in ("mean", "sum"):
        raise ValueError(f"pool must be 'mean' or 'sum', not {pool!r}")
    signs = verdicts.float()  # [G, K]
    exists = (signs != 0).float()  # [G, K]
    valid = mask[:, None].float() * exists[..., None]  # [G, K, T]
    if relevance.shape != valid.shape:
        raise ValueError(f"relevance must be [G, K, T] = {list(valid.shape)}, not {list(relevance.shape)}")
    relevance = relevance.float().masked_fill(valid == 0, 0.0)  # [G, K, T]
    token_reward = signs[..., None] * relevance  # [G, K, T]
    verdict_adv = masked_normalize(signs, exists, 0, eps)[..., None]  # [G, K, 1]
    divisor = exists.sum(1).clamp(min=1)[:, None] if pool == "mean" else 1  # [G, 1]: rubrics, or 1
    if partition == "intra":  # RTT: over the tokens of each response and rubric
        advantage = masked_normalize(token_reward, valid, 2, eps)
    elif partition == "inter":  # RTT: over the tokens of all responses, for each rubric
        advantage = masked_normalize(token_reward, valid, (0, 2), eps)
    elif partition == "rubric":  # RTT: over the tokens of all responses, after pooling the rubrics
        return masked_normalize(token_reward.sum(1) / divisor, mask.float(), (0, 1), eps)
    elif partition == "verdict":  # ours: verdicts over the responses, only then spread by relevance
        advantage = verdict_adv * relevance
    elif partition == "contested":  # ours: intra, but 0 from rubrics on which the group agrees
        advantage = masked_normalize(token_reward, valid, 2, eps) * (verdict_adv != 0)
    elif partition == "cross":  # ours: verdict, with the relevance normalised over all responses
        advantage = verdict_adv * masked_normalize(relevance, valid, (0, 2), eps)
    else:
        raise ValueError(f"unknown partition {partition!r}")
    return advantage.sum(1) / divisor  # [G, T]


def combine_advantages(response_adv, token_adv, mask, alpha=0.5, how="add"):
    """response_adv [G], token_adv [G, T], mask [G, T] -> advantage [G, T], 0 at padding (RTT-GRPO).

    "add": A + alpha * a.  "mix": (1 - alpha) * A + alpha * a.  Raises ValueError for another way.
    """
    if how not in ("add", "mix"):
        raise ValueError(f"how must be 'add' or 'mix', not {how!r}")
    rest = 1 - alpha if how == "mix" else 1.0
    return (rest * response_adv[:, None] + alpha * token_adv).masked_fill(mask == 0, 0.0)


# ==================================================================================================
# 6. Exchangeability: transformations of the weights, and the learning tax  (TGC)
#
# In: per-response weights and advantages of a group.  Out: weights under which shared tokens cancel.
# Any group objective has the gradient sum_i sum_t c[i, t] * grad log pi(y[i, t]), with the effective
# coefficient c = advantage * weight.  A token that all responses share in the same context has the same
# gradient in all of them: it moves by sum_i c[i, t].  Sharing it made no response better than another, so
# the sum should be 0.  A group's response-level advantages sum to 0.  Multiplied by weights that differ
# between the responses they do not, unless the weights are first made equal or orthogonal to the advantages.
# What is left over is the learning tax: the policy drifts, and no response is the better for it.
# TGC's word for the condition is exchangeable: it must not matter in which response a shared token stands.
#
# What breaks it: PPO's one-sided clip, which lets a token go in some responses and not in others, by the
# signs of their advantages ("grpo"); one ratio for a whole response, and the division by its length |y|,
# even on policy ("gspo").  A ratio of each token is harmless: the same token after the same text has one.
#
# Token-level advantages must sum to 0 by themselves.  Those of "verdict" and "cross" do (section 5), where
# a shared token has the same relevance in all responses; a learned relevance comes near to that.


def min_replace(w):
    """weights [..., G] -> their minimum over the group, for every response: [..., G]  (TGC). No gradient."""
    return w.detach().amin(-1, keepdim=True).expand_as(w)


def adv_orthogonal(w, adv):
    """w - (adv.w / |adv|^2) adv, so that sum_i adv_i w_i = 0: [..., G]  (TGC). No gradient.

    w itself where |adv| = 0 (below 1e-6 it is rounding: advantages have unit scale). Weights may come out
    negative. w [.9, 1.1, 1.3], adv [1.2, -.4, -.8] -> [1.114, 1.029, 1.157].
    """
    w = w.detach().float()
    adv = adv.detach().float()
    square = adv.square().sum(-1, keepdim=True)
    along = (adv * w).sum(-1, keepdim=True) / square
    return w - adv * along.masked_fill(square < 1e-12, 0.0)


def cancellation_residual(coef, ids, mask):
    """The learning tax of one group: 0 if the tokens that all responses share cancel, 1 if not at all (TGC).

    coef [G, T]: effective coefficients; ids [G, T]: tokens; mask [G, T]. Over the tokens v that occur in
    every response, with c(i, v) the mean of coef over v's places in response i:
    sum_v |sum_i c(i, v)| / sum_v sum_i |c(i, v)|. 0.0 where no token is shared or nothing pushes.
    A proxy: it goes by the token, not by its context, so even weights that cancel can leave a little.
    ids [[5, 6, 9], [5, 7, 9]]: coef [[1, 1, 0], [-1, -1, 0]] -> 0; [[.9, .9, 0], [-1.3, -1.3, 0]] -> 0.18.
    """
    vocabulary, index = ids.unique(return_inverse=True)  # index [G, T] into U different tokens
    zeros = torch.zeros(len(ids), len(vocabulary), device=ids.device)  # [G, U]
    count = zeros.scatter_add(1, index, mask.float())
    push = coef.float().masked_fill(mask == 0, 0.0)  # [G, T]
    mean = zeros.scatter_add(1, index, push) / count.clamp(min=1)  # [G, U]
    mean = mean[:, (count > 0).all(0)]  # [G, shared tokens]
    tax = mean.sum(0).abs().sum()
    size = mean.abs().sum()
    return float(tax / size) if size != 0 else 0.0


# ==================================================================================================
# 7. The update: one loss function, six methods
#
# In: log-probabilities with gradient, those of the sampler, advantages, all [N, T].  Out: a scalar, and the
# effective coefficients c of section 6.  Each method is a choice of the weight that stands beside the
# advantage: which ratio, per token or per response, clipped how, transformed how.
# Off policy a weight has two duties: shared tokens must cancel (TGC), and a token that has been pushed far
# enough must be let go (PPO's clip).  "grpo" sees to the second, TGC's losses to the first; with the group
# clip, which is ours, they see to both, and so does "grpo-mask".

CLIP = {  # how far below and above 1 a ratio may go; a response's ratio moves far less than a token's
    "grpo": (0.2, 0.2),
    "grpo-mask": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),  # GSPO's own (arXiv:2507.18071), made for long responses
    # TGC's losses: the range of the group clip; (1, inf) is their own form, without it
    "grpo-fix": (0.2, 0.2),
    "dfpo-min": (0.02, 0.02),
    "dfpo-orth": (0.02, 0.02),
}
TGC = ("grpo-fix", "dfpo-min", "dfpo-orth")


def clipped_objective(ratio, advantages, low, high):
    """PPO's min(ratio * A, clip(ratio) * A), and the weight: the ratio where that has a gradient, else 0.

    The minimum makes the clip one-sided. A > 0: the gain is capped once ratio > 1 + high, while a ratio
    below 1 - low is still pulled back up. A < 0: capped once ratio < 1 - low, while a ratio above
    1 + high is still pushed down. With a clip of 0.2, (ratio, A) -> objective, weight:
    (1.5, 1) -> 1.2, 0;  (0.5, 1) -> 0.5, 0.5;  (1.5, -1) -> -1.5, 1.5;  (0.5, -1) -> -0.8, 0.
    """
    free = ratio * advantages
    clipped = ratio.clamp(1 - low, 1 + high) * advantages
    return torch.min(free, clipped), ratio.detach() * (free <= clipped)


def k3(log_p, log_q):
    """Schulman's k3 estimate of KL(p || q) at tokens sampled from p, elementwise: never below 0.

    Mask the log-probabilities before, not the result after: at padding the exponential may be infinite.
    """
    difference = log_q - log_p
    return difference.expm1() - difference  # expm1: exp - 1 would leave nothing of a small difference


def masked_mean(x, mask):
    """Mean of x [N, T] over the tokens of each response: [N, 1]."""
    count = mask.sum(1, keepdim=True).clamp(min=1)
    return (x * mask).sum(1, keepdim=True) / count


def loss_denominator(mask, loss):
    """What the loss is divided by: responses for gspo (a mean of token means), tokens for the others."""
    return len(mask) if loss == "gspo" else int(mask.sum())


def policy_loss(
    logprobs, old_logprobs, advantages, mask, group_size, loss="grpo", clip=None, denominator=None
):
    """The loss to minimise (a scalar), and its statistics (a dict). Its gradient is, for every loss,
    d loss / d logprobs = -coef / denominator; its value means something only for grpo and gspo.

    logprobs, old_logprobs, advantages, mask: [N, T], groups of `group_size` consecutive rows; float32, for in
    half precision a ratio near 1 is mostly rounding. loss: see the branches. clip: (low, high), by default
    CLIP's. denominator: that of the whole update, of which this may be a part.
    Statistics: clip_fraction (of the tokens that the clip lets go), approx_kl (k3 estimate of
    KL(sampler || policy)), and coef [N, T]. Only logprobs gets a gradient.
    Raises ValueError for an unknown loss, and for other shapes.
    """
    if loss not in CLIP:
        raise ValueError(f"loss must be one of {', '.join(CLIP)}, not {loss!r}")
    shapes = {tensor.shape for tensor in (logprobs, old_logprobs, advantages, mask)}
    if len(shapes) > 1 or mask.dim() != 2 or len(mask) % group_size:
        raise ValueError("the four tensors must all be [N, T], and N a multiple of group_size")
    low, high = clip or CLIP[loss]
    padding = mask == 0  # whatever stands there, even -inf or NaN, is ignored
    logprobs = logprobs.masked_fill(padding, 0.0)
    old_logprobs = old_logprobs.detach().masked_fill(padding, 0.0)
    advantages = advantages.detach().masked_fill(padding, 0.0)
    old_logprobs = torch.maximum(old_logprobs, logprobs.detach() - 20)  # a ratio is at most exp(20): no NaN
    log_ratio = logprobs - old_logprobs  # [N, T]
    scale = 1.0
    if loss in ("gspo", "dfpo-min", "dfpo-orth"):
        # one ratio for a response: its value is the response's mean, its gradient each token's own
        log_ratio = masked_mean(log_ratio.detach(), mask) + logprobs - logprobs.detach()
    ratio = log_ratio.exp()  # [N, T]
    fixed = ratio.detach()
    inside = (fixed >= 1 - low) & (fixed <= 1 + high)  # [N, T]
    response_ratio = fixed[:, 0].view(-1, group_size)  # [P, G], of dfpo: there a row has one ratio
    if loss == "grpo":  # per-token ratio, PPO's clip, token mean
        objective, weight = clipped_objective(ratio, advantages, low, high)
    elif loss == "gspo":  # the response's ratio, PPO's clip, mean of token means (GSPO-token)
        objective, weight = clipped_objective(ratio, advantages, low, high)
        scale = 1 / mask.sum(1, keepdim=True).clamp(min=1)  # [N, 1]
    elif loss == "grpo-mask":  # a clip for both signs of the advantage (IcePop, arXiv:2510.18855)
        weight = fixed * inside
    elif loss == "grpo-fix":  # TGC: a weight held within 0.2 of 1 (idle in a group clip of 0.2)
        weight = fixed.clamp(0.8, 1.2)
    elif loss == "dfpo-min":  # TGC: one weight for the group
        weight = min_replace(response_ratio).reshape(-1, 1)  # [N, 1]
    elif loss == "dfpo-orth":  # TGC: cancels where all tokens of a response have one advantage
        mean_advantage = masked_mean(advantages, mask).view(-1, group_size)  # [P, G]
        weight = adv_orthogonal(response_ratio, mean_advantage).reshape(-1, 1)  # [N, 1]
    if loss in TGC:
        # group clip (ours): one ratio outside lets all of the group go, so shared tokens still cancel
        group_inside = inside.view(-1, group_size * mask.shape[1]).all(1)  # [P]
        weight = weight * group_inside.repeat_interleave(group_size)[:, None]
    if loss not in ("grpo", "gspo"):
        objective = weight * advantages * logprobs
    tokens = mask.sum().clamp(min=1)
    let_go = ((weight == 0) * mask).sum()
    stats = dict(
        clip_fraction=float(let_go / tokens),
        approx_kl=float(k3(old_logprobs, logprobs.detach()).sum() / tokens),
        coef=weight * scale * advantages * mask,
    )
    denominator = denominator or max(loss_denominator(mask, loss), 1)
    return -(objective * scale * mask).sum() / denominator, stats


def micro_batches(rollout, group_size, groups):
    """Whole groups, `groups` at a time, those of like length together, without columns that are all padding.

    Whole, because section 6 needs all of a group's ratios, and because a prompt is then computed once. Yields
    the rows [n], ids [n, L + T], attention mask [n, L + T], and T.
    """
    prompt_ids = rollout.prompt_ids.repeat_interleave(group_size, 0)  # [N, L]
    prompt_mask = rollout.prompt_mask.repeat_interleave(group_size, 0)  # [N, L]
    longest = rollout.mask.sum(1).view(-1, group_size).amax(1)  # [P]
    every = torch.arange(len(rollout.ids), device=longest.device).view(-1, group_size)  # [P, G]
    for part in longest.argsort(stable=True).split(groups):
        rows = every[part].view(-1)  # [n]
        T = int(longest[part].max())
        L = int(prompt_mask[rows].sum(1).max())
        ids = torch.cat([prompt_ids[rows, -L:], rollout.ids[rows, :T]], 1)
        attention = torch.cat([prompt_mask[rows, -L:], rollout.mask[rows, :T]], 1)
        yield rows, ids, attention, T


def update(model, optimizer, rollout, advantages, config, reference=None):
    """`config.updates` optimiser steps on one rollout; advantages [N, T]. Returns their mean statistics.

    The denominator is that of the whole update, so the gradient does not depend on how many micro-batches or
    processes there are. The old log-probabilities are the sampler's: no pass is spent on them. Below float32
    the sampler rounds differently, so they are the first update's own, and its ratios are 1.
    """
    training_mode(model)
    G = config.group_size
    shared = 1 if config.gradient_checkpointing else G  # responses that share one computation of their prompt
    denominator = sum(gather(loss_denominator(rollout.mask, config.loss)))
    tokens = sum(gather(int(rollout.mask.sum())))
    old_logprobs = rollout.logprobs.clone()  # [N, T]
    coef = torch.zeros_like(advantages)  # [N, T]
    totals = defaultdict(float)
    for number in range(config.updates):
        for rows, ids, attention, T in micro_batches(rollout, G, config.micro_batch):
            mask = rollout.mask[rows, :T]
            with precision(config.device, config.dtype):
                logprobs = token_logprobs(model, ids, attention, T, config.temperature, shared)  # [n, T]
            if number == 0 and config.dtype != "float32":  # the policy has not changed yet
                old_logprobs[rows, :T] = logprobs.detach()
            old = old_logprobs[rows, :T]
            advantage = advantages[rows, :T]
            method = (config.loss, config.clip, denominator)
            loss, stats = policy_loss(logprobs, old, advantage, mask, G, *method)
            if reference is not None:
                with torch.no_grad(), precision(config.device, config.dtype):
                    reference_logprobs = token_logprobs(reference, ids, attention, T, config.temperature, G)
                loss = loss + config.kl * k3(logprobs, reference_logprobs).sum() / tokens
            loss.backward()
            coef[rows, :T] = stats["coef"]
            totals["loss"] += loss.item()
            for name in ("clip_fraction", "approx_kl"):
                totals[name] += stats[name] * float(mask.sum() / tokens)
        totals["grad_norm"] += descend(model, optimizer, config.max_grad_norm) / WORLD
        groups = zip(coef.split(G), rollout.ids.split(G), rollout.mask.split(G))
        residuals = [cancellation_residual(*group) for group in groups if group[0].any()]
        totals["residual"] += fmean(residuals or [0.0]) / WORLD
    means = {name: sum(gather(total)) / config.updates for name, total in totals.items()}
    return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}  # JSON has no NaN


# ==================================================================================================
# 8. The loop: sample, verify, relevance, advantages, update
#
# In: models, tasks, settings.  Out: a trained policy, and a line of metrics a step.  `train_step` is the
# opening picture in code; `train` repeats it.  What a step draws at random follows from the run's seed and
# the number of the step alone, so a broken run goes on from a checkpoint as if nothing had happened.


class Models(NamedTuple):
    policy: Policy
    optimizer: torch.optim.Optimizer  # of the policy
    discriminator: RelevanceDiscriminator | None
    judge: Policy | None  # for rubrics that no rule can decide
    reference: torch.nn.Module | None  # for --kl


def step_tasks(tasks, step, config):
    """A step's tasks, and a seed for sampling each: of `config.prompts`, those of this process."""
    rng = random.Random(f"{config.seed} {step}")
    torch.manual_seed(rng.getrandbits(62))  # for what torch draws: the pairs of `fit`, `shuffled`
    drawn = rng.choices(tasks, k=config.prompts)
    seeds = [rng.getrandbits(62) for _ in drawn]
    return drawn[RANK::WORLD], seeds[RANK::WORLD]


def roll_out(policy, tasks, group_size, seeds, config):
    """Sample `group_size` responses to each task with the run's settings; seeds: one a task -> Rollout."""
    prompts = [encode_prompt(policy.tokenizer, task.prompt) for task in tasks]
    with precision(config.device, config.dtype):
        return sample(
            policy.model,
            prompts,
            group_size,
            config.max_new_tokens,
            config.temperature,
            end_ids=policy.end_ids,
            seeds=seeds,
        )


def scored_tokens(relevance, evidence, wanted, mask):
    """relevance, evidence [N, K, T] at the response tokens of the rubrics wanted [N, K]: two tensors [M]."""
    valid = (wanted != 0)[..., None] & (mask[:, None] > 0)  # [N, K, T]
    return relevance[valid].cpu(), evidence[valid].cpu()


def token_relevance(discriminator, tasks, rollout, verdicts, evidence, known, config):
    """Relevance [N, K, T] by the source that was asked for, and a dict: how near a learned one comes."""
    if config.relevance == "uniform":
        return torch.ones_like(evidence), {}
    if config.relevance == "shuffled":
        return shuffled(evidence, rollout.mask), {}
    if config.relevance == "evidence" or config.alpha == 0:  # where alpha is 0, nothing uses it
        return evidence, {}
    criteria = criteria_of(tasks, verdicts)
    wanted = verdicts
    if config.partition in CONTESTED:
        grouped = verdicts.view(len(tasks), config.group_size, -1)  # [P, G, K]
        differs = (grouped != grouped[:, :1]).any(1, keepdim=True)  # [P, 1, K]
        wanted = (grouped * differs).view_as(verdicts)
    relevance = discriminator.predict(criteria, rollout.ids, rollout.mask, wanted)
    # measured before it learns from these responses
    f1, auroc = f1_and_auroc(*scored_tokens(relevance, evidence, wanted * known, rollout.mask))
    discriminator.fit(criteria, rollout.ids, rollout.mask, evidence, known)
    return relevance, dict(f1=f1, auroc=auroc)


def batch_advantages(rewards, verdicts, relevance, mask, config):
    """Section 5 for each group of a batch: rewards [N], verdicts [N, K], relevance [N, K, T] -> [N, T].

    Also returns the token level's share, mean |alpha * a| / mean |A|; None where no response level is left.
    """
    advantages = []
    response_push = 0.0
    token_push = 0.0
    G = config.group_size
    groups = zip(rewards.split(G), verdicts.split(G), relevance.split(G), mask.split(G))
    for R, s, w, m in groups:  # [G], [G, K], [G, K, T], [G, T]
        response_adv = response_advantage(R)  # [G]
        token_adv = token_advantage(s, w, m, config.partition, pool=config.pool)  # [G, T]
        advantages.append(combine_advantages(response_adv, token_adv, m, config.alpha))
        response_push += float((response_adv[:, None] * m).abs().sum())
        token_push += float((config.alpha * token_adv * m).abs().sum())
    return torch.cat(advantages), token_push / response_push if response_push else None


@contextmanager
def timed(seconds, phase):
    """Set seconds[phase] to what the block takes."""
    start = time.perf_counter()
    yield
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()  # kernels run on after the call that started them
    seconds[phase] = time.perf_counter() - start


def train_step(models, tasks, seeds, config):
    """The pipeline of the opening picture, once. Returns a row of metrics, and what `credit` needs.

    Of several processes, the metrics are of its own prompts; those of `update` are of all.
    """
    policy = models.policy
    seconds = {}
    with timed(seconds, "seconds_rollout"):
        rollout = roll_out(policy, tasks, config.group_size, seeds, config)  # ids, mask, logprobs [N, T]
    with timed(seconds, "seconds_verify"):
        _, verdicts, evidence, known = grade(policy.tokenizer, rollout, tasks, models.judge)
        rewards = response_reward(verdicts, config.reward)  # [N, K] -> [N]
    with timed(seconds, "seconds_relevance"):
        relevance, quality = token_relevance(
            models.discriminator, tasks, rollout, verdicts, evidence, known, config
        )  # [N, K, T]
    with timed(seconds, "seconds_update"):
        advantages, token_share = batch_advantages(rewards, verdicts, relevance, rollout.mask, config)
        stats = update(policy.model, models.optimizer, rollout, advantages, config, models.reference)
    tokens = int(rollout.mask.sum())
    grouped = rewards.view(-1, config.group_size)  # [P, G]
    equal = (grouped == grouped[:, :1]).all(1)  # [P] groups without a response level
    row = dict(
        reward=float(rewards.mean()),
        instruction=float(response_reward(verdicts, "aon").mean()),
        rubric=float(response_reward(verdicts.view(-1), "csr")),
        entropy=float(rollout.entropy.sum() / tokens),  # in nats a token
        truncated=float(rollout.truncated.float().mean()),
        zero_variance=float(equal.float().mean()),
        token_share=token_share,
        tokens=tokens,
        seconds=sum(seconds.values()),
        tokens_per_second=tokens / sum(seconds.values()),
    )
    return row | quality | stats | seconds, (tasks[0], rollout, verdicts, relevance, evidence, known)


def progress(items, what):
    """A progress bar, in a terminal, of the one process that speaks."""
    return tqdm(items, what, disable=RANK > 0 or None, leave=False)


def warm_up(models, tasks, config):
    """Train the discriminator, not the policy, on `warmup` rollouts: the steps up to 0."""
    policy = models.policy
    for step in progress(range(1 - config.warmup, 1), "warm-up"):
        drawn, seeds = step_tasks(tasks, step, config)
        rollout = roll_out(policy, drawn, config.group_size, seeds, config)
        _, verdicts, evidence, known = grade(policy.tokenizer, rollout, drawn, models.judge)
        for _ in range(4):  # a rollout costs more than a step of the discriminator
            models.discriminator.fit(criteria_of(drawn, verdicts), rollout.ids, rollout.mask, evidence, known)


def train(models, train_tasks, eval_tasks, out, config, done=0):
    """Warm-up, then the steps after `done`: a line of metrics.jsonl each, sometimes a checkpoint."""
    if models.discriminator and done == 0:
        warm_up(models, train_tasks, config)
    bar = progress(range(done + 1, config.steps + 1), "train")
    for step in bar:
        row, example = train_step(models, *step_tasks(train_tasks, step, config), config)
        measured = config.eval_every and step % config.eval_every == 0 and step < config.steps
        if measured:
            result, _ = evaluate(models.policy, eval_tasks[: config.eval_prompts], config, models.judge)
            row |= {f"eval_{name}": result[name] for name in ("instruction", "rubric", "truncated")}
        if RANK == 0:
            write_rows(out / "metrics.jsonl", [dict(step=step) | row], "a")
        if RANK == 0 and (measured or step in (1, config.steps)):
            group = credit(models, config, *example)
            write_rows(out / "credit.jsonl", [dict(step=step) | group], "a")
            write_page(out, config)
            save_checkpoint(out, models, step)
        if measured:  # last: a terminal that fails must not cost what is to be written
            line = "step {:>4}: reward {reward:.3f}, entropy {entropy:.2f}, residual {residual:.2f}; "
            line += "held-out {eval_instruction:.1%} / {eval_rubric:.1%}"
            tqdm.write(line.format(step, **row))
        bar.set_postfix_str(f"reward {row['reward']:.2f}, entropy {row['entropy']:.2f}")


# ==================================================================================================
# 9. Measuring, showing, saving
#
# In: what the loop has made.  Out: accuracies on held-out prompts, with every response and its evidence; a
# page that shows which token is paid for what; checkpoints.


def record(index, task, text, truncated, verdicts, known):
    """One response as responses.jsonl has it: evidence in characters, null where a judge gave the verdict."""
    rubrics = []
    for rubric, verdict, by_rule in zip(task.rubrics, verdicts, known):
        evidence = verify(rubric, text).evidence if by_rule else None
        row = dict(id=rubric.id, criterion=rubric.criterion, satisfied=verdict > 0, evidence=evidence)
        rubrics.append(row)
    return dict(index=index, prompt=task.prompt, response=text, truncated=truncated, rubrics=rubrics)


def evaluate(policy, tasks, config, judge=None, discriminator=None):
    """Accuracy on held-out tasks, one response each, every time from the same random numbers.

    Returns a dict of shares, and the records of all responses. The shares: of prompts with all rubrics
    satisfied ("instruction"), of rubrics ("rubric", and each id), of responses "truncated"; with a
    discriminator also its "f1" and "auroc", on the first process's prompts.
    """
    records = []
    scored = []
    mine = range(RANK, len(tasks), WORLD)
    size = config.prompts * config.group_size  # as many responses as a step has
    for start in progress(range(0, len(mine), size), "evaluate"):
        seeds = mine[start : start + size]
        part = [tasks[n] for n in seeds]
        rollout = roll_out(policy, part, 1, seeds, config)
        texts, verdicts, evidence, known = grade(policy.tokenizer, rollout, part, judge)  # [N, K], [N, K, T]
        truncated = rollout.truncated.tolist()
        records += map(record, seeds, part, texts, truncated, verdicts.tolist(), known.tolist())
        if discriminator:
            criteria = criteria_of(part, verdicts)
            relevance = discriminator.predict(criteria, rollout.ids, rollout.mask, verdicts)
            scored.append(scored_tokens(relevance, evidence, known, rollout.mask))
    records = sum(gather(records), [])
    records.sort(key=lambda each: each["index"])
    met = defaultdict(list, instruction=[], rubric=[], truncated=[])  # in this order
    for each in records:
        met["instruction"].append(all(rubric["satisfied"] for rubric in each["rubrics"]))
        met["truncated"].append(each["truncated"])
        for rubric in each["rubrics"]:
            met["rubric"].append(rubric["satisfied"])
            met[rubric["id"]].append(rubric["satisfied"])
    result = {name: fmean(values) for name, values in met.items()}
    if scored:
        relevance = torch.cat([part for part, _ in scored])
        evidence = torch.cat([part for _, part in scored])
        result["f1"], result["auroc"] = f1_and_auroc(relevance, evidence)
    return result, records


def table(before, after):
    """What evaluate measured before and after training, in per cent."""
    lines = [f"{'held-out prompts, %':<42}{'before':>9}{'after':>9}{'change':>9}"]
    for name, x in before.items():
        y = after[name]
        lines.append(f"{name:<42}{100 * x:>9.1f}{100 * y:>9.1f}{100 * (y - x):>+9.1f}")
    return "\n".join(lines)


def write_rows(path, rows, mode="w"):
    """Write a file of JSON lines; mode "a": add to it."""
    with open(path, mode, encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path):
    """The rows of a file of JSON lines; one that was cut off at the end is left out."""
    with open(path, encoding="utf-8", errors="replace") as file:  # a character may be cut in two
        return [json.loads(line) for line in file if line.endswith("\n")]


def rounded(tensor):
    """A tensor as lists of numbers that are short to write."""
    return tensor.double().round(decimals=6).tolist()


def credit(models, config, task, rollout, verdicts, relevance, evidence, known):
    """The first group of a step in numbers, for every partition and loss: a dict, for data/credit.html.

    The ratios are those of the policy as it is now, after the step's update, to the sampler. The run's own
    loss has the run's clip, the others their default, but TGC's are without the group clip, which would hide
    how they cancel.
    """
    policy = models.policy
    G = config.group_size
    K = len(task.rubrics)
    ids = rollout.ids[:G]  # [G, T]
    mask = rollout.mask[:G]
    old_logprobs = rollout.logprobs[:G]
    verdicts = verdicts[:G, :K]
    relevance = relevance[:G, :K]
    if models.discriminator and config.partition in CONTESTED:  # the step left out what other partitions need
        every = models.discriminator.predict(criteria_of([task], verdicts), ids, mask, verdicts)
        agreed = (verdicts == verdicts[:1]).all(0)[:, None]  # [K, 1]
        relevance = torch.where(agreed, every, relevance)
    joined = torch.cat([rollout.prompt_ids[:1].expand(G, -1), ids], 1)
    attention = torch.cat([rollout.prompt_mask[:1].expand(G, -1), mask], 1)
    with torch.no_grad(), precision(config.device, config.dtype):
        logprobs = token_logprobs(policy.model, joined, attention, ids.shape[1], config.temperature, G)
    rewards = response_reward(verdicts, config.reward)  # [G]
    response_adv = response_advantage(rewards)  # [G]
    partitions = {}
    for partition in PARTITIONS:
        token_adv = token_advantage(verdicts, relevance, mask, partition, pool=config.pool)
        advantage = combine_advantages(response_adv, token_adv, mask, config.alpha)
        part = dict(token_advantage=rounded(token_adv), advantage=rounded(advantage), coef={}, residual={})
        for loss in CLIP:
            clip = (1.0, math.inf) if loss in TGC else CLIP[loss]
            clip = config.clip if loss == config.loss else clip
            _, stats = policy_loss(logprobs, old_logprobs, advantage, mask, G, loss, clip)
            part["coef"][loss] = rounded(stats["coef"])
            part["residual"][loss] = cancellation_residual(stats["coef"], ids, mask)
        partitions[partition] = part
    written = [row[:n] for row, n in zip(ids.tolist(), mask.sum(1).tolist())]
    texts, tokens = token_spans(policy.tokenizer, written)
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    return dict(
        prompt=task.prompt,
        rubrics=[rubric.criterion for rubric in task.rubrics],
        ids=written,
        texts=texts,
        spans=tokens,
        verdicts=verdicts.tolist(),
        known=known[:G, :K].tolist(),
        relevance=rounded(relevance),
        evidence=rounded(evidence[:G, :K]),
        reward=rounded(rewards),
        response_advantage=rounded(response_adv),
        logprob=rounded(old_logprobs),
        ratio=rounded(ratio),
        partitions=partitions,
    )


def write_page(out, config):
    """data/credit.html in the run's folder, with the numbers of credit.jsonl and metrics.jsonl."""
    chosen = {name: getattr(config, name) for name in ("partition", "loss", "alpha", "reward", "relevance")}
    groups = read_rows(out / "credit.jsonl")
    data = dict(title=out.name, setting=chosen, groups=groups, metrics=read_rows(out / "metrics.jsonl"))
    page = (DATA / "credit.html").read_text(encoding="utf-8")
    text = json.dumps(data, ensure_ascii=False).replace("<", r"\u003c")  # no text can end the script
    (out / "credit.html").write_text(page.replace('"DATA"', text, 1), encoding="utf-8")


def trained(models):
    """What training changes, by name: the parts of a checkpoint."""
    parts = dict(policy=models.policy.model, optimizer=models.optimizer)
    if models.discriminator:
        parts["discriminator"] = models.discriminator
        parts["discriminator_optimizer"] = models.discriminator.optimizer
    return parts


def save_checkpoint(out, models, done):
    """Everything that the rest of a run depends on, in one file, which is never half written."""
    state = {name: part.state_dict() for name, part in trained(models).items()}
    torch.save(state | dict(done=done), out / "checkpoint.new")
    os.replace(out / "checkpoint.new", out / "checkpoint.pt")


def load_checkpoint(out, models):
    """Put all back as it was at the checkpoint, if there is one. Returns how many steps were done."""
    done = 0
    if (out / "checkpoint.pt").is_file():
        state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        done = state["done"]
        for name, part in trained(models).items():
            part.load_state_dict(state[name])
    for path in (out / "metrics.jsonl", out / "credit.jsonl"):
        if RANK == 0 and path.is_file():
            rows = [row for row in read_rows(path) if row["step"] <= done]  # later steps are done again
            write_rows(out / "rows.new", rows)
            os.replace(out / "rows.new", path)  # a full disk must not cost what is there
    return done


def save_results(policy, out, config, before, after, records):
    """The trained policy, the held-out responses, the table: what a finished run leaves."""
    write_rows(out / "responses.jsonl", records)
    if not config.eval_only:
        policy.model.generation_config.eos_token_id = policy.end_ids
        policy.model.save_pretrained(out / "policy")
        policy.tokenizer.save_pretrained(out / "policy")
    (out / "result.json").write_text(json.dumps(dict(before=before, after=after), indent=2) + "\n")


# ==================================================================================================
# 10. Main: the command line, the models, a run
#
# In: the command line.  Out: a run.  What is wrong is said in one line, of settings and data before any model
# is loaded.

MAY_BE_ZERO = ("rubrics", "seed", "alpha", "warmup", "kl", "eval_every")


def checked(config):
    """The settings with "auto" and short names filled in. Raises BadInput for what is not possible."""
    for name, value in vars(config).items():
        if type(value) in (int, float) and not (0 < value < 2**62 or value == 0 and name in MAY_BE_ZERO):
            least = "at least 0" if name in MAY_BE_ZERO else "above 0"
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be {least}, and below 2**62")
    if config.group_size < 2:
        raise BadInput("--group-size 1: must be at least 2, or there is nothing to compare with")
    if config.clip and (len(config.clip) != 2 or not all(x > 0 for x in config.clip)):
        raise BadInput("--clip: needs two numbers above 0, how far a ratio may go below and above 1")
    if config.prompts % WORLD:
        raise BadInput(f"--prompts {config.prompts}: {WORLD} processes cannot share them equally")
    best = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
    if config.device not in ("auto", "cpu", best):
        raise BadInput(f"--device {config.device}: there is none here, only {' and '.join({'cpu', best})}")
    config.device = best if config.device == "auto" else config.device
    if config.dtype == "auto":
        config.dtype = "bfloat16" if config.device == "cuda" else "float32"
    for name in ("model", "data", "judge"):
        value = getattr(config, name)
        if value and Path(value).exists():  # so that --resume finds it from anywhere
            setattr(config, name, os.path.abspath(value))
        elif re.fullmatch(r"Qwen[\w.-]+", value):
            setattr(config, name, f"Qwen/{value}")
    return config


def parse(argv=None):
    """The command line -> Config. Raises BadInput; argparse leaves with status 2 for what it cannot read."""
    about = "Train a language model on rubrics with token-level credit: RTT-GRPO and TGC's losses."
    options = dict(prog="rtt.py", usage=argparse.SUPPRESS, allow_abbrev=False, description=about)
    parser = transformers.HfArgumentParser(Config, **options)
    unset = argparse.Namespace(**dict.fromkeys(vars(Config())))  # None, so that no default takes its place
    values = vars(parser.parse_args(argv, unset))
    given = {name: value for name, value in values.items() if value is not None}
    if "resume" not in given:
        defaults = {} if "model" in given else EMBEDDED
        return checked(Config(**defaults | given))
    resume = given["resume"]
    if given.keys() - {"resume", "steps", "device"}:
        raise BadInput(f"--resume {resume}: only --steps and --device may be given beside it")
    try:
        kept = dict(json.loads((Path(resume) / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        kept = {}
    if kept.keys() != vars(Config()).keys():
        raise BadInput(f"--resume {resume}: its config.json is not that of a run of this version")
    return checked(Config(**kept | given))


def load_both(path, rubrics, eval_only):
    """Tasks to train on, and held-out ones: train and eval.jsonl of a folder, or a file's last tenth.

    rubrics: keep only prompts with as many; 0: all. eval_only: eval.jsonl of a folder, or all of a file.
    """
    if Path(path).is_dir():
        train_tasks = [] if eval_only else load_tasks(path, "train")
        eval_tasks = load_tasks(path, "eval")
    else:
        tasks = load_tasks(path)
        cut = 0 if eval_only else len(tasks) - max(1, len(tasks) // 10)
        train_tasks = tasks[:cut]
        eval_tasks = tasks[cut:]
    if rubrics:
        train_tasks = [task for task in train_tasks if len(task.rubrics) == rubrics]
        eval_tasks = [task for task in eval_tasks if len(task.rubrics) == rubrics]
    if not eval_tasks or not (train_tasks or eval_only):
        raise BadInput(f"{path} (--rubrics {rubrics}): needs a prompt to train on and one that is held out")
    return train_tasks, eval_tasks


def turn_end(tokenizer):
    """The special token that the chat template writes behind an answer, or None.

    Not always the tokenizer's end token: base models of Qwen have <|endoftext|>, their template <|im_end|>.
    """
    if tokenizer.chat_template:
        _, found, after = render(tokenizer, "question", "~answer~").rpartition("~answer~")
        for token in token_ids(tokenizer, after if found else ""):
            if token in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[token].special:
                return token
    return None


def load_policy(name, config, dtype):
    """A Policy, of a folder or a hub id. Raises BadInput if it cannot be used."""
    try:
        settings = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        if getattr(settings, "quantization_config", None):
            raise ValueError("it is quantised; only weights in floating point can be trained")
        text_settings = settings.get_text_config()
        for key, value in vars(text_settings).items():
            if "drop" in key and isinstance(value, float):
                setattr(text_settings, key, 0.0)  # dropout would turn ratios into noise
        options = dict(config=settings, dtype=dtype, use_safetensors=True)  # no pickles, no remote code
        model = AutoModelForCausalLM.from_pretrained(name, **options)
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable()
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = "cannot be used, from here or the hub; python rtt.py alone needs no download"
        raise BadInput(f"model {name}: {reason}: {str(error).strip()}") from None
    lacking = {"cache", "position_ids", "logits_to_keep"} - inspect.signature(model.forward).parameters.keys()
    kinds = set(getattr(text_settings, "layer_types", None) or [])
    if lacking or kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        raise BadInput(f"model {name}: only attention's past can be shared by a group; it has other layers")
    generation = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, turn_end(tokenizer)}
    ends = ends.union(generation if isinstance(generation, list) else [generation]) - {None}
    if not ends:
        raise BadInput(f"model {name}: neither its tokenizer nor its generation_config has an end token")
    return Policy(model.to(config.device), tokenizer, sorted(ends))


def load_models(tasks, config):
    """All models of a run. Raises BadInput."""
    policy = load_policy(config.model, config, torch.float32)
    longest = max(len(encode_prompt(policy.tokenizer, task.prompt)) for task in tasks)
    room = context_length(policy.model.config)
    if not 0 < longest <= room - config.max_new_tokens:  # 0: an empty tokenizer
        sizes = f"a prompt of {longest} tokens and --max-new-tokens {config.max_new_tokens}"
        raise BadInput(f"model {config.model}: {sizes} do not fit into its context of {room}")
    judge = None
    discriminator = None
    if any(needs_judge(rubric) for task in tasks for rubric in task.rubrics):
        name = config.judge or config.model
        judge = load_policy(name, config, getattr(torch, config.dtype))
        yes = first_tokens(judge.tokenizer, "yes")
        no = first_tokens(judge.tokenizer, "no")
        if yes <= no or no <= yes:
            raise BadInput(f"model {name}: cannot judge, for its tokenizer begins yes and no alike")
    if config.relevance == "discriminator" and config.alpha and not config.eval_only:
        base = copy.deepcopy(policy.model.base_model)
        discriminator = RelevanceDiscriminator(base, policy.tokenizer, config.discriminator_lr, config.dtype)
    reference = copy.deepcopy(policy.model) if config.kl else None
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=config.lr)
    return Models(policy, optimizer, discriminator, judge, reference)


def open_run(config):
    """The run's folder: a new one, or that of the run to be resumed. Raises BadInput if it holds anything."""
    out = Path(config.resume or config.out or time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}"))
    out = gather(out)[0]  # the first process's
    out.mkdir(parents=True, exist_ok=True)
    taken = [path.name for path in out.iterdir() if not path.name.startswith(".lock")]
    if any(gather(bool(taken))) and not config.resume:
        raise BadInput(f"--out {out}: is not empty; name a new folder, or go on with --resume {out}")
    return out


def run(config, train_tasks, eval_tasks, out):
    """Load, measure, train, measure again, save."""
    start = time.perf_counter()
    torch.manual_seed(config.seed)  # for the discriminator's head
    models = load_models(train_tasks + eval_tasks, config)
    before, records = evaluate(models.policy, eval_tasks, config, models.judge)
    print(f"before: held-out {before['instruction']:.1%} / {before['rubric']:.1%} (instruction / rubric)")
    done = load_checkpoint(out, models)
    if done > config.steps:
        raise BadInput(f"--steps {config.steps}: {done} are done already")
    if RANK == 0:
        (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
    after = before
    if not config.eval_only:
        train(models, train_tasks, eval_tasks, out, config, done)
        after, records = evaluate(models.policy, eval_tasks, config, models.judge, models.discriminator)
    print(f"\n{table(before, after)}\n")
    if "f1" in after:
        print(f"discriminator on held-out prompts: token F1 {after['f1']:.3f}, AUROC {after['auroc']:.3f}")
    if RANK == 0:
        save_results(models.policy, out, config, before, after, records)
    print(f"{time.perf_counter() - start:.0f} s in all; everything is in {out}")


def main(argv=None):
    """Run; where the input is bad, say so in one line and leave with status 2."""
    # On H100 and H200 torch prefers cuDNN's attention, whose backward pass gives NaN with padded masks
    # (pytorch issue 196678), and which plans anew for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has no need of it
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not end a run
    try:
        config = parse(argv)
        if WORLD > 1:  # torchrun: each process has a GPU of its own, and the first one speaks and writes
            if config.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
        tasks = load_both(config.data, config.rubrics, config.eval_only)
        out = open_run(config)
        with filelock.FileLock(out / f".lock{RANK}", timeout=0):  # one run at a time in a folder
            run(config, *tasks, out)
        if WORLD > 1:
            dist.barrier()  # none leaves while the first still writes: its end closes the others' connections
            dist.destroy_process_group()
    except (BadInput, FloatingPointError, OSError) as error:
        print(f"rtt.py: {error}".partition("\n")[0], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("rtt.py: interrupted; --resume FOLDER goes on from its last checkpoint", file=sys.stderr)
        sys.exit(130)


# ==================================================================================================
# Appendix: the other twenty verifiers of IFEval

SCRIPTS = {  # how the Unicode names of a script's letters begin: IFEval's languages that are written in it
    "LATIN": dict(en="English", es="Spanish", pt="Portuguese", fr="French", de="German", it="Italian")
    | dict(pl="Polish", vi="Vietnamese", sw="Swahili", fi="Finnish"),
    "CYRILLIC": dict(ru="Russian", uk="Ukrainian", bg="Bulgarian"),
    "ARABIC": dict(ar="Arabic", ur="Urdu", fa="Persian"),
    "DEVANAGARI": dict(hi="Hindi", ne="Nepali", mr="Marathi"),
    "BENGALI": dict(bn="Bengali"),
    "GUJARATI": dict(gu="Gujarati"),
    "GURMUKHI": dict(pa="Punjabi"),
    "TAMIL": dict(ta="Tamil"),
    "TELUGU": dict(te="Telugu"),
    "KANNADA": dict(kn="Kannada"),
    "MALAYALAM": dict(ml="Malayalam"),
    "THAI": dict(th="Thai"),
    "HEBREW": dict(he="Hebrew"),
    "HANGUL": dict(ko="Korean"),
    "CJK": {"zh-cn": "Chinese"},
    "HIRAGANA KATAKANA CJK": dict(ja="Japanese"),
}
LANGUAGES = {code: name for names in SCRIPTS.values() for code, name in names.items()}


def script_of(language):
    """The script of a language, and the languages that are written in it."""
    return next((script, names) for script, names in SCRIPTS.items() if language in names)


@verifier("language:response_language")
def response_language(text, language: LANGUAGES):
    """respond entirely in {language}"""
    scripts = tuple(script_of(language)[0].split())
    own = []
    foreign = []
    typical = False  # Japanese has kana
    for i, char in enumerate(text):
        name = unicodedata.name(char, "")
        if name.startswith(scripts):  # vowel signs, too
            own.append((i, i + 1))
        elif char.isalpha():
            foreign.append((i, i + 1))
        typical = typical or name.startswith(scripts[0])
    satisfied = typical and len(foreign) <= len(own)
    return satisfied, own if satisfied else foreign


@verifier("keywords:frequency")
def keywords_frequency(text, keyword: str, frequency: int, relation: RELATION):
    """use the word {keyword} {relation} {frequency} times"""
    return counted(spans(re.escape(keyword.strip()), text), relation, frequency)


@verifier("keywords:letter_frequency")
def letter_frequency(text, letter: str, let_frequency: int, let_relation: RELATION):
    """use the letter {letter} {let_relation} {let_frequency} times"""
    found = [(i, i + 1) for i, char in enumerate(text) if letter.lower() in char.lower()]
    return counted(found, let_relation, let_frequency)


@verifier("length_constraints:number_words")
def number_words(text, num_words: int, relation: RELATION):
    """write {relation} {num_words} words"""
    satisfied, _ = counted(spans(r"\w+", text), relation, num_words)
    return satisfied, end_of(text)


def divided(text, divider, parts):
    """The verdict on "exactly so many parts, none empty, with `divider` between them" (or at the ends)."""
    pieces = text.split(divider)
    marks = spans(re.escape(divider), text)
    doubled = [mark for mark, piece in zip(marks[1:], pieces[1:-1]) if not piece.strip()]
    if doubled or not any(piece.strip() for piece in pieces):
        return False, doubled or end_of(text)
    if not pieces[0].strip():  # one before the first part
        marks = marks[1:]
    if not pieces[-1].strip():  # one after the last
        marks = marks[:-1]
    return counted(marks, "exactly", parts - 1)


@verifier("length_constraints:number_paragraphs")
def number_paragraphs(text, num_paragraphs: int):
    """write {num_paragraphs} paragraphs with *** in between"""
    return divided(text, "***", num_paragraphs)


@verifier("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(text, num_paragraphs: int, nth_paragraph: int, first_word: str):
    """write {num_paragraphs} paragraphs; paragraph {nth_paragraph} begins with the word {first_word}"""
    starts = [0] + [end for _, end in spans(r"\n\n", text)]
    paragraphs = text.split("\n\n")
    filled = [start for start, paragraph in zip(starts, paragraphs) if paragraph.strip()]
    if nth_paragraph > len(filled):
        return False, []
    # as in IFEval, blank paragraphs count here
    word = re.match(r"\s*'*\"*([^\s.,?!'\"]+|\S?)", paragraphs[nth_paragraph - 1])
    place = starts[nth_paragraph - 1] + word.start(1)
    evidence = [(place, place + len(word[1]))] if word[1] else []
    begins = (word[1].lower() == first_word.lower(), evidence)
    breaks = [(start - 2, start) for start in filled[1:]]
    return all_of([begins, counted(breaks, "exactly", num_paragraphs - 1)])


@verifier("detectable_content:number_placeholders")
def number_placeholders(text, num_placeholders: int):
    """use at least {num_placeholders} [placeholders]"""
    found = spans(r"\[[^\]\n]*\]?", text)  # with those that stay open, for speed
    closed = [(start, end) for start, end in found if text[end - 1] == "]"]
    return counted(closed, "at least", num_placeholders)


@verifier("detectable_content:postscript")
def postscript(text, postscript_marker: str):
    """add a postscript that starts with {postscript_marker}"""
    marker = postscript_marker.strip()
    spaced = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    return counted(spans(spaced.get(marker, re.escape(marker)), text), "at least", 1)


@verifier("detectable_format:constrained_response")
def constrained_response(text):
    """say My answer is yes. or the same with no or maybe"""
    return counted(spans(r"My answer is (?:yes|no|maybe)\.", text, flags=0), "at least", 1)


@verifier("detectable_format:number_bullet_lists")
def number_bullet_lists(text, num_bullets: int):
    """write exactly {num_bullets} bullet points"""
    stars = spans(r"^[^\S\n]*(\*)[^*].*$", text)
    dashes = spans(r"^[^\S\n]*(-).*$", text)
    return counted(sorted(stars + dashes), "exactly", num_bullets)


@verifier("detectable_format:number_highlighted_sections")
def number_highlighted_sections(text, num_highlights: int):
    """*highlight* at least {num_highlights} sections"""
    marks = []
    for stars in (1, 2):
        for start, end in spans(rf"\*{{{stars}}}[^\n*]*\*{{{stars}}}", text):
            if text[start + stars : end - stars].strip():
                marks += [(start, start + stars), (end - stars, end)]
    return counted(marks, "at least", 2 * num_highlights)


@verifier("detectable_format:multiple_sections")
def multiple_sections(text, section_spliter: str, num_sections: int):
    """write {num_sections} sections marked {section_spliter} X"""
    pattern = re.escape(section_spliter.strip()) + r"\s?\d+"
    return counted(spans(pattern, text, flags=0), "at least", num_sections)


@verifier("detectable_format:json_format")
def json_format(text):
    """write all of it as JSON"""
    body = re.sub(r"^```(json|Json|JSON)?|```$", "", text.strip()).strip()
    start = text.rindex(body)
    end = start + len(body)
    try:
        json.loads(body)
    except (ValueError, RecursionError) as error:
        place = start + getattr(error, "pos", 0)
        return False, [(place, place + 1)] if place < end else end_of(text)
    return True, {(start, start + 1), (end - 1, end)}


@verifier("detectable_format:title")
def title(text):
    """give it a title in double angular brackets"""
    found = []
    for start, line_end in spans(r"<<[^\n]*", text):
        end = text.rfind(">>", start, line_end) + 2
        if text[start:end].lstrip("<").rstrip(">").strip():
            found.append((start, end))
    return counted(found, "at least", 1)


@verifier("combination:two_responses")
def two_responses(text):
    """give two different responses, with ****** in between"""
    parts = [part.strip() for part in text.split("******") if part.strip()]
    if len(parts) == 2 and parts[0] == parts[1]:
        return False, [(text.rindex(parts[1]), len(text.rstrip()))]
    return divided(text, "******", 2)


@verifier("combination:repeat_prompt")
def repeat_prompt(text, prompt_to_repeat: str):
    """first repeat word for word: {prompt_to_repeat}"""
    wanted = prompt_to_repeat.strip().lower()
    said = text.strip().lower()
    start = len(text) - len(text.lstrip())
    same = len(os.path.commonprefix([wanted, said]))
    if same == len(wanted):
        return True, [(start, min(start + same, len(text)))]
    if same == len(said):
        return False, end_of(text)
    place = min(start + same, len(text) - 1)
    return False, [(place, place + 1)]


@verifier("startend:quotation")
def quotation(text):
    """wrap everything in double quotation marks"""
    first = len(text) - len(text.lstrip())
    last = len(text.rstrip()) - 1
    closed = text[last] == '"' and last > first
    opening = (text[first] == '"', [(first, first + 1)])
    closing = (closed, [(last, last + 1)] if closed else end_of(text))
    return all_of([opening, closing])


@verifier("change_case:capital_word_frequency")
def capital_word_frequency(text, capital_frequency: int, capital_relation: RELATION):
    """capitalize {capital_relation} {capital_frequency} words"""
    capitals = [(start, end) for start, end in spans(r"\w+", text) if text[start:end].isupper()]
    return counted(capitals, capital_relation, capital_frequency)


@verifier("change_case:english_capital")
def english_capital(text):
    """write in capital letters only"""
    return text.isupper(), [(i, i + 1) for i, c in enumerate(text) if c != c.upper() or c.islower()]


@verifier("punctuation:no_comma")
def no_comma(text):
    """do not use commas"""
    commas = spans(",", text)
    return not commas, commas


if __name__ == "__main__":
    main()
