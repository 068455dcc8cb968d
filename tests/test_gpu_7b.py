"""bench/gpu_7b.py: its rows, its meter and its arithmetic by hand, and (slow) every kind of work, tiny, on the CPU."""

import doctest
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, read_jsonl
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import dpo

SMALL = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
NAMES = ("ppo-12", "dpo-12", "dpo-12-trl", "grpo-12", "grpo-12-trl")


def load_bench() -> ModuleType:
    """bench/gpu_7b.py as a module."""
    spec = importlib.util.spec_from_file_location("bench_gpu_7b", ROOT / "bench" / "gpu_7b.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu_7b"] = module
    spec.loader.exec_module(module)
    return module


gpu_7b = load_bench()


@pytest.fixture
def tokenizer() -> Any:
    """tiny/base's, with the script's template."""
    found = AutoTokenizer.from_pretrained(ROOT / "tiny" / "base")
    found.chat_template = gpu_7b.TEMPLATE
    return found


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config.json of three layers, in a folder called small."""
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(SMALL))
    return tmp_path / "small" / "config.json"


def result(**other: Any) -> dict:
    """What a work of 2 measured steps wrote: 16 responses of 6 tokens to prompts of 4."""
    plan = {
        "batch_size": 16, "flags": "-M 4", "prompt_length": 4, "response_length": 6, "peak": {"bytes": 8 * 2**30},
        "phases": {"load": {"total": 4 * 2**30}, "update: policy": {"total": 8 * 2**30}},
        "fixed": {"weights": {"4-bit weights": 70, "embeddings": 20, "lm_head": 20}, "adapters": {"policy": 10}},
    }  # fmt: skip
    return {
        "stage": "grpo", "side": "ours", "plan": plan, "step_seconds": [3.0, 7.0], "bandwidth": 1000.0,
        "seconds": {"rollout: prefill": 1.0, "rollout: decode": 5.0, "update: policy": 4.0}, "decode_steps": 10,
        "peaks": {"load": 5 * 2**30, "update: policy": 9 * 2**30, "other": 2**30}, "reserved": 10 * 2**30, **other,
    }  # fmt: skip


def test_doctests() -> None:
    """The examples in the docstrings."""
    outcome = doctest.testmod(gpu_7b)
    assert outcome.attempted > 0 and not outcome.failed


def test_figures_by_hand() -> None:
    """5 s per step, 3 of them sampling 96 tokens; 10 decoding steps of 100 bytes at 1000 bytes/s are 1 of 5 s."""
    numbers = gpu_7b.figures(result())
    expected = {
        "s/step": 5.0, "sampling, tokens/s": 32.0, "training, tokens/s": 80.0, "of bound": 0.2, "peak, GiB": 9.0,
        "reserved": 10.0, "plan": 8.0, "off by": 0.125,
    }  # fmt: skip
    assert numbers == pytest.approx(expected) and numbers.keys() == gpu_7b.NUMBERS.keys()
    pairs = gpu_7b.figures(result(stage="dpo", seconds={"update: policy": 10.0}, decode_steps=0))
    assert pairs["training, tokens/s"] == 2 * 16 * 10 / 5 and "of bound" not in pairs
    assert "plan" not in gpu_7b.figures(result(side="trl")) and "off by" not in gpu_7b.figures(result(side="trl"))


def test_rows_of_the_table() -> None:
    """One cell per column; a dash where there is no figure: out of memory, TRL, no GPU, nothing fits."""
    n = len(gpu_7b.NUMBERS) + 4

    def cells(**other: Any) -> list[str]:
        row = gpu_7b.table_row("m", "w", result(**other))
        assert row.startswith("| ") and row.endswith(" |")
        return row[2:-2].split(" | ")

    assert cells() == [
        "m", "w", "--batch_size 16 -M 4", "5.00", "32.0", "80.0", "0.200", "9.00", "10.00", "8.00", "+12.5%",
        "load 5.00 / 4.00; update: policy 9.00 / 8.00; other 1.00",
    ]  # fmt: skip
    failed = cells(error="out of memory in update: policy", step_seconds=[])
    assert failed[2].endswith("; out of memory in update: policy") and failed[3:7] == ["-"] * 4
    assert failed[7:11] == ["9.00", "10.00", "8.00", "-"] and len(failed) == n
    assert cells(side="trl")[9:] == ["-", "-", "load 5.00; update: policy 9.00; other 1.00"]
    assert cells(peaks={}, reserved=0)[7:] == ["-", "-", "8.00", "-", "-"]
    nothing = gpu_7b.table_row("m", "w", {"error": "no flags"})
    assert nothing == "| m | w | no flags |" + " - |" * (n - 3)


def test_a_tied_embedding_is_read_as_the_head() -> None:
    """Untied it is looked up; tied every logit needs it."""
    adapters = {"policy": 1}
    assert gpu_7b.decoding_bytes({"fixed": {"weights": {"embeddings": 20, "matrices": 5}, "adapters": adapters}}) == 26
    untied = {"embeddings": 20, "lm_head": 20, "matrices": 5}
    assert gpu_7b.decoding_bytes({"fixed": {"weights": untied, "adapters": adapters}}) == 26


def test_meter_gives_each_phase_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds and peaks are of the innermost phase; of two responses to a prompt, up to two columns are decoding."""
    clock, memory = iter(range(100)), {"peak": 0}
    monkeypatch.setattr(nn.Embedding, "forward", nn.Embedding.forward)  # the meter changes it
    monkeypatch.setattr(gpu_7b.Meter, "read_bandwidth", lambda self: 1.0)
    monkeypatch.setattr(gpu_7b, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: memory["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: memory.update(peak=0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    meter, table = gpu_7b.Meter(2), nn.Embedding(4, 2)
    meter.gpu = True

    def inner() -> str:
        memory["peak"] = 7
        return meter.phase

    def outer() -> tuple[str, str]:
        memory["peak"] = 3
        return meter.within(lambda: "inner", inner)(), meter.phase

    def generate() -> None:
        memory["peak"] = 9
        for columns in (5, 2, 1, 3, 2):  # two batches of prompts, three decoding steps
            table(torch.zeros(2, columns, dtype=torch.long))
            memory["peak"] = max(memory["peak"], 4)

    assert meter.within("outer", outer)() == ("inner", "outer")
    meter.end()
    meter.within("rollout: prefill", generate)()
    meter.end(20.0)
    found = meter.result()
    assert found["peaks"] == {"outer": 3, "inner": 7, "rollout: prefill": 9, "rollout: decode": 4, "other": 0}
    assert found["reserved"] == 9 and found["decode_steps"] == 3 and found["step_seconds"] == [20.0]
    assert found["seconds"] == {"other": 3.0, "rollout: prefill": 2.0, "rollout: decode": 2.0}


def test_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It names the phase, and what was measured before stays."""
    monkeypatch.setattr(nn.Embedding, "forward", nn.Embedding.forward)
    monkeypatch.setattr(gpu_7b.Meter, "read_bandwidth", lambda self: 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def too_big() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_7b, "run_ours", lambda spec, flags, meter: meter.within("update: policy", too_big)())
    file = tmp_path / "work.json"
    file.write_text(json.dumps({"stage": "dpo", "side": "ours", "flags": ["--batch_size", "4"]}))
    gpu_7b.run_work(file)
    found = json.loads(file.read_text())
    assert found["error"] == "out of memory in update: policy" and found["step_seconds"] == []


def test_texts_have_the_length(tokenizer: Any) -> None:
    """By dpo.py's own count: prompts, and responses with their end token; an impossible length is one line."""
    for n in (16, 40):
        prompts = gpu_7b.random_texts(tokenizer, n, 5, True)
        asked = [[{"role": "user", "content": p}] for p in prompts]
        assert len(set(prompts)) == 5 and {len(dpo.encode_prompt(tokenizer, p)) for p in asked} == {n}
        for answer in gpu_7b.random_texts(tokenizer, n, 5, False):
            talk = [*asked[0], {"role": "assistant", "content": answer}]
            ((ids, mask),) = dpo.encode_conversation(tokenizer, talk, [tokenizer.eos_token_id])
            assert sum(mask) == n and ids[-1] == tokenizer.eos_token_id
    with pytest.raises(gpu_7b.UserError, match="no texts of 1 tokens"):
        gpu_7b.random_texts(tokenizer, 1, 5, True)


def test_enough_rows(tokenizer: Any, tmp_path: Path) -> None:
    """A batch for every step and none twice; as many held-out prompts as are decoded at once."""
    tokenizer.save_pretrained(tmp_path)
    flags = SimpleNamespace(
        model=str(tmp_path), batch_size=8, samples_per_prompt=4, sample_batch_size=5, max_prompt_length=16,
        max_response_length=12,
    )  # fmt: skip
    for stage, n_train, n_heldout in (("ppo", 6, 5), ("dpo", 24, 2)):
        spec = {"stage": stage, "steps": 2, "folder": str(tmp_path)}
        rows, n = gpu_7b.write_rows(spec, flags)
        assert rows == read_jsonl(tmp_path / "train.jsonl") and len({json.dumps(row) for row in rows}) == n_train
        assert n == n_heldout == len(read_jsonl(tmp_path / "heldout.jsonl"))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_load_as_they_are(config: Path, tmp_path: Path, tied: bool) -> None:
    """transformers finds every tensor; a second call keeps the base, another configuration does not."""
    config.write_text(json.dumps({**SMALL, "tie_word_embeddings": tied}))
    args = gpu_7b.Args(tokenizer=str(ROOT / "tiny" / "base"), output_dir=str(tmp_path / "out"))
    folder = gpu_7b.prepare(args, config)
    assert folder == tmp_path / "out" / "small"
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(folder / "base", dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.vocab_size == 1024
    assert model.model.norm.weight.eq(1).all() and 0.019 < model.model.layers[2].mlp.up_proj.weight.std() < 0.021
    written = (folder / "base" / "model-00000.safetensors").stat().st_mtime_ns
    gpu_7b.prepare(args, config)
    assert (folder / "base" / "model-00000.safetensors").stat().st_mtime_ns == written
    config.write_text(json.dumps({**SMALL, "num_hidden_layers": 2}))
    gpu_7b.prepare(args, config)
    assert AutoConfig.from_pretrained(folder / "base").num_hidden_layers == 2


def test_a_full_disk_is_one_line(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed, what is free, before anything is written."""
    monkeypatch.setattr(gpu_7b.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    args = gpu_7b.Args(tokenizer=str(ROOT / "tiny" / "base"), output_dir=str(tmp_path / "out"))
    with pytest.raises(gpu_7b.UserError, match="GiB are needed for weights"):
        gpu_7b.prepare(args, config)
    assert not (tmp_path / "out" / "small" / "base").exists()


def test_errors_are_one_line(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, no such work, no configuration, no tokenizer, a tokenizer of too many tokens."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(gpu_7b.UserError, match="no GPU"):
        gpu_7b.main(gpu_7b.Args())
    with pytest.raises(gpu_7b.UserError, match="--only ppo-1 x: no such work; there are ppo-10"):
        gpu_7b.main(gpu_7b.Args(only=["ppo-12", "ppo-1", "x"]))
    tiny, out = str(ROOT / "tiny" / "base"), str(tmp_path / "out")
    with pytest.raises(gpu_7b.UserError, match="--config .*none.json"):
        gpu_7b.prepare(gpu_7b.Args(tokenizer=tiny, output_dir=out), tmp_path / "none.json")
    with pytest.raises(gpu_7b.UserError, match="--tokenizer"):
        gpu_7b.prepare(gpu_7b.Args(tokenizer=str(tmp_path / "none"), output_dir=out), config)
    config.write_text(json.dumps({**SMALL, "vocab_size": 64}))
    with pytest.raises(gpu_7b.UserError, match="1024 tokens, .* has 64"):
        gpu_7b.prepare(gpu_7b.Args(tokenizer=tiny, output_dir=out), config)


def run_script(*flags: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, without a GPU."""
    command = [sys.executable, str(ROOT / "bench" / "gpu_7b.py"), *flags]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_every_kind_of_work(config: Path, tmp_path: Path) -> None:
    """The table has a row per work with finite seconds and tokens; every response has the length that was asked."""
    flags = ["--prompt_length=16", "--response_length=16", "--steps=2", f"--tokenizer={ROOT / 'tiny' / 'base'}"]
    done = run_script(
        *flags, "--device_check=false", f"--config={config}", f"--output_dir={tmp_path}", "--only", *NAMES
    )
    assert done.returncode == 0, done.stderr
    head, _, *rows = [line[2:-2].split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows] == [["small", name] for name in NAMES] and all(len(r) == len(head) for r in rows)
    for cells in rows:
        row = dict(zip(head, cells, strict=True))
        sampling = [row["sampling, tokens/s"], row["of bound"]]
        assert 0 < float(row["s/step"]) < 1e3 and 0 < float(row["training, tokens/s"]) < 1e9, row
        if "dpo" in row["work"]:
            assert sampling == ["-", "-"]
        else:
            assert 0 < float(sampling[0]) < 1e9 and float(sampling[1]) >= 0
            measured = json.loads((tmp_path / "small" / f"{row['work']}.json").read_text())
            assert measured["decode_steps"] == 2 * 15  # the first token is prefill's
        assert row["peak, GiB"] == row["reserved"] == row["off by"] == "-"
    metrics = read_jsonl(tmp_path / "small" / "run" / "metrics.jsonl")  # grpo.py's run
    assert [row["response_length"] for row in metrics] == [16.0] * 3


@pytest.mark.slow
def test_a_broken_run_is_a_row(config: Path, tmp_path: Path) -> None:
    """Exit code and log; the works after it run."""
    config.write_text(json.dumps({**SMALL, "hidden_size": 80, "head_dim": 16}))  # bitsandbytes misreads 80 on a CPU
    flags = ["--prompt_length=16", "--response_length=16", "--steps=1", f"--tokenizer={ROOT / 'tiny' / 'base'}"]
    done = run_script(*flags, "--device_check=false", f"--config={config}", f"--output_dir={tmp_path}",
                      "--only", "dpo-10", "dpo-12")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| small")]
    assert len(rows) == 2 and all("stopped with exit code 1, see" in row for row in rows)


@pytest.mark.slow
def test_the_command_without_a_gpu() -> None:
    """Exit code 1 and one line; the same for a work that is not there."""
    for flags, text in (([], "no GPU"), (["--only", "ppo-13"], "no such work")):
        done = run_script(*flags)
        assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("gpu_7b.py: ") and text in done.stderr
