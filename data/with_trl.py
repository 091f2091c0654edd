# SPDX-License-Identifier: MIT
"""RTT-GRPO inside TRL's GRPOTrainer, for several GPUs, and for models that one does not hold.

    python data/with_trl.py                                         the embedded model, on a CPU
    torchrun --nproc_per_node 8 data/with_trl.py --model Qwen2.5-7B-Instruct --prompts 32 --deepspeed FILE

Needs `pip install "trl==1.16.*"`. The flags of rtt.py mean what they mean there (--prompts: of all processes
together); all others are those of TRL's GRPOConfig (--use_vllm, --deepspeed, --fsdp, --save_strategy) and,
for LoRA, of its ModelConfig (--use_peft). The policy is saved in --out; measure it by
`python rtt.py --eval-only --model OUT`.

Why TRL: its loss takes advantages [B, T], and to override `_generate_and_score_completions` is what its
maintainers call the supported way (trl issue 4525; 7291 asks for a hook). verl's register_adv_est cannot see
verdicts and relevance (verl pull request 7473 would let it); prime-rl and OpenRLHF need a fork.

TRL's loss "dapo" is rtt.py's "grpo": the mean over the tokens of all processes and micro-batches. "bnpo" is a
mean of each process, and with a ratio of the whole response the token level vanishes without a word: these,
and all that was not compared with rtt.py, are refused. rtt.py's losses that need a group's rows together
(grpo-fix, dfpo-min, dfpo-orth) are left out: TRL shuffles the rows before it splits them into micro-batches.

Run so far, on CPUs: one process, two by torchrun, two steps of LoRA. Never run: GPUs, vLLM, DeepSpeed, FSDP.
TRL's checkpoints do not hold the discriminator: --resume_from_checkpoint warms up another. TRL tells a model
no positions, which is wrong for those of GPT-2's kind, whose positions are absolute.
`accelerate launch --num_processes 2 --cpu` silently starts one process; `torchrun --nproc_per_node 2` and
`accelerate launch --multi_gpu` start as many as they are told.
"""

import dataclasses
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import broadcast_object_list, reduce
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rtt


class SharedDiscriminator(rtt.RelevanceDiscriminator):
    """The same in every process: each has responses of its own to learn from, and all take one step."""

    def fit(self, tasks, verdicts, ids, mask, evidence, pairs=48, batch=16):
        """rtt.py's step, on `pairs` of each process: the mean is one over the tokens of all of them."""
        rtt.training_mode(self)
        known = ~evidence[:, :, 0].isnan()
        every = rtt.statements(tasks, verdicts * known)
        chosen = [every[j] for j in torch.randperm(len(every))[:pairs].tolist()]
        for i, k, T, logits in self.batches(chosen, ids, mask, batch):
            weight = mask[i, :T].float()
            F.binary_cross_entropy_with_logits(logits, evidence[i, k, :T], weight, reduction="sum").backward()
        tokens = torch.tensor(sum(int(mask[i].sum()) for i, _, _ in chosen), device=mask.device)
        total = reduce(tokens, "sum").clamp(min=1)
        for parameter in self.parameters():  # also where nothing is known, for the others wait
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = reduce(own, "sum") / total
        rtt.descend(self, self.optimizer)


class Grader:
    """TRL's reward function. Keeps the advantages [N, T] of the completions that it saw last."""

    def __init__(self, models, tasks, config):
        self.models = models
        self.tasks = tasks  # one a row of the data set
        self.config = config
        self.advantages = None

    def __call__(self, completion_ids, row, log_metric, **others):
        """N lists of tokens, the end tokens among them, and their N rows of the data set -> N rewards."""
        policy = self.models.policy
        config = self.config
        G = config.group_size
        tasks = [self.tasks[number] for number in row[::G]]
        written = [torch.tensor(tokens, device=config.device) for tokens in completion_ids]
        ids = pad_sequence(written, batch_first=True)  # [N, T]
        mask = pad_sequence([torch.ones_like(tokens) for tokens in written], batch_first=True)  # [N, T]
        truncated = [tokens[-1] not in policy.end_ids for tokens in completion_ids]
        truncated = torch.tensor(truncated, device=config.device)  # [N]
        rollout = rtt.Rollout(None, ids, mask, None, None, truncated)
        _, _, verdicts, evidence = rtt.grade(policy.tokenizer, rollout, tasks, self.models.judge)
        discriminator = self.models.discriminator
        relevance, f1 = rtt.token_relevance(discriminator, tasks, rollout, verdicts, evidence, config)
        rewards = rtt.response_reward(verdicts, config.reward)  # [N]
        response_adv = rtt.response_advantage(rewards.view(-1, G))  # [P, G]
        groups = zip(verdicts.split(G), relevance.split(G), mask.split(G))
        token_adv = torch.cat([rtt.token_advantage(*group, config.partition) for group in groups])  # [N, T]
        self.advantages = response_adv.view(-1, 1) * mask + config.alpha * token_adv
        if f1 is not None:
            log_metric("f1", f1)
        return rewards.tolist()


class RTTTrainer(GRPOTrainer):
    """GRPOTrainer with the advantages that its grader kept."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)  # calls the grader
        advantages = self.reward_funcs[0].advantages  # [N, T]
        padding = batch["completion_ids"].shape[1] - advantages.shape[1]  # of --pad_to_multiple_of
        batch["advantages"] = F.pad(advantages, (0, padding))
        return batch


def split(argv):
    """The command line -> the words of rtt.py's flags, and all others."""
    about = "RTT-GRPO in TRL. Beside these flags of rtt.py: GRPOConfig's, and of ModelConfig's those of LoRA."
    parser = transformers.HfArgumentParser(rtt.Config, description=about, allow_abbrev=False)
    others = parser.parse_known_args(argv)[1]
    rest = list(others)
    known = []
    for word in argv:
        if rest and word == rest[0]:
            rest.pop(0)
        else:
            known.append(word)
    return known, others


def in_words_of_trl(config):
    """rtt.py's settings as GRPOConfig's. Raises BadInput."""
    for name in ("loss", "resume", "eval_only", "eval_every", "eval_prompts"):
        value = getattr(config, name)
        if value != getattr(rtt.Config, name):
            raise rtt.BadInput(f"--{name.replace('_', '-')} {value}: only rtt.py has it, not TRL")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if config.prompts % processes:
        raise rtt.BadInput(f"--prompts {config.prompts}: must be a multiple of the {processes} processes")
    prompts = config.prompts // processes  # of each
    groups = math.gcd(config.micro_batch, prompts)  # in one forward and backward pass
    low, high = config.clip or rtt.CLIP["grpo"]
    return dict(
        output_dir=config.out,
        save_strategy="no",
        logging_steps=1,
        use_cpu=config.device == "cpu",
        bf16=config.dtype == "bfloat16",
        activation_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        shuffle_dataset=False,
        max_steps=config.steps * config.updates,  # of the optimiser
        num_iterations=config.updates,
        num_generations=config.group_size,
        per_device_train_batch_size=groups * config.group_size,
        gradient_accumulation_steps=prompts // groups,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        loss_type="dapo",
        epsilon=low,
        epsilon_high=high,
        beta=config.kl,
        use_bias_correction_kl=False,
        router_aux_loss_coef=0.0,
        learning_rate=config.lr,
        lr_scheduler_type="constant",
        max_grad_norm=config.max_grad_norm,
    )


def parse(argv):
    """The command line -> rtt.py's Config, TRL's GRPOConfig and ModelConfig. Raises BadInput."""
    known, others = split(argv)
    config = rtt.parse(known)
    parser = transformers.HfArgumentParser((GRPOConfig, ModelConfig), allow_abbrev=False)
    parser.set_defaults(**in_words_of_trl(config))
    try:
        args, adapter = parser.parse_args_into_dataclasses(others, look_for_args_file=False)
    except ValueError as error:
        raise rtt.BadInput(f"TRL: {error}") from None
    level = args.importance_sampling_level
    if args.loss_type != "dapo":
        raise rtt.BadInput(f"--loss_type {args.loss_type}: must be dapo; bnpo, for one, is another mean")
    if level != "token":
        raise rtt.BadInput(f"--importance_sampling_level {level}: must be token, or the token level is lost")
    responses = args.per_device_train_batch_size * args.steps_per_generation
    if responses % config.group_size or args.num_generations != config.group_size:
        size = f"{responses} responses in each, --group-size {config.group_size}"
        raise rtt.BadInput(f"each process must hold whole groups: {size}")
    for name, value in vars(ModelConfig()).items():
        if getattr(adapter, name) != value and not name.startswith(("use_", "lora_")):
            raise rtt.BadInput(f"--{name}: of ModelConfig's flags only those of LoRA are used")
    return config, args, adapter


def as_text(tokenizer, prompt):
    """The text that TRL encodes as rtt.py does the prompt. Raises BadInput where there is none."""
    ids = rtt.encode_prompt(tokenizer, prompt)
    begin = tokenizer.decode(tokenizer("").input_ids)  # what a tokenizer writes before every text
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False).removeprefix(begin)
    if tokenizer(text).input_ids != ids:
        raise rtt.BadInput(f"{tokenizer.name_or_path}: TRL would encode in another way: {prompt!r}")
    return text


def make_trainer(config, args, adapter):
    """The trainer of a run, its discriminator warmed up. Raises BadInput."""
    config.device = str(args.device)  # of this process
    args.output_dir = broadcast_object_list([args.output_dir])[0]  # one for all: its name may hold the time
    train_tasks, _ = rtt.load_data(config)
    models = rtt.load_models(train_tasks, dataclasses.replace(config, kl=0.0))  # TRL has its own reference
    policy = models.policy
    tasks = []  # those of rtt.py's steps
    for step in range(1, config.steps + 1):
        tasks += rtt.step_tasks(train_tasks, step, config)[0]
    texts = [as_text(policy.tokenizer, task.prompt) for task in tasks]
    if models.discriminator:
        torch.manual_seed(config.seed)  # the same weights in every process
        base = models.discriminator.base
        shared = SharedDiscriminator(base, policy.tokenizer, config.discriminator_lr, config.dtype)
        models = models._replace(discriminator=shared)
        prompts = config.prompts // args.world_size
        seed = config.seed + args.process_index  # others in every process
        rtt.warm_up(models, train_tasks, dataclasses.replace(config, prompts=prompts, seed=seed))
    if args.use_vllm:  # it does not read the policy's generation_config, which has these
        args.generation_kwargs = dict(args.generation_kwargs or {}, stop_token_ids=policy.end_ids)
    return RTTTrainer(
        model=policy.model,
        reward_funcs=Grader(models, tasks, config),
        args=args,
        train_dataset=Dataset.from_dict(dict(prompt=texts, row=list(range(len(texts))))),
        processing_class=policy.tokenizer,
        peft_config=get_peft_config(adapter),
    )


def main(argv=None):
    """Train and save; where the input is bad, say so in one line and leave with status 2."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # see rtt.main
    try:
        trainer = make_trainer(*parse(sys.argv[1:] if argv is None else argv))
    except (rtt.BadInput, OSError) as error:
        print(f"with_trl.py: {error}".partition("\n")[0], file=sys.stderr)
        sys.exit(2)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
