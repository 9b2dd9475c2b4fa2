"""A row followed from its prompt to what was learnt from it."""

import json
import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from flows.__main__ import app
from storage.datasets import DatasetRef, read_rows
from storage.experiments import Experiment
from storage.home import home
from storage.ledger import Ledger
from storage.rows import Demonstration, Pair, Prompt, Rollout, ScoredRollout
from tasks.traces import ExperimentTrace
from tasks.tracing import trace
from tests.flows.builders import run_plainly

pytestmark = pytest.mark.flow  # whole runs on the fake engine


def made_by(experiment: Experiment, step: str, row_type: str, folder: str, call: int = 0) -> DatasetRef:
    """The data set that a call of a step made."""
    record = [record for record in experiment.steps() if record.step == step][call]
    return DatasetRef(step=folder, digest=str(record.digest), row_type=row_type, rows=record.rows or 1)


def followed(row: str) -> ExperimentTrace:
    (one,) = trace(row).experiments
    return one


@pytest.fixture
def demonstration(smoke: Experiment) -> Demonstration:
    """The first demonstration of iteration 1."""
    return next(read_rows(made_by(smoke, "select_demonstrations", "Demonstration", "demonstrations"), Demonstration))


@pytest.fixture
def pair(smoke: Experiment) -> Pair:
    """The first pair of the DPO stage, iteration 2."""
    return next(read_rows(made_by(smoke, "pair_rollouts", "Pair", "pairs"), Pair))


def test_a_demonstration_is_followed_from_prompt_to_promoted_policy(
    smoke: Experiment, demonstration: Demonstration
) -> None:
    one = followed(f"{demonstration.prompt_id}/{demonstration.rollout_index}")
    assert [prompt.step for prompt in one.prompts] == ["load_prompts", "draw_prompts"]
    assert one.prompts[0].prompt == demonstration.prompt
    sampled, _ = one.rollouts  # for iteration 1, and for DPO
    assert (sampled.iteration, sampled.split, sampled.policy_label) == (1, "training", "base")
    assert [(verdict.reward, verdict.reason) for verdict in sampled.verdicts] == [(1.0, "match")]
    assert [(use.became, use.why_not) for use in sampled.uses] == [("demonstration", None)]
    first = one.trainings[0]
    policy = smoke.iterations()[1].policy
    assert (first.step, first.checkpoint, first.label, first.promoted) == (
        "train_sft",
        policy["digest"],
        "iteration 1",
        True,
    )
    assert not one.evaluations and not one.gaps


def test_a_rollout_that_was_left_out_says_why(smoke: Experiment) -> None:
    scored = made_by(smoke, "score_answers", "ScoredRollout", "scored", call=3)  # 0 to 2 evaluate the base
    wrong = next(row for row in read_rows(scored, ScoredRollout) if row.reward == 0)
    sampled, _ = followed(f"{wrong.prompt_id[:12]}/{wrong.rollout_index}").rollouts
    assert [(use.became, use.why_not, use.times) for use in sampled.uses] == [(None, "mismatch", 0)]


def test_the_sides_of_a_pair_are_told_and_the_training_that_read_it(smoke: Experiment, pair: Pair) -> None:
    one = followed(pair.prompt_id)
    uses = {
        (row.rollout_index, use.became) for row in one.rollouts if row.iteration == 2 for use in row.uses if use.became
    }
    assert {(pair.chosen_index, "chosen"), (pair.rejected_index, "rejected")} <= uses
    assert [training.label for training in one.trainings if training.step == "train_preferences"] == ["dpo"]


def test_a_test_prompt_is_followed_into_each_evaluation(smoke: Experiment) -> None:
    prompt = next(read_rows(made_by(smoke, "load_prompts", "Prompt", "prompts", call=2), Prompt))
    one = followed(prompt.prompt_id)
    assert {rollout.split for rollout in one.rollouts} == {"test"}
    assert len(one.rollouts) == 3 * 5  # base, iteration 1, dpo; one greedy rollout and four sampled
    assert [(row.label, row.strategy) for row in one.evaluations[:4]] == [
        ("base", "greedy"),
        ("base", "mean@1"),
        ("base", "pass@4"),
        ("base", "maj@4"),
    ]
    assert not one.trainings and not any(rollout.uses for rollout in one.rollouts)


def test_a_rollout_that_only_the_ledger_has_is_shown(smoke: Experiment) -> None:
    rollouts = made_by(smoke, "gather_rollouts", "Rollout", "rollouts", call=3)
    row = next(read_rows(rollouts, Rollout))
    Ledger({"policy": {}, "more": 1}).append([replace(row, rollout_index=11, completion="fresh")])
    assert [(one.rollout_index, one.completion) for one in trace(row.prompt_id).ledger_only] == [(11, "fresh")]
    assert trace(f"{row.prompt_id}/0").ledger_only == ()


def test_a_data_set_that_is_gone_is_a_gap_and_no_end(smoke: Experiment, demonstration: Demonstration) -> None:
    for folder in home().glob("datasets/demonstrations/*"):
        shutil.rmtree(folder)
    one = followed(demonstration.prompt_id)
    assert one.rollouts and any("datasets/demonstrations" in gap for gap in one.gaps)


def test_an_interrupted_run_shows_what_earlier_runs_did(smoke: Experiment, demonstration: Demonstration) -> None:
    state = json.loads((smoke.folder / "state.json").read_text())
    (smoke.folder / "state.json").write_text(json.dumps({**state, "run": "another", "state": "interrupted"}))
    assert followed(demonstration.prompt_id).trainings[0].label == "iteration 1"


def test_two_experiments_are_both_shown_or_the_one_asked_for(smoke: Experiment, demonstration: Demonstration) -> None:
    run_plainly("experiment=other", "iterations=1", "dpo=null")
    assert [one.experiment for one in trace(demonstration.prompt_id).experiments] == ["other", "rest-em-smoke"]
    assert [one.experiment for one in trace(demonstration.prompt_id, "other").experiments] == ["other"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("ab1", "is no row; give a prompt_id, or 6 or more"),
        ("abcdef/x", "is no row"),
        ("zzzzzz", "0 prompts in .* begins with 'zzzzzz'"),
    ],
    ids=["short", "index", "unknown"],
)
def test_what_names_no_row_is_refused(smoke: Experiment, row: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(row)


def test_the_command_tells_the_story(smoke: Experiment, demonstration: Demonstration) -> None:
    row = f"{demonstration.prompt_id}/{demonstration.rollout_index}"
    printed = CliRunner().invoke(app, ["trace", row]).stdout
    for told in (demonstration.prompt, "reward 1 (match)", "-> demonstration", "iteration 1, promoted"):
        assert told in printed
    assert json.loads(CliRunner().invoke(app, ["trace", row, "--json"]).stdout)["prompt_id"] == demonstration.prompt_id
