"""Documents of benchmarks that lie on this machine, in the layout that RATCHET_DATA names (see `local_splits`)."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from storage.hub import SPLIT_NAMES, file_records


def local_splits(hub: str, config: str | None, *, config_optional: bool) -> dict[str, Path]:
    """The file of each split, from `<RATCHET_DATA>/<id>[/<config>]/<split>.jsonl` or `.parquet`; empty: none is here.

    Args:
        hub: the data set's id on the hub, of which the last part alone will do, also in lower case.
        config_optional: the files may lie in the data set's folder itself.
    """
    for folder in _folders(hub, config, config_optional):
        files = sorted(path for path in folder.glob("*") if path.suffix in (".jsonl", ".parquet"))
        if files:
            return {_split(path.stem): path for path in files}
    return {}


def places(hub: str, config: str | None) -> str:
    """Where the files are looked for, for an error message."""
    return f"<RATCHET_DATA>/{'/'.join(part for part in (hub.rpartition('/')[2], config) if part)}/<split>.jsonl"


def read_split(file: Path) -> list[Mapping[str, Any]]:
    """All records of a split, as the hub has them.

    Raises:
        ValueError: a line is no record; names file and line.
    """
    records: Iterator[tuple[int, Mapping[str, Any]]] = file_records(file)
    return [record for _, record in records]


def _split(stem: str) -> str:
    name = stem.removesuffix("-00000-of-00001")  # as the hub names a split's only Parquet file
    return SPLIT_NAMES.get(name, name)


def _folders(hub: str, config: str | None, config_optional: bool) -> Iterator[Path]:
    root = os.environ.get("RATCHET_DATA")
    if not root:
        return
    last = hub.rpartition("/")[2]
    for name in (hub, last, last.lower()):
        if config is not None:
            yield Path(root) / name / config
        if config is None or config_optional:
            yield Path(root) / name
