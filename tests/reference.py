"""The maths once more, in plain Python (float64), one token at a time, written from the papers; imports no script.

A response is a list of numbers; a batch is a list of such lists of unequal lengths: there is no padding to get wrong.
"""

import math
from collections.abc import Sequence

Row = Sequence[float]
Batch = Sequence[Row]


def masked_mean(x: Batch) -> float:
    """The mean over all tokens of all responses (not the mean of the responses' means)."""
    flat = [value for row in x for value in row]
    return sum(flat) / len(flat)


def whiten(x: Batch, epsilon: float = 1e-8) -> list[list[float]]:
    """Shifted to mean 0 and scaled to variance 1 (the population's, over all tokens)."""
    mean = masked_mean(x)
    variance = masked_mean([[(value - mean) ** 2 for value in row] for row in x])
    return [[(value - mean) / math.sqrt(variance + epsilon) for value in row] for row in x]


def kl_penalty_rewards(scores: Row, logprobs: Batch, ref_logprobs: Batch, kl_coef: float) -> list[list[float]]:
    """R(x, y) = r(x, y) - beta log(pi(y|x) / rho(y|x)) spread over the tokens (Ziegler et al. 2019, section 2)."""
    rewards = []
    for score, row, ref_row in zip(scores, logprobs, ref_logprobs, strict=True):
        rewards.append([-kl_coef * (lp - ref) for lp, ref in zip(row, ref_row, strict=True)])
        rewards[-1][-1] += score
    return rewards


def gae(rewards: Row, values: Row, gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Advantages as the discounted sum of TD errors, eq. 16 of Schulman et al. 2016, by the definition: O(T^2).

    The episode ends after the last token: no value follows it. The return is advantage + value, the TD(lambda) target.
    """
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    advantages = [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def reward_to_go(rewards: Row, gamma: float) -> list[float]:
    """The discounted sum of the rewards from each token on."""
    return [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]


def clipped_policy_loss(logprob: float, old: float, advantage: float, clip: float) -> float:
    """Minus L^CLIP (Schulman et al. 2017, eq. 7), by the four cases of figure 1 instead of a min of two products."""
    ratio = math.exp(logprob - old)
    if advantage >= 0:
        return -advantage * (ratio if ratio <= 1 + clip else 1 + clip)
    return -advantage * (ratio if ratio >= 1 - clip else 1 - clip)


def penalty_policy_loss(logprob: float, old: float, advantage: float, beta: float) -> float:
    """Minus L^KLPEN (Schulman et al. 2017, eq. 8) with the estimator k3 for KL(old, new)."""
    return -math.exp(logprob - old) * advantage + beta * k3(logprob, old)


def k3(logprob: float, old: float) -> float:
    """(r - 1) - log r with r = new/old, for samples of old (Schulman 2020, "Approximating KL divergence")."""
    ratio = math.exp(logprob) / math.exp(old)
    return ratio - 1 - math.log(ratio)


def clipped_value_loss(value: float, old: float, ret: float, clip: float) -> float:
    """Half the larger of the squared errors of V and of V held within `clip` of V_old."""
    held = value
    if value > old + clip:
        held = old + clip
    elif value < old - clip:
        held = old - clip
    return 0.5 * max((value - ret) ** 2, (held - ret) ** 2)


def adapt_kl_coef(kl_coef: float, kl: float, target: float, n: int, horizon: int) -> float:
    """e = clip((KL - target) / target, -0.2, 0.2), beta <- beta (1 + K e), K = n/horizon (Ziegler et al. 2019, 2.2)."""
    error = (kl - target) / target
    if error > 0.2:
        error = 0.2
    if error < -0.2:
        error = -0.2
    return kl_coef + kl_coef * error * n / horizon


def sft_loss(logprobs: Batch) -> float:
    """Minus the mean log-likelihood of the supervised tokens."""
    return -masked_mean(logprobs)


def log_softmax(logits: Row, temperature: float = 1.0) -> list[float]:
    """Log-probabilities of one token's logits."""
    scaled = [z / temperature for z in logits]
    top = max(scaled)
    normaliser = top + math.log(math.fsum(math.exp(z - top) for z in scaled))
    return [z - normaliser for z in scaled]


def entropy(logits: Row, temperature: float = 1.0) -> float:
    """-sum p log p."""
    return -math.fsum(math.exp(lp) * lp for lp in log_softmax(logits, temperature))


def kl(p: Row, q: Row) -> float:
    """KL(p, q) of two lists of probabilities."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def explained_variance(values: Batch, returns: Batch) -> float:
    """1 - Var(returns - values) / Var(returns), over tokens."""

    def variance(x: Batch) -> float:
        mean = masked_mean(x)
        return masked_mean([[(value - mean) ** 2 for value in row] for row in x])

    errors = [[r - v for r, v in zip(*pair, strict=True)] for pair in zip(returns, values, strict=True)]
    return 1 - variance(errors) / variance(returns)


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """A straight line up to `peak` over the warm-up, then half a cosine from `peak` to a tenth of it."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak / warmup * (step + 1)
    angle = math.pi * (step - warmup) / max(1, total - warmup)
    low = peak / 10
    return low + (peak - low) * (1 + math.cos(angle)) / 2
