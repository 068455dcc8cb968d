"""bench/run.py: the work that it makes, its arithmetic, and (slow) one small comparison per stage."""

import importlib
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, shared_or_skip
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import reward


def load_bench() -> ModuleType:
    """bench/run.py as a module."""
    spec = importlib.util.spec_from_file_location("bench_run", ROOT / "bench" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_run"] = module
    spec.loader.exec_module(module)
    return module


bench = load_bench()


def small(folder: Path, **flags: Any) -> Any:
    """Args of a comparison that takes seconds: tiny's tokenizer and preferences, a model of two layers."""
    given = {
        "pairs": str(ROOT / "tiny" / "preferences.jsonl"), "tokenizer": str(ROOT / "tiny" / "base"), "hidden_size": 64,
        "layers": 2, "steps": 1, "turns": 1, "batch_size": 16, "micro_batch_size": 4, "tokens_per_batch": 256,
        "samples_per_prompt": 4,
        "max_response_length": 12, "ppo_epochs": 2, "threads": 1, "output_dir": str(folder),
    }  # fmt: skip
    return bench.Args(**{**given, **flags})


def test_dialogues_become_messages() -> None:
    """hh-rlhf's format: a turn begins with two line ends and a name."""
    text = "\n\nHuman: Hi\nthere\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: So long"
    assert [(m["role"], m["content"]) for m in bench.to_messages(text)] == [
        ("user", "Hi\nthere"),
        ("assistant", "Hello."),
        ("user", "Bye"),
        ("assistant", "So long"),
    ]


def test_the_work_on_hh_rlhf() -> None:
    """Both subsets, one prompt per pair, no pair twice, none over the length."""
    folder, tokens = shared_or_skip("data", "hh_rlhf"), shared_or_skip("tokenizers", "phi3-mini")
    tokenizer = AutoTokenizer.from_pretrained(tokens)
    tokenizer.chat_template = bench.TEMPLATE
    pairs = bench.read_pairs(folder, tokenizer, 100, 384)
    assert len({json.dumps(p) for p in pairs}) == 100
    assert all(p["prompt"][-1]["role"] == "user" and p["chosen"] != p["rejected"] for p in pairs)
    with pytest.raises(bench.UserError, match="usable pairs"):
        bench.read_pairs(folder, tokenizer, 10**6, 384)


def test_flat_rows_hold_no_padding() -> None:
    """512 hh-rlhf pairs, sixteen to a batch: a flat row has its tokens and nothing else, prompts once per pair; padded
    rows of eight, as TRL's, over three columns for each token."""
    folder, tokens = shared_or_skip("data", "hh_rlhf"), shared_or_skip("tokenizers", "phi3-mini")
    tokenizer = AutoTokenizer.from_pretrained(tokens)
    tokenizer.chat_template = bench.TEMPLATE
    model = SimpleNamespace(config=LlamaConfig(hidden_size=384), device=torch.device("cpu"))
    lengths, examples = reward.Args(max_prompt_length=1024, max_response_length=1024), []
    for pair in bench.read_pairs(folder, tokenizer, 512, 384):
        examples += reward.encode_preference(pair, tokenizer, [tokenizer.eos_token_id], lengths)
    flat = padded = 0
    for i in range(0, 512, 16):
        batch, args = examples[i : i + 16], SimpleNamespace(tokens_per_batch=1024)
        passes = reward.preference_passes(batch, model, args)
        assert sum(len(some) for some, _ in passes) == 16
        flat += sum(len(row.ids) for _, rows in passes for row in rows)
        for some in (batch[:8], batch[8:]):
            padded += 16 * max(len(e["group"][0]) + len(y) for e in some for y in e["group"][1])
    assert flat == sum(e["length"] for e in examples) and padded > 3 * flat


def test_responses_end_with_probability_one_in_fifty(tmp_path: Path) -> None:
    """The end token's mean probability under the model of random weights, on random text."""
    folder = bench.prepare(small(tmp_path, stage="dpo"))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        AutoTokenizer.from_pretrained(folder / "base"),
    )
    with torch.no_grad():
        logits = model(torch.randint(len(tokenizer), (16, 48), generator=torch.Generator().manual_seed(1))).logits
    assert 1 / 80 < logits.softmax(-1)[..., tokenizer.eos_token_id].mean() < 1 / 30
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 16 and rows[0].keys() == {"prompt", "chosen", "rejected"}


def test_kwise_pairs() -> None:
    """Nine ranked responses are 36 pairs, the better one chosen."""
    row = {"prompt": [{"role": "user", "content": "?"}], "responses": list("abcdefghi"), "ranks": list(range(9))}
    rows, flags = bench.peer_rows_and_flags(bench.Args(stage="kwise"), [row])
    pairs = [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows]
    assert len(pairs) == 36 == len(set(pairs)) and all(a < b for a, b in pairs) and flags == {"max_length": None}


def test_summary_by_hand() -> None:
    """Time ratios are of neighbouring turns: 6/2 and 8/4 seconds; bytes, 10/30, are of the turns that count.

    The first steps take twice 2 and twice 4 seconds for the 3 GFLOP that were counted, at 1 GFLOP/s: 3 / 6.
    """

    def turn(seconds: float) -> dict:
        common = {"losses": [1.0], "counted": 7.0, "tokens": {"grad": 1, "no_grad": 2, "sampled": 3}, "sampling": 1.0}
        return common | {
            "seconds": [seconds - 1, seconds + 1], "first": 2 * seconds, "decoding_limit": 0.25,
            "matmul_rate": 1e9, "bandwidth": 1e9,
        }  # fmt: skip

    counts = {"ours": {"memory": 10, "flops": 3e9}, "peer": {"memory": 30, "flops": 3e9}}
    result = bench.summary(counts, [turn(2), turn(4)], [turn(6), turn(8)])
    assert result["faster"] == [2.5, 2.0, 3.0] and result["memory_share"] == pytest.approx(1 / 3)
    assert result["ours"]["limit"] == pytest.approx(0.5)
    assert result["ours"]["seconds"] == 3 and result["ours"]["sampling_share"] == pytest.approx((0.5 + 0.25) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", bench.STAGES)
def test_small_comparison(stage: str, tmp_path: Path) -> None:
    """Both sides go through; where both see the same tokens, so are their losses, before and after an update."""
    flags: dict[str, Any] = {"batch_size": 4} if stage == "kwise" else {}
    if stage == "ppo":
        if not Path(bench.Args().peer_folder).is_dir():
            pytest.skip(
                "needs trl 1.12.0 in runs/trl-1.12.0: pip install --no-deps --target runs/trl-1.12.0 trl==1.12.0"
            )
    if stage in ("sft", "reward", "kwise", "dpo"):
        flags["learning_rate"] = 1e-3  # one update moves the next loss visibly
    result = bench.main(small(tmp_path, stage=stage, **flags))
    assert result["ours"]["tokens"]["grad"] > 0 and result["peer"]["tokens"]["grad"] > 0 and result["counted"] > 0
    if stage in ("sft", "reward", "kwise", "dpo"):
        assert len(result["ours"]["losses"]) == 2
        for ours, peer in zip(result["ours"]["losses"], result["peer"]["losses"], strict=True):
            assert ours == pytest.approx(peer, rel=2e-3)  # TRL logs four digits
    else:
        assert 0 < result["ours"]["sampling_share"] < 1 and math.isfinite(result["ours"]["decoding_limit"])


def run_script(name: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """bench/NAME.py on a small model with responses of at most 6 tokens, in a process of its own."""
    size = ["--max_response_length=6", "--hidden_size=64", "--layers=2", "--threads=1", f"--output_dir={folder}"]
    source = [f"--pairs={ROOT / 'tiny' / 'preferences.jsonl'}", f"--tokenizer={ROOT / 'tiny' / 'base'}"]
    command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), *size, *source, *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_samplers_go_through(tmp_path: Path) -> None:
    """Ours and transformers' on a small model: each draws at least one token a response and at most the longest."""
    done = run_script("sampling", tmp_path, "--batch_size=16", "--turns=1", "--hidden_size=128", "--key_value_heads=1")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "sampling.json").read_text())
    samplers = [row for name, row in result.items() if name != "args"]
    assert result["copied"]["tokens"] == result["ours"]["tokens"], "the same draws, keys copied or not"
    assert len(samplers) >= 5 and all(16 <= row["tokens"] <= 96 and row["seconds"] > 0 for row in samplers)
    done = run_script("sampling", tmp_path, "--only", "beam")
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("sampling.py: --only beam")


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No data, no tokenizer: what and where."""
    run: Callable = bench.main
    with pytest.raises(bench.UserError, match="--tokenizer"):
        run(small(tmp_path, tokenizer=str(tmp_path / "none")))
    with pytest.raises(bench.UserError, match="--pairs"):
        run(small(tmp_path, pairs=str(tmp_path)))
