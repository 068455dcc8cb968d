"""Rebuild the embedded world: its data, its tokenizer, its base model, and the adapters that the defaults point at.

    python tiny/make.py data          the .jsonl files beside this one, and tiny/build/corpus.jsonl; 10 seconds
    python tiny/make.py init          tiny/build/init: a tokenizer trained on the corpus, and a model of random weights
    python tiny/make.py base          tiny/base: that model, trained on the corpus by sft.py
    python tiny/make.py sft | reward | ppo | responses      the later stages, by the repository's own scripts
    python tiny/make.py measure       ceilings of the labels, and what the reward model learned of the annotator's taste
    python tiny/make.py all           everything above, in this order
    python tiny/make.py compare       README's table of methods, three seeds each; half an hour

Everything is a function of SEED: `data` writes the same bytes every time (a test compares with the committed files).
Runs go to tiny/build/, which git ignores; what later stages and users need is copied from there to tiny/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import annotator
    import world
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
else:

    def load_beside(name: str) -> Any:
        """The module `name`.py of this folder, by path: whoever loads this file may not have the folder on sys.path."""
        key = f"tiny_{name}"
        if key not in sys.modules:
            spec = importlib.util.spec_from_file_location(key, Path(__file__).with_name(f"{name}.py"))
            sys.modules[key] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[key])
        return sys.modules[key]

    world, annotator = load_beside("world"), load_beside("annotator")

TINY = Path(__file__).resolve().parent
BUILD = TINY / "build"
SEED = 0

Row = dict[str, Any]

# -------------------------------------------------------------------------------------------------------------- splits

# Prompts of each split; together all 1920. A prompt string is in one split only, whatever the stage.
SPLIT_SIZES = {
    "sft": 460,
    "sft_eval": 54,
    "preferences": 500,
    "preferences_eval": 250,
    "prompts": 400,
    "prompts_eval": 256,
}


def rng_of(name: str) -> random.Random:
    """A generator of its own for everything that is drawn, so that changing one file leaves the others as they are."""
    return random.Random(f"{SEED} {name}")


def splits() -> dict[str, list[world.Question]]:
    """Questions by split, in random order. No prompt is in two splits, and the annotator reads each as it was meant."""
    questions = world.all_questions()
    rng_of("splits").shuffle(questions)
    parts, start = {}, 0
    for name, size in SPLIT_SIZES.items():
        parts[name] = questions[start : start + size]
        start += size
    prompts = [question.prompt for part in parts.values() for question in part]
    assert start == len(questions) == len(prompts) == len(set(prompts)), "splits must be disjoint and cover all prompts"
    assert all(annotator.question_of(question.prompt) == question for question in questions)
    return parts


# ---------------------------------------------------------------------------------------------------------- data files

TWO_TURNS = 0.15  # share of demonstrations with a second question
PAIRS_PER_PROMPT = {"preferences": 8, "preferences_eval": 2}
N_RANKINGS, K = 200, 4
TIE = 0.04  # two impressions of one ranking that are nearer than this count as a tie; in units of TEMPERATURE


def turn(question: world.Question, response: str) -> list[Row]:
    """One user message and its answer."""
    return [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": response}]


def demonstrations(name: str, questions: list[world.Question], n: int) -> list[Row]:
    """SFT rows: n dialogues of one or two turns, of varied quality. Every question opens about equally many."""
    rng = rng_of(name)
    rows = []
    for i in range(n):
        first, second = questions[i % len(questions)], rng.choice(questions)
        messages = turn(first, world.write_response(rng, first))
        if rng.random() < TWO_TURNS and second != first:
            messages += turn(second, world.write_response(rng, second))
        rows.append({"messages": messages})
    return rows


def different_responses(rng: random.Random, question: world.Question, n: int) -> list[str]:
    """n responses by n writers, no two alike."""
    responses: list[str] = []
    while len(responses) < n:
        response = world.write_response(rng, question)
        if response not in responses:
            responses.append(response)
    return responses


def labelled_pairs(name: str, questions: list[world.Question]) -> list[Row]:
    """Preference rows: two responses, the annotator's probability that the first wins, and one label drawn from it."""
    rng = rng_of(name)
    rows: list[Row] = []
    for question in questions * PAIRS_PER_PROMPT[name]:
        a, b = different_responses(rng, question, 2)
        (p_a,) = annotator.prefer([question.prompt], [a], [b])
        assert p_a is not None
        chosen, rejected, p_chosen = (a, b, p_a) if rng.random() < p_a else (b, a, 1 - p_a)
        row: Row = {"prompt": question.prompt, "chosen": chosen, "rejected": rejected}
        if name == "preferences_eval":
            row = {"id": f"{name}-{len(rows)}", **row, "p_chosen": round(p_chosen, 6), "subset": question.attribute}
        rows.append(row)
    return rows


def ranks_of(impressions: list[float]) -> list[int]:
    """1 = best. Neighbours nearer than TIE share the better rank, and the next rank is skipped, as in sport.

    >>> ranks_of([0.0, 2.0, 1.99, 1.0])
    [4, 1, 1, 3]
    """
    order = sorted(range(len(impressions)), key=lambda i: -impressions[i])
    ranks = [1] * len(impressions)
    for place, (better, worse) in enumerate(zip(order[:-1], order[1:], strict=True), start=2):
        ranks[worse] = ranks[better] if impressions[better] - impressions[worse] < TIE else place
    return ranks


def rankings(questions: list[world.Question]) -> list[Row]:
    """K-wise rows: K responses to one prompt and the ranks that one annotator gave them."""
    rng = rng_of("rankings")
    rows = []
    for question in rng.sample(questions, N_RANKINGS):
        responses = different_responses(rng, question, K)
        utilities = [u for u in annotator.utility([question.prompt] * K, responses) if u is not None]
        ranks = ranks_of(annotator.impressions(rng, utilities))
        rows.append({"prompt": question.prompt, "responses": responses, "ranks": ranks})
    return rows


def prompt_rows(name: str, questions: list[world.Question]) -> list[Row]:
    """RL rows: the prompt, and for the annotator what it asks and the true value."""
    return [{"id": f"{name}-{i}", **vars(question)} for i, question in enumerate(questions)]


def data_files() -> dict[str, str]:
    """File name -> content (JSON Lines) of every committed data file."""
    parts = splits()
    rows = {
        "sft": demonstrations("sft", parts["sft"], 1000),
        "sft_eval": demonstrations("sft_eval", parts["sft_eval"], 100),
        "preferences": labelled_pairs("preferences", parts["preferences"]),
        "preferences_eval": labelled_pairs("preferences_eval", parts["preferences_eval"]),
        "rankings": rankings(parts["preferences"]),
        "prompts": prompt_rows("prompts", parts["prompts"]),
        "prompts_eval": prompt_rows("prompts_eval", parts["prompts_eval"]),
    }
    return {f"{name}.jsonl": to_jsonl(part) for name, part in rows.items()}


def to_jsonl(rows: list[Row]) -> str:
    """One JSON object per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# -------------------------------------------------------------------------------------------------------------- corpus

P_CORPUS = 0.9  # probability that a fact is stated right in the base model's corpus
P_MANNERS = 0.3  # probability that a dialogue's answer is a whole response of a writer, not the bare fact
PAGES, COMPARISONS, LISTS, SMALL_TALK, QUIZZES, CHATS = 120, 2000, 30, 3000, 40, 20

# {% for %} over messages and nothing else, so that a longer dialogue begins with the text of a shorter one.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GUIDE = "You are a friendly guide to the animals."


def fact_sentence(rng: random.Random, animal: str, attribute: str, value: str) -> str:
    """One of the ten ways to state a value."""
    return rng.choice(world.ANSWERS[attribute] + world.STATEMENTS[attribute]).format(animal=animal, value=value)


def page(rng: random.Random, animal: str) -> str:
    """A page about one animal: each attribute once or twice in other words, and at times a sentence about nothing."""
    sentences = []
    for attribute in world.ATTRIBUTES:
        value = world.state_value(rng, world.ask("", animal, attribute), P_CORPUS)
        templates = rng.sample(world.ANSWERS[attribute] + world.STATEMENTS[attribute], rng.choice((1, 1, 2)))
        sentences += [template.format(animal=animal, value=value) for template in templates]
    sentences += [filler.format(animal=animal) for filler in rng.sample(world.FILLERS, rng.choice((0, 1, 2)))]
    rng.shuffle(sentences)
    return " ".join(sentences)


def comparison(rng: random.Random) -> str:
    """One attribute of three animals."""
    attribute = rng.choice(world.ATTRIBUTES)
    animals = rng.sample(world.ANIMALS, 3)
    values = [world.state_value(rng, world.ask("", animal, attribute), P_CORPUS) for animal in animals]
    return " ".join(fact_sentence(rng, *item) for item in zip(animals, [attribute] * 3, values, strict=True))


def value_list(rng: random.Random, attribute: str, value: str) -> str:
    """Which animals share a value: the facts read backwards."""
    owners = [animal for animal in world.ANIMALS if world.FACTS[animal, attribute] == value]
    rng.shuffle(owners)
    return f"A list for {value}: the " + ", the ".join(owners) + "."


def small_talk(rng: random.Random) -> str:
    """Courtesies and fillers, three to six in a row."""
    sentences = [*world.OPENINGS, *world.CLOSINGS, *world.ADMISSIONS, *world.FILLERS]
    animal = rng.choice(world.ANIMALS)
    return " ".join(s.format(animal=animal) for s in rng.sample(sentences, rng.randint(3, 6)))


def chat(rng: random.Random, questions: list[world.Question]) -> str:
    """A dialogue in the chat template, up to the last answer's text: sft.py adds the end itself."""
    text = f"<|system|>\n{GUIDE}<|end|>\n" if rng.random() < 0.05 else ""
    for question in questions:
        write = world.write_response if rng.random() < P_MANNERS else world.write_answer
        answer = write(rng, question, P_CORPUS)
        text += f"<|user|>\n{question.prompt}<|end|>\n<|assistant|>\n{answer}<|end|>\n"
    return text.removesuffix("<|end|>\n")


def quiz_questions(rng: random.Random, n: int) -> list[world.Question]:
    """Every fact asked n times, in words that no data split uses."""
    pairs = [(animal, attribute) for animal in world.ANIMALS for attribute in world.ATTRIBUTES] * n
    return [world.ask(rng.choice(world.QUIZ[attribute]), animal, attribute) for animal, attribute in pairs]


def corpus_documents(rng: random.Random) -> Iterator[str]:
    """All texts of the corpus, in order of kind."""
    for animal in world.ANIMALS * PAGES:
        yield page(rng, animal)
    for _ in range(COMPARISONS):
        yield comparison(rng)
    for attribute, values in world.VALUES.items():
        for value in values * LISTS:
            yield value_list(rng, attribute, value)
    for _ in range(SMALL_TALK):
        yield small_talk(rng)
    # Dialogues use the SFT split's prompts and the quiz. Most answers are bare, so manners are left for SFT to teach.
    questions = splits()["sft"] * CHATS + quiz_questions(rng, QUIZZES)
    rng.shuffle(questions)
    while questions:
        n = rng.choice((1, 1, 1, 2, 3))
        yield chat(rng, questions[:n])
        del questions[:n]


def corpus() -> list[str]:
    """The base model's training texts, shuffled."""
    rng = rng_of("corpus")
    texts = list(corpus_documents(rng))
    rng.shuffle(texts)
    return texts


def make_data() -> None:
    """Write the data files and the corpus."""
    for name, content in data_files().items():
        (TINY / name).write_text(content, encoding="utf-8")
    BUILD.mkdir(exist_ok=True)
    (BUILD / "corpus.jsonl").write_text(to_jsonl([{"text": text} for text in corpus()]), encoding="utf-8")


# ------------------------------------------------------------------------------------------------- tokenizer and model

VOCAB_SIZE = 1024  # at most
SPECIAL_TOKENS = ["<pad>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text survives encoding and decoding, and a word of the world is about one token. No BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about a million random weights. Every in_features is a multiple of 64, as NF4 quantisation needs."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        dtype="float32",
        **ids,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def make_init() -> None:
    """Write tiny/build/init: what `base` starts from."""
    lines = (BUILD / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = train_tokenizer([json.loads(line)["text"] for line in lines])
    tokenizer.save_pretrained(BUILD / "init")
    new_model(tokenizer).save_pretrained(BUILD / "init")


# -------------------------------------------------------------------------------------------------------------- stages

# Stage -> command, run from the repository's root with the scripts' defaults.
STAGES = {
    "base": "sft.py --lora_r 0 --model tiny/build/init --dataset tiny/build/corpus.jsonl --output_dir tiny/build/base"
    " --learning_rate 4e-3 --epochs 3 --batch_size 64 --tokens_per_batch 512 --eval_size 200",
    "sft": "sft.py --output_dir tiny/build/sft",
    "reward": "reward.py --output_dir tiny/build/reward",
    "ppo": "ppo.py --output_dir tiny/build/ppo",
}
PUBLISHED = ("base", "sft", "reward")  # stages whose run folder is copied to tiny/
PUBLISHED_FILES = (
    "config.json generation_config.json model.safetensors adapter_config.json adapter_model.safetensors reward.json "
    "tokenizer.json tokenizer_config.json chat_template.jinja args.json result.json"
).split()


def run_stage(name: str) -> None:
    """Run a stage's command from scratch, then publish its result."""
    shutil.rmtree(BUILD / name, ignore_errors=True)
    print(f"$ python {STAGES[name]}", flush=True)
    subprocess.run([sys.executable, *STAGES[name].split()], cwd=TINY.parent, check=True)
    if name in PUBLISHED:
        publish(name)


def publish(name: str) -> None:
    """Copy what loading needs from tiny/build/<name> to tiny/<name>; paths in it become relative to the repository."""
    source, target = BUILD / name, TINY / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for file in PUBLISHED_FILES:
        if (source / file).exists():
            content = (source / file).read_bytes()
            if file.endswith("_config.json") or file == "args.json":
                content = content.replace(f"{TINY.parent}/".encode(), b"")
            (target / file).write_bytes(content)


def make_responses() -> None:
    """Write responses_sft.jsonl and responses_ppo.jsonl: what both models answer to the evaluation prompts."""
    rows = [json.loads(line) for line in (BUILD / "ppo" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    for model in ("sft", "ppo"):
        of_model = [row for row in rows if row["model"] == model]
        kept = [{k: v for k, v in row.items() if k not in ("score", "gold", "step")} for row in of_model]
        (TINY / f"responses_{model}.jsonl").write_text(to_jsonl(kept), encoding="utf-8")
    shutil.copyfile(BUILD / "ppo" / "curves.png", TINY / "curves.png")


def measure() -> None:
    """Print what is known exactly of the labels, and how the reward model weighs each term of the annotator's utility.

    The weights are a least-squares fit of its scores, in logits per utility; the annotator's own are 1/TEMPERATURE.
    """
    import numpy as np

    for name in ("preferences", "preferences_eval"):
        rows = [json.loads(line) for line in (TINY / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        prompts, sides = [r["prompt"] for r in rows], ([r["chosen"] for r in rows], [r["rejected"] for r in rows])
        p = np.array(annotator.prefer(prompts, *sides), dtype=float)
        agreement, ceiling = np.mean(p**2 + (1 - p) ** 2), np.mean(np.maximum(p, 1 - p))
        print(f"{name}: two annotators agree {agreement:.3f}, ceiling of a reward model's accuracy {ceiling:.3f}")
    samples = (BUILD / "reward" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    sd = json.loads((TINY / "reward" / "reward.json").read_text())["sd"]  # scores are in sd, labels in logits
    terms, scores = [], []
    for row in map(json.loads, samples):
        for side in ("chosen", "rejected"):
            question = annotator.question_of(row["prompt"])
            assert question is not None
            term = annotator.gold_terms(question, row[side])
            terms.append({**term, "words": annotator.LENGTH_BIAS * len(row[side].split()), "constant": 1.0})
            scores.append(sd * row[f"{side}_score"])
    weights = np.linalg.lstsq(np.array([list(term.values()) for term in terms]), np.array(scores))[0]
    print(f"weights, logits per utility (true: {1 / annotator.TEMPERATURE:.2f} for each):")
    print(", ".join(f"{name} {weight:.2f}" for name, weight in zip(terms[0], weights, strict=True)))


# Row of README's table -> command, with the settings of tiny/.
METHODS = {
    **{loss: f"dpo.py --loss {loss}" for loss in ("sigmoid", "ipo", "simpo", "orpo", "kto", "rdpo")},
    "online dpo": "grpo.py --method online_dpo --reward_model tiny/reward --missing_eos_penalty 1",
    "ppo": "ppo.py",
}


def method_figures(folder: Path) -> tuple[float, float, float, float]:
    """(gold, KL to the SFT model, tokens, gold win-rate over the SFT model) of a run on the evaluation prompts."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    before, after = [[row for row in rows if row["model"] in names] for names in (("sft",), ("ppo", "dpo", "grpo"))]
    wins = [(a["gold"] > b["gold"]) + 0.5 * (a["gold"] == b["gold"]) for b, a in zip(before, after, strict=True)]
    kl = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["heldout_kl"]
    return mean([row["gold"] for row in after]), kl, mean([row["tokens"] for row in after]), mean(wins)


def compare() -> None:
    """Run every method of METHODS with seeds 0, 1, 2 (finished runs are kept); print means and 95 % t intervals."""
    from scipy.stats import t

    print("| method | gold | KL, nats | tokens | gold win-rate over SFT |\n|---|---|---|---|---|")
    for name, command in METHODS.items():
        figures = []
        for seed in range(3):
            folder = BUILD / "compare" / f"{name.replace(' ', '_')}_{seed}"
            if not (folder / "result.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                line = [*command.split(), "--seed", str(seed), "--output_dir", str(folder)]
                subprocess.run([sys.executable, *line], cwd=TINY.parent, check=True, stdout=subprocess.DEVNULL)
            figures.append(method_figures(folder))
        cells = []
        for digits, values in zip((3, 2, 1, 3), zip(*figures, strict=True), strict=True):
            half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
            cells.append(f"{mean(values):.{digits}f} +- {half:.{digits}f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Make one thing, or all in order."""
    makers: dict[str, Callable[[], None]] = {"data": make_data, "init": make_init}
    makers |= {name: partial(run_stage, name) for name in STAGES} | {"responses": make_responses, "measure": measure}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*makers, "all", "compare"])
    what = parser.parse_args(argv).what
    if what == "compare":
        compare()
        return
    for name in makers if what == "all" else [what]:
        makers[name]()


if __name__ == "__main__":
    main()
