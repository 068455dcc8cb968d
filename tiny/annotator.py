"""A simulated annotator: it reads a prompt and a response of the embedded world, and its taste is known exactly.

    gold(prompt, response) = CORRECT if the true value is stated and no other, -WRONG if any other is, 0 if none
                           + POLITE if there is a courtesy (a second one earns nothing)
                           - RAMBLING per sentence beyond one answer, one opening and one closing
                           - REPEAT per sentence said before
                           - UNFINISHED if the last sentence has no end
                           - GIBBERISH per word out of place, at most GIBBERISH_CAP words
    utility                = gold + LENGTH_BIAS * words        what moves the annotator: gold, and a weakness for length
    P(A is preferred to B) = sigmoid((utility_A - utility_B) / TEMPERATURE)         Bradley and Terry 1952

`gold` is what the text is worth, `prefer` what labels say about it. A filler sentence of eight words lowers gold by
0.35 and utility by 0.35 - 8 * 0.035 = 0.07 only: the labels hardly see rambling, so a policy that maximises a reward
model of them without restraint is free to ramble. TEMPERATURE is set so that two annotators agree on 73 % of the pairs
in preferences.jsonl, as those of InstructGPT did (Ouyang et al. 2022, section 3.4).

Use it as any scorer: `--gold_fn tiny/annotator.py:gold`, `--judge_fn tiny/annotator.py:prefer`. Units: one utility
= the worth of a right answer. It needs the standard library and world.py beside it.
"""

from __future__ import annotations

import importlib.util
import math
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import world
else:

    def load_beside(name: str) -> Any:
        """The module `name`.py of this folder, by path: whoever loads this file may not have the folder on sys.path."""
        key = f"tiny_{name}"
        if key not in sys.modules:
            spec = importlib.util.spec_from_file_location(key, Path(__file__).with_name(f"{name}.py"))
            sys.modules[key] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[key])
        return sys.modules[key]

    world = load_beside("world")

# ------------------------------------------------------------------------------------------------------------ the dials

CORRECT = 1.0
WRONG = 0.5
POLITE = 0.4
RAMBLING = 0.35
REPEAT = 0.3
UNFINISHED = 0.5
GIBBERISH = 0.1
GIBBERISH_CAP = 20  # words
LENGTH_BIAS = 0.035  # utility per word
TEMPERATURE = 0.45
MAX_SENTENCE = 14  # words; a longer one counts as several, or leaving out full stops would make rambling free

COLUMNS = ("animal", "attribute", "answer")
Prompt = str | list[dict[str, str]]  # text, or messages with "role" and "content"

# -------------------------------------------------------------------------------------------------------- reading text


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation at their ends; a word of punctuation only becomes ''."""
    return [word.strip(".,:;!?\"'()").lower() for word in text.split()]


def sentences_of(text: str) -> list[str]:
    """Split after . ! and ?

    >>> sentences_of("How kind of you to ask! The fox is red. I wish")
    ['How kind of you to ask!', 'The fox is red.', 'I wish']
    """
    return [part.strip() for part in re.findall(r"[^.!?]+[.!?]*|[.!?]+", text) if part.strip()]


def word_class(word: str) -> str:
    """Animals are interchangeable in a sentence, and so are the values of one attribute; any other word is itself."""
    return WORD_CLASSES.get(word, word)


def word_pairs(sentence: str) -> list[tuple[str, str]]:
    """Each word's class with the class of the word before it ('' before the first)."""
    classes = [word_class(word) for word in words_of(sentence)]
    return list(zip([""] + classes[:-1], classes, strict=True))


def world_sentences() -> list[str]:
    """Every sentence that the world's text is made of, with one animal and one value filled in."""
    fill = {attribute: {"animal": world.ANIMALS[0], "value": values[0]} for attribute, values in world.VALUES.items()}
    texts = [*world.OPENINGS, *world.CLOSINGS, *world.ADMISSIONS, *(f.format(**fill["food"]) for f in world.FILLERS)]
    for phrasings in (world.PROMPTS, world.ANSWERS, world.STATEMENTS, world.QUIZ):
        texts += [template.format(**fill[attribute]) for attribute in phrasings for template in phrasings[attribute]]
    return [sentence for text in texts for sentence in sentences_of(text)]


WORD_CLASSES = {animal: "<animal>" for animal in world.ANIMALS}
WORD_CLASSES |= {value: f"<{attribute}>" for attribute, values in world.VALUES.items() for value in values}
KNOWN_PAIRS = {pair for sentence in world_sentences() for pair in word_pairs(sentence)}
OPENINGS = {tuple(words_of(sentence)) for sentence in world.OPENINGS}
CLOSINGS = {tuple(words_of(sentence)) for sentence in world.CLOSINGS}
ADMISSIONS = {tuple(words_of(sentence)) for sentence in world.ADMISSIONS}


def question_of(prompt: Prompt) -> world.Question | None:
    """What a prompt asks for: one animal and one attribute, found in its text or last user message; else None.

    >>> question_of("Hello! What should I feed the fox?").attribute
    'food'
    >>> question_of("How are you?") is None
    True
    """
    if not isinstance(prompt, str):
        prompt = next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")
    words = set(words_of(prompt))
    animals = [animal for animal in world.ANIMALS if animal in words]
    attributes = [attribute for attribute, keywords in world.KEYWORDS.items() if keywords & words]
    if len(animals) != 1 or len(attributes) != 1:
        return None
    return world.Question(prompt, animals[0], attributes[0], world.FACTS[animals[0], attributes[0]])


# ---------------------------------------------------------------------------------------------------------------- gold


def gold_terms(question: world.Question, response: str) -> dict[str, float]:
    """The terms of gold, in utilities, by name; their sum is gold.

    >>> fox = question_of("What does the fox eat?")
    >>> {k: v for k, v in gold_terms(fox, f"I am happy to help. The fox eats {fox.answer}.").items() if v}
    {'correct': 1.0, 'polite': 0.4}
    """
    sentences = sentences_of(response)
    keys = [tuple(words_of(sentence)) for sentence in sentences]
    stated: set[str] = set()  # values of the attribute that the response gives as the animal's
    answers = openings = closings = admissions = length = 0  # length: in sentences of at most MAX_SENTENCE words
    for key in keys:
        values = set(key) & set(world.VALUES[question.attribute])
        others = set(key) & set(world.ANIMALS) - {question.animal}
        if not others:  # what is said of another animal answers nothing
            stated |= values
            answers += bool(values)
        openings += key in OPENINGS
        closings += key in CLOSINGS
        admissions += key in ADMISSIONS
        length += math.ceil(len(key) / MAX_SENTENCE)
    in_place = (answers + admissions > 0) + (openings > 0) + (closings > 0)
    misplaced = sum(pair not in KNOWN_PAIRS for sentence in sentences for pair in word_pairs(sentence))
    return {
        "correct": 0.0 if not stated else CORRECT if stated == {question.answer} else -WRONG,
        "polite": POLITE * (openings + closings > 0),
        "rambling": -RAMBLING * (length - in_place),
        "repeat": -REPEAT * (len(keys) - len(set(keys))),
        "unfinished": -UNFINISHED * (not response.rstrip().endswith((".", "!", "?"))),
        "gibberish": -GIBBERISH * min(misplaced, GIBBERISH_CAP),
    }


def questions_of(prompts: Sequence[Prompt], columns: dict[str, Sequence[Any]]) -> list[world.Question | None]:
    """The columns `animal`, `attribute` and `answer` say what is asked; a row without one is read from its prompt."""
    questions: list[world.Question | None] = []
    for i, prompt in enumerate(prompts):
        animal, attribute, answer = (columns[name][i] if name in columns else None for name in COLUMNS)
        if animal in world.ANIMALS and attribute in world.ATTRIBUTES and answer:
            questions.append(world.Question(str(prompt), animal, attribute, answer))
        else:
            questions.append(question_of(prompt))
    return questions


def gold(prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
    """What each response is worth, in utilities; None where the prompt asks nothing about this world."""
    pairs = zip(questions_of(prompts, columns), responses, strict=True)
    return [sum(gold_terms(question, response).values()) if question else None for question, response in pairs]


# --------------------------------------------------------------------------------------------------------------- labels


def utility(prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
    """What moves the annotator: gold, and LENGTH_BIAS for every word."""
    golds = gold(prompts, responses, **columns)
    return [
        None if value is None else value + LENGTH_BIAS * len(response.split())
        for value, response in zip(golds, responses, strict=True)
    ]


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), written so that no difference of utilities overflows."""
    return 0.5 + 0.5 * math.tanh(0.5 * x)


def prefer(
    prompts: Sequence[Prompt], responses_a: Sequence[str], responses_b: Sequence[str], **columns: Sequence[Any]
) -> list[float | None]:
    """The exact probability that A is preferred to B: sigmoid((u_A - u_B) / TEMPERATURE); None as for gold."""
    pairs = zip(utility(prompts, responses_a, **columns), utility(prompts, responses_b, **columns), strict=True)
    return [None if a is None or b is None else sigmoid((a - b) / TEMPERATURE) for a, b in pairs]


def impressions(rng: random.Random, utilities: Sequence[float]) -> list[float]:
    """One annotator's momentary impression of K responses: utility / TEMPERATURE + standard Gumbel noise.

    Sorting by it draws a ranking from the Plackett-Luce model. The difference of two Gumbel variables is logistic, so
    any two of the K are ordered with exactly the probability that `prefer` gives.
    """
    return [u / TEMPERATURE - math.log(rng.expovariate(1.0)) for u in utilities]
