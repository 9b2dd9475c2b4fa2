"""Every data set and model of an experiment and what it was made from, by the records of the steps that made them."""

from collections.abc import Iterator

from models.specs import ModelRef
from storage.checkpoints import what_is_wrong_with_checkpoint
from storage.datasets import DatasetRef, what_is_wrong
from storage.report_rows import ReportedOrigin
from tasks.explaining import references_in
from tasks.lineage import Sources


def origins(sources: Sources) -> Iterator[ReportedOrigin]:
    """Each thing once, in the order in which it was made; what comes from outside is named as a parent only."""
    names: dict[str, str] = {}  # digest -> name of what was made so far
    for record, result in sources.made:
        parents = list(dict.fromkeys(names.get(one, one) for one in inputs_in(result.key_parts.get("inputs"))))
        for ref in references_in(result.value):
            digest = ref.digest if isinstance(ref, DatasetRef) else ref.adapter or ref.digest
            if digest is None or digest in names:
                continue
            is_rows = isinstance(ref, DatasetRef)
            names[digest] = ref.name if isinstance(ref, DatasetRef) else f"models/{digest}"
            yield ReportedOrigin(
                name=names[digest],
                kind="data set" if is_rows else "model",
                step=record.step,
                iteration=record.iteration,
                split=record.split,
                row_type=ref.row_type if isinstance(ref, DatasetRef) else None,
                rows=ref.rows if isinstance(ref, DatasetRef) else None,
                there=_is_there(ref, digest),
                parents=parents,
            )


def inputs_in(key_part: object) -> Iterator[str]:
    """The digests of data sets and models in a part of a key; a model without one goes by its name."""
    if isinstance(key_part, list):
        yield from (found for one in key_part for found in inputs_in(one))
    elif isinstance(key_part, dict) and key_part.keys() == {"rows"}:
        yield str(key_part["rows"])
    elif isinstance(key_part, dict) and "adapter" in key_part and ("digest" in key_part or "name" in key_part):
        model = key_part["adapter"] or key_part.get("digest") or key_part.get("name")
        yield str(model)
    elif isinstance(key_part, dict):
        yield from (found for one in key_part.values() for found in inputs_in(one))


def _is_there(ref: DatasetRef | ModelRef, digest: str) -> bool:
    wrong = what_is_wrong(ref) if isinstance(ref, DatasetRef) else what_is_wrong_with_checkpoint(digest)
    return wrong is None
