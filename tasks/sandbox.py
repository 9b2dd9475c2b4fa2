"""Generated `evaluate(response) -> bool` run where it can do no harm: the one way to execute a verifier.

Each verifier runs in a forked child of a walled-in program that this module keeps warm; several plain ones may share
such a child. What was measured: docs/SANDBOX.md. Not contained: a hole in the kernel's own walls; time measured by
the verifier itself; and its own verdicts, which it may forge as it may return True.
"""

import asyncio
import atexit
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import Field

from models.specs import Settings
from tasks.sandbox_pool import ATTEMPTS, Pool, SandboxError, Setup, cores
from tasks.sandbox_worker import Run

__all__ = ["Job", "Limits", "Outcome", "SandboxError", "Verdict", "isolation", "run_verifier", "run_verifiers"]

BATCH_VERIFIERS = 32  # that a worker is given at once
BATCH_CHARACTERS = 4_000_000

Outcome = Literal["passed", "failed", "error", "timeout", "memory", "forbidden", "invalid"]
Layer = Literal["namespaces", "landlock", "seccomp"]


class Limits(Settings):
    """What a verifier may use. Calls are stopped by CPU time; wall time is for those that sleep."""

    not_in_key = frozenset({"verifiers_per_process", "required_layers"})

    wall_seconds: float = Field(default=3.0, ge=0.1, le=3600)  # a call
    cpu_seconds: float = Field(default=1.0, ge=0.05, le=3600)  # a call
    verifier_seconds: float = Field(default=20.0, ge=0.1, le=36_000)  # all calls of a verifier together
    memory_mb: int = Field(default=256, ge=16, le=65_536)  # on top of the interpreter
    detail_length: int = Field(default=160, ge=0, le=160)  # characters
    preload: tuple[str, ...] = ()  # modules beside the standard library, for instance numpy; all else is missing
    verifiers_per_process: int = Field(default=25, ge=1, le=1000)  # of plain ones; 1: each has a process of its own
    required_layers: tuple[Layer, ...] = ("seccomp",)  # without all of these no verifier is run


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one call. Only `passed` and `failed` are votes."""

    outcome: Outcome
    detail: str
    isolation: str  # what stood between the verifier and this machine, for instance namespaces+landlock+seccomp


class Job(NamedTuple):
    """A verifier and what it is called with."""

    source: str
    responses: tuple[str, ...]


def run_verifier(source: str, responses: list[str], limits: Limits = Limits()) -> list[Verdict]:  # noqa: B008 - frozen
    """A verdict for each response, in their order.

    Raises:
        SandboxError: no sandbox can be had here, or it broke.
    """
    return _run([Job(source, tuple(responses))], limits)[0]


async def run_verifiers(
    jobs: Iterable[Job],
    limits: Limits = Limits(),  # noqa: B008 - frozen
    workers: int | None = None,
) -> AsyncIterator[list[Verdict]]:
    """The verdicts of each job, in the order of the jobs, as they come; only a window of jobs is held.

    Args:
        workers: child programs at work at once; None: one for each processor.
    Raises:
        SandboxError: no sandbox can be had here, or it broke.
    """
    count = workers or cores()
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, _pool, limits)  # what fails here fails before any job is read
    waiting: deque[asyncio.Future[list[list[Verdict]]]] = deque()
    run = Run()
    executor = ThreadPoolExecutor(count, thread_name_prefix="sandbox")
    try:
        for batch in _batches(jobs):
            waiting.append(loop.run_in_executor(executor, _run, batch, limits, run))
            if len(waiting) > 2 * count:
                for verdicts in await waiting.popleft():
                    yield verdicts
        while waiting:
            for verdicts in await waiting.popleft():
                yield verdicts
    finally:
        run.stop()  # whoever no longer listens shall not wait for what hangs
        executor.shutdown(wait=False, cancel_futures=True)
        for batch_verdicts in waiting:
            batch_verdicts.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks for it


def isolation(limits: Limits = Limits(), *, allow_unsandboxed: bool = False) -> str:  # noqa: B008 - frozen
    """The level verifiers are run at on this machine, for instance `namespaces+landlock+seccomp`.

    Args:
        allow_unsandboxed: from now on, in this process, verifiers may run unsandboxed ("none") where nothing better is.
    Raises:
        SandboxError: there is none; names each layer tried, why it failed, and what to do.
    """
    if allow_unsandboxed:
        _state.unsandboxed_allowed = True
    return _pool(limits).level


class _State:
    """The pools of this process, one for each set-up."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process = os.getpid()
        self.pools: dict[Setup, Pool] = {}
        self.unsandboxed_allowed = False

    def close(self) -> None:
        if self.process == os.getpid():  # a fork of us must not end our workers
            for pool in self.pools.values():
                pool.close()
        self.pools.clear()


_state = _State()
atexit.register(_state.close)


def _pool(limits: Limits) -> Pool:
    setup = Setup(limits.preload, limits.required_layers)
    with _state.lock:
        if _state.process != os.getpid():
            _state.pools, _state.process = {}, os.getpid()
        if setup not in _state.pools:
            attempts = (*ATTEMPTS, ()) if _state.unsandboxed_allowed else ATTEMPTS
            _state.pools[setup] = Pool(setup, attempts)
        return _state.pools[setup]


def _run(jobs: Sequence[Job], limits: Limits, run: Run | None = None) -> list[list[Verdict]]:
    pool = _pool(limits)
    answers = pool.run(jobs, _told(limits), run)
    return [[_verdict(outcome, detail, pool.level) for outcome, detail in row] for row in answers]


def _verdict(outcome: Any, detail: str, level: str) -> Verdict:  # one of OUTCOMES, as the pool made sure
    return Verdict(outcome, detail, level)


def _told(limits: Limits) -> dict[str, Any]:
    names = ("cpu_seconds", "wall_seconds", "verifier_seconds", "memory_mb", "detail_length")
    return {"share": limits.verifiers_per_process, **{name: getattr(limits, name) for name in names}}


def _batches(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    batch: list[Job] = []
    characters = 0
    for job in jobs:
        batch.append(job)
        characters += len(job.source) + sum(map(len, job.responses))
        if len(batch) == BATCH_VERIFIERS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
