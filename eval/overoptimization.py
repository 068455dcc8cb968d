# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers==5.23.0", "numpy==2.4.6", "scipy==1.17.1", "matplotlib==3.11.2"]
# ///
"""Over-optimisation: what a policy gains in its reward model's eyes (proxy) and in truth (gold), against sqrt(KL).

With d = sqrt(KL(policy || reference)), the square root of nats, Gao, Schulman and Hilton (2022, arXiv:2210.10760) fit

    best-of-n   R(d) = d (alpha - beta d)       highest at d* = alpha / (2 beta)
    RL          R(d) = d (alpha - beta ln d)    highest at d* = exp(alpha / beta - 1)

where R is the gain over d = 0. The curve of the gold score turns down where the policy exploits the proxy.

- Run folders of ppo.py, grpo.py or dpo.py --online: the batch means `score` (proxy), `gold` and `kl` of metrics.jsonl,
  one point per step. R(0) is a third parameter of the fit, as the first batch alone would be a noisy zero. `kl` is a
  sample mean and can fall below 0: such a step counts as d = 0. Intervals: several runs (seeds), each fitted alone, t
  interval over the runs; one run, percentiles of a bootstrap of blocks of consecutive steps (sqrt(steps) long), which
  is the noise of its batches only, not what another seed would do. The table shows bins of equal width in d: mean and
  t interval over the runs (one run: over its steps).
- `--samples`: N responses to each prompt, each with `score` and `gold`. Best-of-n is estimated from all n-subsets in
  closed form: sum_i C(i-1, n-1) / C(N, n) * gold of the i-th smallest proxy, i = 1..N (arXiv:2112.09332, appendix I).
  Equal proxies: one of them is drawn at random. KL = ln n - (n-1)/n, exact if no two responses are equal (an upper
  bound otherwise: Beirami et al. 2024, arXiv:2401.01879). Intervals: prompts are resampled.

A curve with beta <= 0 has no peak; one whose peak lies outside of the d that was seen is extrapolated there, and both
are printed as "no peak seen". `refits_within_data` of `refits` saw one: many of them make a peak believable.
The gap (gain of proxy - gain of gold) is in raw scores: it is a size only where both are in the same unit.

Reads run folders, or rows {"id", "prompt", "response", "score", "gold"}; without "gold" give --gold_fn.

    python eval/overoptimization.py runs/ppo runs/ppo.1        # default: runs/ppo
    python eval/overoptimization.py --samples best_of_16.jsonl

What it can't tell: whether gold is what you want; it is one more measure, only one that was not trained on.
"""

import json
import math
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, special, stats

if not __package__:  # run as a file or imported by its bare name: it belongs to the package eval all the same
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "eval"

from .common import arg, load_function, read_jsonl, run_tool, UserError, write_file, write_json

RUN = Path("runs/ppo")  # where ppo.py writes, below the current folder
LEAST_STEPS = 5  # for a curve of three parameters


# ------------------------------------------------------------------------------------------------------------ arguments


@dataclass
class Args:
    samples: str | None = arg(None, "scored responses, several per prompt (.jsonl): best-of-n instead of run folders")
    gold_fn: str | None = arg(None, "file.py:function that gives the gold score where the rows of --samples have none")
    max_n: int | None = arg(None, "largest n of best-of-n; default: the largest power of 2 that most prompts allow")
    bins: int = arg(8, "bins of sqrt(KL) in the table of runs")
    bootstrap: int = arg(500, "resamples for the intervals of the fit")
    seed: int = arg(0, "seed of the resampling")
    output: str | None = arg(None, "result file; default: overoptimization.json beside the input; the plot is .png")


# ------------------------------------------------------------------------------------------------------------ the maths
def best_of_n_kl(n: np.ndarray) -> np.ndarray:
    """KL(best of n || one sample) in nats: ln n - (n-1)/n (Stiennon et al. 2020, appendix G.3).

    >>> best_of_n_kl(np.array([1, 2])).round(4)  # ln 2 - 1/2
    array([0.    , 0.1931])
    """
    return np.log(n) - (n - 1) / n


def best_of_n_weights(total: int, n: int) -> np.ndarray:
    """Chance (total,) that the i-th smallest of `total` is the largest of n drawn without replacement.

    C(i-1, n-1) / C(total, n): the i-th is drawn, and the n - 1 others from the i - 1 below it. Through logarithms, for
    C(2000, 1000) is no float.

    >>> (best_of_n_weights(4, 2) * 6).round(9)  # of 6 pairs, 1 has the second as its best, 2 the third, 3 the fourth
    array([0., 1., 2., 3.])
    """
    below = np.arange(n - 1, total)  # i - 1
    log_ways = special.gammaln(below + 1) - special.gammaln(below - n + 2) - special.gammaln(n)
    log_all = special.gammaln(total + 1) - special.gammaln(total - n + 1) - special.gammaln(n + 1)
    return np.r_[np.zeros(n - 1), np.exp(log_ways - log_all)]


def best_of_n(proxy: np.ndarray, values: np.ndarray, n: int) -> float:
    """Mean over all n-subsets of the value of the subset's best by proxy; proxy, values (samples,).

    Among equal proxies each is the best equally often, so their values are averaged first.

    >>> best_of_n(np.array([1.0, 2.0, 3.0]), np.array([0.0, 6.0, 3.0]), 2)  # pairs: 6, 3, 3
    4.0
    >>> best_of_n(np.array([1.0, 1.0]), np.array([0.0, 1.0]), 2)  # a tie
    0.5
    """
    _, level, sizes = np.unique(proxy, return_inverse=True, return_counts=True)
    shared = (np.bincount(level, values) / sizes)[level]
    return float(best_of_n_weights(len(proxy), n) @ shared[np.argsort(proxy, kind="stable")])


def gain_best_of_n(d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """R(d) = d (alpha - beta d).

    >>> float(gain_best_of_n(np.array(2.0), alpha=3.0, beta=1.0))
    2.0
    """
    return d * (alpha - beta * d)


def gain_rl(d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """R(d) = d (alpha - beta ln d), 0 at d = 0.

    >>> gain_rl(np.array([0.0, 1.0, math.e]), alpha=3.0, beta=1.0).round(3)
    array([0.   , 3.   , 5.437])
    """
    return alpha * d - beta * special.xlogy(d, d)


def peak(alpha: float, beta: float, rl: bool) -> float:
    """d* where the curve is highest; infinity if it has no peak (beta <= 0), 0 if it falls from the start.

    >>> peak(3.0, 1.0, rl=False), peak(1.0, 1.0, rl=True), peak(1.0, -1.0, rl=True), peak(-1.0, 1.0, rl=False)
    (1.5, 1.0, inf, 0.0)
    """
    if beta <= 0:
        return math.inf
    return math.exp(min(alpha / beta - 1, 700.0)) if rl else max(alpha / (2 * beta), 0.0)


def fit_curve(d: np.ndarray, reward: np.ndarray, rl: bool) -> np.ndarray:
    """Least squares: (alpha, beta, R at d = 0); best-of-n takes gains, whose last is 0.

    >>> d = np.array([0.0, 0.5, 1.0, 2.0])
    >>> fit_curve(d, 0.1 + gain_rl(d, 2.0, 0.5), rl=True).round(4)
    array([2. , 0.5, 0.1])
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optimize.OptimizeWarning)  # of a covariance, which is not used
        if rl:
            return optimize.curve_fit(lambda d, a, b, start: start + gain_rl(d, a, b), d, reward, (1.0, 1.0, 0.0))[0]
        return np.append(optimize.curve_fit(gain_best_of_n, d, reward, (1.0, 1.0))[0], 0.0)


def block_draw(n: int, rng: np.random.Generator) -> np.ndarray:
    """Indices (n,) of a resample by blocks of round(sqrt(n)) consecutive points (Kuensch 1989), starts drawn at random.

    >>> block_draw(4, np.random.default_rng(0)).tolist()  # two blocks of two
    [2, 3, 1, 2]
    """
    length = max(1, round(math.sqrt(n)))
    starts = rng.integers(n - length + 1, size=-(-n // length))
    return (starts[:, None] + np.arange(length)).ravel()[:n]


def t_interval(values: np.ndarray) -> dict[str, Any]:
    """n, mean and 95 % t interval of a mean; None where it can't be computed.

    >>> {name: value if value is None else round(value, 3) for name, value in t_interval(np.array([1.0, 3.0])).items()}
    {'n': 2, 'mean': 2.0, 'ci_low': -10.706, 'ci_high': 14.706}
    """
    mean = float(np.mean(values)) if len(values) else None
    low = high = None
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        low, high = float(np.mean(values) - half), float(np.mean(values) + half)
    return {"n": len(values), "mean": mean, "ci_low": low, "ci_high": high}


def describe_fit(estimate: np.ndarray, draws: np.ndarray, rl: bool, over_runs: bool, seen: np.ndarray) -> dict:
    """alpha, beta, start and the peak with intervals: t over runs, or percentiles of draws (draws, 3); seen: all d.

    Draws without a peak have it at infinity, where the interval is open (None).
    """
    fit: dict[str, Any] = {}
    peaks = np.array([peak(a, b, rl) for a, b, _ in draws])
    for k, name in enumerate(("alpha", "beta", "start")):
        interval = t_interval(draws[:, k])
        ends = (
            [interval["ci_low"], interval["ci_high"]] if over_runs else np.percentile(draws[:, k], [2.5, 97.5]).tolist()
        )
        fit[name] = {"value": float(estimate[k]), "ci_low": ends[0], "ci_high": ends[1]}
    if over_runs:  # a peak is positive and its errors are factors: the t interval is that of ln d*
        interval = t_interval(np.log(peaks)) if (peaks < math.inf).all() else {"ci_low": None, "ci_high": None}
        ends = [None if x is None else math.exp(x) for x in (interval["ci_low"], interval["ci_high"])]
    else:
        ends = [x if x < math.inf else None for x in np.percentile(peaks, [2.5, 97.5], method="nearest").tolist()]
    alpha, beta, _ = estimate.tolist()
    top = peak(alpha, beta, rl)
    fit["peak"] = {"d": None, "kl": None, "gain": None, "ci_low": ends[0], "ci_high": ends[1]}
    if top < math.inf:
        gain = float((gain_rl if rl else gain_best_of_n)(np.array(top), alpha, beta))
        fit["peak"] |= {"d": top, "kl": top**2, "gain": gain}
    fit["peak"]["within_data"] = bool(seen.min() <= top < seen.max())
    inside = (seen.min() <= peaks) & (peaks < seen.max())
    return fit | {"refits": len(peaks), "refits_within_data": int(inside.sum())}


# -------------------------------------------------------------------------------------------------------------- reading


def number_or_none(row: dict, name: str, place: str) -> float | None:
    """row[name] as a finite float; None where it is absent, null or NaN.

    >>> number_or_none({"score": 1}, "score", "here"), number_or_none({"score": None}, "score", "here")
    (1.0, None)
    """
    value = row.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise UserError(f"{place}: {name} is {value!r}; expected a number or null")
    return None if value is None or not math.isfinite(value) else float(value)


def read_run(folder: str, lost: Counter) -> np.ndarray:
    """Points (steps, 3) of a run folder: kl, proxy, gold. Steps without one of them are counted in `lost`."""
    source = Path(folder) / "metrics.jsonl"
    if not source.is_file():
        raise UserError(f"{source}: no such file; name run folders of ppo.py, grpo.py or dpo.py --online "
                        "(python ppo.py makes runs/ppo), or give --samples")  # fmt: skip
    rows = read_jsonl(str(source), ())
    names = ("kl", "score", "gold")
    if missing := [name for name in names if not any(name in row for row in rows)]:
        more = "; gold needs --gold_fn in the run" if "gold" in missing else "; only RL runs and dpo.py --online log it"
        raise UserError(f"{source}: no step has {', '.join(missing)}{more}; keys found: {', '.join(rows[0])}")
    points = []
    for row in rows:
        values = [number_or_none(row, name, f"{source}, line {row['_line']}") for name in names]
        absent = [name for name, value in zip(names, values, strict=True) if value is None]
        if absent:
            lost[f"step without {' and '.join(absent)}"] += 1
        else:
            points.append(values)
    if len(points) < LEAST_STEPS:
        raise UserError(f"{source}: {len(points)} usable steps ({dict(lost)}); a curve needs at least {LEAST_STEPS}")
    return np.array(points, float)


def read_samples(source: str, gold_fn: str | None, lost: Counter) -> list[np.ndarray]:
    """Arrays (samples, 2) of proxy and gold, one per prompt (id). Rows without one of them are counted in `lost`."""
    rows = read_jsonl(source, ("id", "prompt", "score") if gold_fn else ("id", "prompt", "score", "gold"))
    if gold_fn:
        unknown = [row for row in rows if row.get("gold") is None]
        if unknown and any("response" not in row for row in unknown):
            raise UserError(f"{source}: --gold_fn needs the key response in every row without gold")
        columns = [name for name in rows[0] if name not in ("prompt", "response", "gold", "_line")]
        given = {name: [row.get(name) for row in unknown] for name in columns}
        gold = load_function(gold_fn)([r["prompt"] for r in unknown], [r["response"] for r in unknown], **given)
        if len(gold) != len(unknown):
            raise UserError(f"{gold_fn} gave {len(gold)} scores for {len(unknown)} responses")
        for row, value in zip(unknown, gold, strict=True):
            row["gold"] = value
    prompts: dict[str, tuple[str, int]] = {}
    samples: dict[str, list] = defaultdict(list)
    for row in rows:
        name, text, place = str(row["id"]), json.dumps(row["prompt"]), f"{source}, line {row['_line']}"
        if prompts.setdefault(name, (text, row["_line"]))[0] != text:
            raise UserError(f"{place}: id {name} has another prompt than in line {prompts[name][1]}")
        pair = [number_or_none(row, key, place) for key in ("score", "gold")]
        if None in pair:
            lost["response without score or gold"] += 1
        else:
            samples[name].append(pair)
    return [np.array(pairs, float) for pairs in samples.values()]


# ------------------------------------------------------------------------------------------------ from runs and samples
def from_runs(runs: list[np.ndarray], args: Args) -> dict[str, Any]:
    """Bins, fits and closing gap of runs [(steps, 3): kl, proxy, gold]."""
    below = sum(int((points[:, 0] < 0).sum()) for points in runs)
    runs = [np.column_stack([np.sqrt(points[:, 0].clip(0)), points[:, 1:]]) for points in runs]
    pooled = np.concatenate(runs)
    seen = float(pooled[:, 0].max())
    if seen == 0:
        raise UserError("the KL is 0 at every step: the policy did not move, there is no curve")
    edges = np.linspace(0, seen, args.bins + 1)
    bins = []
    for b in range(args.bins):
        inside = [p[np.clip(np.digitize(p[:, 0], edges) - 1, 0, args.bins - 1) == b] for p in runs]
        means = inside[0] if len(runs) == 1 else np.array([p.mean(0) for p in inside if len(p)]).reshape(-1, 3)
        if len(means):
            row = {"d_low": float(edges[b]), "d_high": float(edges[b + 1]), "d": float(means[:, 0].mean())}
            bins.append(row | {"proxy": t_interval(means[:, 1]), "gold": t_interval(means[:, 2])})
    rng, fits = np.random.default_rng(args.seed), {}
    for column, name in ((1, "proxy"), (2, "gold")):
        if len(runs) > 1:
            draws = np.array([fit_curve(p[:, 0], p[:, column], rl=True) for p in runs])
            estimate = draws.mean(0)
        else:
            estimate = fit_curve(pooled[:, 0], pooled[:, column], rl=True)
            picks = (pooled[block_draw(len(pooled), rng)] for _ in range(args.bootstrap))
            draws = np.array([fit_curve(p[:, 0], p[:, column], rl=True) for p in picks]).reshape(-1, 3)
        fits[name] = describe_fit(estimate, draws, True, len(runs) > 1, pooled[:, 0])
    method = "t over runs, each fitted alone" if len(runs) > 1 else "bootstrap of blocks of steps, percentiles"
    return {"kind": "rl", "n_runs": len(runs), "n_steps": sum(map(len, runs)), "steps_with_kl_below_0": below,
            "largest_d": seen, "intervals": method, "bins": bins, **fits}  # fmt: skip


def from_samples(prompts: list[np.ndarray], lost: Counter, args: Args) -> dict[str, Any]:
    """Best-of-n curve, fits and gap of prompts [(samples, 2): proxy, gold]."""
    counts = [len(pairs) for pairs in prompts]
    if not counts or max(counts) < 2:
        raise UserError(f"{args.samples}: best-of-n needs several scored responses per prompt (id); found at most "
                        f"{max(counts, default=0)}")  # fmt: skip
    largest = args.max_n or 2 ** int(math.log2(max(np.median(counts), 2)))
    kept = [pairs for pairs in prompts if len(pairs) >= largest]
    if lost_prompts := len(prompts) - len(kept):
        lost[f"prompt with fewer than {largest} responses"] += lost_prompts
    if len(kept) < 2:
        raise UserError(f"{args.samples}: {len(kept)} prompts have {largest} responses; lower --max_n")
    grid = np.unique([*(2 ** np.arange(int(math.log2(largest)) + 1)), largest])
    if len(grid) < 3:
        raise UserError(f"{args.samples}: {largest} responses per prompt; a curve of two parameters needs at least 4")
    curves = np.array([[[best_of_n(p[:, 0], p[:, c], n) for n in grid] for c in (0, 1)] for p in kept])
    gains = curves - curves[:, :, :1]  # prompts, proxy and gold, n: over one sample of the same prompt
    d = np.sqrt(best_of_n_kl(grid))
    rng = np.random.default_rng(args.seed)
    picks = rng.integers(len(kept), size=(args.bootstrap, len(kept)))
    rows, fits = [], {}
    for k, n in enumerate(grid):
        row: dict[str, Any] = {"best_of": int(n), "kl": float(d[k] ** 2), "d": float(d[k])}
        row |= {"proxy": t_interval(curves[:, 0, k]), "gold": t_interval(curves[:, 1, k])}
        rows.append(row | {"gold_gain": t_interval(gains[:, 1, k]), "gap": t_interval(gains[:, 0, k] - gains[:, 1, k])})
    for c, name in ((0, "proxy"), (1, "gold")):
        estimate = fit_curve(d, gains[:, c].mean(0), rl=False)
        draws = np.array([fit_curve(d, gains[pick, c].mean(0), rl=False) for pick in picks]).reshape(-1, 3)
        fits[name] = describe_fit(estimate, draws, False, False, d)
        del fits[name]["start"]
    return {"kind": "best_of_n", "n_prompts": len(kept), "n_responses": sum(map(len, kept)), "largest_d": float(d[-1]),
            "intervals": "bootstrap of prompts, percentiles", "bins": rows, **fits}  # fmt: skip


def add_gap(result: dict[str, Any]) -> None:
    """The gap at the end of the range, and what gold lost since its best bin, into `result`."""
    bins = result["bins"]
    proxy, gold = ([row[name]["mean"] for row in bins] for name in ("proxy", "gold"))
    best = int(np.argmax(gold))
    result["end"] = {"proxy_gain": proxy[-1] - proxy[0], "gold_gain": gold[-1] - gold[0]}
    result["end"]["gap"] = result["end"]["proxy_gain"] - result["end"]["gold_gain"]
    result["end"] |= {"best_d": bins[best]["d"], "gold_lost_since_best": gold[best] - gold[-1]}


# ---------------------------------------------------------------------------------------------------- printing and plot
def fixed(value: float | None) -> str:
    """A number of the table; "open" where there is none.

    >>> fixed(1.23456), fixed(None)
    ('1.235', 'open')
    """
    return "open" if value is None else f"{value:.3f}"


def print_result(result: dict[str, Any]) -> None:
    """Table of the bins, the fits, what was lost."""
    rl = result["kind"] == "rl"
    print(f"{'sqrt(KL)':>15} {'n':>5} {'proxy':>26} {'gold':>26}")
    for row in result["bins"]:
        left = f"{row['d_low']:.2f}-{row['d_high']:.2f}" if rl else f"{row['d']:.3f} (n {row['best_of']})"
        cells = [f"{fixed(x['mean'])} [{fixed(x['ci_low'])}, {fixed(x['ci_high'])}]"
                 for x in (row["proxy"], row["gold"])]  # fmt: skip
        print(f"{left:>15} {row['gold']['n']:5} {cells[0]:>26} {cells[1]:>26}")
    form = "d (alpha - beta ln d)" if rl else "d (alpha - beta d)"
    for name in ("proxy", "gold"):
        fit = result[name]
        text = ", ".join(f"{key} {fixed(fit[key]['value'])} [{fixed(fit[key]['ci_low'])}, {fixed(fit[key]['ci_high'])}]"
                         for key in ("alpha", "beta"))  # fmt: skip
        print(f"{name:5} R = {form}: {text}")
        top = fit["peak"]
        if top["within_data"]:
            text = (f"peak at d = {fixed(top['d'])} [{fixed(top['ci_low'])}, {fixed(top['ci_high'])}], "
                    f"KL {fixed(top['kl'])}, where R = {fixed(top['gain'])}")  # fmt: skip
        else:
            where = "the curve has none" if top["d"] is None else f"the curve's, extrapolated: d = {fixed(top['d'])}"
            text = f"no peak seen within the data (d up to {fixed(result['largest_d'])}); {where}"
        print(f"      {text}; {fit['refits_within_data']} of {fit['refits']} refits have one there")
    end = result["end"]
    print(f"at the end: proxy gained {fixed(end['proxy_gain'])}, gold {fixed(end['gold_gain'])} "
          f"(gap {fixed(end['gap'])}); gold lost {fixed(end['gold_lost_since_best'])} since its best, "
          f"at d = {fixed(end['best_d'])}")  # fmt: skip
    units = ("n_runs", "n_steps", "steps_with_kl_below_0") if rl else ("n_prompts", "n_responses")
    counts = ", ".join(f"{name.replace('_', ' ')} {result[name]}" for name in units)
    print(f"{counts}; intervals: {result['intervals']}")
    print("lost: " + (", ".join(f"{n} {reason}" for reason, n in result["lost"].items()) or "none"))


def plot_result(path: Path, result: dict[str, Any]) -> None:
    """Proxy and gold against sqrt(KL): bins with intervals, fitted curves, the peak of gold."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path}: not drawn, matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rl, d = result["kind"] == "rl", np.linspace(0, result["largest_d"], 200)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharex=True)
    for axis, name, colour in zip(axes, ("proxy", "gold"), ("tab:orange", "tab:blue"), strict=True):
        for row in result["bins"]:
            value = row[name]
            axis.plot(row["d"], value["mean"], "o", color=colour)
            if value["ci_low"] is not None:
                axis.plot([row["d"]] * 2, [value["ci_low"], value["ci_high"]], color=colour)
        fit = result[name]
        start = fit["start"]["value"] if rl else result["bins"][0][name]["mean"]
        gain = gain_rl if rl else gain_best_of_n
        axis.plot(d, start + gain(d, fit["alpha"]["value"], fit["beta"]["value"]), color=colour, alpha=0.6)
        if fit["peak"]["within_data"]:
            axis.axvline(fit["peak"]["d"], color="grey", linestyle=":")
        axis.set(title=name, xlabel="sqrt(KL), KL in nats")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    write_file(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    pyplot.close(figure)


def main(args: Args, files: list[str]) -> dict[str, Any]:
    """Proxy and gold score against sqrt(KL), Gao's curves and their peak, from RL runs or best-of-n samples."""
    if args.samples and files:
        raise UserError(f"run folders ({', '.join(files)}) and --samples: give one of them")
    if args.bootstrap < 20 or args.bins < 2 or (args.max_n is not None and args.max_n < 4):
        raise UserError("--bootstrap must be at least 20, --bins 2, --max_n 4")
    if args.gold_fn and not args.samples:
        raise UserError("--gold_fn belongs to --samples; runs log gold themselves (ppo.py --gold_fn)")
    folders = files or [str(RUN)]
    folder = Path(args.samples).parent if args.samples else Path(folders[0])
    output = Path(args.output) if args.output else folder / "overoptimization.json"

    # 1. Points, 2. curves with intervals
    lost: Counter = Counter()
    if args.samples:
        result = from_samples(read_samples(args.samples, args.gold_fn, lost), lost, args)
    else:
        result = from_runs([read_run(folder, lost) for folder in folders], args)
    add_gap(result)
    result |= {"files": [args.samples] if args.samples else folders, "lost": dict(lost)}
    result |= {"bootstrap": args.bootstrap, "seed": args.seed}

    # 3. Table, result, plot
    print_result(result)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    plot_result(output.with_suffix(".png"), result)
    print(f"overoptimization: wrote {output}")
    return result


if __name__ == "__main__":
    run_tool(main, Args, "run folders; default: runs/ppo of the repository")
