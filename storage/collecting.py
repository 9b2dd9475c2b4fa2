"""What no experiment refers to any more, and its removal.

Data sets, models and step records are named by digests. What an experiment's files mention is kept, and so is what the
records and manifests of kept things mention, to the end. No kind of reference has to be known for that, so a mistake
keeps too much, never too little. Young things are kept, and what they mention, as if an experiment mentioned them.

Of a home in an object store, sizes and ages are those of the store, and what is removed is removed there first.
"""

import contextlib
import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from storage.committing import remove, remove_object
from storage.durable import attempt_name
from storage.experiments import Experiment
from storage.fetching import MANIFEST, listing
from storage.home import home, home_url
from storage.locks import exclusive
from storage.names import safe_name
from storage.opening import open_home
from storage.stores import Stored

Kind = Literal["step record", "data set", "model", "ledger", "unfinished", "lock"]

_DIGEST = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_SCRATCH = ".scratch-"
_PLACES: tuple[tuple[Kind, str], ...] = (  # in the order of removal: what points before what it points at
    ("step record", "steps/*/[!.]*.json"),
    ("data set", "datasets/*/[!.]*"),
    ("model", "models/[!.]*"),
    ("ledger", "ledger/[!.]*"),
)
_TELLERS = ("steps/*/{}.json", "datasets/*/{}/manifest.json", "models/{}/manifest.json", "ledger/{}/key.json")
_SECONDS_A_DAY = 86_400.0
_NOTHING: Mapping[str, Stored] = {}
_ATTEMPT_DAYS = 1.0  # another host may be writing it, and we cannot ask whether its process lives


class Garbage(NamedTuple):
    """Something that can go."""

    kind: Kind
    name: str  # where it lies in the home
    bytes: int
    days: float  # since it was last written to
    why: str


@dataclass(frozen=True, slots=True)
class _Thing:
    kind: Kind
    path: Path
    days: float

    @property
    def digest(self) -> str:
        return self.path.name.removesuffix(".json")


def collect_garbage(*, older_than_days: float, delete: bool) -> list[Garbage]:
    """What no experiment refers to and nobody wrote to for so long; removed, if asked for.

    Raises:
        LockedError: an experiment is running; names its process.
    """
    with _no_experiment_running():
        open_home()
        stored = listing()
        sizes = _in_store(stored)
        garbage = [*_garbage(older_than_days, sizes), *_left_in_store(stored, sizes)]
        found = [one for one in garbage if one.days >= older_than_days]
        for one in found if delete else ():
            if one.name in stored and one.kind in ("lock", "unfinished"):
                remove_object(one.name)
            else:
                remove(home() / one.name)
                _remove(home() / one.name)
    return found


def _in_store(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The things that the store holds, by name: their bytes, and when anything of them was last written."""
    found: dict[str, Stored] = {}
    for name, one in stored.items():
        depth = {"steps": 3, "datasets": 3, "models": 2, "ledger": 2}.get(name.partition("/")[0], 0)
        thing = "/".join(name.split("/")[:depth])
        before = found.get(thing, Stored(0, 0.0, ""))
        found[thing] = Stored(before.bytes + one.bytes, max(before.modified, one.modified), "")
    return found


def _left_in_store(stored: Mapping[str, Stored], sizes: Mapping[str, Stored]) -> Iterator[Garbage]:
    """Uploads that were killed before their manifest, and leases that nobody has renewed for a day."""
    for name, one in sizes.items():
        ours = name.startswith(("datasets/", "models/")) and _DIGEST.fullmatch(name.rpartition("/")[2])
        if ours and f"{name}/{MANIFEST}" not in stored:
            days = _days_since(one.modified)
            if days >= _ATTEMPT_DAYS:
                yield Garbage("unfinished", name, one.bytes, days, "whoever uploaded it is gone")
    for name, one in stored.items():
        days = _days_since(one.modified)
        if name.startswith(("locks/step-", "locks/.clock-", ".probe-")) and days >= _ATTEMPT_DAYS:
            yield Garbage("lock", name, one.bytes, days, "nobody holds it")


def _garbage(older_than_days: float, sizes: Mapping[str, Stored]) -> Iterator[Garbage]:
    things = [thing for thing in _things(sizes) if _DIGEST.fullmatch(thing.digest)]  # no other name is one of ours
    unfinished = _unfinished_experiments()
    live = _live([thing.digest for thing in things if thing.days < older_than_days])
    samplings = [_inputs(thing.path) for thing in things if thing.kind == "step record" and thing.digest in live]
    for thing in things:
        if thing.digest in live:
            continue
        if thing.kind == "ledger" and _is_wanted(_read_json(thing.path / "key.json"), samplings, live, unfinished):
            continue
        yield _told(thing.kind, thing.path, thing.days, "no experiment refers to it", sizes)
    yield from _unfinished_work({thing.digest for thing in things if thing.kind == "step record"}, unfinished)
    for path in sorted(home().glob("locks/step-*.lock")):
        if not _is_held(path):
            yield _told("lock", path, _days(path), "nobody holds it")


def _things(sizes: Mapping[str, Stored]) -> Iterator[_Thing]:
    for kind, pattern in _PLACES:
        for path in sorted(home().glob(pattern)):
            stored = sizes.get(path.relative_to(home()).as_posix())
            yield _Thing(kind, path, _days(path) if stored is None else _days_since(stored.modified))


def _live(young: Iterable[str]) -> set[str]:
    """All digests that experiments and young things mention, directly or through what they mention."""
    tellers = _tellers()
    found: set[str] = set()
    new = set(young)
    for file in home().glob("experiments/*/**/*.json*"):
        new |= _mentions(file)
    while new:
        found |= new
        new = {name for digest in new for file in tellers.get(digest, ()) for name in _mentions(file)} - found
    return found


def _tellers() -> dict[str, list[Path]]:
    """Digest -> the files that say what the thing of that name refers to."""
    files: dict[str, list[Path]] = {}
    for pattern in _TELLERS:
        for file in home().glob(pattern.format("[!.]*")):
            name = file.stem if pattern.startswith("steps") else file.parent.name
            files.setdefault(name, []).append(file)
    return files


def _mentions(file: Path) -> set[str]:
    return set(_DIGEST.findall(file.read_text(errors="replace")))


def _unfinished_experiments() -> list[str]:
    """The settings, as text, of each experiment that is not finished."""
    return [
        (folder / "config.json").read_text(errors="replace") if (folder / "config.json").is_file() else ""
        for folder in sorted(home().glob("experiments/[!.]*"))
        if not _is_finished(folder.name)
    ]


def _is_finished(name: str) -> bool:
    try:
        return Experiment(name).state().state == "finished"
    except (OSError, ValueError, ValidationError):  # it cannot be read, so nothing may be concluded from it
        return False


def _is_wanted(key: Any, samplings: Iterable[Any], live: set[str], unfinished: Iterable[str]) -> bool:
    """Whether a kept step drew from the ledger of this key, or an unfinished experiment may be about to."""
    if not isinstance(key, dict) or any(_drew_from(key, inputs) for inputs in samplings):
        return True  # no readable key: nothing can be concluded
    policy = key.get("policy") or {}
    digest, name = policy.get("digest"), policy.get("name")
    return any(digest in live if digest else json.dumps(name) in config for config in unfinished)


def _drew_from(key: Mapping[str, Any], inputs: Any) -> bool:
    if not isinstance(inputs, dict) or not isinstance(inputs.get("sampling"), dict):
        return False
    alike = all(inputs.get(part) == key.get(part) for part in ("policy", "template", "engine"))
    return alike and key.get("decoding", {}).items() <= inputs["sampling"].items()


def _inputs(record: Path) -> Any:
    parts = (_read_json(record) or {}).get("key_parts") or {}
    return parts.get("inputs")


def _unfinished_work(done: set[str], unfinished: list[str]) -> Iterator[Garbage]:
    for path in sorted(home().glob("models/.scratch-*")):
        if path.name.removeprefix(_SCRATCH) in done:
            yield _told("unfinished", path, _days(path), "the step it belongs to is done")
        elif not unfinished:  # else that experiment may go on from it
            yield _told("unfinished", path, _days(path), "every experiment is finished")
    for pattern in (".attempt-*", ".damaged-*"):
        for path in sorted(home().rglob(pattern)):
            days = _days(path)
            if days >= _ATTEMPT_DAYS:
                yield _told("unfinished", path, days, "whoever wrote it is gone")


def _told(kind: Kind, path: Path, days: float, why: str, sizes: Mapping[str, Stored] = _NOTHING) -> Garbage:
    name = path.relative_to(home()).as_posix()
    if name in sizes:
        return Garbage(kind, name, sizes[name].bytes, days, why)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Garbage(kind, name, sum(file.stat().st_size for file in files), days, why)


def _days(path: Path) -> float:
    """Days since anything of it was last written to."""
    newest = max(part.lstat().st_mtime for part in (path, *path.rglob("*")))
    return _days_since(newest)


def _days_since(moment: float) -> float:
    return max(0.0, round((time.time() - moment) / _SECONDS_A_DAY, 3))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None


def _remove(path: Path) -> None:
    if path.suffix == ".lock":
        _remove_lock(path)
    elif path.is_dir():
        aside = path.with_name(attempt_name())  # a kill in between leaves nothing that looks whole
        path.rename(aside)
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)


def _remove_lock(path: Path) -> None:
    """While it is held by us: whoever waits for it sees that it is gone, and makes it anew (storage/locks.py)."""
    with path.open() as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)


def _is_held(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def _no_experiment_running() -> Iterator[None]:
    """Hold the locks of all experiments, so that none is running and none begins."""
    with contextlib.ExitStack() as locks:
        names = {path.stem for path in home().glob("locks/experiment-*.lock")}
        if home_url() is not None:
            names |= {safe_name(f"experiment-{path.name}") for path in home().glob("experiments/[!.]*")}
        for name in sorted(names):
            locks.enter_context(exclusive(name, wait_seconds=0))
        yield
