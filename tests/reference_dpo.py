"""The losses of preferences once more, in float64 and plain Python, written from the papers. Imports no script.

A response is the list of its tokens' log-probs, so its length is the length of the list. h is a log-ratio
log pi(y|x) - log pi_ref(y|x) of a whole response; w is the better response of a pair, l the worse one.
"""

import itertools
import math
from collections.abc import Callable, Sequence

Row = Sequence[float]


def sigma(x: float) -> float:
    """The logistic function."""
    return 1 / (1 + math.exp(-x))


def log_ratio(tokens: Row, ref_tokens: Row) -> float:
    """The log of the product over the tokens of pi / pi_ref."""
    return math.fsum(math.log(math.exp(p) / math.exp(q)) for p, q in zip(tokens, ref_tokens, strict=True))


def mean_over_pairs(ranks: Row, pair_loss: Callable[[int, int], float]) -> float:
    """The mean of pair_loss(w, l) over all combinations of two responses that do not tie; rank 1 is the best."""
    losses = []
    for i, j in itertools.combinations(range(len(ranks)), 2):
        if ranks[i] != ranks[j]:
            losses.append(pair_loss(i, j) if ranks[i] < ranks[j] else pair_loss(j, i))
    return sum(losses) / len(losses)


# ------------------------------------------------------------------------------------------------ losses of a pair
def cdpo(h_w: float, h_l: float, beta: float, smoothing: float) -> float:
    """The cross-entropy of the labels (1 - e, e) and the Bradley-Terry probabilities (Mitchell 2023)."""
    p = math.exp(beta * h_w) / (math.exp(beta * h_w) + math.exp(beta * h_l))
    return -(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p)


def bco(h_w: float, h_l: float, beta: float, shift: float) -> float:
    """Binary classifier optimisation (Jung et al. 2024): logistic regression of "liked" on the reward minus delta."""
    return -math.log(sigma(beta * h_w - shift)) - math.log(1 - sigma(beta * h_l - shift))


def rdpo(h_w: float, h_l: float, n_w: int, n_l: int, beta: float, alpha: float) -> float:
    """R-DPO (Park et al. 2024), eq. 9."""
    return -math.log(sigma(beta * h_w - beta * h_l + (alpha * n_w - alpha * n_l)))


def sppo(h: float, win_probability: float, beta: float) -> float:
    """SPPO (Wu et al. 2024), eq. 4.7: (log pi/pi_t - eta (P(y beats pi_t) - 1/2))^2 with eta = 1 / beta."""
    eta = 1 / beta
    return (h - eta * (win_probability - 1 / 2)) ** 2


def lipo(s: Row, psi: Row) -> float:
    """LiPO-lambda (Liu et al. 2024): the LambdaLoss of scores s and labels psi; equal scores stand in their order."""
    order = sorted(range(len(s)), key=lambda i: -s[i])  # a stable sort
    tau = {i: place for place, i in enumerate(order, start=1)}
    gain = [2**p - 1 for p in psi]
    total = 0.0
    for i, j in itertools.permutations(range(len(s)), 2):
        if psi[i] > psi[j]:
            delta = abs(gain[i] - gain[j]) * abs(1 / math.log(1 + tau[i]) - 1 / math.log(1 + tau[j]))
            total += delta * math.log(1 + math.exp(-(s[i] - s[j])))
    return total


def plackett_luce(h: Row, ranks: Row, beta: float) -> float:
    """DPO's appendix (Rafailov et al. 2023, Plackett-Luce model): -log prod_k exp(beta h_k) / sum_{j >= k} ...

    Of tied responses each has all that are not better in its denominator (Breslow 1974).
    """
    product = 1.0
    for k in range(len(h)):
        rest = [j for j in range(len(h)) if ranks[j] >= ranks[k]]
        product *= math.exp(beta * h[k]) / sum(math.exp(beta * h[j]) for j in rest)
    return -math.log(product)


# ------------------------------------------------------------------------------------------------------ divergences
def divergence(name: str, u: float, alpha: float) -> float:
    """The generator f(u) of D_f(pi, pi_ref) = E_ref[f(pi / pi_ref)] (Wang et al. 2023, table 1)."""
    if name == "reverse_kl":
        return u * math.log(u)
    if name == "forward_kl":
        return -math.log(u)
    if name == "js":
        return u * math.log(u) - (u + 1) * math.log((u + 1) / 2)
    return (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))
