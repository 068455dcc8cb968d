# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers==5.23.0", "numpy==2.4.6", "scipy==1.17.1", "statsmodels==0.15.0"]
# ///
"""How often two judges, or a judge and people, agree on the questions that both have judged.

A rater is one file, or each value of "judge" in a file. The preferences of a rater for one comparison are averaged over
the two orders first; above 0.5 it says A, below B, and within --tie_margin of 0.5 a tie. For verdicts of win, tie and
loss --tie_margin 0.25 is MT-Bench's rule: orders that differ make a tie (Zheng et al. 2023).

- agreement        share of equal verdicts, a tie being a verdict (MT-Bench's setup 1; by chance about 1/3)
- without ties     the same where neither says tie (setup 2; by chance about 1/2)
- kappa            Cohen's: agreement beyond chance, 0 none, 1 whole (statsmodels), with ties and without
- soft             mean of p q + (1 - p)(1 - q): the chance that two votes, drawn with p and q, are equal; for judges
                   that give probabilities. Against labels that were drawn (0 or 1) it estimates how often two
                   annotators with these probabilities agree
- by order         for a rater with both orders: agreement of each order alone, their mean, of both at once, and how
                   often the rater's two orders say the same (its swap consistency)

Intervals are clustered by question (id): shares by Wilson's interval with the effective number of questions
p (1 - p) / SE^2, SE the sandwich estimator (Korn and Graubard 1998), soft by SE and Student's t, kappa by resampling
questions. Three raters or more: every pair, their mean, and Fleiss' kappa where all have a verdict.

A comparison without a verdict in one order is left out whole, as in eval/ranking.py; "lost as disagreement" shows the
agreement if everything that only one rater answered counted as unequal.

Reads judgments {"id", "preference": number in [0, 1] that A wins, or null, "order", "turn", "model_a", "model_b",
"judge"}, labels {"id", "preference"}, or FastChat's pairwise judgments (g1_winner, g2_winner). Keys that all rows of
all files have among id, turn, model_a and model_b say which comparison it is; without models, A must be the same answer
in all files.

    python eval/agreement.py runs/judge/judgments.jsonl human_labels.jsonl

What it can't tell: who is right. Two judges with the same bias agree well.
"""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.inter_rater import aggregate_raters, cohens_kappa, fleiss_kappa
from statsmodels.stats.proportion import proportion_confint

if not __package__:  # run as a file or imported by its bare name: it belongs to the package eval all the same
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "eval"

from .common import arg, read_votes, run_tool, UserError, write_json

VERDICTS = ("B", "tie", "A")  # verdict + 1 is the index


# ------------------------------------------------------------------------------------------------------------ arguments


@dataclass
class Args:
    tie_margin: float = arg(0.0, "an order-averaged preference this near to 0.5 is a tie; 0.25: MT-Bench's rule")
    bootstrap: int = arg(1000, "resamples of the questions for the interval of kappa")
    seed: int = arg(0, "seed of the resampling")
    output: str | None = arg(None, "result file; default: agreement.json beside the first input")


# ------------------------------------------------------------------------------------------------------------ the maths
def verdicts(preferences: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """1 where A is preferred, -1 where B is, 0 for a tie: within `margin` of 0.5.

    >>> verdicts(np.array([1.0, 0.75, 0.5, 0.3]), 0.25).tolist()
    [1, 0, 0, 0]
    """
    return (np.sign(preferences - 0.5) * (np.abs(preferences - 0.5) > margin + 1e-12)).astype(int)


def soft_agreement(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Chance that two votes, drawn with p and q, are equal: p q + (1 - p)(1 - q).

    >>> soft_agreement(np.array([0.75]), np.array([0.5])), soft_agreement(np.array([0.75]), np.array([1.0]))
    (array([0.5]), array([0.75]))
    """
    return p * q + (1 - p) * (1 - q)


def clustered_mean(values: np.ndarray, groups: np.ndarray) -> tuple[float, float, int]:
    """(mean, standard error, number of groups) of a mean whose values go together in groups.

    SE^2 = G / (G - 1) sum_g (sum_{i in g} (x_i - mean))^2 / n^2: the sandwich estimator of a constant.

    >>> [round(x, 3) for x in clustered_mean(np.array([1.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1]))]
    [0.5, 0.5, 2]
    """
    n_groups, mean = len(np.unique(groups)), float(np.mean(values)) if len(values) else math.nan
    if n_groups < 2 or np.ptp(values) == 0:  # equal values: not even a rounding error
        return mean, math.nan if n_groups < 2 else 0.0, n_groups
    fitted = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    return mean, float(fitted.bse[0]), n_groups


def share_interval(hits: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """n, value, standard_error, 95 % interval of a share; hits (rows,) of 0 and 1, groups (rows,).

    Wilson's interval with p (1 - p) / SE^2 in place of n (not more than the rows); the number of groups at 0 and 1.

    >>> share = share_interval(np.array([1.0, 1.0, 1.0, 0.0]), np.arange(4))  # SE 0.25: 3 effective questions
    >>> [round(share[name], 3) for name in ("value", "standard_error", "ci_low", "ci_high")]
    [0.75, 0.25, 0.256, 0.963]
    """
    if not len(hits):
        return {"n": 0, "value": None, "standard_error": None, "ci_low": None, "ci_high": None}
    mean, error, n_groups = clustered_mean(hits, groups)
    varied = 0 < mean < 1 and error > 0
    effective = min(mean * (1 - mean) / error**2, len(hits)) if varied else n_groups
    low, high = proportion_confint(mean * effective, effective, method="wilson")
    return {"n": len(hits), "value": mean, "standard_error": None if math.isnan(error) else error,
            "ci_low": float(low), "ci_high": float(high)}  # fmt: skip


def mean_t_interval(values: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """n, value, standard_error and 95 % interval of a mean, clustered by groups, Student's t with groups - 1.

    >>> interval = mean_t_interval(np.array([0.25, 0.75]), np.arange(2))  # SE 0.25, t 12.706
    >>> [round(interval[name], 3) for name in ("value", "standard_error", "ci_low", "ci_high")]
    [0.5, 0.25, -2.677, 3.677]
    """
    mean, error, n_groups = clustered_mean(values, groups)
    if math.isnan(error):
        return {"n": len(values), "value": mean, "standard_error": None, "ci_low": None, "ci_high": None}
    half = float(stats.t.ppf(0.975, n_groups - 1)) * error
    return {"n": len(values), "value": mean, "standard_error": error, "ci_low": mean - half, "ci_high": mean + half}


def kappa_of(table: np.ndarray) -> float:
    """Cohen's kappa of a table of counts (first rater's verdict, second's); NaN where both always say the same one.

    >>> round(kappa_of(np.array([[20.0, 5.0], [10.0, 15.0]])), 3)  # agreement 0.7, by chance 0.5
    0.4
    """
    shares = table / table.sum() if table.sum() else table
    if np.isclose(shares.sum(1) @ shares.sum(0), 1) or not table.sum():
        return math.nan
    return float(cohens_kappa(table, return_results=False))


def fleiss_of(ratings: np.ndarray) -> float:
    """Fleiss' kappa of verdicts (comparisons, raters); NaN where all always say the same.

    >>> round(fleiss_of(np.array([[1, 1, 1], [0, 0, 0]])), 3)
    1.0
    """
    if len(np.unique(ratings)) < 2:
        return math.nan
    return float(fleiss_kappa(aggregate_raters(ratings)[0]))


def resampled(statistic: Callable, groups: np.ndarray, n: int, seed: int) -> dict[str, Any]:
    """{"value", "ci_low", "ci_high", "undefined"} of statistic(row indices); groups are resampled whole.

    `undefined` counts resamples in which the statistic is NaN; the percentiles are of the others.
    """
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    rng = np.random.default_rng(seed)
    picks = (np.concatenate([members[k] for k in rng.integers(len(members), size=len(members))]) for _ in range(n))
    value = statistic(np.arange(len(groups))) if members else math.nan
    draws = np.array([statistic(pick) for pick in picks]) if not math.isnan(value) else np.zeros(0)
    known = draws[~np.isnan(draws)]
    low, high = np.percentile(known, [2.5, 97.5]).tolist() if len(known) else (None, None)
    return {"value": None if math.isnan(value) else value, "ci_low": low, "ci_high": high,
            "undefined": len(draws) - len(known)}  # fmt: skip


def kappa_interval(first: np.ndarray, second: np.ndarray, groups: np.ndarray, args: Args) -> dict[str, Any]:
    """Cohen's kappa of two raters' verdicts (rows,) in {-1, 0, 1}, with an interval by resampling groups."""

    def statistic(rows: np.ndarray) -> float:
        table = np.zeros((3, 3))
        np.add.at(table, (first[rows] + 1, second[rows] + 1), 1)
        return kappa_of(table)

    return {"n": len(first), **resampled(statistic, groups, args.bootstrap, args.seed)}


# -------------------------------------------------------------------------------------------------------------- reading


def read_raters(files: list[str]) -> tuple[dict[str, dict[tuple, dict]], dict[str, Counter]]:
    """Per rater {comparison: {order: preference for A}}, {} where it was asked and a verdict is missing; its lost rows.

    A comparison is (id, turn, i, j) with i < j by name, where all rows of all files have these keys; the preference is
    for i. Errors, with file and line: the same vote twice.
    """
    tables = {source: read_votes(source) for source in dict.fromkeys(files)}
    rows = [row for table in tables.values() for row in table]
    models = all(row.get("model_a") is not None and row.get("model_b") is not None for row in rows)
    turns = all("turn" in row for row in rows)
    named = [judge for table in tables.values() for judge in {str(row.get("judge", "")) for row in table}]
    raters: dict[str, dict[tuple, dict]] = defaultdict(lambda: defaultdict(dict))
    lost: dict[str, Counter] = defaultdict(Counter)
    places: dict[tuple, str] = {}
    for source, row in ((source, row) for source, table in tables.items() for row in table):
        place, judge = f"{source}, line {row['_line']}", str(row.get("judge", ""))
        name = source if not judge else judge if named.count(judge) == 1 else f"{source}:{judge}"
        p, order, key = row["preference"], row.get("order"), [str(row["id"])]
        key += [str(row["turn"])] if turns else []
        if models:
            key += sorted((str(row["model_a"]), str(row["model_b"])))
            if str(row["model_a"]) > str(row["model_b"]):  # another file may have these two the other way round
                p, order = None if p is None else 1 - p, {"ab": "ba", "ba": "ab", None: None}[order]
        votes = raters[name][tuple(key)]
        if votes.get(order) is not None and p is not None:
            raise UserError(f"{place}: the same vote as in {places[name, *key, order]}; keep one of them, or name the "
                            "raters in the key judge (votes are told apart by id, order, and turn, model_a and model_b "
                            "where all files have them)")  # fmt: skip
        lost[name]["no verdict, asked again"] += order in votes
        places[name, *key, order] = place
        votes[order] = votes.get(order) if p is None else float(p)
    for name, comparisons in raters.items():
        for comparison, votes in comparisons.items():
            if (missing := list(votes.values()).count(None)) > 0:
                lost[name]["no verdict"] += missing
                lost[name]["verdict whose other order has none"] += len(votes) - missing
                comparisons[comparison] = {}
    return dict(raters), {name: +counts for name, counts in lost.items()}


# ------------------------------------------------------------------------------------------------ agreement and print
def by_order(
    votes: dict[tuple, dict], other: np.ndarray, keys: list[tuple], groups: np.ndarray, margin: float
) -> dict[str, Any] | None:
    """Agreement of each order of a rater with `other` (verdicts of keys); None where no comparison has two orders."""
    rows = np.array([k for k, key in enumerate(keys) if {"ab", "ba"} <= votes[key].keys()], dtype=int)
    if not len(rows):
        return None
    ab, ba = (verdicts(np.array([votes[keys[k]][order] for k in rows]), margin) for order in ("ab", "ba"))
    hits = {"ab": ab == other[rows], "ba": ba == other[rows]}
    hits |= {"both": hits["ab"] & hits["ba"], "consistent": ab == ba}
    shares: dict[str, Any] = {name: share_interval(hit.astype(float), groups[rows]) for name, hit in hits.items()}
    shares["mean"] = mean_t_interval((hits["ab"].astype(float) + hits["ba"]) / 2, groups[rows])
    return shares


def agree(names: tuple[str, str], raters: dict[str, dict[tuple, dict]], args: Args) -> dict[str, Any]:
    """Everything about one pair of raters."""
    one, other = (raters[name] for name in names)
    keys = [key for key in one if one[key] and other.get(key)]
    asked = [key for key in one if key in other]
    if not asked:
        raise UserError(f"{names[0]} and {names[1]} have no comparison in common; ids of the first: "
                        f"{', '.join(key[0] for key in list(one)[:3])}, of the second: "
                        f"{', '.join(key[0] for key in list(other)[:3])}")  # fmt: skip
    if not keys:
        raise UserError(f"{names[0]} and {names[1]}: none of {len(asked)} common comparisons has a verdict of both")
    groups = np.unique([key[0] for key in keys], return_inverse=True)[1]
    p, q = (np.array([np.mean(list(votes[key].values())) for key in keys]) for votes in (one, other))
    v, w = verdicts(p, args.tie_margin), verdicts(q, args.tie_margin)
    equal, decided = (v == w).astype(float), (v != 0) & (w != 0)
    table = np.zeros((3, 3), int)
    np.add.at(table, (v + 1, w + 1), 1)
    return {
        "raters": list(names), "n": len(keys), "n_questions": int(groups.max()) + 1,
        "agreement": share_interval(equal, groups),
        "agreement_without_ties": share_interval(equal[decided], groups[decided]),
        "kappa": kappa_interval(v, w, groups, args),
        "kappa_without_ties": kappa_interval(v[decided], w[decided], groups[decided], args),
        "soft_agreement": mean_t_interval(soft_agreement(p, q), groups),
        "agreement_lost_as_disagreement": float(equal.sum()) / len(asked),
        "lost": {"no verdict of one or both": len(asked) - len(keys), "only in the first": len(one) - len(asked),
                 "only in the second": len(other) - len(asked)},
        "table": {a: dict(zip(VERDICTS, row, strict=True)) for a, row in zip(VERDICTS, table.tolist(), strict=True)},
        "by_order": {names[0]: by_order(one, w, keys, groups, args.tie_margin),
                     names[1]: by_order(other, v, keys, groups, args.tie_margin)},
    }  # fmt: skip


def among_all(raters: dict[str, dict[tuple, dict]], pairs: list[dict], args: Args) -> dict[str, Any]:
    """Three raters or more: mean of the pairs' agreement, and Fleiss' kappa where all have a verdict."""
    tables = list(raters.values())
    keys = [key for key in tables[0] if all(table.get(key) for table in tables)]
    result: dict[str, Any] = {"mean_pairwise_agreement": float(np.mean([pair["agreement"]["value"] for pair in pairs]))}
    if keys:
        groups = np.unique([key[0] for key in keys], return_inverse=True)[1]
        means = np.array([[np.mean(list(table[key].values())) for table in tables] for key in keys])
        ratings = verdicts(means, args.tie_margin)
        equal = np.mean([ratings[:, a] == ratings[:, b] for a, b in combinations(range(len(tables)), 2)], axis=0)
        result["pairwise_agreement_where_all_have_a_verdict"] = mean_t_interval(equal, groups)
        found = resampled(lambda rows: fleiss_of(ratings[rows]), groups, args.bootstrap, args.seed)
        result["fleiss_kappa"] = {"n": len(keys), **found}
    return result


def share_line(name: str, share: dict[str, Any] | None) -> str:
    """One line of the table.

    >>> share_line("agreement", {"n": 4, "value": 0.75, "ci_low": 0.3, "ci_high": None})
    '  agreement              0.750  [0.300, open]       n 4'
    """
    cells = ["open" if share is None or share[k] is None else f"{share[k]:.3f}" for k in ("value", "ci_low", "ci_high")]
    return f"  {name:22} {cells[0]:5}  {f'[{cells[1]}, {cells[2]}]':18}  n {share['n'] if share else 0}"


def print_agreement(result: dict[str, Any]) -> None:
    """A block per pair of raters, then all together, then what was lost."""
    for pair in result["pairs"]:
        print(
            f"{pair['raters'][0]}  and  {pair['raters'][1]}: {pair['n']} comparisons, {pair['n_questions']} questions"
        )
        names = ("agreement", "agreement_without_ties", "kappa", "kappa_without_ties", "soft_agreement")
        for name in names:
            print(share_line(name.replace("_", " "), pair[name]))
        for rater, shares in pair["by_order"].items():
            for name in ("ab", "ba", "mean", "both", "consistent") if shares else ():
                print(share_line(f"by order, {name}", shares[name]) + f"  {rater}")
        lost = ", ".join(f"{n} {reason}" for reason, n in pair["lost"].items() if n)
        print(f"  lost: {lost or 'none'}; agreement with the unanswered as disagreement "
              f"{pair['agreement_lost_as_disagreement']:.3f}")  # fmt: skip
    if result["all"]:
        print(f"all {len(result['raters'])}: mean agreement of pairs {result['all']['mean_pairwise_agreement']:.3f}")
        if "fleiss_kappa" in result["all"]:
            print(share_line("Fleiss' kappa", result["all"]["fleiss_kappa"]))
    for name, counts in result["lost"].items():
        print(f"lost rows of {name}: {', '.join(f'{n} {reason}' for reason, n in counts.items()) or 'none'}")


def main(args: Args, files: list[str]) -> dict[str, Any]:
    """Agreement of judges, or of judges and people, with intervals clustered by question."""
    if not files:
        raise UserError("name two files of judgments or labels, or one whose rows name several judges")
    if not 0 <= args.tie_margin < 0.5 or args.bootstrap < 20:
        raise UserError("--tie_margin must be in [0, 0.5), --bootstrap at least 20")
    output = Path(args.output) if args.output else Path(files[0]).parent / "agreement.json"

    # 1. Votes by rater and comparison
    raters, lost = read_raters(files)
    if len(raters) < 2:
        raise UserError(f"{', '.join(files)}: one rater only ({', '.join(raters)}); agreement needs two")

    # 2. Every pair, and all together
    pairs = [agree(names, raters, args) for names in combinations(raters, 2)]
    result = {"files": files, "tie_margin": args.tie_margin, "bootstrap": args.bootstrap, "seed": args.seed,
              "raters": list(raters), "lost": {name: dict(counts) for name, counts in lost.items()}, "pairs": pairs,
              "all": among_all(raters, pairs, args) if len(raters) > 2 else None}  # fmt: skip

    # 3. Table and result
    print_agreement(result)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    print(f"agreement: wrote {output}")
    return result


if __name__ == "__main__":
    run_tool(main, Args, "two or more .jsonl files of judgments or labels")
