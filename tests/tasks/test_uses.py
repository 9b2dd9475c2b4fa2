"""What became of rollouts that were judged, followed through a whole run on the fake engine."""

import json

import pytest
from typer.testing import CliRunner

from flows.__main__ import app
from storage.datasets import DatasetRef, read_rows
from storage.experiments import Experiment
from storage.rows import Demonstration, JudgedRollout, Pair
from tasks.explaining import explain
from tasks.traces import TracedRollout
from tasks.tracing import trace
from tests.flows.test_generator_evaluator import run_plainly

pytestmark = pytest.mark.flow  # a whole run


@pytest.fixture
def judged_run() -> Experiment:
    """A finished smoke run of one model that writes and judges."""
    return run_plainly("label_free.dpo=[{preference: {beta: 0.1}}]")


def made_by(experiment: Experiment, step: str, ref: dict[str, str], iteration: int) -> DatasetRef:
    record = next(one for one in experiment.steps() if (one.step, one.iteration) == (step, iteration))
    return DatasetRef(digest=str(record.digest), rows=record.rows or 1, **ref)


def rollout_of(row: str) -> TracedRollout:
    """The one that data sets 2 to 4 were made of."""
    (one,) = trace(row).experiments
    (found,) = (rollout for rollout in one.rollouts if rollout.iteration == 2 and rollout.split == "training")
    return found


def test_a_judged_rollout_shows_its_confidence_both_verdicts_and_what_it_became(judged_run: Experiment) -> None:
    pairs = made_by(judged_run, "pair_by_confidence", {"step": "pairs", "row_type": "Pair"}, 5)
    judged = made_by(judged_run, "gather_judged", {"step": "judged", "row_type": "JudgedRollout"}, 3)
    pair = next(read_rows(pairs, Pair))
    known = {(row.prompt_id, row.rollout_index): row for row in read_rows(judged, JudgedRollout)}
    chosen = rollout_of(f"{pair.prompt_id}/{pair.chosen_index}")
    (judgement,) = chosen.judgements  # one, though it lies in the shard and in what was gathered
    assert judgement.confidence == known[pair.prompt_id, pair.chosen_index or 0].confidence == pair.chosen_reward
    assert judgement.judge_label == "SFT Dataset 1"
    scorers = [verdict.scorer.split("@")[0] for verdict in chosen.verdicts]
    assert scorers == ["answer_match", "self_confidence_classifier"]  # of data set 2, and free of labels
    assert "chosen" in {use.became for use in chosen.uses}
    rejected = rollout_of(f"{pair.prompt_id}/{pair.rejected_index}")
    assert "rejected" in {use.became for use in rejected.uses}


def test_a_judge_row_is_told_and_one_that_is_none_says_why(judged_run: Experiment) -> None:
    mixed = made_by(judged_run, "mix_tasks", {"step": "multitask", "row_type": "Demonstration"}, 2)
    row = next(row for row in read_rows(mixed, Demonstration) if row.task == "judge")
    uses = rollout_of(f"{row.prompt_id}/{row.rollout_index}").uses
    assert ("judge row", mixed.name) in {(use.became, use.dataset) for use in uses}
    told = [use.why_not or "" for index in range(8) for use in rollout_of(f"{row.prompt_id}/{index}").uses]
    assert any(one.startswith("no judge row: over the balance") for one in told)


def test_the_command_tells_the_confidence_and_why_judging_ran_again(judged_run: Experiment) -> None:
    judged = made_by(judged_run, "gather_judged", {"step": "judged", "row_type": "JudgedRollout"}, 3)
    row = next(read_rows(judged, JudgedRollout))
    printed = CliRunner().invoke(app, ["trace", f"{row.prompt_id}/{row.rollout_index}"]).stdout
    assert f"judged by SFT Dataset 1: confidence {row.confidence:.3f} that it is right" in printed
    as_json = json.loads(CliRunner().invoke(app, ["trace", row.prompt_id, "--json"]).stdout)
    assert {"dataset", "judge_label", "confidence", "reason"} == set(
        as_json["experiments"][0]["rollouts"][-1]["judgements"][0]
    )
    run_plainly("judge.minimum_label_mass=0.02", "label_free.dpo=[]")
    for one in explain("judge_rollouts"):  # the shards came out equal, so nothing before it is a cause
        assert [change.part for change in one.changes] == ["judge.minimum_label_mass"]


def test_the_funnel_says_how_many_were_judged_and_never_correct_of_what_was_taken_for_right(
    judged_run: Experiment,
) -> None:
    records = {record.label: record for record in judged_run.iterations()}
    third = records["SFT Dataset 3"].funnel
    assert third["sampled"] == third["judged"] == 320  # 40 prompts of 8
    assert third["decided"] >= third["taken_for_right"] > 0
    for label in ("SFT Dataset 3", "SFT Dataset 4"):
        assert not {"correct", "answered"} & set(records[label].funnel)
    assert "correct" in records["SFT Dataset 2"].funnel
    assert sum(count for reason, count in records["DPO (Dataset 4), sigmoid"].drops.items() if "pair" in reason) > 0
