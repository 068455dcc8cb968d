"""Flat rows: tokens that can't see each other in one row give what each response gives alone, masks by one rule."""

import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, tiny_llama
from torch import Tensor

import sft

VOCAB, PAD, EOS = 97, 0, 1
IDS = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
SIZES = {
    **IDS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.1,
}  # fmt: skip
SMALL = {**IDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WINDOW = {"sliding_window": 5}  # shorter than every row below
FAMILIES: dict[str, dict[str, Any]] = {  # FLAT_ROW_MODELS, each at least once
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen2 windowed": {**SIZES, **WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": SIZES,
    "mistral": {**SIZES, "sliding_window": None},
    "mistral windowed": {**SIZES, **WINDOW},
    "phi3": {**SIZES, "num_key_value_heads": 4},
    "phi3 windowed": {**SIZES, **WINDOW, "num_key_value_heads": 4},
    "smollm3": {**SIZES, "no_rope_layers": [1, 0]},
    "gpt2": {**IDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gemma2": {**SIZES, **WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {**SIZES, **WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 8,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {  # one response per row, no mask
    "gpt_neox": {**SIZES, "rotary_pct": 0.5},
    "gpt_neo": {**IDS, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 5,
                "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128},
    "gptj": {**IDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8},
    "opt": {**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "falcon": {**SMALL, "new_decoder_architecture": False, "multi_query": True},
    "bloom": {**IDS, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {**IDS, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "stablelm": SIZES,
    "starcoder2": {**SIZES, "sliding_window": None},
    "codegen": {**IDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8},
    "gpt_bigcode": {**IDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "phi": SIZES,
    "gemma": SIZES,
    "olmo": SIZES,
    "olmo2": SIZES,
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen3_moe": {**SIZES, **EXPERTS},
    "glm4": SIZES,
    "nemotron": SIZES,
    "persimmon": SIZES,
    "gpt_oss": {**SIZES, **WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2,
                "layer_types": ["sliding_attention", "full_attention"]},
    "mamba2": {**IDS, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32, "state_size": 16,
               "n_groups": 1, "chunk_size": 8},
    "bamba": {**SIZES, **MAMBA, "attn_layer_indices": [1]},
    "lfm2": {**SIZES, "layer_types": ["conv", "full_attention"]},
}  # fmt: skip
GEMMA2 = ("gemma2", "sdpa")  # its soft cap exists in eager and flex attention only
CASES = [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager") if (family, attention) != GEMMA2]


def make_model(family: str, attention: str | None = None, settings: dict | None = None) -> Any:
    """A random model of the family in eval mode, fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split()[0], **(settings or {**FAMILIES, **OTHERS}[family]))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, p in model.named_parameters():  # norms and biases too: 1 and 0 hide mistakes
        if "A_log" not in name and "dt_bias" not in name:
            p.data += torch.randn_like(p) * 0.05
    return model.eval()


class Data:
    """Prompts of 1 to 9 tokens, 1 to 4 responses of 1 to 8 tokens each; EOS and PAD occur anywhere."""

    def __init__(self, seed: int, n: int = 3, gaps: bool = False) -> None:
        rng = random.Random(seed)

        def ids(longest: int) -> list[int]:
            return [rng.choice([PAD, EOS, rng.randrange(VOCAB)]) for _ in range(rng.randint(1, longest))]

        self.prompts: list[list[int]] = []
        self.responses: list[list[int]] = []
        self.groups: list[list[int]] = []
        for _ in range(n):
            prompt, count = ids(9), rng.randint(1, 4)
            self.groups.append(list(range(len(self.prompts), len(self.prompts) + count)))
            self.prompts += [prompt] * count
            self.responses += [ids(8) for _ in range(count)]
        self.masks = [[int(not gaps or rng.random() < 0.6) for _ in y] for y in self.responses]

    def rows(self, model: Any, limit: int, groups: list[list[int]] | None = None) -> list[sft.Row]:
        """Laid out."""
        return sft.flat_rows(groups or self.groups, self.prompts, self.responses, model, limit, self.masks)

    def alone(self, model: Any) -> list[sft.Row]:
        """One response per row."""
        return self.rows(model, 0, [[i] for i in range(len(self.responses))])


def everything(model: Any, rows: list[sft.Row], weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(log-probs, entropies (B, T), last hidden states (B, d)) and the gradients of one weighted sum of them all."""
    model.zero_grad()
    size = weights.shape
    tables = [torch.zeros(size), torch.zeros(size), torch.zeros(size[0], model.get_output_embeddings().in_features)]
    for row in rows:
        logprobs, entropy = sft.token_logprobs(model, row, entropy_grad=True)
        tables[0][row.at], tables[1][row.at] = logprobs.detach(), entropy.detach()
        last = sft.hidden_states(model, row)[row.last]
        tables[2][row.numbers] = last.detach()
        loss = ((logprobs + 0.3 * entropy) * weights[row.at]).sum() + (last * weights[row.numbers, :1]).sum()
        loss.backward()
    return tables, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def plain_logprobs(model: Any, data: Data, temperature: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """(log-probs in float64, last hidden state) of each response by the model's own forward pass of it alone."""
    rows, last = [], []
    for prompt, y in zip(data.prompts, data.responses, strict=True):
        ids = torch.tensor([prompt + y])
        with torch.no_grad():
            table = (model(ids, use_cache=False).logits[0].double() / temperature).log_softmax(-1)
            last.append(model.base_model(ids, use_cache=False).last_hidden_state[0, -1])
        rows.append(table[range(len(prompt) - 1, len(prompt) + len(y) - 1), y])
    return rows, last


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    """Equal within tolerance, relative to the largest value where that is above 1."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


def assert_exact(tables: list[Tensor], model: Any, data: Data) -> None:
    """The tables hold what the model itself says of each response; 0 where nothing is supervised."""
    for i, (exact, state) in enumerate(zip(*plain_logprobs(model, data), strict=True)):
        counts = torch.tensor(data.masks[i])
        assert_close([tables[0][i, : len(exact)]], [exact.float() * counts])
        assert_close([tables[2][i]], [state])
        assert not tables[0][i, len(exact) :].any() and not tables[1][i, len(exact) :].any()


WEIGHTS = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))


# --------------------------------------------------------------------------------------- flat rows equal own rows
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_flat_rows_equal_own_rows_equal_the_model(family: str, attention: str) -> None:
    """Traps 1, 2, 13, 14, 18: states, log-probs, entropies, gradients, with windows shorter than the rows.

    One row of all groups, rows of a few, each group alone, and each response alone; and the last are held to the
    model's own forward pass, without mask or positions.
    """
    model, data = make_model(family, attention), Data(1, n=4)
    expected = everything(model, data.alone(model), WEIGHTS)
    assert_exact(expected[0], model, data)
    for limit, count in ((1000, 1), (50, 2), (1, 4)):
        rows = data.rows(model, limit)
        assert len(rows) == count
        values, gradients = everything(model, rows, WEIGHTS)
        assert_close(values, expected[0])
        assert_close(gradients, expected[1])


def test_every_family_in_the_list_is_tested() -> None:
    """FLAT_ROW_MODELS promises what the test above holds: one entry for each of its model types."""
    assert {family.split()[0] for family in FAMILIES} == set(sft.FLAT_ROW_MODELS)
    assert not {family.split()[0] for family in OTHERS} & set(sft.FLAT_ROW_MODELS)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_masked_tokens_are_left_out(family: str) -> None:
    """Any of a response's tokens may be supervised: the others have no log-prob and no gradient."""
    model, data = make_model(family), Data(5, gaps=True)
    expected = everything(model, data.alone(model), WEIGHTS)
    assert_exact(expected[0], model, data)
    (row,) = data.rows(model, 1000)
    assert len(row.targets) == sum(map(sum, data.masks))
    values, gradients = everything(model, [row], WEIGHTS)
    assert_close(values, expected[0])
    assert_close(gradients, expected[1])


@pytest.mark.parametrize("family", OTHERS)
def test_other_models_take_one_response_per_row(family: str) -> None:
    """Whatever their attention or state: no mask, the model's own numbers, and gradients for every weight it uses."""
    model, data = make_model(family), Data(1)
    rows = data.rows(model, 1000)
    assert [row.numbers for row in rows] == sorted([row.numbers for row in rows], key=lambda n: -length(data, n[0]))
    assert sorted(row.numbers for row in rows) == [[i] for i in range(len(data.responses))]
    assert all(sft.attention_mask(row, model.config, torch.float32) is None for row in rows)
    values, gradients = everything(model, rows, WEIGHTS)
    assert_exact(values, model, data)
    assert gradients and all(g.isfinite().all() for g in gradients)


def length(data: Data, i: int) -> int:
    """Tokens of a response with its prompt."""
    return len(data.prompts[i]) + len(data.responses[i])


@pytest.mark.parametrize("family", ["opt", "gpt2", "falcon", "bloom", "gpt_neox", "stablelm", "llama", "gptj"])
def test_no_dropout_is_left(family: str, tmp_path: Any) -> None:
    """Traps 5 and 6: every dropout of the config at 0.5: two passes of the loaded model in train mode agree.

    OPT and others keep rates as numbers that functions are given, not as modules.
    """
    model = make_model(family)
    names = [name for name, value in model.config.to_dict().items() if isinstance(value, float) and "drop" in name]
    names += [name for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop") if hasattr(model.config, name)]
    for name in names:
        setattr(model.config, name, 0.5)
    model.save_pretrained(tmp_path)
    data, noisy = Data(1), type(model).from_pretrained(tmp_path).train()

    def difference(model: Any) -> float:
        with torch.no_grad():
            first, second = ([sft.token_logprobs(model, row)[0] for row in data.alone(model)] for _ in range(2))
        return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))

    assert names and difference(noisy) > 1e-3
    args = sft.Args(quant="none", dtype="float32", tokens_per_batch=100, gradient_checkpointing=False)
    assert difference(sft.load_base(str(tmp_path), args, CPU).train()) == 0


@pytest.mark.parametrize(("family", "settings"), [("granite", {"logits_scaling": 4.0}), ("cohere", {})])
def test_scaled_logits_are_refused(family: str, settings: dict, tmp_path: Any) -> None:
    """A model that does something to its logits after lm_head would be trained on other log-probs: one line."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **settings)).save_pretrained(tmp_path)
    with pytest.raises(sft.UserError, match=f"{family} scales its logits after lm_head; not supported"):
        sft.load_base(str(tmp_path), sft.Args(quant="none", dtype="float32", gradient_checkpointing=False), CPU)


def test_a_wrong_mask_is_noticed() -> None:
    """The comparison above can fail: responses that see each other, or positions that run on, are off by more."""
    model, prompts, responses = make_model("llama"), [[5, 6, 7]] * 2, [[8, 9, 10], [11, 12, 13]]
    (right,) = sft.flat_rows([[0, 1]], prompts, responses, model, 100)
    with torch.no_grad():
        good, _ = sft.token_logprobs(model, right)
        blind = right._replace(segment=right.segment.clamp(max=1))
        running = right._replace(positions=torch.arange(9))
        for wrong in (blind, running):
            assert (sft.token_logprobs(model, wrong)[0] - good).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------- who sees whom
def sequences(data: Data) -> list[list[tuple[int, int]]]:
    """For each token of the row of all groups, in order: (response, position) of every sequence that it is part of."""
    found = []
    for members in data.groups:
        n = len(data.prompts[members[0]])
        found += [[(i, t) for i in members] for t in range(n)]
        for i in members:
            found += [[(i, n + t)] for t in range(len(data.responses[i]))]
    return found


@pytest.mark.parametrize("window", [0, 3])
def test_the_rule(window: int) -> None:
    """A token sees what stands before it in its own sequence, a window counted in positions: spelt out pair by pair."""
    data = Data(2)
    (row,) = data.rows(SimpleNamespace(config=SimpleNamespace(model_type="llama"), device=CPU), 1000)
    n, tokens = len(row.ids), sequences(data)
    assert n == len(tokens)
    rule = sft.sees(row, window)
    for i in range(n):
        for j in range(n):
            pairs = [(t, u) for a, t in tokens[i] for b, u in tokens[j] if a == b]
            expected = any(u <= t and (not window or t - u < window) for t, u in pairs)
            assert bool(rule(0, 0, torch.tensor(i), torch.tensor(j))) == expected, (i, j)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("layer_types", [None, ["full_attention", "sliding_attention"]])
def test_mask_by_hand(window: int | None, layer_types: list[str] | None) -> None:
    """[5 6] with [7 8] and [9], [4] with [3]: the additive mask, by layer type where windows and types occur."""
    model = SimpleNamespace(config=SimpleNamespace(model_type="llama"), device=CPU)
    (row,) = sft.flat_rows([[0, 1], [2]], [[5, 6], [5, 6], [4]], [[7, 8], [9], [3]], model, 100)
    config = SimpleNamespace(sliding_window=window, layer_types=layer_types, _attn_implementation="sdpa")
    mask: Any = sft.attention_mask(row, config, torch.float32)
    full = ["1      ", "11     ", "111    ", "1111   ", "11  1  ", "     1 ", "     11"]
    near = ["1      ", "11     ", " 11    ", "  11   ", " 1  1  ", "     1 ", "     11"]  # windows of 2 positions
    masks = mask if isinstance(mask, dict) else {"one": mask}
    assert set(masks) == ({"full_attention", "sliding_attention"} if window and layer_types else {"one"})
    for name, table in masks.items():
        assert table.shape == (1, 1, 7, 7) and table.dtype == torch.float32
        expected = near if window and name != "full_attention" else full
        for i, line in enumerate(expected):
            values = [0.0 if mark == "1" else torch.finfo(torch.float32).min for mark in line]
            assert table[0, 0, i].tolist() == values
    (single,) = sft.flat_rows([[0]], [[5, 6]], [[7, 8]], model, 100)
    assert sft.attention_mask(single, config, torch.float32) is None


FLEX = [f for f in FAMILIES if f != "gpt2"]


@pytest.mark.parametrize("family", FLEX)
def test_flex_attention_equals_the_dense_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's mask on a CPU, where flex attention has a forward pass only: the same rule, the same states."""
    from transformers.integrations import flex_attention

    # what it would compile for a GPU is the same function without the compiler's wait
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", plain_flex)
    model, data = make_model(family, "eager"), Data(6, n=5)
    (row,) = data.rows(model, 1000)
    with torch.no_grad():
        dense = sft.hidden_states(model, row)
        model.set_attn_implementation("flex_attention")
        flex = sft.hidden_states(model, row)
        assert_close([flex], [dense])
        alone = data.alone(model)[0]  # a row of one response has a block mask too
        state, i = sft.hidden_states(model, alone)[alone.last], row.numbers.index(alone.numbers[0])
        assert_close([state], [dense[row.last[i : i + 1]]])


def plain_flex(query: Any, key: Any, value: Any, training: bool = False, **kwargs: Any) -> Any:
    """flex_attention as it is, not compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value, **kwargs)


@pytest.mark.parametrize("window", [0, 3])
def test_the_block_mask_holds_the_rule(window: int) -> None:
    """Blocks that create_block_mask leaves out hold no pair that is seen; the others ask the rule."""
    data = Data(3, n=40)
    (row,) = data.rows(SimpleNamespace(config=SimpleNamespace(model_type="llama"), device=CPU), 10**6)
    n = len(row.ids)
    assert n > 300
    config = SimpleNamespace(sliding_window=window or None, _attn_implementation="flex_attention")
    mask: Any = sft.attention_mask(row, config, torch.float32)
    i = torch.arange(n)
    seen = sft.sees(row, window)(0, 0, i[:, None], i)
    size = mask.BLOCK_SIZE[0]
    blocks = mask.to_dense()[0, 0].bool()
    assert 0 < (~blocks).sum()
    for a in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            part = seen[a * size : (a + 1) * size, b * size : (b + 1) * size]
            assert bool(part.any()) == bool(blocks[a, b])
    assert torch.equal(mask.mask_mod(0, 0, i[:, None], i), seen)


# ---------------------------------------------------------------------------------------------------------- layout
LLAMA = SimpleNamespace(config=SimpleNamespace(model_type="llama"), device=CPU)


def test_rows_by_hand() -> None:
    """[5 6] with [7 8] and [9]; [4] with [3]: every field; positions go on from the prompt in each response."""
    prompts, responses = [[5, 6], [5, 6], [4]], [[7, 8], [9], [3]]
    (row,) = sft.flat_rows([[0, 1], [2]], prompts, responses, LLAMA, 7)
    assert row.ids.tolist() == [5, 6, 7, 8, 9, 4, 3]
    assert row.positions.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert row.group.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert row.segment.tolist() == [0, 0, 1, 1, 2, 0, 1]
    assert row.before.tolist() == [1, 2, 1, 5]  # the first token of each response is told by the prompt
    assert row.targets.tolist() == [7, 8, 9, 3]
    assert [x.tolist() for x in row.at] == [[0, 0, 1, 2], [0, 1, 0, 0]]
    assert row.last.tolist() == [3, 4, 6] and row.numbers == [0, 1, 2]

    first, second = sft.flat_rows([[0, 1], [2]], prompts, responses, LLAMA, 5)
    assert (first.ids.tolist(), second.ids.tolist()) == ([5, 6, 7, 8, 9], [4, 3])
    assert [x.tolist() for x in second.at] == [[2], [0]] and second.numbers == [2]

    (masked,) = sft.flat_rows([[0], [2]], prompts, responses, LLAMA, 7, [[0, 1], [1], [0]])
    assert masked.ids.tolist() == [5, 6, 7, 8, 4, 3]
    assert masked.targets.tolist() == [8] and masked.before.tolist() == [2] and masked.last.tolist() == [3, 5]
    assert [x.tolist() for x in masked.at] == [[0], [1]]


def laid_out(sizes: list[int], limit: int) -> list[list[int]]:
    """Which groups of these sizes are in each row."""
    responses = [[6] * (size - 1) for size in sizes]
    groups = [[i] for i in range(len(sizes))]
    return [row.numbers for row in sft.flat_rows(groups, [[5]] * len(sizes), responses, LLAMA, limit)]


def test_filling_rows_by_hand() -> None:
    """First fit decreasing; what is longer than a row has one of its own; within a row in the order given."""
    assert laid_out([3, 5, 4, 2, 9, 2], 8) == [[4], [0, 1], [2, 3, 5]]
    assert laid_out([2, 2, 2], 1) == [[0], [1], [2]]
    assert laid_out([4, 4], 8) == [[0, 1]]


@pytest.mark.parametrize("limit", [50, 100, 333])
def test_no_row_has_more_tokens_than_allowed(limit: int) -> None:
    """What --tokens_per_batch promises of memory; a group is never cut; nothing is lost; rows are well filled."""
    rng = random.Random(0)
    counts = [rng.randint(1, 4) for _ in range(40)]
    prompts = [prompt for c in counts for prompt in [[5] * rng.randint(1, 30)] * c]
    responses = [[6] * rng.randint(1, 20) for _ in prompts]
    ends = np.cumsum(counts)
    groups = [list(range(end - c, end)) for end, c in zip(ends, counts, strict=True)]
    rows = sft.flat_rows(groups, prompts, responses, LLAMA, limit)
    assert sorted(i for row in rows for i in row.numbers) == list(range(len(prompts)))
    assert all(len(row.ids) <= limit or len(row.group.unique()) == 1 for row in rows)
    assert all(any(set(group) <= set(row.numbers) for row in rows) for group in groups)
    tokens = sum(len(row.ids) for row in rows)
    assert sum(len(prompts[g[0]]) for g in groups) + sum(map(len, responses)) == tokens
    assert limit < 100 or len(rows) <= 1.3 * math.ceil(tokens / limit)


@pytest.mark.parametrize("family", ["llama", "mistral windowed", "gemma3_text"])
def test_conversations_in_rows(family: str) -> None:
    """Traps 14 and 23: every supervised token of every example and the gradient of their sum, whatever the layout."""
    model, rng = make_model(family), random.Random(0)
    examples = []
    for i in range(9):
        n = rng.randint(2, 12)
        mask = [0] + [int(rng.random() < 0.6 or i % 4 == 0) for _ in range(n - 2)] + [1]
        examples.append({"ids": [rng.choice([EOS, rng.randrange(VOCAB)]) for _ in range(n)], "mask": mask})

    def run(limit: int) -> tuple[list, list[Tensor], int]:
        model.zero_grad()
        found: list = [[] for _ in examples]
        rows = sft.conversation_rows(examples, model, SimpleNamespace(tokens_per_batch=limit))
        for row in rows:
            logprobs, _ = sft.token_logprobs(model, row)
            logprobs.sum().backward()
            for i, target, value in zip(row.at[0].tolist(), row.targets.tolist(), logprobs.tolist(), strict=True):
                found[i].append((target, value))
        return found, [p.grad.clone() for p in model.parameters() if p.grad is not None], len(rows)

    layouts = [run(limit) for limit in (1, 25, 1000)]
    assert layouts[0][2] == 9 > layouts[1][2] > layouts[2][2] == 1
    for i, e in enumerate(examples):
        with torch.no_grad():
            table = model(torch.tensor([e["ids"]])).logits[0].double().log_softmax(-1)
        at = [t for t, m in enumerate(e["mask"]) if m]
        for found, _, _ in layouts:
            assert [token for token, _ in found[i]] == [e["ids"][t] for t in at]
            exact = [table[t - 1, e["ids"][t]].item() for t in at]
            assert [value for _, value in found[i]] == pytest.approx(exact, abs=1e-5)
    for _, gradients, _ in layouts[1:]:
        assert_close(gradients, layouts[0][1])


# -------------------------------------------------------------------------------------------------------- log-probs
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logprobs_at_a_temperature(family: str, temperature: float) -> None:
    """Trap 3: the model's logits divided by the temperature, in float64; entropies too."""
    model, data = make_model(family), Data(4)
    rows, _ = plain_logprobs(model, data, temperature)
    with torch.no_grad():
        (row,) = data.rows(model, 1000)
        got, entropy = sft.token_logprobs(model, row, temperature)
        table = (sft.lm_logits(model, sft.hidden_states(model, row)[row.before]).double() / temperature).log_softmax(-1)
    for value, i, t in zip(got.tolist(), *(x.tolist() for x in row.at), strict=True):
        assert value == pytest.approx(rows[i][t].item(), abs=1e-5)
    assert entropy.double() == pytest.approx(-(table.exp() * table).sum(-1), abs=1e-5)


def test_detached_logprobs_are_the_same_and_take_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rollout's log-probs run as an update does, without the pass back through the head that only it needs."""
    model, data = make_model("llama"), Data(4)
    (row,) = data.rows(model, 1000)
    for p in model.get_output_embeddings().parameters():
        p.requires_grad_(False)
    expected = sft.token_logprobs(model, row)
    assert expected[0].requires_grad
    monkeypatch.setattr(torch.autograd, "grad", None)
    got = sft.token_logprobs(model, row, detached=True)
    for a, b in zip(got, expected, strict=True):
        assert not a.requires_grad and torch.equal(a, b)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("trained_head", [False, True])
def test_chunks_change_no_gradient(trained_head: bool, entropy_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient that is taken chunk by chunk equals that of the whole table, to the head's weights too."""
    model, data = make_model("llama"), Data(4)
    (row,) = data.rows(model, 1000)
    model.get_output_embeddings().weight.requires_grad_(trained_head)
    weights = torch.randn(len(row.targets), generator=torch.Generator().manual_seed(1))

    def gradients(loss: Callable[[], Tensor]) -> list[Tensor]:
        model.zero_grad()
        loss().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def whole() -> Tensor:
        table = sft.lm_logits(model, sft.hidden_states(model, row)[row.before]).log_softmax(-1)
        entropy = -(table.exp() * table).sum(-1)
        logprobs = table[range(len(row.targets)), row.targets]
        return ((logprobs + (entropy if entropy_grad else 0)) * weights).sum()

    def chunked() -> Tensor:
        logprobs, entropy = sft.token_logprobs(model, row, entropy_grad=entropy_grad)
        return ((logprobs + (entropy if entropy_grad else 0)) * weights).sum()

    original = sft.chunked_logprobs

    def small(logits: Any, hidden: Any, targets: Any, temperature: float, size: int, every: bool) -> Any:
        return original(logits, hidden, targets, temperature, 3, every)

    monkeypatch.setattr(sft, "chunked_logprobs", small)
    assert len(row.targets) > 9
    assert_close(gradients(chunked), gradients(whole))


def test_gemma2_logits_are_soft_capped() -> None:
    """Gemma 2's cap is part of log pi; without it log-probs differ visibly."""
    model, data = make_model("gemma2"), Data(2)
    model.config.final_logit_softcapping = 0.5
    rows, _ = plain_logprobs(model, data)
    (row,) = data.rows(model, 1000)
    with torch.no_grad():
        got, _ = sft.token_logprobs(model, row)
        for value, i, t in zip(got.tolist(), *(x.tolist() for x in row.at), strict=True):
            assert value == pytest.approx(rows[i][t].item(), abs=1e-5)
        model.config.final_logit_softcapping = None
        assert (sft.token_logprobs(model, row)[0] - got).abs().max() > 0.01


@pytest.mark.parametrize("grad", [False, True])
def test_logits_of_a_batch_never_exist_at_once(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 30: at 512 tokens and a vocabulary of 100,000 no more than 2**25 logits (128 MiB) are asked for at once,
    in the backward pass neither."""
    model, sizes, original = tiny_llama(100_000, EOS, PAD), [], sft.lm_logits
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(grad)

    def counted(model: Any, hidden: Tensor) -> Tensor:
        logits = original(model, hidden)
        sizes.append(logits.numel())
        return logits

    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    monkeypatch.setattr(sft, "lm_logits", counted)
    (row,) = sft.flat_rows([[0]], [[5]], [list(range(511))], model, 1000)
    with torch.set_grad_enabled(grad):
        logprobs, _ = sft.token_logprobs(model, row)
        assert sum(sizes) == 511 * 100_000 and max(sizes) <= 2**25 and (logprobs < 0).all()
        if grad:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                logprobs, _ = sft.token_logprobs(model, row)
            logprobs.sum().backward()
            assert max(saved) < 2**25 and model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
