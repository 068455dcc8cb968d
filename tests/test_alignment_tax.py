"""eval/alignment_tax.py: likelihoods against float64 token by token, paired intervals against figures of GSM8K.

The reference model is plain transformers and PEFT in float64, one token at a time; the published figures are those of
../shared/data (four systems on GSM8K); intervals are held to statsmodels, to a bootstrap and to their own coverage.
"""

import doctest
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, make_adapter, read_jsonl, shared_or_skip, write_jsonl, write_run
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

from eval import alignment_tax as tax
from eval.common import PLAIN_TEMPLATE

NUMERIC = f"{ROOT / 'rewards' / 'math.py'}:numeric"
TEXTS = ("The fox is red and the otter eats fish.", "What sound does the deer make? It makes a click, I think.", "No.")


@pytest.fixture(scope="module")
def ppo_run(base: Path, world: Path) -> Path:
    """The run folder after: another adapter on the same base."""
    model, tokenizer = make_adapter(base, "policy", seed=9, size=0.1)
    write_run(world / "after", model, "policy", tokenizer)
    return world / "after"


def plain_model(folder: Path) -> tuple[Any, Any]:
    """(float64 model with its adapter, tokenizer) of a run folder, by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder))
    return model.double().eval(), AutoTokenizer.from_pretrained(folder)


def token_nats(model: Any, ids: list[int], at: int, start: int) -> float:
    """-log p(ids[at] | ids[start:at]) in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[start:at]])).logits[0, -1]
    return -float(logits.log_softmax(-1)[ids[at]])


def compare(before: Any, after: Any, tmp_path: Path, **flags: Any) -> dict:
    """alignment_tax.main on two lists of response rows."""
    files = [write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("before", before), ("after", after))]
    return tax.main(tax.Args(before_responses=str(files[0]), after_responses=str(files[1]), **flags))


# --------------------------------------------------------------------------------------------------------- the maths
def test_doctests() -> None:
    """The numbers in the docstrings."""
    assert doctest.testmod(tax).failed == 0 < doctest.testmod(tax).attempted


def test_every_token_is_scored_once() -> None:
    """Windows over all small sizes: each token after the context once, at most max_length wide, with enough context."""
    for n in range(1, 30):
        for length in range(2, 9):
            for stride in range(1, length):
                for context in range(1, n + 1):
                    found = tax.windows(n, context, length, stride)
                    assert [t for _, first, end in found for t in range(first, end)] == list(range(context, n))
                    assert all(end - start <= length and start < first for start, first, end in found)
                    assert all(first - start >= length - stride for start, first, _ in found[1:])


def test_paired_interval_is_that_of_statsmodels() -> None:
    """Mean difference, its error and interval: statsmodels' DescrStatsW on the differences."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=50)
    b = a + rng.normal(0.3, 0.2, size=50)
    ours, theirs = tax.paired_intervals(a, b), DescrStatsW(b - a)
    assert ours["difference"]["mean"] == pytest.approx(theirs.mean, rel=1e-12)
    assert ours["difference"]["standard_error"] == pytest.approx(theirs.std_mean, rel=1e-12)
    low, high = theirs.zconfint_mean()
    assert (ours["difference"]["ci_low"], ours["difference"]["ci_high"]) == pytest.approx((low, high), rel=1e-12)
    unpaired = math.sqrt(DescrStatsW(a).std_mean ** 2 + DescrStatsW(b).std_mean ** 2)
    assert ours["unpaired_standard_error"] == pytest.approx(unpaired, rel=1e-12)
    assert unpaired > 3 * theirs.std_mean, "pairing is worth something here"


def test_ratio_interval_is_that_of_a_bootstrap() -> None:
    """The error of a difference of two ratios of sums over documents: scipy's paired bootstrap, within its noise."""
    rng = np.random.default_rng(1)
    size = rng.integers(5, 200, 400).astype(float)
    a = size * rng.gamma(20, 0.1, 400) + 10 * rng.normal(size=400)
    b = a + size * rng.normal(0.05, 0.2, 400)
    ours = tax.paired_intervals(tax.ratio_values(a, size), tax.ratio_values(b, size))
    assert ours["before"]["mean"] == pytest.approx(a.sum() / size.sum(), rel=1e-12)

    def difference(a: Any, b: Any, size: Any, axis: int) -> Any:
        return b.sum(axis) / size.sum(axis) - a.sum(axis) / size.sum(axis)

    drawn = stats.bootstrap((a, b, size), difference, paired=True, n_resamples=4000, rng=rng, method="percentile")
    assert ours["difference"]["standard_error"] == pytest.approx(drawn.standard_error, rel=0.05)
    naive = stats.sem(b / size - a / size)
    assert abs(naive / drawn.standard_error - 1) > 0.1, "the mean of ratios has another error"


# --------------------------------------------------------------------------------------------------------------- text
@pytest.mark.parametrize(("max_length", "stride", "batch_size"), [(512, 256, 2), (8, 3, 4), (8, 7, 1)])
def test_perplexity_by_hand(
    sft_run: Path, ppo_run: Path, tmp_path: Path, max_length: int, stride: int, batch_size: int
) -> None:
    """Plain text: nats, bits and perplexity of both models are those of float64, token by token; EOS begins."""
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(TEXTS[:2]) + "\n \n\n\n" + TEXTS[2] + "\n", encoding="utf-8")
    args: dict[str, Any] = {"max_length": max_length, "stride": stride, "batch_size": batch_size,
                            "output": str(tmp_path / "o.json")}  # fmt: skip
    result = tax.main(tax.Args(before=str(sft_run), after=str(ppo_run), text=str(source), **args))["text"]
    nats: dict[str, list[float]] = {}
    for side, folder in (("before", sft_run), ("after", ppo_run)):
        model, tokenizer = plain_model(folder)
        documents = [[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]] for text in TEXTS]
        nats[side] = []
        for ids in documents:
            total = 0.0
            for t in range(1, len(ids)):  # the window that scores t ends at the end of t's block of `stride` tokens
                block = max(0, (t - max_length) // stride + 1)
                start = max(0, min(len(ids), max_length + block * stride) - max_length)
                total += token_nats(model, ids, t, start)
            nats[side].append(total)
    tokens = sum(len(ids) - 1 for ids in documents)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (result["n"], result["tokens"], result["bytes"]) == (3, {"before": tokens, "after": tokens}, size)
    assert result["in_windows"] == sum(len(ids) > max_length for ids in documents)
    for side, values in nats.items():
        assert result["nats_per_token"][side]["mean"] == pytest.approx(sum(values) / tokens, abs=1e-5)
        assert result["bits_per_byte"][side]["mean"] == pytest.approx(sum(values) / math.log(2) / size, abs=1e-5)
        assert result["perplexity"][side]["mean"] == pytest.approx(math.exp(sum(values) / tokens), rel=1e-5)
    difference = (sum(nats["after"]) - sum(nats["before"])) / tokens
    assert result["nats_per_token"]["difference"]["mean"] == pytest.approx(difference, abs=1e-5) and difference != 0
    assert result["perplexity"]["ratio"]["mean"] == pytest.approx(math.exp(difference), rel=1e-5)
    assert result["perplexity"]["ratio"]["ci_low"] < math.exp(difference) < result["perplexity"]["ratio"]["ci_high"]


def test_replies_by_hand(sft_run: Path, ppo_run: Path, tmp_path: Path) -> None:
    """Conversations: the reply and what ends it are scored, given all before it; the same for both row formats."""
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    question, answer = "What does the fox eat?", "The fox eats honey."
    last = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rows = [
        {"messages": turns + last},
        {"prompt": question, "completion": f" {answer}\n"},
        {"messages": turns[:1]},  # no reply
        {"text": "  "},
        {"other": 1},
    ]
    model, tokenizer = plain_model(sft_run)
    head, middle = (
        "<|user|>\nHello?<|end|>\n<|assistant|>\nYes.<|end|>\n",
        f"<|user|>\n{question}<|end|>\n<|assistant|>\n",
    )
    total = 0.0
    for prompt in (head + middle, middle):
        context = tokenizer(prompt)["input_ids"]
        ids = context + tokenizer(answer + "<|end|>")["input_ids"]
        total += sum(token_nats(model, ids, t, 0) for t in range(len(context), len(ids)))
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    args = tax.Args(before=str(sft_run), after=str(ppo_run), text=str(source), output=str(tmp_path / "o.json"))
    result = tax.main(args)["text"]
    n = 2 * (len(tokenizer(answer)["input_ids"]) + 1)
    assert result["tokens"] == {"before": n, "after": n} and result["bytes"] == 2 * len(answer)
    assert result["nats_per_token"]["before"]["mean"] == pytest.approx(total / n, abs=1e-5)
    assert result["lost"] == {"the last message is no reply of an assistant": 1, "no text, or an empty one": 2}
    with pytest.raises(tax.UserError, match="columns found: other; expected: text | messages"):
        tax.read_documents(str(write_jsonl(tmp_path / "bad.jsonl", rows[4:])), tax.Counter())


class Letters:
    """A tokenizer of one token per character, which may add BOS (1) and has EOS (2)."""

    def __init__(self, bos: int | None, adds: bool, template: str = ""):
        """bos: id or None; adds: whether it puts BOS before a text by itself."""
        self.bos_token_id, self.eos_token_id, self.adds, self.template = bos, 2, adds, template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        """Ids of a text."""
        begin = [self.bos_token_id] if self.adds and add_special_tokens else []
        return {"input_ids": begin + [{"^": 1, "$": 2}.get(letter, 10 + ord(letter)) for letter in text]}

    def apply_chat_template(self, messages: list, tokenize: bool, add_generation_prompt: bool) -> str:
        """[question]answer$ and a line end, with ^ before it where the template writes BOS."""
        text = "".join(f"[{m['content']}]" if m["role"] == "user" else m["content"] + "$ \n" for m in messages)
        return self.template + text


def test_exactly_one_bos() -> None:
    """Plain text begins with one BOS whether the tokenizer adds it or not, with EOS where there is no BOS; neither is
    scored. A reply is scored with its end token and without the white space after it, BOS of the template not twice."""
    a, b = 10 + ord("a"), 10 + ord("b")
    for tokenizer, begin in ((Letters(1, True), 1), (Letters(1, False), 1), (Letters(None, False), 2)):
        assert tax.encode_document((None, "ab"), tokenizer) == ([begin, a, b], 1)
    question = [{"role": "user", "content": "a"}]
    for tokenizer in (Letters(1, True), Letters(1, True, "^")):
        ids, context = tax.encode_document((question, "b"), tokenizer)
        assert (ids, context) == ([1, 10 + ord("["), a, 10 + ord("]"), b, 2], 4)
    ids, context = tax.encode_document((question, "b"), Letters(None, False))
    assert ids[context:] == [b, 2] and context == 3


def test_same_model_costs_nothing(sft_run: Path, tmp_path: Path) -> None:
    """A model against itself: every difference is 0 with an interval of no width, the ratio 1; the result is on disk
    beside the model after, and equals what main returns."""
    after = tmp_path / "copy"
    shutil.copytree(sft_run, after)
    source = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    result = tax.main(tax.Args(before=str(sft_run), after=str(after), text=str(source)))
    assert result == json.loads((after / "alignment_tax.json").read_text())
    for name in ("nats_per_token", "bits_per_byte"):
        x = result["text"][name]["difference"]
        assert (x["mean"], x["ci_low"], x["ci_high"]) == (0, 0, 0)
    assert result["text"]["perplexity"]["ratio"] == {"mean": 1, "ci_low": 1, "ci_high": 1}
    assert result["text"]["same_tokens"]


def test_other_template_is_said(sft_run: Path, ppo_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Models that read other tokens are not compared per token without a word."""
    after = tmp_path / "after"
    shutil.copytree(ppo_run, after)
    (after / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Hello?", "completion": t} for t in TEXTS])
    result = tax.main(tax.Args(before=str(sft_run), after=str(after), text=str(source)))
    assert not result["text"]["same_tokens"] and "compare bits per byte" in capsys.readouterr().out


def test_template_that_refuses_is_counted(sft_run: Path, tmp_path: Path) -> None:
    """Conversations that one model's template refuses are left out for both, and counted with its side."""
    after = tmp_path / "after"
    shutil.copytree(sft_run, after)
    template = (after / "chat_template.jinja").read_text()
    guard = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (after / "chat_template.jinja").write_text(guard + template)
    talk = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    rows = [{"messages": talk}, {"messages": [{"role": "system", "content": "Be kind."}, *talk]}, {"text": "No."}]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    result = tax.main(tax.Args(before=str(sft_run), after=str(after), text=str(source)))["text"]
    assert result["n"] == 2 and result["lost"] == {"refused by the chat template (after)": 1}
    assert result["nats_per_token"]["difference"]["mean"] == pytest.approx(0, abs=1e-6)  # batched apart: rounding


# --------------------------------------------------------------------------------------------------------------- task
def gsm8k() -> tuple[list[dict], dict]:
    """(rows of correct_dev.csv as {"row", system: "0" or "1"}, the published figures)."""
    import csv

    folder = shared_or_skip("data", "gsm8k")
    expected = json.loads((folder.parent / "expected_dev.json").read_text())["gsm8k"]
    with (folder / "correct_dev.csv").open(newline="") as stream:
        return list(csv.DictReader(stream)), expected


def test_gsm8k_as_published(tmp_path: Path) -> None:
    """1,319 questions, two systems: accuracies, Wilson's intervals, the paired error and McNemar's p."""
    rows, expected = gsm8k()
    systems = ("6b_finetuning", "6b_verification")
    before, after = ([{"id": r["row"], "is_correct": int(r[system])} for r in rows] for system in systems)
    task = compare(before, after[::-1], tmp_path, score_column="is_correct")["task"]
    assert task["right_or_wrong"]
    for side, system in zip(("before", "after"), systems, strict=True):
        assert task[side]["mean"] == pytest.approx(expected[system]["acc"], abs=1e-6)
        assert task[side]["standard_error"] == pytest.approx(expected[system]["se"], abs=1e-6)
        assert [task[side]["ci_low"], task[side]["ci_high"]] == pytest.approx(expected[system]["wilson95"], abs=1e-5)
    paired = expected["paired_difference"]
    assert task["difference"]["mean"] == pytest.approx(paired["diff"], abs=1e-6)
    assert task["difference"]["standard_error"] == pytest.approx(paired["paired_se"], abs=1e-6)
    assert task["unpaired_standard_error"] == pytest.approx(paired["unpaired_se"], abs=1e-6)
    assert task["mcnemar_exact_p"] == pytest.approx(paired["mcnemar_exact_p"], rel=1e-6, abs=0)
    lost = sum((r[systems[0]], r[systems[1]]) == ("1", "0") for r in rows)
    gained = sum((r[systems[0]], r[systems[1]]) == ("0", "1") for r in rows)
    assert (task["lost"], task["gained"]) == (lost, gained)
    assert task["changed"]["mean"] == pytest.approx((lost + gained) / 1319)


def test_gsm8k_from_texts(tmp_path: Path) -> None:
    """200 questions of GSM8K with worded answers, right where a system was, judged by rewards/math.py:numeric: the same
    figures as from the system's flags."""
    rows, _ = gsm8k()
    questions = read_jsonl(shared_or_skip("data", "gsm8k", "gsm8k_test_first200.jsonl"))
    files = []
    for system in ("6b_finetuning", "6b_verification"):
        file = []
        for row, question in zip(rows, questions, strict=False):
            answer = question["answer"].rpartition("####")[2].strip()
            said = answer if row[system] == "1" else answer + "1"
            text = f"We had 3 of them. So the answer is {said}."
            file.append({"id": question["row"], "prompt": question["question"], "response": text, "answer": answer})
        files.append(file)
    judged = compare(files[0], files[1], tmp_path, reward_fn=NUMERIC)["task"]
    before, after = (
        [{"id": r["row"], "right": r[system] == "1"} for r in rows[:200]]
        for system in ("6b_finetuning", "6b_verification")
    )
    assert {**judged} == compare(before, after, tmp_path, score_column="right")["task"]
    assert judged["difference"]["n"] == 200 and judged["lost"] > 0 < judged["gained"]


def test_samples_are_averaged_first(tmp_path: Path) -> None:
    """Two samples of a question are one observation: by hand, before (1/2, 1), after (1, 0)."""
    before = [{"id": i, "sample": s, "score": x} for i, s, x in ((0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 1))]
    after = [{"id": i, "sample": s, "score": x} for i, s, x in ((1, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0))]
    task = compare(before, after, tmp_path, score_column="score")["task"]
    assert (task["before"]["n"], task["responses"], task["right_or_wrong"]) == (2, 4, False)
    assert (task["before"]["mean"], task["after"]["mean"]) == (0.75, 0.5)
    assert task["difference"]["mean"] == -0.25 and task["difference"]["standard_error"] == pytest.approx(0.75)
    assert "mcnemar_exact_p" not in task


def row(name: Any, response: Any = "4", **columns: Any) -> dict:
    """A response row that asks for 2 + 2."""
    return {"id": name, "prompt": f"2 + 2? ({name})", "response": response, "answer": "4", **columns}


def test_what_does_not_match_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Ids of one file only, null responses, questions without a score: left out, counted, shown; 1 is not "1"."""
    before = [row(1), row("1"), row(2, "5"), row(3, None), row(4), row(5, answer=None), row(6, finish_reason="length")]
    before.append(row(8))
    after = [row(6), row(5, answer=None), row(4, None), row(3), row(2, finish_reason="length"), row("1", "5"), row(9)]
    after.append(row(1))
    result = compare(before, after, tmp_path, reward_fn=NUMERIC)
    lost = {"only in the file before": 1, "only in the file after": 1, "no response": 2, "no score": 1}
    assert result["responses"] == {"n": 5, "cut_off": {"before": 1, "after": 1}, "lost": lost}
    assert (result["task"]["before"]["n"], result["task"]["lost"], result["task"]["gained"]) == (4, 1, 1)
    assert str(lost) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([row(1), row(1)], [row(1)], r"before\.jsonl: id 1 is in line 1 and in line 2"),
        ([row(1)], [row(0), {**row(1), "prompt": "x"}], r"id 1 .*before\.jsonl, line 1, .*after\.jsonl, line 2"),
        ([row(1)], [row("1")], r"share no answered id; their first rows have 1 and '1'"),
        ([row(1)], [row(1), '{"id": 2, "prom'], r"after\.jsonl, line 2: not JSON, or half a line"),
        ([row(1)], [{"id": 1, "text": "4"}], r"after\.jsonl, line 1: no key prompt, response; keys found: id, text"),
        ([row(1, answer=None)], [row(1, answer=None)], "no score for any question"),
    ],
)
def test_files_that_do_not_fit(before: list, after: list, message: str, tmp_path: Path) -> None:
    """Mixed-up files are one clear line, with file and line number."""
    with pytest.raises(tax.UserError, match=message) as error:
        compare(before, after, tmp_path, reward_fn=NUMERIC)
    assert "\n" not in str(error.value)


def test_one_question_has_no_interval(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """n = 1: the values, and - in the table, null in strict JSON for what one draw can't tell."""
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [{"id": 1, "score": x}]) for name, x in (("a", 0.5), ("b", 0.25))]
    flags: dict[str, Any] = {
        "before_responses": str(files[0]),
        "after_responses": str(files[1]),
        "score_column": "score",
    }
    task = tax.main(tax.Args(output=str(tmp_path / "tax.json"), **flags))["task"]
    known = {"n": 1, "standard_error": None, "ci_low": None, "ci_high": None}
    assert (task["before"], task["difference"]) == (known | {"mean": 0.5}, known | {"mean": -0.25})
    assert task["unpaired_standard_error"] is None
    text = (tmp_path / "tax.json").read_text()
    assert "NaN" not in text and json.loads(text)["task"] == task
    shown = capsys.readouterr().out
    assert "0.500 [-, -]" in shown and "-0.250 [-, -]" in shown and "standard error - paired, - unpaired" in shown
    assert "nan" not in shown


@pytest.mark.parametrize("sample", [[1], {"a": 1}])
def test_sample_of_a_wrong_type(sample: Any, tmp_path: Path) -> None:
    """`sample` is a number or a name."""
    with pytest.raises(tax.UserError, match=r"after.jsonl, line 2: sample is .*, expected a string or a number"):
        compare([row(1)], [row(1), row(2, sample=sample)], tmp_path, reward_fn=NUMERIC)


def test_score_column_must_hold_numbers(tmp_path: Path) -> None:
    """A score that is text or absent is an error with its line; null is counted."""
    rows = [{"id": 1, "score": 0.5}, {"id": 2, "score": "good"}]
    with pytest.raises(tax.UserError, match=r"after.jsonl, line 2: --score_column score: .* found 'good'"):
        compare([rows[0], {"id": 2, "score": 1}], rows, tmp_path, score_column="score")
    with pytest.raises(tax.UserError, match=r"before.jsonl, line 1: --score_column other: .* keys found: id, score"):
        compare(rows[:1], rows[:1], tmp_path, score_column="other")
    for value in (math.inf, -math.inf, math.nan, 10**400, [1]):
        with pytest.raises(tax.UserError, match=r"after.jsonl, line 2: --score_column score: expected a number; found"):
            compare(
                [rows[0], {"id": 2, "score": 1}], [rows[0], {"id": 2, "score": value}], tmp_path, score_column="score"
            )
    result = compare(
        [rows[0], {"id": 2, "score": None}], [rows[0], {"id": 2, "score": 1}], tmp_path, score_column="score"
    )
    assert result["responses"]["lost"]["no score"] == 1 and result["task"]["before"]["n"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "runs/ppo: no such folder"),
        ({"before": "a", "after": "b"}, "perplexity needs all of --before, --after and --text"),
        ({"text": "a.txt"}, "perplexity needs all"),
        ({"before_responses": "a.jsonl", "reward_fn": NUMERIC}, "a task needs both"),
        ({"before_responses": "a.jsonl", "after_responses": "b.jsonl"}, "--reward_fn, --score_column or"),
        ({"reward_fn": NUMERIC, "before": "a", "after": "b", "text": "c"}, "a task needs both"),
        (
            {"before_responses": "a", "after_responses": "b", "reward_fn": NUMERIC, "score_column": "c"},
            "one task at a time",
        ),
        ({"before": "a", "after": "b", "text": "c", "stride": 512}, r"--stride 512: expected 1 to --max_length - 1"),
        ({"before": "a", "after": "b", "text": "c.txt"}, "c.txt: no such file"),
        ({"before_responses": "a", "after_responses": "b", "reward_fn": "no.py:f"}, "no.py:f: no such file"),
    ],
)
def test_mistakes_are_one_line(flags: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of a comparison and wrong names are refused before a model is loaded."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tax.UserError, match=message) as error:
        tax.main(tax.Args(**flags))
    assert "\n" not in str(error.value)


def test_window_longer_than_the_model(sft_run: Path, tmp_path: Path) -> None:
    """A window that a model has no positions for is refused, by its name."""
    source = write_jsonl(tmp_path / "rows.jsonl", [{"text": "No."}])
    with pytest.raises(tax.UserError, match="--max_length 513: .*sft has 512 positions"):
        tax.main(tax.Args(before=str(sft_run), after=str(sft_run), text=str(source), max_length=513))


# -------------------------------------------------------------------------------------------------- reference metrics
METRIC = """
import datasets
import evaluate


class Overlap(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        hits = sum(word in r.split() for p, r in zip(predictions, references) for word in p.split())
        return {"precision": hits / sum(len(p.split()) for p in predictions), "list": [1]}
"""


def test_reference_metric_of_a_script(tmp_path: Path) -> None:
    """A corpus-level metric (a ratio of sums, as BLEU's precision) by the path of its script, by hand; its paired
    bootstrap agrees with scipy's; the same responses twice differ by nothing."""
    folder = tmp_path / "overlap"
    folder.mkdir()
    (folder / "overlap.py").write_text(METRIC)
    rng = np.random.default_rng(0)
    hits = rng.integers(0, 4, (2, 40))
    sides = [
        [
            {**row(i, " ".join(["yes"] * h + ["no"] * (4 - h + i % 3))), "reference": "yes or not"}
            for i, h in enumerate(side)
        ]
        for side in hits
    ]
    del sides[0][7]["reference"]
    flags: dict[str, Any] = {"reference_metric": [str(folder)], "resamples": 150}
    result = compare(sides[0], sides[1], tmp_path, **flags)
    assert result["responses"]["lost"]["no reference"] == 1
    found = result["reference"][str(folder)]
    assert list(found) == ["precision"], "numbers only"
    kept = np.arange(40) != 7
    words = (4 + np.arange(40) % 3)[kept]
    a, b = (side[kept] for side in hits)
    assert found["precision"]["before"]["mean"] == pytest.approx(a.sum() / words.sum())
    assert found["precision"]["difference"]["mean"] == pytest.approx((b.sum() - a.sum()) / words.sum())
    drawn = stats.bootstrap(
        (a, b, words), lambda a, b, w, axis: (b.sum(axis) - a.sum(axis)) / w.sum(axis), paired=True, rng=rng,
        method="percentile",
    )  # fmt: skip
    ours = found["precision"]["difference"]
    assert ours["standard_error"] == pytest.approx(drawn.standard_error, rel=0.2)
    assert (ours["ci_low"], ours["ci_high"]) == pytest.approx(drawn.confidence_interval, abs=0.02)
    flags["resamples"] = 5
    same = compare(sides[0], sides[0], tmp_path, **flags)["reference"][str(folder)]["precision"]["difference"]
    assert (same["mean"], same["ci_low"], same["ci_high"]) == (0, 0, 0)


def test_reference_metric_with_values_per_row(tmp_path: Path) -> None:
    """A metric that gives values per row, as rouge does unless it aggregates by a bootstrap of its own: by hand, with
    two samples of one question."""
    folder = tmp_path / "length"
    folder.mkdir()
    own = """use_aggregator=True):
        return {"length": 0.0 if use_aggregator else [float(len(p) - len(r)) for p, r in zip(predictions, references)]}
"""
    head, _, _ = METRIC.replace("Overlap", "Length").partition("references):\n        hits")
    (folder / "length.py").write_text(head + "references, " + own)
    before = [row(0, "abc", sample=0), row(0, "a", sample=1), row(1, "ab")]
    after = [row(1, "abcd"), row(0, "ab", sample=0), row(0, "a", sample=1)]
    flags: dict[str, Any] = {"reference_metric": [str(folder)], "reference_column": "answer"}
    found = compare(before, after, tmp_path, **flags)["reference"][str(folder)]["length"]
    assert (found["before"]["n"], found["before"]["mean"], found["after"]["mean"]) == (2, 1.0, 1.75)
    assert found["difference"]["mean"] == 0.75 and found["difference"]["standard_error"] == pytest.approx(1.25)


def test_reference_metric_that_is_not_at_hand(tmp_path: Path) -> None:
    """A name offline, a broken script, a column that is not there: one clear line."""
    rows = [row(1, reference="4"), row(2, reference="4")]
    with pytest.raises(
        tax.UserError, match="--reference_metric no_such: can't be loaded .* metric script's path"
    ) as error:
        compare(rows, rows, tmp_path, reference_metric=["no_such"])
    assert "\n" not in str(error.value)
    with pytest.raises(tax.UserError, match="no --reference_column summary; found: .*reference"):
        compare(rows, rows, tmp_path, reference_metric=["no_such"], reference_column="summary")


# ----------------------------------------------------------------------------------------------------------- coverage
@pytest.mark.slow
@pytest.mark.parametrize("what", ["ratio", "accuracy"])
def test_intervals_cover(what: str) -> None:
    """500 draws of 300 documents or questions: the 95 % intervals of the difference hold the truth in 93-97 %."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(500):
        if what == "ratio":  # documents of uneven length, and longer ones are easier: the truth is E[b - a] / E[size]
            size = rng.lognormal(4, 0.5, 300)
            a = size * (3 + rng.normal(0, 0.5, 300)) - 0.002 * size**2
            b = a + size * rng.normal(0.1, 0.3, 300) + 0.001 * size**2
            truth = 0.1 + 0.001 * math.exp(2 * 4 + 2 * 0.25) / math.exp(4 + 0.125)
            x = tax.paired_intervals(tax.ratio_values(a, size), tax.ratio_values(b, size))["difference"]
        else:
            skill = rng.beta(2, 2, 300)
            old, new = rng.random(300) < skill, rng.random(300) < 0.9 * skill
            truth, x = -0.05, tax.paired_proportions(old.astype(int), new.astype(int))["difference"]
        inside += x["ci_low"] <= truth <= x["ci_high"]
    assert 0.93 <= inside / 500 <= 0.97


def test_text_in_another_encoding_is_one_line(tmp_path: Path) -> None:
    """A .txt in latin-1: its name and what was expected."""
    (tmp_path / "old.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(tax.UserError, match="old.txt: expected UTF-8"):
        tax.read_documents(str(tmp_path / "old.txt"), Counter())
