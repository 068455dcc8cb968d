# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers==5.23.0", "datasets==5.2.0", "evaluate==0.4.6", "numpy==2.4.6", "scipy==1.17.1",
#     "statsmodels==0.15.0"]
# ///
"""Does the longer answer win because it is longer? Length bias of labels, judges or scorers; an `evaluate` module too.

    gap          P(win | longer) - P(win | shorter); without pairs of equal length; standard error clustered by question
    spearman     rank correlation of the length difference and the outcome (score margin, or P(A wins))
    coefficient  b of logit P(A wins) = a + b (length_A - length_B) + c (control_A - control_B), per unit of length, by
                 statsmodels' GLM with standard errors clustered by question; a is left out where A is only a name
    longer_wins  accuracy of "the longer one wins", a tie counts half, with Wilson's interval: a reward model has to
                 beat it. Where it is below 0.5, "the shorter one wins" is the better rule
    explained    share of the GLM's deviance that length takes away (McFadden's pseudo-R2 where labels are 0 or 1)
    win_rate, equal_length_win_rate   as judged, and sigmoid(a): at equal length (and equal controls). Their difference,
                 `explained_by_length`, is what length contributes; judgments only, where A is one model throughout

A question is an id (judgments, scores) or a prompt (pairs). Spearman's and the difference's intervals are percentiles
of a bootstrap over questions, refitted. Length is in characters, as AlpacaEval counts, or words.

Length may stand for what makes answers good. `--control_fn file.py:function` (prompts, responses, **columns) ->
list[float | None] adds a regressor per response, so that b is the taste for length at equal control.

Reads .jsonl: judgments {id, order, preference, length_a, length_b}, orders averaged first; preferences {prompt, chosen,
rejected}, texts or message lists, or hh-rlhf's two whole dialogues without a prompt; scored pairs {chosen_score,
rejected_score and texts or chosen_length, rejected_length}, where the winner is the higher score and `labels` holds the
same figures for the labels; scores {id, score and response or length}: all pairs of responses to one id, or, with one
response each, Spearman of length and score alone.

    python eval/length_bias.py runs/judge/judgments.jsonl
    python eval/length_bias.py tiny/preferences.jsonl --unit words --control_fn tiny/annotator.py:gold
    evaluate.load("eval/length_bias.py").compute(preferences=[1, 0.5], lengths_a=[90, 10], lengths_b=[30, 20])

Writes length_bias.json beside the input; shares are in [0, 1].
"""

import json
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import evaluate
import numpy as np
import statsmodels.api as sm
from scipy import stats
from scipy.special import expit
from statsmodels.stats.proportion import proportion_confint

if not __package__:  # run as a file or imported by its bare name: it belongs to the package eval all the same
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "eval"

from .common import DEFAULT, arg, bootstrap_ids, load_function, plain_values, read_jsonl, run_tool, turn_of, UserError
from .common import without_nan, write_json

FORMS = {  # form -> keys that every row has; the first form whose first key the first row has
    "scored pairs": ("chosen_score", "rejected_score"),
    "preferences": ("chosen", "rejected"),
    "judgments": ("preference", "id", "order", "length_a", "length_b"),
    "scores": ("score", "id"),
}
CAUTION = "It can't tell bias from merit: longer answers may win because they say more. --control_fn holds that fixed."


# ------------------------------------------------------------------------------------------------------------ arguments


@dataclass
class Args:
    unit: Literal["chars", "words"] = arg("chars", "of length; words need the texts")
    control_fn: list[str] | None = arg(None, "file.py:function ...: further regressors, one number per response")
    bootstrap: int = arg(1000, "resamples for the intervals of Spearman and of what length explains")
    seed: int = arg(0, "of every bootstrap")
    output: str | None = arg(None, "result file (default: length_bias.json beside the input)")


# ------------------------------------------------------------------------------------------------------------ the maths
class Pairs(NamedTuple):
    """Comparisons of two responses; where `symmetric` it means nothing which of them is called A."""

    ids: np.ndarray  # [pairs] question
    p: np.ndarray  # [pairs] P(A wins)
    length: np.ndarray  # [pairs] A's minus B's
    margin: np.ndarray  # [pairs] outcome for the rank correlation: A's score minus B's, or p - 1/2
    controls: np.ndarray  # [pairs, controls] A's minus B's
    symmetric: bool


def mirrored(pairs: Pairs) -> Pairs:
    """Both ways of naming A and B, where either would do: no figure may depend on who was named first."""
    if not pairs.symmetric:
        return pairs
    others = (pairs.ids, 1 - pairs.p, -pairs.length, -pairs.margin, -pairs.controls)
    return Pairs._make([*(np.concatenate(both) for both in zip(pairs[:5], others, strict=True)), True])


def take(pairs: Pairs, rows: np.ndarray) -> Pairs:
    """The pairs at these places."""
    return Pairs._make([*(column[rows] for column in pairs[:5]), pairs.symmetric])


def with_error(value: float, error: float, low: float, high: float) -> dict[str, float]:
    """A figure with standard error and interval; without an error that is known, no interval."""
    rest = (error, low, high) if 1e-9 < error < math.inf else (math.nan,) * 3
    names = ("value", "standard_error", "ci_low", "ci_high")
    return dict(zip(names, map(float, (value, *rest)), strict=True))


def longer_gap(pairs: Pairs) -> dict[str, float]:
    """P(A wins | A longer) - P(A wins | A shorter), standard error clustered by question; NaN without either.

    >>> none = np.zeros((4, 0))
    >>> p, d = np.array([1.0, 1.0, 1.0, 0.0]), np.array([9, 5, -2, -3])
    >>> longer_gap(Pairs(np.arange(4), p, d, p, none, False))["value"].__round__(6)
    0.5
    """
    ids, p, length, *_ = take(rows := mirrored(pairs), rows.length != 0)
    longer = length > 0
    if longer.all() or not longer.any() or len(set(ids)) < 3:
        return with_error(*[math.nan] * 4)
    groups = {"groups": np.unique(ids, return_inverse=True)[1]}
    fit = sm.OLS(p, np.column_stack([longer, np.ones(len(p))])).fit(cov_type="cluster", cov_kwds=groups)
    return with_error(fit.params[0], fit.bse[0], *fit.conf_int()[0])


def longer_wins(pairs: Pairs) -> dict[str, Any]:
    """Accuracy of "the longer one wins"; a tie of lengths or verdicts counts half. Wilson's 95 % interval.

    >>> p, d = np.array([1.0, 1.0, 0.0, 1.0]), np.array([9, 5, 7, 0])
    >>> longer_wins(Pairs(np.arange(4), p, d, p, np.zeros((4, 0)), True))["value"]
    0.625
    """
    agrees = np.sign(pairs.length) * np.sign(pairs.p - 0.5)
    right = float(np.sum(agrees + 1) / 2)
    low, high = proportion_confint(right, len(agrees), method="wilson")
    counts = {"longer": int(np.sum(agrees > 0)), "shorter": int(np.sum(agrees < 0)), "n": len(agrees)}
    return {"value": right / len(agrees), "ci_low": float(low), "ci_high": float(high), **counts}


def rank_correlation(pairs: Pairs) -> float:
    """Spearman's correlation of length difference and outcome; NaN where one of them does not vary."""
    rows = mirrored(pairs)
    if np.ptp(rows.length) == 0 or np.ptp(rows.margin) == 0:
        return math.nan
    return float(stats.spearmanr(rows.length, rows.margin).statistic)


def fit_length(pairs: Pairs, with_length: bool = True, cluster: bool = True) -> Any:
    """statsmodels' GLM of P(A wins) on length in standard deviations, controls and, if A is one model, a constant.

    None where the likelihood has no maximum: the winner is then a function of the regressors.
    """
    sd = np.sqrt(np.mean(pairs.length**2))
    columns = [pairs.length / sd] if with_length and sd > 0 else []
    columns += [*pairs.controls.T] + ([] if pairs.symmetric else [np.ones(len(pairs.p))])
    if (
        not 0 < len(columns) < len(pairs.p)
        or np.linalg.matrix_rank(x := np.column_stack(columns)) < len(columns)
        or len(set(pairs.ids)) < 2
    ):
        return None
    how: dict[str, Any] = {}
    if cluster:
        how = {"cov_type": "cluster", "cov_kwds": {"groups": np.unique(pairs.ids, return_inverse=True)[1]}}
    with warnings.catch_warnings(action="ignore"):
        result = sm.GLM(pairs.p, x, family=sm.families.Binomial()).fit(tol=1e-10, **how)
    return result if result.converged and result.deviance > 1e-6 * len(pairs.p) else None


def deviance(pairs: Pairs) -> float:
    """Of the model without length: controls and constant, or the coin of symmetric pairs without controls."""
    fit = fit_length(pairs, with_length=False, cluster=False)
    even = np.full(len(pairs.p), 0.5)
    return sm.families.Binomial().deviance(pairs.p, even) if fit is None else fit.deviance


def explained_by_length(pairs: Pairs) -> float:
    """Win-rate of A minus what it would be at equal length and equal controls, sigmoid of the GLM's constant."""
    fit = fit_length(pairs, cluster=False)
    return math.nan if fit is None else float(np.mean(pairs.p) - expit(fit.params[-1]))


def over_questions(statistic: Callable[[Pairs], float], pairs: Pairs, args: Args) -> dict[str, float]:
    """The statistic with standard error and percentile interval from resampled questions."""
    value = statistic(pairs)
    resamples = args.bootstrap if math.isfinite(value) else 0
    spread = bootstrap_ids(lambda rows: statistic(take(pairs, rows)), pairs.ids, resamples, args.seed)
    return with_error(value, spread["standard_error"], spread["ci_low"], spread["ci_high"])


def length_bias(pairs: Pairs, args: Args) -> dict[str, Any]:
    """Every figure of one set of pairs."""
    result: dict[str, Any] = {"pairs": len(pairs.p), "questions": len(set(pairs.ids.tolist()))}
    result |= {"equal_length": int(np.sum(pairs.length == 0)), "ties": int(np.sum(pairs.p == 0.5))}
    result |= {"gap": longer_gap(pairs), "spearman": over_questions(rank_correlation, pairs, args)}
    result["longer_wins"] = longer_wins(pairs)
    fit = fit_length(pairs) if pairs.length.any() else None
    names = ("coefficient", "equal_length_win_rate", "explained_by_length")
    result |= dict.fromkeys((*names, "win_rate", "explained")) | {"controls": {}}
    if fit is not None:
        sd, bounds = np.sqrt(np.mean(pairs.length**2)), fit.conf_int()
        found = [with_error(b, error, *bound) for b, error, bound in zip(fit.params, fit.bse, bounds, strict=True)]
        result["coefficient"] = {name: value / sd for name, value in found[0].items()}
        result["controls"] = dict(zip(args.control_fn or [], found[1:], strict=False))
        result["explained"] = 1 - fit.deviance / deviance(pairs)
    if not pairs.symmetric:
        result["win_rate"] = float(np.mean(pairs.p))
    if fit is not None and not pairs.symmetric:
        low, high = expit(bounds[-1])
        value = expit(fit.params[-1])
        result["equal_length_win_rate"] = with_error(value, fit.bse[-1] * value * (1 - value), low, high)
        result["explained_by_length"] = over_questions(explained_by_length, pairs, args)
    return result


# -------------------------------------------------------------------------------------------------------------- reading


class Lost(Exception):
    """Why a row can't be used: dropped and counted."""


def number(row: dict, name: str) -> float:
    """A finite number of a row; Lost where it is null, a UserError where it is anything else."""
    value = row.get(name)
    if value is None:
        raise Lost(f"no {name}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{row['_where']}: {name} is {value!r}, expected a number")
    return float(value)


def last_reply(dialogue: Any) -> tuple[list, str]:
    """(what comes before, stripped text) of the last assistant turn of a message list or of hh-rlhf's dialogues.

    >>> last_reply("\\n\\nHuman: Hi\\n\\nAssistant: Hello \\n\\nHuman: So?\\n\\nAssistant: Yes. ")[1]
    'Yes.'
    """
    if isinstance(dialogue, str):
        _, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", dialogue)
        turns = list(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))
    else:
        try:
            turns = [(str(message["role"]), message["content"].strip()) for message in dialogue]
        except (TypeError, KeyError, AttributeError) as error:
            raise Lost("neither a string nor a message list") from error
    if not turns or turns[-1][0].lower() != "assistant":
        raise Lost("no dialogue that ends with an assistant turn")
    return turns[:-1], turns[-1][1]


class Comparison(NamedTuple):
    """Two responses A and B to one question, as a file has them."""

    question: str
    margin: float  # A's score minus B's, or P(A wins) - 1/2
    length: float  # A's minus B's
    rows: tuple[dict, dict]
    prompt: Any = None
    texts: tuple[str, ...] = ()


def usable(items: Iterable, read: Callable[[Any], Any], lost: Counter) -> list:
    """What `read` makes of each item; where it raises Lost, the reason is counted."""
    found = []
    for item in items:
        try:
            found.append(read(item))
        except Lost as reason:
            lost[str(reason)] += 1
    return found


def length_of(row: dict, text: str | None, name: str, unit: str) -> float:
    """Length of a text, or the characters that the row has under `name` where there is none."""
    if text is not None and not isinstance(text, str):
        raise Lost("the response is no string")
    if text is not None:
        return len(text) if unit == "chars" else len(text.split())
    if unit == "words":
        raise UserError(f"{row['_where']}: no text, and {name} is in characters; --unit words needs texts")
    return number(row, name)


def preference_pair(row: dict, unit: str) -> Comparison:
    """A row of preferences or scored pairs: A is the chosen one, and wins, or has the score chosen_score."""
    prompt, names = row.get("prompt", row.get("id")), ("chosen", "rejected")
    texts: tuple[str, ...] = ()
    if set(names) <= row.keys():
        if row["chosen"] == row["rejected"]:
            raise Lost("identical pair")
        plain = "prompt" in row  # then a text is a response, not a dialogue
        sides = [row["chosen"], row["rejected"]]
        split = [(prompt, side.strip()) if plain and isinstance(side, str) else last_reply(side) for side in sides]
        texts = tuple(text for _, text in split)
        if not all(texts):
            raise Lost("empty reply")
        if split[0][0] != split[1][0] and not plain:
            raise Lost("different prompts")
        prompt = row.get("prompt", split[0][0])
    given = zip(texts or (None, None), names, strict=True)
    lengths = [length_of(row, text, f"{name}_length", unit) for text, name in given]
    margin = number(row, "chosen_score") - number(row, "rejected_score") if "chosen_score" in row else 0.5
    return Comparison(json.dumps(prompt), margin, lengths[0] - lengths[1], (row, row), prompt, texts)


def scored_response(row: dict, unit: str) -> dict:
    """A row of scores with its _length."""
    plain_values(row, row["_where"], "id")
    length = length_of(row, row.get("response"), "length", unit)
    return row | {"_length": length, "score": number(row, "score")}


def score_pair(a: dict, b: dict) -> Comparison:
    """Two scored responses to one id, with their lengths under _length."""
    given = a.get("response"), b.get("response")
    texts = () if None in given else (str(given[0]), str(given[1]))
    length = a["_length"] - b["_length"]
    return Comparison(str(a["id"]), a["score"] - b["score"], length, (a, b), a.get("prompt"), texts)


def by_question(rows: list[dict]) -> list[dict[str, dict]]:
    """The presented orders of each (id, turn); a UserError where runs are mixed or a judgment occurs twice.

    A resumed run of judge.py may give a lost row another try under the same `key`: the verdict counts.
    """
    questions: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        plain_values(row, row["_where"], "id", "turn", "judge", "model_a", "model_b")
        for name in ("judge", "model_a", "model_b"):
            if row.get(name) != rows[0].get(name):
                told = f"{name} is {row.get(name)!r} but {rows[0].get(name)!r} in {rows[0]['_where']}"
                raise UserError(f"{row['_where']}: mixed runs, {told}; expected one judge and one pair of models")
        if row["order"] not in ("ab", "ba"):
            raise UserError(f'{row["_where"]}: order is {row["order"]!r}, expected "ab" or "ba"')
        if row["preference"] is not None and not 0 <= number(row, "preference") <= 1:
            raise UserError(f"{row['_where']}: preference is {row['preference']}, expected a number in [0, 1] or null")
        orders = questions.setdefault((str(row["id"]), turn_of(row)), {})
        other = orders.setdefault(row["order"], row)
        verdicts = {row["preference"], other["preference"]} - {None}
        if other is not row and (row.get("key") is None or row["key"] != other.get("key") or len(verdicts) > 1):
            raise UserError(f"{row['_where']}: id {row['id']!r}, order {row['order']} occurs before, {other['_where']}")
        if other["preference"] is None:
            orders[row["order"]] = row
    return list(questions.values())


def read_game(orders: dict[str, dict], both_shown: bool) -> Comparison:
    """A question of judgments: the mean of its orders, of which none may be missing where the file has both."""
    values: list[Any] = [row["preference"] for row in orders.values()]
    if None in values or len(values) < 1 + both_shown:
        raise Lost("no verdict" if set(values) == {None} else "a verdict in one order only")
    row = next(iter(orders.values()))
    length = number(row, "length_a") - number(row, "length_b")
    return Comparison(str(row["id"]), float(np.mean(values)) - 0.5, length, (row, row))


def read_file(source: str, args: Args, lost: Counter) -> tuple[str, list[dict], list[Comparison]]:
    """(form, rows, comparisons) of a file; scores get their _length, and those without one are left out."""
    keys = [key for key in read_jsonl(source, ())[0] if key != "_line"]
    form = next((name for name, (key, *_) in FORMS.items() if key in keys), None)
    if form is None:
        told = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMS.items())
        raise UserError(f"{source}, line 1: keys {', '.join(keys)}; expected those of {told}")
    rows = [{**row, "_where": f"{source}, line {row['_line']}"} for row in read_jsonl(source, FORMS[form])]
    if form == "judgments":
        if args.unit == "words" or args.control_fn:
            raise UserError(f"{source}: judgments hold no texts; --unit words and --control_fn need them")
        questions = by_question(rows)
        both_shown = any(len(orders) == 2 for orders in questions)
        return form, rows, usable(questions, lambda orders: read_game(orders, both_shown), lost)
    if form == "scores":
        scored = usable(rows, lambda row: scored_response(row, args.unit), lost)
        groups: dict[str, list[dict]] = {}
        for row in scored:
            groups.setdefault(str(row["id"]), []).append(row)
        return form, scored, [score_pair(a, b) for own in groups.values() for a, b in combinations(own, 2)]
    return form, rows, usable(rows, lambda row: preference_pair(row, args.unit), lost)


def control_values(spec: str, found: list[Comparison], side: int) -> np.ndarray:
    """What a control function says of A's responses (side 0) or B's (1); NaN where it says None."""
    if textless := [c for c in found if not c.texts]:
        raise UserError(f"{textless[0].rows[0]['_where']}: no text for --control_fn {spec}")
    rows = [c.rows[side] for c in found]
    names = set(rows[0]).intersection(*rows) - {"prompt", "response", "_where", "_line", "_length"}
    columns = {name: [row[name] for row in rows] for name in sorted(names)}
    values = load_function(spec)([c.prompt for c in found], [c.texts[side] for c in found], **columns)
    if len(values) != len(found):
        raise UserError(f"--control_fn {spec}: {len(values)} values for {len(found)} responses")
    try:
        return np.array(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise UserError(f"--control_fn {spec}: expected a number or None per response ({error})") from error


def to_pairs(found: list[Comparison], symmetric: bool, args: Args, lost: Counter) -> Pairs:
    """Arrays of the comparisons, controls included; a pair without a control's value is left out and counted."""
    columns = [control_values(spec, found, 0) - control_values(spec, found, 1) for spec in args.control_fn or []]
    controls = np.array(columns).reshape(len(columns), len(found)).T
    margin, length = (np.array([c[i] for c in found], dtype=float) for i in (1, 2))
    p = (np.sign(margin) + 1) / 2 if symmetric else margin + 0.5
    known = ~np.isnan(controls).any(axis=1)
    if not known.all():
        lost["no control value"] += int(np.sum(~known))
    return take(Pairs(np.array([c.question for c in found]), p, length, margin, controls, symmetric), known)


# ------------------------------------------------------------------------------------------------------------- printing
def small_figure(value: float | None) -> str:
    """Three decimals, or four digits of a small number, without an exponent; - where there is none.

    >>> [small_figure(x) for x in (0.1234, -0.00041234, 0.0000123, -1e-17, None)]
    ['0.123', '-0.0004123', '0.0000123', '0.000', '-']
    """
    if value is None or abs(value) >= 0.01:
        return "-" if value is None else f"{value:.3f}"
    text = np.format_float_positional(value, 4, unique=False, fractional=False, trim="-")
    return text if abs(value) > 1e-9 else "0.000"


def line_of(name: str, part: dict[str, Any] | None, rest: str = "") -> str:
    """One row of the table: a figure and its interval, - where there is none."""
    text = [small_figure((part or {}).get(key)) for key in ("value", "ci_low", "ci_high")]
    return f"{name:34} {text[0]:>9}   {f'{text[1]} to {text[2]}':22} {rest}".rstrip()


def report_bias(r: dict[str, Any]) -> list[str]:
    """The printed table of one set of figures."""
    lines = [f"{'':34} {'':9}   95 % interval"]
    if "gap" in r:
        wins = r["longer_wins"]
        explained = "-" if r["explained"] is None else f"{r['explained']:.3f}"
        told = f"{wins['longer']} longer, {wins['shorter']} shorter of {wins['n']}"
        lines += [
            line_of("P(win | longer) - P(win | shorter)", r["gap"]),
            line_of("longer wins, accuracy", wins, told),
            line_of(f"logit per {r['unit']}", r["coefficient"], f"deviance explained {explained}"),
            *(line_of(f"  {name}", part) for name, part in r["controls"].items()),
        ]
    lines.append(line_of("Spearman", r["spearman"]))
    if r.get("win_rate") is not None:
        lines.append(line_of("win-rate at equal length", r["equal_length_win_rate"], f"as judged {r['win_rate']:.3f}"))
        lines.append(line_of("explained by length", r["explained_by_length"]))
    counts = {name: r[name] for name in ("pairs", "questions", "equal_length", "ties") if name in r}
    return [*lines, ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())]


# --------------------------------------------------------------------------------------- Hugging Face evaluate's module
class LengthBias(evaluate.Metric):
    """`evaluate.load("eval/length_bias.py").compute(preferences=..., lengths_a=..., lengths_b=...)`."""

    def _info(self) -> evaluate.MetricInfo:
        """What it takes: preferences and both lengths; everything else is optional."""
        return evaluate.MetricInfo(
            description="Length bias of pairwise preferences, with standard errors clustered by question.",
            citation="",
            inputs_description=(
                "preferences: P(A wins) in [0, 1], orders averaged; lengths_a, lengths_b. Optional: ids, symmetric "
                "(which one is A means nothing), bootstrap, seed."
            ),
            features=datasets.Features(
                {name: datasets.Value("float64") for name in ("preferences", "lengths_a", "lengths_b")}
            ),
        )

    def _compute(
        self, preferences: list, lengths_a: list, lengths_b: list, ids: Any = None, symmetric: bool = False,
        **settings: Any,
    ) -> dict:  # fmt: skip
        """The figures that the command line writes."""
        p, length = np.array(preferences, dtype=float), np.subtract(lengths_a, lengths_b)
        if not ((p >= 0) & (p <= 1)).all():
            raise UserError("compute: every preference must be a number in [0, 1]")
        ids = np.arange(len(p)) if ids is None else np.array([str(i) for i in ids])
        pairs = Pairs(ids, p, length, p - 0.5, np.zeros((len(p), 0)), symmetric)
        return without_nan(length_bias(pairs, Args(**settings)))


# ----------------------------------------------------------------------------------------------------------------- main
def main(args: Args, files: list[str] | None = None) -> dict[str, Any]:
    """Length bias of judgments, preferences, scored pairs or scores."""
    # 1. read
    if not files and not DEFAULT.is_file():
        raise UserError(f"{DEFAULT}: no such file; run `python eval/judge.py` first, or name a .jsonl file")
    if files and len(files) > 1:
        raise UserError(f"{len(files)} files: expected one")
    source, lost = files[0] if files else str(DEFAULT), Counter[str]()
    form, rows, found = read_file(source, args, lost)
    if not (found or form == "scores" and rows):
        raise UserError(f"{source}: no usable row; lost: {dict(lost)}")

    # 2. compute
    result: dict[str, Any] = {"form": form, "unit": args.unit.rstrip("s")}
    if found:
        pairs = to_pairs(found, form != "judgments", args, lost)
        result |= length_bias(pairs, args)
        if form == "scored pairs":
            one = np.ones(len(pairs.p))
            result["labels"] = length_bias(pairs._replace(p=one, margin=one / 2), args)
    else:  # one response to each id: nothing wins or loses
        length, score = (np.array([row[name] for row in rows], dtype=float) for name in ("_length", "score"))
        each = Pairs(np.arange(len(rows)), score, length, score, np.zeros((len(rows), 0)), False)
        result |= {"questions": len(rows), "spearman": over_questions(rank_correlation, each, args)}
    result = without_nan(result | {"lost": sum(lost.values()), "lost_by_reason": dict(lost.most_common())})

    # 3. show and write
    output = Path(args.output) if args.output else Path(source).with_name("length_bias.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    told = "".join(f", {reason} {count}" for reason, count in lost.most_common())
    print("\n".join([f"{form}, {source}", *report_bias(result)]))
    if "labels" in result:
        print("\n".join(["labels of the same pairs", *report_bias(result | result["labels"])]))
    print(f"lost {result['lost']}{told}\n{CAUTION}\nwritten: {output}")
    return result


if __name__ == "__main__":
    run_tool(main, Args, "judgments, preferences, scored pairs or scores (.jsonl)")
