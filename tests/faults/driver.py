"""The `ratchet` command with faults: it counts what a run does to its home and dies by SIGKILL at the chosen operation.

    python -m tests.faults.driver run PRESET ...     as a process of its own
    python -m tests.faults.driver                    a server that has everything imported and forks a run for each
                                                     line of JSON it reads: a second a run instead of three

Environment of a run:
    FAULT_KILL        JSON, a `Kill`; without it nothing dies
    FAULT_OPERATIONS  a file that gets a line for each operation: its name and path in the home
    FAULT_DRAWN       a file that gets a line for each rollout the fake engine draws
    FAULT_FLUSH_ROWS  how many rows the ledger's writer collects before it appends a part
    FAULT_SETTINGS    JSON, module attribute -> value, for instance {"tasks.caching.RETRY_DELAYS_SECONDS": [0, 0]}
"""

import fnmatch
import importlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from storage.home import home

TORN = ("write", "parquet")  # operations that can be half done


class Kill(NamedTuple):
    """Where a run dies: at the nth operation of this name on a path like this."""

    phase: str  # "before", "torn" (half of the file is written) or "after"
    operation: str = "*"
    path: str = "*"
    nth: int = 1


class Operations:
    """Counts, tells and kills."""

    def __init__(self) -> None:
        told = os.environ.get("FAULT_KILL")
        self.kill = Kill(**json.loads(told)) if told else None
        self.log = os.environ.get("FAULT_OPERATIONS")
        self.home = str(home())
        self.seen = 0
        self.lock = threading.RLock()
        self.inside = threading.local()

    def watch(self, name: str, path: object, real: Callable[[], Any], tear: Callable[[], None] | None = None) -> Any:
        """Do the operation, unless it is the one to die at."""
        place = str(path)
        if not place.startswith(self.home + "/") or getattr(self.inside, "busy", False):
            return real()
        place = place[len(self.home) + 1 :]
        with self.lock:
            chosen = False
            if self.kill and fnmatch.fnmatch(name, self.kill.operation) and fnmatch.fnmatch(place, self.kill.path):
                self.seen += 1
                chosen = self.seen == self.kill.nth
            append(self.log, f"{name} {place}")
            if chosen and self.kill and self.kill.phase == "before":
                die()
            if chosen and self.kill and self.kill.phase == "torn" and tear is not None:
                tear()
                die()
            try:
                self.inside.busy = True
                return real()
            finally:
                self.inside.busy = False
                if chosen:
                    die()


def append(file: str | None, line: str) -> None:
    """Add a line, seen by others at once, whatever happens next."""
    if file:
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, f"{line}\n".encode())
        os.close(descriptor)


def die() -> None:
    """As `kill -9` does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def place_of(path: Any, dir_fd: int | None = None) -> str:
    """The absolute path of what a call of `os` is about."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")  # noqa: PTH115
    name = os.fspath(path)
    return f"{place_of(dir_fd)}/{name}" if dir_fd is not None else os.path.abspath(name)  # noqa: PTH100


def install() -> None:
    """Put ourselves between the program and what lasts."""
    operations = Operations()
    for name, last in {"rename": 1, "replace": 1, "link": 1, "fsync": 0, "mkdir": 0, "unlink": 0, "rmdir": 0}.items():
        setattr(os, name, watched_call(operations, name, getattr(os, name), last))
    watch_writes(operations)
    watch_parquet(operations)
    watch_store(operations)
    watch_training(operations)
    watch_engine()
    from storage.ledger import LedgerWriter

    if rows := os.environ.get("FAULT_FLUSH_ROWS"):
        assert LedgerWriter.__init__.__kwdefaults__ is not None
        LedgerWriter.__init__.__kwdefaults__["flush_rows"] = int(rows)
    for setting, value in json.loads(os.environ.get("FAULT_SETTINGS", "{}")).items():
        module, _, attribute = setting.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)


def watched_call(operations: Operations, name: str, real: Callable[..., Any], last: int) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        directory = options.get("dst_dir_fd") if last else options.get("dir_fd")
        place = place_of(arguments[last], directory)
        return operations.watch(name, place, lambda: real(*arguments, **options))

    return call


def watch_writes(operations: Operations) -> None:
    def watched(write: Callable[..., int]) -> Callable[..., int]:
        def call(self: Path, data: Any, *arguments: Any, **options: Any) -> int:
            def tear() -> None:
                write(self, data[: len(data) // 2], *arguments, **options)

            done: int = operations.watch(
                "write", self.absolute(), lambda: write(self, data, *arguments, **options), tear
            )
            return done

        return call

    Path.write_text, Path.write_bytes = watched(Path.write_text), watched(Path.write_bytes)  # type: ignore[method-assign]


def watch_parquet(operations: Operations) -> None:
    import pyarrow.parquet as pq

    write_table, close = pq.write_table, pq.ParquetWriter.close

    def watched_write(table: Any, where: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(where, str | os.PathLike):  # into memory: nothing lasts
            return write_table(table, where, *arguments, **options)

        def tear() -> None:
            write_table(table, where, *arguments, **options)
            os.truncate(where, os.path.getsize(where) // 2)  # noqa: PTH202

        place = Path(where).absolute()
        return operations.watch("parquet", place, lambda: write_table(table, where, *arguments, **options), tear)

    def watched_close(self: Any) -> Any:
        where = self.where
        if not isinstance(where, str | os.PathLike):
            return close(self)
        return operations.watch("parquet", Path(where).absolute(), lambda: close(self), lambda: None)

    pq.write_table, pq.ParquetWriter.close = watched_write, watched_close


def watch_store(operations: Operations) -> None:
    from storage.stores import Store

    create, write, upload, remove = Store.create, Store.write, Store.upload, Store.remove

    def place(name: str) -> str:
        return f"{operations.home}/{name}"

    def watched_create(self: Any, name: str, content: bytes) -> Any:
        return operations.watch("store.create", place(name), lambda: create(self, name, content))

    def watched_write(self: Any, name: str, content: bytes) -> Any:
        return operations.watch("store.write", place(name), lambda: write(self, name, content))

    def watched_upload(self: Any, file: Path, name: str) -> Any:
        return operations.watch("store.upload", place(name), lambda: upload(self, file, name))

    def watched_remove(self: Any, names: Any) -> None:
        for name in names:
            operations.watch("store.remove", place(name), lambda name=name: remove(self, [name]))

    Store.create, Store.write = watched_create, watched_write  # type: ignore[method-assign]
    Store.upload, Store.remove = watched_upload, watched_remove  # type: ignore[method-assign]


def watch_training(operations: Operations) -> None:
    from models import fake_engine

    train = fake_engine.train_fake

    def watched(weights: str, completions_correct_share: float, rows: int, output: Path) -> None:
        operations.watch("train", output, lambda: train(weights, completions_correct_share, rows, output))

    fake_engine.train_fake = watched


def watch_engine() -> None:
    from models.fake_engine import FakeEngine

    use, sample, file = FakeEngine.use, FakeEngine.sample, os.environ.get("FAULT_DRAWN")

    def watched_use(self: Any, model: Any) -> None:
        self.identity = model.ref.identity
        use(self, model)

    def watched_sample(self: Any, requests: Any, sampling: Any) -> Iterator[Any]:
        for completion in sample(self, requests, sampling):
            index, prompt_id = completion.key.split("/", 1)
            append(file, json.dumps([self.identity, sampling.temperature, sampling.seed, prompt_id, int(index)]))
            yield completion

    FakeEngine.use, FakeEngine.sample = watched_use, watched_sample  # type: ignore[method-assign]


def command(arguments: list[str]) -> None:
    """The command itself, faults in place."""
    from flows.__main__ import main

    install()
    logging.getLogger().handlers.clear()  # Prefect's: the command is the first to import it when nobody interferes
    sys.argv = ["ratchet", *arguments]
    main()


def serve() -> None:
    """Fork a run for each line {"arguments", "environment", "log"}; answer with its process id, then its status."""
    import matplotlib.pyplot  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import flows.rest_em  # noqa: F401
    import tasks.observing
    import tasks.reporting  # noqa: F401

    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if not child:
            run_forked(wanted)
        answer(child)
        answer(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def run_forked(wanted: dict[str, Any]) -> None:
    status = 70
    try:
        os.setsid()
        os.environ.update(wanted["environment"])
        log = os.open(wanted["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        command(wanted["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        os._exit(status)


def answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        command(sys.argv[1:])
    else:
        serve()
