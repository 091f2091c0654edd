# SPDX-License-Identifier: MIT
"""One step of rtt.py in numbers, in the order of its sections: the tutorial with real tensors.

    python data/explain.py --partition intra --reward csr

Flags are rtt.py's. The step is the first, of up to ten, in whose first group the rewards differ; the relevance
is the rules' evidence, for the discriminator has learned nothing yet. The run's folder gets the same as
credit.html.
"""

import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rtt


def first_that_teaches(models, tasks, config):
    """Train until the rewards of a step's first group differ: what that step was made of, and its metrics."""
    for step in range(1, 11):
        row, example = rtt.train_step(models, *rtt.step_tasks(tasks, step, config), config)
        rewards = rtt.response_reward(example[2][: config.group_size], config.reward)
        if (rewards != rewards[0]).any():
            break
    return dict(step=step) | row, example


def explain(config, task, rollout, verdicts, relevance, group):
    """Print each section's tensors. group: what rtt.credit says of the same."""
    G = config.group_size
    K = len(task.rubrics)
    ids = rollout.ids[:G].cpu()
    mask = rollout.mask[:G].cpu()
    s = verdicts[:G, :K].cpu()
    w = relevance[:G, :K].cpu()
    n = int(mask[0].sum())  # tokens of the first response
    characters = [group["texts"][0][start:end] or "(end)" for start, end in group["spans"][0]]
    print(f"1. A prompt and its K = {K} rubrics\n   {task.prompt}")
    for rubric in task.rubrics:
        print(f"   - {rubric.criterion}")
    print(f"\n2. ids [N, T] = {list(rollout.ids.shape)}; G = {G} rows answer this prompt; the first's tokens")
    print(f"   {characters}\n   ids {ids[0, :n].tolist()}")
    R = rtt.response_reward(s, config.reward)
    print(f"\n3. verdicts s [G, K]\n{s}\n   rewards R [G], {config.reward}: {R}")
    print(f"\n4. relevance w [G, K, T] = {list(w.shape)}; tokens of the first response behind each verdict")
    for rubric, sign, row in zip(task.rubrics, s[0], w[0, :, :n]):
        behind = [text for text, relevant in zip(characters, row) if relevant > 0.5]
        print(f"   {'met' if sign > 0 else 'violated'}: {rubric.criterion}: {behind}")
    A = rtt.response_advantage(R)
    a = rtt.token_advantage(s, w, mask, config.partition, pool=config.pool)
    combined = rtt.combine_advantages(A, a, mask, config.alpha)
    print(f"\n5. response level A = (R - mean) / std [G]: {A}")
    print(f"   token level a [G, T], partition {config.partition}; the first response's\n{a[0, :n]}")
    print(f"   both, A + alpha * a, alpha = {config.alpha}\n{combined[0, :n]}")
    log_ratio = torch.tensor(group["ratio"]).log() * mask
    ratio = (log_ratio.sum(1) / mask.sum(1)).exp()
    print(f"\n6. After the update, each response's ratio [G] (the geometric mean of its tokens'): {ratio}")
    weights = dict(ratio=ratio, min_replace=rtt.min_replace(ratio))
    weights["adv_orthogonal"] = rtt.adv_orthogonal(ratio, A)
    for name, weight in weights.items():
        print(f"   {name:<14} sum of A * weight, 0 if shared tokens cancel: {float((A * weight).sum()):+.5f}")
    part = group["partitions"][config.partition]
    print(f"\n7. Coefficients c = advantage * weight [G, T] of a next update, loss {config.loss}; the first's")
    print(torch.tensor(part["coef"][config.loss][0][:n]))
    print("   What of them does not cancel over the group (the residual, 0 to 1), loss by loss")
    for loss, residual in part["residual"].items():
        print(f"   {loss:<10} {residual:.2f}")


def main(argv=None):
    transformers.logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace")  # as in rtt.main
    config = rtt.parse(argv)
    if config.resume:
        raise rtt.BadInput("--resume: there is nothing to resume")
    config.relevance = "evidence"
    train_tasks, eval_tasks = rtt.load_both(config.data, config.rubrics, False)
    out = rtt.open_run(config)
    models = rtt.load_models(train_tasks + eval_tasks, config)
    row, example = first_that_teaches(models, train_tasks, config)
    group = rtt.credit(models, config, *example)
    rtt.write_rows(out / "metrics.jsonl", [row])
    rtt.write_rows(out / "credit.jsonl", [dict(step=row["step"]) | group])
    rtt.write_page(out, config)
    torch.set_printoptions(precision=2, sci_mode=False, linewidth=110)
    explain(config, *example[:4], group)
    torch.set_printoptions(profile="default")
    print(f"\nThe same with all its numbers, to look at: {out / 'credit.html'}")


if __name__ == "__main__":
    try:
        main()
    except (rtt.BadInput, FloatingPointError, OSError) as error:
        print(f"explain.py: {error}".partition("\n")[0], file=sys.stderr)
        sys.exit(2)
