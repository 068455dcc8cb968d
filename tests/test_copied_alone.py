"""Each script runs alone: copied into an empty folder, with nothing but the installed packages beside it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_alone(stage: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Copy one script into an empty folder and run it there, isolated from the repository and its tests."""
    folder.mkdir()
    shutil.copy(ROOT / f"{stage}.py", folder)
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"}
    line = [sys.executable, f"{stage}.py", *flags]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_sft_alone(base: Path, world: Path, tmp_path: Path) -> None:
    """sft.py with a local model and local data, paths relative to where it stands."""
    shutil.copytree(base, tmp_path / "alone" / "ckpt")
    shutil.copy(world / "sft.jsonl", tmp_path / "alone")
    shutil.move(tmp_path / "alone", tmp_path / "data")
    flags = ["--model", "../data/ckpt", "--dataset", "../data/sft.jsonl", "--max_steps", "2", "--batch_size", "8"]
    done = run_alone("sft", tmp_path / "empty", *flags, "--lora_r", "4", "--max_response_length", "24")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "empty" / "runs" / "sft"
    assert len(read_jsonl(folder / "metrics.jsonl")) == 2 and (folder / "adapter_model.safetensors").is_file()


def test_ppo_alone(sft_run: Path, world: Path, reward_file: str, tmp_path: Path) -> None:
    """ppo.py with a run folder, local prompts and a reward function."""
    flags = [
        "--model", str(sft_run), "--dataset", str(world / "prompts.jsonl"), "--reward_fn", reward_file,
        "--max_steps", "1", "--batch_size", "8", "--samples_per_prompt", "2", "--tokens_per_batch", "64",
        "--minibatches", "2", "--max_response_length", "8", "--eval_size", "3", "--missing_eos_penalty", "0",
        "--output_dir", "out",
    ]  # fmt: skip
    done = run_alone("ppo", tmp_path / "empty", *flags)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "empty" / "out"
    assert len(read_jsonl(folder / "metrics.jsonl")) == 1
    assert json.loads((folder / "result.json").read_text())["stage"] == "ppo"
    assert sorted(p.name for p in (tmp_path / "empty").iterdir() if p.name != "__pycache__") == ["out", "ppo.py"]


def test_reward_alone(base: Path, tmp_path: Path) -> None:
    """reward.py with local preferences."""
    if not (ROOT / "reward.py").is_file() or not (ROOT / "tiny" / "preferences.jsonl").is_file():
        pytest.skip("needs reward.py and tiny/preferences.jsonl")
    lines = (ROOT / "tiny" / "preferences.jsonl").read_text().splitlines()[:24]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--model", str(base), "--dataset", str(tmp_path / "pairs.jsonl"), "--max_steps", "2", "--lora_r", "4"]
    done = run_alone("reward", tmp_path / "empty", *flags, "--batch_size", "8", "--eval_size", "4")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "empty" / "runs" / "reward"
    assert len(read_jsonl(folder / "metrics.jsonl")) == 2 and (folder / "reward.json").is_file()


def test_dpo_alone(sft_run: Path, tmp_path: Path) -> None:
    """dpo.py with a run folder and local preferences; nothing is written beside its run folder."""
    lines = (ROOT / "tiny" / "preferences.jsonl").read_text().splitlines()[:24]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--model", str(sft_run), "--dataset", str(tmp_path / "pairs.jsonl"), "--max_steps", "2", "--epochs", "9"]
    done = run_alone("dpo", tmp_path / "empty", *flags, "--batch_size", "8", "--eval_size", "4", "--eval_samples", "2")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "empty" / "runs" / "dpo"
    assert len(read_jsonl(folder / "metrics.jsonl")) == 2 and len(read_jsonl(folder / "samples.jsonl")) == 4
    assert json.loads((folder / "result.json").read_text())["stage"] == "dpo"
    assert sorted(p.name for p in (tmp_path / "empty").iterdir() if p.name != "__pycache__") == ["dpo.py", "runs"]


def test_grpo_alone(sft_run: Path, world: Path, reward_file: str, tmp_path: Path) -> None:
    """grpo.py with a run folder, local prompts and a reward function; nothing is written beside its run folder."""
    flags = [
        "--model", str(sft_run), "--dataset", str(world / "prompts.jsonl"), "--rewards", f"{reward_file}=0.5",
        "--method", "dapo", "--max_steps", "2", "--batch_size", "8", "--samples_per_prompt", "4",
        "--max_response_length", "8", "--eval_size", "3",
    ]  # fmt: skip
    done = run_alone("grpo", tmp_path / "empty", *flags)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "empty" / "runs" / "grpo"
    assert len(read_jsonl(folder / "metrics.jsonl")) == 2
    assert len([row for row in read_jsonl(folder / "samples.jsonl") if row["model"] in ("sft", "grpo")]) == 6
    assert json.loads((folder / "result.json").read_text())["stage"] == "grpo"
    assert sorted(p.name for p in (tmp_path / "empty").iterdir() if p.name != "__pycache__") == ["grpo.py", "runs"]


def test_a_missing_embedded_world_is_one_line(tmp_path: Path) -> None:
    """Copied alone and without flags: the default paths are not there, and one clear line says so."""
    done = run_alone("sft", tmp_path / "empty")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("sft.py: ") and f"{tmp_path / 'empty' / 'tiny'}" in line
