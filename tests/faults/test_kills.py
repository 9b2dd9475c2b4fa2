"""kill -9 anywhere: the same command again ends as if nothing had happened, and draws nothing twice that was safe.

Every durable operation of an unbroken run is a place to die at (tests/faults/driver.py): before it, after it, or when
half of a file is written. The random points come from a generator with a seed of its own, so that a failure is shown by
the same name again.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.faults.driver import TORN, Kill
from tests.faults.harness import KILLED, SMALL, Driver, Place, check_recovery, in_ledger, processes, run_alone

OPERATIONS = 1200  # an unbroken run has about 1,300; the unbroken run of the session says whether that is still so
CHOSEN = {
    "before a ledger part's rename": Kill("before", "rename", "ledger/*/part-*", 3),
    "after a ledger part's rename": Kill("after", "rename", "ledger/*/part-*", 3),
    "while a ledger part is written": Kill("torn", "parquet", "ledger/*/.attempt-*", 7),
    "between data files and manifest": Kill("before", "write", "datasets/rollouts/.attempt-*", 2),
    "while a manifest is written": Kill("torn", "write", "datasets/scored/.attempt-*", 3),
    "before a data set's rename": Kill("before", "rename", "datasets/demonstrations/*"),
    "between a data set and its step record": Kill("after", "rename", "datasets/pairs/*"),
    "while a step record is written": Kill("torn", "write", "steps/score_answers/*", 4),
    "after a step record, before its attempt is gone": Kill("after", "link", "steps/gather_rollouts/*", 2),
    "before a training": Kill("before", "train"),
    "after a training, before its checkpoint": Kill("after", "train", "*", 2),
    "while a checkpoint's manifest is written": Kill("torn", "write", "models/.scratch-*/model/.attempt-*"),
    "between a checkpoint and its step record": Kill("after", "rename", "models/*"),
    "after a training's step record, before its scratch is gone": Kill("after", "link", "steps/train_sft/*"),
    "during evaluation": Kill("torn", "parquet", "datasets/evaluated/*", 3),
    "while an iteration is recorded": Kill("torn", "write", "experiments/small/iterations/*", 2),
    "while a run's record is written": Kill("before", "write", "experiments/small/runs/.attempt-*"),
    "while a report's table is written": Kill("torn", "write", "experiments/small/report/.attempt-*"),
    "while the report is written": Kill("torn", "write", "experiments/small/.attempt-*", 3),
    "before the report's rename": Kill("before", "replace", "experiments/*/report.html"),
    "when the experiment's state is written at the end": Kill("before", "replace", "experiments/*/state.json", 2),
}


def random_kills(count: int, seed: int) -> list[Kill]:
    draw = random.Random(seed)
    return [Kill(draw.choice(["before", "torn", "after"]), nth=draw.randint(1, OPERATIONS)) for _ in range(count)]


def note(place: Place, kill: Kill, drawn_again: int, seconds: float) -> None:
    """One line of the kill matrix, for whoever wants it: in the folder that FAULT_MATRIX names."""
    if file := os.environ.get("FAULT_MATRIX"):
        died_at = place.folder / "operations-1"
        last = died_at.read_text().splitlines()[-1] if died_at.exists() else "?"
        line = {**kill._asdict(), "died_at": last, "drawn_again": drawn_again, "seconds": round(seconds, 2)}
        with Path(file).open("a") as lines:
            lines.write(json.dumps(line) + "\n")


def kill_and_go_on(driver: Driver, place: Place, kill: Kill, unbroken: dict[str, Any]) -> None:
    killed = driver.run(place, kill=kill)
    assert killed.status == KILLED, killed.output[-2000:]
    before = in_ledger(place.home)
    again = driver.run(place)
    drawn_again = check_recovery(place, before, again, unbroken)
    assert drawn_again < 8 * 5 + 8  # FAR_BEHIND flushes wait while as many are written; eight in flight
    assert processes(place) == []
    note(place, kill, drawn_again, again.seconds)


@pytest.mark.flow
def test_an_unbroken_run_has_as_many_operations_as_the_random_kills_choose_from(whole: Place) -> None:
    assert OPERATIONS <= len(whole.operations()) <= 1.2 * OPERATIONS
    assert {line.split()[0] for line in whole.operations()} >= {*TORN, "rename", "replace", "link", "fsync", "train"}


@pytest.mark.flow
def test_a_second_run_in_the_same_home_draws_nothing(driver: Driver, whole: Place, unbroken: dict[str, Any]) -> None:
    assert driver.run(whole).status == 0
    assert whole.drawn() == []


@pytest.mark.flow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kill", CHOSEN.values(), ids=CHOSEN)
def test_a_run_killed_at_a_chosen_point_goes_on(
    kill: Kill, driver: Driver, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    kill_and_go_on(driver, Place(tmp_path), kill, unbroken)


@pytest.mark.flow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kill", random_kills(12, seed=1), ids=lambda kill: f"{kill.phase}-{kill.nth}")
def test_a_run_killed_at_a_random_point_goes_on(
    kill: Kill, driver: Driver, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    kill_and_go_on(driver, Place(tmp_path), kill, unbroken)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kill", random_kills(240, seed=2), ids=lambda kill: f"{kill.phase}-{kill.nth}")
def test_a_run_killed_at_one_of_many_random_points_goes_on(
    kill: Kill, driver: Driver, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    kill_and_go_on(driver, Place(tmp_path), kill, unbroken)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(20))
def test_a_run_killed_four_times_goes_on(seed: int, driver: Driver, tmp_path: Path, unbroken: dict[str, Any]) -> None:
    place, draw = Place(tmp_path), random.Random(seed)
    for _ in range(4):
        driver.run(place, kill=Kill(draw.choice(["before", "torn", "after"]), nth=draw.randint(1, OPERATIONS // 2)))
    before = in_ledger(place.home)
    check_recovery(place, before, driver.run(place), unbroken)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("seconds", [6, 9, 10, 11])
def test_a_run_killed_while_prefect_records_it_goes_on(seconds: int, tmp_path: Path, unbroken: dict[str, Any]) -> None:
    place = Place(tmp_path)
    run_alone(place, SMALL, kill_after=seconds)
    before = in_ledger(place.home)
    assert processes(place) == []
    check_recovery(place, before, run_alone(place, SMALL), unbroken)
    assert processes(place) == []
