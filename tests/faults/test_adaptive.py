"""Adaptive sampling, killed in its first pass and in later ones: the same rows, none of them drawn twice."""

from pathlib import Path
from typing import Any

import pytest

from tests.faults.driver import Kill
from tests.faults.harness import KILLED, Driver, Place, check_recovery, in_ledger, leftovers, stored

pytestmark = pytest.mark.flow

SECTION = "{first: 2, more: 2, wanted_correct: 1, wanted_incorrect: 1, cap: 8}"
ADAPTIVE = ("--set", f"sampling.adaptive={SECTION}", "--set", f"dpo.sampling.adaptive={SECTION}")
OF_EVALUATION = 8  # ledger parts of the base's evaluation, which come first
IN_SECOND_PASS = OF_EVALUATION + 8 + 2  # the first: 4 shards of 4 prompts of 2 rollouts, in parts of 5 rows


@pytest.fixture(scope="module")
def adapted(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an adaptive run leaves that nothing disturbed."""
    place = Place(tmp_path_factory.mktemp("adapted"))
    ended = driver.run(place, *ADAPTIVE)
    assert ended.status == 0, ended.output
    assert leftovers(place) == []
    (record,) = [one for one in stored(place.home)["iterations"] if one["label"] == "iteration 1"]  # type: ignore[union-attr]
    assert record["funnel"]["sampled"] <= 16 * 4
    assert {index for *_, index in in_ledger(place.home)} > {0, 1, 2, 3}  # some prompts got more than plain ones would
    return stored(place.home)


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(Kill("after", "rename", "ledger/*/part-*", OF_EVALUATION + 3), id="in the first pass"),
        pytest.param(Kill("torn", "parquet", "ledger/*/.attempt-*", IN_SECOND_PASS), id="in the second"),
        pytest.param(Kill("after", "rename", "ledger/*/part-*", IN_SECOND_PASS + 4), id="later"),
        pytest.param(Kill("before", "write", "datasets/rollouts/.attempt-*", 3), id="while they are gathered"),
        pytest.param(Kill("after", "link", "steps/rate_prompts/*"), id="after the pass rates"),
    ],
)
@pytest.mark.parametrize("shards", [(), ("--set", "sampling.prompts_per_shard=3")], ids=["same shards", "other shards"])
def test_a_killed_run_ends_as_if_nothing_had_happened(
    kill: Kill, shards: tuple[str, ...], driver: Driver, tmp_path: Path, adapted: dict[str, Any]
) -> None:
    place = Place(tmp_path)
    killed = driver.run(place, *ADAPTIVE, kill=kill)
    assert killed.status == KILLED, killed.output[-2000:]
    before = in_ledger(place.home)
    again = driver.run(place, *ADAPTIVE, *shards)
    check_recovery(place, before, again, adapted)
