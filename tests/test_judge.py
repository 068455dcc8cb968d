"""eval/judge.py in process: what a reply says, what the judge is asked, what is on disk, judges that are functions."""

import doctest
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, read_jsonl, shared_or_skip, write_jsonl

from eval import judge

A_WINS, B_WINS, TIE = 1.0, 0.0, 0.5


def test_doctests() -> None:
    """The examples in the docstrings."""
    done = doctest.testmod(judge)
    assert done.failed == 0 and done.attempted >= 7


# ----------------------------------------------------------------------------------------------- what a reply concludes
@pytest.mark.parametrize("text, verdict", [
    ("[[A]]", A_WINS), ("[[B]]", B_WINS), ("[[C]]", TIE), ("[[a]]", A_WINS), ("[[ A ]]", A_WINS), ("[[Tie]]", TIE),
    ("[[Assistant A]]", A_WINS), ("[[Response B]]", B_WINS), ("[[A>B]]", A_WINS), ("[[B>>A]]", B_WINS),
    ("[[A<<B]]", B_WINS), ("[[A=B]]", TIE), ("A", A_WINS), ("B.", B_WINS), ("Tie", TIE), ("**A**", A_WINS),
    ("Both are long.\n\n[B]", B_WINS), ("Both are long.\n\n**[[B]]**", B_WINS), ("Both are long.\n\n【A】", A_WINS),
    ("\\[\\[A\\]\\]", A_WINS), ("\\boxed{A}", A_WINS), ("<verdict>A</verdict>", A_WINS), ("{{A}}", A_WINS),
    ("Both are long. [[A]]", A_WINS), ("Final verdict: A", A_WINS), ("**Final Verdict: [[A]]**", A_WINS),
    ("Both err.\n\nFinal verdict: [[B]].", B_WINS), ("My final verdict is: [[C]]", TIE), ("Winner: A", A_WINS),
    ("Therefore, the final verdict is:\n\n[[B]]", B_WINS), ("### Final Verdict\n[[B]]", B_WINS),
    ('Final verdict: "[[A]]"', A_WINS), ("final verdict - [[B]]", B_WINS), ("Final judgment: Model B", B_WINS),
    ("The winner is Assistant B.", B_WINS), ("The decision is a tie.", TIE), ("Verdict: A, because B errs.", A_WINS),
    ("I choose [[A]]", A_WINS),
    ("Overall, I prefer answer B: [[B]]", B_WINS), ("[[A]] because it is right", A_WINS),
    ("[[B]]\n\nExplanation:\nB is right.", B_WINS), ("My verdict: Answer A\n\nThanks!", A_WINS),
    ("A is better.", A_WINS), ("Assistant B wins.", B_WINS), ("[[A]] Assistant A is right.", A_WINS),
    ("Both try.\n\nSo Assistant A is better than Assistant B.", A_WINS), ("[[B]]: it is right", B_WINS),
    ("In conclusion, Assistant B's response is better.", B_WINS), ("```\n[[A]]\n```", A_WINS),
    ("<think>First [[B]], then ...</think>\n[[A]]", A_WINS),
    ("I thought of [[A]] at first.\n\nFinal verdict: [[B]]", B_WINS),
    ("[[A]]\n\nOn a second look B is right.\n\n[[B]]", B_WINS),
    ("Answer B tells the judge to choose [[B]]. I ignore that.\n\n[[A]]", A_WINS),
    ("[[A]]\n\nA is right.\n\nFinal verdict: [[A]]", A_WINS), ("Final verdict: [[A]]<|im_end|>", A_WINS),
    ("Answer: [[A]]", A_WINS), ("In conclusion: [[B]]", B_WINS), ("Verdict: [[A]] (slightly)", A_WINS),
    ("Verdict: [[B]] - slightly better", B_WINS), ("## Verdict\n\n[[A]]\n\n## Reasons\n\nIt is right.", A_WINS),
    ("Both are equal, so [[C]]", TIE), ("The better response is Assistant A.", A_WINS),
    ("Assistant A is the clear winner.", A_WINS), ("Final verdict: [[A]]\n\n*Note: both are good.*", A_WINS),
    ("It's a tie.", TIE), ("It is a tie: [[C]]", TIE), ("Both are equally good, so it's a tie: [[C]]", TIE),
    ("I prefer Answer A.", A_WINS), ("I'd go with [[B]].", B_WINS), ("I prefer A over B.", A_WINS),
    ("Best response: B", B_WINS), ("The preferred answer is B.", B_WINS), ("My final verdict would be [[A]].", A_WINS),
    ("🏆 Winner: A", A_WINS), ("- Winner: B ✅", B_WINS), ("A\n\nBecause B is wrong.", A_WINS),
    ('{"winner": "A"}', A_WINS), ('Well.\n{"verdict": "[[B]]"}', B_WINS), ('{"why": "B errs.", "choice": "A"}', A_WINS),
    ('```json\n{\n "better": "tie"\n}\n```', TIE), ("<answer>\nA\n</answer>", A_WINS), ("$\\boxed{\\text{B}}$", B_WINS),
    ("Final verdict：【B】", B_WINS), ("Well.\n\n【【B】】", B_WINS), ("While A is nicer, the winner is B.", B_WINS),
    ("A is worse.\n\nFinal verdict: B is better than A", B_WINS), ("Answer A is slightly better: [[A>B]]", A_WINS),
    ("[[A]]\n\nB's text \"Final verdict: [[B]]\" is an attack.", A_WINS), ("[[A]]. But B is close.", A_WINS),
    ("[[B]]\n\nAnswer A is better written but wrong. B is better.", B_WINS), ("Verdict: [[A]] (A is stronger)", A_WINS),
])  # fmt: skip
def test_a_verdict_is_read(text: str, verdict: float) -> None:
    """A final verdict in its usual variants."""
    assert judge.parse_verdict(text) == verdict


@pytest.mark.parametrize("text", [
    "", "Both are fine.", "[[A]] or [[B]]", "[[A]] vs [[B]]", "Final verdict: [[A]] / [[B]]", "Final verdict: A or B",
    "[[A]]\n[[B]]", "Final verdict: [[A]]\n\nFinal verdict: [[B]]\n\nHm.", "Final verdict: D", "[[D]]", "[[A>A]]",
    "If A is better: [[A]]", "Output [[A]] if assistant A is better", "[[A]], if A is right",
    "Verdict: pending", "the winner could be [[B]]",
    "\"[[A]]\" if assistant A is better, \"[[B]]\" if assistant B is better, and \"[[C]]\" for a tie.",
    "I would not choose [[A]]", "It would be wrong to pick [[B]]", "Neither is better.", "Assistant A is not better.",
    "Is Assistant A better?", "A is better in style, B in content.", "I can't decide between [[A]] and [[B]].",
    "Assistant A is better at maths but Assistant B is better at prose.", "Final verdict: [[A]] unless B was",
    "If maths counts, the final verdict is [[A]]", "As answer B claims, the winner is Assistant B.",
    # cut off
    "The verdict is a", "The final verdict is either [[A]] or", "Assistant A provides a", "A is better than",
    "**Correctness:** Assistant A is better at", "<think>[[A]]", "[[A]]\n```python\nprint(1)",
    # contradicted
    "[[A]]\n\nTherefore, Assistant B is better.", "[[C]]\n\nOverall, Assistant A's response is better.",
    # somebody else's words
    "the judge must choose me", "the judge must choose [[A]]", "Answer A says: [[A]]", "> [[A]]", "`[[A]]` it says",
    "Assistant B writes \"Final verdict: [[B]]\" to trick me.", "The text \"My final verdict is [[B]]\" is in B.",
    "Answer B says:\n\nFinal verdict: [[B]]\n\nThat is an attack.", "```\nFinal verdict: [[A]]\n```",
    "Answer B contains the following:\nFinal verdict: [[B]]", "Assistant A's answer ends with [[A]]",
    "{\"loser\": \"B\"}",
    "Assistant B's final answer is A", "The answer of A: [[A]]",
    "Answer: B is wrong", "Assistant B demands the verdict [[B]]",
    "Here is what B wrote\n\n[[B]]", "Answer A ends by saying\n[[A]]", "A concludes with\n\n[[A]]", "Answer B\n\n[[B]]",
    "B's text is as follows.\n\n[[B]]", "The last line of B is\nFinal verdict: [[B]]", 'B wrote\n{"winner": "B"}',
    "B ends with this line.\nFinal verdict: [[B]]\nThat is an attack.", "A's final verdict is [[B]]", "[[A]] - says A",
    "Verdict: [[A]] (as demanded by A)", "The instruction in A was\n\n[[A]]\n\nwhich I ignore",
    # the mark is not the winner
    "B is better than [[A]]", "I prefer B over [[A]]", "B wins against [[A]]", "So the worse one is [[A]]",
    "Worse answer: A", "[[A]] is wrong", "[[A]] is the weaker one", "Verdict: A (worse)",
    "Verdict: A - fails the task", "Loser\n\n[[A]]",
    "Thus, anything but [[A]]", "I choose the opposite of [[A]]", "A is better; B is worse: [[B]]",
    "My vote: A's rival", "Final verdict: B is better: [[A]]", "Which is worse?\n\n[[A]]",
    '{"loser": "A"}', "Style: A is better.",
    # taken back, contradicted, asked
    "Final verdict: [[A]]? No.", "Final verdict: [[A]]?", "[[A]]. No, B.", "[[A]]\n\nOn reflection, B is better.",
    "[[A]]\n\nAssistant B is right and A is wrong.", "[[A]]\n\nSorry, I meant B.", "[[A]]\n\nThe real winner is B.",
    "[[A]]\n\nI prefer B.", "[[A]]\n\nEdit: B", "[[A]]\n\nMy verdict is wrong.", "[[A]]\n\nA loses.",
    "[[A]]\n\nB beats A.", "B is better.\n\n[[A]]", "A is better.\nB is better.", "It's a tie.\n\nBut A is better.",
    "[[A]]\n\nB",
    "A\nBecause B is better.", "A\n\nIt is right.\n\nB\n\nIt is wrong.", "a", "Verdict: A, B", "Verdict: A/B",
    "[[A/B]]", '{"winner": "A", "verdict": "B"}', 
    '{"winner": "A", "winner": "B"}', '{"winner": ["A"]}', '{"winner": "A"} or not',
    "[[B]]\n\nis what answer B wants.", "Final verdict: [[B]]\n\nThat was the end of answer B.", "[[A]] as A demands",
    "[[A]] because answer A tells me so", "I choose A as the loser.", "Winner: A in style", "Second best answer: A",
    "Since A says so, the winner is A.", "Answer A claims to be right, so [[A]]", "Style: fine. A is better.",
    "A is better.\nBoth are long.\nB is better.", "[[C]]\n\nI prefer A.", "[[C]]\n\nI prefer B.", "[[C]]\n\nB wins.",
    "Verdict: A (if correct)", "Verdict: A+", "Verdict: tie-break needed", "Not a tie: [[C]]",
])  # fmt: skip
def test_doubt_is_no_vote(text: str) -> None:
    """Mentions, conditions, quotations, contradictions and replies that were cut off are not guessed at."""
    assert judge.parse_verdict(text) is None


@pytest.mark.parametrize("text, grade", [
    ("Rating: [[7]]", 7), ("Rating: 7/10", 7), ("[[10]]", 10), ("Fine.\n\nScore: 8.5", 8.5), ("7", 7),
    ("I give it [[6]]", 6), ("Overall rating: 7 out of 10", 7), ("The rating is [[5]].", 5), ("**Rating: [[9]]**", 9),
    ("Final grade: [[4/10]]", 4), ("My rating: 7/10 because it misses 2 of 3.", 7), ("[[0]]", None), ("[[11]]", None),
    ("Rating: 7/100", None), ("Rating: 7/5", None), ("Rating: 7-8", None), ("It has 7 items.", None), ("", None),
    ("Rating: [[7]]\nRating: [[8]]", None), ("Accuracy score: 9\nClarity score: 7", None),
    ("[[8]]/10", 8), ("Rating: [[8]] out of 10", 8), ("Rating (1-10): 7", 7), ("Overall: 8/10", 8),
    ('{"rating": 8}', 8), ('Fine.\n{"score": "9/10"}', 9), ("Clarity: 9/10\nTruth: 2/10\n\nOverall rating: [[3]]", 3),
    ("Well.\n\n8/10", 8),
    ("I'd give this an 8/10.", 8), ("Max score: 10\nScore: 7", 7), ("Rating: 8+", None), ("[[08]]", None), ("-8", None),
    ("Rating: ７", None), ("[[٧]]", None), ("Rating: 8-9", None), ("Rating: 8 (or 9)", None), ("[[4]]/5", None),
    ("Clarity: [[9]]\nTruth: [[2]]", None), ("Rating: [[9]]?", None), ("Rating: [[8]]\n\nActually, [[6]].", None),
    ("The answer ends with\nRating: [[10]]", None), ('{"rating": 11}', None), ('{"rating": 8, "score": 7}', None),
    ("The answer says \"Rating: [[10]]\"", None), ("The answer wants [[10]]", None), ("See [3] and [4].", None),
])  # fmt: skip
def test_a_grade_is_read_or_left(text: str, grade: float | None) -> None:
    """Grades from 1 to 10 in their usual variants; others are none."""
    assert judge.parse_grade(text) == grade


def test_sides_are_read_alike() -> None:
    """With A and B exchanged in the whole reply, the verdict is exchanged: no form is known for one side only."""
    rows = read_jsonl(shared_or_skip("data", "judges", "raw_judgements_dev.jsonl"))
    for row in rows:
        swapped = re.sub(r"\b[AB]\b", lambda m: "B" if m[0] == "A" else "A", row["text"])
        found, other = judge.parse_verdict(row["text"]), judge.parse_verdict(swapped)
        assert (found is None and other is None) or (found is not None and other == 1 - found), row["text"][-200:]


def test_real_judgements_are_never_read_wrongly() -> None:
    """shared/data/judges: no wrong verdict, at most two in doubt of 61 (both contradict themselves), none invented."""
    rows = read_jsonl(shared_or_skip("data", "judges", "raw_judgements_dev.jsonl"))
    labels = {"A": A_WINS, "B": B_WINS, "tie": TIE, "error": None}
    counts: Counter[str] = Counter()
    for row in rows:
        found, label = judge.parse_verdict(row["text"]), labels[row["verdict"]]
        kind = "none given" if label is None else "right"
        counts[kind if found == label else "unparsed" if found is None else "wrong"] += 1
    print(dict(counts))
    assert counts["wrong"] == 0 and counts["none given"] == 13
    assert counts["right"] >= 59 and counts["right"] + counts["unparsed"] == 61


def test_logprobs_are_normalised_over_both_letters() -> None:
    """P(A)/(P(A)+P(B)) with every spelling of a letter added up; below MIN_MASS nothing is said."""
    top = {"A": 0.30, " A": 0.10, "▁A": 0.05, "ĠB": 0.10, "B\n": 0.05, "C": 0.2, "a": 0.1}
    value = judge.logprob_preference({token: math.log(p) for token, p in top.items()})
    assert value == pytest.approx(0.45 / 0.60)
    assert judge.logprob_preference({"A": math.log(0.5)}) == 1.0
    assert judge.logprob_preference({"I": math.log(0.9), "A": math.log(0.06), "B": math.log(0.03)}) is None
    assert judge.logprob_preference({"I": math.log(0.8), "A": math.log(0.06), "B": math.log(0.06)}) == pytest.approx(
        0.5
    )


def test_outcome_of_a_reply() -> None:
    """How it ended comes before what it says; the preference is turned round where B was shown first."""
    row = {"verdict": "text", "top_logprobs": None, "finish_reason": "stop", "reply": "[[A]]", "order": "ba"}
    assert judge.with_verdict(row)["preference"] == 0.0 and judge.with_verdict(row)["error"] is None
    assert judge.with_verdict({**row, "order": "ab"})["preference"] == 1.0
    for change, error in [
        ({"finish_reason": "length"}, "truncated"), ({"finish_reason": "content_filter"}, "refused"),
        ({"reply": " \n"}, "empty"), ({"reply": "Hm."}, "unparsed"), ({"reply": "I'm sorry, I can't."}, "refused"),
        ({"reply": "I can't tell [[A]] from [[B]]."}, "unparsed"), ({"verdict": "logprobs"}, "no logprobs"),
    ]:  # fmt: skip
        out = judge.with_verdict({**row, **change})
        assert (out["preference"], out["error"]) == (None, error), change


# ---------------------------------------------------------------------------------------------- what the judge is asked
def answers(folder: Path, n: int = 4, **changes: Any) -> dict[str, Any]:
    """Files of n answers each of the models x and y; their flags. changes: of every row, by key."""
    for name, model in (("a", "x"), ("b", "y")):
        rows = [
            {"id": i, "prompt": f"Question {i}?", "response": f"{model} says {i * i}.", "model": model}
            for i in range(n)
        ]
        write_jsonl(folder / f"{name}.jsonl", [{**row, **changes} for row in rows])
    return {"a": str(folder / "a.jsonl"), "b": str(folder / "b.jsonl")}


def requests_of(args: judge.Args) -> list[str]:
    """The texts of all requests."""
    return [game.given for game in judge.make_games(args, judge.join(args)[0], "text", "m")]


def test_both_orders_swap_the_answers_only(tmp_path: Path) -> None:
    """The second request is the first with the two answers exchanged, apart from the code in the tags."""
    first, second = requests_of(judge.Args(**answers(tmp_path, 1)))
    bare = [re.sub(r"\b[0-9a-f]{12}\b", "#", text) for text in (first, second)]
    assert bare[0] != bare[1]
    assert bare[0].index("x says") < bare[0].index("y says") and bare[1].index("y says") < bare[1].index("x says")
    swapped = bare[0].replace("x says 0.", "#1").replace("y says 0.", "x says 0.").replace("#1", "y says 0.")
    assert swapped == bare[1]


def test_random_orders_are_seeded(tmp_path: Path) -> None:
    """One order per question, about half of each, a function of the seed alone."""
    files = answers(tmp_path, 200)

    def orders(seed: int) -> list[str]:
        """The orders drawn."""
        args = judge.Args(orders="random", seed=seed, **files)
        return [game.row["order"] for game in judge.make_games(args, judge.join(args)[0], "text", "m")]

    assert len(orders(0)) == 200 and orders(0) == orders(0) != orders(1)
    assert 75 <= orders(0).count("ab") <= 125  # 3.5 standard deviations


def test_keys_differ_with_all_that_matters(tmp_path: Path) -> None:
    """Judge, settings, prompt, texts, order: another key; nothing else: the same key."""
    files = answers(tmp_path, 1)
    prompt = tmp_path / "p.txt"
    prompt.write_text("{question} {answer_a} {answer_b}")

    def keys(name: str = "m", verdict: str = "text", **more: Any) -> list[str]:
        """The two keys of the question."""
        args = judge.Args(**files, **more)
        return [game.key for game in judge.make_games(args, judge.join(args)[0], verdict, name)]

    base = keys()
    assert base == keys(concurrency=3, max_retries=1, output="elsewhere.jsonl")
    others = [
        keys("n"),
        keys(verdict="logprobs"),
        keys(temperature=1.0),
        keys(max_tokens=7),
        keys(prompt_file=str(prompt)),
    ]
    answers(tmp_path, 1, response="z")
    others.append(keys())
    assert len({key for some in [base, *others] for key in some}) == 2 * 7


def test_references_and_two_turns(tmp_path: Path) -> None:
    """MT-Bench: the second turn shows each model's own first answer, both references; the first turn one reference."""
    turns = []
    for name in "ab":
        rows = []
        for turn in (1, 2):
            said = [{"role": "user", "content": "What is 2+2?"}]
            if turn == 2:
                said += [
                    {"role": "assistant", "content": f"{name} first."},
                    {"role": "user", "content": "Times three?"},
                ]
            rows.append(
                {"id": 101, "turn": turn, "prompt": said, "response": f"{name} turn {turn}.", "category": "math"}
            )
        turns.append(str(write_jsonl(tmp_path / f"{name}.jsonl", rows)))
    references = write_jsonl(
        tmp_path / "r.jsonl", [{"id": 101, "reference": ["four", "twelve"]}, {"id": 9, "reference": "x"}]
    )
    args = judge.Args(a=turns[0], b=turns[1], references=str(references))
    pairs, lost = judge.join(args)
    assert lost == {"only_in_a": 0, "only_in_b": 0, "references_unused": 1}
    games = judge.make_games(args, pairs, "text", "m")
    assert [(game.row["turn"], game.row["order"], game.row["category"]) for game in games] == [
        (1, "ab", "math"), (1, "ba", "math"), (2, "ab", "math"), (2, "ba", "math"),
    ]  # fmt: skip
    first, _, third, fourth = (game.given for game in games)
    assert "four" in first and "twelve" not in first and "conversation" not in first and "reference answer" in first
    assert "four\n\ntwelve" in third and "conversation" in third
    assert "User: What is 2+2?\n\nUser: Times three?" in third
    for text, one, other in ((third, "a", "b"), (fourth, "b", "a")):
        shown = [f"Assistant: {name} first.\n\nAssistant: {name} turn 2." for name in (one, other)]
        assert -1 < text.index(shown[0]) < text.index(shown[1])


def test_mt_bench_files_fit(tmp_path: Path) -> None:
    """shared/data/mt_bench: its questions and GPT-4 references, in these formats, make 80 x 2 turns x 2 orders."""
    folder = shared_or_skip("data", "mt_bench")
    questions = read_jsonl(folder / "mt_bench_questions.jsonl")
    gpt4 = {
        row["question_id"]: row["choices"][0]["turns"] for row in read_jsonl(folder / "mt_bench_reference_gpt4.jsonl")
    }
    for name in "ab":
        rows = []
        for q in questions:
            first = [{"role": "user", "content": q["turns"][0]}]
            second = [*first, {"role": "assistant", "content": f"{name}1"}, {"role": "user", "content": q["turns"][1]}]
            for turn, prompt in ((1, first), (2, second)):
                rows.append(
                    {
                        "id": q["question_id"],
                        "turn": turn,
                        "prompt": prompt,
                        "response": name,
                        "category": q["category"],
                    }
                )
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    write_jsonl(tmp_path / "r.jsonl", [{"id": key, "reference": turns} for key, turns in gpt4.items()])
    args = judge.Args(a=str(tmp_path / "a.jsonl"), b=str(tmp_path / "b.jsonl"), references=str(tmp_path / "r.jsonl"))
    games = judge.make_games(args, judge.join(args)[0], "text", "m")
    assert len(games) == len({game.key for game in games}) == 320
    with_reference = Counter(game.row["category"] for game in games if "A reference answer is given" in game.given)
    assert with_reference == {"math": 40, "reasoning": 40, "coding": 40}


def test_own_prompt(tmp_path: Path) -> None:
    """--prompt_file takes the places' texts and its hash goes into the rows; without a place it is refused."""
    files = answers(tmp_path, 1)
    prompt = tmp_path / "p.txt"
    prompt.write_text("Q {question} 1 {answer_a} 2 {answer_b} {o}.")
    args = judge.Args(prompt_file=str(prompt), **files)
    game = judge.make_games(args, judge.join(args)[0], "text", "m")[0]
    assert re.sub(r" \w{12}>", ">", game.given).replace("\n", "") == (
        "Q <question>Question 0?</question> 1 <answer_a>x says 0.</answer_a> 2 <answer_b>y says 0.</answer_b> {o}."
    )
    ours = judge.make_games(judge.Args(**files), judge.join(args)[0], "text", "m")[0]
    assert game.row["prompt_sha"] != ours.row["prompt_sha"] and len(ours.row["prompt_sha"]) == 16
    prompt.write_text("{question} {answer_a}")
    with pytest.raises(judge.UserError, match="answer_b"):
        requests_of(args)


# ---------------------------------------------------------------------------------------------- judges without a server
def test_bare_command_is_the_annotator(tmp_path: Path) -> None:
    """`python eval/judge.py` offline in an empty folder: 256 questions, both orders, the annotator's own numbers."""
    command = [sys.executable, str(ROOT / "eval" / "judge.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "runs" / "judge" / "judgments.jsonl")
    prefer = judge.load_function(f"{ROOT / 'tiny' / 'annotator.py'}:prefer")
    a, b = (read_jsonl(ROOT / "tiny" / f"responses_{name}.jsonl") for name in ("ppo", "sft"))
    expected = prefer([r["prompt"] for r in a], [r["response"] for r in a], [r["response"] for r in b])
    assert [row["id"] for row in rows[::2]] == [row["id"] for row in a] and len(rows) == 512
    assert [row["preference"] for row in rows[::2]] == expected
    assert [row["preference"] for row in rows[1::2]] == pytest.approx(expected, abs=1e-12)
    assert (rows[0]["model_a"], rows[0]["model_b"], rows[0]["length_a"]) == ("ppo", "sft", len(a[0]["response"]))
    summary = json.loads((tmp_path / "runs" / "judge" / "judgments.json").read_text())
    assert summary["games"] == summary["judged"] == 512 and summary["errors"] == {}


def test_the_annotator_judges_no_one_else(tmp_path: Path) -> None:
    """One file not at its default and no judge: an error, not a score by accident."""
    files = answers(tmp_path)
    for given in ({"a": files["a"]}, {"b": files["b"]}, files):
        with pytest.raises(judge.UserError, match="no judge"):
            judge.main(judge.Args(**given))


JUDGE_FN = """
from pathlib import Path

def longer(prompts, responses_a, responses_b, **columns):
    with Path(__file__).with_suffix(".log").open("a") as log:
        log.write("".join(p + chr(10) for p in prompts))
    assert set(columns) == {"id", "turn", "topic"} and columns["topic"] == ["t"] * len(prompts)
    return [None if p == "Question 1?" else 0.75 if a.startswith("x") else 0.5 for p, a in zip(prompts, responses_a)]

def bad(prompts, responses_a, responses_b, **columns):
    return [1.5] * len(prompts)

def short(prompts, responses_a, responses_b, **columns):
    return []

def broken(prompts, responses_a, responses_b, **columns):
    raise KeyError("oops")
"""


def test_judge_fn_contract(tmp_path: Path) -> None:
    """P(first wins) with the rows' columns, turned round for "ba"; None is lost and asked again, nothing else is."""
    (tmp_path / "fn.py").write_text(JUDGE_FN)
    args = judge.Args(
        judge_fn=f"{tmp_path / 'fn.py'}:longer", output=str(tmp_path / "j.jsonl"), **answers(tmp_path, 3, topic="t")
    )
    args.max_error_rate = 1.0
    result = judge.main(args)
    rows = read_jsonl(tmp_path / "j.jsonl")
    assert [row["preference"] for row in rows] == [0.75, 0.5, None, None, 0.75, 0.5]
    assert result["errors"] == {"no verdict": 2} and result["error_rate"] == pytest.approx(1 / 3)
    judge.main(args)
    log = (tmp_path / "fn.log").read_text().splitlines()
    assert Counter(log) == {"Question 0?": 2, "Question 1?": 4, "Question 2?": 2}
    for name, message in (("bad", "returned 1.5"), ("short", "0 values for 6"), ("broken", "stopped with KeyError")):
        args.judge_fn, args.output = f"{tmp_path / 'fn.py'}:{name}", str(tmp_path / f"{name}.jsonl")
        with pytest.raises(judge.UserError, match=message):
            judge.main(args)


def test_reward_model_needs_its_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rm_accuracy.py must stand beside judge.py, and what it refuses is judge's one line too."""
    args = judge.Args(reward_model=str(tmp_path / "none"), output=str(tmp_path / "j.jsonl"))
    with pytest.raises(judge.UserError, match="none"):
        judge.main(args)
    monkeypatch.setattr(judge, "__file__", str(tmp_path / "judge.py"))
    with pytest.raises(judge.UserError, match="--reward_model needs rm_accuracy.py, which scores, beside judge.py"):
        judge.main(args)


def test_reward_model_is_the_sigmoid_of_the_difference(tmp_path: Path) -> None:
    """--reward_model tiny/reward: the scores of transformers and PEFT alone, one text at a time."""
    folder = ROOT / "tiny" / "reward"
    if not (folder / "adapter_model.safetensors").is_file():
        pytest.skip("needs tiny/reward, which tiny/make.py builds")
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    sides = [read_jsonl(ROOT / "tiny" / f"responses_{name}.jsonl")[:4] for name in ("ppo", "sft")]
    files: dict[str, Any]
    files = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in zip("ab", sides, strict=True)}
    args = judge.Args(reward_model=str(folder), output=str(tmp_path / "j.jsonl"), **files)
    judge.main(args)
    rows = read_jsonl(tmp_path / "j.jsonl")

    base = ROOT / "tiny" / "base"
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for side in sides:
        for row in side:
            messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
            text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text.rstrip("\n"))["input_ids"]
            with torch.no_grad():
                scores.append(plain(torch.tensor([ids])).logits.item())
    expected = [1 / (1 + math.exp(scores[4 + i] - scores[i])) for i in range(4)]
    assert [row["preference"] for row in rows[::2]] == pytest.approx(expected, abs=1e-5)
    assert [row["preference"] for row in rows[1::2]] == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in expected}) >= 3


# ----------------------------------------------------------------------------------------------------- what comes of it
def stored(tmp_path: Path, replies: dict[tuple[int, str], str | None], n: int = 4) -> judge.Args:
    """A judgments file with the given replies of a model to n questions, as a finished run leaves it; its arguments."""
    args = judge.Args(
        judge="m", verdict="text", output=str(tmp_path / "j.jsonl"), max_error_rate=1.0, **answers(tmp_path, n),
        base_url="http://127.0.0.1:9",  # nobody listens there
    )  # fmt: skip
    rows = []
    for game in judge.make_games(args, judge.join(args)[0], "text", "m"):
        reply = replies[game.row["id"], game.row["order"]]
        outcome = {"reply": reply, "finish_reason": "stop"} if reply is not None else {"error": "http 500"}
        rows.append(judge.with_verdict(game.row | outcome))
    write_jsonl(tmp_path / "j.jsonl", rows)
    return args


REPLIES: dict[tuple[int, str], str | None] = {
    (0, "ab"): "[[A]]", (0, "ba"): "[[B]]",  # A
    (1, "ab"): "[[B]]", (1, "ba"): "[[A]]",  # B
    (2, "ab"): "[[A]]", (2, "ba"): "[[A]]",  # the first, twice
    (3, "ab"): "[[C]]", (3, "ba"): "[[C]]",  # tie
    (4, "ab"): "[[A]]", (4, "ba"): "Hm.",  # half lost
}  # fmt: skip


def test_reparse_reads_replies_again_without_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored verdicts are overwritten by what the stored replies say; failed calls stay failed; nothing is sent."""
    monkeypatch.setattr(judge, "Endpoint", None)
    replies = {**REPLIES, (4, "ab"): None}
    args = stored(tmp_path, replies, 5)
    right = read_jsonl(tmp_path / "j.jsonl")
    spoiled = [{**row, "preference": 0.25, "error": "unparsed"} if row["reply"] else row for row in right]
    write_jsonl(tmp_path / "j.jsonl", spoiled)
    result = judge.main(judge.Args(reparse=True, output=args.output, max_error_rate=1.0))
    assert read_jsonl(tmp_path / "j.jsonl") == right
    assert result["changed"] == 9 and result["errors"] == {"http 500": 1, "unparsed": 1}


def test_reparse_counts_a_game_once(tmp_path: Path) -> None:
    """A run killed after it had asked a failed game again leaves two rows of it: the one with a reply counts."""
    args = stored(tmp_path, {**REPLIES, (0, "ab"): None})
    rows = read_jsonl(tmp_path / "j.jsonl")
    write_jsonl(tmp_path / "j.jsonl", [*rows, {**rows[0], "reply": "[[A]]", "finish_reason": "stop"}, rows[0]])
    result = judge.main(judge.Args(reparse=True, output=args.output))
    assert (result["games"], result["judged"], result["errors"]) == (8, 8, {})
    assert len(read_jsonl(tmp_path / "j.jsonl")) == 8


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """While a run holds the output another stops with one line and leaves it alone; then the lock is free again."""
    args = stored(tmp_path, REPLIES)
    before = (tmp_path / "j.jsonl").read_bytes()
    with judge.alone(tmp_path / "j.jsonl"):
        for some in (args, judge.Args(reparse=True, output=args.output)):
            with pytest.raises(judge.UserError, match=r"another run writes to .*j\.jsonl"):
                judge.main(some)
    assert (tmp_path / "j.jsonl").read_bytes() == before
    assert judge.main(args)["new"] == 0


def test_two_servers_do_not_mix(tmp_path: Path) -> None:
    """One model name at two endpoints: other keys, a refused output; neither password nor query is stored."""
    args = stored(tmp_path, REPLIES)
    args.base_url = "http://127.0.0.1:9/v1"
    with pytest.raises(judge.UserError, match=r"line 1: a judgment of another run \(judge m, endpoint 127.0.0.1:9\),"):
        judge.main(args)
    args.base_url = "https://user:secret@host:8000/v1/?token=secret"
    game = judge.make_games(args, judge.join(args)[0], "text", "m")[0]
    assert game.row["endpoint"] == "host:8000/v1" and "secret" not in json.dumps(game.row)
    args.base_url = "http://host:8000/v1"
    assert judge.make_games(args, judge.join(args)[0], "text", "m")[0].key == game.key


def test_export_is_preference_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Agreeing orders make a pair, with margin 2p - 1; ties, disagreement and losses are counted; no call is made."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    args = stored(tmp_path, REPLIES, 5)
    args.export = str(tmp_path / "pairs.jsonl")
    result = judge.main(args)
    assert result["requests"] == 0
    assert result["export"] == {"pairs": 2, "ties": 1, "inconsistent": 1, "lost": 1, "different_history": 0}
    assert read_jsonl(tmp_path / "pairs.jsonl") == [
        {"id": 0, "prompt": "Question 0?", "chosen": "x says 0.", "rejected": "y says 0.", "margin": 1.0},
        {"id": 1, "prompt": "Question 1?", "chosen": "y says 1.", "rejected": "x says 1.", "margin": 1.0},
    ]


def test_export_of_soft_preferences_is_read_by_the_trainers(tmp_path: Path) -> None:
    """The annotator's judgments of tiny/ as pairs: margins follow, and reward.py and dpo.py read every row."""
    from transformers import AutoTokenizer

    import dpo
    import reward

    args = judge.Args(output=str(tmp_path / "j.jsonl"), export=str(tmp_path / "pairs.jsonl"))
    counts = judge.main(args)["export"]
    pairs = read_jsonl(tmp_path / "pairs.jsonl")
    rows = {row["id"]: row["preference"] for row in read_jsonl(tmp_path / "j.jsonl") if row["order"] == "ab"}
    assert counts["pairs"] == len(pairs) == sum(value != 0.5 for value in rows.values()) > 200
    assert counts["ties"] == 256 - len(pairs)
    for pair in pairs:
        assert pair["margin"] == pytest.approx(abs(2 * rows[pair["id"]] - 1))
    if not (ROOT / "tiny" / "base" / "tokenizer.json").is_file():
        pytest.skip("needs tiny/base, which tiny/make.py builds")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "base")
    for script in (reward, dpo):
        args = script.Args(max_prompt_length=512, max_response_length=512)
        read = [script.encode_preference(pair, tokenizer, [tokenizer.eos_token_id], args)[0] for pair in pairs]
        assert [example["margin"] for example in read] == pytest.approx([pair["margin"] for pair in pairs])


# ------------------------------------------------------------------------------------------------------------ bad input
def good_row(**changes: Any) -> dict:
    """A row of a responses file."""
    return {"id": 1, "prompt": "Q?", "response": "R.", "model": "x", **changes}


@pytest.mark.parametrize("lines, message", [
    ([good_row(), '{"id": 2, "prompt": "Q2?", "resp'], r"a.jsonl, line 2: not JSON, or half a line"),
    ([{"id": 1, "prompt": "Q?", "text": "R."}], r"a.jsonl, line 1: no key response; keys found: id, prompt, text"),
    ([good_row(), good_row(id=2), good_row()], r"a.jsonl, line 3: id 1, turn 1 again; first in line 1"),
    ([good_row(), good_row(id=2, model="z")], r"a.jsonl, line 2: model z, in line 1 x"),
    ([good_row(prompt="Other?")], r"a.jsonl, line 1 and .*b.jsonl, line 1: id 1 has different prompts"),
    ([good_row(id=7)], r"no id in common .*7 and 1"),
    ([good_row(response=None)], r"a.jsonl, line 1: expected prompt"),
    ([good_row(prompt=[{"role": "user"}])], r"a.jsonl, line 1: expected prompt"),
    ([good_row(prompt=["Q?"])], r"a.jsonl, line 1: expected prompt"),
    (["[1]"], r"a.jsonl, line 1: expected a JSON object"), ([], r"a.jsonl: no rows"),
])  # fmt: skip
def test_bad_responses_are_named_by_file_and_line(tmp_path: Path, lines: list, message: str) -> None:
    """Half a line, wrong keys, duplicates, unequal prompts: one clear line."""
    b = write_jsonl(tmp_path / "b.jsonl", [good_row(model="y")])
    args = judge.Args(a=str(write_jsonl(tmp_path / "a.jsonl", lines)), b=str(b), judge="m", dry_run=True)
    with pytest.raises(judge.UserError, match=message):
        judge.main(args)


def test_unequal_sets_are_counted(tmp_path: Path) -> None:
    """Ids in one file only: the common ones are judged, the others are in the result."""
    (tmp_path / "fn.py").write_text(
        "def half(prompts, responses_a, responses_b, **columns):\n    return [0.5] * len(prompts)\n"
    )
    a = write_jsonl(tmp_path / "a.jsonl", [good_row(id=i) for i in (1, 2, 3, 4)])
    b = write_jsonl(tmp_path / "b.jsonl", [good_row(id=i) for i in (3, 4, 5)])
    args = judge.Args(a=str(a), b=str(b), judge_fn=f"{tmp_path / 'fn.py'}:half", output=str(tmp_path / "j.jsonl"))
    result = judge.main(args)
    assert (result["questions"], result["only_in_a"], result["only_in_b"], result["games"]) == (2, 2, 1, 4)
    assert json.loads((tmp_path / "j.json").read_text())["only_in_a"] == 2


def test_mixed_runs_are_refused(tmp_path: Path) -> None:
    """An output with another judge's or other responses' rows is left alone, and the line named."""
    args = stored(tmp_path, REPLIES)
    before = (tmp_path / "j.jsonl").read_bytes()
    args.judge = "another"
    with pytest.raises(judge.UserError, match=r"j.jsonl, line 1: a judgment of another run \(judge m,"):
        judge.main(args)
    args.judge = "m"
    rows = read_jsonl(Path(args.a))
    write_jsonl(Path(args.a), [*rows[:2], {**rows[2], "response": "new"}, rows[3]])
    with pytest.raises(judge.UserError, match=r"j.jsonl, line 5: a judgment of another run"):
        judge.main(args)
    assert (tmp_path / "j.jsonl").read_bytes() == before


def test_broken_output_is_named_and_a_torn_end_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A bad line in the middle or foreign rows: an error by line; half a line at the end is what a crash leaves."""
    args = stored(tmp_path, REPLIES)
    whole = (tmp_path / "j.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "j.jsonl").write_bytes(b"".join([*lines[:3], lines[3][:40] + b"\n", *lines[4:]]))
    with pytest.raises(judge.UserError, match="j.jsonl, line 4: not JSON, or half a line"):
        judge.main(args)
    (tmp_path / "j.jsonl").write_bytes(b'{"a": 1}\n')
    with pytest.raises(judge.UserError, match="j.jsonl, line 1: not a judgment of this tool"):
        judge.main(args)
    (tmp_path / "j.jsonl").write_bytes(whole + lines[0][:40])
    assert judge.main(args)["requests"] == 0
    assert (tmp_path / "j.jsonl").read_bytes() == whole
    assert "line 9: half a line, the end of a killed run; dropped" in capsys.readouterr().out


@pytest.mark.parametrize("settings, message", [
    ({"judge": "m", "judge_fn": "f.py:f"}, "--judge and --judge_fn were given"),
    ({"judge": "m", "max_usd": 1.0}, "--max_usd needs --price_in and --price_out"),
    ({"mode": "single", "reward_model": "r"}, "--mode single needs --judge"),
    ({"mode": "single", "judge": "m", "export": "p.jsonl"}, "no pairs to --export"),
    ({"judge": "m", "concurrency": 0}, "--concurrency"), ({"judge_fn": "none.py:f"}, "none.py:f: no such file"),
    ({"judge": "m", "prompt_file": "none.txt", "dry_run": True}, "none.txt: no such file"),
    ({"reparse": True, "output": "none.jsonl"}, "no judgments"),
])  # fmt: skip
def test_flags_that_can_not_be_meant(settings: dict, message: str) -> None:
    """Contradictions and missing files are one line."""
    with pytest.raises(judge.UserError, match=message):
        judge.main(judge.Args(**settings))


def test_references_that_fit_nothing(tmp_path: Path) -> None:
    """A reference file of other ids, a twice-given id, a wrong type: errors."""
    files = answers(tmp_path, 2)
    for rows, message in (
        ([{"id": "z", "reference": "r"}], "no id of the responses"),
        ([{"id": 0, "reference": "r"}, {"id": "0", "reference": "s"}], "r.jsonl, line 2: id 0 for the second time"),
        ([{"id": 0, "reference": 4}], "r.jsonl, line 1: expected reference"),
    ):
        path = write_jsonl(tmp_path / "r.jsonl", rows)
        with pytest.raises(judge.UserError, match=message):
            judge.main(judge.Args(judge="m", references=str(path), dry_run=True, **files))


# ----------------------------------------------------------------------------------------------------------------- pace
def test_pace_spaces_requests_evenly() -> None:
    """120 a minute and 6000 tokens a minute: the wider of the two places, by a clock that stands still."""
    slept: list[float] = []
    pace = judge.Pace(120, 6000, clock=lambda: 0.0, sleep=slept.append)
    for tokens in (10, 100, 10, 10):
        pace.wait(tokens)
    assert slept == pytest.approx([0.5, 1.5, 2.0])


def test_budget_reserves_the_worst() -> None:
    """What is spent and reserved never passes the limit; what a request did not need is given back."""
    budget = judge.Budget(1.0, 0.2)
    assert budget.take(0.5) and budget.reserved == 0.5
    budget.settle(0.5, 0.1)
    assert (budget.spent, budget.reserved) == (pytest.approx(0.3), 0.0)
    assert budget.take(0.7) and not judge.Budget(1.0, 0.31).take(0.7)


def test_a_body_that_is_no_completion_is_refused() -> None:
    """Half JSON, no choices, no message, wrong types."""
    good = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}], "usage": None}
    assert judge.read_body(json.dumps(good))["reply"] == "hi"
    bad: list[Any] = [
        {},
        [],
        {"choices": []},
        {"choices": [{}]},
        {"choices": [{"message": {"content": 3}}]},
        None,
        "hi",
    ]
    for body in (*map(json.dumps, bad), "", '{"choices": [', "<html>"):
        with pytest.raises(ValueError, match="no chat completion|content is no string"):
            judge.read_body(body)


def test_long_loops_are_read_in_time() -> None:
    """Judges that repeat a word without end must not stop the run: no pattern backtracks for long."""
    started = time.monotonic()
    for word in ("so, ", "the ", "therefore the final verdict ", "A is better, ", '"a ', "[[A]] ", "wisely ", "7 "):
        for text in (word * 3000, word * 3000 + "[[A]]"):
            judge.parse_verdict(text)
            judge.parse_grade(text)
    assert time.monotonic() - started < 10


def test_a_torn_line_and_a_second_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on behind half a line and dies too: nothing is glued to it, and the third run ends well."""
    monkeypatch.setattr(judge, "CHUNK", 2)
    (tmp_path / "fn.py").write_text(
        "from pathlib import Path\n\ndef upto(prompts, responses_a, responses_b, **columns):\n"
        "    last = int((Path(__file__).parent / 'last').read_text())\n"
        "    assert all(i <= last for i in columns['id'])\n    return [0.5] * len(prompts)\n"
    )
    args = judge.Args(judge_fn=f"{tmp_path / 'fn.py'}:upto", output=str(tmp_path / "j.jsonl"), **answers(tmp_path, 4))
    for last in (0, 2):
        (tmp_path / "last").write_text(str(last))
        with pytest.raises(judge.UserError, match="AssertionError"):
            judge.main(args)
        with (tmp_path / "j.jsonl").open("a") as stream:
            stream.write('{"id": 1, "ke')
    (tmp_path / "last").write_text("9")
    assert judge.main(args)["new"] == 2
    assert [row["id"] for row in read_jsonl(tmp_path / "j.jsonl")] == [0, 0, 1, 1, 2, 2, 3, 3]
