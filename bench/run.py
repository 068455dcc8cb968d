# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "bitsandbytes==0.50.2", "peft==0.21.2",
#     "accelerate==1.15.0", "safetensors", "numpy", "trl==1.16.0"]
# ///
"""One stage of solo-rlhf against TRL on the same work, in turns (ours, TRL, ours, TRL), each in a process of its own.

    python bench/run.py --stage dpo              # sft, reward, kwise, dpo, grpo, rloo, ppo
    python bench/run.py --stage ppo --peer_folder DIR      # DIR: pip install --no-deps --target DIR trl==1.12.0

The work: hh-rlhf dialogues on a Llama of 30 M parameters with random weights, LoRA r=16 on all linear layers (B not 0,
so that policy and reference differ), fp32, the same rows in the same batches, the same number of optimizer steps, no
gradient checkpointing on either side. An end token comes about once in 50 tokens, so responses have natural lengths.

What is measured, in the steps after the first, which warms up, and without ours' evaluation; memory and multiplications
in the first step of another turn, whose seconds do not count, because counting slows it and what comes after it:

    seconds   mean of the steps; the reference's passes included
    memory    most bytes in tensors at a time, from the start to the end of the first step, which has the longest rows
    tokens    columns that went through the embedding in a step, and tokens that count: supervised or sampled ones
    limit     multiplications of the first step / its seconds in the timed turns / rate of a large matmul
    decoding  the larger of weight bytes / bandwidth and multiplications / matmul rate, over the seconds of sampling

Ratios are medians over pairs of turns. The losses of both are printed; they are equal where both see the same tokens
(sft, reward, kwise, dpo), and can't be where each samples its own.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationMixin,
    HfArgumentParser,
    TrainerCallback,
)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
STAGES = ("sft", "reward", "kwise", "dpo", "grpo", "rloo", "ppo")
DATA_STAGES = STAGES[:4]  # they learn from given responses; the others sample
SCRIPTS = {"kwise": "reward", "rloo": "grpo"}  # the script of a stage, where it is not named like it
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}"
    "{% else %}User: {{ m['content'] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class UserError(Exception):
    """A mistake in what the user gave, printed as one line: what, where, what was expected, what to do."""


def arg(default: Any, help: str) -> Any:
    """One dataclass field = one command-line flag with its --help text."""
    text = {"help": help.replace("%", "%%")}
    return field(default_factory=default, metadata=text) if callable(default) else field(default=default, metadata=text)


@dataclass
class Args:
    stage: Literal["sft", "reward", "kwise", "dpo", "grpo", "rloo", "ppo"] = arg("dpo", "what is compared")
    pairs: str = arg(str(SHARED / "data" / "hh_rlhf"), "folder of .jsonl files with chosen and rejected dialogues")
    tokenizer: str = arg(str(SHARED / "tokenizers" / "phi3-mini"), "tokenizer: hub id or local path")
    hidden_size: int = arg(384, "of the Llama")
    layers: int = arg(10, "of the Llama")
    key_value_heads: int = arg(0, "of the Llama, whose query heads have 64 dimensions; 0: as many as those")
    batch_size: int = arg(0, "examples per step; 0: the stage's own")
    micro_batch_size: int = arg(8, "examples per forward pass of the peer")
    tokens_per_batch: int = arg(512, "tokens per flat row of ours; 512 is its default on a CPU")
    steps: int = arg(0, "measured steps per turn; 0: as many as take less than ten minutes")
    turns: int = arg(0, "timed turns of each side; 0: as many as take less than ten minutes")
    samples_per_prompt: int = arg(8, "G of grpo, rloo and ppo")
    max_response_length: int = arg(128, "longest sampled response (tokens)")
    mean_response_length: float = arg(50.0, "of sampled responses, were none cut off (tokens)")
    ppo_epochs: int = arg(4, "passes over a rollout in ppo")
    threads: int = arg(0, "torch threads; 0: torch's choice")
    peer_compact: bool = arg(False, "let TRL's lm_head skip unsupervised positions, as on a GPU (sft, dpo, grpo, rloo)")
    peer_folder: str = arg(str(ROOT / "runs" / "trl-1.12.0"), "ppo: folder with trl==1.12.0 (pip install --target)")
    output_dir: str = arg("runs/bench", "work and results")
    learning_rate: float = arg(0.0, "of both sides; 0: the stage's own")
    count: bool = arg(False, "a turn of one step that counts memory and multiplications")
    side: Literal["both", "ours", "peer"] = arg("both", "one turn of one side, in this process; both: the comparison")


# RL: so small that neither side's updates move the lengths of responses, and with them the work; the others as usual
LEARNING_RATES = {"grpo": 1e-8, "rloo": 1e-8, "ppo": 1e-8}
SIZES = {"sft": 32, "reward": 16, "kwise": 4, "dpo": 16, "grpo": 32, "rloo": 32, "ppo": 16}  # examples per step

STEPS = {"sft": 3, "reward": 6, "kwise": 1, "dpo": 2, "grpo": 1, "rloo": 1, "ppo": 1}  # measured per turn
TURNS = {"ppo": 1}  # of each side; 2 in the others


# -------------------------------------------------------------------------------------------------------- the work
def to_messages(dialogue: str) -> list[dict]:
    """hh-rlhf's dialogue as messages; Human and Assistant take turns, Human first."""
    turns = dialogue.replace("\n\nHuman:", "\x00user\x01").replace("\n\nAssistant:", "\x00assistant\x01")
    parts = [turn.partition("\x01") for turn in turns.split("\x00") if turn]
    return [{"role": who, "content": text.strip()} for who, _, text in parts]


def read_pairs(folder: Path, tokenizer: Any, n: int, longest: int) -> list[dict]:
    """The first n pairs with one prompt, alternating turns and at most `longest` tokens: prompt, chosen, rejected."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*test_dev.jsonl")) or sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"--pairs {folder}: no .jsonl files with chosen and rejected")
    by_file = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    found: list[dict] = []
    for row in (row for rows in zip(*by_file, strict=False) for row in rows):
        if isinstance(row["chosen"], str) and "prompt" not in row:
            chosen, rejected = to_messages(row["chosen"]), to_messages(row["rejected"])
        else:
            start = [{"role": "user", "content": row["prompt"]}]
            chosen, rejected = ([*start, {"role": "assistant", "content": row[k]}] for k in ("chosen", "rejected"))
        roles = [m["role"] for m in chosen]
        fits = all(len(tokenizer.apply_chat_template(m, tokenize=False)) < 4 * longest for m in (chosen, rejected))
        texts = chosen[-1]["content"], rejected[-1]["content"]
        alternates = roles == ["user", "assistant"] * (len(roles) // 2)
        if fits and alternates and all(texts) and texts[0] != texts[1] and chosen[:-1] == rejected[:-1]:
            found.append({"prompt": chosen[:-1], "chosen": texts[0], "rejected": texts[1]})
    if len(found) < n:
        raise UserError(f"--pairs {folder}: {n} usable pairs are needed, {len(found)} found; lower --steps")
    return found[:n]


def make_model(args: Args, folder: Path, tokenizer: Any, prompts: list[list[dict]]) -> None:
    """A Llama of random weights whose responses to prompts have a mean length, and an adapter with B not 0.

    All embeddings share a direction u; so do then all hidden states, and EOS's output row has more of it.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    d, vocabulary = args.hidden_size, len(tokenizer)
    heads = max(1, d // 64)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=d, intermediate_size=-(-8 * d // 3 // 64) * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=heads, num_key_value_heads=args.key_value_heads or heads, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    table = model.get_input_embeddings().weight.data
    u = torch.randn(d).sign()
    table += 0.04 * u
    lora: Any = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, p in lora.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.002)
    eos, n = tokenizer.eos_token_id, args.max_response_length
    given = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True, padding_side="left"
    )
    with torch.no_grad():
        texts = lora.generate(
            **given, do_sample=True, top_k=0, suppress_tokens=[eos], min_new_tokens=n, max_new_tokens=n
        )
        seen = torch.cat([given["attention_mask"], torch.ones(len(prompts), n, dtype=torch.long)], 1)
        hidden = model.model(input_ids=texts, attention_mask=seen).last_hidden_state[:, -n - 1 : -1]
        logits, along = hidden @ table.T, hidden @ u
    going = torch.ones(n).mul(1 - 1 / args.mean_response_length).cumprod(0)  # the share that has not ended
    low, high = 0.0, 4 * math.log(vocabulary) / along.mean().item()
    for _ in range(50):  # how much of u EOS needs, for responses of this mean length, --max_response_length included
        middle = (low + high) / 2
        logits[..., eos] = hidden @ (table[eos] + middle * u)
        often = (1 - logits.softmax(-1)[..., eos]).cumprod(1).mean(0)[:-1].sum() < going[:-1].sum()
        low, high = (low, middle) if often else (middle, high)
    table[eos] += low * u
    lora.peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
    lora.save_pretrained(str(folder / "start"))
    lora.unload().save_pretrained(folder / "base")
    for name in ("start", "base"):
        tokenizer.save_pretrained(folder / name)


def prepare(args: Args) -> Path:
    """Model, adapter and rows of one stage under --output_dir; rows are named by what they hold."""
    folder = Path(args.output_dir) / args.stage
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {args.tokenizer}: {str(error).splitlines()[0]}") from error
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.pad_token
    n_steps = args.steps + 2
    per_step = args.batch_size // (1 if args.stage in DATA_STAGES else args.samples_per_prompt)
    pairs = read_pairs(Path(args.pairs), tokenizer, per_step * n_steps + 4, 384)
    make_model(args, folder, tokenizer, [pair["prompt"] for pair in pairs[:16]])
    rows = [make_row(args.stage, pair, pairs, i) for i, pair in enumerate(pairs)]
    if args.stage == "ppo":
        make_reward_model(args, folder, pairs[:16])
    for name, part in (("train", rows[:-4]), ("heldout", rows[-4:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder


def make_reward_model(args: Args, folder: Path, pairs: list[dict]) -> None:
    """A reward folder on the same base, by one step of reward.py: its values do not matter here."""
    source = folder / "pairs.jsonl"
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    command = [sys.executable, str(ROOT / "reward.py"), "--model", str(folder / "start"), "--dataset", str(source)]
    command += ["--max_steps", "1", "--batch_size", "8", "--eval_size", "2", "--output_dir", str(folder / "reward")]
    shutil.rmtree(folder / "reward", ignore_errors=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"reward.py stopped: {done.stderr[-300:]}")


def make_row(stage: str, pair: dict, pairs: list[dict], i: int) -> dict:
    """A row as the stage's script reads it; kwise: nine responses, seven of them borrowed from other rows."""
    if stage == "sft":
        return {"messages": [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]}
    if stage in ("grpo", "rloo", "ppo"):
        return {"prompt": pair["prompt"]}
    if stage == "kwise":
        others = [pairs[(i + k) % len(pairs)]["chosen"] for k in range(1, 8)]
        return {
            "prompt": pair["prompt"],
            "responses": [pair["chosen"], pair["rejected"], *others],
            "ranks": [*range(9)],
        }
    return pair


def reward_length(prompts: list, completions: list, **columns: Any) -> list[float]:
    """A reward that both sides can compute from the text: vowels per character."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ch in "aeiou" for ch in text) / max(1, len(text)) for text in texts]


# ------------------------------------------------------------------------------------------------------- the meter
class WholeModel(contextlib.nullcontext):
    """Multiplications are counted for the whole; by module they can't be where a forward pass takes a gradient."""

    parents = {"Global"}  # noqa: RUF012


class Meter:
    """Counts what a turn does: seconds per step, bytes in tensors, tokens through the embedding, multiplications."""

    def __init__(self, args: Args):
        self.steps, self.counting, self.counted = args.steps, args.count, 0
        self.ends: list[float] = []
        self.losses: list[float | None] = []
        self.live = self.memory = self.forwards = 0  # live: bytes by the allocator's events; memory: the most so far
        self.profiler: Any = start_profiler() if self.counting else None
        self.tokens = {"grad": 0, "no_grad": 0, "sampled": 0}
        self.sampling, self.decode_calls, self.inside = 0.0, 0, False
        self.idle = False  # in an evaluation
        self.flops: Any = None
        if self.counting:
            give_back_freed_memory()
        self.start = self.n_flops = self.away = 0.0  # when step 0 begins, its multiplications, seconds of evaluation
        plain = torch.nn.Embedding.forward

        def forward(embedding: Any, ids: torch.Tensor) -> torch.Tensor:
            if self.measuring():
                self.tokens["sampled" if self.inside else "grad" if torch.is_grad_enabled() else "no_grad"] += (
                    ids.numel()
                )
            self.decode_calls += self.inside and self.measuring()
            self.forwards += 1
            if self.profiler and self.forwards % 8 == 0:
                self.count_bytes()
            return plain(embedding, ids)

        layer: Any = torch.nn.Embedding
        layer.forward = forward

    def measuring(self) -> bool:
        """Whether the steps that count are running: not the first, and not a last one with an evaluation in it."""
        return not self.idle and 1 <= len(self.ends) <= self.steps

    def begin(self) -> None:
        """A step begins; the first one's multiplications are counted."""
        if self.start:
            return
        if self.counting:
            from torch.utils.flop_counter import FlopCounterMode

            self.count_bytes()
            unseen = tensor_bytes() - self.live  # of tensors that the allocator did not make, as loaded weights
            self.live, self.memory = self.live + unseen, self.memory + unseen
            self.flops = FlopCounterMode(display=False)
            self.flops.mod_tracker = WholeModel()
            self.flops.__enter__()
        self.start = time.perf_counter() - self.away

    def end(self, loss: float | None) -> None:
        """A step ends."""
        if self.counting:
            self.flops.__exit__(None, None, None)
            self.n_flops = float(self.flops.get_total_flops())
            self.count_bytes()
            self.profiler = self.profiler.__exit__(None, None, None)
            self.counting = False
        self.ends.append(time.perf_counter() - self.away)
        if len(self.ends) <= self.steps + 1:
            self.losses.append(loss)

    def count_bytes(self) -> None:
        """Take the profiler's events, and start anew: events of a whole step of sampling are gigabytes."""
        self.profiler.__exit__(None, None, None)
        kineto: Any = self.profiler.profiler
        events = kineto.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        live = self.live + np.cumsum([0, *(n for _, n in changes)])
        self.live, self.memory = int(live[-1]), max(self.memory, int(live.max()))
        self.profiler = start_profiler()

    def aside(self, function: Callable) -> Callable:
        """`function`, an evaluation, as if it took no time."""

        def untimed(*args: Any, **kwargs: Any) -> Any:
            start, self.idle = time.perf_counter(), True
            try:
                return function(*args, **kwargs)
            finally:
                self.away, self.idle = self.away + time.perf_counter() - start, False

        return untimed

    def around(self, function: Callable) -> Callable:
        """`function`, a sampler, with its seconds added up."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start, self.inside = time.perf_counter(), True
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.sampling += (time.perf_counter() - start) * self.measuring()

        return timed

    def result(self, weights: int) -> dict:
        """What the turn measured; `weights`: parameters of the layers that every token goes through."""
        rate, bandwidth = machine_limits()
        seconds = np.diff(self.ends[: self.steps + 1]).tolist()
        bound = max(self.decode_calls * weights * 4 / bandwidth, 2 * weights * self.tokens["sampled"] / rate)
        return {
            "seconds": seconds, "memory": self.memory, "losses": self.losses,
            "counted": self.counted / self.steps,
            "tokens": {name: n / self.steps for name, n in self.tokens.items()},
            "sampling": self.sampling / self.steps, "decoding_limit": bound / self.sampling if self.sampling else None,
            "flops": self.n_flops, "first": self.ends[0] - self.start, "matmul_rate": rate, "bandwidth": bandwidth,
        }  # fmt: skip


def give_back_freed_memory() -> None:
    """Let malloc return large tensors at once (glibc only): the profiler's events would fall into what a growing
    key-value cache frees, so that nothing could reuse it, and a step of sampling would take 20 GB."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 2**23)  # M_MMAP_THRESHOLD


def start_profiler() -> Any:
    """A profiler of the CPU allocator's events that is already running."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    profiler.__enter__()
    return profiler


def tensor_bytes() -> int:
    """Bytes of all tensors alive, each storage once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storages = [x.untyped_storage() for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return sum({x.data_ptr(): x.nbytes() for x in storages if x.device.type != "meta"}.values())


def machine_limits() -> tuple[float, float]:
    """Multiply-add rate of a large fp32 matmul (2 per multiply-add, per second) and bytes per second read."""
    a, b = torch.randn(2, 1536, 1536).unbind()
    big = torch.randn(64 * 2**20)
    best = [math.inf, math.inf]
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        middle = time.perf_counter()
        big.sum()
        best = [min(best[0], middle - start), min(best[1], time.perf_counter() - middle)]
    return 2 * 1536**3 / best[0], big.numel() * 4 / best[1]


# ---------------------------------------------------------------------------------------------------------- ours
def run_ours(args: Args, folder: Path) -> dict:
    """One turn of this repository's script, by its own main."""
    sys.path.insert(0, str(ROOT))
    script: Any = importlib.import_module(SCRIPTS.get(args.stage, args.stage))
    meter = Meter(args)
    reward = f"{Path(__file__).resolve()}:reward_length_ours"
    sampling = {
        "samples_per_prompt": args.samples_per_prompt, "max_response_length": args.max_response_length,
        "missing_eos_penalty": 0.0, "reward_fn": reward,
    }  # fmt: skip
    settings: dict[str, dict] = {
        "sft": {"last_turn_only": True}, "reward": {}, "kwise": {},
        "dpo": {"eval_samples": 0},
        "grpo": {**sampling, "kl": "none"}, "rloo": {**sampling, "method": "rloo", "kl_coef": 0.05},
        "ppo": {**sampling, "reward_fn": None, "reward_model": str(folder / "reward"), "minibatches": 1,
                "ppo_epochs": args.ppo_epochs},
    }  # fmt: skip
    measured, last = 0 if args.count else args.steps, args.stage not in LEARNING_RATES  # they evaluate in a last step
    n_steps = 1 + measured + last
    batches, heads = [], []
    plain_batch, plain_log, plain_row = script.batch_indices, script.Run.log, script.flat_row
    plain_optimizer, plain_examples = script.make_optimizer, script.load_examples

    def batch_indices(*given: Any) -> list[int]:
        meter.begin()
        batches.append(plain_batch(*given))
        return batches[-1]

    def flat_row(*given: Any) -> Any:
        row = plain_row(*given)
        meter.counted += len(row.targets) * meter.measuring()
        return row

    def load_examples(source: str, *given: Any) -> Any:
        examples = plain_examples(source, *given)
        if len(examples) != len(Path(source).read_text(encoding="utf-8").splitlines()):
            raise UserError(f"{source}: {len(examples)} examples; the peer would see more rows")
        return examples

    def log(run: Any, metrics: dict, timing: dict) -> None:
        meter.end(metrics.get("loss", metrics.get("policy_loss")))
        plain_log(run, metrics, timing)

    def make_optimizer(weights: list, *given: Any) -> Any:
        heads.append(weights[-1].detach().clone())
        return plain_optimizer(weights, *given)

    script.batch_indices, script.Run.log, script.flat_row = batch_indices, log, flat_row
    script.make_optimizer, script.load_examples = make_optimizer, load_examples
    if hasattr(script, "sample"):
        script.sample, script.evaluate = meter.around(script.sample), meter.aside(script.evaluate)
    if args.stage in DATA_STAGES:
        settings[args.stage] |= {"max_response_length": 1024}
    flags = {
        "model": str(folder / "start"), "dataset": str(folder / "train.jsonl"), "output_dir": str(folder / "run"),
        "max_prompt_length": 1024,
        "eval_dataset": str(folder / "heldout.jsonl"), "batch_size": args.batch_size,
        "tokens_per_batch": args.tokens_per_batch, "max_steps": n_steps, "epochs": 9.0, "save_every": 10**6,
        "learning_rate": args.learning_rate,
        "warmup_ratio": 0.0, "gradient_checkpointing": False,
    }  # fmt: skip
    script.main(script.Args(**{**flags, **settings[args.stage]}))
    (folder / "batches.json").write_text(json.dumps(batches))
    if args.stage in ("reward", "kwise"):  # the adapter with the head that this run began with, for the peer
        weights = load_file(folder / "start" / "adapter_model.safetensors")
        shutil.copytree(folder / "start", folder / "classifier", dirs_exist_ok=True)
        save_file({**weights, script.HEAD_KEY: heads[0]}, folder / "classifier" / "adapter_model.safetensors")
    return meter.result(linear_weights(folder))


def reward_length_ours(prompts: list, responses: list[str], **columns: Any) -> list[float]:
    """reward_length by this repository's contract."""
    return reward_length(prompts, responses)


def linear_weights(folder: Path) -> int:
    """Parameters of the base that take part in every token's multiplication: the tied embedding as lm_head included."""
    from safetensors import safe_open

    with safe_open(folder / "base" / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


# ---------------------------------------------------------------------------------------------------------- theirs
class Callback(TrainerCallback):
    """Tells the meter when a step of a transformers Trainer begins and ends, and what it lost."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        """PPO's own loop has no on_step_begin."""
        self.meter.begin()

    def on_step_end(self, *given: Any, **named: Any) -> None:
        """After the optimizer step; the loss is logged after it."""
        self.meter.end(None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **named: Any) -> None:
        """The loss of the step that has just ended."""
        if self.meter.losses and logs and "loss" in logs:
            self.meter.losses[-1] = logs["loss"]


def peer_rows(args: Args, folder: Path) -> list[dict]:
    """The rows in the order of ours' batches."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    batches = json.loads((folder / "batches.json").read_text())[: args.steps + 1]
    return [rows[i] for batch in batches for i in batch]


def load_start(folder: Path, kind: Any, adapter: str = "start") -> Any:
    """The base with the adapter that ours starts from, trainable; with one score where `kind` is a classifier."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder / adapter))
    named = {}
    if kind is AutoModelForSequenceClassification:
        config.task_type, config.modules_to_save, named = "SEQ_CLS", ["score"], {"num_labels": 1}
    base = kind.from_pretrained(folder / "base", dtype=torch.float32, **named)
    model = PeftModel.from_pretrained(base, str(folder / adapter), config=config, is_trainable=True)
    return model


def peer_rows_and_flags(args: Args, rows: list[dict]) -> tuple[list[dict], dict]:
    """Rows in TRL's columns, and the flags that its trainer of this stage needs to do what ours does."""
    if args.stage == "sft":
        rows = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in rows]
    if args.stage == "kwise":
        some = [(r, i, j) for r in rows for i in range(9) for j in range(i + 1, 9)]
        rows = [{**r, "chosen": r["responses"][i], "rejected": r["responses"][j]} for r, i, j in some]
    if "chosen" in rows[0]:
        sides = ("chosen", "rejected")
        rows = [{"prompt": r["prompt"], **{s: [{"role": "assistant", "content": r[s]}] for s in sides}} for r in rows]
    if args.stage not in ("grpo", "rloo"):
        return rows, {"max_length": None}
    flags: dict[str, Any] = {
        "max_completion_length": args.max_response_length,
        "num_generations": args.samples_per_prompt,
    }
    flags |= {"shuffle_dataset": False, "temperature": 1.0}
    return rows, flags | ({"beta": 0.0, "loss_type": "grpo"} if args.stage == "grpo" else {"beta": 0.05})


def run_peer(args: Args, folder: Path) -> dict:
    """One turn of TRL's trainer on the same rows."""
    if args.stage == "ppo":
        sys.path.insert(0, args.peer_folder)
    trl: Any = importlib.import_module("trl")
    wanted = "1.12.0" if args.stage == "ppo" else "1.16.0"
    if trl.__version__ != wanted:
        command = f"pip install --no-deps --target {args.peer_folder} trl==1.12.0"
        raise UserError(f"trl {trl.__version__} found, {wanted} expected; {command if args.stage == 'ppo' else ''}")
    if args.stage == "ppo":
        return run_peer_ppo(args, folder)
    if args.peer_compact:  # on a CPU it scores them all, prompts and padding too
        utils: Any = importlib.import_module("trl.trainer.utils")
        utils._use_triton = lambda device: True
    name = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO", "rloo": "RLOO"}.get(args.stage, "Reward")
    trainer_class, config_class = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")  # imports them
    meter = Meter(args)
    rows, flags = peer_rows_and_flags(args, peer_rows(args, folder))
    if name == "Reward":
        model = load_start(folder, AutoModelForSequenceClassification, "classifier")
    else:
        model = load_start(folder, AutoModelForCausalLM)
    pairs_per_example = 36 if args.stage == "kwise" else 1
    config = config_class(
        output_dir=str(folder / "peer"), per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.batch_size * pairs_per_example // args.micro_batch_size,
        max_steps=1 if args.count else args.steps + 1, learning_rate=args.learning_rate, bf16=False,
        lr_scheduler_type="constant", use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **flags,
    )  # fmt: skip
    trainer = trainer_class(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), callbacks=[Callback(meter)],
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        **({"reward_funcs": reward_length} if args.stage in ("grpo", "rloo") else {}),
    )  # fmt: skip
    if args.stage not in ("grpo", "rloo"):  # the same rows in the same batches
        trainer._get_train_sampler = lambda *given: torch.utils.data.SequentialSampler(trainer.train_dataset)
    time_generate(meter)
    trainer.train()
    return meter.result(linear_weights(folder))


def time_generate(meter: Meter) -> None:
    """transformers' generate, which TRL samples with, timed by the meter."""
    sampler: Any = GenerationMixin
    sampler.generate = meter.around(sampler.generate)


def run_peer_ppo(args: Args, folder: Path) -> dict:
    """One turn of TRL 1.12's PPOTrainer: four models, LoRA on policy and value model."""
    ppo: Any = importlib.import_module("trl.experimental.ppo")
    trainer_class, config_class = ppo.PPOTrainer, ppo.PPOConfig
    meter = Meter(args)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base", padding_side="left")
    rows = [r for r in peer_rows(args, folder) for _ in range(args.samples_per_prompt)]
    ids = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, return_dict=False) for r in rows]
    policy = load_start(folder, AutoModelForCausalLM)
    reward, value = (load_start(folder, AutoModelForSequenceClassification, "reward") for _ in range(2))
    reward.requires_grad_(False)
    config = config_class(
        output_dir=str(folder / "peer"), per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.batch_size // args.micro_batch_size, num_mini_batches=1,
        total_episodes=args.batch_size * (1 if args.count else args.steps + 1), num_ppo_epochs=args.ppo_epochs,
        learning_rate=args.learning_rate,
        local_rollout_forward_batch_size=args.batch_size, response_length=args.max_response_length, stop_token="eos",
        temperature=1.0, num_sample_generations=0, bf16=False, use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = trainer_class(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward.get_base_model(),
        value_model=value.get_base_model(), train_dataset=datasets.Dataset.from_list([{"input_ids": i} for i in ids]),
        eval_dataset=datasets.Dataset.from_list([{"input_ids": i} for i in ids[:8]]), callbacks=[Callback(meter)],
    )  # fmt: skip
    time_generate(meter)
    trainer.train()
    return meter.result(linear_weights(folder))


# ------------------------------------------------------------------------------------------------------ comparison
def turn(args: Args, side: str, count: bool = False) -> dict:
    """One turn in a process of its own; `count`: for memory and multiplications."""
    result = Path(args.output_dir) / args.stage / f"{side}.json"
    result.unlink(missing_ok=True)
    given = [f"--{name}={value}" for name, value in {**vars(args), "side": side, "count": count}.items()]
    log = result.with_suffix(".log")
    with log.open("w") as stream:
        code = subprocess.run(
            [sys.executable, __file__, *given], stdout=stream, stderr=subprocess.STDOUT, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
        ).returncode  # fmt: skip
    if code or not result.is_file():
        raise UserError(f"{side}: stopped with exit code {code}; {log} ends with: {log.read_text()[-300:]}")
    return json.loads(result.read_text())


def summary(counts: dict[str, dict], ours: list[dict], peer: list[dict]) -> dict:
    """Medians of both sides and of the ratios of neighbouring turns, with the smallest and largest ratio.

    counts: the turn of each side that counted; the others are timed.
    """

    def middle(turns: list[dict], value: Callable[[dict], float]) -> float:
        return statistics.median(value(t) for t in turns)

    def ratios(value: Callable[[dict], float]) -> list[float]:
        all_ratios = sorted(value(b) / value(a) for a, b in zip(ours, peer, strict=True))
        return [statistics.median(all_ratios), all_ratios[0], all_ratios[-1]]

    def seconds(t: dict) -> float:
        return statistics.mean(t["seconds"])

    rows = {}
    for name, turns in (("ours", ours), ("peer", peer)):
        rows[name] = {
            "seconds": middle(turns, seconds), "memory": counts[name]["memory"],
            "flops": counts[name]["flops"],
            "limit": counts[name]["flops"] / middle(turns, lambda t: t["first"] * t["matmul_rate"]),
            "sampling_share": middle(turns, lambda t: t["sampling"] / seconds(t)),
            "decoding_limit": turns[0]["decoding_limit"] and middle(turns, lambda t: t["decoding_limit"]),
            "tokens": turns[0]["tokens"], "losses": turns[0]["losses"],
        }  # fmt: skip
    return {
        **rows, "faster": ratios(seconds), "memory_share": counts["ours"]["memory"] / counts["peer"]["memory"],
        "counted": ours[0]["counted"], "matmul_rate": middle([*ours, *peer], lambda t: t["matmul_rate"]),
        "bandwidth": middle([*ours, *peer], lambda t: t["bandwidth"]),
    }  # fmt: skip


def print_summary(stage: str, s: dict) -> None:
    """The table of one stage."""
    mib, g = 2**20, 1e9
    print(f"\n{stage}: {s['counted']:.0f} tokens count per step; matmul {s['matmul_rate'] / g:.0f} GFLOP/s, "
          f"{s['bandwidth'] / g:.1f} GB/s")  # fmt: skip
    print("|  | s/step | MiB | GFLOP | of limit | tokens with gradient / without / sampled | sampling | of its bound |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ("ours", "peer"):
        r = s[name]
        tokens = " / ".join(f"{r['tokens'][k]:.0f}" for k in ("grad", "no_grad", "sampled"))
        bound = f"{r['decoding_limit']:.2f}" if r["decoding_limit"] else "-"
        print(f"| {name:5} | {r['seconds']:.2f} | {r['memory'] / mib:.0f} "
              f"| {r['flops'] / g:.0f} | {r['limit']:.2f} "
              f"| {tokens} | {r['sampling_share']:.2f} | {bound} |")  # fmt: skip
    print(f"ours is {s['faster'][0]:.2f} times as fast [{s['faster'][1]:.2f}, {s['faster'][2]:.2f}] with "
          f"{s['memory_share']:.2f} of the memory; losses "
          + ", ".join(f"{a:.4f} / {b:.4f}" if None not in (a, b) else "-"
                      for a, b in zip(s["ours"]["losses"], s["peer"]["losses"], strict=False)))  # fmt: skip


def main(args: Args) -> dict:
    """Compare one stage with TRL on the same work (bench/run.py)."""
    args.batch_size, args.steps = args.batch_size or SIZES[args.stage], args.steps or STEPS[args.stage]
    args.turns = args.turns or TURNS.get(args.stage, 2)
    args.learning_rate = args.learning_rate or LEARNING_RATES.get(args.stage, 1e-5)
    args.micro_batch_size = min(args.micro_batch_size, args.batch_size)
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = Path(args.output_dir) / args.stage
    if args.side != "both":
        result = (run_ours if args.side == "ours" else run_peer)(args, folder)
        (folder / f"{args.side}.json").write_text(json.dumps(result, indent=1))
        return result
    prepare(args)
    sides: dict[str, list[dict]] = {"ours": [], "peer": []}
    counts = {side: turn(args, side, count=True) for side in sides}
    for number in range(args.turns):
        for side, turns in sides.items():
            turns.append(turn(args, side))
            print(f"turn {number + 1}, {side}: {statistics.mean(turns[-1]['seconds']):.2f} s per step", flush=True)
    result = summary(counts, sides["ours"], sides["peer"])
    written = {"args": vars(args), **result, "counts": counts, "turns": sides}
    (folder / "result.json").write_text(json.dumps(written, indent=1))
    print_summary(args.stage, result)
    return result


def run_cli(main: Callable[[Any], Any], args_class: Any, name: str) -> None:
    """Parse the flags and call main; a UserError is one line and exit status 1."""
    (args,) = HfArgumentParser(args_class, description=main.__doc__, allow_abbrev=False).parse_args_into_dataclasses()
    try:
        main(args)
    except UserError as problem:
        sys.exit(f"{name}: {problem}")


if __name__ == "__main__":
    run_cli(main, Args, "run.py")
