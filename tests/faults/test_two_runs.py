"""Two processes and one home: the same experiment is refused while it runs, different ones share what is drawn."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import PLAIN, SMALL, Driver, Place, in_ledger, leftovers, started, stored

pytestmark = [pytest.mark.flow, pytest.mark.timeout(180)]

SLOW = ("--set", "engine.seconds_per_request=0.05")


def until(condition: Callable[[], object], what: str, patience: float = 30.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {patience} s"
        time.sleep(0.05)


def test_a_second_run_is_refused_by_name_and_a_dead_one_holds_nothing(
    driver: Driver, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    place = Place(tmp_path)
    with started(place, SMALL, PLAIN, *SLOW) as first:
        until(lambda: in_ledger(place.home), "the first run's first rows")
        state = (place.home / "experiments/small/state.json").read_text()
        refused = driver.run(place)
        assert refused.status == 1
        assert f"'experiment-small' is locked by process {first.pid} on " in refused.output
        assert "wait for it to end, or end it, and run the same command again" in refused.output
        assert place.drawn() == []
        assert (place.home / "experiments/small/state.json").read_text() == state
        first.kill()
        first.wait()
    before = set(in_ledger(place.home))
    again = driver.run(place)
    assert again.status == 0, again.output
    assert not before & set(place.drawn())
    assert stored(place.home) == unbroken
    assert leftovers(place) == []


def test_two_experiments_at_once_share_rows_and_end_as_each_does_alone(
    tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    place = Place(tmp_path)
    with (
        started(place, SMALL, PLAIN, "--set", "engine.seconds_per_request=0.01") as first,
        started(place, SMALL, PLAIN, "--set", "engine.seconds_per_request=0.01", "--set", "experiment=other") as second,
    ):
        outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert leftovers(place) == []
    found = stored(place.home)
    for what in ("datasets", "models", "steps", "files"):
        assert found[what] == unbroken[what]
    records = [
        [
            json.loads(file.read_text())["references"]
            for file in sorted(place.home.glob(f"experiments/{name}/iterations/*"))
        ]
        for name in ("small", "other")
    ]
    assert records[0] == records[1]
    assert set(in_ledger(place.home)) == set(unbroken["ledger"])
