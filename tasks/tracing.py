"""One row followed through an experiment: prompt, rollouts, verdicts, what was learnt from, which policies, evaluation.

Everything is read from records and manifests: data sets by the steps that made them, lineage by parents.
"""

from collections.abc import Iterable, Iterator, Sequence

from models.specs import ModelRef
from storage.checkpoints import read_checkpoint_manifest
from storage.datasets import DatasetError, DatasetRef
from storage.experiments import Experiment, experiments
from storage.finding import ids_beginning, ledger_rows
from storage.home import home_name
from storage.rows import Demonstration, EvaluatedPrompt, JudgedRollout, Pair, Prompt, Rollout, ScoredRollout
from tasks.lineage import Held, Sources, Split
from tasks.traces import (
    ExperimentTrace,
    GivenCompletion,
    Judgement,
    LedgerOnly,
    Trace,
    TracedEvaluation,
    TracedPrompt,
    TracedRollout,
    Training,
    Verdict,
)
from tasks.uses import Made, uses_of

SHORTEST_BEGINNING = 6  # characters of a prompt_id


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
        raise ValueError(f"there is no experiment {experiment or ''!r} in {home_name()}; there are: {', '.join(names)}")
    sources = [Sources(Experiment(name)) for name in chosen]
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


def _whole_id(beginning: str, sources: Iterable[Sources]) -> str:
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
    raise ValueError(f"{len(found)} prompts in {home_name()} have a prompt_id that begins with {beginning!r}{there}")


def _trace_in(sources: Sources, prompt_id: str, index: int | None) -> ExperimentTrace:
    made = Made(
        judged=_judged(sources, prompt_id),
        scored=list(sources.rows(ScoredRollout, prompt_id)),
        demonstrations=list(sources.rows(Demonstration, prompt_id)),
        pairs=list(sources.rows(Pair, prompt_id)),
    )
    read = {held.ref: len(rows) for held, rows in made.demonstrations}
    read |= {held.ref: len(rows) for held, rows in made.pairs}
    return ExperimentTrace(
        experiment=sources.name,
        prompts=tuple(_prompt(held, row) for held, rows in sources.rows(Prompt, prompt_id) for row in rows),
        given=tuple(
            GivenCompletion(dataset=held.ref.name, source=row.source, prompt=row.prompt, completion=row.completion)
            for held, rows in made.demonstrations
            for row in rows
            if row.rollout_index is None
        ),
        rollouts=tuple(_rollouts(sources, prompt_id, index, made)),
        trainings=tuple(_trainings(sources, read)),
        evaluations=tuple(_evaluations(sources, prompt_id)),
        gaps=tuple(dict.fromkeys(sources.gaps)),
    )


def _prompt(held: Held, row: Prompt) -> TracedPrompt:
    return TracedPrompt(
        dataset=held.ref.name,
        step=held.record.step,
        iteration=held.record.iteration,
        source=row.source,
        prompt=row.prompt,
        answer=row.answer,
    )


def _rollouts(sources: Sources, prompt_id: str, index: int | None, made: Made) -> Iterator[TracedRollout]:
    for held, rows in sources.rows(Rollout, prompt_id):
        of_these = made._replace(
            judged=[(one, found) for one, found in made.judged if sources.descends(one.ref, held.ref)],
            scored=[(one, found) for one, found in made.scored if sources.descends(one.ref, held.ref)],
        )
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
                verdicts=tuple(_verdicts(row.rollout_index, of_these.scored)),
                judgements=tuple(_judgements(sources, row.rollout_index, of_these.judged)),
                uses=tuple(uses_of(sources, row.rollout_index, of_these)),
            )


def _judged(sources: Sources, prompt_id: str) -> list[tuple[Held, list[JudgedRollout]]]:
    """Judged rollouts; where shards were gathered, the whole stands for them."""
    found = list(sources.rows(JudgedRollout, prompt_id))
    gathered = {parent for held, _ in found for parent in sources.parents(held.ref)}
    return [(held, rows) for held, rows in found if held.ref not in gathered]


def _judgements(
    sources: Sources, index: int, judged: Iterable[tuple[Held, list[JudgedRollout]]]
) -> Iterator[Judgement]:
    for held, rows in judged:
        for row in rows:
            if row.rollout_index == index:
                yield Judgement(
                    dataset=held.ref.name,
                    judge_label=sources.label(row.judge),
                    confidence=row.confidence,
                    reason=row.reason,
                )


def _verdicts(index: int, judged: Iterable[tuple[Held, list[ScoredRollout]]]) -> Iterator[Verdict]:
    for held, rows in judged:
        for row in rows:
            if row.rollout_index == index:
                yield Verdict(
                    dataset=held.ref.name, reward=row.reward, reason=row.reason, answer=row.answer, scorer=row.scorer
                )


def _trainings(sources: Sources, read: dict[DatasetRef, int]) -> Iterator[Training]:
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


def _parents_of_checkpoint(sources: Sources, digest: str) -> Sequence[str]:
    try:
        return read_checkpoint_manifest(digest).parents
    except DatasetError as error:
        sources.gaps.append(str(error))
        return ()


def _evaluations(sources: Sources, prompt_id: str) -> Iterator[TracedEvaluation]:
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
