"""Rows of a report -> charts. Each is as wide as a phone; on a wide page they stand side by side."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from storage.report_rows import (
    ReportedCost,
    ReportedCurve,
    ReportedDecision,
    ReportedMetric,
    ReportedRollouts,
    ReportedStage,
    ReportedTraining,
)
from tasks.curves import thinned
from tasks.figures import BAD, GOOD, SOFT, Chart, add_legend, as_chart, line_style, new_figure, series_colour

LABEL_WIDTH = 16  # characters of a policy's label, in a line
LABELLED = 5  # policies that have room for their labels; more are told by their numbers
POINTS = 240  # of a drawn line
DEAREST = 10  # steps in the figure of costs
LOGGED = {  # what trainers log, as it is called here; in this order
    "loss": "loss",
    "rewards/margins": "margin of rewards, chosen less rejected",
    "rewards/accuracies": "share of pairs with the chosen side ahead",
    "rewards/chosen": "reward of the chosen side; dotted, of the rejected one",
    "mean_token_accuracy": "share of tokens that are the first choice of the model",
    "learning_rate": "learning rate",
}
SHARES = {"duplicate": "duplicates", "truncated": "truncated", "undecided": "undecided"}  # name -> column
BESIDE = {"rewards/chosen": "rewards/rejected"}  # drawn dotted in the same figure


def accuracy_chart(rows: Sequence[ReportedMetric]) -> Iterator[Chart]:
    """Each strategy's figure on test, policy by policy, with intervals."""
    rows = [row for row in rows if row.split == "test"]
    if not rows:
        return
    strategies = list(dict.fromkeys(row.strategy for row in rows))
    figure, axes = new_figure(3.2)
    for number, strategy in enumerate(strategies):
        known = [row for row in rows if row.strategy == strategy]
        values = [100 * row.value for row in known]
        below = [max(0.0, 100 * (row.value - row.low)) for row in known]
        above = [max(0.0, 100 * (row.high - row.value)) for row in known]
        places = [row.iteration + 0.06 * (number - (len(strategies) - 1) / 2) for row in known]
        axes.errorbar(places, values, yerr=[below, above], label=strategy, capsize=2, marker="o", **line_style(number))
    _policies_below(axes, rows)
    axes.set_ylabel("correct, %")
    add_legend(figure)
    yield as_chart(figure, "Accuracy on the test split by policy, with 95 % intervals")


def pass_chart(rows: Sequence[ReportedCurve]) -> Iterator[Chart]:
    """pass@k of each policy, with its band."""
    if not rows:
        return
    figure, axes = new_figure(3.2)
    for _, points in _by_policy(rows):
        ks, line = [row.k for row in points], line_style(points[0].iteration)
        axes.plot(ks, [100 * row.value for row in points], label=points[0].label, **line)
        low, high = [100 * row.low for row in points], [100 * row.high for row in points]
        axes.fill_between(ks, low, high, color=line["color"], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    ticks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= max(row.k for row in rows)]
    axes.set_xticks(ticks, [str(k) for k in ticks], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("k rollouts")
    axes.set_ylabel("prompts with a right one, %")
    add_legend(figure)
    yield as_chart(figure, "pass@k on the test split, unbiased, with 95 % bands over prompts")


def gate_chart(rows: Sequence[ReportedDecision]) -> Iterator[Chart]:
    """The difference that each decision went by, with its interval."""
    if not rows:
        return
    figure, axes = new_figure(0.9 + 0.42 * len(rows))
    for place, row in enumerate(rows):
        colour = GOOD if row.promoted else BAD
        axes.plot([100 * row.low, 100 * row.high], [place, place], color=colour, linewidth=2)
        axes.plot([100 * row.difference], [place], color=colour, marker="o", markersize=6)
    axes.axvline(0, color=SOFT, linewidth=1)
    axes.set_yticks(range(len(rows)), [_wrapped(row.label) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("challenger less incumbent on dev, points")
    yield as_chart(figure, "What the gate went by: paired differences with 95 % intervals")


def funnel_charts(rows: Sequence[ReportedStage]) -> Iterator[Chart]:
    """Of each iteration, the rows that are left after each stage."""
    for label, stages in _by_policy([row for row in rows if not row.left_out]):
        bars = [_Bar(row.stage, row.rows, f"{row.rows:,}", series_colour(0)) for row in stages]
        yield _bar_chart(bars, f"{label}: rows left after each stage")


def drift_charts(rows: Sequence[ReportedRollouts]) -> Iterator[Chart]:
    """How long completions are, and how many are cut, doubled or undecided, policy by policy."""
    if not rows:
        return
    roles = {role: list(told) for role, told in groupby(sorted(rows, key=lambda row: row.role), lambda row: row.role)}
    figure, axes = new_figure(3.0)
    for number, (role, told) in enumerate(roles.items()):
        places, line = [row.iteration for row in told], line_style(number)
        axes.plot(places, [row.mean_tokens for row in told], marker="o", label=f"{role}, mean", **line)
        dotted = {**line, "linestyle": ":"}
        axes.plot(places, [row.median_tokens for row in told], marker="_", label=f"{role}, median", **dotted)
        if role == "test":
            low, high = [row.tenth_tokens for row in told], [row.ninetieth_tokens for row in told]
            axes.fill_between(places, low, high, color=line["color"], alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens of a completion")
    _policies_below(axes, rows)
    add_legend(figure)
    yield as_chart(figure, "Length of completions; the band holds the middle 80 % of those on test")
    yield _share_chart(rows, roles)


def _share_chart(rows: Sequence[ReportedRollouts], roles: Mapping[str, Sequence[ReportedRollouts]]) -> Chart:
    figure, axes = new_figure(3.0)
    for number, (name, column) in enumerate(SHARES.items()):
        for role, told in roles.items():
            counts = [(row.iteration, row.rollouts, getattr(row, column)) for row in told]
            known = [(place, 100 * count / rollouts) for place, rollouts, count in counts if count is not None]
            style = {**line_style(number), "linestyle": "-" if role == "test" else ":"}
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", label=f"{name}, {role}", **style)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("of rollouts, %")
    _policies_below(axes, rows)
    add_legend(figure)
    return as_chart(figure, "Rollouts that are cut off, say what another one says, or could not be decided")


def training_charts(rows: Sequence[ReportedTraining]) -> Iterator[Chart]:
    """What was logged in training: of the base, of imitation and of preferences, whose scales have little in common."""
    preferring = {row.iteration for row in rows if row.name == "rewards/margins"}
    kinds = {row.iteration: "Preferences" if row.iteration in preferring else "Imitation" for row in rows}
    kinds |= {0: "Base"} if 0 in kinds else {}
    for name, told in LOGGED.items():
        for kind in ("Base", "Imitation", "Preferences"):
            of_kind = [row for row in rows if kinds[row.iteration] == kind]
            logged = list(_by_policy([row for row in of_kind if row.name == name]))
            if not logged:
                continue
            figure, axes = new_figure(2.7)
            for label, points in logged:
                axes.plot(*_drawn(points), label=label, **line_style(points[0].iteration))
            for _, points in _by_policy([row for row in of_kind if row.name == BESIDE.get(name)]):
                axes.plot(*_drawn(points), **{**line_style(points[0].iteration), "linestyle": ":"})
            axes.set_xlabel("optimizer step")
            add_legend(figure)
            yield as_chart(figure, f"{kind}: {told}")


def _drawn(points: Sequence[ReportedTraining]) -> tuple[list[int], list[float]]:
    few = thinned(points, POINTS)
    return [row.optimizer_step for row in few], [row.value for row in few]


class Dear(NamedTuple):
    """What a figure of costs shows of one kind of step."""

    step: str
    seconds: float
    on_engine: bool  # an engine or a training was at work


def dearest(rows: Sequence[ReportedCost]) -> list[Dear]:
    """The steps that cost most."""
    return [Dear(row.step, row.seconds, bool(row.engine_seconds)) for row in rows[:DEAREST] if row.seconds >= 0.001]


def cost_chart(rows: Sequence[ReportedCost]) -> Iterator[Chart]:
    """Where the time went."""
    bars = [
        _Bar(one.step, one.seconds, f"{one.seconds:,.1f} s", series_colour(int(one.on_engine))) for one in dearest(rows)
    ]
    if bars:
        told = "Seconds by step over all runs; in the second colour, an engine or a training was at work"
        yield _bar_chart(bars, told)


class _Bar(NamedTuple):
    name: str
    value: float
    told: str
    colour: str


def _bar_chart(bars: Sequence[_Bar], caption: str) -> Chart:
    figure, axes = new_figure(0.35 + 0.27 * len(bars))
    most = max(bar.value for bar in bars)
    colours = [bar.colour for bar in bars]
    axes.barh(range(len(bars)), [bar.value for bar in bars], color=colours, height=0.72, alpha=0.85)
    for place, bar in enumerate(bars):
        axes.text(bar.value + 0.012 * most, place, bar.told, va="center")
    axes.set_yticks(range(len(bars)), [bar.name.replace("_", " ") for bar in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 1.2 * most or 1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(left=False)
    return as_chart(figure, caption)


def _by_policy(rows: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    for _, found in groupby(rows, key=lambda row: row.iteration):
        points = list(found)
        yield points[0].label, points


def _policies_below(axes: Any, rows: Sequence[Any]) -> None:
    labels = {row.iteration: row.label for row in rows}
    if len(labels) <= LABELLED:
        axes.set_xticks(list(labels), [_wrapped(label) for label in labels.values()])
    else:
        axes.set_xticks(list(labels), [str(number) for number in labels])
        axes.set_xlabel("iteration, as numbered in the first table")


def _wrapped(label: str) -> str:
    return textwrap.fill(label, LABEL_WIDTH, break_long_words=False)
