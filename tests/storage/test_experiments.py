"""The record of an experiment: what a kill, a rerun and other settings leave of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.durable import this_host
from storage.experiments import Experiment, ExperimentState, IterationRecord, StepRecord, Surroundings, experiments


def step(name: str = "train_sft", run: str = "run-1") -> StepRecord:
    return StepRecord(
        run=run,
        step=name,
        iteration=1,
        shard=None,
        state="completed",
        cached=False,
        rows=3,
        digest="d" * 32,
        key="k",
        seconds=0.5,
        counts={"trained_on": 3},
        detail="",
        at="2026-01-01T00:00:00+00:00",
    )


def iteration(number: int, label: str = "iteration", run: str = "run-1") -> IterationRecord:
    return IterationRecord(
        run=run,
        iteration=number,
        label=label,
        policy={"name": "fake:0.4"},
        promoted=True,
        decision=None,
        metrics={"mean@1": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 40, "k": 1}},
        dev_metrics={},
        funnel={"sampled": 10, "kept": 4},
        drops={"mismatch": 6},
        references={},
    )


@pytest.fixture
def begun() -> Experiment:
    experiment = Experiment("words")
    experiment.begin("run-1", {"recipe": "rest_em"})
    return experiment


def test_a_run_is_running_until_it_ends(begun: Experiment) -> None:
    assert (begun.state().state, begun.state().pid, begun.state().error) == ("running", os.getpid(), None)
    begun.end("failed", "ValueError: no")
    assert (begun.state().state, begun.state().error, begun.state().run) == ("failed", "ValueError: no", "run-1")
    assert begun.state().finished_at is not None
    assert begun.config() == {"recipe": "rest_em"}


def test_a_run_whose_process_is_gone_was_interrupted(begun: Experiment) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    file = begun.folder / "state.json"
    state = ExperimentState.model_validate_json(file.read_text())
    file.write_text(state.model_copy(update={"pid": gone.pid}).model_dump_json())
    assert begun.state().state == "interrupted"


def test_a_new_run_replaces_the_state_and_keeps_the_steps(begun: Experiment) -> None:
    begun.add_step(step("load_prompts"))
    begun.end("finished")
    begun.begin("run-2", {"recipe": "rest_em"})
    begun.add_step(step("load_prompts", run="run-2"))
    assert (begun.state().state, begun.state().finished_at) == ("running", None)
    assert len(begun.steps()) == 2
    assert [record.run for record in begun.steps(run="run-2")] == ["run-2"]


def test_steps_come_back_as_they_were_added(begun: Experiment) -> None:
    records = [step("load_prompts"), step("train_sft")]
    for record in records:
        begun.add_step(record)
    assert begun.steps() == records


@pytest.mark.parametrize("torn_at", [1, 40, -1], ids=["first byte", "middle", "newline"])
def test_a_line_torn_by_a_kill_takes_no_other_along(begun: Experiment, torn_at: int) -> None:
    begun.add_step(step("load_prompts"))
    lines = begun.folder / "steps.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(whole + whole[:torn_at])
    begun.begin("run-2", {})
    begun.add_step(step("train_sft", run="run-2"))
    names = [record.step for record in begun.steps()]
    assert names == (["load_prompts", "load_prompts", "train_sft"] if torn_at == -1 else ["load_prompts", "train_sft"])


def test_an_iteration_written_again_replaces_the_first(begun: Experiment) -> None:
    for record in (iteration(1), iteration(0, "base"), iteration(1, "again")):
        begun.add_iteration(record)
    assert [(record.iteration, record.label) for record in begun.iterations()] == [(0, "base"), (1, "again")]


def test_ten_iterations_stand_in_order_of_their_numbers(begun: Experiment) -> None:
    for number in (10, 2, 9):
        begun.add_iteration(iteration(number))
    assert [record.iteration for record in begun.iterations()] == [2, 9, 10]


def test_iterations_that_a_run_did_not_write_can_be_forgotten(begun: Experiment) -> None:
    for number in range(4):
        begun.add_iteration(iteration(number))
    for number in range(2):
        begun.add_iteration(iteration(number, run="run-2"))
    begun.forget_other_iterations("run-2")
    assert [record.iteration for record in begun.iterations()] == [0, 1]


def test_experiments_are_listed_by_name_once_they_have_begun(ratchet_home: Path) -> None:
    for name in ("b", "a"):
        Experiment(name).begin("run", {})
    (ratchet_home / "experiments" / "never-begun").mkdir()
    assert [experiment.name for experiment in experiments()] == ["a", "b"]


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden"])
def test_a_name_that_is_no_plain_file_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="an experiment's name"):
        Experiment(name)


def test_a_run_is_noted_with_what_it_was_made_with_and_how_it_ended(begun: Experiment) -> None:
    begun.end("failed", "no")
    made_with = Surroundings(versions={"torch": "2.13.0"}, commit=None, machine="Linux", accelerators=("NVIDIA H100",))
    begun.begin("run-2", {"recipe": "rest_em"}, surroundings=made_with)
    first, second = sorted(begun.runs(), key=lambda record: record.run)
    assert (first.run, first.state, first.surroundings) == ("run-1", "failed", None)
    assert first.finished_at is not None
    assert (second.run, second.state, second.finished_at, second.surroundings) == ("run-2", "running", None, made_with)
    begun.end("finished")
    assert {record.run: record.state for record in begun.runs()} == {"run-1": "failed", "run-2": "finished"}


@pytest.mark.parametrize("folder", ["iterations", "runs", "report"])
def test_what_a_kill_left_unfinished_in_an_experiment_is_gone_when_a_run_begins(begun: Experiment, folder: str) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = begun.folder / folder / f".attempt-{this_host()}-{dead.pid}-00000000"
    left.parent.mkdir(exist_ok=True)
    left.write_text("half")
    begun.begin("run-2", {"recipe": "rest_em"})
    assert not left.exists()
