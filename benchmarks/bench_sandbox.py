"""Calls of generated verifiers in the sandbox, against a bare `exec` in this process; and what memory a long run takes.

    python benchmarks/bench_sandbox.py [--verifiers 1500] [--long 40000]

The verifiers are the honest ones of tests/sandbox/honest.py, each called with 8 responses. Speed is per second of CPU
time, of all processes that take part, so that other work on the machine does not count.
"""

import argparse
import ast
import asyncio
import importlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any, NamedTuple

import psutil
from tables import REPOSITORY, show

from tasks import sandbox, sandbox_pool, sandbox_worker
from tasks.sandbox import Job, Limits, run_verifiers
from tasks.sandbox_gate import Grade, grade

RESPONSES = 8
LEVELS = sandbox_pool.ATTEMPTS
MIB = 2**20


class Speed(NamedTuple):
    """Calls a second."""

    of_cpu: float
    of_wall: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verifiers", type=int, default=1_500)
    parser.add_argument(
        "--long", type=int, default=40_000, help="verifiers of the run whose memory is watched; 0: none"
    )
    options = parser.parse_args()
    jobs = list(islice(_jobs(), options.verifiers))
    bare = _measure(lambda: _bare(jobs), len(jobs))
    rows, notes = [], [f"bare exec in this process: {bare.of_cpu:,.0f} calls a CPU second"]
    for layers in LEVELS:
        for share, told in ((25, "plain ones 25 to a process"), (1, "a process each")):
            level, speed = _sandboxed(jobs, layers, Limits(verifiers_per_process=share))
            rows.append((f"bare exec / {level}, {told}, calls a CPU second", f"{bare.of_cpu / speed.of_cpu:.1f}"))
            notes.append(f"{level}, {told}: {speed.of_cpu:,.0f} calls a CPU second, {speed.of_wall:,.0f} by the clock")
    plain = [job for job in jobs if grade(ast.parse(job.source)) is Grade.PLAIN]
    level, speed = _sandboxed(plain, LEVELS[0], Limits())
    notes.append(f"{level}, the {len(plain):,} plain ones alone: {speed.of_cpu:,.0f} calls a CPU second")
    if options.long:
        early, late = _long(options.long)
        rows.append((f"memory, after {options.long:,} verifiers / after 1,000", f"{late / early:.2f}"))
        notes.append(
            f"{options.long * RESPONSES:,} calls: {early / MIB:.0f} MiB early, {late / MIB:.0f} MiB at the end"
        )
    show("Verifiers in the sandbox", rows, f"{options.verifiers:,} verifiers, {RESPONSES} responses each", *notes)


def _jobs() -> Iterator[Job]:
    sys.path.append(str(REPOSITORY))  # the tests are not installed
    for number, one in enumerate(cycle(importlib.import_module("tests.sandbox.honest").HONEST)):
        yield Job(f"{one.source}# {number}\n", tuple(islice(cycle(one.responses), RESPONSES)))


def _bare(jobs: list[Job]) -> None:
    sys.unraisablehook = lambda _: None  # a generator of one of them fails as it is closed
    for source, responses in jobs:
        space: dict[str, Any] = {"__name__": "verifier"}
        exec(compile(source, "<verifier>", "exec"), space)
        for response in responses:
            try:
                space["evaluate"](response)
            except Exception:  # some are meant to raise
                continue


def _sandboxed(jobs: list[Job], layers: tuple[str, ...], limits: Limits) -> tuple[str, Speed]:
    with_level(layers)
    level = sandbox.isolation(limits)
    speed = _measure(lambda: asyncio.run(_consume(jobs, limits)), len(jobs))
    return level, speed


def with_level(layers: tuple[str, ...]) -> None:
    """Have the sandbox of this process use these layers from here on."""
    sandbox._state.close()
    sandbox.ATTEMPTS = (layers,)


async def _consume(jobs: list[Job], limits: Limits) -> None:
    async for _ in run_verifiers(jobs, limits, workers=1):
        pass


def _measure(work: Callable[[], None], verifiers: int) -> Speed:
    cpu, wall = _cpu_seconds(), time.perf_counter()
    work()
    calls = verifiers * RESPONSES
    return Speed(calls / (_cpu_seconds() - cpu), calls / (time.perf_counter() - wall))


def _cpu_seconds() -> float:
    """Of this process and the sandbox's, with their children that are gone."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime + sum(sum(process.cpu_times()[:4]) for process in _sandboxes())


def _sandboxes() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if sandbox_worker.PROGRAM in one.cmdline()]


def _long(verifiers: int) -> tuple[float, float]:
    """Bytes that all processes hold by themselves, early and at the end of a run."""
    with_level(LEVELS[0])
    early = late = 0.0

    async def watch() -> None:
        nonlocal early, late
        done = 0
        async for _ in run_verifiers(islice(_jobs(), verifiers)):
            done += 1
            if done == 1_000:
                early = _memory()
        late = _memory()

    asyncio.run(watch())
    return early, late


def _memory() -> float:
    total = 0.0
    for process in (psutil.Process(), *_sandboxes()):
        try:
            total += process.memory_full_info().uss
        except psutil.Error:  # a child that has just ended
            continue
    return total


if __name__ == "__main__":
    main()
