"""What is taken for right or wrong without a gold answer: by vote, by confidence, or by both (METHODS 3.4).

Without the faults of seed 0 (METHODS 3.6.4 to 3.6.6): every `wrong` has another answer than the right ones.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from operator import itemgetter
from typing import Literal

from pydantic import Field, model_validator

from models.specs import Settings
from storage.rows import JudgedRollout, Pair, ScoredRollout, derive
from tasks.answers import answer_group
from tasks.judgements import sureness
from tasks.pairs import pair_of


class LabelFree(Settings):
    """Which rollouts are taken for right and wrong without a gold answer (METHODS 3.4).

    majority: the answer with enough votes is right, all others wrong. top: the most confident rollout is right, the
    least confident of another answer wrong. classifier: confident rollouts vote; right is what wins, wrong what they
    are outvoted by or, where all agree, the least confident of another answer.
    """

    mode: Literal["majority", "top", "classifier"] = "classifier"
    minimum_votes: int = Field(default=6, ge=1)
    positive_threshold: float = Field(default=0.75, ge=0, le=1)  # the best of a prompt is at least so confident
    negative_threshold: float = Field(default=0.4, ge=0, le=1)  # the least confident at most (seed 0: never applied)
    filter_above: float = Field(default=0.5, ge=0, le=1)  # classifier: only those above vote

    @model_validator(mode="after")
    def _thresholds_are_apart(self) -> "LabelFree":
        if self.negative_threshold >= self.positive_threshold:
            raise ValueError(
                f"negative_threshold is {self.negative_threshold} and positive_threshold {self.positive_threshold}, so "
                "one rollout could be right and wrong; lower the first or raise the second"
            )
        return self


def label_by_confidence(rows: Sequence[JudgedRollout], settings: LabelFree) -> list[ScoredRollout]:
    """One prompt's rollouts with a reward the judge and the vote give: 1 right, 0 wrong, None neither, with a reason.

    Truncated rollouts and those without a readable answer are neither. Every `wrong` has another answer than the right
    ones (METHODS 3.6.4 and 3.6.5). Rewards are by index, so the order of the rows does not matter.
    """
    ordered = sorted(rows, key=lambda row: row.rollout_index)
    usable = [row for row in ordered if row.finish_reason == "stop" and answer_group(row.answer) is not None]
    rules = {"majority": _by_majority, "top": _by_top, "classifier": _by_classifier}
    told = rules[settings.mode](usable, settings) if usable else {}
    return [_labelled(row, *told.get(row.rollout_index, _neither(row)), settings.mode) for row in ordered]


def pair_by_confidence(
    rows: Sequence[tuple[ScoredRollout, JudgedRollout]], minimum_margin: float, iteration: int
) -> tuple[Pair | None, str]:
    """One prompt's most confident right rollout against the least confident wrong one, or None and why.

    Args:
        rows: as `label_by_confidence` took them for right and wrong, so the two have different answers.
    """
    sides = [
        [
            (verdict.confidence, score)
            for score, verdict in rows
            if score.reward == reward and verdict.confidence is not None
        ]
        for reward in (1.0, 0.0)
    ]
    if not all(sides):
        return None, "unpaired: " + ("neither" if not any(sides) else "right only" if sides[0] else "wrong only")
    (high, chosen), (low, rejected) = max(sides[0], key=itemgetter(0)), min(sides[1], key=itemgetter(0))
    if high - low < minimum_margin:
        return None, "pair below minimum_margin"
    return pair_of(chosen, rejected, (high, low), "confidence", iteration), "paired"


def _by_majority(rows: Sequence[JudgedRollout], settings: LabelFree) -> dict[int, tuple[float | None, str]]:
    winner, votes = _vote(rows)
    if votes < settings.minimum_votes:
        return {row.rollout_index: (None, "no majority") for row in rows}
    return {row.rollout_index: (1.0, "majority") if _group(row) == winner else (0.0, "minority") for row in rows}


def _by_top(rows: Sequence[JudgedRollout], settings: LabelFree) -> dict[int, tuple[float | None, str]]:
    judged = [row for row in rows if row.confidence is not None]
    if not judged or sureness(best := max(judged, key=sureness)) <= settings.positive_threshold:
        return {row.rollout_index: (None, "no confident rollout") for row in rows}
    told: dict[int, tuple[float | None, str]] = {row.rollout_index: (None, "between the ends") for row in rows}
    told[best.rollout_index] = (1.0, "most confident")
    return told | _least_confident(judged, _group(best), settings)


def _by_classifier(rows: Sequence[JudgedRollout], settings: LabelFree) -> dict[int, tuple[float | None, str]]:
    kept = [row for row in rows if sureness(row) > settings.filter_above]
    if not kept or max(map(sureness, kept)) < settings.positive_threshold:
        return {row.rollout_index: (None, "no confident rollout") for row in rows}
    winner, votes = _vote(kept)
    if votes < settings.minimum_votes:
        return {row.rollout_index: (None, "no majority") for row in rows}
    told: dict[int, tuple[float | None, str]] = {row.rollout_index: (None, "filtered out") for row in rows}
    for row in kept:
        told[row.rollout_index] = (1.0, "confident majority") if _group(row) == winner else (0.0, "outvoted")
    if all(_group(row) == winner for row in kept):
        told |= _least_confident([row for row in rows if row.confidence is not None], winner, settings)
    return told


def _least_confident(
    rows: Sequence[JudgedRollout], winner: Hashable, settings: LabelFree
) -> dict[int, tuple[float | None, str]]:
    others = [row for row in rows if _group(row) != winner]
    if not others or sureness(least := min(others, key=sureness)) > settings.negative_threshold:
        return {}
    return {least.rollout_index: (0.0, "least confident")}


def _vote(rows: Sequence[JudgedRollout]) -> tuple[Hashable, int]:
    return Counter(_group(row) for row in rows).most_common(1)[0]


def _group(row: JudgedRollout) -> Hashable:
    return answer_group(row.answer)


def _neither(row: JudgedRollout) -> tuple[None, str]:
    if row.finish_reason != "stop":
        return None, "truncated" if row.finish_reason == "length" else row.reason
    return None, "no final answer" if row.answer is None else "unreadable answer"


def _labelled(row: JudgedRollout, reward: float | None, reason: str, mode: str) -> ScoredRollout:
    return derive(ScoredRollout, row, reward=reward, reason=reason, scorer=f"self_confidence_{mode}@1")
