"""What a run looks like while it goes on: a line a step, and bars while rollouts are drawn or a policy is trained.

Where the output is no terminal there are no bars and no control characters, but a line with the time now and then, so
that a log file can be read.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from flows.terminal import counts_told
from storage.experiments import StepRecord

if TYPE_CHECKING:
    from tasks.recording import Progress as RowProgress
    from tasks.recording import ShardProgress

PLAIN_SECONDS = 10.0  # between two progress lines where there are no bars
BARS = 8  # shards with a bar of their own; the others are in the bar of all
ALL = -1  # the bar of all shards


@dataclass(slots=True)
class Begun:
    """When something was first heard of, and what was done by then."""

    at: float
    done: int
    tokens: int


class Lines:
    """Listens to a run and shows it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("  {task.description:<22}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[told]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._shown: dict[int, TaskID] = {}
        self._begun: dict[int, Begun] = {}
        self._step: tuple[str, int | None, str | None, int] | None = None  # whose bars these are
        self._said = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> "Lines":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, event: "StepRecord | RowProgress") -> None:
        """Show one event; called from any thread."""
        with self._lock:
            if isinstance(event, StepRecord):
                self._record(event)
            else:
                self._progress(event)

    def _record(self, record: StepRecord) -> None:
        if record.shard is not None and record.state == "completed":
            return  # the data set they make together gets a line
        if record.shard is None:
            self._forget()
        split = f"{record.split} " if record.split else ""
        where = f"{'' if record.iteration is None else f'it{record.iteration}':<4}{split:<5}"
        name = record.step + (f" shard {record.shard}" if record.shard is not None else "")
        self._say(f"{where}{name:<22}{_how(record)}", style=_style(record))

    def _progress(self, event: "RowProgress") -> None:
        now, step = time.monotonic(), (event.step, event.iteration, event.split, event.total)
        if step != self._step:
            self._forget()
            self._step, self._said = step, now
        rate = self._rate(ALL, event.done, event.tokens, now)
        told = _told(event, rate)
        if self._console.is_terminal:
            self._show(ALL, event.step, event.done, event.total, told)
            self._show_shards(event.shards, now)
        elif now - self._said >= PLAIN_SECONDS:
            self._said = now
            name = " ".join(
                filter(None, ["" if event.iteration is None else f"it{event.iteration}", event.split, event.step])
            )
            self._say(f"  {name}: {told}{_shards_done(event.shards)}")

    def _show_shards(self, shards: "Sequence[ShardProgress]", now: float) -> None:
        """Bars of the shards under way that began first."""
        if len(shards) < 2:
            return
        rates = {one.number: self._rate(one.number, one.done, one.tokens, now) for one in shards if one.tokens}
        under_way = [one for one in shards if one.number in rates and one.done < one.total][:BARS]
        for number in self._shown.keys() - {ALL} - {one.number for one in under_way}:
            self._bars.remove_task(self._shown.pop(number))
        for one in under_way:
            told = ", ".join(
                [
                    f"{one.done:,}/{one.total:,}",
                    *_speeds(rates[one.number], "rows"),
                    *_matching([one]),
                    *_left(one.done, one.total, rates[one.number]),
                ]
            )
            self._show(one.number, f"  shard {one.number}", one.done, one.total, told)

    def _show(self, number: int, name: str, done: int, total: int, told: str) -> None:
        if number not in self._shown:
            self._shown[number] = self._bars.add_task(name, total=total, told=told)
        self._bars.update(self._shown[number], completed=done, told=told)

    def _rate(self, number: int, done: int, tokens: int, now: float) -> tuple[float, float]:
        """Rows and tokens a second since this was first heard of."""
        begun = self._begun.setdefault(number, Begun(now, done, tokens))
        seconds = max(now - begun.at, 0.1)
        return (done - begun.done) / seconds, (tokens - begun.tokens) / seconds

    def _forget(self) -> None:
        for task in self._shown.values():
            self._bars.remove_task(task)
        self._shown, self._begun, self._step = {}, {}, None

    def _say(self, line: str, style: str | None = None) -> None:
        at = "" if self._console.is_terminal else f"{datetime.now():%H:%M:%S} "
        self._console.print(f"{at}{line}", markup=False, style=style)


def _told(event: "RowProgress", rate: tuple[float, float]) -> str:
    """For instance "1,200 of 3,200 rollouts, 640 rollouts/s, 10,500 tokens/s, 41 % match, 3 s left"."""
    speeds = [event.detail] if event.detail else _speeds(rate, event.unit)
    reused = [f"{event.reused:,} were there"] if event.reused else []
    done = f"{event.done:,} of {event.total:,} {event.unit}"
    return ", ".join([done, *reused, *speeds, *_matching(event.shards), *_left(event.done, event.total, rate)])


def _speeds(rate: tuple[float, float], unit: str) -> Iterator[str]:
    rows, tokens = rate
    if rows:
        yield f"{rows:,.0f} {unit}/s" if rows >= 10 else f"{rows:.1f} {unit}/s"
    if tokens:
        yield f"{tokens:,.0f} tokens/s"


def _matching(shards: "Sequence[ShardProgress]") -> Iterator[str]:
    """The share of the rollouts drawn so far that a match with the gold answer would keep."""
    if compared := sum(one.compared for one in shards):
        yield f"{100 * sum(one.matching for one in shards) / compared:.0f} % match"


def _left(done: int, total: int, rate: tuple[float, float]) -> Iterator[str]:
    if rate[0] > 0 and done < total:
        seconds = round((total - done) / rate[0])
        yield f"{seconds // 60} min {seconds % 60} s left" if seconds >= 60 else f"{seconds} s left"


def _shards_done(shards: "Sequence[ShardProgress]") -> str:
    if len(shards) < 2:
        return ""
    return f"; {sum(one.done == one.total for one in shards)} of {len(shards)} shards done"


def _how(record: StepRecord) -> str:
    if record.state == "failed":
        return f"FAILED after {record.seconds:.1f} s: {record.detail}"
    rows = f"{record.rows:>8,} rows" if record.rows else " " * 13
    seconds = "  cached" if record.cached else f"{record.seconds:6.1f} s"
    return f"{rows} {seconds}  {counts_told(record.counts)}".rstrip()


def _style(record: StepRecord) -> str:
    return "red" if record.state == "failed" else "dim" if record.cached else "none"
