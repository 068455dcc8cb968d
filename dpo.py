# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "bitsandbytes==0.50.2", "peft==0.21.2",
#     "accelerate==1.15.0", "safetensors", "numpy", "matplotlib", "tqdm"]
# ///
"""DPO and its family: learning from preferences without a reward model (Rafailov et al. 2023).

The optimal policy for a reward r under a KL penalty of weight beta is pi(y|x) ~ pi_ref(y|x) exp(r(x, y) / beta).
Turned around, every policy is the optimal one for some reward, its implicit reward

    r(x, y) = beta log pi_theta(y|x) / pi_ref(y|x)   + a constant of x, which differences do not see

and the reward model's likelihood of a preference y_w > y_l can be maximised in the policy itself:

    L(theta) = - mean over prompts x, mean over the pairs y_w > y_l of x, of   log sigma( r(x, y_w) - r(x, y_l) )

`--loss` puts other functions of the same log-probs in the place of -log sigma: a few lines each, with their papers, in
"the maths" and "more losses" below. Each step:

    1. a batch of prompts with their responses and preferences, in flat rows that hold a prompt with all its responses
    2. log pi_ref of the responses
    3. log pi_theta of the responses, the loss, its gradient as the mean over the batch's prompts, row by row
    4. one update of the policy

    python dpo.py                                         # the embedded world in tiny/, a minute on two cores
    python dpo.py --model runs/sft --dataset HuggingFaceH4/ultrafeedback_binarized --dataset_split train_prefs
    python dpo.py --loss kto --model runs/sft --dataset votes.jsonl

Data (hub id, or local .jsonl, .json, .csv, .parquet, folder; one of these column sets):
    prompt, chosen, rejected      responses as strings or message lists, or whole dialogues that begin with the prompt
    chosen, rejected              two whole dialogues, message lists or hh-rlhf's "\\n\\nHuman: ...\\n\\nAssistant: ..."
    prompt, responses, ranks      K responses and their ranks: 1 = best, equal = tie
    prompt, completion, label     one response, liked (true, 1) or not (kto)

Responses sampled while training, and ranked by a reward: grpo.py --method online_dpo.

Writes runs/dpo/: the policy's adapter in PEFT's format, tokenizer, generation_config.json, args.json, metrics.jsonl,
timing.jsonl, samples.jsonl (held-out responses before and after), curves.png, result.json, checkpoint.pt.
"""

import contextlib
import hashlib
import importlib.util
import io
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
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
from torch.nn.functional import logsigmoid, softplus
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, HfArgumentParser

TINY = Path(__file__).resolve().parent / "tiny"
TINY_SETTINGS: dict[str, Any] = {  # for its 0.9 M parameters: used where --dataset lies in tiny/ and no flag is given
    "learning_rate": 1e-3, "epochs": 0.75, "tokens_per_batch": 512, "quant": "none", "dtype": "float32",
    "batch_size": 32, "max_response_length": 128,
}  # fmt: skip


class Loss(NamedTuple):
    """What a loss learns from, and its usual weights."""

    data: Literal["pairs", "labels", "lists"]
    reference: bool  # whether pi_ref occurs in it
    beta: float
    nll_coef: float = 0.0


LOSSES = {
    "sigmoid": Loss("pairs", True, 0.1), "robust": Loss("pairs", True, 0.1), "ipo": Loss("pairs", True, 0.5),
    "hinge": Loss("pairs", True, 0.1), "nca": Loss("pairs", True, 0.1), "apo_zero": Loss("pairs", True, 0.1),
    "apo_down": Loss("pairs", True, 0.1), "sppo": Loss("lists", True, 0.1), "bco": Loss("pairs", True, 0.1),
    "rdpo": Loss("pairs", True, 0.1), "ld": Loss("pairs", True, 0.1), "orpo": Loss("pairs", False, 0.1, 1.0),
    "simpo": Loss("pairs", False, 2.0), "cpo": Loss("pairs", False, 0.1, 1.0), "kto": Loss("labels", True, 0.1),
    "lipo": Loss("lists", True, 0.1), "plackett_luce": Loss("lists", True, 0.1),
}  # fmt: skip


def arg(default: Any, help: str) -> Any:
    """One dataclass field = one command-line flag with its --help text."""
    return field(default=default, metadata={"help": help.replace("%", "%%")})


@dataclass
class Args:
    # roles
    model: str = arg(str(TINY / "sft"), "base model or run folder: hub id or local path")
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
    dataset: str = arg(str(TINY / "preferences.jsonl"), "training data: hub id, folder, .jsonl .json .csv .parquet")
    dataset_split: str = arg("train", "split of a hub dataset")
    dataset_config: str | None = arg(None, "configuration of a hub dataset that has several")
    columns: str | None = arg(None, "columns that have other names: prompt=question,completion=answer")
    eval_dataset: str | None = arg(None, "held-out data; default: --eval_size of the training data, split by prompt")
    eval_size: float = arg(0.05, "held-out share (below 1) or number of prompts where no --eval_dataset is given")
    eval_samples: int = arg(256, "held-out prompts that are answered before and after training; 0: none")
    max_prompt_length: int = arg(512, "longer prompts are dropped and counted, never cut (tokens)")
    max_response_length: int = arg(512, "longest response (tokens)")
    # loss
    loss: Literal[*LOSSES] = arg("sigmoid", "see LOSSES: what it learns from, its reference")  # type: ignore[valid-type]
    beta: float | None = arg(None, "reward per nat of log-ratio (ipo: tau, orpo: lambda); default: the loss's own")
    nll_coef: float | None = arg(None, "weight of the chosen responses' NLL per token (RPO); default: see LOSSES")
    label_smoothing: float = arg(0.0, "share of the labels taken to be wrong, in losses that allow it")
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = arg(
        "reverse_kl", "divergence from the reference (sigmoid, robust, hinge, rdpo)"
    )
    f_alpha: float = arg(0.5, "--f_divergence alpha: 0 = reverse KL, 1 = forward KL")
    length_alpha: float = arg(0.02, "rdpo: reward that a token of length counts for")
    ld_alpha: float = arg(0.5, "ld: weight of the tokens beyond the shorter response's length; 1: plain DPO")
    simpo_gamma: float = arg(1.0, "simpo: margin that the rewards shall differ by")
    desirable_weight: float = arg(1.0, "kto: weight of liked responses")
    undesirable_weight: float = arg(1.0, "kto: weight of the others")
    # optimisation
    learning_rate: float = arg(1e-5, "peak learning rate: linear warm-up, then a cosine down to a tenth")
    warmup_ratio: float = arg(0.05, "share of the steps with rising learning rate")
    weight_decay: float = arg(0.0, "AdamW weight decay")
    max_grad_norm: float = arg(1.0, "gradients longer than this are scaled down to it")
    batch_size: int = arg(32, "per step: examples; reward, dpo: prompts with their responses; RL: responses")
    tokens_per_batch: int | None = arg(None, "tokens per flat row: memory, speed; default: 512, 4096 on a GPU")
    epochs: float = arg(1.0, "passes over the dataset")
    max_steps: int = arg(0, "stop after this many steps; 0: no limit; the smaller bound wins")
    # run
    output_dir: str = arg("runs/dpo", "run folder; an existing one is renamed unless --resume")
    seed: int = arg(0, "decides everything on CPU")
    eval_every: int = arg(0, "steps between evaluations on held-out data; 0: at the end only")
    save_every: int = arg(100, "steps between checkpoints; Ctrl-C and the last step write one too")
    resume: bool = arg(False, "go on from the checkpoint in --output_dir; --max_steps and --epochs may have grown")
    report_to: list[str] | None = arg(None, "trackers that accelerate knows: wandb, tensorboard, trackio, ...")


# ------------------------------------------------------------------------------------------------------- the maths
# Shapes: P pairs; S responses; T response tokens. chosen, rejected (P,): log-ratios log pi(y|x) - log pi_ref(y|x) of
# whole responses, where nothing else is said. Every loss is per pair (P,) or per response (S,), except those of lists.


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


def rdpo_loss(chosen: Tensor, rejected: Tensor, longer: Tensor, beta: float, length_alpha: float) -> Tensor:
    """rdpo: -log sigma(r_w - r_l + alpha (|y_w| - |y_l|)): what length alone explains is not learnt.

    Park et al. 2024 (R-DPO, arXiv 2403.19159), from the objective r - alpha |y|. longer (P,) = |y_w| - |y_l| in tokens.

    >>> rdpo_loss(torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([50]), 0.1, 0.02)
    tensor([0.3133])
    """
    return bradley_terry_loss(beta * chosen, beta * rejected, -length_alpha * longer, 0.0)


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """orpo: -beta log sigma(log odds(y_w) - log odds(y_l)), odds = p / (1 - p); p from log-probs per token (P,).

    Hong et al. 2024 (ORPO), eq. 6 and 7; their SFT term is --nll_coef.

    >>> orpo_loss(torch.log(torch.tensor([0.5])), torch.log(torch.tensor([0.2])), 1.0)  # odds 1 and 1/4: log(5/4)
    tensor([0.2231])
    """
    chosen, rejected = chosen.clamp(max=-1e-6), rejected.clamp(max=-1e-6)  # p = 1 would have infinite odds
    log_odds = chosen - rejected - torch.log(-torch.expm1(chosen)) + torch.log(-torch.expm1(rejected))
    return beta * softplus(-log_odds)


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float, label_smoothing: float) -> Tensor:
    """simpo: -log sigma(beta (log-prob per token of y_w - that of y_l) - gamma); log-probs per token (P,).

    Meng et al. 2024 (SimPO), eq. 6.

    >>> simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.5]), 2.0, 1.0, 0.0)
    tensor([0.6931])
    """
    return bradley_terry_loss(beta * chosen, beta * rejected, torch.full_like(chosen, gamma), label_smoothing)


def cpo_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """cpo: DPO with a uniform reference, on log-probs (P,); Xu et al. 2024 (CPO); their NLL is --nll_coef.

    >>> cpo_loss(torch.tensor([-20.0]), torch.tensor([-30.0]), 0.1, 0.0)
    tensor([0.3133])
    """
    return bradley_terry_loss(beta * chosen, beta * rejected, torch.zeros_like(chosen), label_smoothing)


def kto_loss(log_ratio: Tensor, label: Tensor, kl: float, beta: float, desirable: float, undesirable: float) -> Tensor:
    """kto: weight * (1 - sigma(+-(beta log-ratio - beta kl))) per response (S,), + where label is 1, - where it is 0.

    Ethayarajh et al. 2024 (KTO, arXiv 2402.01306); kl is `mismatched_kl`, an estimate of KL(pi, pi_ref) on this batch.

    >>> kto_loss(torch.tensor([12.0, 12.0]), torch.tensor([1.0, 0.0]), 2.0, 0.1, 1.0, 2.0)  # 0.2689, 2 * 0.7311
    tensor([0.2689, 1.4621])
    """
    sign, weight = 2 * label - 1, torch.where(label > 0.5, desirable, undesirable)
    return weight * torch.sigmoid(-sign * beta * (log_ratio - kl))


def plackett_luce_loss(scores: Tensor, ranks: Tensor, prompt: Tensor) -> Tensor:
    """Scores (S,), ranks (S,), prompt number (S,) -> (S,), whose sum is -log P(ranking) (Plackett 1975, Luce 1959).

    The best is drawn by softmax from all, the next from the rest, and so on. A tied item's denominator holds all items
    of equal or worse rank (Breslow 1974). Two responses: the Bradley-Terry loss.

    >>> plackett_luce_loss(torch.zeros(3), torch.tensor([1, 2, 3]), torch.zeros(3)).exp()  # 1/3 * 1/2 * 1
    tensor([3., 2., 1.])
    >>> plackett_luce_loss(torch.zeros(3), torch.tensor([1, 1, 3]), torch.zeros(3)).exp()
    tensor([3., 3., 1.])
    """
    drawn_from = (prompt[:, None] == prompt) & (ranks >= ranks[:, None])  # (S, S): row i, the candidates j
    return torch.where(drawn_from, scores, -torch.inf).logsumexp(-1) - scores


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


class Preferences(NamedTuple):
    """S responses to the prompts of a flat row, P pairs (i better than j) of them, tables (S, T) of their tokens."""

    rows: list  # of Row: one; or one per response, for models that can't have several in a row
    at: tuple[Tensor, Tensor]  # (n,), (n,): which of the S responses, and which of its tokens; Row.at's in the batch
    mask: Tensor  # (S, T), 1 = a real token of the response, its end included
    ref_logprobs: Tensor  # (S, T), 0 where the loss has no reference
    better: Tensor  # (P,), index of i among the S
    worse: Tensor  # (P,), index of j
    weight: Tensor  # (P,), 1 / number of pairs of the prompt, so that each prompt counts once
    share: Tensor  # (S,), 1 / number of responses to the prompt
    ranks: Tensor  # (S,), 1 = best
    wins: Tensor  # (S,), probability that the response is preferred; or its label
    prompt: Tensor  # (S,), number of the prompt


def preference_loss(logprobs: Tensor, pack: Preferences, baseline: float, args: Any) -> Tensor:
    """Log-probs (S, T) -> the loss --loss, summed over the prompts of a row; baseline: KL estimate (kto), mean reward
    (bco)."""
    mask, beta, smoothing = pack.mask, args.beta, args.label_smoothing
    logprobs, lengths = logprobs * mask, mask.sum(1)
    log_ratios = logprobs - pack.ref_logprobs
    logprob, log_ratio = logprobs.sum(1), log_ratios.sum(1)

    def pick(x: Tensor) -> tuple[Tensor, Tensor]:  # of the better and of the worse response of each pair
        return x.index_select(0, pack.better), x.index_select(0, pack.worse)

    (h_w, h_l), (n_w, n_l) = pick(log_ratio), pick(lengths)  # h: what the losses compare, the log-ratio or a form of it
    (logprob_w, logprob_l), (mean_w, mean_l) = pick(logprob), pick(logprob / lengths)
    if args.f_divergence != "reverse_kl":
        h_w, h_l = (divergence_score(h, args.f_divergence, args.f_alpha) for h in (h_w, h_l))
    if args.loss == "ld":
        shorter, tables = torch.minimum(n_w, n_l), zip(pick(log_ratios), pick(mask), strict=True)
        h_w, h_l = (length_desensitised(x, m, shorter, args.ld_alpha) for x, m in tables)
    losses: dict[str, Callable[[], Tensor]] = {
        "sigmoid": lambda: dpo_loss(h_w, h_l, beta, smoothing),
        "robust": lambda: robust_loss(h_w, h_l, beta, smoothing),
        "ipo": lambda: ipo_loss(h_w, h_l, n_w, n_l, beta),
        "hinge": lambda: hinge_loss(h_w, h_l, beta),
        "nca": lambda: nca_loss(h_w, h_l, beta),
        "apo_zero": lambda: apo_zero_loss(h_w, h_l, beta),
        "apo_down": lambda: apo_down_loss(h_w, h_l, beta),
        "bco": lambda: bco_loss(h_w, h_l, beta, baseline),
        "rdpo": lambda: rdpo_loss(h_w, h_l, n_w - n_l, beta, args.length_alpha),
        "ld": lambda: dpo_loss(h_w, h_l, beta, 0.0),
        "orpo": lambda: orpo_loss(mean_w, mean_l, beta),
        "simpo": lambda: simpo_loss(mean_w, mean_l, beta, args.simpo_gamma, smoothing),
        "cpo": lambda: cpo_loss(logprob_w, logprob_l, beta, smoothing),
        "kto": lambda: kto_loss(log_ratio, pack.wins, baseline, beta, args.desirable_weight, args.undesirable_weight),
        "sppo": lambda: 2 * pack.share * sppo_loss(log_ratio, pack.wins, beta),  # any K counts as a pair
        "lipo": lambda: lipo_loss(beta * log_ratio, pack.wins, pack.prompt),
        "plackett_luce": lambda: plackett_luce_loss(beta * log_ratio, pack.ranks, pack.prompt),
    }  # fmt: skip
    weights = {"pairs": pack.weight, "labels": pack.share, "lists": torch.ones_like(pack.share)}
    loss = (weights[LOSSES[args.loss].data] * losses[args.loss]()).sum()
    return loss - args.nll_coef * (roles_in_pairs(pack, args)[0] * logprob / lengths).sum()


# --------------------------------------------------------------------------------------------------- the algorithm
def main(args: Args) -> None:
    """Direct preference optimisation, and its family (dpo.py)."""
    run = Run(args, "dpo", CURVES)
    settle_loss(args)

    # Roles, data, optimiser
    model, tokenizer, stop_ids, adapter = load_model(args, run.device)
    model = add_adapter(model, "policy", adapter, args)
    if adapter:  # a bare base is its own reference, with the adapters off
        add_adapter(model, "reference", adapter, args)
    tiny = Path(args.dataset).resolve().parent == TINY
    args.gold_fn = args.gold_fn or (f"{TINY / 'annotator.py'}:gold" if tiny else None)
    gold = load_function(args.gold_fn) if args.gold_fn else None
    kind = "prompt + completion + label" if LOSSES[args.loss].data == "labels" else "prompt + responses + ranks"
    columns = ["prompt + chosen + rejected", "chosen + rejected", kind]
    examples, held = load_data(columns, encode_example, tokenizer, stop_ids, run)
    check_positions(model, min(max(examples["length"]), args.max_prompt_length + args.max_response_length))
    heldout = take(held, range(len(held)))
    prompts = heldout_prompts(heldout, tokenizer, run)
    weights = [p for name, p in model.named_parameters() if ".policy." in name]
    optimizer = make_optimizer(weights, args)
    total_steps = math.ceil(args.epochs * len(examples) / args.batch_size)
    total_steps = min(total_steps, args.max_steps or total_steps)
    baseline = torch.zeros((), dtype=torch.float64)  # kto: KL in nats; bco: mean reward. A tensor: checkpoints have it

    def judge() -> tuple[dict, dict]:
        """(metrics on held-out preferences, responses to held-out prompts)"""
        measured = measure_preferences(model, heldout, baseline.item(), run)
        return measured, (answer(model, tokenizer, stop_ids, prompts, gold, args) if prompts else {})

    before, answers = judge()
    check_start(before, args)
    after: tuple[dict, dict] | None = None

    for step in run.steps(total_steps, [*weights, baseline], [optimizer]):
        start = time.time()

        # 1. A batch of prompts with their responses and preferences, in flat rows
        batch = take(examples, batch_indices(step, examples["length"], args.batch_size, args.seed))
        if args.loss == "kto":
            baseline.fill_(mismatched_kl(model, batch, run))
        sums = torch.zeros(len(METRICS), 2, device=run.device)
        packs = collate(batch[run.rank :: run.world], model, args)

        # 2. log pi_ref
        if LOSSES[args.loss].reference:
            with role(model, "reference"):
                packs = [pack._replace(ref_logprobs=logprob_table(model, pack)) for pack in packs]

        # 3. log pi_theta, the loss and its gradient, as the mean over the prompts of the whole batch
        with role(model, "policy", grad=True):
            for pack in packs:
                logprobs = logprob_table(model, pack)
                loss = preference_loss(logprobs, pack, baseline.item(), args)
                (loss / args.batch_size).backward()
                sums += preference_sums(loss.detach(), logprobs.detach(), pack, args)
        metrics = {"step": step, **preference_metrics(sums, run)}
        metrics |= {"baseline": baseline.item()} if args.loss in ("kto", "bco") else {}
        if args.loss == "bco":  # the mean reward, as a moving average over batches
            baseline.mul_(0.9).add_(0.1 * (metrics["chosen_reward"] + metrics["rejected_reward"]) / 2)

        # 4. The update
        learning_rate = learning_rate_at(step, total_steps, args.learning_rate, args.warmup_ratio)
        metrics |= {"grad_norm": run.clip_gradients(optimizer, learning_rate), "learning_rate": learning_rate}
        optimizer.step()
        optimizer.zero_grad()

        # 5. Log, evaluate
        seconds, tokens = time.time() - start, sum(e["length"] for e in batch)
        if run.evaluates(step):
            after = judge()
            metrics |= {f"heldout_{k}": after[0][k] for k in ("loss", "accuracy", "margin") if k in after[0]}
            metrics |= {f"heldout_{k}": interval(after[1][k])[0] for k in ("gold", "kl") if k in after[1]}
        run.log(metrics, {"seconds": seconds, "tokens_per_second": tokens / seconds})

    measured, answered = after or judge()
    table = compare_preferences(before, measured, len(heldout), args) if heldout else {}
    table |= report(run, prompts, answers, answered) if prompts else {}
    run.finish(model, "policy", tokenizer, stop_ids, table)


# =================================================================================================================
# The rest is plumbing, in the order in which main calls it: more losses, run folder, roles, data, rows, evaluation.
# =================================================================================================================
CURVES = ("loss", "accuracy", "margin", "chosen_logprob", "rejected_logprob", "heldout_accuracy", "heldout_gold")
SMOOTHED = ("sigmoid", "robust", "simpo", "cpo")  # losses with --label_smoothing
DIVERGENT = ("sigmoid", "robust", "hinge", "rdpo")  # losses with --f_divergence: those of a difference of rewards
METRICS = (  # in preference_sums' order
    "loss", "accuracy", "ref_kl", "chosen_reward", "chosen_logprob", "chosen_length", "rejected_reward",
    "rejected_logprob", "rejected_length",
)  # fmt: skip
Group = tuple[list[int], list[list[int]]]  # prompt ids and the ids of the responses to it
HEAD_KEY = "base_model.model.score.weight"  # where AutoModelForSequenceClassification + PEFT look for a reward head
FLAT_ROW_MODELS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "gpt2", "gemma2", "gemma3_text")
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


# ---------------------------------------------------------------------------------------------------------- more losses
def robust_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """robust: ((1 - e) l(d) - e l(-d)) / (1 - 2e), l(d) = -log sigma(d): unbiased when a share e < 1/2 is mislabelled.

    Chowdhury et al. 2024 (rDPO, arXiv 2403.00409).

    >>> robust_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.0, -7.0]), 0.1, 0.25)  # 0.3133 - 0.25 / 0.5
    tensor([ 0.6931, -0.1867])
    """
    d = beta * (chosen - rejected)
    return ((1 - label_smoothing) * softplus(-d) - label_smoothing * softplus(d)) / (1 - 2 * label_smoothing)


def hinge_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """hinge: max(0, 1 - beta (chosen - rejected)). Zhao et al. 2023 (SLiC-HF), on RSO's rewards (Liu 2023).

    >>> hinge_loss(torch.tensor([3.0, 20.0]), torch.tensor([-1.0, 0.0]), 0.1)
    tensor([0.6000, 0.0000])
    """
    return torch.relu(1 - beta * (chosen - rejected))


def nca_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """nca: -log sigma(r_w) - 1/2 log sigma(-r_w) - 1/2 log sigma(-r_l): absolute rewards, so r_w is kept from falling.

    Chen et al. 2024 (noise contrastive alignment, arXiv 2402.05369), with K = 2.

    >>> nca_loss(torch.tensor([0.0]), torch.tensor([0.0]), 0.1)  # 2 log 2
    tensor([1.3863])
    """
    r_w, r_l = beta * chosen, beta * rejected
    return softplus(-r_w) + 0.5 * softplus(r_w) + 0.5 * softplus(r_l)


def apo_zero_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """apo_zero: (1 - sigma(r_w)) + sigma(r_l): chosen up, rejected down; for data better than the model.

    D'Oosterlinck et al. 2024 (anchored preference optimisation), eq. 7.

    >>> apo_zero_loss(torch.tensor([10.0]), torch.tensor([0.0]), 0.1)  # 0.2689 + 0.5
    tensor([0.7689])
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """apo_down: sigma(r_w) + (1 - sigma(r_w - r_l)): both down, the rejected one more; for data worse than the model.

    D'Oosterlinck et al. 2024, eq. 8.

    >>> apo_down_loss(torch.tensor([10.0]), torch.tensor([10.0]), 0.1)  # 0.7311 + 0.5
    tensor([1.2311])
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def sppo_loss(log_ratio: Tensor, win_probability: Tensor, beta: float) -> Tensor:
    """sppo: (log-ratio - (p - 1/2) / beta)^2 per response (S,), p: the probability that it beats the policy's others.

    Wu et al. 2024 (self-play preference optimisation), eq. 4.7, eta = 1 / beta. Of two ranked responses, p is 1 or 0.

    >>> sppo_loss(torch.tensor([3.0, -5.0]), torch.tensor([1.0, 0.0]), 0.1)  # (3 - 5)^2, (-5 + 5)^2
    tensor([4., 0.])
    """
    return (log_ratio - (win_probability - 0.5) / beta) ** 2


def bco_loss(chosen: Tensor, rejected: Tensor, beta: float, shift: float) -> Tensor:
    """bco: -log sigma(r_w - shift) - log sigma(shift - r_l), a classifier of single responses; shift: mean reward.

    Jung et al. 2024 (binary classifier optimisation, arXiv 2404.04656).

    >>> bco_loss(torch.tensor([10.0]), torch.tensor([10.0]), 0.1, 1.0)  # 2 log 2
    tensor([1.3863])
    """
    return softplus(shift - beta * chosen) + softplus(beta * rejected - shift)


def length_desensitised(x: Tensor, mask: Tensor, shared_length: Tensor, ld_alpha: float) -> Tensor:
    """ld: log-ratios per token x (P, T) summed, those beyond shared_length (P,) with weight ld_alpha -> (P,).

    Liu et al. 2024 (LD-DPO, arXiv 2409.06411); shared_length is the length of the pair's shorter response.

    >>> length_desensitised(torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3), torch.tensor([1]), 0.5)
    tensor([4.])
    """
    beyond = torch.arange(x.shape[1], device=x.device) >= shared_length[:, None]
    return (x * mask * torch.where(beyond, ld_alpha, 1.0)).sum(1)


def divergence_score(log_ratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(pi/pi_ref) up to a constant, which takes the log-ratio's place when a divergence D_f replaces the KL penalty.

    Wang et al. 2023 (f-DPO), table 1: reverse KL log u; forward KL 1 - 1/u; JS log 2u/(1+u);
    alpha (1 - u^-alpha)/alpha.

    >>> two = torch.tensor([2.0])  # u = e^2: 2, 1 - e^-2, log 1/(1 + e^-2), 2 (1 - e^-1)
    >>> torch.cat([divergence_score(two, d, 0.5) for d in ("reverse_kl", "forward_kl", "js", "alpha")])
    tensor([ 2.0000,  0.8647, -0.1269,  1.2642])
    """
    if divergence == "forward_kl":
        divergence, alpha = "alpha", 1.0
    if divergence == "js":
        return logsigmoid(log_ratio)
    if divergence == "alpha" and alpha != 0:
        x = -alpha * log_ratio
        line = math.exp(20) * (x - 19) - 1  # the tangent goes on above 20: gradients of e^x would overflow
        return -torch.where(x < 20, torch.expm1(x.clamp(max=20)), line) / alpha
    return log_ratio


def lipo_loss(rewards: Tensor, relevance: Tensor, prompt: Tensor) -> Tensor:
    """lipo: implicit rewards (S,), relevance in [0, 1] (S,), prompt number (S,) -> (S,), whose sum is the LambdaLoss.

    Liu et al. 2024 (LiPO, arXiv 2402.01878): over the pairs psi_i > psi_j of a prompt, Delta_ij log(1 + e^(r_j - r_i)),
    Delta_ij = |2^psi_i - 2^psi_j| |1/log(1 + tau_i) - 1/log(1 + tau_j)|, tau: the place by r, 1 = highest.

    >>> lipo_loss(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.zeros(2))  # (1/log 2 - 1/log 3) * log 2
    tensor([0.3691, 0.0000])
    >>> lipo_loss(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), torch.zeros(2))  # 0.5325 * log(1 + e)
    tensor([0.6993, 0.0000])
    """
    same, index = prompt[:, None] == prompt, torch.arange(len(prompt), device=prompt.device)
    r = rewards.detach().round(decimals=4)  # what differs by rounding alone is tied
    before = (r > r[:, None]) | ((r == r[:, None]) & (index < index[:, None]))
    place = 1 + (same & before).sum(1)  # no shared places: at the start all rewards are 0 and every Delta would be
    gain, discount = 2**relevance, 1 / torch.log1p(place)
    delta = (gain[:, None] - gain).abs() * (discount[:, None] - discount).abs()
    better = same & (relevance[:, None] > relevance)
    return (better * delta * softplus(rewards - rewards[:, None])).sum(1)


# ------------------------------------------------------------------------------------------------- mistakes of the user
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


def settle_loss(args: Args) -> None:
    """Fill in what follows from --loss; flags that have no part in it are a mistake."""
    kind, loss, smoothing = LOSSES[args.loss], f"--loss {args.loss}", args.label_smoothing
    args.beta = kind.beta if args.beta is None else args.beta
    args.nll_coef = kind.nll_coef if args.nll_coef is None else args.nll_coef
    check(args.lora_r != 0, "--lora_r 0: DPO trains LoRA adapters only; use a rank of at least 1")
    smoothed = args.loss in SMOOTHED or not smoothing
    check(smoothed, f"--label_smoothing has no part in {loss}, but in {', '.join(SMOOTHED)}")
    check(smoothing < 0.5, f"--label_smoothing {smoothing}: a share of wrong labels, at least 0 and below 0.5")
    divergent = args.loss in DIVERGENT or args.f_divergence == "reverse_kl"
    check(divergent, f"--f_divergence has no part in {loss}, but in {', '.join(DIVERGENT)}")
    check(args.f_alpha <= 1, f"--f_alpha {args.f_alpha}: from 0 (reverse KL) to 1 (forward KL)")
    check(args.loss != "kto" or args.batch_size > 1, "--batch_size 1: kto's KL estimate needs another prompt")


# ----------------------------------------------------------------------------------------------------------- run folder
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


# ------------------------------------------------------------------------------------------------------ model and roles
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


# ----------------------------------------------------------------------------------------------------------------- data
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


def encode_conversation(
    tokenizer: Any, messages: list[dict], stop_ids: list[int], last_turn_only: bool = False
) -> list[tuple[list[int], list[int]]]:
    """Message list -> [(ids, mask)], mask 1 on assistant turns up to and with the token that ends them, 0 elsewhere.

    Each turn is rendered as it is asked for, and tokenised once with those before it. Where the template renders a turn
    in another way once others follow (Qwen3 drops old thoughts), the next turn begins an example of its own.
    """
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns or turns[0] == 0:
        raise BadRow("an assistant turn comes first" if turns else "no assistant turn")
    stop = re.compile("|".join(re.escape(token) for token in tokenizer.convert_ids_to_tokens(stop_ids)))
    texts: list[tuple[str, list[tuple[int, int]]]] = []
    for i in turns[-1:] if last_turn_only else turns:
        before, after = render(tokenizer, messages[:i], True), render(tokenizer, messages[: i + 1])
        if not after.startswith(before):
            at = len(os.path.commonprefix([before, after]))
            there = f"after {before[:at][-20:]!r} {before[at:][:30]!r}, with its response {after[at:][:30]!r}"
            raise BadRow("chat template: the prompt is no prefix of prompt + response", there)
        end = stop.search(after, len(before))
        after = after[: end.end()] if end else after + tokenizer.eos_token
        answers = texts.pop()[1] if texts and before.startswith(texts[-1][0]) else []
        texts.append((after, [*answers, (len(before), len(after))]))
    encoded = []
    for text, answers in texts:
        plain, mask = mark_answers(tokenizer, text, answers)
        ids = one_bos(tokenizer, plain)
        encoded.append((ids, [0] * (len(ids) - len(plain)) + mask[max(0, len(plain) - len(ids)) :]))
    return encoded


def mark_answers(tokenizer: Any, text: str, answers: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """(ids, mask): the text's tokens, and 1 on those of its answers, given as spans of characters.

    A token that would straddle an answer's beginning is split: the model has to start afresh there, so do we. It ends
    above `begin`, or its span leaves out the space with which it begins and the token before ends below.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], np.array(encoded["offset_mapping"], dtype=int).reshape(-1, 2)
    mask = np.zeros(len(ids), dtype=int)
    for k, (begin, end) in enumerate(answers):
        t = int(np.searchsorted(spans[:, 0], begin))
        if t and begin != spans[t - 1, 1]:
            left = mark_answers(tokenizer, text[:begin], answers[:k])
            right = mark_answers(tokenizer, text[begin:], [(a - begin, b - begin) for a, b in answers[k:]])
            return left[0] + right[0], left[1] + right[1]
        mask[t : np.searchsorted(spans[:, 0], end)] = 1
    return ids, mask.tolist()


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


def split_dialogue(value: Any) -> Any:
    """The message list of a text in hh-rlhf's form; what is no string stays as it is."""
    if not isinstance(value, str):
        return value
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", value)
    if before.strip() or not parts:
        raise BadRow("no dialogue: neither a message list nor a text that begins with `Human:`", repr(value[:40]))
    names = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": names[name], "content": text.strip()} for name, text in turns]


def read_pair(row: dict, tokenizer: Any) -> list[list[dict]]:
    """The dialogues [chosen, rejected]. A side is a text, messages that go on from the prompt, or a whole dialogue, in
    which a prompt that is a string may be any turn."""
    prompt = [] if row.get("prompt") is None else to_messages(row, row["prompt"], tokenizer)
    dialogues = []
    for value in (row["chosen"], row["rejected"]):
        side = [{"role": "assistant", "content": value}] if prompt and isinstance(value, str) else split_dialogue(value)
        turns = to_messages({}, side, tokenizer)
        turns = [*prompt, *turns] if turns[0]["role"] == "assistant" else to_messages(row, turns, tokenizer)
        if turns[: len(prompt)] != prompt and not (isinstance(row["prompt"], str) and prompt[-1] in turns):
            raise BadRow("`chosen` or `rejected` neither goes on from `prompt` nor has it in it")
        dialogues.append(turns)
    if dialogues[0] == dialogues[1]:
        raise BadRow("identical pair")
    return dialogues


def encode_group(dialogues: list[list[dict]], tokenizer: Any, stop_ids: list[int], args: Any) -> dict:
    """Dialogues whose last turns are the responses to one prompt -> {"group": (prompt ids, ids of each response),
    "texts", "prompt" (a string if it is one user message), "key", "length"}; BadRow where one is too long."""
    if any(turns[-1]["role"] != "assistant" for turns in dialogues):
        raise BadRow("no dialogue that ends with an assistant turn")
    messages, prompts, responses = dialogues[0][:-1], [], []
    if any(turns[:-1] != messages for turns in dialogues):
        raise BadRow("pair with differing prompts")
    for turns in dialogues:
        checked = to_messages({}, turns, tokenizer)
        ((ids, mask),) = encode_conversation(tokenizer, checked, stop_ids, last_turn_only=True)
        prompts.append(ids[: mask.index(1)])
        responses.append(ids[mask.index(1) :])
    if any(prompt != prompts[0] for prompt in prompts):
        raise BadRow("chat template: the prompt depends on the response")
    if len(prompts[0]) > args.max_prompt_length or max(map(len, responses)) > args.max_response_length:
        raise BadRow(f"prompt over {args.max_prompt_length} or response over {args.max_response_length} tokens")
    prompt, texts = messages[0]["content"] if len(messages) == 1 else messages, [t[-1]["content"] for t in dialogues]
    key = json.dumps([m for m in messages if m["role"] != "system"][:1])
    length = len(prompts[0]) + sum(map(len, responses))
    return {"group": (prompts[0], responses), "texts": texts, "prompt": prompt, "key": key, "length": length}


def encode_preference(row: dict, tokenizer: Any, stop_ids: list[int], args: Any) -> list[dict]:
    """One row -> [{"ranks", "margin", and what encode_group gives}]."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        dialogues, ranks = read_pair(row, tokenizer), [1, 2]
    else:
        messages, texts, ranks = to_messages(row, row["prompt"], tokenizer), row["responses"], row["ranks"]
        if not isinstance(texts, list) or not isinstance(ranks, list) or len(texts) != len(ranks):
            raise BadRow("responses and ranks are no lists of one length")
        dialogues = [[*messages, {"role": "assistant", "content": text}] for text in texts]
    margin = row.get("margin") or 0.0
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in (margin, *ranks)):
        raise BadRow("a rank or the margin is no number")
    if not better_pairs(ranks):
        raise BadRow("no response is ranked above another")
    return [{**encode_group(dialogues, tokenizer, stop_ids, args), "ranks": ranks, "margin": float(margin)}]


def encode_example(row: dict, tokenizer: Any, stop_ids: list[int], args: Any) -> list[dict]:
    """One row -> what encode_preference gives, or where --loss takes labels one response with "wins": [label]."""
    if LOSSES[args.loss].data != "labels" or (row.get("chosen") is not None and row.get("rejected") is not None):
        return encode_preference(row, tokenizer, stop_ids, args)
    if row["label"] not in (0, 1):
        raise BadRow("the label is neither 0 nor 1", repr(row["label"])[:40])
    answer = row["completion"]
    answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    turns = [*to_messages(row, row["prompt"], tokenizer), *to_messages({}, answer, tokenizer)]
    return [{**encode_group([turns], tokenizer, stop_ids, args), "ranks": [1], "wins": [float(row["label"])]}]


def better_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """All (i, j) with i ranked better than j.

    >>> better_pairs([2, 1, 2])
    [(1, 0), (1, 2)]
    """
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


def heldout_prompts(heldout: list[dict], tokenizer: Any, run: Run) -> list[dict]:
    """Up to --eval_samples prompts to answer: those of the held-out preferences, for tiny's preferences its own."""
    args = run.args
    if Path(args.dataset).resolve().parent == TINY and not args.eval_dataset:
        rows = load_examples(str(TINY / "prompts_eval.jsonl"), ["prompt"], encode_rl, tokenizer, [], run)
        return take(rows, range(min(args.eval_samples, len(rows))))
    ones = {str(e["prompt"]): {"ids": e["group"][0], "prompt": e["prompt"], "columns": {}} for e in heldout}
    return list(ones.values())[: args.eval_samples]


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


# ------------------------------------------------------------------------------------------------------------ flat rows
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


def preference_passes(examples: list[dict], model: Any, args: Any) -> list[tuple[list[dict], list[Row]]]:
    """Examples in passes that hold all responses of their prompts: one row of some prompts each, or where prompts can't
    share a row the rows of one prompt."""
    owners = [k for k, e in enumerate(examples) for _ in e["group"][1]]  # of the responses
    prompts, responses = [examples[k]["group"][0] for k in owners], [y for e in examples for y in e["group"][1]]
    numbers = iter(range(len(owners)))
    groups = [[next(numbers) for _ in e["group"][1]] for e in examples]
    if model.config.model_type not in FLAT_ROW_MODELS:
        return [([e], flat_rows([g], prompts, responses, model, 0)) for e, g in zip(examples, groups, strict=True)]
    rows = flat_rows(groups, prompts, responses, model, args.tokens_per_batch)
    return [([examples[k] for k in dict.fromkeys(owners[i] for i in row.numbers)], [row]) for row in rows]


# -------------------------------------------------------------------------------------------------- preferences in rows
def win_shares(ranks: Sequence[float]) -> list[float]:
    """The share of the other responses that each one is ranked above; ties count half.

    >>> win_shares([1, 2]), win_shares([2, 1, 2])
    ([1.0, 0.0], [0.25, 1.0, 0.25])
    """
    return [(sum((a < b) + 0.5 * (a == b) for b in ranks) - 0.5) / (len(ranks) - 1) for a in ranks]


def collate(examples: list[dict], model: Any, args: Any) -> list[Preferences]:
    """Examples as rows of whole groups, with their pairs and tables; the reference's log-probs are still 0."""
    batches = []
    for some, rows in preference_passes(examples, model, args):
        rows = sorted(rows, key=lambda row: row.numbers)  # the responses in the order of the examples
        pairs: list[tuple] = []
        responses: list[tuple] = []
        for number, e in enumerate(some):
            start, k, of_prompt = len(responses), len(e["ranks"]), better_pairs(e["ranks"])
            pairs += [(start + i, start + j, 1 / len(of_prompt)) for i, j in of_prompt]
            wins = e["wins"] if "wins" in e else win_shares(e["ranks"])
            responses += [(1 / k, rank, win, number) for rank, win in zip(e["ranks"], wins, strict=True)]
        lengths = torch.tensor([len(y) for e in some for y in e["group"][1]])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        columns = [*zip(*(pairs or [(0, 0, 0.0)]), strict=True), *zip(*responses, strict=True)]
        tensors = [*mask.nonzero(as_tuple=True), mask, torch.zeros(mask.shape), *map(torch.tensor, columns)]
        row, place, *others = (x.to(model.device) for x in tensors)
        batches.append(Preferences(rows, (row, place), *others))
    return batches


# --------------------------------------------------------------------------------- log-probs, loss and metrics of a row
def logprob_table(model: Any, pack: Preferences) -> Tensor:
    """Log-probs (S, T) of the responses in the active role, 0 where there is no token."""
    logprobs = torch.cat([token_logprobs(model, row)[0] for row in pack.rows])
    return logprobs.new_zeros(pack.mask.shape).index_put(pack.at, logprobs)


def response_logprobs(model: Any, who: str, pairs: list[tuple[list[int], list[int]]], args: Any) -> Tensor:
    """log pi(y|x) (S,) of pairs (x, y) in the role `who`, without gradients."""
    prompts, responses = [x for x, _ in pairs], [y for _, y in pairs]
    sums = torch.zeros(len(pairs), device=model.device)
    with role(model, who):
        for row in flat_rows([[i] for i in range(len(pairs))], prompts, responses, model, args.tokens_per_batch):
            sums.index_add_(0, row.at[0], token_logprobs(model, row)[0])
    return sums


def mismatched_pairs(batch: list[dict]) -> list[tuple[list[int], list[int]]]:
    """Each prompt with the responses of the next example of the batch that has another prompt (KTO's z_0)."""
    pairs = []
    for k, e in enumerate(batch):
        others = [o for o in [*batch[k + 1 :], *batch[:k]] if o["key"] != e["key"]]
        pairs += [(e["group"][0], y) for o in others[:1] for y in o["group"][1]]
    return pairs


def mismatched_kl(model: Any, batch: list[dict], run: Run) -> float:
    """KTO's estimate of KL(pi, pi_ref) in nats per response: the mean log-ratio of mismatched responses, at least 0."""
    pairs = mismatched_pairs(batch)[run.rank :: run.world]
    policy, reference = (response_logprobs(model, who, pairs, run.args) for who in ("policy", "reference"))
    total, n = run.total((policy - reference).sum().item(), len(pairs))
    return max(total / n, 0.0) if n else 0.0


def roles_in_pairs(pack: Preferences, args: Any) -> tuple[Tensor, Tensor]:
    """How much each response (S,) counts as a chosen one, and as a rejected one; each prompt counts 1 in all.

    With labels the liked ones are the chosen, the others the rejected.
    """
    if LOSSES[args.loss].data == "labels":
        return pack.share * pack.wins, pack.share * (1 - pack.wins)
    zeros = torch.zeros_like(pack.share)
    return zeros.index_add(0, pack.better, pack.weight), zeros.index_add(0, pack.worse, pack.weight)


def preference_sums(loss: Tensor, logprobs: Tensor, pack: Preferences, args: Any) -> Tensor:
    """(M, 2): each of METRICS summed over the prompts of a row, and the weight of what was summed.

    Rewards, and with them margin and accuracy, are beta times the log-ratio (no reference: the log-prob), whatever the
    loss makes of it.
    """
    lengths, logprob, n_prompts = pack.mask.sum(1).float(), logprobs.sum(1), pack.share.sum()
    if LOSSES[args.loss].reference:
        rewards = args.beta * (logprobs - pack.ref_logprobs).sum(1)
    else:  # simpo, orpo: the log-prob per token; cpo: the log-prob
        rewards = args.beta * logprob / (1 if args.loss == "cpo" else lengths)
    d = (rewards[pack.better] - rewards[pack.worse]).round(decimals=5)  # what differs by rounding alone is tied
    won = pack.weight @ torch.heaviside(d, torch.full_like(d, 0.5))
    kl = pack.share @ (old_new_kl(logprobs, pack.ref_logprobs) * pack.mask).sum(1)
    sums = [(loss, n_prompts), (won, pack.weight.sum()), (kl, n_prompts)]
    for weights in roles_in_pairs(pack, args):
        sums += [(weights @ x, weights.sum()) for x in (rewards, logprob, lengths)]
    return torch.stack([x for pair in sums for x in pair]).view(-1, 2)


def preference_metrics(sums: Tensor, run: Run) -> dict[str, float]:
    """Means over the prompts of all processes: loss, implicit rewards, margin, accuracy (a tie counts half), log-probs,
    lengths in tokens. ref_kl: KL(pi_ref, pi) in nats per response, if the responses were the reference's."""
    totals = run.total(*sums.flatten().tolist())
    found = zip(METRICS, totals[::2], totals[1::2], strict=True)
    metrics = {name: total / n if n else math.nan for name, total, n in found}
    if not LOSSES[run.args.loss].reference:
        del metrics["ref_kl"]
    return {**metrics, "margin": metrics["chosen_reward"] - metrics["rejected_reward"]}


# -------------------------------------------------------------------------------------------------- evaluation, samples
def measure_preferences(model: Any, heldout: list[dict], baseline: float, run: Run) -> dict[str, float]:
    """preference_metrics on held-out preferences, {} where there are none; `baseline` as in training (kto: new)."""
    if not heldout:
        return {}
    if run.args.loss == "kto":
        baseline = mismatched_kl(model, heldout, run)
    args, sums = run.args, torch.zeros(len(METRICS), 2, device=run.device)
    packs = collate(heldout[run.rank :: run.world], model, args)
    if LOSSES[args.loss].reference:
        with role(model, "reference"):
            packs = [pack._replace(ref_logprobs=logprob_table(model, pack)) for pack in packs]
    with role(model, "policy"):
        for pack in tqdm(packs, desc="held out", leave=False, disable=None):
            logprobs = logprob_table(model, pack)
            sums += preference_sums(preference_loss(logprobs, pack, baseline, args), logprobs, pack, args)
    return preference_metrics(sums, run)


def answer(model: Any, tokenizer: Any, stop_ids: list[int], prompts: list[dict], gold: Any, args: Any) -> dict:
    """A response of the policy to each held-out prompt: arrays over prompts, and the texts."""
    responses = generate(model, tokenizer, [p["ids"] for p in prompts], stop_ids, args)
    pairs = [(p["ids"], y) for p, y in zip(prompts, responses, strict=True)]
    policy, reference = (response_logprobs(model, who, pairs, args) for who in ("policy", "reference"))
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    result = {"kl": (policy - reference).double().cpu().numpy(), "length": np.array([float(len(y)) for y in responses])}
    result |= {"gold": call_function(gold, prompts, texts)} if gold else {}
    return {**result, "ended": np.array([float(y[-1] in stop_ids) for y in responses]), "texts": texts}


def check_start(before: dict, args: Any) -> None:
    """An untrained policy is the reference, to rounding, on held-out preferences."""
    if before and LOSSES[args.loss].reference:
        per_token = [before[f"{name}_reward"] / before[f"{name}_length"] for name in ("chosen", "rejected")]
        gap = max(abs(x) for x in per_token if x == x) / args.beta  # labels may be all of one kind
        limit = 1e-4 if args.dtype == "float32" else 0.02
        text = f"log-ratio per token at the start {gap:.3g} (limit {limit:g})"
        check(gap <= limit, f"preflight: {text}: the policy is not the reference")
        print(f"preflight: ok  {text}")


def generate(model: Any, tokenizer: Any, prompts: list[list[int]], stop_ids: list[int], args: Any) -> list[list[int]]:
    """Responses of the policy by transformers' generate at temperature 1, 16 at a time; the stop token is kept."""
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    longest = min(args.max_response_length, positions - max(map(len, prompts), default=0))
    settings = GenerationConfig(  # what is not given here comes from the model's own generation_config.json
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=longest,
        eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    attention, responses = model.config._attn_implementation, []
    model.set_attn_implementation("sdpa" if attention == "flex_attention" else attention)  # it compiles for each length
    torch.manual_seed(args.seed)
    with role(model, "policy"):
        for i in tqdm(range(0, len(prompts), 16), desc="samples", leave=False, disable=None):
            batch = tokenizer.pad({"input_ids": prompts[i : i + 16]}, padding_side="left", return_tensors="pt")
            output = model.generate(**batch.to(model.device), generation_config=settings)
            responses += output[:, batch["input_ids"].shape[1] :].tolist()
    model.set_attn_implementation(attention)
    ends = [next((t + 1 for t, token in enumerate(y) if token in stop_ids), len(y)) for y in responses]
    return [y[:end] for y, end in zip(responses, ends, strict=True)]


def compare_preferences(before: dict, after: dict, n: int, args: Any) -> dict[str, Any]:
    """Held-out preferences before and after training, printed and for result.json; the accuracy with its 95 % interval;
    a warning where the chosen responses became much less likely."""
    table: dict[str, Any] = {"preferences": n}
    print(f"\n{f'{n} held-out preferences':26}{'before':>28}{'after':>28}")
    for name in [name for name in before if before[name] == before[name]]:  # labels have no accuracy
        table[name] = [[x[name], *(wilson_interval(x[name], n) if name == "accuracy" else ())] for x in (before, after)]
        cells = [" ".join(f"{x:.3f}" for x in cell) for cell in table[name]]
        print(f"{name:26}{cells[0]:>28}{cells[1]:>28}")
    fall = before["chosen_logprob"] - after["chosen_logprob"]
    if args.loss != "apo_down" and fall > 0.1 * abs(before["chosen_logprob"]):
        remedy = "--nll_coef 1 (RPO), nca or a larger --beta hold it"  # the mass goes to text that nobody ranked
        print(f"warning: the chosen responses lost {fall:.1f} nats of log-prob; a margin grows so, too; {remedy}")
    return table


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
