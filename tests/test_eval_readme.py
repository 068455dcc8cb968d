"""eval/README.md: its commands name tools and flags that exist, its links lead somewhere, its figures are real ones."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from eval import judge, length_bias, rm_accuracy, win_rate

README = ROOT / "eval" / "README.md"
TEXT = README.read_text(encoding="utf-8")
TOOLS = sorted(path for path in (ROOT / "eval").glob("*.py") if path.stem not in ("common", "__init__"))
JUDGMENTS = "runs/judge/judgments.jsonl"
# they need a long run, a server, or all of runs/
NOT_ALONE = ("runs/ppo", "alignment_tax.py", "localhost", "echo $?", "report.py")


def blocks(text: str) -> list[tuple[str, list[str]]]:
    """(command or code, lines shown below it) in README's order; code is a ```python block and has no lines."""
    found: list[tuple[str, list[str]]] = []
    code: list[str] | None = None
    shown = False
    for line in text.replace("\\\n", "").splitlines():
        if line.startswith("```"):
            if code is not None:
                found.append(("\n".join(code), []))
            code = [] if code is None else None
        elif code is not None:
            code.append(line)
        elif line.startswith("    $ "):
            found.append((re.sub(r"\s+", " ", line[6:]).strip(), []))
            shown = True
        elif line.startswith("    ") and shown:
            if line.strip() != "..." and not line.startswith("    python "):
                found[-1][1].append(line)
        else:
            shown = False
    return found


def shown(command: str) -> list[str]:
    """The lines that README shows below a command."""
    return next(lines for text, lines in blocks(TEXT) if text == command)


def plain(text: str) -> str:
    """Text with single blanks, and no sign before a rounded zero."""
    return re.sub(r"-(0\.0+)\b(?!\d)", r"\1", re.sub(r"\s+", " ", text)).strip()


def assert_shown(command: str, output: str) -> None:
    """Every line that README shows below the command stands in its output."""
    lines = shown(command)
    assert lines, command
    missing = [line for line in lines if plain(line) not in plain(output)]
    assert not missing, f"{command}: README shows what the tool does not print:\n" + "\n".join(missing)


def flags_of(script: Path) -> set[str]:
    """Field names of the script's Args."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    return {
        node.target.id for node in args.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def takes_files(script: Path) -> bool:
    """Whether the script has positional paths: run_tool's third argument."""
    return re.search(r"^    run_tool\(main, Args, ", script.read_text(encoding="utf-8"), re.M) is not None


# ------------------------------------------------------------------------------------------------------------- the text
def test_commands_name_existing_tools_and_flags() -> None:
    """Every script exists and has the flags; a path without a flag is given to tools that take files only."""
    commands = re.findall(r"python ((?:\w+/)?\w+\.py)([^`\n&#|;]*)", TEXT.replace("\\\n", " "))
    assert len(commands) > 35 and {ROOT / script for script, _ in commands} >= set(TOOLS)
    for script, rest in commands:
        path = ROOT / script
        assert path.is_file(), script
        words = shlex.split(rest)
        asked = {word[2:] for word in words if word.startswith("--")}
        assert asked <= flags_of(path) | {"help"}, f"{script}: {asked - flags_of(path)}"
        if words and not words[0].startswith("--"):
            assert takes_files(path), f"{script} takes no files: {words[0]}"


def test_flags_in_the_prose_belong_to_a_tool() -> None:
    """Every `--flag` in backticks is one of a tool of eval/."""
    flags = set().union(*(flags_of(tool) for tool in TOOLS)) | {"help"}
    named = {flag for code in re.findall(r"`([^`\n]+)`", TEXT) for flag in re.findall(r"--(\w+)", code)}
    assert len(named) > 20 and named <= flags, named - flags


def test_links_resolve_and_nothing_is_left_to_fill_in() -> None:
    """Relative links are files, links with # are headings, no placeholder is left, lines are short."""
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", TEXT, re.M)
    }
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(targets) > 20
    for target in targets:
        path, _, anchor = target.partition("#")
        assert target.startswith("http") or (README.parent / path).exists(), target
        assert not anchor or anchor in anchors, target
    assert not re.search(r"TODO|[A-Z]+_(?:OUTPUT|SNIPPET)\b|^    @|/tmp/", TEXT, re.M)
    assert max(len(line) for line in TEXT.splitlines() if not line.startswith("|")) <= 120


def test_every_tool_has_its_section() -> None:
    """A heading per tool, and in it a command of its own and what it can't tell; a row in the first table."""
    sections = dict(re.findall(r"^## (\w+\.py)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
    assert set(sections) == {tool.name for tool in TOOLS}
    for name, section in sections.items():
        assert f"python eval/{name}" in section and "can't tell" in section.replace("It can't tell whether people", "")
        assert re.search(rf"^\|.*\[{re.escape(name)}\]\({re.escape(name)}\)", TEXT, re.M), name


# ---------------------------------------------------------------------------------------------------------- the figures
def test_the_shortest_start_shows_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """judge.py and win_rate.py with no flags, MT-Bench's rule, --lc glm, the export and the prices."""
    output = str(tmp_path / "judgments.jsonl")
    found: dict[str, str] = {}
    judge.main(judge.Args(output=output))
    found["python eval/judge.py"] = capsys.readouterr().out
    kinds = {"": win_rate.Args(), "--rule mtbench": win_rate.Args(rule="mtbench"), "--lc glm": win_rate.Args(lc="glm")}
    for flags, args in kinds.items():
        win_rate.main(args, [output])
        found[" ".join(["python eval/win_rate.py", *([JUDGMENTS, flags] if flags else [])])] = capsys.readouterr().out
    pairs = "runs/judge/pairs.jsonl"
    judge.main(judge.Args(output=output, export=str(tmp_path / "pairs.jsonl")))
    found[f"python eval/judge.py --export {pairs}"] = capsys.readouterr().out.replace(f"{tmp_path}/pairs.jsonl", pairs)
    for flag in ("", " --verdict logprobs"):
        price: dict[str, Any] = {"dry_run": True, "price_in": 0.15, "price_out": 0.6, "judge": "gpt-4o-mini"}
        verdict: dict[str, Any] = {"verdict": "logprobs"} if flag else {}
        judge.main(judge.Args(output=str(tmp_path / "gpt.jsonl"), **price, **verdict))
        command = f"python eval/judge.py --judge gpt-4o-mini{flag} --dry_run --price_in 0.15 --price_out 0.60"
        found[f"{command} --output runs/gpt/judgments.jsonl"] = capsys.readouterr().out
    for command, text in found.items():
        assert_shown(command, text)


def test_reward_model_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracy of tiny/reward, all but what rounding decides, and its length bias beside that of the labels."""
    result = rm_accuracy.main(rm_accuracy.Args(output=str(tmp_path / "rm_accuracy.json")))
    real = capsys.readouterr().out
    real += "".join(line for line in shown("python eval/rm_accuracy.py") if "batch size" in line)
    assert_shown("python eval/rm_accuracy.py", real)
    assert f"{100 * result['accuracy']:.1f} % of 500 pairs" in plain(TEXT)
    pairs = "runs/rm_accuracy_pairs.jsonl"
    length_bias.main(length_bias.Args(), [str(tmp_path / "rm_accuracy_pairs.jsonl")])
    assert_shown(f"python eval/length_bias.py {pairs}", capsys.readouterr().out.replace(str(tmp_path), "runs"))


@pytest.mark.slow
def test_commands_print_what_is_shown(tmp_path: Path) -> None:
    """All commands and code in README's order, in a copy, but those that need a run of ppo.py or a server."""
    for name in ("eval", "tiny", "rewards"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("build", "__pycache__"))
    ran = 0
    for command, lines in blocks(TEXT):
        if any(part in command for part in NOT_ALONE):
            continue
        code = ["-c", command] if "\n" in command else shlex.split(command)[1:]
        done = subprocess.run(
            [sys.executable, *code], cwd=tmp_path, capture_output=True, text=True, timeout=600,
            env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        missing = [x for x in lines if plain(x) not in plain(done.stdout + done.stderr) and "batch size" not in x]
        assert not missing, f"{command}\n" + "\n".join(missing)
        if "\n" in command:  # what a comment promises is what is printed
            assert re.findall(r"print\(.*\)  # (.*)", command) == done.stdout.splitlines()
        ran += 1
    assert ran > 20
