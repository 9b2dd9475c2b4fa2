"""What Prefect costs a sampling step of many shards: the same step with a private server, as `ratchet run` has it, and
without, each in a process of its own, in turn.

    python benchmarks/bench_shards.py [--shards 1000] [--rounds 2]

The engine is a fake one that takes no time, and a shard has four rollouts, so all that is measured is overhead. What a
shard costs more with Prefect is told as a share of a shard of one minute, eight of them at once as ever: wall time, and
the CPU time of both processes. A tenth as many shards tell whether a shard costs more where there are many.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from tables import show, told_by

PROMPTS, ROLLOUTS = 2, 2  # of a shard
MINUTE = 60.0
GOAL = 0.05
Measured = dict[str, float]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=["plain", "prefect"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        sys.stdout.write("\n" + json.dumps(measure(options.side, options.shards)))
        return
    few = max(options.shards // 10, 8)
    told = {(side, count): [] for count in (options.shards, few) for side in ("plain", "prefect")}  # type: dict[tuple[str, int], list[Measured]]
    for _ in range(options.rounds):
        for side, count in told:
            told[side, count].append(_apart(side, count))
    _show(told, options.shards, few)


def measure(side: str, shards: int) -> Measured:
    """One step in this process: its seconds, what they were spent on, and what the server has of it."""
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder, contextlib.ExitStack() as stack:
        os.environ["RATCHET_HOME"] = folder
        from flows.server import importing_prefect, server_in_waiting, unwatched

        with importing_prefect():
            from prefect import flow

            from tasks.sampling import shard_threads
        if side == "prefect":
            stack.enter_context(stack.enter_context(server_in_waiting()).serving())
            stack.enter_context(unwatched())
        sampled = flow(name="shards", task_runner=shard_threads())(sample)
        servers = psutil.Process().children()
        before, started = _cpu(servers), time.perf_counter()
        if side == "plain":
            sample(shards)
            return {**_spent(started, before, []), "peak": _peak([])}
        sampled(shards)
        from tasks.observing import settle

        flowed = time.perf_counter()
        settle(datetime(2000, 1, 1, tzinfo=UTC))  # as `ratchet run` waits for its server to have it all
        spent = {**_spent(started, before, servers), "settling": time.perf_counter() - flowed}
        return {**spent, "peak": _peak([]), "peak of server": _peak(servers), **asyncio.run(_recorded())}


def sample(shards: int) -> None:
    """One sampling step, recorded as one of an experiment."""
    from models.specs import Fake, ModelRef, PromptTemplate, Sampling
    from storage.datasets import write_rows
    from storage.rows import Prompt
    from tasks.recording import experiment_run
    from tasks.sampling import sample_rollouts

    asked = (
        Prompt(prompt_id=f"{n:032x}", source="made up", prompt=f"What is {n} + 1?", answer=None)
        for n in range(shards * PROMPTS)
    )
    with experiment_run("shards", {}):
        prompts = write_rows(asked, Prompt, step="prompts")
        sampling = Sampling(rollouts_per_prompt=ROLLOUTS, prompts_per_shard=PROMPTS)
        rollouts = sample_rollouts(ModelRef(name="fake:0.5"), prompts, PromptTemplate(), sampling, Fake())
    assert rollouts.rows == shards * PROMPTS * ROLLOUTS


async def _recorded() -> Measured:
    """What the server has in the end."""
    from prefect.client.orchestration import get_client

    ended = {"task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    every: dict[str, Any] = {"filter": {"occurred": {"since": "2000-01-01T00:00:00Z"}}, "limit": 1}
    async with get_client() as client:
        counts = {
            "task runs": (await client._client.post("/task_runs/count", json={})).json(),
            "completed": (await client._client.post("/task_runs/count", json=ended)).json(),
            "events": (await client._client.post("/events/filter", json=every)).json()["total"],
        }
    return {name: float(count) for name, count in counts.items()}


def _show(told: dict[tuple[str, int], list[Measured]], many: int, few: int) -> None:
    extra = {count: _extra(told, count, "wall") for count in (many, few)}
    at_once = _shards_at_once()
    share = extra[many] * at_once / MINUTE  # of the step's time, for eight shards' overheads go by in each minute
    last = told["prefect", many][-1]
    rows = [
        ("overhead of Prefect a shard, wall", f"{1e3 * extra[many]:.1f} ms"),
        (f"  share of a step of one-minute shards, {at_once} at once", f"{share:.2%}"),
        (f"  the goal of {GOAL:.0%}", "met" if share <= GOAL else "missed"),
        (f"  {many:,} shards / {few:,} shards", f"{extra[many] / extra[few]:.2f}"),
        ("  CPU of this process", f"{1e3 * _extra(told, many, 'cpu'):.1f} ms"),
        ("  CPU of the server", f"{1e3 * _extra(told, many, 'server'):.1f} ms"),
        ("without Prefect a shard, wall", f"{1e3 * _each(told['plain', many], 'wall', many):.1f} ms"),
        (f"  {many:,} shards / {few:,} shards", f"{_ratio(told, many, few):.2f}"),
        ("with Prefect / without, wall, of shards that take no time", f"{_with_without(told, many):.2f}"),
        ("task runs in the server, completed / shards and gathering", f"{last['completed']:.0f} / {many + 1}"),
        ("peak memory with Prefect / without", f"{_most(told, many, 'peak'):.2f}"),
    ]
    walls = {side: [f"{one['wall']:.1f}" for one in told[side, many]] for side in ("plain", "prefect")}
    show(
        f"A sampling step of {many:,} shards of {PROMPTS * ROLLOUTS} rollouts, with Prefect and without",
        rows,
        f"wall seconds, without {' '.join(walls['plain'])}, with {' '.join(walls['prefect'])}",
        f"{last['events'] / many:.1f} events a shard; of the time with Prefect, {last['settling']:.1f} s were spent"
        " waiting for the server to have them all",
        f"peak memory {last['peak'] / 2**20:.0f} MiB, its server's {last['peak of server'] / 2**20:.0f} MiB",
    )


def _each(told: list[Measured], name: str, shards: int) -> float:
    return statistics.median(one[name] for one in told) / shards


def _extra(told: dict[tuple[str, int], list[Measured]], shards: int, name: str) -> float:
    """What a shard costs more with Prefect."""
    return _each(told["prefect", shards], name, shards) - _each(told["plain", shards], name, shards)


def _ratio(told: dict[tuple[str, int], list[Measured]], many: int, few: int) -> float:
    return _each(told["plain", many], "wall", many) / _each(told["plain", few], "wall", few)


def _with_without(told: dict[tuple[str, int], list[Measured]], shards: int) -> float:
    return _each(told["prefect", shards], "wall", 1) / _each(told["plain", shards], "wall", 1)


def _most(told: dict[tuple[str, int], list[Measured]], shards: int, name: str) -> float:
    return max(one[name] for one in told["prefect", shards]) / max(one[name] for one in told["plain", shards])


def _shards_at_once() -> int:
    from flows.server import importing_prefect

    with importing_prefect():
        from tasks.sampling import SHARDS_AT_ONCE
    return SHARDS_AT_ONCE


def _cpu(servers: list[psutil.Process]) -> Measured:
    times = [one.cpu_times() for one in servers]
    return {"cpu": time.process_time(), "server": sum(one.user + one.system for one in times)}


def _spent(started: float, before: Measured, servers: list[psutil.Process]) -> Measured:
    now = _cpu(servers)
    return {"wall": time.perf_counter() - started, **{name: now[name] - before[name] for name in now}}


def _peak(servers: list[psutil.Process]) -> float:
    """Bytes of memory, at most: of this process, or of others."""
    if not servers:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    lines = Path(f"/proc/{servers[0].pid}/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _apart(side: str, shards: int) -> Measured:
    return told_by(__file__, "--side", side, "--shards", str(shards))


if __name__ == "__main__":
    main()
