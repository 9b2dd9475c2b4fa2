"""Folders that a hub takes as they are: Parquet shards or JSON lines, cards with front matter; and their upload."""

import json
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ROWS_A_SHARD = 100_000
TOKEN = "HF_TOKEN"


class PublishingError(RuntimeError):
    """A folder could not be uploaded."""


def open_folder_to_write(folder: Path) -> Path:
    """The folder, made if need be.

    Raises:
        ValueError: there is something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty; name another with --to, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_shards(folder: Path, records: Iterable[Mapping[str, Any]], rows: int) -> str:
    """Write the records as `data/train-*.parquet`, streaming; returns that pattern.

    Args:
        rows: how many records there are.
    """
    (folder / "data").mkdir()
    shards, remaining, schema = ceil(rows / ROWS_A_SHARD), iter(records), None
    for shard in range(shards):
        table = pa.Table.from_pylist(list(islice(remaining, ROWS_A_SHARD)), schema=schema)
        if schema is None:
            schema = pa.schema([pa.field(one.name, _typed(one.type)) for one in table.schema])
            table = table.cast(schema)
        pq.write_table(table, folder / "data" / f"train-{shard:05}-of-{shards:05}.parquet")
    return "data/train-*"


def write_lines(folder: Path, records: Iterable[Mapping[str, Any]]) -> str:
    """Write the records as `data/train.jsonl`, streaming; returns that name."""
    (folder / "data").mkdir()
    with (folder / "data" / "train.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return "data/train.jsonl"


def write_card(folder: Path, front_matter: Mapping[str, Any], text: str) -> None:
    """Write README.md as a hub reads it."""
    (folder / "README.md").write_text(f"---\n{as_yaml(front_matter)}---\n\n{text}", encoding="utf-8")


def write_structured(file: Path, content: Mapping[str, Any]) -> None:
    """Write a YAML or JSON file, by its ending."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n" if file.suffix == ".json" else as_yaml(content)
    file.write_text(text, encoding="utf-8")


def as_yaml(content: Mapping[str, Any]) -> str:
    """The content as YAML, in its own order."""
    return yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, allow_unicode=True, width=120)


def push_folder(folder: Path, repository: str, kind: str) -> str:
    """Upload the folder to the Hugging Face hub, into a private repository if it is new; the address.

    Args:
        kind: "model" or "dataset".
    Raises:
        ValueError: there is no token in the environment.
        PublishingError: the hub refused, or cannot be reached.
    """
    from huggingface_hub import HfApi

    token = os.environ.get(TOKEN)
    if not token:
        raise ValueError(f"--push wants a token that may write, in the environment variable {TOKEN}; it is not set")
    api = HfApi(token=token)
    try:
        api.create_repo(repository, repo_type=kind, private=True, exist_ok=True)
        told = api.upload_folder(repo_id=repository, folder_path=folder, repo_type=kind)
    except (OSError, ValueError) as error:  # the hub's own errors are both
        raise PublishingError(f"{folder} is written, but {repository} could not be uploaded: {error}") from error
    return str(told.commit_url if hasattr(told, "commit_url") else told)


def _typed(kind: pa.DataType) -> pa.DataType:
    """A type that can hold text where no value was seen."""
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(one.name, _typed(one.type)) for one in kind])
    if pa.types.is_list(kind):
        return pa.list_(_typed(kind.value_type))
    return kind
