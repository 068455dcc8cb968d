"""The READMEs: every command names files and flags that exist, every relative link and table row resolves."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import shared_or_skip
from test_same_code import SCRIPTS, code_lines, own_lines

import dpo
import grpo

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "tiny" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGE_SCRIPTS = ("sft.py", "reward.py", "ppo.py", "dpo.py", "grpo.py")


def flags_of(script: Path) -> set[str]:
    """Field names of the script's Args."""
    tree = ast.parse(script.read_text())
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    return {
        node.target.id for node in args.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


@pytest.mark.parametrize("readme", READMES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_commands_name_existing_scripts_and_flags(readme: Path) -> None:
    text = readme.read_text().replace("\\\n", " ")
    commands = re.findall(r"python ((?:\w+/)?\w+\.py)([^`\n&#|]*)", text)
    commands += re.findall(r"`(grpo\.py|dpo\.py|ppo\.py)( [^`]*)`", text)
    for script, rest in commands:
        assert (ROOT / script).is_file(), script
        asked = set(re.findall(r"--(\w+)", rest))
        if script in STAGE_SCRIPTS:
            assert asked <= flags_of(ROOT / script) | {"help"}, f"{script}: {asked - flags_of(ROOT / script)}"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_links_resolve_and_nothing_is_left_to_fill_in(readme: Path) -> None:
    text = readme.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (readme.parent / target).exists(), target
    assert not re.search(r"TODO|SIZE_[A-Z]+|[A-Z]+_(?:TABLE|OUTPUT|DATA|SIZES)\b", text)


def test_named_functions_exist() -> None:
    """The functions that README's table names as the place of an equation are defined in that script."""
    for script, names in re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \|[^|]*\|([^|]*)\|", READMES[0].read_text(), re.M):
        source = (ROOT / script).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert f"\ndef {name}(" in source, f"{script} has no {name}"


def test_the_sizes_are_those_of_the_files() -> None:
    """README's code lines, and those that no other script repeats."""
    rows = re.findall(r"^\| \[(\w+)\.py\]\(\w+\.py\) \|.*\| (\d+) \((\d+)\) \|$", READMES[0].read_text(), re.M)
    found = {name: (int(size), int(own)) for name, size, own in rows}
    assert found == {path.stem: (code_lines(path.read_text()), own_lines(path)) for path in SCRIPTS}


def test_the_table_of_losses_is_that_of_the_code() -> None:
    """Every loss of dpo.py with its data, its use of the reference and its default beta."""
    text = (ROOT / "docs" / "dpo.md").read_text()
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|.*\| (yes|no) \| (\w+) \| ([\d.]+)", text, re.M)
    table = {name: (data, ref == "yes", float(beta)) for names, ref, data, beta in rows for name in names_in(names)}
    assert table == {name: (loss.data, loss.reference, loss.beta) for name, loss in dpo.LOSSES.items()}


def test_the_table_of_methods_is_that_of_the_code() -> None:
    """Every method of grpo.py with its aggregation, ratio, clip range and KL term."""
    lines = (ROOT / "docs" / "grpo.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    table = {names_in(row[0])[0]: row for row in cells if len(row) == 8 and names_in(row[0])}
    assert table.keys() == grpo.METHODS.keys()
    aggregations = {"response": "responses", "token": "tokens", "constant": "a constant"}
    ratios = {"token": "token", "sequence": "sequence", "product": "whole response"}
    penalties = {"none": "none", "k1": "k1 in the reward", "k3": "k3 in the loss"}
    for name, method in grpo.METHODS.items():
        _, _, aggregation, ratio, clip, kl, more, _ = table[name]
        assert aggregation == aggregations[method.aggregation] and ratio == ratios[method.ratio], name
        assert kl == penalties[method.kl] and bool(method.max_refills) == ("refills" in more), name
        if method.surrogate == "clip":
            assert [float(x) for x in clip.split(", ")] == [method.clip_low, method.clip_high], name
        else:
            assert float(clip.split()[-1]) == 1 + method.clip_high, name


def test_the_table_of_pair_methods_is_that_of_the_code() -> None:
    """Every pair method of grpo.py with its default beta."""
    text = (ROOT / "docs" / "grpo.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([\d.]+)[^|]*\| [^|]*\|$", text, re.M)
    assert {name: float(beta) for name, beta in rows} == grpo.PAIR_METHODS


def test_readme_is_short() -> None:
    """A front door: who needs more finds it behind a link."""
    assert len(READMES[0].read_text().splitlines()) <= 130 and len(READMES[0].read_text().split()) <= 1100


def test_learning_rates_are_those_of_a_real_model() -> None:
    """The defaults are for 7B, and tiny/ has its own, which would be 10 to 100 times too much for such a model."""
    rates = {path.stem: float(default_of(path, "learning_rate")) for path in SCRIPTS}
    assert rates == {"sft": 2e-4, "reward": 1e-4, "dpo": 1e-5, "ppo": 2e-5, "grpo": 2e-5}
    assert all(int(default_of(path, "save_every")) > 0 for path in SCRIPTS)


def default_of(script: Path, flag: str) -> str:
    """The source of a flag's default value."""
    match = re.search(rf"^    {flag}: [^=]*= arg\(\s*([^,]+),", script.read_text(), re.M)
    assert match, f"{script.name} has no --{flag}"
    return match[1]


def names_in(cell: str) -> list[str]:
    """The names in backticks of a table's cell."""
    return re.findall(r"`(\w+)`", cell)


@pytest.mark.slow
def test_the_commands_for_7b_fit_the_card_that_readme_names() -> None:
    """tools/plan.py says of each command on real models what README says: it fits a card of 24 GiB."""
    config = shared_or_skip("configs", "Qwen2.5-7B.json")
    text = READMES[0].read_text()
    assert "each on a card of 24" in text
    commands = re.findall(r"^    python (\w+)\.py +--model (?:Qwen|runs)([^\n]*)", text, re.M)
    assert len(commands) == 5
    for stage, rest in commands:
        flags = re.findall(r"--(?:max_[pr]|batch_|samples_|sample_|minibatches|tokens_)\w* \S+", rest)
        line = [sys.executable, str(ROOT / "tools" / "plan.py"), stage, "--model", str(config), "--quant", "nf4"]
        line += ["--dtype", "bfloat16", "--gpu_gb", "24", *" ".join(flags).split()]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        (gib,) = re.findall(r"^on a card: ([\d.]+) GiB", done.stdout, re.M)
        assert float(gib) < (16 if stage in ("ppo", "grpo") else 10), stage
