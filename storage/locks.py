"""Locks that die with their holder: the kernel frees them, whatever killed the process.

In a home in an object store, other machines are excluded too, by a lease (storage/leases.py says what that guarantees).
"""

import fcntl
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from storage.home import home
from storage.leases import LeaseHeldError, leased
from storage.names import safe_name

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1


class LockedError(RuntimeError):
    """Someone else holds the lock."""


@contextmanager
def exclusive(name: str, *, wait_seconds: float | None) -> Iterator[None]:
    """Hold the lock of this name; processes, and threads of one process, exclude each other.

    A process forked while the lock is held shares it; children started through `subprocess` do not.

    Args:
        wait_seconds: how long to wait for another holder; 0: not at all, None: for ever.
    Raises:
        LockedError: it is still held after that time; the message names the holder.
    """
    path = home() / "locks" / f"{safe_name(name)}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open_locked(path, name, wait_seconds) as file:
        try:
            _write_holder(file)
            with _leased(name, wait_seconds):
                yield
        finally:
            file.truncate(0)
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def _leased(name: str, wait_seconds: float | None) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(leased(name, wait_seconds=wait_seconds))
        except LeaseHeldError as error:
            raise LockedError(_refusal(name, str(error), wait_seconds)) from error
        yield


def _open_locked(path: Path, name: str, wait_seconds: float | None) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _acquire(file, name, wait_seconds)
            if _is_still(path, file):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # `ratchet gc` removed the file while we waited for it


def _is_still(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _acquire(file: IO[str], name: str, wait_seconds: float | None) -> None:
    started = time.monotonic()
    waiting = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            waited = time.monotonic() - started
            if wait_seconds is not None and waited >= wait_seconds:
                raise LockedError(_refusal(name, _holder(file), wait_seconds)) from error
            if not waiting:
                logger.info("waiting for %r, locked by %s", name, _holder(file))
            waiting = True
            time.sleep(_POLL_SECONDS)
        else:
            return


def _refusal(name: str, holder: str, wait_seconds: float | None) -> str:
    return (
        f"{name!r} is locked by {holder} and was not free within {wait_seconds:g} s; "
        "wait for it to end, or end it, and run the same command again"
    )


def _write_holder(file: IO[str]) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": platform.node(), "command": " ".join(sys.argv)[:200], "since": since}
    file.truncate(0)
    file.write(json.dumps(holder))
    file.flush()


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
    except ValueError:  # it has not written its name yet
        return "another process"
    return f"process {holder['pid']} on {holder['host']} ({holder['command']!r}) since {holder['since']}"
