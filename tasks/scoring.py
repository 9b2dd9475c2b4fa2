"""Rollouts -> scored rollouts."""

from collections import Counter
from collections.abc import Iterator

from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import Prompt, Rollout, ScoredRollout
from tasks.answers import score_by_answer
from tasks.caching import log_counts, step


@step(version="1", rows=lambda rollouts, prompts, marker: rollouts.rows)
def score_answers(rollouts: DatasetRef, prompts: DatasetRef, marker: str) -> DatasetRef:
    """Reward each rollout by matching the final answer after the marker with the gold answer of its prompt."""
    gold = {prompt.prompt_id: prompt.answer or "" for prompt in read_rows(prompts, Prompt)}
    reasons: Counter[str] = Counter()

    def scored() -> Iterator[ScoredRollout]:
        for rollout in read_rows(rollouts, Rollout):
            row = score_by_answer(rollout, gold[rollout.prompt_id], marker)
            reasons[row.reason] += 1
            yield row

    reference = write_rows(scored(), ScoredRollout, step="scored", parents=[rollouts, prompts])
    log_counts(reasons)
    return reference
