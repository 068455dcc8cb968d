"""eval/rm_accuracy.py: its maths by hand, real preference data, reward.py's own scores, bad files, the module."""

import doctest
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, read_jsonl, shared_or_skip, tiny_llama, write_jsonl
from reference_reward import pairs_of, wilson
from scipy.optimize import minimize_scalar

import reward
from eval import rm_accuracy
from eval.rm_accuracy import Args, UserError, main

TINY = ROOT / "tiny"
UTILITY = f"{TINY / 'annotator.py'}:utility"


@pytest.fixture
def tell(tmp_path: Path) -> Callable[..., dict]:
    """tell(rows or a file, **flags) -> result of main, written to tmp_path/out.json."""

    def start(data: Any, **flags: Any) -> dict:
        file = write_jsonl(tmp_path / "data.jsonl", data) if isinstance(data, list) else data
        return main(Args(**{"dataset": str(file), "output": str(tmp_path / "out.json"), **flags}))

    return start


@pytest.fixture
def length_fn(tmp_path: Path) -> str:
    """--reward_fn: the number of characters."""
    (tmp_path / "scorers.py").write_text("def length(prompts, responses, **columns):\n    return map(len, responses)\n")
    return f"{tmp_path / 'scorers.py'}:length"


def scored(*margins: Any, **columns: Any) -> list[dict]:
    """Scored pairs with these margins; columns are lists or one value for all."""
    rows = []
    for i, margin in enumerate(margins):
        row = {"id": str(i), "prompt": f"q{i}", "chosen": "yes", "rejected": "no!", "subset": ""}
        more = {name: value[i] if isinstance(value, list) else value for name, value in columns.items()}
        rows.append({**row, "chosen_score": margin, "rejected_score": 0.0, **more})
    return rows


# ------------------------------------------------------------------------------------------------------------ the maths
def test_doctests() -> None:
    """The numbers in the docstrings."""
    assert doctest.testmod(rm_accuracy) == (0, doctest.testmod(rm_accuracy).attempted)
    assert doctest.testmod(rm_accuracy).attempted > 10


def test_a_tie_is_half_a_win(tell: Callable[..., dict]) -> None:
    """Three wins, two ties, three losses of 8: 4 / 8, strictly 3 / 8; Wilson's interval by bisection."""
    got = tell(scored(1, 2, 3, 0, 0, -1, -2, -3))
    assert (got["n"], got["accuracy"], got["ties"], got["strict_accuracy"]) == (8, 0.5, 2, 3 / 8)
    assert (got["ci_low"], got["ci_high"]) == pytest.approx(wilson(0.5, 8), abs=1e-6)
    got = tell(scored(1, 1, 1))
    assert got["accuracy"] == 1 and (got["ci_low"], got["ci_high"]) == pytest.approx(wilson(1.0, 3), abs=1e-6)


def test_clusters_by_hand(tell: Callable[..., dict]) -> None:
    """Prompts with 3, 2, 1 pairs: sums of residuals by cluster, squared, times G / (G - 1); and each prompt once."""
    margins, prompts = [1, 1, -1, 1, 1, -1], ["a", "a", "a", "b", "b", "c"]
    got = tell(scored(*margins, prompt=prompts))
    residuals = [(1 / 3) * 2 - 2 / 3, (1 / 3) * 2, -2 / 3]
    error = math.sqrt(sum(r * r for r in residuals) * 3 / 2) / 6
    assert got["clustered"]["clusters"] == 3 and got["clustered"]["mean"] == pytest.approx(4 / 6)
    assert got["clustered"]["standard_error"] == pytest.approx(error)
    assert got["clustered"]["ci_high"] - 4 / 6 == pytest.approx(1.959964 * error, rel=1e-6)
    assert got["within_prompt"]["mean"] == pytest.approx((2 / 3 + 1 + 0) / 3) and got["within_prompt"]["n"] == 3
    assert tell(scored(1, 2, prompt="a"))["clustered"]["ci_low"] is None  # one prompt: unknown, not certain


def test_eight_copies_are_one_observation(tell: Callable[..., dict]) -> None:
    """Copying every pair eight times narrows Wilson's interval, and leaves the clustered one as it was."""
    rng = np.random.default_rng(0)
    margins = rng.normal(0.5, 1, 60)
    once = tell(scored(*margins))
    rows = [{**row, "id": f"{row['id']}.{k}", "chosen": f"{k}"} for row in scored(*margins) for k in range(8)]
    copied = tell(rows)
    assert copied["accuracy"] == pytest.approx(once["accuracy"]) and copied["n"] == 480
    assert copied["clustered"]["standard_error"] == pytest.approx(once["clustered"]["standard_error"])
    names = ("slope", "slope_standard_error")
    assert [copied["calibration"][n] for n in names] == pytest.approx([once["calibration"][n] for n in names])
    assert copied["ci_high"] - copied["ci_low"] < 0.4 * (once["ci_high"] - once["ci_low"])


def test_bins_hold_every_pair_once(tell: Callable[..., dict]) -> None:
    """Bins by margin and by length difference partition the pairs; equal values never part; shares by counting."""
    rng = np.random.default_rng(1)
    margins = np.round(rng.normal(0.3, 1, 97), 1)  # many equal
    rows = [{**row, "chosen": "x" * rng.integers(1, 30)} for row in scored(*margins)]
    got = tell(rows)
    x = {"by_margin": np.abs(margins), "by_length_difference": np.array([len(r["chosen"]) - 3 for r in rows])}
    for name, values in x.items():
        bins = got[name]
        assert len(bins) == 5 and sum(b["n"] for b in bins) == 97
        for b in bins:
            inside = (values >= b["low"]) & (values <= b["high"])
            assert b["n"] == inside.sum() > 10
            assert b["accuracy"] == pytest.approx(np.mean((margins[inside] > 0) + 0.5 * (margins[inside] == 0)))
    assert len(tell(scored(*[1.0] * 9))["by_margin"]) == 1


def test_calibration_by_counting(tell: Callable[..., dict]) -> None:
    """ECE, bins, Brier and log-loss counted in plain Python; the slope by minimising the log-loss."""
    rng = np.random.default_rng(2)
    true = rng.normal(0, 2, 400)
    margins = np.where(rng.random(400) < 1 / (1 + np.exp(-true)), true, -true) * 1.5  # overconfident by 1.5
    got = tell(scored(*margins))["calibration"]
    assert got["brier"] == pytest.approx(np.mean([(1 - 1 / (1 + math.exp(-m))) ** 2 for m in margins]))
    assert got["log_loss"] == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in margins]))
    ece, shown = 0.0, []
    for b in range(5):
        part = [m for m in margins if 0.5 + b / 10 < 1 / (1 + math.exp(-abs(m))) <= 0.6 + b / 10]
        said, right = np.mean([1 / (1 + math.exp(-abs(m))) for m in part]), np.mean([m > 0 for m in part])
        ece += len(part) / 400 * abs(said - right)
        shown.append({"confidence": pytest.approx(said), "accuracy": pytest.approx(right), "n": len(part)})
    assert got["bins"] == shown and got["ece"] == pytest.approx(ece)
    best = minimize_scalar(lambda b: np.logaddexp(0, -b * margins).sum(), bounds=(0, 9), method="bounded").x
    assert got["slope"] == pytest.approx(best, abs=1e-4) and got["slope_ci_low"] < 1 / 1.5 < got["slope_ci_high"] < 1


def test_no_slope_where_all_pairs_are_right(tell: Callable[..., dict]) -> None:
    """A separated fit has no maximum: null, not a large number."""
    fit = tell(scored(1, 2, 3))["calibration"]
    assert fit["slope"] is None and fit["slope_ci_high"] is None and 0 < fit["brier"] < 0.25


def test_reward_bench_by_its_published_counts() -> None:
    """The weights of the 23 + 4 subsets written out again: examples, math-prm 984, prior sets plain and half."""
    counts = {
        "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
                 "mt-bench-med": 40},
        "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                      "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
        "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
                   "xstest-should-respond": 250, "donotanswer": 136},
        "Reasoning": {"math-prm": 447, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
                      "hep-python": 164, "hep-rust": 164},
        "Prior Sets": {"anthropic_helpful": 50, "anthropic_hhh": 20, "shp": 30, "summarize": 10},
    }  # fmt: skip
    rng = np.random.default_rng(3)
    scores: list[float] = []
    names: list[str] = []
    expected = {}
    for section, subsets in counts.items():
        sums = np.zeros(2)
        for name, n in subsets.items():
            margins = rng.choice([-1.0, 0.0, 1.0], n, p=[0.3, 0.2, 0.5])
            scores, names = [*scores, *margins], [*names, *[name] * n]
            weight = 1 if section == "Prior Sets" else 984 if name == "math-prm" else n
            sums += np.array([weight * np.mean(margins > 0), weight])
        expected[section] = sums[0] / sums[1]
    got = rm_accuracy.measure_pairs(scores, np.zeros(len(scores)).tolist(), subsets=names)["reward_bench"]
    assert {k: v["accuracy"] for k, v in got["sections"].items()} == pytest.approx(expected)
    total = sum(expected.values()) - expected["Prior Sets"] / 2
    assert got["score"]["accuracy"] == pytest.approx(total / 4.5) and got["missing_subsets"] == []
    few = rm_accuracy.measure_pairs([1.0], [0.0], subsets=["shp"])["reward_bench"]
    assert list(few["sections"]) == ["Prior Sets"] and len(few["missing_subsets"]) == 26


def test_best_of_four(tell: Callable[..., dict], length_fn: str) -> None:
    """RewardBench 2's columns: 1 where the right one is alone on top, 1/k where k share it, 0 below; subsets' mean."""
    rows = [
        {"id": "1", "prompt": "p", "chosen": ["xxxx"], "rejected": ["a", "bb", "ccc"], "subset": "Focus"},
        {"id": "2", "prompt": "q", "chosen": ["xx"], "rejected": ["a", "bb", "cc"], "subset": "Focus"},
        {"id": "3", "prompt": "r", "chosen": ["x"], "rejected": ["a", "bb", "cc"], "subset": "Math"},
    ]
    got = tell(rows, reward_fn=length_fn)
    assert got["n"] == 9 and got["best_of"]["subsets"] == pytest.approx({"Focus": 2 / 3, "Math": 0})
    assert got["best_of"]["mean"] == pytest.approx(4 / 9) and got["best_of"]["mean_of_subsets"] == pytest.approx(1 / 3)
    assert got["best_of"]["n"] == 3 and got["best_of"]["chance"] == 0.25
    for ranks in ([2, 1, 3, 3], [1, 1, 2, 2]):  # more than the best is ranked; two are best
        ranked = [{"prompt": "p", "responses": ["a", "bbb", "cc", "d"], "ranks": ranks}]
        assert "best_of" not in tell(ranked, reward_fn=length_fn)


# ----------------------------------------------------------------------------------------------------------- real data
def check_rule(rule: dict, expected: dict) -> None:
    """A length baseline against expected_dev.json's."""
    assert rule["n"] == expected["n"] and rule["ties"] == expected["equal"]
    assert rule["accuracy"] == pytest.approx(expected["accuracy_ties_half"], abs=1e-6)
    assert [rule["ci_low"], rule["ci_high"]] == pytest.approx(expected["wilson95"], abs=6e-5)
    assert rule["strict_accuracy"] * rule["n"] == pytest.approx(expected["longer"])


def test_hh_length_only_accuracy(tell: Callable[..., dict], length_fn: str) -> None:
    """hh-rlhf's two samples: "longer wins" exactly as expected, as baseline and as a scorer; shorter mirrors it."""
    folder = shared_or_skip("data", "hh_rlhf")
    expected = json.loads(shared_or_skip("data", "expected_dev.json").read_text())["hh_rlhf"]
    rows = [row for name in expected for row in read_jsonl(folder / f"{name}_test_dev.jsonl")]
    got = tell(rows, reward_fn=length_fn)
    assert got["rows"] == 800 and not got["lost"]
    for name, rules in expected.items():
        subset = got["subsets"][name.replace("_", "-")]
        check_rule(subset["baselines"]["longer"], rules["length_only_chars"])
        check_rule(subset, rules["length_only_chars"])
        assert subset["baselines"]["shorter"]["accuracy"] == pytest.approx(1 - subset["accuracy"])


def test_llmbar_length_only_accuracy(tell: Callable[..., dict]) -> None:
    """LLMBar's subsets, with every score equal: accuracy 0.5, and the baseline is not touched by it."""
    rows = read_jsonl(shared_or_skip("data", "preferences", "llmbar_dev.jsonl"))
    expected = json.loads(shared_or_skip("data", "expected_dev.json").read_text())["llmbar"]["length_only_chars"]
    pairs = []
    for i, row in enumerate(rows):
        chosen, rejected = (row["output_1"], row["output_2"])[:: 1 if row["label"] == 1 else -1]
        pair = {"id": i, "prompt": row["input"], "chosen": chosen, "rejected": rejected, "subset": row["subset"]}
        pairs.append({**pair, "chosen_score": 1, "rejected_score": 1})
    got = tell(pairs)
    assert got["accuracy"] == 0.5 and got["ties"] == len(rows) and got["strict_accuracy"] == 0
    for name, rule in expected.items():
        check_rule(got["subsets"][name]["baselines"]["longer"], rule)


def test_awkward_pairs_are_counted(
    tell: Callable[..., dict], length_fn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Identical pairs, differing prompts, empty replies: each counted under its reason, in the table and in JSON."""
    rows = read_jsonl(shared_or_skip("data", "hh_rlhf", "awkward_pairs_dev.jsonl"))
    kinds = Counter(row["kind"] for row in rows)
    good = read_jsonl(shared_or_skip("data", "hh_rlhf", "helpful_base_test_dev.jsonl"))[:5]
    got = tell([*rows, *good], reward_fn=length_fn)
    reasons = {"identical": "identical pair", "different_prompt": "pair with differing prompts"}
    reasons["empty_response"] = "empty prompt or response"
    assert got["n"] == 5 and got["rows"] == len(rows) + 5
    assert got["lost"] == {reasons[kind]: count for kind, count in kinds.items()}
    out = capsys.readouterr().out
    for reason, count in got["lost"].items():
        assert f"left out: {count} {reason} (first: line " in out


def test_every_format_gives_the_same(tell: Callable[..., dict], length_fn: str, tmp_path: Path) -> None:
    """Plain text, message lists, hh-rlhf dialogues, K-wise rows, .json and .parquet: one result."""
    import datasets

    plain = [{"prompt": f"Is {i} odd?", "chosen": "y" * (i % 5 + 1), "rejected": "n" * 3} for i in range(12)]

    def messages(text: str) -> list[dict]:
        return [{"role": "user", "content": text}]

    def answer(text: str) -> list[dict]:
        return [{"role": "assistant", "content": text}]

    sides = ("chosen", "rejected")
    forms = [
        [{**r, "prompt": messages(r["prompt"]), **{s: answer(r[s]) for s in sides}} for r in plain],
        [{s: messages(r["prompt"]) + answer(r[s]) for s in sides} for r in plain],
        [{s: f"\n\nHuman: {r['prompt']}\n\nAssistant: {r[s]}" for s in sides} for r in plain],
        [{"prompt": r["prompt"], "responses": [r["rejected"], r["chosen"]], "ranks": [2, 1]} for r in plain],
    ]
    expected = tell(plain, reward_fn=length_fn)
    assert expected["n"] == 12 and 0 < expected["accuracy"] < 1 and expected["ties"] == 2
    data = datasets.Dataset.from_list(plain)
    data.to_parquet(tmp_path / "p.parquet")
    (tmp_path / "p.json").write_text(json.dumps(plain))
    for form in [*forms, tmp_path / "p.parquet", tmp_path / "p.json"]:
        got = tell(form, reward_fn=length_fn)
        assert {**got, "args": 0, "dataset": 0} == {**expected, "args": 0, "dataset": 0}


# ----------------------------------------------------------------------------------------------------------- the world
def test_the_ceiling_of_the_world(tell: Callable[..., dict]) -> None:
    """The annotator's own utility: accuracy by the labels, an interval around the true ceiling, 1/TEMPERATURE."""
    annotator: Any = importlib.import_module("tiny.annotator")

    rows = read_jsonl(TINY / "preferences_eval.jsonl")
    ceiling = np.mean([max(row["p_chosen"], 1 - row["p_chosen"]) for row in rows])
    assert ceiling == pytest.approx(0.805, abs=5e-4)  # tiny/README.md
    got = tell(TINY / "preferences_eval.jsonl", reward_fn=UTILITY)
    chosen, rejected = (
        annotator.utility([r["prompt"] for r in rows], [r[side] for r in rows]) for side in ("chosen", "rejected")
    )
    margins = np.array(chosen) - np.array(rejected)
    assert got["accuracy"] == pytest.approx(np.mean((margins > 0) + 0.5 * (margins == 0)))
    for interval in (got, got["clustered"], got["within_prompt"]):
        assert interval["ci_low"] < ceiling < interval["ci_high"]
    fit = got["calibration"]
    assert fit["slope_ci_low"] < 1 / annotator.TEMPERATURE < fit["slope_ci_high"] and fit["slope_ci_low"] > 1.5
    pairs = read_jsonl(Path(got["args"]["output"]).with_name("out_pairs.jsonl"))
    assert [row["chosen_score"] - row["rejected_score"] for row in pairs] == pytest.approx(margins)


def test_rankings_within_prompts(tell: Callable[..., dict]) -> None:
    """K-wise rows: every strict pair once, and each prompt's accuracy has the same weight."""
    annotator: Any = importlib.import_module("tiny.annotator")

    rows = read_jsonl(TINY / "rankings.jsonl")
    shares, n = [], 0
    for row in rows:
        u = annotator.utility([row["prompt"]] * 4, row["responses"])
        pairs = pairs_of(row["ranks"])
        shares.append(np.mean([(u[i] > u[j]) + 0.5 * (u[i] == u[j]) for i, j in pairs]))
        n += len(pairs)
    got = tell(TINY / "rankings.jsonl", reward_fn=UTILITY)
    assert got["n"] == n < 6 * len(rows) and got["clustered"]["clusters"] == len(rows)
    assert got["within_prompt"]["mean"] == pytest.approx(np.mean(shares))
    assert got["within_prompt"]["standard_error"] == pytest.approx(np.std(shares, ddof=1) / math.sqrt(len(rows)))
    written = read_jsonl(Path(got["args"]["output"]).with_name("out_pairs.jsonl"))
    assert len(written) == n and len({row["id"] for row in written}) == n


def test_one_prompt_has_no_interval(tell: Callable[..., dict], capsys: pytest.CaptureFixture[str]) -> None:
    """Pairs that all share a prompt: their mean, and null in the file, - in the table for what one draw can't tell."""
    got = tell(scored(1.0, 2.0, -1.0, prompt="q"))
    assert got["within_prompt"]["mean"] == pytest.approx(2 / 3)
    assert [got["within_prompt"][name] for name in ("n", "standard_error", "ci_low", "ci_high")] == [
        1,
        None,
        None,
        None,
    ]
    assert "0.667 [-, -]" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e999", "NaN", "[" * 5000 + "]" * 5000])
def test_numbers_that_are_none(value: str, tell: Callable[..., dict], tmp_path: Path) -> None:
    """Beyond a float's range, NaN, or nested too deep: one line with the file's line."""
    row = '{"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": %s, "rejected_score": 0}'
    file = write_jsonl(tmp_path / "p.jsonl", [row % 1, row % value])
    with pytest.raises(rm_accuracy.UserError, match="p.jsonl, line 2: ") as error:
        tell(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


# -------------------------------------------------------------------------------------------------------------- models
def test_default_equals_reward_py(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bare run: reward.py's functions give the same pairs to 1e-5, and tiny/README.md the same accuracy."""
    got = main(Args(output=str(tmp_path / "out.json")))
    text = re.search(r"accuracy (0\.\d+ \[0\.\d+, 0\.\d+\]) of noisy", (TINY / "README.md").read_text())
    assert text and text[1] == f"{got['accuracy']:.3f} [{got['ci_low']:.3f}, {got['ci_high']:.3f}]"
    args = reward.Args(model=str(TINY / "reward"), dataset=Args.dataset)
    model, tokenizer, stop_ids, adapter = reward.load_model(args, CPU)
    model = reward.add_adapter(model, "reward", adapter, args)
    head = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
    from safetensors.torch import load_file

    head.weight.data.copy_(load_file(TINY / "reward" / "adapter_model.safetensors")[reward.HEAD_KEY])
    mean = json.loads((TINY / "reward" / "reward.json").read_text())["mean"]
    how, columns = (tokenizer, stop_ids, reward.Run(args, "reward", ())), ["prompt + chosen + rejected"]
    examples = reward.load_examples(Args.dataset, columns, reward.encode_comparison, *how)
    theirs = reward.scored_pairs(model, head, examples.select(range(60)), mean, args)
    ours = read_jsonl(tmp_path / "out_pairs.jsonl")
    assert len(ours) == 500 and [list(row) for row in ours[:60]] == [list(row) for row in theirs]
    ours = ours[:60]
    for name in ("chosen_score", "rejected_score"):
        assert [row.pop(name) for row in ours] == pytest.approx([row.pop(name) for row in theirs], abs=1e-5)
    assert ours == theirs
    out = capsys.readouterr().out
    assert "batch size 16 against 1" in out
    assert got["batch_invariance"]["max_difference"] < 1e-5 and got["batch_invariance"]["n_texts"] == 64


def test_run_folder_equals_plain_loading(reward_run: Path, base: Path, tell: Callable[..., dict]) -> None:
    """AutoModelForSequenceClassification and PEFT, one row at a time: raw score = ours + the mean of reward.json."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = read_jsonl(TINY / "preferences_eval.jsonl")[:6]
    got = tell(rows, reward_model=str(reward_run), batch_size=4)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, str(reward_run)).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    for row in read_jsonl(Path(got["args"]["output"]).with_name("out_pairs.jsonl")):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n"))["input_ids"]
        with torch.no_grad():
            assert row["chosen_score"] == pytest.approx(plain(torch.tensor([ids])).logits.item() - 0.25, abs=1e-5)


def test_a_damaged_run_folder_is_refused(
    reward_run: Path, tmp_path: Path, tell: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    """No head, no adapter file: one clear line each; without reward.json the scores are not centred, and it is said."""
    from safetensors.torch import load_file, save_file

    rows = read_jsonl(TINY / "preferences_eval.jsonl")[:2]
    folder = tmp_path / "run"
    shutil.copytree(reward_run, folder)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != rm_accuracy.HEAD_KEY}, file)
    with pytest.raises(UserError, match="no reward head"):
        tell(rows, reward_model=str(folder))
    file.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        tell(rows, reward_model=str(folder))
    shutil.copytree(reward_run, folder, dirs_exist_ok=True)
    (folder / "reward.json").unlink()
    centred, raw = (tell(rows, reward_model=str(source)) for source in (reward_run, folder))
    assert "neither centred nor checked" in capsys.readouterr().out and raw["accuracy"] == centred["accuracy"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole sequence classifier with one score: 2 random layers and tiny/base's tokenizer."""
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    config = tiny_llama(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id).config
    config.num_labels = 1
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("classifier")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_whole_classifier(classifier: Path, base: Path, tell: Callable[..., dict]) -> None:
    """It is read as its authors would: the template's whole text, at its last token; a language model is refused."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = read_jsonl(TINY / "preferences_eval.jsonl")[:8]
    got = tell(rows, reward_model=str(classifier), quant="none", dtype="float32")
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    tokenizer: Any = AutoTokenizer.from_pretrained(classifier)
    for row in read_jsonl(Path(got["args"]["output"]).with_name("out_pairs.jsonl")):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["rejected"]}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            states = model.model(ids).last_hidden_state[0, -1]
        assert row["rejected_score"] == pytest.approx((model.score.weight @ states).item(), abs=1e-5)
    for source in (str(base), str(TINY / "nothing")):
        with pytest.raises(UserError, match="neither a run folder|no such folder"):
            tell(rows, reward_model=source)


def test_padding_moves_no_score() -> None:
    """Texts of very different lengths in one batch, in any order, score as each alone."""
    scorer = rm_accuracy.load_scorer(str(TINY / "reward"), "none", "float32")
    texts = [[5, 9, 1], list(range(4, 300)), [7], list(range(2, 40)), [7, 1]]
    alone = rm_accuracy.score_ids(scorer, texts, 1)
    assert np.std(alone) > 0.1
    for size in (2, 3, 5, 16):
        assert rm_accuracy.score_ids(scorer, texts, size) == pytest.approx(alone, abs=1e-5)
    assert rm_accuracy.score_ids(scorer, texts[::-1], 5)[::-1] == pytest.approx(alone, abs=1e-5)
    with pytest.raises(rm_accuracy.BadRow, match="longer than the 512 tokens"):
        rm_accuracy.encode_text(scorer, "Hello", "red fox " * 400)


def test_batch_dependence_is_seen(tell: Callable[..., dict], monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer whose scores move with the batch size is shown up by the check."""
    original = rm_accuracy.score_ids

    def leaky(scorer: Any, texts: list, size: int) -> np.ndarray:
        return original(scorer, texts, size) + 0.01 * size

    monkeypatch.setattr(rm_accuracy, "check_canaries", lambda *_: None)
    monkeypatch.setattr(rm_accuracy, "score_ids", leaky)
    rows = read_jsonl(TINY / "preferences_eval.jsonl")[:3]
    got = tell(rows, reward_model=str(TINY / "reward"), batch_size=8)
    assert got["batch_invariance"]["max_difference"] == pytest.approx(0.07, abs=1e-5)


def test_compare_quant(tell: Callable[..., dict], capsys: pytest.CaptureFixture[str]) -> None:
    """NF4 against bf16: what two single runs say of each, paired; the run's own accuracy is its own precision's."""
    rows = read_jsonl(TINY / "preferences_eval.jsonl")[:12]
    both = tell(rows, reward_model=str(TINY / "reward"), compare_quant=True)
    assert (both["quant"], both["dtype"]) == ("none", "bfloat16")
    margins = {}
    for quant in ("none", "nf4"):
        one = tell(rows, reward_model=str(TINY / "reward"), quant=quant, dtype="bfloat16")
        assert both["compare_quant"][f"accuracy_{quant}"] == one["accuracy"]
        pairs = read_jsonl(Path(one["args"]["output"]).with_name("out_pairs.jsonl"))
        margins[quant] = np.array([[row["chosen_score"], row["rejected_score"]] for row in pairs])
    row = both["compare_quant"]
    assert both["accuracy"] == row["accuracy_none"]
    won = {quant: m[:, 0] > m[:, 1] for quant, m in margins.items()}
    assert row["difference"]["mean"] == pytest.approx(np.mean(won["nf4"] * 1.0 - won["none"]))
    assert row["flipped"] == (won["nf4"] != won["none"]).sum()
    assert row["max_shift"] == pytest.approx(np.abs(margins["nf4"] - margins["none"]).max()) and row["max_shift"] > 0.01
    assert 0.9 < row["rank_correlation"] < 1 and "4-bit base" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- bad input
def test_bad_files(tell: Callable[..., dict], length_fn: str, tmp_path: Path) -> None:
    """Half a line, wrong keys, one id for two prompts, scores that are no numbers: file, line and what was expected."""
    good = scored(1, -1, 2)
    lines = [json.dumps(row) for row in good]
    file = tmp_path / "data.jsonl"

    def says(data: list | Path, *parts: str, **flags: Any) -> None:
        with pytest.raises(UserError) as error:
            tell(data, **flags)
        for part in (str(file), *parts):
            assert part in str(error.value)

    says([lines[0], lines[1][:40]], "line 2", "half a line")
    says([lines[0], "[1, 2]"], "line 2", "expected a JSON object")
    says([], "no rows")
    says([{"question": "a", "answer": "b"}], "columns found: answer, question", "prompt + chosen + rejected")
    says([good[0], {**good[1], "id": "0"}], "lines 1 and 2", "id '0' has two prompts")
    says([good[0], lines[1].replace("-1", "NaN")], "line 2", "chosen_score", "finite")
    says([good[0], {**good[1], "rejected_score": "high"}], "line 2", "finite numbers")
    says([good[0], {**good[1], "rejected_score": None}], "line 2", "finite numbers")
    says([{k: v for k, v in row.items() if "score" not in k} for row in good], "line 1", "--reward_model")
    file.unlink()
    says(file, "no such file")
    for missing in (tmp_path / "no.parquet", tmp_path / "no.json"):
        with pytest.raises(UserError, match=r"no\.(parquet|json).*can't be read"):
            tell(missing, reward_fn=length_fn)


def test_bad_rows_are_counted(tell: Callable[..., dict], length_fn: str) -> None:
    """Rows of no use among good ones: left out under their reasons, the rest is measured."""
    good = [{"id": i, "prompt": f"p{i}", "chosen": "aaa", "rejected": "b"} for i in range(3)]
    bad = [
        good[0], {"prompt": "p"}, {"prompt": 7, "chosen": "a", "rejected": "b"}, {**good[1], "id": 9, "chosen": " "},
        {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]}, {"prompt": "p", "responses": ["a"], "ranks": [1, 2]},
        {"prompt": "p", "responses": ["a", "b"], "ranks": [1, "x"]}, {"chosen": "no dialogue", "rejected": "none"},
        {"prompt": "", "chosen": "a", "rejected": "b"}, {"chosen": ["a"], "rejected": ["b"]},
    ]  # fmt: skip
    got = tell([*good, *bad], reward_fn=length_fn)
    assert got["n"] == 3 and got["rows"] == 13 and sum(got["lost"].values()) == 10
    assert sorted(got["lost"].values()) == [1, 1, 1, 1, 1, 2, 3] and got["lost"]["the same id and texts again"] == 1


def test_reward_fn(tell: Callable[..., dict], tmp_path: Path) -> None:
    """None and NaN are counted; columns arrive; a wrong count, a raise and a word for a number stop the run."""
    (tmp_path / "f.py").write_text(
        "def some(prompts, responses, level, **columns):\n"
        "    return [None if n == 2 else float('nan') if n == 3 else n * len(y) for n, y in zip(level, responses)]\n"
        "def short(prompts, responses, **columns):\n    return [1.0]\n"
        "def broken(prompts, responses, **columns):\n    return 1 / 0\n"
        "def word(prompts, responses, **columns):\n    return ['good'] * len(responses)\n"
        "def infinite(prompts, responses, **columns):\n    return [float('inf')] * len(responses)\n"
    )
    rows = [{"prompt": "p", "chosen": "aa", "rejected": "b", "level": n} for n in (1, 2, -1, 3)]
    got = tell(rows, reward_fn=f"{tmp_path}/f.py:some")
    assert got["accuracy"] == 0.5 and got["n"] == 2 and list(got["lost"].values()) == [2]
    with pytest.raises(UserError, match="no pair has scores"):
        tell(rows[1:2], reward_fn=f"{tmp_path}/f.py:some")
    says = {"short": "1 values for 8", "broken": "ZeroDivisionError", "word": "ValueError", "infinite": "finite"}
    for name, text in says.items():
        with pytest.raises(UserError, match=text):
            tell(rows, reward_fn=f"{tmp_path}/f.py:{name}")
    with pytest.raises(UserError, match="no such file"):
        tell(rows, reward_fn="nowhere.py:some")


def test_module_arguments() -> None:
    """Scores that are no numbers and columns of another length are named, whoever calls."""
    for columns, text in (
        ({"rejected_scores": [0, math.nan]}, "pair 1"),
        ({"chosen_scores": [math.inf, 1], "rejected_scores": [math.inf, 0]}, "pair 0"),
        ({"chosen_scores": [], "rejected_scores": []}, "no pairs"),
        ({"prompts": ["a"]}, "2 pairs of scores, but a column of 1"),
    ):
        settings: dict[str, Any] = {"chosen_scores": [1, 2], "rejected_scores": [0, 0], **columns}
        with pytest.raises(UserError, match=text):
            rm_accuracy.measure_pairs(**settings)


def test_flags_that_contradict(tell: Callable[..., dict]) -> None:
    """Two scorers, no batch, quantisation without a model: said before anything is loaded."""
    rows = scored(1, 2)
    for flags, text in (
        ({"reward_model": "a", "reward_fn": "b"}, "give one of them"),
        ({"batch_size": 0}, "must be above 0"),
        ({"compare_quant": True}, "needs a --reward_model"),
    ):
        with pytest.raises(UserError, match=text):
            tell(rows, **flags)


# ----------------------------------------------------------------------------------------------- module, command line
def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags of the command line; a mistake is one line and an exit code; scored input is never overwritten."""
    file = write_jsonl(tmp_path / "out_pairs.jsonl", scored(1, -1, 0, "x"))
    line = ["rm_accuracy.py", "--dataset", str(file), "--output", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as stop:
        rm_accuracy.run_tool(main, Args)
    assert str(stop.value).startswith("rm_accuracy.py: ") and "line 4" in str(stop.value)
    text = write_jsonl(file, [*scored(1, -1, 0), {"prompt": "p"}]).read_text()
    rm_accuracy.run_tool(main, Args)
    assert json.loads((tmp_path / "out.json").read_text())["lost"] == {"a column is missing or null": 1}
    assert (
        file.read_text() == text
        and "left out: 1 a column is missing or null (first: line 4)" in capsys.readouterr().out
    )
    monkeypatch.setattr(sys, "argv", [*line, "--colour", "red"])
    with pytest.raises(SystemExit) as stop:
        rm_accuracy.run_tool(main, Args)
    assert stop.value.code == 2


def test_module_and_command_line_agree(tell: Callable[..., dict], tmp_path: Path) -> None:
    """evaluate.load of a copy with common.py beside it: the same dict as main's, from the pairs that main wrote."""
    got = tell(TINY / "rankings.jsonl", reward_fn=UTILITY)
    (tmp_path / "alone").mkdir()
    for name in ("common", "rm_accuracy"):
        shutil.copy(ROOT / "eval" / f"{name}.py", tmp_path / "alone")
    code = """if True:
        import evaluate, json, sys
        rows = [json.loads(line) for line in open(sys.argv[1])]
        names = ["chosen_score", "rejected_score", "subset", "prompt", "chosen_length", "rejected_length"]
        metric = evaluate.load("./rm_accuracy.py")
        few = metric.compute(chosen_scores=[1, 2, 0], rejected_scores=[0, 3, 0])
        print(json.dumps([metric.compute(**{n + "s": [row[n] for row in rows] for n in names}), few]))
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "hf" / "modules")}
    line = [sys.executable, "-c", code, str(tmp_path / "out_pairs.jsonl")]
    done = subprocess.run(line, cwd=tmp_path / "alone", env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    whole, few = json.loads(done.stdout.splitlines()[-1])
    assert len(whole) >= 11 and whole == {name: got[name] for name in whole}
    assert few["accuracy"] == 0.5 and few["ties"] == 1 and "baselines" not in few


# ---------------------------------------------------------------------------------------------------------------- slow
@pytest.mark.slow
def test_intervals_cover() -> None:
    """500 draws: Wilson's, the clustered and the slope's interval hold the truth in 93-97 % of them."""
    rng = np.random.default_rng(0)
    held: Counter = Counter()
    for _ in range(500):
        single = rng.random(200) < 0.8
        low_high = rm_accuracy.share_right(single.astype(float))
        held["wilson"] += low_high["ci_low"] <= 0.8 <= low_high["ci_high"]
        p = rng.beta(3, 1, 150)  # a prompt's own accuracy: mean 0.75, pairs of one prompt alike
        groups = np.repeat(np.arange(150), 4)
        won = (rng.random(600) < p[groups]).astype(float)
        for name, got in (
            ("clustered", rm_accuracy.clustered_interval(won, groups)),
            ("within", rm_accuracy.within_groups(won, groups)),
            ("naive", rm_accuracy.share_right(won)),
        ):
            held[name] += got["ci_low"] <= 0.75 <= got["ci_high"]
        true = rng.normal(0, 1.5, 300)
        margin = 2 * np.where(rng.random(300) < 1 / (1 + np.exp(-true)), true, -true)
        fit = rm_accuracy.calibration(margin, np.arange(300))
        held["slope"] += fit["slope_ci_low"] <= 0.5 <= fit["slope_ci_high"]
    naive = held.pop("naive")
    assert all(465 <= count <= 485 for count in held.values()), held
    assert naive < 450  # what Wilson's interval would do to pairs that share their prompts
