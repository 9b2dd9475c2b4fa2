"""pass@k for every k from the rollouts that are there, with a band; and long curves made short enough to draw."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from tasks.drift import Solved
from tasks.metrics import pass_at_k, wilson

RESAMPLES = 10_000
T = TypeVar("T")


class PassPoint(NamedTuple):
    """pass@k of one k, with its 95 % band over prompts."""

    k: int
    value: float
    low: float
    high: float


def pass_curve(prompts: Mapping[Solved, int], seed: int = 0) -> list[PassPoint]:
    """The unbiased pass@k from k = 1 to the rollouts that every prompt has; empty where there is no prompt.

    The band is Wilson's where a prompt's value is 0 or 1 (k is all there are), else the percentile bootstrap over
    prompts, as for every other figure. Prompts with equal counts are alike, so resampling them is one multinomial draw
    over the kinds there are, and costs the same for a hundred prompts as for a million.

    Args:
        prompts: how many prompts have just so many rollouts and so many right ones.
    """
    if not prompts:
        return []
    kinds, counts = list(prompts), np.array(list(prompts.values()))
    total = int(counts.sum())
    ks = range(1, min(rollouts for rollouts, _ in kinds) + 1)
    values = np.array([[pass_at_k(rollouts, correct, k) for k in ks] for rollouts, correct in kinds])
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=RESAMPLES)
    bands = np.percentile(drawn @ values / total, [2.5, 97.5], axis=0)
    points = []
    for k, column, mean, low, high in zip(ks, values.T, counts @ values / total, *bands, strict=True):
        band = wilson(mean * total, total) if set(column) <= {0.0, 1.0} else (float(low), float(high))
        points.append(PassPoint(k, float(mean), *band))
    return points


def thinned(points: Sequence[T], most: int) -> list[T]:
    """At most so many of the points, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(n * (len(points) - 1) / (most - 1))] for n in range(most)]
