"""overoptimization.py against enumeration, known curves, a real PPO run, and on the embedded world."""

import doctest
import json
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, read_jsonl, write_jsonl
from scipy import integrate

from eval import overoptimization
from eval.overoptimization import Args, UserError, best_of_n, best_of_n_kl, best_of_n_weights, fit_curve, gain_rl, peak

GRID = np.array([1, 2, 4, 8, 16])


def run_folder(folder: Path, d: np.ndarray, proxy: np.ndarray, gold: np.ndarray) -> str:
    """A run folder with a metrics.jsonl such as ppo.py writes; its keys besides these three do not matter."""
    folder.mkdir(parents=True)
    rows = [{"step": i, "score": float(p), "gold": float(g), "kl": float(x * x), "entropy": 1.0, "learning_rate": 0.1}
            for i, (x, p, g) in enumerate(zip(d, proxy, gold, strict=True))]  # fmt: skip
    write_jsonl(folder / "metrics.jsonl", rows)
    return str(folder)


def rl_curve(d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Gao's RL form, written another way: alpha d + beta d ln(1 / d)."""
    return np.array([alpha * x + beta * x * math.log(1 / x) if x else 0.0 for x in d])


def noisy_run(folder: Path, seed: int, noise: float, beta_noise: float = 0.0) -> str:
    """A run of 150 steps to d = 5; gold: alpha 1, beta 0.6, start 0.2, so its peak is at e^(1/0.6 - 1) = 1.948."""
    rng = np.random.default_rng(seed)
    d = np.linspace(0.0, 5.0, 150)
    gold = 0.2 + rl_curve(d, 1.0, 0.6 + rng.normal(0, beta_noise)) + rng.normal(0, noise, 150)
    return run_folder(folder, d, rl_curve(d, 1.2, 0.1) + rng.normal(0, noise, 150), gold)


def sample_rows(proxy: np.ndarray, gold: np.ndarray) -> list[dict]:
    """Rows of --samples from arrays (prompts, samples)."""
    return [{"id": f"q{k}", "prompt": f"Question {k}?", "response": f"r{i}", "score": float(p), "gold": float(g)}
            for k, pair in enumerate(zip(proxy, gold, strict=True))
            for i, (p, g) in enumerate(zip(*pair, strict=True))]  # fmt: skip


def from_rows(tmp_path: Path, rows: list, **flags: Any) -> dict[str, Any]:
    """main's result on --samples."""
    file = write_jsonl(tmp_path / "samples.jsonl", rows)
    return overoptimization.main(Args(**{"samples": str(file), "bootstrap": 50, **flags}), [])


def test_doctests() -> None:
    """The numbers in the docstrings."""
    result = doctest.testmod(overoptimization)
    assert result.attempted > 12 and not result.failed


# ------------------------------------------------------------------------------------------------------------ best of n
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_best_of_n_is_the_mean_over_all_subsets(n: int, ties: bool) -> None:
    """Enumeration of every subset of 7; among equal proxies each best one counts alike."""
    rng = np.random.default_rng(n)
    proxy = rng.integers(0, 3, 7).astype(float) if ties else rng.normal(size=7)
    gold = rng.normal(size=7)
    means = []
    for subset in combinations(range(7), n):
        best = [i for i in subset if proxy[i] == max(proxy[list(subset)])]
        means.append(np.mean(gold[best]))
    assert best_of_n(proxy, gold, n) == pytest.approx(np.mean(means), abs=1e-12)


def test_best_of_n_does_not_depend_on_order() -> None:
    """Shuffled samples give the same figure, ties included."""
    rng = np.random.default_rng(0)
    proxy, gold, order = rng.integers(0, 4, 20).astype(float), rng.normal(size=20), rng.permutation(20)
    assert best_of_n(proxy[order], gold[order], 6) == pytest.approx(best_of_n(proxy, gold, 6), abs=1e-12)


@pytest.mark.parametrize(("total", "n"), [(5, 5), (16, 1), (2000, 1000)])
def test_weights_are_a_distribution(total: int, n: int) -> None:
    """They sum to 1, and the largest of all is drawn with chance n / total; binomials beyond floats included."""
    weights = best_of_n_weights(total, n)
    assert weights.sum() == pytest.approx(1, abs=1e-9) and weights[-1] == pytest.approx(n / total, rel=1e-9)
    assert (weights[: n - 1] == 0).all()


@pytest.mark.parametrize("n", [2, 16, 300])
def test_kl_is_the_integral(n: int) -> None:
    """KL of the maximum of n uniforms against one: the integral of n u^(n-1) ln(n u^(n-1)) over [0, 1]."""
    density = lambda u: n * u ** (n - 1)  # noqa: E731
    value, _ = integrate.quad(lambda u: density(u) * math.log(density(u)) if density(u) > 0 else 0.0, 0, 1, limit=200)
    assert best_of_n_kl(np.array(n)) == pytest.approx(value, abs=1e-6)


def test_samples_recover_a_known_curve(tmp_path: Path) -> None:
    """Gold by rank such that its best-of-n gain is d (2 - 1.1 d) at every n: alpha, beta, peak and gap come back."""
    rng = np.random.default_rng(0)
    d = np.sqrt(np.log(GRID) - (GRID - 1) / GRID)
    weights = np.array([best_of_n_weights(16, n) for n in GRID])
    by_rank = np.linalg.pinv(weights) @ (d * (2 - 1.1 * d))
    order = np.array([rng.permutation(16) for _ in range(30)])
    level = rng.normal(size=(30, 1))  # prompts differ in how good their answers are
    result = from_rows(tmp_path, sample_rows(order, level + by_rank[order]))
    gold = result["gold"]
    assert [row["best_of"] for row in result["bins"]] == GRID.tolist()
    assert (gold["alpha"]["value"], gold["beta"]["value"]) == pytest.approx((2, 1.1), abs=1e-6)
    assert gold["peak"]["d"] == pytest.approx(2 / 2.2, abs=1e-6) and gold["peak"]["within_data"]
    assert gold["peak"]["gain"] == pytest.approx(2**2 / (4 * 1.1), abs=1e-6)
    assert gold["alpha"]["ci_low"] == pytest.approx(2, abs=1e-6)  # the same curve in every prompt: no error
    assert result["bins"][0]["gold"]["mean"] == pytest.approx(level.mean() + by_rank.mean())
    gain = {n: 17 * n / (n + 1) - 17 / 2 for n in (1, 16)}  # the largest of n of the numbers 1 .. 16
    assert result["end"]["proxy_gain"] == pytest.approx(gain[16] - gain[1])
    assert result["end"]["gap"] == pytest.approx(gain[16] - gain[1] - d[-1] * (2 - 1.1 * d[-1]))
    assert result["end"]["best_d"] == pytest.approx(d[2])  # of 0, 0.44, 0.80, 1.10, 1.35 the nearest to 0.909
    assert result["n_responses"] == 480


def test_unequal_counts(tmp_path: Path) -> None:
    """Prompts with too few responses are left out and counted, rows without a score too; --max_n decides."""
    rng = np.random.default_rng(0)
    rows = sample_rows(rng.normal(size=(9, 8)), rng.normal(size=(9, 8)))
    rows[0]["score"] = None  # q0 has 7 left
    rows[8]["gold"] = float("nan")
    result = from_rows(tmp_path, rows)
    assert result["lost"] == {"response without score or gold": 2, "prompt with fewer than 8 responses": 2}
    assert result["n_prompts"] == 7 and result["bins"][-1]["best_of"] == 8
    assert from_rows(tmp_path, rows, max_n=7)["n_prompts"] == 9
    assert [row["best_of"] for row in from_rows(tmp_path, rows, max_n=7)["bins"]] == [1, 2, 4, 7]


def test_gold_fn(tmp_path: Path) -> None:
    """--gold_fn scores rows without gold, by the one contract of such functions; rows with gold keep theirs."""
    file = tmp_path / "gold.py"
    file.write_text("def gold(prompts, responses, **columns):\n    return [float(r[1:]) for r in responses]\n")
    rows = sample_rows(np.tile(np.arange(4), (3, 1)), np.full((3, 4), 9.0))
    for row in rows[:8]:
        del row["gold"]
    result = from_rows(tmp_path, rows, gold_fn=f"{file}:gold")
    assert result["bins"][0]["gold"]["mean"] == pytest.approx((1.5 + 1.5 + 9) / 3)
    assert result["bins"][-1]["gold"]["mean"] == pytest.approx((3 + 3 + 9) / 3)


# ----------------------------------------------------------------------------------------------------------------- runs
def test_one_run_without_noise(tmp_path: Path) -> None:
    """alpha, beta, start and peak come back to 1e-6; the proxy's peak at e^11 is no peak seen."""
    result = overoptimization.main(Args(bootstrap=20), [noisy_run(tmp_path / "ppo", 0, 0.0)])
    gold, proxy = result["gold"], result["proxy"]
    assert [gold[k]["value"] for k in ("alpha", "beta", "start")] == pytest.approx([1, 0.6, 0.2], abs=1e-6)
    assert gold["peak"]["d"] == pytest.approx(math.exp(1 / 0.6 - 1), abs=1e-5) and gold["peak"]["within_data"]
    assert gold["peak"]["kl"] == pytest.approx(gold["peak"]["d"] ** 2)
    assert gold["peak"]["gain"] == pytest.approx(0.6 * gold["peak"]["d"], abs=1e-6)  # at the peak R = beta d
    assert gold["refits_within_data"] == 20
    assert proxy["peak"]["d"] == pytest.approx(math.exp(11), rel=1e-3) and not proxy["peak"]["within_data"]
    end = rl_curve(np.array([5.0]), 1.0, 0.6)[0]
    assert result["end"]["gold_gain"] == pytest.approx(end, abs=0.35)  # bins are an eighth of the range wide
    assert result["end"]["gold_lost_since_best"] > 0.8 and result["n_steps"] == 150


@pytest.mark.parametrize(
    ("alpha", "beta", "says"),
    [(0.3, -0.2, "no peak seen within the data (d up to 3.000); the curve has none"),
     (1.0, 0.25, "the curve's, extrapolated: d = 20.086"),
     (1.0, 1.0, "peak at d = 1.000 [1.000, 1.000], KL 1.000, where R = 1.000")],
)  # fmt: skip
def test_what_is_said_of_the_peak(
    alpha: float, beta: float, says: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Rising without an end, a peak beyond the data, a peak within."""
    d = np.linspace(0.1, 3.0, 60)
    curve = rl_curve(d, alpha, beta)
    result = overoptimization.main(Args(bootstrap=20), [run_folder(tmp_path / "ppo", d, curve, curve)])
    assert says in " ".join(capsys.readouterr().out.split())
    assert result["gold"]["peak"]["within_data"] == (says[:4] == "peak")
    assert "Infinity" not in (tmp_path / "ppo" / "overoptimization.json").read_text()


def test_intervals_of_one_run(tmp_path: Path) -> None:
    """Twice the noise, twice the interval; the truth lies inside; the peak's interval is around the peak."""
    widths = []
    for noise in (0.05, 0.1):
        folder = noisy_run(tmp_path / str(noise), 3, noise)
        gold = overoptimization.main(Args(bootstrap=300), [folder])["gold"]
        assert gold["beta"]["ci_low"] < 0.6 < gold["beta"]["ci_high"]
        assert gold["peak"]["ci_low"] < gold["peak"]["d"] < gold["peak"]["ci_high"]
        widths.append(gold["beta"]["ci_high"] - gold["beta"]["ci_low"])
    assert 1.6 < widths[1] / widths[0] < 2.4


def test_several_runs(tmp_path: Path) -> None:
    """Three seeds: the estimate is the mean of the three fits and its interval Student's t over them, by hand."""
    folders = [noisy_run(tmp_path / f"ppo.{k}", k, 0.02, 0.05) for k in range(3)]
    result = overoptimization.main(Args(bootstrap=20), folders)
    fits = []
    for folder in folders:
        rows = read_jsonl(Path(folder) / "metrics.jsonl")
        d, gold = (np.array([row[k] for row in rows]) for k in ("kl", "gold"))
        d = np.sqrt(d)
        design = np.column_stack([d, [-x * math.log(x) if x else 0.0 for x in d], np.ones(len(d))])
        fits.append(np.linalg.lstsq(design, gold, rcond=None)[0])
    betas, peaks = (np.array([f(fit) for fit in fits]) for f in (lambda x: x[1], lambda x: x[0] / x[1] - 1))
    half = 4.302653 * betas.std(ddof=1) / math.sqrt(3)  # t of 2 degrees of freedom
    beta = result["gold"]["beta"]
    assert [beta[k] for k in ("value", "ci_low", "ci_high")] == pytest.approx(
        [betas.mean(), betas.mean() - half, betas.mean() + half], abs=1e-5
    )
    low = math.exp(peaks.mean() - 4.302653 * peaks.std(ddof=1) / math.sqrt(3))
    assert result["gold"]["peak"]["ci_low"] == pytest.approx(low, rel=1e-4)
    assert result["n_runs"] == 3 and result["bins"][0]["gold"]["n"] == 3


def test_lost_steps_and_negative_kl(tmp_path: Path) -> None:
    """Steps without a figure are counted by what they lack; a KL estimate below 0 is d = 0 and counted."""
    folder = noisy_run(tmp_path / "ppo", 0, 0.0)
    rows = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")
    rows[1]["kl"] = -0.01
    del rows[2]["gold"]
    rows[3]["score"] = None
    write_jsonl(tmp_path / "ppo" / "metrics.jsonl", rows)
    result = overoptimization.main(Args(bootstrap=20), [folder])
    assert result["lost"] == {"step without gold": 1, "step without score": 1}
    assert result["steps_with_kl_below_0"] == 1 and result["n_steps"] == 148


def test_files(tmp_path: Path) -> None:
    """The result beside the input equals what main returns, a plot is drawn, a seed decides all."""
    folder = noisy_run(tmp_path / "ppo", 0, 0.1)
    result = overoptimization.main(Args(bootstrap=20, seed=5), [folder])
    assert json.loads((tmp_path / "ppo" / "overoptimization.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "ppo" / "overoptimization.png").read_bytes()[:4] == b"\x89PNG"
    again = overoptimization.main(Args(bootstrap=20, seed=5, output=str(tmp_path / "a" / "b.json")), [folder])
    assert again == result and (tmp_path / "a" / "b.png").is_file()
    other = overoptimization.main(Args(bootstrap=20, seed=6), [folder])
    assert other["gold"]["beta"]["ci_low"] != result["gold"]["beta"]["ci_low"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"metrics.jsonl: no rows"),
        ([{"step": 1, "score": 1, "kl": 0.1}], r"no step has gold; gold needs --gold_fn in the run; keys found: step"),
        ([{"step": 1, "loss": 1}], r"no step has kl, score, gold"),
        ([{"kl": 1, "score": 1, "gold": 1}] * 4, r"4 usable steps .* needs at least 5"),
        ([{"kl": 0, "score": 1, "gold": 1}] * 9, r"the KL is 0 at every step"),
        ([{"kl": 1, "score": "high", "gold": 1}] * 9, r"line 1: score is 'high'; expected a number or null"),
        ([{"kl": 1, "score": 1, "gold": 1}, '{"kl": 1, "sco'], r"line 2: not JSON, or half a line"),
    ],
)
def test_bad_runs(rows: list, message: str, tmp_path: Path) -> None:
    """One line: where, what, what to do."""
    (tmp_path / "ppo").mkdir()
    write_jsonl(tmp_path / "ppo" / "metrics.jsonl", rows)
    with pytest.raises(UserError, match=message):
        overoptimization.main(Args(), [str(tmp_path / "ppo")])


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"prompt": "Other?"}, {}, r"line 2: id q0 has another prompt than in line 1"),
        ({"score": True}, {}, r"line 2: score is True; expected a number"),
        ({}, {"max_n": 16}, r"0 prompts have 16 responses; lower --max_n"),
        ({}, {"max_n": 2}, r"--max_n 4"),
        ({}, {"bootstrap": 0}, r"--bootstrap must be at least 20"),
        ({}, {"gold_fn": "nowhere.py:gold"}, r"nowhere.py:gold: no such file"),
    ],
)
def test_bad_samples(change: dict, flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    """One line: where, what, what to do."""
    rows = sample_rows(np.random.default_rng(0).normal(size=(3, 4)), np.zeros((3, 4)))
    rows[1] |= change
    with pytest.raises(UserError, match=message):
        from_rows(tmp_path, rows, **flags)


def test_bad_calls(tmp_path: Path) -> None:
    """Folders and --samples together, one response per prompt, no such folder, two responses per prompt."""
    rows = sample_rows(np.zeros((3, 2)), np.zeros((3, 2)))
    with pytest.raises(UserError, match="give one of them"):
        overoptimization.main(Args(samples="a.jsonl"), ["runs/ppo"])
    with pytest.raises(UserError, match="found at most 1"):
        from_rows(tmp_path, rows[::2])
    with pytest.raises(UserError, match="needs at least 4"):
        from_rows(tmp_path, rows)
    with pytest.raises(UserError, match="no such file; name run folders"):
        overoptimization.main(Args(), [str(tmp_path / "nowhere")])


# ----------------------------------------------------------------------------------------------------------------- slow
@pytest.mark.slow
def test_coverage_of_one_run(capsys: pytest.CaptureFixture) -> None:
    """200 noisy runs: the block bootstrap's intervals cover beta and the peak about as often as they say."""
    d, hits = np.linspace(0.0, 5.0, 100), []
    truth = 0.2 + rl_curve(d, 1.0, 0.6)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        points = np.column_stack([d * d, truth, truth + rng.normal(0, 0.1, 100)])
        fit = overoptimization.from_runs([points], Args(bootstrap=150, seed=seed))["gold"]
        ends = (fit["beta"]["ci_low"], 0.6, fit["beta"]["ci_high"])
        peaks = (fit["peak"]["ci_low"], math.exp(1 / 0.6 - 1), fit["peak"]["ci_high"])
        hits.append([sorted(x) == list(x) for x in (ends, peaks)])
    with capsys.disabled():
        print(f"\n coverage of beta {np.mean(hits, 0)[0]:.3f}, of the peak {np.mean(hits, 0)[1]:.3f}")
    assert (
        np.mean(hits, 0) > 0.88
    ).all()  # seen: 0.990 and 0.930; blocks also draw another range of d, which widens beta


@pytest.mark.slow
def test_coverage_of_best_of_n(capsys: pytest.CaptureFixture) -> None:
    """200 draws of 60 prompts: intervals of alpha and beta cover the values of 20,000 prompts."""

    def draw(rng: np.random.Generator, n: int) -> list[np.ndarray]:
        proxy = rng.normal(size=(n, 16))
        gold = proxy - 0.35 * proxy**2 + rng.normal(size=(n, 16)) + rng.normal(size=(n, 1))
        return list(np.stack([proxy, gold], axis=2))

    def fitted(rng: np.random.Generator, n: int, **flags: Any) -> dict[str, Any]:
        return overoptimization.from_samples(draw(rng, n), overoptimization.Counter(), Args(**flags))["gold"]

    truth, hits = fitted(np.random.default_rng(0), 20000, bootstrap=20), []
    for seed in range(200):
        found = fitted(np.random.default_rng(seed + 1), 60, bootstrap=150, seed=seed)
        hits.append([found[k]["ci_low"] < truth[k]["value"] < found[k]["ci_high"] for k in ("alpha", "beta")])
    with capsys.disabled():
        print(f"\n coverage of alpha {np.mean(hits, 0)[0]:.3f}, of beta {np.mean(hits, 0)[1]:.3f}")
    assert (np.mean(hits, 0) > 0.9).all() and (np.mean(hits, 0) < 0.99).all()


@pytest.mark.slow
def test_real_ppo_run(run_ppo: Callable[..., Path]) -> None:
    """metrics.jsonl as ppo.py writes it, with gold: every step is used and the bins hold its figures."""
    folder = run_ppo(max_steps=6, gold_fn=f"{ROOT / 'tiny' / 'annotator.py'}:gold", learning_rate=1e-2)
    result = overoptimization.main(Args(bootstrap=20, bins=3), [str(folder)])
    rows = read_jsonl(folder / "metrics.jsonl")
    assert result["n_steps"] == len(rows) == 6 and not result["lost"]
    assert result["largest_d"] == pytest.approx(max(math.sqrt(max(row["kl"], 0)) for row in rows))
    means = [row["gold"]["mean"] * row["gold"]["n"] for row in result["bins"]]
    assert sum(means) == pytest.approx(sum(row["gold"] for row in rows))


@pytest.mark.slow
def test_best_of_n_on_the_embedded_world(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """tiny/reward picks among 16 responses of tiny/sft to 64 held-out prompts; the annotator's gold is the truth.

    The reward model knows more than chance (gold rises) but not all that gold is: its own score rises by more of its
    spread than gold does.
    """
    torch = pytest.importorskip("torch")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(ROOT / "tiny" / "sft", padding_side="left")
    policy: Any = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "base", dtype=torch.float32)
    policy = PeftModel.from_pretrained(policy, str(ROOT / "tiny" / "sft")).eval()
    reward = AutoModelForSequenceClassification.from_pretrained(ROOT / "tiny" / "base", num_labels=1)
    reward = PeftModel.from_pretrained(reward.float(), str(ROOT / "tiny" / "reward")).eval()
    torch.manual_seed(0)
    rows = []
    for row in read_jsonl(ROOT / "tiny" / "prompts_eval.jsonl")[:64]:
        messages = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            out = policy.generate(**ids, do_sample=True, top_k=0, max_new_tokens=60, num_return_sequences=16)
        for answer in tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True):
            whole = tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": answer.strip()}], tokenize=False
            )
            with torch.no_grad():
                score = reward(**tokenizer(whole.rstrip("\n"), return_tensors="pt")).logits.item()
            rows.append({**row, "response": answer.strip(), "score": score})
    gold_fn = f"{ROOT / 'tiny' / 'annotator.py'}:gold"
    result = from_rows(tmp_path, rows, gold_fn=gold_fn, bootstrap=200)
    one, best = result["bins"][0], result["bins"][-1]
    with capsys.disabled():
        print(f"\n best of 16: gold {one['gold']['mean']:.3f} -> {best['gold']['mean']:.3f}, proxy "
              f"{one['proxy']['mean']:.3f} -> {best['proxy']['mean']:.3f}; peak {result['gold']['peak']}")  # fmt: skip
    assert best["best_of"] == 16 and result["n_responses"] == 1024
    assert 0.1 < one["gold"]["mean"] < 0.45  # tiny/README.md: 0.21 to 0.31 over 256 prompts, +- 0.1
    proxies = [row["proxy"]["mean"] for row in result["bins"]]
    assert proxies == sorted(proxies) and proxies[-1] > proxies[0] + 0.5
    assert best["gold_gain"]["ci_low"] > 0.1 and best["gold"]["mean"] < 1.4  # the best gold there is


def test_gain_and_peak_agree() -> None:
    """The curve is nowhere higher than at peak(), for curves of either kind."""
    d = np.linspace(0, 10, 2001)
    for alpha, beta in ((1.0, 0.4), (0.2, 0.9), (-0.3, 0.5)):
        top = peak(alpha, beta, rl=True)
        assert gain_rl(d, alpha, beta).max() <= float(gain_rl(np.array(top), alpha, beta)) + 1e-12
        top = peak(alpha, beta, rl=False)
        values = overoptimization.gain_best_of_n(d, alpha, beta)
        assert values.max() <= float(overoptimization.gain_best_of_n(np.array(top), alpha, beta)) + 1e-12
    assert fit_curve(d, 0.5 + rl_curve(d, 0.7, 0.3), rl=True) == pytest.approx([0.7, 0.3, 0.5], abs=1e-6)
