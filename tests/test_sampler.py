"""The sampler: what it draws is the model's distribution, and a function of (seed, stream, step), prompt and sample."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CPU, record, tiny_llama
from scipy import stats
from test_rows import EOS, EXPERTS, FAMILIES, MAMBA, OTHERS, PAD, SIZES, VOCAB, WINDOW, make_model
from torch import Tensor
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import ppo

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [18, EOS, 19, PAD], [20, 21]]
KEY = (0, 0, 0)
STOPS = (EOS, *range(30, 41))  # one token in eight: some responses end at once, some at the limit

LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {  # states beside keys, and other caches
    "qwen3_next": {**SIZES, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": {**SIZES, **LINEAR},
    "falcon_h1": {**SIZES, **MAMBA, "mamba_d_ssm": 128},
    "granitemoehybrid": {
        **SIZES, **MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 64,
    },
    "gemma3n_text": {
        **SIZES, **WINDOW, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCAB, "activation_sparsity_pattern": [0.0, 0.0],
    },
    "granite": {**SIZES, "logits_scaling": 4.0},
    "cohere": {**SIZES, "logit_scale": 0.0625},
    "llama4_text": {
        **SIZES, "num_local_experts": 2, "intermediate_size_mlp": 128, "moe_layers": [], "attention_chunk_size": 8,
        "no_rope_layers": [1, 0],
    },
    "recurrent_gemma": {
        **SIZES, "lru_width": 64, "attention_window_size": 5, "block_types": ["recurrent", "attention"],
    },
    "minimax": {**SIZES, "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip
REFUSED = {
    "granite": "granite scales its logits after lm_head; not supported",
    "cohere": "cohere scales its logits after lm_head; not supported",
    "llama4_text": "loaded and run",
    "mamba2": "mamba2 models keep their state in no cache of transformers; they can't be sampled",
    "recurrent_gemma": "recurrent_gemma models keep their state in no cache of transformers; they can't be sampled",
    "minimax": "preflight: sampler against training pass",
}
COMMON = (*FAMILIES, "opt", "gpt_oss", "bamba", "lfm2", "qwen3_next", "falcon_h1")
SAMPLED = [
    family if family in COMMON else pytest.param(family, marks=pytest.mark.slow)
    for family in (*FAMILIES, *OTHERS, *MORE)
    if family not in REFUSED
]


def draw(
    model: Any, prompts: list[list[int]] = PROMPTS, names: list[int] | None = None, samples: int = 3, tokens: int = 9,
    temperature: float = 1.0, stops: tuple[int, ...] = STOPS, batch: int = 128, key: tuple[int, int, int] = KEY,
    static: bool | None = None,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """ppo.sample with the defaults of these tests."""
    names = list(range(len(prompts))) if names is None else names
    return ppo.sample(model, prompts, names, samples, tokens, temperature, list(stops), batch, key, static)


def exact_table(model: Any, ids: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities (T, V) after each of the ids, by the model's own forward pass of one row, in float64."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids]), use_cache=False).logits[0]
    return (logits.double() / temperature).log_softmax(-1)


def exact_logprobs(model: Any, prompt: list[int], y: list[int], temperature: float = 1.0) -> list[float]:
    """Log-probs of a response, by the model's own forward pass."""
    table = exact_table(model, prompt + y, temperature)
    return table[range(len(prompt) - 1, len(prompt) + len(y) - 1), y].tolist()


def trained_logprobs(model: Any, responses: list[list[int]], samples: int, limit: int = 200) -> list[list[float]]:
    """Log-probs of `samples` responses to each of PROMPTS, by the rows and the pass that training uses."""
    groups = [list(range(i, i + samples)) for i in range(0, len(responses), samples)]
    prompts = [prompt for prompt in PROMPTS for _ in range(samples)]
    mask = torch.zeros(len(responses), max(map(len, responses)))
    rows = ppo.flat_rows(groups, prompts, responses, model, limit)
    table, _ = ppo.role_logprobs(model, "policy", rows, mask, SimpleNamespace(temperature=1.0))
    return [values[: len(y)] for values, y in zip(table.tolist(), responses, strict=True)]


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
    responses, _ = draw(model, [prompt] * 80, samples=100, tokens=2, temperature=temperature, stops=(), batch=4000)
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


@pytest.mark.parametrize("static", [False, True])
def test_rows_that_others_have_left_follow_the_softmax(static: bool) -> None:
    """Two prompts of other lengths, a third of the responses end at once: the second token of the rest, chi-square."""
    model, n, prompts = toy(5), 6000, ([4, 2], [3, 0, 0, 2])
    given = [prompts[i % 2] for i in range(n // 50)]
    responses, _ = draw(model, given, samples=50, tokens=3, stops=(1,), batch=3000, static=static)
    for i, prompt in enumerate(prompts):
        first = exact_table(model, prompt)[-1].exp().tolist()
        exact: dict[tuple[int, ...], float] = {(1,): first[1]}
        for a in (0, 2, 3, 4):
            exact |= {(a, b): first[a] * p for b, p in enumerate(exact_table(model, [*prompt, a])[-1].exp().tolist())}
        mine = Counter(tuple(y[:2]) for k, y in enumerate(responses) if k // 50 % 2 == i)
        total = mine.total()
        assert sum(exact.values()) == pytest.approx(1) and min(exact.values()) * total > 5
        statistic = sum((mine[pair] - total * p) ** 2 / (total * p) for pair, p in exact.items())
        assert statistic < stats.chi2.ppf(0.999, len(exact) - 1)


def test_sampling_is_not_greedy() -> None:
    """Trap 29: many different responses to one prompt, and not the most likely token each time."""
    model = make_model("llama")
    responses, _ = draw(model, PROMPTS[:1], samples=64, tokens=4, stops=())
    assert len(set(map(tuple, responses))) > 16
    best = exact_table(model, PROMPTS[0])[-1].argmax().item()
    assert 0 < sum(y[0] == best for y in responses) < 64


# ------------------------------------------------------------------------------------------------- every family
def check_logprobs(model: Any) -> None:
    """The sampler's log-probs are those of each response alone and of the training pass, to 1e-4."""
    attention = model.config._attn_implementation
    responses, logprobs = draw(model, tokens=14)
    assert model.config._attn_implementation == attention
    lengths = {len(y) for y in responses}
    assert len(lengths) > 3 and 14 in lengths  # rows did leave the batch, others went on
    trained = trained_logprobs(model, responses, 3)
    for i, (y, row) in enumerate(zip(responses, logprobs, strict=True)):
        assert row == pytest.approx(exact_logprobs(model, PROMPTS[i // 3], y), abs=1e-4)
        assert row == pytest.approx(trained[i], abs=1e-4)
    assert draw(model, tokens=14, batch=4)[0] == responses  # other rows, other padding: the same tokens


def load(family: str, folder: Path) -> Any:
    """A model of the family as load_base loads it."""
    make_model(family, settings=MORE.get(family)).save_pretrained(folder)
    args = ppo.Args(model=str(folder), quant="none", dtype="float32")
    ppo.settle_precision(args, CPU)
    return ppo.load_base(str(folder), args, CPU)


@pytest.mark.parametrize("family", SAMPLED)
def test_sampler_logprobs_are_those_of_the_training_pass(family: str, tmp_path: Path) -> None:
    """Traps 1, 2, 8: left padding, caches of keys, windows and states, rows that leave the batch."""
    check_logprobs(load(family, tmp_path))


@pytest.mark.parametrize("family", ["llama", "mistral windowed", "gemma2", "gemma3_text", "gpt2", "qwen3_next"])
def test_so_are_they_under_eager_attention(family: str, tmp_path: Path) -> None:
    """A model that was loaded with attn_implementation="eager"; Gemma 2's soft cap exists there only."""
    model = load(family, tmp_path)
    model.set_attn_implementation("eager")
    check_logprobs(model)


@pytest.mark.parametrize("family", REFUSED)
def test_what_does_not_work_is_one_line(family: str, tmp_path: Path) -> None:
    """Logits scaled after lm_head, odd classes, caches of a model's own: refused when loaded, sampled, or before the
    first update, never by a traceback and never silently."""
    with pytest.raises(ppo.UserError) as caught:
        model = load(family, tmp_path)
        responses, logprobs = draw(model, tokens=14)
        trained = trained_logprobs(model, responses, 3)
        old, sampled, mask = (
            torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in rows], batch_first=True)
            for rows in (trained, logprobs, [[1.0] * len(y) for y in responses])
        )
        rows = ppo.flat_rows([[i] for i in range(15)], [p for p in PROMPTS for _ in range(3)], responses, model, 0)
        rollout = ppo.Rollout([], responses, [], [rows], mask, torch.ones(15), sampled)
        ppo.preflight(model, rollout, old, old, ppo.Args(dtype="float32"))
    assert REFUSED[family] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_logprobs_are_at_the_temperature(temperature: float) -> None:
    """Trap 3: log-probs of what was sampled, at the temperature at which it was sampled."""
    model = make_model("llama")
    responses, logprobs = draw(model, temperature=temperature)
    for i, (y, row) in enumerate(zip(responses, logprobs, strict=True)):
        assert row == pytest.approx(exact_logprobs(model, PROMPTS[i // 3], y, temperature), abs=1e-4)


# ------------------------------------------------------------------------------------------- three ways, one result
@pytest.mark.parametrize("family", ppo.SIDE_BY_SIDE_MODELS)
def test_fixed_shapes_give_the_same_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA graph's path, without the graph, and one response per row: in float64 no token differs.

    In float32 a uniform number within 1e-6 of a border may fall on its other side.
    """
    model = make_model(family).double()
    expected, logprobs = draw(model, tokens=14, static=False)
    ways = [draw(model, tokens=14, static=True), draw(model, tokens=14, static=True, batch=4)]
    monkeypatch.setattr(ppo, "SIDE_BY_SIDE_MODELS", ())
    ways.append(draw(model, tokens=14))
    for responses, same in ways:
        assert responses == expected
        assert sum(same, []) == pytest.approx(sum(logprobs, []), abs=1e-5)


def test_fixed_shapes_are_fixed() -> None:
    """Every decoding step computes all places of all rows, attends to all columns, and a look at the end comes each 8
    tokens: what a CUDA graph replays."""
    model, shapes = make_model("llama"), []
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, given: shapes.append((*given["hidden_states"].shape[:2], given["attention_mask"].shape[-1])),
        with_kwargs=True,
    )
    draw(model, tokens=14, static=True)
    steps, shapes[:] = shapes[1:], []
    draw(model, tokens=14, static=False)
    hook.remove()
    assert set(steps) == {(5, 3, 9 + 48)} and len(steps) == 13
    assert shapes[0][:2] == (5, 9) and len(set(shapes[1:])) > 6  # rows and places leave, columns come


def test_families_side_by_side_are_those_with_flat_rows() -> None:
    """Every family that the sampler lets grow side by side is tested, and has flat rows of several responses too."""
    assert set(ppo.SIDE_BY_SIDE_MODELS) <= set(ppo.FLAT_ROW_MODELS) == {family.split()[0] for family in FAMILIES}


# ------------------------------------------------------------------------------------------------- where it stops
@pytest.mark.parametrize("static", [False, True])
def test_responses_stop_at_every_stop_id_and_only_there(static: bool) -> None:
    """A list of stop ids: each one ends a response and stays in it; the others run to the limit."""
    model, stops = toy(7), (1, 3, 6)
    responses, logprobs = draw(model, [[4, 2], [5]], samples=100, tokens=6, stops=stops, batch=200, static=static)
    assert [len(y) for y in responses] == [len(row) for row in logprobs]
    for y in responses:
        assert not set(y[:-1]) & set(stops)
        assert y[-1] in stops or len(y) == 6
    assert {y[-1] for y in responses} >= set(stops)
    assert any(y[-1] not in stops for y in responses)
    endless, _ = draw(model, [[4, 2], [5]], samples=100, tokens=6, stops=(), batch=200, static=static)
    assert {len(y) for y in endless} == {6}
    for y, longer in zip(responses, endless, strict=True):  # a stop cuts, it changes nothing before it
        assert longer[: len(y)] == y


@pytest.mark.parametrize("static", [False, True])
def test_one_token_is_a_response(static: bool) -> None:
    """max_tokens 1, and a first token that is a stop: nothing is lost."""
    responses, logprobs = draw(toy(7), [[4]], samples=20, tokens=1, stops=(1,), static=static)
    assert {len(y) for y in responses} == {len(row) for row in logprobs} == {1} and len(responses) == 20
    ended, _ = draw(toy(7), [[4]], samples=20, tokens=30, stops=tuple(range(7)), static=static)
    assert ended == responses


def test_truncated_responses_are_marked(run_ppo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traps 13, 15: `ended` is 1 exactly where the last token is a stop id; rows hold the very ids sampled."""
    seen = record(monkeypatch, ppo, "roll_out")
    run_ppo(max_steps=1, max_response_length=6, batch_size=32, eval_size=8)
    for ((_, _, stop_ids), *_), rollout in seen:
        expected = [float(y[-1] in stop_ids) for y in rollout.responses]
        assert rollout.ended.tolist() == expected and (len(set(expected)) == 2 or len(expected) < 32)
        assert all("<|end|>" not in text for text in rollout.texts)
        assert rollout.mask.sum(1).tolist() == [len(y) for y in rollout.responses]
        table = torch.full(rollout.mask.shape, -1)
        for row in rollout.rows():  # trap 15: never decoded and encoded again
            table[row.at] = row.targets
        for i, y in enumerate(rollout.responses):
            assert table[i].tolist() == y + [-1] * (table.shape[1] - len(y))
    assert len(seen) == 3


# ------------------------------------------------------------------------------------- what does not matter, and what
@pytest.mark.parametrize("batch", [1, 3, 6, 7, 1000])
@pytest.mark.parametrize("family", ["llama", "mistral windowed", "gpt2"])
def test_batch_size_does_not_change_what_is_sampled(family: str, batch: int) -> None:
    """Trap 1: other rows, other padding: the same tokens and log-probs."""
    model = make_model(family)
    expected, logprobs = draw(model)
    responses, same = draw(model, batch=batch)
    assert responses == expected
    assert sum(same, []) == pytest.approx(sum(logprobs, []), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral windowed"])
def test_batch_size_bounds_the_responses_at_once(family: str) -> None:
    """At most `batch` responses are decoded at a time, at least one prompt's."""
    model, widths = make_model(family), []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, __: widths.append(given[0].shape))
    for batch, most in ((1, 3), (3, 3), (7, 6), (128, 15)):
        widths.clear()
        draw(model, tokens=4, batch=batch, stops=())
        assert max(rows * n if family == "llama" else rows for rows, n in widths[1:4]) == most
    hook.remove()


def test_grouped_heads_attend_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six query heads on two of keys, four new tokens: what transformers gives, without its copies of the keys."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 4, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    mask = torch.where(torch.rand(3, 1, 4, 9) < 0.5, 0.0, torch.finfo(torch.float32).min)
    mask[..., 0] = 0.0
    module: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    given = (module, query, key, value, mask)
    expected, _ = sdpa_attention_forward(*given, scaling=0.3)
    monkeypatch.setattr(sdpa_attention, "repeat_kv", None)
    with pytest.raises(TypeError):
        sdpa_attention_forward(*given, scaling=0.3)
    got, _ = ppo.grouped_attention(*given, scaling=0.3)
    assert got.shape == expected.shape and torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("static", [False, True])
def test_sampling_copies_no_keys(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four query heads on two of keys, padded prompts: neither prompts nor decoding repeat keys for them."""
    model = make_model("llama")
    expected = draw(model, static=static)
    monkeypatch.setattr(sdpa_attention, "repeat_kv", None)
    assert draw(model, static=static) == expected


@pytest.mark.parametrize("family", ["llama", pytest.param("mistral windowed", marks=pytest.mark.slow)])
def test_long_prompts(family: str) -> None:
    """Two prompts of 4500 and 3000 tokens; where rows are shared they are computed in three pieces."""
    model = make_model(family)
    prompts = [[5 + k % 20 for k in range(n)] for n in (4500, 3000)]
    widths: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, __: widths.append(given[0].shape[1]))
    responses, logprobs = draw(model, prompts, samples=2, tokens=20, stops=())
    hook.remove()
    assert widths[:4] == ([2048, 2048, 404, 2] if family == "llama" else [4500, 1, 1, 1])
    for i in (0, 2):
        assert logprobs[i] == pytest.approx(exact_logprobs(model, prompts[i // 2], responses[i]), abs=1e-4)


def test_the_cache_is_not_copied_at_every_token() -> None:
    """300 single columns after 5: what concatenation gives, in one tensor with room for them all."""
    torch.manual_seed(0)
    layer, columns, places = ppo.RoomyLayer(305), torch.randn(2, 3, 305, 4), set()
    for begin, end in [(0, 5), *((n, n + 1) for n in range(5, 305))]:
        keys, values = layer.update(columns[:, :, begin:end], -columns[:, :, begin:end])
        places.add(keys.data_ptr())
        assert keys.shape[2] == end
    assert torch.equal(keys, columns) and torch.equal(values, -columns) and len(places) == 1


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


@pytest.mark.parametrize("key", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_draws_of_neighbours_are_independent(key: tuple[int, int, int]) -> None:
    """Of 2000 first tokens with neighbouring keys as many agree as chance says: sum p^2, within 4 standard errors."""
    model, n = toy(5), 2000
    one, two = (draw(model, [[4]], samples=n, tokens=1, stops=(), batch=n, key=k)[0] for k in (KEY, key))
    chance = exact_table(model, [4])[-1].exp().square().sum().item()
    for a, b in ((one, two), (one[1:], one[:-1])):
        agree = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
        assert abs(agree - chance) < 4 * (chance * (1 - chance) / n) ** 0.5


def test_vocabulary_is_never_left() -> None:
    """A distribution that rounds to 1 before its last token still gives ids inside the vocabulary."""
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)
    responses, logprobs = draw(model, samples=50, tokens=5, stops=())
    assert all(0 <= token < VOCAB for y in responses for token in y)
    assert all(value <= 0 for row in logprobs for value in row)


def test_the_last_uniform_number_draws_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise at both ends of [0, 1): the first and the last token, with their log-probs, nothing beyond."""
    model = toy(7)
    for value, token in ((0.0, 0), (1.0 - 2**-53, 6)):
        numbers = SimpleNamespace(random=lambda n, value=value: torch.full((n,), value, dtype=torch.float64).numpy())
        monkeypatch.setattr(ppo.np.random, "Generator", lambda bit, numbers=numbers: numbers)
        responses, logprobs = draw(model, [[4, 2]], samples=2, tokens=3, stops=())
        assert responses == [[token] * 3] * 2
        assert logprobs[0] == pytest.approx(exact_logprobs(model, [4, 2], [token] * 3), abs=1e-4)
