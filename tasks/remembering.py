"""What earlier runs of an experiment took, as its record has it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from storage.experiments import Experiment, StepRecord, experiments
from tasks.estimates import Past


class History(NamedTuple):
    """What earlier runs took."""

    past: tuple[Past, ...]
    told: str  # whose runs; empty: there are none


def history_of(config: Any) -> History:
    """What this experiment's earlier runs took, or else those of others with the same base and engine."""
    wanted = config.model_dump(mode="json")
    alike = []
    for other in experiments():
        known = other.config()
        if other.name == config.experiment or (known.get("base"), known.get("engine")) == (
            wanted.get("base"),
            wanted.get("engine"),
        ):
            alike.append(other)
    own = [one for one in alike if one.name == config.experiment and one.steps()]
    used: list[Experiment] = own or alike
    past = tuple(one for experiment in used for one in _past_of(experiment))
    return History(past, f"earlier runs of {', '.join(one.name for one in used)}" if past else "")


def _tells_something(record: StepRecord) -> bool:
    return record.state == "completed" and not record.cached and record.shard is None


def _past_of(experiment: Experiment) -> Iterator[Past]:
    started = set[str]()  # runs whose engine is up
    for record in filter(_tells_something, experiment.steps()):
        yield _past(record, starts=bool(record.counts.get("drawn")) and record.run not in started)
        if record.counts.get("drawn"):
            started.add(record.run)


def _past(record: StepRecord, *, starts: bool) -> Past:
    counts = record.counts
    return Past(
        step=record.step,
        split=record.split,
        rows_in=counts.get("sampled"),
        rows=record.rows,
        drawn=counts.get("drawn", 0),
        tokens=counts.get("tokens", 0),
        optimizer_steps=counts.get("optimizer_steps", 0),
        seconds=record.seconds,
        starts=starts,
    )
