"""Token rows: shared and packed rows equal padded ones, padding changes nothing, scores sit where they belong."""

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CPU, tiny_llama
from torch import Tensor, nn

import ppo
import reward
import sft

VOCAB, PAD, EOS = 97, 0, 1
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": PAD, "eos_token_id": EOS,
    "bos_token_id": None, "initializer_range": 0.1,
}  # fmt: skip
WINDOW = {"sliding_window": 5}  # shorter than every row below
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen2 windowed": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "mistral windowed": WINDOW,
    "phi3": {"num_key_value_heads": 4},
    "phi3 windowed": WINDOW,
    "smollm3": {"no_rope_layers": [1, 0]},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
}
GEMMA2 = ("gemma2", "sdpa")  # its soft cap exists in eager attention only


def make_model(family: str, attention: str | None = None) -> Any:
    """A random model of the family in eval mode, fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    kind = family.split()[0]
    settings = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    config = AutoConfig.for_model(kind, **({**settings} if kind == "gpt2" else SIZES) | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for p in model.parameters():  # norms and biases too: 1 and 0 hide mistakes
        p.data += torch.randn_like(p) * 0.05
    return model.eval()


def make_groups(seed: int, n: int = 3) -> list[ppo.Group]:
    """Prompts of 1 to 9 tokens, 1 to 4 responses of 1 to 8 tokens each; EOS and PAD occur anywhere."""
    rng = random.Random(seed)

    def ids(longest: int) -> list[int]:
        return [rng.choice([PAD, EOS, rng.randrange(VOCAB)]) for _ in range(rng.randint(1, longest))]

    return [(ids(9), [ids(8) for _ in range(rng.randint(1, 4))]) for _ in range(n)]


def plain_logprobs(model: Any, groups: list[ppo.Group], temperature: float = 1.0) -> tuple[list, list, list]:
    """(log-probs, states before each token, last state) of each response, alone, by the model's own forward pass."""
    rows, before, last = [], [], []
    for prompt, responses in groups:
        for y in responses:
            output = model(torch.tensor([prompt + y]), output_hidden_states=True)
            table = (output.logits[0].double() / temperature).log_softmax(-1)
            rows.append(table[range(len(prompt) - 1, len(prompt) + len(y) - 1), y])
            before.append(output.hidden_states[-1][0, len(prompt) - 1 : -1])
            last.append(output.hidden_states[-1][0, -1])
    return rows, before, last


def everything(model: Any, head: nn.Linear, rows: ppo.Rows, weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(log-probs, entropies, values, scores) and the gradients of one weighted sum of them all."""
    model.zero_grad()
    head.zero_grad()
    logprobs, entropy = ppo.response_logprobs(model, rows)
    values, scores = ppo.head_values(model, head, rows), ppo.head_scores(model, head, rows)
    w = weights[: len(scores), : logprobs.shape[1]]
    ((logprobs + 0.3 * entropy + values) * w).sum().add((scores * w[:, 0]).sum()).backward()
    gradients = [p.grad for p in (*model.parameters(), *head.parameters()) if p.grad is not None]
    return [x.detach() for x in (logprobs, entropy, values, scores)], [g.clone() for g in gradients]


def make_head() -> nn.Linear:
    """A random scalar head."""
    torch.manual_seed(5)
    return nn.Linear(64, 1)


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    """Equal within tolerance, relative to the largest value where that is above 1."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


CASES = [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager") if (family, attention) != GEMMA2]


# ------------------------------------------------------------------------------------- shared, padded, plain: equal
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_shared_rows_equal_padded_rows_equal_the_model(family: str, attention: str) -> None:
    """Traps 1, 2, 13, 18: values, scores, log-probs and all gradients, with windows shorter than the rows.

    A row of one group, rows of several, and padded rows are held to each other, and the last to the model's own forward
    pass of each response alone, without padding or mask.
    """
    model, head, groups = make_model(family, attention), make_head(), make_groups(1)
    weights = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
    padded = everything(model, head, ppo.lay_out(groups, 0, EOS, CPU), weights)
    shared_rows = ppo.lay_out(groups, 1, EOS, CPU)
    assert shared_rows.mixed and len(shared_rows.input_ids) == len(groups)
    packed_rows = ppo.lay_out(groups, 2 * shared_rows.input_ids.shape[1], EOS, CPU)
    assert len(packed_rows.input_ids) == 2 and packed_rows.group.max() == 2
    for rows in (shared_rows, packed_rows):
        values, gradients = everything(model, head, rows, weights)
        assert_close(values, padded[0])
        assert_close(gradients, padded[1])
    with torch.no_grad():
        logprobs, before, last = plain_logprobs(model, groups)
        for i, (row, states, state) in enumerate(zip(logprobs, before, last, strict=True)):
            n = len(row)
            assert_close([padded[0][0][i, :n], padded[0][2][i, :n]], [row.float(), head(states)[:, 0]])
            assert padded[0][3][i].item() == pytest.approx(head(state).item(), abs=1e-5)
            assert not any(x[i, n:].any() for x in padded[0][:3])


def test_every_family_in_the_list_is_tested() -> None:
    """SHARED_ROW_MODELS promises what the test above holds: one entry for each of its model types."""
    assert {family.split()[0] for family in FAMILIES} == set(ppo.SHARED_ROW_MODELS)


def test_a_wrong_mask_is_noticed() -> None:
    """The comparison above can fail: responses that see each other, or positions that run on, are off by more."""
    model, groups = make_model("llama"), [([5, 6, 7], [[8, 9, 10], [11, 12, 13]])]
    right = ppo.lay_out(groups, 1, PAD, CPU)
    with torch.no_grad():
        good, _ = ppo.response_logprobs(model, right)
        blind = right._replace(segment=right.segment.clamp(max=2))
        running = right._replace(position_ids=torch.arange(9)[None])
        for wrong in (blind, running):
            assert (ppo.response_logprobs(model, wrong)[0] - good).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_at_a_temperature(temperature: float) -> None:
    """Trap 3: the model's logits divided by the temperature, in float64."""
    model, groups = make_model("llama"), make_groups(4)
    with torch.no_grad():
        expected, _, _ = plain_logprobs(model, groups, temperature)
        got, _ = ppo.response_logprobs(model, ppo.lay_out(groups, 1, PAD, CPU), temperature)
    for row, exact in zip(got, expected, strict=True):
        assert torch.allclose(row[: len(exact)].double(), exact, atol=1e-5)


def test_detached_logprobs_are_the_same_and_take_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rollout's log-probs run as an update does, without the pass back through the head that only it needs."""
    model, groups = make_model("llama"), make_groups(4)
    rows = ppo.lay_out(groups, 1, PAD, CPU)
    expected = ppo.response_logprobs(model, rows)
    assert expected[0].requires_grad
    monkeypatch.setattr(torch.autograd, "grad", None)
    got = ppo.response_logprobs(model, rows, detached=True)
    for a, b in zip(got, expected, strict=True):
        assert not a.requires_grad and torch.equal(a, b)


def test_gemma2_logits_are_soft_capped() -> None:
    """Gemma 2's cap is part of log pi; without it log-probs differ visibly."""
    model, groups = make_model("gemma2"), make_groups(2)
    model.config.final_logit_softcapping = 0.5
    with torch.no_grad():
        expected, _, _ = plain_logprobs(model, groups)
        got, _ = ppo.response_logprobs(model, ppo.lay_out(groups, 0, PAD, CPU))
        for row, exact in zip(got, expected, strict=True):
            assert torch.allclose(row[: len(exact)].double(), exact, atol=1e-5)
        model.config.final_logit_softcapping = None
        assert (ppo.response_logprobs(model, ppo.lay_out(groups, 0, PAD, CPU))[0] - got).abs().max() > 0.01


# ------------------------------------------------------------------------------------------------------- by hand
def test_rows_by_hand() -> None:
    """[5 6] with [7 8] and [9]; [4] with [3]: every field of both layouts; positions restart after the prompt."""
    groups: list[ppo.Group] = [([5, 6], [[7, 8], [9]]), ([4], [[3]])]
    shared = ppo.lay_out(groups, 1, 99, CPU)
    assert shared.mixed
    assert shared.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 99, 99, 99]]
    assert shared.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert shared.group.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert shared.segment.tolist() == [[1, 1, 2, 2, 3], [1, 2, 0, 0, 0]]
    assert shared.state.tolist() == [[1, 2], [1, 0], [5, 0]]  # the first token of each response is told by the prompt
    assert shared.targets.tolist() == [[7, 8], [9, 0], [3, 0]]
    assert shared.mask.tolist() == [[1, 1], [1, 0], [1, 0]]
    assert shared.last.tolist() == [3, 4, 6]

    packed = ppo.lay_out(groups, 7, 99, CPU)
    assert packed.mixed
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert packed.group.tolist() == [[1, 1, 1, 1, 1, 2, 2]]
    assert packed.segment.tolist() == [[1, 1, 2, 2, 3, 1, 2]]
    assert packed.state.tolist() == [[1, 2], [1, 0], [5, 0]] and packed.last.tolist() == [3, 4, 6]

    padded = ppo.lay_out(groups, 0, 99, CPU, n_tokens=3)
    assert not padded.mixed
    assert padded.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 9, 99], [4, 3, 99, 99]]
    assert padded.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 0, 0]]
    assert padded.state.tolist() == [[1, 2, 0], [5, 0, 0], [8, 0, 0]]
    assert padded.mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert padded.last.tolist() == [3, 6, 9]


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("layer_types", [None, ["full_attention", "sliding_attention"]])
def test_mask_by_hand(window: int | None, layer_types: list[str] | None) -> None:
    """A token sees the prompt and its own response up to itself, windows counted in positions; padding is unseen."""
    rows = ppo.lay_out([([5, 6], [[7, 8], [9]]), ([4], [[3], [2]])], 1, 99, CPU)
    mask = ppo.attention_mask(rows, SimpleNamespace(sliding_window=window, layer_types=layer_types), torch.float32)
    # column -> (row, sequence it is part of, position), written down by hand; the prompt is part of both sequences
    tokens = {0: [("ab", 0), ("ab", 1), ("a", 2), ("a", 3), ("b", 2)], 1: [("cd", 0), ("c", 1), ("d", 1)]}
    masks = mask if isinstance(mask, dict) else {"one": mask}
    assert set(masks) == ({"full_attention", "sliding_attention"} if window and layer_types else {"one"})
    for name, table in masks.items():
        assert table.shape == (2, 1, 5, 5) and table.dtype == torch.float32
        limit = None if name == "full_attention" else window
        for r, row in tokens.items():
            for i, (own, here) in enumerate(row):
                for j in range(5):
                    seen = j <= i and bool(set(own) <= set(row[j][0])) if j < len(row) else False
                    seen = seen and (limit is None or here - row[j][1] < limit)
                    assert (table[r, 0, i, j].item() == 0) == seen
                    assert seen or table[r, 0, i, j].item() == torch.finfo(torch.float32).min


@pytest.mark.parametrize("width", [0, 1, 70])
@pytest.mark.parametrize("pad_id", [PAD, EOS, 50])
def test_padding_changes_nothing(width: int, pad_id: int) -> None:
    """Traps 1, 2, 10, 14: neither its amount (37 columns) nor its id, EOS included, moves a number or a gradient."""
    model, head, groups = make_model("llama"), make_head(), make_groups(7, n=2)
    weights = torch.randn(12, 50, generator=torch.Generator().manual_seed(3))
    n = sum(len(responses) for _, responses in groups)
    weights[n:] = 0  # the long group only makes the rows longer
    alone = everything(model, head, ppo.lay_out(groups, width, PAD, CPU), weights)
    beside = [*groups, ([3] * 20, [[4] * 37])]
    wide = everything(model, head, ppo.lay_out(beside, width, pad_id, CPU), weights)
    t = alone[0][0].shape[1]
    assert_close([*(x[:n, :t] for x in wide[0][:3]), wide[0][3][:n]], alone[0], 1e-6)
    assert_close(wide[1], alone[1], 1e-6)


def test_masks_come_from_lengths() -> None:
    """Trap 2: a prompt and a response full of EOS (= pad) count in full; the pad behind them does not."""
    groups: list[ppo.Group] = [([EOS, 5, EOS, EOS], [[EOS, 6, EOS]]), ([EOS], [[EOS]])]
    rows = ppo.lay_out(groups, 0, EOS, CPU)
    mask: Any = ppo.attention_mask(rows, tiny_llama(VOCAB, EOS, EOS).config, torch.float32)
    assert mask.tolist() == [[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]]
    assert rows.mask.tolist() == [[1, 1, 1], [1, 0, 0]] and rows.targets[0].tolist() == [EOS, 6, EOS]


def test_the_score_sits_on_the_last_real_token() -> None:
    """Traps 2, 13, 18: four rows: ended, cut off, ended where EOS is the pad too, and EOS alone as the response."""
    model, head, prompt = make_model("llama"), make_head(), [5, EOS, 6]
    responses = [[7, 8, EOS], [7, 8, 9, 10], [EOS, 8, EOS], [EOS]]
    with torch.no_grad():
        expected = [head(plain_logprobs(model, [(prompt, [y])])[2][0]).item() for y in responses]
        for pad_id in (PAD, EOS):
            for shared in (False, True):
                rows = ppo.lay_out([(prompt, responses)], shared, pad_id, CPU)
                assert rows.input_ids.flatten()[rows.last].tolist() == [EOS, 10, EOS, EOS]
                assert ppo.head_scores(model, head, rows).tolist() == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in expected}) == 4


# -------------------------------------------------------------------------------------------- which layout, when
def test_filling_rows_by_hand() -> None:
    """The longest first, each into the first row with room; a piece wider than a row has one of its own."""
    assert ppo.fill_rows([3, 5, 4, 2, 9, 1], 8) == [[4], [1, 0], [2, 3, 5]]
    assert ppo.fill_rows([2, 1, 2], 0) == [[0], [2], [1]]


@pytest.mark.parametrize(
    ("groups", "hidden", "width"),
    [
        ([(160, [64] * 8)], 128, 672),  # 1 x 672 x (3072 + 2688) = 3.9 M  <  8 x 224 x (3072 + 896) = 7.1 M
        ([(64, [256] * 8)], 128, 0),  # 1 x 2112 x (3072 + 8448) = 24 M  >  8 x 320 x (3072 + 1280) = 11 M
        ([(64, [256] * 8)], 4096, 2112),  # 1 x 2112 x (98304 + 8448) = 225 M  <  8 x 320 x (98304 + 1280) = 255 M
        ([(160, [64])], 128, 0),  # nothing to share
        # 2 x 200 x (3072 + 800) = 1.5 M  <  one row of 400: 1.9 M  <  three padded ones of 200: 2.3 M
        ([(100, [100]), (50, [50]), (50, [50])], 128, 200),
        # 1 x 200 x (3072 + 800) = 0.77 M  <  2 x 120 x (3072 + 480) = 0.85 M: in 120 columns they do not fit together
        ([(60, [60]), (40, [40])], 128, 202),
    ],
)
def test_the_cheapest_layout_is_chosen(groups: list[tuple[int, list[int]]], hidden: int, width: int) -> None:
    """Worked by hand: long prompts pay, long responses do in a wide model, and rows are filled where that pays."""
    from transformers import LlamaConfig

    ids = [([5] * prompt, [[6] * n for n in responses]) for prompt, responses in groups]
    assert ppo.row_width(ids, LlamaConfig(hidden_size=hidden)) == width


def test_unknown_attention_takes_padded_rows() -> None:
    """A model type without plain attention never shares rows, however cheap it were."""
    group: ppo.Group = ([5] * 500, [[6]] * 8)
    for model_type, width in (("llama", 508), ("mamba2", 0)):
        assert ppo.row_width([group], SimpleNamespace(model_type=model_type, hidden_size=128)) == width


def test_a_micro_batch_ends_with_its_number_or_with_its_tokens() -> None:
    """Whichever comes first, in the given order; what alone has more gets a pass of its own; 0 is no bound."""
    tokens = [4, 5, 1, 9, 2, 2, 2]

    def cut(size: int, most: int) -> list[list[int]]:
        args = ppo.Args(micro_batch_size=size, tokens_per_micro_batch=most)
        return ppo.micro_batches([1, 0, 2, 3, 4, 5, 6], lambda some: sum(tokens[i] for i in some), args)

    assert cut(3, 0) == [[1, 0, 2], [3, 4, 5], [6]]
    assert cut(9, 10) == [[1, 0, 2], [3], [4, 5, 6]]  # 5 + 4 + 1 are 10, 9 + 2 more
    assert cut(2, 10) == [[1, 0], [2, 3], [4, 5], [6]]
    assert cut(9, 8) == [[1], [0, 2], [3], [4, 5, 6]]
    assert cut(9, 1) == [[1], [0], [2], [3], [4], [5], [6]]


@pytest.mark.parametrize("model_type", ["llama", "mamba2"])
def test_no_pass_has_more_columns_than_tokens_allowed(model_type: str) -> None:
    """What --tokens_per_micro_batch promises of memory holds with padding, in shared rows and in padded ones."""
    config, rng = SimpleNamespace(model_type=model_type, hidden_size=64), random.Random(0)
    groups = [([5] * rng.randint(1, 50), [[6] * rng.randint(1, 40) for _ in range(4)]) for _ in range(12)]
    for most in (100, 150, 333):
        sizes: dict[str, Any] = {"micro_batch_size": 48, "tokens_per_micro_batch": most}
        (batches,) = ppo.lay_out_rollout(groups, 1, ppo.Args(**sizes), config, EOS, CPU)
        assert sorted(i for numbers, _ in batches for i in numbers) == list(range(48))
        columns = [rows.input_ids.numel() for _, rows in batches]
        assert max(columns) <= most and sum(columns) / len(columns) > 0.6 * most, "bounded, and not one by one"
        pairs = [(prompt, responses[:2]) for prompt, responses in groups]
        numbers = reward.group_batches(pairs, config, reward.Args(**sizes))
        assert sorted(sum(numbers, [])) == list(range(12)) and (len(numbers) < 12 or most < 300)
        for some in ([pairs[i] for i in part] for part in numbers):
            rows = reward.lay_out(some, reward.row_width(some, config), PAD, CPU)
            assert rows.input_ids.numel() <= most or len(some) == 1


@pytest.mark.parametrize("micro", [1, 2, 4, 8, 64])
def test_a_rollout_in_micro_batches_holds_every_response_once(micro: int) -> None:
    """Traps 15 and 23: ids are the sampled ones, numbers a permutation, T the same everywhere, results too."""
    model, rng = make_model("llama"), random.Random(0)
    groups = [
        ([rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))], [[rng.randrange(VOCAB)] * n for n in (1, 5, 2, 3)])
        for _ in range(5)
    ]
    minibatches = ppo.lay_out_rollout(groups, 3, ppo.Args(micro_batch_size=micro), model.config, EOS, CPU)
    members = [sorted(i for numbers, _ in part for i in numbers) for part in minibatches]
    assert members == [list(range(7)), list(range(7, 14)), list(range(14, 20))], "whatever the micro-batch size"
    batches = [batch for part in minibatches for batch in part]
    flat = [y for _, responses in groups for y in responses]
    assert sorted(i for numbers, _ in batches for i in numbers) == list(range(20))
    logprobs = torch.zeros(20, 5)
    for numbers, rows in batches:
        assert len(numbers) <= micro and rows.mask.shape == (len(numbers), 5)
        for i, targets, mask in zip(numbers, rows.targets, rows.mask, strict=True):
            assert targets[mask.bool()].tolist() == flat[i]
        with torch.no_grad():
            logprobs[numbers] = ppo.response_logprobs(model, rows)[0]
    with torch.no_grad():
        expected, _, _ = plain_logprobs(model, groups)
    for row, exact in zip(logprobs, expected, strict=True):
        assert torch.allclose(row[: len(exact)].double(), exact, atol=1e-5)


def test_logits_of_a_batch_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 30: at 512 response tokens and a vocabulary of 100,000 no more than 2**25 logits (128 MiB) are asked for."""
    model, sizes, original = tiny_llama(100_000, EOS, PAD), [], ppo.lm_logits

    def counted(model: Any, hidden: Tensor) -> Tensor:
        logits = original(model, hidden)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(ppo, "lm_logits", counted)
    rows = ppo.lay_out([([5], [list(range(512))])], 0, PAD, CPU)
    with torch.no_grad():
        logprobs, _ = ppo.response_logprobs(model, rows)
    assert sum(sizes) == 512 * 100_000 and max(sizes) <= 2**25 and (logprobs < 0).all()


# ---------------------------------------------------------------------------------------------------- SFT packing
def make_examples(seed: int, n: int) -> list[dict]:
    """Examples of 2 to 12 tokens with masks that have gaps, as conversations have; a few are supervised throughout."""
    rng = random.Random(seed)
    examples = []
    for i in range(n):
        length = rng.randint(2, 12)
        mask = [0] + [int(rng.random() < 0.6 or i % 4 == 0) for _ in range(length - 2)] + [1]
        examples.append({"ids": [rng.choice([EOS, rng.randrange(VOCAB)]) for _ in range(length)], "mask": mask})
    return examples


@pytest.mark.parametrize("family", ["llama", "mistral windowed", "gemma3_text"])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_packed_rows_equal_unpacked_rows(family: str, micro: int) -> None:
    """Traps 14 and 23: every supervised token of every example, and the gradient of the sum, whatever the layout."""
    model, examples = make_model(family), make_examples(0, 9)

    def run(packing: bool) -> tuple[list[tuple[tuple[int, ...], list[float]]], list[Tensor], int]:
        model.zero_grad()
        found, columns = [], 0
        for rows in sft.pack_examples(examples, sft.Args(packing=packing, micro_batch_size=micro), EOS, CPU):
            logprobs, _ = sft.response_logprobs(model, rows)
            logprobs.sum().backward()
            columns += rows.input_ids.numel()
            for targets, values, mask in zip(rows.targets, logprobs, rows.mask.bool(), strict=True):
                found.append((tuple(targets[mask].tolist()), values[mask].tolist()))
        return sorted(found), [p.grad.clone() for p in model.parameters() if p.grad is not None], columns

    packed, packed_gradients, packed_columns = run(True)
    apart, apart_gradients, _ = run(False)
    expected = []
    with torch.no_grad():
        for e in examples:
            table = model(torch.tensor([e["ids"]])).logits[0].double().log_softmax(-1)
            at = [t for t, m in enumerate(e["mask"]) if m]
            ids = [e["ids"][t] for t in at]
            expected.append((tuple(ids), [table[t - 1, i].item() for t, i in zip(at, ids, strict=True)]))
    for found in (packed, apart):
        assert [f[0] for f in found] == [e[0] for e in sorted(expected)]
        for (_, values), (_, exact) in zip(found, sorted(expected), strict=True):
            assert values == pytest.approx(exact, abs=1e-5)
    assert_close(packed_gradients, apart_gradients)
    assert micro == 1 or packed_columns < 9 * max(len(e["ids"]) for e in examples)


def test_packed_rows_are_no_longer_than_the_longest_example() -> None:
    """Packing fills rows, it makes none longer; every example is in one row, once."""
    examples = make_examples(1, 30)
    longest = max(len(e["ids"]) for e in examples)
    rows = list(sft.pack_examples(examples, sft.Args(micro_batch_size=4), PAD, CPU))
    assert all(r.input_ids.shape[1] <= longest and len(r.input_ids) <= 4 for r in rows)
    assert sum(int((r.group > 0).sum()) for r in rows) == sum(len(e["ids"]) for e in examples)
    assert sum(int(r.mask.sum()) for r in rows) == sum(sum(e["mask"]) for e in examples)
    filled = sum(int((r.group > 0).sum()) for r in rows) / sum(r.group.numel() for r in rows)
    assert filled > 0.9
    for packing in (True, False):
        args = sft.Args(packing=packing, micro_batch_size=30, tokens_per_micro_batch=30)
        bounded = list(sft.pack_examples(examples, args, PAD, CPU))
        assert max(r.input_ids.numel() for r in bounded) <= 30 and sum(len(r.mask) for r in bounded) == 30
        few = list(sft.pack_examples(examples, replace(args, tokens_per_micro_batch=8), PAD, CPU))
        assert all(r.input_ids.numel() <= 8 or len(r.mask) == 1 for r in few), "longer examples go alone"
