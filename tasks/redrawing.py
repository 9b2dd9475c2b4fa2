"""The charts of a report, drawn again only when what they show has changed.

experiments/<name>/report/charts.json   the charts, and the digest of what they were drawn from

Drawing takes longer than all else in a run that reuses every step: importing matplotlib alone takes half a second.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from storage.committing import put_file
from storage.digests import digest_of
from storage.report_rows import plain
from storage.rows import Row
from tasks import charts, figures
from tasks.figures import Chart

Tables = Mapping[str, Sequence[Any]]


def charts_of(tables: Tables, folder: Path | None) -> dict[str, list[Chart]]:
    """The charts of these tables by what they are about.

    Args:
        folder: where those drawn last are kept, and taken from if they are the same; None: nowhere.
    """
    if folder is None:
        return _drawn(tables)
    file, digest = folder / "charts.json", _digest(tables)
    kept = _kept(file)
    if kept.get("digest") != digest:
        kept = {"digest": digest, "charts": _drawn(tables)}
        put_file(file, json.dumps(kept), replace=True)
    from markupsafe import Markup

    return {name: [Chart(caption, Markup(svg)) for caption, svg in found] for name, found in kept["charts"].items()}


def _drawn(tables: Tables) -> dict[str, list[Chart]]:
    return {
        "accuracy": list(charts.accuracy_chart(tables["metrics"])),
        "pass": list(charts.pass_chart(tables["pass_at_k"])),
        "gate": list(charts.gate_chart(tables["decisions"])),
        "funnel": list(charts.funnel_charts(tables["funnel"])),
        "rollouts": list(charts.drift_charts(tables["rollouts"])),
        "training": list(charts.training_charts(tables["training"])),
        "cost": list(charts.cost_chart(tables["costs"])),
    }


def _digest(tables: Tables) -> str:
    """Of the rows that are shown, and of the code that draws them."""
    shown: list[Sequence[Row]] = [
        tables[name] for name in ("metrics", "pass_at_k", "decisions", "funnel", "rollouts", "training")
    ]
    rows = [[plain(row) for row in rows] for rows in shown]
    code = [Path(str(module.__file__)).read_text() for module in (charts, figures)]
    return digest_of([version("matplotlib"), code, rows, charts.dearest(tables["costs"])])


def _kept(file: Path) -> dict[str, Any]:
    try:
        kept = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # none yet, or of a run that was killed
        return {}
    return kept if isinstance(kept, dict) else {}
