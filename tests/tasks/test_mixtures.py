"""Rows of solving and judging together."""

import pytest

from tasks.judgements import Judge
from tasks.mixtures import ClassMissing, Mixture, held_out_prompts, judge_rows
from tests.tasks.builders import scored

MARKER = "FINAL ANSWER:"


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
