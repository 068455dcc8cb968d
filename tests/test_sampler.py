"""The sampler: what it draws is the model's distribution, and a function of (seed, stream, step), prompt and sample."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from scipy import stats
from test_rows import CASES, EOS, PAD, VOCAB, make_model
from torch import Tensor
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ppo

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [18, EOS, 19, PAD], [20, 21]]
KEY = (0, 0, 0)
STOPS = (EOS, *range(30, 41))  # one token in eight: some responses end at once, some at the limit


def draw(model: Any, prompts: list[list[int]] = PROMPTS, names: list[int] | None = None, samples: int = 3,
         tokens: int = 9, temperature: float = 1.0, stops: tuple[int, ...] = STOPS, batch: int = 128,
         key: tuple[int, int, int] = KEY) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """ppo.sample with the defaults of these tests."""
    names = list(range(len(prompts))) if names is None else names
    return ppo.sample(model, prompts, names, samples, tokens, temperature, list(stops), batch, key)


def exact_table(model: Any, ids: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities (T, V) after each of the ids, by the model's own forward pass of one row, in float64."""
    with torch.no_grad():
        return (model(torch.tensor([ids])).logits[0].double() / temperature).log_softmax(-1)


# ------------------------------------------------------------------------------------------------- what is drawn
def toy(vocabulary: int) -> Any:
    """A tiny Llama of few tokens, whose generation config asks for greedy top-1: the sampler must not care."""
    model = tiny_llama(vocabulary, 1, 0, tie_word_embeddings=False)
    model.lm_head.weight.data.mul_(0.6)
    model.generation_config.do_sample, model.generation_config.top_k = False, 1
    return model


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_tokens_follow_the_softmax(temperature: float) -> None:
    """Traps 3, 4, 29: 8000 pairs of tokens against their exact probabilities at the temperature, by chi-square.

    All 25 pairs of a vocabulary of 5 are counted; a top-k, a top-p or greedy choice would leave cells empty.
    """
    model, n, prompt = toy(5), 8000, [4, 2, 3]
    responses, _ = draw(model, [prompt], samples=n, tokens=2, temperature=temperature, stops=())
    counts = Counter(map(tuple, responses))
    first = exact_table(model, prompt, temperature)[-1]
    expected: dict[tuple[int, ...], float] = {}
    for a in range(5):
        second = exact_table(model, [*prompt, a], temperature)[-1]
        expected |= {(a, b): n * (first[a] + second[b]).exp().item() for b in range(5)}
    assert set(counts) <= set(expected) and min(expected.values()) > 3
    statistic = sum((counts[pair] - e) ** 2 / e for pair, e in expected.items())
    assert statistic < stats.chi2.ppf(0.999, 24)
    other = 1.0 if temperature != 1.0 else 1.3  # the same draws do not fit another temperature
    wrong = [n * p for p in exact_table(model, prompt, other)[-1].exp().tolist()]
    firsts = Counter(y[0] for y in responses)
    assert sum((firsts[a] - e) ** 2 / e for a, e in enumerate(wrong)) > stats.chi2.ppf(0.999, 4)


def test_sampling_is_not_greedy() -> None:
    """Trap 29: many different responses to one prompt, and not the most likely token each time."""
    model = make_model("llama")
    responses, _ = draw(model, PROMPTS[:1], samples=64, tokens=4, stops=())
    assert len(set(map(tuple, responses))) > 16
    best = exact_table(model, PROMPTS[0])[-1].argmax().item()
    assert 0 < sum(y[0] == best for y in responses) < 64


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_sampler_logprobs_are_those_of_the_training_pass(family: str, attention: str) -> None:
    """Traps 1, 2, 8: left padding, KV cache (with windows of 5), rows that leave the batch: log-probs to 1e-4.

    Held to the model's forward pass of each response alone and to the rows that training uses.
    """
    model = make_model(family, attention)
    responses, logprobs = draw(model, tokens=14)
    lengths = {len(y) for y in responses}
    assert len(lengths) > 3 and 14 in lengths  # rows did leave the batch, others went on
    for i, (y, row) in enumerate(zip(responses, logprobs, strict=True)):
        prompt = PROMPTS[i // 3]
        table = exact_table(model, prompt + y)
        exact = table[range(len(prompt) - 1, len(prompt) + len(y) - 1), y]
        assert row == pytest.approx(exact.tolist(), abs=1e-4)
    groups = [(prompt, responses[3 * p : 3 * p + 3]) for p, prompt in enumerate(PROMPTS)]
    with torch.no_grad():
        training, _ = ppo.response_logprobs(model, ppo.lay_out(groups, 1, PAD, model.device))
    for row, ours in zip(logprobs, training.tolist(), strict=True):
        assert row == pytest.approx(ours[: len(row)], abs=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_logprobs_are_at_the_temperature(temperature: float) -> None:
    """Trap 3: log-probs of what was sampled, at the temperature at which it was sampled."""
    model = make_model("llama")
    responses, logprobs = draw(model, temperature=temperature)
    for i, (y, row) in enumerate(zip(responses, logprobs, strict=True)):
        prompt = PROMPTS[i // 3]
        table = exact_table(model, prompt + y, temperature)
        assert row == pytest.approx([table[len(prompt) - 1 + t, token].item() for t, token in enumerate(y)], abs=1e-4)


# ------------------------------------------------------------------------------------------------- where it stops
def test_responses_stop_at_every_stop_id_and_only_there() -> None:
    """A list of stop ids: each one ends a response and stays in it; the others run to the limit."""
    model, stops = toy(7), (1, 3, 6)
    responses, logprobs = draw(model, [[4, 2], [5]], samples=100, tokens=6, stops=stops)
    assert [len(y) for y in responses] == [len(row) for row in logprobs]
    for y in responses:
        assert not set(y[:-1]) & set(stops)
        assert y[-1] in stops or len(y) == 6
    assert {y[-1] for y in responses} >= set(stops)
    assert any(y[-1] not in stops for y in responses)
    endless, _ = draw(model, [[4, 2], [5]], samples=100, tokens=6, stops=())
    assert {len(y) for y in endless} == {6}
    for y, longer in zip(responses, endless, strict=True):  # a stop cuts, it changes nothing before it
        assert longer[: len(y)] == y


def test_one_token_is_a_response() -> None:
    """max_tokens 1, and a first token that is a stop: nothing is lost."""
    responses, logprobs = draw(toy(7), [[4]], samples=20, tokens=1, stops=(1,))
    assert {len(y) for y in responses} == {len(row) for row in logprobs} == {1}


def test_truncated_responses_are_marked(base: Any, run_ppo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traps 13, 15: `ended` is 1 exactly where the last token is a stop id; rows hold the very ids sampled."""
    seen: list[tuple[ppo.Rollout, list[int]]] = []
    original = ppo.roll_out

    def watched(
        model: Any, tokenizer: Any, prompts: Any, names: Any, samples: int, stop_ids: list[int], *rest: Any
    ) -> Any:
        seen.append((original(model, tokenizer, prompts, names, samples, stop_ids, *rest), stop_ids))
        return seen[-1][0]

    monkeypatch.setattr(ppo, "roll_out", watched)
    run_ppo(max_steps=1, max_response_length=6, batch_size=32, eval_size=8)
    for rollout, stop_ids in seen:
        expected = [float(y[-1] in stop_ids) for y in rollout.responses]
        assert rollout.ended.tolist() == expected and (len(set(expected)) == 2 or len(expected) < 32)
        assert all("<|" not in text for text in rollout.texts)
        assert rollout.mask.sum(1).tolist() == [len(y) for y in rollout.responses]
        for numbers, rows in rollout.batches():  # trap 15: never decoded and encoded again
            for i, targets, mask in zip(numbers, rows.targets, rows.mask.bool(), strict=True):
                assert targets[mask].tolist() == rollout.responses[i]


# ------------------------------------------------------------------------------------- what does not matter, and what
@pytest.mark.parametrize("batch", [1, 3, 6, 7, 1000])
@pytest.mark.parametrize("family", ["llama", "mistral windowed", "gemma3_text", "gpt2"])
def test_batch_size_does_not_change_what_is_sampled(family: str, batch: int) -> None:
    """Trap 1: other rows, other padding: the same tokens and log-probs."""
    model = make_model(family)
    expected, logprobs = draw(model)
    responses, same = draw(model, batch=batch)
    assert responses == expected
    assert sum(same, []) == pytest.approx(sum(logprobs, []), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral windowed", "gemma3_text"])
def test_refilling_changes_no_response(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that wait and take the places of ended responses get what they get alone, in at most `batch` / G rows.

    40 prompts of 1 to 12 tokens, 2 responses each, 12 at once: many joins, with rows of other widths and ages.
    """
    model, alive = make_model(family), []
    prompts = [[5 + (p * k) % 20 for k in range(1, 2 + p * 7 % 12)] for p in range(40)]
    alone = [draw(model, [prompt], [p], samples=2, tokens=20) for p, prompt in enumerate(prompts)]
    joins, goes_on, join = [], ppo.go_on, ppo.join_decodings

    def watched(backbone: Any, decoding: Any, *rest: Any) -> Any:
        alive.append(len(decoding.segment))
        return goes_on(backbone, decoding, *rest)

    def joined(old: Any, new: Any) -> Any:
        joins.append(len(old.segment))
        return join(old, new)

    monkeypatch.setattr(ppo, "go_on", watched)
    monkeypatch.setattr(ppo, "join_decodings", joined)
    responses, logprobs = draw(model, prompts, samples=2, tokens=20, batch=12)
    assert responses == [y for ys, _ in alone for y in ys]
    assert sum(logprobs, []) == pytest.approx(sum([row for _, rows in alone for row in rows], []), abs=1e-5)
    assert len(joins) > 8 and max(joins) <= 3 and max(alive) == 6


def test_refilled_rows_follow_the_softmax() -> None:
    """Two prompts of other lengths, 64 responses at once: the first two tokens of those that came in late, chi-square.

    The second token is drawn from a cache that others have left and joined since the first.
    """
    model, n, prompts = toy(5), 6000, ([4, 2], [3, 0, 0, 2])
    responses, _ = draw(model, [prompts[i % 2] for i in range(n)], samples=1, tokens=3, stops=(1,), batch=64)
    for i, prompt in enumerate(prompts):
        first = exact_table(model, prompt)[-1].exp().tolist()
        exact: dict[tuple[int, ...], float] = {(1,): first[1]}
        for a in (0, 2, 3, 4):
            exact |= {(a, b): first[a] * p for b, p in enumerate(exact_table(model, [*prompt, a])[-1].exp().tolist())}
        late = Counter(tuple(y[:2]) for y in responses[64 + i :: 2])
        total = late.total()
        assert sum(exact.values()) == pytest.approx(1) and min(exact.values()) * total > 5
        statistic = sum((late[pair] - total * p) ** 2 / (total * p) for pair, p in exact.items())
        assert statistic < stats.chi2.ppf(0.999, len(exact) - 1)


def test_grouped_heads_attend_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six query heads on two of keys, four new tokens: what transformers gives, without its copies of the keys."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 4, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    mask = torch.where(torch.rand(3, 1, 4, 9) < 0.5, 0.0, torch.finfo(torch.float32).min)
    mask[..., 0] = 0.0
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    given = (module, query, key, value, mask)
    expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](*given, scaling=0.3)
    monkeypatch.setattr(sdpa_attention, "repeat_kv", None)
    with pytest.raises(TypeError):
        ALL_ATTENTION_FUNCTIONS["sdpa"](*given, scaling=0.3)
    with ppo.grouped_heads():
        got, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](*given, scaling=0.3)
    assert got.shape == expected.shape and torch.allclose(got, expected, atol=1e-6)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention.sdpa_attention_forward


def test_decoding_copies_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four query heads on two of keys: no token after the prompt repeats keys for them."""
    model, go_on = make_model("llama"), ppo.go_on
    expected = draw(model)

    def watched(*given: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(sdpa_attention, "repeat_kv", None)
            return go_on(*given)

    monkeypatch.setattr(ppo, "go_on", watched)
    assert draw(model) == expected


@pytest.mark.parametrize("family", ["llama", "mistral windowed", "gemma3_text"])
def test_long_prompts_come_in_pieces(family: str) -> None:
    """Two prompts of 4500 and 3000 tokens are computed in three pieces; responses outgrow the cache's spare columns."""
    model = make_model(family)
    prompts = [[5 + k % 20 for k in range(n)] for n in (4500, 3000)]
    widths: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, __: widths.append(given[0].shape[1]))
    responses, logprobs = draw(model, prompts, samples=2, tokens=100, stops=())
    hook.remove()
    assert widths[:4] == [2048, 2048, 404, 2]
    for i in (0, 2):
        prompt = prompts[i // 2]
        exact = exact_table(model, prompt + responses[i])[range(len(prompt) - 1, len(prompt) + 99), responses[i]]
        assert logprobs[i] == pytest.approx(exact.tolist(), abs=1e-4)


def test_the_cache_is_not_copied_at_every_token() -> None:
    """300 single columns after 5: what concatenation gives, in three tensors at most."""
    torch.manual_seed(0)
    layer, columns, places = ppo.GrowingLayer(), torch.randn(2, 3, 305, 4), set()
    for begin, end in [(0, 5), *((n, n + 1) for n in range(5, 305))]:
        keys, values = layer.update(columns[:, :, begin:end], -columns[:, :, begin:end])
        places.add(keys.data_ptr())
    assert torch.equal(keys, columns) and torch.equal(values, -columns) and len(places) <= 3


def test_other_prompts_and_their_order_do_not_matter() -> None:
    """A prompt alone, in another order, or on another process gives what it gives in the batch, by its name."""
    model = make_model("llama")
    expected, _ = draw(model)
    for p, prompt in enumerate(PROMPTS):
        assert draw(model, [prompt], [p])[0] == expected[3 * p : 3 * p + 3]
    order = [3, 0, 4, 2, 1]
    turned, _ = draw(model, [PROMPTS[p] for p in order], order)
    assert turned == [y for p in order for y in expected[3 * p : 3 * p + 3]]
    split = [draw(model, PROMPTS[rank::2], list(range(5))[rank::2])[0] for rank in range(2)]
    assert split[0][:3] == expected[:3] and split[1][:3] == expected[3:6]


def test_more_samples_and_more_tokens_only_add() -> None:
    """Sample k of a prompt and token t of a sample are what they are, however many are asked for."""
    model = make_model("llama")
    few, _ = draw(model, samples=2, tokens=4)
    many, _ = draw(model, samples=5, tokens=9)
    for p in range(len(PROMPTS)):
        for k in range(2):
            assert few[2 * p + k] == many[5 * p + k][:4]


@pytest.mark.parametrize("key", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_seed_stream_and_step_change_the_draws(key: tuple[int, int, int]) -> None:
    """The same key draws the same; each of its parts, the prompt's name and the sample's number draw anew."""
    model = toy(50)
    one, _ = draw(model, [[4]] * 2, samples=8, tokens=8, stops=())
    assert draw(model, [[4]] * 2, samples=8, tokens=8, stops=())[0] == one
    other, _ = draw(model, [[4]] * 2, samples=8, tokens=8, stops=(), key=key)
    assert all(a != b for a, b in zip(one, other, strict=True))
    assert len(set(map(tuple, one))) == 16  # two names, eight samples: no two alike


def test_draws_of_neighbouring_steps_are_independent() -> None:
    """Of 2000 first tokens at step 0 and step 1 as many agree as chance says: sum p^2, within 4 standard errors."""
    model, n = toy(5), 2000
    one, two = (draw(model, [[4]], samples=n, tokens=1, stops=(), key=(0, 0, step))[0] for step in (0, 1))
    chance = exact_table(model, [4])[-1].exp().square().sum().item()
    agree = sum(a == b for a, b in zip(one, two, strict=True)) / n
    assert abs(agree - chance) < 4 * (chance * (1 - chance) / n) ** 0.5


def test_vocabulary_is_never_left() -> None:
    """A distribution that rounds to 1 before its last token still gives ids inside the vocabulary."""
    model = toy(VOCAB)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)
    responses, logprobs = draw(model, samples=50, tokens=5, stops=())
    assert all(0 <= token < VOCAB for y in responses for token in y)
    assert all(value <= 0 for row in logprobs for value in row)
