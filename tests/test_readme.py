"""The READMEs: every command names files and flags that exist, every relative link and table row resolves."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "tiny" / "README.md"]


def flags_of(script: Path) -> set[str]:
    """Field names of the script's Args."""
    tree = ast.parse(script.read_text())
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    return {
        node.target.id for node in args.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_commands_name_existing_scripts_and_flags(readme: Path) -> None:
    text = readme.read_text().replace("\\\n", " ")
    commands = re.findall(r"python ((?:\w+/)?\w+\.py)([^`\n&#|]*)", text)
    assert commands
    for script, rest in commands:
        assert (ROOT / script).is_file(), script
        asked = set(re.findall(r"--(\w+)", rest))
        if script in ("sft.py", "reward.py", "ppo.py", "dpo.py"):
            assert asked <= flags_of(ROOT / script) | {"help"}, f"{script}: {asked - flags_of(ROOT / script)}"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
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
