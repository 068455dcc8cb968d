"""The tools of eval/: same name, same bytes, also beside the five scripts; each file runs alone."""

import ast
import difflib
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from conftest import ROOT
from test_same_code import MAY_DIFFER, SCRIPTS, code_lines, definitions, nesting

TOOLS = sorted((ROOT / "eval").glob("*.py"))
MODULES = ("win_rate", "rm_accuracy", "length_bias")  # Hugging Face `evaluate` modules too
OWN = {*MAY_DIFFER, "check_args", "TINY"}  # TINY: beside the script, or above the tool
STATISTICS_OF_SCRIPTS = {"interval", "wilson_interval", "share_won"}
STATISTICS = {"numpy", "scipy", "statsmodels", "sklearn"}
SERVICES = {"openai", "httpx", "transformers", "evaluate", "datasets"}  # where the tool is about them
HEAVY = {"torch", "peft", "safetensors", "bitsandbytes", "matplotlib", "accelerate", "jinja2"}  # inside functions only
EACH = pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)


def imports(path: Path) -> list[tuple[ast.Import | ast.ImportFrom, str, bool]]:
    """(statement, library, whether it is at top level) of every import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[tuple[ast.Import | ast.ImportFrom, str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name.partition(".")[0], node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            found.append((node, (node.module or "").partition(".")[0], node in tree.body))
    return found


def test_same_name_same_bytes_in_the_tools() -> None:
    """A name that two tools define at top level has one text, the statistics also in the scripts; the difference is
    shown. The tools' loading of models and data is their own: they are a package, the scripts are copied alone."""
    sources = {
        str(path.relative_to(ROOT)): definitions(path.read_text(encoding="utf-8")) for path in [*TOOLS, *SCRIPTS]
    }
    differences: list[str] = []
    compared = 0
    for (a, ours), (b, theirs) in combinations(sources.items(), 2):
        if "/" not in a and "/" not in b:
            continue  # test_same_code compares the scripts
        shared = ours.keys() & theirs.keys() - OWN
        for name in sorted(shared if "/" in a and "/" in b else shared & STATISTICS_OF_SCRIPTS):
            compared += 1
            if ours[name] != theirs[name]:
                texts = ours[name].splitlines(), theirs[name].splitlines()
                differences += difflib.unified_diff(*texts, f"{a}: {name}", f"{b}: {name}", lineterm="", n=1)
    assert not differences, "\n" + "\n".join(differences)
    assert compared > 200


@EACH
def test_tools_import_light_libraries_first(tool: Path) -> None:
    """Statistics at the top, models and plots inside the functions that need them, never a sibling file."""
    for node, library, top in imports(tool):
        allowed = STATISTICS | SERVICES | set(sys.stdlib_module_names)
        assert library in (allowed if top else allowed | HEAVY), f"{tool.name}:{node.lineno} imports {library}"


@EACH
def test_the_header_names_the_libraries(tool: Path) -> None:
    """The PEP 723 block lists what is imported, pinned as in requirements.txt."""
    header = tool.read_text(encoding="utf-8").partition("# ///\n")[0]
    assert header.startswith("# /// script\n")
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    renamed = {"sklearn": "scikit-learn"}
    for _, library, _ in imports(tool):
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
    """A docstring, imports, definitions, constants and the last line's `if __name__`; docstrings on everything."""
    body = ast.parse(tool.read_text(encoding="utf-8")).body
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    assert isinstance(body[-1], ast.If) and ast.unparse(body[-1].test) == "__name__ == '__main__'"
    allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    for node in body[1:-1]:
        assert isinstance(node, allowed), f"{tool.name}:{node.lineno} runs at import"
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "Args":
            assert ast.get_docstring(node), f"{tool.name}:{node.lineno} {node.name} has no docstring"


@EACH
def test_sizes_of_the_tools(tool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the code lines; no function nests deeper than 5."""
    source = tool.read_text(encoding="utf-8")
    with capsys.disabled():
        print(f" eval/{tool.name}: {code_lines(source)} code lines")
    for node in ast.parse(source).body:
        assert not isinstance(node, ast.FunctionDef) or nesting(node) <= 5, f"{tool.name}: {node.name} nests too deep"


def test_a_tool_copied_alone_runs(tmp_path: Path) -> None:
    """win_rate.py in an empty folder, on a file from anywhere."""
    (tmp_path / "win_rate.py").write_bytes((ROOT / "eval" / "win_rate.py").read_bytes())
    rows = [f'{{"id": {i}, "order": "{o}", "preference": {i % 2}}}\n' for i in range(40) for o in ("ab", "ba")]
    (tmp_path / "judgments.jsonl").write_text("".join(rows))
    command = [sys.executable, "-I", "win_rate.py", "judgments.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "50.0" in done.stdout and (tmp_path / "win_rate.json").is_file()
