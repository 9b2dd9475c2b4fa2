"""Which completion of a pair a judge finds better, by how much, and what becomes of the pair (METHODS 4.4).

Rewards are in [0, 1] and the margin is chosen minus rejected, so the seed's five of ten points are 0.5 here.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import exp
from string import Template
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from models.specs import Settings
from storage.rows import Comparison, Pair, PairFigure
from tasks.asks import PairwiseAsk, ScoresAsk
from tasks.pairs import swap

JUDGED, DISAGREE, NO_LABEL, NO_SCORE = "judged", "orders disagree", "no label", "no score"
LARGEST_FLIP_RATE = 0.45  # the robust loss has a pole at one half
_SCORE = re.compile(r"(?:score\s*[:=]?\s*|\A\s*)(-?\d+(?:\.\d+)?)", re.IGNORECASE)


class Labelling(Settings):
    """What becomes of a pair, by margin. Swap at 5 of 10 points is the seed's, the rest METHODS 4.4's.

    A margin below `small_below`, either way, is small. A rollout that is better by `swap_at` or more takes the
    demonstration's place; one that is better by less is between. Nothing is done to a pair whose demonstration wins.
    """

    swap_at: float | None = Field(default=0.5, gt=0, le=1)  # None: never
    small_below: float = Field(default=0.1, ge=0, le=1)
    small: Literal["keep", "drop"] = "keep"
    between: Literal["keep", "drop", "swap"] = "drop"
    undecided: Literal["keep", "drop"] = "keep"

    @model_validator(mode="after")
    def _thresholds_are_in_order(self) -> "Labelling":
        if self.swap_at is not None and self.swap_at < self.small_below:
            raise ValueError(
                f"swap_at is {self.swap_at} and small_below {self.small_below}, so a small margin would be swapped; "
                "lower small_below"
            )
        return self


class Verdict(NamedTuple):
    """Both rewards, or why there are none."""

    chosen: float | None
    rejected: float | None
    reason: str


class Relabelled(NamedTuple):
    """The pairs that are left, and how many were dropped, by what the judge said of them."""

    pairs: list[Pair]
    drops: Counter[str]


def pairwise_prompt(asks: PairwiseAsk, prompt: str, first: str, second: str) -> str:
    """What a pairwise judge is asked; a `$` in a completion stays one."""
    return Template(asks.text).substitute(prompt=prompt, first=first, second=second)


def score_prompt(asks: ScoresAsk, prompt: str, completion: str) -> str:
    """What a scoring judge is asked; a `$` in the completion stays one."""
    return Template(asks.text).substitute(prompt=prompt, completion=completion)


def read_score(asks: ScoresAsk, written: str) -> float | None:
    """The last score in what a judge wrote, as a share of the highest; None: there is none, or one out of range."""
    found = _SCORE.findall(written)
    value = float(found[-1]) if found else -1.0
    return value / asks.highest if 0 <= value <= asks.highest else None


def read_choice(asks: PairwiseAsk, written: str) -> float | None:
    """1 if a judge wrote the label of the first completion, 0 for the second, None for neither or both."""
    named = [bool(re.search(rf"(?<!\w){re.escape(label)}(?!\w)", written)) for label in (asks.first, asks.second)]
    return None if named[0] == named[1] else float(named[0])


def share_of_first(asks: PairwiseAsk, first_logprob: float, second_logprob: float) -> float | None:
    """p(first) / (p(first) + p(second)); None: the two together are less likely than `minimum_label_mass`."""
    first, second = exp(first_logprob), exp(second_logprob)
    return None if first + second < asks.minimum_label_mass or not first + second else first / (first + second)


def both_orders(chosen_first: float | None, chosen_second: float | None) -> Verdict:
    """The verdict from the share of "first" with the chosen side first, and with it second."""
    if chosen_first is None or chosen_second is None:
        return Verdict(None, None, NO_LABEL)
    if (chosen_first - 0.5) * (0.5 - chosen_second) < 0:
        return Verdict(0.5, 0.5, DISAGREE)
    share = (chosen_first + 1 - chosen_second) / 2
    return Verdict(share, 1 - share, JUDGED)


def each_by_itself(chosen: float | None, rejected: float | None, missing: str) -> Verdict:
    """The verdict from two rewards that know nothing of each other."""
    if chosen is None or rejected is None:
        return Verdict(None, None, missing)
    return Verdict(chosen, rejected, JUDGED)


def bradley_terry(chosen: float | None, rejected: float | None, missing: str) -> Verdict:
    """The verdict from two scores of a reward model: how likely each side is to be preferred."""
    if chosen is None or rejected is None:
        return Verdict(None, None, missing)
    share = 1 / (1 + exp(min(rejected - chosen, 700.0)))
    return Verdict(share, 1 - share, JUDGED)


def bucket_of(margin: float | None, labelling: Labelling) -> str:
    """What a margin says: "undecided", "small margin", "gold better", "own better" or "between"."""
    if margin is None:
        return "undecided"
    if abs(margin) < labelling.small_below or margin == 0:
        return "small margin"
    if margin > 0:
        return "gold better"
    return "own better" if labelling.swap_at is not None and margin <= -labelling.swap_at else "between"


def relabel_pairs(pairs: Iterable[Pair], comparisons: Iterable[Comparison], labelling: Labelling) -> Relabelled:
    """Keep, swap or drop each pair by its judged margin; both come in the same order.

    Raises:
        ValueError: they are not of the same pairs.
    """
    done = {
        "undecided": labelling.undecided,
        "small margin": labelling.small,
        "gold better": "keep",
        "own better": "swap",
        "between": labelling.between,
    }
    left, drops = list[Pair](), Counter[str]()
    for pair, comparison in _joined(pairs, comparisons):
        bucket = bucket_of(comparison.margin, labelling)
        if done[bucket] == "drop":
            drops[f"judged: {bucket}"] += 1
            continue
        judged = with_rewards(pair, comparison)
        left.append(swap(judged) if done[bucket] == "swap" else judged)
    return Relabelled(left, drops)


def with_rewards(pair: Pair, comparison: Comparison) -> Pair:
    """The pair as it is, with what the judge said of it."""
    return replace(
        pair,
        chosen_reward=comparison.chosen_reward,
        rejected_reward=comparison.rejected_reward,
        margin=comparison.margin,
    )


def flip_rate(pairs: Iterable[Pair], ignore_below: float) -> float:
    """Share of the decided pairs, ties left out, whose rejected side the judge finds better; at most 0.45.

    A judge that errs makes it too large where labels are mostly right: it is an estimate, and as good as the judge.

    Raises:
        ValueError: the judge has decided none.
    """
    margins = [pair.margin for pair in pairs if pair.margin is not None and abs(pair.margin) >= max(ignore_below, 1e-9)]
    if not margins:
        raise ValueError("no pair has a judged margin, so there is no flip rate to estimate; is there a judge?")
    return min(sum(margin < 0 for margin in margins) / len(margins), LARGEST_FLIP_RATE)


def lengths(about: str, tokens: Sequence[int]) -> list[PairFigure]:
    """Length statistics of one side, in tokens."""
    values = np.array(tokens)
    told = {"mean": values.mean(), "median": np.median(values), "95th percentile": np.percentile(values, 95)}
    figures = {**told, "longest": values.max()}
    return [
        PairFigure(about=about, name=f"tokens, {name}", value=float(v), n=len(tokens)) for name, v in figures.items()
    ]


def label_figures(
    pairs: Sequence[Pair], comparisons: Sequence[Comparison], labelling: Labelling, noisy_below: float | None
) -> list[PairFigure]:
    """How the judge's margins are spread, and how many of the pairs left are swapped or will be noised."""
    buckets = Counter(bucket_of(row.margin, labelling) for row in comparisons)
    figures = [PairFigure(about="judged", name=name, value=n, n=len(comparisons)) for name, n in buckets.items()]
    own = sum(row.margin is not None and row.margin < 0 for row in comparisons)
    disagree = sum(row.reason == DISAGREE for row in comparisons)
    figures.append(PairFigure(about="judged", name="own preferred at all", value=own, n=len(comparisons)))
    figures.append(PairFigure(about="judged", name=DISAGREE, value=disagree, n=len(comparisons)))
    swapped = sum(pair.swapped for pair in pairs)
    figures.append(PairFigure(about="pairs", name="swapped", value=swapped, n=len(pairs)))
    if noisy_below is not None:
        noisy = sum(pair.margin is not None and abs(pair.margin) < noisy_below for pair in pairs)
        figures.append(PairFigure(about="pairs", name="noised", value=noisy, n=len(pairs)))
    return figures


def _joined(pairs: Iterable[Pair], comparisons: Iterable[Comparison]) -> Iterable[tuple[Pair, Comparison]]:
    for pair, comparison in zip(pairs, comparisons, strict=True):
        if (pair.prompt_id, pair.rejected_index) != (comparison.prompt_id, comparison.rejected_index):
            raise ValueError(
                f"pair {pair.prompt_id}/{pair.rejected_index} stands where {comparison.prompt_id}/"
                f"{comparison.rejected_index} was judged; judge the same pairs"
            )
        yield pair, comparison
