"""From text to token ids: masks, BOS, end tokens and boundaries, for own and real tokenizers and templates."""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SHARED, read_jsonl, shared_folders, shared_or_skip

import ppo
import sft

BOS, END, PAD = "<bos>", "<eos>", "<pad>"
# Own templates in the shapes that real ones have; every "role" token below becomes a special token.
OWN = {
    "plain": ppo.PLAIN_TEMPLATE,
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


def check(tokenizer: Any, messages: list[dict], end: str | None, breaks: bool | None) -> None:
    """All that must hold for one tokenizer, template and conversation.

    `end`: the token that must end each turn (None: any stop token); `breaks`: whether turns become their own examples.
    """
    size, stop_ids = len(tokenizer), ppo.find_stop_ids(tokenizer, None)
    assert end is None or tokenizer.convert_tokens_to_ids(end) in stop_ids
    examples = sft.encode_conversation(tokenizer, messages, stop_ids)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    runs = [run for ids, mask in examples for run in spans(ids, mask)]
    assert len(runs) == len(answers)  # every turn is supervised once
    assert breaks is None or len(examples) == (len(answers) if breaks else 1)
    starts = [i for ids, mask in examples for i in range(len(mask)) if mask[i] and not mask[i - 1]]
    hosts = [ids for ids, mask in examples for _ in spans(ids, mask)]
    turns = [t for t, m in enumerate(messages) if m["role"] == "assistant"]
    for ids, start, turn in zip(hosts, starts, turns, strict=True):  # each turn is told after what will precede it
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
        assert len(ids) == len(mask) and max(ids) < size

    # every path begins the same way: one BOS where the tokenizer or the template has one
    rendered = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    bos = tokenizer.bos_token
    wanted = int(
        bos is not None and (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id or rendered.startswith(bos))
    )
    prompt_ids = ppo.encode_prompt(tokenizer, messages[:-1])
    paths = [ids for ids, _ in examples] + [prompt_ids]
    paths.append(ppo.encode_rl({"prompt": messages[:-1]}, tokenizer, 10**6)[0]["ids"])
    assert [leading_bos(tokenizer, ids) for ids in paths] == [wanted] * len(paths)

    # what RL continues is what SFT was trained on: prompt + response is the conversation
    response_ids = ppo.encode_response(tokenizer, messages[:-1], answers[-1], stop_ids)
    assert prompt_ids + response_ids == examples[-1][0]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    body = tokenizer.decode(prompt_ids[wanted:] + response_ids[:-1])
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
        with pytest.raises(sft.BadRow, match="refused by the chat template.*System role not supported"):
            sft.encode_conversation(tokenizer, messages, [])
    else:
        check(tokenizer, messages, end, BREAKING.get(path.stem))


def assert_no_prefix(tokenizer: Any, messages: list[dict], name: str) -> None:
    """The reason is said, with the text before the boundary and both sides of it."""
    with pytest.raises(sft.BadRow) as caught:
        sft.encode_conversation(tokenizer, messages, ppo.find_stop_ids(tokenizer, None))
    reason, detail = caught.value.args
    assert reason == "chat template: the prompt is no prefix of prompt + response"
    if name == "deepseekv3":
        assert re.fullmatch(
            r"after '.*<｜Assistant｜>' the prompt has '<think>.*', with its response 'Alpha answer.*'", detail
        )
    else:
        assert re.fullmatch(
            r"after '.*\[INST\] ?' the prompt has 'Be brief.*', with its response 'First question.*'", detail
        )


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
        ppo.render(tokenizer, TALK, False)
    except ppo.BadRow as bad:
        assert tokenizer.bos_token is None and "'bos_token' is undefined" in str(bad)
        pytest.skip("the template adds a BOS that the tokenizer does not have")
    check(tokenizer, TALK, None, None)


@pytest.mark.parametrize("folder", shared_folders("tokenizers") or [None], ids=lambda p: p.name if p else "none")
def test_real_tokenizers_with_their_own_templates(folder: Path | None) -> None:
    """Traps 2, 16: as downloaded, the end of turn is one special token that the template tells us."""
    tokenizer = real_tokenizer(folder or shared_or_skip("tokenizers"))
    name = Path(tokenizer.name_or_path).name
    end = {"mistral-v1": "</s>", "mistral-v3": "</s>", "phi3-mini": "<|end|>"}.get(name, "<|im_end|>")
    check(tokenizer, TALK, end, {"qwen3": True, "qwen2.5": False, "mistral-v1": False}.get(name))


def test_the_tiny_tokenizer() -> None:
    """The embedded world's own chat template and tokenizer, with and without a system message."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "base")
    for messages in (TALK, [SYSTEM, *TALK]):
        check(tokenizer, messages, tokenizer.eos_token, False)


# -------------------------------------------------------------------------------------------------------- by hand
def test_plain_template_by_hand() -> None:
    """What a model without a template gets: ordinary words, EOS after each answer, no token of its own."""
    tokenizer = letters(ppo.PLAIN_TEMPLATE)
    ((ids, mask),) = sft.encode_conversation(tokenizer, [SYSTEM, *TALK], ppo.find_stop_ids(tokenizer, None))
    assert tokenizer.decode(ids) == (
        "System: Be brief.\nUser: First question?\nAssistant: Alpha answer<eos>\n"
        "User: And then?\nAssistant: Beta, twice: Beta.<eos>"
    )
    assert [tokenizer.decode(run) for run in spans(ids, mask)] == [" Alpha answer<eos>", " Beta, twice: Beta.<eos>"]


def test_text_template_by_hand() -> None:
    """--chat_template text: nothing but the texts, and EOS after the last one."""
    tokenizer = letters(ppo.TEXT_TEMPLATE)
    stop_ids = ppo.find_stop_ids(tokenizer, None)
    assert tokenizer.decode(ppo.encode_prompt(tokenizer, "Once upon ")) == "Once upon "
    assert tokenizer.decode(ppo.encode_response(tokenizer, "Once upon ", "a time", stop_ids)) == "a time<eos>"


def test_a_token_that_would_straddle_the_boundary_is_split() -> None:
    """Trap 17: "a" + "b" is one token "ab" in running text; the prompt keeps its ids, the response begins afresh."""
    tokenizer = letters(ppo.TEXT_TEMPLATE, words=("ab",))
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab")["input_ids"]) == ["ab"]
    prompt = ppo.encode_prompt(tokenizer, "aa")
    response = ppo.encode_response(tokenizer, "aa", "bab", ppo.find_stop_ids(tokenizer, None))
    assert tokenizer.convert_ids_to_tokens(prompt + response) == ["a", "a", "b", "ab", END]


def test_llama3_like_stop_ids_come_from_the_template() -> None:
    """Trap 2: EOS ends a text, another special token ends a turn: both stop a response; ordinary words never do."""
    tokenizer = letters(OWN["headers"], True)
    assert tokenizer.eos_token == END
    assert ppo.find_stop_ids(tokenizer, None) == sorted(tokenizer.convert_tokens_to_ids([END, "<|turn|>"]))
    unknown = letters("{% for m in messages %}{{ m['content'] }}~{% endfor %}")
    assert ppo.find_stop_ids(unknown, None) == [unknown.eos_token_id]


def test_stop_ids_of_the_generation_config() -> None:
    """A model's own list counts: stories260k ends with a new BOS (1) and never writes its EOS (2)."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = letters(OWN["plain"])
    eos = tokenizer.eos_token_id
    for listed, expected in ((None, {eos}), (7, {7, eos}), ([7, 9], {7, 9, eos})):
        assert set(ppo.find_stop_ids(tokenizer, GenerationConfig(eos_token_id=listed))) == expected
    folder = shared_or_skip("models", "stories260k")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = ppo.TEXT_TEMPLATE
    assert ppo.find_stop_ids(tokenizer, GenerationConfig.from_pretrained(folder)) == [1, 2]


@pytest.mark.parametrize("name", ["markup", "headers", "plain"])
def test_text_rows_have_one_bos_and_end(name: str) -> None:
    """Trap 16: plain text for SFT and PPO-ptx begins with one BOS, also where the text has one already, and ends."""
    tokenizer = letters(OWN[name], adds_bos=True)
    for text in ("Some words.", f"{BOS}Some words.", f"{BOS}{BOS}Some words."):
        ids = ppo.tokenize(tokenizer, text)
        assert leading_bos(tokenizer, ids) == 1 and tokenizer.decode(ids[1:]) == "Some words."
        (example,) = sft.encode_sft({"text": text}, tokenizer, [], sft.Args())
        assert leading_bos(tokenizer, example["ids"]) == 1 and example["ids"][-1] == tokenizer.eos_token_id
        assert example["mask"] == [0] + [1] * (len(example["ids"]) - 1)


# ------------------------------------------------------------------------------------------------------- SFT rows
@pytest.mark.parametrize("name", ["markup", "headers", "thoughts"])
def test_strings_messages_and_pairs_encode_alike(name: str) -> None:
    """Three ways to write the same row, and RL's prompt: the same ids."""
    tokenizer, args = letters(OWN[name]), sft.Args()
    stop_ids = ppo.find_stop_ids(tokenizer, None)
    rows: list[dict] = [
        {"messages": TALK[:2]},
        {"prompt": "First question?", "completion": "Alpha answer"},
        {"prompt": TALK[:1], "completion": "Alpha answer"},
        {"prompt": TALK[:1], "completion": TALK[1:2]},
    ]
    first, *others = ([(e["ids"], e["mask"]) for e in sft.encode_sft(row, tokenizer, stop_ids, args)] for row in rows)
    assert all(other == first for other in others)
    for prompt in ("First question?", TALK[:1]):
        rl = ppo.encode_rl({"prompt": prompt, "_row": 1, "answer": 42}, tokenizer, 512)[0]
        assert rl["ids"] == first[0][0][: first[0][1].index(1)] and rl["columns"] == {"answer": 42}


@pytest.mark.parametrize("name", ["markup", "thoughts"])
def test_last_turn_only(name: str) -> None:
    """One example whose mask covers the last answer; the earlier ones are context, thoughts dropped as they will be."""
    tokenizer = letters(OWN[name])
    args = sft.Args(last_turn_only=True)
    (example,) = sft.encode_sft({"messages": TALK}, tokenizer, ppo.find_stop_ids(tokenizer, None), args)
    (run,) = spans(example["ids"], example["mask"])
    assert tokenizer.decode(run).endswith("Beta, twice: Beta.<|end|>")
    assert "Alpha answer" in tokenizer.decode(example["ids"])


def test_every_row_ends_with_a_supervised_end_token() -> None:
    """Trap 2: in 100 % of real rows, with a pad token of its own and with pad = EOS, and the two encode alike."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "base")
    encoded = []
    for pad in (tokenizer.pad_token, tokenizer.eos_token):
        tokenizer.pad_token = pad
        stop_ids = ppo.find_stop_ids(tokenizer, None)
        rows = read_jsonl(ROOT / "tiny" / "sft_eval.jsonl")
        encoded.append([e for row in rows for e in sft.encode_sft(row, tokenizer, stop_ids, sft.Args())])
        assert all(e["ids"][-1] in stop_ids and e["mask"][-1] == 1 for e in encoded[-1])
    assert encoded[0] == encoded[1] and len(encoded[0]) > 50


def test_long_rows_are_dropped_and_long_texts_are_cut() -> None:
    """A conversation over the window is a bad row; a text becomes windows that together are the text."""
    tokenizer = letters(OWN["markup"])
    args, stop_ids = sft.Args(max_prompt_length=20, max_response_length=20), ppo.find_stop_ids(tokenizer, None)
    with pytest.raises(sft.BadRow, match="over 40 tokens"):
        sft.encode_sft({"messages": TALK}, tokenizer, stop_ids, args)
    for text, lengths in (("words " * 16, [40, 40, 17]), ("short", [6])):
        windows = sft.encode_sft({"text": text}, tokenizer, stop_ids, args)
        assert [len(w["ids"]) for w in windows] == lengths
        assert tokenizer.decode([i for w in windows for i in w["ids"]]) == text + END
    with pytest.raises(ppo.BadRow, match="prompt over 20 tokens"):
        ppo.encode_rl({"prompt": "words " * 20}, tokenizer, 20)


def test_rows_with_one_system_prompt_are_different_prompts() -> None:
    """Trap 19: conversations that share their system message can be held out one by one."""
    tokenizer = letters(OWN["markup"])
    rows = [[SYSTEM, {"role": "user", "content": f"Question {i}?"}, TALK[1]] for i in range(20)]
    examples = [e for row in rows for e in sft.encode_sft({"messages": row}, tokenizer, [], sft.Args())]
    train, heldout = sft.hold_out(examples, 0.2, 0)
    assert (len(train), len(heldout)) == (16, 4)


# ------------------------------------------------------------------------------------------------- load_tokenizer
@pytest.mark.parametrize("flag", [None, "plain", "text", "file"])
def test_load_tokenizer_adds_no_token(flag: str | None, tmp_path: Path) -> None:
    """Trap 2: no template means `plain`, no pad token means pad = EOS; the vocabulary stays as it is."""
    tokenizer = letters(None)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "my.jinja").write_text(OWN["markup"])
    given = str(tmp_path / "my.jinja") if flag == "file" else flag
    loaded = ppo.load_tokenizer(str(tmp_path / "model"), given, ppo.Args())
    expected = {None: ppo.PLAIN_TEMPLATE, "plain": ppo.PLAIN_TEMPLATE, "text": ppo.TEXT_TEMPLATE, "file": OWN["markup"]}
    assert loaded.chat_template == expected[flag]
    assert len(loaded) == len(tokenizer) and loaded.pad_token_id == loaded.eos_token_id is not None
    loaded.save_pretrained(tmp_path / "run")  # and a run folder keeps it
    assert ppo.load_tokenizer(str(tmp_path / "run"), None, ppo.Args()).chat_template == expected[flag]


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    """A response could never end: one line says so."""
    tokenizer = letters(None)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings.get("eos_token") is None
    with pytest.raises(ppo.UserError, match="no EOS token"):
        ppo.load_tokenizer(str(tmp_path), None, ppo.Args())
