"""Whole runs of dpo.py in process: files, determinism, resume, the reference's cache, data, losses, online."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    make_adapter,
    perturb,
    read_jsonl,
    record,
    same_weights,
    shared_or_skip,
    strict_rows,
    write_jsonl,
)
from test_runs import ADAPTER_FILES, RUN_FILES, Killed, assert_same_gradients, check_report, count_lines, die_at, launch
from torch import Tensor

import dpo

Run = Callable[..., Path]
KEYS = {
    "step", "loss", "chosen_reward", "rejected_reward", "margin", "accuracy", "chosen_logprob", "rejected_logprob",
    "chosen_length", "rejected_length", "shared_rows", "ref_kl", "grad_norm", "learning_rate",
}  # fmt: skip
ONLINE = {"online": True, "dataset": "prompts", "eval_dataset": None, "eval_size": 3, "reward_fn": "letters"}


@pytest.fixture(scope="session")
def data(world: Path, reward_file: str) -> dict[str, str]:
    """Small files by name: pairs, held-out pairs, rankings with ties, votes, rewards, prompts; and two functions."""
    rng, rows = random.Random(0), read_jsonl(ROOT / "tiny" / "preferences.jsonl")[:28]
    for row in rows:  # one to three sentences: unequal lengths
        for name in ("chosen", "rejected"):
            row[name] = ".".join(row[name].split(".")[: rng.randint(1, 2)]) + "."
    lists, votes = [], []
    for i, row in enumerate(rows[:12]):
        texts = [row["chosen"], row["rejected"], f"The fox number {i}.", "I hope that this helps you."][: 2 + i % 3]
        ranks = rng.sample(range(1, 5), len(texts))
        ranks[-1] = ranks[0] if len(texts) > 2 and i % 2 else ranks[-1]  # a tie
        lists.append({"prompt": row["prompt"], "responses": texts, "ranks": ranks})
    for i, row in enumerate(rows[:24]):
        votes.append({"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": i % 2})
    tables = {
        "pairs": rows[:24], "heldout": rows[24:], "lists": lists, "votes": votes,
        "rewards": [{**row, "label": round(rng.gauss(row["label"], 1), 2)} for row in votes],
    }  # fmt: skip
    folder = world / "dpo"
    folder.mkdir()
    files = {name: str(write_jsonl(folder / f"{name}.jsonl", table)) for name, table in tables.items()}
    (folder / "constant.py").write_text("def score(prompts, responses, **columns):\n    return [1.0] * len(responses)")
    files |= {"constant": f"{folder / 'constant.py'}:score", "letters": reward_file}
    return {**files, "prompts": str(world / "prompts.jsonl")}


@pytest.fixture
def run(sft_run: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(**flags) -> run folder: dpo.main on the small world, two steps of 8 examples unless told otherwise.

    Data and functions may be given by the names of `data`; curves.png is drawn with plot=True only.
    """
    drawn = dpo.plot_curves

    def start(plot: bool = False, **flags: Any) -> Path:
        monkeypatch.setattr(dpo, "plot_curves", drawn if plot else lambda *_: None)
        settings: dict[str, Any] = {
            "model": str(sft_run), "dataset": "pairs", "eval_dataset": "heldout", "output_dir": str(tmp_path / "dpo"),
            "cache_dir": str(tmp_path / "cache"), "eval_samples": 0, "max_response_length": 40, "batch_size": 8,
            "micro_batch_size": 4, "max_steps": 2, "epochs": 9.0, "warmup_ratio": 0.0, "learning_rate": 0.01,
        }  # fmt: skip
        if flags.get("online"):
            settings |= {"max_response_length": 10, "missing_eos_penalty": 0.0}
        settings |= flags
        for name in ("dataset", "eval_dataset", "reward_fn", "gold_fn"):
            settings |= {name: data[settings[name]]} if settings.get(name) in data else {}
        dpo.main(dpo.Args(**settings))
        return Path(settings["output_dir"])

    return start


# ------------------------------------------------------------------------------------------------------ the folder
def check_samples(folder: Path, n: int, keys: set[str]) -> None:
    """samples.jsonl: one response of the reference and one of the policy to each of n held-out prompts."""
    from transformers import AutoTokenizer

    rows, special = read_jsonl(folder / "samples.jsonl"), AutoTokenizer.from_pretrained(folder).all_special_tokens
    assert [row["model"] for row in rows] == ["sft"] * n + ["dpo"] * n
    assert all(row.keys() == {"id", "prompt", "response", "model", "finish_reason", "tokens"} | keys for row in rows)
    assert [row["prompt"] for row in rows[:n]] == [row["prompt"] for row in rows[n:]]
    assert len({row["prompt"] for row in rows}) == n and {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert not any(token in row["response"] for row in rows for token in special)


def test_an_offline_run_writes_what_it_says(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file of the run folder, the metrics' keys, held-out responses of both models, two tables, the gates."""
    folder = run(plot=True, eval_every=1, save_every=1, gold_fn="letters", eval_samples=2)
    assert {p.name for p in folder.iterdir()} >= ADAPTER_FILES | RUN_FILES
    assert not list(folder.rglob("*.tmp")) and (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    rows = strict_rows(folder)
    assert [row["step"] for row in rows] == [0, 1]
    heldout = {f"heldout_{name}" for name in ("loss", "accuracy", "margin", "gold", "kl")}
    assert all(row.keys() == KEYS | heldout and all(map(math.isfinite, row.values())) for row in rows)
    for row in rows:
        assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-6)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[0]["ref_kl"] < 1e-6
    assert abs(rows[1]["loss"] - math.log(2)) > 1e-4 and rows[1]["ref_kl"] > 1e-4
    check_samples(folder, 2, {"gold"})
    check_report(folder, "dpo", {"logratio_step0", "accuracy_low", "gold_low"})
    printed = capsys.readouterr().out
    labels = ("held-out preferences: 4", "accuracy", "margin", "held-out prompts: 2", "gold win-rate over SFT", "KL to")
    assert all(label in printed for label in labels)
    assert {"seconds", "examples_per_second"} <= read_jsonl(folder / "timing.jsonl")[0].keys()


def test_an_online_run_writes_what_it_says(run: Run) -> None:
    """The same with samples: the preflight's gates, score_low; the metrics of the samples."""
    folder = run(**ONLINE, eval_samples=3, eval_every=1)
    rows = strict_rows(folder)
    sampled = {"score", "kl", "response_length", "eos_rate", "heldout_kl"}
    assert all(row.keys() == (KEYS - {"ref_kl"}) | sampled | {"ranked"} for row in rows)
    assert all(all(map(math.isfinite, row.values())) and 0 < row["ranked"] <= 1 for row in rows)
    check_samples(folder, 3, {"score"})
    check_report(folder, "dpo", {"kl_step0", "ratio_step0", "sampler_agreement", "eos_rate", "score_low"})


@pytest.mark.parametrize("flags", [{}, ONLINE], ids=["offline", "online"])
def test_a_gold_function_judges_and_does_not_train(flags: dict, run: Run, tmp_path: Path) -> None:
    """--gold_fn adds figures and a gate; the weights are those of a run without."""
    judged = run(**flags, gold_fn="constant", eval_samples=2)
    plain = run(**flags, output_dir=str(tmp_path / "plain"), eval_samples=2)
    assert same_weights(judged, plain)
    assert strict_rows(judged)[-1]["heldout_gold"] == 1 and "heldout_gold" not in strict_rows(plain)[-1]
    if flags:
        assert [row["gold"] for row in strict_rows(judged)] == [1, 1]
    gates = [{g["name"] for g in json.loads((f / "report.json").read_text())["gates"]} for f in (judged, plain)]
    assert "gold_low" in gates[0] and "gold_low" not in gates[1] and ("score_low" in gates[1]) == bool(flags)


def plain_logprobs(folder: Path, base: Path, rows: list[tuple[str, str]]) -> list[float]:
    """log pi(response | prompt) by transformers and PEFT alone, one conversation at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt, response in rows:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        before = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False)).rstrip("\n")
        n, ids = len(tokenizer(before)["input_ids"]), tokenizer(whole)["input_ids"]
        with torch.no_grad():
            table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(table[t - 1, ids[t]].item() for t in range(n, len(ids))))
    return found


def test_the_result_is_what_plain_peft_says(run: Run, sft_run: Path, base: Path, data: dict[str, str]) -> None:
    """transformers + PEFT on the run folder and on the SFT folder give the held-out loss, accuracy and margin."""
    folder = run(beta=0.3)
    rows = read_jsonl(Path(data["heldout"]))
    ratios = []
    for name in ("chosen", "rejected"):
        texts = [(row["prompt"], row[name]) for row in rows]
        ours, reference = (plain_logprobs(path, base, texts) for path in (folder, sft_run))
        ratios.append(np.array(ours) - np.array(reference))
    d = 0.3 * (ratios[0] - ratios[1])
    last = strict_rows(folder)[-1]
    assert np.abs(d).max() > 0.01
    assert last["heldout_margin"] == pytest.approx(d.mean(), abs=1e-4)
    assert last["heldout_accuracy"] == pytest.approx((d > 0).mean())
    assert last["heldout_loss"] == pytest.approx(np.log1p(np.exp(-d)).mean(), abs=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"loss": "simpo"},
        ONLINE,
    ],
    ids=["sigmoid", "simpo", "online"],
)
def test_without_held_out_data_a_run_ends_well(flags: dict, run: Run) -> None:
    """--eval_size 0: nothing is measured, nothing is sampled, the adapter is written."""
    folder = run(**{**flags, "eval_dataset": None, "eval_size": 0.0, "eval_samples": 2})
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "samples.jsonl").exists()
    assert all(row.keys() >= KEYS - {"ref_kl"} and not any("heldout" in k for k in row) for row in strict_rows(folder))


# ----------------------------------------------------------------------------------------------------- determinism
@pytest.mark.parametrize(
    "flags",
    [{}, pytest.param({"loss": "kto", "dataset": "votes"}, marks=pytest.mark.slow), ONLINE],
    ids=["sigmoid", "kto", "online"],
)
def test_a_run_is_a_function_of_its_seed(flags: dict, run: Run, tmp_path: Path) -> None:
    """Twice the same arguments: the same bytes of metrics, samples and weights; another seed: others."""
    first, second, other = (
        run(output_dir=str(tmp_path / n), seed=s, eval_samples=2, **flags) for n, s in (("a", 3), ("b", 3), ("c", 4))
    )
    for name in ("metrics.jsonl", "samples.jsonl", "report.json", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert not same_weights(first, other)
    assert (first / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes()


# -------------------------------------------------------------------------------------- what must not change a thing
@pytest.fixture
def first_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[list[Tensor]], dict]]:
    """first_step(**flags) -> (gradients before each update of step 0, its metrics), from a policy that has parted.

    Where it still is the reference, all implicit rewards are 0 and rounding decides who is ahead.
    """

    def start(parted: bool = True, **flags: Any) -> tuple[list[list[Tensor]], dict]:
        found: list[list[Tensor]] = []
        update, load_policy = dpo.update, dpo.load_policy

        def recorded(optimizer: Any, *rest: Any) -> float:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            found.append([p.grad.clone() for p in parameters if p.grad is not None])
            return update(optimizer, *rest)

        def moved(*args: Any) -> Any:
            loaded = load_policy(*args)
            perturb(loaded[0], "policy", seed=11, size=0.1)
            return loaded

        with monkeypatch.context() as patch:
            patch.setattr(dpo, "update", recorded)
            if parted:
                patch.setattr(dpo, "load_policy", moved)
                patch.setattr(dpo, "check_start", lambda *_: [])
                patch.setattr(dpo, "preflight", lambda *_: [])
            folder = run(max_steps=1, **flags)
        row = strict_rows(folder)[0]
        return found, {key: value for key, value in row.items() if not key.startswith("heldout")}

    return start


def assert_same_step(ours: tuple[list[list[Tensor]], dict], theirs: tuple[list[list[Tensor]], dict]) -> None:
    """Gradients of every optimiser to 1e-5 of the largest entry, metrics to 1e-4."""
    assert len(ours[0]) == len(theirs[0])
    assert_same_gradients(ours[0], theirs[0], len(theirs[0]))
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4, abs=2e-5)


BATCHES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "kto": {"loss": "kto", "dataset": "votes"},
    "dro": {"loss": "dro", "dataset": "rewards"},
    "tdpo2": {"loss": "tdpo2"},
    "lists": {"loss": "sigmoid", "dataset": "lists"},
    "lipo": {"loss": "lipo", "dataset": "lists"},
    "online": {**ONLINE, "batch_size": 24},
    "online all": {**ONLINE, "batch_size": 24, "pairs": "all", "loss": "sppo"},
}


@pytest.mark.parametrize("name", BATCHES)
def test_micro_batches_do_not_change_the_gradient(name: str, first_step: Any) -> None:
    """Trap 23: prompts of unequal lengths and numbers of responses, 1 x 8 against 8 x 1 and 3 + 3 + 2."""
    whole = first_step(micro_batch_size=8, **BATCHES[name])
    whole[1].pop("shared_rows")  # it tells the layout, which may differ
    assert whole[1]["margin"] != 0 and len(whole[0]) == (2 if name == "dro" else 1)
    cuts: list[dict] = [{"micro_batch_size": 3}]
    if name in ("sigmoid", "kto", "dro", "online"):
        cuts += [{"micro_batch_size": 1}, {"micro_batch_size": 8, "tokens_per_micro_batch": 50}]
    for cut in cuts:
        parts = first_step(**cut, **BATCHES[name])
        parts[1].pop("shared_rows")
        assert_same_step(parts, whole)


@pytest.mark.parametrize("name", ["tdpo2", "lipo", "online all"])
def test_layout_does_not_change_the_step(name: str, first_step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several groups, of one, and padded ones give the same step."""
    found = []
    for width in (10**6, 1, 0):
        monkeypatch.setattr(dpo, "row_width", lambda groups, config, width=width: width)
        found.append(first_step(**BATCHES[name]))
    assert [metrics.pop("shared_rows") for _, metrics in found] == [1, 1, 0]
    assert_same_step(found[0], found[2])
    assert_same_step(found[1], found[2])


def test_layout_does_not_change_the_first_step_of_lipo(first_step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the policy still is the reference, too: places are by index, not by the last bit of the log-probs."""
    found = []
    for shared in (True, False):
        monkeypatch.setattr(dpo, "row_width", lambda groups, config, shared=shared: shared)
        found.append(first_step(parted=False, **BATCHES["lipo"])[0])
    assert_same_gradients(found[0], found[1], 1)


@pytest.mark.parametrize("name", ["sigmoid", pytest.param("tdpo2", marks=pytest.mark.slow)])
def test_gradient_checkpointing_does_not_change_the_step(name: str, first_step: Any) -> None:
    """Activations that are computed again are the same."""
    off, on = (first_step(gradient_checkpointing=checkpointing, **BATCHES[name]) for checkpointing in (False, True))
    assert_same_step(on, off)


def test_sample_batch_size_does_not_change_the_run(first_step: Any) -> None:
    """Memory, not the result: the same samples, so the same step."""
    whole = first_step(**BATCHES["online"])
    assert_same_step(first_step(sample_batch_size=5, **BATCHES["online"]), whole)


def test_update_clips_steps_and_clears() -> None:
    """A gradient (3, 4) has norm 5: limit 1 leaves (0.6, 0.8), limit 10 leaves it; the gradient is gone after."""
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], lr=99.0)
    for limit, expected in ((1.0, [-0.06, -0.08]), (10.0, [-0.36, -0.48])):
        p.grad = torch.tensor([3.0, 4.0])
        assert dpo.update(optimizer, 0.1, limit, dpo.Accelerator(cpu=True)) == pytest.approx(5.0)
        assert p.tolist() == pytest.approx(expected, abs=1e-6) and p.grad is None


# --------------------------------------------------------------------------------------------------- interruptions
RESUMED: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "bco": {"loss": "bco"},
    "kto": {"loss": "kto", "dataset": "votes"},
    "dro": {"loss": "dro", "dataset": "rewards"},
    "sync": {"sync_ref_every": 2, "eval_samples": 2},
    "online": {**ONLINE, "eval_samples": 3},
    "online sync": {**ONLINE, "sync_ref_every": 2, "model": "base"},
}
DEATHS = [
    ("update", 2, False),  # the second step's gradient is there, the policy has not moved
    ("log_step", 4, False),  # the fourth step has been computed, nothing of it is written
    ("save_checkpoint", 3, False),  # metrics.jsonl is one step ahead of the checkpoint
    ("write_file", 5, True),  # two caches, args.json and one checkpoint are written; half of the second
    ("save_adapter", 1, False),  # all steps are done, the result is not written
]


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Path]:
    """Folders of runs that were left in peace, by name, made by the first test that asks."""
    return {}


def assert_resumed_equals(done: Path, resumed: Path) -> None:
    """Metrics and report byte for byte, adapter and samples too; as many lines of timing as steps."""
    for name in ("metrics.jsonl", "adapter_model.safetensors", "samples.jsonl", "report.json"):
        if name != "samples.jsonl" or (done / name).is_file():
            assert (resumed / name).read_bytes() == (done / name).read_bytes(), name
    assert len(read_jsonl(resumed / "timing.jsonl")) == len(strict_rows(done))


MARKS = {"save_checkpoint": pytest.mark.slow, "write_file": pytest.mark.slow}


@pytest.mark.parametrize(
    ("name", "death"),
    [
        *[pytest.param("sigmoid", d, marks=MARKS.get(d[0], [])) for d in DEATHS],
        *[(name, DEATHS[1]) for name in ("bco", "dro", "sync", "online")],
        *[pytest.param(name, DEATHS[1], marks=pytest.mark.slow) for name in ("kto", "online sync")],
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_a_run_resumes_bit_for_bit(
    name: str, death: tuple[str, int, bool], run: Run, base: Path, uninterrupted: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """Killed anywhere, --resume ends as the uninterrupted run: policy, critic, reference, optimisers, baseline."""
    flags = {"max_steps": 4, "save_every": 1, "weight_decay": 0.1, **RESUMED[name]}
    flags |= {"model": str(base)} if "model" in flags else {}
    if name not in uninterrupted:
        folder = tmp_path_factory.mktemp("dpo")
        uninterrupted[name] = run(output_dir=str(folder / "done"), cache_dir=str(folder / "cache"), **flags)
    with monkeypatch.context() as patch:
        die_at(patch, dpo, *death)
        with pytest.raises(Killed):
            run(**flags)
    assert_resumed_equals(uninterrupted[name], run(resume=True, **flags))


def test_a_checkpoint_holds_what_must_survive(run: Run) -> None:
    """Loads with weights_only; the moving baseline, the reference that was moved, both optimisers, the gates."""

    def saved(**flags: Any) -> dict:
        folder = run(save_every=1, max_steps=3, **flags)
        names = sorted(p.name for p in (folder / "checkpoint").iterdir())
        assert names == ["step_000002.pt", "step_000003.pt"]
        return torch.load(folder / "checkpoint" / names[1], weights_only=True)

    plain, sync = saved(loss="bco"), saved(sync_ref_every=3)
    assert plain["step"] == 3 and plain["baseline"] != 0 and plain["gates"][0][0] == "logratio_step0"
    n = len(plain["parameters"])
    assert len(sync["parameters"]) == 2 * n
    assert all(torch.equal(a, b) for a, b in zip(sync["parameters"][:n], sync["parameters"][n:], strict=True))
    dro = saved(loss="dro", dataset="rewards")
    assert len(dro["parameters"]) == 2 * n + 2 and len(dro["optimizers"]) == 2


SCRIPT_FLAGS: dict[str, Any] = {
    "max_steps": 40, "epochs": 100, "save_every": 3, "batch_size": 8, "micro_batch_size": 4, "eval_samples": 2,
    "max_response_length": 40, "learning_rate": 0.01,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bco", "online"])
@pytest.mark.parametrize("seed", range(2))
def test_sigkill_and_resume(
    name: str, seed: int, sft_run: Path, data: dict[str, str], uninterrupted: dict[str, Path], tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """A real SIGKILL at a random moment of training, twice, then --resume: as if nothing had happened."""
    rng, environment = random.Random(seed), {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    flags = {**SCRIPT_FLAGS, "model": sft_run, "cache_dir": tmp_path / "cache"}
    if name == "online":
        flags |= {"online": True, "dataset": data["prompts"], "eval_size": 3, "reward_fn": data["letters"]}
        flags |= {"max_response_length": 10, "missing_eos_penalty": 0, "max_steps": 12}
    else:
        flags |= {"loss": name, "dataset": data["pairs"], "eval_dataset": data["heldout"]}

    def line(folder: Path, *more: str) -> list[str]:
        pairs = {**flags, "output_dir": folder}.items()
        return [sys.executable, str(ROOT / "dpo.py"), *(str(x) for k, v in pairs for x in (f"--{k}", v)), *more]

    key = f"{name} by command"
    if key not in uninterrupted:
        uninterrupted[key] = tmp_path_factory.mktemp(name) / "done"
        subprocess.run(line(uninterrupted[key]), env=environment, check=True, capture_output=True)
    folder = tmp_path / "run"
    more: list[str] = []
    for until in sorted(rng.sample(range(1, flags["max_steps"]), 2)):
        process = subprocess.Popen(line(folder, *more), env=environment, stdout=subprocess.DEVNULL)
        while count_lines(folder / "metrics.jsonl") < until and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        assert process.poll() is None  # it is in the middle of training
        process.send_signal(signal.SIGKILL)
        process.wait()
        more = ["--resume", "true"]
    subprocess.run(line(folder, *more), env=environment, check=True, capture_output=True)
    assert_resumed_equals(uninterrupted[key], folder)


# ---------------------------------------------------------------------------------------------- the reference's cache
def cache_files(tmp_path: Path) -> set[str]:
    """Names of the files in the cache."""
    return {p.name for p in (tmp_path / "cache").iterdir()} if (tmp_path / "cache").is_dir() else set()


def never(*_: Any, **__: Any) -> None:
    """Stands for a function that must not be called."""
    raise AssertionError("called")


def test_a_second_run_computes_no_reference(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are found by content, wherever the data lies and whatever the loss, and give the same bytes."""
    first = run()
    names = cache_files(tmp_path)
    assert len(names) == 2  # the training set's and the held-out set's
    monkeypatch.setattr(dpo, "group_logprobs", never)
    second = run(output_dir=str(tmp_path / "second"))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes() and same_weights(
        first, second
    )
    run(output_dir=str(tmp_path / "third"), loss="ipo", beta=0.3, seed=5, batch_size=4, lora_r=4)
    assert cache_files(tmp_path) == names


def test_the_cache_holds_the_log_probs_of_the_model_given(
    run: Run, sft_run: Path, base: Path, data: dict[str, str], tmp_path: Path
) -> None:
    """All training log-probs, response after response: their sums are plain PEFT's."""
    from safetensors.torch import load_file

    run(learning_rate=0.1)
    rows = read_jsonl(Path(data["pairs"]))
    texts = [(row["prompt"], row[name]) for row in rows for name in ("chosen", "rejected")]
    expected = sum(plain_logprobs(sft_run, base, texts))
    sums = [load_file(tmp_path / "cache" / name)["logprobs"].sum().item() for name in cache_files(tmp_path)]
    assert min(abs(x - expected) for x in sums) < 1e-3 * abs(expected)


def test_what_decides_the_log_probs_names_the_file(run: Run, base: Path, data: dict[str, str], tmp_path: Path) -> None:
    """Another adapter, none, another response, order, precision or temperature: another file."""
    rows = read_jsonl(Path(data["pairs"]))
    other = [{**row, "rejected": row["rejected"] + (" No." if i == 5 else "")} for i, row in enumerate(rows)]
    model, tokenizer = make_adapter(base, "policy", seed=7, size=0.1)
    (tmp_path / "adapter").mkdir()
    dpo.save_adapter(tmp_path / "adapter", model, "policy", str(base), tokenizer)
    variants: list[tuple[int, dict[str, Any]]] = [  # new files, flags
        (2, {}), (2, {"model": str(tmp_path / "adapter")}), (2, {"model": str(base)}), (2, {"dtype": "bfloat16"}),
        (2, {"temperature": 0.5}), (1, {"dataset": str(write_jsonl(tmp_path / "other.jsonl", other))}),
        (1, {"dataset": str(write_jsonl(tmp_path / "turned.jsonl", rows[::-1]))}), (2, {"chat_template": "plain"}),
    ]  # fmt: skip
    for new, flags in variants:
        known = cache_files(tmp_path)
        run(**flags, max_steps=1)
        assert cache_files(tmp_path) > known or not known
        assert len(cache_files(tmp_path) - known) == new, flags


def test_the_scale_of_the_adapter_names_the_file(run: Run, sft_run: Path, tmp_path: Path) -> None:
    """The same tensors under another lora_alpha are another model."""
    shutil.copytree(sft_run, tmp_path / "scaled")
    config = json.loads((sft_run / "adapter_config.json").read_text())
    (tmp_path / "scaled" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    run(max_steps=1)
    run(max_steps=1, model=str(tmp_path / "scaled"))
    assert len(cache_files(tmp_path)) == 4


def test_the_revision_names_the_file(run: Run, tmp_path: Path) -> None:
    """Two revisions of one hub model are two references; a local folder has none, so only the name can tell."""
    run(max_steps=1)
    run(max_steps=1, revision="other")
    assert len(cache_files(tmp_path)) == 4


def test_tdpo_refuses_lora_on_the_head(run: Run, base: Path) -> None:
    """Its KL takes both roles' logits from one lm_head, which an adapter would make the policy's."""
    with pytest.raises(dpo.UserError, match="tdpo1.*lm_head"):
        run(model=str(base), loss="tdpo1", lora_target_modules=["q_proj", "lm_head"])


def test_offline_a_reward_function_judges(run: Run) -> None:
    """It scores the held-out responses of both models and adds a gate; the training does not see it."""
    folder = run(reward_fn="letters", eval_samples=2)
    check_samples(folder, 2, {"score"})
    assert "score_low" in {gate["name"] for gate in json.loads((folder / "report.json").read_text())["gates"]}
    assert all("score" not in row for row in strict_rows(folder)[:-1])


def test_a_cache_made_with_other_batches_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    """metrics.jsonl is a function of arguments and seed, not of who filled the cache."""
    run(micro_batch_size=1)
    found = run(micro_batch_size=8, output_dir=str(tmp_path / "found"))
    shutil.rmtree(tmp_path / "cache")
    fresh = run(micro_batch_size=8, output_dir=str(tmp_path / "fresh"))
    assert (found / "metrics.jsonl").read_bytes() == (fresh / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_another_quantisation_has_another_file(run: Run, tmp_path: Path) -> None:
    """4 bits and bfloat16 against bfloat16 alone."""
    run(dtype="bfloat16", max_steps=1)
    run(quant="nf4", max_steps=1)
    assert len(cache_files(tmp_path)) == 4


@pytest.mark.parametrize("damage", ["empty", "half", "garbage"])
def test_a_damaged_cache_is_computed_anew(damage: str, run: Run, tmp_path: Path) -> None:
    """As if the file were not there; the new one has the old bytes."""
    first = run()
    kept = {p: p.read_bytes() for p in (tmp_path / "cache").iterdir()}
    for path, content in kept.items():
        rubbish = random.Random(0).randbytes(len(content))
        path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "garbage": rubbish}[damage])
    second = run(output_dir=str(tmp_path / "second"))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    assert {p: p.read_bytes() for p in (tmp_path / "cache").iterdir()} == kept


def test_a_moving_reference_is_not_cached(run: Run, tmp_path: Path) -> None:
    """--sync_ref_every: only the held-out set is compared with the reference of the start."""
    run(sync_ref_every=1)
    assert len(cache_files(tmp_path)) == 1


@pytest.mark.parametrize("loss", [name for name, kind in dpo.LOSSES.items() if not kind.reference])
def test_a_loss_without_reference_computes_none(
    loss: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """orpo, simpo, cpo: no cache, no pass in the role of the reference."""
    roles = record(monkeypatch, dpo, "role")
    folder = run(loss=loss)
    assert {who for (_, who, *_), _ in roles} == {"policy"} and not cache_files(tmp_path)
    assert all("ref_kl" not in row and math.isfinite(row["loss"]) for row in strict_rows(folder))
    assert {g["name"] for g in json.loads((folder / "report.json").read_text())["gates"]} == {"accuracy_gain"}


def test_tdpo_asks_the_reference_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pass over the reference for the KL gives the log-probs, too: no cache, a pass each per micro-batch."""
    roles = record(monkeypatch, dpo, "role")
    folder = run(loss="tdpo1")
    names = [who for (_, who, *_), _ in roles]
    assert names == ["reference", "policy"] * (len(names) // 2) and len(names) > 4 and not cache_files(tmp_path)
    assert strict_rows(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_every_process_finds_the_same_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name has the kind of the device, not the number of the card that a process was given."""
    monkeypatch.setattr(dpo, "group_logprobs", lambda *_: [[torch.zeros(2)]])
    computed = record(monkeypatch, dpo, "group_logprobs")
    args, alone = dpo.Args(cache_dir=str(tmp_path / "cache")), SimpleNamespace(main_process_first=nullcontext)
    for number in (0, 1):
        model = SimpleNamespace(device=torch.device("cuda", number))
        dpo.cached_logprobs(model, [{"group": ([1], [[2, 3]])}], str(ROOT / "tiny" / "base"), None, 0, args, alone)
    assert len(computed) == len(cache_files(tmp_path)) == 1


# ------------------------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize(
    "loss", ["lipo", "plackett_luce", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sigmoid", "sppo"))]
)
def test_rankings_with_ties_train(loss: str, run: Run) -> None:
    """prompt + responses + ranks: two to four responses, some tied."""
    folder = run(loss=loss, dataset="lists", eval_dataset="lists", max_steps=6, micro_batch_size=3)
    rows = strict_rows(folder)
    assert all(row.keys() >= KEYS and all(map(math.isfinite, row.values())) for row in rows)
    assert rows[-1]["margin"] > 0.01 and rows[-1]["accuracy"] > 0.6  # the same twelve rows again and again


@pytest.mark.parametrize(
    ("loss", "table"), [("kto", "votes"), ("dro", "rewards"), pytest.param("dro", "votes", marks=pytest.mark.slow)]
)
def test_labelled_responses_train(loss: str, table: str, run: Run) -> None:
    """prompt + completion + label: liked or not; for dro also any number. No accuracy, no gate of one."""
    folder = run(loss=loss, dataset=table, eval_dataset=table, max_steps=6)
    rows = strict_rows(folder)
    keys = KEYS - {"accuracy"}
    assert all(row.keys() >= keys and "accuracy" not in row and all(map(math.isfinite, row.values())) for row in rows)
    assert rows[-1]["margin"] > 0.01 and rows[-1]["heldout_margin"] > 0.01
    assert {g["name"] for g in json.loads((folder / "report.json").read_text())["gates"]} == {"logratio_step0"}


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        ("kto", [1]),
        ("kto", [0]),
        ("dro", [0.75, 2.5]),
        ("dro", [-1.5, 0.25]),
    ],
)
def test_labels_of_one_kind_train(loss: str, labels: list, run: Run, data: dict[str, str], tmp_path: Path) -> None:
    """All liked, none liked, rewards all high or all low: what needs both is left out, the rest goes on."""
    rows = [{**row, "label": labels[i % len(labels)]} for i, row in enumerate(read_jsonl(Path(data["votes"])))]
    file = str(write_jsonl(tmp_path / "labels.jsonl", rows))
    table = strict_rows(run(loss=loss, dataset=file, eval_dataset=None, eval_size=4))
    assert all("margin" not in row and math.isfinite(row["loss"]) for row in table)
    assert table[1]["grad_norm"] > 0


def test_bad_rows_are_counted_by_reason(run: Run, data: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    """Each kind among good pairs: the run goes on; each reason is said with its count and its first row."""
    good: list[Any] = read_jsonl(Path(data["pairs"]))[:12]
    a, b = ("\n\nHuman: where?\n\nAssistant: here", "\n\nHuman: when?\n\nAssistant: now")
    bad: list[Any] = [
        '{"prompt": "hal',  # 13
        {"prompt": "a", "chosen": "b", "rejected": " "},  # 14
        {"prompt": "", "chosen": "b", "rejected": "c"},  # 15
        {"prompt": "a", "chosen": "b", "rejected": "b"},  # 16
        {"chosen": a, "rejected": b},  # 17
        {"prompt": "a", "chosen": "word " * 90, "rejected": "b"},  # 18
        {"prompt": "word " * 900, "chosen": "c", "rejected": "b"},  # 19
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]},  # 20
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1]},  # 21
        {"prompt": "a", "chosen": "b"},  # 22
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1, None]},  # 23
        {"prompt": "a", "chosen": 3, "rejected": "b"},  # 24
        {"chosen": "b", "rejected": "c"},  # 25
    ]
    run(dataset=str(write_jsonl(tmp_path / "mixed.jsonl", [*good, *bad])), max_steps=1)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("data: "))
    assert "12 examples from 25 rows" in line and f"{tmp_path}/mixed.jsonl" in line
    for reason in (
        "1 not a JSON object (first: row 13",
        "2 empty prompt or response (first: row 14)",
        "1 identical pair (first: row 16)",
        "1 pair with differing prompts (first: row 17)",
        "2 prompt over 512 or response over 40 tokens (first: row 18)",
        "1 no response is ranked above another (first: row 20)",
        "1 responses and ranks are no lists of one length (first: row 21)",
        "1 a column is missing or null (first: row 22)",
        "1 a rank or the margin is no number (first: row 23)",
        "1 neither a string nor a message list (first: row 24: 3)",
        "1 no dialogue that ends with an assistant turn (first: row 25)",
    ):
        assert reason in line


def test_a_ranking_may_have_a_column_called_chosen(run: Run, data: dict[str, str], tmp_path: Path) -> None:
    """prompt + responses + ranks is a column set of its own, whatever other columns there are."""
    rows = [{**row, "chosen": row["responses"][0]} for row in read_jsonl(Path(data["lists"]))]
    assert len(strict_rows(run(dataset=str(write_jsonl(tmp_path / "lists.jsonl", rows))))) == 2


@pytest.mark.parametrize("loss", ["kto", "dro"])
def test_bad_labels_are_counted_by_reason(
    loss: str, run: Run, data: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    """A label is true, false or a number; kto takes 0 and 1 only."""
    good: list[Any] = read_jsonl(Path(data["votes"]))[:12]
    labels: list[Any] = ["yes", None, [1], 0.5, True, False, 1.0]
    rows = [{**row, "label": label} for row, label in zip(good, labels, strict=False)]
    empty = {"prompt": "a", "completion": " ", "label": 1}
    file = write_jsonl(
        tmp_path / "votes.jsonl", [*good, *rows, empty, '{"prompt": "a", "completion": "b", "label": NaN}']
    )
    run(loss=loss, dataset=str(file), max_steps=1)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("data: "))
    assert f"{15 if loss == 'kto' else 16} examples from 21 rows" in line
    assert "3 the label is neither true, false nor a number (first: row 13: 'yes')" in line
    assert (
        "1 a column is missing or null (first: row 14)" in line and "1 empty prompt or response (first: row 20)" in line
    )
    assert ("1 the label is neither 0 nor 1 (first: row 16: 0.5)" in line) == (loss == "kto")


def refused(run: Run, *patterns: str, **flags: Any) -> None:
    """run(**flags) ends in a UserError of one line that holds every pattern, before there is a run folder."""
    with pytest.raises(dpo.UserError) as caught:
        run(**flags)
    text = str(caught.value)
    assert "\n" not in text and all(pattern in text for pattern in patterns), text


DATA_ERRORS: list[tuple[dict[str, Any], list[str]]] = [
    ({"dataset": "votes"}, ["--loss sigmoid", "24 rows of", "votes.jsonl", "use --loss kto or dro"]),
    ({"dataset": "votes", "loss": "lipo"}, ["--loss lipo", "24 rows of", "use --loss kto or dro"]),
    ({"dataset": "lists", "loss": "kto"}, ["--loss kto", "up to 4 responses", "plackett_luce, lipo, sppo"]),
    ({"dataset": "lists", "loss": "dro"}, ["--loss dro", "up to 4 responses"]),
    ({"eval_dataset": "votes"}, ["--loss sigmoid", "use --loss kto or dro"]),
    ({"dataset": "prompts"}, ["no usable row of 24", "expected: prompt + chosen + rejected | chosen + rejected"]),
    ({"dataset": "prompts"}, ["prompt + responses + ranks", "prompt + completion + label", "answer, attribute, id"]),
    ({"dataset": "absent.jsonl"}, ["absent.jsonl", "no such"]),
    ({"dataset": "pairs", "eval_dataset": None, "eval_size": 24}, ["--eval_size 24", "leaves none to train on"]),
]


@pytest.mark.parametrize(("flags", "patterns"), DATA_ERRORS, ids=lambda x: "" if isinstance(x, list) else str(x))
def test_data_that_a_loss_cannot_use_is_one_line(flags: dict, patterns: list[str], run: Run, tmp_path: Path) -> None:
    """The loss or the file, what is wrong with it, and what to use."""
    refused(run, *patterns, **flags)
    assert not (tmp_path / "dpo").exists()


def test_online_needs_prompts(run: Run, data: dict[str, str], tmp_path: Path) -> None:
    """A file of dialogues without a prompt column."""
    rows = [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}]
    file = write_jsonl(tmp_path / "dialogues.jsonl", rows)
    refused(run, "columns found: chosen, rejected; expected: prompt", **{**ONLINE, "dataset": str(file)})


FLAG_ERRORS: list[tuple[dict[str, Any], list[str]]] = [
    ({"loss": "ipo", "label_smoothing": 0.1}, ["--label_smoothing", "--loss ipo", "sigmoid"]),
    ({"label_smoothing": 0.5}, ["--label_smoothing 0.5", "below 0.5"]),
    ({"label_smoothing": -0.1}, ["--label_smoothing -0.1"]),
    ({"loss": "kto", "f_divergence": "js"}, ["--f_divergence", "--loss kto", "hinge"]),
    ({"loss": "simpo", "sync_ref_every": 2}, ["--sync_ref_every", "--loss simpo"]),
    ({"f_divergence": "alpha", "f_alpha": 3.0}, ["--f_alpha 3.0", "0", "1"]),
    ({"loss": "kto", "batch_size": 1}, ["--batch_size 1", "kto", "another prompt"]),
    ({"lora_r": 0}, ["--lora_r 0"]),
    ({"beta": 0.0}, ["--beta 0.0", "above 0"]),
    ({"batch_size": 0}, ["--batch_size 0"]),
    ({"micro_batch_size": 0}, ["--micro_batch_size 0"]),
    ({"temperature": 0.0}, ["--temperature 0.0"]),
    ({"epochs": 0.0}, ["--epochs 0.0"]),
    ({**ONLINE, "reward_model": "somewhere"}, ["--reward_fn", "--reward_model", "choose one"]),
    ({**ONLINE, "batch_size": 6}, ["--batch_size 6", "--samples_per_prompt 4"]),
    ({**ONLINE, "samples_per_prompt": 1}, ["--samples_per_prompt 1", ">= 2"]),
    ({**ONLINE, "loss": "kto", "pairs": "all"}, ["--loss kto", "--pairs best_worst"]),
]


@pytest.mark.parametrize(("flags", "patterns"), FLAG_ERRORS, ids=lambda x: "" if isinstance(x, list) else str(x)[:60])
def test_contradicting_flags_are_one_line(flags: dict, patterns: list[str], run: Run, tmp_path: Path) -> None:
    """The flag is named, and what it contradicts."""
    refused(run, *patterns, **flags)
    assert not (tmp_path / "dpo").exists()


def test_another_answer_sheet_cannot_resume(run: Run) -> None:
    """--resume with another loss or beta: one line that names both values."""
    run(max_steps=1, save_every=1)
    refused(run, "--loss ipo (was sigmoid)", loss="ipo", max_steps=1, save_every=1, resume=True)
    refused(run, "--beta 0.2 (was 0.1)", beta=0.2, max_steps=1, save_every=1, resume=True)


def test_real_pairs_train(run: Run, tmp_path: Path) -> None:
    """hh-rlhf's dialogues with a public story model: a few steps, everything finite, subsets of both kinds."""
    model = shared_or_skip("models", "stories260k")
    rows: list[Any] = []
    for name in ("helpful_base", "harmless_base"):
        rows += read_jsonl(shared_or_skip("data", "hh_rlhf", f"{name}_test_dev.jsonl"))
    rows = sorted(rows, key=lambda row: len(row["chosen"] + row["rejected"]))[:24]
    flags = {"dataset": str(write_jsonl(tmp_path / "hh.jsonl", rows)), "eval_dataset": None, "eval_size": 4}
    flags |= {"chat_template": "plain", "max_response_length": 200, "eval_samples": 0, "lora_r": 4, "max_steps": 3}
    table = strict_rows(run(model=str(model), **flags))
    assert len(table) == 3 and all(math.isfinite(value) for row in table for value in row.values())
    assert table[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and table[2]["loss"] != table[0]["loss"]


def test_awkward_real_pairs_are_counted_by_reason(run: Run) -> None:
    """Identical, empty and differing ones, as many of each as the file says."""
    model = shared_or_skip("models", "stories260k")
    file = shared_or_skip("data", "hh_rlhf", "awkward_pairs_dev.jsonl")
    kinds = [row["kind"] for row in read_jsonl(file)]
    flags = {"chat_template": "plain", "max_prompt_length": 10**6, "max_response_length": 10**6, "lora_r": 4}
    counts = {kind: sum(kind in k for k in kinds) for kind in ("identical", "empty", "prompt")}
    reasons = [f"{counts['identical']} identical pair", f"{counts['empty']} empty prompt or response"]
    reasons.append(f"{counts['prompt']} pair with differing prompts")
    refused(run, f"no usable row of {len(kinds)}", *reasons, model=str(model), dataset=str(file), **flags)


# ----------------------------------------------------------------------------------------------------------- losses
SOONER = ("sigmoid", "simpo", "kto")  # in the default tier


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twenty rows each of the embedded preferences and rankings, and a cache."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("preferences", "rankings"):
        if not (ROOT / "tiny" / f"{name}.jsonl").is_file():
            pytest.skip("needs tiny/, which tiny/make.py builds")
        write_jsonl(folder / f"{name}.jsonl", read_jsonl(ROOT / "tiny" / f"{name}.jsonl")[:20])
    return folder


@pytest.mark.parametrize(
    "loss", [pytest.param(name, marks=[] if name in SOONER else pytest.mark.slow) for name in dpo.LOSSES]
)
def test_every_loss_improves_its_own_objective(
    loss: dpo.LossName, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps on twenty rows of the embedded world: their loss falls, chosen responses gain on rejected ones."""
    monkeypatch.setattr(dpo, "plot_curves", lambda *_: None)
    seen, name = record(monkeypatch, dpo, "measure"), "rankings" if dpo.LOSSES[loss].data == "lists" else "preferences"
    file, output = str(tiny_world / f"{name}.jsonl"), str(tmp_path / "run")
    flags: dict[str, Any] = {
        "max_steps": 20,
        "epochs": 9.0,
        "batch_size": 4,
        "eval_samples": 0,
        "cache_dir": str(tiny_world / "cache"),
    }
    dpo.main(dpo.Args(loss=loss, dataset=file, eval_dataset=file, output_dir=output, **flags))
    before, after = (result for _, result in seen)
    assert after["loss"] < before["loss"] and after["margin"] > before["margin"]
    assert strict_rows(tmp_path / "run")[-1]["heldout_loss"] == pytest.approx(after["loss"], rel=1e-6)


def test_flags_of_the_losses_enter(first_step: Any) -> None:
    """Each changes the gradient of a policy that has parted from the reference."""
    plain = first_step()[0][0]
    for flags in ({"f_divergence": "js"}, {"label_smoothing": 0.2}, {"temperature": 0.5}):
        changed = first_step(**flags)[0][0]
        assert max((a - b).abs().max() for a, b in zip(plain, changed, strict=True)) > 1e-4, flags


def test_every_flag_is_read() -> None:
    """No flag without effect: each is used by its name."""
    source = (ROOT / "dpo.py").read_text()
    unread = [f.name for f in dataclasses.fields(dpo.Args) if f"args.{f.name}" not in source]
    assert set(unread) <= {"lora_target_modules"}  # read by getattr in add_adapter


# ----------------------------------------------------------------------------------------------------------- online
def letters(text: str) -> float:
    """The reward function of conftest."""
    return text.count("e") / (1 + len(text))


@pytest.mark.parametrize("pairs", ["best_worst", "all"])
def test_samples_are_ranked_by_reward(pairs: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """best_worst: the two extremes of each prompt's samples; all: every sample, ranks in the order of the scores."""
    ranked = record(monkeypatch, dpo, "rank_samples")
    run(**ONLINE, pairs=pairs, max_steps=1)
    (((rollout, scores, reference, _), (examples, references)),) = ranked
    assert scores.tolist() == pytest.approx([letters(text) for text in rollout.texts], abs=1e-6)
    groups = [range(start, start + 4) for start in (0, 4)]
    groups = [group for group in groups if len({scores[i].item() for i in group}) > 1]
    assert len(examples) == len(groups) > 0
    for example, of_prompt, group in zip(examples, references, groups, strict=True):
        best, worst = max(group, key=lambda i: scores[i]), min(group, key=lambda i: scores[i])
        kept = [best, worst] if pairs == "best_worst" else list(group)
        assert example["group"] == (rollout.prompts[best]["ids"], [rollout.responses[i] for i in kept])
        order = sorted(range(len(kept)), key=lambda k: example["ranks"][k])
        assert [scores[kept[k]].item() for k in order] == sorted((scores[i].item() for i in kept), reverse=True)
        for logprobs, i in zip(of_prompt, kept, strict=True):
            assert torch.equal(logprobs, reference[i, : len(rollout.responses[i])])


def test_a_rewarded_word_becomes_frequent(run: Run, sft_run: Path, tmp_path: Path) -> None:
    """Online DPO on a reward for a word: its share rises, KL grows from 0, the gate passes."""
    (tmp_path / "word.py").write_text(
        "def score(prompts, responses, **columns):\n"
        "    return [r.count('the') / (1 + len(r.split())) for r in responses]"
    )
    reward = f"{tmp_path / 'word.py'}:score"
    folder = run(**{**ONLINE, "reward_fn": reward}, max_steps=20, batch_size=32, micro_batch_size=32)
    rows = strict_rows(folder)
    share = [row["score"] for row in rows]
    assert np.mean(share[-5:]) > np.mean(share[:5]) + 0.02
    assert abs(rows[0]["kl"]) < 1e-3 and np.mean([row["kl"] for row in rows[-5:]]) > 0.1


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(name, marks=[] if name in ("sigmoid", "kto") else pytest.mark.slow)
        for name in dpo.LOSSES
        if name != "dro"  # learns from each score by itself
    ],
)
def test_equal_scores_leave_no_pair(loss: str, run: Run, sft_run: Path) -> None:
    """A batch without any pair neither crashes nor moves the weights, whatever the loss."""
    flags = {**ONLINE, "reward_fn": "constant", "loss": loss}
    folder = run(**flags)
    assert same_weights(folder, sft_run)
    assert all("loss" not in row and row["grad_norm"] == 0 and row["score"] == 1 for row in strict_rows(folder))


def test_prompts_with_equal_scores_are_left_out(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two prompts of each batch has no pair: the gradient is the other's alone, not half of it."""
    (tmp_path / "first.py").write_text(
        "def score(prompts, responses, **columns):\n"
        "    return [len(r) * (p == prompts[0]) for p, r in zip(prompts, responses)]"
    )
    passes = record(monkeypatch, dpo, "preference_pass")
    run(**{**ONLINE, "reward_fn": f"{tmp_path / 'first.py'}:score"}, max_steps=1)
    ((arguments, _),) = passes
    examples, n_prompts = arguments[2], arguments[4]
    assert len(examples) == 1 and n_prompts == 1


@pytest.mark.parametrize("bare", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_reference_follows_and_evaluation_does_not(bare: bool, run: Run, base: Path) -> None:
    """--sync_ref_every 1: every rollout starts at KL 0; the closing KL is that to the reference of the start."""
    flags = {**ONLINE, "eval_samples": 3, "max_steps": 4, **({"model": str(base)} if bare else {})}
    free, synced = strict_rows(run(**flags)), strict_rows(run(**flags, sync_ref_every=1))
    assert all(abs(row["kl"]) < 1e-3 for row in synced) and max(abs(row["kl"]) for row in free) > 0.05
    assert abs(free[-1]["heldout_kl"]) > 0.05 and abs(synced[-1]["heldout_kl"]) > 0.05
    assert all(row["loss"] == pytest.approx(math.log(2), abs=1e-4) for row in synced if "loss" in row)


def test_a_reference_is_synced_every_second_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: the loss is log 2 where the reference has just become the policy, and only there."""
    copies = record(monkeypatch, dpo, "copy_adapter")
    rows = strict_rows(run(sync_ref_every=2, max_steps=5))
    fresh = [abs(row["loss"] - math.log(2)) < 1e-5 for row in rows]
    assert fresh == [True, False, True, False, True]
    assert [arguments[1:] for arguments, _ in copies] == [("policy", "reference")] * 2
    assert abs(rows[-1]["heldout_loss"] - math.log(2)) > 1e-3


def test_a_reward_model_ranks(run: Run, reward_run: Path, base: Path, monkeypatch: Any, capsys: Any) -> None:
    """An adapter on the same base: canaries reproduce; the samples are ranked by the scores of plain classes."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ranked = record(monkeypatch, dpo, "rank_samples")
    run(**{**ONLINE, "reward_fn": None}, reward_model=str(reward_run), max_steps=1)
    assert "5 canaries reproduce" in capsys.readouterr().out
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    plain, tokenizer = PeftModel.from_pretrained(plain, str(reward_run)).eval(), AutoTokenizer.from_pretrained(base)
    (((rollout, scores, *_), _),) = ranked
    for prompt, response, score in zip(rollout.prompts, rollout.responses, scores.tolist(), strict=True):
        assert prompt["ids"] == tokenizer(tokenizer.decode(prompt["ids"]))["input_ids"]
        with torch.no_grad():
            expected = plain(torch.tensor([[*prompt["ids"], *response]])).logits.item() - 0.25
        assert score == pytest.approx(expected, abs=1e-4)


def test_dro_learns_from_the_scores(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online, with all samples: the reward of each is its score, not its place."""
    ranked = record(monkeypatch, dpo, "rank_samples")
    rows = strict_rows(run(**ONLINE, loss="dro", pairs="all", max_steps=1))
    (((_, scores, *_), (examples, _)),) = ranked
    found = [score for example in examples for score in example["wins"]]
    assert len(found) == 8 and found == pytest.approx(scores.tolist()) and math.isfinite(rows[0]["loss"])


def test_a_missing_end_costs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal scores: what ended is ranked above what did not, by the penalty; the logged score is without it."""
    ranked = record(monkeypatch, dpo, "rank_samples")
    folder = run(**{**ONLINE, "reward_fn": "constant"}, missing_eos_penalty=2.0, batch_size=48, max_steps=1)
    (((rollout, scores, *_), (examples, _)),) = ranked
    assert scores.tolist() == [1 - 2 * (1 - ended) for ended in rollout.ended.tolist()]
    assert 0 < strict_rows(folder)[0]["eos_rate"] < 1 and strict_rows(folder)[0]["score"] == 1 and examples
    stops = {y[-1] for y, ended in zip(rollout.responses, rollout.ended, strict=True) if ended}
    for example in examples:
        chosen, rejected = example["group"][1]
        assert chosen[-1] in stops and rejected[-1] not in stops


# -------------------------------------------------------------------------------------------------- 4 bits, bare base
def test_four_bits_train(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """--quant nf4 on CPU: 4-bit layers, a first loss of log 2 to bfloat16's rounding, and resume bit for bit."""
    import bitsandbytes

    loaded = record(monkeypatch, dpo, "load_policy")
    flags = {"quant": "nf4", "max_steps": 3, "save_every": 1, "eval_samples": 0}
    done = run(output_dir=str(tmp_path / "done"), **flags)
    ((_, (model, *_)),) = loaded
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules()) >= 14
    rows = strict_rows(done)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.02) and rows[2]["loss"] != rows[0]["loss"]
    with monkeypatch.context() as patch:
        die_at(patch, dpo, "log_step", 3)
        with pytest.raises(Killed):
            run(**flags)
    resumed = run(resume=True, **flags)
    assert (resumed / "metrics.jsonl").read_bytes() == (done / "metrics.jsonl").read_bytes()
    assert same_weights(resumed, done)


@pytest.mark.parametrize("sync", [0, 2])
def test_a_bare_base_is_its_own_reference(sync: int, run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--model without an adapter: a new one is trained, the first loss is log 2, the reference stays the base."""
    loaded = record(monkeypatch, dpo, "load_policy")
    rows = strict_rows(run(model=str(base), lora_r=4, sync_ref_every=sync, max_steps=3))
    ((_, (model, *_)),) = loaded
    assert set(model.peft_config) == ({"policy", "reference"} if sync else {"policy"})
    fresh = [abs(row["loss"] - math.log(2)) < 1e-5 for row in rows]
    assert fresh == [True, False, bool(sync)] and rows[0]["ref_kl"] < 1e-6
    assert rows[-1]["heldout_margin"] != 0


# -------------------------------------------------------------------------------------------------- two processes
@pytest.mark.slow
@pytest.mark.parametrize(("loss", "table"), [("sigmoid", "pairs"), ("kto", "votes"), ("online", "prompts")])
def test_two_processes_equal_one(loss: str, table: str, sft_run: Path, data: dict[str, str], tmp_path: Path) -> None:
    """Trap 23: sums over processes and kto's estimate over the whole batch: metrics equal to 1e-5."""
    flags: dict[str, Any] = {**SCRIPT_FLAGS, "max_steps": 2, "save_every": 0, "model": sft_run, "dataset": data[table]}
    flags |= {"cache_dir": tmp_path / "cache", "micro_batch_size": 2, "learning_rate": 0.001}
    if loss == "online":
        flags |= {"online": True, "eval_size": 3, "reward_fn": data["letters"], "missing_eos_penalty": 0}
    else:
        flags |= {"loss": loss, "eval_dataset": data["heldout"]}
    one, two = (launch("dpo", n, tmp_path / str(n), flags) for n in (1, 2))
    for ours, theirs in zip(strict_rows(two), strict_rows(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert len(read_jsonl(two / "samples.jsonl")) == len(read_jsonl(one / "samples.jsonl"))
