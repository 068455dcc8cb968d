# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers==5.23.0", "numpy==2.4.6", "scipy==1.17.1", "statsmodels==0.15.0", "matplotlib==3.11.2"]
# ///
"""Many models from pairwise judgments: Bradley-Terry strengths on an Elo scale, with the error they have.

    --ties half       logit P(i beats j) = b_i - b_j + g o          a tie is half a win (Bradley and Terry 1952)
    --ties davidson   P(i) : P(j) : P(tie) = e^(D/2) : e^(-D/2) : nu,  D = b_i - b_j + g o          (Davidson 1970)

b: strengths; g: advantage of the slot shown first; o = 1 where i is shown first, -1 where j is, 0 unknown. Elo points
are 400 / ln 10 = 173.7 times b; their mean is 0, or the model of `--anchor` has 1000. Both models are fitted by
statsmodels' GLM: binomial, or Poisson with an intercept per pair and order, which is the same likelihood.

- `--order_effect auto` fits g wherever the data can tell it from the strengths. Without it a biased judge's votes look
  like coin flips and all strengths shrink; with both orders of each pair the ranking itself is the same.
- Intervals: questions are resampled, not votes, since votes on one question go together; every model is refitted
  (percentiles of `--bootstrap` refits). Standard errors: "iid" takes votes as independent, "clustered" is the sandwich
  estimator by question. Both are of b_i - mean(b), with --anchor of b_i - b_anchor.
- Ranks: "2 (1-3)" of five models: none is surely better, two are surely worse. Surely: the 95 % interval of the
  difference, from the same refits, does not reach 0 (no correction for many pairs).
- A model that only wins (or only loses, or is cut off from the rest by such) has no finite strength. This is found
  exactly (a linear program). Then every model gets half a win and half a loss against an average one; the strength of
  this model is that ridge's choice and no measurement, and its interval is open on that side. The other end is where so
  clean a record has a chance of 2.5 %, a question counting once. Elo 0 is the mean of the other models.
- A comparison of which one order got no verdict is left out whole, as the other order alone would carry its bias.
- Win-rates are means over comparisons (question, turn, opponent) of the order-averaged preference; "MT-Bench rule":
  a win only where both orders agree, else a tie (Zheng et al. 2023).

Reads any number of .jsonl files of eval/judge.py, rows {"id", "model_a", "model_b", "preference": chance in [0, 1] that
A wins or null, "order": "ab" | "ba", "turn", "judge", "prompt"} (the last four may be absent), or of FastChat's
pairwise judgments, rows {"question_id", "model_1", "model_2", "g1_winner", "g2_winner", "turn", "judge"}.

    python eval/ranking.py runs/judge/judgments.jsonl more.jsonl --anchor gpt-3.5-turbo

What it can't tell: why a model wins. Length, style and the judge's own taste are in the strengths.
"""

import math
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import statsmodels.api as sm
from scipy import linalg, optimize, sparse, special

if not __package__:  # run as a file or imported by its bare name: it belongs to the package eval all the same
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "eval"

from .common import arg, read_votes, run_tool, UserError, write_file, write_json

JUDGMENTS = Path("runs/judge/judgments.jsonl")  # where judge.py writes, below the current folder
ELO = 400 / math.log(10)  # points per unit of log-odds
MARKERS = {"above": ">", "below": "<", "unknown": "x", None: "o"}  # of a strength without a bound on that side
ERRORS = ("iid", "clustered")
RIDGE = 0.5  # wins and losses against an average model, for every model where a strength would be infinite


# ------------------------------------------------------------------------------------------------------------ arguments


@dataclass
class Args:
    ties: Literal["half", "davidson"] = arg("half", "a tie counts as half a win, or is an outcome of its own")
    order_effect: Literal["auto", "no"] = arg("auto", "fit the advantage of the first slot where the data can tell it")
    anchor: str | None = arg(None, "model whose strength is 1000; default: the mean of all is 0")
    judge: str | None = arg(None, "use the rows of this judge only")
    bootstrap: int = arg(500, "refits on resampled questions for intervals and ranks")
    seed: int = arg(0, "seed of the resampling")
    output: str | None = arg(None, "result file; default: ranking.json beside the first input; the plot is .png")


# ------------------------------------------------------------------------------------------------------------ the maths
def strength_basis(n_models: int) -> np.ndarray:
    """Basis (n_models + 1, n_models - 1) of the strengths with sum 0: b = basis @ parameters; the last row is 0.

    The last row stands for an average model, against which a ridge plays.

    >>> np.round(strength_basis(2) @ [1.0], 3)
    array([ 0.707, -0.707,  0.   ])
    """
    return np.vstack([linalg.helmert(n_models).T, np.zeros(n_models - 1)])


def outcome_features(cells: np.ndarray, basis: np.ndarray, order_effect: bool, davidson: bool) -> np.ndarray:
    """Features (cells, outcomes, parameters), of which the log-odds of two outcomes are differences.

    cells (cells, 3): i, j, o. Outcomes: i wins, [tie,] j wins. Parameters: of the basis, then [g], then [log nu].

    >>> features = outcome_features(np.array([[0, 1, 1]]), strength_basis(2), order_effect=True, davidson=False)
    >>> np.round(features[0] @ [1 / 2**0.5, 0.2], 1)  # b = 0.5, -0.5, g = 0.2: D = 1.2
    array([ 0.6, -0.6])
    """
    i, j, order = cells.T
    gap = basis[i] - basis[j]
    if order_effect:
        gap = np.column_stack([gap, order])
    if not davidson:
        return np.stack([gap / 2, -gap / 2], axis=1)
    nothing = np.zeros((len(cells), 1))
    win, loss = np.hstack([gap / 2, nothing]), np.hstack([-gap / 2, nothing])
    return np.stack([win, np.hstack([0 * gap, nothing + 1]), loss], axis=1)


def unbounded_direction(features: np.ndarray, counts: np.ndarray) -> np.ndarray | None:
    """A direction of the parameters along which the likelihood never falls; None where it has one finite maximum.

    features (cells, outcomes, parameters), counts (cells, outcomes). Along it every outcome that was seen stays at
    least as likely as each of the others (Albert and Anderson 1984): a linear program, which makes each margin between
    them positive that can be (they count up to 1 each); or no outcome becomes more or less likely.

    >>> features = outcome_features(np.array([[0, 1, 0], [1, 2, 0]]), strength_basis(3), False, False)
    >>> unbounded_direction(features, np.array([[3, 1], [1, 2]])) is None
    True
    >>> direction = unbounded_direction(features, np.array([[3, 0], [1, 2]]))  # 0 beats 1 always; 1 and 2 are even
    >>> [int(x) for x in np.sign((strength_basis(3)[:3] @ direction).round(6))]
    [1, -1, -1]
    """
    cell, seen = np.nonzero(counts > 0)
    margins = (features[cell, seen][:, None, :] - features[cell]).reshape(-1, features.shape[2])
    rows, n = margins.shape
    cost = np.r_[np.zeros(n), -np.ones(rows)]  # unknowns: the direction, and of each margin what is counted of it
    bounds = [(None, None)] * n + [(0, 1)] * rows
    found = optimize.linprog(cost, np.hstack([-margins, np.eye(rows)]), np.zeros(rows), bounds=bounds)
    if found.fun < -0.5:
        return found.x[:n]
    flat = linalg.null_space(margins)
    return flat[:, 0] if flat.shape[1] else None


def fit_strengths(features: np.ndarray, counts: np.ndarray, cells: np.ndarray, groups: Any = None) -> tuple:
    """Maximum likelihood: (parameters, their covariance), clustered by `groups` if given.

    features (rows, outcomes, parameters), counts (rows, outcomes), cells (rows,): rows of one cell have the same
    features. Two outcomes: a binomial GLM. Three: a Poisson GLM of the counts with an intercept per cell, whose
    likelihood is the multinomial one (Fienberg and Larntz 1976); the intercepts are not returned.

    >>> basis = strength_basis(2)
    >>> features = outcome_features(np.array([[0, 1, 0]]), basis, order_effect=False, davidson=True)
    >>> parameters, _ = fit_strengths(features, np.array([[8.0, 4.0, 2.0]]), np.array([0]))
    >>> np.exp([np.ptp(basis @ parameters[:1]), parameters[1]]).round(6)  # pi_0 / pi_1 = 8 / 2, nu = 4 / sqrt(8 * 2)
    array([4., 1.])
    """
    kept = counts.sum(1) > 0
    features, counts, cells = features[kept], counts[kept], cells[kept]
    groups = groups[kept] if groups is not None else None
    outcomes, n = counts.shape[1], features.shape[2]
    if outcomes == 2:
        model = sm.GLM(counts, features[:, 0] - features[:, 1], family=sm.families.Binomial())
    else:
        cell = np.unique(cells, return_inverse=True)[1]
        intercepts = np.repeat(np.eye(cell.max() + 1)[cell], outcomes, axis=0)
        design = np.hstack([features.reshape(-1, n), intercepts])
        model = sm.GLM(counts.ravel(), design, family=sm.families.Poisson())
        groups = np.repeat(groups, outcomes) if groups is not None else None
    clustered = {} if groups is None else {"cov_type": "cluster", "cov_kwds": {"groups": groups}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a perfect fit, as that of two models is; separation was looked for before
        fitted = model.fit(tol=1e-10, wls_method="qr", **clustered)
    if not fitted.converged:
        raise UserError("the fit did not converge: too few votes for so many models; add questions or leave models out")
    return fitted.params[:n], fitted.cov_params()[:n, :n]


def clean_record_bound(gaps: np.ndarray, questions: np.ndarray) -> float:
    """The strength x at which winning every vote has a chance of 2.5 %; gaps (votes,): -(opponent's strength) +- g.

    Votes on one question (votes,) go together and count as one: sum_q mean_(k in q) ln sigmoid(x + gap_k) = ln 0.025.
    With one opponent it is the exact limit (Clopper and Pearson 1934) of n wins in n questions.

    >>> bound = clean_record_bound(np.zeros(40), np.arange(40) // 2)
    >>> round(float(special.expit(bound)), 4)  # 20 questions: 0.025^(1/20)
    0.8316
    """
    weights = 1 / np.bincount(questions)[questions]
    return float(optimize.brentq(lambda x: weights @ special.log_expit(x + gaps) - math.log(0.025), -200, 200))


def rank_intervals(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best and worst rank of each model (models,) from refitted strengths (refits, models).

    A model is surely above another where the middle 95 % of the refits' differences are above 0.

    >>> [rank.tolist() for rank in rank_intervals(np.array([[9.0, 2.0, 1.0], [9.0, 1.0, 2.0], [8.0, 1.5, 1.0]]))]
    [[1, 2, 2], [1, 3, 3]]
    """
    above = np.array([(np.percentile(mine[:, None] - draws, 2.5, axis=0) > 0) for mine in draws.T])  # i above j
    return 1 + above.sum(0), draws.shape[1] - above.sum(1)


def mt_bench_verdict(preferences: list[float]) -> float:
    """1 or 0 where both orders name the same winner, else a tie (Zheng et al. 2023, section 3.4).

    >>> [mt_bench_verdict(p) for p in ([1.0, 0.9], [0.0, 0.0], [1.0, 0.0], [1.0, 0.5])]
    [1.0, 0.0, 0.5, 0.5]
    """
    signs = {np.sign(p - 0.5) for p in preferences}
    return float(signs.pop() / 2 + 0.5) if len(signs) == 1 else 0.5


# -------------------------------------------------------------------------------------------------------------- reading


def read_comparisons(files: list[str], judge: str | None) -> tuple[dict[tuple, dict], Counter, int]:
    """Comparisons {(id, turn, i, j): {first shown: preference for i}} with i < j by name, rows lost by reason, rows.

    Errors, with file and line: one id with two prompts, the same vote twice, several judges.
    """
    comparisons: dict[tuple, dict] = defaultdict(dict)
    lost: Counter = Counter()
    places: dict[tuple, str] = {}
    prompts: dict[tuple, tuple] = {}
    judges: dict[Any, str] = {}
    rows = [(row, f"{source}, line {row['_line']}") for source in files for row in read_votes(source)]
    for row, place in rows:
        if judge is not None and row.get("judge") != judge:
            lost["of another judge"] += 1
            continue
        judges.setdefault(row.get("judge"), place)
        if len(judges) > 1:
            (one, at), (other, there) = judges.items()
            raise UserError(f"{there}: judge {other!r}, but {one!r} in {at}; choose one with --judge")
        p, order, a, b = row["preference"], row.get("order"), row.get("model_a"), row.get("model_b")
        if not isinstance(a, str) or not isinstance(b, str) or a == b:
            raise UserError(f"{place}: model_a {a!r}, model_b {b!r}; expected the names of two models")
        if "prompt" in row:
            text, at = prompts.setdefault((str(row["id"]), row.get("turn")), (row["prompt"], place))
            if text != row["prompt"]:
                raise UserError(f"{place}: id {row['id']} has another prompt than in {at}")
        key, first = (str(row["id"]), str(row.get("turn")), *sorted((a, b))), {"ab": a, "ba": b, None: None}[order]
        votes = comparisons[key]
        if votes.get(first) is not None and p is not None:
            raise UserError(f"{place}: the same vote as in {places[*key, first]}; keep one of them")
        lost["no verdict, asked again"] += first in votes
        places[*key, first] = place
        votes[first] = votes.get(first) if p is None else float(p) if a < b else 1 - float(p)
    for key in [key for key, votes in comparisons.items() if None in votes.values()]:
        values = list(comparisons.pop(key).values())
        lost["no verdict"] += values.count(None)
        lost["verdict whose other order has none"] += len(values) - values.count(None)
    return dict(comparisons), +lost, len(rows)


def connected_groups(cells: np.ndarray, n_models: int) -> np.ndarray:
    """Number of the group (models,) of each model; cells (cells, 3) of i, j, o connect i and j.

    >>> connected_groups(np.array([[0, 2, 1], [1, 3, 1]]), 4).tolist()
    [0, 1, 0, 1]
    """
    graph = sparse.coo_array((np.ones(len(cells)), (cells[:, 0], cells[:, 1])), shape=(n_models, n_models))
    return sparse.csgraph.connected_components(graph, directed=False)[1]


# ---------------------------------------------------------------------------------------------------- ranking and print
def win_rates(comparisons: dict[tuple, dict]) -> dict[str, dict]:
    """Per model: n, win_rate, win_rate_mt_bench (None without two orders), over comparisons."""
    averaged: dict[str, list[float]] = defaultdict(list)
    strict: dict[str, list[float]] = defaultdict(list)
    for (_, _, one, other), votes in comparisons.items():
        mean, verdict = float(np.mean(list(votes.values()))), mt_bench_verdict(list(votes.values()))
        for name, p, rule in ((one, mean, verdict), (other, 1 - mean, 1 - verdict)):
            averaged[name].append(p)
            strict[name] += [rule] if len(votes) == 2 else []
    return {name: {"n": len(values), "win_rate": float(np.mean(values)),
                   "win_rate_mt_bench": float(np.mean(strict[name])) if strict[name] else None}
            for name, values in averaged.items()}  # fmt: skip


def vote_table(models: list[str], comparisons: dict[tuple, dict], davidson: bool) -> tuple[np.ndarray, ...]:
    """Votes merged by question, pair and order: cells (cells, 3) of i, j, o; question and cell of each row; counts
    (rows, 2 or 3) of its outcomes. So a refit sees one row per cell."""
    number = {name: k for k, name in enumerate(models)}
    questions = {name: k for k, name in enumerate(dict.fromkeys(key[0] for key in comparisons))}
    places = [[questions[question], number[one], number[other], {None: 0, one: 1, other: -1}[first]]
              for (question, _, one, other), orders in comparisons.items() for first in orders]  # fmt: skip
    votes = [p for orders in comparisons.values() for p in orders.values()]
    share = np.array(votes)
    if davidson and not {0.5} < set(votes) <= {0.0, 0.5, 1.0}:
        raise UserError("--ties davidson needs ties and decided votes, preferences 0, 0.5 and 1; use --ties half")
    shares = np.stack([share == 1, share == 0.5, share == 0] if davidson else [share, 1 - share], axis=1).astype(float)
    merged, row = np.unique(np.array(places), axis=0, return_inverse=True)
    counts = np.stack([np.bincount(row, column) for column in shares.T], axis=1)
    cells, cell = np.unique(merged[:, 1:], axis=0, return_inverse=True)
    return cells, merged[:, 0], cell, counts


def open_ends(direction: np.ndarray, strengths: np.ndarray, effect: float, votes: np.ndarray) -> tuple:
    """Whether each model has a finite strength; {those without: ("above" or "below" or "unknown", the other end)}.

    direction (models + 1,): levels of the models, then of the order effect, along which the likelihood does not fall.
    Votes of which it changes the chance say nothing more in the end; the largest group that the others connect has
    finite strengths. votes (votes, 5): question, i, j, o, chance that i won. The end is the bound by the votes against
    that group, None where not all are won (lost): then the order effect has no bound either.
    """
    i, j = votes[:, 1:3].astype(int).T
    unchanged = abs(direction[i] - direction[j] + direction[-1] * votes[:, 3]) < 1e-6
    group = connected_groups(votes[unchanged, 1:4].astype(int), len(strengths))
    finite = group == np.bincount(group).argmax()
    both = np.vstack([votes, votes[:, [0, 2, 1, 3, 4]] * [1, 1, 1, -1, -1] + [0, 0, 0, 0, 1]])  # seen from i and from j
    ends: dict[int, tuple[str, float | None]] = {}
    for m in np.flatnonzero(~finite).tolist():
        sign = int(np.sign((direction[m] - direction[:-1][finite][0]).round(6)))
        question, _, other, order, won = both[(both[:, 1] == m) & finite[both[:, 2].astype(int)]].T
        clean = sign and len(won) and (won == (sign + 1) / 2).all()
        gaps = sign * (effect * order - strengths[other.astype(int)])
        end = sign * clean_record_bound(gaps, question.astype(int)) if clean else None
        ends[m] = ({1: "above", 0: "unknown", -1: "below"}[sign], end)
    return finite, ends


def rank_models(comparisons: dict[tuple, dict], args: Args) -> dict[str, Any]:
    """The result but for settings and lost rows: models sorted by strength, order effect, counts."""
    models = sorted({name for key in comparisons for name in key[2:]})
    n, k, davidson = len(models), len(models) - 1, args.ties == "davidson"
    cells, question, cell, counts = vote_table(models, comparisons, davidson)
    n_questions, group = int(question.max()) + 1, connected_groups(cells, n)
    if group.any():
        names = "; ".join(", ".join(np.array(models)[group == g]) for g in np.unique(group))
        raise UserError(f"groups of models that are never compared with each other: {names}; rank each by itself")
    if n_questions < 2:
        raise UserError("all votes are on one question (id); the error is over questions and needs several")

    # 1. The order effect, if the data can tell it; the ridge's games against an average model are the last 2 n cells
    pairs = np.eye(n)[cells[:, 0]] - np.eye(n)[cells[:, 1]]
    told = args.order_effect == "auto" and bool(np.linalg.matrix_rank(np.column_stack([pairs, cells[:, 2]])) == n)
    basis, ridge = strength_basis(n), np.array([[m, n, o] for o in (1, -1) for m in range(n)])
    features = outcome_features(np.vstack([cells, ridge]), basis, told, davidson)
    directions: dict[bytes, np.ndarray | None] = {}  # of which outcomes were seen

    def fit(weights: np.ndarray) -> tuple:
        """Parameters, covariance, counts, unbounded direction of the questions taken weights (questions,) times."""
        total = np.stack([np.bincount(cell, weights[question] * x, len(cells)) for x in counts.T], axis=1)
        seen = (total > 0).tobytes()
        if seen not in directions:
            directions[seen] = unbounded_direction(features[: len(cells)], total)
        alpha = 0.0 if directions[seen] is None else RIDGE
        total = np.vstack([total, np.full((2 * n, counts.shape[1]), alpha / 2)])
        return *fit_strengths(features, total, np.arange(len(total))), total, directions[seen]

    # 2. Estimate and both standard errors; Elo is above the mean of the models with a finite strength, or the anchor
    parameters, covariance, total, direction = fit(np.ones(n_questions))
    rows, groups = np.r_[cell, len(cells) : len(total)], np.r_[question, np.full(2 * n, n_questions)]
    clustered = fit_strengths(features[rows], np.vstack([counts, total[-2 * n :]]), rows, groups)[1]
    effect, votes = float(parameters[k]) if told else 0.0, np.c_[question, cells[cell], counts[:, 0] / counts.sum(1)]
    levels = np.zeros(n + 1) if direction is None else np.r_[basis[:n] @ direction[:k], direction[k] if told else 0]
    finite, ends = open_ends(levels, basis[:n] @ parameters[:k], effect, votes)
    at = models.index(args.anchor) if args.anchor in models else None
    if args.anchor is not None and (at is None or not finite[at]):
        names = ", ".join(np.array(models)[finite])
        raise UserError(f"--anchor {args.anchor}: models with a finite strength are {names}")
    zero, shift = (basis[:n][finite].mean(0), 0) if at is None else (basis[at], 1000)
    scale = ELO * (basis[:n] - zero)
    elo = scale @ parameters[:k] + shift
    iid, cluster = (np.sqrt(np.diag(scale @ c[:k, :k] @ scale.T).clip(0)) for c in (covariance, clustered))

    # 3. Resample questions, refit
    even, rng = np.full(n_questions, 1 / n_questions), np.random.default_rng(args.seed)
    fits = [fit(weights) for weights in rng.multinomial(n_questions, even, size=args.bootstrap)]
    refits = np.array([fitted[0] for fitted in fits])
    spread = refits[:, :k] @ scale.T + shift
    intervals = np.percentile(spread, [2.5, 97.5], axis=0).T.tolist()
    best, worst = rank_intervals(spread)

    # 4. Everything by name
    rates, listed = win_rates(comparisons), []
    for rank, m in enumerate((-elo).argsort(kind="stable").tolist(), 1):
        side, end = ends.get(m, (None, None))
        end = None if end is None else float(ELO * (end - zero @ parameters[:k]) + shift)
        if side:
            intervals[m] = [end if side == "above" else None, end if side == "below" else None]
        errors = (None, None) if side else (float(iid[m]), float(cluster[m]))
        listed.append({
            "model": models[m], "rank": rank, "rank_low": int(best[m]), "rank_high": int(worst[m]),
            "elo": float(elo[m]), "ci_low": intervals[m][0], "ci_high": intervals[m][1], "unbounded": side,
            "standard_error_iid": errors[0], "standard_error_clustered": errors[1], **rates[models[m]],
        })  # fmt: skip
    result = {"n_questions": n_questions, "n_comparisons": len(comparisons), "n_votes": round(counts.sum()),
              "models": listed, "ridge": 0.0 if direction is None else RIDGE, "order_effect": None,
              "refits_with_ridge": sum(fitted[3] is not None for fitted in fits)}  # fmt: skip
    if told:
        unbounded = bool(abs(levels[-1]) > 1e-6)
        low, high = (None, None) if unbounded else np.percentile(refits[:, k], [2.5, 97.5]).tolist()
        result["order_effect"] = {"logit": effect, "ci_low": low, "ci_high": high, "unbounded": unbounded}
        for name, matrix in zip(ERRORS, (covariance, clustered), strict=True):
            result["order_effect"][f"standard_error_{name}"] = math.sqrt(matrix[k, k])
    return result | ({"nu": float(np.exp(parameters[-1]))} if davidson else {})


def print_ranking(result: dict[str, Any]) -> None:
    """The table, the order effect and what was lost."""
    width, open_note = max(len(m["model"]) for m in result["models"]), "  NO FINITE VALUE, this is the ridge's choice"
    print(f"{'rank':>9}  {'model':{width}} {'Elo':>7} {'95 % interval':>18} {'SE iid':>7} {'SE clust.':>9} {'win':>6} "
          f"{'MT-B.':>6} {'n':>5}")  # fmt: skip
    for m in result["models"]:
        low, high = ("open" if m[end] is None else f"{m[end]:.1f}" for end in ("ci_low", "ci_high"))
        iid, cluster = ("" if m[f"standard_error_{x}"] is None else f"{m[f'standard_error_{x}']:.1f}" for x in ERRORS)
        rule = "" if m["win_rate_mt_bench"] is None else f"{m['win_rate_mt_bench']:.3f}"
        ranks = f"{m['rank']} ({m['rank_low']}-{m['rank_high']})"
        print(f"{ranks:>9}  {m['model']:{width}} {m['elo']:7.1f} {f'[{low}, {high}]':>18} {iid:>7} {cluster:>9} "
              f"{m['win_rate']:6.3f} {rule:>6} {m['n']:5}{open_note if m['unbounded'] else ''}")  # fmt: skip
    if effect := result["order_effect"]:
        print(f"first slot: log-odds {effect['logit']:+.3f}, SE iid {effect['standard_error_iid']:.3f}, clustered "
              f"{effect['standard_error_clustered']:.3f}{open_note if effect['unbounded'] else ''}")  # fmt: skip
    print(f"{result['n_votes']} votes, {result['n_comparisons']} comparisons, {result['n_questions']} questions; "
          f"ties: {result['ties']}; order effect {'fitted' if effect else 'not fitted'}")  # fmt: skip
    print("lost rows: " + (", ".join(f"{n} {reason}" for reason, n in result["lost"].items()) or "none"))
    if result["refits_with_ridge"]:
        print(f"{result['refits_with_ridge']} of {result['bootstrap']} refits had no finite answer: ridge {RIDGE:g}")


def plot_ranking(path: Path, result: dict[str, Any]) -> None:
    """Elo points with their intervals, best model on top; an arrow where there is no bound."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path}: not drawn, matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = result["models"]
    figure, axis = pyplot.subplots(figsize=(7, 1.2 + 0.32 * len(models)))
    for y, m in enumerate(models):
        ends = [m["elo"] if m[end] is None else m[end] for end in ("ci_low", "ci_high")]
        axis.plot(ends, [y, y], color="tab:blue")
        axis.plot(m["elo"], y, MARKERS[m["unbounded"]], color="tab:blue")
    axis.set_yticks(range(len(models)), [f"{m['model']}  ({m['rank_low']}-{m['rank_high']})" for m in models])
    axis.invert_yaxis()
    axis.set(xlabel="Elo points, 95 % interval over questions; arrow, x: no bound")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    write_file(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    pyplot.close(figure)


def main(args: Args, files: list[str]) -> dict[str, Any]:
    """Bradley-Terry ranking of many models from pairwise judgments, with intervals over questions."""
    if not files and not JUDGMENTS.is_file():
        raise UserError(f"{JUDGMENTS}: no such file; name judgment files, or run python eval/judge.py first")
    if args.bootstrap < 20:
        raise UserError(f"--bootstrap {args.bootstrap}: an interval needs at least 20 refits, better 500")
    files = files or [str(JUDGMENTS)]
    output = Path(args.output) if args.output else Path(files[0]).parent / "ranking.json"

    # 1. Votes by comparison
    comparisons, lost, n_rows = read_comparisons(files, args.judge)
    if not comparisons:
        raise UserError(f"{', '.join(files)}: none of {n_rows} rows holds a usable verdict ({dict(lost)})")

    # 2. Strengths, intervals, ranks
    result = {"files": files, "ties": args.ties, "anchor": args.anchor, "bootstrap": args.bootstrap, "seed": args.seed,
              "n_rows": n_rows, "lost": dict(lost), **rank_models(comparisons, args)}  # fmt: skip

    # 3. Table, result, plot
    print_ranking(result)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    plot_ranking(output.with_suffix(".png"), result)
    print(f"ranking: wrote {output}")
    return result


if __name__ == "__main__":
    run_tool(main, Args, "judgment files (.jsonl); default: runs/judge/judgments.jsonl")
