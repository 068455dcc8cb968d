r"""Verifiable answers as rewards: `--reward_fn rewards/math.py:numeric`. 1 where the answer is right, else 0.

What counts is the final answer: what follows the last `####` (GSM8K's mark; Cobbe et al. 2021), else what stands in the
last \boxed{...} (MATH's mark; Hendrycks et al. 2021), else all of the text. The column `answer` of the data set may be
the answer itself or a solution that ends in one.
"""

import re
from fractions import Fraction
from typing import Any

NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])[-+])?"  # a sign, but not the minus of 7-3
    r"(?:\$[-+]?)?(?:\d+\s+(?=\d+\s?/\s?\d))?"  # $, and the 3 of 3 1/2
    r"(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+|(?=\.\d))"  # 1,234 or 1234 or nothing, as in .5
    r"(?:\.\d+)?"
    r"(?:\s?/\s?\d+(?:\.\d+)?)?"  # 3/4
)


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...}, braces inside it included; None where there is none.

    >>> boxed(r"so \boxed{1}, no: \boxed{\frac{3}{4}}.")
    '\\frac{3}{4}'
    """
    _, mark, rest = text.rpartition(r"\boxed{")
    depth = 1
    for i, character in enumerate(rest if mark else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:i]
    return None


def final_answer(text: str) -> tuple[str, bool]:
    r"""(the final answer, whether a mark says so).

    >>> final_answer("2 + 3 = 5\n#### 5"), final_answer("I think 5")
    (('5', True), ('I think 5', False))
    """
    if "####" in text:
        return text.rpartition("####")[2].strip(), True
    found = boxed(text)
    return (found.strip(), True) if found is not None else (text.strip(), False)


def number(text: str) -> Fraction | None:
    r"""The number a text answers with, exactly: the first one after a mark, else the last one of the text.

    Signs, thousands separators, decimals, fractions, mixed numbers; dollar and percent signs are read over: 50% is 50.

    >>> [str(number(t)) for t in ("#### 1,234", r"\boxed{-\frac{3}{4}}", "7-3 = 4.0.", "-$.5", "50%", "10, 20", "5-3")]
    ['1234', '-3/4', '4', '-1/2', '50', '20', '3']
    """
    answer, marked = final_answer(text)
    answer = answer.replace("\u2212", "-").replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    part = r"\s*(?:\{\s*([-+]?\d+)\s*\}|(\d))"  # of \frac{1}{12} or \frac12
    answer = re.sub(r"(?<=\d)\s*(?=\\[dt]?frac)", " ", answer)
    answer = re.sub(rf"\\[dt]?frac{part}{part}", r"\1\2/\3\4", answer)
    found = NUMBER.findall(answer)
    if not found or len(text := found[0] if marked else found[-1]) > 1000:  # int() refuses 4300 digits
        return None
    *whole, last = re.sub(r"\s*/\s*", "/", re.sub(r"[$,]", "", text)).split()
    top, _, bottom = last.partition("/")
    value = Fraction(top) / Fraction(bottom) if bottom and Fraction(bottom) else Fraction(top)
    return Fraction(whole[0]) + (-value if whole[0].startswith("-") else value) if whole else value


def numeric(prompts: list, responses: list[str], answer: list, **columns: Any) -> list[float | None]:
    r"""1 where the response's number is the answer's, else 0; None where the column `answer` holds no number.

    >>> numeric([""] * 3, ["It is $18.00.", r"\boxed{36/2}", "18 of 20"], ["9 * 2 = 18\n#### 18"] * 3)
    [1.0, 1.0, 0.0]
    """
    truths = [number(str(a)) for a in answer]
    return [None if t is None else float(number(y) == t) for t, y in zip(truths, responses, strict=True)]


def exact(prompts: list, responses: list[str], answer: list, **columns: Any) -> list[float | None]:
    """1 where the final answer is the column `answer`'s, but for case, spacing and a full stop at the end; else 0.

    >>> exact([""] * 2, ["Because it is. #### New  York.", "New York it is"], ["new york"] * 2)
    [1.0, 0.0]
    """

    def plain(text: Any) -> str:
        return " ".join(final_answer(str(text))[0].casefold().split()).rstrip(".")

    return [None if a is None else float(plain(y) == plain(a)) for y, a in zip(responses, answer, strict=True)]
