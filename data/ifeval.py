# SPDX-License-Identifier: MIT
"""IFEval's other twenty verifiers (arXiv:2311.07911), beside the five of rtt.py, which loads this file.

Each function is a rule: the response and the rubric's arguments in, a verdict and its evidence out, spans of
characters. Its docstring is the criterion in words, its annotations say what the arguments may be.
"""

import json
import os
import re
import unicodedata

from rtt import RELATION, WORD, all_of, counted, end_of, foreign_letters, spans, verifier

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
    script, sharing = script_of(language)
    scripts = tuple(script.split())
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
    if not typical or len(foreign) > len(own):
        return False, foreign
    if len(sharing) > 1:  # English would pass for German
        return None, []
    return True, own


@verifier("keywords:frequency")
def keywords_frequency(text, keyword: str, frequency: int, relation: RELATION):
    """use the word {keyword} {relation} {frequency} times"""
    return counted(spans(re.escape(keyword.strip()), text), relation, frequency)


@verifier("keywords:letter_frequency")
def letter_frequency(text, letter: str, let_frequency: int, let_relation: RELATION):
    """use the letter {letter} {let_relation} {let_frequency} times"""
    if len(letter.strip()) != 1:
        raise ValueError(f"letter must be one character, not {letter!r}")
    found = [(i, i + 1) for i, char in enumerate(text) if letter.strip().lower() in char.lower()]
    return counted(found, let_relation, let_frequency)


@verifier("length_constraints:number_words")
def number_words(text, num_words: int, relation: RELATION):
    """write {relation} {num_words} words"""
    if relation == "less than" and num_words == 1:
        raise ValueError("no response has less than 1 word")
    satisfied, _ = counted(spans(WORD, text), relation, num_words)
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
    if nth_paragraph > num_paragraphs:
        raise ValueError(f"there is no paragraph {nth_paragraph} of {num_paragraphs}")
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
    capitals = [(start, end) for start, end in spans(WORD, text) if text[start:end].isupper()]
    return counted(capitals, capital_relation, capital_frequency)


@verifier("change_case:english_capital")
def english_capital(text):
    """write in English and in capital letters only"""
    small = [(i, i + 1) for i, char in enumerate(text) if char != char.upper() or char.islower()]
    foreign = foreign_letters(text)
    return (False, foreign) if foreign else (text.isupper(), small)


@verifier("punctuation:no_comma")
def no_comma(text):
    """do not use commas"""
    commas = spans(",", text)
    return not commas, commas
