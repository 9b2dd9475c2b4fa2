"""Rows of two tasks, solving and judging, to be trained together: how many of which, and which are held out."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil
from typing import Literal, NamedTuple

from pydantic import Field

from models.specs import PromptTemplate, Settings
from storage.rows import Demonstration, ScoredRollout
from tasks.judgements import Judge, filled_template, judge_prompt
from tasks.selection import same_text


class Mixture(Settings):
    """How solving and judging are trained together. Judge rows are half positive, half negative.

    balance prompt: each prompt gives as many positive as negative rows, so that nothing can be learnt from how hard it
    looks; set: only the two sums are equal, and prompts that are always or never solved count too.
    """

    judge_rows_per_solve: float = Field(default=1.0, gt=0)
    judge_rows_per_prompt: int = Field(default=2, ge=1)  # of each label, at most
    balance: Literal["prompt", "set"] = "prompt"
    held_out_share: float = Field(default=0.05, ge=0, lt=1)  # of the prompts: not trained on, for the loss of each task
    seed: int = Field(default=0, ge=0)


class ClassMissing(ValueError):
    """There is nothing to tell apart: no rollout is right, or none is wrong."""


class Mixed(NamedTuple):
    """Rows of both tasks, and counts of them and of what was left out."""

    rows: list[Demonstration]
    counts: Counter[str]


def judge_rows(
    scored: Iterable[ScoredRollout], judge: Judge, mixture: Mixture, wanted: int, iteration: int, marker: str
) -> Mixed:
    """Rows to learn judging from: as many positive as negative, at most `wanted`, the same whatever the order.

    Raises:
        ClassMissing: all decided rollouts are right, or all are wrong.
    """
    counts: Counter[str] = Counter()
    classes: dict[bool, list[ScoredRollout]] = {True: [], False: []}
    by_prompt: dict[str, list[ScoredRollout]] = {}
    for row in scored:
        if row.finish_reason != "stop" or row.reward is None:
            counts["not judged in training: undecided"] += 1
        else:
            by_prompt.setdefault(row.prompt_id, []).append(row)
    for prompt_id in sorted(by_prompt):
        kinds = {right: _drawn(by_prompt[prompt_id], mixture, right=right) for right in classes}
        most = min(map(len, kinds.values())) if mixture.balance == "prompt" else None
        for right, drawn in kinds.items():
            classes[right] += drawn[:most]
            counts["judge rows over balance or ratio"] += len(drawn) - len(drawn[:most])
    if not (classes[True] and classes[False]):
        raise ClassMissing(_what_is_missing(by_prompt.values()))
    size = min(len(classes[True]), len(classes[False]), max(1, wanted // 2))
    rows = []
    for right, kind in classes.items():
        kept = sorted(kind, key=lambda row: _place(row, mixture))[:size]
        counts["judge rows over balance or ratio"] += len(kind) - size
        rows += [_judge_row(row, judge, iteration, marker, right=right) for row in kept]
    counts["judge_rows"] = len(rows)
    rows.sort(key=lambda row: (row.prompt_id, row.rollout_index or 0))
    return Mixed(rows, counts)


def solve_row(row: Demonstration, template: PromptTemplate) -> Demonstration:
    """The row with the whole user message for its prompt, to stand beside judge rows."""
    return replace(row, prompt=filled_template(template, row.prompt))


def held_out_prompts(prompt_ids: Iterable[str], mixture: Mixture) -> set[str]:
    """The prompts whose rows, of both tasks, are kept out of training for the loss of each task; at least one."""
    different = sorted(set(prompt_ids))
    random.Random(f"{mixture.seed}:held out").shuffle(different)
    return set(different[: ceil(mixture.held_out_share * len(different))])


def _drawn(rows: Sequence[ScoredRollout], mixture: Mixture, *, right: bool) -> list[ScoredRollout]:
    """Up to `judge_rows_per_prompt` different texts of one prompt and class, drawn by seed."""
    different: dict[str, ScoredRollout] = {}
    for row in sorted(rows, key=lambda row: row.rollout_index):
        if (row.reward == 1) is right:
            different.setdefault(same_text(row.completion), row)
    drawn = list(different.values())
    if drawn:
        random.Random(f"{mixture.seed}:{drawn[0].prompt_id}").shuffle(drawn)
    return drawn[: mixture.judge_rows_per_prompt]


def _place(row: ScoredRollout, mixture: Mixture) -> tuple[float, int]:
    """By prompt, so that what is kept stays balanced within each where it was."""
    return random.Random(f"{mixture.seed}:{row.prompt_id}").random(), row.rollout_index


def _judge_row(row: ScoredRollout, judge: Judge, iteration: int, marker: str, *, right: bool) -> Demonstration:
    return Demonstration(
        task="judge",
        prompt_id=row.prompt_id,
        rollout_index=row.rollout_index,
        iteration=iteration,
        prompt=judge_prompt(judge, row.prompt, row.completion, marker),
        completion=judge.positive if right else judge.negative,
        reward=1.0,  # of this row: the label is right; what it says of the rollout is the completion
        source=row.policy,
    )


def _what_is_missing(prompts: Iterable[Sequence[ScoredRollout]]) -> str:
    rewards = [{row.reward == 1 for row in rows} for rows in prompts]
    advice = "draw more rollouts or at a higher temperature, or use prompts of mixed difficulty"
    if len(set().union(*rewards)) == 2:
        return (
            f"none of {len(rewards):,} prompts has both a right and a wrong rollout, which mixture.balance 'prompt' "
            f"wants: {advice}, or set it to 'set'"
        )
    missing = "wrong" if {True} in rewards else "right"
    return (
        f"no decided rollout of {len(rewards):,} prompts is {missing}, and a judge is trained on both kinds: {advice}"
    )
