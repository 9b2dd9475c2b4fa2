"""Stored rollouts -> what they are like: curves, lengths, duplicates, reasons. Read column by column, each set once."""

from collections.abc import Iterator
from contextlib import suppress

from storage.datasets import DatasetError, DatasetRef, iter_batches
from storage.experiments import IterationRecord
from storage.report_rows import ReportedCurve, ReportedReason, ReportedRollouts
from storage.rows import Rollout, ScoredRollout
from tasks.curves import pass_curve
from tasks.drift import RolloutTally, Solved, mean_length, quantile
from tasks.lineage import Sources

UNSCORED = ("prompt_id", "completion", "completion_tokens", "finish_reason")
VERDICT = ("reward", "reason")


class Tallies:
    """What data sets of rollouts are like, each read once; `gaps` says which could not be."""

    def __init__(self) -> None:
        self.gaps: list[str] = []
        self._known: dict[DatasetRef, RolloutTally | None] = {}

    def of(self, ref: DatasetRef) -> RolloutTally | None:
        """None: it is gone or damaged."""
        if ref not in self._known:
            try:
                self._known[ref] = tally(ref)
            except DatasetError as error:
                self._known[ref] = None
                self.gaps.append(f"Rollouts could not be read, and their figures are left out: {error}")
        return self._known[ref]


def tally(ref: DatasetRef) -> RolloutTally:
    """What a data set of rollouts, scored or not, is like.

    Raises:
        DatasetError: it is gone or damaged.
    """
    counted = RolloutTally()
    is_scored = ref.row_type == ScoredRollout.__name__
    for batch in iter_batches(ref, [*UNSCORED, *(VERDICT if is_scored else ())]):
        prompt_ids, completions, tokens, finish_reasons = (batch.column(name).to_pylist() for name in UNSCORED)
        verdicts = (batch.column("reward").to_pylist(), batch.column("reason").to_pylist()) if is_scored else None
        counted.add(prompt_ids, completions, tokens, finish_reasons, verdicts)
    return counted


def solved_prompts(ref: DatasetRef) -> dict[str, Solved]:
    """Of each prompt of scored rollouts, how many are right; empty where they are gone."""
    solved: dict[str, Solved] = {}
    with suppress(DatasetError):  # a notice says so
        for batch in iter_batches(ref, ["prompt_id", "reward"]):
            columns = (batch.column(name).to_pylist() for name in ("prompt_id", "reward"))
            for prompt_id, reward in zip(*columns, strict=True):
                solved[prompt_id] = solved.get(prompt_id, Solved(0, 0)).and_one(reward)
    return solved


def tested_rollouts(sources: Sources) -> dict[int, DatasetRef]:
    """Of each iteration, the scored rollouts on the test split: of several passes, the one with the most of them."""
    found: dict[int, DatasetRef] = {}
    for record, references in sources.results:
        if record.split != "test" or record.iteration is None:
            continue
        for ref in references:
            if isinstance(ref, DatasetRef) and ref.row_type == ScoredRollout.__name__:
                found[record.iteration] = max(found.get(record.iteration, ref), ref, key=lambda one: one.rows)
    return found


def training_rollouts(record: IterationRecord) -> DatasetRef | None:
    """What was drawn to train an iteration's policy, scored where it was; None: nothing, or it is not on record."""
    made = [DatasetRef(**ref) for role, ref in record.references.items() if role not in ("dev", "test")]
    kinds = {ref.row_type: ref for ref in reversed(made)}
    return kinds.get(ScoredRollout.__name__) or kinds.get(Rollout.__name__)


def curve_rows(record: IterationRecord, told: RolloutTally) -> Iterator[ReportedCurve]:
    """A policy's pass@k from k = 1 on; nothing where there is one rollout a prompt."""
    points = pass_curve(told.prompts)
    for point in points if len(points) > 1 else ():
        yield ReportedCurve(
            iteration=record.iteration,
            label=record.label,
            k=point.k,
            value=point.value,
            low=point.low,
            high=point.high,
            prompts=told.prompts.total(),
            rollouts=len(points),
        )


def rollouts_row(record: IterationRecord, role: str, ref: DatasetRef, told: RolloutTally) -> ReportedRollouts:
    """What rollouts are like in one row."""
    is_scored = ref.row_type == ScoredRollout.__name__
    return ReportedRollouts(
        iteration=record.iteration,
        label=record.label,
        role=role,
        dataset=ref.name,
        rollouts=told.rollouts,
        prompts=told.prompts.total(),
        mean_tokens=mean_length(told.tokens),
        median_tokens=quantile(told.tokens, 0.5),
        tenth_tokens=quantile(told.tokens, 0.1),
        ninetieth_tokens=quantile(told.tokens, 0.9),
        truncated=told.truncated,
        duplicates=told.duplicates,
        undecided=told.undecided if is_scored else None,
        correct=told.correct if is_scored else None,
    )


def reason_rows(record: IterationRecord, role: str, told: RolloutTally) -> Iterator[ReportedReason]:
    """Why rollouts were or were not decided, the commonest reason first."""
    for (reason, decided), count in told.reasons.most_common():
        yield ReportedReason(
            iteration=record.iteration,
            label=record.label,
            role=role,
            reason=reason,
            decided=decided,
            rollouts=count,
        )
