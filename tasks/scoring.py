"""Rollouts -> scored rollouts."""

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa

from storage.datasets import DatasetRef, iter_batches, join_rows, read_batches, write_batches
from storage.rows import Rollout, ScoredRollout
from storage.schemas import batch_like
from tasks.answers import SCORER, Verdict, verdict_on
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

    def scored() -> Iterator[pa.RecordBatch]:
        for batch in read_batches(rollouts, Rollout, part):
            asked = (batch[name].to_pylist() for name in ("prompt_id", "completion", "finish_reason"))
            verdicts = [verdict_on(text, ending, gold[one], marker) for one, text, ending in zip(*asked, strict=True)]
            columns = dict(zip(Verdict._fields, zip(*verdicts, strict=True), strict=True))
            reasons.update(columns["reason"])
            yield batch_like(batch, ScoredRollout, **columns, scorer=[SCORER] * len(verdicts))

    reference = write_batches(scored(), ScoredRollout, step=step, parents=[rollouts, prompts])
    log_counts(reasons)
    return reference


def _gold(prompts: DatasetRef) -> dict[str, str]:
    gold: dict[str, str] = {}
    for batch in iter_batches(prompts, ["prompt_id", "answer"]):
        answers = batch["answer"].fill_null("").to_pylist()
        gold.update(zip(batch["prompt_id"].to_pylist(), answers, strict=True))
    return gold
