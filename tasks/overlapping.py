"""What a policy was trained on, held against the prompts of dev and test: how much of these stands in it (DESIGN 9)."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from models.specs import ModelRef
from storage.datasets import DatasetRef, iter_batches, read_rows, write_rows
from storage.experiments import StepRecord
from storage.results import find_result
from storage.rows import EvaluatedPrompt, Overlap, Prompt
from storage.schemas import arrow_schema, row_types
from tasks.caching import log_counts, step
from tasks.contamination import Questions
from tasks.explaining import references_in
from tasks.lineage import nearest
from tasks.prompts import NGRAM

TEXTS = ("contents", "prompt", "completion", "chosen", "rejected")  # columns that are trained on
NOT_TRAINED_ON = "held_out"  # an input of a training that only its loss is logged of
KEPT_TEXTS = 10_000  # texts whose overlap is remembered: a prompt stands in many rows


def measure_overlap(
    policy: ModelRef, steps: Sequence[StepRecord], dev: DatasetRef, test: DatasetRef
) -> DatasetRef | None:
    """Overlap rows of dev and test; None: the policy was not trained here, or is measured on benchmarks only.

    Args:
        steps: of the run under way.
        dev, test: EvaluatedPrompt rows of the policy.
    """
    trained = tuple(trained_on(policy, steps))
    asked = {split: tuple(_asked(evaluated)) for split, evaluated in (("dev", dev), ("test", test))}
    return count_overlaps(trained, asked["dev"], asked["test"]) if trained and any(asked.values()) else None


@step(version="1")
def count_overlaps(
    trained: tuple[DatasetRef, ...], dev: tuple[DatasetRef, ...], test: tuple[DatasetRef, ...]
) -> DatasetRef:
    """How many training rows share a run of 13 words with a prompt of dev or test, and how many of these are shared."""
    splits = {"dev": dev, "test": test}
    prompts = {
        split: {row.prompt_id: row.prompt for ref in refs for row in read_rows(ref, Prompt)}
        for split, refs in splits.items()
        if refs
    }
    questions = Questions((f"{split} {name}", text) for split, texts in prompts.items() for name, text in texts.items())
    rows, sharing, shared = 0, dict.fromkeys(prompts, 0), set[str]()
    for found in _found(trained, questions):
        rows += 1
        shared |= found
        for split in sharing:
            sharing[split] += any(name.startswith(f"{split} ") for name in found)
    overlaps = [
        Overlap(
            split=split,
            training_rows=rows,
            sharing_rows=sharing[split],
            held_out_prompts=len(texts),
            shared_prompts=sum(f"{split} {name}" in shared for name in texts),
            run_words=NGRAM,
        )
        for split, texts in prompts.items()
    ]
    log_counts({f"{one.split} prompts shared": one.shared_prompts for one in overlaps})
    return write_rows(overlaps, Overlap, step="overlaps", parents=[*trained, *dev, *test])


def trained_on(policy: ModelRef, steps: Sequence[StepRecord]) -> list[DatasetRef]:
    """The data sets that the step which made the policy was given."""
    digest = policy.adapter or policy.digest
    made = [record for record in steps if digest and record.key and record.digest == digest]
    result = find_result(made[-1].step, str(made[-1].key)) if made else None
    if result is None:
        return []
    inputs = result.key_parts["inputs"]
    assert isinstance(inputs, dict)
    wanted = {found for name, value in inputs.items() if name != NOT_TRAINED_ON for found in data_digests(value)}
    found: dict[str, DatasetRef] = {}
    for record in steps:
        if record.key and record.digest not in found and (record.digest is None or record.digest in wanted):
            result = find_result(record.step, record.key)
            found |= {
                one.digest: one
                for one in references_in(result.value if result else None)
                if isinstance(one, DatasetRef)
            }
    return [found[one] for one in sorted(wanted) if one in found]


def data_digests(key_part: object) -> Iterator[str]:
    """The digests of the data sets in a part of a key."""
    if isinstance(key_part, list):
        yield from (found for one in key_part for found in data_digests(one))
    elif isinstance(key_part, dict) and key_part.keys() == {"rows"}:
        yield key_part["rows"]


def _asked(evaluated: DatasetRef) -> Iterator[DatasetRef]:
    """The prompts that were put to a policy; not what they were made from, as the queries of instructions."""
    ids = {row.prompt_id for row in read_rows(evaluated, EvaluatedPrompt)}
    for ref in nearest(evaluated, Prompt):
        if all(row.prompt_id in ids for row in read_rows(ref, Prompt)):
            yield ref


def _found(trained: Sequence[DatasetRef], questions: Questions) -> Iterator[frozenset[str]]:
    """The held-out prompts that each training row shares a run with."""
    known: dict[str, frozenset[str]] = {}

    def holds(text: str) -> frozenset[str]:
        if text not in known:
            if len(known) == KEPT_TEXTS:
                known.clear()
            known[text] = questions.all_in(text)
        return known[text]

    for ref in trained:
        names = set(arrow_schema(row_types()[ref.row_type]).names)
        for batch in iter_batches(ref, [name for name in TEXTS if name in names]):
            for texts in zip(*(_texts(column) for column in batch.columns), strict=True):
                yield frozenset[str]().union(*(holds(text) for several in texts for text in several))


def _texts(column: pa.Array) -> list[list[str]]:
    values: list[Any] = column.to_pylist()
    return values if pa.types.is_list(column.type) else [[value] for value in values]
