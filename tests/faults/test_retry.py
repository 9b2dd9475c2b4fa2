"""A failed run of a served recipe is retried as Prefect does it, and draws only what failed."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.harness import REPOSITORY, SMALL, Place, in_ledger, leftovers, processes, stored
from tests.faults.test_prefect_state import ask
from tests.faults.test_two_runs import until

# Prefect may take a quick retry for a crash (docs/PREFECT.md 2), which makes this no test for every push.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

BROKEN = "79 + 45"  # the first of the small preset's training prompts: in shard 0 of 4
STARTING_SECONDS = 60.0
HEEDED_SECONDS = 3.0  # until Prefect has taken note of a process that ended
RUN_SECONDS = 90.0


def call(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def found(url: str) -> dict[str, Any] | None:
    try:
        return call(url)
    except urllib.error.HTTPError:
        return None


def by_button(api: str, flow_run: str) -> None:
    """As ui-v2 of Prefect 3.7.7 does it."""
    state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
    assert call(f"{api}/flow_runs/{flow_run}/set_state", {"state": state, "force": True})["status"] == "ACCEPT"


def by_first_button(api: str, flow_run: str) -> None:
    """As the UI that Prefect 3.7.7 shows by default does it: the server may refuse."""
    state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
    assert call(f"{api}/flow_runs/{flow_run}/set_state", {"state": state, "force": False})["status"] == "ACCEPT"


def by_command(api: str, flow_run: str) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "prefect", "flow-run", "retry", flow_run],
        env={**os.environ, "PREFECT_API_URL": api},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.returncode == 0, told.stdout + told.stderr


@contextmanager
def served(place: Place, api: str, broken: Path) -> Iterator[str]:
    """The recipe as a deployment, its id; another process runs what is scheduled."""
    environment = place.environment(
        PREFECT_API_URL=api, PREFECT_RUNNER_POLL_FREQUENCY="1", FAULT_BROKEN=str(broken), PYTHONPATH=str(REPOSITORY)
    )
    with (place.folder / "served.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.serving_driver", place.mark],
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=place.folder,
            start_new_session=True,
        )
        try:
            url = f"{api}/deployments/name/rest-em/{place.mark}"
            until(lambda: process.poll() is not None or found(url), "the deployment", patience=STARTING_SECONDS)
            assert process.poll() is None, (place.folder / "served.log").read_text()
            yield call(url)["id"]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ended(api: str, flow_run: str, attempt: int) -> dict[str, Any]:
    """The flow run, once it has ended for the nth time."""
    run: dict[str, Any] = {}

    def over() -> bool:
        run.update(call(f"{api}/flow_runs/{flow_run}"))
        return run["run_count"] == attempt and run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

    until(over, f"the end of attempt {attempt}", patience=RUN_SECONDS)
    return run


def shard_states(api: str, flow_run: str, attempt: int) -> dict[str, str]:
    """Each shard of the first sampling in an attempt, and how it ended; waits until the server has recorded them."""
    runs: dict[str, str] = {}

    def recorded() -> bool:
        tasks = ask(api, "task_runs", {"flow_runs": {"id": {"any_": [flow_run]}}})
        runs.clear()
        for task in tasks:
            if task["name"].startswith("it1 sample_rollouts shard ") and task["flow_run_run_count"] == attempt:
                runs[task["name"].removeprefix("it1 sample_rollouts ")] = task["state_name"]
        return len(runs) == 4 and set(runs.values()) <= {"Completed", "Cached", "Failed"}

    until(recorded, f"the record of attempt {attempt}'s shards: {runs}", patience=30)
    return runs


@pytest.mark.parametrize("retry", [by_button, by_first_button, by_command])
def test_a_retry_of_a_served_run_draws_what_failed_and_nothing_else(
    retry: Callable[[str, str], None], prefect: str, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    place, broken = Place(tmp_path), tmp_path / "broken"
    broken.write_text(BROKEN)
    with served(place, prefect, broken) as deployment:
        config = {**yaml.safe_load(SMALL.read_text())}
        created = call(f"{prefect}/deployments/{deployment}/create_flow_run", {"parameters": {"config": config}})
        flow_run = str(created["id"])
        first = ended(prefect, flow_run, attempt=1)
        assert first["state_name"] == "Failed", first["state"]["message"]
        assert "1 of 4 shards failed: [0]" in first["state"]["message"]
        assert "retry this flow run" in first["state"]["message"]
        assert shard_states(prefect, flow_run, attempt=1) == {
            "shard 0": "Failed", "shard 1": "Completed", "shard 2": "Completed", "shard 3": "Completed"
        }  # fmt: skip
        safe, drawn_before = in_ledger(place.home), len(place.drawn())

        # Pressed sooner, Prefect takes the end of the first attempt's process for a crash of the second.
        until(lambda: not any("spawn_main" in line for line in processes(place, 0)), "the end of the first process")
        time.sleep(HEEDED_SECONDS)
        broken.unlink()
        retry(prefect, flow_run)
        second = ended(prefect, flow_run, attempt=2)
        assert second["state_name"] == "Completed", second["state"]["message"]
        assert shard_states(prefect, flow_run, attempt=2) == {
            "shard 0": "Completed", "shard 1": "Cached", "shard 2": "Cached", "shard 3": "Cached"
        }  # fmt: skip
    now = Counter(place.drawn()[drawn_before:])
    assert now == Counter(unbroken["ledger"]) - safe  # each once, and none that was safe
    assert stored(place.home) == unbroken
    assert leftovers(place) == []
    assert processes(place) == []
