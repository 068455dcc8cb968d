"""eval/win_rate.py: AlpacaEval's and MT-Bench's figures, hand-worked files, coverage of intervals, bad files."""

import csv
import doctest
import json
import math
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from conftest import ROOT, shared_or_skip, write_jsonl
from scipy import stats
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from eval import win_rate

MODELS = (
    "alpaca-7b", "claude-2.1", "gpt-3.5-turbo-1106", "FuseChat-Llama-3.1-8B-Instruct", "vicuna-13b-v1.5-togetherai",
    "NullModel",
)  # fmt: skip
VERDICT = {"A": 1.0, "B": 0.0, "tie": 0.5, "error": None}
Row = dict[str, Any]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a .csv file."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def lc_data() -> Path:
    """AlpacaEval's difficulty, gamed rows and the preferences of six models."""
    return shared_or_skip("data", "alpaca_eval")


@pytest.fixture(scope="module")
def alpaca(lc_data: Path) -> dict[str, list[dict[str, str]]]:
    """Preferences of each model, in the order of AlpacaEval's instructions."""
    models = defaultdict(list)
    for row in read_csv(lc_data / "preferences_dev.csv"):
        models[row["model"]].append(row)
    return models


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Figures computed elsewhere, with other code."""
    return json.loads(shared_or_skip("data", "expected_dev.json").read_text())


def alpaca_judgments(rows: list[dict[str, str]]) -> list[Row]:
    """Judgments of AlpacaEval's preferences: ids are instruction indices, A is the model, no prompt."""
    return [
        {"id": int(r["instruction_index"]), "order": "ab", "preference": float(r["preference"]) - 1,
         "length_a": int(r["len_model"]), "length_b": int(r["len_ref"])}
        for r in rows
    ]  # fmt: skip


def annotations(rows: list[dict[str, str]]) -> list[Row]:
    """The same as AlpacaEval writes them: outputs of the right lengths, no index."""
    return [
        {"instruction": r["instruction"], "output_1": "x" * int(r["len_ref"]), "generator_1": "baseline",
         "output_2": "y" * int(r["len_model"]), "generator_2": r["model"], "preference": float(r["preference"]),
         "annotator": "weighted_alpaca_eval_gpt4_turbo", "dataset": r["dataset"]}
        for r in rows
    ]  # fmt: skip


def run(path: Path, other: Path | None = None, **flags: Any) -> dict[str, Any]:
    """The result of win_rate.main on one or two files."""
    files = [str(path)] + ([str(other)] if other else [])
    return win_rate.main(win_rate.Args(output=str(path.parent / "result.json"), **flags), files)


def lc_by_sklearn(rows: list[dict[str, str]], lc_data: Path, index: list[int] | None = None) -> float:
    """AlpacaEval's LC win-rate by scikit-learn, each row twice with weights p and 1 - p; `index` replaces the rows'."""
    table = {
        r["instruction_index"]: r["instruction_difficulty"] for r in read_csv(lc_data / "instruction_difficulty.csv")
    }
    gamed = read_csv(lc_data / "gamed_baseline_rows.csv")
    p = np.array([float(r["preference"]) - 1 for r in rows])
    delta = np.array([int(r["len_ref"]) - int(r["len_model"]) for r in rows])
    names = [r["instruction_index"] for r in rows] if index is None else map(str, index)
    difficulty = np.array([float(table[i]) for i in names])
    x = np.column_stack([np.tanh(delta / delta.std(ddof=1)), difficulty, np.ones(len(p))])
    gamed_x = [[math.tanh(float(g["std_delta_len"])), float(g["instruction_difficulty"]), 0.0] for g in gamed]
    x, labels = np.vstack([x, gamed_x]), np.r_[p, [float(g["preference_equivalent"]) for g in gamed]]
    weights = np.r_[np.ones(len(p)), np.full(len(gamed), 0.1)]
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(np.vstack([x, x]), np.repeat([1, 0], len(x)), np.r_[weights * labels, weights * (1 - labels)])
    return 100 * float(expit(x[: len(p), 1:] @ model.coef_[0, 1:]).mean())


# --------------------------------------------------------------------------------------------------------- AlpacaEval
def test_doctests() -> None:
    """The numbers in the docstrings."""
    result = doctest.testmod(win_rate)
    assert result.failed == 0 and result.attempted >= 12


@pytest.mark.parametrize("model", MODELS)
def test_alpaca_eval(model: str, alpaca: Any, expected: Any, lc_data: Path, tmp_path: Path) -> None:
    """Win-rate, SE and discrete win-rate to 1e-6; LC within 0.12 of the leaderboard and 0.001 of scikit-learn."""
    path = write_jsonl(tmp_path / "judgments.jsonl", alpaca_judgments(alpaca[model]))
    result, target = run(path, lc="alpaca_eval", lc_data=str(lc_data), bootstrap=2), expected["alpaca_eval"][model]
    assert result["n"] == target["n"] == 805
    for name in ("win_rate", "standard_error", "discrete_win_rate"):
        assert result[name] == pytest.approx(target[name], abs=1e-6), name
    lc = result["length_controlled_win_rate"]
    official = next(r for r in read_csv(lc_data / "official_dev.csv") if r["model"] == model)
    assert abs(lc - float(official["length_controlled_winrate"])) < 0.12
    assert abs(lc - target["lc_official"]) < 0.12
    assert lc == pytest.approx(target["lc_unpenalised_true_alignment"], abs=1e-3)
    assert lc == pytest.approx(lc_by_sklearn(alpaca[model], lc_data), abs=1e-3)
    assert json.loads((tmp_path / "result.json").read_text()) == result


@pytest.mark.parametrize(
    "model", [MODELS[3], *(pytest.param(m, marks=pytest.mark.slow) for m in MODELS if m != MODELS[3])]
)
def test_lc_error_is_a_bootstraps(model: str, alpaca: Any, expected: Any, lc_data: Path, tmp_path: Path) -> None:
    """Within 10 % of a bootstrap made elsewhere, and well above the spread of the predictions that upstream prints."""
    path = write_jsonl(tmp_path / "judgments.jsonl", alpaca_judgments(alpaca[model]))
    result, target = run(path, lc="alpaca_eval", lc_data=str(lc_data)), expected["alpaca_eval"][model]
    assert result["lc_standard_error"] == pytest.approx(target["lc_bootstrap_se"], rel=0.1)
    assert result["lc_standard_error"] > 1.5 * target["lc_sem_of_predictions"]
    assert result["lc_ci_low"] < result["length_controlled_win_rate"] < result["lc_ci_high"]
    width = (result["lc_ci_high"] - result["lc_ci_low"]) / (2 * 1.96)
    assert width == pytest.approx(result["lc_standard_error"], rel=0.15)


@pytest.mark.parametrize("form", ["index", "text_id", "prompt", "numbered", "annotations", "annotations_index"])
def test_lc_survives_gaps_and_disorder(form: str, alpaca: Any, lc_data: Path, tmp_path: Path) -> None:
    """Rows shuffled, 40 of them missing and 20 without a preference: instructions are found, never counted off."""
    model = alpaca["gpt-3.5-turbo-1106"]
    order = np.random.default_rng(0).permutation(805)
    left = [model[i] for i in order[:765]]
    rows = annotations(left) if form.startswith("annotations") else alpaca_judgments(left)
    for place, (row, r) in enumerate(zip(rows, left, strict=True)):
        if form == "numbered":  # ids that look like indices and are none
            row |= {"id": place, "prompt": r["instruction"]}
        if form == "text_id":
            row["id"] = r["instruction"]
        if form == "prompt":  # ids mean nothing here
            row |= {"id": f"row-{r['instruction_index']}", "prompt": [{"role": "user", "content": r["instruction"]}]}
        if form == "annotations_index":
            row["instruction_index"] = int(r["instruction_index"])
    for row in rows[:20]:
        row["preference"] = None
    if form == "annotations_index":
        del rows[1]["preference"]
    path = tmp_path / "judgments.json"
    path.write_text(json.dumps(rows)) if "annotations" in form else write_jsonl(path, rows)
    result = run(path, lc="alpaca_eval", lc_data=str(lc_data), bootstrap=2)
    assert (result["n"], result["lost"], result["rows"]) == (745, 20, 765)
    p = np.array([float(r["preference"]) - 1 for r in left[20:]])
    assert result["win_rate"] == pytest.approx(100 * p.mean(), abs=1e-9)
    assert result["standard_error"] == pytest.approx(100 * p.std(ddof=1) / math.sqrt(745), abs=1e-9)
    lc = lc_by_sklearn(left[20:], lc_data)
    assert result["length_controlled_win_rate"] == pytest.approx(lc, abs=1e-3)
    assert abs(lc_by_sklearn(left[20:], lc_data, list(range(745))) - lc) > 1  # what counting off would give


def test_lc_never_by_place(alpaca: Any, lc_data: Path, tmp_path: Path) -> None:
    """A folder without texts: annotations without an index are refused in any order; a csv with texts finds them."""
    for name in ("instruction_difficulty.csv", "gamed_baseline_rows.csv"):  # as a spreadsheet writes them, with a BOM
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (lc_data / name).read_bytes())
    rows, path = annotations(alpaca["claude-2.1"]), tmp_path / "annotations.json"
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(805)]
    within_sets = sorted(rows, key=lambda row: (row["dataset"], row["instruction"]))
    for given in (rows, shuffled, within_sets, rows[:7] + rows[8:]):
        path.write_text(json.dumps(given))
        with pytest.raises(win_rate.UserError, match="row 1: .* is no instruction index .* give every row its index"):
            run(path, lc="alpaca_eval", lc_data=str(tmp_path))
    path.write_text(json.dumps(shuffled))
    texts = [f'{i},"{row["instruction"].replace(chr(34), 2 * chr(34))}"\n' for i, row in enumerate(rows)]
    (tmp_path / "texts.csv").write_text("\ufeffinstruction_index,instruction\n" + "".join(texts), encoding="utf-8")
    result = run(path, lc="alpaca_eval", lc_data=str(tmp_path), bootstrap=2)
    assert result["lc_aligned_by"] == "prompt"
    assert result["length_controlled_win_rate"] == pytest.approx(25.1965, abs=1e-3)


@pytest.mark.parametrize("prompt", [[], ["text"], [{"role": "user"}], {"text": "x"}, 7])
def test_lc_with_a_prompt_of_another_type(prompt: Any, alpaca: Any, lc_data: Path, tmp_path: Path) -> None:
    """A prompt that is no text and no message list says nothing; then the id has to."""
    rows = alpaca_judgments(alpaca["alpaca-7b"][:50])
    rows[3]["prompt"] = prompt
    path = write_jsonl(tmp_path / "judgments.jsonl", rows)
    assert run(path, lc="alpaca_eval", lc_data=str(lc_data), bootstrap=2)["lc_aligned_by"] == "id"
    rows[3]["id"] = "x"
    with pytest.raises(win_rate.UserError, match="line 4: id 'x' is no instruction index"):
        run(write_jsonl(path, rows), lc="alpaca_eval", lc_data=str(lc_data), bootstrap=2)


def test_lc_refuses_doubt(alpaca: Any, lc_data: Path, tmp_path: Path) -> None:
    """Ids that contradict a prompt where other rows need them; an instruction that occurs twice; unknown prompts."""
    rows = alpaca_judgments(alpaca["alpaca-7b"][:50])
    rows[3] |= {"prompt": alpaca["alpaca-7b"][4]["instruction"]}
    twice = {"id": "x", "prompt": alpaca["alpaca-7b"][4]["instruction"]}
    for change, message in (({}, "line 4: the prompt is instruction 4, but the id is '3'"),
                            ({"id": "x", "prompt": "Nobody asked this"}, "line 4: id 'x' is no instruction index"),
                            (twice, "line 4: its instruction occurs twice")):  # fmt: skip
        rows[3] |= change
        path = write_jsonl(tmp_path / "judgments.jsonl", rows)
        with pytest.raises(win_rate.UserError, match=message):
            run(path, lc="alpaca_eval", lc_data=str(lc_data), bootstrap=2)


def test_ties_of_alpaca_eval(tmp_path: Path) -> None:
    """0 and 1.5 are ties, 1 the baseline's win, 2 the model's; 0.5 is nothing."""
    rows = [{"instruction": f"q{i}", "output_1": "a", "output_2": "bc", "preference": p}
            for i, p in enumerate([0, 1.5, 1, 2, 2, 1.9])]  # fmt: skip
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    result = run(path)
    assert result["win_rate"] == pytest.approx(100 * (0.5 + 0.5 + 0 + 1 + 1 + 0.9) / 6)
    assert result["discrete_win_rate"] == pytest.approx(100 * 4 / 6) and result["ties"] == 2
    rows[2]["preference"] = 0.5
    path.write_text(json.dumps(rows))
    with pytest.raises(win_rate.UserError, match="row 3: preference is 0.5"):
        run(path)


# ----------------------------------------------------------------------------------------------------------- MT-Bench
@pytest.fixture(scope="module")
def swaps() -> dict[str, dict[tuple[str, str], list[dict[str, str]]]]:
    """Verdicts in both orders by judge and pair of models."""
    judges: dict[str, dict] = defaultdict(lambda: defaultdict(list))
    for row in read_csv(shared_or_skip("data", "judges", "mt_bench_swap_dev.csv")):
        judges[row["judge"]][row["model_a"], row["model_b"]].append(row)
    return judges


def swap_arrays(rows: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """P(A wins) when shown first and second; verdict_ba names the slot, in which A is the answer shown first: B."""
    ab = np.array([VERDICT[r["verdict_ab"]] for r in rows], dtype=float)
    return ab, 1 - np.array([VERDICT[r["verdict_ba"]] for r in rows], dtype=float)


@pytest.mark.parametrize("judge", ["gpt-4o-mini", "Qwen2.5-7B-Instruct"])
def test_swap_table(judge: str, swaps: Any, expected: Any) -> None:
    """Consistency, slot shares and the position logit with its clustered SE, over all 15 pairs of six models."""
    rows = [row for pair in swaps[judge].values() for row in pair]
    target, (ab, ba) = expected["mt_bench_swap"][judge], swap_arrays(rows)
    table = win_rate.swap_table(ab, ba)
    assert table["both_orders"] == target["n_both_parsed"]
    names = {"swap_consistency": "swap_consistency", "both_first": "first_slot_wins_both",
             "both_second": "second_slot_wins_both", "first_slot_share": "first_slot_share"}  # fmt: skip
    for ours, theirs in names.items():
        assert table[ours] == pytest.approx(target[theirs], abs=1e-4), ours
    models = sorted({name for pair in swaps[judge] for name in pair})
    strengths = np.array([[(r["model_a"] == m) - (r["model_b"] == m) for m in models[1:]] for r in rows], dtype=float)
    first, both = np.r_[ab, 1 - ba], np.tile(~np.isnan(ab + ba), 2)
    ids = np.tile([r["question_id"] for r in rows], 2)
    logit, error = win_rate.position_logit(first[both], np.vstack([strengths, -strengths])[both], ids[both])
    assert logit == pytest.approx(target["position_logit"], abs=1e-3)
    assert error == pytest.approx(target["position_logit_se_clustered_by_question"], abs=1e-3)


@pytest.mark.parametrize("form", ["judgments", "fastchat"])
@pytest.mark.parametrize("judge", ["gpt-4o-mini", "Qwen2.5-7B-Instruct"])
def test_mtbench_win_rates(judge: str, form: str, swaps: Any, expected: Any, tmp_path: Path) -> None:
    """Every model's win-rate, orders averaged or inconsistent = tie, from files of its pairs; unparsed ones dropped."""
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (a, b), rows in swaps[judge].items():
        games, path = [], tmp_path / "file.jsonl"
        for r in rows:
            mine = {"question_id": int(r["question_id"]), "model_1": a, "model_2": b, "judge": [judge, "pair-v2"]}
            slots = {"A": ("model_1", "model_2"), "B": ("model_2", "model_1")}
            winners = [slots[v][i] if v in slots else v for i, v in enumerate((r["verdict_ab"], r["verdict_ba"]))]
            fastchat = mine | {"g1_winner": winners[0], "g2_winner": winners[1], "turn": 1}
            ab, ba = (x.tolist()[0] for x in swap_arrays([r]))
            for order, p in (("ab", ab), ("ba", ba)) if form == "judgments" else ():
                value = {"preference": None, "error": "unparsed"} if math.isnan(p) else {"preference": p}
                games.append({"id": r["question_id"], "order": order, "model_a": a, "model_b": b, **value})
            games += [fastchat] if form == "fastchat" else []
        write_jsonl(path, games)
        for rule in ("average", "mtbench"):
            result = run(path, rule=rule)
            assert result["questions_left_out"] == sum("error" in (r["verdict_ab"], r["verdict_ba"]) for r in rows)
            for model, share in ((a, result["win_rate"]), (b, 100 - result["win_rate"])):
                totals[model, rule][0] += share * result["questions"]
                totals[model, rule][1] += result["questions"]
    for rule, name in (("average", "swap_averaged"), ("mtbench", "mtbench_inconsistent_is_tie")):
        for model, rate in expected["mt_bench_swap"][judge][f"win_rate_{name}"].items():
            assert totals[model, rule][0] / totals[model, rule][1] == pytest.approx(100 * rate, abs=1e-3), (model, rule)


# ------------------------------------------------------------------------------------------------------------ by hand
def rows_of(*games: tuple, **columns: Any) -> list[Row]:
    """Judgments (id, order, preference) with the same columns."""
    return [{"id": i, "order": order, "preference": p, **columns} for i, order, p in games]


def test_by_hand(tmp_path: Path) -> None:
    """Four questions: a win, an inconsistent one (tie), half a loss, one with an order lost, one without it."""
    rows = rows_of(("q1", "ab", 1.0), ("q1", "ba", 1.0), ("q2", "ab", 1.0), ("q2", "ba", 0.0), ("q3", "ab", 0.5),
                   ("q3", "ba", 0.0), ("q4", "ab", 1.0), ("q4", "ba", None))  # fmt: skip
    rows[-1]["error"] = "truncated"
    rows += rows_of(("q5", "ab", 1.0))  # its other order is not in the file
    result = run(write_jsonl(tmp_path / "j.jsonl", rows))
    assert result["win_rate"] == pytest.approx(100 * (1 + 0.5 + 0.25) / 3)
    assert result["standard_error"] == pytest.approx(100 * np.std([1, 0.5, 0.25], ddof=1) / math.sqrt(3))
    assert result["discrete_win_rate"] == pytest.approx(50) and result["ties"] == 1
    counts = {"n": 3, "questions": 3, "rows": 9, "lost": 1, "one_order": 2, "questions_left_out": 2, "both_orders": 3}
    assert {name: result[name] for name in counts} == counts and result["lost_by_reason"] == {"truncated": 1}
    assert result["swap_consistency"] == pytest.approx(1 / 3) and result["both_first"] == pytest.approx(1 / 3)
    assert result["both_second"] == 0 and result["first_slot_share"] == pytest.approx((0.5 + 1 + 0.75) / 3)
    low, high = stats.ttest_1samp([100, 50, 25], 0).confidence_interval()
    assert (result["ci_low"], result["ci_high"]) == pytest.approx((max(low, 0), min(high, 100)))
    strict = run(tmp_path / "j.jsonl", rule="mtbench")
    assert strict["win_rate"] == pytest.approx(100 * (1 + 0.5 + 0.5) / 3)
    keys = (
        "win_rate standard_error ci_low ci_high discrete_win_rate length_controlled_win_rate lc_standard_error n ties"
    )
    assert set(keys.split()) <= result.keys() and result["length_controlled_win_rate"] is None


def test_turns_of_an_id_are_one_draw(tmp_path: Path) -> None:
    """Two turns are averaged first: the standard error is over ids, and copying a turn changes nothing."""
    values = np.random.default_rng(1).integers(0, 3, size=(40, 2)) / 2
    rows = [r | {"turn": t + 1, "category": "ab"[i % 2]} for i in range(40) for t in range(2)
            for r in rows_of((i, "ab", values[i, t]))]  # fmt: skip
    result = run(write_jsonl(tmp_path / "j.jsonl", rows))
    means = values.mean(axis=1)
    assert result["n"] == 40 and result["questions"] == 80
    assert result["win_rate"] == pytest.approx(100 * means.mean())
    assert result["standard_error"] == pytest.approx(100 * stats.sem(means))
    half = 100 * stats.norm.ppf(0.975) * stats.sem(means)
    assert (result["ci_low"], result["ci_high"]) == pytest.approx(
        (100 * means.mean() - half, 100 * means.mean() + half)
    )
    parts = result["by_category"]
    assert parts["a"]["win_rate"] == pytest.approx(100 * means[::2].mean()) and parts["b"]["n"] == 20


@pytest.mark.parametrize(("wins", "n"), [(10, 10), (0, 200), (3, 200), (12, 20)])
def test_interval_of_few_or_extreme_wins(wins: int, n: int) -> None:
    """Plain wins and losses near the ends or of few questions get the exact binomial interval, never a point."""
    found = win_rate.win_rate_interval(np.repeat([1.0, 0.0], [wins, n - wins]), 0)
    exact = stats.binomtest(wins, n).proportion_ci(method="exact")
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((100 * exact.low, 100 * exact.high))
    assert found["interval"] == "Clopper-Pearson"


def test_interval_of_soft_values_near_an_end(alpaca: Any) -> None:
    """BCa where the mean is below 5 %: not symmetric, never below 0, near the known interval of alpaca-7b's kind."""
    values = np.array([float(r["preference"]) - 1 for r in alpaca["alpaca-7b"]])
    found = win_rate.win_rate_interval(values, 0)
    ours = stats.bootstrap(
        (values,), np.mean, method="BCa", batch=500, rng=np.random.default_rng(5)
    ).confidence_interval
    assert found["interval"] == "BCa" and found["ci_high"] - found["win_rate"] > found["win_rate"] - found["ci_low"] > 0
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((100 * ours.low, 100 * ours.high), abs=0.08)


def test_lc_glm(tmp_path: Path) -> None:
    """The GLM's win-rate equals a direct likelihood maximisation, and undoes a bias for length and for a slot."""
    rng = np.random.default_rng(0)
    n, rows, data = 3000, [], []
    for i in range(n):
        a, b = rng.integers(100, 2000, size=2) + np.array([600, 0])  # A is longer on the whole
        for order, side in (("ab", 0.5), ("ba", -0.5)):
            logit = -0.5 + 1.2 * side + 1.5 * np.tanh((a - b) / 900)
            p = float(rng.random() < expit(logit))
            rows.append(rows_of((i, order, p), length_a=int(a), length_b=int(b))[0])
            data.append((p, b - a, side))
    result = run(write_jsonl(tmp_path / "j.jsonl", rows), lc="glm", bootstrap=60)
    p, delta, side = np.array(data, dtype=float).T
    x = np.column_stack([np.ones(len(p)), np.tanh(delta / delta.std(ddof=1)), side])
    best = minimize(lambda w: np.logaddexp(0, (1 - 2 * p) * (x @ w)).sum(), np.zeros(3), tol=1e-10).x
    assert result["length_controlled_win_rate"] == pytest.approx(100 * expit(best[0]), abs=0.01)
    truth = 100 * expit(-0.5)  # 37.8
    assert abs(result["length_controlled_win_rate"] - truth) < 3 * result["lc_standard_error"] < 6
    assert result["win_rate"] > truth + 5
    assert result["position_logit"] == pytest.approx(0.6, abs=0.15)  # per slot: half of 1.2, blurred by length


def test_lc_glm_without_a_maximum(tmp_path: Path) -> None:
    """A side that always wins has no finite fit: no number, rather than a wild one."""
    rows = rows_of(*((i, "ab", 1.0) for i in range(40)))
    for i, row in enumerate(rows):
        row |= {"length_a": 10 + i, "length_b": 20}
    result = run(write_jsonl(tmp_path / "j.jsonl", rows), lc="glm", bootstrap=20)
    assert result["win_rate"] == 100 and result["length_controlled_win_rate"] is None


# ---------------------------------------------------------------------------------------------------------- two files
def test_difference(alpaca: Any, tmp_path: Path) -> None:
    """Paired and unpaired errors, t interval, p; the detectable difference is found by 80 % of simulated tests."""
    names = ("FuseChat-Llama-3.1-8B-Instruct", "claude-2.1")
    one, two = (write_jsonl(tmp_path / f"{name}.jsonl", alpaca_judgments(alpaca[name])) for name in names)
    result = run(one, two)
    a, b = (np.array([float(r["preference"]) - 1 for r in alpaca[name]]) for name in names)
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    assert result["difference"] == pytest.approx(100 * (a - b).mean()) and result["n"] == 805
    assert result["paired_se"] == pytest.approx(100 * np.std(a - b, ddof=1) / math.sqrt(805))
    assert result["unpaired_se"] == pytest.approx(100 * math.hypot(stats.sem(a), stats.sem(b)))
    assert (result["ci_low"], result["ci_high"]) == pytest.approx((100 * low, 100 * high))
    assert result["p_value"] == pytest.approx(test.pvalue)
    assert result["first"]["win_rate"] == pytest.approx(63.331583, abs=1e-6)
    d = np.random.default_rng(0).normal(result["detectable_difference"], 100 * np.std(a - b, ddof=1), (2000, 805))
    assert np.mean(stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)


def test_difference_of_unequal_sets(tmp_path: Path) -> None:
    """A question of one file only is named with its line; --common leaves it out, and what is lost is counted."""
    games = [(f"q{i}", "ab", float(i % 3 == 0)) for i in range(12)]
    one = write_jsonl(tmp_path / "one.jsonl", rows_of(*games))
    two = write_jsonl(tmp_path / "two.jsonl", rows_of(*games[:7], *games[8:11], ("q11", "ab", None)))
    with pytest.raises(win_rate.UserError, match=r"one.jsonl, line 8: id 'q7' is not in .*two.jsonl; 1 questions"):
        run(one, two)
    with pytest.raises(win_rate.UserError, match=r"one.jsonl, line 8: id 'q7'"):
        run(two, one)
    result = run(one, two, common=True)
    assert (result["questions"], result["only_in_first"], result["lost_in_one"]) == (10, 1, 1)
    assert result["difference"] == 0
    other = write_jsonl(tmp_path / "other.jsonl", rows_of(*games, model_b="else"))
    with pytest.raises(win_rate.UserError, match="other.jsonl, line 1: model_b is 'else'"):
        run(one, other)
    one, other = (write_jsonl(tmp_path / f"{p}.jsonl", rows_of(*games, prompt=p)) for p in ("yes", "no"))
    with pytest.raises(win_rate.UserError, match="id 'q0' has different prompts in .*yes.jsonl, line 1"):
        run(one, other)
    one, other = (write_jsonl(tmp_path / f"{p}.jsonl", rows_of(*games, prompt=p, turn=2)) for p in ("yes", "no"))
    assert run(one, other)["questions"] == 12  # what the assistant said before differs


# ---------------------------------------------------------------------------------------------------------- bad files
GOOD = '{"id": "q1", "order": "ab", "preference": 1.0}'
BAD = {
    "half a line": ([GOOD, GOOD[:25]], "line 2: not JSON, or half a line"),
    "no object": ([GOOD, "[1]"], "line 2: expected a JSON object"),
    "wrong key": ([GOOD, GOOD.replace("preference", "score_a")], "line 2: no key preference; keys found: id, order"),
    "empty": ([""], "no rows"),
    "order": ([GOOD.replace('"ab"', '"AB"')], "line 1: order is 'AB'"),
    "range": ([GOOD.replace("1.0", "2")], r"line 1: preference is 2, expected a number in \[0, 1\]"),
    "text": ([GOOD.replace("1.0", '"A"')], "line 1: preference is 'A'"),
    "nan": ([GOOD, GOOD.replace("1.0", "NaN")], "line 2: preference is nan"),
    "beyond floats": ([GOOD.replace("1.0", "1" + "0" * 400)], "line 1: preference is inf"),
    "length beyond floats": ([GOOD.replace("}", f', "length_a": 1{"0" * 400}}}')], "line 1: length_a is inf"),
    "deep": ([GOOD, GOOD.replace("}", f', "x": {"[" * 5000}{"]" * 5000}}}')], "line 2: not JSON, or half a line"),
    "deep annotations": (["[" * 5000 + "]" * 5000], "not JSON, or half a file"),
    **{f"{name} is a {kind}": ([GOOD, GOOD.replace("}", f', "{name}": {value}}}')], f"line 2: {name} is ")
       for kind, value in (("list", "[1]"), ("dict", '{"a": 1}'))
       for name in ("turn", "category", "judge", "model_a", "model_b")},
    "fastchat's list": (['{"question_id": 1, "model_1": "x", "model_2": "y", "g1_winner": [1], "g2_winner": "tie"}'],
                        r"line 1: g1_winner is '\[1\]', expected one of model_1, model_2, tie, error"),
    "fastchat's null": (['{"question_id": 1, "model_1": "x", "model_2": "y", "g1_winner": "tie", "g2_winner": null}'],
                        "line 1: g2_winner is 'None'"),
    "fastchat's model": (['{"question_id": 1, "model_1": [], "model_2": "y", "g1_winner": "tie", "g2_winner": "tie"}'],
                         "line 1: model_a is"),
    **{f"output {value}": ([f'[{{"instruction": "q", "output_1": "a", "output_2": {value}, "preference": 1}}]'],
                           "row 1: output_2 is .*, expected a string or null") for value in ("7", "0", "[]", '["a"]')},
    "annotations' nan": (['[{"instruction": "q", "output_1": "a", "output_2": "b", "preference": NaN}]'],
                         "row 1: preference is nan"),
    "annotations' list": (['[{"instruction": "q", "output_1": "", "output_2": "", "dataset": [1]}, {"preference": 1}]'],
                          "row 1: category is"),
    "rating's nan": (['{"id": 1, "model": "m", "rating": NaN}'], "line 1: rating is nan"),
    "rating's model": (['{"id": 1, "model": ["m"], "rating": 1}'], "line 1: model is"),
    "id": ([GOOD.replace('"q1"', "[1]")], r"line 1: id is \[1\]"),
    "duplicate": ([GOOD, GOOD.replace("1.0", "0.0")], "line 2: id 'q1', turn '1', order 'ab' was judged before, .* 1"),
    "both": ([GOOD.replace("}", ', "error": "empty"}')], "line 1: has a preference and an error"),
    "no verdict": ([GOOD.replace("1.0", "null")], "no question has a verdict in any order"),
    "models": ([GOOD.replace("}", f', "model_a": "{m}", "turn": {i}}}') for i, m in enumerate("xy", 1)],
               "line 2: mixed runs, model_a is 'y' but 'x' in .*line 1; choose one with --model_a"),
    "judges": ([GOOD.replace("}", f', "judge": "{m}", "turn": {i}}}') for i, m in enumerate("xy", 1)],
               "line 2: mixed runs, judge is 'y'"),
    "judge's prompts": ([GOOD.replace("q1", m).replace("}", f', "prompt_sha": "{m}"}}') for m in "xy"],
                        "line 2: mixed runs, prompt_sha is 'y'"),
    "prompts": ([GOOD.replace("ab", o).replace("}", f', "prompt": "{o}"}}') for o in ("ab", "ba")],
                "line 2: id 'q1' has another prompt than in .*line 1"),
    "fastchat": (['{"question_id": 1, "model_1": "x", "model_2": "y", "g1_winner": "x", "g2_winner": "tie"}'],
                 "line 1: g1_winner is 'x'"),
    "annotations": (['[{"instruction": "q", "output_1": "a", "preference": 1}]'], "row 1: no key output_2"),
    "half annotations": (['[{"instruction": "q", "output_1"'], "not JSON, or half a file"),
    "list": (["[1, 2]"], "expected AlpacaEval's annotations"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name: str, tmp_path: Path) -> None:
    """One message that names the file, the line where there is one, and what was expected; nothing is written."""
    lines, message = BAD[name]
    path = write_jsonl(tmp_path / "bad.jsonl", lines)
    with pytest.raises(win_rate.UserError, match=message) as caught:
        run(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "result.json").exists()


def test_bad_flags(tmp_path: Path, lc_data: Path) -> None:
    """Flags that contradict each other, lengths or tables that --lc lacks, three files, no file."""
    path = write_jsonl(tmp_path / "j.jsonl", [GOOD])
    for flags, message in (
        ({"lc": "alpaca_eval"}, "--lc_data DIR go together"),
        ({"lc_data": "x"}, "--lc_data DIR go together"),
        ({"lc": "glm"}, "line 1: --lc needs length_a"),
        ({"bootstrap": 1}, "--bootstrap is 1"),
        ({"judge": "me"}, "no row with .*me"),
    ):
        with pytest.raises(win_rate.UserError, match=message):
            run(path, **flags)
    lengths = write_jsonl(tmp_path / "l.jsonl", rows_of((1, "ab", 1.0), length_a=3, length_b=4))
    with pytest.raises(win_rate.UserError, match="instruction_difficulty.csv: no such file"):
        run(lengths, lc="alpaca_eval", lc_data=str(tmp_path))
    shutil.copy(lc_data / "gamed_baseline_rows.csv", tmp_path)
    (tmp_path / "instruction_difficulty.csv").write_text("instruction_index,difficulty\n1,0.5\n")
    with pytest.raises(win_rate.UserError, match="expected columns instruction_index, instruction_difficulty"):
        run(lengths, lc="alpaca_eval", lc_data=str(tmp_path))
    with pytest.raises(win_rate.UserError, match="3 files"):
        win_rate.main(win_rate.Args(), ["a", "b", "c"])
    with pytest.raises(win_rate.UserError, match="nowhere.jsonl: no such file"):
        win_rate.main(win_rate.Args(), ["nowhere.jsonl"])


def test_mixed_runs_are_chosen_from(tmp_path: Path) -> None:
    """--model_b picks one pair of a file with several; what is left aside is counted."""
    games = [(i, "ab", 1.0) for i in range(5)]
    rows = rows_of(*games, model_a="x", model_b="y") + rows_of(*games[:3], model_a="x", model_b="z")
    result = run(write_jsonl(tmp_path / "j.jsonl", rows), model_b="z")
    assert (result["n"], result["other_runs"], result["model_b"]) == (3, 5, "z")


def test_rows_of_a_resumed_run(tmp_path: Path) -> None:
    """With one key, a failure gives way to the verdict that came later and equal verdicts count once; else an error."""
    rows = rows_of((1, "ab", None), (2, "ab", 0.0), (2, "ab", 0.0), (1, "ab", 1.0), (1, "ab", None))
    for row in rows:
        row["key"] = f"k{row['id']}"
    result = run(write_jsonl(tmp_path / "j.jsonl", rows))
    assert (result["n"], result["win_rate"], result["lost"], result["repeated_rows"]) == (2, 50, 0, 3)
    rows[2]["preference"] = 1.0
    with pytest.raises(win_rate.UserError, match="line 3: id '2', turn '1', order 'ab' was judged before"):
        run(write_jsonl(tmp_path / "j.jsonl", rows))


@pytest.mark.parametrize("form", ["judge", "fastchat"])
def test_ratings(form: str, tmp_path: Path) -> None:
    """Single grading: the mean over questions of the mean over turns, unparsed ones counted, never a zero."""
    names, none = (("id", "rating"), None) if form == "judge" else (("question_id", "score"), -1)
    grades = [(1, 1, 8), (1, 2, 6), (2, 1, 3), (2, 2, none), (3, 1, none)]
    judge: Any = "j" if form == "judge" else ["j", "single-v1"]
    rows = [{names[0]: i, "turn": t, names[1]: grade, "model": "m", "judge": judge} for i, t, grade in grades]
    if form == "fastchat":
        rows[1]["judge"] = ["j", "single-v1-multi-turn"]  # one judge, whose second turn has a prompt of its own
    result = run(write_jsonl(tmp_path / "j.jsonl", rows))["ratings"]["m"]
    assert result["mean"] == pytest.approx(5) and result["standard_error"] == pytest.approx(2)
    assert (result["n"], result["rows"], result["lost"]) == (2, 5, 2)
    with pytest.raises(win_rate.UserError, match="line 6: model 'm', id '3', turn '1' was judged before"):
        run(write_jsonl(tmp_path / "j.jsonl", [*rows, rows[-1]]))
    with pytest.raises(win_rate.UserError, match=f"line 1: {names[1]} is 11"):
        run(write_jsonl(tmp_path / "j.jsonl", [rows[0] | {names[1]: 11}]))


def test_ratings_of_several_judges(tmp_path: Path) -> None:
    """Two judges are not averaged: an error, or --judge; what is left aside is counted."""
    rows = [{"id": i, "model": "m", "rating": g, "judge": j} for j, g in (("x", 2), ("y", 8)) for i in range(3)]
    path = write_jsonl(tmp_path / "j.jsonl", rows)
    with pytest.raises(
        win_rate.UserError, match="line 4: mixed runs, judge is 'y' but 'x' in .*line 1; choose .*--judge"
    ):
        run(path)
    result = run(path, judge="y")
    assert (result["ratings"]["m"]["mean"], result["judge"], result["other_runs"]) == (8, "y", 3)
    with pytest.raises(win_rate.UserError, match="no row of judge 'z'"):
        run(path, judge="z")


def test_ratings_of_a_resumed_run(tmp_path: Path) -> None:
    """With one key, a failed rating gives way to the later one; without a key, or two ratings: an error."""
    rows = [{"id": i, "model": "m", "key": f"k{i}", "rating": r} for i, r in ((1, None), (2, 4), (1, 8), (2, None))]
    result = run(write_jsonl(tmp_path / "j.jsonl", rows))
    assert result["repeated_rows"] == 2
    assert {k: result["ratings"]["m"][k] for k in ("n", "mean", "rows", "lost")} == {
        "n": 2, "mean": 6, "rows": 2, "lost": 0
    }  # fmt: skip
    for change in ({"key": None}, {"key": "other"}):
        with pytest.raises(win_rate.UserError, match="line 3: model 'm', id '1', turn '1' was judged before"):
            run(
                write_jsonl(tmp_path / "j.jsonl", [rows[0] | change, rows[1], rows[2] | {"key": change["key"] and "k"}])
            )
    with pytest.raises(win_rate.UserError, match="line 2: model 'm', id '2'"):
        run(write_jsonl(tmp_path / "j.jsonl", [rows[1], rows[1] | {"rating": 5}]))


def test_one_question_has_no_interval(tmp_path: Path) -> None:
    """n = 1: the value, and null for what one draw can't tell."""
    result = run(write_jsonl(tmp_path / "j.jsonl", [{"id": 1, "model": "m", "rating": 7}]))["ratings"]["m"]
    assert result == {"n": 1, "mean": 7, "standard_error": None, "ci_low": None, "ci_high": None, "rows": 1, "lost": 0}
    result = run(write_jsonl(tmp_path / "j.jsonl", rows_of((1, "ab", 0.7))))
    assert (result["win_rate"], result["standard_error"], result["ci_low"]) == (70, None, None)


def test_byte_order_mark(tmp_path: Path) -> None:
    """Files that begin with a BOM, as editors and spreadsheets write it, are read."""
    row = {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 2}
    for text in (f"{GOOD}\n", json.dumps([row]), "\n " + json.dumps([row])):
        (tmp_path / "j.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert run(tmp_path / "j.json")["win_rate"] == 100


# ---------------------------------------------------------------------------------------- command line and `evaluate`
@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """evaluate keeps its copies of modules and its caches in tmp_path, and forgets them afterwards."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
            del sys.modules[name]

    own = str(tmp_path / "HF_MODULES_CACHE")  # first: evaluate appends its folder, behind that of an earlier test
    monkeypatch.setattr(sys, "path", [own, *sys.path])
    for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        monkeypatch.setattr(evaluate.config, name, tmp_path / name)
    forget()
    yield
    forget()


def test_module_equals_command_line(modules: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """evaluate.load(...).compute(...) offline gives the dict that the command line writes, digit for digit."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        lengths = {"length_a": int(rng.integers(50, 900)), "length_b": int(rng.integers(50, 900))}
        for order in ("ab", "ba"):
            p = None if rng.random() < 0.05 else round(float(rng.random()), 3)
            rows.append({"id": f"q{i}", "order": order, "preference": p, "error": None if p else "empty", **lengths})
    path, tool = write_jsonl(tmp_path / "judgments.jsonl", rows), str(ROOT / "eval" / "win_rate.py")
    line = [tool, str(path), "--lc", "glm", "--bootstrap", "20", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", line)
    win_rate.run_tool(win_rate.main, win_rate.Args, "files")
    written = json.loads((tmp_path / "win_rate.json").read_text())

    metric = evaluate.load(tool)
    names = {"preferences": "preference", "ids": "id", "orders": "order", "errors": "error"}
    names |= {"lengths_a": "length_a", "lengths_b": "length_b"}
    columns: dict[str, Any] = {name: [row[key] for row in rows] for name, key in names.items()}
    found = metric.compute(**columns, lc="glm", bootstrap=20, seed=3)
    assert written["lost"] > 0 and found == written
    plain = metric.compute(preferences=[1, 0, 0.5, None])
    assert (plain["n"], plain["lost"], plain["win_rate"]) == (3, 1, 50)
    for wrong, message in (
        ({"orders": ["ab"]}, "1 values of order for 2 preferences"),
        ({"rules": 1}, "unknown rules"),
    ):
        with pytest.raises(
            Exception, match=message
        ):  # the module is a copy of the file: its UserError is another class
            metric.compute(preferences=[1, 0], **wrong)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    """On stderr, and exit code 1."""
    tool = ROOT / "eval" / "win_rate.py"
    write_jsonl(tmp_path / "bad.jsonl", [GOOD, GOOD[:20]])
    line = [sys.executable, str(tool), "bad.jsonl"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("win_rate.py: bad.jsonl, line 2: not JSON"), done.stderr
    assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------- coverage
@pytest.mark.slow
@pytest.mark.parametrize("case", ["turns", "orders", "difference", "few", "rare"])
def test_intervals_cover(case: str) -> None:
    """Of 500 simulated runs, 93 to 97 % have the true value inside the interval."""
    rng, hits = np.random.default_rng(2026), 0
    for draw in range(500):
        if case == "turns":  # two turns that share a question's taste; true mean 2 / 3
            taste = rng.beta(2, 1, size=150)
            values = win_rate.cluster_means((rng.random((150, 2)) < taste[:, None]).ravel() * 1.0, np.arange(300) // 2)
            found, truth = win_rate.win_rate_interval(values, draw), 100 * 2 / 3
        elif case == "orders":  # a judge with a taste for the first slot: +-0.2 cancels
            taste = rng.uniform(0.2, 0.7, size=200)
            ab, ba = (1.0 * (rng.random(200) < taste + shift) for shift in (0.2, -0.2))
            found, truth = win_rate.win_rate_interval(win_rate.average_orders(ab, ba, True), draw), 45.0
        elif case == "difference":
            taste = rng.uniform(0.1, 0.8, size=100)
            a, b = (1.0 * (rng.random(100) < taste + gain) for gain in (0.15, 0.0))
            found, truth = win_rate.paired_difference(a, b), 15.0
        elif case == "few":  # Student's t
            found, truth = win_rate.win_rate_interval(rng.beta(2, 3, size=25), draw), 40.0
        else:  # BCa: soft preferences, 4 % on average
            found, truth = win_rate.win_rate_interval(rng.beta(0.2, 4.8, size=400), draw), 4.0
        hits += found["ci_low"] <= truth <= found["ci_high"]
    assert 0.93 <= hits / 500 <= 0.97, hits / 500


@pytest.mark.slow
def test_lc_intervals_cover(tmp_path: Path) -> None:
    """The same of --lc glm: length and slot bias, 150 questions in both orders that share a difficulty; truth 40 %."""
    rng, hits = np.random.default_rng(7), 0
    side, ids = np.repeat([0.5, -0.5], 150), np.tile(np.arange(150), 2)
    for draw in range(500):
        delta = rng.normal(-100, 300, size=150)
        logit = math.log(0.4 / 0.6) - 0.8 * np.tanh(np.tile(delta, 2) / delta.std(ddof=1)) + 0.7 * side
        p = 1.0 * (rng.random(300) < expit(logit))
        data = p, np.tile(delta, 2), side
        # 400 resamples: the ends of 200 are noisy themselves, and the interval then covered 92.8 %, with 400 93.8 %
        found = win_rate.bootstrap_ids(lambda rows: win_rate.lc_glm(*(x[rows] for x in data)), ids, 400, draw)  # noqa: B023
        hits += found["ci_low"] <= 0.4 <= found["ci_high"]
    assert 0.93 <= hits / 500 <= 0.97, hits / 500


def test_a_table_of_lc_data_without_rows_is_an_error(tmp_path: Path) -> None:
    """A header alone."""
    (tmp_path / "instruction_difficulty.csv").write_text("instruction_index,instruction_difficulty\n")
    with pytest.raises(win_rate.UserError, match="instruction_difficulty.csv: no rows"):
        win_rate.read_table(tmp_path / "instruction_difficulty.csv", ("instruction_index", "instruction_difficulty"))
