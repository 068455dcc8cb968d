"""Positive sentiment of a text as a reward: `--reward_fn rewards/sentiment.py:positive` (pip install vaderSentiment).

The score is VADER's compound value (Hutto and Gilbert 2014) averaged over sentences, in [-1, 1]. The compound value of
a whole text saturates: most longer stories reach above 0.9, which leaves nothing to learn from.
"""

import re
from functools import cache
from typing import Any


@cache
def analyzer() -> Any:
    """VADER's analyzer with its own lexicon, loaded once."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentences(text: str) -> list[str]:
    """Pieces that end in . ! or ?, and what is left.

    >>> sentences('He smiled. "Why?" she asked')
    ['He smiled.', '"Why?"', 'she asked']
    """
    return [piece for piece in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"'])\s+", text.strip()) if piece]


def positive(prompts: list, responses: list[str], **columns: Any) -> list[float | None]:
    """Mean compound sentiment over each response's sentences; None for an empty response."""
    scores: list[float | None] = []
    for response in responses:
        values = [analyzer().polarity_scores(sentence)["compound"] for sentence in sentences(response)]
        scores.append(sum(values) / len(values) if values else None)
    return scores
