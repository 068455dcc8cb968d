"""From files to token ids: templates, masks, BOS, end tokens, bad rows, the cache; own and real tokenizers."""

import functools
import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SHARED, read_jsonl, record, shared_folders, shared_or_skip, write_jsonl
from datasets import Dataset

import ppo
import sft

BOS, END, PAD = "<bos>", "<eos>", "<pad>"
# Own templates in the shapes that real ones have; every "role" token below becomes a special token.
OWN = {
    "plain": sft.PLAIN_TEMPLATE,
    "markup": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "headers": "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] | trim }}"
    "<|turn|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
    "brackets": "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% else %}"
    "{{ bos_token }}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}",
    "thoughts": "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and loop.last %}<thought>"
    "</thought>{% endif %}{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "closing": "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}",
    "no end": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
}
# The token with which each template ends an assistant's turn; where it has none, the tokenizer's EOS is added.
ENDS = {"plain": END, "markup": "<|end|>", "headers": "<|turn|>", "brackets": END, "thoughts": "<|end|>"}
ENDS |= {"closing": "<|end|>", "no end": END}
REAL_ENDS = [
    (r"chatml|qwen|smollm3|phi4$", "<|im_end|>"), (r"gemma", "<end_of_turn>"), (r"llama3", "<|eot_id|>"),
    (r"phi3|phi4-mini", "<|end|>"), (r"deepseekv3", "<｜end▁of▁sentence｜>"), (r"", END),
]  # fmt: skip
# Where turns become examples of their own: earlier turns are rendered differently later, or have no end token.
BREAKING = {"thoughts": True, "no end": True, "qwen3": True, "glm4moe": True}
BREAKING |= dict.fromkeys(["plain", "markup", "headers", "brackets", "chatml", "llama3", "gemma", "mistral-v1"], False)
SPECIAL = re.compile(r"<\|[^|<>]+\|>|<｜[^<>]+?｜>|<(?:start|end)_of_turn>|\[/?INST\]|\[gMASK\]|<sop>")
TALK = [
    {"role": "user", "content": "First question?"},
    {"role": "assistant", "content": "Alpha answer"},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "Beta, twice: Beta."},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def letters(template: str | None, adds_bos: bool = False, words: tuple[str, ...] = ()) -> Any:
    """A tokenizer of bytes whose special tokens are those of the template, as a real model's are: in its vocabulary
    but not named one by one in its settings."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    roles = ["<|system|>", "<|user|>", "<|assistant|>"] if template and "<|{{" in template else []
    special = dict.fromkeys([PAD, BOS, END, *roles, *SPECIAL.findall(template or "")])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *words])}
    merges = [(word[:-1], word[-1]) for word in words]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=PAD, chat_template=template
    )


@functools.cache
def real_tokenizer(folder: Path) -> Any:
    """A tokenizer of ../shared, loaded once."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def with_template() -> Iterator[Any]:
    """with_template(folder, template) -> real tokenizer; its own template comes back after the test."""
    changed = []

    def start(folder: Path, template: str) -> Any:
        tokenizer = real_tokenizer(folder)
        changed.append((tokenizer, tokenizer.chat_template))
        tokenizer.chat_template = template
        return tokenizer

    yield start
    for tokenizer, template in reversed(changed):
        tokenizer.chat_template = template


def real_templates() -> list[Path]:
    """The templates of ../shared, none where it is absent."""
    return sorted((SHARED / "templates").glob("*.jinja"))


def settings(window: int = 1024, last: bool = False) -> sft.Args:
    """sft.py's flags with this room for prompt and response together."""
    return sft.Args(max_prompt_length=window - 8, max_response_length=8, last_turn_only=last)


def spans(ids: list[int], mask: list[int]) -> list[list[int]]:
    """Runs of supervised tokens."""
    runs: list[list[int]] = []
    for i, (token, m) in enumerate(zip(ids, mask, strict=True)):
        if m and (i == 0 or not mask[i - 1]):
            runs.append([])
        if m:
            runs[-1].append(token)
    return runs


def leading_bos(tokenizer: Any, ids: list[int]) -> int:
    """How many BOS the ids begin with."""
    n = 0
    while tokenizer.bos_token_id is not None and ids[n : n + 1] == [tokenizer.bos_token_id]:
        n += 1
    return n


def pieces(tokenizer: Any, text: str) -> list[int]:
    """The ids of a piece of text, nothing added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def slow_tokens(tokenizer: Any, text: str, answers: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """(ids, mask) by tokenising what stands before each answer, and to its end, apart from the rest."""
    ids = pieces(tokenizer, text)
    mask = [0] * len(ids)
    for k, (begin, end) in enumerate(answers):
        left = pieces(tokenizer, text[:begin])
        if ids[: len(left)] != left:  # a token would straddle the beginning
            shifted = [(b - begin, e - begin) for b, e in answers[k:]]
            one, two = slow_tokens(tokenizer, text[:begin], answers[:k]), slow_tokens(tokenizer, text[begin:], shifted)
            return one[0] + two[0], one[1] + two[1]
        until = len(pieces(tokenizer, text[:end]))
        mask[len(left) : until] = [1] * (until - len(left))
    return ids, mask


def slow_conversation(
    tokenizer: Any, messages: list[dict], stop_ids: list[int], last_turn_only: bool = False
) -> list[tuple[list[int], list[int]]]:
    """What encode_conversation promises, the long way: each turn rendered as it is asked for, tokenised in pieces."""
    stops = [tokenizer.convert_ids_to_tokens(i) for i in stop_ids]
    texts: list[tuple[str, list[tuple[int, int]]]] = []
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for i in turns[-1:] if last_turn_only else turns:
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        assert after.startswith(before)
        ends = [after.find(stop, len(before)) + len(stop) for stop in stops if stop in after[len(before) :]]
        after = after[: min(ends)] if ends else after + tokenizer.eos_token
        if texts and before.startswith(texts[-1][0]):
            texts[-1] = (after, [*texts[-1][1], (len(before), len(after))])
        else:
            texts.append((after, [(len(before), len(after))]))
    found = []
    for text, answers in texts:
        ids, mask = slow_tokens(tokenizer, text, answers)
        n, bos = leading_bos(tokenizer, ids), tokenizer.bos_token_id
        wanted = int(bos is not None and (n > 0 or tokenizer("a")["input_ids"][0] == bos))
        found.append(([bos] * wanted + ids[n:], [0] * wanted + mask[n:]))
    return found


def check(tokenizer: Any, messages: list[dict], end: str | None, breaks: bool | None, exact: bool = True) -> None:
    """All that must hold for one tokenizer, template and conversation.

    `end`: the token that must end each turn (None: any stop token); `breaks`: whether turns become their own examples;
    `exact`: compare with the slow way.
    """
    size, stop_ids = len(tokenizer), sft.find_stop_ids(tokenizer, None)
    assert end is None or tokenizer.convert_tokens_to_ids(end) in stop_ids
    examples = sft.encode_conversation(tokenizer, messages, stop_ids)
    assert not exact or examples == slow_conversation(tokenizer, messages, stop_ids)
    last = sft.encode_conversation(tokenizer, messages, stop_ids, last_turn_only=True)
    assert not exact or last == slow_conversation(tokenizer, messages, stop_ids, last_turn_only=True)
    assert len(last) == 1

    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    runs = [run for ids, mask in examples for run in spans(ids, mask)]
    assert len(runs) == len(answers)  # every turn is supervised once
    assert breaks is None or len(examples) == (len(answers) if breaks else 1)
    starts = [i for ids, mask in examples for i in range(len(mask)) if mask[i] and not mask[i - 1]]
    hosts = [ids for ids, mask in examples for _ in spans(ids, mask)]
    turns = [t for t, m in enumerate(messages) if m["role"] == "assistant"]
    for ids, start, turn in zip(hosts, starts, turns, strict=True):  # what RL continues is what SFT was trained on
        assert ids[:start] == ppo.encode_prompt(tokenizer, messages[:turn])
    for run, answer in zip(runs, answers, strict=True):
        assert run[-1] in stop_ids and not set(run[:-1]) & set(stop_ids)
        assert end is None or tokenizer.convert_ids_to_tokens(run[-1]) == end
        text = tokenizer.decode(run[:-1]).strip()
        thought = re.match(r"(<thought></thought>|<think>\s*</think>\s*)", text)  # the template's own opening
        text = text[thought.end() :] if thought else text
        assert text.startswith(answer)
        assert end is None or text == answer  # without a special end token the template's own words follow
    for ids, mask in examples:
        context = tokenizer.decode([token for token, m in zip(ids, mask, strict=True) if not m])
        assert len(examples) > 1 or not any(answer in context for answer in answers)
        assert len(ids) == len(mask) and max(ids) < size and not mask[0]

    # every path begins the same way: one BOS where the tokenizer or the template has one
    rendered = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    bos = tokenizer.bos_token
    wanted = int(
        bos is not None and (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id or rendered.startswith(bos))
    )
    paths = [ids for ids, _ in examples] + [ppo.encode_prompt(tokenizer, messages[:-1])]
    assert [leading_bos(tokenizer, ids) for ids in paths] == [wanted] * len(paths)

    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    body = tokenizer.decode(examples[-1][0][wanted:-1])
    assert squeeze(whole).removeprefix(bos or "").startswith(squeeze(body))
    assert len(tokenizer) == size


def squeeze(text: str) -> str:
    """Without white space, which sentencepiece tokenizers do not bring back at the ends of words."""
    return re.sub(r"\s", "", text)


# --------------------------------------------------------------------------------------- own and real templates
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_own_templates(name: str, adds_bos: bool, system: bool) -> None:
    """Traps 2, 16, 17: masks, end tokens, one BOS and prefixes in the shapes that real templates have."""
    messages = [SYSTEM, *TALK] if system and name not in ("brackets",) else TALK
    check(letters(OWN[name], adds_bos), messages, ENDS[name], BREAKING.get(name))


@pytest.mark.parametrize("path", real_templates() or [None], ids=lambda p: p.stem if p else "none")
@pytest.mark.parametrize("system", [False, True])
def test_real_templates_with_their_own_special_tokens(path: Path | None, system: bool) -> None:
    """Traps 2, 16, 17: all templates of ../shared, with a tokenizer that has each one's special tokens."""
    path = path or shared_or_skip("templates")
    tokenizer = letters(path.read_text(encoding="utf-8"), "bos_token" in path.read_text(encoding="utf-8"))
    end = next(token for pattern, token in REAL_ENDS if re.match(pattern, path.stem))
    messages = [SYSTEM, *TALK] if system else TALK
    if path.stem == "deepseekv3" or (system and path.stem in ("mistral-v2v3", "mistral-v3-tekken")):
        assert_no_prefix(tokenizer, messages, path.stem)
    elif system and path.stem in ("gemma", "gemma-training"):
        with pytest.raises(sft.BadRow) as caught:
            sft.encode_conversation(tokenizer, messages, [tokenizer.eos_token_id])
        assert caught.value.args == ("refused by the chat template", "System role not supported")
    else:
        check(tokenizer, messages, end, BREAKING.get(path.stem))


def assert_no_prefix(tokenizer: Any, messages: list[dict], name: str) -> None:
    """The reason is said, with the text before the boundary and both sides of it."""
    with pytest.raises(sft.BadRow) as caught:
        sft.encode_conversation(tokenizer, messages, sft.find_stop_ids(tokenizer, None))
    reason, detail = caught.value.args
    assert reason == "chat template: the prompt is no prefix of prompt + response"
    if name == "deepseekv3":
        assert re.fullmatch(r"after '.*<｜Assistant｜>' '<think>.*', with its response 'Alpha answer.*'", detail)
    else:
        assert re.fullmatch(r"after '.*\[INST\] ?' 'Be brief.*', with its response 'First question.*'", detail)


@pytest.mark.parametrize("path", real_templates() or [None], ids=lambda p: p.stem if p else "none")
@pytest.mark.parametrize("folder", shared_folders("tokenizers") or [None], ids=lambda p: p.name if p else "none")
def test_real_templates_with_every_real_tokenizer(folder: Path | None, path: Path | None, with_template: Any) -> None:
    """Traps 2, 16, 17: markup that a tokenizer does not know is text to it; all else holds the same."""
    folder, path = folder or shared_or_skip("tokenizers"), path or shared_or_skip("templates")
    tokenizer = with_template(folder, path.read_text(encoding="utf-8"))
    if path.stem == "deepseekv3":
        assert_no_prefix(tokenizer, TALK, path.stem)
        return
    try:
        sft.render(tokenizer, TALK)
    except sft.BadRow as bad:
        assert tokenizer.bos_token is None and "'bos_token' is undefined" in str(bad)
        pytest.skip("the template adds a BOS that the tokenizer does not have")
    # phi3's <|assistant|> swallows a line feed behind it, with which glm4moe's answers begin: it is kept
    check(tokenizer, TALK, None, None, exact=(folder.name, path.stem) != ("phi3-mini", "glm4moe"))


@pytest.mark.parametrize("folder", shared_folders("tokenizers") or [None], ids=lambda p: p.name if p else "none")
def test_real_tokenizers_with_their_own_templates(folder: Path | None) -> None:
    """Traps 2, 16: as downloaded, the end of turn is one special token that the template tells us."""
    tokenizer = real_tokenizer(folder or shared_or_skip("tokenizers"))
    name = Path(tokenizer.name_or_path).name
    end = {"mistral-v1": "</s>", "mistral-v3": "</s>", "phi3-mini": "<|end|>"}.get(name, "<|im_end|>")
    check(tokenizer, TALK, end, {"qwen3": True, "qwen2.5": False, "mistral-v1": False}.get(name))


def test_the_tiny_tokenizer() -> None:
    """The embedded world's own chat template and tokenizer, with and without a system message."""
    for messages in (TALK, [SYSTEM, *TALK]):
        check(tiny_tokenizer(), messages, tiny_tokenizer().eos_token, False)


def tiny_tokenizer() -> Any:
    """The embedded world's."""
    return real_tokenizer(ROOT / "tiny" / "base")


@pytest.mark.parametrize("name", [*OWN, "alpaca", "vicuna", "qwen3", "llama3", "mistral-v1", "chatml"])
@pytest.mark.parametrize("seed", range(4))
def test_long_conversations_equal_the_slow_way(name: str, seed: int) -> None:
    """Random words, repeated answers, answers that quote each other or the markup's words: fast and slow agree."""
    text = OWN.get(name) or shared_or_skip("templates", f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer, rng = letters(text, words=("ab", "aba")), np.random.default_rng(seed)
    words = ["ab", "a", " ab", "Yes", "Assistant:", "ASSISTANT:", "### Response:", "\n", "  ", "é", "🙂", "assistant"]
    messages = [SYSTEM] if seed % 2 and name not in ("brackets", "mistral-v1") else []
    for _ in range(6):
        for who in ("user", "assistant"):
            content = "".join(rng.choice(words, rng.integers(1, 7)))
            messages.append({"role": who, "content": content.strip() or "ab"})
    if seed == 2:
        messages = [{**m, "content": "Yes" if m["role"] == "assistant" else m["content"]} for m in messages]
    stop_ids = sft.find_stop_ids(tokenizer, None)
    for last in (False, True):
        expected = slow_conversation(tokenizer, messages, stop_ids, last)
        assert sft.encode_conversation(tokenizer, messages, stop_ids, last) == expected


@pytest.mark.parametrize("name", ["alpaca", "vicuna"])
def test_a_user_may_quote_the_markup(name: str) -> None:
    """Markup in ordinary words: a user who quotes it together with the answer to come is no answer."""
    tokenizer = letters(shared_or_skip("templates", f"{name}.jinja").read_text(encoding="utf-8"))
    mark = {"alpaca": "### Response:\n", "vicuna": "ASSISTANT: "}[name]
    talk = [*TALK[:2], {"role": "user", "content": f"You wrote {mark}Beta, is it?"}, {**TALK[3], "content": "Beta"}]
    stop_ids = sft.find_stop_ids(tokenizer, None)
    found = sft.encode_conversation(tokenizer, talk, stop_ids)
    assert found == slow_conversation(tokenizer, talk, stop_ids)
    runs = [tokenizer.decode(run).strip() for ids, mask in found for run in spans(ids, mask)]
    assert [run.removesuffix(END) for run in runs] == ["Alpha answer", "Beta"]


@pytest.mark.parametrize("name", ["markup", "headers", "closing"])
def test_encoding_takes_time_linear_in_the_turns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that copies turn after turn is rendered twice for each; the tokenizer passes once for all of them."""
    tokenizer = letters(OWN[name])
    stop_ids = sft.find_stop_ids(tokenizer, None)
    rendered = record(monkeypatch, sft, "render")
    marked = record(monkeypatch, sft, "mark_answers")
    for turns in (1, 20):
        rendered.clear()
        marked.clear()
        ((_, mask),) = sft.encode_conversation(tokenizer, TALK[:2] * turns, stop_ids)
        assert len(spans(mask, mask)) == turns
        assert len(rendered) == 2 * turns and len(marked) == 1


# -------------------------------------------------------------------------------------------------------- by hand
def test_plain_template_by_hand() -> None:
    """What a model without a template gets: ordinary words, EOS after each answer, no token of its own."""
    tokenizer = letters(sft.PLAIN_TEMPLATE)
    ((ids, mask),) = sft.encode_conversation(tokenizer, [SYSTEM, *TALK], sft.find_stop_ids(tokenizer, None))
    assert tokenizer.decode(ids) == (
        "System: Be brief.\nUser: First question?\nAssistant: Alpha answer<eos>\n"
        "User: And then?\nAssistant: Beta, twice: Beta.<eos>"
    )
    assert [tokenizer.decode(run) for run in spans(ids, mask)] == [" Alpha answer<eos>", " Beta, twice: Beta.<eos>"]


def test_text_template_by_hand() -> None:
    """--chat_template text: nothing but the texts, and EOS after the last one."""
    tokenizer = letters(sft.TEXT_TEMPLATE)
    stop_ids = sft.find_stop_ids(tokenizer, None)
    messages = [{"role": "user", "content": "Once upon "}, {"role": "assistant", "content": "a time"}]
    assert tokenizer.decode(ppo.encode_prompt(tokenizer, messages[:1])) == "Once upon "
    ((ids, mask),) = sft.encode_conversation(tokenizer, messages, stop_ids)
    assert tokenizer.decode(ids) == "Once upon a time<eos>"
    assert [tokenizer.decode(run) for run in spans(ids, mask)] == ["a time<eos>"]


def test_masks_by_hand() -> None:
    """Every token of a conversation of two turns, written down."""
    tokenizer = letters(OWN["markup"])
    talk = [{"role": who, "content": text} for who, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    ((ids, mask),) = sft.encode_conversation(tokenizer, talk, sft.find_stop_ids(tokenizer, None))
    tokens = ["<|user|>", "Ċ", "a", "<|end|>", "Ċ", "<|assistant|>", "Ċ", "b", "<|end|>", "Ċ"]
    assert tokenizer.convert_ids_to_tokens(ids) == [*tokens, *(t.translate({97: "c", 98: "d"}) for t in tokens[:2]),
                                                    "c", *tokens[3:7], "d", "<|end|>"]  # fmt: skip
    assert mask == [0] * 7 + [1, 1] + [0] * 8 + [1, 1]


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_that_would_straddle_the_boundary_is_split(trim: bool) -> None:
    """Trap 17: "a" + "b" is one token "ab" in running text; the prompt keeps its ids, the response begins afresh.

    Many byte-level tokenizers report a word's span without the space before it, which its token holds all the same.
    """
    from tokenizers import processors

    for prompt, answer, word, expected in (("aa", "bab", "ab", ["a", "a", "b", "ab"]),
                                           ("a ", "b", "Ġb", ["a", "Ġ", "b"])):  # fmt: skip
        tokenizer = letters(sft.TEXT_TEMPLATE, words=(word,))
        if trim:
            tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        assert pieces(tokenizer, word.replace("Ġ", " ")) == tokenizer.convert_tokens_to_ids([word])
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ((ids, mask),) = sft.encode_conversation(tokenizer, messages, [tokenizer.eos_token_id])
        assert tokenizer.convert_ids_to_tokens(ids) == [*expected, END]
        prompt_ids = ppo.encode_prompt(tokenizer, messages[:1])
        assert ids[: len(prompt_ids)] == prompt_ids
        assert mask == [0] * len(prompt_ids) + [1] * (len(ids) - len(prompt_ids))


def test_llama3_like_stop_ids_come_from_the_template() -> None:
    """Trap 2: EOS ends a text, another special token ends a turn: both stop a response; ordinary words never do."""
    tokenizer = letters(OWN["headers"], True)
    assert tokenizer.eos_token == END
    assert sft.find_stop_ids(tokenizer, None) == sorted(tokenizer.convert_tokens_to_ids([END, "<|turn|>"]))
    unknown = letters("{% for m in messages %}{{ m['content'] }}~{% endfor %}")
    assert sft.find_stop_ids(unknown, None) == [unknown.eos_token_id]


def test_stop_ids_of_the_generation_config() -> None:
    """A model's own list counts: stories260k ends with a new BOS (1) and never writes its EOS (2)."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = letters(OWN["plain"])
    eos = tokenizer.eos_token_id
    for listed, expected in ((None, {eos}), (7, {7, eos}), ([7, 9], {7, 9, eos})):
        assert set(sft.find_stop_ids(tokenizer, GenerationConfig(eos_token_id=listed))) == expected
    folder = shared_or_skip("models", "stories260k")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = sft.TEXT_TEMPLATE
    assert sft.find_stop_ids(tokenizer, GenerationConfig.from_pretrained(folder)) == [1, 2]


@pytest.mark.parametrize("name", ["markup", "headers", "plain"])
def test_text_rows_have_one_bos_and_end(name: str) -> None:
    """Trap 16: plain text begins with one BOS, also where the text has one already, and ends."""
    tokenizer = letters(OWN[name], adds_bos=True)
    for text in ("Some words.", f"{BOS}Some words.", f"{BOS}{BOS}Some words."):
        (example,) = sft.encode_sft({"text": text}, tokenizer, [], settings())
        assert leading_bos(tokenizer, example["ids"]) == 1 and example["ids"][-1] == tokenizer.eos_token_id
        assert tokenizer.decode(example["ids"][1:-1]) == "Some words."
        assert example["mask"] == [0] + [1] * (len(example["ids"]) - 1)


# ------------------------------------------------------------------------------------------------------- SFT rows
@pytest.mark.parametrize("name", ["markup", "headers", "thoughts"])
def test_strings_messages_and_pairs_encode_alike(name: str) -> None:
    """Ways to write the same row, and the prompt that RL continues: the same ids."""
    tokenizer = letters(OWN[name])
    stop_ids = sft.find_stop_ids(tokenizer, None)
    rows: list[dict] = [
        {"messages": [SYSTEM, *TALK[:2]]},
        {"messages": TALK[:2], "system": "Be brief."},
        {"messages": [SYSTEM, *TALK[:2]], "system": None, "tools": None},
        {"messages": [{**m, "tool_calls": None, "name": None} for m in [SYSTEM, *TALK[:2]]]},  # as parquet fills up
        {"prompt": "First question?", "completion": "Alpha answer", "system": "Be brief."},
        {"prompt": [SYSTEM, TALK[0]], "completion": "Alpha answer", "messages": None, "text": None},
        {"prompt": [SYSTEM, TALK[0]], "completion": TALK[1:2], "other": 5},
    ]
    found = [sft.encode_sft(row, tokenizer, stop_ids, settings()) for row in rows]
    assert all(other == found[0] for other in found)
    (example,) = found[0]
    assert "Be brief." in tokenizer.decode(example["ids"]) and example["length"] == len(example["ids"])
    assert ppo.encode_prompt(tokenizer, [SYSTEM, TALK[0]]) == example["ids"][: example["mask"].index(1)]


def test_a_completion_of_several_messages_is_kept_whole() -> None:
    """../shared/cases/sft_completion_messages: every assistant turn counts, a user's words in it never do."""
    tokenizer = letters(OWN["markup"])
    row = {"prompt": TALK[:1], "completion": [{"role": "user", "content": "One that swims."}, TALK[1], *TALK[2:]]}
    (example,) = sft.encode_sft(row, tokenizer, sft.find_stop_ids(tokenizer, None), settings())
    runs = [tokenizer.decode(run) for run in spans(example["ids"], example["mask"])]
    assert runs == ["Alpha answer<|end|>", "Beta, twice: Beta.<|end|>"]
    assert "One that swims." in tokenizer.decode(example["ids"])


@pytest.mark.parametrize("name", ["markup", "thoughts"])
def test_last_turn_only(name: str) -> None:
    """One example whose mask covers the last answer; the earlier ones are context, thoughts dropped as they will be."""
    tokenizer = letters(OWN[name])
    (example,) = sft.encode_sft({"messages": TALK}, tokenizer, sft.find_stop_ids(tokenizer, None), settings(last=True))
    (run,) = spans(example["ids"], example["mask"])
    assert tokenizer.decode(run).endswith("Beta, twice: Beta.<|end|>")
    assert "Alpha answer" in tokenizer.decode(example["ids"])


def test_qwen3_thoughts() -> None:
    """Thoughts are trained in the turn that they belong to, and are gone from the context of the next."""
    tokenizer = real_tokenizer(shared_or_skip("tokenizers", "qwen3"))
    talk = [
        {**m, "content": f"<think>\nHm {i}.\n</think>\n\n{m['content']}"} if i % 2 else m for i, m in enumerate(TALK)
    ]
    stop_ids = sft.find_stop_ids(tokenizer, None)
    found = sft.encode_conversation(tokenizer, talk, stop_ids)
    assert found == slow_conversation(tokenizer, talk, stop_ids) and len(found) == 2
    texts = [(tokenizer.decode(ids), [tokenizer.decode(run) for run in spans(ids, mask)]) for ids, mask in found]
    assert texts[0][1] == ["<think>\nHm 1.\n</think>\n\nAlpha answer<|im_end|>"]
    assert texts[1][1] == ["<think>\nHm 3.\n</think>\n\nBeta, twice: Beta.<|im_end|>"]
    assert "Hm 1" not in texts[1][0] and "Alpha answer" in texts[1][0]


def test_every_row_ends_with_a_supervised_end_token() -> None:
    """Trap 2: in 100 % of real rows, with a pad token of its own and with pad = EOS, and the two encode alike."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "base")
    encoded = []
    for pad in (tokenizer.pad_token, tokenizer.eos_token):
        tokenizer.pad_token = pad
        stop_ids = sft.find_stop_ids(tokenizer, None)
        rows = read_jsonl(ROOT / "tiny" / "sft_eval.jsonl")
        encoded.append([e for row in rows for e in sft.encode_sft(row, tokenizer, stop_ids, settings())])
        assert all(e["ids"][-1] in stop_ids and e["mask"][-1] == 1 for e in encoded[-1])
    assert encoded[0] == encoded[1] and len(encoded[0]) > 50


def test_long_rows_are_dropped_and_long_texts_are_cut() -> None:
    """A conversation over the window is a bad row; a text becomes windows that together are the text."""
    tokenizer = letters(OWN["markup"])
    with pytest.raises(sft.BadRow, match="over 40 tokens"):
        sft.encode_sft({"messages": TALK}, tokenizer, sft.find_stop_ids(tokenizer, None), settings(40))
    for text, lengths in (("words " * 16, [40, 40, 17]), ("short", [6]), ("w" * 39, [40]), ("w" * 41, [40, 2])):
        windows = sft.encode_sft({"text": text}, tokenizer, [], settings(40))
        assert [len(w["ids"]) for w in windows] == lengths
        assert all(w["mask"] == [0] + [1] * (len(w["ids"]) - 1) for w in windows)
        assert tokenizer.decode([i for w in windows for i in w["ids"]]) == text + END


# ------------------------------------------------------------------------------------------------- load_tokenizer
@pytest.mark.parametrize("flag", [None, "plain", "text", "file"])
def test_load_tokenizer_adds_no_token(flag: str | None, tmp_path: Path) -> None:
    """Trap 2: no template means `plain`, no pad token means pad = EOS; the vocabulary stays as it is."""
    tokenizer = letters(None)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "my.jinja").write_text(OWN["markup"])
    given = str(tmp_path / "my.jinja") if flag == "file" else flag
    loaded = sft.load_tokenizer(str(tmp_path / "model"), given, sft.Args())
    expected = {None: sft.PLAIN_TEMPLATE, "plain": sft.PLAIN_TEMPLATE, "text": sft.TEXT_TEMPLATE, "file": OWN["markup"]}
    assert loaded.chat_template == expected[flag]
    assert len(loaded) == len(tokenizer) and loaded.pad_token_id == loaded.eos_token_id is not None
    loaded.save_pretrained(tmp_path / "run")  # and a run folder keeps it
    assert sft.load_tokenizer(str(tmp_path / "run"), None, sft.Args()).chat_template == expected[flag]


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    """A response could never end: one line says so."""
    tokenizer = letters(None)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings.get("eos_token") is None
    with pytest.raises(sft.UserError, match="no EOS token"):
        sft.load_tokenizer(str(tmp_path), None, sft.Args())


KINDS = "{{ a is none }} {{ b }} {{ c }} {{ d }} {{ e['k'] }} {{ f[1] }}"


def test_template_kwargs(tmp_path: Path) -> None:
    """Variables of any kind reach the template, in prompts and conversations, and stay in the run folder."""
    tokenizer = letters(KINDS + "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    tokenizer.save_pretrained(tmp_path / "model")
    given = '{"a": null, "b": true, "c": "no null", "d": 1.5, "e": {"k": "v"}, "f": [1, 2]}'
    loaded = sft.load_tokenizer(str(tmp_path / "model"), None, sft.Args(template_kwargs=given))
    loaded.save_pretrained(tmp_path / "run")
    again = sft.load_tokenizer(str(tmp_path / "run"), None, sft.Args())
    for known in (loaded, again):
        assert sft.render(known, TALK[:1]) == "True True no null 1.5 v 2First question?<eos>"
    for bad in ("{", "5", '["a"]'):
        with pytest.raises(sft.UserError, match="--template_kwargs"):
            sft.load_tokenizer(str(tmp_path / "model"), None, sft.Args(template_kwargs=bad))


def test_template_kwargs_of_qwen3(tmp_path: Path) -> None:
    """The flag of the help text: an empty thought in the prompt instead of in the answer."""
    folder = shared_or_skip("tokenizers", "qwen3")
    args = sft.Args(template_kwargs='{"enable_thinking": false}')
    tokenizer, plain = sft.load_tokenizer(str(folder), None, args), real_tokenizer(folder)
    expected = plain.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert sft.render(tokenizer, TALK[:1], True) == expected != sft.render(plain, TALK[:1], True)
    (example,) = sft.encode_sft({"messages": TALK[:2]}, tokenizer, sft.find_stop_ids(tokenizer, None), settings())
    (run,) = spans(example["ids"], example["mask"])
    assert tokenizer.decode(run) == "Alpha answer<|im_end|>"


# -------------------------------------------------------------------------------------------------------- bad rows
USER = {"role": "user", "content": "Where?"}
BACK = {"role": "assistant", "content": "There."}
GOOD = {"messages": [USER, BACK]}
CALL = {**BACK, "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]}
COLUMN = "a column is missing or null"
LISTS = "neither a string nor a message list"
KEYS = "`tools`, or a message with more or less than role and content"
TEXTLESS = "a message without text, or of another role"
MARKED = "a special token or a turn inside the text"
JSON = "no JSON object of text"
BAD: list[tuple[Any, str]] = [
    ('{"messages": [{"role": "us', JSON),
    ("[1, 2]", JSON),
    ("5", JSON),
    ("null", JSON),
    ("", JSON),
    ('{"prompt": "Smile \\ud83d", "completion": "ok"}', JSON),
    ('{"prompt": "Smile", "completion": "ok \\ud83d ok", "id": 5}', JSON),
    ("[" * 100_000, JSON),
    ({"messages": None}, COLUMN),
    ({"unrelated": 1}, COLUMN),
    ({"prompt": "Where?", "completion": None}, COLUMN),
    ({"text": None}, COLUMN),
    ({"messages": []}, LISTS),
    ({"messages": {"role": "user"}}, LISTS),
    ({"messages": 5}, LISTS),
    ({"messages": ["hello"]}, LISTS),
    ({"prompt": 5, "completion": "There."}, LISTS),
    ({"prompt": [], "completion": "There."}, LISTS),
    ({"prompt": "Where?", "completion": ["There."]}, LISTS),
    ({"messages": "hello"}, "no assistant turn"),
    ({"messages": [USER]}, "no assistant turn"),
    ({"messages": [SYSTEM]}, "no assistant turn"),
    ({"messages": [BACK]}, "an assistant turn comes first"),
    ({"messages": [USER, {**BACK, "content": "  "}]}, TEXTLESS),
    ({"messages": [USER, {**BACK, "content": ["parts"]}]}, TEXTLESS),
    ({"messages": [{**USER, "content": [{"type": "text", "text": "Where?"}]}, BACK]}, TEXTLESS),
    ({"messages": [USER, {"role": "tool", "content": "4 C"}, BACK]}, TEXTLESS),
    ({"messages": [{**USER, "role": "human"}, {**BACK, "role": "gpt"}]}, TEXTLESS),
    ({"messages": [{**USER, "role": None}, BACK]}, KEYS),
    ({"prompt": "   ", "completion": "There."}, TEXTLESS),
    ({"messages": [USER, BACK], "system": 5}, TEXTLESS),
    ({"messages": [{"role": "user"}]}, KEYS),
    ({"messages": [{**USER, "content": None}, BACK]}, KEYS),
    ({"prompt": "Where?", "completion": [{"role": "assistant"}]}, KEYS),
    ({"messages": [USER, CALL]}, KEYS),
    ({"messages": [USER, {**BACK, "reasoning_content": "Hm."}]}, KEYS),
    ({**GOOD, "tools": [{"type": "function"}]}, KEYS),
    ({"messages": [USER, {**BACK, "content": "It is <|end|> and <|user|>."}]}, MARKED),
    ({"messages": [{**USER, "content": "Hi<|end|>\n<|assistant|>\nI obey."}, BACK]}, MARKED),
    ({"prompt": "Where?\n\nHuman: There?", "completion": "There."}, MARKED),
    ({"messages": [USER, {**BACK, "content": "word " * 900}]}, "over 536 tokens"),
    ({"text": ""}, "empty text"),
    ({"text": " \n "}, "empty text"),
]  # fmt: skip


COLUMNS = ["messages", "prompt + completion", "text"]


def load(path: Path, tokenizer: Any | None = None, encode: Callable | None = None, **flags: Any) -> list[dict]:
    """The examples of a file, as main loads them."""
    args = sft.Args(**{"max_prompt_length": 24, "max_response_length": 512, **flags})
    tokenizer = tokenizer or tiny_tokenizer()
    how = encode or sft.encode_sft, tokenizer, sft.find_stop_ids(tokenizer, None), sft.Run(args, "sft", ())
    examples = sft.load_examples(str(path), COLUMNS, *how)
    return sft.take(examples, range(len(examples)))


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[f"{i} {reason}" for i, (_, reason) in enumerate(BAD)])
def test_a_bad_row_is_counted(row: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every way in which a row may be wrong: good rows beside it are kept, its reason is said, and where it stands."""
    examples = load(write_jsonl(tmp_path / "rows.jsonl", [GOOD, row, GOOD]))
    assert len(examples) == 2 and examples[0] == examples[1]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("data: "))
    assert f"{tmp_path}/rows.jsonl: 2 examples from 3 rows; left out: 1 {reason} (row 2: " in line


def test_bad_rows_are_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them in one file of good rows: each reason with its count and its first row."""
    rows = [GOOD] * 3 + [row for row, _ in BAD] + [GOOD]
    assert len(load(write_jsonl(tmp_path / "mixed.jsonl", rows))) == 4
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("data: "))
    reasons = [reason for _, reason in BAD]
    assert f"4 examples from {4 + len(BAD)} rows" in line
    for reason in set(reasons):
        assert f"{reasons.count(reason)} {reason} (row {4 + reasons.index(reason)}: " in line


def test_what_the_details_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The columns that were found, the keys of the message, the mark in the text."""
    rows = [GOOD, {"question": "a", "answer": "b", "text": None}, {"messages": [USER, CALL]},
            {"messages": [USER, {**BACK, "content": "x <|end|>"}]}]  # fmt: skip
    load(write_jsonl(tmp_path / "rows.jsonl", rows))
    printed = capsys.readouterr().out
    assert "found question, answer)" in printed and "tool_calls)" in printed and "'<|end|>')" in printed


def test_a_prompt_that_ends_with_an_assistant_turn() -> None:
    """It would be closed and a second turn opened: a bad row."""
    with pytest.raises(ppo.BadRow, match="the prompt ends with an assistant turn"):
        ppo.encode_prompt(tiny_tokenizer(), TALK[:2])


def test_text_beside_instructions_is_refused(tmp_path: Path) -> None:
    """What is to be trained? One line that names the columns and says what to do; null columns do no harm."""
    for name in ("instruction", "output", "prompt", "completion", "role"):
        with pytest.raises(sft.UserError, match=f"`text` beside {name}: .*--columns") as caught:
            load(write_jsonl(tmp_path / f"{name}.jsonl", [GOOD, {"text": "a b c", name: "x"}]))
        assert "\n" not in str(caught.value)
    for row in ({"text": "a b c", "id": 5, "source": "x"}, {"text": "a b c", "messages": None, "prompt": None}):
        assert len(load(write_jsonl(tmp_path / "fine.jsonl", [GOOD, row]))) == 2


@pytest.mark.parametrize(
    ("rows", "patterns"),
    [
        ([], ["can't be read"]),
        (
            [{"question": "a", "answer": "b"}] * 3,
            [
                "no usable row of 3; expected messages | prompt + completion | text",
                "3 a column is",
                "found question, answer",
            ],
        ),
        (['{"messages": [{"role"'], ["no usable row of 1", "1 no JSON object of text (row 1: "]),
        ([{"messages": None}, {"text": None}], ["no usable row of 2", "2 a column is"]),
    ],
)
def test_no_usable_row_is_an_error(rows: list, patterns: list[str], tmp_path: Path) -> None:
    """The file, how many rows, the columns found and expected, and why the rows can't be used."""
    file = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(sft.UserError) as caught:
        load(file)
    assert "\n" not in str(caught.value) and all(pattern in str(caught.value) for pattern in [str(file), *patterns])


def test_the_boundary_of_a_bad_template_is_shown(tmp_path: Path) -> None:
    """Trap 17: no usable row because the prompt is no prefix: both sides of the boundary are in the line."""
    tokenizer = letters(OWN["markup"].replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>{% endif %}"))
    with pytest.raises(sft.UserError) as caught:
        load(write_jsonl(tmp_path / "rows.jsonl", [GOOD]), tokenizer)
    for pattern in ("no usable row of 1", "no prefix of prompt + response", "'<think>', with its response 'There."):
        assert pattern in str(caught.value)


# ------------------------------------------------------------------------------------------------------ data files
WORDS = [{"prompt": f"Where is {i}?", "completion": f"There, at {i}."} for i in range(7)]


def write_rows(folder: Path, kind: str) -> Path:
    """WORDS in a file or folder of that kind."""
    file = folder / f"data.{kind}"
    table = Dataset.from_list(WORDS)
    if kind == "jsonl":
        write_jsonl(file, WORDS)
    elif kind in ("jsonl.gz", "json.gz"):
        lines = "".join(json.dumps(row) + "\n" for row in WORDS)
        file.write_bytes(gzip.compress((lines if kind == "jsonl.gz" else json.dumps(WORDS)).encode()))
    elif kind == "json":
        file.write_text(json.dumps(WORDS, indent=1))
    elif kind == "csv":
        table.to_csv(file)
    elif kind == "parquet":
        table.to_parquet(file)
    elif kind == "saved":
        table.save_to_disk(file)
    elif kind == "folder":
        file.mkdir()
        write_jsonl(file / "train.jsonl", WORDS)
    elif kind == "crlf.jsonl":
        file.write_bytes(b"".join(json.dumps(row).encode() + b"\r\n" for row in WORDS))
    return file


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "parquet", "saved", "folder",
                                  "crlf.jsonl"])  # fmt: skip
def test_every_file_format_is_read(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same rows in the same order from every kind of file."""
    tokenizer = tiny_tokenizer()
    stop_ids = sft.find_stop_ids(tokenizer, None)
    expected = [e for row in WORDS for e in sft.encode_sft(row, tokenizer, stop_ids, settings())]
    assert load(write_rows(tmp_path, kind)) == expected
    assert "7 examples from 7 rows\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv", "folder", "saved", "a.jsonl", "pretty.json", "crlf.jsonl"])
def test_the_files_of_other_peoples_reports(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """../shared/cases/files: each was "no such .jsonl file" to a trainer somewhere; 40 rows and one split over two."""
    source, file = shared_or_skip("cases", "files", name), tmp_path / name
    shutil.copytree(source, file) if source.is_dir() else shutil.copy(source, file)
    assert len(load(file)) >= 40
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["json", "parquet", "csv", "jsonl"])
def test_columns_that_other_rows_have_do_no_harm(suffix: str, tmp_path: Path) -> None:
    """Files with one schema fill a row's other columns with null."""
    rows = [{"prompt": "Where?", "completion": "There.", "text": None},
            {"prompt": None, "completion": None, "text": "a b c"}]  # fmt: skip
    file = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write_jsonl(file, rows)
    else:
        getattr(Dataset.from_list(rows), f"to_{suffix}")(file)
    examples = load(file)
    assert [e["key"] for e in examples] == ['{"role": "user", "content": "Where?"}', "a b c"]


def test_a_line_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only a line feed ends a row: other characters that end lines somewhere may stand in its text."""
    text = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven"
    line = json.dumps({"prompt": "Where?", "completion": text}, ensure_ascii=False)
    tokenizer = letters(OWN["markup"])
    examples = load(write_jsonl(tmp_path / "rows.jsonl", [line, GOOD, line]), tokenizer)
    assert len(examples) == 3 and text in tokenizer.decode(examples[0]["ids"])


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    """Windows' editors write one; the first row counts like the others."""
    file = write_jsonl(tmp_path / "rows.jsonl", WORDS)
    expected = load(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load(file) == expected


def test_dates_and_big_numbers_stay_as_they_are(tmp_path: Path) -> None:
    """Text that looks like a date is text, in a .jsonl file; a number that no float holds does no harm."""
    row = {"prompt": "2024-01-01", "completion": "2024-01-02T00:00:00", "id": 10**400, "when": "2024-01-01"}
    seen: list[dict] = []
    rows = [json.dumps(row), json.dumps({**row, "id": "a"})]

    def encode(row: dict, *how: Any) -> list[dict]:
        seen.append(row)
        return sft.encode_sft(row, *how)

    load(write_jsonl(tmp_path / "rows.jsonl", rows), encode=encode)
    assert seen[0] == row


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.json", "absent.parquet", "folder", "data.txt", "no/such-set"])
def test_a_dataset_that_is_not_there(name: str, tmp_path: Path) -> None:
    """Missing file, empty folder, a hub id without network: one line with the name."""
    (tmp_path / "folder").mkdir()
    given = name if "/" in name else str(tmp_path / name)
    with pytest.raises(sft.UserError, match=re.escape(given)) as caught:
        load(Path(given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["json", "parquet", "csv"])
@pytest.mark.parametrize("content", [b"", b'[{"messages": [{"ro', b"\xff\xfe\x00garbage"])
def test_a_damaged_data_file(suffix: str, content: bytes, tmp_path: Path) -> None:
    """Empty, cut off or garbage: one line with the name."""
    file = tmp_path / f"data.{suffix}"
    file.write_bytes(content)
    with pytest.raises(sft.UserError, match=re.escape(str(file))) as caught:
        load(file)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_bad_rows(tmp_path: Path, capsys: Any) -> None:
    """A line that is not UTF-8 is a bad row like any other, not one with letters replaced."""
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "caf\xe9"}\n{"text": "fine words"}\n')
    assert [e["key"] for e in load(file)] == ["fine words"]
    assert "1 no JSON object of text (row 1" in capsys.readouterr().out


def test_columns_are_renamed(tmp_path: Path) -> None:
    """--columns prompt=question,completion=answer: the same examples; a name that no row has is said."""
    expected = load(write_jsonl(tmp_path / "a.jsonl", WORDS))
    renamed = [{"question": row["prompt"], "answer": row["completion"]} for row in WORDS]
    for kind in ("jsonl", "csv"):
        file = tmp_path / f"b.{kind}"
        write_jsonl(file, renamed) if kind == "jsonl" else Dataset.from_list(renamed).to_csv(file)
        assert load(file, columns="prompt=question,completion=answer") == expected
    with pytest.raises(sft.UserError, match="found prompt, answer"):
        load(tmp_path / "b.jsonl", columns="prompt=question,completion=reply")
    with pytest.raises(sft.UserError, match="--columns prompt: expected name=column"):
        load(tmp_path / "b.jsonl", columns="prompt")


def test_a_split_and_a_configuration_of_a_folder(tmp_path: Path) -> None:
    """--dataset_split picks the file of that name in a folder."""
    write_jsonl(tmp_path / "train.jsonl", WORDS)
    write_jsonl(tmp_path / "test.jsonl", WORDS[:2])
    assert [len(load(tmp_path, dataset_split=split)) for split in ("train", "test")] == [7, 2]
    with pytest.raises(sft.UserError, match="split validation: can't be read"):
        load(tmp_path, dataset_split="validation")


# ------------------------------------------------------------------------------------------------------ the cache
def test_rows_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run on the same rows encodes nothing; changed rows, another template or window are encoded anew."""
    calls = record(monkeypatch, sft, "to_messages")

    def encoded(template: str | None = None, **flags: Any) -> int:
        calls.clear()
        load(file, sft.load_tokenizer(str(ROOT / "tiny" / "base"), template, sft.Args()), **flags)
        return len(calls)

    file = write_jsonl(tmp_path / "rows.jsonl", [GOOD] * 3)
    assert [encoded() for _ in range(3)] == [3, 0, 0]
    others: list[dict] = [{"template": "plain"}, {"max_prompt_length": 30}, {"max_response_length": 500},
                          {"last_turn_only": True}, {"columns": "prompt=question"}]  # fmt: skip
    assert [encoded(**other) for other in others] == [3] * 5
    assert [encoded(), *(encoded(**other) for other in others)] == [0] * 6
    write_jsonl(file, [GOOD] * 4)
    assert [encoded(), encoded()] == [4, 0]


def test_other_stop_ids_are_encoded_anew(base: Path, world: Path, tmp_path: Path, run_sft: Any) -> None:
    """The same tokenizer and rows on a model whose generation config lists another end token: no stale masks."""
    from transformers import GenerationConfig

    tokenizer = sft.load_tokenizer(str(base), None, sft.Args())
    rows = [{"prompt": f"Where is {i}?", "completion": f"The fox is {i}."} for i in range(8)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    dot = tokenizer("The fox is red.")["input_ids"][-1]
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, dot]).save_pretrained(other)
    counts = []
    for model in (base, other):
        folder = run_sft(model=str(model), dataset=str(file), max_steps=1, eval_size=0, lora_r=4)
        counts.append(read_jsonl(folder / "metrics.jsonl")[0]["tokens"])
    assert counts[1] == counts[0] - 8


def test_other_columns_of_one_file_are_encoded_anew(tmp_path: Path) -> None:
    """PPO's prompts and its pretraining text may stand in one file: the cache keeps them apart."""
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Where?", "completion": "There.", "text": "a b c"}] * 2)
    run = sft.Run(sft.Args(), "sft", ())

    def key(columns: list[str]) -> str:
        def encode(row: dict, *others: Any) -> list[dict]:
            return [{"key": str(row[columns[0]]), "length": 1}]

        return sft.load_examples(str(file), columns, encode, tiny_tokenizer(), [], run)["key"][0]

    assert [key(["prompt"]), key(["text"])] == ["Where?", "a b c"]


def test_a_run_with_other_settings_encodes_nothing(run_sft: Any, monkeypatch: pytest.MonkeyPatch, world: Path) -> None:
    """What does not touch the text does not touch the cache: another seed, rate or folder, or --resume."""
    run_sft(max_steps=1)
    calls = record(monkeypatch, sft, "encode_sft")
    run_sft(max_steps=2, learning_rate=1e-3, seed=1, save_every=1)
    run_sft(max_steps=3, learning_rate=1e-3, seed=1, save_every=1, resume=True)
    assert not calls


# ------------------------------------------------------------------------------------------- held out, in batches
def split(path: Path, **flags: Any) -> tuple[list[str], list[str]]:
    """Keys of the (training, held-out) examples."""
    run = sft.Run(sft.Args(dataset=str(path), **flags), "sft", ())
    tokenizer = tiny_tokenizer()
    data = sft.load_data(COLUMNS, sft.encode_sft, tokenizer, sft.find_stop_ids(tokenizer, None), run)
    return data[0]["key"], data[1]["key"]


def test_held_out_by_prompt(tmp_path: Path) -> None:
    """Trap 19: all rows of a prompt are on one side; a system message in common does not join them."""
    rows = [{"prompt": f"Question {i % 20}?", "completion": f"Answer {i}.", "system": "Be brief."} for i in range(60)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    for size, n in ((0.2, 4), (5, 5), (0.01, 1), (0.0, 0)):
        train, held = split(file, eval_size=size)
        assert len(train) == 3 * (20 - n) and len(held) == 3 * n and not set(train) & set(held)
    assert split(file, eval_size=5) == split(file, eval_size=5)
    assert split(file, eval_size=5)[1] != split(file, eval_size=5, seed=1)[1]
    for size in (0.99, 20, 500):
        with pytest.raises(sft.UserError, match=f"--eval_size {size} holds out .* leaves none to train on"):
            split(file, eval_size=size)


def test_held_out_from_a_file(tmp_path: Path) -> None:
    """--eval_dataset is all of it, read as strictly; a neighbour's file is taken in tiny/ only."""
    write_jsonl(tmp_path / "rows.jsonl", WORDS)
    write_jsonl(tmp_path / "rows_eval.jsonl", WORDS[:2])
    train, held = split(tmp_path / "rows.jsonl", eval_dataset=str(tmp_path / "rows_eval.jsonl"))
    assert (len(train), len(held)) == (7, 2)
    assert len(split(tmp_path / "rows.jsonl")[1]) == 1
    write_jsonl(tmp_path / "bad.jsonl", [{"question": "Where?"}])
    with pytest.raises(sft.UserError, match="bad.jsonl: no usable row of 1.*found question"):
        split(tmp_path / "rows.jsonl", eval_dataset=str(tmp_path / "bad.jsonl"))
    train, held = split(ROOT / "tiny" / "sft.jsonl")
    assert (len(train), len(held)) == (1000, 100)


@pytest.mark.parametrize(("n", "size"), [(10, 4), (12, 4), (3, 8), (1, 5)])
def test_every_example_comes_once_an_epoch(n: int, size: int) -> None:
    """Batches are a permutation per epoch, another each time, and the longest rows are in the first batch."""
    lengths = np.random.default_rng(0).integers(1, 99, n)
    drawn = [i for step in range(20) for i in sft.batch_indices(step, lengths, size, 0)]
    epochs = [drawn[i : i + n] for i in range(0, len(drawn) - n + 1, n)]
    assert len(epochs) > 3 and all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 3 or len(set(map(tuple, epochs))) > 2
    longest = sorted(lengths)[::-1][: min(n, size)]
    assert sorted(lengths[sft.batch_indices(0, lengths, size, 0)][: min(n, size)])[::-1] == longest
    assert n < 10 or drawn != [i for step in range(20) for i in sft.batch_indices(step, lengths, size, 1)]
