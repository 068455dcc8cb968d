"""The maths of reward modelling again, in float64 and plain Python, written from the papers. Imports no script."""

import itertools
import math


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + exp(-x))) without overflow."""
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def pairs_of(ranks: list[float]) -> list[tuple[int, int]]:
    """(better, worse) for every combination of two that do not tie."""
    found = []
    for i, j in itertools.combinations(range(len(ranks)), 2):
        if ranks[i] != ranks[j]:
            found.append((i, j) if ranks[i] < ranks[j] else (j, i))
    return found


def pairwise(scores: list[float], ranks: list[float], margin: float, smoothing: float) -> float:
    """InstructGPT eq. 1 for one prompt: the mean over its pairs, with Llama 2's margin and smoothed labels."""
    pairs = pairs_of(ranks)
    total = 0.0
    for i, j in pairs:
        d = scores[i] - scores[j] - margin
        total -= (1 - smoothing) * log_sigmoid(d) + smoothing * log_sigmoid(-d)
    return total / len(pairs)


def listwise(scores: list[float], ranks: list[float]) -> float:
    """-log probability of the ranking under Plackett-Luce, drawing one rank after the other (Breslow's ties)."""
    total = 0.0
    for rank in sorted(set(ranks)):
        candidates = sum(math.exp(s) for s, r in zip(scores, ranks, strict=True) if r >= rank)
        for s, r in zip(scores, ranks, strict=True):
            if r == rank:
                total -= math.log(math.exp(s) / candidates)
    return total


def centre(scores: list[float], ranks: list[float]) -> float:
    """Mean over pairs of (r_i + r_j)^2 (Eisenstein et al. 2023)."""
    pairs = pairs_of(ranks)
    return sum((scores[i] + scores[j]) ** 2 for i, j in pairs) / len(pairs)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The two p with |share - p| = 1.96 sqrt(p (1 - p) / n), by bisection."""

    def root(inside: float, outside: float) -> float:
        for _ in range(200):
            p = (inside + outside) / 2
            near = abs(share - p) <= 1.959964 * math.sqrt(p * (1 - p) / n)
            inside, outside = (p, outside) if near else (inside, p)
        return inside

    return root(share, 0.0), root(share, 1.0)
