# SPDX-License-Identifier: MIT
"""Make the tiny policy and its stories: data/tiny/ and data/stories/{train,eval}.jsonl.

Why: reinforcement learning from rubrics needs a policy that is already *sometimes* right. A download would do, but a
laptop without a GPU wants a model that samples in seconds. So this file writes little stories from templates, each
asked for with 3 to 5 rubrics in IFEval's schema, trains a byte-level BPE tokenizer on them, and then a Qwen2 model of
about one million parameters by supervised learning, in three phases:

    0  short prompts that only ask for keywords: here the model learns to copy a word from the prompt;
    A  demonstrations that obey each rubric 9 times in 10: here it learns what the other instructions mean;
    B  a short last phase whose demonstrations obey each rubric with a lower probability, which sets the start:
       a policy that knows how to obey, and often does not. That is what RL is to change.

A demonstration is planned to obey or to break each rubric of its prompt, and kept only if `rtt.verify` agrees.

    python data/make_tiny.py [--out DIR] [--warm DIR]

It needs no download, takes about 35 minutes on one CPU core, and is seeded throughout. With `--warm DIR` phase A is
kept there, so that another start (`obey` in PHASE_B) takes 7 minutes. It prints the loss and a quick look at each kind of
rubric while it trains, and at the end how good the start is, this table and a few samples. 512 held-out prompts, one
sample each at temperature 1; "not asked": the same prompt without the sentence that asks for this rubric.

    rubrics satisfied 55.7 %; all rubrics of the prompt 12.1 % (with 3 rubrics 20.4 %, with 4 10.2 %, with 5 4.9 %)
    (with other random numbers: 53.2, 53.5, 54.9 % and 10.4, 9.6, 10.4 %; with those of rtt.py 54.9 % and 10.7 %)
    response tokens: mean 39.1; ended within 64: 98.6 %

    satisfied, %                               asked  not asked
    keywords:existence                            52          1
    keywords:forbidden_words                      67          0
    keywords:frequency                            38          0
    length_constraints:number_sentences           55         14
    length_constraints:number_words               58         10
    punctuation:no_comma                          58          4
    startend:end_checker                          54          0
    startend:quotation                            50          0
    change_case:english_lowercase                 62          0
    detectable_content:postscript                 63          0
    detectable_format:title                       57          0
    detectable_format:number_bullet_lists         56          0
"""
import argparse
import json
import math
import random
import re
import sys
import time
from pathlib import Path
from statistics import fmean as mean

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import rtt  # noqa: E402  (the verifiers)

MAX_RESPONSE = 62                                  # tokens of a demonstration, its end token included
PHASE_0 = dict(steps=400, lr=2e-3, obey=1.0, pairs=15_000)
PHASE_A = dict(steps=2400, lr=2e-3, obey=0.9, pairs=50_000)
PHASE_B = dict(steps=600, lr=6e-4, obey=0.6, pairs=25_000)
BATCH = 64

# ------------------------------------------------------------------------------------------------ words of the stories

HEROES = "fox bear rabbit mouse owl cat dog duck frog lion pig wolf".split()
NAMES = {"he": "Tim Sam Ben Max Leo Tom".split(), "she": "Lily Mia Anna Lucy Rosa Ella".split()}
OBJECTS = "lamp key ball stone crown violin basket ticket puppet jewel blanket trumpet".split()
PLACES = {"forest": "in", "garden": "in", "river": "by", "village": "in", "castle": "in", "farm": "on", "beach": "on",
          "cave": "in", "hill": "on", "lake": "by", "park": "in", "market": "at"}
KEYWORDS = ("bell boat bottle box bridge bucket button cake candle carpet chair clock cloud coin cup drum feather flag "
            "flower flute gate kite ladder lemon letter map mirror mushroom needle pear pencil pillow plum pumpkin "
            "rocket rope scarf shell ship shovel spoon statue stick sword table tent tower train turnip wagon "
            "wheel window").split()
ADJECTIVES = "small big old new shiny strange red blue green golden round heavy".split()
MOODS = "happy proud glad calm sad tired lonely hungry".split()
GOOD_MOODS = "happy proud glad calm brave kind".split()
WEATHER = "warm cold sunny windy rainy quiet".split()
END_PHRASES = ["The end.", "And that was that.", "What a day!", "Good night.", "All was well.", "Life was good.",
               "They slept well.", "Sweet dreams!", "Nobody knows why.", "It was a secret.", "Home at last!",
               "So the story goes."]

# Sentences. "[,]" is a comma that the story may leave out.
OPENINGS = ["One day[,] {who} went for a walk {where}.", "Once upon a time[,] {a_who} lived {where}.",
            "It was a {weather} day[,] and {who} was {where}.", "Early in the morning[,] {who} was playing {where}.",
            "There was once {a_who} who lived {where}.", "{who} was {mood} and alone {where}.",
            "Long ago[,] {a_who} had a little house {where}.", "{who} liked to play {where}."]
EVENTS = ["{he} found {thing} under a tree.", "Near an old tree[,] {he} found {thing}.",
          "Suddenly[,] {he} saw {thing} in the grass.", "{he} looked down and saw {thing}.",
          "After a while[,] {name} found {thing}.", "Then {name} found {thing}.",
          "To {his} surprise[,] there was {thing} on the ground."]
SHORT = ["One day[,] {who} found {thing} {where}.", "{who} found {thing} {where}.",
         "Once[,] {a_who} saw {thing} {where}.", "It was a {weather} day[,] and {who} found {thing} {where}."]
ARCS = [["{he} showed it to a {friend}[,] and they both smiled.", "They played with it until dark.",
         "Then they shared some bread."],
        ["It was too big[,] so {he} asked a {friend} for help.", "Together they carried it home.",
         "They laughed all the way."],
        ["{he} was afraid at first[,] but then {he} laughed.", "{he} cleaned it for a long time.",
         "Now it was as good as new."],
        ["A {friend} had lost it and was very sad.", "{name} gave it back[,] and they became friends.",
         "They sang a song together."],
        ["{he} wanted to keep it[,] but it was not {his_own}.", "{he} asked everyone about it.",
         "Nobody knew where it came from."],
        ["It made a funny sound[,] and {name} jumped.", "{he} touched it again and laughed.",
         "It was some kind of magic."]]
WEATHER_ARC = ["The sun was bright[,] and the birds sang.", "The wind was cold[,] so {he} ran fast.",
               "It began to rain[,] but {he} did not mind.", "The birds sang in the trees.",
               "{he} felt {mood}."]
KEY_FIRST = ["On the way[,] {he} saw {keys}.", "{he} had {keys} with {him}.", "{his} mother gave {him} {keys}.",
             "There was {keys} near the road.", "{he} dreamed of {keys}.", "In the grass lay {keys}."]
KEY_AGAIN = ["The {k} was {adj}.", "{he} liked the {k} very much.", "{name} looked at the {k} for a while.",
             "It was the best {k} of all.", "{he} hid the {k} well."]
CLOSINGS = ["{he} went home and slept well.", "From that day on[,] {he} was {good}.", "{he} was very {good}.",
            "That night[,] {he} could not sleep.", "In the end[,] everyone was {good}.",
            "It was the best day of the year.", "{name} smiled and went home."]
POSTSCRIPTS = ["{name} is still {good}.", "It is all true.", "{he} came back the next day.", "Do not tell anyone.",
               "{name} says hello."]
TITLES = ["A Good Day", "{name} and the {Object}", "The {Adj} {Object}", "The {Object}", "{name} the {Hero}"]

# ------------------------------------------------------------------------------------------------------------- prompts

REQUESTS = ["Write a short story about a {hero} who finds a {object} {where}.",
            "Tell me a tale of a {hero} and a {object} {where}.",
            "I want a little story: a {hero} finds a {object} {where}.",
            "Please write a story in which a {hero} finds a {object} {where}.",
            "A {hero} finds a {object} {where}. Write the story.",
            "Can you tell a story about a {hero} with a {object} {where}?"]
WORDINGS = {
    "keywords:existence": [
        "Include the word{s} {words}.", "The word{s} {words} must appear.", "Use the word{s} {words} in the story.",
        "Do not forget the word{s} {words}.", "Include the word{s} {quoted}."],
    "keywords:forbidden_words": [
        "Avoid the word{s} {words}.", "Never say the word{s} {words}.", "Leave out the word{s} {words}.",
        "Tell it without the word{s} {words}.", "Avoid the word{s} {quoted}."],
    "keywords:frequency": [
        "Use the word {words} {relation} {n} times.", "Say {words} {relation} {n} times.",
        "The word {words} should appear {relation} {n} times.", "I want to read {words} {relation} {n} times.",
        "Say {quoted} {relation} {n} times."],
    "length_constraints:number_sentences": [
        "Write {relation} {n} sentences.", "The story should have {relation} {n} sentences.",
        "Use {relation} {n} sentences.", "Its length is {relation} {n} sentences."],
    "length_constraints:number_words": [
        "Write {relation} {n} words.", "The story should have {relation} {n} words.", "Use {relation} {n} words.",
        "Its length is {relation} {n} words."],
    "punctuation:no_comma": [
        "Do not use any commas.", "No commas please.", "Write it without commas.", "There must be no comma."],
    "startend:end_checker": [
        "The last words must be: {phrase}", "Finish with this phrase: {phrase}", "End with these words: {phrase}",
        "At the very end say: {phrase}"],
    "startend:quotation": [
        "Wrap the whole story in double quotes.", "Put double quotation marks around everything.",
        "Begin and end with double quotes.", "The whole answer belongs in quotation marks."],
    "change_case:english_lowercase": [
        "Write in lowercase only.", "Use no capital letters.", "All letters must be lowercase.",
        "Everything should be in lowercase."],
    "detectable_content:postscript": [
        "Add a postscript that starts with P.S.", "After the story add a P.S.", "Put a P.S. at the end.",
        "Close with a postscript marked P.S."],
    "detectable_format:title": [
        "Give it a title in double angle brackets, like <<title>>.", "Start with a title such as <<title>>.",
        "It needs a title, wrapped as <<title>>.", "Add a title in the form <<title>>."],
    "detectable_format:number_bullet_lists": [
        "Tell it as exactly {n} bullet points that start with *.", "Use exactly {n} bullet points, like * this.",
        "Write it as a list of {n} bullets marked with *.", "The answer must be {n} bullet points with *."],
}
KINDS = list(WORDINGS)
(EXIST, FORBID, FREQ, SENTENCES, WORDS, COMMA, END, QUOTE, LOWER, PS, TITLE, BULLETS) = KINDS
CONFLICTS = [{SENTENCES, PS}, {SENTENCES, BULLETS}, {END, PS}, {QUOTE, BULLETS}]


def make_rubric(kind, topic, rng):
    """Draw the parameters of one rubric. Returns (kwargs, the sentence that asks for it)."""
    hero, thing, place = topic
    kwargs, slots = {}, {}
    if kind in (EXIST, FORBID):
        words = rng.sample(KEYWORDS if kind == EXIST else [hero, thing, place], rng.choice([1, 1, 2]))
        kwargs = {"keywords" if kind == EXIST else "forbidden_words": words}
        slots = dict(s="s" if len(words) > 1 else "", words=" and ".join(words),
                     quoted=" and ".join(f'"{w}"' for w in words))
    elif kind == FREQ:
        word, n = rng.choice(KEYWORDS), rng.choice([2, 3])
        kwargs = {"keyword": word, "frequency": n, "relation": "at least"}
        slots = dict(words=word, quoted=f'"{word}"', n=n, relation="at least")
    elif kind in (SENTENCES, WORDS):
        name = "num_sentences" if kind == SENTENCES else "num_words"
        relation, n = rng.choice([("at least", 5), ("at least", 6), ("less than", 3), ("less than", 3)]
                                 if kind == SENTENCES else
                                 [("at least", 38), ("at least", 42), ("less than", 20), ("less than", 22)])
        kwargs = {name: n, "relation": relation}
        slots = dict(n=n, relation=relation)
    elif kind == END:
        kwargs = {"end_phrase": rng.choice(END_PHRASES)}
        slots = dict(phrase=kwargs["end_phrase"])
    elif kind == PS:
        kwargs = {"postscript_marker": "P.S."}
    elif kind == BULLETS:
        kwargs = {"num_bullets": rng.choice([2, 3, 4, 5])}
        slots = dict(n=kwargs["num_bullets"])
    return kwargs, rng.choice(WORDINGS[kind]).format(**slots)


def make_prompt(rng, kinds=KINDS, counts=(3, 4, 5)):
    """One request for a story with 3 to 5 rubrics, in random order. `parts[k]` is the sentence of rubric k."""
    count, pool = rng.choice(counts), kinds
    kinds = rng.sample(pool, count)
    while any(pair <= set(kinds) for pair in CONFLICTS):
        kinds = rng.sample(pool, count)
    topic = (rng.choice(HEROES), rng.choice(OBJECTS), rng.choice(list(PLACES)))
    made = [make_rubric(kind, topic, rng) for kind in kinds]
    request = rng.choice(REQUESTS).format(hero=topic[0], object=topic[1], where=f"{PLACES[topic[2]]} the {topic[2]}")
    parts = [sentence for _, sentence in made]
    return dict(prompt=" ".join([with_article(request), *parts]), request=with_article(request), parts=parts,
                topic=topic, rubrics=[rtt.Rubric(kind, kwargs, part) for kind, (kwargs, part) in zip(kinds, made)])


def with_article(text):
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)

# ------------------------------------------------------------------------------------------------------------- stories


def plan_story(rubrics, obey, rng):
    """What the story has to contain, if it is to obey rubric k exactly where obey[k]. Elsewhere it is as usual:
    three or four sentences with commas and capitals, no title, list, quotes or postscript, all of the topic named."""
    plan = dict(n=rng.choice([3, 3, 4]), keys={}, avoid=set(), comma=True, lower=False, title=False, ps=False,
                quote=False, bullets=False, end=None)
    if rng.random() < 0.3:
        plan["keys"][rng.choice(KEYWORDS)] = 1
    sizes = {}
    for rubric, good in zip(rubrics, obey):
        kind, kw = rubric.id, rubric.kwargs
        if kind == EXIST:
            words = kw["keywords"] if good else rng.sample(kw["keywords"], len(kw["keywords"]) - 1)
            plan["keys"].update({w: 1 for w in words})
        elif kind == FREQ:
            plan["keys"][kw["keyword"]] = kw["frequency"] if good else rng.choice([0, 0, 1, kw["frequency"] - 1])
        elif kind == FORBID:
            words = kw["forbidden_words"]
            plan["avoid"].update(words if good else rng.sample(words, len(words) - 1))
        elif kind in (SENTENCES, WORDS) and good:
            sizes[kind] = rng.choice([5, 6]) if kw["relation"] == "at least" else rng.choice([1, 2, 2])
        elif kind == BULLETS:
            plan["bullets"] = good or rng.random() < 0.15
            if good:
                sizes[kind] = kw["num_bullets"]
        elif kind == END and good:
            plan["end"] = kw["end_phrase"]
        elif kind == COMMA:
            plan["comma"] = not good
        elif good:
            plan[{QUOTE: "quote", LOWER: "lower", PS: "ps", TITLE: "title"}[kind]] = True
    if set(sizes) == {WORDS} and any(r.id == SENTENCES for r in rubrics):
        sizes[WORDS] = rng.choice([3, 4])              # the length in words, but not the number of sentences
    for kind in (WORDS, SENTENCES, BULLETS):           # the last one decides
        plan["n"] = sizes.get(kind, plan["n"])
    plan["keys"] = {k: c for k, c in plan["keys"].items() if c}
    return plan


def key_sentences(keys, room, rng):
    """Sentences that say each keyword as often as asked, in at most `room` sentences (at least one)."""
    again = [k for k, count in keys.items() for _ in range(count - 1)]
    apart = again[:max(0, room - 1)]                   # these get a sentence of their own, the rest are listed
    listed = []
    for k, count in keys.items():
        inside = count - apart.count(k)
        listed += [f"a {k}", f"another {k}", f"one more {k}"][:inside]
    sentences = [rng.choice(KEY_FIRST).replace("{keys}", " and ".join(listed))]
    return sentences + [s.replace("{k}", k) for s, k in zip(rng.sample(KEY_AGAIN, len(apart)), apart)]


def write_story(topic, plan, rng):
    """Fill the templates according to the plan."""
    hero, thing, place = topic
    avoid = plan["avoid"]
    he = rng.choice(["he", "she"])
    name, adj = rng.choice(NAMES[he]), rng.choice(ADJECTIVES)
    kind_of = "animal" if hero in avoid else hero
    slots = dict(
        name=name, he=he, him="him" if he == "he" else "her", his="his" if he == "he" else "her",
        his_own="his" if he == "he" else "hers", friend=rng.choice([h for h in HEROES if h != hero]),
        who=name if hero in avoid else f"{name} the {hero}",
        a_who=rng.choice([f"a {rng.choice(['little', 'young', 'clever'])} {kind_of} named {name}",
                          f"a {kind_of} named {name}"]),
        where=(rng.choice(["far away", "outside", "in a quiet place"]) if place in avoid
               else f"{PLACES[place]} the {place}"),
        thing=rng.choice([f"something {adj}", f"a {adj} thing"]) if thing in avoid else f"a {adj} {thing}",
        weather=rng.choice(WEATHER), mood=rng.choice(MOODS), good=rng.choice(GOOD_MOODS), adj=rng.choice(ADJECTIVES))
    n = plan["n"] - (plan["end"] is not None and not plan["bullets"])
    keys = key_sentences(plan["keys"], n - 2 if n > 2 else 1, rng) if plan["keys"] else []
    room = n - len(keys)
    start = [rng.choice(OPENINGS), rng.choice(EVENTS)] if room >= 2 and n > 2 else [rng.choice(SHORT)]
    room -= len(start)
    closing = [rng.choice(CLOSINGS)] if room > 0 and plan["end"] is None else []
    room = max(0, room - len(closing))
    middle = rng.choice(ARCS)[:room]
    middle = rng.sample(WEATHER_ARC, room - len(middle)) + middle
    if len(start) == 2 and rng.random() < 0.5:         # the keywords come before the event, or after all
        body = [start[0], *keys, start[1], *middle, *closing]
    else:
        body = [*start, *middle, *keys, *closing]
    return finish(body, slots, topic, plan, rng)


def finish(body, slots, topic, plan, rng):
    """Templates to text: pronouns, commas, capitals, then list, title, end phrase, postscript and quotes."""
    def fill(sentence):
        sentence = with_article(sentence.replace("[,]", "," if plan["comma"] else "").format(**slots))
        return sentence[0].upper() + sentence[1:]

    lines = [fill(s) for s in body]
    text = "\n".join("* " + line for line in lines) if plan["bullets"] else " ".join(lines)
    if plan["end"]:
        text += ("\n" if plan["bullets"] else " ") + plan["end"]
    if plan["title"]:
        hidden = [label for label, word in zip(["{Hero}", "{Object}"], topic) if word in plan["avoid"]]
        title = rng.choice([t for t in TITLES if not any(h in t for h in hidden)])
        text = "<<" + title.format(name=slots["name"], Adj=slots["adj"].title(),
                                   Hero=topic[0].title(), Object=topic[1].title()) + ">>\n" + text
    if plan["ps"]:
        text += "\nP.S. " + fill(rng.choice(POSTSCRIPTS))
    if plan["quote"]:
        text = f'"{text}"'
    return text.lower() if plan["lower"] else text


def demonstrate(task, obey, rng, fits, tries=60):
    """A story that obeys exactly the rubrics k with obey[k], or None when none was found."""
    for _ in range(tries):
        plan = plan_story(task["rubrics"], obey, rng)
        text = write_story(task["topic"], plan, rng)
        if ("," in text) == plan["comma"] and fits(text) and all(
                rtt.verify(r, text).satisfied == good for r, good in zip(task["rubrics"], obey)):
            return text
    return None


def demonstrations(count, p, rng, fits, taken=(), **of):
    """`count` pairs (task, story); each rubric is obeyed with probability p. Prompts in `taken` are left out, and so
    is every prompt that no story of ours satisfies in full. `of`: the kinds and counts of rubrics, for make_prompt."""
    pairs = []
    while len(pairs) < count:
        task = make_prompt(rng, **of)
        if task["prompt"] in taken or not demonstrate(task, [True] * len(task["rubrics"]), rng, fits):
            continue
        text = None
        while text is None:
            text = demonstrate(task, [rng.random() < p for _ in task["rubrics"]], rng, fits)
        pairs.append((task, text))
    return pairs

# ------------------------------------------------------------------------------------------- tokenizer, model, training

CHAT_TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
                 "+ '<|im_end|>' + '\\n' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
OTHER_TEXT = ["The quick brown fox jumps over the lazy dog. 0 1 2 3 4 5 6 7 8 9 10 20 50 100",
              "# Title\n\n- one\n- two\n", "def add(a, b):\n    return a + b\n", "naïve café, Übung, 你好, 😀"]


def make_tokenizer(texts, folder):
    """Byte-level BPE: every text encodes, and decodes to itself (after NFC, Unicode's composed form, as with Qwen's own
    tokenizer). Beside a Qwen2 config, AutoTokenizer takes only vocabulary and merges from tokenizer.json and splits
    words in Qwen2's way, so it is trained that way too. Written as plain files, the chat template included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(texts + OTHER_TEXT, trainers.BpeTrainer(
        vocab_size=1536, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|endoftext|>",
                  additional_special_tokens=special, model_max_length=512, clean_up_tokenization_spaces=False,
                  chat_template=CHAT_TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(folder)


def make_model(tokenizer):
    torch.manual_seed(0)
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=352, max_position_embeddings=512, tie_word_embeddings=True, attention_dropout=0.0,
        initializer_range=0.08, **ids))                # with the usual 0.02 so narrow a model does not learn to copy
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    return model


def chat(prompt):
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def batches(pairs, tokenizer, rng):
    """Endless batches (ids, labels): alike in length, padded on the right, so that causal
    attention needs no mask. Labels are -100 except on the response and its end token."""
    prompts = tokenizer([chat(task["prompt"]) for task, _ in pairs])["input_ids"]
    stories = tokenizer([story + "<|im_end|>" for _, story in pairs])["input_ids"]
    rows = list(zip(prompts, stories))
    while True:
        rng.shuffle(rows)
        for at in range(0, len(rows) - 16 * BATCH + 1, 16 * BATCH):
            block = sorted(rows[at:at + 16 * BATCH], key=lambda row: len(row[0]) + len(row[1]))
            for start in rng.sample(range(0, 16 * BATCH, BATCH), 16):
                chunk = block[start:start + BATCH]
                longest = max(len(p) + len(s) for p, s in chunk)
                ids = torch.full((BATCH, longest), tokenizer.pad_token_id)
                labels = torch.full((BATCH, longest), -100)
                for i, (p, s) in enumerate(chunk):
                    ids[i, :len(p) + len(s)] = torch.tensor(p + s)
                    labels[i, len(p):len(p) + len(s)] = torch.tensor(s)
                yield ids, labels


def train(model, tokenizer, pairs, steps, lr, held_out, label):
    """Supervised learning, AdamW with warm-up and cosine decay; the loss is on the response tokens alone."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    feed, mean_loss, began = batches(pairs, tokenizer, random.Random(1)), None, time.time()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / 100, 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        ids, labels = next(feed)
        where = labels[:, 1:] != -100
        logits = model.lm_head(model.model(ids).last_hidden_state[:, :-1][where])
        loss = F.cross_entropy(logits, labels[:, 1:][where])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 200 == 0 or step == steps:
            print(f"{label} step {step} loss {mean_loss:.3f} {time.time() - began:.0f} s", flush=True)
        if step % 400 == 0:
            print("   ", quick_look(model, tokenizer, held_out[:128]), flush=True)

# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def respond(model, tokenizer, prompts, seed=0):
    """One sample for each prompt at temperature 1, at most 64 tokens. Returns (texts, lengths, ended)."""
    model.eval()
    torch.manual_seed(seed)
    texts, lengths, ended = [], [], []
    for at in range(0, len(prompts), 128):
        batch = tokenizer([chat(p) for p in prompts[at:at + 128]], padding=True, padding_side="left",
                          return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=64, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        for row in out[:, batch["input_ids"].shape[1]:].tolist():
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            texts.append(tokenizer.decode(row[:end]))
            lengths.append(min(end + 1, 64))
            ended.append(tokenizer.eos_token_id in row)
    model.train()
    return texts, lengths, ended


def satisfied(tasks, texts):
    """For each task the list of its verdicts, as booleans."""
    return [[rtt.verify(r, text).satisfied for r in task["rubrics"]] for task, text in zip(tasks, texts)]


def by_kind(tasks, verdicts):
    """Per kind of rubric: the share of its verdicts that are true."""
    pairs = [(r.id, v) for task, vs in zip(tasks, verdicts) for r, v in zip(task["rubrics"], vs)]
    return {kind: mean(v for k, v in pairs if k == kind) for kind in KINDS}


def quick_look(model, tokenizer, tasks):
    rates = by_kind(tasks, satisfied(tasks, respond(model, tokenizer, [t["prompt"] for t in tasks])[0]))
    return " ".join(f"{kind.split(':')[1][:12]} {100 * rate:.0f}" for kind, rate in rates.items())


def report(model, tokenizer, tasks):
    """Print how good the start is, and for each kind how often it is satisfied with and without being asked for."""
    texts, lengths, ended = respond(model, tokenizer, [t["prompt"] for t in tasks])
    verdicts = satisfied(tasks, texts)
    print(f"\n{len(tasks)} held-out prompts, one sample each at temperature 1: "
          f"rubrics {100 * mean(v for vs in verdicts for v in vs):.1f} %, "
          f"all rubrics of the prompt {100 * mean(all(vs) for vs in verdicts):.1f} %")
    print("all rubrics, by their number: " + ", ".join(
        f"{n}: {100 * mean(all(vs) for vs in verdicts if len(vs) == n):.1f} %" for n in (3, 4, 5)))
    print(f"response tokens: mean {mean(lengths):.1f}; ended within 64: {100 * mean(ended):.1f} %\n")
    without = [dict(prompt=" ".join([t["request"], *[p for p in t["parts"] if p != part]]), rubrics=[r])
               for t in tasks for r, part in zip(t["rubrics"], t["parts"])]
    base = satisfied(without, respond(model, tokenizer, [t["prompt"] for t in without], seed=1)[0])
    asked, not_asked = by_kind(tasks, verdicts), by_kind(without, base)
    print(f"{'satisfied, %':42} asked  not asked")
    for kind in KINDS:
        print(f"{kind:42} {100 * asked[kind]:5.0f} {100 * not_asked[kind]:10.0f}")
    for task, text in list(zip(tasks, texts))[:8]:
        print(f"\n> {task['prompt']}\n{text}")


def write_tasks(tasks, path):
    with open(path, "w", encoding="utf-8") as file:
        for task in tasks:
            file.write(json.dumps({"prompt": task["prompt"], "instruction_id_list": [r.id for r in task["rubrics"]],
                                   "kwargs": [r.kwargs for r in task["rubrics"]]}, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write tiny/ and stories/ into")
    parser.add_argument("--warm", type=Path, help="phase A is read from this folder, or written to it if it is empty")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)                           # the same sums on any number of cores
    tiny, stories = args.out / "tiny", args.out / "stories"
    tiny.mkdir(parents=True, exist_ok=True)
    stories.mkdir(parents=True, exist_ok=True)

    rng = random.Random(0)
    sample = demonstrations(8000, 0.5, rng, lambda text: True)
    tokenizer = make_tokenizer([chat(t["prompt"]) + story for t, story in sample], tiny)

    def fits(text):
        return len(tokenizer(text)["input_ids"]) < MAX_RESPONSE

    tasks, _ = zip(*demonstrations(3600, 1.0, rng, fits))
    tasks = list({t["prompt"]: t for t in tasks}.values())[:3512]
    held_out, taken = tasks[:512], {t["prompt"] for t in tasks[:512]}
    write_tasks(held_out, stories / "eval.jsonl")
    write_tasks(tasks[512:], stories / "train.jsonl")

    def learn(model, phase, seed, **of):
        pairs = demonstrations(phase["pairs"], phase["obey"], random.Random(seed), fits, taken, **of)
        train(model, tokenizer, pairs, phase["steps"], phase["lr"], held_out, f"phase {'0AB'[seed]}")

    model = make_model(tokenizer)
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} tokens", flush=True)
    if args.warm and (args.warm / "config.json").exists():
        model = Qwen2ForCausalLM.from_pretrained(args.warm)
    else:
        learn(model, PHASE_0, 0, kinds=[EXIST, FREQ], counts=[1, 2])
        learn(model, PHASE_A, 1)
        if args.warm:
            model.save_pretrained(args.warm)
    learn(model, PHASE_B, 2)
    model.save_pretrained(tiny)
    report(model, tokenizer, held_out)


if __name__ == "__main__":
    main()
