"""Writing so that a kill or a power cut leaves either the whole thing or nothing of it.

What is being written has a name that begins with a dot and says who writes it; a rename makes it real.
"""

import errno
import hashlib
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_ATTEMPT = re.compile(r"\.attempt-(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)-[0-9a-f]{8}")
_MOST_REPLACEMENTS = 10  # of one folder by writers who race each other


def attempt_name() -> str:
    """A name for something unfinished: it says on which host and by which process, and no one else has it."""
    return f".attempt-{this_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


@contextmanager
def attempt_folder(parent: Path) -> Iterator[Path]:
    """A fresh folder inside `parent`, to be renamed when finished; whatever is still there at the end is removed."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_stale_attempts(parent)
    folder = parent / attempt_name()
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale_attempts(folder: Path) -> None:
    """Remove what processes of this host left unfinished when they died. Other hosts' are not ours to judge."""
    for path in folder.glob(".attempt-*"):
        found = _ATTEMPT.fullmatch(path.name)
        if found is None or found["host"] != this_host() or is_alive(int(found["pid"])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_all_stale_attempts(root: Path) -> None:
    """The same for a whole home, one listing a folder: what a kill left where nothing is written again."""
    for folder in [*root.glob("*"), *root.glob("*/*"), *root.glob("experiments/*/*")]:
        if folder.is_dir():
            remove_stale_attempts(folder)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names a folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_file(path: Path, content: str | bytes, *, replace: bool) -> bool:
    """Write a small file all at once. Returns False, and changes nothing, if it is there and not to be replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = path.with_name(attempt_name())
    try:
        attempt.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(attempt)
        if replace:
            attempt.replace(path)
        else:
            path.hardlink_to(attempt)  # the one operation that both creates a name and fails if it is taken
    except FileExistsError:
        return False
    finally:
        attempt.unlink(missing_ok=True)
    sync(path.parent)
    return True


def commit_folder(attempt: Path, final: Path, *, is_whole: Callable[[], bool]) -> bool:
    """Give a finished folder its final name, after its bytes have reached the disk.

    Returns:
        False if a whole folder of that name was there: it stays, and so does the attempt. A damaged one is replaced.
    """
    for path in sorted(attempt.rglob("*")):
        sync(path)
    sync(attempt)
    for _ in range(_MOST_REPLACEMENTS):
        try:
            attempt.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            sync(final.parent)
            return True
        if is_whole():
            return False
        _set_aside(final)
    raise OSError(errno.EEXIST, "other processes keep writing a damaged folder of this name", str(final))


@cache
def this_host() -> str:
    """A short name for this machine and its process ids."""
    namespace = Path("/proc/self/ns/pid")  # containers may share a host's name, but not its process ids
    spaces = str(namespace.readlink()) if namespace.is_symlink() else ""
    return hashlib.sha256(f"{platform.node()} {spaces}".encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _set_aside(folder: Path) -> None:
    aside = folder.with_name(attempt_name())
    try:
        folder.rename(aside)
    except FileNotFoundError:  # another writer was faster
        return
    shutil.rmtree(aside, ignore_errors=True)
