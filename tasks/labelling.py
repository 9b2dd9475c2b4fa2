"""Judged rollouts -> what is taken for right or wrong, and pairs of the two. No gold answer is in reach."""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby

from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import JudgedRollout, Pair, Prompt, ScoredRollout
from tasks import labels as rules
from tasks.caching import log_counts, step
from tasks.filters import join
from tasks.labels import LabelFree


class NothingPaired(RuntimeError):
    """No prompt has a rollout taken for right and a wrong one that are far enough apart."""


@step(version="1", rows=lambda prompts: prompts.rows)
def hide_answers(prompts: DatasetRef) -> DatasetRef:
    """The prompts without their gold answers, for everything that is to be free of labels."""
    hidden = (
        Prompt(prompt_id=row.prompt_id, source=row.source, prompt=row.prompt, answer=None)
        for row in read_rows(prompts, Prompt)
    )
    return write_rows(hidden, Prompt, step="prompts", parents=[prompts])


@step(version="1", rows=lambda judged, settings: judged.rows)
def label_by_confidence(judged: DatasetRef, settings: LabelFree) -> DatasetRef:
    """Take rollouts for right or wrong by vote and confidence; no gold answer is read."""
    reasons: Counter[str] = Counter()

    def labelled() -> Iterator[ScoredRollout]:
        for _, rows in groupby(read_rows(judged, JudgedRollout), key=lambda row: row.prompt_id):
            for row in rules.label_by_confidence(list(rows), settings):
                reasons[row.reason] += 1
                yield row

    reference = write_rows(labelled(), ScoredRollout, step="labelled", parents=[judged], settings=settings.key())
    log_counts(reasons)
    return reference


@step(version="1")
def pair_by_confidence(labelled: DatasetRef, judged: DatasetRef, minimum_margin: float, iteration: int) -> DatasetRef:
    """The most against the least confident rollout of each prompt; prompts with one side only are counted.

    Raises:
        NothingPaired: no prompt gives a pair; counts the reasons.
    """
    counts: Counter[str] = Counter()
    pairs: list[Pair] = []
    joined = join(read_rows(labelled, ScoredRollout), read_rows(judged, JudgedRollout))
    for _, group in groupby(joined, key=lambda row: row[0].prompt_id):
        pair, reason = rules.pair_by_confidence(list(group), minimum_margin, iteration)
        counts["pairs" if pair else reason] += 1
        if pair is not None:
            pairs.append(pair)
    log_counts(counts)
    if not pairs:
        told = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
        raise NothingPaired(
            f"step 'pair_by_confidence' made no pair of {counts.total():,} prompts ({told}); see {labelled.name}. "
            f"Lower label_free.dpo.minimum_margin (now {minimum_margin:g}), move the thresholds of "
            "label_free.labelling, or draw more rollouts of a prompt"
        )
    settings = {"rule": "confidence", "minimum_margin": minimum_margin}
    return write_rows(pairs, Pair, step="pairs", parents=[labelled, judged], settings=settings)
