"""pass@k curves and their bands, and lines made short."""

import pytest

from tasks.curves import pass_curve, thinned


def test_a_curve_is_the_mean_over_prompts_of_the_unbiased_pass_at_k() -> None:
    # One prompt with 1 right of 3, one with none: pass@1 = (1/3 + 0) / 2, pass@2 = (1 - C(2,2)/C(3,2)) / 2 = (2/3) / 2,
    # pass@3 = 1/2, since all three rollouts hold the right one.
    points = pass_curve({(3, 1): 1, (3, 0): 1})
    assert [point.k for point in points] == [1, 2, 3]
    assert [point.value for point in points] == pytest.approx([1 / 6, 1 / 3, 1 / 2])


def test_the_band_of_prompts_that_are_all_alike_has_no_width() -> None:
    # 10 prompts with 1 right of 2: whichever are drawn, pass@1 is 1/2 and pass@2 is 1.
    points = pass_curve({(2, 1): 10})
    assert [tuple(point) for point in points] == [(1, 0.5, 0.5, 0.5), (2, 1.0, 1.0, 1.0)]


def test_the_band_is_that_of_a_share_of_prompts() -> None:
    # 400 prompts of one rollout, half of them right: the 95 % interval of this share is 0.5 +- 1.96 * 0.025.
    (point,) = pass_curve({(1, 1): 200, (1, 0): 200})
    assert point.value == 0.5
    assert (point.low, point.high) == pytest.approx((0.451, 0.549), abs=0.004)


def test_a_curve_ends_where_the_first_prompt_has_no_more_rollouts() -> None:
    assert [point.k for point in pass_curve({(4, 2): 3, (2, 1): 1})] == [1, 2]
    assert pass_curve({}) == []


def test_a_thinned_line_keeps_both_ends_and_is_even() -> None:
    assert thinned(range(101), 5) == [0, 25, 50, 75, 100]
    assert thinned([1, 2, 3], 5) == [1, 2, 3]
