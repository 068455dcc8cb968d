# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "bitsandbytes==0.50.2", "peft==0.21.2",
#     "accelerate==1.15.0", "safetensors", "numpy"]
# ///
"""How a step of grpo.py or ppo.py grows: time per response token at 1, 2, 4 times the batch, and of the length.

    python bench/scaling.py --stage grpo

The work is bench/run.py's, without its peer and without end tokens: every response has the longest length, so that it
is known. A response of L tokens costs c + a L + b L^2: c is its prompt's, b L^2 its tokens' attention to each other, in
sampling and in training. Three lengths give all three; the table shows the share of b L^2. First of all comes
the share of a step spent sampling.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from run import SHARED, arg, prepare, run_cli, turn
from run import Args as RunArgs


@dataclass
class Args:
    stage: Literal["grpo", "ppo"] = arg("grpo", "what is measured")
    batch_size: int = arg(16, "responses per step at 1x")
    max_response_length: int = arg(32, "length of every response at 1x (tokens)")
    steps: int = arg(2, "measured steps of each size")
    hidden_size: int = arg(384, "of the Llama")
    layers: int = arg(10, "of the Llama")
    tokens_per_batch: int = arg(2048, "tokens per flat row")
    threads: int = arg(0, "torch threads; 0: torch's choice")
    pairs: str = arg(str(SHARED / "data" / "hh_rlhf"), "folder of .jsonl files with chosen and rejected dialogues")
    tokenizer: str = arg(str(SHARED / "tokenizers" / "phi3-mini"), "tokenizer: hub id or local path")
    output_dir: str = arg("runs/scaling", "work and results")


def measure(args: Args, batch: int, length: int) -> dict[str, float]:
    """One turn of ours at a size: seconds per step, share of sampling, microseconds per response token."""
    given = {
        **vars(args),
        "batch_size": args.batch_size * batch,
        "max_response_length": args.max_response_length * length,
    }
    size = RunArgs(**given, mean_response_length=1e9)
    prepare(size)
    result = turn(size, "ours")
    seconds = statistics.mean(result["seconds"])
    return {
        "batch": batch, "length": length, "seconds": seconds, "sampling": result["sampling"] / seconds,
        "per_token": 1e6 * seconds / result["counted"], "counted": result["counted"],
    }  # fmt: skip


def attention_share(lengths: list[float], per_token: list[float]) -> list[float]:
    """Share of the time that grows with the square of the length: b L^2 / (c + a L + b L^2), from three lengths.

    >>> [round(share, 3) for share in attention_share([1, 2, 4], [6.0, 6.0, 7.5])]  # 2 + 3 L + L^2
    [0.167, 0.333, 0.533]
    """
    x, times = np.array(lengths, dtype=float), np.array(lengths) * np.array(per_token)
    b = max(np.polyfit(x, times, 2)[0], 0.0)
    return (b * x**2 / times).tolist()


def main(args: Args) -> dict[str, Any]:
    """How a step grows with the batch and with the length of responses (bench/scaling.py)."""
    batches = [measure(args, batch, 1) for batch in (1, 2, 4)]
    lengths = [batches[0], *(measure(args, 1, length) for length in (2, 4))]
    shares = attention_share([row["length"] for row in lengths], [row["per_token"] for row in lengths])
    print(f"\n{args.stage}: {batches[0]['sampling']:.0%} of a step is sampling (at 1x)")
    print("| batch | length | s/step | microseconds per response token | sampling | attention |")
    print("|---|---|---|---|---|---|")
    for row, share in [*((row, None) for row in batches), *zip(lengths, shares, strict=True)]:
        shown = "" if share is None else f"{share:.2f}"
        print(f"| {row['batch']}x | {row['length']}x | {row['seconds']:.2f} | {row['per_token']:.0f} "
              f"| {row['sampling']:.2f} | {shown} |")  # fmt: skip
    result = {"args": vars(args), "batches": batches, "lengths": lengths, "attention": shares}
    Path(args.output_dir, "scaling.json").write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    run_cli(main, Args, "scaling.py")
