"""Who gets more rollouts, with chances and budgets worked out by hand."""

import pytest

from models.specs import Adaptive, AnswerSampling
from storage.rows import PassRate
from tasks.allotments import (
    CAPPED,
    ENOUGH,
    FAILED,
    LACKING,
    Tally,
    mean_pass_rate,
    next_pass,
    pass_rate,
    standing,
    tally,
    told,
)
from tests.tasks.builders import scored


def sampling(rollouts: int = 4, **adaptive: int) -> AnswerSampling:
    """First pass of 2, then passes of 2; one correct and one incorrect rollout are wanted, of 8 at most."""
    section = {"first": 2, "more": 2, "wanted_correct": 1, "wanted_incorrect": 1, "cap": 8} | adaptive
    return AnswerSampling(rollouts_per_prompt=rollouts, adaptive=Adaptive(**section))


def rate(correct: int, incorrect: int, rollouts: int = 8, prompt_id: str = "p") -> PassRate:
    """What was known of a prompt; its first pass told the same as the rest."""
    return PassRate(
        prompt_id=prompt_id,
        iteration=1,
        rollouts=rollouts,
        correct=correct,
        incorrect=incorrect,
        undecided=rollouts - correct - incorrect,
        first_rollouts=2,
        first_correct=min(correct, 2),
    )


def test_equal_texts_count_once_and_undecided_rollouts_as_neither() -> None:
    rows = [
        scored(0, 1.0, completion="2"),
        scored(1, 1.0, completion=" 2\n"),
        scored(2, 0.0, completion="3"),
        scored(3, 0.0, completion="4"),
        scored(4, None, completion="5"),
    ]
    assert tally(rows) == Tally(rollouts=5, correct=1, incorrect=2)


@pytest.mark.parametrize(
    ("tallied", "expected"),
    [
        pytest.param(Tally(2, 1, 1), ENOUGH, id="one of each"),
        pytest.param(Tally(2, 2, 0), LACKING, id="no incorrect one"),
        pytest.param(Tally(2, 0, 2), LACKING, id="no correct one"),
        pytest.param(Tally(8, 8, 0), CAPPED, id="no incorrect one of 8"),
        pytest.param(Tally(2, 0, 1, failed=True), FAILED, id="brings the engine down"),
    ],
)
def test_standing(tallied: Tally, expected: str) -> None:
    assert standing(tallied, sampling()) == expected


def test_a_prompt_that_wants_no_incorrect_rollout_is_done_with_correct_ones() -> None:
    assert standing(Tally(2, 2, 0), sampling(wanted_correct=2, wanted_incorrect=0)) == ENOUGH


def test_what_was_known_counts_as_one_first_pass_more() -> None:
    # All three lack an incorrect rollout.
    tallies = {"unknown": Tally(2, 2, 0), "always right": Tally(2, 2, 0), "often wrong": Tally(2, 2, 0)}
    known = {"always right": rate(8, 0), "often wrong": rate(2, 6)}
    # unknown: 1 / (2 + 3) = 0.2; always right: (1 + 0) / (2 + 3 + 2) = 0.14; often wrong: (1 + 2 * 6/8) / 7 = 0.36
    assert list(next_pass(tallies, known, sampling(rollouts=8), seed=0)) == ["often wrong", "unknown", "always right"]
    assert next_pass(tallies, known, sampling(rollouts=3), seed=0) == {"often wrong": 2, "unknown": 1}  # 9 - 6 left


def test_the_budget_goes_to_those_that_lack_and_never_above_the_cap() -> None:
    # 3 prompts of 4 on average: 12. Spent: 2 + 7 + 2 = 11, so one is left, and "b" may have one more anyway.
    tallies = {"a": Tally(2, 1, 1), "b": Tally(7, 7, 0), "c": Tally(2, 2, 0)}
    # Chances that the next is incorrect: b (0 + 1) / (7 + 3) = 0.1, c (0 + 1) / (2 + 3) = 0.2
    assert next_pass(tallies, {}, sampling(), seed=0) == {"c": 1}
    assert next_pass(tallies, {}, sampling(rollouts=5), seed=0) == {
        "c": 2,
        "b": 1,
    }  # 4 left: c takes 2, b up to its cap


def test_what_a_prompt_lacks_twice_is_likelier_found() -> None:
    # "both": undecided twice, so either kind helps: (0 + 1 + 0 + 1) / (2 + 3) = 0.4; "one": 0.2
    tallies = {"one": Tally(2, 2, 0), "both": Tally(2, 0, 0)}
    assert list(next_pass(tallies, {}, sampling(rollouts=8), seed=0)) == ["both", "one"]


def test_sampling_is_over_when_all_have_enough_or_the_budget_is_spent() -> None:
    assert next_pass({"a": Tally(2, 1, 1)}, {}, sampling(), seed=0) == {}
    assert next_pass({"a": Tally(4, 4, 0)}, {}, sampling(), seed=0) == {}  # 4 of 4


def test_equals_are_put_in_an_order_of_the_seed_whatever_order_they_come_in() -> None:
    names = [f"p{n}" for n in range(20)]
    tallies = {name: Tally(2, 2, 0) for name in names}
    enough_for_five = {**tallies, **{f"done {n}": Tally(4 + 2, 3, 3) for n in range(15)}}
    given = next_pass(enough_for_five, {}, sampling(), seed=0)  # 35 * 4 - 20 * 2 - 15 * 6 = 10 left
    assert len(given) == 5
    assert next_pass(dict(reversed(enough_for_five.items())), {}, sampling(), seed=0) == given
    assert next_pass(enough_for_five, {}, sampling(), seed=1) != given


def test_a_pass_rate_tells_the_unchosen_rollouts_from_the_others() -> None:
    # Wrong, wrong, right and then no more: 1 of 3 is right because drawing stopped there; of the first two, none is.
    rows = [scored(0, 0.0), scored(1, None), scored(2, 1.0)]
    found = pass_rate(rows, 2, iteration=3)
    assert (found.rollouts, found.correct, found.incorrect, found.undecided) == (3, 1, 1, 1)
    assert (found.first_rollouts, found.first_correct, found.iteration) == (2, 0, 3)


def test_the_mean_pass_rate_counts_every_prompt_once_and_first_rollouts_only() -> None:
    rates = [rate(2, 0, rollouts=2), rate(1, 31, rollouts=32), rate(0, 8)]
    # First passes of two: 2, 1 and 0 correct. Of all rollouts, 3 of 42 are.
    assert mean_pass_rate(rates) == pytest.approx((1.0 + 0.5 + 0.0) / 3)


def test_stopping_at_the_first_correct_rollout_biases_all_rollouts_and_not_the_first() -> None:
    # A prompt solved half of the time, one rollout first and one more if it is wrong. All four ways are equally likely:
    # right (1 of 1) twice, wrong-right (1 of 2), wrong-wrong (0 of 2): 5/8 on average.
    ways = [[1.0], [1.0], [0.0, 1.0], [0.0, 0.0]]
    rates = [pass_rate([scored(i, one) for i, one in enumerate(way)], 1, 1) for way in ways]
    assert sum(one.correct / one.rollouts for one in rates) / 4 == 0.625
    assert mean_pass_rate(rates) == 0.5


def test_the_report_is_told_where_the_share_of_correct_rollouts_is_no_pass_rate() -> None:
    assert told([rate(2, 0, rollouts=2), rate(1, 1, rollouts=2)]) is None
    assert told([rate(2, 0, rollouts=2), rate(1, 31, rollouts=32)]) == (
        "Rollouts were drawn adaptively, 2 to 32 a prompt, so the share of correct ones is no pass rate; by the first "
        "rollouts of each of the 2 prompts, that is 75.0 %."
    )


@pytest.mark.parametrize(
    ("rollouts", "section", "message"),
    [
        ({"rollouts_per_prompt": 4}, {"first": 5}, "adaptive.first is 5 but rollouts_per_prompt"),
        ({"rollouts_per_prompt": 4}, {"wanted_correct": 3, "wanted_incorrect": 2}, "a prompt may get 4 rollouts"),
        ({"rollouts_per_prompt": 8}, {"first": 6, "cap": 5}, "but 6 are needed"),
        ({}, {"wanted_correct": 0, "wanted_incorrect": 0}, "both 0"),
    ],
    ids=["first above the average", "more wanted than may be had", "cap below the first pass", "nothing wanted"],
)
def test_settings_that_cannot_be_met_are_refused(
    rollouts: dict[str, int], section: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AnswerSampling.model_validate({**rollouts, "adaptive": section})


def test_adaptation_is_part_of_the_key_only_where_there_is_any_and_never_of_the_ledgers() -> None:
    plain, adaptive = AnswerSampling(rollouts_per_prompt=4), sampling()
    assert plain.key() == plain.plain.key()
    assert adaptive.key()["adaptive"]["cap"] == 8
    assert sampling(cap=9).key() != adaptive.key()
    assert adaptive.decoding() == plain.decoding() == plain.plain.decoding()
    assert adaptive.for_iteration(2).adaptive == adaptive.adaptive
