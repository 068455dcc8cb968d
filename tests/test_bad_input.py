"""What users get wrong: bad rows are counted, everything else is one clear line and an exit code that is not 0."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, read_jsonl, tiny_llama, write_jsonl
from safetensors.torch import load_file, save_file

import ppo
import sft

Run = Callable[..., Path]
GOOD = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]}
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def one_line(error: BaseException) -> str:
    """The message, which must be one line that says something."""
    text = str(error)
    assert "\n" not in text and len(text) > 20
    return text


def refused(run: Run, *patterns: str, **flags: Any) -> str:
    """run(**flags) ends in a UserError of one line that holds every pattern."""
    with pytest.raises((ppo.UserError, sft.UserError)) as caught:
        run(**flags)
    text = one_line(caught.value)
    assert all(pattern in text for pattern in patterns), text
    return text


# ------------------------------------------------------------------------------------------------------- bad rows
def test_bad_sft_rows_are_counted_by_reason(run_sft: Run, world: Path, tmp_path: Path, capsys: Any) -> None:
    """Each kind once among good rows: the run goes on; each reason is said with its count and its first row."""
    rows: list[Any] = read_jsonl(world / "sft.jsonl")[:12]
    user = {"role": "user", "content": "Where?"}
    bad: list[Any] = [
        '{"messages": [{"role": "us',  # 13: a line cut in half
        "[1, 2]",  # 14: JSON, but no object
        {"messages": None},  # 15
        {"text": ""},  # 16
        {"messages": [user]},  # 17
        {"messages": [user, {"role": "assistant", "content": "  "}]},  # 18
        {"messages": "hello"},  # 19: a string is one user message: no assistant
        {"messages": [user, {"role": "assistant", "content": "word " * 900}]},  # 20
        {"messages": [{"role": "user"}]},  # 21
        {"prompt": "Where?", "completion": None},  # 22
        {"prompt": 5, "completion": "There."},  # 23
        {"unrelated": 1},  # 24
        {"messages": [{"role": "assistant", "content": "First."}]},  # 25
        {"messages": []},  # 26
        {"prompt": "Where?", "completion": [{"role": "assistant"}]},  # 27
        {"prompt": "Where?", "completion": ["There."]},  # 28
        {"prompt": [], "completion": "There."},  # 29
        {"messages": [user, {"role": "assistant", "content": ["parts"]}]},  # 30
    ]
    run_sft(dataset=str(write_jsonl(tmp_path / "mixed.jsonl", [*rows, *bad])), max_steps=1)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("data: "))
    assert "12 examples from 30 rows" in line and f"{tmp_path}/mixed.jsonl" in line
    for reason in (
        "2 not a JSON object (first: row 13",
        "3 a column is missing or null (first: row 15",
        "1 empty text (first: row 16",
        "no assistant turn (first: row 17",
        "1 over 536 tokens (first: row 20",
    ):
        assert reason in line


def test_bad_prompts_are_counted_by_reason(run_ppo: Run, world: Path, tmp_path: Path, capsys: Any) -> None:
    """The same for ppo.py: empty, null, missing, over length, no text at all."""
    rows: list[Any] = read_jsonl(world / "prompts.jsonl")[:12]
    bad: list[Any] = [
        '{"prompt": "hal',  # 13
        {"prompt": ""},  # 14
        {"prompt": "   "},  # 15
        {"prompt": None},  # 16
        {"text": "no prompt"},  # 17
        {"prompt": "word " * 900},  # 18
        {"prompt": 7},  # 19
        {"prompt": []},  # 20
        {"prompt": [{"role": "user", "content": ""}]},  # 21
    ]
    run_ppo(dataset=str(write_jsonl(tmp_path / "mixed.jsonl", [*rows, *bad])), max_steps=1)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("data: "))
    assert "12 examples from 21 rows" in line
    for reason in (
        "1 not a JSON object (first: row 13",
        "empty prompt (first: row 14",
        "2 a column is missing or null (first: row 16",
        "1 prompt over 512 tokens (first: row 18",
        "1 neither a string nor a message list (first: row 19: 7)",
    ):
        assert reason in line


def test_the_boundary_of_a_bad_template_is_shown(run_sft: Run, tmp_path: Path) -> None:
    """Trap 17: no usable row because the prompt is no prefix: both sides of the boundary are in the line."""
    (tmp_path / "think.jinja").write_text(
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    refused(
        run_sft, "no usable row of 24", "no prefix of prompt + response", "the prompt has '<think>'",
        "with its response '", chat_template=str(tmp_path / "think.jinja"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "patterns"),
    [
        ([], ["no usable row of", "columns found: none", "expected: messages | prompt + completion | text"]),
        ([{"question": "a", "answer": "b"}] * 3, ["no usable row of 3", "columns found: answer, question"]),
        (['{"messages": [{"role"'], ["no usable row of 1", "1 not a JSON object (first: row 1: "]),
        (
            [{"messages": None}, {"text": None}],
            ["no usable row of 2", "columns found: messages, text", "2 a column is"],
        ),
    ],
)
def test_no_usable_row_is_an_error(rows: list, patterns: list[str], run_sft: Run, tmp_path: Path) -> None:
    """The file, how many rows, the columns found and expected, and why the rows can't be used."""
    file = write_jsonl(tmp_path / "bad.jsonl", rows)
    refused(run_sft, str(file), *patterns, dataset=str(file))


def test_missing_prompt_column(run_ppo: Run, tmp_path: Path) -> None:
    """ppo.py names its own column."""
    file = write_jsonl(tmp_path / "bad.jsonl", [{"question": "Where?"}])
    refused(run_ppo, "columns found: question; expected: prompt", dataset=str(file))


def test_a_bad_held_out_set_is_an_error_too(run_sft: Run, tmp_path: Path) -> None:
    """--eval_dataset is read as strictly."""
    file = write_jsonl(tmp_path / "bad.jsonl", [{"question": "Where?"}])
    refused(run_sft, str(file), "columns found: question", eval_dataset=str(file))


# ------------------------------------------------------------------------------------------------------ data files
@pytest.mark.parametrize("suffix", ["json", "parquet", "jsonl"])
def test_every_file_format_is_read(suffix: str, tmp_path: Path, capsys: Any) -> None:
    """The same rows from .jsonl, .json and .parquet; a null column of another row does no harm."""
    rows: list[dict] = [GOOD, {"text": "Some words."}, GOOD]
    file = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        from datasets import Dataset

        Dataset.from_list([{"messages": r.get("messages"), "text": r.get("text")} for r in rows]).to_parquet(str(file))
    elif suffix == "json":
        file.write_text(json.dumps(rows))
    else:
        write_jsonl(file, rows)
    seen = sft.encode_rows(str(file), "train", [("messages",), ("text",)], lambda row: [row])
    assert [row["_row"] for row in seen] == [1, 2, 3]
    assert seen[0]["messages"] == seen[2]["messages"] == GOOD["messages"] and seen[1]["text"] == "Some words."
    assert "3 examples from 3 rows" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.json", "absent.parquet", "folder", "data.csv", "no/such-set"])
def test_a_dataset_that_is_not_there(name: str, run_sft: Run, tmp_path: Path) -> None:
    """Missing file, folder, unknown format, a hub id without network: one line with the name."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "data.csv").write_text("prompt,completion\na,b\n")
    given = name if "/" in name else str(tmp_path / name)
    refused(run_sft, given, dataset=given)


@pytest.mark.parametrize("suffix", ["json", "parquet"])
@pytest.mark.parametrize("content", [b"", b'[{"messages": [{"ro', b"\xff\xfe\x00garbage"])
def test_a_damaged_data_file(suffix: str, content: bytes, run_sft: Run, tmp_path: Path) -> None:
    """Empty, cut off or garbage: one line with the name."""
    file = tmp_path / f"data.{suffix}"
    file.write_bytes(content)
    refused(run_sft, str(file), dataset=str(file))


def test_bytes_that_are_no_text_are_bad_rows(tmp_path: Path, capsys: Any) -> None:
    """A line that is not UTF-8 is a bad row like any other."""
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "caf\xe9"}\n{"text": "fine"}\n')
    assert len(sft.encode_rows(str(file), "train", [("text",)], lambda row: [row])) == 1
    assert "1 not a JSON object (first: row 1" in capsys.readouterr().out


@pytest.mark.parametrize("eval_size", [0.99, 24, 500])
def test_too_much_held_out(eval_size: float, run_sft: Run) -> None:
    """A split that leaves nothing to train on says what it holds out."""
    refused(run_sft, f"--eval_size {eval_size}", "leaves none to train on", eval_size=eval_size)


# --------------------------------------------------------------------------------------------------------- models
def test_a_model_that_is_not_there(run_sft: Run, run_ppo: Run, tmp_path: Path, reward_file: str) -> None:
    """A path and a hub id that can't be had, for both scripts, and a folder with no model in it."""
    (tmp_path / "empty").mkdir()
    for given in (str(tmp_path / "absent"), "no-such/model", str(tmp_path / "empty")):
        refused(run_sft, given, model=given)
        refused(run_ppo, given, model=given, reward_fn=reward_file)


def test_a_reward_model_that_is_not_there(run_ppo: Run, tmp_path: Path) -> None:
    """The same for --reward_model."""
    for given in (str(tmp_path / "absent"), "no-such/model"):
        refused(run_ppo, given, reward_model=given)


@pytest.fixture
def changed(sft_run: Path, reward_run: Path, tmp_path: Path) -> Callable[[str], Path]:
    """changed("sft" | "reward") -> a copy of that run folder that may be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree({"sft": sft_run, "reward": reward_run}[name], tmp_path / f"changed_{name}"))

    return copy


def test_an_adapter_whose_base_has_moved(run_ppo: Run, changed: Any, reward_file: str) -> None:
    """adapter_config.json names a folder that is gone: the line names both."""
    folder = changed("sft")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/gone/base"}))
    refused(
        run_ppo, f"{folder}/adapter_config.json", "/gone/base is not there", model=str(folder), reward_fn=reward_file
    )


def test_an_unfinished_run_folder(run_ppo: Run, changed: Any, reward_file: str) -> None:
    """A config without weights, and a folder that a killed run left before its first result."""
    folder = changed("sft")
    (folder / "adapter_model.safetensors").unlink()
    refused(run_ppo, "adapter_model.safetensors is missing", model=str(folder), reward_fn=reward_file)
    (folder / "adapter_config.json").unlink()
    refused(run_ppo, str(folder), model=str(folder), reward_fn=reward_file)


def test_a_damaged_adapter_file(run_ppo: Run, changed: Any, reward_file: str) -> None:
    """Half of the weights: named, not a traceback from the reader."""
    file = changed("sft") / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    refused(run_ppo, str(file.parent), model=str(file.parent), reward_fn=reward_file)


def test_a_reward_folder_without_a_head(run_ppo: Run, changed: Any, sft_run: Path) -> None:
    """An SFT folder given as reward model, and a head that was lost: never a random head instead."""
    refused(run_ppo, f"{sft_run}: no reward head", "score.weight is missing", reward_model=str(sft_run))
    folder = changed("reward")
    weights = load_file(folder / "adapter_model.safetensors")
    weights[ppo.HEAD_KEY] = torch.zeros(2, 64)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    refused(run_ppo, "the head is (2, 64), this base needs (1, 64)", reward_model=str(folder))


@pytest.mark.parametrize("part", ["head", "adapter", "mean", "template"])
def test_a_changed_reward_model_is_refused(part: str, run_ppo: Run, changed: Any) -> None:
    """Trap 21: whatever changes the scores shows in the canaries: head, adapter, mean, chat template."""
    folder = changed("reward")
    weights = load_file(folder / "adapter_model.safetensors")
    if part == "head":
        weights[ppo.HEAD_KEY] = weights[ppo.HEAD_KEY] * 1.01
    elif part == "adapter":
        name = next(k for k in weights if "lora_B" in k)
        weights[name] = weights[name] + 0.05
    elif part == "mean":
        card = json.loads((folder / "reward.json").read_text())
        (folder / "reward.json").write_text(json.dumps({**card, "mean": card["mean"] + 0.01}))
    else:
        (folder / "chat_template.jinja").write_text(ppo.PLAIN_TEMPLATE)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    refused(run_ppo, str(folder), "the scores in reward.json do not reproduce", reward_model=str(folder))


def move(folder: Path, base: Path) -> None:
    """Let an adapter name another base."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))


def test_a_changed_base_is_refused(run_ppo: Run, base: Path, changed: Any, tmp_path: Path) -> None:
    """Policy and reward name one folder whose weights were replaced meanwhile: the canaries notice."""
    other = Path(shutil.copytree(base, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    weights[name] = weights[name] + 0.05 * torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    folders = {"model": changed("sft"), "reward_model": changed("reward")}
    for folder in folders.values():
        move(folder, other)
    refused(run_ppo, "do not reproduce", **{flag: str(folder) for flag, folder in folders.items()})


def test_bases_of_one_shape_have_different_identities(tmp_path: Path) -> None:
    """Trap 24: a fully fine-tuned model has its base's config and file sizes; it is another base all the same.

    With more than about 40 tensors the file's header alone is longer than a few kilobytes.
    """
    model = tiny_llama(97, 1, 0)
    model.config.num_hidden_layers = 8
    model = type(model)(model.config)
    model.save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    for p in model.parameters():
        p.data += 1e-3
    model.save_pretrained(tmp_path / "two")
    one, copy, two = (ppo.base_identity(str(tmp_path / name)) for name in ("one", "copy", "two"))
    assert one == copy != two


def test_canary_limits() -> None:
    """1e-4 in fp32, 0.05 in NF4; across precisions rank correlation 0.95 and a shift below 0.25: both sides of each."""
    card = {"quant": "none", "dtype": "float32", "canaries": [{"score": float(i)} for i in range(6)]}
    same = [float(i) for i in range(6)]
    for shift, quant, dtype, passes in (
        (0.9e-4, "none", "float32", True),
        (1.2e-4, "none", "float32", False),
        (0.2, "nf4", "bfloat16", True),
        (0.3, "nf4", "bfloat16", False),
    ):
        scores = [s + shift for s in same]
        if passes:
            ppo.check_canaries(scores, card, quant, dtype, "here")
        else:
            with pytest.raises(ppo.UserError, match="here: the scores in reward.json do not reproduce"):
                ppo.check_canaries(scores, card, quant, dtype, "here")
    nf4 = {**card, "quant": "nf4", "dtype": "bfloat16"}
    ppo.check_canaries([s + 0.04 for s in same], nf4, "nf4", "bfloat16", "here")
    for wrong in ([s + 0.06 for s in same], same[::-1]):
        with pytest.raises(ppo.UserError):
            ppo.check_canaries(wrong, nf4, "nf4", "bfloat16", "here")
    with pytest.raises(ppo.UserError, match="rank correlation"):
        ppo.check_canaries([1.0, 0.0, 3.0, 2.0, 5.0, 4.0], card, "nf4", "bfloat16", "here")


def test_failed_gates_of_an_earlier_stage_warn(run_ppo: Run, changed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """They never stop: a warning names them with their values, and the run ends as it should."""
    folders = {name: changed(name) for name in ("sft", "reward")}
    for name, folder in folders.items():
        ppo.write_report(folder, name, "x", [("eos_rate", 0.1, 0.5, False), ("heldout_loss_drop", 0.7, 0.0, True)])
    capsys.readouterr()
    run_ppo(model=str(folders["sft"]), reward_model=str(folders["reward"]), max_steps=1)
    printed = capsys.readouterr().out
    for folder in folders.values():
        assert f"warning: {folder} did not pass its own checks (eos_rate 0.1)" in printed
    assert "heldout_loss_drop" not in printed


# ---------------------------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize(
    ("flags", "patterns"),
    [
        ({"lora_r": 0}, ["--lora_r 0", "RL trains LoRA adapters only"]),
        ({"lora_r": 8}, ["--lora_r 8 contradicts", "trained with 4"]),
        ({"lora_alpha": 3.0}, ["--lora_alpha 3.0 contradicts", "trained with 8"]),
        ({"lora_target_modules": ["q_proj"]}, ["--lora_target_modules", "contradicts"]),
        ({"reward_fn": "here", "reward_model": "there"}, ["--reward_fn and --reward_model are both given"]),
        ({"batch_size": 9}, ["--batch_size 9", "--samples_per_prompt 2"]),
        ({"minibatches": 16}, ["--batch_size 8", "--minibatches"]),
        ({"eval_size": 0.0}, ["--eval_size 0", "held-out prompts"]),
        ({"chat_template": "absent.jinja"}, ["--chat_template absent.jinja", "no such file"]),
        ({"reward_fn": "absent.py:score"}, ["absent.py:score", "no such file"]),
        ({"gold_fn": "absent"}, ["absent", "expected file.py:function"]),
        ({"max_prompt_length": 3}, ["no usable row", "24 prompt over 3 tokens"]),
    ],
)
def test_contradicting_ppo_flags(flags: dict, patterns: list[str], run_ppo: Run) -> None:
    """Each is one line that names the flag, and what to do."""
    refused(run_ppo, *patterns, **flags)


@pytest.mark.parametrize(
    "flags",
    [
        {"samples_per_prompt": 0}, {"micro_batch_size": 0}, {"minibatches": 0}, {"batch_size": 0}, {"ppo_epochs": 0},
        {"temperature": 0.0}, {"max_response_length": 0}, {"kl_horizon": 0, "kl_target": 0.1}, {"batch_size": -8},
        {"epochs": 0.0}, {"sample_batch_size": 0},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_ppo_numbers(flags: dict, run_ppo: Run) -> None:
    """Zero responses, zero tokens, temperature 0: said before the first step, not a division by zero during it."""
    refused(run_ppo, f"--{next(iter(flags))}", **flags)


@pytest.mark.parametrize(
    "flags", [{"batch_size": 0}, {"micro_batch_size": 0}, {"epochs": 0.0}, {"max_response_length": -500}], ids=str
)
def test_impossible_sft_numbers(flags: dict, run_sft: Run) -> None:
    """The same for sft.py; a window of no tokens leaves no usable row."""
    refused(run_sft, **flags)


def test_contradicting_sft_flags(run_sft: Run, sft_run: Path) -> None:
    """All weights of an adapter, all weights in 4 bits, another rank than the adapter's."""
    refused(run_sft, "--lora_r 0 trains all weights", str(sft_run), model=str(sft_run), lora_r=0)
    refused(run_sft, "4-bit weights can't be trained", "--quant none", lora_r=0, quant="nf4")
    refused(run_sft, "--lora_r 16 contradicts", "trained with 4", model=str(sft_run), lora_r=16)


@pytest.mark.parametrize(
    "template",
    ["{% if %}", "{{ nothing.at.all }}", "{{ raise_exception('never') }}"],
    ids=["syntax", "name", "refuses"],
)
def test_a_broken_chat_template(template: str, run_sft: Run, run_ppo: Run, tmp_path: Path) -> None:
    """A template file that does not work is a mistake of the user: one line, for both scripts."""
    (tmp_path / "broken.jinja").write_text(template)
    for run in (run_sft, run_ppo):
        refused(run, "template", chat_template=str(tmp_path / "broken.jinja"))


@pytest.mark.parametrize("body", ["def score(:", "import no_such_module_at_all", "other = 1"])
def test_a_reward_file_that_does_not_load(body: str, run_ppo: Run, tmp_path: Path) -> None:
    """A syntax error, a missing import, a missing function: the file's name and what is wrong."""
    (tmp_path / "mine.py").write_text(body)
    refused(run_ppo, f"{tmp_path / 'mine.py'}", reward_fn=f"{tmp_path / 'mine.py'}:score")


def test_a_reward_model_that_refuses_a_prompt(run_ppo: Run, changed: Any, world: Path, tmp_path: Path) -> None:
    """Prompts with a system message, a reward model whose template has none: one line, not a crash in a step."""
    folder = changed("reward")
    (folder / "reward.json").unlink()
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rows = [
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}]}
        for row in read_jsonl(world / "prompts.jsonl")
    ]
    file = write_jsonl(tmp_path / "system.jsonl", rows)
    refused(run_ppo, "no system role", reward_model=str(folder), dataset=str(file))


def test_a_model_that_never_ends_is_stopped_at_once(
    run_ppo: Run, reward_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preflight names the cause; with --missing_eos_penalty 0 no end is wanted and the run goes on."""
    monkeypatch.setattr(ppo, "find_stop_ids", lambda *_: [10**6])  # a token that no sampler can draw
    flags = {"max_response_length": 4, "reward_fn": reward_file, "max_steps": 1}
    text = refused(run_ppo, "preflight: eos_rate is 0", missing_eos_penalty=1.0, **flags)
    assert "--max_response_length" in text and "--missing_eos_penalty 0" in text
    run_ppo(missing_eos_penalty=0.0, **flags)


# --------------------------------------------------------------------------------------------------------- resume
def test_resume_needs_the_same_settings(run_sft: Run) -> None:
    """Another learning rate: which flag, its value now and then. The folder stays as it is."""
    folder = run_sft(max_steps=2, save_every=1)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    was = f"--learning_rate 0.5 (was {sft.Args.learning_rate})"
    refused(run_sft, was, max_steps=2, save_every=1, learning_rate=0.5, resume=True)
    text = refused(run_sft, "--max_steps 3 (was 2)", max_steps=3, save_every=1, resume=True)
    assert "learning_rate" not in text
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_resume_needs_a_run_folder(run_sft: Run, run_ppo: Run, tmp_path: Path) -> None:
    """Nothing there, and a folder that is something else."""
    for run, name in ((run_sft, "sft"), (run_ppo, "ppo")):
        refused(run, f"{tmp_path / name} is no run folder", "--output_dir", resume=True)
        (tmp_path / name).mkdir()
        refused(run, f"{tmp_path / name} is no run folder", resume=True)


def test_a_refused_run_leaves_the_existing_folder(run_sft: Run, tmp_path: Path) -> None:
    """A mistake found before training renames nothing and writes nothing."""
    folder = run_sft(max_steps=1)
    refused(run_sft, "no usable row", dataset=str(write_jsonl(tmp_path / "bad.jsonl", [{"x": 1}])))
    assert folder.is_dir() and not (tmp_path / "sft.1").exists()


# --------------------------------------------------------------------------------------------------- command line
def cli(monkeypatch: pytest.MonkeyPatch, capsys: Any, module: Any, *flags: str) -> tuple[Any, str]:
    """(exit code, stderr) of the command line `module.py flags`, in process."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags])
    with pytest.raises(SystemExit) as caught:
        ppo.run_cli(module.main, module.Args) if module is ppo else sft.run_cli(module.main, module.Args)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize("module", [sft, ppo], ids=["sft", "ppo"])
def test_unknown_flags_and_bad_values_exit_with_2(module: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A typo is one line that names it; abbreviations are not taken; a value of the wrong type names its flag."""
    for flags, named in ((["--lerning_rate", "1"], "--lerning_rate"), (["--learning", "1"], "--learning")):
        code, error = cli(monkeypatch, capsys, module, *flags)
        assert code == 2 and len(error.splitlines()) == 1 and named in error and "--help" in error
    for flags, named in ((["--batch_size", "many"], "--batch_size"), (["--quant", "int8"], "--quant")):
        code, error = cli(monkeypatch, capsys, module, *flags)
        assert code == 2 and named in error.splitlines()[-1]


@pytest.mark.parametrize("module", [sft, ppo], ids=["sft", "ppo"])
def test_help_lists_every_flag(module: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """--help exits with 0 and explains every field of Args, with its default."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        module.run_cli(module.main, module.Args)
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    for name, field in module.Args.__dataclass_fields__.items():
        assert f"--{name}" in printed and field.metadata["help"]


def test_a_mistake_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    """run_cli turns a UserError into the script's name and the message, any other exception stays a traceback."""
    code, _ = cli(monkeypatch, capsys, sft, "--model", str(tmp_path / "absent"))
    assert isinstance(code, str) and code.startswith("sft.py: ") and "absent" in one_line(Exception(code))
    monkeypatch.setattr(sft, "load_model", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["sft.py"])
    with pytest.raises(ZeroDivisionError):
        sft.run_cli(sft.main, sft.Args)


@pytest.mark.parametrize(
    ("stage", "flags", "code", "named"),
    [("ppo", ["--no_such_flag", "1"], 2, "--no_such_flag"), ("sft", ["--dataset", "absent.jsonl"], 1, "absent.jsonl")],
)
def test_mistakes_by_subprocess(stage: str, flags: list[str], code: int, named: str, base: Path) -> None:
    """The real thing: exit code not 0, one line on stderr, no traceback."""
    line = [sys.executable, str(ROOT / f"{stage}.py"), *flags, *(["--model", str(base)] if code == 1 else [])]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    lines = [text for text in done.stderr.splitlines() if text.startswith(f"{stage}.py: ")]
    assert len(lines) == 1 and named in lines[0] and done.stderr.splitlines()[-1] == lines[0]
