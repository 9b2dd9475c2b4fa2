"""Other shards, more rollouts, more prompts: only rows that are missing are drawn, counted by the engine itself."""

from pathlib import Path
from typing import Any

import pytest

from tests.faults.driver import Kill
from tests.faults.harness import KILLED, Driver, Place, in_ledger, leftovers, stored

pytestmark = pytest.mark.flow

ONLY_SAMPLING = ("--set", "dpo=null")
PROMPTS, ROLLOUTS = 16, 4
POLICY, TEMPERATURE, SEED = "fake:0.4@unpinned", 0.8, 1  # of the training rollouts: the others have other seeds


def drawn_for_training(place: Place) -> list[tuple[str, int]]:
    return [row[3:] for row in place.drawn() if row[:3] == (POLICY, TEMPERATURE, SEED)]


def test_a_killed_run_goes_on_with_twice_the_shards(driver: Driver, tmp_path: Path, unbroken: dict[str, Any]) -> None:
    place = Place(tmp_path)
    # Parts 1 to 8 are of the evaluation's two passes (16 rows each); of the 64 training rows, a part holds about five,
    # and up to 13 where shards finished more while the disk was busy.
    killed = driver.run(place, kill=Kill("after", "rename", "ledger/*/part-*", 8 + 4))
    assert killed.status == KILLED
    safe = in_ledger(place.home)
    kept = sum(row[:3] == (POLICY, TEMPERATURE, SEED) for row in safe)
    assert 4 <= kept <= 4 * 13
    again = driver.run(place, "--set", "sampling.prompts_per_shard=2")
    assert again.status == 0, again.output
    assert len(drawn_for_training(place)) == PROMPTS * ROLLOUTS - kept
    assert stored(place.home) == unbroken
    assert leftovers(place) == []


def test_more_rollouts_and_then_more_prompts_draw_only_what_is_new(driver: Driver, tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert driver.run(place, *ONLY_SAMPLING).status == 0
    assert len(drawn_for_training(place)) == PROMPTS * 4
    more = (*ONLY_SAMPLING, "--set", "sampling.rollouts_per_prompt=8")
    assert driver.run(place, *more).status == 0
    drawn = drawn_for_training(place)
    assert sorted({index for _, index in drawn}) == [4, 5, 6, 7]
    assert len(drawn) == PROMPTS * 4
    grown = (*more, "--set", "train.arithmetic.problems=20", "--set", "prompts_per_iteration=20")
    assert driver.run(place, *grown).status == 0
    drawn = drawn_for_training(place)
    assert len(drawn) == 4 * 8  # four more prompts, all of their rollouts
    assert len({prompt_id for prompt_id, _ in drawn}) == 4


def test_two_experiments_of_one_home_share_the_rows_of_the_base(driver: Driver, tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert driver.run(place, *ONLY_SAMPLING).status == 0
    assert (
        driver.run(place, *ONLY_SAMPLING, "--set", "experiment=other", "--set", "selection.max_per_prompt=1").status
        == 0
    )
    assert all(policy != POLICY for policy, *_ in place.drawn())  # the new policy's evaluation is all there was to draw
