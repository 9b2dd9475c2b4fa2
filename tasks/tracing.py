"""One row followed through an experiment: prompt, rollouts, verdicts, what was learnt from, which policies, evaluation.

Everything is read from records and manifests: data sets by the steps that made them, lineage by parents.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from models.specs import ModelRef
from storage.checkpoints import read_checkpoint_manifest
from storage.datasets import DatasetError, DatasetRef, Manifest, read_manifest
from storage.experiments import Experiment, IterationRecord, StepRecord, experiments
from storage.finding import ids_beginning, ledger_rows, rows_of_prompt
from storage.home import home
from storage.results import find_result
from storage.rows import Demonstration, EvaluatedPrompt, Pair, Prompt, Rollout, Row, ScoredRollout
from tasks.explaining import last_calls, references_in
from tasks.omissions import why_not_paired, why_not_selected

R = TypeVar("R", bound=Row)
SHORTEST_BEGINNING = 6  # characters of a prompt_id
Split = Literal["training", "dev", "test"]


class Told(BaseModel):
    """Base of what is told; all of it is plain JSON."""

    model_config = ConfigDict(frozen=True)


class TracedPrompt(Told):
    """Where the prompt stands."""

    dataset: str
    step: str
    iteration: int | None
    source: str
    prompt: str
    answer: str | None


class Verdict(Told):
    """What the scorer said."""

    dataset: str
    reward: float | None
    reason: str
    answer: str | None
    scorer: str


class Use(Told):
    """What a rollout became, or why it became nothing."""

    dataset: str
    iteration: int | None
    became: Literal["demonstration", "chosen", "rejected"] | None  # None: see why_not
    why_not: str | None
    times: int  # a side of a pair may be used more than once


class TracedRollout(Told):
    """One rollout, and what came of it."""

    dataset: str
    iteration: int | None
    split: Split
    rollout_index: int
    policy: str
    policy_label: str  # "base", "iteration 1"; the identity where no iteration has that policy
    seed: int
    finish_reason: str
    completion: str
    verdicts: tuple[Verdict, ...]
    uses: tuple[Use, ...]


class Training(Told):
    """A training that read rows of this prompt."""

    step: str
    iteration: int | None
    dataset: str
    rows: int  # of this prompt
    checkpoint: str
    label: str | None  # None: no iteration has this policy
    promoted: bool | None


class TracedEvaluation(Told):
    """What a strategy scored on the prompt."""

    label: str
    iteration: int
    split: Split
    strategy: str
    value: float
    rollouts: int
    k: int
    undecided: int
    answer: str | None


class GivenCompletion(Told):
    """A demonstration that was not sampled, but came with the source."""

    dataset: str
    source: str
    prompt: str
    completion: str


class ExperimentTrace(Told):
    """The row in one experiment, in the order in which things happened."""

    experiment: str
    prompts: tuple[TracedPrompt, ...]
    given: tuple[GivenCompletion, ...]
    rollouts: tuple[TracedRollout, ...]
    trainings: tuple[Training, ...]
    evaluations: tuple[TracedEvaluation, ...]
    gaps: tuple[str, ...]  # data sets that could not be read


class LedgerOnly(Told):
    """A rollout that was drawn, but no experiment that is shown has gathered it."""

    ledger: str
    rollout_index: int
    policy: str
    seed: int
    finish_reason: str
    completion: str


class Trace(Told):
    """All that the home knows of a prompt, or of one of its rollouts."""

    prompt_id: str
    rollout_index: int | None
    experiments: tuple[ExperimentTrace, ...]
    ledger_only: tuple[LedgerOnly, ...]


def trace(row: str, experiment: str | None = None) -> Trace:
    """Follow a prompt, or one of its rollouts.

    Args:
        row: a prompt_id or its beginning; "/3" behind it picks rollout 3.
    Raises:
        ValueError: it names no prompt, or several.
    """
    beginning, slash, index = row.partition("/")
    if len(beginning) < SHORTEST_BEGINNING or (slash and not index.isdecimal()):
        raise ValueError(
            f"{row!r} is no row; give a prompt_id, or {SHORTEST_BEGINNING} or more of its first characters, "
            "and /rollout_index if one rollout is wanted: 3f0a91/2"
        )
    names = [one.name for one in experiments()]
    chosen = [name for name in names if experiment in (None, name)]
    if not chosen:
        raise ValueError(f"there is no experiment {experiment or ''!r} in {home()}; there are: {', '.join(names)}")
    sources = [_Sources(Experiment(name)) for name in chosen]
    prompt_id = _whole_id(beginning, sources)
    number = int(index) if slash else None
    traces = [_trace_in(source, prompt_id, number) for source in sources]
    told = tuple(found for found in traces if found.prompts or found.given or found.rollouts)
    return Trace(
        prompt_id=prompt_id,
        rollout_index=number,
        experiments=told,
        ledger_only=tuple(_ledger_only(prompt_id, number, told)),
    )


class _Held(NamedTuple):
    """A data set of an experiment, and the record of the step that made it."""

    ref: DatasetRef
    record: StepRecord


class _Sources:
    """What an experiment made, by kind, read once."""

    def __init__(self, experiment: Experiment) -> None:
        self.name = experiment.name
        self.iterations: Sequence[IterationRecord] = experiment.iterations()
        self.gaps: list[str] = []
        self._records = _records_that_count(experiment)
        self._manifests: dict[DatasetRef, Manifest | None] = {}

    @cached_property
    def results(self) -> list[tuple[StepRecord, list[DatasetRef | ModelRef]]]:
        """The references that each step returned."""
        found = [(record, find_result(record.step, record.key)) for record in self._records if record.key]
        return [(record, list(references_in(result.value))) for record, result in found if result is not None]

    def held(self, row_type: type[Row]) -> list[_Held]:
        """Data sets of one row type, each once, in the order they were made."""
        found: dict[DatasetRef, StepRecord] = {}
        for record, references in self.results:
            for ref in references:
                if isinstance(ref, DatasetRef) and ref.row_type == row_type.__name__:
                    found.setdefault(ref, record)
        return [_Held(ref, record) for ref, record in found.items()]

    def rows(self, row_type: type[R], prompt_id: str) -> Iterator[tuple[_Held, list[R]]]:
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


def _records_that_count(experiment: Experiment) -> list[StepRecord]:
    """The steps of the last run; where it is not finished, those of earlier runs where it has not been yet."""
    state, records = experiment.state(), experiment.steps()
    if state.state == "finished":
        return [record for record in records if record.run == state.run and record.state == "completed"]
    return list(last_calls(records).values())


def _whole_id(beginning: str, sources: Iterable[_Sources]) -> str:
    found: set[str] = set()
    for source in sources:
        for row_type in (Prompt, Demonstration):
            for held in source.held(row_type):
                try:
                    found |= ids_beginning(held.ref, beginning)
                except DatasetError as error:
                    source.gaps.append(str(error))
    if len(found) == 1:
        return found.pop()
    there = (
        f": {', '.join(sorted(found)[:5])}; give more of it" if found else "; `ratchet show` lists a data set's rows"
    )
    raise ValueError(f"{len(found)} prompts in {home()} have a prompt_id that begins with {beginning!r}{there}")


def _trace_in(sources: _Sources, prompt_id: str, index: int | None) -> ExperimentTrace:
    demonstrations = list(sources.rows(Demonstration, prompt_id))
    pairs = list(sources.rows(Pair, prompt_id))
    rollouts = tuple(_rollouts(sources, prompt_id, index, demonstrations, pairs))
    read = {held.ref: len(rows) for held, rows in demonstrations} | {held.ref: len(rows) for held, rows in pairs}
    return ExperimentTrace(
        experiment=sources.name,
        prompts=tuple(_prompt(held, row) for held, rows in sources.rows(Prompt, prompt_id) for row in rows),
        given=tuple(
            GivenCompletion(dataset=held.ref.name, source=row.source, prompt=row.prompt, completion=row.completion)
            for held, rows in demonstrations
            for row in rows
            if row.rollout_index is None
        ),
        rollouts=rollouts,
        trainings=tuple(_trainings(sources, read)),
        evaluations=tuple(_evaluations(sources, prompt_id)),
        gaps=tuple(dict.fromkeys(sources.gaps)),
    )


def _prompt(held: _Held, row: Prompt) -> TracedPrompt:
    return TracedPrompt(
        dataset=held.ref.name,
        step=held.record.step,
        iteration=held.record.iteration,
        source=row.source,
        prompt=row.prompt,
        answer=row.answer,
    )


def _rollouts(
    sources: _Sources,
    prompt_id: str,
    index: int | None,
    demonstrations: Sequence[tuple[_Held, list[Demonstration]]],
    pairs: Sequence[tuple[_Held, list[Pair]]],
) -> Iterator[TracedRollout]:
    scored = list(sources.rows(ScoredRollout, prompt_id))
    for held, rows in sources.rows(Rollout, prompt_id):
        judged = [(one, found) for one, found in scored if held.ref in sources.parents(one.ref)]
        for row in rows:
            if index is not None and row.rollout_index != index:
                continue
            yield TracedRollout(
                dataset=held.ref.name,
                iteration=held.record.iteration,
                split=sources.split(held.ref),
                rollout_index=row.rollout_index,
                policy=row.policy,
                policy_label=sources.label(row.policy),
                seed=row.seed,
                finish_reason=row.finish_reason,
                completion=row.completion,
                verdicts=tuple(_verdicts(row.rollout_index, judged)),
                uses=tuple(_uses(sources, row.rollout_index, judged, demonstrations, pairs)),
            )


def _verdicts(index: int, judged: Iterable[tuple[_Held, list[ScoredRollout]]]) -> Iterator[Verdict]:
    for held, rows in judged:
        for row in rows:
            if row.rollout_index == index:
                yield Verdict(
                    dataset=held.ref.name, reward=row.reward, reason=row.reason, answer=row.answer, scorer=row.scorer
                )


def _uses(
    sources: _Sources,
    index: int,
    judged: Sequence[tuple[_Held, list[ScoredRollout]]],
    demonstrations: Sequence[tuple[_Held, list[Demonstration]]],
    pairs: Sequence[tuple[_Held, list[Pair]]],
) -> Iterator[Use]:
    """What each selection and each pairing that read the rollout's scores made of it."""
    selected = {held.ref: rows for held, rows in demonstrations}
    paired = {held.ref: rows for held, rows in pairs}
    for scored, rows in judged:
        for held in sources.held(Demonstration):
            if scored.ref in sources.parents(held.ref):
                yield from _selected(sources, index, rows, held, selected.get(held.ref, []))
        for held in sources.held(Pair):
            if scored.ref in sources.parents(held.ref):
                yield from _paired(sources, index, rows, held, paired.get(held.ref, []))


def _selected(
    sources: _Sources, index: int, scored: Sequence[ScoredRollout], held: _Held, kept: Sequence[Demonstration]
) -> Iterator[Use]:
    times = sum(row.rollout_index == index for row in kept)
    why_not = None if times else why_not_selected(index, scored, sources.settings(held.ref), _marker(held.record))
    yield Use(
        dataset=held.ref.name,
        iteration=held.record.iteration,
        became="demonstration" if times else None,
        why_not=why_not,
        times=times,
    )


def _paired(
    sources: _Sources, index: int, scored: Sequence[ScoredRollout], held: _Held, pairs: Sequence[Pair]
) -> Iterator[Use]:
    sides: tuple[Literal["chosen", "rejected"], ...] = ("chosen", "rejected")
    counts = [sum(getattr(pair, f"{side}_index") == index for pair in pairs) for side in sides]
    common: dict[str, Any] = {"dataset": held.ref.name, "iteration": held.record.iteration}
    for side, times in zip(sides, counts, strict=True):
        if times:
            yield Use(became=side, why_not=None, times=times, **common)
    if not any(counts):
        why_not = why_not_paired(index, scored, sources.settings(held.ref))
        yield Use(became=None, why_not=why_not, times=0, **common)


def _marker(record: StepRecord) -> str | None:
    result = find_result(record.step, record.key) if record.key else None
    inputs = result.key_parts.get("inputs") if result else None
    marker = inputs.get("marker") if isinstance(inputs, dict) else None
    return marker if isinstance(marker, str) else None


def _trainings(sources: _Sources, read: dict[DatasetRef, int]) -> Iterator[Training]:
    """Each checkpoint whose manifest names, as a parent, a data set with rows of the prompt."""
    by_digest = {ref.digest: ref for ref in read}
    for record, references in sources.results:
        for model in references:
            if not isinstance(model, ModelRef) or not (digest := model.adapter or model.digest) or model.path:
                continue
            iteration = next((one for one in sources.iterations if ModelRef(**one.policy) == model), None)
            for parent in _parents_of_checkpoint(sources, digest):
                if (ref := by_digest.get(parent)) is not None:
                    yield Training(
                        step=record.step,
                        iteration=record.iteration,
                        dataset=ref.name,
                        rows=read[ref],
                        checkpoint=digest,
                        label=iteration.label if iteration else None,
                        promoted=iteration.promoted if iteration else None,
                    )


def _parents_of_checkpoint(sources: _Sources, digest: str) -> Sequence[str]:
    try:
        return read_checkpoint_manifest(digest).parents
    except DatasetError as error:
        sources.gaps.append(str(error))
        return ()


def _evaluations(sources: _Sources, prompt_id: str) -> Iterator[TracedEvaluation]:
    roles: tuple[Split, ...] = ("dev", "test")
    rows = {held.ref: found for held, found in sources.rows(EvaluatedPrompt, prompt_id)}
    for record in sources.iterations:
        for role in roles:
            for row in rows.get(DatasetRef(**record.references[role]), []) if role in record.references else []:
                yield TracedEvaluation(
                    label=record.label,
                    iteration=record.iteration,
                    split=role,
                    strategy=row.strategy,
                    value=row.value,
                    rollouts=row.rollouts,
                    k=row.k,
                    undecided=row.undecided,
                    answer=row.answer,
                )


def _ledger_only(prompt_id: str, index: int | None, told: Iterable[ExperimentTrace]) -> Iterator[LedgerOnly]:
    gathered = {(r.policy, r.seed, r.rollout_index, r.completion) for one in told for r in one.rollouts}
    for ledger, row in ledger_rows(prompt_id):
        key = (row.policy, row.seed, row.rollout_index, row.completion)
        if key not in gathered and index in (None, row.rollout_index):
            yield LedgerOnly(
                ledger=ledger,
                rollout_index=row.rollout_index,
                policy=row.policy,
                seed=row.seed,
                finish_reason=row.finish_reason,
                completion=row.completion,
            )
