"""Many verifiers at once, and what they left behind, for tests."""

import asyncio
from collections.abc import Iterable

import psutil

from tasks.sandbox import Job, Limits, Verdict, run_verifiers
from tasks.sandbox_worker import PROGRAM, REPOSITORY

MARK = 98_761  # an argument that only a command started by an attack has
TOLD = {
    "share": 25,
    "cpu_seconds": 0.2,
    "wall_seconds": 1.0,
    "verifier_seconds": 5.0,
    "memory_mb": 64,
    "detail_length": 160,
}


def collect(
    jobs: Iterable[tuple[str, tuple[str, ...]]], limits: Limits, workers: int | None = None
) -> list[list[Verdict]]:
    """All rows of verdicts."""

    async def gather() -> list[list[Verdict]]:
        return [row async for row in run_verifiers((Job(*job) for job in jobs), limits, workers)]

    return asyncio.run(gather())


def processes() -> set[int]:
    """The processes of this checkout's sandboxes, and commands that an attack started."""
    listed = ((one.pid, one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))
    return {pid for pid, told in listed if (PROGRAM in told and REPOSITORY in told) or str(MARK) in told}
