"""What a reader is told before the figures are believed."""

from collections.abc import Sequence
from typing import Any

from storage.experiments import ExperimentState, IterationRecord
from storage.report_rows import ReportedOverlap, ReportedRollouts, ReportedRun
from storage.rows import Row
from tasks.notices import notices, summary


def record(number: int, mean: float, greedy: float, *, promoted: bool = True) -> IterationRecord:
    figures = {"mean@1": mean, "greedy": greedy}
    return IterationRecord(
        iteration=number,
        label=f"iteration {number}",
        policy={"name": "fake:0.4"},
        promoted=promoted,
        decision=None,
        metrics={name: {"value": value, "low": 0.0, "high": 1.0, "n": 40, "k": 1} for name, value in figures.items()},
        dev_metrics={},
        funnel={},
        drops={},
        references={},
    )


def told(
    state: str = "finished",
    *,
    error: str | None = None,
    iterations: Sequence[IterationRecord] = (),
    **tables: list[Row],
) -> list[str]:
    stands: Any = {"state": state, "run": "run-1", "started_at": "", "pid": 1, "error": error}
    whole: dict[str, list[Row]] = {"overlaps": [], "rollouts": [], "runs": []}
    return list(notices(ExperimentState(**stands), iterations, whole | tables, ["Gone: datasets/scored/26f1"]))


def rollouts(truncated: int, role: str = "test") -> ReportedRollouts:
    return ReportedRollouts(
        iteration=1,
        label="iteration 1",
        role=role,
        dataset="datasets/scored/26f1",
        rollouts=200,
        prompts=50,
        mean_tokens=10.0,
        median_tokens=10,
        tenth_tokens=5,
        ninetieth_tokens=20,
        truncated=truncated,
        duplicates=0,
        undecided=0,
        correct=0,
    )


def overlap(shared: int) -> ReportedOverlap:
    return ReportedOverlap(
        iteration=1,
        label="iteration 1",
        split="test",
        training_rows=900,
        sharing_rows=7,
        held_out_prompts=400,
        shared_prompts=shared,
        run_words=13,
    )


def run(commit: str | None) -> ReportedRun:
    return ReportedRun(
        run="run-1",
        state="finished",
        started_at="",
        finished_at=None,
        seconds=1.0,
        engine_seconds=0.0,
        accelerator_seconds=0.0,
        tokens=0,
        calls=1,
        cached=0,
        failed=0,
        commit=commit,
        machine=None,
        accelerators=None,
        versions=[],
    )


def test_a_clean_report_says_only_what_is_gone() -> None:
    clean = told(overlaps=[overlap(0)], rollouts=[rollouts(10), rollouts(100, "training")], runs=[run("ab"), run(None)])
    assert clean == ["Gone: datasets/scored/26f1"]


def test_held_out_prompts_in_the_training_rows_are_told_once_by_the_worst_case() -> None:
    first, second = told(overlaps=[overlap(3), overlap(40), overlap(0)])
    assert "at most 40 of 400 test prompts (iteration 1)" in first
    assert second == "Gone: datasets/scored/26f1"


def test_test_rollouts_that_are_cut_off_are_told_above_5_percent() -> None:
    assert told(rollouts=[rollouts(11)])[0].startswith("5.5 % of the test rollouts of iteration 1 are cut off")


def test_a_run_that_did_not_end_or_was_made_with_changes_is_told() -> None:
    first, second, _ = told("failed", runs=[run("ab+")])
    assert "(failed)" in first
    assert second == "Made with changes that are in no commit: run run-1."


def test_a_run_that_advanced_as_asked_has_come_to_its_end() -> None:
    assert told("advanced") == ["Gone: datasets/scored/26f1"]


def test_a_run_that_halted_says_why_before_what_iterations_noted() -> None:
    noted = record(1, 0.5, 0.5).model_copy(update={"notices": ["Significantly worse."]})
    assert told("halted", error="see iteration 1", iterations=[noted])[:2] == [
        "The last run halted: see iteration 1",
        "iteration 1: Significantly worse.",
    ]


def test_the_summary_tells_the_gain_to_the_policy_that_stands() -> None:
    records = [record(0, 0.4, 0.5), record(1, 0.6, 0.7), record(2, 0.9, 0.9, promoted=False)]
    (gain,) = summary(records)
    assert gain == "From iteration 0 to iteration 1, the policy that stands now, in points: mean@1 +20.0, greedy +20.0."
    assert list(summary(records[:1])) == []
    assert list(summary([records[0], records[2]])) == [
        "No policy was found better than iteration 0, which still stands."
    ]


def test_a_gain_that_greedy_decoding_does_not_share_is_called_one_of_format() -> None:
    _, doubt = summary([record(0, 0.4, 0.5), record(1, 0.6, 0.59)])  # +20 points, and +9
    assert doubt.startswith("Greedy accuracy rose less than half as much")


def test_what_an_iteration_was_recorded_with_is_told_with_its_name() -> None:
    stands: Any = {"state": "finished", "run": "run-1", "started_at": "", "pid": 1}
    noted = record(2, 0.4, 0.5).model_copy(update={"notices": ["9 gold answers look wrong."]})
    empty: dict[str, list[Row]] = {"overlaps": [], "rollouts": [], "runs": []}
    told = list(notices(ExperimentState(**stands), [record(1, 0.4, 0.5), noted], empty, []))
    assert told == ["iteration 2: 9 gold answers look wrong."]
