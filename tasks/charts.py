"""Rows of a report -> figures as inline SVG, by matplotlib.

Colours are variables of the page's style sheet, so that a figure follows its light or dark scheme, and text stays text.
A figure is as wide as a phone; on a wide page they stand side by side.
"""

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
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

WIDTH = 4.7  # inches; at 72 points each, a phone's width
LABEL_WIDTH = 16  # characters of a policy's label, in a line
LABELLED = 5  # policies that have room for their labels; more are told by their numbers
POINTS = 240  # of a drawn line
SERIES = 8  # colours there are; further lines are dashed
LOGGED = {  # what trainers log, as it is called here; in this order
    "loss": "loss",
    "rewards/margins": "margin of rewards, chosen less rejected",
    "rewards/accuracies": "share of pairs with the chosen side ahead",
    "rewards/chosen": "reward of the chosen side; dotted, of the rejected one",
    "mean_token_accuracy": "share of tokens that are the likeliest",
    "learning_rate": "learning rate",
}
BESIDE = {"rewards/chosen": "rewards/rejected"}  # drawn dotted in the same figure
UNWANTED = (  # in the page it would be invalid, or in the way of its own style
    r"<metadata>.*?</metadata>",
    r"<style [^>]*>.*?</style>",
    r'(?<=<g) id="[A-Za-z.0-9]+_\d+"',
    r"font-family: [^;\"]*; ?",
    r' width="[\d.]+pt" height="[\d.]+pt"',
)
INK, SOFT, GOOD, BAD = "#c00010", "#c00011", "#c00012", "#c00013"  # replaced by variables, as are those of series


class Chart(NamedTuple):
    """A figure and what it shows."""

    caption: str
    svg: Any  # Markup


def accuracy_chart(rows: Sequence[ReportedMetric]) -> Iterator[Chart]:
    """Each strategy's figure on test, policy by policy, with intervals."""
    rows = [row for row in rows if row.split == "test"]
    if not rows:
        return
    strategies = list(dict.fromkeys(row.strategy for row in rows))
    figure, axes = _figure(3.2)
    for number, strategy in enumerate(strategies):
        known = [row for row in rows if row.strategy == strategy]
        values = [100 * row.value for row in known]
        below = [max(0.0, 100 * (row.value - row.low)) for row in known]
        above = [max(0.0, 100 * (row.high - row.value)) for row in known]
        places = [row.iteration + 0.06 * (number - (len(strategies) - 1) / 2) for row in known]
        axes.errorbar(places, values, yerr=[below, above], label=strategy, capsize=2, marker="o", **_line(number))
    _policies_below(axes, rows)
    axes.set_ylabel("correct, %")
    _legend(figure)
    yield _chart(figure, "Accuracy on the test split by policy, with 95 % intervals")


def pass_chart(rows: Sequence[ReportedCurve]) -> Iterator[Chart]:
    """pass@k of each policy, with its band."""
    if not rows:
        return
    figure, axes = _figure(3.2)
    for _, points in _by_policy(rows):
        ks, line = [row.k for row in points], _line(points[0].iteration)
        axes.plot(ks, [100 * row.value for row in points], label=points[0].label, **line)
        low, high = [100 * row.low for row in points], [100 * row.high for row in points]
        axes.fill_between(ks, low, high, color=line["color"], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    ticks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= max(row.k for row in rows)]
    axes.set_xticks(ticks, [str(k) for k in ticks], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("k rollouts")
    axes.set_ylabel("prompts with a right one, %")
    _legend(figure)
    yield _chart(figure, "pass@k on the test split, unbiased, with 95 % bands over prompts")


def gate_chart(rows: Sequence[ReportedDecision]) -> Iterator[Chart]:
    """The difference that each decision went by, with its interval."""
    if not rows:
        return
    figure, axes = _figure(0.9 + 0.42 * len(rows))
    for place, row in enumerate(rows):
        colour = GOOD if row.promoted else BAD
        axes.plot([100 * row.low, 100 * row.high], [place, place], color=colour, linewidth=2)
        axes.plot([100 * row.difference], [place], color=colour, marker="o", markersize=6)
    axes.axvline(0, color=SOFT, linewidth=1)
    axes.set_yticks(range(len(rows)), [_wrapped(row.label) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("challenger less incumbent on dev, points")
    yield _chart(figure, "What the gate went by: paired differences with 95 % intervals")


def funnel_charts(rows: Sequence[ReportedStage]) -> Iterator[Chart]:
    """Of each iteration, the rows that are left after each stage."""
    for label, stages in _by_policy([row for row in rows if not row.left_out]):
        figure, axes = _figure(0.35 + 0.27 * len(stages))
        counts, most = [row.rows for row in stages], max(row.rows for row in stages)
        axes.barh(range(len(stages)), counts, color=_colour(0), height=0.72, alpha=0.85)
        for place, count in enumerate(counts):
            axes.text(count + 0.012 * most, place, f"{count:,}", va="center")
        axes.set_yticks(range(len(stages)), [row.stage.replace("_", " ") for row in stages])
        axes.set_ylim(len(stages) - 0.5, -0.5)
        axes.set_xlim(0, 1.16 * most)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(left=False)
        yield _chart(figure, f"{label}: rows left after each stage")


def drift_charts(rows: Sequence[ReportedRollouts]) -> Iterator[Chart]:
    """How long completions are, and how many are cut, doubled or undecided, policy by policy."""
    if not rows:
        return
    roles = {role: list(told) for role, told in groupby(sorted(rows, key=lambda row: row.role), lambda row: row.role)}
    figure, axes = _figure(3.0)
    for number, (role, told) in enumerate(roles.items()):
        places, line = [row.iteration for row in told], _line(number)
        axes.plot(places, [row.mean_tokens for row in told], marker="o", label=f"{role}, mean", **line)
        dotted = {**line, "linestyle": ":"}
        axes.plot(places, [row.median_tokens for row in told], marker="_", label=f"{role}, median", **dotted)
        if role == "test":
            low, high = [row.tenth_tokens for row in told], [row.ninetieth_tokens for row in told]
            axes.fill_between(places, low, high, color=line["color"], alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens of a completion")
    _policies_below(axes, rows)
    _legend(figure)
    yield _chart(figure, "Length of completions; the band holds the middle 80 % of those on test")
    figure, axes = _figure(3.0)
    for number, (name, count) in enumerate(SHARES.items()):
        for role, told in roles.items():
            known = [(row.iteration, 100 * count(row) / row.rollouts) for row in told if count(row) is not None]
            style = {**_line(number), "linestyle": "-" if role == "test" else ":"}
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", label=f"{name}, {role}", **style)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("of rollouts, %")
    _policies_below(axes, rows)
    _legend(figure)
    yield _chart(figure, "Rollouts that are cut off, say what another one says, or could not be decided")


SHARES: dict[str, Any] = {
    "duplicate": lambda row: row.duplicates,
    "truncated": lambda row: row.truncated,
    "undecided": lambda row: row.undecided,
}


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
            figure, axes = _figure(2.7)
            for label, points in logged:
                axes.plot(*_drawn(points), label=label, **_line(points[0].iteration))
            for _, points in _by_policy([row for row in of_kind if row.name == BESIDE.get(name)]):
                axes.plot(*_drawn(points), **{**_line(points[0].iteration), "linestyle": ":"})
            axes.set_xlabel("optimizer step")
            _legend(figure)
            yield _chart(figure, f"{kind}: {told}")


def _drawn(points: Sequence[ReportedTraining]) -> tuple[list[int], list[float]]:
    few = thinned(points, POINTS)
    return [row.optimizer_step for row in few], [row.value for row in few]


def cost_chart(rows: Sequence[ReportedCost]) -> Iterator[Chart]:
    """Where the time went."""
    paid = [row for row in rows if row.seconds >= 0.001][:10]
    if not paid:
        return
    figure, axes = _figure(0.5 + 0.27 * len(paid))
    most = max(row.seconds for row in paid)
    colours = [_colour(1) if row.engine_seconds else _colour(0) for row in paid]
    axes.barh(range(len(paid)), [row.seconds for row in paid], color=colours, height=0.72, alpha=0.85)
    for place, row in enumerate(paid):
        axes.text(row.seconds + 0.012 * most, place, f"{row.seconds:,.1f} s", va="center")
    axes.set_yticks(range(len(paid)), [row.step.replace("_", " ") for row in paid])
    axes.set_ylim(len(paid) - 0.5, -0.5)
    axes.set_xlim(0, 1.2 * most)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(left=False)
    yield _chart(figure, "Seconds by step over all runs; in the second colour, an engine or a training was at work")


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


def _line(number: int) -> dict[str, Any]:
    return {"color": _colour(number), "linestyle": "-" if number < SERIES else "--", "linewidth": 1.6, "markersize": 4}


def _colour(number: int) -> str:
    return f"#c000{number % SERIES:02x}"


def _figure(height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "ratchet",
            "font.size": 9,
            "text.parse_math": False,  # a label may hold a dollar sign
            "text.color": INK,
            **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
            **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), SOFT),
            **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
            "axes.grid.axis": "y",
            "grid.color": SOFT,
            "grid.alpha": 0.25,
        }
    )
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Any) -> None:
    figure.legend(loc="outside lower center", ncols=2, handlelength=1.6, columnspacing=1.4, labelspacing=0.3)


def _chart(figure: Any, caption: str) -> Chart:
    from markupsafe import Markup, escape

    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    for unwanted in UNWANTED:
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    svg = re.sub(r"#c000([0-9a-f]{2})", r"var(--c\1)", svg)
    named = f'<svg role="img" aria-label="{escape(caption)}"'
    return Chart(caption, Markup(svg.replace("<svg", named, 1)))  # matplotlib escapes what labels hold
