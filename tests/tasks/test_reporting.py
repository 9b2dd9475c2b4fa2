"""The report of a finished run, from what is stored alone."""

import json
import re
import shutil
from pathlib import Path

import pytest

from storage.experiments import Experiment
from tasks.reporting import facts, render, write_report

pytestmark = pytest.mark.flow  # a library, a server or a run that takes too long for every save


@pytest.fixture
def experiment(finished: Path) -> Experiment:
    return Experiment("rest-em-smoke")


def test_the_report_shows_each_policy_each_strategy_and_the_funnel(experiment: Experiment) -> None:
    page = render(experiment)
    for shown in ("base", "iteration 1", "iteration 2", "dpo", "greedy", "mean@1", "pass@4", "maj@4", "<svg"):
        assert shown in page
    for record in experiment.iterations():
        for figure in record.metrics.values():
            assert f"{100 * figure['value']:.1f}" in page


def test_the_report_is_one_page_that_loads_nothing(experiment: Experiment) -> None:
    page = render(experiment)
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#)[^"']*["']""", page) == []
    assert "@import" not in page


def test_what_a_model_wrote_is_shown_as_text(experiment: Experiment) -> None:
    assert "<script" not in render(experiment)


def test_the_same_report_is_written_from_the_same_records(experiment: Experiment) -> None:
    assert render(experiment) == render(experiment)


def test_the_report_stands_when_its_data_sets_are_gone(experiment: Experiment, finished: Path) -> None:
    shutil.rmtree(finished / "datasets" / "scored")
    shutil.rmtree(finished / "models")
    assert "iteration 2" in render(experiment)


def test_report_and_facts_lie_beside_the_records(experiment: Experiment) -> None:
    path = write_report(experiment)
    assert path == experiment.folder / "report.html"
    assert json.loads((experiment.folder / "report.json").read_text()) == facts(experiment)


def test_facts_have_the_shape_that_programs_rely_on(experiment: Experiment) -> None:
    told = facts(experiment)
    assert (told["experiment"], told["state"], told["error"]) == ("rest-em-smoke", "finished", None)
    assert [one["iteration"] for one in told["iterations"]] == [0, 1, 2, 3]
    one = told["iterations"][1]
    assert {"iteration", "policy", "promoted", "metrics", "funnel"} <= set(one)
    assert {"value", "low", "high", "n"} <= set(one["metrics"]["mean@1"])
    assert one["metrics"]["mean@1"]["n"] == 40
    expected = {"step", "iteration", "shard", "state", "cached", "rows", "digest", "seconds"}
    assert all(expected <= set(record) for record in told["steps"])
    shards = {record["shard"] for record in told["steps"] if record["step"] == "sample_rollouts"}
    assert {0, 1, 2, 3} <= shards  # 40 prompts, 10 a shard
    assert json.loads(json.dumps(told)) == told
