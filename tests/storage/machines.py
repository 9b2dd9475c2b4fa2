"""Machines that share a home in an object store: working copies of their own, under one folder of the test."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.home import home
from storage.opening import open_home
from storage.stores import Store, StoreError, current_store


@contextmanager
def machine(name: str) -> Iterator[Path]:
    """Work on the machine of this name; yields its working copy, opened as a command opens it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATCHET_CACHE", str(Path(os.environ["RATCHET_CACHE"]).parent / name))
        open_home()
        yield home()


def store() -> Store:
    """The present home's store."""
    found = current_store()
    assert found is not None
    return found


@contextmanager
def unreachable(monkeypatch: pytest.MonkeyPatch, *operations: str, name: str = "") -> Iterator[None]:
    """The store fails meanwhile in these operations on names that end so, as after the last try."""

    def failing(real: object) -> object:
        def call(self: Store, *arguments: object) -> object:
            if any(isinstance(one, str) and one.endswith(name) for one in arguments):
                raise StoreError("no way through")
            return real(self, *arguments)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        for operation in operations:
            patch.setattr(Store, operation, failing(getattr(Store, operation)))
        yield
