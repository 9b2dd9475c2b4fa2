"""Selection: the funnel, its reasons, and that order does not matter."""

import random
from collections import Counter

import pytest

from tasks.selection import Selection, select_demonstrations
from tests.tasks.builders import scored

ROWS = [
    scored(0, 1.0),
    scored(1, 1.0, completion="completion  0\n"),  # rollout 0 again, but for white space
    scored(2, 1.0),
    scored(3, 0.0),
    scored(4, None),
    scored(5, 1.0, finish_reason="length"),
    scored(6, 1.0, completion=" \n"),
    scored(0, 1.0, prompt_id="q"),
]


def test_every_row_is_kept_or_dropped_for_a_reason() -> None:
    selected = select_demonstrations(ROWS, Selection(max_per_prompt=1), iteration=2)
    assert selected.counts == {
        "sampled": 8,
        "answered": 7,  # all but rollout 4
        "correct": 6,  # all but rollouts 3 and 4
        "after_deduplication": 3,  # p: 0 and 2; q: 0
        "after_cap": 2,  # one each
        "kept": 2,
    }
    assert selected.drops == Counter(
        {
            "mismatch": 1,
            "no final answer": 1,
            "truncated": 1,
            "empty completion": 1,
            "duplicate": 1,
            "over max_per_prompt": 1,
        }
    )
    assert {row.prompt_id for row in selected.demonstrations} == {"p", "q"}
    assert {(row.iteration, row.source, row.reward) for row in selected.demonstrations} == {(2, "fake:tests", 1.0)}


def test_order_of_the_rows_does_not_matter() -> None:
    rows = [scored(index, prompt_id=prompt) for prompt in "abcde" for index in range(6)] + ROWS
    settings = Selection(max_per_prompt=3, target_rows=7)
    expected = select_demonstrations(rows, settings, iteration=0)
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert select_demonstrations(rows, settings, iteration=0) == expected


def test_another_seed_keeps_other_rows() -> None:
    rows = [scored(index) for index in range(50)]
    kept = [select_demonstrations(rows, Selection(seed=seed), iteration=0).demonstrations for seed in (0, 1)]
    assert kept[0] != kept[1]
    assert len(kept[0]) == len(kept[1]) == 10


def test_target_is_spread_over_prompts() -> None:
    rows = [scored(index, prompt_id=prompt) for prompt in "abc" for index in range(4)]
    selected = select_demonstrations(rows, Selection(target_rows=5), iteration=0)
    # 5 of 3 prompts: each has one before any has two, so two prompts have two and one has one
    assert sorted(Counter(row.prompt_id for row in selected.demonstrations).values()) == [1, 2, 2]
    assert selected.drops == {"over target_rows": 7}


def test_duplicates_stay_where_they_are_wanted() -> None:
    rows = [scored(index, completion="same") for index in range(3)]
    assert len(select_demonstrations(rows, Selection(deduplicate=False), iteration=0).demonstrations) == 3
    assert [row.rollout_index for row in select_demonstrations(rows[::-1], Selection(), 0).demonstrations] == [0]


def test_unfiltered_control_keeps_the_wrong_and_the_undecided() -> None:
    selected = select_demonstrations(ROWS, Selection(keep="all"), iteration=0)
    assert [(row.prompt_id, row.rollout_index) for row in selected.demonstrations] == [
        ("p", 0), ("p", 2), ("p", 3), ("p", 4), ("q", 0)
    ]  # fmt: skip
    assert selected.drops == {"truncated": 1, "empty completion": 1, "duplicate": 1}
    assert selected.counts["correct"] == 6


def test_completion_ends_after_its_answer_and_then_may_be_a_duplicate() -> None:
    rows = [scored(n, completion=f"12 + 7 = 19\nFINAL ANSWER: 19\nQuestion: {n}") for n in range(2)]
    selected = select_demonstrations(rows, Selection(), iteration=0, marker="FINAL ANSWER:")
    assert [row.completion for row in selected.demonstrations] == ["12 + 7 = 19\nFINAL ANSWER: 19"]
    assert selected.drops == {"duplicate": 1}
    as_they_are = select_demonstrations(rows, Selection(trim_after_answer=False), iteration=0, marker="FINAL ANSWER:")
    assert [row.completion for row in as_they_are.demonstrations] == [row.completion for row in rows]


@pytest.mark.parametrize(("minimum", "kept"), [(0.5, [1, 2]), (1.0, [2])])
def test_minimum_reward_is_inclusive(minimum: float, kept: list[int]) -> None:
    rows = [scored(0, 0.4), scored(1, 0.5), scored(2, 1.0)]
    selected = select_demonstrations(rows, Selection(minimum_reward=minimum), iteration=0)
    assert [row.rollout_index for row in selected.demonstrations] == kept


def test_no_rows_select_nothing() -> None:
    assert select_demonstrations([], Selection(), iteration=0).counts["sampled"] == 0
