"""Tables of the report: published figures, the policy as a judge, loss by task."""

from pathlib import Path
from typing import Any

import pytest

from storage.checkpoints import commit_checkpoint
from storage.datasets import write_rows
from storage.experiments import IterationRecord
from storage.rows import Calibration, TrainingMetric
from tasks.tables import HeldOutLoss, calibration_table, held_out_losses, published_rows


def record(label: str, *, policy: dict[str, Any] | None = None, **references: dict[str, Any]) -> IterationRecord:
    return IterationRecord(
        run="run-1",
        iteration=1,
        label=label,
        policy=policy or {"name": "fake:0.4"},
        promoted=True,
        decision=None,
        metrics={"maj@16": {"value": 0.6, "low": 0.5, "high": 0.7, "n": 40, "k": 16}},
        dev_metrics={},
        funnel={},
        drops={},
        references=references,
    )


@pytest.fixture
def trained(tmp_path: Path) -> IterationRecord:
    """A policy whose training logged the losses of both tasks before it, after 10 optimizer steps, and its own."""
    logged = [(0, "solve", 2.0), (10, "solve", 1.25), (0, "judge", 0.7), (10, "judge", 0.5)]
    rows = [TrainingMetric(optimizer_step=n, name=f"eval_loss/{task}", value=loss) for n, task, loss in logged]
    rows.append(TrainingMetric(optimizer_step=5, name="loss", value=9.0))
    metrics = write_rows(rows, TrainingMetric, step="training_metrics")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("some")
    digest = commit_checkpoint(tmp_path / "model", step="train_sft", metrics=metrics)
    return record("SFT", policy={"name": "sft", "digest": digest})


def test_the_held_out_loss_of_each_task_is_told_before_and_after_training(trained: IterationRecord) -> None:
    assert list(held_out_losses([record("base"), trained])) == [
        HeldOutLoss("SFT", "solve", 2.0, 1.25),
        HeldOutLoss("SFT", "judge", 0.7, 0.5),
    ]


def test_a_published_figure_stands_beside_ours_or_beside_nothing() -> None:
    config = {"published": {"SFT": {"maj@16": 72, "pass@16": 87}, "DPO": {"maj@16": None}}}
    first, second, third = published_rows(config, [record("SFT")])
    assert (first.published, (first.ours or {})["value"]) == (72, 0.6)
    assert (second.strategy, second.ours) == ("pass@16", None)
    assert (third.label, third.published, third.ours) == ("DPO", None, None)


def test_figures_of_a_judge_are_grouped_by_writer_and_difficulty() -> None:
    common: dict[str, Any] = {"judge": "j", "value": 0.7, "low": None, "high": None, "n": 9, "prompts": 3}
    names = [
        ("own", "all", "auroc"),
        ("own", "all", "ece"),
        ("own", "solved 0-25 %", "auroc"),
        ("base", "all", "auroc"),
    ]
    rows = [Calibration(writer=writer, group=group, name=name, **common) for writer, group, name in names]
    ref = write_rows(rows, Calibration, step="calibration")
    table = calibration_table(record("SFT", calibration=ref.model_dump()))
    assert [(writer, group, set(figures)) for writer, group, figures in table] == [
        ("own", "all", {"auroc", "ece"}),
        ("own", "solved 0-25 %", {"auroc"}),
        ("base", "all", {"auroc"}),
    ]
    assert calibration_table(record("base")) == []
