"""kill -9 with the home in an object store: another machine, with a working copy of its own, ends as if nothing had
happened, and draws nothing twice that was in the store. Machines are working copies here, all on this one."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from storage.stores import Store
from tests.faults.driver import Kill
from tests.faults.harness import (
    AT_ONCE,
    KILLED,
    PLAIN,
    SMALL,
    Driver,
    Place,
    check_recovery,
    in_ledger,
    started,
    stored,
)

pytestmark = [pytest.mark.flow, pytest.mark.timeout(180)]

CHOSEN = {
    "between data files and manifest": Kill("before", "store.upload", "datasets/scored/*/manifest.json", 2),
}
MORE = {
    "between a step record's upload and its note": Kill("after", "store.create", "steps/train_sft/*"),
    "while a step's lease is taken": Kill("after", "store.create", "locks/step-*", 9),
    "between a ledger part's rename and its upload": Kill("before", "store.upload", "ledger/*/part-*", 3),
    "between a data set and its step record": Kill("before", "store.create", "steps/score_answers/*", 3),
    "between a checkpoint's files and its manifest": Kill("before", "store.upload", "models/*/manifest.json"),
    "before the record of an iteration": Kill("before", "store.upload", "experiments/small/iterations/*", 2),
    "while the lines of steps are uploaded": Kill("before", "store.write", "experiments/small/steps/*", 20),
    "before the experiment's state at the end": Kill("before", "store.upload", "experiments/small/state.json", 2),
}


def slow(kills: dict[str, Kill]) -> list[Any]:
    return [pytest.param(kill, id=name, marks=pytest.mark.slow) for name, kill in kills.items()]


@dataclass
class FarPlace(Place):
    """A home in a bucket, seen from one of several machines."""

    url: str = ""
    machine: str = "one"

    @property
    def home(self) -> Path:
        """What the bucket holds after the latest run, as a folder."""
        copy = self.folder / f"bucket-{self.runs}"
        if not copy.exists():
            there = Store(self.url)
            for name, content in there.read_many(there.names()).items():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes(content)
        return copy

    @property
    def working_copy(self) -> Path:
        """The present machine's."""
        (found,) = (self.folder / self.machine).iterdir()
        return found

    def environment(self, kill: Kill | None = None, **more: str) -> dict[str, str]:
        """A run on the present machine."""
        place = {"RATCHET_HOME": self.url, "RATCHET_CACHE": str(self.folder / self.machine)}
        # The driver's server was started before this test's S3 server was known.
        aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        told = super().environment(kill, **place, **aws, **more)
        shutil.rmtree(self.folder / f"bucket-{self.runs}", ignore_errors=True)  # made while we were asked
        return told


@pytest.fixture
def far(s3_home: str, tmp_path: Path) -> FarPlace:
    return FarPlace(tmp_path, url=s3_home)


def until(condition: Callable[[], object], what: str, patience: float = 30.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {patience} s"
        time.sleep(0.05)


@pytest.mark.parametrize("kill", [*(pytest.param(kill, id=name) for name, kill in CHOSEN.items()), *slow(MORE)])
def test_a_machine_that_dies_is_made_up_for_by_another(
    kill: Kill, driver: Driver, far: FarPlace, unbroken: dict[str, Any]
) -> None:
    killed = driver.run(far, kill=kill)
    assert killed.status == KILLED, killed.output[-2000:]
    before = in_ledger(far.home)
    far.machine = "two"
    again = driver.run(far)
    drawn_again = check_recovery(far, before, again, unbroken)
    assert drawn_again < 8 * 5 + 8  # FAR_BEHIND flushes wait while as many are written; eight in flight
    assert list(far.working_copy.glob("unpushed/*")) == []


@pytest.mark.slow
def test_a_machine_that_comes_back_loses_nothing_that_its_disk_has(
    driver: Driver, far: FarPlace, unbroken: dict[str, Any]
) -> None:
    killed = driver.run(far, kill=Kill("before", "store.upload", "ledger/*/part-*", 5))
    assert killed.status == KILLED, killed.output[-2000:]
    on_disk = in_ledger(far.working_copy)
    assert set(on_disk) > set(in_ledger(far.home))
    check_recovery(far, on_disk, driver.run(far), unbroken)


@pytest.mark.slow  # tests/flows/test_object_store.py does it with a larger run, and looks less closely
def test_a_lost_working_copy_costs_nothing_but_fetching(
    driver: Driver, far: FarPlace, unbroken: dict[str, Any]
) -> None:
    assert driver.run(far).status == 0
    whole = stored(far.home)
    assert whole == unbroken
    shutil.rmtree(far.folder / far.machine)
    again = driver.run(far)
    assert again.status == 0, again.output[-2000:]
    assert far.drawn() == []
    assert stored(far.home) == whole
    written = {line.split()[1].partition("/")[0] for line in far.operations() if line.startswith("store.")}
    assert {name for name in written if not name.startswith(".probe-")} == {"experiments", "locks"}


@pytest.mark.slow
def test_a_second_machine_is_refused_by_name_while_the_first_runs(
    driver: Driver, far: FarPlace, unbroken: dict[str, Any]
) -> None:
    slow = ("--set", "engine.seconds_per_request=0.05")
    with started(far, SMALL, PLAIN, *slow) as first:
        until(lambda: Store(far.url).names("ledger"), "the first run's first rows")
        far.machine = "two"
        refused = driver.run(far)
        assert refused.status == 1
        assert f"'experiment-small' is locked by process {first.pid} on " in refused.output
        assert far.drawn() == []
        first.send_signal(signal.SIGKILL)
        first.wait()
    before = in_ledger(far.home)
    check_recovery(far, before, driver.run(far), unbroken)


@pytest.mark.slow  # half a minute
def test_two_machines_and_two_homes_at_once_end_as_each_does_alone(far: FarPlace, unbroken: dict[str, Any]) -> None:
    runs = [
        (FarPlace(far.folder / "a", url=far.url), "small"),
        (FarPlace(far.folder / "b", url=far.url), "other"),
        (FarPlace(far.folder / "c", url=f"{far.url}-2"), "small"),
    ]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(started(place, SMALL, PLAIN, "--set", f"experiment={name}")) for place, name in runs
        ]
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    shared, alone = stored(runs[0][0].home), stored(runs[2][0].home)
    assert alone == unbroken
    for what in ("datasets", "models", "steps"):
        assert shared[what] == unbroken[what]
    assert set(in_ledger(runs[0][0].home)) == set(unbroken["ledger"])


@pytest.mark.slow
def test_a_machine_that_slept_while_another_took_over_writes_nothing_when_it_wakes(
    driver: Driver, far: FarPlace, unbroken: dict[str, Any]
) -> None:
    short = AT_ONCE | {"storage.leases.SECONDS": 3.0, "storage.leases.SLACK_SECONDS": 1.0}
    settings = {"FAULT_SETTINGS": json.dumps(short)}
    with started(far, SMALL, PLAIN, "--set", "engine.seconds_per_request=0.05", **settings) as first:
        until(lambda: Store(far.url).names("ledger"), "the first run's first rows")
        first.send_signal(signal.SIGSTOP)
        time.sleep(5.0)
        far.machine = "two"
        again = driver.run(far, **settings)
        assert again.status == 0, again.output[-2000:]
        left = Store(far.url).names()
        first.send_signal(signal.SIGCONT)
        output, _ = first.communicate(timeout=60)
    assert first.returncode == 1, output
    assert "this process has lost the lock 'experiment-small': it was taken over by process" in output
    assert "Run the same command again once the other is done" in output
    assert {name: one.etag for name, one in Store(far.url).names().items()} == {
        name: one.etag for name, one in left.items()
    }
    assert stored(far.home) == unbroken
