"""The command with a home in an object store: the results of a folder, seen from every machine, and no secret told."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from flows.__main__ import app
from flows.deploying import deploy
from flows.doctor import examine
from storage import stores
from storage.home import home
from storage.stores import Store
from tests.flows.builders import REPOSITORY, SMOKE, damaged, heard, run_plainly, stored
from tests.flows.test_deploying import NAME
from tests.light import lighten
from tests.storage.machines import machine, store

pytestmark = pytest.mark.flow

PLANTED = "planted-4be07d19a5"


def command(*arguments: str) -> str:
    """What a command prints; it must succeed."""
    ran = CliRunner().invoke(app, list(arguments))
    assert ran.exit_code == 0, ran.output
    return ran.output


def report_here() -> str:
    """The report in the working copy."""
    return (home() / "experiments/rest-em-smoke/report.html").read_text()


def figures_here() -> list[dict[str, Any]]:
    """The iterations as the report has them for programs."""
    found: list[dict[str, Any]] = json.loads(command("status", "rest-em-smoke", "--json"))[0]["iterations"]
    return found


def test_a_run_in_a_bucket_makes_what_a_folder_holds_and_a_lost_machine_costs_nothing(
    s3_home: str, smoke_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lighten(monkeypatch)
    with machine("one"):
        made = stored(run_plainly())
        command("report", "rest-em-smoke")
        report, figures = report_here(), [{**one, "run": ""} for one in figures_here()]
    with machine("two"):
        command("status")
        listed = command("status", "--json")
        assert command("why", "train_sft")
        assert report_here() == report, "it came with the rest of the experiment's record"
        command("report", "rest-em-smoke")
        assert report_here() == report
        assert "52 of 52 steps are cached" in command("plan", str(SMOKE))
        assert list(home().glob("datasets/*/*/*.parquet")), "the report reads rows; nothing else was fetched"
    with machine("three"), heard() as steps:
        experiment = run_plainly()
        assert all(step.cached for step in steps)
        assert stored(experiment) == made
        assert damaged(experiment) == []
        assert '"state": "finished"' in listed
        assert [{**one, "run": ""} for one in figures_here()] == figures
    monkeypatch.setenv("RATCHET_HOME", str(smoke_run))
    from storage.experiments import Experiment

    assert stored(Experiment("rest-em-smoke")) == made


def test_what_is_stored_can_be_exported_traced_and_shown_from_a_machine_that_made_none_of_it(
    s3_home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lighten(monkeypatch)
    with machine("one"):
        experiment = run_plainly("iterations=1", "dpo=null")
        policy = experiment.iterations()[1].policy["digest"]
        ledgers = len(list(home().glob("ledger/*/part-*")))
    with machine("two"):
        command("export", f"models/{policy}", "--to", str(tmp_path / "exported"))
        assert (tmp_path / "exported" / "README.md").exists()
        assert '"whole": true' in command("show", f"models/{policy}")
        prompts = command("show", next(iter(store().names("datasets/prompts"))).rpartition("/")[0])
        prompt_id = prompts.partition('"prompt_id": "')[2][:12]
        assert "rollout" in command("trace", prompt_id)
        assert len(list(home().glob("ledger/*/part-*"))) == ledgers
        assert "nothing to remove" in command("gc", "--older-than", "0")


def test_a_deployment_carries_the_url_and_no_credential(s3_home: str, prefect: str) -> None:
    for _ in deploy([SMOKE], pool="far-pool", at_once=1, cron=None):
        pass
    deployment = httpx.get(f"{prefect}/deployments/name/{NAME}").json()
    assert deployment["job_variables"]["env"]["RATCHET_HOME"] == s3_home
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(deployment)
    httpx.delete(f"{prefect}/deployments/{deployment['id']}")


def test_a_store_out_of_reach_is_a_wrong_configuration(s3_home: str) -> None:
    assert [finding.good for finding in examine() if finding.text.startswith(s3_home)] == [True]
    environment = {**os.environ, "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "RATCHET_LOG": "WARNING"}
    ran = subprocess.run(
        [sys.executable, "-m", "flows", "run", str(SMOKE)],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert ran.returncode == 2, ran.stderr
    assert f"{s3_home}/locks could not be listed" in ran.stderr
    assert "see whether the store can be reached" in ran.stderr


def test_a_network_that_fails_during_a_run_fails_it_and_the_next_run_goes_on(
    s3_home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lighten(monkeypatch)
    monkeypatch.setattr(stores, "PAUSES_SECONDS", (0.0,))
    with machine("one"):
        real, calls = Store.upload, 0

        def flaky(self: Store, file: Path, name: str) -> None:
            nonlocal calls
            calls += name.startswith("datasets/scored")
            if calls > 4:
                raise stores.StoreError("no way through")
            real(self, file, name)

        with monkeypatch.context() as broken:
            broken.setattr(Store, "upload", flaky)
            with pytest.raises(stores.StoreError, match="no way through"):
                run_plainly("iterations=1", "dpo=null")
    with machine("one"), heard() as steps:
        experiment = run_plainly("iterations=1", "dpo=null")
        assert steps[0].cached
        assert not steps[-1].cached
        assert damaged(experiment) == []


def test_no_credential_of_the_store_is_written_or_told_by_a_run(s3_home: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": f"{PLANTED}-id",
        "AWS_SECRET_ACCESS_KEY": f"{PLANTED}-secret",
        "AWS_SESSION_TOKEN": f"{PLANTED}-token",
        "RATCHET_LOG": "DEBUG",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "flows", "run", str(SMOKE), "--set", "iterations=1", "--set", "dpo=null"],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr
    assert PLANTED not in ran.stdout + ran.stderr
    files = [path for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert any(path.name == "prefect.db" for path in files)
    assert [str(path) for path in files if PLANTED.encode() in path.read_bytes()] == []
    contents = store().read_many(store().names())
    assert len(contents) > 100
    assert [name for name, content in contents.items() if PLANTED.encode() in content] == []
