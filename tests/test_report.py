"""eval/report.py: every figure is on the page with its interval, broken input is named, data never becomes markup."""

import base64
import doctest
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, read_jsonl, write_jsonl
from scipy import stats

from eval import report

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "br", "img", "link", "path", "use"}


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, text: str) -> None:
        """Parse at once."""
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the tag."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Keep the text."""
        self.pieces.append(data)

    def count(self, tag: str) -> int:
        """How many such tags there are."""
        return sum(name == tag for name, _ in self.tags)


def write(path: Path, value: Any) -> Path:
    """Write a .json file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def gate(name: str, value: float, passed: bool) -> dict:
    """A gate of report.json."""
    return {"name": name, "value": value, "threshold": 0.0, "passed": passed}


def make_runs(folder: Path, steps: int = 12) -> Path:
    """A small set of run folders as the scripts and tools leave them: ppo, reward, judge, rm_accuracy, tax."""
    for name in ("ppo", "reward", "judge", "tax"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    versions = {"torch": "2.13.0", "peft": "0.21.2"}
    ppo = {"stage": "ppo", "passed": False, "gates": [gate("kl_step0", 0, True), gate("gold_low", -0.25, False)]}
    write(folder / "ppo" / "report.json", {**ppo, "versions": versions, "base": "aaaa"})
    write(folder / "ppo" / "args.json", {"kl_coef": 0.0625, "reward_fn": None, "dataset": EVIL})
    lines = [{"step": i, "score": 0.5 * i, "gold": 1 - 0.125 * i, "kl": 0.25 * i} for i in range(steps)]
    write_jsonl(folder / "ppo" / "metrics.jsonl", [line | {"fresh/key": line["step"]} for line in lines])
    write_jsonl(folder / "ppo" / "timing.jsonl", [{"step": i, "seconds": 2.0 + i} for i in range(steps)])
    samples = []
    for model, shift in (("sft", 0.0), ("ppo", 2.0)):
        for i in range(20):
            text = f"{model} says {EVIL if i == 0 else i}"
            row = {"id": i, "prompt": f"Question {i}?", "response": text, "model": model, "tokens": 5 + i % 3}
            samples.append(row | {"score": float(rng.normal()) + shift, "gold": 0.5})
    write_jsonl(folder / "ppo" / "samples.jsonl", samples)
    reward = {"stage": "reward", "passed": True, "gates": [gate("accuracy_low", 0.6, True)]}
    write(folder / "reward" / "report.json", {**reward, "versions": versions, "base": "aaaa"})
    pairs = [{"id": i, "prompt": f"P{i}", "chosen": f"good {i}", "rejected": f"bad {i}", "chosen_score": 1.0,
              "rejected_score": 2.0 * (i % 4 == 0), "subset": "s"} for i in range(40)]  # fmt: skip
    write_jsonl(folder / "reward" / "samples.jsonl", pairs)
    write_jsonl(folder / "reward" / "metrics.jsonl", [{"step": 0, "loss": 0.7}, {"step": 1, "loss": 0.6}])
    verdicts = []
    for i in range(20):
        texts = [f"{model} says {EVIL if i == 0 else i}" for model in ("ppo", "sft")]
        row = {"id": i, "key": f"{i}", "prompt": f"Question {i}?", "turn": 1, "model_a": "ppo", "model_b": "sft",
               "length_a": len(texts[0]), "length_b": len(texts[1]), "judge": "j", "reply": "so [[A]]"}  # fmt: skip
        verdicts.append(row | {"order": "ab", "preference": 1.0, "error": None})
        verdicts.append(row | {"order": "ba", "preference": None, "error": "refused"})
    write_jsonl(folder / "judge" / "judgments.jsonl", verdicts)
    parts = {EVIL: {"n": 3, "win_rate": 20.5, "ci_low": 10.25, "ci_high": 30.75},
             "$x_1^{": {"n": 4, "win_rate": 40.5, "ci_low": 20.25, "ci_high": 60.75}}  # fmt: skip
    win_rate = {
        "model_a": "ppo", "n": 805, "win_rate": 63.28, "standard_error": 1.421, "ci_low": 60.54, "ci_high": 66.12,
        "discrete_win_rate": 64.5, "length_controlled_win_rate": 51.5, "lc_standard_error": 2.5, "lc_ci_low": 46.5,
        "lc_ci_high": None, "swap_consistency": 0.8125, "lost_by_reason": {"refused": 17}, "made_up_key": 4711,
    }  # fmt: skip
    write(folder / "judge" / "win_rate.json", win_rate | {"by_category": parts})
    # fmt: off
    rm = {"accuracy": 0.7125, "ci_low": 0.6375, "ci_high": 0.7625, "n": 500, "ties": 3,
          "calibration": {"slope": 0.875, "slope_ci_low": 0.75, "slope_ci_high": 1.125, "ece": 0.0325},
          "by_margin": [{"low": 0.0, "high": 0.5, "n": 250, "accuracy": 0.6, "ci_low": 0.55, "ci_high": 0.65},
                        {"low": 0.5, "high": 2.0, "n": 99, "accuracy": 0.8, "ci_low": 0.75, "ci_high": 0.85}]}
    # fmt: on
    write(folder / "rm_accuracy.json", rm)
    sides = {name: {"n": 100, "mean": m, "standard_error": 0.01, "ci_low": m - 0.02, "ci_high": m + 0.02}
             for name, m in (("before", 0.48), ("after", 0.64), ("difference", 0.16))}  # fmt: skip
    write(folder / "tax" / "alignment_tax.json", {"text": {"nats_per_token": sides, "n": 100}})
    return folder


def make_page(folder: Path, *names: str, **flags: Any) -> tuple[str, Page, dict]:
    """(page as text, parsed, what main returned) of a folder of runs."""
    files = [str(folder / name) for name in names] or [str(path) for path in sorted(folder.iterdir())]
    output = folder.parent / "out" / "page.html"
    result = report.main(report.Args(**{"output": str(output), **flags}), files)
    text = output.read_text(encoding="utf-8")
    return text, Page(text), result


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page, dict]:
    """The page of `make_runs`."""
    return make_page(make_runs(tmp_path_factory.mktemp("made") / "runs"))


def cells(text: str, start: str) -> list[str]:
    """Texts of the table row whose first cell is `start`."""
    for row in re.findall(r"<tr>(.*?)</tr>", text, flags=re.DOTALL):
        found = [Page(cell).text for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.DOTALL)]
        if found and found[0] == start:
            return found
    raise AssertionError(f"no row {start!r}")


def test_doctests() -> None:
    """The numbers in the docstrings."""
    found = doctest.testmod(report)
    assert found.failed == 0 and found.attempted >= 14


def test_every_number_with_an_interval_is_shown_with_it(page: tuple[str, Page, dict]) -> None:
    """Value, interval, n and SE stand in one row, whatever the prefix of the keys; an open end is called open."""
    text, _, result = page
    assert cells(text, "win rate")[1:5] == ["63.28", "60.54 to 66.12", "805", "1.421"]
    assert cells(text, "length controlled win rate")[1:5] == ["51.5", "46.5 to open", "805", "2.5"]
    assert cells(text, "accuracy")[1:5] == ["0.7125", "0.6375 to 0.7625", "500", "–"]
    assert cells(text, "calibration · slope")[1:3] == ["0.875", "0.75 to 1.125"]
    assert cells(text, "by margin · 0.5 to 2 · accuracy")[1:4] == ["0.8", "0.75 to 0.85", "99"]
    assert cells(text, "text · nats per token · difference")[1:5] == ["0.16", "0.14 to 0.18", "100", "0.01"]
    assert cells(text, f"by category · {EVIL} · win rate")[1:4] == ["20.5", "10.25 to 30.75", "3"]
    assert cells(text, "swap consistency")[1:3] == ["0.8125", "no interval"]
    assert result["folders"] == 6 - 1 and result["gates_failed"] == 1 and result["problems"] == []


def test_nothing_in_a_result_is_lost(page: tuple[str, Page, dict]) -> None:
    """Keys that the page does not know are listed as they are; so are arguments, times and every metric."""
    text, _, _ = page
    assert cells(text, "made_up_key") == ["made_up_key", "4,711"]
    assert cells(text, "lost_by_reason · refused") == ["lost_by_reason · refused", "17"]
    assert cells(text, "calibration · ece")[1] == "0.0325"
    assert cells(text, "kl_coef")[1] == "0.0625" and cells(text, "reward_fn")[1] == "–"
    assert cells(text, "seconds")[1:7] == ["12", "2", "13", "7.5", "2", "13"]
    assert cells(text, "fresh/key")[1:7] == ["12", "0", "11", "5.5", "0", "11"]


def test_every_leaf_of_a_result_is_on_the_page(tmp_path: Path) -> None:
    """A result of random shape: each of its numbers appears."""
    rng = np.random.default_rng(1)
    numbers = [int(x) for x in rng.permutation(np.arange(10_000, 99_999))[:60]]
    rest = iter(numbers)

    def grow(depth: int) -> Any:
        """A random dict or list over the next numbers."""
        if depth == 0 or (depth < 3 and rng.random() < 0.2):
            return next(rest, 0)
        children = [grow(depth - 1) for _ in range(4)]
        if rng.random() < 0.5:
            return children
        keys = rng.permutation(["ci_low", "ci_high", "mean", "n", "value", "gold", "low", "model"])[:4]
        return dict(zip(keys.tolist(), children, strict=True))

    write(tmp_path / "runs" / "x" / "odd.json", {"a": grow(3), "b": [grow(2), {"x": grow(2)}, grow(1)]})
    _, seen, _ = make_page(tmp_path / "runs")
    used = numbers[: len(numbers) - len(list(rest))]
    assert len(used) >= 20
    assert [x for x in used if f"{x:,}" not in seen.text and f"{float(x):.4g}" not in seen.text] == []


def test_known_numbers_say_what_they_cannot_tell(page: tuple[str, Page, dict]) -> None:
    """Its own note for a known key; the file's for others; gates and curves too."""
    text, seen, _ = page
    assert cells(text, "win rate")[5] == report.NOTES["win_rate"] and "people agree" in report.NOTES["win_rate"]
    assert cells(text, "text · nats per token · before")[5] == report.NOTES["nats_per_token"]
    assert cells(text, "gold_low") == ["gold_low", "-0.25", "0", "FAILED", report.GATES["gold_low"]]
    assert "training seeds" in seen.text and "noisy, can fall below 0" in seen.text


def test_held_out_means_against_scipy(tmp_path: Path) -> None:
    """Means, paired difference and accuracy of samples.jsonl equal scipy's on the same rows, 95 % by the normal."""
    folder = make_runs(tmp_path / "runs")
    text, _, _ = make_page(folder, "ppo", "reward")
    rows = read_jsonl(folder / "ppo" / "samples.jsonl")
    before, after = (np.array([r["score"] for r in rows if r["model"] == m]) for m in ("sft", "ppo"))
    error = np.std(after - before, ddof=1) / math.sqrt(20)
    low, high = (np.mean(after - before) + sign * stats.norm.ppf(0.975) * error for sign in (-1, 1))
    expected = [f"{np.mean(after - before):.4g}", f"{low:.4g} to {high:.4g}", "20", f"{error:.4g}"]
    assert cells(text, "score · difference")[1:5] == expected
    assert cells(text, "score · before")[1] == f"{before.mean():.4g}"
    assert cells(text, "held-out accuracy")[1:4:2] == ["0.75", "40"]


def test_held_out_rows_are_paired_by_id() -> None:
    """Other order of ids, ids of one model only, several rows of an id: paired means all the same."""
    rows = [{"id": i, "model": "a", "score": s} for i, s in ((1, 1.0), (2, 5.0), (3, 7.0), (9, 100.0))]
    rows += [{"id": i, "model": "b", "score": s} for i, s in ((3, 8.0), (1, 1.5), (1, 2.5), (2, 7.0), (8, -50.0))]
    found = report.held_out(rows)["score"]
    assert (found["before"]["mean"], found["after"]["mean"]) == (13 / 3, 17 / 3)
    assert found["difference"]["mean"] == pytest.approx(4 / 3) and found["difference"]["n"] == 3
    assert report.held_out(rows[:4]) == {} and report.held_out([{"id": 1, "response": "x"}]) == {}


def test_forest_plots_draw_the_intervals(page: tuple[str, Page, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of an estimate goes from its low to its high end; an open end to the edge; shares stand in percent."""
    from matplotlib.axes import Axes

    lines: list[tuple[list[float], list[float]]] = []
    original = Axes.plot

    def spy(self: Any, x: Any, y: Any, *rest: Any, **settings: Any) -> Any:
        """Keep what is drawn."""
        lines.append((list(x), list(y)))
        return original(self, x, y, *rest, **settings)

    monkeypatch.setattr(Axes, "plot", spy)
    result = {"accuracy": 0.7, "ci_low": 0.6, "ci_high": 0.8, "n": 9, "clustered": {
        "mean": 0.75, "ci_low": 0.5, "ci_high": None}}  # fmt: skip
    text, estimates = report.result_html("rm_accuracy.json", result, "")
    drawn = [(pytest.approx(x), y) for x, y in lines if len(x)]
    assert ([60, 80], [0, 0]) in drawn and ([70], [0]) in drawn
    assert ([50, 100], [1, 1]) in drawn and ([75], [1]) in drawn and ([100], [1]) in drawn
    assert [e.value for e in estimates] == pytest.approx([70, 75])
    assert "70 [60 to 80]" in text and "75 [50 to open]" in text


def test_percent_files_are_not_multiplied(page: tuple[str, Page, dict]) -> None:
    """A win-rate that its file gives in percent stands at 63.3 in the overview, an accuracy of 0.7125 at 71.3."""
    overview = page[0].split("<h2>Overview</h2>")[1].split("<section")[0]
    assert "63.3 [60.5 to 66.1]" in overview and "71.2 [63.7 to 76.2]" in overview and "75 [" in overview
    assert "20.5 [" not in overview  # categories stay in their section


def test_data_never_becomes_markup(page: tuple[str, Page, dict]) -> None:
    """<script> in responses, keys, arguments and categories is text; no handler, no script, no foreign image."""
    text, seen, _ = page
    assert seen.count("script") == 0 and "<script" not in text.lower()
    assert all(not name.startswith("on") for _, attributes in seen.tags for name in attributes)
    assert EVIL in seen.text
    assert {tag for tag, _ in seen.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "nav", "a", "p", "section", "table", "tr",
        "th", "td", "div", "span", "b", "ul", "li", "figure", "figcaption", "details", "summary", "img", "svg", "g",
        "defs", "path", "use", "text", "clippath", "rect", "tspan",
    }  # fmt: skip


def test_the_page_asks_nothing_of_the_network(page: tuple[str, Page, dict]) -> None:
    """No address in any attribute but anchors and data:, and a policy that forbids the rest."""
    text, seen, _ = page
    names = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
    links = [value or "" for _, attributes in seen.tags for name, value in attributes.items() if name in names]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    policy = next(a["content"] or "" for tag, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")


def test_references_inside_the_figures_resolve(tmp_path: Path) -> None:
    """Every #id that a figure uses is defined once, also where two runs have the same curves."""
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_jsonl(tmp_path / "runs" / name / "metrics.jsonl", [{"step": i, "kl": i * i} for i in range(12)])
    text, seen, _ = make_page(tmp_path / "runs")
    ids = [a["id"] for _, a in seen.tags if a.get("id")]
    used = set(re.findall(r"""(?:url\(#|href=["']#)([\w.-]+)""", text))
    assert len(used) > 4 and used <= set(ids) and len(ids) == len(set(ids))


def test_curves_show_held_out_prompts_and_blocks(page: tuple[str, Page, dict]) -> None:
    """Score and gold have orange marks with intervals, kl only blue bars; the caption says which is which."""
    figures = {name: re.findall(rf"<figure>(?:(?!</figure>).)*<b>{name}</b>.*?</figure>", page[0], flags=re.DOTALL)[0]
               for name in ("score", "gold", "kl")}  # fmt: skip
    assert [report.ORANGE in figures[name] for name in figures] == [True, True, False]
    assert all(report.BLUE in figure and "blue bars: means of 5 steps or more" in figure for figure in figures.values())
    assert "orange: held-out prompts before and after" in figures["gold"]


def test_judged_pairs_side_by_side(page: tuple[str, Page, dict]) -> None:
    """Texts are joined from samples.jsonl; the verdict names each order; a lost order is no verdict."""
    judge = Page(page[0].split("<h3>judgments.jsonl</h3>")[1])
    assert "8 of 20, at equal distances" in judge.text
    assert "A ppo ppo says 2 B sft sft says 2 no verdict (ab 1, ba refused)" in judge.text
    assert "so [[A]]" in judge.text and "text not found" not in judge.text


def test_texts_of_another_run_are_not_joined(tmp_path: Path) -> None:
    """Other prompt or other length under the same id and model: said to be missing, not shown as what was judged."""
    row = {"id": 1, "prompt": "Q", "order": "ab", "preference": 0, "model_a": "x", "model_b": "y", "length_a": 3}
    write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "prompt": "Q", "model": "x", "response": "four"},
                                       {"id": 1, "prompt": "other", "model": "y", "response": "wrong"}])  # fmt: skip
    (tmp_path / "runs" / "judge").mkdir(parents=True)
    write_jsonl(tmp_path / "runs" / "judge" / "judgments.jsonl", [row | {"length_b": None}])
    _, seen, _ = make_page(tmp_path / "runs", responses=[str(tmp_path / "a.jsonl")])
    assert "four" not in seen.text and "wrong" not in seen.text and "--responses" in seen.text
    write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "prompt": "Q", "model": "x", "response": "abc"},
                                       {"id": 1, "prompt": "Q", "model": "y", "response": "right"}])  # fmt: skip
    _, seen, _ = make_page(tmp_path / "runs", responses=[str(tmp_path / "a.jsonl")])
    assert "A x abc B y right B wins: 0 (ab 0)" in seen.text and "--responses" not in seen.text


def test_tinys_answers_are_found(tmp_path: Path) -> None:
    """Judgments of tiny/'s response files need no --responses."""
    a, b = (read_jsonl(ROOT / "tiny" / f"responses_{model}.jsonl")[5] for model in ("ppo", "sft"))
    row = {"id": a["id"], "prompt": a["prompt"], "order": "ab", "preference": 0.5, "model_a": a["model"],
           "model_b": b["model"], "length_a": len(a["response"]), "length_b": len(b["response"])}  # fmt: skip
    (tmp_path / "runs").mkdir()
    write_jsonl(tmp_path / "runs" / "judgments.jsonl", [row])
    _, seen, _ = make_page(tmp_path / "runs")
    assert a["response"] in seen.text and b["response"] in seen.text and "tie: 0.5 (ab 0.5)" in seen.text


def test_broken_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a line, a wrong type, half a JSON file, a list, NaN, odd steps: each printed and on the page, none fatal."""
    folder = make_runs(tmp_path / "runs")
    metrics = folder / "ppo" / "metrics.jsonl"
    good = metrics.read_text().splitlines()
    odd = [
        good[0],
        good[1][:20],
        "[1]",
        '{"step": 3, "score": NaN}',
        '{"step": "x"}',
        good[5],
        good[5],
        '{"step": 9, "kl": "q"}',
    ]
    metrics.write_text("\n".join(odd))
    with (folder / "judge" / "judgments.jsonl").open("a") as stream:
        stream.write('{"id": 1, "preference": 1.5, "order": "ab"}\n\n{"id": 1, "response": null}\n')
    (folder / "judge" / "win_rate.json").write_text('{\n "win_rate": 5,\n "n"')
    (folder / "tax" / "alignment_tax.json").write_text("[]")
    write(folder / "reward" / "report.json", {"stage": ["?"], "gates": [{"name": "x"}, 3], "versions": [1]})
    (folder / "empty").mkdir()
    (folder / "empty" / "none.jsonl").write_text("\n")
    (folder / "deep").mkdir()
    (folder / "deep" / "a.json").write_text('{"a":' * 60 + "1" + "}" * 60)
    (folder / "deep" / "b.json").write_text('{"a":' * 100_000)
    _, seen, result = make_page(folder, *[path.name for path in sorted(folder.iterdir())], "nowhere")
    printed, name = capsys.readouterr().out, str(folder)
    for where, what in (
        (f"{name}/ppo/metrics.jsonl, line 2", "not JSON, or half a line"),
        (f"{name}/ppo/metrics.jsonl, line 3", "expected a JSON object, found '[1]'"),
        (f"{name}/ppo/metrics.jsonl, line 4", "score is 'nan', expected a finite number"),
        (f"{name}/ppo/metrics.jsonl, line 5", "step is 'x', expected a finite number"),
        (f"{name}/ppo/metrics.jsonl", "steps are missing, repeated or out of order"),
        (f"{name}/ppo/metrics.jsonl", "values that are no numbers, not drawn: kl"),
        (f"{name}/judge/judgments.jsonl, line 41", "preference is 1.5, expected a number from 0 to 1"),
        (f"{name}/judge/judgments.jsonl, line 43", "response is 'None', expected a text"),
        (f"{name}/judge/win_rate.json, line 3", "not JSON, or half a file"),
        (f"{name}/tax/alignment_tax.json, line 1", "expected a JSON object with keys, found '[]'"),
        (f"{name}/reward/report.json", "expected a list `gates` of objects"),
        (f"{name}/empty/none.jsonl", "no rows"),
        (f"{name}/deep/b.json", "not JSON, or half a file"),
        (f"{name}/nowhere", "no such file or folder"),
    ):
        assert any(w == where and what in text for w, text in result["problems"]), (where, what)
        assert f"left out, or odd: {where}: " in printed and f"{where}: " in seen.text
    assert "nested too deep to show" in seen.text and "ppo says 2" in seen.text


@pytest.mark.parametrize(
    "value",
    [None, True, 3, "text", [[]], {"x": None}, [{"model": []}], 10**400],
    ids="nulls bool int text list dict rows huge".split(),
)
def test_odd_values_anywhere_do_not_crash(tmp_path: Path, value: Any) -> None:
    """Any JSON value in place of any known key of results, reports and rows."""
    folder = tmp_path / "runs" / "odd"
    keys = [
        "n",
        "ci_low",
        "ci_high",
        "win_rate",
        "mean",
        "standard_error",
        "by_category",
        "models",
        "discrete_win_rate",
    ]
    write(
        folder / "a.json",
        {"b": {key: value for key in keys}, "models": [value, value], "ratings": value, "by_order": {"x": value}},
    )
    whole = {"accuracy": 1, "ci_low": 0, "ci_high": 2, "n": 5}
    write(folder / "c.json", {key: {**whole, key: value} for key in whole})
    write(folder / "report.json", dict.fromkeys(("stage", "gates", "versions", "base"), value))
    write(folder / "args.json", {"args": value})
    for name in (
        "prompt",
        "id",
        "turn",
        "model",
        "order",
        "reply",
        "error",
        "model_a",
        "length_a",
        "judge",
        "step",
        "loss",
    ):
        base = {"id": 1, "prompt": "p", "preference": 1, "model_a": "m", "step": 0}
        write_jsonl(folder / f"{name}_j.jsonl", [{**base, name: value}, base])
        write_jsonl(folder / f"{name}_r.jsonl", [{"id": 1, "prompt": "p", "response": "r", "model": "m", name: value}])
    for name in ("metrics", "timing"):
        write_jsonl(folder / f"{name}.jsonl", [{"step": value, "loss": value}, {"step": 1, "loss": 2}])
    write_jsonl(folder / "samples.jsonl", [{"id": value, "model": value, "score": 1, "response": "r"}, {"a": value}])
    _, seen, _ = make_page(tmp_path / "runs")
    assert "c.json" in seen.text


def test_strange_names_reach_the_plots(tmp_path: Path) -> None:
    """Dollar signs, backslashes, lone surrogates, control characters, other scripts, long names: drawn, escaped."""
    names = [
        "$x_1^{",
        r"\1 \frac",
        "\ud800 half",
        "bell\x07\nline",
        "日本語 😀",
        "--> <!--",
        "#010203",
        "w" * 500,
        "]]>",
    ]
    parts = {name: {"n": 9, "win_rate": 0.5, "ci_low": 0.25, "ci_high": 0.75} for name in names}
    write(tmp_path / "runs" / "x" / "win_rate.json", {"by_category": parts})
    text, seen, _ = make_page(tmp_path / "runs")
    assert text.count("50 [25 to 75]") == len(names) and "<!--" not in text
    assert all(f"by category · {name} · win rate" in seen.text for name in names[:2])


def test_same_input_same_bytes(tmp_path: Path) -> None:
    """Twice in one process, the second time with the first page lying among the runs."""
    folder = make_runs(tmp_path / "runs")
    pages = []
    for _ in range(2):
        files = [*map(str, sorted((folder / "reward").iterdir())), str(folder / "judge")]
        report.main(report.Args(output=str(folder / "reward" / "report.html")), files)
        pages.append((folder / "reward" / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_large_runs_stay_small(tmp_path: Path) -> None:
    """20,000 steps, 3,000 samples of 20,000 characters: what is cut is said, the page stays under 2 MB."""
    folder = tmp_path / "runs" / "ppo"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = [{"step": i} | {f"k{k}": float(x) for k, x in enumerate(rng.normal(size=2))} for i in range(20_000)]
    write_jsonl(folder / "metrics.jsonl", rows)
    write_jsonl(
        folder / "samples.jsonl",
        [{"id": i, "prompt": "p", "model": "m", "response": "w " * 10_000} for i in range(300)],
    )
    write(folder / "list.json", {"rows": [{"name": f"n{i}", "x": i} for i in range(5000)]})
    text, seen, _ = make_page(tmp_path / "runs")
    assert len(text) < 2_000_000
    assert "every 67th of 20000 steps drawn" in seen.text and "8 of 300, at equal distances" in seen.text
    assert "(18,801 more characters)" in seen.text and "9,600 more in the file" in seen.text


def test_different_bases_are_pointed_out(tmp_path: Path) -> None:
    """Runs with other versions or another base model are not compared without a word."""
    for base in ("aaaa", "bbbb"):
        for name, own in (("one", "aaaa"), ("two", base)):
            write(tmp_path / "runs" / name / "report.json", {"stage": "sft", "gates": [], "versions": {}, "base": own})
        _, seen, _ = make_page(tmp_path / "runs")
        assert ("Runs differ in versions or base model" in seen.text) == (base == "bbbb")


def test_pictures_of_tools_are_embedded(tmp_path: Path) -> None:
    """A small .png is in the page to the byte; what is no PNG is listed as not shown."""
    folder = make_runs(tmp_path / "runs")
    png = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    )
    (folder / "judge" / "ranking.png").write_bytes(png)
    (folder / "judge" / "fake.png").write_bytes(b"<svg onload=alert(1)>")
    (folder / "judge" / "curves.png").write_bytes(png)
    text, seen, _ = make_page(folder, "judge")
    assert text.count(base64.b64encode(png).decode()) == 1 and "Not shown: curves.png, fake.png" in seen.text


def test_nothing_to_show_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No runs/ folder, an unknown name, a folder without results: UserError, and no page."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(report.UserError, match="nothing in runs/ here"):
        report.main(report.Args())
    (tmp_path / "runs" / "a" / "checkpoint").mkdir(parents=True)
    with pytest.raises(report.UserError, match="runs/a: nothing to show"):
        report.main(report.Args())
    with pytest.raises(report.UserError, match="typo: no such file or folder"):
        report.main(report.Args(), ["typo"])
    assert not (tmp_path / "runs" / "report.html").exists()


def test_bare_command_reads_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without files: every folder and .json of runs/, training stages in their order, written to runs/report.html."""
    make_runs(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert report.main(report.Args())["folders"] == 5
    titles = re.findall(r"<h2>(.*?)</h2>", (tmp_path / "runs" / "report.html").read_text())
    assert titles == ["Overview", "runs/reward (reward)", "runs/ppo (ppo)", "runs/judge", "runs", "runs/tax"]


def browser(*flags: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run headless Chromium, with no network, home in `folder`."""
    if CHROMIUM is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=3000", *flags]  # fmt: skip
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)


def look(folder: Path, width: int, dark: bool) -> None:
    """The page in `folder` on screen: not blank, in the right colours, with intervals, nothing over the right edge."""
    from matplotlib.image import imread

    flags = [f"--screenshot={folder}/shot.png", f"--window-size={width},3000", f"file://{folder}/out/page.html"]
    browser(*flags, *["--blink-settings=preferredColorScheme=0"] * dark, folder=folder)
    pixels = imread(folder / "shot.png")[..., :3]
    assert pixels.shape[:2] == (3000, width) and pixels.std() > 0.05
    assert (pixels.mean() < 0.4) == dark
    blue = (abs(pixels - np.array([0x3F, 0x8A, 0xE0]) / 255) < 0.02).all(-1)
    assert blue.sum() > 200
    assert pixels[:, -10:].reshape(-1, 3).std(axis=0).max() < 0.01


def test_in_a_real_browser(tmp_path: Path) -> None:
    """Chromium's own tree has the sections and figures, and the page fits a phone."""
    make_page(make_runs(tmp_path / "runs"))
    tree = Page(browser("--dump-dom", f"file://{tmp_path}/out/page.html", folder=tmp_path).stdout)
    titles = [a["id"] for tag, a in tree.tags if tag == "section" and a.get("id")]
    assert titles == ["s0", "s1", "s2", "s3", "s4"] and tree.count("script") == 0
    assert tree.count("svg") == tree.count("figure") >= 10
    assert "Report: 5 folders" in tree.text and EVIL in tree.text
    look(tmp_path, 390, dark=False)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, True)])
def test_on_other_screens(tmp_path: Path, width: int, dark: bool) -> None:
    """Desktop and phone, light and dark."""
    make_page(make_runs(tmp_path / "runs"))
    look(tmp_path, width, dark)
