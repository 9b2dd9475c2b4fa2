"""Scored rollouts -> pairs."""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby, islice
from operator import attrgetter

from storage.datasets import DatasetRef, read_columns, read_rows, write_rows
from storage.rows import Pair, ScoredRollout
from tasks import pairs as rules
from tasks.caching import log_counts, step
from tasks.pairs import Pairing
from tasks.selection import Scored

SHOWN = 3  # rollouts quoted when nothing could be paired


class NothingPaired(RuntimeError):
    """No prompt has both a rollout to choose and one to reject."""


@step(version="1")
def pair_rollouts(scored: DatasetRef, pairing: Pairing, iteration: int) -> DatasetRef:
    """Put better and worse rollouts of each prompt together; every pair that is not made is counted by reason.

    Raises:
        NothingPaired: there is no pair; counts the reasons and quotes the first rollouts.
    """
    drops: Counter[str] = Counter()
    stages: Counter[str] = Counter()

    def pairs() -> Iterator[Pair]:
        rows = map(Scored._make, read_columns(scored, ScoredRollout, Scored._fields))
        for _, group in groupby(rows, key=attrgetter("prompt_id")):
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
        if not stages["pairs"]:
            raise NothingPaired(_nothing_paired(scored, drops))

    reference = write_rows(pairs(), Pair, step="pairs", parents=[scored], settings=pairing.key())
    log_counts({**stages, **+drops})
    return reference


def _nothing_paired(scored: DatasetRef, drops: Counter[str]) -> str:
    told = ", ".join(f"{reason} {count:,}" for reason, count in drops.most_common() if count)
    first = "\n".join(
        f"  reward {row.reward}, {row.reason}: {row.completion[-200:]!r}"
        for row in islice(read_rows(scored, ScoredRollout), SHOWN)
    )
    return (
        f"step 'pair_rollouts' made no pair of {scored.rows:,} rollouts ({told}); see {scored.name}. The first:\n"
        f"{first}\nWhere all are right, take harder prompts or a higher temperature; where none is, a better start "
        "or more rollouts per prompt; else see to the pairing's thresholds."
    )
