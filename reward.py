# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "bitsandbytes==0.50.2", "peft==0.21.2",
#     "accelerate==1.15.0", "safetensors", "numpy", "matplotlib", "tqdm"]
# ///
"""Reward modelling: the second stage of RLHF (Ouyang et al. 2022, InstructGPT, section 3.5, "RM").

A scalar r(x, y), read off the last token of response y to prompt x, learns which of K responses people prefer (eq. 1),
by maximum likelihood of the comparisons (Bradley-Terry):

    L(theta) = - mean over prompts x, mean over the pairs y_w > y_l of x, of   log sigma( r(x, y_w) - r(x, y_l) )

The C(K,2) pairs of a prompt are one example and come from one forward pass. K = 2 is a pair of answers. Each step:

    1. a batch of prompts with their responses, laid out in flat rows: responses share their prompt
    2. the scores at the last tokens, the loss of the pairs and its gradient, row by row
    3. the update

    python reward.py                                       # the embedded world in tiny/, half a minute on two cores
    python reward.py --dataset tiny/rankings.jsonl --loss plackett_luce
    python reward.py --model runs/sft --dataset HuggingFaceH4/ultrafeedback_binarized --dataset_split train_prefs

Data (hub id, or local .jsonl, .json, .csv, .parquet, folder; one of these column sets; "subset" is kept for the table):
    prompt, chosen, rejected    strings or message lists; margin (a number) if wanted
    chosen, rejected            two whole dialogues, message lists or hh-rlhf's "\\n\\nHuman: ...\\n\\nAssistant: ..."
    prompt, responses, ranks    K responses and their ranks: 1 = best, equal = tie

Writes runs/reward/: the LoRA adapter and the head in PEFT's format (AutoModelForSequenceClassification loads them),
reward.json (mean of the scores), tokenizer, args.json, metrics.jsonl, timing.jsonl, samples.jsonl (scored held-out
pairs), curves.png, result.json, checkpoint.pt.
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
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
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
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, HfArgumentParser

TINY = Path(__file__).resolve().parent / "tiny"
TINY_SETTINGS: dict[str, Any] = {  # for its 0.9 M parameters: used where --dataset lies in tiny/ and no flag is given
    "learning_rate": 1e-3, "tokens_per_batch": 512, "quant": "none", "dtype": "float32",
}  # fmt: skip


def arg(default: Any, help: str) -> Any:
    """One dataclass field = one command-line flag with its --help text."""
    return field(default=default, metadata={"help": help.replace("%", "%%")})


@dataclass
class Args:
    # model
    model: str = arg(str(TINY / "sft"), "base model or run folder: hub id or local path")
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
    normalize_dataset: str | None = arg(None, "SFT data, scored mean 0, sd 1; default: the best training responses")
    max_prompt_length: int = arg(512, "longer prompts are dropped and counted, never cut (tokens)")
    max_response_length: int = arg(512, "longest response (tokens)")
    # loss
    loss: Literal["bradley_terry", "plackett_luce"] = arg("bradley_terry", "pairs, or whole rankings")
    label_smoothing: float = arg(0.0, "share of the labels taken to be wrong, in losses that allow it")
    center_coef: float = arg(0.0, "weight of (r_i + r_j)^2, which keeps scores around 0; 0.01 is usual")
    # optimisation
    learning_rate: float = arg(1e-4, "peak learning rate: linear warm-up, then a cosine down to a tenth")
    warmup_ratio: float = arg(0.05, "share of the steps with rising learning rate")
    weight_decay: float = arg(0.0, "AdamW weight decay")
    max_grad_norm: float = arg(1.0, "gradients longer than this are scaled down to it")
    batch_size: int = arg(32, "per step: examples; reward, dpo: prompts with their responses; RL: responses")
    tokens_per_batch: int | None = arg(None, "tokens per flat row: memory, speed; default: 512, 4096 on a GPU")
    epochs: float = arg(1.0, "passes over the dataset")
    max_steps: int = arg(0, "stop after this many steps; 0: no limit; the smaller bound wins")
    # run
    output_dir: str = arg("runs/reward", "run folder; an existing one is renamed unless --resume")
    seed: int = arg(0, "decides everything on CPU")
    eval_every: int = arg(0, "steps between evaluations on held-out data; 0: at the end only")
    save_every: int = arg(100, "steps between checkpoints; Ctrl-C and the last step write one too")
    resume: bool = arg(False, "go on from the checkpoint in --output_dir; --max_steps and --epochs may have grown")
    report_to: list[str] | None = arg(None, "trackers that accelerate knows: wandb, tensorboard, trackio, ...")


# ------------------------------------------------------------------------------------------------------- the maths
class Comparisons(NamedTuple):
    """The P pairs (i better than j) among the S responses of some prompts; tied responses form no pair."""

    better: Tensor  # (P,), index of i among the S
    worse: Tensor  # (P,), index of j
    weight: Tensor  # (P,), 1 / number of pairs of the prompt, so that each prompt counts once
    margin: Tensor  # (P,)
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


def reward_loss(scores: Tensor, pairs: Comparisons, args: Any) -> Tensor:
    """Scores (S,) -> (): the loss summed over prompts, with center_coef * (r_i + r_j)^2 for each pair.

    The regulariser is that of Eisenstein et al. 2023 ("Helping or herding?").
    """
    better, worse = scores.index_select(0, pairs.better), scores.index_select(0, pairs.worse)
    if args.loss == "bradley_terry":
        loss = (pairs.weight * bradley_terry_loss(better, worse, pairs.margin, args.label_smoothing)).sum()
    else:
        loss = plackett_luce_loss(scores, pairs.ranks, pairs.prompt).sum()
    return loss + args.center_coef * (pairs.weight * (better + worse) ** 2).sum()


def pair_sums(scores: Tensor, pairs: Comparisons) -> Tensor:
    """(2,), summed over prompts: pairs won (a tie is half), score difference."""
    d = scores[pairs.better] - scores[pairs.worse]
    return torch.stack([torch.heaviside(d, torch.full_like(d, 0.5)), d]) @ pairs.weight


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


# --------------------------------------------------------------------------------------------------- the algorithm
def main(args: Args) -> None:
    """Reward modelling from preferences (reward.py)."""
    run = Run(args, "reward", ("loss", "accuracy", "margin", "heldout_accuracy"))
    check(args.lora_r != 0, "--lora_r 0 is for sft.py only: a reward model is a LoRA adapter and a head")
    check(args.loss != "plackett_luce" or not args.label_smoothing, "--label_smoothing belongs to --loss bradley_terry")

    # An adapter that starts as a copy of the SFT adapter (new on a bare base), and a new head outside PEFT
    model, tokenizer, stop_ids, adapter = load_model(args, run.device)
    model = add_adapter(model, "reward", adapter, args)
    head = nn.Linear(model.config.hidden_size, 1, bias=False, device=run.device, dtype=torch.float32)
    nn.init.normal_(head.weight, std=1 / math.sqrt(model.config.hidden_size + 1))  # Stiennon et al. 2020
    weights = [p for name, p in model.named_parameters() if ".reward." in name] + [*head.parameters()]
    optimizer = make_optimizer(weights, args)
    columns = ["prompt + chosen + rejected", "chosen + rejected", "prompt + responses + ranks"]
    examples, heldout = load_data(columns, encode_comparison, tokenizer, stop_ids, run)
    longest = max([*examples["length"], *heldout["length"]])
    check_positions(model, min(longest, args.max_prompt_length + args.max_response_length))
    total_steps = math.ceil(args.epochs * len(examples) / args.batch_size)
    total_steps = min(total_steps, args.max_steps or total_steps)

    for step in run.steps(total_steps, weights, [optimizer]):
        start = time.time()

        # 1. A batch of prompts with their responses, laid out in flat rows
        batch = take(examples, batch_indices(step, examples["length"], args.batch_size, args.seed))
        passes = preference_passes(batch[run.rank :: run.world], model, args)

        # 2. The gradient of the mean over the batch's prompts, row by row
        sums = torch.zeros(3, device=run.device)
        with role(model, "reward", grad=True):
            for some, rows in passes:
                pairs = compare(some, run.device)
                scores = head_scores(model, head, rows)
                loss = reward_loss(scores, pairs, args) / len(batch)
                loss.backward()
                sums += torch.cat([loss.detach()[None], pair_sums(scores.detach(), pairs) / len(batch)])

        # 3. The update
        learning_rate = learning_rate_at(step, total_steps, args.learning_rate, args.warmup_ratio)
        grad_norm = run.clip_gradients(optimizer, learning_rate)
        optimizer.step()
        optimizer.zero_grad()

        # 4. Log, evaluate
        loss_sum, won, margin = run.total(*sums.tolist())
        metrics = {"step": step, "loss": loss_sum, "accuracy": won, "margin": margin}
        metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
        seconds, tokens = time.time() - start, sum(e["length"] for e in batch)
        if len(heldout) and run.evaluates(step):
            metrics["heldout_accuracy"] = share_won(scored_pairs(model, head, heldout, 0.0, args), "score")
        run.log(metrics, {"seconds": seconds, "tokens_per_second": tokens / seconds})

    # Result: a head whose scores have mean 0 (by reward.json) and sd 1 on demonstrations; accuracy on held-out pairs
    card = normalize_head(model, head, examples, tokenizer, stop_ids, run)
    compared = scored_pairs(model, head, heldout, card["mean"], args)
    if compared:
        run.add("samples.jsonl", [{**row, "step": total_steps} for row in compared])
    if run.main:
        (run.folder / "reward.json").write_text(json.dumps(card, indent=1))
    run.finish(model, "reward", tokenizer, stop_ids, accuracy_table(compared), head.weight)


# =================================================================================================================
# The rest is plumbing, in the order in which main calls it: run folder, model and roles, data, flat rows, evaluation.
# =================================================================================================================
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


# ------------------------------------------------------------------------------------------------- model and roles
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


def encode_comparison(row: dict, *how: Any) -> list[dict]:
    """encode_preference, with the row's "id" and "subset" for the accuracy table."""
    return [{**e, "id": row.get("id"), "subset": str(row.get("subset") or "")} for e in encode_preference(row, *how)]


def encode_demonstration(row: dict, tokenizer: Any, stop_ids: list[int], args: Any) -> list[dict]:
    """One SFT row -> its last assistant turn as a group of one response."""
    messages = row.get("messages")
    if messages is None:
        answer = row["completion"]
        answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        messages = [*to_messages(row, row["prompt"], tokenizer), *to_messages({}, answer, tokenizer)]
    return [encode_group([to_messages(row, messages, tokenizer)], tokenizer, stop_ids, args)]


def better_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """All (i, j) with i ranked better than j.

    >>> better_pairs([2, 1, 2])
    [(1, 0), (1, 2)]
    """
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


def compare(examples: list[dict], device: Any) -> Comparisons:
    """The pairs of some examples, as indices into the flat list of all their responses."""
    pairs: list[tuple] = []
    responses: list[tuple] = []
    for number, e in enumerate(examples):
        start, of_prompt = len(responses), better_pairs(e["ranks"])
        pairs += [(start + i, start + j, 1 / len(of_prompt), e["margin"]) for i, j in of_prompt]
        responses += [(rank, number) for rank in e["ranks"]]
    columns = [*zip(*pairs, strict=True), *zip(*responses, strict=True)]
    return Comparisons(*(torch.tensor(column, device=device) for column in columns))


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


def head_scores(model: Any, head: nn.Linear, rows: list[Row]) -> Tensor:
    """(S,): the head applied, in fp32, to the last token of each response, in the order of their numbers."""
    states = torch.cat([hidden_states(model, row).index_select(0, row.last) for row in rows])
    order = np.argsort([i for row in rows for i in row.numbers])
    return head(states.float()).squeeze(-1)[torch.from_numpy(order).to(states.device)]


# ------------------------------------------------------------------------------------------------------ evaluation
def score_all(model: Any, head: nn.Linear, examples: list[dict], args: Any) -> list[list[float]]:
    """Raw scores of each example's responses."""
    found: dict[int, list[float]] = {}
    with role(model, "reward"):
        for some, rows in tqdm(preference_passes(examples, model, args), desc="scoring", leave=False, disable=None):
            values = iter(head_scores(model, head, rows).tolist())
            found |= {id(e): [next(values) for _ in e["group"][1]] for e in some}
    return [found[id(e)] for e in examples]


def normalize_head(
    model: Any, head: nn.Linear, examples: Dataset, tokenizer: Any, stop_ids: list[int], run: Run
) -> dict:
    """Divide the head by the sd of its scores on (at most 1000) demonstrations: --normalize_dataset, tiny's SFT data,
    or without any the best response to each prompt; -> reward.json."""
    args, name = run.args, "best training responses"
    source = args.normalize_dataset or (
        str(TINY / "sft.jsonl") if Path(args.dataset).resolve().parent == TINY else None
    )
    if source:
        name, columns = Path(source).name, ["messages", "prompt + completion"]
        examples = load_examples(source, columns, encode_demonstration, tokenizer, stop_ids, run)
    some = take(examples, np.random.default_rng(args.seed).permutation(len(examples))[:1000])
    if not source:
        best = [e["ranks"].index(min(e["ranks"])) for e in some]
        some = [{"group": (e["group"][0], [e["group"][1][k]])} for e, k in zip(some, best, strict=True)]
    raw = np.concatenate(score_all(model, head, some, args))
    sd = float(raw.std()) or 1.0
    head.weight.data /= sd
    card = {"mean": float(raw.mean()) / sd, "sd": sd, "n": len(raw), "quant": args.quant, "dtype": args.dtype}
    print(f"reward: raw scores have mean {card['mean']:.3f} and sd 1 on {card['n']} examples of {name}")
    return {**card, "normalized_on": name}


def scored_pairs(model: Any, head: nn.Linear, heldout: Dataset, mean: float, args: Any) -> list[dict]:
    """One row per compared pair with its scores, in the format of samples.jsonl; lengths in characters."""
    rows, examples = [], take(heldout, range(len(heldout)))
    for number, (e, values) in enumerate(zip(examples, score_all(model, head, examples, args), strict=True)):
        for i, j in better_pairs(e["ranks"]):
            name = e["id"] if e["id"] is not None else number
            row = {"id": name if len(values) == 2 else f"{name}-{i}-{j}", "prompt": e["prompt"]}
            for side, k in (("chosen", i), ("rejected", j)):
                row |= {side: e["texts"][k], f"{side}_score": values[k] - mean, f"{side}_length": len(e["texts"][k])}
            rows.append({**row, "subset": e["subset"]})
    return rows


def share_won(rows: list[dict], key: str) -> float:
    """Share of the pairs whose chosen response has the larger "score" or "length"; a tie is half a win."""
    return float(np.heaviside([row[f"chosen_{key}"] - row[f"rejected_{key}"] for row in rows], 0.5).mean())


def accuracy_table(rows: list[dict]) -> dict[str, Any]:
    """Accuracy over pairs by subset with its 95 % interval, beside two rules of length; printed, for result.json."""
    if not rows:
        return {}
    print(f"{'subset':<20}  pairs  accuracy  95 % interval  longer wins  shorter wins")
    subsets = {}
    for name in [*sorted({row["subset"] for row in rows} - {""}), "all"]:
        part = [row for row in rows if name in ("all", row["subset"])]
        accuracy, longer = share_won(part, "score"), share_won(part, "length")
        low, high = wilson_interval(accuracy, len(part))
        print(f"{name:<20} {len(part):6} {accuracy:9.3f}  {low:.3f} - {high:.3f}  {longer:11.3f}  {1 - longer:12.3f}")
        beaten = {"longer_wins": longer, "beats_length": accuracy - max(longer, 1 - longer)}
        subsets[name] = {"pairs": len(part), "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, **beaten}
    return {**subsets["all"], "subsets": subsets}


if __name__ == "__main__":
    run_cli(main, Args)
