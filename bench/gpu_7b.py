# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "bitsandbytes==0.50.2", "peft==0.21.2",
#     "accelerate==1.15.0", "safetensors", "numpy", "trl==1.16.0"]
# ///
"""PPO, DPO and GRPO of 7B models on one GPU: time and memory, beside the plan of tools/plan.py and TRL.

    python bench/gpu_7b.py                                            # every work on both models
    python bench/gpu_7b.py --only ppo-12 dpo-12 dpo-12-trl --config path/to/config.json

The weights are random, of the shapes in config.json: values matter neither for memory nor for speed. Prompts and
responses have exactly 512 tokens; no sampled token ends a response. A work is a stage with its batch and a limit in
GiB, on one side, in a process of its own; its other flags are those that the plan chooses for the limit:

    ppo-10, ppo-12    16 rollouts per step in 10 and 12 GiB; ppo-24: 64 rollouts, in minibatches of 16, in 24 GiB
    dpo-*, grpo-*     likewise: 16, 16 and 64 pairs or responses
    *-trl             TRL 1.16 with the same adapter, rows, batches, checkpointing and optimizer, 4 examples a pass
    *-bf16            the base in bfloat16 instead of NF4, within all of this card

PyTorch refuses ours what goes beyond the limit, less the plan's allowance for the CUDA context, so that a larger card
shows what fits a smaller one. TRL may take the whole card. The columns:

    s/step      median of the measured steps, after one that warms up
                (ours until the last update, by its own clock; TRL's from the end of one step to the next)
    sampling    sampled tokens / seconds of sampling, prefill included
    training    tokens of prompts and responses (a prompt counts for each response) / seconds of the rest of the step
    of bound    decoding: bytes of the weights that a token goes through / read bandwidth / seconds per token
    peak        torch.cuda.max_memory_allocated, the largest of all phases; reserved: what PyTorch took for it
    plan        the plan's figure for peak, without its allowances, and how far peak is off from it. Pages of optimizer
                states that bitsandbytes moves between GPU and CPU are in the plan and not in PyTorch's figures
    phases      max_memory_allocated of each phase / the plan's figure for it
"""

import importlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, HfArgumentParser

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
GIB = 2**30
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}"
    "{% else %}User: {{ m['content'] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
NUMBERS = {"s/step": ".2f", "sampling, tokens/s": ".1f", "training, tokens/s": ".1f", "of bound": ".3f",
           "peak, GiB": ".2f", "reserved": ".2f", "plan": ".2f", "off by": "+.1%"}  # column -> format  # fmt: skip
QUERY = "import torch; card = torch.cuda.get_device_properties(0); print(card.total_memory, card.name)"


class Work(NamedTuple):
    """One stage, one setting, one side."""

    stage: str
    batch_size: int
    gib: float  # limit
    quant: str = "nf4"
    side: str = "ours"
    micro: int = 4  # TRL's examples a pass


WORKS: dict[str, Work] = {}
for stage in ("ppo", "dpo", "grpo"):
    for gib, n in ((10, 16), (12, 16), (24, 64)):
        WORKS[f"{stage}-{gib}"] = Work(stage, n, gib)
        if stage != "ppo" and gib > 10:
            WORKS[f"{stage}-{gib}-trl"] = Work(stage, n, gib, side="trl")
    WORKS[f"{stage}-bf16"] = Work(stage, 16, 1e9, quant="none")


class UserError(Exception):
    """A mistake in what the user gave, printed as one line: what, where, what was expected, what to do."""


def arg(default: Any, help: str) -> Any:
    """One dataclass field = one command-line flag with its --help text."""
    text = {"help": help.replace("%", "%%")}
    return field(default_factory=default, metadata=text) if callable(default) else field(default=default, metadata=text)


@dataclass
class Args:
    config: list[str] = arg(
        lambda: [str(SHARED / "configs" / f"{name}.json") for name in ("Qwen2.5-7B", "Llama-3.1-8B")],
        "config.json of each model, called as the file, or as its folder where that is its name",
    )
    only: list[str] | None = arg(None, f"works by name; default: all, {' '.join(WORKS)}")
    steps: int = arg(2, "measured steps, after one that warms up")
    prompt_length: int = arg(512, "of every prompt (tokens)")
    response_length: int = arg(512, "of every response (tokens)")
    tokenizer: str = arg(str(SHARED / "tokenizers" / "phi3-mini"), "of the texts; hub id or local path")
    output_dir: str = arg("runs/gpu_7b", "weights, which are kept and used again, results and logs")
    device_check: bool = arg(True, "stop where there is no GPU; False: run on the CPU, without figures of memory")
    work: str | None = arg(None, "run the one work in this file, in this process: how the script calls itself")


# -------------------------------------------------------------------------------------------------------- the model
def write_base(folder: Path, settings: dict, model: Any) -> None:
    """A model folder of random bfloat16 weights; one layer at a time is in memory. Its name means that it is whole.

    Norms are 1, biases 0. Logits are small: then bfloat16 passes the scripts' preflight whatever the depth.
    """
    total, free = sum(2 * p.numel() for p in model.parameters()), shutil.disk_usage(folder.parent).free
    if free < 1.05 * total:
        raise UserError(f"{folder.parent}: {total / GIB:.1f} GiB are needed for weights, {free / GIB:.1f} are free")
    print(f"writing {total / GIB:.1f} GiB of random weights to {folder}", file=sys.stderr, flush=True)
    temporary = folder.with_name("base.tmp")
    for old in (folder, temporary):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir()
    index: dict[str, str] = {}
    block = torch.randn(min(1_000_003, total))
    for k, (_, group) in enumerate(groupby(model.named_parameters(), lambda item: item[0].split(".")[:3])):
        tensors = {name: torch.empty(p.shape, dtype=torch.bfloat16) for name, p in group}
        for name, x in tensors.items():
            if x.ndim == 1:
                x.fill_(name.endswith("norm.weight"))
            else:  # one block, repeated: 15 GB of random numbers would take minutes
                part = (block * (0.002 if len(x) == settings["vocab_size"] else 0.02)).to(torch.bfloat16)
                x.view(-1).copy_(part.repeat(-(-x.numel() // len(part)))[: x.numel()])
        index |= dict.fromkeys(tensors, f"model-{k:05d}.safetensors")
        save_file(tensors, temporary / f"model-{k:05d}.safetensors", {"format": "pt"})
    whole = {"metadata": {"total_size": total}, "weight_map": index}
    (temporary / "model.safetensors.index.json").write_text(json.dumps(whole))
    (temporary / "config.json").write_text(json.dumps(settings, indent=1))
    temporary.rename(folder)


def write_adapters(folder: Path, model: Any, tokenizer: Any) -> None:
    """start/, the adapter that policy and reference begin with, and reward/, which has a head; B is not 0 in them."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    with torch.device("meta"):
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", inference_mode=True)
        adapted = get_peft_model(model, lora)
    adapted.peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
    shapes = {name: p.shape for name, p in get_peft_model_state_dict(adapted).items()}
    head = {load_script("ppo").HEAD_KEY: (1, model.config.hidden_size)}
    for name, more in (("start", {}), ("reward", head)):
        adapted.peft_config["default"].save_pretrained(str(folder / name))
        weights = {key: 0.01 * torch.randn(shape) for key, shape in {**shapes, **more}.items()}
        save_file(weights, folder / name / "adapter_model.safetensors", {"format": "pt"})
        tokenizer.save_pretrained(folder / name)


def prepare(args: Args, file: Path) -> Path:
    """The folder of a model, with base/, start/ and reward/; a base of the same configuration is kept."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        AutoConfig.for_model(**settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--config {file}: no config.json of a model there ({reason}); the hub has one") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {args.tokenizer}: {str(error).splitlines()[0]}") from error
    if len(tokenizer) > settings["vocab_size"]:
        raise UserError(f"--tokenizer {args.tokenizer}: {len(tokenizer)} tokens, {file} has {settings['vocab_size']}")
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, tokenizer.unk_token or tokenizer.pad_token
    settings |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)
    folder = Path(args.output_dir, file.resolve().parent.name if file.name == "config.json" else file.stem)
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "base" / "config.json"
    torch.manual_seed(0)
    if not written.is_file() or json.loads(written.read_text()) != settings:
        write_base(folder / "base", settings, model)
    write_adapters(folder, model, tokenizer)
    return folder


# --------------------------------------------------------------------------------------------------------- the rows
def random_texts(tokenizer: Any, n_tokens: int, n: int, prompt: bool) -> list[str]:
    """n texts of random words that have n_tokens as a prompt up to the answer, or as an answer with its end token."""

    def count(text: str) -> int:
        asked = [{"role": "user", "content": text if prompt else "a"}]
        answer = [] if prompt else [{"role": "assistant", "content": text}]
        lengths = [
            len(tokenizer.apply_chat_template(messages, add_generation_prompt=messages is asked, return_dict=False))
            for messages in (asked, [*asked, *answer])
        ]
        return lengths[0] if prompt else lengths[1] - lengths[0]

    words: list[str] = []
    for word in (tokenizer.decode([i]).strip() for i in range(len(tokenizer))):
        if len(words) < 100 and word.isascii() and word.isalpha() and count(f"{word} {word}") == count(word) + 1:
            words.append(word)
    draw, texts = random.Random(n_tokens + prompt), [""]
    if words and n_tokens >= count(words[0]):
        more = n_tokens - count(words[0])
        texts = [" ".join([words[0], *draw.choices(words, k=more)]) for _ in range(n)]
    if any(count(text) != n_tokens for text in texts):
        raise UserError(f"no texts of {n_tokens} tokens can be made of this tokenizer's words; another --tokenizer")
    return texts


def write_rows(spec: dict, flags: Any) -> tuple[list[dict], int]:
    """train.jsonl and heldout.jsonl of a work -> (training rows, number of held-out ones).

    As many held-out prompts as are decoded at once, so that the evaluation is as large as the plan takes it to be.
    """
    tokenizer, pairs = AutoTokenizer.from_pretrained(flags.model), spec["stage"] == "dpo"
    n_train = flags.batch_size // (1 if pairs else flags.samples_per_prompt) * (spec["steps"] + 1)
    n = n_train + (2 if pairs else flags.sample_batch_size)
    prompts = random_texts(tokenizer, flags.max_prompt_length, n, True)
    rows: list[dict] = [{"prompt": [{"role": "user", "content": text}]} for text in prompts]
    if pairs:
        answers = iter(random_texts(tokenizer, flags.max_response_length, 2 * n, False))
        rows = [{**row, "chosen": next(answers), "rejected": next(answers)} for row in rows]
    for name, part in (("train", rows[:n_train]), ("heldout", rows[n_train:])):
        Path(spec["folder"], f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return rows[:n_train], n - n_train


def vowels(prompts: list, completions: list, **columns: Any) -> list[float]:
    """A reward for both sides: vowels per character.

    >>> vowels(["?"], ["aXiX"])
    [0.5]
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]


# -------------------------------------------------------------------------------------------------------- the meter
class Meter:
    """Seconds and peak memory by phase; one phase runs at a time. An error leaves the phase that it came from.

    While sampling, a pass over at most `most` columns decodes (a row may hold all responses to a prompt).
    """

    def __init__(self, most: int) -> None:
        self.gpu = torch.cuda.is_available()
        self.bandwidth = self.read_bandwidth()
        self.phase, self.since = "other", time.perf_counter()
        self.last_end = self.since
        self.seconds = defaultdict[str, float](float)
        self.peaks, self.reserved, self.decode_steps = defaultdict[str, int](int), 0, 0
        self.step_seconds: list[float] = []
        embedding: Any = torch.nn.Embedding
        plain = embedding.forward

        def forward(layer: Any, ids: torch.Tensor) -> torch.Tensor:
            job, _, part = self.phase.partition(": ")
            if part in ("prefill", "decode"):
                now = f"{job}: {'prefill' if ids.shape[1] > most else 'decode'}"
                if now != self.phase:
                    self.switch(now)
                self.decode_steps += now == "rollout: decode"
            return plain(layer, ids)

        embedding.forward = forward
        cuda_graph: Any = torch.cuda.CUDAGraph
        plain_replay = cuda_graph.replay

        def replay(graph: Any) -> None:  # a step of the sampler that no Python code of the model sees
            self.decode_steps += self.phase == "rollout: decode"
            plain_replay(graph)

        cuda_graph.replay = replay

    def read_bandwidth(self) -> float:
        """Bytes per second read by large sums, the best of ten."""
        big, seconds = torch.ones(GIB // 4 if self.gpu else GIB // 64, device="cuda" if self.gpu else "cpu"), []
        for _ in range(10):
            start = time.perf_counter()
            torch.stack([big.sum() for _ in range(10)]).tolist()  # waits for all of them
            seconds.append(time.perf_counter() - start)
        n = 10 * big.nbytes
        del big
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return n / min(seconds)

    def switch(self, phase: str) -> str:
        """Another phase begins; returns the one that ends."""
        if self.gpu:
            torch.cuda.synchronize()
            self.peaks[self.phase] = max(self.peaks[self.phase], torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        before, self.phase, self.since = self.phase, phase, now
        return before

    def within(self, phase: str | Callable[..., str], function: Callable) -> Callable:
        """`function`, as a phase; a callable `phase` is asked with the function's arguments."""

        def measured(*given: Any, **named: Any) -> Any:
            before = self.switch(phase(*given, **named) if callable(phase) else phase)
            result = function(*given, **named)
            self.switch(before)
            return result

        return measured

    def after(self, phase: str, function: Callable) -> Callable:
        """`function`, with which the phase `phase` begins."""

        def measured(*given: Any, **named: Any) -> Any:
            result = function(*given, **named)
            self.switch(phase)
            return result

        return measured

    def end(self, seconds: float | None = None) -> None:
        """A step ends; it took `seconds`, or all the time since the one before."""
        self.switch(self.phase)
        self.step_seconds.append(self.since - self.last_end if seconds is None else seconds)
        self.last_end = self.since
        if len(self.step_seconds) == 1:
            self.seconds, self.decode_steps = defaultdict(float), 0

    def result(self) -> dict:
        """What was measured; seconds are of the steps after the first."""
        self.switch(self.phase)
        names = ("step_seconds", "seconds", "decode_steps", "peaks", "reserved", "bandwidth")
        return {**{name: getattr(self, name) for name in names}, "step_seconds": self.step_seconds[1:]}


# --------------------------------------------------------------------------------------------------------- one work
def load_script(name: str) -> Any:
    """A script of this repository as a module."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


def run_ours(spec: dict, flags: Any, meter: Meter) -> None:
    """This repository's script, its functions as phases with the plan's names."""
    script, folder = load_script(spec["stage"]), Path(spec["folder"])
    plain_log = script.Run.log

    def log(run: Any, metrics: dict, timing: dict) -> None:
        meter.switch("other")
        meter.end(timing["seconds"])
        plain_log(run, metrics, timing)

    def role_pass(model: Any, who: str, *rest: Any) -> str:
        return "evaluation: log-probs" if meter.phase == "evaluation" else f"scores: {who}"

    def dpo_pass(*_: Any) -> str:
        reference = meter.phase == "update: policy" and not torch.is_grad_enabled()
        return "reference's log-probs" if reference else meter.phase

    if hasattr(script, "sample"):
        plain_sample = script.sample
        script.sample = lambda *given: plain_sample(*given[:6], [-1], *given[7:])  # no token ends a response
    script.Run.log = log
    phases: dict[str, Any] = {
        "load_base": "load", "evaluate": "evaluation", "role_logprobs": role_pass, "preflight": "scores: policy",
        "score": lambda *_: role_pass(None, "reward, critic"), "logprob_table": dpo_pass,
        "sample": lambda *given: f"{'evaluation' if given[8][1] else 'rollout'}: prefill",  # key: seed, stream, step
    }  # fmt: skip
    for name in filter(lambda name: hasattr(script, name), phases):
        setattr(script, name, meter.within(phases[name], getattr(script, name)))
    last = {"ppo": "masked_whiten", "grpo": "response_advantages", "dpo": "batch_indices"}[spec["stage"]]
    setattr(script, last, meter.after("update: policy", getattr(script, last)))  # what main does next are the updates
    write_rows(spec, flags)
    shutil.rmtree(folder / "run", ignore_errors=True)
    script.main(flags)


def load_trl_model(flags: Any, gpu: bool) -> Any:
    """The base, quantised as by load_base, and the adapter, trainable."""
    from peft import PeftModel

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        Path(flags.model).parent / "base", dtype=torch.bfloat16, device_map={"": 0 if gpu else "cpu"},
        quantization_config=nf4 if flags.quant == "nf4" else None,
    )  # fmt: skip
    return PeftModel.from_pretrained(base, flags.model, is_trainable=True)


def run_trl(spec: dict, flags: Any, meter: Meter) -> None:
    """TRL's trainer on the same rows."""
    datasets, transformers, trl = (importlib.import_module(name) for name in ("datasets", "transformers", "trl"))
    rows, _ = write_rows(spec, flags)
    micro = spec["micro"] if spec["stage"] == "dpo" else flags.samples_per_prompt
    kind, generation, more = "DPO", transformers.GenerationMixin, {}
    own: dict[str, Any] = {"max_length": None}
    if spec["stage"] == "dpo":
        for row, side in ((row, side) for row in rows for side in ("chosen", "rejected")):
            row[side] = [{"role": "assistant", "content": row[side]}]
    else:
        kind, more = "GRPO", {"reward_funcs": vowels}
        own = {"beta": flags.kl_coef, "loss_type": "grpo", "num_generations": flags.samples_per_prompt,
               "max_completion_length": flags.max_response_length, "temperature": 1.0, "shuffle_dataset": False,
               "generation_kwargs": {"min_new_tokens": flags.max_response_length}}  # fmt: skip
        generation.generate = meter.within("rollout: prefill", generation.generate)
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(Path(spec["folder"], "run")), per_device_train_batch_size=micro,
        gradient_accumulation_steps=flags.batch_size // micro, max_steps=spec["steps"] + 1,
        learning_rate=flags.learning_rate, bf16=True, use_cpu=not meter.gpu,
        gradient_checkpointing=meter.gpu, optim="paged_adamw_8bit" if meter.gpu else "adamw_torch",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **own,
    )  # fmt: skip
    on_step = type("OnStep", (transformers.TrainerCallback,), {"on_step_end": lambda *_, **named: meter.end()})
    trainer = getattr(trl, f"{kind}Trainer")(
        model=meter.within("load", load_trl_model)(flags, meter.gpu), args=config, callbacks=[on_step()],
        train_dataset=datasets.Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(flags.model),
        **more,
    )  # fmt: skip
    meter.within("training", trainer.train)()


def run_work(file: Path) -> None:
    """Run the work in `file`; what was measured is added to it. Out of memory is a result."""
    spec = json.loads(file.read_text())
    (flags,) = HfArgumentParser(load_script(spec["stage"]).Args).parse_args_into_dataclasses(spec["flags"])
    meter = Meter(getattr(flags, "samples_per_prompt", 1))
    if meter.gpu and spec["side"] == "ours":
        total = torch.cuda.get_device_properties(0).total_memory
        limit = spec["gib"] * GIB - spec["plan"]["allowances"]["context"]
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        (run_ours if spec["side"] == "ours" else run_trl)(spec, flags, meter)
    except torch.OutOfMemoryError:
        result = {**meter.result(), "error": f"out of memory in {meter.phase}"}
    else:
        result = meter.result()
    file.write_text(json.dumps({**spec, **result}, indent=1))


# ------------------------------------------------------------------------------------------------------ all of them
def make_plan(work: Work, folder: Path, gib: float, flags: list[str]) -> dict:
    """tools/plan.py's answer for these flags and a card of `gib`."""
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), work.stage, "--gpu_gb", f"{gib:g}", *flags]
    command += ["--model", str(folder / "base" / "config.json"), "--output", str(folder / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"tools/plan.py stopped: {(done.stderr.splitlines() or [''])[-1]}")
    return json.loads((folder / "plan.json").read_text())


def measure(args: Args, folder: Path, name: str, card_gib: float) -> dict:
    """One work: the flags that the plan chooses, its figures for them, and a run in a process of its own."""
    work, file, log = WORKS[name], folder / f"{name}.json", folder / f"{name}.log"
    gib = round(min(work.gib, card_gib), 2)
    flags = ["--quant", work.quant, "--dtype", "bfloat16", "--batch_size", str(work.batch_size)]
    flags += ["--max_prompt_length", str(args.prompt_length), "--max_response_length", str(args.response_length)]
    flags += {"ppo": ["--samples_per_prompt", "4", "--minibatches", str(work.batch_size // 16)],
              "grpo": ["--samples_per_prompt", "8"], "dpo": ["--eval_samples", "0"]}[work.stage]  # fmt: skip
    cards = make_plan(work, folder, gib, flags)["cards"]
    chosen = next(card["flags"] for card in cards if abs(card["gib"] - gib) < 0.01)
    if chosen is None:
        return {"error": f"the plan finds no flags for {gib:g} GiB"}
    flags += chosen.split()
    plan = make_plan(work, folder, gib, flags)
    flags += ["--model", f"{folder}/start", "--dataset", f"{folder}/train.jsonl", "--output_dir", f"{folder}/run"]
    flags += ["--eval_dataset", f"{folder}/heldout.jsonl", "--epochs", "1", "--learning_rate", "1e-5"]
    flags += {"ppo": ["--reward_model", f"{folder}/reward", "--missing_eos_penalty", "0"],
              "grpo": ["--reward_fn", f"{Path(__file__).resolve()}:vowels"], "dpo": []}[work.stage]  # fmt: skip
    spec = {**work._asdict(), "gib": gib, "steps": args.steps, "folder": str(folder), "flags": flags, "plan": plan}
    file.write_text(json.dumps(spec))
    with log.open("w") as stream:
        code = subprocess.run(
            [sys.executable, __file__, "--work", str(file)], stdout=stream, stderr=subprocess.STDOUT, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
        ).returncode  # fmt: skip
    failed = {"error": f"stopped with exit code {code}, see {log}"} if code else {}
    return {**json.loads(file.read_text()), **failed}


def decoding_bytes(plan: dict) -> int:
    """Bytes of the weights that a sampled token goes through: the base's but the embedding, and the policy's adapter.

    >>> weights = {"4-bit weights": 70, "embeddings": 20, "lm_head": 20}
    >>> decoding_bytes({"fixed": {"weights": weights, "adapters": {"policy": 3, "critic": 3}}})
    93
    """
    weights, adapters = plan["fixed"]["weights"], plan["fixed"]["adapters"]
    looked_up = weights["embeddings"] if weights.get("lm_head") else 0  # tied: the embedding is the lm_head
    return sum(weights.values()) - looked_up + adapters["policy"]


def figures(result: dict) -> dict[str, float]:
    """The numbers of a row by column, as far as there are any."""
    numbers, plan, peaks = {}, result.get("plan", {}), result.get("peaks", {})
    if plan and result["side"] == "ours":
        numbers["plan"] = plan["peak"]["bytes"] / GIB
    if peaks:
        numbers |= {"peak, GiB": max(peaks.values()) / GIB, "reserved": result["reserved"] / GIB}
    if result.get("error"):
        return numbers
    if peaks and "plan" in numbers:
        numbers["off by"] = numbers["peak, GiB"] / numbers["plan"] - 1
    seconds, decoding = statistics.median(result["step_seconds"]), result["seconds"].get("rollout: decode", 0.0)
    sampling = (decoding + result["seconds"].get("rollout: prefill", 0.0)) / len(result["step_seconds"])
    n, length = plan["batch_size"] * (2 if result["stage"] == "dpo" else 1), plan["response_length"]
    if decoding:
        numbers["sampling, tokens/s"] = n * length / sampling
        numbers["of bound"] = decoding_bytes(plan) / result["bandwidth"] * result["decode_steps"] / decoding
    return {**numbers, "s/step": seconds,
            "training, tokens/s": n * (plan["prompt_length"] + length) / (seconds - sampling)}  # fmt: skip


def table_row(model: str, name: str, result: dict) -> str:
    """A work's row of the table; what is not known is a dash."""
    numbers, plan, peaks = figures(result), result.get("plan"), result.get("peaks", {})
    flags = f"--batch_size {plan['batch_size']} {plan['flags']}" if plan else ""
    cells = [model, name, "; ".join(text for text in (flags, result.get("error")) if text)]
    cells += [format(numbers[column], how) if column in numbers else "-" for column, how in NUMBERS.items()]
    planned = plan["phases"] if plan and result["side"] == "ours" else {}
    phases = [f"{phase} {n / GIB:.2f}" + (f" / {planned[phase]['total'] / GIB:.2f}" if phase in planned else "")
              for phase, n in peaks.items()]  # fmt: skip
    return "| " + " | ".join([*cells, "; ".join(phases) or "-"]) + " |"


def main(args: Args) -> None:
    """Time and memory of 7B models on one GPU (bench/gpu_7b.py)."""
    names = args.only or list(WORKS)
    if not set(names) <= WORKS.keys():
        unknown = " ".join(name for name in names if name not in WORKS)
        raise UserError(f"--only {unknown}: no such work; there are {' '.join(WORKS)}")
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: must be above 0")
    asked = subprocess.run([sys.executable, "-c", QUERY], capture_output=True, text=True, check=False)
    if asked.returncode and args.device_check:
        raise UserError("no GPU: PyTorch finds none here, and what this script measures is a GPU's")
    memory, _, card = (f"{24 * GIB} CPU" if asked.returncode else asked.stdout).strip().partition(" ")
    print(f"{card}, {int(memory) / GIB:.1f} GiB; torch {torch.__version__}; {args.steps} measured steps, "
          f"{args.prompt_length} + {args.response_length} tokens\n")  # fmt: skip
    columns = ["model", "work", "flags", *NUMBERS, "phases, GiB: measured / plan"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    for file in map(Path, args.config):
        folder = prepare(args, file)
        for name in names:
            result = measure(args, folder, name, int(memory) / GIB)
            print(table_row(folder.name, name, result), flush=True)


if __name__ == "__main__":
    arguments: Any = Args
    (parsed,) = HfArgumentParser(arguments, description=main.__doc__, allow_abbrev=False).parse_args_into_dataclasses()
    try:
        run_work(Path(parsed.work)) if parsed.work else main(parsed)
    except UserError as problem:
        sys.exit(f"gpu_7b.py: {problem}")
