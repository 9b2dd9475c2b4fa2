"""Confidences beside gold answers -> calibration, and the strategies that a judge takes part in."""

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby

from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import Calibration, EvaluatedPrompt, JudgedRollout, ScoredRollout
from tasks import calibrations, filters
from tasks.caching import log_counts, step
from tasks.calibrations import JudgeGate
from tasks.judging import JudgeError

log = logging.getLogger("ratchet")

Row = tuple[ScoredRollout, JudgedRollout]


@step(version="2")
def calibrate(scored: tuple[DatasetRef, ...], judged: tuple[DatasetRef, ...], writers: tuple[str, ...]) -> DatasetRef:
    """How far the judge can be trusted, on the rollouts of each of these writers.

    Raises:
        JudgeError: nothing is known of any of them.
    """
    rows: list[Calibration] = []
    for score, verdict, writer in zip(scored, judged, writers, strict=True):
        known = calibrations.verdicts(_joined(score, verdict))
        judge = next(iter(read_rows(verdict, JudgedRollout))).judge
        log_counts({f"decided by both, {writer}": len(known)})
        rows += calibrations.calibration(known, judge, writer)
    if not rows:
        raise JudgeError(
            f"the judge cannot be measured: not one of {sum(ref.rows for ref in scored):,} rollouts of the dev split "
            f"was decided both by its gold answer and by the judge; see {scored[0].name} and {judged[0].name} for the "
            "reasons, and correct the marker, the template or judge.text"
        )
    return write_rows(rows, Calibration, step="calibration", parents=[*scored, *judged])


@step(version="1", assumed=True)
def check_judge(calibration: DatasetRef, gate: JudgeGate) -> bool:
    """Whether the judge may label without gold answers.

    Raises:
        JudgeError: it may not, and the preset does not say to go on anyway.
    """
    fault = calibrations.judge_faults(read_rows(calibration, Calibration), gate)
    if fault is None:
        return True
    if gate.go_on_anyway:
        log.warning("the judge labels all the same, as label_free.gate.go_on_anyway says: %s", fault)
        return False
    raise JudgeError(
        f"the judge may not label rollouts without gold answers: {fault}. Train it longer or on more judge rows "
        "(mixture, sft), draw more dev rollouts, or set label_free.gate.go_on_anyway: true. The stages with gold "
        "answers are done and recorded."
    )


@step(version="1", assumed=0.5)
def choose_filter(scored: DatasetRef, judged: DatasetRef) -> float:
    """The confidence above which rollouts are best let vote, chosen on the dev split."""
    chosen = filters.choose_filter(list(_by_prompt(scored, judged)))
    log_counts({"filter above, %": round(100 * chosen)})
    return chosen


@step(version="1")
def evaluate_judgements(
    evaluated: DatasetRef, scored: DatasetRef, judged: DatasetRef, k: int, filter_above: float
) -> DatasetRef:
    """The evaluated prompts, and after them those of the two strategies that need a judge."""

    def rows() -> Iterator[EvaluatedPrompt]:
        yield from read_rows(evaluated, EvaluatedPrompt)
        for group in _by_prompt(scored, judged):
            yield from filters.evaluate_judged(group, k, filter_above)

    log_counts({})
    return write_rows(rows(), EvaluatedPrompt, step="evaluated", parents=[evaluated, scored, judged])


def _joined(scored: DatasetRef, judged: DatasetRef) -> Iterator[Row]:
    return filters.join(read_rows(scored, ScoredRollout), read_rows(judged, JudgedRollout))


def _by_prompt(scored: DatasetRef, judged: DatasetRef) -> Iterator[Sequence[Row]]:
    for _, rows in groupby(_joined(scored, judged), key=lambda row: row[0].prompt_id):
        yield list(rows)
