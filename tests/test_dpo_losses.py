"""The losses of dpo.py: against TRL, tests/reference_dpo.py and numbers worked by hand; their gradients and masks."""

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import reference_dpo as reference
import torch
from conftest import CPU, perturb, tiny_llama
from torch import Tensor, nn

import dpo

VOCAB, PAD, EOS = 61, 0, 1
LOG2 = math.log(2)
PAIRS = [name for name, loss in dpo.LOSSES.items() if loss.data == "pairs"]
ALL = pytest.mark.parametrize("loss", dpo.LOSSES)


# ------------------------------------------------------------------------------------------------------- builders
def make_args(loss: str, **flags: Any) -> dpo.Args:
    """Args with the loss's own beta and nll_coef filled in, as settle_loss leaves them."""
    kind = dpo.LOSSES[loss]
    settings: dict[str, Any] = {"loss": loss, "beta": kind.beta, "nll_coef": kind.nll_coef, "tokens_per_batch": 1024}
    return dpo.Args(**{**settings, **flags})


def make_example(prompt: list[int], responses: list[list[int]], ranks: list, wins: list[float] | None = None) -> dict:
    """An encoded example as encode_example gives it, with wins for labels."""
    example: dict = {"group": (prompt, responses), "ranks": ranks, "key": str(prompt)}
    return example if wins is None else {**example, "wins": wins}


def make_examples(loss: str, seed: int, n: int = 4) -> list[dict]:
    """n random prompts with what the loss takes: 2 to 4 ranked responses with ties, or one labelled; unequal lengths.

    The losses of labels get a pair too, as they do from preference data.
    """
    rng = random.Random(seed)

    def ids(longest: int) -> list[int]:
        return [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, longest))]

    labels = dpo.LOSSES[loss].data == "labels"
    examples = []
    for i in range(n):
        if labels and i:
            examples.append(make_example(ids(9), [ids(8)], [1], [float(i % 2)]))
        else:
            ranks = [1, 2] if labels else [2, 1, *(rng.randint(1, 3) for _ in range(rng.randint(0, 2)))]
            examples.append(make_example(ids(9), [ids(8) for _ in ranks], ranks))
    return examples


def stand_in() -> Any:
    """All that collate asks of a model: where it is and its type."""
    return SimpleNamespace(config=SimpleNamespace(model_type="llama"), device=CPU)


class Case(NamedTuple):
    """What preference_loss takes, in float64, with the same numbers as ragged lists."""

    logprobs: Tensor  # (S, T)
    batch: dpo.Preferences
    tokens: list[list[float]]
    ref_tokens: list[list[float]]

    def loss(self, args: Any, baseline: float = 0.0, logprobs: Tensor | None = None, **changed: Any) -> Tensor:
        """preference_loss, with other log-probs or some fields of the batch changed."""
        batch = self.batch._replace(**changed)
        return dpo.preference_loss(self.logprobs if logprobs is None else logprobs, batch, baseline, args)


def case_of(examples: list[dict], tokens: list[list[float]], ref_tokens: list[list[float]]) -> Case:
    """The case of given log-probs, a list of tokens per response."""
    (batch,) = dpo.collate(examples, stand_in(), make_args("sigmoid", tokens_per_batch=10**6))
    logprobs, ref_logprobs = torch.zeros(2, *batch.mask.shape, dtype=torch.float64)
    for s, (row, ref_row) in enumerate(zip(tokens, ref_tokens, strict=True)):
        logprobs[s, : len(row)] = torch.tensor(row, dtype=torch.float64)
        ref_logprobs[s, : len(ref_row)] = torch.tensor(ref_row, dtype=torch.float64)
    weight, share = (1 / (1 / x.double()).round() for x in (batch.weight, batch.share))  # 1/3 in float32 is not 1/3
    batch = batch._replace(weight=weight, share=share, wins=batch.wins.double())
    return Case(logprobs, batch._replace(ref_logprobs=ref_logprobs), tokens, ref_tokens)


def random_case(examples: list[dict], seed: int) -> Case:
    """Random log-probs for the examples' responses under the policy and under the reference."""
    rng = random.Random(seed)
    lengths = [len(y) for e in examples for y in e["group"][1]]
    tokens, ref_tokens = ([[-rng.uniform(0.05, 3) for _ in range(n)] for n in lengths] for _ in range(2))
    return case_of(examples, tokens, ref_tokens)


def pair_case(w: list[float], l: list[float], ref_w: list[float], ref_l: list[float]) -> Case:  # noqa: E741
    """One pair with given log-probs per token; the better response comes first."""
    return case_of([make_example([2], [[2] * len(w), [2] * len(l)], [1, 2])], [w, l], [ref_w, ref_l])


def h_case(*h: float, ranks: list | None = None, wins: list[float] | None = None) -> Case:
    """One prompt whose responses of one token have the log-ratios h; ranked in this order unless told otherwise."""
    example = make_example([2], [[2]] * len(h), ranks or list(range(1, len(h) + 1)), wins)
    return case_of([example], [[x - 20] for x in h], [[-20.0]] * len(h))


def gradient(case: Case, args: Any, **changed: Any) -> Tensor:
    """d loss / d log-probs (S, T)."""
    logprobs = case.logprobs.clone().requires_grad_()
    (result,) = torch.autograd.grad(case.loss(args, logprobs=logprobs, **changed), logprobs)
    return result


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny Llama with adapters policy and reference that visibly differ."""
    args, result = make_args("sigmoid", lora_r=4), tiny_llama(VOCAB, EOS, PAD)
    for seed, name in enumerate(("policy", "reference")):
        result = dpo.add_adapter(result, name, None, args)
        perturb(result, name, seed, 0.1)
    return result


def weights_of(model: Any, name: str) -> list[nn.Parameter]:
    """The tensors of one adapter."""
    return [p for key, p in model.named_parameters() if f".{name}." in key]


def with_reference(model: Any, batch: dpo.Preferences, args: Any, who: str = "reference") -> dpo.Preferences:
    """The batch with the log-probs of the role `who` as the reference's, where the loss has one."""
    if not dpo.LOSSES[args.loss].reference:
        return batch
    with dpo.role(model, who):
        return batch._replace(ref_logprobs=dpo.logprob_table(model, batch))


def run_pass(model: Any, examples: list[dict], args: Any, baseline: float = 0.3) -> tuple[Tensor, list[Tensor]]:
    """(preference_sums, the policy's gradients) of a batch, as main computes them; all is reset."""
    model.zero_grad()
    sums = torch.zeros(len(dpo.METRICS), 2)
    for row in dpo.collate(examples, model, args):
        row = with_reference(model, row, args)
        with dpo.role(model, "policy", grad=True):
            logprobs = dpo.logprob_table(model, row)
            loss = dpo.preference_loss(logprobs, row, baseline, args)
            (loss / len(examples)).backward()
        sums += dpo.preference_sums(loss.detach(), logprobs.detach(), row, args)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in weights_of(model, "policy")]
    model.zero_grad()
    assert any(g.any() for g in gradients) and all(g.isfinite().all() for g in gradients)
    return sums, gradients


def measured(model: Any, examples: list[dict], args: Any) -> dict[str, float]:
    """The metrics of `measure_preferences`, which has no gradients, in a single process."""
    return dpo.measure_preferences(model, examples, 0.0, alone(args))


def alone(args: Any) -> Any:
    """A run of a single process: sums over processes are its own."""
    return SimpleNamespace(args=args, rank=0, world=1, device=CPU, total=lambda *values: list(values))


@contextlib.contextmanager
def holding(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """The parameters have other values inside the block."""
    before = [p.detach().clone() for p in parameters]
    for p, value in zip(parameters, values, strict=True):
        p.data.copy_(value)
    yield
    for p, value in zip(parameters, before, strict=True):
        p.data.copy_(value)


def assert_same_pass(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]], tolerance: float) -> None:
    """Sums and gradients of two passes, relative to the largest value of each tensor."""
    for a, b in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3)


def plain_logprobs(model: Any, who: str, prompt: list[int], y: list[int]) -> Tensor:
    """(T, vocabulary) log-probs in the role `who`: the model's own forward pass of one response, without padding."""
    with dpo.role(model, who):
        logits = model(torch.tensor([prompt + y])).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


# ------------------------------------------------------------------------------------------------ against TRL 1.16
class Peer(NamedTuple):
    """A trainer of TRL and the batch that it collated from a data set of texts, with the token ids as our examples."""

    trainer: Any
    inputs: dict
    examples: list[dict]


def word_tokenizer() -> Any:
    """One token per word: w2, w3, ..., and the special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": PAD, "<end>": EOS, **{f"w{i}": i for i in range(2, VOCAB)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")


def text(rng: random.Random, n: int) -> str:
    """n random words, each with a space before it, so that a prompt's tokens are a prefix of the whole."""
    return "".join(f" w{rng.randrange(2, VOCAB)}" for _ in range(n))


def make_trainer(trainer_class: Any, config_class: Any, rows: dict, folder: Any, **settings: Any) -> Any:
    """A trainer of TRL on the tiny Llama with LoRA; the reference is TRL's adapter "ref", the policy moves away."""
    from datasets import Dataset

    peft = dpo.add_adapter(tiny_llama(VOCAB, EOS, PAD), "default", None, make_args("sigmoid", lora_r=4))
    perturb(peft, "default", 1, 0.1)  # of which TRL makes the copy "ref"
    config = config_class(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None,
        per_device_train_batch_size=8, **settings,
    )  # fmt: skip
    trainer = trainer_class(
        model=peft, args=config, train_dataset=Dataset.from_dict(rows), processing_class=word_tokenizer()
    )
    assert "ref" in peft.peft_config
    perturb(peft, "default", 2, 0.1)
    return trainer


@pytest.fixture(scope="module")
def trl_dpo(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    """DPOTrainer and four pairs of unequal lengths."""
    trl = pytest.importorskip("trl", reason="TRL, which the losses are compared with, is not installed")
    rng = random.Random(0)
    sizes = [(3, 4, 9), (7, 6, 2), (1, 1, 5), (5, 8, 3)]  # prompt, chosen, rejected
    columns = zip(*[[text(rng, n) for n in row] for row in sizes], strict=True)
    rows = dict(zip(("prompt", "chosen", "rejected"), columns, strict=True))
    trainer = make_trainer(trl.DPOTrainer, trl.DPOConfig, rows, tmp_path_factory.mktemp("trl"))
    data = list(trainer.train_dataset)
    examples = [make_example(e["prompt_ids"], [e["chosen_ids"], e["rejected_ids"]], [1, 2]) for e in data]
    lengths = [[len(e["group"][0]), *map(len, e["group"][1])] for e in examples]
    assert lengths == [[p, c + 1, r + 1] for p, c, r in sizes]  # TRL adds the end
    return Peer(trainer, trainer.data_collator(data), examples)


def policy_gradients(model: Any, loss: Tensor) -> list[Tensor]:
    """Gradients of the adapter "default"."""
    parameters = weights_of(model, "default")
    return [g.clone() for g in torch.autograd.grad(loss, parameters)]


def our_loss(peer: Peer, args: Any, baseline: float = 0.0) -> tuple[float, list[Tensor]]:
    """(loss, gradients) of the peer's examples: the reference's log-probs, collate, the role, preference_loss."""
    model, examples = peer.trainer.model, peer.examples
    (batch,) = dpo.collate(examples, model, args)
    batch = with_reference(model, batch, args, "ref")
    with dpo.role(model, "default", grad=True):
        loss = dpo.preference_loss(dpo.logprob_table(model, batch), batch, baseline, args) / len(examples)
        return loss.item(), policy_gradients(model, loss)


def trl_loss(peer: Peer) -> tuple[float, list[Tensor]]:
    """(loss, gradients) of TRL's own _compute_loss."""
    model = peer.trainer.model
    with dpo.role(model, "default", grad=True):
        loss = peer.trainer._compute_loss(model, peer.inputs, False)
        return loss.item(), policy_gradients(model, loss)


def assert_same_as_trl(ours: tuple[float, list[Tensor]], theirs: tuple[float, list[Tensor]]) -> None:
    """The loss to 1e-5, and the gradients of the LoRA tensors to 1e-5 of the largest of all."""
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-5)
    largest = max(g.abs().max() for g in theirs[1])
    assert largest > 1e-3
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert (a - b).abs().max() <= 1e-5 * largest


TRL_CASES: list[tuple[str, dict, dict]] = [  # our loss, our flags, TRL's settings
    ("sigmoid", {}, {"loss_types": ["sigmoid"]}),
    ("sigmoid", {"beta": 0.5}, {"loss_types": ["sigmoid"], "beta": 0.5}),
    ("hinge", {}, {"loss_types": ["hinge"]}),
    ("ipo", {"beta": 0.1}, {"loss_types": ["ipo"]}),
    ("nca", {}, {"loss_types": ["nca_pair"]}),
    ("robust", {}, {"loss_types": ["robust"]}),
    ("robust", {"label_smoothing": 0.2}, {"loss_types": ["robust"], "label_smoothing": 0.2}),
    ("bco", {}, {"loss_types": ["bco_pair"]}),  # TRL has no shift: 0
    ("sppo", {}, {"loss_types": ["sppo_hard"]}),
    ("apo_zero", {}, {"loss_types": ["apo_zero"]}),
    ("apo_down", {}, {"loss_types": ["apo_down"]}),
    ("ld", {"ld_alpha": 0.3}, {"loss_types": ["sigmoid"], "ld_alpha": 0.3}),
    ("ld", {"ld_alpha": 0.0}, {"loss_types": ["sigmoid"], "ld_alpha": 0.0}),
    ("ld", {"ld_alpha": 1.0}, {"loss_types": ["sigmoid"], "ld_alpha": None}),  # plain DPO
    *(
        (loss, {"f_divergence": ours, **alpha}, {"loss_types": [loss], "f_divergence_type": theirs, **coef})
        for loss in ("sigmoid", "hinge", "robust")
        for ours, theirs, alpha, coef in (
            ("reverse_kl", "reverse_kl", {}, {}),
            ("forward_kl", "forward_kl", {}, {}),
            ("js", "js_divergence", {}, {}),
            ("alpha", "alpha_divergence", {"f_alpha": 0.3}, {"f_alpha_divergence_coef": 0.7}),  # c = 1 - alpha
            ("alpha", "alpha_divergence", {"f_alpha": 0.0}, {"f_alpha_divergence_coef": 1.0}),
        )
    ),
]


@pytest.mark.parametrize(("loss", "flags", "settings"), TRL_CASES)
def test_dpo_family_equals_trl(
    loss: str, flags: dict, settings: dict, trl_dpo: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end, from token ids to loss and LoRA gradient, through TRL's own collator and _compute_loss."""
    for name, value in {"beta": 0.1, **settings}.items():
        monkeypatch.setattr(trl_dpo.trainer, name, value)
    assert_same_as_trl(our_loss(trl_dpo, make_args(loss, **flags)), trl_loss(trl_dpo))


def test_trl_cases_visibly_differ(trl_dpo: Peer) -> None:
    """The comparison above can fail: on this batch the losses of the family are all different numbers."""
    args = [make_args(loss, **flags) for loss, flags, _ in TRL_CASES if "f_divergence" not in flags]
    args += [make_args("sigmoid", f_divergence=name, f_alpha=0.3) for name in ("forward_kl", "js", "alpha")]
    losses = sorted(our_loss(trl_dpo, a)[0] for a in args)
    gaps = [b - a for a, b in zip(losses, losses[1:], strict=False)]
    assert sum(gap < 1e-4 for gap in gaps) == 2  # robust without smoothing and ld with weight 1 are sigmoid


@pytest.mark.parametrize("batch", ["one example", "equal lengths"])
def test_nll_equals_trl_sft_where_the_means_agree(batch: str, trl_dpo: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """--nll_coef is TRL's loss type sft with that weight for a batch of one and for chosen responses of one length."""
    examples = trl_dpo.examples[:1]
    if batch == "equal lengths":
        examples = [make_example(e["group"][0], [e["group"][1][0][:2], e["group"][1][1]], [1, 2]) for e in examples]
        examples += [make_example([4, 5, 6], [[7, 8], [9, 10, 11]], [1, 2])]
    rows = [
        {"prompt_ids": e["group"][0], "chosen_ids": e["group"][1][0], "rejected_ids": e["group"][1][1]}
        for e in examples
    ]
    peer = Peer(trl_dpo.trainer, trl_dpo.trainer.data_collator(rows), examples)
    for name, value in {"beta": 0.1, "loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}.items():
        monkeypatch.setattr(peer.trainer, name, value)
    assert_same_as_trl(our_loss(peer, make_args("sigmoid", nll_coef=0.7)), trl_loss(peer))


def test_nll_is_the_mean_over_prompts_of_the_mean_per_token(trl_dpo: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """RPO (Pang et al. 2024) divides by |y_w| of each example; TRL takes the mean over all chosen tokens of the batch.

    So with unequal lengths the two differ; each is recomputed here from the same log-probs.
    """
    model, trainer = trl_dpo.trainer.model, trl_dpo.trainer
    for name, value in {"beta": 0.1, "loss_types": ["sft"], "loss_weights": [1.0]}.items():
        monkeypatch.setattr(trainer, name, value)
    pairs = [(e["group"][0], e["group"][1][0]) for e in trl_dpo.examples]
    chosen, lengths = dpo.response_logprobs(model, "default", pairs, make_args("sigmoid")), [len(y) for _, y in pairs]
    over_prompts = -sum(total / n for total, n in zip(chosen.tolist(), lengths, strict=True)) / len(pairs)
    over_tokens = -chosen.sum().item() / sum(lengths)
    ours = our_loss(trl_dpo, make_args("sigmoid", nll_coef=1.0))[0] - our_loss(trl_dpo, make_args("sigmoid"))[0]
    assert ours == pytest.approx(over_prompts, abs=1e-5)
    assert trl_loss(trl_dpo)[0] == pytest.approx(over_tokens, abs=1e-5)
    assert abs(over_prompts - over_tokens) > 1e-2


# --------------------------------------------------------------------------------------------- TRL's other trainers
@pytest.fixture(scope="module")
def trl_kto(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    """KTOTrainer and five labelled responses.

    TRL gives each prompt the response before it in the batch, mismatched_kl the one after it: our batch is reversed.
    """
    trl = pytest.importorskip("trl", reason="TRL, which the losses are compared with, is not installed")
    rng = random.Random(3)
    rows: dict[str, list] = {"prompt": [], "completion": [], "label": [True, False, False, True, False]}
    for n_prompt, n in [(3, 4), (7, 6), (1, 1), (5, 8), (2, 3)]:
        rows["prompt"].append(text(rng, n_prompt))
        rows["completion"].append(text(rng, n))
    trainer = make_trainer(trl.KTOTrainer, trl.KTOConfig, rows, tmp_path_factory.mktemp("trl"))
    data = list(trainer.train_dataset)
    examples = [make_example(e["prompt_ids"], [e["completion_ids"]], [1], [float(e["label"])]) for e in data]
    return Peer(trainer, trainer.data_collator(data), examples[::-1])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.7)])
@pytest.mark.parametrize("sign", [1, -1])
def test_kto_equals_trl(
    weights: tuple[float, float], sign: int, trl_kto: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, LoRA gradient and KL; with the roles exchanged the KL's estimate changes sign and is cut off at 0."""
    model = trl_kto.trainer.model
    settings = {"beta": 0.3, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    for name, value in settings.items():
        monkeypatch.setattr(trl_kto.trainer, name, value)
    args = make_args("kto", **settings)
    names = {"policy": "default", "reference": "ref"}
    monkeypatch.setattr(dpo, "response_logprobs", renamed(dpo.response_logprobs, names))
    own, theirs = (weights_of(model, name) for name in ("default", "ref"))
    policy, ref = ([p.detach().clone() for p in side] for side in (own, theirs))
    swapped = (ref, policy) if sign < 0 else (policy, ref)
    with holding(own, swapped[0]), holding(theirs, swapped[1]):
        kl = dpo.mismatched_kl(model, trl_kto.examples, alone(args))
        ours, trls = our_loss(trl_kto, args, kl), trl_loss(trl_kto)
        assert kl == pytest.approx(trl_kto.trainer._metrics["train"]["kl"][-1], rel=1e-5, abs=1e-5)
        assert_same_as_trl(ours, trls)
    assert (kl > 0.1) == (sign > 0) and kl >= 0


def renamed(function: Callable, names: dict[str, str]) -> Callable:
    """response_logprobs with the roles called by TRL's names."""

    def call(model: Any, who: str, *rest: Any) -> Any:
        return function(model, names.get(who, who), *rest)

    return call


def experimental(module: str, name: str, **attributes: Any) -> Any:
    """A trainer of trl.experimental without its __init__, with the attributes that its loss reads."""
    pytest.importorskip("trl", reason="TRL, which the losses are compared with, is not installed")
    trainer_class = getattr(pytest.importorskip(f"trl.experimental.{module}"), name)
    trainer = object.__new__(trainer_class)
    for key, value in {"accelerator": SimpleNamespace(device=CPU), **attributes}.items():
        setattr(trainer, key, value)
    return trainer


def six_pairs() -> tuple[Case, Tensor, Tensor]:
    """(case, log-probs (P, 2) of chosen and rejected, the same per token) of six pairs of unequal lengths."""
    rng = random.Random(7)
    responses = [[[2] * rng.randint(1, 9) for _ in range(2)] for _ in range(6)]
    case = random_case([make_example([2, i + 2], y, [1, 2]) for i, y in enumerate(responses)], 1)
    sums = torch.tensor([sum(row) for row in case.tokens], dtype=torch.float64).view(-1, 2)
    means = torch.tensor([sum(row) / len(row) for row in case.tokens], dtype=torch.float64).view(-1, 2)
    return case, sums, means


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("loss", "loss_type"), [("cpo", "sigmoid"), ("simpo", "simpo")])
def test_cpo_and_simpo_equal_trl(loss: str, loss_type: str, smoothing: float) -> None:
    """CPOTrainer.cpo_loss on the same log-probs, whole for cpo and per token for simpo."""
    case, sums, means = six_pairs()
    settings = {"beta": 1.7, "simpo_gamma": 0.6, "label_smoothing": smoothing}
    trainer = experimental("cpo", "CPOTrainer", loss_type=loss_type, alpha=0.0, **settings)
    losses, _, _ = trainer.cpo_loss(*(sums if loss == "cpo" else means).unbind(1))
    ours = case.loss(make_args(loss, **settings, nll_coef=0.0))
    assert ours.item() == pytest.approx(losses.sum().item(), rel=1e-5)


def test_orpo_equals_trl() -> None:
    """ORPOTrainer.odds_ratio_loss on the same log-probs per token; TRL subtracts what we add."""
    case, _, means = six_pairs()
    losses = experimental("orpo", "ORPOTrainer", beta=0.4).odds_ratio_loss(*means.unbind(1))[0]
    assert case.loss(make_args("orpo", beta=0.4, nll_coef=0.0)).item() == pytest.approx(-losses.sum().item(), rel=1e-5)


# -------------------------------------------------------------------------- what TRL has not: against the reference
BASELINE, SMOOTHING = 0.4, 0.15
FLAGS: dict[str, dict] = {
    "sigmoid": {"label_smoothing": SMOOTHING}, "bco": {}, "rdpo": {"length_alpha": 0.07},
    "sppo": {}, "lipo": {}, "plackett_luce": {},
}  # fmt: skip


def reference_loss(loss: str, case: Case, examples: list[dict], beta: float) -> float:
    """The sum over the prompts, by tests/reference_dpo.py."""
    total, first = 0.0, 0
    for e in examples:
        own = range(first, first + len(e["ranks"]))
        first += len(own)
        total += reference_of_prompt(
            loss, [case.tokens[i] for i in own], [case.ref_tokens[i] for i in own], e["ranks"],
            case.batch.wins[own].tolist(), beta,
        )  # fmt: skip
    return total


def reference_of_prompt(
    loss: str,
    tokens: list[list[float]],
    ref_tokens: list[list[float]],
    ranks: list,
    wins: list[float],
    beta: float,
) -> float:
    """The reference's loss of one prompt."""
    h = [reference.log_ratio(y, ref_y) for y, ref_y in zip(tokens, ref_tokens, strict=True)]
    n = [len(y) for y in tokens]

    def of_pair(w: int, l: int) -> float:  # noqa: E741
        if loss == "sigmoid":
            return reference.cdpo(h[w], h[l], beta, SMOOTHING)
        if loss == "bco":
            return reference.bco(h[w], h[l], beta, BASELINE)
        return reference.rdpo(h[w], h[l], n[w], n[l], beta, FLAGS["rdpo"]["length_alpha"])

    if loss == "sppo":
        return 2 / len(h) * sum(reference.sppo(x, p, beta) for x, p in zip(h, wins, strict=True))
    if loss == "lipo":
        return reference.lipo([beta * x for x in h], wins)
    if loss == "plackett_luce":
        return reference.plackett_luce(h, ranks, beta)
    return reference.mean_over_pairs(ranks, of_pair)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loss", FLAGS)
def test_losses_equal_the_reference(loss: str, seed: int) -> None:
    """Batches of prompts with 2 to 4 responses of unequal lengths and ties; to rounding (lengths and places: fp32)."""
    examples = make_examples(loss, seed, 5)
    case = random_case(examples, seed)
    ours = case.loss(make_args(loss, beta=0.6, **FLAGS[loss]), BASELINE).item()
    assert ours == pytest.approx(reference_loss(loss, case, examples, 0.6), rel=1e-7)


def test_sigmoid_with_smoothing_by_hand() -> None:
    """cDPO: beta 0.5, h = (3, 1): d = 1. -0.9 log sigma(1) - 0.1 log sigma(-1) = 0.9 * 0.3133 + 0.1 * 1.3133."""
    got = h_case(3, 1).loss(make_args("sigmoid", beta=0.5, label_smoothing=0.1)).item()
    assert got == pytest.approx(0.4133, abs=5e-5)


def test_robust_is_unbiased() -> None:
    """rDPO: the mean over labels of which a share e is wrong is the loss of the right labels."""
    right, wrong = h_case(3, 1), h_case(3, 1, ranks=[2, 1])
    robust, clean = make_args("robust", beta=0.5, label_smoothing=0.2), make_args("sigmoid", beta=0.5)
    mean = 0.8 * right.loss(robust) + 0.2 * wrong.loss(robust)
    assert mean.item() == pytest.approx(right.loss(clean).item(), abs=1e-12)


def test_rdpo_by_hand() -> None:
    """beta 0.1, h_w = 2 (4 tokens), h_l = -3 (1 token), alpha 0.2: 0.5 + 0.2 * 3 = 1.1; log(1 + e^-1.1) = 0.2873."""
    case = pair_case([-1.0, -1.0, -1.0, -1.0], [-4.0], [-1.5, -1.5, -1.5, -1.5], [-1.0])
    assert case.loss(make_args("rdpo", length_alpha=0.2)).item() == pytest.approx(0.2873, abs=5e-5)


def test_bco_shift_by_hand() -> None:
    """beta 0.5, h = (4, 2), shift 1: log(1 + e^-(2 - 1)) + log(1 + e^(1 - 1)) = 0.3133 + 0.6931."""
    assert h_case(4, 2).loss(make_args("bco", beta=0.5), 1.0).item() == pytest.approx(1.0064, abs=1e-4)


def test_sppo_soft_by_hand() -> None:
    """beta 0.5, p = (0.75, 0.25), h = (1, -1): (1 - 0.25 / 0.5)^2 + (-1 + 0.25 / 0.5)^2 = 0.25 + 0.25."""
    case = h_case(1, -1, wins=[0.75, 0.25])
    assert case.loss(make_args("sppo", beta=0.5)).item() == pytest.approx(0.5, abs=1e-12)


def test_lipo_by_hand() -> None:
    """Three responses, psi = (1, 0.5, 0), s = (0, 1, -1): places 2, 1, 3.

    2^psi = 2, 1.4142, 1; 1/log(1 + place) = 0.9102, 1.4427, 0.7213.
    (1, 2): 0.5858 * 0.5325 * log(1 + e^1)  = 0.3119 * 1.3133 = 0.4097
    (1, 3): 1.0000 * 0.1889 * log(1 + e^-1) = 0.1889 * 0.3133 = 0.0592
    (2, 3): 0.4142 * 0.7213 * log(1 + e^-2) = 0.2988 * 0.1269 = 0.0379
    """
    got = h_case(0, 2, -2).loss(make_args("lipo", beta=0.5)).item()  # the ranks 1, 2, 3 win 1, 0.5 and 0
    assert got == pytest.approx(0.5068, abs=2e-4)


def test_plackett_luce_by_hand() -> None:
    """beta 1, e^h = (2, 1, 3) ranked 1, 2, 3: 2/6 * 1/4 * 1 = 1/12."""
    case = h_case(math.log(2), 0.0, math.log(3))
    assert case.loss(make_args("plackett_luce", beta=1.0)).item() == pytest.approx(math.log(12), abs=1e-12)


def test_plackett_luce_of_two_is_dpo() -> None:
    """Two responses: -log e^(r_w) / (e^(r_w) + e^(r_l)) = -log sigma(r_w - r_l)."""
    case = h_case(1.3, -0.4)
    assert case.loss(make_args("plackett_luce")).item() == pytest.approx(case.loss(make_args("sigmoid")).item())


# ------------------------------------------------------------------------------- at the start: policy == reference
START: list[tuple[str, dict, float]] = [  # loss, flags, its value for one pair of 3 and 5 tokens at beta 0.1
    ("sigmoid", {}, LOG2),
    ("sigmoid", {"label_smoothing": 0.2}, LOG2),
    *(("sigmoid", {"f_divergence": name}, LOG2) for name in ("forward_kl", "js", "alpha")),
    ("robust", {"label_smoothing": 0.2}, LOG2),  # (0.8 - 0.2) log 2 / (1 - 0.4)
    ("ipo", {}, 1.0),  # (1 / (2 * 0.5))^2
    ("hinge", {}, 1.0),
    ("nca", {}, 2 * LOG2),
    ("apo_zero", {}, 1.0),
    ("apo_down", {}, 1.0),
    ("sppo", {}, 50.0),  # (0.5 / 0.1)^2 twice
    ("bco", {}, 2 * LOG2),
    ("rdpo", {"length_alpha": 0.5}, math.log(1 + math.e)),  # alpha (3 - 5) = -1
    ("ld", {}, LOG2),
    ("kto", {"desirable_weight": 3.0}, 1.0),  # (3 * 0.5 + 0.5) / 2
    ("lipo", {}, (1 / math.log(2) - 1 / math.log(3)) * LOG2),
    ("plackett_luce", {}, LOG2),
]


@pytest.mark.parametrize(("loss", "flags", "expected"), START)
def test_loss_at_the_start(loss: str, flags: dict, expected: float, model: Any) -> None:
    """On a real model whose policy has the reference's weights."""
    examples = [make_example([5, 6], [[7, 8, 9], [10, 11, 12, 13, 14]], [1, 2])]
    reference_weights = [p.detach().clone() for p in weights_of(model, "reference")]
    args = make_args(loss, **flags)
    with holding(weights_of(model, "policy"), reference_weights):
        metrics = measured(model, examples, args)
        assert dpo.mismatched_kl(model, make_examples("kto", 1), alone(args)) == pytest.approx(0, abs=1e-5)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert [metrics[k] for k in ("chosen_reward", "rejected_reward", "margin", "ref_kl")] == pytest.approx(
        [0] * 4, abs=1e-5
    )
    assert abs(measured(model, examples, args)["loss"] - expected) > 1e-3  # and nothing else gives these numbers


def test_every_loss_with_a_reference_is_tested_at_the_start() -> None:
    """START has each of them."""
    assert {loss for loss, _, _ in START} == {name for name, loss in dpo.LOSSES.items() if loss.reference}


@pytest.mark.parametrize(("loss", "expected"), [("plackett_luce", math.log(6)), ("sppo", 100 / 3)])
def test_lists_at_the_start(loss: str, expected: float) -> None:
    """Three responses: one of 3! rankings; sppo with p = 1, 1/2, 0: (25 + 0 + 25) * 2/3."""
    assert h_case(0, 0, 0).loss(make_args(loss)).item() == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------------- metrics
def metrics_of(case: Case, args: Any) -> dict[str, float]:
    """preference_metrics of one micro-batch, fp32 as in a run; the loss is given as 0."""
    fields = ("ref_logprobs", "weight", "share", "wins")
    batch = case.batch._replace(**{name: getattr(case.batch, name).float() for name in fields})
    sums = dpo.preference_sums(torch.zeros(()), case.logprobs.float(), batch, args)
    return dpo.preference_metrics(sums, alone(args))


@ALL
def test_swapped_preferences_mirror_the_metrics(loss: str) -> None:
    """chosen_* and rejected_* exchange, the margin changes its sign, accuracy becomes 1 - accuracy."""
    examples = make_examples(loss, 5, 6)
    swapped = [{**e, "ranks": [-r for r in e["ranks"]]} for e in examples]
    swapped = [{**e, "wins": [1 - w for w in e["wins"]]} if "wins" in e else e for e in swapped]
    args = make_args(loss)
    one, other = (metrics_of(random_case(side, 1), args) for side in (examples, swapped))
    for key, value in one.items():
        partner = key.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected")
        expected = {"margin": -value, "accuracy": 1 - value}.get(key, value)
        assert other[partner] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert abs(one["margin"]) > 1e-3 and abs(one["chosen_length"] - one["rejected_length"]) > 1e-3


def test_metrics_by_hand() -> None:
    """Two prompts: a pair (h = 4, 2; 2 tokens and 1), and three responses ranked 1, 2, 2 with h = 0, 1, 0; beta 0.5.

    Pairs of the second prompt: (0, 1) lost, (0, 0) a tie: half of 1/2. Rewards there: chosen 0, rejected 1/2 * 0.5.
    """
    examples = [make_example([2], [[2, 2], [2]], [1, 2]), make_example([3], [[2], [2], [2]], [1, 2, 2])]
    case = case_of(
        examples, [[-1.0, -3.0], [-1.0], [-2.0], [-1.0], [-2.0]], [[-4.0, -4.0], [-3.0], [-2.0], [-2.0], [-2.0]]
    )
    got = metrics_of(case, make_args("sigmoid", beta=0.5))
    expected = {
        "chosen_reward": (2 + 0) / 2, "rejected_reward": (1 + 0.25) / 2, "margin": 1 - 0.625,
        "chosen_logprob": (-4 - 2) / 2, "rejected_logprob": (-1 - 1.5) / 2,
        "chosen_length": 1.5, "rejected_length": 1.0, "accuracy": (1 + 0.25) / 2,
        # e^d - 1 - d per token, d = 3, 1 | 2 | 0 | 1 | 0: 16.0855 + 0.7183 | 4.3891 | 0 | 0.7183 | 0
        "ref_kl": ((16.8038 + 4.3891) / 2 + 0.7183 / 3) / 2,
    }  # fmt: skip
    assert {k: got[k] for k in expected} == pytest.approx(expected, abs=1e-4)


def test_metrics_of_labels() -> None:
    """chosen_* are the means of the liked responses, rejected_* of the others; no pairs: no accuracy, not 0."""
    examples = [make_example([i], [[2] * n], [1], [w]) for i, n, w in ((2, 1, 1.0), (3, 2, 0.0), (4, 3, 1.0))]
    case = case_of(examples, [[-1.0], [-1.0, -1.0], [-2.0] * 3], [[-2.0], [-3.0, -3.0], [-1.0] * 3])
    got = metrics_of(case, make_args("kto", beta=1.0))
    assert got["chosen_reward"] == pytest.approx((1 - 3) / 2) and got["rejected_reward"] == pytest.approx(4)
    assert got["chosen_length"] == pytest.approx(2) and got["rejected_length"] == pytest.approx(2)
    assert got["chosen_logprob"] == pytest.approx(-3.5) and got["rejected_logprob"] == pytest.approx(-2)
    assert math.isnan(got["accuracy"])
    all_liked = case._replace(batch=case.batch._replace(wins=torch.ones(3)))
    assert math.isnan(metrics_of(all_liked, make_args("kto"))["rejected_reward"])


# ----------------------------------------------------------------------------------------------------------- masks
@ALL
def test_no_gradient_inside_a_prompt(loss: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only hidden states that predict a token of a response get a gradient: no inside of a prompt, no last token."""
    states: list[tuple[Tensor, dpo.Row]] = []
    inner = dpo.hidden_states

    def hidden_states(model: Any, row: dpo.Row) -> Tensor:
        hidden = inner(model, row)
        if hidden.requires_grad:
            hidden.retain_grad()
            states.append((hidden, row))
        return hidden

    monkeypatch.setattr(dpo, "hidden_states", hidden_states)
    run_pass(model, make_examples(loss, 2), make_args(loss))
    hidden, row = states[0]
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    used = torch.zeros(len(row.ids), dtype=torch.bool)
    used[row.before] = True
    reached = hidden.grad.abs().sum(1) > 0
    assert not reached[~used].any() and reached.any() and not used.all()


@ALL
def test_padded_log_probs_have_no_gradient(loss: str) -> None:
    """d loss / d log-probs (S, T) is exactly 0 where the mask is 0, and finite everywhere."""
    case = random_case(make_examples(loss, 2), 2)
    got, mask = gradient(case, make_args(loss, nll_coef=0.3), baseline=0.3), case.batch.mask.bool()
    assert (~mask).any() and got.isfinite().all() and got[mask].any()
    assert not got[~mask].any()


def in_fp32(case: Case) -> Case:
    """The case as a run has it."""
    return case._replace(
        logprobs=case.logprobs.float(),
        batch=case.batch._replace(ref_logprobs=case.batch.ref_logprobs.float()),
    )


def finite_far_away(args: Any) -> bool:
    """Whether loss and gradient are finite in float32 at log-ratios of (300, -300) and (-300, 300)."""
    near, far = [-0.5], [-300.5]
    cases = [in_fp32(pair_case(*rows)) for rows in ((near, far, far, near), (far, near, near, far))]
    return all(
        case.loss(args, 0.3).isfinite() and gradient(case, args, baseline=0.3).isfinite().all() for case in cases
    )


@ALL
def test_far_from_the_reference_all_is_finite(loss: str) -> None:
    """Log-ratios of hundreds of nats, as whole responses reach them; one NaN in a gradient ends a run."""
    assert finite_far_away(make_args(loss))


@pytest.mark.parametrize("divergence", ["js", "forward_kl", "alpha"])
@pytest.mark.parametrize("loss", dpo.DIVERGENT)
def test_far_from_the_reference_divergences_are_finite(loss: str, divergence: str) -> None:
    """The same under each divergence."""
    assert finite_far_away(make_args(loss, f_divergence=divergence))


def test_orpo_of_a_certain_response_is_finite() -> None:
    """Log-probs of exactly 0 (p = 1, infinite odds), as memorised responses have them in float32."""
    for w, l in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)):  # noqa: E741
        case = in_fp32(pair_case([w], [l], [0.0], [0.0]))
        assert case.loss(make_args("orpo")).isfinite() and gradient(case, make_args("orpo")).isfinite().all()


# ------------------------------------------------------------------------------------------------- rows of a batch
@ALL
def test_rows_change_nothing(loss: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 23: sums and gradients of a batch in one row, one prompt per row, and one response per row; unequal K."""
    examples, passes, counts = make_examples(loss, 6, 5), [], []
    inner = dpo.collate

    def collate(*given: Any) -> list[dpo.Preferences]:
        batches = inner(*given)
        counts.append([len(batch.rows) for batch in batches])
        return batches

    monkeypatch.setattr(dpo, "collate", collate)
    for limit in (10**6, 1):
        passes.append(run_pass(model, examples, make_args(loss, tokens_per_batch=limit)))
    monkeypatch.setattr(dpo, "FLAT_ROW_MODELS", ())
    passes.append(run_pass(model, examples, make_args(loss)))
    assert counts == [[1], [1] * 5, [len(e["ranks"]) for e in examples]]
    assert_same_pass(passes[1], passes[0], 2e-5)
    assert_same_pass(passes[2], passes[0], 2e-5)


def test_the_gradient_is_the_mean_over_prompts(model: Any) -> None:
    """Rows leave the gradient of the whole batch's preference_loss divided by n_prompts; the sums stay undivided."""
    examples, args = make_examples("sigmoid", 6, 5), make_args("sigmoid", tokens_per_batch=10**6)
    (batch,) = dpo.collate(examples, model, args)
    batch = with_reference(model, batch, args)
    with dpo.role(model, "policy", grad=True):
        loss = dpo.preference_loss(dpo.logprob_table(model, batch), batch, 0.0, args)
        expected = [g / 5 for g in torch.autograd.grad(loss, weights_of(model, "policy"))]
    sums, gradients = run_pass(model, examples, make_args("sigmoid", tokens_per_batch=40))
    assert_same_pass((sums[0, :1], gradients), (loss.detach().view(1), expected), 1e-5)


# ------------------------------------------------------------------------------------------------------- gradients
GRADCHECKS: list[tuple[str, dict]] = [
    *((loss, {}) for loss in dpo.LOSSES),
    *((loss, {"label_smoothing": 0.2}) for loss in dpo.SMOOTHED),
    *((loss, {"f_divergence": name}) for loss in dpo.DIVERGENT for name in ("forward_kl", "js", "alpha")),
    ("sigmoid", {"nll_coef": 0.5}),
    ("kto", {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
]


@pytest.mark.parametrize(("loss", "flags"), GRADCHECKS)
def test_gradcheck(loss: str, flags: dict) -> None:
    """Autograd equals central differences in float64; at these numbers hinge is away from its kink, lipo from ties."""
    examples = make_examples(loss, 9)
    case = random_case(examples, 9)
    args = make_args(loss, **flags)
    if loss == "hinge":
        h = (case.logprobs - case.batch.ref_logprobs).sum(1)
        if "f_divergence" in flags:
            h = dpo.divergence_score(h, args.f_divergence, args.f_alpha)
        d = 1 - dpo.LOSSES[loss].beta * (h[case.batch.better] - h[case.batch.worse])
        assert (d.abs() > 1e-3).all() and (d > 0).any()
    real = case.batch.mask.bool()

    def of_real_tokens(values: Tensor) -> Tensor:
        return case.loss(args, 0.3, logprobs=torch.zeros(real.shape, dtype=torch.float64).masked_scatter(real, values))

    assert torch.autograd.gradcheck(of_real_tokens, case.logprobs[real].clone().requires_grad_())


# signs of d loss / d log pi(y_w), d loss / d log pi(y_l) at the start, where all log-ratios are 0
RISES_AND_FALLS = [name for name in PAIRS if name != "apo_down"] + ["sppo", "lipo", "plackett_luce"]


@pytest.mark.parametrize("loss", RISES_AND_FALLS)
def test_chosen_rises_and_rejected_falls(loss: str) -> None:
    """A step downhill from the start makes y_w likelier and y_l less likely."""
    case = pair_case([-1.0, -2.0], [-1.5, -1.5, -0.5], [-1.0, -2.0], [-1.5, -1.5, -0.5])
    slope = gradient(case, make_args(loss, nll_coef=0.0))
    assert (slope[0, :2] < 0).all() and (slope[1] > 0).all()


def test_apo_down_lowers_both() -> None:
    """beta 1: d/dr_w = sigma'(r_w) - sigma'(r_w - r_l), d/dr_l = sigma'(r_w - r_l).

    At the start (0, 0) the rejected falls and the chosen is left alone: 1/4 - 1/4. Once the margin is larger than the
    chosen's own reward, (0.5, -2), the chosen falls too: sigma'(0.5) - sigma'(2.5) = 0.2350 - 0.0701 = 0.1649.
    """
    args = make_args("apo_down", beta=1.0)
    assert gradient(h_case(0, 0), args)[:, 0].tolist() == pytest.approx([0.0, 0.25], abs=1e-12)
    assert gradient(h_case(0.5, -2), args)[:, 0].tolist() == pytest.approx([0.1649, 0.0701], abs=5e-5)
    chosen, rejected = gradient(h_case(0.5, -2), make_args("apo_zero", beta=1.0))[:, 0].tolist()
    assert chosen < 0 < rejected  # where apo_zero raises it


def test_apo_down_falls_together() -> None:
    """With the margin held, the loss grows in the chosen's reward: sigma(r_w) + 1 - sigma(margin)."""
    args = make_args("apo_down", beta=1.0)
    losses = [h_case(r, r - 0.7).loss(args).item() for r in (-1.0, 0.0, 1.0)]
    assert losses == sorted(losses) and losses[0] < losses[-1]
    sums = gradient(h_case(0.3, -0.4), args).sum().item()
    assert sums == pytest.approx(reference.sigma(0.3) * (1 - reference.sigma(0.3)), abs=1e-12)


@pytest.mark.parametrize("h", [-2.0, 0.0, 2.0])
def test_kto_signs(h: float) -> None:
    """A liked response rises, the other falls, by the same amount at equal weights: sigma' is even."""
    up, down = (gradient(h_case(h, wins=[w]), make_args("kto"), baseline=0.5).item() for w in (1.0, 0.0))
    assert up < 0 < down and up == pytest.approx(-down)


def test_ipo_and_sppo_stop_at_their_target() -> None:
    """The gradient changes its sign at h_w - h_l = 1 / (2 tau), and at h = (p - 1/2) / beta."""
    for margin, sign in ((4.9, -1), (5.1, 1)):
        assert math.copysign(1, gradient(h_case(margin, 0), make_args("ipo", beta=0.1))[0].item()) == sign
        assert math.copysign(1, gradient(h_case(margin, 0), make_args("sppo"))[0].item()) == sign


def test_nca_keeps_the_chosen_reward_from_running_away() -> None:
    """d/dr_w = -sigma(-r_w) + sigma(r_w) / 2 is 0 at sigma(r_w) = 2/3, r_w = log 2, whatever r_l is."""
    args = make_args("nca", beta=1.0)
    assert gradient(h_case(LOG2, -3), args)[0].item() == pytest.approx(0, abs=1e-12)
    assert gradient(h_case(LOG2 - 0.1, 3), args)[0].item() < 0 < gradient(h_case(LOG2 + 0.1, 3), args)[0].item()


# ---------------------------------------------------------------------------------------------------- K responses
@pytest.mark.parametrize("loss", PAIRS)
def test_a_list_is_the_mean_of_its_pairs(loss: str) -> None:
    """Ranks 2, 1, 3, 2: five pairs, the tie forms none; each pair alone gives its loss: each prompt counts 1."""
    ranks = [2, 1, 3, 2]
    examples = [make_example([2, 3], [[2] * n for n in (3, 1, 5, 2)], ranks)]
    case = random_case(examples, 4)
    args = make_args(loss, nll_coef=0.3)
    pairs, losses = [(1, 0), (1, 2), (1, 3), (0, 2), (3, 2)], []
    assert sorted(pairs) == dpo.better_pairs(ranks)
    for i, j in pairs:
        pair = pair_case(case.tokens[i], case.tokens[j], case.ref_tokens[i], case.ref_tokens[j])
        losses.append(pair.loss(args, 0.3).item())
    assert case.loss(args, 0.3).item() == pytest.approx(sum(losses) / 5, rel=1e-9)
    assert max(losses) - min(losses) > 1e-3


def test_list_of_pairs_by_hand() -> None:
    """hinge, beta 0.1, ranks 1, 2, 2, h = 5, 3, -5: pairs 1 - 0.2 and 1 - 1; mean 0.4; the chosen NLL counts once.

    The log-prob of the chosen is -15: 0.4 + 0.1 * 15.
    """
    case = h_case(5, 3, -5, ranks=[1, 2, 2])
    assert case.loss(make_args("hinge")).item() == pytest.approx(0.4, abs=1e-9)
    assert case.loss(make_args("hinge", nll_coef=0.1)).item() == pytest.approx(1.9, abs=1e-9)


def test_nll_of_labels_is_that_of_the_liked() -> None:
    """kto with --nll_coef: only the liked response's NLL per token is added; log-prob -15 over one token."""
    examples = [make_example([2], [[2]], [1], [1.0]), make_example([3], [[2]], [1], [0.0])]
    case = case_of(examples, [[-15.0], [-7.0]], [[-15.0], [-7.0]])
    assert case.loss(make_args("kto", nll_coef=0.1)).item() == pytest.approx(0.5 + 0.5 + 1.5, abs=1e-9)


def test_win_shares_by_hand() -> None:
    """Ranks 1, 2, 2, 4: the best beats 3 of 3; the tied ones one, and half of each other: 1.5 / 3; the last none."""
    assert dpo.win_shares([1, 2, 2, 4]) == pytest.approx([1, 0.5, 0.5, 0])
    assert dpo.win_shares([1, 2]) == [1, 0]


def test_collate_by_hand() -> None:
    """Two prompts, ranks (2, 1, 2) and (1, 2): pairs, weights, shares, wins and numbers of the responses."""
    examples = [make_example([2], [[2], [3], [4]], [2, 1, 2]), make_example([3], [[5], [6]], [1, 2])]
    (batch,) = dpo.collate(examples, stand_in(), make_args("sigmoid"))
    assert list(zip(batch.better.tolist(), batch.worse.tolist(), strict=True)) == [(1, 0), (1, 2), (3, 4)]
    assert batch.weight.tolist() == [0.5, 0.5, 1] and batch.share.tolist() == pytest.approx([1 / 3] * 3 + [1 / 2] * 2)
    assert batch.wins.tolist() == [0.25, 1, 0.25, 1, 0] and batch.ranks.tolist() == [2, 1, 2, 1, 2]
    assert batch.prompt.tolist() == [0, 0, 0, 1, 1] and not batch.ref_logprobs.any()


# -------------------------------------------------------------------------------------------------- KTO's estimate
KEYS = ["a", "b", "b", "c", "c"]


def kl_batch() -> list[dict]:
    """Five examples, one with two responses; neighbours may have the same prompt's key."""
    rng = random.Random(8)
    sizes = [1, 2, 1, 1, 1]

    def ids() -> list[int]:
        return [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 6))]

    return [
        {**make_example(ids(), [ids() for _ in range(n)], list(range(n))), "key": key}
        for n, key in zip(sizes, KEYS, strict=True)
    ]


def test_mismatched_kl_equals_a_loop(model: Any) -> None:
    """Prompts take all responses of the next example with another key: 0 both of 1, 1 and 2 of 3, 3 and 4 of 0.

    With the roles exchanged every log-ratio changes its sign, so one of the two estimates is cut off at 0.
    """
    batch, args = kl_batch(), make_args("kto")
    ratios = []
    for k, other in ((0, 1), (1, 3), (2, 3), (3, 0), (4, 0)):
        for y in batch[other]["group"][1]:
            tables = [plain_logprobs(model, who, batch[k]["group"][0], y) for who in ("policy", "reference")]
            ratios.append(sum((tables[0] - tables[1])[t, token].item() for t, token in enumerate(y)))
    exact = sum(ratios) / len(ratios)
    assert len(ratios) == 6 and abs(exact) > 1e-2
    assert dpo.mismatched_kl(model, batch, alone(args)) == pytest.approx(max(exact, 0), abs=1e-5)
    policy, ref = (weights_of(model, who) for who in ("policy", "reference"))
    weights = [[p.detach().clone() for p in side] for side in (policy, ref)]
    with holding(policy, weights[1]), holding(ref, weights[0]):
        assert dpo.mismatched_kl(model, batch, alone(args)) == pytest.approx(max(-exact, 0), abs=1e-5)


def test_mismatched_kl_without_another_prompt_is_zero(model: Any) -> None:
    """One prompt only: there is nothing to mismatch, and no error."""
    batch = [{**e, "key": "same"} for e in kl_batch()]
    assert dpo.mismatched_pairs(batch) == [] and dpo.mismatched_kl(model, batch, alone(make_args("kto"))) == 0


def test_mismatched_pairs_by_hand() -> None:
    """Keys a, a, b: both a's take b's responses, b those of the next one round the corner."""
    batch = [
        {**make_example([i], [[10 + i], [20 + i]], [1, 2]), "key": key} for i, key in ((2, "a"), (3, "a"), (4, "b"))
    ]
    expected = [([2], [14]), ([2], [24]), ([3], [14]), ([3], [24]), ([4], [12]), ([4], [22])]
    assert dpo.mismatched_pairs(batch) == expected


# --------------------------------------------------------------------------------- divergences and label smoothing
@pytest.mark.parametrize(
    ("name", "alpha"), [("reverse_kl", 0.5), ("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.3), ("alpha", 0.9)]
)
def test_divergence_score_is_the_derivative_of_f(name: str, alpha: float) -> None:
    """score(log u) = f'(u) + a constant, f from the paper, f' by central differences."""
    offsets = []
    for u in (0.2, 0.7, 1.0, 1.8, 4.0):
        slope = (reference.divergence(name, u + 1e-5, alpha) - reference.divergence(name, u - 1e-5, alpha)) / 2e-5
        score = dpo.divergence_score(torch.tensor([math.log(u)], dtype=torch.float64), name, alpha).item()
        offsets.append(slope - score)
    assert offsets == pytest.approx([offsets[0]] * 5, abs=1e-7)


def test_alpha_divergence_joins_the_two_kls() -> None:
    """alpha -> 0 is reverse KL (and 0 itself, where the formula is 0 / 0), 1 forward KL."""
    h = torch.linspace(-3, 3, 13, dtype=torch.float64)
    reverse, forward = (dpo.divergence_score(h, name, 0.5) for name in ("reverse_kl", "forward_kl"))
    assert torch.allclose(dpo.divergence_score(h, "alpha", 1e-7), reverse, atol=1e-5)
    assert torch.equal(dpo.divergence_score(h, "alpha", 0.0), reverse)
    assert torch.allclose(dpo.divergence_score(h, "alpha", 1.0), forward, atol=1e-12)
    assert all((dpo.divergence_score(h, name, 0.5).diff() > 0).all() for name in ("forward_kl", "js", "alpha"))


def test_far_from_the_reference_a_score_still_has_a_gradient() -> None:
    """Forward KL goes on as a straight line below -20 nats: d/dh = e^20 there, e^-h above."""
    h = torch.tensor([-300.0, -21.0, -20.0, -1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(dpo.divergence_score(h, "forward_kl", 0.5).sum(), h)
    assert slope.tolist() == pytest.approx([math.exp(20), math.exp(20), math.exp(20), math.e])


def test_smoothed_dpo_wants_the_margin_of_the_labels() -> None:
    """cDPO's optimum is sigma(d) = 1 - e: the gradient vanishes at d = log((1 - e) / e) and not before."""
    args = make_args("sigmoid", beta=1.0, label_smoothing=0.2)  # log 4
    assert gradient(h_case(math.log(4), 0), args).abs().max() < 1e-12
    assert gradient(h_case(math.log(3.9), 0), args)[0].item() < 0 < gradient(h_case(math.log(4.1), 0), args)[0].item()


@pytest.mark.parametrize("loss", ["sigmoid", "simpo", "cpo"])
def test_labels_that_are_half_wrong_teach_nothing(loss: str) -> None:
    """e -> 0.5: the loss is the same for both orders of a pair."""
    args = make_args(loss, label_smoothing=0.5, nll_coef=0.0, simpo_gamma=0.0)
    case = pair_case([-1.0, -0.5], [-2.0, -1.0, -1.0], [-1.5, -1.0], [-0.5, -0.5, -1.0])
    other = pair_case(case.tokens[1], case.tokens[0], case.ref_tokens[1], case.ref_tokens[0])
    assert case.loss(args).item() == pytest.approx(other.loss(args).item(), abs=1e-12)
    assert (
        abs(case.loss(make_args(loss, nll_coef=0.0)).item() - other.loss(make_args(loss, nll_coef=0.0)).item()) > 1e-2
    )


def test_robust_near_a_half_grows_without_bound() -> None:
    """With l(-d) = l(d) + d the loss is l(d) - d e / (1 - 2e): at d = 1, e = 0.499 that is 0.3133 - 249.5."""
    got = h_case(1, 0).loss(make_args("robust", beta=1.0, label_smoothing=0.499)).item()
    assert got == pytest.approx(0.3133 - 0.499 / 0.002, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------- tables
def test_the_tables_agree() -> None:
    """Every loss can be chosen on the command line, in the same order, and the lists of options name losses only."""
    assert set(dpo.SMOOTHED) | set(dpo.DIVERGENT) <= set(dpo.LOSSES)
    assert {loss.data for loss in dpo.LOSSES.values()} == {"pairs", "labels", "lists"}


BELONGS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {  # flag: two values, the losses that it changes
    "label_smoothing": (0.0, 0.2, dpo.SMOOTHED),
    "length_alpha": (0.1, 0.3, ("rdpo",)),
    "ld_alpha": (0.2, 0.7, ("ld",)),
    "simpo_gamma": (0.2, 0.7, ("simpo",)),
    "desirable_weight": (1.0, 2.0, ("kto",)),
    "undesirable_weight": (1.0, 2.0, ("kto",)),
    "beta": (0.1, 0.3, tuple(dpo.LOSSES)),
    "nll_coef": (0.0, 0.5, tuple(dpo.LOSSES)),
}


@ALL
@pytest.mark.parametrize("flag", BELONGS)
def test_a_flag_changes_the_losses_that_it_belongs_to(flag: str, loss: str) -> None:
    """And no other."""
    one, other, members = BELONGS[flag]
    case = random_case(make_examples(loss, 11), 11)
    losses = [case.loss(make_args(loss, **{flag: value}), 0.3).item() for value in (one, other)]
    assert (abs(losses[0] - losses[1]) > 1e-6) == (loss in members)


@ALL
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_divergences_belong_to_divergent_losses(divergence: str, loss: str) -> None:
    """They change each of DIVERGENT; with any other the flags are refused before anything is computed."""
    args = make_args(loss, f_divergence=divergence)
    if loss not in dpo.DIVERGENT:
        with pytest.raises(dpo.UserError, match="--f_divergence has no part in"):
            dpo.settle_loss(args)
        return
    dpo.settle_loss(args)
    case = random_case(make_examples(loss, 11), 11)
    assert abs(case.loss(args).item() - case.loss(make_args(loss)).item()) > 1e-6


@ALL
def test_smoothing_is_refused_where_it_has_no_part(loss: str) -> None:
    """--label_smoothing with a loss that would ignore it is a mistake, and so is a half."""
    if loss in dpo.SMOOTHED:
        dpo.settle_loss(make_args(loss, label_smoothing=0.2))
    message = "below 0.5" if loss in dpo.SMOOTHED else "has no part in"
    with pytest.raises(dpo.UserError, match=message):
        dpo.settle_loss(make_args(loss, label_smoothing=0.5))


@ALL
def test_the_reference_matters_where_the_table_says_so(loss: str) -> None:
    """Other reference log-probs change the losses with `reference`, and no other."""
    case = random_case(make_examples(loss, 11), 11)
    other = case.batch._replace(ref_logprobs=case.batch.ref_logprobs * 0.5)
    losses = [case._replace(batch=batch).loss(make_args(loss), 0.3).item() for batch in (case.batch, other)]
    assert (abs(losses[0] - losses[1]) > 1e-6) == dpo.LOSSES[loss].reference
