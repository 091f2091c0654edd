# SPDX-License-Identifier: MIT
"""One step of rtt.py in numbers, in the order of its sections: the tutorial with real tensors.

    python data/explain.py RUN                                the step after the checkpoint in a run's folder
    python data/explain.py --partition verdict --reward csr   a first step of the embedded model

It prints the step's first group, and writes credit.html, to look at in a browser: the first group and the
last, before the step's update and after it, under every partition and loss; and the run's curves.

RUN gets credit.html and is not changed otherwise; only --device may be given beside it. Without RUN all flags
are rtt.py's, and the page goes to --out or a new folder of runs/. The step is then the first, of up to ten,
in whose first group the rewards differ, and the relevance is the rules' evidence: nothing is learned yet.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rtt


def load_checkpoint(run, models):
    """As rtt.load_checkpoint, but cuts nothing off. Returns how many steps were done, and their metrics."""
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    for name, part in rtt.trained(models).items():
        part.load_state_dict(state[name])
    lines = (run / "metrics.jsonl").read_bytes()[: state["metrics_size"]].splitlines()
    return state["done"], [json.loads(line) for line in lines]


@torch.no_grad()
def logprobs_now(model, rollout, config):
    """Log-probabilities [N, T] of the sampled tokens under the policy as it is now."""
    logprobs = torch.zeros_like(rollout.logprobs)
    G = config.group_size
    for rows, ids, attention, T in rtt.micro_batches(rollout, G, config.micro_batch):
        with rtt.precision(config.device, config.dtype):
            logprobs[rows, :T] = rtt.token_logprobs(model, ids, attention, T, config.temperature, G)
    return logprobs


def make_step(models, tasks, done, config):
    """The step after `done`, as in rtt.train_step. Returns its number, tasks, and tensors of N rows each."""
    policy = models.policy
    G = config.group_size
    for step in range(done + 1, done + 11):
        drawn, seeds = rtt.step_tasks(tasks, step, config)
        rollout = rtt.roll_out(policy, drawn, G, seeds, config)
        _, _, verdicts, evidence = rtt.grade(policy.tokenizer, rollout, drawn, models.judge)
        rewards = rtt.response_reward(verdicts, config.reward).view(-1, G)  # [P, G]
        if config.resume or (rewards[0] != rewards[0, 0]).any():
            break
    every = replace(config, partition="intra")  # "verdict" would leave out rubrics on which a group agrees
    relevance, _ = rtt.token_relevance(models.discriminator, drawn, rollout, verdicts, evidence, every)
    groups = zip(verdicts.split(G), relevance.split(G), rollout.mask.split(G))
    token_adv = torch.cat([rtt.token_advantage(*group, config.partition) for group in groups])  # [N, T]
    response_adv = rtt.response_advantage(rewards).view(-1, 1)  # [N, 1]
    advantages = response_adv * rollout.mask + config.alpha * token_adv
    before = logprobs_now(policy.model, rollout, config)  # the sampler's, but rounded as those after it are
    rtt.update(policy.model, models.optimizer, rollout, advantages, config, models.reference)
    after = logprobs_now(policy.model, rollout, config)
    return step, drawn, [rollout.ids, rollout.mask, verdicts, evidence, relevance, before, after]


def rounded(tensor):
    """A tensor as lists of numbers that are short to write."""
    return tensor.cpu().double().round(decimals=6).tolist()


def credit(config, tokenizer, task, ids, mask, verdicts, evidence, relevance, old, new):
    """A group in numbers, for every partition and loss, given its log-probabilities old and new [G, T].

    The run's own loss has the run's clip, the others their default, but TGC's are without the group clip,
    which would hide how they cancel.
    """
    K = len(task.rubrics)  # others in the batch may have more
    verdicts = verdicts[:, :K]
    relevance = relevance[:, :K]
    rewards = rtt.response_reward(verdicts, config.reward)  # [G]
    response_adv = rtt.response_advantage(rewards)  # [G]
    partitions = {}
    for partition in ("intra", "inter", "rubric", "verdict"):
        token_adv = rtt.token_advantage(verdicts, relevance, mask, partition)  # [G, T]
        advantage = response_adv[:, None] * mask + config.alpha * token_adv  # [G, T]
        part = dict(token_advantage=rounded(token_adv), advantage=rounded(advantage), coef={}, residual={})
        for loss in rtt.CLIP:
            clip = (1.0, math.inf) if loss in ("grpo-fix", "dfpo-min", "dfpo-orth") else None
            clip = config.clip if loss == config.loss else clip
            coef = advantage * rtt.policy_weights(new, old, advantage, mask, len(ids), loss, clip)  # [G, T]
            part["coef"][loss] = rounded(coef)
            part["residual"][loss] = rtt.cancellation_residual(coef, ids, mask) if coef.any() else None
        partitions[partition] = part
    marks = []  # null where a judge gave no evidence: JSON has no NaN
    for response in evidence[:, :K]:
        marks.append([None if row.isnan().any() else row.tolist() for row in response])
    written = [row[:n] for row, n in zip(ids.tolist(), mask.sum(1).tolist())]
    spelled = [rtt.token_spans(tokenizer, row) for row in written]
    return dict(
        prompt=task.prompt,
        rubrics=[rubric.criterion for rubric in task.rubrics],
        ids=written,
        texts=[text for text, _ in spelled],
        spans=[spans for _, spans in spelled],
        verdicts=verdicts.tolist(),
        evidence=marks,
        relevance=rounded(relevance),
        reward=rounded(rewards),
        response_advantage=rounded(response_adv),
        logprob=rounded(old),
        ratio=rounded((new - old).clamp(max=20).exp()),
        response_ratio=rounded(((new - old).sum(1) / mask.sum(1)).exp()),  # the geometric mean
        partitions=partitions,
    )


def write_page(path, config, step, groups, metrics):
    """data/credit.html with these numbers in it."""
    setting = dict(step=step)
    for name in ("partition", "loss", "alpha", "reward", "relevance"):
        setting[name] = getattr(config, name)
    data = dict(title=path.parent.resolve().name, setting=setting, groups=groups, metrics=metrics)
    text = json.dumps(data, ensure_ascii=False).replace("<", r"\u003c")  # no text can end the script
    template = (rtt.DATA / "credit.html").read_text(encoding="utf-8")
    path.write_text(template.replace('"DATA"', text, 1), encoding="utf-8")


def explain(config, group):
    """Print each section's tensors. group: what `credit` says of it after the update."""
    part = group["partitions"][config.partition]
    s = torch.tensor(group["verdicts"])
    w = torch.tensor(group["relevance"])
    A = torch.tensor(group["response_advantage"])
    ids = group["ids"][0]
    n = len(ids)
    first = [group["texts"][0][start:end] or "(end)" for start, end in group["spans"][0]]
    print(f"1. A prompt and its K = {s.shape[1]} rubrics\n   {group['prompt']}")
    for criterion in group["rubrics"]:
        print(f"   - {criterion}")
    print(f"\n2. G = {len(s)} responses; the tokens of the first\n   {first}\n   ids {ids}")
    print(f"\n3. verdicts s [G, K]\n{s}\n   rewards R [G], {config.reward}: {torch.tensor(group['reward'])}")
    print(f"\n4. relevance w [G, K, T] = {list(w.shape)}; tokens of the first response behind each verdict")
    for k, criterion in enumerate(group["rubrics"]):
        behind = [token for token, relevance in zip(first, w[0, k]) if relevance > 0.5]
        print(f"   {'met' if s[0, k] > 0 else 'violated'}: {criterion}: {behind}")
    print(f"\n5. response level A = (R - mean) / std [G]: {A}")
    print(f"   token level a [G, T], partition {config.partition}; the first response's")
    print(torch.tensor(part["token_advantage"][0][:n]))
    print(f"   both, A + alpha * a, alpha = {config.alpha}\n{torch.tensor(part['advantage'][0][:n])}")
    ratio = torch.tensor(group["response_ratio"])
    print(f"\n6. After the update, each response's ratio [G] (the geometric mean of its tokens'): {ratio}")
    weights = dict(ratio=ratio, min_replace=rtt.min_replace(ratio))
    weights["adv_orthogonal"] = rtt.adv_orthogonal(ratio, A)
    for name, weight in weights.items():
        print(f"   {name:<14} sum of A * weight, the response level left over: {float((A * weight).sum()):+.5f}")
    print(f"\n7. Coefficients c = advantage * weight [G, T] of a next update, {config.loss}; the first's")
    print(torch.tensor(part["coef"][config.loss][0][:n]))
    print("   What of them does not cancel over the group (the residual, 0 to 1), loss by loss")
    for loss, residual in part["residual"].items():
        print(f"   {loss:<10} {'no token is pushed' if residual is None else format(residual, '.2f')}")


def main(argv):
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in rtt.main
    transformers.logging.disable_progress_bar()
    if argv and not argv[0].startswith("-"):
        argv = ["--resume", *argv]
    config = rtt.parse(argv)
    out = Path(config.out)
    if config.eval_only or config.resume and not (out / "checkpoint.pt").is_file():
        raise rtt.BadInput(f"{config.resume or '--eval-only'}: no checkpoint, and so no step that follows it")
    if config.relevance == "discriminator" and not (config.resume and config.alpha):
        config.relevance = "evidence"  # there is no discriminator, or it has learned nothing
    tasks, eval_tasks = rtt.load_data(config)
    models = rtt.load_models(tasks + eval_tasks, config)
    done, metrics = load_checkpoint(out, models) if config.resume else (0, [])
    step, drawn, tensors = make_step(models, tasks, done, config)
    groups = []
    for place, p in (("first", 0), ("last", -1)):
        *group, before, after = [tensor.split(config.group_size)[p] for tensor in tensors]
        for moment, now in (("before", before), ("after", after)):
            numbers = credit(config, models.policy.tokenizer, drawn[p], *group, before, now)
            numbers["name"] = f"{place} group, {moment} its update"
            groups.append(numbers)
    out.mkdir(parents=True, exist_ok=True)
    write_page(out / "credit.html", config, step, groups, metrics)
    torch.set_printoptions(precision=2, sci_mode=False, linewidth=110)
    explain(config, groups[1])
    torch.set_printoptions(profile="default")
    print(f"\nThe same with all its numbers, to look at: {out / 'credit.html'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (rtt.BadInput, FloatingPointError, OSError) as error:
        print(f"explain.py: {error}".partition("\n")[0], file=sys.stderr)
        sys.exit(2)
