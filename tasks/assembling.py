"""An experiment's records and data sets -> the tables of its report. Everything is read from the home.

Rollouts are streamed column by column, so that a million of them need hardly more memory than a thousand. A data set
that was removed since leaves its part out, and a notice says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from storage.datasets import DatasetError, DatasetRef, read_rows
from storage.experiments import Experiment, ExperimentState, IterationRecord, RunRecord, StepRecord
from storage.report_rows import (
    ReportedCost,
    ReportedDecision,
    ReportedMetric,
    ReportedOverlap,
    ReportedPublished,
    ReportedRun,
    ReportedSample,
    ReportedStage,
    ReportedTraining,
)
from storage.results import find_result
from storage.rows import Overlap, Row, ScoredRollout
from tasks.costs import calls, cost_rows, spending
from tasks.lineage import Sources
from tasks.origins import origins
from tasks.picking import PolicyOnTest, changed_samples, first_samples
from tasks.tables import figures_of_judges_and_pairs, published_rows, training_metrics
from tasks.tallying import (
    Tallies,
    curve_rows,
    reason_rows,
    rollouts_row,
    solved_prompts,
    tested_rollouts,
    training_rollouts,
)
from tasks.yields import figures_of_yields

NOT_RECORDED = "not recorded"  # by the version that ran it


class Report(NamedTuple):
    """What a report says."""

    experiment: str
    state: ExperimentState
    config: dict[str, Any]
    iterations: list[IterationRecord]
    steps: list[StepRecord]  # of all runs
    tables: dict[str, Sequence[Row]]  # as storage.report_rows.TABLES
    gaps: list[str]  # what could not be read, each with what is left out for it


def assemble(experiment: Experiment) -> Report:
    """All tables of the report, from what is stored."""
    iterations, config, steps = experiment.iterations(), experiment.config(), experiment.steps()
    sources, tallies = Sources(experiment), Tallies()
    tested = tested_rollouts(sources)
    rollouts = [
        (record, role, ref, told)
        for record in iterations
        for role, ref in (("training", training_rollouts(record)), ("test", tested.get(record.iteration)))
        if ref is not None and (told := tallies.of(ref)) is not None
    ]
    tables: dict[str, Sequence[Row]] = {
        "metrics": [row for record in iterations for row in _metrics(record)],
        "decisions": list(_decisions(iterations, config)),
        "funnel": [row for record in iterations for row in _funnel(record)],
        "pass_at_k": [row for record, role, _, told in rollouts if role == "test" for row in curve_rows(record, told)],
        "rollouts": [rollouts_row(*one) for one in rollouts],
        "reasons": [row for record, role, _, told in rollouts for row in reason_rows(record, role, told)],
        "training": [row for record in iterations for row in _training(record)],
        "overlaps": [row for record in iterations for row in _overlaps(record)],
        **_costs(steps, experiment.runs()),
        "published": list(_published(config, iterations)),
        "figures": [
            *figures_of_judges_and_pairs(iterations),
            *figures_of_yields(config, _of_last_run(experiment, steps)),
        ],
        "samples": list(_samples(iterations, tested)),
        "lineage": list(origins(sources)),
    }
    return Report(experiment.name, experiment.state(), config, iterations, steps, tables, tallies.gaps)


def _of_last_run(experiment: Experiment, steps: Sequence[StepRecord]) -> list[StepRecord]:
    run = experiment.state().run
    return [record for record in steps if record.run == run]


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


def _samples(iterations: Sequence[IterationRecord], tested: Mapping[int, DatasetRef]) -> Iterator[ReportedSample]:
    for record in iterations:
        trained = training_rollouts(record)
        is_scored = trained is not None and trained.row_type == ScoredRollout.__name__
        ref = trained if is_scored else tested.get(record.iteration)
        if ref is not None:
            yield from first_samples(ref, record.label)
    standing = [record for record in iterations if record.promoted]
    if len(standing) > 1 and standing[0].iteration in tested and standing[-1].iteration in tested:
        yield from changed_samples(
            *(_on_test(record, tested[record.iteration]) for record in (standing[0], standing[-1]))
        )


def _on_test(record: IterationRecord, ref: DatasetRef) -> PolicyOnTest:
    return PolicyOnTest(record.label, ref, solved_prompts(ref))
