# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "bitsandbytes==0.50.2", "peft==0.21.2",
#     "accelerate==1.15.0", "evaluate==0.4.6", "numpy==2.4.6", "scipy==1.17.1", "statsmodels==0.15.0"]
# ///
"""What alignment costs: the same texts and tasks before and after training (Ouyang et al. 2022, section 4.2).

    python eval/alignment_tax.py                               # tiny/sft against runs/ppo, on tiny/sft_eval.jsonl
    python eval/alignment_tax.py --before runs/sft --after runs/ppo --text heldout.txt
    python eval/alignment_tax.py --before_responses sft.jsonl --after_responses ppo.jsonl \
        --reward_fn rewards/math.py:numeric                    # responses of eval/generate.py

Everything is paired: both models see the same documents or questions i, and the interval is that of the mean of
d_i = after_i - before_i (central limit theorem; Miller 2024, arXiv:2411.00640), which is narrower than that of two
independent means. A tax is a positive difference in nats and bits, a negative one in accuracy and metrics.

1. Perplexity of `--text`. A document is a paragraph of a .txt file (paragraphs end at an empty line), a row's `text`,
   or the last reply of `messages` or of `prompt` + `completion`, given what stands before it. All intervals are over
   documents, which differ in length: those of a ratio of sums (Cochran 1977, eq. 6.13).
     nats per token   all nats / all tokens; perplexity = exp of it
     bits per byte    all bits / all bytes of UTF-8: the one that models with different tokenizers share
   A text begins after the BOS token, after EOS where the tokenizer has none; what ends a reply in the chat template
   counts. Documents longer than --max_length are read in windows, each with at least max_length - stride tokens of
   context; every token is scored once.
2. A task: --reward_fn file.py:function scores the responses of both files (other columns go to it), or --score_column
   holds scores. Right or wrong (1 or 0): accuracy with Wilson's interval, and McNemar's exact test on the questions
   that changed. Several `sample`s of an id are averaged.
3. --reference_metric: a metric of `evaluate` (rouge, bleu, or the path of a script) against --reference_column. One
   that gives a value per row (rouge) is averaged as a task is; for others, which need not be a mean over rows, the
   interval is a paired bootstrap over questions (Koehn 2004).

Responses: .jsonl rows with `id`, joined by it (and `sample`); `prompt` and `response` where a measure needs them.
"""

import inspect
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

if not __package__:  # run as a file or imported by its bare name: it belongs to the package eval all the same
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "eval"

from .common import ROW_KEYS, TINY, arg, BadRow, find_model, load_function, load_weights, mean_interval, plain_values
from .common import read_jsonl, render, run_tool, to_messages, tokenize, UserError, without_nan, write_json


# ------------------------------------------------------------------------------------------------------- arguments


@dataclass
class Args:
    before: str | None = arg(None, "model before: hub id, local model or run folder; bare command: tiny/sft")
    after: str | None = arg(None, "model after; bare command: runs/ppo")
    text: str | None = arg(None, "held-out text, .txt or .jsonl; bare command: tiny/sft_eval.jsonl")
    max_length: int = arg(512, "window in tokens; longer documents are read in several")
    stride: int = arg(256, "tokens that each further window scores; the rest of it is context")
    batch_size: int = arg(4, "windows per forward pass: memory, not the result")
    before_responses: str | None = arg(None, ".jsonl of responses of the model before")
    after_responses: str | None = arg(None, ".jsonl of responses of the model after, to the same prompts")
    reward_fn: str | None = arg(None, "file.py:function that scores responses, as rewards/math.py:numeric")
    score_column: str | None = arg(None, "column of the responses that holds the score (1 or true: right)")
    reference_metric: list[str] | None = arg(None, "metrics of `evaluate`: names, or paths of metric scripts")
    reference_column: str = arg("reference", "column of the responses that holds the reference text(s)")
    resamples: int = arg(500, "bootstrap resamples for the intervals of --reference_metric")
    quant: Literal["auto", "nf4", "none"] = arg("auto", "4-bit base; auto: as --after's folder says, else nf4 on a GPU")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "auto: bfloat16 on a GPU or with nf4, else float32")
    revision: str | None = arg(None, "branch, tag or commit of a hub model")
    trust_remote_code: bool = arg(False, "run model code that comes with a hub model")
    chat_template: str | None = arg(None, "plain, text (no markup) or a Jinja file; default: the tokenizer's own")
    seed: int = arg(0, "decides the bootstrap")
    output: str | None = arg(None, "JSON file; default: alignment_tax.json in --after's folder, else by the responses")


# ------------------------------------------------------------------------------------------------------- the maths


def ratio_values(totals: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """One value per document, whose mean is R = sum(totals) / sum(sizes) and whose standard error is that of R.

    totals, sizes (n,) -> (n,): R + (totals - R sizes) / mean(sizes), linearisation of a ratio (Cochran 1977, eq. 6.13).

    >>> ratio_values(np.array([1.0, 5.0]), np.array([1.0, 3.0]))  # R = 6/4; residuals -0.5 and 0.5, over 2
    array([1.25, 1.75])
    """
    ratio = totals.sum() / sizes.sum()
    return ratio + (totals - ratio * sizes) / sizes.mean()


def paired_intervals(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """before, after (n,), the same questions -> interval of each mean and of the mean difference; the standard error
    that two independent samples would have.

    >>> result = paired_intervals(np.array([0.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0]))
    >>> round(result["difference"]["mean"], 3), round(result["difference"]["standard_error"], 3)
    (0.333, 0.333)
    """
    intervals = {"before": before, "after": after, "difference": after - before}
    result: dict[str, Any] = {name: mean_interval(values) for name, values in intervals.items()}
    errors = result["before"]["standard_error"], result["after"]["standard_error"]
    return {**result, "unpaired_standard_error": math.hypot(*errors)}


def paired_proportions(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Right (1) or wrong (0) on the same questions (n,): as paired_intervals, but Wilson's interval for each accuracy.

    lost: right before, wrong after; gained: the reverse; mcnemar_exact_p tests whether they are equally likely
    (McNemar 1947). changed: the share of such questions with its exact interval (Clopper and Pearson 1934), which
    still says something where no question changed and the interval of the difference is a point.

    >>> result = paired_proportions(np.array([1, 1, 1, 0, 0, 1]), np.array([0, 0, 0, 0, 0, 1]))
    >>> result["lost"], result["gained"], round(result["mcnemar_exact_p"], 3)  # 2 * (1/2)^3
    (3, 0, 0.25)
    """
    result = paired_intervals(before.astype(float), after.astype(float))
    for name, values in (("before", before), ("after", after)):
        low, high = proportion_confint(int(values.sum()), len(values), method="wilson")
        result[name] |= {"ci_low": float(low), "ci_high": float(high)}
    table = [[int(np.sum((before == b) & (after == a))) for a in (1, 0)] for b in (1, 0)]
    lost, gained = table[0][1], table[1][0]
    low, high = proportion_confint(lost + gained, len(before), method="beta")
    changed = {"mean": (lost + gained) / len(before), "ci_low": float(low), "ci_high": float(high)}
    p = float(mcnemar(table, exact=True).pvalue)
    return {**result, "lost": lost, "gained": gained, "mcnemar_exact_p": p, "changed": changed}


def windows(n: int, context: int, max_length: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, first scored, end) of windows over n tokens, of which the first `context` are not scored.

    Each other token is scored once, in a window of at most max_length; all but the first score `stride` tokens.

    >>> windows(10, 1, 6, 3)
    [(0, 1, 6), (3, 6, 9), (4, 9, 10)]
    """
    found, scored = [], context
    while scored < n:
        end = min(n, max(max_length, scored + stride))
        found.append((max(0, end - max_length), scored, end))
        scored = end
    return found


# ------------------------------------------------------------------------------------------------------------ text


Document = tuple[list[dict] | None, str]  # the messages that are answered (None: plain text), and what is scored


def read_documents(source: str, lost: Counter[str]) -> list[Document]:
    """The documents of --text; what is left out is counted in `lost`."""
    if Path(source).suffix == ".txt" and Path(source).is_file():
        try:
            text = Path(source).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: expected UTF-8 ({error})") from error
        lines = "\n".join(line.rstrip() for line in text.splitlines())
        return [(None, part.strip()) for part in lines.split("\n\n") if part.strip()]
    rows, documents = read_jsonl(source, ()), []
    for row in rows:
        try:
            documents.append(to_document(row))
        except BadRow as bad:
            lost[bad.args[0]] += 1
    if not documents:
        names = ", ".join(sorted({name for row in rows for name in row} - {"_line"}))
        raise UserError(f"{source}: no usable row; columns found: {names}; expected: text | messages | prompt + "
                        f"completion; left out: {dict(lost)}")  # fmt: skip
    return documents


def to_document(row: dict) -> Document:
    """The document of a row with `messages`, `prompt` + `completion` or `text`."""
    messages, text = None, row.get("text")
    if row.get("messages"):
        *messages, last = to_messages(row["messages"])
        if last["role"] != "assistant" or not messages:
            raise BadRow("the last message is no reply of an assistant")
        text = last["content"]
    elif row.get("prompt") and row.get("completion"):
        messages, text = to_messages(row["prompt"]), row["completion"]
    if not str(text or "").strip():
        raise BadRow("no text, or an empty one")
    return messages, str(text).strip()


def encode_document(document: Document, tokenizer: Any) -> tuple[list[int], int]:
    """(token ids, how many of the first are context, not scored): one BOS (EOS where there is none), or the prompt.

    White space after what ends a reply belongs to the next turn and is cut off.
    """
    messages, text = document
    if messages is None:
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = tokenize(tokenizer, text)
        return [begin] + (ids[1:] if ids[:1] == [begin] else ids), 1
    prompt = render(tokenizer, messages, True)
    whole = render(tokenizer, [*messages, {"role": "assistant", "content": text}], False)
    end = whole.rfind(text) + len(text)
    whole = whole[:end] + whole[end:].rstrip()
    if not whole.startswith(prompt):
        raise BadRow("chat template: the prompt is no prefix of prompt + reply")
    context, ids = tokenize(tokenizer, prompt), tokenize(tokenizer, whole)
    if ids[: len(context)] != context:  # a token straddles the boundary: a model that is asked starts afresh there
        ids = context + tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    return ids, len(context)


# ----------------------------------------------------------------------------------------------------------- model


def window_nats(model: Any, rows: list[tuple[list[int], int]]) -> list[float]:
    """[(token ids, first scored)] of windows -> nats of each: -sum log softmax, in fp32."""
    import torch
    from torch.nn.functional import cross_entropy

    width = max(len(ids) for ids, _ in rows)
    padded = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows], device=model.device)
    with torch.no_grad():  # padding stands on the right, where no token that counts can see it
        logits = model(input_ids=padded, use_cache=False).logits
    nats = []
    for row, (ids, first) in enumerate(rows):  # the logits before a token predict it
        values = cross_entropy(
            logits[row, first - 1 : len(ids) - 1].float(), padded[row, first : len(ids)], reduction="none"
        )
        nats.append(values.double().sum().item())
    return nats


def likelihoods(documents: list[Document], args: Any) -> tuple[np.ndarray, list[list[int]], np.ndarray, Counter[str]]:
    """Under --model: (nats (n,), NaN where a document does not fit it; token ids; scored tokens (n,); what is lost)."""
    adapter, base, tokenizer = find_model(args)
    model = load_weights(adapter, base, args)
    if args.max_length > (positions := getattr(model.config, "max_position_embeddings", None) or 2**31):
        raise UserError(f"--max_length {args.max_length}: {args.model} has {positions} positions")
    nats, tokens, all_ids = np.full(len(documents), math.nan), np.zeros(len(documents), int), []
    lost: Counter[str] = Counter()
    rows: list[tuple[int, list[int], int]] = []  # document, ids of the window, first scored in it
    for i, document in enumerate(documents):
        try:
            ids, context = encode_document(document, tokenizer)
        except BadRow as bad:
            lost[bad.args[0]] += 1
            ids, context = [], 0
        all_ids.append(ids)
        tokens[i] = len(ids) - context
        rows += [(i, ids[a:c], b - a) for a, b, c in windows(len(ids), context, args.max_length, args.stride)]
    rows.sort(key=lambda row: -len(row[1]))
    for batch in (rows[k : k + args.batch_size] for k in range(0, len(rows), args.batch_size)):
        for (i, _, _), value in zip(batch, window_nats(model, [(ids, b) for _, ids, b in batch]), strict=True):
            nats[i] = value + np.nan_to_num(nats[i])
    return nats, all_ids, tokens, lost


def compare_text(args: Args) -> dict:
    """Likelihood of --text under both models, one after the other in memory, in the precision of --after."""
    assert args.before and args.after and args.text
    lost: Counter[str] = Counter()
    documents = read_documents(args.text, lost)
    for_after = SimpleNamespace(**vars(args), model=args.after)
    nats_after, ids_after, tokens_after, lost_after = likelihoods(documents, for_after)
    for_before = SimpleNamespace(**{**vars(for_after), "model": args.before})  # quant and dtype are settled by now
    nats_before, ids_before, tokens_before, lost_before = likelihoods(documents, for_before)
    for name, counts in (("before", lost_before), ("after", lost_after)):
        lost.update({f"{reason} ({name})": count for reason, count in counts.items()})
    kept = ~(np.isnan(nats_before) | np.isnan(nats_after))
    if not kept.any():
        raise UserError(f"{args.text}: no document fits both models ({dict(lost)})")
    a, b, size_a, size_b = nats_before[kept], nats_after[kept], tokens_before[kept], tokens_after[kept]
    size = np.array([len(text.encode()) for _, text in documents])[kept]
    nats = paired_intervals(ratio_values(a, size_a), ratio_values(b, size_b))
    bits = paired_intervals(*(ratio_values(x / math.log(2), size) for x in (a, b)))
    exponents = {"before": nats["before"], "after": nats["after"], "ratio": nats["difference"]}
    return {
        "n": int(kept.sum()), "lost": dict(lost), "quant": for_after.quant, "dtype": for_after.dtype,
        "tokens": {"before": int(size_a.sum()), "after": int(size_b.sum())}, "bytes": int(size.sum()),
        "same_tokens": ids_before == ids_after, "in_windows": sum(len(ids) > args.max_length for ids in ids_after),
        "nats_per_token": nats, "bits_per_byte": bits,
        "perplexity": {
            name: {key: math.exp(x[key]) for key in ("mean", "ci_low", "ci_high")} for name, x in exponents.items()
        },
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- responses
def join_responses(args: Args, lost: Counter[str]) -> tuple[list[dict], list[dict]]:
    """Rows of both files with the same id and sample, in the order of the first; the others are counted in `lost`.

    Errors, by line: an id twice, an id with another prompt in the other file.
    """
    needed = ("id", "prompt", "response") if args.reward_fn or args.reference_metric else ("id",)
    files: list[dict[tuple, dict]] = []
    for source in (args.before_responses, args.after_responses):
        found: dict[tuple, dict] = {}
        for row in read_jsonl(str(source), needed):
            plain_values(row, f"{source}, line {row['_line']}", "sample")
            first = found.setdefault((json.dumps(row["id"]), row.get("sample", 0)), row)
            if first is not row:
                raise UserError(f"{source}: id {row['id']!r} is in line {first['_line']} and in line {row['_line']}, "
                                "and no `sample` tells them apart")  # fmt: skip
        files.append(found)
    before, after = files
    lost["only in the file before"] = len(before.keys() - after.keys())
    lost["only in the file after"] = len(after.keys() - before.keys())
    pairs = [(before[key], after[key]) for key in before if key in after]
    for a, b in pairs:
        if a.get("prompt") != b.get("prompt"):
            raise UserError(f"id {a['id']!r} has another prompt in {args.before_responses}, line {a['_line']}, than in "
                            f"{args.after_responses}, line {b['_line']}; the files answer different data")  # fmt: skip
    answered = [pair for pair in pairs if all(isinstance(row.get("response", ""), str) for row in pair)]
    lost["no response"] = len(pairs) - len(answered)
    if not answered:
        ids = [next(iter(file.values()))["id"] for file in files]
        raise UserError(f"{args.before_responses} and {args.after_responses} share no answered id; their first rows "
                        f"have {ids[0]!r} and {ids[1]!r}")  # fmt: skip
    return [a for a, _ in answered], [b for _, b in answered]


def call_function(function: Callable, spec: str, prompts: list[dict], responses: list[str]) -> np.ndarray:
    """function(prompts, responses, **columns) -> (B,) float64, NaN where it returned None."""
    names = sorted({name for p in prompts for name in p["columns"]})  # rows may lack some
    columns = {name: [p["columns"].get(name) for p in prompts] for name in names}
    try:
        values = list(function([p["prompt"] for p in prompts], responses, **columns))
    except Exception as error:
        raise UserError(f"{spec} raised {type(error).__name__}: {error}") from error
    if len(values) != len(responses):
        raise UserError(f"{spec} returned {len(values)} values for {len(responses)} responses")
    scores = []
    for value, prompt, response in zip(values, prompts, responses, strict=True):
        try:
            scores.append(math.nan if value is None else float(value))
        except (TypeError, ValueError):
            scores.append(math.inf)
        if value is not None and not math.isfinite(scores[-1]):
            raise UserError(f"{spec} returned {value!r} for prompt {prompt['prompt']!r}, response {response!r}")
    return np.array(scores)


def read_scores(rows: list[dict], source: str, column: str) -> np.ndarray:
    """Column of finite numbers or booleans -> (n,), NaN where it is null."""
    for row in rows:
        value = row.get(column)
        known = value is None or isinstance(value, int | float) and math.isfinite(value)
        if column not in row or not known:
            found = f"found {row[column]!r}" if column in row else f"keys found: {', '.join(row)}"
            raise UserError(f"{source}, line {row['_line']}: --score_column {column}: expected a number; {found}")
    return np.array([math.nan if row[column] is None else float(row[column]) for row in rows])


def question_means(rows: list[dict], values: np.ndarray) -> np.ndarray:
    """values (rows,) -> (questions,), in the order of the ids: the mean over the samples of each."""
    question = np.unique([json.dumps(row["id"]) for row in rows], return_inverse=True)[1]
    return np.bincount(question, values) / np.bincount(question)


def compare_task(before: list[dict], after: list[dict], args: Args, lost: Counter[str]) -> dict:
    """Scores of both models on the questions that both have a score for; several samples are averaged first."""
    scores = []
    for rows, source in ((before, args.before_responses), (after, args.after_responses)):
        if args.score_column:
            scores.append(read_scores(rows, str(source), args.score_column))
        else:
            own = [{k: v for k, v in row.items() if k not in (*ROW_KEYS, "_line")} for row in rows]
            prompts = [{"prompt": row["prompt"], "columns": columns} for row, columns in zip(rows, own, strict=True)]
            function, spec = load_function(str(args.reward_fn)), str(args.reward_fn)
            scores.append(call_function(function, spec, prompts, [row["response"] for row in rows]))
    kept = ~np.isnan(scores).any(axis=0)
    lost["no score"] = int((~kept).sum())
    if not kept.any():
        raise UserError(f"{args.score_column or args.reward_fn} has no score for any question of both files")
    rows = [before[i] for i in np.flatnonzero(kept)]
    a, b = (question_means(rows, x[kept]) for x in scores)
    binary = bool(np.isin([a, b], (0, 1)).all())
    result = (paired_proportions if binary else paired_intervals)(a, b)
    return {"right_or_wrong": binary, "responses": int(kept.sum()), **result}


def compare_references(before: list[dict], after: list[dict], name: str, args: Args, lost: Counter[str]) -> dict:
    """Every number that a metric of `evaluate` gives, for both models, and the interval of its difference."""
    import evaluate

    kept = [i for i, row in enumerate(before) if row.get(args.reference_column) is not None]
    lost[f"no {args.reference_column}"] = len(before) - len(kept)
    if not kept:
        found = ", ".join(sorted({key for row in before for key in row} - {"_line"}))
        raise UserError(f"{args.before_responses}: no --reference_column {args.reference_column}; found: {found}")
    try:
        metric = evaluate.load(name)
    except Exception as error:  # whatever evaluate, the hub client or the metric's own imports raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--reference_metric {name}: can't be loaded ({reason}); a name is looked up in the hub: "
                        "offline give a metric script's path, and install what it imports") from error  # fmt: skip

    per_row = "use_aggregator" in inspect.signature(metric._compute).parameters  # rouge; else it draws a bootstrap too
    options = {"use_aggregator": False} if per_row else {}

    def score(rows: list[dict], chosen: Any) -> dict[str, Any]:
        texts, references = (
            [x[i][key] for i in chosen] for x, key in ((rows, "response"), (before, args.reference_column))
        )
        try:
            values = metric.compute(predictions=texts, references=references, **options)
        except Exception as error:
            raise UserError(f"--reference_metric {name} raised {type(error).__name__}: {error}") from error
        return {key: v for key, v in values.items() if isinstance(v, list if per_row else int | float | np.number)}

    if per_row:
        rows, a, b = [before[i] for i in kept], score(before, kept), score(after, kept)
        return {key: paired_intervals(*(question_means(rows, np.array(x[key])) for x in (a, b))) for key in a}
    questions: dict[str, list[int]] = {}  # id -> its rows: several samples are drawn together
    for i in kept:
        questions.setdefault(json.dumps(before[i]["id"]), []).append(i)
    a, b, each, both, result = score(before, kept), score(after, kept), list(questions.values()), [], {}
    for drawn in np.random.default_rng(args.seed).integers(len(each), size=(args.resamples, len(each))):
        chosen = [i for question in drawn for i in each[question]]
        both.append((score(before, chosen), score(after, chosen)))
    for key in a:
        differences = [y[key] - x[key] for x, y in both]
        low, high = np.quantile(differences, (0.025, 0.975))
        result[key] = {
            "before": {"mean": float(a[key])}, "after": {"mean": float(b[key])},
            "difference": {"n": len(each), "mean": float(b[key] - a[key]), "ci_low": float(low), "ci_high": float(high),
                           "standard_error": float(np.std(differences, ddof=1))},
        }  # fmt: skip
    return result


# ------------------------------------------------------------------------------------------------------------ main


def settle(args: Args) -> None:
    """Fill in the bare command's defaults; refuse halves of a comparison before a model is loaded."""
    if not any((args.before, args.after, args.text, args.before_responses, args.after_responses)):
        args.before, args.after, args.text = str(TINY / "sft"), "runs/ppo", str(TINY / "sft_eval.jsonl")
        if not Path(args.after).is_dir():
            raise UserError("runs/ppo: no such folder; `python ppo.py` makes it, or give --before, --after and --text")
    models, files = (args.before, args.after, args.text), (args.before_responses, args.after_responses)
    measures = [bool(args.reward_fn), bool(args.score_column), bool(args.reference_metric)]
    if any(models) and not all(models):
        raise UserError("perplexity needs all of --before, --after and --text")
    if any((*files, *measures)) and not (all(files) and any(measures)):
        raise UserError("a task needs both --before_responses and --after_responses, and --reward_fn, --score_column "
                        "or --reference_metric")  # fmt: skip
    if args.reward_fn and args.score_column:
        raise UserError("--reward_fn and --score_column: one task at a time")
    if not 0 < args.stride < args.max_length:
        raise UserError(f"--stride {args.stride}: expected 1 to --max_length - 1 ({args.max_length - 1})")
    if args.reward_fn:
        load_function(args.reward_fn)


def decimals(value: float | None, form: str = ".3f") -> str:
    """A number, or - where there is none."""
    return "-" if value is None else f"{value:{form}}"


def show(name: str, result: dict, third: str = "difference") -> None:
    """One line of the table: before, after and their difference (or ratio), each with its interval where it has one."""
    cells = []
    for x in (result["before"], result["after"], result[third]):
        span = f" [{decimals(x['ci_low'])}, {decimals(x['ci_high'])}]" if "ci_low" in x else ""
        cells.append(decimals(x["mean"], "+.3f" if x is result.get("difference") else ".3f") + span)
    print(f"{name:20}" + "".join(f"{cell:26}" for cell in cells).rstrip())


def show_all(result: dict) -> None:
    """The table: one line per measure, n, and what was lost."""
    print(f"{'95 % intervals':20}{'before':26}{'after':26}after - before")
    if text := result.get("text"):
        show("nats per token", text["nats_per_token"])
        show("bits per byte", text["bits_per_byte"])
        show("perplexity (ratio)", text["perplexity"], "ratio")
        print(f"  {text['n']} documents, {text['bytes']} bytes, {text['tokens']['after']} tokens; read in windows: "
              f"{text['in_windows']}; lost: {text['lost'] or 'none'}")  # fmt: skip
        if not text["same_tokens"]:
            print("  the models read other tokens (tokenizer or chat template): compare bits per byte, not perplexity")
    if task := result.get("task"):
        show("accuracy" if task["right_or_wrong"] else "score", task)
        if task["right_or_wrong"]:
            print(f"  {task['lost']} questions lost, {task['gained']} gained: exact p {task['mcnemar_exact_p']:.2g}")
        errors = (task["difference"]["standard_error"], task["unpaired_standard_error"])
        paired, unpaired = (decimals(error, ".4f") for error in errors)
        print(f"  {task['before']['n']} questions; standard error {paired} paired, {unpaired} unpaired")
    for name, numbers in result.get("reference", {}).items():
        for key, values in numbers.items():
            show(f"{Path(name).stem}: {key}", values)
    if responses := result.get("responses"):
        lost = {reason: count for reason, count in responses["lost"].items() if count}
        print(f"  {responses['n']} pairs of responses; cut off: {responses['cut_off']}; lost: {lost or 'none'}")


def main(args: Args) -> dict:
    """What alignment costs: perplexity and tasks before and after, paired."""
    # 1. Perplexity of held-out text
    settle(args)
    result: dict[str, Any] = {"flags": asdict(args)}
    if args.text:
        result["text"] = compare_text(args)

    # 2. A task, and reference metrics, from two files of responses
    if args.before_responses:
        lost: Counter[str] = Counter()
        before, after = join_responses(args, lost)
        if args.reward_fn or args.score_column:
            result["task"] = compare_task(before, after, args, lost)
        if names := args.reference_metric:
            result["reference"] = {name: compare_references(before, after, name, args, lost) for name in names}
        cut_off = [sum(row.get("finish_reason") == "length" for row in rows) for rows in (before, after)]
        result["responses"] = {"n": len(before), "cut_off": dict(zip(("before", "after"), cut_off, strict=True))}
        result["responses"]["lost"] = dict(lost)

    # 3. Show and write
    result = without_nan(result)
    show_all(result)
    folder = args.after if Path(args.after or "").is_dir() and args.after else Path(args.after_responses or ".").parent
    path = Path(args.output or Path(folder) / "alignment_tax.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    run_tool(main, Args)
