"""Whole runs of grpo.py in process: files, layouts, methods, 4 bits, rewards, mistakes, real data, resume, pairs."""

import itertools
import json
import math
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_dpo as reference
import torch
from conftest import (
    ROOT,
    adapter_weights,
    perturb,
    read_jsonl,
    record,
    same_weights,
    shared_or_skip,
    strict_rows,
    write_jsonl,
)
from conftest import write_reward_run as write_reward
from torch import Tensor

import grpo

Run = Callable[..., Path]
ALL = [*grpo.METHODS, *grpo.PAIR_METHODS]
KEYS = {
    "step", "score", "kl", "response_length", "eos_rate", "equal_rewards", "refilled", "policy_loss", "clip_fraction",
    "approx_kl", "entropy", "grad_norm", "learning_rate",
}  # fmt: skip
FILES = {
    "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "generation_config.json", "args.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl", "result.json",
    "checkpoint.pt",
}  # fmt: skip


def some(names: list[str], *fast: str) -> list:
    """Parameters, those that are not `fast` marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


FUNCTIONS = '''
def share(prompts, responses, **columns):
    return [r.count("e") / (1 + len(r)) for r in responses]


def constant(prompts, responses, **columns):
    return [0.1] * len(responses)


def short(prompts, responses, **columns):
    return [None if len(r) % 2 else 1 / (1 + len(r)) for r in responses]


def rare(prompts, responses, **columns):
    """0 for half of the prompts, whatever the response."""
    return [float(sum(map(ord, p)) % 2 and len(r) % 2) for p, r in zip(prompts, responses)]


def silent(prompts, responses, **columns):
    """Knows nothing about the three held-out responses."""
    return [None if len(responses) == 3 else float(len(r) % 2) for r in responses]
'''


@pytest.fixture(scope="session")
def functions(world: Path) -> str:
    """The file with FUNCTIONS."""
    file = world / "grpo_functions.py"
    file.write_text(FUNCTIONS)
    return str(file)


@pytest.fixture
def run(sft_run: Path, world: Path, functions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(**flags) -> run folder: grpo.main on the small world, two steps of 4 x 4 responses unless told otherwise.

    Reward functions may be given by the names of FUNCTIONS; curves.png is drawn with plot=True only.
    """
    drawn = grpo.Run.plot_curves

    def named(source: str) -> str:
        name = source.partition("=")[0]
        return f"{functions}:{source}" if f"def {name}(" in FUNCTIONS else source

    def start(plot: bool = False, **flags: Any) -> Path:
        monkeypatch.setattr(grpo.Run, "plot_curves", drawn if plot else lambda *_: None)
        settings: dict[str, Any] = {
            "model": str(sft_run), "dataset": str(world / "prompts.jsonl"), "output_dir": str(tmp_path / "grpo"),
            "reward_fn": "share", "eval_size": 3, "max_response_length": 10, "samples_per_prompt": 4,
            "batch_size": 16, "tokens_per_batch": 128, "max_steps": 2, "warmup_ratio": 0.0, "learning_rate": 0.01,
        }  # fmt: skip
        settings |= {"reward_fn": None} if flags.get("rewards") or flags.get("reward_model") else {}
        settings |= flags
        for name in ("reward_fn", "gold_fn"):
            settings |= {name: named(settings[name])} if settings.get(name) else {}
        if settings.get("rewards"):
            settings["rewards"] = [named(source) for source in settings["rewards"]]
        grpo.main(grpo.Args(**settings))
        return Path(settings["output_dir"])

    return start


# ------------------------------------------------------------------------------------------------------ the folder
def test_a_run_writes_what_it_says(run: Run, reward_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file of the run folder, the metrics' keys, samples of rollouts and of both models, the table."""
    from transformers import AutoTokenizer

    rewards = ["share=2", f"{reward_run}=0.5"]
    folder = run(plot=True, eval_every=1, save_every=1, gold_fn="rare", rewards=rewards)
    assert {p.name for p in folder.iterdir()} >= FILES
    assert not list(folder.rglob("*.tmp")) and (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    rows = strict_rows(folder)
    assert [row["step"] for row in rows] == [0, 1]
    named = {f"{name}/{what}" for name in ("share", "reward") for what in ("mean", "sd", "equal")}
    judged = {"gold", "heldout_score", "heldout_gold", "heldout_kl"}
    assert all(row.keys() == KEYS | named | judged and all(map(math.isfinite, row.values())) for row in rows)
    assert abs(rows[0]["kl"]) < 1e-4 < abs(rows[1]["kl"]) and all(row["entropy"] > 0 for row in rows)
    timing = strict_rows(folder, "timing.jsonl")
    assert all({"step", "seconds", "rollout_seconds", "tokens_per_second", "peak_bytes"} <= t.keys() for t in timing)
    samples, special = strict_rows(folder, "samples.jsonl"), AutoTokenizer.from_pretrained(folder).all_special_tokens
    keys = {"id", "prompt", "response", "model", "finish_reason", "tokens", "score", "gold", "kl", "step"}
    assert [row["model"] for row in samples] == ["rollout 0"] * 4 + ["sft"] * 3 + ["grpo"] * 3
    assert all(row.keys() == keys for row in samples)
    assert [row["prompt"] for row in samples[4:7]] == [row["prompt"] for row in samples[7:]]
    assert {row["finish_reason"] for row in samples} <= {"stop", "length"}
    assert all(row["finish_reason"] == "stop" or row["tokens"] == 10 for row in samples)
    assert not any(token in row["response"] for row in samples for token in special)
    assert np.mean([r["score"] for r in samples[7:]]) == pytest.approx(rows[1]["heldout_score"], abs=1e-4)
    result = json.loads((folder / "result.json").read_text())
    assert result["stage"] == "grpo" and result["grpo"]["score"][0] == pytest.approx(rows[1]["heldout_score"])
    assert {"reward share", "reward reward", "kl", "length", "entropy", "gold", "ended"} <= result["sft"].keys()
    assert json.loads((folder / "args.json").read_text())["clip_high"] == 0.2  # what the method has set
    printed = capsys.readouterr().out
    assert all(label in printed for label in ("reward share", "reward reward", "gold win-rate over SFT", "ratio token"))
    assert printed.count("\nbefore ") == printed.count("\nafter ") == 3


@pytest.mark.parametrize("flags", [{"eval_size": 1}, {"reward_fn": "silent"}], ids=["one prompt", "nothing known"])
def test_files_are_strict_json(flags: dict[str, Any], run: Run) -> None:
    """One held-out prompt has no interval, unknown rewards no mean: neither is written as NaN, nor as a gate."""
    folder = run(max_steps=1, eval_every=1, **flags)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    for file in folder.rglob("*.json*"):
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(text, parse_constant=refuse)
    rows = [row for row in read_jsonl(folder / "samples.jsonl") if row["model"] in ("sft", "grpo")]
    assert rows and all(("score" in row) == ("eval_size" in flags) for row in rows)


@pytest.mark.parametrize("method", some(["dapo", "online_dpo", "grpo", "remax"], "dapo", "online_dpo"))
def test_a_run_is_a_function_of_its_seed(method: str, run: Run, tmp_path: Path) -> None:
    """Twice the same arguments: the same bytes; another seed: others."""
    first, second, other = (
        run(output_dir=str(tmp_path / n), seed=s, method=method, reward_fn="rare", mu=2)
        for n, s in (("a", 3), ("b", 3), ("c", 4))
    )
    for name in ("metrics.jsonl", "samples.jsonl", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert not same_weights(first, other) and strict_rows(first) != strict_rows(other)


@pytest.mark.slow
def test_a_gold_function_does_not_train(run: Run, tmp_path: Path) -> None:
    """--gold_fn adds figures; the weights are those of a run without."""
    judged, plain = run(gold_fn="constant"), run(output_dir=str(tmp_path / "plain"))
    assert same_weights(judged, plain) and strict_rows(judged)[0]["gold"] == pytest.approx(0.1)


def test_the_adapter_loads_in_plain_peft(run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers + PEFT on the run folder give the logits of the model that was trained, to 1e-5; not the base's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    original, seen, ids = grpo.save_model, {}, torch.tensor([[5, 17, 99, 300, 4]])

    def recorded(folder: Path, model: Any, name: str, *rest: Any) -> None:
        original(folder, model, name, *rest)
        with grpo.role(model, name):
            seen["logits"] = model(ids).logits

    monkeypatch.setattr(grpo, "save_model", recorded)
    folder = run(sync_ref_every=1)
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        bare = plain(ids).logits
        loaded = PeftModel.from_pretrained(plain, str(folder)).eval()(ids).logits
    assert torch.allclose(loaded, seen["logits"], atol=1e-5) and (bare - loaded).abs().max() > 1e-2
    assert all(array.dtype == np.float32 for array in adapter_weights(folder).values())


# -------------------------------------------------------------------------------------- what must not change a thing
@pytest.fixture
def first_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Tensor], dict]]:
    """first_step(**flags) -> (gradients before the first update, the step's metrics), away from where it starts.

    The policy has parted from the reference, and pi_old from the policy by noise: every ratio and KL term counts.
    """

    def start(**flags: Any) -> tuple[list[Tensor], dict]:
        found: list[list[Tensor]] = []
        clip, load, logprobs_of = grpo.Run.clip_gradients, grpo.load_rewards, grpo.role_logprobs

        def recorded(run: Any, optimizer: Any, learning_rate: float) -> float:
            (group,) = optimizer.param_groups
            found.append([p.grad.clone() for p in group["params"] if p.grad is not None])
            return clip(run, optimizer, learning_rate)

        def parted(model: Any, *rest: Any) -> Any:
            perturb(model, "policy", seed=11, size=0.1)
            return load(model, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(grpo.Run, "clip_gradients", recorded)
            patch.setattr(grpo, "load_rewards", parted)
            patch.setattr(grpo, "role_logprobs", partial(older, logprobs_of))
            patch.setattr(grpo, "preflight", lambda *_: None)
            folder = run(**{"max_steps": 1, "entropy_coef": 0.01, "kl_coef": 0.5, **flags})
        row = strict_rows(folder)[0]
        return found[0], {k: v for k, v in row.items() if not k.startswith("heldout")}

    return start


def noise(mask: Tensor) -> Tensor:
    """(B, T): by how much pi_old's log-probs are made to differ from the policy's."""
    return 0.1 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(5)) * mask


def older(compute: Callable, model: Any, who: str, rows: Any, mask: Tensor, args: Any) -> list[Tensor]:
    """role_logprobs with noise on the policy's."""
    logprobs, entropy = compute(model, who, rows, mask, args)
    return [logprobs + noise(mask) * (who == "policy"), entropy]


def assert_same_step(ours: tuple[list[Tensor], dict], theirs: tuple[list[Tensor], dict]) -> None:
    """Gradients to 1e-5 of the largest entry, metrics to 1e-4."""
    scale = max(g.abs().max().item() for g in theirs[0])
    assert len(ours[0]) == len(theirs[0]) and scale > 0
    assert max((x - y).abs().max().item() for x, y in zip(ours[0], theirs[0], strict=True)) <= 1e-5 * max(scale, 1e-3)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("method", some(ALL, "grpo", "gspo", "remax", "sppo"))
def test_rows_do_not_change_the_step(method: str, first_step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 23: responses of unequal lengths, all in one row, each group in one, each response: gradient, metrics."""
    whole = first_step(method=method, tokens_per_batch=4096)
    assert whole[1]["approx_kl"] > 1e-3 or method in grpo.PAIR_METHODS
    has_reference = method in grpo.PAIR_METHODS or grpo.METHODS[method].kl != "none"
    assert ("kl" in whole[1]) == has_reference and abs(whole[1].get("kl", 1.0)) > 0.1
    assert_same_step(first_step(method=method, tokens_per_batch=1), whole)
    if method in grpo.METHODS:
        monkeypatch.setattr(grpo, "FLAT_ROW_MODELS", ())
        assert_same_step(first_step(method=method), whole)


def test_layout_does_not_change_the_step(first_step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several groups, and of one response, after refilling and with truncated responses masked."""
    flags = {"method": "dapo", "reward_fn": "rare", "mask_truncated": True}
    whole = first_step(**flags)
    monkeypatch.setattr(grpo, "FLAT_ROW_MODELS", ())
    assert_same_step(first_step(**flags), whole)
    assert whole[1]["refilled"] > 0


def test_clip_fraction_counts_both_sides(first_step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratios of the first update are exp(-noise): those below 0.95 and above 1.02 over all tokens."""
    seen = record(monkeypatch, grpo, "collect")
    _, metrics = first_step(clip_low=0.05, clip_high=0.02)
    ((_, (rollout, *_)),) = seen
    ratios = torch.exp(-noise(rollout.mask))[rollout.mask.bool()]
    outside = (ratios < 0.95) | (ratios > 1.02)
    assert metrics["clip_fraction"] == pytest.approx(outside.float().mean().item(), abs=1e-6)


def test_gradient_checkpointing_does_not_change_the_step(first_step: Any) -> None:
    """Activations that are computed again are the same."""
    off, on = (first_step(gradient_checkpointing=recompute) for recompute in (False, True))
    assert_same_step(on, off)


# -------------------------------------------------------------------------------------------------- every method runs
@pytest.mark.parametrize("method", ALL)
def test_every_method_runs_with_every_extra(method: str, run: Run, sft_run: Path) -> None:
    """Two steps of two updates with truncated responses masked, an overlong buffer, an entropy bonus, a following
    reference where there is one: metrics finite, weights moved."""
    flags: dict[str, Any] = {"mask_truncated": True, "overlong_buffer": 0.5, "entropy_coef": 0.01, "reward_fn": "rare"}
    has_reference = method in grpo.PAIR_METHODS or grpo.METHODS[method].kl != "none"
    folder = run(method=method, mu=2, sync_ref_every=int(has_reference), **flags)
    rows = strict_rows(folder)
    assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())
    assert all(0 < row["eos_rate"] < 1 and row["approx_kl"] > 0 for row in rows) and not same_weights(folder, sft_run)
    assert (max(row["refilled"] for row in rows) > 0) == (method == "dapo")
    assert all(("accuracy" in row) != ("clip_fraction" in row) for row in rows)
    if has_reference:
        assert all(abs(row["kl"]) < 1e-4 for row in rows) and abs(rows[1]["heldout_kl"]) < 1e-4


@pytest.mark.parametrize(("kl", "passes"), [("none", 1), ("k3", 3)])
def test_the_reference_is_computed_where_it_is_needed(
    kl: str, passes: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps: once for the preflight without a KL penalty, else in each; and three times in the evaluations."""
    calls, compute = [], grpo.role_logprobs

    def counted(model: Any, who: str, *rest: Any) -> Any:
        calls.append(who)
        return compute(model, who, *rest)

    monkeypatch.setattr(grpo, "role_logprobs", counted)
    rows = strict_rows(run(kl=kl, max_steps=3, eval_every=0))
    assert calls.count("reference") == passes + 3 and all(("kl" in row) == (kl != "none") for row in rows)


@pytest.mark.parametrize(
    "method", some(ALL, "grpo", "dapo", "rloo", "reinforce", "reinforce_pp", "remax", "online_dpo")
)
def test_equal_rewards_move_nothing(method: str, run: Run, sft_run: Path) -> None:
    """0.1 for every response, no KL penalty: the weights stay to the bit, all groups are flat, metrics are finite."""
    kl = "none" if method in grpo.METHODS else None
    folder = run(method=method, reward_fn="constant", kl=kl, overlong_buffer=0.0, mu=2, max_steps=1)
    assert same_weights(folder, sft_run)
    for row in strict_rows(folder):
        assert all(map(math.isfinite, row.values())) and row["grad_norm"] == 0 and row["equal_rewards"] == 1
        assert row["constant/equal"] == 1 and row["constant/sd"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", ["grpo", "rloo", "remax", "reinforce_pp", "sppo"])
def test_a_batch_of_truncated_responses_moves_nothing(
    method: str, run: Run, sft_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--mask_truncated where no response ends: nothing to learn from, nothing is learned, nothing is NaN."""
    original = grpo.roll_out

    def endless(*args: Any, **kwargs: Any) -> Any:
        rollout = original(*args, **kwargs)
        return rollout._replace(ended=torch.zeros_like(rollout.ended))

    monkeypatch.setattr(grpo, "roll_out", endless)
    folder = run(method=method, mask_truncated=True, max_steps=1)
    (row,) = strict_rows(folder)
    assert row["eos_rate"] == 0 and row["grad_norm"] == 0 and {"policy_loss", "approx_kl", "entropy"} <= row.keys()
    assert same_weights(folder, sft_run)


def test_a_following_reference(run: Run) -> None:
    """--sync_ref_every 2: rollouts start at KL 0 every second step; the held-out KL is to the reference as it is."""
    rows = strict_rows(run(sync_ref_every=2, max_steps=4, eval_every=1))
    assert [abs(row["kl"]) < 1e-4 for row in rows] == [True, False, True, False]
    assert [abs(row["heldout_kl"]) < 1e-4 for row in rows] == [False, True, False, True]


@pytest.mark.parametrize("sync", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_bare_base_is_its_own_reference(sync: int, run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--model without an adapter: a new one is trained, the reference is the base until it follows."""
    loaded = record(monkeypatch, grpo, "load_rewards")
    rows = strict_rows(run(model=str(base), lora_r=4, sync_ref_every=sync, max_steps=3))
    (((model, *_), _),) = loaded
    assert set(model.peft_config) == ({"policy", "reference"} if sync else {"policy"})
    assert [abs(row["kl"]) < 1e-4 for row in rows] == [True, False, bool(sync)]


# ------------------------------------------------------------------------------------------------- other precisions
@pytest.mark.parametrize("flags", [{"quant": "nf4"}, {"dtype": "bfloat16"}], ids=["nf4", "bfloat16"])
def test_less_precision_trains(flags: dict, run: Run, sft_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU, past the preflight: layers of the kind asked for, two steps of finite metrics, float32 adapters."""
    import bitsandbytes

    loaded = record(monkeypatch, grpo, "load_rewards")
    folder = run(**flags)
    (((model, *_), _),) = loaded
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == (14 if "quant" in flags else 0)
    assert model.get_base_model().get_input_embeddings().weight.dtype == torch.bfloat16
    rows = strict_rows(folder)
    assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())
    assert not same_weights(folder, sft_run)
    assert all(array.dtype == np.float32 for array in adapter_weights(folder).values())


# --------------------------------------------------------------------------------------------------------- rewards
def test_table_and_total_by_hand(run: Run, reward_run: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three weighted rewards: a function, plain PEFT's reward model, and one that leaves rows out."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    tables, advantages = record(monkeypatch, grpo, "reward_table"), record(monkeypatch, grpo, "response_advantages")
    row = strict_rows(run(rewards=["share=2", f"{reward_run}=0.5", "short=-3"], max_steps=1, kl="none"))[0]
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    plain = PeftModel.from_pretrained(plain, str(reward_run)).eval()
    (rollout, *_), table = next(call for call in tables if len(call[0][0].texts) == 16)
    totals = []
    for i, (prompt, ids, text) in enumerate(zip(rollout.prompts, rollout.responses, rollout.texts, strict=True)):
        with torch.no_grad():
            score = plain(torch.tensor([[*prompt["ids"], *ids]])).logits.item() - 0.25
        expected = [text.count("e") / (1 + len(text)), score, math.nan if len(text) % 2 else 1 / (1 + len(text))]
        assert table[i].tolist() == pytest.approx(expected, abs=1e-4, nan_ok=True)
        totals.append(2 * expected[0] + 0.5 * expected[1] + (0.0 if len(text) % 2 else -3 * expected[2]))
    assert any(table[:, 2].isnan()) and not all(table[:, 2].isnan())
    ((returns, *_), result) = advantages[0]
    assert returns[:, 0].tolist() == pytest.approx(totals, abs=1e-3)
    groups = np.array(totals).reshape(4, 4)
    by_hand = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    assert result[:, 0].tolist() == pytest.approx(by_hand.flatten().tolist(), abs=1e-2)
    assert row["score"] == pytest.approx(np.mean(totals), abs=1e-4)
    for name, column in zip(("share", "reward", "short"), table.numpy().T, strict=True):
        assert row[f"{name}/mean"] == pytest.approx(np.nanmean(column), abs=1e-5)
        assert row[f"{name}/sd"] == pytest.approx(np.nanstd(column), abs=1e-4)
        flat = [np.ptp(group[~np.isnan(group)]) < 1e-6 if (~np.isnan(group)).any() else True
                for group in column.reshape(4, 4)]  # fmt: skip
        assert row[f"{name}/equal"] == np.mean(flat)


def test_unknown_rewards_leave_the_response_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only reward is None: advantage 0, no part in the group's mean; the others' is as if it had not been there."""
    seen = record(monkeypatch, grpo, "response_advantages")
    run(reward_fn="short", advantage="group_mean", kl="none", max_steps=1)
    ((returns, *_), advantages) = seen[0]
    unknown = returns[:, 0].isnan().numpy()
    assert unknown.any() and not unknown.all() and (advantages[torch.tensor(unknown)] == 0).all()
    for rewards, missing, found in zip(*(np.array(x).reshape(4, 4) for x in
                                         (returns[:, 0], unknown, advantages[:, 0])), strict=True):  # fmt: skip
        expected = [0.0 if m else r - rewards[~missing].mean() for r, m in zip(rewards, missing, strict=True)]
        assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_penalties_by_hand(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """missing_eos_penalty 2 and an overlong buffer of half of 10 tokens: from 5 tokens on, 0.2 for each more."""
    seen = record(monkeypatch, grpo, "penalised")
    run(reward_fn="constant", missing_eos_penalty=2.0, overlong_buffer=0.5, batch_size=48, max_steps=1)
    ((_, rollout, *_), totals) = seen[0]
    lengths = [len(y) for y in rollout.responses]
    missing = [float(length == 10 and not e) for length, e in zip(lengths, rollout.ended.tolist(), strict=True)]
    expected = [0.1 - 2 * m - max(0, n - 5) / 5 for m, n in zip(missing, lengths, strict=True)]
    assert totals.tolist() == pytest.approx(expected, abs=1e-5)
    assert len(set(lengths)) > 2 and 0 < sum(missing) < len(missing)


def test_rewards_of_one_name_stay_apart(run: Run, functions: str, tmp_path: Path) -> None:
    """Two functions of the same name in two files: the second one is logged by its source."""
    (tmp_path / "other.py").write_text("def share(prompts, responses, **c):\n    return [3.0] * len(responses)")
    second = f"{tmp_path / 'other.py'}:share"
    row = strict_rows(run(rewards=["share", f"{second}=0.5"], max_steps=1))[0]
    assert row[f"{second}/mean"] == 3 and row["score"] == pytest.approx(row["share/mean"] + 1.5, abs=1e-6)


def refused(run: Run, *patterns: str, **flags: Any) -> None:
    """run(**flags) ends in a UserError of one line that holds every pattern."""
    with pytest.raises(grpo.UserError) as caught:
        run(**flags)
    text = str(caught.value)
    assert "\n" not in text and all(pattern in text for pattern in patterns), text


@pytest.mark.parametrize(
    ("body", "patterns"),
    [
        ("raise KeyError('answer')", ["bad.py:3: KeyError: 'answer'"]),
        ("return [1.0, 2.0]", ["returned 2 values for 16 responses"]),
        pytest.param(
            "return [float('inf')] * len(responses)",
            ["returned inf for prompt '", ", response '"],
            marks=pytest.mark.slow,
        ),
        ("return [0.0] * 15 + [float('nan')]", ["returned nan for prompt '", ", response '"]),
        ("return [0.0, 'good'] + [0.0] * 14", ["returned 'good' for prompt '", ", response '"]),
        pytest.param("return 3", ["TypeError"], marks=pytest.mark.slow),
    ],
)
def test_a_bad_function_among_others_is_one_line(
    body: str, patterns: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of two rewards: its name, and the row where there is one."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    head = "if len(responses) < 16: return [0.0] * len(responses)"  # the held-out prompts
    (tmp_path / "bad.py").write_text(f"def bad(prompts, responses, **c):\n    {head}\n    {body}\n")
    refused(run, "reward function bad", *patterns, rewards=["share", f"{tmp_path / 'bad.py'}:bad=0.5"])


def test_two_reward_models_on_one_base(run: Run, reward_run: Path, base: Path, tmp_path: Path) -> None:
    """Each has an adapter of its own; both scores are those of a run with one of them."""
    second = write_reward(tmp_path / "second", base, seed=8)
    row = strict_rows(run(rewards=[str(reward_run), f"{second}=2"], max_steps=1))[0]
    (alone,) = strict_rows(run(rewards=[str(second)], max_steps=1))
    assert row["second/mean"] == pytest.approx(alone["second/mean"], abs=1e-5)
    assert abs(row["second/mean"] - row["reward/mean"]) > 1e-3
    assert row["score"] == pytest.approx(row["reward/mean"] + 2 * row["second/mean"], abs=1e-5)


FLAG_ERRORS: list[tuple[dict[str, Any], list[str]]] = [
    ({"rewards": ["share=much"]}, ["share=much", "much is no weight", "SOURCE=WEIGHT"]),
    ({"rewards": ["share=1.2.3"]}, ["1.2.3 is no weight"]),
    ({"rewards": ["absent.py:f"]}, ["absent.py:f", "no such file"]),
    ({"rewards": ["share", "nowhere"]}, ["nowhere"]),
    ({"reward_fn": None}, ["what is a good response?", "--reward_fn, --reward_model or --rewards"]),
    ({"batch_size": 18}, ["--batch_size 18", "--samples_per_prompt 4"]),
    ({"samples_per_prompt": 0}, ["--samples_per_prompt 0"]),
    *[({"method": m, "samples_per_prompt": 1}, ["--samples_per_prompt 1", "less than 2"])
      for m in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", *grpo.PAIR_METHODS)],
    *[({"method": m, "sync_ref_every": 2}, ["--sync_ref_every", f"--method {m}", "k1, k2 or k3"])
      for m in ("dr_grpo", "gspo", "cispo", "reinforce")],
    ({"kl": "none", "sync_ref_every": 1}, ["--sync_ref_every"]),
    ({"lora_r": 0}, ["--lora_r 0"]),
    ({"temperature": 0.0}, ["--temperature 0.0", "above 0"]),
    ({"tokens_per_batch": 0}, ["--tokens_per_batch 0"]),
    ({"method": "online_dpo", "ratio": "product"}, ["--ratio", "no part in --method online_dpo"]),
    ({"sample_batch_size": -1}, ["--sample_batch_size -1"]),
    ({"epochs": 0.0}, ["--epochs 0.0"]),
    ({"overlong_buffer": 2.0}, ["--overlong_buffer 2.0", "from 0 to 1"]),
    ({"overlong_buffer": -0.1}, ["--overlong_buffer -0.1"]),
    ({"sync_ref_every": -1}, ["--sync_ref_every -1", "above 0 or 0"]),
    ({"eval_size": 0}, ["--eval_size 0", "held-out prompts"]),
    ({"dataset": "absent.jsonl"}, ["absent.jsonl", "can't be read"]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "patterns"), FLAG_ERRORS, ids=lambda x: "" if isinstance(x, list) else str(x))
def test_impossible_flags_are_one_line(flags: dict, patterns: list[str], run: Run, tmp_path: Path) -> None:
    """Before there is a run folder: the flag, what is wrong, what to do."""
    refused(run, *patterns, **flags)
    assert not (tmp_path / "grpo").exists()


@pytest.mark.parametrize("weight", ["nan", "inf"])
def test_a_weight_must_be_finite(weight: str, run: Run) -> None:
    """A weight that is no number of use is refused like one that is no number."""
    refused(run, f"share={weight}", rewards=[f"share={weight}"])


def test_a_response_has_room(run: Run) -> None:
    """--max_response_length 0 is one line."""
    refused(run, "--max_response_length 0", max_response_length=0)


# ------------------------------------------------------------------------------------------------- shipped rewards
def shipped(spec: str) -> Callable:
    """A shipped reward function, loaded as --reward_fn does."""
    return grpo.load_function(f"{ROOT}/rewards/{spec}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("it is -$5", "-5"), ("$-5", "-5"), ("+7", "7"), ("1 / 2", "1/2"), ("1.5/2", "3/4"), ("007", "7"),
        (r"\boxed{\dfrac{-3}{4}}", "-3/4"), (r"\boxed{1{,}234}", "1234"), (r"\boxed{1\!000}", "1000"),
        (r"\boxed{\$5}", "5"), ("#### 5\n#### 6", "6"), (r"\boxed{5} #### 6", "6"), (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{a{b}c} 4", "None"), ("#### about 12 of 20", "12"), ("about 12 of 20", "20"), ("1,23", "23"),
        ("It is 2.", "2"), ("(4)-1", "1"), ("4 - 1", "1"), ("####\n8", "8"), ("1,234,567.25", "4938269/4"),
        ("[-2]", "-2"), ("0/5", "0"), ("-0.0", "0"),
        (r"\boxed{\frac12}", "1/2"),
        (r"\boxed{\dfrac 1{12}}", "1/12"),
        ("#### 3 1/2", "7/2"),
        (r"\boxed{-3\frac{1}{2}}", "-7/2"),
        ("1 2 / 4", "3/2"),
        ("of 10 and 3/4 the second", "3/4"),
    ],
)  # fmt: skip
def test_more_numbers(text: str, value: str) -> None:
    """What a response answers with: signs, marks over marks, LaTeX's separators."""
    assert str(shipped("math.py:number")(text)) == value


def test_endless_digits_and_missing_answers_are_no_crash() -> None:
    """A degenerate response is wrong, not an exception; a row without an answer has no reward."""
    numeric, exact = shipped("math.py:numeric"), shipped("math.py:exact")
    assert numeric(["?"] * 2, ["1" * 5000, "0." + "3" * 5000], answer=["5", "5"]) == [0.0, 0.0]
    assert exact(["?"], ["none"], answer=[None]) == [None]


def test_numeric_compares_exactly() -> None:
    """One half in five forms; 0.333 is not a third; unknown answers leave the row out."""
    numeric = shipped("math.py:numeric")
    halves = ["0.5", "1/2", r"\boxed{\frac{2}{4}}", "#### .50", "-0.5", "no idea"]
    assert numeric([""] * 6, halves, answer=["#### 1/2"] * 6, id=list(range(6))) == [1, 1, 1, 1, 0, 0]
    assert numeric([""] * 4, ["0.333", "1/3", "3", ""], answer=["1/3", "1/3", None, 7]) == [0, 1, None, 0]
    assert numeric([], [], answer=[]) == []


def test_exact_answers() -> None:
    """Case, spaces and one full stop at the end do not matter; the mark does, on both sides."""
    exact = shipped("math.py:exact")
    rows = [
        ("Paris", "paris", 1), (" PARIS.\n", "Paris", 1), ("It is Paris", "Paris", 0), ("", "Paris", 0), ("12", 12, 1),
        ("####Paris", "x #### paris.", 1), (r"so \boxed{x + 1}", "X +  1", 1), (r"\boxed{}", "", 1),
        ("Straße", "STRASSE", 1),
    ]  # fmt: skip
    assert exact([""] * 9, [r[0] for r in rows], answer=[r[1] for r in rows]) == [r[2] for r in rows]


def test_forms() -> None:
    """The whole response must match; a dot is also a new line; tags once each, in order, nothing around them."""
    matches, tagged = shipped("text.py:matches"), shipped("text.py:tagged")
    rows = [("42", "4", 0), ("4\n2", "4.2", 1), ("42\n", "42", 0), ("", "", 1), ("a|b", "a", 0), ("b", "a|b", 1)]
    assert matches([""] * 6, [r[0] for r in rows], pattern=[r[1] for r in rows]) == [r[2] for r in rows]
    forms = {
        "<think></think><answer></answer>": 1, " \n<think>a\nb</think>\n\n<answer>c\n</answer>\n": 1,
        "Well: <think>a</think><answer>b</answer>": 0, "<think>a</think><answer>b</answer>.": 0,
        "<answer>b</answer><think>a</think>": 0, "<think>a</think>b<answer>c</answer>": 0, "": 0,
        "<think>a<think>b</think><answer>c</answer>": 0, "<think>a</think></think><answer>c</answer>": 0,
        "<think>a</think><answer>b</answer><answer>c</answer>": 0, "<think>a</think><answer>b": 0,
        "<THINK>a</THINK><ANSWER>b</ANSWER>": 0,
    }  # fmt: skip
    assert tagged([""] * len(forms), list(forms)) == list(forms.values())


def test_lengths_and_repetition() -> None:
    """-|n - target| / target; -n / 100; the share of repeated runs of three words."""
    length, brevity, repetition = (shipped(f"text.py:{name}") for name in ("length", "brevity", "repetition"))
    texts = ["a b c d", "", "a\nb\tc  d", "a"]
    assert length([""] * 4, texts, words=[2, 5, 4, 0]) == [-1, -1, 0, None]
    assert brevity([""] * 4, texts) == [-0.04, 0, -0.04, -0.01]
    rows = {"a a a a": -1 / 2, "A b a B a b": -1 / 2, "a b c": 0, "a b": 0, "": 0, "a b c d a b c d": -2 / 6}
    assert repetition([""] * 6, list(rows)) == pytest.approx(list(rows.values()))


# -------------------------------------------------------------------------------------------------------- real data
def test_gsm8k_trains_for_a_few_steps(run: Run, tmp_path: Path) -> None:
    """Real questions, the public tiny model, two rewards: none is right, form is rewarded, nothing is NaN."""
    model = shared_or_skip("models", "stories260k")
    rows = read_jsonl(shared_or_skip("data", "gsm8k", "gsm8k_test_first200.jsonl"))
    rows = sorted(rows, key=lambda row: len(row["question"]))[:20]
    rows = [{"prompt": row["question"], "answer": row["answer"], "id": row["row"]} for row in rows]
    flags = {"dataset": str(write_jsonl(tmp_path / "gsm8k.jsonl", rows)), "chat_template": "plain", "lora_r": 4}
    rewards = [f"{ROOT}/rewards/math.py:numeric", f"{ROOT}/rewards/text.py:brevity=0.1"]
    folder = run(model=str(model), rewards=rewards, max_response_length=16, max_steps=3, **flags)
    table = strict_rows(folder)
    assert len(table) == 3 and all(math.isfinite(value) for row in table for value in row.values())
    for row in table:
        assert 0 <= row["numeric/mean"] < 0.5 and row["brevity/mean"] < 0 and row["grad_norm"] > 0
        assert row["score"] == pytest.approx(row["numeric/mean"] + 0.1 * row["brevity/mean"], abs=1e-6)
    heldout = [row for row in read_jsonl(folder / "samples.jsonl") if row["model"] in ("sft", "grpo")]
    assert heldout and {row["id"] for row in heldout} <= {row["id"] for row in rows}


def repeated(texts: list[str], n: int) -> float:
    """Mean share of runs of n words that a text has said before."""
    function = shipped("text.py:repetition")
    function.__globals__["N"] = n
    return -float(np.mean(function([""] * len(texts), texts)))


@pytest.mark.slow
def test_sentiment_rises_without_repetition(run: Run, tmp_path: Path) -> None:
    """40 steps on story openings: VADER's value on held-out continuations up, intervals apart; repeated bigrams and
    trigrams within 1.5 times the start, and chance."""
    pytest.importorskip("vaderSentiment", reason="rewards/sentiment.py needs vaderSentiment")
    model, openings = shared_or_skip("models", "stories260k"), []
    for story in json.loads(shared_or_skip("corpora", "tinystories_1000_clean.json").read_text(encoding="utf-8")):
        opening = " ".join(re.split(r"(?<=[.!?])\s+", story.strip())[:2])
        openings += [{"prompt": opening}] if 30 <= len(opening) <= 200 else []
    reward, file = f"{ROOT}/rewards/sentiment.py:positive", str(write_jsonl(tmp_path / "openings.jsonl", openings))
    folder = run(
        model=str(model), chat_template="text", lora_r=None, dataset=file, eval_size=200, reward_fn=reward,
        max_response_length=64, samples_per_prompt=8, batch_size=64, tokens_per_batch=1024, max_steps=40, epochs=10.0,
        learning_rate=3e-4, kl_coef=0.1, warmup_ratio=0.05,
    )  # fmt: skip
    rows = read_jsonl(folder / "samples.jsonl")
    before, after = ([row for row in rows if row["model"] == name] for name in ("sft", "grpo"))
    values = [np.array([row["score"] for row in part if "score" in row]) for part in (before, after)]
    low, high = (1.96 * x.std(ddof=1) / np.sqrt(len(x)) for x in values)
    texts = [[row["response"] for row in part] for part in (before, after)]
    shares = {n: [repeated(part, n) for part in texts] for n in (2, 3)}
    print(f"sentiment {[(x.mean(), h) for x, h in zip(values, (low, high), strict=True)]}, repeated {shares}")
    assert len(values[0]) >= 190 and values[1].mean() - high > values[0].mean() + low
    assert all(share[1] <= 1.5 * share[0] + 0.005 for share in shares.values()), shares  # 0.005: ten of 2000 runs


# --------------------------------------------------------------------------------------------------- interruptions
class Killed(BaseException):
    """Stands for SIGKILL: nothing in the script may catch it."""


def die_at(patch: pytest.MonkeyPatch, name: str, call: int, half: bool = False) -> None:
    """Let the `call`-th call of grpo.<name> (from 1) kill the run; half: after half of the file has been written."""
    owner = {"Run": grpo.Run, "torch": torch}.get(name.partition(".")[0], grpo)
    attribute, calls = name.rpartition(".")[2], itertools.count(1)
    original = getattr(owner, attribute)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            if half:
                args[1].write(b"half a fi")
            raise Killed
        return original(*args, **kwargs)

    patch.setattr(owner, attribute, counted)


RESUMED: dict[str, dict[str, Any]] = {
    "grpo": {"mu": 2, "eval_every": 2},
    "dapo": {"method": "dapo", "reward_fn": "rare", "mask_truncated": True},
    "sync": {"method": "rloo", "sync_ref_every": 2, "model": "base", "lora_r": 4},
    "remax": {"method": "remax", "sync_ref_every": 1},
    "sppo": {"method": "sppo", "sync_ref_every": 2},
}
DEATHS = [
    ("grpo", "Run.clip_gradients", 4, False),  # between the two updates of the second step
    ("grpo", "Run.save", 2, False),  # metrics.jsonl is one step ahead of the checkpoint
    ("grpo", "save_model", 1, False),  # all steps are done, the result is not written
    ("dapo", "Run.log", 3, False),  # the third step has been computed, nothing of it is written
    ("dapo", "lay_out", 5, False),  # in the middle of a refill
    ("sync", "Run.log", 2, False),  # the reference has moved since the checkpoint
    ("sync", "collect", 3, False),  # the reference has moved, and its checkpoint is there
    ("remax", "torch.save", 3, True),  # half of the third checkpoint is written
    ("sppo", "Run.log", 3, False),
]
LATER = {
    ("grpo", "save_model"), ("grpo", "Run.save"), ("dapo", "lay_out"), ("sync", "Run.log"), ("remax", "torch.save"),
}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Path]:
    """Folders of runs that were left in peace, by name, made by the first test that asks."""
    return {}


@pytest.mark.parametrize(
    ("name", "where", "call", "half"),
    [pytest.param(*d, marks=pytest.mark.slow if d[:2] in LATER else []) for d in DEATHS],
    ids=[f"{name} {where}" for name, where, *_ in DEATHS],
)
def test_a_run_resumes_bit_for_bit(
    name: str, where: str, call: int, half: bool, run: Run, base: Path, uninterrupted: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """Killed anywhere, --resume ends as the uninterrupted run: policy, reference, optimiser, refills, samples."""
    flags = {"max_steps": 3, "save_every": 1, "weight_decay": 0.1, **RESUMED[name]}
    flags |= {"model": str(base)} if "model" in flags else {}
    if name not in uninterrupted:
        uninterrupted[name] = run(output_dir=str(tmp_path_factory.mktemp("grpo") / "done"), **flags)
    done = uninterrupted[name]
    with monkeypatch.context() as patch:
        die_at(patch, where, call, half)
        with pytest.raises(Killed):
            run(**flags)
    resumed = run(resume=True, **flags)
    for file in ("metrics.jsonl", "adapter_model.safetensors", "samples.jsonl"):
        assert (resumed / file).read_bytes() == (done / file).read_bytes(), file
    assert len(read_jsonl(resumed / "timing.jsonl")) == 3
    if name == "dapo":
        assert sum(row["refilled"] for row in strict_rows(done)) > 0


def test_resume_refuses_other_settings(run: Run) -> None:
    """A flag that a method sets counts, too."""
    run(max_steps=1, save_every=1)
    refused(run, "--clip_high 0.3 (was 0.2)", max_steps=1, save_every=1, resume=True, clip_high=0.3)
    refused(run, "--method dapo (was grpo)", max_steps=1, save_every=1, resume=True, method="dapo")


def test_a_checkpoint_holds_what_must_survive(run: Run) -> None:
    """Loads with weights_only; the policy, the reference that has become the policy, the optimiser's state."""
    for steps, equal in ((2, False), (3, True)):
        state = torch.load(run(max_steps=steps, sync_ref_every=3) / "checkpoint.pt", weights_only=True)
        n = len(state["tensors"]) // 2
        pairs = zip(state["tensors"][:n], state["tensors"][n:], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == equal
        assert state["step"] == steps and state["optimizers"][0]["state"]


# ------------------------------------------------------------------------------------------------- what main hands on
def test_rounds_of_refills_never_repeat(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant reward refills all four groups three times: 16 different prompts, 16 different names of noise."""
    calls = record(monkeypatch, grpo, "roll_out")
    (row,) = strict_rows(run(reward_fn="constant", max_refills=3, max_steps=1))
    asked = [given for given, _ in calls if given[3] == 4]  # not the evaluations
    assert row["refilled"] == 12
    assert len({name for given in asked for name in given[2]}) == 16
    assert len({p["key"] for given in asked for p in given[1]}) == 16


def test_refills_go_by_the_total_and_bring_everything(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are replaced where the weighted sum is flat; texts, ends and rewards are those of the new responses."""
    calls, tables = record(monkeypatch, grpo, "collect"), record(monkeypatch, grpo, "reward_table")
    run(rewards=["constant", "rare"], max_refills=1, max_steps=1)
    ((((_, tokenizer, stop_ids), _, rewards, _), (rollout, table, n)),) = calls
    first = next(found for (asked, *_), found in tables if len(asked.texts) == 16)
    assert n == grpo.equal_groups(grpo.total_rewards(first, rewards), 4).sum() and 0 < n < 4
    assert rollout.texts == tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    assert rollout.ended.tolist() == [float(y[-1] in stop_ids) for y in rollout.responses]
    assert table[:, 1].tolist() == rewards[1].function([p["prompt"] for p in rollout.prompts], rollout.texts)


def test_main_hands_on_the_mask(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """--mask_truncated: the loss, its denominator and the whitening leave out responses that did not end."""
    weighted, whitened = record(monkeypatch, grpo, "token_weights"), record(monkeypatch, grpo, "response_advantages")
    seen = record(monkeypatch, grpo, "collect")
    run(method="reinforce_pp", mask_truncated=True, mu=3, max_steps=1, tokens_per_batch=4096)
    ((_, (rollout, *_)),) = seen
    mask = rollout.mask * rollout.ended.long()[:, None]
    assert 0 < rollout.ended.sum() < 16 and torch.equal(whitened[0][0][1], mask) and len(weighted) == 3
    assert all(torch.equal(given[0], mask) and given[3] == mask.sum() for given, _ in weighted)


def test_heldout_score_is_the_weighted_sum(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """--rewards a=2 b=-3."""
    judged = record(monkeypatch, grpo, "evaluate")
    run(rewards=["share=2", "constant=-3", "short"], max_steps=1)
    assert judged
    for _, result in judged:
        known = np.nan_to_num(result["reward short"])  # what is not known adds nothing
        assert result["score"] == pytest.approx(2 * result["reward share"] - 3 * result["reward constant"] + known)


def test_score_is_before_penalties(run: Run) -> None:
    """As in ppo.py: a penalty for a missing end is not the reward model's."""
    (row,) = strict_rows(run(method="dapo", missing_eos_penalty=2.0, max_steps=1, max_refills=0))
    assert row["eos_rate"] < 1 and row["score"] == pytest.approx(row["share/mean"], abs=1e-6)


# ----------------------------------------------------------------------------------------------------- pair methods
@pytest.mark.parametrize("method", grpo.PAIR_METHODS)
def test_a_step_of_pairs_is_what_the_papers_say(method: str, first_step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a run away from its reference, from the log-probs of all responses, in float64."""
    seen, tables = record(monkeypatch, grpo, "collect"), record(monkeypatch, grpo, "role_logprobs")
    _, metrics = first_step(method=method, entropy_coef=0.0)
    ((_, (rollout, table, _)),) = seen
    known = {given[1]: x[0].double() for given, x in tables if len(given[3]) == 16}
    h = ((known["policy"] - known["reference"]) * rollout.mask).sum(1).tolist()
    beta, lengths, total, ranked = grpo.PAIR_METHODS[method], rollout.mask.sum(1).tolist(), 0.0, 0
    for first in range(0, 16, 4):
        own, r = range(first, first + 4), table[:, 0].tolist()
        w, l = max(own, key=lambda i: r[i]), min(own, key=lambda i: r[i])  # noqa: E741
        if r[w] > r[l]:
            win = [sum(reference.sigma(r[i] - r[j]) for j in own if j != i) / 3 for i in (w, l)]
            if method == "online_dpo":
                value = reference.cdpo(h[w], h[l], beta, 0.0)
            elif method == "online_ipo":
                value = (h[w] / lengths[w] - h[l] / lengths[l] - 1 / (2 * beta)) ** 2
            else:
                value = reference.sppo(h[w], win[0], beta) + reference.sppo(h[l], win[1], beta)
            total, ranked = total + value, ranked + 1
    assert metrics["policy_loss"] == pytest.approx(total / ranked, rel=1e-4) and 0 < metrics["accuracy"] < 1


def test_only_what_is_compared_is_trained_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """best_worst: rows of the update hold two responses to each prompt whose rewards differ, in a row together."""
    ranked, rows = record(monkeypatch, grpo, "rank_pairs"), record(monkeypatch, grpo, "flat_rows")
    run(method="online_dpo", tokens_per_batch=1, max_steps=1)
    ((_, pairs),) = ranked
    _, _, (_, laid_out), _ = rows  # of the evaluations and the rollout too
    assert 0 < len(pairs) <= 4
    assert sorted(row.numbers for row in laid_out) == sorted(sorted(pair) for pair in pairs.tolist())


def test_prompts_with_equal_rewards_are_left_out(run: Run, tmp_path: Path) -> None:
    """Three of the four prompts of each batch have no pair: the loss is the other's alone, not a quarter of it."""
    (tmp_path / "first.py").write_text(
        "def score(prompts, responses, **columns):\n"
        "    return [len(r) * (p == prompts[0]) for p, r in zip(prompts, responses)]"
    )
    (row,) = strict_rows(run(method="online_dpo", reward_fn=f"{tmp_path / 'first.py'}:score", max_steps=1))
    assert row["equal_rewards"] == 0.75 and row["policy_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_missing_end_costs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal rewards: what ended is ranked above what did not, by the penalty; --mask_truncated leaves no pair."""
    ranked, seen = record(monkeypatch, grpo, "rank_pairs"), record(monkeypatch, grpo, "collect")
    flags = {"method": "online_dpo", "reward_fn": "constant", "missing_eos_penalty": 2.0, "batch_size": 48}
    (row,) = strict_rows(run(max_steps=1, **flags))
    ((_, pairs),), ((_, (rollout, *_)),) = ranked, seen
    assert 0 < row["eos_rate"] < 1 and row["score"] == pytest.approx(0.1) and len(pairs)
    assert all(rollout.ended[better] == 1 and rollout.ended[worse] == 0 for better, worse in pairs.tolist())
    run(max_steps=1, mask_truncated=True, **flags)
    assert not len(ranked[1][1])


def test_a_rewarded_word_becomes_frequent(run: Run, tmp_path: Path) -> None:
    """Online DPO on a reward for a word: its share rises, KL grows from 0, the pairs are told apart."""
    (tmp_path / "word.py").write_text(
        "def score(prompts, responses, **columns):\n"
        "    return [r.count('the') / (1 + len(r.split())) for r in responses]"
    )
    folder = run(
        method="online_dpo", reward_fn=f"{tmp_path / 'word.py'}:score", max_steps=20, batch_size=32, learning_rate=1e-3,
        tokens_per_batch=512, epochs=10.0,
    )  # fmt: skip
    rows = strict_rows(folder)
    share = [row["score"] for row in rows]
    assert np.mean(share[-5:]) > np.mean(share[:5]) + 0.02
    assert abs(rows[0]["kl"]) < 1e-3 and np.mean([row["kl"] for row in rows[-5:]]) > 0.1
    assert rows[0]["accuracy"] == pytest.approx(0.5, abs=0.01) and np.mean([r["accuracy"] for r in rows[-5:]]) > 0.6


def test_pairs_need_rows_that_hold_two(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes one response per row is refused by name."""
    monkeypatch.setattr(grpo, "FLAT_ROW_MODELS", ())
    refused(run, "--method sppo", "llama", "one row", method="sppo")
