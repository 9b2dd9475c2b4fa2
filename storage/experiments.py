"""The record of an experiment: its settings, what each step did, and its iterations in order.

`experiments/<name>/`: config.json, state.json, steps.jsonl (one line a finished step, of all runs), runs/<run>.json and
iterations/<number>.json. Reports and `ratchet status` are computed from these files, never from a session's memory.
"""

import contextlib
import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from storage.committing import append_line, put_file, remove
from storage.durable import remove_all_stale_attempts
from storage.home import home, home_url
from storage.leases import LeaseLostError, is_leased
from storage.names import checked_name
from storage.stores import StoreError

logger = logging.getLogger(__name__)

KEPT_FLOW_RUNS = 50

# advanced: by one iteration, as asked; halted: until a person has looked at what `error` says
State = Literal["running", "advanced", "finished", "halted", "failed", "interrupted"]


class StepRecord(BaseModel):
    """One step of one run: what it did, and whether it was reused."""

    model_config = ConfigDict(frozen=True)

    run: str
    step: str
    iteration: int | None
    split: str | None = None  # "dev" or "test"; None: training
    shard: int | None
    state: Literal["completed", "failed"]
    cached: bool
    rows: int | None
    digest: str | None
    key: str | None
    seconds: float
    counts: dict[str, int]
    detail: str
    key_parts: dict[str, Any] | None = None  # of a step that failed; those of others stand with what they made
    at: str  # ISO 8601, UTC


class IterationRecord(BaseModel):
    """One iteration: the policy it made, what it was made from, how it did, and whether it replaced the incumbent."""

    model_config = ConfigDict(frozen=True)

    run: str = ""  # that wrote it
    iteration: int  # 0 is the base
    label: str  # "base", "iteration 1", "dpo"
    policy: dict[str, Any]  # a ModelRef
    promoted: bool
    decision: dict[str, Any] | None  # None: the base needs none
    regression: dict[str, Any] | None = None  # how it is significantly worse than the incumbent; None: it is not
    metrics: dict[str, dict[str, Any]]  # test split, by strategy: value, low, high, n, k
    dev_metrics: dict[str, dict[str, Any]]
    funnel: dict[str, int]  # rows left after each stage, in order
    drops: dict[str, int]  # rows dropped, by reason
    references: dict[str, dict[str, Any]]  # data sets, by role
    notices: list[str] = []  # what to know before its figures are believed, a sentence each

    @property
    def policy_identity(self) -> str:
        """The policy's content, as one word."""
        return " ".join(str(self.policy[part]) for part in ("digest", "adapter", "name") if self.policy.get(part))


class ExperimentState(BaseModel):
    """Where an experiment stands."""

    state: State
    run: str
    started_at: str
    finished_at: str | None = None
    pid: int
    host: str = ""
    error: str | None = None
    flow_run_id: str | None = None
    unsettled: tuple[str, ...] = ()  # flow runs of processes that died, which Prefect may still show as running


class Surroundings(BaseModel):
    """What a run was made with."""

    model_config = ConfigDict(frozen=True)

    versions: dict[str, str]  # of Python and of libraries
    commit: str | None  # of this code; "+" behind it: with changes. None: not run from a repository
    machine: str  # its kind, without its name
    accelerators: tuple[str, ...]


class RunRecord(BaseModel):
    """One run: when, how it ended, and what it was made with."""

    model_config = ConfigDict(frozen=True)

    run: str
    state: State  # "running" for ever, if the process was killed
    started_at: str
    finished_at: str | None = None
    surroundings: Surroundings | None = None


class Experiment:
    """The folder of one experiment."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = home() / "experiments" / checked_name(name, "an experiment's name")

    def begin(
        self,
        run: str,
        config: Mapping[str, Any],
        *,
        flow_run_id: str | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        """Note a run's settings and that it is running; to be called by the only process that runs the experiment."""
        (self.folder / "iterations").mkdir(parents=True, exist_ok=True)
        remove_all_stale_attempts(home())
        unsettled = tuple(one for one in self.unsettled() if one != flow_run_id)[-KEPT_FLOW_RUNS:]
        _write(self.folder / "config.json", dict(config))
        self._end_torn_line()
        state = ExperimentState(
            state="running",
            run=run,
            started_at=now(),
            pid=os.getpid(),
            host=platform.node(),
            flow_run_id=flow_run_id,
            unsettled=unsettled,
        )
        _write(self.folder / "state.json", state.model_dump())
        begun = RunRecord(run=run, state="running", started_at=state.started_at, surroundings=surroundings)
        _write(self._run_file(run), begun.model_dump())

    def unsettled(self) -> tuple[str, ...]:
        """Flow runs that this host has begun and not ended, when no process runs the experiment: all are dead."""
        try:
            state = ExperimentState.model_validate_json((self.folder / "state.json").read_text())
        except (FileNotFoundError, ValidationError):  # none yet, or damaged: then the next run writes it anew
            return ()
        died = state.state == "running" and state.flow_run_id is not None and state.host == platform.node()
        return (*state.unsettled, str(state.flow_run_id)) if died else state.unsettled

    def end(self, state: State, error: str | None = None) -> None:
        """Note how the run ended."""
        ended = self.state().model_copy(update={"state": state, "finished_at": now(), "error": error})
        try:
            self._note_end(ended)
        except (StoreError, LeaseLostError) as told:
            if error is None:
                raise
            logger.warning("how the run ended is noted on this machine only: %s", told)

    def runs(self) -> list[RunRecord]:
        """The runs in the order they began; those of versions that did not note them are not there."""
        files = (self.folder / "runs").glob("[!.]*.json")
        found = [RunRecord.model_validate_json(file.read_text()) for file in files]
        return sorted(found, key=lambda record: (record.started_at, record.run))

    def state(self) -> ExperimentState:
        """How the last run stands; one whose process is gone is interrupted, whatever the file says."""
        state = ExperimentState.model_validate_json((self.folder / "state.json").read_text())
        if state.state == "running" and not self._is_running(state.pid):
            return state.model_copy(update={"state": "interrupted"})
        return state

    def config(self) -> dict[str, Any]:
        """The resolved settings of the last run."""
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return config

    def add_step(self, record: StepRecord) -> None:
        """Append one finished step; a single write, so that threads and a kill cannot tear two lines into one."""
        append_line(self.folder / "steps.jsonl", record.model_dump_json())

    def steps(self, *, run: str | None = None) -> list[StepRecord]:
        """The finished steps in order, of one run or of all; a line torn by a kill is left out."""
        return [record for record in self._read_steps() if run is None or record.run == run]

    def add_iteration(self, record: IterationRecord) -> None:
        """Write one iteration's record; the same iteration again replaces it."""
        _write(self.folder / "iterations" / f"{record.iteration:03}.json", record.model_dump())

    def iterations(self) -> list[IterationRecord]:
        """The iterations in order."""
        files = sorted((self.folder / "iterations").glob("[0-9]*.json"))
        return [IterationRecord.model_validate_json(file.read_text()) for file in files]

    def let_pass(self) -> list[str]:
        """Have later runs go on past the regressions on record; the labels of those policies."""
        seen = [record for record in self.iterations() if record.regression is not None]
        if seen:
            passed = self.passed() | {record.policy_identity for record in seen}
            _write(self.folder / "passed.json", {"policies": sorted(passed)})
        return [record.label for record in seen]

    def passed(self) -> set[str]:
        """The policies whose regressions a person has seen and let pass."""
        try:
            return set(json.loads((self.folder / "passed.json").read_text())["policies"])
        except FileNotFoundError:
            return set()

    def forget_other_iterations(self, run: str) -> None:
        """Remove the records that a finished run did not write: its settings have no such iteration any more."""
        for record in self.iterations():
            if record.run != run:
                file = self.folder / "iterations" / f"{record.iteration:03}.json"
                remove(file)
                file.unlink()

    def _is_running(self, pid: int) -> bool:
        """Of a shared home the process may be anywhere, but it holds the experiment's lock."""
        return _alive(pid) if home_url() is None else is_leased(f"experiment-{self.name}")

    def _run_file(self, run: str) -> Path:
        return self.folder / "runs" / f"{run}.json"

    def _read_steps(self) -> Iterator[StepRecord]:
        file = self.folder / "steps.jsonl"
        if not file.exists():
            return
        for line in file.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValidationError):
                yield StepRecord.model_validate_json(line)

    def _note_end(self, ended: ExperimentState) -> None:
        _write(self.folder / "state.json", ended.model_dump())
        for begun in self.runs():
            if begun.run == ended.run:
                record = begun.model_copy(update={"state": ended.state, "finished_at": ended.finished_at})
                _write(self._run_file(ended.run), record.model_dump())

    def _end_torn_line(self) -> None:
        """Have what is appended next stand on a line of its own, even if a kill tore the last one."""
        file = self.folder / "steps.jsonl"
        if file.exists() and not file.read_bytes().endswith(b"\n"):
            with file.open("a") as lines:
                lines.write("\n")


def experiments() -> list[Experiment]:
    """All experiments of the home, by name."""
    folders = sorted((home() / "experiments").glob("*/state.json"))
    return [Experiment(folder.parent.name) for folder in folders]


def now() -> str:
    """The present time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(file: Path, content: Mapping[str, Any]) -> None:
    put_file(file, json.dumps(content, indent=1), replace=True)


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() if Path("/proc").exists() else True
