"""Pairs: the three rules, what is never paired, and that order does not matter."""

import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.rows import ScoredRollout
from tasks.pairs import Paired, Pairing, pair_rollouts, pair_with_gold, swap
from tests.tasks.builders import demonstration, rollout, scored


def sides(paired: Paired) -> list[tuple[int | None, int | None]]:
    return [(pair.chosen_index, pair.rejected_index) for pair in paired.pairs]


def three_right_two_wrong() -> list[ScoredRollout]:
    return [*(scored(index, 1.0) for index in range(3)), scored(3, 0.0), scored(4, 0.0)]


def test_zip_walks_the_longer_side_once_and_repeats_the_shorter() -> None:
    paired = pair_rollouts(three_right_two_wrong(), Pairing(rule="zip"), iteration=1)
    chosen, rejected = zip(*sides(paired), strict=True)
    assert sorted(chosen) == [0, 1, 2]
    assert rejected[2] == rejected[0] != rejected[1]
    assert {(pair.rule, pair.iteration, pair.margin, pair.swapped) for pair in paired.pairs} == {("zip", 1, 1.0, False)}
    assert paired.drops == {}


@pytest.mark.parametrize(("max_loop", "pairs"), [(None, 5), (1, 2), (2, 4), (3, 5)])
def test_zip_repeats_the_shorter_side_max_loop_times_at_most(max_loop: int | None, pairs: int) -> None:
    # 5 right and 2 wrong: once round makes 2 pairs, twice 4, three times all 5
    rows = [*(scored(index, 1.0) for index in range(5)), scored(5, 0.0), scored(6, 0.0)]
    paired = pair_rollouts(rows, Pairing(max_loop=max_loop), iteration=0)
    assert len(paired.pairs) == pairs
    assert paired.drops == ({"over max_loop": 5 - pairs} if pairs < 5 else {})


def test_walk_goes_on_to_every_combination_but_no_further() -> None:
    # sides of 3 and 2 in step: 3 * 2 = 6 different pairs, then the first again
    paired = pair_rollouts(three_right_two_wrong(), Pairing(rule="walk"), iteration=0)
    assert sorted(sides(paired)) == sorted(product(range(3), (3, 4)))
    assert len(pair_rollouts(three_right_two_wrong(), Pairing(rule="walk", max_per_prompt=4), 0).pairs) == 4


def test_best_worst_pairs_the_two_ends() -> None:
    rows = [scored(0, 0.4), scored(1, 0.9), scored(2, 0.1), scored(3, None)]
    paired = pair_rollouts(rows, Pairing(rule="best_worst"), iteration=0)
    assert sides(paired) == [(1, 2)]
    assert paired.pairs[0].margin == pytest.approx(0.8)  # 0.9 - 0.1
    assert paired.drops == {"between best and worst": 1, "undecided: no final answer": 1}


def test_pairs_over_the_cap_are_counted() -> None:
    paired = pair_rollouts(three_right_two_wrong(), Pairing(max_per_prompt=1), iteration=0)
    assert (len(paired.pairs), paired.drops) == (1, {"pair over max_per_prompt": 2})


@pytest.mark.parametrize(
    ("rows", "drops"),
    [
        pytest.param(
            [scored(0), scored(1, None)],
            {"undecided: no final answer": 1, "prompt without a rejected": 1},
            id="undecided",
        ),
        pytest.param(
            [scored(0, finish_reason="length"), scored(1, 0.0)],
            {"truncated": 1, "prompt without a chosen": 1},
            id="truncated",
        ),
        pytest.param(
            [scored(0), scored(1, 0.3)], {"between the thresholds": 1, "prompt without a rejected": 1}, id="middling"
        ),
        pytest.param(
            [scored(0, 1.0, completion="x"), scored(1, 0.0, completion=" x\n")], {"pair of one text": 1}, id="one text"
        ),
        pytest.param([], {"prompt without a chosen": 1, "prompt without a rejected": 1}, id="no rollouts"),
    ],
)
def test_what_is_never_paired_is_counted(rows: list[ScoredRollout], drops: dict[str, int]) -> None:
    assert pair_rollouts(rows, Pairing(), iteration=0) == Paired([], drops)  # type: ignore[arg-type]  # equal to a Counter


def test_tie_is_no_pair() -> None:
    paired = pair_rollouts([scored(0, 0.5), scored(1, 0.5)], Pairing(rule="best_worst"), iteration=0)
    assert (paired.pairs, paired.drops) == ([], {"pair below minimum_margin": 1})


def test_repeated_texts_count_once_on_their_side() -> None:
    rows = [*(scored(index, 1.0, completion="right") for index in range(3)), scored(3, 0.0)]
    paired = pair_rollouts(rows, Pairing(), iteration=0)
    assert (len(paired.pairs), paired.drops) == (1, {"duplicate": 2})


def test_rollouts_of_two_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of one prompt, these are of 2: \['p', 'q'\]"):
        pair_rollouts([scored(0), scored(0, 0.0, prompt_id="q")], Pairing(), iteration=0)


def test_thresholds_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="could stand on both sides"):
        Pairing(rejected_maximum=0.5)


REWARDS = st.lists(st.sampled_from([None, 0.0, 0.25, 0.5, 1.0]), max_size=12)


@given(REWARDS, st.sampled_from(["zip", "walk", "best_worst"]), st.integers(1, 5), st.randoms())
def test_every_pair_is_sound_and_order_does_not_matter(
    rewards: list[float | None], rule: str, cap: int, shuffler: random.Random
) -> None:
    rows = [scored(index, reward, completion=f"text {index % 7}") for index, reward in enumerate(rewards)]
    settings = Pairing.model_validate({"rule": rule, "max_per_prompt": cap})
    paired = pair_rollouts(rows, settings, iteration=0)
    assert len(paired.pairs) == len(set(sides(paired))) <= cap
    for pair in paired.pairs:
        assert pair.chosen_reward is not None
        assert pair.rejected_reward is not None
        assert pair.chosen_reward - pair.rejected_reward == pair.margin
        assert pair.margin >= settings.minimum_margin
        assert pair.chosen != pair.rejected
    shuffler.shuffle(rows)
    assert pair_rollouts(rows, settings, iteration=0) == paired


def test_gold_is_chosen_over_each_different_rollout() -> None:
    rollouts = [
        rollout(0, "a"),
        rollout(1, "a "),
        rollout(2, "human"),
        rollout(3, "b"),
        rollout(4, "c", finish_reason="length"),
    ]
    paired = pair_with_gold(demonstration(), rollouts, iteration=3)
    assert [(pair.chosen, pair.rejected) for pair in paired.pairs] == [("human", "a"), ("human", "b")]
    assert paired.drops == {"duplicate": 1, "pair of one text": 1, "truncated": 1}
    assert {(pair.rule, pair.margin, pair.chosen_index) for pair in paired.pairs} == {("gold", None, None)}


def test_gold_of_another_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="of one prompt"):
        pair_with_gold(demonstration("q"), [rollout()], iteration=0)


def test_swapping_turns_everything_round_and_twice_is_nothing() -> None:
    (pair,) = pair_rollouts([scored(0, 1.0), scored(1, 0.0)], Pairing(), iteration=0).pairs
    swapped = swap(pair)
    assert (swapped.chosen, swapped.rejected, swapped.margin, swapped.swapped) == (
        pair.rejected,
        pair.chosen,
        -1.0,
        True,
    )
    assert (swapped.chosen_index, swapped.chosen_reward) == (1, 0.0)
    assert swap(swapped) == pair
