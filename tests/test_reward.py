"""reward.py: its maths against tests/reference_reward.py, its data, and what must not change a run's result."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_reward as reference
import torch
from conftest import CPU, SHARED, adapter_weights, make_adapter, read_jsonl, record, same_weights, write_jsonl
from test_run import COMMAND_FLAGS, assert_same_gradients, launch

import reward

HH = SHARED / "data" / "hh_rlhf"  # real data that does not belong to the repository
WORDS = "the otter eats fish and lives in a river with the old heron near green hills far from any town".split()
Start = Callable[..., Path]
Loaded = tuple[Any, torch.nn.Linear, Any, list[int]]


# ---------------------------------------------------------------------------------------------------- a small world
def text(rng: random.Random, n: int) -> str:
    """n random words."""
    return " ".join(rng.choice(WORDS) for _ in range(n))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs.jsonl: 40 pairs of unequal lengths, two per prompt; ranks.jsonl: 12 prompts with 2 to 5 responses."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    pairs, ranked = [], []
    for i in range(40):
        answers = [text(rng, rng.randint(1, 12)) + f" {k}" for k in range(2)]
        prompt = f"{text(random.Random(i // 2), 1 + i // 2 % 9)} {i // 2}?"
        pairs.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "subset": "ab"[i % 2]})
    for i in range(12):
        k = rng.randint(2, 5)
        ranks = [1, 2, *(rng.randint(1, 3) for _ in range(k - 2))]
        answers = [text(rng, rng.randint(1, 12)) for _ in range(k)]
        ranked.append({"prompt": f"{text(rng, 3)} {i}?", "responses": answers, "ranks": ranks})
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "ranks.jsonl", ranked)
    return folder


@pytest.fixture
def run(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """run(**flags) -> run folder: reward.main, two steps of 8 prompts of pairs.jsonl unless told otherwise."""
    drawn = reward.Run.plot_curves

    def start(plot: bool = False, **flags: Any) -> Path:
        monkeypatch.setattr(reward.Run, "plot_curves", drawn if plot else lambda *_: None)
        settings: dict[str, Any] = {
            "model": str(base), "dataset": str(data / "pairs.jsonl"), "output_dir": str(tmp_path / "run"),
            "lora_r": 4, "batch_size": 8, "tokens_per_batch": 128, "max_steps": 2, "eval_size": 0.2,
            "learning_rate": 1e-3,
        }  # fmt: skip
        settings |= flags
        reward.main(reward.Args(**settings))
        return Path(settings["output_dir"])

    return start


@pytest.fixture(scope="session")
def loaded(base: Path) -> Loaded:
    """(model with a "reward" adapter whose B is not zero, head, tokenizer, stop ids)."""
    model, tokenizer = make_adapter(base, "reward", seed=1, size=0.1)
    return model, torch.nn.Linear(64, 1, bias=False), tokenizer, [tokenizer.eos_token_id]


def encode(row: dict, loaded: Loaded, max_prompt_length: int = 512, max_response_length: int = 512) -> dict:
    """The example of one row."""
    _, _, tokenizer, stop_ids = loaded
    args = reward.Args(max_prompt_length=max_prompt_length, max_response_length=max_response_length)
    (example,) = reward.encode_comparison(row, tokenizer, stop_ids, args)
    return example


def random_groups(seed: int, n: int, margin: float = 0.0) -> list[dict]:
    """n prompts with 2 to 6 scores, ranks with ties, texts of random length; never all tied."""
    rng = random.Random(seed)
    groups: list[dict] = []
    while len(groups) < n:
        k = rng.randint(2, 6)
        group: dict = {
            "ranks": [rng.randint(1, k) for _ in range(k)],
            "texts": ["x" * rng.randint(1, 50) for _ in range(k)],
        }
        group |= {"margin": margin * rng.random(), "scores": [rng.gauss(0, 3) for _ in range(k)]}
        if len(set(group["ranks"])) > 1:
            groups.append(group)
    return groups


def compared(groups: list[dict]) -> tuple[torch.Tensor, reward.Comparisons]:
    """(scores, comparisons) in float64."""
    pairs = reward.compare(groups, CPU)
    pairs = reward.Comparisons(*(t.double() if t.is_floating_point() else t for t in pairs))
    return torch.tensor([s for g in groups for s in g["scores"]], dtype=torch.float64), pairs


# ---------------------------------------------------------------------------------------------------------- the maths
@pytest.mark.parametrize("seed", range(5))
def test_losses_equal_the_reference_on_ragged_groups_with_ties(seed: int) -> None:
    """Both losses with margin, smoothing and centring, summed over prompts."""
    groups = random_groups(seed, 7, margin=2.0)
    scores, pairs = compared(groups)
    args = reward.Args(label_smoothing=0.1, center_coef=0.3)
    expected = sum(
        reference.pairwise(g["scores"], g["ranks"], g["margin"], 0.1) + 0.3 * reference.centre(g["scores"], g["ranks"])
        for g in groups
    )
    assert reward.reward_loss(scores, pairs, args).item() == pytest.approx(expected, rel=1e-6)  # float32 weights
    args = reward.Args(loss="plackett_luce", center_coef=0.0)
    expected = sum(reference.listwise(g["scores"], g["ranks"]) for g in groups)
    assert reward.reward_loss(scores, pairs, args).item() == pytest.approx(expected, rel=1e-12)


def test_numbers_worked_by_hand() -> None:
    """Odds that come out even."""
    # sigma(log 3) = 3/4. Smoothing 0.2: 0.8 log(4/3) + 0.2 log 4. A margin of log 3 leaves a difference of 0.
    chosen, rejected, zero = torch.tensor([math.log(3.0)]), torch.tensor([0.0]), torch.tensor([0.0])
    loss = reward.bradley_terry_loss
    assert loss(chosen, rejected, zero, 0.0).item() == pytest.approx(math.log(4 / 3))
    smoothed = 0.8 * math.log(4 / 3) + 0.2 * math.log(4)
    assert loss(chosen, rejected, zero, 0.2).item() == pytest.approx(smoothed, rel=1e-6)
    assert loss(chosen, rejected, chosen, 0.0).item() == pytest.approx(math.log(2))
    # strengths 3, 2, 1: P(1st, 2nd, 3rd) = 3/6 * 2/3; with the last two tied: 3/6 * 2/3 * 1/3
    scores, prompt = torch.tensor([3.0, 2.0, 1.0]).log(), torch.zeros(3)
    total = reward.plackett_luce_loss(scores, torch.tensor([1, 2, 3]), prompt).sum()
    assert total.item() == pytest.approx(math.log(3), rel=1e-6)
    total = reward.plackett_luce_loss(scores, torch.tensor([1, 2, 2]), prompt).sum()
    assert total.item() == pytest.approx(math.log(9), rel=1e-6)


def test_plackett_luce_of_two_is_bradley_terry() -> None:
    """The docstring's claim."""
    for group in random_groups(3, 20):
        two = {**group, "scores": group["scores"][:2], "ranks": [2, 1], "texts": group["texts"][:2], "margin": 0.0}
        scores, pairs = compared([two])
        a, b = (reward.Args(loss=name) for name in ("plackett_luce", "bradley_terry"))
        loss = reward.reward_loss(scores, pairs, a).item()
        assert loss == pytest.approx(reward.reward_loss(scores, pairs, b).item(), rel=1e-12)


@pytest.mark.parametrize(("share", "n"), [(0.5, 10), (0.46125, 400), (0.99, 100), (1.0, 7), (0.0, 30)])
def test_wilson_interval_solves_its_equation(share: float, n: int) -> None:
    """Its ends, found by bisection."""
    assert reward.wilson_interval(share, n) == pytest.approx(reference.wilson(share, n), abs=1e-9)


def test_swapping_chosen_and_rejected_mirrors_the_accuracy() -> None:
    """Shares add up to 1, ties included."""
    groups = [{**g, "ranks": [1, 2], "texts": g["texts"][:2], "scores": g["scores"][:2]} for g in random_groups(7, 30)]
    groups[0]["scores"] = [1.0, 1.0]  # a tie is half a win either way
    both = [compared([{**g, "ranks": ranks} for g in groups]) for ranks in ([1, 2], [2, 1])]
    won = [reward.pair_sums(*x)[0].item() / 30 for x in both]
    assert won[0] + won[1] == pytest.approx(1) and 0 < won[0] < 1
    rows = [{"chosen_score": g["scores"][0], "rejected_score": g["scores"][1]} for g in groups]
    swapped = [{"chosen_score": r["rejected_score"], "rejected_score": r["chosen_score"]} for r in rows]
    assert reward.share_won(rows, "score") == pytest.approx(won[0])
    assert reward.share_won(swapped, "score") == pytest.approx(won[1])


# --------------------------------------------------------------------------------------------------- the forward pass
def test_flat_rows_score_like_one_response_per_row(loaded: Loaded, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However prompts share rows, and where they can't: each score is that of its prompt and response alone."""
    model, head, _, _ = loaded
    examples = [encode(row, loaded) for row in read_jsonl(data / "ranks.jsonl")]
    alone = []
    with reward.role(model, "reward"):
        for prompt, responses in (e["group"] for e in examples):
            for response in responses:
                states = model.get_base_model().model(torch.tensor([prompt + response])).last_hidden_state
                alone.append(head(states[0, -1]).item())
    passes = record(monkeypatch, reward, "preference_passes")
    for limit in (10**6, 100, 1):
        scores = reward.score_all(model, head, examples, reward.Args(tokens_per_batch=limit))
        assert [len(values) for values in scores] == [len(e["texts"]) for e in examples]
        assert sum(scores, []) == pytest.approx(alone, abs=1e-5)
    monkeypatch.setattr(reward, "FLAT_ROW_MODELS", ())
    scores = reward.score_all(model, head, examples, reward.Args(tokens_per_batch=100))
    assert sum(scores, []) == pytest.approx(alone, abs=1e-5)
    counts = [[len(rows) for _, rows in found] for _, found in passes]
    assert counts[0] == [1] and counts[2] == [1] * 12 and 1 < len(counts[1]) < 12
    assert counts[3] == [len(e["texts"]) for e in examples]  # a prompt's rows stay together: the loss needs all


def test_the_score_is_read_off_the_end_token(loaded: Loaded) -> None:
    """The end token is part of the response, and its state is what the head sees."""
    model, head, _, stop_ids = loaded
    example = encode({"prompt": "what?", "chosen": "the otter", "rejected": "a"}, loaded)
    prompt, responses = example["group"]
    assert all(response[-1] in stop_ids for response in responses)
    with reward.role(model, "reward"):
        states = model.get_base_model().model(torch.tensor([prompt + responses[0]])).last_hidden_state
    ((score, _),) = reward.score_all(model, head, [example], reward.Args(tokens_per_batch=100))
    assert score == pytest.approx((states[0, -1] @ head.weight[0]).item(), abs=1e-5)


def gradients_of(run: Start, patch: pytest.MonkeyPatch, **flags: Any) -> tuple[list[torch.Tensor], dict]:
    """Gradients and metrics of the first step."""
    found: list[torch.Tensor] = []
    original = reward.Run.clip_gradients

    def recorded(self: reward.Run, optimizer: Any, *rest: Any) -> float:
        found.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])
        return original(self, optimizer, *rest)

    with patch.context() as inside:
        inside.setattr(reward.Run, "clip_gradients", recorded)
        folder = run(max_steps=1, **flags)
    return found, read_jsonl(folder / "metrics.jsonl")[0]


def test_recomputing_activations_changes_nothing(run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """--gradient_checkpointing costs time only: the same gradients to the last bit."""
    results = [gradients_of(run, monkeypatch, gradient_checkpointing=flag) for flag in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_rows_do_not_change_the_gradient(run: Start, data: Path, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    """All prompts in one row, one prompt in each, something in between, one response in each: one gradient."""
    flags = {"dataset": str(data / "ranks.jsonl"), "loss": loss, "center_coef": 0.1}
    passes = record(monkeypatch, reward, "preference_passes")
    whole = gradients_of(run, monkeypatch, tokens_per_batch=4000, **flags)
    others = [gradients_of(run, monkeypatch, tokens_per_batch=n, **flags) for n in (1, 150)]
    with monkeypatch.context() as inside:
        inside.setattr(reward, "FLAT_ROW_MODELS", ())
        others.append(gradients_of(run, inside, **flags))
    sizes = [len(found) for (examples, *_), found in passes if len(examples) == 8]
    assert sizes[0] == 1 and 8 in sizes and any(1 < n < 8 for n in sizes)
    assert any(g.abs().max() > 1e-3 for g in whole[0])
    for gradients, metrics in others:
        assert_same_gradients(gradients, whole[0])
        assert metrics == pytest.approx(whole[1], rel=1e-4, abs=1e-6)


def test_a_ranking_has_the_mean_gradient_of_its_pairs(
    run: Start, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """InstructGPT's 1 / C(K, 2): K responses in one pass are the mean of all their pairs."""
    answers = ["the otter", "fish and hills", "a far river", "old"]
    row = {"prompt": "what?", "responses": answers, "ranks": [2, 1, 2, 4]}
    pairs = [(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)]  # 0 and 2 tie
    rows = [{"prompt": "what?", "chosen": answers[i], "rejected": answers[j]} for i, j in pairs]
    one, many = write_jsonl(tmp_path / "k.jsonl", [row]), write_jsonl(tmp_path / "p.jsonl", rows)
    flags = {"eval_dataset": str(data / "pairs.jsonl")}
    ranking, _ = gradients_of(run, monkeypatch, dataset=str(one), batch_size=1, **flags)
    mean, _ = gradients_of(run, monkeypatch, dataset=str(many), batch_size=5, **flags)
    assert_same_gradients(ranking, mean)


# ----------------------------------------------------------------------------------------------------------- the data
WHAT, FISH, TOWN = ({"role": role, "content": content} for role, content in
                    (("user", "what?"), ("assistant", "fish"), ("assistant", "a town")))  # fmt: skip
MORE = [{"role": "user", "content": "and then?"}, {"role": "assistant", "content": "nothing"}]


def test_all_column_sets_give_the_same_pair(loaded: Loaded) -> None:
    """Strings, message lists, whole dialogues of both forms, a prompt beside them, a ranking."""
    rows: list[dict] = [
        {"prompt": "what?", "chosen": "fish", "rejected": "a town"},
        {"prompt": [WHAT], "chosen": [FISH], "rejected": [TOWN]},
        {"prompt": "what?", "chosen": [FISH], "rejected": [TOWN]},
        {"prompt": "what?", "chosen": [WHAT, FISH], "rejected": [WHAT, TOWN]},
        {"prompt": [WHAT], "chosen": [WHAT, FISH], "rejected": [WHAT, TOWN]},
        {"prompt": None, "chosen": [WHAT, FISH], "rejected": [WHAT, TOWN]},
        {"chosen": "\n\nHuman: what?\n\nAssistant: fish", "rejected": "\n\nHuman: what?\n\nAssistant: a town"},
        {"prompt": "what?", "responses": ["fish", "a town"], "ranks": [1, 2]},
    ]
    examples = [encode(row, loaded) for row in rows]
    for name in ("group", "key", "length", "prompt", "texts", "ranks"):
        assert all(e[name] == examples[0][name] for e in examples)
    assert examples[0]["texts"] == ["fish", "a town"] and examples[0]["ranks"] == [1, 2]
    tokenizer = loaded[2]
    prompt, responses = examples[0]["group"]
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template([WHAT], tokenize=False, add_generation_prompt=True)
    assert [tokenizer.decode(y) for y in responses] == [x + tokenizer.eos_token for x in ("fish", "a town")]


def test_history_is_kept(loaded: Loaded) -> None:
    """All turns but the last are the prompt, wherever they stand and whichever of them `prompt` names."""
    before = [WHAT, FISH]
    sides = {"chosen": [*before, *MORE], "rejected": [*before, MORE[0], TOWN]}
    rows: list[dict] = [
        sides,
        {**sides, "prompt": "what?"},
        {**sides, "prompt": "and then?"},
        {**sides, "prompt": before},
        {"prompt": [*before, MORE[0]], "chosen": "nothing", "rejected": "a town"},
        {"prompt": "what?", "chosen": [FISH, *MORE], "rejected": [FISH, MORE[0], TOWN]},
        {"chosen": "\n\nHuman: what?\n\nAssistant: fish\n\nHuman: and then?\n\nAssistant: nothing",
         "rejected": "\n\nHuman: what?\n\nAssistant: fish\n\nHuman: and then?\n\nAssistant: a town"},
    ]  # fmt: skip
    examples = [encode(row, loaded) for row in rows]
    assert all(e["group"] == examples[0]["group"] and e["prompt"] == [*before, MORE[0]] for e in examples)
    assert all(part in loaded[2].decode(examples[0]["group"][0]) for part in ("what?", "fish", "and then?"))


def test_a_system_column_comes_first(loaded: Loaded) -> None:
    """A `system` column is the system message, in each form; prompts under other ones are held out together."""
    system = {"role": "system", "content": "Be brief."}
    rows: list[dict] = [
        {"prompt": [system, WHAT], "chosen": "fish", "rejected": "a town"},
        {"system": "Be brief.", "prompt": "what?", "chosen": "fish", "rejected": "a town"},
        {"system": "Be brief.", "chosen": [WHAT, FISH], "rejected": [WHAT, TOWN]},
        {"system": "Be brief.", "prompt": "what?", "chosen": [WHAT, FISH], "rejected": [WHAT, TOWN]},
        {"system": "Be brief.", "prompt": "what?", "responses": ["fish", "a town"], "ranks": [1, 2]},
    ]
    examples = [encode(row, loaded) for row in rows]
    assert all(e["group"] == examples[0]["group"] and e["prompt"] == [system, WHAT] for e in examples)
    assert "Be brief." in loaded[2].decode(examples[0]["group"][0])
    assert examples[0]["key"] == encode({"chosen": [WHAT, FISH], "rejected": [WHAT, TOWN]}, loaded)["key"]


ABC = {"prompt": "a", "chosen": "b", "rejected": "c"}
OTHER = "neither goes on from `prompt` nor has it in it"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ABC, "rejected": "b"}, "identical pair"),
        ({"chosen": [WHAT, FISH], "rejected": [WHAT, FISH]}, "identical pair"),
        ({**ABC, "rejected": " "}, "without text"),
        ({**ABC, "prompt": ""}, "without text"),
        ({**ABC, "prompt": []}, "neither a string nor a message list"),
        ({**ABC, "rejected": 3}, "neither a string nor a message list"),
        ({**ABC, "prompt": None}, "no dialogue"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"}, "differing prompts"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}, "without text"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "ends with an assistant turn"),
        ({"chosen": [WHAT, FISH, MORE[0]], "rejected": [WHAT, TOWN]}, "ends with an assistant turn"),
        ({"chosen": [WHAT, FISH, *MORE], "rejected": [WHAT, TOWN]}, "differing prompts"),
        ({"prompt": "a", "chosen": [WHAT, FISH], "rejected": [WHAT, TOWN]}, OTHER),
        ({"prompt": "fish", "chosen": [WHAT, FISH], "rejected": [WHAT, TOWN]}, OTHER),
        ({"prompt": [MORE[0]], "chosen": [WHAT, FISH], "rejected": [WHAT, TOWN]}, OTHER),
        ({"prompt": "what?", "chosen": [WHAT, FISH], "rejected": [MORE[0], TOWN]}, OTHER),
        ({"prompt": "what?", "chosen": [WHAT, FISH, *MORE], "rejected": [WHAT, TOWN, *MORE]}, "differing prompts"),
        ({"prompt": "what?", "chosen": "\n\nHuman: what?\n\nAssistant: b", "rejected": "c"}, "a turn inside the text"),
        ({"chosen": [FISH], "rejected": [TOWN]}, "an assistant turn comes first"),
        ({**ABC, "tools": [{"type": "function"}]}, "tools"),
        ({**ABC, "margin": "big"}, "no number"),
        ({**ABC, "margin": math.nan}, "no number"),
        ({**ABC, "margin": -math.inf}, "no number"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}, "no response is ranked above"),
        ({"prompt": "a", "responses": ["b"], "ranks": [1]}, "no response is ranked above"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1]}, "no lists of one length"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": ["1", "2"]}, "no number"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, math.nan]}, "no number"),
        ({"prompt": "a", "responses": "bc", "ranks": [1, 2]}, "no lists of one length"),
        ({"prompt": "a", "responses": ["b", 3], "ranks": [1, 2]}, "without text"),
        ({**ABC, "prompt": "otter " * 40}, "over 30"),
        ({**ABC, "rejected": "otter " * 40}, "over 20"),
    ],
)
def test_bad_rows_say_why(loaded: Loaded, row: dict, reason: str) -> None:
    """Each way in which a row may be wrong."""
    with pytest.raises(reward.BadRow) as error:
        encode(row, loaded, max_prompt_length=30, max_response_length=20)
    assert reason in " ".join(error.value.args)


def test_a_prompt_that_depends_on_the_response_is_no_group(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses share the ids of their prompt; where a template or tokenizer gives them other ones, the row is bad."""

    def depends(tokenizer: Any, messages: list[dict], *_: Any, **__: Any) -> list[tuple[list[int], list[int]]]:
        return [([len(messages[-1]["content"]), 5], [0, 1])]

    monkeypatch.setattr(reward, "encode_conversation", depends)
    assert encode({"prompt": "a", "chosen": "b", "rejected": "c"}, loaded)["group"] == ([1], [[5], [5]])
    with pytest.raises(reward.BadRow, match="the prompt depends on the response"):
        encode({"prompt": "a", "chosen": "b", "rejected": "long"}, loaded)


@pytest.mark.skipif(not HH.is_dir(), reason="the real pairs are not part of the repository")
def test_awkward_real_pairs_are_counted_by_reason(run: Start) -> None:
    """Identical pairs, differing prompts, empty replies: each counted under its reason."""
    source = HH / "awkward_pairs_dev.jsonl"
    kinds = [row["kind"] for row in read_jsonl(source)]
    with pytest.raises(reward.UserError) as error:
        run(dataset=str(source), max_prompt_length=10**6, max_response_length=10**6)
    assert f"no usable row of {len(kinds)}" in str(error.value)
    reasons = ("identical", "identical pair"), ("empty", "a message without text"), ("prompt", "pair with differing")
    for kind, reason in reasons:
        assert f"{sum(kind in k for k in kinds)} {reason}" in str(error.value)


@pytest.mark.skipif(not HH.is_dir(), reason="the real pairs are not part of the repository")
@pytest.mark.parametrize("name", ["helpful_base", "harmless_base"])
def test_length_rule_on_real_pairs_is_the_published_number(name: str, loaded: Loaded) -> None:
    """hh-rlhf's samples are read whole, and the rule "longer wins" scores what it should."""
    expected = json.loads((HH.parent / "expected_dev.json").read_text())["hh_rlhf"][name]["length_only_chars"]
    rows = []
    for row in read_jsonl(HH / f"{name}_test_dev.jsonl"):
        texts = [turns[-1]["content"] for turns in reward.read_pair(row, loaded[2])]
        rows.append({"chosen_length": len(texts[0]), "rejected_length": len(texts[1])})
    share = reward.share_won(rows, "length")
    assert share == pytest.approx(expected["accuracy_ties_half"], abs=1e-9)
    assert reward.wilson_interval(share, len(rows)) == pytest.approx(expected["wilson95"], abs=1e-4)


def test_missing_columns_name_what_was_found_and_expected(run: Start, tmp_path: Path) -> None:
    """One line with both."""
    file = write_jsonl(tmp_path / "unpaired.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(reward.UserError) as error:
        run(dataset=str(file))
    assert "found prompt, completion, label" in str(error.value)
    assert "prompt + chosen + rejected | chosen + rejected | prompt + responses + ranks" in str(error.value)


def test_prompts_are_held_out_whole(run: Start, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pairs of a prompt are on one side, also where all prompts share a system message."""
    rows = [{**row, "system": "Be brief."} for row in read_jsonl(data / "pairs.jsonl")]
    seen = record(monkeypatch, reward, "load_data")
    run(dataset=str(write_jsonl(data / "system.jsonl", rows)), eval_size=0.25, max_steps=1)
    train, heldout = seen[0][1]
    assert len(train) == 30 and len(heldout) == 10
    assert (
        len(set(train["key"])) == 15 and len(set(heldout["key"])) == 5 and not set(train["key"]) & set(heldout["key"])
    )


def test_a_contradicting_flag_is_an_error(run: Start, base: Path, data: Path) -> None:
    """Flags that can't go together, a text longer than the model can place, a model that is not there: one line."""
    with pytest.raises(reward.UserError, match="label_smoothing"):
        run(loss="plackett_luce", label_smoothing=0.1)
    with pytest.raises(reward.UserError, match="lora_r 0"):
        run(lora_r=0)
    long = write_jsonl(data / "long.jsonl", [{"prompt": "a", "chosen": "otter " * 600, "rejected": "b"}] * 2)
    with pytest.raises(reward.UserError, match="the model has 512 positions"):
        run(dataset=str(long), max_response_length=10**4, eval_size=0)
    with pytest.raises(reward.UserError, match="the model has 512 positions"):
        run(eval_dataset=str(long), max_response_length=10**4)
    with pytest.raises(reward.UserError, match="nowhere"):
        run(model=str(base / "nowhere"))


# ------------------------------------------------------------------------------------------------------------ the run
def plain_scores(folder: Path, base: Path, texts: list, dtype: Any = torch.float32, **options: Any) -> list[float]:
    """Raw scores by transformers and peft alone, one row at a time: the lines that the README shows."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype, **options)
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    for module in model.modules():  # as load_base does: else some CPUs compute 4-bit layers by another kernel
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    scores = []
    for prompt, response in texts:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
        ids = ids[:, : (ids[0] == tokenizer.eos_token_id).nonzero()[-1, 0] + 1]  # the template ends with a newline
        with torch.no_grad():
            scores.append(model(ids).logits.item())
    return scores


def test_a_finished_folder_loads_with_transformers_and_peft_alone(run: Start, base: Path, capsys: Any) -> None:
    """Raw score = ours + the mean of reward.json; sd 1 on what was normalised on; the table is that of the samples."""
    folder = run(plot=True, learning_rate=3e-3, epochs=2)
    card, rows = json.loads((folder / "reward.json").read_text()), read_jsonl(folder / "samples.jsonl")
    raw = plain_scores(folder, base, [(row["prompt"], row["chosen"]) for row in rows])
    assert raw == pytest.approx([row["chosen_score"] + card["mean"] for row in rows], abs=1e-5)

    # the scores of what was normalised on have mean 0 and sd 1
    args = json.loads((folder / "args.json").read_text())
    assert card.keys() == {"mean", "sd", "n", "quant", "dtype", "normalized_on"}
    assert card["normalized_on"] == "best training responses" and (card["quant"], card["dtype"]) == ("none", "float32")
    heldout = {row["prompt"] for row in rows}
    best = [(r["prompt"], r["chosen"]) for r in read_jsonl(Path(args["dataset"])) if r["prompt"] not in heldout]
    scores = np.array(plain_scores(folder, base, best)) - card["mean"]
    assert card["n"] == len(best) == 32 and abs(scores.mean()) < 1e-5 and abs(scores.std() - 1) < 1e-5

    # result.json, what is printed and the samples tell the same story
    result, printed = json.loads((folder / "result.json").read_text()), capsys.readouterr().out
    accuracy, longer = reward.share_won(rows, "score"), reward.share_won(rows, "length")
    assert result["stage"] == "reward" and result["base"] == str(base) and result["pairs"] == len(rows) == 8
    assert [result["accuracy_low"], result["accuracy_high"]] == pytest.approx(reference.wilson(accuracy, 8), abs=1e-6)
    assert result["beats_length"] == pytest.approx(accuracy - max(longer, 1 - longer))
    assert result["subsets"].keys() == {"a", "b", "all"} and result["subsets"]["all"]["accuracy"] == accuracy
    for name in ("a", "b"):
        part = [row for row in rows if row["subset"] == name]
        assert result["subsets"][name]["accuracy"] == pytest.approx(reward.share_won(part, "score"))
        assert result["subsets"][name]["longer_wins"] == pytest.approx(reward.share_won(part, "length"))
    assert all(f"\n{name:20}" in printed for name in ("a", "b", "all"))
    keys = {"id", "prompt", "chosen", "rejected", "subset", "step"}
    keys |= {f"{side}_{what}" for side in ("chosen", "rejected") for what in ("score", "length")}
    assert all(row.keys() == keys and row["step"] == 2 for row in rows)
    names = "adapter_config.json adapter_model.safetensors tokenizer.json tokenizer_config.json chat_template.jinja"
    names += " generation_config.json args.json metrics.jsonl timing.jsonl samples.jsonl curves.png result.json"
    assert {path.name for path in folder.iterdir()} == {*names.split(), "reward.json", "checkpoint.pt"}


def test_four_bits_load_with_transformers_and_peft_alone(run: Start, base: Path) -> None:
    """The same from a 4-bit base, as far as bf16 goes."""
    from transformers import BitsAndBytesConfig

    folder = run(quant="nf4")
    card, rows = json.loads((folder / "reward.json").read_text()), read_jsonl(folder / "samples.jsonl")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["score"],
    )  # fmt: skip
    texts = [(row["prompt"], row["chosen"]) for row in rows]
    raw = plain_scores(folder, base, texts, torch.bfloat16, quantization_config=config)
    assert (card["quant"], card["dtype"]) == ("nf4", "bfloat16")
    ours = [row["chosen_score"] + card["mean"] for row in rows]
    assert raw == pytest.approx(ours, rel=2**-7, abs=5e-3)  # plain loading answers in bf16, whose steps are 2**-7 wide


def test_without_held_out_pairs(run: Start) -> None:
    """No samples, no table; the reward model itself is there."""
    folder = run(eval_size=0)
    assert (folder / "reward.json").is_file() and not (folder / "samples.jsonl").exists()
    assert "accuracy" not in json.loads((folder / "result.json").read_text())
    assert "heldout_accuracy" not in read_jsonl(folder / "metrics.jsonl")[-1]


def test_normalised_on_demonstrations(run: Start, base: Path, world: Path) -> None:
    """--normalize_dataset: its last assistant turns have mean 0 and sd 1."""
    folder = run(normalize_dataset=str(world / "sft.jsonl"))
    card = json.loads((folder / "reward.json").read_text())
    talks = [row["messages"] for row in read_jsonl(world / "sft.jsonl")]
    raw = np.array(plain_scores(folder, base, [(talk[0]["content"], talk[1]["content"]) for talk in talks]))
    assert (card["n"], card["normalized_on"]) == (24, "sft.jsonl")
    assert raw.mean() == pytest.approx(card["mean"], abs=1e-5) and raw.std() == pytest.approx(1, abs=1e-5)


def test_the_adapter_starts_as_a_copy_of_the_sft_adapter(run: Start, sft_run: Path) -> None:
    """At learning rate 0 the adapter is the SFT adapter's, and the head's length is Stiennon's."""
    folder = run(model=str(sft_run), lora_r=None, learning_rate=0.0)
    before, after = adapter_weights(sft_run), adapter_weights(folder)
    head = after.pop(reward.HEAD_KEY) * json.loads((folder / "reward.json").read_text())["sd"]
    assert head.shape == (1, 64) and 0.7 < head.std() * math.sqrt(65) < 1.3
    assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    run: Start, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the third of four steps: the same bytes at the end."""
    flags = {"quant": quant, "max_steps": 4, "save_every": 2, "eval_every": 3}
    whole, folder = run(**flags, output_dir=str(tmp_path / "whole")), tmp_path / "run"
    original = reward.Run.clip_gradients

    def killed(self: reward.Run, *given: Any) -> float:
        if self.step == 3:
            raise KeyboardInterrupt
        return original(self, *given)

    with monkeypatch.context() as inside:
        inside.setattr(reward.Run, "clip_gradients", killed)
        with pytest.raises(KeyboardInterrupt):
            run(**flags)
    run(**flags, resume=True)
    for name in ("reward.json", "samples.jsonl", "metrics.jsonl", "result.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert same_weights(folder, whole)
    rows = read_jsonl(folder / "metrics.jsonl")
    assert ["heldout_accuracy" in row for row in rows] == [False, False, True, True]
    run(**flags, resume=True)  # finished already: the result is written again
    assert (
        same_weights(folder, whole)
        and (folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    )


def test_rankings_train(run: Start, data: Path) -> None:
    """K-wise rows from data to table: every pair of a prompt has an id of its own."""
    folder = run(dataset=str(data / "ranks.jsonl"), loss="plackett_luce")
    for metrics in read_jsonl(folder / "metrics.jsonl"):
        assert 0 <= metrics["accuracy"] <= 1 and math.isfinite(metrics["loss"])
    rows = read_jsonl(folder / "samples.jsonl")
    assert len({row["id"] for row in rows}) == len(rows) > 3


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [8, 1])
def test_two_processes_equal_one(batch_size: int, base: Path, data: Path, tmp_path: Path) -> None:
    """Sums over processes, also where one has no prompt of the batch; both report once."""
    flags = {**COMMAND_FLAGS, "dataset": data / "ranks.jsonl", "model": base, "max_steps": 3}
    one, two = (launch(n, tmp_path / str(n), {**flags, "batch_size": batch_size}, "reward.py") for n in (1, 2))
    rows = [read_jsonl(folder / "metrics.jsonl") for folder in (two, one)]
    assert len(rows[1]) == 3
    for ours, theirs in zip(*rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    scores = [[row["chosen_score"] for row in read_jsonl(folder / "samples.jsonl")] for folder in (two, one)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
