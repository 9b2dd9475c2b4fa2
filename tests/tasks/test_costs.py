"""Seconds and tokens, from the records of steps."""

from typing import Any

from storage.experiments import StepRecord
from tasks.caching import STEPS
from tasks.costs import ON_THE_ENGINE, SAMPLING, calls, cost_rows, spending


def record(step: str = "train_sft", seconds: float = 10.0, **more: Any) -> StepRecord:
    told: dict[str, Any] = {
        "run": "run-1",
        "iteration": 1,
        "shard": None,
        "state": "completed",
        "cached": False,
        "rows": 3,
        "digest": None,
        "key": "k",
        "counts": {},
        "detail": "",
        "at": "2026-01-01T00:00:00+00:00",
    }
    return StepRecord(step=step, seconds=seconds, **(told | more))


def test_a_sampling_counts_once_and_its_shards_do_not() -> None:
    records = [
        record(SAMPLING, 4.0, shard=0),
        record(SAMPLING, 5.0, shard=1),
        record(SAMPLING, 5.5, counts={"tokens": 900, "reused": 7, "drawn": 3}),
    ]
    assert [one.seconds for one in calls(records)] == [5.5]
    (row,) = cost_rows(spending(calls(records), lambda one: one.step, lambda _: 0.0, {"run-1": 2}))
    assert (row.calls, row.tokens, row.reused_rollouts, row.engine_seconds, row.accelerator_seconds) == (
        1, 900, 7, 5.5, 11.0,
    )  # fmt: skip


def test_a_sampling_that_failed_costs_its_longest_failed_shard() -> None:
    failed = [record(SAMPLING, seconds, shard=n, state="failed") for n, seconds in enumerate([3.0, 8.0, 1.0])]
    assert [(one.seconds, one.state) for one in calls(failed)] == [(8.0, "failed")]
    assert [one.seconds for one in calls([*failed, record(SAMPLING, 9.0)])] == [9.0]  # retried, and done
    again = [*failed, record(SAMPLING, 2.0, run="run-2")]
    assert [one.seconds for one in calls(again)] == [2.0, 8.0]  # another run does not undo what the first one cost


def test_what_the_cache_saved_is_what_the_step_took_when_it_was_done() -> None:
    records = [record(seconds=10.0), record(seconds=0.0, cached=True, run="run-2"), record("score_answers", 1.0)]
    took = {"train_sft": 10.0, "score_answers": 1.0}
    by_step = spending(records, lambda one: one.step, lambda one: took[one.step], {"run-1": 1, "run-2": 1})
    training, scoring = cost_rows(by_step)
    assert (training.calls, training.cached, training.seconds, training.saved_seconds) == (2, 1, 10.0, 10.0)
    assert (training.engine_seconds, training.accelerator_seconds) == (10.0, 10.0)
    assert (scoring.saved_seconds, scoring.engine_seconds, scoring.accelerator_seconds) == (0.0, 0.0, 0.0)


def test_accelerator_seconds_are_unknown_where_the_machine_of_a_paid_run_is() -> None:
    records = [record(seconds=10.0), record(seconds=5.0, run="old")]
    (row,) = cost_rows(spending(records, lambda one: one.step, lambda _: 0.0, {"run-1": 1}))
    assert (row.engine_seconds, row.accelerator_seconds) == (15.0, None)
    unpaid = [record(seconds=10.0), record(seconds=0.0, run="old", cached=True)]
    (row,) = cost_rows(spending(unpaid, lambda one: one.step, lambda _: 0.0, {"run-1": 1}))
    assert row.accelerator_seconds == 10.0


def test_runs_are_told_apart_and_failures_are_paid() -> None:
    records = [record(seconds=10.0, state="failed"), record(seconds=4.0, run="run-2")]
    by_run = spending(records, lambda one: one.run, lambda _: 0.0, {"run-1": 0, "run-2": 0})
    assert {run: (spent.failed, spent.seconds) for run, spent in by_run.items()} == {
        "run-1": (1, 10.0),
        "run-2": (0, 4.0),
    }


def test_steps_on_the_engine_are_steps_that_there_are() -> None:
    import tasks.benchmarking
    import tasks.comparing
    import tasks.judging
    import tasks.training
    import tasks.viewing  # noqa: F401

    assert ON_THE_ENGINE - {SAMPLING} <= set(STEPS)
