"""The run under way: which experiment and iteration a step belongs to, and who is told when it ends.

Held in context variables, so that flows stay plain calls and shards in other threads still know where they are.
"""

import contextlib
import copy
import gc
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from prefect.context import FlowRunContext

from storage.experiments import Experiment, StepRecord, now
from storage.locks import exclusive
from storage.opening import open_home
from tasks.observing import ProgressArtifacts, name_flow_run, pause_deployment
from tasks.planning import current_plan
from tasks.serving import stop
from tasks.surroundings import surroundings

log = logging.getLogger("ratchet")

_RUN: ContextVar["Run | None"] = ContextVar("run", default=None)
_ITERATION: ContextVar[int | None] = ContextVar("iteration", default=None)
_SPLIT: ContextVar[str | None] = ContextVar("split", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardProgress:
    """Rows finished so far of one shard."""

    number: int
    done: int
    total: int
    tokens: int
    compared: int  # rollouts drawn whose prompt has a gold answer
    matching: int  # of these, those with that answer: what an answer match would keep


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Rows finished so far by a step that is still running."""

    step: str
    iteration: int | None
    done: int
    total: int
    tokens: int
    reused: int  # of `done`, rows that were there already
    split: str | None = None
    unit: str = "rollouts"  # what is counted
    shards: tuple[ShardProgress, ...] = ()  # of a step that has any
    detail: str = ""  # more of how it goes, for instance a training's loss


Listener = Callable[[StepRecord | Progress], None]
_listeners: list[Listener] = []


class Run:
    """One run of an experiment in this process."""

    def __init__(self, experiment: Experiment, *, advance: bool, marker: str = "") -> None:
        self.id = uuid.uuid4().hex[:12]
        self.experiment = experiment
        self.marker = marker  # before final answers; empty: completions have none
        self.advance = advance  # end after the first iteration that has something to do
        self.fresh: set[int | None] = set()  # iterations in which a step was done and not reused


class Advanced(Exception):  # no error: it leaves a flow that has done the iteration it was to do
    """The run has done one more iteration, which is all it was asked for."""


class Halted(RuntimeError):
    """The run ends here until a person has looked; running again ends here again, and costs next to nothing."""


def current_run() -> Run | None:
    """The run this code is part of; None in a unit test or a command that runs no flow."""
    return _RUN.get()


def current_iteration() -> int | None:
    """The iteration this code is part of; None before the first and after the last."""
    return _ITERATION.get()


@contextmanager
def experiment_run(name: str, config: Mapping[str, Any], *, advance: bool = False) -> Iterator[Experiment]:
    """Record everything inside as one run of the experiment; two runs of one experiment never write at once.

    Args:
        advance: leave the block after the first iteration in which a step is done and not reused. One that an earlier
            run failed in is gone on with; when all are done, nothing is.
    Raises:
        LockedError: another process is running this experiment; the message names it.
    """
    experiment = Experiment(name)
    if current_plan() is not None:
        yield experiment
        return
    with exclusive(f"experiment-{name}", wait_seconds=0):
        open_home()
        gc.freeze()  # what is imported stays, so no collection needs to walk it while rows come and go
        run = Run(experiment, advance=advance, marker=str(config.get("marker") or ""))
        flow = FlowRunContext.get()
        flow_run_id = str(flow.flow_run.id) if flow is not None and flow.flow_run is not None else None
        experiment.begin(run.id, config, flow_run_id=flow_run_id, surroundings=surroundings())
        token = _RUN.set(run)
        try:
            with contextlib.nullcontext() if flow is None else listening(ProgressArtifacts(name)):
                yield experiment
        except Advanced:
            experiment.end("advanced")
        except Halted as halted:
            from tasks.reporting import publish_report  # the one place here that needs it

            experiment.end("halted", str(halted))
            pause_deployment()
            publish_report(experiment)
            raise
        except Exception as error:
            experiment.end("failed", f"{type(error).__name__}: {error}")
            raise
        except BaseException:  # Ctrl-C, or Prefect cancels the run: shards and trainings in other threads end too
            stop()
            experiment.end("interrupted", "stopped by Ctrl-C or another signal")
            raise
        else:
            experiment.forget_other_iterations(run.id)
            experiment.end("finished")
        finally:
            _RUN.reset(token)


def each_iteration(numbers: Iterable[int]) -> Iterator[int]:
    """Yield the iteration numbers; steps called meanwhile carry the number in their names and records."""
    for number in numbers:
        with iteration(number):
            yield number


@contextmanager
def iteration(number: int) -> Iterator[int]:
    """Steps called inside belong to this iteration.

    Raises:
        Advanced: the run was to do one more iteration, and this was it.
    """
    before, run = _ITERATION.get(), current_run()
    _ITERATION.set(number)
    if run is not None and run.advance:
        name_flow_run(f"{run.experiment.name} it{number}")
    try:
        yield number
    finally:
        _ITERATION.set(before)
    if run is not None and run.advance and number in run.fresh and number > 0:  # the base comes with iteration 1
        raise Advanced(f"iteration {number} is done")


def current_split() -> str | None:
    """The held-out split that steps look at just now; None: training."""
    return _SPLIT.get()


@contextmanager
def split(name: str) -> Iterator[None]:
    """Steps called inside look at this split, and carry its name."""
    token = _SPLIT.set(name)
    try:
        yield
    finally:
        _SPLIT.reset(token)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell the listener of each finished step and of progress, from whatever thread it happens in."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def announce(event: StepRecord | Progress) -> None:
    """Pass an event to the listeners, and a finished step to the experiment's record."""
    run = current_run()
    if isinstance(event, StepRecord) and run is not None:
        run.experiment.add_step(event)
    for listener in copy.copy(_listeners):
        listener(event)


def record_step(
    step: str,
    *,
    shard: int | None = None,
    failed: bool = False,
    cached: bool = False,
    rows: int | None = None,
    digest: str | None = None,
    key: str | None = None,
    seconds: float = 0.0,
    counts: Mapping[str, int] | None = None,
    detail: str = "",
    key_parts: dict[str, Any] | None = None,
) -> StepRecord:
    """Announce one finished step of the present run and iteration, with one log line."""
    run = current_run()
    record = StepRecord(
        run=run.id if run else "",
        step=step,
        iteration=current_iteration(),
        split=current_split(),
        shard=shard,
        state="failed" if failed else "completed",
        cached=cached,
        rows=rows,
        digest=digest,
        key=key,
        seconds=round(seconds, 3),
        counts=dict(counts or {}),
        detail=detail,
        key_parts=key_parts,
        at=now(),
    )
    if run is not None and not cached and not failed:
        run.fresh.add(record.iteration)
    log.info("%s", line_of(record))
    announce(record)
    return record


def line_of(record: StepRecord) -> str:
    """One step in one line: rows in and out by reason, and how long it took."""
    name = " ".join(filter(None, [record.split, record.step]))
    if record.shard is not None:
        name += f" shard {record.shard}"
    if record.state == "failed":
        return f"{name} FAILED after {record.seconds:.1f} s: {record.detail}"
    rows = "" if record.rows is None else f" {record.rows:,} rows"
    how = " cached" if record.cached else f" {record.seconds:.1f} s"
    counts = ", ".join(f"{what.replace('_', ' ')} {count:,}" for what, count in record.counts.items())
    return f"{name}:{rows}{how}{f' ({counts})' if counts else ''}"
