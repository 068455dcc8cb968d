# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "bitsandbytes==0.50.2", "peft==0.21.2",
#     "accelerate==1.15.0", "safetensors", "numpy", "matplotlib"]
# ///
"""GRPO and its family: RL without a critic, from reward models, reward functions and verifiable answers.

What PPO's critic estimates, the worth of a prompt before the response, is read off other responses to the same prompt
(Shao et al. 2024, DeepSeekMath, section 4.1). Each step:

    1. sample G responses y ~ pi_old(.|x) to each prompt x; groups without signal may be refilled with new prompts
    2. reward them: R = sum of weighted rewards, penalties, and with --kl k1 less kl_coef (log pi_old - log pi_ref)
    3. advantages A: R against the group's other responses, the batch, or a greedy response
    4. mu updates of the policy on the whole batch, with ratio = pi_theta / pi_old:
         minimise  - aggregate over tokens of  min(ratio A, clip(ratio, 1 - low, 1 + high) A)  + kl_coef KL(pi, pi_ref)

`--method` names a published combination (METHODS below), and any flag of its own overrides its part of it:

    method         advantage                    aggregation   ratio      clip            KL             else
    grpo           (R - mean) / sd of group     response      token      0.2, 0.2        k3 in loss
    dr_grpo        R - mean of group            constant      token      0.2, 0.2        none
    dapo           (R - mean) / sd of group     token         token      0.2, 0.28       none           refill, overlong
    gspo           (R - mean) / sd of group     response      sequence   3e-4, 4e-4      none
    cispo          (R - mean) / sd of group     token         token      weight <= 5     none
    rloo           R - mean of the others       response      product    0.2, 0.2        k1 in reward
    reinforce      R - mean of batch            response      product    0.2, 0.2        none
    reinforce_pp   R whitened over the batch    token         token      0.2, 0.2        k1 in reward
    remax          R - R of greedy response     response      product    0.2, 0.2        k1 in reward

    python grpo.py                                       # the embedded world in tiny/: right answers, two minutes
    python grpo.py --method rloo --reward_model tiny/reward                               # the same, a reward model
    python grpo.py --model runs/sft --dataset gsm8k.jsonl --reward_fn rewards/math.py:numeric --max_response_length 512
    python grpo.py --rewards rewards/math.py:numeric rewards/text.py:repetition=0.1 runs/reward=0.2 ...

Data (hub id, or local .jsonl, .json, .parquet): `prompt` (string or message list), any columns a reward function wants.
A reward function: f(prompts, responses, **columns) -> list[float | None]; None: this reward leaves the response out.

Writes runs/grpo/: the policy's adapter in PEFT's format, tokenizer, args.json, metrics.jsonl, timing.jsonl, curves.png,
samples.jsonl (held-out responses of the reference and of the policy), report.json, checkpoint/.
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    Cache,
    DynamicCache,
    DynamicLayer,
    HfArgumentParser,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TINY = Path(__file__).resolve().parent / "tiny"
HEAD_KEY = "base_model.model.score.weight"  # where AutoModelForSequenceClassification + PEFT look for the head
SHARED_ROW_MODELS = (  # model types with plain attention, where tests hold shared rows to padded ones
    "llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "gpt2", "gemma2", "gemma3_text",
)  # fmt: skip
PLAIN_TEMPLATE = (  # for models that come without a chat template: no new token is added to the vocabulary
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}\n{% else %}"
    "{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TEXT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # --chat_template text: no markup, continuation
GREEDY = 1e-4  # a temperature at which the sampler takes the most likely token

Advantage = Literal["group_norm", "group_mean", "leave_one_out", "batch_mean", "whiten", "greedy"]
Aggregation = Literal["response", "token", "constant"]
Ratio = Literal["token", "sequence", "product"]
Surrogate = Literal["clip", "cispo"]
Penalty = Literal["none", "k1", "k2", "k3"]
MethodName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce", "reinforce_pp", "remax"]


class Method(NamedTuple):
    """What a --method sets; each field is a flag that overrides it."""

    advantage: Advantage
    aggregation: Aggregation
    ratio: Ratio
    kl: Penalty
    clip_low: float = 0.2
    clip_high: float = 0.2
    surrogate: Surrogate = "clip"
    max_refills: int = 0
    overlong_buffer: float = 0.0


METHODS = {
    "grpo": Method("group_norm", "response", "token", "k3"),  # Shao et al. 2024, eq. 3; its k3 had no ratio
    "dr_grpo": Method("group_mean", "constant", "token", "none"),  # Liu et al. 2025: no bias by length or difficulty
    "dapo": Method("group_norm", "token", "token", "none", 0.2, 0.28, "clip", 3, 0.2),  # Yu et al. 2025, eq. 8, 11, 13
    "gspo": Method("group_norm", "response", "sequence", "none", 3e-4, 4e-4),  # Zheng et al. 2025, eq. 5 and 7
    "cispo": Method("group_norm", "token", "token", "none", 1.0, 4.0, "cispo"),  # MiniMax-M1 2025, eq. 4 and 5
    "rloo": Method("leave_one_out", "response", "product", "k1"),  # Ahmadian et al. 2024
    "reinforce": Method("batch_mean", "response", "product", "none"),  # Williams 1992
    "reinforce_pp": Method("whiten", "token", "token", "k1"),  # Hu 2025
    "remax": Method("greedy", "response", "product", "k1"),  # Li et al. 2023, algorithm 1
}


# ------------------------------------------------------------------------------------------------------- arguments
class UserError(Exception):
    """A mistake in what the user gave, printed as one line: what, where, what was expected, what to do."""


class BadRow(Exception):
    """A row that can't be used: BadRow(reason, detail); rows are counted by reason, the first detail is shown."""


def arg(default: Any, help: str) -> Any:
    """One dataclass field = one command-line flag with its --help text."""
    text = {"help": help.replace("%", "%%")}
    return field(default_factory=default, metadata=text) if callable(default) else field(default=default, metadata=text)


@dataclass
class Args:
    # roles
    model: str = arg(str(TINY / "sft"), "base model or run folder: hub id or local path")
    reward_model: str | None = arg(
        None, "run folder or model with one score; default in ppo and online dpo: tiny/reward unless --reward_fn"
    )
    reward_fn: str | None = arg(None, "file.py:function that scores responses instead of a reward model")
    rewards: list[str] | None = arg(
        None,
        "several rewards instead of one, each file.py:function or a reward model, with its weight: SOURCE[=WEIGHT]",
    )
    gold_fn: str | None = arg(
        None, "file.py:function that judges, never trains; default: tiny's annotator, on its data"
    )
    quant: Literal["auto", "nf4", "none"] = arg("auto", "4-bit base; auto: as the run folder says, else nf4 on a GPU")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "auto: bfloat16 on a GPU or with nf4, else float32")
    revision: str | None = arg(None, "branch, tag or commit of a hub model")
    trust_remote_code: bool = arg(False, "run model code that comes with a hub model")
    chat_template: str | None = arg(None, "plain, text (no markup) or a Jinja file; default: the tokenizer's own")
    lora_r: int | None = arg(None, "LoRA rank; default: the loaded adapter's, else 16; 0 trains all weights (sft only)")
    lora_alpha: float | None = arg(None, "LoRA scale numerator; default: the loaded adapter's, else 2 * rank")
    lora_target_modules: list[str] | None = arg(
        None, "layers with LoRA; default: the loaded adapter's, else all linear"
    )
    gradient_checkpointing: bool | None = arg(None, "recompute activations in backward; default: on a GPU")
    # data
    dataset: str = arg(str(TINY / "prompts.jsonl"), "training data: hub id or local .jsonl, .json, .parquet")
    dataset_split: str = arg("train", "split of a hub dataset")
    eval_dataset: str | None = arg(None, "held-out data; default: --eval_size of the training data, split by prompt")
    eval_size: float = arg(0.05, "held-out share (below 1) or number of rows where no --eval_dataset is given")
    max_prompt_length: int = arg(512, "longer prompts are dropped and counted, never cut (tokens)")
    max_response_length: int = arg(64, "longest response (tokens)")
    # rollout
    samples_per_prompt: int = arg(8, "responses per prompt; the prompt is computed once for all of them")
    temperature: float = arg(1.0, "of sampling and of every log-prob; no top-k or top-p, which would bias the ratio")
    sample_batch_size: int = arg(128, "responses decoded at once: memory, not the result")
    max_refills: int | None = arg(
        None, "rounds in which groups of equal rewards are replaced by new prompts (DAPO's dynamic sampling)"
    )
    # reward
    missing_eos_penalty: float = arg(0.0, "subtracted from the score of a response that did not end")
    overlong_buffer: float | None = arg(
        None, "last share of --max_response_length over which a penalty rises from 0 to 1 (DAPO); 0: none"
    )
    mask_truncated: bool = arg(False, "responses that did not end are left out of the loss (DAPO's overlong filtering)")
    # method
    method: MethodName = arg("grpo", "sets every flag below that is not given, see METHODS")
    advantage: Advantage | None = arg(
        None, "what a response's reward is compared with; whiten: over the batch's tokens"
    )
    aggregation: Aggregation | None = arg(
        None, "loss: mean over responses of their token means; mean over all tokens; sum / (B * max_response_length)"
    )
    ratio: Ratio | None = arg(
        None, "pi / pi_old per token; of a response, its geometric mean over tokens (sequence) or whole (product)"
    )
    surrogate: Surrogate | None = arg(
        None, "min of plain and clipped ratio (PPO); cispo: the clipped ratio is a weight"
    )
    clip_low: float | None = arg(None, "the ratio is clipped to at least 1 - this")
    clip_high: float | None = arg(None, "the ratio is clipped to at most 1 + this")
    kl: Penalty | None = arg(
        None, "KL penalty: k1 in the reward, k2 or importance-corrected k3 in the loss; none: KL at evaluations only"
    )
    kl_coef: float = arg(0.04, "weight of the KL penalty towards the reference")
    entropy_coef: float = arg(0.0, "weight of the entropy bonus")
    mu: int = arg(1, "updates on each rollout, all of it every time; 1: every ratio is 1, so clipping has no effect")
    sync_ref_every: int = arg(0, "the reference becomes the policy every so many steps; 0: never")
    # optimisation
    learning_rate: float = arg(1e-3, "peak learning rate; for LoRA on 7B: sft 2e-4, reward 1e-4, dpo 1e-5, RL 2e-5")
    warmup_ratio: float = arg(0.05, "share of the steps with rising learning rate; cosine to a tenth after it")
    weight_decay: float = arg(0.0, "AdamW weight decay")
    max_grad_norm: float = arg(1.0, "gradients longer than this are scaled down to it")
    batch_size: int = arg(
        128, "examples per step, all processes together (reward, dpo: prompts with all their pairs; RL: responses)"
    )
    micro_batch_size: int = arg(
        32, "rows (reward, dpo: prompts; RL: responses) per forward pass: memory, not the result"
    )
    tokens_per_micro_batch: int = arg(
        0, "most tokens per training pass, padding included; a longer example goes alone; 0: any number"
    )
    epochs: float = arg(2.5, "passes over the dataset")
    max_steps: int = arg(0, "stop after this many steps; 0: no limit; the smaller bound wins")
    # run
    output_dir: str = arg("runs/grpo", "run folder; an existing one is renamed unless --resume")
    seed: int = arg(0, "decides everything on CPU")
    eval_every: int = arg(0, "steps between evaluations on held-out data; 0: at the end only")
    save_every: int = arg(0, "steps between checkpoints; 0: none")
    resume: bool = arg(False, "continue from the newest checkpoint of --output_dir")
    report_to: list[str] | None = arg(None, "trackers that accelerate knows: wandb, tensorboard, ...")


def run_cli(main: Callable[[Any], Any], args_class: Any) -> None:
    """Parse the command line into `args_class` and run `main`: mistakes of the user are one line, not a traceback."""
    script = Path(sys.argv[0]).name
    parser = HfArgumentParser(args_class, description=main.__doc__, allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(look_for_args_file=False)
    except ValueError as error:  # an unknown flag
        print(f"{script}: {error}; `python {script} --help` lists the flags", file=sys.stderr)
        sys.exit(2)
    try:
        main(args)
    except UserError as error:
        sys.exit(f"{script}: {error}")


# ------------------------------------------------------------------------------------------------------- the maths
# Shapes: B responses, T response tokens. mask (B, T): 1 = a real token of the response (its end token included).
def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the positions with mask 1; x, mask (B, T) -> scalar.

    >>> masked_mean(torch.tensor([[1.0, 3.0], [5.0, 99.0]]), torch.tensor([[1, 1], [1, 0]]))
    tensor(3.)
    """
    return (x * mask).sum() / mask.sum()


def masked_whiten(x: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """x (B, T) shifted and scaled to mean 0 and variance 1 over the positions with mask 1; 0 elsewhere.

    `total` adds sums up over processes, so that all of them use the statistics of the whole batch.

    >>> masked_whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[1, 1, 0]]))
    tensor([[-1.,  1.,  0.]])
    """
    n, first = total(torch.stack([mask.sum().to(x.dtype), (x * mask).sum()]))
    n = n.clamp(min=1)  # a batch may have no position at all
    variance = total(((x - first / n) ** 2 * mask).sum()) / n
    return (x - first / n) * torch.rsqrt(variance + 1e-8) * mask


# P prompts with G responses each: B = P * G in that order. A reward that nobody knows is NaN: the response gets
# advantage 0 and has no part in any baseline. `total` adds sums up over processes.
def group_advantages(rewards: Tensor, samples_per_prompt: int, scale: bool) -> Tensor:
    """A (B,) = R - mean of the prompt's responses; scale: over their standard deviation (Shao et al. 2024, sec. 4.1.2).

    Without it prompts count by their spread, and the gradient has no bias (Liu et al. 2025, Dr. GRPO).

    >>> group_advantages(torch.tensor([1.0, 0.0, 2.0, 2.0]), 2, scale=False)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    >>> group_advantages(torch.tensor([4.0, 1.0, 1.0]), 3, scale=True)  # sd = sqrt((4 + 1 + 1) / 2) = 1.732
    tensor([ 1.1546, -0.5773, -0.5773])
    """
    groups = rewards.view(-1, samples_per_prompt)
    centred = groups - groups.nanmean(1, keepdim=True)
    if scale:
        n = (~groups.isnan()).sum(1, keepdim=True)
        centred = centred / (((centred**2).nansum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt() + 1e-4)
    return centred.flatten().nan_to_num()


def leave_one_out_advantages(rewards: Tensor, samples_per_prompt: int) -> Tensor:
    """A (B,) = R - mean of the prompt's other responses (Ahmadian et al. 2024, RLOO).

    >>> leave_one_out_advantages(torch.tensor([1.0, 0.0, 2.0]), 3)
    tensor([ 0.0000, -1.5000,  1.5000])
    """
    groups = rewards.view(-1, samples_per_prompt)
    n_others = (~groups.isnan()).sum(1, keepdim=True) - 1
    others = (groups.nansum(1, keepdim=True) - groups) / n_others  # 0 / 0 where there is no other: advantage 0
    return (groups - others).flatten().nan_to_num()


def batch_advantages(rewards: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """A (B,) = R - mean over the whole batch (Williams 1992, with a baseline).

    >>> batch_advantages(torch.tensor([1.0, 0.0, 2.0]))
    tensor([ 0., -1.,  1.])
    """
    n, first = total(torch.stack([(~rewards.isnan()).sum().to(rewards.dtype), rewards.nansum()]))
    return (rewards - first / n).nan_to_num()


def greedy_advantages(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """A (B,) = R - R of the greedy response to the same prompt (P,) (Li et al. 2023, ReMax, algorithm 1).

    >>> greedy_advantages(torch.tensor([1.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 0.5]))
    tensor([ 0.0000, -1.0000,  1.5000,  1.5000])
    """
    return (rewards - greedy_rewards.repeat_interleave(len(rewards) // len(greedy_rewards))).nan_to_num()


def rewards_to_go(rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """(B, T): R - kl_coef * sum over i >= t of (log pi - log pi_ref)_i; column 0 is the penalised reward of all of y.

    k1 in the reward: its expected policy gradient is that of KL(pi, pi_ref) of whole responses. Group methods take
    column 0 (Ahmadian et al. 2024), REINFORCE++ each token's own (Hu 2025): earlier tokens are not its doing.

    >>> rewards_to_go(torch.tensor([2.0]), torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -1.5]]),
    ...               torch.ones(1, 2), 0.5)
    tensor([[1.7500, 2.2500]])
    """
    log_ratio = (logprobs - ref_logprobs) * mask
    return rewards[:, None] - kl_coef * log_ratio.flip(1).cumsum(1).flip(1)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: float) -> Tensor:
    """(B,): 0 up to max_length - buffer tokens, from there down to -1 at max_length (Yu et al. 2025, DAPO, eq. 13).

    >>> overlong_penalty(torch.tensor([70, 80, 90, 100]), max_length=100, buffer=20)
    tensor([ 0.0000,  0.0000, -0.5000, -1.0000])
    """
    return ((max_length - buffer - lengths) / buffer).clamp(-1, 0)


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: str) -> Tensor:
    """pi / pi_old: token (B, T); of a whole response (B, 1): product, or sequence = its T-th root (Zheng 2025, eq. 7).

    >>> new, old, mask = torch.log(torch.tensor([[0.2, 0.4]])), torch.log(torch.tensor([[0.1, 0.1]])), torch.ones(1, 2)
    >>> [importance_ratio(new, old, mask, level) for level in ("token", "product", "sequence")]
    [tensor([[2., 4.]]), tensor([[8.]]), tensor([[2.8284]])]
    """
    log_ratio = (logprobs - old_logprobs) * mask
    if level == "token":
        return torch.exp(log_ratio)
    whole = log_ratio.sum(1, keepdim=True)
    return torch.exp(whole / mask.sum(1, keepdim=True).clamp(min=1) if level == "sequence" else whole)


def clipped_loss(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) (Schulman et al. 2017, eq. 7; Yu et al. 2025: high > low).

    >>> clipped_loss(torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2, 0.28)
    tensor([-1.2800,  1.5000, -0.5000,  0.8000])
    """
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def cispo_loss(logprobs: Tensor, ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-sg(clip(ratio, 1 - low, 1 + high)) A log pi: every token keeps its gradient (MiniMax-M1 2025, eq. 4 and 5).

    >>> cispo_loss(torch.tensor([-1.0, -1.0]), torch.tensor([0.5, 9.0]), torch.tensor([1.0, 1.0]), 1.0, 4.0)
    tensor([0.5000, 5.0000])
    """
    return -ratio.clamp(1 - clip_low, 1 + clip_high).detach() * advantages * logprobs


def kl_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token loss (B, T) on samples of pi_old, whose expected gradient is that of KL(pi, pi_ref) at each token.

    k3: ratio * (pi_ref / pi - 1 - log(pi_ref / pi)), whose expectation is the KL for every pi. Without the ratio, as in
    Shao et al. 2024, eq. 4, its gradient at pi = pi_old would be that of KL(pi_ref, pi).
    k2: ratio (constant) * 1/2 (log pi / pi_ref)^2, whose gradient is log(pi / pi_ref) grad log pi (Schulman 2020).

    >>> half, quarter = torch.log(torch.tensor([[0.5]])), torch.log(torch.tensor([[0.25]]))
    >>> kl_loss(half, quarter, quarter, "k3"), kl_loss(half, quarter, quarter, "k2")  # 2 (log 2 - 1/2), log(2)^2
    (tensor([[0.3863]]), tensor([[0.4805]]))
    """
    log_ratio, ratio = logprobs - ref_logprobs, torch.exp(logprobs - old_logprobs)
    if kind == "k2":
        return ratio.detach() * 0.5 * log_ratio**2
    return ratio * (torch.expm1(-log_ratio) + log_ratio)


def token_weights(mask: Tensor, aggregation: str, n_responses: float, n_tokens: float, max_length: int) -> Tensor:
    """(B, T): what each token's loss counts; n_responses and n_tokens are those of the whole batch, all processes.

    response: mean over responses of their means over tokens (Shao 2024, eq. 3), so tokens of long responses count less.
    token: mean over all tokens (Yu 2025, eq. 8). constant: 1 / (n_responses * max_length), at any length (Liu 2025).

    >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    >>> [token_weights(mask, how, 2, 4, 5)[:, 0].tolist() for how in ("response", "token", "constant")]
    [[0.1666666716337204, 0.5], [0.25, 0.25], [0.10000000149011612, 0.10000000149011612]]
    """
    if aggregation == "response":
        return mask / (mask.sum(1, keepdim=True).clamp(min=1) * n_responses)
    return mask / max(n_tokens, 1) if aggregation == "token" else mask / (n_responses * max_length)


def token_losses(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor, args: Any
) -> Tensor:
    """Per-token losses (B, T) of a method, before aggregation; advantages (B, T), constants of the loss."""
    ratio = importance_ratio(logprobs, old_logprobs, mask, args.ratio)
    if args.surrogate == "cispo":
        loss = cispo_loss(logprobs, ratio, advantages, args.clip_low, args.clip_high)
    else:
        loss = clipped_loss(ratio, advantages, args.clip_low, args.clip_high)
    if args.kl in ("k2", "k3"):
        loss = loss + args.kl_coef * kl_loss(logprobs, old_logprobs, ref_logprobs, args.kl)
    return loss


def old_new_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Per-token estimate (B, T) of KL(pi_old, pi) from samples of pi_old: ratio - 1 - log ratio (Schulman 2020, k3).

    Unbiased, never negative; as a loss its expected gradient is the KL's, because the samples come from pi_old.

    >>> old_new_kl(torch.log(torch.tensor([[0.5]])), torch.zeros(1, 1))
    tensor([[0.1931]])
    """
    return torch.expm1(logprobs - old_logprobs) - (logprobs - old_logprobs)


def learning_rate_at(step: int, total_steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of `peak`; a function of the step, so resuming needs no state.

    >>> [round(learning_rate_at(s, 10, 1.0, 0.2), 3) for s in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def chunked_logprobs(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, temperature: float, chunk_size: int,
    all_gradients: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """hidden (N, d), targets (N,) -> log softmax(logits/temperature)[target] (N,) and entropy (N,), both fp32.

    `chunk_size` tokens at a time, so that (N, vocabulary) never exists. A token's log-prob depends on its own hidden
    state alone: its gradient (d,) is taken at once and kept in the logits' place, so that backward computes nothing
    again. all_gradients: of the entropy and to the head's weights too, for which backward recomputes each chunk.
    """

    def one_chunk(h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logp = logits(h).float().div_(temperature).log_softmax(-1)
        known = logp if all_gradients else logp.detach()
        return logp.gather(-1, target[:, None]).squeeze(-1), -(known.exp() * known).sum(-1)

    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    if all_gradients:
        parts = [checkpoint(one_chunk, h, target, use_reentrant=False) for h, target in chunks]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    slopes: list[Tensor] = []
    parts = []
    for h, target in chunks:
        h = h.detach().requires_grad_(hidden.requires_grad)
        logprob, entropy = one_chunk(h, target)
        slopes += torch.autograd.grad(logprob.sum(), h) if h.requires_grad else []  # row i is d logprob i / d h i
        parts.append((logprob.detach(), entropy))
    logprobs, entropy = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    if slopes:  # plus 0, whose gradient to `hidden` is the one taken above
        logprobs = logprobs + ((hidden - hidden.detach()).float() * torch.cat(slopes).float()).sum(-1)
    return logprobs, entropy


# ------------------------------------------------------------------------------------------------------------ data
def read_rows(source: str, split: str, skipped: dict[str, list]) -> list[dict]:
    """Rows of a hub dataset or a local .jsonl, .json or .parquet file; "_row" is the line or row number, from 1."""
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        rows = []
        for number, line in enumerate(path.read_bytes().rstrip().split(b"\n"), 1):
            try:
                rows.append({**json.loads(line), "_row": number})
            except (ValueError, TypeError):
                skipped.setdefault("not a JSON object", [0, number, repr(line[:60])])[0] += 1
        return rows
    from datasets import load_dataset  # 1 s that the other paths need not wait for

    try:
        if path.is_file() and path.suffix in (".json", ".parquet"):
            data = load_dataset(path.suffix[1:], data_files=str(path), split="train")
        elif path.exists() or path.suffix in (".jsonl", ".json", ".parquet"):
            raise UserError(f"{source}: no such .jsonl, .json or .parquet file")
        else:
            data = load_dataset(source, split=split)
    except UserError:
        raise
    except Exception as error:  # whatever datasets raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"dataset {source}, split {split}: can't be read ({reason})") from error
    return [{**row, "_row": number} for number, row in enumerate(data, 1)]


def encode_rows(source: str, split: str, columns: list[tuple[str, ...]], encode: Callable[[dict], list]) -> list:
    """encode(row) for every row of `source`, joined; bad rows are counted by reason and shown once.

    `columns` are the alternative column sets of the stage; rows without any of them stop the run if none is usable.
    """
    skipped: dict[str, list] = {}  # reason -> [count, first row, detail]
    rows, examples = read_rows(source, split, skipped), []
    for row in rows:
        try:
            if not any(all(row.get(name) is not None for name in names) for names in columns):
                raise BadRow("a column is missing or null")
            examples += encode(row)
        except BadRow as bad:
            detail = bad.args[1] if len(bad.args) > 1 else ""
            skipped.setdefault(bad.args[0], [0, row["_row"], detail])[0] += 1
    total = len(rows) + skipped.get("not a JSON object", [0])[0]
    reasons = "; ".join(
        f"{count} {reason} (first: row {row}{': ' + str(detail) if detail else ''})"
        for reason, (count, row, detail) in skipped.items()
    )
    if not examples:
        found = ", ".join(sorted({name for row in rows for name in row if name != "_row"})) or "none"
        expected = " | ".join(" + ".join(names) for names in columns)
        raise UserError(f"{source}: no usable row of {total}; columns found: {found}; expected: {expected}; {reasons}")
    print(f"data: {source}: {len(examples)} examples from {total} rows" + (f"; left out: {reasons}" if reasons else ""))
    return examples


def hold_out(examples: list, eval_size: float, seed: int) -> tuple[list, list]:
    """(training, held-out) by prompt: every example of a prompt ("key") lies on the same side; eval_size 0: none."""
    keys = sorted({e["key"] for e in examples}, key=lambda key: hashlib.sha256(f"{seed}{key}".encode()).digest())
    n = math.ceil(eval_size * len(keys) if eval_size < 1 else eval_size)
    if n >= len(keys):
        raise UserError(f"--eval_size {eval_size} holds out {n} of {len(keys)} prompts and leaves none to train on")
    chosen = set(keys[:n])
    return [e for e in examples if e["key"] not in chosen], [e for e in examples if e["key"] in chosen]


def to_messages(prompt: str | list[dict]) -> list[dict]:
    """A string prompt is one user message; a message list stays as it is."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt):
        raise BadRow("neither a string nor a message list", str(prompt)[:60])
    return prompt


def render(tokenizer: Any, messages: list[dict], add_generation_prompt: bool) -> str:
    """The chat template's text; a template that refuses the messages (roles, order) makes the row a bad one."""
    from jinja2 import TemplateError  # the chat template engine of transformers

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise BadRow("refused by the chat template", str(error)) from error


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids with exactly one BOS where the tokenizer is one that adds it, whether the text has it or not."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][0] == bos and ids[:1] != [bos]:
        ids = [bos] + ids
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def encode_prompt(tokenizer: Any, prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt up to the point where the assistant begins to write."""
    return tokenize(tokenizer, render(tokenizer, to_messages(prompt), True))


def encode_response(tokenizer: Any, prompt: str | list[dict], response: str, stop_ids: list[int]) -> list[int]:
    """Token ids of `response` as the continuation of encode_prompt(prompt), up to and with the token that ends it.

    The rendered prompt must be a prefix of the rendered conversation: else the model would be trained on text that it
    is never asked to continue, so BadRow shows both sides of the boundary.
    """
    messages = to_messages(prompt)
    before = render(tokenizer, messages, True)
    whole = render(tokenizer, [*messages, {"role": "assistant", "content": response}], False)
    if not whole.startswith(before):
        at = len(os.path.commonprefix([before, whole]))
        start = before[max(0, at - 20) : at]
        detail = f"after {start!r} the prompt has {before[at:][:30]!r}, with its response {whole[at:][:30]!r}"
        raise BadRow("chat template: the prompt is no prefix of prompt + response", detail)
    prompt_ids, ids = tokenize(tokenizer, before), tokenize(tokenizer, whole)
    if ids[: len(prompt_ids)] == prompt_ids:
        ids = ids[len(prompt_ids) :]
    else:  # a token would straddle the boundary: the model will have to start afresh there, so do we
        ids = tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]
    end = next((t for t, token in enumerate(ids) if token in stop_ids), None)
    return ids[: end + 1] if end is not None else [*ids, tokenizer.eos_token_id]


def encode_rl(row: dict, tokenizer: Any, max_prompt_length: int) -> list[dict]:
    """One row -> [{"ids", "prompt", "columns", "key"}]; columns are what reward functions may want."""
    if not any(str(m["content"]).strip() for m in to_messages(row["prompt"])):
        raise BadRow("empty prompt")
    ids = encode_prompt(tokenizer, row["prompt"])
    if len(ids) > max_prompt_length:
        raise BadRow(f"prompt over {max_prompt_length} tokens")
    columns = {k: v for k, v in row.items() if k not in ("prompt", "_row")}
    return [{"ids": ids, "prompt": row["prompt"], "columns": columns, "key": json.dumps(row["prompt"])}]


def batch_indices(step: int, lengths: list[int], batch_size: int, seed: int) -> list[int]:
    """Rows of batch `step`: a new permutation each epoch, a function of (seed, step), so resuming needs no cursor.

    The longest rows come first of all, so that a batch too large for the memory fails at once and not after hours;
    with --tokens_per_micro_batch a later pass may fill its bound further.
    """
    n = len(lengths)
    indices: list[int] = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        if position % n == 0 or not indices:
            order = np.random.default_rng((seed, position // n)).permutation(n)
            if position < n:
                longest = np.argsort(lengths, kind="stable")[::-1][:batch_size]
                order = np.concatenate([longest, order[~np.isin(order, longest)]])
        indices.append(int(order[position % n]))
    return indices


# ------------------------------------------------------------------------------------------------------ token rows
class Rows(NamedTuple):
    """Token rows ready for a forward pass: R rows of L columns that hold S responses of up to T supervised tokens.

    Token i of a row sees token j <= i of the same group if j is in the prompt (segment 1) or in i's own segment; so one
    row can hold several responses to one prompt, or several examples, and each is computed as if it were alone.
    """

    mixed: bool  # some row holds more than prompt + one response
    input_ids: Tensor  # (R, L)
    position_ids: Tensor  # (R, L), counted within prompt + own segment
    group: Tensor  # (R, L), 0 = padding
    segment: Tensor  # (R, L), 1 = prompt, 2, 3, ... = a response
    state: Tensor  # (S, T), index into the flattened (R * L) of the hidden state that predicts token t
    targets: Tensor  # (S, T), the token ids
    mask: Tensor  # (S, T), 1 = a real token
    last: Tensor  # (S,), index into the flattened (R * L) of each response's last token


Part = tuple[list[int], int, int, int]  # a run of tokens in a row: ids, first position, group, segment
Spot = tuple[int, int, int, int]  # a supervised token: row, column of the state that predicts it, own column, id


def build_rows(rows: list[list[Part]], spots: list[list[Spot]], pad_id: int, device: Any, n_tokens: int = 0) -> Rows:
    """Rows of parts, and the supervised tokens of each response -> Rows.

    Masks come from lengths, never from comparing ids with pad_id: in many chat models pad is EOS. T >= `n_tokens`.
    """
    n_columns = max(sum(len(part[0]) for part in row) for row in rows)
    table = np.zeros((4, len(rows), n_columns), dtype=np.int64)  # input_ids, position_ids, group, segment
    table[0] = pad_id
    for r, row in enumerate(rows):
        column = 0
        for ids, position, group, segment in row:
            at = slice(column, column + len(ids))
            table[0, r, at], table[1, r, at] = ids, np.arange(position, position + len(ids))
            table[2, r, at], table[3, r, at] = group, segment
            column += len(ids)
    n_tokens = max(n_tokens, max(len(spot) for spot in spots))
    where = np.zeros((3, len(spots), n_tokens), dtype=np.int64)  # state, targets, mask
    for s, spot in enumerate(spots):
        for t, (r, before, _, target) in enumerate(spot):
            where[:, s, t] = r * n_columns + before, target, 1
    last = np.array([spot[-1][0] * n_columns + spot[-1][2] for spot in spots])
    tensors = [torch.from_numpy(a).to(device) for a in (*table, *where, last)]
    return Rows(any(len(row) > 2 or len({part[2] for part in row}) > 1 for row in rows), *tensors)


def additive_mask(
    seen: Tensor, positions: tuple[Tensor, Tensor], config: Any, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """What Q tokens see of K, (R, Q, K), and positions of both, (R, Q) and (R, K) -> 0 or the minimum, (R, 1, Q, K).

    By layer type where windows occur; they count positions, not columns. A boolean mask would be wrong under eager
    attention.
    """
    zero, minimum = torch.zeros((), dtype=dtype, device=seen.device), torch.finfo(dtype).min
    full, window = torch.where(seen, zero, minimum)[:, None], getattr(config, "sliding_window", None)
    if not window:
        return full
    near = positions[0][:, :, None] - positions[1][:, None] < window
    windowed = torch.where(seen & near, zero, minimum)[:, None]
    if getattr(config, "layer_types", None) is None:
        return windowed
    return {"full_attention": full, "sliding_attention": windowed}


def attention_mask(rows: Rows, config: Any, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """(R, L) padding mask, or for mixed rows the additive mask (R, 1, L, L), by layer type where windows occur."""
    if not rows.mixed:
        return (rows.group > 0).long()
    i, j = rows.segment[:, :, None], rows.segment[:, None, :]
    seen = (rows.group[:, :, None] == rows.group[:, None, :]) & ((i == j) | (j == 1))
    seen &= torch.ones_like(seen[0]).tril()
    return additive_mask(seen, (rows.position_ids, rows.position_ids), config, dtype)


Group = tuple[list[int], list[list[int]]]  # prompt ids and the ids of the responses to it


def fill_rows(lengths: list[int], width: int) -> list[list[int]]:
    """Pieces of these lengths into rows of up to `width` columns, first fit decreasing -> the numbers of each row's."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        r = next((r for r, columns in enumerate(free) if columns >= lengths[i]), len(rows))
        if r == len(rows):  # fits nowhere
            rows.append([])
            free.append(width)
        rows[r].append(i)
        free[r] -= lengths[i]
    return rows


def micro_batches(order: Sequence[int], columns: Callable[[list[int]], int], args: Any) -> list[list[int]]:
    """`order` cut for one pass each: --micro_batch_size numbers, or fewer, whose rows have --tokens_per_micro_batch."""
    rest, batches = list(order), []
    while rest:
        n = min(len(rest), args.micro_batch_size)
        if args.tokens_per_micro_batch:
            within = bisect.bisect_right(range(1, n + 1), args.tokens_per_micro_batch, key=lambda k: columns(rest[:k]))
            n = max(1, within)
        batches.append(rest[:n])
        rest = rest[n:]
    return batches


def cheapest_rows(groups: list[Group], config: Any) -> tuple[int, int]:
    """(width, columns in all) of rows [prompt][y1][y2]... of one or more groups; width 0: a padded row per response.

    Per layer a token costs about 24 d^2 multiplications in the matrices and 4 L d in the attention of a row of L; a row
    with several responses pays for every masked pair. Models without plain attention always take padded rows.
    """
    apart = [len(prompt) + len(y) for prompt, responses in groups for y in responses]
    if config.model_type not in SHARED_ROW_MODELS:
        return 0, len(apart) * max(apart)
    together = [len(prompt) + sum(map(len, responses)) for prompt, responses in groups]
    layouts = [(0, len(apart), max(apart))]  # width asked for, rows, and columns that each comes to
    for width in (max(together) * sixteenths // 16 for sixteenths in range(16, 33)):
        rows = fill_rows(together, width)
        layouts.append((width, len(rows), max(sum(together[g] for g in row) for row in rows)))
    asked, n, width = min(layouts, key=lambda rows: rows[1] * rows[2] * (24 * config.hidden_size + 4 * rows[2]))
    return asked, n * width


def row_width(groups: list[Group], config: Any) -> int:
    """The width of the cheapest rows."""
    return cheapest_rows(groups, config)[0]


def lay_out(groups: list[Group], row_columns: int, pad_id: int, device: Any, n_tokens: int = 0) -> Rows:
    """Groups -> Rows, responses in order; `row_columns` 0: each in a padded row, else rows [prompt][y1][y2]... .

    A row holds the groups that fit into `row_columns`, and one that alone is wider.
    """
    alone = [(prompt, [y]) for prompt, responses in groups for y in responses]
    units = groups if row_columns else alone
    lengths = [len(prompt) + sum(map(len, responses)) for prompt, responses in units]
    rows: list[list[Part]] = []
    spots: list[list[list[Spot]]] = [[] for _ in units]
    for r, members in enumerate(sorted(map(sorted, fill_rows(lengths, row_columns)))):
        rows.append([])
        column = 0
        for number, unit in enumerate(members, 1):
            prompt, responses = units[unit]
            rows[r].append((prompt, 0, number, 1))
            column += len(prompt)
            end = column - 1  # of the prompt: the state before each response
            for k, y in enumerate(responses):
                rows[r].append((y, len(prompt), number, 2 + k))
                before = [end, *range(column, column + len(y) - 1)]  # where the state before each token stands
                spots[unit].append([(r, before[t], column + t, token) for t, token in enumerate(y)])
                column += len(y)
    return build_rows(rows, [spot for unit in spots for spot in unit], pad_id, device, n_tokens)


Micro = tuple[list[int], Rows]  # numbers of the responses, and their rows


def lay_out_rollout(
    groups: list[Group], n_minibatches: int, args: Any, config: Any, pad_id: int, device: Any
) -> list[list[Micro]]:
    """All responses as minibatches of micro-batches, laid out once for every pass of every role.

    The same rows serve old log-probs, reference, values, scores and updates, so the first ratio is 1 to rounding. Which
    minibatch a response belongs to depends on its place alone: micro-batches change memory, not the result.
    """
    owners = [g for g, (_, responses) in enumerate(groups) for _ in responses]
    ids = [y for _, responses in groups for y in responses]
    longest = [len(prompt) + max(map(len, responses)) for prompt, responses in groups]
    n_tokens = max(map(len, ids))

    def grouped(numbers: list[int]) -> list[Group]:
        same_prompt = itertools.groupby(numbers, key=lambda i: owners[i])
        return [(groups[g][0], [ids[i] for i in members]) for g, members in same_prompt]

    minibatches: list[list[Micro]] = []
    for part in np.array_split(np.arange(len(ids)), n_minibatches):
        order = sorted(part.tolist(), key=lambda i: longest[owners[i]])  # similar lengths: little padding
        minibatches.append([])
        for numbers in micro_batches(order, lambda some: cheapest_rows(grouped(some), config)[1], args):
            some = grouped(numbers)
            rows = lay_out(some, row_width(some, config), pad_id, device, n_tokens)
            minibatches[-1].append((numbers, rows))
    return minibatches


# ----------------------------------------------------------------------------------------------------------- model
def find_adapter(source: str, revision: str | None) -> Path | None:
    """The folder of a PEFT adapter (a run folder or a hub id), None where `source` is a whole model."""
    if Path(source).is_dir():
        return Path(source) if (Path(source) / "adapter_config.json").is_file() else None
    from transformers.utils import cached_file

    try:
        for name in ("args.json", "reward.json", "adapter_model.safetensors", "adapter_config.json"):
            found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return Path(str(found)).parent if found else None
    except OSError as error:
        raise UserError(f"{source}: no such folder, and not to be had from the hub ({type(error).__name__})") from error


def find_base(adapter: Path) -> str:
    """The base that an adapter names; a relative path may also be relative to a parent of the adapter's folder."""
    name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    candidates = [Path(name), *(parent / name for parent in adapter.resolve().parents)]
    found = next((path for path in candidates if (path / "config.json").is_file()), None)
    if found is None and Path(name).is_absolute():
        raise UserError(f"{adapter}/adapter_config.json: base model {name} is not there; move it back or edit it")
    return str(found.resolve()) if found else name


def load_tokenizer(source: str, chat_template: str | None, args: Any) -> Any:
    """Tokenizer with a chat template (`plain` where the model has none) and, for rows, some pad token."""
    try:
        revision = args.revision if source == args.model else None
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no tokenizer there ({str(error).splitlines()[0]})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{source}: the tokenizer has no EOS token; a response could never end")
    templates = {"plain": PLAIN_TEMPLATE, "text": TEXT_TEMPLATE}
    if chat_template is None:
        tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    elif chat_template not in templates and not Path(chat_template).is_file():
        raise UserError(f"--chat_template {chat_template}: not `plain`, not `text` and no such file")
    else:
        tokenizer.chat_template = templates.get(chat_template) or Path(chat_template).read_text(encoding="utf-8")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks come from lengths
    return tokenizer


def find_stop_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """Tokens that end a response: the tokenizer's EOS, the model's own list, and the template's end of turn."""
    ids = {tokenizer.eos_token_id}
    if generation_config is not None and generation_config.eos_token_id is not None:
        eos = generation_config.eos_token_id
        ids |= set(eos) if isinstance(eos, list) else {eos}
    user = [{"role": "user", "content": "a"}]
    try:
        whole = render(tokenizer, [*user, {"role": "assistant", "content": "XYZ"}], False)
    except BadRow as bad:
        raise UserError(f"chat template: {bad.args[0]} ({bad.args[1]})") from bad
    after = tokenizer(whole.rpartition("XYZ")[2].lstrip(), add_special_tokens=False)["input_ids"]
    token = tokenizer.added_tokens_decoder.get(after[0]) if after else None
    if token is not None and token.special:
        ids.add(after[0])
    return sorted(ids)


def base_identity(base: str) -> str:
    """Hash of the config and of the weight files' names, sizes and some bytes: adapters of one base agree in it."""
    from transformers.utils import cached_file

    config = Path(str(cached_file(base, "config.json")))
    ignored = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
    settings = {k: v for k, v in json.loads(config.read_text()).items() if k not in ignored}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in sorted([*config.parent.glob("*.safetensors"), *config.parent.glob("*.bin")]):
        with file.open("rb") as stream:
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            for sixteenth in range(16):  # the beginning alone is a header: names and shapes
                stream.seek(file.stat().st_size * sixteenth // 16)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:16]


def load_base(base: str, args: Any, device: Any, kind: Any = None) -> Any:
    """The model (of class `kind`; by default a causal language model) in eval mode; nf4: double quantisation."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns on import that an optional package is missing
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")  # about calls between the two
    transformers.utils.logging.disable_progress_bar()
    kind, dtype = kind or AutoModelForCausalLM, getattr(torch, args.dtype)
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    options["revision"] = args.revision if base == args.model else None
    try:
        if args.quant == "nf4":
            options["device_map"] = {"": device}
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head", "score"],
            )  # fmt: skip
        model = kind.from_pretrained(base, dtype=dtype, **options).to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"model {base}: can't be loaded ({str(error).splitlines()[0]})") from error
    if device.type == "cpu" and model.num_parameters() < 10**7:
        torch.set_num_threads(1)  # so small a model gains little from threads, and loses much where cores are shared
    for module in model.modules():  # on CPUs with AVX512-BF16 bitsandbytes would repack 4-bit weights at the first eval
        if hasattr(module, "support_avx512bf16_for_cpu"):  # pass, and packed weights pass no gradient to their input
            module.support_avx512bf16_for_cpu = False
            if device.type == "cpu" and module.in_features % 64 in (16, 32, 48):
                raise UserError(f"model {base}: bitsandbytes misreads {module.in_features} inputs on CPU; --quant none")
    probe = [token % model.config.vocab_size for token in range(8)]
    with torch.no_grad():
        logits = model(torch.tensor([probe], device=device)).logits.float()
        if model.get_output_embeddings() is not None:
            ours = lm_logits(model, hidden_states(model, build_rows([[(probe, 0, 1, 1)]], [[(0, 0, 1, 0)]], 0, device)))
            if (ours.float() - logits).norm() > 0.05 * logits.norm():
                raise UserError(
                    f"model {base}: {model.config.model_type} scales its logits after lm_head; not supported"
                )
    return model


def choose_precision(args: Any, adapter: Path | None, device: Any) -> tuple[Any, Any]:
    """(quant, dtype) with every "auto" resolved: the run folder's record, else NF4 on a GPU and none elsewhere."""
    recorded = json.loads((adapter / "args.json").read_text()) if adapter and (adapter / "args.json").is_file() else {}
    quant = args.quant
    if quant == "auto":
        quant = recorded.get("quant") or ("nf4" if device.type == "cuda" else "none")
    old_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8
    if old_gpu:
        print("model: this GPU has no bfloat16 (compute capability below 8.0); computing in float32")
    dtype = args.dtype
    if args.lora_r == 0:  # all weights train: not in 4 bits, and small updates would be lost in bfloat16
        quant, dtype = "none" if args.quant == "auto" else quant, "float32" if dtype == "auto" else dtype
    if dtype == "auto":
        half = (quant == "nf4" or device.type == "cuda") and not old_gpu
        dtype = "bfloat16" if half else "float32"
    return quant, dtype


def no_dropout(model: Any) -> None:
    """Set every dropout to 0: two passes over the same tokens must agree (in RL their ratio is trained on)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def load_model(args: Any, device: Any) -> tuple[Any, Any, list[int], Path | None, str]:
    """(base model, tokenizer, stop ids, adapter folder or None, base path or id) of --model; settles "auto" in args."""
    adapter = find_adapter(args.model, args.revision)
    base = find_base(adapter) if adapter else args.model
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    args.quant, args.dtype = choose_precision(args, adapter, device)
    has_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(adapter) if has_tokenizer else base, args.chat_template, args)
    model = load_base(base, args, device)
    if device.type == "cuda" if args.gradient_checkpointing is None else args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    no_dropout(model)
    return model, tokenizer, find_stop_ids(tokenizer, model.generation_config), adapter, base


def add_adapter(model: Any, name: str, folder: Path | None, args: Any) -> Any:
    """Put a LoRA adapter called `name` on the model, new or read from `folder`; returns the PEFT model.

    A head in the folder is left to load_head: inside PEFT it would be trained, saved and switched with the adapter.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    if folder is None:
        config = LoraConfig(
            r=args.lora_r or 16, lora_alpha=args.lora_alpha or 2 * (args.lora_r or 16), lora_dropout=0.0,
            target_modules=args.lora_target_modules or "all-linear", task_type="CAUSAL_LM",
        )  # fmt: skip
    else:
        config = LoraConfig.from_pretrained(str(folder))
        given = {"lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_target_modules": config.target_modules}
        for flag, loaded in given.items():
            asked = getattr(args, flag)
            if asked and (set(asked) != set(loaded) if flag == "lora_target_modules" else asked != loaded):
                raise UserError(f"--{flag} {asked} contradicts {folder}, trained with {loaded}; drop the flag")
        config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
        config.lora_dropout, config.base_model_name_or_path = 0.0, None
    if hasattr(model, "peft_config"):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    if folder is not None:
        if not (folder / "adapter_model.safetensors").is_file():
            raise UserError(f"{folder}: adapter_model.safetensors is missing; is the run unfinished?")
        try:
            weights = load_file(folder / "adapter_model.safetensors")
        except SafetensorError as error:
            raise UserError(f"{folder}: adapter_model.safetensors is damaged ({error})") from error
        weights.pop(HEAD_KEY, None)
        shapes = {k.replace(f".{name}.", "."): v.shape for k, v in model.state_dict().items() if f".{name}." in k}
        if shapes != {k: v.shape for k, v in weights.items()}:
            raise UserError(f"{folder}: adapter_model.safetensors does not fit this base model's layers")
        set_peft_model_state_dict(model, weights, adapter_name=name)
    return model


@contextlib.contextmanager
def role(model: Any, name: str, grad: bool = False) -> Iterator[None]:
    """Give the shared base one role: its adapter, train mode with gradients or eval mode without, requires_grad.

    A role without an adapter of its own ("reference" of a bare base) runs with the adapters off. Forward and backward
    belong in one such block: switching before backward gives silently wrong gradients.
    """
    parameters = dict(model.named_parameters())
    before, active, training = {n: p.requires_grad for n, p in parameters.items()}, model.active_adapter, model.training
    try:
        known = name in model.peft_config
        with contextlib.nullcontext() if known else model.disable_adapter(), torch.set_grad_enabled(grad):
            if known:
                model.set_adapter(name)
            for n, p in parameters.items():
                p.requires_grad_(grad and f".{name}." in n)
            model.train(grad)  # train mode: checkpointing works; eval mode: the KV cache works
            yield
    finally:
        model.set_adapter(active)
        model.train(training)
        for n, p in parameters.items():
            p.requires_grad_(before[n])


def adapter_parameters(model: Any, name: str) -> list[nn.Parameter]:
    """The trainable tensors of one adapter."""
    return [p for n, p in model.named_parameters() if f".{name}." in n]


def hidden_states(model: Any, rows: Rows) -> Tensor:
    """Last hidden states (R, L, d) of the backbone, without the language-model head."""
    causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
    backbone = getattr(causal_lm, causal_lm.base_model_prefix)
    mask = attention_mask(rows, causal_lm.config, causal_lm.dtype)
    output = backbone(input_ids=rows.input_ids, attention_mask=mask, position_ids=rows.position_ids, use_cache=False)
    return output.last_hidden_state


def lm_logits(model: Any, hidden: Tensor) -> Tensor:
    """(..., d) -> (..., vocabulary), with Gemma 2's soft cap where the config has one."""
    causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
    logits = causal_lm.get_output_embeddings()(hidden)
    cap = getattr(causal_lm.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logits_chunk(config: Any) -> int:
    """How many tokens have logits at a time: enough for a fast product, else 32 MiB of them in fp32."""
    return max(128, 2**23 // config.vocab_size)


def response_logprobs(
    model: Any, rows: Rows, temperature: float = 1.0, all_gradients: bool = False, detached: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (S, T) of the supervised tokens under the active role; 0 where the mask is 0.

    The entropies have gradients only with all_gradients; with `detached` nothing has. (S, T) states are picked by
    index_select, whose backward adds in a fixed order on CPU; plain indexing does not.
    """
    real = rows.mask.bool()
    states = hidden_states(model, rows).flatten(0, 1).index_select(0, rows.state[real])
    causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
    if detached:
        states = states.detach()
    else:
        all_gradients |= any(p.requires_grad for p in causal_lm.get_output_embeddings().parameters())
    chunk_size = logits_chunk(causal_lm.config)
    values = chunked_logprobs(
        lambda h: lm_logits(model, h), states, rows.targets[real], temperature, chunk_size, all_gradients
    )
    logprobs, entropy = (torch.zeros(real.shape, device=v.device).masked_scatter(real, v) for v in values)
    return logprobs, entropy


def load_head(folder: Path, hidden_size: int, device: Any) -> nn.Linear:
    """The reward head of a run folder: (1, d), fp32, no bias; its absence is an error, never a random head."""
    weights = load_file(folder / "adapter_model.safetensors")
    if HEAD_KEY not in weights:
        raise UserError(
            f"{folder}: no reward head ({HEAD_KEY} is missing in adapter_model.safetensors); from reward.py?"
        )
    if weights[HEAD_KEY].shape != (1, hidden_size):
        raise UserError(f"{folder}: the head is {tuple(weights[HEAD_KEY].shape)}, this base needs (1, {hidden_size})")
    head = nn.Linear(hidden_size, 1, bias=False, device=device, dtype=torch.float32)
    head.weight.data.copy_(weights[HEAD_KEY])
    return head


def head_scores(model: Any, head: nn.Linear, rows: Rows) -> Tensor:
    """(S,): the head applied, in fp32, to the last real token of each response (its end token, where it has one)."""
    states = hidden_states(model, rows).flatten(0, 1).index_select(0, rows.last)
    return head(states.float()).squeeze(-1)


def check_canaries(scores: list[float], card: dict, quant: str, dtype: str, where: str) -> None:
    """Compare canary scores with those recorded in reward.json (normalised, so in sd); UserError if the head changed.

    Same quantisation and dtype: within 1e-4 in fp32, 0.05 otherwise; else rank correlation 0.95 and shift below 0.25.
    """
    recorded = np.array([canary["score"] for canary in card["canaries"]])
    difference = np.abs(np.array(scores) - recorded)
    if (quant, dtype) == (card["quant"], card["dtype"]):
        limit = 1e-4 if dtype == "float32" else 0.05
        passed, text = bool(difference.max() <= limit), f"largest difference {difference.max():.2g}, allowed {limit}"
    else:
        ranks = [np.argsort(np.argsort(x)) for x in (recorded, scores)]
        correlation = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
        shift = abs(float(np.mean(np.array(scores) - recorded)))
        passed = bool(correlation >= 0.95 and shift < 0.25)
        text = f"rank correlation {correlation:.3f} (at least 0.95), shift {shift:.2f} sd (below 0.25)"
    if not passed:
        raise UserError(
            f"{where}: the scores in reward.json do not reproduce ({text}); another base, or a changed head"
        )
    print(f"reward model: {len(recorded)} canaries reproduce ({text})")


class RewardModel(NamedTuple):
    """A frozen reward model: r(x, y) = head(state of the last token) - mean."""

    model: Any  # the shared base with its "reward" adapter, or a model of its own
    head: nn.Linear
    mean: float
    tokenizer: Any  # None: token ids of the policy are its own; else text is rendered again with its template
    folder: Path | None


def load_reward_model(source: str, model: Any, base: str, tokenizer: Any, args: Any, device: Any) -> RewardModel:
    """--reward_model as an adapter on the shared base where it was trained on that base, else as its own model."""
    folder = find_adapter(source, None)
    if folder is None:
        own = load_base(source, args, device, AutoModelForSequenceClassification)
        if getattr(own, "score", None) is None or own.score.out_features != 1:
            raise UserError(f"--reward_model {source}: neither a run folder of reward.py nor a model with one score")
        head = nn.Linear(own.score.in_features, 1, bias=False, device=device)
        head.weight.data.copy_(own.score.weight)
        return RewardModel(own, head, 0.0, load_tokenizer(source, None, args), None)
    warn_failed_gates(folder)
    reward_base = find_base(folder)
    reward_tokenizer = load_tokenizer(str(folder), None, args)
    if base_identity(reward_base) == base_identity(base):
        host = add_adapter(model, "reward", folder, args)
        same = reward_tokenizer.chat_template == tokenizer.chat_template
    else:
        print(f"reward model: {source} has another base ({reward_base}); loaded beside the policy's")
        host, same = add_adapter(load_base(reward_base, args, device), "reward", folder, args), False
    head = load_head(folder, host.get_base_model().config.hidden_size, device)
    card: dict[str, Any] = {"mean": 0.0}
    if (folder / "reward.json").is_file():
        card = json.loads((folder / "reward.json").read_text())
    reward = RewardModel(host, head, card["mean"], None if same else reward_tokenizer, folder)
    if "canaries" not in card:
        print(f"reward model: {folder} has no reward.json; scores are neither centred nor checked")
        return reward
    stop_ids = find_stop_ids(reward_tokenizer, host.generation_config)
    scores = []
    for canary in card["canaries"]:
        prompt = encode_prompt(reward_tokenizer, canary["prompt"])
        response = encode_response(reward_tokenizer, canary["prompt"], canary["response"], stop_ids)
        with role(host, "reward"):
            rows = lay_out([(prompt, [response])], 0, reward_tokenizer.pad_token_id, device)
            scores.append(head_scores(host, head, rows).item() - card["mean"])
    if (args.quant, args.dtype) != (card["quant"], card["dtype"]):
        print(f"reward model: trained in {card['quant']}, {card['dtype']}; now the policy's {args.quant}, {args.dtype}")
    check_canaries(scores, card, args.quant, args.dtype, str(folder))
    return reward


def load_function(spec: str) -> Callable:
    """The function that `file.py:function` names."""
    import importlib.util

    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"{spec}: no such file; expected file.py:function")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{spec}: {file} can't be loaded ({type(error).__name__}: {error})") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"{spec}: {file} has no function {name}")
    return getattr(module, name)


def call_function(function: Callable, spec: str, prompts: list[dict], responses: list[str]) -> np.ndarray:
    """function(prompts, responses, **columns) -> (B,) float64, NaN where it returned None."""
    names = sorted({name for p in prompts for name in p["columns"]})  # rows may lack some
    columns = {name: [p["columns"].get(name) for p in prompts] for name in names}
    try:
        values = list(function([p["prompt"] for p in prompts], responses, **columns))
    except Exception as error:
        raise UserError(f"{spec} raised {type(error).__name__}: {error}") from error
    if len(values) != len(responses):
        raise UserError(f"{spec} returned {len(values)} values for {len(responses)} responses")
    scores = []
    for value, prompt, response in zip(values, prompts, responses, strict=True):
        try:
            scores.append(math.nan if value is None else float(value))
        except (TypeError, ValueError):
            scores.append(math.inf)
        if value is not None and not math.isfinite(scores[-1]):
            raise UserError(f"{spec} returned {value!r} for prompt {prompt['prompt']!r}, response {response!r}")
    return np.array(scores)


# --------------------------------------------------------------------------------------------------------- rollout
class GrowingLayer(DynamicLayer):
    """Keys and values of a layer with room for more columns: plain ones would be copied whole at every token."""

    keys: Any
    values: Any
    room: tuple[Any, ...]

    def hold(self, n: int, *room: Tensor) -> None:
        """Take keys and values (R, heads, columns, d), of which the first n columns are filled."""
        self.room = room
        self.keys, self.values = (x[:, :, :n] for x in room)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add columns; returns all, as attention asks for them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.hold(0, key_states[:, :, :0], value_states[:, :, :0])
        n, m = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if m > self.room[0].shape[2]:
            self.hold(n, *(nn.functional.pad(x, (0, 0, 0, m - n + 128)) for x in (self.keys, self.values)))
        for x, new in zip(self.room, (key_states, value_states), strict=True):
            x[:, :, n:m] = new
        self.hold(m, *self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.hold(self.keys.shape[2], *(x[indices] for x in self.room))


class Decoding(NamedTuple):
    """Responses in the making: n of them, side by side after their prompts in R rows of a KV cache of K columns."""

    cache: Any  # of GrowingLayers, or as the model's own
    segment: Tensor  # (R, K), -1 = padding, 0 = prompt, 1, 2, ... = one response
    position: Tensor  # (R, K)
    number: Tensor  # (n,), which response
    row: Tensor  # (n,), its row, ascending
    state: Tensor  # (n, d), the hidden state that predicts its next token


def start_decoding(backbone: Any, prompts: list[list[int]], numbers: list[int], g: int, shared: bool) -> Decoding:
    """Compute each prompt once, for `g` responses each; in a row of its own, or (not `shared`) in g copies of it.

    Shared rows hold keys and values only, so the prompts can come in pieces: at most 4096 tokens, padding included,
    are computed at once.
    """
    width, device = max(map(len, prompts)), backbone.device
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    position = (seen.cumsum(1) - 1).clamp(min=0)
    cache: Any = Cache(layer_class_to_replicate=GrowingLayer) if shared else DynamicCache(config=backbone.config)
    size = max(1, 4096 // len(prompts)) if shared else width
    for begin in range(0, width, size):
        piece = slice(begin, begin + size)
        output = backbone(
            input_ids=ids[:, piece], position_ids=position[:, piece], attention_mask=seen[:, : piece.stop],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
    copies = 1 if shared else g
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    segment, position = (x.repeat_interleave(copies, 0) for x in (seen - 1, position))
    row = torch.arange(len(prompts) * g, device=device) * copies // g
    state = output.last_hidden_state[:, -1].repeat_interleave(g, 0)
    return Decoding(cache, segment, position, torch.tensor(numbers, device=device), row, state)


def join_decodings(old: Decoding, new: Decoding) -> Decoding:
    """Both as one; columns that only rows now gone had are cut off, rows that are too short are padded on the left."""
    first = int((old.segment >= 0).any(0).long().argmax())
    width = max(old.segment.shape[1] - first, new.segment.shape[1])

    def joined(x: Tensor, y: Tensor, columns: int, fill: int) -> Tensor:
        x = x.narrow(columns, first, x.shape[columns] - first)
        after = [0, 0] * (x.dim() - 1 - columns)
        return torch.cat([nn.functional.pad(z, [*after, width - z.shape[columns], 0], value=fill) for z in (x, y)])

    for layer, more in zip(old.cache.layers, new.cache.layers, strict=True):
        layer.hold(width, joined(layer.keys, more.keys, 2, 0), joined(layer.values, more.values, 2, 0))
    segment, position = joined(old.segment, new.segment, 1, -1), joined(old.position, new.position, 1, 0)
    row = torch.cat([old.row, new.row + len(old.segment)])
    return Decoding(
        old.cache, segment, position, torch.cat([old.number, new.number]), row, torch.cat([old.state, new.state])
    )


@contextlib.contextmanager
def grouped_heads() -> Iterator[None]:
    """Attention of several new tokens per row without a copy of keys and values for each query head, which
    transformers makes: the query heads of a group become further tokens of their key's head."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        (n_rows, n_heads, n_tokens, _), n_groups = query.shape, key.shape[1]
        if n_heads == n_groups or n_tokens == 1 or mask is None:
            return plain(module, query, key, value, mask, **given)
        folded, mask = query.reshape(n_rows, n_groups, -1, query.shape[3]), mask.repeat(1, 1, n_heads // n_groups, 1)
        scale = given.get("scaling")
        output = nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
        return output.reshape(n_rows, n_heads, n_tokens, -1).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain


def go_on(backbone: Any, decoding: Decoding, keep: Tensor, token: Tensor, at: Tensor, g: int, shared: bool) -> Decoding:
    """Of n responses those in `keep` go on with `token` at position `at`, both (n,); rows without any leave."""
    number, token, at = decoding.number[keep], token[keep], at[keep]
    rows, row = torch.unique(decoding.row[keep], return_inverse=True)
    cache, segment, position = decoding.cache, decoding.segment, decoding.position
    if len(rows) < len(segment):
        cache.batch_select_indices(rows)
        segment, position = segment[rows], position[rows]
    slot = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)  # its place in its row
    ids = torch.zeros(len(rows), int(slot.max()) + 1, dtype=torch.long, device=row.device)
    position_ids, own = torch.zeros_like(ids), torch.full_like(ids, -1)
    ids[row, slot], position_ids[row, slot], own[row, slot] = token, at, number % g + 1
    segment, position = torch.cat([segment, own], 1), torch.cat([position, position_ids], 1)
    mask: Any = (segment >= 0).long()
    if shared:
        seen = (segment[:, None] == own[:, :, None]) | (segment == 0)[:, None]
        mask = additive_mask(seen, (position_ids, position), backbone.config, backbone.dtype)
    with grouped_heads():
        output = backbone(
            input_ids=ids, position_ids=position_ids, attention_mask=mask, past_key_values=cache, use_cache=True
        )
    return Decoding(cache, segment, position, number, row, output.last_hidden_state[row, slot])


@torch.no_grad()
def sample(
    model: Any, prompts: list[list[int]], names: list[int], samples_per_prompt: int, max_tokens: int,
    temperature: float, stop_ids: list[int], batch_size: int, key: tuple[int, int, int],
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """Responses to P prompts, samples_per_prompt (G) each -> (token ids, log-probs), P * G lists, prompt by prompt.

    `batch_size` // G prompts have their responses at once; others wait until all responses of half of them have ended,
    or of all of them where rows are not shared. Token t of a response is the inverse CDF at one uniform number, a
    function of (key, names[p], sample, t) and of nothing else, so neither `batch_size` nor the other prompts change
    what is sampled. key = (seed, stream, step).
    """
    causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
    backbone, device, g = getattr(causal_lm, causal_lm.base_model_prefix), causal_lm.device, samples_per_prompt
    shared = causal_lm.config.model_type in SHARED_ROW_MODELS
    noise = [
        np.random.Generator(np.random.Philox(key=key[:2], counter=[0, k, name, key[2]])).random(max_tokens)
        for name in names for k in range(g)
    ]  # fmt: skip
    uniform, stops = torch.from_numpy(np.stack(noise)).to(device), torch.tensor(stop_ids, device=device)
    responses, logprobs = torch.zeros_like(uniform, dtype=torch.long), torch.zeros_like(uniform, dtype=torch.float32)
    starts = torch.tensor([len(prompt) for prompt in prompts for _ in range(g)], device=device)
    lengths = torch.zeros_like(starts)
    waiting = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
    decoding: Decoding | None = None
    while waiting or decoding is not None:
        room = batch_size // g - (0 if decoding is None else len(decoding.segment))  # rows: they fill memory
        if waiting and (decoding is None or (shared and 2 * room * g >= batch_size)):
            some, waiting = waiting[: max(1, room)], waiting[max(1, room) :]
            numbers = [p * g + k for p in some for k in range(g)]
            new = start_decoding(backbone, [prompts[p] for p in some], numbers, g, shared)
            decoding = new if decoding is None else join_decodings(decoding, new)
            del new  # its cache
        assert decoding is not None
        who = decoding.number
        at = lengths[who]
        logp = lm_logits(model, decoding.state).float().div_(temperature).log_softmax(-1)
        cdf = logp.exp().double().cumsum_(-1)
        token = torch.searchsorted(cdf, (uniform[who, at] * cdf[:, -1])[:, None], right=True)
        token = token.clamp(max=cdf.shape[1] - 1)
        responses[who, at], logprobs[who, at] = token[:, 0], logp.gather(1, token)[:, 0]
        lengths[who] += 1
        going = ~torch.isin(token[:, 0], stops) & (at + 1 < max_tokens)
        del logp, cdf  # before the next token needs memory
        keep = going.nonzero()[:, 0]
        decoding = go_on(backbone, decoding, keep, token[:, 0], starts[who] + at, g, shared) if len(keep) else None
    pairs = zip(responses.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
    cut = [(tokens[:n], values[:n]) for tokens, values, n in pairs]
    return [tokens for tokens, _ in cut], [values for _, values in cut]


class Rollout(NamedTuple):
    """What one step's sampling and scoring gives: B responses of up to T tokens."""

    prompts: list[dict]  # B, the prompt of each response
    responses: list[list[int]]  # B, token ids, the end token included
    texts: list[str]  # B, without special tokens
    minibatches: list[list[Micro]]
    mask: Tensor  # (B, T)
    ended: Tensor  # (B,), 1 = the response ended by itself
    sampler_logprobs: Tensor  # (B, T), as the sampler saw them; only for the preflight's comparison

    def batches(self) -> list[Micro]:
        """The micro-batches of all minibatches."""
        return [micro for minibatch in self.minibatches for micro in minibatch]


def roll_out(
    model: Any, tokenizer: Any, prompts: list[dict], names: list[int], samples: int, stop_ids: list[int], args: Any,
    key: tuple[int, int, int], who: str = "policy", n_minibatches: int = 1,
) -> Rollout:  # fmt: skip
    """Sample `samples` responses to each prompt in the role `who` and lay them out in rows."""
    with role(model, who):
        responses, sampled = sample(
            model, [p["ids"] for p in prompts], names, samples, args.max_response_length, args.temperature, stop_ids,
            args.sample_batch_size, key,
        )  # fmt: skip
    groups = [(p["ids"], responses[i * samples : (i + 1) * samples]) for i, p in enumerate(prompts)]
    config, device = model.get_base_model().config, model.device
    pad_id = tokenizer.pad_token_id
    minibatches = lay_out_rollout(groups, n_minibatches, args, config, pad_id, device)
    lengths = torch.tensor([len(y) for y in responses], device=device)
    mask = (torch.arange(lengths.max().item(), device=device) < lengths[:, None]).long()
    logprobs = torch.zeros(mask.shape, device=device)
    for i, row in enumerate(sampled):
        logprobs[i, : len(row)] = torch.tensor(row)
    ended = torch.tensor([float(y[-1] in stop_ids) for y in responses], device=device)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return Rollout([p for p in prompts for _ in range(samples)], responses, texts, minibatches, mask, ended, logprobs)


def role_logprobs(model: Any, who: str, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (B, T) of the rollout's tokens in the role `who`, detached.

    The policy's come from a pass with gradients, as in the update: 4-bit kernels may differ from those without.
    """
    logprobs, entropy = torch.zeros_like(rollout.sampler_logprobs), torch.zeros_like(rollout.sampler_logprobs)
    with role(model, who, grad=who == "policy"):
        for numbers, rows in rollout.batches():
            logprobs[numbers], entropy[numbers] = response_logprobs(model, rows, temperature, detached=True)
    return logprobs, entropy


def score_responses(rollout: Rollout, reward: RewardModel | Callable, args: Any) -> Tensor:
    """Scores (B,), before the penalty for a missing end: by the reward model, or by --reward_fn on the texts.

    NaN where --reward_fn returned None; what that means is the method's to say.
    """
    device = rollout.mask.device
    if not isinstance(reward, RewardModel):
        values = call_function(reward, str(args.reward_fn), rollout.prompts, rollout.texts)
        return torch.tensor(values, dtype=torch.float32, device=device)
    batches = rollout.batches()
    if reward.tokenizer is not None:  # another vocabulary or template: from the text, one padded row per response
        stops = find_stop_ids(reward.tokenizer, getattr(reward.model, "generation_config", None))
        groups, pad_id = [], reward.tokenizer.pad_token_id
        for p, text in zip(rollout.prompts, rollout.texts, strict=True):
            try:
                answer = encode_response(reward.tokenizer, p["prompt"], text, stops)
                groups.append((encode_prompt(reward.tokenizer, p["prompt"]), [answer]))
            except BadRow as bad:
                raise UserError(f"the reward model's template can't take {p['prompt']!r:.60}: {bad.args[1]}") from bad
        lengths = [len(prompt) + len(y) for prompt, (y,) in groups]
        order = sorted(range(len(groups)), key=lambda i: lengths[i])
        micros = micro_batches(order, lambda some: len(some) * max(lengths[i] for i in some), args)
        batches = [(numbers, lay_out([groups[i] for i in numbers], 0, pad_id, device)) for numbers in micros]
    scores = torch.zeros(len(rollout.responses), device=device)
    has_adapter = hasattr(reward.model, "peft_config")
    with role(reward.model, "reward") if has_adapter else torch.no_grad():
        for numbers, rows in batches:
            scores[numbers] = head_scores(reward.model, reward.head, rows) - reward.mean
    return scores


def replace_groups(rollout: Rollout, which: list[int], new: Rollout, model: Any, pad_id: int, args: Any) -> Rollout:
    """The rollout with the groups `which` replaced by those of `new`, in order, laid out in rows again."""
    g = args.samples_per_prompt
    prompts, responses, texts = list(rollout.prompts), list(rollout.responses), list(rollout.texts)
    for j, k in enumerate(which):
        there, here = slice(k * g, (k + 1) * g), slice(j * g, (j + 1) * g)
        prompts[there], responses[there], texts[there] = new.prompts[here], new.responses[here], new.texts[here]
    lengths = torch.tensor([len(y) for y in responses], device=model.device)
    mask = (torch.arange(lengths.max().item(), device=model.device) < lengths[:, None]).long()
    at = [k * g + i for k in which for i in range(g)]
    ended, logprobs = rollout.ended.clone(), torch.zeros(mask.shape, device=model.device)
    ended[at] = new.ended
    for i, row in [*enumerate(rollout.sampler_logprobs), *zip(at, new.sampler_logprobs, strict=True)]:
        n = min(len(row), mask.shape[1])
        logprobs[i] = 0.0
        logprobs[i, :n] = row[:n]
    groups = [(prompts[i]["ids"], responses[i : i + g]) for i in range(0, len(prompts), g)]
    minibatches = lay_out_rollout(groups, 1, args, model.get_base_model().config, pad_id, model.device)
    return Rollout(prompts, responses, texts, minibatches, mask, ended, logprobs)


def tokens_saved(rollout: Rollout) -> float:
    """Share of the tokens of padded rows, one per response, that the rollout's rows do without."""
    laid = padded = 0
    for numbers, rows in rollout.batches():
        laid += rows.input_ids.numel()
        padded += len(numbers) * max(len(rollout.prompts[i]["ids"]) + len(rollout.responses[i]) for i in numbers)
    return 1 - laid / padded


# --------------------------------------------------------------------------------------------------------- rewards
class Reward(NamedTuple):
    """One of the weighted rewards."""

    name: str  # in logs and tables
    weight: float
    source: str  # as the user gave it
    score: Any  # a RewardModel, or a function by the contract of load_function


def shares_base(source: str, base: str) -> bool:
    """Whether a reward model is an adapter for the policy's base."""
    folder = find_adapter(source, None)
    return folder is not None and base_identity(find_base(folder)) == base_identity(base)


def load_rewards(args: Any, model: Any, base: str, tokenizer: Any, device: Any) -> list[Reward]:
    """The rewards of --rewards, else of --reward_fn and --reward_model."""
    found: list[Reward] = []
    score: Any
    for text in args.rewards or [source for source in (args.reward_fn, args.reward_model) if source]:
        source, _, weight = text.rpartition("=") if args.rewards and "=" in text else (text, "", "")
        try:
            factor = float(weight or 1)
        except ValueError as error:
            raise UserError(f"--rewards {text}: {weight} is no number; expected SOURCE or SOURCE=WEIGHT") from error
        if not math.isfinite(factor):
            raise UserError(f"--rewards {text}: the weight must be finite")
        if ".py:" in source:
            name, score = source.rpartition(":")[2], load_function(source)
        elif "reward" in model.peft_config and shares_base(source, base):
            raise UserError(f"--rewards {source}: a second reward adapter for the policy's base; give one of them")
        else:
            name, score = Path(source).name, load_reward_model(source, model, base, tokenizer, args, device)
        found.append(Reward(source if name in [r.name for r in found] else name, factor, source, score))
    return found


def reward_table(rollout: Rollout, rewards: list[Reward], args: Any) -> Tensor:
    """(B, F): each response's value of each reward, unweighted; NaN where a function returned None."""
    # score_responses names args.reward_fn in its errors
    scored = [score_responses(rollout, reward.score, replace(args, reward_fn=reward.source)) for reward in rewards]
    for reward, column in zip(rewards, scored, strict=True):
        if isinstance(reward.score, RewardModel) and not column.isfinite().all():
            i = int((~column.isfinite()).nonzero()[0])
            raise UserError(f"{reward.source}: score {column[i]} for the response {rollout.texts[i]!r:.60}")
    return torch.stack(scored, 1)


def total_rewards(table: Tensor, weights: list[float]) -> Tensor:
    """(B, F) -> (B,): the weighted sum of the rewards that are known, NaN where none is.

    >>> total_rewards(torch.tensor([[1.0, 2.0], [1.0, math.nan], [math.nan, math.nan]]), [1.0, 0.5])
    tensor([2., 1., nan])
    """
    total = (table * torch.tensor(weights, device=table.device)).nansum(1)
    return total.masked_fill(table.isnan().all(1), math.nan)


def penalised_rewards(table: Tensor, rollout: Rollout, rewards: list[Reward], args: Any) -> Tensor:
    """(B,): the weighted total, less the penalties for length and for a missing end."""
    total = total_rewards(table, [reward.weight for reward in rewards]) - args.missing_eos_penalty * (1 - rollout.ended)
    if args.overlong_buffer:
        buffer = args.overlong_buffer * args.max_response_length
        total = total + overlong_penalty(rollout.mask.sum(1), args.max_response_length, buffer)
    return total


def flat_groups(rewards: Tensor, samples_per_prompt: int) -> Tensor:
    """(P,) bool: whether a prompt's responses all have the same reward (to rounding), so that nothing can be learned.

    >>> flat_groups(torch.tensor([1.0, 0.0, 2.0, 2.0]), 2)
    tensor([False,  True])
    """
    groups = rewards.double().view(-1, samples_per_prompt)  # in float64 the mean of equal float32 numbers is exact
    return (groups - groups.nanmean(1, keepdim=True)).nan_to_num().abs().amax(1) < 1e-6


def reward_metrics(table: Tensor, rewards: list[Reward], samples: int, accelerator: Accelerator) -> dict[str, float]:
    """By reward: mean and sd over the whole batch, and the share of groups in which it is the same for all (flat)."""
    metrics: dict[str, float] = {}
    for column, reward in zip(table.double().T, rewards, strict=True):
        flat, known = flat_groups(column, samples), ~column.isnan()
        sums = [known.sum(), column.nansum(), (column**2).nansum(), flat.sum(), len(flat)]
        n, first, second, n_flat, n_groups = global_sums(accelerator, *(float(x) for x in sums))
        mean = first / n if n else math.nan  # of no known value: not written
        sd = math.sqrt(max(second / n - mean**2, 0)) if n else math.nan
        metrics |= {f"{reward.name}/mean": mean, f"{reward.name}/sd": sd, f"{reward.name}/flat": n_flat / n_groups}
    return metrics


def collect(
    model: Any, tokenizer: Any, prompts: list[dict], rewards: list[Reward], step: int, accelerator: Accelerator,
    stop_ids: list[int], args: Any,
) -> tuple[Rollout, Tensor, int]:  # fmt: skip
    """One step's rollout, its reward table (B, F), and how many groups were refilled, on this process.

    A group of equal rewards (penalties aside) gives way to a prompt that the batch lacks, at most --max_refills times
    (Yu et al. 2025, section 3.2). Which one, and its noise, depend on seed, step, round and place, on no other group.
    """
    n_prompts, g = args.batch_size // args.samples_per_prompt, args.samples_per_prompt
    places = list(range(n_prompts))[accelerator.process_index :: accelerator.num_processes]
    chosen = batch_indices(step, [len(p["ids"]) for p in prompts], n_prompts, args.seed)
    spare = np.setdiff1d(np.arange(len(prompts)), chosen)
    spare = np.random.default_rng((args.seed, 2, step)).permutation(spare)
    key, weights, refilled = (args.seed, 0, step), [reward.weight for reward in rewards], 0
    rollout = roll_out(model, tokenizer, [prompts[chosen[place]] for place in places], places, g, stop_ids, args, key)
    table = reward_table(rollout, rewards, args)
    for attempt in range(args.max_refills if len(spare) else 0):
        flat = flat_groups(total_rewards(table, weights), g).nonzero()[:, 0].tolist()
        if not flat:
            break
        numbers = [attempt * n_prompts + places[k] for k in flat]
        others = [prompts[spare[number % len(spare)]] for number in numbers]
        names = [n_prompts + number for number in numbers]  # a prompt's place and round name its noise
        new = roll_out(model, tokenizer, others, names, g, stop_ids, args, key)
        table.view(len(places), g, -1)[flat] = reward_table(new, rewards, args).view(len(flat), g, -1)
        rollout = replace_groups(rollout, flat, new, model, tokenizer.pad_token_id, args)
        refilled += len(flat)
    return rollout, table, refilled


def greedy_rewards(
    model: Any, tokenizer: Any, rollout: Rollout, rewards: list[Reward], stop_ids: list[int], args: Args
) -> Tensor:
    """(P,): the reward of the most likely response to each prompt of the rollout, token by token."""
    prompts, most_likely = rollout.prompts[:: args.samples_per_prompt], replace(args, temperature=GREEDY)
    greedy = roll_out(model, tokenizer, prompts, [0] * len(prompts), 1, stop_ids, most_likely, (0, 0, 0))
    return penalised_rewards(reward_table(greedy, rewards, args), greedy, rewards, args)


# ------------------------------------------------------------------------------------------------------ run folder
def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under a temporary name, then rename: a killed run leaves the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; sets become sorted lists."""
    text = json.dumps(
        value, indent=1, ensure_ascii=False, default=lambda v: sorted(v) if isinstance(v, set) else str(v)
    )
    write_file(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def open_run(args: Any, stage: str, accelerator: Accelerator) -> tuple[Path, dict | None]:
    """(run folder, newest loadable checkpoint or None); an existing folder is renamed unless --resume is given."""
    folder = Path(args.output_dir)
    if args.resume and not (folder / "args.json").is_file():
        raise UserError(f"--resume: {folder} is no run folder (args.json is missing); check --output_dir")
    if args.resume:
        recorded = json.loads((folder / "args.json").read_text())
        memory = ("micro_batch_size", "tokens_per_micro_batch", "sample_batch_size", "gradient_checkpointing")
        free = ("resume", "report_to", *memory)
        changed = {k: v for k, v in asdict(args).items() if k not in free and recorded.get(k) != v}
        if changed:
            flags = ", ".join(f"--{k} {v} (was {recorded.get(k)})" for k, v in changed.items())
            raise UserError(f"--resume: {folder} was started with other settings: {flags}")
    elif accelerator.is_main_process:
        if folder.exists():
            n = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
            folder.rename(folder.with_name(f"{folder.name}.{n}"))
            print(f"{stage}: the existing {folder} is now {folder}.{n}")
        (folder / "checkpoint").mkdir(parents=True)
        write_json(folder / "args.json", asdict(args))
    accelerator.wait_for_everyone()
    state = load_checkpoint(folder) if args.resume else None
    for name in ("metrics.jsonl", "timing.jsonl"):  # cut back to the checkpoint's step
        if args.resume and accelerator.is_main_process and (folder / name).is_file():
            lines = [line for line in (folder / name).read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if state is not None and json.loads(line)["step"] < state["step"]]
            write_file(folder / name, partial(Path.write_text, data="".join(kept)))
    return folder, state


def load_checkpoint(folder: Path) -> dict | None:
    """The newest checkpoint that loads; one that does not is named and the one before it is taken."""
    for path in sorted((folder / "checkpoint").glob("step_*.pt"), reverse=True):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file raises
            print(f"resume: {path} can't be loaded ({type(error).__name__}); trying the one before it")
            continue
        print(f"resume: from {path}")
        return state
    print(f"resume: no checkpoint in {folder / 'checkpoint'}; starting from the beginning")
    return None


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write checkpoint/step_NNNNNN.pt (loads with weights_only=True) and keep the last two."""
    path = folder / "checkpoint" / f"step_{state['step']:06d}.pt"
    write_file(path, lambda temporary: torch.save(state, temporary))
    for old in sorted(path.parent.glob("step_*.pt"))[:-2]:
        old.unlink()


def log_step(folder: Path, metrics: dict, timing: dict, accelerator: Accelerator) -> None:
    """One line each in metrics.jsonl (a function of the arguments alone) and timing.jsonl; trackers get both."""
    if not accelerator.is_main_process:
        return
    for name, values in (("metrics", metrics), ("timing", {"step": metrics["step"], **timing})):
        rounded = {k: v if isinstance(v, int) else float(f"{v:.8g}") for k, v in values.items() if v == v}  # no NaN
        with (folder / f"{name}.jsonl").open("a") as stream:
            stream.write(json.dumps(rounded) + "\n")
    accelerator.log({**metrics, **timing}, step=metrics["step"])


def save_adapter(folder: Path, model: Any, name: str, base: str, tokenizer: Any, head: Tensor | None = None) -> None:
    """The adapter as a standard PEFT folder; with a head (1, d) one that AutoModelForSequenceClassification loads."""
    from peft import get_peft_model_state_dict

    config = {**model.peft_config[name].to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    weights = {k: v.contiguous().cpu() for k, v in get_peft_model_state_dict(model, adapter_name=name).items()}
    if head is not None:
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        weights[HEAD_KEY] = head.detach().float().cpu().contiguous()
    write_json(folder / "adapter_config.json", config)
    write_file(folder / "adapter_model.safetensors", lambda temporary: save_file(weights, temporary, {"format": "pt"}))
    tokenizer.save_pretrained(folder)


def warn_failed_gates(folder: Path) -> None:
    """Say which gates of the earlier stage in `folder` failed; training goes on."""
    report = json.loads((folder / "report.json").read_text()) if (folder / "report.json").is_file() else {"gates": []}
    failed = [f"{gate['name']} {gate['value']:.3g}" for gate in report["gates"] if not gate["passed"]]
    if failed:
        print(f"warning: {folder} did not pass its own checks ({', '.join(failed)}); see {folder}/report.json")


def write_report(folder: Path, stage: str, base: str, gates: list[tuple[str, float, float, bool]]) -> None:
    """report.json: gates (name, value, threshold, passed), and the versions that ran."""
    import importlib.metadata as packages

    rows = [
        dict(zip(("name", "value", "threshold", "passed"), gate, strict=True)) for gate in gates if gate[1] == gate[1]
    ]
    versions = {
        name: packages.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
    }
    passed = all(row["passed"] for row in rows)
    write_json(
        folder / "report.json", {"stage": stage, "passed": passed, "gates": rows, "versions": versions, "base": base}
    )
    for row in rows:
        word = "passed" if row["passed"] else "FAILED"
        print(f"{stage}: gate {row['name']} {word}: {row['value']:.4g} (threshold {row['threshold']:.4g})")


def plot_curves(folder: Path, keys: list[str]) -> None:
    """curves.png: each key of metrics.jsonl against the step."""
    try:
        import matplotlib
    except ImportError:
        print("curves.png: not drawn, matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = [key for key in keys if any(key in row for row in rows)]
    figure, axes = pyplot.subplots(1, len(keys), figsize=(3.6 * len(keys), 3), squeeze=False)
    for axis, key in zip(axes[0], keys, strict=True):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axis.plot(*zip(*points, strict=True))
        axis.set(title=key, xlabel="step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    write_file(folder / "curves.png", lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    pyplot.close(figure)


# ------------------------------------------------------------------------------------------------------- optimiser
def make_optimizer(parameters: list[nn.Parameter], weight_decay: float, device: Any) -> torch.optim.Optimizer:
    """8-bit paged AdamW on a GPU, torch's AdamW elsewhere; the learning rate is set at every step."""
    if device.type != "cuda":
        return torch.optim.AdamW(parameters, lr=0.0, weight_decay=weight_decay)
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(parameters, lr=0.0, weight_decay=weight_decay)


def update(optimizer: Any, learning_rate: float, max_grad_norm: float, accelerator: Accelerator) -> float:
    """Sum gradients over processes, clip, step, clear; returns the norm before clipping.

    Losses are divided by the global count before backward, so the sum over micro-batches and processes is the mean.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if accelerator.num_processes > 1:
        for p in parameters:
            p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def global_sums(accelerator: Accelerator, *values: float) -> list[float]:
    """The values summed over all processes, in float64."""
    total = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device), "sum")
    return total.tolist()


def copy_adapter(model: Any, source: str, target: str) -> None:
    """Give the adapter `target` the weights of `source`."""
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        if f".{source}." in name:
            parameters[name.replace(f".{source}.", f".{target}.")].data.copy_(p.data)


@contextlib.contextmanager
def holding(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """The parameters have other values inside the block."""
    before = [p.detach().clone() for p in parameters]
    for p, value in zip(parameters, values, strict=True):
        p.data.copy_(value)
    try:
        yield
    finally:
        for p, value in zip(parameters, before, strict=True):
            p.data.copy_(value)


# -------------------------------------------------------------------------------------------------------- updates
def response_advantages(returns: Tensor, mask: Tensor, baseline: Tensor | None, total: Any, args: Any) -> Tensor:
    """Advantages (B, T) from rewards_to_go (B, T) by --advantage; `baseline` (P,): greedy rewards, else None.

    In float64, where the mean of equal float32 rewards is exact: no signal gives advantages of 0, not of rounding / sd.
    """
    dtype, returns = returns.dtype, returns.double()
    if args.advantage == "whiten":
        return masked_whiten(returns.nan_to_num(), mask * ~returns.isnan(), total).to(dtype)
    rewards, g = returns[:, 0], args.samples_per_prompt
    if args.advantage == "leave_one_out":
        advantages = leave_one_out_advantages(rewards, g)
    elif args.advantage == "batch_mean":
        advantages = batch_advantages(rewards, total)
    elif args.advantage == "greedy":
        assert baseline is not None
        advantages = greedy_advantages(rewards, baseline.double())
    else:
        advantages = group_advantages(rewards, g, scale=args.advantage == "group_norm")
    return advantages[:, None].expand(returns.shape).to(dtype)


def group_backward(
    model: Any, rollout: Rollout, mask: Tensor, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    advantages: Tensor, n_tokens: float, args: Any,
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """Accumulate the policy's gradient; returns its log-probs (B, T) before the update, and this process's share of
    [loss, clip fraction, KL(old, new), entropy].

    `mask` (B, T) says which tokens count; n_tokens of them in the whole batch. old_logprobs None: pi_old is pi itself.
    ref_logprobs None: no reference in the loss.
    """
    current, sums = torch.zeros_like(advantages), torch.zeros(4, device=mask.device)
    with role(model, "policy", grad=True):
        for numbers, rows in rollout.batches():
            logprobs, entropy = response_logprobs(model, rows, args.temperature, args.entropy_coef != 0)
            old, kept = logprobs.detach() if old_logprobs is None else old_logprobs[numbers], mask[numbers]
            reference = old if ref_logprobs is None else ref_logprobs[numbers]
            losses = token_losses(logprobs, old, reference, advantages[numbers], kept, args)
            weights = token_weights(kept, args.aggregation, args.batch_size, n_tokens, args.max_response_length)
            loss = (losses * weights).sum() - args.entropy_coef * (entropy * kept).sum() / n_tokens
            loss.backward()
            current[numbers] = logprobs.detach()
            with torch.no_grad():
                ratio = importance_ratio(logprobs, old, kept, args.ratio)
                clipped = ((ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)) * kept
                parts = [x.sum() / n_tokens for x in (clipped, old_new_kl(logprobs, old) * kept, entropy * kept)]
                sums += torch.stack([loss.detach(), *parts])
    return current, sums.tolist()


# ---------------------------------------------------------------------------------------- preflight and evaluation
def preflight(model: Any, rollout: Rollout, old: Tensor, reference: Tensor, args: Args) -> list[tuple]:
    """Checks on the first rollout -> gates [(name, value, threshold, passed)]; a red one stops the run with its cause.

    They see what metrics hide for hours: another start than the reference, a dropped KV cache, dropout, endless text.
    """
    numbers, rows = rollout.batches()[0]
    with role(model, "policy", grad=True):
        again, _ = response_logprobs(model, rows, args.temperature)
    limit = 1e-4 if args.dtype == "float32" else 0.02
    ratio = (torch.exp(again.detach() - old[numbers]) - 1).abs().max().item()
    kl = masked_mean(old - reference, rollout.mask).abs().item()
    gap = masked_mean((old - rollout.sampler_logprobs).abs(), rollout.mask).item()
    ended, least = rollout.ended.mean().item(), 0.05 if args.missing_eos_penalty else 0.0
    checks = [
        ("kl_step0", kl, limit, kl <= limit, "the policy does not start as the reference"),
        ("ratio_step0", ratio, limit, ratio <= limit, "two passes over the same tokens differ; is a dropout on?"),
        ("sampler_agreement", gap, limit, gap <= limit, "sampler and training pass differ; is the KV cache dropped?"),
        ("eos_rate", ended, least, ended >= least, "responses do not end: raise --max_response_length, train SFT "
         "longer, or set --missing_eos_penalty 0 where no end is wanted"),
    ]  # fmt: skip
    for name, value, threshold, passed, cause in checks:
        print(f"preflight: {'ok ' if passed else 'RED'} {name} {value:.3g} (limit {threshold:g})")
        if not passed:
            raise UserError(f"preflight: {name} is {value:.3g}, limit {threshold:g}: {cause}")
    return [check[:4] for check in checks]


def interval(x: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): the mean over prompts and its 95 % interval by the central limit theorem; NaN left out.

    >>> [round(float(v), 3) for v in interval(np.array([1.0, 2.0, 3.0, 4.0]))]
    [2.5, 1.235, 3.765]
    """
    x = x[~np.isnan(x)]
    half = 1.96 * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    mean = x.mean() if len(x) else math.nan
    return mean, mean - half, mean + half


def evaluate(model: Any, tokenizer: Any, who: str, prompts: list[dict], reward: Any, gold: Any, stop_ids: list[int],
             args: Any) -> dict[str, Any]:  # fmt: skip
    """One response per held-out prompt in the role `who`: arrays over prompts (gold, score, ...), texts, rollout."""
    names = list(range(len(prompts)))
    rollout = roll_out(model, tokenizer, prompts, names, 1, stop_ids, args, (args.seed, 1, 0), who)
    logprobs, entropy = role_logprobs(model, who, rollout, args.temperature)
    ref_logprobs, _ = role_logprobs(model, "reference", rollout, args.temperature)
    lengths = rollout.mask.sum(1)
    kl, entropy = ((x * rollout.mask).sum(1) for x in (logprobs - ref_logprobs, entropy))
    result = {"kl": kl, "length": lengths, "entropy": entropy / lengths, "ended": rollout.ended}
    if reward is not None:
        result["score"] = score_responses(rollout, reward, args)
    arrays: dict[str, Any] = {name: value.double().cpu().numpy() for name, value in result.items()}
    if gold is not None:
        arrays["gold"] = call_function(gold, str(args.gold_fn), prompts, rollout.texts)
    return {**arrays, "texts": rollout.texts, "rollout": rollout}


def closing_table(before: dict, after: dict, stage: str, seconds: float) -> str:
    """Reference and policy on the same held-out prompts: means with 95 % intervals, win-rate (a tie counts half)."""
    rows = [("gold utility", "gold"), ("score (proxy)", "score"), ("KL to reference, nats", "kl"),
            ("length, tokens", "length"), ("entropy, nats/token", "entropy"), ("share ended", "ended")]  # fmt: skip
    lines = [f"{'held-out prompts: ' + str(len(before['texts'])):28}{'SFT (reference)':>30}{stage + ' (policy)':>30}"]
    for label, key in rows:
        if key in before:
            cells = [f"{m:.3f} [{low:.3f}, {high:.3f}]" for m, low, high in (interval(x[key]) for x in (before, after))]
            lines.append(f"{label:28}{cells[0]:>30}{cells[1]:>30}")
    for key in [key for key in ("gold", "score") if key in before][:1]:
        m, low, high = interval(np.sign(after[key] - before[key]) / 2 + 0.5)
        lines.append(f"{key + ' win-rate over SFT':28}{'':26}{f'{m:.3f} [{low:.3f}, {high:.3f}]':>30}")
    return "\n".join([*lines, f"{'wall time, s':28}{'':26}{seconds:>26.0f}"])


def write_samples(folder: Path, prompts: list[dict], results: dict[str, dict]) -> None:
    """samples.jsonl: held-out responses by model, in the format of eval/, with score and gold utility."""
    lines = []
    for name, result in results.items():
        for i, (p, text) in enumerate(zip(prompts, result["texts"], strict=True)):
            row = {"id": p["columns"].get("id", i), "prompt": p["prompt"], "response": text, "model": name}
            row |= {"finish_reason": "stop" if result["ended"][i] else "length", "tokens": int(result["length"][i])}
            known = [key for key in ("score", "gold") if key in result and result[key][i] == result[key][i]]
            row |= {key: round(float(result[key][i]), 4) for key in known}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_file(folder / "samples.jsonl", lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))


def judge_policy(
    model: Any, tokenizer: Any, who: str, prompts: list[dict], rewards: list[Reward], gold: Any, stop_ids: list[int],
    args: Any,
) -> dict[str, Any]:  # fmt: skip
    """`evaluate`, and each reward by name and their weighted total as the score."""
    result = evaluate(model, tokenizer, who, prompts, None, gold, stop_ids, args)
    table = reward_table(result["rollout"], rewards, args)
    columns = {f"reward {reward.name}": column for reward, column in zip(rewards, table.T, strict=True)}
    columns["score"] = total_rewards(table, [reward.weight for reward in rewards])
    return {**result, **{name: column.double().cpu().numpy() for name, column in columns.items()}}


def table_with_rewards(before: dict, after: dict, seconds: float) -> str:
    """The closing table, with each reward by name on top: reference and policy, means with 95 % intervals."""
    head, *lines = closing_table(before, after, "GRPO", seconds).splitlines()
    named = []
    for key in [key for key in before if key.startswith("reward ")]:
        cells = [f"{m:.3f} [{low:.3f}, {high:.3f}]" for m, low, high in (interval(x[key]) for x in (before, after))]
        named.append(f"{key:28}{cells[0]:>30}{cells[1]:>30}")
    return "\n".join([head, *named, *lines])


def batch_means(
    rollout: Rollout, scores: Tensor, log_ratio: Tensor | None, gold: np.ndarray | None, accelerator: Accelerator
) -> dict[str, float]:
    """Means over the whole batch: score, gold utility, KL(pi_old, pi_ref) in nats, length in tokens, eos_rate.

    `log_ratio` (B, T), log pi_old - log pi_ref; None where the reference is not known.
    """
    kl = 0.0 if log_ratio is None else (log_ratio * rollout.mask).sum()
    judged = gold[~np.isnan(gold)] if gold is not None else np.zeros(0)
    sums = [scores.nansum(), (~scores.isnan()).sum(), judged.sum(), len(judged)]
    sums += [len(scores), kl, rollout.mask.sum(), rollout.ended.sum()]
    score, n_known, utility, n_judged, n, *totals = global_sums(accelerator, *(float(x) for x in sums))
    means = ({"score": score / n_known} if n_known else {}) | ({"gold": utility / n_judged} if n_judged else {})
    means |= dict(zip(("kl", "response_length", "eos_rate"), (x / n for x in totals), strict=True))
    return {name: value for name, value in means.items() if name != "kl" or log_ratio is not None}


def settle_method(args: Args, world: int) -> None:
    """Flags that were not given take the method's values; contradicting or impossible flags, each as one line."""
    for name, value in METHODS[args.method]._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not (args.rewards or args.reward_fn or args.reward_model):
        if args.dataset != Args.dataset:
            raise UserError("what is a good response? Give --reward_fn, --reward_model or --rewards")
        args.reward_fn = f"{TINY / 'facts.py'}:right"
    if args.rewards and (args.reward_fn or args.reward_model):
        raise UserError("--rewards lists all rewards; put --reward_fn and --reward_model there too")
    if args.reward_fn and args.reward_model:
        raise UserError("--reward_fn and --reward_model are both given; name both in --rewards, with weights")
    positive = "batch_size micro_batch_size sample_batch_size epochs temperature mu max_response_length"
    for name in positive.split():
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    for name in "tokens_per_micro_batch max_refills sync_ref_every clip_low clip_high kl_coef".split():
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: must not be below 0")
    if not 0 <= (args.overlong_buffer or 0) <= 1:
        raise UserError(f"--overlong_buffer {args.overlong_buffer}: a share of --max_response_length, from 0 to 1")
    if args.sync_ref_every and args.kl == "none":
        raise UserError(f"--sync_ref_every: --method {args.method} has no reference unless --kl k1, k2 or k3 is given")
    if args.max_refills and args.advantage in ("batch_mean", "whiten", "greedy"):
        raise UserError(f"--max_refills: to --advantage {args.advantage} a group of equal rewards is a signal")
    if args.lora_r == 0:
        raise UserError("--lora_r 0: RL trains LoRA adapters only; use a rank of at least 1")
    g = args.samples_per_prompt
    if g < (1 if args.advantage in ("batch_mean", "whiten", "greedy") else 2) or args.batch_size % (g * world):
        raise UserError(
            f"--batch_size {args.batch_size}: no multiple of --samples_per_prompt {g} (group methods: at least 2) x "
            f"{world} processes"
        )


def load_group_roles(args: Args, device: Any) -> tuple[Any, Any, list[int], list[Reward], str]:
    """(model, tokenizer, stop ids, rewards, base): one base with the adapters of all roles."""
    model, tokenizer, stop_ids, adapter, base = load_model(args, device)
    model = add_adapter(model, "policy", adapter, args)
    if adapter:
        warn_failed_gates(adapter)
    if adapter or args.sync_ref_every:  # a bare base that stays the reference is the model with the adapters off
        add_adapter(model, "reference", adapter, args)
    return model, tokenizer, stop_ids, load_rewards(args, model, base, tokenizer, device), base


def load_prompts(args: Args, tokenizer: Any) -> tuple[list[dict], list[dict]]:
    """(training, held-out) prompts."""

    def encode(row: dict) -> list[dict]:
        return encode_rl(row, tokenizer, args.max_prompt_length)

    prompts = encode_rows(args.dataset, args.dataset_split, [("prompt",)], encode)
    heldout = args.eval_dataset or (str(TINY / "prompts_eval.jsonl") if args.dataset == Args.dataset else None)
    if heldout is None and not args.eval_size:
        raise UserError("--eval_size 0: RL is judged on held-out prompts; hold some out or give --eval_dataset")
    if heldout is None:
        return hold_out(prompts, args.eval_size, args.seed)
    return prompts, encode_rows(heldout, args.dataset_split, [("prompt",)], encode)


def main(args: Args) -> None:
    """GRPO and its family (grpo.py)."""
    began = time.time()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=args.report_to)
    device, world = accelerator.device, accelerator.num_processes
    torch.manual_seed(args.seed)
    settle_method(args, world)
    args.gold_fn = args.gold_fn or (f"{TINY / 'annotator.py'}:gold" if args.dataset == Args.dataset else None)

    # Roles, data, optimiser, run folder
    model, tokenizer, stop_ids, rewards, base = load_group_roles(args, device)
    prompts, heldout = load_prompts(args, tokenizer)
    gold = load_function(args.gold_fn) if args.gold_fn else None
    g, n_prompts = args.samples_per_prompt, args.batch_size // args.samples_per_prompt
    total_steps = math.ceil(args.epochs * len(prompts) / n_prompts)
    total_steps = min(total_steps, args.max_steps) if args.max_steps else total_steps
    print(
        f"grpo: {len(prompts)} prompts, {len(heldout)} held out; {total_steps} steps of {n_prompts} x {g} responses; "
        f"{args.quant}, {args.dtype}, {device.type} x {world}; one base, adapters {', '.join(model.peft_config)}\n"
        f"grpo: --method {args.method}: "
        + ", ".join(f"{name} {getattr(args, name)}" for name in Method._fields)
        + f"; rewards {', '.join(f'{reward.weight:g} x {reward.name}' for reward in rewards)}"
    )
    parameters = adapter_parameters(model, "policy")
    optimizer = make_optimizer(parameters, args.weight_decay, device)
    reference = adapter_parameters(model, "reference") if args.sync_ref_every else []
    start_reference = [p.detach().clone() for p in reference]
    first_step, gates = 0, []
    folder, state = open_run(args, "grpo", accelerator)
    accelerator.init_trackers("grpo", config={k: str(v) for k, v in asdict(args).items()})
    before = judge_policy(model, tokenizer, "reference", heldout, rewards, gold, stop_ids, args)
    after: dict = {}
    if state is not None:
        first_step, gates = state["step"], [tuple(gate) for gate in state["gates"]]
        for p, saved in zip([*parameters, *reference], state["parameters"], strict=True):
            p.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])

    for step in range(first_step, total_steps):
        start = time.time()

        # 1. Rollout: G responses y ~ pi_old(.|x) to each prompt, and their rewards; groups without signal refilled
        rollout, table, refilled = collect(model, tokenizer, prompts, rewards, step, accelerator, stop_ids, args)
        if step == first_step:
            print(f"rows: {tokens_saved(rollout):.0%} fewer tokens than with one padded row per response")
        scores, sampled = penalised_rewards(table, rollout, rewards, args), time.time()
        (n_known,) = global_sums(accelerator, (~scores.isnan()).sum().item())
        if not n_known:
            raise UserError(f"{', '.join(reward.source for reward in rewards)} returned None for every response")

        # 2. log pi_ref, if the KL penalty needs it; log pi_old, if it is part of the reward: the update computes it too
        old_logprobs = ref_logprobs = None
        if args.kl != "none" or step == 0:
            ref_logprobs, _ = role_logprobs(model, "reference", rollout, args.temperature)
        if args.kl == "k1" or step == 0:
            old_logprobs, _ = role_logprobs(model, "policy", rollout, args.temperature)
        if step == 0:
            assert old_logprobs is not None and ref_logprobs is not None
            gates = preflight(model, rollout, old_logprobs, ref_logprobs, args)

        # 3. Advantages: each response against its group, the batch or the greedy response
        returns = scores[:, None].expand(rollout.mask.shape)
        if args.kl == "k1" and old_logprobs is not None and ref_logprobs is not None:
            returns = rewards_to_go(scores, old_logprobs, ref_logprobs, rollout.mask, args.kl_coef)
        baseline = None
        if args.advantage == "greedy":
            baseline = greedy_rewards(model, tokenizer, rollout, rewards, stop_ids, args)
        mask = rollout.mask * rollout.ended.long()[:, None] if args.mask_truncated else rollout.mask
        advantages = response_advantages(returns, mask, baseline, partial(accelerator.reduce, reduction="sum"), args)
        scored = time.time()

        # 4. mu updates, each on the whole batch
        learning_rate = learning_rate_at(step, total_steps, args.learning_rate, args.warmup_ratio)
        (n_tokens,) = global_sums(accelerator, mask.sum().item())
        updates: list[list[float]] = []
        for _ in range(args.mu):
            logprobs, sums = group_backward(
                model, rollout, mask, old_logprobs, ref_logprobs, advantages, max(n_tokens, 1.0), args
            )
            old_logprobs = logprobs if old_logprobs is None else old_logprobs
            norm = update(optimizer, learning_rate, args.max_grad_norm, accelerator)
            updates.append([*global_sums(accelerator, *sums), norm])
        if args.sync_ref_every and (step + 1) % args.sync_ref_every == 0:
            copy_adapter(model, "policy", "reference")
        seconds = time.time() - start

        # 5. Log, evaluate, save
        golds = call_function(gold, str(args.gold_fn), rollout.prompts, rollout.texts) if gold else None
        total = total_rewards(table, [reward.weight for reward in rewards])
        flat, n_refilled = global_sums(accelerator, flat_groups(total, g).sum().item(), refilled)
        assert old_logprobs is not None
        log_ratio = old_logprobs - ref_logprobs if ref_logprobs is not None and args.kl != "none" else None
        means = batch_means(rollout, total, log_ratio, golds, accelerator)
        names = ("policy_loss", "clip_fraction", "approx_kl", "entropy", "grad_norm")
        metrics = {
            "step": step, **means, **reward_metrics(table, rewards, g, accelerator), "flat": flat / n_prompts,
            "refilled": int(n_refilled), **dict(zip(names, np.mean(updates, axis=0).tolist(), strict=True)),
            "learning_rate": learning_rate, "tokens_saved": tokens_saved(rollout),
        }  # fmt: skip
        if step + 1 == total_steps or (args.eval_every and (step + 1) % args.eval_every == 0):
            with holding(reference, start_reference):
                after = judge_policy(model, tokenizer, "policy", heldout, rewards, gold, stop_ids, args)
            metrics |= {f"heldout_{n}": interval(after[n])[0] for n in ("score", "gold", "kl") if n in after}
        timing = {"seconds": seconds, "rollout_seconds": sampled - start, "reference_seconds": scored - sampled,
                  "tokens_per_second": means["response_length"] * args.batch_size / seconds,
                  "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0}  # fmt: skip
        log_step(folder, metrics, timing, accelerator)
        if accelerator.is_main_process:
            bar = "#" * round(20 * (step + 1) / total_steps)
            shown = [
                f"{n} {metrics[n]:.2f}" for n in ("score", "gold", "kl", "response_length", "flat") if n in metrics
            ]
            print(f"[{bar:20}] {step + 1}/{total_steps} | {' | '.join(shown)} | {seconds:.1f} s", flush=True)
        if args.save_every and (step + 1) % args.save_every == 0 and accelerator.is_main_process:
            values = [p.detach().cpu() for p in [*parameters, *reference]]
            saved = {"step": step + 1, "gates": gates, "parameters": values, "optimizer": optimizer.state_dict()}
            save_checkpoint(folder, saved)

    # Result: the policy's adapter, held-out responses of both, the table, gates
    if not after:
        with holding(reference, start_reference):
            after = judge_policy(model, tokenizer, "policy", heldout, rewards, gold, stop_ids, args)
    if not accelerator.is_main_process:
        return
    save_adapter(folder, model, "policy", base, tokenizer)
    write_samples(folder, heldout, {"sft": before, "grpo": after})
    for i in range(min(3, len(heldout))):
        print(f"\nprompt  {heldout[i]['prompt']}\nbefore  {before['texts'][i]}\nafter   {after['texts'][i]}")
    print(f"\n{table_with_rewards(before, after, time.time() - began)}")
    for name in [name for name in ("score", "gold") if name in after]:
        low = interval(after[name] - before[name])[1]
        gates.append((f"{name}_low", low, 0.0, bool(low > 0)))
    write_report(folder, "grpo", base_identity(base), gates)
    plot_curves(folder, ["score", "gold", "kl", "entropy", "response_length", "flat"])
    accelerator.end_training()
    print(f"grpo: wrote {folder}")


if __name__ == "__main__":
    run_cli(main, Args)
