"""Rewards for the form of a text: `--rewards rewards/math.py:numeric rewards/text.py:repetition=0.2`.

Each scores one property, in units that make a weight around 0.1 to 1 sensible beside a right answer's 1.
"""

import re
from typing import Any

TAGGED = r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*"  # DeepSeek-R1, 2025
N = 3  # words in an n-gram of `repetition`


def matches(prompts: list, responses: list[str], pattern: list[str], **columns: Any) -> list[float | None]:
    """1 where the whole response matches the regular expression in the row's column `pattern`, else 0.

    >>> matches([""] * 2, ["Answer: 42", "42"], [r"Answer: [0-9]+"] * 2)
    [1.0, 0.0]
    """
    return [float(re.fullmatch(p, y, re.DOTALL) is not None) for p, y in zip(pattern, responses, strict=True)]


def tagged(prompts: list, responses: list[str], **columns: Any) -> list[float | None]:
    """1 where the response is <think>...</think><answer>...</answer> and nothing else, else 0.

    >>> tagged([""] * 2, ["<think>6 * 7</think> <answer>42</answer>", "<answer>42</answer>"])
    [1.0, 0.0]
    """
    return matches(prompts, responses, [TAGGED] * len(responses))


def length(prompts: list, responses: list[str], words: list, **columns: Any) -> list[float | None]:
    """-|words in the response - target| / target, with the target in the column `words`; None where that is null.

    >>> length([""] * 3, ["one two three", "one", "one"], [3, 2, None])
    [0.0, -0.5, None]
    """
    pairs = zip(responses, words, strict=True)
    return [None if not target else 0.0 - abs(len(y.split()) - target) / target for y, target in pairs]


def brevity(prompts: list, responses: list[str], **columns: Any) -> list[float | None]:
    """-0.01 per word.

    >>> brevity([""], ["one two three"])
    [-0.03]
    """
    return [-len(y.split()) / 100 for y in responses]


def repetition(prompts: list, responses: list[str], **columns: Any) -> list[float | None]:
    """-(share of the response's runs of N words that were said before in it), in [-1, 0].

    >>> repetition([""] * 2, ["a b c a b c", "short"])  # abc bca cab abc: one of four
    [-0.25, 0.0]
    """
    scores: list[float | None] = []
    for y in responses:
        words = y.casefold().split()
        runs = [tuple(words[i : i + N]) for i in range(len(words) - N + 1)]
        scores.append(len(set(runs)) / len(runs) - 1 if runs else 0.0)
    return scores
