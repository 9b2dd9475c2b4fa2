"""The tables of a report as Parquet files."""

import dataclasses
import io
import math
from typing import Any

import pyarrow.parquet as pq
import pytest

from storage.report_rows import TABLES, ReportedPublished, ReportedTraining, parquet_of, plain
from storage.schemas import arrow_schema


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_typed_columns_even_without_rows(name: str) -> None:
    table = pq.read_table(io.BytesIO(parquet_of([], TABLES[name])))
    assert (table.num_rows, table.schema) == (0, arrow_schema(TABLES[name]))


def test_rows_come_back_with_what_is_unknown() -> None:
    common: dict[str, Any] = {"label": "SFT", "strategy": "maj@16", "low": None, "high": None, "n": None}
    rows = [
        ReportedPublished(published=0.72, value=None, **common),
        ReportedPublished(published=None, value=0.5, **common),
    ]
    table = pq.read_table(io.BytesIO(parquet_of(rows, ReportedPublished)))
    assert table.to_pylist() == [plain(row) for row in rows] == [dataclasses.asdict(row) for row in rows]


def test_a_figure_that_is_no_number_is_none_in_json() -> None:
    values = {value: plain(training(value))["value"] for value in (0.5, math.inf, -math.inf)}
    assert values == {0.5: 0.5, math.inf: None, -math.inf: None}
    assert plain(training(math.nan))["value"] is None


def training(value: float) -> ReportedTraining:
    return ReportedTraining(iteration=1, label="SFT", optimizer_step=1, name="grad_norm", value=value)
