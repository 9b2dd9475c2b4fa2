"""The private Prefect server: on loopback, quiet, and gone with whoever started it."""

import os
import time
import uuid
from pathlib import Path

import httpx
import pytest
from prefect.settings import get_current_settings
from typer.testing import CliRunner

import flows.server
from flows.__main__ import app
from flows.server import (
    ServerError,
    announced,
    configure_prefect,
    private_server,
    served_address,
    server_in_waiting,
    unwatched,
)
from tests.flows.builders import MARK, SMOKE, processes_marked

pytestmark = pytest.mark.flow


def test_the_server_answers_on_loopback_and_its_page_knows_where_its_api_is(prefect_server: str) -> None:
    assert prefect_server.startswith("http://127.0.0.1:")
    assert httpx.get(f"{prefect_server}/api/health").json() is True
    assert httpx.get(f"{prefect_server}/ui-settings").json()["api_url"] == f"{prefect_server}/api"
    assert "<html" in httpx.get(f"{prefect_server}/", follow_redirects=True).text.lower()


def test_the_server_reports_to_no_one_and_keeps_its_files_in_the_home(prefect_server: str) -> None:
    settings = httpx.get(f"{prefect_server}/api/admin/settings").json()
    assert settings["server"]["analytics_enabled"] is False
    home = os.environ["PREFECT_HOME"]
    assert settings["home"] == home
    assert Path(home).parent.name == "prefect"
    assert Path(home).parent.joinpath("prefect.db").is_file()


def test_what_the_user_set_for_prefect_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_CLI_PROMPT", "true")
    configure_prefect()
    assert os.environ["PREFECT_CLI_PROMPT"] == "true"


def test_a_server_that_does_not_answer_in_time_is_told_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setattr(flows.server, "START_SECONDS", 0.3)
    with pytest.raises(ServerError, match=r"did not answer at http://127\.0\.0\.1:"), private_server():
        pass
    assert processes_marked(mark) == []
    assert "PREFECT_API_URL" not in os.environ


def test_a_taken_port_is_refused_and_nobody_elses_server_is_taken_for_ours(prefect_server: str) -> None:
    taken = int(prefect_server.rsplit(":", 1)[1])
    with pytest.raises(ServerError, match=f"port {taken} is not free"), private_server(taken):
        pass


def test_runs_use_the_server_that_is_announced_for_this_home_while_it_answers(
    prefect_server: str, ratchet_home: Path
) -> None:
    (ratchet_home / "prefect").mkdir(parents=True)
    assert served_address() is None
    with announced(prefect_server):
        assert served_address() == prefect_server
    assert served_address() is None
    with announced("http://127.0.0.1:9"):  # left behind by a kill
        assert served_address() is None


def test_a_server_that_cannot_start_is_told_with_its_last_lines(
    ratchet_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ratchet_home / "prefect" / "prefect.db").mkdir(parents=True)  # no place for a database
    told = r"the private Prefect server ended with \d+:\n(?s:.*)unable to open database"
    with pytest.raises(ServerError, match=told), private_server():
        pass


def test_a_server_in_waiting_writes_nothing_and_ends_with_its_block(
    ratchet_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    with server_in_waiting():
        assert len(processes_marked(mark)) == 1
        time.sleep(1)  # it is importing
    assert processes_marked(mark) == []
    assert not ratchet_home.exists()


def test_a_faulty_preset_ends_the_server_that_was_getting_ready_and_writes_nothing(
    ratchet_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    done = CliRunner().invoke(app, ["run", str(SMOKE), "--set", "iterations=0"])
    assert done.exit_code == 2
    assert processes_marked(mark) == []
    assert not ratchet_home.exists()


def test_no_heartbeats_are_sent_to_a_server_that_ends_with_the_run() -> None:
    before = get_current_settings().flows.heartbeat_frequency
    with unwatched():
        assert get_current_settings().flows.heartbeat_frequency is None
    assert get_current_settings().flows.heartbeat_frequency == before
