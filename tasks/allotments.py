"""How many rollouts each prompt gets, decided after complete passes from what their rollouts came to.

Pass rates known from an earlier iteration say where the budget goes first. GRESO (Zheng et al. 2025, arXiv:2506.02177)
skips prompts that told nothing an epoch before; measured here (benchmarks/README.md), leaving them at the first pass
lost more than it saved, for the policy learns in between. So what is known puts prompts in order, and rules out none.
"""

import random
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from models.specs import Adaptive, AnswerSampling
from storage.rows import PassRate, ScoredRollout
from tasks.metrics import is_correct
from tasks.selection import same_text

ENOUGH, CAPPED, FAILED, LACKING = "enough", "at the cap", "engine error", "lacking"


class Tally(NamedTuple):
    """What the rollouts of one prompt came to so far."""

    rollouts: int
    correct: int  # different texts
    incorrect: int  # different texts
    failed: bool = False  # the engine could not draw one


def tally(rows: Iterable[ScoredRollout]) -> Tally:
    """Count the rollouts of one prompt."""
    rollouts, failed = 0, False
    texts: dict[bool, set[str]] = {True: set(), False: set()}
    for row in rows:
        rollouts += 1
        failed = failed or row.finish_reason == "error"
        if row.reward is not None:
            texts[is_correct(row.reward)].add(same_text(row.completion))
    return Tally(rollouts, len(texts[True]), len(texts[False]), failed)


def standing(tally: Tally, sampling: AnswerSampling) -> str:
    """Whether a prompt may get more rollouts ("lacking"), or why it does not."""
    adaptive = _adaptive(sampling)
    if tally.failed:
        return FAILED
    if tally.correct >= adaptive.wanted_correct and tally.incorrect >= adaptive.wanted_incorrect:
        return ENOUGH
    return CAPPED if tally.rollouts >= sampling.cap else LACKING


def next_pass(
    tallies: Mapping[str, Tally], known: Mapping[str, PassRate], sampling: AnswerSampling, seed: int
) -> dict[str, int]:
    """How many more rollouts the prompts that lack some get; empty: sampling is over.

    The budget goes first to where a text of a kind that lacks is likeliest, by Laplace's rule of succession over three
    kinds (correct, incorrect, neither); what was known before counts as one first pass more. Equals are put in a seeded
    order, and the order of the prompts is no matter.

    Args:
        tallies: of all prompts, after a complete pass.
        known: pass rates of earlier iterations, of any prompts.
    """
    adaptive = _adaptive(sampling)
    left = sampling.rollouts_per_prompt * len(tallies) - sum(one.rollouts for one in tallies.values())
    lacking = [name for name, one in tallies.items() if standing(one, sampling) == LACKING]
    chances = {name: _chance(tallies[name], known.get(name), adaptive) for name in lacking}
    lacking.sort(key=lambda name: (-chances[name], random.Random(f"{seed}:{name}").random(), name))
    given: dict[str, int] = {}
    for name in lacking:
        count = min(adaptive.more, sampling.cap - tallies[name].rollouts, left)
        if count <= 0:
            break
        given[name] = count
        left -= count
    return given


def pass_rate(rows: Iterable[ScoredRollout], first: int, iteration: int) -> PassRate:
    """What the rollouts of one prompt came to.

    Args:
        first: rollouts with an index below this were drawn whatever came of them.
    """
    rollouts = list(rows)
    correct = sum(is_correct(row.reward) for row in rollouts)
    decided = sum(row.reward is not None for row in rollouts)
    early = [row for row in rollouts if row.rollout_index < first]
    return PassRate(
        prompt_id=rollouts[0].prompt_id,
        iteration=iteration,
        rollouts=len(rollouts),
        correct=correct,
        incorrect=decided - correct,
        undecided=len(rollouts) - decided,
        first_rollouts=len(early),
        first_correct=sum(is_correct(row.reward) for row in early),
    )


def mean_pass_rate(rates: Iterable[PassRate]) -> float:
    """The chance that a single rollout is correct, each prompt counting once, from rollouts that nothing chose."""
    shares = [rate.first_correct / rate.first_rollouts for rate in rates]
    return sum(shares) / len(shares)


def told(rates: Iterable[PassRate]) -> str | None:
    """What the numbers of rollouts mean for the share of correct ones; None: there are as many of each prompt."""
    rows = list(rates)
    numbers = {row.rollouts for row in rows}
    if len(numbers) == 1:
        return None
    return (
        f"Rollouts were drawn adaptively, {min(numbers):,} to {max(numbers):,} a prompt, so the share of correct ones "
        f"is no pass rate; by the first rollouts of each of the {len(rows):,} prompts, that is "
        f"{100 * mean_pass_rate(rows):.1f} %."
    )


def _adaptive(sampling: AnswerSampling) -> Adaptive:
    assert sampling.adaptive is not None  # others are not allotted any
    return sampling.adaptive


def _chance(tally: Tally, known: PassRate | None, adaptive: Adaptive) -> float:
    """That the next rollout of a prompt is of a kind it lacks."""
    before = 0.0 if known is None else adaptive.first / known.rollouts
    likely = 0.0
    if tally.correct < adaptive.wanted_correct:
        likely += tally.correct + 1 + (before * known.correct if known is not None else 0.0)
    if tally.incorrect < adaptive.wanted_incorrect:
        likely += tally.incorrect + 1 + (before * known.incorrect if known is not None else 0.0)
    return likely / (tally.rollouts + 3 + (adaptive.first if known is not None else 0))
