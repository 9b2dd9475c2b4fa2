"""Which APO loss a judge's verdicts lead to, and which prompts and pairs it is asked about."""

from collections.abc import Sequence

import pytest

from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import ChatPair, Comparison, Pair, Prompt, Rollout
from tasks.anchoring import choose_anchor, draw_pair_prompts, pair_with_own


def compared(margins: Sequence[float | None]) -> DatasetRef:
    rows = [
        Comparison(
            prompt_id=str(n), rejected_index=0, chosen_reward=None, rejected_reward=None, margin=margin,
            reason="judged", judge="j",
        )
        for n, margin in enumerate(margins)
    ]  # fmt: skip
    return write_rows(rows, Comparison, step="compared")


def pairs(*roles: list[str]) -> DatasetRef:
    rows = [
        ChatPair(
            prompt_id=str(n), roles=names, contents=[f"{n}"] * len(names), chosen="good", rejected="bad", source="s",
            licence="mit", line=n,
        )
        for n, names in enumerate(roles)
    ]  # fmt: skip
    return write_rows(rows, ChatPair, step="chat_pairs")


def rollout(prompt_id: str, completion: str, finish_reason: str = "stop") -> Rollout:
    return Rollout(
        prompt_id=prompt_id, rollout_index=0, prompt=prompt_id, completion=completion, prompt_tokens=1,
        completion_tokens=1, finish_reason=finish_reason, cumulative_logprob=None, seed=0, policy="p",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("margins", "loss", "share"),
    [
        ([0.2, 0.4, -0.1], "apo_zero", 2 / 3),
        ([0.2, -0.4, -0.1], "apo_down", 1 / 3),
        ([0.2, -0.4], "apo_down", 0.5),  # no better than the policy's own: nothing to pull it up to
        ([0.0, 0.1, None, None], "apo_zero", 0.75),  # a tie counts half, the undecided not at all
    ],
)
def test_chosen_texts_better_than_the_policys_own_are_pulled_up_to(
    margins: list[float | None], loss: str, share: float
) -> None:
    anchor = choose_anchor.fn(compared(margins))
    assert anchor.loss == loss
    assert anchor.share == pytest.approx(share)
    assert anchor.n == sum(margin is not None for margin in margins)
    assert anchor.low < anchor.share < anchor.high


def test_without_a_verdict_nothing_is_chosen() -> None:
    with pytest.raises(ValueError, match="set one by hand"):
        choose_anchor.fn(compared([None]))


def test_prompts_that_are_one_message_are_drawn() -> None:
    made = pairs(["user"], ["system", "user"], ["user", "assistant", "user"], ["user"])
    drawn = list(read_rows(draw_pair_prompts.fn(made, 10, 0), Prompt))
    assert {row.prompt_id for row in drawn} == {"0", "3"}
    with pytest.raises(ValueError, match="no prompt of the pairs is a single user message"):
        draw_pair_prompts.fn(pairs(["system", "user"]), 10, 0)


def test_own_replies_that_are_cut_empty_or_the_same_are_not_judged() -> None:
    made = pairs(["user"], ["user"], ["user"], ["user"])
    rows = [rollout("0", "own"), rollout("1", "good "), rollout("2", "cu", "length"), rollout("3", " ")]
    (pair,) = read_rows(pair_with_own.fn(write_rows(rows, Rollout, step="rollouts"), made, 2), Pair)
    assert (pair.prompt_id, pair.chosen, pair.rejected, pair.rejected_index) == ("0", "good", "own", 0)
