"""How much memory a run takes, before it is started: no weights are loaded, no GPU is needed.

    python tools/plan.py ppo --model runs/sft --batch_size 16 --micro_batch_size 4 --max_response_length 512
    python tools/plan.py dpo --model ckpt/config.json --quant nf4 --gpu_gb 24
    python tools/plan.py sft --model tiny/base --gpu_gb 0        # on a CPU

The first word is the stage (sft, reward, ppo, dpo, grpo), the rest are the flags of that script. --model is a folder
with config.json, a run folder, a hub id, or a bare config.json (then the roles are those of a run folder).

The model is built on PyTorch's meta device, where tensors have shapes but no bytes, with two layers and with three.
Each phase (prefill, decode, score passes, updates) runs there, forward and backward, through the script's functions
and the libraries' modules, while a tracker adds up the storages that live; what the third layer added is multiplied.
So the sizes come from the code that will run, not from a table of models, and no constant in them was fitted.
Every prompt and response of a batch counts as long as the longest; padded rows get the mask that padding needs (where
all rows happen to have one length there is none, and keys and values are not repeated: the plan is then too high).

On a GPU there is more, which nobody can see from here: the CUDA context, fragmentation, workspaces of kernels. The two
allowances for it, CONTEXT and FRAGMENTATION, are estimates and printed as such. Also left out: how many weights the
loader of transformers holds at once before it makes them 4-bit, and the texts that sft.py samples at its end.
"""

import copy
import functools
import importlib.util
import json
import math
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]  # where the scripts are
STAGES = ("sft", "reward", "ppo", "dpo", "grpo")
CARDS = (8.0, 10.0, 12.0, 16.0, 24.0)
GIB = 2**30
CONTEXT = 0.5 * GIB  # CUDA context, cuBLAS workspaces, loaded kernels: an allowance, not in PyTorch's own figures
FRAGMENTATION = 0.06  # share of a phase's bytes that the allocator can't use: an allowance; sizes differ at every step
META, CPU = torch.device("meta"), torch.device("cpu")
TAGS = ("weights", "adapters", "heads", "optimizer", "gradients", "token rows", "KV cache", "attention mask",
        "activations", "logits", "dequantised weight", "backward")  # fmt: skip
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
    Where code asks for a value, it is one of whether a mask has no padding: `padded` says.
    """

    def __init__(self, padded: bool) -> None:
        super().__init__()
        self.padded = padded
        self.live: Bytes = Counter()
        self.peak: Bytes = Counter()
        self.tag = "activations"
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            with self:
                return multiply_4bit(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            return not self.padded
        output = func(*args, **(kwargs or {}))
        tag = "dequantised weight" if func.namespace == "bitsandbytes" else self.tag
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
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

    @contextmanager
    def tagged(self, tag: str) -> Iterator[None]:
        """Tensors made inside belong to this category."""
        before, self.tag = self.tag, tag
        try:
            yield
        finally:
            self.tag = before


def multiply_4bit(
    a: Tensor, b: Tensor, shape: Any, absmax: Tensor, blocksize: int, kind: str, bias: Any = None,
    absmax_8bit: Any = None, absmax_code: Any = None, absmax_offset: Any = None,
) -> Tensor:  # fmt: skip
    """a (M, K) times the 4-bit weight (N, K), as bitsandbytes' fallback does it: through the whole weight."""
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        absmax = ops.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    return functional.linear(a, ops.dequantize_4bit(b, absmax, blocksize, kind, shape, a.dtype), bias)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """scaled_dot_product_attention as CPUs and GPUs run it; on the meta device PyTorch would keep every score.

    A fused kernel keeps its inputs, its output and a float per query and head; a boolean mask becomes a float one.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, torch.zeros((), dtype=query.dtype, device=META), -math.inf).to(query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


# ------------------------------------------------------------------------------------------------------- the run
def load_script(stage: str) -> ModuleType:
    """The script of a stage, by its path."""
    path = ROOT / f"{stage}.py"
    if not path.is_file():
        raise UserError(f"{path} is not there; the flags and functions come from the scripts beside tools/")
    spec = importlib.util.spec_from_file_location(f"planned_{stage}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_config(source: str, args: Any) -> Any:
    """The configuration of a base model: a folder, a hub id or a config.json."""
    from transformers import AutoConfig

    try:
        if source.endswith(".json"):
            settings = json.loads(Path(source).read_text(encoding="utf-8"))
            return AutoConfig.for_model(**settings)
        return AutoConfig.from_pretrained(source, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--model {source}: no configuration of a model there ({reason})") from error


@dataclass(frozen=True, eq=False)  # compared by identity: traces are kept per run
class Run:
    """All that decides a run's memory; `flags` is the script's own Args."""

    script: ModuleType
    stage: str
    flags: Any
    config: Any
    gpu: bool
    quant: str
    dtype: torch.dtype
    roles: dict[str, Any]  # adapter -> its rank and layers (an adapter_config.json, or None: as the flags say)
    trained: tuple[str, ...]
    heads: tuple[int, ...]  # sizes of the scalar heads
    others: tuple[Any, ...]  # configurations of reward models on another base
    prompt: int
    response: int


def settle_flags(script: ModuleType, stage: str, flags: Any) -> None:
    """What the script itself derives from its flags, where memory depends on it."""
    if stage == "grpo":
        for name, value in script.METHODS[flags.method]._asdict().items():
            if getattr(flags, name) is None:
                setattr(flags, name, value)
    for name in ("batch_size", "micro_batch_size", "sample_batch_size", "samples_per_prompt", "minibatches"):
        if getattr(flags, name, 1) < 1:
            raise UserError(f"--{name} {getattr(flags, name)}: must be above 0")
    if flags.tokens_per_micro_batch < 0:
        raise UserError(f"--tokens_per_micro_batch {flags.tokens_per_micro_batch}: must not be below 0")
    if flags.lora_r == 0 and (stage != "sft" or flags.quant == "nf4"):
        raise UserError("--lora_r 0 trains all weights: in sft.py only, and not with --quant nf4")
    sampling = stage in ("ppo", "grpo") or getattr(flags, "online", False)
    if sampling and flags.batch_size % flags.samples_per_prompt:
        raise UserError(f"--batch_size {flags.batch_size}: no multiple of --samples_per_prompt")


def choose_precision(flags: Any, adapter: Path | None, gpu: bool) -> tuple[str, torch.dtype]:
    """(quant, dtype) with "auto" resolved as the scripts do, for a GPU that computes in bfloat16."""
    file = adapter / "args.json" if adapter else None
    recorded = json.loads(file.read_text()).get("quant") if file and file.is_file() else None
    quant = flags.quant if flags.quant != "auto" else recorded or ("nf4" if gpu else "none")
    half = quant == "nf4" or gpu
    if flags.lora_r == 0:
        quant, half = "none", False
    return quant, getattr(torch, flags.dtype if flags.dtype != "auto" else "bfloat16" if half else "float32")


def reward_sources(stage: str, flags: Any) -> list[str]:
    """The reward models of a run: folders, hub ids, or "" for one that is not named."""
    if stage == "grpo" and flags.rewards:
        names = [entry.rpartition("=")[0] or entry for entry in flags.rewards]
        return [name for name in names if ".py:" not in name]
    if stage in ("sft", "reward") or getattr(flags, "reward_fn", None):
        return []
    asked = flags.reward_model or ("" if stage == "ppo" or getattr(flags, "online", False) else None)
    return [] if asked is None else [asked]


def describe_run(stage: str, script: ModuleType, flags: Any, plan: PlanArgs) -> Run:
    """Roles, precision and lengths from the flags, as the script would settle them."""
    settle_flags(script, stage, flags)
    bare = flags.model.endswith(".json")
    if not bare and not Path(flags.model).is_dir() and flags.model.startswith((".", "/", "runs")):
        raise UserError(f"--model {flags.model}: no such folder")
    adapter = None if bare else script.find_adapter(flags.model, flags.revision)
    base = script.find_base(adapter) if adapter else flags.model
    config = read_config(base, flags)
    gpu = plan.gpu_gb is None or plan.gpu_gb > 0
    quant, dtype = choose_precision(flags, adapter, gpu)
    start = json.loads((adapter / "adapter_config.json").read_text()) if adapter else None
    roles: dict[str, Any] = {"reward" if stage == "reward" else "policy": start}
    trained, heads, others = [*roles], [config.hidden_size] * (stage == "reward"), []
    if stage in ("ppo", "dpo", "grpo") and (adapter or bare or getattr(flags, "sync_ref_every", 0)):
        roles["reference"] = start
    for k, source in enumerate(reward_sources(stage, flags)):
        folder = script.find_adapter(source, None) if source and Path(source).is_dir() else None
        own = script.find_base(folder) if folder else source
        if source and Path(own).is_dir() and Path(own).resolve() != Path(base).resolve():
            others.append(read_config(own, flags))
        else:
            settings = json.loads((folder / "adapter_config.json").read_text()) if folder else start
            roles["reward" if k == 0 else f"reward_{k}"] = settings
        heads.append(config.hidden_size)
    if stage == "ppo" or getattr(flags, "loss", "") == "dro":
        roles["critic"] = roles.get("reward", start)
        trained.append("critic")
        heads.append(config.hidden_size + 1)
    if flags.lora_r == 0:
        roles, trained = {}, []
    lengths = [plan.prompt_length or flags.max_prompt_length, plan.response_length or flags.max_response_length]
    if min(lengths) < 1:
        raise UserError("--prompt_length and --response_length must be above 0")
    return Run(
        script, stage, flags, config, gpu, quant, dtype, roles, tuple(trained), tuple(heads), tuple(others), *lengths
    )


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
            packed, state = bitsandbytes.functional.quantize_4bit(
                weight, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            module.weight = bitsandbytes.nn.Params4bit(
                packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True
            )
            module.support_avx512bf16_for_cpu = False
            if module.bias is not None:
                module.bias.data = module.bias.data.to(dtype)
    model.is_loaded_in_4bit = model.is_quantized = True  # PEFT asks for them


@functools.cache
def build_model(run: Run, n_layers: int, checkpointing: bool) -> Any:
    """Base and adapters of all roles, on the meta device."""
    model = build_base(run.config, n_layers, run.quant, run.dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run.script.no_dropout(model)
    for name, settings in run.roles.items():
        flags = copy.copy(run.flags)
        if settings:
            flags.lora_r, flags.lora_target_modules = settings["r"], settings["target_modules"]
            flags.lora_alpha = settings["lora_alpha"]
        with META:
            model = run.script.add_adapter(model, name, None, flags).to(META)
    return model


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
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for p in [*model.parameters(), *model.buffers()]:
        state = getattr(p, "quant_state", None)
        if state:
            inner = state.state2
            parts = (state.absmax, state.code, state.offset, inner.absmax, inner.code)
            sizes["absmax, both levels"] += sum(x.nbytes for x in parts)
        name = "4-bit weights" if state else "matrices" if p.ndim > 1 else "norms, biases, other"
        sizes["embeddings" if p is embedding else "lm_head" if p is head else name] += p.nbytes
    return sizes


@functools.cache
def weight_in_transit(run: Run) -> int:
    """Bytes, in the run's dtype, of the largest weight that is converted after it is read: to 4 bits, or a cast."""
    model = build_base(run.config, 1, "none", run.dtype)
    linear = [m.weight.nbytes for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    return max(linear) if run.quant == "nf4" else max(p.nbytes for p in model.parameters())


def optimizer_bytes(p: Tensor, gpu: bool) -> int:
    """Two moments: 8 bits each with a float per 256 (bitsandbytes, from 4,096 values on), else floats; CPU: AdamW."""
    n = p.numel()
    return 2 * (n + 4 * math.ceil(n / 256)) if gpu and n >= 4096 else 2 * n * (4 if gpu else p.element_size())


@functools.cache
def fixed_bytes(run: Run) -> dict[str, Bytes]:
    """What lies in memory throughout: parts of the base, adapters by role, optimizers and gradients by trained role."""

    def parts(n_layers: int) -> Bytes:
        return weight_bytes(build_base(run.config, n_layers, run.quant, run.dtype))

    def of_roles(n_layers: int, size: Callable[[Tensor], int], names: tuple[str, ...]) -> Bytes:
        model = build_model(run, n_layers, False)
        if not run.roles:
            return Counter({"all weights": sum(map(size, model.parameters()))})
        named = {name: run.script.adapter_parameters(model, name) for name in names}
        return Counter({name: sum(map(size, parameters)) for name, parameters in named.items()})

    def by_role(size: Callable[[Tensor], int], names: tuple[str, ...]) -> Bytes:
        return by_depth(run, lambda n: of_roles(n, size, names))

    weights = by_depth(run, parts)
    for config in run.others:
        other = replace(run, config=config)
        extra = by_depth(other, lambda n, c=config: weight_bytes(build_base(c, n, run.quant, run.dtype)))  # type: ignore[misc]
        weights["reward model of its own"] += extra.total()
    adapters = by_role(lambda p: p.nbytes, tuple(run.roles)) if run.roles else Counter()
    gradients = by_role(lambda p: p.nbytes, run.trained)
    optimizer = by_role(lambda p: optimizer_bytes(p, run.gpu), run.trained)
    return {"weights": weights, "adapters": adapters, "gradients": gradients, "optimizer": optimizer,
            "heads": Counter({"heads": 4 * sum(run.heads)})}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- passes
class Shape(NamedTuple):
    """A forward pass: R rows of L columns with S responses of up to T tokens, n of which are supervised."""

    mixed: bool
    n_rows: int
    n_columns: int
    n_responses: int
    width: int
    n_tokens: int


def rows_shape(rows: Any) -> Shape:
    """The shape of a script's Rows."""
    (r, c), (s, t) = rows.input_ids.shape, rows.targets.shape
    return Shape(rows.mixed, r, c, s, t, int(rows.mask.sum()))


def row_bytes(rows: Any) -> int:
    """Bytes of a script's Rows."""
    return sum(x.nbytes for x in rows if isinstance(x, Tensor))


def tokens(n: int) -> list[int]:
    """Stand-ins for n token ids."""
    return [0] * n


def alone(run: Run, micro_batch_size: int, prompt: int, response: int) -> Any:
    """A micro-batch of padded rows, one response each."""
    size = replace(run.flags, micro_batch_size=micro_batch_size)
    order, width = range(micro_batch_size), prompt + response
    numbers = run.script.micro_batches(order, lambda some: len(some) * width, size)[0]
    return run.script.lay_out([(tokens(prompt), [tokens(response)])] * len(numbers), 0, 0, CPU)


def step_rows(run: Run, flags: Any) -> list[Any]:
    """The micro-batches of one step's largest pass over the data, laid out by the script itself, on the CPU."""
    script, prompt, response = run.script, tokens(run.prompt), tokens(run.response)
    if run.stage == "sft":  # the longest example sets the length of a row; others are filled with two halves each
        full = {"ids": prompt + response, "mask": prompt + [1] * run.response}
        half = {name: values[::2][: len(values) // 2] for name, values in full.items()}
        packing = flags.packing and run.config.model_type in script.SHARED_ROW_MODELS
        examples = [full] + [half] * (2 * flags.micro_batch_size) if packing else [full] * flags.micro_batch_size
        return list(script.pack_examples(examples, replace(flags, packing=packing), 0, CPU))
    if run.stage in ("ppo", "grpo"):
        groups = [(prompt, [response] * flags.samples_per_prompt)] * (flags.batch_size // flags.samples_per_prompt)
        n = flags.minibatches if run.stage == "ppo" else 1
        laid_out = script.lay_out_rollout(groups, n, flags, run.config, 0, CPU)
        return [rows for minibatch in laid_out for _, rows in minibatch]
    groups = [(prompt, [response] * 2)] * flags.micro_batch_size
    batches = [groups[: len(numbers)] for numbers in script.group_batches(groups, run.config, flags)]
    return [script.lay_out(some, script.row_width(some, run.config), 0, CPU) for some in batches]


def filled_rows(run: Run, flags: Any, prompt: int) -> Any:
    """As many examples of equal length as fill --tokens_per_micro_batch to its bound: whole ones leave room there."""
    most, responses = flags.tokens_per_micro_batch, 2 if run.stage in ("reward", "dpo") else 1
    whole = prompt + responses * run.response
    n = min(flags.micro_batch_size, most // whole + 1)
    size = min(whole, most // n)
    response = max(1, run.response * size // whole)
    prompt = max(1, size - responses * response)
    if run.stage == "sft":
        examples = [{"ids": tokens(prompt + response), "mask": tokens(prompt) + [1] * response}] * n
        return next(run.script.pack_examples(examples, flags, 0, CPU))
    groups = [(tokens(prompt), [tokens(response)] * responses)] * n
    if responses == 2:  # where rows are padded, fewer fit
        groups = groups[: len(run.script.group_batches(groups, run.config, flags)[0])]
    return run.script.lay_out(groups, run.script.row_width(groups, run.config), 0, CPU)


def training_rows(run: Run, micro_batch_size: int) -> list[Any]:
    """Micro-batches among which is the largest pass: a step's of the longest examples, and where their tokens are
    bounded others that reach the bound, also of examples that are nearly all response."""
    flags = replace(run.flags, micro_batch_size=micro_batch_size)
    free = step_rows(run, replace(flags, tokens_per_micro_batch=0))
    if not 0 < flags.tokens_per_micro_batch < max(rows.input_ids.numel() for rows in free):
        return free
    return [*step_rows(run, flags), *(filled_rows(run, flags, prompt) for prompt in (run.prompt, 1))]


def meta_rows(script: ModuleType, shape: Shape) -> Any:
    """Rows of a shape, on the meta device."""
    r, c, s, t = shape.n_rows, shape.n_columns, shape.n_responses, shape.width
    sizes = [(r, c)] * 4 + [(s, t)] * 3 + [(s,)]
    return script.Rows(shape.mixed, *(torch.zeros(size, dtype=torch.long, device=META) for size in sizes))


@contextmanager
def traced(padded: bool) -> Iterator[Tracker]:
    """A tracker at work, with fused attention."""
    attention = mock.patch.object(functional, "scaled_dot_product_attention", fused_attention)
    with warnings.catch_warnings(action="ignore"), attention, Tracker(padded) as tracker:
        yield tracker


class PassBytes(NamedTuple):
    """What a pass adds to memory: at its peak, and when the backbone's forward pass has ended."""

    peak: Bytes
    forward: Bytes


def hidden_states(run: Run, model: Any, rows: Any, tracker: Tracker) -> Tensor:
    """The script's own hidden_states; the mask of mixed rows is counted by itself."""
    make_mask = run.script.attention_mask

    def tagged_mask(*args: Any) -> Any:
        with tracker.tagged("attention mask"):
            return make_mask(*args)

    with mock.patch.object(run.script, "attention_mask", tagged_mask):
        return run.script.hidden_states(model, rows)


@functools.cache
def trace_pass(
    run: Run, shape: Shape, who: str, kind: str, n_layers: int, checkpointing: bool
) -> tuple[Bytes, Bytes, Bytes]:
    """One micro-batch in the role `who`, of kind score, score+grad or update; critic and reward have scalar heads.

    -> (peak of the backbone's forward pass, what lives after it, peak of what follows).

    update runs backward with gradients already there, as from the second micro-batch on.
    """
    model, script, grad = build_model(run, n_layers, checkpointing), run.script, kind != "score"
    role = script.role(model, who, grad) if run.roles else nullcontext(model.train(grad))
    rows, head = meta_rows(script, shape), nn.Linear(run.config.hidden_size, 1, device=META)
    parameters: list[Any] = [*model.parameters(), *head.parameters()]
    with role, torch.set_grad_enabled(grad):
        for p in parameters:  # gradients are counted elsewhere
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        with traced(shape.n_rows > 1) as tracker:
            states = hidden_states(run, model, rows, tracker).flatten(0, 1)
            before, forward, tracker.peak = tracker.peak, Counter(tracker.live), Counter()
            n = rows.last.shape[0] if who.startswith("reward") else shape.n_tokens
            where = torch.zeros(n, dtype=torch.long, device=META)
            with tracker.tagged("logits"):
                states = states.index_select(0, where)
                if kind == "score+grad":  # as response_logprobs where detached
                    states = states.detach()
                if who.startswith(("critic", "reward")):
                    loss = head(states.float()).sum()
                else:
                    size = script.logits_chunk(run.config)
                    with_entropy = bool(getattr(run.flags, "entropy_coef", 0.0))
                    causal_lm = model.get_base_model() if run.roles else model
                    weights = causal_lm.get_output_embeddings().parameters()
                    everything = with_entropy or any(p.requires_grad for p in weights)
                    values = script.chunked_logprobs(
                        lambda h: script.lm_logits(model, h), states, where, 1.0, size, everything
                    )
                    loss = sum(x.sum() for x in values if x.requires_grad)
            if kind == "update":
                del states
                with tracker.tagged("backward"):
                    loss.backward()
    for p in parameters:
        p.grad = None
    return before, forward, tracker.peak


@functools.cache
def trace_sampling(run: Run, n_prompts: int, g: int, n_layers: int) -> tuple[Bytes, Bytes]:
    """(prefill, decode) of the script's `sample`, n_prompts x g responses: at the prompts, and at the last tokens.

    Decoding is traced where the cache grows for the last time, or at the end where it never does.
    """
    from transformers import DynamicLayer

    model, script, n = build_model(run, n_layers, False), run.script, n_prompts * g
    causal_lm = model.get_base_model()
    body, shared = getattr(causal_lm, causal_lm.base_model_prefix), run.config.model_type in script.SHARED_ROW_MODELS
    rows, side = (n_prompts, g) if shared else (n, 1)

    def tagged(update: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with tracker.tagged("KV cache"):
                return update(*args, **kwargs)

        return call

    def step(cache: Any, keys: int) -> Tensor:
        ids, positions = (torch.zeros(rows, side, dtype=torch.long, device=META) for _ in range(2))
        mask: Any = torch.ones(rows, keys, dtype=torch.long, device=META)
        if shared:
            seen = torch.ones(rows, side, keys, dtype=torch.bool, device=META)
            columns = torch.zeros(rows, keys, dtype=torch.long, device=META)
            mask = script.additive_mask(seen, (positions, columns), run.config, run.dtype)
        given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        with script.grouped_heads():
            return body(input_ids=ids, **given).last_hidden_state.flatten(0, 1)

    room, full = run.prompt + 128, None  # as GrowingLayer: 128 columns to spare, whenever it is full
    for filled in range(run.prompt + side, run.prompt + run.response * side, side):
        if filled > room:
            full, room = (filled - side, room), filled + 128
    columns, room = full or (run.prompt + max(run.response - 4, 0) * side, room)
    with script.role(model, "policy"), torch.no_grad(), traced(n > 1) as tracker:
        with mock.patch.object(DynamicLayer, "update", tagged(DynamicLayer.update)):
            with mock.patch.object(script.GrowingLayer, "update", tagged(script.GrowingLayer.update)):
                decoding = script.start_decoding(body, [[0] * run.prompt] * n_prompts, [0] * n, g, shared)
                prefill, cache, state = tracker.peak, decoding.cache, decoding.state
                del decoding
                with tracker.tagged("KV cache"):
                    for x in cache.layers:
                        size = [rows, x.keys.shape[1], room if shared else columns, x.keys.shape[3]]
                        pair = [torch.empty(size, dtype=x.keys.dtype, device=META) for _ in range(2)]
                        if shared:
                            x.hold(columns, *pair)
                        else:
                            x.keys, x.values = pair
                        del pair
                tracker.peak = Counter(tracker.live)
                for t in (1, 2, 3):
                    with tracker.tagged("logits"):
                        logp = script.lm_logits(model, state).float().div_(1.0).log_softmax(-1)
                        cdf = logp.exp().double().cumsum_(-1)
                    del logp, cdf
                    if t < 3:
                        state = step(cache, columns + t * side)
                del state
    return prefill, tracker.peak


# ---------------------------------------------------------------------------------------------------------- phases
@dataclass(frozen=True)
class Choice:
    """The flags that decide memory, not the result."""

    micro_batch_size: int
    sample_batch_size: int
    checkpointing: bool
    tokens_per_micro_batch: int

    def __str__(self) -> str:
        sampling = f"--sample_batch_size {self.sample_batch_size} " if self.sample_batch_size else ""
        bound = f"--tokens_per_micro_batch {self.tokens_per_micro_batch} " if self.tokens_per_micro_batch else ""
        rest = f"{bound}{sampling}--gradient_checkpointing {self.checkpointing}"
        return f"--micro_batch_size {self.micro_batch_size} {rest}"


def pass_bytes(run: Run, shape: Shape, who: str, kind: str, checkpointing: bool) -> PassBytes:
    """trace_pass at the model's depth, where the forward pass may hold the peak that logits hold in two layers."""

    def part(k: int) -> Bytes:
        return by_depth(run, lambda n: trace_pass(run, shape, who, kind, n, checkpointing)[k])

    return PassBytes(max(part(0), part(2), key=Counter.total), part(1))


def largest_pass(run: Run, batches: list[Any], who: str, kind: str, checkpointing: bool) -> Bytes:
    """The peak over micro-batches of several shapes."""
    shapes = {rows_shape(rows) for rows in batches}
    return max((pass_bytes(run, shape, who, kind, checkpointing).peak for shape in shapes), key=Counter.total)


@functools.cache
def sampling_phases(run: Run, sample_batch_size: int) -> dict[str, Bytes]:
    """Prefill and decode of a rollout, and of the evaluation, where every held-out prompt has one response."""
    flags, jobs = run.flags, {}
    online = run.stage in ("ppo", "grpo") or getattr(flags, "online", False)
    if online:
        g = flags.samples_per_prompt
        jobs["rollout"] = (min(max(1, sample_batch_size // g), flags.batch_size // g), g)
    if getattr(flags, "eval_samples", 1):
        jobs["evaluation"] = (min(sample_batch_size, getattr(flags, "eval_samples", sample_batch_size)), 1)
    phases = {}
    for name, (n_prompts, g) in jobs.items():
        for k, part in enumerate(("prefill", "decode")):
            phases[f"{name}: {part}"] = by_depth(
                run,
                lambda n, p=n_prompts, g=g, k=k: trace_sampling(run, p, g, n)[k],  # type: ignore[misc]
            )
    return phases


@functools.cache
def training_phases(run: Run, micro_batch_size: int, checkpointing: bool) -> dict[str, Bytes]:
    """Score passes and updates, which depend on --micro_batch_size and --gradient_checkpointing."""
    flags, phases = run.flags, {}
    batches = training_rows(run, micro_batch_size)

    def add(name: str, who: str, kind: str, rows: list[Any], held: int) -> None:
        phases[name] = largest_pass(run, rows, who, kind, checkpointing)
        phases[name]["token rows"] += held
        if kind == "update":
            phases[name]["gradients"] += fixed_bytes(run)["gradients"][who if run.trained else "all weights"]

    held = sum(map(row_bytes, step_rows(run, replace(flags, micro_batch_size=micro_batch_size))))
    if run.stage in ("ppo", "grpo"):  # plus old and reference log-probs, values, rewards ...: ten floats a token
        held += 40 * flags.batch_size * run.response
        single = alone(run, micro_batch_size, run.prompt, run.response)
        add("evaluation: log-probs", "policy", "score+grad", [single], held + row_bytes(single))
        add("scores: policy", "policy", "score+grad", batches, held)
        add("scores: reference", "reference", "score", batches, held)
        judges = [name for name in run.roles if name.startswith(("critic", "reward"))]
        if judges:
            add(f"scores: {', '.join(judges)}", judges[-1], "score", batches, held)
    if run.stage in ("sft", "reward"):
        add("evaluation", run.trained[0] if run.trained else "all", "score", batches, held)
    for who in run.trained or ("all",):
        if who == "critic" and run.stage == "dpo":  # dro's V(x)
            groups = [(tokens(run.prompt), [tokens(1)])] * micro_batch_size
            size = replace(flags, micro_batch_size=micro_batch_size)
            groups = groups[: len(run.script.group_batches(groups, run.config, size)[0])]
            batches = [run.script.lay_out(groups, run.script.row_width(groups, run.config), 0, CPU)]
        add(f"update: {who}", who, "update", batches, held)
    if getattr(flags, "ptx_dataset", None):
        add("update: ptx", "policy", "update", [alone(run, micro_batch_size, 1, run.prompt + run.response - 1)], held)
    return phases


@functools.cache
def other_phases(run: Run) -> dict[str, Bytes]:
    """What no batch flag decides: loading, and dpo.py's reference pass of at most 2**12 padded tokens."""
    phases = {"load": Counter({"weight in transit": weight_in_transit(run)})}
    if run.stage == "dpo" and run.script.LOSSES[run.flags.loss].reference:
        n = max(1, 2**12 // (2 * (run.prompt + run.response)))
        groups = [(tokens(run.prompt), [tokens(run.response)] * 2)] * n
        rows = run.script.lay_out(groups, run.script.row_width(groups, run.config), 0, CPU)
        phases["reference's log-probs"] = largest_pass(run, [rows], "reference", "score", False)
        phases["reference's log-probs"]["token rows"] += row_bytes(rows)
    return phases


def with_fixed(run: Run, phases: dict[str, Bytes]) -> dict[str, Bytes]:
    """Each phase with what lies in memory by then; optimizer states come with the first update and stay."""
    fixed = Counter({name: parts.total() for name, parts in fixed_bytes(run).items() if name != "gradients"})
    weights = Counter({"weights": fixed["weights"]})
    return {name: (weights if name == "load" else fixed) + parts for name, parts in phases.items()}


def needed(run: Run, parts: Bytes) -> float:
    """Bytes of a card that a phase needs, with the two allowances."""
    return parts.total() * (1 + FRAGMENTATION) + CONTEXT if run.gpu else parts.total()


def all_phases(run: Run, choice: Choice) -> dict[str, Bytes]:
    """Every phase of a step and of the evaluation, in the script's order."""
    sampling = sampling_phases(run, choice.sample_batch_size) if choice.sample_batch_size else {}
    return with_fixed(
        run, other_phases(run) | sampling | training_phases(run, choice.micro_batch_size, choice.checkpointing)
    )


# ------------------------------------------------------------------------------------------------------- the answer
def asked_choice(run: Run) -> Choice:
    """The flags as given."""
    checkpointing = run.gpu if run.flags.gradient_checkpointing is None else run.flags.gradient_checkpointing
    sampling, bound = getattr(run.flags, "sample_batch_size", 0), run.flags.tokens_per_micro_batch
    return Choice(run.flags.micro_batch_size, sampling, checkpointing, bound)


def sizes_down(largest: int) -> list[int]:
    """`largest`, then the powers of two below it, downwards."""
    return [largest, *(2**k for k in reversed(range(largest.bit_length())) if 2**k < largest)]


def first_fit(candidates: list[Any], fits: Callable[[Any], bool]) -> Any:
    """The first of the candidates that fits, else None."""
    return next((candidate for candidate in candidates if fits(candidate)), None)


def choose(run: Run, gib: float) -> Choice | None:
    """The batch flags for a card: no checkpointing where a whole batch fits without it; None: nothing fits."""

    def fits(phases: dict[str, Bytes]) -> bool:
        return all(needed(run, parts) <= gib * GIB for parts in with_fixed(run, phases).values())

    flags = run.flags
    largest = math.ceil(flags.batch_size / getattr(flags, "minibatches", 1))
    if not fits(other_phases(run)):
        return None
    sample: int | None = 0
    if hasattr(flags, "sample_batch_size"):
        most = getattr(flags, "eval_samples", 0) or flags.batch_size
        sample = first_fit(sizes_down(min(most, 1024)), lambda n: fits(sampling_phases(run, n)))
    if sample is None:
        return None
    if fits(training_phases(run, largest, False)):
        return Choice(largest, sample, False, flags.tokens_per_micro_batch)
    micro = first_fit(sizes_down(largest), lambda n: fits(training_phases(run, n, True)))
    return Choice(micro, sample, True, flags.tokens_per_micro_batch) if micro else None


def gib_text(n: float) -> str:
    """Bytes as GiB, or MiB where that says more."""
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / 2**20:.2f} MiB"


def report(run: Run, plan: PlanArgs) -> dict[str, Any]:
    """The plan as JSON."""
    asked = asked_choice(run)
    phases = all_phases(run, asked)
    worst = max(phases, key=lambda name: phases[name].total())
    cards = []
    for gib in sorted({*CARDS, *([plan.gpu_gb] if plan.gpu_gb else [])}) if run.gpu else []:
        choice = choose(run, gib)
        peak = max(all_phases(run, choice).values(), key=Counter.total) if choice else None
        cards.append({
            "gib": gib, "fits_as_asked": needed(run, phases[worst]) <= gib * GIB,
            "flags": str(choice) if choice else None, "needed": round(needed(run, peak)) if peak else None,
        })  # fmt: skip
    return {
        "stage": run.stage, "model_type": run.config.model_type, "layers": run.config.num_hidden_layers,
        "quant": run.quant, "dtype": str(run.dtype).removeprefix("torch."), "gpu": run.gpu, "flags": str(asked),
        "batch_size": run.flags.batch_size, "prompt_length": run.prompt, "response_length": run.response,
        "fixed": {name: dict(parts) for name, parts in fixed_bytes(run).items()},
        "phases": {name: {**parts, "total": parts.total()} for name, parts in phases.items()},
        "peak": {"phase": worst, "bytes": phases[worst].total(), "needed": round(needed(run, phases[worst]))},
        "allowances": {"context": CONTEXT, "fragmentation": FRAGMENTATION} if run.gpu else {}, "cards": cards,
    }  # fmt: skip


def show(plan: dict[str, Any]) -> None:
    """Print the plan: what is fixed, every phase by category, the peak, cards."""
    print(
        f"plan: {plan['stage']}, {plan['model_type']} of {plan['layers']} layers, {plan['quant']}, {plan['dtype']}, "
        f"{'GPU' if plan['gpu'] else 'CPU'}; batches as if every prompt had {plan['prompt_length']} tokens and every "
        f"response {plan['response_length']} (the longest)\nflags: --batch_size {plan['batch_size']} {plan['flags']}\n"
    )
    for name, parts in plan["fixed"].items():
        text = ", ".join(f"{part} {gib_text(n)}" for part, n in parts.items() if n)
        print(f"{name:<10} {gib_text(sum(parts.values())):>12}   {text}")
    names = [tag for tag in TAGS if tag not in plan["fixed"] or tag == "gradients"]
    names = [tag for tag in names if any(parts.get(tag) for parts in plan["phases"].values())]
    print(
        f"\n{'MiB at the peak of':<24}{'fixed':>10}" + "".join(f"{tag:>{len(tag) + 2}}" for tag in names) + "     total"
    )
    for name, parts in plan["phases"].items():
        fixed = sum(n for tag, n in parts.items() if tag not in (*names, "total"))
        cells = "".join(f"{parts.get(tag, 0) / 2**20:>{len(tag) + 2}.1f}" for tag in names)
        print(f"{name:<24}{fixed / 2**20:>10.1f}{cells}{parts['total'] / 2**20:>10.1f}")
    peak = plan["peak"]
    print(f"\npeak: {gib_text(peak['bytes'])} in {peak['phase']}")
    if not plan["gpu"]:
        return
    print(
        f"on a card: {gib_text(peak['needed'])}, with {CONTEXT / GIB:g} GiB for the CUDA context and "
        f"{FRAGMENTATION:.0%} for fragmentation (both are allowances, not measurements)\n\n"
        "card     as asked   flags that fit"
    )
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
        return report(describe_run(argv[0], script, flags, plan), plan), plan
    except (ValueError, script.UserError) as error:
        raise UserError(str(error).splitlines()[0]) from error


def main(argv: list[str]) -> None:
    """Print the plan and write it where --output says."""
    plan, args = make_plan(argv)
    show(plan)
    if args.output:
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"plan.py: {error}")
