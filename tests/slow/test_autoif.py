"""The tiny preset with vLLM, TRL and the sandbox: held-out instructions are followed more often than before."""

import time
from itertools import pairwise

import pytest

from flows.autoif import autoif
from storage.experiments import Experiment
from tests.flows.builders import REPOSITORY
from tests.flows.test_autoif import FOLDER, config_of

MOST_SECONDS = 1200  # ten minutes on two cores of one's own, and as much again for those that are shared


@pytest.mark.slow
@pytest.mark.timeout(2 * MOST_SECONDS)
def test_the_tiny_preset_raises_the_pass_rate_of_held_out_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = config_of(FOLDER / "tiny.yaml")
    started = time.monotonic()
    autoif.fn(config)
    assert time.monotonic() - started < MOST_SECONDS
    records = Experiment(config.experiment).iterations()
    assert [record.iteration for record in records] == [0, 1, 2]
    for before, trained in pairwise(records):
        assert trained.promoted and trained.decision is not None
        assert trained.decision["p_value"] < 0.001
        assert trained.metrics["mean@1"]["low"] > before.metrics["mean@1"]["high"]
