"""Immutable data sets: a folder of Parquet files named by the digest of its content, and a manifest written last.

    home/datasets/<step>/<digest>/part-00000.parquet ... manifest.json

A data set is what its manifest says; without one it does not exist. Reading never yields fewer rows in silence.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from storage.committing import commit_folder, put_file
from storage.digests import RowsDigest, canonical_json, file_sha256
from storage.durable import attempt_folder
from storage.fetching import MANIFEST, DamagedObjectError, fetch, fetch_again, fetch_files, sizes
from storage.home import home
from storage.names import checked_name
from storage.rows import Row
from storage.schemas import arrow_schema, batch_of, rows_of

R = TypeVar("R", bound=Row)

BATCH_ROWS = 1_000  # rows that are Python objects at one time
GROUP_ROWS, GROUP_BYTES = 20_000, 32 * 2**20  # a Parquet row group: written when either is reached
FILE_ROWS, FILE_BYTES = 100_000, 512 * 2**20  # before compression
REBUILD = "run the same command again and it is rebuilt"


class DatasetError(RuntimeError):
    """Something stored is missing, damaged, or not what was asked for."""


class DatasetRef(BaseModel):
    """Names a data set. What steps hand to each other instead of rows or paths."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    digest: str = Field(pattern=r"^[0-9a-f]{32}$")
    row_type: str
    rows: int = Field(ge=1)

    @property
    def name(self) -> str:
        """Where it lies in the home."""
        return f"datasets/{self.step}/{self.digest}"


class StoredFile(BaseModel):
    """A file as its manifest names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str
    bytes: int
    rows: int | None = None  # None: not a file of rows


class Manifest(BaseModel):
    """What a data set holds and where it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    ref: DatasetRef
    files: tuple[StoredFile, ...]
    parents: tuple[DatasetRef, ...]
    settings: dict[str, JsonValue]
    written_at: AwareDatetime


def write_rows(
    rows: Iterable[R],
    row_type: type[R],
    *,
    step: str,
    parents: Sequence[DatasetRef] = (),
    settings: Mapping[str, object] | None = None,
) -> DatasetRef:
    """Store rows as a data set, streaming; equal rows in equal order are stored once.

    Raises:
        DatasetError: there are no rows, or one does not fit its type.
    """
    return write_batches(_batched(rows, row_type, step), row_type, step=step, parents=parents, settings=settings)


def join_rows(
    parts: Sequence[DatasetRef],
    row_type: type[R],
    *,
    step: str,
    parents: Sequence[DatasetRef] = (),
    settings: Mapping[str, object] | None = None,
) -> DatasetRef:
    """The parts one after the other as one data set, the same as if their rows had been written at once.

    Raises:
        DatasetError: a part is gone or is damaged.
    """
    batches = (batch for part in parts for batch in _batches(part, None, arrow_schema(row_type)))
    return write_batches(batches, row_type, step=step, parents=parents, settings=settings)


def write_batches(
    batches: Iterable[pa.RecordBatch],
    row_type: type[Row],
    *,
    step: str,
    parents: Sequence[DatasetRef] = (),
    settings: Mapping[str, object] | None = None,
) -> DatasetRef:
    """What `write_rows` does, of rows that are Arrow batches already (`storage.schemas.batch_like`).

    Raises:
        DatasetError: there are no rows.
    """
    folder = home() / "datasets" / checked_name(step, "a step's name")
    plain_settings = json.loads(canonical_json(settings or {}))
    origin = {"step": step, "row_type": row_type.__name__, "settings": plain_settings}
    origin["parents"] = [parent.model_dump() for parent in parents]
    with attempt_folder(folder) as attempt:
        files, digest = _write_files(attempt, batches, row_type, origin)
        count = sum(file.rows or 0 for file in files)
        if not count:
            raise DatasetError(f"step {step!r} has no rows to store; its log line says what was dropped and why")
        ref = DatasetRef(step=step, digest=digest, row_type=row_type.__name__, rows=count)
        now = datetime.now(UTC)
        manifest = Manifest(ref=ref, files=files, parents=tuple(parents), settings=plain_settings, written_at=now)
        put_file(attempt / MANIFEST, manifest.model_dump_json(indent=1), replace=True)
        commit_folder(attempt, folder / digest, is_whole=lambda: what_is_wrong(ref, deep=True) is None)
    return ref


def read_rows(ref: DatasetRef, row_type: type[R], part: range | None = None) -> Iterator[R]:
    """The rows of a data set in the order they were written, streaming; each file's digest is checked first.

    Args:
        part: numbers of the rows wanted; files that hold none of them are not read. None: all.
    Raises:
        DatasetError: it holds other rows, is gone or is damaged.
    """
    return (row for batch in read_batches(ref, row_type, part) for row in rows_of(batch, row_type))


def read_batches(
    ref: DatasetRef, row_type: type[Row], part: range | None = None, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """What `read_rows` does, as Arrow batches, of all columns or those named."""
    if ref.row_type != row_type.__name__:
        raise DatasetError(f"{ref.name} holds {ref.row_type} rows, {row_type.__name__} rows were expected")
    return _batches(ref, columns, arrow_schema(row_type), part)


def read_columns(ref: DatasetRef, row_type: type[Row], names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """What `read_rows` does, of each row these columns only, in the order of the names."""
    for batch in read_batches(ref, row_type, columns=names):
        yield from zip(*(batch[name].to_pylist() for name in names), strict=True)


def iter_batches(ref: DatasetRef, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a data set of any type as Arrow batches, all columns or those named, checked like `read_rows`."""
    return _batches(ref, columns, None)


def data_files(ref: DatasetRef) -> list[Path]:
    """The Parquet files of a whole data set, in order, for tools that read them themselves."""
    manifest = read_manifest(ref)
    if wrong := what_is_wrong(ref):
        raise DatasetError(f"{wrong}; {REBUILD}")
    fetch_absent(ref.name, manifest.files)
    return [home() / ref.name / file.name for file in manifest.files]


def read_manifest(ref: DatasetRef) -> Manifest:
    """What a data set says about itself.

    Raises:
        DatasetError: there is no readable manifest of this data set.
    """
    path = home() / ref.name / MANIFEST
    if not path.exists():
        fetch(path)
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DatasetError(f"{ref.name} is gone, or was never finished: it has no {MANIFEST}; {REBUILD}") from error
    except ValidationError as error:
        raise DatasetError(f"{ref.name}/{MANIFEST} cannot be read: {error.errors()[0]['msg']}; {REBUILD}") from error
    if manifest.ref != ref:
        raise DatasetError(f"{ref.name}/{MANIFEST} describes {manifest.ref!r}, expected {ref!r}; {REBUILD}")
    return manifest


def what_is_wrong(ref: DatasetRef, *, deep: bool = False) -> str | None:
    """None if the data set is whole, else what is missing or damaged. `deep` also compares each file's digest."""
    try:
        manifest = read_manifest(ref)
    except DatasetError as error:
        return str(error).removesuffix(f"; {REBUILD}")
    if sum(file.rows or 0 for file in manifest.files) != ref.rows:
        return f"{ref.name}/{MANIFEST} names files of fewer or more than {ref.rows} rows"
    return what_is_wrong_with_files(manifest.files, ref.name, deep=deep)


def what_is_wrong_with_files(files: Iterable[StoredFile], name: str, *, deep: bool) -> str | None:
    """None if all files of the folder `name` of the home are there with their sizes (`deep`: and their digests).

    One that only the home's object store has, with its size, is there; its digest is compared when it is fetched.
    """
    in_store: dict[str, int] | None = None
    for file in files:
        path = home() / name / file.name
        if not path.is_file():
            in_store = sizes(name) if in_store is None else in_store
            if in_store.get(file.name) == file.bytes:
                continue
            return f"{name}/{file.name} is missing"
        wrong = _what_is_wrong_with_file(path, file, name, deep=deep)
        if wrong and fetch_again(path):
            wrong = _what_is_wrong_with_file(path, file, name, deep=True)
        if wrong:
            return wrong
    return None


def fetch_absent(name: str, files: Iterable[StoredFile]) -> None:
    """Have the files of the folder `name` of the home on this machine, where an object store has them.

    Raises:
        DatasetError: the store's are damaged; they count as gone now.
    """
    try:
        fetch_files(name, [(file.name, file.bytes, file.sha256) for file in files])
    except DamagedObjectError as error:
        raise DatasetError(f"{error}; {REBUILD}") from error


def _what_is_wrong_with_file(path: Path, file: StoredFile, name: str, *, deep: bool) -> str | None:
    if path.stat().st_size != file.bytes:
        return f"{name}/{file.name} has {path.stat().st_size} bytes, its manifest says {file.bytes}"
    if deep and file_sha256(path) != file.sha256:
        return f"{name}/{file.name} is damaged: its sha256 is not the one in its manifest"
    return None


def _write_files(
    folder: Path, batches: Iterable[pa.RecordBatch], row_type: type[Row], origin: Mapping[str, object]
) -> tuple[tuple[StoredFile, ...], str]:
    schema = arrow_schema(row_type).with_metadata({f"ratchet.{k}": canonical_json(v) for k, v in origin.items()})
    digest, files = RowsDigest(schema), list[StoredFile]()
    groups = _row_groups(batches, digest)
    while group := next(groups, None):
        path = folder / f"part-{len(files):05d}.parquet"
        count, size = 0, 0
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            while group is not None:
                writer.write_table(group.replace_schema_metadata(schema.metadata), row_group_size=GROUP_ROWS)
                count, size = count + group.num_rows, size + group.nbytes
                group = next(groups, None) if count < FILE_ROWS and size < FILE_BYTES else None
        files.append(StoredFile(name=path.name, sha256=file_sha256(path), bytes=path.stat().st_size, rows=count))
    return tuple(files), digest.hexdigest()


def _batched(rows: Iterable[R], row_type: type[R], step: str) -> Iterator[pa.RecordBatch]:
    remaining = iter(rows)
    while chunk := list(islice(remaining, BATCH_ROWS)):
        try:
            yield batch_of(chunk, row_type)
        except ValueError as error:
            raise DatasetError(f"step {step!r} cannot store its {row_type.__name__} rows: {error}") from error


def _row_groups(batches: Iterable[pa.RecordBatch], digest: RowsDigest) -> Iterator[pa.Table]:
    group: list[pa.RecordBatch] = []
    for batch in batches:
        digest.update(batch)
        group.append(batch)
        if sum(b.num_rows for b in group) >= GROUP_ROWS or sum(b.nbytes for b in group) >= GROUP_BYTES:
            yield pa.Table.from_batches(group)
            group = []
    if group:
        yield pa.Table.from_batches(group)


def _batches(
    ref: DatasetRef, columns: Sequence[str] | None, expected: pa.Schema | None, part: range | None = None
) -> Iterator[pa.RecordBatch]:
    number = 0  # of the row that comes next
    for file in read_manifest(ref).files:
        if part is not None and not (part.start < number + (file.rows or 0) and number < part.stop):
            number += file.rows or 0
            continue
        fetch_absent(ref.name, [file])
        if wrong := what_is_wrong_with_files([file], ref.name, deep=True):
            raise DatasetError(f"{wrong}; {REBUILD}")
        with pq.ParquetFile(home() / ref.name / file.name) as parquet:
            if expected is not None and not parquet.schema_arrow.equals(expected, check_metadata=False):
                raise DatasetError(
                    f"{ref.name}/{file.name} has columns {parquet.schema_arrow.names}, a {ref.row_type} row now has "
                    f"{expected.names}: another version of ratchet wrote it; raise the step's version and run it again"
                )
            seen = 0
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False):
                wanted = batch if part is None else _within(batch, number + seen, part)
                seen += batch.num_rows
                if wanted.num_rows:
                    yield wanted
        if seen != file.rows:
            raise DatasetError(f"{ref.name}/{file.name} holds {seen} rows, its manifest says {file.rows}; {REBUILD}")
        number += seen


def _within(batch: pa.RecordBatch, number: int, part: range) -> pa.RecordBatch:
    """The rows of the batch, whose first has this number, that are in the part."""
    start = min(max(part.start - number, 0), batch.num_rows)
    return batch.slice(start, max(part.stop - number - start, 0))
