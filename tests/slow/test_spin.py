"""The tiny preset with vLLM and TRL: what the repairs do about demonstrations of which three in ten are wrong."""

import os
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SEEDS = tuple(int(seed) for seed in os.environ.get("RATCHET_SEEDS", "0,1,2").split(","))
WRONG = 0.3  # of the demonstrations

Told = dict[tuple[str, int], Any]  # compare_spin.Arm


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Both arms of each seed, in one home, so that the judge is built once."""
    import compare_spin

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATCHET_HOME", str(tmp_path_factory.mktemp("spin") / "home"))
        return {(arm, seed): compare_spin.run_arm(arm, seed) for seed in SEEDS for arm in ("plain", "judge")}


def over_seeds(told: Told, arm: str) -> float:
    """mean@1 after the last iteration."""
    return mean(told[arm, seed].policies[-1]["mean@1"]["value"] for seed in SEEDS)


def test_without_a_judge_wrong_demonstrations_stay_chosen(told: Told) -> None:
    shares = [pairs["wrong chosen"] for seed in SEEDS for pairs in told["plain", seed].pairs]
    assert min(shares) > WRONG - 0.1  # right demonstrations that the policy writes itself make no pair


def test_the_judge_is_right_about_most_pairs_and_leaves_fewer_wrong_ones(told: Told) -> None:
    for seed in SEEDS:
        for judged, plain in zip(told["judge", seed].pairs, told["plain", seed].pairs, strict=True):
            assert judged["judge right"] > 0.9
            assert judged["pairs swapped"] > 0
            assert judged["wrong chosen"] < plain["wrong chosen"]


def test_judge_labels_help_on_average_over_seeds(told: Told) -> None:
    assert over_seeds(told, "judge") > over_seeds(told, "plain")
