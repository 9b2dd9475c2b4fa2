"""What a run looks like in a terminal: a line a step, a bar while rollouts are drawn, tables at the end.

Where the output is no terminal there is no bar, but a plain line now and then, so that a log file can be read.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from storage.experiments import Experiment, IterationRecord, StepRecord

if TYPE_CHECKING:
    from tasks.recording import Progress as RowProgress
    from tasks.tables import PublishedFigure
    from tasks.yields import YieldTable

PLAIN_SECONDS = 10.0  # between two progress lines where there is no bar


class Lines:
    """Listens to a run and shows it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}  {task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._started = self._said = 0.0
        self._before = 0  # rollouts that were done when the bar began
        self._lock = threading.Lock()

    def __enter__(self) -> "Lines":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, event: "StepRecord | RowProgress") -> None:
        """Show one event; called from any thread."""
        with self._lock:
            if isinstance(event, StepRecord):
                self._step(event)
            else:
                self._rows(event)

    def _step(self, record: StepRecord) -> None:
        if record.shard is not None and record.state == "completed":
            return  # the data set they make together gets a line
        if record.step.startswith(("gather_", "answer_")) and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        split = f"{record.split} " if record.split else ""
        where = f"{'' if record.iteration is None else f'it{record.iteration}':<4}{split:<5}"
        name = record.step + (f" shard {record.shard}" if record.shard is not None else "")
        self._console.print(f"{where}{name:<22}{_how(record)}", markup=False, style=_style(record))

    def _rows(self, event: "RowProgress") -> None:
        now = time.monotonic()
        if self._task is None:
            self._started, self._said, self._before = now, now, event.done
            self._task = self._bar.add_task(event.step, total=event.total, speed="", unit=event.unit)
        seconds = max(now - self._started, 0.1)
        written, judged = event.tokens / seconds, (event.done - self._before) / seconds
        speed = f"{written:,.0f} tokens/s" if event.tokens else f"{judged:,.0f} {event.unit}/s"
        self._bar.update(self._task, description=event.step, completed=event.done, total=event.total, speed=speed)
        if not self._console.is_terminal and now - self._said >= PLAIN_SECONDS:
            self._said = now
            done = f"{event.done:,} of {event.total:,} {event.unit}"
            self._console.print(f"      {event.step}: {done}, {speed}", markup=False)


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
            _counts(record.counts),
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


def _how(record: StepRecord) -> str:
    if record.state == "failed":
        return f"FAILED after {record.seconds:.1f} s: {record.detail}"
    rows = f"{record.rows:>8,} rows" if record.rows else " " * 13
    seconds = "  cached" if record.cached else f"{record.seconds:6.1f} s"
    return f"{rows} {seconds}  {_counts(record.counts)}".rstrip()


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())


def _style(record: StepRecord) -> str:
    return "red" if record.state == "failed" else "dim" if record.cached else "none"


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
