"""The tools of eval/: a package, whose shared part is common.py; statistics have the text of the five scripts."""

import ast
import difflib
import doctest
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from conftest import ROOT
from test_same_code import MAY_DIFFER, SCRIPTS, code_lines, definitions, nesting

from eval import common

TOOLS = sorted((ROOT / "eval").glob("*.py"))
COMMON = ROOT / "eval" / "common.py"
MOST = 4569  # code lines of all; may only go down
MODULES = ("win_rate", "rm_accuracy", "length_bias")  # Hugging Face `evaluate` modules too
OWN = {*MAY_DIFFER, "check_args", "TINY"}  # TINY: beside the script, or above the tool
STATISTICS_OF_SCRIPTS = {"interval", "wilson_interval", "share_won"}
STATISTICS = {"numpy", "scipy", "statsmodels", "sklearn"}
SERVICES = {"openai", "httpx", "transformers", "evaluate", "datasets"}  # where the tool is about them
HEAVY = {"torch", "peft", "safetensors", "bitsandbytes", "matplotlib", "accelerate", "jinja2"}  # inside functions only
EACH = pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)


def imports(path: Path) -> list[tuple[ast.Import | ast.ImportFrom, str, bool]]:
    """(statement, library, whether it is at top level) of every import of a file but those from common.py."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[tuple[ast.Import | ast.ImportFrom, str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name.partition(".")[0], node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert (node.level, node.module) == (1, "common") or node.level == 0, f"{path.name}:{node.lineno}"
            found += [(node, (node.module or "").partition(".")[0], node in tree.body)] if node.level == 0 else []
    return found


def test_one_place_for_a_name() -> None:
    """What two tools need stands in common.py alone; the statistics that scripts have too have the same text there."""
    sources = {path: definitions(path.read_text(encoding="utf-8")) for path in TOOLS}
    for (a, ours), (b, theirs) in combinations(sources.items(), 2):
        assert not ours.keys() & theirs.keys() - OWN, f"{a.name} and {b.name}"
    for path, ours in sources.items():
        for script in SCRIPTS:
            theirs = definitions(script.read_text(encoding="utf-8"))
            for name in ours.keys() & theirs.keys() & STATISTICS_OF_SCRIPTS:
                texts = ours[name].splitlines(), theirs[name].splitlines()
                difference = difflib.unified_diff(*texts, f"eval/{path.name}: {name}", script.name, lineterm="", n=1)
                assert ours[name] == theirs[name], "\n".join(difference)


@EACH
def test_tools_import_light_libraries_first(tool: Path) -> None:
    """Statistics at the top, models and plots inside the functions that need them; of siblings common.py alone."""
    for node, library, top in imports(tool):
        allowed = STATISTICS | SERVICES | set(sys.stdlib_module_names)
        assert library in (allowed if top else allowed | HEAVY), f"{tool.name}:{node.lineno} imports {library}"


@EACH
def test_the_header_names_the_libraries(tool: Path) -> None:
    """The PEP 723 block lists what is imported, common.py's statistics too, pinned as in requirements.txt."""
    if tool.stem in ("common", "__init__"):
        return  # they are not run
    header = tool.read_text(encoding="utf-8").partition("# ///\n")[0]
    assert header.startswith("# /// script\n")
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    renamed = {"sklearn": "scikit-learn"}
    for _, library, _ in [*imports(tool), *(x for x in imports(COMMON) if x[2])]:
        name = renamed.get(library, library)
        for pin in (pin for pin in pins if pin.partition("==")[0] == name):
            assert f'"{pin}"' in header, f"{tool.name}: the header lacks {pin}"


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_one_import_per_line(name: str) -> None:
    """evaluate's import scanner reads line by line and knows no parentheses."""
    for line in (ROOT / "eval" / f"{name}.py").read_text(encoding="utf-8").splitlines():
        if line.startswith(("import ", "from ")):
            assert "(" not in line and not (line.startswith("import ") and "," in line), line


@EACH
def test_tools_run_nothing_at_import(tool: Path) -> None:
    """A docstring, imports, definitions, constants; a tool also finds its package, and ends in `if __name__`."""
    body = ast.parse(tool.read_text(encoding="utf-8")).body
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    conditions = [node for node in body if isinstance(node, ast.If)]
    if tool.stem not in ("common", "__init__"):
        assert [ast.unparse(node.test) for node in conditions] == ["not __package__", "__name__ == '__main__'"]
        assert body[-1] is conditions.pop(1) and body.pop()
        body.remove(conditions[0])
    allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    for node in body[1:]:
        assert isinstance(node, allowed), f"{tool.name}:{node.lineno} runs at import"
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "Args":
            assert ast.get_docstring(node), f"{tool.name}:{node.lineno} {node.name} has no docstring"


def test_sizes_of_the_tools(capsys: pytest.CaptureFixture[str]) -> None:
    """The sizes are promises: code lines of all; no function nests deeper than 5."""
    sizes = {tool.name: code_lines(tool.read_text(encoding="utf-8")) for tool in TOOLS}
    with capsys.disabled():
        print(f" eval/: {sum(sizes.values())} code lines:", ", ".join(f"{name} {n}" for name, n in sizes.items()))
    assert sum(sizes.values()) <= MOST
    for tool in TOOLS:
        for node in ast.parse(tool.read_text(encoding="utf-8")).body:
            assert not isinstance(node, ast.FunctionDef) or nesting(node) <= 5, f"{tool.name}: {node.name}"


def test_doctests_of_the_shared_part() -> None:
    """The examples of common.py."""
    result = doctest.testmod(common)
    assert result.failed == 0 and result.attempted >= 3


def test_the_folder_copied_runs(tmp_path: Path) -> None:
    """eval/ in an empty folder, a tool called from elsewhere, on a file from anywhere."""
    shutil.copytree(ROOT / "eval", tmp_path / "x" / "eval", ignore=shutil.ignore_patterns("__pycache__"))
    rows = [f'{{"id": {i}, "order": "{o}", "preference": {i % 2}}}\n' for i in range(40) for o in ("ab", "ba")]
    (tmp_path / "judgments.jsonl").write_text("".join(rows))
    command = [sys.executable, "-I", "x/eval/win_rate.py", "judgments.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "50.0" in done.stdout and (tmp_path / "win_rate.json").is_file()
