"""Figures as SVG that follows the page it stands in."""

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from storage.report_rows import (
    ReportedCost,
    ReportedCurve,
    ReportedDecision,
    ReportedMetric,
    ReportedRollouts,
    ReportedStage,
    ReportedTraining,
)
from tasks import charts
from tasks.figures import Chart

pytestmark = pytest.mark.flow  # matplotlib takes too long to load for every save
HOSTILE = "</svg><script>$x$ & #c00001"


def metrics(labels: list[str]) -> list[ReportedMetric]:
    figures: dict[str, Any] = {"promoted": True, "value": 0.5, "low": 0.4, "high": 0.6, "n": 40, "k": 1}
    return [
        ReportedMetric(iteration=number, label=label, split=split, strategy="mean@1", **figures)
        for number, label in enumerate(labels)
        for split in ("dev", "test")
    ]


def training(iteration: int, name: str, values: list[float]) -> list[ReportedTraining]:
    return [
        ReportedTraining(iteration=iteration, label=f"policy {iteration}", optimizer_step=n, name=name, value=value)
        for n, value in enumerate(values)
    ]


def texts(chart: Chart) -> list[str]:
    """What stands in a figure; it is well-formed XML, or this fails."""
    named = str(chart.svg).replace("xlink:href", "href")
    return ["".join(one.itertext()) for one in ElementTree.fromstring(named).iter() if one.tag.endswith("text")]


def test_colours_are_the_pages_and_nothing_is_left_that_would_style_the_page() -> None:
    (chart,) = charts.accuracy_chart(metrics(["base", "iteration 1"]))
    svg = str(chart.svg)
    assert "var(--c00)" in svg
    assert re.findall(r"#[0-9a-f]{6}\b", svg) == []
    assert "<style" not in svg
    assert "<metadata" not in svg
    assert svg.startswith('<svg role="img" aria-label="Accuracy on the test split')
    assert "width=" not in svg[: svg.index(">")]


def test_labels_are_text_whatever_they_hold() -> None:
    (chart,) = charts.accuracy_chart(metrics(["base", HOSTILE]))
    assert "<script" not in chart.svg
    assert any("$x$" in text for text in texts(chart))


def test_many_policies_are_told_by_their_numbers() -> None:
    few, many = (next(charts.accuracy_chart(metrics([f"policy {n}" for n in range(count)]))) for count in (3, 9))
    assert {"policy 0", "policy 2"} <= set(texts(few))
    assert "policy 2" not in texts(many)
    assert {"0", "8"} <= set(texts(many))


def test_equal_rows_are_drawn_alike() -> None:
    first, second = (next(charts.accuracy_chart(metrics(["base", "dpo"]))) for _ in range(2))
    assert first == second


def test_a_curve_is_drawn_over_powers_of_two() -> None:
    points = [
        ReportedCurve(iteration=0, label="base", k=k, value=k / 8, low=0.1, high=0.9, prompts=40, rollouts=6)
        for k in range(1, 7)
    ]
    (chart,) = charts.pass_chart(points)
    assert {"1", "2", "4", "base"} <= set(texts(chart))
    assert "8" not in texts(chart)


def test_a_decision_is_drawn_in_the_colour_of_its_verdict() -> None:
    common: dict[str, Any] = {"against": "base", "rule": "better", "strategy": "mean@1", "low": -0.1, "high": 0.2}
    rows = [
        ReportedDecision(
            iteration=n, label=f"policy {n}", promoted=promoted, difference=0.1, p_value=0.1, n=9, reason="", **common
        )
        for n, promoted in ((1, True), (2, False))
    ]
    good, both = (str(next(charts.gate_chart(some)).svg) for some in (rows[:1], rows))
    assert "var(--c12)" in good
    assert "var(--c13)" not in good
    assert "var(--c13)" in both


def test_each_iteration_has_a_funnel_and_left_out_rows_are_no_stage() -> None:
    rows = [
        ReportedStage(iteration=n, label=f"policy {n}", stage=stage, rows=count, left_out=left_out)
        for n in (1, 2)
        for stage, count, left_out in (("sampled", 3200, False), ("kept", 383, False), ("duplicate", 99, True))
    ]
    first, second = charts.funnel_charts(rows)
    assert (first.caption, second.caption) == (
        "policy 1: rows left after each stage",
        "policy 2: rows left after each stage",
    )
    assert set(texts(first)) == {"sampled", "kept", "3,200", "383"}


def test_lengths_and_shares_are_drawn_for_scored_and_unscored_rollouts() -> None:
    def rollouts(role: str, undecided: int | None) -> ReportedRollouts:
        return ReportedRollouts(
            iteration=1,
            label="policy 1",
            role=role,
            dataset="datasets/rollouts/26f1",
            rollouts=10,
            prompts=5,
            mean_tokens=9.5,
            median_tokens=9,
            tenth_tokens=5,
            ninetieth_tokens=20,
            truncated=1,
            duplicates=2,
            undecided=undecided,
            correct=undecided,
        )

    lengths, shares = charts.drift_charts([rollouts("training", None), rollouts("test", 3)])
    assert {"training, mean", "training, median", "test, mean", "test, median"} <= set(texts(lengths))
    assert "undecided, test" in texts(shares)
    assert "undecided, training" not in texts(shares)


def test_the_base_imitation_and_preferences_are_drawn_apart() -> None:
    rows = [
        *training(0, "loss", [9.0, 1.0]),
        *training(1, "loss", [0.5, 0.1]),
        *training(2, "loss", [0.7, 0.6]),
        *training(2, "rewards/margins", [0.0, 0.2]),
        *training(2, "rewards/chosen", [0.0, 0.1]),
        *training(2, "rewards/rejected", [0.0, -0.1]),
        *training(2, "no one draws this", [0.0, 1.0]),
    ]
    assert [chart.caption for chart in charts.training_charts(rows)] == [
        "Base: loss",
        "Imitation: loss",
        "Preferences: loss",
        "Preferences: margin of rewards, chosen less rejected",
        "Preferences: reward of the chosen side; dotted, of the rejected one",
    ]


def test_a_long_training_is_drawn_with_few_points() -> None:
    (chart,) = charts.training_charts(training(1, "loss", [n % 7 for n in range(9_000)]))
    assert charts.POINTS == 240
    assert str(chart.svg).count("\nL ") < 300  # corners of all lines, of axes and ticks too


def test_where_there_is_nothing_to_draw_there_is_no_figure() -> None:
    free = ReportedCost(
        step="load_prompts",
        calls=1,
        cached=1,
        failed=0,
        seconds=0.0,
        saved_seconds=1.0,
        engine_seconds=0.0,
        accelerator_seconds=0.0,
        tokens=0,
        reused_rollouts=0,
    )
    drawn: list[Chart] = []
    for make in (
        charts.accuracy_chart,
        charts.pass_chart,
        charts.gate_chart,
        charts.funnel_charts,
        charts.drift_charts,
    ):
        drawn += make([])  # type: ignore[operator]
    assert drawn == []
    assert list(charts.training_charts([])) == list(charts.cost_chart([free])) == []
