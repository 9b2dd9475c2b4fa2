"""pass@k curves and their bands, and lines made short."""

import pytest

from tasks.curves import pass_curve, thinned


def test_a_curve_is_the_mean_over_prompts_of_the_unbiased_pass_at_k() -> None:
    # One prompt with 1 right of 3, one with none: pass@1 = (1/3 + 0) / 2, pass@2 = (1 - C(2,2)/C(3,2)) / 2 = (2/3) / 2,
    # pass@3 = 1/2, since all three rollouts hold the right one.
    points = pass_curve({(3, 1): 1, (3, 0): 1})
    assert [point.k for point in points] == [1, 2, 3]
    assert [point.value for point in points] == pytest.approx([1 / 6, 1 / 3, 1 / 2])


def test_prompts_that_are_all_alike_have_no_band_until_all_are_solved() -> None:
    # 10 prompts with 1 right of 2: whichever are drawn, pass@1 is 1/2. All are solved by 2, and Wilson's interval of
    # 10 of 10 is 10 / (10 + 1.96^2) = 0.722 to 1; a resampling that only ever finds 1 would claim to know for sure.
    first, second = pass_curve({(2, 1): 10})
    assert tuple(first) == (1, 0.5, 0.5, 0.5)
    assert tuple(second) == pytest.approx((2, 1.0, 0.722, 1.0), abs=0.001)


def test_the_band_is_that_of_a_share_of_prompts() -> None:
    # 400 prompts of one rollout, half of them right: Wilson's interval of this share is 0.451 to 0.549.
    (point,) = pass_curve({(1, 1): 200, (1, 0): 200})
    assert point.value == 0.5
    assert (point.low, point.high) == pytest.approx((0.451, 0.549), abs=0.001)


def test_the_band_of_values_between_0_and_1_is_that_of_their_mean() -> None:
    # 400 prompts, half of them 1 right of 4, half 3: values 0.25 and 0.75, standard deviation 0.25, that of the mean of
    # 400 is 0.0125, and its 95 % interval 0.5 +- 1.96 * 0.0125 = 0.4755 to 0.5245.
    first = pass_curve({(4, 1): 200, (4, 3): 200})[0]
    assert (first.low, first.high) == pytest.approx((0.4755, 0.5245), abs=0.002)


def test_a_curve_ends_where_the_first_prompt_has_no_more_rollouts() -> None:
    assert [point.k for point in pass_curve({(4, 2): 3, (2, 1): 1})] == [1, 2]
    assert pass_curve({}) == []


def test_a_thinned_line_keeps_both_ends_and_is_even() -> None:
    assert thinned(range(101), 5) == [0, 25, 50, 75, 100]
    assert thinned([1, 2, 3], 5) == [1, 2, 3]
