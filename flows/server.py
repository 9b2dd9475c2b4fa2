"""A private Prefect server for one run: on loopback, its SQLite database in the home, stopped with the run.

Prefect's own in-process server loses task history and leaks slots (PREFECT.md 6), so a real one is started, with what
it would otherwise spread over the user's home folder kept in ours, and without reports to anyone.
"""

import contextlib
import gc
import importlib
import logging
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

from models.children import Child, environment
from storage.home import home

log = logging.getLogger("ratchet")

START_SECONDS = 180.0
POLL_SECONDS = 0.05
# What a run imports sooner or later: by Prefect, by pyarrow at the first value it converts, for the report.
IMPORTED_BY_RUNS = ("prefect.flow_engine", "prefect.task_engine", "fastapi.encoders", "pandas", "jinja2")
ADDRESS = "address"  # file in the private server's folder
HEARTBEAT_SECONDS = 30  # of a flow run; the least that Prefect takes, so that a dead one is soon noticed


class ServerError(RuntimeError):
    """The private Prefect server did not start."""


def configure_prefect() -> None:
    """Set, before Prefect is imported, what our processes want of it; what the user has set stays."""
    folder = prefect_folder()
    for name, value in {
        "PREFECT_HOME": str(folder / "home"),  # Prefect makes it when imported, if the folder it lies in is there
        "PREFECT_PROFILES_PATH": str(folder / "profiles.toml"),
        "PREFECT_LOCAL_STORAGE_PATH": str(folder / "storage"),  # 3.7.7 ignores PREFECT_HOME for these three
        "PREFECT_SERVER_MEMO_STORE_PATH": str(folder / "memo_store.toml"),
        "PREFECT_LOGGING_SETTINGS_PATH": str(folder / "logging.yml"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "ratchet",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the command prints its own lines
        "DO_NOT_TRACK": "1",
    }.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def importing_prefect() -> Iterator[None]:
    """Import Prefect inside: set up as we want it, and without a word on its folder, which is made when needed."""
    configure_prefect()
    if first := "prefect" not in sys.modules and gc.isenabled():
        gc.disable()  # what is imported stays: looking through it for garbage takes a fifth of the time
    unseen = "pandas" not in sys.modules
    if unseen:  # Prefect would import it, which takes half a second, for cache keys of a kind that no step of ours has
        sys.modules["pandas"] = None  # type: ignore[assignment] # what Python's import system reads as "there is none"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Failed to create the Prefect home")
            yield
    finally:
        if unseen:
            del sys.modules["pandas"]
        if first:
            gc.freeze()
            gc.enable()


def prefect_folder() -> Path:
    """Where the private server keeps its database and Prefect its files."""
    return home() / "prefect"


def served_address() -> str | None:
    """The address of the server that `ratchet ui` keeps up over this home, if one answers."""
    try:
        address = (prefect_folder() / ADDRESS).read_text()
        urllib.request.urlopen(f"{address}/api/health", timeout=5).close()
    except OSError:  # there is none, or it does not answer; that a home cannot be used is told when it is checked
        return None
    return address


@contextlib.contextmanager
def announced(address: str) -> Iterator[None]:
    """Have runs started meanwhile use the server at this address, instead of one each on the same database."""
    file = prefect_folder() / ADDRESS
    file.write_text(address)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


class ServerInWaiting:
    """A private server that has everything imported, or soon will have, and writes nothing until it is to serve.

    That takes seconds, in which a preset can be read and checked.

    Args:
        port: on loopback; None: a free one.
        registers_blocks: have it know Prefect's kinds of blocks, as its UI wants it for notifications.
    Raises:
        ServerError: the port is taken.
    """

    def __init__(self, port: int | None, *, registers_blocks: bool) -> None:
        self._folder = prefect_folder()
        port = _free_port(port)
        self._address = f"http://127.0.0.1:{port}"
        self._child = Child(
            ["-m", "flows.server", "serve", str(port)],
            environment=environment(
                offline=True,
                PREFECT_SERVER_API_HOST="127.0.0.1",
                PREFECT_SERVER_API_PORT=str(port),  # the UI asks the server where the API is
                PREFECT_SERVER_REGISTER_BLOCKS_ON_START=str(registers_blocks),
                PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION=str(registers_blocks),  # else it imports all it could
                PREFECT_API_DATABASE_CONNECTION_URL=f"sqlite+aiosqlite:///{self._folder / 'prefect.db'}",
                PREFECT_API_URL=f"{self._address}/api",
            ),
            on_line=lambda line: log.debug("prefect: %s", line),
            works=False,  # it has yet to record how a stopped run ended
        )

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """Have it serve, point this process at it and yield its address, UI included.

        Raises:
            ServerError: it did not answer in time; the message holds its last lines.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._child.hand_over("serve")  # if it has ended, that is told below
        for name in IMPORTED_BY_RUNS:  # while it starts
            importlib.import_module(name)
        try:
            _wait_until_it_answers(self._child, f"{self._address}/api/health")
            point_prefect_at(f"{self._address}/api")
            yield self._address
        finally:
            point_prefect_at(None)

    def end(self) -> None:
        """End it, whether it has served or not."""
        self._child.end(patience_seconds=2.0)


@contextlib.contextmanager
def server_in_waiting(port: int | None = None, *, registers_blocks: bool = False) -> Iterator[ServerInWaiting]:
    """Have a private server get ready inside, and end it with the block."""
    server = ServerInWaiting(port, registers_blocks=registers_blocks)
    try:
        yield server
    finally:
        server.end()


@contextlib.contextmanager
def private_server(port: int | None = None) -> Iterator[str]:
    """Start a server on loopback, point this process at it and yield its address, UI included.

    Args:
        port: None: a free one.
    Raises:
        ServerError: the port is taken, or it did not answer in time; then the message holds its last lines.
    """
    with server_in_waiting(port, registers_blocks=True) as server, server.serving() as address:
        yield address


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Have flows inside send no heartbeats: their thread would hold up the end of a run by up to a second."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


@contextlib.contextmanager
def private_worker(pool: str) -> Iterator[None]:
    """Take scheduled runs off the pool of the server that this process is pointed at, one at a time."""
    child = Child(
        ["-m", "flows.server", "work", pool],
        environment=environment(offline=False, PREFECT_WORKER_QUERY_SECONDS="5"),
        on_line=lambda line: log.info("worker: %s", line),
        works=False,
    )
    try:
        yield
    finally:
        child.end(patience_seconds=10.0)


def _wait_until_it_answers(child: Child, url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.process.poll() is not None:
            raise ServerError(f"the private Prefect server ended with {child.process.returncode}:\n{child.tail()}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(url, timeout=2).close()
            return
        time.sleep(POLL_SECONDS)
    raise ServerError(f"the private Prefect server did not answer at {url} within {START_SECONDS:.0f} s")


def point_prefect_at(url: str | None) -> None:
    from prefect.context import refresh_global_settings_context

    if url is None:
        os.environ.pop("PREFECT_API_URL", None)
    else:
        os.environ["PREFECT_API_URL"] = url
    refresh_global_settings_context()  # it may have been imported, and have read its settings, before


def _free_port(wanted: int | None) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was served a moment ago is free
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:  # else whoever answers there would be taken for our server
            raise ServerError(f"port {wanted} is not free ({error.strerror}); give another, or none") from error
        port: int = probe.getsockname()[1]
        return port


def _serve(port: int) -> None:
    """Get ready, and serve when told so."""
    from models.children import watch_lifeline

    told = threading.Event()
    watch_lifeline(on_text=lambda _: told.set())
    with importing_prefect():
        import uvicorn
        from prefect.server.api.server import create_app

        app = create_app(final=True)
    told.wait()
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def _work(pool: str) -> None:
    import asyncio

    from prefect.workers.process import ProcessWorker

    from models.children import watch_lifeline

    watch_lifeline(with_group=True)
    asyncio.run(ProcessWorker(work_pool_name=pool, limit=1).start())


if __name__ == "__main__":
    import sys

    configure_prefect()
    role, argument = sys.argv[1:]
    _serve(int(argument)) if role == "serve" else _work(argument)
