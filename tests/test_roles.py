"""One base, four roles: adapters, modes and gradients; also on a real 4-bit base."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, make_adapter, perturb, read_jsonl, tiny_llama
from test_rows import CASES, make_groups, make_model
from torch import Tensor

import ppo
import sft

ROLES = ("policy", "reference", "reward", "critic")


@dataclass
class Roles:
    """What ppo.load_roles gives, and the arguments it was given."""

    model: Any
    tokenizer: Any
    stop_ids: list[int]
    reward: Any
    critic_head: Any
    args: ppo.Args
    prompts: list[dict]

    def rollout(self, samples: int = 3, step: int = 0, who: str = "policy") -> ppo.Rollout:
        """Responses to all prompts, as PPO's step `step` samples them."""
        names = list(range(len(self.prompts)))
        return ppo.roll_out(
            self.model,
            self.tokenizer,
            self.prompts,
            names,
            samples,
            self.stop_ids,
            self.args,
            (0, 0, step),
            who,
            self.args.minibatches,
        )

    def weights(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors by their names without the adapter's."""
        named = self.model.named_parameters()
        return {n.replace(f".{name}.", ".*."): p.detach().clone() for n, p in named if f".{name}." in n}


def load(model: Path, reward: Path | None, world: Path, **flags: Any) -> Roles:
    """ppo.load_roles on the small world."""
    settings: dict[str, Any] = {"model": str(model), "reward_model": str(reward) if reward else None}
    settings |= {"max_response_length": 12, "micro_batch_size": 6, "dataset": str(world / "prompts.jsonl"), **flags}
    args = ppo.Args(**settings)
    loaded = ppo.load_roles(args, CPU)
    rows = read_jsonl(world / "prompts.jsonl")[:4]
    prompts = [ppo.encode_rl(row, loaded[1], 512)[0] for row in rows]
    return Roles(*loaded[:5], args, prompts)


@pytest.fixture(scope="module")
def uncarded(reward_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reward run without its card: no mean, no canaries, so it may be used in any precision."""
    folder = tmp_path_factory.mktemp("uncarded") / "reward"
    shutil.copytree(reward_run, folder)
    (folder / "reward.json").unlink()
    return folder


@pytest.fixture(scope="module")
def plain(sft_run: Path, reward_run: Path, world: Path) -> Roles:
    """The four roles on a base in fp32."""
    return load(sft_run, reward_run, world)


@pytest.fixture(scope="module")
def nf4(sft_run: Path, uncarded: Path, world: Path) -> Roles:
    """The four roles on a base in 4 bits."""
    return load(sft_run, uncarded, world, quant="nf4")


@pytest.fixture(params=["none", "nf4"])
def roles(request: pytest.FixtureRequest) -> Roles:
    """Both."""
    return request.getfixturevalue("plain" if request.param == "none" else "nf4")


def trainable(model: Any) -> set[str]:
    """Names of the parameters that require gradients."""
    return {n for n, p in model.named_parameters() if p.requires_grad}


def with_gradient(model: Any) -> set[str]:
    """Names of the parameters that have one."""
    return {n for n, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------ the role itself
@pytest.mark.parametrize("name", ROLES)
def test_role_sets_adapter_mode_and_gradients(plain: Roles, name: str) -> None:
    """Trap 25: the adapter, train or eval mode, and exactly its own parameters, set here and not by peft."""
    model = plain.model
    own = {n for n, _ in model.named_parameters() if f".{name}." in n}
    assert own
    for grad in (True, False):
        with ppo.role(model, name, grad=grad):
            assert model.active_adapter == name
            assert {m.training for m in model.modules()} == {grad}
            assert trainable(model) == (own if grad else set())
            assert torch.is_grad_enabled() == grad


def test_role_without_an_adapter_is_the_bare_base(base: Path) -> None:
    """ "reference" of a bare base: the base's own numbers, while "policy" has others."""
    model, tokenizer = make_adapter(base, "policy", seed=4, size=0.1)
    bare = ppo.load_model(ppo.Args(model=str(base), quant="none"), CPU)[0]
    ids = torch.tensor([tokenizer("The fox is red.")["input_ids"]])
    with torch.no_grad():
        expected = bare(ids).logits
    with ppo.role(model, "reference"):
        assert torch.equal(model(ids).logits, expected)
    with ppo.role(model, "policy"):
        assert (model(ids).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["critic", "reference", "nobody"])
def test_role_restores_everything_after_an_exception(plain: Roles, name: str) -> None:
    """Trap 25: adapter, mode, requires_grad and grad mode come back, also from a role inside a role."""
    model = plain.model

    def state() -> tuple:
        modes = tuple(m.training for m in model.modules())
        off = [m.disable_adapters for m in model.modules() if hasattr(m, "disable_adapters")]
        return model.active_adapter, modes, trainable(model), torch.is_grad_enabled(), tuple(off)

    model.set_adapter("policy")
    before = state()
    for outer in (True, False):
        with ppo.role(model, "policy", grad=outer):
            inside = state()
            for inner in (True, False):
                with pytest.raises(RuntimeError, match="boom"), ppo.role(model, name, grad=inner):
                    raise RuntimeError("boom")
                assert state() == inside
        assert state() == before


# ------------------------------------------------------------------------------------------------- who starts as what
def test_policy_starts_as_the_sft_adapter_and_so_does_the_reference(roles: Roles) -> None:
    """Trap 24: KL 0 at the start, to the bit, and the reference is not the base."""
    policy, reference = roles.weights("policy"), roles.weights("reference")
    assert policy.keys() == reference.keys() and all(torch.equal(policy[k], reference[k]) for k in policy)
    rollout = roles.rollout()
    old, _ = ppo.role_logprobs(roles.model, "policy", rollout, 1.0)
    ref, _ = ppo.role_logprobs(roles.model, "reference", rollout, 1.0)
    off, _ = ppo.role_logprobs(roles.model, "no such adapter", rollout, 1.0)
    assert torch.equal(old, ref)
    assert ppo.masked_mean((off - ref).abs(), rollout.mask) > 0.05


def test_the_reference_is_what_peft_loads(plain: Roles, base: Path, sft_run: Path) -> None:
    """Trap 24: log-probs of the reference equal those of plain transformers + PEFT on the SFT folder, to 1e-5."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rollout = plain.rollout()
    ours, _ = ppo.role_logprobs(plain.model, "reference", rollout, 1.0)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(sft_run)).eval()
    for i, y in enumerate(rollout.responses):
        prompt = rollout.prompts[i]["ids"]
        with torch.no_grad():
            table = model(torch.tensor([prompt + y])).logits[0].log_softmax(-1)
        expected = table[range(len(prompt) - 1, len(prompt) + len(y) - 1), y]
        assert torch.allclose(ours[i, : len(y)], expected, atol=1e-5)


def test_the_critic_starts_as_the_reward_model(plain: Roles) -> None:
    """V of a whole text is r of it: the same adapter, the same head, a bias of minus the mean."""
    reward, critic = plain.weights("reward"), plain.weights("critic")
    assert reward.keys() == critic.keys() and all(torch.equal(reward[k], critic[k]) for k in reward)
    assert torch.equal(plain.critic_head.weight, plain.reward.head.weight)
    assert plain.critic_head.bias.item() == -plain.reward.mean == -0.25
    rollout = plain.rollout()
    scores = ppo.score_responses(rollout, plain.reward, plain.args)
    with ppo.role(plain.model, "critic"):
        for numbers, rows in rollout.batches():
            values = ppo.head_scores(plain.model, plain.critic_head, rows)
            assert torch.allclose(values, scores[numbers], atol=1e-6)


def test_without_a_reward_adapter_the_critic_starts_at_zero(sft_run: Path, reward_file: str, world: Path) -> None:
    """--reward_fn: the policy's adapter and a head of zeros, so every first value is 0."""
    roles = load(sft_run, None, world, reward_fn=reward_file)
    policy, critic = roles.weights("policy"), roles.weights("critic")
    assert all(torch.equal(policy[k], critic[k]) for k in policy) and "reward" not in roles.model.peft_config
    assert not ppo.role_values(roles.model, roles.critic_head, roles.rollout()).any()


def test_scores_are_those_of_the_plain_classes(plain: Roles, base: Path, reward_run: Path) -> None:
    """Trap 18: r(x, y) on sampled ids equals AutoModelForSequenceClassification + PEFT minus the mean, to 1e-5."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = PeftModel.from_pretrained(model, str(reward_run)).eval()
    rollout = plain.rollout()
    scores = ppo.score_responses(rollout, plain.reward, plain.args)
    for i, y in enumerate(rollout.responses):
        with torch.no_grad():
            raw = model(torch.tensor([rollout.prompts[i]["ids"] + y])).logits.item()
        assert scores[i].item() == pytest.approx(raw - 0.25, abs=1e-5)


# ------------------------------------------------------------------------------------------------------ gradients
def backward(roles: Roles, who: str, rollout: ppo.Rollout, temperature: float = 1.0) -> list[float]:
    """Accumulate one gradient of the policy or of the critic, with targets that differ from what they are."""
    roles.args.temperature = temperature
    old, _ = ppo.role_logprobs(roles.model, "policy", rollout, temperature)
    values = ppo.role_values(roles.model, roles.critic_head, rollout)
    generator = torch.Generator().manual_seed(0)
    targets, n = torch.randn(old.shape, generator=generator), rollout.mask.sum().item()
    if who == "policy":
        return ppo.policy_backward(roles.model, rollout.batches(), old, targets, n, roles.args)
    return [
        ppo.critic_backward(roles.model, roles.critic_head, rollout.batches(), values, values + targets, n, roles.args)
    ]


@pytest.mark.parametrize("who", ["policy", "critic"])
def test_gradients_reach_the_active_role_only(roles: Roles, who: str) -> None:
    """Trap 25: all of its own tensors, none of another adapter or of the base; the critic's head with the critic."""
    roles.model.zero_grad(set_to_none=True)
    roles.critic_head.zero_grad(set_to_none=True)
    backward(roles, who, roles.rollout())
    own = {n for n, _ in roles.model.named_parameters() if f".{who}." in n}
    assert with_gradient(roles.model) == own
    assert all(p.grad.abs().max() > 0 for n, p in roles.model.named_parameters() if n in own)
    assert (roles.critic_head.weight.grad is not None) == (who == "critic")
    assert roles.reward.head.weight.grad is None
    roles.model.zero_grad(set_to_none=True)
    roles.critic_head.zero_grad(set_to_none=True)


def measured_backward(roles: Roles, who: str) -> tuple[int, dict[str, Tensor]]:
    """(bytes that autograd keeps for backward, gradients by name) of one accumulation."""
    total, rollout = 0, roles.rollout()

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    roles.model.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backward(roles, who, rollout)
    gradients = {n: p.grad for n, p in roles.model.named_parameters() if p.grad is not None}
    roles.model.zero_grad(set_to_none=True)
    return total, gradients


@pytest.mark.parametrize("who", ["policy", "critic"])
def test_gradient_checkpointing_changes_memory_only(
    plain: Roles, sft_run: Path, reward_run: Path, world: Path, who: str
) -> None:
    """Trap 7: gradients equal to 1e-6, none outside the role, and less is kept for the backward pass."""
    checkpointed = load(sft_run, reward_run, world, gradient_checkpointing=True)
    memory, found = measured_backward(plain, who)
    less, same = measured_backward(checkpointed, who)
    assert found.keys() == same.keys() and all(f".{who}." in n for n in found)
    assert all(torch.allclose(found[n], same[n], atol=1e-6) for n in found)
    assert less < 0.7 * memory


# -------------------------------------------------------------------------------------------------- the first ratio
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_first_ratio_is_one(roles: Roles, temperature: float) -> None:
    """Traps 3, 5, 6, 8: old log-probs and those of the update, same rows and temperature: 1 to 1e-6, in NF4 too."""
    rollout = roles.rollout()
    old, _ = ppo.role_logprobs(roles.model, "policy", rollout, temperature)
    for numbers, rows in rollout.batches():
        with ppo.role(roles.model, "policy", grad=True):
            new, _ = ppo.response_logprobs(roles.model, rows, temperature)
        assert (torch.exp(new - old[numbers]) - 1).abs().max().item() <= 1e-6
    _, clipped, kl = backward(roles, "policy", rollout, temperature)
    assert clipped == 0 and kl == pytest.approx(0, abs=1e-10)
    other, _ = ppo.role_logprobs(roles.model, "policy", rollout, temperature + 0.1)
    assert ppo.masked_mean((other - old).abs(), rollout.mask) > 0.01  # another temperature would be seen
    roles.model.zero_grad(set_to_none=True)
    roles.args.temperature = 1.0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_sampler_and_the_training_pass_agree(
    quant: str, checkpointing: bool, sft_run: Path, uncarded: Path, world: Path
) -> None:
    """Trap 8: KV cache against training forward, below 1e-4 (fp32) and 0.02 (NF4); a dropped cache is far above."""
    roles = load(sft_run, uncarded, world, quant=quant, gradient_checkpointing=checkpointing)
    rollout = roles.rollout(samples=4)
    assert max(map(len, rollout.responses)) > 4  # a cache has been used
    for _ in range(2):  # also right after a pass in train mode
        old, _ = ppo.role_logprobs(roles.model, "policy", rollout, 1.0)
        gap = ppo.masked_mean((old - rollout.sampler_logprobs).abs(), rollout.mask).item()
        assert gap < (1e-4 if quant == "none" else 0.02)
        backward(roles, "policy", rollout)
        rollout = roles.rollout(samples=4, step=1)


def test_evaluating_does_not_move_a_4_bit_base(nf4: Roles) -> None:
    """bitsandbytes repacks weights at its first eval-mode pass: load_base has done it, so numbers stay as they are."""
    rollout = nf4.rollout()
    first, _ = ppo.role_logprobs(nf4.model, "policy", rollout, 1.0)
    backward(nf4, "policy", rollout)
    ppo.score_responses(rollout, nf4.reward, nf4.args)
    again, _ = ppo.role_logprobs(nf4.model, "policy", rollout, 1.0)
    assert torch.equal(first, again)
    nf4.model.zero_grad(set_to_none=True)
    nf4.critic_head.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("kl_step0", "the policy does not start as the reference"),
        ("sampler_agreement", "is the KV cache dropped"),
        ("eos_rate", "responses do not end"),
    ],
)
def test_the_preflight_names_the_cause(plain: Roles, name: str, cause: str) -> None:
    """Traps 2, 8, 24: each check passes on a sound rollout and stops the run, with its cause, on an unsound one."""
    rollout = plain.rollout()
    old, _ = ppo.role_logprobs(plain.model, "policy", rollout, 1.0)
    gates = ppo.preflight(plain.model, rollout, old, old, plain.args)
    assert [gate[0] for gate in gates] == ["kl_step0", "ratio_step0", "sampler_agreement", "eos_rate"]
    assert all(gate[3] for gate in gates)
    broken, ref = rollout, old
    if name == "kl_step0":
        ref = old + 0.01 * rollout.mask
    elif name == "sampler_agreement":
        broken = rollout._replace(sampler_logprobs=rollout.sampler_logprobs + 0.01 * rollout.mask)
    else:
        broken = rollout._replace(ended=torch.zeros_like(rollout.ended))
    with pytest.raises(ppo.UserError, match=f"preflight: {name} is .*{cause}"):
        ppo.preflight(plain.model, broken, old, ref, plain.args)


# ------------------------------------------------------------------------------------------------------ one 4-bit base
def test_one_quantised_base_carries_all_roles(nf4: Roles) -> None:
    """Trap 21: 14 quantised layers, half a byte per weight, four adapters on them, and nothing held twice."""
    import bitsandbytes

    layers = [m for m in nf4.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14 == len({m.weight.data_ptr() for m in layers})
    # per layer of the base: q 64x64, k and v 64x32, o 64x64, gate, up and down 64x128
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    assert sum(m.weight.numel() * m.weight.element_size() for m in layers) == weights // 2
    assert set(nf4.model.peft_config) == set(ROLES) and nf4.reward.model is nf4.model
    parameters: list[Any] = [m.weight for m in layers]
    assert all(p.quant_state.quant_type == "nf4" and p.quant_state.nested for p in parameters)
    assert nf4.args.quant == "nf4" and nf4.args.dtype == "bfloat16"
    assert nf4.critic_head.weight.dtype == nf4.reward.head.weight.dtype == torch.float32
    assert {p.dtype for p in ppo.adapter_parameters(nf4.model, "policy")} == {torch.float32}


def test_the_base_is_loaded_once(sft_run: Path, reward_run: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four roles cost one base in memory: from_pretrained is called once."""
    calls, original = [], ppo.load_base

    def counted(base: str, *rest: Any) -> Any:
        calls.append(base)
        return original(base, *rest)

    monkeypatch.setattr(ppo, "load_base", counted)
    load(sft_run, reward_run, world)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("recorded", "flags", "expected"),
    [
        (None, {}, ("none", "float32")),
        ("nf4", {}, ("nf4", "bfloat16")),
        ("none", {}, ("none", "float32")),
        ("nf4", {"quant": "none"}, ("none", "float32")),
        (None, {"quant": "nf4"}, ("nf4", "bfloat16")),
        (None, {"quant": "nf4", "dtype": "float32"}, ("nf4", "float32")),
        (None, {"dtype": "bfloat16"}, ("none", "bfloat16")),
    ],
)
def test_precision_follows_the_run_folder(recorded: str | None, flags: dict, expected: tuple, tmp_path: Path) -> None:
    """auto: as recorded in the run folder, else none on a CPU; flags win; NF4 computes in bf16."""
    if recorded:
        ppo.write_json(tmp_path / "args.json", {"quant": recorded})
    args = ppo.Args(**flags)
    assert ppo.choose_precision(args, tmp_path if recorded else None, CPU) == expected


@pytest.mark.parametrize("width", [64, 80, 128, 160, 172, 176, 192])
def test_a_4_bit_base_computes_what_its_weights_say(width: int, tmp_path: Path) -> None:
    """Trap 21: logits and gradients equal those of the dequantised weights, in train and eval mode, or it is refused.

    `width` is the FFN's: bitsandbytes' CPU kernels misread some that are no multiple of 64.
    """
    import bitsandbytes

    model = tiny_llama(97, 1, 0)
    model.config.intermediate_size = width
    model = type(model)(model.config)
    model.save_pretrained(tmp_path)
    args = ppo.Args(model=str(tmp_path), quant="nf4", dtype="float32", lora_r=4)
    try:
        loaded = ppo.load_base(str(tmp_path), args, CPU)
    except ppo.UserError as error:
        assert width % 64 and f"misreads {width} inputs on CPU; --quant none" in str(error)
        return
    exact = type(model).from_pretrained(tmp_path)
    for name, m in loaded.named_modules():
        if isinstance(m, bitsandbytes.nn.Linear4bit):
            packed: Any = m.weight
            weight: Any = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
            exact.get_submodule(name).weight.data = weight.float()
    results = []
    for host in (loaded, exact):
        host = ppo.add_adapter(host, "policy", None, args)
        perturb(host, "policy", 3, 0.1)
        rows = ppo.lay_out([([5, 6, 7], [[8, 9], [10, 11, 12]])], 0, 0, CPU)
        with ppo.role(host, "policy"):
            evaluated, _ = ppo.response_logprobs(host, rows)
        with ppo.role(host, "policy", grad=True):
            trained, _ = ppo.response_logprobs(host, rows)
            trained.sum().backward()
        results.append([evaluated, trained.detach(), *(p.grad for p in ppo.adapter_parameters(host, "policy"))])
    assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(*results, strict=True))


# --------------------------------------------------------------------------------------------------------- dropout
@pytest.fixture
def dropped(base: Path, sft_run: Path, uncarded: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(SFT run, reward run) whose adapters have a LoRA dropout of 0.5, on a base with attention dropout 0.5."""
    for name, folder in (("base", base), ("sft", sft_run), ("reward", uncarded)):
        shutil.copytree(folder, tmp_path / name)
    for file, key in (("base/config", "attention_dropout"), ("sft/adapter_config", "lora_dropout")):
        settings = json.loads((tmp_path / f"{file}.json").read_text())
        ppo.write_json(tmp_path / f"{file}.json", {**settings, key: 0.5})
    for name in ("sft", "reward"):
        settings = json.loads((tmp_path / name / "adapter_config.json").read_text())
        changed = {"base_model_name_or_path": str(tmp_path / "base"), "lora_dropout": 0.5}
        ppo.write_json(tmp_path / name / "adapter_config.json", {**settings, **changed})
    return tmp_path / "sft", tmp_path / "reward"


def ratio_error(roles: Roles) -> float:
    """Largest |ratio - 1| of a pass in train mode against the old log-probs."""
    rollout = roles.rollout()
    old, _ = ppo.role_logprobs(roles.model, "policy", rollout, 1.0)
    (numbers, rows) = rollout.batches()[0]
    with ppo.role(roles.model, "policy", grad=True):
        new, _ = ppo.response_logprobs(roles.model, rows, 1.0)
    return (torch.exp(new - old[numbers]) - 1).abs().max().item()


def test_dropout_of_the_loaded_folders_is_off(dropped: tuple[Path, Path], world: Path) -> None:
    """Traps 5 and 6: LoRA's and the config's dropout are 0 in RL, whatever the folders say: the first ratio is 1."""
    assert ratio_error(load(*dropped, world)) <= 1e-6


def test_dropout_would_be_noticed(dropped: tuple[Path, Path], world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no_dropout taken out, the same folders give ratios far from 1, and the preflight stops the run."""
    monkeypatch.setattr(ppo, "no_dropout", lambda model: None)
    roles = load(*dropped, world)
    assert ratio_error(roles) > 0.01
    rollout = roles.rollout()
    old, _ = ppo.role_logprobs(roles.model, "policy", rollout, 1.0)
    with pytest.raises(ppo.UserError, match="preflight: ratio_step0 .* is a dropout on"):
        ppo.preflight(roles.model, rollout, old, old, roles.args)


@pytest.mark.parametrize("family", sorted({family for family, _ in CASES}))
def test_every_dropout_of_every_family_is_found(family: str) -> None:
    """Traps 5 and 6: each dropout setting of the config at 0.5: two passes in train mode agree after no_dropout."""
    names = ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout", "hidden_dropout")
    config = make_model(family).config
    present = [name for name in names if hasattr(config, name)]
    for name in present:
        setattr(config, name, 0.5)
    model = type(make_model(family))(config).train()
    rows = ppo.lay_out(make_groups(1), 0, 0, CPU)

    def difference() -> float:
        with torch.no_grad():
            first, second = (ppo.response_logprobs(model, rows)[0] for _ in range(2))
        return (first - second).abs().max().item()

    assert present and difference() > 1e-3
    ppo.no_dropout(model)
    assert difference() == 0


def test_sft_continues_an_adapter_without_its_dropout(dropped: tuple[Path, Path]) -> None:
    """Trap 6: sft.py's add_adapter sets LoRA's dropout to 0 as well."""
    args = sft.Args(model=str(dropped[0]))
    model, _, _, adapter, _ = sft.load_model(args, CPU)
    model = sft.add_adapter(model, "policy", adapter, args)
    rates = [m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and "lora" in n]
    assert not any(rates) and model.peft_config["policy"].lora_dropout == 0


# -------------------------------------------------------------------------------------------------------- adapters
def test_new_adapters_of_a_bare_base_are_alike(base: Path, reward_file: str, world: Path) -> None:
    """A bare base: policy and critic get adapters on the same layers, new ones that change nothing yet."""
    roles = load(base, None, world, reward_fn=reward_file)
    policy, critic = roles.weights("policy"), roles.weights("critic")
    assert policy.keys() == critic.keys() and len(policy) == 2 * 14
    rollout = roles.rollout()
    old, _ = ppo.role_logprobs(roles.model, "policy", rollout, 1.0)
    ref, _ = ppo.role_logprobs(roles.model, "reference", rollout, 1.0)
    assert torch.allclose(old, ref, atol=1e-6)


def test_a_relative_base_is_found_beside_the_run_folder(
    base: Path, sft_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders that move together stay together: "ckpt" is looked for from the run folder upwards, from any place."""
    shutil.copytree(base, tmp_path / "project" / "ckpt")
    folder = Path(shutil.copytree(sft_run, tmp_path / "project" / "runs" / "sft"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    ppo.write_json(folder / "adapter_config.json", {**settings, "base_model_name_or_path": "ckpt"})
    for place in (tmp_path, tmp_path / "project", folder):
        monkeypatch.chdir(place)
        assert ppo.find_base(folder) == str(tmp_path / "project" / "ckpt")
        assert ppo.find_base(Path(os.path.relpath(folder))) == str(tmp_path / "project" / "ckpt")


@pytest.mark.parametrize("kind", ["missing", "extra", "shape"])
def test_an_adapter_that_does_not_fit_is_refused(kind: str, sft_run: Path, tmp_path: Path) -> None:
    """Weights that are missing, too many or of another size are an error, never a half-loaded adapter."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(sft_run, tmp_path / "sft")
    file = tmp_path / "sft" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    if kind == "missing":
        weights.pop(name)
    elif kind == "extra":
        weights["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)
    else:
        weights[name] = torch.zeros(9, 9)
    save_file(weights, file, {"format": "pt"})
    args = ppo.Args(model=str(tmp_path / "sft"))
    model, _, _, adapter, _ = ppo.load_model(args, CPU)
    with pytest.raises(ppo.UserError, match="does not fit this base model"):
        ppo.add_adapter(model, "policy", adapter, args)
