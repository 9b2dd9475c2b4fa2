"""Pairs and a policy -> its own replies beside the chosen ones, and the APO loss that suits them (METHODS 6.4)."""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import ChatPair, Comparison, Pair, Prompt, Rollout
from tasks.caching import log_counts, step
from tasks.metrics import wilson


class Anchor(NamedTuple):
    """The loss to train with, a sentence that explains it, and its figures."""

    loss: Literal["apo_zero", "apo_down"]
    reason: str
    share: float  # of the judged pairs in which the chosen text is better than the policy's own; a tie counts half
    low: float  # 95 % interval
    high: float
    n: int


@step(version="1")
def draw_pair_prompts(pairs: DatasetRef, count: int, seed: int) -> DatasetRef:
    """Some of the prompts of the pairs, of those that are one message: others cannot be sampled by themselves."""
    alone = {row.prompt_id: row for row in read_rows(pairs, ChatPair) if row.roles == ["user"]}
    drawn = random.Random(f"{seed}:anchor").sample(sorted(alone), min(count, len(alone)))
    log_counts({"kept": len(drawn), "prompts that are not one message": pairs.rows - len(alone)})
    if not drawn:
        raise ValueError(
            "no prompt of the pairs is a single user message, so the policy's own replies cannot be drawn for them; "
            "remove `auto` and set preference.loss_type to [apo_zero] or [apo_down]"
        )
    prompts = (
        Prompt(prompt_id=one, source=alone[one].source, prompt=alone[one].contents[0], answer=None) for one in drawn
    )
    return write_rows(prompts, Prompt, step="pair_prompts", parents=[pairs])


@step(version="1")
def pair_with_own(rollouts: DatasetRef, pairs: DatasetRef, iteration: int) -> DatasetRef:
    """The chosen text of each prompt against the policy's own, finished and not the same."""
    chosen = {row.prompt_id: row for row in read_rows(pairs, ChatPair)}
    counts: Counter[str] = Counter()

    def rows() -> Iterator[Pair]:
        for own in read_rows(rollouts, Rollout):
            one = chosen[own.prompt_id]
            if own.finish_reason != "stop" or not own.completion.strip():
                counts["own reply is cut or empty"] += 1
            elif own.completion.strip() == one.chosen.strip():
                counts["own reply is the chosen one"] += 1
            else:
                counts["pairs"] += 1
                yield Pair(
                    prompt_id=own.prompt_id,
                    iteration=iteration,
                    prompt=own.prompt,
                    chosen=one.chosen,
                    rejected=own.completion,
                    chosen_index=None,
                    rejected_index=own.rollout_index,
                    chosen_reward=None,
                    rejected_reward=None,
                    margin=None,
                    rule="own",
                    swapped=False,
                )

    made = write_rows(rows(), Pair, step="own_pairs", parents=[rollouts, pairs])
    log_counts(counts)
    return made


@step(version="1", assumed=Anchor("apo_zero", "not decided yet", 0.5, 0.0, 1.0, 0))
def choose_anchor(compared: DatasetRef) -> Anchor:
    """apo_zero where the chosen texts are better than what the policy writes, apo_down where they are not.

    apo_zero makes the chosen text more likely, which helps only if it is better than the policy's own.

    Raises:
        ValueError: the judge decided no pair.
    """
    margins = [row.margin for row in read_rows(compared, Comparison) if row.margin is not None]
    if not margins:
        raise ValueError("the judge decided no pair, so nothing chooses between apo_zero and apo_down; set one by hand")
    wins = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins)
    share, interval = wins / len(margins), wilson(wins, len(margins))
    loss: Literal["apo_zero", "apo_down"] = "apo_zero" if share > 0.5 else "apo_down"
    reason = (
        f"{loss}: the judge finds the chosen text better than the policy's own in {100 * share:.1f} % of "
        f"{len(margins):,} pairs (95 % interval {100 * interval.low:.1f} to {100 * interval.high:.1f})"
    )
    log_counts(
        {"chosen text is better": sum(m > 0 for m in margins), "own text is better": sum(m < 0 for m in margins)}
    )
    return Anchor(loss, reason, share, interval.low, interval.high, len(margins))
