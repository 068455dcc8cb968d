"""The five scripts: same name, same bytes, same order; nothing runs at import; each needs only what it may import."""

import ast
import difflib
import io
import sys
import tokenize
from itertools import combinations
from pathlib import Path

import pytest
from conftest import ROOT, STAGES

SCRIPTS = [ROOT / f"{stage}.py" for stage in STAGES if (ROOT / f"{stage}.py").is_file()]
SIZES = {  # at most: code lines; lines; lines above the ruled line. The first two may only go down
    "sft": (726, 1020, 350), "reward": (820, 1179, 350), "ppo": (1091, 1559, 450), "dpo": (1130, 1754, 550),
    "grpo": (1285, 1931, 450),
}  # fmt: skip
RULE = "# " + "=" * 113
MAY_DIFFER = ("Args", "main", "TINY_SETTINGS")
LIBRARIES = {"torch", "transformers", "datasets", "bitsandbytes", "peft", "accelerate", "safetensors", "numpy", "tqdm"}
LATER = {"matplotlib": "plot_curves", "pandas": "plot_curves"}  # allowed inside one function; datasets brings pandas
DEPENDENCIES = LIBRARIES | {"matplotlib", "jinja2", "evaluate", "openai", "scipy", "sklearn", "statsmodels", "pytest"}
EACH = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def names_of(node: ast.stmt) -> list[str]:
    """What a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def definitions(source: str) -> dict[str, str]:
    """Top-level name -> its text, with decorators, the comment lines right above it and the rest of its last line."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(d.lineno for d in decorators)]) - 1
        while first > 0 and lines[first - 1].startswith("#"):
            first -= 1
        banners = ("# ---", "# ===")
        while lines[first].startswith("#") and any(x.startswith(banners) for x in lines[first : node.lineno]):
            first += 1  # a banner, and what stands above it
        for name in names_of(node):
            found[name] = "\n".join(lines[first : node.end_lineno])
    return found


def code_lines(source: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    doc = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.body:
            text = node.body[0]
            if (
                isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                doc |= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            held |= set(range(token.start[0], token.end[0] + 1))
    return len(held - doc)


def own_lines(script: Path) -> int:
    """Code lines of what no other script repeats."""
    source = script.read_text(encoding="utf-8")
    others = [definitions(path.read_text(encoding="utf-8")) for path in SCRIPTS if path != script]
    mine = {name: text for name, text in definitions(source).items() if name not in MAY_DIFFER}
    repeated = sum(code_lines(text) for name, text in mine.items() if any(name in other for other in others))
    return code_lines(source) - repeated


def nesting(node: ast.AST) -> int:
    """How deep blocks lie in each other inside a function; an `elif` is no deeper than its `if`."""
    blocks = ast.For | ast.While | ast.If | ast.With | ast.Try | ast.FunctionDef
    deepest = 0
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                chained = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)
                deepest = max(deepest, nesting(child) + (isinstance(child, blocks) and not chained))
    return deepest


def fields(source: str) -> dict[str, tuple[str, str]]:
    """Args field -> (type, help text)."""
    args = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    found = {}
    for node in args.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            found[node.target.id] = (ast.unparse(node.annotation), ast.literal_eval(node.value.args[1]))
    return found


# --------------------------------------------------------------------------------------------- one name, one text
def test_same_name_same_bytes() -> None:
    """Every name that two scripts define at top level has the same text in both; the difference is shown."""
    sources = {path.stem: definitions(path.read_text(encoding="utf-8")) for path in SCRIPTS}
    differences: list[str] = []
    compared = 0
    for (a, ours), (b, theirs) in combinations(sources.items(), 2):
        for name in sorted(ours.keys() & theirs.keys() - set(MAY_DIFFER)):
            compared += 1
            if ours[name] != theirs[name]:
                texts = ours[name].splitlines(), theirs[name].splitlines()
                differences += difflib.unified_diff(*texts, f"{a}.py: {name}", f"{b}.py: {name}", lineterm="", n=1)
    assert not differences, "\n" + "\n".join(differences)
    assert compared > 30 * (len(SCRIPTS) - 1)


def test_same_order() -> None:
    """What two scripts share comes in the same order, so that a diff shows only what the stages do differently.

    Where `main` stands among it differs: each file has above it the maths that is its own algorithm's core.
    """
    sources = {path.stem: definitions(path.read_text(encoding="utf-8")) for path in SCRIPTS}
    for (a, ours), (b, theirs) in combinations(sources.items(), 2):
        both = ours.keys() & theirs.keys() - {"main"}
        shared = [name for name in ours if name in both], [name for name in theirs if name in both]
        assert shared[0] == shared[1], f"{a}.py and {b}.py:\n" + "\n".join(
            difflib.unified_diff(*shared, lineterm="", n=1)
        )


def test_same_flag_same_type_and_help() -> None:
    """A flag that two scripts have means the same in both; its default may differ."""
    flags = {path.stem: fields(path.read_text(encoding="utf-8")) for path in SCRIPTS}
    for (a, ours), (b, theirs) in combinations(flags.items(), 2):
        shared = ours.keys() & theirs.keys() - {"loss"}  # each script has its own losses
        assert len(shared) > 20
        assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}, f"{a}.py and {b}.py"


def test_the_comparison_sees_what_it_should() -> None:
    """Comments above, decorators, constants and annotated constants count; a section banner does not."""
    found = definitions("# ---- banner\n# why\n@wrap\ndef f():\n    return 1\n\nA = 1  # one\nB: int = 2\n")
    assert found == {"f": "# why\n@wrap\ndef f():\n    return 1", "A": "A = 1  # one", "B": "B: int = 2"}


# ------------------------------------------------------------------------------------------------------- each alone
@EACH
def test_nothing_runs_at_import(script: Path) -> None:
    """A docstring, imports, definitions, constants and the last line's `if __name__`: nothing else at top level."""
    body = ast.parse(script.read_text(encoding="utf-8")).body
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    assert isinstance(body[-1], ast.If) and ast.unparse(body[-1].test) == "__name__ == '__main__'"
    allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    for node in body[1:-1]:
        assert isinstance(node, allowed), f"{script.name}:{node.lineno} runs at import"
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            calls = [ast.unparse(c.func) for c in ast.walk(node.value) if isinstance(c, ast.Call)]
            calls = [call for call in calls if not call.endswith("'.split")]  # a list of words
            own = {other.name for other in body if isinstance(other, ast.ClassDef)}  # plain records of constants
            assert set(calls) <= {"Path", "Path(__file__).resolve", *own}, f"{script.name}:{node.lineno} calls {calls}"


@EACH
def test_imports_are_those_of_the_design(script: Path) -> None:
    """The standard library and DESIGN's list; matplotlib inside the plotting function only; never a sibling file."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    homes = {id(n): f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{script.name}:{node.lineno} imports relatively"
            modules = [node.module or ""]
        for module in (name.partition(".")[0] for name in modules):
            if module in LATER:
                assert homes.get(id(node)) == LATER[module], f"{script.name}:{node.lineno} imports {module}"
            else:
                assert module in LIBRARIES | set(sys.stdlib_module_names), f"{script.name}:{node.lineno}: {module}"


@EACH
def test_header_names_what_is_imported(script: Path) -> None:
    """The PEP 723 block at the top asks for every library that the script imports."""
    source = script.read_text(encoding="utf-8")
    header = source.partition("# ///\n")[0]
    assert header.startswith("# /// script\n")
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {(n.module or "") if isinstance(n, ast.ImportFrom) else n.names[0].name for n in nodes}
    imported = {name.partition(".")[0] for name in names} & (LIBRARIES | {"matplotlib"})
    assert all(f'"{name}' in header for name in imported)


def test_no_file_shadows_a_dependency() -> None:
    """A script's folder is first on sys.path: no file or folder of the repository is named like a dependency."""
    skipped = {".git", ".venv", "__pycache__", "runs"}
    for path in ROOT.rglob("*"):
        if not skipped & set(path.relative_to(ROOT).parts) and (path.suffix == ".py" or path.is_dir()):
            assert path.stem not in DEPENDENCIES, path
            if path.suffix == ".py" and path.parent == ROOT:
                assert path.stem not in sys.stdlib_module_names, path


@EACH
def test_everything_has_a_docstring(script: Path) -> None:
    """Every function and class at top level says in its docstring what it does."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "Args":
            assert ast.get_docstring(node), f"{script.name}:{node.lineno} {node.name} has no docstring"


def test_code_lines_by_hand() -> None:
    """Eight lines: one assignment, a def, a return over two lines and a string that is no docstring count: five."""
    source = 'x = 1  # one\n\n# no\ndef f():\n    """Text\n    more."""\n    return (1,\n        2)\n"""a"""\n'
    assert code_lines(source) == 5
    assert code_lines("x = '''a\nb'''\n\n# c\ny = 2\n") == 3


@EACH
def test_sizes(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sizes are promises: code lines, lines, what stands above the ruled line, `main` and its nesting."""
    source = script.read_text(encoding="utf-8")
    main = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "main")
    length, size = code_lines("\n".join(source.splitlines()[main.lineno - 1 : main.end_lineno])), code_lines(source)
    lines, above = len(source.splitlines()), source.splitlines().index(RULE)
    with capsys.disabled():
        print(
            f" {script.name}: {size} code lines, {own_lines(script)} of them its own; {lines} lines, {above} above the "
            f"ruled line; main {length}, nested {nesting(main)}"
        )
    most = SIZES[script.stem]
    assert size <= most[0] and lines <= most[1] and above <= most[2]
    assert length <= 130 and nesting(main) <= 5 and main.end_lineno and main.end_lineno < above + 1
    loop = ast.get_source_segment(source, main) or ""
    assert all(part in loop for part in (".backward()", ".step()", ".zero_grad()")), "the update loop stands in main"
