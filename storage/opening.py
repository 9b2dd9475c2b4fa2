"""Opening a home in an object store: the working copy is brought up to date with it, before a command does anything.

Uploaded is what was committed here and is not there yet. Fetched are the small files by which things are found: step
records, manifests, ledgers' keys and the experiments' own files; the large ones come when they are read. Removed from
here is what the store has no more, `ratchet gc` on another machine having deleted it. It costs one listing of the
store, a request for each thousand objects, and one for each small file that is new.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from storage.committing import IDENTITY, pieces_of, push_unpushed, unpushed
from storage.durable import attempt_name, remove_stale_attempts
from storage.fetching import MANIFEST, name_of, write_copy
from storage.home import home, home_url
from storage.leases import is_leased_beside
from storage.stores import Store, Stored, StoreError, current_store

logger = logging.getLogger(__name__)

_LINES = "steps"  # in an experiment's folder: the store's pieces of steps.jsonl


def open_home() -> None:
    """Bring the working copy up to date; nothing is done where the home is a folder.

    Raises:
        ValueError: the home's URL holds a credential.
        StoreError: the store cannot be reached, or holds another home than this working copy does.
    """
    if home_url() is None:
        return
    store = current_store()
    assert store is not None
    with _alone():
        store.names("locks", patient=False)  # else a store that is not there would be waited for
        _check_identity(store)
        remove_stale_attempts(home())  # of what was being fetched
        push_unpushed()
        here, waiting = set(_things()), unpushed()  # in this order: what is here and not noted is in the store, or was
        stored = store.names()
        _remove_gone(here - waiting, stored)
        _fetch_small(store, stored)
        for name in sorted({*_experiments_of(stored), *(path.name for path in home().glob("experiments/[!.]*"))}):
            _refresh(store, name, stored)


def what_is_wrong_with_store() -> str | None:
    """None if the home's store can be written as locks need it; else what is wrong. None too for a folder."""
    name, told = f".probe-{uuid.uuid4().hex[:12]}", None
    try:
        if (store := current_store()) is None:
            return None
        store.names("locks", patient=False)
        if not store.create(name, b"one"):
            return f"{store.url} refuses a new object"
        try:
            if store.create(name, b"two") or store.read(name) != b"one":
                told = (
                    f"{store.url} lets one writer replace what another has just created, so machines could not exclude "
                    "each other; take a store that knows conditional writes"
                )
        finally:
            store.remove([name])
    except (StoreError, ValueError) as error:
        return str(error)
    return told


def _check_identity(store: Store) -> None:
    here, there = home() / IDENTITY, store.read(IDENTITY)
    if not here.exists():
        if there is not None:
            write_copy(here, there)
        return
    if there is None or json.loads(there) != json.loads(here.read_bytes()):
        told = "is empty, or holds no home any more" if there is None else "holds another home"
        raise StoreError(
            f"{store.url} {told} than the one that {home()} is the working copy of. If that is as it should be, remove "
            "that folder and run the same command again; else bring back what the store held: nothing was changed"
        )


def _things() -> Iterator[str]:
    """What is kept in the working copy under a name that it gets once and for all."""
    for pattern in ("steps/*/[!.]*.json", "datasets/*/[!.]*", "models/[!.]*", "ledger/*/[!.]*"):
        yield from map(_name, home().glob(pattern))


def _remove_gone(names: Iterable[str], stored: Mapping[str, Stored]) -> None:
    for name in names:
        path = home() / name
        if (f"{name}/{MANIFEST}" if path.is_dir() else name) in stored:
            continue
        logger.info("%s is in the store no more; it is removed from the working copy", name)
        if path.is_dir():
            aside = path.with_name(attempt_name())
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _fetch_small(store: Store, stored: Mapping[str, Stored]) -> None:
    def is_small(name: str) -> bool:
        top, _, rest = name.partition("/")
        return (top == "steps" and rest.endswith(".json")) or rest.endswith((f"/{MANIFEST}", "/key.json"))

    wanted = [name for name in stored if is_small(name) and name_of(home() / name) and not (home() / name).exists()]
    for name, content in store.read_many(wanted).items():
        write_copy(home() / name, content)


def _experiments_of(stored: Mapping[str, Stored]) -> set[str]:
    return {name.split("/")[1] for name in stored if name.startswith("experiments/") and name.count("/") > 1}


def _refresh(store: Store, experiment: str, stored: Mapping[str, Stored]) -> None:
    """Have the experiment's files here be those of the store; what is equal already is not fetched.

    Not where another process of this machine is writing them here: they are then newer than the store's.
    """
    top = f"experiments/{experiment}"
    pieces = sorted(name for name in stored if name.startswith(f"{top}/{_LINES}/"))
    files = [name for name in stored if name.startswith(f"{top}/") and name not in pieces and name_of(home() / name)]
    lines = home() / top / f"{_LINES}.jsonl"
    known = pieces_of(_read(lines) or b"")
    same = {name: piece for name, piece in zip(pieces, known, strict=False) if _is(piece, stored[name])}
    changed = [name for name in files if not _is(_read(home() / name), stored[name])]
    gone = [path for path in (home() / top).rglob("[!.]*") if path.is_file() and _name(path) not in stored]
    if (len(same) == len(known) == len(pieces) and not changed and gone in ([], [lines])) or is_leased_beside(
        f"experiment-{experiment}"
    ):
        return
    fetched = store.read_many([*(name for name in pieces if name not in same), *changed])
    for name in changed:
        if name in fetched:
            write_copy(home() / name, fetched[name])
    for path in gone:
        if path != lines or not pieces:
            path.unlink(missing_ok=True)
    if pieces:
        write_copy(lines, b"".join(same.get(name) or fetched.get(name, b"") for name in pieces))


def _is(content: bytes | None, stored: Stored) -> bool:
    """Whether the store certainly has this content; where it gives no MD5, that is not known."""
    return content is not None and hashlib.md5(content, usedforsecurity=False).hexdigest() == stored.etag


def _name(path: Path) -> str:
    return path.relative_to(home()).as_posix()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@contextmanager
def _alone() -> Iterator[None]:
    """One process of this machine at a time opens this working copy."""
    file = home() / "locks" / "opening.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
