"""ranking.py against real judgments, statsmodels-free references, hand-worked numbers and simulated truth."""

import csv
import doctest
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shared_or_skip, write_jsonl
from scipy import optimize, stats

from eval import ranking
from eval.ranking import ELO, Args, UserError

VERDICTS = {"A": 1.0, "B": 0.0, "tie": 0.5, "error": None}
JUDGES = ("gpt-4o-mini", "Qwen2.5-7B-Instruct")


def swap_rows(judge: str) -> list[dict]:
    """The real swap judgments of one judge: verdict_ba "A" means that the answer shown first, B, has won."""
    file = shared_or_skip("data", "judges", "mt_bench_swap_dev.csv")
    with file.open() as stream:
        return [row for row in csv.DictReader(stream) if row["judge"] == judge]


def as_judgments(rows: list[dict]) -> list[dict]:
    """Swap rows in DESIGN's format: one row per order, the preference is A's whatever the order."""
    found = []
    for row in rows:
        shared = {"id": row["question_id"], "model_a": row["model_a"], "model_b": row["model_b"], "judge": row["judge"]}
        ab, ba = VERDICTS[row["verdict_ab"]], VERDICTS[row["verdict_ba"]]
        found.append(shared | {"order": "ab", "preference": ab})
        found.append(shared | {"order": "ba", "preference": None if ba is None else 1 - ba})
    return found


def as_fastchat(rows: list[dict]) -> list[dict]:
    """Swap rows as FastChat writes them: winners by name, both games in one row."""
    first = {"A": "model_1", "B": "model_2"}
    second = {"A": "model_2", "B": "model_1"}
    return [
        {"question_id": int(row["question_id"]), "model_1": row["model_a"], "model_2": row["model_b"], "turn": 1,
         "g1_winner": first.get(row["verdict_ab"], row["verdict_ab"]), "judge": [row["judge"], "pair-v2"],
         "g2_winner": second.get(row["verdict_ba"], row["verdict_ba"]), "tstamp": 1.5}
        for row in rows
    ]  # fmt: skip


def rank(tmp_path: Path, rows: list, **flags: Any) -> dict[str, Any]:
    """main's result on one file of rows; few refits unless told otherwise."""
    return ranking.main(Args(**{"bootstrap": 20, **flags}), [str(write_jsonl(tmp_path / "judgments.jsonl", rows))])


def by_name(result: dict[str, Any], key: str) -> dict[str, Any]:
    """One figure of each model."""
    return {m["model"]: m[key] for m in result["models"]}


ODD_WINNERS: list[Any] = [None, 0.7, ["model_1"], {}]


def game(question: Any, a: Any, b: Any, order: str | None, p: float | None, **more: Any) -> dict[str, Any]:
    """One row of judgments."""
    return {"id": question, "model_a": a, "model_b": b, "order": order, "preference": p, **more}


def both_orders(question: Any, a: str, b: str, ab: float, ba: float) -> list[dict]:
    """The two rows of a comparison."""
    return [game(question, a, b, "ab", ab), game(question, a, b, "ba", ba)]


def simulate(
    rng: np.random.Generator, strengths: np.ndarray, effect: float, nu: float, questions: int, spread: float
) -> list[dict]:
    """Votes of Davidson's model, all pairs in both orders; `spread` is the sd of each model's luck per question."""
    rows = []
    for q in range(questions):
        b = strengths + rng.normal(0, spread, len(strengths))
        for i in range(len(b)):
            for j in range(i + 1, len(b)):
                for order, o in (("ab", 1), ("ba", -1)):
                    gap = b[i] - b[j] + effect * o
                    weights = np.array([math.exp(gap / 2), nu, math.exp(-gap / 2)])
                    p = rng.choice([1.0, 0.5, 0.0], p=weights / weights.sum())
                    rows.append(game(q, f"m{i}", f"m{j}", order, float(p)))
    return rows


def test_doctests() -> None:
    """The numbers in the docstrings."""
    result = doctest.testmod(ranking)
    assert result.attempted > 15 and not result.failed


# ------------------------------------------------------------------------------------------------------------ real data
@pytest.mark.parametrize("judge", JUDGES)
def test_swap_data(judge: str, tmp_path: Path) -> None:
    """Elo, position logit, both standard errors and win-rates of six models, as computed without this code."""
    expected = json.loads(shared_or_skip("data", "expected_dev.json").read_text())["mt_bench_swap"][judge]
    rows = as_judgments(swap_rows(judge))
    plain = rank(tmp_path, rows, order_effect="no")
    assert by_name(plain, "elo") == pytest.approx(expected["bt_elo_scale_centred"], abs=0.006)  # printed to 0.01
    assert by_name(plain, "win_rate") == pytest.approx(expected["win_rate_swap_averaged"], abs=1e-5)
    rule = by_name(plain, "win_rate_mt_bench")
    assert rule == pytest.approx(expected["win_rate_mtbench_inconsistent_is_tie"], abs=1e-5)
    assert plain["n_comparisons"] == expected["n_both_parsed"] and plain["n_questions"] == 80
    assert plain["lost"].get("no verdict", 0) == expected["unparsable_calls"]
    assert plain["n_rows"] == 2400 == plain["n_votes"] + sum(plain["lost"].values())

    anchored = rank(tmp_path, rows, anchor="EEVE-Korean-Instruct-10.8B")  # errors of b_i - b_first
    effect = anchored["order_effect"]
    assert effect["logit"] == pytest.approx(expected["position_logit"], abs=1e-3)
    assert effect["standard_error_clustered"] == pytest.approx(
        expected["position_logit_se_clustered_by_question"], abs=1e-3
    )
    others = [m for m in anchored["models"] if m["model"] != anchored["anchor"]]
    for name, key in (("iid", "mean_bt_se_iid"), ("clustered", "mean_bt_se_clustered_by_question")):
        mean = np.mean([m[f"standard_error_{name}"] for m in others]) / ELO
        assert mean == pytest.approx(expected[key], abs=2e-4)
    assert by_name(anchored, "elo")["EEVE-Korean-Instruct-10.8B"] == 1000


def test_formats_and_files_agree(tmp_path: Path) -> None:
    """FastChat's rows, our rows, our rows with A and B exchanged, and our rows in two files: one answer."""
    rows = swap_rows("gpt-4o-mini")
    source = rows[::7] + [row for row in rows if "error" in (row["verdict_ab"], row["verdict_ba"])]
    rows = as_judgments(source)
    ours = rank(tmp_path, rows)
    fastchat = rank(tmp_path, as_fastchat(source))
    flipped = [
        {**row, "model_a": row["model_b"], "model_b": row["model_a"], "order": {"ab": "ba", "ba": "ab"}[row["order"]],
         "preference": None if row["preference"] is None else 1 - row["preference"]}
        for row in rows
    ]  # fmt: skip
    exchanged = rank(tmp_path, flipped)
    halves = [str(write_jsonl(tmp_path / f"{k}.jsonl", rows[k::2])) for k in (0, 1)]
    two = ranking.main(Args(bootstrap=20), halves)
    assert ours["lost"] and len(ours["models"]) == 6
    for other in (fastchat, exchanged, two):
        assert by_name(other, "elo") == pytest.approx(by_name(ours, "elo"), abs=1e-6)
        assert other["lost"] == ours["lost"] and other["n_votes"] == ours["n_votes"]
        assert other["order_effect"]["logit"] == pytest.approx(ours["order_effect"]["logit"], abs=1e-8)


# ------------------------------------------------------------------------------------------------------------ estimates
def test_two_models_by_hand(tmp_path: Path) -> None:
    """6 wins, 2 ties, 2 losses without an order: half ties give odds 7 : 3, Davidson's 6 : 2, nu 2 / sqrt(12)."""
    rows = [game(q, "a", "b", None, p) for q, p in enumerate([1.0] * 6 + [0.5] * 2 + [0.0] * 2)]
    half, davidson = rank(tmp_path, rows), rank(tmp_path, rows, ties="davidson")
    assert by_name(half, "elo")["a"] == pytest.approx(ELO / 2 * math.log(7 / 3))
    assert by_name(half, "elo")["b"] == pytest.approx(-ELO / 2 * math.log(7 / 3))
    assert by_name(davidson, "elo")["a"] == pytest.approx(ELO / 2 * math.log(6 / 2))
    assert davidson["nu"] == pytest.approx(2 / math.sqrt(12))
    assert half["order_effect"] is None
    # SE of a log-odds from n = 10 trials with p = 0.7: 1 / sqrt(n p (1 - p)); of half of it, half
    assert by_name(half, "standard_error_iid")["a"] == pytest.approx(ELO / 2 / math.sqrt(10 * 0.7 * 0.3))


def test_order_effect_by_hand(tmp_path: Path) -> None:
    """A wins 8 of 10 shown first and 6 of 10 shown second: the mean log-odds is b_a - b_b, half the difference is g."""
    rows = [row for q in range(10) for row in both_orders(q, "a", "b", float(q < 8), float(q < 6))]
    result = rank(tmp_path, rows, anchor="b")
    first, second = math.log(8 / 2), math.log(6 / 4)
    assert by_name(result, "elo")["a"] == pytest.approx(1000 + ELO * (first + second) / 2)
    assert result["order_effect"]["logit"] == pytest.approx((first - second) / 2)


@pytest.mark.parametrize("ties", ["half", "davidson"])
def test_likelihood_is_maximal(ties: str, tmp_path: Path) -> None:
    """The same optimum as scipy's minimiser on the likelihood written out vote by vote, order effect included."""
    rows = simulate(np.random.default_rng(0), np.array([0.8, 0.0, -0.3, -0.5]), 0.6, 0.7, 25, 0.3)

    def loss(x: np.ndarray) -> float:
        b, effect, nu = np.append(x[:3], -x[:3].sum()), x[3], math.exp(x[4])
        total = 0.0
        for row in rows:
            i, j = int(row["model_a"][1]), int(row["model_b"][1])
            gap = b[i] - b[j] + (effect if row["order"] == "ab" else -effect)
            win, loss_, tie = math.exp(gap / 2), math.exp(-gap / 2), nu if ties == "davidson" else 0.0
            p = row["preference"]
            seen = [p == 1, p == 0, p == 0.5] if ties == "davidson" else [p, 1 - p, 0]
            total -= sum(w * math.log(x) for w, x in zip(seen, (win, loss_, tie), strict=True) if w)
            total += math.log(win + loss_ + tie)
        return total + (0 if ties == "davidson" else x[4] ** 2)

    best = optimize.minimize(loss, np.zeros(5), tol=1e-9).x
    result = rank(tmp_path, rows, ties=ties)
    want = {f"m{k}": ELO * v for k, v in enumerate(np.append(best[:3], -best[:3].sum()))}
    assert by_name(result, "elo") == pytest.approx(want, abs=0.02)
    assert result["order_effect"]["logit"] == pytest.approx(best[3], abs=1e-4)
    if ties == "davidson":
        assert result["nu"] == pytest.approx(math.exp(best[4]), abs=1e-4)


def test_intervals_are_over_questions(tmp_path: Path) -> None:
    """Each vote repeated as nine turns of its question: intervals and clustered errors stay, iid ones are a third."""
    rows = [game(q, "a", "b", "ab", float(q % 3 > 0)) for q in range(60)]
    repeated = [{**row, "turn": t} for row in rows for t in range(9)]
    once, nine = (rank(tmp_path, data, bootstrap=300)["models"][0] for data in (rows, repeated))
    assert nine["ci_low"] == pytest.approx(once["ci_low"]) and nine["ci_high"] == pytest.approx(once["ci_high"])
    assert nine["standard_error_clustered"] == pytest.approx(once["standard_error_clustered"], rel=0.02)
    assert nine["standard_error_iid"] == pytest.approx(once["standard_error_iid"] / 3)
    assert once["ci_high"] - once["ci_low"] == pytest.approx(2 * 1.96 * once["standard_error_iid"], rel=0.12)
    assert rank(tmp_path, rows, seed=1)["models"][0]["ci_low"] != rank(tmp_path, rows)["models"][0]["ci_low"]


# ----------------------------------------------------------------------------------------------------------- separation
def king_and_fool() -> list[dict]:
    """x and y are even; king beats both always, fool loses to y always."""
    rows: list[dict] = []
    for q in range(20):
        rows += both_orders(q, "king", "x", 1.0, 1.0) + both_orders(q, "king", "y", 1.0, 1.0)
        rows += both_orders(q, "x", "y", float(q % 2), float(q % 4 > 1)) + both_orders(q, "fool", "y", 0.0, 0.0)
    return rows


@pytest.mark.parametrize("ties", ["half", "davidson"])
def test_only_wins_only_losses(ties: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """No huge number: one end is open, the other is what 20 clean questions allow (0.025^(1/20)), and it is said."""
    rows = king_and_fool() + [game(20, "x", "y", "ab", 0.5)] * (ties == "davidson")
    result = rank(tmp_path, rows, ties=ties)
    models = {m["model"]: m for m in result["models"]}
    assert [m["model"] for m in result["models"]][0] == "king" and result["models"][-1]["model"] == "fool"
    assert (models["king"]["unbounded"], models["fool"]["unbounded"]) == ("above", "below")
    assert models["x"]["unbounded"] is None is models["y"]["unbounded"]
    assert models["king"]["ci_high"] is None is models["fool"]["ci_low"]
    assert models["king"]["standard_error_iid"] is None
    assert result["ridge"] == 0.5 and abs(models["king"]["elo"]) < 1500
    assert models["x"]["elo"] + models["y"]["elo"] == pytest.approx(0, abs=1e-6)  # 0 is the mean of those two
    p = 0.025 ** (1 / 20)
    assert models["king"]["ci_low"] == pytest.approx(ELO * math.log(p / (1 - p)), abs=25)  # x and y near 0, g near 0
    assert models["fool"]["ci_high"] < models["y"]["ci_low"] < models["x"]["ci_high"] < models["king"]["ci_low"]
    assert "NO FINITE VALUE" in capsys.readouterr().out
    written = (tmp_path / "ranking.json").read_text()
    assert "Infinity" not in written and "NaN" not in written


def test_bound_is_clopper_pearson(tmp_path: Path) -> None:
    """One opponent: the end of the interval is scipy's exact limit of 12 wins in 12 questions."""
    rows = [row for q in range(12) for row in both_orders(q, "king", "x", 1.0, 1.0)]
    loser = rank(tmp_path, rows, order_effect="no", anchor="king")["models"][1]
    low = stats.binomtest(12, 12).proportion_ci(0.95, "exact").low
    gap = ELO * math.log(low / (1 - low))
    assert loser["model"] == "x" and loser["ci_low"] is None and loser["ci_high"] == pytest.approx(1000 - gap)


def test_two_groups_of_which_one_always_wins(tmp_path: Path) -> None:
    """Nobody has a clean record: a, b beat c, d, e always; the larger group keeps finite strengths, a and b do not."""
    rows: list[dict] = []
    for q in range(10):
        rows += both_orders(q, "a", "b", float(q % 2), float(q % 3 > 0)) + both_orders(q, "a", "c", 1.0, 1.0)
        rows += both_orders(q, "c", "d", float(q % 2), float(q % 3 > 0)) + both_orders(q, "b", "d", 1.0, 1.0)
        rows += both_orders(q, "d", "e", float(q % 2), float(q % 3 > 0))
    sides = by_name(rank(tmp_path, rows), "unbounded")
    assert sides == {"a": "above", "b": "above", "c": None, "d": None, "e": None}


def test_judge_that_only_sees_the_first_slot(tmp_path: Path) -> None:
    """All votes go to the first slot: nothing is known about the models, and the advantage has no bound."""
    result = rank(tmp_path, [row for q in range(9) for row in both_orders(q, "x", "y", 1.0, 0.0)])
    assert result["order_effect"]["unbounded"] and result["order_effect"]["ci_high"] is None
    assert result["order_effect"]["logit"] < 10
    assert sorted(map(str, by_name(result, "unbounded").values())) == ["None", "unknown"]
    assert all(m["ci_low"] in (None, 0.0) for m in result["models"])


def test_refits_without_a_finite_answer_are_counted(tmp_path: Path) -> None:
    """One loss in ten questions: a third of the resamples miss it (0.9^10 = 0.349), get the ridge and are counted."""
    rows = [game(q, "a", "b", "ab", float(q > 0)) for q in range(10)]
    result = rank(tmp_path, rows, bootstrap=400)
    assert result["ridge"] == 0 and result["models"][0]["unbounded"] is None
    assert result["refits_with_ridge"] == pytest.approx(400 * 0.9**10, abs=4 * math.sqrt(400 * 0.35 * 0.65))
    assert abs(result["models"][0]["ci_high"]) < 1000


# ---------------------------------------------------------------------------------------------- what is lost, bad files
def test_lost_rows(tmp_path: Path) -> None:
    """A comparison with one order unanswered is left out whole; a null that was asked again is not."""
    rows = [row for q in range(6) for row in both_orders(q, "a", "b", float(q % 2), 0.5)]
    rows += [game(6, "a", "b", "ab", 1.0), game(6, "a", "b", "ba", None)]
    rows += [game(7, "a", "b", "ab", None), game(7, "a", "b", "ab", 0.25), game(7, "a", "b", "ba", 0.75)]
    rows += [game(8, "a", "b", "ab", None), game(8, "a", "b", "ab", None), game(8, "a", "b", "ba", None)]
    result = rank(tmp_path, rows)
    lost = {"no verdict, asked again": 2, "no verdict": 3, "verdict whose other order has none": 1}
    assert result["lost"] == lost and result["n_comparisons"] == 7 and result["n_votes"] == 14
    assert result["n_rows"] == len(rows) == 14 + 6
    assert by_name(result, "win_rate")["a"] == pytest.approx(0.5)


def test_mixed_judges_need_a_choice(tmp_path: Path) -> None:
    """Two judges in one file: an error with both places; --judge takes one and counts the other's rows."""
    rows = [{**row, "judge": j} for j in ("one", "two") for q in range(4)
            for row in both_orders(q, "a", "b", float(q % 2), float(j == "one" or q % 2))]  # fmt: skip
    with pytest.raises(UserError, match=r"line 9: judge 'two', but 'one' in .*line 1; choose one with --judge"):
        rank(tmp_path, rows)
    result = rank(tmp_path, rows, judge="two")
    assert result["lost"] == {"of another judge": 8} and by_name(result, "win_rate")["a"] == pytest.approx(0.5)


GOOD = both_orders(0, "a", "b", 1.0, 0.0) + both_orders(1, "a", "b", 0.0, 1.0)


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([*GOOD, '{"id": 2, "model_a"'], {}, r"judgments.jsonl, line 5: not JSON, or half a line"),
        ([*GOOD, {"id": 2, "preference": 1}], {}, r"line 5: model_a None, model_b None; expected the names"),
        ([*GOOD, game(2, "a", "a", "ab", 1.0)], {}, r"line 5: model_a 'a', model_b 'a'"),
        ([*GOOD, {"id": 2, "model_a": "a", "model_b": "b"}], {}, r"line 5: no key preference; keys found: id, model_a"),
        ([*GOOD, game(2, "a", "b", "ab", 1.5)], {}, r"line 5: preference 1.5; expected a number in \[0, 1\]"),
        ([*GOOD, game(2, "a", "b", "ab", float("nan"))], {}, r"line 5: preference nan"),
        ([*GOOD, game(2, "a", "b", "first", 1.0)], {}, r"line 5: order 'first'; expected 'ab' or 'ba'"),
        ([*GOOD, game(1, "b", "a", "ba", 1.0)], {}, r"line 5: the same vote as in .*line 3; keep one"),
        ([*GOOD, game(0, "a", "c", "ab", 1.0, prompt="Why?"), game(0, "b", "c", "ab", 1.0, prompt="How?")], {},
         r"line 6: id 0 has another prompt than in .*line 5"),
        ([*GOOD, *both_orders(0, "c", "d", 1.0, 0.0)], {}, r"never compared with each other: a, b; c, d"),
        (GOOD[:2], {}, r"all votes are on one question"),
        ([game(0, "a", "b", "ab", None)], {}, r"none of 1 rows holds a usable verdict"),
        (GOOD, {"anchor": "z"}, r"--anchor z: models with a finite strength are a, b"),
        (king_and_fool(), {"anchor": "king"}, r"--anchor king: models with a finite strength are x, y"),
        (GOOD, {"ties": "davidson"}, r"--ties davidson needs ties and decided votes"),
        (GOOD, {"bootstrap": 0}, r"--bootstrap 0: an interval needs at least 20"),
        ([{"question_id": 1, "model_1": "a", "model_2": "b", "g1_winner": "model_3", "g2_winner": "tie"}], {},
         r"line 1: g1_winner is 'model_3', expected one of model_1, model_2, tie, error"),
        *(([{"question_id": 1, "model_1": "a", "model_2": "b", "g1_winner": "tie", "g2_winner": value}], {},
           r"line 1: g2_winner is .*, expected one of model_1") for value in ODD_WINNERS),
        *(([*GOOD, game(2, "a", "b", "ab", 1.0) | {name: value}], {}, rf"line 5: {name} is .*expected a string")
          for value in ([1], {"a": 1}) for name in ("turn", "judge", "model_a", "model_b")),
        *(([*GOOD, game(value, "a", "b", "ab", 1.0)], {}, r"line 5: id is .*expected a string or an integer")
          for value in ([1], None, True)),
        ([*GOOD, game(2, "a", 7, "ab", 1.0)], {}, r"line 5: model_a 'a', model_b 7; expected the names"),
        ([*GOOD, game(2, "a", "b", "ab", 10**400)], {}, r"line 5: preference inf"),
        ([*GOOD, '{"id": ' + "[" * 5000 + "]" * 5000 + "}"], {}, r"line 5: not JSON, or half a line"),
        ([], {}, r"judgments.jsonl: no rows"),
    ],
)  # fmt: skip
def test_bad_input(rows: list, flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    """One line: where, what, what was expected."""
    with pytest.raises(UserError, match=message) as error:
        rank(tmp_path, rows, **flags)
    assert "\n" not in str(error.value)


def test_files(tmp_path: Path) -> None:
    """The result beside the input equals what main returns; the plot is a picture of some size; a seed decides all."""
    rows = king_and_fool()
    result = rank(tmp_path, rows, bootstrap=30, seed=3)
    assert json.loads((tmp_path / "ranking.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "ranking.png").read_bytes()[:4] == b"\x89PNG"
    again = rank(tmp_path, rows, bootstrap=30, seed=3, output=str(tmp_path / "new" / "result.json"))
    assert again == result and (tmp_path / "new" / "result.png").is_file()
    with pytest.raises(UserError, match="no such file"):
        ranking.main(Args(), [str(tmp_path / "nowhere.jsonl")])


# ----------------------------------------------------------------------------------------------------------- simulation
@pytest.mark.slow
def test_coverage(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """120 draws of 60 questions with luck per question: intervals of the strengths cover the population's value.

    The population's value is that of the model fitted to very many questions (luck shrinks the strengths).
    """
    truth_rows = simulate(np.random.default_rng(1), np.array([0.7, 0.0, -0.7]), 0.5, 0.0, 6000, 1.0)
    truth = by_name(rank(tmp_path, truth_rows), "elo")
    hits, iid = [], []
    for seed in range(120):
        rows = simulate(np.random.default_rng(100 + seed), np.array([0.7, 0.0, -0.7]), 0.5, 0.0, 60, 1.0)
        for m in rank(tmp_path, rows, bootstrap=100, seed=seed)["models"]:
            hits.append(m["ci_low"] <= truth[m["model"]] <= m["ci_high"])
            iid.append(abs(m["elo"] - truth[m["model"]]) <= 1.96 * m["standard_error_iid"])
    with capsys.disabled():
        print(f"\n coverage of the 95 % intervals: {np.mean(hits):.3f}; with iid errors {np.mean(iid):.3f}")
    assert 0.90 < np.mean(hits) < 0.99  # 360 intervals, three by three correlated, percentile bootstrap
    assert np.mean(iid) < np.mean(hits)
