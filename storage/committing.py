"""Commits that outlive this machine: on the disk first, as storage/durable.py does it, then in the home's object store.

A commit is noted in the working copy's unpushed/, done on the disk, and uploaded: of a folder, the manifest last, for
without one what lies in the store does not exist. Killed in between, or with the store out of reach, it is uploaded by
the next command that opens this working copy (storage/opening.py). An experiment's own record is not: the store's
stands, and the next run writes it anew. Where the home is a folder, the disk is all there is.
"""

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, unquote

from storage import durable
from storage.fetching import MANIFEST, name_of, write_copy
from storage.home import home
from storage.leases import check_leases
from storage.stores import Store, StoreError, current_store

logger = logging.getLogger(__name__)

CHANGING = ("experiments/", "views/")  # what may be written again under its name, and so is not uploaded late
IDENTITY = "home.json"
UNPUSHED = "unpushed"
REPLACE = "replace"  # content of a note: what the store has under that name goes
NOTED_SECONDS = 86_400.0  # whoever noted it may yet commit it
LINES_A_PIECE = 200  # of steps.jsonl in the store; a piece is written again with each line it gets

_lines = threading.Lock()
_written: dict[str, int] = {}  # bytes of each piece that this process has uploaded


def put_file(path: Path, content: str | bytes, *, replace: bool) -> bool:
    """Write a small file all at once. Returns False if it is there, here or in the store, and not to be replaced.

    Raises:
        StoreError: it is on the disk, but not in the store.
    """
    if replace or not path.exists():
        _will_push(path, replace=replace)
    if not durable.put_file(path, content, replace=replace):
        return False
    return _push(path, replace=replace)


def commit_folder(attempt: Path, final: Path, *, is_whole: Callable[[], bool]) -> bool:
    """Give a finished folder its final name, and have it in the store.

    Returns:
        False if a whole folder of that name was there: it stays, and so does the attempt. A damaged one is replaced.
    Raises:
        StoreError: it is on the disk, but not in the store.
    """
    _will_push(final, replace=True)
    committed = durable.commit_folder(attempt, final, is_whole=is_whole)
    _push_folder(final)
    return committed


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields where to write a file of a name that nobody else uses; it gets that name, and is uploaded, at the end.

    Where it cannot be uploaded now, a warning says so and `push_unpushed` does it: the disk has it.
    """
    attempt = path.with_name(durable.attempt_name())
    _will_push(path, replace=True)
    try:
        yield attempt
        durable.sync(attempt)
        attempt.rename(path)
    finally:
        attempt.unlink(missing_ok=True)
    durable.sync(path.parent)
    try:
        _push(path, replace=True)
    except StoreError as error:
        logger.warning("%s is on this disk only, for now: %s", path.name, error)


def append_line(file: Path, line: str) -> None:
    """Append a line, and have the store's pieces of the file be what it now holds."""
    with file.open("a") as lines:
        lines.write(f"{line}\n")
    store, name = current_store(), name_of(file)
    if store is None or name is None:
        return
    check_leases()
    with _lines:
        pieces = pieces_of(file.read_bytes())
        for number in range(max(0, len(pieces) - 2), len(pieces)):  # the last, and one that it has just left behind
            piece = f"{name.removesuffix('.jsonl')}/{number:05}.jsonl"
            if _written.get(f"{store.url}/{piece}") != len(pieces[number]):
                store.write(piece, pieces[number])
                _written[f"{store.url}/{piece}"] = len(pieces[number])


def remove(path: Path) -> None:
    """Remove a file or folder of the home from the store, its manifest first: from then on it does not exist."""
    store, name = current_store(), name_of(path)
    if store is None or name is None:
        return
    check_leases()
    found = sorted(store.names(name), key=lambda one: not one.endswith(f"/{MANIFEST}"))
    store.remove(found or [name])


def remove_object(name: str) -> None:
    """Remove an object of the store that is no file of the home."""
    if (store := current_store()) is not None:
        check_leases()
        store.remove([name])


def push_unpushed(below: str = "") -> None:
    """Upload what is committed here and, for a kill or the network, not in the store.

    Raises:
        StoreError: it cannot be reached.
    """
    for mark in sorted((home() / UNPUSHED).glob(f"{quote(below, safe='')}*")) if current_store() is not None else ():
        path = home() / unquote(mark.name)
        with contextlib.suppress(FileNotFoundError):  # whoever is at it just now has finished it
            replace = mark.read_text() == REPLACE
            if path.is_dir():
                _push_folder(path)
            elif path.is_file():
                _push(path, replace=replace)
            elif time.time() - mark.stat().st_mtime > NOTED_SECONDS:  # killed before it was committed
                mark.unlink()


def unpushed() -> set[str]:
    """The names of what may be committed here and not in the store."""
    return {unquote(mark.name) for mark in (home() / UNPUSHED).glob("*")}


def pieces_of(lines: bytes) -> list[bytes]:
    """A file of lines, cut as it lies in the store."""
    found = lines.splitlines(keepends=True)
    return [b"".join(found[start : start + LINES_A_PIECE]) for start in range(0, len(found), LINES_A_PIECE)]


def _will_push(path: Path, *, replace: bool) -> None:
    name = name_of(path) if current_store() is not None else None
    if name is None or name.startswith(CHANGING):
        return
    mark = _mark(name)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(REPLACE if replace else "")
    durable.sync(mark.parent)


def _push(path: Path, *, replace: bool) -> bool:
    """Upload a file; False: the store has another of its name, which takes its place here."""
    store, name = current_store(), name_of(path)
    if store is None or name is None:
        return True
    check_leases()
    _claim(store)
    is_ours = replace or store.create(name, path.read_bytes())
    if replace:
        store.upload(path, name)
    elif not is_ours:
        stands = store.read(name)
        if stands is None:  # removed since; the note stays, and the next opening uploads ours
            return True
        write_copy(path, stands)
    _mark(name).unlink(missing_ok=True)
    return is_ours


def _push_folder(folder: Path) -> None:
    """Upload a folder that has a manifest, unless the store has it whole."""
    store, name = current_store(), name_of(folder)
    if store is None or name is None:
        return
    check_leases()
    _claim(store)
    if not _is_whole_in(store, name):
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file != folder / MANIFEST:
                store.upload(file, f"{name}/{file.relative_to(folder).as_posix()}")
        check_leases()
        store.upload(folder / MANIFEST, f"{name}/{MANIFEST}")
    _mark(name).unlink(missing_ok=True)


def _is_whole_in(store: Store, name: str) -> bool:
    stored = store.names(name)
    raw = store.read(f"{name}/{MANIFEST}") if f"{name}/{MANIFEST}" in stored else None
    if raw is None:
        return False
    with contextlib.suppress(ValueError, KeyError, TypeError):  # else the manifest is none of ours, or damaged
        files = {f"{name}/{file['name']}": file["bytes"] for file in json.loads(raw)["files"]}
        return all(one in stored and stored[one].bytes == size for one, size in files.items())
    return False


def _claim(store: Store) -> None:
    """Have the store and this working copy say which home they are."""
    here = home() / IDENTITY
    if here.exists():
        return
    identity = {"format": 1, "id": uuid.uuid4().hex, "made_at": datetime.now(UTC).isoformat(timespec="seconds")}
    store.create(IDENTITY, json.dumps(identity).encode())
    if (stands := store.read(IDENTITY)) is not None:
        write_copy(here, stands)


def _mark(name: str) -> Path:
    return home() / UNPUSHED / quote(name, safe="")
