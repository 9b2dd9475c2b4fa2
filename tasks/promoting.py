"""Contenders -> the policy that stands, and the record of each iteration."""

import logging
from collections.abc import Iterable, Iterator

from storage.datasets import DatasetRef, read_rows
from storage.experiments import Experiment, IterationRecord
from storage.rows import BenchmarkMetric, GoldCheck, Metric, PassRate
from tasks import allotments, suspects
from tasks.evaluating import Contender, decide_promotion, decide_with_benchmarks, look_for_regression, metrics_of
from tasks.observing import publish_iteration
from tasks.overlapping import measure_overlap
from tasks.planning import current_plan
from tasks.promotion import Decision, Fall, Gate, Regression
from tasks.recording import Halted, current_iteration, current_run

log = logging.getLogger("ratchet")

# Counts that are rows left after a stage, in order; a step's other counts are rows dropped, by reason.
FUNNEL = (
    "sampled",
    "judged",
    "answered",
    "decided",
    "correct",
    "taken_for_right",
    "after_deduplication",
    "after_cap",
    "kept",
    "solve_rows",
    "judge_rows",
    "pairs",
    "swapped",
    "trained_on",
)
FUNNEL_STEPS = (
    "mix_chats",
    "select_demonstrations",
    "mix_tasks",
    "pair_rollouts",
    "pair_by_confidence",
    "pair_with_gold",
    "relabel_pairs",
    "train_sft",
    "train_preferences",
)
NO_STAGE = ("optimizer_steps",)
WITHOUT_GOLD = {"answered": "decided", "correct": "taken_for_right"}  # what a judge says is not what is so


def begin(experiment: Experiment, base: Contender, **measured: DatasetRef) -> None:
    """Record the base as iteration 0; it stands until something better does."""
    _record(experiment, "base", base, None, measured)


def promote(
    experiment: Experiment, label: str, challenger: Contender, incumbent: Contender, gate: Gate, **made_from: DatasetRef
) -> Contender:
    """Record an iteration and return the contender that stands after it.

    Raises:
        Halted: the challenger is significantly worse, and a person is to look first.
    """
    if gate.maximum_benchmark_drop is not None and challenger.benchmarks and challenger.floor:
        benchmarks = challenger.benchmarks, challenger.floor
        decision = decide_with_benchmarks(challenger.dev, incumbent.dev, *benchmarks, gate)
    else:
        decision = decide_promotion(challenger.dev, incumbent.dev, gate)
    fall = None
    if gate.regression is not None:
        fall = look_for_regression(challenger.dev, incumbent.dev, gate, gate.regression)
    record = _record(experiment, label, challenger, decision, made_from, fall)
    if record is not None and record.regression is not None and gate.regression is not None:
        _halt(experiment, record, gate.regression)
    return challenger if decision.promoted else incumbent


def _halt(experiment: Experiment, record: IterationRecord, regression: Regression) -> None:
    """End the run at a regression that nobody has let pass, if it is to end there."""
    assert record.regression is not None
    run = current_run()
    told = f"{experiment.name}, {record.label}: {record.regression['reason']}"
    if record.policy_identity in experiment.passed():
        log.info("%s It was let pass.", told)
    elif regression.stops == "every run" or (run is not None and run.advance):
        stays = "it stands" if record.promoted else "it is not used"
        runs = "run" if regression.stops == "every run" else "scheduled run"
        raise Halted(
            f"{told} The policy is kept; {stays}. Look at the report; then change what led there, or let it pass: "
            f"`ratchet run PRESET --go-on`. Until then every {runs} ends here."
        )
    else:
        log.warning("%s The run goes on: only schedules stop at it (gate.regression.stops).", told)


def _record(
    experiment: Experiment,
    label: str,
    contender: Contender,
    decision: Decision | None,
    made_from: dict[str, DatasetRef],
    fall: Fall | None = None,
) -> IterationRecord | None:
    if current_plan() is not None:
        return None
    number = current_iteration()
    assert number is not None  # flows record inside an iteration
    counts = _counts(experiment, number)
    if "scored" in made_from and made_from["scored"].step == "labelled":
        counts = {WITHOUT_GOLD.get(stage, stage): count for stage, count in counts.items()}
    references = {**made_from, "dev": contender.dev, "test": contender.test}
    steps = experiment.steps(run=experiment.state().run)
    if overlaps := measure_overlap(contender.policy, steps, contender.dev, contender.test):
        references["overlaps"] = overlaps
    benchmarks = (
        benchmark_figures(read_rows(made_from["benchmarks"], BenchmarkMetric)) if "benchmarks" in made_from else {}
    )
    record = IterationRecord(
        run=experiment.state().run,
        iteration=number,
        label=label,
        policy=contender.policy.model_dump(mode="json"),
        promoted=decision is None or decision.promoted,
        decision=None if decision is None else decision._asdict(),
        regression=fall._asdict() if fall is not None and fall.found else None,
        metrics=_figures(metrics_of(contender.test, "test", 0)) | benchmarks,
        dev_metrics=_figures(metrics_of(contender.dev, "dev", 0)),
        funnel={stage: counts[stage] for stage in FUNNEL if stage in counts},
        drops={reason: n for reason, n in counts.items() if reason not in (*FUNNEL, *NO_STAGE)},
        references={role: reference.model_dump() for role, reference in references.items()},
        notices=list(_notices(made_from, fall, number)),
    )
    experiment.add_iteration(record)
    publish_iteration(experiment.name, record)
    return record


def _notices(made_from: dict[str, DatasetRef], fall: Fall | None, number: int) -> Iterator[str]:
    if fall is not None and fall.found:
        yield fall.reason
    if "gold_checks" in made_from:
        yield suspects.told(list(read_rows(made_from["gold_checks"], GoldCheck)))
    if "pass_rates" in made_from:
        rates = [row for row in read_rows(made_from["pass_rates"], PassRate) if row.iteration == number]
        if (sentence := allotments.told(rates)) is not None:
            yield sentence


def benchmark_figures(rows: Iterable[BenchmarkMetric]) -> dict[str, dict[str, float | int]]:
    """The figures of whole benchmarks by name, for instance "ifeval prompt_level_strict_acc"."""
    figures: dict[str, dict[str, float | int]] = {}
    for row in rows:
        if row.task == row.benchmark:
            name = f"{row.benchmark} {row.metric}" + ("" if row.filter == "none" else f", {row.filter}")
            figures[name] = {"value": row.value, "low": row.low, "high": row.high, "n": row.n, "k": 1}
    if four := [figure for name, figure in figures.items() if name.startswith("ifeval ")]:
        # the four rise and fall together: the mean of their bounds is no narrower than the interval of their mean
        average = {part: sum(figure[part] for figure in four) / len(four) for part in ("value", "low", "high")}
        figures["ifeval average"] = {**average, "n": four[0]["n"], "k": 1}
    return figures


def _counts(experiment: Experiment, number: int) -> dict[str, int]:
    steps = experiment.steps(run=experiment.state().run)
    counts: dict[str, int] = {}
    for record in steps:
        if record.iteration != number or record.split is not None or record.state != "completed":
            continue
        if record.step in FUNNEL_STEPS:
            counts |= record.counts
        elif record.step == "gather_judged":  # those not judged are dropped, and counted, where rewards are given
            counts["judged"] = record.counts.get("judged", 0)
    return counts


def _figures(metrics: list[Metric]) -> dict[str, dict[str, float | int]]:
    return {m.strategy: {"value": m.value, "low": m.low, "high": m.high, "n": m.n, "k": m.k} for m in metrics}
