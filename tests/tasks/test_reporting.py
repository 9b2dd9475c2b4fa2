"""The report of a finished run, from what is stored alone."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet as pq
import pytest

from storage.experiments import Experiment
from storage.report_rows import TABLES
from tasks.assembling import assemble
from tasks.reporting import duration, facts, render, shown_lineage, write_report
from tests.flows.builders import run_plainly

pytestmark = pytest.mark.flow  # a library, a server or a run that takes too long for every save


@pytest.fixture
def experiment(finished: Path) -> Experiment:
    return Experiment("rest-em-smoke")


def page_of(experiment: Experiment) -> str:
    return render(assemble(experiment))


class Page(HTMLParser):
    """The ids and links of a page, and whether its tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.ids += [str(told["id"])] if "id" in told else []
        self.links += [str(told[name]) for name in ("href", "xlink:href", "src") if name in told]
        if tag not in ("meta", "br", "link", "img", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_shows_each_policy_each_strategy_and_the_funnel(experiment: Experiment) -> None:
    page = page_of(experiment)
    for shown in ("base", "iteration 1", "iteration 2", "dpo", "greedy", "mean@1", "pass@4", "maj@4", "<svg"):
        assert shown in page
    for record in experiment.iterations():
        for figure in record.metrics.values():
            assert f"{100 * figure['value']:.1f}" in page


def test_the_report_is_one_page_that_loads_nothing(experiment: Experiment) -> None:
    page = page_of(experiment)
    assert all(link.startswith("#") for link in Page(page).links)
    assert "@import" not in page
    assert "default-src 'none'" in page  # nor would a browser let it, or run a script
    assert re.findall(r"url\((?!#)", page) == []


def test_every_link_of_the_page_leads_to_a_place_in_it(experiment: Experiment) -> None:
    page = Page(page_of(experiment))
    assert page.open == []  # every tag is closed
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    lineage = [row.name for row in assemble(experiment).tables["lineage"]]  # type: ignore[attr-defined]
    assert set(lineage) <= set(page.ids)


def test_what_a_model_wrote_is_shown_as_text(experiment: Experiment) -> None:
    report = assemble(experiment)
    hostile = "</pre><script>alert(1)</script>"
    samples = [_with(row, completion=hostile, prompt=hostile) for row in report.tables["samples"]]
    iterations = [one.model_copy(update={"label": "<b onload=x>$x$"}) for one in report.iterations]
    metrics = [_with(row, label="<script>$x$") for row in report.tables["metrics"]]
    tables = report.tables | {"samples": samples, "metrics": metrics}
    page = render(report._replace(tables=tables, iterations=iterations, config={"note": hostile}))
    assert "<script" not in page
    assert "<b onload" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert Page(page).open == []


def _with(row: Any, **changes: object) -> Any:
    return type(row)(**{name: changes.get(name, getattr(row, name)) for name in row.__slots__})


def test_the_same_report_is_written_from_the_same_records(experiment: Experiment) -> None:
    assert page_of(experiment) == page_of(experiment)


def test_the_report_stands_when_its_data_sets_are_gone(experiment: Experiment, finished: Path) -> None:
    shutil.rmtree(finished / "datasets")
    shutil.rmtree(finished / "models")
    report = assemble(experiment)
    assert report.tables["rollouts"] == report.tables["samples"] == report.tables["overlaps"] == []
    assert len(report.tables["metrics"]) == 20  # 4 policies, 4 strategies on test and 1 on dev
    assert "Rollouts could not be read, and their figures are left out: datasets/scored/" in report.gaps[0]
    page = render(report)
    assert "iteration 2" in page
    assert "could not be read" in page


def test_the_report_stands_when_the_records_of_steps_are_gone(experiment: Experiment, finished: Path) -> None:
    shutil.rmtree(finished / "steps")
    (experiment.folder / "steps.jsonl").unlink()
    shutil.rmtree(experiment.folder / "runs")
    report = assemble(experiment)
    assert report.tables["costs"] == report.tables["lineage"] == []
    assert "iteration 2" in render(report)


def test_page_json_and_parquet_say_the_same(experiment: Experiment) -> None:
    path = write_report(experiment)
    assert path == experiment.folder / "report.html"
    told = json.loads((experiment.folder / "report.json").read_text())
    assert {name: told[name] for name in facts(experiment)} == facts(experiment)
    assert told["settings"] == experiment.config()
    assert set(told["tables"]) == set(TABLES)
    for name, rows in told["tables"].items():
        assert pq.read_table(experiment.folder / "report" / f"{name}.parquet").to_pylist() == rows
    metrics = pandas.read_parquet(experiment.folder / "report" / "metrics.parquet")
    shown = metrics[(metrics.split == "test") & (metrics.strategy == "mean@1")].value.tolist()
    assert shown == [record.metrics["mean@1"]["value"] for record in experiment.iterations()]


def test_the_curves_begin_at_the_mean_and_end_at_the_pass_that_was_evaluated(experiment: Experiment) -> None:
    points: list[Any] = list(assemble(experiment).tables["pass_at_k"])
    for record in experiment.iterations():
        of_policy = {point.k: point.value for point in points if point.iteration == record.iteration}
        assert list(of_policy) == [1, 2, 3, 4]
        assert of_policy[1] == pytest.approx(record.metrics["mean@1"]["value"])
        assert of_policy[4] == pytest.approx(record.metrics["pass@4"]["value"])


def test_rollouts_by_role_agree_with_what_the_steps_counted(experiment: Experiment) -> None:
    report = assemble(experiment)
    rows: list[Any] = list(report.tables["rollouts"])
    assert [(row.iteration, row.role) for row in rows] == [
        (0, "test"), (1, "training"), (1, "test"), (2, "training"), (2, "test"), (3, "training"), (3, "test"),
    ]  # fmt: skip
    first = experiment.iterations()[1]
    training = rows[1]
    assert (training.rollouts, training.prompts, training.correct) == (160, 40, first.funnel["correct"])
    assert training.undecided == 160 - first.funnel["answered"]
    reasons: list[Any] = list(report.tables["reasons"])
    told = {row.reason: row.rollouts for row in reasons if (row.iteration, row.role) == (1, "training")}
    assert told.pop("match") == first.funnel["correct"]
    assert told == {reason: count for reason, count in first.drops.items() if reason != "duplicate"}


def test_the_decisions_are_those_of_the_gate(experiment: Experiment) -> None:
    rows: list[Any] = list(assemble(experiment).tables["decisions"])
    records = [record for record in experiment.iterations() if record.decision]
    assert [row.label for row in rows] == ["iteration 1", "iteration 2", "dpo"]
    assert (rows[0].against, rows[0].rule, rows[0].strategy) == ("base", "better", "mean@1")
    for row, record in zip(rows, records, strict=True):
        assert record.decision is not None
        assert {name: getattr(row, name) for name in record.decision} == record.decision


def test_every_policy_is_held_against_dev_and_test(experiment: Experiment) -> None:
    rows: list[Any] = list(assemble(experiment).tables["overlaps"])
    assert [(row.label, row.split) for row in rows] == [
        (label, split) for label in ("iteration 1", "iteration 2", "dpo") for split in ("dev", "test")
    ]
    trained_on = [record.funnel["trained_on"] for record in experiment.iterations()[1:]]
    assert [row.training_rows for row in rows[::2]] == trained_on
    assert {(row.held_out_prompts, row.shared_prompts) for row in rows} == {(40, 0)}


def test_a_second_run_is_paid_once_and_shown_as_cached(experiment: Experiment) -> None:
    (before,) = assemble(experiment).tables["runs"]
    run_plainly()
    report = assemble(experiment)
    first, second = report.tables["runs"]
    assert first == before
    told: Any = second
    assert (told.state, told.cached, told.tokens, told.engine_seconds) == ("finished", told.calls, 0, 0.0)
    assert any(version.startswith("python 3.") for version in told.versions)
    assert told.accelerator_seconds == 0.0
    costs: Any = {row.step: row for row in report.tables["costs"]}  # type: ignore[attr-defined]
    assert costs["train_sft"].cached == 2
    assert costs["train_sft"].saved_seconds == pytest.approx(costs["train_sft"].seconds, abs=0.01)


def test_lineage_leads_from_every_policy_to_the_prompts(experiment: Experiment) -> None:
    rows: Any = {row.name: row for row in assemble(experiment).tables["lineage"]}  # type: ignore[attr-defined]
    for record in experiment.iterations()[1:]:
        left, steps = [f"models/{record.policy['digest']}"], set()
        while left:
            name = left.pop()
            if name in rows:
                steps.add(rows[name].step)
                left += rows[name].parents
        assert {"load_prompts", "gather_rollouts", "score_answers"} <= steps
    assert all(row.there for row in rows.values())


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


def test_of_thousands_of_shards_the_page_shows_a_few_and_says_so(experiment: Experiment) -> None:
    report = assemble(experiment)
    first: Any = report.tables["lineage"][0]
    shards = [_with(first, name=f"datasets/judged_shard/{n:032}", step="judge_shard", iteration=1) for n in range(3000)]
    gathered = _with(
        first, name="datasets/judged/" + 32 * "f", step="gather_judged", parents=[row.name for row in shards]
    )
    assert shown_lineage([*shards, gathered]) == [*shards[:8], gathered]
    page = render(report._replace(tables=report.tables | {"lineage": [*shards, gathered]}))
    assert "without 2,992 that are like those shown" in page
    assert "and 2,988 more" in page
    assert len(page) < 1.1 * len(render(report))


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (9000, "2 h 30 min"),
    ],
)
def test_durations_are_told_as_people_say_them(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_an_experiment_that_has_not_come_to_its_base_yet_has_a_report() -> None:
    experiment = Experiment("words")
    experiment.begin("run-1", {"recipe": "rest_em"})
    experiment.end("failed", "ValueError: <no prompts>")
    page = write_report(experiment).read_text()
    assert "ValueError: &lt;no prompts&gt;" in page
    assert "did not come to its end (failed)" in page
    assert Page(page).open == []
