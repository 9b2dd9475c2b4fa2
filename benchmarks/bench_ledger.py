"""The ledger with a million rollouts: what a flush, a plan and a commit cost, against pyarrow doing only the writing.

    python benchmarks/bench_ledger.py [--rows 1000000]

Each part is measured in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from tables import seconds, show, told_by

from storage.datasets import write_rows
from storage.ledger import Ledger
from storage.rows import Rollout
from storage.schemas import arrow_schema, batch_of

KEY = {"policy": {"name": "benchmark"}}
PER_PROMPT, FLUSH_ROWS = 8, 250
Measured = dict[str, float]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        sys.stdout.write(json.dumps({**PARTS[options.part](options.rows), "peak": _peak()}))
        return
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        os.environ["RATCHET_HOME"] = folder
        found = {part: _measure(part, options.rows) for part in PARTS}
    _show(options.rows, found)


def _show(count: int, found: dict[str, Measured]) -> None:
    spent = {part: measured["seconds"] for part, measured in found.items()}
    of_rows = found["plain"]["bytes"]
    rows = [
        (f"flush in parts of {FLUSH_ROWS} / plain write", f"{spent['flush'] / spent['plain']:.1f}"),
        ("  of it, waiting for the disk (fsync)", f"{found['flush']['fsync'] / spent['flush']:.0%}"),
        ("plan (present) / plain read of the two key columns", f"{spent['plan'] / spent['plain_keys']:.1f}"),
        ("read and commit / plain read and write", f"{spent['commit'] / spent['plain_copy']:.1f}"),
        ("peak memory, plan / all rows in Arrow", f"{found['plan']['peak'] / of_rows:.2f}"),
        ("peak memory, read and commit / all rows in Arrow", f"{found['commit']['peak'] / of_rows:.2f}"),
        ("peak memory, read and commit / 1 GiB", f"{found['commit']['peak'] / 2**30:.2f}"),
    ]
    per_row = spent["flush"] / count
    show(
        f"Ledger of {count:,} rollouts, {of_rows / 2**20:,.0f} MiB in Arrow",
        rows,
        f"plain: pyarrow, one file, the same compression, no fsync; flush: {1e6 * per_row:.0f} us a row",
        f"plan {seconds(spent['plan'])}, read and commit {seconds(spent['commit'])}",
    )


def _measure(part: str, rows: int) -> Measured:
    return told_by(__file__, "--rows", str(rows), "--part", part)


def _flush(count: int) -> Measured:
    ledger, rows, spent = Ledger(KEY), _rollouts(count), 0.0
    waited, fsync = [0.0], os.fsync

    def timed_fsync(descriptor: int) -> None:
        started = time.perf_counter()
        fsync(descriptor)
        waited[0] += time.perf_counter() - started

    os.fsync = timed_fsync  # type: ignore[assignment]  # its own parameter has a private type
    while chunk := list(islice(rows, FLUSH_ROWS)):
        started = time.perf_counter()
        ledger.append(chunk)
        spent += time.perf_counter() - started
    return {"seconds": spent, "fsync": waited[0]}


def _plan(count: int) -> Measured:
    ledger = Ledger(KEY)

    def plan() -> None:
        assert sum(mask.bit_count() for mask in ledger.present().values()) == count

    return {"seconds": _best_of_three(plan)}


def _commit(count: int) -> Measured:
    ledger = Ledger(KEY)
    wanted = {_prompt_id(number): (1 << PER_PROMPT) - 1 for number in range(count // PER_PROMPT)}
    started = time.perf_counter()
    write_rows(ledger.read(wanted), Rollout, step="rollouts")
    return {"seconds": time.perf_counter() - started}


def _plain(count: int) -> Measured:
    rows, spent, size = _rollouts(count), 0.0, 0
    with pq.ParquetWriter(_home() / "plain.parquet", arrow_schema(Rollout), compression="zstd") as writer:
        while chunk := list(islice(rows, 20_000)):
            table = pa.Table.from_batches([batch_of(chunk, Rollout)])
            size += table.nbytes
            started = time.perf_counter()
            writer.write_table(table)
            spent += time.perf_counter() - started
    return {"seconds": spent, "bytes": size}


def _plain_keys(count: int) -> Measured:
    def read() -> None:
        table = ds.dataset(_ledger_files()).to_table(columns=["prompt_id", "rollout_index"])
        assert table.num_rows == count

    return {"seconds": _best_of_three(read)}


def _plain_copy(count: int) -> Measured:
    started = time.perf_counter()
    rows = 0
    with pq.ParquetWriter(_home() / "copy.parquet", ds.dataset(_ledger_files()).schema, compression="zstd") as writer:
        for batch in ds.dataset(_ledger_files()).to_batches():
            rows += batch.num_rows
            writer.write_batch(batch)
    assert rows == count
    return {"seconds": time.perf_counter() - started}


PARTS: dict[str, Callable[[int], Measured]] = {
    "flush": _flush,
    "plain": _plain,
    "plan": _plan,
    "plain_keys": _plain_keys,
    "commit": _commit,
    "plain_copy": _plain_copy,
}


def _best_of_three(work: Callable[[], None]) -> float:
    spent = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        spent.append(time.perf_counter() - started)
    return min(spent)


def _rollouts(count: int) -> Iterator[Rollout]:
    """Rollouts of a few hundred characters, as solutions of word problems are, each different."""
    for number in range(count):
        prompt, index = divmod(number, PER_PROMPT)
        steps = "\n".join(f"{number + n} + {prompt * n} = {number + n + prompt * n}" for n in range(8))
        yield Rollout(
            prompt_id=_prompt_id(prompt),
            rollout_index=index,
            prompt=f"Problem {prompt}: Ann has {prompt} stamps, buys {prompt % 97} more. How many has Ann now?",
            completion=f"{steps}\nFINAL ANSWER: {number}",
            prompt_tokens=24,
            completion_tokens=90,
            finish_reason="stop",
            cumulative_logprob=-number / count,
            seed=number,
            policy="0123456789abcdef0123456789abcdef",
        )


def _prompt_id(number: int) -> str:
    return f"{number * 2654435761 % 2**32:08x}{number:016x}"


def _ledger_files() -> list[str]:
    return [str(path) for path in sorted(Ledger(KEY).folder.glob("part-*.parquet"))]


def _home() -> Path:
    return Path(os.environ["RATCHET_HOME"])


def _peak() -> float:
    """Bytes of memory this process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


if __name__ == "__main__":
    main()
