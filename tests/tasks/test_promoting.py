"""What an iteration leaves: the policy that stands, and a record with its figures and its funnel."""

from pathlib import Path

import pytest

from models.specs import ModelRef, PromptTemplate
from storage.datasets import DatasetRef, write_rows
from storage.experiments import Experiment
from storage.rows import BenchmarkMetric, EvaluatedPrompt
from tasks.evaluating import Contender
from tasks.planning import planning
from tasks.promoting import begin, benchmark_figures, promote
from tasks.promotion import Gate
from tasks.recording import experiment_run, iteration
from tests.flows.builders import run_plainly, tree
from tests.tasks.builders import evaluated

pytestmark = pytest.mark.flow  # whole runs on the fake engine


def test_the_figures_of_whole_benchmarks_and_ifevals_average_are_named() -> None:
    def metric(benchmark: str, task: str, name: str, value: float, filter_: str = "none") -> BenchmarkMetric:
        return BenchmarkMetric(
            benchmark=benchmark,
            task=task,
            metric=name,
            filter=filter_,
            value=value,
            low=value - 0.1,
            high=value + 0.1,
            n=9,
            documents=9,
            limit=None,
            shots=0,
            rendering="plain",
            cut_prompts=0,
            note="",
            policy="fake:tests",
        )

    rows = [metric("ifeval", "ifeval", name, value) for name, value in (("a", 0.2), ("b", 0.4))]
    rows += [metric("mmlu", "mmlu_law", "acc", 0.9), metric("gsm8k", "gsm8k", "exact_match", 0.5, "strict-match")]
    figures = benchmark_figures(rows)
    assert set(figures) == {"ifeval a", "ifeval b", "ifeval average", "gsm8k exact_match, strict-match"}
    assert figures["ifeval average"] == pytest.approx({"value": 0.3, "low": 0.2, "high": 0.4, "n": 9, "k": 1})


def contender(name: str, correct: int) -> Contender:
    """A contender that solved so many of 20 prompts, on dev as on test."""
    rows = [evaluated(f"p{n}", 1.0 if n < correct else 0.0) for n in range(20)]
    split = write_rows(rows, EvaluatedPrompt, step="evaluated")
    return Contender(ModelRef(name=name), PromptTemplate(), split, split)


def test_a_better_challenger_stands_and_a_worse_one_is_kept_on_record() -> None:
    base, better, worse = contender("base", 5), contender("better", 15), contender("worse", 1)
    with experiment_run("words", {}) as experiment:
        with iteration(0):
            begin(experiment, base)
        with iteration(1):
            stands = promote(experiment, "iteration 1", better, base, Gate(promote="better"))
        with iteration(2):
            still = promote(experiment, "iteration 2", worse, stands, Gate(promote="better"))
    assert (stands, still) == (better, better)
    records = experiment.iterations()
    assert [(r.label, r.promoted, r.policy["name"]) for r in records] == [
        ("base", True, "base"),
        ("iteration 1", True, "better"),
        ("iteration 2", False, "worse"),
    ]
    assert [r.metrics["mean@1"]["value"] for r in records] == [0.25, 0.75, 0.05]
    assert records[0].decision is None
    assert records[2].decision is not None


def test_the_gate_can_be_told_to_always_promote() -> None:
    with experiment_run("words", {}) as experiment, iteration(1):
        worse = contender("worse", 1)
        assert promote(experiment, "iteration 1", worse, contender("base", 5), Gate(promote="always")) == worse


def test_a_plan_records_nothing(ratchet_home: Path) -> None:
    base = contender("base", 5)
    before = tree(ratchet_home)
    with planning(), experiment_run("words", {}) as experiment, iteration(0):
        begin(experiment, base)
        promote(experiment, "iteration 1", base, base, Gate(promote="always"))
    assert tree(ratchet_home) == before


def test_the_funnel_of_a_real_run_adds_up(finished: Path) -> None:
    experiment = Experiment("rest-em-smoke")
    for record in experiment.iterations()[1:3]:
        funnel = record.funnel
        assert funnel["sampled"] == 160  # 40 prompts of 4 rollouts
        stages = [funnel[s] for s in ("sampled", "answered", "correct", "after_deduplication", "after_cap", "kept")]
        assert stages == sorted(stages, reverse=True)
        assert funnel["sampled"] - funnel["kept"] == sum(record.drops.values())
    one, two = experiment.iterations()[1:3]
    assert two.funnel["trained_on"] == one.funnel["kept"] + two.funnel["kept"]  # demonstrations: all


def test_a_run_served_from_the_cache_has_the_same_record(finished: Path) -> None:
    first = Experiment("rest-em-smoke").iterations()
    again = run_plainly()
    assert [r.model_copy(update={"run": ""}) for r in again.iterations()] == [
        r.model_copy(update={"run": ""}) for r in first
    ]
    assert all(record.cached for record in again.steps(run=again.state().run))


def test_a_run_with_fewer_iterations_leaves_no_record_of_the_old_ones(finished: Path) -> None:
    labels = [record.label for record in run_plainly("iterations=1").iterations()]
    assert labels == ["base", "iteration 1", "dpo"]


def test_the_data_sets_of_a_record_can_be_read(finished: Path) -> None:
    for record in Experiment("rest-em-smoke").iterations():
        for ref in record.references.values():
            assert (finished / DatasetRef(**ref).name / "manifest.json").is_file()
