"""tools/plan.py against the truth: what PyTorch's CPU allocator hands out during real steps of the scripts.

The plan adds up storages of meta tensors; the measurement is the allocator's own list of allocations and frees, which
the profiler records. The two share no code.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, shared_or_skip
from torch.profiler import ProfilerActivity, profile, record_function

import dpo
import grpo
import ppo
import reward
import sft

SCRIPTS = {"sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo, "grpo": grpo}
MARKED = ("hidden_states", "sample", "role_logprobs", "policy_backward", "critic_backward", "group_logprobs")


def load_tool() -> ModuleType:
    """tools/plan.py as a module."""
    spec = importlib.util.spec_from_file_location("plan", ROOT / "tools" / "plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan"] = module
    spec.loader.exec_module(module)
    return module


plan = load_tool()


# ----------------------------------------------------------------------------------------------------- measurement
class Timeline:
    """Live bytes over time, from the allocator's events; spans are the calls of marked functions."""

    def __init__(self, events: list[Any]) -> None:
        memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        self.times = np.array([t for t, _ in memory])
        self.live = np.cumsum([n for _, n in memory])
        self.spans: dict[str, list[tuple[int, int]]] = {}
        for e in events:
            if e.name() in (*MARKED, "step"):
                self.spans.setdefault(e.name(), []).append((e.start_ns(), e.start_ns() + e.duration_ns()))

    def at(self, time: int) -> int:
        """Live bytes at a time."""
        k = int(np.searchsorted(self.times, time, side="right"))
        return int(self.live[k - 1]) if k else 0

    def kept(self, name: str) -> int:
        """Bytes that live after a call and did not before it: the most of all calls."""
        return max(self.at(end) - self.at(start) for start, end in self.spans[name])

    def peak(self, name: str, call: int = -1) -> int:
        """The most bytes during a call, beyond those before it."""
        start, end = sorted(self.spans[name])[call]
        inside = self.live[(self.times >= start) & (self.times <= end)]
        return int(inside.max()) - self.at(start)


@contextmanager
def measured(patch: pytest.MonkeyPatch, script: Any) -> Iterator[list[Timeline]]:
    """Record allocations inside; the list holds the timeline afterwards."""

    def marked(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return function(*args, **kwargs)

        return call

    result: list[Timeline] = []
    with patch.context() as local:
        for name in MARKED:
            if hasattr(script, name):
                local.setattr(script, name, marked(name, getattr(script, name)))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield result
    result.append(Timeline(profiler.profiler.kineto_results.events()))


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


# -------------------------------------------------------------------------------------------------------- the world
SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": False, "pad_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 32}, "mistral": {}, "phi3": {},
    "tied": {"tie_word_embeddings": True}, "large vocabulary": {"vocab_size": 2**17, "num_hidden_layers": 4},
}  # fmt: skip


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
        return root / family

    return make


@dataclass
class Real:
    """A run as planned, and the same model in memory, loaded and given its adapters by the script."""

    run: Any
    script: Any
    model: Any
    flags: Any
    checkpointing: bool
    n: int  # groups, or examples
    base_bytes: int = 0

    def prompt(self, k: int) -> list[int]:
        """Token ids; only the first prompt has the planned length, so that rows are padded."""
        return [5] * (self.run.prompt - min(k, 3))

    def groups(self) -> list[tuple]:
        """n groups of two responses."""
        return [(self.prompt(k), [[7] * self.run.response] * 2) for k in range(self.n)]


def make_real(
    stage: str, folder: Path, quant: str, prompt: int, response: int, n: int, checkpointing: bool = False, **flags: Any
) -> Real:
    """The plan's Run for a CPU with the roles of a run folder, and the real thing."""
    planned = plan.load_script(stage)
    settings = {"quant": quant, "lora_r": 8, "batch_size": n, "micro_batch_size": n, **flags}
    settings |= {"max_prompt_length": prompt, "max_response_length": response}
    if stage == "grpo":
        settings["reward_fn"] = "some.py:function"
    args = planned.Args(model=str(folder / "config.json"), **settings)
    run = plan.describe_run(stage, planned, args, plan.PlanArgs(gpu_gb=0))
    script = SCRIPTS[stage]
    args = script.Args(model=str(folder), **settings)
    args.dtype = str(run.dtype).removeprefix("torch.")
    if stage == "grpo":
        script.settle_method(args, 1)
    model = script.load_base(str(folder), args, CPU)
    base_bytes = storage_bytes(base_tensors(model))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    script.no_dropout(model)
    for name in run.roles:
        model = script.add_adapter(model, name, None, args)
    return Real(run, script, model, args, checkpointing, n, base_bytes)


def close(real: float, planned: float, what: str) -> None:
    """Within 5 %, and printed."""
    print(f"{what:<64} measured {real / 2**20:9.3f} MiB, planned {planned / 2**20:9.3f}, {planned / real - 1:+.1%}")
    assert abs(planned / real - 1) <= 0.05, what


def sampled(real: Real, g: int, n_minibatches: int = 1) -> Any:
    """A rollout of n responses that never end early."""
    tokenizer = SimpleNamespace(pad_token_id=0, batch_decode=lambda rows, **_: [""] * len(rows))
    prompts = [{"ids": real.prompt(k), "prompt": "", "columns": {}} for k in range(real.n // g)]
    names, more = list(range(len(prompts))), (n_minibatches,) if n_minibatches else ()
    return real.script.roll_out(real.model, tokenizer, prompts, names, g, [], real.flags, (0, 0, 0), "policy", *more)


def step(real: Real) -> None:
    """A micro-batch's forward and backward pass in sft, reward and dpo, as the script's main does them."""
    script, model, flags, run = real.script, real.model, real.flags, real.run
    if run.stage == "sft":
        with script.role(model, "policy", grad=True):
            for rows in plan.training_rows(replace(run, script=script), flags.micro_batch_size):
                logprobs = script.response_logprobs(model, rows)[0]  # as main does: no entropy waits for a gradient
                script.sft_loss(logprobs, rows.mask, 100.0).backward()
    elif run.stage == "reward":
        head = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
        with script.role(model, "reward", grad=True):
            scores, _ = script.score_groups(model, head, real.groups(), 0)
            scores.sum().backward()
    else:
        script.settle_args(flags, 1)
        examples = [{"group": group, "ranks": [1, 2]} for group in real.groups()]
        references = [[torch.zeros(run.response)] * 2 for _ in examples]
        script.preference_pass(model, None, examples, references, 4.0, 0.0, 0, flags, True)


def check_update(real: Real, patch: pytest.MonkeyPatch, what: str) -> None:
    """sft, reward, dpo: activations after forward, and the peak of a micro-batch with its backward pass."""
    with measured(patch, real.script) as timelines:
        for _ in range(2):  # the second finds gradients there already
            with record_function("step"):
                step(real)
    (t,) = timelines
    who = real.run.trained[0]
    shapes = {plan.rows_shape(rows) for rows in plan.training_rows(real.run, real.flags.micro_batch_size)}
    passes = [plan.pass_bytes(real.run, shape, who, "update", real.checkpointing) for shape in shapes]
    close(t.kept("hidden_states"), max(p.forward.total() for p in passes), f"{what}: activations after forward")
    close(t.peak("step"), max(p.peak.total() for p in passes), f"{what}: peak of forward and backward")


def check_rollout(real: Real, g: int, patch: pytest.MonkeyPatch, what: str) -> None:
    """ppo, grpo: sampling, score passes and updates."""
    run, script, model, flags = real.run, real.script, real.model, real.flags
    head = torch.nn.Linear(model.config.hidden_size, 1)
    with measured(patch, script) as timelines:
        rollout = sampled(real, g)
        zeros = torch.zeros_like(rollout.sampler_logprobs)
        script.role_logprobs(model, "policy", rollout, 1.0)
        script.role_logprobs(model, "reference", rollout, 1.0)
        for _ in range(2):
            if run.stage == "ppo":
                script.policy_backward(model, rollout.minibatches[0], zeros, zeros, 100.0, flags)
            else:
                with record_function("policy_backward"):
                    script.group_backward(model, rollout, rollout.mask, None, zeros, zeros, 100.0, flags)
        for p in model.parameters():
            p.grad = None
        for _ in range(2 if run.stage == "ppo" else 0):
            script.critic_backward(model, head, rollout.minibatches[0], zeros, zeros, 100.0, flags)
    (t,) = timelines
    (shape,) = {plan.rows_shape(rows) for rows in plan.training_rows(run, flags.micro_batch_size)}

    def planned(who: str, kind: str) -> Any:
        return plan.pass_bytes(run, shape, who, kind, real.checkpointing)

    sampling = plan.sampling_phases(run, flags.sample_batch_size)
    most = max(sampling[f"rollout: {part}"].total() for part in ("prefill", "decode"))
    close(t.peak("sample"), most, f"{what}: sampling, KV cache")
    close(t.peak("role_logprobs", 0), planned("policy", "score+grad").peak.total(), f"{what}: policy's log-probs")
    close(t.peak("role_logprobs", 1), planned("reference", "score").peak.total(), f"{what}: reference's log-probs")
    update = planned("policy", "update")
    close(t.kept("hidden_states"), update.forward.total(), f"{what}: activations after forward")
    close(t.peak("policy_backward"), update.peak.total(), f"{what}: policy update")
    if run.stage == "ppo":
        close(t.peak("critic_backward"), planned("critic", "update").peak.total(), f"{what}: critic update")


# ------------------------------------------------------------------------------------------------------------ truth
@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in [*FAMILIES][1:-1])])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_what_stays_in_memory(family: str, quant: str, model_folder: Callable[[str], Path]) -> None:
    """Weights as loaded (4-bit ones with both levels of absmax), adapters, gradients and optimizer states."""
    real = make_real("ppo", model_folder(family), quant, 16, 8, 4)
    fixed = plan.fixed_bytes(real.run)
    close(real.base_bytes, fixed["weights"].total(), f"{family}, {quant}: weights")
    for name in ("policy", "reference", "reward", "critic"):
        parameters = real.script.adapter_parameters(real.model, name)
        close(storage_bytes(parameters), fixed["adapters"][name], f"{family}, {quant}: adapter {name}")
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = real.script.make_optimizer(parameters, 0.0, CPU)
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    close(storage_bytes(states), fixed["optimizer"]["critic"], f"{family}, {quant}: optimizer")
    close(storage_bytes([p.grad for p in parameters]), fixed["gradients"]["critic"], f"{family}, {quant}: gradients")


SHAPES = {"short": (40, 24, 4), "wide": (112, 48, 6)}  # prompt, response, groups or responses


@pytest.mark.parametrize(
    "stage, quant, shape, checkpointing",
    [
        ("dpo", "nf4", "short", False),
        *(
            pytest.param(stage, quant, shape, checkpointing, marks=pytest.mark.slow)
            for stage in ("sft", "reward", "dpo")
            for quant in ("none", "nf4")
            for shape in SHAPES
            for checkpointing in (False, True)
            if (stage, quant, shape, checkpointing) != ("dpo", "nf4", "short", False)
        ),
    ],
)
def test_update(
    stage: str, quant: str, shape: str, checkpointing: bool, model_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Forward and backward of sft, reward and dpo."""
    real = make_real(stage, model_folder("llama"), quant, *SHAPES[shape], checkpointing)
    check_update(real, monkeypatch, f"{stage}, {quant}, {shape}, checkpointing {checkpointing}")


@pytest.mark.parametrize(
    "stage, quant, shape, g, checkpointing",
    [
        ("ppo", "none", "short", 4, False),
        *(
            pytest.param(stage, quant, shape, g, checkpointing, marks=pytest.mark.slow)
            for stage in ("ppo", "grpo")
            for quant in ("none", "nf4")
            for shape, g in (("short", 1), ("wide", 2), ("wide", 6))
            for checkpointing in (False, True)
            if stage == "ppo" or g > 1
        ),
    ],
)
def test_rollout_and_updates(
    stage: str, quant: str, shape: str, g: int, checkpointing: bool, model_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Sampling, score passes and updates of ppo and grpo, in shared rows and in padded ones."""
    flags = {"samples_per_prompt": g, "sample_batch_size": SHAPES[shape][2], "minibatches": 1}
    flags = {k: v for k, v in flags.items() if hasattr(SCRIPTS[stage].Args, k)}
    real = make_real(stage, model_folder("llama"), quant, *SHAPES[shape], checkpointing, **flags)
    check_rollout(real, g, monkeypatch, f"{stage}, {quant}, {shape}, G {g}, checkpointing {checkpointing}")


@pytest.mark.parametrize("stage", ["sft", "ppo", "dpo", "grpo"])
def test_entropies_wait_for_no_gradient(
    stage: str, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a loss without entropy, entropies have no gradient: it would make backward compute every chunk again."""
    script, waiting = SCRIPTS[stage], []
    compute = script.response_logprobs

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        waiting.append((result[0].requires_grad, result[1].requires_grad))
        return result

    monkeypatch.setattr(script, "response_logprobs", watched)
    if stage == "sft":
        script.main(script.Args(max_steps=1, eval_size=2, output_dir=str(tmp_path / "run")))
    elif stage == "dpo":
        step(make_real(stage, model_folder("llama"), "none", *SHAPES["short"]))
    else:
        flags: dict[str, Any] = {"samples_per_prompt": 2, "sample_batch_size": 4}
        flags |= {"minibatches": 1} if stage == "ppo" else {}
        real = make_real(stage, model_folder("llama"), "none", *SHAPES["short"], **flags)
        rollout = sampled(real, 2)
        zeros = torch.zeros_like(rollout.sampler_logprobs)
        if stage == "ppo":
            script.policy_backward(real.model, rollout.minibatches[0], zeros, zeros, 100.0, real.flags)
        else:
            script.group_backward(real.model, rollout, rollout.mask, None, zeros, zeros, 100.0, real.flags)
    assert (True, False) in waiting and not any(entropy for _, entropy in waiting)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES][1:])
def test_families(family: str, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other models, and a vocabulary so large that logits are computed in chunks."""
    flags = {"samples_per_prompt": 4, "sample_batch_size": 4, "minibatches": 1}
    n = 150 if family == "large vocabulary" else 40
    real = make_real("ppo", model_folder(family), "none", 96, n, 4, False, **flags)
    check_rollout(real, 4, monkeypatch, family)


# ------------------------------------------------------------------------------------------------------------- use
def test_real_configurations() -> None:
    """7-8B models: parameters and KV cache as ../shared/configs/README.md counts them, bits per 4-bit weight."""
    configs = shared_or_skip("configs")
    for name, parameters, cache in (("Qwen2.5-7B", 7_615_616_512, 57_344), ("Llama-3.1-8B", 8_030_261_248, 131_072)):
        script = plan.load_script("sft")
        args = script.Args(model=str(configs / f"{name}.json"), quant="none", dtype="bfloat16")
        run = plan.describe_run("sft", script, args, plan.PlanArgs())
        weights = plan.fixed_bytes(run)["weights"]
        buffers = sum(x.nbytes for x in plan.build_base(run.config, 1, "none", run.dtype).buffers())
        assert weights.total() == 2 * parameters + buffers
        nf4 = plan.fixed_bytes(replace(run, quant="nf4"))["weights"]
        bits = (nf4["4-bit weights"] + nf4["absmax, both levels"]) / (weights["matrices"] / 2) * 8
        assert 4.12 < bits < 4.14  # 4 + 8 / 64 + 32 / (64 * 256), and 64 + 1024 + 4 bytes of tables per matrix
        config = run.config
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        assert 4 * config.num_hidden_layers * config.num_key_value_heads * head_size == cache


def test_command(model_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table and the JSON agree; a card's flags fit the card; larger batches need more."""
    config, output = str(model_folder("llama") / "config.json"), tmp_path / "out" / "plan.json"
    flags = ["reward", "--model", config, "--batch_size", "8", "--prompt_length", "40", "--output", str(output)]
    plan.main([*flags, "--micro_batch_size", "4", "--gpu_gb", "0.6"])
    text, saved = capsys.readouterr().out, json.loads(output.read_text())
    assert "update: reward" in text and "4-bit weights" in text and "24 GiB" in text
    phases = {name: sum(n for tag, n in parts.items() if tag != "total") for name, parts in saved["phases"].items()}
    assert phases == {name: parts["total"] for name, parts in saved["phases"].items()}
    assert saved["peak"]["bytes"] == max(phases.values()) == phases[saved["peak"]["phase"]]
    assert [card["gib"] for card in saved["cards"]] == [0.6, 8, 10, 12, 16, 24]
    assert all(card["needed"] <= card["gib"] * 2**30 for card in saved["cards"] if card["flags"])
    plan.main([*flags, "--micro_batch_size", "1", "--gpu_gb", "0", "--gradient_checkpointing", "True"])
    smaller = json.loads(output.read_text())
    assert smaller["dtype"] == "float32" and smaller["quant"] == "none" and not smaller["cards"]
    assert smaller["phases"]["update: reward"]["activations"] < saved["phases"]["update: reward"]["activations"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "the first word is the stage"),
        (["ppo", "--model", "nowhere/at/all.json"], "no configuration of a model there"),
        (["ppo", "--modell", "x"], "--modell"),
        (["ppo", "--model", "/nowhere"], "no such folder"),
        (["grpo", "--model", "CONFIG", "--batch_size", "9"], "no multiple of --samples_per_prompt"),
        (["dpo", "--model", "CONFIG", "--micro_batch_size", "0"], "must be above 0"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message: str, model_folder: Callable[[str], Path]) -> None:
    """Each mistake gives one line that says what is wrong."""
    flags = [str(model_folder("llama") / "config.json") if flag == "CONFIG" else flag for flag in flags]
    with pytest.raises(plan.UserError) as caught:
        plan.make_plan(flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*SCRIPTS])
def test_from_the_command_line(stage: str, model_folder: Callable[[str], Path]) -> None:
    """Every stage plans for a GPU and for a CPU."""
    for gpu_gb in ("0", "24"):
        line = [sys.executable, str(ROOT / "tools" / "plan.py"), stage, "--model", str(model_folder("qwen2"))]
        done = subprocess.run([*line, "--gpu_gb", gpu_gb], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "peak:" in done.stdout, done.stderr


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_bound_on_tokens_is_filled_up(stage: str, model_folder: Callable[[str], Path]) -> None:
    """Whole examples leave room below --tokens_per_micro_batch that shorter ones may take: the plan counts it. A bound
    that cannot bind changes nothing."""
    script, config = plan.load_script(stage), str(model_folder("llama") / "config.json")
    lengths = {"max_prompt_length": 40, "max_response_length": 24}
    more = {"reward_fn": "some.py:function"} if stage == "grpo" else {}
    columns = {}
    for most in (0, 120, 170, 10**4):
        args = script.Args(model=config, tokens_per_micro_batch=most, micro_batch_size=8, **lengths, **more)
        run = plan.describe_run(stage, script, args, plan.PlanArgs(gpu_gb=0))
        columns[most] = max(rows.input_ids.numel() for rows in plan.training_rows(run, 8))
        assert (f"--tokens_per_micro_batch {most}" in str(plan.asked_choice(run))) == (most > 0)
    assert columns[0] == columns[10**4] > 200
    assert all(0.85 * most <= columns[most] <= most for most in (120, 170))
