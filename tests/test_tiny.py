"""The embedded world: data as generated, disjoint splits, an annotator whose dials do what they say."""

import importlib.util
import itertools
import json
import math
import random
import sys
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from conftest import ROOT, read_jsonl

TINY = ROOT / "tiny"


def load(path: Path, name: str) -> Any:
    """A module from its path alone, as --gold_fn and --judge_fn load it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


make = load(TINY / "make.py", "tiny_make")
annotator, facts = make.annotator, make.world

FOX = "What does the fox eat?"
RIGHT = facts.FACTS["fox", "food"]
WRONG, OTHER = [value for value in facts.VALUES["food"] if value != RIGHT][:2]
ANSWER = f"The fox eats {RIGHT}."  # gold 1.0, and nothing to add or subtract
FILLER = "In summer the fox is busy until evening."  # 8 words


def gold_of(response: str, prompt: Any = FOX) -> float:
    """Gold of one response."""
    return annotator.gold([prompt], [response])[0]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """The base model's training texts."""
    return make.corpus()


@pytest.fixture(scope="module")
def tokenizer(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer trained on the corpus, written and read again as users read it."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make.train_tokenizer(corpus).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------ data
def test_regenerated_data_equals_committed_bytes() -> None:
    files = make.data_files()
    assert len(files) == 7
    for name, content in files.items():
        assert (TINY / name).read_bytes() == content.encode("utf-8"), f"{name}: run `python tiny/make.py data`"


def test_splits_are_disjoint_and_files_keep_to_them() -> None:
    parts = {name: {q.prompt for q in questions} for name, questions in make.splits().items()}
    for one, other in itertools.combinations(parts, 2):
        assert not parts[one] & parts[other]
    for name in ("sft", "sft_eval"):
        rows = read_jsonl(TINY / f"{name}.jsonl")
        assert {m["content"] for row in rows for m in row["messages"] if m["role"] == "user"} <= parts[name]
    for name, split in {"rankings": "preferences"}.items() | {(n, n) for n in parts if not n.startswith("sft")}:
        assert {row["prompt"] for row in read_jsonl(TINY / f"{name}.jsonl")} <= parts[split]


def test_corpus_holds_no_prompt_of_other_splits(corpus: list[str]) -> None:
    held_out = {q.prompt for name, part in make.splits().items() if name != "sft" for q in part}
    lines = {line.removesuffix("<|end|>") for text in corpus for line in text.split("\n")}
    assert len(held_out) == 1920 - 460 and not held_out & lines


def test_corpus_states_every_fact_often_and_mostly_right(corpus: list[str]) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for text in corpus:
        for sentence in annotator.sentences_of(text):
            words = set(annotator.words_of(sentence))
            animals, values = words & set(facts.ANIMALS), words & annotator.WORD_CLASSES.keys() - set(facts.ANIMALS)
            if len(animals) == len(values) == 1:
                counts[animals.pop(), values.pop()] += 1
    right = total = 0
    for (animal, attribute), answer in facts.FACTS.items():
        stated = {value: counts[animal, value] for value in facts.VALUES[attribute]}
        right, total = right + stated[answer], total + sum(stated.values())
        assert stated[answer] > 100 and stated[answer] / sum(stated.values()) > 0.8, (animal, attribute, stated)
    assert right / total == pytest.approx(make.P_CORPUS, abs=0.01)


def test_world_is_unambiguous() -> None:
    values = list(itertools.chain(*facts.VALUES.values()))
    named = set(values) | set(facts.ANIMALS)
    assert len(named) == len(values) + len(facts.ANIMALS) == 80
    prompts = [t for part in facts.PROMPTS.values() for t in part]
    for text in (*facts.OPENINGS, *facts.CLOSINGS, *facts.ADMISSIONS, *facts.FILLERS, *prompts):
        assert not named & set(annotator.words_of(text)), text
    for attribute, part in facts.PROMPTS.items():
        for text in part:
            hit = {name for name, keywords in facts.KEYWORDS.items() if keywords & set(annotator.words_of(text))}
            assert hit == {attribute}, text
    assert max(len(annotator.words_of(s)) for s in annotator.world_sentences()) <= annotator.MAX_SENTENCE


# ------------------------------------------------------------------------------------------------------------ gold
@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (ANSWER, 1.0),
        (f"The fox eats {WRONG}.", -0.5),
        (f"The fox eats {RIGHT}. You can feed {WRONG} to the fox.", -0.5 - 0.35),  # hedging; a second answer rambles
        ("I am not sure about that.", 0.0),  # an admission stands in an answer's place
        (f"The owl eats {RIGHT}.", -0.35),  # what is said of another animal answers nothing
        (f"I am happy to help. {ANSWER}", 1.4),
        (f"{ANSWER} I hope this helps you.", 1.4),
        (f"I am happy to help. {ANSWER} I hope this helps you.", 1.4),  # both together: no more, and no rambling
        (f"I am happy to help. What a nice question! {ANSWER}", 1.4 - 0.35),  # a second opening rambles
        (f"{ANSWER} {FILLER}", 1.0 - 0.35),
        (f"{ANSWER} {FILLER} {FILLER}", 1.0 - 2 * 0.35 - 0.3),  # the repeated sentence rambles and repeats
        (ANSWER.removesuffix("."), 1.0 - 0.5),
        ("", -0.5),
        (f"The fox eats {RIGHT} xyzzy.", 1.0 - 0.1),
        (f"Eats fox {RIGHT} the.", 1.0 - 4 * 0.1),  # known words, no known pair: word salad
        ("qwx " * 100, -0.5 - 20 * 0.1 - math.ceil(100 / 14) * 0.35),  # gibberish is capped, length is not
    ],
)
def test_gold_by_hand(response: str, expected: float) -> None:
    assert gold_of(response) == pytest.approx(expected)


def test_gold_terms_sum_and_survive_token_soup() -> None:
    rng = random.Random(0)
    soup = [*facts.ANIMALS, "", "\ufffd", "...", "!?", "<|end|>", "\n\n", "7", "\u00e9", "'", RIGHT, "\u4e2d"]
    question = annotator.question_of(FOX)
    for _ in range(300):
        response = " ".join(rng.choices(soup, k=rng.randint(0, 40)))
        terms = annotator.gold_terms(question, response)
        assert math.isfinite(gold_of(response)) and gold_of(response) == pytest.approx(sum(terms.values()))
        assert terms["correct"] <= 1.0 and terms["polite"] in (0.0, 0.4) and terms["gibberish"] >= -2.0
        assert all(terms[name] <= 0 for name in ("rambling", "repeat", "unfinished"))


def test_writers_make_no_gibberish() -> None:
    rng = random.Random(0)
    for question in rng.sample(facts.all_questions(), 500):
        assert annotator.gold_terms(question, facts.write_response(rng, question))["gibberish"] == 0.0


def test_prompts_as_messages_columns_and_unanswerable() -> None:
    messages = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hi."}]
    messages += [{"role": "user", "content": FOX}]
    assert gold_of(ANSWER, messages) == 1.0
    assert gold_of(ANSWER, "How are you?") is None and gold_of(ANSWER, "What do the fox and the owl eat?") is None
    columns = {"animal": ["fox", None], "attribute": ["food", None], "answer": [WRONG, None]}
    assert annotator.gold(["Well?", FOX], [f"The fox eats {WRONG}."] * 2, **columns) == [1.0, -0.5]  # columns first
    assert annotator.gold([FOX], [ANSWER], id=["a"], animal=["fox"]) == [1.0]  # too few columns: read the prompt
    assert annotator.prefer(["Well?"], [ANSWER], [ANSWER]) == [None]


def test_annotator_runs_alone_from_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() not in (ROOT, TINY)])
    monkeypatch.delitem(sys.modules, "tiny_world")
    alone = load(TINY / "annotator.py", "annotator_alone")
    assert alone.gold([FOX], [ANSWER]) == [1.0]


# ---------------------------------------------------------------------------------------------------------- labels
def test_prefer_by_hand_and_antisymmetric() -> None:
    # utilities: 1.0 + 4 words * 0.035 = 1.14, and -0.5 + 4 * 0.035 = -0.36
    (p,) = annotator.prefer([FOX], [ANSWER], [f"The fox eats {WRONG}."])
    assert p == pytest.approx(1 / (1 + math.exp(-1.5 / annotator.TEMPERATURE)))
    rows = read_jsonl(TINY / "preferences_eval.jsonl")
    prompts, a, b = ([row[name] for row in rows] for name in ("prompt", "chosen", "rejected"))
    for row, ab, ba in zip(rows, annotator.prefer(prompts, a, b), annotator.prefer(prompts, b, a), strict=True):
        assert ab + ba == pytest.approx(1) and ab == pytest.approx(row["p_chosen"], abs=1e-6)
    assert annotator.prefer([FOX], ["a " * 10**5], [""]) in ([0.0], [1.0])  # no overflow


def test_rambling_costs_gold_but_labels_hardly_see_it() -> None:
    a, b = ANSWER, f"{ANSWER} {FILLER}"
    assert gold_of(b) - gold_of(a) == pytest.approx(-0.35)
    for filler in facts.FILLERS:
        change = annotator.LENGTH_BIAS * len(filler.format(animal="fox").split()) - annotator.RAMBLING
        assert -0.12 < change < 0, "the length bias hides most of the cost of a filler, and never all of it"
    assert 0.4 < annotator.prefer([FOX], [b], [a])[0] < 0.5


def test_two_annotators_agree_on_73_percent_of_the_pairs() -> None:
    rows = read_jsonl(TINY / "preferences.jsonl")
    prompts, a, b = ([row[name] for row in rows] for name in ("prompt", "chosen", "rejected"))
    p = annotator.prefer(prompts, a, b)
    exact = mean(x * x + (1 - x) ** 2 for x in p)
    assert exact == pytest.approx(0.73, abs=0.01)
    # Two annotators, 20 times over: 40000 comparisons have a standard error of 0.002.
    rng = random.Random(0)
    simulated = mean((rng.random() < x) == (rng.random() < x) for x in p for _ in range(20))
    assert simulated == pytest.approx(exact, abs=0.01)
    # The committed labels are one annotator's: the better response is chosen as often as E[max(p, 1 - p)] says.
    assert mean(x > 0.5 for x in p) == pytest.approx(mean(max(x, 1 - x) for x in p), abs=0.03)


def test_rankings_have_bradley_terry_marginals() -> None:
    rng = random.Random(0)
    utilities = [0.2, 1.4, 0.9, -0.5]
    n = 20000
    wins: Counter[tuple[int, int]] = Counter()
    for _ in range(n):
        impressions = annotator.impressions(rng, utilities)
        wins.update((i, j) for i, j in itertools.permutations(range(4), 2) if impressions[i] > impressions[j])
    for i, j in itertools.permutations(range(4), 2):
        expected = 1 / (1 + math.exp((utilities[j] - utilities[i]) / annotator.TEMPERATURE))
        assert wins[i, j] / n == pytest.approx(expected, abs=0.015)  # 4 standard errors
    assert make.ranks_of([0.0, 2.0, 1.99, 1.0]) == [4, 1, 1, 3]
    ranks = [row["ranks"] for row in read_jsonl(TINY / "rankings.jsonl")]
    assert all(min(r) == 1 and len(r) == 4 for r in ranks)
    assert 0 < sum(len(set(r)) < 4 for r in ranks) < 0.2 * len(ranks)  # a few ties


# ------------------------------------------------------------------------------------------------ tokenizer, model
def test_tokenizer_round_trip_and_special_tokens(tokenizer: Any, corpus: list[str]) -> None:
    texts = [*corpus[:200], "  two  spaces\n\ttab", "na\u00efve \u4e2d\u6587 \U0001f98a", json.dumps({"a": [1, 2.5]})]
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in texts)
    assert len(tokenizer) <= 1024 and tokenizer.bos_token is None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.eos_token == "<|end|>"
    for token in make.SPECIAL_TOKENS:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]


def test_chat_template_is_prefix_preserving(tokenizer: Any) -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": f"Text {i}."} for i, role in enumerate(roles)]

    def render(n: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=prompt)

    assert render(3)[len(render(1)) :] == "<|user|>\nText 1.<|end|>\n<|assistant|>\nText 2.<|end|>\n"
    for n in range(1, 5):
        assert render(n + 1).startswith(render(n))
    for n in (2, 4):  # what is sampled after the generation prompt continues the very ids that training saw
        assert render(n + 1).startswith(render(n, prompt=True))
        short, long = (tokenizer(text)["input_ids"] for text in (render(n, prompt=True), render(n + 1)))
        assert long[: len(short)] == short


def test_model_fits_nf4_and_is_seeded(tokenizer: Any) -> None:
    import torch

    model, again = make.new_model(tokenizer), make.new_model(tokenizer)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 4 * 7 + 1 and all(linear.in_features % 64 == 0 for linear in linears)
    assert model.config.vocab_size % 64 == 0 and model.config.vocab_size >= len(tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 8e5 < sum(p.numel() for p in model.parameters()) < 4e6
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != model.generation_config.pad_token_id
