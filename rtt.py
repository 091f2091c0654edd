# SPDX-License-Identifier: MIT
r"""Rubrics to Tokens: reinforcement learning from rubrics with token-level credit, in one file.

A prompt comes with several rubrics (criteria). A reward for the whole response says at best how many were
met, not where. RTT (Rubrics to Tokens, arXiv:2604.02795) asks a small discriminator which tokens are
responsible for each verdict, and adds a token-level advantage to GRPO's response-level one. TGC (Token
Gradient Cancellation, arXiv:2604.13088) says that tokens which all responses of a group share should not
move, and changes the weights of the responses so that they do not. Both speak of one tensor: the coefficient
with which each token's log-probability is pushed up or down.

In GRPO the policy (the language model in training) answers each prompt with a group of sampled responses; all
that a step samples are its rollout. A response's advantage says how far its reward lies above the group's
mean, in standard deviations. It multiplies the gradient of each token's log-probability. The ratio of the new
to the old probability weighs tokens that an older policy sampled. The clip lets a token go (its weight
becomes 0) once its ratio has gone too far from 1 in the direction of its advantage.

    prompts with rubrics (1)
       | sample G responses to each (2)
       v
    ids [N, T] -- grade (3) ---> verdicts [N, K] --> rewards R [N] --> A [N] ------------.
       |                           | evidence [N, K, T]                                  |
       '--> discriminator (4) <----'                                                     v
                 '---> relevance w [N, K, T] ---> token advantage a [N, T] (5) ---> A + alpha * a
                                                                                         |
    policy <-- update (7) <-- coefficient c = advantage * weight [N, T] <----------------'
                                  weight: ratio, clipped, made exchangeable (6)

    symbol      shape      name in the code    meaning
    P, G, N                                    prompts; responses to each (a group); N = P * G, all responses
    K, L, T, V                                 rubrics; prompt tokens; response tokens; vocabulary
    M, n                                       some rows picked from a batch
    s           [N, K]     verdicts            +1 satisfied, -1 violated, 0 no such rubric
    w           [N, K, T]  relevance           in [0, 1]: is the token responsible for the verdict?
    R           [P, G]     rewards             "aon": all rubrics or nothing; "csr": share satisfied
    A           [P, G]     response_adv        (R - mean) / std over the group
    r = s * w   [G, K, T]  token_reward        three-dimensional reward space: response, rubric, token
    a           [G, T]     token_adv           r normalised over a partition of it, mean over rubrics
    A + alpha*a [N, T]     advantages          alpha: how much the token level counts
    -           [N, T]     ratio               new over old probability, of a token or of its whole response
    -           [N, T]     weight              what the update multiplies an advantage with (section 7)
    c           [N, T]     coef                advantage * weight: multiplies each grad log pi
    -           [N, T]     mask                1 at the tokens of a response, 0 at padding

    python rtt.py                         the embedded model and stories: minutes on a laptop, no download
    python rtt.py --model Qwen2.5-0.5B    a model of the hub, on data/instructions: on a GPU

Sections 1 to 8 are the method, in the order in which the data flows; section 9 is the command line.

Simpler than the papers, or different: rules verify the rubrics that they can (IFEval's); for the others a
model is asked whether they are met. The discriminator is not trained beforehand on labelled data, but online,
from the evidence that the rules give. `token_advantage` and `policy_weights` name what is ours. Adam, a
constant learning rate, one device.
"""

import copy
import functools
import hashlib
import inspect
import json
import math
import os
import random
import re
import runpy
import shutil
import sys
import time
import unicodedata
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import filelock
import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

DATA = Path(__file__).resolve().parent / "data"


def setting(default, text, choices=""):
    """One line of Config: the default of a setting, what --help says of it, and the words that it may be."""
    metadata = dict(help=text)
    if choices:
        metadata["choices"] = choices.split()
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """The settings of a run. These defaults suit a model of half a billion parameters on one GPU."""

    model: str = setting("", "model folder, or name on the hub such as Qwen2.5-0.5B; none: the embedded one")
    data: str = setting(str(DATA / "instructions"), "folder of train and eval.jsonl, a file, or a hub name")
    verifiers: str = setting("", "Python file with verifiers of your own")
    judge: str = setting("", "model that decides what no rule can; none: the starting policy")
    out: str = setting("", "new folder for all that the run writes; none: runs/<time>")
    resume: str = setting("", "folder of a run to go on with; only --steps, --device beside it")
    eval_only: bool = setting(False, "measure the model on the held-out prompts, do not train")
    seed: int = setting(0, "of everything random; with equal packages and threads a CPU repeats a run")
    device: str = setting("auto", "auto: the best there is", "auto cpu cuda mps")
    dtype: str = setting("auto", "of forward passes; auto: bfloat16 on cuda", "auto float32 bfloat16")

    steps: int = setting(100, "RL steps")
    prompts: int = setting(8, "prompts a step")
    group_size: int = setting(8, "responses to each prompt")
    max_new_tokens: int = setting(512, "length limit of a response, in tokens")
    temperature: float = setting(1.0, "of sampling")

    reward: str = setting("aon", "all rubrics or nothing; or the share of them satisfied", "aon csr")
    relevance: str = setting("discriminator", "see token_relevance", "discriminator evidence shuffled")
    partition: str = setting("intra", "see token_advantage; verdict is ours", "intra inter rubric verdict")
    alpha: float = setting(0.5, "weight of the token level; 0 is plain GRPO")
    discriminator_lr: float = setting(1e-5, "learning rate of the discriminator")
    warmup: int = setting(24, "rollouts (of a step each) that the discriminator learns from at first")

    loss: str = setting("grpo", "see policy_weights", "grpo grpo-fix grpo-mask gspo dfpo-min dfpo-orth")
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
# verdict and its *evidence*, the characters that it rests on: with others there, it might flip.  The verdict
# becomes the reward (section 3); the evidence is what the discriminator learns to find (section 4).  Data
# schema and verdicts are IFEval's (arXiv:2311.07911), in its strict reading.
#
# The five verifiers here show the kinds of evidence: a word that is there, one that must not be, what is
# counted, the end of the response, a property of the whole text.  A verdict that rests on no character (a
# forbidden word is absent) has none.  One that rests on the response ending where it does has the empty span
# (len, len), which stands for the end token.  IFEval's other twenty are in data/ifeval.py.

JUDGED = "judge"  # the id of a rubric that is a criterion in words, which no rule can check
MAY_NEED_JUDGE = (JUDGED, "language:response_language")  # ids of rubrics whose rule may not decide
VERIFIERS = {}  # rubric id -> a function (text, **kwargs) -> (satisfied, evidence)


class Verdict(NamedTuple):
    satisfied: bool | None  # None: no rule can tell, a judge must
    evidence: list[tuple[int, int]] | None  # spans: [start, end) in characters; None: a judge gave no reason


class Rubric(NamedTuple):
    id: str  # IFEval's instruction id, for example "keywords:existence", or JUDGED
    kwargs: dict  # its arguments, for example {"keywords": ["lamp"]}
    criterion: str  # the rubric in words: what the discriminator reads, and a judge


class Task(NamedTuple):
    prompt: str
    rubrics: list[Rubric]


def verifier(rubric_id):
    """Register the decorated function for `rubric_id`. Its docstring is the criterion, with {arguments}."""

    def register(function):
        VERIFIERS[rubric_id] = function
        return function

    return register


def end_of(text):
    """The evidence of a verdict that rests on the response ending where it does."""
    return [(len(text), len(text))]


def spans(pattern, text, flags=re.IGNORECASE | re.MULTILINE):
    """Where the regular expression matches (or its last group does, if it has one): a list of spans."""
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


# A word: letters, digits, the marks upon them (vowel signs, which \w leaves out), hyphens within; or U.S.A.
MARKS = "".join(mark for mark in map(chr, range(0x300, 0xFE00)) if unicodedata.category(mark)[0] == "M")
LETTER = rf"[\w{MARKS}\u200c\u200d]"
WORD = rf"(?:\w\.)+\w(?!\w)|\w{LETTER}*(?:-\w{LETTER}*)*"
UNSPACED = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"  # Thai, ..., Chinese


def whole_word(word):
    """The pattern of a word, not within a longer one; of its characters, in scripts without spaces."""
    pattern = re.escape(word.strip())
    return pattern if re.search(UNSPACED, word) else rf"(?<!{LETTER}){pattern}(?!{LETTER})"


def foreign_letters(text):
    """Spans of the letters that are not Latin where these are the most; else none: it may be English."""
    letters = [i for i, char in enumerate(text) if char.isalpha()]
    foreign = [(i, i + 1) for i in letters if not unicodedata.name(text[i], "").startswith("LATIN")]
    return foreign if 2 * len(foreign) > len(letters) else []


@verifier(JUDGED)
def in_words(text, criterion: str):
    """{criterion}"""
    return None, []


@verifier("keywords:existence")
def keywords_existence(text, keywords: list):
    """use the word {keywords}"""
    return all_of([counted(spans(re.escape(word), text), "at least", 1) for word in keywords])


@verifier("keywords:forbidden_words")
def keywords_forbidden_words(text, forbidden_words: list):
    """do not use the word {forbidden_words}"""
    found = sum([spans(whole_word(word), text) for word in forbidden_words], [])
    return not found, found


RELATION = ("at least", "less than")
SENTENCE_END = r"(?<![.!?])[.!?]+(?=[\s\"')\]*]|$)"


@verifier("length_constraints:number_sentences")
def number_sentences(text, num_sentences: int, relation: RELATION):
    """write {relation} {num_sentences} sentences"""
    if relation == "less than" and num_sentences == 1:
        raise ValueError("no response has less than 1 sentence")
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
    return True, [(max(end - len(phrase), 0), end)]  # lower() may have changed the length


@verifier("change_case:english_lowercase")
def english_lowercase(text):
    """write in English, in lowercase letters only"""
    capitals = [(i, i + 1) for i, char in enumerate(text) if char.istitle()]  # or a title-case letter
    foreign = foreign_letters(text)
    return (False, foreign) if foreign else (text.islower(), capitals)


def read_verifiers(path):
    """Run a file whose functions register themselves: its `rtt` is this module, whatever this one's name."""
    before = sys.modules.get("rtt")
    sys.modules["rtt"] = sys.modules[__name__]
    runpy.run_path(path)
    sys.modules["rtt"] = before or sys.modules["rtt"]


if (DATA / "ifeval.py").is_file():
    read_verifiers(DATA / "ifeval.py")


def answer_start(response):
    """Where the answer begins: behind the last </think>, if any; at the end if a thought stays open."""
    _, mark, answer = response.rpartition("</think>")
    if mark:
        return len(response) - len(answer.lstrip())
    return len(response) if response.lstrip().startswith("<think>") else 0


def verify(rubric, response):
    """Verdict and evidence of one rubric on one response; as in IFEval, a blank response satisfies none."""
    offset = answer_start(response)
    answer = response[offset:]
    if not answer.strip():
        return Verdict(False, end_of(response))
    satisfied, evidence = VERIFIERS[rubric.id](answer, **rubric.kwargs)
    return Verdict(satisfied, sorted((offset + start, offset + end) for start, end in evidence))


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
    words = {}  # the same for the criterion
    for name, kind in function.__annotations__.items():  # `text` has none
        value = kwargs.get(name)
        if not fits(value, kind):
            allowed = KINDS[kind] if isinstance(kind, type) else f"one of {', '.join(kind)}"
            raise BadInput(f"{rubric_id}: {name!r} must be {allowed}, not {json.dumps(value)}")
        kept[name] = int(value) if kind is int else value  # 3.0 is 3
        words[name] = ", ".join(value) if kind is list else kept[name]
        if isinstance(kind, dict):  # what it may be, and its name: a language
            words[name] = kind[value]
    function("a response", **kept)  # a verifier may refuse what cannot be: ValueError
    return Rubric(rubric_id, kept, function.__doc__.format(**words))


def make_task(row):
    """A checked Task from one row of data, whose field `rubrics` holds those in words only.

    Raises BadInput, or TypeError and the like for fields of other types.
    """
    ids = row.get("instruction_id_list") or []
    kwargs = row.get("kwargs") or []
    criteria = row.get("rubrics") or []
    if not fits(row.get("prompt"), str):
        raise BadInput("'prompt' must be a text that is not blank")
    if len(ids) != len(kwargs):
        raise BadInput("'instruction_id_list' and 'kwargs' must be lists of one length")
    if not isinstance(criteria, list) or not (ids or criteria):
        raise BadInput("no rubric: needs 'instruction_id_list' and 'kwargs', or 'rubrics', a list of texts")
    rubrics = [make_rubric(rubric_id, arguments or {}) for rubric_id, arguments in zip(ids, kwargs)]
    rubrics += [make_rubric(JUDGED, dict(criterion=text)) for text in criteria]
    return Task(row["prompt"], rubrics)


def load_tasks(path_or_hub_id, split="train"):
    """The tasks of a .jsonl file, of `split`.jsonl in a folder, or of a data set of that name on the hub.

    One JSON object a line: IFEval's fields `prompt`, `instruction_id_list` and `kwargs`, or `rubrics`, a list
    of criteria in words, or both. Raises BadInput, naming file and line, for the first row that is wrong.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        path = path / f"{split}.jsonl"
    if path.suffix in (".json", ".jsonl") or path.exists():
        lines = path.read_bytes().splitlines()
    else:
        import datasets  # slow to import, and local files do not need it

        try:
            lines = [json.dumps(row) for row in datasets.load_dataset(str(path_or_hub_id), split=split)]
        except Exception as error:  # the hub has many ways to fail; all mean that the data cannot be had
            raise BadInput(f"{path}: neither a local file nor to be had from the hub: {error}") from None
    tasks = []
    unread = set()
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                unread |= row.keys() - {"prompt", "instruction_id_list", "kwargs", "rubrics"}
                json.dumps(row, ensure_ascii=False).encode()  # fails for half of a surrogate pair
                tasks.append(make_task(row))
            except Exception as error:  # of JSON, of a field's type, or of a verifier that refuses arguments
                raise BadInput(f"{path}:{number}: not a row of this schema: {error}") from None
    if not tasks:
        raise BadInput(f"{path}: holds no prompt; at least one line is needed")
    if unread:
        print(f"{path}: fields that are not read: {', '.join(sorted(unread))}", file=sys.stderr)
    return tasks


# ==================================================================================================
# 2. Rollouts: sampling, and scoring what was sampled
#
# In: P prompts as token ids.  Out: G responses to each, N = P*G rows, with the log-probability of every
# sampled token.  Temperature is the only knob: a hidden top-k would make what is sampled differ from what is
# scored, and every ratio wrong from the start.  `token_logprobs` scores them again, with gradients.
# A prompt is computed once for its group: all of it but the last token, whose output predicts the first of
# the response, goes into a cache, which is then repeated for the group's rows.  (Not so in training with
# gradient checkpointing, which allows no cache.)


class Policy(NamedTuple):
    model: torch.nn.Module
    tokenizer: object
    end_ids: list[int]  # tokens that end a response


@dataclass
class Rollout:
    prompts: list[list[int]]  # P, as token ids
    ids: torch.Tensor  # [N, T] sampled tokens, the end token among them; right-padded
    mask: torch.Tensor  # [N, T] 1 where there is a sampled token
    logprobs: torch.Tensor  # [N, T] float32, of each sampled token when it was sampled
    entropy: torch.Tensor  # [N, T] float32, in nats, of the distribution that it was sampled from
    truncated: torch.Tensor  # [N] True where the response hit the length limit before its end token


def token_ids(tokenizer, text):
    """A text as token ids, nothing added before or behind."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def encode_prompt(tokenizer, prompt):
    """A prompt as token ids: through the chat template where there is one, as plain text where not.

    Thinking is switched off: by the template where it can, else by closing the thought that it opens.
    Raises BadInput for a template that leaves the prompt out.
    """
    if not tokenizer.chat_template:
        ids = tokenizer(prompt, split_special_tokens=True, verbose=False).input_ids
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers end every text
    options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    text = tokenizer.apply_chat_template([dict(role="user", content=prompt)], **options)
    if prompt.strip() not in text:
        raise BadInput(f"{tokenizer.name_or_path}: its chat template leaves the prompt out")
    if text.rstrip().endswith("<think>"):
        text = f"{text.rstrip()}\n\n</think>\n\n"
    return token_ids(tokenizer, text)


def left_padded(rows, pad_id, device):
    """Lists of token ids -> ids [P, L], mask [P, L]."""
    L = max(map(len, rows))
    ids = [[pad_id] * (L - len(row)) + row for row in rows]
    mask = [[0] * (L - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


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
    Leaves the model in evaluation mode. Raises ValueError for a temperature of 0 or another number of seeds,
    FloatingPointError for NaN weights.
    """
    seeds = torch.randint(2**62, (len(prompts),)).tolist() if seeds is None else seeds
    if temperature <= 0 or len(seeds) != len(prompts):
        raise ValueError(f"needs a temperature above 0, not {temperature}, and as many seeds as prompts")
    model.eval()
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniform = [torch.rand(group_size, max_new_tokens, generator=source) for source in sources]
    uniform = torch.cat(uniform).to(model.device)  # [N, max_new_tokens]
    ends = torch.tensor(list(end_ids), dtype=torch.long, device=model.device)
    prompt_ids, prompt_mask = left_padded(prompts, pad_id, model.device)  # [P, L]
    cache = prompt_cache(model, prompt_ids, prompt_mask, group_size)
    attention = prompt_mask.repeat_interleave(group_size, 0)  # [N, L], and a column more at every step
    token = prompt_ids.repeat_interleave(group_size, 0)[:, -1:]  # [N, 1]
    alive = torch.arange(len(token), device=model.device)  # the rows that have not ended
    ids = torch.full_like(uniform, pad_id, dtype=torch.long)  # [N, max_new_tokens], cut to [N, T] at the end
    mask = torch.zeros_like(ids)
    logprobs = torch.zeros_like(uniform)
    entropy = torch.zeros_like(uniform)
    for t in range(max_new_tokens):
        options = dict(attention_mask=attention, position_ids=attention.sum(1, keepdim=True) - 1)
        logits = model(token, cache=cache, use_cache=True, **options).logits
        logp = (logits[:, -1].float() / temperature).log_softmax(-1)  # [alive, V]
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
        attention = F.pad(attention[going], (0, 1), value=1)
    if not (logprobs + entropy).isfinite().all():
        raise FloatingPointError("the model's probabilities are not numbers: NaN or infinite weights")
    truncated = ~torch.isin(ids, ends).any(1)  # [N]
    sampled = [tensor[:, : t + 1] for tensor in (ids, mask, logprobs, entropy)]  # [N, T] each
    return Rollout(prompts, *sampled, truncated)


def precision(device, dtype):
    """The context of forward passes: autocast to bfloat16, or nothing. The weights stay in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def roll_out(policy, tasks, group_size, seeds, config):
    """Sample `group_size` responses to each task with the run's settings; seeds: one a task -> Rollout."""
    model, tokenizer, ends = policy
    prompts = [encode_prompt(tokenizer, task.prompt) for task in tasks]
    with precision(config.device, config.dtype):
        return sample(model, prompts, group_size, config.max_new_tokens, config.temperature, ends, 0, seeds)


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
    """
    if model.is_activation_checkpointing and torch.is_grad_enabled():
        group_size = 1  # layers that run twice would fill the cache twice
    L = ids.shape[1] - num_response_tokens
    mask = attention_mask[:, L:].bool()  # [N, T]
    cache = None
    start = 0  # the first column that each row computes for itself
    if group_size > 1:
        start = L - 1
        cache = prompt_cache(model, ids[::group_size, :L], attention_mask[::group_size, :L], group_size)
    place = positions(attention_mask)[:, start:-1]
    keep = F.pad(mask, (L - 1 - start, 0))  # a token is predicted at the place before its own
    options = dict(attention_mask=attention_mask[:, :-1], position_ids=place, logits_to_keep=keep)
    logits = model(ids[:, start:-1], cache=cache, use_cache=group_size > 1, **options).logits  # [M, V]
    logprobs = chosen_logprobs(logits, ids[:, L:][mask], temperature)  # [M]
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, logprobs)


# ==================================================================================================
# 3. Reward: verdicts on what was sampled
#
# In: a rollout and its tasks.  Out: verdicts [N, K] in {+1, -1}, the evidence as tokens [N, K, T], and one
# reward a response.  Prompts have different numbers of rubrics: K is the largest in the batch, and a verdict
# of 0 means "no such rubric".  What no rule can verify, a model judges (RTT): is "yes" its likelier answer to
# whether the response meets the criterion?  A judge gives no evidence.


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


@functools.lru_cache(2**18)
def decoded(tokenizer, ids):
    """The text of these tokens, decoded behind an "a": alone, SentencePiece would drop a leading space."""
    anchor = token_ids(tokenizer, "a")[-1:]
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return tokenizer.decode([*anchor, *ids], **options)[1:]


def token_spans(tokenizer, ids):
    """Token ids -> their text, and for each token the span [start, end) of characters that it writes.

    Nothing is encoded again. A character that is spread over several tokens (byte-level BPE, emoji, Chinese)
    is written by each of them: "a" and two tokens that share one emoji have the spans (0, 1), (1, 2), (1, 2).
    """
    text = ""  # all whole characters so far
    tokens = []
    pending = ()  # ids since then
    start = 0  # of the next token
    for token in ids:
        pending = (*pending, token)
        piece = decoded(tokenizer, pending)
        whole = piece.rstrip("\ufffd")  # U+FFFD: bytes that are no character, or not yet
        end = len(text) + len(whole)
        tokens.append((start, end if whole == piece else end + 1))
        start = end
        if whole == piece:
            text += piece
            pending = ()
    return text + decoded(tokenizer, pending), tokens


def evidence_to_tokens(evidence, tokens):
    """Spans of characters, spans of tokens -> 0.0/1.0 a token: does it write one of these characters?

    An empty span counts as one character long: (len, len) then meets the end token, (len, len + 1).
    [(4, 7), (12, 12)] on tokens [(0, 3), (3, 7), (7, 12), (12, 13)] -> [0.0, 1.0, 0.0, 1.0].
    """
    characters = set()
    for start, end in evidence:
        characters.update(range(start, max(end, start + 1)))
    return [float(not characters.isdisjoint(range(start, end))) for start, end in tokens]


QUESTION = (
    "Here is a request, and a response to it.\n\nRequest:\n{}\n\nResponse:\n{}\n\n"
    "Does the response meet this criterion: {}\nAnswer yes or no. Answer:"
)


def context_length(model):
    """How many tokens a model can read; a huge number where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


@torch.no_grad()
def judge_yes(judge, questions, batch=64):
    """How sure a judge is of "yes": P(yes) / (P(yes) + P(no)) of the tokens that begin them (RTT).

    judge: a Policy. questions: M texts -> [M]. A question too long for the judge loses its beginning.
    """
    yes = list({token_ids(judge.tokenizer, form)[0] for form in ("yes", "Yes", " yes", " Yes")})
    no = list({token_ids(judge.tokenizer, form)[0] for form in ("no", "No", " no", " No")})
    room = context_length(judge.model)
    sure = []
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        rows = [encode_prompt(judge.tokenizer, question)[-room:] for question in part]
        ids, mask = left_padded(rows, 0, judge.model.device)  # [m, L]
        options = dict(attention_mask=mask, position_ids=positions(mask), use_cache=False, logits_to_keep=1)
        logits = judge.model(ids, **options).logits[:, -1].float()  # [m, V]
        margin = logits[:, yes].logsumexp(1) - logits[:, no].logsumexp(1)  # [m]
        sure.append(margin.sigmoid().cpu())
    return torch.cat(sure)


def grade(tokenizer, rollout, tasks, judge=None):
    """Verdicts on every response of a rollout, for every rubric of its prompt. judge: where no rule decides.

    Returns N texts; for each a list of Verdicts; verdicts [N, K], +1 satisfied, -1 violated, 0 none; evidence
    [N, K, T], 1 at the tokens that write it, else 0, and NaN where none is known: no such rubric, or a judge.
    """
    N, T = rollout.ids.shape
    G = N // len(tasks)
    K = max(len(task.rubrics) for task in tasks)
    verdicts = torch.zeros(N, K, dtype=torch.long)
    evidence = torch.full((N, K, T), math.nan)
    texts = []
    found = []
    questions = {}  # (response, rubric) -> question for the judge
    lengths = rollout.mask.sum(1) - (~rollout.truncated).long()  # [N] without the end token
    for i, (ids, length) in enumerate(zip(rollout.ids.tolist(), lengths.tolist())):
        task = tasks[i // G]
        text, tokens = token_spans(tokenizer, ids[:length])
        tokens.append((len(text), len(text) + 1))  # the end token
        texts.append(text)
        found.append([verify(rubric, text) for rubric in task.rubrics])
        for k, verdict in enumerate(found[i]):
            if verdict.satisfied is None:
                answer = text[answer_start(text) :]
                questions[i, k] = QUESTION.format(task.prompt, answer, task.rubrics[k].criterion)
            else:
                verdicts[i, k] = 1 if verdict.satisfied else -1
                marks = evidence_to_tokens(verdict.evidence, tokens) + [0.0] * T
                evidence[i, k] = torch.tensor(marks[:T])  # T: a truncated response lacks the end token
    if questions and judge is None:
        raise BadInput(f"a rule left its verdict to a judge, and there is none: see {MAY_NEED_JUDGE}")
    if questions:
        for (i, k), sure in zip(questions, judge_yes(judge, list(questions.values()))):
            found[i][k] = Verdict(bool(sure > 0.5), None)
            verdicts[i, k] = 1 if sure > 0.5 else -1
    device = rollout.ids.device
    return texts, found, verdicts.to(device), evidence.to(device)


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
# First come two helpers of training, its own and the policy's (section 7).


def training_mode(model):
    """Training mode for layers that checkpoint, which need it; evaluation mode for all else.

    Dropout, or a router's noise, would turn the ratios into noise.
    """
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)


def descend(model, optimizer, max_norm=1.0):
    """Clip the gradients, take a step, unless their norm is not finite. Returns the norm."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    if math.isfinite(norm):
        optimizer.step()
    else:
        tqdm.write(f"step of {type(model).__name__} skipped: gradient norm {norm}")
    optimizer.zero_grad()
    return norm


def statements(tasks, verdicts):
    """What the discriminator reads of each verdict in [N, K], but those that are 0: a list of (i, k, text).

    The text is "yes: use the word lamp" where response i satisfies rubric k, else "no: ...".
    """
    G = len(verdicts) // len(tasks)
    found = []
    for i, row in enumerate(verdicts.tolist()):
        for k, verdict in enumerate(row):
            if verdict:
                answer = "yes" if verdict > 0 else "no"
                found.append((i, k, f"{answer}: {tasks[i // G].rubrics[k].criterion}\n"))
    return found


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

    def forward(self, texts, ids, mask):
        """texts: M, as of `statements`; ids, mask: [M, T] -> [M, T] float32 logits of relevance."""
        rows = [token_ids(self.tokenizer, text) for text in texts]
        text_ids, text_mask = left_padded(rows, 0, ids.device)  # [M, C]
        joined = torch.cat([text_ids, ids], 1)  # [M, C + T] the response's tokens are the policy's own
        attention = torch.cat([text_mask, mask], 1)  # [M, C + T]
        options = dict(attention_mask=attention, position_ids=positions(attention), use_cache=False)
        with precision(ids.device, self.dtype):
            hidden = self.base(joined, **options).last_hidden_state  # [M, C + T, H]
            return self.head(hidden[:, -ids.shape[1] :]).squeeze(2).float()

    def batches(self, found, ids, mask, size):
        """Of `size` statements at a time: their responses i, their rubrics k, T, and logits [size, T]."""
        lengths = mask.sum(1).tolist()
        found = sorted(found, key=lambda statement: lengths[statement[0]])  # like lengths: less padding
        for start in range(0, len(found), size):
            i, k, texts = zip(*found[start : start + size])
            T = lengths[i[-1]]
            yield i, k, T, self(texts, ids[i, :T], mask[i, :T])

    @torch.no_grad()
    def predict(self, tasks, verdicts, ids, mask, batch=64):
        """verdicts [N, K], 0 where nothing is asked; ids, mask [N, T] -> relevance [N, K, T] in [0, 1]."""
        self.eval()
        relevance = torch.zeros(*verdicts.shape, ids.shape[1], device=ids.device)
        for i, k, T, logits in self.batches(statements(tasks, verdicts), ids, mask, batch):
            relevance[i, k, :T] = logits.sigmoid() * mask[i, :T]
        return relevance

    def fit(self, tasks, verdicts, ids, mask, evidence, pairs=48, batch=16):
        """One step of cross-entropy towards evidence [N, K, T], on random pairs of response and rubric.

        Not on those whose evidence is NaN, not known. At most `batch` pairs are in memory at a time.
        """
        training_mode(self)
        known = ~evidence[:, :, 0].isnan()
        every = statements(tasks, verdicts * known)
        chosen = [every[j] for j in torch.randperm(len(every))[:pairs].tolist()]
        total = sum(int(mask[i].sum()) for i, _, _ in chosen)  # tokens
        for i, k, T, logits in self.batches(chosen, ids, mask, batch):
            weight = mask[i, :T].float()
            loss = F.binary_cross_entropy_with_logits(logits, evidence[i, k, :T], weight, reduction="sum")
            (loss / total).backward()
        descend(self, self.optimizer)


def token_f1(relevance, evidence):
    """F1 at 0.5 of scores [M] against labels [M] in {0, 1}: the harmonic mean of precision and recall."""
    relevant = evidence > 0.5
    predicted = relevance > 0.5
    right = (relevant & predicted).sum()
    return float(2 * right / (relevant.sum() + predicted.sum()).clamp(min=1))


def token_relevance(discriminator, tasks, rollout, verdicts, evidence, config):
    """Relevance [N, K, T] by the source that was asked for, and the F1 of a learned one.

    "discriminator": learned. "evidence": what the rules say. "shuffled": the same marks on random tokens of
    the response, a control.
    """
    mask = rollout.mask
    known = ~evidence.isnan()  # [N, K, T]
    labels = evidence.nan_to_num(0)
    if config.relevance == "shuffled":
        keys = torch.rand(mask.shape).to(mask.device) - mask.float()  # [N, T] below 0 at tokens, so first
        order = keys.argsort(1)[:, None].expand_as(labels)  # [N, K, T]
        return labels.gather(2, order) * mask[:, None], None
    if discriminator is None:
        return labels, None
    wanted = verdicts  # [N, K]
    if config.partition == "verdict":  # there, where a group agrees, the advantage is 0 (section 5)
        grouped = wanted.view(len(tasks), config.group_size, -1)  # [P, G, K]
        differs = (grouped != grouped[:, :1]).any(1, keepdim=True)  # [P, 1, K]
        wanted = (grouped * differs).view_as(wanted)
    relevance = discriminator.predict(tasks, wanted, rollout.ids, mask)
    scored = (wanted != 0)[..., None] & (mask[:, None] > 0) & known  # [N, K, T]
    # before it learns from these responses
    f1 = token_f1(relevance[scored], labels[scored]) if scored.any() else None
    discriminator.fit(tasks, verdicts, rollout.ids, mask, evidence)
    return relevance, f1


# ==================================================================================================
# 5. Advantages: response level and token level
#
# In: for one prompt, rewards [G], verdicts [G, K], relevance [G, K, T].  Out: A [G] and a [G, T]; RTT-GRPO's
# advantage is A[:, None] + alpha * a.  The response level is GRPO's.  The token level lives in RTT's
# three-dimensional reward space r[i, k, t] = verdict * relevance.  Which entries of r share one mean and one
# standard deviation?  That is RTT's group partitioning problem; the partitions below differ in a line or two.


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
    """(x - mean) / (std + eps) over the entries along `dim` where mask is 1; x must be 0 where mask is 0."""
    count = mask.sum(dim, keepdim=True).clamp(min=1)
    mean = x.sum(dim, keepdim=True) / count
    centred = (x - mean) * mask
    std = (centred.square().sum(dim, keepdim=True) / count).sqrt()
    return centred / (std + eps).clamp(min=1e-12)


@torch.no_grad()
def token_advantage(verdicts, relevance, mask, partition="intra", eps=0.1):
    """Token-level advantage [G, T] of one group: token rewards, normalised over a partition of them (RTT).

    verdicts [G, K] in {+1, -1}, 0 for no rubric; relevance [G, K, T] in [0, 1]; mask [G, T]. No gradient.
    partition: see the branches; "verdict" is ours: shared tokens cancel where their relevance is the same.
    Returns the mean over a response's rubrics (RTT's release can also sum: alpha * K here).
    Raises ValueError for another partition or shape.

    One rubric, satisfied by two responses for their third token, violated by the last for its second. All
    begin with the same token: its pushes should sum to 0. verdicts [[1], [1], [-1]], relevance
    [[[0, 0, 1, 0]], [[0, 0, 1, 0]], [[0, 1, 0, 0]]], with eps = 1e-9, give
                          the first response         the last response           sum at the first token
      "intra"             [-.58, -.58, 1.73, -.58]   [.58, -1.73, .58, .58]      -.58
      "inter", "rubric"   [-.17, -.17, 1.86, -.17]   [-.17, -2.20, -.17, -.17]   -.51
      "verdict"           [0, 0, .71, 0]             [0, -1.41, 0, 0]            0
    If all responses were satisfied, "intra", "inter" and "rubric" would still push (sum -1.73).

    eps is large on purpose. r lies in [-1, 1]. One relevant token of 40 makes a std of 0.16, while a
    discriminator that sees nothing anywhere still makes one of 0.01 from noise: with eps = 0.1 the first
    keeps most of its credit, and the noise is not blown up to full size.
    """
    signs = verdicts.float()  # [G, K]
    exists = (signs != 0).float()  # [G, K]
    valid = mask[:, None].float() * exists[..., None]  # [G, K, T]
    if relevance.shape != valid.shape or verdicts.dtype == torch.bool:
        raise ValueError(f"verdicts must be +1, -1, 0, relevance [G, K, T] = {list(valid.shape)}")
    relevance = relevance.float().masked_fill(valid == 0, 0.0)  # [G, K, T]
    token_reward = signs[..., None] * relevance  # [G, K, T]
    rubrics = exists.sum(1).clamp(min=1)[:, None]  # [G, 1]
    if partition == "intra":  # RTT: over the tokens of each response and rubric
        advantage = masked_normalize(token_reward, valid, 2, eps)
    elif partition == "inter":  # RTT: over the tokens of all responses, for each rubric
        advantage = masked_normalize(token_reward, valid, (0, 2), eps)
    elif partition == "rubric":  # RTT: over the tokens of all responses, after the mean over the rubrics
        return masked_normalize(token_reward.sum(1) / rubrics, mask.float(), (0, 1), eps)
    elif partition == "verdict":  # ours: verdicts over the responses, only then spread by relevance
        advantage = masked_normalize(signs, exists, 0, eps)[..., None] * relevance
    else:
        raise ValueError(f"partition must be intra, inter, rubric or verdict, not {partition!r}")
    return advantage.sum(1) / rubrics  # [G, T]


# ==================================================================================================
# 6. Exchangeability: transformations of the weights, and the learning tax  (TGC)
#
# In: a group's weights and response-level advantages.  Out: weights under which shared tokens cancel.
# Any group objective has the gradient sum_i sum_t c[i, t] * grad log pi(y[i, t]), where pi is the policy,
# y[i, t] token t of response i, and c = advantage * weight the effective coefficient.  A token that all
# responses share in the same context has the same gradient in all of them: it moves by sum_i c[i, t].
# Sharing it made no response better than another, so the sum should be 0: it must not matter in which
# response a shared token stands.  A group's response-level advantages sum to 0.  Multiplied by weights that
# differ between the responses they do not, unless these are first made equal, or orthogonal to the
# advantages.  What is left over is the learning tax: the policy drifts, and no response is the better for it.
#
# What leaves something over: PPO's one-sided clip, which lets a token go in some responses and not in others,
# by the signs of their advantages ("grpo"); one ratio for a whole response, and the division by its length
# |y|, even on policy ("gspo").  A token's own ratio is harmless: the same token after the same text has one.
#
# Token-level advantages must sum to 0 by themselves; no weight does that for them.  Those of "verdict" do
# (section 5), where a shared token has the same relevance in all responses, which a learned relevance only
# comes near to.  Those of "intra" do not: on policy they are the whole residual in the log.


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
# 7. The update: six weights, one loss
#
# In: log-probabilities with gradient, those of the sampler, advantages, all [N, T].  Out: a changed policy.
# Every method is a weight [N, T] that has no gradient.  The loss (but for the penalty of --kl) is always
#     -sum(weight * logprobs * advantages) / denominator
# with the gradient -c / denominator, c = advantages * weight, at each log-probability: section 6's c.
# The loss's value means nothing: the weight is the slope of an objective such as PPO's, not the objective.
#
# Once the policy has moved from the one that sampled (off policy: --updates above 1), a weight has two
# duties: at the response level shared tokens must cancel (TGC), and a token that has been pushed far enough
# must be let go (PPO's clip).  "grpo" sees to the second, TGC's losses to the first; with the group clip,
# which is ours, they see to both, and so does "grpo-mask".

CLIP = {  # how far below and above 1 a ratio may go; a response's ratio moves far less than a token's
    "grpo": (0.2, 0.2),
    "grpo-mask": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),  # GSPO's own (arXiv:2507.18071), made for long responses
    # of TGC's losses that of the group clip; (1, inf) switches it off, which is their published form
    "grpo-fix": (0.2, 0.2),
    "dfpo-min": (0.02, 0.02),
    "dfpo-orth": (0.02, 0.02),
}


@torch.no_grad()
def policy_weights(logprobs, old_logprobs, advantages, mask, group_size, loss="grpo", clip=None):
    """What multiplies each token's log-probability besides its advantage: [N, T], 0 at padding. No gradient.

    logprobs, old_logprobs, advantages, mask: [N, T], groups of `group_size` consecutive rows; float32, for in
    half precision a ratio near 1 is mostly rounding. clip: (low, high), by default CLIP's. Divide the loss by
    the number of tokens, for "gspo" by that of responses. Raises ValueError for an unknown loss or shape.

    PPO's objective is min(ratio * A, clip(ratio) * A). Its slope is the ratio, or 0 where a token has gone
    far enough in the direction of its advantage: A > 0 and ratio > 1 + high, or A < 0 and ratio < 1 - low.
    On the other side it is still pulled back. With a clip of 0.2, (ratio, A) -> weight:
    (1.5, 1) -> 0;  (0.5, 1) -> 0.5;  (1.5, -1) -> 1.5;  (0.5, -1) -> 0.
    """
    if mask.dim() != 2 or len(mask) % group_size or loss not in CLIP:
        raise ValueError(f"needs [N, T], N a multiple of group_size, and a loss of {', '.join(CLIP)}")
    low, high = clip or CLIP[loss]
    real = mask > 0
    log_ratio = (logprobs - old_logprobs).masked_fill(~real, 0.0)  # [N, T]
    length = mask.sum(1, keepdim=True).clamp(min=1)  # [N, 1] |y|
    if loss in ("gspo", "dfpo-min", "dfpo-orth"):  # one ratio a response: the geometric mean of its tokens'
        log_ratio = (log_ratio.sum(1, keepdim=True) / length).expand_as(mask)
    ratio = log_ratio.clamp(max=20).exp()  # [N, T], not infinite
    far_up = ratio > 1 + high
    far_down = ratio < 1 - low
    far_enough = (far_up & (advantages > 0)) | (far_down & (advantages < 0))  # PPO's clip
    group_ratio = ratio[:, 0].view(-1, group_size)  # [P, G] where a response has one ratio
    if loss == "grpo":
        weight = ratio * ~far_enough
    elif loss == "grpo-mask":  # a clip for both signs of the advantage (IcePop, arXiv:2510.18855)
        weight = ratio * ~(far_up | far_down)
    elif loss == "gspo":  # each response counts alike, whatever its length
        weight = ratio * ~far_enough / length
    elif loss == "grpo-fix":  # TGC: held within 0.2 of 1, which a group clip of 0.2 has done already
        weight = ratio.clamp(0.8, 1.2)
    elif loss == "dfpo-min":  # TGC: one weight for the group
        weight = min_replace(group_ratio).reshape(-1, 1)  # [N, 1]
    elif loss == "dfpo-orth":  # TGC: cancels where all tokens of a response have one advantage
        mean_advantage = advantages.masked_fill(~real, 0.0).sum(1, keepdim=True) / length  # [N, 1]
        weight = adv_orthogonal(group_ratio, mean_advantage.view(-1, group_size)).reshape(-1, 1)  # [N, 1]
    if loss in ("grpo-fix", "dfpo-min", "dfpo-orth"):
        # group clip (ours): one ratio outside lets all of the group go, so what cancels still does
        outside = (far_up | far_down).view(-1, group_size * mask.shape[1]).any(1)  # [P]
        weight = weight * ~outside.repeat_interleave(group_size)[:, None]
    return weight * real


def k3(log_p, log_q):
    """Schulman's k3 estimate of KL(p || q) at tokens sampled from p, elementwise: never below 0.

    Mask the log-probabilities before, not the result after: at padding the exponential may be infinite.
    """
    difference = log_q - log_p
    return difference.expm1() - difference  # expm1: exp - 1 would leave nothing of a small difference


def micro_batches(rollout, group_size, groups):
    """Whole groups, `groups` at a time, those of like length together: rows [n], ids and mask [n, L + T], T.

    Whole, because section 6 needs all of a group's ratios, and because a prompt is then computed once.
    """
    longest = rollout.mask.sum(1).view(-1, group_size).amax(1)  # [P]
    every = torch.arange(len(rollout.ids), device=longest.device).view(-1, group_size)  # [P, G]
    for part in longest.argsort(stable=True).split(groups):
        rows = every[part].view(-1)  # [n]
        T = int(longest[part].max())
        prompts = [rollout.prompts[row // group_size] for row in rows.tolist()]
        prompt_ids, prompt_mask = left_padded(prompts, 0, rows.device)  # [n, L]
        ids = torch.cat([prompt_ids, rollout.ids[rows, :T]], 1)
        attention = torch.cat([prompt_mask, rollout.mask[rows, :T]], 1)
        yield rows, ids, attention, T


def update(model, optimizer, rollout, advantages, config, reference=None):
    """`config.updates` optimiser steps on one rollout with advantages [N, T]. Returns their mean statistics.

    clip_fraction (of the tokens, those let go), approx_kl (k3 of sampler and policy), grad_norm, residual.

    The denominator is the whole update's: micro-batches do not change the gradient. The old log-probabilities
    are the sampler's: no pass is spent on them. Below float32 the sampler rounds differently, so they are the
    first update's own, and its ratios are 1.
    """
    training_mode(model)
    G = config.group_size
    tokens = int(rollout.mask.sum())
    denominator = len(rollout.mask) if config.loss == "gspo" else tokens
    old_logprobs = rollout.logprobs.clone()  # [N, T]
    totals = defaultdict(float)
    for number in range(config.updates):
        residuals = []
        for rows, ids, attention, T in micro_batches(rollout, G, config.micro_batch):
            mask = rollout.mask[rows, :T]
            with precision(config.device, config.dtype):
                logprobs = token_logprobs(model, ids, attention, T, config.temperature, G)  # [n, T]
            if number == 0 and config.dtype != "float32":  # the policy has not changed yet
                old_logprobs[rows, :T] = logprobs.detach()
            old = old_logprobs[rows, :T]
            advantage = advantages[rows, :T]
            weight = policy_weights(logprobs, old, advantage, mask, G, config.loss, config.clip)  # [n, T]
            loss = -(weight * logprobs * advantage).sum() / denominator
            if reference is not None:
                with torch.no_grad(), precision(config.device, config.dtype):
                    reference_logprobs = token_logprobs(reference, ids, attention, T, config.temperature, G)
                loss = loss + config.kl * k3(logprobs, reference_logprobs).sum() / tokens
            loss.backward()
            coef = weight * advantage  # [n, T]
            groups = zip(coef.split(G), ids[:, -T:].split(G), mask.split(G))
            residuals += [cancellation_residual(*group) for group in groups if group[0].any()]
            totals["clip_fraction"] += float(((weight == 0) * mask).sum() / tokens)
            totals["approx_kl"] += float(k3(old, logprobs.detach()).sum() / tokens)
        totals["grad_norm"] += descend(model, optimizer, config.max_grad_norm)
        totals["residual"] += fmean(residuals or [0.0])
    means = {name: total / config.updates for name, total in totals.items()}
    return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}  # JSON has no NaN


# ==================================================================================================
# 8. The loop: sample, grade, relevance, advantages, update
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
    """A step's tasks, and a seed for sampling each."""
    rng = random.Random(f"{config.seed} {step}")
    torch.manual_seed(rng.getrandbits(62))  # for what torch draws: the pairs of `fit`, `shuffled`
    drawn = rng.choices(tasks, k=config.prompts)  # with replacement
    return drawn, [rng.getrandbits(62) for _ in drawn]


@contextmanager
def timed(seconds, phase):
    """Set seconds[phase] to what the block takes."""
    start = time.perf_counter()
    yield
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()  # kernels run on after the call that started them
    seconds[phase] = time.perf_counter() - start


def train_step(models, tasks, seeds, config):
    """The pipeline of the opening picture, once. Returns a row of metrics."""
    policy = models.policy
    G = config.group_size
    seconds = {}
    with timed(seconds, "seconds_rollout"):
        rollout = roll_out(policy, tasks, G, seeds, config)  # ids, mask, logprobs [N, T]
    mask = rollout.mask
    with timed(seconds, "seconds_verify"):
        _, _, verdicts, evidence = grade(policy.tokenizer, rollout, tasks, models.judge)  # [N, K], [N, K, T]
        rewards = response_reward(verdicts, config.reward).view(-1, G)  # [N, K] -> [P, G]
    with timed(seconds, "seconds_relevance"):
        relevance, f1 = token_relevance(models.discriminator, tasks, rollout, verdicts, evidence, config)
    with timed(seconds, "seconds_update"):
        response_adv = response_advantage(rewards)  # [P, G]
        groups = zip(verdicts.split(G), relevance.split(G), mask.split(G))
        token_adv = torch.cat([token_advantage(*group, config.partition) for group in groups])  # [N, T]
        response_level = response_adv.view(-1, 1) * mask  # [N, T]
        token_level = config.alpha * token_adv  # [N, T]
        advantages = response_level + token_level
        stats = update(policy.model, models.optimizer, rollout, advantages, config, models.reference)
    tokens = int(mask.sum())
    response_push = float(response_level.abs().sum())
    row = dict(
        reward=float(rewards.mean()),
        instruction=float(response_reward(verdicts, "aon").mean()),  # responses with all rubrics met
        rubric=float(response_reward(verdicts.view(-1), "csr")),  # rubrics met, of all responses
        entropy=float(rollout.entropy.sum() / tokens),  # in nats a token
        truncated=float(rollout.truncated.float().mean()),
        zero_variance=float((response_adv == 0).all(1).float().mean()),  # groups without a response level
        token_share=float(token_level.abs().sum()) / response_push if response_push else None,
        f1=f1,
        tokens=tokens,
        seconds=sum(seconds.values()),
        tokens_per_second=tokens / sum(seconds.values()),
    )
    return row | stats | seconds


def evaluate(policy, tasks, config, judge=None):
    """Accuracy on held-out tasks, one response each, every time from the same random numbers.

    Returns the shares of prompts with all rubrics satisfied ("instruction"), of rubrics ("rubric", and each
    id) and of responses "truncated", and the rows of responses.jsonl.
    """
    rows = []
    met = defaultdict(list, instruction=[], rubric=[], truncated=[])  # in this order
    size = config.prompts * config.group_size  # as many responses as a step has
    for start in tqdm(range(0, len(tasks), size), "evaluate", disable=None, leave=False):
        part = tasks[start : start + size]
        rollout = roll_out(policy, part, 1, range(start, start + len(part)), config)
        texts, found, _, _ = grade(policy.tokenizer, rollout, part, judge)
        for task, text, verdicts, truncated in zip(part, texts, found, rollout.truncated.tolist()):
            rubrics = []
            for rubric, verdict in zip(task.rubrics, verdicts):
                met["rubric"].append(verdict.satisfied)
                met[rubric.id].append(verdict.satisfied)
                rubrics.append(rubric._asdict() | verdict._asdict())
            met["instruction"].append(all(verdict.satisfied for verdict in verdicts))
            met["truncated"].append(truncated)
            rows.append(dict(prompt=task.prompt, response=text, truncated=truncated, rubrics=rubrics))
    return {name: fmean(values) for name, values in met.items()}, rows


def write_rows(path, rows, mode="w"):
    """Write a file of JSON lines; mode "a": add to it."""
    with open(path, mode, encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def trained(models):
    """What training changes, by name: the parts of a checkpoint."""
    parts = dict(policy=models.policy.model, optimizer=models.optimizer)
    if models.discriminator:
        parts["discriminator"] = models.discriminator
        parts["discriminator_optimizer"] = models.discriminator.optimizer
    return parts


@contextmanager
def written_whole(path):
    """A file or folder is written beside `path` and then takes its name: it is there whole, or not at all.

    Whatever fails is an OSError: on a full disk torch and safetensors raise errors of their own.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        yield new
    except Exception as error:
        shutil.rmtree(new, ignore_errors=True)
        new.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written: {error}") from error
    shutil.rmtree(path, ignore_errors=True)  # an older folder; of a file the new one takes the place
    os.replace(new, path)


def save_checkpoint(out, models, done):
    """What training has changed, how far it came, and how long metrics.jsonl was.

    With the run's config.json, its data, models and verifiers that is all that the rest depends on.
    """
    state = {name: part.state_dict() for name, part in trained(models).items()}
    size = (out / "metrics.jsonl").stat().st_size
    with written_whole(out / "checkpoint.pt") as path:
        torch.save(state | dict(done=done, metrics_size=size), path)


def load_checkpoint(out, models):
    """Put all back as it was at the checkpoint, if there is one. Returns how many steps were done."""
    if not (out / "checkpoint.pt").is_file():
        (out / "metrics.jsonl").unlink(missing_ok=True)
        return 0
    state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
    for name, part in trained(models).items():
        part.load_state_dict(state[name])
    os.truncate(out / "metrics.jsonl", state["metrics_size"])  # the later steps are done again
    return state["done"]


def warm_up(models, tasks, config):
    """Train the discriminator, not the policy, on `warmup` rollouts, the steps numbered up to 0."""
    policy = models.policy
    for step in tqdm(range(1 - config.warmup, 1), "warm-up", disable=None, leave=False):
        drawn, seeds = step_tasks(tasks, step, config)
        rollout = roll_out(policy, drawn, config.group_size, seeds, config)
        _, _, verdicts, evidence = grade(policy.tokenizer, rollout, drawn, models.judge)
        for _ in range(4):  # a rollout costs more than a step of the discriminator
            models.discriminator.fit(drawn, verdicts, rollout.ids, rollout.mask, evidence)


def train(models, train_tasks, eval_tasks, out, config, done=0):
    """Warm-up, then the steps after `done`: a line of metrics.jsonl each, at times a checkpoint."""
    if models.discriminator and not done:
        warm_up(models, train_tasks, config)
    for step in tqdm(range(done + 1, config.steps + 1), "train", disable=None, leave=False):
        tasks, seeds = step_tasks(train_tasks, step, config)
        row = dict(step=step) | train_step(models, tasks, seeds, config)
        last = step == config.steps
        measured = config.eval_every and step % config.eval_every == 0 and not last
        if measured:
            result, _ = evaluate(models.policy, eval_tasks[: config.eval_prompts], config, models.judge)
            row |= {f"eval_{name}": result[name] for name in ("instruction", "rubric", "truncated")}
        write_rows(out / "metrics.jsonl", [row], "a")
        if measured or last:
            save_checkpoint(out, models, step)
        if measured:  # only now: a terminal that fails must not cost what is to be written
            line = "step {step:>4}: reward {reward:.3f}, entropy {entropy:.2f}, residual {residual:.2f}; "
            line += "held-out {eval_instruction:.1%} / {eval_rubric:.1%}"
            shown = {name: math.nan if value is None else value for name, value in row.items()}
            tqdm.write(line.format(**shown))


# ==================================================================================================
# 9. Main: the command line, the models, a run
#
# In: the command line.  Out: a run.  What is wrong with the input is said in one line, before anything is
# written.

LEAST = dict(group_size=2, seed=0, alpha=0, warmup=0, kl=0, eval_every=0)  # of a setting; others: above 0


def parse(argv=None):
    """The command line -> Config. Raises BadInput; argparse leaves with status 2 for what it cannot read."""
    # read twice: the model or the run that is named decides which defaults hold
    parser = transformers.HfArgumentParser(Config, description=__doc__.splitlines()[0], allow_abbrev=False)
    given = parser.parse_args(argv)
    kept = {} if given.model else EMBEDDED
    if given.resume:
        kept = json.loads(Path(given.resume, "config.json").read_text())
        kept.pop("digest", None)
        if kept.keys() != vars(given).keys():
            raise BadInput(f"--resume {given.resume}: its config.json is not that of a run of this version")
    parser.set_defaults(**kept)
    config = Config(**vars(parser.parse_args(argv)))
    free = dict(resume=config.resume, steps=config.steps, device=config.device)
    if config.resume and kept | free != vars(config):
        raise BadInput(f"--resume {config.resume}: only --steps and --device may be given beside it")
    for name, value in vars(config).items():
        if type(value) in (int, float) and not value >= LEAST.get(name, 1e-12):  # not >=: NaN, too
            allowed = f"at least {LEAST[name]}" if name in LEAST else "above 0"
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be {allowed}")
    if config.clip and (len(config.clip) != 2 or min(config.clip) <= 0):
        raise BadInput("--clip: needs two numbers above 0, how far a ratio may go below and above 1")
    config.out = config.resume or config.out or time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}")
    if not config.resume and (Path(config.out).is_file() or any(Path(config.out).glob("*"))):
        raise BadInput(f"--out {config.out}: is not empty; name a new folder, or go on with --resume")
    for name in ("model", "data", "judge", "verifiers"):
        value = getattr(config, name)
        if value and Path(value).exists():  # so that --resume finds it from anywhere
            setattr(config, name, os.path.abspath(value))
        elif re.fullmatch(r"Qwen[\w.-]+", value):
            setattr(config, name, f"Qwen/{value}")
    if config.device == "auto":
        best = torch.accelerator.current_accelerator(check_available=True)
        config.device = best.type if best else "cpu"
    if config.dtype == "auto":
        config.dtype = "bfloat16" if config.device == "cuda" else "float32"
    return config


def load_data(config):
    """Tasks to train on, and held-out ones: train and eval.jsonl of a folder, or a file's last tenth.

    With --eval-only there are none to train on, and all of a file is held out.
    """
    if config.verifiers:
        read_verifiers(config.verifiers)
    if Path(config.data).is_dir():
        train_tasks = [] if config.eval_only else load_tasks(config.data, "train")
        return train_tasks, load_tasks(config.data, "eval")
    tasks = load_tasks(config.data)
    if config.eval_only:
        return [], tasks
    if len(tasks) == 1:
        raise BadInput(f"{config.data}: needs a prompt to train on and one that is held out")
    cut = len(tasks) - max(1, len(tasks) // 10)
    return tasks[:cut], tasks[cut:]


def turn_end(tokenizer):
    """The token that the chat template writes behind an answer, or None.

    Not always the tokenizer's end token: base models of Qwen have <|endoftext|>, their template <|im_end|>.
    """
    if tokenizer.chat_template:
        turns = [dict(role="user", content="question"), dict(role="assistant", content="~answer~")]
        text = tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False)
        for token in token_ids(tokenizer, text.partition("~answer~")[2]):
            if token in tokenizer.added_tokens_decoder:
                return token
    return None


def load_policy(name, config, dtype):
    """A Policy, of a folder or a hub id. Raises BadInput if it cannot be used."""
    try:
        settings = AutoConfig.from_pretrained(name)
        text_settings = settings.get_text_config()
        for key, value in vars(text_settings).items():
            if "drop" in key and isinstance(value, float):
                setattr(text_settings, key, 0.0)  # dropout would turn ratios into noise
        if getattr(settings, "quantization_config", None):
            raise ValueError("it is quantised; only weights in floating point can be trained")
        tokenizer = AutoTokenizer.from_pretrained(name)
        template_end = turn_end(tokenizer)  # a template is a program: it may raise anything
        options = dict(config=settings, dtype=dtype, use_safetensors=True)  # no pickles, no remote code
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except Exception as error:  # a folder, and the hub, have many ways to fail
        reason = "cannot be used, from here or the hub; python rtt.py alone needs no download"
        raise BadInput(f"model {name}: {reason}: {str(error).strip()}") from None
    lacking = {"cache", "position_ids", "logits_to_keep"} - inspect.signature(model.forward).parameters.keys()
    kinds = set(getattr(text_settings, "layer_types", None) or [])
    if lacking or kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        raise BadInput(f"model {name}: only attention's past can be shared by a group; it has other layers")
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ends = {*ends, tokenizer.eos_token_id, template_end} - {None}
    if not ends:
        raise BadInput(f"model {name}: neither its tokenizer nor its generation_config has an end token")
    # without fields of sampling: none is used here, and what does not fit together could not be saved
    special = dict(bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.generation_config = transformers.GenerationConfig(eos_token_id=sorted(ends), **special)
    return Policy(model.to(config.device), tokenizer, sorted(ends))


def load_models(tasks, config):
    """All models of a run. Raises BadInput."""
    policy = load_policy(config.model, config, torch.float32)
    read = [encode_prompt(policy.tokenizer, task.prompt) for task in tasks]  # what stands before a response
    learned = config.relevance == "discriminator" and config.alpha and not config.eval_only
    if learned:
        texts = {f"yes: {rubric.criterion}\n" for task in tasks for rubric in task.rubrics}
        read += [token_ids(policy.tokenizer, text) for text in texts]
    longest = max(map(len, read))
    room = context_length(policy.model)
    if longest + config.max_new_tokens > room:
        sizes = f"a prompt or criterion of {longest} tokens and --max-new-tokens {config.max_new_tokens}"
        raise BadInput(f"model {config.model}: {sizes} do not fit into its context of {room}")
    judge = None
    if any(rubric.id in MAY_NEED_JUDGE for task in tasks for rubric in task.rubrics):
        judge = load_policy(config.judge or config.model, config, getattr(torch, config.dtype))
    discriminator = None
    if learned:
        base = copy.deepcopy(policy.model.base_model)
        discriminator = RelevanceDiscriminator(base, policy.tokenizer, config.discriminator_lr, config.dtype)
    reference = copy.deepcopy(policy.model) if config.kl else None
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=config.lr)
    return Models(policy, optimizer, discriminator, judge, reference)


def run(config, train_tasks, eval_tasks):
    """Load, measure, train, measure again, save."""
    start = time.perf_counter()
    out = Path(config.out)
    digest = hashlib.sha256(repr((train_tasks, eval_tasks)).encode()).hexdigest()
    if config.resume and json.loads((out / "config.json").read_text()).get("digest") != digest:
        raise BadInput(f"--resume {config.resume}: {config.data} is not what it was when this run began")
    torch.manual_seed(config.seed)  # for the discriminator's head
    models = load_models(train_tasks + eval_tasks, config)
    policy = models.policy
    before, responses = evaluate(policy, eval_tasks, config, models.judge)
    after = before
    print(f"before: held-out {before['instruction']:.1%} / {before['rubric']:.1%} (instruction / rubric)")
    out.mkdir(parents=True, exist_ok=True)  # only now: a run that cannot begin leaves no folder
    with filelock.FileLock(out / ".lock", timeout=0):  # one run at a time
        if not config.resume and (out / "config.json").exists():
            raise BadInput(f"--out {out}: another run has begun there meanwhile")
        done = load_checkpoint(out, models)
        if done > config.steps:
            raise BadInput(f"--steps {config.steps}: {done} are done already")
        with written_whole(out / "config.json") as path:  # without it there is no --resume
            path.write_text(json.dumps(vars(config) | dict(digest=digest), indent=2))
        if not config.eval_only:
            train(models, train_tasks, eval_tasks, out, config, done)
            with written_whole(out / "policy") as folder:  # first what cost most
                policy.model.save_pretrained(folder)
                policy.tokenizer.save_pretrained(folder)
            after, responses = evaluate(policy, eval_tasks, config, models.judge)
        write_rows(out / "responses.jsonl", responses)
        (out / "result.json").write_text(json.dumps(dict(before=before, after=after), indent=2))
    print(f"\n{'held-out prompts, %':<42}{'before':>9}{'after':>9}{'change':>9}")
    for name, x in before.items():
        print(f"{name:<42}{100 * x:>9.1f}{100 * after[name]:>9.1f}{100 * (after[name] - x):>+9.1f}")
    print(f"\n{time.perf_counter() - start:.0f} s in all; everything is in {out}")
    if not config.eval_only:
        print(f"python data/explain.py {out} shows which token is paid for what")


def main(argv=None):
    """Run; where the input is bad, say so in one line and leave with status 2."""
    # On H100 and H200 torch prefers cuDNN's attention, whose backward pass gives NaN with padded masks
    # (pytorch issue 196678), and which plans anew for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.logging.disable_progress_bar()
    try:
        config = parse(argv)
        run(config, *load_data(config))
    except (BadInput, FloatingPointError, OSError) as error:
        print(f"rtt.py: {error}".partition("\n")[0], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("rtt.py: interrupted; --resume FOLDER goes on from its last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
