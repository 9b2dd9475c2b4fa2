"""What every test gets: a home of its own, so that none is served another's rows, and nothing written outside of it."""

import atexit
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.server import configure_prefect

# Prefect reads its folders when it is imported: they are set before any test module is.
SESSION_HOME = Path(tempfile.mkdtemp(prefix="ratchet-tests-"))
atexit.register(shutil.rmtree, SESSION_HOME, ignore_errors=True)
os.environ["RATCHET_HOME"] = str(SESSION_HOME)
(SESSION_HOME / "prefect").mkdir()
os.environ.pop("PREFECT_API_URL", None)
configure_prefect()


@pytest.fixture(autouse=True)
def ratchet_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home."""
    folder = tmp_path / "ratchet-home"
    monkeypatch.setenv("RATCHET_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server of our own; it holds what tests of this session put there, in memory."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_home(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty home in a bucket of its own; its URL. The working copy is in this test's folder."""
    from fsspec import filesystem

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "a-key",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
        "NO_PROXY": "127.0.0.1",
        "RATCHET_CACHE": str(tmp_path / "one"),
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex}"
    filesystem("s3").mkdir(bucket)
    monkeypatch.setenv("RATCHET_HOME", f"s3://{bucket}/home")
    return f"s3://{bucket}/home"


@pytest.fixture
def made_up_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds what presets take from the hub's Anthropic/hh-rlhf and google/IFEval, made up."""
    for split in ("train", "test"):
        file = tmp_path / "hub" / "Anthropic" / "hh-rlhf" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = ({"chosen": f"\n\nHuman: Why is {n} a number?\n\nAssistant: So.\n\nHuman: Oh."} for n in range(900))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ifeval = tmp_path / "hub" / "google" / "IFEval" / "train.jsonl"
    ifeval.parent.mkdir(parents=True)
    ifeval.write_text('{"prompt": "Write a song in four lines, without any comma."}\n')
    monkeypatch.setenv("RATCHET_DATA", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(autouse=True)
def engines_end_with_the_test() -> Iterator[None]:
    """No engine is left warm for the next test, and none is refused to it."""
    yield
    import sys

    if serving := sys.modules.get("tasks.serving"):
        serving.close_engines()
        serving.stopping.clear()


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """The address of a private Prefect server that all flow tests share; this process is not pointed at it yet."""
    from flows.server import point_prefect_at, private_server

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATCHET_HOME", str(SESSION_HOME))
        with private_server() as address:
            point_prefect_at(None)
            yield address


@pytest.fixture
def prefect(prefect_server: str) -> Iterator[str]:
    """Flows called in this test are recorded by the private server; yields the address of its API."""
    from flows.server import point_prefect_at

    point_prefect_at(f"{prefect_server}/api")
    yield f"{prefect_server}/api"
    point_prefect_at(None)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of one finished smoke run; look, do not touch."""
    from tasks.serving import close_engines
    from tests.flows.builders import run_plainly

    folder = tmp_path_factory.mktemp("smoke") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATCHET_HOME", str(folder))
        run_plainly()
        close_engines()
    return folder


@pytest.fixture
def finished(smoke_run: Path, ratchet_home: Path) -> Path:
    """This test's home, holding a finished smoke run."""
    shutil.copytree(smoke_run, ratchet_home)
    return ratchet_home
