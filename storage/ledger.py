"""Rollouts in progress: append-only Parquet parts, so that sampling survives a kill and no row is paid for twice.

    home/ledger/<digest of key>/key.json, part-*.parquet

A ledger belongs to a policy, its decoding settings and its prompt template; rows are keyed (prompt_id, rollout_index).
Several processes may append to one ledger: each part has a name of its own, and the first part that holds a key wins.
A set of rollout indexes is a bit mask: bit i stands for rollout_index i.

A part gets its name only after the disk has it, so one that cannot be read was damaged later. It is renamed to
.damaged-part-*, which a warning tells, and its rows count as missing: they are drawn again.
"""

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from storage.committing import new_file, push_unpushed, put_file
from storage.committing import remove as remove_from_store
from storage.datasets import DatasetError
from storage.digests import canonical_json, digest_of
from storage.durable import remove_stale_attempts
from storage.fetching import fetch_again, fetch_new
from storage.home import home
from storage.rows import Rollout
from storage.schemas import arrow_schema, batch_of, rows_of

logger = logging.getLogger(__name__)

READ_ROWS = 20_000  # rows that `read` holds at one time, give or take one prompt's
FAR_BEHIND = 2  # parts' worth of rows that may wait for the disk before those who add more wait too
_KEY_COLUMNS = ["prompt_id", "rollout_index"]
_REDRAW = "remove that file, and its rows are drawn again"
SET_ASIDE = "-set-aside.parquet"  # how the name of a part ends whose rows stand for prompts that always fail


class DamagedPart(DatasetError):
    """A part could not be read and is now set aside; its rows have to be drawn again."""


class Ledger:
    """The rollouts drawn so far under one sampling key.

    Args:
        key: plain JSON; everything that decides how a rollout is drawn, apart from its prompt and its index.
    """

    def __init__(self, key: Mapping[str, object]) -> None:
        self.folder = home() / "ledger" / digest_of(key)
        put_file(self.folder / "key.json", canonical_json(key), replace=False)
        remove_stale_attempts(self.folder)

    def present(self, prompt_ids: Container[str] | None = None) -> dict[str, int]:
        """Which rollouts are there, as prompt_id -> bit mask of rollout indexes; only of `prompt_ids` when given.

        Raises:
            DatasetError: a part cannot be read, and yet is not damaged.
        """
        masks: dict[str, int] = {}
        for part in self._parts():
            try:
                keys = _keys(_read(part, _KEY_COLUMNS))
            except DamagedPart:  # a warning has told it
                continue
            for prompt_id, index in keys:
                if prompt_ids is None or prompt_id in prompt_ids:
                    masks[prompt_id] = masks.get(prompt_id, 0) | 1 << index
        return masks

    def append(self, rows: Sequence[Rollout], *, ending: str = ".parquet") -> None:
        """Store rows as one new part; when this returns they are on the disk."""
        if not rows:
            return
        name = f"part-{time.time_ns():020d}-{os.getpid()}-{uuid.uuid4().hex[:8]}{ending}"
        with new_file(self.folder / name) as attempt:
            table = pa.Table.from_batches([batch_of(rows, Rollout)])
            pq.write_table(table, attempt, compression="zstd", write_page_checksum=True)  # no manifest has its digest

    def read(self, wanted: Mapping[str, int]) -> Iterator[Rollout]:
        """The rows wanted, each once, by prompt in the order of `wanted` and then by rollout_index.

        Args:
            wanted: prompt_id -> bit mask of rollout indexes.
        Raises:
            DamagedPart: a part could not be read; the rows wanted have to be looked for, and drawn, again.
            DatasetError: a row that is wanted is not there.
        """
        parts = self._parts()
        places = _places(parts, wanted)
        for prompt_ids in _groups(wanted):
            rows: dict[tuple[str, int], Rollout] = {}
            for number in sorted({number for prompt_id in prompt_ids for number in places.get(prompt_id, {})}):
                left = {prompt_id: places.get(prompt_id, {}).get(number, 0) for prompt_id in prompt_ids}
                rows |= {(row.prompt_id, row.rollout_index): row for row in _take(parts[number], left)}
            for prompt_id in prompt_ids:
                yield from (rows[prompt_id, index] for index in _indexes(wanted[prompt_id]))

    def push_unpushed(self) -> None:
        """Have the home's object store, if it has one, hold all that is on this disk.

        Raises:
            StoreError: it cannot be reached.
        """
        push_unpushed(f"ledger/{self.folder.name}/")

    def _parts(self) -> list[Path]:
        fetch_new(self.folder, ".parquet")
        return sorted(self.folder.glob("part-*.parquet"))


def look_for(key: Mapping[str, object], prompt_ids: Container[str], below: int) -> int:
    """How many rollouts of these prompts, their indexes below so many, lie in the ledger of a key. Writes nothing.

    One that is there twice counts once; a part that cannot be read counts nothing.
    """
    found: set[tuple[str, int]] = set()
    for part in sorted((home() / "ledger" / digest_of(key)).glob("part-*.parquet")):
        with contextlib.suppress(pa.ArrowException, OSError):
            keys = _keys(pq.read_table(part, columns=_KEY_COLUMNS))
            found.update(one for one in keys if one[0] in prompt_ids and one[1] < below)
    return len(found)


class LedgerWriter:
    """Collects finished rows and appends them to a ledger every so often, and at the end, whatever ended it.

    Threads share one writer: of what they finish at the same time one part is made, and while one of them waits for the
    disk the others go on. A thread of its own flushes rows that wait for others that take long.
    """

    def __init__(self, ledger: Ledger, *, flush_rows: int = 250, flush_seconds: float = 1.0) -> None:
        self._ledger = ledger
        self._flush_rows, self._flush_seconds = flush_rows, flush_seconds
        self._rows: list[Rollout] = []
        self._lock = threading.Lock()  # over _rows
        self._flushing = threading.Lock()
        self._closing = threading.Event()
        self._timer = threading.Thread(target=self._flush_now_and_then, name="ledger-writer", daemon=True)

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        self._timer.join()
        try:
            self.flush()
        except OSError as failure:
            if error is None:
                raise
            logger.warning("%d finished rollouts could not be stored: %s", len(self._rows), failure)
        if error is None:
            self._ledger.push_unpushed()

    def add(self, row: Rollout) -> None:
        """Take a finished row; it is on the disk after the next flush."""
        with self._lock:
            self._rows.append(row)
            waiting = len(self._rows)
        # Where another thread is flushing, this one goes on, unless the disk falls far behind.
        if waiting >= self._flush_rows and self._flushing.acquire(blocking=waiting >= FAR_BEHIND * self._flush_rows):
            try:
                self._append()
            finally:
                self._flushing.release()

    def flush(self) -> None:
        """Put on the disk what is not there yet."""
        with self._flushing:
            self._append()

    def _append(self) -> None:
        with self._lock:
            rows, self._rows = self._rows, []
        try:
            self._ledger.append(rows)
        except BaseException:  # they are tried again
            with self._lock:
                self._rows = rows + self._rows
            raise

    def _flush_now_and_then(self) -> None:
        while not self._closing.wait(self._flush_seconds):
            try:
                self.flush()
            except OSError as error:  # the next add or the end meets it again, in the thread that can act on it
                logger.warning("%d finished rollouts could not be stored yet: %s", len(self._rows), error)


def _places(parts: Sequence[Path], wanted: Mapping[str, int]) -> dict[str, dict[int, int]]:
    """For each prompt: part number -> bit mask of the rollout indexes to take from that part."""
    places: dict[str, dict[int, int]] = {}
    left = dict(wanted)
    for number, part in enumerate(parts):
        for prompt_id, index in _keys(_read(part, _KEY_COLUMNS)):
            bit = 1 << index
            if left.get(prompt_id, 0) & bit:
                left[prompt_id] ^= bit
                masks = places.setdefault(prompt_id, {})
                masks[number] = masks.get(number, 0) | bit
    if missing := {prompt_id: mask for prompt_id, mask in left.items() if mask}:
        prompt_id, mask = next(iter(missing.items()))
        raise DatasetError(
            f"rollouts of {len(missing)} of {len(wanted)} prompts are not in the ledger, the first being "
            f"{prompt_id!r} with rollout_index {_indexes(mask)}; sample them first"
        )
    return places


def _groups(wanted: Mapping[str, int]) -> Iterator[list[str]]:
    """Prompts in order, cut so that the rows wanted of one group fit into memory."""
    group: list[str] = []
    rows = 0
    for prompt_id, mask in wanted.items():
        group.append(prompt_id)
        rows += mask.bit_count()
        if rows >= READ_ROWS:
            yield group
            group, rows = [], 0
    if group:
        yield group


def _take(part: Path, left: dict[str, int]) -> Iterator[Rollout]:
    """Rows of a part whose bit is set in `left`, which is cleared: the first row of a key wins."""
    table = _read(part, None)
    rows = []
    for number, (prompt_id, index) in enumerate(_keys(table)):
        bit = 1 << index
        if left.get(prompt_id, 0) & bit:
            left[prompt_id] ^= bit
            rows.append(number)
    for batch in table.take(rows).to_batches():
        yield from rows_of(batch, Rollout)


def _read(part: Path, columns: list[str] | None) -> pa.Table:
    name = f"ledger/{part.parent.name}/{part.name}"
    try:
        table = pq.read_table(part, columns=columns, partitioning=None, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):  # another process has set it aside since we listed it
            raise DamagedPart(f"{name} is gone; its rows are drawn again") from error
        if isinstance(error, OSError) and error.errno is not None:  # not what is in it, but getting at it
            raise DatasetError(f"{name} cannot be read: {error}; see to that and run the same command again") from error
        if fetch_again(part):
            logger.warning("%s was damaged (%s); the store's copy has taken its place", name, error)
            return _read(part, columns)
        _set_aside(part)
        told = f"{name} is damaged ({error}); it is now .damaged-{part.name}, and its rows are drawn again"
        logger.warning("%s", told)
        raise DamagedPart(told) from error
    expected = columns or arrow_schema(Rollout).names
    if sorted(table.column_names) != sorted(expected):
        raise DatasetError(f"{name} has columns {table.column_names}, expected {expected}; {_REDRAW}")
    return table


def _set_aside(part: Path) -> None:
    remove_from_store(part)
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        part.rename(part.with_name(f".damaged-{part.name}"))


def _keys(table: pa.Table) -> Iterator[tuple[str, int]]:
    return zip(table["prompt_id"].to_pylist(), table["rollout_index"].to_pylist(), strict=True)


def _indexes(mask: int) -> list[int]:
    return [index for index in range(mask.bit_length()) if mask >> index & 1]
