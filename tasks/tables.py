"""Tables of the report that not every experiment has: published figures, the policy as a judge, loss by task, pairs."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from storage.checkpoints import read_checkpoint_manifest
from storage.datasets import DatasetError, DatasetRef, read_rows
from storage.experiments import IterationRecord
from storage.report_rows import ReportedFigure
from storage.rows import Calibration, PairFigure, TrainingMetric

HELD_OUT_LOSS = "eval_loss/"  # and the task; logged before the first optimizer step and after the last


class PublishedFigure(NamedTuple):
    """A figure of a published table, in percent, and ours; None: the table leaves it open, or it was not run here."""

    label: str
    strategy: str
    published: float | None
    ours: dict[str, Any] | None  # value, low, high, n, k


def published_rows(config: dict[str, Any], iterations: Sequence[IterationRecord]) -> list[PublishedFigure]:
    """What the preset says was published (policy -> strategy -> percent), beside what this experiment measured."""
    measured = {record.label: record.metrics for record in iterations}
    return [
        PublishedFigure(label, strategy, figure, measured.get(label, {}).get(strategy))
        for label, figures in (config.get("published") or {}).items()
        for strategy, figure in figures.items()
    ]


class HeldOutLoss(NamedTuple):
    """A policy's loss on rows of one task that it was not trained on."""

    label: str
    task: str
    before: float
    after: float


def held_out_losses(iterations: Sequence[IterationRecord]) -> Iterator[HeldOutLoss]:
    """The loss of each task, where it was logged."""
    for record in iterations:
        losses: dict[str, dict[int, float]] = {}
        for row in training_metrics(record):
            if row.name.startswith(HELD_OUT_LOSS):
                losses.setdefault(row.name.removeprefix(HELD_OUT_LOSS), {})[row.optimizer_step] = row.value
        for task, by_step in losses.items():
            yield HeldOutLoss(record.label, task, by_step[min(by_step)], by_step[max(by_step)])


def calibration_table(record: IterationRecord) -> list[tuple[str, str, dict[str, Calibration]]]:
    """(writer, group, figures by name) of the policy as a judge; empty where it judged nothing."""
    if "calibration" not in record.references:
        return []
    table: dict[tuple[str, str], dict[str, Calibration]] = {}
    try:
        for row in read_rows(DatasetRef(**record.references["calibration"]), Calibration):
            table.setdefault((row.writer, row.group), {})[row.name] = row
    except DatasetError:  # removed since
        return []
    return [(writer, group, figures) for (writer, group), figures in table.items()]


def pair_table(record: IterationRecord) -> dict[str, dict[str, PairFigure]]:
    """What is told of the pairs, by what it is about; empty where the iteration paired nothing with demonstrations."""
    if "pair_figures" not in record.references:
        return {}
    table: dict[str, dict[str, PairFigure]] = {}
    try:
        for row in read_rows(DatasetRef(**record.references["pair_figures"]), PairFigure):
            table.setdefault(row.about, {})[row.name] = row
    except DatasetError:  # removed since
        return {}
    return table


def figures_of_judges_and_pairs(iterations: Sequence[IterationRecord]) -> Iterator[ReportedFigure]:
    """The figures of the two tables above as rows of a report."""
    for record in iterations:
        for writer, group, calibrations in calibration_table(record):
            for judged in calibrations.values():
                about, low, high = f"judge: {writer}, {group}", judged.low, judged.high
                yield _figure(record, about, judged.name, judged.value, judged.n, low, high)
        for about, figures in pair_table(record).items():
            for paired in figures.values():
                yield _figure(record, f"pairs: {about}", paired.name, paired.value, paired.n)


def _figure(
    record: IterationRecord,
    about: str,
    name: str,
    value: float,
    n: int,
    low: float | None = None,
    high: float | None = None,
) -> ReportedFigure:
    return ReportedFigure(
        iteration=record.iteration, label=record.label, about=about, name=name, value=value, low=low, high=high, n=n
    )


def training_metrics(record: IterationRecord) -> list[TrainingMetric]:
    """What was logged while the policy was trained; empty where it was not, or is gone."""
    digest = record.policy.get("adapter") or record.policy.get("digest")
    if not digest or record.policy.get("path"):
        return []
    try:
        metrics = read_checkpoint_manifest(digest).metrics
        return list(read_rows(metrics, TrainingMetric)) if metrics else []
    except DatasetError:  # removed since
        return []
