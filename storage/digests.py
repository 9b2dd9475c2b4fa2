"""Digests: of plain JSON, of files and of rows. What has the same content has the same name, wherever it lies."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

DIGEST_LENGTH = 32  # hex digits kept of a sha256; 128 bits are plenty against accidents


def canonical_json(value: object) -> str:
    """The one way a JSON value is spelled: sorted keys, no spaces, ASCII, no NaN.

    Raises:
        ValueError: the value is not plain JSON, so another process could not spell it the same way.
    """
    plain = dict(value) if isinstance(value, Mapping) else value
    try:
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"only plain JSON can be stored or keyed, but: {error}; found {value!r}") from error


def digest_of(value: object) -> str:
    """Digest of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:DIGEST_LENGTH]


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, all 64 hex digits, read as a stream."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class RowsDigest:
    """Digest of rows in their order, the same however they are cut into batches and files.

    Each column is hashed as streams (which values are there, how long, their bytes), and streams know no batches.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._columns = [_ColumnDigest() for _ in schema]
        self._rows = 0

    def update(self, batch: pa.RecordBatch) -> None:
        """Add the rows of one batch."""
        self._rows += batch.num_rows
        for column, array in zip(self._columns, batch.columns, strict=True):
            column.update(array)

    def hexdigest(self) -> str:
        """Digest of the schema and of all rows so far."""
        fields = [f"{field.name}:{field.type}:{field.nullable}" for field in self._schema]
        return digest_of([fields, self._rows, [column.hexdigests() for column in self._columns]])


class _ColumnDigest:
    """Streams of one column; a list's elements are a column of their own."""

    def __init__(self) -> None:
        self._validity, self._lengths, self._bytes = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        self._elements: _ColumnDigest | None = None

    def update(self, array: pa.Array) -> None:
        self._validity.update(_numbers(array.is_valid(), np.uint8))
        if pa.types.is_list(array.type):
            self._lengths.update(_numbers(pc.list_value_length(array).fill_null(0), np.int64))
            self._elements = self._elements or _ColumnDigest()
            self._elements.update(array.flatten())
        elif pa.types.is_string(array.type):
            self._lengths.update(_numbers(pc.binary_length(array).fill_null(0), np.int64))
            self._bytes.update(_text_bytes(array.drop_null()))
        else:
            kind = np.uint8 if pa.types.is_boolean(array.type) else np.dtype(array.type.to_pandas_dtype())
            self._bytes.update(_numbers(array.drop_null(), kind))

    def hexdigests(self) -> list[object]:
        own = [stream.hexdigest() for stream in (self._validity, self._lengths, self._bytes)]
        return [*own, self._elements.hexdigests() if self._elements else None]


def _numbers(array: pa.Array, kind: "np.typing.DTypeLike") -> bytes:
    values = np.asarray(array.to_numpy(zero_copy_only=False)).astype(kind, copy=False)
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _text_bytes(array: pa.Array) -> memoryview:
    _, offsets, text = array.buffers()
    if text is None:
        return memoryview(b"")
    ends = np.frombuffer(offsets, dtype=np.int32)[array.offset : array.offset + len(array) + 1]
    return memoryview(text)[int(ends[0]) : int(ends[-1])] if len(array) else memoryview(b"")
