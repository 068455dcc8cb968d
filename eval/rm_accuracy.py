# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "bitsandbytes==0.50.2", "peft==0.21.2",
#     "accelerate==1.15.0", "evaluate==0.4.6", "safetensors==0.8.0", "numpy==2.4.6", "scipy==1.17.1",
#     "statsmodels==0.15.0", "scikit-learn==1.9.1"]
# ///
"""How often a reward model prefers what people prefer, how sure that is, and what a rule of length would get.

    accuracy = mean over pairs of  [r_chosen > r_rejected] + 1/2 [r_chosen = r_rejected]

Equal scores count half, as a coin would; `strict_accuracy` has RewardBench's rule, by which a tie is wrong. The
interval is Wilson's (1927); where prompts come with several pairs, these are no independent trials, and the interval
clustered by prompt is the one to take. Beside it: the accuracy of "longer wins", "shorter wins" and of a coin on the
same pairs, accuracy by score margin and by length difference, calibration of P(chosen) = sigmoid(r_chosen - r_rejected)
(Bradley and Terry 1952), accuracy within prompts, whether the batch size or 4-bit loading changes the scores, and where
the data has RewardBench's subsets (Lambert et al. 2024, arXiv:2403.13787) its sections.

    python eval/rm_accuracy.py                                            # tiny/reward on tiny/preferences_eval.jsonl
    python eval/rm_accuracy.py --reward_model runs/reward --dataset Anthropic/hh-rlhf --dataset_split test
    python eval/rm_accuracy.py --reward_fn tiny/annotator.py:utility --dataset tiny/preferences_eval.jsonl
    python eval/rm_accuracy.py --dataset runs/reward/samples.jsonl        # scored pairs: no model is loaded

Data (hub id, or local .jsonl, .json, .parquet; "id" and "subset" are kept), one of these column sets:
    prompt, chosen, rejected    strings or message lists; with chosen_score, rejected_score already scored pairs
    chosen, rejected            two whole dialogues, message lists or hh-rlhf's "\\n\\nHuman: ...\\n\\nAssistant: ..."
    prompt, responses, ranks    K responses, 1 = best, equal = tie: all strict pairs. One best of K is also best-of-K
    prompt, chosen, rejected    two lists of strings, as RewardBench 2 has them: best-of-K again

A run folder of reward.py scores as reward.py does, less the mean that its reward.json records. Rows that can't be used
are left out and counted by reason. Writes the result (--output) and beside it <name>_pairs.jsonl, the scored pairs.
As a Hugging Face module: evaluate.load("eval/rm_accuracy.py").compute(chosen_scores=[...], rejected_scores=[...]).
"""

import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import evaluate
import numpy as np
import statsmodels.api as sm
from scipy import stats
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from statsmodels.stats.proportion import proportion_confint

if not __package__:  # run as a file or imported by its bare name: it belongs to the package eval all the same
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "eval"

from .common import PLAIN_TEMPLATE, TINY, arg, BadRow, encode_prompt, find_adapter, find_base, find_stop_ids
from .common import load_function, mean_interval, read_jsonl, render, run_tool, to_messages, tokenize, UserError
from .common import write_file, write_json

HEAD_KEY = "base_model.model.score.weight"  # where AutoModelForSequenceClassification + PEFT look for the head
SECTIONS = {  # of RewardBench 1, by subset
    "Chat": "alpacaeval-easy alpacaeval-length alpacaeval-hard mt-bench-easy mt-bench-med",
    "Chat Hard": "mt-bench-hard llmbar-natural llmbar-adver-neighbor llmbar-adver-GPTInst llmbar-adver-GPTOut "
    "llmbar-adver-manual",
    "Safety": "refusals-dangerous refusals-offensive xstest-should-refuse xstest-should-respond donotanswer",
    "Reasoning": "math-prm hep-cpp hep-go hep-java hep-js hep-python hep-rust",
    "Prior Sets": "anthropic_helpful anthropic_hhh shp summarize",
}
SCORES = ("chosen_score", "rejected_score")  # that make a row a scored pair
BATCH_CHECK = 64  # texts that are scored a second time one by one


# ------------------------------------------------------------------------------------------------------------ arguments


@dataclass
class Args:
    reward_model: str | None = arg(
        None, "run folder of reward.py or classifier with one score; default: tiny/reward, on its own data only"
    )
    reward_fn: str | None = arg(None, "file.py:function that scores responses instead of a reward model")
    quant: Literal["auto", "nf4", "none"] = arg("auto", "4-bit base; auto: as the run folder says, else nf4 on a GPU")
    dtype: Literal["auto", "float32", "bfloat16"] = arg(
        "auto", "auto: as the run folder says, else bfloat16 on a GPU or with nf4, float32 without"
    )
    trust_remote_code: bool = arg(False, "run model code that comes with a hub model")
    compare_quant: bool = arg(False, "score with a 4-bit and with an unquantised base, both in bfloat16, and compare")
    dataset: str = arg(str(TINY / "preferences_eval.jsonl"), "pairs: hub id or local .jsonl, .json, .parquet")
    dataset_split: str = arg("train", "split of a hub dataset")
    batch_size: int = arg(16, "texts per forward pass: memory, not the result")
    output: str = arg(
        "runs/rm_accuracy.json", "the result as JSON; the scored pairs go to <name>_pairs.jsonl beside it"
    )


# ------------------------------------------------------------------------------------------------------------ the maths


def share_right(won: np.ndarray) -> dict[str, Any]:
    """Pairs won (n,) in {0, 1/2, 1} -> accuracy with Wilson's 95 % interval, ties, strict accuracy (a tie is wrong).

    The count of the interval is the number won, a tie as half a success.

    >>> {name: round(value, 2) for name, value in share_right(np.array([1.0, 0.5, 0.0, 0.5])).items()}
    {'n': 4, 'accuracy': 0.5, 'ci_low': 0.15, 'ci_high': 0.85, 'ties': 2, 'strict_accuracy': 0.25}
    """
    low, high = proportion_confint(won.sum(), len(won), method="wilson")
    result = {"n": len(won), "accuracy": float(won.mean()), "ci_low": float(low), "ci_high": float(high)}
    return {**result, "ties": int((won == 0.5).sum()), "strict_accuracy": float((won == 1).mean())}


def clustered_interval(values: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Values (n,), cluster numbers (n,) -> mean over rows and its 95 % interval, errors clustered (Miller 2411.00640).

    SE^2 = 1/n^2 sum over clusters of (sum over the cluster of value - mean)^2, times G / (G - 1) for few clusters.
    Two clusters of equal rows count as two observations:

    >>> got = clustered_interval(np.array([1.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1]))
    >>> got["clusters"], got["mean"], round(got["standard_error"], 4)
    (2, 0.5, 0.5)
    """
    n_clusters, mean, error = len(np.unique(groups)), float(values.mean()), math.nan
    if n_clusters > 1:
        fit = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": groups})
        error = float(fit.bse[0])
    half = stats.norm.ppf(0.975) * error
    interval = {"mean": mean, "standard_error": error, "ci_low": mean - half, "ci_high": mean + half}
    return {"clusters": n_clusters, **interval}


def within_groups(won: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Mean over prompts of the accuracy within the prompt's pairs: every prompt counts once, however many it has.

    >>> within_groups(np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 0, 0, 1]))["mean"]
    0.5
    """
    numbers = np.unique(groups, return_inverse=True)[1]
    return mean_interval(np.bincount(numbers, won) / np.bincount(numbers))


def accuracy_by_bin(won: np.ndarray, x: np.ndarray, n_bins: int = 5) -> list[dict[str, Any]]:
    """Accuracy in bins of about equal counts of x (n,); equal x share a bin, and quantiles that coincide make fewer.

    >>> bins = accuracy_by_bin(np.array([0.0, 1.0, 1.0, 1.0]), np.arange(4), 2)
    >>> [(b["low"], b["high"], b["n"], b["accuracy"]) for b in bins]
    [(0.0, 1.0, 2, 0.5), (2.0, 3.0, 2, 1.0)]
    """
    number = np.searchsorted(np.quantile(x, np.linspace(0, 1, n_bins + 1)[1:-1]), x)
    parts = [number == b for b in np.unique(number)]
    return [{"low": float(x[p].min()), "high": float(x[p].max()), **share_right(won[p])} for p in parts]


def calibration(margin: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Score margins (n,) of chosen minus rejected -> how well P(chosen) = sigmoid(margin) holds.

    Which response is named first means nothing, so every pair enters bins and Brier score from both sides, as (margin,
    chosen) and (-margin, rejected); the upper five of ten bins are shown, the lower five mirror them. The slope b of
    P = sigmoid(b margin) is a logistic fit without intercept (from one side, which has the same maximum and the right
    n): 1 is calibrated, below 1 is overconfident. Its error is clustered by prompt. Without pairs in the wrong order it
    would be infinite, and is None.

    >>> got = calibration(np.log([3.0, 3.0, 3.0, 1 / 3]), np.arange(4))  # says 75 %, is right in three of four
    >>> round(got["slope"], 6), abs(round(got["ece"], 6)), round(got["brier"], 4)
    (1.0, 0.0, 0.1875)
    """
    label, p = np.repeat([1, 0], len(margin)), expit(np.concatenate([margin, -margin]))
    share, said = calibration_curve(label, p, n_bins=10)
    counts = np.bincount(np.searchsorted(np.linspace(0, 1, 11)[1:-1], p))
    counts = counts[counts > 0]
    bins = [{"confidence": float(said[b]), "accuracy": float(share[b]), "n": int(counts[b])} for b in range(len(said))]
    result: dict[str, Any] = {
        "ece": float(np.average(np.abs(share - said), weights=counts)), "brier": float(brier_score_loss(label, p)),
        "log_loss": float(np.logaddexp(0, -margin).mean()), "bins": [row for row in bins if row["confidence"] > 0.5],
        "slope": None, "slope_standard_error": None, "slope_ci_low": None, "slope_ci_high": None,
    }  # fmt: skip
    if (margin > 0).any() and (margin < 0).any() and len(np.unique(groups)) > 1:
        fit = sm.GLM(np.ones(len(margin)), margin, family=sm.families.Binomial())
        fit = fit.fit(cov_type="cluster", cov_kwds={"groups": groups})
        values = [float(value) for value in (fit.params[0], fit.bse[0], *fit.conf_int()[0])]
        names = ("slope", "slope_standard_error", "slope_ci_low", "slope_ci_high")
        result |= dict(zip(names, values, strict=True))
    return result


def baselines(longer: np.ndarray) -> dict[str, Any]:
    """Length differences (n,), chosen minus rejected -> accuracy of "longer wins" and "shorter wins", ties half, and of
    a coin: 0.5, and the range in which 95 of 100 coins end with this n."""
    low, high = stats.binom.interval(0.95, len(longer), 0.5)
    return {
        "longer": share_right(np.heaviside(longer, 0.5)),
        "shorter": share_right(np.heaviside(-longer, 0.5)),
        "random": {"accuracy": 0.5, "ci_low": float(low / len(longer)), "ci_high": float(high / len(longer))},
    }


def weighted_mean(weights: Any, means: Any, errors: Any) -> dict[str, float]:
    """Weights, independent means and their standard errors -> weighted mean and its 95 % interval.

    >>> {name: round(value, 3) for name, value in weighted_mean([3, 1], [0.5, 1.0], [0.04, 0.0]).items()}
    {'accuracy': 0.625, 'standard_error': 0.03, 'ci_low': 0.566, 'ci_high': 0.684}
    """
    share = np.array(weights) / np.sum(weights)
    mean, error = float(share @ means), float(np.linalg.norm(share * errors))
    half = float(stats.norm.ppf(0.975)) * error
    return {"accuracy": mean, "standard_error": error, "ci_low": mean - half, "ci_high": mean + half}


def reward_bench(strict: np.ndarray, subsets: np.ndarray) -> dict[str, Any]:
    """RewardBench 1: sections are means over examples (math-prm's 447 count as 984, so that maths equals code); the
    overall score is the mean of the sections, prior sets (a plain mean of theirs) at half weight. Ties are wrong.

    >>> rows = np.array(["hep-go"] * 984 + ["math-prm"] * 447 + ["shp"])
    >>> got = reward_bench(np.where(rows == "math-prm", 0.0, 1.0), rows)  # by code and maths alone 0.5
    >>> {name: row["accuracy"] for name, row in got["sections"].items()}, round(got["score"]["accuracy"], 4)
    ({'Reasoning': 0.5, 'Prior Sets': 1.0}, 0.6667)
    """
    sections, missing = {}, []
    for section, names in SECTIONS.items():
        parts = {name: strict[subsets == name] for name in names.split() if (subsets == name).any()}
        missing += [name for name in names.split() if name not in parts]
        means = np.array([part.mean() for part in parts.values()])
        errors = [math.sqrt(part.var() / len(part)) for part in parts.values()]
        weights = [len(part) * (984 / 447 if name == "math-prm" else 1) for name, part in parts.items()]
        if parts:
            sections[section] = weighted_mean(np.ones(len(parts)) if "Prior" in section else weights, means, errors)
    columns = zip(*((row["accuracy"], row["standard_error"]) for row in sections.values()), strict=True)
    score = weighted_mean([0.5 if "Prior" in name else 1.0 for name in sections], *columns)
    return {"sections": sections, "score": score, "missing_subsets": missing}


def best_of(margin: np.ndarray, sets: np.ndarray, subsets: np.ndarray) -> dict[str, Any]:
    """RewardBench 2 (arXiv:2506.01937): sets of one right response among K; the right one alone on top earns 1, one of
    k on top 1/k. Margins (n,) of the right one against each other; `sets` names the set of each, "" where in none.
    Its Ties subset, where several are right, has rules of its own that are not computed: such rows are pairs here.

    >>> got = best_of(np.array([1.0, 2.0, 3.0, 1.0, 0.0, 0.0]), np.array(["a"] * 3 + ["b"] * 3), np.array([""] * 6))
    >>> round(got["mean"], 4), got["chance"]  # a: 1; b: 1/3
    (0.6667, 0.25)
    """
    parts = {name: np.flatnonzero(sets == name) for name in np.unique(sets[sets != ""])}
    credit = np.array([0.0 if (margin[p] < 0).any() else 1 / (1 + (margin[p] == 0).sum()) for p in parts.values()])
    of = np.array([subsets[p[0]] for p in parts.values()])
    means = {str(name): float(credit[of == name].mean()) for name in np.unique(of)}
    chance = float(np.mean([1 / (1 + len(p)) for p in parts.values()]))
    means_mean = float(np.mean(list(means.values())))
    return {**mean_interval(credit), "chance": chance, "subsets": means, "mean_of_subsets": means_mean}


def measure_pairs(
    chosen_scores: Sequence[float],
    rejected_scores: Sequence[float],
    subsets: Sequence[str] | None = None,
    prompts: Sequence[Any] | None = None,
    chosen_lengths: Sequence[float] | None = None,
    rejected_lengths: Sequence[float] | None = None,
    sets: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Everything that follows from scores, one entry per pair: what the command line and the module report.

    `prompts` say which pairs belong together (by default none do); `sets` are best_of's.
    """
    scores = np.array([chosen_scores, rejected_scores], float)
    finite = np.isfinite(scores).all(axis=0)
    if not len(finite) or not finite.all():
        bad = f"those of pair {int(np.argmin(finite))}, counted from 0, are none" if len(finite) else "no pairs"
        raise UserError(f"scores must be finite numbers: {bad}")
    for column in (subsets, prompts, chosen_lengths, rejected_lengths, sets):
        if column is not None and len(column) != len(finite):
            raise UserError(f"{len(finite)} pairs of scores, but a column of {len(column)} entries")
    margin = scores[0] - scores[1]
    won = np.heaviside(margin, 0.5)
    names = np.array([""] * len(margin) if subsets is None else [str(name) for name in subsets])
    groups = np.arange(len(margin)) if prompts is None else group_numbers(prompts)
    clustered = clustered_interval(won, groups)
    result: dict[str, Any] = {**share_right(won), "clustered": clustered, "within_prompt": within_groups(won, groups)}
    result |= {"by_margin": accuracy_by_bin(won, np.abs(margin)), "calibration": calibration(margin, groups)}
    parts = {str(name): names == name for name in np.unique(names[names != ""])}
    result["subsets"] = {name: share_right(won[part]) for name, part in parts.items()}
    if chosen_lengths is not None and rejected_lengths is not None:
        longer = np.asarray(chosen_lengths, float) - np.asarray(rejected_lengths, float)
        result |= {"baselines": baselines(longer), "by_length_difference": accuracy_by_bin(won, longer)}
        for name, part in parts.items():
            result["subsets"][name]["baselines"] = baselines(longer[part])
    if parts.keys() & set(" ".join(SECTIONS.values()).split()):
        result["reward_bench"] = reward_bench(won == 1, names)
    if sets is not None and any(sets):
        result["best_of"] = best_of(margin, np.array(sets), names)
    return result


def group_numbers(prompts: Sequence[Any]) -> np.ndarray:
    """Prompts (strings or message lists) -> a number for each, the same for equal ones.

    >>> group_numbers(["b", "a", "b"]).tolist()
    [1, 0, 1]
    """
    return np.unique([json.dumps(prompt, sort_keys=True) for prompt in prompts], return_inverse=True)[1]


def compare_scores(plain: np.ndarray, nf4: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Scores (n, 2) of the same pairs, unquantised and in NF4, clusters (n,) -> paired difference, shifts, rank order.

    >>> got = compare_scores(np.array([[1.0, 0.0], [3.0, 2.0]]), np.array([[1.0, 0.0], [2.0, 3.0]]), np.arange(2))
    >>> got["difference"]["mean"], got["flipped"], got["max_shift"], round(got["rank_correlation"], 3)
    (-0.5, 1, 1.0, 0.8)
    """
    won, won_nf4 = (np.heaviside(scores[:, 0] - scores[:, 1], 0.5) for scores in (plain, nf4))
    return {
        "accuracy_none": float(won.mean()), "accuracy_nf4": float(won_nf4.mean()),
        "difference": clustered_interval(won_nf4 - won, groups), "flipped": int((won != won_nf4).sum()),
        "rank_correlation": float(stats.spearmanr(plain.ravel(), nf4.ravel()).statistic),
        "max_shift": float(np.abs(nf4 - plain).max()), "score_sd": float(plain.std()),
    }  # fmt: skip


class RmAccuracy(evaluate.Metric):
    """The Hugging Face module: `measure_pairs` on lists of scores, one entry per pair."""

    def _info(self) -> evaluate.MetricInfo:
        """What compute() takes: two scores per pair; keyword arguments are those of `measure_pairs`."""
        score = datasets.Value("float64")
        features = datasets.Features({"chosen_scores": score, "rejected_scores": score})
        text = (
            "chosen_scores, rejected_scores and, if wanted, the other arguments of `measure_pairs`: one entry per pair"
        )
        return evaluate.MetricInfo(
            description=str(__doc__), citation="", inputs_description=text, features=features
        )  # fmt: skip

    def _compute(self, chosen_scores: list[float], rejected_scores: list[float], **columns: Any) -> dict[str, Any]:
        """See `measure_pairs`."""
        return measure_pairs(chosen_scores, rejected_scores, **columns)


# ----------------------------------------------------------------------------------------------------------------- data


def split_dialogue(dialogue: str | list[dict]) -> tuple[list[dict], str]:
    """(messages before, content) of the last assistant turn of a message list, or of a text in hh-rlhf's form."""
    if isinstance(dialogue, str):
        _, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", dialogue)
        roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
        dialogue = [{"role": role, "content": text.strip()} for role, text in zip(roles, parts[1::2], strict=True)]
    messages = to_messages(dialogue)
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("no dialogue that ends with an assistant turn")
    return messages[:-1], messages[-1]["content"]


def read_pair(row: dict) -> tuple[Any, list[str]]:
    """(prompt, [chosen, rejected]) of a row with an explicit prompt or with two whole dialogues."""
    if row.get("prompt") is not None:
        texts = [t if isinstance(t, str) else split_dialogue(t)[1] for t in (row["chosen"], row["rejected"])]
        prompt = row["prompt"]
    else:
        (prompt, chosen), (other, rejected) = split_dialogue(row["chosen"]), split_dialogue(row["rejected"])
        if prompt != other:
            raise BadRow("pair with differing prompts")
        texts = [chosen, rejected]
    if texts[0] == texts[1]:
        raise BadRow("identical pair")
    return prompt, texts


def better_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """All (i, j) with i ranked better than j.

    >>> better_pairs([2, 1, 2])
    [(1, 0), (1, 2)]
    """
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


def are_numbers(values: list) -> bool:
    """Whether all values are finite numbers."""
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def leave_out(lost: dict[str, list], bad: BadRow, line: int) -> None:
    """Count a bad row in `lost`: reason -> [count, first line, detail of the first]."""
    lost.setdefault(bad.args[0], [0, line, *bad.args[1:]])[0] += 1


def load_rows(source: str, split: str) -> list[dict]:
    """Rows of a hub dataset or a local .jsonl, .json or .parquet file; "_line" is the line or row number, from 1."""
    if source.endswith(".jsonl"):
        return read_jsonl(source, ())
    kind = next((kind for kind in ("json", "parquet") if source.endswith(f".{kind}")), None)
    options = {"data_files": source, "split": "train"} if kind else {"split": split}
    try:
        data = datasets.load_dataset(kind or source, **options)
    except Exception as error:  # whatever datasets raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"dataset {source}, split {options['split']}: can't be read ({reason})") from error
    return [{**row, "_line": number} for number, row in enumerate(data, 1)]


def read_example(row: dict, source: str) -> dict:
    """One row -> {"id", "line", "subset", "prompt", "texts", "ranks", "scores", "columns"}; BadRow if of no use.

    `scores` are the row's own, of its texts, or None; `columns` is whatever else the row holds, for --reward_fn.
    """
    chosen, rejected, ranks, scores = row.get("chosen"), row.get("rejected"), [1, 2], None
    if isinstance(chosen, list) and isinstance(rejected, list) and all(isinstance(t, str) for t in chosen + rejected):
        prompt, texts, ranks = row.get("prompt") or "", chosen + rejected, [1] * len(chosen) + [2] * len(rejected)
    elif chosen is not None and rejected is not None:
        prompt, texts = read_pair(row)
        scores = [row[name] for name in SCORES] if all(name in row for name in SCORES) else None
    elif all(row.get(name) is not None for name in ("prompt", "responses", "ranks")):
        prompt, texts, ranks = row["prompt"], row["responses"], row["ranks"]
    else:
        raise BadRow("a column is missing or null")
    if not (isinstance(texts, list) and isinstance(ranks, list) and len(texts) == len(ranks) and are_numbers(ranks)):
        raise BadRow("responses and ranks are no lists of one length, the second of numbers")
    if not better_pairs(ranks):
        raise BadRow("no response is ranked above another")
    messages = to_messages(prompt)
    if not messages or not all(isinstance(t, str) and t.strip() for t in (messages[-1]["content"], *texts)):
        raise BadRow("empty prompt or response")
    if scores and not are_numbers(scores):
        raise UserError(f"{source}, line {row['_line']}: {', '.join(SCORES)} are {scores}; expected finite numbers")
    row_id = row["_line"] if row.get("id") is None else row["id"]
    columns = {k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected", "responses", "ranks", "_line")}
    return {
        "id": row_id, "line": row["_line"], "subset": str(row.get("subset") or ""), "columns": columns,
        "prompt": prompt, "texts": texts, "ranks": ranks, "scores": scores,
    }  # fmt: skip


def read_examples(source: str, split: str, lost: dict[str, list]) -> list[dict]:
    """Examples of a data set; rows that can't be used are counted in `lost`.

    Errors: no usable row; a score that is no number; one id for two prompts, by file and line.
    """
    rows, examples = load_rows(source, split), []
    seen: dict[str, dict] = {}  # id -> first example
    for row in rows:
        try:
            example = read_example(row, source)
            first = seen.setdefault(str(example["id"]), example)
            if first["prompt"] != example["prompt"]:
                where = f"{source}, lines {first['line']} and {row['_line']}"
                raise UserError(f"{where}: id {example['id']!r} has two prompts; an id must belong to one prompt")
            if first is not example and first["texts"] == example["texts"]:
                raise BadRow("the same id and texts again")
            examples.append(example)
        except BadRow as bad:
            leave_out(lost, bad, row["_line"])
    if not examples:
        found = ", ".join(sorted({name for row in rows for name in row if name != "_line"})) or "none"
        reasons = "; ".join(f"{count} {reason} (first: line {line})" for reason, (count, line, *_) in lost.items())
        expected = "prompt + chosen + rejected | chosen + rejected | prompt + responses + ranks"
        raise UserError(f"{source}: no usable row; columns found: {found}; expected: {expected}; {reasons}")
    return examples


def pairs_of(example: dict) -> list[dict]:
    """All strict pairs of a scored example, in the format of scored pairs; lengths in characters."""
    texts, pairs = example["texts"], []
    for i, j in better_pairs(example["ranks"]):
        row = {"id": example["id"] if len(texts) == 2 else f"{example['id']}-{i}-{j}", "prompt": example["prompt"]}
        for name, k in (("chosen", i), ("rejected", j)):
            row |= {name: texts[k], f"{name}_score": float(example["scores"][k]), f"{name}_length": len(texts[k])}
        pairs.append({**row, "subset": example["subset"]})
    return pairs


def set_name(example: dict) -> str:
    """The id of an example with one best response among K > 2 and no other order, as best_of takes it; else ""."""
    ranks = example["ranks"]
    return str(example["id"]) if len(ranks) > 2 and len(set(ranks)) == 2 and ranks.count(min(ranks)) == 1 else ""


# -------------------------------------------------------------------------------------------------------------- scoring


def encode_response(tokenizer: Any, prompt: str | list[dict], response: str, stop_ids: list[int]) -> list[int]:
    """Token ids of `response` as the continuation of encode_prompt(prompt), up to and with the token that ends it.

    The rendered prompt must be a prefix of the rendered conversation: else the model would be trained on text that it
    is never asked to continue, so BadRow shows both sides of the boundary.
    """
    messages = to_messages(prompt)
    before = render(tokenizer, messages, True)
    whole = render(tokenizer, [*messages, {"role": "assistant", "content": response}], False)
    if not whole.startswith(before):
        at = len(os.path.commonprefix([before, whole]))
        start = before[max(0, at - 20) : at]
        detail = f"after {start!r} the prompt has {before[at:][:30]!r}, with its response {whole[at:][:30]!r}"
        raise BadRow("chat template: the prompt is no prefix of prompt + response", detail)
    prompt_ids, ids = tokenize(tokenizer, before), tokenize(tokenizer, whole)
    if ids[: len(prompt_ids)] == prompt_ids:
        ids = ids[len(prompt_ids) :]
    else:  # a token would straddle the boundary: the model will have to start afresh there, so do we
        ids = tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]
    end = next((t for t, token in enumerate(ids) if token in stop_ids), None)
    return ids[: end + 1] if end is not None else [*ids, tokenizer.eos_token_id]


def check_canaries(scores: list[float], card: dict, quant: str, dtype: str, where: str) -> None:
    """Compare canary scores with those recorded in reward.json (normalised, so in sd); UserError if the head changed.

    Same quantisation and dtype: within 1e-4 in fp32, 0.05 otherwise; else rank correlation 0.95 and shift below 0.25.
    """
    recorded = np.array([canary["score"] for canary in card["canaries"]])
    difference = np.abs(np.array(scores) - recorded)
    if (quant, dtype) == (card["quant"], card["dtype"]):
        limit = 1e-4 if dtype == "float32" else 0.05
        passed, text = bool(difference.max() <= limit), f"largest difference {difference.max():.2g}, allowed {limit}"
    else:
        ranks = [np.argsort(np.argsort(x)) for x in (recorded, scores)]
        correlation = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
        shift = abs(float(np.mean(np.array(scores) - recorded)))
        passed = bool(correlation >= 0.95 and shift < 0.25)
        text = f"rank correlation {correlation:.3f} (at least 0.95), shift {shift:.2f} sd (below 0.25)"
    if not passed:
        raise UserError(
            f"{where}: the scores in reward.json do not reproduce ({text}); another base, or a changed head"
        )
    print(f"reward model: {len(recorded)} canaries reproduce ({text})")


class Scorer(NamedTuple):
    """A frozen reward model: r(x, y) = head(state of the last token of response y to prompt x)."""

    model: Any  # a sequence classifier in eval mode, with the adapter where the source is a run folder
    head: Any  # linear, fp32: states (B, d) -> scores (B, 1); its bias takes off the mean that reward.json records
    tokenizer: Any
    stop_ids: list[int]  # tokens that end a response; [] for a whole model, which reads its template's text to the end
    window: int  # tokens that the model can read
    quant: str
    dtype: str


def pick_precision(folder: Path | None, quant: str, dtype: str, device: Any) -> tuple[str, str]:
    """(quant, dtype) without "auto": as the run folder records them, else NF4 on a GPU and none elsewhere."""
    import torch

    recorded = json.loads((folder / "args.json").read_text()) if folder and (folder / "args.json").is_file() else {}
    if quant == "auto":
        quant = recorded.get("quant") or ("nf4" if device.type == "cuda" else "none")
    if dtype == "auto":
        half = torch.cuda.get_device_capability(device)[0] >= 8 if device.type == "cuda" else quant == "nf4"
        same = quant == recorded.get("quant")
        dtype = recorded["dtype"] if same and "dtype" in recorded else "bfloat16" if half else "float32"
    return quant, dtype


def load_classifier(
    base: str, folder: Path | None, quant: str, dtype: str, trust_remote_code: bool, device: Any
) -> Any:
    """A sequence classifier with one score in eval mode, with the adapter of `folder` on it; nf4: double quantisation.

    A whole model must bring its own head, never a random one; that of a run folder is left to load_scorer.
    """
    import torch
    import transformers
    from peft import PeftModel

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": getattr(torch, dtype)}
    if folder:
        options["num_labels"] = 1
    if quant == "nf4":
        options["device_map"] = {"": device}
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"], llm_int8_skip_modules=["lm_head", "score"],
        )  # fmt: skip
    try:
        model, loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, output_loading_info=True, **options
        )
        head = getattr(model, "score", None)
        if head is None or head.out_features != 1 or (not folder and "score.weight" in loaded["missing_keys"]):
            raise UserError(f"{base}: neither a run folder of reward.py nor a decoder with one trained score")
        model = PeftModel.from_pretrained(model, str(folder)) if folder else model
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder or base}: can't be loaded as a reward model ({reason})") from error
    model = model.to(device).eval()
    if device.type == "cpu" and model.num_parameters() < 10**7:
        torch.set_num_threads(min(2, torch.get_num_threads()))  # more gain nothing, and lose where cores are shared
    modules: Any = model.modules()
    for module in modules:  # bitsandbytes would repack 4-bit weights at the first pass: other scores after it
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if device.type == "cpu" and module.in_features % 64 in (16, 32, 48):
                raise UserError(f"model {base}: bitsandbytes misreads {module.in_features} inputs on CPU; --quant none")
    return model


def load_scorer(source: str, quant: str, dtype: str, trust_remote_code: bool = False, check: bool = True) -> Scorer:
    """--reward_model: a run folder of reward.py (adapter and head), or a whole sequence classifier with one score.

    `check`: the canaries of reward.json must reproduce, or the head is refused.
    """
    for name in ("bitsandbytes", "accelerate"):  # the first warns on import that an optional package is missing
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")  # about calls between the two
    import torch
    import transformers
    from safetensors.torch import load_file

    transformers.utils.logging.set_verbosity_error()  # it warns that the head is new; the folder's own takes its place
    transformers.utils.logging.disable_progress_bar()
    folder = find_adapter(source, None)
    base = find_base(folder) if folder else source
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if folder and not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: adapter_model.safetensors is missing; is the run unfinished?")
    weights = load_file(folder / "adapter_model.safetensors") if folder else {}
    if folder and HEAD_KEY not in weights:
        raise UserError(f"{source}: no reward head ({HEAD_KEY} is missing in its adapter); is it from reward.py?")
    quant, dtype = pick_precision(folder, quant, dtype, device)
    model = load_classifier(base, folder, quant, dtype, trust_remote_code, device)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder or base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no tokenizer there ({type(error).__name__})") from error
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE

    # The head in fp32 (4-bit loading rounds the one in the model), and what else a run folder records
    weight, bias = (weights[HEAD_KEY], None) if folder else (model.score.weight, model.score.bias)
    head = torch.nn.Linear(weight.shape[1], 1, device=device)
    card: dict[str, Any] = {"mean": 0.0, "canaries": []}
    stop_ids: list[int] = []
    if folder:
        try:
            generation = transformers.GenerationConfig.from_pretrained(base)
        except OSError:  # no generation_config.json
            generation = transformers.GenerationConfig.from_model_config(model.config)
        stop_ids = find_stop_ids(tokenizer, generation)
        if (folder / "reward.json").is_file():
            card = json.loads((folder / "reward.json").read_text())
        else:
            print(f"reward model: {folder} has no reward.json; scores are neither centred nor checked")
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.fill_(-card["mean"] if bias is None else bias.item())
    window = getattr(model.config, "max_position_embeddings", None) or 10**6
    scorer = Scorer(model, head, tokenizer, stop_ids, window, quant, dtype)
    if check and card.get("canaries"):
        texts = [encode_text(scorer, canary["prompt"], canary["response"]) for canary in card["canaries"]]
        check_canaries(score_ids(scorer, texts, 1).tolist(), card, quant, dtype, source)
    return scorer


def encode_text(scorer: Scorer, prompt: str | list[dict], response: str) -> list[int]:
    """Token ids of prompt and response, up to and with the token that ends it; BadRow where they can't be scored."""
    messages = to_messages(prompt)
    if not messages or not all(isinstance(t, str) and t.strip() for t in (messages[-1]["content"], response)):
        raise BadRow("empty prompt or response")
    if scorer.stop_ids:
        ids = encode_prompt(scorer.tokenizer, prompt)
        ids = ids + encode_response(scorer.tokenizer, prompt, response, scorer.stop_ids)
    else:
        whole = [*messages, {"role": "assistant", "content": response}]
        ids = tokenize(scorer.tokenizer, render(scorer.tokenizer, whole, False))
    if len(ids) > scorer.window:
        raise BadRow(f"longer than the {scorer.window} tokens that the model can read")
    return ids


def score_ids(scorer: Scorer, texts: list[list[int]], batch_size: int) -> np.ndarray:
    """Scores (n,) of token rows: batches of like length, padded at the right, read at each row's own last token."""
    import torch

    classifier = scorer.model.get_base_model() if hasattr(scorer.model, "peft_config") else scorer.model
    backbone = getattr(classifier, classifier.base_model_prefix)
    scores, order = np.zeros(len(texts)), sorted(range(len(texts)), key=lambda i: len(texts[i]))
    device = scorer.head.weight.device
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        lengths = torch.tensor([len(texts[i]) for i in part], device=device)
        width = len(texts[part[-1]])
        ids = torch.tensor([texts[i] + [0] * (width - len(texts[i])) for i in part], device=device)
        mask = (torch.arange(width, device=device) < lengths[:, None]).long()  # from lengths: pad may be EOS
        with torch.no_grad():
            states = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            scores[part] = scorer.head(states[range(len(part)), lengths - 1].float()).squeeze(-1).cpu().numpy()
    return scores


def set_scores(examples: list[dict], key: str, values: np.ndarray) -> None:
    """Deal out the scores of all texts, in order, to their examples."""
    flow = iter(values.tolist())
    for example in examples:
        example[key] = [next(flow) for _ in example["texts"]]


def score_by_model(examples: list[dict], args: Args, lost: dict[str, list]) -> dict[str, Any]:
    """Set each example's "scores" (and "nf4" and "none" for --compare_quant), None where it can't be read; say how."""
    source = args.reward_model or str(TINY / "reward")
    dtype = "bfloat16" if args.compare_quant and args.dtype == "auto" else args.dtype
    scorer = load_scorer(source, args.quant, dtype, args.trust_remote_code)
    texts: list[list[int]] = []
    for example in examples:
        try:
            texts += [encode_text(scorer, example["prompt"], text) for text in example["texts"]]
            example["scores"] = []
        except BadRow as bad:
            leave_out(lost, bad, example["line"])
            example["scores"] = None
    kept = [example for example in examples if example["scores"] is not None]
    scores, alone = score_ids(scorer, texts, args.batch_size), score_ids(scorer, texts[:BATCH_CHECK], 1)
    set_scores(kept, "scores", scores)
    if args.compare_quant:
        other = load_scorer(source, "none" if scorer.quant == "nf4" else "nf4", dtype, args.trust_remote_code, False)
        set_scores(kept, scorer.quant, scores)
        set_scores(kept, other.quant, score_ids(other, texts, args.batch_size))
    difference = float(np.abs(alone - scores[:BATCH_CHECK]).max(initial=0))
    same = {"batch_size": args.batch_size, "n_texts": len(alone), "max_difference": difference}
    return {"reward_model": source, "quant": scorer.quant, "dtype": scorer.dtype, "batch_invariance": same}


def score_by_function(examples: list[dict], spec: str, lost: dict[str, list]) -> None:
    """Set each example's "scores" to those of --reward_fn, None where it has none for one of the texts."""
    function = load_function(spec)
    texts = [(example, text) for example in examples for text in example["texts"]]
    names = sorted({name for example in examples for name in example["columns"]})  # rows may lack some
    columns = {name: [example["columns"].get(name) for example, _ in texts] for name in names}
    try:
        values = function([example["prompt"] for example, _ in texts], [text for _, text in texts], **columns)
        scores = np.array([math.nan if value is None else float(value) for value in values])
    except Exception as error:  # whatever the function raises
        raise UserError(f"{spec} raised {type(error).__name__}: {error}") from error
    if len(scores) != len(texts):
        raise UserError(f"{spec} returned {len(scores)} values for {len(texts)} responses")
    set_scores(examples, "scores", scores)
    for example in examples:
        if any(map(math.isnan, example["scores"])):
            leave_out(lost, BadRow(f"{spec} returned no number"), example["line"])
            example["scores"] = None


# --------------------------------------------------------------------------------------------------------------- result


def share_text(row: dict[str, Any]) -> str:
    """A share with its interval: "0.704 [0.663, 0.742]", - where one draw has none."""
    low, high = ("-" if math.isnan(row[name]) else f"{row[name]:.3f}" for name in ("ci_low", "ci_high"))
    return f"{row.get('accuracy', row.get('mean')):.3f} [{low}, {high}]"


def print_tables(result: dict[str, Any], lost: dict[str, list]) -> None:
    """The tables: shares of pairs won with their intervals, then what has another unit, then what was left out."""
    rules, fit = result["baselines"], result["calibration"]
    rows = [*result["subsets"].items(), ("all, a tie is half", result)]
    if result["clustered"]["clusters"] < result["n"]:  # pairs that share a prompt are not independent
        rows += [("  interval clustered by prompt", result["clustered"]), ("  within prompts", result["within_prompt"])]
    if "reward_bench" in result:
        rows += [(f"RewardBench {name}", row) for name, row in result["reward_bench"]["sections"].items()]
        rows += [("RewardBench, mean of sections", result["reward_bench"]["score"])]
    if "best_of" in result:
        rows += [(f"best of K, by chance {result['best_of']['chance']:.3f}", result["best_of"])]
    rows += [("longer wins", rules["longer"]), ("shorter wins", rules["shorter"]), ("a coin", rules["random"])]
    for key, title in (("by_margin", "|score difference|"), ("by_length_difference", "characters more")):
        rows += [(f"{title} {row['low']:.4g} to {row['high']:.4g}", row) for row in result[key]]
    print(f"{'':<44}  pairs  accuracy, 95 % interval  longer  shorter wins")
    for title, row in rows:
        beside = [f"{rule['accuracy']:.3f}" for rule in list(row.get("baselines", {}).values())[:2]]
        print(f"{title:<44} {row.get('n', ''):>6}  {share_text(row)}     {'    '.join(beside)}".rstrip())
    print(f"ties: {result['ties']}; accuracy with a tie as wrong (RewardBench) {result['strict_accuracy']:.3f}")
    if missing := result.get("reward_bench", {}).get("missing_subsets"):
        print(f"RewardBench subsets that are not in the data: {', '.join(missing)}")
    slope = "none, as all pairs lie on one side"
    if fit["slope"] is not None:
        slope = f"{fit['slope']:.3f} [{fit['slope_ci_low']:.3f}, {fit['slope_ci_high']:.3f}] (below 1: overconfident)"
    print(f"calibration: ECE {fit['ece']:.3f}, Brier {fit['brier']:.3f}, log-loss {fit['log_loss']:.3f}, slope {slope}")
    for row in fit["bins"]:
        print(f"  says {row['confidence']:.3f}, right {row['accuracy']:.3f} of {row['n']}")
    if row := result.get("batch_invariance"):
        how = f"the scores of the first {row['n_texts']} texts differ by at most {row['max_difference']:.2g}"
        print(f"batch size {row['batch_size']} against 1: {how}")
    if row := result.get("compare_quant"):
        print(f"4-bit base: {row['accuracy_nf4']:.3f}, unquantised: {row['accuracy_none']:.3f} in {result['dtype']}")
        print(
            f"  difference {share_text(row['difference'])}; {row['flipped']} pairs change; largest shift of a score "
            f"{row['max_shift']:.2g} (their sd {row['score_sd']:.2g}), rank correlation {row['rank_correlation']:.4f}"
        )
    for reason, (count, line, *detail) in lost.items():
        print(f"left out: {count} {reason} (first: line {line}{''.join(f': {text}' for text in detail)})")


def main(args: Args) -> dict[str, Any]:
    """Accuracy of a reward model on preference pairs (rm_accuracy.py)."""
    # 1. The data, and who scores it
    if args.reward_model and args.reward_fn:
        raise UserError("--reward_model and --reward_fn: give one of them")
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: must be above 0")
    lost: dict[str, list] = {}
    examples = read_examples(args.dataset, args.dataset_split, lost)
    n_rows = len(examples) + sum(count for count, *_ in lost.values())
    unscored = next((e["line"] for e in examples if not e["scores"]), None)
    by_model = args.reward_model or (unscored and not args.reward_fn and args.dataset == Args.dataset)
    if unscored and not by_model and not args.reward_fn:
        raise UserError(f"{args.dataset}, line {unscored}: no {', '.join(SCORES)}; give --reward_model or --reward_fn")
    if args.compare_quant and not by_model:
        raise UserError("--compare_quant needs a --reward_model to load in both precisions")

    # 2. Scores
    result: dict[str, Any] = {"dataset": args.dataset, "reward_model": args.reward_fn or "scores of the dataset"}
    if by_model:
        result |= score_by_model(examples, args, lost)
    elif args.reward_fn:
        score_by_function(examples, args.reward_fn, lost)
    examples = [e for e in examples if e["scores"] is not None]
    if not examples:
        raise UserError(f"{args.dataset}: no pair has scores; {'; '.join(lost)}")

    # 3. What they say
    pairs = [pair for e in examples for pair in pairs_of(e)]
    sets = [set_name(e) for e in examples for _ in better_pairs(e["ranks"])]
    columns = (*SCORES, "subset", "prompt", "chosen_length", "rejected_length")
    result |= {"rows": n_rows, "lost": {reason: count for reason, (count, *_) in lost.items()}}
    result |= measure_pairs(**{f"{name}s": [pair[name] for pair in pairs] for name in columns}, sets=sets)
    if args.compare_quant:
        both = [[(e[q][i], e[q][j]) for e in examples for i, j in better_pairs(e["ranks"])] for q in ("none", "nf4")]
        groups = group_numbers([pair["prompt"] for pair in pairs])
        result["compare_quant"] = compare_scores(np.array(both[0]), np.array(both[1]), groups)

    # 4. Tables and files
    print(f"rm_accuracy: {result['reward_model']} on {args.dataset}: {len(pairs)} pairs from {n_rows} rows")
    print_tables(result, lost)
    result = json.loads(json.dumps({**result, "args": asdict(args)}), parse_constant=lambda _: None)  # NaN: null
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    print(f"rm_accuracy: wrote {output}")
    if by_model or args.reward_fn:
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        pairs_file = output.with_name(f"{output.stem}_pairs.jsonl")
        write_file(pairs_file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        print(f"rm_accuracy: wrote {pairs_file}")
    return result


if __name__ == "__main__":
    run_tool(main, Args)
