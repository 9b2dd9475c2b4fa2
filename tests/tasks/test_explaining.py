"""What changed between the last two runs of a step."""

from contextlib import suppress

import pytest
from typer.testing import CliRunner

from flows.__main__ import app
from storage.experiments import Experiment
from storage.home import home
from tasks.caching import STEPS
from tasks.explaining import Explanation, explain
from tests.flows.builders import run_plainly

pytestmark = pytest.mark.flow  # whole runs on the fake engine


def again(*overrides: str) -> None:
    """Run the experiment of the fixture once more, but for its last stage."""
    run_plainly("iterations=1", "dpo=null", *overrides)


def parts(explanation: Explanation) -> dict[str, tuple[object, object]]:
    return {change.part: (change.old, change.new) for change in explanation.changes}


def causes(explanation: Explanation) -> dict[tuple[str, str], tuple[object, object]]:
    return {(change.step, change.part): (change.old, change.new) for change in explanation.causes}


def test_a_step_that_ran_once_has_nothing_to_compare_with(smoke: Experiment) -> None:
    (one,) = explain("train_sft")
    assert (one.verdict, one.iteration, one.changes, one.damage) == ("first run", 1, (), None)


def test_a_reused_step_says_that_nothing_changed(smoke: Experiment) -> None:
    again()
    (one,) = explain("train_sft")
    assert (one.verdict, one.told) == ("reused", "nothing changed, and what was stored was reused")


def test_a_changed_setting_is_named_with_its_old_and_new_value(smoke: Experiment) -> None:
    again("sft.learning_rate=1e-4")
    (one,) = explain("train_sft")
    assert (one.verdict, parts(one), one.causes) == ("changed", {"sft.learning_rate": (5e-4, 1e-4)}, ())


def test_a_changed_input_is_traced_to_the_setting_that_changed_first(smoke: Experiment) -> None:
    again("selection.max_per_prompt=1", "base.name=fake:0.6")
    (one,) = explain("train_sft")
    assert set(parts(one)) == {"start.name", "demonstrations[0]"}
    assert causes(one) == {
        ("select_demonstrations", "selection.max_per_prompt"): (4, 1),
        ("gather_rollouts", "policy.name"): ("fake:0.4", "fake:0.6"),
    }
    (input_change,) = (change for change in one.changes if change.part == "demonstrations[0]")
    assert input_change.new_from is not None and input_change.new_from.startswith("select_demonstrations, iteration 1,")


def test_adaptive_sampling_is_sampling_to_whoever_asks(smoke: Experiment) -> None:
    again("sampling.adaptive={first: 2, more: 2, wanted_correct: 1, wanted_incorrect: 1}")
    sampled = next(one for one in explain("sample_rollouts") if one.iteration == 1)
    assert sampled.verdict == "changed"
    assert parts(sampled)["sampling.adaptive.first"] == (None, 2)
    assert sampled.ledger is not None
    assert (sampled.ledger.drawn, sampled.ledger.in_ledger) == (0, sampled.new.rows)  # plain sampling had drawn them


def test_a_change_that_leaves_the_rows_equal_ends_there(smoke: Experiment) -> None:
    again("selection.max_per_prompt=9")  # no prompt has more than four rollouts
    (selected,), (trained,) = explain("select_demonstrations"), explain("train_sft")
    assert (selected.verdict, trained.verdict) == ("changed", "reused")


def test_calls_of_one_iteration_are_matched_by_their_position(smoke: Experiment) -> None:
    again("evaluation.dev.seed=1001")
    base = explain("gather_rollouts", iteration=0)  # dev, then two passes over test
    assert [(one.position, one.positions, one.verdict) for one in base] == [
        (1, 3, "changed"),
        (2, 3, "reused"),
        (3, 3, "reused"),
    ]
    assert parts(base[0]) == {"sampling.seed": (1000, 1001)}


def test_sampling_tells_what_the_ledger_had(smoke: Experiment) -> None:
    again("sampling.rollouts_per_prompt=6")
    one = explain("sample_rollouts", iteration=1)[0]
    assert parts(one) == {"sampling.rollouts_per_prompt": (4, 6)}
    assert one.ledger is not None
    assert (one.ledger.in_ledger, one.ledger.drawn) == (160, 80)  # 40 prompts, 4 of 6 rollouts of each


def test_a_raised_step_version_is_a_part(smoke: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STEPS["select_demonstrations"], "version", "99")
    before = explain("select_demonstrations")[0].new.key
    again()
    (one,) = explain("select_demonstrations")
    assert parts(one)["step version"][1] == "99" and len(one.changes) == 1 and one.new.key != before


def test_damaged_data_is_told_before_the_next_run_and_after_it(smoke: Experiment) -> None:
    (weights,) = home().glob(f"models/{explain('train_sft')[0].new.digest}/fake.json")
    weights.unlink()
    (before,) = explain("train_sft")
    assert before.damage is not None and before.damage.endswith("fake.json is missing")
    again()
    (after,) = explain("train_sft")
    assert (after.verdict, after.damage) == ("same key", None)
    assert after.told.endswith("fake.json is missing")


def test_a_record_that_is_gone_is_told(smoke: Experiment) -> None:
    for record in home().glob("steps/train_sft/*.json"):
        record.unlink()
    damage = explain("train_sft")[0].damage
    assert damage is not None and "is gone or cannot be read" in damage


def test_a_failed_run_says_why_it_failed(smoke: Experiment) -> None:
    with suppress(RuntimeError):
        again("base.name=fake:0.0")  # never right, so that there is nothing to train on
    (one,) = explain("select_demonstrations")
    assert [(change.part, change.new_from) for change in one.changes] == [
        ("scored", "score_answers, iteration 1, 160 rows")
    ]
    assert [(cause.part, cause.old, cause.new) for cause in one.causes] == [("policy.name", "fake:0.4", "fake:0.0")]
    assert one.verdict == "changed" and "it failed: step 'select_demonstrations' kept 0 of 160" in one.told


@pytest.mark.parametrize(
    ("step", "experiment", "iteration", "message"),
    [
        (
            "train_sfd",
            None,
            None,
            "no step 'train_sfd' ran in rest-em-smoke; steps that did: check_gold, count_overlaps, decide_prom",
        ),
        ("train_sft", "other", None, "no experiment 'other' .* there are: rest-em-smoke"),
        ("train_sft", None, 7, r"train_sft never ran in iteration 7 of rest-em-smoke; it ran in \[1\]"),
    ],
    ids=["step", "experiment", "iteration"],
)
def test_a_wrong_name_is_answered_with_those_that_exist(
    smoke: Experiment, step: str, experiment: str | None, iteration: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        explain(step, experiment, iteration)


def test_the_command_prints_the_change_and_its_cause(smoke: Experiment) -> None:
    again("selection.keep=all")
    printed = CliRunner().invoke(app, ["why", "train_sft"]).stdout
    assert "demonstrations[0]: " in printed
    assert "because of select_demonstrations of iteration 1: selection.keep: 'rewarded' -> 'all'" in printed
    assert CliRunner().invoke(app, ["why", "nothing"]).exit_code == 2
