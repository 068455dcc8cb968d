# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "bitsandbytes==0.50.2", "peft==0.21.2",
#     "accelerate==1.15.0", "safetensors", "numpy", "matplotlib", "tqdm"]
# ///
"""GRPO and its family: RL without a critic, from reward models, reward functions and verifiable answers.

What PPO's critic estimates, the worth of a prompt before the response, is read off other responses to the same prompt
(Shao et al. 2024, DeepSeekMath, section 4.1). Each step:

    1. sample G responses y ~ pi_old(.|x) to each prompt x; groups without signal may be refilled with new prompts
    2. reward them: R = sum of weighted rewards, less penalties; log pi_ref and log pi_old where the method needs them
    3. advantages A: R, with --kl k1 less kl_coef (log pi_old - log pi_ref), against the group's other responses, the
       batch, or a greedy response; or pairs: the best of each group is preferred to the worst
    4. mu updates of the policy on the whole batch, with ratio = pi_theta / pi_old:
         minimise  - aggregate over tokens of  min(ratio A, clip(ratio, 1 - low, 1 + high) A)  + kl_coef KL(pi, pi_ref)
       or, on pairs, a loss of h = log pi_theta(y|x) - log pi_ref(y|x) of the better (w) and the worse (l) response

`--method` names a published combination of advantage, aggregation, ratio, clip and KL, METHODS below, and any flag of
its own overrides its part of it; or a loss of pairs:

    online_dpo     -log sigma(beta (h_w - h_l))
    online_ipo     (h_w / |y_w| - h_l / |y_l| - 1 / (2 beta))^2
    sppo           (h - (P - 1/2) / beta)^2 of both; P: how probably y beats the others

    python grpo.py                                       # the embedded world in tiny/: right answers, two minutes
    python grpo.py --method rloo --reward_model tiny/reward                               # the same, a reward model
    python grpo.py --model runs/sft --dataset gsm8k.jsonl --reward_fn rewards/math.py:numeric
    python grpo.py --rewards rewards/math.py:numeric rewards/text.py:repetition=0.1 runs/reward=0.2 ...

Data (hub id, or local .jsonl, .json, .csv, .parquet, folder): `prompt` (string or message list), any columns a reward
function wants. A reward function: f(prompts, responses, **columns) -> list[float | None]; None: this reward leaves the
response out.

Writes runs/grpo/: the policy's adapter in PEFT's format, tokenizer, generation_config.json, args.json, metrics.jsonl,
timing.jsonl, samples.jsonl (some rollouts; held-out responses of both models), curves.png, result.json, checkpoint.pt.
"""

import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import runpy
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset, load_dataset, load_from_disk
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    HfArgumentParser,
)
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TINY = Path(__file__).resolve().parent / "tiny"
TINY_SETTINGS: dict[str, Any] = {  # for its 0.9 M parameters: used where --dataset lies in tiny/ and no flag is given
    "learning_rate": 1e-3, "epochs": 2.5, "tokens_per_batch": 512, "quant": "none", "dtype": "float32",
    "max_response_length": 64,
}  # fmt: skip

Advantage = Literal["group_norm", "group_mean", "leave_one_out", "batch_mean", "whiten", "greedy"]
Aggregation = Literal["response", "token", "constant"]
Ratio = Literal["token", "sequence", "product"]
Surrogate = Literal["clip", "cispo"]
Penalty = Literal["none", "k1", "k2", "k3"]


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
PAIR_METHODS = {"online_dpo": 0.1, "online_ipo": 0.5, "sppo": 0.1}  # and beta: Guo, Calandriello, Wu et al. 2024


def arg(default: Any, help: str) -> Any:
    """One dataclass field = one command-line flag with its --help text."""
    return field(default=default, metadata={"help": help.replace("%", "%%")})


@dataclass
class Args:
    # roles
    model: str = arg(str(TINY / "sft"), "base model or run folder: hub id or local path")
    reward_model: str | None = arg(None, "run folder of reward.py, or model with one score; ppo's default: tiny/reward")
    reward_fn: str | None = arg(None, "file.py:function that scores responses instead of a reward model")
    rewards: list[str] | None = arg(None, "several rewards, each SOURCE[=WEIGHT]: file.py:function or a reward model")
    gold_fn: str | None = arg(None, "file.py:function that judges, never trains; default: tiny's annotator on its data")
    quant: Literal["auto", "nf4", "none"] = arg("auto", "4-bit base; auto: as the run folder says, else nf4 on a GPU")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "auto: bfloat16 on a GPU or with nf4, else float32")
    revision: str | None = arg(None, "branch, tag or commit of a hub model")
    trust_remote_code: bool = arg(False, "run model code that comes with a hub model")
    chat_template: str | None = arg(None, "plain, text (no markup) or a Jinja file; default: the tokenizer's own")
    template_kwargs: str | None = arg(None, 'variables of the chat template, as JSON: {"enable_thinking": false}')
    lora_r: int | None = arg(None, "LoRA rank; default: the loaded adapter's, else 16; 0 trains all weights (sft only)")
    lora_alpha: float | None = arg(None, "LoRA scale numerator; default: the loaded adapter's, else 2 * rank")
    lora_target_modules: list[str] | None = arg(None, "layers with LoRA; default: the adapter's, else all linear")
    gradient_checkpointing: bool | None = arg(None, "recompute activations in backward; default: on a GPU")
    # data
    dataset: str = arg(str(TINY / "prompts.jsonl"), "training data: hub id, folder, .jsonl .json .csv .parquet")
    dataset_split: str = arg("train", "split of a hub dataset")
    dataset_config: str | None = arg(None, "configuration of a hub dataset that has several")
    columns: str | None = arg(None, "columns that have other names: prompt=question,completion=answer")
    eval_dataset: str | None = arg(None, "held-out data; default: --eval_size of the training data, split by prompt")
    eval_size: float = arg(0.05, "held-out share (below 1) or number of prompts where no --eval_dataset is given")
    max_prompt_length: int = arg(512, "longer prompts are dropped and counted, never cut (tokens)")
    max_response_length: int = arg(512, "longest response (tokens)")
    # rollout
    samples_per_prompt: int = arg(8, "responses per prompt; the prompt is computed once for all of them")
    temperature: float = arg(1.0, "of sampling and of every log-prob; no top-k or top-p, which would bias the ratio")
    sample_batch_size: int = arg(128, "responses decoded at once: memory, not the result")
    max_refills: int | None = arg(None, "rounds in which new prompts replace groups of equal rewards (DAPO)")
    # reward
    missing_eos_penalty: float = arg(0.0, "subtracted from the score of a response that did not end")
    overlong_buffer: float | None = arg(None, "last share of the length in which a penalty rises from 0 to 1 (DAPO)")
    mask_truncated: bool = arg(False, "responses that did not end are left out of the loss (DAPO's overlong filtering)")
    # method
    method: Literal[*METHODS, *PAIR_METHODS] = arg(  # type: ignore[valid-type]
        "grpo", "sets the flags below that are not given, see METHODS"
    )
    advantage: Advantage | None = arg(None, "what a reward is compared with; whiten: over the batch's tokens")
    aggregation: Aggregation | None = arg(None, "mean of responses' means; of tokens; sum / (B * max_response_length)")
    ratio: Ratio | None = arg(None, "pi / pi_old: of a token; a response's geometric mean over tokens, or product")
    surrogate: Surrogate | None = arg(None, "min of plain and clipped ratio; cispo: the clipped ratio is a weight")
    clip_low: float | None = arg(None, "the ratio is clipped to at least 1 - this")
    clip_high: float | None = arg(None, "the ratio is clipped to at most 1 + this")
    kl: Penalty | None = arg(None, "penalty: k1 in the reward, k2 or importance-corrected k3 in the loss")
    kl_coef: float = arg(0.04, "weight of the KL penalty towards the reference")
    beta: float | None = arg(None, "reward per nat of log-ratio (ipo: tau, orpo: lambda); default: the loss's own")
    entropy_coef: float = arg(0.0, "weight of the entropy bonus")
    mu: int = arg(1, "updates on each rollout, all of it every time; 1: every ratio is 1, so clipping has no effect")
    sync_ref_every: int = arg(0, "the reference becomes the policy every so many steps; 0: never")
    # optimisation
    learning_rate: float = arg(2e-5, "peak learning rate: linear warm-up, then a cosine down to a tenth")
    warmup_ratio: float = arg(0.05, "share of the steps with rising learning rate")
    weight_decay: float = arg(0.0, "AdamW weight decay")
    max_grad_norm: float = arg(1.0, "gradients longer than this are scaled down to it")
    batch_size: int = arg(128, "per step: examples; reward, dpo: prompts with their responses; RL: responses")
    tokens_per_batch: int | None = arg(None, "tokens per flat row: memory, speed; default: 512, 4096 on a GPU")
    epochs: float = arg(1.0, "passes over the dataset")
    max_steps: int = arg(0, "stop after this many steps; 0: no limit; the smaller bound wins")
    # run
    output_dir: str = arg("runs/grpo", "run folder; an existing one is renamed unless --resume")
    seed: int = arg(0, "decides everything on CPU")
    eval_every: int = arg(0, "steps between evaluations on held-out data; 0: at the end only")
    save_every: int = arg(10, "steps between checkpoints; Ctrl-C and the last step write one too")
    resume: bool = arg(False, "go on from the checkpoint in --output_dir; --max_steps and --epochs may have grown")
    report_to: list[str] | None = arg(None, "trackers that accelerate knows: wandb, tensorboard, trackio, ...")


# ------------------------------------------------------------------------------------------------------- the maths
# B responses, T response tokens; mask (B, T): 1 = a real token of the response (its end token included).
# P prompts with G responses each: B = P * G in that order. A reward that nobody knows is NaN: the response gets
# advantage 0 and has no part in any baseline.
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


# --------------------------------------------------------------------------------------------------- the algorithm
def main(args: Any) -> None:
    """GRPO and its family (grpo.py)."""
    run = Run(args, "grpo", ("score", "gold", "kl", "entropy", "response_length", "equal_rewards"))
    settle_method(args, run.world)  # gives every flag of the method its value
    g, n_prompts = args.samples_per_prompt, args.batch_size // args.samples_per_prompt
    pairwise = args.method in PAIR_METHODS
    has_reference = pairwise or args.kl != "none"  # in rewards or loss

    # Roles, rewards, data, optimiser
    model, tokenizer, stop_ids, adapter = load_model(args, run.device)
    one_row = not pairwise or model.config.model_type in FLAT_ROW_MODELS
    check(one_row, f"--method {args.method}: pairs need one row, {model.config.model_type} can't share any")
    model = add_adapter(model, "policy", adapter, args)
    if adapter or args.sync_ref_every:  # a bare base that stays the reference is the model with the adapters off
        add_adapter(model, "reference", adapter, args)
    rewards = load_rewards(model, tokenizer, args)
    tiny = Path(args.dataset).resolve().parent == TINY
    args.gold_fn = args.gold_fn or (f"{TINY / 'annotator.py'}:gold" if tiny else None)
    gold = load_function(args.gold_fn) if args.gold_fn else None
    prompts, questions = load_prompts(model, tokenizer, run)
    lm = model, tokenizer, stop_ids
    weights = [p for name, p in model.named_parameters() if ".policy." in name]
    reference = [p for name, p in model.named_parameters() if ".reference." in name and args.sync_ref_every]
    optimizer = make_optimizer(weights, args)
    total_steps = math.ceil(args.epochs * len(prompts) / n_prompts)
    total_steps = min(total_steps, args.max_steps or total_steps)
    scored = partial(score_by_name, rewards=rewards, args=args)
    judge = partial(evaluate, lm, questions, scored, gold, args)
    before, after = judge("reference"), {}

    for step in run.steps(total_steps, weights + reference, [optimizer]):
        start = time.time()

        # 1. Rollout: G responses y ~ pi_old(.|x) to each prompt, and their rewards; groups without signal refilled
        rollout, table, n_refilled = collect(lm, prompts, rewards, run)
        mask, rows, sampled = rollout.mask, rollout.rows(), time.time()

        # 2. Total rewards; log pi_ref where it is needed; log pi_old where rewards need it, else the update has it too
        scores = penalised(total_rewards(table, rewards), rollout, args)
        known = run.total((~scores.isnan()).sum().item())[0]
        check(known, f"{', '.join(reward.name for reward in rewards)} returned None for every response")
        old_logprobs, ref_logprobs = rollout.sampler_logprobs.clone(), torch.zeros_like(rollout.sampler_logprobs)
        if has_reference or step == 0:
            ref_logprobs, _ = role_logprobs(model, "reference", rows, mask, args)
        knows_old = args.kl == "k1" or step == 0
        if knows_old:
            old_logprobs, _ = role_logprobs(model, "policy", rows, mask, args)
        if step == 0:
            preflight(model, rollout, old_logprobs, ref_logprobs, args)

        # 3. Advantages: each response against its group, the batch or the greedy response; or pairs of responses
        mask = mask * rollout.ended.long()[:, None] if args.mask_truncated else mask
        if pairwise:
            scores = scores.masked_fill(mask.sum(1) == 0, torch.nan)  # left out by --mask_truncated
            pairs, wins = rank_pairs(scores, g), win_probabilities(scores, g)
            mask = mask * torch.isin(torch.arange(len(mask), device=run.device), pairs)[:, None]
            ids = [p["ids"] for p in rollout.prompts]
            rows = flat_rows(pairs.sort().values.tolist(), ids, rollout.responses, model, args.tokens_per_batch)
            n_pairs = max(1.0, run.total(len(pairs))[0])
        else:
            returns, baseline = scores[:, None].expand(mask.shape), None
            if args.kl == "k1":
                returns = rewards_to_go(scores, old_logprobs, ref_logprobs, rollout.mask, args.kl_coef)
            if args.advantage == "greedy":
                baseline = greedy_rewards(lm, rollout, rewards, args)
            add_up = partial(run.processes.reduce, reduction="sum")
            advantages = response_advantages(returns, mask, baseline, add_up, args)
        seconds = {"rollout_seconds": sampled - start, "score_seconds": time.time() - sampled}

        # 4. mu updates of the policy, each on the whole batch
        learning_rate = learning_rate_at(step, total_steps, args.learning_rate, args.warmup_ratio)
        n_tokens = max(1.0, run.total(mask.sum().item())[0])
        updates, empty = [], torch.zeros_like(ref_logprobs)
        for update in range(args.mu):
            sums = torch.zeros(4, device=run.device)
            with role(model, "policy", grad=True):
                for row in rows:
                    found = token_logprobs(model, row, args.temperature, args.entropy_coef != 0)
                    logprobs, entropy = (empty.index_put(row.at, x)[row.numbers] for x in found)  # (k, T)
                    if update == 0 and not (knows_old or pairwise):
                        old_logprobs[row.numbers] = logprobs.detach()
                    kept, old, ref = (x[row.numbers] for x in (mask, old_logprobs, ref_logprobs))
                    if pairwise:
                        h = ((logprobs - ref) * kept).sum(1)
                        terms = pair_terms(h, kept.sum(1), row.numbers, wins, pairs, args)
                        loss, share = (x / n_pairs for x in terms)  # share: of pairs in the right order
                    else:
                        losses = token_losses(logprobs, old, ref, advantages[row.numbers], kept, args)
                        how = args.aggregation, args.batch_size, n_tokens, args.max_response_length
                        loss = (losses * token_weights(kept, *how)).sum()
                        ratio = importance_ratio(logprobs, old, kept, args.ratio)
                        outside = (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)
                        share = (outside * kept).sum() / n_tokens  # of ratios out of range
                    loss = loss - args.entropy_coef * (entropy * kept).sum() / n_tokens
                    loss.backward()
                    per_token = [(x * kept).sum() / n_tokens for x in (old_new_kl(logprobs, old), entropy)]
                    sums += torch.stack([loss, share, *per_token]).detach()
            norm = run.clip_gradients(optimizer, learning_rate)
            optimizer.step()
            optimizer.zero_grad()
            updates.append([*run.total(*sums.tolist()), norm])
        if args.sync_ref_every and (step + 1) % args.sync_ref_every == 0:
            for p, new in zip(reference, weights, strict=True):
                p.data.copy_(new.data)
        seconds["seconds"] = time.time() - start

        # 5. Log, evaluate
        total = total_rewards(table, rewards)
        columns = {"score": total, "equal_rewards": equal_groups(total, g)}
        columns |= {"response_length": rollout.mask.sum(1), "eos_rate": rollout.ended}
        columns |= {"kl": (old_logprobs - ref_logprobs).sum(1)} if has_reference else {}
        columns |= {"gold": torch.from_numpy(call_function(gold, rollout.prompts, rollout.texts))} if gold else {}
        means = batch_means(run, columns)
        names = ("policy_loss", "accuracy" if pairwise else "clip_fraction", "approx_kl", "entropy", "grad_norm")
        metrics = {"step": step, **means, **dict(zip(names, np.mean(updates, axis=0).tolist(), strict=True))}
        metrics |= reward_means(run, rewards, table, g)
        metrics |= {"refilled": int(run.total(n_refilled)[0]), "learning_rate": learning_rate}
        if run.evaluates(step):
            after = judge("policy")
            metrics |= {f"heldout_{k}": interval(after[k])[0] for k in ("score", "gold", "kl") if k in after}
        if step % 10 == 0:
            shown = {**columns, "texts": rollout.texts, "length": columns["response_length"], "ended": rollout.ended}
            some = sample_rows(rollout.prompts, shown, f"rollout {step}", step)[:: max(1, len(mask) // 4)]
            run.add("samples.jsonl", some[:4])
        seconds["tokens_per_second"] = means["response_length"] * args.batch_size / seconds["seconds"]
        run.log(metrics, seconds)

    run.finish(model, "policy", tokenizer, stop_ids, report(run, questions, before, after or judge("policy")))


# =================================================================================================================
# The rest: maths that other scripts have above this line, the other methods, and plumbing in the order in which main
# calls it: run folder, method, roles, data, rows, sampler, scoring.
# =================================================================================================================
# ------------------------------------------------------------------------------------------------------ more maths
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


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, label_smoothing: float) -> Tensor:
    """Scores (P,), (P,), margin (P,) -> (P,): -(1 - e) log sigma(d) - e log sigma(-d), d = chosen - rejected - margin.

    InstructGPT (2022) eq. 1; the margin is Llama 2's (2023, eq. 2). -log sigma(-d) = -log sigma(d) + d, hence the code.

    >>> bradley_terry_loss(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]), 0.1)
    tensor([0.6931, 0.6931])
    >>> bradley_terry_loss(torch.tensor([100.0]), torch.tensor([0.0]), torch.tensor([0.0]), 0.1)  # e * d
    tensor([10.])
    """
    d = chosen - rejected - margin
    return softplus(-d) + label_smoothing * d


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """sigmoid: -(1 - e) log sigma(d) - e log sigma(-d), d = beta (chosen - rejected).

    Rafailov et al. 2023 (DPO), eq. 7; with e > 0 Mitchell 2023 (cDPO). It is reward.py's loss of implicit rewards.

    >>> dpo_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.0, -7.0]), 0.1, 0.0)  # log 2, log(1 + 1/e)
    tensor([0.6931, 0.3133])
    """
    return bradley_terry_loss(beta * chosen, beta * rejected, torch.zeros_like(chosen), label_smoothing)


def ipo_loss(chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor, tau: float) -> Tensor:
    """ipo: (chosen/|y_w| - rejected/|y_l| - 1/(2 tau))^2: the margin is regressed on a target and stops growing there.

    Azar et al. 2023 (IPO), eq. 17, with log-ratios per token, as TRL has it after asking the authors: tau 0.5 aims at
    one nat per token.

    >>> ipo_loss(torch.tensor([10.0]), torch.tensor([-4.0]), torch.tensor([5]), torch.tensor([2]), 0.1)  # 2 + 2 - 5
    tensor([1.])
    """
    return (chosen / chosen_length - rejected / rejected_length - 1 / (2 * tau)) ** 2


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


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); n counts independent trials.

    >>> [round(x, 2) for x in wilson_interval(0.5, 4)]  # (0.5 + 0.48 -+ 1.96 sqrt(0.0625 + 0.06)) / 1.96
    [0.15, 0.85]
    """
    z = 1.959964
    middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def chunked_logprobs(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, temperature: float, chunk_size: int,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """hidden (N, d), targets (N,) -> log softmax(logits/temperature)[target] (N,) and entropy (N,), both fp32.

    `chunk_size` tokens at a time, and each chunk again in backward, so that (N, vocabulary) never exists. The entropy
    has a gradient only where it is asked for.
    """

    def one_chunk(h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logp = logits(h).float().div_(temperature).log_softmax(-1)
        known = logp if entropy_grad else logp.detach()
        return logp.gather(-1, target[:, None]).squeeze(-1), -(known.exp() * known).sum(-1)

    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    parts = [checkpoint(one_chunk, h, target, use_reentrant=False, preserve_rng_state=False) for h, target in chunks]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


# ------------------------------------------------------------------------------------------------------- constants
HEAD_KEY = "base_model.model.score.weight"  # where AutoModelForSequenceClassification + PEFT look for a reward head
FLAT_ROW_MODELS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "gpt2", "gemma2", "gemma3_text")
SIDE_BY_SIDE_MODELS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3")  # the sampler's; without windows
ABOVE_ZERO = (  # number flags that may not be 0; none may be below
    "max_grad_norm batch_size tokens_per_batch epochs save_every max_prompt_length max_response_length temperature "
    "samples_per_prompt sample_batch_size kl_horizon ppo_epochs minibatches mu beta"
).split()
ENCODING = "max_prompt_length max_response_length last_turn_only loss columns".split()  # what changes the encoded rows
MAY_CHANGE = (  # when a run is resumed: its length, and what costs memory or time only
    "resume output_dir report_to max_steps epochs save_every eval_every tokens_per_batch sample_batch_size "
    "gradient_checkpointing"
).split()
PLAIN_TEMPLATE = (  # for models that come without a chat template: no new token is added to the vocabulary
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}\n{% else %}"
    "{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TEXT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # --chat_template text: no markup, continuation
GREEDY = 1e-4  # a temperature at which the sampler takes the most likely token


# ---------------------------------------------------------------------------------------------------- more methods
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


def overlong_penalty(lengths: Tensor, max_length: int, buffer: float) -> Tensor:
    """(B,): 0 up to max_length - buffer tokens, from there down to -1 at max_length (Yu et al. 2025, DAPO, eq. 13).

    >>> overlong_penalty(torch.tensor([70, 80, 90, 100]), max_length=100, buffer=20)
    tensor([ 0.0000,  0.0000, -0.5000, -1.0000])
    """
    return ((max_length - buffer - lengths) / buffer).clamp(-1, 0)


def cispo_loss(logprobs: Tensor, ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-sg(clip(ratio, 1 - low, 1 + high)) A log pi: every token keeps its gradient (MiniMax-M1 2025, eq. 4 and 5).

    >>> cispo_loss(torch.tensor([-1.0, -1.0]), torch.tensor([0.5, 9.0]), torch.tensor([1.0, 1.0]), 1.0, 4.0)
    tensor([0.5000, 5.0000])
    """
    return -ratio.clamp(1 - clip_low, 1 + clip_high).detach() * advantages * logprobs


def sppo_loss(log_ratio: Tensor, win_probability: Tensor, beta: float) -> Tensor:
    """sppo: (log-ratio - (p - 1/2) / beta)^2 per response (S,), p: the probability that it beats the policy's others.

    Wu et al. 2024 (self-play preference optimisation), eq. 4.7, eta = 1 / beta. Of two ranked responses, p is 1 or 0.

    >>> sppo_loss(torch.tensor([3.0, -5.0]), torch.tensor([1.0, 0.0]), 0.1)  # (3 - 5)^2, (-5 + 5)^2
    tensor([4., 0.])
    """
    return (log_ratio - (win_probability - 0.5) / beta) ** 2


def win_probabilities(rewards: Tensor, samples_per_prompt: int) -> Tensor:
    """(B,): mean of sigma(R - R') over the prompt's other responses: how probably a response beats one of them.

    >>> win_probabilities(torch.tensor([0.0, 1.0, math.nan]), 3)  # sigma(-1), sigma(1)
    tensor([0.2689, 0.7311,    nan])
    """
    groups = rewards.view(-1, samples_per_prompt)
    beats = torch.sigmoid(groups[:, :, None] - groups[:, None])
    beats.diagonal(dim1=1, dim2=2).fill_(math.nan)
    return beats.nanmean(2).flatten()


def rank_pairs(rewards: Tensor, samples_per_prompt: int) -> Tensor:
    """Pairs (P, 2): the first best and first worst response to each prompt; none where rewards are equal or unknown.

    >>> rank_pairs(torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, math.nan]), 3)
    tensor([[1, 0]])
    """
    groups = rewards.view(-1, samples_per_prompt)
    best, worst = groups.nan_to_num(-math.inf).argmax(1), groups.nan_to_num(math.inf).argmin(1)
    firsts = samples_per_prompt * torch.arange(len(groups), device=rewards.device)
    pairs = torch.stack([firsts + best, firsts + worst], 1)
    return pairs[rewards[pairs[:, 0]] > rewards[pairs[:, 1]]]


def pair_losses(log_ratio: Tensor, lengths: Tensor, wins: Tensor, pairs: Tensor, method: str, beta: float) -> Tensor:
    """Losses (P,) of pairs (P, 2), better and worse, of k responses: log_ratio (k,) of pi to pi_ref, lengths (k,) in
    tokens, wins (k,) as win_probabilities has them.

    >>> h, n, p = torch.tensor([-7.0, 3.0]), torch.tensor([2, 5]), torch.tensor([0.0, 1.0])
    >>> pair_losses(h, n, p, torch.tensor([[1, 0]]), "sppo", 0.1)  # (3 - 5)^2 + (-7 + 5)^2
    tensor([8.])
    """
    chosen, rejected = pairs.T
    h_w, h_l = log_ratio.index_select(0, chosen), log_ratio.index_select(0, rejected)
    losses: dict[str, Callable[[], Tensor]] = {
        "online_dpo": lambda: dpo_loss(h_w, h_l, beta, 0.0),
        "online_ipo": lambda: ipo_loss(h_w, h_l, lengths[chosen], lengths[rejected], beta),
        "sppo": lambda: sppo_loss(h_w, wins[chosen], beta) + sppo_loss(h_l, wins[rejected], beta),
    }
    return losses[method]()


def pair_terms(h: Tensor, lengths: Tensor, numbers: list[int], wins: Tensor, pairs: Tensor, args: Any) -> list[Tensor]:
    """Sums over those of the pairs (P, 2) that are among these k responses: of their losses, and of 1 where the better
    one has the larger h (a tie counts half); h, lengths, numbers (k,), ascending; wins (B,)."""
    places = torch.tensor(numbers, device=h.device)
    pairs = torch.searchsorted(places, pairs[torch.isin(pairs[:, 0], places)])  # a pair is in one row
    losses = pair_losses(h, lengths, wins[places], pairs, args.method, args.beta)
    margin = args.beta * (h[pairs[:, 0]] - h[pairs[:, 1]])
    return [losses.sum(), (torch.sign(margin.round(decimals=5)) / 2 + 0.5).sum()]


# -------------------------------------------------------------------------------------------- mistakes of the user
class UserError(Exception):
    """A mistake in what the user gave, printed as one line: what, where, what was expected, what to do."""


class BadRow(UserError):
    """A row that can't be used: BadRow(reason, detail); rows are counted by reason, the first detail is shown."""

    def __str__(self) -> str:
        return ": ".join(self.args)


def check(fine: Any, message: str) -> None:
    """A mistake of the user stops the run with one line."""
    if not fine:
        raise UserError(message)


def first_line(error: BaseException) -> str:
    """What a library's exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever libraries raise in this block, for files that are missing or damaged, is one line about `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {first_line(error.__cause__ or error)}") from error


def run_cli(main: Callable[[Any], None], args_class: Any) -> None:
    """Parse the command line into `args_class` and run `main`: mistakes of the user are one line, not a traceback."""
    usage = "python %(prog)s [--flag value ...]; --help lists the flags"
    parser = HfArgumentParser(args_class, description=main.__doc__, usage=usage, allow_abbrev=False)
    args = args_class(**vars(parser.parse_args()))
    if Path(args.dataset).resolve().parent == TINY:
        parser.set_defaults(**TINY_SETTINGS)
        args = args_class(**vars(parser.parse_args()))
        print(f"{parser.prog}: settings for tiny/:", *(f"--{name} {getattr(args, name)}" for name in TINY_SETTINGS))
    try:
        main(args)
    except (UserError, OSError, torch.OutOfMemoryError) as error:  # OSError: a full disk, no right to write a folder
        sys.exit(f"{parser.prog}: {first_line(error)}")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: stopped at once; --resume goes on from the last checkpoint, if there is one")


# ------------------------------------------------------------------------------------------------------ run folder
class Run:
    """A run: its processes, its steps with their checkpoints, its folder.

    Nothing is written before the first step has been done: a run that fails at once moves no good folder away.
    """

    def __init__(self, args: Any, stage: str, curves: tuple[str, ...]) -> None:
        for name, value in asdict(args).items():
            fine = not isinstance(value, int | float) or value > 0 or (value == 0 and name not in ABOVE_ZERO)
            check(fine, f"--{name} {value}: must be above 0{' or 0' * (name not in ABOVE_ZERO)}")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that an optional package is missing
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")  # calls between the two
        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(args.seed)
        self.args, self.stage, self.curves, self.folder = args, stage, curves, Path(args.output_dir)
        cpu = not torch.cuda.is_available()
        with reading(f"--report_to {' '.join(args.report_to or [])}"):
            for name in args.report_to or []:
                check(importlib.util.find_spec(name.split(".")[0]), f"--report_to {name}: not installed; install it")
            self.processes = Accelerator(cpu=cpu, log_with=args.report_to, project_dir=self.folder)
        self.device, self.rank = self.processes.device, self.processes.process_index
        self.world, self.main = self.processes.num_processes, self.processes.is_main_process
        self.began, self.step, self.data, self.interrupted, self.started = time.time(), 0, "", False, False

    def total(self, *values: float) -> list[float]:
        """The values summed over all processes, in float64."""
        return self.processes.reduce(torch.tensor(values, dtype=torch.float64, device=self.device), "sum").tolist()

    def clip_gradients(self, optimizer: Any, learning_rate: float) -> float:
        """Before optimizer.step(): set the learning rate, sum gradients over processes, scale them down to
        --max_grad_norm; -> their norm before that.

        Losses are divided by the global count before backward, so the sum over rows and processes is the mean. This
        waits for the GPU: a loss or gradient that is no number must not reach the weights.
        """
        (group,) = optimizer.param_groups
        group["lr"] = learning_rate
        for p in group["params"] if self.world > 1 else []:
            p.grad = self.processes.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")
        norm = nn.utils.clip_grad_norm_(group["params"], self.args.max_grad_norm).item()
        cause = f"lower the learning rate, here {learning_rate:.1e}, or look for NaN in the model's weights"
        check(math.isfinite(norm), f"step {self.step + 1}: the loss or its gradient is not finite ({norm}); {cause}")
        return norm

    def steps(self, total_steps: int, tensors: list, optimizers: list) -> Iterator[int]:
        """The steps to be done, after --resume those that are left; each --save_every steps, after Ctrl-C or SIGTERM
        (once more: stop at once) and at the end a checkpoint with the state of these tensors and optimizers."""
        self.total_steps, self.settings = total_steps, {**asdict(self.args), "data": self.data}
        self.first_step = self.load_checkpoint(tensors, optimizers) if self.args.resume else 0
        self.loop_began = time.time()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.interrupt)
        for step in range(self.first_step, total_steps):
            self.step, done = step, step + 1
            yield step
            stopped = self.total(self.interrupted)[0] > 0
            if self.main and (stopped or done % self.args.save_every == 0 or done == total_steps):
                states = [optimizer.state_dict() for optimizer in optimizers]
                self.save({"step": done, "tensors": tensors, "optimizers": states})
            check(not stopped, f"stopped after step {done} of {total_steps}; add --resume to go on from there")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)

    def interrupt(self, number: int, frame: Any) -> None:
        """The first signal lets the step end, the second does not."""
        self.interrupted = True
        signal.signal(number, signal.default_int_handler)
        print(f"\n{self.stage}: stopping after step {self.step + 1}; once more to stop at once", flush=True)

    def load_checkpoint(self, tensors: list, optimizers: list) -> int:
        """Put checkpoint.pt's state into tensors and optimizers, cut later lines off; -> the next step."""
        with reading(f"--resume: no checkpoint in {self.folder}; start without"):
            recorded = json.loads((self.folder / "args.json").read_text())
            state = torch.load(self.folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        changed = {k: v for k, v in self.settings.items() if recorded.get(k) != v and k not in MAY_CHANGE}
        flags = ", ".join(f"--{k} {v} (was {recorded.get(k)})" for k, v in changed.items())
        check(not changed, f"--resume: {self.folder} was started with other settings (data: rows): {flags}")
        for tensor, saved in zip(tensors, state["tensors"], strict=True):
            tensor.data.copy_(saved)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for path in self.folder.glob("*.jsonl") if self.main else []:
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # splitlines would also split at U+2028
            kept = [x + "\n" for x in lines if json.loads(x)["step"] < state["step"]]
            path.write_text("".join(kept), encoding="utf-8")
        return state["step"]

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows this step: each --eval_every, and the last."""
        return step + 1 == self.total_steps or bool(self.args.eval_every and (step + 1) % self.args.eval_every == 0)

    def save(self, state: dict) -> None:
        """checkpoint.pt, by way of a temporary name: a killed run or a full disk leaves the old one or the new one."""
        content = io.BytesIO()  # torch does not say that a disk is full; Python does
        torch.save(state, content)
        (self.folder / "checkpoint.tmp").write_bytes(content.getbuffer())
        (self.folder / "checkpoint.tmp").replace(self.folder / "checkpoint.pt")

    def add(self, name: str, rows: list[dict]) -> None:
        """More lines of a .jsonl file of the folder, which is made when there is something to write."""
        if not self.started:
            if self.main and not self.args.resume and self.folder.exists():
                older = next(p for n in range(1, 10**6) if not (p := Path(f"{self.folder}.{n}")).exists())
                print(f"{self.stage}: the existing {self.folder} is now {self.folder.rename(older)}")
            if self.main and not self.args.resume:
                self.folder.mkdir(parents=True)
                (self.folder / "args.json").write_text(json.dumps(self.settings, indent=1))
            self.processes.init_trackers(self.stage, config={k: str(v) for k, v in self.settings.items()})
            self.started = True
        lines = [json.dumps({k: v for k, v in row.items() if v == v}, ensure_ascii=False) + "\n" for row in rows]
        if self.main:  # v == v: NaN is no JSON
            with (self.folder / name).open("a", encoding="utf-8") as stream:
                stream.writelines(lines)

    def log(self, metrics: dict, timing: dict) -> None:
        """One line in metrics.jsonl (a function of the arguments alone), in timing.jsonl, on the screen; curves.png."""
        peak, done = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0, metrics["step"] + 1
        self.add("metrics.jsonl", [metrics])
        self.add("timing.jsonl", [{"step": metrics["step"], **timing, "peak_bytes": peak}])
        self.processes.log({**metrics, **timing}, step=metrics["step"])
        left = (time.time() - self.loop_began) / (done - self.first_step) * (self.total_steps - done)
        shown = [f"{k} {metrics[k]:.3f}" for k in self.curves if k in metrics]
        clock = f"{timing['seconds']:.2f} s | {tqdm.format_interval(left)} left"
        if self.main:
            print(f"{self.stage}: {done}/{self.total_steps}", *shown, clock, sep=" | ", flush=True)
        if self.main and self.evaluates(metrics["step"]) and importlib.util.find_spec("matplotlib"):
            self.plot_curves()

    def plot_curves(self) -> None:
        """curves.png: each curve of metrics.jsonl against the step."""
        import pandas
        from matplotlib import pyplot

        table = pandas.read_json(self.folder / "metrics.jsonl", lines=True).set_index("step")
        shown = table[[key for key in self.curves if key in table]]
        size = (4.2 * shown.shape[1], 3)
        shown.plot(subplots=True, layout=(1, -1), figsize=size, style=".-", title=[*shown], legend=False)
        pyplot.savefig(self.folder / "curves.png", dpi=110, bbox_inches="tight")
        pyplot.close()

    def finish(self, model: Any, name: str, tokenizer: Any, stop_ids: list[int], table: dict, head: Any = None) -> None:
        """The adapter `name` (or the whole model), all that loading and generating needs; result.json: the table."""
        if self.main:
            save_model(self.folder, model, name, tokenizer, stop_ids, head)
            versions = {package: version(package) for package in ("torch", "transformers", "peft", "bitsandbytes")}
            result = {"stage": self.stage, **table, "base": model.config._name_or_path, "versions": versions}
            result = json.loads(json.dumps(result), parse_constant=lambda name: None)  # NaN is no JSON
            (self.folder / "result.json").write_text(json.dumps(result, indent=1))
            print(*(f"{k} {v:.3f}" for k, v in table.items() if isinstance(v, float)), sep=" | ")
            print(f"{self.stage}: wrote {self.folder} in {time.time() - self.began:.0f} s")
        self.processes.end_training()


# ----------------------------------------------------------------------------------- method, model, roles, rewards
def settle_method(args: Any, world: int) -> None:
    """Flags that were not given take the method's values; contradicting or impossible flags, each as one line."""
    preset = {"beta": PAIR_METHODS.get(args.method), "max_refills": 0, "overlong_buffer": 0.0}
    preset = METHODS[args.method]._asdict() if args.method in METHODS else preset
    for name in (*Method._fields, "beta"):
        given = getattr(args, name)
        check(given is None or name in preset, f"--{name} has no part in --method {args.method}")
        setattr(args, name, preset.get(name) if given is None else given)
    if Path(args.dataset).resolve().parent == TINY and not (args.rewards or args.reward_model):
        args.reward_fn = args.reward_fn or f"{TINY / 'facts.py'}:right"
    one = sum(map(bool, (args.rewards, args.reward_fn, args.reward_model))) == 1
    choices = "Give --reward_fn, --reward_model or --rewards; of several, name all of them in --rewards, with weights"
    check(one, f"what is a good response? {choices}")
    check(args.overlong_buffer <= 1, f"--overlong_buffer {args.overlong_buffer}: a share of the length, from 0 to 1")
    needs = f"--sync_ref_every: --method {args.method} has no reference unless --kl k1, k2 or k3 is given"
    check(args.kl != "none" or not args.sync_ref_every, needs)
    alone = args.advantage in ("batch_mean", "whiten", "greedy")  # a group may be of one, or of equal rewards
    check(not (args.max_refills and alone), f"--max_refills: equal rewards are a signal to {args.advantage}")
    check(args.lora_r != 0, "--lora_r 0: RL trains LoRA adapters only; use a rank of at least 1")
    g, b = args.samples_per_prompt, args.batch_size
    check(g > 1 or alone, f"--samples_per_prompt {g}: a group of less than 2")
    check(b % (g * world) == 0, f"--batch_size {b}: no multiple of --samples_per_prompt {g} x {world} processes")
    print(f"grpo: --method {args.method}:", ", ".join(f"{name} {getattr(args, name)}" for name in preset))


def find_base(source: str) -> tuple[str, bool]:
    """(base model, whether `source` is a PEFT adapter on it); a relative path may be relative to a parent of it."""
    from peft import PeftConfig  # not before Run has silenced bitsandbytes, which it imports

    try:
        name = str(PeftConfig.from_pretrained(source).base_model_name_or_path)
    except (ValueError, OSError, TypeError):  # no adapter_config.json there
        return str(Path(source).resolve()) if Path(source).is_dir() else source, False
    paths = [Path(name), *(parent / name for parent in Path(source).resolve().parents)]
    return next((str(path.resolve()) for path in paths if (path / "config.json").is_file()), name), True


def settle_precision(args: Any, device: Any) -> None:
    """Give every flag its value that depends on the run folder or on the machine."""
    record, gpu, all_weights = Path(args.model, "args.json"), device.type == "cuda", args.lora_r == 0
    if args.quant == "auto":
        with reading(str(record)):
            recorded = json.loads(record.read_text()).get("quant") if record.is_file() else None
        args.quant = "none" if all_weights else recorded or ("nf4" if gpu else "none")
    check(not all_weights or args.quant == "none", "--lora_r 0: 4-bit weights can't be trained; give --quant none")
    if args.dtype == "auto":  # all weights: small updates would be lost in bfloat16, which old GPUs don't have either
        half = (gpu or args.quant == "nf4") and not all_weights
        args.dtype = "bfloat16" if half and (not gpu or torch.cuda.is_bf16_supported(False)) else "float32"
    args.tokens_per_batch = args.tokens_per_batch or (4096 if gpu else 512)
    args.gradient_checkpointing = gpu if args.gradient_checkpointing is None else args.gradient_checkpointing


def load_base(base: str, args: Any, device: Any, kind: Any = AutoModelForCausalLM) -> Any:
    """The model in eval mode, every dropout 0: two passes over the same tokens must agree, RL trains on their ratio."""
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, "dtype": getattr(torch, args.dtype)}
    options["revision"] = args.revision if base == args.model else None
    if args.quant == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"], llm_int8_skip_modules=["lm_head", "score"],
        )  # fmt: skip
    probe = torch.arange(8, device=device)[None]
    with reading(f"model {base}: can't be loaded and run"):
        model = kind.from_pretrained(base, device_map={"": device}, **options).eval()
        for module in [*model.modules(), model.config]:
            for name in [n for n, x in vars(module).items() if isinstance(x, float) and ("drop" in n or n == "p")]:
                setattr(module, name, 0.0)  # a dropout may be a number (OPT's, attention's, Falcon's in its config)
            if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' repacked CPU weights pass no gradient;
                module.support_avx512bf16_for_cpu = False  # the first pass would repack them
                misread = device.type == "cpu" and module.in_features % 64 in (16, 32, 48)
                check(not misread, f"model {base}: bitsandbytes misreads {module.in_features} inputs; --quant none")
        with torch.no_grad():
            logits, states = model(probe).logits, model.base_model(probe, use_cache=False).last_hidden_state
    scaled = kind is AutoModelForCausalLM and (lm_logits(model, states) - logits).norm() > 0.05 * logits.norm()
    check(not scaled, f"model {base}: {model.config.model_type} scales its logits after lm_head; not supported")
    if device.type == "cpu" and model.num_parameters() < 10**7:
        torch.set_num_threads(min(2, torch.get_num_threads()))  # more gain nothing, and lose where cores are shared
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiler = any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))  # Triton asks for one
    plain = model.config.model_type in FLAT_ROW_MODELS and model._supports_flex_attn
    if device.type == "cuda" and args.tokens_per_batch >= 2048 and compiler and plain:
        model.set_attn_implementation("flex_attention")
    sizes = {True: 0.0, False: 0.0}  # experts of MoE layers are no Linear layers: bitsandbytes leaves them as they are
    for p in model.parameters():
        sizes[type(p).__name__ == "Params4bit"] += p.numel() * p.element_size() / 2**30
    text = f"{sizes[True]:.2f} GiB in 4 bits, {sizes[False]:.2f} GiB not; {args.dtype}; rows of {args.tokens_per_batch}"
    print(f"model: {base}: {text} tokens, {model.config._attn_implementation}; {device}")
    return model


def load_tokenizer(source: str, chat_template: str | None, args: Any) -> Any:
    """Tokenizer with a chat template: `plain` where the model has none."""
    with reading(f"tokenizer {source}, --chat_template, --template_kwargs"):
        revision = args.revision if source == args.model else None
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=args.trust_remote_code)
        template = {None: tokenizer.chat_template or PLAIN_TEMPLATE, "plain": PLAIN_TEMPLATE, "text": TEXT_TEMPLATE}
        tokenizer.chat_template = template.get(chat_template) or Path(str(chat_template)).read_text(encoding="utf-8")
        for name, value in json.loads(args.template_kwargs or "{}").items():  # set in it: later stages keep it too
            setting = f"{{%- set null = none -%}}{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}"
            tokenizer.chat_template = setting + tokenizer.chat_template
    check(tokenizer.eos_token_id is not None, f"{source}: the tokenizer has no EOS token; a response could never end")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # for generate; masks come from lengths
    return tokenizer


def find_stop_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """Tokens that end a response: the tokenizer's EOS, the model's own list, and the template's end of turn."""
    eos = getattr(generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "XYZ"}]
    after = render(tokenizer, turn).rpartition("XYZ")[2].lstrip()
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}  # all_special_ids lacks some
    return sorted(ids | special.intersection(tokenizer(after, add_special_tokens=False)["input_ids"][:1]))


def load_model(args: Any, device: Any) -> tuple[Any, Any, list[int], str | None]:
    """(base model, tokenizer, stop ids, adapter or None) of --model: a base, or the run folder of an earlier stage."""
    base, is_adapter = find_base(args.model)
    given = [n for n in ("lora_r", "lora_alpha", "lora_target_modules", "revision") if getattr(args, n) is not None]
    check(not is_adapter or not given, f"--{', --'.join(given)}: {args.model} is an adapter with its own; drop it")
    settle_precision(args, device)
    own = is_adapter and (Path(args.model, "tokenizer_config.json").is_file() or not Path(args.model).is_dir())
    tokenizer = load_tokenizer(args.model if own else base, args.chat_template, args)
    model = load_base(base, args, device)
    words = model.get_input_embeddings().num_embeddings
    check(len(tokenizer) <= words, f"{args.model}: {len(tokenizer)} tokens, but an embedding of {words}: not a pair?")
    return model, tokenizer, find_stop_ids(tokenizer, model.generation_config), args.model if is_adapter else None


def add_adapter(model: Any, name: str, source: str | None, args: Any) -> Any:
    """The PEFT model with one more LoRA adapter, new or read from `source`; a reward head in `source` is left out:
    inside PEFT it would be trained, saved and switched with the adapter."""
    from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    targets, rank = args.lora_target_modules or "all-linear", args.lora_r or 16
    ends = {"lm_head", "embed_tokens", "wte", "embed_out", "score"}.intersection(targets)
    check(not ends, f"--lora_target_modules {' '.join(ends)}: embeddings and heads stay as they are")
    config = LoraConfig(r=rank, lora_alpha=args.lora_alpha or 2 * rank, target_modules=targets)
    with reading(f"adapter {source or name}"):
        if source:
            config = LoraConfig.from_pretrained(source)
        odd: Any = config.use_dora or config.bias != "none" or config.init_lora_weights not in (True, False, "gaussian")
        odd = odd or config.trainable_token_indices or config.modules_to_save not in (None, ["score"])
        check(not odd, f"{source}: no plain LoRA (DoRA, PiSSA, biases, saved modules ...); merge it into its base")
        config.modules_to_save, config.lora_dropout, config.inference_mode = None, 0.0, False
        config.task_type, config.base_model_name_or_path = "CAUSAL_LM", None  # PEFT fills in this base's
        if hasattr(model, "peft_config"):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, name)
        if source:
            weights = {k: v for k, v in load_peft_weights(source, device="cpu").items() if k != HEAD_KEY}
            result: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
            wrong = [key for key in result.missing_keys if f".{name}." in key] + result.unexpected_keys
            check(not wrong, f"{source}: its layers are not those of this base ({wrong[:1]})")
    return model


@contextlib.contextmanager
def role(model: Any, name: str, grad: bool = False) -> Iterator[None]:
    """Give the shared base one role: its adapter; train mode with gradients (checkpointing works), else eval mode (the
    KV cache works). A role without an adapter, the reference of a bare base, runs with the adapters off.

    Forward and backward belong in one such block: switching before backward gives silently wrong gradients.
    """
    known = hasattr(model, "peft_config") and name in model.peft_config
    off = hasattr(model, "peft_config") and not known
    if known:
        model.set_adapter(name)  # gradients for its weights only
    model.train(grad)
    with model.disable_adapter() if off else contextlib.nullcontext(), torch.set_grad_enabled(grad):
        yield


def make_optimizer(weights: list, args: Any) -> torch.optim.Optimizer:
    """8-bit paged AdamW on a GPU, torch's AdamW elsewhere; the learning rate is set at every step."""
    if weights[0].device.type != "cuda":
        return torch.optim.AdamW(weights, lr=0.0, weight_decay=args.weight_decay)
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(weights, lr=0.0, weight_decay=args.weight_decay)


def save_model(folder: Path, model: Any, name: str, tokenizer: Any, stop_ids: list[int], head: Any = None) -> None:
    """The adapter as a standard PEFT folder (a whole model where there is none), tokenizer, every stop id; a head
    (1, d) as AutoModelForSequenceClassification finds it. PEFT itself writes a named adapter into a folder below."""
    from peft import get_peft_model_state_dict

    if hasattr(model, "peft_config"):
        config = {**model.peft_config[name].to_dict(), "inference_mode": True}
        config["base_model_name_or_path"] = model.get_base_model().config._name_or_path
        weights = {k: v.contiguous().cpu() for k, v in get_peft_model_state_dict(model, adapter_name=name).items()}
        if head is not None:
            config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
            weights[HEAD_KEY] = head.detach().float().cpu().contiguous()
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, default=sorted))
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # safetensors lets nobody else read what it writes
        shutil.copymode(folder / "tokenizer_config.json", path)
    GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)


class Reward(NamedTuple):
    """One reward: a function of the texts, or a model r(x, y) = head(state of the last token) - mean."""

    name: str
    weight: float = 1.0
    function: Any = None
    model: Any = None  # the shared base with its adapter, or a model of its own
    role: str = ""  # the adapter
    head: Any = None  # (1, d), fp32
    mean: float = 0.0
    tokenizer: Any = None  # None: reads the policy's token ids; else its text, rendered with this one's template


def load_reward(source: str, model: Any, tokenizer: Any, args: Any, who: str = "reward") -> Reward:
    """file.py:function, or a reward model: an adapter `who` on the shared base where it was trained on that base, else
    a model of its own."""
    if source.partition(":")[0].endswith(".py"):
        return Reward(source, function=load_function(source))
    base, is_adapter = find_base(source)
    own = load_tokenizer(source, None, args)
    if not is_adapter:
        model = load_base(source, args, model.device, AutoModelForSequenceClassification)
        one = model.config.num_labels == 1 and hasattr(model, "score")
        check(one, f"{source}: no run folder of reward.py, nor a model with one score")
        return Reward(source, model=model, head=model.score.weight.detach().float(), tokenizer=own)
    from peft import load_peft_weights

    shared = base == model.get_base_model().config._name_or_path
    model = add_adapter(model if shared else load_base(base, args, model.device), who, source, args)
    head: Any = load_peft_weights(source, device=str(model.device)).get(HEAD_KEY)
    check(head is not None, f"{source}: no reward head; from reward.py?")
    card = json.loads(path.read_text()) if (path := Path(source, "reward.json")).is_file() else {}
    reads_ids = shared and own.chat_template == tokenizer.chat_template
    return Reward(source, 1.0, None, model, who, head.float(), card.get("mean", 0.0), None if reads_ids else own)


def load_rewards(model: Any, tokenizer: Any, args: Args) -> list[Reward]:
    """The rewards of --rewards, else --reward_fn or --reward_model, named by function or folder."""
    found: list[Reward] = []
    for text in args.rewards or [f"{args.reward_fn or args.reward_model}=1"]:
        source, _, weight = text.rpartition("=") if "=" in text else (text, "", "1")
        number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", weight)
        check(number, f"--rewards {text}: {weight} is no weight; expected SOURCE or SOURCE=WEIGHT")
        reward = load_reward(source, model, tokenizer, args, f"reward{len(found) or ''}")
        name = re.split("[:/]", source)[-1]
        name = source if name in [r.name for r in found] else name
        found.append(reward._replace(name=name, weight=float(weight)))
    return found


def load_function(spec: str) -> Callable:
    """The function that `file.py:function` names."""
    file, _, name = spec.rpartition(":")
    check(Path(file).is_file(), f"{spec}: no such file; expected file.py:function")
    with reading(f"{spec}: {file} can't be loaded"):
        function: Any = runpy.run_path(file).get(name)
    check(callable(function), f"{spec}: {file} has no function {name}")
    return function


def call_function(function: Callable, prompts: list[dict], responses: list[str]) -> np.ndarray:
    """function(prompts, responses, **columns) -> (B,) float64, NaN where it returned None; three tries more where it
    fails, as a server's 503 or a timeout may pass."""
    names = sorted({name for p in prompts for name in p["columns"]})  # rows may lack some
    columns = {name: [p["columns"].get(name) for p in prompts] for name in names}
    name = f"reward function {getattr(function, '__name__', function)}"
    for wait in (1, 5, 25, 0):
        try:
            found = function([p["prompt"] for p in prompts], responses, **columns)
            values = [x.item() if hasattr(x, "item") else x for x in found]  # of arrays and tensors
            break
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{name}: {place.filename}:{place.lineno}: {type(error).__name__}: {first_line(error)}"
            check(wait, text)
            tqdm.write(f"{text}; trying again in {wait} s")
            time.sleep(wait)
    check(len(values) == len(responses), f"{name} returned {len(values)} values for {len(responses)} responses")
    for x, p, y in zip(values, prompts, responses, strict=True):
        fine = x is None or (isinstance(x, int | float) and math.isfinite(x))
        check(fine, f"{name} returned {x!r} for prompt {p['prompt']!r}, response {y!r}")
    return np.array(values, dtype=float)


# ------------------------------------------------------------------------------------------------------------ data
def read_rows(source: str, args: Any) -> Dataset:
    """A hub dataset, a local file or folder; .jsonl as {"text": line}, because datasets' own reader of it stops at the
    first bad line and turns text that looks like a date into a date."""
    kind = Path(source.removesuffix(".gz")).suffix[1:]
    with reading(f"dataset {source}, split {args.dataset_split}: can't be read"):
        if kind in ("jsonl", "json", "csv", "parquet"):
            options = {"encoding": "utf-8-sig", "encoding_errors": "backslashreplace"} if kind == "jsonl" else {}
            return load_dataset("text" if kind == "jsonl" else kind, data_files=source, split="train", **options)
        if Path(source, "state.json").is_file():
            return load_from_disk(source)
        return load_dataset(source, args.dataset_config, split=args.dataset_split)


def load_examples(
    source: str, columns: list[str], encode: Callable, tokenizer: Any, stop_ids: list[int], run: Run
) -> Dataset:
    """encode(row, tokenizer, stop_ids, args) -> examples {"key": its prompt, "length": tokens, ...} for every row;
    `take` gives them back. Bad rows are counted by reason, and the first of each is shown.

    datasets keeps the result for the next run, under a name made of all that it depends on.
    """
    rows, backend = read_rows(source, run.args), getattr(tokenizer, "backend_tokenizer", None)
    lines = rows.column_names == ["text"] and ".jsonl" in source
    pairs = [pair.split("=") for pair in (run.args.columns or "").split(",") if pair]
    check(all(len(pair) == 2 for pair in pairs), f"--columns {run.args.columns}: expected name=column,name=column")
    names = {column: name for name, column in pairs}

    def encode_row(row: dict) -> list[dict]:
        try:
            row = {names.get(k, k): v for k, v in (json.loads(row["text"]) if lines else row).items()}
            json.dumps(row, ensure_ascii=False, default=str).encode()  # half a surrogate pair is no text
        except (ValueError, AttributeError, RecursionError) as error:
            raise BadRow("no JSON object of text", first_line(error)) from error
        if not any(all(row.get(name) is not None for name in names.split(" + ")) for names in columns):
            raise BadRow("a column is missing or null", "found " + ", ".join(k for k in row if row[k] is not None))
        return encode(row, tokenizer, stop_ids, run.args)

    def encode_batch(batch: dict, numbers: list[int]) -> dict:
        found = []
        for i, number in enumerate(numbers):
            try:
                examples = encode_row({name: values[i] for name, values in batch.items()})
                found += [(e["key"], e["length"], json.dumps(e, default=str), "", "") for e in examples]
            except BadRow as bad:
                found.append(("", 0, "", bad.args[0], f"row {number + 1}: {' '.join(bad.args[1:])}"))
        return {name: list(x) for name, *x in zip(("key", "length", "example", "bad", "first"), *found, strict=True)}

    how = [rows._fingerprint, source, columns, stop_ids, *(getattr(run.args, flag, None) for flag in ENCODING)]
    how += [tokenizer.chat_template, backend.to_str() if backend else repr(tokenizer), Path(__file__).read_text()]
    with run.processes.main_process_first():
        table = rows.map(
            encode_batch, with_indices=True, batched=True, batch_size=100, remove_columns=rows.column_names,
            num_proc=min(8, os.cpu_count() or 1) if len(rows) > 2000 else None, desc=f"encoding {source}",
            new_fingerprint=hashlib.sha256(json.dumps(how).encode()).hexdigest()[:32],
        )  # fmt: skip
    counts = Counter(table["bad"])
    first = dict(zip(reversed(table["bad"]), reversed(table["first"]), strict=True))
    text = "; ".join(f"{n} {reason} ({first[reason]})" for reason, n in counts.items() if reason)
    examples = table.select(np.flatnonzero(np.array(table["bad"]) == ""))
    check(len(examples), f"{source}: no usable row of {len(rows)}; expected {' | '.join(columns)}; left out: {text}")
    print(f"data: {source}: {len(examples)} examples from {len(rows)} rows" + f"; left out: {text}" * bool(text))
    return examples


def take(examples: Dataset, numbers: Any) -> list[dict]:
    """Those examples."""
    return [json.loads(examples[int(i)]["example"]) for i in numbers]


def load_data(
    columns: list[str], encode: Callable, tokenizer: Any, stop_ids: list[int], run: Run
) -> tuple[Dataset, Dataset]:
    """(training, held-out) examples: --eval_dataset, tiny's own, or --eval_size of the training data, by prompt."""
    args, how = run.args, (columns, encode, tokenizer, stop_ids, run)
    examples = load_examples(args.dataset, *how)
    run.data = hashlib.sha256("".join(examples["example"]).encode()).hexdigest()
    beside = Path(args.dataset).with_name(f"{Path(args.dataset).stem}_eval.jsonl")
    if args.eval_dataset or (beside.resolve().parent == TINY and beside.is_file()):
        return examples, load_examples(args.eval_dataset or str(beside), *how)
    keys = sorted(set(examples["key"]), key=lambda key: hashlib.sha256(f"{args.seed}{key}".encode()).digest())
    n = math.ceil(args.eval_size * len(keys) if args.eval_size < 1 else args.eval_size)
    check(n < len(keys), f"--eval_size {args.eval_size} holds out {n} of {len(keys)} prompts, leaves none to train on")
    held = np.isin(examples["key"], keys[:n])
    return examples.select(np.flatnonzero(~held)), examples.select(np.flatnonzero(held))


def check_positions(model: Any, longest: int) -> None:
    """One line instead of an index error, or of silence, where sequences are longer than the model can place."""
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    check(longest <= positions, f"{longest} tokens, but the model has {positions} positions; lower --max_prompt_length")


def to_messages(row: dict, value: Any, tokenizer: Any) -> list[dict]:
    """A message list, with the text of a `system` column first; a string is one user message. BadRow for all that a
    chat template would drop or garble without a word."""
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadRow("neither a string nor a message list", repr(value)[:60])
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    if row.get("system") and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": row["system"]}, *messages]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for m in messages:
        if m.keys() != {"role", "content"} or row.get("tools"):
            raise BadRow("`tools`, or a message with more or less than role and content", ", ".join(m))
        known = m["role"] in ("system", "user", "assistant") and isinstance(m["content"], str) and m["content"].strip()
        if not known:
            raise BadRow("a message without text, or of another role", repr(m)[:60])
        for mark in (*special, "\n\nHuman:"):  # it would end the turn, or forge one
            if mark in m["content"]:
                raise BadRow("a special token or a turn inside the text", repr(mark))
    return messages


def render(tokenizer: Any, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """The chat template's text; a template that refuses the messages (roles, order) makes the row a bad one."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # jinja2's, or what the template's own code raises
        raise BadRow("refused by the chat template", first_line(error)) from error


def one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Token ids with exactly one BOS where the tokenizer is one that adds it, whether the template has it or not."""
    bos = tokenizer.bos_token_id
    n = next((t for t, token in enumerate(ids) if token != bos), len(ids))
    wanted = bos is not None and (n > 0 or tokenizer("a")["input_ids"][:1] == [bos])
    return [bos] * wanted + ids[n:]


def encode_prompt(tokenizer: Any, messages: list[dict]) -> list[int]:
    """Token ids of a prompt up to the point where the assistant begins to write."""
    if messages[-1]["role"] == "assistant":
        raise BadRow("the prompt ends with an assistant turn")
    return one_bos(tokenizer, tokenizer(render(tokenizer, messages, True), add_special_tokens=False)["input_ids"])


def encode_rl(row: dict, tokenizer: Any, stop_ids: list[int], args: Any) -> list[dict]:
    """One row -> its prompt: {"ids", "prompt" as given, "messages", "columns" (for reward functions), ...}."""
    messages = to_messages(row, row["prompt"], tokenizer)
    ids = encode_prompt(tokenizer, messages)
    if len(ids) > args.max_prompt_length:
        raise BadRow(f"prompt over {args.max_prompt_length} tokens")
    columns = {name: value for name, value in row.items() if name != "prompt"}
    clash = columns.keys() & {"prompts", "responses"}
    check(not clash, f"--dataset: column {', '.join(clash)}: reward functions take that name themselves; rename it")
    example = {"ids": ids, "prompt": row["prompt"], "messages": messages, "columns": columns}
    return [{**example, "key": json.dumps(messages), "length": len(ids)}]


def load_prompts(model: Any, tokenizer: Any, run: Run) -> tuple[Dataset, list[dict]]:
    """Prompts to train on, and held-out ones; a response to each fits the model's positions."""
    args = run.args
    prompts, heldout = load_data(["prompt"], encode_rl, tokenizer, [], run)
    check(len(heldout), f"--eval_size {args.eval_size}: RL is judged on held-out prompts; hold some out")
    check_positions(model, max(*prompts["length"], *heldout["length"]) + args.max_response_length)
    return prompts, take(heldout, range(len(heldout)))


def batch_indices(step: int, lengths: Any, batch_size: int, seed: int) -> list[int]:
    """Rows of batch `step`: a new permutation each epoch, a function of (seed, step), so resuming needs no cursor.

    The longest rows come first of all, so that a batch too large for the memory fails at once and not after hours.
    """
    n = len(lengths)
    indices: list[int] = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        if position % n == 0 or not indices:
            order = np.random.default_rng((seed, position // n)).permutation(n)
            if position < n:
                longest = np.argsort(lengths[:], kind="stable")[::-1][:batch_size]
                order = np.concatenate([longest, order[~np.isin(order, longest)]])
        indices.append(int(order[position % n]))
    return indices


# ------------------------------------------------------------------------------------------------------- flat rows
class Row(NamedTuple):
    """One flat row of N tokens without padding, [prompt A][y1][y2][prompt B][y3]..., with n supervised tokens.

    Token i sees token j <= i of the same group if j is in the prompt (segment 0) or in i's own response (1, 2, ...);
    positions go on from the prompt in each response: so each is computed as if it were alone with its prompt.
    """

    ids: Tensor  # (N,)
    positions: Tensor  # (N,)
    group: Tensor  # (N,), which prompt
    segment: Tensor  # (N,)
    before: Tensor  # (n,), where the state stands that predicts each supervised token
    targets: Tensor  # (n,), that token
    at: tuple[Tensor, Tensor]  # which response (n,), and which of its tokens (n,): where tables (B, T) have it
    last: Tensor  # (k,), the last token of each of the row's k responses
    numbers: list[int]  # (k,), which responses


def flat_row(groups: list[list[int]], prompts: list, responses: list, masks: list | None, device: Any) -> Row:
    """One row of these groups; a group is the numbers of responses to one prompt."""
    cells: list[tuple] = []  # of each token: id, position, group, segment, column before it, response, place, counts
    last = {}
    for g, members in enumerate(groups):
        prompt = prompts[members[0]]
        cells += [(token, t, g, 0, 0, 0, 0, 0) for t, token in enumerate(prompt)]
        end, n = len(cells) - 1, len(prompt)  # the state at `end` predicts the first token of every response
        for s, i in enumerate(members, 1):
            start, mask = len(cells) - 1, masks[i] if masks else [1] * len(responses[i])
            tokens = zip(responses[i], mask, strict=True)
            cells += [(y, n + t, g, s, start + t if t else end, i, t, m) for t, (y, m) in enumerate(tokens)]
            last[i] = len(cells) - 1
    table = torch.from_numpy(np.array(cells).T)
    ids, positions, group, segment = table[:4].to(device)
    before, targets, response, place = table[[4, 0, 5, 6]][:, table[7] > 0].to(device)
    ends = torch.tensor([*last.values()]).to(device)
    return Row(ids, positions, group, segment, before, targets, (response, place), ends, [*last])


def flat_rows(
    groups: list[list[int]], prompts: list, responses: list, model: Any, limit: int, masks: list | None = None
) -> list[Row]:
    """Groups, the numbers of responses to one prompt, in rows of up to `limit` tokens, first fit decreasing; a longer
    group goes alone. masks: which tokens of each response are supervised; None: all."""
    if model.config.model_type not in FLAT_ROW_MODELS:  # no plain attention: one response per row, no mask
        groups, limit = [[i] for group in groups for i in group], 0
    sizes = [len(prompts[group[0]]) + sum(len(responses[i]) for i in group) for group in groups]
    rows: list[list[int]] = []
    free: list[int] = []
    for g in sorted(range(len(groups)), key=lambda g: -sizes[g]):
        r = next((r for r, room in enumerate(free) if room >= sizes[g]), len(rows))
        if r == len(rows):  # fits nowhere
            rows.append([])
            free.append(limit)
        rows[r].append(g)
        free[r] -= sizes[g]
    return [flat_row([groups[g] for g in sorted(row)], prompts, responses, masks, model.device) for row in rows]


def sees(row: Row, window: int = 0) -> Callable[..., Tensor]:
    """The rule of who sees whom, as FlexAttention asks for it; a window counts positions, not columns."""

    def rule(batch: Any, head: Any, i: Tensor, j: Tensor) -> Tensor:
        same_response = (row.segment[j] == 0) | (row.segment[i] == row.segment[j])
        seen = (j <= i) & (row.group[i] == row.group[j]) & same_response
        return seen & (row.positions[i] - row.positions[j] < window) if window else seen

    return rule


def attention_mask(row: Row, config: Any, dtype: torch.dtype) -> Any:
    """The row's mask, by layer type where windows occur: a BlockMask for FlexAttention, else additive, (1, 1, N, N).

    None where causal attention will do. A boolean mask would be wrong under eager attention.
    """
    flex, n, device = config._attn_implementation == "flex_attention", len(row.ids), row.ids.device
    if not flex and len(row.numbers) == 1:
        return None
    i = torch.arange(n, device=device)

    def mask(window: int) -> Any:
        if flex:
            return create_block_mask(sees(row, window), None, None, n, n, device=device)
        hidden = ~sees(row, window)(0, 0, i[:, None], i)
        return torch.zeros(n, n, dtype=dtype, device=device).masked_fill(hidden, torch.finfo(dtype).min)[None, None]

    window = getattr(config, "sliding_window", None) or 0
    if not window or getattr(config, "layer_types", None) is None:
        return mask(window)
    return {"full_attention": mask(0), "sliding_attention": mask(window)}


def hidden_states(model: Any, row: Row) -> Tensor:
    """Last hidden states (N, d) in the active role."""
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    mask, half = attention_mask(row, model.config, model.dtype), row.ids.is_cuda and model.dtype == torch.bfloat16
    given: dict[str, Any] = {"input_ids": row.ids[None], "position_ids": row.positions[None], "attention_mask": mask}
    with torch.autocast("cuda", torch.bfloat16, enabled=half):  # else LoRA's fp32 weights cast all activations to fp32
        return model.base_model(**given, use_cache=False).last_hidden_state[0]


def lm_logits(model: Any, hidden: Tensor) -> Tensor:
    """(..., d) -> (..., vocabulary), with Gemma 2's soft cap where the config has one."""
    logits, cap = model.get_output_embeddings()(hidden), getattr(model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def token_logprobs(
    model: Any, row: Row, temperature: float = 1.0, entropy_grad: bool = False, detached: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (n,) of the row's supervised tokens in the active role, fp32; `detached`: no gradients.

    States are picked by index_select, whose backward adds in a fixed order on CPU; plain indexing does not.
    """
    states, size = hidden_states(model, row).index_select(0, row.before), max(128, 2**23 // model.config.vocab_size)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detached):
        return chunked_logprobs(partial(lm_logits, model), states, row.targets, temperature, size, entropy_grad)


def role_tables(model: Any, who: str, rows: list[Row], mask: Tensor, compute: Any, grad: bool = False) -> list[Tensor]:
    """Tables (B, T) of what compute(row) says of each response token in the role `who`, detached."""
    with role(model, who, grad):
        parts = [[x.detach() for x in compute(row)] for row in rows]
    tables = [torch.zeros(mask.shape, device=mask.device) for _ in parts[0]]
    for row, part in zip(rows, parts, strict=True):
        for table, values in zip(tables, part, strict=True):
            table[row.at] = values
    return tables


def role_logprobs(model: Any, who: str, rows: list[Row], mask: Tensor, args: Any) -> list[Tensor]:
    """Log-probs and entropies (B, T); the policy's as in the update: 4-bit kernels may differ without gradients."""
    compute = partial(token_logprobs, model, temperature=args.temperature, detached=True)
    return role_tables(model, who, rows, mask, compute, grad=who == "policy")


# --------------------------------------------------------------------------------------------------------- sampler
def grouped_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
    """Attention that copies no key for each query head, as transformers' does under a mask: the query heads of a group
    become further tokens of their key's head."""
    (rows, heads, n, _), groups = query.shape, key.shape[1]
    if heads == groups or mask is None:
        return sdpa_attention_forward(module, query, key, value, mask, **given)
    folded, mask = query.reshape(rows, groups, -1, query.shape[3]), mask.repeat(1, 1, heads // groups, 1)
    output = nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=given.get("scaling"))
    return output.reshape(rows, heads, n, -1).transpose(1, 2), None


class RoomyLayer(StaticLayer):
    """A layer's keys and values with room for every column that will come: attention gets those that are filled, or
    (`whole`, for a CUDA graph) all of them, under a mask."""

    whole = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns behind the others."""
        keys, values = super().update(key_states, value_states)
        filled = None if self.whole else int(self.cumulative_length)
        return keys[:, :, :filled], values[:, :, :filled]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the next tokens may see, and where they begin."""
        return int(self.cumulative_length) + query_length, 0


def capture_step(forward: Callable, cache: Any, mask: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A decoding step of fixed shapes, on a GPU as one CUDA graph: launching its thousands of kernels takes seven times
    as long as they do.

    The step takes tokens and positions (R, k) and returns logits (R, k, V), which the next call overwrites; it reads
    `mask` (R, 1, k, columns) at every call.
    """
    rows, _, k, _ = mask.shape
    token, position = torch.zeros(2, rows, k, dtype=torch.long, device=mask.device)
    lengths = [layer.cumulative_length.clone() for layer in cache.layers]

    def rewind() -> None:  # what a run without effect wrote is overwritten before any token may see it
        for layer, length in zip(cache.layers, lengths, strict=True):
            layer.whole = True
            layer.cumulative_length.copy_(length)

    rewind()
    if not mask.is_cuda:
        return lambda token, position: forward(token, position, mask).logits
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward(token, position, mask)
    torch.cuda.current_stream().wait_stream(side)
    rewind()
    with torch.cuda.graph(graph):
        logits = forward(token, position, mask).logits
    rewind()

    def step(new_token: Tensor, new_position: Tensor) -> Tensor:
        token.copy_(new_token)
        position.copy_(new_position)
        graph.replay()
        return logits

    return step


@torch.no_grad()
def sample(
    model: Any, prompts: list[list[int]], names: list[int], g: int, max_tokens: int, temperature: float,
    stop_ids: list[int], batch_size: int, key: tuple[int, int, int], static: bool | None = None,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """g responses to each of n prompts -> (token ids, log-probs), n * g lists, prompt by prompt.

    Each prompt is computed once, and its responses grow side by side in its row of the cache. Token t of a response is
    the inverse CDF at one uniform number, a function of (key, names[p], sample, t) and of nothing else: neither
    `batch_size` (responses at once) nor the other prompts change what is sampled. key = (seed, stream, step). static:
    every step has the same shapes, so that a GPU can replay it; default: on a GPU.
    """
    some = max(1, batch_size // g)
    if len(prompts) > some:
        rest, parts = (g, max_tokens, temperature, stop_ids, batch_size, key, static), []
        for i in tqdm(range(0, len(prompts), some), desc="sampling", leave=False, disable=None):
            parts.append(sample(model, prompts[i : i + some], names[i : i + some], *rest))
        return [y for ys, _ in parts for y in ys], [x for _, xs in parts for x in xs]
    bits = [np.random.Philox(key=key[:2], counter=[0, i, name, key[2]]) for name in names for i in range(g)]
    noise = np.stack([np.random.Generator(bit).random(max_tokens) for bit in bits])
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    device, config, attention = model.device, model.config, model.config._attn_implementation
    shared = config.model_type in SIDE_BY_SIDE_MODELS and not getattr(config, "sliding_window", None)
    if not shared:  # windows and linear attention: each response has a row of its own
        prompts, g = [p for p in prompts for _ in range(g)], 1
    static = shared and (device.type == "cuda" if static is None else static)
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    model.set_attn_implementation("grouped" if shared else "sdpa" if attention == "flex_attention" else attention)

    def forward(token: Tensor, position: Tensor, mask: Tensor, last: int = 0) -> Any:  # 0: logits of all tokens
        given: dict[str, Any] = {"input_ids": token, "position_ids": position, "attention_mask": mask}
        return model(**given, past_key_values=cache, use_cache=True, logits_to_keep=last)

    # The prompts, padded on the left, in pieces of 4096 tokens: memory
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    position, columns = (real.cumsum(1) - 1).clamp(min=0), width + -(-g * max_tokens // 8) * 8
    cache: Any = Cache(layers=[RoomyLayer(columns) for _ in range(config.num_hidden_layers)]) if shared else None
    size = max(1, 4096 // len(prompts)) if shared else width
    for i in range(0, width, size):
        output = forward(ids[:, i : i + size], position[:, i : i + size], real[:, : i + size], 1)
        cache = getattr(output, "past_key_values", None)
        check(cache, f"{config.model_type} models keep their state in no cache of transformers; they can't be sampled")
    logits = output.logits.expand(-1, g, -1)
    segment = nn.functional.pad(real - 1, (0, columns - width), value=-1)  # of each column: -1 empty, 0 prompt, i + 1
    mask = torch.zeros(len(real), 1, g, columns, dtype=model.dtype, device=device)
    step = capture_step(forward, cache, mask) if static else None

    # Token by token: token t of response i of a row stands in column width + t * g + i while no response has left
    uniform, stops = torch.from_numpy(noise).to(device).view(-1, g, max_tokens), torch.tensor(stop_ids, device=device)
    tokens, logprobs = torch.zeros_like(uniform, dtype=torch.long), torch.zeros_like(uniform, dtype=torch.float32)
    ended, length, end = torch.zeros_like(tokens[..., 0], dtype=torch.bool), real.sum(1, keepdim=True), width
    row = torch.arange(len(real), device=device)[:, None]  # (R, 1), which rows go on
    slot = torch.arange(g, device=device).expand(len(row), g)  # (R, m), which responses in each
    for t in range(max_tokens):
        logp = (logits.float() / temperature).log_softmax(-1)
        cdf = logp.double().exp_().cumsum_(-1)
        token = torch.searchsorted(cdf, uniform[row, slot, t, None] * cdf[..., -1:], right=True)
        token = token.clamp(max=cdf.shape[-1] - 1)
        tokens[row, slot, t], logprobs[row, slot, t] = token[..., 0], logp.gather(-1, token)[..., 0]
        ended[row, slot] |= torch.isin(token[..., 0], stops)
        del logp, cdf
        if t + 1 == max_tokens or (t % 8 == 7 or step is None) and ended.all():  # a look waits for the GPU
            break
        if step is None:  # what has ended leaves: whole rows, and places in the others
            going = ~ended[row[:, 0]]
            stay = going.any(1).nonzero()[:, 0]
            if len(stay) < len(row) and type(cache) in (Cache, DynamicCache):  # not a model's own kind
                cache.reorder_cache(stay)  # batch_select_indices does the same, but states of linear attention lack it
                row, length, segment, going = row[stay], length[stay], segment[stay], going[stay]
            slot = going.int().argsort(dim=1, descending=True, stable=True)[:, : int(going.sum(1).max())]
        begin, end = end, end + slot.shape[1]
        segment[:, begin:end] = torch.where(ended[row, slot], -1, slot + 1)
        seen = segment[:, None, : columns if static else end]
        hidden = ((seen != slot[..., None] + 1) & (seen != 0))[:, None]
        token, position = tokens[row, slot, t], (length + t).expand(slot.shape)
        if step is not None:
            mask.zero_().masked_fill_(hidden, torch.finfo(mask.dtype).min)
            logits = step(token, position)
        else:
            additive = torch.zeros_like(hidden, dtype=model.dtype).masked_fill_(hidden, torch.finfo(mask.dtype).min)
            logits = forward(token, position, additive if shared else (seen[:, 0] >= 0).long()).logits
    model.set_attn_implementation(attention)
    stopped = torch.isin(tokens, stops).int()
    lengths = torch.where(ended, stopped.argmax(-1) + 1, max_tokens).view(-1).tolist()
    found = zip(tokens.view(-1, max_tokens).tolist(), logprobs.view(-1, max_tokens).tolist(), lengths, strict=True)
    cut = [(y[:n], values[:n]) for y, values, n in found]
    return [y for y, _ in cut], [values for _, values in cut]


class Rollout(NamedTuple):
    """What one step's sampling gives: B responses of up to T tokens."""

    prompts: list[dict]  # B, the prompt of each response
    responses: list[list[int]]  # B, token ids, the end token included
    texts: list[str]  # B, without special tokens
    minibatches: list[list[Row]]  # laid out once for every pass of every role: the first ratio is 1 to rounding
    mask: Tensor  # (B, T)
    ended: Tensor  # (B,), 1 = the response ended by itself
    sampler_logprobs: Tensor  # (B, T), for the preflight's comparison

    def rows(self) -> list[Row]:
        """The rows of all minibatches."""
        return [row for minibatch in self.minibatches for row in minibatch]


def roll_out(lm: Any, prompts: list[dict], names: list, g: int, parts: int, who: str, key: tuple, args: Any) -> Rollout:
    """Sample g responses to each prompt in the role `who`, in flat rows; lm: model, tokenizer, ids that end a response;
    names, key: those of `sample`; parts: minibatches."""
    model, _, stop_ids = lm
    how = args.max_response_length, args.temperature, stop_ids, args.sample_batch_size, key
    with role(model, who):
        responses, logprobs = sample(model, [p["ids"] for p in prompts], names, g, *how)
    return lay_out(lm, [p for p in prompts for _ in range(g)], responses, logprobs, parts, args)


def collect(lm: Any, prompts: Dataset, rewards: list[Reward], run: Run) -> tuple[Rollout, Tensor, int]:
    """This process's share of the step's rollout, its rewards (B, F), and how many of its groups were refilled.

    A group of equal rewards (penalties aside) gives way to a prompt that the batch lacks, at most --max_refills times
    (Yu et al. 2025, section 3.2). Which one, and its noise, depend on seed, step, round and place, on no other group.
    """
    args: Any = run.args
    g, n_prompts, key = args.samples_per_prompt, args.batch_size // args.samples_per_prompt, (args.seed, 0, run.step)
    chosen = batch_indices(run.step, prompts["length"], n_prompts, args.seed)
    spare = np.setdiff1d(np.arange(len(prompts)), chosen)
    spare = np.random.default_rng((args.seed, 2, run.step)).permutation(spare)
    order = [*chosen, *np.resize(spare, args.max_refills * n_prompts if len(spare) else 0)]  # rounds of prompts
    places = wanted = list(range(n_prompts))[run.rank :: run.world]
    groups: dict[int, list] = {}  # by place
    n_sampled = 0
    for first in range(0, len(order), n_prompts):
        names = [first + place for place in wanted]  # they name the noise
        batch = take(prompts, [order[name] for name in names])
        rollout = roll_out(lm, batch, names, g, 1, "policy", key, args)
        table = reward_table(rollout, rewards, args)
        logprobs = rollout.sampler_logprobs.tolist()
        responses = list(zip(rollout.prompts, rollout.responses, logprobs, table, strict=True))
        groups |= {place: responses[k * g : (k + 1) * g] for k, place in enumerate(wanted)}
        n_sampled += len(wanted)
        equal = equal_groups(total_rewards(table, rewards), g).tolist()
        wanted = [place for place, is_equal in zip(wanted, equal, strict=True) if is_equal]
        if not wanted:
            break
    if n_sampled > len(places):
        columns = zip(*(x for place in places for x in groups[place]), strict=True)
        asked, found, logprobs, values = map(list, columns)
        rollout = lay_out(lm, asked, found, logprobs, 1, args)
        table = torch.stack(values)
    return rollout, table, n_sampled - len(places)


def lay_out(lm: Any, prompts: list[dict], responses: list, logprobs: list, parts: int, args: Any) -> Rollout:
    """The rollout of these B prompts, responses and log-probs; neighbours with the same prompt share it in a row."""
    (model, tokenizer, stop_ids), ids, minibatches = lm, [p["ids"] for p in prompts], []
    for part in np.array_split(np.arange(len(prompts)), parts):
        groups = [list(group) for _, group in itertools.groupby(part.tolist(), key=lambda i: id(prompts[i]))]
        minibatches.append(flat_rows(groups, ids, responses, model, args.tokens_per_batch))
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    mask = pad([torch.ones(len(y), dtype=torch.long) for y in responses]).to(model.device)
    sampled = pad([torch.tensor(x[: len(y)]) for x, y in zip(logprobs, responses, strict=True)]).to(model.device)
    ended = torch.tensor([float(y[-1] in stop_ids) for y in responses], device=model.device)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return Rollout(prompts, responses, texts, minibatches, mask, ended, sampled)


# ------------------------------------------------------------------------------------------ scoring and evaluation
def score(reward: Reward, rollout: Rollout, args: Any) -> Tensor:
    """Scores (B,) by a reward model or function, before any penalty; NaN where the function returned None."""
    if reward.function:
        values = call_function(reward.function, rollout.prompts, rollout.texts)
        return torch.from_numpy(values).float().to(rollout.mask.device)
    rows = rollout.rows()
    if reward.tokenizer is not None:  # another vocabulary or template: from the text
        stops, whole = find_stop_ids(reward.tokenizer, None), []
        for p, text in zip(rollout.prompts, rollout.texts, strict=True):
            dialogue = render(reward.tokenizer, [*p["messages"], {"role": "assistant", "content": text}])
            ids = one_bos(reward.tokenizer, reward.tokenizer(dialogue, add_special_tokens=False)["input_ids"])
            whole.append(ids[: max([t + 1 for t, token in enumerate(ids) if token in stops] or [len(ids)])])
        n = len(whole)
        rows = flat_rows([[i] for i in range(n)], [[]] * n, whole, reward.model, args.tokens_per_batch)
    scores = torch.zeros(len(rollout.texts), device=rollout.mask.device)
    with role(reward.model, reward.role):
        for row in rows:
            states = hidden_states(reward.model, row).index_select(0, row.last).float()
            scores[row.numbers] = (states @ reward.head.T).squeeze(-1) - reward.mean
    return scores


def reward_table(rollout: Rollout, rewards: list[Reward], args: Any) -> Tensor:
    """(B, F): each response's value of each reward, unweighted; NaN where a function returned None."""
    return torch.stack([score(reward, rollout, args) for reward in rewards], 1)


def total_rewards(table: Tensor, rewards: list[Reward]) -> Tensor:
    """(B, F) -> (B,): the weighted sum of the rewards that are known, NaN where none is.

    >>> rewards = [Reward("a", 1.0), Reward("b", 0.5)]
    >>> total_rewards(torch.tensor([[1.0, 2.0], [1.0, math.nan], [math.nan, math.nan]]), rewards)
    tensor([2., 1., nan])
    """
    total = (table * torch.tensor([reward.weight for reward in rewards], device=table.device)).nansum(1)
    return total.masked_fill(table.isnan().all(1), math.nan)


def score_by_name(rollout: Rollout, rewards: list[Reward], args: Any) -> dict[str, Tensor]:
    """Held-out scores (B,): their weighted sum, and where there are several each of them."""
    table = reward_table(rollout, rewards, args)
    parts = {f"reward {reward.name}": x for reward, x in zip(rewards, table.T, strict=True) if len(rewards) > 1}
    return {**parts, "score": total_rewards(table, rewards)}


def penalised(rewards: Tensor, rollout: Rollout, args: Any) -> Tensor:
    """(B,): total rewards less the penalties for a missing end and for length."""
    rewards = rewards - args.missing_eos_penalty * (1 - rollout.ended)
    buffer = args.overlong_buffer * args.max_response_length
    return rewards + overlong_penalty(rollout.mask.sum(1), args.max_response_length, buffer) if buffer else rewards


def equal_groups(rewards: Tensor, samples_per_prompt: int) -> Tensor:
    """(P,) bool: whether a prompt's responses all have the same reward (to rounding), so that nothing can be learned.

    >>> equal_groups(torch.tensor([1.0, 0.0, 2.0, 2.0]), 2)
    tensor([False,  True])
    """
    groups = rewards.double().view(-1, samples_per_prompt)  # in float64 the mean of equal float32 numbers is exact
    return (groups - groups.nanmean(1, keepdim=True)).nan_to_num().abs().amax(1) < 1e-6


def greedy_rewards(lm: Any, rollout: Rollout, rewards: list[Reward], args: Any) -> Tensor:
    """(P,): the reward of the most likely response to each prompt of the rollout, token by token."""
    prompts, most_likely = rollout.prompts[:: args.samples_per_prompt], replace(args, temperature=GREEDY)
    greedy = roll_out(lm, prompts, [0] * len(prompts), 1, 1, "policy", (0, 0, 0), most_likely)
    return penalised(total_rewards(reward_table(greedy, rewards, args), rewards), greedy, args)


def preflight(model: Any, rollout: Rollout, old: Tensor, reference: Tensor, args: Any) -> None:
    """Checks on the first rollout that see what metrics hide for hours; a red one stops the run with its cause."""
    limit, ends = 1e-4 if args.dtype == "float32" else 0.02, 0.95 if args.missing_eos_penalty else 1.0
    mask, rows = rollout.mask, rollout.minibatches[0]
    again, _ = role_logprobs(model, "policy", rows, mask, args)
    ratio = max((torch.exp(again - old)[row.at] - 1).abs().max() for row in rows)
    kl, gap = masked_mean(old - reference, mask).abs(), masked_mean((old - rollout.sampler_logprobs).abs(), mask)
    for name, value, most, cause in (
        ("kl at step 0", kl, limit, "the policy does not start as the reference"),
        ("ratio - 1 at step 0", ratio, limit, "two passes over the same tokens differ; is a dropout on?"),
        ("sampler against training pass", gap, limit, "is the KV cache dropped, or a layer's state not kept?"),
        ("share without end", 1 - rollout.ended.mean(), ends, "raise --max_response_length or --missing_eos_penalty 0"),
    ):
        print(f"preflight: {'ok ' if value <= most else 'RED'} {name} {value:.3g} (limit {most:g})")
        check(value <= most, f"preflight: {name} is {value:.3g}, limit {most:g}: {cause}")


def batch_means(run: Run, columns: dict[str, Tensor]) -> dict[str, float]:
    """Name -> mean over the whole batch, all processes, of the numbers that are known: columns (B,) or (B, T), NaN
    where unknown. A column of which nothing is known has no mean."""
    sums: list[float] = []
    for x in columns.values():
        sums += [x.double().nansum().item(), (~x.isnan()).sum().item()]
    totals = run.total(*sums)
    return {name: x / n for name, x, n in zip(columns, totals[::2], totals[1::2], strict=True) if n}


def reward_means(run: Run, rewards: list[Reward], table: Tensor, g: int) -> dict[str, float]:
    """Of each reward, over the whole batch: mean, sd, and the share of groups in which it is the same for all."""
    found: dict[str, float] = {}
    for reward, x in zip(rewards, table.double().T, strict=True):
        means = batch_means(run, {"mean": x, "sd": x**2, "equal": equal_groups(x, g)})
        if "mean" in means:
            means["sd"] = math.sqrt(max(means["sd"] - means["mean"] ** 2, 0))
        found |= {f"{reward.name}/{name}": value for name, value in means.items()}
    return found


def interval(x: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): the mean over prompts and its 95 % interval by the central limit theorem; NaN left out.

    >>> [round(float(v), 3) for v in interval(np.array([1.0, 2.0, 3.0, 4.0]))]
    [2.5, 1.235, 3.765]
    """
    x = x[~np.isnan(x)]
    half = 1.96 * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    mean = x.mean() if len(x) else math.nan
    return mean, mean - half, mean + half


def sample_rows(prompts: list[dict], result: dict[str, Any], model: str, step: int) -> list[dict]:
    """Rows of samples.jsonl: responses of `model`, with what is known of each."""
    rows = []
    for i, (p, text) in enumerate(zip(prompts, result["texts"], strict=True)):
        row = {"id": p["columns"].get("id", i), "prompt": p["prompt"], "response": text, "model": model, "step": step}
        row |= {"finish_reason": "stop" if result["ended"][i] else "length", "tokens": int(result["length"][i])}
        rows.append(row | {key: float(result[key][i]) for key in ("score", "gold", "kl") if key in result})
    return rows


def evaluate(lm: Any, prompts: list[dict], score_all: Callable, gold: Any, args: Any, who: str) -> dict[str, Any]:
    """One response per held-out prompt in the role `who`: arrays over prompts, and the texts; score_all: rollout ->
    scores (B,) by name."""
    rollout = roll_out(lm, prompts, list(range(len(prompts))), 1, 1, who, (args.seed, 1, 0), args)
    rows, mask, model = rollout.rows(), rollout.mask, lm[0]
    logprobs, entropy = role_logprobs(model, who, rows, mask, args)
    ref_logprobs, _ = role_logprobs(model, "reference", rows, mask, args)
    result = {**score_all(rollout), "kl": (logprobs - ref_logprobs).sum(1), "length": mask.sum(1)}
    result |= {"entropy": entropy.sum(1) / mask.sum(1), "ended": rollout.ended}
    result |= {"gold": torch.from_numpy(call_function(gold, rollout.prompts, rollout.texts))} if gold else {}
    return {"texts": rollout.texts, **{name: x.double().cpu().numpy() for name, x in result.items()}}


def report(run: Run, prompts: list[dict], before: dict, after: dict) -> dict[str, Any]:
    """Reference and policy on the same held-out prompts: samples.jsonl, three samples, and the table (mean and 95 %
    interval of each, win-rate), printed and returned for result.json."""
    table: dict[str, Any] = {"prompts": len(prompts)}
    for name, result in (("sft", before), (run.stage, after)):
        run.add("samples.jsonl", sample_rows(prompts, result, name, run.total_steps))
        table[name] = {k: interval(x) for k, x in result.items() if k not in ("texts", "ended")}
        ended = result["ended"].mean()
        table[name]["ended"] = ended, *wilson_interval(ended, len(prompts))
    key = "gold" if "gold" in after else "score"
    known = ~np.isnan(after.get(key, math.nan) - before.get(key, math.nan))
    if known.any():  # there may be no judge, or it may have declined them all
        won = float((np.sign(after[key] - before[key])[known] / 2 + 0.5).mean())  # a tie counts half
        table[f"{key}_win_rate"] = (won, *wilson_interval(won, int(known.sum())))
    for i in range(min(3, len(prompts))):
        print(f"\nprompt  {prompts[i]['prompt']}\nbefore  {before['texts'][i]}\nafter   {after['texts'][i]}")
    print(f"\n{f'{len(prompts)} held-out prompts':26}{'SFT (reference)':>28}{run.stage.upper() + ' (policy)':>28}")
    for name in table["sft"]:
        cells = [" ".join(f"{x:.3f}" for x in table[model][name]) for model in ("sft", run.stage)]
        print(f"{name:26}{cells[0]:>28}{cells[1]:>28}")
    print(f"{key + ' win-rate over SFT':26}{'':28}{' '.join(f'{x:.3f}' for x in table.get(f'{key}_win_rate', ())):>28}")
    return table


if __name__ == "__main__":
    run_cli(main, Args)
