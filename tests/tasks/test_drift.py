"""What is counted of rollouts, and which prompts changed most."""

from collections import Counter

import pytest

from tasks.drift import Change, RolloutTally, Solved, mean_length, most_changed, quantile


def counted() -> RolloutTally:
    """Prompt a: right, right with the same text, undecided and cut. Prompt b: wrong, with a text that a has too."""
    tally = RolloutTally()
    tally.add(
        ["a", "a"], ["four", "four "], [3, 5], ["stop", "stop"], ([1.0, 1.0], ["match", "match"])
    )  # batches end anywhere, also within a prompt
    tally.add(["a", "b"], ["fo", "four"], [9, 3], ["length", "stop"], ([None, 0.0], ["truncated", "mismatch"]))
    return tally


def test_rollouts_are_counted_by_what_became_of_them() -> None:
    tally = counted()
    assert (tally.rollouts, tally.correct, tally.undecided, tally.truncated) == (4, 2, 1, 1)
    assert tally.reasons == {("match", True): 2, ("mismatch", True): 1, ("truncated", False): 1}
    assert tally.prompts == {Solved(3, 2): 1, Solved(1, 0): 1}


def test_a_duplicate_is_a_text_of_the_same_prompt_and_white_space_at_its_ends_is_no_difference() -> None:
    assert counted().duplicates == 1  # the second of a; b's text is the first of its own prompt


def test_unscored_rollouts_have_lengths_and_no_verdicts() -> None:
    tally = RolloutTally()
    tally.add(["a", "a"], ["x", "y"], [1, 2], ["stop", "length"], None)
    assert (tally.rollouts, tally.truncated, tally.reasons, tally.undecided) == (2, 1, Counter(), 0)
    assert RolloutTally().prompts == {}


def test_lengths_are_summed_up_exactly() -> None:
    lengths = Counter({1: 4, 2: 4, 10: 2})  # 1 1 1 1 2 2 2 2 10 10
    assert mean_length(lengths) == 3.2  # (4 + 8 + 20) / 10
    assert [quantile(lengths, share) for share in (0.1, 0.4, 0.5, 0.8, 0.9, 1.0)] == [1, 1, 2, 2, 10, 10]
    with pytest.raises(ValueError, match="no rollouts were counted"):
        quantile(Counter(), 0.5)


def test_the_largest_changes_come_first_and_prompts_of_one_side_only_are_left_out() -> None:
    before = {
        "a": Solved(4, 0),
        "b": Solved(4, 4),
        "c": Solved(4, 2),
        "d": Solved(4, 1),
        "e": Solved(4, 0),
        "f": Solved(4, 1),
    }
    after = {
        "a": Solved(2, 2),
        "b": Solved(2, 1),
        "c": Solved(2, 1),
        "d": Solved(2, 0),
        "f": Solved(2, 1),
        "g": Solved(2, 2),
    }
    improved, worsened = most_changed(before, after, 5)
    assert improved == [Change("a", 0.0, 1.0), Change("f", 0.25, 0.5)]
    assert worsened == [Change("b", 1.0, 0.5), Change("d", 0.25, 0.0)]
    assert most_changed(before, after, 1) == ([Change("a", 0.0, 1.0)], [Change("b", 1.0, 0.5)])
