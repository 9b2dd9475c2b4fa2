"""Rules of judging, with numbers worked out by hand."""

from dataclasses import replace
from math import log

import pytest
from pydantic import ValidationError

from models.specs import PromptTemplate
from storage.rows import Calibration, JudgedRollout, ScoredRollout
from tasks.judgements import (
    ClassMissing,
    Judge,
    JudgeGate,
    LabelFree,
    Mixture,
    Verdict,
    accuracy_at_half,
    as_it_is,
    auroc,
    calibration,
    choose_filter,
    confidence,
    evaluate_judged,
    expected_calibration_error,
    filled_template,
    held_out_prompts,
    join,
    judge_faults,
    judge_prompt,
    judge_rows,
    label_by_confidence,
    label_faults,
    pair_by_confidence,
    verdicts,
)
from tests.tasks.builders import scored

MARKER = "FINAL ANSWER:"


def judged(
    index: int, answer: str | None, sure: float | None, *, prompt_id: str = "p", finish_reason: str = "stop"
) -> JudgedRollout:
    """A judged rollout; its text is its own."""
    return JudgedRollout(
        prompt_id=prompt_id,
        rollout_index=index,
        prompt=f"prompt {prompt_id}",
        completion=f"completion {index}",
        completion_tokens=5,
        finish_reason=finish_reason,
        cumulative_logprob=None,
        policy="fake:tests",
        answer=answer,
        confidence=sure,
        positive_logprob=None,
        negative_logprob=None,
        judge="fake:tests",
        reason="judged",
    )


def labels(rows: list[JudgedRollout], **settings: object) -> dict[int, tuple[float | None, str]]:
    """rollout_index -> (reward, reason)."""
    told = label_by_confidence(rows, LabelFree.model_validate(settings))
    return {row.rollout_index: (row.reward, row.reason) for row in told}


def both(
    answer: str | None, reward: float | None, sure: float | None, index: int
) -> tuple[ScoredRollout, JudgedRollout]:
    return scored(index, reward, answer=answer), judged(index, answer, sure)


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        pytest.param(log(0.6), log(0.2), 0.75, id="0.6 / (0.6 + 0.2)"),
        pytest.param(log(0.03), log(0.01), 0.75, id="little mass, the same ratio"),
        pytest.param(log(0.5), float("-inf"), 1.0, id="the other label is impossible"),
        pytest.param(float("-inf"), log(0.5), 0.0, id="the label is impossible"),
        pytest.param(log(0.004), log(0.005), None, id="0.9 % together, it said neither"),
        pytest.param(float("-inf"), float("-inf"), None, id="both impossible"),
        pytest.param(0.0, -2000.0, 1.0, id="no overflow"),
    ],
)
def test_confidence_is_the_share_of_the_positive_label(
    positive: float, negative: float, expected: float | None
) -> None:
    sure = confidence(Judge(), positive, negative)
    assert sure == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        pytest.param({"positive": "Right", "negative": "Right"}, "begins with", id="one label"),
        pytest.param({"positive": "Yes", "negative": "Yes, no"}, "neither begins the other", id="one begins the other"),
        pytest.param({"positive": " Yes"}, "white space", id="space"),
        pytest.param({"text": "Is it right? $completion"}, "$prompt and $completion", id="no prompt"),
        pytest.param({"text": "$prompt $completion $answer"}, "nothing else", id="another name"),
        pytest.param({"text": "$prompt $completion Verdict: "}, "tokenizer would cut", id="ends in a space"),
        pytest.param({"minimum_label_mass": 1.0}, "less than 1", id="mass out of range"),
        pytest.param({"maximum_undecided": 1.5}, "less than or equal to 1", id="share out of range"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Judge.model_validate(settings)
    assert told in str(caught.value)


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


@pytest.mark.parametrize(
    ("label_tokens", "probes", "told"),
    [
        pytest.param("one", [[[-1.0], [-2.0]]], "", id="one token each"),
        pytest.param(
            "one", [[[-1.0], [-2.0, -0.1]]], "'Correct' 1, 'Incorrect' 2", id="two tokens where one is wanted"
        ),
        pytest.param("any", [[[-1.0], [-2.0, -0.1]]], "", id="two tokens are summed"),
        pytest.param("one", [[[-1.0], [-1.0]], [[-3.0], [-3.0]]], "share their first token", id="the same token"),
        pytest.param("any", [[[-1.0], [-1.0, -4.0]], [[-3.0], [-3.0, -1.0]]], "share their first", id="one begins"),
        pytest.param("any", [[[-1.0, -2.0], [-1.0, -4.0]]], "", id="whole labels that differ later are summed"),
        pytest.param("any", [[[-1.0], [-1.0]], [[-3.0], [-2.0]]], "", id="equal on one probe by chance"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_found(
    label_tokens: str, probes: list[list[list[float]]], told: str
) -> None:
    faults = "; ".join(label_faults(Judge.model_validate({"label_tokens": label_tokens}), probes))
    assert (told in faults) if told else not faults


def test_the_judge_sees_the_completion_up_to_its_answer_and_dollars_stay() -> None:
    judge = Judge(text="Q: $prompt\n$completion\nV:")
    asked = judge_prompt(judge, "It costs $5. $prompt?", "5 = 5\nFINAL ANSWER: 5\nQuestion: another", MARKER)
    assert asked == "Q: It costs $5. $prompt?\n5 = 5\nFINAL ANSWER: 5\nV:"


def test_a_filled_template_is_trained_through_a_template_that_adds_nothing() -> None:
    template = PromptTemplate(system="Be careful.", user="Question: $prompt\nSolution:")
    assert filled_template(template, "1 + $1?") == "Question: 1 + $1?\nSolution:"
    assert as_it_is(template) == PromptTemplate(system="Be careful.", user="$prompt")
    with pytest.raises(ValueError, match=r"put \$prompt into template.user"):
        as_it_is(PromptTemplate(system="About $prompt."))


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


def test_judge_rows_are_balanced_within_each_prompt_and_up_to_the_ratio() -> None:
    rows = [
        *(scored(n, reward, prompt_id="a") for n, reward in enumerate([1.0, 1.0, 1.0, 0.0])),
        *(scored(n, reward, prompt_id="b") for n, reward in enumerate([1.0, 0.0, 0.0, None])),
        *(scored(n, 1.0, prompt_id="always") for n in range(4)),
    ]
    mixed = judge_rows(rows, Judge(), Mixture(judge_rows_per_prompt=2), wanted=100, iteration=1, marker=MARKER)
    told = sorted((row.prompt_id, row.completion) for row in mixed.rows)
    # a: one wrong, so one right; b: one right, so one wrong; "always" has nothing to tell apart
    assert told == [("a", "Correct"), ("a", "Incorrect"), ("b", "Correct"), ("b", "Incorrect")]
    assert {row.task for row in mixed.rows} == {"judge"}
    assert len(judge_rows(rows, Judge(), Mixture(), wanted=2, iteration=1, marker=MARKER).rows) == 2
    assert mixed.rows == judge_rows(rows[::-1], Judge(), Mixture(), 100, 1, MARKER).rows


def test_judge_rows_balanced_over_the_set_take_prompts_of_one_kind_too() -> None:
    rows = [scored(0, 1.0, prompt_id="always"), scored(0, 0.0, prompt_id="never"), scored(1, 0.0, prompt_id="never")]
    mixed = judge_rows(rows, Judge(), Mixture(balance="set"), wanted=100, iteration=1, marker=MARKER)
    assert sorted((row.prompt_id, row.completion) for row in mixed.rows) == [
        ("always", "Correct"),
        ("never", "Incorrect"),
    ]
    assert mixed.counts["judge rows over balance or ratio"] == 1


@pytest.mark.parametrize(
    ("rewards", "balance", "told"),
    [
        pytest.param([("a", 1.0), ("b", 1.0)], "set", "no decided rollout of 2 prompts is wrong", id="all right"),
        pytest.param([("a", 0.0), ("b", 0.0)], "prompt", "no decided rollout of 2 prompts is right", id="all wrong"),
        pytest.param([("a", 1.0), ("b", 0.0)], "prompt", "none of 2 prompts has both", id="never in one prompt"),
        pytest.param([("a", None)], "set", "is right", id="all undecided"),
    ],
)
def test_one_class_missing_is_told(rewards: list[tuple[str, float | None]], balance: str, told: str) -> None:
    rows = [scored(0, reward, prompt_id=prompt_id) for prompt_id, reward in rewards]
    with pytest.raises(ClassMissing, match=told):
        judge_rows(rows, Judge(), Mixture.model_validate({"balance": balance}), 10, 1, MARKER)


def test_some_prompts_are_held_out_whatever_their_order_and_at_least_one() -> None:
    names = [f"p{n}" for n in range(10)]
    assert held_out_prompts(names, Mixture(held_out_share=0.25)) == held_out_prompts(
        names[::-1], Mixture(held_out_share=0.25)
    )
    assert len(held_out_prompts(names, Mixture(held_out_share=0.25))) == 3  # 2.5, up
    assert len(held_out_prompts(names, Mixture(held_out_share=0.01))) == 1
    assert held_out_prompts(names, Mixture(held_out_share=0.0)) == set()


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


def test_auroc_counts_the_pairs_that_are_in_order_and_ties_half() -> None:
    # right 0.9 0.5, wrong 0.5 0.1: in order 0.9>0.5, 0.9>0.1, 0.5>0.1, one tie: 3.5 of 4
    assert auroc([True, True, False, False], [0.9, 0.5, 0.5, 0.1]) == pytest.approx(0.875)
    assert auroc([True, False], [0.5, 0.5]) == 0.5
    assert auroc([False, True], [0.9, 0.1]) == 0.0
    assert auroc([True, True], [0.9, 0.1]) is None


def test_the_calibration_error_weighs_each_bins_gap_by_its_rollouts() -> None:
    # bin 0.9-1.0: 3 rollouts, 2 right, mean 0.95: gap |2 - 2.85| = 0.85; bin 0.1-0.2: 1 rollout, wrong: gap 0.15
    sure = [0.95, 0.95, 0.95, 0.15]
    assert expected_calibration_error([True, True, False, False], sure) == pytest.approx((0.85 + 0.15) / 4)
    assert expected_calibration_error([True], [1.0]) == 0.0  # 1.0 stands in the last bin


def test_accuracy_is_of_the_verdict_at_one_half() -> None:
    assert accuracy_at_half([True, False, False, True], [0.6, 0.4, 0.5, 0.5]) == 0.75  # 0.5 is not above 0.5


def test_calibration_is_split_by_how_often_a_prompt_is_solved() -> None:
    known = [
        *(Verdict(prompt_id="hard", correct=False, confidence=sure) for sure in (0.2, 0.3)),
        *(Verdict(prompt_id="easy", correct=True, confidence=sure) for sure in (0.8, 0.4)),
        *(Verdict(prompt_id="half", correct=right, confidence=0.9) for right in (True, False)),
    ]
    rows = {(row.group, row.name): row for row in calibration(known, "judge", "own")}
    assert rows["all", "accuracy"].value == pytest.approx(4 / 6)  # 0.4 and the wrong 0.9 are missed
    assert rows["all", "share correct"].value == 0.5
    assert rows["solved 0-25 %", "accuracy"].value == 1.0
    assert rows["solved 75-100 %", "accuracy"].value == 0.5
    assert rows["solved 50-75 %", "auroc"].value == 0.5
    assert ("solved 0-25 %", "auroc") not in rows  # no right rollout
    assert rows["all", "auroc"].n == 6
    assert rows["all", "auroc"].prompts == 3


def test_undecided_rollouts_of_either_side_are_not_calibrated_on() -> None:
    rows = [both("7", 1.0, 0.9, 0), both(None, None, 0.9, 1), both("7", 1.0, None, 2)]
    assert verdicts(rows) == [Verdict(prompt_id="p", correct=True, confidence=0.9)]


def figure(low: float | None, value: float = 0.6) -> Calibration:
    return Calibration(
        judge="j", writer="own", group="all", name="auroc", value=value, low=low, high=0.7, n=100, prompts=10
    )


def test_a_judge_passes_if_its_interval_is_above_chance() -> None:
    assert judge_faults([figure(0.51)], JudgeGate()) is None
    assert "AUROC on 100 rollouts of 10 dev prompts is 0.600 (0.500 to 0.700)" in str(
        judge_faults([figure(0.5)], JudgeGate())
    )
    assert judge_faults([figure(0.51)], JudgeGate(minimum_auroc=0.55)) is not None
    assert "AUROC is unknown" in str(judge_faults([replace(figure(0.9), writer="base")], JudgeGate()))


def test_a_chance_judge_has_an_interval_around_one_half() -> None:
    # in every prompt, one right and one wrong rollout get the confidences 0.2 and 0.8 in turns
    known = [
        Verdict(prompt_id=f"p{n}", correct=right, confidence=0.8 if (n % 2 == 0) is right else 0.2)
        for n in range(40)
        for right in (True, False)
    ]
    row = next(iter(calibration(known, "j", "own")))
    assert row.value == 0.5
    assert row.low is not None and row.high is not None
    assert row.low < 0.5 < row.high


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
