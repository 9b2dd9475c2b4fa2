"""The tiny preset with vLLM and TRL: the policy learns to judge, and its judgement does the vote no harm."""

import time

import pytest

from flows.generator_evaluator import generator_evaluator
from storage.datasets import DatasetRef, read_rows
from storage.experiments import Experiment
from storage.rows import Calibration
from tasks.tables import held_out_losses
from tests.flows.test_generator_evaluator import FOLDER, config_of

MOST_SECONDS = 1200  # ten minutes on two cores of one's own, and as much again for those that are shared


@pytest.mark.slow
@pytest.mark.timeout(2 * MOST_SECONDS)
def test_the_tiny_preset_judges_above_chance_and_filters_without_harm() -> None:
    config = config_of(FOLDER / "tiny.yaml")
    started = time.monotonic()
    generator_evaluator.fn(config)
    assert time.monotonic() - started < MOST_SECONDS
    records = {record.label: record for record in Experiment(config.experiment).iterations()}
    assert set(records) >= {"base", *(f"SFT Dataset {n}" for n in (1, 2, 3, 4))}
    gains = []
    for label in ("SFT Dataset 1", "SFT Dataset 2", "SFT Dataset 4"):
        record = records[label]
        figures = list(read_rows(DatasetRef(**record.references["calibration"]), Calibration))
        assert {figure.writer for figure in figures} == {"own", "base"}
        low = next(row.low for row in figures if (row.writer, row.group, row.name) == ("own", "all", "auroc"))
        assert low is not None
        assert low > 0.5
        assert record.metrics["mean@1"]["low"] > records["base"].metrics["mean@1"]["high"]
        gains.append(record.metrics["maj@16 with filter"]["value"] - record.metrics["maj@16"]["value"])
    assert sum(gains) >= 0, gains  # at least as good, over the policies that judge; thresholds were chosen on dev
    losses = {(row.label, row.task): row for row in held_out_losses(list(records.values()))}
    for task in ("solve", "judge"):
        assert losses["SFT Dataset 2", task].after < losses["SFT Dataset 2", task].before
