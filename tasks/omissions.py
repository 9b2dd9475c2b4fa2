"""Why a rollout was not learnt from: the rules of selection and of pairing, asked again about one prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from storage.rows import JudgedRollout, ScoredRollout
from tasks.filters import join
from tasks.labels import pair_by_confidence
from tasks.pairs import Paired, Pairing, pair_rollouts
from tasks.selection import Selected, Selection, same_text, select_demonstrations

NOT_SCORED = "it was not among the scored rollouts"
OTHER_RULES = "not known: it was left out by other rules than this version's"
_NO_CAP = 10**6
_OF_PAIRS = ("between best and worst", "pair of one text", "pair below minimum_margin")


def why_not_selected(
    index: int, scored: Sequence[ScoredRollout], settings: Mapping[str, Any], marker: str | None
) -> str:
    """Why a rollout is none of the demonstrations made of its prompt's scored rollouts.

    Args:
        settings: what the demonstrations were selected with, as their manifest says.
        marker: what the final answer stands after; None: completions have none.
    """
    own = next((row for row in scored if row.rollout_index == index), None)
    if own is None:
        return NOT_SCORED
    try:
        uncapped = Selection.model_validate({**settings, "max_per_prompt": None, "target_rows": None})
    except ValidationError:  # of a version with other settings
        return next(iter(select_demonstrations([own], Selection(), 0, marker).drops), OTHER_RULES)

    def selected(*rows: ScoredRollout) -> Selected:
        return select_demonstrations(rows, uncapped, 0, marker)

    if reasons := list(selected(own).drops):
        return reasons[0]
    kept = {row.rollout_index for row in selected(*scored).demonstrations}
    if index in kept:
        limits = [name for name in ("max_per_prompt", "target_rows") if settings.get(name) is not None]
        return f"over {' or '.join(limits)}" if limits else OTHER_RULES
    others = [row for row in scored if row.rollout_index in kept]
    twins = [row.rollout_index for row in others if len(selected(own, row).demonstrations) == 1]
    return f"duplicate of rollout {twins[0]}" if twins else OTHER_RULES


def why_not_paired(index: int, scored: Sequence[ScoredRollout], settings: Mapping[str, Any]) -> str:
    """Why a rollout is on no side of the pairs made of its prompt's scored rollouts.

    Args:
        settings: what the pairs were made with, as their manifest says.
    """
    own = next((row for row in scored if row.rollout_index == index), None)
    if own is None:
        return NOT_SCORED
    try:
        uncapped = Pairing.model_validate({**settings, "max_per_prompt": _NO_CAP, "max_loop": None})
    except ValidationError:  # of a version with other settings
        return f"undecided: {own.reason}" if own.reward is None else OTHER_RULES
    alone = [reason for reason in pair_rollouts([own], uncapped, 0).drops if not reason.startswith("prompt without")]
    if alone:
        return alone[0]
    together = pair_rollouts(scored, uncapped, 0)
    if missing := [reason for reason in together.drops if reason.startswith("prompt without")]:
        return missing[0]
    used = _sides(together)
    if index in used:
        return "over max_per_prompt" + (" or max_loop" if settings.get("max_loop") is not None else "")
    twins = [
        row.rollout_index
        for row in scored
        if row.rollout_index in used
        and row.reward == own.reward
        and same_text(row.completion) == same_text(own.completion)
    ]
    if twins:
        return f"duplicate of rollout {twins[0]}"
    return next((reason for reason in _OF_PAIRS if reason in together.drops), OTHER_RULES)


def why_not_a_judge_row(index: int, scored: Sequence[ScoredRollout]) -> str:
    """Why judging is not taught by a rollout, of a prompt's scored ones."""
    own = next((row for row in scored if row.rollout_index == index), None)
    if own is None:
        return NOT_SCORED
    if own.reward is None or own.finish_reason != "stop":
        return f"no judge row: undecided, {own.reason}"
    return "no judge row: over the balance of right and wrong, or over mixture's limits"


def why_not_paired_by_confidence(
    index: int, scored: Sequence[ScoredRollout], judged: Sequence[JudgedRollout], settings: Mapping[str, Any]
) -> str:
    """Why a rollout is on no side of the pair made of its prompt's most and least confident rollouts.

    Args:
        scored: what was taken for right and wrong, in the order of `judged`.
        settings: what the pair was made with, as its manifest says.
    """
    own = next((score for score in scored if score.rollout_index == index), None)
    if own is None:
        return NOT_SCORED
    if own.reward is None:
        return f"undecided: {own.reason}"
    pair, reason = pair_by_confidence(list(join(scored, judged)), float(settings.get("minimum_margin", 0.0)), 0)
    return reason if pair is None else "between the most and the least confident"


def _sides(paired: Paired) -> set[int | None]:
    return {index for pair in paired.pairs for index in (pair.chosen_index, pair.rejected_index)}
