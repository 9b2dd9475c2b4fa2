"""Many verifiers at once, for tests."""

import asyncio
from collections.abc import Iterable

from tasks.sandbox import Job, Limits, Verdict, run_verifiers


def collect(jobs: Iterable[tuple[str, tuple[str, ...]]], limits: Limits, workers: int | None = None) -> list[list[Verdict]]:
    """All rows of verdicts."""

    async def gather() -> list[list[Verdict]]:
        return [row async for row in run_verifiers((Job(*job) for job in jobs), limits, workers)]

    return asyncio.run(gather())
