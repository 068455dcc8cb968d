"""A verifiable answer: whether a response states the true fact. `--reward_fn tiny/facts.py:right`, grpo.py's default.

It reads facts as annotator.py does, and nothing else of the annotator's taste: manners and length earn nothing.
"""

import importlib.util
from pathlib import Path
from typing import Any

spec = importlib.util.spec_from_file_location("tiny_annotator", Path(__file__).with_name("annotator.py"))
assert spec is not None and spec.loader is not None
annotator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(annotator)


def right(prompts: list, responses: list[str], **columns: Any) -> list[float | None]:
    """1 where the true value, and no other value of the attribute, is stated; else 0. None: no question of this world.

    >>> right(["What does the fox eat?"] * 2, ["The fox eats apples.", "The fox eats apples or worms."])
    [1.0, 0.0]
    """
    pairs = zip(annotator.questions_of(prompts, columns), responses, strict=True)
    return [float(annotator.gold_terms(q, response)["correct"] > 0) if q else None for q, response in pairs]
