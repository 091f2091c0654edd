# SPDX-License-Identifier: MIT
"""Tests of with_trl.py. They need `pip install "trl==1.16.*"`, and are skipped without it."""

import math
import sys
import warnings
from pathlib import Path

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))
# before torch: it sets the number of threads
from test_rtt import assert_close, folder, python, qwen, spy, tokenizer, weights_of

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from tokenizers import processors
from transformers import AutoTokenizer, TrainerCallback

import rtt

IN_TRL = "--device cpu --steps 1 --group-size 4 --micro-batch 4 --max-new-tokens 40".split()
IN_TRL += "--temperature 1.3 --reward csr --relevance evidence --partition intra --alpha 1".split()
IN_TRL += ["--max-grad-norm", "1e9"]


@pytest.fixture(scope="session")
def with_trl():
    pytest.importorskip("trl")
    import with_trl

    return with_trl


class Gradient(TrainerCallback):
    """Keeps the gradient that TRL's optimiser is about to follow."""

    def on_pre_optimizer_step(self, args, state, control, model, **others):
        self.value = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def gradient_of_train_step(tasks, responses, flags):
    """That of rtt.py's step, were these the responses that it sampled."""
    config = rtt.parse(flags)
    config.dtype = "any"  # neither autocast nor old log-probabilities: the first ratios are 1
    policy = rtt.load_policy(config.model, config, torch.float32)
    prompts = [rtt.encode_prompt(policy.tokenizer, task.prompt) for task in tasks]
    ids = pad_sequence([torch.tensor(response) for response in responses], batch_first=True)
    mask = pad_sequence([torch.ones(len(response)) for response in responses], batch_first=True).long()
    truncated = torch.tensor([response[-1] not in policy.end_ids for response in responses])
    assert truncated.any() and {response[-1] for response in responses}.issuperset(policy.end_ids)
    rollout = rtt.Rollout(prompts, ids, mask, torch.zeros(ids.shape), torch.zeros(ids.shape), truncated)
    before = weights_of(policy.model)
    optimizer = torch.optim.SGD(policy.model.parameters(), 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtt, "roll_out", lambda *_: rollout)
        rtt.train_step(rtt.Models(policy, optimizer, None, None, None), tasks, [], config)
    return before - weights_of(policy.model)


def compare_gradients(with_trl, prompts, processes):
    """TRL's gradient, in two micro-batches, is that of rtt.py's step on the responses of all processes."""
    from accelerate.utils import gather_object

    flags = [*IN_TRL, "--prompts", str(prompts)]
    seen = Gradient()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):  # TRL's own
        patch.setattr(rtt, "turn_end", lambda tokenizer: rtt.token_ids(tokenizer, " she")[0])  # another end
        trainer = with_trl.make_trainer(*with_trl.parse(flags))
        assert trainer.accelerator.num_processes == processes
        assert trainer.args.gradient_accumulation_steps == 2
        trainer.add_callback(seen)
        graded = spy(patch, "grade")
        trainer.train()
        [((_, rollout, tasks, _), _)] = graded
        tasks = gather_object(tasks)
        responses = gather_object([ids[mask > 0].tolist() for ids, mask in zip(rollout.ids, rollout.mask)])
        assert len(responses) == 4 * prompts
        for alpha, least, most in (("1", 0, 1e-4), ("0", 0.1, 9)):  # "0": without the token level
            expected = gradient_of_train_step(tasks, responses, [*flags, "--alpha", alpha])
            assert least <= (seen.value - expected).norm() / expected.norm() < most


def test_trl_follows_the_gradient_of_a_step_of_rtt(with_trl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the runs' folders go there
    compare_gradients(with_trl, prompts=8, processes=1)


def compare_fits(with_trl, tokenizer, rank, known):
    """Two processes with two responses each take the discriminator's step of one with all four."""
    ids = torch.randint(5, 99, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]).long()
    evidence = (ids[:, None] % torch.tensor([2, 3])[:, None] == 0).float()  # [4, 2, 6]
    evidence[known:] = math.nan
    tasks = [rtt.Task("", [rtt.Rubric("", {}, word) for word in ("one", "two")])] * 4
    own = slice(2 * rank, 2 * rank + 2)
    weights = []
    for kind, part in ((rtt.RelevanceDiscriminator, slice(4)), (with_trl.SharedDiscriminator, own)):
        discriminator = kind(qwen(len(tokenizer)).model, tokenizer, 1)
        discriminator.optimizer = torch.optim.SGD(discriminator.parameters(), 1.0)
        verdicts = torch.tensor([[1, -1]] * 4)[part]
        discriminator.fit(tasks[part], verdicts, ids[part], mask[part], evidence[part], pairs=99, batch=3)
        weights.append(weights_of(discriminator))
    assert_close(*weights)


def in_two_processes():
    """What each process of the next test does."""
    import with_trl
    from accelerate.utils import gather_object

    compare_gradients(with_trl, prompts=16, processes=2)
    with pytest.raises(rtt.BadInput, match="each process must hold whole groups"):
        with_trl.parse("--per_device_train_batch_size 12 --gradient_accumulation_steps 1".split())
    flags = [*IN_TRL, "--prompts", "2", "--relevance", "discriminator", "--warmup", "1"]
    trainer = with_trl.make_trainer(*with_trl.parse(flags))
    for known in (4, 2):  # responses with evidence: with 2, the second process has none
        compare_fits(with_trl, trainer.processing_class, trainer.accelerator.process_index, known)
    discriminator = trainer.reward_funcs[0].models.discriminator
    for train in (list, trainer.train):  # after the warm-up, and after a step
        train()
        first, second = gather_object([weights_of(discriminator)])
        assert torch.equal(first, second)
    trainer.accelerator.wait_for_everyone()  # none leaves while the other still talks to it
    trainer.accelerator.end_training()


def test_trl_in_two_processes_takes_the_same_step_and_has_one_discriminator(with_trl, tmp_path):
    start = "-m torch.distributed.run --standalone --nproc_per_node 2 --no-python".split()
    code = f"import sys; sys.path.insert(0, {str(DATA)!r}); from {__name__} import *; in_two_processes()"
    ended = python(*start, sys.executable, "-c", code, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_trl_reads_a_prompt_as_rtt_does_or_it_is_refused(with_trl, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begin = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))  # written before every text
    processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[begin])
    tokenizer.backend_tokenizer.post_processor = processor
    for template in (None, "<|im_start|>user {{ messages[0].content }}<think>"):
        tokenizer.chat_template = template
        text = with_trl.as_text(tokenizer, "Tell a story.")
        assert tokenizer(text=[text]).input_ids == [rtt.encode_prompt(tokenizer, "Tell a story.")]
    tokenizer.chat_template = None
    with pytest.raises(rtt.BadInput, match="another way"):
        with_trl.as_text(tokenizer, "Say <|im_end|>.")


REFUSED = ["--importance_sampling_level sequence", "--loss_type bnpo", "--loss dfpo-min", "--no-such-flag 1"]


@pytest.mark.parametrize("flags", REFUSED)
def test_trl_refuses_in_one_line_what_would_not_be_the_same(flags, with_trl, capsys):
    with pytest.raises(SystemExit, match="2"):
        with_trl.main(flags.split())
    said = capsys.readouterr().err
    assert said.startswith("with_trl.py: ") and said.count("\n") == 1 and flags.split()[0] in said
