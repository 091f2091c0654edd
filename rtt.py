# SPDX-License-Identifier: MIT
r"""Rubrics to Tokens: reinforcement learning from rubrics with token-level credit, in one file.

A prompt comes with several rubrics (criteria). A reward for the whole response says whether all, or how
many, were met, not where. RTT (Rubrics to Tokens, arXiv:2604.02795) asks a small discriminator which
tokens are responsible for each verdict, and adds a token-level advantage to GRPO's response-level one.
TGC (Token Gradient Cancellation, arXiv:2604.13088) asks of any such objective that tokens which all
responses of a group share be left alone, and repairs the weights where they are not. Both speak of one
tensor: the coefficient with which each token's log-probability is pushed up or down.

In GRPO, on which both build, the policy (the language model in training) answers each prompt with a
group of rollouts (sampled responses). The advantage of a response is how far its reward lies above the
group's mean, in standard deviations; it multiplies the gradient of each token's log-probability. The
ratio of the new to the old probability weighs tokens that were sampled from an older policy (off
policy; at 1, on policy), and the clip stops pushing once the ratio has left a small range around 1.

    prompts with rubrics (1)
       | sample G responses to each (2)
       v
    ids [N, T] -- verify (3) --> verdicts [N, K] --> rewards R [N] --> A [G] ------------.
       |                           | evidence [N, K, T]                                  |
       '--> discriminator (4) <----'                                                     v
                 '---> relevance w [N, K, T] ---> token advantage a [G, T] (5) ---> A + alpha * a
                                                                                         |
    policy <-- update (7) <-- coefficient c = advantage * weight [N, T] <----------------'
                                  weight: ratio, clipped, made exchangeable (6)

    symbol      shape      name in the code    meaning
    P, G, N                                    prompts; responses to each (a group); N = P * G, all responses
    K, L, T, V                                 rubrics; prompt tokens; response tokens; vocabulary
    s           [N, K]     verdicts            +1 satisfied, -1 violated, 0 no such rubric
    w           [N, K, T]  relevance           in [0, 1]: is the token responsible for the verdict?
    R           [N]        rewards             "aon": all rubrics or nothing; "csr": share satisfied
    A           [G]        response_adv        (R - mean) / std over the group
    r = s * w   [G, K, T]  reward              three-dimensional reward space: response, rubric, token
    a           [G, T]     token_adv           r normalised over a partition of it, mean over rubrics
    A + alpha*a [N, T]     advantages          alpha: how much the token level counts
    rho, rho_i  [N, T] [N] ratio               new over old probability pi: of a token; of a response
    c           [N, T]     coef                advantage * weight: multiplies each grad log pi (gspo: / |y|)
    M                                          rows picked from a batch: tokens, or (response, rubric) pairs

Run it:

    python rtt.py            the embedded default: minutes on a laptop's CPU, nothing is downloaded
    python rtt.py --model Qwen2.5-0.5B    a model of the hub, on data/instructions: a GPU of 24 GB
    python rtt.py --help

What is simplified, and where this differs from the papers:
  - Rubrics are verified by rule where a rule can (IFEval's), else by a model that is asked for yes or no.
  - The discriminator learns online, from the verifiers' evidence on the policy's own rollouts, and
    reads each criterion with its verdict. RTT trains it beforehand, on labelled data. A judge gives no
    evidence: for criteria in words the discriminator relies on what it learned from the others.
  - `token_advantage` divides by std + 0.1, not by std (see there why). Its partitions "verdict",
    "contested" and "cross" are additions: what TGC's cancellation condition asks of RTT's token channel.
    "verdict" is the default, because it cancels; in long runs RTT's "intra" can fall where it holds (README).
  - IFEval asks a language detector, reads keywords as regular expressions, and splits sentences and
    words with NLTK. Here: the script of the letters (and the judge, where languages share it), literal
    text, and two rules (SENTENCE_END, WORD). A letter may be a sign such as #, where IFEval draws another.
  - Adam with a constant learning rate; several GPUs share the prompts (torchrun), but each holds all models.
"""

import argparse
import copy
import inspect
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import unicodedata
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GradientCheckpointingLayer,
    PreTrainedConfig,
    StaticCache,
)

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
HUB_ID = r"[\w-][\w.-]*(/[\w.-]+)?"
SAFE = dict(use_safetensors=True)  # how models are loaded: no pickles, no remote code


class BadInput(Exception):
    """What the user gave is wrong. The message is one line: what is wrong, where, and what is allowed."""


# ==================================================================================================
# 1. Rubrics: tasks, verdicts, evidence
#
# In: a data file; later a response.  Out: tasks (a prompt with its rubrics); later, for each rubric,
# a verdict and its *evidence*, the characters of the response that are responsible for the verdict.
# The verdict becomes the reward (section 3).  The evidence is what the token discriminator learns to
# find (section 4).  The data schema and the verdicts are IFEval's (arXiv:2311.07911), strict; a
# criterion in words, which no program here can check, is a rubric of the id JUDGED.
#
# Evidence is what the verdict rests on, the characters whose change would flip it: the comma, the
# keyword that is there, the bullets that are counted.  A verdict that rests on no character (a
# forbidden word that is absent, a keyword that is missing) has none.  A verdict that rests on the
# response ending where it does has the empty span (len, len): it stands for the end token.
# ==================================================================================================

JUDGED = "judge"  # the id of a rubric that is a criterion in words


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


VERIFIERS = {}  # by rubric id: a function (text, **kwargs) -> (satisfied, evidence), and its criterion


def verifier(rubric_id, criterion):
    """Register the decorated function for `rubric_id`. The criterion is a template over its kwargs."""

    def register(check):
        VERIFIERS[rubric_id] = check, criterion
        return check

    return register


def verify(rubric, response, prompt=""):
    """Verdict and evidence of one rubric on one response; as in IFEval, a blank response satisfies none.

    `prompt`: what it responds to; no rule here needs it. Raises ValueError for a criterion in words.
    """
    if not response.strip():
        return Verdict(False, end_of(response))
    if rubric.id == JUDGED:
        raise ValueError(f"no rule can verify {rubric.criterion!r}: it needs a judge")
    check, _ = VERIFIERS[rubric.id]
    satisfied, evidence = check(response, **rubric.kwargs)
    return Verdict(bool(satisfied), sorted(evidence))


def needs_judge(rubric):
    """Must a model judge it? A criterion in words, and a language whose script is not its own alone."""
    language = rubric.kwargs.get("language")
    return rubric.id == JUDGED or language is not None and ", " in SCRIPTS[LANGUAGES[language][1]]


SCRIPTS = {  # how the Unicode names of a script's letters begin: IFEval's codes of its languages, their names
    "LATIN": "en English, es Spanish, pt Portuguese, fr French, de German, it Italian, pl Polish, "
             "vi Vietnamese, sw Swahili, fi Finnish",
    "CYRILLIC": "ru Russian, uk Ukrainian, bg Bulgarian", "ARABIC": "ar Arabic, ur Urdu, fa Persian",
    "DEVANAGARI": "hi Hindi, ne Nepali, mr Marathi", "BENGALI": "bn Bengali", "GUJARATI": "gu Gujarati",
    "GURMUKHI": "pa Punjabi", "TAMIL": "ta Tamil", "TELUGU": "te Telugu", "KANNADA": "kn Kannada",
    "MALAYALAM": "ml Malayalam", "THAI": "th Thai", "HEBREW": "he Hebrew", "HANGUL": "ko Korean",
    "CJK": "zh-cn Chinese", "HIRAGANA KATAKANA CJK": "ja Japanese",
}  # fmt: skip
PAIRS = [(*pair.split(), script) for script, pairs in SCRIPTS.items() for pair in pairs.split(", ")]
LANGUAGES = {code: (name, script) for code, name, script in PAIRS}

# What an argument of a verifier may be: in words, and as a test. `make_rubric` reads it off the signature.
is_text = lambda value: isinstance(value, str) and bool(value.strip())
TEXT = "a text that is not empty", is_text
WORDS = "a list of words", lambda value: isinstance(value, list) and bool(value) and all(map(is_text, value))
ONE_WORD = "a single word", lambda value: is_text(value) and not re.search(r"[\s.,?!'\"]", value)
SIGN = "a single letter or sign", lambda value: is_text(value) and len(value) == 1
COUNT = "a whole number of at least 1", lambda n: type(n) in (int, float) and n >= 1 and n % 1 == 0
RELATION = '"at least" or "less than"', lambda value: value in ("at least", "less than")
LANGUAGE = f"one of {', '.join(LANGUAGES)}", lambda value: is_text(value) and value in LANGUAGES


def end_of(text):
    """The evidence of a verdict that rests on the response ending where it does."""
    return [(len(text), len(text))]


def spans(pattern, text, group=0, flags=re.IGNORECASE | re.MULTILINE):
    """Where the regular expression (or one group of it) matches: a list of spans."""
    return [match.span(group) for match in re.finditer(pattern, text, flags)]


def count_verdict(found, relation, bound):
    """The verdict on "at least / less than / exactly `bound` things", given the spans of the things found.

    Enough rests on all that were found, too many on the surplus, too few on no character.
    """
    surplus = {"at least": [], "exactly": found[bound:], "less than": found[bound - 1 :]}[relation]
    if len(found) < bound and not surplus:
        return relation == "less than", []
    return not surplus, surplus or found


def all_of(verdicts):
    """The verdict that all are satisfied. It rests on all of them, or on those that are not."""
    satisfied = all(fine for fine, _ in verdicts)
    return satisfied, sum((found for fine, found in verdicts if fine == satisfied), [])


def divided(text, divider, parts):
    """The verdict on "exactly so many parts, none empty, with `divider` between them (and at the ends)"."""
    marks, filled = spans(re.escape(divider), text), [bool(part.strip()) for part in text.split(divider)]
    doubled = [mark for mark, before in zip(marks[1:], filled[1:]) if not before]
    if doubled or not any(filled):
        return False, doubled or end_of(text)
    between = marks[1 - filled[0] : len(marks) - 1 + filled[-1]]  # none before the first part, after the last
    return count_verdict(between, "exactly", parts - 1)


@verifier("keywords:existence", "use the word {keywords}")
def keywords_existence(text, keywords: WORDS):
    """Every keyword occurs, in any case, also inside a longer word."""
    return all_of([count_verdict(spans(re.escape(word), text), "at least", 1) for word in keywords])


@verifier("keywords:forbidden_words", "do not use the word {forbidden_words}")
def keywords_forbidden_words(text, forbidden_words: WORDS):
    """No forbidden word occurs as a whole word."""
    found = sum((spans(rf"\b{re.escape(word)}\b", text) for word in forbidden_words), [])
    return count_verdict(found, "less than", 1)


@verifier("keywords:frequency", "use the word {keyword} {relation} {frequency} times")
def keywords_frequency(text, keyword: TEXT, frequency: COUNT, relation: RELATION):
    """The keyword occurs at least / less than `frequency` times."""
    return count_verdict(spans(re.escape(keyword.strip()), text), relation, frequency)


@verifier("keywords:letter_frequency", "use the letter {letter} {let_relation} {let_frequency} times")
def letter_frequency(text, letter: SIGN, let_frequency: COUNT, let_relation: RELATION):
    """The letter, in any case, or the sign occurs at least / less than `let_frequency` times."""
    found = [(i, i + 1) for i, char in enumerate(text) if letter.lower() in char.lower()]
    return count_verdict(found, let_relation, let_frequency)


@verifier("language:response_language", "respond entirely in {language}")
def response_language(text, language: LANGUAGE):
    """Half the letters or more are in the language's script. (IFEval asks a language detector.)"""
    scripts = tuple(LANGUAGES[language][1].split())
    names = [unicodedata.name(char, "") for char in text]
    own = [(i, i + 1) for i, name in enumerate(names) if name.startswith(scripts)]  # vowel signs, too
    foreign = [(i, i + 1) for i, c in enumerate(text) if c.isalpha() and not names[i].startswith(scripts)]
    typical = any(name.startswith(scripts[0]) for name in names)  # Japanese has kana
    satisfied = typical and len(foreign) <= len(own)
    return satisfied, own if satisfied else foreign


# Where a sentence ends, much as IFEval's trained splitter (NLTK's punkt) has it: at the last . ! ? or run of
# them in a stretch without white space, before white space, a bracket or a quotation mark. No end: dots or an
# abbreviation, unless a word that often begins sentences follows; an initial; 1. or A. before a small letter.
# "Mr. Fox ran. He won!" has two ends, 'He said "no." Then he left' one.
ABBREVIATIONS = r"Mr|Mrs|Ms|Dr|St|vs|Prof|Gen|Sen|Rep|Lt|Col|Jan|Feb|Aug|Sep|Sept|Oct|Nov|Dec|Inc|Ltd|Co"
ABBREVIATIONS += r"|Corp|Bros|Jr|Sr|U\.S|U\.K|a\.m|p\.m|Ph\.D|D\.C|J\.P"
STARTERS = r"(?=[A-Z])(?i:the|this|these|there|they|it|I|he|her|so|but|if|in|when|while|however|some|many)\b"
CLOSERS, WORD_START = r"\"')\]}‘’“”«»", r"(?<![\w.'’])"
NO_END = rf"(?:\.\.|{WORD_START}(?i:{ABBREVIATIONS})\.)(?=\s)(?!\s+{STARTERS})"
NO_END += rf"|{WORD_START}(?i:[c-hk-nprstvw])\.(?=\s)|(?:{WORD_START}[a-zA-Z]|(?<![a-zA-Z])\d)\.\s+[a-z]"
SENTENCE_END = rf"(?<!\S)(?!\S*(?:{NO_END}))\S*(?<![.!?])([.!?]+)(?=[\s{CLOSERS}(\[{{:;@*]|$)"


@verifier("length_constraints:number_sentences", "write {relation} {num_sentences} sentences")
def number_sentences(text, num_sentences: COUNT, relation: RELATION):
    """At least / less than so many sentences; a last one without a full stop counts."""
    found = spans(SENTENCE_END, text, 1, flags=0)
    if re.search(rf"[^\s{CLOSERS}]", text[found[-1][1] if found else 0 :]):
        found += end_of(text)
    satisfied, evidence = count_verdict(found, relation, num_sentences)
    return satisfied, evidence or end_of(text)


@verifier("length_constraints:number_words", "write {relation} {num_words} words")
def number_words(text, num_words: COUNT, relation: RELATION):
    """At least / less than so many words, each a run of letters with their marks, digits and underscores."""
    joined = "".join("_" if unicodedata.category(char)[0] == "M" else char for char in text)
    satisfied, _ = count_verdict(spans(r"\w+", joined), relation, num_words)
    return satisfied, end_of(text)


@verifier("length_constraints:number_paragraphs", "write {num_paragraphs} paragraphs with *** in between")
def number_paragraphs(text, num_paragraphs: COUNT):
    """Exactly so many paragraphs with *** between them."""
    return divided(text, "***", num_paragraphs)


@verifier(
    "length_constraints:nth_paragraph_first_word",
    "write {num_paragraphs} paragraphs; paragraph {nth_paragraph} begins with the word {first_word}",
)
def nth_paragraph_first_word(text, num_paragraphs: COUNT, nth_paragraph: COUNT, first_word: ONE_WORD):
    """Exactly so many paragraphs, an empty line between them; the nth begins with the word, in any case."""
    ends = spans(r"\n\n|\Z", text, flags=0)
    paragraphs = [(a, b) for (_, a), (b, _) in zip([(0, 0), *ends], ends)]
    filled = [start for start, end in paragraphs if text[start:end].strip()]
    if nth_paragraph > len(filled):
        return False, []
    word = re.compile(r"\s*'*\"*([^\s.,?!'\"]+|\S?)").match(text, *paragraphs[nth_paragraph - 1])
    begins = word[1].lower() == first_word.lower(), [word.span(1)] if word[1] else []
    breaks = [(start - 2, start) for start in filled[1:]]
    return all_of([begins, count_verdict(breaks, "exactly", num_paragraphs - 1)])


@verifier("detectable_content:number_placeholders", "use at least {num_placeholders} [placeholders]")
def number_placeholders(text, num_placeholders: COUNT):
    """At least so many times something stands [in brackets], on one line."""
    found = spans(r"\[[^\]\n]*\]?", text)  # with those that stay open, for speed
    return count_verdict([(a, b) for a, b in found if text[b - 1] == "]"], "at least", num_placeholders)


@verifier("detectable_content:postscript", "add a postscript that starts with {postscript_marker}")
def postscript(text, postscript_marker: TEXT):
    """The postscript's marker occurs, in any case."""
    spaced = {"P.S.": r"[Pp]\.\s?[Ss]\.", "P.P.S": r"[Pp]\.\s?[Pp]\.\s?[Ss]"}
    marker = postscript_marker.strip()
    pattern = spaced.get(marker, f"(?i:{re.escape(marker)})")
    return count_verdict(spans(pattern, text, flags=0), "at least", 1)


@verifier("detectable_format:constrained_response", "say My answer is yes. or the same with no or maybe")
def constrained_response(text):
    """One of the three sentences occurs."""
    return count_verdict(spans(r"My answer is (?:yes|no|maybe)\.", text, flags=0), "at least", 1)


@verifier("detectable_format:number_bullet_lists", "write exactly {num_bullets} bullet points")
def number_bullet_lists(text, num_bullets: COUNT):
    """Exactly so many lines begin with * or -; the evidence is those marks, or the surplus ones."""
    found = sorted(spans(r"^[^\S\n]*(\*)[^*].*$", text, 1) + spans(r"^[^\S\n]*(-).*$", text, 1))
    return count_verdict(found, "exactly", num_bullets)


@verifier("detectable_format:number_highlighted_sections", "*highlight* at least {num_highlights} sections")
def number_highlighted_sections(text, num_highlights: COUNT):
    """At least so many parts of lines stand between * and * or ** and **; the evidence is those marks."""
    found = [(n, *span) for n in (1, 2) for span in spans(rf"\*{{{n}}}[^\n*]*\*{{{n}}}", text)]
    marks = [mark for n, a, b in found if text[a + n : b - n].strip() for mark in ((a, a + n), (b - n, b))]
    return count_verdict(marks, "at least", 2 * num_highlights)


@verifier("detectable_format:multiple_sections", "write {num_sections} sections marked {section_spliter} X")
def multiple_sections(text, section_spliter: TEXT, num_sections: COUNT):
    """At least so many times the word and a number occur."""
    pattern = re.escape(section_spliter.strip()) + r"\s?\d+"
    return count_verdict(spans(pattern, text, flags=0), "at least", num_sections)


@verifier("detectable_format:json_format", "write all of it as JSON")
def json_format(text):
    """All is JSON, a markdown fence around it aside. The evidence: its two ends, or where it goes wrong."""
    body = re.sub(r"^```(json|Json|JSON)?|```$", "", text.strip()).strip()
    start, end = text.rindex(body), text.rindex(body) + len(body)
    try:
        json.loads(body)
        return True, {(start, start + 1), (end - 1, end)}
    except (ValueError, RecursionError) as error:
        place = start + getattr(error, "pos", 0)
        return False, [(place, place + 1)] if place < end else end_of(text)


@verifier("detectable_format:title", "give it a title in double angular brackets")
def title(text):
    """There is a title such as <<The Lamp>>: on one line, from its first << to its last >>, not empty."""
    # one pass, for speed; a line without >> is left with no more than a <
    found = [(a, text.rfind(">>", a, b) + 2) for a, b in spans(r"<<[^\n]*", text)]
    found = [(a, b) for a, b in found if text[a:b].lstrip("<").rstrip(">").strip()]
    return count_verdict(found, "at least", 1)


@verifier("combination:two_responses", "give two different responses, with ****** in between")
def two_responses(text):
    """Two responses with ****** between them, that are not the same."""
    parts = [part.strip() for part in text.split("******") if part.strip()]
    if len(parts) == 2 and parts[0] == parts[1]:
        return False, [(text.rindex(parts[1]), len(text.rstrip()))]
    return divided(text, "******", 2)


@verifier("combination:repeat_prompt", "first repeat word for word: {prompt_to_repeat}")
def repeat_prompt(text, prompt_to_repeat: TEXT):
    """The response begins with the prompt, in any case. Evidence: that, or the first change."""
    wanted, said = prompt_to_repeat.strip().lower(), text.strip().lower()
    start, same = len(text) - len(text.lstrip()), len(os.path.commonprefix([wanted, said]))
    if same == len(wanted):
        return True, [(start, min(start + same, len(text)))]
    place = min(start + same, len(text) - 1)
    return False, end_of(text) if same == len(said) else [(place, place + 1)]


@verifier("startend:end_checker", "end with the words {end_phrase}")
def end_checker(text, end_phrase: TEXT):
    """The response ends with the phrase, in any case, white space and outer quotes aside."""
    body, phrase = text.strip().strip('"'), end_phrase.strip()
    if not body.lower().endswith(phrase.lower()):
        return False, end_of(text)
    end = text.rindex(body) + len(body)
    return True, [(max(end - len(phrase), 0), end)]


@verifier("startend:quotation", "wrap everything in double quotation marks")
def quotation(text):
    """The first and the last character are double quotation marks."""
    first, last = len(text) - len(text.lstrip()), len(text.rstrip()) - 1
    closed = text[last] == '"' and last > first
    at_end = [(last, last + 1)] if closed else end_of(text)
    return all_of([(text[first] == '"', [(first, first + 1)]), (closed, at_end)])


# A word as IFEval's tokenizer (NLTK's) cuts it: IT'S and CANNOT are two words each, X-RAY is one.
WORD = r"\bcan(?=not\b)|'?(?:[^\s\[\](){}<>\"“”„‘’«»`;@#$%&?!*‒–—―,:'.-]"
WORD += r"|[,:](?=\d)|\.(?!\.)|-(?!-)|'(?!(?:[smdt]|ll|re|ve)\b))+"


@verifier("change_case:capital_word_frequency", "capitalize {capital_relation} {capital_frequency} words")
def capital_word_frequency(text, capital_frequency: COUNT, capital_relation: RELATION):
    """At least / less than so many words have letters, and only capital ones."""
    found = [(a, b) for a, b in spans(WORD, text) if text[a:b].isupper()]
    return count_verdict(found, capital_relation, capital_frequency)


@verifier("change_case:english_capital", "write in capital letters only")
def english_capital(text):
    """There are letters, and only capital ones."""
    return text.isupper(), [(i, i + 1) for i, c in enumerate(text) if c != c.upper() or c.islower()]


@verifier("change_case:english_lowercase", "write in lowercase letters only")
def english_lowercase(text):
    """There are letters, and no capital among them."""
    return text.islower(), [(i, i + 1) for i, char in enumerate(text) if char.isupper() or char.istitle()]


@verifier("punctuation:no_comma", "do not use commas")
def no_comma(text):
    """There is no comma."""
    return count_verdict(spans(",", text), "less than", 1)


def make_rubric(rubric_id, kwargs):
    """A checked Rubric; kwargs that are null or of another instruction are left out. Raises BadInput."""
    if str(rubric_id) not in VERIFIERS:
        raise BadInput(f"unknown instruction id {rubric_id!r}; known are: {', '.join(sorted(VERIFIERS))}")
    if not isinstance(kwargs, dict):
        raise BadInput(f"{rubric_id}: kwargs must be an object, not {json.dumps(kwargs)}")
    (check, criterion), kept = VERIFIERS[rubric_id], {}
    for name in [*inspect.signature(check).parameters][1:]:
        allowed, fits = check.__annotations__.get(name, ("any value", lambda value: True))
        value = kwargs.get(name)
        if value is None:
            raise BadInput(f"{rubric_id}: kwargs lack {name!r}, {allowed}")
        if not fits(value):
            raise BadInput(f"{rubric_id}: {name!r} must be {allowed}, not {json.dumps(value)}")
        kept[name] = int(value) if type(value) is float else value  # 3.0 is 3
    if kept.get("nth_paragraph", 0) > kept.get("num_paragraphs", 0):
        raise BadInput(f"{rubric_id}: 'nth_paragraph' must be at most 'num_paragraphs'")
    if rubric_id.startswith("length") and "less than" in kept.values() and 1 in kept.values():
        raise BadInput(f"{rubric_id}: no response has less than 1; an empty one satisfies nothing")
    words = {k: ", ".join(v) if isinstance(v, list) else v for k, v in kept.items()}
    if "language" in kept:
        words["language"], _ = LANGUAGES[kept["language"]]
    return Rubric(rubric_id, kept, criterion.format(**words))


def make_task(row):
    """A checked Task from one row of data. Raises BadInput."""
    if not isinstance(row, dict):
        raise BadInput("must be a JSON object")
    json.dumps(row, ensure_ascii=False).encode()  # a ValueError for half a surrogate pair
    fields = {}
    for name, kind in dict(prompt=str, instruction_id_list=list, kwargs=list, rubrics=list).items():
        fields[name] = kind() if row.get(name) is None else row[name]
        if not isinstance(fields[name], kind):
            raise BadInput(f"{name!r} must be a {kind.__name__}")
    prompt, ids, kwargs, criteria = fields.values()
    if not prompt or not all(map(is_text, criteria)):
        raise BadInput("'prompt' and each of 'rubrics' must be a text that is not empty")
    if len(ids) != len(kwargs):
        raise BadInput(f"{len(ids)} instruction ids but {len(kwargs)} kwargs; must be one for one")
    if not ids and not criteria:
        raise BadInput("no rubric; 'instruction_id_list' or 'rubrics' must hold at least one")
    judged = [Rubric(JUDGED, {}, criterion) for criterion in criteria]
    return Task(prompt, [*map(make_rubric, ids, kwargs), *judged])


def load_tasks(path_or_hub_id, split="train"):
    """The tasks of a .jsonl file, of `split`.jsonl in a folder, or of a data set of that name on the hub.

    One JSON object a line, with IFEval's fields `prompt`, `instruction_id_list` and `kwargs`, and with
    `rubrics`, a list of criteria in words for a judge; either of the two kinds of rubric may be absent.
    Raises BadInput, naming file and line, for the first row that is wrong, and for an empty set.
    """
    path = Path(path_or_hub_id)
    if path.is_dir() and not (path / f"{split}.jsonl").is_file():
        raise BadInput(f"{path}: has no {split}.jsonl; a folder of data needs train.jsonl and eval.jsonl")
    path = path / f"{split}.jsonl" if path.is_dir() else path
    if path.is_file() and not os.access(path, os.R_OK):
        raise BadInput(f"{path}: cannot be read (permission denied)")
    if path.is_file():
        lines = enumerate(path.read_bytes().splitlines(), 1)
        rows = [(f"{path}:{n}", line) for n, line in lines if line.strip()]
    else:
        rows = [(f"{path}[{n}]", row) for n, row in enumerate(hub_rows(str(path_or_hub_id), split))]
    tasks = []
    for where, row in rows:
        try:
            tasks.append(make_task(json.loads(row) if isinstance(row, bytes) else row))
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
        except json.JSONDecodeError as error:
            raise BadInput(f"{where}: not JSON text: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # text that is not UTF-8, a number too long, too deep
            raise BadInput(f"{where}: not JSON text: {error}") from None
    if not tasks:
        raise BadInput(f"{path}: holds no prompt; at least one line is needed")
    return tasks


def hub_rows(name, split):
    """The rows of a data set on the hub. Raises BadInput where it cannot be had."""
    if not re.fullmatch(HUB_ID, name) or name.endswith((".jsonl", ".json")):
        raise BadInput(f"{name}: no such file; --data takes a .jsonl file, a folder or a hub data set")
    import datasets  # slow to import, and local files do not need it

    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub has many ways to fail; all mean that the data cannot be had
        reason = f"neither a local file nor to be had from the hub ({error})".splitlines()[0]
        raise BadInput(f"{name}: {reason}") from None


# ==================================================================================================
# 2. Rollouts: sampling, and scoring what was sampled
#
# In: P prompts as token ids.  Out: G responses to each, N = P*G rows, with the log-probability of every
# sampled token.  Temperature is the only knob: any other (top-k, top-p, a repetition penalty from the
# model's generation_config) would make the sampled distribution another than the one that is scored,
# and the ratios of section 7 wrong from the start.  `token_logprobs` scores the same tokens again,
# with gradients; on the same weights both agree, so the first ratio is 1.
# ==================================================================================================


def training_mode(model):
    """Training mode for layers that checkpoint, which need it, and evaluation mode for all that is in them.

    Noise that a model adds in training mode, such as a router's, would turn the ratios into noise.
    """
    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)


def can_be_recorded(config):
    """Can a decoding step be a CUDA graph? Not with sliding windows, nor with positions that rescale."""
    rotary = getattr(config.get_text_config(), "rope_parameters", None) or {}
    rescales = rotary.get("rope_type") in ("dynamic", "longrope")
    return not rescales and not any(DynamicCache(config=config).is_sliding)


def without_dropout(config):
    """The config with every probability of dropping something at 0: it would turn the ratios into noise."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):  # the text model's part of a larger one
            without_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


@dataclass
class Rollout:
    prompt_ids: torch.Tensor  # [P, L] left-padded
    prompt_mask: torch.Tensor  # [P, L] 1 where there is a prompt token
    ids: torch.Tensor  # [N, T] sampled tokens, the end token among them; right-padded
    mask: torch.Tensor  # [N, T] 1 where there is a sampled token
    logprobs: torch.Tensor  # [N, T] float32, of each sampled token when it was sampled
    entropy: torch.Tensor  # [N, T] float32, in nats, of the distribution that it was sampled from
    truncated: torch.Tensor  # [N] True where the response hit the length limit before its end token


class Policy(NamedTuple):
    model: torch.nn.Module
    tokenizer: object
    end_ids: list[int]  # tokens that end a response


def encode_prompt(tokenizer, prompt):
    """A prompt as token ids: through the chat template where there is one, as plain text where not."""
    if not tokenizer.chat_template:
        ids = tokenizer(prompt).input_ids
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers end every text
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def positions(attention_mask):
    """[N, L] position ids that count the real tokens, so that left padding moves nothing."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def padded(rows, pad_id, device):
    """Lists of token ids -> ids [P, L], mask [P, L], padded on the left."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    filled = lambda rows, value: pad_sequence(rows, True, value, "left").to(device)
    return filled(ids, pad_id), filled([torch.ones_like(row) for row in ids], 0)


def draw(logp, uniform):
    """One token a row by inverse CDF: logp [N, V] log-probabilities, uniform [N] in [0, 1) -> [N].

    Not torch.multinomial: one number a token, drawn beforehand, makes a row independent of the others.
    """
    cdf = logp.float().exp().cumsum(-1)  # [N, V], up to 1 or, by rounding, nearly so
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
    return token.squeeze(1).clamp(max=logp.shape[-1] - 1)


def prefill(model, prompt_ids, prompt_mask, cache):
    """Put the keys and values of prompts [P, L], all but the last token, into `cache`; gradients flow through."""
    if prompt_ids.shape[1] == 1:
        return
    model(
        prompt_ids[:, :-1],
        attention_mask=prompt_mask[:, :-1],
        position_ids=positions(prompt_mask[:, :-1]),
        cache=cache,
        use_cache=True,
        logits_to_keep=1,
    )


def recorded(step, *inputs):
    """step(*inputs) as a CUDA graph: one launch instead of thousands.

    It works on the same memory every time: use what it returns before the next call.
    """
    inputs = [x.clone() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = step(*inputs)

    def replay(*values):
        for memory, value in zip(inputs, values):
            memory.copy_(value)
        graph.replay()
        return output

    return replay


@torch.no_grad()
def sample(
    model, prompts, group_size, max_new_tokens, temperature=1.0, end_ids=(), pad_id=0, seeds=None, graph=False
):
    """Sample `group_size` responses to each prompt -> a Rollout, with T = length of the longest.

    prompts: P lists of token ids. end_ids: tokens that end a response. seeds: one integer a prompt, whose
    samples depend on it and on nothing else in the batch. Rows that have ended leave the batch. With `graph`
    (CUDA, full attention) they stay: every step then has the same shapes, and is recorded once.
    Leaves the model in evaluation mode. Raises ValueError for a temperature not above 0, and
    FloatingPointError where the model's probabilities are not numbers.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    model.eval()
    device = model.device
    N = len(prompts) * group_size
    if seeds is None:
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniform = [torch.rand(group_size, max_new_tokens, generator=generator) for generator in generators]
    uniform = torch.cat(uniform).to(device)  # [N, T], T = max_new_tokens until the last lines
    ends = torch.tensor(list(end_ids), dtype=torch.long, device=device)

    prompt_ids, prompt_mask = padded(prompts, pad_id, device)  # [P, L]
    row_ids = prompt_ids.repeat_interleave(group_size, 0)  # [N, L]
    row_mask = prompt_mask.repeat_interleave(group_size, 0)  # [N, L]
    L = prompt_ids.shape[1]
    if graph:
        slots = 64 * math.ceil((L + max_new_tokens) / 64)
        cache = StaticCache(config=model.config, max_cache_len=slots)
        prefill(model, row_ids, row_mask, cache)
        attention = F.pad(row_mask, (0, slots - L), value=1)  # causality hides the slots that are still empty
    else:
        cache = DynamicCache()
        prefill(model, prompt_ids, prompt_mask, cache)
        cache.batch_repeat_interleave(group_size)
        attention = F.pad(row_mask, (0, max_new_tokens), value=1)  # [N, L + T]

    def step(token, place, seen):
        inputs = dict(attention_mask=seen, position_ids=place, cache=cache, use_cache=True)
        return model(token, **inputs).logits[:, -1]

    token = row_ids[:, -1:]  # [N, 1]
    place = row_mask.sum(1, keepdim=True) - 1  # [N, 1]
    alive = torch.arange(N, device=device)  # rows in the batch
    ids = torch.full((N, max_new_tokens), pad_id, device=device)
    logprobs = torch.zeros(N, max_new_tokens, device=device)
    entropy = torch.zeros(N, max_new_tokens, device=device)
    for t in range(max_new_tokens):
        if graph and t == 1:  # the step before has warmed everything up
            step = recorded(step, token, place, attention)
        logits = step(token, place, attention if graph else attention[:, : L + t])  # [alive, V]
        logp = (logits.float() / temperature).log_softmax(-1)
        token = draw(logp, uniform[alive, t])[:, None]  # [alive, 1]
        place = place + 1
        ids[alive, t] = token[:, 0]
        logprobs[alive, t] = logp.gather(1, token)[:, 0]
        entropy[alive, t] = torch.special.entr(logp.exp()).sum(-1)
        going = ~torch.isin(ids[alive, : t + 1], ends).any(1)  # [alive]
        if not going.any():
            break
        if not graph and not going.all():
            cache.batch_select_indices(going.nonzero()[:, 0])
            alive = alive[going]
            token = token[going]
            place = place[going]
            attention = attention[going]

    if not logprobs.isfinite().all():
        raise FloatingPointError("the model's probabilities are not numbers: its weights are NaN or too large")
    ended = torch.isin(ids, ends).cumsum(1)  # [N, T] at least 1 from the end token on
    mask = (F.pad(ended[:, :-1], (1, 0)) == 0).long()  # [N, T] the end token included
    T = int(mask.sum(1).max())
    return Rollout(
        prompt_ids,
        prompt_mask,
        ids.masked_fill(mask == 0, pad_id)[:, :T],
        mask[:, :T],
        (logprobs * mask)[:, :T],
        (entropy * mask)[:, :T],
        truncated=ended[:, -1] == 0,
    )


def precision(device, dtype):
    """The context of forward passes: autocast to bfloat16, or nothing. The weights stay in float32.

    No optimiser step inside: each weight is rounded once a context and kept, whatever becomes of the weight.
    """
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


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
    Logits exist only where a response token is predicted.
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
        cache = DynamicCache()
        prefill(model, ids[::group_size, :L], attention_mask[::group_size, :L], cache)
        cache.batch_repeat_interleave(group_size)
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
# 3. Verdicts and the response-level reward
#
# In: a rollout and its tasks.  Out: verdicts [N, K] in {+1, -1}, the evidence as a relevance [N, K, T], and
# one reward a response.  Prompts have different numbers of rubrics: K is the largest in the batch, and a
# verdict of 0 means "no such rubric"; every function that sums over rubrics leaves those out.  What no rule
# can verify, a model judges (RTT): is "yes" its likelier answer to whether the response meets the criterion?
# ==================================================================================================


def response_reward(verdicts, kind="aon"):
    """verdicts [..., K] in {+1, -1}, 0 for no such rubric -> rewards [...] float32 in [0, 1] (RTT).

    "aon", all or nothing: 1 if every rubric is satisfied, else 0 (so 1 where there is none).
    "csr", constraint satisfaction rate: the share of the rubrics that are satisfied (0 where there is none).
    Verdicts that come as 0 and 1 or False and True must first be made 2 * v - 1.
    Raises ValueError for another kind, and for Booleans.
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

    Nothing is encoded again. Where a character is spread over several tokens (byte-level BPE, emoji,
    Chinese), each of them has the whole character.
    """
    raw = lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    anchor = tokenizer("a", add_special_tokens=False).input_ids[-1:]  # SentencePiece drops a leading space
    decode = lambda ids: raw(anchor + ids)[len(raw(anchor)) :]
    pieces = {token: decode([token]) for token in {token for ids in responses for token in ids}}
    texts, tokens = [decode(ids) for ids in responses], []
    for ids, text in zip(responses, texts):
        parts = [pieces[token] for token in ids]
        if "".join(parts) == text and "\ufffd" not in text:  # every token is whole characters
            ends = [0, *itertools.accumulate(map(len, parts))]
            tokens.append(list(zip(ends, ends[1:])))
            continue
        row, whole, base, done = [], 0, 0, 0  # the first `whole` tokens write the first `base` characters
        for t in range(1, len(ids) + 1):
            piece = decode(ids[whole:t])
            cut = piece.endswith("\ufffd")  # the last character is begun
            complete = min(base + len(piece.rstrip("\ufffd")), len(text))
            row.append((done, min(complete + cut, len(text))))
            done = complete
            if not cut:
                whole, base = t, complete
        tokens.append(row)
    return texts, tokens


def evidence_to_tokens(evidence, tokens):
    """Spans of characters, spans of tokens -> 0.0/1.0 a token: does it write one of these characters?

    An empty span counts as one character long: (len, len) then meets the end token, (len, len + 1). A
    token that writes nothing (a special token in the middle) is responsible for nothing.
    [(4, 7), (12, 12)] on tokens [(0, 3), (3, 7), (7, 12), (12, 13)] -> [0.0, 1.0, 0.0, 1.0].
    """
    characters = {place for a, b in evidence for place in range(a, max(b, a + 1))}
    return [float(not characters.isdisjoint(range(start, end))) for start, end in tokens]


QUESTION = (
    "Here is a request, and a response to it.\n\nRequest:\n{}\n\nResponse:\n{}\n\n"
    "Does the response meet this criterion: {}\nAnswer yes or no. Answer:"
)


def answer_tokens(tokenizer):
    """The ids of the tokens that begin a yes, and of those that begin a no, without what begins both."""
    first = lambda *words: {tokenizer(word, add_special_tokens=False).input_ids[0] for word in words}
    yes, no = first("yes", "Yes", " yes", " Yes"), first("no", "No", " no", " No")
    return sorted(yes - no), sorted(no - yes)  # a lone space before both says nothing


@torch.no_grad()
def judge_yes(judge, questions, batch=64):
    """How sure a judge is of "yes": P(yes) / (P(yes) + P(no)) of its next token (RTT; no generation).

    judge: a Policy. questions: M texts -> [M].
    """
    yes, no = answer_tokens(judge.tokenizer)
    rows = [encode_prompt(judge.tokenizer, question) for question in questions]
    order = sorted(range(len(rows)), key=lambda m: len(rows[m]))  # like lengths together: less padding
    sure = torch.zeros(len(rows))
    for start in range(0, len(rows), batch):
        part = order[start : start + batch]
        ids, mask = padded([rows[m] for m in part], 0, judge.model.device)
        inputs = dict(attention_mask=mask, position_ids=positions(mask), use_cache=False, logits_to_keep=1)
        logits = judge.model(ids, **inputs).logits[:, -1].float()  # [m, V]
        odds = logits[:, yes].logsumexp(1) - logits[:, no].logsumexp(1)
        sure[part] = odds.sigmoid().cpu()
    return sure


def grade(tokenizer, rollout, tasks, judge=None):
    """Verdicts on every response of a rollout, for every rubric of its prompt.

    Returns texts (N strings), verdicts [N, K] in {+1, -1, 0} and evidence [N, K, T] in {0, 1}: -1 where the
    verdict is the judge's, who gives none. judge: a Policy, for rubrics that no rule can decide.
    """
    N, T = rollout.ids.shape
    G, K = N // len(tasks), max(len(task.rubrics) for task in tasks)
    ended, lengths = (~rollout.truncated).tolist(), rollout.mask.sum(1).tolist()
    without_end = [ids[: n - end] for ids, n, end in zip(rollout.ids.tolist(), lengths, ended)]
    texts, tokens = token_spans(tokenizer, without_end)
    verdicts, evidence = torch.zeros(N, K, dtype=torch.long), torch.zeros(N, K, T)
    asked = []  # (response, rubric) pairs that the judge decides
    questions = []
    for i, text in enumerate(texts):
        places, task = tokens[i] + [(len(text), len(text) + 1)] * ended[i], tasks[i // G]
        for k, rubric in enumerate(task.rubrics):
            in_words = rubric.id == JUDGED and text.strip()
            verdict = Verdict(True, []) if in_words else verify(rubric, text, task.prompt)
            verdicts[i, k] = 1 if verdict.satisfied else -1
            evidence[i, k, : len(places)] = torch.tensor(evidence_to_tokens(verdict.evidence, places))
            if verdict.satisfied and needs_judge(rubric):
                asked.append((i, k))
                questions.append(QUESTION.format(task.prompt, text, rubric.criterion))
    for (i, k), sure in zip(asked, judge_yes(judge, questions) if asked else []):
        verdicts[i, k] = 1 if sure > 0.5 else -1
        evidence[i, k] = -1.0
    return texts, verdicts.to(rollout.ids.device), evidence.to(rollout.ids.device)


# ==================================================================================================
# 4. Relevance: which tokens are responsible for a verdict?  (RTT, the token-level relevance discriminator)
#
# In: a criterion with its verdict, and a response.  Out: a relevance in [0, 1] for each response token.
# The discriminator is a language model, by default a copy of the starting policy, with a head that gives
# one number a token.  It reads criterion and verdict, then the response, from left to right: without the
# verdict it could not know, at the first "lamp", whether there will be too few of them.  It learns from the
# verifiers' evidence on the policy's own rollouts, a little before RL and one step alongside each RL step.
# Criterion and response are joined as token ids, so the response's tokens are the policy's own.
# ==================================================================================================


def all_pairs(criteria):
    """The (response, rubric) pairs (i, k) of N lists of criteria."""
    return [(i, k) for i, texts in enumerate(criteria) for k in range(len(texts))]


class RelevanceDiscriminator:
    """criterion with verdict + response -> relevance of each response token."""

    def __init__(self, folder, tokenizer, learning_rate, device, dtype="float32"):
        """`folder`: a language model with the policy's tokenizer; by default the policy's own folder."""
        config = without_dropout(AutoConfig.from_pretrained(folder))
        transformers.logging.set_verbosity_error()  # it has no use for the language model's head, and says so
        self.base = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32, **SAFE)
        transformers.logging.set_verbosity_warning()
        head = torch.nn.Linear(self.base.get_input_embeddings().embedding_dim, 1)
        torch.nn.init.normal_(head.weight, std=0.02)  # as transformers begins its heads
        self.model = torch.nn.ModuleDict(dict(base=self.base, head=head)).to(device)
        self.tokenizer, self.dtype = tokenizer, dtype
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=learning_rate)

    def logits(self, criteria, ids, mask):
        """criteria: M texts; ids, mask: [M, T] -> [M, T] float32 logits of relevance."""
        texts = self.tokenizer([f"{criterion}\n" for criterion in criteria], add_special_tokens=False)
        criterion_ids, criterion_mask = padded(texts.input_ids, 0, ids.device)
        attention = torch.cat([criterion_mask, mask], 1)  # [M, C + T]
        inputs = dict(attention_mask=attention, position_ids=positions(attention), use_cache=False)
        joined = torch.cat([criterion_ids, ids], 1)  # [M, C + T]
        with precision(ids.device, self.dtype):
            hidden = self.base(joined, **inputs).last_hidden_state  # [M, C + T, H]
            return self.model["head"](hidden[:, -ids.shape[1] :]).squeeze(2).float()  # [M, T]

    def batches(self, pairs, criteria, ids, mask, size):
        """For pairs (response i, rubric k), `size` at a time: their i, their k, T, and logits [size, T]."""
        lengths = mask.sum(1).tolist()
        pairs = sorted(pairs, key=lambda pair: lengths[pair[0]])  # like lengths together: less padding
        for start in range(0, len(pairs), size):
            i, k = map(list, zip(*pairs[start : start + size]))
            T = lengths[i[-1]]
            yield i, k, T, self.logits([criteria[a][b] for a, b in zip(i, k)], ids[i, :T], mask[i, :T])

    @torch.no_grad()
    def predict(self, criteria, ids, mask, pairs=None, batch=64):
        """criteria: at most K texts for each response; ids, mask [N, T] -> relevance [N, K, T] in [0, 1].

        0 at padding and for rubrics that a prompt does not have, or which are not among pairs (default: all).
        """
        self.model.eval()
        relevance = torch.zeros(len(ids), max(map(len, criteria)), ids.shape[1], device=ids.device)
        pairs = all_pairs(criteria) if pairs is None else pairs
        for i, k, T, logits in self.batches(pairs, criteria, ids, mask, batch):
            relevance[i, k, :T] = logits.sigmoid() * mask[i, :T]
        return relevance

    def fit(self, criteria, ids, mask, evidence, pairs=48, batch=16):
        """One step of cross-entropy towards evidence [N, K, T] on some random (response, rubric) pairs.

        Pairs without evidence (-1: a judge gave the verdict) are left out; what is learned from the others
        must do for them. At most `batch` pairs are in memory at a time. Of several processes (section 7 has
        `gather` and `descend`) each takes its share of the pairs.
        """
        training_mode(self.model)
        known = (evidence[:, :, 0] >= 0).tolist()
        every = [(i, k) for i, k in all_pairs(criteria) if known[i][k]]
        chosen = [every[j] for j in torch.randperm(len(every))[: -(-pairs // WORLD)].tolist()]
        total = sum(gather(int(mask[[i for i, _ in chosen]].sum())))  # response tokens
        for i, k, T, logits in self.batches(chosen, criteria, ids, mask, batch):
            labels, weight = evidence[i, k, :T], mask[i, :T].float()
            loss = F.binary_cross_entropy_with_logits(logits, labels, weight=weight, reduction="sum")
            (loss / total).backward()
        if total:  # of all processes, which must all descend or none
            descend(self.model, self.optimizer)


def shuffled(relevance, mask):
    """relevance [N, K, T] with the tokens of each response in a random order: the same credit, misplaced."""
    keys = torch.rand(mask.shape).to(mask.device) - mask.float()  # [N, T] tokens before padding
    order = keys.argsort(1)[:, None].expand_as(relevance)  # [N, K, T]
    return relevance.gather(2, order) * mask[:, None]


def f1_and_auroc(relevance, evidence):
    """Token-level F1 (at 0.5) and area under the ROC curve of scores [M] against labels [M] in {0, 1}.

    AUROC is the chance that a relevant token scores above an irrelevant one, ties counted half; 0.5,
    which says nothing, where either kind is missing.
    """
    positive, predicted = evidence > 0.5, relevance > 0.5
    f1 = 2 * (positive & predicted).sum() / (positive.sum() + predicted.sum()).clamp(min=1)
    _, inverse, counts = relevance.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts.double() - 1) / 2)[inverse]  # [M] from 1; ties share their mean rank
    p, n = int(positive.sum()), int((~positive).sum())
    auroc = (float(ranks[positive].sum()) - p * (p + 1) / 2) / (p * n) if p and n else 0.5
    return float(f1), auroc


# ==================================================================================================
# 5. Advantages: response level, token level, combined
#
# In: for one prompt, verdicts [G, K], relevance [G, K, T], rewards [G].  Out: one advantage a token [G, T].
# The response-level advantage is GRPO's.  The token level lives in RTT's three-dimensional reward space
# r[i, k, t] = verdict * relevance.  Which entries of r share one mean and one standard deviation?  That is
# RTT's group partitioning problem; the partitions below differ in one line.
# ==================================================================================================

PARTITIONS = ("intra", "inter", "rubric", "verdict", "contested", "cross")
CONTESTED_ONLY = ("verdict", "contested", "cross")  # a rubric on which the group agrees gets nothing


def contested(verdicts, group_size):
    """verdicts [N, K], but 0 for rubrics on which a response's whole group agrees: [N, K]."""
    grouped = verdicts.view(-1, group_size, verdicts.shape[1])  # [P, G, K]
    return (grouped * (grouped != grouped[:, :1]).any(1, keepdim=True)).view_as(verdicts)


def response_advantage(rewards, eps=1e-6):
    """rewards [..., G] -> (R - mean) / (std + eps) over the group: [..., G]  (GRPO; RTT's response level).

    std is the population's (divided by G). Exactly 0 where all rewards are equal, so also for G = 1.
    """
    rewards = rewards.float()
    std = rewards.std(-1, correction=0, keepdim=True)
    advantage = (rewards - rewards.mean(-1, keepdim=True)) / (std + eps)
    return advantage.masked_fill((rewards == rewards[..., :1]).all(-1, keepdim=True), 0.0)


def masked_normalize(x, mask, dim, eps):
    """(x - mean) / (std + eps) over the entries along `dim` where mask is 1; 0 where it is 0."""
    x = x.masked_fill(mask == 0, 0.0)  # not x * mask: what stands at padding may be NaN
    count = mask.sum(dim, keepdim=True).clamp(min=1)
    mean = x.sum(dim, keepdim=True) / count
    centred = (x - mean) * mask
    std = (centred.square().sum(dim, keepdim=True) / count).sqrt()
    return centred / (std + eps)


@torch.no_grad()
def token_advantage(verdicts, relevance, mask, partition="intra", eps=0.1):
    """Token-level advantage [G, T] of one group (RTT, group partitioning and normalisation).

    verdicts [G, K] in {+1, -1}, 0 for no rubric; relevance [G, K, T] in [0, 1]; mask [G, T]. No gradient.
    The default is RTT's; that of the command line is "verdict". Raises ValueError for an unknown partition.
    With r = verdicts * relevance, the mean over k of r normalised over
      "intra":    the tokens of each (response, rubric): RTT's intra-sample token group normalisation;
      "inter":    the tokens of all responses, for each rubric;
      "rubric":   the tokens of all responses, after r was averaged over the rubrics;
      "verdict":  the responses, for each rubric, and only then spread by relevance: a token without
                  relevance gets exactly 0, and a rubric on which the group agrees gives nothing;
      "contested":  as "intra", but 0 from rubrics on which the group agrees (the mean counts them still);
      "cross":    verdicts over the responses, relevance over the tokens of all responses, for each rubric,
                  and the product of both: the contrast of "intra", and what all responses share with equal
                  relevance cancels, as in "verdict".

    One rubric, satisfied by the first response for its third token, violated by the second for its second
    (verdicts [[1], [-1]], relevance [[[0, 0, 1, 0]], [[0, 1, 0, 0]]], eps near 0):
      "intra", "contested", "cross"  [[-.58, -.58, 1.73, -.58], [.58, -1.73, .58, .58]]
      "inter", "rubric"              [[0, 0, 2, 0], [0, -2, 0, 0]]: the rest moves if verdicts do not balance
      "verdict"                      [[0, 0, 1, 0], [0, -1, 0, 0]]: the rest never moves
    Were both satisfied (verdicts [[1], [1]]), there would be nothing to tell the responses apart:
      "intra"                        [[-.58, -.58, 1.73, -.58], [-.58, 1.73, -.58, -.58]]: it pushes on
      "inter", "rubric"              the same here
      the others                     0

    eps is large on purpose. r lies in [-1, 1]. One relevant token of 40 makes a std of 0.16, while a
    discriminator that sees nothing anywhere still makes one of 0.01 from noise: with eps = 0.1 the first
    keeps most of its credit, and the noise is not blown up to full size.
    """
    signs = verdicts.float()  # [G, K]; float first: relevance must not be cut to whole numbers
    rubrics = (verdicts != 0).sum(1).clamp(min=1)[:, None]  # [G, 1]
    valid = mask[:, None].float() * (signs != 0)[..., None]  # [G, K, T] tokens of responses with the rubric
    relevance = relevance.masked_fill(valid == 0, 0.0)  # [G, K, T]
    reward = signs[..., None] * relevance  # [G, K, T]
    if partition == "rubric":
        return masked_normalize(reward.sum(1) / rubrics, mask.float(), (0, 1), eps)
    verdict_adv = masked_normalize(signs, (signs != 0).float(), 0, eps)[..., None]  # [G, K, 1]
    if partition == "intra":
        advantage = masked_normalize(reward, valid, 2, eps)
    elif partition == "inter":
        advantage = masked_normalize(reward, valid, (0, 2), eps)
    elif partition == "verdict":
        advantage = verdict_adv * relevance
    elif partition == "contested":
        advantage = masked_normalize(reward, valid, 2, eps) * (verdict_adv != 0)
    elif partition == "cross":
        advantage = verdict_adv * masked_normalize(relevance, valid, (0, 2), eps)
    else:
        raise ValueError(f"partition must be one of {', '.join(PARTITIONS)}, not {partition!r}")
    return advantage.sum(1) / rubrics  # [G, T]


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
# the sum should be 0.  A group's response-level advantages sum to 0; times weights that differ between the
# responses they do not, unless the weights are first made constant or orthogonal to the advantages.
# What is left over is the learning tax: the policy drifts, and no response is the better for it.
# TGC's word for the condition is exchangeable: it must not matter in which response a shared token stands.
# A ratio of each token is harmless, for the same token after the same text has one ratio. What breaks it:
# PPO's one-sided clip, which lets go of a token in some responses and not in others, by their advantages'
# signs ("grpo"); one ratio for a whole response, and the division by its length |y|, even on policy ("gspo").
# (A token channel must sum to 0 by itself. Of the partitions of section 5 "verdict" and "cross" do, where a
# shared token has the same relevance in all responses; a learned relevance comes near to that.)
# ==================================================================================================


def min_replace(w):
    """weights [..., G] -> their minimum over the group, for every response: [..., G]  (TGC). No gradient."""
    return w.detach().amin(-1, keepdim=True).expand_as(w)


def adv_orthogonal(w, adv):
    """w - (adv.w / |adv|^2) adv, so that sum_i adv_i w_i = 0: [..., G]  (TGC). No gradient.

    w itself where |adv| = 0 (below 1e-6 it is rounding: advantages have unit scale). Weights may come out
    negative. w [.9, 1.1, 1.3], adv [1.2, -.4, -.8] -> [1.114, 1.029, 1.157].
    """
    w, adv = w.detach(), adv.detach()
    norm = adv.square().sum(-1, keepdim=True)
    scale = (adv * w).sum(-1, keepdim=True) / norm.clamp(min=1e-12)
    return w - adv * scale.masked_fill(norm < 1e-12, 0.0)


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
    size = mean.abs().sum()
    return float(mean.sum(0).abs().sum() / size) if size != 0 else 0.0


# ==================================================================================================
# 7. The update: one loss function, six methods
#
# In: log-probabilities with gradient, those of the sampler, advantages, all [N, T].  Out: a scalar, and the
# effective coefficients c of section 6.  Each method is a choice of the weight that stands beside the
# advantage: which ratio, per token or per response, clipped how, transformed how.
# Off policy a weight has two duties: shared tokens must cancel (TGC), and a token that has been pushed far
# enough must be let go (PPO's clip).  "grpo" sees to the second, "grpo-fix" and the dfpo losses to the
# first, "grpo-mask" to both.
# ==================================================================================================

# Clip ranges below and above 1. GSPO clips a mean over tokens, which moves far less than one token's ratio.
CLIP = {"grpo": (0.2, 0.2), "grpo-fix": (0.2, 0.2), "grpo-mask": (0.2, 0.2), "gspo": (3e-4, 4e-4)}
LOSSES = ("grpo", "grpo-fix", "gspo", "dfpo-min", "dfpo-orth", "grpo-mask")  # the dfpo losses do not clip


def clipped_objective(ratio, advantages, low, high):
    """PPO's min(ratio * A, clip(ratio) * A), and the weight: the ratio where its gradient lives, else 0.

    The minimum makes the clip one-sided. A > 0: the gain is capped once ratio > 1 + high, while a ratio
    below 1 - low is still pulled back up. A < 0: capped once ratio < 1 - low, while a ratio above
    1 + high is still pushed down. With a clip of 0.2, (ratio, A) -> objective, weight:
    (1.5, 1) -> 1.2, 0;  (0.5, 1) -> 0.5, 0.5;  (1.5, -1) -> -1.5, 1.5;  (0.5, -1) -> -0.8, 0.
    """
    free, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return torch.min(free, clipped), ratio.detach() * (free <= clipped)


def loss_denominator(mask, loss):
    """What the loss is divided by: responses for gspo (a mean of token means), tokens for the others."""
    return len(mask) if loss == "gspo" else mask.sum()


def policy_loss(
    logprobs, old_logprobs, advantages, mask, group_size, loss="grpo", clip=None, denominator=None
):
    """The loss to minimise (a scalar), and its statistics (a dict).

    logprobs, old_logprobs, advantages, mask: [N, T], groups of `group_size` consecutive rows; float32, for in
    half precision a ratio near 1 is mostly rounding.
      "grpo":       per-token ratio, PPO's clip (GRPO with a token mean).
      "grpo-fix":   stop-gradient of the clipped per-token ratio, whatever the advantage's sign (TGC).
      "gspo":       the response's ratio, geometric mean over its tokens, PPO's clip. Written token by
                    token (GSPO-token), which is the same where the advantage is constant in a response.
      "dfpo-min", "dfpo-orth":  stop-gradient of the responses' ratios after min_replace or
                    adv_orthogonal (TGC's DFPO). dfpo-orth goes by each response's mean advantage, so it
                    cancels where the advantage is the same for all tokens of a response (--alpha 0).
      "grpo-mask":  stop-gradient of the per-token ratio, 0 outside the clip range whatever the advantage's
                    sign (as IcePop masks, arXiv:2510.18855). Not TGC's: it cancels as "grpo-fix" does, and
                    lets go as "grpo" does, but also of a token that left the range on the wrong side.
    For every one, d loss / d logprobs = -coef / denominator; they differ in coef, gspo also in denominator.
    clip: (low, high), by default CLIP's; the dfpo losses have none. denominator: that of the whole update, of
    which this may be a part. N must be a multiple of group_size.
    Statistics: clip_fraction (of the tokens; those that "grpo-fix" holds at the range's end count, and are
    still pushed), approx_kl (k3 estimate of KL(sampler || policy)), and coef [N, T]. Of a loss with a
    stop-gradient, only the gradient means something, not the value.
    Only logprobs gets a gradient. A token's ratio counts as exp(20) where it is more, lest a gradient be NaN.
    Raises ValueError for an unknown loss, and for other shapes.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not {loss!r}")
    if not logprobs.shape == old_logprobs.shape == advantages.shape == mask.shape or len(mask) % group_size:
        raise ValueError("the four tensors must all be [N, T], and N a multiple of group_size")
    clip = clip or CLIP.get(loss)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)  # [N, 1]
    logprobs, old_logprobs, advantages = (
        x.masked_fill(mask == 0, 0.0) for x in (logprobs, old_logprobs.detach(), advantages.detach())
    )  # whatever stands at padding, even -inf or NaN, is ignored
    # exp(20) at most: a ratio of infinity would make the gradient NaN even where the clip lets go
    old_logprobs = old_logprobs.clamp(min=logprobs.detach() - 20)  # [N, T]
    log_ratio = logprobs - old_logprobs  # [N, T]
    ratio = log_ratio.exp()  # [N, T]
    scale = 1 / lengths if loss == "gspo" else 1.0  # [N, 1]: a mean of token means
    if loss in ("gspo", "dfpo-min", "dfpo-orth"):
        sequence_ratio = (log_ratio.detach().sum(1, keepdim=True) / lengths).exp()  # [N, 1]
        ratio = sequence_ratio * (logprobs - logprobs.detach()).exp()  # the second factor is 1
    if loss in ("grpo", "gspo"):
        objective, weight = clipped_objective(ratio, advantages, *clip)
    else:
        weight = stop_gradient_weight(ratio.detach(), advantages, mask, group_size, loss, clip)
        objective = weight * advantages * logprobs
    clipped = (weight != ratio.detach()) * mask if loss in CLIP else mask * 0
    stats = {
        "clip_fraction": float(clipped.sum() / mask.sum().clamp(min=1)),
        "approx_kl": float(k3(old_logprobs, logprobs.detach()).sum() / mask.sum().clamp(min=1)),
        "coef": weight * scale * advantages * mask,
    }
    if denominator is None:
        denominator = loss_denominator(mask, loss) or 1  # without a token the loss is 0, not NaN
    return -(objective * scale * mask).sum() / denominator, stats


def stop_gradient_weight(ratio, advantages, mask, group_size, loss, clip):
    """The weights [N, T] of the losses that cancel on shared tokens (TGC's, and "grpo-mask").

    ratio [N, T]: without gradient; of a dfpo loss, the response's in each column. clip: (low, high), for the
    two that clip.
    """
    if loss in CLIP:
        inside = ratio.clamp(1 - clip[0], 1 + clip[1])
        return inside if loss == "grpo-fix" else ratio.masked_fill(ratio != inside, 0.0)
    ratios = ratio[:, 0].view(-1, group_size)  # [P, G], of the responses
    mean_advantage = ((advantages * mask).sum(1) / mask.sum(1).clamp(min=1)).view(-1, group_size)  # [P, G]
    cancels = min_replace(ratios) if loss == "dfpo-min" else adv_orthogonal(ratios, mean_advantage)  # [P, G]
    return cancels.reshape(-1, 1).expand_as(ratio)


def k3(log_p, log_q):
    """Schulman's k3 estimate of KL(p || q) at tokens sampled from p, elementwise: never below 0.

    Mask the log-probabilities before, not the result after: at padding the exponential may be infinite.
    """
    difference = log_q - log_p
    return difference.expm1() - difference  # expm1: exp - 1 would leave nothing of a small difference


def micro_batches(lengths, group_size, groups):
    """Split N rows into micro-batches of at most `groups` whole groups, those of like length together.

    Groups stay whole because the transformations of section 6 need all of a group's ratios, and because a
    group's prompt is then computed once. lengths [N] of the responses -> a list of row indices.
    """
    rows = torch.arange(len(lengths)).view(-1, group_size)  # [P, G]
    longest = lengths.view(-1, group_size).amax(1).cpu()  # [P]
    return [part.reshape(-1) for part in rows[longest.argsort(stable=True)].split(groups)]


def trim(rollout, rows, group_size):
    """ids [n, L + T], attention_mask [n, L + T] and T for some rows, without columns that are all padding."""
    prompts = rows[::group_size] // group_size
    prompt_mask, mask = rollout.prompt_mask[prompts], rollout.mask[rows]
    L, T = int(prompt_mask.sum(1).max()), int(mask.sum(1).max())
    wide = lambda x: x[:, -L:].repeat_interleave(group_size, 0)
    ids = torch.cat([wide(rollout.prompt_ids[prompts]), rollout.ids[rows, :T]], 1)
    return ids, torch.cat([wide(prompt_mask), mask[:, :T]], 1), T


def gather(value):
    """The values that all processes of the run have here, a list in the order of their ranks."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def descend(model, optimizer, max_norm=1.0, loss=0.0):
    """A step on the sum of all processes' gradients (with a global denominator, that of one with all rows).

    Returns the gradient's norm, and whether the step was made: not where this or the loss is not finite.
    """
    for weight in model.parameters() if WORLD > 1 else ():
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        dist.all_reduce(weight.grad)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        optimizer.step()
    else:
        tqdm.write(f"step of {type(model).__name__} skipped: loss {loss}, gradient norm {norm}")
    optimizer.zero_grad()
    return norm, finite


def update(model, optimizer, rollout, advantages, args, reference=None):
    """`args.updates` optimiser steps on one rollout; advantages [N, T]. Returns statistics (a dict).

    The denominator is that of the whole update, over all micro-batches and processes, so neither's number
    changes a gradient. The old log-probabilities are the sampler's: no pass is spent on them. Below float32,
    where the sampler rounds otherwise, they are those of the first update. A step whose
    loss or gradient is not finite is skipped and reported; the statistics are means over the others.
    reference: for --kl.
    """
    training_mode(model)
    G, steps = args.group_size, []
    shared = 1 if args.gradient_checkpointing else G  # responses that share one computation of their prompt
    own = int(loss_denominator(rollout.mask, args.loss)), int(rollout.mask.sum())
    denominator, tokens = map(sum, zip(*gather(own)))
    old_logprobs = rollout.logprobs.clone()  # [N, T]
    for number in range(args.updates):
        stats, coef = defaultdict(float), torch.zeros_like(advantages)
        for rows in micro_batches(rollout.mask.sum(1), G, args.micro_batch):
            ids, attention, T = trim(rollout, rows, G)
            with precision(args.device, args.dtype):
                logprobs = token_logprobs(model, ids, attention, T, args.temperature, shared)  # [n, T]
            if number == 0 and args.dtype != "float32":  # nothing was learned yet: the first ratio is 1
                old_logprobs[rows, :T] = logprobs.detach()
            old, adv, mask = old_logprobs[rows, :T], advantages[rows, :T], rollout.mask[rows, :T]
            loss, part = policy_loss(logprobs, old, adv, mask, G, args.loss, args.clip, denominator)
            if reference is not None:
                with torch.no_grad(), precision(args.device, args.dtype):
                    anchor = token_logprobs(reference, ids, attention, T, args.temperature, G)
                loss = loss + args.kl * k3(logprobs, anchor).sum() / tokens  # both are 0 at padding
            loss.backward()
            coef[rows, :T] = part.pop("coef")
            stats["loss"] += loss.item()
            for name, value in part.items():
                stats[name] += value * float(mask.sum() / tokens)
        stats = {name: sum(part[name] for part in gather(stats)) for name in stats}
        norm, finite = descend(model, optimizer, args.max_grad_norm, stats["loss"])
        if finite:
            steps.append(stats | dict(grad_norm=norm, residual=mean_residual(coef, rollout, G)))
    names = ("loss", "grad_norm", "clip_fraction", "approx_kl", "residual")
    means = {name: sum(s[name] for s in steps) / max(len(steps), 1) for name in names}
    return means | {"skipped": args.updates - len(steps)}


def mean_residual(coef, rollout, group_size):
    """cancellation_residual, mean over the groups that push at all; coef [N, T]."""
    groups = zip(*(x.split(group_size) for x in (coef, rollout.ids, rollout.mask)))
    residuals = [cancellation_residual(*group) for group in groups if group[0].any()]
    return sum(residuals) / max(len(residuals), 1)


# ==================================================================================================
# 8. The loop: sample, verify, relevance, advantages, update
#
# In: models, tasks, settings.  Out: a trained policy, and a line of metrics a step.  `train_step` is the
# opening picture in code; `train` repeats it.
# ==================================================================================================


def roll_out(policy, tasks, group_size, seeds, args):
    """Sample `group_size` responses to each task with the run's settings; seeds: one a task -> Rollout."""
    prompts = [encode_prompt(policy.tokenizer, task.prompt) for task in tasks]
    graph = args.graph and args.device == "cuda" and can_be_recorded(policy.model.config)
    options = dict(end_ids=policy.end_ids, pad_id=policy.end_ids[0], seeds=seeds, graph=graph)
    with precision(args.device, args.dtype):
        return sample(policy.model, prompts, group_size, args.max_new_tokens, args.temperature, **options)


def criteria_of(tasks, verdicts):
    """What the discriminator reads of each rubric: "yes: use the word lamp", or "no: ..." if violated.

    verdicts [N, K] -> for each of the N responses a list of texts.
    """
    owners = [task for task in tasks for _ in range(len(verdicts) // len(tasks))]  # N tasks
    text = lambda rubric, s: f"{'yes' if s > 0 else 'no'}: {rubric.criterion}"
    return [list(map(text, task.rubrics, row)) for task, row in zip(owners, verdicts.tolist())]


def group_advantages(rewards, verdicts, relevance, mask, args):
    """Section 5 for each group of a batch: rewards [N], verdicts [N, K], relevance [N, K, T] -> [N, T]."""
    advantages = []
    groups = zip(*(x.split(args.group_size) for x in (rewards, verdicts, relevance, mask)))
    for R, s, w, valid in groups:  # [G], [G, K], [G, K, T], [G, T]
        response_adv, token_adv = response_advantage(R), token_advantage(s, w, valid, args.partition)
        advantages.append(combine_advantages(response_adv, token_adv, valid, args.alpha, args.combine))
    return torch.cat(advantages)


def rollout_metrics(rollout, verdicts, rewards, group_size):
    """What a rollout says of the policy: reward, accuracies, entropy in nats a token, shares in [0, 1].

    verdicts [N, K], rewards [N]. zero_variance: groups of equal rewards teach nothing at response level.
    """
    tokens, grouped = int(rollout.mask.sum()), rewards.view(-1, group_size)  # [P, G]
    return dict(
        reward=float(rewards.mean()),
        instruction=float(response_reward(verdicts, "aon").mean()),
        rubric=float((verdicts > 0).sum() / (verdicts != 0).sum()),
        entropy=float(rollout.entropy.sum() / tokens),
        truncated=float(rollout.truncated.float().mean()),
        zero_variance=float((grouped.amax(1) == grouped.amin(1)).float().mean()),
        tokens=tokens,
    )


def scored_tokens(relevance, evidence, verdicts, mask):
    """relevance and evidence [N, K, T] at response tokens, where there is evidence: two tensors [M].

    verdicts [N, K], mask [N, T].
    """
    valid = (verdicts != 0)[..., None] & (mask[:, None] > 0) & (evidence >= 0)  # [N, K, T]
    return relevance[valid].cpu(), evidence[valid].cpu()


class Models(NamedTuple):
    policy: Policy
    optimizer: torch.optim.Optimizer  # of the policy
    discriminator: RelevanceDiscriminator | None
    judge: Policy | None  # for rubrics that no rule can decide
    reference: torch.nn.Module | None  # for --kl


def task_stream(tasks, seed):
    """(task, seed for its sampling) without end, in a new order each time round."""
    rng = random.Random(seed)
    while True:
        for task in rng.sample(tasks, len(tasks)):
            yield task, rng.getrandbits(62)


def draw_tasks(stream, args):
    """The next `args.prompts` tasks and seeds of the stream; of these, this process's share."""
    drawn = list(itertools.islice(stream, args.prompts))
    return zip(*drawn[RANK::WORLD])


def warm_up(models, stream, args):
    """Train the discriminator on the starting policy's rollouts; the policy stays as it is."""
    policy, discriminator = models.policy, models.discriminator
    for _ in progress(range(args.warmup), "warm-up"):
        tasks, seeds = draw_tasks(stream, args)
        rollout = roll_out(policy, tasks, args.group_size, seeds, args)
        _, verdicts, evidence = grade(policy.tokenizer, rollout, tasks, models.judge)
        for _ in range(4):  # a rollout costs more than a step of the discriminator
            discriminator.fit(criteria_of(tasks, verdicts), rollout.ids, rollout.mask, evidence)


@contextmanager
def timed(seconds, phase):
    """Add the seconds that the block takes to seconds[phase]."""
    start = time.perf_counter()
    yield
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()  # kernels run on after the call that started them
    seconds[phase] += time.perf_counter() - start


def peak_memory_mb():
    """Peak memory that torch took on the GPU; 0 without one."""
    return torch.cuda.max_memory_allocated() / 2**20


def train_step(models, tasks, seeds, args):
    """The pipeline of the opening picture, once. Returns a row of metrics, and what show_credit needs.

    f1 and auroc in the row are those of the relevance that was asked for.
    """
    (policy, optimizer, discriminator, judge, reference), G = models, args.group_size
    seconds = defaultdict(float)
    with timed(seconds, "rollout"):
        rollout = roll_out(policy, tasks, G, seeds, args)  # ids, mask, logprobs [N, T]
    with timed(seconds, "verify"):
        _, verdicts, evidence = grade(policy.tokenizer, rollout, tasks, judge)  # [N, K], [N, K, T]
        rewards = response_reward(verdicts, args.reward)  # [N]
        row = rollout_metrics(rollout, verdicts, rewards, G)
    with timed(seconds, "relevance"):
        uniform = torch.ones_like(evidence)  # [N, K, T]
        relevance = uniform if args.relevance == "uniform" else evidence.clamp(min=0)
        if args.relevance == "shuffled":
            relevance = shuffled(relevance, rollout.mask)
        if discriminator:
            criteria = criteria_of(tasks, verdicts)
            # what gets nothing need not be known
            asked = contested(verdicts, G) if args.partition in CONTESTED_ONLY else verdicts
            relevance = discriminator.predict(criteria, rollout.ids, rollout.mask, asked.nonzero().tolist())
            scored = scored_tokens(relevance, evidence, asked, rollout.mask)
            row["f1"], row["auroc"] = f1_and_auroc(*scored)
            discriminator.fit(criteria, rollout.ids, rollout.mask, evidence)
    with timed(seconds, "update"):
        advantages = group_advantages(rewards, verdicts, relevance, rollout.mask, args)  # [N, T]
        row |= update(policy.model, optimizer, rollout, advantages, args, reference)
    row |= dict(seconds=sum(seconds.values()), peak_memory_mb=peak_memory_mb())
    row = merged(gather(row | {f"seconds_{phase}": s for phase, s in seconds.items()}))
    row["tokens_per_second"] = row["tokens"] / row["seconds"]
    return row, (tasks[0], rollout.ids[0], rollout.mask[0], verdicts[0], advantages[0])


def merged(rows):
    """One row of metrics from those of all processes: tokens add up, the slowest counts, else the mean."""
    rule = lambda name: sum if name == "tokens" else max if name.startswith(("seconds", "peak")) else fmean
    return {name: rule(name)([row[name] for row in rows]) for name in rows[0]}


def progress(items, what, **options):
    """A progress bar, in a terminal, of the one process that speaks."""
    style = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
    return tqdm(items, what, bar_format=style, disable=RANK > 0 or None, **options)


def train(models, train_tasks, eval_tasks, out, args, done=0, before=None):
    """Warm-up, then the steps after `done`; one line a step to metrics.jsonl, and checkpoints.

    done, before: from a checkpoint, or for the next: steps, and the first evaluation.
    Ctrl-C ends it after a whole step, with a checkpoint and exit status 130.
    """
    metrics, policy = out / "metrics.jsonl", models.policy
    if metrics.is_file():  # what came after the checkpoint is done again
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
        write_whole(metrics, "".join(whole))
    warmup = args.warmup if models.discriminator else 0
    drawn = (warmup + done) * args.prompts if done else 0  # tasks that the stream gave before the checkpoint
    stream = itertools.islice(task_stream(train_tasks, args.seed), drawn, None)
    if warmup and not done:
        warm_up(models, stream, args)
    interrupted, default = [], signal.default_int_handler  # first Ctrl-C: ends the loop; second: the program
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(signal.signal(signal.SIGINT, default)))
    bar = progress(range(done + 1, args.steps + 1), "train", initial=done, total=args.steps)
    for step in bar:
        row, example = train_step(models, *draw_tasks(stream, args), args)
        if args.eval_every and step % args.eval_every == 0 and step < args.steps:
            result, _ = evaluate(policy, eval_tasks[: args.eval_prompts], args, models.judge)
            row |= {f"eval_{name}": result[name] for name in ("instruction", "rubric", "truncated")}
            line = "step {step:>4}: reward {reward:.3f}, entropy {entropy:.2f}, residual {residual:.2f}; "
            line += "{prompts} held-out prompts: {eval_instruction:.1%} / {eval_rubric:.1%}"
            tqdm.write(line.format(step=step, prompts=result["prompts"], **row))
        if args.show_every and step % args.show_every == 0:
            tqdm.write(show_credit(policy.tokenizer, *example))
        if RANK == 0:
            with open(metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(dict(step=step, **row)) + "\n")
        state = "reward {reward:.2f}, acc {instruction:.2f}/{rubric:.2f}, H {entropy:.2f}, tax {residual:.2f}"
        bar.set_postfix_str(state.format(**row))
        stop = sum(gather(len(interrupted)))
        if stop or step == args.steps or step % args.save_every == 0:
            save_checkpoint(out, models, step, before)
        if stop and step < args.steps:
            print(f"stopped after a whole step; to go on: python rtt.py --resume {out}")
            sys.exit(130)
    signal.signal(signal.SIGINT, default)


# ==================================================================================================
# 9. Measuring, showing, saving
#
# In: what the loop has made.  Out: accuracies on held-out prompts, with every response and its evidence; the
# credit of a response in colours; checkpoints, from which a run goes on as if it had never been broken off.
# ==================================================================================================


def evaluate(policy, tasks, args, judge=None, discriminator=None):
    """Accuracy on held-out tasks, one response each, every time from the same random numbers.

    Returns a dict and the records of all responses. The dict: "instruction", "rubric", "truncated": shares;
    "kinds": {rubric id: [satisfied, total]}; "prompts": how many; with a discriminator its "f1" and "auroc".
    """
    records, scored = [], []
    mine, size = range(RANK, len(tasks), WORLD), args.prompts * args.group_size  # a step's responses
    for start in progress(range(0, len(mine), size), "evaluate", leave=False):
        part = mine[start : start + size]
        chunk = [tasks[n] for n in part]
        rollout = roll_out(policy, chunk, 1, part, args)
        texts, verdicts, evidence = grade(policy.tokenizer, rollout, chunk, judge)  # [N, K], [N, K, T]
        rows = rollout.truncated.tolist(), verdicts.tolist(), evidence[:, :, 0].tolist()
        records += [record(*row) for row in zip(part, chunk, texts, *rows)]
        if discriminator:
            relevance = discriminator.predict(criteria_of(chunk, verdicts), rollout.ids, rollout.mask)
            scored.append(scored_tokens(relevance, evidence, verdicts, rollout.mask))
    records = sorted(itertools.chain(*gather(records)), key=lambda r: r["index"])
    met, kinds = [[rubric["satisfied"] for rubric in r["rubrics"]] for r in records], defaultdict(list)
    for rubric in itertools.chain(*(r["rubrics"] for r in records)):
        kinds[rubric["id"]].append(rubric["satisfied"])
    result = dict(instruction=fmean(map(all, met)), rubric=fmean(itertools.chain(*met)))
    result["truncated"] = fmean(r["truncated"] for r in records)
    if discriminator:
        scored = zip(*itertools.chain(*gather(scored)))
        result["f1"], result["auroc"] = f1_and_auroc(*map(torch.cat, scored))
    kinds = {kind: [sum(satisfied), len(satisfied)] for kind, satisfied in sorted(kinds.items())}
    return result | dict(prompts=len(tasks), kinds=kinds), records


def record(index, task, text, truncated, verdicts, known):
    """One response as responses.jsonl has it: evidence in characters, null where a judge gave the verdict."""
    rubrics = []
    for rubric, verdict, evidence in zip(task.rubrics, verdicts, known):
        found = verify(rubric, text, task.prompt).evidence if evidence >= 0 else None
        rubrics.append(dict(id=rubric.id, criterion=rubric.criterion, satisfied=verdict > 0, evidence=found))
    return dict(index=index, prompt=task.prompt, response=text, truncated=truncated, rubrics=rubrics)


def table(*results):
    """Held-out accuracy, overall and per kind of rubric: of one evaluation, or of two and the change."""
    two, kinds = len(results) == 2, {kind: n for kind, (_, n) in results[0]["kinds"].items()}
    rows = [("instruction level (all rubrics)", results[0]["prompts"], [r["instruction"] for r in results])]
    rows += [("rubric level", sum(kinds.values()), [r["rubric"] for r in results])]
    rows += [(f"  {kind}", n, [r["kinds"][kind][0] / n for r in results]) for kind, n in kinds.items()]
    lines = [f"{'held-out accuracy, %':<42}{'count':>7}" + f"{'before':>9}{'after':>9}{'change':>9}" * two]
    for name, count, shares in rows:
        change = f"{100 * (shares[-1] - shares[0]):>+9.1f}" * two
        lines.append(f"{name:<42}{count:>7}" + "".join(f"{100 * x:>9.1f}" for x in shares) + change)
    return "\n".join(lines)


def summary(out, after):
    """How good the discriminator is and how long a step took, from the last evaluation and metrics.jsonl."""
    rows = [json.loads(line) for line in open(out / "metrics.jsonl", encoding="utf-8")]
    average = lambda name: fmean(row[name] for row in rows)
    phases = [name for name in rows[0] if name.startswith("seconds_")]
    phases = ", ".join(f"{name.removeprefix('seconds_')} {average(name):.2f}" for name in phases)
    speed = f"{average('seconds'):.2f} ({phases}); {average('tokens_per_second'):.0f} response tokens/s"
    found = "\ndiscriminator on held-out prompts: token F1 {f1:.3f}, AUROC {auroc:.3f}\n"
    return (found.format(**after) if "f1" in after else "") + f"seconds a step: {speed}"


def show_credit(tokenizer, task, ids, mask, verdicts, advantages):
    """One response with its mean advantage; in a terminal, tokens above it are green and those below red.

    ids, mask, advantages [T], verdicts [K].
    """
    (text,), (tokens,) = token_spans(tokenizer, [ids[mask > 0].tolist()])
    mean = advantages[mask > 0].mean()
    strength = ((advantages - mean) / (advantages - mean)[mask > 0].abs().max().clamp(min=1e-6)).tolist()
    pieces, shown = [], 0
    for (start, end), value in zip(tokens, strength):
        fade = 255 - int(155 * abs(value))
        red, green = (fade, 255) if value > 0 else (255, fade)
        colour = f"\033[30;48;2;{red};{green};{fade}m{{}}\033[0m" if sys.stdout.isatty() else "{}"
        piece = text[max(start, shown) : end] or "⏎" * (start == len(text))  # ⏎: the end token
        pieces.append(colour.format(piece.rstrip("\n")) + "\n" * piece.count("\n"))
        shown = max(shown, end)
    boxes = ["[x]" if s > 0 else "[ ]" for s in verdicts.tolist()]
    marks = ", ".join(f"{box} {rubric.criterion}" for box, rubric in zip(boxes, task.rubrics))
    return f"\n{task.prompt}\n{marks}; advantage {mean:+.2f}\n{''.join(pieces)}\n"


def write_whole(path, content):
    """Write a text or a checkpoint to a new file, then rename it: `path` is never half written."""
    if RANK:  # one process writes for all
        return
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            os.fsync(file.fileno())
        os.replace(new, path)
    except RuntimeError as error:  # torch.save's, raised while it handles the OSError of a full disk
        raise error.__context__ or error from None
    finally:
        new.unlink(missing_ok=True)


def trained(models):
    """What training changes, by name: the parts of a checkpoint."""
    learner = models.discriminator
    parts = dict(policy=models.policy.model, optimizer=models.optimizer)
    return parts | (dict(discriminator=learner.model, its_optimizer=learner.optimizer) if learner else {})


def save_checkpoint(out, models, done, before):
    """Everything that the rest of a run depends on, in one file; the last two are kept.

    Random numbers come from seeds in the stream of tasks, but for the pairs that the discriminator draws
    and for `shuffled`.
    """
    state = {name: part.state_dict() for name, part in trained(models).items()}
    state |= dict(done=done, before=before, random=gather(torch.get_rng_state()))
    write_whole(out / f"checkpoint-{done:06}.pt", state)
    for old in sorted(out.glob("checkpoint-*.pt"))[: 0 if RANK else -2]:
        old.unlink()


def load_checkpoint(out, models):
    """Put everything back as it was at the newest checkpoint, if any. Returns done and before, for train."""
    newest = max(out.glob("checkpoint-*.pt"), default=None)
    if newest is None:
        if (out / "result.json").is_file():
            raise BadInput(f"--resume {out}: is finished, and its checkpoints are gone; begin a new run")
        return 0, None
    try:
        state = torch.load(newest, map_location="cpu", weights_only=True)
        for name, part in trained(models).items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"][RANK % len(state["random"])])
        return state["done"], state["before"]
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"damaged, or of another model ({reason}); delete it to go on from the one before"
        raise BadInput(f"{newest}: {reason}") from None


def open_run(out):
    """Make the run's folder and claim it. Raises BadInput if it cannot be written or holds anything."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise BadInput(f"--out {out}: is not empty; name a new folder, or go on with --resume {out}")
        (out / "config.json").touch(exist_ok=False)  # now it is this run's
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written ({error.strerror})") from None


# ==================================================================================================
# 10. Comparing: several configurations, several seeds, one table
#
# In: what to change in the command line.  Out: a table with intervals, and one line a run with its settings.
# The runs are ordinary runs of this file, a process and a thread each; finished ones are kept, broken ones
# resumed.
# ==================================================================================================


def grid(*axes):
    """All combinations of an option from each axis: grid(["a=0", "a=1"], ["", "b=2"]) -> a=0, a=0+b=2, ..."""
    return ["+".join(filter(None, options)) for options in itertools.product(*axes)]


METHODS = ["alpha=0", "partition=intra", "partition=verdict"]  # plain GRPO first: differences are to it
STUDIES = {
    # RTT's main claim, then its group partitioning problem
    "rtt": grid(METHODS[:2], ["", "reward=csr"]) + METHODS[2:],
    "partition": ["alpha=0", *grid(["partition=intra"], ["", "alpha=0.25", "alpha=1"])]
    + [f"partition={partition}" for partition in PARTITIONS[1:]],
    # TGC: from the second of four updates on, the policy is not the sampler's any more
    "exchange": grid(["alpha=0", "partition=verdict"], [f"loss={loss}+updates=4" for loss in LOSSES]),
    # Is it the token credit that helps? With uniform relevance "intra" comes to alpha=0, "verdict" does not
    "relevance": ["alpha=0"]
    + grid(METHODS[1:], [f"relevance={kind}" for kind in ("evidence", "discriminator", "shuffled")])
    + ["partition=verdict+relevance=uniform"],
    "lr": grid(METHODS, ["lr=1e-4", "lr=3e-4", "lr=1e-3"]),
}
GOAL = 0.5  # the held-out instruction-level accuracy whose first step the table names


def finish(folder, argv):
    """Run a configuration, or what is left of it, in a process of its own. Raises BadInput if it fails."""
    if not (folder / "result.json").is_file():
        flags = ["--resume", folder] if (folder / "config.json").is_file() else argv
        command, one_thread = [sys.executable, __file__, *flags], dict(os.environ, OMP_NUM_THREADS="1")
        ended = subprocess.run(command, env=one_thread, capture_output=True, text=True)
        if ended.returncode:
            reason = (ended.stderr.strip() or "failed").splitlines()[-1].removeprefix("rtt.py: ")
            raise BadInput(f"{folder}: {reason} (exit status {ended.returncode})")
    for state in folder.glob("checkpoint-*"):  # only the numbers are wanted
        state.unlink()


def outcome(folder):
    """A finished run in numbers, accuracies in per cent, with its settings.

    "curve": [step, accuracy]; "goal": the step at which that reached GOAL, interpolated, None if it did not;
    "between": [step, residual, entropy, truncated], means since the evaluation before.
    """
    config, result = (json.loads((folder / name).read_text()) for name in ("config.json", "result.json"))
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    curve = [(0, result["before"]["instruction"])]
    curve += [(row["step"], row["eval_instruction"]) for row in rows if "eval_instruction" in row]
    curve += [(len(rows), result["after"]["instruction"])]
    pairs, mean = list(itertools.pairwise(curve)), lambda part, name: fmean(row[name] for row in part)
    reached = [a + (b - a) * (GOAL - x) / (y - x) for (a, x), (b, y) in pairs if x < GOAL <= y]
    logged = ("residual", "entropy", "truncated")
    here = f"{Path(__file__).resolve().parent}/"  # a result does not say where this file lies
    config = {
        key: value.removeprefix(here) if isinstance(value, str) else value for key, value in config.items()
    }
    return dict(
        instruction=100 * result["after"]["instruction"],
        rubric=100 * result["after"]["rubric"],
        goal=0.0 if curve[0][1] >= GOAL else min(reached, default=None),
        entropy=mean(rows[-10:], "entropy"),
        residual=mean(rows, "residual"),
        jitter=100 * fmean(abs(y - x) for (_, x), (_, y) in pairs[1:] or pairs),  # without the first rise
        seconds=mean(rows, "seconds"),
        curve=curve,
        between=[[b, *(mean(rows[a:b], name) for name in logged)] for (a, _), (b, _) in pairs],
        config=config | dict(out=folder.name, resume=""),
    )


def interval(values):
    """Mean of n numbers, and half the width of its 95 % interval by Student's t (nan for n = 1).

    Above n = 10 that of 10, a little too wide.
    """
    t = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)[min(len(values), 10) - 1]
    return fmean(values), t * (stdev(values) if len(values) > 1 else 0.0) / math.sqrt(len(values))


def planned(args, argv):
    """What `--compare` names: configurations, and the command line of every run, {folder: argv}.

    Raises BadInput for what cannot be run, or if a folder holds a run with other settings.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--compare", "--seeds", "--seed", "--out"):
        own.add_argument(flag)
    common, out = own.parse_known_args(argv)[1], Path(args.out or "runs/compare")
    names, jobs, data = STUDIES.get(args.compare) or args.compare.split(","), {}, set()
    kept = {"", "compare", "seeds", "seed", "out", "resume", "eval-only", "help"}
    for name in names:
        if names.count(name) > 1 or kept & {option.partition("=")[0] for option in name.split("+")}:
            reason = "is empty, named twice, or sets what a comparison sets itself"
            raise BadInput(f"--compare: {name!r} {reason}; a study is one of {', '.join(STUDIES)}")
    for seed, name in itertools.product(range(args.seeds), names):
        folder = out / f"{name}+seed={seed}"
        flags = [f"--{option}" for option in name.split("+") if option != "base"]
        jobs[folder] = [*common, "--show-every=0", *flags, f"--seed={seed}", f"--out={folder}"]
        wanted, config = vars(parse_args(jobs[folder])), folder / "config.json"
        data.add((wanted["data"], wanted["rubrics"]))
        if config.is_file() and json.loads(config.read_text()) | dict(out=str(folder), resume="") != wanted:
            raise BadInput(f"{folder}: holds a run with other settings; name another --out")
    for path, rubrics in data:
        load_both(path, rubrics, False)
    return names, jobs


def compare(args, argv):
    """Run every configuration of `--compare` with every seed, as many at a time as there are cores."""
    for config in Path(args.out or "runs/compare").glob("*/config.json"):
        if not config.stat().st_size:  # this run was broken off before it began
            config.unlink()
    names, jobs = planned(args, argv)
    with ThreadPoolExecutor(os.cpu_count() if args.device == "cpu" else 1) as pool:
        runs = [pool.submit(finish, *job) for job in jobs.items()]
        try:
            for done in progress(as_completed(runs), "runs", total=len(runs)):
                done.result()
        finally:  # after Ctrl-C, or once one has failed, what waits is not begun
            pool.shutdown(wait=False, cancel_futures=True)
    found = [outcome(folder) for folder in jobs]  # seeds, and for each all configurations
    results = [found[start :: len(names)] for start in range(len(names))]
    out, lines = next(iter(jobs)).parent, [json.dumps(run) + "\n" for runs in results for run in runs]
    write_whole(out / "results.jsonl", "".join(lines))
    write_whole(out / "table.txt", comparison(names, results) + "\n")
    print(comparison(names, results))


def comparison(names, results):
    """The table of a study: results [configurations][seeds] -> text. Differences are paired by seed."""
    width, rest = max(map(len, ["configuration", *names])), ("entropy", "residual", "jitter", "seconds")
    row = f"{{:<{width}}}" + "{:>15}" * 4 + "{:>10}" * 4
    titles = "instruction %", "to the first", "rubric %", f"step of {GOAL:.0%}", *rest
    lines = [row.format("configuration", *titles)]
    for name, runs in zip(names, results):
        level = lambda key: "{:.1f} ± {:.1f}".format(*interval([run[key] for run in runs]))
        gains = [run["instruction"] - first["instruction"] for run, first in zip(runs, results[0])]
        steps = [run["goal"] for run in runs if run["goal"] is not None]
        goal = f"{fmean(steps):.0f} ({len(steps)}/{len(runs)})" if steps else "never"
        columns = level("instruction"), "{:+.1f} ± {:.1f}".format(*interval(gains)), level("rubric"), goal
        lines.append(row.format(name, *columns, *(f"{fmean(run[key] for run in runs):.2f}" for key in rest)))
    return "\n".join(lines)


# ==================================================================================================
# 11. The command line
#
# In: the command line.  Out: a run.  What is wrong is said in one line, before any time is spent on models.
# ==================================================================================================


@contextmanager
def loading(flag, name):
    """Turn what transformers raises for a model that cannot be had into one line."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise BadInput(f"{flag} {name}: not a model folder, it has no config.json")
    if not Path(name).is_dir() and not re.fullmatch(HUB_ID, name):
        raise BadInput(f"{flag} {name}: no such folder; a model folder or a name on the hub is needed")
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"cannot be loaded from here or the hub ({reason}); python rtt.py alone needs no download"
        raise BadInput(f"{flag} {name}: {reason}") from None


def load_policy(flag, name, args, dtype, tasks, wrap="{}"):
    """The Policy of a local folder or a hub id.

    Raises BadInput if it cannot be had, has no end token, or if a prompt with its response may not fit into
    its context. wrap: what a judge reads beside the prompt.
    """
    with loading(flag, name):
        config = without_dropout(AutoConfig.from_pretrained(name))
        if getattr(config, "quantization_config", None):
            raise BadInput(f"{flag} {name}: is quantised; only weights in floating point can be trained")
        tokenizer = AutoTokenizer.from_pretrained(name)
        longest = max((len(encode_prompt(tokenizer, wrap.format(t.prompt))), t.prompt[:40]) for t in tasks)
        if not longest[0]:
            raise BadInput(f"{flag} {name}: has no tokenizer, or one without any token")
        context = getattr(config.get_text_config(), "max_position_embeddings", math.inf)
        if longest[0] + args.max_new_tokens > context:
            raise BadInput(
                f"{args.data}: a prompt of {longest[0]} tokens and --max-new-tokens {args.max_new_tokens} "
                f"exceed the context of {flag} {name}, {context} tokens; lower it or leave out {longest[1]!r}"
            )
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, **SAFE)
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    needed = {"cache", "position_ids", "logits_to_keep"}
    if needed - inspect.signature(model.forward).parameters.keys() or {*kinds} - {"full_attention", "sliding_attention", "chunked_attention"}:
        raise BadInput(f"{flag} {name}: has recurrent layers; only attention's past can be shared by a group")
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    if not ends:
        raise BadInput(f"{flag} {name}: neither its tokenizer nor its generation_config has an end token")
    return Policy(model.to(args.device), tokenizer, sorted(ends))


def load_both(path, rubrics, only_held_out):
    """Tasks to train on, and held-out ones: train and eval.jsonl of a folder, or a file's last tenth.

    rubrics: keep only prompts with as many; 0: all. only_held_out (--eval-only): eval.jsonl of a folder, or
    all of a file; nothing to train on.
    """
    of_this_size = lambda tasks: [task for task in tasks if rubrics in (0, len(task.rubrics))]
    if Path(path).is_dir():
        train = [] if only_held_out else of_this_size(load_tasks(path, "train"))
        held_out = of_this_size(load_tasks(path, "eval"))
    else:
        tasks = of_this_size(load_tasks(path))
        cut = 0 if only_held_out else len(tasks) - max(1, len(tasks) // 10)
        train, held_out = tasks[:cut], tasks[cut:]
    if not held_out or not train and not only_held_out:
        kind = f" for --rubrics {rubrics}" if rubrics else ""
        raise BadInput(f"{path}: too few prompts{kind}; at least one to train on and one held out are needed")
    return train, held_out


def load_models(tasks, args):
    """All models of a run. Raises BadInput."""
    policy = load_policy("--model", args.model, args, torch.float32, tasks)
    judge = discriminator = reference = None
    judged = [task for task in tasks if any(map(needs_judge, task.rubrics))]
    if judged:
        wrap = QUESTION.format("{}", "", "criterion " * 20)  # room for criteria of some 20 words
        dtype = getattr(torch, args.dtype)
        judge = load_policy("--judge", args.judge or args.model, args, dtype, judged, wrap)
        if not all(answer_tokens(judge.tokenizer)):
            raise BadInput(f"--judge {args.judge or args.model}: its tokenizer begins yes and no alike")
    if not args.eval_only and args.relevance == "discriminator" and args.alpha:
        name, tokenizer = args.discriminator or args.model, policy.tokenizer
        with loading("--discriminator", name):
            if AutoTokenizer.from_pretrained(name).get_vocab() != tokenizer.get_vocab():
                raise BadInput(f"--discriminator {name}: must have the tokenizer of --model {args.model}")
            settings = (args.discriminator_lr, args.device, args.dtype)
            discriminator = RelevanceDiscriminator(name, tokenizer, *settings)
    if not args.eval_only and args.kl:
        reference = copy.deepcopy(policy.model)
    if args.gradient_checkpointing:
        for model in [policy.model] + ([discriminator.base] if discriminator else []):
            try:
                model.activation_checkpointing_enable()
            except ValueError as error:
                raise BadInput(f"--gradient-checkpointing: {error}; use --no-gradient-checkpointing") from None
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=args.lr)
    return Models(policy, optimizer, discriminator, judge, reference)


def run(args):
    """Check the input, load, measure, train, measure again, save."""
    train_tasks, eval_tasks = load_both(args.data, args.rubrics, args.eval_only)
    out = Path(args.resume or args.out or time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}"))
    new = RANK == 0 and not args.resume
    if new:
        open_run(out)
    torch.manual_seed(args.seed)
    try:
        models = load_models(train_tasks + eval_tasks, args)
        done, before = load_checkpoint(out, models)
        if done > args.steps:
            raise BadInput(f"--steps {args.steps}: {done} are done already")
    except BaseException:  # Ctrl-C, too: nothing has begun
        if new:
            (out / "config.json").unlink()
            out.rmdir()
        raise
    write_whole(out / "config.json", json.dumps(vars(args), indent=2) + "\n")
    start, policy, judge = time.perf_counter(), models.policy, models.judge
    if args.eval_only:
        result, records = evaluate(policy, eval_tasks, args, judge)
        print(table(result))
    else:
        if done:
            print(f"going on after step {done}")
        before = before or evaluate(policy, eval_tasks, args, judge)[0]
        print(f"before: held-out {before['instruction']:.1%} / {before['rubric']:.1%} (instruction / rubric)")
        train(models, train_tasks, eval_tasks, out, args, done, before)
        after, records = evaluate(policy, eval_tasks, args, judge, models.discriminator)
        result = dict(before=before, after=after)
        print("\n" + table(before, after))
        if RANK == 0:
            print(summary(out, after))
            policy.model.save_pretrained(out / "policy")
            policy.tokenizer.save_pretrained(out / "policy")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_whole(out / "responses.jsonl", "".join(lines))
    write_whole(out / "result.json", json.dumps(result, indent=2) + "\n")
    memory = f"; peak memory of the GPU {peak_memory_mb():.0f} MB" if peak_memory_mb() else ""
    print(f"{time.perf_counter() - start:.0f} s in all{memory}")
    print(f"everything is in {out}")


def beside(name):
    """A path that lies beside this file, as seen from here."""
    return os.path.relpath(Path(__file__).resolve().parent / name)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where there is one to show."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, "", False) else super()._get_help_string(action)


def number(kind, least, what):
    """An argparse type: a finite number of this kind, at least `least`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < (2**62 if kind is int else math.inf):
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
        return value

    return parse


def parse_args(argv=None):
    """The command line. Raises BadInput for what is not possible."""
    parser = argparse.ArgumentParser(
        usage="python rtt.py [options]",
        allow_abbrev=False,
        description="Train a language model on rubrics with token-level credit: RTT-GRPO and TGC's losses.\n"
        "Defaults are those of the embedded model. For any other: --data data/instructions --lr 1e-6\n"
        "--discriminator-lr 1e-5 --max-new-tokens 512 --micro-batch 1 --gradient-checkpointing",
        epilog="examples:\n"
        "  python rtt.py                                        the embedded model and stories\n"
        "  python rtt.py --alpha 0 --reward csr                 plain GRPO, on the share of rubrics met\n"
        "  python rtt.py --alpha 0 --loss dfpo-min --updates 4  off policy, with weights that cancel\n"
        "  python rtt.py --model Qwen2.5-0.5B                   a model of the hub, on data/instructions\n"
        "  python rtt.py --eval-only --model NAME --data NAME   only measure\n"
        "  python rtt.py --resume runs/NAME                     go on after an interruption\n"
        "  python rtt.py --compare base,alpha=0 --seeds 3       several runs in one table\n"
        "  torchrun --nproc_per_node 4 rtt.py --model NAME      on four GPUs",
        formatter_class=Help,
    )

    def error(message):
        raise BadInput(message)

    parser.error = error
    some = number(int, 1, "a whole number of at least 1")
    any_number = number(int, 0, "a whole number of at least 0")
    positive = number(float, sys.float_info.min, "a number above 0")
    weight = number(float, 0, "a number of at least 0")
    # fmt: off
    add = parser.add_argument_group("model and data").add_argument
    add("--model", metavar="NAME", default=beside("data/tiny"),
        help="a Hugging Face model folder, or a model's name on the hub (Qwen2.5-0.5B is Qwen/Qwen2.5-0.5B)")
    add("--data", metavar="NAME", default=beside("data/stories"),
        help="folder with train and eval.jsonl, a .jsonl file, or a hub data set such as google/IFEval")
    add("--rubrics", metavar="N", type=any_number, default=0, help="use only prompts with N rubrics (0: all)")
    add("--judge", metavar="NAME", default="",
        help="model that decides rubrics which no rule can (default: the starting policy)")
    add("--out", metavar="DIR", default="",
        help="new folder for metrics, config and trained policy (default: runs/<time>)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="auto: the best there is")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="of the computation; weights stay float32 (auto: bfloat16 on cuda)")
    add("--graph", action=argparse.BooleanOptionalAction, default=True,
        help="on cuda, record a decoding step as a graph; --no-graph where a model does not bear that")
    add("--eval-only", action="store_true", help="measure the model on the held-out data, do not train")
    add("--seed", metavar="N", type=any_number, default=0,
        help="of everything random; on the CPU, equal seeds give equal runs")
    add = parser.add_argument_group("rollouts").add_argument
    add("--steps", metavar="N", type=some, default=100, help="RL steps")
    add("--prompts", metavar="N", type=some, default=8, help="prompts a step")
    add("--group-size", metavar="G", type=some, default=8, help="responses a prompt, at least 2")
    add("--max-new-tokens", metavar="N", type=some, default=64, help="length limit of a response, in tokens")
    add("--temperature", metavar="X", type=number(float, 0.01, "a number of at least 0.01"), default=1.0,
        help="of sampling")
    add = parser.add_argument_group("rewards and advantages (RTT)").add_argument
    add("--reward", choices=("aon", "csr"), default="aon",
        help="all rubrics or nothing; or the share of them satisfied")
    add("--relevance", choices=("discriminator", "evidence", "uniform", "shuffled"), default="discriminator",
        help="of tokens to verdicts: learned; the verifiers' own; all alike; the verifiers' on other tokens")
    add("--partition", choices=PARTITIONS, default="verdict",
        help="what the token rewards are normalised over; intra is RTT's")
    add("--alpha", metavar="X", type=weight, default=0.5, help="weight of the token level; 0 is plain GRPO")
    add("--combine", choices=("add", "mix"), default="add", help="A + alpha a; or (1 - alpha) A + alpha a")
    add("--discriminator", metavar="NAME", default="", help="model it starts from (default: that of --model)")
    add("--discriminator-lr", metavar="X", type=positive, default=1e-3, help="its learning rate")
    add("--warmup", metavar="N", type=any_number, default=24,
        help="rollouts it learns from before the first RL step")
    add = parser.add_argument_group("update (TGC)").add_argument
    add("--loss", choices=LOSSES, default="grpo", help="how ratios become weights; see policy_loss")
    add("--clip", metavar=("LOW", "HIGH"), type=positive, nargs=2,
        help="how far below and above 1 a ratio may go (default: 0.2 0.2; gspo 3e-4 4e-4)")
    add("--updates", metavar="N", type=some, default=1, help="optimiser steps a rollout")
    add("--lr", metavar="X", type=positive, default=3e-4, help="learning rate of the policy (Adam, constant)")
    add("--max-grad-norm", metavar="X", type=positive, default=1.0, help="limit of the gradient's norm")
    add("--kl", metavar="X", type=weight, default=0.0,
        help="weight of the KL to the starting policy; 0 costs nothing")
    add("--micro-batch", metavar="N", type=some, default=4, help="groups (prompts) a pass of the update")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="compute layers twice instead of keeping what they computed: slower, less memory")
    add = parser.add_argument_group("measuring").add_argument
    add("--eval-every", metavar="N", type=any_number, default=25,
        help="steps between held-out evaluations (0: only first and last)")
    add("--eval-prompts", metavar="N", type=some, default=256,
        help="prompts in each of these; the first and the last use all")
    add("--show-every", metavar="N", type=any_number, default=50,
        help="steps between responses shown with their credit (0: never)")
    add("--save-every", metavar="N", type=some, default=50, help="steps between checkpoints; two are kept")
    add("--resume", metavar="DIR", default="",
        help="go on with the run in this folder from its last checkpoint, for as many --steps in all")
    add = parser.add_argument_group("comparing").add_argument
    add("--compare", metavar="SPEC", default="",
        help=f"a study ({', '.join(STUDIES)}) or a list such as base,alpha=0,loss=gspo+updates=4")
    add("--seeds", metavar="N", type=some, default=5, help="seeds of each configuration, from 0")
    # fmt: on
    args = parser.parse_args(argv)
    if Path(args.model).resolve() != Path(beside("data/tiny")).resolve():
        parser.set_defaults(**OTHER_MODELS, data=beside("data/instructions"))
        args = parser.parse_args(argv)
    return resumed(args, parser, argv) if args.resume else checked(args)


# The defaults of any model but the embedded one: they fit Qwen2.5-0.5B into 24 GB.
OTHER_MODELS = dict(
    max_new_tokens=512, lr=1e-6, discriminator_lr=1e-5, micro_batch=1, gradient_checkpointing=True
)


def resumed(args, parser, argv):
    """The arguments of the run in `--resume`, but for those that may change. Raises BadInput."""
    try:
        config = json.loads((Path(args.resume) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"--resume {args.resume}: its config.json cannot be read ({error})") from None
    if not isinstance(config, dict) or config.keys() != vars(args).keys():
        raise BadInput(f"--resume {args.resume}: its config.json is not that of a run of this version")
    parser.set_defaults(**config)
    free = ("resume", "steps", "save_every", "eval_every", "eval_prompts", "show_every", "device")
    args = checked(parser.parse_args(argv))
    for name in config.keys() - free:
        if getattr(args, name) != config[name]:
            change = f"was {config[name]!r} and cannot become {getattr(args, name)!r}"
            may = f"what may change is {', '.join(free[1:])}"
            raise BadInput(f"--resume {args.resume}: --{name.replace('_', '-')} {change}; {may}")
    return args


def checked(args):
    """The arguments with "auto" and short names filled in. Raises BadInput for what is not possible."""
    if not (args.model and args.data):
        raise BadInput("--model and --data: must not be empty")
    if args.compare and (WORLD > 1 or args.eval_only or args.resume):
        raise BadInput("--compare: starts whole runs itself; not with torchrun, --eval-only or --resume")
    if args.group_size < 2:
        raise BadInput("--group-size 1: a group needs at least 2 responses, or there is nothing to compare")
    if args.combine == "mix" and args.alpha > 1:
        raise BadInput(
            "--combine mix: --alpha must be at most 1, or the response level would count backwards"
        )
    if args.clip and args.loss not in CLIP:
        raise BadInput(f"--clip: --loss {args.loss} clips nothing")
    if args.prompts % WORLD:
        raise BadInput(f"--prompts {args.prompts}: {WORLD} processes cannot share them equally")
    best = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
    if args.device not in ("auto", "cpu", best):
        raise BadInput(f"--device {args.device}: there is none here, only {' and '.join({'cpu', best})}")
    args.device = best if args.device == "auto" else args.device
    args.dtype = ("bfloat16" if args.device == "cuda" else "float32") if args.dtype == "auto" else args.dtype
    for flag in ("model", "judge", "discriminator"):
        name = getattr(args, flag)
        if re.fullmatch(r"Qwen[\w.-]+", name) and not Path(name).exists():
            setattr(args, flag, f"Qwen/{name}")
    for flag in ("model", "data", "judge", "discriminator"):
        name = getattr(args, flag)
        if name and Path(name).exists():  # so that --resume finds it from anywhere
            setattr(args, flag, os.path.abspath(name))
    return args


def main(argv=None):
    """Run; where the input is bad or the disk is full, say so in one line and leave with status 2."""
    transformers.logging.disable_progress_bar()
    # On H100 and H200 torch prefers cuDNN's attention, whose backward pass gives NaN with padded masks (pytorch
    # issue 196678), and which plans anew for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each of its retries
    try:
        args = parse_args(argv)
        if WORLD > 1:  # each process has a GPU of its own, and the first one speaks and writes
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
            sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
        compare(args, argv) if args.compare else run(args)
        if WORLD > 1:
            dist.destroy_process_group()
    except KeyboardInterrupt:
        goes_on = "--resume, or the same --compare, goes on"
        print(f"rtt.py: interrupted; what was written before is whole: {goes_on}", file=sys.stderr)
        sys.exit(130)
    except (BadInput, FloatingPointError) as error:
        print(f"rtt.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, SafetensorError) as error:
        if not re.search("No space left|quota exceeded|File too large", str(error)):
            raise
        print(f"rtt.py: {error}; what was written before is whole: --resume goes on", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
