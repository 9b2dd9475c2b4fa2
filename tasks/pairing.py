"""Scored rollouts -> pairs."""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby

from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import Pair, ScoredRollout
from tasks import pairs as rules
from tasks.caching import log_counts, step
from tasks.pairs import Pairing


@step(version="1")
def pair_rollouts(scored: DatasetRef, pairing: Pairing, iteration: int) -> DatasetRef:
    """Put better and worse rollouts of each prompt together; every pair that is not made is counted by reason."""
    drops: Counter[str] = Counter()
    stages: Counter[str] = Counter()

    def pairs() -> Iterator[Pair]:
        for _, group in groupby(read_rows(scored, ScoredRollout), key=lambda row: row.prompt_id):
            rollouts = list(group)
            paired = rules.pair_rollouts(rollouts, pairing, iteration)
            drops.update(paired.drops)
            stages.update(
                sampled=len(rollouts),
                answered=sum(row.reward is not None for row in rollouts),
                correct=sum(row.reward == 1 for row in rollouts),
                pairs=len(paired.pairs),
            )
            yield from paired.pairs

    reference = write_rows(pairs(), Pair, step="pairs", parents=[scored], settings=pairing.key())
    log_counts({**stages, **+drops})
    return reference
