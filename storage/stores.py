"""An object store as we use it: whole objects, listings, and put-if-absent. The only module that knows fsspec.

Every call is tried again while the network fails, and then fails as a `StoreError`. What is relied on: an object
appears whole or not at all; a listing shows what was written before it was asked for; of several writers that create
one object, one succeeds. S3, Google Cloud Storage and Azure promise all three (S3 since 2024). A folder as a store
(file://) promises the last two only: an upload that is killed half-way there leaves half a file, which is noticed when
it is read.
"""

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from storage.home import home_url

T = TypeVar("T")
logger = logging.getLogger(__name__)

PAUSES_SECONDS = (1.0, 5.0, 20.0)  # between tries; each try of s3fs is itself several, some seconds in all
AT_ONCE = 200  # small objects that are read into memory together
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
_ANSWERS = (FileNotFoundError, FileExistsError, PermissionError, NotImplementedError, TypeError, ValueError)


class StoreError(OSError):
    """The object store cannot be reached, or does not do what it is asked."""


class Stored(NamedTuple):
    """An object as a listing tells of it."""

    bytes: int
    modified: float  # seconds since 1970 by the store's clock
    etag: str  # of S3, mostly the MD5 of the content; empty where the store has none


class Store:
    """The objects below one URL, each named by its path below it.

    Raises:
        StoreError: nothing that is installed can read such a URL.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url
        scheme = url.partition("://")[0]
        options = {"auto_mkdir": True} if scheme in ("file", "local") else {"use_listings_cache": False}
        try:
            self._fs, root = url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            package = PACKAGES.get(scheme)
            told = (
                f"pip install {package}" if package else "fsspec knows no such scheme; s3://, gs:// and az:// are some"
            )
            raise StoreError(f"a home at {url} cannot be opened: {told} ({error})") from error
        self._root = str(root).rstrip("/")
        self._create = _creator(self._fs, url)

    def names(self, below: str = "", *, patient: bool = True) -> dict[str, Stored]:
        """All objects, or those below a name, by their whole names.

        Args:
            patient: whether to try again where the store cannot be reached.
        """
        path = f"{self._root}/{below}".rstrip("/")

        def list_() -> Mapping[str, Mapping[str, Any]]:
            self._fs.invalidate_cache()
            found: Mapping[str, Mapping[str, Any]] = self._fs.find(path, detail=True)
            return found

        found = self._tried(list_, "listed", below, patient=patient)
        if found is None:
            raise StoreError(f"{self.url} cannot be listed: there is no such bucket; make it, or correct the URL")
        return {key[len(self._root) + 1 :]: _stored(info) for key, info in found.items() if key != path}

    def read(self, name: str) -> bytes | None:
        """The content of a small object; None: there is none."""
        return self._tried(lambda: bytes(self._fs.cat_file(self._path(name))), "read", name)

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """The contents of small objects; those that are gone are left out."""
        wanted, found = list(names), dict[str, bytes]()
        for start in range(0, len(wanted), AT_ONCE):
            part = {self._path(name): name for name in wanted[start : start + AT_ONCE]}
            if len(part) == 1:  # fsspec then returns the bytes alone
                content = self.read(wanted[start])
                found |= {} if content is None else {wanted[start]: content}
                continue
            read = self._tried(lambda part=part: self._fs.cat(list(part), on_error="return"), "read", wanted[start])  # type: ignore[misc]
            for path, content in (read or {}).items():
                if isinstance(content, bytes):
                    found[part[path]] = content
                elif not isinstance(content, FileNotFoundError):
                    raise self._failure("read", part[path], content) from content
        return found

    def create(self, name: str, content: bytes) -> bool:
        """Write a small object unless there is one of this name; whether it was written, or stood there just so."""
        try:
            self._tried(lambda: self._create(self._path(name), content), "written", name, must=True)
        except FileExistsError:
            return self.read(name) == content  # an earlier try may have come through, its answer lost
        return True

    def write(self, name: str, content: bytes) -> None:
        """Write a small object, over what may be there."""
        self._tried(lambda: self._fs.pipe_file(self._path(name), content), "written", name, must=True)

    def upload(self, file: Path, name: str) -> None:
        """Write a file of any size, streaming, over what may be there."""
        self._tried(lambda: self._fs.put_file(str(file), self._path(name)), "written", name, must=True)

    def download(self, name: str, file: Path) -> bool:
        """Read an object of any size into a file, streaming; False: there is none."""

        def get() -> bool:
            self._fs.get_file(self._path(name), str(file))
            return True

        return self._tried(get, "read", name) or False

    def modified(self, name: str) -> float | None:
        """When an object was written, by the store's clock."""
        return self._tried(lambda: _stored(self._info(name)).modified, "looked at", name)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, in this order; those that are gone already are no error."""
        for name in names:
            self._tried(lambda name=name: self._fs.rm_file(self._path(name)), "removed", name)  # type: ignore[misc]

    def _info(self, name: str) -> Mapping[str, Any]:
        self._fs.invalidate_cache()
        found: Mapping[str, Any] = self._fs.info(self._path(name))
        return found

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _tried(
        self, call: Callable[[], T], done: str, name: str, *, patient: bool = True, must: bool = False
    ) -> T | None:
        """What the call returns; None where it finds nothing, unless it `must`."""
        for pause in (*PAUSES_SECONDS, None) if patient else (None,):
            try:
                return call()
            except FileNotFoundError as error:
                if must:
                    raise self._failure(done, name, error) from error
                return None
            except FileExistsError:
                raise
            except Exception as error:  # each driver has errors of its own for a network that fails
                if pause is None or isinstance(error, _ANSWERS):
                    raise self._failure(done, name, error) from error
                logger.warning(
                    "%s/%s could not be %s yet, trying again in %g s: %s", self.url, name, done, pause, error
                )
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _failure(self, done: str, name: str, error: Exception) -> StoreError:
        advice = "see whether the store can be reached, and run the same command again: nothing is lost"
        if isinstance(error, PermissionError):
            advice = "see to the credentials in the environment (AWS_ACCESS_KEY_ID, ...) and to what they may do there"
        if isinstance(error, FileNotFoundError):
            advice = "see whether the bucket is there"
        told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return StoreError(f"{self.url}{f'/{name}' if name else ''} could not be {done} ({told}); {advice}")


def current_store() -> Store | None:
    """The store of the present home; None: the home is a folder."""
    url = home_url()
    return None if url is None else _opened(url, os.getpid())


@lru_cache(maxsize=8)
def _opened(url: str, _process: int) -> Store:  # a fork cannot go on with its parent's connections
    return Store(url)


def _creator(fs: Any, url: str) -> Callable[[str, bytes], None]:
    """How this driver writes an object that must not be there; fsspec's own way is not atomic and will not do."""

    def open_new(path: str, content: bytes) -> None:
        fs.makedirs(str(Path(path).parent), exist_ok=True)
        with fs.open(path, "xb") as file:
            file.write(content)

    accepted = inspect.signature(getattr(fs, "_pipe_file", lambda: None)).parameters
    if "mode" in accepted:
        return lambda path, content: fs.pipe_file(path, content, mode="create")
    if "overwrite" in accepted:
        return lambda path, content: fs.pipe_file(path, content, overwrite=False)
    if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        return open_new
    raise StoreError(
        f"{url} cannot be a home: its driver has no put-if-absent, by which machines exclude each other; "
        "take s3://, gs://, az:// or a folder"
    )


def _stored(info: Mapping[str, Any]) -> Stored:
    times = (info.get(name) for name in ("LastModified", "last_modified", "updated", "mtime", "modified"))
    found = next(filter(None, times), 0.0)
    if isinstance(found, str):
        found = datetime.fromisoformat(found)
    seconds = found.timestamp() if isinstance(found, datetime) else float(found)
    return Stored(int(info.get("size") or 0), seconds, str(info.get("ETag") or "").strip('"'))
