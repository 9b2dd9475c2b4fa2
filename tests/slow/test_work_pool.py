"""Many experiments at once: a server on PostgreSQL, four workers, fifty runs in one home."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.deploying import deploy
from flows.server import point_prefect_at
from storage.experiments import Experiment
from tests.flows.builders import SMOKE, damaged, stored

WORKERS, EXPERIMENTS = 4, 50
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def programs() -> Path | None:
    """The folder with PostgreSQL's programs, if this machine has them."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else found[-1].parent if found else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def started(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own group, ended with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a database of its own."""
    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL is not installed here: no initdb on the path or under /usr/lib/postgresql")
    place = tmp_path_factory.mktemp("postgres")
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # it refuses to run as root
        user = {"user": "postgres"}
        shutil.chown(place, "postgres")
        for parent in (place.parent, place.parent.parent):
            parent.chmod(parent.stat().st_mode | 0o011)
    data, port = place / "data", free_port()
    made = subprocess.run(
        [folder / "initdb", "-D", data, "-U", "prefect", "-A", "trust"], capture_output=True, check=False, **user
    )
    assert made.returncode == 0, made.stderr.decode()
    command = [str(folder / "postgres"), "-D", str(data), "-p", str(port), "-k", str(place), "-h", "127.0.0.1"]
    log = place.parent / "postgres.log"
    with started(command, log, **user):
        for _ in range(100):
            asked = subprocess.run([folder / "pg_isready", "-h", "127.0.0.1", "-p", str(port)], check=False)
            if asked.returncode == 0:
                break
            time.sleep(0.2)
        else:
            pytest.fail(log.read_text())
        subprocess.run(
            [folder / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "prefect"], check=True
        )
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"


@pytest.fixture
def server(postgres: str, tmp_path: Path) -> Iterator[str]:
    """The API of a Prefect server on that database, as the compose file starts it."""
    port = free_port()
    environment = {
        **os.environ,
        "PREFECT_API_DATABASE_CONNECTION_URL": postgres,
        "PREFECT_SERVER_API_PORT": str(port),
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    api = f"http://127.0.0.1:{port}/api"
    with started(command, tmp_path / "server.log", env=environment) as process:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{api}/health").is_success:
                    break
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
        point_prefect_at(api)
        yield api
        point_prefect_at(None)


def presets(folder: Path) -> list[Path]:
    """As many experiments, each with rollouts of its own."""
    text = SMOKE.read_text()
    files = []
    for number in range(EXPERIMENTS):
        file = folder / f"{number}.yaml"
        own = text.replace("experiment: rest-em-smoke", f"experiment: many-{number:02}\nseed: {number}")
        file.write_text(own)
        files.append(file)
    return files


def test_no_run_is_lost_when_four_workers_run_fifty_experiments_in_one_home(
    server: str, tmp_path: Path, ratchet_home: Path
) -> None:
    list(deploy(presets(tmp_path), pool="many", at_once=WORKERS, cron=None))
    runs = []
    for number in range(EXPERIMENTS):
        found = httpx.get(f"{server}/deployments/name/rest-em/many-{number:02}").json()
        body = {"parameters": {"config": found["parameters"]["config"], "advance": False}}
        runs.append(httpx.post(f"{server}/deployments/{found['id']}/create_flow_run", json=body).json()["id"])
    environment = {**os.environ, "PREFECT_API_URL": server, "PREFECT_WORKER_QUERY_SECONDS": "2"}
    command = [
        sys.executable,
        "-m",
        "prefect",
        "worker",
        "start",
        "--pool",
        "many",
        "--type",
        "process",
        "--limit",
        "1",
    ]
    begun = time.monotonic()
    with contextlib.ExitStack() as workers:
        for number in range(WORKERS):
            workers.enter_context(started(command, tmp_path / f"worker-{number}.log", env=environment))
        states = ended(server, runs)
    sys.stdout.write(f"{EXPERIMENTS} runs by {WORKERS} workers took {time.monotonic() - begun:.0f} s\n")
    assert Counter(states.values()) == {"COMPLETED": EXPERIMENTS}
    for number in range(EXPERIMENTS):
        experiment = Experiment(f"many-{number:02}")
        assert experiment.state().state == "finished"
        assert list(stored(experiment)) == ["base", "iteration 1", "iteration 2", "dpo"]
        assert damaged(experiment) == []
    logs = "".join(file.read_text() for file in tmp_path.glob("*.log"))
    assert "deadlock" not in logs
    assert "database is locked" not in logs


def test_a_run_whose_machine_died_is_marked_crashed_and_its_retry_goes_on(
    prefect: str, tmp_path: Path, ratchet_home: Path
) -> None:
    list(deploy([SMOKE], pool="dying", at_once=1, cron=None))
    found = httpx.get(f"{prefect}/deployments/name/rest-em/rest-em-smoke").json()
    slow = {**found["parameters"]["config"], "engine": {"kind": "fake", "seconds_per_request": 0.1}}
    body = {"parameters": {"config": slow, "advance": True}}
    run = httpx.post(f"{prefect}/deployments/{found['id']}/create_flow_run", json=body).json()["id"]
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "dying", "--type", "process"]
    environment = {**os.environ, "PREFECT_API_URL": prefect, "PREFECT_WORKER_QUERY_SECONDS": "2"}
    with started(command, tmp_path / "first.log", env=environment) as worker:
        drawn = ratchet_home / "ledger"
        until(lambda: any(drawn.rglob("part-*.parquet")), seconds=120)  # its flow run has rows that are safe
        os.killpg(worker.pid, signal.SIGKILL)  # worker and flow run, as when the power goes
        assert httpx.get(f"{prefect}/flow_runs/{run}").json()["state_type"] == "RUNNING"
    begun = time.monotonic()
    until(lambda: httpx.get(f"{prefect}/flow_runs/{run}").json()["state_type"] == "CRASHED", seconds=300)
    sys.stdout.write(f"Crashed {time.monotonic() - begun:.0f} s after its death\n")
    assert time.monotonic() - begun > 60  # not before some heartbeats were missed
    again = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
    assert httpx.post(f"{prefect}/flow_runs/{run}/set_state", json=again).json()["status"] == "ACCEPT"
    with started(command, tmp_path / "second.log", env=environment):
        until(lambda: httpx.get(f"{prefect}/flow_runs/{run}").json()["state_type"] == "COMPLETED", seconds=300)
    experiment = Experiment("rest-em-smoke")
    assert (experiment.state().state, list(stored(experiment))) == ("advanced", ["base", "iteration 1"])
    assert httpx.get(f"{prefect}/flow_runs/{run}").json()["name"] == "rest-em-smoke it1"


def until(reached: Callable[[], bool], *, seconds: float) -> None:
    """Wait for something to come true."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.5)


def ended(api: str, runs: list[str]) -> dict[str, str]:
    """The state each run has ended in, once all have."""
    query = {"flow_runs": {"id": {"any_": runs}}}
    while True:
        found = httpx.post(f"{api}/flow_runs/filter", json=query, timeout=60).json()
        states = {run["id"]: run["state_type"] for run in found}
        if len(states) == len(runs) and set(states.values()) <= {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}:
            return states
        time.sleep(2)
