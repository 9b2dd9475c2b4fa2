"""Why a rollout was not learnt from."""

import random
from collections import Counter

import pytest

from storage.rows import ScoredRollout
from tasks.omissions import (
    NOT_SCORED,
    OTHER_RULES,
    why_not_a_judge_row,
    why_not_paired,
    why_not_paired_by_confidence,
    why_not_selected,
)
from tasks.pairs import Pairing, pair_rollouts
from tasks.selection import Selection, select_demonstrations
from tests.tasks.builders import both, scored


def rollouts(seed: int) -> list[ScoredRollout]:
    """Eight rollouts of one prompt, of all kinds."""
    draw = random.Random(seed)
    return [
        scored(
            index,
            draw.choice([1.0, 1.0, 0.0, None]),
            completion=draw.choice(["one", "two", "three", "four", " "]),
            finish_reason=draw.choice(["stop", "stop", "stop", "length"]),
        )
        for index in range(8)
    ]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("settings", [Selection(max_per_prompt=1), Selection(keep="all"), Selection(deduplicate=False)])
def test_the_reasons_of_one_prompt_are_those_that_selection_counts(seed: int, settings: Selection) -> None:
    rows = rollouts(seed)
    selected = select_demonstrations(rows, settings, 1)
    kept = {row.rollout_index for row in selected.demonstrations}
    reasons = [
        why_not_selected(row.rollout_index, rows, settings.key(), None) for row in rows if row.rollout_index not in kept
    ]
    assert Counter("duplicate" if "duplicate" in reason else reason for reason in reasons) == selected.drops


def test_a_duplicate_names_its_twin() -> None:
    rows = [scored(0, completion="a"), scored(1, completion="b"), scored(2, completion="b ")]
    assert why_not_selected(2, rows, Selection().key(), None) == "duplicate of rollout 1"


def test_a_row_over_one_of_two_limits_names_both() -> None:
    settings = Selection(max_per_prompt=4, target_rows=1)
    assert why_not_selected(1, [scored(0), scored(1)], settings.key(), None) == "over max_per_prompt or target_rows"


@pytest.mark.parametrize("seed", range(20))
def test_no_unpaired_rollout_is_without_a_reason(seed: int) -> None:
    rows, settings = rollouts(seed), Pairing(max_per_prompt=1)
    pairs = pair_rollouts(rows, settings, 1).pairs
    used = {index for pair in pairs for index in (pair.chosen_index, pair.rejected_index)}
    for row in rows:
        if row.rollout_index not in used:
            assert why_not_paired(row.rollout_index, rows, settings.key()) != OTHER_RULES


@pytest.mark.parametrize(
    ("index", "reason"),
    [(0, "over max_per_prompt"), (3, "undecided: no final answer"), (4, "truncated"), (9, "it was not among")],
)
def test_a_rollout_that_is_in_no_pair_has_the_reason_of_its_own(index: int, reason: str) -> None:
    rows = [*(scored(i, 0.0) for i in range(2)), scored(2), scored(3, None), scored(4, finish_reason="length")]
    pairing = Pairing(max_per_prompt=1, seed=next(s for s in range(99) if _rejected(rows, s) == 1))
    assert why_not_paired(index, rows, pairing.key()).startswith(reason)


def test_a_rollout_left_over_by_max_loop_is_told() -> None:
    rows = [scored(0), scored(1), scored(2, 0.0)]
    paired = pair_rollouts(rows, Pairing(max_loop=1), 1).pairs  # 2 right and 1 wrong, once round: 1 pair
    left = next(index for index in (0, 1) if index != paired[0].chosen_index)
    assert why_not_paired(left, rows, Pairing(max_loop=1).key()) == "over max_per_prompt or max_loop"


def test_a_prompt_without_the_other_side_is_told() -> None:
    assert why_not_paired(0, [scored(0), scored(1)], Pairing().key()) == "prompt without a rejected"


def test_a_rollout_that_teaches_no_judging_has_a_reason() -> None:
    rows = [scored(0), scored(1, None), scored(2, 0.0)]
    assert why_not_a_judge_row(1, rows) == "no judge row: undecided, no final answer"
    assert why_not_a_judge_row(2, rows).startswith("no judge row: over the balance of right and wrong")
    assert why_not_a_judge_row(9, rows) == NOT_SCORED


@pytest.mark.parametrize(
    ("index", "minimum_margin", "reason"),
    [
        pytest.param(1, 0.1, "between the most and the least confident", id="between"),
        pytest.param(1, 0.9, "pair below minimum_margin", id="margin"),
        pytest.param(3, 0.1, "undecided: no final answer", id="undecided"),
        pytest.param(9, 0.1, NOT_SCORED, id="not there"),
    ],
)
def test_a_rollout_outside_of_the_pair_by_confidence_has_a_reason(
    index: int, minimum_margin: float, reason: str
) -> None:
    both_sides = [both("7", 1.0, 0.9, 0), both("7", 1.0, 0.8, 1), both("8", 0.0, 0.2, 2), both(None, None, 0.5, 3)]
    scores, verdicts = [score for score, _ in both_sides], [verdict for _, verdict in both_sides]
    settings = {"rule": "confidence", "minimum_margin": minimum_margin}
    assert why_not_paired_by_confidence(index, scores, verdicts, settings) == reason


def test_settings_of_another_version_still_tell_what_the_row_alone_tells() -> None:
    rows = [scored(0), scored(1, 0.0)]
    assert why_not_selected(1, rows, {"cap": 1}, None) == "mismatch"
    assert why_not_selected(0, rows, {"cap": 1}, None) == OTHER_RULES


def _rejected(rows: list[ScoredRollout], seed: int) -> int | None:
    return pair_rollouts(rows, Pairing(max_per_prompt=1, seed=seed), 1).pairs[0].rejected_index
