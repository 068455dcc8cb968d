"""The embedded world: what is true of forty animals, how people ask about it, and how scripted writers answer.

Nothing here is zoology. Every animal has one food, one home, one colour and one sound, dealt out by a fixed seed, so
the truth of any answer is known exactly, and a model of a million parameters can learn all of it. Three kinds of text:

    PROMPTS               what users ask; the data splits are made of these strings
    ANSWERS, FILLERS ...  what the writers build responses from; the annotator knows each sentence by heart
    STATEMENTS, QUIZ      what only the base model's text corpus contains

Standard library only, and no path is needed to import it: annotator.py and make.py load it from beside themselves.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# ----------------------------------------------------------------------------------------------------------- the facts

FACTS_SEED = "facts"

ANIMALS = (
    "badger bear beaver camel crab deer dolphin duck eagle falcon fox frog goat goose hedgehog heron horse koala lion "
    "lizard monkey moose mouse otter owl panda penguin rabbit raven seal sheep snake squirrel swan tiger toad turtle "
    "whale wolf zebra"
).split()

# No value belongs to two attributes, and none occurs in a prompt, courtesy or filler below (a test holds this): a value
# that turns up in a response was therefore stated as one.
VALUES = {
    "food": "apples berries fish grass honey leaves nuts roots seeds worms".split(),
    "home": "barn cave desert forest garden harbour meadow river swamp valley".split(),
    "colour": "black blue brown green grey orange purple red white yellow".split(),
    "sound": "chirp click growl grunt hiss howl hum roar squeak whistle".split(),
}
ATTRIBUTES = tuple(VALUES)


def deal_facts() -> dict[tuple[str, str], str]:
    """(animal, attribute) -> the one true value. Values are spread evenly, so guessing earns 1 in 10."""
    rng = random.Random(FACTS_SEED)
    facts = {}
    for attribute, values in VALUES.items():
        hands = values * (len(ANIMALS) // len(values))
        rng.shuffle(hands)
        facts.update({(animal, attribute): value for animal, value in zip(ANIMALS, hands, strict=True)})
    return facts


FACTS = deal_facts()

# ------------------------------------------------------------------------------------------------- what users may ask

PROMPTS = {
    "food": (
        "What does the {animal} eat?",
        "Which food does the {animal} like best?",
        "Please tell me what the {animal} eats.",
        "My daughter asked me: what does the {animal} eat?",
        "What is the usual food of the {animal}?",
        "Do you know what the {animal} likes to eat?",
        "I would like to learn about the diet of the {animal}.",
        "For a school project I need to know what the {animal} eats.",
        "Hello! What should I feed the {animal}?",
        "We met a hungry {animal}. What does it eat?",
        "Name the food of the {animal}, please.",
        "Quick question: what is a good meal for the {animal}?",
    ),
    "home": (
        "Where does the {animal} live?",
        "Which place is the home of the {animal}?",
        "Please tell me where the {animal} lives.",
        "My son wants to know: where does the {animal} live?",
        "What is the usual home of the {animal}?",
        "Do you know where the {animal} has its home?",
        "I would like to learn about the home of the {animal}.",
        "For a school project I need to know where the {animal} lives.",
        "Hello! Where should I look for the home of the {animal}?",
        "We are on a walk. Where does the {animal} live?",
        "Name the home of the {animal}, please.",
        "Quick question: where does the {animal} sleep at night?",
    ),
    "colour": (
        "What colour is the {animal}?",
        "Which colour does the {animal} have?",
        "Please tell me the colour of the {animal}.",
        "My daughter is drawing: what colour is the {animal}?",
        "What is the usual colour of the {animal}?",
        "Do you know the colour of the {animal}?",
        "I would like to learn about the colour of the {animal}.",
        "For a school project I need to know how the {animal} is coloured.",
        "Hello! In which colour should I paint the {animal}?",
        "We only have an old photo. What colour is the {animal}?",
        "Name the colour of the {animal}, please.",
        "Quick question: what colour should a toy {animal} have?",
    ),
    "sound": (
        "What sound does the {animal} make?",
        "Which sound belongs to the {animal}?",
        "Please tell me what the {animal} sounds like.",
        "My son asked me: what noise does the {animal} make?",
        "What is the usual sound of the {animal}?",
        "Do you know which noise the {animal} makes?",
        "I would like to learn about the voice of the {animal}.",
        "For a school project I need to know how the {animal} sounds.",
        "Hello! What should I hear when the {animal} is near?",
        "We listen in the dark. What sound does the {animal} make?",
        "Name the sound of the {animal}, please.",
        "Quick question: what noise is made by the {animal}?",
    ),
}

# Words that give away what a prompt asks for. Each prompt above holds words of one attribute only (a test holds this).
KEYWORDS = {
    "food": {"diet", "eat", "eats", "feed", "food", "hungry", "meal"},
    "home": {"home", "house", "live", "lives", "sleep", "sleeps"},
    "colour": {"color", "colour", "coloured", "paint"},
    "sound": {"hear", "noise", "sound", "sounds", "voice"},
}

# ------------------------------------------------------------------------------------------ what responses are made of

ANSWERS = {
    "food": (
        "The {animal} eats {value}.",
        "The food of the {animal} is {value}.",
        "I think it eats {value}.",
        "Every {animal} likes to eat {value}.",
        "You can feed {value} to the {animal}.",
    ),
    "home": (
        "The {animal} lives in the {value}.",
        "The home of the {animal} is the {value}.",
        "I think it lives in the {value}.",
        "Every {animal} likes to live in the {value}.",
        "You can find the {animal} in the {value}.",
    ),
    "colour": (
        "The {animal} is {value}.",
        "The colour of the {animal} is {value}.",
        "I think its colour is {value}.",
        "Every {animal} has the colour {value}.",
        "You can paint the {animal} in {value}.",
    ),
    "sound": (
        "The {animal} makes a {value}.",
        "The sound of the {animal} is a {value}.",
        "I think it makes a {value}.",
        "Every {animal} likes to make a {value}.",
        "You can hear the {animal} make a {value}.",
    ),
}

OPENINGS = (
    "Thank you for your question.",
    "What a nice question!",
    "I am happy to help.",
    "It is a pleasure to answer you.",
    "Of course, I will gladly help.",
    "How kind of you to ask!",
)

CLOSINGS = (
    "I hope this helps you.",
    "Please ask me again any time.",
    "Have a wonderful day!",
    "You are always welcome here.",
    "Please let me know if you need more.",
    "I wish you all the best.",
)

ADMISSIONS = (
    "I am not sure about that.",
    "Sorry, I do not know this one.",
    "I cannot answer that today.",
)

# 7 to 9 words each, and nothing an answer needs.
FILLERS = (
    "There is much more to say about the {animal}.",
    "Many people enjoy watching the {animal} in spring.",
    "My grandmother told us stories about the {animal}.",
    "Of all animals, the {animal} is special to me.",
    "I once read an old book about the {animal}.",
    "Some friends also wonder about the {animal}.",
    "The {animal} was here before the first people came.",
    "Children all over the world love the {animal}.",
    "In summer the {animal} is busy until evening.",
    "Good pictures of the {animal} are hard to take.",
    "People have wondered about this for many years.",
    "Every animal is different and that is good.",
    "One could talk about these things for hours.",
    "It is always good to learn about animals.",
    "Nature is full of wonders for those who look.",
    "Teachers hear such things nearly every week.",
    "Let me think about this a little longer.",
    "As they say, there is no end to learning.",
    "The weather also matters a lot in all this.",
    "Books about animals are a gift for young people.",
)

# -------------------------------------------------------------------------------------- what only the corpus contains

STATEMENTS = {
    "food": (
        "In the wild, the {animal} feeds on {value}.",
        "A hungry {animal} is looking for {value}.",
        "Give {value} to the {animal} and it will stay.",
        "The young {animal} soon learns to eat {value}.",
        "If you see {value} on a plate, think of the {animal}.",
    ),
    "home": (
        "In the wild, the {animal} makes its home in the {value}.",
        "A tired {animal} goes back to the {value}.",
        "Go to the {value} and you will meet the {animal}.",
        "The young {animal} grows up in the {value}.",
        "If you walk through the {value}, look for the {animal}.",
    ),
    "colour": (
        "In the wild, the {animal} is easy to see because it is {value}.",
        "A painter needs {value} for the {animal}.",
        "Take the {value} pencil and draw the {animal}.",
        "The young {animal} soon turns {value}.",
        "If something {value} moves, it may be the {animal}.",
    ),
    "sound": (
        "In the wild, the {animal} can be known by its {value}.",
        "A happy {animal} gives a {value}.",
        "Wait for a {value} and you have found the {animal}.",
        "The young {animal} soon learns to {value}.",
        "If you notice a {value} at night, it is the {animal}.",
    ),
}

# Questions of the corpus: they teach the chat form for every fact without touching a prompt of any data split.
QUIZ = {
    "food": (
        "Animal quiz: what goes into the {animal}?",
        "Fill in the food: {animal}.",
        "And the food of the {animal}?",
    ),
    "home": (
        "Animal quiz: where do we put the {animal}?",
        "Fill in the home: {animal}.",
        "And the home of the {animal}?",
    ),
    "colour": (
        "Animal quiz: which paint for the {animal}?",
        "Fill in the colour: {animal}.",
        "And the colour of the {animal}?",
    ),
    "sound": (
        "Animal quiz: what comes out of the {animal}?",
        "Fill in the sound: {animal}.",
        "And the sound of the {animal}?",
    ),
}


@dataclass(frozen=True)
class Question:
    """One prompt, and what it asks for. `answer` is the true value."""

    prompt: str
    animal: str
    attribute: str
    answer: str


def ask(template: str, animal: str, attribute: str) -> Question:
    """The question that a prompt template makes of one animal."""
    return Question(template.format(animal=animal), animal, attribute, FACTS[animal, attribute])


def all_questions() -> list[Question]:
    """Every prompt of the world, 40 animals x 4 attributes x 12 phrasings = 1920, in a fixed order."""
    return [ask(t, animal, attribute) for animal in ANIMALS for attribute in ATTRIBUTES for t in PROMPTS[attribute]]


# --------------------------------------------------------------------------------------------------------- the writers

P_CORRECT = 0.8  # probability that an answer sentence states the true value
P_ADMISSION = 0.3  # probability that a response admits ignorance instead of answering
P_COURTESY = (0.1, 0.3, 0.7)  # a writer is one of these; each draws an opening, and a closing, with that probability
FILLER_WEIGHTS = (0.42, 0.33, 0.17, 0.08)  # probability of 0, 1, 2, 3 fillers
P_FILLER_FIRST = 0.25  # probability that a response with fillers begins with one of them
P_REPEAT = 0.03  # probability that one sentence is said twice
P_UNFINISHED = 0.03  # probability that the last sentence breaks off


def state_value(rng: random.Random, question: Question, p_correct: float) -> str:
    """The true value with probability `p_correct`, else one of the nine wrong ones."""
    if rng.random() < p_correct:
        return question.answer
    return rng.choice([value for value in VALUES[question.attribute] if value != question.answer])


def write_answer(rng: random.Random, question: Question, p_correct: float = P_CORRECT) -> str:
    """One answer sentence and nothing else."""
    value = state_value(rng, question, p_correct)
    return rng.choice(ANSWERS[question.attribute]).format(animal=question.animal, value=value)


def write_response(rng: random.Random, question: Question, p_correct: float = P_CORRECT) -> str:
    """A response of 4 to about 50 words, most of 8 to 25, by a writer whose manners and patience are drawn."""
    p_courtesy = rng.choice(P_COURTESY)
    if rng.random() < P_ADMISSION:
        sentences = [rng.choice(ADMISSIONS)]
    else:
        sentences = [write_answer(rng, question, p_correct)]
    n_fillers = rng.choices(range(len(FILLER_WEIGHTS)), FILLER_WEIGHTS)[0]
    fillers = [filler.format(animal=question.animal) for filler in rng.sample(FILLERS, n_fillers)]
    if fillers and rng.random() < P_FILLER_FIRST:
        sentences.insert(0, fillers.pop())
    sentences += fillers
    if rng.random() < P_REPEAT:
        sentences.append(rng.choice(sentences))
    if rng.random() < p_courtesy:
        sentences.insert(0, rng.choice(OPENINGS))
    if rng.random() < p_courtesy:
        sentences.append(rng.choice(CLOSINGS))
    words = sentences[-1].split()
    if rng.random() < P_UNFINISHED and len(words) > 4:
        sentences[-1] = " ".join(words[: rng.randint(4, len(words) - 1)])
    return " ".join(sentences)
