"""Leases: locks in an object store, for machines that share a home there.

    <home>/locks/<name>/<generation>.json     one object a lock, of its latest holder

Who wants a lock creates the next generation, put-if-absent, once the latest is released or expired. The holder renews
its own object every so often; one that it has not renewed for SECONDS, as the store's clock tells, is expired. A
holder that died on this machine is known to be dead at once.

What is guaranteed: two holders never both take a lease to be theirs for longer than it takes to notice. The holder of
a lease writes to the store only while its own last renewal is younger than SECONDS; after that, or when another has
taken the lease, `check_leases` raises and nothing more is written. Renewing is to write first and to look for a newer
generation then; taking over is to create the newer generation first and to look whether the older was renewed then:
one of the two always sees the other. Clocks of machines are never compared, only the store's with itself; they need to
run at about the same speed. What is not: a write that was under way when the lease went over may still land. Data
sets, models and rollouts are named by content or are unique, so it does no harm to them; an experiment's own record
could for a moment show what the old holder wrote.
"""

import json
import logging
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from storage.durable import is_alive, this_host
from storage.home import home
from storage.names import safe_name
from storage.stores import Store, StoreError, current_store

logger = logging.getLogger(__name__)

SECONDS = 60.0  # a lease that was not renewed for so long is anybody's
RENEWALS = 4  # in that time
SLACK_SECONDS = 2.0  # the store may tell times in whole seconds
POLL_SECONDS = 2.0


class LeaseHeldError(RuntimeError):
    """Another process, here or elsewhere, holds the lease; the message names it."""


class LeaseLostError(RuntimeError):
    """Another process has taken over a lease of this one, which must write no more."""


@dataclass(slots=True, eq=False)
class Lease:
    """A lease that this process holds."""

    store: Store
    name: str
    generation: int
    content: dict[str, Any]
    valid_until: float  # monotonic
    lost: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True)
class _Seen:
    """The latest generation of a lock, when we first saw it like this, and how old it was then."""

    generation: int
    raw: bytes
    content: dict[str, Any]
    since: float
    age: float


_held: list[Lease] = []
_keeping = threading.Lock()  # held to change _held or to start the keeper
_keeper: threading.Thread | None = None


@contextmanager
def leased(name: str, *, wait_seconds: float | None) -> Iterator[None]:
    """Hold the lease of this name in the present home's store; nothing is done where the home is a folder.

    Raises:
        LeaseHeldError: it is still held after that time.
    """
    store = current_store()
    if store is None:
        yield
        return
    lease = _acquire(store, name, wait_seconds)
    _keep(lease)
    try:
        yield
    finally:
        _release(lease)


def check_leases() -> None:
    """Raise unless all leases of this process are still its own; to be called before anything is written.

    Raises:
        LeaseLostError: another process has taken one over.
        StoreError: the store has not been reached for so long that another may have.
    """
    for lease in list(_held):
        if time.monotonic() >= lease.valid_until:
            _renew(lease)
        if lease.lost:
            raise LeaseLostError(
                f"this process has lost the lock {lease.name!r}: {lease.lost}; it writes no more to {lease.store.url}. "
                "Run the same command again once the other is done: what was finished is reused"
            )


def is_leased(name: str) -> bool:
    """Whether a process, here or elsewhere, holds the lease of this name."""
    store = current_store()
    if any(lease.name == name and lease.store is store and not lease.lost for lease in _held):
        return True
    seen = _look(store, name, None) if store is not None else None
    return seen is not None and not _is_free(seen)


def is_leased_beside(name: str) -> bool:
    """Whether another process that shares our working copy holds the lease of this name."""
    store = current_store()
    seen = _look(store, name, None) if store is not None else None
    ours = {"host_id": this_host(), "home": str(home())}
    return (
        seen is not None
        and not _is_free(seen)
        and seen.content["pid"] != os.getpid()
        and all(seen.content[key] == value for key, value in ours.items())
    )


def _acquire(store: Store, name: str, wait_seconds: float | None) -> Lease:
    started = time.monotonic()
    seen: _Seen | None = None
    told = False
    if lease := _take(store, name, None):  # mostly nobody has ever had it
        return lease
    while True:
        seen = _look(store, name, seen)
        if seen is None or _is_free(seen):
            if lease := _take(store, name, seen):
                return lease
            continue
        if wait_seconds is not None and time.monotonic() - started >= wait_seconds:
            raise LeaseHeldError(f"{_holder(seen.content)}, which is taken for dead {SECONDS:g} s after its last sign,")
        if not told:
            logger.info("waiting for %r, locked by %s", name, _holder(seen.content))
        told = True
        time.sleep(min(POLL_SECONDS, SECONDS / RENEWALS))


def _take(store: Store, name: str, seen: _Seen | None) -> Lease | None:
    """Create the next generation; None: another was faster, or the last holder is alive after all."""
    generation = seen.generation + 1 if seen else 1
    content = {
        "pid": os.getpid(),
        "host": platform.node(),
        "host_id": this_host(),
        "home": str(home()),
        "command": " ".join(sys.argv)[:200],
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
        "seconds": SECONDS,
        "renewed": 0,
        "released": False,
    }
    sent = time.monotonic()
    if not store.create(_object(name, generation), _raw(content)):
        return None
    older = [one for one in store.names(_folder(name)) if one != _object(name, generation)]
    if seen is not None and store.read(_object(name, seen.generation)) not in (seen.raw, None):
        store.remove([_object(name, generation)])
        return None
    if any(_generation(one) > generation for one in older):  # whoever made it has not seen ours
        store.remove([_object(name, generation)])
        return None
    store.remove(older)
    return Lease(store, name, generation, content, sent + SECONDS - SLACK_SECONDS)


def _renew(lease: Lease) -> None:
    with lease.lock:
        if lease.lost:
            return
        sent = time.monotonic()
        lease.content["renewed"] += 1
        lease.store.write(_object(lease.name, lease.generation), _raw(lease.content))
        newer = [n for n in lease.store.names(_folder(lease.name)) if _generation(n) > lease.generation]
        if newer:
            content = lease.store.read(max(newer))
            lease.lost = f"it was taken over by {_holder(json.loads(content)) if content else 'another process'}"
            with suppress(StoreError):
                lease.store.remove([_object(lease.name, lease.generation)])
            return
        lease.valid_until = sent + lease.content["seconds"] - SLACK_SECONDS


def _release(lease: Lease) -> None:
    with _keeping:
        _held.remove(lease)
    if lease.lost:
        return
    with lease.lock:
        lease.content["released"] = True
        try:
            lease.store.write(_object(lease.name, lease.generation), _raw(lease.content))
        except StoreError as error:
            logger.warning("the lock %r stays for %g s: %s", lease.name, lease.content["seconds"], error)


def _keep(lease: Lease) -> None:
    """Have the lease renewed until it is released; one thread does so for all of this process."""
    global _keeper
    with _keeping:
        _held.append(lease)
        if _keeper is None or not _keeper.is_alive():
            _keeper = threading.Thread(target=_renew_all, name="leases", daemon=True)
            _keeper.start()


def _renew_all() -> None:
    """End when there is nothing to renew any more."""
    while True:
        with _keeping:
            held = [lease for lease in _held if not lease.lost]
            if not held:
                global _keeper
                _keeper = None
                return
            shortest = min(lease.content["seconds"] for lease in held)
        time.sleep(shortest / RENEWALS)
        for lease in held:
            try:
                if lease in _held:
                    _renew(lease)
            except StoreError as error:  # as long as nobody else takes it, it can be renewed later
                logger.warning("the lock %r could not be renewed: %s", lease.name, error)
            if lease.lost:
                logger.warning("the lock %r is lost: %s", lease.name, lease.lost)


def _look(store: Store, name: str, before: _Seen | None) -> _Seen | None:
    """The latest generation as it stands; it keeps its age if nothing of it has changed since."""
    names = store.names(_folder(name))
    latest = max(names, key=_generation, default=None)
    raw = store.read(latest) if latest else None
    if latest is None or raw is None:
        return None
    generation = _generation(latest)
    if before is not None and (before.generation, before.raw) == (generation, raw):
        return before
    content = json.loads(raw)
    age = 0.0 if _is_free_at_sight(content) else _clock(store) - names[latest].modified
    return _Seen(generation, raw, content, time.monotonic(), age)


def _is_free(seen: _Seen) -> bool:
    age = seen.age + time.monotonic() - seen.since
    return _is_free_at_sight(seen.content) or age > float(seen.content["seconds"])


def _is_free_at_sight(content: dict[str, Any]) -> bool:
    return content["released"] or (content["host_id"] == this_host() and not is_alive(content["pid"]))


def _clock(store: Store) -> float:
    """The present time as the store tells it: of an object written just now."""
    name = f"locks/.clock-{uuid.uuid4().hex[:12]}"
    store.write(name, b"now")
    try:
        return store.modified(name) or 0.0
    finally:
        store.remove([name])


def _holder(content: dict[str, Any]) -> str:
    return f"process {content['pid']} on {content['host']} ({content['command']!r}) since {content['since']}"


def _raw(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()


def _folder(name: str) -> str:
    return f"locks/{safe_name(name)}"


def _object(name: str, generation: int) -> str:
    return f"{_folder(name)}/{generation:012}.json"


def _generation(name: str) -> int:
    return int(name.rpartition("/")[2].removesuffix(".json"))
