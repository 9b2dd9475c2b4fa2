"""How far a judge can be trusted, with figures worked out by hand."""

from dataclasses import replace

import pytest

from storage.rows import Calibration
from tasks.calibrations import (
    JudgeGate,
    Verdict,
    accuracy_at_half,
    auroc,
    auroc_within_prompts,
    calibration,
    expected_calibration_error,
    judge_faults,
    verdicts,
)
from tests.tasks.builders import both


def test_auroc_counts_the_pairs_that_are_in_order_and_ties_half() -> None:
    # right 0.9 0.5, wrong 0.5 0.1: in order 0.9>0.5, 0.9>0.1, 0.5>0.1, one tie: 3.5 of 4
    assert auroc([True, True, False, False], [0.9, 0.5, 0.5, 0.1]) == pytest.approx(0.875)
    assert auroc([True, False], [0.5, 0.5]) == 0.5
    assert auroc([False, True], [0.9, 0.1]) == 0.0
    assert auroc([True, True], [0.9, 0.1]) is None


def test_auroc_within_prompts_does_not_reward_telling_easy_prompts_from_hard_ones() -> None:
    # easy: right 0.9 and 0.8, wrong 0.85: one of two pairs in order; hard: right 0.1, wrong 0.1 and 0.05: 1.5 of two
    easy = [(True, 0.9), (True, 0.8), (False, 0.85)]
    hard = [(True, 0.1), (False, 0.1), (False, 0.05)]
    known = [
        Verdict(prompt_id=name, correct=right, confidence=sure)
        for name, rows in (("easy", easy), ("hard", hard))
        for right, sure in rows
    ]
    assert auroc_within_prompts(known) == pytest.approx(2.5 / 4)
    assert auroc_within_prompts(known[:2]) is None  # nothing wrong
    rows = {(row.group, row.name): row for row in calibration(known, "j", "own")}
    assert rows["all", "auroc within prompts"].value == pytest.approx(2.5 / 4)
    assert rows["all", "auroc within prompts"].low == pytest.approx(0.5)  # only easy was drawn
    assert rows["all", "auroc within prompts"].high == pytest.approx(0.75)  # only hard was


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
