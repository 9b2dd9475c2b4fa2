"""Votes that a judge filters."""

import pytest

from tasks.filters import choose_filter, evaluate_judged, join
from tests.tasks.builders import both, judged, scored


def test_the_filter_lets_only_confident_rollouts_vote() -> None:
    rows = [both("8", 0.0, 0.2, 0), both("8", 0.0, 0.5, 1), both("7", 1.0, 0.6, 2), both("9", 0.0, 0.9, 3)]
    filtered, highest = evaluate_judged(rows, 4, 0.5)
    # 7 and 9 have a vote each, and 7 was seen first; 9 is the most confident
    assert (filtered.strategy, filtered.value, filtered.answer) == ("maj@4 with filter", 1.0, "7")
    assert (highest.strategy, highest.value, highest.answer) == ("highest confidence of 4", 0.0, "9")


def test_where_the_filter_keeps_nobody_the_most_confident_answers() -> None:
    rows = [both("8", 0.0, 0.2, 0), both("8", 0.0, 0.1, 1), both("7", 1.0, 0.4, 2)]
    assert [row.answer for row in evaluate_judged(rows, 3, 0.5)] == ["7", "7"]


def test_the_filter_is_chosen_by_what_votes_best_and_lets_all_vote_where_that_is_as_good() -> None:
    misled = [both("8", 0.0, 0.25, 0), both("8", 0.0, 0.15, 1), both("7", 1.0, 0.6, 2)]
    # above 0.1 two vote for 8; above 0.2 one each, and 8 was seen first; above 0.3 only 7 is left
    assert choose_filter([misled]) == 0.3
    right = [both("7", 1.0, 0.1, 0), both("7", 1.0, 0.2, 1), both("8", 0.0, 0.9, 2)]
    assert choose_filter([right]) == 0.0


def test_a_rollout_without_answer_neither_votes_nor_answers_and_one_not_judged_comes_last() -> None:
    rows = [both(None, None, 0.99, 0), both("7", 1.0, None, 1)]
    filtered, highest = evaluate_judged(rows, 2, 0.5)
    assert (filtered.value, highest.value, filtered.undecided) == (1.0, 1.0, 1)
    nobody = evaluate_judged([both(None, None, 0.99, 0)], 1, 0.5)
    assert [(row.value, row.answer) for row in nobody] == [(0.0, None), (0.0, None)]
    with pytest.raises(ValueError, match="need 3 rollouts of one prompt, found 2"):
        evaluate_judged(rows, 3, 0.5)


def test_rollouts_are_joined_by_key() -> None:
    assert len(list(join([scored(0)], [judged(0, "7", 0.5)]))) == 1
    with pytest.raises(ValueError, match="judge and score the same rollouts"):
        list(join([scored(0)], [judged(1, "7", 0.5)]))
