"""What an experiment made, and from what: data sets by the steps that made them, by kind, by parents."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

from models.specs import ModelRef
from storage.datasets import DatasetError, DatasetRef, Manifest, read_manifest
from storage.experiments import Experiment, IterationRecord, StepRecord
from storage.finding import rows_of_prompt
from storage.results import StepResult, find_result
from storage.rows import Row
from tasks.explaining import last_calls, references_in

R = TypeVar("R", bound=Row)
Split = Literal["training", "dev", "test"]


class Held(NamedTuple):
    """A data set of an experiment, and the record of the step that made it."""

    ref: DatasetRef
    record: StepRecord


class Sources:
    """What an experiment made, by kind, read once."""

    def __init__(self, experiment: Experiment) -> None:
        self.name = experiment.name
        self.iterations: Sequence[IterationRecord] = experiment.iterations()
        self.gaps: list[str] = []
        self._records = records_that_count(experiment)
        self._manifests: dict[DatasetRef, Manifest | None] = {}

    @cached_property
    def made(self) -> list[tuple[StepRecord, StepResult]]:
        """What is stored of each step: its inputs, and what it returned."""
        found = [(record, find_result(record.step, record.key)) for record in self._records if record.key]
        return [(record, result) for record, result in found if result is not None]

    @cached_property
    def results(self) -> list[tuple[StepRecord, list[DatasetRef | ModelRef]]]:
        """The references that each step returned."""
        return [(record, list(references_in(result.value))) for record, result in self.made]

    def held(self, row_type: type[Row]) -> list[Held]:
        """Data sets of one row type, each once, in the order they were made."""
        found: dict[DatasetRef, StepRecord] = {}
        for record, references in self.results:
            for ref in references:
                if isinstance(ref, DatasetRef) and ref.row_type == row_type.__name__:
                    found.setdefault(ref, record)
        return [Held(ref, record) for ref, record in found.items()]

    def rows(self, row_type: type[R], prompt_id: str) -> Iterator[tuple[Held, list[R]]]:
        """The rows of a prompt in each data set that has some."""
        for held in self.held(row_type):
            try:
                rows = rows_of_prompt(held.ref, row_type, prompt_id)
            except DatasetError as error:
                self.gaps.append(str(error))
                continue
            if rows:
                yield held, rows

    def parents(self, ref: DatasetRef) -> Sequence[DatasetRef]:
        """What a data set was made from."""
        if ref not in self._manifests:
            try:
                self._manifests[ref] = read_manifest(ref)
            except DatasetError:
                self._manifests[ref] = None
        manifest = self._manifests[ref]
        return manifest.parents if manifest else ()

    def descends(self, ref: DatasetRef, ancestor: DatasetRef) -> bool:
        """Whether a data set was made from another, whatever lies between."""
        parents = self.parents(ref)
        return ancestor in parents or any(self.descends(parent, ancestor) for parent in parents)

    def settings(self, ref: DatasetRef) -> dict[str, Any]:
        """What a data set was made with."""
        self.parents(ref)
        manifest = self._manifests[ref]
        return manifest.settings if manifest else {}

    @cached_property
    def splits(self) -> dict[DatasetRef, Split]:
        """The prompts of dev and test, and all that was made of them to evaluate a policy."""
        found: dict[DatasetRef, Split] = {}
        roles: tuple[Split, ...] = ("dev", "test")
        for record in self.iterations:
            for role in roles:
                if role in record.references:
                    self._climb(DatasetRef(**record.references[role]), role, found)
        return found

    def split(self, ref: DatasetRef) -> Split:
        """What a data set of rollouts was for: that of its prompts, if no evaluation is recorded yet."""
        known = (self.splits[one] for one in (ref, *self.parents(ref)) if one in self.splits)
        return next(known, "training")

    def label(self, identity: str) -> str:
        """An iteration's label for a policy."""
        return next((r.label for r in self.iterations if ModelRef(**r.policy).identity == identity), identity)

    def _climb(self, ref: DatasetRef, role: Split, found: dict[DatasetRef, Split]) -> None:
        if ref not in found:
            found[ref] = role
            for parent in self.parents(ref):
                self._climb(parent, role, found)


def nearest(ref: DatasetRef, row_type: type[Row]) -> Iterator[DatasetRef]:
    """The data sets of one row type that a data set was made from, without what they were made from; each once."""
    seen, left = set[DatasetRef](), [ref]
    while left:
        one = left.pop(0)
        if one in seen:
            continue
        seen.add(one)
        if one.row_type == row_type.__name__:
            yield one
            continue
        with contextlib.suppress(DatasetError):  # removed since
            left += read_manifest(one).parents


def records_that_count(experiment: Experiment) -> list[StepRecord]:
    """The steps of the last run; where it is not finished, those of earlier runs where it has not been yet."""
    state, records = experiment.state(), experiment.steps()
    if state.state == "finished":
        return [record for record in records if record.run == state.run and record.state == "completed"]
    return list(last_calls(records).values())
