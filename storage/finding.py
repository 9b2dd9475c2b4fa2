"""The rows of one prompt, looked up in data sets and ledgers without reading the rest of what they hold."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.datasets import REBUILD, DatasetError, DatasetRef, data_files
from storage.fetching import fetch_new
from storage.home import home
from storage.rows import Rollout, Row
from storage.schemas import arrow_schema, rows_of

R = TypeVar("R", bound=Row)


class LedgerRow(NamedTuple):
    """A rollout as it lies in a ledger."""

    ledger: str
    row: Rollout


def rows_of_prompt(ref: DatasetRef, row_type: type[R], prompt_id: str) -> list[R]:
    """The rows of a data set that belong to one prompt, in their order.

    Raises:
        DatasetError: the data set is gone or damaged, or another version of ratchet wrote it.
    """
    return [row for file in data_files(ref) for row in _rows_of_file(file, row_type, prompt_id)]


def ids_beginning(ref: DatasetRef, beginning: str) -> set[str]:
    """The prompt_ids of a data set that begin so.

    Raises:
        DatasetError: the data set is gone or damaged.
    """
    found: set[str] = set()
    for file in data_files(ref):
        ids = _table(file, ["prompt_id"])["prompt_id"].unique()
        found.update(ids.filter(pc.starts_with(ids, beginning)).to_pylist())
    return found


def ledger_rows(prompt_id: str) -> Iterator[LedgerRow]:
    """The rollouts of one prompt in all ledgers of the home."""
    fetch_new(home() / "ledger", ".parquet")
    for part in sorted(home().glob("ledger/[!.]*/part-*.parquet")):
        for row in _rows_of_file(part, Rollout, prompt_id):
            yield LedgerRow(part.parent.name, row)


def _rows_of_file(file: Path, row_type: type[R], prompt_id: str) -> Iterator[R]:
    for batch in _batches(file, prompt_id):
        if sorted(batch.schema.names) != sorted(arrow_schema(row_type).names):
            raise DatasetError(
                f"{_name(file)} has columns {batch.schema.names}, a {row_type.__name__} row has "
                f"{arrow_schema(row_type).names}: another version of ratchet wrote it"
            )
        yield from rows_of(batch, row_type)


def _batches(file: Path, prompt_id: str) -> Iterator[pa.RecordBatch]:
    """Only row groups that hold the prompt are read in all their columns."""
    try:
        with pq.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                is_wanted = pc.equal(parquet.read_row_group(group, columns=["prompt_id"])["prompt_id"], prompt_id)
                if pc.any(is_wanted).as_py():
                    yield from parquet.read_row_group(group).filter(is_wanted).to_batches()
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{_name(file)} cannot be read: {error}; {REBUILD}") from error


def _table(file: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(file, columns=columns, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{_name(file)} cannot be read: {error}; {REBUILD}") from error


def _name(file: Path) -> str:
    return str(file.relative_to(home()))
