"""Does RLHF work in the embedded world? One bare run by default; more seeds, no KL penalty, DPO, GRPO: slow."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import dpo
import grpo
import ppo

ON_THE_REWARD_MODEL = {"reward_model": str(ROOT / "tiny" / "reward"), "missing_eos_penalty": 1.0}


def held_out(folder: Path, model: str, key: str) -> np.ndarray:
    """`key` of every held-out response of `model` in a run's samples.jsonl."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return np.array([row[key] for row in rows if row["model"] == model])


def check_gold_rises(folder: Path) -> None:
    """The 95 % intervals of mean gold utility of SFT and PPO, computed here from the samples, do not touch."""
    before, after = held_out(folder, "sft", "gold"), held_out(folder, "ppo", "gold")
    assert len(before) == len(after) >= 200
    half = [1.96 * x.std(ddof=1) / np.sqrt(len(x)) for x in (before, after)]
    assert after.mean() - half[1] > before.mean() + half[0]
    result = json.loads((folder / "result.json").read_text())
    assert result["ppo"]["gold"][0] == pytest.approx(after.mean()) and result["gold_win_rate"][1] > 0.5


def test_ppo_raises_gold(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A dozen steps are enough to see it; whole runs with three seeds are slow tests."""
    ppo.main(ppo.Args(**ppo.TINY_SETTINGS, max_steps=12, output_dir=str(tmp_path / "ppo")))
    check_gold_rises(tmp_path / "ppo")
    printed = capsys.readouterr().out
    for label in ("gold ", "gold win-rate over SFT", "kl ", "length ", "entropy ", "ended ", "preflight: ok"):
        assert label in printed
    assert printed.count("\nbefore ") == printed.count("\nafter ") == 3
    assert (tmp_path / "ppo" / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gold_rises_with_the_kl_penalty_and_is_hacked_without(tmp_path: Path, seed: int) -> None:
    ppo.main(ppo.Args(**ppo.TINY_SETTINGS, seed=seed, output_dir=str(tmp_path / "kl")))
    check_gold_rises(tmp_path / "kl")
    ppo.main(
        ppo.Args(**{**ppo.TINY_SETTINGS, "epochs": 5.0}, seed=seed, kl_coef=0.0, output_dir=str(tmp_path / "free"))
    )
    score = [held_out(tmp_path / name, "ppo", "score").mean() for name in ("kl", "free")]
    gold = [held_out(tmp_path / name, "ppo", "gold").mean() for name in ("kl", "free")]
    assert score[1] > score[0] and gold[1] < gold[0] - 0.2, "without KL penalty: proxy up, gold down"
    assert gold[1] < held_out(tmp_path / "free", "sft", "gold").mean(), "and below where it started"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bare_dpo_raises_gold(tmp_path: Path, seed: int) -> None:
    """The annotator prefers the policy's held-out responses to SFT's: low end of the win-rate above 1/2."""
    output = str(tmp_path / "dpo")
    dpo.main(dpo.Args(**dpo.TINY_SETTINGS, seed=seed, output_dir=output))
    check_win_rate(tmp_path / "dpo", "dpo")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_online_dpo_raises_gold(tmp_path: Path, seed: int) -> None:
    """Samples of the policy, ranked by the reward model."""
    given: dict[str, Any] = {"method": "online_dpo", **ON_THE_REWARD_MODEL}
    grpo.main(grpo.Args(**grpo.TINY_SETTINGS, **given, seed=seed, output_dir=str(tmp_path / "online")))
    check_win_rate(tmp_path / "online", "grpo")


def check_win_rate(folder: Path, model: str) -> None:
    """The low end of the gold win-rate over SFT, computed here from the samples, is above 1/2."""
    before, after = (held_out(folder, name, "gold") for name in ("sft", model))
    assert len(before) == len(after) >= 200
    wins = np.sign(after - before) / 2 + 0.5
    assert wins.mean() - 1.96 * wins.std(ddof=1) / np.sqrt(len(wins)) > 0.5


def check_intervals_apart(folder: Path, key: str) -> None:
    """The 95 % intervals of the mean of `key`, SFT and GRPO, from the samples, do not touch."""
    before, after = (held_out(folder, model, key) for model in ("sft", "grpo"))
    assert len(before) == len(after) >= 200
    half = [1.96 * x.std(ddof=1) / np.sqrt(len(x)) for x in (before, after)]
    assert after.mean() - half[1] > before.mean() + half[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bare_grpo_learns_the_facts(tmp_path: Path, seed: int) -> None:
    """The score is tiny/facts.py's `right`: more held-out answers are right."""
    grpo.main(grpo.Args(**grpo.TINY_SETTINGS, seed=seed, output_dir=str(tmp_path / "grpo")))
    assert set(held_out(tmp_path / "grpo", "grpo", "score")) <= {0.0, 1.0}
    check_intervals_apart(tmp_path / "grpo", "score")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rloo_on_the_reward_model_raises_gold(tmp_path: Path, seed: int) -> None:
    """As PPO does, with the same reward model and penalty."""
    given: dict[str, Any] = {"method": "rloo", **ON_THE_REWARD_MODEL}
    grpo.main(grpo.Args(**grpo.TINY_SETTINGS, **given, seed=seed, output_dir=str(tmp_path / "rloo")))
    check_intervals_apart(tmp_path / "rloo", "gold")
