"""What the tests share: an offline world of two layers, its run folders and small data; paths of ../shared.

"Trap 7" in a docstring is number 7 of the mistakes that were found in other libraries (FIELD.md, section 4).
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # exact comparisons are made on CPU, also where a GPU is
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "HF_DATASETS_CACHE" not in os.environ:  # encoded rows are kept between runs; tests must not find those of others
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")
    OWN_CACHE = os.environ["HF_DATASETS_CACHE"]
else:
    OWN_CACHE = ""
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # real tokenizers, templates and data that do not belong to the repository
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # a sum split over threads has another last bit
CPU = torch.device("cpu")
STAGES = ("sft", "reward", "ppo", "dpo", "grpo")
Seen = list[tuple[tuple, Any]]  # (arguments, result) of each recorded call


def pytest_sessionfinish() -> None:
    """Leave no cache behind."""
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Runs handle Ctrl-C and SIGTERM; one that stopped half-way must not handle those of the tests after it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def shared_folders(name: str) -> list[Path]:
    """Folders in ../shared/<name>, none where it is absent."""
    return sorted(p for p in (SHARED / name).glob("*") if p.is_dir())


def shared_or_skip(*parts: str) -> Path:
    """A path of ../shared; the test is skipped where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} in ../shared, which does not belong to the repository")
    return path


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: list) -> Path:
    """Write rows as .jsonl; strings are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def strict_rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Rows of a run folder's .jsonl file, which must be strict JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / name).read_text().splitlines()]


def record(patch: pytest.MonkeyPatch, script: Any, name: str) -> Seen:
    """Calls of <script>.<name> from now on, as they come."""
    original, seen = getattr(script, name), []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        seen.append((args, result))
        return result

    patch.setattr(script, name, recorded)
    return seen


def perturb(model: Any, name: str, seed: int, size: float) -> None:
    """Give the adapter `name` random weights: a fresh one has B = 0 and can't be told from the base."""
    generator = torch.Generator().manual_seed(seed)
    for n, p in model.named_parameters():
        if f".{name}." in n:
            p.data.copy_(torch.randn(p.shape, generator=generator) * size)


def tiny_llama(vocab_size: int, eos: int, pad: int, **settings: Any) -> Any:
    """A random Llama of 2 layers and hidden size 64; initialised large enough that attention matters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=eos, pad_token_id=pad,
        initializer_range=0.1, **{"tie_word_embeddings": True, **settings},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts.jsonl (24 prompts and what is right) and sft.jsonl (24 conversations of one sentence)."""
    folder = tmp_path_factory.mktemp("world")
    prompts = read_jsonl(ROOT / "tiny" / "prompts.jsonl")[:24]
    write_jsonl(folder / "prompts.jsonl", prompts)
    rows = []
    for row in read_jsonl(ROOT / "tiny" / "sft.jsonl")[:24]:
        answer = row["messages"][1]["content"].split(".")[0] + "."
        rows.append({"messages": [row["messages"][0], {"role": "assistant", "content": answer}]})
    write_jsonl(folder / "sft.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def base(world: Path) -> Path:
    """A base model folder: tiny/base's tokenizer, two layers, taught for a second so that responses end."""
    from transformers import AutoTokenizer

    if not (ROOT / "tiny" / "base" / "tokenizer.json").is_file():
        pytest.skip("needs tiny/base, which tiny/make.py builds")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "base")
    model = tiny_llama(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    texts = [tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in read_jsonl(world / "sft.jsonl")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(30):
        ids = [tokenizer(text)["input_ids"] for text in texts[step % 3 :: 3]]
        width = max(map(len, ids))
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in ids])
        model(input_ids=labels.clamp(min=0), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = world / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(base: Path, name: str, seed: int, size: float, **settings: Any) -> tuple[Any, Any]:
    """(PEFT model on `base` with a random adapter `name`, tokenizer)."""
    import sft

    args = sft.Args(model=str(base), **{"quant": "none", "dtype": "float32", "lora_r": 4, **settings})
    model, tokenizer, _, _ = sft.load_model(args, CPU)
    model = sft.add_adapter(model, name, None, args)
    perturb(model, name, seed, size)
    return model, tokenizer


def write_run(folder: Path, model: Any, name: str, tokenizer: Any, head: Any = None) -> None:
    """A run folder with the adapter `name` of `model`, as every script leaves it."""
    import sft

    folder.mkdir()
    stop_ids = sft.find_stop_ids(tokenizer, model.generation_config)
    sft.save_model(folder, model, name, tokenizer, stop_ids, head)
    (folder / "args.json").write_text(json.dumps({"quant": "none", "dtype": "float32"}))


@pytest.fixture(scope="session")
def sft_run(base: Path, world: Path) -> Path:
    """A run folder as sft.py leaves it: an adapter that visibly differs from its base."""
    model, tokenizer = make_adapter(base, "policy", seed=1, size=0.1)
    write_run(world / "sft", model, "policy", tokenizer)
    return world / "sft"


def write_reward_run(folder: Path, base: Path, seed: int, **settings: Any) -> Path:
    """A run folder as reward.py leaves it: a random adapter and head, scores with mean 0.25."""
    model, tokenizer = make_adapter(base, "reward", seed, 0.1, **settings)
    head = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)) / 8
    write_run(folder, model, "reward", tokenizer, head)
    (folder / "reward.json").write_text(json.dumps({"mean": 0.25, "sd": 1.0, "n": 5}))
    return folder


@pytest.fixture(scope="session")
def reward_run(base: Path, world: Path) -> Path:
    """A reward model's run folder on `base`: adapter, head, mean 0.25."""
    return write_reward_run(world / "reward", base, seed=2)


@pytest.fixture(scope="session")
def reward_file(world: Path) -> str:
    """--reward_fn of one line: the share of letters "e"."""
    file = world / "letters.py"
    file.write_text(
        "def share(prompts, responses, **columns):\n    return [r.count('e') / (1 + len(r)) for r in responses]"
    )
    return f"{file}:share"


@pytest.fixture
def run_ppo(
    sft_run: Path, reward_run: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """run_ppo(**flags) -> run folder: ppo.main on the small world, two steps of 8 responses unless told otherwise.

    curves.png costs as much as the run and is drawn with plot=True only.
    """
    import ppo

    drawn = ppo.Run.plot_curves

    def start(plot: bool = False, **flags: Any) -> Path:
        monkeypatch.setattr(ppo.Run, "plot_curves", drawn if plot else lambda *_: None)
        settings: dict[str, Any] = {
            "model": str(sft_run), "reward_model": str(reward_run), "dataset": str(world / "prompts.jsonl"),
            "output_dir": str(tmp_path / "ppo"), "eval_size": 3, "max_response_length": 10, "samples_per_prompt": 2,
            "batch_size": 8, "tokens_per_batch": 128, "minibatches": 2, "max_steps": 2, "missing_eos_penalty": 0.0,
            "learning_rate": 5e-4, "critic_learning_rate": 1e-3, "warmup_ratio": 0.0,
        }  # fmt: skip
        if flags.get("reward_fn") and "reward_model" not in flags:
            settings["reward_model"] = None
        settings |= flags
        ppo.main(ppo.Args(**settings))
        return Path(settings["output_dir"])

    return start


@pytest.fixture
def run_sft(base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """run_sft(**flags) -> run folder: sft.main on the small world, three steps of 8 examples unless told otherwise."""
    import sft

    drawn = sft.Run.plot_curves

    def start(plot: bool = False, **flags: Any) -> Path:
        monkeypatch.setattr(sft.Run, "plot_curves", drawn if plot else lambda *_: None)
        settings: dict[str, Any] = {
            "model": str(base), "dataset": str(world / "sft.jsonl"), "output_dir": str(tmp_path / "sft"), "lora_r": 4,
            "batch_size": 8, "tokens_per_batch": 128, "max_steps": 3, "eval_size": 4, "max_response_length": 24,
            "learning_rate": 2e-3, "warmup_ratio": 0.0, "epochs": 3.0,
        }  # fmt: skip
        settings |= flags
        sft.main(sft.Args(**settings))
        return Path(settings["output_dir"])

    return start


def adapter_weights(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a run folder's adapter."""
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two run folders hold the same adapter to the last bit."""
    a, b = adapter_weights(one), adapter_weights(other)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
