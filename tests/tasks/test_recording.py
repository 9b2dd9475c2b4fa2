"""Runs that do one more iteration each, as a schedule has them do."""

import pytest

from flows.rest_em import rest_em
from models import fake_engine
from storage.experiments import Experiment
from tests.flows.builders import SMOKE, config_of, stored

EXPERIMENT = "rest-em-smoke"


def advance() -> tuple[str, list[str]]:
    """One scheduled run: the experiment's state after it, and the iterations it has by then."""
    rest_em.fn(config_of(SMOKE), advance=True)
    experiment = Experiment(EXPERIMENT)
    return experiment.state().state, [record.label for record in experiment.iterations()]


def test_each_advancing_run_adds_one_iteration_and_the_last_finds_nothing_to_do(
    finished: object, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = stored(Experiment(EXPERIMENT))
    monkeypatch.setenv("RATCHET_HOME", str(tmp_path_factory.mktemp("advancing")))
    assert advance() == ("advanced", ["base", "iteration 1"])
    assert (Experiment(EXPERIMENT).folder / "report.html").exists()
    assert advance() == ("advanced", ["base", "iteration 1", "iteration 2"])
    assert advance() == ("advanced", ["base", "iteration 1", "iteration 2", "dpo"])
    assert advance() == ("finished", ["base", "iteration 1", "iteration 2", "dpo"])
    assert stored(Experiment(EXPERIMENT)) == whole


def test_the_next_advancing_run_goes_on_with_the_iteration_in_which_one_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError("the accelerator is full")

    with monkeypatch.context() as patch:
        patch.setattr(fake_engine, "train_fake", out_of_memory)
        with pytest.raises(MemoryError):
            rest_em.fn(config_of(SMOKE), advance=True)
    assert Experiment(EXPERIMENT).state().state == "failed"
    assert advance() == ("advanced", ["base", "iteration 1"])
