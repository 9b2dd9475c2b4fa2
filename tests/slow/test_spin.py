"""The tiny preset with vLLM and TRL: what the repairs do about demonstrations of which three in ten are wrong."""

import os

import pytest

from benchmarks.bench_spin import Arm, run_arm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SEEDS = tuple(int(seed) for seed in os.environ.get("RATCHET_SEEDS", "0").split(","))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Arm]:
    """Three arms of each seed, in one home, so that base and judge are built once a seed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATCHET_HOME", str(tmp_path_factory.mktemp("spin") / "home"))
        return {(arm, seed): run_arm(arm, seed) for seed in SEEDS for arm in ("plain", "judge", "adaptive")}


def last(told: dict[tuple[str, int], Arm], arm: str, seed: int) -> float:
    return told[arm, seed].policies[-1]["mean@1"]["value"]
