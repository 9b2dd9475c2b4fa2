"""A reference, whole or its beginning -> what it is, where it came from, and its first rows."""

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from storage.checkpoints import read_checkpoint_manifest, what_is_wrong_with_checkpoint
from storage.datasets import DatasetRef, Manifest, read_manifest, read_rows, what_is_wrong
from storage.home import home, home_name
from storage.schemas import row_types


def describe(reference: str, rows: int) -> dict[str, Any]:
    """The manifest of a data set or a model, whether it is whole, and the first rows of a data set.

    Args:
        reference: "datasets/<step>/<digest>", "models/<digest>", or the beginning of a digest.
    Raises:
        ValueError: nothing in the home, or more than one thing, has that name.
    """
    folder = _find(reference)
    if folder.parent.name == "models":
        manifest = read_checkpoint_manifest(folder.name)
        damage = what_is_wrong_with_checkpoint(folder.name)
        return {"kind": "model", "whole": damage is None, "damage": damage, **manifest.model_dump(mode="json")}
    ref = _reference(folder)
    damage = what_is_wrong(ref)
    shown: dict[str, Any] = {"kind": "data set", "whole": damage is None, "damage": damage}
    shown |= read_manifest(ref).model_dump(mode="json")
    if damage is None:
        shown["first_rows"] = [asdict(row) for row in islice(read_rows(ref, row_types()[ref.row_type]), rows)]
    return shown


def dataset_named(reference: str) -> DatasetRef:
    """The data set a user names.

    Raises:
        ValueError: no data set, or more than one, has that name.
    """
    folder = _find(reference)
    if folder.parent.name == "models":
        raise ValueError(f"{reference!r} is a model; give a data set, as datasets/<step>/<digest>")
    return _reference(folder)


def _find(reference: str) -> Path:
    start = reference.strip("/").removeprefix("datasets/").removeprefix("models/")
    step, _, digest = start.rpartition("/")
    folders = [*home().glob(f"datasets/{step or '*'}/[!.]*"), *([] if step else home().glob("models/[!.]*"))]
    found = [folder for folder in folders if folder.name.startswith(digest)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(folder.relative_to(home())) for folder in found[:5])
    raise ValueError(
        f"{reference!r} names {len(found)} data sets and models in {home_name()}{': ' + names if names else ''}; "
        "give one as datasets/<step>/<digest> or models/<digest>, as `ratchet status --json` lists them"
    )


def _reference(folder: Path) -> DatasetRef:
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{folder.relative_to(home())} has no manifest, so it does not exist; it was never finished")
    return Manifest.model_validate_json(manifest.read_bytes()).ref
