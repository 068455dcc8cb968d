"""How much memory a run takes, before it is started: no weights are loaded, no GPU is needed.

    python tools/plan.py ppo --model runs/sft --batch_size 16 --tokens_per_batch 4096 --gpu_gb 24
    python tools/plan.py dpo --model ckpt/config.json --quant nf4
    python tools/plan.py sft --model tiny/base --gpu_gb 0        # on a CPU

The first word is the stage (sft, reward, ppo, dpo, grpo), the rest are the flags of that script and four of the plan's
own: --gpu_gb, --prompt_length, --response_length, --output. --model is a folder with config.json, a run folder, a hub
id, or a bare config.json (then the roles are those of a run folder). Printed: what lies in memory throughout, the peak
of each phase, and the --tokens_per_batch and --sample_batch_size that fit cards of several sizes.

The model is built on PyTorch's meta device, where tensors have shapes but no bytes, with two layers and with three.
Each phase (prefill, decode, score passes, updates) runs there, forward and backward, through the script's functions
and the libraries' modules, while a tracker adds up the storages that live; what the third layer added is multiplied.
So the sizes come from the code that will run, not from a table of models, and no constant in them was fitted.
Every prompt and response counts as long as the longest, and rows as full of groups of these proportions: to the token,
as rows of shorter groups may be.

On a GPU there is more, which nobody can see from here: the CUDA context, fragmentation, workspaces of kernels. The two
allowances for it, CONTEXT and FRAGMENTATION, are estimates and printed as such. Also left out: how many weights the
loader of transformers holds at once before it makes them 4-bit, and reward models on another base while they score.
"""

import copy
import functools
import importlib
import json
import math
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).resolve().parents[1]  # where the scripts are
STAGES = ("sft", "reward", "ppo", "dpo", "grpo")
CARDS = (8.0, 10.0, 12.0, 16.0, 24.0)
ROWS = (16384, 8192, 4096, 2048, 1024, 512)  # --tokens_per_batch: longer rows are no faster
GIB = 2**30
CONTEXT = 0.5 * GIB  # CUDA context, cuBLAS workspaces, loaded kernels: an allowance, not in PyTorch's own figures
FRAGMENTATION = 0.06  # share of a phase's bytes that the allocator can't use: an allowance; sizes differ at every step
META = torch.device("meta")
FIXED = ("weights", "adapters", "heads", "optimizer")
Bytes = Counter[str]  # category -> bytes


class UserError(Exception):
    """A mistake in what the user gave, printed as one line."""


def arg(default: Any, help: str) -> Any:
    """One dataclass field = one command-line flag with its --help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class PlanArgs:
    prompt_length: int | None = arg(None, "tokens of the longest prompts of a batch; default: --max_prompt_length")
    response_length: int | None = arg(None, "tokens of the longest responses; default: --max_response_length")
    gpu_gb: float | None = arg(None, "size of your card in GiB, beside 8, 10, 12, 16 and 24; 0: a CPU")
    output: str | None = arg(None, "also write the plan as JSON to this file")


# --------------------------------------------------------------------------------------------------------- tracking
class Tracker(TorchDispatchMode):
    """Adds up the bytes of all storages made while it is active and still alive, by tag; knows the peak.

    4-bit products are split into what they do without a fused kernel: dequantise, then multiply (the upper bound).
    Where code asks a tensor for a value, it asks whether a mask has no padding, or whether all has ended: no.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Bytes = Counter()
        self.peak: Bytes = Counter()
        self.tag = "activations"
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "bitsandbytes::gemm_4bit":
            from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

            with self:
                return _gemm_4bit_default_impl(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False
        output = func(*args, **(kwargs or {}))
        tag = "dequantised weight" if func.namespace == "bitsandbytes" else self.tag
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.is_meta and x.untyped_storage()._cdata not in given:
                self.add(x.untyped_storage(), tag)
        return output

    def add(self, storage: Any, tag: str) -> None:
        """Count a storage until it dies."""
        key, n = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def died(_: Any) -> None:
            self.live[tag] -= n
            self.known.pop(key, None)

        self.known[key] = weakref.ref(storage, died)
        self.live[tag] += n
        if self.live.total() > self.peak.total():
            self.peak = Counter(self.live)

    def take_peak(self) -> Bytes:
        """The peak since the last call."""
        peak, self.peak = self.peak, Counter(self.live)
        return peak

    def tagged(self, tag: str, function: Callable) -> Callable:
        """`function`, whose tensors belong to this category."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before, self.tag = self.tag, tag
            result = function(*args, **kwargs)
            self.tag = before
            return result

        return call


class Autocast(TorchFunctionMode):
    """What torch.autocast does to products on a GPU, and does not do on the meta device: operands in bfloat16."""

    PRODUCTS = (functional.linear, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS:
            args = tree_map_only(Tensor, lambda x: x.bfloat16() if x.dtype == torch.float32 else x, args)
        return func(*args, **(kwargs or {}))


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, scale: Any = None, **_: Any
) -> Tensor:
    """scaled_dot_product_attention as CPUs and GPUs run it; on the meta device PyTorch would keep every score.

    A fused kernel keeps its inputs, its output and a float per query and head; a boolean mask becomes a float one.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, 0.0, False, attn_mask=attn_mask, scale=scale)[0]


def flex_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    """transformers' FlexAttention: keys are repeated unless the heads are a power of two; its kernel keeps the same."""
    heads, copies = query.shape[1], query.shape[1] // key.shape[1]
    if heads & (heads - 1):
        key, value = (x.repeat_interleave(copies, 1) for x in (key, value))
    return fused_attention(query, key, value).transpose(1, 2).contiguous(), None


# ------------------------------------------------------------------------------------------------------- the run
def load_script(stage: str) -> Any:
    """The script of a stage: flags and functions come from there."""
    sys.path.insert(0, str(ROOT))
    return importlib.import_module(stage)


def read_config(source: str, args: Any) -> Any:
    """The configuration of a base model: a folder, a hub id or a config.json."""
    from transformers import AutoConfig

    try:
        if source.endswith(".json"):
            return AutoConfig.for_model(**json.loads(Path(source).read_text(encoding="utf-8")))
        return AutoConfig.from_pretrained(source, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--model {source}: no configuration of a model there ({reason})") from error


@dataclass(frozen=True, eq=False)  # compared by identity: traces are kept per run
class Run:
    """All that decides a run's memory; `flags` is the script's own Args, settled."""

    script: Any
    stage: str
    flags: Any
    config: Any
    gpu: bool
    roles: dict[str, Any]  # adapter -> its LoraConfig, or None: as the flags say
    trained: list[str]
    heads: list[int]  # sizes of the scalar heads
    others: list[Any]  # configurations of reward models on another base
    prompt: int
    response: int
    dtype: torch.dtype  # of the base
    plain: bool  # whether prompts and responses share rows
    g: int  # responses per prompt


def reward_sources(stage: str, flags: Any) -> list[str]:
    """The reward models of a run: folders, hub ids, or "" for one that is not named."""
    names = [entry.rpartition("=")[0] or entry for entry in getattr(flags, "rewards", None) or []]
    if stage in ("ppo", "grpo") and not names:
        names = [flags.reward_fn or flags.reward_model or ""]
    return [name for name in names if ".py:" not in name]


def describe_run(stage: str, script: Any, flags: Any, plan: PlanArgs) -> Run:
    """Roles, precision and lengths from the flags, as the script would settle them."""
    from peft import LoraConfig

    for name, value in vars(flags).items():
        script.check(name not in script.ABOVE_ZERO or value is None or value > 0, f"--{name} {value}: must be above 0")
    g, bare, gpu = getattr(flags, "samples_per_prompt", 1), flags.model.endswith(".json"), plan.gpu_gb != 0
    script.check(flags.batch_size % g == 0, f"--batch_size {flags.batch_size}: no multiple of --samples_per_prompt {g}")
    script.check(flags.lora_r != 0 or stage == "sft", "--lora_r 0 trains all weights: in sft.py only")
    somewhere = bare or Path(flags.model).is_dir() or not flags.model.startswith((".", "/", "runs"))
    script.check(somewhere, f"--model {flags.model}: no such folder")
    if stage in ("dpo", "grpo"):
        script.settle_loss(flags) if stage == "dpo" else script.settle_method(flags, 1)
    with mock.patch("torch.cuda.is_bf16_supported", lambda *_: True):
        script.settle_precision(flags, torch.device("cuda" if gpu else "cpu"))
    base, is_adapter = (flags.model, False) if bare else script.find_base(flags.model)
    config, start = read_config(base, flags), LoraConfig.from_pretrained(flags.model) if is_adapter else None
    roles: dict[str, Any] = {"reward" if stage == "reward" else "policy": start}
    trained, heads, others = [*roles], [config.hidden_size] * (stage == "reward"), []
    if stage in ("ppo", "dpo", "grpo") and (is_adapter or bare or getattr(flags, "sync_ref_every", 0)):
        roles["reference"] = start
    for k, source in enumerate(reward_sources(stage, flags)):
        own, adapted = script.find_base(source) if source else (base, False)
        others += [] if own == base else [read_config(own, flags)]
        if own == base:
            roles[f"reward_{k}" if k else "reward"] = LoraConfig.from_pretrained(source) if adapted else start
        heads.append(config.hidden_size)
    if stage == "ppo":
        roles["critic"] = roles.get("reward", start)
        trained.append("critic")
        heads.append(config.hidden_size + 1)
    if flags.lora_r == 0:
        roles, trained = {}, []
    prompt, response = plan.prompt_length or flags.max_prompt_length, plan.response_length or flags.max_response_length
    script.check(min(prompt, response) > 0, "--prompt_length and --response_length: must be above 0")
    dtype, plain = getattr(torch, flags.dtype), config.model_type in script.FLAT_ROW_MODELS
    return Run(script, stage, flags, config, gpu, roles, trained, heads, others, prompt, response, dtype, plain, g)


# ------------------------------------------------------------------------------------------------- the meta model
def build_base(config: Any, n_layers: int, quant: str, dtype: torch.dtype) -> Any:
    """The base model with its first `n_layers` layers, on the meta device, quantised as load_base would."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n_layers]
    try:
        with META:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except (ValueError, TypeError) as error:
        raise UserError(f"{config.model_type}: no causal language model ({str(error).splitlines()[0]})") from error
    if quant == "nf4":
        quantise(model, dtype)
    for module in [*model.modules(), model.config]:  # as load_base
        for name in [n for n, x in vars(module).items() if isinstance(x, float) and ("drop" in n or n == "p")]:
            setattr(module, name, 0.0)
    return model


def quantise(model: Any, dtype: torch.dtype) -> None:
    """Linear layers but lm_head in NF4 with double quantisation, as meta tensors of bitsandbytes' own shapes."""
    import bitsandbytes
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )  # fmt: skip
    replace_with_bnb_linear(model, ["lm_head", "score"], settings)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = torch.empty(module.out_features, module.in_features, dtype=dtype, device=META)
            with mock.patch.dict(bitsandbytes.functional.name2qmap):  # else it keeps a table on the meta device
                packed, state = bitsandbytes.functional.quantize_4bit(weight, None, None, 64, True, "nf4")
            module.weight = bitsandbytes.nn.Params4bit(packed, False, state, quant_type="nf4", bnb_quantized=True)
            module.support_avx512bf16_for_cpu = False
            if module.bias is not None:
                module.bias.data = module.bias.data.to(dtype)
    model.is_loaded_in_4bit = model.is_quantized = True  # PEFT asks for them


@functools.cache
def build_model(run: Run, n_layers: int) -> Any:
    """Base and adapters of all roles, on the meta device."""
    model = build_base(run.config, n_layers, run.flags.quant, run.dtype)
    model.own_attention = model.config._attn_implementation
    if run.flags.gradient_checkpointing:
        again = {"context_fn": lambda: (nullcontext(), autocast(run))}  # where backward computes a layer again
        model.gradient_checkpointing_enable({"use_reentrant": False, **again})
    for name, settings in run.roles.items():
        flags = copy.copy(run.flags)
        if settings:
            flags.lora_r, flags.lora_target_modules = settings.r, settings.target_modules
        with META:
            model = run.script.add_adapter(model, name, None, flags).to(META)
    return model


@contextmanager
def autocast(run: Run) -> Iterator[None]:
    """The context in which hidden_states runs the model; PEFT asks for it before it casts what LoRA multiplies."""
    half = run.gpu and run.dtype == torch.bfloat16
    with Autocast() if half else nullcontext(), mock.patch("torch.is_autocast_enabled", lambda *of: half and not of):
        yield


def by_depth(run: Run, measure: Callable[[int], Bytes]) -> Bytes:
    """measure(n_layers) at the model's depth, from two depths: what a layer (or a pair, where kinds alternate) adds."""
    depth, period = run.config.num_hidden_layers, len(set(getattr(run.config, "layer_types", None) or [0]))
    if depth <= 2 + period:
        return measure(depth)
    few, more = measure(2), measure(2 + period)
    return Counter({k: round(few[k] + (more[k] - few[k]) / period * (depth - 2)) for k in {*few, *more}})


def weight_bytes(model: Any) -> Bytes:
    """Bytes of a base's parts: 4-bit weights, both levels of absmax, what is not quantised; tied weights once."""
    sizes: Bytes = Counter()
    ends = {id(model.get_output_embeddings().weight): "lm_head", id(model.get_input_embeddings().weight): "embeddings"}
    for p in [*model.parameters(), *model.buffers()]:
        name = "experts, not in 4 bits" if p.ndim == 3 else "matrices" if p.ndim > 1 else "norms, biases, other"
        if state := getattr(p, "quant_state", None):
            parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            sizes["absmax, both levels"] += sum(x.nbytes for x in parts)
            name = "4-bit weights"
        sizes[ends.get(id(p), name)] += p.nbytes
    return sizes


def optimizer_bytes(p: Tensor, gpu: bool) -> int:
    """Two moments: 8 bits each with a float per 256 (bitsandbytes, from 4,096 values on), else floats; CPU: AdamW."""
    n = p.numel()
    return 2 * (n + 4 * math.ceil(n / 256)) if gpu and n >= 4096 else 2 * n * (4 if gpu else p.element_size())


@functools.cache
def fixed_bytes(run: Run) -> dict[str, Bytes]:
    """What lies in memory throughout: parts of the base, adapters by role, optimizers and gradients by trained role."""

    def base(config: Any) -> Bytes:
        other = replace(run, config=config)
        return by_depth(other, lambda n: weight_bytes(build_base(config, n, run.flags.quant, run.dtype)))

    def by_role(size: Callable[[Tensor], int], names: Any) -> Bytes:
        def of_roles(n_layers: int) -> Bytes:
            named = [*build_model(run, n_layers).named_parameters()]
            every = {"all weights": sum(size(p) for _, p in named)}  # --lora_r 0
            return Counter({r: sum(size(p) for k, p in named if f".{r}." in k) for r in names} if run.roles else every)

        return by_depth(run, of_roles)

    weights = base(run.config)
    weights["reward models of their own"] += sum(base(config).total() for config in run.others)
    return {
        "weights": weights, "adapters": by_role(lambda p: p.nbytes if run.roles else 0, run.roles),
        "gradients": by_role(lambda p: p.nbytes, run.trained),
        "optimizer": by_role(lambda p: optimizer_bytes(p, run.gpu), run.trained),
        "heads": Counter({"heads": 4 * sum(run.heads)}),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- passes
class Size(NamedTuple):
    """One flat row of N tokens with n supervised ones, in k responses."""

    tokens: int
    supervised: int
    responses: int


def zeros(*size: int) -> Tensor:
    """Token ids of a size, on the meta device."""
    return torch.zeros(size, dtype=torch.long, device=META)


@contextmanager
def traced(run: Run, **functions: Any) -> Iterator[Tracker]:
    """A tracker at work, with fused attention, and the script's functions replaced by those given."""
    from transformers import AttentionInterface

    tracker = Tracker()
    functions["attention_mask"] = tracker.tagged("attention mask", run.script.attention_mask)
    with (
        warnings.catch_warnings(action="ignore"),
        mock.patch.object(functional, "scaled_dot_product_attention", fused_attention),
        mock.patch("torch.autocast", lambda *_, **__: nullcontext()),  # it knows no meta device
        mock.patch.dict(AttentionInterface._global_mapping, flex_attention=flex_attention),
        mock.patch.multiple(run.script, **functions),
        tracker,
    ):
        yield tracker


@functools.cache
def trace_pass(run: Run, size: Size, flex: bool, who: str, kind: str, n_layers: int) -> tuple[Bytes, Bytes, Bytes]:
    """One row in the role `who`, of kind score (without gradients), detached or update; critic and reward have heads.

    -> peaks of the backbone's forward pass, of the logits, of backward. update is as from the second row on: gradients
    are there already, and up to backward what the loss before still holds: checkpointing keeps its mask.
    """
    model, script, flags, grad = build_model(run, n_layers), run.script, run.flags, kind != "score"
    model.set_attn_implementation("flex_attention" if flex else model.own_attention)
    forward, head, peaks = script.hidden_states, nn.Linear(run.config.hidden_size, 1, device=META), []
    left: Bytes = Counter()

    def hidden_states(*given: Any) -> Tensor:
        with autocast(run):
            states = forward(*given)
        peaks.append(tracker.take_peak())
        tracker.tag = "logits"
        return states

    cells, targets = [zeros(size.tokens) for _ in range(4)], [zeros(size.supervised) for _ in range(4)]
    row = script.Row(*cells, *targets[:2], tuple(targets[2:]), zeros(size.responses), [*range(size.responses)])
    with script.role(model, who, grad):
        for p in [*model.parameters(), *head.parameters()]:  # gradients are counted elsewhere
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        with traced(run, hidden_states=hidden_states) as tracker:
            if who.startswith(("critic", "reward")):
                where = row.before if who == "critic" else row.last
                values = [head(script.hidden_states(model, row).index_select(0, where).float())]
            else:
                with_entropy = kind == "update" and getattr(flags, "entropy_coef", 0) != 0
                values = script.token_logprobs(model, row, 1.0, with_entropy, kind == "detached")
            loss = sum(x.sum() for x in values if x.requires_grad)
            logits = tracker.take_peak()
            if kind == "update":
                tracker.tagged("backward", loss.backward)()
                left = Counter(tracker.live)
    model.zero_grad()
    return peaks[0] + left, logits + left, tracker.peak


class Enough(Exception):
    """Ends a traced sampling after some steps."""


@functools.cache
def trace_sampling(run: Run, n_prompts: int, g: int, n_layers: int) -> tuple[Bytes, Bytes]:
    """(prefill, decode) of the script's `sample`, n_prompts x g responses. A CUDA graph keeps the peak of a step while
    it lives, which PyTorch's figures leave out."""
    model, script = build_model(run, n_layers), run.script
    model.set_attn_implementation(model.own_attention)
    capture, peaks = script.capture_step, []

    class Layer(script.RoomyLayer):  # type: ignore[misc, name-defined]
        """Knows how many columns are filled, and is counted as cache."""

        def lazy_initialization(self, *given: Any) -> None:
            tracker.tagged("KV cache", super().lazy_initialization)(*given)
            self.cumulative_length = torch.tensor(0)

    def capture_step(*given: Any) -> Callable:
        peaks.append(tracker.take_peak())
        before, step, calls = tracker.peak.total(), capture(*given), iter(range(2))
        step(zeros(n_prompts, g), zeros(n_prompts, g))
        graph = tracker.peak.total() - before

        def next_step(*now: Any) -> Tensor:
            if next(calls, None) is None:
                raise Enough
            tracker.live["CUDA graph"] = graph if run.gpu else 0
            logits, tracker.tag = step(*now), "logits"
            return logits

        return next_step

    prompts, names, key = [[0] * run.prompt] * n_prompts, [*range(n_prompts)], (0, 0, 0)
    with script.role(model, "policy"), traced(run, RoomyLayer=Layer, capture_step=capture_step) as tracker:
        with suppress(Enough):
            script.sample(model, prompts, names, g, run.response, 1.0, [0], n_prompts * g, key, static=True)
    return peaks[0], tracker.peak


@functools.cache
def trace_generate(run: Run, n: int, n_layers: int) -> tuple[Bytes, Bytes]:
    """(prefill, decode) of n responses by transformers' generate, or by `sample` where responses share no row."""
    from transformers import DynamicCache

    adapted = build_model(run, n_layers)
    adapted.set_attn_implementation(adapted.own_attention)
    model = adapted.get_base_model() if run.roles else adapted
    cache: Any = DynamicCache(config=model.config)

    def forward(new: int, columns: int) -> Bytes:
        ids, real = zeros(n, new), zeros(n, columns)
        given: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        logits = model(input_ids=ids, attention_mask=real, position_ids=ids, **given).logits
        logits.float().log_softmax(-1).double().exp_().cumsum_(-1)
        return tracker.take_peak()

    with run.script.role(adapted, "policy"), traced(run) as tracker:
        cache.update = tracker.tagged("KV cache", cache.update)
        prefill, last = forward(run.prompt, run.prompt), run.prompt + run.response - 1
        for layer in [layer for layer in cache.layers if hasattr(layer, "keys")]:  # linear attention keeps no keys
            window = getattr(layer, "sliding_window", None)
            size = [n, layer.keys.shape[1], min(last, window - 1) if window else last, layer.keys.shape[3]]
            make, layer.cumulative_length = tracker.tagged("KV cache", layer.keys.new_zeros), last
            layer.keys, layer.values = make(size), make([*size[:3], layer.values.shape[3]])
        tracker.take_peak()
        return prefill, forward(1, last + 1)


# ---------------------------------------------------------------------------------------------------------- phases
def finish(run: Run, phases: dict[str, Bytes]) -> dict[str, Bytes]:
    """Each phase with what lies in memory throughout; optimizer states come with the first update and stay."""
    fixed = Counter({name: fixed_bytes(run)[name].total() for name in FIXED})
    return {name: fixed + parts for name, parts in phases.items()}


@functools.cache
def sampling_phases(run: Run, n: int) -> dict[str, Bytes]:
    """Prefill and decode of n responses: a rollout's, and the evaluation's, where every prompt has one response."""
    jobs: dict[str, tuple] = {"rollout": (min(max(1, n // run.g), run.flags.batch_size // run.g), run.g)}
    jobs["evaluation"] = (n, 1)
    shared = not getattr(run.config, "sliding_window", None)
    if run.stage not in ("ppo", "grpo"):
        n = {"sft": 8, "reward": 0}.get(run.stage, min(16, getattr(run.flags, "eval_samples", 0)))
        jobs, shared = {"samples": (n, 1)} if n else {}, False
    shared = shared and run.config.model_type in run.script.SIDE_BY_SIDE_MODELS
    phases = {}
    for (name, (rows, g)), (k, part) in product(jobs.items(), enumerate(("prefill", "decode"))):
        trace = partial(trace_sampling, run, rows, g) if shared else partial(trace_generate, run, rows * g)
        phases[f"{name}: {part}"] = by_depth(run, lambda depth, trace=trace, k=k: trace(depth)[k])  # type: ignore[misc]
    return finish(run, phases)


def row_size(run: Run, limit: int, k: int, n_groups: int) -> Size:
    """The fullest row of up to `limit` tokens: prompts with k responses, or shorter ones in their proportions. Where
    prompts share no row: one response, or the two that a loss of pairs needs."""
    pair = 2 if run.stage in ("reward", "dpo") and k > 1 else 1
    group = [run.prompt + k * run.response, k * run.response, k]
    if not run.plain:
        group, limit = [pair * (run.prompt + run.response), pair * run.response, 1], 0
    share = max(1.0, min(limit / group[0], n_groups))
    return Size(*(math.ceil(part * share) for part in group))


def uses_flex(run: Run, limit: int) -> bool:
    """Whether load_base chooses FlexAttention for rows of up to `limit` tokens."""
    return run.gpu and limit >= 2048 and run.plain and build_base(run.config, 1, "none", run.dtype)._supports_flex_attn


@functools.cache
def training_phases(run: Run, limit: int) -> dict[str, Bytes]:
    """Score passes and updates, which depend on --tokens_per_batch."""
    flags, phases, flex, rl = run.flags, {}, uses_flex(run, limit), run.stage in ("ppo", "grpo")
    labels, trained = run.stage == "dpo" and run.script.LOSSES[flags.loss].data == "labels", run.trained or ["policy"]
    k = run.g if rl else 1 if run.stage == "sft" or labels else 2
    row = row_size(run, limit, k, flags.batch_size // run.g // getattr(flags, "minibatches", 1))
    full, alone = row_size(run, limit, k, 10**9), row_size(run, limit, 1, 10**9)
    n, whole = flags.batch_size // run.g, row_size(run, 0, k, 1)
    held = 32 * n * (whole.tokens + whole.supervised)  # a batch's rows: four integers a token, four a target
    held += 40 * flags.batch_size * run.response if rl else 0  # log-probs, values, rewards ...: ten floats a token
    judges = [name for name in run.roles if name.startswith(("critic", "reward"))]
    jobs = [("evaluation", trained[0], "score", full)]
    if run.stage == "dpo" and run.script.LOSSES[flags.loss].reference:
        jobs = [("reference's log-probs", "reference", "score", full), *jobs]
    if rl:
        jobs = [("evaluation: log-probs", "policy", "detached", alone), ("scores: policy", "policy", "detached", row)]
        jobs += [("scores: reference", "reference", "score", row)]
        jobs += [(f"scores: {', '.join(judges)}", judges[0], "score", row)] if judges else []
    jobs += [(f"update: {who}", who, "update", row) for who in trained]
    for name, who, kind, size in jobs:  # what holds the peak at two layers may not at all of them
        trace = partial(trace_pass, run, size, flex, who, kind)
        peaks = [by_depth(run, lambda depth, trace=trace, k=k: trace(depth)[k]) for k in (0, 1, 2)]  # type: ignore[misc]
        phases[name] = max(peaks, key=Counter.total) + Counter({"token rows": held})
        if kind == "update":
            phases[name]["gradients"] += fixed_bytes(run)["gradients"][who if run.trained else "all weights"]
    return finish(run, phases)


# ------------------------------------------------------------------------------------------------------- the answer
def needed(run: Run, phases: dict[str, Bytes]) -> int:
    """Bytes of a card that the largest phase needs, with the two allowances."""
    most = max(parts.total() for parts in phases.values()) if phases else 0
    return round(most * (1 + FRAGMENTATION) + CONTEXT) if run.gpu else most


def choose(run: Run, gib: float, asked: int) -> tuple[str | None, int | None]:
    """(flags, bytes) of the largest sizes that fit a card; (None, None): nothing fits."""
    samples = [asked, *(2**k for k in reversed(range(10)) if 2**k < asked)]
    sampling = [(n, size) for n in samples if (size := needed(run, sampling_phases(run, n))) <= gib * GIB]
    training = [(n, size) for n in ROWS if (size := needed(run, training_phases(run, n))) <= gib * GIB]
    if not sampling or not training:
        return None, None
    return flags_text(training[0][0], sampling[0][0]), max(training[0][1], sampling[0][1])


def flags_text(tokens: int, samples: int) -> str:
    """As on the command line; sft, reward and dpo have no sampler."""
    return f"--tokens_per_batch {tokens}" + (f" --sample_batch_size {samples}" if samples else "")


def report(run: Run, plan: PlanArgs) -> dict[str, Any]:
    """The plan as JSON."""
    flags, config, samples = run.flags, run.config, getattr(run.flags, "sample_batch_size", 0)
    phases = sampling_phases(run, samples) | training_phases(run, flags.tokens_per_batch)
    worst, most, cards = max(phases, key=lambda name: phases[name].total()), needed(run, phases), []
    for gib in sorted({*CARDS, plan.gpu_gb or CARDS[0]}) if run.gpu else []:
        text, size = choose(run, gib, samples)
        cards.append({"gib": gib, "fits_as_asked": most <= gib * GIB, "flags": text, "needed": size})
    return {
        "stage": run.stage, "model_type": config.model_type, "layers": config.num_hidden_layers, "quant": flags.quant,
        "dtype": flags.dtype, "gpu": run.gpu, "flags": flags_text(flags.tokens_per_batch, samples),
        "attention": "FlexAttention" if uses_flex(run, flags.tokens_per_batch) else "dense masks",
        "gradient_checkpointing": flags.gradient_checkpointing, "batch_size": flags.batch_size,
        "prompt_length": run.prompt, "response_length": run.response, "cards": cards,
        "fixed": {name: dict(parts) for name, parts in fixed_bytes(run).items()},
        "phases": {name: {**parts, "total": parts.total()} for name, parts in phases.items()},
        "peak": {"phase": worst, "bytes": phases[worst].total(), "needed": most},
        "allowances": {"context": CONTEXT, "fragmentation": FRAGMENTATION} if run.gpu else {},
    }  # fmt: skip


def gib_text(n: float) -> str:
    """Bytes as GiB, or MiB where that says more."""
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / 2**20:.1f} MiB"


def show(plan: dict[str, Any]) -> None:
    """Print the plan: what is fixed, the peak of every phase, cards."""

    def line(name: str, parts: dict[str, int]) -> None:
        total, ordered = sum(parts.values()), sorted(parts.items(), key=lambda item: -item[1])
        text = ", ".join(f"{part} {gib_text(n)}" for part, n in ordered if n > total / 999)
        print(f"{name:<24}{gib_text(total):>11}   {text}")

    peak, device = plan["peak"], "GPU" if plan["gpu"] else "CPU"
    print("plan: {stage}, {model_type} of {layers} layers, {quant}, {dtype}, {attention};".format(**plan), device)
    print("every prompt as if of {prompt_length} tokens, every response of {response_length}".format(**plan))
    print("flags: --batch_size {batch_size} {flags}".format(**plan), end=" ")
    print(f"--gradient_checkpointing {plan['gradient_checkpointing']}\n\nthroughout; gradients only during updates")
    for name, parts in plan["fixed"].items():
        line(name, parts)
    print("\nphases, each at its peak")
    for name, parts in plan["phases"].items():
        rest = {part: n for part, n in parts.items() if part not in (*FIXED, "total")}
        line(name, {"fixed": parts["total"] - sum(rest.values()), **rest})
    print(f"\npeak: {gib_text(peak['bytes'])} in {peak['phase']}")
    if plan["gpu"]:
        print(f"on a card: {gib_text(peak['needed'])}, with {gib_text(CONTEXT)} for the CUDA context and "
              f"{FRAGMENTATION:.0%} for fragmentation (both are allowances, not measurements)\n\n"
              "card     as asked   flags that fit")  # fmt: skip
    for card in plan["cards"]:
        text = f"{card['flags']}   ({gib_text(card['needed'])})" if card["flags"] else "none: choose a smaller model"
        print(f"{card['gib']:>4g} GiB {'fits' if card['fits_as_asked'] else 'too big':>9}   {text}")


def make_plan(argv: list[str]) -> tuple[dict[str, Any], PlanArgs]:
    """The plan of a command line."""
    from transformers import HfArgumentParser
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not argv or argv[0] not in STAGES:
        raise UserError(f"the first word is the stage: {', '.join(STAGES)}; then the flags of that script")
    script = load_script(argv[0])
    kinds: Any = [script.Args, PlanArgs]
    parser = HfArgumentParser(kinds, prog=f"plan.py {argv[0]}", description=__doc__, allow_abbrev=False)
    try:
        flags, plan = parser.parse_args_into_dataclasses(argv[1:], look_for_args_file=False)
        if Path(flags.model).resolve().parent == script.TINY:
            parser.set_defaults(**script.TINY_SETTINGS)
            flags, plan = parser.parse_args_into_dataclasses(argv[1:], look_for_args_file=False)
        return report(describe_run(argv[0], script, flags, plan), plan), plan
    except (ValueError, script.UserError) as error:
        raise UserError(str(error).splitlines()[0]) from error


def main(argv: list[str]) -> None:
    """Print the plan and write it where --output says."""
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nThe flags of a stage: python tools/plan.py STAGE --help")
        return
    plan, args = make_plan(argv)
    show(plan)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"plan.py: {error}")
