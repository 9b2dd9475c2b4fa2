"""Runs under faults: start them, kill them, and compare what they leave in their homes."""

import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from tests.faults.driver import Kill
from tests.flows.builders import MARK, processes_marked

REPOSITORY = Path(__file__).parents[2]
SMALL = Path(__file__).with_name("small.yaml")
PLAIN = "--no-prefect-server"
KILLED = -signal.SIGKILL
DEADLINE_SECONDS = 60.0
FLUSH_ROWS = 5
AT_ONCE = {"tasks.caching.RETRY_DELAYS_SECONDS": [0, 0]}  # tries without pauses between them

Drawn = tuple[str, float, int, str, int]  # policy, temperature, the sampling's seed, prompt_id, rollout_index


class Ended(NamedTuple):
    """How a run ended."""

    status: int
    output: str
    seconds: float


@dataclass
class Place:
    """A home, and what was seen of the runs in it."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    runs: int = 0

    @property
    def home(self) -> Path:
        """The home itself."""
        return self.folder / "home"

    def environment(self, kill: Kill | None = None, **more: str) -> dict[str, str]:
        """What a run's driver is told; each run has files of its own."""
        self.runs += 1
        told = {
            "RATCHET_HOME": str(self.home),
            MARK: self.mark,
            "FAULT_FLUSH_ROWS": str(FLUSH_ROWS),
            "FAULT_DRAWN": str(self.folder / f"drawn-{self.runs}"),
            "FAULT_OPERATIONS": str(self.folder / f"operations-{self.runs}"),
            "FAULT_SETTINGS": json.dumps(AT_ONCE),
        }
        return told | ({"FAULT_KILL": json.dumps(kill._asdict())} if kill else {}) | more

    def drawn(self, run: int | None = None) -> list[Drawn]:
        """The rollouts the engine drew in one run, by default the latest, in order."""
        file = self.folder / f"drawn-{run or self.runs}"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(policy, *map_rest) for policy, *map_rest in map(json.loads, lines)]

    def operations(self) -> list[str]:
        """What the latest run did to the home."""
        return (self.folder / f"operations-{self.runs}").read_text().splitlines()


class Driver:
    """Forks runs from a process that has everything imported."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=REPOSITORY,
            env={**os.environ, "RATCHET_HOME": "/nonexistent/ratchet-home"},
        )

    def run(
        self, place: Place, *arguments: str, kill: Kill | None = None, deadline: float = DEADLINE_SECONDS, **more: str
    ) -> Ended:
        """Run the small preset without Prefect, with these arguments added."""
        place.folder.mkdir(parents=True, exist_ok=True)
        environment = place.environment(kill, **more)
        log = place.folder / f"log-{place.runs}"
        wanted = {"arguments": ["run", str(SMALL), PLAIN, *arguments], "environment": environment, "log": str(log)}
        assert self._server.stdin is not None
        started = time.monotonic()
        self._server.stdin.write(json.dumps(wanted) + "\n")
        self._server.stdin.flush()
        child = self._answer(DEADLINE_SECONDS)
        try:
            status = self._answer(deadline)
        except TimeoutError:
            os.kill(child, signal.SIGKILL)
            self._answer(DEADLINE_SECONDS)
            raise AssertionError(f"a run was not over after {deadline} s:\n{log.read_text()}") from None
        return Ended(status, log.read_text() if log.exists() else "", time.monotonic() - started)

    def close(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.wait()

    def _answer(self, deadline: float) -> int:
        assert self._server.stdout is not None
        if not select.select([self._server.stdout], [], [], deadline)[0]:
            raise TimeoutError
        return int(self._server.stdout.readline())


@contextmanager
def started(
    place: Place, preset: Path, *arguments: str, kill: Kill | None = None, **more: str
) -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own, its output in a pipe; killed at the end if it is still there."""
    place.folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.driver", "run", str(preset), *arguments],
        env={**os.environ, **place.environment(kill, **more)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=REPOSITORY,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def run_alone(
    place: Place,
    preset: Path,
    *arguments: str,
    kill: Kill | None = None,
    deadline: float = DEADLINE_SECONDS,
    kill_after: float | None = None,
    **more: str,
) -> Ended:
    """A run in a process of its own, to its end, or killed after so many seconds."""
    since = time.monotonic()
    with started(place, preset, *arguments, kill=kill, **more) as process:
        if kill_after is not None:
            try:
                process.wait(kill_after)
            except subprocess.TimeoutExpired:
                process.kill()
        output, _ = process.communicate(timeout=deadline)
        return Ended(process.returncode, output, time.monotonic() - since)


def stored(home: Path) -> dict[str, object]:
    """What a home holds, by content: equal for equal experiments, however often they were interrupted."""
    iterations = [
        {name: value for name, value in json.loads(file.read_text()).items() if name != "run"}
        for file in sorted(home.glob("experiments/*/iterations/*.json"))
    ]
    return {
        "datasets": sorted(str(path.relative_to(home)) for path in home.glob("datasets/*/*")),
        "models": sorted(path.name for path in home.glob("models/*")),
        "steps": sorted(str(path.relative_to(home)) for path in home.glob("steps/*/*")),
        "files": {str(path.relative_to(home)): path.read_bytes() for path in home.glob("datasets/*/*/*.parquet")},
        "iterations": iterations,
        "ledger": sorted(in_ledger(home)),
    }


def in_ledger(home: Path) -> Counter[Drawn]:
    """The rollouts that are safe: how often each key stands in the ledgers' parts."""
    found: Counter[Drawn] = Counter()
    for folder in home.glob("ledger/*"):
        if not (folder / "key.json").exists():
            continue
        decoding = json.loads((folder / "key.json").read_text())["decoding"]
        for part in folder.glob("part-*.parquet"):
            for row in pq.read_table(part, partitioning=None).to_pylist():
                key = (row["policy"], decoding["temperature"], decoding["seed"], row["prompt_id"], row["rollout_index"])
                found[key] += 1
    return found


def leftovers(place: Place) -> list[str]:
    """Unfinished files, trainings in progress and set-aside parts anywhere in the home."""
    return sorted(
        str(path.relative_to(place.home))
        for path in place.home.rglob(".*")
        if "prefect" not in path.relative_to(place.home).parts
    )


def processes(place: Place, patience: float = 5.0) -> list[str]:
    """Command lines of processes of this place's runs that are still there after a while."""
    deadline = time.monotonic() + patience
    while (found := processes_marked(place.mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def check_recovery(place: Place, before: Counter[Drawn], again: Ended, unbroken: Mapping[str, Any]) -> int:
    """Whether the run after a kill ended as if nothing had happened; how many rows it drew that were drawn before.

    Args:
        before: what was in the ledgers when the second run began.
    """
    assert again.status == 0, again.output[-3000:]
    assert stored(place.home) == unbroken
    assert leftovers(place) == []
    earlier = Counter(row for run in range(1, place.runs) for row in place.drawn(run))
    now = Counter(place.drawn())
    assert max([0, *now.values()]) <= 1
    assert not set(now) & set(before), "rows that were safe were drawn again"
    assert set(now) | set(before) == set(unbroken["ledger"]), "rows are missing"
    assert set(in_ledger(place.home).values()) == {1}
    return len(set(now) & set(earlier))
