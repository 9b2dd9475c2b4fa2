"""Figures: every expected number is worked out by hand."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.specs import Sampling
from storage.rows import ScoredRollout
from tasks.metrics import (
    Strategy,
    best_of_n_by_likelihood,
    evaluate_prompt,
    interval_of_mean,
    majority,
    mcnemar_p,
    mean_reward,
    paired_difference,
    parse_strategy,
    pass_at_k,
    summarise,
    wilson,
)
from tests.tasks.builders import evaluated, scored


@pytest.mark.parametrize(
    ("rollouts", "correct", "k", "expected"),
    [
        pytest.param(4, 2, 2, 5 / 6, id="1 - C(2,2)/C(4,2) = 1 - 1/6"),
        pytest.param(16, 1, 1, 1 / 16, id="k=1 is the share of correct ones"),
        pytest.param(16, 1, 16, 1.0, id="all drawn: one correct one is enough"),
        pytest.param(16, 0, 16, 0.0, id="none correct"),
        pytest.param(5, 4, 2, 1.0, id="only one wrong one for two places"),
        pytest.param(3000, 1, 1500, 0.5, id="large numbers do not overflow"),
    ],
)
def test_pass_at_k(rollouts: int, correct: int, k: int, expected: float) -> None:
    assert pass_at_k(rollouts, correct, k) == pytest.approx(expected)


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_one(n: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(combinations(range(n), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(min(draw) < correct for draw in draws) / len(draws))


def test_pass_at_k_of_too_few_rollouts_says_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"rollouts_per_prompt is 4 but pass@8 was asked for; raise it to 8 or drop k=8"
    ):
        pass_at_k(4, 2, 8)


def votes(*answers: str | None) -> list[ScoredRollout]:
    return [
        scored(n, None if answer is None else float(answer == "72"), answer=answer) for n, answer in enumerate(answers)
    ]


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        pytest.param(["3", "1,000", "1000.0"], 1, id="two spellings of one value win"),
        pytest.param(["72", "3", "3", "72"], 0, id="a tie goes to the answer seen first"),
        pytest.param([None, None, "3"], 2, id="undecided rollouts do not vote"),
        pytest.param(["a few", "some", "3"], 2, id="unreadable answers do not vote"),
        pytest.param([None, None], None, id="nobody votes"),
    ],
)
def test_majority(answers: list[str | None], winner: int | None) -> None:
    elected = majority(votes(*answers))
    assert (None if elected is None else elected.rollout_index) == winner


def test_most_likely_rollout_is_the_first_of_equals() -> None:
    rows = [scored(0, logprob=-3.0), scored(1, logprob=-1.0), scored(2, logprob=-1.0)]
    assert best_of_n_by_likelihood(rows).rollout_index == 1


def test_most_likely_rollout_needs_log_probs() -> None:
    with pytest.raises(ValueError, match="rollout 1 of prompt p has no cumulative_logprob"):
        best_of_n_by_likelihood([scored(0, logprob=-3.0), scored(1)])


FOUR = [  # right, undecided, wrong and likely, right
    scored(0, 1.0, answer="72", logprob=-2.0),
    scored(1, None, answer=None, logprob=-9.0),
    scored(2, 0.0, answer="3", logprob=-1.0),
    scored(3, 1.0, answer="72.0", logprob=-0.5),
]


@pytest.mark.parametrize(
    ("name", "value", "rollouts", "undecided", "answer"),
    [
        ("greedy", 1.0, 1, 0, "72"),
        ("mean@1", 0.5, 4, 1, None),  # 2 of 4: the undecided one is not correct
        ("pass@1", 0.5, 4, 1, None),
        ("pass@4", 1.0, 4, 1, None),
        ("pass@2", 5 / 6, 4, 1, None),  # 1 - C(2,2)/C(4,2)
        ("maj@4", 1.0, 4, 1, "72"),  # two votes to one
        ("maj@1", 1.0, 1, 0, "72"),
        ("best-of-3 by likelihood", 0.0, 3, 1, "3"),  # of the first three, rollout 2 is likeliest
        ("best-of-4 by likelihood", 1.0, 4, 1, "72.0"),
    ],
)
def test_strategies_on_four_rollouts(
    name: str, value: float, rollouts: int, undecided: int, answer: str | None
) -> None:
    row = evaluate_prompt(FOUR[::-1], parse_strategy(name))
    assert (row.strategy, row.rollouts, row.undecided, row.answer) == (name, rollouts, undecided, answer)
    assert row.value == pytest.approx(value)


def test_nobody_votes_is_zero_with_n_stated() -> None:
    row = evaluate_prompt([scored(n, None) for n in range(4)], parse_strategy("maj@4"))
    assert (row.value, row.rollouts, row.undecided, row.answer) == (0.0, 4, 4, None)


def test_too_few_rollouts_or_two_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="maj@16 needs 16 or more rollouts of one prompt; found 4"):
        evaluate_prompt(FOUR, parse_strategy("maj@16"))
    with pytest.raises(ValueError, match=r"of prompts \['p', 'q'\]"):
        evaluate_prompt([scored(0), scored(0, prompt_id="q")], parse_strategy("mean@1"))


@pytest.mark.parametrize("name", ["best of 1", "mean@4", "pass@", "pass@0", "Greedy", "maj@-1"])
def test_unknown_strategy_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"no strategy is called|k is 1|greater than or equal to 1"):
        parse_strategy(name)


def test_strategy_is_checked_against_the_sampling() -> None:
    with pytest.raises(
        ValueError, match=r"rollouts_per_prompt is 4 but maj@8 was asked for; raise it to 8 or drop k=8"
    ):
        Strategy(kind="maj", k=8).check(Sampling(rollouts_per_prompt=4))
    with pytest.raises(ValueError, match=r"temperature is 0.7 but greedy was asked for"):
        parse_strategy("greedy").check(Sampling(rollouts_per_prompt=1))
    Strategy(kind="pass", k=16).check(Sampling(rollouts_per_prompt=16))


def test_unknown_rewards_stay_out_of_the_mean() -> None:
    assert mean_reward([1.0, None, 0.0]) == 0.5
    assert mean_reward([None]) is None


def test_wilson_interval() -> None:
    # 5 of 10, z = 1.96: centre (0.5 + 0.19208) / 1.38416 = 0.5; half = 1.96 * sqrt((0.25 + 0.09604) / 10) / 1.38416
    # = 1.96 * 0.186022 / 1.38416 = 0.263410
    assert wilson(5, 10) == pytest.approx((0.236590, 0.763410), abs=1e-4)
    # 0 of 10: high = 2 * (0.19208) / 1.38416 = 0.277540
    assert wilson(0, 10) == pytest.approx((0.0, 0.277540), abs=1e-4)


def test_interval_of_yes_or_no_is_wilsons_and_of_shares_the_bootstraps() -> None:
    assert interval_of_mean([1.0] * 5 + [0.0] * 5) == wilson(5, 10)
    # 400 values of 0.25 and 0.75: standard error 0.25 / 20 = 0.0125, so 0.5 -+ 1.96 * 0.0125 = 0.4755 to 0.5245
    assert interval_of_mean([0.25, 0.75] * 200) == pytest.approx((0.4755, 0.5245), abs=2e-3)


def test_summary_states_n_k_and_interval() -> None:
    metric = summarise(
        [evaluated("a", 1.0), evaluated("b", 0.0), evaluated("c", 1.0), evaluated("d", 1.0)], "dev", seed=7
    )
    assert (metric.split, metric.strategy, metric.value, metric.n, metric.k, metric.seed) == (
        "dev",
        "mean@1",
        0.75,
        4,
        1,
        7,
    )
    assert (metric.low, metric.high) == wilson(3, 4)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="none"),
        pytest.param([evaluated("a", 1.0), evaluated("a", 1.0)], id="one prompt twice"),
        pytest.param([evaluated("a", 1.0), evaluated("b", 1.0, "greedy")], id="two strategies"),
    ],
)
def test_summary_of_a_mixture_is_refused(rows: list[object]) -> None:
    with pytest.raises(ValueError, match="one strategy with one row a prompt"):
        summarise(rows, "dev")  # type: ignore[arg-type]  # object: the parameters differ in length only


def test_sign_flips_of_five_gains_are_one_in_32() -> None:
    # of the 2^5 ways to set the signs only one sums up to 5
    paired = paired_difference([1.0] * 5, [0.0] * 5)
    assert (paired.difference, paired.low, paired.high, paired.p_value, paired.n) == (1.0, 1.0, 1.0, 1 / 32, 5)


def test_sign_flips_of_yes_and_no_are_mcnemars() -> None:
    # 9 gained, 3 lost, 88 alike: (C(12,9) + C(12,10) + C(12,11) + C(12,12)) / 2^12 = (220 + 66 + 12 + 1) / 4096
    paired = paired_difference([1.0] * 9 + [0.0] * 91, [0.0] * 9 + [1.0] * 3 + [0.0] * 88)
    assert paired.difference == pytest.approx(0.06)
    assert paired.p_value == mcnemar_p(9, 3) == 299 / 4096


def test_drawn_sign_flips_come_close_to_mcnemars() -> None:
    # 60 gained, 40 lost: P(Bin(100, 1/2) >= 60) = 0.02844; the standard error of 10,000 draws is 0.0017
    paired = paired_difference([1.0] * 60 + [0.0] * 40, [0.0] * 60 + [1.0] * 40)
    assert mcnemar_p(60, 40) == pytest.approx(0.02844, abs=1e-5)
    assert paired.p_value == pytest.approx(0.02844, abs=0.007)
    # differences of +-1 with mean 0.2: standard error sqrt(0.96 / 100) = 0.098, so 0.2 -+ 0.192
    assert (paired.low, paired.high) == pytest.approx((0.008, 0.392), abs=0.021)


def test_no_difference_is_no_evidence() -> None:
    assert paired_difference([0.5, 1.0], [0.5, 1.0]) == (0.0, 0.0, 0.0, 1.0, 2)
    assert mcnemar_p(0, 0) == 1.0


def test_same_seed_gives_the_same_interval() -> None:
    values = [n / 40 for n in range(40)]
    assert paired_difference(values, values[::-1], seed=3) == paired_difference(values, values[::-1], seed=3)
    assert interval_of_mean(values, 3) != interval_of_mean(values, 4)


def test_unpaired_values_are_refused() -> None:
    with pytest.raises(ValueError, match="found 1 of the candidate and 2 of the incumbent"):
        paired_difference([1.0], [1.0, 0.0])
