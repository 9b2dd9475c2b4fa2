"""A home in an object store, seen from here: what is absent from the working copy is fetched from the store.

The store is the truth, and the folder that `home()` names is a copy of what was needed of it. Objects have the names
that files have in a home, so that a copy of the bucket is a home; only experiments/<name>/steps.jsonl lies there in
pieces, steps/<number>.jsonl. Beside them are home.json, which says which home this is, and locks/ (storage/leases.py).
Not in the store: Prefect's database, trainings in progress and what is unfinished.

All functions find nothing, and do nothing, where the home is a folder.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from storage.digests import file_sha256
from storage.durable import attempt_name, sync
from storage.home import home
from storage.stores import Store, Stored, StoreError, current_store

logger = logging.getLogger(__name__)

KEPT = ("datasets", "ledger", "models", "steps", "experiments", "views")  # what is in the store, of a home's folders
MANIFEST = "manifest.json"


class DamagedObjectError(StoreError):
    """What the store holds is not what its manifest says; it counts as gone from now on."""


def name_of(path: Path) -> str | None:
    """The name that a file or folder of the home has in the store; None: it is not kept there."""
    if not path.is_relative_to(home()):
        return None
    name = path.relative_to(home()).as_posix()
    parts = name.split("/")
    return name if parts[0] in KEPT and not any(part.startswith(".") for part in parts) else None


def fetch(path: Path) -> bool:
    """Fetch a small file that is not here; False: the store has none either."""
    store, name = current_store(), name_of(path)
    content = store.read(name) if store is not None and name is not None else None
    if content is not None:
        write_copy(path, content)
    return content is not None


def fetch_files(name: str, files: Iterable[tuple[str, int, str]]) -> None:
    """Fetch those files of a folder of the home that are not here.

    Args:
        files: name, size and sha256 of each, as the folder's manifest has them.
    Raises:
        DamagedObjectError: one is not in the store, or not as it should be; then its manifest is removed.
    """
    store = current_store()
    if store is None:
        return
    for file, size, sha256 in files:
        path = home() / name / file
        if path.is_file() or any(_download(store, f"{name}/{file}", path, size, sha256) for _ in range(2)):
            continue
        store.remove([f"{name}/{MANIFEST}"])
        (home() / name / MANIFEST).unlink(missing_ok=True)
        raise DamagedObjectError(f"{name}/{file} is gone from {store.url} or damaged there")


def fetch_new(folder: Path, ending: str) -> None:
    """Fetch the files below a folder of the home that only the store has."""
    store, name = current_store(), name_of(folder)
    if store is None or name is None:
        return
    for found, stored in sorted(store.names(name).items()):
        path = home() / found
        if found.endswith(ending) and name_of(path) and not path.exists():
            _download(store, found, path, stored.bytes, None)


def fetch_again(path: Path) -> bool:
    """Put the store's copy in the place of a damaged file; False: the store has no other."""
    store, name = current_store(), name_of(path)
    if store is None or name is None:
        return False
    stored = store.names(name.rpartition("/")[0]).get(name)
    damaged = file_sha256(path)
    return stored is not None and _download(store, name, path, stored.bytes, None) and file_sha256(path) != damaged


def sizes(name: str) -> dict[str, int]:
    """The files of a folder of the home that are in the store, by their names in it."""
    store = current_store()
    found = store.names(name) if store is not None else {}
    return {one[len(name) + 1 :]: stored.bytes for one, stored in found.items()}


def listing() -> dict[str, Stored]:
    """Everything in the store, by name."""
    store = current_store()
    return store.names() if store is not None else {}


def write_copy(path: Path, content: bytes) -> None:
    """Write a file of the working copy all at once."""

    def fill(attempt: Path) -> bool:
        attempt.write_bytes(content)
        return True

    _put_in_place(path, fill)


def _download(store: Store, name: str, path: Path, size: int, sha256: str | None) -> bool:
    """Fetch one file, if it is as it should be."""

    def fill(attempt: Path) -> bool:
        if not store.download(name, attempt) or attempt.stat().st_size != size:
            return False
        return sha256 is None or file_sha256(attempt) == sha256

    if _put_in_place(path, fill):
        return True
    logger.warning("%s/%s was not received as it should be", store.url, name)
    return False


def _put_in_place(path: Path, fill: Callable[[Path], bool]) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = home() / attempt_name()
    try:
        if not fill(attempt):
            return False
        sync(attempt)
        attempt.replace(path)
    finally:
        attempt.unlink(missing_ok=True)
    return True
