"""Pure functions of the scripts against tests/reference.py, numbers worked by hand, and exact expectations."""

import doctest
import importlib
import math
import random
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import ROOT, STAGES, tiny_llama
from scipy import stats
from torch import Tensor

import ppo
import sft

PRESENT = [stage for stage in STAGES if (ROOT / f"{stage}.py").is_file()]


@dataclass
class Ragged:
    """Random responses of unequal lengths: as lists, and as tensors whose padding holds garbage."""

    lists: dict[str, list[list[float]]]
    tensors: dict[str, Tensor]
    mask: Tensor


def ragged(seed: int, extra_columns: int = 0, names: str = "a b c d") -> Ragged:
    """Up to 6 responses of 1 to 9 tokens; `extra_columns` adds padding. Float64, so that comparisons are tight."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 9) for _ in range(rng.randint(2, 6))]
    width = max(lengths) + extra_columns
    lists = {name: [[rng.gauss(0, 1) for _ in range(n)] for n in lengths] for name in names.split()}
    tensors = {
        name: torch.tensor([row + [rng.choice([1e3, -77.0])] * (width - len(row)) for row in rows], dtype=torch.float64)
        for name, rows in lists.items()
    }
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    return Ragged(lists, tensors, mask)


def assert_rows(tensor: Tensor, rows: list[list[float]], tolerance: float = 1e-12) -> None:
    """The tensor's first tokens equal the ragged rows, and its padding is 0."""
    for got, row in zip(tensor.tolist(), rows, strict=True):
        assert got[: len(row)] == pytest.approx(row, abs=tolerance)
        assert all(value == 0 for value in got[len(row) :])


SEEDS = pytest.mark.parametrize("seed", range(8))
PADDED = pytest.mark.parametrize("extra_columns", [0, 37])


# ---------------------------------------------------------------------------------------- against the reference
@SEEDS
@PADDED
def test_masked_mean_is_the_mean_over_tokens(seed: int, extra_columns: int) -> None:
    """Trap 11: no padding in metrics; trap 22: a token counts the same whatever the length of its response."""
    x = ragged(seed, extra_columns)
    got = ppo.masked_mean(x.tensors["a"], x.mask).item()
    assert got == pytest.approx(reference.masked_mean(x.lists["a"]), abs=1e-12)


@SEEDS
@PADDED
def test_whitening_sees_the_mask_only(seed: int, extra_columns: int) -> None:
    """Trap 10: mean 0 and variance 1 over the mask; padding, whatever it holds, changes nothing and comes out as 0."""
    x = ragged(seed, extra_columns)
    white = ppo.masked_whiten(x.tensors["a"], x.mask)
    assert_rows(white, reference.whiten(x.lists["a"]), 1e-9)
    kept = white[x.mask.bool()]
    assert kept.mean().item() == pytest.approx(0, abs=1e-9)
    assert kept.var(unbiased=False).item() == pytest.approx(1, abs=1e-6)


def test_whitening_over_processes_uses_the_whole_batch() -> None:
    """Two processes (threads here) with unequal shares of the batch, whose sums are added, whiten as one does."""
    x = ragged(3)
    barrier, table = threading.Barrier(2), [torch.zeros(())] * 2

    def whiten(process: int, rows: slice) -> Tensor:
        def total(sums: Tensor) -> Tensor:
            table[process] = sums
            barrier.wait(10)
            result = table[0] + table[1]
            barrier.wait(10)
            return result

        return ppo.masked_whiten(x.tensors["a"][rows], x.mask[rows], total)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(whiten, range(2), (slice(0, 1), slice(1, None))))
    assert torch.allclose(torch.cat(parts), ppo.masked_whiten(x.tensors["a"], x.mask), atol=1e-12)


@SEEDS
@PADDED
def test_rewards_hold_the_kl_and_the_score(seed: int, extra_columns: int) -> None:
    """Trap 13: the score lies on the last real token of every row, also in a row that fills the whole width."""
    x = ragged(seed, extra_columns)
    scores = [float(i) + 0.5 for i in range(len(x.mask))]
    # garbage in the padding of log-probs is multiplied by the mask
    got = ppo.kl_penalty_rewards(
        torch.tensor(scores, dtype=torch.float64), x.tensors["a"], x.tensors["b"], x.mask, kl_coef=0.3
    )
    assert_rows(got, reference.kl_penalty_rewards(scores, x.lists["a"], x.lists["b"], 0.3))


@SEEDS
@PADDED
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_discounted_sum_of_td_errors(seed: int, extra_columns: int, gamma: float, lam: float) -> None:
    """Trap 12: no value and no reward of padding enters; equal to the definition for every gamma and lambda."""
    x = ragged(seed, extra_columns)
    rewards = x.tensors["a"] * x.mask  # kl_penalty_rewards leaves no garbage; values do hold it
    advantages, returns = ppo.gae(rewards, x.tensors["b"], x.mask, gamma, lam)
    rows = [reference.gae(r, v, gamma, lam) for r, v in zip(x.lists["a"], x.lists["b"], strict=True)]
    assert_rows(advantages, [row[0] for row in rows])
    assert_rows(returns, [row[1] for row in rows])


@SEEDS
def test_gae_with_lambda_1_is_reward_to_go_minus_value(seed: int) -> None:
    """The Monte Carlo limit: A_t = sum of the rewards from t on - V_t, and the return is the reward to go."""
    x = ragged(seed, 2)
    advantages, returns = ppo.gae(x.tensors["a"] * x.mask, x.tensors["b"], x.mask, 1.0, 1.0)
    to_go = [reference.reward_to_go(row, 1.0) for row in x.lists["a"]]
    assert_rows(returns, to_go)
    expected = [[g - v for g, v in zip(*rows, strict=True)] for rows in zip(to_go, x.lists["b"], strict=True)]
    assert_rows(advantages, expected)


def test_gae_by_hand() -> None:
    """r = 1, 0, 2; V = 0.5, 1, 1; gamma 0.5, lambda 0.5: deltas 1, -0.5, 1; A_3 = 1, A_2 = -0.25, A_1 = 0.9375."""
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.0]])
    advantages, returns = ppo.gae(rewards, values, torch.ones(1, 3), 0.5, 0.5)
    assert advantages.tolist() == [[0.9375, -0.25, 1.0]]
    assert returns.tolist() == [[1.4375, 0.75, 2.0]]


@SEEDS
@pytest.mark.parametrize("clip", [0.1, 0.2])
def test_losses_equal_the_reference(seed: int, clip: float) -> None:
    """Trap 28 and eqs. 7 and 8 of PPO: every real token, several clips, both signs of the advantage."""
    x = ragged(seed)
    a, b, c = (x.tensors[name] for name in "abc")
    tables: list[tuple[Tensor, Callable[..., float]]] = [
        (ppo.clipped_policy_loss(a, b, c, clip), reference.clipped_policy_loss),
        (ppo.penalty_policy_loss(a, b, c, clip), reference.penalty_policy_loss),
        (ppo.clipped_value_loss(a, b, c, clip), reference.clipped_value_loss),
    ]
    for got, function in tables:
        rows = [
            [function(*values, clip) for values in zip(*rows, strict=True)]
            for rows in zip(*(x.lists[name] for name in "abc"), strict=True)
        ]
        for tensor_row, row in zip(got.tolist(), rows, strict=True):
            assert tensor_row[: len(row)] == pytest.approx(row, rel=1e-10, abs=1e-10)


def test_policy_loss_gradient_stops_where_it_is_clipped() -> None:
    """A > 0 and ratio above 1 + c, or A < 0 and ratio below 1 - c: no gradient; on the other two sides: -ratio A."""
    ratios, advantages = torch.tensor([[1.5, 0.5, 1.5, 0.5]]), torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    logprobs = ratios.log().requires_grad_()
    ppo.clipped_policy_loss(logprobs, torch.zeros(1, 4), advantages, 0.2).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([0.0, 0.0, 1.5, -0.5])


def test_value_clip_takes_the_larger_error() -> None:
    """Trap 28: V has run from 0 to 1 past a return of 1: the clipped 0.2 errs more (0.32); from 0 to -1, V itself does.

    The form without max, 1/2 (clip(V) - ret)^2, would give the same in the first case and 0.72 instead of 2 in the
    second, with no gradient that leads back.
    """
    values = torch.tensor([[1.0, -1.0]], requires_grad=True)
    loss = ppo.clipped_value_loss(values, torch.zeros(1, 2), torch.ones(1, 2), 0.2)
    assert loss[0].tolist() == pytest.approx([0.32, 2.0])
    without_max = 0.5 * (values.clamp(-0.2, 0.2) - 1) ** 2
    assert without_max[0].tolist() == pytest.approx([0.32, 0.72])
    loss.sum().backward()
    assert values.grad is not None and values.grad[0].tolist() == pytest.approx([0.0, -2.0])


@pytest.mark.parametrize(("kl", "expected"), [(6.0, 0.1), (6.6, 0.101), (12.0, 0.102), (0.0, 0.098), (5.4, 0.099)])
def test_kl_controller_by_hand(kl: float, expected: float) -> None:
    """Target 6, 100 of 1000 responses: 10 % of the relative error, which is held within 20 %."""
    got = ppo.adapt_kl_coef(0.1, kl, 6.0, 100, 1000)
    assert got == pytest.approx(expected) == pytest.approx(reference.adapt_kl_coef(0.1, kl, 6.0, 100, 1000))


@SEEDS
@PADDED
def test_sft_loss_is_the_mean_over_the_batch(seed: int, extra_columns: int) -> None:
    """Traps 14 and 23: padding holds garbage and adds nothing; halves of the batch add up to the whole."""
    x = ragged(seed, extra_columns)
    n = int(x.mask.sum())
    expected = reference.sft_loss(x.lists["a"])
    assert sft.sft_loss(x.tensors["a"], x.mask, n).item() == pytest.approx(expected, abs=1e-12)
    parts = [sft.sft_loss(x.tensors["a"][s], x.mask[s], n) for s in (slice(0, 1), slice(1, None))]
    assert sum(part.item() for part in parts) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("total", "ratio"), [(1, 0.0), (1, 1.0), (7, 0.05), (100, 0.1), (3, 0.5)])
def test_learning_rate(total: int, ratio: float) -> None:
    """Equal to the reference at every step, never 0 at the first, never above the peak, a tenth at the end."""
    rates = [ppo.learning_rate_at(step, total, 0.01, ratio) for step in range(total + 1)]
    assert rates == pytest.approx([reference.learning_rate(step, total, 0.01, ratio) for step in range(total + 1)])
    assert all(0 < rate <= 0.01 for rate in rates) and max(rates[:total]) == pytest.approx(0.01)


ALONE: Any = SimpleNamespace(total=lambda *values: list(values))  # a Run of one process


@SEEDS
@PADDED
def test_metrics_are_means_over_real_tokens(seed: int, extra_columns: int) -> None:
    """Trap 11: score, reward, kl per response; entropy and explained variance per token; garbage padding unseen."""
    x = ragged(seed, extra_columns, "rewards log_ratio entropy values returns")
    t, n, lists = x.tensors, len(x.mask), x.lists
    columns = {"score": torch.arange(n, dtype=torch.float64), "response_length": x.mask.sum(1)}
    columns |= {"eos_rate": torch.tensor([1.0] + [0.0] * (n - 1)), "reward": (t["rewards"] * x.mask).sum(1)}
    columns |= {"kl": (t["log_ratio"] * x.mask).sum(1), "entropy": t["entropy"].masked_fill(x.mask == 0, math.nan)}
    metrics = ppo.batch_means(ALONE, columns)
    metrics["explained_variance"] = ppo.explained_variance(ALONE, t["values"], t["returns"], x.mask)
    expected = {
        "score": (n - 1) / 2,
        "reward": sum(map(sum, lists["rewards"])) / n,
        "kl": sum(map(sum, lists["log_ratio"])) / n,
        "entropy": reference.masked_mean(lists["entropy"]),
        "response_length": sum(map(len, lists["log_ratio"])) / n,
        "eos_rate": 1 / n,
        "explained_variance": reference.explained_variance(lists["values"], lists["returns"]),
    }
    assert metrics == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_gold_score_of_none_is_left_out_of_the_mean() -> None:
    """Trap 31: what a judge could not judge is neither 0 nor a loss: the mean of 1, None, 3 is 2."""
    golds = torch.tensor([1.0, math.nan, 3.0])
    assert ppo.batch_means(ALONE, {"gold": golds, "score": torch.ones(3)}) == {"gold": 2.0, "score": 1.0}
    assert ppo.batch_means(ALONE, {"gold": golds * math.nan, "score": torch.ones(3)}) == {"score": 1.0}


@pytest.mark.parametrize("seed", range(3))
def test_interval_covers_as_often_as_it_says(seed: int) -> None:
    """The 95 % interval of the mean of 100 draws covers the true mean in about 95 % of 2000 repetitions."""
    draws = np.random.default_rng(seed).exponential(size=(2000, 100))
    covered = [low <= 1 <= high for _, low, high in map(ppo.interval, draws)]
    assert 0.92 < np.mean(covered) < 0.965
    assert ppo.interval(np.array([1.0, math.nan, 3.0]))[0] == 2.0


@pytest.mark.parametrize(("won", "n"), [(0, 1), (1, 1), (3, 10), (50, 100), (999, 1000)])
def test_wilson_interval(won: int, n: int) -> None:
    """Equal to scipy's; inside [0, 1] where the normal approximation leaves it."""
    expected = stats.binomtest(won, n).proportion_ci(0.95, "wilson")
    assert ppo.wilson_interval(won / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_closing_report_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """Two wins, a tie and a loss: 0.625; a prompt that the judge declined is in no mean and in no win-rate."""
    written: list[dict] = []
    run: Any = SimpleNamespace(stage="ppo", total_steps=7, add=lambda name, rows: written.extend(rows))
    prompts = [{"prompt": f"prompt {i}", "columns": {"id": 100 + i}} for i in range(5)]
    ended, length = np.array([1.0, 1.0, 1.0, 0.0, 0.0]), np.array([3, 4, 5, 6, 7])
    shared = {"ended": ended, "length": length}
    before = {"texts": ["a"] * 5, "gold": np.array([0.0, 1.0, 1.0, 2.0, math.nan]), "kl": np.zeros(5), **shared}
    after = {"texts": ["b"] * 5, "gold": np.array([1.0, 2.0, 1.0, 1.0, 5.0]), "kl": np.ones(5), **shared}
    table = ppo.report(run, prompts, before, after)
    assert table["prompts"] == 5 and table["sft"]["gold"][0] == 1.0 and table["ppo"]["gold"][0] == 2.0
    assert table["ppo"]["kl"] == (1.0, 1.0, 1.0) and table["sft"]["ended"] == (0.6, *ppo.wilson_interval(0.6, 5))
    assert table["gold_win_rate"] == (0.625, *ppo.wilson_interval(0.625, 4))
    assert [row["model"] for row in written] == ["sft"] * 5 + ["ppo"] * 5
    assert [row["finish_reason"] for row in written[:5]] == ["stop"] * 3 + ["length"] * 2
    assert [row["id"] for row in written[5:]] == [100, 101, 102, 103, 104]
    lines = capsys.readouterr().out.splitlines()
    row = {line[:26].strip(): line[26:].split() for line in lines if len(line) > 40}
    assert row["5 held-out prompts"] == ["SFT", "(reference)", "PPO", "(policy)"]
    assert row["gold"][0] == "1.000" and row["gold"][3] == "2.000" and row["gold win-rate over SFT"][0] == "0.625"


# ------------------------------------------------------------------------ KL estimators on a vocabulary of 5 tokens
OLD = torch.tensor([0.5, -0.3, 1.2, 0.0, -1.0], dtype=torch.float64).log_softmax(0)
NEW = torch.tensor([0.1, 0.4, 0.9, -0.8, 0.2], dtype=torch.float64)  # logits of the policy that is trained


def exact_kl_gradient(forward: bool) -> list[float]:
    """Gradient with respect to NEW of KL(old, new) (forward) or of KL(new, old)."""
    logits = NEW.clone().requires_grad_()
    new = logits.log_softmax(0)
    kl = (OLD.exp() * (OLD - new)).sum() if forward else (new.exp() * (new - OLD)).sum()
    (gradient,) = torch.autograd.grad(kl, logits)
    return gradient.tolist()


def test_k3_is_unbiased_and_its_gradient_is_that_of_the_kl() -> None:
    """Trap 27: over samples of pi_old the mean of old_new_kl is KL(old, new), and so is the mean of its gradient."""
    logits = NEW.clone().requires_grad_()
    new = logits.log_softmax(0)
    expectation = (OLD.exp() * ppo.old_new_kl(new, OLD)).sum()
    assert expectation.item() == pytest.approx(reference.kl(OLD.exp().tolist(), new.exp().tolist()), abs=1e-12)
    (gradient,) = torch.autograd.grad(expectation, logits)
    assert gradient.tolist() == pytest.approx(exact_kl_gradient(forward=True), abs=1e-12)
    assert gradient.tolist() != pytest.approx(exact_kl_gradient(forward=False), abs=1e-2)  # the test can tell them


def test_k1_in_the_reward_gives_the_gradient_of_the_reverse_kl() -> None:
    """Trap 27: the policy gradient with the rewards of kl_penalty_rewards is exactly -beta grad KL(pi, ref).

    On-policy the expectation over tokens y of grad log pi(y) * reward(y) is a finite sum. Neither KL(ref, pi), which
    k3 in the reward would give, nor 0, which k1 as a loss would, comes out.
    """
    logits = NEW.clone().requires_grad_()
    new = logits.log_softmax(0)
    tokens = new.detach()[:, None]  # 5 responses of one token: every token once
    rewards = ppo.kl_penalty_rewards(torch.zeros(5), tokens, OLD[:, None], torch.ones(5, 1, dtype=torch.long), 0.7)
    objective = (new.detach().exp() * rewards[:, 0] * new).sum()
    (gradient,) = torch.autograd.grad(objective, logits)
    assert gradient.tolist() == pytest.approx([-0.7 * g for g in exact_kl_gradient(forward=False)], abs=1e-12)
    assert gradient.tolist() != pytest.approx([-0.7 * g for g in exact_kl_gradient(forward=True)], abs=1e-2)


def test_first_ppo_gradient_is_the_policy_gradient() -> None:
    """At ratio 1 both losses have the gradient of -E[A log pi]: the clip and the penalty do nothing yet."""
    logits = OLD.clone().requires_grad_()
    new, advantages = logits.log_softmax(0), torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    (expected,) = torch.autograd.grad(-(OLD.exp() * advantages * new).sum(), logits, retain_graph=True)
    clipped, penalised = (f(new, OLD, advantages, 0.2) for f in (ppo.clipped_policy_loss, ppo.penalty_policy_loss))
    for loss in (clipped, penalised):
        (gradient,) = torch.autograd.grad((OLD.exp() * loss).sum(), logits, retain_graph=True)
        assert gradient.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


# ---------------------------------------------------------------------------------------------- chunked log-probs
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 8, 100])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_chunked_logprobs_equal_log_softmax(chunk_size: int, temperature: float, entropy_grad: bool) -> None:
    """Traps 3, 9, 30: values and gradients equal float64; no more than `chunk_size` rows of logits, none kept."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 6), torch.randn(11, 6)
    targets, upstream = torch.randint(11, (8,)), torch.randn(2, 8)
    sizes: list[int] = []
    tables: list[weakref.ref] = []

    def logits(h: Tensor, w: Tensor) -> Tensor:
        table = h @ w.T
        sizes.append(len(h))
        tables.append(weakref.ref(table))
        return table

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    if not entropy_grad:
        upstream[1] = 0.0
    got = ppo.chunked_logprobs(lambda x: logits(x, w), h, targets, temperature, chunk_size, entropy_grad)
    assert sum(sizes) == 8 and max(sizes) <= chunk_size and got[0].dtype == got[1].dtype == torch.float32
    assert got[1].requires_grad == entropy_grad and not any(table() for table in tables)
    (got[0] * upstream[0] + got[1] * upstream[1]).sum().backward()
    assert sum(sizes) == 16 and max(sizes) <= chunk_size and not any(table() for table in tables)

    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    table = (h64 @ w64.T / temperature).log_softmax(-1)
    logprob, entropy = table[torch.arange(8), targets], -(table.exp() * table).sum(-1)
    (logprob * upstream[0] + entropy * upstream[1]).sum().backward()
    for ours, exact in ((got[0], logprob), (got[1], entropy), (h.grad, h64.grad), (w.grad, w64.grad)):
        assert ours is not None and exact is not None
        assert torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-5)
    for i in range(8):  # and the reference agrees with torch
        row = (hidden.double() @ weight.double().T)[i].tolist()
        assert logprob[i].item() == pytest.approx(reference.log_softmax(row, temperature)[targets[i]], abs=1e-9)
        assert entropy[i].item() == pytest.approx(reference.entropy(row, temperature), abs=1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_head_has_its_gradient(tied: bool) -> None:
    """Where all weights train (sft.py --lora_r 0), token_logprobs gives the head the plain loss's gradient too."""
    model = tiny_llama(40, 1, 0, tie_word_embeddings=tied)
    head, ids = model.get_output_embeddings().weight, [3, 5, 7, 9, 11, 2]
    row = sft.flat_row([[0]], [ids[:1]], [ids[1:]], None, "cpu")
    table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    (expected,) = torch.autograd.grad(table[range(5), ids[1:]].sum(), head)
    (found,) = torch.autograd.grad(sft.token_logprobs(model, row)[0].sum(), head)
    assert torch.allclose(found, expected, atol=1e-5) and found.abs().max() > 0.01


def test_logprobs_are_fp32_even_from_bf16_logits() -> None:
    """Trap 9: from bf16 logits the result is their exact log-softmax to 1e-6, which bf16 arithmetic misses by 0.01."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(16, 8).bfloat16(), torch.randn(50, 8).bfloat16()
    targets = torch.randint(50, (16,))
    got, entropy = ppo.chunked_logprobs(lambda h: h @ weight.T, hidden, targets, 1.0, 4)
    assert got.dtype == entropy.dtype == torch.float32
    exact = (hidden @ weight.T).double().log_softmax(-1)[torch.arange(16), targets]
    assert torch.allclose(got.double(), exact, atol=1e-5)
    rounded = (hidden @ weight.T).log_softmax(-1)[torch.arange(16), targets]
    assert (rounded.double() - exact).abs().max() > 1e-3


def test_logprobs_of_large_logits_do_not_overflow() -> None:
    """Logits of +-1e4 give finite log-probs and an entropy of 0."""
    hidden = torch.tensor([[1e4, -1e4, 0.0]])
    logprob, entropy = ppo.chunked_logprobs(lambda h: h, hidden, torch.tensor([1]), 1.0, 8)
    assert logprob.tolist() == [-20000.0] and entropy.tolist() == [0.0]


# -------------------------------------------------------------------------------------------------- batches, seeds
@pytest.mark.parametrize("batch_size", [1, 4, 10, 13])
def test_every_row_once_per_epoch(batch_size: int) -> None:
    """Batches of any size walk through permutations: after k epochs every row has come k times."""
    lengths = [5, 9, 1, 1, 7, 3, 3, 8, 2, 6]
    drawn = [i for step in range(30) for i in ppo.batch_indices(step, lengths, batch_size, 0)]
    for epoch in range(len(drawn) // 10):
        assert sorted(drawn[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert drawn[10:20] != drawn[20:30] or batch_size == 1  # a new order each epoch


def test_longest_rows_come_first() -> None:
    """A batch too large for the memory fails at once; the seed decides the rest."""
    lengths = [5, 9, 1, 1, 7, 3, 3, 8, 2, 6]
    assert sorted(ppo.batch_indices(0, lengths, 3, 0)) == [1, 4, 7]
    assert ppo.batch_indices(1, lengths, 3, 0) == ppo.batch_indices(1, lengths, 3, 0)
    assert any(ppo.batch_indices(s, lengths, 3, 0) != ppo.batch_indices(s, lengths, 3, 1) for s in range(1, 4))


# -------------------------------------------------------------------------------------------------------- doctests
@pytest.mark.parametrize("stage", PRESENT)
def test_doctests(stage: str) -> None:
    """The examples in the docstrings are true."""
    module: Any = importlib.import_module(stage)
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
