"""eval/length_bias.py: the annotator's dial, hh-rlhf's and AlpacaEval's figures, hand-worked files, errors."""

import csv
import doctest
import importlib.util
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import statsmodels.formula.api as smf
from conftest import ROOT, read_jsonl, shared_or_skip, write_jsonl
from scipy import stats
from scipy.special import expit

from eval import length_bias

TINY = ROOT / "tiny"
GOLD = f"{TINY / 'annotator.py'}:gold"
Row = dict[str, Any]


def run(path: Path, output: Path, **flags: Any) -> dict[str, Any]:
    """The result of length_bias.main on one file."""
    return length_bias.main(length_bias.Args(output=str(output), **{"bootstrap": 50, **flags}), [str(path)])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a test's result goes."""
    return tmp_path / "result.json"


@pytest.fixture(scope="module")
def annotator() -> Any:
    """The embedded world's annotator, whose dials are known."""
    spec = importlib.util.spec_from_file_location("annotator_of_test", TINY / "annotator.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def covers(part: dict[str, float], truth: float) -> bool:
    """Whether a figure's interval holds the truth, and is not so wide that it would hold anything."""
    return part["ci_low"] <= truth <= part["ci_high"] and part["ci_high"] - part["ci_low"] < abs(truth)


def test_doctests() -> None:
    """The numbers in the docstrings."""
    result = doctest.testmod(length_bias)
    assert result.failed == 0 and result.attempted >= 7


# ------------------------------------------------------------------------------------------------- the embedded world
def test_the_dial_is_recovered(annotator: Any, out: Path) -> None:
    """At equal gold the taste per word is LENGTH_BIAS / TEMPERATURE; without the control it is another number."""
    dial, temperature = annotator.LENGTH_BIAS, annotator.TEMPERATURE
    found = run(TINY / "preferences.jsonl", out, unit="words", control_fn=[GOLD])
    assert covers(found["coefficient"], dial / temperature) and covers(found["controls"][GOLD], 1 / temperature)
    assert (found["pairs"], found["questions"], found["lost"]) == (4000, 500, 0)
    plain = run(TINY / "preferences.jsonl", out, unit="words")
    assert plain["coefficient"]["ci_high"] < 0.5 * dial / temperature  # longer texts ramble
    assert plain["explained"] < found["explained"] and plain["controls"] == {}
    held_out = run(TINY / "preferences_eval.jsonl", out, unit="words", control_fn=[GOLD])
    assert covers(held_out["coefficient"], dial / temperature)


def test_clustered_errors_equal_formulas(out: Path, annotator: Any) -> None:
    """Coefficient, its error and deviance equal those of statsmodels' formula interface on the same columns."""
    rows = read_jsonl(TINY / "preferences.jsonl")[:800]
    path = write_jsonl(out.with_name("pairs.jsonl"), rows)
    found = run(path, out, control_fn=[GOLD])
    prompts, chosen, rejected = ([row[name] for row in rows] for name in ("prompt", "chosen", "rejected"))
    gold = np.subtract(annotator.gold(prompts, chosen), annotator.gold(prompts, rejected))
    length = np.array([len(c) - len(r) for c, r in zip(chosen, rejected, strict=True)])
    flip = np.where(np.arange(800) % 2, 1, -1)  # which of the two is called A must not matter
    data = {"win": (flip > 0).astype(int), "length": flip * length, "gold": flip * gold}
    groups = np.unique(prompts, return_inverse=True)[1]
    model = smf.logit("win ~ length + gold - 1", data).fit(disp=0, cov_type="cluster", cov_kwds={"groups": groups})
    assert found["coefficient"]["value"] == pytest.approx(model.params["length"], rel=1e-5)
    assert found["coefficient"]["standard_error"] == pytest.approx(model.bse["length"], rel=1e-3)
    assert found["controls"][GOLD]["ci_low"] == pytest.approx(model.conf_int().loc["gold", 0], rel=1e-3)
    assert found["gap"]["value"] == pytest.approx(2 * np.mean(length[length != 0] > 0) - 1)
    gaps = smf.ols("win ~ longer", {"win": np.r_[np.ones(800), np.zeros(800)][np.tile(length != 0, 2)],
                                    "longer": 1 * (np.r_[length, -length] > 0)[np.tile(length != 0, 2)]})  # fmt: skip
    groups = np.tile(groups, 2)[np.tile(length != 0, 2)]
    gap = gaps.fit(cov_type="cluster", cov_kwds={"groups": groups})
    assert found["gap"]["standard_error"] == pytest.approx(gap.bse["longer"], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- real data
@pytest.mark.parametrize("unit", ["chars", "words"])
@pytest.mark.parametrize("subset", ["harmless_base", "helpful_base"])
def test_hh_rlhf(subset: str, unit: str, out: Path) -> None:
    """Two whole dialogues: the accuracy of "the longer one wins" and its Wilson interval, exactly."""
    expected = json.loads(shared_or_skip("data", "expected_dev.json").read_text())
    target = expected["hh_rlhf"][subset][f"length_only_{unit}"]
    found = run(shared_or_skip("data", "hh_rlhf", f"{subset}_test_dev.jsonl"), out, unit=unit)
    wins = found["longer_wins"]
    assert (found["pairs"], found["lost"], wins["n"]) == (400, 0, 400)
    assert (wins["longer"], found["equal_length"]) == (target["longer"], target["equal"])
    assert wins["value"] == target["accuracy_ties_half"]
    assert [wins["ci_low"], wins["ci_high"]] == pytest.approx(target["wilson95"], abs=1e-4)
    decided = target["n"] - target["equal"]
    assert found["gap"]["value"] == pytest.approx(2 * target["longer"] / decided - 1)
    assert json.loads(out.read_text()) == found


def test_awkward_pairs_are_counted(out: Path) -> None:
    """Identical pairs, differing prompts and empty replies are left out, counted by reason, and crash nothing."""
    awkward = read_jsonl(shared_or_skip("data", "hh_rlhf", "awkward_pairs_dev.jsonl"))
    good = read_jsonl(shared_or_skip("data", "hh_rlhf", "helpful_base_test_dev.jsonl"))
    found = run(write_jsonl(out.with_name("pairs.jsonl"), awkward + good), out)
    kinds = Counter(row["kind"] for row in awkward)
    reasons = {"identical": "identical pair", "different_prompt": "different prompts", "empty_response": "empty reply"}
    assert found["lost_by_reason"] == {reasons[kind]: count for kind, count in kinds.items()}
    assert found["lost"] == len(awkward) and found["pairs"] == 400 and found["longer_wins"]["longer"] == 239


def test_judgments_of_alpaca_eval(out: Path) -> None:
    """Win-rates when longer and shorter of a real judge; Spearman by scipy; what length explains has the right sign."""
    data = shared_or_skip("data", "alpaca_eval", "preferences_dev.csv")
    with data.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["model"] == "FuseChat-Llama-3.1-8B-Instruct"]
    p = np.array([float(row["preference"]) - 1 for row in rows])
    length = np.array([int(row["len_model"]) - int(row["len_ref"]) for row in rows])
    games = [{"id": i, "order": "ab", "preference": x, "length_a": int(r["len_model"]), "length_b": int(r["len_ref"])}
             for i, (x, r) in enumerate(zip(p, rows, strict=True))]  # fmt: skip
    found = run(write_jsonl(out.with_name("judgments.jsonl"), games), out, bootstrap=300)
    expected = json.loads(shared_or_skip("data", "expected_dev.json").read_text())["alpaca_eval"]
    target = expected["FuseChat-Llama-3.1-8B-Instruct"]
    longer, shorter = (target[f"win_rate_if_{name}"] / 100 for name in ("longer", "shorter"))
    ties = p[length == 0]  # the reference counts equal lengths as not longer
    assert len(ties) in (0, found["equal_length"])
    assert p[length > 0].mean() == pytest.approx(longer, abs=1e-6)
    assert found["gap"]["value"] == pytest.approx(p[length > 0].mean() - p[length < 0].mean(), abs=1e-9)
    assert found["gap"]["value"] == pytest.approx(longer - shorter, abs=0.01)
    welch = stats.ttest_ind(p[length > 0], p[length < 0], equal_var=False).confidence_interval()
    assert (found["gap"]["ci_low"], found["gap"]["ci_high"]) == pytest.approx((welch.low, welch.high), abs=1e-3)
    assert found["spearman"]["value"] == pytest.approx(stats.spearmanr(length, p).statistic)
    assert found["spearman"]["standard_error"] == pytest.approx(1 / math.sqrt(805), rel=0.2)
    assert found["win_rate"] == pytest.approx(p.mean()) and found["coefficient"]["ci_low"] > 0
    x = found["equal_length_win_rate"]
    assert found["explained_by_length"]["value"] == pytest.approx(found["win_rate"] - x["value"])


# ------------------------------------------------------------------------------------------------------------- by hand
def games_of(n: int, seed: int, bias: float, strength: float) -> list[Row]:
    """Judgments of n questions in both orders: logit P(A wins) = strength + bias * length difference / 100."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        a, b = rng.integers(100, 900, size=2) + np.array([300, 0])
        for order in ("ab", "ba"):
            p = float(rng.random() < expit(strength + bias * (a - b) / 100))
            rows.append({"id": i, "order": order, "preference": p, "length_a": int(a), "length_b": int(b)})
    return rows


def test_what_length_explains(out: Path) -> None:
    """A weaker but longer model: the win-rate at equal length, the coefficient and the difference hold the truth."""
    found = run(write_jsonl(out.with_name("j.jsonl"), games_of(1500, 0, 0.4, -0.6)), out, bootstrap=200)
    assert covers(found["coefficient"], 0.004)
    assert covers(found["equal_length_win_rate"], float(expit(-0.6)))
    assert found["win_rate"] > 0.55
    part = found["explained_by_length"]
    assert part["ci_low"] < found["win_rate"] - expit(-0.6) < part["ci_high"] and part["ci_low"] > 0.1
    fair = run(write_jsonl(out.with_name("j.jsonl"), games_of(1500, 1, 0.0, 0.3)), out, bootstrap=200)
    for name in ("gap", "spearman", "coefficient", "explained_by_length"):
        assert fair[name]["ci_low"] < 0 < fair[name]["ci_high"], name
    assert fair["explained"] < 0.003


def test_judgments_by_hand(out: Path) -> None:
    """Orders are averaged; a question with one verdict of two is left out; rows of a resumed run count once."""
    lengths = [(30, 10), (10, 30), (50, 50), (40, 10), (10, 40), (90, 1)]
    verdicts = [(1.0, 1.0), (0.0, 0.5), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (1.0, None)]
    rows = [{"id": f"q{i}", "order": order, "preference": p, "length_a": a, "length_b": b, "key": f"{i}{order}"}
            for i, ((a, b), both) in enumerate(zip(lengths, verdicts, strict=True))
            for order, p in zip(("ab", "ba"), both, strict=True)]  # fmt: skip
    rows.append(rows[0] | {"id": "q6", "key": "6ab"})  # its other order is not in the file
    rows.append(rows[0] | {"preference": 1.0})
    rows[0] = rows[0] | {"preference": None}
    found = run(write_jsonl(out.with_name("j.jsonl"), rows), out)
    assert (found["pairs"], found["ties"], found["equal_length"]) == (5, 3, 1)
    assert found["lost_by_reason"] == {"a verdict in one order only": 2}
    assert found["gap"]["value"] == pytest.approx((1 + 0.5) / 2 - (0.25 + 0.5) / 2)
    assert found["longer_wins"]["value"] == pytest.approx((1 + 1 + 0.5 + 0.5 + 0.5) / 5)
    assert found["win_rate"] == pytest.approx((1 + 0.25 + 0.5 + 0.5 + 0.5) / 5)


def test_scored_pairs(out: Path) -> None:
    """The scorer's bias is measured on who gets the higher score, the labels' beside it; no score is a loss."""
    rng, rows = np.random.default_rng(0), []
    for i in range(400):
        a, b = rng.integers(10, 500, size=2)
        scores = rng.normal(size=2) + 0.01 * np.array([a, b])  # likes length; the labels don't
        rows.append({"id": i, "chosen_score": scores[0], "rejected_score": scores[1],
                     "chosen_length": int(a), "rejected_length": int(b)})  # fmt: skip
    rows.append({"id": 400, "chosen_score": None, "rejected_score": 1.0, "chosen_length": 1, "rejected_length": 2})
    found = run(write_jsonl(out.with_name("p.jsonl"), rows), out)
    margin = np.array([r["chosen_score"] - r["rejected_score"] for r in rows[:400]])
    length = np.array([r["chosen_length"] - r["rejected_length"] for r in rows[:400]])
    assert found["longer_wins"]["value"] == pytest.approx(np.mean((np.sign(margin * length) + 1) / 2))
    assert found["longer_wins"]["value"] > 0.8 and abs(found["labels"]["longer_wins"]["value"] - 0.5) < 0.08
    both = stats.spearmanr(np.r_[length, -length], np.r_[margin, -margin]).statistic
    assert found["spearman"]["value"] == pytest.approx(both)
    assert found["lost_by_reason"] == {"no chosen_score": 1}
    assert found["labels"]["coefficient"]["ci_low"] < 0 < found["labels"]["coefficient"]["ci_high"]
    with pytest.raises(length_bias.UserError, match="line 1: no text, and chosen_length is in characters"):
        run(out.with_name("p.jsonl"), out, unit="words")


def test_scores(out: Path) -> None:
    """Several responses to an id: pairs within it, so that long questions are no bias; one each: ranks."""
    rows = [{"id": i, "prompt": f"p{i}", "response": "x" * (100 * i + k), "score": 10.0 * i + (k - 1) ** 2}
            for i in range(6) for k in range(3)]  # fmt: skip
    path = write_jsonl(out.with_name("s.jsonl"), rows)
    found = run(path, out)
    assert (found["pairs"], found["questions"], found["ties"]) == (18, 6, 6)  # 1, 0, 1: the middle one loses both
    assert found["gap"]["value"] == pytest.approx(0) and found["longer_wins"]["value"] == 0.5
    alone = run(write_jsonl(path, rows[::3] + [{"id": "x", "response": "y", "score": None}]), out)
    assert alone["spearman"]["value"] == pytest.approx(1) and "gap" not in alone
    assert alone["lost_by_reason"] == {"no score": 1} and alone["questions"] == 6
    lengths = [{"id": i, "score": -float(i), "length": i} for i in range(5)]
    assert run(write_jsonl(path, lengths), out)["spearman"]["value"] == pytest.approx(-1)


def test_message_lists_and_columns(out: Path) -> None:
    """Message lists give their last reply; a control function gets prompts, responses and the other columns."""
    file = out.with_name("control.py")
    file.write_text(
        "def known(prompts, responses, weight, **columns):\n"
        "    assert set(columns) == {'chosen', 'rejected'}, columns\n"
        "    assert all(p[0]['role'] == 'user' for p in prompts)\n"
        "    return [None if r == 'lost' else w * len(r) % 7 for r, w in zip(responses, weight)]\n"
        "def short(prompts, responses, **columns):\n    return [1.0]\n"
        "def text(prompts, responses, **columns):\n    return ['long'] * len(responses)\n"
    )
    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "weight": 3,
             "chosen": [{"role": "assistant", "content": "a" * (i % 9 + 1)}], "rejected": "b" * (i % 5 + 1)}
            for i in range(60) if i % 9 != i % 5]  # fmt: skip
    rows[3]["rejected"] = "lost"
    path = write_jsonl(out.with_name("p.jsonl"), rows)
    found = run(path, out, control_fn=[f"{file}:known"])
    assert found["lost_by_reason"] == {"no control value": 1} and found["pairs"] == len(rows) - 1
    assert list(found["controls"]) == [f"{file}:known"]
    with pytest.raises(length_bias.UserError, match="1 values for"):
        run(path, out, control_fn=[f"{file}:short"])
    with pytest.raises(length_bias.UserError, match="expected a number or None per response"):
        run(path, out, control_fn=[f"{file}:text"])
    with pytest.raises(length_bias.UserError, match="no function absent"):
        run(path, out, control_fn=[f"{file}:absent"])


def test_no_number_where_there_is_none(out: Path) -> None:
    """All of equal length, or the winner a function of length: null, not a wild figure; still a table."""
    rows = [{"prompt": f"{i}", "chosen": "aaaa", "rejected": "bbbb"} for i in range(20)]
    found = run(write_jsonl(out.with_name("p.jsonl"), rows), out)
    assert found["gap"]["value"] is None and found["coefficient"] is None and found["longer_wins"]["value"] == 0.5
    one = run(
        write_jsonl(out.with_name("p.jsonl"), [{"prompt": "q", "chosen": "a" * i, "rejected": "bb"} for i in (1, 4)]),
        out,
    )
    assert one["questions"] == 1 and one["coefficient"] is None and one["gap"]["ci_low"] is None
    rows = [{"prompt": f"{i}", "chosen": "aaaa" * (i + 2), "rejected": "b"} for i in range(20)]
    found = run(write_jsonl(out.with_name("p.jsonl"), rows), out)
    assert found["coefficient"] is None and found["gap"]["value"] == pytest.approx(1)
    assert found["longer_wins"]["value"] == 1 and found["longer_wins"]["ci_low"] < 0.9


@pytest.mark.parametrize("turns", [1, 2])
def test_two_questions(turns: int, out: Path) -> None:
    """Two questions: what they can tell, null for the rest; never an interval from an error of 1e-16."""
    given = [(1, 0.7, 5, 3), (2, 0.4, 2, 9), (1, 0.6, 5, 4), (2, 0.9, 2, 1)][: 2 * turns]
    rows = [
        {"id": i, "turn": k // 2, "order": "ab", "preference": p, "length_a": a, "length_b": b}
        for k, (i, p, a, b) in enumerate(given)
    ]
    found = run(write_jsonl(out.with_name("j.jsonl"), rows), out)
    assert (found["questions"], found["pairs"]) == (2, 2 * turns)
    assert found["gap"]["ci_low"] is None
    assert (found["coefficient"] is None) == (turns == 1)  # two rows, two parameters: a perfect fit
    assert found["explained_by_length"] is None or found["explained_by_length"]["ci_low"] is None
    assert found["win_rate"] == pytest.approx(np.mean([p for _, p, *_ in given]))


def test_an_error_of_rounding_is_none() -> None:
    """A standard error that is only rounding, infinite or unknown gives no interval; a real one stays."""
    for error in (0.0, 1e-16, math.nan, math.inf):
        found = length_bias.with_error(0.5, error, 0.5 - error, 0.5 + error)
        assert found["value"] == 0.5 and all(
            math.isnan(found[name]) for name in ("standard_error", "ci_low", "ci_high")
        )
    assert length_bias.with_error(0.5, 1e-4, 0.4, 0.6)["ci_low"] == 0.4


def test_replies_of_wrong_types_are_counted(out: Path) -> None:
    """A reply that is a number, a list of anything or an object is no text: left out, with the reason."""
    good = {"prompt": "q", "chosen": "aaa", "rejected": "b"}
    wrong = [5, None, {"a": 1}, [1], [{"role": "x"}], [{"role": "assistant", "content": [1]}]]
    found = run(write_jsonl(out.with_name("p.jsonl"), [good, *({**good, "chosen": x} for x in wrong)]), out)
    assert found["pairs"] == 1 and found["lost_by_reason"] == {"neither a string nor a message list": len(wrong)}
    row = {"id": 1, "score": 1.0, "response": "aa"}
    rows = [row, row | {"score": 2, "response": "a"}, row | {"response": 5}, row | {"response": ["a"]}]
    found = run(write_jsonl(out.with_name("s.jsonl"), rows), out)
    assert found["pairs"] == 1 and found["lost_by_reason"] == {"the response is no string": 2}


def test_small_numbers_are_shown(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A coefficient per character is small: digits, no exponent; what is unknown is no zero."""
    rows = [
        {"prompt": f"{i}", "chosen": "a" * (9000 + 70 * i), "rejected": "b" * (9000 + 90 * (i % 7) ** 2 * (i % 3))}
        for i in range(40)
    ]
    found = run(write_jsonl(out.with_name("p.jsonl"), rows), out)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("logit per char"))
    assert abs(found["coefficient"]["value"]) < 0.01 and "e-" not in line
    assert float(line.split()[3]) == pytest.approx(found["coefficient"]["value"], rel=1e-3)
    run(write_jsonl(out.with_name("p.jsonl"), [{"prompt": "q", "chosen": "a", "rejected": "bb"}]), out)
    assert "deviance explained -" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- bad files
PAIR = '{"prompt": "q", "chosen": "aa", "rejected": "b"}'
GAME = '{"id": 1, "order": "ab", "preference": 1.0, "length_a": 3, "length_b": 4}'
BAD = {
    "half a line": ([PAIR, PAIR[:30]], "line 2: not JSON, or half a line"),
    "wrong keys": (['{"prompt": "q", "answer": "a"}'], "line 1: keys prompt, answer; expected those of"),
    "a key is missing later": ([PAIR, '{"prompt": "q", "chosen": "a"}'], "line 2: no key rejected"),
    "mixed runs": ([GAME.replace("}", f', "model_a": "{m}"}}').replace("1,", f"{i},", 1) for i, m in enumerate("xy")],
                   "line 2: mixed runs, model_a is 'y' but 'x' in .*line 1"),
    "duplicate": ([GAME, GAME], "line 2: id 1, order ab occurs before, .*line 1"),
    "two verdicts": ([GAME.replace("}", ', "key": "k"}'), GAME.replace("1.0", "0.0").replace("}", ', "key": "k"}')],
                     "line 2: id 1, order ab occurs before"),
    "order": ([GAME.replace("ab", "AB")], "line 1: order is 'AB'"),
    "preference": ([GAME.replace("1.0", "1.5")], r"line 1: preference is 1.5, expected a number in \[0, 1\]"),
    "no number": ([GAME.replace("3", '"long"')], "line 1: length_a is 'long', expected a number"),
    "nan": ([GAME, GAME.replace("1,", "2,", 1).replace("1.0", "NaN")], "line 2: preference is nan"),
    "beyond floats": ([GAME.replace("3", "1" + "0" * 400)], "line 1: length_a is inf, expected a number"),
    "deep": ([GAME, "[" * 5000 + "]" * 5000], "line 2: not JSON, or half a line"),
    **{f"{name} is a {kind}": ([GAME, GAME.replace("1,", "2,", 1).replace("}", f', "{name}": {value}}}')],
                               f"line 2: {name} is .*, expected a string or a number")
       for kind, value in (("list", "[1]"), ("dict", '{"a": 1}')) for name in ("turn", "judge", "model_a", "model_b")},
    "id": ([GAME, GAME.replace("1,", "[2],", 1)], r"line 2: id is '\[2\]'"),
    "scores' id": (['{"id": {}, "score": 1, "response": "a"}'], "line 1: id is '{}'"),
    "scores' text": (['{"id": 1, "score": "1", "response": "a"}'], "line 1: score is '1'"),
    "nothing left": ([PAIR.replace("aa", "b")], "no usable row; lost: {'identical pair': 1}"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name: str, out: Path) -> None:
    """One message that names the file and the line; nothing is written."""
    lines, message = BAD[name]
    path = write_jsonl(out.with_name("bad.jsonl"), lines)
    with pytest.raises(length_bias.UserError, match=message) as caught:
        run(path, out)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and not out.exists()


def test_bad_flags(out: Path) -> None:
    """Judgments have no texts for --unit words or a control; one file only; a file that is not there."""
    path = write_jsonl(out.with_name("j.jsonl"), [GAME])
    for flags in ({"unit": "words"}, {"control_fn": [GOLD]}):
        with pytest.raises(length_bias.UserError, match="judgments hold no texts"):
            run(path, out, **flags)
    with pytest.raises(length_bias.UserError, match="2 files: expected one"):
        length_bias.main(length_bias.Args(), ["a", "b"])
    with pytest.raises(length_bias.UserError, match="nowhere.jsonl: no such file"):
        length_bias.main(length_bias.Args(), ["nowhere.jsonl"])


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """evaluate keeps its copies of modules and its caches in tmp_path, and forgets them afterwards."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
            del sys.modules[name]

    own = str(tmp_path / "HF_MODULES_CACHE")  # first: evaluate appends its folder, behind that of an earlier test
    monkeypatch.setattr(sys, "path", [own, *sys.path])
    for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        monkeypatch.setattr(evaluate.config, name, tmp_path / name)
    forget()
    yield
    forget()


def test_module_equals_command_line(
    modules: None, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """evaluate.load(...).compute(...) offline gives the figures that the command line writes."""
    rows = [row for row in games_of(80, 3, 0.3, 0.0) if row["order"] == "ab"]
    path, tool = write_jsonl(out.with_name("judgments.jsonl"), rows), str(ROOT / "eval" / "length_bias.py")
    monkeypatch.setattr(sys, "argv", [tool, str(path), "--bootstrap", "30", "--seed", "5"])
    length_bias.run_tool(length_bias.main, length_bias.Args, "files")
    assert "P(win | longer) - P(win | shorter)" in capsys.readouterr().out
    written = json.loads(path.with_name("length_bias.json").read_text())
    names = {"preferences": "preference", "lengths_a": "length_a", "lengths_b": "length_b", "ids": "id"}
    columns: dict[str, Any] = {name: [row[key] for row in rows] for name, key in names.items()}
    found = evaluate.load(tool).compute(**columns, bootstrap=30, seed=5)
    assert found == {name: written[name] for name in found} and found["gap"]["value"] > 0


# ------------------------------------------------------------------------------------------------------------- coverage
@pytest.mark.slow
def test_intervals_cover() -> None:
    """Of 500 simulated label sets with questions that differ in taste, 93 to 97 % of the intervals hold the truth."""
    rng, hits = np.random.default_rng(0), Counter[str]()
    for _ in range(500):
        ids, length = np.repeat(np.arange(100), 4), rng.normal(0, 100, size=400)
        merit = rng.normal(size=400)
        p = 1.0 * (rng.random(400) < expit(0.008 * length + merit))
        pairs = length_bias.Pairs(ids, p, length, p - 0.5, merit[:, None], True)
        fit, scale = length_bias.fit_length(pairs), np.sqrt(np.mean(length**2))
        low, high = fit.conf_int()[0] / scale
        hits["coefficient"] += low <= 0.008 <= high
        fair = length_bias.longer_gap(pairs._replace(p=1.0 * (rng.random(400) < expit(merit))))
        hits["gap"] += fair["ci_low"] <= 0 <= fair["ci_high"]
    for name, count in hits.items():
        assert 0.93 <= count / 500 <= 0.97, (name, count / 500)
