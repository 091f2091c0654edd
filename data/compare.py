# SPDX-License-Identifier: MIT
"""Compare configurations of rtt.py over several seeds: start the runs, read what they wrote, print a table.

    python data/compare.py sparse
    python data/compare.py base,alpha=0,loss=gspo+updates=4 --seeds 5 --out runs/mine --steps 250 --rubrics 5
    python data/compare.py --table data/results/sparse.jsonl [NAME,NAME] [--page curves.html]

Commas separate configurations, plus signs the options of one, a tilde the numbers of an option (clip=1~inf);
"base" changes nothing. STUDIES names such lists, with the flags that they need. The list comes first; all
flags but those below are rtt.py's and hold for all runs. A run is a process with one thread: on the CPU as
many at a time as cores, on another --device one. The same command again keeps finished runs and resumes
broken ones.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, stdev

DATA = Path(__file__).resolve().parent
RTT = DATA.parent / "rtt.py"
LEVELS = ["rubric", "instruction"]  # held-out: rubrics met, and prompts with all rubrics met
MEANS = ["entropy", "residual", "token_share", "seconds"]  # columns without an interval
CURVES = ["reward", "entropy", "residual", "token_share", "clip_fraction", "f1"]  # f1: if it is learned
T95 = [math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's t for 1 to 10 numbers


SOURCES = ["discriminator", "evidence", "shuffled"]


def grid(options, values):
    """Each option with each value: grid("a b", "1 2") is "a=1,a=2,b=1,b=2"."""
    return ",".join(f"{option}={value}" for option in options.split() for value in values.split())


def sourced(name, rates):
    """A configuration with each source of relevance, each at its rate."""
    pairs = zip(SOURCES, rates.split())
    return [f"{name}+relevance={source}+lr={rate}" for source, rate in pairs]


HARD = DATA / "stories-hard"  # prompts of 7 and 8 rubrics
# each at its best rate on seed 100, by the mean of the rubrics met after 50, 100 and 150 steps
SPARSE = [
    "reward=aon+alpha=0+lr=2e-4",
    *sourced("reward=aon+partition=intra+alpha=0.5", "1e-4 1e-4 2e-4"),
    *sourced("reward=aon+partition=verdict+alpha=8", "1e-4 2e-4 2e-4"),
    "reward=aon+partition=inter+alpha=0.5+lr=2e-4",
    "reward=aon+partition=rubric+alpha=0.5+lr=1e-4",
    "reward=csr+alpha=0+lr=2e-4",
    *sourced("reward=csr+partition=intra+alpha=0.5", "2e-4 2e-4 2e-4"),
    *sourced("reward=csr+partition=verdict+alpha=8", "2e-4 2e-4 2e-4"),
]
SPARSE_64 = ["reward=aon+alpha=0+lr=2e-4"]  # rates chosen in the same way, after 25, 50 and 75 steps
for credit in ("intra+alpha=0.5", "verdict+alpha=8"):
    for source in ("discriminator", "shuffled"):
        SPARSE_64.append(f"reward=aon+partition={credit}+relevance={source}+lr=2e-4")
EASY = [f"partition=verdict+alpha=5+reward=csr+relevance={source}" for source in SOURCES]
DEFAULT = ["alpha=0"]
for credit in ["intra+alpha=0.5", *(f"verdict+alpha={alpha}" for alpha in (0.5, 2, 5, 10))]:
    DEFAULT += [f"partition={credit}", f"partition={credit}+relevance=shuffled"]
LOSSES = (
    "grpo gspo gspo+clip=0.02~0.02 grpo-mask grpo-fix+clip=0.2~0.2 dfpo-min dfpo-orth "
    "grpo+clip=1~inf gspo+clip=1~inf grpo-fix+clip=1~inf dfpo-min+clip=1~inf dfpo-orth+clip=1~inf"
)
STUDIES = {  # the flags that its runs need, and its configurations; the first of each reward is the baseline
    "sparse": (
        f"--data {HARD} --prompts 4 --group-size 4 --steps 150 --eval-every 50 --first-seed 10",
        ",".join(SPARSE),
    ),
    "sparse-64": (
        f"--data {HARD} --prompts 8 --group-size 8 --steps 75 --eval-every 25 --first-seed 10",
        ",".join(SPARSE_64),
    ),
    "responses": (
        "--rubrics 5 --lr 1e-4 --prompts 2 --group-size 4 --steps 300 --eval-every 50",
        ",".join(["alpha=0+reward=csr", "alpha=0", "partition=intra", "partition=intra+reward=csr", *EASY]),
    ),
    "default": ("--first-seed 20", ",".join(DEFAULT)),
    "exchange": ("--rubrics 5 --lr 1e-4 --prompts 4 --steps 100", grid("updates=4+alpha=0+loss", LOSSES)),
}


def stop(reason, status=2):
    print(f"compare.py: {reason}", file=sys.stderr)
    sys.exit(status)


def keep_flags(flags, out):
    """Refuse a folder whose runs had other flags; what else differs between runs is in their names."""
    kept = out / "flags.txt"
    before = kept.read_text() if kept.is_file() else "not known"
    if any(out.glob("*/config.json")) and before != shlex.join(flags):
        stop(f"{out}: holds runs with other settings ({before}); name another --out")
    out.mkdir(parents=True, exist_ok=True)
    kept.write_text(shlex.join(flags))


def flags_of(name):
    """The flags of a configuration: "alpha=0+clip=1~inf" is --alpha 0 --clip 1 inf."""
    flags = []
    for option in name.split("+"):
        if option != "base":
            setting, _, value = option.partition("=")
            flags += [f"--{setting}", *value.split("~")]
    return flags


def run(folder, flags):
    """Run what is left of a run as a process of its own."""
    if (folder / "result.json").is_file():
        return
    if (folder / "config.json").is_file():
        flags = ["--resume", folder]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, RTT, *flags], env=one_thread, capture_output=True, text=True)
    if ended.returncode != 0:
        said = ended.stderr.splitlines() or ["it said nothing"]
        stop(f"{folder}: {said[-1]} (exit status {ended.returncode})")
    print(f"{folder} is finished", flush=True)


def run_all(jobs, at_once):
    """Run {folder: flags}. After a failure or Ctrl-C no further one is begun."""
    with ThreadPoolExecutor(at_once) as pool:
        runs = [pool.submit(run, *job) for job in jobs.items()]
        try:
            for ended in as_completed(runs):
                ended.result()
        finally:
            pool.shutdown(cancel_futures=True)


def only(count, folder, out):
    """A copy of a data folder, with the prompts that have exactly so many rubrics; returns its path."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "eval.jsonl"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if len(json.loads(line)["instruction_id_list"]) == count]
        (out / "data" / name).write_text("".join(kept), encoding="utf-8")
    return out / "data"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(rows, key):
    return [row[key] for row in rows]


def thinned(rows, name):
    """A column of metrics as [[step, mean of ten steps], ...] without nulls; None where nothing is left."""
    points = []
    for start in range(0, len(rows), 10):
        values = [row[name] for row in rows[start : start + 10] if row.get(name) is not None]
        points.append([min(start + 10, len(rows)), round(fmean(values), 4) if values else None])
    return points


def outcome(folder):
    """A finished run in numbers, with its settings. Accuracies are shares of 1."""
    config = (folder / "config.json").read_text()
    config = json.loads(config.replace(f"{RTT.parent}/", ""))  # not where this repository lies
    result = json.loads((folder / "result.json").read_text())
    rows = read_lines(folder / "metrics.jsonl")
    curves = {name: thinned(rows, name) for name in CURVES}
    for level in LEVELS:
        measured = [[row["step"], row[f"eval_{level}"]] for row in rows if f"eval_{level}" in row]
        ends = [[0, result["before"][level]], [len(rows), result["after"][level]]]
        curves[f"eval_{level}"] = [ends[0], *measured, ends[1]]
    shares = [row["token_share"] for row in rows if row["token_share"] is not None]
    return {
        "entropy": fmean(column(rows[-10:], "entropy")),
        "residual": fmean(column(rows, "residual")),
        "token_share": fmean(shares or [0.0]),
        "seconds": fmean(column(rows, "seconds")),
        "curves": curves,
        "config": config | {"out": folder.name},
    }


def interval(values):
    """Mean, and half the width of its 95 % interval by Student's t (beyond 10 numbers a little too wide)."""
    n = len(values)
    spread = stdev(values) if n > 1 and not math.isnan(values[0]) else math.nan
    return fmean(values), T95[min(n, 10) - 1] * spread / math.sqrt(n)


def parts(curve):
    """Mean accuracy, in per cent, of the evaluations in the first and in the second half of the steps."""
    middle = curve[-1][0] / 2
    early = [level for step, level in curve[1:] if step <= middle]
    late = [level for step, level in curve if step > middle]
    return {"early": 100 * fmean(early or [math.nan]), "late": 100 * fmean(late)}


def cells(name, runs, first, levels):
    """A line of the table. `first` are the runs that these, paired by seed, are compared with."""
    line = [name]
    for level in levels:
        mine = [parts(run["curves"][f"eval_{level}"]) for run in runs]
        theirs = [parts(run["curves"][f"eval_{level}"]) for run in first]
        for part in mine[0]:
            values = column(mine, part)
            gains = [value - base for value, base in zip(values, column(theirs, part))]
            line.append("{:.1f} ± {:.1f}".format(*interval(values)))
            line.append("{:+.1f} ± {:.1f}".format(*interval(gains)))
    return line + [f"{fmean(column(runs, key)):.2f}" for key in MEANS]


def name_of(run):
    """The configuration of a run: the name of its folder without the seed."""
    return run["config"]["out"].rpartition("+seed=")[0]


def configurations(runs):
    """{name: its runs}, in the order in which they come."""
    groups = {}
    for run in runs:
        groups.setdefault(name_of(run), []).append(run)
    return groups


def table(runs):
    """The table of a study, a line a configuration."""
    groups = configurations(runs) or stop("there is no such run")
    levels = [level for level in LEVELS if f"eval_{level}" in runs[0]["curves"]]
    heads = []
    for level in levels:
        heads += [f"{level}, early", "to the first", f"{level}, late", "to the first"]
    lines = [["configuration", *heads, *MEANS]]
    first = {}  # for each reward, the runs of its first configuration
    for name, group in groups.items():
        first.setdefault(group[0]["config"]["reward"], group)
        lines.append(cells(name, group, first[group[0]["config"]["reward"]], levels))
    width = max(len(line[0]) for line in lines)
    layout = f"{{:<{width}}}" + "{:>20}{:>14}" * (len(heads) // 2) + "{:>12}" * len(MEANS)
    return "\n".join(layout.format(*line) for line in lines)


def averaged(curves):
    """Curves [[step, value], ...] of several seeds -> [[step, mean, half of the interval or None], ...]."""
    points = []
    for same_step in zip(*curves):
        values = [value for _, value in same_step if value is not None]
        if values:
            mean, half = interval(values)
            points.append([same_step[0][0], mean, None if math.isnan(half) else half])
    return points


def write_page(runs, path):
    """The curves of a study in data/credit.html: each configuration's mean and interval over its seeds."""
    curves = {}
    for name, group in configurations(runs).items():
        metrics = group[0]["curves"]
        curves[name] = {metric: averaged([run["curves"][metric] for run in group]) for metric in metrics}
    text = json.dumps(dict(title=path.stem, setting=None, groups=[], curves=curves)).replace("<", r"\u003c")
    template = (RTT.parent / "data" / "credit.html").read_text(encoding="utf-8")
    path.write_text(template.replace('"DATA"', text, 1), encoding="utf-8")


def compare(args, flags):
    names = STUDIES[args.study][1] if args.study in STUDIES else args.study
    keep_flags([*flags, f"--rubrics={args.rubrics}"], args.out)
    if args.rubrics:
        flags.append(f"--data={only(args.rubrics, DATA / 'stories', args.out)}")
    jobs = {}
    for seed in range(args.first_seed, args.first_seed + args.seeds):  # a study cut short has whole seeds
        for name in names.split(","):
            folder = args.out / f"{name}+seed={seed}".replace("/", "_")
            jobs[folder] = [*flags, *flags_of(name), f"--seed={seed}", f"--out={folder}"]
    try:
        run_all(jobs, os.cpu_count() if args.device == "cpu" else 1)
    except KeyboardInterrupt:
        stop("interrupted; the same command goes on", 130)
    runs = [outcome(folder) for folder in jobs]
    with open(args.out / "results.jsonl", "w") as file:
        for run in runs:
            file.write(json.dumps(run) + "\n")
    (args.out / "table.txt").write_text(table(runs) + "\n")
    write_page(runs, args.out / "curves.html")
    print(table(runs))


def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("study", nargs="?", help="a list as above, or one of " + ", ".join(STUDIES))
    parser.add_argument("--seeds", type=int, default=5, help="runs of each configuration (5)")
    parser.add_argument("--first-seed", type=int, default=0, help="the others follow it (0)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder (runs/compare)")
    parser.add_argument("--rubrics", type=int, help="only prompts of data/stories with so many rubrics")
    parser.add_argument("--device", default="cpu", help="where they run (cpu)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a results.jsonl, or lines of it")
    parser.add_argument("--page", type=Path, metavar="FILE", help="with --table: also draw its curves there")
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in STUDIES:  # what is given stands behind what the study needs, and holds
        argv = [argv[0], *STUDIES[argv[0]][0].split(), *argv[1:]]
    args, flags = parser.parse_known_args(argv)
    if args.table:
        runs = read_lines(args.table)
        if args.study:
            runs = [run for name in args.study.split(",") for run in runs if name_of(run) == name]
        print(table(runs))
        if args.page:
            write_page(runs, args.page)
    elif args.study:
        compare(args, [*flags, f"--device={args.device}"])
    else:
        parser.error("name configurations, a study or a --table")


if __name__ == "__main__":
    main()
