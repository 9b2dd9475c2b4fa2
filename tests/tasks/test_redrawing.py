"""Charts are drawn again only when what they show has changed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.report_rows import ReportedCost, ReportedStage
from tasks import charts, redrawing
from tasks.redrawing import charts_of

pytestmark = pytest.mark.flow  # matplotlib takes too long for every save

STAGE = ReportedStage(iteration=1, label="iteration 1", stage="sampled", rows=160, left_out=False)
COST = ReportedCost(
    step="train_sft",
    calls=1,
    cached=0,
    failed=0,
    seconds=4.0,
    saved_seconds=0.0,
    engine_seconds=4.0,
    accelerator_seconds=None,
    tokens=0,
    reused_rollouts=0,
)


def tables(*, stage: ReportedStage = STAGE, cost: ReportedCost = COST) -> dict[str, Any]:
    return {
        **{name: [] for name in ("metrics", "pass_at_k", "decisions", "rollouts", "training")},
        "funnel": [stage],
        "costs": [cost],
    }


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each time that charts were drawn."""
    times: list[str] = []
    draw = redrawing._drawn

    def counted(rows: Any) -> Any:
        times.append("drawn")
        return draw(rows)

    monkeypatch.setattr(redrawing, "_drawn", counted)
    return times


def test_charts_of_the_same_rows_are_drawn_once_and_stay_the_same(tmp_path: Path, drawn: list[str]) -> None:
    first = charts_of(tables(), tmp_path)
    assert charts_of(tables(), tmp_path) == first
    assert [chart.caption for chart in first["funnel"]] == ["iteration 1: rows left after each stage"]
    assert first["funnel"][0].svg.startswith("<svg")
    assert drawn == ["drawn"]


def test_a_call_that_was_cached_changes_no_chart_and_one_that_was_paid_does(tmp_path: Path, drawn: list[str]) -> None:
    charts_of(tables(), tmp_path)
    charts_of(tables(cost=replace(COST, calls=2, cached=1, saved_seconds=4.0)), tmp_path)
    assert drawn == ["drawn"]
    charts_of(tables(cost=replace(COST, calls=2, seconds=8.0)), tmp_path)
    assert drawn == ["drawn", "drawn"]


def test_other_rows_and_other_code_are_drawn_anew(
    tmp_path: Path, drawn: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    charts_of(tables(), tmp_path)
    assert ">161<" in charts_of(tables(stage=replace(STAGE, rows=161)), tmp_path)["funnel"][0].svg
    code = tmp_path / "charts.py"
    code.write_text("# another version\n")
    monkeypatch.setattr(charts, "__file__", str(code))
    charts_of(tables(stage=replace(STAGE, rows=161)), tmp_path)
    assert len(drawn) == 3


@pytest.mark.parametrize("torn", ['{"digest": "ab', "[]", ""])
def test_charts_that_a_kill_left_torn_are_drawn_again(torn: str, tmp_path: Path, drawn: list[str]) -> None:
    first = charts_of(tables(), tmp_path)
    (tmp_path / "charts.json").write_text(torn)
    assert charts_of(tables(), tmp_path) == first
    assert len(drawn) == 2
