"""An experiment's records and data sets -> the tables of its report. Everything is read from the home.

Rollouts are streamed column by column, so a report of a million of them needs no more memory than one of a thousand
with as many prompts. A data set that was removed since leaves its part out, and a notice says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from storage.datasets import DatasetError, DatasetRef, iter_batches, read_rows
from storage.experiments import Experiment, ExperimentState, IterationRecord, RunRecord, StepRecord
from storage.report_rows import (
    ReportedCost,
    ReportedCurve,
    ReportedDecision,
    ReportedMetric,
    ReportedOverlap,
    ReportedPublished,
    ReportedReason,
    ReportedRollouts,
    ReportedRun,
    ReportedSample,
    ReportedStage,
    ReportedTraining,
)
from storage.results import find_result
from storage.rows import Overlap, Rollout, Row, ScoredRollout
from tasks.costs import calls, cost_rows, spending
from tasks.curves import pass_curve
from tasks.drift import RolloutTally, mean_length, quantile
from tasks.lineage import Sources
from tasks.origins import origins
from tasks.picking import PolicyOnTest, changed_samples, first_samples
from tasks.tables import figures_of_judges_and_pairs, published_rows, training_metrics
from tasks.yields import figures_of_yields

UNSCORED = ["prompt_id", "completion", "completion_tokens", "finish_reason"]
NOT_RECORDED = "not recorded"  # by the version that ran it
SCORED = [*UNSCORED, "reward", "reason"]


class Report(NamedTuple):
    """What a report says."""

    experiment: str
    state: ExperimentState
    config: dict[str, Any]
    iterations: list[IterationRecord]
    runs: list[RunRecord]
    steps: list[StepRecord]  # of all runs
    tables: dict[str, Sequence[Row]]  # as storage.report_rows.TABLES
    gaps: list[str]  # what could not be read, each with what is left out for it


class _Tallies:
    """What rollouts are like, each data set read once."""

    def __init__(self) -> None:
        self.gaps: dict[str, None] = {}
        self._known: dict[DatasetRef, RolloutTally | None] = {}

    def of(self, ref: DatasetRef) -> RolloutTally | None:
        """None: it is gone or damaged."""
        if ref not in self._known:
            try:
                self._known[ref] = tally(ref)
            except DatasetError as error:
                self._known[ref] = None
                self.gaps[f"Rollouts could not be read, and their figures are left out: {error}"] = None
        return self._known[ref]


def assemble(experiment: Experiment) -> Report:
    """All tables of the report, from what is stored."""
    iterations, config, steps = experiment.iterations(), experiment.config(), experiment.steps()
    sources, tallies = Sources(experiment), _Tallies()
    tested = tested_rollouts(sources)
    curves = [row for record in iterations for row in _curve(record, tested.get(record.iteration), tallies)]
    by_role = [one for record in iterations for one in _by_role(record, tested.get(record.iteration))]
    known = [(record, role, ref, told) for record, role, ref in by_role if (told := tallies.of(ref)) is not None]
    tables: dict[str, Sequence[Row]] = {
        "metrics": [row for record in iterations for row in _metrics(record)],
        "decisions": list(_decisions(iterations, config)),
        "funnel": [row for record in iterations for row in _funnel(record)],
        "pass_at_k": curves,
        "rollouts": [_rollouts(*one) for one in known],
        "reasons": [row for record, role, _, told in known for row in _reasons(record, role, told)],
        "training": [row for record in iterations for row in _training(record)],
        "overlaps": [row for record in iterations for row in _overlaps(record)],
        **_costs(steps, experiment.runs()),
        "published": list(_published(config, iterations)),
        "figures": [
            *figures_of_judges_and_pairs(iterations),
            *figures_of_yields(config, _of_last_run(experiment, steps)),
        ],
        "samples": list(_samples(iterations, tested, tallies)),
        "lineage": list(origins(sources)),
    }
    return Report(
        experiment.name, experiment.state(), config, iterations, experiment.runs(), steps, tables, list(tallies.gaps)
    )


def _of_last_run(experiment: Experiment, steps: Sequence[StepRecord]) -> list[StepRecord]:
    run = experiment.state().run
    return [record for record in steps if record.run == run]


def tested_rollouts(sources: Sources) -> dict[int, DatasetRef]:
    """Of each iteration, the scored rollouts on the test split: of several passes, the one with the most of them."""
    found: dict[int, DatasetRef] = {}
    for record, references in sources.results:
        for ref in references:
            scored = isinstance(ref, DatasetRef) and ref.row_type == ScoredRollout.__name__
            if scored and record.split == "test" and record.iteration is not None:
                assert isinstance(ref, DatasetRef)
                found[record.iteration] = max(found.get(record.iteration, ref), ref, key=lambda one: one.rows)
    return found


def tally(ref: DatasetRef) -> RolloutTally:
    """What a data set of rollouts, scored or not, is like.

    Raises:
        DatasetError: it is gone or damaged.
    """
    counted, is_scored = RolloutTally(), ref.row_type == ScoredRollout.__name__
    for batch in iter_batches(ref, SCORED if is_scored else UNSCORED):
        prompt_ids, completions, tokens, finish_reasons, *verdicts = (
            batch.column(n).to_pylist() for n in _order(batch)
        )
        counted.add(prompt_ids, completions, tokens, finish_reasons, (verdicts[0], verdicts[1]) if is_scored else None)
    return counted


def _order(batch: Any) -> list[str]:
    return [name for name in SCORED if name in batch.schema.names]


def training_rollouts(record: IterationRecord) -> DatasetRef | None:
    """What was drawn to train an iteration's policy, scored where it was; None: nothing, or it is not on record."""
    made = [DatasetRef(**ref) for role, ref in record.references.items() if role not in ("dev", "test")]
    kinds = {ref.row_type: ref for ref in reversed(made)}
    return kinds.get(ScoredRollout.__name__) or kinds.get(Rollout.__name__)


def _by_role(record: IterationRecord, tested: DatasetRef | None) -> Iterator[tuple[IterationRecord, str, DatasetRef]]:
    if (trained := training_rollouts(record)) is not None:
        yield record, "training", trained
    if tested is not None:
        yield record, "test", tested


def _metrics(record: IterationRecord) -> Iterator[ReportedMetric]:
    for split, figures in (("dev", record.dev_metrics), ("test", record.metrics)):
        for strategy, figure in figures.items():
            yield ReportedMetric(
                iteration=record.iteration,
                label=record.label,
                promoted=record.promoted,
                split=split,
                strategy=strategy,
                value=figure["value"],
                low=figure["low"],
                high=figure["high"],
                n=figure["n"],
                k=figure.get("k", 1),
            )


def _decisions(iterations: Sequence[IterationRecord], config: Mapping[str, Any]) -> Iterator[ReportedDecision]:
    gate, stands = config.get("gate") or {}, ""
    for record in iterations:
        if record.decision is not None:
            told = record.decision
            yield ReportedDecision(
                iteration=record.iteration,
                label=record.label,
                against=stands,
                promoted=record.promoted,
                rule=gate.get("promote", ""),
                strategy=gate.get("strategy", ""),
                difference=told["difference"],
                low=told["low"],
                high=told["high"],
                p_value=told["p_value"],
                n=told["n"],
                reason=told["reason"],
            )
        if record.promoted:
            stands = record.label


def _funnel(record: IterationRecord) -> Iterator[ReportedStage]:
    for left_out, counts in ((False, record.funnel), (True, record.drops)):
        for stage, rows in counts.items():
            yield ReportedStage(
                iteration=record.iteration, label=record.label, stage=stage, rows=rows, left_out=left_out
            )


def _curve(record: IterationRecord, tested: DatasetRef | None, tallies: _Tallies) -> Iterator[ReportedCurve]:
    told = tallies.of(tested) if tested is not None else None
    if told is None:
        return
    counts = told.kinds_of_prompts()
    points = pass_curve(counts)
    for point in points if len(points) > 1 else ():  # of one rollout a prompt there is no curve
        yield ReportedCurve(
            iteration=record.iteration,
            label=record.label,
            k=point.k,
            value=point.value,
            low=point.low,
            high=point.high,
            prompts=told.prompts,
            rollouts=len(points),
        )


def _rollouts(record: IterationRecord, role: str, ref: DatasetRef, told: RolloutTally) -> ReportedRollouts:
    is_scored = ref.row_type == ScoredRollout.__name__
    return ReportedRollouts(
        iteration=record.iteration,
        label=record.label,
        role=role,
        dataset=ref.name,
        rollouts=told.rollouts,
        prompts=told.prompts,
        mean_tokens=mean_length(told.tokens),
        median_tokens=quantile(told.tokens, 0.5),
        tenth_tokens=quantile(told.tokens, 0.1),
        ninetieth_tokens=quantile(told.tokens, 0.9),
        truncated=told.truncated,
        duplicates=told.duplicates,
        undecided=told.undecided if is_scored else None,
        correct=told.correct if is_scored else None,
    )


def _reasons(record: IterationRecord, role: str, told: RolloutTally) -> Iterator[ReportedReason]:
    for (reason, decided), count in told.reasons.most_common():
        yield ReportedReason(
            iteration=record.iteration,
            label=record.label,
            role=role,
            reason=reason,
            decided=decided,
            rollouts=count,
        )


def _training(record: IterationRecord) -> Iterator[ReportedTraining]:
    for row in training_metrics(record):
        yield ReportedTraining(
            iteration=record.iteration,
            label=record.label,
            optimizer_step=row.optimizer_step,
            name=row.name,
            value=row.value,
        )


def _overlaps(record: IterationRecord) -> Iterator[ReportedOverlap]:
    if "overlaps" not in record.references:
        return
    try:
        for row in read_rows(DatasetRef(**record.references["overlaps"]), Overlap):
            yield ReportedOverlap(
                iteration=record.iteration,
                label=record.label,
                split=row.split,
                training_rows=row.training_rows,
                sharing_rows=row.sharing_rows,
                held_out_prompts=row.held_out_prompts,
                shared_prompts=row.shared_prompts,
                run_words=row.run_words,
            )
    except DatasetError:  # removed since
        return


def _costs(steps: Sequence[StepRecord], runs: Sequence[RunRecord]) -> dict[str, Sequence[ReportedCost | ReportedRun]]:
    accelerators = {one.run: len(one.surroundings.accelerators) if one.surroundings else None for one in runs}
    counted = list(calls(steps))
    by_step = spending(counted, lambda record: record.step, _saved, accelerators)
    by_run = spending(counted, lambda record: record.run, _saved, accelerators)
    began = {record.run: record.at for record in reversed(steps)}
    known = {one.run: one for one in runs}
    rows = []
    for run, spent in by_run.items():
        one = known.get(run)
        made_with = one.surroundings if one else None
        rows.append(
            ReportedRun(
                run=run,
                state=one.state if one else NOT_RECORDED,
                started_at=one.started_at if one else began[run],
                finished_at=one.finished_at if one else None,
                seconds=round(spent.seconds, 3),
                engine_seconds=round(spent.engine_seconds, 3),
                accelerator_seconds=spent.accelerator_seconds,
                tokens=spent.tokens,
                calls=spent.calls,
                cached=spent.cached,
                failed=spent.failed,
                commit=made_with.commit if made_with else None,
                machine=made_with.machine if made_with else None,
                accelerators=len(made_with.accelerators) if made_with else None,
                versions=[f"{name} {version}" for name, version in made_with.versions.items()] if made_with else [],
            )
        )
    return {"costs": cost_rows(by_step), "runs": rows}


def _saved(record: StepRecord) -> float:
    result = find_result(record.step, record.key) if record.key else None
    return result.seconds if result else 0.0


def _published(config: dict[str, Any], iterations: Sequence[IterationRecord]) -> Iterator[ReportedPublished]:
    for row in published_rows(config, iterations):
        ours = row.ours or {}
        yield ReportedPublished(
            label=row.label,
            strategy=row.strategy,
            published=None if row.published is None else row.published / 100,
            value=ours.get("value"),
            low=ours.get("low"),
            high=ours.get("high"),
            n=ours.get("n"),
        )


def _samples(
    iterations: Sequence[IterationRecord], tested: Mapping[int, DatasetRef], tallies: _Tallies
) -> Iterator[ReportedSample]:
    for record in iterations:
        trained = training_rollouts(record)
        is_scored = trained is not None and trained.row_type == ScoredRollout.__name__
        ref = trained if is_scored else tested.get(record.iteration)
        if ref is not None:
            yield from first_samples(ref, record.label)
    standing = [record for record in iterations if record.promoted]
    if len(standing) > 1:
        first, last = standing[0], standing[-1]
        refs = tested.get(first.iteration), tested.get(last.iteration)
        told = [tallies.of(ref) if ref is not None else None for ref in refs]
        if refs[0] and refs[1] and told[0] and told[1]:
            yield from changed_samples(
                PolicyOnTest(first.label, refs[0], told[0].solved), PolicyOnTest(last.label, refs[1], told[1].solved)
            )
