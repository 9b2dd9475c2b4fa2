"""What Prefect shows of runs that were killed, and that nothing depends on what it remembers."""

import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import SMALL, Place, processes, run_alone, started, stored
from tests.faults.test_two_runs import SLOW, until

pytestmark = pytest.mark.timeout(300)


def ask(api: str, what: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"{api}/{what}/filter", json.dumps(body).encode(), {"content-type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return found


def kill_in_the_middle(place: Place, **environment: Any) -> str:
    """Kill a run under Prefect while it samples; the id of its flow run."""
    state = place.home / "experiments/small/state.json"
    with started(place, SMALL, *SLOW, **environment) as process:
        until(lambda: state.exists() and any(place.drawn()), "the first rollout", patience=90)
        process.kill()
        process.wait()
    return str(json.loads(state.read_text())["flow_run_id"])


def settled(api: str, killed: str) -> None:
    """The killed flow run and its task runs have ended, as Crashed where they had not."""
    by_id = {"flow_runs": {"id": {"any_": [killed]}}}
    (flow_run,) = ask(api, "flow_runs", by_id)
    assert flow_run["state_type"] == "CRASHED"
    assert "was killed" in flow_run["state"]["message"]
    states = {run["state_type"] for run in ask(api, "task_runs", by_id)}
    assert states <= {"COMPLETED", "CRASHED"}
    left = {"flow_runs": {"name": {"any_": ["small"]}, "state": {"type": {"any_": ["RUNNING", "PENDING"]}}}}
    assert ask(api, "flow_runs", left) == []


@pytest.mark.flow
def test_a_killed_run_is_shown_as_crashed_by_a_given_server(
    prefect: str, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    place = Place(tmp_path)
    killed = kill_in_the_middle(place, PREFECT_API_URL=prefect)
    (shown,) = ask(prefect, "flow_runs", {"flow_runs": {"id": {"any_": [killed]}}})
    assert shown["state_type"] == "RUNNING"  # nobody has told the server
    again = run_alone(place, SMALL, deadline=120, PREFECT_API_URL=prefect)
    assert again.status == 0, again.output
    assert f"flow run {killed} as Crashed" in again.output
    settled(prefect, killed)
    assert stored(place.home) == unbroken


@pytest.mark.slow
def test_a_killed_run_is_shown_as_crashed_by_the_private_server_and_a_lost_database_costs_nothing(
    tmp_path: Path, unbroken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.server import private_server

    place = Place(tmp_path)
    killed = kill_in_the_middle(place)
    assert processes(place) == []  # the private server among them
    again = run_alone(place, SMALL, deadline=120)
    assert again.status == 0, again.output
    assert stored(place.home) == unbroken
    monkeypatch.setenv("RATCHET_HOME", str(place.home))
    with private_server() as address:
        settled(f"{address}/api", killed)
    shutil.rmtree(place.home / "prefect")
    cached = run_alone(place, SMALL, deadline=120)
    assert cached.status == 0, cached.output
    assert place.drawn() == []
    assert all(" cached" in line for line in cached.output.splitlines() if " rows " in line)
    assert stored(place.home) == unbroken
    assert processes(place) == []
