"""What a policy scored, prompt by prompt and in one figure with its interval. The prompt is the unit of every interval.

An undecided rollout counts as not correct here, since a policy that gives no answer has not answered; how many there
were stands beside the figure. `mean_reward`, which describes training rows, leaves them out.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from math import comb, sqrt
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from models.specs import Sampling, Settings
from storage.rows import EvaluatedPrompt, Metric, ScoredRollout
from tasks.answers import answer_group

CORRECT = 1.0  # the reward from which on a rollout counts as correct
Z = 1.959963984540054  # of a 95 % interval
RESAMPLES = 10_000
NUMBERS_AT_ONCE = 2_000_000  # of resampling; bounds its memory to some 50 MB
ENUMERATED = 12  # up to so many prompts that differ, all sign flips are tried instead of drawn

Numbers = NDArray[np.float64]


class Strategy(Settings):
    """A way to turn the rollouts of a prompt into one value. `mean` is the chance that a single rollout is correct."""

    kind: Literal["greedy", "mean", "likelihood", "pass", "maj"]
    k: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_rollout_is_one(self) -> "Strategy":
        if self.kind in ("greedy", "mean") and self.k != 1:
            raise ValueError(f"strategy {self.kind!r} looks at single rollouts, so k is 1; found k={self.k}")
        return self

    @property
    def name(self) -> str:
        """As in reports: "greedy", "mean@1", "best-of-5 by likelihood", "pass@16", "maj@16"."""
        special = {"greedy": "greedy", "likelihood": f"best-of-{self.k} by likelihood"}
        return special.get(self.kind, f"{self.kind}@{self.k}")

    def check(self, sampling: Sampling) -> None:
        """Raise a ValueError where this sampling cannot give the figure, before anything is sampled."""
        if self.k > sampling.rollouts_per_prompt:
            raise ValueError(
                f"rollouts_per_prompt is {sampling.rollouts_per_prompt} but {self.name} was asked for; "
                f"raise it to {self.k} or drop k={self.k}"
            )
        if self.kind == "greedy" and sampling.temperature > 0:
            raise ValueError(
                f"temperature is {sampling.temperature} but greedy was asked for; set it to 0 or ask for mean@1"
            )


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """Candidate minus incumbent over the same prompts. p_value: one-sided, that the candidate is not better."""

    difference: float
    low: float  # 95 % interval
    high: float
    p_value: float
    n: int  # prompts


def is_correct(reward: float | None) -> bool:
    """Whether a rollout of this reward counts as correct; one that is undecided does not."""
    return reward is not None and reward >= CORRECT


def parse_strategy(name: str) -> Strategy:
    """The strategy of this name.

    Raises:
        ValueError: there is none of this name; lists those there are.
    """
    if name == "greedy":
        return Strategy(kind="greedy")
    if likelihood := re.fullmatch(r"best-of-([0-9]+) by likelihood", name):
        return Strategy(kind="likelihood", k=int(likelihood[1]))
    match name.partition("@"):
        case ("mean" | "pass" | "maj") as kind, "@", k if re.fullmatch(r"[0-9]+", k):
            return Strategy(kind=kind, k=int(k))
    raise ValueError(
        f"no strategy is called {name!r}; there are 'greedy', 'mean@1', 'best-of-K by likelihood', 'pass@K' and 'maj@K'"
    )


def evaluate_prompt(scored: Sequence[ScoredRollout], strategy: Strategy) -> EvaluatedPrompt:
    """What a strategy scored on one prompt. Where there are more rollouts than it wants, the first by index count.

    Raises:
        ValueError: the rollouts are of several prompts, fewer than k, or without the log-probs that are asked for.
    """
    rows = sorted(scored, key=lambda row: row.rollout_index)
    if len({row.prompt_id for row in rows}) != 1 or len(rows) < strategy.k:
        raise ValueError(
            f"{strategy.name} needs {strategy.k} or more rollouts of one prompt; found {len(rows)} rollouts of "
            f"prompts {sorted({row.prompt_id for row in rows})[:3]!r}; raise rollouts_per_prompt or drop the strategy"
        )
    if strategy.kind not in ("mean", "pass"):
        rows = rows[: strategy.k]
    picked = _picked(rows, strategy)
    if strategy.kind == "pass":
        value = pass_at_k(len(rows), sum(is_correct(row.reward) for row in rows), strategy.k)
    elif strategy.kind == "mean":
        value = sum(row.reward or 0.0 for row in rows) / len(rows)
    else:
        value = 0.0 if picked is None else picked.reward or 0.0
    return EvaluatedPrompt(
        prompt_id=rows[0].prompt_id,
        strategy=strategy.name,
        value=value,
        rollouts=len(rows),
        k=strategy.k,
        undecided=sum(row.reward is None for row in rows),
        answer=None if picked is None else picked.answer,
    )


def summarise(evaluated: Sequence[EvaluatedPrompt], split: str, seed: int = 0) -> Metric:
    """The mean of one strategy over its prompts, with a 95 % interval: Wilson's for yes or no, else the bootstrap's.

    Raises:
        ValueError: there are no rows, rows of several strategies, or two rows of one prompt.
    """
    strategies = sorted({row.strategy for row in evaluated})
    prompts = len({row.prompt_id for row in evaluated})
    if len(strategies) != 1 or prompts != len(evaluated):
        raise ValueError(
            f"a figure sums up one strategy with one row a prompt; found {len(evaluated)} rows of {prompts} prompts "
            f"and strategies {strategies!r}; group the rows by strategy first"
        )
    values = [row.value for row in evaluated]
    low, high = interval_of_mean(values, seed)
    value = sum(values) / len(values)
    return Metric(
        split=split, strategy=strategies[0], value=value, low=low, high=high, n=prompts, k=evaluated[0].k, seed=seed
    )


def pass_at_k(rollouts: int, correct: int, k: int) -> float:
    """Probability that k rollouts drawn without replacement hold at least one correct one.

    Args:
        rollouts: rollouts of one prompt (n); undecided ones are counted, as not correct.
    Returns:
        A probability in [0, 1].
    Raises:
        ValueError: k is larger than `rollouts`, where the estimator is undefined.
    Source: Chen et al. 2021, arXiv:2107.03374, equation 1.
    """
    if k > rollouts:
        raise ValueError(f"rollouts_per_prompt is {rollouts} but pass@{k} was asked for; raise it to {k} or drop k={k}")
    return 1.0 - comb(rollouts - correct, k) / comb(rollouts, k)


def majority(rows: Sequence[ScoredRollout]) -> ScoredRollout | None:
    """The first rollout with the answer most of them give; on a tie, the answer seen first. `None`: nobody votes.

    Answers vote by value, "1,000" with "1000.0". Undecided rollouts do not vote, nor do unreadable answers.
    """
    groups = [None if row.reward is None else answer_group(row.answer) for row in rows]
    votes = Counter(group for group in groups if group is not None)
    if not votes:
        return None
    return rows[groups.index(votes.most_common(1)[0][0])]  # equal counts stay in the order they were met in


def best_of_n_by_likelihood(rows: Sequence[ScoredRollout]) -> ScoredRollout:
    """The rollout with the highest cumulative log-prob, the first of equals (seed 0's "best of 1", METHODS 2.6.4).

    Raises:
        ValueError: a rollout has no log-prob.
    """
    for row in rows:
        if row.cumulative_logprob is None:
            raise ValueError(
                f"rollout {row.rollout_index} of prompt {row.prompt_id} has no cumulative_logprob, so the most likely "
                "one is unknown; sample with an engine that returns log-probs, or drop the strategy"
            )
    return max(rows, key=lambda row: row.cumulative_logprob or 0.0)


def mean_reward(rewards: Iterable[float | None]) -> float | None:
    """Mean of the rewards that are known; `None` where none is."""
    known = [reward for reward in rewards if reward is not None]
    return sum(known) / len(known) if known else None


def wilson(correct: float, n: float) -> Interval:
    """95 % interval of a proportion, `correct` out of n. Source: Wilson 1927."""
    share, spread = correct / n, Z * Z / n
    centre, half = share + spread / 2, Z * sqrt((share * (1 - share) + spread / 4) / n)
    return Interval(max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread)))


def interval_of_mean(values: Sequence[float], seed: int = 0) -> Interval:
    """95 % interval of a mean over prompts: Wilson's where all values are 0 or 1, else the percentile bootstrap."""
    if set(values) <= {0.0, 1.0}:
        return wilson(sum(values), len(values))
    return _percentiles(np.asarray(values, dtype=np.float64), seed)


def paired_difference(candidate: Sequence[float], incumbent: Sequence[float], seed: int = 0) -> PairedDifference:
    """Mean of candidate - incumbent: bootstrap interval over prompts, p by flipping the signs of the differences.

    Args:
        candidate, incumbent: one value a prompt, in the same order of prompts.
    Raises:
        ValueError: the lengths differ, or there are no values.
    """
    if len(candidate) != len(incumbent) or not candidate:
        raise ValueError(
            f"a paired test needs one value of each side a prompt; found {len(candidate)} of the candidate and "
            f"{len(incumbent)} of the incumbent; evaluate both on the same prompts"
        )
    differences = np.asarray(candidate, dtype=np.float64) - np.asarray(incumbent, dtype=np.float64)
    interval = _percentiles(differences, seed)
    return PairedDifference(
        float(differences.mean()), interval.low, interval.high, _sign_flip_p(differences, seed), len(differences)
    )


def mcnemar_p(gained: int, lost: int) -> float:
    """Exact one-sided McNemar test: the chance of so many gains or more, were gains and losses equally likely.

    Args:
        gained, lost: prompts only the candidate, only the incumbent, answers correctly.
    """
    n = gained + lost
    return sum(comb(n, wins) for wins in range(gained, n + 1)) / (1 << n)


def _picked(rows: Sequence[ScoredRollout], strategy: Strategy) -> ScoredRollout | None:
    if strategy.kind == "maj":
        return majority(rows)
    if strategy.kind == "likelihood":
        drawn = [row for row in rows if row.finish_reason != "error"]  # the others have no likelihood
        return best_of_n_by_likelihood(drawn) if drawn else None
    return rows[0] if strategy.kind == "greedy" else None


def _percentiles(values: Numbers, seed: int) -> Interval:
    generator = np.random.default_rng(seed)
    means = [
        values[generator.integers(0, len(values), size=(rows, len(values)))].mean(axis=1)
        for rows in _batches(len(values))
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(low), float(high))


def _sign_flip_p(differences: Numbers, seed: int) -> float:
    differing = differences[differences != 0.0]
    observed = differing.sum() - 1e-9  # sums of equal numbers in another order still count as equal
    if len(differing) <= ENUMERATED:
        bits = np.arange(2 ** len(differing))[:, None] >> np.arange(len(differing))
        return float(np.mean((1 - 2 * (bits & 1)) @ differing >= observed))
    generator = np.random.default_rng(seed)
    as_large = 1  # the observed signs are one of the draws, so p is never 0
    for rows in _batches(len(differing)):
        signs = 1.0 - 2.0 * generator.integers(0, 2, size=(rows, len(differing)), dtype=np.int8)
        as_large += int(np.count_nonzero(signs @ differing >= observed))
    return as_large / (RESAMPLES + 1)


def _batches(n: int) -> list[int]:
    size = max(1, min(RESAMPLES, NUMBERS_AT_ONCE // n))
    return [min(size, RESAMPLES - start) for start in range(0, RESAMPLES, size)]
