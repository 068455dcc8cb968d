"""agreement.py against agreement of real judges and people, scikit-learn, and the annotator whose dial is known."""

import csv
import doctest
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, read_jsonl, shared_or_skip, write_jsonl
from sklearn.metrics import cohen_kappa_score

from eval import agreement
from eval.agreement import Args, UserError

JUDGES = [f"{judge}/{prompt}" for judge in ("GPT-4", "ChatGPT", "LLaMA2", "PaLM2")
          for prompt in ("Metrics_Reference", "Vanilla_NoRules")]  # fmt: skip


def agree(tmp_path: Path, *tables: list, **flags: Any) -> dict[str, Any]:
    """main's result on one file per table."""
    files = [str(write_jsonl(tmp_path / f"{k}.jsonl", rows)) for k, rows in enumerate(tables)]
    return agreement.main(Args(**{"bootstrap": 50, **flags}), files)


def labels(values: list, **more: Any) -> list[dict]:
    """Rows of labels, one per question."""
    return [{"id": k, "preference": p, **more} for k, p in enumerate(values)]


def annotator() -> Any:
    """tiny/annotator.py."""
    spec = importlib.util.spec_from_file_location("annotator", ROOT / "tiny" / "annotator.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exact_preferences() -> np.ndarray:
    """The annotator's probabilities of A on preferences_eval.jsonl; A is `chosen` in even rows, `rejected` in odd ones.

    Computed anew from the texts: p_chosen of the file is not read.
    """
    rows = read_jsonl(ROOT / "tiny" / "preferences_eval.jsonl")
    a, b = ([row[("chosen", "rejected")[(k + side) % 2]] for k, row in enumerate(rows)] for side in (0, 1))
    return np.array(annotator().prefer([row["prompt"] for row in rows], a, b))


def test_doctests() -> None:
    """The numbers in the docstrings."""
    result = doctest.testmod(agreement)
    assert result.attempted > 8 and not result.failed


# ------------------------------------------------------------------------------------------------------------ real data
@pytest.mark.parametrize("judge", JUDGES)
def test_mt_bench_judges_and_people(judge: str, tmp_path: Path) -> None:
    """100 MT-Bench pairs: accuracy of each order, their mean, both right, swap consistency of eight judges.

    The expected figures count what a judge left empty as wrong; here it is lost, so shares are of the rest.
    """
    expected = json.loads(shared_or_skip("data", "expected_dev.json").read_text())["mt_bench"][judge]
    file = shared_or_skip("data", "mt_bench", "mt_bench_llm_judgements_dev.csv")
    with file.open() as stream:
        rows = [row for row in csv.DictReader(stream) if f"{row['evaluator']}/{row['prompt']}" == judge]
    chance = {"1": 1.0, "2": 0.0, "": None}
    votes = [{"id": row["idx"], "order": order, "preference": chance[row[key]], "judge": judge}
             for row in rows for order, key in (("ab", "w_noswap"), ("ba", "w_swap"))]  # fmt: skip
    people = [{"id": row["idx"], "preference": chance[row["label"]]} for row in rows]
    pair = agree(tmp_path, votes, people)["pairs"][0]
    orders = pair["by_order"][judge]
    empty = sum(row["w_noswap"] == "" for row in rows)
    names = {"acc_order1": "ab", "acc_order2": "ba", "acc_mean": "mean", "both_correct": "both",
             "consistent": "consistent"}  # fmt: skip
    found = {name: orders[key]["value"] * (100 - empty) / 100 for name, key in names.items()}
    assert found == pytest.approx({name: expected[name] for name in names}, abs=1e-9)
    assert pair["n"] == len(rows) - empty == 100 - empty and pair["raters"][0] == judge
    assert orders["mean"]["ci_low"] < orders["mean"]["value"] < orders["mean"]["ci_high"]
    assert pair["by_order"][pair["raters"][1]] is None


def test_pandalm_annotators(tmp_path: Path) -> None:
    """Three people and two judges: 93.8 % mean pairwise agreement, and both judges against the majority.

    The expected figure of gpt35 does not read its "Tie", so neither does this test.
    """
    expected = json.loads(shared_or_skip("data", "expected_dev.json").read_text())["pandalm"]
    rows = read_jsonl(shared_or_skip("data", "preferences", "pandalm_human_dev.jsonl"))
    chance = {0: 0.5, 1: 1.0, 2: 0.0, "Tie": None, "1": 1.0, "2": 0.0, "garbage": None}
    people = [
        {"id": row["idx"], "preference": chance[row[f"annotator{k}"]], "judge": f"annotator {k}"}
        for k in (1, 2, 3) for row in rows
    ]  # fmt: skip
    result = agree(tmp_path, people, bootstrap=20)
    assert result["all"]["mean_pairwise_agreement"] == pytest.approx(expected["pairwise_annotator_agreement"], abs=1e-6)
    # Krippendorff's alpha of complete nominal data is Fleiss' kappa but for a term of order 1 / n
    kappa = result["all"]["fleiss_kappa"]["value"]
    n = expected["n"] * 3
    assert 1 - (1 - kappa) * (n - 1) / n == pytest.approx(expected["krippendorff_alpha_nominal"], abs=1e-5)
    majority = []
    for row in rows:
        votes = [row[f"annotator{k}"] for k in (1, 2, 3)]
        majority.append({"id": row["idx"], "preference": chance[max(votes, key=votes.count)]})
    for judge, key in (("gpt35", "gpt35_vs_majority_incl_ties"), ("pandalm7b", "pandalm7b_vs_majority_incl_ties")):
        votes = [{"id": row["idx"], "preference": chance[row[judge]]} for row in rows]
        pair = agree(tmp_path, votes, majority, bootstrap=20)["pairs"][0]
        assert pair["agreement_lost_as_disagreement"] == pytest.approx(expected[key], abs=1e-9)
        missing = sum(chance[row[judge]] is None for row in rows)
        assert pair["lost"]["no verdict of one or both"] == missing and pair["n"] == 400 - missing
        assert pair["agreement"]["value"] == pytest.approx(expected[key] * 400 / (400 - missing))


# --------------------------------------------------------------------------------------------------- the embedded world
def test_annotators_of_the_embedded_world(tmp_path: Path) -> None:
    """Two annotators agree on 73.4 % of the pairs: inside the intervals of labels against labels and against p."""
    p = exact_preferences()
    truth = float(np.mean(p**2 + (1 - p) ** 2))
    assert truth == pytest.approx(0.734, abs=5e-4)  # tiny/README.md
    rng = np.random.default_rng(0)
    one, two = ((rng.random(len(p)) < p).astype(float).tolist() for _ in range(2))
    drawn = agree(tmp_path, labels(one), labels(two))["pairs"][0]
    assert drawn["agreement"]["ci_low"] < 0.734 < drawn["agreement"]["ci_high"]
    assert drawn["agreement"]["ci_high"] - drawn["agreement"]["ci_low"] < 0.09
    soft = agree(tmp_path, labels(p.tolist()), labels(one))["pairs"][0]
    assert soft["soft_agreement"]["ci_low"] < 0.734 < soft["soft_agreement"]["ci_high"]
    exact = agree(tmp_path, labels(p.tolist()), labels(p.tolist()))["pairs"][0]
    assert exact["soft_agreement"]["value"] == pytest.approx(truth, abs=1e-12)
    committed = [float(k % 2 == 0) for k in range(len(p))]  # the label says `chosen`
    found = agree(tmp_path, labels(p.tolist()), labels(committed))["pairs"][0]["soft_agreement"]
    assert found["ci_low"] < 0.734 < found["ci_high"]
    ceiling = float(np.mean(np.maximum(p, 1 - p)))  # who sees p and votes for the likelier one
    hard = agree(tmp_path, labels((p > 0.5).astype(float).tolist()), labels(committed))["pairs"][0]["agreement"]
    assert ceiling == pytest.approx(0.805, abs=5e-4) and hard["ci_low"] < ceiling < hard["ci_high"]


# -------------------------------------------------------------------------------------------------------------- figures
def test_by_hand(tmp_path: Path) -> None:
    """Ten questions, counted by hand: agreement, ties left out, the table, soft agreement, kappa."""
    one = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5]
    two = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.5, 0.5, 1.0]
    pair = agree(tmp_path, labels(one), labels(two))["pairs"][0]
    assert pair["agreement"]["value"] == pytest.approx(7 / 10) and pair["agreement"]["n"] == 10
    assert pair["agreement_without_ties"]["value"] == pytest.approx(5 / 7)
    assert pair["agreement_without_ties"]["n"] == 7
    assert pair["table"] == {"B": {"B": 2, "tie": 0, "A": 1}, "tie": {"B": 0, "tie": 2, "A": 1},
                             "A": {"B": 1, "tie": 0, "A": 3}}  # fmt: skip
    assert pair["soft_agreement"]["value"] == pytest.approx((5 + 3 / 2) / 10)
    soft = [1.0, 1, 1, 0, 1, 1, 0, 0.5, 0.5, 0.5]
    half = 2.262157 * float(np.std(soft, ddof=1)) / math.sqrt(10)  # t of 9 degrees of freedom
    assert pair["soft_agreement"]["ci_low"] == pytest.approx(0.65 - half, abs=1e-5)
    assert pair["soft_agreement"]["ci_high"] == pytest.approx(0.65 + half, abs=1e-5)
    # by chance: A 0.4 * 0.5, B 0.3 * 0.3, tie 0.3 * 0.2
    assert pair["kappa"]["value"] == pytest.approx((0.7 - 0.35) / (1 - 0.35))
    # Wilson for 7 of 10 with SE^2 = 0.21 / 9, so 9 effective questions (z = 1.96)
    z2, p, n = 1.959964**2, 0.7, 9
    centre, half = (
        (p + z2 / (2 * n)) / (1 + z2 / n),
        math.sqrt(z2 * p * (1 - p) / n + (z2 / (2 * n)) ** 2) / (1 + z2 / n),
    )
    assert [pair["agreement"][k] for k in ("ci_low", "ci_high")] == pytest.approx(
        [centre - half, centre + half], abs=1e-6
    )


def test_kappa_is_scikit_learns(tmp_path: Path) -> None:
    """Cohen's kappa of 60 verdicts, with ties and without, equals another library's."""
    rng = np.random.default_rng(0)
    one = rng.choice([0.0, 0.5, 1.0], 60)
    two = np.where(rng.random(60) < 0.5, one, rng.choice([0.0, 0.5, 1.0], 60))
    pair = agree(tmp_path, labels(one.tolist()), labels(two.tolist()), bootstrap=200)["pairs"][0]
    assert pair["kappa"]["value"] == pytest.approx(cohen_kappa_score(2 * one, 2 * two))
    both = (one != 0.5) & (two != 0.5)
    assert pair["kappa_without_ties"]["value"] == pytest.approx(cohen_kappa_score(one[both], two[both]))
    assert pair["kappa"]["ci_low"] < pair["kappa"]["value"] < pair["kappa"]["ci_high"]
    assert 0.2 < pair["kappa"]["ci_high"] - pair["kappa"]["ci_low"] < 0.6  # SE of kappa is about 0.09 here


def test_intervals_are_over_questions(tmp_path: Path) -> None:
    """Each vote repeated as nine turns: the intervals stay as they are, the number of rows is nine times as large."""
    for disagree in (12, 0):
        one, two = [1.0] * 40, [1.0] * (40 - disagree) + [0.0] * disagree
        check_nine_turns(tmp_path, one, two)


def check_nine_turns(tmp_path: Path, one: list[float], two: list[float]) -> None:
    """Intervals of 40 questions asked once and in nine turns are the same."""
    once = agree(tmp_path, labels(one, turn=0), labels(two, turn=0))["pairs"][0]
    many = [[row for t in range(9) for row in labels(values, turn=t)] for values in (one, two)]
    nine = agree(tmp_path, *many)["pairs"][0]
    for name in ("agreement", "soft_agreement"):
        assert nine[name]["n"] == 360 and once[name]["n"] == 40
        assert nine[name]["ci_low"] == pytest.approx(once[name]["ci_low"], abs=0.003)
        assert nine[name]["ci_high"] == pytest.approx(once[name]["ci_high"], abs=0.003)


def test_orders_and_models(tmp_path: Path) -> None:
    """The second file names the models the other way round: preference and order are turned before comparing."""
    given = enumerate([(1.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
    one: list[dict[str, Any]] = [
        {"id": q, "model_a": "x", "model_b": "y", "order": o, "preference": p, "judge": "one"}
        for q, (ab, ba) in given
        for o, p in (("ab", ab), ("ba", ba))
    ]
    two = [
        {"id": q, "model_a": "y", "model_b": "x", "preference": p, "judge": "two"}
        for q, p in enumerate([0.0, 0.0, 1.0])
    ]
    pair = agree(tmp_path, one, two)["pairs"][0]
    assert pair["raters"] == ["one", "two"]
    assert pair["agreement"]["value"] == pytest.approx(2 / 3)  # question 1 is a tie for `one`
    shares = {name: share["value"] for name, share in pair["by_order"]["one"].items()}
    assert shares == pytest.approx({"ab": 1, "ba": 2 / 3, "both": 2 / 3, "consistent": 2 / 3, "mean": 5 / 6})
    turned = [{**row, "model_a": "y", "model_b": "x", "preference": 1 - row["preference"],
               "order": {"ab": "ba", "ba": "ab"}[row["order"]]} for row in one]  # fmt: skip
    assert agree(tmp_path, turned, two)["pairs"] == agree(tmp_path, one, two)["pairs"]
    # MT-Bench's rule: 0.75 is one win and one tie, so a tie
    soft = [{**row, "preference": 0.5} if (row["id"], row["order"]) == (0, "ba") else row for row in one]
    for margin, ties in ((0.0, 1), (0.25, 2)):
        table = agree(tmp_path, soft, two, tie_margin=margin)["pairs"][0]["table"]
        assert sum(table["tie"].values()) == ties


def test_fastchat_rows(tmp_path: Path) -> None:
    """FastChat's pairwise judgments count as both orders, a game in error as no verdict."""
    games = [("model_1", "model_1"), ("model_2", "tie"), ("error", "model_2")]
    shared = {"model_1": "x", "model_2": "y", "judge": ["gpt-4", "pair-v2"]}
    rows = [{"question_id": q, "g1_winner": g1, "g2_winner": g2, **shared} for q, (g1, g2) in enumerate(games)]
    result = agree(tmp_path, rows, labels([1.0, 0.0, 0.0], judge="people"))
    pair = result["pairs"][0]
    assert pair["raters"] == ["gpt-4", "people"] and pair["agreement"]["value"] == 1 and pair["n"] == 2
    assert result["lost"]["gpt-4"] == {"no verdict": 1, "verdict whose other order has none": 1}
    assert pair["agreement_lost_as_disagreement"] == pytest.approx(2 / 3)
    assert pair["agreement"]["ci_low"] < 0.6  # two questions agree: that says little


def test_lost_rows(tmp_path: Path) -> None:
    """What one rater did not answer or was not asked is counted, by rater and by pair."""
    one = labels([1.0, 0.0, None, 1.0, 1.0]) + [{"id": 9, "preference": 1.0}]
    two = labels([1.0, 1.0, 1.0, None]) + [{"id": 3, "preference": 1.0}]
    result = agree(tmp_path, one, two)
    pair = result["pairs"][0]
    assert list(result["lost"].values()) == [{"no verdict": 1}, {"no verdict, asked again": 1}]
    assert pair["lost"] == {"no verdict of one or both": 1, "only in the first": 2, "only in the second": 0}
    assert pair["agreement"]["value"] == pytest.approx(2 / 3)
    assert pair["agreement_lost_as_disagreement"] == pytest.approx(2 / 4)


def test_raters_that_always_say_the_same(tmp_path: Path) -> None:
    """Full agreement: Wilson's interval is not a point, and kappa, which is 0 / 0, is null."""
    pair = agree(tmp_path, labels([1.0] * 20), labels([1.0] * 20))["pairs"][0]
    assert pair["agreement"]["value"] == 1 and 0.8 < pair["agreement"]["ci_low"] < 0.9
    assert pair["kappa"]["value"] is None and "NaN" not in (tmp_path / "agreement.json").read_text()


def test_files(tmp_path: Path) -> None:
    """The result beside the first input equals what main returns; a seed decides all."""
    rng = np.random.default_rng(0)
    tables = [labels(rng.choice([0.0, 1.0], 30).tolist()) for _ in range(3)]
    result = agree(tmp_path, *tables, seed=4)
    assert json.loads((tmp_path / "agreement.json").read_text()) == json.loads(json.dumps(result))
    assert agree(tmp_path, *tables, seed=4, output=str(tmp_path / "a" / "b.json")) == result
    assert len(result["pairs"]) == 3 and (tmp_path / "a" / "b.json").is_file()
    assert agree(tmp_path, *tables, seed=5)["pairs"][0]["kappa"] != result["pairs"][0]["kappa"]


@pytest.mark.parametrize(
    ("tables", "flags", "message"),
    [
        ([labels([1.0])], {}, r"one rater only \(.*0.jsonl\); agreement needs two"),
        ([labels([1.0]), [{"id": "other", "preference": 1}]], {}, r"no comparison in common; ids of the first: 0"),
        ([labels([None]), labels([1.0])], {}, r"none of 1 common comparisons has a verdict of both"),
        ([labels([1.0]), labels([1.0]) * 2], {}, r"1.jsonl, line 2: the same vote as in .*1.jsonl, line 1"),
        ([labels([1.0]), labels([2])], {}, r"1.jsonl, line 1: preference 2; expected a number in \[0, 1\]"),
        ([labels([1.0]), labels([True])], {}, r"preference True; expected a number"),
        ([labels([1.0]), ['{"id": 1, "pref']], {}, r"1.jsonl, line 1: not JSON, or half a line"),
        ([labels([1.0]), [{"id": 1, "winner": "a"}]], {}, r"line 1: no key preference; keys found: id, winner"),
        ([labels([1.0], order="AB"), labels([1.0])], {}, r"order 'AB'; expected 'ab' or 'ba'"),
        ([labels([1.0]), labels([1.0])], {"tie_margin": 0.5}, r"--tie_margin must be in \[0, 0.5\)"),
        ([], {}, r"name two files of judgments or labels"),
        ([labels([1.0]), labels([0.0, math.nan])], {}, r"1.jsonl, line 2: preference nan"),
        ([labels([1.0]), labels([0.0, 10**400])], {}, r"1.jsonl, line 2: preference inf"),
        ([labels([1.0]), ["[" * 5000 + "]" * 5000]], {}, r"1.jsonl, line 1: not JSON, or half a line"),
        ([labels([1.0]), [{"id": [0], "preference": 1}]], {}, r"1.jsonl, line 1: id is '\[0\]'"),
        *(([labels([1.0]), labels([1.0], **{name: value})], {}, rf"1.jsonl, line 1: {name} is ")
          for value in ([1], {"a": 1}) for name in ("turn", "judge", "model_a", "model_b")),
        *(([labels([1.0]), [{"question_id": 1, "model_1": "a", "model_2": "b", "g1_winner": value, "g2_winner": "-"}]],
           {}, r"1.jsonl, line 1: g1_winner is .*, expected one of model_1") for value in (None, 1, ["tie"], "B")),
    ],
)  # fmt: skip
def test_bad_input(tables: list, flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    """One line: where, what, what was expected."""
    with pytest.raises(UserError, match=message) as error:
        agree(tmp_path, *tables, **flags)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_coverage(capsys: pytest.CaptureFixture) -> None:
    """500 draws of 60 questions with 3 turns each that go together: the intervals of the share cover the true one."""
    hits: dict[str, list[bool]] = {"share": [], "kappa": []}
    for seed in range(500):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(60), 3)
        p = np.repeat(rng.beta(4, 2, 60), 3)  # of agreement; mean 2/3
        one = rng.choice([-1, 1], 180)
        two = np.where(rng.random(180) < p, one, -one)
        share = agreement.share_interval((one == two).astype(float), groups)
        hits["share"].append(share["ci_low"] < 2 / 3 < share["ci_high"])
        if seed < 150:
            kappa = agreement.kappa_interval(one, two, groups, Args(bootstrap=200, seed=seed))
            hits["kappa"].append(kappa["ci_low"] < 1 / 3 < kappa["ci_high"])
    with capsys.disabled():
        print("\n coverage:", {name: round(float(np.mean(values)), 3) for name, values in hits.items()})
    assert 0.93 < np.mean(hits["share"]) < 0.97 and 0.89 < np.mean(hits["kappa"]) < 0.99
