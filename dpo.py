# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "bitsandbytes==0.50.2", "peft==0.21.2",
#     "accelerate==1.15.0", "safetensors", "numpy", "matplotlib"]
# ///
"""DPO and its family: learning from preferences without a reward model (Rafailov et al. 2023), offline and online.

The optimal policy for a reward r under a KL penalty of weight beta is pi(y|x) ~ pi_ref(y|x) exp(r(x, y) / beta).
Turned around, every policy is the optimal one for some reward, its implicit reward

    r(x, y) = beta log pi_theta(y|x) / pi_ref(y|x)   + a constant of x, which differences do not see

and the reward model's likelihood of a preference y_w > y_l can be maximised in the policy itself:

    L(theta) = - mean over prompts x, mean over the pairs y_w > y_l of x, of   log sigma( r(x, y_w) - r(x, y_l) )

`--loss` puts other functions of the same log-probs in the place of -log sigma: a few lines each, with their papers, in
"the maths" below. Each step:

    1. a batch of prompts with responses and preferences: from the data set, or --online: sampled from pi_theta, scored
       by a reward model or function, and ranked by the scores
    2. log pi_ref of the responses: computed once per data set and cached on disk (online: now)
    3. log pi_theta of the responses, the loss, its gradient as the mean over the batch's prompts
    4. one update of the policy; every --sync_ref_every steps the reference becomes the policy (TR-DPO)

    python dpo.py                                         # the embedded world in tiny/, a minute on two cores
    python dpo.py --model runs/sft --dataset HuggingFaceH4/ultrafeedback_binarized --dataset_split train_prefs \\
                  --learning_rate 1e-5 --max_response_length 512 --batch_size 64 --micro_batch_size 2
    python dpo.py --loss kto --model runs/sft --dataset votes.jsonl
    python dpo.py --online --model runs/sft --reward_model runs/reward --dataset prompts.jsonl

Data (hub id, or local .jsonl, .json, .parquet; one of these column sets):
    prompt, chosen, rejected      strings or message lists, of which the last message counts
    chosen, rejected              two whole dialogues, message lists or hh-rlhf's "\\n\\nHuman: ...\\n\\nAssistant: ..."
    prompt, responses, ranks      K responses and their ranks: 1 = best, equal = tie
    prompt, completion, label     one response, liked (true, 1) or not (kto); or its reward, a number (dro)
    prompt                        --online

Writes runs/dpo/: the policy's adapter in PEFT's format, tokenizer, args.json, metrics.jsonl, timing.jsonl, curves.png,
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
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus
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
    "rdpo": Loss("pairs", True, 0.1), "ld": Loss("pairs", True, 0.1), "tdpo1": Loss("pairs", True, 0.1),
    "tdpo2": Loss("pairs", True, 0.1), "orpo": Loss("pairs", False, 0.1, 1.0), "simpo": Loss("pairs", False, 2.0),
    "cpo": Loss("pairs", False, 0.1, 1.0), "kto": Loss("labels", True, 0.1), "dro": Loss("labels", True, 0.1),
    "lipo": Loss("lists", True, 0.1), "plackett_luce": Loss("lists", True, 0.1),
}  # fmt: skip
LossName = Literal[
    "sigmoid", "robust", "ipo", "hinge", "nca", "apo_zero", "apo_down", "sppo", "bco", "rdpo", "ld", "tdpo1", "tdpo2",
    "orpo", "simpo", "cpo", "kto", "dro", "lipo", "plackett_luce",
]  # fmt: skip
SMOOTHED = ("sigmoid", "robust", "simpo", "cpo")  # losses with --label_smoothing
SHOWN = ("loss", "accuracy", "margin", "chosen_logprob", "score", "gold", "kl")  # in the line of a step
DIVERGENT = ("sigmoid", "robust", "hinge", "rdpo")  # losses with --f_divergence: those of a difference of rewards


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
    dataset: str = arg(str(TINY / "preferences.jsonl"), "training data: hub id or local .jsonl, .json, .parquet")
    dataset_split: str = arg("train", "split of a hub dataset")
    eval_dataset: str | None = arg(None, "held-out data; default: --eval_size of the training data, split by prompt")
    eval_size: float = arg(0.05, "held-out share (below 1) or number of rows where no --eval_dataset is given")
    eval_samples: int = arg(256, "held-out prompts that reference and policy answer at the end; 0: none")
    max_prompt_length: int = arg(512, "longer prompts are dropped and counted, never cut (tokens)")
    max_response_length: int = arg(128, "longest response (tokens)")
    cache_dir: str = arg("runs/cache", "where the reference's log-probs of a data set are kept, named by content")
    # loss
    loss: LossName = arg("sigmoid", "see LOSSES: what it learns from, whether it needs the reference")
    beta: float | None = arg(
        None, "reward per nat of log-ratio (ipo: tau, orpo: lambda); default: the loss's, see LOSSES"
    )
    nll_coef: float | None = arg(
        None, "weight of the chosen responses' NLL per token (RPO); default: 1 in orpo and cpo"
    )
    label_smoothing: float = arg(0.0, "share of the labels taken to be wrong, in losses that allow it")
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = arg(
        "reverse_kl", "divergence from the reference (sigmoid, robust, hinge, rdpo)"
    )
    f_alpha: float = arg(0.5, "--f_divergence alpha: 0 = reverse KL, 1 = forward KL")
    length_alpha: float = arg(0.02, "rdpo: reward that a token of length counts for")
    ld_alpha: float = arg(0.5, "ld: weight of the tokens beyond the shorter response's length; 1: plain DPO")
    tdpo_alpha: float = arg(0.5, "tdpo2: weight of the difference in sequential KL")
    simpo_gamma: float = arg(1.0, "simpo: margin that the rewards shall differ by")
    desirable_weight: float = arg(1.0, "kto: weight of liked responses")
    undesirable_weight: float = arg(1.0, "kto: weight of the others")
    sync_ref_every: int = arg(0, "the reference becomes the policy every so many steps; 0: never")
    # online
    online: bool = arg(
        False, "sample responses from the policy and rank them by reward, instead of a preference data set"
    )
    pairs: Literal["best_worst", "all"] | None = arg(
        None, "online: which samples of a prompt are compared; default: all in lipo and plackett_luce, else best_worst"
    )
    samples_per_prompt: int = arg(4, "responses per prompt; the prompt is computed once for all of them")
    temperature: float = arg(1.0, "of sampling and of every log-prob; no top-k or top-p, which would bias the ratio")
    sample_batch_size: int = arg(128, "responses decoded at once: memory, not the result")
    missing_eos_penalty: float = arg(1.0, "subtracted from the score of a response that did not end")
    # optimisation
    learning_rate: float = arg(1e-3, "peak learning rate; for LoRA on 7B: sft 2e-4, reward 1e-4, dpo 1e-5, RL 2e-5")
    warmup_ratio: float = arg(0.05, "share of the steps with rising learning rate; cosine to a tenth after it")
    weight_decay: float = arg(0.0, "AdamW weight decay")
    max_grad_norm: float = arg(1.0, "gradients longer than this are scaled down to it")
    batch_size: int = arg(
        32, "examples per step, all processes together (reward, dpo: prompts with all their pairs; RL: responses)"
    )
    micro_batch_size: int = arg(
        16, "rows (reward, dpo: prompts; RL: responses) per forward pass: memory, not the result"
    )
    tokens_per_micro_batch: int = arg(
        0, "most tokens per training pass, padding included; a longer example goes alone; 0: any number"
    )
    epochs: float = arg(0.75, "passes over the dataset")
    max_steps: int = arg(0, "stop after this many steps; 0: no limit; the smaller bound wins")
    # run
    output_dir: str = arg("runs/dpo", "run folder; an existing one is renamed unless --resume")
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
# Shapes: P pairs; S responses; T response tokens, mask (S, T): 1 = a real token of the response, its end included.
# chosen, rejected (P,): log-ratios log pi(y|x) - log pi_ref(y|x) of whole responses, where nothing else is said. Every
# loss is per pair (P,) or per response (S,), except the two of lists.


# Shapes: B responses, T response tokens. mask (B, T): 1 = a real token of the response (its end token included).
def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the positions with mask 1; x, mask (B, T) -> scalar.

    >>> masked_mean(torch.tensor([[1.0, 3.0], [5.0, 99.0]]), torch.tensor([[1, 1], [1, 0]]))
    tensor(3.)
    """
    return (x * mask).sum() / mask.sum()


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


def robust_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """robust: ((1 - e) l(d) - e l(-d)) / (1 - 2e), l(d) = -log sigma(d): unbiased when a share e < 1/2 is mislabelled.

    Chowdhury et al. 2024 (rDPO, arXiv 2403.00409).

    >>> robust_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.0, -7.0]), 0.1, 0.25)  # 0.3133 - 0.25 / 0.5
    tensor([ 0.6931, -0.1867])
    """
    d = beta * (chosen - rejected)
    return ((1 - label_smoothing) * softplus(-d) - label_smoothing * softplus(d)) / (1 - 2 * label_smoothing)


def ipo_loss(chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor, tau: float) -> Tensor:
    """ipo: (chosen/|y_w| - rejected/|y_l| - 1/(2 tau))^2: the margin is regressed on a target and stops growing there.

    Azar et al. 2023 (IPO), eq. 17, with log-ratios per token, as TRL has it after asking the authors: tau 0.5 aims at
    one nat per token.

    >>> ipo_loss(torch.tensor([10.0]), torch.tensor([-4.0]), torch.tensor([5]), torch.tensor([2]), 0.1)  # 2 + 2 - 5
    tensor([1.])
    """
    return (chosen / chosen_length - rejected / rejected_length - 1 / (2 * tau)) ** 2


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

    Wu et al. 2024 (self-play preference optimisation), eq. 4.7, eta = 1 / beta. Offline, p is 1 or 0.

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


def rdpo_loss(chosen: Tensor, rejected: Tensor, longer: Tensor, beta: float, length_alpha: float) -> Tensor:
    """rdpo: -log sigma(r_w - r_l + alpha (|y_w| - |y_l|)): what length alone explains is not learnt.

    Park et al. 2024 (R-DPO, arXiv 2403.19159), from the objective r - alpha |y|. longer (P,) = |y_w| - |y_l| in tokens.

    >>> rdpo_loss(torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([50]), 0.1, 0.02)
    tensor([0.3133])
    """
    return bradley_terry_loss(beta * chosen, beta * rejected, -length_alpha * longer, 0.0)


def length_desensitised(x: Tensor, mask: Tensor, shared_length: Tensor, ld_alpha: float) -> Tensor:
    """ld: log-ratios per token x (P, T) summed, those beyond shared_length (P,) with weight ld_alpha -> (P,).

    Liu et al. 2024 (LD-DPO, arXiv 2409.06411); shared_length is the length of the pair's shorter response.

    >>> length_desensitised(torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3), torch.tensor([1]), 0.5)
    tensor([4.])
    """
    beyond = torch.arange(x.shape[1], device=x.device) >= shared_length[:, None]
    return (x * mask * torch.where(beyond, ld_alpha, 1.0)).sum(1)


def tdpo_loss(
    chosen: Tensor, rejected: Tensor, chosen_kl: Tensor, rejected_kl: Tensor, beta: float, alpha: float | None
) -> Tensor:
    """tdpo1, tdpo2: -log sigma(r_w - r_l - a beta (KL_l - KL_w)), KL: the sum over y of KL(pi_ref, pi) at its tokens.

    Zeng et al. 2024 (token-level DPO), eq. 17 (alpha None: a = 1) and eq. 20 (KL_w without gradient).

    >>> zero, five = torch.tensor([0.0]), torch.tensor([5.0])
    >>> tdpo_loss(five, -five, zero, 2 * five, 0.1, None), tdpo_loss(five, -five, zero, 2 * five, 0.1, 0.0)
    (tensor([0.6931]), tensor([0.3133]))
    """
    margin = rejected_kl - chosen_kl if alpha is None else alpha * (rejected_kl - chosen_kl.detach())
    return bradley_terry_loss(beta * chosen, beta * rejected, beta * margin, 0.0)


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


def dro_loss(log_ratio: Tensor, values: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """dro: 1/2 (reward - V(x) - beta log-ratio)^2 per response (S,): both sides of the optimum's equation meet.

    Richemond et al. 2024 (DRO-V, arXiv 2405.19107), tau = beta. For the policy it is divided by beta, which leaves its
    gradient -(reward - V) grad log pi at the start.

    >>> dro_loss(torch.tensor([5.0]), torch.tensor([0.1]), torch.tensor([1.0]), 0.1)  # (1 - 0.1 - 0.5)^2 / 2
    tensor([0.0800])
    """
    return 0.5 * (rewards - values - beta * log_ratio) ** 2


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


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); n counts independent trials.

    >>> [round(x, 2) for x in wilson_interval(0.5, 4)]  # (0.5 + 0.48 -+ 1.96 sqrt(0.0625 + 0.06)) / 1.96
    [0.15, 0.85]
    """
    z = 1.959964
    middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


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


# ----------------------------------------------------------------------------------------------------- preferences


def split_dialogue(dialogue: str | list[dict]) -> tuple[list[dict], str]:
    """(messages before, content) of the last assistant turn of a message list, or of a text in hh-rlhf's form."""
    if isinstance(dialogue, str):
        _, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", dialogue)
        roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
        dialogue = [{"role": role, "content": text.strip()} for role, text in zip(roles, parts[1::2], strict=True)]
    messages = to_messages(dialogue)
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("no dialogue that ends with an assistant turn")
    return messages[:-1], messages[-1]["content"]


def read_pair(row: dict) -> tuple[Any, list[str]]:
    """(prompt, [chosen, rejected]) of a row with an explicit prompt or with two whole dialogues."""
    if row.get("prompt") is not None:
        texts = [t if isinstance(t, str) else split_dialogue(t)[1] for t in (row["chosen"], row["rejected"])]
        prompt = row["prompt"]
    else:
        (prompt, chosen), (other, rejected) = split_dialogue(row["chosen"]), split_dialogue(row["rejected"])
        if prompt != other:
            raise BadRow("pair with differing prompts")
        texts = [chosen, rejected]
    if texts[0] == texts[1]:
        raise BadRow("identical pair")
    return prompt, texts


def encode_group(prompt: Any, texts: list[str], tokenizer: Any, stop_ids: list[int], args: Any) -> Group:
    """A prompt and the responses to it as token ids; BadRow where one is empty or too long."""
    messages = to_messages(prompt)
    if not messages or not all(isinstance(t, str) and t.strip() for t in (messages[-1]["content"], *texts)):
        raise BadRow("empty prompt or response")
    ids, responses = encode_prompt(tokenizer, prompt), [encode_response(tokenizer, prompt, t, stop_ids) for t in texts]
    if len(ids) > args.max_prompt_length or max(map(len, responses)) > args.max_response_length:
        raise BadRow(f"prompt over {args.max_prompt_length} or response over {args.max_response_length} tokens")
    return ids, responses


def encode_preference(row: dict, tokenizer: Any, stop_ids: list[int], args: Any) -> list[dict]:
    """One row -> [{"group", "ranks", "margin", "key", and the row's "id", "prompt", "texts", "subset"}]."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        (prompt, texts), ranks = read_pair(row), [1, 2]
    else:
        prompt, texts, ranks = row["prompt"], row["responses"], row["ranks"]
        if not isinstance(texts, list) or not isinstance(ranks, list) or len(texts) != len(ranks):
            raise BadRow("responses and ranks are no lists of one length")
    margin = row.get("margin") or 0.0
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in (margin, *ranks)):
        raise BadRow("a rank or the margin is no number")
    if not better_pairs(ranks):
        raise BadRow("no response is ranked above another")
    group = encode_group(prompt, texts, tokenizer, stop_ids, args)
    key = json.dumps([m for m in to_messages(prompt) if m["role"] != "system"][:1])
    example = {"group": group, "ranks": ranks, "margin": float(margin), "key": key, "prompt": prompt, "texts": texts}
    row_id = row["_row"] if row.get("id") is None else row["id"]
    return [{**example, "id": row_id, "subset": str(row.get("subset") or "")}]


def encode_label(row: dict, tokenizer: Any, stop_ids: list[int], args: Any) -> list[dict]:
    """One row with a single labelled response -> [{"group", "wins": [label], ...}]."""
    label = row["label"]
    if not isinstance(label, bool | int | float) or not math.isfinite(label):
        raise BadRow("the label is neither true, false nor a number", repr(label)[:40])
    if args.loss == "kto" and label not in (0, 1):
        raise BadRow("the label is neither 0 nor 1", repr(label)[:40])
    text = row["completion"] if isinstance(row["completion"], str) else split_dialogue(row["completion"])[1]
    group = encode_group(row["prompt"], [text], tokenizer, stop_ids, args)
    key = json.dumps([m for m in to_messages(row["prompt"]) if m["role"] != "system"][:1])
    return [{"group": group, "ranks": [1], "wins": [float(label)], "key": key, "prompt": row["prompt"], "label": True}]


def better_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """All (i, j) with i ranked better than j.

    >>> better_pairs([2, 1, 2])
    [(1, 0), (1, 2)]
    """
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


def win_shares(ranks: Sequence[float]) -> list[float]:
    """The share of the other responses that each one is ranked above; ties count half.

    >>> win_shares([1, 2]), win_shares([2, 1, 2])
    ([1.0, 0.0], [0.25, 1.0, 0.25])
    """
    return [(sum((a < b) + 0.5 * (a == b) for b in ranks) - 0.5) / (len(ranks) - 1) for a in ranks]


class Preferences(NamedTuple):
    """S responses to the prompts of a micro-batch, P pairs (i better than j) of them, and their token rows."""

    rows: Rows
    ref_logprobs: Tensor  # (S, T), 0 where the loss has no reference
    shared: bool  # whether rows hold several responses
    better: Tensor  # (P,), index of i among the S
    worse: Tensor  # (P,), index of j
    weight: Tensor  # (P,), 1 / number of pairs of the prompt, so that each prompt counts once
    share: Tensor  # (S,), 1 / number of responses to the prompt
    ranks: Tensor  # (S,), 1 = best
    wins: Tensor  # (S,), probability that the response is preferred; or its label
    prompt: Tensor  # (S,), number of the prompt


def collate(examples: list[dict], ref_logprobs: list[list[Tensor]], model: Any, pad_id: int) -> Preferences:
    """Examples and their reference log-probs, a tensor per response ([] where there are none), as one micro-batch."""
    groups = [e["group"] for e in examples]
    width = row_width(groups, model.get_base_model().config)
    rows = lay_out(groups, width, pad_id, model.device)
    pairs: list[tuple] = []
    responses: list[tuple] = []
    for number, e in enumerate(examples):
        start, k = len(responses), len(e["group"][1])
        of_prompt = better_pairs(e["ranks"])
        pairs += [(start + i, start + j, 1 / len(of_prompt)) for i, j in of_prompt]
        wins = e["wins"] if "wins" in e else win_shares(e["ranks"])
        responses += [(1 / k, rank, win, number) for rank, win in zip(e["ranks"], wins, strict=True)]
    columns = [*zip(*(pairs or [(0, 0, 0.0)]), strict=True), *zip(*responses, strict=True)]
    tensors = [torch.tensor(column, device=model.device) for column in columns]
    reference = torch.zeros(rows.mask.shape)
    for s, y in enumerate(y for of_prompt in ref_logprobs for y in of_prompt):
        reference[s, : len(y)] = y
    return Preferences(rows, reference.to(model.device), width > 0, *tensors)


def group_tokens(group: Group) -> int:
    """Tokens of a prompt and the responses to it."""
    return len(group[0]) + sum(map(len, group[1]))


def group_batches(groups: list[Group], config: Any, args: Any) -> list[list[int]]:
    """Numbers of the groups for each pass; like with like where rows are padded, packed rows fill better mixed."""
    order = list(range(len(groups)))
    if config.model_type not in SHARED_ROW_MODELS:
        order.sort(key=lambda g: group_tokens(groups[g]))
    return micro_batches(order, lambda some: cheapest_rows([groups[g] for g in some], config)[1], args)


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


def response_states(model: Any, rows: Rows) -> Tensor:
    """(N, d): the states that predict the N supervised tokens, those of each response in a row."""
    return hidden_states(model, rows).flatten(0, 1).index_select(0, rows.state[rows.mask.bool()])


def logprobs_and_kl(model: Any, rows: Rows, ref_states: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (S, T) under the active role and the reference; KL(pi_ref, pi) summed over a response's tokens, (S,).

    ref_states (N, d) are the reference's `response_states`; logits are computed in chunks, as in chunked_logprobs.
    """
    real, states, causal_lm = rows.mask.bool(), response_states(model, rows), model.get_base_model()

    def one_chunk(h: Tensor, ref_h: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        logp, ref_logp = (lm_logits(model, x).float().div_(temperature).log_softmax(-1) for x in (h, ref_h))
        of_target = [x.gather(-1, target[:, None]).squeeze(-1) for x in (logp, ref_logp)]
        return *of_target, (ref_logp.exp() * (ref_logp - logp)).sum(-1)

    size = logits_chunk(causal_lm.config)
    chunks = list(zip(states.split(size), ref_states.split(size), rows.targets[real].split(size), strict=True))
    parts = [checkpoint(one_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    joined = (torch.cat(values) for values in zip(*parts, strict=True))
    logprobs, ref_logprobs, kl = (torch.zeros(real.shape, device=v.device).masked_scatter(real, v) for v in joined)
    return logprobs, ref_logprobs, kl.sum(1)


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


def head_values(model: Any, head: nn.Linear, rows: Rows) -> Tensor:
    """(S, T): the head applied, in fp32, to the state that stands before each response token; 0 where the mask is 0."""
    real = rows.mask.bool()
    states = hidden_states(model, rows).flatten(0, 1).index_select(0, rows.state[real])
    return torch.zeros(real.shape, device=states.device).masked_scatter(real, head(states.float()).squeeze(-1))


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


# ------------------------------------------------------------------------------------------------------- reference
def group_logprobs(model: Any, who: str, groups: list[Group], pad_id: int, args: Args) -> list[list[Tensor]]:
    """log pi of each group's responses in the role `who`, without gradients: a tensor (T,) on the CPU per response."""
    # Whatever --micro_batch_size is: a cache must not depend on it. The longest first: too long shows at once.
    order = sorted(range(len(groups)), key=lambda g: -group_tokens(groups[g]))
    costs = [len(ys) * (len(prompt) + max(map(len, ys))) for prompt, ys in groups]  # tokens of padded rows
    batches: list[list[int]] = []
    for g in order:
        if not batches or (len(batches[-1]) + 1) * max(costs[k] for k in [*batches[-1], g]) > 2**12:
            batches.append([])
        batches[-1].append(g)
    result: list[list[Tensor]] = [[] for _ in groups]
    with role(model, who):
        for part in batches:
            some = [groups[g] for g in part]
            rows = lay_out(some, row_width(some, model.get_base_model().config), pad_id, model.device)
            logprobs = iter(response_logprobs(model, rows, args.temperature)[0].cpu())
            for g in part:
                result[g] = [next(logprobs)[: len(y)].clone() for y in groups[g][1]]
    return result


def cached_logprobs(
    model: Any, examples: list[dict], base: str, adapter: Path | None, pad_id: int, args: Args, accelerator: Accelerator
) -> list[list[Tensor]]:
    """The reference's log-probs of a data set, from a file in --cache_dir or computed once and written there.

    The file's name is a hash of all that decides them: base, adapter, precision, temperature and every token id.
    """
    if not examples:
        return []
    groups = [e["group"] for e in examples]
    weights = (adapter / "adapter_model.safetensors").read_bytes() if adapter else b""
    config = model.peft_config["reference"].to_dict() if adapter else None
    device = model.device.type  # not its number: every process must find the same file
    settings = [base_identity(base), args.revision, config, args.quant, args.dtype, device, args.temperature]
    digest = hashlib.sha256(json.dumps(settings, default=lambda v: sorted(map(str, v))).encode() + weights)
    for group in groups:
        digest.update(json.dumps(group).encode())
    path = Path(args.cache_dir) / f"ref_logprobs_{digest.hexdigest()[:16]}.safetensors"
    with accelerator.main_process_first():  # the others find the file
        try:
            flat = load_file(path)["logprobs"]
            print(f"reference: {len(flat)} log-probs from {path}")
        except (FileNotFoundError, SafetensorError):
            start = time.time()
            print(f"reference: computing the log-probs of {len(groups)} examples, once", flush=True)
            flat = torch.cat(
                [y for of_prompt in group_logprobs(model, "reference", groups, pad_id, args) for y in of_prompt]
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, lambda temporary: save_file({"logprobs": flat}, temporary))
            print(f"reference: {len(flat)} log-probs computed in {time.time() - start:.0f} s, kept in {path}")
    parts = iter(flat.split([len(y) for _, responses in groups for y in responses]))
    return [[next(parts) for _ in responses] for _, responses in groups]


def mismatched_groups(batch: list[dict]) -> list[Group]:
    """Each prompt with the responses of the next example of the batch that has another prompt (KTO's z_0)."""
    groups = []
    for k, e in enumerate(batch):
        others = [*batch[k + 1 :], *batch[:k]]
        groups += [(e["group"][0], o["group"][1]) for o in others if o["key"] != e["key"]][:1]
    return groups


def mismatched_kl(model: Any, groups: list[Group], pad_id: int, args: Args, accelerator: Accelerator) -> float:
    """KTO's estimate of KL(pi, pi_ref) in nats per response: the mean log-ratio of mismatched responses, at least 0."""
    sums = []
    for who in ("policy", "reference"):
        of_groups = group_logprobs(model, who, groups, pad_id, args)
        sums.append([y.sum().item() for of_prompt in of_groups for y in of_prompt])
    total, n = global_sums(accelerator, sum(sums[0]) - sum(sums[1]), len(sums[0]))
    return max(total / n, 0.0) if n else 0.0


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


# ------------------------------------------------------------------------------------------------ loss of a batch
def roles_in_pairs(batch: Preferences, args: Any) -> tuple[Tensor, Tensor]:
    """How much each response (S,) counts as a chosen one, and as a rejected one; each prompt counts 1 in all.

    Labels: chosen is a label above 1/2, for dro's rewards too.
    """
    if LOSSES[args.loss].data == "labels":
        liked = (batch.wins > 0.5).float()
        return batch.share * liked, batch.share * (1 - liked)
    zeros = torch.zeros_like(batch.share)
    return zeros.index_add(0, batch.better, batch.weight), zeros.index_add(0, batch.worse, batch.weight)


def implicit_rewards(logprobs: Tensor, batch: Preferences, args: Any) -> Tensor:
    """(S, T) -> (S,): beta times the log-ratio; simpo, orpo: the log-prob per token; cpo: the log-prob."""
    if LOSSES[args.loss].reference:
        return args.beta * (logprobs - batch.ref_logprobs).sum(1)
    return args.beta * logprobs.sum(1) / (1 if args.loss == "cpo" else batch.rows.mask.sum(1))


def preference_loss(
    logprobs: Tensor, batch: Preferences, kl: Tensor, values: Tensor, baseline: float, args: Any
) -> Tensor:
    """Log-probs (S, T) -> the loss --loss, summed over the prompts of the micro-batch.

    kl (S,): sequential KL (tdpo); values (S,): V(x) (dro); baseline: KL estimate (kto), mean reward (bco).
    """
    mask, beta, smoothing = batch.rows.mask, args.beta, args.label_smoothing
    logprobs, lengths = logprobs * mask, mask.sum(1)
    log_ratios = logprobs - batch.ref_logprobs
    logprob, log_ratio = logprobs.sum(1), log_ratios.sum(1)

    def pick(x: Tensor) -> tuple[Tensor, Tensor]:  # of the better and of the worse response of each pair
        return x.index_select(0, batch.better), x.index_select(0, batch.worse)

    (h_w, h_l), (n_w, n_l), (kl_w, kl_l) = pick(log_ratio), pick(lengths), pick(kl)
    logprob_w, logprob_l = pick(logprob)
    mean_w, mean_l = pick(logprob / lengths)
    if args.f_divergence != "reverse_kl":
        h_w, h_l = (divergence_score(h, args.f_divergence, args.f_alpha) for h in (h_w, h_l))
    if args.loss == "ld":
        (tokens_w, tokens_l), (mask_w, mask_l), shorter = pick(log_ratios), pick(mask), torch.minimum(n_w, n_l)
        h_w = length_desensitised(tokens_w, mask_w, shorter, args.ld_alpha)
        h_l = length_desensitised(tokens_l, mask_l, shorter, args.ld_alpha)
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
        "tdpo1": lambda: tdpo_loss(h_w, h_l, kl_w, kl_l, beta, None),
        "tdpo2": lambda: tdpo_loss(h_w, h_l, kl_w, kl_l, beta, args.tdpo_alpha),
        "orpo": lambda: orpo_loss(mean_w, mean_l, beta),
        "simpo": lambda: simpo_loss(mean_w, mean_l, beta, args.simpo_gamma, smoothing),
        "cpo": lambda: cpo_loss(logprob_w, logprob_l, beta, smoothing),
        "kto": lambda: kto_loss(
            log_ratio, batch.wins, baseline, beta, args.desirable_weight, args.undesirable_weight
        ),
        "dro": lambda: dro_loss(log_ratio, values, batch.wins, beta) / beta,
        "sppo": lambda: 2 * batch.share * sppo_loss(log_ratio, batch.wins, beta),  # any K counts as a pair
        "lipo": lambda: lipo_loss(beta * log_ratio, batch.wins, batch.prompt),
        "plackett_luce": lambda: plackett_luce_loss(beta * log_ratio, batch.ranks, batch.prompt),
    }  # fmt: skip
    weights = {"pairs": batch.weight, "labels": batch.share, "lists": torch.ones_like(batch.share)}
    loss = (weights[LOSSES[args.loss].data] * losses[args.loss]()).sum()
    return loss - args.nll_coef * (roles_in_pairs(batch, args)[0] * logprob / lengths).sum()


SUMS = (  # what preference_metrics needs, in preference_sums' order
    "loss", "won", "pairs", "kl", "prompts", "shared",
    "chosen", "chosen_reward", "chosen_logprob", "chosen_length",
    "rejected", "rejected_reward", "rejected_logprob", "rejected_length",
)  # fmt: skip


def preference_sums(loss: Tensor, logprobs: Tensor, batch: Preferences, args: Any) -> Tensor:
    """The SUMS over the prompts of a micro-batch; `chosen` and `rejected` are the weights that the next three have."""
    chosen, rejected = roles_in_pairs(batch, args)
    rewards, lengths = implicit_rewards(logprobs, batch, args), batch.rows.mask.sum(1).float()
    d = (rewards[batch.better] - rewards[batch.worse]).round(decimals=5)  # what differs by rounding alone is tied
    won = (batch.weight * torch.heaviside(d, torch.full_like(d, 0.5))).sum()
    kl = (old_new_kl(logprobs, batch.ref_logprobs) * batch.rows.mask).sum(1)
    sums = [u @ x for u in (chosen, rejected) for x in (torch.ones_like(rewards), rewards, logprobs.sum(1), lengths)]
    prompts = batch.share.sum()
    return torch.stack([loss, won, batch.weight.sum(), batch.share @ kl, prompts, prompts * batch.shared, *sums])


def preference_metrics(sums: Sequence[float], args: Any) -> dict[str, float]:
    """Means over prompts: loss, implicit rewards, margin, accuracy (a tie counts half), log-probs, lengths in tokens.

    shared_rows: share of prompts in rows that hold several responses. ref_kl: KL(pi_ref, pi) in nats per response, if
    the responses were the reference's (`old_new_kl`).
    """
    total = dict(zip(SUMS, sums, strict=True))

    def mean(name: str, of: str) -> float:
        return total[name] / total[of] if total[of] else math.nan

    metrics = {"loss": mean("loss", "prompts")}
    for role_name in ("chosen", "rejected"):
        for key in ("reward", "logprob", "length"):
            metrics[f"{role_name}_{key}"] = mean(f"{role_name}_{key}", role_name)
    metrics["margin"] = metrics["chosen_reward"] - metrics["rejected_reward"]
    metrics["accuracy"] = mean("won", "pairs")
    metrics["shared_rows"] = mean("shared", "prompts")
    if LOSSES[args.loss].reference and total["prompts"] and not args.online:  # the policy's samples have their own KL
        metrics["ref_kl"] = mean("kl", "prompts")
    return metrics


def prompt_values(model: Any, head: nn.Linear, examples: list[dict], pad_id: int) -> Tensor:
    """V(x) of each response's prompt (S,) under the active role; a prompt is read once, with one token after it."""
    groups = [(e["group"][0], [e["group"][1][0][:1]]) for e in examples]
    rows = lay_out(groups, row_width(groups, model.get_base_model().config), pad_id, model.device)
    values = head_values(model, head, rows)[:, 0]  # before the first token
    counts = torch.tensor([len(e["group"][1]) for e in examples], device=model.device)
    return values.repeat_interleave(counts)


def preference_pass(
    model: Any, value_head: nn.Linear | None, examples: list[dict], references: list[list[Tensor]] | None,
    n_prompts: float, baseline: float, pad_id: int, args: Any, grad: bool,
) -> np.ndarray:  # fmt: skip
    """preference_sums of some examples; grad: accumulate the gradient of the mean over n_prompts.

    `references` None: the reference's log-probs are computed here, where the loss needs them (always by tdpo).
    """
    sums, tdpo = np.zeros(len(SUMS)), args.loss.startswith("tdpo")
    for part in group_batches([e["group"] for e in examples], model.get_base_model().config, args):
        micro = [examples[k] for k in part]
        batch = collate(micro, [references[k] for k in part] if references else [], model, pad_id)
        kl = values = torch.zeros_like(batch.share)
        if tdpo:  # its KL needs the reference's whole distribution at every token: kept as states, not as logits
            with role(model, "reference"):
                ref_states = response_states(model, batch.rows)
        elif references is None and LOSSES[args.loss].reference:
            with role(model, "reference"):
                batch = batch._replace(ref_logprobs=response_logprobs(model, batch.rows, args.temperature)[0])
        if value_head is not None:
            with role(model, "critic"):
                values = prompt_values(model, value_head, micro, pad_id)
        with role(model, "policy", grad):
            if tdpo:
                logprobs, ref_logprobs, kl = logprobs_and_kl(model, batch.rows, ref_states, args.temperature)
                batch = batch._replace(ref_logprobs=ref_logprobs)
            else:
                logprobs = response_logprobs(model, batch.rows, args.temperature)[0]
            loss = preference_loss(logprobs, batch, kl, values, baseline, args)
            if grad:
                (loss / n_prompts).backward()
        if value_head is not None and grad:
            log_ratio = implicit_rewards(logprobs.detach(), batch, args) / args.beta
            with role(model, "critic", grad):
                values = prompt_values(model, value_head, micro, pad_id)
                errors = batch.share * dro_loss(log_ratio, values, batch.wins, args.beta)
                (errors.sum() / n_prompts).backward()
        sums += preference_sums(loss.detach(), logprobs.detach(), batch, args).cpu().numpy()
    return sums


# --------------------------------------------------------------------------------------------------------- online
def rank_samples(
    rollout: Rollout, scores: Tensor, ref_logprobs: Tensor, args: Args
) -> tuple[list[dict], list[list[Tensor]]]:
    """Preferences among the samples of each prompt, and the reference's log-probs; equal scores, and NaN, give none.

    The win probability of a sample (sppo, lipo) is the mean of sigma(score - other score) over the prompt's others;
    dro takes the score itself.
    """
    k = args.samples_per_prompt
    examples, references = [], []
    for p, s in enumerate(scores.double().cpu().view(-1, k).tolist()):
        known = [i for i in range(k) if s[i] == s[i]]
        if not known or (args.loss != "dro" and min(s[i] for i in known) == max(s[i] for i in known)):
            continue
        kept = known  # dro learns from each by itself
        if args.pairs != "all" and args.loss != "dro":
            kept = [max(known, key=lambda i: s[i]), min(known, key=lambda i: s[i])]
        responses = [rollout.responses[p * k + i] for i in kept]
        example = {"group": (rollout.prompts[p * k]["ids"], responses), "key": rollout.prompts[p * k]["key"]}
        example["ranks"] = [-s[i] for i in kept]
        if args.loss == "dro":
            example["wins"] = [s[i] for i in kept]
        if args.loss in ("sppo", "lipo"):
            example["wins"] = [np.mean([1 / (1 + math.exp(s[j] - s[i])) for j in known if j != i]) for i in kept]
        examples.append(example)
        references.append([ref_logprobs[p * k + i, : len(y)].cpu() for i, y in zip(kept, responses, strict=True)])
    return examples, references


def sample_preferences(
    model: Any, tokenizer: Any, prompts: list[dict], places: list[int], reward: Any, gold: Any, stop_ids: list[int],
    step: int, args: Args, accelerator: Accelerator,
) -> tuple[list[dict], list[list[Tensor]], dict[str, float], list[tuple]]:  # fmt: skip
    """Samples of the policy, ranked by reward: (examples, the reference's log-probs, metrics, gates of step 0).

    Metrics are means over all samples of the step: score, gold utility, KL(pi, pi_ref) in nats, length, eos_rate.
    """
    rollout = roll_out(
        model, tokenizer, prompts, places, args.samples_per_prompt, stop_ids, args, (args.seed, 0, step)
    )  # fmt: skip
    gates: list[tuple] = []
    scores = score_responses(rollout, reward, args)  # NaN, a function's None, leaves the sample out
    ref_logprobs, _ = role_logprobs(model, "reference", rollout, args.temperature)
    if step == 0:
        logprobs, _ = role_logprobs(model, "policy", rollout, args.temperature)
        gates = preflight(model, rollout, logprobs, ref_logprobs, args)
    golds = call_function(gold, str(args.gold_fn), rollout.prompts, rollout.texts) if gold else None
    metrics = batch_means(rollout, scores, rollout.sampler_logprobs - ref_logprobs, golds, accelerator)
    penalised = scores - args.missing_eos_penalty * (1 - rollout.ended)
    return *rank_samples(rollout, penalised, ref_logprobs, args), metrics, gates


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


def measure(
    model: Any, value_head: nn.Linear | None, heldout: list[dict], references: list[list[Tensor]] | None,
    baseline: float, pad_id: int, args: Args, accelerator: Accelerator,
) -> dict[str, float]:  # fmt: skip
    """preference_metrics on held-out preferences, {} where there are none; `baseline` as in training (kto: new)."""
    if not heldout:
        return {}
    if args.loss == "kto":
        baseline = mismatched_kl(model, mismatched_groups(heldout), pad_id, args, accelerator)
    sums = preference_pass(model, value_head, heldout, references, 1.0, baseline, pad_id, args, grad=False)
    return preference_metrics(sums.tolist(), args)


def check_start(before: dict, args: Any) -> list[tuple]:
    """The gate logratio_step0: an untrained policy is the reference, to rounding, on held-out preferences."""
    per_token = [before[f"{name}_reward"] / before[f"{name}_length"] for name in ("chosen", "rejected")]
    gap = max(abs(x) for x in per_token if x == x) / args.beta  # labels may be all of one kind
    limit = 1e-4 if args.dtype == "float32" else 0.02
    print(f"preflight: {'ok ' if gap <= limit else 'RED'} logratio_step0 {gap:.3g} (limit {limit:g})")
    if not gap <= limit:
        raise UserError(f"preflight: log-ratio per token {gap:.3g}, limit {limit:g}: the policy is not the reference")
    return [("logratio_step0", gap, limit, True)]


def outcome_gates(before: dict, after: dict, n: int, args: Args) -> list[tuple]:
    """The gate accuracy_low; a warning where the chosen responses became much less likely.

    Without a reference the accuracy does not start at 1/2: there the gate is accuracy_gain.
    """
    fall = before["chosen_logprob"] - after["chosen_logprob"]
    if args.loss != "apo_down" and fall > 0.1 * abs(before["chosen_logprob"]):
        print(
            f"warning: the chosen responses lost {fall:.1f} nats of log-prob. A margin also grows when both fall, "
            "and the mass goes to text that nobody ranked; --nll_coef 1 (RPO), nca or a larger --beta hold it"
        )
    if after["accuracy"] != after["accuracy"]:  # labels of single responses
        return []
    if not LOSSES[args.loss].reference:
        gain = after["accuracy"] - before["accuracy"]
        return [("accuracy_gain", gain, 0.0, gain > 0)]
    low = wilson_interval(after["accuracy"], n)[0]
    return [("accuracy_low", low, 0.5, low > 0.5)]


def heldout_table(before: dict, after: dict, n: int) -> str:
    """Held-out preferences before and after training; the accuracy with its 95 % interval over n examples."""
    lines = [f"{'held-out preferences: ' + str(n):28}{'before':>30}{'after':>30}"]
    for key in ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob"):
        cells = [f"{x[key]:.3f}" for x in (before, after)]
        if key == "accuracy":
            bounds = [wilson_interval(x[key], n) for x in (before, after)]
            cells = [f"{cell} [{low:.3f}, {high:.3f}]" for cell, (low, high) in zip(cells, bounds, strict=True)]
        if before[key] == before[key]:  # labels of single responses have no accuracy
            lines.append(f"{key.replace('_', ' '):28}{cells[0]:>30}{cells[1]:>30}")
    return "\n".join(lines)


def settle_args(args: Args, world: int) -> None:
    """Fill in what follows from --loss; contradicting or impossible flags, each as one line."""
    kind = LOSSES[args.loss]
    args.beta = kind.beta if args.beta is None else args.beta
    args.nll_coef = kind.nll_coef if args.nll_coef is None else args.nll_coef
    args.pairs = args.pairs or ("all" if args.loss in ("lipo", "plackett_luce") else "best_worst")
    positive = "beta batch_size micro_batch_size sample_batch_size epochs temperature max_response_length"
    for name in positive.split():
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    if args.tokens_per_micro_batch < 0:
        raise UserError(f"--tokens_per_micro_batch {args.tokens_per_micro_batch}: must not be below 0")
    if args.lora_r == 0:
        raise UserError("--lora_r 0: DPO trains LoRA adapters only; use a rank of at least 1")
    if args.label_smoothing and args.loss not in SMOOTHED:
        raise UserError(f"--label_smoothing has no part in --loss {args.loss}; it belongs to {', '.join(SMOOTHED)}")
    if not 0 <= args.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing {args.label_smoothing}: a share of wrong labels, at least 0 and below 0.5")
    if args.f_divergence != "reverse_kl" and args.loss not in DIVERGENT:
        raise UserError(f"--f_divergence has no part in --loss {args.loss}; it belongs to {', '.join(DIVERGENT)}")
    if args.sync_ref_every and not kind.reference:
        raise UserError(f"--sync_ref_every: --loss {args.loss} has no reference")
    if not 0 <= args.f_alpha <= 1:
        raise UserError(f"--f_alpha {args.f_alpha}: from 0 (reverse KL) to 1 (forward KL)")
    if args.reward_fn and args.reward_model:
        raise UserError("--reward_fn and --reward_model are both given; the samples have one ranking, choose one")
    n_prompts = args.batch_size // (args.samples_per_prompt * world) if args.online else args.batch_size
    if args.loss == "kto" and n_prompts < 2:
        raise UserError(f"--batch_size {args.batch_size}: kto's KL estimate needs the responses of another prompt")
    if not args.online:
        return
    g = args.samples_per_prompt
    if g < 2 or args.batch_size % (g * world):
        raise UserError(
            f"--batch_size {args.batch_size}: no multiple of --samples_per_prompt {g} (>= 2) x {world} processes"
        )
    if args.loss == "kto" and args.pairs == "all" and g > 2:
        raise UserError(f"--loss {args.loss} needs a liked and a disliked response; use --pairs best_worst")


def check_data(examples: list[dict], args: Args) -> None:
    """Whether --loss can learn from these examples."""
    labels, most = sum("label" in e for e in examples), max(len(e["ranks"]) for e in examples)
    if LOSSES[args.loss].data != "labels" and labels:
        raise UserError(
            f"--loss {args.loss} compares responses to one prompt; {labels} rows of {args.dataset} have one labelled "
            "response (prompt + completion + label): use --loss kto or dro"
        )
    if LOSSES[args.loss].data == "labels" and most > 2:
        raise UserError(
            f"--loss {args.loss} learns from labelled responses or pairs; {args.dataset} ranks up to {most} responses "
            "to a prompt: use --loss plackett_luce, lipo, sppo or one of pairs"
        )


def load_policy(args: Args, device: Any) -> tuple[Any, Any, list[int], Path | None, Any, nn.Linear | None, str]:
    """(model, tokenizer, stop ids, adapter folder, reward or None, value head of dro or None, base)."""
    model, tokenizer, stop_ids, adapter, base = load_model(args, device)
    model = add_adapter(model, "policy", adapter, args)
    if adapter:
        warn_failed_gates(adapter)
    if adapter or args.sync_ref_every:  # a bare base that stays the reference is the model with the adapters off
        add_adapter(model, "reference", adapter, args)
    head = model.get_base_model().get_output_embeddings()
    if args.loss.startswith("tdpo") and any("policy" in name for name, _ in head.named_parameters()):
        raise UserError(
            f"--loss {args.loss} computes both roles' logits with one lm_head; take it out of the LoRA layers"
        )
    reward: Any = None
    if args.reward_fn:
        reward = load_function(args.reward_fn)
    elif args.online or args.reward_model:  # offline it only judges: the closing table and a gate
        reward = load_reward_model(args.reward_model or str(TINY / "reward"), model, base, tokenizer, args, device)
    value_head = None
    if args.loss == "dro":  # V(x), the critic: an adapter that starts as the policy's, and a zero head
        add_adapter(model, "critic", adapter, args)
        value_head = nn.Linear(model.get_base_model().config.hidden_size, 1, device=device, dtype=torch.float32)
        value_head.weight.data.zero_()
        value_head.bias.data.zero_()
    return model, tokenizer, stop_ids, adapter, reward, value_head, base


def load_data(
    args: Args, tokenizer: Any, stop_ids: list[int], embedded: bool
) -> tuple[list[dict], list[dict], list[dict]]:
    """(training examples, held-out preferences, held-out prompts to answer); online, the examples are prompts."""
    columns: list[tuple[str, ...]] = [("prompt",)]
    if not args.online:
        columns = [("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("prompt", "responses", "ranks")]
        columns.append(("prompt", "completion", "label"))

    def encode_prompts(row: dict) -> list[dict]:
        return encode_rl(row, tokenizer, args.max_prompt_length)

    def encode(row: dict) -> list[dict]:
        if args.online:
            return encode_prompts(row)
        if row.get("chosen") is None and row.get("responses") is None:
            return encode_label(row, tokenizer, stop_ids, args)
        return encode_preference(row, tokenizer, stop_ids, args)

    examples = encode_rows(args.dataset, args.dataset_split, columns, encode)
    tiny = str(TINY / ("prompts_eval.jsonl" if args.online else "preferences_eval.jsonl"))
    if args.eval_dataset or embedded:
        heldout = encode_rows(args.eval_dataset or tiny, args.dataset_split, columns, encode)
    else:
        examples, heldout = hold_out(examples, args.eval_size, args.seed)
    if args.online:
        return examples, [], heldout[: args.eval_samples]
    check_data([*examples, *heldout], args)
    if embedded and not args.eval_dataset:
        prompts = encode_rows(str(TINY / "prompts_eval.jsonl"), "train", [("prompt",)], encode_prompts)
    else:
        ones = {json.dumps(e["prompt"]): {"ids": e["group"][0], "prompt": e["prompt"], "columns": {}} for e in heldout}
        prompts = list(ones.values())
    return examples, heldout, prompts[: args.eval_samples]


def main(args: Args) -> None:
    """Direct preference optimisation, offline and online (dpo.py)."""
    began = time.time()
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))  # while the first process computes the reference
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), log_with=args.report_to, kwargs_handlers=[patient]
    )  # fmt: skip
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    torch.manual_seed(args.seed)
    settle_args(args, world)
    embedded = args.dataset == Args.dataset
    args.dataset = str(TINY / "prompts.jsonl") if embedded and args.online else args.dataset
    args.gold_fn = args.gold_fn or (f"{TINY / 'annotator.py'}:gold" if embedded else None)

    # Roles, data, optimisers, run folder
    model, tokenizer, stop_ids, adapter, reward, value_head, base = load_policy(args, device)
    pad_id, gold = tokenizer.pad_token_id, load_function(args.gold_fn) if args.gold_fn else None
    examples, heldout, prompts = load_data(args, tokenizer, stop_ids, embedded)
    lengths = [len(e["ids"]) if args.online else group_tokens(e["group"]) for e in examples]
    n_examples = args.batch_size // args.samples_per_prompt if args.online else args.batch_size
    total_steps = math.ceil(args.epochs * len(examples) / n_examples)
    total_steps = min(total_steps, args.max_steps) if args.max_steps else total_steps
    print(
        f"dpo: --loss {args.loss}, beta {args.beta:g}; {len(examples)} {'prompts' if args.online else 'examples'}, "
        f"{len(heldout) or len(prompts)} held out; {total_steps} steps of {args.batch_size}; {args.quant}, "
        f"{args.dtype}, {device.type} x {world}; one base, adapters {', '.join(model.peft_config)}"
    )
    references = heldout_references = None
    if LOSSES[args.loss].reference and not args.online and not args.loss.startswith("tdpo"):
        heldout_references = cached_logprobs(model, heldout, base, adapter, pad_id, args, accelerator)
        if not args.sync_ref_every:
            references = cached_logprobs(model, examples, base, adapter, pad_id, args, accelerator)
    parameters = [adapter_parameters(model, "policy")]
    if value_head is not None:
        parameters.append([*adapter_parameters(model, "critic"), *value_head.parameters()])
    optimizers = [make_optimizer(of_role, args.weight_decay, device) for of_role in parameters]
    reference = adapter_parameters(model, "reference") if args.sync_ref_every else []
    start_reference = [p.detach().clone() for p in reference]
    first_step, baseline, gates = 0, 0.0, []
    folder, state = open_run(args, "dpo", accelerator)
    accelerator.init_trackers("dpo", config={k: str(v) for k, v in asdict(args).items()})

    def judge() -> tuple[dict, dict]:
        """(metrics on held-out preferences, responses to held-out prompts), against the reference of the start."""
        with holding(reference, start_reference):
            measured = measure(model, value_head, heldout, heldout_references, baseline, pad_id, args, accelerator)
            if not prompts:
                return measured, {}
            return measured, evaluate(model, tokenizer, "policy", prompts, reward, gold, stop_ids, args)

    before, answers_before = judge()
    outcome: tuple[dict, dict] | None = None
    if state is not None:
        first_step, baseline, gates = state["step"], state["baseline"], [tuple(gate) for gate in state["gates"]]
        for p, saved in zip(itertools.chain(*parameters, reference), state["parameters"], strict=True):
            p.data.copy_(saved)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    if not first_step and heldout and LOSSES[args.loss].reference:
        gates = check_start(before, args)

    for step in range(first_step, total_steps):
        start = time.time()
        metrics: dict[str, Any] = {"step": step}

        # 1. Preferences from the data set, 2. the reference's log-probs from the cache; online: both from samples
        indices = batch_indices(step, lengths, n_examples, args.seed)
        batch = [examples[i] for i in indices]
        mine, ref_logprobs = batch[rank::world], None
        if args.online:
            places = list(range(n_examples))[rank::world]  # a prompt's place in the batch names its noise
            mine, ref_logprobs, sampled, checks = sample_preferences(
                model, tokenizer, mine, places, reward, gold, stop_ids, step, args, accelerator
            )
            metrics, gates = metrics | sampled, checks or gates
        elif references is not None:
            ref_logprobs = [references[i] for i in indices[rank::world]]

        # 3. The loss and its gradient, as the mean over the prompts of the whole batch
        if args.loss == "kto":
            mismatched = mismatched_groups(mine) if args.online else mismatched_groups(batch)[rank::world]
            baseline = mismatched_kl(model, mismatched, pad_id, args, accelerator)
        (n_prompts,) = global_sums(accelerator, len(mine))
        metrics |= {"ranked": n_prompts / n_examples} if args.online else {}  # prompts whose samples gave a preference
        metrics |= {"baseline": baseline} if args.loss in ("kto", "bco") else {}
        sums = preference_pass(model, value_head, mine, ref_logprobs, n_prompts, baseline, pad_id, args, grad=True)
        metrics |= preference_metrics(global_sums(accelerator, *sums), args)
        if args.loss == "bco" and n_prompts:  # the mean reward, as a moving average over batches
            baseline = 0.9 * baseline + 0.05 * (metrics["chosen_reward"] + metrics["rejected_reward"])

        # 4. Update; the reference becomes the policy
        learning_rate = learning_rate_at(step, total_steps, args.learning_rate, args.warmup_ratio)
        norms = [update(optimizer, learning_rate, args.max_grad_norm, accelerator) for optimizer in optimizers]
        metrics |= {"grad_norm": norms[0], "learning_rate": learning_rate}
        if args.sync_ref_every and (step + 1) % args.sync_ref_every == 0:
            copy_adapter(model, "policy", "reference")
        seconds = time.time() - start

        # 5. Log, evaluate, save
        if step + 1 == total_steps or (args.eval_every and (step + 1) % args.eval_every == 0):
            after, answers_after = outcome = judge()
            metrics |= {f"heldout_{name}": after[name] for name in ("loss", "accuracy", "margin") if name in after}
            metrics |= {f"heldout_{n}": interval(answers_after[n])[0] for n in ("gold", "kl") if n in answers_after}
        timing = {"seconds": seconds, "examples_per_second": n_examples / seconds,
                  "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0}  # fmt: skip
        log_step(folder, metrics, timing, accelerator)
        if accelerator.is_main_process and (args.online or step % 10 == 0 or step + 1 == total_steps):
            shown = [f"{n} {metrics[n]:.3f}" for n in SHOWN if metrics.get(n, math.nan) == metrics.get(n)]
            print(f"step {step + 1:4d}/{total_steps} | {' | '.join(shown)} | {seconds:.1f} s", flush=True)
        if args.save_every and (step + 1) % args.save_every == 0 and accelerator.is_main_process:
            values = [p.detach().cpu() for p in itertools.chain(*parameters, reference)]
            saved = {"step": step + 1, "baseline": baseline, "gates": gates, "parameters": values}
            save_checkpoint(folder, {**saved, "optimizers": [optimizer.state_dict() for optimizer in optimizers]})

    # Result: the policy's adapter, held-out responses of both, the tables, gates
    after, answers_after = outcome or judge()
    if not accelerator.is_main_process:
        return
    save_adapter(folder, model, "policy", base, tokenizer)
    if heldout:
        print(f"\n{heldout_table(before, after, len(heldout))}")
        gates += outcome_gates(before, after, len(heldout), args)
    if prompts:
        write_samples(folder, prompts, {"sft": answers_before, "dpo": answers_after})
        print(f"\n{closing_table(answers_before, answers_after, 'DPO', time.time() - began)}")
        for name in [name for name in ("gold", "score") if name in answers_after][:1]:
            low = interval(answers_after[name] - answers_before[name])[1]
            gates.append((f"{name}_low", low, 0.0, bool(low > 0)))
    write_report(folder, "dpo", base_identity(base), gates)
    plot_curves(folder, ["loss", "score", "gold", "kl", "accuracy", "margin", "chosen_logprob", "rejected_logprob"])
    accelerator.end_training()
    print(f"dpo: wrote {folder}")


if __name__ == "__main__":
    run_cli(main, Args)
