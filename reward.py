# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "bitsandbytes==0.50.2", "peft==0.21.2",
#     "accelerate==1.15.0", "safetensors", "numpy", "matplotlib"]
# ///
"""Reward modelling: the second stage of RLHF (Ouyang et al. 2022, InstructGPT, section 3.5, "RM").

A scalar r(x, y), read off the last token of response y to prompt x, learns which of K responses people prefer (eq. 1),
by maximum likelihood of the comparisons (Bradley-Terry):

    L(theta) = - mean over prompts x, mean over the pairs y_w > y_l of x, of   log sigma( r(x, y_w) - r(x, y_l) )

The C(K,2) pairs of a prompt are one example and come from one forward pass. K = 2 is the usual pair of answers.

    python reward.py                                       # the embedded world in tiny/, half a minute on two cores
    python reward.py --dataset tiny/rankings.jsonl --loss plackett_luce
    python reward.py --model runs/sft --dataset HuggingFaceH4/ultrafeedback_binarized --dataset_split train_prefs

Data (hub id, or local .jsonl, .json, .parquet; one of these column sets; "subset" is kept for the accuracy table):
    prompt, chosen, rejected    strings or message lists, of which the last message counts; margin (a number) if wanted
    chosen, rejected            two whole dialogues, message lists or hh-rlhf's "\\n\\nHuman: ...\\n\\nAssistant: ..."
    prompt, responses, ranks    K responses and their ranks: 1 = best, equal = tie

Writes runs/reward/: the LoRA adapter and the head in PEFT's format (AutoModelForSequenceClassification loads them),
reward.json (mean of the scores, canaries), tokenizer, args.json, metrics.jsonl, timing.jsonl, samples.jsonl,
curves.png, report.json, checkpoint/.
"""

import bisect
import contextlib
import hashlib
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
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, HfArgumentParser

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
    # model
    model: str = arg(str(TINY / "sft"), "base model or run folder: hub id or local path")
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
    normalize_dataset: str | None = arg(None, "SFT data, scored mean 0, sd 1; default: the best training responses")
    max_prompt_length: int = arg(512, "longer prompts are dropped and counted, never cut (tokens)")
    max_response_length: int = arg(512, "longest response (tokens)")
    # loss
    loss: Literal["bradley_terry", "plackett_luce"] = arg("bradley_terry", "pairs, or whole rankings")
    label_smoothing: float = arg(0.0, "share of the labels taken to be wrong, in losses that allow it")
    center_coef: float = arg(0.0, "weight of (r_i + r_j)^2, which keeps scores around 0; 0.01 is usual")
    length_coef: float = arg(0.0, "weight of the squared covariance of score and length; larger: length matters less")
    # optimisation
    learning_rate: float = arg(1e-3, "peak learning rate; for LoRA on 7B: sft 2e-4, reward 1e-4, dpo 1e-5, RL 2e-5")
    warmup_ratio: float = arg(0.05, "share of the steps with rising learning rate; cosine to a tenth after it")
    weight_decay: float = arg(0.0, "AdamW weight decay")
    max_grad_norm: float = arg(1.0, "gradients longer than this are scaled down to it")
    batch_size: int = arg(
        32, "examples per step, all processes together (reward, dpo: prompts with all their pairs; RL: responses)"
    )
    micro_batch_size: int = arg(
        8, "rows (reward, dpo: prompts; RL: responses) per forward pass: memory, not the result"
    )
    tokens_per_micro_batch: int = arg(
        0, "most tokens per training pass, padding included; a longer example goes alone; 0: any number"
    )
    epochs: float = arg(1.0, "passes over the dataset")
    max_steps: int = arg(0, "stop after this many steps; 0: no limit; the smaller bound wins")
    # run
    output_dir: str = arg("runs/reward", "run folder; an existing one is renamed unless --resume")
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
class Comparisons(NamedTuple):
    """The P pairs (i better than j) among the S responses of some prompts; tied responses form no pair."""

    better: Tensor  # (P,), index of i among the S
    worse: Tensor  # (P,), index of j
    weight: Tensor  # (P,), 1 / number of pairs of the prompt, so that each prompt counts once
    margin: Tensor  # (P,)
    longer: Tensor  # (P,), length of i minus length of j, in standard deviations of the training responses
    ranks: Tensor  # (S,), 1 = best
    prompt: Tensor  # (S,), number of the prompt


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


def length_covariance(difference: Tensor, longer: Tensor, weight: Tensor) -> Tensor:
    """Score and length differences (P,), weight (P,) -> (): sum over prompts of the covariance of score and length.

    Half the mean product of differences over all pairs of a prompt is the (unbiased) covariance within the prompt; here
    the differences are those of the scores 3, 2, 1 and the lengths 6, 4, 2.

    >>> length_covariance(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([2.0, 4.0, 2.0]), torch.ones(3) / 3)
    tensor(2.)
    """
    return (weight * difference * longer).sum() / 2


def reward_loss(scores: Tensor, pairs: Comparisons, covariance: float, args: Any) -> Tensor:
    """Scores (S,) -> (): the loss summed over prompts, with the regularisers of --center_coef and --length_coef.

    center_coef * (r_i + r_j)^2: Eisenstein et al. 2023 ("Helping or herding?"). The length term has, on average,
    the gradient of length_coef/2 * cov^2: one factor, `covariance`, is that of the batch before. So the other is a sum
    over prompts, which micro-batches add up to, and the product of two independent estimates is unbiased.
    """
    better, worse = scores.index_select(0, pairs.better), scores.index_select(0, pairs.worse)
    if args.loss == "bradley_terry":
        loss = (pairs.weight * bradley_terry_loss(better, worse, pairs.margin, args.label_smoothing)).sum()
    else:
        loss = plackett_luce_loss(scores, pairs.ranks, pairs.prompt).sum()
    center = (pairs.weight * (better + worse) ** 2).sum()
    length = covariance * length_covariance(better - worse, pairs.longer, pairs.weight)
    return loss + args.center_coef * center + args.length_coef * length


def pair_sums(scores: Tensor, pairs: Comparisons) -> Tensor:
    """(5,), summed over prompts: pairs won (a tie is half), score difference, covariance, both sums of squares."""
    d = scores[pairs.better] - scores[pairs.worse]
    won = torch.heaviside(d, torch.full_like(d, 0.5))
    return torch.stack([won, d, d * pairs.longer / 2, d**2, pairs.longer**2]) @ pairs.weight


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


def encode_demonstration(row: dict, tokenizer: Any, stop_ids: list[int], args: Any) -> list[Group]:
    """One SFT row -> its last assistant turn as a group of one response."""
    if row.get("messages") is not None:
        prompt, text = split_dialogue(row["messages"])
    else:
        answer = row["completion"]
        prompt, text = row["prompt"], answer if isinstance(answer, str) else split_dialogue(answer)[1]
    return [encode_group(prompt, [text], tokenizer, stop_ids, args)]


def better_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """All (i, j) with i ranked better than j.

    >>> better_pairs([2, 1, 2])
    [(1, 0), (1, 2)]
    """
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


def compare(examples: list[dict], length_sd: float, device: Any) -> Comparisons:
    """The pairs of some examples, as indices into the flat list of all their responses; lengths in characters."""
    pairs: list[tuple] = []
    responses: list[tuple] = []
    for number, e in enumerate(examples):
        start, lengths, of_prompt = len(responses), [len(t) / length_sd for t in e["texts"]], better_pairs(e["ranks"])
        for i, j in of_prompt:
            pairs.append((start + i, start + j, 1 / len(of_prompt), e["margin"], lengths[i] - lengths[j]))
        responses += [(rank, number) for rank in e["ranks"]]
    columns = [*zip(*pairs, strict=True), *zip(*responses, strict=True)]
    return Comparisons(*(torch.tensor(column, device=device) for column in columns))


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


def head_scores(model: Any, head: nn.Linear, rows: Rows) -> Tensor:
    """(S,): the head applied, in fp32, to the last real token of each response (its end token, where it has one)."""
    states = hidden_states(model, rows).flatten(0, 1).index_select(0, rows.last)
    return head(states.float()).squeeze(-1)


def score_groups(model: Any, head: nn.Linear, groups: list[Group], pad_id: int) -> tuple[Tensor, bool]:
    """(S,) scores of all responses in order under the active role, and whether they shared their prompts' passes."""
    width = row_width(groups, model.config)
    return head_scores(model, head, lay_out(groups, width, pad_id, head.weight.device)), width > 0


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


# ------------------------------------------------------------------------------------------------------ evaluation
def score_all(model: Any, head: nn.Linear, groups: list[Group], args: Any, pad_id: int) -> list[list[float]]:
    """Raw scores of each group's responses, in micro-batches."""
    scores: list[list[float]] = [[] for _ in groups]
    with role(model, "reward"):
        for part in group_batches(groups, model.config, args):
            values = iter(score_groups(model, head, [groups[g] for g in part], pad_id)[0].tolist())
            for g in part:
                scores[g] = [next(values) for _ in groups[g][1]]
    return scores


def load_demonstrations(args: Args, examples: list[dict], encode: Callable[[dict], list]) -> tuple[list[Group], str]:
    """What has mean reward 0 and sd 1, and its name: SFT data, or without any the best response to each prompt."""
    if args.normalize_dataset or args.dataset == Args.dataset:
        source, columns = args.normalize_dataset or str(TINY / "sft.jsonl"), [("messages",), ("prompt", "completion")]
        return encode_rows(source, args.dataset_split, columns, encode), Path(source).name
    best = [e["ranks"].index(min(e["ranks"])) for e in examples]
    return [(e["group"][0], [e["group"][1][k]]) for e, k in zip(examples, best, strict=True)], "best training responses"


def normalize_head(model: Any, head: nn.Linear, groups: list[Group], args: Args, pad_id: int) -> dict:
    """Divide the head by the sd of its scores on (at most 1000 of) the groups; {"mean" after, "sd" before, "n"}."""
    order = np.random.default_rng(args.seed).permutation(len(groups))[:1000]
    raw = np.concatenate(score_all(model, head, [groups[g] for g in order], args, pad_id))
    sd = float(raw.std()) or 1.0
    head.weight.data /= sd
    return {"mean": float(raw.mean()) / sd, "sd": sd, "n": len(raw)}


def canary_scores(model: Any, head: nn.Linear, examples: list[dict], mean: float, args: Any, pad_id: int) -> list[dict]:
    """Eight texts with their normalised scores, one row at a time: who loads the head must find the same."""
    picked = [(e, k) for e in examples for k in range(len(e["texts"]))][:8]
    rows = []
    for e, k in picked:
        ((score,),) = score_all(model, head, [(e["group"][0], [e["group"][1][k]])], args, pad_id)
        rows.append({"prompt": e["prompt"], "response": e["texts"][k], "score": score - mean})
    return rows


def scored_pairs(model: Any, head: nn.Linear, examples: list[dict], mean: float, args: Any, pad_id: int) -> list[dict]:
    """One row per compared pair with its scores, in the format of samples.jsonl; lengths in characters."""
    rows, scores = [], score_all(model, head, [e["group"] for e in examples], args, pad_id)
    for e, values in zip(examples, scores, strict=True):
        for i, j in better_pairs(e["ranks"]):
            row = {"id": e["id"] if len(values) == 2 else f"{e['id']}-{i}-{j}", "prompt": e["prompt"]}
            for name, k in (("chosen", i), ("rejected", j)):
                row |= {name: e["texts"][k], f"{name}_score": values[k] - mean, f"{name}_length": len(e["texts"][k])}
            rows.append({**row, "subset": e["subset"]})
    return rows


def share_won(rows: list[dict], key: str) -> float:
    """Share of the pairs whose chosen response has the larger "score" or "length"; a tie is half a win."""
    return float(np.heaviside([row[f"chosen_{key}"] - row[f"rejected_{key}"] for row in rows], 0.5).mean())


def print_accuracy(rows: list[dict]) -> tuple[float, float, float]:
    """Accuracy over pairs by subset, beside two rules of length; -> (accuracy, lower bound, better rule)."""
    print(f"{'subset':<20}  pairs  accuracy  95 % interval  longer wins  shorter wins")
    for name in [*sorted({row["subset"] for row in rows} - {""}), "all"]:
        part = [row for row in rows if name in ("all", row["subset"])]
        accuracy, longer = share_won(part, "score"), share_won(part, "length")
        low, high = wilson_interval(accuracy, len(part))
        print(f"{name:<20} {len(part):6} {accuracy:9.3f}  {low:.3f} - {high:.3f}  {longer:11.3f}  {1 - longer:12.3f}")
    return accuracy, low, max(longer, 1 - longer)


def main(args: Args) -> None:
    """Reward modelling from preferences (reward.py)."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=args.report_to)
    device = accelerator.device
    torch.manual_seed(args.seed)
    for name in ("batch_size", "micro_batch_size", "epochs"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    if args.tokens_per_micro_batch < 0:
        raise UserError(f"--tokens_per_micro_batch {args.tokens_per_micro_batch}: must not be below 0")
    if args.lora_r == 0:
        raise UserError("--lora_r 0 is for sft.py only: a reward model is a LoRA adapter and a head")
    if args.loss == "plackett_luce" and args.label_smoothing:
        raise UserError("--label_smoothing belongs to --loss bradley_terry")

    # 1. Model: an adapter that starts as a copy of the SFT adapter (new on a bare base), and a new head outside PEFT
    model, tokenizer, stop_ids, adapter, base = load_model(args, device)
    model = add_adapter(model, "reward", adapter, args)
    warn_failed_gates(adapter or Path(base))
    pad_id = tokenizer.pad_token_id
    head = nn.Linear(model.config.hidden_size, 1, bias=False, device=device, dtype=torch.float32)
    nn.init.normal_(head.weight, std=1 / math.sqrt(model.config.hidden_size + 1))  # Stiennon et al. 2020
    parameters = [*adapter_parameters(model, "reward"), *head.parameters()]

    # 2. Data: a prompt, the responses to it and their ranks
    def encode(row: dict) -> list[dict]:
        return encode_preference(row, tokenizer, stop_ids, args)

    def encode_answer(row: dict) -> list[Group]:
        return encode_demonstration(row, tokenizer, stop_ids, args)

    columns = [("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("prompt", "responses", "ranks")]
    examples = encode_rows(args.dataset, args.dataset_split, columns, encode)
    if args.eval_dataset or args.dataset == Args.dataset:
        source = args.eval_dataset or str(TINY / "preferences_eval.jsonl")
        heldout = encode_rows(source, args.dataset_split, columns, encode)
    else:
        examples, heldout = hold_out(examples, args.eval_size, args.seed)
    lengths = [group_tokens(e["group"]) for e in examples]
    length_sd = float(np.std([len(text) for e in examples for text in e["texts"]])) or 1.0
    total_steps = math.ceil(args.epochs * len(examples) / args.batch_size)
    total_steps = min(total_steps, args.max_steps) if args.max_steps else total_steps
    print(
        f"reward: {sum(p.numel() for p in parameters):,} weights train; {len(examples)} prompts with "
        f"{sum(len(better_pairs(e['ranks'])) for e in examples)} pairs, {len(heldout)} held out; {total_steps} steps "
        f"of {args.batch_size}; {args.quant}, {args.dtype}, {device.type} x {accelerator.num_processes}"
    )

    optimizer = make_optimizer(parameters, args.weight_decay, device)
    folder, state = open_run(args, "reward", accelerator)
    accelerator.init_trackers("reward", config={k: str(v) for k, v in asdict(args).items()})
    first_step, covariance = 0, 0.0  # of score and length in the batch before
    if state is not None:
        first_step, covariance = state["step"], state["covariance"]
        for p, saved in zip(parameters, state["parameters"], strict=True):
            p.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])

    # 3. Training
    for step in range(first_step, total_steps):
        start = time.time()
        batch = [examples[i] for i in batch_indices(step, lengths, args.batch_size, args.seed)]
        mine = batch[accelerator.process_index :: accelerator.num_processes]

        # 3.1 Gradient of the mean over the batch's prompts, summed up over micro-batches
        sums = np.zeros(8)  # loss, five of pair_sums, micro-batches, those with shared rows
        with role(model, "reward", grad=True):
            for numbers in group_batches([e["group"] for e in mine], model.config, args):
                micro = [mine[i] for i in numbers]
                pairs = compare(micro, length_sd, device)
                scores, shared = score_groups(model, head, [e["group"] for e in micro], pad_id)
                loss = reward_loss(scores, pairs, covariance, args) / len(batch)
                loss.backward()
                sums += [loss.item(), *(pair_sums(scores.detach(), pairs) / len(batch)).tolist(), 1, shared]

        # 3.2 Update, log, save
        learning_rate = learning_rate_at(step, total_steps, args.learning_rate, args.warmup_ratio)
        grad_norm = update(optimizer, learning_rate, args.max_grad_norm, accelerator)
        loss_sum, won, margin, covariance, squares, lengths_2, n_micro, n_shared = global_sums(accelerator, *sums)
        correlation = 2 * covariance / math.sqrt(squares * lengths_2) if squares * lengths_2 > 0 else 0.0
        metrics = {"step": step, "loss": loss_sum, "accuracy": won, "margin": margin, "length_correlation": correlation}
        metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate, "shared_rows": n_shared / n_micro}
        seconds, tokens = time.time() - start, sum(group_tokens(e["group"]) for e in batch)
        if heldout and args.eval_every and (step + 1) % args.eval_every == 0:
            rows = scored_pairs(model, head, heldout, 0.0, args, pad_id)
            metrics["heldout_accuracy"] = share_won(rows, "score")
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        timing = {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_bytes": peak}
        log_step(folder, metrics, timing, accelerator)
        if accelerator.is_main_process and (step % 10 == 0 or step + 1 == total_steps or "heldout_accuracy" in metrics):
            shown = [k for k in ("loss", "accuracy", "margin", "heldout_accuracy") if k in metrics]
            text = " | ".join(f"{k} {metrics[k]:.3f}" for k in shown)
            print(f"step {step + 1:5d}/{total_steps} | {text} | {seconds:.2f} s", flush=True)
        if args.save_every and (step + 1) % args.save_every == 0 and accelerator.is_main_process:
            values = [p.detach().cpu() for p in parameters]
            saved = {"step": step + 1, "covariance": covariance, "parameters": values, "rng": torch.get_rng_state()}
            save_checkpoint(folder, {**saved, "optimizer": optimizer.state_dict()})

    # 4. Result: a head whose scores have sd 1, their mean and canaries in reward.json, gates for RL
    if not accelerator.is_main_process:
        return
    groups, normalized_on = load_demonstrations(args, examples, encode_answer)
    card = normalize_head(model, head, groups, args, pad_id)
    save_adapter(folder, model, "reward", base, tokenizer, head.weight)
    card |= {"quant": args.quant, "dtype": args.dtype, "normalized_on": normalized_on}
    card["canaries"] = canary_scores(model, head, heldout or examples, card["mean"], args, pad_id)
    write_json(folder / "reward.json", card)
    print(f"reward: raw scores have mean {card['mean']:.3f} and sd 1 on {card['n']} examples of {normalized_on}")
    gates = []
    if heldout:
        rows = scored_pairs(model, head, heldout, card["mean"], args, pad_id)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_file(folder / "samples.jsonl", lambda temporary: temporary.write_text(lines, encoding="utf-8"))
        accuracy, low, rule = print_accuracy(rows)
        gates = [("accuracy_low", low, 0.5, low > 0.5), ("beats_length", accuracy - rule, 0.0, accuracy > rule)]
    write_report(folder, "reward", base_identity(base), gates)
    plot_curves(folder, ["loss", "accuracy", "margin", "heldout_accuracy"])
    accelerator.end_training()
    print(f"reward: wrote {folder}")


if __name__ == "__main__":
    run_cli(main, Args)
