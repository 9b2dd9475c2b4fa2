"""What a reader of a report should know before its figures are believed. One sentence each."""

from collections.abc import Iterator, Mapping, Sequence

from storage.experiments import ExperimentState, IterationRecord
from storage.report_rows import ReportedOverlap, ReportedRollouts, ReportedRun
from storage.rows import Row

TRUNCATED = 0.05  # share of test rollouts from which on it is said


def summary(iterations: Sequence[IterationRecord]) -> Iterator[str]:
    """What was gained from the base to the policy that stands, in points."""
    standing = [record for record in iterations if record.promoted]
    if len(iterations) < 2 or not standing:
        return
    first, last = standing[0], standing[-1]
    if first == last:
        yield f"No policy was found better than {first.label}, which still stands."
        return
    gains = _gains(first, last)
    told = ", ".join(f"{strategy} {100 * gain:+.1f}" for strategy, gain in gains.items())
    yield f"From {first.label} to {last.label}, the policy that stands now, in points: {told}."
    if gains.get("greedy", 1.0) < 0.5 * gains.get("mean@1", 0.0):
        yield (
            "Greedy accuracy rose less than half as much as that of a single sampled rollout: much of the gain is the "
            "format and a sharper distribution, not new problems solved."
        )


def notices(
    state: ExperimentState,
    iterations: Sequence[IterationRecord],
    tables: Mapping[str, Sequence[Row]],
    gaps: Sequence[str],
) -> Iterator[str]:
    """What may be wrong with the figures, the gravest first."""
    if state.state == "halted":
        yield f"The last run halted: {state.error}"
    elif state.state not in ("finished", "advanced", "running"):
        yield f"The last run did not come to its end ({state.state}); what is shown is what was done until then."
    yield from (f"{record.label}: {notice}" for record in iterations for notice in record.notices)
    overlaps = [row for row in tables["overlaps"] if isinstance(row, ReportedOverlap) and row.shared_prompts]
    if overlaps:
        worst = max(overlaps, key=lambda row: row.shared_prompts / row.held_out_prompts)
        yield (
            f"Held-out prompts share runs of {worst.run_words} words with rows that policies were trained on, at most "
            f"{worst.shared_prompts:,} of {worst.held_out_prompts:,} {worst.split} prompts ({worst.label}). Where that "
            "is more than common phrasing, figures may be too good; see Contamination."
        )
    for row in tables["rollouts"]:
        assert isinstance(row, ReportedRollouts)
        if row.role == "test" and row.truncated > TRUNCATED * row.rollouts:
            yield (
                f"{100 * row.truncated / row.rollouts:.1f} % of the test rollouts of {row.label} are cut off at "
                "max_completion_tokens and count as not correct; a higher limit may give other figures."
            )
    changed = [row.run for row in tables["runs"] if isinstance(row, ReportedRun) and (row.commit or "").endswith("+")]
    if changed:
        yield f"Made with changes that are in no commit: run {', '.join(changed)}."
    yield from gaps


def _gains(first: IterationRecord, last: IterationRecord) -> dict[str, float]:
    return {
        strategy: last.metrics[strategy]["value"] - first.metrics[strategy]["value"]
        for strategy in last.metrics
        if strategy in first.metrics
    }
