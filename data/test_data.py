# SPDX-License-Identifier: MIT
"""Tests of explain.py, compare.py, the committed results, and README.md."""

import ast
import inspect
import json
import math
import re
import sys
from pathlib import Path
from statistics import fmean, geometric_mean

DATA = Path(__file__).resolve().parent
sys.path[:0] = [str(DATA.parent), str(DATA)]
# before torch: it sets the number of threads
from test_rtt import assert_close, data, finished, folder, pytestmark, read, small_run, spy, tokenizer

import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

import compare
import explain
import rtt

# ======== explain.py ==============================================================================

def page_data(path):
    """The JSON in a page: there is one script of data, and no text in it can end it."""
    page = path.read_text(encoding="utf-8")
    data = re.findall('<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(data[0])


def test_the_page_shows_the_next_step_of_a_run_and_changes_nothing_else(folder, data, tmp_path, monkeypatch):
    nasty = '</script><b>"Hi"</b> \u2028 שלום 😀 <!--'  # it must not break the page
    for row in read(data / "train.jsonl"):
        row = row | dict(prompt=row["prompt"] + nasty, rubrics=["is kind"])
        rtt.write_rows(tmp_path / "a.jsonl", [row], "a")
    out = tmp_path / "run"
    flags = "--lr 1e-3 --gradient-checkpointing --partition verdict"
    rtt.main(small_run(folder, tmp_path / "a.jsonl", out, flags))
    metrics = read(out / "metrics.jsonl")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 3}\n{"st')  # as a run leaves it that was killed after its checkpoint
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    updated = spy(monkeypatch, "update")
    explain.main([str(out)])
    page = page_data(out / "credit.html")
    (out / "credit.html").unlink()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept
    assert page["metrics"] == metrics
    rtt.main(["--resume", str(out), "--steps", "3"])  # makes the step that the page has shown
    assert_close(updated[0][0][3], updated[1][0][3])  # its advantages
    policy = Qwen2ForCausalLM.from_pretrained(out / "policy")  # as it is after the step
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for number, group in enumerate(page["groups"]):  # first before, first after, last before, last after
        assert group["prompt"].endswith(nasty)
        assert all(row[-1] is None for row in group["evidence"])  # a judge's
        prompt = rtt.encode_prompt(tokenizer, group["prompt"])
        for ids, old, ratio in zip(group["ids"], group["logprob"], group["ratio"]):
            logits = policy(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            old = torch.tensor(old[: len(ids)])
            new = logits.log_softmax(1)[range(len(ids)), ids] if number % 2 else old
            assert_close(ratio[: len(ids)], (new - old).exp(), 1e-3)


def test_the_numbers_of_the_page_are_those_of_the_functions(data, tokenizer, tmp_path, monkeypatch):
    flags = "--steps 1 --max-new-tokens 40 --reward csr --clip 0.1 0.3 --partition verdict"
    rtt.main(small_run(rtt.DATA / "tiny", data, tmp_path, flags))
    scored = spy(monkeypatch, "token_relevance")
    explain.main([str(tmp_path)])
    [((_, _, rollout, verdicts, evidence, _), (relevance, _))] = scored
    assert relevance[verdicts != 0][:, 0].all()  # of every rubric, also where the group agrees
    for number, group in enumerate(page_data(tmp_path / "credit.html")["groups"]):
        K = len(group["rubrics"])
        tensors = [rollout.ids, rollout.mask, verdicts, evidence, relevance]
        ids, mask, s, marks, w = [tensor.split(4)[number // 2] for tensor in tensors]
        assert group["ids"] == [row[keep == 1].tolist() for row, keep in zip(ids, mask)]
        for i, row in enumerate(group["ids"]):
            text, spans = rtt.token_spans(tokenizer, row)
            assert [group["texts"][i], group["spans"][i]] == [text, [list(span) for span in spans]]
        assert_close(group["relevance"], w[:, :K])
        for row, known in zip(sum(group["evidence"], []), marks[:, :K].flatten(0, 1)):
            assert row == (None if known.isnan().all() else known.tolist())  # null where a judge decided
        A = rtt.response_advantage(rtt.response_reward(s, "csr"))
        smallest = min(geometric_mean(row[: len(ids)]) for row, ids in zip(group["ratio"], group["ids"]))
        assert min(group["response_ratio"]) == pytest.approx(smallest, abs=1e-4)
        for partition, part in group["partitions"].items():
            a = rtt.token_advantage(s, w, mask, partition)
            pushes = torch.tensor(part["coef"]["gspo"])
            residual = rtt.cancellation_residual(pushes, ids, mask) if pushes.any() else None
            assert part["residual"]["gspo"] == pytest.approx(residual, abs=1e-3)
            for i, t in mask.nonzero().tolist():
                advantage = float(A[i] + 0.5 * a[i, t])
                ratio = group["ratio"][i][t]
                far_enough = ratio > 1.3 if advantage > 0 else ratio < 0.9  # the run's own clip
                c = 0.0 if far_enough else ratio * advantage
                assert part["coef"]["grpo"][i][t] == pytest.approx(c, abs=1e-4)
                assert part["coef"]["dfpo-min"][i][t] == pytest.approx(smallest * advantage, abs=1e-4)


def test_explain_prints_the_tensors_of_each_section(data, tmp_path, capsys):
    explain.main(["--data", str(data), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert re.findall(r"^(\d)\. ", said, re.MULTILINE) == list("1234567")
    ratio, least, orthogonal = [float(value) for value in re.findall("left over: ([-+.0-9]+)", said)]
    assert abs(ratio) > 1e-3 and abs(least) < 1e-4 and abs(orthogonal) < 1e-4
    assert page_data(tmp_path / "credit.html")["setting"]["relevance"] == "evidence"
    with pytest.raises(rtt.BadInput, match="no checkpoint"):
        explain.main(["--eval-only"])


# ======== compare.py ==============================================================================

def test_the_tables_of_the_committed_results_are_in_their_text(capsys, tmp_path):
    folder = DATA / "results"
    text = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.glob("*.jsonl"):
        compare.main(["--table", str(path), "--page", str(tmp_path / "curves.html")])
        assert capsys.readouterr().out in text, path
        assert page_data(tmp_path / "curves.html")["curves"]


def test_a_run_in_numbers(finished):
    result = json.loads((finished / "result.json").read_text())
    rows = read(finished / "metrics.jsonl")
    outcome = compare.outcome(finished)
    assert outcome["residual"] == fmean(row["residual"] for row in rows)
    for level in ("instruction", "rubric"):
        middle = rows[1][f"eval_{level}"]
        ends = [result["before"][level], result["after"][level]]
        assert outcome["curves"][f"eval_{level}"] == [[0, ends[0]], [2, middle], [4, ends[1]]]


def test_the_page_of_a_study_has_means_and_intervals_over_its_seeds(tmp_path):
    first = dict(config=dict(out="base+seed=0"), curves=dict(eval_instruction=[[0, 0.1], [5, 0.3]]))
    second = dict(config=dict(out="base+seed=1"), curves=dict(eval_instruction=[[0, 0.1], [5, 0.5]]))
    compare.write_page([first, second], tmp_path / "curves.html")
    curve = page_data(tmp_path / "curves.html")["curves"]["base"]["eval_instruction"]
    assert curve == [[0, 0.1, 0], [5, 0.4, pytest.approx(12.71 * 0.1)]]


def test_a_study_is_summed_up_by_the_means_and_intervals_of_its_seeds():
    assert compare.flags_of("base+alpha=0+clip=1~inf") == ["--alpha", "0", "--clip", "1", "inf"]
    mean, half_width = compare.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half_width == pytest.approx(4.30 / math.sqrt(3))
    assert math.isnan(compare.interval([math.nan, math.nan])[0])  # a half without an evaluation
    means = dict(entropy=1.0, residual=0.0, token_share=0.0, seconds=1.0)
    first = dict(means, curves=dict(eval_rubric=[[0, 0.1], [50, 0.2], [100, 0.4]]))
    better = dict(means, curves=dict(eval_rubric=[[0, 0.1], [50, 0.3], [100, 0.7]]))
    row = compare.cells("better", [better, better], [first, first], ["rubric"])
    assert row[1:5] == ["30.0 ± 0.0", "+10.0 ± 0.0", "70.0 ± 0.0", "+30.0 ± 0.0"]


def test_differences_are_to_the_first_configuration_of_the_same_reward(tmp_path):
    runs = []
    for name, reward, end in (("a", "csr", 0.1), ("b", "aon", 0.2), ("c", "csr", 0.4), ("d", "aon", 0.3)):
        config = dict(out=f"{name}+seed=0", reward=reward)
        means = dict(entropy=1.0, residual=0.0, token_share=0.0, seconds=1.0)
        runs.append(dict(means, config=config, curves=dict(eval_rubric=[[0, 0.0], [5, end]])))
    gains = [re.findall(r"[+-][.0-9]+ ±", line)[-1] for line in compare.table(runs).splitlines()[1:]]
    assert gains == ["+0.0 ±", "+0.0 ±", "+30.0 ±", "+10.0 ±"]


@pytest.mark.parametrize("study", compare.STUDIES)
def test_every_line_of_a_study_is_a_command_line_of_rtt_py(study, tmp_path, monkeypatch):
    started = {}

    def run_all(jobs, at_once):
        started.update(jobs)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_all", run_all)
    with pytest.raises(SystemExit):
        compare.main([study, "--out", str(tmp_path), "--steps", "7", "--seeds", "2"])
    configs = [rtt.parse(list(map(str, flags))) for flags in started.values()]
    names = compare.STUDIES[study][1].split(",")
    assert [Path(config.out).name.partition("+seed=")[0] for config in configs] == 2 * names
    assert {config.steps for config in configs} == {7}  # given beside the study's own
    data = {"sparse": "stories-hard", "default": "stories"}.get(study.partition("-")[0], "data")
    assert {Path(config.data).name for config in configs} == {data}


def test_a_study_of_so_many_rubrics_gets_the_prompts_that_have_them(tmp_path):
    folder = compare.only(5, DATA / "stories", tmp_path)
    for split, count in (("train", 920), ("eval", 164)):
        tasks = rtt.load_tasks(folder, split)
        assert len(tasks) == count and all(len(task.rubrics) == 5 for task in tasks)


# ======== README.md ==============================================================================
def test_the_snippets_of_the_readme_run_and_say_what_is_so(capsys):
    text = (DATA.parent / "README.md").read_text(encoding="utf-8")
    names = dict(rtt=rtt)
    for snippet in re.findall("```python\n(.*?)```", text, re.DOTALL):
        exec(snippet, names)
    assert "tensor(-0.4000)" in capsys.readouterr().out
    exclaim = rtt.VERIFIERS.pop("mine:exclaim")
    assert exclaim("Hi! You!", 2) == (True, [(2, 3), (7, 8)])


def test_each_piece_to_lift_is_named_with_all_that_it_needs():
    section = (DATA.parent / "README.md").read_text(encoding="utf-8").partition("## Lift a piece")[2]
    every = set()
    for line in re.findall(r"^- (.*(?:\n  .*)*)", section.partition("\n## ")[0], re.MULTILINE):
        named = {name.split()[-1].split(".")[-1] for name in re.findall("`(.*?)`", line)} | {"torch"}
        pieces = {name for name in named if getattr(vars(rtt).get(name), "__module__", "") == "rtt"}
        given = named - pieces if line.startswith("Alone") else named
        for name in pieces:
            tree = ast.parse(inspect.getsource(getattr(rtt, name)))
            words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert words & vars(rtt).keys() <= given | {name}, name
        every |= pieces
    assert {"response_reward", "response_advantage", "token_advantage", "min_replace"} <= every
    assert {"adv_orthogonal", "cancellation_residual", "policy_weights", "token_logprobs", "sample"} <= every
