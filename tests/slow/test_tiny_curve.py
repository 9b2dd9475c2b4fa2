"""The demo's promise: accuracy rises over the iterations, and it is the reward that makes it rise."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import pytest

from tests.flows.builders import PRESETS, REPOSITORY

pytestmark = pytest.mark.slow

SEEDS = tuple(int(seed) for seed in os.environ.get("RATCHET_SEEDS", "0,1,2").split(","))
NOISE = 0.03  # of a mean@1 over 400 prompts of 16 rollouts, between one policy and the next
# Nothing is promoted or held back by luck here: each iteration is sampled from the one before.
SHARED = ("gate.promote=always", "dpo=null")
UNFILTERED = ("selection.keep=all",)


class Curve(NamedTuple):
    """mean@1 on the test split."""

    base: float
    first: float
    second: float


class Pair(NamedTuple):
    """What one seed gave, with the reward deciding what is trained on and without."""

    filtered: Curve
    control: Curve


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Both curves of every seed. A seed's two runs share a home, so that the base is built and measured once."""
    homes = [tmp_path_factory.mktemp("curve") / "home" for _ in SEEDS]
    return [
        Pair(run(home, seed, "filtered"), run(home, seed, "control", *UNFILTERED))
        for home, seed in zip(homes, SEEDS, strict=True)
    ]


def run(home: Path, seed: int, experiment: str, *overrides: str) -> Curve:
    """Run the tiny preset with this seed for everything that is drawn, and return its curve."""
    seeds = ("base.tiny.training.seed", "base.corpus.arithmetic.seed", "sampling.seed", "seed")
    settings = [*(f"{name}={seed}" for name in seeds), f"experiment={experiment}", *SHARED, *overrides]
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "flows", "run", str(PRESETS / "rest_em" / "tiny.yaml"), *options]
    environment = {**os.environ, "RATCHET_HOME": str(home)}
    done = subprocess.run(
        [*command, "--no-prefect-server"], capture_output=True, text=True, cwd=REPOSITORY, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((home / "experiments" / experiment / "report.json").read_text())
    return Curve(*(iteration["metrics"]["mean@1"]["value"] for iteration in facts["iterations"]))


def test_the_first_iteration_is_ten_points_better_for_every_seed(curves: list[Pair]) -> None:
    assert [pair for pair in curves if pair.filtered.first < pair.filtered.base + 0.10] == []


def test_the_second_iteration_is_no_worse_than_the_first_for_every_seed(curves: list[Pair]) -> None:
    assert [pair for pair in curves if pair.filtered.second < pair.filtered.first - NOISE] == []


def test_two_iterations_gain_twenty_points_on_average(curves: list[Pair]) -> None:
    assert mean(pair.filtered.second - pair.filtered.base for pair in curves) >= 0.20


def test_training_on_unfiltered_rollouts_stays_ten_points_behind_on_average(curves: list[Pair]) -> None:
    assert all(pair.control.base == pair.filtered.base for pair in curves)
    assert mean(pair.filtered.second - pair.control.second for pair in curves) >= 0.10


def test_the_figures_are_told(curves: list[Pair], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        for seed, pair in zip(SEEDS, curves, strict=True):
            told = ", ".join(
                f"{name} {' '.join(f'{100 * value:.1f}' for value in curve)}" for name, curve in pair._asdict().items()
            )
            sys.stdout.write(f"\nseed {seed}, mean@1 of base, iteration 1, iteration 2: {told}\n")
