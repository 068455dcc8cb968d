"""grpo.py: its maths by hand, by exact enumeration and against TRL's losses; rewards, rows and refilling in runs."""

import itertools
import math
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference_dpo as reference
import torch
from conftest import ROOT, perturb, read_jsonl, record, shared_or_skip, write_jsonl
from torch import Tensor

import grpo

ALL = pytest.mark.parametrize("method", grpo.METHODS)
NAN = math.nan


def settled(**flags: Any) -> Any:
    """Args as settle_method leaves them."""
    args = grpo.Args(**flags)
    grpo.settle_method(args, 1)
    return args


def doubles(*rows: Any) -> Tensor:
    """A float64 tensor."""
    return torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- by hand
def test_presets_are_whole() -> None:
    """Every method of the flag has its preset, and every field of a preset is a flag that is None until settled."""
    for name in (*grpo.Method._fields, "beta"):
        assert getattr(grpo.Args(), name) is None
    for method, preset in grpo.METHODS.items():
        args = settled(method=method)
        assert {name: getattr(args, name) for name in grpo.Method._fields} == preset._asdict()
    assert settled(method="dapo", clip_high=0.2).clip_high == 0.2  # a flag overrides, also with a falsy value
    assert settled(method="dapo", max_refills=0).max_refills == 0
    for method, beta in grpo.PAIR_METHODS.items():
        args = settled(method=method, max_refills=2)
        assert (args.beta, args.max_refills) == (beta, 2)
        assert args.advantage is None and args.kl is None and args.clip_low is None


def test_group_advantages_leave_unknown_rewards_out() -> None:
    """NaN: advantage 0, no part in mean or sd; a group with one known reward or none has no signal at all."""
    rewards = doubles([1.0, NAN, 3.0, NAN, 5.0, NAN, NAN, NAN, NAN])
    plain = grpo.group_advantages(rewards, 3, scale=False)
    assert plain.tolist() == [-1, 0, 1, 0, 0, 0, 0, 0, 0]
    scaled = grpo.group_advantages(rewards, 3, scale=True)
    assert scaled.tolist() == pytest.approx([-1 / (2**0.5 + 1e-4), 0, 1 / (2**0.5 + 1e-4), *[0] * 6])
    assert grpo.leave_one_out_advantages(rewards, 3).tolist() == [-2, 0, 2, 0, 0, 0, 0, 0, 0]
    assert grpo.batch_advantages(rewards).tolist() == [-2, 0, 0, 0, 2, 0, 0, 0, 0]


def test_leave_one_out_is_the_group_mean_stretched() -> None:
    """R - mean of the others = G / (G - 1) (R - mean of all)."""
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stretched = 4 / 3 * grpo.group_advantages(rewards, 4, scale=False)
    assert torch.allclose(grpo.leave_one_out_advantages(rewards, 4), stretched)


def test_aggregations_by_hand() -> None:
    """Losses 1 2 3 | 10 and one masked response, in a batch of 3 responses and 4 tokens; longest response 5."""
    losses = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    for how, total in {"response": (2 + 10) / 3, "token": 16 / 4, "constant": 16 / 15}.items():
        got = (losses * grpo.token_weights(mask, how, 3, 4, 5)).sum().item()
        assert got == pytest.approx(total), how
        split = [(losses[i] * grpo.token_weights(mask[i : i + 1], how, 3, 4, 5)).sum().item() for i in range(3)]
        assert sum(split) == pytest.approx(total), how  # micro-batches add up to the whole


def test_clip_higher_by_hand() -> None:
    """The loss is flat, its gradient 0, exactly where a ratio left the range in the direction that A rewards."""
    for ratio, advantage, moves in [(1.25, 1.0, True), (1.3, 1.0, False), (1.3, -1.0, True), (0.7, -1.0, False)]:
        x = torch.tensor(ratio, requires_grad=True)
        grpo.clipped_loss(x, torch.tensor(advantage), 0.2, 0.28).backward()
        assert x.grad is not None and (x.grad.item() != 0) == moves


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    """gradient = -min(ratio, 5) A grad log pi, also above the clip, where PPO's is 0."""
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    ratio = torch.exp(logprobs - torch.tensor([-1.0, -4.0]))  # 1 and 7.39
    grpo.cispo_loss(logprobs, ratio, torch.tensor([1.0, 1.0]), 1.0, 4.0).sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([-1.0, -5.0])


def test_rewards_to_go_ignores_padding() -> None:
    """Padding holds garbage; the first column is R - kl_coef * sequence KL, the last one R - its own token's."""
    new, ref = torch.tensor([[-1.0, -2.0, 50.0]]), torch.tensor([[-1.5, -3.0, -70.0]])
    got = grpo.rewards_to_go(torch.tensor([2.0]), new, ref, torch.tensor([[1, 1, 0]]), 0.1)
    assert got[0, :2].tolist() == pytest.approx([2 - 0.1 * 1.5, 2 - 0.1 * 1.0])


def random_batch(seed: int, responses: int = 6, tokens: int = 5) -> dict[str, Tensor]:
    """Log-probs of policy, old policy and reference with visible distances; lengths from 1 to `tokens`."""
    generator = torch.Generator().manual_seed(seed)

    def noise(size: float) -> Tensor:
        return size * torch.randn(responses, tokens, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([tokens, 1, 3, 2, 4, tokens][:responses])
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    logprobs = -1.5 + noise(0.3)
    old, ref, rewards = logprobs + noise(0.3), logprobs + noise(0.5), noise(1.0)[:, 0]
    batch = {"logprobs": logprobs * mask, "old": old * mask, "ref": ref * mask, "mask": mask, "rewards": rewards}
    return batch | {"entropy": noise(1.0).abs() * mask}


def our_loss(batch: dict[str, Tensor], advantages: Tensor, args: Any) -> tuple[float, Tensor]:
    """(loss, its gradient in the log-probs) of one whole batch."""
    logprobs, mask = batch["logprobs"].clone().requires_grad_(), batch["mask"]
    n_tokens = mask.sum().item()
    losses = grpo.token_losses(logprobs, batch["old"], batch["ref"], advantages, mask, args)
    weights = grpo.token_weights(mask, args.aggregation, len(mask), n_tokens, args.max_response_length)
    loss = (losses * weights).sum() - args.entropy_coef * (batch["entropy"] * mask).sum() / n_tokens
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad


@ALL
def test_equal_rewards_give_no_gradient(method: str) -> None:
    """0.1 is no binary fraction: its mean over three or eight must still be itself, before the sd divides by 1e-4."""
    for g, value in [(3, 0.1), (8, 0.1), (6, -7.3)]:
        args = settled(method=method, samples_per_prompt=g, batch_size=2 * g, kl="none")
        returns = torch.full((2 * g, 4), value)
        mask = torch.ones(2 * g, 4, dtype=torch.long)
        advantages = grpo.response_advantages(returns, mask, torch.full((2,), value), lambda x: x, args)
        assert advantages.dtype == returns.dtype and (advantages == 0).all()


@ALL
def test_padding_changes_nothing(method: str) -> None:
    """More columns, with garbage in the reference and in the rewards to go: same loss, gradient 0 there."""
    batch = random_batch(3)
    args = settled(method=method, samples_per_prompt=3, batch_size=6)
    wide = {k: torch.nn.functional.pad(v, (0, 7)) if v.dim() == 2 else v for k, v in batch.items()}
    wide["ref"] = wide["ref"] + 3.0 * (1 - wide["mask"])
    results = []
    for b in (batch, wide):
        returns = grpo.rewards_to_go(b["rewards"], b["old"], b["ref"], b["mask"], 0.1)
        advantages = grpo.response_advantages(returns, b["mask"], doubles([0.3, -0.2]), lambda x: x, args)
        results.append(our_loss(b, advantages, args))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-12)
    assert torch.allclose(results[1][1][:, :5], results[0][1], atol=1e-12) and (results[1][1][:, 5:] == 0).all()


# ------------------------------------------------------------------------------------- exact expectations on a toy
# One prompt, a vocabulary of 5. pi = softmax(logits): every expectation is a sum over 5 tokens or 25 pairs of them.
def toy(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (5,) of the policy (with gradients), of an older policy and of the reference."""
    generator = torch.Generator().manual_seed(seed)
    logits, old, ref = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), logits.detach() + 0.5 * old, ref


def exact_kl_gradient(logits: Tensor, ref: Tensor) -> Tensor:
    """The gradient of KL(pi, pi_ref) = sum pi (log pi - log pi_ref)."""
    logp = logits.log_softmax(0)
    return torch.autograd.grad((logp.exp() * (logp - ref.log_softmax(0))).sum(), logits)[0]


@pytest.mark.parametrize("kind", ["k2", "k3"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_kl_losses_have_the_exact_gradient(kind: str, on_policy: bool) -> None:
    """Trap 27: E_old[gradient of the estimator] = gradient of KL(pi, pi_ref), for any old policy."""
    logits, old, ref = toy(0)
    logp, old_logp = logits.log_softmax(0), (logits.detach() if on_policy else old).log_softmax(0)
    expectation = (old_logp.exp() * grpo.kl_loss(logp, old_logp, ref.log_softmax(0), kind)).sum()
    if kind == "k3":  # the value is the KL's, too
        assert expectation.item() == pytest.approx((logp.exp() * (logp - ref.log_softmax(0))).sum().item())
    (gradient,) = torch.autograd.grad(expectation, logits)
    assert torch.allclose(gradient, exact_kl_gradient(logits, ref), atol=1e-12)


def test_k3_without_the_ratio_pulls_elsewhere() -> None:
    """Why there is a ratio: plain k3 on the policy's own samples has the gradient of KL(pi_ref, pi) instead."""
    logits, _, ref = toy(0)
    logp, ref_logp = logits.log_softmax(0), ref.log_softmax(0)
    difference = ref_logp - logp
    (plain,) = torch.autograd.grad((logp.detach().exp() * (difference.exp() - difference - 1)).sum(), logits)
    (forward,) = torch.autograd.grad((ref_logp.exp() * (ref_logp - logits.log_softmax(0))).sum(), logits)
    assert torch.allclose(plain, forward, atol=1e-12)
    assert not torch.allclose(plain, exact_kl_gradient(logits, ref), atol=1e-2)


@pytest.mark.parametrize("column", ["whole", "own"])
def test_k1_in_the_reward_has_the_exact_gradient(column: str) -> None:
    """Responses of two tokens, all 25: the policy gradient with reward -KL is that of KL(pi, pi_ref) of responses.

    Both with every token's weight the whole response's log-ratio and with what comes from that token on.
    """
    generator = torch.Generator().manual_seed(1)
    first, ref_first = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    second, ref_second = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    parameters = [first.requires_grad_(), second.requires_grad_()]

    def responses(a: Tensor, b: Tensor) -> Tensor:
        """(25, 2) log-probs of both tokens of each response."""
        pairs = itertools.product(range(5), repeat=2)
        return torch.stack([torch.stack([a.log_softmax(0)[i], b.log_softmax(1)[i, j]]) for i, j in pairs])

    logp, ref_logp = responses(first, second), responses(ref_first, ref_second)
    p = logp.sum(1).exp()
    exact = torch.autograd.grad((p * (logp - ref_logp).sum(1)).sum(), parameters, retain_graph=True)
    mask = torch.ones(25, 2, dtype=torch.long)
    returns = grpo.rewards_to_go(torch.zeros(25, dtype=torch.float64), logp.detach(), ref_logp, mask, 1.0)
    advantages = returns[:, :1].expand(25, 2) if column == "whole" else returns
    args = settled(method="reinforce_pp")
    losses = grpo.token_losses(logp, logp.detach(), ref_logp, advantages, mask, args)
    got = torch.autograd.grad((p.detach()[:, None] * losses).sum(), parameters)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize(
    ("method", "factor"), [("rloo", 1.0), ("dr_grpo", 0.5), ("reinforce", 0.5), ("remax", 1.0), ("cispo", None)]
)
def test_expected_policy_gradient_is_that_of_the_reward(method: str, factor: float | None) -> None:
    """All 25 pairs of one-token responses: leave-one-out and greedy are unbiased, a mean with oneself in it scales
    the gradient by (G - 1) / G, and dividing by the group's sd (cispo) changes its direction."""
    logits, _, _ = toy(2)
    rewards = doubles([1.0, 0.0, -0.5, 2.0, 0.3])
    logp = logits.log_softmax(0)
    (exact,) = torch.autograd.grad(-(logp.exp() * rewards).sum(), logits, retain_graph=True)
    args = settled(method=method, samples_per_prompt=2, batch_size=2, kl="none", max_response_length=1)
    greedy, mask = rewards[logits.argmax()][None], torch.ones(2, 1, dtype=torch.long)
    expectation = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(range(5), repeat=2):
        chosen, p = list(pair), logp.detach()[list(pair)].sum().exp()
        advantages = grpo.response_advantages(rewards[chosen, None], mask, greedy, lambda x: x, args)
        new = logp[chosen, None]
        losses = grpo.token_losses(new, new.detach(), new.detach(), advantages, mask, args)
        expectation = expectation + p * (losses * grpo.token_weights(mask, args.aggregation, 2, 2, 1)).sum()
    (got,) = torch.autograd.grad(expectation, logits)
    cosine = torch.cosine_similarity(got, exact, dim=0).item()
    if factor is None:
        assert 0.5 < cosine < 0.999
    else:
        assert torch.allclose(got, factor * exact, atol=1e-12)


# --------------------------------------------------------------------------------------------------- against TRL
def trl_stub(batch: dict[str, Tensor], logprobs: Tensor, **settings: Any) -> Any:
    """What TRL's _compute_loss asks of its trainer, with given log-probs in the place of a model."""
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, reduce=lambda x, reduction: x, gather=lambda x: x
    )
    names = {"use_bias_correction_kl": True, "delta": None, "steps_per_generation": 1}
    defaults: dict[str, Any] = {
        "aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "beta": 0.0,
        "importance_sampling_level": "token", "loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2,
        "use_vllm": False, "vllm_importance_sampling_correction": False, "current_gradient_accumulation_steps": 1,
        "max_completion_length": 64, "_entropy_bonus_enabled": bool(settings.get("entropy_coef")),
        "use_adaptive_entropy": False, "entropy_coef": 0.0,
    }  # fmt: skip
    return SimpleNamespace(
        **{**defaults, **settings}, args=SimpleNamespace(**names), accelerator=accelerator,
        model=SimpleNamespace(training=True), _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, batch["entropy"], None),
    )  # fmt: skip


def trl_loss(trainer: str, batch: dict[str, Tensor], advantages: Tensor, **settings: Any) -> tuple[float, Tensor]:
    """(loss, its gradient in the log-probs) of TRL's own _compute_loss."""
    trl = pytest.importorskip("trl", reason="TRL, which the losses are compared with, is not installed")
    logprobs, mask = batch["logprobs"].clone().requires_grad_(), batch["mask"]
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long), "prompt_mask": torch.ones(len(mask), 1),
        "completion_ids": torch.zeros_like(mask), "completion_mask": mask, "advantages": advantages,
        "old_per_token_logps": batch["old"], "old_logps": (batch["old"] * mask).sum(1),
        "ref_per_token_logps": batch["ref"], "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = getattr(trl, trainer)._compute_loss(trl_stub(batch, logprobs, **settings), None, inputs)
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad


# our flags, and TRL's names for the same
TRL_CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"method": "grpo"}, {"beta": 0.04}),
    ({"method": "grpo", "entropy_coef": 0.1}, {"beta": 0.04, "entropy_coef": 0.1}),
    ({"method": "grpo", "aggregation": "token"}, {"loss_type": "bnpo", "beta": 0.04}),
    ({"method": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    ({"method": "dr_grpo", "kl": "k3"}, {"loss_type": "dr_grpo", "beta": 0.04}),
    ({"method": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    ({"method": "dapo", "kl": "k3", "kl_coef": 0.3}, {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.3}),
    ({"method": "gspo"}, {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}),
    ({"method": "cispo"}, {"loss_type": "cispo", "epsilon_high": 5.0}),
    ({"method": "cispo", "clip_high": 0.1}, {"loss_type": "cispo", "epsilon_high": 1.1}),
]


@pytest.mark.parametrize(("flags", "settings"), TRL_CASES, ids=lambda x: "-".join(map(str, x.values())))
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("truncated", [False, True])
def test_losses_equal_trl_grpo(flags: dict, settings: dict, seed: int, truncated: bool) -> None:
    """Same batch, off-policy: same loss and same gradient; also with a response masked out of the loss."""
    batch = random_batch(seed)
    if truncated:
        batch["mask"] = batch["mask"].clone()
        batch["mask"][2] = 0
    args = settled(**flags, samples_per_prompt=3, batch_size=6, max_response_length=64)
    advantages = grpo.group_advantages(batch["rewards"], 3, scale=args.advantage == "group_norm")
    ours = our_loss(batch, advantages[:, None].expand(6, 5), args)
    theirs = trl_loss("GRPOTrainer", batch, advantages, **settings)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-7) and torch.allclose(ours[1], theirs[1], atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_rloo_equals_trl(seed: int) -> None:
    """Off-policy, with the KL in the reward: reward, leave-one-out, whole responses' ratio, clip, mean."""
    batch = random_batch(seed)
    args = settled(method="rloo", samples_per_prompt=3, batch_size=6, kl_coef=0.05)
    kl = ((batch["old"] - batch["ref"]) * batch["mask"]).sum(1)
    groups = (batch["rewards"] - 0.05 * kl).view(-1, 3)
    advantages = (groups - (groups.sum(1, keepdim=True) - groups) / 2).flatten()  # rloo_trainer.py's lines
    returns = grpo.rewards_to_go(batch["rewards"], batch["old"], batch["ref"], batch["mask"], args.kl_coef)
    mine = grpo.response_advantages(returns, batch["mask"], None, lambda x: x, args)
    assert torch.allclose(mine[:, 0], advantages, atol=1e-12)
    ours, theirs = our_loss(batch, mine, args), trl_loss("RLOOTrainer", batch, advantages)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-7) and torch.allclose(ours[1], theirs[1], atol=1e-7)


def test_group_advantages_equal_trl() -> None:
    """The lines of grpo_trainer.py with its own nanstd, with a reward that nobody knows."""
    utils = pytest.importorskip("trl.trainer.utils")
    rewards = random_batch(0)["rewards"]
    rewards[1] = NAN
    groups = rewards.view(-1, 3)
    deviation = utils.nanstd(groups, dim=1).repeat_interleave(3)
    expected = (rewards - torch.nanmean(groups, dim=1).repeat_interleave(3)) / (deviation + 1e-4)
    assert torch.allclose(grpo.group_advantages(rewards, 3, scale=True), expected.nan_to_num(), atol=1e-9)


# --------------------------------------------------------------------------------------------------------- pairs
SCORES = doubles([1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 0.0, math.log(3), 0.0])


def test_best_and_worst_of_each_group() -> None:
    """A group whose rewards tie gives no pair; of equal best or worst ones the first is taken."""
    assert grpo.rank_pairs(SCORES, 3).tolist() == [[1, 0], [7, 6]]
    assert grpo.rank_pairs(doubles([1.0, 3.0, 3.0, 1.0]), 4).tolist() == [[1, 0]]


def test_an_unknown_reward_is_in_no_pair() -> None:
    """None from a reward function, NaN here, is neither best nor worst; one known reward is no pair."""
    rewards = doubles([NAN, 0.0, 1.0, NAN, NAN, 1.0, 2.0, NAN, 2.0, NAN, NAN, NAN])
    assert grpo.rank_pairs(rewards, 3).tolist() == [[2, 1]]
    assert grpo.rank_pairs(torch.full((6,), NAN), 3).shape == (0, 2)


def test_win_probabilities_by_hand() -> None:
    """Rewards 0, log 3, 0: sigma(-log 3) = 1/4, sigma(0) = 1/2: (1/4 + 1/2) / 2, 3/4, 3/8; NaN is no rival."""
    assert grpo.win_probabilities(SCORES, 3)[6:].tolist() == pytest.approx([0.375, 0.75, 0.375])
    with_unknown = grpo.win_probabilities(doubles([NAN, 0.0, math.log(3)]), 3)
    assert with_unknown.tolist() == pytest.approx([NAN, 0.25, 0.75], nan_ok=True)


def pair_batch(seed: int, g: int) -> tuple[dict[str, Tensor], Tensor]:
    """(random_batch of 6 responses, log-ratios (6,)) in groups of g."""
    batch = random_batch(seed)
    return batch, ((batch["logprobs"] - batch["ref"]) * batch["mask"]).sum(1)


@pytest.mark.parametrize("method", grpo.PAIR_METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_pair_losses_equal_the_reference(method: str, seed: int) -> None:
    """The pairs' losses, written once more in float64 from the papers; in a row of some of the responses."""
    batch, h = pair_batch(seed, 3)
    beta, lengths, rewards = 0.3, batch["mask"].sum(1), batch["rewards"]
    pairs, wins = grpo.rank_pairs(rewards, 3), grpo.win_probabilities(rewards, 3)
    found, args, total = grpo.pair_losses(h, lengths, wins, pairs, method, beta), SimpleNamespace(method=method), 0.0
    args.beta = beta
    for first in (0, 3):
        own = range(first, first + 3)
        w, l = max(own, key=lambda i: rewards[i]), min(own, key=lambda i: rewards[i])  # noqa: E741
        h_w, h_l = h[w].item(), h[l].item()
        won = [sum(reference.sigma((rewards[i] - rewards[j]).item()) for j in own if j != i) / 2 for i in (w, l)]
        if method == "online_dpo":
            value = reference.cdpo(h_w, h_l, beta, 0.0)
        elif method == "online_ipo":
            value = (h_w / lengths[w].item() - h_l / lengths[l].item() - 1 / (2 * beta)) ** 2
        else:
            value = reference.sppo(h_w, won[0], beta) + reference.sppo(h_l, won[1], beta)
        row = sorted((w, l))
        loss, share = grpo.pair_terms(h[row], lengths[row], row, wins, pairs, args)
        assert loss.item() == pytest.approx(value, rel=1e-6) and share == (h_w > h_l)
        total += value
    assert found.sum().item() == pytest.approx(total, rel=1e-6)


def test_online_dpo_equals_trl() -> None:
    """OnlineDPOTrainer.training_step on given samples and rewards: the same pairs of two samples, the same loss.

    TRL orders samples as [first of each prompt, second of each prompt], rank_pairs by prompt.
    """
    pytest.importorskip("trl", reason="TRL, which the losses are compared with, is not installed")
    trainer_class = pytest.importorskip("trl.experimental.online_dpo").OnlineDPOTrainer
    batch, h = pair_batch(4, 2)
    pairs, wins = grpo.rank_pairs(batch["rewards"], 2), grpo.win_probabilities(batch["rewards"], 2)
    ours = grpo.pair_losses(h, batch["mask"].sum(1), wins, pairs, "online_dpo", 0.1).sum() / 3
    order = [0, 2, 4, 1, 3, 5]
    settings = SimpleNamespace(
        use_vllm=False, missing_eos_penalty=None, loss_type="sigmoid", torch_empty_cache_steps=None, optim="adamw",
        n_gpu=1, gradient_accumulation_steps=1, beta=0.1,
    )  # fmt: skip
    trainer, logprobs = object.__new__(trainer_class), iter([batch["logprobs"][order], batch["ref"][order]])
    attributes: dict[str, Any] = {
        "args": settings, "eos_token_ids": [1], "ref_model": object(), "reward_funcs": None, "_beta": [0.1],
        "stats": defaultdict(list), "state": SimpleNamespace(global_step=1, epoch=0),
        "processing_class": SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids)),
        "accelerator": SimpleNamespace(gather_for_metrics=lambda x: x, backward=lambda loss: None),
        "_generate": lambda *_: (None, None, batch["mask"][order], batch["mask"][order], None),
        "_forward": lambda *_: next(logprobs),
        "_calculate_rewards_from_functions": lambda **_: batch["rewards"][order],
    }  # fmt: skip
    for name, value in attributes.items():
        setattr(trainer, name, value)
    trls = trainer.training_step(SimpleNamespace(train=lambda: None), {"prompt": ["a", "b", "c"]})
    assert ours.item() == pytest.approx(trls.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------- shipped rewards
def load_reward(spec: str) -> Callable:
    """A shipped reward function, loaded as --reward_fn does."""
    return grpo.load_function(f"{ROOT}/{spec}")


def test_doctests_of_the_rewards() -> None:
    """`python -m doctest rewards/math.py` would test the standard library's math instead."""
    import doctest
    import importlib.util

    for file in (ROOT / "rewards" / "math.py", ROOT / "rewards" / "text.py", ROOT / "tiny" / "facts.py"):
        spec = importlib.util.spec_from_file_location(f"shipped_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        results = doctest.testmod(module)
        assert results.attempted and not results.failed, file


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("#### 42", "42"), ("So it is\n#### -1,234.50 dollars", "-2469/2"), ("#### $3 each for 4", "3"),
        (r"\boxed{7} no, \boxed{\frac{1}{2}}", "1/2"), (r"\boxed{\text{about }{12}}", "12"), ("5 + 6 = 11.", "11"),
        ("(\u22123)", "-3"), ("a total of 1,000,000!", "1000000"), ("it costs $.25", "1/4"), ("75 %", "75"),
        ("7-3", "3"), ("x = -3", "-3"), ("3/4 of it", "3/4"), ("3/0", "3"), ("no number", "None"), ("", "None"),
        ("####", "None"), (r"\boxed{", "None"),
    ],
)  # fmt: skip
def test_numbers(response: str, value: str) -> None:
    """What a response answers with."""
    number = load_reward("rewards/math.py:number")
    assert str(number(response)) == value


def test_numeric_on_gsm8k() -> None:
    """200 published solutions: each is right by itself and in other words, and wrong for the next question."""
    rows = read_jsonl(shared_or_skip("data", "gsm8k", "gsm8k_test_first200.jsonl"))
    numeric = load_reward("rewards/math.py:numeric")
    answers, questions = [r["answer"] for r in rows], [r["question"] for r in rows]
    finals = [a.rpartition("####")[2].strip() for a in answers]
    for form in ("{}", "#### {}", "The answer is ${}.00.", r"Thus \boxed{{{}}}"):
        assert numeric(questions, [form.format(f) for f in finals], answer=answers) == [1.0] * 200
    different = [float(a != b) for a, b in zip(finals, finals[1:] + finals[:1], strict=True)]
    assert numeric(questions, finals[1:] + finals[:1], answer=answers) == [1 - d for d in different]
    assert numeric(["?"], ["5"], answer=["unknown"]) == [None]


# ------------------------------------------------------------------------------------------- rollouts and whole runs
def test_greedy_rewards_are_of_each_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One greedy response per prompt, its penalties included, repeated for the prompt's samples."""
    asked = []

    def roll_out(lm: Any, prompts: list, names: list, samples: int, *rest: Any) -> Any:
        asked.append((prompts, samples, rest[-1].temperature))
        return SimpleNamespace(ended=doubles([1.0, 0.0]))

    monkeypatch.setattr(grpo, "roll_out", roll_out)
    monkeypatch.setattr(grpo, "reward_table", lambda *given: doubles([3.0], [5.0]))
    args = settled(method="remax", samples_per_prompt=2, batch_size=4, missing_eos_penalty=2.0)
    rollout: Any = SimpleNamespace(prompts=["a", "a", "b", "b"])
    rewards = [grpo.Reward("r", 1.0, len)]
    assert grpo.greedy_rewards(None, rollout, rewards, args).tolist() == [3.0, 3.0]
    assert asked == [(["a", "b"], 1, grpo.GREEDY)]


def test_whitening_leaves_unknown_rewards_out() -> None:
    """Three known tokens 1, 1, 3: mean 5/3, sd sqrt(8/9); the unknown response and the masked token have 0."""
    args = settled(method="reinforce_pp", samples_per_prompt=1, batch_size=3)
    returns, mask = doubles([1.0, 1.0], [NAN, NAN], [3.0, 3.0]), torch.tensor([[1, 1], [1, 1], [1, 0]])
    got = grpo.response_advantages(returns, mask, None, lambda x: x, args)
    assert got.flatten().tolist() == pytest.approx([-(0.5**0.5)] * 2 + [0, 0, 2**0.5, 0])


@pytest.mark.parametrize("value", [20.3, 100.1, -29.8, 1000.1])
def test_equal_rewards_are_equal_in_any_unit(value: float) -> None:
    """The float32 mean of equal numbers is not always that number."""
    assert all(grpo.equal_groups(torch.full((g,), value), g).item() for g in range(2, 17))


def some_signal(folder: Path) -> Path:
    """A file with the reward function `some`: 0 for half of the prompts, whatever the response."""
    file = folder / "signal.py"
    file.write_text(
        "def some(prompts, responses, **columns):\n"
        "    return [float(sum(map(ord, p)) % 2 and len(r) % 2) for p, r in zip(prompts, responses)]\n"
    )
    return file


@pytest.fixture
def run_grpo(
    sft_run: Path, world: Path, reward_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """run_grpo(**flags) -> run folder: grpo.main on the small world, two steps of 4 x 4 responses."""
    monkeypatch.setattr(grpo.Run, "plot_curves", lambda *_: None)

    def start(**flags: Any) -> Path:
        settings: dict[str, Any] = {
            "model": str(sft_run), "dataset": str(world / "prompts.jsonl"), "output_dir": str(tmp_path / "grpo"),
            "reward_fn": reward_file, "eval_size": 3, "max_response_length": 10, "samples_per_prompt": 4,
            "batch_size": 16, "tokens_per_batch": 128, "max_steps": 2, "warmup_ratio": 0.0, "learning_rate": 1e-3,
        }  # fmt: skip
        settings |= {"reward_fn": None} if flags.get("rewards") or flags.get("reward_model") else {}
        grpo.main(grpo.Args(**{**settings, **flags}))
        return Path({**settings, **flags}["output_dir"])

    return start


@ALL
def test_every_method_runs(method: str, run_grpo: Callable[..., Path]) -> None:
    """Two steps of two updates: the first update's ratio is 1, so KL(old, new) comes from the second alone."""
    rows = read_jsonl(run_grpo(method=method, mu=2, max_steps=1) / "metrics.jsonl")
    assert len(rows) == 1 and rows[0]["grad_norm"] > 0 and rows[0]["approx_kl"] > 0
    assert "share/mean" in rows[0] and 0 <= rows[0]["share/equal"] <= 1


@pytest.mark.parametrize("kl", ["none", "k1"])
def test_first_ratio_is_one(kl: str, run_grpo: Callable[..., Path]) -> None:
    """With one update per rollout KL(old, new) is 0 to 1e-6, whether pi_old has a pass of its own (k1) or not."""
    for row in read_jsonl(run_grpo(kl=kl) / "metrics.jsonl"):
        assert abs(row["approx_kl"]) < 1e-6 and row["clip_fraction"] == 0


def test_batches_are_memory_only(run_grpo: Callable[..., Path], tmp_path: Path) -> None:
    """Refilling, several rewards, both batch sizes changed: the same samples and, to rounding, the same training."""
    file = some_signal(tmp_path)
    found = []
    for i, sizes in enumerate([(512, 128), (40, 4)]):
        folder = run_grpo(
            method="dapo", rewards=[f"{file}:some=2"], tokens_per_batch=sizes[0], sample_batch_size=sizes[1], mu=2,
            output_dir=str(tmp_path / str(i)),
        )  # fmt: skip
        found.append(read_jsonl(folder / "metrics.jsonl"))
    assert any(row["refilled"] for row in found[0])
    for a, b in zip(*found, strict=True):
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key


def test_resumed_run_equals_an_uninterrupted_one(run_grpo: Callable[..., Path], tmp_path: Path) -> None:
    """Same metrics to the digit and same adapter, with a reference that follows the policy."""
    flags: dict[str, Any] = {"max_steps": 3, "mu": 2, "save_every": 2, "sync_ref_every": 1, "kl": "k2"}
    whole = run_grpo(output_dir=str(tmp_path / "whole"), **flags)
    cut = run_grpo(output_dir=str(tmp_path / "cut"), **flags)
    (cut / "adapter_model.safetensors").unlink()
    run_grpo(output_dir=str(tmp_path / "cut"), resume=True, **flags)
    for name in ("metrics.jsonl", "adapter_model.safetensors", "samples.jsonl"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name


def test_reward_model_and_functions_together(
    run_grpo: Callable[..., Path], reward_run: Path, reward_file: str, tmp_path: Path
) -> None:
    """Each is logged by name; the score is the weighted sum; a function that leaves a row out leaves the others in."""
    file = tmp_path / "some.py"
    file.write_text("def some(prompts, responses, **c):\n    return [None, *[1.0] * (len(responses) - 1)]\n")
    folder = run_grpo(rewards=[f"{reward_run}=0.5", reward_file, f"{file}:some=0.1"])
    for row in read_jsonl(folder / "metrics.jsonl"):
        assert row["some/mean"] == 1.0 and row["some/equal"] == 1.0
        expected = 0.5 * row["reward/mean"] + row["share/mean"] + 0.1 * 15 / 16
        assert row["score"] == pytest.approx(expected, abs=1e-6)


def test_greedy_sampling_is_argmax(sft_run: Path) -> None:
    """The sampler at the temperature GREEDY takes the most likely token at every step, whatever its noise."""
    args = grpo.Args(model=str(sft_run), dtype="float32", quant="none")
    model, _, stop_ids, adapter = grpo.load_model(args, torch.device("cpu"))
    model = grpo.add_adapter(model, "policy", adapter, args)
    perturb(model, "policy", 3, 0.2)
    prompts = [[5, 9, 11], [7, 3, 2, 30, 41]]
    with grpo.role(model, "policy"):
        sampled, _ = grpo.sample(model, prompts, [0, 1], 1, 12, grpo.GREEDY, stop_ids, 8, (0, 0, 0))
        for ids, response in zip(prompts, sampled, strict=True):
            for t, token in enumerate(response):
                logits = model(torch.tensor([ids + response[:t]])).logits[0, -1]
                assert token == logits.argmax()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('row 3')", "ValueError: row 3"),
        ("return [1.0]", "returned 1 values for 16 responses"),
        ("return [float('nan')] * len(responses)", "returned nan for prompt"),
        ("return ['x'] * len(responses)", "returned 'x' for prompt"),
        ("return [None] * len(responses)", "returned None for every response"),
    ],
)
def test_bad_reward_functions_stop_by_name(
    body: str, said: str, run_grpo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the function and, where there is one, the offending row."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    file = tmp_path / "bad.py"
    head = "if len(responses) < 16: return [0.0] * len(responses)"  # the held-out prompts
    file.write_text(f"def bad(prompts, responses, **c):\n    {head}\n    {body}\n")
    with pytest.raises(grpo.UserError) as caught:
        run_grpo(reward_fn=f"{file}:bad")
    assert said in str(caught.value) and "bad" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"samples_per_prompt": 1}, "less than 2"), ({"batch_size": 30, "samples_per_prompt": 4}, "no multiple"),
        ({"dataset": "own.jsonl"}, "what is a good response"), ({"lora_r": 0}, "--lora_r 0"),
        ({"reward_fn": "a.py:f", "reward_model": "b"}, "name all of them in --rewards"),
        ({"reward_fn": "a.py:f", "rewards": ["b"]}, "name all of them in --rewards"),
        ({"overlong_buffer": 2.0}, "a share of"), ({"method": "dapo", "sync_ref_every": 1}, "has no reference unless"),
        ({"method": "reinforce", "max_refills": 3}, "equal rewards are a signal to batch_mean"),
        ({"beta": 0.1}, "--beta has no part in --method grpo"),
        ({"method": "sppo", "kl": "k3"}, "--kl has no part in --method sppo"),
        ({"method": "online_dpo", "samples_per_prompt": 1}, "less than 2"),
    ],
)  # fmt: skip
def test_contradicting_flags(flags: dict[str, Any], said: str) -> None:
    """Each is one line."""
    with pytest.raises(grpo.UserError, match=said):
        settled(**flags)


def test_one_sample_is_enough_for_batch_baselines() -> None:
    """REINFORCE, REINFORCE++ and ReMax compare with something else than the group."""
    for method in ("reinforce", "reinforce_pp", "remax"):
        assert settled(method=method, samples_per_prompt=1).samples_per_prompt == 1


def test_gsm8k_rows_through_the_loader(run_grpo: Callable[..., Path], tmp_path: Path) -> None:
    """Real questions with the numeric reward, on a model that knows nothing: all groups flat, refilled, no crash."""
    rows = read_jsonl(shared_or_skip("data", "gsm8k", "gsm8k_test_first200.jsonl"))
    data = write_jsonl(tmp_path / "gsm8k.jsonl", [{"prompt": r["question"], "answer": r["answer"]} for r in rows[:24]])
    folder = run_grpo(dataset=str(data), reward_fn=f"{ROOT}/rewards/math.py:numeric", method="dapo", max_steps=1)
    (row,) = read_jsonl(folder / "metrics.jsonl")
    assert row["numeric/equal"] <= 1.0 and row["refilled"] > 0


def test_refilled_groups_replace_only_equal_ones(
    run_grpo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups with signal keep prompt and tokens; the others get a prompt that the batch lacks; rows follow."""
    calls, flags = record(monkeypatch, grpo, "collect"), {"reward_fn": f"{some_signal(tmp_path)}:some", "max_steps": 1}
    for rounds in (0, 2):  # in the second run the preflight compares the sampler's log-probs with those of the new rows
        run_grpo(max_refills=rounds, **flags)
    (_, (once, table, none)), (_, (again, filled, n)) = calls
    flat = grpo.equal_groups(table[:, 0], 4).tolist()
    assert none == 0 and n > 0 and any(flat) and not all(flat)
    before = {p["key"] for p in once.prompts}
    for k, was_flat in enumerate(flat):
        for i in range(4 * k, 4 * k + 4):
            assert (again.prompts[i]["key"] in before) != was_flat
            assert was_flat or again.responses[i] == once.responses[i]
    found: dict[int, list[int]] = {i: [] for i in range(16)}
    for row in again.rows():  # the rows hold the responses that the lists hold
        for i, token in zip(row.at[0].tolist(), row.targets.tolist(), strict=True):
            found[i].append(token)
    assert list(found.values()) == again.responses and filled.shape == table.shape
    assert again.mask.sum(1).tolist() == [len(y) for y in again.responses]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dapo", "reinforce_pp", "sppo"])
def test_two_processes_equal_one(method: str, sft_run: Path, world: Path, tmp_path: Path) -> None:
    """Trap 23: token counts, whitening, noise and refilling belong to the whole batch: metrics equal to 1e-5."""
    found = []
    for n in (1, 2):
        line = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(n)]
        line += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        line += ["--num_cpu_threads_per_process", "1", str(ROOT / "grpo.py"), "--output_dir", str(tmp_path / str(n))]
        line += ["--model", str(sft_run), "--dataset", str(world / "prompts.jsonl"), "--eval_size", "3"]
        line += ["--reward_fn", f"{some_signal(tmp_path)}:some", "--max_response_length", "10", "--batch_size", "16"]
        line += ["--samples_per_prompt", "4", "--tokens_per_batch", "64", "--max_steps", "1", "--mu", "2"]
        done = subprocess.run([*line, "--method", method], capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        found += read_jsonl(tmp_path / str(n) / "metrics.jsonl")
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-5)
