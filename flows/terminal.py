"""What a run came to, as tables in a terminal."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from storage.experiments import Experiment, IterationRecord

if TYPE_CHECKING:
    from tasks.tables import PublishedFigure
    from tasks.yields import YieldTable


def iteration_tables(records: Sequence[IterationRecord]) -> Iterator[Table]:
    """Accuracy by policy and strategy, and the funnel of each iteration."""
    strategies = list(dict.fromkeys(name for record in records for name in record.metrics))
    accuracy = Table(title="Accuracy on the test split, % (95 % interval)", title_justify="left")
    for heading in ("policy", *strategies, "n", "gate"):
        words = heading in ("policy", "gate")
        accuracy.add_column(heading, justify="left" if words else "right", no_wrap=words)
    for record in records:
        cells = [_percent(record.metrics.get(strategy)) for strategy in strategies]
        prompts = {str(metric["n"]) for metric in record.metrics.values()}
        accuracy.add_row(record.label, *cells, " / ".join(sorted(prompts)), _gate(record))
    yield accuracy
    if any(record.funnel for record in records):
        yield _funnel_table([record for record in records if record.funnel])


def status_tables(experiment: Experiment) -> Iterator[Any]:
    """An experiment's state, its iterations and the steps of its last run."""
    state = experiment.state()
    yield f"[bold]{experiment.name}[/bold]: {state.state}, run {state.run}, started {state.started_at}"
    if state.error:
        yield f"[red]{state.error}[/red]"
    yield from iteration_tables(experiment.iterations())
    steps = Table(title="Steps of the last run", title_justify="left")
    for heading in ("step", "iteration", "shard", "state", "rows", "seconds", "counts"):
        steps.add_column(heading)
    for record in experiment.steps(run=state.run):
        told = "failed: " + record.detail if record.state == "failed" else "cached" if record.cached else "done"
        steps.add_row(
            " ".join(filter(None, [record.split, record.step])),
            _optional(record.iteration),
            _optional(record.shard),
            told,
            f"{record.rows:,}" if record.rows else "",
            f"{record.seconds:.1f}",
            counts_told(record.counts),
        )
    yield steps


def published_table(rows: "Sequence[PublishedFigure]") -> Table:
    """Each published figure, and ours beside it."""
    table = Table(title="Published, and ours, % (95 % interval)", title_justify="left")
    for heading, justify in (("policy", "left"), ("strategy", "left"), ("published", "right"), ("ours", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type] # rich's own Literal
    for row in rows:
        ours = "not run" if row.ours is None else _percent(row.ours)
        table.add_row(row.label, row.strategy, "-" if row.published is None else f"{row.published:g}", ours)
    return table


def yield_table(found: "YieldTable") -> Table:
    """Rows left after each stage, ours and the published ones."""
    table = Table(title="From queries to pairs", title_justify="left")
    table.add_column("stage")
    for heading in ("ours", *found.columns):
        table.add_column(heading, justify="right")
    for row in found.rows:
        table.add_row(row.stage, *map(_yield, (row.ours, *row.published)))
    return table


def counts_told(counts: dict[str, int]) -> str:
    """Rows by reason or stage, in words."""
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())


def _percent(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return "-"
    return f"{100 * metric['value']:.1f} ({100 * metric['low']:.0f}-{100 * metric['high']:.0f})"


def _gate(record: IterationRecord) -> str:
    if record.decision is None:
        return "start"
    return "[green]promoted[/green]" if record.promoted else "[red]held back[/red]"


def _funnel_table(records: Sequence[IterationRecord]) -> Table:
    table = Table(title="What became of the rollouts", title_justify="left")
    stages = sorted({stage: None for record in records for stage in record.funnel}, key=lambda s: s == "trained_on")
    table.add_column("iteration")
    for stage in stages:
        table.add_column(stage.replace("_", " "), justify="right")
    for record in records:
        table.add_row(record.label, *(f"{record.funnel[s]:,}" if s in record.funnel else "-" for s in stages))
    return table


def _yield(count: float | None) -> str:
    return "-" if count is None else f"{count:,.0f}" if count == int(count) else f"{count:.2f}"


def _optional(number: int | None) -> str:
    return "" if number is None else str(number)
