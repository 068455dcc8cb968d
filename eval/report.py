# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers==5.23.0", "matplotlib==3.11.2", "numpy==2.4.6", "scipy==1.17.1"]
# ///
"""One page of everything that was measured: training runs and results of the tools of eval/, as self-contained HTML.

    python eval/report.py                            # every folder and .json of runs/, written to runs/report.html
    python eval/report.py runs/ppo runs/judge --output page.html --responses ppo.jsonl sft.jsonl

Reads folders, and single files, by what they hold:

- report.json (gates, versions), metrics.jsonl (one row per step), timing.jsonl, args.json of the five scripts
- any other .json: the result of a tool. A number with ci_low and ci_high is shown with its interval; known keys get a
  name and what they can't tell; all the rest is listed as it is, so that nothing is lost
- .jsonl rows, told apart by their keys: judgments (preference or rating), scored pairs (chosen, rejected), responses
  (prompt, response). Held-out responses of two models to the same prompts give means before and after, and the mean of
  the paired differences d_i = after_i - before_i, each with the interval of the central limit theorem over prompts
  (Miller 2024, arXiv:2411.00640)
- .png of the tools, as they are

Judgments are joined with responses by model, id and turn, where prompt and length agree as well: of all folders given,
of --responses, and of tiny/. Sample pairs are taken at equal distances from the file, not by how they came out.

In curves the thin line is each step; a blue bar is the 95 % interval of the mean of a block of consecutive steps as if
they were independent, which they are not quite; the orange marks of score and gold are the held-out prompts.

A line or a file that can't be read is left out, printed and listed on the page. The page asks nothing of the network
(its content security policy forbids it), has no script, and is a function of its input: no time, no host.
"""

import base64
import html
import io
import json
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if not __package__:  # run as a file or imported by its bare name: it belongs to the package eval all the same
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "eval"

from .common import TINY, arg, mean_interval, run_tool, UserError, write_file

STAGES = ("sft", "reward", "ppo", "dpo", "grpo")
NO_RESULTS = {
    f"{name}.json" for name in ("args", "report", "tokenizer", "tokenizer_config", "adapter_config", "config")
}
VALUE_KEYS = ("value", "mean", "estimate", "elo", "win_rate", "accuracy", "difference", "logit", "d")  # of an interval
GENERAL = ("value", "mean", "estimate", "d", "interval")  # say nothing of what the number is
ROW_NAMES = ("model", "subset", "name", "rater", "raters", "category")  # what a row of a list is called by
MAPS = ("ratings", "subsets", "by_category", "by_order")  # dicts that are lists with names
SHARES = ("win_rate", "discrete_win_rate", "length_controlled_win_rate", "accuracy", "strict_accuracy", "within_prompt",
          "clustered", "agreement", "agreement_without_ties", "soft_agreement", "held-out accuracy")  # fmt: skip
HEADLINES = ("win_rate", "length_controlled_win_rate", "accuracy", "longer", "agreement", "held-out accuracy")
TEXTS = ("response", "chosen", "rejected")  # columns of rows and what is expected in them
NUMBERS = ("step", "score", "gold", "tokens", "preference", "rating", "chosen_score", "rejected_score")
MOST_LEAVES, MOST_ROWS, MOST_POINTS, MOST_TEXT = 400, 24, 300, 1200  # of a plain table, a plot, a curve, a response
MOST_PNG, DEEPEST = 300_000, 20  # bytes of a picture; levels of a result
BLUE, ORANGE, INK = "#3f8ae0", "#e0762f", "#010203"  # the last stands for the page's own text colour, light or dark
# What a number can't tell, by its key in a result, else by its file
ONE_JUDGE = (
    "whether people agree: one judge's taste, these prompts, one opponent; another judge or training seed moves it"
)
SLOT = "how another judge, or the same one with another prompt, would be drawn to a slot"
RIGHT = "who is right: two judges with the same bias agree well"
LIKELY = "what a model can do; with different tokenizers compare bits per byte only"
NOTES = {
    "win_rate": ONE_JUDGE,
    "discrete_win_rate": "how sure the judge was: verdicts are rounded to win, tie or loss",
    "length_controlled_win_rate": "what shorter answers would really get: a model fills that in; style stays",
    "swap_consistency": "whether the verdict is right: a judge can be steadily wrong",
    "both_first": SLOT, "both_second": SLOT, "position_effect": SLOT, "position_logit": SLOT, "order_effect": SLOT,
    "difference": "its cause; paired by question, the spread over training seeds is not in it",
    "ratings": "what a point is worth to people or to another judge, whose scale differs",
    "accuracy": "how it judges a trained policy's texts, unlike these pairs; people disagree too: 1 is not the ceiling",
    "held-out accuracy": "how it judges a trained policy's texts: these pairs are of the kind it was trained on",
    "strict_accuracy": "more than accuracy does: the same pairs, ties counted as wrong",
    "clustered": "how it does on other prompts; it says only that pairs of one prompt go together",
    "within_prompt": "how it does on other kinds of prompts",
    "longer": "why people chose so: the longer text may also be the better one",
    "ece": "the direction of the error; it grows with fewer pairs per bin",
    "brier": "whether ranking or calibration is at fault: it mixes both",
    "slope": "whether it holds for the scores of a trained policy, which run higher",
    "elo": "anything absolute: relative to this file's models; length, style and the judge's taste are in it",
    "agreement": RIGHT, "agreement_without_ties": RIGHT, "soft_agreement": RIGHT,
    "kappa": RIGHT + "; it falls where one verdict is rare",
    "nats_per_token": LIKELY, "bits_per_byte": "what a model can do: likelihood of one kind of text is no skill",
    "perplexity": LIKELY,
    "task": "other tasks, other prompts, other sampling settings",
    "score": "worth: it is what was optimised, and rises when it is exploited too",
    "proxy": "worth: it is what was optimised, and rises when it is exploited too",
    "gold": "what you want: it is one more measure, only one that was not trained on",
    "peak": "where another run would peak; beyond the range seen it is an extrapolation",
    "spearman": "cause: better answers may need more words",
    "tokens": "quality: only that the policy talks more, or less",
    "error_rate": "whether the games without a verdict are like the others",
}  # fmt: skip
FILE_NOTES = {
    "win_rate": ONE_JUDGE, "win_rate_difference": ONE_JUDGE, "judgments": ONE_JUDGE, "agreement": RIGHT,
    "length_bias": "cause: longer answers may be better ones; an association on these prompts",
    "rm_accuracy": NOTES["accuracy"], "ranking": NOTES["elo"], "overoptimization": NOTES["gold"],
    "alignment_tax": "other skills than the texts and tasks measured",
    "reward": "quality: mean and sd only set the zero and the unit of the scores",
}  # fmt: skip
CURVES = {  # the keys of metrics.jsonl that are drawn first, in this order
    "score": "a batch of training prompts; what is optimised, not what is wanted",
    "gold": "a batch of training prompts; a measure that was not trained on, perhaps not what you want either",
    "kl": "an estimate from one batch, in nats: noisy, can fall below 0; how far, not where to",
    "ref_kl": "an estimate from one batch, in nats: noisy; how far, not where to",
    "reward": "score minus KL penalty: its level depends on the coefficient",
    "loss": "of training batches; lower is no better answer",
    "accuracy": "on the batch that is trained on, not on held-out pairs",
    "margin": "in units of the scores; grows by confidence alone",
    "entropy": "variety of tokens, not of meaning",
    "response_length": "in tokens; nothing of quality",
    "eos_rate": "share that ended by itself; an ended answer may be empty talk",
}
GATES = {
    "kl_step0": "the start is the reference; nothing of what follows",
    "ratio_step0": "two passes agree at the start; nothing of later steps",
    "logratio_step0": "policy and reference agree at the start; nothing of later steps",
    "sampler_agreement": "sampler and training pass agree at the start; nothing of later steps",
    "eos_rate": "responses end; not that they are any good",
    "gold_low": "lower end of the paired gain in gold; without the spread over seeds",
    "score_low": "lower end of the paired gain in score; a policy that exploits its reward passes too",
    "accuracy_low": "lower end of held-out accuracy; above chance is not yet good",
    "beats_length": "accuracy minus that of the better rule of length; without an interval",
    "heldout_loss_drop": "held-out loss fell; not that answers are better",
}
CSS = """
:root{color-scheme:light dark;--ink:#1d2127;--paper:#fff;--soft:#f3f4f6;--line:#d5d9df;--dim:#5d6673;--good:#1a7f45;
--bad:#b3261e;--link:#1f5fbf}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7eb;--paper:#15181c;--soft:#1f242a;--line:#3a424c;--dim:#9aa5b1;
--good:#58c98a;--bad:#ff8a80;--link:#82b1ff}}
*{box-sizing:border-box}body{margin:0 auto;padding:1rem;max-width:76rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}a{color:var(--link)}h1{font-size:1.6rem;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.5rem 0 .5rem;border-top:1px solid var(--line);padding-top:1.2rem}
h3{font-size:1rem;margin:1.4rem 0 .4rem}p{margin:.4rem 0}.dim,figcaption{color:var(--dim);font-size:.85rem}
.good{color:var(--good)}.bad{color:var(--bad);font-weight:600}nav a{margin-right:1rem;display:inline-block}
.scroll{overflow-x:auto;margin:.4rem 0}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.25rem .7rem .25rem 0;
border-bottom:1px solid var(--line);overflow-wrap:normal}th{color:var(--dim);font-weight:600}
td.n{text-align:right;white-space:nowrap}td.w{min-width:16rem}td:first-child{min-width:7rem}
.plots{display:flex;flex-wrap:wrap;gap:1rem 1.5rem}figure{margin:0;width:22rem;max-width:100%}
figure.wide{width:40rem}svg,img{width:100%;height:auto;display:block}svg text{font-family:inherit!important}
img{background:#fff}details{margin:.5rem 0}summary{cursor:pointer;color:var(--link)}
.card{background:var(--soft);border-radius:.5rem;padding:.7rem 1rem;margin:.7rem 0}.pair{display:grid;gap:.6rem 1.2rem;
grid-template-columns:repeat(auto-fit,minmax(min(17rem,100%),1fr))}.text{white-space:pre-wrap;margin:.1rem 0}
.problems{border:1px solid var(--bad);border-radius:.5rem;padding:.5rem 1rem}
"""


# ------------------------------------------------------------------------------------------------------------ arguments


@dataclass
class Args:
    output: str = arg("runs/report.html", "the page")
    responses: list[str] | None = arg(None, "further files of responses, for the texts of judged pairs")
    samples: int = arg(8, "sample pairs shown per file")


# -------------------------------------------------------------------------------------------------------------- reading
Problems = list[tuple[str, str]]  # (file and line, what is wrong there)


@dataclass
class Folder:
    """What a folder holds, by file name; what could not be read is in the list of problems."""

    path: Path
    results: dict[str, dict] = field(default_factory=dict)
    rows: dict[str, list[dict]] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def read_object(path: Path, problems: Problems) -> dict:
    """The object in a .json file; {} and a problem where there is none."""
    try:
        value = json.loads(path.read_bytes(), parse_constant=lambda name: None)  # NaN is a missing value
    except (ValueError, RecursionError) as error:
        where = f"{path}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        problems.append((where, f"not JSON, or half a file ({error}); left out"))
        return {}
    if not isinstance(value, dict) or not value:
        problems.append((f"{path}, line 1", f"expected a JSON object with keys, found {str(value)[:60]!r}; left out"))
        return {}
    return value


def fault(row: Any) -> str:
    """What is wrong with a row of a .jsonl file, "" where nothing is.

    >>> fault({"preference": 1.2}), fault({"response": "yes", "score": None})
    ('preference is 1.2, expected a number from 0 to 1', '')
    """
    if not isinstance(row, dict):
        return f"expected a JSON object, found {str(row)[:60]!r}"
    for name in row:
        if name in TEXTS and not isinstance(row[name], str):
            return f"{name} is {str(row[name])[:60]!r}, expected a text"
        infinite = isinstance(row[name], float) and not is_number(row[name])
        if infinite or (name in NUMBERS and row[name] is not None and not is_number(row[name])):
            return f"{name} is {str(row[name])[:60]!r}, expected a finite number or null"
    if row.get("preference") is not None and not 0 <= row["preference"] <= 1:
        return f"preference is {row['preference']}, expected a number from 0 to 1"
    return ""


def read_lines(path: Path, problems: Problems) -> list[dict]:
    """The good rows of a .jsonl file; every other line is a problem with its number."""
    rows, before = [], len(problems)
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            wrong = fault(row)
        except (ValueError, RecursionError):
            row, wrong = None, f"not JSON, or half a line ({line[:60].decode(errors='replace')!r})"
        rows += [] if wrong else [row]
        problems += [(f"{path}, line {number}", f"{wrong}; left out")] if wrong else []
    if not rows and len(problems) == before:
        problems.append((str(path), "no rows"))
    return rows


def read_folder(path: Path, files: list[Path], problems: Problems) -> Folder:
    """Everything in `files` of one folder; its subfolders are not searched."""
    folder, before = Folder(path), len(problems)
    for file in files:
        data = file.read_bytes() if file.suffix == ".png" and file.is_file() else b""
        if file.suffix == ".jsonl" and (rows := read_lines(file, problems)):
            folder.rows[file.name] = rows
        elif file.suffix == ".json" and file.name != "tokenizer.json" and (value := read_object(file, problems)):
            folder.results[file.name] = value
        elif data.startswith(b"\x89PNG\r\n") and len(data) <= MOST_PNG and file.name != "curves.png":  # drawn anew
            folder.pictures[file.name] = data
        elif file.suffix != ".html":  # an earlier page
            folder.others.append(file.name + "/" * file.is_dir())
    if not (folder.results or folder.rows or folder.pictures or len(problems) > before):
        problems.append((str(path), "nothing to show: no .json, .jsonl or .png in it; subfolders are not searched"))
    return folder


def find_folders(files: list[str], problems: Problems) -> list[Folder]:
    """The folders given, and single files by their folder; training stages first, in their order."""
    given: dict[Path, list[Path]] = {}
    for path in map(Path, dict.fromkeys(files)):
        if path.is_dir():
            given[path] = sorted(path.iterdir())
        elif path.is_file():
            given[path.parent] = sorted({*given.get(path.parent, []), path})
        else:
            problems.append((str(path), "no such file or folder"))
    folders = [read_folder(path, inside, problems) for path, inside in given.items()]
    return sorted(folders, key=lambda folder: STAGES.index(stage_of(folder)) if stage_of(folder) else len(STAGES))


def stage_of(folder: Folder) -> str:
    """The training stage of a run folder, "" for results of tools."""
    named = [folder.results.get(name, {}).get("stage") for name in ("result.json", "report.json")]
    return next((stage for stage in named if stage in STAGES), "")


# ------------------------------------------------------------------------------------------------------------ the maths
def is_number(value: Any) -> bool:
    """Whether it is a finite number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


class Label(str):
    """A step of a path that names a row of a list, not a key."""


class Estimate(NamedTuple):
    """A number with its interval, as a tool wrote it; None is an open end, or no value."""

    path: tuple[str, ...]  # keys and labels down to the object that holds it
    name: str  # key of the number in that object
    value: float | None
    low: float | None
    high: float | None
    n: float | None
    error: float | None

    @property
    def key(self) -> str:
        """What the number is: a known last step of its path, its own key, or the nearest known key above it."""
        known = [step for step in self.path[::-1] if step in NOTES and step != "difference"]
        known = [step for step in known if not isinstance(step, Label)]
        own = [self.name] if self.name not in GENERAL and known[:1] != list(self.path[-1:]) else []
        return [*own, *known, *self.path[-1:], self.name][0]

    @property
    def is_share(self) -> bool:
        """Whether it lies in [0, 1], or in percent in [0, 100]."""
        return self.key in SHARES or self.name in SHARES

    @property
    def label(self) -> str:
        """Path and name in words."""
        steps = [*self.path, *([] if self.name in GENERAL else [self.name])]
        return " · ".join(step if isinstance(step, Label) else wording(step) for step in steps)


def wording(key: str) -> str:
    """A key in words."""
    return key.replace("_", " ")


def row_label(row: dict, index: int) -> Label:
    """What a row of a list is called.

    >>> row_label({"low": -3.0, "high": 8, "n": 4}, 0), row_label({"raters": ["a", "b"]}, 1), row_label({"x": 1}, 2)
    ('-3 to 8', 'a / b', '3')
    """
    for name in ROW_NAMES:
        if isinstance(row.get(name), str):
            return Label(row[name])
        if isinstance(row.get(name), list):
            return Label(" / ".join(map(str, row[name])))
    for low, high in (("low", "high"), ("d_low", "d_high")):
        if is_number(row.get(low)) and is_number(row.get(high)):
            return Label(f"{row[low]:.3g} to {row[high]:.3g}")
    return Label(f"best of {row['best_of']}" if "best_of" in row else str(index + 1))


def find_numbers(tree: Any, path: tuple[str, ...] = ()) -> tuple[list[Estimate], list[tuple[tuple[str, ...], Any]]]:
    """(numbers with an interval, every other (path, value)) of a result, in its order.

    An interval is a pair of keys <prefix>ci_low, <prefix>ci_high; its number is <prefix> itself (slope), or for lc_
    length_controlled_win_rate, or without a prefix the first of VALUE_KEYS.

    >>> found, rest = find_numbers({"accuracy": 0.7, "ci_low": 0.6, "ci_high": 0.8, "n": 9, "sets": {"a": {"ties": 1}}})
    >>> found[0].name, found[0].value, found[0].low, found[0].n, rest
    ('accuracy', 0.7, 0.6, 9, [(('sets', 'a', 'ties'), 1)])
    """
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        labels = [row_label(item, i) if isinstance(item, dict) else Label(i + 1) for i, item in enumerate(tree)]
        if len(set(labels)) < len(labels):
            labels = [Label(f"{i}: {label}") for i, label in enumerate(labels, 1)]
        tree = dict(zip(labels, tree, strict=True))
    if not isinstance(tree, dict) or len(path) > DEEPEST:
        return [], [(path, tree if len(path) <= DEEPEST else "(nested too deep to show)")]
    found: list[Estimate] = []
    rest: list[tuple[tuple[str, ...], Any]] = []
    used: set[str] = set()
    for key in tree:
        prefix = key[:-6]
        if not key.endswith("ci_low") or f"{prefix}ci_high" not in tree:
            continue
        names = (prefix.rstrip("_"), "length_controlled_win_rate") if prefix else VALUE_KEYS
        name = next((name for name in names if name in tree and not isinstance(tree[name], dict | list)), "interval")
        size = "n" if "n" in tree else "clusters"
        keys = (name, key, f"{prefix}ci_high", size, f"{prefix}standard_error")
        value, low, high, n, error = (tree[k] if is_number(tree.get(k)) else None for k in keys)
        if (value, low, high) != (None, None, None):
            found.append(Estimate(path, name, value, low, high, n, error))
            used |= {k for k in keys if is_number(tree.get(k)) or tree.get(k) is None} - ({size} if prefix else set())
    for key, value in tree.items():
        if key not in used:
            inside = Label(key) if path and path[-1] in MAPS else key
            deeper, others = find_numbers(value, (*path, inside))
            found, rest = found + deeper, rest + others
    return found, rest


def held_out(rows: list[dict]) -> dict[str, Any]:
    """Means of held-out responses with intervals: of each model and of the paired differences; or of scored pairs.

    rows: of samples.jsonl. The first model in the file is "before", the second "after"; {} where there is nothing.
    Rows from during the run, whose model has a space in its name ("rollout 10"), are left out.
    Several rows of an id are averaged first, and so are several pairs of a prompt.

    >>> rows = [{"id": i, "model": m, "score": i + (m == "ppo")} for m in ("sft", "ppo") for i in (1, 2, 3)]
    >>> found = held_out(rows)["score"]
    >>> found["before"]["mean"], found["difference"]["mean"], found["difference"]["n"]
    (2.0, 1.0, 3)
    """
    if all(is_number(row.get(name)) for row in rows for name in ("chosen_score", "rejected_score")):
        signs = [(row.get("prompt"), np.sign(row["chosen_score"] - row["rejected_score"]) / 2 + 0.5) for row in rows]
        won = means_by_key(signs)
        return {"held-out accuracy": mean_interval(np.array(list(won.values())))} if len(won) > 1 else {}
    named = [row["model"] for row in rows if isinstance(row.get("model"), str)]
    models = list(dict.fromkeys(name for name in named if " " not in name))
    result: dict[str, Any] = {}
    for name in ("score", "gold", "tokens") if len(models) == 2 else ():
        before, after = (means_by_key([(row.get("id"), row[name]) for row in rows if row.get("model") == model and
                                       is_number(row.get(name))]) for model in models)  # fmt: skip
        if len(both := [key for key in before if key in after]) > 1:
            a, b = (np.array([side[key] for key in both]) for side in (before, after))
            result[name] = {"before": mean_interval(a), "after": mean_interval(b), "difference": mean_interval(b - a)}
    return result


def means_by_key(values: list[tuple[Any, float]]) -> dict[str, float]:
    """Mean of the values of each key, in the order of the keys.

    >>> means_by_key([("a", 1), ("b", 5), ("a", 2)])
    {'"a"': 1.5, '"b"': 5.0}
    """
    lists: dict[str, list[float]] = {}
    for key, value in values:
        lists.setdefault(json.dumps(key), []).append(value)
    return {key: float(np.mean(found)) for key, found in lists.items()}


def blocks(values: np.ndarray) -> tuple[int, list[dict[str, float]]]:
    """(steps per block, mean_interval of each block of consecutive values): at most 20 blocks of at least 5.

    >>> size, found = blocks(np.arange(12.0))
    >>> size, [block["mean"] for block in found]
    (5, [2.5, 8.5])
    """
    size = max(5, -(-len(values) // 20))
    parts = np.array_split(values, max(1, len(values) // size))
    return size, [mean_interval(part) for part in parts]


# ---------------------------------------------------------------------------------------------------------------- plots
def plot(title: str, height: float, draw: Callable[[Any], None], note: str = "", salt: str = "") -> str:
    """A <figure> of inline SVG in the page's own ink: `draw(axis)` draws it; `salt` keeps ids of figures apart."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": plain(salt + title), "font.size": 9, "axes.grid": True,
                     "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    stream = io.StringIO()
    with rc_context(settings | dict.fromkeys(inks, INK)), warnings.catch_warnings(action="ignore"):  # of rare glyphs
        figure = Figure((4.4, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(stream, format="svg", transparent=True)
    text = re.sub(r"<metadata>.*?</metadata>|^.*?(?=<svg)|\n *", "", stream.getvalue(), flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace(INK, "currentColor")
    text = re.sub(r' (d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)  # 0.01 of 1/72 inch
    box = re.search(r'viewBox="[^"]*"', text)
    text = f'<svg {box and box[0]} role="img" aria-label="{escape(title)}">{text[text.index(">") + 1 :]}'
    caption = f"<b>{escape(title)}</b>" + (f": {escape(note)}" if note else "")
    return f"<figure>{text}<figcaption>{caption}</figcaption></figure>"


def forest(title: str, rows: list[tuple[str, Estimate]], share: bool, salt: str = "") -> str:
    """Forest plot of (label, estimate): a dot with its 95 % interval per row, an arrow where an end is open."""
    drawn, left_out = rows[:MOST_ROWS], len(rows) - MOST_ROWS
    ends = [end for _, e in drawn for end in (e.value, e.low, e.high) if end is not None]
    low, high = (0.0, 100.0) if share else (min(ends), max(ends))
    margin = 0 if share else (high - low or abs(high) or 1) * 0.06
    low, high = low - margin, high + margin

    def draw(axis: Any) -> None:
        axis.set(xlim=(low, high), ylim=(len(drawn) - 0.35, -0.75), yticks=[])
        axis.grid(axis="y", visible=False)
        if low < (middle := 50 if share else 0) < high:
            axis.axvline(middle, color=INK, linewidth=0.8, linestyle=":")
        for y, (label, e) in enumerate(drawn):
            if (e.low, e.high) != (None, None):
                a, b = low if e.low is None else e.low, high if e.high is None else e.high
                axis.plot([a, b], [y, y], color=BLUE, linewidth=2, solid_capstyle="butt")
                for edge, end, marker in ((low, e.low, "<"), (high, e.high, ">")):
                    if end is None:
                        axis.plot([edge], [y], marker, color=BLUE, clip_on=False)
            if e.value is not None:
                axis.plot([e.value], [y], "o", color=ORANGE, markersize=5)
            where: Any = {
                "transform": axis.get_yaxis_transform(),
                "parse_math": False,
                "fontsize": 8,
                "in_layout": False,
            }
            axis.text(0, y - 0.3, shorten(plain(label), 44), **where)
            axis.text(1, y - 0.3, f"{shown(e.value, 3)} [{end_text(e, 3)}]", ha="right", **where)

    note = f"the first {MOST_ROWS}; {left_out} more are in the tables" if left_out > 0 else ""
    return plot(title, 0.5 + 0.36 * len(drawn), draw, note, salt)


def curve(name: str, rows: list[dict], held: dict[str, Any], salt: str) -> str:
    """One key of metrics.jsonl against the step; held-out means before and after where there are such."""
    points = np.array([(row["step"], row[name]) for row in rows if is_number(row.get(name))], float)
    every = -(-len(points) // MOST_POINTS)
    steps, values = points[::every].T
    size, means = blocks(points[:, 1])

    def draw(axis: Any) -> None:
        axis.plot(steps, values, color=BLUE, linewidth=1, alpha=0.6, marker="." if len(steps) < 2 else "")
        if len(means) > 1:
            centres = [part.mean() for part in np.array_split(points[:, 0], len(means))]
            middle, low, high = (np.array([block[end] for block in means]) for end in ("mean", "ci_low", "ci_high"))
            bars: Any = {"fmt": "o", "color": BLUE, "markersize": 3}
            axis.errorbar(centres, middle, [middle - low, high - middle], **bars)
        for x, side in ((steps[0], "before"), (steps[-1], "after")) if held else ():
            mean, low, high = (held[side][key] for key in ("mean", "ci_low", "ci_high"))
            axis.errorbar([x], [mean], [[mean - low], [high - mean]], fmt="o", color=ORANGE, capsize=3, markersize=4)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)

    said = [CURVES.get(name, ""), f"blue bars: means of {size} steps or more" if len(means) > 1 else "",
            f"every {every}th of {len(points)} steps drawn" if every > 1 else "",
            "orange: held-out prompts before and after" if held else ""]  # fmt: skip
    return plot(name, 2.3, draw, "; ".join(filter(None, said)), salt)


# -------------------------------------------------------------------------------------------------------------- pieces
def escape(value: Any) -> str:
    """Text from data as HTML text: never markup."""
    return html.escape(str(value), quote=True)


def plain(text: str) -> str:
    """The text in one line, without what a plot can't draw: control characters and halves of characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def shorten(text: str, most: int = MOST_TEXT) -> str:
    """The text, or its beginning; a long one says how much is left out."""
    if len(text) <= most:
        return text
    return f"{text[: most - 1]}…" + (f" ({len(text) - most + 1:,} more characters)" if most > 99 else "")


def shown(value: Any, digits: int = 4) -> str:
    """A value of a table.

    >>> shown(0.123456), shown(12345678), shown(None), shown([1, 2.5])
    ('0.1235', '12,345,678', '–', '1, 2.5')
    """
    if isinstance(value, list):
        return shorten(
            ", ".join(shown(item) for item in value[:50]) + f" … ({len(value) - 50:,} more)" * (len(value) > 50)
        )
    if value is None or isinstance(value, bool):
        return "–" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}g}" if isinstance(value, float) else shorten(str(value), 300)


def end_text(e: Estimate, digits: int = 4) -> str:
    """Its interval: "0.6 to 0.8", "0.6 to open", "no interval"."""
    if (e.low, e.high) == (None, None):
        return "no interval"
    return " to ".join("open" if end is None else shown(float(end), digits) for end in (e.low, e.high))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table that scrolls; cells are HTML, those that begin with <td as they are."""
    body = "".join(f"<tr>{''.join(c if c.startswith('<td') else f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
    return f"<div class=scroll><table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>{body}</table></div>"


def cell(value: Any) -> str:
    """A cell with a value; numbers stand at the right."""
    return f"<td class=n>{shown(value)}</td>" if is_number(value) or value is None else escape(shown(value))


def fold(title: str, inside: str) -> str:
    """A part of the page that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def plain_table(leaves: list[tuple[tuple[str, ...], Any]]) -> str:
    """(path, value) as they are."""
    rows = [[escape(" · ".join(path)), cell(value)] for path, value in leaves[:MOST_LEAVES]]
    more = f"<p class=dim>{len(leaves) - MOST_LEAVES:,} more in the file.</p>" if len(leaves) > MOST_LEAVES else ""
    return table(["key", "value"], rows) + more


def numbers_table(found: list[Estimate], fallback: str) -> str:
    """Estimates with their intervals and what they can't tell, said once for neighbours with the same note."""
    rows = []
    for note, group in groupby(found, lambda e: NOTES.get(e.key, fallback)):
        members = list(group)
        for i, e in enumerate(members):
            said = [f"<td class=w rowspan={len(members)}>{escape(note)}</td>"] if i == 0 else []
            value = None if e.value is None else float(e.value)
            interval = f"<td class=n>{end_text(e)}</td>"
            rows.append([escape(e.label), cell(value), interval, cell(e.n), cell(e.error), *said])
    return table(["number", "value", "95 % interval", "n", "SE", "what it can't tell"], rows) if rows else ""


def in_percent(e: Estimate, already: bool) -> Estimate:
    """The same estimate of a share times 100, unless its file is in percent already."""
    value, low, high = (None if x is None else x * (1 if already else 100) for x in (e.value, e.low, e.high))
    return e._replace(value=value, low=low, high=high)


def result_html(name: str, tree: dict[str, Any], salt: str) -> tuple[str, list[Estimate]]:
    """(HTML of one result, its estimates, shares among them in percent)."""
    found, rest = find_numbers(tree)
    known = [(path, v) for path, v in rest if len(path) == 1 and path[0] in NOTES and is_number(v)]
    percent = any(path[-1:] == ("discrete_win_rate",) for path, _ in rest)  # as eval/win_rate.py writes them
    panels: dict[tuple[str, ...], list[tuple[str, Estimate]]] = {}
    for e in found:
        steps = tuple(step for step in e.path if not isinstance(step, Label))
        place = ("shares, %",) if e.is_share else steps[: -1 if steps[-1:] in (("before",), ("after",)) else None]
        panels.setdefault(place, []).append((e.label, in_percent(e, percent) if e.is_share else e))
    plots = [forest(f"{name}: {' · '.join(at)}", rows, at == ("shares, %",), salt) for at, rows in panels.items()
             if len(rows) > 1]  # fmt: skip
    keys = list(dict.fromkeys(e.key for e in found))
    numbers = sorted(found, key=lambda e: keys.index(e.key))  # what has the same note stands together
    numbers += [Estimate(path, "value", value, None, None, None, None) for path, value in known]
    others = [leaf for leaf in rest if leaf not in known]
    text = "<p class=dim>Win-rates and their differences are in percent.</p>" if percent else ""
    text += numbers_table(numbers, FILE_NOTES.get(Path(name).stem, "no note for this key: see the tool that wrote it"))
    text += f"<div class=plots>{''.join(plots)}</div>"
    text += fold(f"all other values of {name} ({len(others)})", plain_table(others)) if others else ""
    return text, [in_percent(e, percent) if e.is_share else e for e in found]


# -------------------------------------------------------------------------------------------------------------- samples
Pool = dict[tuple[str, str, str], list[dict]]  # responses by model, id and turn


def card(prompt: Any, texts: list[tuple[str, str]], verdict: str = "") -> str:
    """A prompt with its responses side by side, each under its heading, and a verdict."""
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        prompt = "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in prompt)
    cells = "".join(
        f"<div><b>{escape(head)}</b><p class=text>{escape(shorten(text))}</p></div>" for head, text in texts
    )
    said = f"<p><b>{escape(verdict)}</b></p>" if verdict else ""
    asked = f"<p class='text dim'>{escape(shorten(str(prompt)))}</p>"
    return f"<div class=card>{asked}<div class=pair>{cells}</div>{said}</div>"


def spaced(items: list, most: int) -> list:
    """At most so many of them, at equal distances.

    >>> spaced([0, 1, 2, 3, 4, 5], 3)
    [0, 2, 4]
    """
    return [items[i * len(items) // min(most, len(items))] for i in range(min(most, len(items)))]


def heading(row: dict, name: str) -> str:
    """Model or role of a response with its score and gold."""
    marks = [f"{key.removeprefix(name + '_')} {shown(float(row[key]))}" for key in ("score", "gold", f"{name}_score")
             if is_number(row.get(key))]  # fmt: skip
    return " · ".join([name, *marks])


def samples_html(rows: list[dict], most: int) -> tuple[list[str], int]:
    """(cards of chosen and rejected, or of all responses to a prompt; how many prompts or pairs there are)."""
    groups: dict[str, list[tuple[dict, str, str]]] = {}  # (row, heading, text)
    for i, row in enumerate(rows):
        names = [name for name in ("chosen", "rejected") if name in row] or ["response"]
        key = json.dumps(row["id"]) if "id" in row and names == ["response"] else f"row {i}"
        for name in names:
            head = heading(row, str(row.get("model", name)) if name == "response" else name)
            groups.setdefault(key, []).append((row, head, row.get(name, "(no text)")))
    picked = spaced(list(groups.values()), most)
    return [card(group[0][0].get("prompt", ""), [part[1:] for part in group[:4]]) for group in picked], len(groups)


def add_responses(pool: Pool, rows: list[dict]) -> None:
    """Put the rows that are responses into the pool."""
    for row in rows:
        if "response" in row and "id" in row:
            key = (str(row.get("model")), json.dumps(row["id"]), str(row.get("turn") or 1))
            pool.setdefault(key, []).append(row)


def response_of(pool: Pool, row: dict, side: str) -> str | None:
    """The text that was judged: same model, id, turn, length and (in the first turn) prompt; None if it isn't there."""
    model, turn = row.get("model" + side), str(row.get("turn") or 1)
    for found in pool.get((str(model), json.dumps(row.get("id")), turn), ()):
        same_prompt = turn != "1" or "prompt" not in row or found.get("prompt") == row["prompt"]
        if same_prompt and row.get("length" + side) in (None, len(found["response"])):
            return found["response"]
    return None


def verdict_of(group: list[dict]) -> str:
    """The verdict on one question in words, from its rows (the last of each order counts).

    >>> verdict_of([{"order": "ab", "preference": 1}, {"order": "ba", "preference": 0.5}])
    'A wins: 0.75 (ab 1, ba 0.5)'
    >>> verdict_of([{"order": "ab", "preference": None, "error": "refused"}])
    'no verdict (ab refused)'
    """
    key = "rating" if "rating" in group[0] else "preference"
    last = {str(row.get("order") or ""): row for row in group}
    values = [row[key] for row in last.values() if row.get(key) is not None]
    each = [f"{order} {shown(row.get(key)) if row.get(key) is not None else row.get('error') or 'no verdict'}".strip()
            for order, row in last.items()]  # fmt: skip
    if len(values) < len(last):
        return f"no verdict ({', '.join(each)})"
    mean = float(np.mean(values))
    winner = "rating" if key == "rating" else "A wins" if mean > 0.5 else "B wins" if mean < 0.5 else "tie"
    return f"{winner}: {shown(mean)} ({', '.join(each)})"


def judgments_html(rows: list[dict], pool: Pool, most: int) -> tuple[list[str], int]:
    """(cards of judged questions, how many there are): the answers, the verdict of each order, the judge's words."""
    questions: dict[str, list[dict]] = {}
    for row in rows:
        names = ("id", "turn", "model", "model_a", "model_b", "judge")
        questions.setdefault(json.dumps([row.get(name) for name in names]), []).append(row)
    cards, missing = [], 0
    for group in spaced(list(questions.values()), most):
        row, sides = group[0], ("",) if "rating" in group[0] else ("_a", "_b")
        texts = [response_of(pool, row, side) for side in sides]
        missing += None in texts
        pairs = [(f"{side[1:].upper()} {row.get('model' + side)}".strip(), "(text not found)" if text is None else text)
                 for side, text in zip(sides, texts, strict=True)]  # fmt: skip
        cards.append(card(row.get("prompt", ""), pairs, verdict_of(group)))
        replies = [
            f"{r.get('order') or ''}: {r['reply']}" for r in group if isinstance(r.get("reply"), str) and r["reply"]
        ]
        words = "".join(f"<p class=text>{escape(shorten(reply))}</p>" for reply in replies)
        cards += [fold("what the judge wrote", words)] if words else []
    note = f"<p class=bad>The texts of {missing} of these were not found: name the judged files with --responses.</p>"
    return cards + [note] * bool(missing), len(questions)


# ----------------------------------------------------------------------------------------------------------------- page
class Section(NamedTuple):
    """One folder's part of the page, and what the overview takes from it."""

    title: str
    body: str
    gates: list[bool]
    estimates: list[tuple[str, Estimate]]  # (label, estimate; shares in percent)


def gates_html(report: dict, where: str, problems: Problems) -> tuple[str, list[bool]]:
    """(table of the gates of a report.json, whether each passed)."""
    gates = report["gates"] if isinstance(report.get("gates"), list) else [None]
    good = [gate for gate in gates if isinstance(gate, dict) and isinstance(gate.get("passed"), bool)]
    if len(good) < len(gates):
        problems.append((where, "expected a list `gates` of objects with name, value, threshold and passed"))
    rows = []
    for gate in good:
        state = "<span class=good>passed</span>" if gate["passed"] else "<span class=bad>FAILED</span>"
        note = f"<td class=w>{escape(GATES.get(str(gate.get('name')), 'no note for this gate'))}</td>"
        rows.append([escape(gate.get("name")), cell(gate.get("value")), cell(gate.get("threshold")), state, note])
    passed = [gate["passed"] for gate in good]
    return table(["gate", "value", "threshold", "", "what it says, and no more"], rows), passed


def steps_html(rows: list[dict]) -> str:
    """First, last, mean, lowest and highest value of each key of metrics.jsonl or timing.jsonl."""
    lines = []
    for key in dict.fromkeys(key for row in rows for key in row if key != "step"):
        if values := [float(row[key]) for row in rows if is_number(row.get(key))]:
            numbers = (len(values), values[0], values[-1], float(np.mean(values)), min(values), max(values))
            lines.append([escape(key), *map(cell, numbers), f"<td class=w>{escape(CURVES.get(key, ''))}</td>"])
    return table(["key", "steps", "first", "last", "mean", "lowest", "highest", "what it is, and can't tell"], lines)


def metrics_html(rows: list[dict], held: dict[str, Any], where: str, problems: Problems) -> str:
    """Curves of the keys of a metrics.jsonl, the known ones first, and a table of all."""
    if odd := sorted({key for row in rows for key in row if row[key] is not None and not is_number(row[key])}):
        problems.append((where, f"values that are no numbers, not drawn: {', '.join(odd)}"))
    steps = [row["step"] for row in rows if is_number(row.get("step"))]
    if len(steps) < len(rows) or any(b <= a for a, b in pairwise(steps)):
        problems.append((where, "steps are missing, repeated or out of order: drawn as they are"))
    rows = [row for row in rows if is_number(row.get("step"))]
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "step" and is_number(row[key])))
    first = [key for key in CURVES if key in keys]
    known, rest = ("".join(curve(key, rows, held.get(key, {}), where) for key in part)
                   for part in (first, [key for key in keys if key not in CURVES]))  # fmt: skip
    more = fold(f"{len(keys) - len(first)} more curves", f"<div class=plots>{rest}</div>") if rest else ""
    return f"<div class=plots>{known}</div>{more}" + fold("first, last, mean, lowest, highest", steps_html(rows))


def section_of(folder: Folder, pool: Pool, most: int, problems: Problems) -> Section:
    """The part of the page on one folder."""
    where, stage = str(folder.path), stage_of(folder)
    parts: list[str] = []
    estimates: list[tuple[str, Estimate]] = []
    passed: list[bool] = []
    if report := folder.results.get("report.json"):
        text, passed = gates_html(report, f"{where}/report.json", problems)
        parts += ["<h3>Gates</h3>", text]
    rows = folder.rows.get("samples.jsonl")
    held = held_out(rows) if rows else {}
    if rows := folder.rows.get("metrics.jsonl"):
        parts += ["<h3>Training</h3>", metrics_html(rows, held, f"{where}/metrics.jsonl", problems)]
    results = {"held-out prompts": held} if held else {}
    results |= {name: tree for name, tree in folder.results.items() if name not in NO_RESULTS}
    for name, tree in results.items():
        text, found = result_html(name, tree, where)
        parts += [f"<h3>{escape(name)}</h3>", text]
        estimates += [(f"{folder.path.name}: {e.label}", e) for e in found]
    for name, data in folder.pictures.items():
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        parts.append(f"<figure class=wide><img alt='' src='{source}'><figcaption>{escape(name)}</figcaption></figure>")
    for name, rows in folder.rows.items():
        if name not in ("metrics.jsonl", "timing.jsonl"):
            judged = "preference" in rows[0] or "rating" in rows[0]
            cards, total = judgments_html(rows, pool, most) if judged else samples_html(rows, most)
            said = f"{min(most, total)} of {total:,}, at equal distances in the file."
            parts += [f"<h3>{escape(name)}</h3><p class=dim>{said}</p>", *cards]
    if arguments := folder.results.get("args.json"):
        parts.append(fold("arguments", plain_table(find_numbers(arguments)[1])))
    if rows := folder.rows.get("timing.jsonl"):
        parts.append(fold("time and memory on the machine that ran it", steps_html(rows)))
    parts += [f"<p class=dim>Not shown: {escape(', '.join(folder.others))}</p>"] if folder.others else []
    return Section(where + f" ({stage})" * bool(stage), "".join(parts), passed, estimates)


def overview_html(sections: list[Section], folders: list[Folder]) -> str:
    """Gates, versions and headline numbers of all folders."""
    rows, bases = [], {}
    panels: dict[str, list[tuple[str, Estimate]]] = {}
    for i, (section, folder) in enumerate(zip(sections, folders, strict=True)):
        failed, report = section.gates.count(False), folder.results.get("report.json", {})
        state = f"<span class=good>{len(section.gates)} passed</span>" if section.gates else "no gates"
        state = f"<span class=bad>{failed} of {len(section.gates)} failed</span>" if failed else state
        if report:
            bases[i] = (json.dumps(report.get("versions"), sort_keys=True), str(report.get("base")))
        versions = report.get("versions")
        said = " ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else ""
        link = f"<a href='#s{i}'>{escape(section.title)}</a>"
        rows.append(
            [
                link,
                state,
                cell(len(section.estimates)),
                escape(report.get("base", "")),
                f"<td class=w>{escape(said)}</td>",
            ]
        )
        for label, e in section.estimates:
            if e.key in HEADLINES and not (e.path[:1] and (e.path[0] in MAPS or e.path[0].startswith("by_"))):
                panels.setdefault("win-rates, accuracies, agreement, %", []).append((label, e))
            elif e.path in (("score", "difference"), ("gold", "difference")):
                panels.setdefault(f"{e.path[0]} on held-out prompts, after - before", []).append((label, e))
    text = table(["folder", "gates", "numbers with interval", "base model", "versions"], rows)
    if len(set(bases.values())) > 1:
        text += "<p class=bad>Runs differ in versions or base model: a difference between them may come from there.</p>"
    return text + f"<div class=plots>{''.join(forest(t, found, t.endswith('%')) for t, found in panels.items())}</div>"


def page_html(sections: list[Section], folders: list[Folder], problems: Problems) -> str:
    """The whole page."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    links = "".join(f"<a href='#s{i}'>{escape(section.title)}</a>" for i, section in enumerate(sections))
    listed = "".join(f"<li>{escape(where)}: {escape(what)}</li>" for where, what in problems)
    trouble = f"<div class=problems><b class=bad>Left out, or odd: {len(problems)}</b><ul>{listed}</ul></div>"
    parts = [f"<section id=s{i}><h2>{escape(part.title)}</h2>{part.body}</section>" for i, part in enumerate(sections)]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>Report: {len(sections)} folders</title>
<style>{CSS}</style></head><body><h1>Report</h1><nav>{links}</nav>
<p class=dim>Intervals are of 95 %, over the questions of their data. The spread over training seeds, judges and kinds
of prompts is not in them: for that, run again. Of many intervals one in twenty misses by chance.</p>
{trouble if problems else ""}<section><h2>Overview</h2>{overview_html(sections, folders)}</section>
{"".join(parts)}</body></html>
"""


# ----------------------------------------------------------------------------------------------------------------- main
def main(args: Args, files: list[str] | None = None) -> dict[str, Any]:
    """One HTML page of everything in run folders and results of the tools."""
    # 1. Read
    output = Path(args.output)
    problems: Problems = []
    given = files or [str(p) for p in sorted(Path("runs").glob("*")) if p.is_dir() or p.suffix in (".json", ".jsonl")]
    if not given:
        raise UserError("no files given, and nothing in runs/ here: name run folders, or .json results of the tools")
    folders = find_folders(given, problems)
    if not any(folder.results or folder.rows for folder in folders):
        raise UserError("; ".join(f"{where}: {what}" for where, what in problems))
    pool: Pool = {}
    for path in [*map(Path, args.responses or []), *sorted(TINY.glob("responses_*.jsonl"))]:
        if path.is_file():
            add_responses(pool, read_lines(path, problems))
        else:
            problems.append((str(path), "no such file"))
    for rows in (rows for folder in folders for rows in folder.rows.values()):
        add_responses(pool, rows)

    # 2. Put together
    sections = [section_of(folder, pool, args.samples, problems) for folder in folders]
    page = page_html(sections, folders, problems).encode("utf-8", "replace")

    # 3. Show and write
    for section in sections:
        gates = f"{section.gates.count(True)} of {len(section.gates)} gates passed" if section.gates else "no gates"
        print(f"{plain(section.title):40} {gates:22} {len(section.estimates):4} numbers with interval")
    for where, what in problems:
        print(plain(f"left out, or odd: {where}: {what}"))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, lambda temporary: temporary.write_bytes(page))
    print(f"report: wrote {output} ({len(page) / 1e6:.2f} MB)")
    return {"output": str(output), "folders": len(sections), "numbers": sum(len(part.estimates) for part in sections),
            "gates_failed": sum(part.gates.count(False) for part in sections), "problems": problems}  # fmt: skip


if __name__ == "__main__":
    run_tool(main, Args, "run folders, and .json or .jsonl files; default: everything in runs/")
