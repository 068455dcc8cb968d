"""Whole runs of sft.py and ppo.py in process: files, determinism, resume, every flag that changes a code path."""

import inspect
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import CPU, ROOT, adapter_weights, read_jsonl, same_weights, write_jsonl, write_reward_run
from torch import Tensor

import ppo
import sft

Run = Callable[..., Path]
PPO_KEYS = {
    "step", "score", "reward", "kl", "entropy", "response_length", "eos_rate", "policy_loss", "value_loss",
    "clip_fraction", "approx_kl", "explained_variance", "learning_rate", "kl_coef", "grad_norm",
}  # fmt: skip
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
RUN_FILES = {"args.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl", "curves.png", "report.json", "checkpoint"}


def metrics(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl."""
    return read_jsonl(folder / "metrics.jsonl")


# ------------------------------------------------------------------------------------------------------ the folder
def check_report(folder: Path, stage: str, gates: set[str]) -> None:
    """report.json as DESIGN gives it."""
    report = json.loads((folder / "report.json").read_text())
    assert report.keys() == {"stage", "passed", "gates", "versions", "base"} and report["stage"] == stage
    assert {gate["name"] for gate in report["gates"]} == gates
    assert all(gate.keys() == {"name", "value", "threshold", "passed"} for gate in report["gates"])
    assert report["passed"] == all(gate["passed"] for gate in report["gates"])
    assert report["versions"]["torch"] == torch.__version__


def test_ppo_writes_what_it_says(run_ppo: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file of the run folder, the metrics' keys, held-out responses of both models, a table, the gates."""
    folder = run_ppo(plot=True, eval_every=1, save_every=1)
    assert {p.name for p in folder.iterdir()} >= ADAPTER_FILES | RUN_FILES
    assert not list(folder.rglob("*.tmp")) and (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row.keys() >= PPO_KEYS and all(map(math.isfinite, row.values())) for row in rows)
    assert all({"heldout_score", "heldout_kl"} <= row.keys() for row in rows)  # eval_every 1
    assert not any("gold" in key for row in rows for key in row)  # the annotator judges its own world only
    timing = read_jsonl(folder / "timing.jsonl")
    assert [row["step"] for row in timing] == [0, 1]
    assert all({"seconds", "tokens_per_second", "peak_bytes"} <= row.keys() for row in timing)
    samples = read_jsonl(folder / "samples.jsonl")
    assert [(row["model"]) for row in samples] == ["sft"] * 3 + ["ppo"] * 3
    assert all({"id", "prompt", "response", "model", "finish_reason", "tokens"} <= row.keys() for row in samples)
    assert all(row["finish_reason"] in ("stop", "length") for row in samples)
    assert all(row["finish_reason"] == "stop" or row["tokens"] == 10 for row in samples)
    check_report(folder, "ppo", {"kl_step0", "ratio_step0", "sampler_agreement", "eos_rate", "score_low"})
    assert json.loads((folder / "args.json").read_text())["quant"] == "none"
    assert sorted(p.name for p in (folder / "checkpoint").iterdir()) == ["step_000001.pt", "step_000002.pt"]
    printed = capsys.readouterr().out
    assert "KL to reference" in printed and "win-rate over SFT" in printed and "preflight: ok" in printed


def test_sft_writes_what_it_says(run_sft: Run) -> None:
    """Every file of the run folder, the loss at each step, the held-out loss where asked for."""
    folder = run_sft(plot=True, eval_every=2, save_every=2)
    assert {p.name for p in folder.iterdir()} >= ADAPTER_FILES | RUN_FILES
    assert not list(folder.rglob("*.tmp")) and (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row.keys() >= {"step", "loss", "grad_norm", "learning_rate"} for row in rows)
    assert ["heldout_loss" in row for row in rows] == [False, True, True]
    assert len(read_jsonl(folder / "samples.jsonl")) == 4
    assert [p.name for p in (folder / "checkpoint").iterdir()] == ["step_000002.pt"]
    check_report(folder, "sft", {"heldout_loss_drop", "eos_rate"})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """A write that dies half-way leaves the old file as it was; one that ends leaves nothing temporary."""
    file = tmp_path / "report.json"
    ppo.write_json(file, {"old": 1})

    def die(temporary: Path) -> None:
        temporary.write_text("half a fi")
        raise Killed

    with pytest.raises(Killed):
        ppo.write_file(file, die)
    assert json.loads(file.read_text()) == {"old": 1}
    ppo.write_json(file, {"new": {3, 1, 2}})
    assert json.loads(file.read_text()) == {"new": [1, 2, 3]} and list(tmp_path.iterdir()) == [file]


def test_files_are_strict_json(run_ppo: Run) -> None:
    """One held-out prompt gives no interval: what is not a number must not be written as NaN, which is no JSON."""
    folder = run_ppo(eval_size=1, max_steps=1)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    for file in folder.rglob("*.json*"):
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(text, parse_constant=refuse)


def test_no_matplotlib_is_one_line(run_sft: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Without matplotlib the run ends as it should, without a plot."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = run_sft(plot=True, max_steps=1)
    assert "curves.png: not drawn, matplotlib is not installed" in capsys.readouterr().out
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "curves.png").exists()


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


# ----------------------------------------------------------------------------------------------------- determinism
def test_ppo_is_a_function_of_its_seed(run_ppo: Run, tmp_path: Path) -> None:
    """Twice the same arguments: the same bytes of metrics.jsonl and weights; another seed: others."""
    first, second, other = (run_ppo(output_dir=str(tmp_path / n), seed=s) for n, s in (("a", 3), ("b", 3), ("c", 4)))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    assert same_weights(first, second) and not same_weights(first, other)
    assert (first / "samples.jsonl").read_bytes() == (second / "samples.jsonl").read_bytes()
    assert all(a["score"] != b["score"] for a, b in zip(metrics(first), metrics(other), strict=True))


def test_sft_is_a_function_of_its_seed(run_sft: Run, tmp_path: Path) -> None:
    """Twice the same arguments: the same bytes; another seed: others."""
    first, second, other = (run_sft(output_dir=str(tmp_path / n), seed=s) for n, s in (("a", 3), ("b", 3), ("c", 4)))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    assert same_weights(first, second) and not same_weights(first, other)
    assert (first / "samples.jsonl").read_bytes() == (second / "samples.jsonl").read_bytes()


# -------------------------------------------------------------------------------------- what must not change a thing
@pytest.fixture
def first_gradients(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Run], tuple[list[list[Tensor]], list[dict]]]:
    """first_gradients(module, run) -> (gradients before each update of step 0, metrics rows)."""

    def start(module: Any, run: Run, **flags: Any) -> tuple[list[list[Tensor]], list[dict]]:
        found: list[list[Tensor]] = []
        original = module.update

        def recorded(optimizer: Any, *rest: Any) -> float:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            found.append([p.grad.clone() for p in parameters if p.grad is not None])
            return original(optimizer, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(module, "update", recorded)
            folder = run(max_steps=1, **flags)
        return found, metrics(folder)

    return start


def assert_same_gradients(ours: list[list[Tensor]], theirs: list[list[Tensor]], count: int) -> None:
    """The first `count` updates have equal gradients: 1e-5 of the largest entry."""
    for a, b in zip(ours[:count], theirs[:count], strict=True):
        scale = max(g.abs().max().item() for g in b)
        assert len(a) == len(b) and scale > 0
        assert max((x - y).abs().max().item() for x, y in zip(a, b, strict=True)) <= 1e-5 * max(scale, 1e-3)


@pytest.mark.parametrize(("micro", "tokens"), [(1, 0), (3, 0), (4, 0), (8, 50)])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_ppo_micro_batches_do_not_change_the_gradient(
    micro: int, tokens: int, minibatches: int, run_ppo: Run, first_gradients: Any
) -> None:
    """Trap 23: responses of unequal lengths, 1 x 8 against 8 x 1: policy's and critic's gradient, metrics to 1e-5."""
    flags = {"minibatches": minibatches, "ppo_epochs": 1, "max_grad_norm": 1e9}
    whole, rows = first_gradients(ppo, run_ppo, micro_batch_size=8 // minibatches, **flags)
    cut, cut_rows = first_gradients(ppo, run_ppo, micro_batch_size=micro, tokens_per_micro_batch=tokens, **flags)
    assert_same_gradients(cut, whole, 2)
    if minibatches == 1:
        assert cut_rows[0] == pytest.approx(rows[0], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("micro", "tokens", "packing"), [(1, 0, True), (8, 0, False), (3, 0, False), (8, 60, True)])
def test_sft_micro_batches_do_not_change_the_gradient(
    micro: int, tokens: int, packing: bool, run_sft: Run, first_gradients: Any
) -> None:
    """Traps 14 and 23: examples of unequal lengths, cut up and packed in any way: the same gradient and loss."""
    whole, rows = first_gradients(sft, run_sft, micro_batch_size=8)
    cut, cut_rows = first_gradients(
        sft, run_sft, micro_batch_size=micro, tokens_per_micro_batch=tokens, packing=packing
    )
    assert_same_gradients(cut, whole, 1)
    assert cut_rows[0] == pytest.approx(rows[0], rel=1e-4, abs=1e-5)


def test_layout_does_not_change_the_step(run_ppo: Run, first_gradients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several groups, of one, and padded ones give the same PPO step: gradients and metrics."""
    found = []
    for width in (0, 1, 10**6):
        monkeypatch.setattr(ppo, "row_width", lambda groups, config, width=width: width)
        found.append(first_gradients(ppo, run_ppo, minibatches=1, samples_per_prompt=4, ppo_epochs=1))
    for other in found[1:]:
        assert_same_gradients(other[0], found[0][0], 2)
        assert other[1][0] == pytest.approx(found[0][1][0], rel=1e-4, abs=1e-5)


def test_evaluation_has_noise_of_its_own(run_ppo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out responses before and after are drawn with the same numbers, and no training step uses these."""
    keys: list[tuple[int, int, int]] = []
    original = ppo.sample

    def recorded(*args: Any) -> Any:
        keys.append(args[-1])
        return original(*args)

    monkeypatch.setattr(ppo, "sample", recorded)
    run_ppo(max_steps=3, seed=5)
    before, *training, after = keys
    assert before == after and len(training) == 3
    assert len({before[:2], *(key[:2] for key in training)}) == 2  # one stream for training, another for evaluation
    assert [key[2] for key in training] == [0, 1, 2] and all(key[0] == 5 for key in keys)


@pytest.mark.parametrize("sample_batch_size", [1, 5])
def test_sample_batch_size_does_not_change_the_run(sample_batch_size: int, run_ppo: Run, tmp_path: Path) -> None:
    """Memory, not the result: the same responses, so the same step."""
    expected = metrics(run_ppo(max_steps=1))
    rows = metrics(run_ppo(max_steps=1, sample_batch_size=sample_batch_size, output_dir=str(tmp_path / "b")))
    assert rows[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-5)


# ------------------------------------------------------------------------------------------- one step, recalculated
def test_a_step_is_what_the_papers_say(run_ppo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traps 10 to 13: from raw log-probs, values and scores the reference finds the same advantages and returns.

    What main hands to the two backward passes is compared with plain loops over the real tokens of each response.
    """
    seen: dict[str, list] = {}

    def record(name: str) -> None:
        original = getattr(ppo, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            seen.setdefault(name, []).append((args, result))
            return result

        monkeypatch.setattr(ppo, name, recorded)

    for name in ("role_logprobs", "role_values", "score_responses", "policy_backward", "critic_backward"):
        record(name)
    flags = {"kl_coef": 0.3, "gamma": 0.9, "gae_lambda": 0.7, "missing_eos_penalty": 0.5, "max_steps": 2}
    rows = metrics(run_ppo(**flags, max_response_length=16))
    rollout = seen["role_values"][1][0][2]  # of step 1, where policy and reference have parted
    mine = {name: [(args, x) for args, x in calls if any(a is rollout for a in args)] for name, calls in seen.items()}
    (old, _), (ref, _) = (
        next(x for args, x in mine["role_logprobs"] if args[1] == who) for who in ("policy", "reference")
    )
    values, scores = mine["role_values"][0][1], mine["score_responses"][0][1]
    lengths = rollout.mask.sum(1).tolist()

    def lists(x: Tensor) -> list[list[float]]:
        return [row[:n] for row, n in zip(x.double().tolist(), lengths, strict=True)]

    final = [s - 0.5 * (1 - e) for s, e in zip(scores.tolist(), rollout.ended.tolist(), strict=True)]
    rewards = reference.kl_penalty_rewards(final, lists(old), lists(ref), 0.3)
    pairs = [reference.gae(r, v, 0.9, 0.7) for r, v in zip(rewards, lists(values), strict=True)]
    advantages, returns = reference.whiten([a for a, _ in pairs]), [r for _, r in pairs]
    ours = seen["policy_backward"][-1][0][3], seen["critic_backward"][-1][0][4]
    for got, expected in zip(ours, (advantages, returns), strict=True):
        for got_row, row in zip(lists(got), expected, strict=True):
            assert got_row == pytest.approx(row, abs=1e-4)
    kl = sum(sum(a) - sum(b) for a, b in zip(lists(old), lists(ref), strict=True)) / len(lengths)
    assert abs(kl) > 1e-3 and rows[1]["kl"] == pytest.approx(kl, abs=1e-5)
    assert rows[1]["reward"] == pytest.approx(sum(map(sum, rewards)) / len(lengths), abs=1e-4)
    assert rows[1]["score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    variance = reference.explained_variance(lists(values), returns)
    assert rows[1]["explained_variance"] == pytest.approx(variance, abs=1e-3)


@pytest.fixture
def update_parts(run_ppo: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple, tuple]:
    """Arguments of the last policy_backward and critic_backward of a run of one step, for calling them again."""
    seen: dict[str, tuple] = {}
    for name in ("policy_backward", "critic_backward"):
        original = getattr(ppo, name)

        def recorded(*args: Any, original: Any = original, name: str = name) -> Any:
            seen[name] = args
            return original(*args)

        monkeypatch.setattr(ppo, name, recorded)
    run_ppo(max_steps=1, learning_rate=0.02, critic_learning_rate=0.02)
    monkeypatch.undo()
    return seen["policy_backward"], seen["critic_backward"]


def gradients_of(model: Any, name: str) -> list[Tensor]:
    """A copy of the adapter's gradients, which are cleared."""
    found = [p.grad.clone() for p in ppo.adapter_parameters(model, name) if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def test_update_losses_equal_the_reference(update_parts: tuple[tuple, tuple]) -> None:
    """Traps 11, 22, 28: what the two backward passes report, token by token, after the policy has moved."""
    model, minibatch, old, advantages, _, args = update_parts[0]
    n = sum(int(rows.mask.sum()) for _, rows in minibatch)
    loss, clipped, kl = ppo.policy_backward(model, minibatch, old, advantages, n, args)
    tokens = []
    with ppo.role(model, "policy"):
        for numbers, rows in minibatch:
            new, _ = ppo.response_logprobs(model, rows)
            real = rows.mask.bool()
            tokens += list(zip(*(x[real].tolist() for x in (new, old[numbers], advantages[numbers])), strict=True))
    assert len(tokens) == n
    expected = [reference.clipped_policy_loss(a, b, c, args.clip_range) for a, b, c in tokens]
    assert loss == pytest.approx(sum(expected) / n, abs=1e-5)
    assert (
        clipped == pytest.approx(sum(abs(math.exp(a - b) - 1) > args.clip_range for a, b, _ in tokens) / n) and clipped
    )
    assert kl == pytest.approx(sum(reference.k3(a, b) for a, b, _ in tokens) / n, abs=1e-5) and kl > 1e-4

    model, head, minibatch, old_values, returns, _, args = update_parts[1]
    value_loss = ppo.critic_backward(model, head, minibatch, old_values, returns, n, args)
    tokens = []
    with ppo.role(model, "critic"):
        for numbers, rows in minibatch:
            values, real = ppo.head_values(model, head, rows), rows.mask.bool()
            tokens += list(
                zip(*(x[real].tolist() for x in (values, old_values[numbers], returns[numbers])), strict=True)
            )
    expected = [reference.clipped_value_loss(a, b, c, args.value_clip_range) for a, b, c in tokens]
    assert value_loss == pytest.approx(sum(expected) / n, abs=1e-5)
    model.zero_grad(set_to_none=True)


def test_penalty_and_entropy_enter_the_gradient(update_parts: tuple[tuple, tuple]) -> None:
    """Gradient of loss + bonus = gradient of the loss + coef times that of the mean entropy; likewise the penalty."""
    model, minibatch, old, advantages, n, args = update_parts[0]

    def gradient(**flags: Any) -> list[Tensor]:
        changed = ppo.Args(**{**vars(args), **flags})
        ppo.policy_backward(model, minibatch, old, advantages, n, changed)
        return gradients_of(model, "policy")

    def direct(loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        with ppo.role(model, "policy", grad=True):
            for numbers, rows in minibatch:
                new, entropy = ppo.response_logprobs(model, rows, all_gradients=True)
                (loss(new, old[numbers], advantages[numbers], entropy) * rows.mask).sum().div(n).backward()
        return gradients_of(model, "policy")

    bonus = direct(lambda new, old, a, entropy: -0.3 * entropy)
    for with_bonus, without, extra in zip(gradient(entropy_coef=0.3), gradient(), bonus, strict=True):
        assert torch.allclose(with_bonus, without + extra, atol=1e-6)
    assert max(g.abs().max() for g in bonus) > 1e-3
    penalised = direct(lambda new, old, a, _: -(new - old).exp() * a + 2 * ((new - old).exp() - 1 - (new - old)))
    for ours, theirs in zip(gradient(policy_loss="penalty", penalty_coef=2.0), penalised, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_ptx_adds_the_gradient_of_the_text(update_parts: tuple[tuple, tuple], tmp_path: Path) -> None:
    """InstructGPT, eq. 2: -coef times the gradient of the mean log-likelihood of the windows, found the plain way."""
    model, args = update_parts[0][0], update_parts[0][5]
    tokenizer = ppo.load_tokenizer(args.model, None, args)
    write_jsonl(tmp_path / "text.jsonl", [{"text": f"The fox number {i} is red. " * (1 + i % 4)} for i in range(8)])
    args = ppo.Args(
        **{**vars(args), "ptx_dataset": str(tmp_path / "text.jsonl"), "ptx_coef": 0.7, "micro_batch_size": 3}
    )
    windows = ppo.load_ptx(args, tokenizer)
    assert all(window[-1] == tokenizer.eos_token_id for window in windows)
    ppo.ptx_backward(model, windows, 0, tokenizer.pad_token_id, ppo.Accelerator(cpu=True), args)
    ours = gradients_of(model, "policy")
    chosen = [windows[i] for i in ppo.batch_indices(0, [len(w) for w in windows], 4, args.seed)]
    n = sum(len(w) - 1 for w in chosen)
    with ppo.role(model, "policy", grad=True):
        for w in chosen:
            table = model(torch.tensor([w[:-1]])).logits[0].log_softmax(-1)
            (-0.7 * table[range(len(w) - 1), w[1:]].sum() / n).backward()
    for a, b in zip(ours, gradients_of(model, "policy"), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_prompt_that_comes_twice_gets_other_responses(
    run_ppo: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch may be larger than the data, or reach into the next epoch: no response is counted twice."""
    found: list[ppo.Rollout] = []
    original = ppo.roll_out

    def recorded(*args: Any) -> ppo.Rollout:
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(ppo, "roll_out", recorded)
    write_jsonl(tmp_path / "two.jsonl", read_jsonl(world / "prompts.jsonl")[:3])
    run_ppo(dataset=str(tmp_path / "two.jsonl"), eval_size=1, max_steps=1, max_response_length=16)
    training = next(r for r in found if len(r.responses) == 8)  # 2 prompts, 4 places with 2 responses each
    assert len({json.dumps(p["prompt"]) for p in training.prompts}) == 2
    assert len(set(map(tuple, training.responses))) >= 7


# --------------------------------------------------------------------------------------------------- interruptions
class Killed(BaseException):
    """Stands for SIGKILL: nothing in the scripts may catch it."""


def die_at(patch: pytest.MonkeyPatch, module: Any, name: str, call: int, half: bool = False) -> None:
    """Let the `call`-th call of module.name (from 1) kill the run; half: the temporary file is written by half."""
    original, calls = getattr(module, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and half:  # write_file(path, write)
            Path(str(args[0]) + ".tmp").write_bytes(b"half a fi")
        if calls == call:
            raise Killed
        return original(*args, **kwargs)

    patch.setattr(module, name, counted)


PPO_FLAGS = {"max_steps": 4, "save_every": 1, "kl_target": 0.05, "kl_horizon": 20, "weight_decay": 0.1, "ppo_epochs": 1}
PPO_DEATHS = [
    ("update", 2, False),  # in the first step, between the policy's and the critic's update
    ("log_step", 3, False),  # the third step has been computed, nothing of it is written
    ("save_checkpoint", 2, False),  # metrics.jsonl is one step ahead of the checkpoint
    ("write_file", 4, True),  # args.json and two checkpoints are written; half of the third
    ("save_adapter", 1, False),  # all steps are done, the result is not written
]


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Path]:
    """Folders of runs that were left in peace, by stage, made by the first test that asks."""
    return {}


def assert_resumed_equals(done: Path, resumed: Path) -> None:
    """Metrics byte for byte, the adapter bit for bit, samples, and nothing temporary left in the way."""
    assert (resumed / "metrics.jsonl").read_bytes() == (done / "metrics.jsonl").read_bytes()
    assert len(read_jsonl(resumed / "timing.jsonl")) == len(metrics(done))
    assert same_weights(resumed, done)
    assert (resumed / "samples.jsonl").read_bytes() == (done / "samples.jsonl").read_bytes()


@pytest.mark.parametrize(("where", "call", "half"), PPO_DEATHS, ids=[death[0] for death in PPO_DEATHS])
def test_ppo_resumes_bit_for_bit(
    where: str, call: int, half: bool, run_ppo: Run, uninterrupted: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """Killed anywhere, --resume ends as the uninterrupted run: adapters, optimisers, adapted KL coefficient, cursor."""
    if "ppo" not in uninterrupted:
        folder = tmp_path_factory.mktemp("ppo") / "done"
        uninterrupted["ppo"] = run_ppo(output_dir=str(folder), **PPO_FLAGS)
        coefs = [row["kl_coef"] for row in metrics(folder)]
        assert len(set(coefs)) == 4  # it is adapted: state that must survive
    with monkeypatch.context() as patch:
        die_at(patch, ppo, where, call, half)
        with pytest.raises(Killed):
            run_ppo(**PPO_FLAGS)
    resumed = run_ppo(resume=True, **PPO_FLAGS)
    assert_resumed_equals(uninterrupted["ppo"], resumed)


SFT_FLAGS = {"max_steps": 5, "save_every": 2, "weight_decay": 0.1}
SFT_DEATHS = [("update", 1, False), ("log_step", 3, False), ("write_file", 3, True), ("save_adapter", 1, False)]


@pytest.mark.parametrize(("where", "call", "half"), SFT_DEATHS, ids=[death[0] for death in SFT_DEATHS])
def test_sft_resumes_bit_for_bit(
    where: str, call: int, half: bool, run_sft: Run, uninterrupted: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """The same for sft.py, where the last checkpoint may lie two steps back."""
    if "sft" not in uninterrupted:
        folder = tmp_path_factory.mktemp("sft") / "done"
        uninterrupted["sft"] = run_sft(output_dir=str(folder), **SFT_FLAGS)
    with monkeypatch.context() as patch:
        die_at(patch, sft, where, call, half)
        with pytest.raises(Killed):
            run_sft(**SFT_FLAGS)
    assert_resumed_equals(uninterrupted["sft"], run_sft(resume=True, **SFT_FLAGS))


@pytest.mark.parametrize("damage", ["empty", "half", "garbage"])
def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(
    damage: str, run_sft: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever the damage: one line with the file's name, then the older checkpoint, and the same result."""
    done = run_sft(output_dir=str(tmp_path / "done"), **{**SFT_FLAGS, "save_every": 1})
    with monkeypatch.context() as patch:
        die_at(patch, sft, "save_adapter", 1)
        with pytest.raises(Killed):
            run_sft(**{**SFT_FLAGS, "save_every": 1})
    folder = tmp_path / "sft"
    newest, older = folder / "checkpoint" / "step_000005.pt", folder / "checkpoint" / "step_000004.pt"
    data = newest.read_bytes()
    newest.write_bytes(
        {"empty": b"", "half": data[: len(data) // 2], "garbage": random.Random(0).randbytes(5000)}[damage]
    )
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')  # and half a line, as a kill leaves it
    capsys.readouterr()
    resumed = run_sft(resume=True, **{**SFT_FLAGS, "save_every": 1})
    printed = capsys.readouterr().out
    assert f"{newest} can't be loaded" in printed and f"resume: from {older}" in printed
    assert_resumed_equals(done, resumed)


def test_samples_of_sft_keep_the_bound_on_tokens() -> None:
    """Every prompt is sampled once, in order, in batches whose prompts and responses stay below the bound."""
    seen: list[torch.Tensor] = []

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(input_ids)
        return torch.cat([input_ids, input_ids[:, -1:]], 1)  # one token: the prompt's last

    model = SimpleNamespace(eval=lambda: None, device=CPU, generate=generate)
    args = sft.Args(max_response_length=10, micro_batch_size=8, tokens_per_micro_batch=45)
    prompts = [[5] * n + [n] for n in (4, 2, 9, 1, 40, 3)]
    responses = sft.sample_responses(model, SimpleNamespace(pad_token_id=0), prompts, [99], args)
    assert responses == [[n] for n in (4, 2, 9, 1, 40, 3)]
    assert [len(ids) for ids in seen] == [2, 2, 1, 1]
    assert all(len(ids) == 1 or ids.numel() + 10 * len(ids) <= 45 for ids in seen)


def test_a_run_that_ran_out_of_memory_goes_on_with_less(
    run_sft: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """--resume takes other micro-batches: the same numbers up to rounding, and smaller passes."""
    done, seen = run_sft(output_dir=str(tmp_path / "done"), **SFT_FLAGS), []
    with monkeypatch.context() as patch:
        die_at(patch, sft, "log_step", 4)
        with pytest.raises(Killed):
            run_sft(**SFT_FLAGS)
    original = sft.build_rows

    def counted(rows: list, *rest: Any) -> Any:
        seen.append(len(rows))
        return original(rows, *rest)

    monkeypatch.setattr(sft, "build_rows", counted)
    less = {"micro_batch_size": 3, "tokens_per_micro_batch": 60, "gradient_checkpointing": True}
    folder = run_sft(resume=True, **{**SFT_FLAGS, **less})
    assert "resume: from" in capsys.readouterr().out and max(seen) < 3, "the bound cuts further"
    assert len(metrics(folder)) == len(metrics(done)) > 3
    assert metrics(folder)[-1] == pytest.approx(metrics(done)[-1], rel=1e-4, abs=1e-6)


def test_without_a_checkpoint_resume_begins_again(run_sft: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A run that died before its first checkpoint starts from the beginning and says so."""
    with monkeypatch.context() as patch:
        die_at(patch, sft, "log_step", 2)
        with pytest.raises(Killed):
            run_sft(save_every=50)
    folder = run_sft(save_every=50, resume=True)
    assert "starting from the beginning" in capsys.readouterr().out
    assert [row["step"] for row in metrics(folder)] == [0, 1, 2]


def test_checkpoints_load_with_weights_only(run_ppo: Run) -> None:
    """A checkpoint holds tensors and plain values: no code is run by loading it. The last two are kept."""
    folder = run_ppo(max_steps=3, save_every=1)
    names = sorted(p.name for p in (folder / "checkpoint").iterdir())
    assert names == ["step_000002.pt", "step_000003.pt"]
    assert torch.load(folder / "checkpoint" / names[-1], weights_only=True)["step"] == 3


SCRIPT_FLAGS: dict[str, dict[str, Any]] = {
    "sft": {
        "max_steps": 60, "epochs": 100, "save_every": 3, "batch_size": 8, "lora_r": 4, "eval_size": 4,
        "max_response_length": 24,
    },
    "ppo": {
        "max_steps": 8, "save_every": 2, "batch_size": 8, "samples_per_prompt": 2, "micro_batch_size": 4,
        "minibatches": 2, "eval_size": 3, "max_response_length": 10, "missing_eos_penalty": 0.0,
    },
}  # fmt: skip


def command(stage: str, output: Path, base: Path, sft_run: Path, reward_run: Path, world: Path) -> list[str]:
    """The command line of one stage on the small world."""
    flags: dict[str, Any] = {**SCRIPT_FLAGS[stage], "output_dir": output, "dataset": world / "prompts.jsonl"}
    flags |= {"model": base, "dataset": world / "sft.jsonl"} if stage == "sft" else {"model": sft_run}
    flags |= {"reward_model": reward_run} if stage == "ppo" else {}
    return [sys.executable, str(ROOT / f"{stage}.py"), *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("seed", range(10))
def test_sigkill_and_resume(
    stage: str, seed: int, base: Path, sft_run: Path, reward_run: Path, world: Path, tmp_path: Path,
    uninterrupted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """A real SIGKILL at a random moment of training, twice, then --resume: as if nothing had happened."""
    rng, environment = random.Random(seed), {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    key = f"{stage} by command"
    if key not in uninterrupted:
        uninterrupted[key] = tmp_path_factory.mktemp(stage) / "done"
        line = command(stage, uninterrupted[key], base, sft_run, reward_run, world)
        subprocess.run(line, env=environment, check=True, capture_output=True)
    folder, steps = tmp_path / "run", SCRIPT_FLAGS[stage]["max_steps"]
    line, resume = command(stage, folder, base, sft_run, reward_run, world), ["--resume", "true"]
    for until in sorted(rng.sample(range(1, steps), 2)):
        process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while count_lines(folder / "metrics.jsonl") < until and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        assert process.poll() is None  # it is in the middle of training
        process.send_signal(signal.SIGKILL)
        process.wait()
        line = [*command(stage, folder, base, sft_run, reward_run, world), *resume]
    subprocess.run(line, env=environment, check=True, capture_output=True)
    assert_resumed_equals(uninterrupted[key], folder)


def count_lines(file: Path) -> int:
    """Whole lines of a file that is being written, 0 where it is not there yet."""
    return file.read_bytes().count(b"\n") if file.is_file() else 0


# --------------------------------------------------------------------------------------------------------- flags
def reward_function(tmp_path: Path, body: str) -> str:
    """--reward_fn with this body."""
    (tmp_path / "mine.py").write_text(f"def score(prompts, responses, **columns):\n    {body}\n")
    return f"{tmp_path / 'mine.py'}:score"


FLAGS: list[dict[str, Any]] = [
    {"policy_loss": "penalty"},
    {"kl_target": 0.1, "kl_horizon": 100},
    {"kl_coef": 0.0},
    {"ptx_dataset": "prompts", "ptx_coef": 0.5},
    {"critic_warmup": 1},
    {"entropy_coef": 0.01},
    {"score_clip": 0.1},
    {"samples_per_prompt": 1},
    {"samples_per_prompt": 8},
    {"samples_per_prompt": 4, "micro_batch_size": 2},
    {"samples_per_prompt": 3, "batch_size": 9, "minibatches": 4},
    {"minibatches": 8, "micro_batch_size": 32},
    {"gradient_checkpointing": True},
    {"eval_every": 1, "save_every": 1},
    {"temperature": 0.7},
    {"gamma": 0.9, "gae_lambda": 1.0},
    {"ppo_epochs": 1, "minibatches": 1, "micro_batch_size": 8},
    {"batch_size": 12, "minibatches": 2, "micro_batch_size": 4},
    {"chat_template": "plain"},
    {"chat_template": "text"},
    {"lora_r": 4},
    {"quant": "nf4", "reward_fn": True},
    {"dtype": "bfloat16", "reward_fn": True},
    {"epochs": 0.5, "max_steps": 0},
    {"weight_decay": 0.1, "max_grad_norm": 0.01, "warmup_ratio": 0.5},
    {"eval_dataset": "prompts"},
    {"model": "base", "reward_fn": True},
    {"model": "base", "reward_fn": True, "lora_r": 2, "lora_alpha": 8.0, "lora_target_modules": ["q_proj", "v_proj"]},
    {"model": "base"},
    {"gold_fn": True},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: ",".join(f"{k}={v}" for k, v in flags.items()))
def test_every_flag_runs(flags: dict, run_ppo: Run, world: Path, base: Path, reward_file: str, tmp_path: Path) -> None:
    """Trap 32: two steps with every flag that changes a code path; all metrics finite, the adapter loads again."""
    flags = dict(flags)
    write_jsonl(tmp_path / "text.jsonl", [{"text": f"Some text {i} about the fox." * 3} for i in range(5)])
    paths = {"ptx_dataset": tmp_path / "text.jsonl", "eval_dataset": world / "prompts.jsonl", "model": base}
    flags |= {name: str(path) for name, path in paths.items() if name in flags}
    flags |= {name: reward_file for name in ("reward_fn", "gold_fn") if name in flags}
    folder = run_ppo(**flags)
    rows = metrics(folder)
    assert len(rows) == (3 if "epochs" in flags else 2)
    assert all(row.keys() >= PPO_KEYS and all(map(math.isfinite, row.values())) for row in rows)
    assert np.mean([row["grad_norm"] for row in rows]) > 0
    gates = {gate["name"] for gate in json.loads((folder / "report.json").read_text())["gates"]}
    judged = "gold_fn" in flags
    assert all(("gold" in row) == judged for row in rows) and ("gold_low" if judged else "score_low") in gates
    again = ppo.Args(model=str(folder))
    model, *_ = ppo.load_model(again, CPU)
    ppo.add_adapter(model, "policy", folder, again)


SFT_RUNS: list[dict[str, Any]] = [
    {"packing": False},
    {"last_turn_only": True},
    {"gradient_checkpointing": True},
    {"quant": "nf4"},
    {"chat_template": "plain"},
    {"lora_target_modules": ["q_proj", "v_proj"], "lora_r": 2, "lora_alpha": 3.0},
    {"eval_size": 0.0},
    {"dataset": "text"},
    {"model": "sft", "lora_r": None},
    {"micro_batch_size": 1, "batch_size": 3},
    {"epochs": 0.4, "max_steps": 0},
]


@pytest.mark.parametrize("flags", SFT_RUNS, ids=lambda flags: ",".join(f"{k}={v}" for k, v in flags.items()))
def test_every_sft_flag_runs(flags: dict, run_sft: Run, sft_run: Path, tmp_path: Path) -> None:
    """Trap 32: the same for sft.py; the loss is finite and falls within a run on the same rows."""
    flags = dict(flags)
    write_jsonl(tmp_path / "text.jsonl", [{"text": f"Some text {i} about the fox." * (i + 1)} for i in range(20)])
    flags |= {"dataset": str(tmp_path / "text.jsonl")} if "dataset" in flags else {}
    flags |= {"model": str(sft_run)} if "model" in flags else {}
    rows = metrics(run_sft(**flags))
    assert len(rows) == (1 if "epochs" in flags else 3)
    assert all(math.isfinite(value) for row in rows for value in row.values()) and rows[0]["grad_norm"] > 0


def test_early_stop_ends_the_passes(run_ppo: Run) -> None:
    """With a limit that the first update breaks, one update is done; with a far one, all of them."""
    for limit, updates in ((1e-9, 1), (1e9, 8)):
        rows = metrics(run_ppo(early_stop_kl=limit, ppo_epochs=4, learning_rate=0.01, max_steps=1))
        assert rows[0]["updates"] == updates


def test_critic_warmup_leaves_the_policy(run_ppo: Run, sft_run: Path) -> None:
    """In warm-up steps only the critic learns: the saved policy is the SFT adapter to the bit."""
    folder = run_ppo(critic_warmup=1, max_steps=1)
    assert same_weights(folder, sft_run)
    row = metrics(folder)[0]
    assert row["value_loss"] > 0 and row["critic_grad_norm"] > 0 and row["grad_norm"] == 0
    assert not same_weights(run_ppo(critic_warmup=1, max_steps=2), sft_run)


def test_kl_coef_follows_the_controller(run_ppo: Run) -> None:
    """Each step's coefficient is the reference's from the step before and its KL."""
    rows = metrics(run_ppo(kl_target=0.05, kl_horizon=40, max_steps=4))
    for before, after in zip(rows, rows[1:], strict=False):
        expected = reference.adapt_kl_coef(before["kl_coef"], before["kl"], 0.05, 8, 40)
        assert after["kl_coef"] == pytest.approx(expected, rel=1e-6)
    assert len({row["kl_coef"] for row in rows}) > 1


def test_score_clip_bounds_the_score(run_ppo: Run) -> None:
    """Without a KL penalty the reward is the clipped score: within +-0.05 on average, while the score is not."""
    row = metrics(run_ppo(score_clip=0.05, kl_coef=0.0, max_steps=1))[0]
    assert abs(row["reward"]) <= 0.05 + 1e-6 < abs(row["score"])


def test_the_eos_penalty_counts(run_ppo: Run) -> None:
    """reward = score - penalty * share that did not end, where there is no KL."""
    row = metrics(run_ppo(missing_eos_penalty=2.0, kl_coef=0.0, max_steps=1))[0]
    assert 0 < row["eos_rate"] < 1
    assert row["reward"] == pytest.approx(row["score"] - 2 * (1 - row["eos_rate"]), abs=1e-5)


# ------------------------------------------------------------------------------------------------ reward functions
def test_reward_fn_sees_prompts_responses_and_columns(run_ppo: Run, tmp_path: Path, world: Path) -> None:
    """Prompts as in the dataset, responses without special tokens, the other columns as lists of the same length."""
    body = (
        "import json; open(__file__ + '.log', 'a').write(json.dumps([prompts, responses, columns]) + chr(10)); "
        "return [float(len(r)) for r in responses]"
    )
    folder = run_ppo(reward_fn=reward_function(tmp_path, body), max_steps=1)
    calls = read_jsonl(tmp_path / "mine.py.log")
    assert [len(call[0]) for call in calls] == [3, 8, 3]  # before, step 0, after
    rows = {row["prompt"]: row for row in read_jsonl(world / "prompts.jsonl")}
    for prompts, responses, columns in calls:
        assert len(responses) == len(prompts) and not any("<|" in r for r in responses)
        assert columns.keys() == {"id", "animal", "attribute", "answer"}
        for i, prompt in enumerate(prompts):
            assert all(values[i] == rows[prompt][name] for name, values in columns.items())
    assert metrics(folder)[0]["score"] == pytest.approx(np.mean([len(r) for r in calls[1][1]]), abs=1e-5)


def test_none_is_the_mean_of_the_batch(run_ppo: Run, tmp_path: Path) -> None:
    """A response without a score gets the mean of the others and so changes nothing."""
    body = "return [None if i % 4 == 0 else float(i) for i in range(len(responses))]"
    row = metrics(run_ppo(reward_fn=reward_function(tmp_path, body), max_steps=1))[0]
    assert row["score"] == pytest.approx(np.mean([1, 2, 3, 5, 6, 7]), abs=1e-5)


KINDS = ["numpy.array({}, dtype='float32')", "torch.tensor({})", "tuple({})", "[int(x) for x in {}]"]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_may_be_numbers_of_any_kind(kind: str, run_ppo: Run, tmp_path: Path) -> None:
    """What a model returns without further ado: arrays, tensors, tuples, integers."""
    body = "import numpy, torch; return " + kind.format("[i * 1.0 for i in range(len(responses))]")
    row = metrics(run_ppo(reward_fn=reward_function(tmp_path, body), max_steps=1))[0]
    assert row["score"] == pytest.approx(3.5, abs=1e-5)


def test_gold_of_none_is_left_out(run_ppo: Run, tmp_path: Path) -> None:
    """Trap 31: --gold_fn may decline: the mean is over those that it judged."""
    body = "return [None if i % 4 == 0 else float(i) for i in range(len(responses))]"
    row = metrics(run_ppo(gold_fn=reward_function(tmp_path, body), max_steps=1))[0]
    assert row["gold"] == pytest.approx(np.mean([1, 2, 3, 5, 6, 7]), abs=1e-5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "returned 1 values for"),
        ("return [float('nan')] * len(responses)", "returned nan for prompt"),
        ("return [float('inf')] * len(responses)", "returned inf for prompt"),
        ("return [None] * len(responses)", "None for every response"),
        ("return 1 / 0", "raised ZeroDivisionError: division by zero"),
        ("return None", "NoneType"),
        ("return ['good'] * len(responses)", "good"),
    ],
)
def test_a_bad_reward_fn_is_one_line(body: str, message: str, run_ppo: Run, tmp_path: Path) -> None:
    """The function's name, what it returned and for what: a UserError, not a traceback from inside."""
    spec = reward_function(tmp_path, body)
    with pytest.raises(ppo.UserError, match=message) as caught:
        run_ppo(reward_fn=spec)
    assert spec in str(caught.value) and "\n" not in str(caught.value)


def test_columns_that_some_rows_lack_are_none(run_ppo: Run, tmp_path: Path, world: Path) -> None:
    """A column of later rows is not lost because the first row lacks it."""
    rows = read_jsonl(world / "prompts.jsonl")
    for row in rows[::2]:
        row.pop("answer")
    write_jsonl(tmp_path / "gaps.jsonl", rows)
    body = "return [0.0 if a is None else 1.0 for a in columns['answer']]"
    folder = run_ppo(reward_fn=reward_function(tmp_path, body), dataset=str(tmp_path / "gaps.jsonl"), max_steps=2)
    assert all(0 <= row["score"] <= 1 for row in metrics(folder))


# -------------------------------------------------------------------------------------------------- reward models
def test_a_reward_model_on_another_base(run_ppo: Run, base: Path, tmp_path: Path, capsys: Any, world: Path) -> None:
    """It loads beside the policy's base, its canaries reproduce, and it scores the text: as it would itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(9)
    other = AutoModelForCausalLM.from_pretrained(base)
    for p in other.parameters():
        p.data += 0.02 * torch.randn_like(p)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    reward = write_reward_run(tmp_path / "reward", tmp_path / "other", seed=6)
    folder = run_ppo(reward_model=str(reward), max_steps=1)
    printed = capsys.readouterr().out
    assert "has another base" in printed and "5 canaries reproduce" in printed
    assert "reward" not in json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    check_sample_scores(folder, reward, tmp_path / "other")


def check_sample_scores(folder: Path, reward: Path, base: Path) -> None:
    """Scores in samples.jsonl equal those of the plain classes on prompt + response + end, minus the mean."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = PeftModel.from_pretrained(model, str(reward)).eval() if reward != base else model.eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    mean = 0.25 if reward != base else 0.0
    for row in read_jsonl(folder / "samples.jsonl"):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        ids = tokenizer(text.rstrip("\n"))["input_ids"]
        with torch.no_grad():
            raw = model(torch.tensor([ids])).logits.item()
        assert row["score"] == pytest.approx(raw - mean, abs=1e-3)


def test_a_whole_sequence_classifier_as_reward_model(run_ppo: Run, base: Path, tmp_path: Path) -> None:
    """A folder that AutoModelForSequenceClassification loads: its own tokenizer and template, its own scores."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "whole")
    folder = run_ppo(reward_model=str(tmp_path / "whole"), max_steps=1)
    check_sample_scores(folder, tmp_path / "whole", tmp_path / "whole")


def test_every_pass_keeps_the_bound_on_tokens(
    run_ppo: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts, evaluation, pretraining text and a reward model that reads text in padded rows of its own."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "whole")
    write_jsonl(tmp_path / "text.jsonl", [{"text": f"The fox number {i} is red. " * (1 + i % 4)} for i in range(8)])
    flags = {"reward_model": str(tmp_path / "whole"), "ptx_dataset": str(tmp_path / "text.jsonl"), "ptx_coef": 0.5}
    original, passes, callers = ppo.lay_out, [], ("lay_out_rollout", "score_responses", "ptx_backward")

    def laid_out(*given: Any) -> Any:
        rows = original(*given)
        caller = next(frame.function for frame in inspect.stack() if frame.function in callers)
        passes.append((caller, len(rows.mask), rows.input_ids.numel()))
        return rows

    monkeypatch.setattr(ppo, "lay_out", laid_out)
    folder = run_ppo(**flags, max_steps=1, minibatches=1, micro_batch_size=8, tokens_per_micro_batch=100)
    assert all(columns <= 100 or n == 1 for _, n, columns in passes)
    for name in callers:
        assert 1 < max(n for who, n, _ in passes if who == name) < 8, name
    check_sample_scores(folder, tmp_path / "whole", tmp_path / "whole")


def test_two_scores_are_refused(run_ppo: Run, base: Path, tmp_path: Path) -> None:
    """A classifier with two labels is no reward model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "two")
    with pytest.raises(ppo.UserError, match="neither a run folder of reward.py nor a model with one score"):
        run_ppo(reward_model=str(tmp_path / "two"))


def test_a_reward_model_with_another_template_scores_text(
    run_ppo: Run, reward_run: Path, tmp_path: Path, capsys: Any
) -> None:
    """Same base, other markup: the text is rendered again with the reward model's own template."""
    import shutil

    shutil.copytree(reward_run, tmp_path / "reward")
    (tmp_path / "reward" / "chat_template.jinja").write_text(ppo.PLAIN_TEMPLATE)
    (tmp_path / "reward" / "reward.json").unlink()
    one = metrics(run_ppo(reward_model=str(reward_run), max_steps=1))[0]
    other = metrics(run_ppo(reward_model=str(tmp_path / "reward"), max_steps=1))[0]
    assert other["response_length"] == one["response_length"] and abs(other["score"] - one["score"]) > 0.01


def test_the_policys_precision_wins(run_ppo: Run, reward_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward model of fp32 under a policy in NF4: said aloud, and its canaries are held to rank and shift."""
    try:
        run_ppo(quant="nf4", max_steps=1)
    except ppo.UserError as error:  # random weights may well not survive 4 bits; then the line says so
        assert "rank correlation" in str(error) and str(reward_run) in str(error)
    assert "trained in none, float32; now the policy's nf4, bfloat16" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- what is saved
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_adapter_loads_in_plain_peft(
    stage: str, run_sft: Run, run_ppo: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers + PEFT on the run folder give the logits of the model that was trained, to 1e-5; not the base's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module: Any = {"sft": sft, "ppo": ppo}[stage]
    original, seen = module.save_adapter, {}
    ids = torch.tensor([[5, 17, 99, 300, 4]])

    def recorded(folder: Path, model: Any, name: str, *rest: Any) -> None:
        original(folder, model, name, *rest)
        with module.role(model, name):
            seen["logits"] = model(ids).logits

    monkeypatch.setattr(module, "save_adapter", recorded)
    folder = (run_sft if stage == "sft" else run_ppo)(learning_rate=0.01)
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        bare = plain(ids).logits
        loaded = PeftModel.from_pretrained(plain, str(folder)).eval()(ids).logits
    assert torch.allclose(loaded, seen["logits"], atol=1e-5) and (bare - loaded).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert all(array.dtype == np.float32 for array in adapter_weights(folder).values())


def test_full_training_writes_a_base(run_sft: Run, run_ppo: Run, base: Path, reward_file: str, tmp_path: Path) -> None:
    """sft.py --lora_r 0: a model folder whose every weight has moved, that loads, and that ppo.py takes as a base."""
    from transformers import AutoModelForCausalLM

    folder = run_sft(lora_r=0, learning_rate=1e-3)
    assert (folder / "config.json").is_file() and not (folder / "adapter_config.json").exists()
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (base, folder))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[k], after[k]) for k in before)
    assert sft.base_identity(str(folder)) != sft.base_identity(str(base))
    assert len(metrics(run_ppo(model=str(folder), reward_fn=reward_file))) == 2


def test_full_training_resumes_bit_for_bit(run_sft: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All weights, tied ones included, come back from the checkpoint."""
    from safetensors.numpy import load_file

    flags = {"lora_r": 0, "max_steps": 4, "save_every": 2}
    done = run_sft(output_dir=str(tmp_path / "done"), **flags)
    with monkeypatch.context() as patch:
        die_at(patch, sft, "log_step", 4)
        with pytest.raises(Killed):
            run_sft(**flags)
    resumed = run_sft(resume=True, **flags)
    assert (resumed / "metrics.jsonl").read_bytes() == (done / "metrics.jsonl").read_bytes()
    weights = [load_file(folder / "model.safetensors") for folder in (done, resumed)]
    assert all(np.array_equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_stages_follow_each_other(run_sft: Run, run_ppo: Run, tmp_path: Path) -> None:
    """--model takes the run folder before: sft -> sft -> ppo, the last one's reference being the one before."""
    first = run_sft(output_dir=str(tmp_path / "one"))
    second = run_sft(model=str(first), lora_r=None, output_dir=str(tmp_path / "two"))
    assert not same_weights(first, second)
    folder = run_ppo(model=str(second), max_steps=1)
    report = json.loads((folder / "report.json").read_text())
    assert next(g["value"] for g in report["gates"] if g["name"] == "kl_step0") == 0
    third = run_ppo(model=str(folder), max_steps=1, output_dir=str(tmp_path / "again"))
    assert not same_weights(folder, third)


# -------------------------------------------------------------------------------------------------- two processes
def launch(stage: str, n: int, output: Path, flags: dict[str, Any]) -> Path:
    """Run a stage with `accelerate launch` on n CPU processes."""
    line = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(n)]
    line += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    line += ["--num_cpu_threads_per_process", "1", str(ROOT / f"{stage}.py"), "--output_dir", str(output)]
    line += [str(x) for k, v in flags.items() for x in (f"--{k}", v)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return output


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "minibatches"), [("sft", 1), ("ppo", 1), ("ppo", 2)])
def test_two_processes_equal_one(
    stage: str, minibatches: int, base: Path, sft_run: Path, reward_run: Path, world: Path, tmp_path: Path
) -> None:
    """Trap 23: sums over processes, whitening over the whole batch, samples by name: metrics equal to 1e-5."""
    flags: dict[str, Any] = {**SCRIPT_FLAGS[stage], "save_every": 0, "dataset": world / "sft.jsonl", "model": base}
    flags |= {"max_steps": 1 if stage == "ppo" else 2}
    if stage == "ppo":
        flags |= {"model": sft_run, "reward_model": reward_run, "dataset": world / "prompts.jsonl"}
        flags |= {"minibatches": minibatches, "ppo_epochs": 1, "micro_batch_size": 2}
    one, two = (launch(stage, n, tmp_path / str(n), flags) for n in (1, 2))
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert len(read_jsonl(two / "samples.jsonl")) == len(read_jsonl(one / "samples.jsonl"))
