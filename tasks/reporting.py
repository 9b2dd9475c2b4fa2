"""An experiment's records and data sets -> report.html, the same facts as report.json and Parquet, Prefect artifacts.

experiments/<name>/report.html          one page that loads nothing, for any screen, light or dark
experiments/<name>/report.json          what `ratchet status --json` says, and all tables of the report
experiments/<name>/report/<table>.parquet   the tables, typed as storage/report_rows.py says
experiments/<name>/report/charts.json   the page's charts, for the next page
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from storage.committing import put_file
from storage.experiments import Experiment, IterationRecord
from storage.report_rows import TABLES, ReportedOrigin, parquet_of, plain
from tasks.assembling import Report, assemble
from tasks.costs import calls
from tasks.notices import notices, summary
from tasks.observing import publish_markdown
from tasks.planning import current_plan
from tasks.redrawing import charts_of
from tasks.tables import calibration_table, held_out_losses, pair_table
from tasks.yields import yields

SHOWN_STEPS = 400  # of the last run, in the page; report.json has all
SHOWN_ALIKE = 8  # things that one step made in one iteration for one split: shards, mostly
SHOWN_PARENTS = 12


def write_report(experiment: Experiment) -> Path:
    """Write report.html, report.json and the tables into the experiment's folder; the path of the first."""
    report = assemble(experiment)
    for name, rows in report.tables.items():
        put_file(experiment.folder / "report" / f"{name}.parquet", parquet_of(rows, TABLES[name]), replace=True)
    put_file(experiment.folder / "report.json", json.dumps(told(experiment, report), indent=1), replace=True)
    html = experiment.folder / "report.html"
    put_file(html, render(report, experiment.folder / "report"), replace=True)
    return html


def publish_report(experiment: Experiment) -> None:
    """Write the report, and show its gist in the Prefect UI; in a plan, nothing."""
    if current_plan() is not None:
        return
    path = write_report(experiment)
    iterations = experiment.iterations()
    rows = [f"| {record.label} | {_figures(record)} | {_decided(record)} |" for record in iterations]
    table = "\n".join(["| policy | test, % | gate |", "|---|---|---|", *rows])
    gist = "\n\n".join([f"# {experiment.name}", *summary(iterations), table])
    publish_markdown(experiment.name, f"{gist}\n\nThe whole report: `{path}`\n")


def facts(experiment: Experiment) -> dict[str, Any]:
    """What `ratchet status --json` says of an experiment (DESIGN 11)."""
    state = experiment.state()
    return {
        "experiment": experiment.name,
        "state": state.state,
        "error": state.error,
        "run": state.run,
        "iterations": [record.model_dump() for record in experiment.iterations()],
        "steps": [
            record.model_dump(
                include={
                    "step",
                    "iteration",
                    "split",
                    "shard",
                    "state",
                    "cached",
                    "rows",
                    "digest",
                    "seconds",
                    "counts",
                    "detail",
                }
            )
            for record in experiment.steps(run=state.run)
        ],
    }


def told(experiment: Experiment, report: Report) -> dict[str, Any]:
    """What report.json says: the facts, the summary, the notices, the settings and every table as rows."""
    return {
        **facts(experiment),
        "summary": list(summary(report.iterations)),
        "notices": list(notices(report.state, report.iterations, report.tables, report.gaps)),
        "settings": report.config,
        "tables": {name: [plain(row) for row in rows] for name, rows in report.tables.items()},
    }


def render(report: Report, folder: Path | None = None) -> str:
    """The report as one self-contained HTML page.

    Args:
        folder: where charts are kept from one drawing to the next.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "count": _count, "duration": duration, "short": _short}
    page = environment.from_string(Path(__file__).with_name("report.html").read_text())
    last_run = list(calls(record for record in report.steps if record.run == report.state.run))
    lineage = shown_lineage([row for row in report.tables["lineage"] if isinstance(row, ReportedOrigin)])
    return page.render(
        report=report,
        name=report.experiment,
        config=report.config,
        state=report.state,
        iterations=report.iterations,
        tables=report.tables,
        summary=list(summary(report.iterations)),
        notices=list(notices(report.state, report.iterations, report.tables, report.gaps)),
        strategies=list(dict.fromkeys(one for record in report.iterations for one in record.metrics)),
        charts=charts_of(report.tables, folder),
        yields=yields(report.config, [record for record in report.steps if record.run == report.state.run]),
        calibrations=[(record.label, table) for record in report.iterations if (table := calibration_table(record))],
        held_out_losses=list(held_out_losses(report.iterations)),
        pairs=[(record.label, sides) for record in report.iterations if (sides := pair_table(record))],
        lineage=lineage,
        lineage_left_out=len(report.tables["lineage"]) - len(lineage),
        made={row.name for row in lineage},
        shown_parents=SHOWN_PARENTS,
        kept_apart=_kept_apart(report),
        steps=last_run[-SHOWN_STEPS:],
        steps_left_out=max(0, len(last_run) - SHOWN_STEPS),
        settings=yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True, width=100),
    )


def shown_lineage(rows: Sequence[ReportedOrigin]) -> list[ReportedOrigin]:
    """The rows, but of many that are alike the first few: an experiment may have thousands of shards."""
    alike: Counter[tuple[str, int | None, str | None]] = Counter()
    shown = []
    for row in rows:
        alike[row.step, row.iteration, row.split] += 1
        if alike[row.step, row.iteration, row.split] <= SHOWN_ALIKE:
            shown.append(row)
    return shown


def duration(seconds: float) -> str:
    """Seconds as people say them: "4 min 12 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), seconds / 3600
    return (
        f"{round(seconds) // 60} min {round(seconds) % 60} s" if hours < 1 else f"{minutes // 60} h {minutes % 60} min"
    )


def _kept_apart(report: Report) -> dict[str, int]:
    """Rows that were left out of training because of held-out text, or could not be checked; as the steps say."""
    told = ("holds a question of", "holds a prompt of", "could not be checked", "few-shot examples left out")
    last_run = (record for record in report.steps if record.run == report.state.run)
    return {
        reason: count
        for record in last_run
        for reason, count in record.counts.items()
        if any(part in reason for part in told)
    }


def _figures(record: IterationRecord) -> str:
    return ", ".join(f"{strategy} {100 * metric['value']:.1f}" for strategy, metric in record.metrics.items())


def _decided(record: IterationRecord) -> str:
    return "start" if record.decision is None else str(record.decision["reason"])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _short(name: str) -> str:
    """A reference with the beginning of its digest: "scored/26f1a0c3"."""
    head, _, digest = name.removeprefix("datasets/").rpartition("/")
    return f"{head}/{digest[:8]}" if head else name[:40]
