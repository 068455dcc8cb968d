"""Whole runs of dpo.py in process: files, determinism, resume, the reference, data, losses."""

import dataclasses
import json
import math
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
import torch
from conftest import (
    ROOT,
    perturb,
    read_jsonl,
    record,
    same_weights,
    shared_or_skip,
    strict_rows,
    write_jsonl,
)
from test_run import (
    ADAPTER_FILES,
    ENVIRONMENT,
    RUN_FILES,
    Killed,
    assert_same_gradients,
    count_lines,
    die_at,
    launch,
    one_line,
)
from torch import Tensor

import dpo

Run = Callable[..., Path]
KEYS = {
    "step", "loss", "chosen_reward", "rejected_reward", "margin", "accuracy", "chosen_logprob", "rejected_logprob",
    "chosen_length", "rejected_length", "ref_kl", "grad_norm", "learning_rate",
}  # fmt: skip


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
        "lists_of_3": [row for row in lists if len(row["ranks"]) > 2],
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
    drawn = dpo.Run.plot_curves

    def start(plot: bool = False, **flags: Any) -> Path:
        monkeypatch.setattr(dpo.Run, "plot_curves", drawn if plot else lambda *_: None)
        settings: dict[str, Any] = {
            "model": str(sft_run), "dataset": "pairs", "eval_dataset": "heldout", "output_dir": str(tmp_path / "dpo"),
            "eval_samples": 0, "max_response_length": 40, "batch_size": 8,
            "tokens_per_batch": 256, "max_steps": 2, "epochs": 9.0, "warmup_ratio": 0.0, "learning_rate": 0.01,
        }  # fmt: skip
        settings |= flags
        for name in ("dataset", "eval_dataset", "gold_fn"):
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
    keys = keys | {"id", "prompt", "response", "model", "finish_reason", "tokens", "step", "kl"}
    assert all(row.keys() == keys for row in rows)
    assert [row["prompt"] for row in rows[:n]] == [row["prompt"] for row in rows[n:]]
    assert len({row["prompt"] for row in rows}) == n and {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert not any(token in row["response"] for row in rows for token in special)


def test_a_run_writes_what_it_says(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file of the run folder, the metrics' keys, held-out responses of both models, two tables, result.json."""
    folder = run(plot=True, eval_every=1, save_every=1, gold_fn="letters", eval_samples=2)
    assert {p.name for p in folder.iterdir()} == ADAPTER_FILES | RUN_FILES
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    rows = strict_rows(folder)
    assert [row["step"] for row in rows] == [0, 1]
    heldout = {f"heldout_{name}" for name in ("loss", "accuracy", "margin", "gold", "kl")}
    assert all(row.keys() == KEYS | heldout and all(map(math.isfinite, row.values())) for row in rows)
    for row in rows:
        assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-6)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[0]["ref_kl"] < 1e-6
    assert abs(rows[1]["loss"] - math.log(2)) > 1e-4 and rows[1]["ref_kl"] > 1e-4
    check_samples(folder, 2, {"gold"})
    result = json.loads((folder / "result.json").read_text())
    assert result["stage"] == "dpo" and result["preferences"] == 4 and result["prompts"] == 2
    assert result["loss"][0] == [pytest.approx(math.log(2), abs=1e-5)]
    assert result["loss"][1] == [pytest.approx(rows[1]["heldout_loss"])] and len(result["accuracy"][1]) == 3
    assert result["dpo"]["gold"][0] == pytest.approx(rows[1]["heldout_gold"]) and len(result["gold_win_rate"]) == 3
    assert result["sft"]["kl"][0] == pytest.approx(0, abs=1e-5)
    printed = capsys.readouterr().out
    labels = ("4 held-out preferences", "accuracy", "margin", "2 held-out prompts", "gold win-rate over SFT", "kl  ")
    assert all(label in printed for label in labels)
    assert {"seconds", "tokens_per_second"} <= read_jsonl(folder / "timing.jsonl")[0].keys()


def test_a_gold_function_judges_and_does_not_train(run: Run, tmp_path: Path) -> None:
    """--gold_fn adds figures; the weights are those of a run without, whose table has no win-rate."""
    judged = run(gold_fn="constant", eval_samples=2)
    plain = run(output_dir=str(tmp_path / "plain"), eval_samples=2)
    assert same_weights(judged, plain)
    assert strict_rows(judged)[-1]["heldout_gold"] == 1 and "heldout_gold" not in strict_rows(plain)[-1]
    results = [json.loads((folder / "result.json").read_text()) for folder in (judged, plain)]
    assert results[0]["gold_win_rate"][0] == 0.5 and "gold_win_rate" not in results[1]
    assert results[1]["dpo"].keys() == {"kl", "length", "ended"}


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


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_without_held_out_data_a_run_ends_well(loss: str, run: Run) -> None:
    """--eval_size 0: nothing is measured, nothing is sampled, the adapter is written."""
    folder = run(loss=loss, eval_dataset=None, eval_size=0.0, eval_samples=2)
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "samples.jsonl").exists()
    assert all(row.keys() >= KEYS - {"ref_kl"} and not any("heldout" in k for k in row) for row in strict_rows(folder))


# ----------------------------------------------------------------------------------------------------- determinism
@pytest.mark.parametrize(
    "flags", [{}, pytest.param({"loss": "kto", "dataset": "votes"}, marks=pytest.mark.slow)], ids=["sigmoid", "kto"]
)
def test_a_run_is_a_function_of_its_seed(flags: dict, run: Run, tmp_path: Path) -> None:
    """Twice the same arguments: the same bytes of metrics, samples and weights; another seed: others."""
    first, second, other = (
        run(output_dir=str(tmp_path / n), seed=s, eval_samples=2, **flags) for n, s in (("a", 3), ("b", 3), ("c", 4))
    )
    for name in ("metrics.jsonl", "samples.jsonl", "result.json", "adapter_model.safetensors"):
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
        clip_gradients = dpo.Run.clip_gradients

        def recorded(self: dpo.Run, optimizer: Any, *rest: Any) -> float:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            found.append([p.grad.clone() for p in parameters if p.grad is not None])
            return clip_gradients(self, optimizer, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(dpo.Run, "clip_gradients", recorded)
            if parted:
                part(patch)
            folder = run(max_steps=1, **flags)
        row = strict_rows(folder)[0]
        return found, {key: value for key, value in row.items() if not key.startswith("heldout")}

    return start


def part(patch: pytest.MonkeyPatch) -> None:
    """The policy parts from the reference before the first step."""
    add_adapter = dpo.add_adapter

    def moved(model: Any, name: str, *rest: Any) -> Any:
        model = add_adapter(model, name, *rest)
        if name == "policy":
            perturb(model, "policy", seed=11, size=0.1)
        return model

    patch.setattr(dpo, "add_adapter", moved)
    patch.setattr(dpo, "check_start", lambda *_: None)


def assert_same_step(ours: tuple[list[list[Tensor]], dict], theirs: tuple[list[list[Tensor]], dict]) -> None:
    """Gradients of every optimiser to 1e-5 of the largest entry, metrics to 1e-4."""
    assert len(ours[0]) == len(theirs[0])
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert_same_gradients(a, b)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4, abs=2e-5)


BATCHES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "kto": {"loss": "kto", "dataset": "votes"},
    "lists": {"loss": "sigmoid", "dataset": "lists"},
    "lipo": {"loss": "lipo", "dataset": "lists"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("sigmoid", "lipo") else pytest.mark.slow) for n in BATCHES]
)
def test_rows_do_not_change_the_step(name: str, first_step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 23: prompts of unequal lengths and numbers of responses, in one row, in several, a row to each response."""
    whole = first_step(tokens_per_batch=4000, **BATCHES[name])
    assert whole[1]["margin"] != 0 and len(whole[0]) == 1
    assert_same_step(first_step(tokens_per_batch=100, **BATCHES[name]), whole)
    monkeypatch.setattr(dpo, "FLAT_ROW_MODELS", ())
    assert_same_step(first_step(**BATCHES[name]), whole)


def test_rows_do_not_change_the_first_step_of_lipo(first_step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the policy still is the reference, too: places are by index, not by the last bit of the log-probs."""
    (shared,) = first_step(parted=False, **BATCHES["lipo"])[0]
    monkeypatch.setattr(dpo, "FLAT_ROW_MODELS", ())
    (single,) = first_step(parted=False, **BATCHES["lipo"])[0]
    assert_same_gradients(shared, single)


def test_gradient_checkpointing_does_not_change_the_step(first_step: Any) -> None:
    """Activations that are computed again are the same."""
    off, on = (first_step(gradient_checkpointing=checkpointing) for checkpointing in (False, True))
    assert_same_step(on, off)


# --------------------------------------------------------------------------------------------------- interruptions
RESUMED: dict[str, dict[str, Any]] = {
    "sigmoid": {"eval_every": 2},
    "bco": {"loss": "bco"},
    "kto": {"loss": "kto", "dataset": "votes"},
}
DEATHS: list[tuple[Any, str, int]] = [
    (dpo.Run, "clip_gradients", 2),  # the second step's gradient is there, the policy has not moved
    (dpo.Run, "log", 4),  # the fourth step has been computed, nothing of it is written
    (dpo.Run, "save", 3),  # metrics.jsonl is one step ahead of the checkpoint
    (dpo, "save_model", 1),  # all steps are done, the result is not written
]


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Path]:
    """Folders of runs that were left in peace, by name, made by the first test that asks."""
    return {}


def assert_resumed_equals(done: Path, resumed: Path) -> None:
    """Metrics and result byte for byte, adapter and samples too; as many lines of timing as steps."""
    for name in ("metrics.jsonl", "adapter_model.safetensors", "samples.jsonl", "result.json"):
        if name != "samples.jsonl" or (done / name).is_file():
            assert (resumed / name).read_bytes() == (done / name).read_bytes(), name
    assert len(read_jsonl(resumed / "timing.jsonl")) == len(strict_rows(done))


@pytest.mark.parametrize(
    ("name", "death"),
    [
        *[pytest.param("sigmoid", d, marks=pytest.mark.slow if d[1] in ("save", "log") else []) for d in DEATHS],
        ("bco", DEATHS[1]),
        pytest.param("kto", DEATHS[1], marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else x[1],
)
def test_a_run_resumes_bit_for_bit(
    name: str, death: tuple[Any, str, int], run: Run, uninterrupted: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """Killed anywhere, --resume ends as the uninterrupted run: policy, optimiser, baseline."""
    flags = {"max_steps": 4, "save_every": 1, "weight_decay": 0.1, **RESUMED[name]}
    if name not in uninterrupted:
        folder = tmp_path_factory.mktemp("dpo")
        uninterrupted[name] = run(output_dir=str(folder / "done"), **flags)
    with monkeypatch.context() as patch:
        die_at(patch, *death)
        with pytest.raises(Killed):
            run(**flags)
    assert_resumed_equals(uninterrupted[name], run(resume=True, **flags))


def test_a_checkpoint_holds_what_must_survive(run: Run) -> None:
    """Loads with weights_only: the policy, its optimiser, the moving baseline."""
    folder = run(save_every=2, max_steps=3, loss="bco")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3 and state["tensors"][-1].shape == () and state["tensors"][-1] != 0
    assert len(state["tensors"]) > 10 and len(state["optimizers"]) == 1


SCRIPT_FLAGS: dict[str, Any] = {
    "max_steps": 40, "epochs": 100, "save_every": 3, "batch_size": 8, "tokens_per_batch": 256, "eval_samples": 2,
    "max_response_length": 40, "learning_rate": 0.01,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_sigkill_and_resume(
    seed: int, sft_run: Path, data: dict[str, str], uninterrupted: dict[str, Path], tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """A real SIGKILL at a random moment of training, twice, then --resume: as if nothing had happened."""
    rng = random.Random(seed)
    flags = {**SCRIPT_FLAGS, "model": sft_run, "loss": "bco"}
    flags |= {"dataset": data["pairs"], "eval_dataset": data["heldout"]}

    def line(folder: Path, *more: str) -> list[str]:
        pairs = {**flags, "output_dir": folder}.items()
        return [sys.executable, str(ROOT / "dpo.py"), *(str(x) for k, v in pairs for x in (f"--{k}", v)), *more]

    if "by command" not in uninterrupted:
        uninterrupted["by command"] = tmp_path_factory.mktemp("bco") / "done"
        subprocess.run(line(uninterrupted["by command"]), env=ENVIRONMENT, check=True, capture_output=True)
    folder = tmp_path / "run"
    more: list[str] = []
    for until in sorted(rng.sample(range(4, flags["max_steps"]), 2)):
        process = subprocess.Popen(line(folder, *more), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        while count_lines(folder / "metrics.jsonl") < until and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        assert process.poll() is None  # it is in the middle of training
        process.send_signal(signal.SIGKILL)
        process.wait()
        more = ["--resume", "true"]
    subprocess.run(line(folder, *more), env=ENVIRONMENT, check=True, capture_output=True)
    assert_resumed_equals(uninterrupted["by command"], folder)


# ---------------------------------------------------------------------------------------------------- the reference
def test_the_reference_is_the_model_given(
    run: Run, sft_run: Path, base: Path, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log-probs of all training responses sum to plain PEFT's, also once the policy has moved."""
    seen = record(monkeypatch, dpo, "preference_loss")
    run(learning_rate=0.1, batch_size=24, max_steps=2)
    rows = read_jsonl(Path(data["pairs"]))
    texts = [(row["prompt"], row[name]) for row in rows for name in ("chosen", "rejected")]
    expected = sum(plain_logprobs(sft_run, base, texts))
    trained = [(given[0], given[1]) for given, _ in seen if given[0].requires_grad]
    ref = sum(batch.ref_logprobs.sum().item() for _, batch in trained) / 2  # two steps on all rows
    assert ref == pytest.approx(expected, rel=1e-3)
    policy = sum(logprobs.sum().item() for logprobs, _ in trained[len(trained) // 2 :])
    assert abs(policy - expected) > 1e-2 * abs(expected)


@pytest.mark.parametrize("loss", [name for name, kind in dpo.LOSSES.items() if not kind.reference])
def test_a_loss_without_reference_computes_none(
    loss: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """orpo, simpo, cpo: no pass in the role of the reference."""
    roles = record(monkeypatch, dpo, "role")
    folder = run(loss=loss)
    assert {who for (_, who, *_), _ in roles} == {"policy"}
    assert all("ref_kl" not in row and math.isfinite(row["loss"]) for row in strict_rows(folder))


# ------------------------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize(
    "loss", ["lipo", "plackett_luce", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sigmoid", "sppo"))]
)
def test_rankings_with_ties_train(loss: str, run: Run) -> None:
    """prompt + responses + ranks: two to four responses, some tied."""
    folder = run(loss=loss, dataset="lists", eval_dataset="lists", max_steps=6)
    rows = strict_rows(folder)
    assert all(row.keys() >= KEYS and all(map(math.isfinite, row.values())) for row in rows)
    assert rows[-1]["margin"] > 0.01 and rows[-1]["accuracy"] > 0.6  # the same twelve rows again and again


def test_labelled_responses_train(run: Run) -> None:
    """prompt + completion + label: liked or not. No accuracy."""
    folder = run(loss="kto", dataset="votes", eval_dataset="votes", max_steps=6)
    rows = strict_rows(folder)
    keys = KEYS - {"accuracy"}
    assert all(row.keys() >= keys and "accuracy" not in row and all(map(math.isfinite, row.values())) for row in rows)
    assert rows[-1]["margin"] > 0.01 and rows[-1]["heldout_margin"] > 0.01
    result = json.loads((folder / "result.json").read_text())
    assert "accuracy" not in result and result["margin"][0] == [pytest.approx(0, abs=1e-5)]


@pytest.mark.parametrize("label", [1, 0])
def test_labels_of_one_kind_train(label: int, run: Run, data: dict[str, str], tmp_path: Path) -> None:
    """All liked, none liked: what needs both is left out, the rest goes on."""
    rows = [{**row, "label": label} for row in read_jsonl(Path(data["votes"]))]
    file = str(write_jsonl(tmp_path / "labels.jsonl", rows))
    table = strict_rows(run(loss="kto", dataset=file, eval_dataset=None, eval_size=4))
    assert all("margin" not in row and math.isfinite(row["loss"]) for row in table)
    assert table[1]["grad_norm"] > 0


def data_line(capsys: Any, file: Path) -> str:
    """The line that says what of a file could be used."""
    return next(x for x in capsys.readouterr().out.splitlines() if x.startswith(f"data: {file}"))


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
        {"prompt": "a", "completion": "b", "label": 1},  # 26
    ]
    file = write_jsonl(tmp_path / "mixed.jsonl", [*good, *bad])
    run(dataset=str(file), max_steps=1)
    line = data_line(capsys, file)
    assert "12 examples from 26 rows" in line
    for reason in (
        "1 no JSON object of text (row 13",
        "2 a message without text, or of another role (row 14",
        "1 identical pair (row 16",
        "1 pair with differing prompts (row 17",
        "2 prompt over 512 or response over 40 tokens (row 18",
        "1 no response is ranked above another (row 20",
        "1 responses and ranks are no lists of one length (row 21",
        "2 a column is missing or null (row 22",
        "1 a rank or the margin is no number (row 23",
        "1 neither a string nor a message list (row 24: 3",
        "1 no dialogue: neither a message list nor a text that begins with `Human:` (row 25",
    ):
        assert reason in line, (reason, line)


def test_all_turns_of_a_dialogue_are_read(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A string prompt beside whole dialogues of several turns, as UltraFeedback has them: the same tokens as messages,
    as hh-rlhf's text, and as a message-list prompt with two answers."""
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    turns.append({"role": "user", "content": "three?"})
    good, bad = [{"role": "assistant", "content": text} for text in ("four", "five")]
    text = "\n\nHuman: one?\n\nAssistant: two\n\nHuman: three?\n\nAssistant: "
    rows: list[Any] = [
        {"prompt": "one?", "chosen": [*turns, good], "rejected": [*turns, bad]},
        {"chosen": [*turns, good], "rejected": [*turns, bad]},
        {"chosen": text + "four", "rejected": text + "five"},
        {"prompt": turns, "chosen": [good], "rejected": [bad]},
        {"prompt": turns, "chosen": "four", "rejected": "five"},
    ]
    seen = record(monkeypatch, dpo, "collate")
    run(dataset=str(write_jsonl(tmp_path / "turns.jsonl", rows)), max_steps=1)
    (batch, *_), _ = seen[-2]  # the last is the evaluation's
    groups = [e["group"] for e in batch]
    assert len(groups) == 8 and all(group == groups[0] for group in groups)
    short = [{"prompt": "three?", "chosen": "four", "rejected": "five"}]
    run(dataset=str(write_jsonl(tmp_path / "short.jsonl", short)), max_steps=1)
    (prompt, responses) = seen[-2][0][0][0]["group"]
    assert responses == groups[0][1] and len(groups[0][0]) > len(prompt)


def test_a_ranking_may_have_a_column_called_chosen(run: Run, data: dict[str, str], tmp_path: Path) -> None:
    """prompt + responses + ranks is a column set of its own, whatever other columns there are."""
    rows = [{**row, "chosen": row["responses"][0]} for row in read_jsonl(Path(data["lists"]))]
    assert len(strict_rows(run(dataset=str(write_jsonl(tmp_path / "lists.jsonl", rows))))) == 2


def test_bad_labels_are_counted_by_reason(run: Run, data: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    """A label is true or false, 1 or 0."""
    good: list[Any] = read_jsonl(Path(data["votes"]))[:12]
    labels: list[Any] = ["yes", None, [1], 0.5, True, False, 1.0]
    rows = [{**row, "label": label} for row, label in zip(good, labels, strict=False)]
    empty = {"prompt": "a", "completion": " ", "label": 1}
    ranking = {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [1, 2, 3]}
    strange = [f'{{"prompt": "a", "completion": "b", "label": {label}}}' for label in ("NaN", "1" + "0" * 400)]
    file = write_jsonl(tmp_path / "votes.jsonl", [*good, *rows, empty, *strange, ranking])
    run(loss="kto", dataset=str(file), max_steps=1)
    line = data_line(capsys, file)
    assert "15 examples from 23 rows" in line
    assert "5 the label is neither 0 nor 1 (row 13: 'yes')" in line
    assert "2 a column is missing or null (row 14" in line
    assert "1 a message without text, or of another role (row 20" in line


def refused(run: Run, *patterns: str, **flags: Any) -> None:
    """run(**flags) ends in a UserError of one line that holds every pattern, before there is a run folder."""
    with pytest.raises(dpo.UserError) as caught:
        run(**flags)
    text = one_line(caught.value)
    assert all(pattern in text for pattern in patterns), text


DATA_ERRORS: list[tuple[dict[str, Any], list[str]]] = [
    ({"dataset": "votes"}, ["votes.jsonl: no usable row of 24", "found prompt, completion, label"]),
    ({"dataset": "lists_of_3", "loss": "kto"}, ["found prompt, responses, ranks", "prompt + completion + label"]),
    ({"eval_dataset": "votes"}, ["no usable row of 24", "expected prompt + chosen + rejected"]),
    ({"dataset": "prompts"}, ["no usable row of 24", "expected prompt + chosen + rejected | chosen + rejected"]),
    (
        {"dataset": "prompts"},
        ["prompt + responses + ranks", "found id, prompt, animal, attribute, answer"],
    ),
    ({"dataset": "absent.jsonl"}, ["absent.jsonl", "can't be read"]),
    ({"dataset": "pairs", "eval_dataset": None, "eval_size": 24}, ["--eval_size 24", "leaves none to train on"]),
]


@pytest.mark.parametrize(("flags", "patterns"), DATA_ERRORS, ids=lambda x: "" if isinstance(x, list) else str(x))
def test_data_that_a_loss_cannot_use_is_one_line(flags: dict, patterns: list[str], run: Run, tmp_path: Path) -> None:
    """The loss or the file, what is wrong with it, and what to use."""
    refused(run, *patterns, **flags)
    assert not (tmp_path / "dpo").exists()


FLAG_ERRORS: list[tuple[dict[str, Any], list[str]]] = [
    ({"loss": "ipo", "label_smoothing": 0.1}, ["--label_smoothing", "--loss ipo", "sigmoid"]),
    ({"label_smoothing": 0.5}, ["--label_smoothing 0.5", "below 0.5"]),
    ({"label_smoothing": -0.1}, ["--label_smoothing -0.1"]),
    ({"loss": "kto", "f_divergence": "js"}, ["--f_divergence", "--loss kto", "hinge"]),
    ({"f_divergence": "alpha", "f_alpha": 3.0}, ["--f_alpha 3.0", "0", "1"]),
    ({"loss": "kto", "batch_size": 1}, ["--batch_size 1", "kto", "another prompt"]),
    ({"lora_r": 0}, ["--lora_r 0"]),
    ({"beta": 0.0}, ["--beta 0.0", "above 0"]),
    ({"batch_size": 0}, ["--batch_size 0"]),
    ({"tokens_per_batch": 0}, ["--tokens_per_batch 0"]),
    ({"epochs": 0.0}, ["--epochs 0.0"]),
]


@pytest.mark.parametrize(("flags", "patterns"), FLAG_ERRORS, ids=lambda x: "" if isinstance(x, list) else str(x)[:60])
def test_contradicting_flags_are_one_line(flags: dict, patterns: list[str], run: Run, tmp_path: Path) -> None:
    """The flag is named, and what it contradicts."""
    refused(run, *patterns, **flags)
    assert not (tmp_path / "dpo").exists()


def test_another_answer_sheet_cannot_resume(run: Run) -> None:
    """--resume with another loss or beta: one line that names both values."""
    run(max_steps=1)
    refused(run, "--loss ipo (was sigmoid)", loss="ipo", max_steps=2, resume=True)
    refused(run, "--beta 0.2 (was 0.1)", beta=0.2, max_steps=2, resume=True)


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
    reasons = [f"{counts['identical']} identical pair", f"{counts['empty']} a message without text"]
    reasons.append(f"{counts['prompt']} pair with differing prompts")
    refused(run, f"no usable row of {len(kinds)}", *reasons, model=str(model), dataset=str(file), **flags)


# ----------------------------------------------------------------------------------------------------------- losses
SOONER = ("sigmoid",)  # in the default tier


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twenty rows each of the embedded preferences and rankings."""
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
    loss: str, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps on twenty rows of the embedded world: their loss falls, chosen responses gain on rejected ones."""
    monkeypatch.setattr(dpo.Run, "plot_curves", lambda *_: None)
    seen, name = (
        record(monkeypatch, dpo, "measure_preferences"),
        "rankings" if dpo.LOSSES[loss].data == "lists" else "preferences",
    )
    file, output = str(tiny_world / f"{name}.jsonl"), str(tmp_path / "run")
    flags: dict[str, Any] = {
        "max_steps": 20,
        "learning_rate": 1e-3,
        "tokens_per_batch": 512,
        "epochs": 9.0,
        "batch_size": 4,
        "eval_samples": 0,
    }
    dpo.main(dpo.Args(loss=loss, dataset=file, eval_dataset=file, output_dir=output, **flags))
    before, after = (result for _, result in seen)
    assert after["loss"] < before["loss"] and after["margin"] > before["margin"]
    assert strict_rows(tmp_path / "run")[-1]["heldout_loss"] == pytest.approx(after["loss"], rel=1e-6)


def test_flags_of_the_losses_enter(first_step: Any) -> None:
    """Each changes the gradient of a policy that has parted from the reference."""
    plain = first_step()[0][0]
    for flags in ({"f_divergence": "js"}, {"label_smoothing": 0.2}, {"beta": 0.3}):
        changed = first_step(**flags)[0][0]
        assert max((a - b).abs().max() for a, b in zip(plain, changed, strict=True)) > 1e-4, flags


def test_every_flag_is_read() -> None:
    """No flag without effect: each is used by its name."""
    source = (ROOT / "dpo.py").read_text()
    unread = [f.name for f in dataclasses.fields(dpo.Args) if f"args.{f.name}" not in source]
    assert set(unread) <= {"lora_target_modules"}  # read by getattr in add_adapter


# -------------------------------------------------------------------------------------------------- 4 bits, bare base
def test_four_bits_train(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """--quant nf4 on CPU: 4-bit layers, a first loss of log 2 to bfloat16's rounding, and resume bit for bit."""
    import bitsandbytes

    loaded = record(monkeypatch, dpo, "load_base")
    flags = {"quant": "nf4", "max_steps": 3, "save_every": 1, "eval_samples": 0}
    done = run(output_dir=str(tmp_path / "done"), **flags)
    ((_, model),) = loaded
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules()) >= 14
    rows = strict_rows(done)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.02) and rows[2]["loss"] != rows[0]["loss"]
    with monkeypatch.context() as patch:
        die_at(patch, dpo.Run, "log", 3)
        with pytest.raises(Killed):
            run(**flags)
    resumed = run(resume=True, **flags)
    assert (resumed / "metrics.jsonl").read_bytes() == (done / "metrics.jsonl").read_bytes()
    assert same_weights(resumed, done)


def test_a_bare_base_is_its_own_reference(run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--model without an adapter: a new one is trained, the first loss is log 2, the reference stays the base."""
    loaded = record(monkeypatch, dpo, "add_adapter")
    rows = strict_rows(run(model=str(base), lora_r=4, max_steps=3))
    assert {name for (_, name, *_), _ in loaded} == {"policy"}
    fresh = [abs(row["loss"] - math.log(2)) < 1e-5 for row in rows]
    assert fresh == [True, False, False] and rows[0]["ref_kl"] < 1e-6
    assert rows[-1]["heldout_margin"] != 0


# -------------------------------------------------------------------------------------------------- two processes
@pytest.mark.slow
@pytest.mark.parametrize(("loss", "table"), [("sigmoid", "pairs"), ("kto", "votes")])
def test_two_processes_equal_one(loss: str, table: str, sft_run: Path, data: dict[str, str], tmp_path: Path) -> None:
    """Trap 23: sums over processes and kto's estimate over the whole batch: metrics equal to 1e-5."""
    flags: dict[str, Any] = {**SCRIPT_FLAGS, "max_steps": 2, "model": sft_run, "dataset": data[table], "loss": loss}
    flags |= {"eval_dataset": data["heldout"], "learning_rate": 0.001}
    one, two = (launch(n, tmp_path / str(n), flags, "dpo.py") for n in (1, 2))
    for ours, theirs in zip(strict_rows(two), strict_rows(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert len(read_jsonl(two / "samples.jsonl")) == len(read_jsonl(one / "samples.jsonl"))
