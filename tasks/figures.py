"""Figures by matplotlib as inline SVG that follows the page it stands in.

Colours are variables of the page's style sheet, so that a figure is light or dark as the page is, and text stays text.
"""

import io
import re
from typing import Any, NamedTuple

WIDTH = 4.7  # inches; at 72 points each, a phone's width
SERIES = 8  # colours there are; further lines are dashed
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


def line_style(number: int) -> dict[str, Any]:
    """How the line of this number looks."""
    return {
        "color": series_colour(number),
        "linestyle": "-" if number < SERIES else "--",
        "linewidth": 1.6,
        "markersize": 4,
    }


def series_colour(number: int) -> str:
    """The colour of this number, as a variable of the page."""
    return f"#c000{number % SERIES:02x}"


def new_figure(height: float) -> tuple[Any, Any]:
    """A figure of this height in inches, and its axes."""
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


def add_legend(figure: Any) -> None:
    """Name the lines below them, where a phone has room."""
    figure.legend(loc="outside lower center", ncols=2, handlelength=1.6, columnspacing=1.4, labelspacing=0.3)


def as_chart(figure: Any, caption: str) -> Chart:
    """The figure as SVG, without what would be invalid or in the way inside a page."""
    from markupsafe import Markup, escape

    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    for unwanted in UNWANTED:
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    svg = re.sub(r"#c000([0-9a-f]{2})", r"var(--c\1)", svg)
    named = f'<svg role="img" aria-label="{escape(caption)}"'
    return Chart(caption, Markup(svg.replace("<svg", named, 1)))  # matplotlib escapes what labels hold
