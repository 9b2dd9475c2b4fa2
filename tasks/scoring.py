"""Rollouts -> scored rollouts."""

from collections import Counter
from collections.abc import Iterator

from storage.datasets import DatasetRef, iter_batches, join_rows, read_rows, write_rows
from storage.rows import Rollout, ScoredRollout
from tasks.answers import score_by_answer
from tasks.caching import log_counts, step
from tasks.spreading import cuts, spread

ROLLOUTS_PER_SHARD = 50_000  # about a second of a core's work; fewer are scored here (benchmarks: what a cluster gains)


@step(version="1", rows=lambda rollouts, prompts, marker: rollouts.rows)
def score_answers(rollouts: DatasetRef, prompts: DatasetRef, marker: str) -> DatasetRef:
    """Reward each rollout by matching the final answer after the marker with the gold answer of its prompt."""
    shards = cuts(rollouts.rows, ROLLOUTS_PER_SHARD)
    if len(shards) == 1:
        return _score(rollouts, prompts, marker, shards[0], "scored")
    parts = spread(score_shard, (rollouts, prompts, marker), shards)
    return join_rows(parts, ScoredRollout, step="scored", parents=[rollouts, prompts])


@step(version="1", rows=lambda rollouts, prompts, marker, start, stop: stop - start)
def score_shard(rollouts: DatasetRef, prompts: DatasetRef, marker: str, start: int, stop: int) -> DatasetRef:
    """The same for the rollouts of these numbers, on a Dask cluster."""
    return _score(rollouts, prompts, marker, range(start, stop), "scored_shard")


def _score(rollouts: DatasetRef, prompts: DatasetRef, marker: str, part: range, step: str) -> DatasetRef:
    gold = _gold(prompts)
    reasons: Counter[str] = Counter()

    def scored() -> Iterator[ScoredRollout]:
        for rollout in read_rows(rollouts, Rollout, part):
            row = score_by_answer(rollout, gold[rollout.prompt_id], marker)
            reasons[row.reason] += 1
            yield row

    reference = write_rows(scored(), ScoredRollout, step=step, parents=[rollouts, prompts])
    log_counts(reasons)
    return reference


def _gold(prompts: DatasetRef) -> dict[str, str]:
    gold: dict[str, str] = {}
    for batch in iter_batches(prompts, ["prompt_id", "answer"]):
        answers = batch["answer"].fill_null("").to_pylist()
        gold.update(zip(batch["prompt_id"].to_pylist(), answers, strict=True))
    return gold
