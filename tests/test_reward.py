"""reward.py: its maths against tests/reference_reward.py, its data, and what must not change a run's result."""

import dataclasses
import importlib.util
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import reference_reward as reference
import torch
from safetensors.torch import load_file

import reward

ROOT = Path(reward.__file__).resolve().parent
HH = ROOT.parent / "shared" / "data" / "hh_rlhf"  # real data that does not belong to the repository
WORDS = "the otter eats fish and lives in a river with the old heron near green hills far from any town".split()


# ---------------------------------------------------------------------------------------------------- a small world
@pytest.fixture(scope="session")
def small_base(tmp_path_factory):
    """A random Llama of 2 layers, hidden 64, with a tokenizer made as the embedded world makes its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = importlib.util.spec_from_file_location("tiny_make", ROOT / "tiny" / "make.py")
    make = importlib.util.module_from_spec(spec)
    sys.modules["tiny_make"] = make
    spec.loader.exec_module(make)
    lines = (ROOT / "tiny" / "preferences_eval.jsonl").read_text().splitlines()
    tokenizer = make.train_tokenizer([json.loads(line)["chosen"] for line in lines])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("small") / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
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
    for name, rows in (("pairs", pairs), ("ranks", ranked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(small_base, data, tmp_path):
    """run(**settings) -> the run folder; two steps on pairs.jsonl unless told otherwise."""

    def start(**settings):
        defaults = {"model": str(small_base), "dataset": str(data / "pairs.jsonl"), "output_dir": str(tmp_path / "run")}
        defaults |= {"quant": "none", "lora_r": 4, "batch_size": 8, "micro_batch_size": 4, "max_steps": 2}
        reward.main(reward.Args(**{**defaults, "eval_size": 0.2, **settings}))
        return Path(settings.get("output_dir", tmp_path / "run"))

    return start


@pytest.fixture(scope="session")
def loaded(small_base):
    """(model with a "reward" adapter whose B is not zero, head, tokenizer, stop ids)."""
    args = reward.Args(model=str(small_base), quant="none", dtype="float32", lora_r=4)
    model, tokenizer, stop_ids, adapter, _ = reward.load_model(args, torch.device("cpu"))
    model = reward.add_adapter(model, "reward", adapter, args)
    torch.manual_seed(1)
    for parameter in reward.adapter_parameters(model, "reward"):
        torch.nn.init.normal_(parameter, std=0.1)
    return model, torch.nn.Linear(64, 1, bias=False), tokenizer, stop_ids


def encode(row, loaded, **settings):
    """The examples of one row."""
    _, _, tokenizer, stop_ids = loaded
    return reward.encode_preference({"_row": 1, **row}, tokenizer, stop_ids, reward.Args(**settings))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def random_groups(seed, n, margin=0.0):
    """n prompts with 2 to 6 scores, ranks with ties, texts of random length; never all tied."""
    rng = random.Random(seed)
    groups = []
    while len(groups) < n:
        k = rng.randint(2, 6)
        group = {"ranks": [rng.randint(1, k) for _ in range(k)], "texts": ["x" * rng.randint(1, 50) for _ in range(k)]}
        group |= {"margin": margin * rng.random(), "scores": [rng.gauss(0, 3) for _ in range(k)]}
        if len(set(group["ranks"])) > 1:
            groups.append(group)
    return groups


def compared(groups, length_sd=1.0):
    """(scores, comparisons) in float64."""
    pairs = reward.compare(groups, length_sd, torch.device("cpu"))
    pairs = reward.Comparisons(*(t.double() if t.is_floating_point() else t for t in pairs))
    return torch.tensor([s for g in groups for s in g["scores"]], dtype=torch.float64), pairs


# ---------------------------------------------------------------------------------------------------------- the maths
@pytest.mark.parametrize("seed", range(5))
def test_losses_equal_the_reference_on_ragged_groups_with_ties(seed):
    groups = random_groups(seed, 7, margin=2.0)
    scores, pairs = compared(groups)
    args = reward.Args(label_smoothing=0.1, center_coef=0.3)
    expected = sum(
        reference.pairwise(g["scores"], g["ranks"], g["margin"], 0.1) + 0.3 * reference.centre(g["scores"], g["ranks"])
        for g in groups
    )
    assert reward.reward_loss(scores, pairs, 0.0, args).item() == pytest.approx(expected, rel=1e-6)  # float32 weights
    args = reward.Args(loss="plackett_luce", center_coef=0.0)
    expected = sum(reference.listwise(g["scores"], g["ranks"]) for g in groups)
    assert reward.reward_loss(scores, pairs, 0.0, args).item() == pytest.approx(expected, rel=1e-12)


def test_numbers_worked_by_hand():
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


def test_plackett_luce_of_two_is_bradley_terry():
    for group in random_groups(3, 20):
        two = {**group, "scores": group["scores"][:2], "ranks": [2, 1], "texts": group["texts"][:2], "margin": 0.0}
        scores, pairs = compared([two])
        a, b = (reward.Args(loss=name) for name in ("plackett_luce", "bradley_terry"))
        loss = reward.reward_loss(scores, pairs, 0.0, a).item()
        assert loss == pytest.approx(reward.reward_loss(scores, pairs, 0.0, b).item(), rel=1e-12)


@pytest.mark.parametrize(("share", "n"), [(0.5, 10), (0.46125, 400), (0.99, 100), (1.0, 7), (0.0, 30)])
def test_wilson_interval_solves_its_equation(share, n):
    assert reward.wilson_interval(share, n) == pytest.approx(reference.wilson(share, n), abs=1e-9)


def test_the_length_term_has_the_gradient_of_half_the_squared_covariance():
    groups = [{**g, "ranks": list(range(1, 1 + len(g["ranks"])))} for g in random_groups(5, 6)]  # no ties: all pairs
    scores, pairs = compared(groups, length_sd=10.0)
    lengths = [[len(t) / 10 for t in g["texts"]] for g in groups]
    now = sum(reference.covariance(g["scores"], x) for g, x in zip(groups, lengths, strict=True)) / len(groups)
    assert reward.pair_sums(scores, pairs)[2].item() / len(groups) == pytest.approx(now, rel=1e-6)

    scores.requires_grad_()
    plain, penalised = reward.Args(), reward.Args(length_coef=0.7)
    losses = [reward.reward_loss(scores, pairs, now, args) / len(groups) for args in (plain, penalised)]
    (gradient,) = torch.autograd.grad(losses[1] - losses[0], scores)
    cov, start = torch.zeros((), dtype=torch.float64), 0  # the same by autograd, through torch.cov
    for x in lengths:
        both = torch.stack([scores[start : start + len(x)], torch.tensor(x, dtype=torch.float64)])
        cov, start = cov + torch.cov(both)[0, 1] / len(groups), start + len(x)
    (expected,) = torch.autograd.grad(0.7 / 2 * cov**2, scores)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_swapping_chosen_and_rejected_mirrors_the_accuracy():
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
def test_shared_rows_score_like_padded_rows(loaded, data):
    model, head, tokenizer, _ = loaded
    groups = [encode(row, loaded)[0]["group"] for row in read_jsonl(data / "ranks.jsonl")]
    with reward.role(model, "reward"):
        scores = [
            reward.head_scores(model, head, reward.lay_out(groups, width, tokenizer.pad_token_id, torch.device("cpu")))
            for width in (10**6, 1, 0)
        ]
    torch.testing.assert_close(scores[0], scores[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores[1], scores[2], rtol=0, atol=1e-5)
    one_by_one = reward.score_all(model, head, groups, reward.Args(micro_batch_size=1), tokenizer.pad_token_id)
    torch.testing.assert_close(torch.tensor(sum(one_by_one, [])), scores[1], rtol=0, atol=1e-5)


def test_the_score_is_read_off_the_end_token(loaded):
    model, head, tokenizer, stop_ids = loaded
    (example,) = encode({"prompt": "what?", "chosen": "the otter", "rejected": "a"}, loaded)
    prompt, responses = example["group"]
    assert all(response[-1] in stop_ids for response in responses)
    with reward.role(model, "reward"):
        states = model.get_base_model().model(torch.tensor([prompt + responses[0]])).last_hidden_state
    ((score, _),) = reward.score_all(model, head, [example["group"]], reward.Args(), tokenizer.pad_token_id)
    assert score == pytest.approx((states[0, -1] @ head.weight[0]).item(), abs=1e-5)


def gradients_of(run, monkeypatch, **settings):
    """Gradients and metrics of the first step, none applied."""
    seen = []

    def update(optimizer, *_):
        seen.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        optimizer.zero_grad(set_to_none=True)
        return 0.0

    monkeypatch.setattr(reward, "update", update)
    folder = run(max_steps=1, **settings)
    return seen[0], read_jsonl(folder / "metrics.jsonl")[0]


def test_recomputing_activations_changes_nothing(run, monkeypatch):
    results = [gradients_of(run, monkeypatch, gradient_checkpointing=flag) for flag in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_micro_batches_do_not_change_the_gradient(run, data, monkeypatch, loss):
    settings = {"dataset": str(data / "ranks.jsonl"), "loss": loss, "center_coef": 0.1, "batch_size": 8}
    cuts = [{"micro_batch_size": 8}, {"micro_batch_size": 1}, {"micro_batch_size": 8, "tokens_per_micro_batch": 150}]
    numbers = []
    original = reward.group_batches
    monkeypatch.setattr(reward, "group_batches", lambda *given: numbers.append(original(*given)) or numbers[-1])
    whole, *others = [gradients_of(run, monkeypatch, **cut, **settings) for cut in cuts]
    assert {1, 8} < {len(batches) for batches in numbers if sum(map(len, batches)) == 8}, "the bound cuts it in between"
    assert any(g.abs().max() > 1e-3 for g in whole[0])
    for gradients, metrics in others:
        for cut, eight in zip(gradients, whole[0], strict=True):
            torch.testing.assert_close(cut, eight, rtol=1e-4, atol=1e-6)
        for key in ("loss", "accuracy", "margin", "length_correlation"):
            assert metrics[key] == pytest.approx(whole[1][key], rel=1e-5)


def test_a_ranking_has_the_mean_gradient_of_its_pairs(run, data, tmp_path, monkeypatch):
    answers = ["the otter", "fish and hills", "a far river", "old"]
    row = {"prompt": "what?", "responses": answers, "ranks": [2, 1, 2, 4]}
    pairs = [(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)]  # 0 and 2 tie
    rows = [{"prompt": "what?", "chosen": answers[i], "rejected": answers[j]} for i, j in pairs]
    (tmp_path / "k.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = {"eval_dataset": str(data / "pairs.jsonl")}
    ranking, _ = gradients_of(run, monkeypatch, dataset=str(tmp_path / "k.jsonl"), batch_size=1, **settings)
    mean, _ = gradients_of(run, monkeypatch, dataset=str(tmp_path / "p.jsonl"), batch_size=5, **settings)
    for a, b in zip(ranking, mean, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- the data
def test_all_column_sets_give_the_same_pair(loaded):
    dialogue = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "fish"}]
    other = [dialogue[0], {"role": "assistant", "content": "a town"}]
    rows = [
        {"prompt": "what?", "chosen": "fish", "rejected": "a town"},
        {"prompt": dialogue[:1], "chosen": dialogue[1:], "rejected": other[1:]},
        {"prompt": "what?", "chosen": dialogue, "rejected": other},
        {"chosen": dialogue, "rejected": other},
        {"chosen": "\n\nHuman: what?\n\nAssistant: fish", "rejected": "\n\nHuman: what?\n\nAssistant: a town"},
        {"prompt": "what?", "responses": ["fish", "a town"], "ranks": [1, 2]},
    ]
    examples = [encode(row, loaded)[0] for row in rows]
    assert all(e["group"] == examples[0]["group"] and e["key"] == examples[0]["key"] for e in examples)
    assert all(e["texts"] == ["fish", "a town"] and e["ranks"] == [1, 2] for e in examples)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "identical pair"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "empty"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "neither a string nor a message list"),
        ({"chosen": "b", "rejected": "c"}, "no dialogue"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"}, "differing prompts"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "no number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": math.nan}, "no number"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}, "no response is ranked above"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1]}, "no lists of one length"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": ["1", "2"]}, "no number"),
        ({"prompt": "a", "responses": "bc", "ranks": [1, 2]}, "no lists of one length"),
        ({"prompt": "otter " * 40, "chosen": "b", "rejected": "c"}, "over 30"),
        ({"prompt": "a", "chosen": "b", "rejected": "otter " * 40}, "over 20"),
    ],
)
def test_bad_rows_say_why(loaded, row, reason):
    with pytest.raises(reward.BadRow, match=reason):
        encode(row, loaded, max_prompt_length=30, max_response_length=20)


@pytest.mark.skipif(not HH.is_dir(), reason="the real pairs are not part of the repository")
def test_awkward_real_pairs_are_counted_by_reason(loaded, capsys):
    source = HH / "awkward_pairs_dev.jsonl"
    kinds = [row["kind"] for row in read_jsonl(source)]

    def encode_row(row):
        return encode(row, loaded, max_prompt_length=10**6, max_response_length=10**6)

    with pytest.raises(reward.UserError) as error:
        reward.encode_rows(str(source), "train", [("chosen", "rejected")], encode_row)
    assert f"no usable row of {len(kinds)}" in str(error.value)
    for kind, reason in (("identical", "identical pair"), ("empty", "empty prompt"), ("prompt", "differing prompts")):
        assert f"{sum(kind in k for k in kinds)} {'pair with ' * (kind == 'prompt')}{reason}" in str(error.value)


@pytest.mark.skipif(not HH.is_dir(), reason="the real pairs are not part of the repository")
@pytest.mark.parametrize("name", ["helpful_base", "harmless_base"])
def test_length_rule_on_real_pairs_is_the_published_number(name):
    expected = json.loads((HH.parent / "expected_dev.json").read_text())["hh_rlhf"][name]["length_only_chars"]
    rows = []
    for row in read_jsonl(HH / f"{name}_test_dev.jsonl"):
        _, texts = reward.read_pair(row)
        rows.append({"chosen_length": len(texts[0]), "rejected_length": len(texts[1])})
    share = reward.share_won(rows, "length")
    assert share == pytest.approx(expected["accuracy_ties_half"], abs=1e-9)
    assert reward.wilson_interval(share, len(rows)) == pytest.approx(expected["wilson95"], abs=1e-4)


def test_missing_columns_name_what_was_found_and_expected(run, tmp_path):
    (tmp_path / "unpaired.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "label": True}) + "\n")
    with pytest.raises(reward.UserError) as error:
        run(dataset=str(tmp_path / "unpaired.jsonl"))
    assert "columns found: completion, label, prompt" in str(error.value)
    assert "prompt + chosen + rejected | chosen + rejected | prompt + responses + ranks" in str(error.value)


def test_prompts_are_held_out_whole(loaded, data):
    system = [{"role": "system", "content": "Be brief."}]
    examples = []
    for row in read_jsonl(data / "pairs.jsonl"):
        examples += encode({**row, "prompt": [*system, {"role": "user", "content": row["prompt"]}]}, loaded)
    train, heldout = reward.hold_out(examples, 0.25, 0)
    prompts = [{e["prompt"][-1]["content"] for e in part} for part in (train, heldout)]
    assert len(prompts[0]) == 15 and len(prompts[1]) == 5 and not prompts[0] & prompts[1]
    assert len(train) == 30 and len(heldout) == 10


def test_a_contradicting_flag_is_an_error(run):
    with pytest.raises(reward.UserError, match="label_smoothing"):
        run(loss="plackett_luce", label_smoothing=0.1)
    with pytest.raises(reward.UserError, match="lora_r 0"):
        run(lora_r=0)


# ------------------------------------------------------------------------------------------------------------ the run
def plain_scores(folder, base, texts, dtype=torch.float32, **options):
    """Raw scores by transformers and peft alone, one row at a time: the lines that the README shows."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype, **options)
    model = PeftModel.from_pretrained(model, folder).eval()
    for module in model.modules():  # as load_base does: else some CPUs compute 4-bit layers by another kernel
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for prompt, response in texts:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
        ids = ids[:, : (ids[0] == tokenizer.eos_token_id).nonzero()[-1, 0] + 1]  # the template ends with a newline
        with torch.no_grad():
            scores.append(model(ids).logits.item())
    return scores


def test_a_finished_folder_loads_with_transformers_and_peft_alone(run, small_base, capsys):
    folder = run(learning_rate=3e-3, epochs=2)
    card, rows = json.loads((folder / "reward.json").read_text()), read_jsonl(folder / "samples.jsonl")
    raw = plain_scores(folder, small_base, [(row["prompt"], row["chosen"]) for row in rows])
    assert raw == pytest.approx([row["chosen_score"] + card["mean"] for row in rows], abs=1e-5)

    canaries = card["canaries"]
    raw = plain_scores(folder, small_base, [(c["prompt"], c["response"]) for c in canaries])
    assert len(canaries) == 8
    assert raw == pytest.approx([c["score"] + card["mean"] for c in canaries], abs=1e-5)

    # the scores of what was normalised on have mean 0 and sd 1
    args = json.loads((folder / "args.json").read_text())
    assert card["normalized_on"] == "best training responses" and (card["quant"], card["dtype"]) == ("none", "float32")
    heldout = {row["prompt"] for row in rows}
    best = [(r["prompt"], r["chosen"]) for r in read_jsonl(Path(args["dataset"])) if r["prompt"] not in heldout]
    scores = np.array(plain_scores(folder, small_base, best)) - card["mean"]
    assert card["n"] == len(best) == 32 and abs(scores.mean()) < 1e-5 and abs(scores.std() - 1) < 1e-5

    # the table, the gates and the samples tell the same story
    report, printed = json.loads((folder / "report.json").read_text()), capsys.readouterr().out
    gates = {gate["name"]: gate for gate in report["gates"]}
    accuracy, longer = reward.share_won(rows, "score"), reward.share_won(rows, "length")
    assert gates["accuracy_low"]["value"] == pytest.approx(reference.wilson(accuracy, len(rows))[0], abs=1e-6)
    assert gates["beats_length"]["value"] == pytest.approx(accuracy - max(longer, 1 - longer), abs=1e-6)
    assert report["passed"] == all(gate["passed"] for gate in gates.values())
    assert all(f"\n{name:20}" in printed for name in ("a", "b", "all"))
    assert {"id", "prompt", "chosen", "rejected", "subset", "chosen_length", "rejected_length"} <= rows[0].keys()
    for name in ("adapter_config.json", "tokenizer.json", "curves.png", "timing.jsonl", "chat_template.jinja"):
        assert (folder / name).is_file()


def test_four_bits_load_with_transformers_and_peft_alone(run, small_base):
    from transformers import BitsAndBytesConfig

    folder = run(quant="nf4")
    card = json.loads((folder / "reward.json").read_text())
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["score"],
    )  # fmt: skip
    texts = [(c["prompt"], c["response"]) for c in card["canaries"]]
    raw = plain_scores(folder, small_base, texts, torch.bfloat16, quantization_config=config)
    assert (card["quant"], card["dtype"]) == ("nf4", "bfloat16")
    ours = [c["score"] + card["mean"] for c in card["canaries"]]
    assert raw == pytest.approx(ours, rel=2**-7, abs=5e-3)  # plain loading answers in bf16, whose steps are 2**-7 wide


def test_the_adapter_starts_as_a_copy_of_the_sft_adapter(run, loaded, small_base, tmp_path, capsys):
    model, _, tokenizer, _ = loaded
    sft = tmp_path / "sft"
    sft.mkdir()
    reward.save_adapter(sft, model, "reward", str(small_base), tokenizer)
    reward.write_report(sft, "sft", "", [("eos_rate", 0.1, 0.5, False)])
    folder = run(model=str(sft), lora_r=None, learning_rate=0.0)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (sft, folder))
    assert after.pop(reward.HEAD_KEY).shape == (1, 64)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert "eos_rate" in capsys.readouterr().out.split("data:")[0]  # the failed gate warned, and only warned


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_resumed_run_equals_an_uninterrupted_one(run, quant):
    settings = {"quant": quant, "max_steps": 4, "save_every": 2, "eval_every": 3, "length_coef": 1.0}
    folder = run(**settings)
    names = ["adapter_model.safetensors", "reward.json", "samples.jsonl", "metrics.jsonl", "report.json"]
    whole = {name: (folder / name).read_bytes() for name in names}
    (folder / "checkpoint" / "step_000004.pt").unlink()
    for name in names[:3]:
        (folder / name).unlink()
    run(**settings, resume=True)
    assert {name: (folder / name).read_bytes() for name in names} == whole
    assert len(read_jsonl(folder / "metrics.jsonl")) == 4
    assert "heldout_accuracy" in read_jsonl(folder / "metrics.jsonl")[2]


def test_rankings_train_and_log_their_layout(run, data):
    folder = run(dataset=str(data / "ranks.jsonl"), loss="plackett_luce")
    for metrics in read_jsonl(folder / "metrics.jsonl"):
        assert 0 <= metrics["shared_rows"] <= 1 and 0 <= metrics["accuracy"] <= 1 and math.isfinite(metrics["loss"])
    rows = read_jsonl(folder / "samples.jsonl")
    assert len({row["id"] for row in rows}) == len(rows)


def test_length_coef_takes_the_length_out_of_the_reward(run, tmp_path):
    rng = random.Random(0)
    rows = []
    for i in range(256):  # the longer one wins in 9 of 10
        short, long = text(rng, rng.randint(1, 4)), text(rng, rng.randint(8, 16))
        chosen, rejected = (long, short) if rng.random() < 0.9 else (short, long)
        rows.append({"prompt": f"{i}?", "chosen": chosen, "rejected": rejected})
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    correlations = {}
    for coef in (0.0, 10.0):
        folder = run(
            dataset=str(tmp_path / "long.jsonl"), length_coef=coef, max_steps=50, epochs=100, batch_size=32,
            micro_batch_size=32, learning_rate=1e-3, output_dir=str(tmp_path / str(coef)),
        )  # fmt: skip
        last = read_jsonl(folder / "metrics.jsonl")[-20:]
        correlations[coef] = float(np.mean([metrics["length_correlation"] for metrics in last]))
    assert correlations[0.0] > 0.7
    assert abs(correlations[10.0]) < 0.3


def test_every_flag_is_read():
    source = Path(reward.__file__).read_text()
    unread = [f.name for f in dataclasses.fields(reward.Args) if f"args.{f.name}" not in source]
    assert set(unread) <= {"lora_target_modules"}  # read by getattr in add_adapter


def test_a_missing_default_gives_one_line():
    with pytest.raises(reward.UserError, match="no such folder"):
        reward.main(reward.Args(model=str(ROOT / "tiny" / "nowhere")))
