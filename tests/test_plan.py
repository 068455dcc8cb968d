"""tools/plan.py against the truth: what PyTorch's CPU allocator hands out while the scripts run.

The plan adds up storages of meta tensors; the measurement is the allocator's own list of allocations and frees, which
the profiler records while a script's main runs on rows of the planned lengths. The two share no code.
"""

import contextlib
import gc
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, STAGES, shared_or_skip
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile, record_function


def load_tool() -> ModuleType:
    """tools/plan.py as a module."""
    spec = importlib.util.spec_from_file_location("plan", ROOT / "tools" / "plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan"] = module
    spec.loader.exec_module(module)
    return module


plan = load_tool()


# -------------------------------------------------------------------------------------------------------- the world
SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": False, "pad_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 32}, "mistral": {}, "phi3": {},
    "tied": {"tie_word_embeddings": True}, "large vocabulary": {"vocab_size": 2**17, "num_hidden_layers": 4},
}  # fmt: skip
LENGTHS = {"short": (32, 32), "long": (32, 64)}  # prompt, response (tokens)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """model_folder(family) -> a folder with a random model, large enough that tensors outweigh Python."""
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("plan")

    def make(family: str) -> Path:
        if not (root / family).is_dir():
            kind = family if family in ("qwen2", "qwen3", "mistral", "phi3") else "llama"
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, **{**SIZES, **FAMILIES[family]})
            AutoModelForCausalLM.from_config(config).save_pretrained(root / family)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(ROOT / "tiny" / "base" / file, root / family)
        return root / family

    return make


def make_flags(stage: str, folder: Path, lengths: str, quant: str, **more: Any) -> dict[str, Any]:
    """Flags under which every step has two full rows, of groups of equal length."""
    prompt, response = LENGTHS[lengths]
    g = {"ppo": 4, "grpo": 4, "sft": 1}.get(stage, 2)
    flags: dict[str, Any] = {
        "model": str(folder), "max_prompt_length": prompt, "max_response_length": response, "max_steps": 1, "lora_r": 8,
        "tokens_per_batch": 2 * (prompt + g * response), "batch_size": 4, "quant": quant, "dataset": "none",
    }  # fmt: skip
    if stage in ("ppo", "grpo"):
        flags |= {"batch_size": 16, "samples_per_prompt": 4, "sample_batch_size": 8, "missing_eos_penalty": 0.0}
        flags |= {"reward_fn": f"{ROOT / 'rewards' / 'text.py'}:brevity"} | (
            {"minibatches": 1} if stage == "ppo" else {}
        )
    return {**flags, **more}


def example(stage: str, k: int, prompt: int, response: int) -> dict[str, Any]:
    """An encoded example of exactly these lengths."""
    ids, answer = [5] * prompt, [7] * response
    row: dict[str, Any] = {"key": str(k), "length": prompt + response, "prompt": f"prompt {k}", "columns": {}}
    if stage == "sft":
        return {**row, "ids": ids + answer, "mask": [0] * prompt + [1] * response}
    if stage in ("reward", "dpo"):
        more = {"texts": ["b", "c"], "id": k, "subset": "", "margin": 0.0}
        return {**row, **more, "group": [ids, [answer, answer]], "ranks": [1, 2]}
    return {**row, "ids": ids, "messages": []}


# ----------------------------------------------------------------------------------------------------- measurement
class Timeline:
    """Live bytes over time, from the allocator's events; spans are the calls of marked functions."""

    def __init__(self, events: list[Any]) -> None:
        memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        self.times = np.array([t for t, _ in memory])
        self.live = np.cumsum([n for _, n in memory])
        self.spans: dict[str, list[tuple[int, int]]] = {}
        for e in events:
            if e.name().startswith("plan "):
                span = e.start_ns(), e.start_ns() + e.duration_ns()
                self.spans.setdefault(e.name().removeprefix("plan "), []).append(span)

    def at(self, time: int) -> int:
        """Live bytes at a time."""
        k = int(np.searchsorted(self.times, time, side="right"))
        return int(self.live[k - 1]) if k else 0

    def peak(self, name: str, outside: str = "", first: bool = False) -> int:
        """The most bytes during a call, beyond those before it (or before the first one); calls within those of
        `outside` don't count."""
        left_out, peaks = self.spans.get(outside, []), []
        spans = sorted(s for s in self.spans[name] if not any(a <= s[0] and s[1] <= b for a, b in left_out))
        for start, end in spans:
            inside = self.live[(self.times >= start) & (self.times <= end)]
            peaks.append(int(inside.max()) - self.at(spans[0][0] if first else start))
        return max(peaks)


@contextlib.contextmanager
def measured(patch: pytest.MonkeyPatch, script: Any) -> Iterator[list[Timeline]]:
    """Record allocations inside, and when roles and some functions run; the list holds the timeline afterwards."""

    def mark(name: str, label: Callable[..., str]) -> None:
        function: Any = getattr(script, name, None)

        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"plan {label(*args, **kwargs)}"):
                return function(*args, **kwargs)

        if function:
            local.setattr(script, name, call)

    plain_role = script.role

    @contextlib.contextmanager
    def role(model: Any, name: str, grad: bool = False) -> Iterator[None]:
        with plain_role(model, name, grad), record_function(f"plan {name}{', trained' * grad}"):
            yield

    result: list[Timeline] = []
    with patch.context() as local:
        local.setattr(script, "role", role)
        for name in ("generate", "evaluate"):
            mark(name, lambda *_, name=name, **__: name)
        mark("role_logprobs", lambda model, who, *_: f"log-probs of {who}")
        mark("sample", lambda *given, **_: f"sample {given[3]}")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield result
    result.append(Timeline(profiler.profiler.kineto_results.events()))
    del profiler
    gc.collect()  # its records are cycles, a gigabyte at a time


def close(real: float, planned: float, what: str) -> None:
    """Within 5 %, and printed."""
    print(f"{what:<64} measured {real / 2**20:9.3f} MiB, planned {planned / 2**20:9.3f}, {planned / real - 1:+.1%}")
    assert abs(planned / real - 1) <= 0.05, what


def check_run(
    stage: str, folder: Path, lengths: str, quant: str, output: Path, patch: pytest.MonkeyPatch, **more: Any
) -> None:
    """main, on examples of exactly the planned lengths whose responses never end early, against the plan's phases."""
    script, planned = importlib.import_module(stage), plan.load_script(stage)
    flags = make_flags(stage, folder, lengths, quant, **more)
    run = plan.describe_run(stage, planned, planned.Args(**flags), plan.PlanArgs(gpu_gb=0))
    n_heldout = 16 if stage == "dpo" else 8  # as many as are answered at once
    examples = [example(stage, k, run.prompt, run.response) for k in range(4 + n_heldout)]
    table = Dataset.from_list([{"key": e["key"], "length": e["length"], "example": json.dumps(e)} for e in examples])
    patch.setattr(script, "load_data", lambda *_: (table.select(range(4)), table.select(range(4, len(table)))))
    patch.setattr(script, "find_stop_ids", lambda *_: [-1])
    patch.setattr(script.Run, "plot_curves", lambda *_: None)
    with measured(patch, script) as timelines:
        script.main(script.Args(**flags, output_dir=str(output)))
    (t,) = timelines
    sampling = plan.sampling_phases(run, flags.get("sample_batch_size", 0))
    phases, what = sampling | plan.training_phases(run, flags["tokens_per_batch"]), f"{stage}, {quant}, {lengths}"

    def compare(phase: str | tuple, name: str, outside: str = "") -> None:
        parts = [bytes_of for key, bytes_of in phases.items() if key.startswith(phase)]
        there = (*plan.FIXED, "token rows")
        most = max(bytes_of.total() - sum(bytes_of[name] for name in there) for bytes_of in parts)
        rows_apart = stage == "dpo" and name.endswith("trained")  # a role block each: the second finds gradients there
        close(t.peak(name, outside, rows_apart), most, f"{what}: {phase}")

    compare(f"update: {run.trained[0]}", f"{run.trained[0]}, trained", "log-probs of policy")
    if stage in ("sft", "reward", "dpo"):
        compare("evaluation", run.trained[0], "generate")
    if stage == "dpo":
        compare("reference's log-probs", "reference", "generate")
    if stage in ("ppo", "grpo"):
        compare("scores: policy", "log-probs of policy", "evaluate")
        compare("scores: reference", "log-probs of reference", "evaluate")
    if stage == "ppo" and not run.flags.gradient_checkpointing:  # else the policy's last loss still holds its mask
        compare("update: critic", "critic, trained")
    if quant == "nf4":  # for the last tokens' logits in bfloat16 a CPU copies lm_head for each row, a GPU does not
        return
    if stage in ("sft", "dpo"):
        compare("samples", "generate")
    if stage in ("ppo", "grpo"):
        compare("rollout", "sample 4")
        compare(("evaluation: prefill", "evaluation: decode"), "sample 1")


# ------------------------------------------------------------------------------------------------------------ truth
def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of distinct storages."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def base_tensors(model: Any) -> list[torch.Tensor]:
    """Parameters, buffers and quantisation states of a base model."""
    tensors = [*model.parameters(), *model.buffers()]
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return tensors


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in [*FAMILIES][1:-1])])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_what_stays_in_memory(family: str, quant: Any, model_folder: Callable[[str], Path]) -> None:
    """Weights as loaded (4-bit ones with both levels of absmax), adapters, gradients and optimizer states."""
    import sft

    script = plan.load_script("ppo")
    config = str(model_folder(family) / "config.json")
    flags = script.Args(model=config, quant=quant, lora_r=8)
    fixed = plan.fixed_bytes(plan.describe_run("ppo", script, flags, plan.PlanArgs(gpu_gb=0)))
    args = sft.Args(model=str(model_folder(family)), quant=quant, lora_r=8)
    model, *_ = sft.load_model(args, CPU)
    close(storage_bytes(base_tensors(model)), fixed["weights"].total(), f"{family}, {quant}: weights")
    for name in ("policy", "reference", "reward", "critic"):
        model = sft.add_adapter(model, name, None, args)
        weights = [p for key, p in model.named_parameters() if f".{name}." in key]
        close(storage_bytes(weights), fixed["adapters"][name], f"{family}, {quant}: adapter {name}")
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer = sft.make_optimizer(weights, args)
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    close(storage_bytes(states), fixed["optimizer"]["critic"], f"{family}, {quant}: optimizer")
    close(storage_bytes([p.grad for p in weights]), fixed["gradients"]["critic"], f"{family}, {quant}: gradients")


QUICK = [("sft", "nf4", "short", True), ("ppo", "none", "short", False), ("dpo", "none", "short", False)]
ALL = [(stage, quant, "short", again) for stage in STAGES for quant in ("none", "nf4") for again in (False, True)]
ALL += [(stage, "none", "long", False) for stage in STAGES]


@pytest.mark.parametrize(
    "stage, quant, lengths, checkpointing",
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK)],
)
def test_a_run(
    stage: str, quant: str, lengths: str, checkpointing: bool, model_folder: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Updates, score passes, sampling and evaluation of every stage."""
    flags = {"gradient_checkpointing": checkpointing}
    check_run(stage, model_folder("llama"), lengths, quant, tmp_path / "run", monkeypatch, **flags)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES][1:])
def test_families(
    family: str, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other models, and a vocabulary so large that logits are computed in chunks."""
    check_run("ppo", model_folder(family), "short", "none", tmp_path / "run", monkeypatch)


# ------------------------------------------------------------------------------------------------------------- use
def test_real_configurations() -> None:
    """7-8B models: parameters and KV cache as ../shared/configs/README.md counts them, bits per 4-bit weight."""
    configs = shared_or_skip("configs")
    for name, parameters, cache in (("Qwen2.5-7B", 7_615_616_512, 57_344), ("Llama-3.1-8B", 8_030_261_248, 131_072)):
        script = plan.load_script("grpo")
        args = script.Args(model=str(configs / f"{name}.json"), quant="none", max_response_length=8, batch_size=8)
        run = plan.describe_run("grpo", script, args, plan.PlanArgs())
        weights = plan.fixed_bytes(run)["weights"]
        buffers = sum(x.nbytes for x in plan.build_base(run.config, 1, "none", run.dtype).buffers())
        assert run.dtype == torch.bfloat16 and weights.total() == 2 * parameters + buffers
        nf4 = plan.fixed_bytes(replace(run, flags=replace(run.flags, quant="nf4")))["weights"]
        bits = (nf4["4-bit weights"] + nf4["absmax, both levels"]) / (weights["matrices"] / 2) * 8
        assert 4.12 < bits < 4.14  # 4 + 8 / 64 + 32 / (64 * 256), and 64 + 1024 + 4 bytes of tables per matrix
        assert plan.sampling_phases(run, 8)["rollout: decode"]["KV cache"] == cache * (512 + 8 * 8)


MEASURED = [("dpo", 7680, 9.37), ("dpo", 12288, 11.4), ("dpo", 24576, 17.2), ("ppo", 5120, 8.69)]


@pytest.mark.parametrize(
    "stage, tokens, gib", [MEASURED[0], *(pytest.param(*x, marks=pytest.mark.slow) for x in MEASURED[1:])]
)
def test_what_a_gpu_measured(stage: str, tokens: int, gib: float) -> None:
    """Peaks on an H100 (docs/gpu.md): Qwen2.5-7B's shape in NF4, LoRA in bfloat16, 16 pairs or responses."""
    config, script = shared_or_skip("configs") / "Qwen2.5-7B.json", plan.load_script(stage)
    more: dict[str, Any] = {"eval_samples": 0} if stage == "dpo" else {"sample_batch_size": 16, "minibatches": 1}
    flags = {"max_response_length": 512, "batch_size": 16, "tokens_per_batch": tokens, **more}
    run = plan.describe_run(stage, script, script.Args(model=str(config), **flags), plan.PlanArgs())
    phases = plan.training_phases(run, tokens)
    assert abs(phases["update: policy"].total() / plan.GIB / gib - 1) < 0.05


def test_masks_take_the_square_of_a_row(model_folder: Callable[[str], Path]) -> None:
    """A dense mask is N x N numbers; for a small BlockMask the rule is evaluated on N x N booleans, four at once."""
    script, n = plan.load_script("sft"), 4096
    args = script.Args(model=str(model_folder("llama")), quant="none", tokens_per_batch=n, max_response_length=64)
    run = plan.describe_run("sft", script, args, plan.PlanArgs())
    size = plan.Size(n, n - 8, 8)
    dense, flex = (plan.trace_pass(run, size, flex, "policy", "score", 2)[0] for flex in (False, True))
    assert dense["attention mask"] >= 2 * n * n and 4 * n * n <= flex["attention mask"] < 4.1 * n * n


def test_experts_are_counted_as_what_they_are(tmp_path: Path) -> None:
    """Experts of a MoE model are no Linear layers: bitsandbytes leaves them in bfloat16. The plan says so."""
    config = {
        "model_type": "qwen3_moe", "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64,
        "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 2048,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    result, _ = plan.make_plan(["sft", "--model", str(tmp_path / "config.json"), "--max_response_length", "64"])
    weights = result["fixed"]["weights"]
    assert weights["experts, not in 4 bits"] == 2 * 4 * 8 * 3 * 128 * 64 and weights["4-bit weights"] > 0
    assert result["attention"] == "dense masks" and result["cards"][0]["fits_as_asked"]


def test_command(model_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table and the JSON agree; a card's flags fit the card; larger rows need more."""
    config, output = str(model_folder("llama") / "config.json"), tmp_path / "out" / "plan.json"
    flags = [
        "reward",
        "--model",
        config,
        "--max_response_length",
        "64",
        "--prompt_length",
        "40",
        "--output",
        str(output),
    ]
    plan.main([*flags, "--tokens_per_batch", "1024", "--gpu_gb", "0.62"])
    text, saved = capsys.readouterr().out, json.loads(output.read_text())
    assert "update: reward" in text and "4-bit weights" in text and "24 GiB" in text
    phases = {name: sum(n for tag, n in parts.items() if tag != "total") for name, parts in saved["phases"].items()}
    assert phases == {name: parts["total"] for name, parts in saved["phases"].items()}
    assert saved["peak"]["bytes"] == max(phases.values()) == phases[saved["peak"]["phase"]]
    assert [card["gib"] for card in saved["cards"]] == [0.62, 8, 10, 12, 16, 24]
    assert all(card["needed"] <= card["gib"] * 2**30 for card in saved["cards"] if card["flags"])
    chosen = saved["cards"][0]["flags"].split()
    plan.main([*flags, *chosen, "--gpu_gb", "0.62"])
    again = json.loads(output.read_text())
    assert again["peak"]["needed"] == saved["cards"][0]["needed"] and again["cards"][0]["fits_as_asked"]
    plan.main([*flags, "--tokens_per_batch", "512", "--gpu_gb", "0", "--gradient_checkpointing", "True"])
    smaller = json.loads(output.read_text())
    assert smaller["dtype"] == "float32" and smaller["quant"] == "none" and not smaller["cards"]
    assert smaller["phases"]["update: reward"]["activations"] < phases["update: reward"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "the first word is the stage"),
        (["ppo", "--model", "nowhere/at/all.json"], "no configuration of a model there"),
        (["ppo", "--modell", "x"], "--modell"),
        (["ppo", "--model", "/nowhere"], "no such folder"),
        (["grpo", "--model", "CONFIG", "--batch_size", "9"], "no multiple of --samples_per_prompt"),
        (["dpo", "--model", "CONFIG", "--tokens_per_batch", "0"], "must be above 0"),
        (["ppo", "--model", "CONFIG", "--prompt_length", "-1"], "must be above 0"),
        (["reward", "--model", "CONFIG", "--lora_r", "0"], "sft.py only"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message: str, model_folder: Callable[[str], Path]) -> None:
    """Each mistake gives one line that says what is wrong."""
    flags = [str(model_folder("llama") / "config.json") if flag == "CONFIG" else flag for flag in flags]
    with pytest.raises(plan.UserError) as caught:
        plan.make_plan(flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """--help before a stage says what there is."""
    plan.main(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in (*STAGES, "--gpu_gb", "--tokens_per_batch", "STAGE --help"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_from_the_command_line(stage: str, model_folder: Callable[[str], Path]) -> None:
    """Every stage plans for a GPU and for a CPU."""
    for gpu_gb in ("0", "24"):
        line = [sys.executable, str(ROOT / "tools" / "plan.py"), stage, "--model", str(model_folder("qwen2"))]
        done = subprocess.run([*line, "--gpu_gb", gpu_gb], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "peak:" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_models_whose_responses_share_no_row(stage: str, tmp_path: Path) -> None:
    """Windows (each response has a row of the cache) and models without plain attention are planned, not refused."""
    from transformers import AutoConfig

    for kind, more in (("mistral", {"sliding_window": 64}), ("gemma2", {"head_dim": 32}), ("olmo2", {})):
        AutoConfig.for_model(kind, **{**SIZES, **more}).save_pretrained(tmp_path / kind)
        flags = ["--model", str(tmp_path / kind / "config.json"), "--max_response_length", "32"]
        result, _ = plan.make_plan([stage, *flags])
        assert result["phases"]["rollout: decode"]["KV cache"] > 0
