"""Row types as Parquet schemas."""

import dataclasses

import pyarrow as pa
import pytest

from storage.rows import Prompt, Row, ScoredRollout
from storage.schemas import arrow_schema, batch_of, row_types, rows_of
from tests.storage.builders import prompts, rollout


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lists(Row):
    names: list[str]
    values: list[float] | None


def test_only_columns_that_may_be_none_are_nullable() -> None:
    schema = arrow_schema(ScoredRollout)
    assert [field.name for field in schema if field.nullable] == ["cumulative_logprob", "answer", "reward"]
    assert schema.field("rollout_index").type == pa.int64()
    assert schema.field("reward").type == pa.float64()


def test_every_row_type_is_found_by_its_name() -> None:
    assert row_types()["Prompt"] is Prompt
    assert "Row" not in row_types()


def test_an_annotation_without_a_column_type_is_refused_by_name() -> None:
    made = dataclasses.make_dataclass("Odd", [("tags", dict[str, int])], bases=(Row,), frozen=True)
    with pytest.raises(TypeError, match=r"Odd\.tags is annotated dict"):
        arrow_schema(made)


def test_lists_survive_arrow() -> None:
    rows = [Lists(names=[], values=None), Lists(names=["", "ä\x00b"], values=[]), Lists(names=["c"], values=[0.5])]
    assert list(rows_of(batch_of(rows, Lists), Lists)) == rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        pytest.param(
            Prompt(prompt_id="p", source="s", prompt=None, answer=None), "'prompt' must not hold None", id="hole"
        ),  # type: ignore[arg-type]
        pytest.param(
            Prompt(prompt_id=7, source="s", prompt="q", answer=None), "does not fit column 'prompt_id'", id="int"
        ),  # type: ignore[arg-type]
        pytest.param(
            Prompt(prompt_id="p", source="s", prompt="\ud800", answer=None), "fit column 'prompt'", id="surrogate"
        ),
        pytest.param(rollout(), "expected Prompt rows, found Rollout", id="other type"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(row: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_of([*prompts(2), row], Prompt)
