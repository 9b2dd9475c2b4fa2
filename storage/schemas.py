"""The Parquet schema of each row type, and rows to and from Arrow batches."""

import dataclasses
import inspect
import types
import typing
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cache
from operator import attrgetter
from typing import TypeVar

import pyarrow as pa

from storage import rows as row_module
from storage.rows import Row

R = TypeVar("R", bound=Row)

_SCALARS: dict[object, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def arrow_schema(row_type: type[Row]) -> pa.Schema:
    """The Parquet schema of a row type; `X | None` is the only way to a nullable column.

    Raises:
        TypeError: an annotation is none of str, int, float, bool, list[...] of these, and `X | None`.
    """
    return _schema_of(row_type)  # type: ignore[arg-type]  # mypy takes a row's hash for that of its type


def row_types() -> dict[str, type[Row]]:
    """Each row type by its name, as manifests write it."""
    found = [kind for _, kind in inspect.getmembers(row_module, inspect.isclass) if issubclass(kind, Row)]
    return {kind.__name__: kind for kind in found if kind is not Row}


def batch_of(rows: Sequence[Row], row_type: type[Row]) -> pa.RecordBatch:
    """Rows as one Arrow batch.

    Raises:
        ValueError: a row is of another type, or a value does not fit its column.
    """
    if strangers := {kind.__name__ for kind in set(map(type, rows)) if kind is not row_type}:
        raise ValueError(f"expected {row_type.__name__} rows, found {', '.join(sorted(strangers))}")
    schema = arrow_schema(row_type)
    columns = [_array(list(map(attrgetter(field.name), rows)), field, rows) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def batch_like(batch: pa.RecordBatch, row_type: type[Row], **more: Sequence[object]) -> pa.RecordBatch:
    """A batch of another row type with the columns it has in common with this one, and more.

    Raises:
        ValueError: a value does not fit its column.
    """
    schema = arrow_schema(row_type)
    columns = [
        _array(more[field.name], field, range(batch.num_rows)) if field.name in more else batch[field.name]
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def rows_of(batch: pa.RecordBatch, row_type: type[R]) -> Iterator[R]:
    """The rows of an Arrow batch, in order.

    Their slots are filled a column at a time: a frozen dataclass's own `__init__` takes four times as long.
    """
    rows = [row_type.__new__(row_type) for _ in range(batch.num_rows)]
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        deque(map(getattr(row_type, name).__set__, rows, column.to_pylist()), maxlen=0)
    return iter(rows)


@cache
def _schema_of(row_type: type[Row]) -> pa.Schema:
    hints = typing.get_type_hints(row_type)
    return pa.schema([_field(row_type, field.name, hints[field.name]) for field in dataclasses.fields(row_type)])


def _field(row_type: type[Row], name: str, annotation: object) -> pa.Field:
    options = typing.get_args(annotation)
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    nullable = is_union and len(options) == 2 and type(None) in options
    inner = next(option for option in options if option is not type(None)) if nullable else annotation
    if typing.get_origin(inner) is list and typing.get_args(inner)[0] in _SCALARS:
        element = pa.field("item", _SCALARS[typing.get_args(inner)[0]], nullable=False)
        return pa.field(name, pa.list_(element), nullable=nullable)
    if inner not in _SCALARS:
        raise TypeError(
            f"{row_type.__name__}.{name} is annotated {annotation!r}; a column can be str, int, float, bool, "
            "a list[...] of one of these, or one of all these `| None`"
        )
    return pa.field(name, _SCALARS[inner], nullable=nullable)


def _array(values: Sequence[object], field: pa.Field, rows: Sequence[object]) -> pa.Array:
    """The values as an array; an error quotes what `rows` says of the first one at fault."""
    try:
        array = pa.array(values, type=field.type)
    except (pa.ArrowException, UnicodeError, TypeError, OverflowError) as error:
        raise ValueError(f"a value does not fit column {field.name!r} ({field.type}): {error}") from error
    has_hole = array.null_count and not field.nullable
    if has_hole or (pa.types.is_list(field.type) and array.flatten().null_count):
        raise ValueError(f"column {field.name!r} must not hold None; {rows[_first_hole(values)]!r} does")
    return array


def _first_hole(values: Sequence[object]) -> int:
    return next(i for i, value in enumerate(values) if value is None or (isinstance(value, list) and None in value))
