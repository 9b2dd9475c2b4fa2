"""A dry run: the flow itself is called, and each step says what it would do instead of doing it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

_PLAN: ContextVar["list[PlannedStep] | None"] = ContextVar("plan", default=None)


class PlannedStep(NamedTuple):
    """What one step of a run would do."""

    step: str
    iteration: int | None
    cached: bool
    why: str  # it runs; empty when cached
    rows: int | None  # that it would write, at most; None: not known before it runs
    reads: str
    split: str | None = None
    arguments: Mapping[str, Any] = {}  # what it was called with
    made: Any = None  # what is stored of it, or a placeholder

    def told(self) -> dict[str, Any]:
        """What programs are told."""
        return {name: getattr(self, name) for name in ("step", "iteration", "cached", "why", "rows", "reads")}


@contextmanager
def planning() -> Iterator[list[PlannedStep]]:
    """Steps called inside add themselves to the list, read the store and write nothing."""
    planned: list[PlannedStep] = []
    token = _PLAN.set(planned)
    try:
        yield planned
    finally:
        _PLAN.reset(token)


def current_plan() -> list[PlannedStep] | None:
    """The plan being made; None in a real run."""
    return _PLAN.get()
