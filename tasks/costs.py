"""What an experiment cost: calls, seconds and sampled tokens, by kind of step and by run, from the records of steps."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from storage.experiments import StepRecord
from storage.report_rows import ReportedCost

SAMPLING = "sample_rollouts"
ON_THE_ENGINE = frozenset(
    {
        SAMPLING,
        "answer_benchmark",
        "build_base",
        "compare_shard",
        "judge_shard",
        "score_tokens",
        "train_preferences",
        "train_sft",
    }
)


@dataclass(slots=True)
class Spending:
    """What some calls cost together."""

    calls: int = 0
    cached: int = 0
    failed: int = 0
    seconds: float = 0.0
    saved_seconds: float = 0.0
    engine_seconds: float = 0.0
    accelerator_seconds: float | None = 0.0
    tokens: int = 0
    reused_rollouts: int = 0

    def add(self, record: StepRecord, saved: float, accelerators: int | None) -> None:
        """Count one call."""
        self.calls += 1
        self.cached += record.cached
        self.failed += record.state == "failed"
        self.seconds += record.seconds
        self.saved_seconds += saved
        if record.step == SAMPLING:
            self.tokens += record.counts.get("tokens", 0)
            self.reused_rollouts += record.counts.get("reused", 0)
        if record.step in ON_THE_ENGINE and record.seconds:
            self.engine_seconds += record.seconds
            known = self.accelerator_seconds is not None and accelerators is not None
            self.accelerator_seconds = (
                (self.accelerator_seconds or 0.0) + record.seconds * (accelerators or 0) if known else None
            )


def calls(steps: Iterable[StepRecord]) -> Iterator[StepRecord]:
    """The records that stand for calls: a sampling's own and not its shards', which run at the same time.

    A sampling that failed has no record of its own; the longest of its failed shards stands for it.
    """
    failed: dict[tuple[str, int | None, str | None], StepRecord] = {}
    for record in steps:
        sampling = (record.run, record.iteration, record.split)
        if record.shard is None:
            if record.step == SAMPLING:  # in the end it was done, retries included
                failed.pop(sampling, None)
            yield record
        elif record.state == "failed" and (sampling not in failed or record.seconds > failed[sampling].seconds):
            failed[sampling] = record
    yield from failed.values()


def spending(
    records: Iterable[StepRecord],
    by: Callable[[StepRecord], str],
    saved: Callable[[StepRecord], float],
    accelerators: Mapping[str, int | None],
) -> dict[str, Spending]:
    """What calls cost, grouped; groups in the order in which they are met.

    Args:
        saved: the seconds that a cached call took when it was done.
        accelerators: of the machine that a run was on; a run that is not there is not known.
    """
    groups: dict[str, Spending] = {}
    for record in records:
        group = groups.setdefault(by(record), Spending())
        group.add(record, saved(record) if record.cached else 0.0, accelerators.get(record.run))
    return groups


def cost_rows(groups: Mapping[str, Spending]) -> list[ReportedCost]:
    """The groups as rows of a report, the dearest first."""
    rows = [
        ReportedCost(
            step=step,
            calls=spent.calls,
            cached=spent.cached,
            failed=spent.failed,
            seconds=round(spent.seconds, 3),
            saved_seconds=round(spent.saved_seconds, 3),
            engine_seconds=round(spent.engine_seconds, 3),
            accelerator_seconds=spent.accelerator_seconds,
            tokens=spent.tokens,
            reused_rollouts=spent.reused_rollouts,
        )
        for step, spent in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)
