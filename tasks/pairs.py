"""Pairs of rollouts of one prompt, one preferred. Never a tie, an undecided or truncated row, or one text twice."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from math import lcm
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from models.specs import Settings
from storage.rows import Demonstration, Pair, Rollout
from tasks.selection import AnyScored, same_text

Written = Demonstration | Rollout | AnyScored
Read = tuple[AnyScored, str]  # a row, and the text that it is compared by


class Pairing(Settings):
    """How pairs are put together.

    `zip` walks the longer side once and repeats the shorter one, at most `max_loop` times (AutoIF, METHODS 5.4). `walk`
    goes round both sides in step until it has `max_per_prompt` different pairs, 10 in Iterative RPO (METHODS 2.7).
    `best_worst` makes one pair of the two ends and needs no thresholds. Thresholds are AutoIF's: METHODS 5.2,
    chosen >= 0.5, rejected == 0.
    """

    rule: Literal["zip", "best_worst", "walk"] = "zip"
    chosen_minimum: float = Field(default=0.5, gt=0, le=1)
    rejected_maximum: float = Field(default=0.0, ge=0, lt=1)
    minimum_margin: float = Field(default=0.1, gt=0, le=1)  # chosen_reward - rejected_reward
    max_per_prompt: int = Field(default=10, ge=1)
    max_loop: int | None = Field(default=None, ge=1)  # zip only; None: as often as the longer side needs
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _sides_are_apart(self) -> "Pairing":
        if self.rejected_maximum >= self.chosen_minimum:
            raise ValueError(
                f"rejected_maximum is {self.rejected_maximum} and chosen_minimum {self.chosen_minimum}, so one rollout "
                "could stand on both sides; lower rejected_maximum or raise chosen_minimum"
            )
        return self


class Paired(NamedTuple):
    """Pairs, and what was dropped by reason: rollouts, prompts ("prompt without ...") and pairs ("pair ...")."""

    pairs: list[Pair]
    drops: Counter[str]


def pair_rollouts(scored: Sequence[AnyScored], settings: Pairing, iteration: int) -> Paired:
    """Pairs of one prompt's rollouts, the same whatever their order.

    Raises:
        ValueError: the rollouts are of two prompts.
    """
    _of_one_prompt(row.prompt_id for row in scored)
    drops: Counter[str] = Counter()
    rows = [(row, same_text(row.completion)) for row in _usable(scored, settings, drops)]
    if settings.rule == "best_worst":
        rows.sort(key=_reward, reverse=True)  # stable: rows of equal reward keep their seeded order
        chosen, rejected = rows[:1], rows[1:][-1:]
        drops["between best and worst"] += max(0, len(rows) - 2)
    else:
        above = [row for row in rows if _reward(row) >= settings.chosen_minimum]
        below = [row for row in rows if _reward(row) <= settings.rejected_maximum]
        drops["between the thresholds"] += len(rows) - len(above) - len(below)
        chosen, rejected = _distinct(above, drops), _distinct(below, drops)
    drops["prompt without a chosen"] += not chosen
    drops["prompt without a rejected"] += not rejected
    if not chosen or not rejected:
        return Paired([], +drops)
    # going round in step comes back to the first pair after the least common multiple of the lengths
    rounds = lcm(len(chosen), len(rejected))
    if settings.rule == "zip":
        shorter, longer = sorted((len(chosen), len(rejected)))
        rounds = longer if settings.max_loop is None else min(longer, settings.max_loop * shorter)
        drops["over max_loop"] += longer - rounds
    in_step = ((chosen[n % len(chosen)], rejected[n % len(rejected)]) for n in range(rounds))
    sound = (pair for pair in in_step if _is_sound(*pair, settings, drops))
    pairs = [
        pair_of(good[0], bad[0], (_reward(good), _reward(bad)), settings.rule, iteration)
        for good, bad in islice(sound, settings.max_per_prompt)
    ]
    if settings.rule == "zip":
        drops["pair over max_per_prompt"] += sum(1 for _ in sound)
    return Paired(pairs, +drops)


def pair_with_gold(demonstration: Demonstration, rollouts: Sequence[Rollout], iteration: int) -> Paired:
    """Pairs of SPIN: the demonstration is chosen, each different rollout of its prompt rejected once.

    Truncated rollouts are dropped: length alone would tell the sides apart (METHODS 4.6, 9.8).

    Raises:
        ValueError: a rollout is of another prompt than the demonstration.
    """
    _of_one_prompt([demonstration.prompt_id, *(row.prompt_id for row in rollouts)])
    drops: Counter[str] = Counter()
    seen: set[str] = set()
    pairs = []
    for row in sorted(rollouts, key=lambda row: row.rollout_index):
        text = same_text(row.completion)
        if row.finish_reason == "length":
            drops["truncated"] += 1
        elif row.finish_reason == "error":
            drops["engine error"] += 1
        elif text == same_text(demonstration.completion):
            drops["pair of one text"] += 1
        elif text in seen:
            drops["duplicate"] += 1
        else:
            pairs.append(pair_of(demonstration, row, (demonstration.reward, None), "gold", iteration))
        seen.add(text)
    return Paired(pairs, drops)


def pair_of(
    chosen: Written, rejected: Written, rewards: tuple[float | None, float | None], rule: str, iteration: int
) -> Pair:
    """A pair of two completions of one prompt. `rewards`: of the chosen and of the rejected, None: unknown."""
    good, bad = rewards
    return Pair(
        prompt_id=chosen.prompt_id,
        iteration=iteration,
        prompt=chosen.prompt,
        chosen=chosen.completion,
        rejected=rejected.completion,
        chosen_index=chosen.rollout_index,
        rejected_index=rejected.rollout_index,
        chosen_reward=good,
        rejected_reward=bad,
        margin=None if good is None or bad is None else good - bad,
        rule=rule,
        swapped=False,
    )


def swap(pair: Pair) -> Pair:
    """The pair turned round: texts, indices and rewards change sides, the margin its sign."""
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_index=pair.rejected_index,
        rejected_index=pair.chosen_index,
        chosen_reward=pair.rejected_reward,
        rejected_reward=pair.chosen_reward,
        margin=None if pair.margin is None else -pair.margin,
        swapped=not pair.swapped,
    )


def _of_one_prompt(prompt_ids: Iterable[str]) -> None:
    if len(different := sorted(set(prompt_ids))) > 1:
        raise ValueError(
            f"a pair is made of rollouts of one prompt, these are of {len(different)}: {different[:3]!r}; "
            "group the rows by prompt_id first"
        )


def _usable(scored: Sequence[AnyScored], settings: Pairing, drops: Counter[str]) -> list[AnyScored]:
    usable = []
    for row in sorted(scored, key=lambda row: row.rollout_index):
        if row.finish_reason == "length":  # on either side: length alone would tell them apart (METHODS 9.8)
            drops["truncated"] += 1
        elif row.reward is None:
            drops[f"undecided: {row.reason}"] += 1
        else:
            usable.append(row)
    if usable:
        random.Random(f"{settings.seed}:{usable[0].prompt_id}").shuffle(usable)
    return usable


def _distinct(rows: list[Read], drops: Counter[str]) -> list[Read]:
    first: dict[str, Read] = {}
    for row in rows:
        first.setdefault(row[1], row)
    drops["duplicate"] += len(rows) - len(first)
    return list(first.values())


def _is_sound(chosen: Read, rejected: Read, settings: Pairing, drops: Counter[str]) -> bool:
    if chosen[1] == rejected[1]:
        drops["pair of one text"] += 1
        return False
    if _reward(chosen) - _reward(rejected) < settings.minimum_margin:
        drops["pair below minimum_margin"] += 1
        return False
    return True


def _reward(row: Read) -> float:
    assert row[0].reward is not None  # _usable has dropped the undecided
    return row[0].reward
