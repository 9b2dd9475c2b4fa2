"""Rollouts to read in a report: right, wrong and undecided ones, and prompts that a policy got better or worse at."""

import contextlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NamedTuple

from storage.datasets import DatasetError, DatasetRef, read_rows
from storage.finding import rows_of_prompt
from storage.report_rows import ReportedSample
from storage.rows import ScoredRollout
from tasks.drift import Solved, most_changed
from tasks.metrics import is_correct

OF_A_KIND = 2  # of each iteration
CHANGED = 4  # prompts that got better, and as many that got worse
LOOKED_AT = 2_000  # rows, from the start
CHARACTERS = 4_000  # of a text that is shown; a longer one is cut, and says so
KINDS = {1.0: "right", 0.0: "wrong", None: "undecided"}


class PolicyOnTest(NamedTuple):
    """A policy's scored rollouts on the test split."""

    label: str
    rollouts: DatasetRef
    solved: Mapping[str, Solved]


def first_samples(ref: DatasetRef, label: str) -> Iterator[ReportedSample]:
    """The first right, wrong and undecided rollouts of a data set, each of another prompt; none where it is gone."""
    found: dict[str, dict[str, ScoredRollout]] = {kind: {} for kind in KINDS.values()}
    with contextlib.suppress(DatasetError):  # removed since; a notice says so
        for row in islice(read_rows(ref, ScoredRollout), LOOKED_AT):
            of_kind = found.get(KINDS.get(row.reward, ""))
            if of_kind is not None and len(of_kind) < OF_A_KIND:
                of_kind.setdefault(row.prompt_id, row)
            if all(len(rows) == OF_A_KIND for rows in found.values()):
                break
    for kind, rows in found.items():
        yield from (_sample(row, label, kind) for row in rows.values())


def changed_samples(before: PolicyOnTest, after: PolicyOnTest) -> Iterator[ReportedSample]:
    """The prompts that changed most, with a rollout of each policy: wrong and then right, or right and then wrong."""
    improved, worsened = most_changed(before.solved, after.solved, CHANGED)
    for kind, changes in (("improved", improved), ("worsened", worsened)):
        for change in changes:
            try:
                old = _one(before.rollouts, change.prompt_id, correct=kind == "worsened")
                new = _one(after.rollouts, change.prompt_id, correct=kind == "improved")
            except DatasetError:  # removed since; a notice says so
                return
            yield _sample(old, before.label, kind, change.before, (new, after.label, change.after))


def _one(ref: DatasetRef, prompt_id: str, *, correct: bool) -> ScoredRollout:
    rows = rows_of_prompt(ref, ScoredRollout, prompt_id)
    wanted = (row for row in rows if is_correct(row.reward) == correct)
    return next(wanted, rows[0])


def _sample(
    row: ScoredRollout,
    label: str,
    kind: str,
    rate: float | None = None,
    other: tuple[ScoredRollout, str, float] | None = None,
) -> ReportedSample:
    return ReportedSample(
        label=label,
        kind=kind,
        prompt_id=row.prompt_id,
        prompt=shown(row.prompt),
        completion=shown(row.completion),
        reason=row.reason,
        rate=rate,
        other_label=other[1] if other else None,
        other_completion=shown(other[0].completion) if other else None,
        other_reason=other[0].reason if other else None,
        other_rate=other[2] if other else None,
    )


def shown(text: str) -> str:
    """A text that is not too long to show."""
    cut = len(text) - CHARACTERS
    return text if cut <= 0 else f"{text[:CHARACTERS]}… ({cut:,} characters more)"
