"""How often the verdicts of rtt.py are those of IFEval's own code, on real responses.

    python data/check_ifeval.py input_data.jsonl eval_results_strict.jsonl

Both files are IFEval's (google-research, instruction_following_eval): its prompts, and the strict verdicts
that its evaluation_main.py writes, with the responses, for input_response_data_gpt4_20231107_145030.jsonl.
language:response_language is left out: where languages share a script, a judge decides it here.
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rtt


def read(path):
    """The rows of a .jsonl file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


prompts_path, results_path = sys.argv[1:]
kwargs_of = {row["prompt"]: row["kwargs"] for row in read(prompts_path)}
same = Counter()
total = Counter()
for row in read(results_path):
    official = row["follow_instruction_list"]
    for rubric_id, kwargs, verdict in zip(row["instruction_id_list"], kwargs_of[row["prompt"]], official):
        if rubric_id == "language:response_language":
            continue
        rubric = rtt.make_rubric(rubric_id, kwargs)
        ours = rtt.verify(rubric, row["response"])
        same[rubric_id] += ours.satisfied == verdict
        total[rubric_id] += 1
for rubric_id in sorted(total):
    print(f"{rubric_id:45} {same[rubric_id]:4} of {total[rubric_id]:4}")
print(f"{'all':45} {same.total():4} of {total.total():4}, {same.total() / total.total():.1%}")
