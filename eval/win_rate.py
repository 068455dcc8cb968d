# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers==5.23.0", "datasets==5.2.0", "evaluate==0.4.6", "numpy==2.4.6", "scipy==1.17.1",
#     "statsmodels==0.15.0"]
# ///
"""Win-rate of model A over model B from judgments, with its error: also a Hugging Face `evaluate` module.

    question   = (id, turn); its preference is the mean of the two presented orders (A first, A second), in [0, 1]
    win-rate   = mean over ids of the mean over turns: an id is one draw, its turns are not independent
    interval   = mean +- 1.96 standard errors over ids (Miller 2024, arXiv:2411.00640); Student's t for n < 30; BCa
                 bootstrap for a mean outside [0.05, 0.95]; Clopper-Pearson for few or extreme plain wins and losses
    discrete   = preferences rounded to win, tie (half) or loss first (AlpacaEval)
    position   = logit P(first slot wins) = g +- strength of A, a Bradley-Terry model with an order effect; g is
                 `position_logit`, its standard error is clustered by id
    --rule mtbench   a win only if both orders agree, else a tie (Zheng et al. 2023, arXiv:2306.05685)

A question with one verdict left of two is left out and counted (`one_order`): alone it would carry the judge's taste
for a slot. In a file that shows every question in one order only, as AlpacaEval's, all of them count.

Length control (Dubois et al. 2024, arXiv:2404.04475), d = tanh((length_B - length_A) / sd), in two forms:

    --lc glm          logit P(A wins) = w0 + w1 d + w2 (A first: +1/2, second: -1/2), any prompts; LC = sigmoid(w0), the
                      win-rate at equal length and no position effect. It is not AlpacaEval's number
    --lc alpaca_eval  logit P(A wins) = w1 d + w2 difficulty_i + w3, AlpacaEval 2's, with its two gamed baselines as
                      extra rows of weight 0.1 and no L1 penalty; LC = mean_i sigmoid(w2 difficulty_i + w3).
                      --lc_data DIR holds instruction_difficulty.csv (instruction_index, instruction_difficulty) and
                      gamed_baseline_rows.csv (std_delta_len, instruction_difficulty, preference_equivalent). A row's
                      instruction is found by its prompt's text, if a csv of DIR has instruction_index and instruction,
                      else by its id, never by its place in the file

Both get standard error and percentile interval from a bootstrap over ids, refitted (difficulty and gamed rows fixed).

Reads judgments (.jsonl, one row per presented order: id, order "ab" or "ba", preference = P(A wins) or null; of the
further keys error, turn, category, prompt, model_a, model_b, length_a, length_b, judge, prompt_sha, key those that are
there), AlpacaEval's annotations.json (A = output_2, the model) and FastChat's pairwise files (A = model_1). Single
grading (rows with `rating`, FastChat's with `score`) gives the mean rating of each model. Two files: the difference of
two models against one baseline on the same questions (--common: on those that both have).

    python eval/win_rate.py runs/judge/judgments.jsonl --lc glm
    python eval/win_rate.py new.jsonl old.jsonl
    evaluate.load("eval/win_rate.py").compute(preferences=[1, 0.5], ids=[7, 8], orders=["ab", "ab"])

Writes win_rate.json beside the input (two files: win_rate_difference.json). In percent: win_rate, discrete_win_rate,
length_controlled_win_rate, differences, and their errors and intervals. Shares (swap_consistency, both_first,
both_second, first_slot_share) are in [0, 1], position_effect = first_slot_share - 0.5; n is ids, the rest are counts.
"""

import codecs
import csv
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import evaluate
import numpy as np
import statsmodels.api as sm
from scipy import stats
from scipy.special import expit
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

if not __package__:  # run as a file or imported by its bare name: it belongs to the package eval all the same
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "eval"

from .common import DEFAULT, FASTCHAT, arg, bootstrap_ids, mean_interval, plain_values, read_jsonl, run_tool, turn_of
from .common import UserError, without_nan, write_json

GAMED_WEIGHT = 0.1  # AlpacaEval's regulariser: 0.2 over its two gamed baselines
SEPARATED = 15.0  # a fitted logit beyond this means that the likelihood has no maximum: the fit was on its way out
OPTIONAL = ("error", "category", "prompt", "model_a", "model_b", "judge", "prompt_sha", "key")  # keys of a judgment
NEEDED = {
    "preference": ("id", "order", "preference"),
    "g1_winner": ("question_id", "model_1", "model_2", "g1_winner", "g2_winner"),
    "rating": ("id", "model", "rating"),
    "score": ("question_id", "model", "score"),
}
COLUMNS = {  # of compute: its name there -> the key of a judgment
    "ids": "id", "orders": "order", "turns": "turn", "categories": "category", "prompts": "prompt",
    "lengths_a": "length_a", "lengths_b": "length_b", "errors": "error",
}  # fmt: skip
LIMITS = "It can't tell whether people would agree: it is one judge's taste, on these prompts, against this opponent."


# ------------------------------------------------------------------------------------------------------------ arguments


@dataclass
class Args:
    rule: Literal["average", "mtbench"] = arg("average", "two orders: their mean; or a win only where both agree")
    lc: Literal["none", "glm", "alpaca_eval"] = arg("none", "length-controlled win-rate: own GLM, or AlpacaEval 2's")
    lc_data: str | None = arg(None, "folder with AlpacaEval's instruction difficulty and gamed rows")
    bootstrap: int = arg(1000, "resamples for the standard error of the length-controlled win-rate")
    judge: str | None = arg(None, "keep the rows of this judge only")
    model_a: str | None = arg(None, "keep the rows of this model A only")
    model_b: str | None = arg(None, "keep the rows of this model B only")
    common: bool = arg(False, "two files with unequal sets of questions: compare on those that both have")
    seed: int = arg(0, "of every bootstrap")
    output: str | None = arg(None, "result file (default: win_rate.json beside the first input)")


# ------------------------------------------------------------------------------------------------------------ the maths


def average_orders(ab: np.ndarray, ba: np.ndarray, both_shown: bool) -> np.ndarray:
    """Preference of each question: the mean of its orders; with `both_shown` NaN where one of them is missing.

    ab, ba: [questions], P(A wins) with A shown first, second; NaN = missing. Rounded to 1e-12, so that p and 1 - p
    are a tie whatever their last bits.

    >>> average_orders(np.array([1.0, 0.8, 1.0]), np.array([0.0, 0.7, np.nan]), True).tolist()
    [0.5, 0.75, nan]
    """
    value = (ab + ba) / 2
    return np.round(value if both_shown else np.where(np.isnan(ab), ba, np.where(np.isnan(ba), ab, value)), 12)


def mtbench_rule(ab: np.ndarray, ba: np.ndarray) -> np.ndarray:
    """1 or 0 where both orders agree on a winner, else 0.5; NaN where either is missing (arXiv:2306.05685, 3.4).

    >>> mtbench_rule(np.array([0.9, 0.9, 0.2, 0.5, 1.0]), np.array([0.8, 0.1, 0.0, 1.0, np.nan])).tolist()
    [1.0, 0.5, 0.0, 0.5, nan]
    """
    verdict = (np.sign(ab - 0.5) + np.sign(ba - 0.5)) / 2  # 1 and -1: both agree; 0.5: one of them is a tie
    return np.where(np.isnan(verdict), np.nan, np.where(np.abs(verdict) == 1, (verdict + 1) / 2, 0.5))


def cluster_means(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Mean of `values` per id, ids sorted: the units of every standard error.

    >>> cluster_means(np.array([1.0, 0.0, 1.0]), np.array(["q1", "q1", "q2"])).tolist()
    [0.5, 1.0]
    """
    _, place = np.unique(ids, return_inverse=True)
    return np.bincount(place, values) / np.bincount(place)


def win_rate_interval(values: np.ndarray, seed: int) -> dict[str, Any]:
    """Win-rate, standard error and 95 % interval in percent, and the interval's method (see the top of the file).

    values: [n], one preference in [0, 1] per id. NaN bounds where all values are equal and not 0 or 1.

    >>> {k: round(v, 1) if k != "interval" else v for k, v in win_rate_interval(np.ones(10), 0).items()}
    {'win_rate': 100.0, 'standard_error': 0.0, 'ci_low': 69.2, 'ci_high': 100.0, 'interval': 'Clopper-Pearson'}
    """
    plain, n = mean_interval(values), len(values)
    low, high, method = plain["ci_low"], plain["ci_high"], "CLT"
    near_end = not 0.05 <= plain["mean"] <= 0.95
    if set(values) <= {0.0, 1.0} and (near_end or n < 30):
        (low, high), method = proportion_confint(values.sum(), n, method="beta"), "Clopper-Pearson"
    elif np.ptp(values) == 0:
        low, high, method = math.nan, math.nan, "none: all values are equal"
    elif near_end:
        with warnings.catch_warnings(action="ignore"):
            found = stats.bootstrap((values,), np.mean, method="BCa", batch=1000, rng=np.random.default_rng(seed))
        (low, high), method = found.confidence_interval, "BCa"
    elif n < 30:
        bounds = stats.t.interval(0.95, n - 1, plain["mean"], plain["standard_error"])
        (low, high), method = np.clip(bounds, 0, 1), "Student's t"
    numbers = {"win_rate": plain["mean"], "standard_error": plain["standard_error"], "ci_low": low, "ci_high": high}
    return {name: 100 * float(value) for name, value in numbers.items()} | {"interval": method}


def swap_table(ab: np.ndarray, ba: np.ndarray) -> dict[str, float]:
    """Shares of the questions judged in both orders: same verdict; the first, or the second, slot favoured in both.

    >>> swap_table(np.array([1.0, 1.0, 0.0, 0.5]), np.array([1.0, 0.0, 1.0, 1.0]))["swap_consistency"]
    0.25
    """
    both = ~np.isnan(ab + ba)
    first, second = np.sign(ab[both] - 0.5), np.sign(ba[both] - 0.5)
    shares = {
        "swap_consistency": first == second,
        "both_first": (first > 0) & (second < 0),
        "both_second": (first < 0) & (second > 0),
        "first_slot_share": (ab[both] + 1 - ba[both]) / 2,
    }
    table = {name: float(np.mean(share)) if both.any() else math.nan for name, share in shares.items()}
    return {"both_orders": int(both.sum()), **table, "position_effect": table["first_slot_share"] - 0.5}


def fit_logistic(y: np.ndarray, x: np.ndarray, weights: np.ndarray | None = None, **settings: Any) -> Any:
    """statsmodels' result of a logistic regression on soft labels, unpenalised; None where it has no finite maximum.

    y: [rows] in [0, 1]; x: [rows, columns]; weights: [rows]; settings: of GLM.fit.
    """
    if np.ptp(y) == 0 and y[0] in (0, 1):
        return None
    with warnings.catch_warnings(action="ignore"):
        result = sm.GLM(y, x, family=sm.families.Binomial(), freq_weights=weights).fit(tol=1e-10, **settings)
    return result if result.converged and np.abs(x @ result.params).max() < SEPARATED else None


def position_logit(first_wins: np.ndarray, strengths: np.ndarray, ids: np.ndarray) -> tuple[float, float]:
    """(g, its standard error clustered by id) of logit P(first slot wins) = g + strengths @ b; NaN if not estimable.

    first_wins: [rows] in [0, 1]; strengths: [rows, models - 1], +1 for the model shown first, -1 for the second.

    >>> ab, ba = [1.0] * 8 + [0.0] * 2, [1.0] * 8 + [0.0] * 2  # the first slot wins 16 of 20: logit 0.8 = ln 4
    >>> side = np.repeat([[1.0], [-1.0]], 10, axis=0)
    >>> round(position_logit(np.array(ab + ba), side, np.tile(np.arange(10), 2))[0], 4)
    1.3863
    """
    _, groups = np.unique(ids, return_inverse=True)
    design = np.column_stack([np.ones(len(first_wins)), strengths])
    if groups.max(initial=0) < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        return math.nan, math.nan
    result = fit_logistic(first_wins, design, cov_type="cluster", cov_kwds={"groups": groups})
    return (math.nan, math.nan) if result is None else (float(result.params[0]), float(result.bse[0]))


def length_term(difference: np.ndarray) -> np.ndarray:
    """tanh(difference / sd), sd with n - 1 and not centred, as AlpacaEval; 0 where all differences are equal.

    >>> length_term(np.array([-10.0, 10.0])).round(4).tolist()  # sd = 14.14
    [-0.6089, 0.6089]
    """
    sd = np.std(difference, ddof=1)
    return np.tanh(difference / sd) if sd > 0 else np.zeros(len(difference))


def lc_glm(p: np.ndarray, difference: np.ndarray, side: np.ndarray) -> float:
    """sigmoid(w0) of logit P(A wins) = w0 + w1 tanh(difference / sd) + w2 side; NaN where there is no maximum.

    p, difference, side: [rows]; side +0.5 where A was shown first, else -0.5. Columns without variation are left out.

    >>> lc_glm(np.array([1, 1, 1, 0, 1, 0, 0, 0.0]), np.array([5, 5, 5, 5, -5, -5, -5, -5.0]), np.full(8, 0.5))
    0.5
    """
    columns = [column for column in (length_term(difference), side) if np.ptp(column) > 0]
    result = fit_logistic(p, np.column_stack([np.ones(len(p)), *columns]))
    return math.nan if result is None else round(float(expit(result.params[0])), 12)


def lc_alpaca_eval(
    gamed: np.ndarray, start: np.ndarray | None, p: np.ndarray, difference: np.ndarray, difficulty: np.ndarray
) -> tuple[float, np.ndarray]:
    """(length-controlled win-rate, (w1, w2, w3)) of AlpacaEval 2 (arXiv:2404.04475, equation 3) without its L1 penalty.

    gamed: [rows, 3] = standardised length difference, difficulty, label; p, difference, difficulty: [instructions].
    (NaN, ...) where there is no maximum; `start` speeds a refit up.
    """
    rows = np.column_stack([length_term(difference), difficulty, np.ones(len(p))])
    others = np.column_stack([np.tanh(gamed[:, 0]), gamed[:, 1], np.zeros(len(gamed))])
    weights = np.repeat([1.0, GAMED_WEIGHT], [len(p), len(gamed)])
    result = fit_logistic(np.r_[p, gamed[:, 2]], np.vstack([rows, others]), weights, start_params=start)
    if result is None:
        return math.nan, np.full(3, math.nan)
    return float(np.mean(expit(rows[:, 1:] @ result.params[1:]))), result.params


def paired_difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """mean(a) - mean(b) on the same n ids: paired and unpaired standard error, 95 % interval and p (Student's t).

    a, b: [n] preferences in [0, 1]; in percent, but for n and p_value; NaN where there is too little to estimate it.
    detectable_difference: the smallest true one that a two-sided 5 % test finds with 80 % power at this n and spread.

    >>> found = paired_difference(np.array([1.0, 1, 1, 0]), np.array([1.0, 0, 0, 0]))  # d = 0 1 1 0, sd 0.577
    >>> round(found["difference"], 1), round(found["paired_se"], 2)
    (50.0, 28.87)
    """
    d = 100 * (a - b)
    names = ("paired_se", "unpaired_se", "ci_low", "ci_high", "p_value", "detectable_difference")
    result = {"n": len(d), "difference": float(d.mean()) if len(d) else math.nan, **dict.fromkeys(names, math.nan)}
    if len(d) > 2 and np.ptp(d) > 0:
        test, effect = stats.ttest_1samp(d, 0), TTestPower().solve_power(nobs=len(d), alpha=0.05, power=0.8)
        low, high = test.confidence_interval(0.95)
        values = (stats.sem(d), 100 * np.hypot(stats.sem(a), stats.sem(b)), low, high, test.pvalue)
        result |= dict(zip(names, map(float, (*values, np.squeeze(effect) * np.std(d, ddof=1))), strict=True))
    return result


# -------------------------------------------------------------------------------------------------------------- reading


def in_range(value: Any, where: str, name: str, low: float, high: float) -> float | None:
    """`value` if it is a number in [low, high], None if it is null; else a UserError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{where}: {name} is {value!r}, expected a number in [{low:g}, {high:g}] or null")
    return float(value)


def judgment(row: dict, where: str) -> dict:
    """One row of the judgments format, checked, with None for the keys that may be absent."""
    if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
        raise UserError(f"{where}: id is {row['id']!r}, expected a string or an integer")
    if row["order"] not in ("ab", "ba"):
        raise UserError(f'{where}: order is {row["order"]!r}, expected "ab" (A shown first) or "ba"')
    preference = in_range(row["preference"], where, "preference", 0, 1)
    if preference is not None and row.get("error"):
        raise UserError(f"{where}: has a preference and an error ({row['error']}); expected one of them")
    plain_values(row, where, "turn", "category", "judge", "model_a", "model_b")
    lengths = {name: in_range(row.get(name), where, name, 0, 1e15) for name in ("length_a", "length_b")}
    own = {"where": where, "id": str(row["id"]), "turn": turn_of(row), "order": row["order"]}
    return {name: row.get(name) for name in OPTIONAL} | lengths | own | {"preference": preference}


def alpaca_row(row: dict, where: str) -> dict:
    """A row of AlpacaEval's annotations.json as a judgment: A is output_2, the model; 0 and 1.5 are ties.

    Its id is the instruction's index where the row gives one, else the instruction itself.
    """
    if missing := [name for name in ("instruction", "output_1", "output_2") if name not in row]:
        raise UserError(f"{where}: no key {', '.join(missing)}; keys found: {', '.join(row)}")
    preference = in_range(row.get("preference"), where, "preference", 0, 2)
    if preference is not None and 0 < preference < 1:
        raise UserError(f"{where}: preference is {preference}, expected 0 or a number in [1, 2]")
    for name in ("output_1", "output_2"):
        if not isinstance(row[name], str | None):
            raise UserError(f"{where}: {name} is {str(row[name])[:60]!r}, expected a string or null")
    mapped = {
        "id": row.get("instruction_index", row["instruction"]), "order": "ab", "prompt": row["instruction"],
        "preference": preference and preference - 1 if preference != 0 else 0.5,
        "category": row.get("dataset"), "model_a": row.get("generator_2"), "model_b": row.get("generator_1"),
        "length_a": len(row["output_2"] or ""), "length_b": len(row["output_1"] or ""), "judge": row.get("annotator"),
    }  # fmt: skip
    return judgment(mapped, where)


def judge_name(row: dict) -> Any:
    """The judge of a row; FastChat writes [judge, name of its prompt], another name for each turn."""
    judge = row.get("judge")
    return judge[0] if isinstance(judge, list) and judge else judge


def fastchat_rows(row: dict, where: str) -> list[dict]:
    """The two games of a row of FastChat's pairwise judgments: A is model_1, first in game 1, second in game 2."""
    mapped = {"id": row["question_id"], "turn": row.get("turn"), "model_a": row["model_1"], "model_b": row["model_2"]}
    mapped["judge"] = judge_name(row)
    rows = []
    for order, name in (("ab", "g1_winner"), ("ba", "g2_winner")):
        if not isinstance(winner := row[name], str) or winner not in FASTCHAT:
            raise UserError(f"{where}: {name} is {str(winner)[:60]!r}, expected one of {', '.join(FASTCHAT)}")
        rows.append(judgment(mapped | {"order": order, "preference": FASTCHAT[winner]}, where))
    return rows


def read_judgments(source: str) -> list[dict]:
    """Judgments of a file in one of the formats above; rows of single grading have a `rating` instead."""
    path = Path(source)
    content = path.read_bytes() if path.is_file() else b""
    if content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        try:
            rows = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}: not JSON, or half a file ({error})") from error
        if not rows or not all(isinstance(row, dict) for row in rows) or not any("preference" in row for row in rows):
            raise UserError(f"{source}: expected AlpacaEval's annotations, a list of objects with a preference")
        return [alpaca_row(row, f"{source}, row {i}") for i, row in enumerate(rows, 1)]
    first = read_jsonl(source, ())[0]
    form = next((form for form in ("g1_winner", "rating", "score") if form in first), "preference")
    rows = read_jsonl(source, NEEDED[form])
    for row in rows:
        row["where"] = f"{source}, line {row['_line']}"
    if form == "g1_winner":
        return [game for row in rows for game in fastchat_rows(row, row["where"])]
    if form == "preference":
        return [judgment(row, row["where"]) for row in rows]
    for row in rows:  # FastChat writes the score -1 for a reply that it could not parse
        rating = in_range(None if row[form] == -1 else row[form], row["where"], form, 0, 10)
        row |= {"rating": rating, "judge": judge_name(row), "key": row.get("key")}
        plain_values(row, row["where"], "id", "question_id", "turn", "judge", "model")
        row |= {"id": str(row.get("id", row.get("question_id"))), "turn": turn_of(row)}
    return rows


def one_run(rows: list[dict], args: Args) -> list[dict]:
    """The rows of --judge, --model_a and --model_b; a UserError where several runs are still mixed."""
    wanted = {name: getattr(args, name) for name in ("judge", "model_a", "model_b") if getattr(args, name) is not None}
    kept = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    if not kept:
        raise UserError(f"no row with {wanted}; {rows[0]['where']} has { {name: rows[0][name] for name in wanted} }")
    seen: dict[tuple, dict] = {}
    for row in kept:
        for name in ("judge", "model_a", "model_b", "prompt_sha"):
            # a judge has prompts of its own for some categories and turns, as MT-Bench's
            other = seen.setdefault((name, row["category"], row["turn"]) if name == "prompt_sha" else (name,), row)
            if row[name] != other[name]:
                advice = "judge them apart" if name == "prompt_sha" else f"choose one with --{name}"
                found = f"{name} is {row[name]!r} but {other[name]!r} in {other['where']}"
                raise UserError(f"{row['where']}: mixed runs, {found}; {advice}")
    return kept


def without_repeats(rows: list[dict], names: tuple[str, ...], verdict: str) -> list[dict]:
    """One row per value of `names`; duplicates are a UserError, but for what a resumed run of judge.py appends.

    Of rows with the same `key` a lost one gives way to a later verdict and equal verdicts count once.
    """
    kept: dict[tuple, dict] = {}
    for row in rows:
        other = kept.setdefault(game := tuple(row[name] for name in names), row)
        if other is row:
            continue
        verdicts = {row[verdict], other[verdict]} - {None}
        if row["key"] is None or row["key"] != other["key"] or len(verdicts) > 1:
            told = ", ".join(f"{name} {row[name]!r}" for name in names)
            raise UserError(f"{row['where']}: {told} was judged before, in {other['where']}; remove one of them")
        if other[verdict] is None:
            kept[game] = row
    return list(kept.values())


class Questions(NamedTuple):
    """Questions (id, turn) in the order of the file, with P(A wins) per order (NaN: none) and one of their rows."""

    ids: np.ndarray
    rows: list[dict]
    ab: np.ndarray
    ba: np.ndarray
    both_shown: bool  # some question was presented in both orders


def to_questions(rows: list[dict]) -> Questions:
    """Gather the orders of each question; the same question with another prompt or lengths is a UserError."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        orders = found.setdefault((row["id"], row["turn"]), {})
        for other in orders.values():
            if changed := [name for name in ("prompt", "length_a", "length_b") if other[name] != row[name]]:
                raise UserError(f"{row['where']}: id {row['id']!r} has another {changed[0]} than in {other['where']}")
        orders[row["order"]] = row
    ab, ba = (
        np.array([orders[name]["preference"] if name in orders else None for orders in found.values()], dtype=float)
        for name in ("ab", "ba")
    )
    rows = [next(iter(orders.values())) for orders in found.values()]
    both_shown = any(len(orders) == 2 for orders in found.values())
    return Questions(np.array([row["id"] for row in rows]), rows, ab, ba, both_shown)


def read_table(path: Path, names: tuple[str, ...]) -> np.ndarray:
    """Columns `names` of a .csv file as floats, [rows, columns]; a UserError where one is missing or no number."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; --lc_data names a folder with {path.name}")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        try:
            table = np.array([[float(row[name]) for name in names] for row in csv.DictReader(stream)])
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise UserError(f"{path}: expected columns {', '.join(names)} with numbers, found {error}") from error
    if not len(table):
        raise UserError(f"{path}: no rows")
    return table


def instruction_indices(rows: list[dict], folder: Path, known: set[int]) -> tuple[list[int | None], str]:
    """(AlpacaEval's instruction index of each row, how it was found); known: all indices.

    By the prompt's text (or an id that is one) where a csv of the folder has it, else by the id. Never by its place in
    the file: a file in another order would give a wrong figure without a word.
    """
    texts: dict[str, int | None] = {}  # None where two indices share a text
    for file in sorted(folder.glob("*.csv")):
        with file.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
            for row in csv.DictReader(stream):
                if row.get("instruction") and str(row.get("instruction_index")).isdecimal():
                    text, at = row["instruction"].strip(), int(row["instruction_index"])
                    texts[text] = at if texts.get(text, at) == at else None
    last = [row["prompt"][-1:] if isinstance(row["prompt"], list) else [row["prompt"]] for row in rows]  # a message
    prompts = [part[0].get("content") if part and isinstance(part[0], dict) else part and part[0] for part in last]
    by_text = [texts.get(str(p or r["id"]).strip()) for p, r in zip(prompts, rows, strict=True)]
    by_id = [int(row["id"]) if row["id"].isdecimal() else None for row in rows]
    found = [there if here is None else here for here, there in zip(by_text, by_id, strict=True)]
    how = "id" if None in by_text else "prompt"
    for row, index, here, there in zip(rows, found, by_text, by_id, strict=True):
        if index not in known:
            raise UserError(
                f"{row['where']}: id {row['id'][:40]!r} is no instruction index and its prompt is in no csv of "
                "--lc_data; give every row its index as id, or the folder a csv with instruction_index and instruction"
            )
        if how == "id" and None not in (here, there) and here != there:
            raise UserError(f"{row['where']}: the prompt is instruction {here}, but the id is {row['id']!r}")
    if len(set(found)) < len(found):
        twice = next(row for row, index in zip(rows, found, strict=True) if found.count(index) > 1)
        raise UserError(f"{twice['where']}: its instruction occurs twice")
    return found, how


# ---------------------------------------------------------------------------------------------------------- the results
def length_controlled(questions: Questions, values: np.ndarray, args: Args) -> dict[str, Any]:
    """The length-controlled win-rate of --lc in percent, with its bootstrap error."""
    if without := [row for row in questions.rows if None in (row["length_a"], row["length_b"])]:
        raise UserError(f"{without[0]['where']}: --lc needs length_a and length_b, in characters")
    difference = np.array([row["length_b"] - row["length_a"] for row in questions.rows])
    used = ~np.isnan(values)
    result: dict[str, Any] = {"lc_form": args.lc}
    data: list[np.ndarray]
    fit: Callable[..., float] = lc_glm
    if args.lc == "glm":  # one row per presented order
        p, side = np.r_[questions.ab[used], questions.ba[used]], np.repeat([0.5, -0.5], used.sum())
        columns = p, np.tile(difference[used], 2), side, np.tile(questions.ids[used], 2)
        *data, ids = (column[~np.isnan(p)] for column in columns)
        estimate = lc_glm(*data)
    else:
        if len(set(questions.ids)) < len(questions.ids):
            raise UserError(f"{questions.rows[0]['where']}: --lc alpaca_eval is for one turn; use --lc glm")
        folder = Path(str(args.lc_data))
        table = read_table(folder / "instruction_difficulty.csv", ("instruction_index", "instruction_difficulty"))
        names = ("std_delta_len", "instruction_difficulty", "preference_equivalent")
        gamed, by_index = read_table(folder / "gamed_baseline_rows.csv", names), dict(table.tolist())
        indices, result["lc_aligned_by"] = instruction_indices(questions.rows, folder, set(map(int, by_index)))
        difficulty = np.array([by_index[index] for index in indices])
        data, ids = [values[used], difference[used], difficulty[used]], questions.ids[used]
        estimate, start = lc_alpaca_eval(gamed, None, *data)
        fit = lambda *rows: lc_alpaca_eval(gamed, start, *rows)[0]  # noqa: E731
    resamples = args.bootstrap if math.isfinite(estimate) else 0
    spread = bootstrap_ids(lambda rows: fit(*(column[rows] for column in data)), ids, resamples, args.seed)
    numbers = {"length_controlled_win_rate": estimate, "lc_standard_error": spread["standard_error"]}
    numbers |= {"lc_ci_low": spread["ci_low"], "lc_ci_high": spread["ci_high"]}
    return result | {name: 100 * x for name, x in numbers.items()} | {"lc_failed_resamples": spread["failed"]}


def summarise(rows: list[dict], args: Args) -> tuple[dict[str, Any], dict[tuple, tuple[float, dict]]]:
    """(everything about one pair of models, (preference, row) of each (id, turn)): for command line and module.

    A question without a verdict is in the second dict too, with NaN.
    """
    # 1. rows to questions
    kept = without_repeats(own := one_run(rows, args), ("id", "turn", "order"), "preference")
    lost = Counter(str(r["error"] or "no reason given").partition(":")[0] for r in kept if r["preference"] is None)
    questions = to_questions(kept)
    ab, ba = questions.ab, questions.ba
    values = mtbench_rule(ab, ba) if args.rule == "mtbench" else average_orders(ab, ba, questions.both_shown)
    used = ~np.isnan(values)
    if not used.any():
        needed = "both orders" if args.rule == "mtbench" or questions.both_shown else "any order"
        raise UserError(f"{kept[0]['where']} and on: no question has a verdict in {needed}; lost rows: {dict(lost)}")
    preferences, ids = values[used], questions.ids[used]

    # 2. win-rates
    units, discrete = (cluster_means(x, ids) for x in (preferences, (np.sign(preferences - 0.5) + 1) / 2))
    result: dict[str, Any] = {name: kept[0][name] for name in ("model_a", "model_b", "judge")} | {"rule": args.rule}
    result |= {"n": len(units), **win_rate_interval(units, args.seed)}
    result["discrete_win_rate"] = 100 * float(discrete.mean())
    result |= dict.fromkeys(("length_controlled_win_rate", "lc_standard_error", "lc_ci_low", "lc_ci_high", "lc_form"))
    if args.lc != "none":
        result |= length_controlled(questions, values, args)

    # 3. what was lost, and position
    orders = np.column_stack([~np.isnan(ab), ~np.isnan(ba)]).sum(axis=1)
    result |= {
        "questions": len(preferences), "ties": int(np.sum(preferences == 0.5)), "rows": len(kept),
        "lost": sum(lost.values()), "lost_by_reason": dict(lost.most_common()), "repeated_rows": len(own) - len(kept),
        "other_runs": len(rows) - len(own), "one_order": int(np.sum(orders == 1)),
        "questions_left_out": int(np.sum(~used)), **swap_table(ab, ba),
    }  # fmt: skip
    first, side = np.r_[ab[used], 1 - ba[used]], np.repeat([1.0, -1.0], used.sum())
    seen = ~np.isnan(first)
    logit, error = position_logit(first[seen], side[seen][:, None], np.tile(ids, 2)[seen])
    result |= {"position_logit": logit, "position_logit_se": error, "by_category": {}}

    # 4. by category
    categories = np.array([str(row["category"] or "(none)") for row in questions.rows])[used]
    for category in sorted(set(categories.tolist())) if len(set(categories)) > 1 else ():
        part = cluster_means(preferences[categories == category], ids[categories == category])
        result["by_category"][category] = {"n": len(part), **win_rate_interval(part, args.seed)}
    pairs = zip(values.tolist(), questions.rows, strict=True)
    return without_nan(result), {(row["id"], row["turn"]): (value, row) for value, row in pairs}


def compare_models(first: list[dict], second: list[dict], args: Args) -> dict[str, Any]:
    """The paired difference of two models' win-rates against one baseline, in percent, on the questions of both."""
    (one, a), (other, b) = summarise(first, args), summarise(second, args)
    for name in ("model_b", "judge"):
        if one[name] != other[name]:
            told = f"{name} is {other[name]!r}, but {one[name]!r} in {first[0]['where']}"
            raise UserError(f"{second[0]['where']}: {told}; expected one baseline and one judge")
    both = [key for key in a if key in b]
    alone = [[mine[key][1] for key in mine if key not in yours] for mine, yours in ((a, b), (b, a))]
    if any(alone) and not (args.common and both):
        row, where = (alone[0] or alone[1])[0], (second if alone[0] else first)[0]["where"].rpartition(",")[0]
        told = f"{len(alone[0])} questions are in the first file only, {len(alone[1])} in the second"
        raise UserError(f"{row['where']}: id {row['id']!r} is not in {where}; {told}; --common leaves them out")
    for key in both:  # a later turn's prompt holds the model's own first answer
        if key[1] == "1" and a[key][1]["prompt"] != b[key][1]["prompt"]:
            where = f"{a[key][1]['where']} and {b[key][1]['where']}"
            raise UserError(f"id {key[0]!r} has different prompts in {where}; expected the same questions")
    judged = [key for key in both if not math.isnan(a[key][0] + b[key][0])]
    groups = np.array([key[0] for key in judged])
    found = paired_difference(*(cluster_means(np.array([side[key][0] for key in judged]), groups) for side in (a, b)))
    found |= {"questions": len(judged), "only_in_first": len(alone[0]), "only_in_second": len(alone[1])}
    return without_nan(found | {"lost_in_one": len(both) - len(judged), "first": one, "second": other})


def rate(rows: list[dict], judge: str | None) -> dict[str, Any]:
    """Single grading: mean rating of each model over ids (turns averaged first), with interval and lost rows."""
    chosen = [row for row in rows if judge in (None, row["judge"])]
    if not chosen:
        raise UserError(f"no row of judge {judge!r}; {rows[0]['where']} is of {rows[0]['judge']!r}")
    if mixed := [row for row in chosen if row["judge"] != chosen[0]["judge"]]:
        told = f"judge is {mixed[0]['judge']!r} but {chosen[0]['judge']!r} in {chosen[0]['where']}"
        raise UserError(f"{mixed[0]['where']}: mixed runs, {told}; choose one with --judge")
    models: dict[str, list[dict]] = {}
    for row in (kept := without_repeats(chosen, ("model", "id", "turn"), "rating")):
        models.setdefault(str(row["model"]), []).append(row)
    result = {}
    for model, own in models.items():
        rated = [row for row in own if row["rating"] is not None]
        units = cluster_means(np.array([row["rating"] for row in rated]), np.array([row["id"] for row in rated]))
        result[model] = mean_interval(units) | {"rows": len(own), "lost": len(own) - len(rated)}
    counts = {"repeated_rows": len(chosen) - len(kept), "other_runs": len(rows) - len(chosen)}
    return without_nan({"judge": chosen[0]["judge"], "ratings": result, **counts})


# ------------------------------------------------------------------------------------------------------------- printing
def figure(value: float | None) -> str:
    """A count, a number with two decimals, or - where there is none."""
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"


def joined(r: dict[str, Any], *names: str) -> str:
    """Figures of the result in one line, under their names there."""
    return ", ".join(f"{name.replace('_', ' ')} {figure(r[name])}" for name in names)


def table_row(name: str, value: float | None, low: float | None, high: float | None, rest: str) -> str:
    """One row of the table: name, value, interval, and what else is to be said."""
    return f"{name:32} {figure(value):>7}   {f'{figure(low)} to {figure(high)}':18} {rest}"


def rate_row(name: str, r: dict[str, Any]) -> str:
    """The row of a win-rate."""
    error = f"SE {figure(r['standard_error'])}, {r['interval']}, n {r['n']}"
    return table_row(name, r["win_rate"], r["ci_low"], r["ci_high"], error)


def report_rates(r: dict[str, Any]) -> list[str]:
    """The printed table of `summarise`."""
    lines = [
        f"{r['model_a'] or 'A'} against {r['model_b'] or 'B'}, judge {r['judge'] or 'not named'}, rule {r['rule']}",
        f"{'':32} {'percent':>7}   95 % interval",
        rate_row("win-rate", r),
        f"{'discrete win-rate':32} {r['discrete_win_rate']:7.2f}",
    ]
    if r["lc_form"]:
        rest = f"SE {figure(r['lc_standard_error'])}, bootstrap, {r['lc_failed_resamples']} resamples without a fit"
        lc = r["length_controlled_win_rate"]
        lines.append(table_row(f"length-controlled ({r['lc_form']})", lc, r["lc_ci_low"], r["lc_ci_high"], rest))
        glm = "  at equal length and no position effect; not AlpacaEval's number"
        lines.append(glm if r["lc_form"] == "glm" else f"  instructions found by {r['lc_aligned_by']}")
    lines += [rate_row(f"  {name}", part) for name, part in r["by_category"].items()]
    lines.append(
        joined(r, "questions", "ties", "one_order", "questions_left_out", "rows", "repeated_rows", "other_runs")
    )
    lines.append(f"lost rows {r['lost']}" + "".join(f", {why} {count}" for why, count in r["lost_by_reason"].items()))
    if r["both_orders"]:
        lines.append(joined(r, "swap_consistency", "both_first", "both_second", "first_slot_share"))
        lines.append(joined(r, "position_logit", "position_logit_se"))
    else:
        lines.append("no question was judged in both orders: the judge's taste for a slot is not averaged out")
    return [*lines, LIMITS]


def report_difference(r: dict[str, Any]) -> list[str]:
    """The printed table of `compare_models`."""
    a, b = r["first"], r["second"]
    p = "p -" if r["p_value"] is None else f"p {r['p_value']:.3g}"
    return [
        f"{a['model_a'] or 'first'} minus {b['model_a'] or 'second'}, both against {a['model_b'] or 'B'}, in percent",
        *(rate_row(str(side["model_a"] or "A"), side) + f", lost rows {side['lost']}" for side in (a, b)),
        table_row("difference", r["difference"], r["ci_low"], r["ci_high"], f"{p}, n {r['n']}"),
        joined(r, "paired_se", "unpaired_se", "detectable_difference") + " (with 80 % power at this n)",
        joined(r, "questions", "only_in_first", "only_in_second", "lost_in_one"),
        LIMITS,
    ]


def report_ratings(r: dict[str, Any]) -> list[str]:
    """The printed table of `rate`."""
    lines = [f"{'mean rating, 1 to 10':32} {'':7}   95 % interval"]
    for model, part in r["ratings"].items():
        rest = f"n {part['n']}, lost rows {part['lost']} of {part['rows']}"
        lines.append(table_row(model, part["mean"], part["ci_low"], part["ci_high"], rest))
    lines.append(joined(r, "repeated_rows", "other_runs"))
    return [*lines, "It can't tell whether a point of this judge is worth anything to people."]


# --------------------------------------------------------------------------------------- Hugging Face evaluate's module
class WinRate(evaluate.Metric):
    """`evaluate.load("eval/win_rate.py").compute(preferences=..., ids=..., orders=...)`: see the top of the file."""

    def _info(self) -> evaluate.MetricInfo:
        """What it takes: `preferences`; everything else is optional."""
        return evaluate.MetricInfo(
            description="Win-rate of model A over model B from pairwise judgments, with standard error and interval.",
            citation="",
            inputs_description=(
                "preferences: P(A wins) in [0, 1] or None, one per presented order. Optional lists of the same length: "
                f"{', '.join(COLUMNS)}; an order is 'ab' or 'ba'. Settings: rule, lc, lc_data, bootstrap, seed."
            ),
            features=datasets.Features({"preferences": datasets.Value("float64")}),
        )

    def _compute(self, preferences: list, **given: Any) -> dict:
        """The dict that the command line writes; without ids every preference is a question of its own."""
        n, settings = len(preferences), {k: v for k, v in given.items() if k not in COLUMNS and v is not None}
        if unknown := settings.keys() - Args.__dataclass_fields__.keys():
            raise UserError(f"compute: unknown {', '.join(sorted(unknown))}; expected lists {', '.join(COLUMNS)}")
        columns: dict[str, list] = {"id": list(range(n)), "order": ["ab"] * n}
        columns |= {key: list(given[name]) for name, key in COLUMNS.items() if given.get(name) is not None}
        for name, values in columns.items():
            if len(values) != n:
                raise UserError(f"compute: {len(values)} values of {name} for {n} preferences")
        columns = {name: np.asarray(values, dtype=object).tolist() for name, values in columns.items()}
        rows = [{name: values[i] for name, values in columns.items()} for i in range(n)]
        judged = [
            judgment(row | {"preference": p if p == p else None}, f"compute, row {i}")  # None comes as NaN
            for i, (row, p) in enumerate(zip(rows, preferences, strict=True), 1)
        ]
        return summarise(judged, checked(Args(**settings)))[0]


# ----------------------------------------------------------------------------------------------------------------- main
def checked(args: Args) -> Args:
    """The same args; a UserError where flags contradict each other."""
    if (args.lc == "alpaca_eval") != (args.lc_data is not None):
        raise UserError("--lc alpaca_eval and --lc_data DIR go together: DIR holds instruction_difficulty.csv and more")
    if args.bootstrap < 2:
        raise UserError(f"--bootstrap is {args.bootstrap}, expected at least 2")
    return args


def main(args: Args, files: list[str] | None = None) -> dict[str, Any]:
    """Win-rate of model A over model B from judgments; of two files, the difference of their win-rates."""
    # 1. read
    checked(args)
    sources = files or [str(DEFAULT)]
    if not files and not DEFAULT.is_file():
        raise UserError(f"{DEFAULT}: no such file; run `python eval/judge.py` first, or name a file of judgments")
    if len(sources) > 2:
        raise UserError(f"{len(sources)} files: expected one, or two to compare; many models: eval/ranking.py")
    tables = [read_judgments(source) for source in sources]
    rated = [source for source, rows in zip(sources, tables, strict=True) if "rating" in rows[0]]
    if rated and len(tables) == 2:
        raise UserError(f"{rated[0]}: ratings of single grading; two files are compared by pairwise judgments only")

    # 2. compute
    name = "win_rate.json"
    if rated:
        lines = report_ratings(result := rate(tables[0], args.judge))
    elif len(tables) == 2:
        lines = report_difference(result := compare_models(tables[0], tables[1], args))
        name = "win_rate_difference.json"
    else:
        lines = report_rates(result := summarise(tables[0], args)[0])

    # 3. show and write
    output = Path(args.output) if args.output else Path(sources[0]).with_name(name)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    print("\n".join([*lines, f"written: {output}"]))
    return result


if __name__ == "__main__":
    run_tool(main, Args, "judgments.jsonl; two files: the difference of two models against one baseline")
