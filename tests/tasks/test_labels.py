"""What is taken for right or wrong without gold answers."""

import pytest
from pydantic import ValidationError

from storage.rows import JudgedRollout, ScoredRollout
from tasks.labels import LabelFree, label_by_confidence, pair_by_confidence
from tests.tasks.builders import both, judged


def labels(rows: list[JudgedRollout], **settings: object) -> dict[int, tuple[float | None, str]]:
    """rollout_index -> (reward, reason)."""
    told = label_by_confidence(rows, LabelFree.model_validate(settings))
    return {row.rollout_index: (row.reward, row.reason) for row in told}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        pytest.param({"positive_threshold": 1.2}, "less than or equal to 1", id="above 1"),
        pytest.param({"negative_threshold": -0.1}, "greater than or equal to 0", id="below 0"),
        pytest.param({"negative_threshold": 0.75}, "could be right and wrong", id="not apart"),
        pytest.param({"minimum_votes": 0}, "greater than or equal to 1", id="no votes"),
    ],
)
def test_thresholds_out_of_range_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        LabelFree.model_validate(settings)
    assert told in str(caught.value)


def test_majority_takes_the_answer_with_enough_votes_and_all_others_for_wrong() -> None:
    rows = [judged(0, "7", 0.1), judged(1, "7.0", None), judged(2, "8", 0.9), judged(3, None, 0.9)]
    told = labels(rows, mode="majority", minimum_votes=2)
    assert told == {0: (1.0, "majority"), 1: (1.0, "majority"), 2: (0.0, "minority"), 3: (None, "no final answer")}
    assert {reward for reward, _ in labels(rows, mode="majority", minimum_votes=3).values()} == {None}


def test_top_takes_the_ends_if_they_are_sure_and_of_different_answers() -> None:
    rows = [judged(0, "7", 0.9), judged(1, "7", 0.1), judged(2, "8", 0.3), judged(3, "8", 0.35)]
    told = labels(rows, mode="top")
    # 1 is the least confident of all, but it gives the answer of the best (METHODS 3.6.5)
    assert told[0] == (1.0, "most confident")
    assert told[2] == (0.0, "least confident")
    assert told[1] == told[3] == (None, "between the ends")
    # at 0.3 the least confident of another answer is not sure to be wrong
    assert labels(rows, mode="top", negative_threshold=0.2)[2][0] is None
    # not above 0.9
    assert {reward for reward, _ in labels(rows, mode="top", positive_threshold=0.9).values()} == {None}


def test_classifier_lets_the_confident_vote_and_takes_the_outvoted_for_wrong() -> None:
    rows = [judged(0, "7", 0.8), judged(1, "7", 0.6), judged(2, "8", 0.7), judged(3, "8", 0.5), judged(4, "8", 0.1)]
    told = labels(rows, minimum_votes=2)
    assert told == {
        0: (1.0, "confident majority"),
        1: (1.0, "confident majority"),
        2: (0.0, "outvoted"),
        3: (None, "filtered out"),  # 0.5 is not above 0.5
        4: (None, "filtered out"),
    }


def test_where_all_confident_agree_the_least_confident_of_another_answer_is_wrong() -> None:
    rows = [judged(0, "7", 0.8), judged(1, "7", 0.6), judged(2, "7", 0.05), judged(3, "8", 0.1), judged(4, "9", 0.3)]
    told = labels(rows, minimum_votes=2)
    # 2 is less confident, but gives the majority's answer (METHODS 3.6.4)
    assert told[3] == (0.0, "least confident")
    assert told[2] == told[4] == (None, "filtered out")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        pytest.param([judged(0, "7", 0.7), judged(1, "7", 0.7)], "no confident rollout", id="best below the threshold"),
        pytest.param([judged(0, "7", 0.8), judged(1, "8", 0.7)], "no majority", id="one vote each"),
        pytest.param([judged(0, "7", None), judged(1, "7", None)], "no confident rollout", id="never judged"),
        pytest.param([judged(0, "a dozen", 0.9), judged(1, "two or so", 0.9)], "unreadable answer", id="unreadable"),
        pytest.param(
            [judged(0, "7", 0.9, finish_reason="length"), judged(1, "7", 0.9, finish_reason="length")],
            "truncated",
            id="truncated",
        ),
    ],
)
def test_a_prompt_that_is_not_decided_gives_no_rows(rows: list[JudgedRollout], reason: str) -> None:
    assert set(labels(rows, minimum_votes=2).values()) == {(None, reason)}


def test_labels_do_not_depend_on_the_order_of_the_rows() -> None:
    rows = [judged(0, "7", 0.8), judged(1, "8", 0.8), judged(2, "7", 0.1), judged(3, "8", 0.1)]
    for mode in ("majority", "top", "classifier"):
        assert labels(rows, mode=mode, minimum_votes=1) == labels(rows[::-1], mode=mode, minimum_votes=1)


def test_a_pair_is_the_most_confident_right_and_the_least_confident_wrong() -> None:
    rows = [both("7", 1.0, 0.9, 0), both("7", 1.0, 0.95, 1), both("8", 0.0, 0.3, 2), both("9", 0.0, 0.1, 3)]
    pair, reason = pair_by_confidence(rows, 0.1, 5)
    assert pair is not None
    assert (pair.chosen_index, pair.rejected_index, reason) == (1, 3, "paired")
    assert pair.margin == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        pytest.param([both("7", 1.0, 0.9, 0)], "unpaired: right only", id="right only"),
        pytest.param([both("7", 0.0, 0.1, 0)], "unpaired: wrong only", id="wrong only"),
        pytest.param([both("7", None, 0.1, 0)], "unpaired: neither", id="neither"),
        pytest.param([both("7", 1.0, 0.6, 0), both("8", 0.0, 0.55, 1)], "pair below minimum_margin", id="close"),
        pytest.param(
            [both("7", 1.0, 0.2, 0), both("8", 0.0, 0.9, 1)], "pair below minimum_margin", id="wrong way round"
        ),
    ],
)
def test_leftovers_without_a_pair_have_a_reason(rows: list[tuple[ScoredRollout, JudgedRollout]], reason: str) -> None:
    assert pair_by_confidence(rows, 0.1, 5) == (None, reason)
