"""One base, four roles: adapters, modes and gradients; also on a real 4-bit base."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, make_adapter, perturb, read_jsonl, record, tiny_llama, write_reward_run
from torch import Tensor

import ppo

ROLES = ("policy", "reference", "reward", "critic")
LINEAR_LAYERS = 14  # of the two layers of the tests' base


@dataclass
class Roles:
    """What main has before its first step."""

    model: Any
    tokenizer: Any
    stop_ids: list[int]
    reward: Any
    critic_head: Any
    args: ppo.Args
    prompts: list[dict]

    def rollout(self, samples: int = 3, step: int = 0, who: str = "policy") -> ppo.Rollout:
        """Responses to all prompts, as PPO's step `step` samples them."""
        lm, names = (self.model, self.tokenizer, self.stop_ids), list(range(len(self.prompts)))
        parts = self.args.minibatches
        return ppo.roll_out(lm, self.prompts, names, samples, parts, who, (0, 0, step), self.args)

    def logprobs(self, who: str, rollout: ppo.Rollout) -> Tensor:
        """Log-probs (B, T) of a rollout in a role."""
        return ppo.role_logprobs(self.model, who, rollout.rows(), rollout.mask, self.args)[0]

    def values(self, rollout: ppo.Rollout) -> Tensor:
        """The critic's values (B, T)."""
        return ppo.role_tables(
            self.model, "critic", rollout.rows(), rollout.mask,
            lambda row: [ppo.values_of(self.model, self.critic_head, row)],
        )[0]  # fmt: skip

    def weights(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors by their names without the adapter's."""
        named = self.model.named_parameters()
        return {n.replace(f".{name}.", ".*."): p.detach().clone() for n, p in named if f".{name}." in n}

    def clear(self) -> None:
        """No gradients."""
        self.model.zero_grad(set_to_none=True)
        self.critic_head.zero_grad(set_to_none=True)

    def backward(self, who: str, rollout: ppo.Rollout) -> None:
        """One gradient of the policy or of the critic, as main accumulates it, with random targets."""
        for row in rollout.minibatches[0]:
            targets = torch.randn(len(row.targets), generator=torch.Generator().manual_seed(0))
            with ppo.role(self.model, who, grad=True):
                if who == "policy":
                    x, _ = ppo.token_logprobs(self.model, row, self.args.temperature)
                else:
                    x = ppo.values_of(self.model, self.critic_head, row)
                (x * targets).sum().backward()


def load(model: Path, reward: Path | str, world: Path, **flags: Any) -> Roles:
    """The four roles on the small world."""
    settings: dict[str, Any] = {"model": str(model), "max_response_length": 12, "tokens_per_batch": 128}
    args = ppo.Args(**{**settings, "minibatches": 2, **flags})
    base, tokenizer, stop_ids, adapter = ppo.load_model(args, CPU)
    base = ppo.add_adapter(base, "policy", adapter, args)
    if adapter:
        ppo.add_adapter(base, "reference", adapter, args)
    scorer = ppo.load_reward(str(reward), base, tokenizer, args)
    head = ppo.add_critic(base, scorer, adapter, args)
    rows = read_jsonl(world / "prompts.jsonl")[:4]
    prompts = [ppo.encode_rl(row, tokenizer, [], ppo.Args())[0] for row in rows]
    return Roles(base, tokenizer, stop_ids, scorer, head, args, prompts)


@pytest.fixture(scope="module")
def plain(sft_run: Path, reward_run: Path, world: Path) -> Roles:
    """The four roles on a base in fp32."""
    return load(sft_run, reward_run, world)


@pytest.fixture(scope="module")
def nf4(sft_run: Path, reward_run: Path, world: Path) -> Roles:
    """The four roles on a base in 4 bits."""
    return load(sft_run, reward_run, world, quant="nf4")


@pytest.fixture(params=["none", "nf4"])
def roles(request: pytest.FixtureRequest) -> Roles:
    """Both."""
    return request.getfixturevalue("plain" if request.param == "none" else "nf4")


def trainable(model: Any) -> set[str]:
    """Names of the parameters that require gradients."""
    return {n for n, p in model.named_parameters() if p.requires_grad}


def named(model: Any, who: str) -> set[str]:
    """Names of an adapter's parameters."""
    return {n for n, _ in model.named_parameters() if f".{who}." in n}


# ------------------------------------------------------------------------------------------------ the role itself
@pytest.mark.parametrize("name", ROLES)
def test_role_sets_adapter_mode_and_gradients(plain: Roles, name: str) -> None:
    """Trap 25: the adapter, train or eval mode, and its own parameters alone, whatever was before."""
    model = plain.model
    for before in ROLES:
        for grad in (True, False):
            with ppo.role(model, before, grad=True):
                pass
            with ppo.role(model, name, grad=grad):
                assert model.active_adapter == name
                assert {m.training for m in model.modules()} == {grad}
                assert trainable(model) == named(model, name) != set()
                assert torch.is_grad_enabled() == grad
    assert torch.is_grad_enabled()


def test_role_without_an_adapter_is_the_bare_base(base: Path) -> None:
    """ "reference" of a bare base: the base's own numbers, while "policy" has others; an exception changes nothing."""
    model, tokenizer = make_adapter(base, "policy", seed=4, size=0.1)
    bare = ppo.load_model(ppo.Args(model=str(base), quant="none"), CPU)[0]
    ids = torch.tensor([tokenizer("The fox is red.")["input_ids"]])
    with torch.no_grad():
        expected = bare(ids).logits
    for _ in range(2):
        with pytest.raises(RuntimeError, match="boom"), ppo.role(model, "reference"):
            assert torch.equal(model(ids).logits, expected)
            raise RuntimeError("boom")
        assert torch.is_grad_enabled()
        with ppo.role(model, "policy"):
            assert (model(ids).logits - expected).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------- who starts as what
def test_policy_starts_as_the_sft_adapter_and_so_does_the_reference(roles: Roles) -> None:
    """Trap 24: KL 0 at the start, and the reference is not the base."""
    policy, reference = roles.weights("policy"), roles.weights("reference")
    assert policy.keys() == reference.keys() and all(torch.equal(policy[k], reference[k]) for k in policy)
    rollout = roles.rollout()
    old, ref, off = (roles.logprobs(who, rollout) for who in ("policy", "reference", "no such adapter"))
    assert torch.allclose(old, ref, atol=1e-5)
    assert ppo.masked_mean((off - ref).abs(), rollout.mask) > 0.05


def test_the_reference_is_what_peft_loads(plain: Roles, base: Path, sft_run: Path) -> None:
    """Trap 24: log-probs of the reference equal those of plain transformers + PEFT on the SFT folder, to 1e-5."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rollout = plain.rollout()
    ours = plain.logprobs("reference", rollout)
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
    assert torch.equal(plain.critic_head.weight, plain.reward.head)
    assert plain.critic_head.bias.item() == -plain.reward.mean == -0.25
    rollout = plain.rollout()
    scores = ppo.score(plain.reward, rollout, plain.args)
    with ppo.role(plain.model, "critic"):
        for row in rollout.rows():
            states = ppo.hidden_states(plain.model, row).index_select(0, row.last)
            assert torch.allclose(plain.critic_head(states).squeeze(-1), scores[row.numbers], atol=1e-6)


def test_values_are_those_of_each_text_so_far(plain: Roles) -> None:
    """V_t is the head on the state before response token t, of that response alone with its prompt; padding is 0."""
    rollout = plain.rollout()
    values = plain.values(rollout)
    with ppo.role(plain.model, "critic"):
        backbone = plain.model.get_base_model().base_model
        for i, y in enumerate(rollout.responses):
            prompt = rollout.prompts[i]["ids"]
            states = backbone(torch.tensor([prompt + y])).last_hidden_state[0, len(prompt) - 1 : -1]
            assert torch.allclose(values[i, : len(y)], plain.critic_head(states).squeeze(-1), atol=1e-5)
            assert not values[i, len(y) :].any()


def test_without_a_reward_adapter_the_critic_starts_at_zero(sft_run: Path, reward_file: str, world: Path) -> None:
    """--reward_fn: the policy's adapter and a head of zeros, so every first value is 0."""
    roles = load(sft_run, reward_file, world)
    policy, critic = roles.weights("policy"), roles.weights("critic")
    assert all(torch.equal(policy[k], critic[k]) for k in policy) and "reward" not in roles.model.peft_config
    assert not roles.values(roles.rollout()).any()


# ------------------------------------------------------------------------------------------------------ gradients
@pytest.mark.parametrize("who", ["policy", "critic"])
def test_gradients_reach_the_active_role_only(roles: Roles, who: str) -> None:
    """Trap 25: all of its own tensors, none of another adapter or of the base; the critic's head with the critic."""
    roles.clear()
    roles.backward(who, roles.rollout())
    own = named(roles.model, who)
    assert {n for n, p in roles.model.named_parameters() if p.grad is not None} == own
    assert all(p.grad.abs().max() > 0 for n, p in roles.model.named_parameters() if n in own)
    assert (roles.critic_head.weight.grad is not None) == (who == "critic")
    assert not roles.reward.head.requires_grad
    roles.clear()


def measured_backward(roles: Roles, who: str) -> tuple[int, dict[str, Tensor]]:
    """(bytes that autograd keeps for backward, gradients by name) of one accumulation."""
    total, rollout = 0, roles.rollout()

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    roles.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        roles.backward(who, rollout)
    gradients = {n: p.grad for n, p in roles.model.named_parameters() if p.grad is not None}
    roles.clear()
    return total, gradients


@pytest.mark.parametrize("who", ["policy", "critic"])
def test_gradient_checkpointing_changes_memory_only(
    plain: Roles, sft_run: Path, reward_run: Path, world: Path, who: str
) -> None:
    """Trap 7: gradients equal to 1e-6, none outside the role, and less is kept for the backward pass."""
    checkpointed = load(sft_run, reward_run, world, gradient_checkpointing=True)
    memory, found = measured_backward(plain, who)
    less, same = measured_backward(checkpointed, who)
    assert found.keys() == same.keys() == named(plain.model, who)
    assert all(torch.allclose(found[n], same[n], atol=1e-6) for n in found)
    assert less < 0.7 * memory


# -------------------------------------------------------------------------------------------------- the first ratio
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_first_ratio_is_one(roles: Roles, temperature: float) -> None:
    """Traps 3, 5, 6, 8: old log-probs and those of the update, same rows and temperature: 1 to 1e-6, in NF4 too."""
    roles.args.temperature = temperature
    rollout = roles.rollout()
    old = roles.logprobs("policy", rollout)
    with ppo.role(roles.model, "policy", grad=True):
        for row in rollout.rows():
            new, _ = ppo.token_logprobs(roles.model, row, temperature)
            assert (torch.exp(new - old[row.at]) - 1).abs().max().item() <= 1e-6
    roles.args.temperature = temperature + 0.1
    other = roles.logprobs("policy", rollout)
    assert ppo.masked_mean((other - old).abs(), rollout.mask) > 0.01  # another temperature would be seen
    roles.args.temperature = 1.0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_sampler_and_the_training_pass_agree(
    quant: str, checkpointing: bool, sft_run: Path, reward_run: Path, world: Path
) -> None:
    """Trap 8: KV cache against training forward, below 1e-4 (fp32) and 0.02 (NF4); a dropped cache is far above."""
    roles = load(sft_run, reward_run, world, quant=quant, gradient_checkpointing=checkpointing)
    rollout = roles.rollout(samples=4)
    assert max(map(len, rollout.responses)) > 4  # a cache has been used
    for _ in range(2):  # also right after a pass in train mode
        gap = (roles.logprobs("policy", rollout) - rollout.sampler_logprobs).abs()
        assert ppo.masked_mean(gap, rollout.mask).item() < (1e-4 if quant == "none" else 0.02)
        roles.backward("policy", rollout)
        rollout = roles.rollout(samples=4, step=1)


def test_evaluating_does_not_move_a_4_bit_base(nf4: Roles) -> None:
    """bitsandbytes would repack weights at an eval-mode pass: numbers stay as they are."""
    rollout = nf4.rollout()
    first = nf4.logprobs("policy", rollout)
    nf4.backward("policy", rollout)
    ppo.score(nf4.reward, rollout, nf4.args)
    assert torch.equal(first, nf4.logprobs("policy", rollout))
    nf4.clear()


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("kl at step 0", "the policy does not start as the reference"),
        ("ratio - 1 at step 0", "is a dropout on"),
        ("sampler against training pass", "is the KV cache dropped"),
        ("share without end", "raise --max_response_length"),
    ],
)
def test_the_preflight_names_the_cause(name: str, cause: str, plain: Roles, capsys: Any) -> None:
    """Traps 2, 8, 24: each check passes on a sound rollout and stops the run, with its cause, on an unsound one."""
    rollout = plain.rollout()
    old = plain.logprobs("policy", rollout)
    capsys.readouterr()
    ppo.preflight(plain.model, rollout, old, old, plain.args)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("preflight: ok ") for line in lines) and name in "".join(lines)
    broken, first, ref = rollout, old, old
    if name == "kl at step 0":
        ref = old + 0.01 * rollout.mask
    elif name == "ratio - 1 at step 0":
        first = old.clone()
        first[rollout.minibatches[0][0].at[0][0], 0] += 1e-3  # one token of all
    elif name == "sampler against training pass":
        broken = rollout._replace(sampler_logprobs=rollout.sampler_logprobs + 0.01 * rollout.mask)
    else:
        broken = rollout._replace(ended=torch.zeros_like(rollout.ended))
    with pytest.raises(ppo.UserError, match=f"preflight: {name} is .*{cause}"):
        ppo.preflight(plain.model, broken, first, ref, plain.args)
    assert f"preflight: RED {name}" in capsys.readouterr().out
    if name == "share without end":  # where no end is wanted none is asked for
        ppo.preflight(plain.model, broken, old, old, ppo.Args(dtype="float32", missing_eos_penalty=0.0))


# ------------------------------------------------------------------------------------------------------ one 4-bit base
def test_one_quantised_base_carries_all_roles(nf4: Roles) -> None:
    """Trap 21: 14 quantised layers, half a byte per weight, four adapters on them, and nothing held twice."""
    import bitsandbytes

    layers = [m for m in nf4.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == LINEAR_LAYERS == len({m.weight.data_ptr() for m in layers})
    # per layer of the base: q 64x64, k and v 64x32, o 64x64, gate, up and down 64x128
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    assert sum(m.weight.numel() * m.weight.element_size() for m in layers) == weights // 2
    assert set(nf4.model.peft_config) == set(ROLES) and nf4.reward.model is nf4.model
    parameters: list[Any] = [m.weight for m in layers]
    assert all(p.quant_state.quant_type == "nf4" and p.quant_state.nested for p in parameters)
    assert nf4.args.quant == "nf4" and nf4.args.dtype == "bfloat16"
    assert nf4.critic_head.weight.dtype == nf4.reward.head.dtype == torch.float32
    assert {x.dtype for x in nf4.weights("policy").values()} == {torch.float32}


def test_the_base_is_loaded_once(sft_run: Path, reward_run: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four roles cost one base in memory: from_pretrained is called once, and its size is said."""
    calls = record(monkeypatch, ppo, "load_base")
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
        (tmp_path / "args.json").write_text(json.dumps({"quant": recorded}))
    args = ppo.Args(model=str(tmp_path), **flags)
    ppo.settle_precision(args, CPU)
    assert (args.quant, args.dtype) == expected
    assert (args.tokens_per_batch, args.gradient_checkpointing) == (512, False)
    (tmp_path / "args.json").write_text("{half")
    with pytest.raises(ppo.UserError, match=r"args\.json: "):
        ppo.settle_precision(ppo.Args(model=str(tmp_path)), CPU)


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
        assert width % 64 and f"misreads {width} inputs; --quant none" in str(error)
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
        row = ppo.flat_row([[0, 1]], [[5, 6, 7]] * 2, [[8, 9], [10, 11, 12]], None, CPU)
        with ppo.role(host, "policy"):
            evaluated, _ = ppo.token_logprobs(host, row)
        with ppo.role(host, "policy", grad=True):
            trained, _ = ppo.token_logprobs(host, row)
            trained.sum().backward()
        own = named(host, "policy")
        results.append([evaluated, trained.detach(), *(p.grad for n, p in host.named_parameters() if n in own)])
    assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(*results, strict=True))


# --------------------------------------------------------------------------------------------------------- dropout
@pytest.fixture
def dropped(base: Path, sft_run: Path, reward_run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(SFT run, reward run) whose adapters have a LoRA dropout of 0.5, on a base with attention dropout 0.5."""
    for name, folder in (("base", base), ("sft", sft_run), ("reward", reward_run)):
        shutil.copytree(folder, tmp_path / name)
    changed = {"base_model_name_or_path": str(tmp_path / "base"), "lora_dropout": 0.5}
    for file, change in (
        ("base/config.json", {"attention_dropout": 0.5}),
        ("sft/adapter_config.json", changed),
        ("reward/adapter_config.json", changed),
    ):
        settings = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps({**settings, **change}))
    return tmp_path / "sft", tmp_path / "reward"


def ratio_error(roles: Roles) -> float:
    """Largest |ratio - 1| of a pass in train mode against the old log-probs."""
    rollout = roles.rollout()
    old, row = roles.logprobs("policy", rollout), rollout.minibatches[0][0]
    with ppo.role(roles.model, "policy", grad=True):
        new, _ = ppo.token_logprobs(roles.model, row)
    return (torch.exp(new - old[row.at]) - 1).abs().max().item()


def test_dropout_of_the_loaded_folders_is_off(dropped: tuple[Path, Path], world: Path) -> None:
    """Traps 5 and 6: LoRA's and the config's dropout are 0 in RL, whatever the folders say: the first ratio is 1."""
    roles = load(*dropped, world)
    assert ratio_error(roles) <= 1e-6
    rates = [m.p for m in roles.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert not any(rates) and all(config.lora_dropout == 0 for config in roles.model.peft_config.values())


def test_dropout_would_be_noticed(plain: Roles) -> None:
    """Attention dropout switched on again gives ratios far from 1, and the preflight stops the run."""
    layers = [m for m in plain.model.modules() if hasattr(m, "attention_dropout")]
    assert len(layers) == 2
    for layer in layers:
        layer.attention_dropout = 0.5
    rollout = plain.rollout()
    old = plain.logprobs("policy", rollout)
    assert ratio_error(plain) > 0.01
    with pytest.raises(ppo.UserError, match="preflight: ratio - 1 at step 0 .* is a dropout on"):
        ppo.preflight(plain.model, rollout, old, old, plain.args)
    for layer in layers:
        layer.attention_dropout = 0.0


# --------------------------------------------------------------------------------------------------- reward models
def other_base(base: Path, folder: Path) -> Path:
    """A base of other weights, with the same tokenizer."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(9)
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    model.save_pretrained(folder)
    return folder


def plain_scores(folder: Path, base: Path, tokenizer: Any, rollout: ppo.Rollout, from_text: bool) -> list[float]:
    """Raw scores by transformers and PEFT alone: of the sampled ids, or of the text rendered with `tokenizer`."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(folder)).eval() if folder != base else model.eval()
    scores = []
    for p, text, y in zip(rollout.prompts, rollout.texts, rollout.responses, strict=True):
        ids = p["ids"] + y
        if from_text:
            messages = [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": text}]
            ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n"))["input_ids"]
        with torch.no_grad():
            scores.append(model(torch.tensor([ids])).logits.item())
    return scores


def test_scores_are_those_of_the_plain_classes(plain: Roles, base: Path, reward_run: Path) -> None:
    """Trap 18: r(x, y) on sampled ids equals AutoModelForSequenceClassification + PEFT minus the mean, to 1e-5."""
    rollout = plain.rollout()
    expected = plain_scores(reward_run, base, None, rollout, from_text=False)
    assert ppo.score(plain.reward, rollout, plain.args).tolist() == pytest.approx(
        [x - 0.25 for x in expected], abs=1e-5
    )
    assert plain.reward.tokenizer is None


def test_a_reward_model_on_another_base(base: Path, sft_run: Path, world: Path, tmp_path: Path) -> None:
    """It loads beside the policy's base and scores the text; the critic starts from the policy."""
    other = other_base(base, tmp_path / "other")
    folder = write_reward_run(tmp_path / "reward", other, seed=6)
    roles = load(sft_run, folder, world)
    assert roles.reward.model is not roles.model and set(roles.model.peft_config) == {"policy", "reference", "critic"}
    rollout = roles.rollout()
    expected = plain_scores(folder, other, roles.tokenizer, rollout, from_text=True)
    scores = ppo.score(roles.reward, rollout, roles.args).tolist()
    assert scores == pytest.approx([x - 0.25 for x in expected], abs=1e-4) and len(set(scores)) > 8
    assert not roles.values(rollout).any()


def test_a_reward_model_with_another_template(reward_run: Path, sft_run: Path, world: Path, tmp_path: Path) -> None:
    """Same base, other markup: the text is rendered again with the reward model's own template."""
    shutil.copytree(reward_run, tmp_path / "reward")
    (tmp_path / "reward" / "chat_template.jinja").write_text(ppo.PLAIN_TEMPLATE)
    roles = load(sft_run, tmp_path / "reward", world)
    rollout = roles.rollout()
    base, tokenizer = Path(roles.model.get_base_model().config._name_or_path), roles.reward.tokenizer
    assert tokenizer.chat_template == ppo.PLAIN_TEMPLATE != roles.tokenizer.chat_template
    expected = plain_scores(reward_run, base, tokenizer, rollout, from_text=True)
    assert ppo.score(roles.reward, rollout, roles.args).tolist() == pytest.approx(
        [x - 0.25 for x in expected], abs=1e-4
    )
    ids = plain_scores(reward_run, base, None, rollout, from_text=False)
    assert max(abs(a - b) for a, b in zip(expected, ids, strict=True)) > 0.01


def test_a_whole_sequence_classifier(base: Path, sft_run: Path, world: Path, tmp_path: Path) -> None:
    """A folder that AutoModelForSequenceClassification loads: its own tokenizer and template, its own scores."""
    from transformers import AutoModelForSequenceClassification

    shutil.copytree(base, tmp_path / "whole")
    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(tmp_path / "whole")
    roles = load(sft_run, tmp_path / "whole", world)
    rollout = roles.rollout()
    expected = plain_scores(tmp_path / "whole", tmp_path / "whole", roles.tokenizer, rollout, from_text=True)
    assert ppo.score(roles.reward, rollout, roles.args).tolist() == pytest.approx(expected, abs=1e-4)


def test_what_is_no_reward_model_is_one_line(base: Path, sft_run: Path, world: Path, tmp_path: Path) -> None:
    """Two scores, a classifier whose head is no `score`, an adapter without a head, a base, nothing at all."""
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    for name in ("two", "bert"):
        shutil.copytree(base, tmp_path / name)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).save_pretrained(tmp_path / "two")
    sizes: Any = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_labels": 1,
    }
    BertForSequenceClassification(BertConfig(vocab_size=600, **sizes)).save_pretrained(tmp_path / "bert")
    for folder, message in (
        (tmp_path / "two", "no run folder of reward.py, nor a model with one score"),
        (tmp_path / "bert", "no run folder of reward.py, nor a model with one score"),
        (sft_run, "no reward head; from reward.py?"),
        (base, "no run folder of reward.py, nor a model with one score"),
        (tmp_path / "absent", "absent"),
    ):
        with pytest.raises(ppo.UserError, match=message) as caught:
            load(sft_run, folder, world)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------- adapters
def test_new_adapters_of_a_bare_base_are_alike(base: Path, reward_file: str, world: Path) -> None:
    """A bare base: policy and critic get adapters on the same layers, new ones that change nothing yet."""
    roles = load(base, reward_file, world)
    policy, critic = roles.weights("policy"), roles.weights("critic")
    assert policy.keys() == critic.keys() and len(policy) == 2 * LINEAR_LAYERS
    rollout = roles.rollout()
    assert torch.allclose(roles.logprobs("policy", rollout), roles.logprobs("reference", rollout), atol=1e-6)


def test_a_relative_base_is_found_beside_the_run_folder(
    base: Path, sft_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders that move together stay together: "ckpt" is looked for from the run folder upwards, from any place."""
    shutil.copytree(base, tmp_path / "project" / "ckpt")
    folder = Path(shutil.copytree(sft_run, tmp_path / "project" / "runs" / "sft"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "ckpt"}))
    for place in (tmp_path, tmp_path / "project", folder):
        monkeypatch.chdir(place)
        assert ppo.find_base(str(folder)) == (str(tmp_path / "project" / "ckpt"), True)
        assert ppo.find_base(os.path.relpath(folder)) == (str(tmp_path / "project" / "ckpt"), True)


@pytest.mark.parametrize("kind", ["missing", "extra", "shape", "rank pattern"])
def test_an_adapter_that_does_not_fit_is_refused(kind: str, sft_run: Path, tmp_path: Path) -> None:
    """Weights that are missing, too many or of another size are one line, never a half-loaded adapter."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(sft_run, tmp_path / "sft")
    file = tmp_path / "sft" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    if kind == "missing":
        weights.pop(name)
    elif kind == "extra":
        weights["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)
    elif kind == "shape":
        weights[name] = torch.zeros(9, 9)
    else:
        config = tmp_path / "sft" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "rank_pattern": {"q_proj": 2}}))
    save_file(weights, file, {"format": "pt"})
    args = ppo.Args(model=str(tmp_path / "sft"))
    model, _, _, adapter = ppo.load_model(args, CPU)
    with pytest.raises(ppo.UserError, match=str(tmp_path / "sft")) as caught:
        ppo.add_adapter(model, "policy", adapter, args)
    assert "\n" not in str(caught.value)
