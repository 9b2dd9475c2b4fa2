"""Runs that do one more iteration each, as a schedule has them do."""

import pytest

from flows.rest_em import rest_em
from models import fake_engine
from storage.experiments import Experiment
from tasks.recording import Halted
from tasks.serving import rollouts_generated
from tests.flows.builders import SMOKE, config_of, heard, stored, train_noised

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


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> str:
    """A schedule whose first training spoils the policy; what its first run was ended with."""
    with monkeypatch.context() as patch:
        patch.setattr(fake_engine, "train_fake", train_noised)
        with pytest.raises(Halted) as caught:
            rest_em.fn(config_of(SMOKE), advance=True)
    return str(caught.value)


def test_a_schedule_halts_at_a_regression_says_so_and_does_not_use_the_policy(spoilt: str) -> None:
    experiment = Experiment(EXPERIMENT)
    record = experiment.iterations()[-1]
    assert (record.label, record.promoted) == ("iteration 1", False)
    assert record.regression is not None
    assert record.notices[0] == record.regression["reason"]
    assert record.notices[1].startswith("Gold answers: ")
    assert record.regression["fell"] > record.regression["rose"]
    state = experiment.state()
    assert (state.state, state.error) == ("halted", spoilt)
    assert "rest-em-smoke, iteration 1: Significantly worse: mean@1 fell from" in spoilt
    assert "ratchet run PRESET --go-on" in spoilt
    assert "Significantly worse" in (experiment.folder / "report.json").read_text()


def test_the_next_scheduled_run_halts_there_too_and_draws_nothing(spoilt: str) -> None:
    drawn = rollouts_generated()
    with pytest.raises(Halted) as caught, heard() as records:
        rest_em.fn(config_of(SMOKE), advance=True)
    assert str(caught.value) == spoilt
    assert all(record.cached for record in records)
    assert rollouts_generated() == drawn


def test_what_a_person_let_pass_is_passed_by_every_later_run(spoilt: str) -> None:
    assert Experiment(EXPERIMENT).let_pass() == ["iteration 1"]
    assert advance() == ("advanced", ["base", "iteration 1", "iteration 2"])
    assert advance() == ("advanced", ["base", "iteration 1", "iteration 2", "dpo"])


def test_other_settings_go_on_by_themselves(spoilt: str) -> None:
    rest_em.fn(config_of(SMOKE, "sft.learning_rate=4.0e-4"), advance=True)
    assert Experiment(EXPERIMENT).state().state == "advanced"


def test_a_run_that_is_watched_goes_on_unless_every_run_is_to_stop(spoilt: str) -> None:
    rest_em.fn(config_of(SMOKE))
    assert Experiment(EXPERIMENT).state().state == "finished"
    with pytest.raises(Halted, match="Until then every run ends here"):
        rest_em.fn(config_of(SMOKE, "gate.regression.stops=every run"))
    rest_em.fn(config_of(SMOKE, "gate.regression=null"), advance=True)
    assert Experiment(EXPERIMENT).iterations()[1].regression is None
