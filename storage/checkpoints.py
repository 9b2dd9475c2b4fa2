"""Checkpoints: folders of model files named by the digest of their content, their manifest written last.

home/models/<digest>/config.json, model.safetensors, ..., manifest.json
home/models/.scratch-<step key>/     a training in progress; it survives a kill, so that training resumes
"""

import errno
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, JsonValue, ValidationError

from storage.committing import commit_folder, put_file
from storage.datasets import (
    REBUILD,
    DatasetError,
    DatasetRef,
    StoredFile,
    fetch_absent,
    what_is_wrong_with_files,
)
from storage.digests import canonical_json, digest_of, file_sha256
from storage.durable import attempt_folder, remove_stale_attempts
from storage.fetching import MANIFEST, fetch
from storage.home import home
from storage.names import checked_name, safe_name


class CheckpointManifest(BaseModel):
    """What a checkpoint holds and where it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    digest: str
    step: str
    files: tuple[StoredFile, ...]
    parents: tuple[str, ...]  # digests, or names, of the models and data sets it was trained from
    settings: dict[str, JsonValue]
    metrics: DatasetRef | None
    counts: dict[str, int]
    written_at: AwareDatetime


def commit_checkpoint(
    folder: Path,
    *,
    step: str,
    parents: Sequence[str] = (),
    settings: Mapping[str, object] | None = None,
    metrics: DatasetRef | None = None,
    counts: Mapping[str, int] | None = None,
) -> str:
    """Move a finished folder of model files into the home; equal files are stored once.

    Args:
        folder: everything in it becomes the checkpoint, apart from hidden files. It is gone afterwards.
    Returns:
        The checkpoint's digest.
    """
    remove_stale_attempts(folder)  # a manifest that a kill left half written, in a training that was resumed
    files = _files(folder)
    if not files:
        raise DatasetError(
            f"step {step!r} has no model files to store: {folder} is empty or missing; look for its first error"
        )
    manifest = CheckpointManifest(
        digest=_digest(files),
        step=step,
        files=files,
        parents=tuple(parents),
        settings=json.loads(canonical_json(settings or {})),
        metrics=metrics,
        counts=dict(counts or {}),
        written_at=datetime.now(UTC),
    )
    put_file(folder / MANIFEST, manifest.model_dump_json(indent=1), replace=True)
    _commit(folder, manifest.digest)
    shutil.rmtree(folder, ignore_errors=True)
    return manifest.digest


def checkpoint_path(digest: str) -> Path:
    """The folder of a whole checkpoint.

    Raises:
        DatasetError: it is gone or damaged.
    """
    if wrong := what_is_wrong_with_checkpoint(digest):
        raise DatasetError(f"{wrong}; {REBUILD}")
    fetch_absent(f"models/{digest}", read_checkpoint_manifest(digest).files)
    return _folder(digest)


def what_is_wrong_with_checkpoint(digest: str, *, deep: bool = False) -> str | None:
    """None if the checkpoint is whole, else what is missing or damaged. `deep` also compares each file's digest."""
    try:
        manifest = read_checkpoint_manifest(digest)
    except DatasetError as error:
        return str(error).removesuffix(f"; {REBUILD}")
    return what_is_wrong_with_files(manifest.files, f"models/{digest}", deep=deep)


def read_checkpoint_manifest(digest: str) -> CheckpointManifest:
    """What a checkpoint says about itself.

    Raises:
        DatasetError: there is no readable manifest of this checkpoint.
    """
    path = _folder(digest) / MANIFEST
    if not path.exists():
        fetch(path)
    try:
        manifest = CheckpointManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DatasetError(
            f"models/{digest} is gone, or was never finished: it has no {MANIFEST}; {REBUILD}"
        ) from error
    except ValidationError as error:
        raise DatasetError(
            f"models/{digest}/{MANIFEST} cannot be read: {error.errors()[0]['msg']}; {REBUILD}"
        ) from error
    if manifest.digest != digest:
        raise DatasetError(f"models/{digest}/{MANIFEST} describes {manifest.digest!r}; {REBUILD}")
    return manifest


def folder_digest(folder: Path) -> str:
    """Digest of a folder of model files, by their names and contents; a checkpoint's own digest is the same.

    Raises:
        ValueError: there are no files to digest.
    """
    if files := _files(folder):
        return _digest(files)
    raise ValueError(f"{folder} holds no model files; expected a folder as `save_pretrained` writes it")


def scratch_folder(name: str) -> Path:
    """The folder of a training in progress, the same for the same name (a step's key), so that a killed one resumes."""
    folder = _scratch(name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def discard_scratch(name: str) -> None:
    """Remove the folder of a training that is done, if there is one."""
    shutil.rmtree(_scratch(name), ignore_errors=True)


def _scratch(name: str) -> Path:
    return home() / "models" / f".scratch-{safe_name(name)}"


def _folder(digest: str) -> Path:
    return home() / "models" / checked_name(digest, "a checkpoint's digest")


def _commit(folder: Path, digest: str) -> None:
    """Rename the folder; copy it first where that cannot work: another file system, or links out of the folder."""
    final = _folder(digest)
    final.parent.mkdir(parents=True, exist_ok=True)
    is_whole = _is_whole(digest)
    if not any(path.is_symlink() for path in folder.rglob("*")):
        try:
            commit_folder(folder, final, is_whole=is_whole)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        else:
            return
    with attempt_folder(final.parent) as attempt:
        shutil.copytree(folder, attempt, dirs_exist_ok=True)
        commit_folder(attempt, final, is_whole=is_whole)


def _is_whole(digest: str) -> Callable[[], bool]:
    return lambda: what_is_wrong_with_checkpoint(digest, deep=True) is None


def _digest(files: Sequence[StoredFile]) -> str:
    return digest_of([[file.name, file.sha256] for file in files])


def _files(folder: Path) -> tuple[StoredFile, ...]:
    """The files of a model by name; hidden ones (a hub download's records) and our own manifest are not part of it."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = [name for name in names if name != MANIFEST and not any(part.startswith(".") for part in name.split("/"))]
    return tuple(_stored_file(folder, name) for name in kept)


def _stored_file(folder: Path, name: str) -> StoredFile:
    status = (folder / name).stat()
    return StoredFile(
        name=name, sha256=_sha256_once(folder / name, status.st_size, status.st_mtime_ns), bytes=status.st_size
    )


@lru_cache(maxsize=4096)
def _sha256_once(path: Path, size: int, mtime_ns: int) -> str:
    """A file that has not changed since is not read again: weights take seconds per gigabyte."""
    return file_sha256(path)
