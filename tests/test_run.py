"""Whole runs of sft.py: files, determinism, stopping and going on, mistakes of users, what later stages find.

What all scripts share (run folder, steps, checkpoints, command line, models and adapters) is tested here once.
"""

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, adapter_weights, make_adapter, read_jsonl, same_weights, strict_rows, write_jsonl
from safetensors.torch import load_file, save_file
from torch import Tensor

import sft

Run = Callable[..., Path]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ADAPTER_FILES = {
    "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "generation_config.json", "chat_template.jinja",
}  # fmt: skip
RUN_FILES = {
    "args.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl", "curves.png", "result.json", "checkpoint.pt",
}  # fmt: skip


def metrics(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl."""
    return strict_rows(folder)


def one_line(error: BaseException) -> str:
    """The message, which must be one line that says something."""
    text = str(error)
    assert "\n" not in text and len(text) > 20
    return text


def refused(run: Run, *patterns: str, **flags: Any) -> str:
    """run(**flags) ends in a UserError of one line that holds every pattern."""
    with pytest.raises(sft.UserError) as caught:
        run(**flags)
    text = one_line(caught.value)
    assert all(pattern in text for pattern in patterns), text
    return text


def contents(folder: Path) -> dict[Path, bytes]:
    """All files."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------------------ the folder
def test_the_run_folder(run_sft: Run, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file, nothing else; the loss at each step, the held-out loss where asked for, samples as the run goes."""
    folder = run_sft(plot=True, eval_every=2, save_every=2, max_steps=5)
    assert {p.name for p in folder.iterdir()} == ADAPTER_FILES | RUN_FILES
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(5))
    assert all(row.keys() >= {"step", "loss", "entropy", "grad_norm", "learning_rate", "tokens"} for row in rows)
    assert ["heldout_loss" in row for row in rows] == [False, True, False, True, True]
    timing = strict_rows(folder, "timing.jsonl")
    assert [row["step"] for row in timing] == list(range(5))
    assert all(row.keys() == {"step", "seconds", "tokens_per_second", "peak_bytes"} for row in timing)
    samples = strict_rows(folder, "samples.jsonl")
    assert [row["step"] for row in samples] == [1] * 4 + [3] * 4 + [4] * 4
    assert [row["model"] for row in samples] == [f"sft step {n}" for n in (2, 4, 5) for _ in range(4)]
    keys = {"id", "prompt", "response", "model", "finish_reason", "tokens", "step"}
    assert all(row.keys() == keys and row["finish_reason"] in ("stop", "length") for row in samples)
    assert all(row["finish_reason"] == "stop" or row["tokens"] == 24 for row in samples)
    result = json.loads((folder / "result.json").read_text())
    assert result.keys() >= {"stage", "heldout_loss_before", "heldout_loss", "base", "versions"}
    assert result["stage"] == "sft" and result["base"] == str(base)
    assert result["versions"]["torch"] == torch.__version__
    assert result["heldout_loss"] < result["heldout_loss_before"]
    assert result["heldout_loss"] == pytest.approx(rows[-1]["heldout_loss"], rel=1e-6)
    args = json.loads((folder / "args.json").read_text())
    assert args["quant"] == "none" and args["dtype"] == "float32" and args["max_steps"] == 5
    printed = capsys.readouterr().out
    for text in ("model: ", "data: ", "sft: 5/5 | loss ", "left\n", "heldout_loss_before ", f"wrote {folder} in "):
        assert text in printed


def test_files_get_normal_permissions(run_sft: Run) -> None:
    """Others may read a run folder as far as the umask lets them: no temporary file's 0600."""
    folder = run_sft(max_steps=1)
    mask = os.umask(0)
    os.umask(mask)
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o666 & ~mask}


def test_files_are_strict_json(run_sft: Run) -> None:
    """Without held-out data there is no held-out loss: what is not a number must not be written as NaN, no JSON."""
    folder = run_sft(eval_size=0, max_steps=1)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    for file in folder.rglob("*.json*"):
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(text, parse_constant=refuse)
    assert "heldout_loss" not in metrics(folder)[0]


def test_an_existing_folder_is_renamed(run_sft: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """run, run.1, run.2: nothing is overwritten, and it is said."""
    first = run_sft(max_steps=1)
    (first / "mine.txt").write_text("keep")
    second = run_sft(max_steps=1)
    (second / "mine.txt").write_text("keep too")
    run_sft(max_steps=1)
    names = {
        p.name: (p / "mine.txt").read_text() if (p / "mine.txt").is_file() else None for p in first.parent.iterdir()
    }
    assert names == {"sft": None, "sft.1": "keep", "sft.2": "keep too"}
    assert f"the existing {first} is now {first}.2" in capsys.readouterr().out


def test_a_run_that_fails_at_once_moves_nothing(run_sft: Run, base: Path, tmp_path: Path) -> None:
    """Bad data, a model that is not there, a first step that is not finite: the good folder stays where it is."""
    folder = run_sft(max_steps=1)
    before = contents(folder)
    refused(run_sft, "no usable row", dataset=str(write_jsonl(tmp_path / "bad.jsonl", [{"x": 1}])))
    refused(run_sft, "absent", model=str(tmp_path / "absent"))
    refused(run_sft, "not finite", model=str(broken_base(base, tmp_path)))
    assert contents(folder) == before and not (tmp_path / "sft.1").exists()


def broken_base(base: Path, tmp_path: Path) -> Path:
    """A base with one weight that is no number."""
    folder = Path(shutil.copytree(base, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_run_needs_no_matplotlib(run_sft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the run ends as it should, without a plot."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = run_sft(plot=True, max_steps=1)
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "curves.png").exists()


# ----------------------------------------------------------------------------------------------------- determinism
def test_a_run_is_a_function_of_its_seed(run_sft: Run, tmp_path: Path) -> None:
    """Twice the same arguments: the same bytes; another seed: others."""
    first, second, other = (run_sft(output_dir=str(tmp_path / n), seed=s) for n, s in (("a", 3), ("b", 3), ("c", 4)))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert same_weights(first, second) and not same_weights(first, other)


# -------------------------------------------------------------------------------------- what must not change a thing
def first_gradients(patch: pytest.MonkeyPatch, run: Run, **flags: Any) -> tuple[list[Tensor], dict]:
    """(gradients before the first update, first row of metrics.jsonl)."""
    found: list[Tensor] = []
    original = sft.Run.clip_gradients

    def recorded(self: sft.Run, optimizer: Any, *rest: Any) -> float:
        found.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])
        return original(self, optimizer, *rest)

    with patch.context() as inside:
        inside.setattr(sft.Run, "clip_gradients", recorded)
        folder = run(max_steps=1, **flags)
    return found, metrics(folder)[0]


def assert_same_gradients(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Equal to 1e-5 of the largest entry."""
    scale = max(g.abs().max().item() for g in theirs)
    assert len(ours) == len(theirs) and scale > 0
    assert max((x - y).abs().max().item() for x, y in zip(ours, theirs, strict=True)) <= 1e-5 * max(scale, 1e-3)


@pytest.mark.parametrize("other", [{"tokens_per_batch": 1}, {"tokens_per_batch": 60}, {"tokens_per_batch": 4000},
                                   {"gradient_checkpointing": True}], ids=str)  # fmt: skip
def test_memory_does_not_change_the_gradient(other: dict, run_sft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traps 14 and 23: examples of unequal lengths laid out in any way: the same gradient, loss and entropy."""
    whole, row = first_gradients(monkeypatch, run_sft)
    cut, cut_row = first_gradients(monkeypatch, run_sft, **other)
    assert_same_gradients(cut, whole)
    assert cut_row == pytest.approx(row, rel=1e-4, abs=1e-5)


def test_the_loss_is_the_mean_over_the_batch(run_sft: Run, base: Path, world: Path) -> None:
    """The formula in the docstring, by transformers' own loss: sum over supervised tokens / their number."""
    from transformers import AutoModelForCausalLM

    row = metrics(run_sft(max_steps=1, eval_size=0, batch_size=24))[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), sft.load_tokenizer(str(base), None, sft.Args())
    total, count = 0.0, 0
    for example in read_jsonl(world / "sft.jsonl"):
        ((ids, mask),) = sft.encode_conversation(tokenizer, example["messages"], [tokenizer.eos_token_id])
        labels = torch.tensor([[token if m else -100 for token, m in zip(ids, mask, strict=True)]])
        with torch.no_grad():
            total += model(torch.tensor([ids]), labels=labels).loss.item() * sum(mask)
        count += sum(mask)
    assert row["tokens"] == count and row["loss"] == pytest.approx(total / count, rel=1e-5)


SFT_RUNS: list[dict[str, Any]] = [
    {"last_turn_only": True},
    {"gradient_checkpointing": True},
    {"quant": "nf4"},
    {"dtype": "bfloat16"},
    {"chat_template": "plain"},
    {"chat_template": "text"},
    {"lora_target_modules": ["q_proj", "v_proj"], "lora_r": 2, "lora_alpha": 3.0},
    {"eval_size": 0},
    {"eval_size": 0.5, "eval_every": 1, "save_every": 1},
    {"dataset": "text"},
    {"model": "sft", "lora_r": None},
    {"tokens_per_batch": 1, "batch_size": 3},
    {"tokens_per_batch": None},
    {"epochs": 0.4, "max_steps": 0},
    {"batch_size": 50, "epochs": 10},
    {"weight_decay": 0.1, "max_grad_norm": 0.01, "warmup_ratio": 0.5},
]


@pytest.mark.parametrize("flags", SFT_RUNS, ids=lambda flags: ",".join(f"{k}={v}" for k, v in flags.items()))
def test_every_flag_runs(flags: dict, run_sft: Run, sft_run: Path, tmp_path: Path) -> None:
    """Trap 32: every flag that changes a code path; the loss is finite, the adapter loads again."""
    flags = dict(flags)
    write_jsonl(tmp_path / "text.jsonl", [{"text": f"Some text {i} about the fox." * (i + 1)} for i in range(20)])
    flags |= {"dataset": str(tmp_path / "text.jsonl")} if "dataset" in flags else {}
    flags |= {"model": str(sft_run)} if "model" in flags else {}
    folder = run_sft(**flags)
    rows = metrics(folder)
    assert len(rows) == (1 if flags.get("max_steps") == 0 else 3)
    assert all(math.isfinite(value) for row in rows for value in row.values()) and rows[0]["grad_norm"] > 0
    again = sft.Args(model=str(folder))
    model, _, _, adapter = sft.load_model(again, CPU)
    sft.add_adapter(model, "policy", adapter, again)
    assert again.quant == flags.get("quant", "none")


# --------------------------------------------------------------------------------------------------- interruptions
class Killed(BaseException):
    """Stands for SIGKILL: nothing in the scripts may catch it."""


def die_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: BaseException | None = None) -> None:
    """Let the `call`-th call of owner.name (from 1) end the run."""
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error or Killed
        return original(*args, **kwargs)

    patch.setattr(owner, name, counted)


SFT_FLAGS = {"max_steps": 5, "save_every": 2, "weight_decay": 0.1}
DEATHS: list[tuple[Any, str, int]] = [
    (sft.Run, "clip_gradients", 3),  # in the third step, before the update
    (sft.Run, "log", 3),  # the third step has been computed, nothing of it is written
    (sft.Run, "save", 2),  # metrics.jsonl is two steps ahead of the checkpoint
    (torch, "save", 2),  # half of a checkpoint is written
    (sft, "save_model", 1),  # all steps are done, the result is not written
]


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Path]:
    """Folders of runs that were left in peace, by name, made by the first test that asks."""
    return {}


@pytest.fixture
def done(uninterrupted: dict[str, Path], run_sft: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with SFT_FLAGS, left in peace."""
    if "done" not in uninterrupted:
        uninterrupted["done"] = run_sft(output_dir=str(tmp_path_factory.mktemp("sft") / "done"), **SFT_FLAGS)
    return uninterrupted["done"]


def assert_resumed_equals(done: Path, resumed: Path) -> None:
    """Metrics byte for byte, the adapter bit for bit, samples, and nothing temporary left in the way."""
    assert (resumed / "metrics.jsonl").read_bytes() == (done / "metrics.jsonl").read_bytes()
    assert len(read_jsonl(resumed / "timing.jsonl")) == len(metrics(done))
    assert same_weights(resumed, done)
    assert (resumed / "samples.jsonl").read_bytes() == (done / "samples.jsonl").read_bytes()
    assert {p.name for p in resumed.iterdir()} == {p.name for p in done.iterdir()}


@pytest.mark.parametrize(("owner", "where", "call"), DEATHS, ids=[f"{d[0].__name__}.{d[1]}" for d in DEATHS])
def test_killed_anywhere_it_resumes_bit_for_bit(
    owner: Any, where: str, call: int, run_sft: Run, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--resume ends as the uninterrupted run: weights, optimizer, cursor, lines of every file."""
    with monkeypatch.context() as patch:
        die_at(patch, owner, where, call)
        with pytest.raises(Killed):
            run_sft(**SFT_FLAGS)
    assert_resumed_equals(done, run_sft(resume=True, **SFT_FLAGS))


def test_half_a_line_is_cut_off(run_sft: Run, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill may leave half a line in any file."""
    with monkeypatch.context() as patch:
        die_at(patch, sft.Run, "log", 4)
        with pytest.raises(Killed):
            run_sft(**SFT_FLAGS)
    for name in ("metrics.jsonl", "timing.jsonl", "samples.jsonl"):
        with Path(run_folder(monkeypatch, run_sft), name).open("a") as stream:
            stream.write('{"step": 3, "lo')
    assert_resumed_equals(done, run_sft(resume=True, **SFT_FLAGS))


def run_folder(patch: pytest.MonkeyPatch, run: Run) -> Path:
    """Where run_sft writes."""
    with patch.context() as inside:
        inside.setattr(sft, "main", lambda args: None)
        return run()


def stop_in(patch: pytest.MonkeyPatch, step: int, *numbers: int) -> None:
    """Send this process the signals while that step (from 1) is being computed."""
    original = sft.Run.clip_gradients

    def sent(self: sft.Run, *rest: Any) -> float:
        if self.step + 1 == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(self, *rest)

    patch.setattr(sft.Run, "clip_gradients", sent)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 3])
def test_stopped_it_ends_the_step_and_resumes_bit_for_bit(
    number: int, step: int, run_sft: Run, done: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Ctrl-C and SIGTERM: the step ends, a checkpoint is written, one line says how to go on."""
    with monkeypatch.context() as patch:
        stop_in(patch, step, number)
        refused(run_sft, f"stopped after step {step} of 5; add --resume to go on from there", **SFT_FLAGS)
    assert f"sft: stopping after step {step}; once more to stop at once" in capsys.readouterr().out
    folder = run_folder(monkeypatch, run_sft)
    assert len(metrics(folder)) == step
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == step
    assert_resumed_equals(done, run_sft(resume=True, **SFT_FLAGS))


def test_stopped_twice_it_stops_at_once(run_sft: Run, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second Ctrl-C does not wait for the step; the last checkpoint is there."""
    with monkeypatch.context() as patch:
        stop_in(patch, 4, signal.SIGINT, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            run_sft(**SFT_FLAGS)
    folder = run_folder(monkeypatch, run_sft)
    assert len(metrics(folder)) == 3
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 2
    assert_resumed_equals(done, run_sft(resume=True, **SFT_FLAGS))


def test_after_the_last_step_signals_work_as_ever(run_sft: Run) -> None:
    """What comes after the loop can be stopped as any program can."""
    run_sft(max_steps=1)
    for number in (signal.SIGINT, signal.SIGTERM):
        assert signal.getsignal(number) is signal.default_int_handler


COMMAND_FLAGS = {
    "max_steps": 60, "epochs": 100, "save_every": 3, "batch_size": 8, "lora_r": 4, "eval_size": 4,
    "max_response_length": 24, "tokens_per_batch": 128,
}  # fmt: skip


def command(output: Path, base: Path, world: Path, **more: Any) -> list[str]:
    """The command line of sft.py on the small world."""
    flags: dict[str, Any] = {**COMMAND_FLAGS, "output_dir": output, "dataset": world / "sft.jsonl", "model": base}
    line = [sys.executable, str(ROOT / "sft.py")]
    return line + [str(x) for k, v in (flags | more).items() for x in (f"--{k}", v)]


def start(line: list[str], folder: Path, until: int) -> subprocess.Popen[str]:
    """Start a run and wait until that many steps are done."""
    process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while count_lines(folder / "metrics.jsonl") < until and process.poll() is None:
        time.sleep(0.002)
    assert process.poll() is None  # it is in the middle of training
    return process


def count_lines(file: Path) -> int:
    """Whole lines of a file that is being written, 0 where it is not there yet."""
    return file.read_bytes().count(b"\n") if file.is_file() else 0


@pytest.fixture
def by_command(
    uninterrupted: dict[str, Path], base: Path, world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run of the command line, left in peace."""
    if "command" not in uninterrupted:
        uninterrupted["command"] = tmp_path_factory.mktemp("command") / "done"
        line = command(uninterrupted["command"], base, world)
        subprocess.run(line, env=ENVIRONMENT, check=True, capture_output=True)
    return uninterrupted["command"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_sigkill_and_resume(seed: int, base: Path, world: Path, tmp_path: Path, by_command: Path) -> None:
    """A real SIGKILL at a random moment of training, twice, then --resume: as if nothing had happened."""
    rng, folder = random.Random(seed), tmp_path / "run"
    line = command(folder, base, world)
    for until in sorted(rng.sample(range(4, 60), 2)):
        process = start(line, folder, until)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        line = command(folder, base, world, resume=True)
    subprocess.run(line, env=ENVIRONMENT, check=True, capture_output=True)
    assert_resumed_equals(by_command, folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_signal(number: int, base: Path, world: Path, tmp_path: Path, by_command: Path) -> None:
    """From outside: exit code 1, the last line says how to go on, no traceback; resumed, it is the same run."""
    folder = tmp_path / "run"
    process = start(command(folder, base, world), folder, 7)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in printed
    assert "of 60; add --resume to go on from there" in printed.splitlines()[-1]
    subprocess.run(command(folder, base, world, resume=True), env=ENVIRONMENT, check=True, capture_output=True)
    assert_resumed_equals(by_command, folder)


# ----------------------------------------------------------------------------------------------------- going on
def test_a_resumed_run_may_be_longer(run_sft: Run) -> None:
    """--max_steps and --epochs may have grown; what is done stays."""
    folder = run_sft(max_steps=2)
    before = (folder / "metrics.jsonl").read_bytes()
    first = adapter_weights(folder)
    assert run_sft(max_steps=4, epochs=5.0, resume=True) == folder
    assert (folder / "metrics.jsonl").read_bytes().startswith(before)
    assert [row["step"] for row in metrics(folder)] == [0, 1, 2, 3]
    assert json.loads((folder / "args.json").read_text())["max_steps"] in (2, 4)
    assert any(not np.array_equal(first[k], v) for k, v in adapter_weights(folder).items())


def test_a_run_folder_may_be_moved_and_hold_any_text(run_sft: Run, tmp_path: Path) -> None:
    """Another --output_dir is no other run; U+2028 and U+0085, which JSON leaves as they are, end no line."""
    folder = run_sft(max_steps=2, eval_every=1)
    line = json.dumps({"step": 0, "response": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n"
    samples = line + (folder / "samples.jsonl").read_text(encoding="utf-8")
    (folder / "samples.jsonl").write_text(samples, encoding="utf-8")
    moved = folder.rename(tmp_path / "moved")
    assert run_sft(max_steps=3, eval_every=1, resume=True, output_dir=str(moved)) == moved
    assert (moved / "samples.jsonl").read_text(encoding="utf-8").startswith(samples)
    assert [row["step"] for row in metrics(moved)] == [0, 1, 2]


def test_a_finished_run_may_be_resumed(run_sft: Run) -> None:
    """Nothing is left to do: the same result once more."""
    folder = run_sft()
    before = contents(folder)
    run_sft(resume=True)
    changed = {p.name for p, data in contents(folder).items() if before.get(p) != data}
    assert changed <= {"result.json", "adapter_config.json"}


def test_a_run_that_ran_out_of_memory_goes_on_with_less(run_sft: Run, done: Path, monkeypatch: Any) -> None:
    """--resume takes other rows: the same numbers up to rounding."""
    with monkeypatch.context() as patch:
        die_at(patch, sft.Run, "log", 4)
        with pytest.raises(Killed):
            run_sft(**SFT_FLAGS)
    folder = run_sft(resume=True, **SFT_FLAGS, tokens_per_batch=30, gradient_checkpointing=True)
    assert len(metrics(folder)) == len(metrics(done)) > 3
    assert metrics(folder)[-1] == pytest.approx(metrics(done)[-1], rel=1e-4, abs=1e-6)


def test_resume_needs_the_same_settings(run_sft: Run) -> None:
    """Another learning rate or seed: which flag, its value now and then. The folder stays as it is."""
    folder = run_sft(max_steps=2, save_every=1)
    before = contents(folder)
    refused(run_sft, "--learning_rate 0.5 (was 0.002)", max_steps=2, save_every=1, learning_rate=0.5, resume=True)
    text = refused(run_sft, "--lora_r 2 (was 4), --seed 7 (was 0)", max_steps=3, seed=7, lora_r=2, resume=True)
    assert "max_steps" not in text and "learning_rate" not in text
    assert contents(folder) == before


def test_resume_needs_the_same_rows(run_sft: Run, world: Path, tmp_path: Path) -> None:
    """../shared/cases/resume_changed_data: other rows under the same path are noticed."""
    rows = read_jsonl(world / "sft.jsonl")
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    folder = run_sft(dataset=str(file), max_steps=1)
    before = contents(folder)
    write_jsonl(file, [*rows[:-1], {**rows[-1], "messages": rows[0]["messages"]}])
    refused(run_sft, "--resume", "--data ", dataset=str(file), max_steps=2, resume=True)
    assert contents(folder) == before
    write_jsonl(file, rows)
    run_sft(dataset=str(file), max_steps=2, resume=True)


def test_resume_needs_a_checkpoint(run_sft: Run, tmp_path: Path) -> None:
    """Nothing there, a folder that is something else, a checkpoint that is damaged: one line with the folder."""
    folder = tmp_path / "sft"
    refused(run_sft, f"--resume: no checkpoint in {folder}", resume=True)
    folder.mkdir()
    refused(run_sft, f"--resume: no checkpoint in {folder}", resume=True)
    folder.rmdir()
    run_sft()
    data = (folder / "checkpoint.pt").read_bytes()
    for damaged in (b"", data[: len(data) // 2], random.Random(0).randbytes(5000)):
        (folder / "checkpoint.pt").write_bytes(damaged)
        refused(run_sft, f"--resume: no checkpoint in {folder}", resume=True)


def test_a_full_disk_leaves_the_old_checkpoint(run_sft: Run, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second checkpoint can't be written, whole or in part: the first is there and good."""
    original = sft.Run.save

    def full(run: Any, state: Any) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000 if state["step"] == 4 else limits[0], limits[1]))
        try:
            original(run, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(sft.Run, "save", full)
        with pytest.raises(OSError, match="too large"):  # run_cli prints it as one line
            run_sft(**SFT_FLAGS)
    folder = run_folder(monkeypatch, run_sft)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 2
    assert_resumed_equals(done, run_sft(resume=True, **SFT_FLAGS))


def test_checkpoints_hold_tensors_and_plain_values(run_sft: Run) -> None:
    """No code is run by loading one."""
    state = torch.load(run_sft(max_steps=2) / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and state.keys() == {"step", "tensors", "optimizers"}
    assert len(state["tensors"]) == 28 and all(w.dtype == torch.float32 for w in state["tensors"])


# ------------------------------------------------------------------------------------------------- what is no number
def test_weights_that_are_no_numbers(run_sft: Run, base: Path, tmp_path: Path) -> None:
    """../shared/cases/nan_weights: one line before the first step or in it, nothing is written."""
    broken = str(broken_base(base, tmp_path))
    for size, what in ((4, "the held-out loss"), (0, "the loss or its gradient")):
        text = refused(run_sft, f"step 1: {what} is not finite (nan)", model=broken, eval_size=size)
        assert "look for NaN in the model's weights" in text and not (tmp_path / "sft").exists()


@pytest.mark.parametrize("eval_every", [0, 1])
def test_a_learning_rate_that_is_too_high(eval_every: int, run_sft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """../shared/cases/nan_diverged: it stops before the weights change; strict JSON; the checkpoint is good."""
    text = refused(
        run_sft, "not finite", "lower the learning rate",
        learning_rate=1e19, max_grad_norm=1e30, max_steps=6, save_every=1, eval_every=eval_every,
    )  # fmt: skip
    folder = run_folder(monkeypatch, run_sft)
    if eval_every:
        assert text.startswith("step 1: the held-out loss") and not folder.exists()
    else:
        rows = metrics(folder)
        assert text.startswith(f"step {len(rows) + 1}: the loss or its gradient")
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert state["step"] == len(rows) and all(w.isfinite().all() for w in state["tensors"])
        assert not (folder / "result.json").exists()


def test_a_last_step_that_diverges(run_sft: Run, tmp_path: Path) -> None:
    """No later step would notice: the held-out loss does, and no result is written that later stages would load."""
    refused(run_sft, "not finite", learning_rate=1e19, max_grad_norm=1e30, max_steps=1)
    assert not (tmp_path / "sft").exists()


# --------------------------------------------------------------------------------------------------- what is saved
def test_the_adapter_loads_in_plain_peft(run_sft: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers + PEFT on the run folder give the logits of the model that was trained, to 1e-5; not the base's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original, seen = sft.save_model, {}
    ids = torch.tensor([[5, 17, 99, 300, 4]])

    def recorded(folder: Path, model: Any, name: str, *rest: Any) -> None:
        original(folder, model, name, *rest)
        with sft.role(model, name):
            seen["logits"] = model(ids).logits

    monkeypatch.setattr(sft, "save_model", recorded)
    folder = run_sft(learning_rate=0.01)
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        bare = plain(ids).logits
        loaded = PeftModel.from_pretrained(plain, str(folder)).eval()(ids).logits
    assert torch.allclose(loaded, seen["logits"], atol=1e-5) and (bare - loaded).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert all(array.dtype == np.float32 for array in adapter_weights(folder).values())
    assert len(adapter_weights(folder)) == 28 and all("lora_" in name for name in adapter_weights(folder))


def test_full_training_writes_a_base(run_sft: Run, base: Path, tmp_path: Path) -> None:
    """--lora_r 0: a model folder whose every weight has moved, that loads, and that later stages take as a base."""
    from transformers import AutoModelForCausalLM

    folder = run_sft(lora_r=0, learning_rate=1e-3)
    assert (folder / "config.json").is_file() and not (folder / "adapter_config.json").exists()
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (base, folder))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[k], after[k]) for k in before)
    again = run_sft(model=str(folder), output_dir=str(tmp_path / "again"))
    assert json.loads((again / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)


def test_full_training_resumes_bit_for_bit(run_sft: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All weights, tied ones included, come back from the checkpoint."""
    flags = {"lora_r": 0, "max_steps": 4, "save_every": 2}
    done = run_sft(output_dir=str(tmp_path / "done"), **flags)
    with monkeypatch.context() as patch:
        die_at(patch, sft.Run, "log", 4)
        with pytest.raises(Killed):
            run_sft(**flags)
    resumed = run_sft(resume=True, **flags)
    assert (resumed / "metrics.jsonl").read_bytes() == (done / "metrics.jsonl").read_bytes()
    weights = [load_file(folder / "model.safetensors") for folder in (done, resumed)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_stages_follow_each_other(run_sft: Run, base: Path, tmp_path: Path) -> None:
    """--model takes the run folder before: the second run begins where the first ended, on the same base."""
    first = run_sft(output_dir=str(tmp_path / "one"))
    second = run_sft(model=str(first), lora_r=None, output_dir=str(tmp_path / "two"))
    assert not same_weights(first, second)
    results = [json.loads((folder / "result.json").read_text()) for folder in (first, second)]
    assert results[1]["heldout_loss_before"] == pytest.approx(results[0]["heldout_loss"], rel=1e-5)
    assert results[0]["base"] == results[1]["base"] == str(base)


@pytest.mark.parametrize("lora_r", [4, 0])
def test_a_loaded_model_stops(lora_r: int, run_sft: Run, base: Path, tmp_path: Path) -> None:
    """../shared/cases/eos_base: the tokenizer's EOS is not the template's end of turn, as in base models of Qwen 2.5.

    generation_config.json carries both, so that a model loaded from the folder ends where its answer does.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    other = Path(shutil.copytree(base, tmp_path / "eosbase"))
    for name, changes in (("tokenizer_config", {"eos_token": "<pad>"}), ("generation_config", {"eos_token_id": 0}),
                          ("config", {"eos_token_id": 0})):  # fmt: skip
        settings = json.loads((other / f"{name}.json").read_text())
        (other / f"{name}.json").write_text(json.dumps({**settings, **changes}))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.save_pretrained(other)
    assert tokenizer.eos_token_id == 0
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    folder = run_sft(model=str(other), lora_r=lora_r, learning_rate=5e-3, max_steps=12, epochs=10)
    config = GenerationConfig.from_pretrained(folder)
    assert config.eos_token_id == [0, end] and config.pad_token_id == 0
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Which sound belongs to the raven?"}]
    ids: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    n = ids["input_ids"].shape[1]
    given: dict[str, Any] = (
        {} if lora_r == 0 else {"generation_config": config}
    )  # transformers takes an adapter's from its base
    out = model.generate(**ids, max_new_tokens=60, do_sample=False, **given)
    assert out.shape[1] - n < 40 and out[0, -1] == end


# ---------------------------------------------------------------------------------------------------------- models
def test_a_model_that_is_not_there(run_sft: Run, tmp_path: Path) -> None:
    """A path and a hub id that can't be had, and a folder with no model in it."""
    (tmp_path / "empty").mkdir()
    for given in (str(tmp_path / "absent"), "no-such/model", str(tmp_path / "empty")):
        refused(run_sft, given, model=given)


def test_more_tokens_than_the_embedding(run_sft: Run, base: Path, tmp_path: Path) -> None:
    """../shared/cases/vocab: a tokenizer that does not belong to the model: one line before training."""
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(base, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["raven"])
    tokenizer.save_pretrained(folder)
    refused(run_sft, f"{size + 1} tokens, but an embedding of {size}", model=str(folder))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_more_tokens_than_positions(kind: str, run_sft: Run, base: Path, world: Path, tmp_path: Path) -> None:
    """../shared/cases/positions: an index error on GPT-2, silence on Llama: one line before training, here."""
    from conftest import tiny_llama
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(base)
    if kind == "gpt2":
        sizes: Any = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
        sizes["vocab_size"] = len(tokenizer)
        model: Any = GPT2LMHeadModel(GPT2Config(**sizes))
    else:
        model = tiny_llama(len(tokenizer), 1, 0)
        model.config.max_position_embeddings = 64
    model.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    rows = read_jsonl(world / "sft.jsonl")
    long = {"prompt": "Where is the fox? " * 10, "completion": "The fox is red. " * 10}
    file = write_jsonl(tmp_path / "rows.jsonl", [*rows, long])
    flags: dict[str, Any] = {"model": str(tmp_path / "short"), "max_response_length": 200, "max_steps": 1}
    refused(run_sft, "the model has 64 positions", "lower --max_prompt_length", dataset=str(file), eval_size=0, **flags)
    refused(run_sft, "the model has 64 positions", dataset=str(world / "sft.jsonl"), eval_dataset=str(file), **flags)
    run_sft(dataset=str(world / "sft.jsonl"), **flags)  # samples end where the positions do


def test_contradicting_flags(run_sft: Run, sft_run: Path) -> None:
    """All weights of an adapter, all weights in 4 bits, another rank or layers than the adapter's."""
    refused(run_sft, "--lora_r:", str(sft_run), "is an adapter with its own", model=str(sft_run), lora_r=0)
    refused(run_sft, "--revision:", "is an adapter with its own", model=str(sft_run), lora_r=None, revision="v1")
    refused(run_sft, "4-bit weights can't be trained", "--quant none", lora_r=0, quant="nf4")
    flags: dict[str, Any] = {"model": str(sft_run), "lora_r": None}
    refused(run_sft, "--lora_alpha, --lora_target_modules:", lora_alpha=3.0, lora_target_modules=["q_proj"], **flags)


@pytest.mark.parametrize("names", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"], ["lm_head"]])
def test_embeddings_and_heads_get_no_adapter(names: list[str], run_sft: Run) -> None:
    """../shared/cases/lora_embed_tokens: refused before training, not after."""
    refused(run_sft, "--lora_target_modules", names[0], "stay as they are", lora_target_modules=names)


def test_layers_that_are_not_there(run_sft: Run) -> None:
    """../shared/cases/lora_targets: one line."""
    refused(run_sft, "c_attn", lora_target_modules=["c_attn"])


ODD: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "bias": {"bias": "lora_only"},
    "saved modules": {"modules_to_save": ["embed_tokens"]},
    "trainable tokens": {"trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("kind", ODD)
def test_adapters_that_are_no_plain_lora(kind: str, run_sft: Run, sft_run: Path, tmp_path: Path) -> None:
    """peft #2184: a second PiSSA adapter would change the base under the first: refused by name, as its siblings."""
    folder = Path(shutil.copytree(sft_run, tmp_path / "odd"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **ODD[kind]}))
    refused(run_sft, str(folder), "no plain LoRA", "merge it into its base", model=str(folder), lora_r=None)


def test_an_unfinished_run_folder(run_sft: Run, sft_run: Path, tmp_path: Path) -> None:
    """A base that has moved, a config without weights, half of the weights, a folder without either: one line each."""
    folder = Path(shutil.copytree(sft_run, tmp_path / "changed"))
    flags: dict[str, Any] = {"model": str(folder), "lora_r": None}
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    data, settings = file.read_bytes(), config.read_text()
    config.write_text(json.dumps({**json.loads(settings), "base_model_name_or_path": "/gone/base"}))
    refused(run_sft, "model /gone/base: can't be loaded", **flags)
    config.write_text(settings)
    file.write_bytes(data[:5000])
    refused(run_sft, str(folder), **flags)
    file.unlink()
    refused(run_sft, str(folder), **flags)
    config.unlink()
    refused(run_sft, str(folder), **flags)


@pytest.mark.parametrize("template", ["{% if %}", "{{ nothing.at.all }}", "{{ raise_exception('never') }}"])
def test_a_broken_chat_template(template: str, run_sft: Run, tmp_path: Path) -> None:
    """A template file that does not work is a mistake of the user: one line; so is one that is not there."""
    (tmp_path / "broken.jinja").write_text(template)
    refused(run_sft, "template", chat_template=str(tmp_path / "broken.jinja"))
    refused(run_sft, "absent.jinja", chat_template="absent.jinja")


# -------------------------------------------------------------------------------------------------- command line
NUMBERS = [f.name for f in fields(sft.Args) if "int" in str(f.type) or "float" in str(f.type)]


@pytest.mark.parametrize("name", NUMBERS)
def test_impossible_numbers(name: str, tmp_path: Path) -> None:
    """No number may be negative, few may be 0: said before anything is loaded, with the flag and its bound."""
    value: Any
    for value, fine in ((-1, False), (-0.5, False), (math.nan, False), (0, name not in sft.ABOVE_ZERO), (1, True)):
        args = sft.Args(output_dir=str(tmp_path), **{name: value})
        if fine:
            sft.Run(args, "sft", ())
        else:
            with pytest.raises(sft.UserError) as caught:
                sft.Run(args, "sft", ())
            assert one_line(caught.value).startswith(f"--{name} {value}: must be above 0")


def test_a_tracker_that_is_not_installed(run_sft: Run, tmp_path: Path) -> None:
    """Said before training, with what to install."""
    for name in ("wandb_that_is_not_there", "absent.part"):
        refused(run_sft, f"--report_to {name}: not installed", report_to=[name])
    for name in ("numpy", ""):  # installed, but no tracker; no name
        refused(run_sft, f"--report_to {name}:", report_to=[name])
    assert not (tmp_path / "sft").exists()


def cli(patch: pytest.MonkeyPatch, capsys: Any, *flags: str) -> tuple[Any, str]:
    """(exit code, stderr) of the command line `sft.py flags`, in process."""
    patch.setattr(sys, "argv", ["sft.py", *flags])
    with pytest.raises(SystemExit) as caught:
        sft.run_cli(sft.main, sft.Args)
    return caught.value.code, capsys.readouterr().err


def test_unknown_flags_and_bad_values_exit_with_2(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A typo is named; abbreviations are not taken; a value of the wrong type names its flag."""
    for flags, named in ((["--lerning_rate", "1"], "--lerning_rate"), (["--learning", "1"], "--learning")):
        code, error = cli(monkeypatch, capsys, *flags)
        assert code == 2 and len(error.splitlines()) == 2 and named in error and "--help" in error
    for flags, named in ((["--batch_size", "many"], "--batch_size"), (["--quant", "int8"], "--quant")):
        code, error = cli(monkeypatch, capsys, *flags)
        assert code == 2 and named in error.splitlines()[-1]


def test_help_lists_every_flag(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """--help exits with 0 and explains every field of Args, with its default."""
    monkeypatch.setattr(sys, "argv", ["sft.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        sft.run_cli(sft.main, sft.Args)
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    for name, field in sft.Args.__dataclass_fields__.items():
        assert f"--{name}" in printed and field.metadata["help"]
        assert "".join(field.metadata["help"].replace("%%", "%").split())[:40] in "".join(printed.split())


def test_no_file_of_flags_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """HfArgumentParser would silently read sft.args beside the script."""
    (tmp_path / "sft.args").write_text("--learning_rate 5")
    assert given(monkeypatch, script=tmp_path / "sft.py").learning_rate == sft.TINY_SETTINGS["learning_rate"]


def given(patch: pytest.MonkeyPatch, *flags: str, script: Path = Path("sft.py")) -> sft.Args:
    """The arguments with which run_cli starts main."""
    seen: list[sft.Args] = []
    patch.setattr(sys, "argv", [str(script), *flags])
    sft.run_cli(seen.append, sft.Args)
    return seen[0]


def test_settings_of_tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """tiny/'s own values, where --dataset lies there, for the flags that are not given; said in one line."""
    settings = sft.TINY_SETTINGS
    assert {name: getattr(given(monkeypatch), name) for name in settings} == settings
    assert "sft.py: settings for tiny/: --learning_rate 0.002 --epochs 3.0" in capsys.readouterr().out
    args = given(monkeypatch, "--learning_rate", "1e-5", "--dtype", "auto")
    assert {k: getattr(args, k) for k in settings} == {**settings, "learning_rate": 1e-5, "dtype": "auto"}
    monkeypatch.chdir(ROOT)
    assert given(monkeypatch, "--dataset", "tiny/sft_eval.jsonl").learning_rate == settings["learning_rate"]
    capsys.readouterr()
    for other in (str(tmp_path / "sft.jsonl"), "HuggingFaceH4/ultrachat_200k"):
        args = given(monkeypatch, "--dataset", other, "--epochs", "2")
        assert asdict(args) == asdict(sft.Args(dataset=other, epochs=2.0)) and not capsys.readouterr().out


def test_a_mistake_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    """run_cli turns a UserError, a full disk and Ctrl-C into the script's name and one line."""
    code, _ = cli(monkeypatch, capsys, "--model", str(tmp_path / "absent"))
    assert isinstance(code, str) and code.startswith("sft.py: ") and "absent" in one_line(Exception(code))
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt(), memory):
        with monkeypatch.context() as patch:
            die_at(patch, sft, "load_model", 1, error)
            code, _ = cli(patch, capsys)
        assert isinstance(code, str) and code.startswith("sft.py: ") and "\n" not in code


@pytest.mark.parametrize("error", [ZeroDivisionError(), ValueError("too many"), KeyError("x"), RuntimeError("boom")])
def test_a_mistake_of_the_script_stays_a_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else goes wrong is no mistake of the user: nothing is hidden."""
    die_at(monkeypatch, sft, "load_model", 1, error)
    monkeypatch.setattr(sys, "argv", ["sft.py"])
    with pytest.raises(type(error)):
        sft.run_cli(sft.main, sft.Args)


def test_a_mistake_by_subprocess(base: Path) -> None:
    """The real thing: exit code 1, the last line on stderr, no traceback."""
    line = [sys.executable, str(ROOT / "sft.py"), "--dataset", "absent.jsonl", "--model", str(base)]
    ended = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("sft.py: ") and "absent.jsonl" in ended.stderr.splitlines()[-1]


# -------------------------------------------------------------------------------------------------- two processes
def launch(n: int, output: Path, flags: dict[str, Any], script: str = "sft.py") -> Path:
    """Run a script with `accelerate launch` on n CPU processes."""
    line = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(n)]
    line += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    line += ["--num_cpu_threads_per_process", "1", str(ROOT / script), "--output_dir", str(output)]
    line += [str(x) for k, v in flags.items() for x in (f"--{k}", v)]
    ended = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return output


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [8, 5, 1])
def test_two_processes_equal_one(batch_size: int, base: Path, world: Path, tmp_path: Path) -> None:
    """Trap 23: sums over processes, also where one has no example of the batch: metrics equal to 1e-5."""
    flags = {**COMMAND_FLAGS, "dataset": world / "sft.jsonl", "model": base, "max_steps": 2, "batch_size": batch_size}
    one, two = (launch(n, tmp_path / str(n), flags) for n in (1, 2))
    assert len(metrics(one)) == 2
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert len(read_jsonl(two / "samples.jsonl")) == len(read_jsonl(one / "samples.jsonl"))
    resumed = launch(2, two, {**flags, "max_steps": 3, "resume": True})
    assert [row["step"] for row in metrics(resumed)] == [0, 1, 2]


def test_make_adapter_and_save_model_agree(base: Path, sft_run: Path) -> None:
    """The tests' own run folder is what save_model writes."""
    model, _ = make_adapter(base, "policy", seed=1, size=0.1)
    saved = adapter_weights(sft_run)
    named = {n.replace(".policy.", "."): p.detach().numpy() for n, p in model.named_parameters() if ".policy." in n}
    assert named.keys() == saved.keys() and all(np.array_equal(named[k], saved[k]) for k in named)


def test_samples_are_the_models_own_whatever_its_generation_config_says(base: Path) -> None:
    """Qwen's folder asks for temperature 0.7, top_p 0.8 and a penalty: samples of a run are at temperature 1 all the
    same, without any."""
    model, tokenizer = make_adapter(base, "policy", seed=3, size=0.1)
    args = sft.Args(model=str(base), max_response_length=12)
    stop_ids = sft.find_stop_ids(tokenizer, model.generation_config)
    prompts = [[5, 6, 7 + i] for i in range(6)]
    plain = sft.generate(model, tokenizer, prompts, stop_ids, args)
    model.generation_config.update(temperature=0.01, top_p=0.1, top_k=1, repetition_penalty=5.0, do_sample=False)
    assert sft.generate(model, tokenizer, prompts, stop_ids, args) == plain
    assert len({tuple(y) for y in plain}) > 1
