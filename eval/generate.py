# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "bitsandbytes==0.50.2", "peft==0.21.2",
#     "accelerate==1.15.0", "openai==3.52.0", "numpy==2.4.6"]
# ///
"""Responses of a model to a file of prompts: the first step of every comparison.

    python eval/generate.py                                   # tiny/sft on tiny's evaluation prompts, offline
    python eval/generate.py --model runs/ppo --dataset prompts.jsonl --output ppo.jsonl
    python eval/generate.py --model NAME --base_url http://localhost:8000/v1 --dataset prompts.jsonl

Prompts: a hub id or a local .jsonl, .json, .parquet with `prompt` (string or message list), and `id`; without one, a
row's number from 0 is its id. Writes one row per response, with every other column of the dataset, which judges and
reward functions may want (category, turn, answer, ...):

    {"id", "prompt", "response", "model", "finish_reason": "stop" | "length", "tokens", ["sample"], ...}

`length` marks a response that was cut off; `tokens` counts the end token, and may be null from a server.

Sampling is transformers' greedy `generate` with one change: the token is the inverse CDF of the softmax at one uniform
number, a function of (seed, id, sample, position) and of nothing else (Devroye 1986, chapter 3.2). So batch size,
order and resuming change a response by rounding only. There is no top-k, top-p or repetition penalty, also where the
model's own generation config has one. A server draws in its own way; it is sent a seed of each response's own.

The file only grows, and each batch is on disk before the next: run the same command again to continue after a crash.
When all is done the rows are put in the dataset's order. FILE.json beside FILE.jsonl holds what decides a response
(settings: weights, chat template, sampling), which a continued run must share, and counts.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import AutoConfig

if not __package__:  # run as a file or imported by its bare name: it belongs to the package eval all the same
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "eval"

from .common import ROW_KEYS, TINY, arg, BadRow, encode_prompt, find_model, find_stop_ids, load_weights, run_tool
from .common import to_messages, UserError, write_file, write_json

DECISIVE = ("base_url", "revision", "quant", "dtype", "temperature", "seed", "max_response_length")
MAX_FAILURES = 10  # so many requests in a row without an answer: the server is gone, or refuses them all


# ------------------------------------------------------------------------------------------------------- arguments


@dataclass
class Args:
    model: str = arg(str(TINY / "sft"), "run folder, local model or hub id; with --base_url its name there")
    base_url: str | None = arg(None, "OpenAI-compatible server to ask; the key is taken from OPENAI_API_KEY alone")
    dataset: str = arg(str(TINY / "prompts_eval.jsonl"), "prompts: hub id or local .jsonl, .json, .parquet")
    dataset_split: str = arg("train", "split of a hub dataset")
    prompt_column: str = arg("prompt", "column that holds the prompt (string or message list)")
    output: str = arg("runs/generate/responses.jsonl", "file of responses; an unfinished one is continued")
    name: str | None = arg(None, "what the rows call the model; default: the folder's name or the hub id")
    temperature: float = arg(0.0, "0: greedy; else of sampling, with no top-k or top-p")
    samples_per_prompt: int = arg(1, "responses per prompt; more than 1: rows have `sample`, from 0")
    max_prompt_length: int = arg(2048, "longer prompts are dropped and counted, never cut (tokens)")
    max_response_length: int = arg(256, "longest response (tokens); one that reaches it is marked `length`")
    batch_size: int = arg(32, "responses at once: memory, not the result")
    seed: int = arg(0, "decides what is sampled")
    quant: Literal["auto", "nf4", "none"] = arg("auto", "4-bit base; auto: as the run folder says, else nf4 on a GPU")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "auto: bfloat16 on a GPU or with nf4, else float32")
    revision: str | None = arg(None, "branch, tag or commit of a hub model")
    trust_remote_code: bool = arg(False, "run model code that comes with a hub model")
    chat_template: str | None = arg(None, "plain, text (no markup) or a Jinja file; default: the tokenizer's own")
    concurrency: int = arg(8, "requests to --base_url at once")
    max_retries: int = arg(5, "repeats of a request after 429, 5xx, a hang-up or a time-out, with back-off")
    timeout: float = arg(600.0, "seconds to wait for a reply of --base_url")


# -------------------------------------------------------------------------------------------------------- sampling
def uniforms(seed: int, name: Any, sample: int, n: int) -> np.ndarray:
    """n numbers in [0, 1), one per token: a function of (seed, id, sample, position) alone, by Philox's counter.

    >>> bool((uniforms(0, "row 7", 1, 9)[:4] == uniforms(0, "row 7", 1, 4)).all())
    True
    """
    digest = hashlib.sha256(json.dumps([seed, name, sample]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(n)


def inverse_cdf(logits: Any, uniform: Any, temperature: float) -> Any:
    """logits (B, V), uniform (B,) in [0, 1) -> (B,): the first token at which the CDF of softmax(logits / temperature)
    exceeds `uniform`; softmax in fp32, sums in fp64.

    >>> import torch
    >>> inverse_cdf(torch.log(torch.tensor([[0.2, 0.5, 0.3]])).expand(3, 3), torch.tensor([0.19, 0.21, 0.71]), 1.0)
    tensor([0, 1, 2])
    """
    cdf = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
    return (cdf <= uniform[:, None].double() * cdf[:, -1:]).sum(-1)  # the last column is 1 but for rounding


class Draw:
    """A logits processor for greedy `generate`: leaves each row the one token that its next uniform number draws."""

    def __init__(self, uniform: Any, width: int, temperature: float):
        """uniform (B, T): one number per row and response token; width: columns of the padded prompts."""
        self.uniform, self.width, self.temperature = uniform, width, temperature

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """input_ids (B, width + t), scores (B, V) -> (B, V): 0 at the drawn token, -inf elsewhere."""
        token = inverse_cdf(scores, self.uniform[:, input_ids.shape[1] - self.width], self.temperature)
        return scores.new_full(scores.shape, -float("inf")).scatter(1, token[:, None], 0.0)


# ------------------------------------------------------------------------------------------------------------ data
def read_rows(source: str, split: str, skipped: dict[str, list]) -> list[dict]:
    """Rows of a hub dataset or a local .jsonl, .json or .parquet file; "_row" is the line or row number, from 1."""
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        rows = []
        for number, line in enumerate(path.read_bytes().rstrip().split(b"\n"), 1):
            try:
                rows.append({**json.loads(line), "_row": number})
            except (ValueError, TypeError):
                skipped.setdefault("not a JSON object", [0, number, repr(line[:60])])[0] += 1
        return rows
    from datasets import load_dataset  # 1 s that the other paths need not wait for

    try:
        if path.is_file() and path.suffix in (".json", ".parquet"):
            data = load_dataset(path.suffix[1:], data_files=str(path), split="train")
        elif path.exists() or path.suffix in (".jsonl", ".json", ".parquet"):
            raise UserError(f"{source}: no such .jsonl, .json or .parquet file")
        else:
            data = load_dataset(source, split=split)
    except UserError:
        raise
    except Exception as error:  # whatever datasets raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"dataset {source}, split {split}: can't be read ({reason})") from error
    return [{**row, "_row": number} for number, row in enumerate(data, 1)]


class Task(NamedTuple):
    """One response to generate."""

    id: Any
    sample: int
    prompt: str | list[dict]
    columns: dict[str, Any]  # the dataset's other columns
    ids: list[int]  # token ids of the prompt; empty where a server tokenizes


Batch = list[tuple[Task, dict]]  # dict: response, finish_reason, tokens


def key_of(name: Any, sample: int) -> tuple[str, int]:
    """What tells one response from another: ids may be strings or numbers, 1 is not "1"."""
    return json.dumps(name), sample


def count(lost: dict[str, list], reason: str, row: Any, detail: str = "") -> None:
    """One more of what is left out: reason -> [how many, the first one's row or id, its detail]."""
    lost.setdefault(reason, [0, row, detail])[0] += 1


def read_prompts(args: Args, tokenizer: Any, limit: int, lost: dict[str, list]) -> list[Task]:
    """Tasks in the dataset's order; rows left out are counted in `lost`. Errors: no usable row, an id twice."""
    rows, tasks = read_rows(args.dataset, args.dataset_split, lost), []
    seen: dict[str, int] = {}  # id as JSON -> row
    for row in rows:
        name = row["_row"] - 1 if row.get("id") is None else row["id"]
        prompt = row.get(args.prompt_column)
        try:
            if prompt is None or not any(str(message["content"]).strip() for message in to_messages(prompt)):
                raise BadRow(f"no {args.prompt_column}", "null, empty, or no such column")
            ids = encode_prompt(tokenizer, prompt) if tokenizer else []
            if len(ids) > limit:
                raise BadRow(f"prompt over {limit} tokens", f"{len(ids)} tokens")
        except BadRow as bad:
            count(lost, bad.args[0], row["_row"], bad.args[1])
            continue
        if (first := seen.setdefault(json.dumps(name), row["_row"])) != row["_row"]:
            raise UserError(f"{args.dataset}: id {name!r} is in row {first} and in row {row['_row']}")
        columns = {k: v for k, v in row.items() if k not in (*ROW_KEYS, "_row", args.prompt_column)}
        tasks += [Task(name, sample, prompt, columns, ids) for sample in range(args.samples_per_prompt)]
    found = {name for row in rows for name in row} - {"_row"}
    if not tasks:
        columns_found = ", ".join(sorted(found)) or "none"
        raise UserError(f"{args.dataset}: no usable row; columns found: {columns_found}; expected {args.prompt_column} "
                        f"(--prompt_column names another); left out: {describe(lost)}")  # fmt: skip
    if hidden := sorted(found & set(ROW_KEYS) - {"id", args.prompt_column}):
        print(f"data: columns {', '.join(hidden)} of the dataset are not kept: responses have such of their own")
    return tasks


def describe(lost: dict[str, list]) -> str:
    """What was left out, as text: reason and count, the first one of each."""
    each = (f"{n} {reason} (first: {row}{', ' * bool(detail)}{detail})" for reason, (n, row, detail) in lost.items())
    return "; ".join(each) or "nothing"


# ----------------------------------------------------------------------------------------------------------- model


def generate_batches(tasks: list[Task], adapter: Path | None, base: str, tokenizer: Any, args: Args) -> Iterator[Batch]:
    """Responses of a local model, longest prompts first, so that a batch too large for the memory fails at once."""
    import torch
    from transformers import GenerationConfig

    model = load_weights(adapter, base, args)
    stop_ids = find_stop_ids(tokenizer, model.generation_config)
    model.generation_config = GenerationConfig(  # replaces the model's own, which may ask for top-p or a penalty
        max_new_tokens=args.max_response_length, do_sample=False, eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    tasks = sorted(tasks, key=lambda task: -len(task.ids))
    for batch in (tasks[i : i + args.batch_size] for i in range(0, len(tasks), args.batch_size)):
        width, draw = len(batch[0].ids), []
        pads = [width - len(task.ids) for task in batch]  # on the left: all go on at one column
        rows = [[tokenizer.pad_token_id] * pad + task.ids for pad, task in zip(pads, batch, strict=True)]
        ids = torch.tensor(rows, device=model.device)
        seen = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=model.device)
        if args.temperature:
            noise = np.stack([uniforms(args.seed, task.id, task.sample, args.max_response_length) for task in batch])
            draw = [Draw(torch.from_numpy(noise).to(model.device), width, args.temperature)]
        try:
            output = model.generate(input_ids=ids, attention_mask=seen, logits_processor=draw)[:, width:].tolist()
        except torch.OutOfMemoryError as error:
            advice = f"what is finished is kept: continue with --batch_size {max(1, len(batch) // 2)}"
            raise UserError(f"out of memory; {advice}") from error
        replies = []
        for tokens in output:
            end = next((t for t, token in enumerate(tokens) if token in stop_ids), None)
            tokens = tokens if end is None else tokens[: end + 1]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            reason = "length" if end is None else "stop"
            replies.append({"response": text, "finish_reason": reason, "tokens": len(tokens)})
        yield list(zip(batch, replies, strict=True))


# ---------------------------------------------------------------------------------------------------------- server
def ask(client: Any, task: Task, args: Args) -> dict | str:
    """A server's reply to one task, or, as text, why there is none."""
    import openai

    try:
        reply = client.chat.completions.create(
            model=args.model, messages=to_messages(task.prompt), temperature=args.temperature,
            max_tokens=args.max_response_length, seed=int(uniforms(args.seed, task.id, task.sample, 1)[0] * 2**31),
        )  # fmt: skip
        choice, usage = reply.choices[0], reply.usage
        tokens = usage.completion_tokens if usage else None
        return {"response": choice.message.content or "", "finish_reason": choice.finish_reason, "tokens": tokens}
    except openai.APITimeoutError:
        return "time-out"
    except openai.APIConnectionError:
        return "no connection"
    except openai.APIStatusError as error:
        return f"HTTP {error.status_code}"
    except (openai.OpenAIError, ValueError, TypeError, AttributeError, IndexError):
        return "malformed reply"


def ask_server(tasks: list[Task], args: Args, failed: dict[str, list]) -> Iterator[Batch]:
    """[(task, reply)] of a server as they come; failures are counted in `failed`, too many in a row are an error."""
    import openai

    key = os.environ.get("OPENAI_API_KEY") or "none"  # local servers ask for no key, the client for some text
    client = openai.OpenAI(base_url=args.base_url, api_key=key, max_retries=args.max_retries, timeout=args.timeout)
    in_a_row = 0
    with ThreadPoolExecutor(args.concurrency) as pool:
        asked = {pool.submit(ask, client, task, args): task for task in tasks}
        try:
            for future in as_completed(asked):
                reply, task = future.result(), asked[future]
                in_a_row = in_a_row + 1 if isinstance(reply, str) else 0
                if isinstance(reply, dict):
                    yield [(task, reply)]
                    continue
                count(failed, reply, task.id)
                if in_a_row == MAX_FAILURES:
                    raise UserError(
                        f"{args.base_url}: {in_a_row} requests in a row failed: {describe(failed)}; what is finished "
                        "is kept; check the server, --model and OPENAI_API_KEY, then run again"
                    )
        finally:  # an error, or a killed run: requests that have not begun are not sent
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------- output


def read_done(path: Path, tasks: list[Task], settings: dict) -> dict[tuple[str, int], dict]:
    """(id as JSON, sample) -> row, of an earlier run of the same settings; half a last line is cut off the file.

    Errors: other settings (which); by line: not JSON, a response that is not asked for, or to another prompt.
    """
    remedy, summary = "choose another --output, or remove the file", path.with_suffix(".json")
    if not path.is_file() or path.stat().st_size == 0:
        return {}
    try:
        old = json.loads(summary.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is there, but no {summary} that says how it was generated; {remedy}") from error
    if differ := [f"{key}: {old.get(key)}, now {value}" for key, value in settings.items() if old.get(key) != value]:
        raise UserError(f"{path}: generated with other settings ({', '.join(differ)}); {remedy}")
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        print(f"{path}: the last line is cut off ({torn[:40]!r}...); its response is generated again")
        os.truncate(path, len(whole + newline))
    prompts = {key_of(task.id, task.sample): task.prompt for task in tasks}
    done: dict[tuple[str, int], dict] = {}
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        try:
            row = json.loads(line)
            key, prompt = key_of(row["id"], row.get("sample", 0)), row["prompt"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: not a response row ({line[:60]!r}); {remedy}") from error
        if key in done or key not in prompts or prompt != prompts[key]:
            wrong = "there twice" if key in done else "not asked for, or with another prompt"
            raise UserError(f"{path}, line {number}: id {row['id']!r} is {wrong}; {remedy}")
        done[key] = row
    return done


def to_lines(rows: list[dict]) -> str:
    """Rows as lines of .jsonl."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


# ------------------------------------------------------------------------------------------------------------ main
def check_args(args: Args) -> None:
    """Refuse values that can't work, by flag."""
    for flag in ("samples_per_prompt", "max_prompt_length", "max_response_length", "batch_size", "concurrency"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: expected 1 or more")
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: expected 0 (greedy) or more")
    if args.samples_per_prompt > 1 and not args.temperature:
        raise UserError("--samples_per_prompt above 1 with --temperature 0 would repeat one response; --temperature 1?")
    output, dataset = Path(args.output).resolve(), Path(args.dataset).resolve()
    if output.suffix != ".jsonl" or dataset in (output, output.with_suffix(".json")):
        raise UserError(f"--output {args.output}: expected a .jsonl with a name other than the dataset's")
    if args.base_url and args.model == Args().model:
        raise UserError("--base_url needs --model: the name by which the server knows the model")
    if "@" in (args.base_url or ""):
        raise UserError("--base_url: it is written to files, so it may hold no password; set OPENAI_API_KEY")


def main(args: Args) -> dict:
    """Responses of a model to a file of prompts."""
    # 1. Find the model; nothing heavy is loaded yet
    check_args(args)
    tokenizer, template, limit = None, "", args.max_prompt_length
    if not args.base_url:
        adapter, base, tokenizer = find_model(args)
        config: Any = AutoConfig.from_pretrained(base, trust_remote_code=args.trust_remote_code)
        context = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
        template, limit = tokenizer.chat_template, min(limit, context - args.max_response_length)
        if limit < 1:
            raise UserError(f"--max_response_length {args.max_response_length}: the model has {context} positions")
    name = args.name or (Path(args.model).resolve().name if Path(args.model).is_dir() else args.model)
    stats = [(file.name, file.stat()) for file in sorted(Path(args.model).glob("*.safetensors"))]
    settings: dict[str, Any] = {"name": name, **{flag: getattr(args, flag) for flag in DECISIVE}}
    settings["chat_template"] = hashlib.sha256(template.encode()).hexdigest()[:16]
    settings["weights"] = [f"{file}, {stat.st_size} bytes, {stat.st_mtime_ns}" for file, stat in stats] or args.model

    # 2. Read the prompts, and what an earlier run has done
    lost: dict[str, list] = {}
    tasks = read_prompts(args, tokenizer, limit, lost)
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read_done(path, tasks, settings)
    todo = [task for task in tasks if key_of(task.id, task.sample) not in done]
    print(f"{args.dataset}: {len(tasks)} responses to generate, {len(done)} are there; left out: {describe(lost)}")
    write_json(path.with_suffix(".json"), {"settings": settings, "finished": False})

    # 3. Generate what is missing; a batch is on disk before the next one begins
    failed: dict[str, list] = {}
    batches = generate_batches(todo, adapter, base, tokenizer, args) if tokenizer else ask_server(todo, args, failed)
    shown = 0
    with path.open("a", encoding="utf-8") as stream:
        for batch in batches if todo else []:
            rows = [
                {"id": task.id, "prompt": task.prompt, "response": reply["response"], "model": name, **reply}
                | ({"sample": task.sample} if args.samples_per_prompt > 1 else {}) | task.columns
                for task, reply in batch
            ]  # fmt: skip
            stream.write(to_lines(rows))
            stream.flush()
            os.fsync(stream.fileno())
            done |= {key_of(row["id"], row.get("sample", 0)): row for row in rows}
            if 20 * len(done) // len(tasks) > shown:
                shown = 20 * len(done) // len(tasks)
                print(f"[{'#' * shown:20}] {len(done)}/{len(tasks)} responses", flush=True)

    # 4. Put the rows in the dataset's order; count, show
    keys = [key_of(task.id, task.sample) for task in tasks]
    rows = [done[key] for key in keys if key in done]
    if todo:
        write_file(path, lambda temporary: temporary.write_text(to_lines(rows), encoding="utf-8"))
    tokens, characters = [row["tokens"] for row in rows if row["tokens"]], [len(row["response"]) for row in rows]
    result = {
        "settings": settings, "flags": asdict(args), "finished": not failed, "n": len(rows),
        "finish_reasons": dict(Counter(str(row["finish_reason"]) for row in rows)),
        "empty": sum(not row["response"].strip() for row in rows),
        "mean_characters": float(np.mean(characters)) if characters else None,
        "mean_tokens": float(np.mean(tokens)) if tokens else None,
        "lost": {reason: n for reason, (n, _, _) in [*lost.items(), *failed.items()]},
    }  # fmt: skip
    write_json(path.with_suffix(".json"), result)
    for key in ("n", "finish_reasons", "empty", "mean_characters", "mean_tokens", "lost"):
        print(f"{key:16} {result[key]:.1f}" if isinstance(result[key], float) else f"{key:16} {result[key]}")
    print(f"wrote {path} and {path.with_suffix('.json')}")
    if failed:
        raise UserError(f"requests failed: {describe(failed)}; run the same command again to repeat just these")
    return result


if __name__ == "__main__":
    run_tool(main, Args)
