"""What the tools of eval/ share: the command line, JSONL files, judgments, intervals, loading of models.

Errors of the user are a UserError, printed as one line. Heavy libraries are imported where they are used.
"""

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, HfArgumentParser

DEFAULT = Path("runs/judge/judgments.jsonl")  # where judge.py writes, below the current folder
FASTCHAT = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5, "error": None}  # its verdicts: chance that model_1 wins
TINY = Path(__file__).resolve().parents[1] / "tiny"
PLAIN_TEMPLATE = (  # for models that come without a chat template: no new token is added to the vocabulary
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}\n{% else %}"
    "{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TEXT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # --chat_template text: no markup, continuation
ROW_KEYS = ("id", "prompt", "response", "model", "finish_reason", "tokens", "sample")


# ----------------------------------------------------------------------------------------------------- arguments
class UserError(Exception):
    """A mistake in what the user gave, printed as one line: what, where, what was expected, what to do."""


class BadRow(Exception):
    """A row that can't be used: BadRow(reason, detail); rows are counted by reason, the first detail is shown."""


def arg(default: Any, help: str) -> Any:
    """One dataclass field = one command-line flag with its --help text."""
    text = {"help": help.replace("%", "%%")}
    return field(default_factory=default, metadata=text) if callable(default) else field(default=default, metadata=text)


def run_tool(main: Callable, args_class: Any, files: str = "") -> None:
    """Parse the command line into `args_class` and run `main`: mistakes of the user are one line, not a traceback.

    `files` is the help text of the positional paths, main's second argument; "" where a tool takes none.
    """
    tool = Path(sys.argv[0]).name
    parser = HfArgumentParser(args_class, description=main.__doc__, allow_abbrev=False)
    if files:
        parser.add_argument("files", nargs="*", help=files)
    try:
        args, *rest = parser.parse_args_into_dataclasses(look_for_args_file=False)
    except ValueError as error:  # an unknown flag
        print(f"{tool}: {error}; `python {tool} --help` lists the flags", file=sys.stderr)
        sys.exit(2)
    try:
        main(args, *(namespace.files for namespace in rest))
    except UserError as error:
        sys.exit(f"{tool}: {error}")


# ----------------------------------------------------------------------------------------------------- intervals
def mean_interval(values: np.ndarray) -> dict[str, float]:
    """n, mean, standard_error and 95 % interval of a mean over questions (central limit theorem; arXiv:2411.00640).

    >>> {name: round(value, 3) for name, value in mean_interval(np.array([0.0, 1.0, 1.0, 1.0])).items()}
    {'n': 4, 'mean': 0.75, 'standard_error': 0.25, 'ci_low': 0.26, 'ci_high': 1.24}
    """
    from scipy import stats

    n, mean = len(values), float(np.mean(values)) if len(values) else math.nan
    error = float(stats.sem(values)) if n > 1 else math.nan
    low, high = stats.norm.interval(0.95, mean, error) if error > 0 else (mean if n > 1 else math.nan,) * 2
    return {"n": n, "mean": mean, "standard_error": error, "ci_low": float(low), "ci_high": float(high)}


def bootstrap_ids(statistic: Callable[[np.ndarray], float], ids: np.ndarray, resamples: int, seed: int) -> dict:
    """Standard error and percentile interval of statistic(row indices) when ids are drawn with replacement.

    `failed` counts the resamples whose statistic is NaN; they are left out.

    >>> values = np.arange(100) / 100  # SE of the mean: 0.0289
    >>> round(bootstrap_ids(lambda rows: values[rows].mean(), np.arange(100), 2000, 0)["standard_error"], 3)
    0.029
    """
    rng = np.random.default_rng(seed)
    _, place = np.unique(ids, return_inverse=True)
    members = np.split(np.argsort(place, kind="stable"), np.cumsum(np.bincount(place))[:-1])
    draws = [rng.integers(len(members), size=len(members)) for _ in range(resamples)]
    values = np.array([statistic(np.concatenate([members[i] for i in draw])) for draw in draws])
    known = values[~np.isnan(values)]
    error = float(np.std(known, ddof=1)) if len(known) > 1 else math.nan
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) > 1 else (math.nan, math.nan)
    return {"standard_error": error, "ci_low": float(low), "ci_high": float(high), "failed": resamples - len(known)}


# --------------------------------------------------------------------------------------------------------- files
def read_jsonl(source: str, needed: tuple[str, ...]) -> list[dict]:
    """Rows of a .jsonl file, each with the keys `needed`; "_line" is the line number, from 1.

    Errors: no such file; a line that is not a JSON object or lacks a key, by its number.
    """
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{source}: no such file")
    rows: list[dict] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:  # an integer beyond the range of floats becomes inf, as 1e999 does
            row = json.loads(line, parse_int=lambda text: int(text) if len(text) < 309 else float(text))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}, line {number}: not JSON, or half a line ({line[:60]!r})") from error
        if not isinstance(row, dict):
            raise UserError(f"{source}, line {number}: expected a JSON object, found {line[:60]!r}")
        if missing := [name for name in needed if name not in row]:
            raise UserError(f"{source}, line {number}: no key {', '.join(missing)}; keys found: {', '.join(row)}")
        rows.append({**row, "_line": number})
    if not rows:
        raise UserError(f"{source}: no rows")
    return rows


def plain_values(row: dict, where: str, *names: str) -> None:
    """A UserError where one of these keys, a name or a count, holds a list or an object."""
    for name in names:
        if isinstance(row.get(name), list | dict):
            raise UserError(f"{where}: {name} is {str(row[name])[:60]!r}, expected a string or a number")


def read_votes(source: str) -> list[dict]:
    """Rows of a judgment file, checked; a row of FastChat's becomes one of each order.

    Errors, with file and line: a preference that is no number in [0, 1], a winner that FastChat does not know, an order
    that is neither "ab" nor "ba", an id that is neither a string nor an integer, a name that is a list or an object.
    """
    if "g1_winner" in read_jsonl(source, ())[0]:
        rows = []
        for game in read_jsonl(source, ("question_id", "model_1", "model_2", "g1_winner", "g2_winner")):
            judge = game.get("judge")  # a list of the judge and the name of its prompt
            game |= {"judge": judge[0] if isinstance(judge, list) and judge else judge}
            game |= {"id": game["question_id"], "model_a": game["model_1"], "model_b": game["model_2"]}
            for shown, name in (("ab", "g1_winner"), ("ba", "g2_winner")):
                if not isinstance(winner := game[name], str) or winner not in FASTCHAT:
                    told = f"{name} is {str(winner)[:60]!r}, expected one of {', '.join(FASTCHAT)}"
                    raise UserError(f"{source}, line {game['_line']}: {told}")
                rows.append(game | {"order": shown, "preference": FASTCHAT[winner]})
    else:
        rows = read_jsonl(source, ("id", "preference"))
    for row in rows:
        p, order, place = row["preference"], row.get("order"), f"{source}, line {row['_line']}"
        if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
            raise UserError(f"{place}: id is {str(row['id'])[:60]!r}, expected a string or an integer")
        plain_values(row, place, "turn", "judge", "model_a", "model_b")
        if p is not None and (isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1):
            raise UserError(f"{place}: preference {p!r}; expected a number in [0, 1] (chance that A wins) or null")
        if order not in ("ab", "ba", None):
            raise UserError(f"{place}: order {order!r}; expected 'ab' or 'ba'")
    return rows


def turn_of(row: dict) -> str:
    """The turn of a row; "1" where it names none."""
    return "1" if row.get("turn") is None else str(row["turn"])


# -------------------------------------------------------------------------------------------------------- models
def to_messages(prompt: str | list[dict]) -> list[dict]:
    """A string prompt is one user message; a message list stays as it is."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt):
        raise BadRow("neither a string nor a message list", str(prompt)[:60])
    return prompt


def render(tokenizer: Any, messages: list[dict], add_generation_prompt: bool) -> str:
    """The chat template's text; a template that refuses the messages (roles, order) makes the row a bad one."""
    from jinja2 import TemplateError  # the chat template engine of transformers

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise BadRow("refused by the chat template", str(error)) from error


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids with exactly one BOS where the tokenizer is one that adds it, whether the text has it or not."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][0] == bos and ids[:1] != [bos]:
        ids = [bos] + ids
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def encode_prompt(tokenizer: Any, prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt up to the point where the assistant begins to write."""
    return tokenize(tokenizer, render(tokenizer, to_messages(prompt), True))


def find_adapter(source: str, revision: str | None) -> Path | None:
    """The folder of a PEFT adapter (a run folder or a hub id), None where `source` is a whole model."""
    if Path(source).is_dir():
        return Path(source) if (Path(source) / "adapter_config.json").is_file() else None
    from transformers.utils import cached_file

    try:
        for name in ("args.json", "reward.json", "adapter_model.safetensors", "adapter_config.json"):
            found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return Path(str(found)).parent if found else None
    except OSError as error:
        raise UserError(f"{source}: no such folder, and not to be had from the hub ({type(error).__name__})") from error


def find_base(adapter: Path) -> str:
    """The base that an adapter names; a relative path may also be relative to a parent of the adapter's folder."""
    name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    candidates = [Path(name), *(parent / name for parent in adapter.resolve().parents)]
    found = next((path for path in candidates if (path / "config.json").is_file()), None)
    if found is None and Path(name).is_absolute():
        raise UserError(f"{adapter}/adapter_config.json: base model {name} is not there; move it back or edit it")
    return str(found.resolve()) if found else name


def load_tokenizer(source: str, chat_template: str | None, args: Any) -> Any:
    """Tokenizer with a chat template (`plain` where the model has none) and, for rows, some pad token."""
    try:
        revision = args.revision if source == args.model else None
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no tokenizer there ({str(error).splitlines()[0]})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{source}: the tokenizer has no EOS token; a response could never end")
    templates = {"plain": PLAIN_TEMPLATE, "text": TEXT_TEMPLATE}
    if chat_template is None:
        tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    elif chat_template not in templates and not Path(chat_template).is_file():
        raise UserError(f"--chat_template {chat_template}: not `plain`, not `text` and no such file")
    else:
        tokenizer.chat_template = templates.get(chat_template) or Path(chat_template).read_text(encoding="utf-8")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks come from lengths
    return tokenizer


def find_stop_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """Tokens that end a response: the tokenizer's EOS, the model's own list, and the template's end of turn."""
    ids = {tokenizer.eos_token_id}
    if generation_config is not None and generation_config.eos_token_id is not None:
        eos = generation_config.eos_token_id
        ids |= set(eos) if isinstance(eos, list) else {eos}
    user = [{"role": "user", "content": "a"}]
    try:
        whole = render(tokenizer, [*user, {"role": "assistant", "content": "XYZ"}], False)
    except BadRow as bad:
        raise UserError(f"chat template: {bad.args[0]} ({bad.args[1]})") from bad
    after = tokenizer(whole.rpartition("XYZ")[2].lstrip(), add_special_tokens=False)["input_ids"]
    token = tokenizer.added_tokens_decoder.get(after[0]) if after else None
    if token is not None and token.special:
        ids.add(after[0])
    return sorted(ids)


def find_model(args: Any) -> tuple[Path | None, str, Any]:
    """(adapter's folder or None, base, tokenizer) of --model, a run folder, local model or hub id; nothing heavy yet.

    Settles "auto" in args. quant: as the run folder's args.json says, else NF4 on a GPU and none elsewhere; dtype:
    bfloat16 on a GPU or with NF4 where the device has it, else float32.
    """
    import torch
    from accelerate import PartialState

    adapter = find_adapter(args.model, args.revision)
    base, recorded = find_base(adapter) if adapter else args.model, {}
    if adapter and json.loads((adapter / "adapter_config.json").read_text()).get("task_type") == "SEQ_CLS":
        raise UserError(f"{args.model}: a reward model gives scores and writes no text; expected a language model")
    if adapter and (adapter / "args.json").is_file():
        recorded = json.loads((adapter / "args.json").read_text())
    gpu = PartialState().device.type == "cuda"
    if args.quant == "auto":
        args.quant = recorded.get("quant") or ("nf4" if gpu else "none")
    if args.dtype == "auto":
        old_gpu = gpu and torch.cuda.get_device_capability()[0] < 8
        args.dtype = "bfloat16" if (gpu or args.quant == "nf4") and not old_gpu else "float32"
    own_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(adapter) if own_tokenizer else base, args.chat_template, args)
    return adapter, base, tokenizer


def load_weights(adapter: Path | None, base: str, args: Any) -> Any:
    """The model in eval mode, with its adapter; nf4: double quantisation, as the training scripts load it."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns on import that an optional package is missing
    import torch
    import transformers
    from accelerate import PartialState
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")  # about calls between the two
    transformers.utils.logging.disable_progress_bar()
    device, dtype = PartialState().device, getattr(torch, args.dtype)
    options: dict[str, Any] = {"revision": None if adapter else args.revision, "dtype": dtype}
    if args.quant == "nf4":
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head"],
        )  # fmt: skip
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=args.trust_remote_code, **options)
        model = PeftModel.from_pretrained(model.to(device), str(adapter)) if adapter else model.to(device)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model {adapter or base}: can't be loaded ({str(error).splitlines()[0]})") from error
    for module in model.modules():  # on CPUs with AVX512-BF16 bitsandbytes would repack 4-bit weights at the first
        if hasattr(module, "support_avx512bf16_for_cpu"):  # pass, and the logits move
            module.support_avx512bf16_for_cpu = False
            if device.type == "cpu" and module.in_features % 64 in (16, 32, 48):
                raise UserError(f"model {base}: bitsandbytes misreads {module.in_features} inputs on CPU; --quant none")
    if device.type == "cpu" and model.num_parameters() < 10**7:
        torch.set_num_threads(min(2, torch.get_num_threads()))  # more gain nothing, and lose where cores are shared
    return model.eval()


# ------------------------------------------------------------------------------------------ functions and output
def load_function(spec: str) -> Callable:
    """The function that `file.py:function` names."""
    import importlib.util

    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"{spec}: no such file; expected file.py:function")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{spec}: {file} can't be loaded ({type(error).__name__}: {error})") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"{spec}: {file} has no function {name}")
    return getattr(module, name)


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under a temporary name, then rename: a killed run leaves the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; sets become sorted lists."""
    text = json.dumps(
        value, indent=1, ensure_ascii=False, default=lambda v: sorted(v) if isinstance(v, set) else str(v)
    )
    write_file(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def without_nan(value: Any) -> Any:
    """The same dict with null for what could not be estimated, as JSON wants it."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
