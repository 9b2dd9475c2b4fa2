"""How many rollouts each prompt gets, decided after complete passes from what their rollouts came to.

A pass rate that is known from an earlier iteration spares draws that most likely find nothing new: prompts that tell
nothing in one epoch seldom do in the next (GRESO, Zheng et al. 2025, arXiv:2506.02177, section 3). Theirs skips such
prompts by chance; ours gives them the first pass, and goes on where that turns out otherwise.
"""

import random
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from models.specs import Adaptive, AnswerSampling
from storage.rows import PassRate, ScoredRollout
from tasks.metrics import CORRECT
from tasks.selection import same_text

ENOUGH, CAPPED, UNCHANGED, FAILED, LACKING = "enough", "at the cap", "as before", "engine error", "lacking"


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
            texts[row.reward >= CORRECT].add(same_text(row.completion))
    return Tally(rollouts, len(texts[True]), len(texts[False]), failed)


def standing(tally: Tally, known: PassRate | None, sampling: AnswerSampling) -> str:
    """Whether a prompt gets more rollouts ("lacking"), or why it does not.

    "as before": in a full try, one with more than the first pass, the prompt had no correct or no incorrect rollout,
    and the first pass again has none. As its pass rate is then of a first pass only, it is tried in full next time.
    """
    adaptive = _adaptive(sampling)
    lacks_correct = tally.correct < adaptive.wanted_correct
    lacks_incorrect = tally.incorrect < adaptive.wanted_incorrect
    if tally.failed:
        return FAILED
    if not lacks_correct and not lacks_incorrect:
        return ENOUGH
    if tally.rollouts >= sampling.cap:
        return CAPPED
    if known is not None and known.rollouts > adaptive.first and tally.rollouts <= adaptive.first:
        none_correct = lacks_correct and not known.correct and not tally.correct
        none_incorrect = lacks_incorrect and not known.incorrect and not tally.incorrect
        return UNCHANGED if none_correct or none_incorrect else LACKING
    return LACKING


def next_pass(
    tallies: Mapping[str, Tally], known: Mapping[str, PassRate], sampling: AnswerSampling, seed: int
) -> dict[str, int]:
    """How many more rollouts the prompts that lack some get; empty: sampling is over.

    The budget goes first to where a new text of a kind that lacks is likeliest, by Laplace's rule of succession over
    three kinds (correct, incorrect, neither); equals are put in a seeded order. The order of the prompts is no matter.

    Args:
        tallies: of all prompts, after a complete pass.
    """
    adaptive = _adaptive(sampling)
    left = sampling.rollouts_per_prompt * len(tallies) - sum(one.rollouts for one in tallies.values())
    lacking = [name for name, one in tallies.items() if standing(one, known.get(name), sampling) == LACKING]
    lacking.sort(key=lambda name: (-_chance(tallies[name], adaptive), random.Random(f"{seed}:{name}").random(), name))
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
    correct = sum(row.reward is not None and row.reward >= CORRECT for row in rollouts)
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
        first_correct=sum(row.reward is not None and row.reward >= CORRECT for row in early),
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


def _chance(tally: Tally, adaptive: Adaptive) -> float:
    kinds = ((tally.correct, adaptive.wanted_correct), (tally.incorrect, adaptive.wanted_incorrect))
    return sum(found + 1 for found, wanted in kinds if found < wanted) / (tally.rollouts + 3)
