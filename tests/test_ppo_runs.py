"""Whole runs of ppo.py in process: files, determinism, one step recomputed, resume, reward functions, every mistake."""

import functools
import itertools
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
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import CPU, ROOT, adapter_weights, read_jsonl, record, same_weights, strict_rows, write_jsonl
from torch import Tensor

import ppo

Run = Callable[..., Path]
KEYS = {
    "step", "score", "reward", "kl", "entropy", "response_length", "eos_rate", "policy_loss", "value_loss",
    "clip_fraction", "approx_kl", "explained_variance", "learning_rate", "kl_coef", "grad_norm", "critic_grad_norm",
}  # fmt: skip
FILES = {
    "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "generation_config.json", "args.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl", "result.json",
    "checkpoint.pt",
}  # fmt: skip


def metrics(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl."""
    return strict_rows(folder, "metrics.jsonl")


def reward_function(tmp_path: Path, body: str, name: str = "mine") -> str:
    """--reward_fn with this body."""
    (tmp_path / f"{name}.py").write_text(f"def score(prompts, responses, **columns):\n    {body}\n")
    return f"{tmp_path / name}.py:score"


def refused(run: Run, *patterns: str, **flags: Any) -> str:
    """run(**flags) ends in a UserError of one line that holds every pattern."""
    with pytest.raises(ppo.UserError) as caught:
        run(**flags)
    text = str(caught.value)
    assert "\n" not in text and len(text) > 20 and all(pattern in text for pattern in patterns), text
    return text


# ------------------------------------------------------------------------------------------------------ the folder
def test_it_writes_what_it_says(run_ppo: Run, sft_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file of the run folder, the metrics' keys, samples of rollouts and of both models, a table, the checks."""
    folder = run_ppo(plot=True, eval_every=1, save_every=1, eval_size=4)
    assert {p.name for p in folder.iterdir()} >= FILES | {"curves.png"}
    assert not list(folder.rglob("*.tmp")) and (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row.keys() >= KEYS and all(map(math.isfinite, row.values())) for row in rows)
    assert all({"heldout_score", "heldout_kl"} <= row.keys() for row in rows)  # eval_every 1
    assert not any("gold" in key for row in rows for key in row)  # the annotator judges its own world only
    timing = strict_rows(folder, "timing.jsonl")
    assert [row["step"] for row in timing] == [0, 1]
    assert all({"seconds", "rollout_seconds", "tokens_per_second", "peak_bytes"} <= row.keys() for row in timing)
    samples = strict_rows(folder, "samples.jsonl")
    assert [row["model"] for row in samples] == ["rollout 0"] * 4 + ["sft"] * 4 + ["ppo"] * 4
    assert all(
        {"id", "prompt", "response", "model", "finish_reason", "tokens", "score"} <= row.keys() for row in samples
    )
    assert all(row["finish_reason"] in ("stop", "length") for row in samples)
    assert all(row["finish_reason"] == "stop" or row["tokens"] == 10 for row in samples)
    settings = json.loads((folder / "args.json").read_text())
    assert settings["quant"] == "none" and settings["batch_size"] == 8 and settings["model"] == str(sft_run)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)  # no code is run by loading it
    assert state["step"] == 2 and state["tensors"][-1] == 0.1
    result = json.loads((folder / "result.json").read_text())
    assert result["stage"] == "ppo" and result["prompts"] == 4 and result["versions"]["torch"] == torch.__version__
    assert result["ppo"]["score"][0] == pytest.approx(rows[1]["heldout_score"], rel=1e-6)
    assert result["sft"]["kl"][0] == pytest.approx(0, abs=1e-5) and 0 <= result["score_win_rate"][0] <= 1
    printed = capsys.readouterr().out
    assert "4 held-out prompts" in printed and "win-rate over SFT" in printed and printed.count("preflight: ok") == 4


def test_files_are_strict_json(run_ppo: Run, tmp_path: Path) -> None:
    """One held-out prompt gives no interval, a judge that declines no number: NaN is no JSON."""
    gold = reward_function(tmp_path, "return [None] * len(responses)", "judge")
    folder = run_ppo(eval_size=1, max_steps=1, gold_fn=gold)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    for file in folder.rglob("*.json*"):
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(text, parse_constant=refuse)


def test_an_existing_folder_is_renamed_after_the_first_step(run_ppo: Run, capsys: Any, tmp_path: Path) -> None:
    """A run that fails before moves nothing; one that works moves the older folder, and says so."""
    first = run_ppo(max_steps=1)
    (first / "mine.txt").write_text("keep")
    refused(run_ppo, "no such file", reward_fn="absent.py:score")
    assert [p.name for p in tmp_path.iterdir()] == ["ppo"]
    run_ppo(max_steps=1)
    assert (tmp_path / "ppo.1" / "mine.txt").read_text() == "keep" and not (first / "mine.txt").exists()
    assert f"the existing {first} is now {first}.1" in capsys.readouterr().out


def test_the_adapter_loads_in_plain_peft(run_ppo: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers + PEFT on the run folder give the logits of the trained policy, and its end tokens are said."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    ids, logits, original = torch.tensor([[5, 17, 99, 300, 4]]), [], ppo.save_model

    def recorded(folder: Path, model: Any, name: str, *rest: Any) -> None:
        original(folder, model, name, *rest)
        with ppo.role(model, name):
            logits.append(model(ids).logits)

    monkeypatch.setattr(ppo, "save_model", recorded)
    folder = run_ppo(learning_rate=0.01, max_steps=1)
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        bare = plain(ids).logits
        loaded = PeftModel.from_pretrained(plain, str(folder)).eval()(ids).logits
    assert torch.allclose(loaded, logits[0], atol=1e-5) and (bare - loaded).abs().max() > 1e-2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert tokenizer.eos_token_id in GenerationConfig.from_pretrained(folder).eos_token_id
    assert all(array.dtype == np.float32 for array in adapter_weights(folder).values())


def test_stages_follow_each_other(run_ppo: Run, tmp_path: Path) -> None:
    """--model takes the run folder before: ppo -> ppo, whose reference is the policy before."""
    first = run_ppo(max_steps=1)
    again = run_ppo(model=str(first), max_steps=1, output_dir=str(tmp_path / "again"))
    assert not same_weights(first, again)
    assert metrics(again)[0]["kl"] == pytest.approx(0, abs=1e-5)


# ----------------------------------------------------------------------------------------------------- determinism
def test_it_is_a_function_of_its_seed(run_ppo: Run, tmp_path: Path) -> None:
    """Twice the same arguments: the same bytes of metrics.jsonl and weights; another seed: others."""
    first, second, other = (run_ppo(output_dir=str(tmp_path / n), seed=s) for n, s in (("a", 3), ("b", 3), ("c", 4)))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    assert same_weights(first, second) and not same_weights(first, other)
    assert (first / "samples.jsonl").read_bytes() == (second / "samples.jsonl").read_bytes()
    assert all(a["score"] != b["score"] for a, b in zip(metrics(first), metrics(other), strict=True))


def test_evaluation_has_noise_of_its_own(run_ppo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out responses before and after are drawn with the same numbers, and no training step uses these."""
    seen = record(monkeypatch, ppo, "sample")
    run_ppo(max_steps=3, seed=5)
    before, *training, after = [args[8] for args, _ in seen]
    assert before == after and len(training) == 3
    assert len({before[:2], *(key[:2] for key in training)}) == 2  # one stream for training, another for evaluation
    assert [key[2] for key in training] == [0, 1, 2] and all(key[0] == 5 for key in (before, *training))


def test_a_prompt_that_comes_twice_gets_other_responses(
    run_ppo: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch may be larger than the data, or reach into the next epoch: no response is counted twice."""
    seen = record(monkeypatch, ppo, "roll_out")
    write_jsonl(tmp_path / "two.jsonl", read_jsonl(world / "prompts.jsonl")[:3])
    run_ppo(dataset=str(tmp_path / "two.jsonl"), eval_size=1, max_steps=1, max_response_length=16)
    training = seen[1][1]  # 2 prompts, 4 places with 2 responses each
    assert len(training.responses) == 8 and len({p["prompt"] for p in training.prompts}) == 2
    assert len(set(map(tuple, training.responses))) >= 7


# -------------------------------------------------------------------------------------- what must not change a thing
def gradients_of(run_ppo: Run, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> tuple[list[list[Tensor]], dict]:
    """(gradients before each update of one step, its metrics)."""
    found: list[list[Tensor]] = []
    original = ppo.Run.clip_gradients

    def recorded(run: Any, optimizer: Any, rate: float) -> float:
        found.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        return original(run, optimizer, rate)

    with monkeypatch.context() as patch:
        patch.setattr(ppo.Run, "clip_gradients", recorded)
        folder = run_ppo(max_steps=1, **flags)
    return found, metrics(folder)[0]


def assert_same_step(ours: tuple[list, dict], theirs: tuple[list, dict]) -> None:
    """Gradients of the first policy and critic update, to 1e-5 of the largest entry, and the metrics of the rollout."""
    for a, b in zip(ours[0][:2], theirs[0][:2], strict=True):
        scale = max(g.abs().max().item() for g in b)
        assert len(a) == len(b) and scale > 0
        assert max((x - y).abs().max().item() for x, y in zip(a, b, strict=True)) <= 1e-5 * max(scale, 1e-3)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("minibatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_costs_memory_does_not_change_the_step(
    minibatches: int, run_ppo: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 23: flat rows of any length, one response per row, responses decoded in parts, checkpointing: one step."""
    flags = {"minibatches": minibatches, "samples_per_prompt": 4, "ppo_epochs": 1, "max_grad_norm": 1e9}
    whole = gradients_of(run_ppo, monkeypatch, tokens_per_batch=10**6, **flags)
    rows = record(monkeypatch, ppo, "flat_row")
    for change in ({"tokens_per_batch": 1}, {"tokens_per_batch": 90}, {"sample_batch_size": 3},
                   {"gradient_checkpointing": True}):  # fmt: skip
        assert_same_step(gradients_of(run_ppo, monkeypatch, **{**flags, **change}), whole)
    assert len(rows) > 10
    monkeypatch.setattr(ppo, "FLAT_ROW_MODELS", ())
    assert_same_step(gradients_of(run_ppo, monkeypatch, **flags), whole)


def test_every_pass_keeps_the_bound_on_tokens(
    run_ppo: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts, evaluation and a reward model that reads text: rows of at most --tokens_per_batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "whole")
    seen = record(monkeypatch, ppo, "flat_row")
    run_ppo(reward_model=str(tmp_path / "whole"), batch_size=16, minibatches=1, tokens_per_batch=100)
    assert len(seen) > 10 and all(len(row.ids) <= 100 or len(given[0]) == 1 for given, row in seen)
    assert sum(len(given[0]) > 1 for given, _ in seen) > 5  # and they are filled


# ------------------------------------------------------------------------------------------- one step, recalculated
def test_a_step_is_what_the_papers_say(run_ppo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traps 10 to 13: from raw log-probs, values and scores the reference finds the same advantages and returns.

    What the losses of step 1 get, where policy and reference have parted, is compared with plain loops over the real
    tokens of each response; then the losses themselves, and all that is logged.
    """
    names = ("roll_out", "role_logprobs", "role_tables", "score", "gae", "masked_whiten", "clipped_policy_loss")
    seen = {name: record(monkeypatch, ppo, name) for name in (*names, "clipped_value_loss")}
    flags = {"kl_coef": 0.3, "gamma": 0.9, "gae_lambda": 0.7, "missing_eos_penalty": 0.5, "learning_rate": 0.01}
    rows = metrics(run_ppo(**flags, max_response_length=16, tokens_per_batch=10**6))
    rollout = seen["roll_out"][2][1]  # after the evaluation and step 0
    mine = [(args, x) for args, x in seen["role_logprobs"] if args[3] is rollout.mask]
    old, ref = (next(x[0] for args, x in mine if args[1] == who) for who in ("policy", "reference"))
    entropy = next(x[1] for args, x in mine if args[1] == "policy")
    (values,) = next(x for args, x in seen["role_tables"] if args[1] == "critic" and args[3] is rollout.mask)
    scores = next(x for args, x in seen["score"] if args[1] is rollout)
    lengths = rollout.mask.sum(1).tolist()

    def lists(x: Tensor) -> list[list[float]]:
        return [row[:n] for row, n in zip(x.double().tolist(), lengths, strict=True)]

    final = [s - 0.5 * (1 - e) for s, e in zip(scores.tolist(), rollout.ended.tolist(), strict=True)]
    rewards = reference.kl_penalty_rewards(final, lists(old), lists(ref), 0.3)
    pairs = [reference.gae(r, v, 0.9, 0.7) for r, v in zip(rewards, lists(values), strict=True)]
    advantages, returns = reference.whiten([a for a, _ in pairs]), [r for _, r in pairs]
    for got, expected in ((seen["masked_whiten"][1][1], advantages), (seen["gae"][1][1][1], returns)):
        for got_row, row in zip(lists(got), expected, strict=True):
            assert got_row == pytest.approx(row, abs=1e-4)

    # the losses: two passes over two minibatches, each one row
    found: list[tuple[float, ...]] = []
    parts = seen["clipped_policy_loss"][4:], seen["clipped_value_loss"][4:]
    assert len(parts[0]) == len(parts[1]) == 4
    orders = []
    for ((new, before, advantage, clip), _), ((value, old_value, ret, value_clip), _) in zip(*parts, strict=True):
        number = next(i for i in (0, 1) if len(rollout.minibatches[i][0].targets) == len(new)
                      and torch.equal(before, old[rollout.minibatches[i][0].at]))  # fmt: skip
        responses, places = (x.tolist() for x in rollout.minibatches[number][0].at)
        orders.append(number)
        assert advantage.tolist() == pytest.approx(
            [advantages[i][t] for i, t in zip(responses, places, strict=True)], abs=1e-4
        )
        assert ret.tolist() == pytest.approx([returns[i][t] for i, t in zip(responses, places, strict=True)], abs=1e-4)
        tokens = list(zip(*(x.tolist() for x in (new, before, advantage)), strict=True))
        states = list(zip(*(x.tolist() for x in (value, old_value, ret)), strict=True))
        found.append((
            float(np.mean([reference.clipped_policy_loss(a, b, c, clip) for a, b, c in tokens])),
            float(np.mean([abs(math.exp(a - b) - 1) > clip for a, b, _ in tokens])),
            float(np.mean([reference.k3(a, b) for a, b, _ in tokens])),
            float(np.mean([reference.clipped_value_loss(a, b, c, value_clip) for a, b, c in states])),
        ))  # fmt: skip
    assert sorted(orders[:2]) == sorted(orders[2:]) == [0, 1] and clip == value_clip == 0.2
    assert found[0][2] == pytest.approx(0, abs=1e-6) and found[-1][2] > 1e-4 and found[-1][1] > 0
    logged = ("policy_loss", "clip_fraction", "approx_kl", "value_loss")
    assert [rows[1][name] for name in logged] == pytest.approx(np.mean(found, 0).tolist(), abs=1e-5)

    # all that is logged
    kl = sum(sum(a) - sum(b) for a, b in zip(lists(old), lists(ref), strict=True)) / len(lengths)
    assert abs(kl) > 1e-3 and rows[1]["kl"] == pytest.approx(kl, abs=1e-5)
    assert rows[1]["reward"] == pytest.approx(sum(map(sum, rewards)) / len(lengths), abs=1e-4)
    assert rows[1]["score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert rows[1]["entropy"] == pytest.approx(reference.masked_mean(lists(entropy)), abs=1e-5)
    variance = reference.explained_variance(lists(values), returns)
    assert rows[1]["explained_variance"] == pytest.approx(variance, abs=1e-3)


def plain_pass(model: Any, ids: list[int]) -> Any:
    """The model's own output for one text, in the active role, alone in its row."""
    return model(torch.tensor([ids]), output_hidden_states=True)


UPDATES: list[dict[str, Any]] = [
    {},
    {"policy_loss": "penalty", "penalty_coef": 2.0},
    {"entropy_coef": 0.3},
    {"temperature": 0.7},
]


@pytest.mark.parametrize("flags", UPDATES, ids=lambda flags: ",".join(flags))
def test_the_second_update_has_the_gradient_of_its_loss(
    flags: dict, run_ppo: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eqs. 7 and 8 of PPO, the bonus, and the critic's loss: where policy and critic have moved, the
    accumulated gradients equal those of losses that are written out here, from plain passes of one response each."""
    seen = {name: record(monkeypatch, ppo, name) for name in ("roll_out", "role_logprobs", "masked_whiten", "gae")}
    seen |= {name: record(monkeypatch, ppo, name) for name in ("role_tables", "add_critic")}
    found: list[tuple[list[Tensor], list[Tensor]]] = []
    original = ppo.Run.clip_gradients

    def policy_loss(args: Any) -> Tensor:
        model, rollout = seen["roll_out"][-1][0][0][0], seen["roll_out"][-1][1]
        tables = [x for given, x in seen["role_logprobs"] if given[1] == "policy" and given[3] is rollout.mask]
        old, advantages = tables[0][0], seen["masked_whiten"][-1][1]
        n, loss = rollout.mask.sum(), torch.zeros(())
        for i, y in enumerate(rollout.responses):
            prompt = rollout.prompts[i]["ids"]
            logits = plain_pass(model, prompt + y).logits[0, len(prompt) - 1 : -1] / args.temperature
            logp = logits.log_softmax(-1)
            new = logp[range(len(y)), y]
            ratio, a = (new - old[i, : len(y)]).exp(), advantages[i, : len(y)]
            if args.policy_loss == "clip":
                terms = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
            else:
                terms = -ratio * a + 2 * (ratio - 1 - ratio.log())
            terms = terms + args.entropy_coef * (logp.exp() * logp).sum(-1)
            loss = loss + terms.sum() / n
        return loss

    def value_loss() -> Tensor:
        model, rollout = seen["roll_out"][-1][0][0][0], seen["roll_out"][-1][1]
        (old,) = next(x for given, x in seen["role_tables"] if given[1] == "critic")
        returns, head, loss = seen["gae"][-1][1][1], seen["add_critic"][0][1], torch.zeros(())
        for i, y in enumerate(rollout.responses):
            prompt = rollout.prompts[i]["ids"]
            v = head(plain_pass(model, prompt + y).hidden_states[-1][0, len(prompt) - 1 : -1])[:, 0]
            before, target = old[i, : len(y)], returns[i, : len(y)]
            held = torch.minimum(torch.maximum(v, before - 0.2), before + 0.2)
            loss = loss + 0.5 * torch.maximum((v - target) ** 2, (held - target) ** 2).sum() / rollout.mask.sum()
        return loss

    def hooked(run: Any, optimizer: Any, rate: float) -> float:
        who = "policy" if len(found) % 2 == 0 else "critic"
        weights, model = optimizer.param_groups[0]["params"], seen["roll_out"][-1][0][0][0]
        ours = [p.grad.clone() for p in weights]
        with ppo.role(model, who, grad=True):
            expected = torch.autograd.grad(policy_loss(run.args) if who == "policy" else value_loss(), weights)
        found.append((ours, list(expected)))
        return original(run, optimizer, rate)

    monkeypatch.setattr(ppo.Run, "clip_gradients", hooked)
    rates = {"learning_rate": 0.02, "critic_learning_rate": 0.02}
    rows = metrics(run_ppo(max_steps=1, minibatches=1, tokens_per_batch=70, **rates, **flags))
    assert len(found) == 4 and rows[0]["clip_fraction"] > 0
    for ours, expected in found:
        scale = max(g.abs().max().item() for g in expected)
        assert scale > 1e-3
        assert all(torch.allclose(a, b, atol=1e-4 * scale) for a, b in zip(ours, expected, strict=True))


def test_kl_coef_follows_the_controller(run_ppo: Run) -> None:
    """Each step's coefficient is the reference's from the step before and its KL."""
    rows = metrics(run_ppo(kl_target=0.05, kl_horizon=40, max_steps=4))
    for before, after in itertools.pairwise(rows):
        expected = reference.adapt_kl_coef(before["kl_coef"], before["kl"], 0.05, 8, 40)
        assert after["kl_coef"] == pytest.approx(expected, rel=1e-6)
    assert len({row["kl_coef"] for row in rows}) > 1


def test_the_reward_is_the_score_less_what_did_not_end(run_ppo: Run) -> None:
    """Without a KL penalty the reward is the score, less the penalty of what did not end."""
    row = metrics(run_ppo(missing_eos_penalty=2.0, kl_coef=0.0, max_steps=1))[0]
    assert 0 < row["eos_rate"] < 1
    assert row["reward"] == pytest.approx(row["score"] - 2 * (1 - row["eos_rate"]), abs=1e-5)


# --------------------------------------------------------------------------------------------------- interruptions
class Killed(BaseException):
    """Stands for SIGKILL: nothing in the script may catch it."""


FLAGS = {"max_steps": 4, "save_every": 1, "kl_target": 0.05, "kl_horizon": 20, "weight_decay": 0.1, "ppo_epochs": 1}
DEATHS = [
    ("Run.log", 3, False),  # the third step has been computed, nothing of it is written
    ("Run.save", 2, False),  # metrics.jsonl is one step ahead of the checkpoint
    ("torch.save", 3, True),  # half of the third checkpoint is written
    ("save_model", 1, False),  # all steps are done, the result is not written
]


def die_at(patch: pytest.MonkeyPatch, name: str, call: int, half: bool = False) -> None:
    """Let the `call`-th call of ppo.<name> (from 1) kill the run; half: after half of the file has been written."""
    owner = {"Run": ppo.Run, "torch": torch}.get(name.partition(".")[0], ppo)
    attribute, calls = name.rpartition(".")[2], itertools.count(1)
    original = getattr(owner, attribute)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            if half:
                args[1].write(b"half a fi")
            raise Killed
        return original(*args, **kwargs)

    patch.setattr(owner, attribute, counted)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Path]:
    """Folders of runs that were left in peace, made by the first test that asks."""
    return {}


def assert_resumed_equals(done: Path, resumed: Path) -> None:
    """Metrics byte for byte, the adapter bit for bit, samples and result."""
    assert (resumed / "metrics.jsonl").read_bytes() == (done / "metrics.jsonl").read_bytes()
    assert len(read_jsonl(resumed / "timing.jsonl")) == len(metrics(done))
    assert same_weights(resumed, done)
    assert (resumed / "samples.jsonl").read_bytes() == (done / "samples.jsonl").read_bytes()
    results = [json.loads((folder / "result.json").read_text()) for folder in (resumed, done)]
    assert results[0]["ppo"] == results[1]["ppo"] and results[0]["sft"] == results[1]["sft"]


@pytest.mark.parametrize(
    ("where", "call", "half", "quant"),
    [*((*death, "none") for death in DEATHS), pytest.param(*DEATHS[0], "nf4", marks=pytest.mark.slow)],
    ids=[*(death[0] for death in DEATHS), "nf4"],
)
def test_it_resumes_bit_for_bit(
    where: str, call: int, half: bool, quant: str, run_ppo: Run, uninterrupted: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """Killed anywhere, --resume ends as the uninterrupted run: adapters, optimisers, adapted KL coefficient, cursor."""
    if quant not in uninterrupted:
        folder = tmp_path_factory.mktemp("ppo") / "done"
        uninterrupted[quant] = run_ppo(output_dir=str(folder), quant=quant, **FLAGS)
        coefs = [row["kl_coef"] for row in metrics(folder)]
        assert len(set(coefs)) == 4  # it is adapted: state that must survive
    with monkeypatch.context() as patch:
        die_at(patch, where, call, half)
        with pytest.raises(Killed):
            run_ppo(quant=quant, **FLAGS)
    assert_resumed_equals(uninterrupted[quant], run_ppo(resume=True, quant=quant, **FLAGS))


def test_ctrl_c_ends_with_a_checkpoint(run_ppo: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SIGINT in step 2 of 3: the step is finished and saved, one line says how to go on; the result is the same."""
    done = run_ppo(output_dir=str(tmp_path / "done"), max_steps=3, save_every=50)
    original = ppo.roll_out

    def interrupted(*args: Any) -> Any:
        if args[6][1:] == (0, 1):
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "roll_out", interrupted)
        refused(run_ppo, "stopped after step 2 of 3; add --resume to go on", max_steps=3, save_every=50)
    assert_resumed_equals(done, run_ppo(max_steps=3, save_every=50, resume=True))


def test_resume_may_go_further_but_not_elsewhere(run_ppo: Run, world: Path, tmp_path: Path) -> None:
    """Without a folder, with other settings or other rows: one line and an untouched folder; --max_steps may grow."""
    refused(run_ppo, "--resume: no checkpoint in", "start without", resume=True)
    folder = run_ppo(max_steps=1)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    refused(run_ppo, "--kl_coef 0.5 (was 0.1)", max_steps=1, kl_coef=0.5, resume=True)
    fewer = write_jsonl(tmp_path / "prompts.jsonl", read_jsonl(world / "prompts.jsonl")[:20])
    refused(run_ppo, "started with other settings", max_steps=1, dataset=str(fewer), resume=True)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    (folder / "checkpoint.pt").write_bytes(b"half a fi")
    refused(run_ppo, "--resume: no checkpoint in", max_steps=1, resume=True)
    (folder / "checkpoint.pt").write_bytes(before[folder / "checkpoint.pt"])
    rows = metrics(run_ppo(max_steps=3, resume=True, tokens_per_batch=64))
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[0] == metrics(folder)[0]


SCRIPT_FLAGS: dict[str, Any] = {
    "max_steps": 8, "save_every": 2, "batch_size": 8, "samples_per_prompt": 2, "minibatches": 2, "eval_size": 3,
    "max_response_length": 10, "missing_eos_penalty": 0.0, "tokens_per_batch": 128, "learning_rate": 5e-4,
}  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(output: Path, flags: dict[str, Any]) -> list[str]:
    """The command line behind `python`."""
    line = [str(ROOT / "ppo.py"), "--output_dir", str(output)]
    return line + [str(x) for k, v in flags.items() for x in (f"--{k}", v)]


def count_lines(file: Path) -> int:
    """Whole lines of a file that is being written, 0 where it is not there yet."""
    return file.read_bytes().count(b"\n") if file.is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_sigkill_and_resume(
    seed: int, sft_run: Path, reward_run: Path, world: Path, tmp_path: Path, uninterrupted: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """A real SIGKILL at a random moment of training, twice, then --resume: as if nothing had happened."""
    rng, flags = random.Random(seed), {"model": sft_run, "reward_model": reward_run, "dataset": world / "prompts.jsonl"}
    flags |= SCRIPT_FLAGS
    if "command" not in uninterrupted:
        uninterrupted["command"] = tmp_path_factory.mktemp("ppo") / "done"
        line = [sys.executable, *command(uninterrupted["command"], flags)]
        subprocess.run(line, env=ENVIRONMENT, check=True, capture_output=True)
    folder = tmp_path / "run"
    line = [sys.executable, *command(folder, flags)]
    for until in sorted(rng.sample(range(3, 6), 2)):  # a checkpoint has been written
        process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while count_lines(folder / "metrics.jsonl") < until and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        assert process.poll() is None  # it is in the middle of training
        process.send_signal(signal.SIGKILL)
        process.wait()
        line = [sys.executable, *command(folder, {**flags, "resume": True})]
    subprocess.run(line, env=ENVIRONMENT, check=True, capture_output=True)
    assert_resumed_equals(uninterrupted["command"], folder)


@pytest.mark.slow
@pytest.mark.parametrize("minibatches", [1, 2])
def test_two_processes_equal_one(
    minibatches: int, sft_run: Path, reward_run: Path, world: Path, tmp_path: Path
) -> None:
    """Trap 23: sums over processes, whitening over the whole batch, samples by name: metrics equal to 1e-5."""
    flags = {"model": sft_run, "reward_model": reward_run, "dataset": world / "prompts.jsonl", **SCRIPT_FLAGS}
    flags |= {"max_steps": 1, "minibatches": minibatches, "ppo_epochs": 1}
    folders = []
    for n in (1, 2):
        line = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(n)]
        line += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        line += ["--num_cpu_threads_per_process", "1", *command(tmp_path / str(n), flags)]
        done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        folders.append(tmp_path / str(n))
    for ours, theirs in zip(metrics(folders[1]), metrics(folders[0]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert len(read_jsonl(folders[1] / "samples.jsonl")) == len(read_jsonl(folders[0] / "samples.jsonl"))


# --------------------------------------------------------------------------------------------------------- flags
SLOW = pytest.mark.slow
RUNS: list[Any] = [
    {"samples_per_prompt": 1, "entropy_coef": 0.01, "minibatches": 8},
    {"samples_per_prompt": 3, "batch_size": 9, "minibatches": 4, "temperature": 0.7},
    {"quant": "nf4", "reward_fn": True, "gold_fn": True},
    {"epochs": 0.5, "max_steps": 0, "eval_dataset": "prompts", "weight_decay": 0.1, "warmup_ratio": 0.5},
    {"model": "base", "reward_fn": True, "lora_r": 2, "lora_alpha": 8.0, "lora_target_modules": ["q_proj", "v_proj"]},
    pytest.param({"model": "base", "gold_fn": True, "chat_template": "plain"}, marks=SLOW),
    pytest.param({"samples_per_prompt": 8, "gradient_checkpointing": True}, marks=SLOW),
    pytest.param({"dtype": "bfloat16", "reward_fn": True, "policy_loss": "penalty"}, marks=SLOW),
    pytest.param({"kl_coef": 0.0, "max_grad_norm": 0.01}, marks=SLOW),
    pytest.param({"chat_template": "text"}, marks=SLOW),
    pytest.param({"gamma": 0.9, "gae_lambda": 1.0, "ppo_epochs": 1, "minibatches": 1}, marks=SLOW),
    pytest.param({"batch_size": 12, "minibatches": 5, "columns": "prompt=prompt,letter=answer"}, marks=SLOW),
    pytest.param({"quant": "nf4", "reward_fn": True, "dtype": "float32"}, marks=SLOW),
    pytest.param({"model": "base", "reward_fn": True, "quant": "nf4"}, marks=SLOW),
]


@pytest.mark.parametrize("flags", RUNS, ids=lambda flags: ",".join(flags))
def test_every_flag_runs(flags: dict, run_ppo: Run, world: Path, base: Path, reward_file: str, tmp_path: Path) -> None:
    """Trap 32: two steps with every flag that changes a code path; all metrics finite, the adapter loads again."""
    flags = dict(flags)
    paths = {"eval_dataset": world / "prompts.jsonl", "model": base}
    flags |= {name: str(path) for name, path in paths.items() if name in flags}
    flags |= {name: reward_file for name in ("reward_fn", "gold_fn") if name in flags}
    folder = run_ppo(**flags)
    rows = metrics(folder)
    assert len(rows) == (3 if "epochs" in flags else 2)
    assert all(row.keys() >= KEYS and all(map(math.isfinite, row.values())) for row in rows)
    assert np.mean([row["grad_norm"] for row in rows]) > 0
    assert all(("gold" in row) == ("gold_fn" in flags) for row in rows) and ("heldout_gold" in rows[-1]) == (
        "gold_fn" in flags
    )
    again = ppo.Args(model=str(folder))
    model, _, _, adapter = ppo.load_model(again, CPU)
    ppo.add_adapter(model, "policy", adapter, again)


@pytest.mark.parametrize(
    ("flags", "patterns"),
    [
        ({"lora_r": 0}, ["--lora_r 0"]),
        ({"lora_r": 0, "model": "base"}, ["--lora_r 0"]),
        ({"lora_r": 8}, ["--lora_r:", "is an adapter with its own"]),
        ({"lora_alpha": 3.0}, ["--lora_alpha:", "with its own"]),
        ({"lora_target_modules": ["q_proj"]}, ["--lora_target_modules:", "with its own"]),
        ({"model": "base", "lora_target_modules": ["lm_head"]}, ["--lora_target_modules lm_head"]),
        ({"model": "base", "lora_target_modules": ["nothing"]}, ["adapter policy"]),
        ({"reward_fn": "here.py:f", "reward_model": "there"}, ["--reward_fn and --reward_model"]),
        ({"reward_model": None, "reward_fn": None}, ["what is a good response? Give --reward_model or --reward_fn"]),
        ({"batch_size": 9}, ["--batch_size 9", "--samples_per_prompt 2"]),
        ({"minibatches": 16}, ["--batch_size 8", "--minibatches"]),
        ({"eval_size": 0.0}, ["--eval_size 0.0"]),
        ({"eval_size": 24}, ["--eval_size 24", "leaves none to train on"]),
        ({"chat_template": "absent.jinja"}, ["absent.jinja"]),
        ({"reward_fn": "absent.py:score"}, ["absent.py:score", "no such file"]),
        ({"reward_fn": "absent"}, ["absent"]),
        ({"gold_fn": "absent"}, ["absent", "expected file.py:function"]),
        ({"max_prompt_length": 3}, ["no usable row", "24 prompt over 3 tokens"]),
        ({"max_response_length": 600}, ["512 positions"]),
        ({"eval_dataset": "absent.jsonl"}, ["absent.jsonl"]),
        ({"reward_model": "absent"}, ["absent"]),
        ({"model": "absent"}, ["absent"]),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_contradicting_flags(flags: dict, patterns: list[str], run_ppo: Run, base: Path, tmp_path: Path) -> None:
    """Each is one line that names the flag, before anything is written."""
    refused(run_ppo, *patterns, **{k: str(base) if v == "base" else v for k, v in flags.items()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        {"samples_per_prompt": 0}, {"tokens_per_batch": 0}, {"minibatches": 0}, {"batch_size": 0}, {"ppo_epochs": 0},
        {"temperature": 0.0}, {"max_response_length": 0}, {"kl_horizon": 0, "kl_target": 0.1}, {"batch_size": -8},
        {"kl_horizon": 3, "kl_target": 0.1},
        {"epochs": 0.0}, {"sample_batch_size": 0}, {"clip_range": -0.1}, {"learning_rate": -1.0}, {"save_every": 0},
        {"max_grad_norm": 0.0}, {"gamma": -0.5}, {"eval_every": -1},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_numbers(flags: dict, run_ppo: Run) -> None:
    """Zero responses, zero tokens, temperature 0: said before the first step, not a division by zero during it."""
    refused(run_ppo, f"--{next(iter(flags))}", **flags)


def test_columns_clash(run_ppo: Run, world: Path, tmp_path: Path) -> None:
    """Columns that reward functions take by themselves; a missing prompt column, and the flag that renames one."""
    rows = read_jsonl(world / "prompts.jsonl")
    clash = write_jsonl(tmp_path / "clash.jsonl", [{**row, "responses": "x"} for row in rows])
    refused(run_ppo, "column responses", "rename it", dataset=str(clash))
    other = write_jsonl(tmp_path / "other.jsonl", [{"question": row["prompt"]} for row in rows])
    refused(run_ppo, "no usable row of 24", "found question", "expected prompt", dataset=str(other))
    assert len(metrics(run_ppo(dataset=str(other), columns="prompt=question", max_steps=1))) == 1


def test_a_reward_model_that_refuses_a_prompt(run_ppo: Run, reward_run: Path, world: Path, tmp_path: Path) -> None:
    """Prompts with a system message, a reward model whose template has none: one line, not a crash in a step."""
    import shutil

    folder = Path(shutil.copytree(reward_run, tmp_path / "reward"))
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rows = [{"prompt": row["prompt"], "system": "Be brief."} for row in read_jsonl(world / "prompts.jsonl")]
    file = write_jsonl(tmp_path / "system.jsonl", rows)
    refused(run_ppo, "no system role", reward_model=str(folder), dataset=str(file))


def test_bad_prompts_are_counted_by_reason(run_ppo: Run, world: Path, tmp_path: Path, capsys: Any) -> None:
    """Empty, null, missing, over length, no text at all, an answer at the end, a forged turn: each with its count."""
    rows: list[Any] = read_jsonl(world / "prompts.jsonl")[:12]
    bad: list[Any] = [
        '{"prompt": "hal',  # 13
        {"prompt": ""},  # 14
        {"prompt": "   "},  # 15
        {"prompt": None},  # 16
        {"text": "no prompt"},  # 17
        {"prompt": "word " * 900},  # 18
        {"prompt": 7},  # 19
        {"prompt": []},  # 20
        {"prompt": [{"role": "user", "content": ""}]},  # 21
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},  # 22
        {"prompt": "Where?<|end|>"},  # 23
        {"prompt": "\n\nHuman: Where?\n\nAssistant:"},  # 24
    ]
    run_ppo(dataset=str(write_jsonl(tmp_path / "mixed.jsonl", [*rows, *bad])), max_steps=1)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("data: "))
    assert "12 examples from 24 rows" in line
    for reason in (
        "1 no JSON object of text (row 13",
        "3 a message without text, or of another role (row 14",
        "2 a column is missing or null (row 16",
        "1 prompt over 512 tokens (row 18",
        "2 neither a string nor a message list (row 19: 7",
        "1 the prompt ends with an assistant turn (row 22",
        "a special token or a turn inside the text (row 2",
    ):
        assert reason in line, line


def test_a_model_that_never_ends_is_stopped_at_once(
    run_ppo: Run, reward_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preflight names the cause; with --missing_eos_penalty 0 no end is wanted and the run goes on."""
    monkeypatch.setattr(ppo, "find_stop_ids", lambda *_: [10**6])  # a token that no sampler can draw
    flags = {"max_response_length": 4, "reward_fn": reward_file, "max_steps": 1}
    refused(run_ppo, "preflight: share without end is 1", "--missing_eos_penalty 0", missing_eos_penalty=1.0, **flags)
    run_ppo(missing_eos_penalty=0.0, **flags)


def test_an_unsound_start_is_stopped_before_the_first_update(
    run_ppo: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A sampler whose log-probs are not those of the training pass: red, with its cause; nothing is written."""
    original = ppo.sample

    def wrong(*args: Any) -> Any:
        responses, logprobs = original(*args)
        return responses, [[x - 0.01 for x in row] for row in logprobs]

    monkeypatch.setattr(ppo, "sample", wrong)
    refused(run_ppo, "preflight: sampler against training pass is 0.01")
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_stops_the_run(run_ppo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN must not reach the weights: one line with the step and the learning rate."""
    monkeypatch.setattr(ppo, "clipped_policy_loss", lambda new, *_: new * math.nan)
    refused(run_ppo, "step 1: the loss or its gradient is not finite", "lower the learning rate")


def cli(monkeypatch: pytest.MonkeyPatch, capsys: Any, *flags: str) -> tuple[Any, str]:
    """(exit code, stderr) of the command line `ppo.py flags`, in process."""
    monkeypatch.setattr(sys, "argv", ["ppo.py", *flags])
    with pytest.raises(SystemExit) as caught:
        ppo.run_cli(ppo.main, ppo.Args)
    return caught.value.code, capsys.readouterr().err


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A typo is named; abbreviations are not taken; a value of the wrong type names its flag; a
    mistake is the script's name and the message."""
    for flags in (["--lerning_rate", "1"], ["--learning", "1"]):
        code, error = cli(monkeypatch, capsys, *flags)
        assert code == 2 and len(error.splitlines()) == 2 and flags[0] in error and "--help" in error
    for flags in (["--batch_size", "many"], ["--quant", "int8"]):
        code, error = cli(monkeypatch, capsys, *flags)
        assert code == 2 and flags[0] in error.splitlines()[-1]
    code, _ = cli(monkeypatch, capsys, "--reward_fn", "absent.py:score", "--dataset", "elsewhere.jsonl")
    assert isinstance(code, str) and code.startswith("ppo.py: ") and "absent.py:score" in code


def test_help_lists_every_flag(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """--help exits with 0 and explains every field of Args, with its default."""
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        ppo.run_cli(ppo.main, ppo.Args)
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"--{n}" in printed and field.metadata["help"] for n, field in ppo.Args.__dataclass_fields__.items())


def test_settings_of_tiny_are_applied_where_no_flag_is_given(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Defaults are for a real model; on tiny's data its own are used, and printed; a flag wins; elsewhere none is."""
    seen: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--batch_size", "16"])
    ppo.run_cli(seen.append, ppo.Args)
    assert "settings for tiny/: --learning_rate 0.0005" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--dataset", "elsewhere.jsonl"])
    ppo.run_cli(seen.append, ppo.Args)
    assert not capsys.readouterr().out
    for name, value in ppo.TINY_SETTINGS.items():
        assert getattr(seen[0], name) == (16 if name == "batch_size" else value)
        assert getattr(seen[1], name) == getattr(ppo.Args(), name)


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
        assert len(responses) == len(prompts) and not any("<|end|>" in r for r in responses)
        assert columns.keys() == {"id", "animal", "attribute", "answer"}
        for i, prompt in enumerate(prompts):
            assert all(values[i] == rows[prompt][name] for name, values in columns.items())
    assert metrics(folder)[0]["score"] == pytest.approx(np.mean([len(r) for r in calls[1][1]]), abs=1e-5)


def test_none_is_the_mean_of_the_batch(run_ppo: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 31: a response without a score gets the mean of the others; a judge may decline too, and is left out."""
    body = "return [None if i % 4 == 0 else float(i) for i in range(len(responses))]"
    seen, spec = record(monkeypatch, ppo, "kl_penalty_rewards"), reward_function(tmp_path, body)
    row = metrics(run_ppo(reward_fn=spec, gold_fn=spec, max_steps=1))[0]
    assert seen[0][0][0].tolist() == [4.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert row["score"] == row["gold"] == pytest.approx(np.mean([1, 2, 3, 5, 6, 7]), abs=1e-5)


def test_no_score_at_all_is_one_line(run_ppo: Run, tmp_path: Path) -> None:
    """A batch of None has no mean."""
    spec = reward_function(tmp_path, "return [None] * len(responses)")
    refused(run_ppo, spec, "returned None for every response", reward_fn=spec)


PROMPTS = [{"prompt": f"p{i}", "columns": {"n": i} if i else {}} for i in range(4)]
KINDS: list[Callable] = [
    lambda x: np.array(x, dtype="float32"), torch.tensor, tuple, lambda x: [int(v) for v in x], iter,
    lambda x: [np.float16(v) for v in x], lambda x: [torch.tensor(v) for v in x],
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_scores_may_be_numbers_of_any_kind(kind: Callable) -> None:
    """What a model returns without further ado: arrays, tensors, tuples, integers, generators."""
    found = ppo.call_function(lambda prompts, responses, **_: kind([0.0, 1.0, 2.0, 3.0]), PROMPTS, list("abcd"))
    assert found.dtype == np.float64 and found.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_columns_that_some_rows_lack_are_none() -> None:
    """A column of later rows is not lost because the first row lacks it; prompts and responses come as they are."""
    seen: list[Any] = []

    def score(prompts: list, responses: list, **columns: list) -> list:
        seen.append((prompts, responses, columns))
        return [None, 1.0, 2, 3.0]

    found = ppo.call_function(score, PROMPTS, list("abcd"))
    assert seen == [(["p0", "p1", "p2", "p3"], ["a", "b", "c", "d"], {"n": [None, 1, 2, 3]})]
    assert math.isnan(found[0]) and found[1:].tolist() == [1.0, 2.0, 3.0]
    again = ppo.call_function(functools.partial(score), PROMPTS, list("abcd"))  # it has no __name__
    assert again[1:].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "returned 1 values for 8 responses"),
        ("return [float('nan')] * len(responses)", "returned nan for prompt"),
        ("return [float('inf')] * len(responses)", "returned inf for prompt"),
        ("return ['good'] * len(responses)", "returned 'good' for prompt"),
        ("return 1 / 0", "mine.py:2: ZeroDivisionError: division by zero"),
        ("return responses[999]", "mine.py:2: IndexError"),
        ("return undefined", "mine.py:2: NameError"),
        ("return None", "TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_a_bad_reward_fn_is_one_line(body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it returned and for what, or the file, the line and the mistake."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    function = ppo.load_function(reward_function(tmp_path, body))
    with pytest.raises(ppo.UserError) as caught:
        ppo.call_function(function, PROMPTS * 2, list("abcdefgh"))
    text = str(caught.value)
    assert message in text and "reward function score" in text and "\n" not in text


@pytest.mark.parametrize("error", ["ConnectionError('503')", "TimeoutError('slow')", "RuntimeError('busy')"])
def test_what_may_pass_is_tried_again(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's 503 or a timeout: three more tries with longer and longer waits, then one line."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    body = f"calls.append(0)\n    if len(calls) < least: raise {error}\n    return [1.0] * len(responses)"
    for least, expected in ((1, []), (3, [1, 5]), (4, [1, 5, 25])):
        function = ppo.load_function(reward_function(tmp_path, body))
        function.__globals__.update(calls=[], least=least)
        waits.clear()
        assert ppo.call_function(function, PROMPTS, list("abcd")).tolist() == [1.0] * 4 and waits == expected
    function.__globals__.update(calls=[], least=99)
    waits.clear()
    with pytest.raises(ppo.UserError, match=rf"reward function score: .*mine.py:3: {error.partition('(')[0]}: "):
        ppo.call_function(function, PROMPTS, list("abcd"))
    assert waits == [1, 5, 25] and len(function.__globals__["calls"]) == 4


@pytest.mark.parametrize("body", ["def score(:", "import no_such_module_at_all", "other = 1", "score = 5"])
def test_a_reward_file_that_does_not_load(body: str, tmp_path: Path) -> None:
    """A syntax error, a missing import, a missing function: the file's name and what is wrong."""
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(ppo.UserError, match=str(tmp_path / "mine.py")) as caught:
        ppo.load_function(f"{tmp_path / 'mine.py'}:score")
    assert "\n" not in str(caught.value)


def test_empty_responses_are_scored(run_ppo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses that are only an end token are scored like any other, by functions and by models that read text."""
    original = ppo.sample

    def short(model: Any, prompts: Any, names: Any, g: int, *rest: Any) -> Any:
        responses, logprobs = original(model, prompts, names, g, *rest)
        stop = rest[2][0]
        again = [[stop] if i == 0 else y for i, y in enumerate(responses)]
        return again, [x[: len(y)] for x, y in zip(logprobs, again, strict=True)]

    monkeypatch.setattr(ppo, "sample", short)
    monkeypatch.setattr(ppo, "preflight", lambda *_: None)
    rows = metrics(run_ppo(max_steps=1, chat_template="plain"))
    assert all(map(math.isfinite, rows[0].values()))
