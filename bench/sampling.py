# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "bitsandbytes==0.50.2", "peft==0.21.2",
#     "accelerate==1.15.0", "safetensors", "numpy"]
# ///
"""The sampler of grpo.py and ppo.py against those of transformers, in turns, on bench/run.py's GRPO work.

    python bench/sampling.py

    ours         prompts once, responses side by side in shared rows, what has ended leaves
    fixed        ours with steps of fixed shapes, as a CUDA graph replays them; nothing leaves
    copied       ours, but keys and values copied for every query head, as transformers does (see --key_value_heads)
    generate     transformers' generate on all responses, the cache repeated, no row leaves
    static       generate with a static cache; compiled where transformers compiles by itself (not on a CPU)
    continuous   generate_batch: transformers' continuous batching with a paged cache

The same prompts, model, adapter, temperature 1, end token and longest length; every sampler draws its own responses, so
what counts is seconds and seconds per token. Turns are A B C ... A B C ... in one process.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from run import ROOT, SHARED, UserError, arg, prepare, run_cli
from run import Args as RunArgs
from transformers import AutoTokenizer, GenerationConfig

NAMES = ("ours", "fixed", "copied", "generate", "static", "continuous")


@dataclass
class Args:
    only: list[str] | None = arg(None, f"samplers by name; default: all, {' '.join(NAMES)}")
    batch_size: int = arg(64, "responses, 8 to a prompt")
    max_response_length: int = arg(128, "longest response (tokens)")
    turns: int = arg(2, "turns of each, after a shorter one that warms up")
    hidden_size: int = arg(384, "of the Llama")
    layers: int = arg(10, "of the Llama")
    key_value_heads: int = arg(0, "of the Llama; 0: as many as of queries")
    threads: int = arg(0, "torch threads; 0: torch's choice")
    pairs: str = arg(str(SHARED / "data" / "hh_rlhf"), "folder of .jsonl files with chosen and rejected dialogues")
    tokenizer: str = arg(str(SHARED / "tokenizers" / "phi3-mini"), "tokenizer: hub id or local path")
    output_dir: str = arg("runs/sampling", "work and results")


def make_samplers(folder: Path, prompts: list[list[int]], eos: int, pad: int) -> dict[str, Callable[[int, int], int]]:
    """Name -> function of (turn, longest length) that samples 8 responses to each prompt and returns their tokens."""
    sys.path.insert(0, str(ROOT))
    import grpo

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = grpo.Args(model=str(folder / "start"))
    model, _, _, adapter = grpo.load_model(args, device)
    model = grpo.add_adapter(model, "policy", adapter, args)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)

    def ours(turn: int, longest: int, static: bool = False) -> int:
        names, key = list(range(len(prompts))), (0, 0, turn)
        responses, _ = grpo.sample(model, prompts, names, 8, longest, 1.0, [eos], 8 * len(prompts), key, static)
        return sum(map(len, responses))

    def copied(turn: int, longest: int) -> int:
        with mock.patch.object(grpo, "grouped_attention", grpo.sdpa_attention_forward):
            return ours(turn, longest)

    def config(longest: int, **more: Any) -> GenerationConfig:
        return GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=longest, eos_token_id=eos, pad_token_id=pad, **more
        )

    def generate(turn: int, longest: int, **more: Any) -> int:
        torch.manual_seed(turn)
        settings = config(longest, num_return_sequences=8, **more)
        texts = model.generate(input_ids=ids, attention_mask=seen, generation_config=settings)[:, width:]
        before = (texts == eos).cumsum(1) - (texts == eos).long()  # end tokens before this one
        return int((before == 0).sum())

    def continuous(turn: int, longest: int) -> int:
        torch.manual_seed(turn)
        every = [prompt for prompt in prompts for _ in range(8)]
        outputs = model.get_base_model().generate_batch(every, generation_config=config(longest))
        return sum(len(output.generated_tokens) for output in outputs.values())

    def in_role(sampler: Callable) -> Callable:
        def call(*given: int) -> int:
            with grpo.role(model, "policy"):
                return sampler(*given)

        return call

    samplers = {
        "ours": ours,
        "fixed": lambda turn, longest: ours(turn, longest, True),
        "copied": copied,
        "generate": generate,
        "static": lambda turn, longest: generate(turn, longest, cache_implementation="static"),
        "continuous": continuous,
    }
    return {name: in_role(sampler) for name, sampler in samplers.items()}


def main(args: Args) -> dict[str, dict[str, float]]:
    """Compare samplers (bench/sampling.py)."""
    unknown = set(args.only or []) - set(NAMES)
    if unknown:
        raise UserError(f"--only {' '.join(sorted(unknown))}: known are {', '.join(NAMES)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {name: value for name, value in vars(args).items() if name not in ("only", "turns")}
    folder = prepare(RunArgs(stage="grpo", **given))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "base")
    texts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts[: args.batch_size // 8]]
    samplers = make_samplers(folder, prompts, tokenizer.eos_token_id, tokenizer.pad_token_id)
    samplers = {name: samplers[name] for name in NAMES if name in (args.only or NAMES)}
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    tokens: dict[str, list[int]] = {name: [] for name in samplers}
    for turn in range(-1, args.turns):  # turn -1 warms up
        for name, sampler in samplers.items():
            start = time.perf_counter()
            n = sampler(turn % 2**16, args.max_response_length if turn >= 0 else 4)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
                tokens[name].append(n)
    result = {
        name: {
            "seconds": statistics.median(seconds[name]), "tokens": statistics.median(tokens[name]),
            "ms_per_token": statistics.median(1e3 * s / n for s, n in zip(seconds[name], tokens[name], strict=True)),
        }
        for name in samplers
    }  # fmt: skip
    print(f"\n{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, 8 responses each")
    print("| sampler | s | tokens | ms per token | times ours |\n|---|---|---|---|---|")
    for name, r in result.items():
        times = f"{r['ms_per_token'] / result['ours']['ms_per_token']:.2f}" if "ours" in result else "-"
        print(f"| {name} | {r['seconds']:.2f} | {r['tokens']:.0f} | {r['ms_per_token']:.2f} | {times} |")
    Path(args.output_dir, "sampling.json").write_text(json.dumps({"args": vars(args), **result}, indent=1))
    return result


if __name__ == "__main__":
    run_cli(main, Args, "sampling.py")
