"""eval/generate.py: the same text as transformers alone, samples that nothing but their key decides, resuming, servers.

The independent references are transformers' own `generate`, one row at a time and without padding, PEFT's merged model,
and chi-square tests against the softmax. The server is a scripted one on loopback.
"""

import doctest
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, read_jsonl, write_jsonl
from scipy import stats
from transformers import AutoTokenizer

from eval import generate

KEY = "sk-a-secret-that-no-file-may-hold"


@pytest.fixture
def respond(sft_run: Path, world: Path, tmp_path: Path) -> Callable[..., list[dict]]:
    """respond(**flags) -> rows: generate.main on the small world, 24 prompts, 12 tokens unless told otherwise."""

    def start(**flags: Any) -> list[dict]:
        settings: dict[str, Any] = {
            "model": str(sft_run), "dataset": str(world / "prompts.jsonl"), "output": str(tmp_path / "out.jsonl"),
            "max_response_length": 12, "batch_size": 8,
        }  # fmt: skip
        generate.main(generate.Args(**{**settings, **flags}))
        return read_jsonl(Path((settings | flags)["output"]))

    return start


def summary(path: Path) -> dict:
    """The JSON beside a file of responses."""
    return json.loads(path.with_suffix(".json").read_text())


def plain_model(folder: Path) -> tuple[Any, Any]:
    """(model with its adapter, tokenizer) of a run folder, by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder)).eval(), AutoTokenizer.from_pretrained(folder)


def texts(rows: list[dict]) -> dict[tuple, str]:
    """(id, sample) -> response."""
    return {(row["id"], row.get("sample", 0)): row["response"] for row in rows}


# ------------------------------------------------------------------------------------------------------ local models
def test_doctests() -> None:
    """The numbers in the docstrings."""
    assert doctest.testmod(generate).failed == 0 < doctest.testmod(generate).attempted


def test_greedy_is_that_of_transformers(respond: Callable, sft_run: Path, world: Path) -> None:
    """Every response, end and length is what transformers' own generate gives, row by row and without padding."""
    rows = respond()
    model, tokenizer = plain_model(sft_run)
    reasons = set()
    for prompt, row in zip(read_jsonl(world / "prompts.jsonl"), rows, strict=True):
        messages = [{"role": "user", "content": prompt["prompt"]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        ended = tokenizer.eos_token_id in out
        assert row["response"] == tokenizer.decode(out, skip_special_tokens=True)
        assert (row["finish_reason"], row["tokens"]) == ("stop" if ended else "length", len(out))
        reasons.add(row["finish_reason"])
        assert {**prompt, "model": "sft"}.items() <= row.items(), "the dataset's columns stay"
        assert list(row)[:6] == ["id", "prompt", "response", "model", "finish_reason", "tokens"]
    assert reasons == {"stop", "length"}, "the small world shows both"


def test_run_folder_equals_merged_model(respond: Callable, sft_run: Path, tmp_path: Path) -> None:
    """A run folder writes what its merged model writes; and its base, without the adapter, something else."""
    model, tokenizer = plain_model(sft_run)
    base = json.loads((sft_run / "adapter_config.json").read_text())["base_model_name_or_path"]
    merged = tmp_path / "merged"
    model.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    ours = texts(respond())
    assert texts(respond(model=str(merged), output=str(tmp_path / "merged.jsonl"))) == ours
    assert texts(respond(model=base, output=str(tmp_path / "base.jsonl"))) != ours


def test_template_of_the_folder(respond: Callable, sft_run: Path, tmp_path: Path) -> None:
    """The run folder's chat template counts, and --chat_template before it."""
    folder = tmp_path / "other"
    shutil.copytree(sft_run, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    ours = texts(respond(model=str(folder)))
    as_text = texts(respond(chat_template="text", output=str(tmp_path / "text.jsonl")))
    assert ours == as_text != texts(respond(output=str(tmp_path / "own.jsonl")))


def test_tiny_is_the_default(respond: Callable, tmp_path: Path) -> None:
    """tiny/sft answers: its base is found beside it, whatever the current folder is."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", read_jsonl(ROOT / "tiny" / "prompts_eval.jsonl")[:6])
    rows = respond(model=generate.Args().model, dataset=str(prompts), max_response_length=64)
    assert Path(generate.Args().dataset).is_file() and {row["model"] for row in rows} == {"sft"}
    assert [row["finish_reason"] for row in rows] == ["stop"] * 6


def test_generation_config_of_the_model_is_not_used(respond: Callable, base: Path, tmp_path: Path) -> None:
    """A model whose own settings ask for top-k and a penalty answers as one without; its stop tokens stay."""
    folder = tmp_path / "strict"
    shutil.copytree(base, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    settings = {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "min_new_tokens": 12, "suppress_tokens": [5]}
    (folder / "generation_config.json").write_text(json.dumps({**config, **settings}))
    ours = respond(model=str(base), temperature=1.0)
    theirs = respond(model=str(folder), temperature=1.0, output=str(tmp_path / "strict.jsonl"))
    assert texts(theirs) == texts(ours)
    first = Counter(text.split()[0] for text in texts(ours).values() if text.split()).most_common(1)[0][0]
    token = AutoTokenizer.from_pretrained(base)(" " + first)["input_ids"][-1]
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [1, token]}))
    stopped = respond(model=str(folder), temperature=1.0, output=str(tmp_path / "stopped.jsonl"))
    assert sum(row["tokens"] for row in stopped) < sum(row["tokens"] for row in ours)


# ---------------------------------------------------------------------------------------------------------- sampling
def test_batch_size_and_order_change_nothing(respond: Callable, world: Path, tmp_path: Path) -> None:
    """Samples in batches of 1, 8 and 20, and of the dataset in reverse: the same text for each (id, sample)."""
    rows = read_jsonl(world / "prompts.jsonl")[:10]
    data, backward = write_jsonl(tmp_path / "ten.jsonl", rows), write_jsonl(tmp_path / "backward.jsonl", rows[::-1])
    flags: dict[str, Any] = {"temperature": 1.0, "samples_per_prompt": 2, "dataset": str(data)}
    ours = respond(**flags)
    other: dict[str, Any]
    for name, other in (("1", {"batch_size": 1}), ("20", {"batch_size": 20}), ("back", {"dataset": str(backward)})):
        assert texts(respond(output=str(tmp_path / f"{name}.jsonl"), **{**flags, **other})) == texts(ours), name
    assert len({row["response"] for row in ours}) > 10, "two samples of a prompt differ"
    assert texts(respond(output=str(tmp_path / "seed.jsonl"), seed=1, **flags)) != texts(ours)


def test_sampler_distribution() -> None:
    """20,000 draws, keyed as in a run, against softmax(logits / T): chi-square; positions and samples independent."""
    logits, temperature = torch.tensor([0.0, 1.0, -2.0, 2.0, float("-inf")]), 0.7
    expected = (logits.double() / temperature).softmax(-1).numpy()[:4] * 10_000
    uniform = torch.from_numpy(np.stack([generate.uniforms(3, i, i % 2, 2) for i in range(10_000)]))
    draw = generate.Draw(uniform, width=5, temperature=temperature)
    drawn = []
    for position in (0, 1):
        scores = draw(torch.zeros(10_000, 5 + position), logits.expand(10_000, 5))
        assert ((scores == 0).sum(-1) == 1).all() and ((scores == -torch.inf).sum(-1) == 4).all()
        drawn.append(scores.argmax(-1).numpy())
        counts = np.bincount(drawn[-1], minlength=5)
        assert counts[4] == 0 and stats.chisquare(counts[:4], expected).pvalue > 1e-3
    assert stats.chi2_contingency(np.histogram2d(drawn[0], drawn[1], bins=4)[0]).pvalue > 1e-3
    assert stats.chi2_contingency(np.histogram2d(np.arange(10_000) % 2, drawn[0], bins=(2, 4))[0]).pvalue > 1e-3
    edge = generate.inverse_cdf(torch.full((2, 3), -5.0), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0)
    assert edge.tolist() == [0, 2], "never past the last token"


def test_first_tokens_have_the_probabilities_of_the_model(
    respond: Callable, sft_run: Path, world: Path, tmp_path: Path
) -> None:
    """A run of 1,500 samples of one token at temperature 1.3: frequencies of the texts against the model's softmax."""
    row = read_jsonl(world / "prompts.jsonl")[0]
    data = write_jsonl(tmp_path / "one.jsonl", [row])
    flags: dict[str, Any] = {"dataset": str(data), "max_response_length": 1, "batch_size": 500}
    rows = respond(temperature=1.3, samples_per_prompt=1500, **flags)
    assert [r["sample"] for r in rows] == list(range(1500))
    model, tokenizer = plain_model(sft_run)
    messages = [{"role": "user", "content": row["prompt"]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        p = (model(**ids).logits[0, -1].double() / 1.3).softmax(-1).numpy()
    shares: Counter[str] = Counter()
    for token in range(len(p)):
        shares[tokenizer.decode([token], skip_special_tokens=True)] += p[token]
    common = [text for text, share in shares.items() if share * 1500 >= 5]
    seen = Counter(r["response"] for r in rows)
    observed = [seen[text] for text in common] + [1500 - sum(seen[text] for text in common)]
    expected = [shares[text] * 1500 for text in common]
    assert len(common) > 5
    assert stats.chisquare(observed, [*expected, 1500 - sum(expected)]).pvalue > 1e-3


# ---------------------------------------------------------------------------------------------------------- resuming
def kill_after(monkeypatch: pytest.MonkeyPatch, *batches: int) -> list:
    """Make the next runs die after so many batches; returns the ids that are generated from now on, per run."""
    original, runs = generate.generate_batches, []

    def dying(tasks: list, *rest: Any) -> Iterator:
        ids: list = []
        runs.append(ids)
        for n, batch in enumerate(original(tasks, *rest)):
            ids += [(task.id, task.sample) for task, _ in batch]
            yield batch
            if len(runs) <= len(batches) and n + 1 == batches[len(runs) - 1]:
                raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate_batches", dying)
    return runs


@pytest.mark.parametrize("cut", [0, 40])
def test_killed_run_resumes(
    respond: Callable, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """A run killed after 2 of 4 batches, `cut` bytes of its last line lost, and killed again after one more: resumed,
    nothing is generated twice but what was lost, and the file equals the uninterrupted one to the byte; once more
    generates nothing."""
    data = write_jsonl(tmp_path / "eight.jsonl", read_jsonl(world / "prompts.jsonl")[:8])
    flags: dict[str, Any] = {"temperature": 1.0, "samples_per_prompt": 2, "batch_size": 4, "dataset": str(data)}
    respond(output=str(tmp_path / "whole.jsonl"), **flags)
    runs, path, torn = kill_after(monkeypatch, 2, 1), tmp_path / "out.jsonl", cut > 0
    with pytest.raises(KeyboardInterrupt):
        respond(**flags)
    assert not summary(path)["finished"] and len(read_jsonl(path)) == 8
    path.write_bytes(path.read_bytes()[: -cut or None])
    with pytest.raises(KeyboardInterrupt):
        respond(**flags)
    assert len(read_jsonl(path)) == 12 - torn
    rows = respond(**flags)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    kept = [*runs[0][: 8 - torn], *runs[1], *runs[2]]
    assert len(kept) == len(set(kept)) == summary(path)["n"] == len(rows) == 16 and summary(path)["finished"]
    respond(**flags)
    assert len(runs) == 3 and path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
def test_kill_9_resumes(respond: Callable, sft_run: Path, world: Path, tmp_path: Path) -> None:
    """kill -9 as soon as the first rows are on disk, three times: the resumed file equals the uninterrupted one."""
    flags: dict[str, Any] = {"temperature": 1.0, "batch_size": 1, "samples_per_prompt": 8}
    respond(output=str(tmp_path / "whole.jsonl"), **flags)
    path, lines = tmp_path / "out.jsonl", 0
    command = [sys.executable, str(ROOT / "eval" / "generate.py"), "--model", str(sft_run), "--output", str(path)]
    command += ["--dataset", str(world / "prompts.jsonl"), "--max_response_length", "12"]
    for _ in range(3):
        process = subprocess.Popen([*command, *(str(x) for k, v in flags.items() for x in (f"--{k}", v))])
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines + 3):
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert lines < (lines := path.read_bytes().count(b"\n")) < 24 * 8, "killed in the middle, and nothing is lost"
    respond(**flags)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_resume_refuses_what_does_not_fit(respond: Callable, sft_run: Path, world: Path, tmp_path: Path) -> None:
    """Other settings, another model, another prompt, a line that is no row, an id twice, rows of unknown origin."""
    rows, path = respond(), tmp_path / "out.jsonl"
    data = write_jsonl(
        tmp_path / "changed.jsonl", [{**r, "prompt": "Other?"} for r in read_jsonl(world / "prompts.jsonl")]
    )
    for flags, message in (
        ({"temperature": 0.5}, "temperature: 0.0, now 0.5"),
        ({"max_response_length": 13, "seed": 5}, "seed: 0, now 5.*max_response_length: 12, now 13"),
        ({"chat_template": "text"}, "chat_template: "),
        ({"dataset": str(data)}, r"out\.jsonl, line 1: id .* is not asked for, or with another prompt"),
    ):
        with pytest.raises(generate.UserError, match=message):
            respond(**flags)
        assert read_jsonl(path) == rows
    for line, message in ((json.dumps(rows[2]), "line 4: id .* is there twice"), ("[1]", "line 4: not a response row")):
        write_jsonl(path, [*map(json.dumps, rows[:3]), line])
        with pytest.raises(generate.UserError, match=message):
            respond()
    weights, content = sft_run / "adapter_model.safetensors", path.read_bytes()
    folder = tmp_path / "sft"
    shutil.copytree(sft_run, folder)
    (folder / weights.name).write_bytes(weights.read_bytes())  # the same folder, trained again
    with pytest.raises(generate.UserError, match="weights: "):
        respond(model=str(folder))
    path.with_suffix(".json").unlink()
    with pytest.raises(generate.UserError, match="no .*out.json that says how"):
        respond()
    assert path.read_bytes() == content


# --------------------------------------------------------------------------------------------------------------- data
def test_bad_rows_are_counted(respond: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Bad rows are counted by reason and shown; what stays: ids of both kinds, message lists, rows without an id."""
    rows: list = [
        {"prompt": "Which sound belongs to the raven?", "id": 5, "note": "é"},
        {"prompt": [{"role": "user", "content": "What does the fox eat?"}], "id": "5", "response": "old", "tokens": 1},
        '{"prompt": "half a li',
        {"prompt": "word " * 600, "id": "long"},
        {"prompt": "  ", "id": "blank"},
        {"id": "none"},
        {"prompt": 7, "id": "number"},
        {"prompt": "And the otter?"},
    ]
    found = respond(dataset=str(write_jsonl(tmp_path / "rows.jsonl", rows)), max_prompt_length=100)
    assert [row["id"] for row in found] == [5, "5", 7]
    assert found[0]["note"] == "é" and found[1]["prompt"] == rows[1]["prompt"] and found[1]["response"] != "old"
    lost = {
        "not a JSON object": 1,
        "prompt over 100 tokens": 1,
        "no prompt": 2,
        "neither a string nor a message list": 1,
    }
    assert summary(tmp_path / "out.jsonl")["lost"] == lost
    shown = capsys.readouterr().out
    assert "1 prompt over 100 tokens (first: 4" in shown and "columns response, tokens of the dataset are not" in shown
    with pytest.raises(generate.UserError, match="no usable row; columns found: id, prompt; expected question"):
        respond(dataset=str(write_jsonl(tmp_path / "c.jsonl", [{"id": 1, "prompt": "a"}])), prompt_column="question")
    with pytest.raises(generate.UserError, match="id 'x' is in row 1 and in row 3"):
        respond(dataset=str(write_jsonl(tmp_path / "d.jsonl", [{"id": i, "prompt": "a"} for i in "xyx"])))


def test_prompt_and_response_fit_the_model(respond: Callable, sft_run: Path, world: Path, tmp_path: Path) -> None:
    """Prompts that leave no room for the response in the model's 512 positions are dropped, not cut or overrun."""
    _, tokenizer = plain_model(sft_run)
    messages = [[{"role": "user", "content": row["prompt"]}] for row in read_jsonl(world / "prompts.jsonl")]
    lengths = [len(tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"]) for m in messages]
    limit = int(np.median(lengths))
    rows = respond(max_response_length=512 - limit)
    over = sum(length > limit for length in lengths)
    assert 0 < over < 24 and len(rows) == 24 - over
    assert summary(tmp_path / "out.jsonl")["lost"] == {f"prompt over {limit} tokens": over}
    with pytest.raises(generate.UserError, match="--max_response_length 512: the model has 512 positions"):
        respond(max_response_length=512)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 0}, "--batch_size 0: expected 1 or more"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"samples_per_prompt": 2}, "--samples_per_prompt above 1 with --temperature 0"),
        ({"output": "out.txt"}, "--output out.txt: expected a .jsonl"),
        ({"dataset": "x/p.json", "output": "x/p.jsonl"}, "a name other than the dataset's"),
        ({"base_url": "http://localhost:1/v1"}, "--base_url needs --model"),
        ({"base_url": "http://me:secret@host/v1", "model": "m"}, "no password"),
        ({"model": "runs/nowhere"}, "runs/nowhere"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all: no such folder"),
        ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl: no such"),
    ],
)
def test_mistakes_are_one_line(flags: dict, message: str, sft_run: Path, tmp_path: Path) -> None:
    """Each mistake of the user is a UserError that says where, in one line."""
    usual = {} if "base_url" in flags else {"model": str(sft_run)}
    args = generate.Args(**{"output": str(tmp_path / "o.jsonl"), **usual, **flags})
    with pytest.raises(generate.UserError, match=message) as error:
        generate.main(args)
    assert "\n" not in str(error.value)


def test_reward_models_are_refused(reward_run: Path, respond: Callable) -> None:
    """A reward model's folder is no language model."""
    with pytest.raises(generate.UserError, match="a reward model gives scores and writes no text"):
        respond(model=str(reward_run))


def test_copied_alone(sft_run: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder alone works; its defaults, which are not there, are one clear line."""
    alone, rows = tmp_path / "alone" / "eval", read_jsonl(world / "prompts.jsonl")
    shutil.copytree(ROOT / "eval", alone, ignore=shutil.ignore_patterns("__pycache__"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "eval"]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.spec_from_file_location("alone", alone / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not folder.startswith(str(ROOT))])
    monkeypatch.setitem(sys.modules, "alone", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(alone)
    args = {"model": str(sft_run), "dataset": str(world / "prompts.jsonl"), "max_response_length": 2}
    assert module.main(module.Args(**args))["n"] == len(rows)
    assert len(read_jsonl(alone / "runs" / "generate" / "responses.jsonl")) == len(rows)
    with pytest.raises(module.UserError, match="tiny/sft: no such folder"):
        module.main(module.Args())


# ------------------------------------------------------------------------------------------------------------- server
class Scripted(BaseHTTPRequestHandler):
    """An OpenAI-compatible server: what the prompt says happens, once for "429 once", always for "400 always"."""

    seen: list[dict] = []
    keys: set[str | None] = set()
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Silence."""

    def send(self, code: int, body: bytes, length: int | None = None, **headers: str) -> None:
        """One reply; a `length` beyond the body's cuts it off in the middle."""
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length or len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def do_POST(self) -> None:
        """One chat completion."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][-1]["content"]
        again = any(r["messages"][-1]["content"] == prompt and r["seed"] == request["seed"] for r in self.seen)
        self.seen.append(request)
        self.keys.add(self.headers["Authorization"])
        what, _, when = prompt.partition(" ")
        choice = {"index": 0, "message": {"role": "assistant", "content": f"Re: {prompt}"}, "finish_reason": "stop"}
        if what == "length":
            choice["finish_reason"] = "length"
        usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
        body = json.dumps(reply).encode()
        if not when.startswith("always") and (again or when != "once"):
            return self.send(200, body)
        if what.isdigit():
            return self.send(int(what), b'{"error": {"message": "no"}}', retry_after_ms="1")
        if what == "hang-up":
            self.close_connection = True
            return None
        if what == "slow":
            time.sleep(1.0)
            return None
        if what == "truncated":
            return self.send(200, body[: len(body) // 2], len(body))
        bodies = {"empty": b"", "null": b"null", "none": b'{"choices": []}', "html": b"<html>", "half": body[:30]}
        return self.send(200, bodies[what])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """base_url of a scripted server; the key is in the environment; the client's back-off is short."""
    import openai

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    Scripted.seen, Scripted.keys = [], set()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_address[1]}/v1"
    http.shutdown()
    thread.join()
    http.server_close()


def ask_server(url: str, prompts: list[str], folder: Path, **flags: Any) -> dict:
    """generate.main on the scripted server; ids are the prompts' numbers."""
    data = write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt, "id": i} for i, prompt in enumerate(prompts)])
    args: dict[str, Any] = {"model": "m", "base_url": url, "dataset": str(data), "output": str(folder / "out.jsonl")}
    return generate.main(generate.Args(**{**args, "concurrency": 3, "max_retries": 2, "timeout": 0.5, **flags}))


def test_server_mishaps_are_retried(server: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """429, 500, hang-ups, truncated and slow replies once each: retried, every row there once, in order; the key is
    sent, and is in no file and no output."""
    once = ["429 once", "500 once", "503 once", "hang-up once", "truncated once", "slow once"]
    result = ask_server(server, [*once, "fine", "length mark"], tmp_path)
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row["response"] for row in rows] == [f"Re: {row['prompt']}" for row in rows]
    assert [row["id"] for row in rows] == list(range(8)) and {row["model"] for row in rows} == {"m"}
    assert [row["finish_reason"] for row in rows] == ["stop"] * 7 + ["length"] and {r["tokens"] for r in rows} == {7}
    calls = Counter(request["messages"][0]["content"] for request in Scripted.seen)
    assert calls == {**dict.fromkeys(once, 2), "fine": 1, "length mark": 1}
    assert result["finished"] and result["lost"] == {} and Scripted.keys == {f"Bearer {KEY}"}
    written = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert KEY.encode() not in written and KEY not in capsys.readouterr().out


def test_server_failures_are_counted_and_asked_again(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails to the end is counted by reason and written nowhere; the next run asks for just that."""
    bad = [f"{what} always" for what in ("400", "500", "empty", "null", "none", "html", "half", "slow", "hang-up")]
    with pytest.raises(generate.UserError, match="run the same command again to repeat just these"):
        ask_server(server, ["fine", *bad, "also"], tmp_path, max_retries=0)
    found = summary(tmp_path / "out.jsonl")
    malformed = found["lost"].pop("malformed reply")
    assert found["lost"] == {"HTTP 400": 1, "HTTP 500": 1, "time-out": 1, "no connection": 1} and malformed == 5
    assert [row["response"] for row in read_jsonl(tmp_path / "out.jsonl")] == ["Re: fine", "Re: also"]
    assert not found["finished"] and found["n"] == 2
    asked = len(Scripted.seen)
    monkeypatch.setattr(Scripted, "do_POST", answer_all)
    assert ask_server(server, ["fine", *bad, "also"], tmp_path)["finished"]
    assert len(Scripted.seen) == asked + len(bad)
    assert [row["id"] for row in read_jsonl(tmp_path / "out.jsonl")] == list(range(11))


def answer_all(self: Scripted) -> None:
    """A server that has recovered."""
    self.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
    choice = {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
    self.send(200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode())


def test_server_that_refuses_all_is_left(server: str, tmp_path: Path) -> None:
    """Ten failures in a row end the run long before 200 prompts are asked for; what was there is kept."""
    with pytest.raises(generate.UserError, match=r"10 requests in a row failed: 10 HTTP 401 .*OPENAI_API_KEY") as e:
        ask_server(server, [f"401 always {i}" for i in range(200)], tmp_path)
    assert 10 <= len(Scripted.seen) < 30 and KEY not in str(e.value)


def test_server_samples_have_seeds(server: str, tmp_path: Path) -> None:
    """Each sample is asked for with a seed, a function of (seed, id, sample); temperature and length are passed on."""
    ask_server(server, ["a", "b"], tmp_path, samples_per_prompt=3, temperature=0.5, max_response_length=9)
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [(row["id"], row["sample"]) for row in rows] == [(i, s) for i in (0, 1) for s in (0, 1, 2)]
    seeds = {request["seed"] for request in Scripted.seen}
    assert len(seeds) == 6 and all(0 <= seed < 2**31 for seed in seeds)
    assert {(r["temperature"], r["max_tokens"], r["model"]) for r in Scripted.seen} == {(0.5, 9, "m")}
    Scripted.seen = []
    other = tmp_path / "again"
    other.mkdir()
    ask_server(server, ["a", "b"], other, samples_per_prompt=3, temperature=0.5, max_response_length=9)
    assert {request["seed"] for request in Scripted.seen} == seeds
