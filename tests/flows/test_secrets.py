"""Secrets come from the environment and stay there: not in a data set, a key, a log, a report or Prefect's database."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.presets import Preset, PresetError
from flows.rest_em import RestEM
from models import openai_engine
from models.engine import EngineConfigurationError, EngineError
from tests.flows.builders import REPOSITORY, SMOKE
from tests.models.test_openai_engine import failing, sample, serving

PLANTED = "planted-7f3a9c51e2"
AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")  # in a bucket: test_object_store.py
SECRETS = {name: PLANTED for name in (*AWS, "HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "PREFECT_API_AUTH_STRING")}


def run(home: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The smoke preset as a user runs it, with secrets in the environment."""
    command = [sys.executable, "-m", "flows", "run", str(SMOKE), "--home", str(home), *more]
    environment = {**os.environ, **SECRETS, "RATCHET_LOG": "DEBUG", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False
    )


def holding(home: Path) -> list[str]:
    """Files under the home that hold the planted secret."""
    files = [path for path in home.rglob("*") if path.is_file()]
    assert any(path.name == "prefect.db" for path in files)
    return [str(path.relative_to(home)) for path in files if PLANTED.encode() in path.read_bytes()]


@pytest.mark.flow
def test_no_secret_of_the_environment_is_written_or_told_by_a_run(tmp_path: Path) -> None:
    ran = run(tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert holding(tmp_path) == []
    assert PLANTED not in ran.stdout + ran.stderr


@pytest.mark.flow
@pytest.mark.parametrize("status", [401, 429, 500])
def test_a_key_that_an_endpoint_quotes_in_its_failure_is_not_passed_on(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", PLANTED)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(openai_engine, "FIRST_PAUSE_SECONDS", 0.005)
    with serving(lambda number, body: failing(status, f"no such key: {PLANTED}")) as server:
        with pytest.raises((EngineError, EngineConfigurationError), match=r"no such key: \[api key\]") as failed:
            sample(server.url, max_retries=0)
        assert server.headers[0]["Authorization"] == f"Bearer {PLANTED}"
    assert PLANTED not in str(failed.value)


@pytest.mark.parametrize("url", ["http://me:{}@judge:8000/v1", "http://judge:8000/v1?key={}"])
def test_a_preset_whose_endpoint_holds_a_secret_is_refused(url: str) -> None:
    told = "put the key into the environment"
    with pytest.raises(PresetError, match=told):
        Preset(SMOKE, [f"engine={{kind: openai, endpoints: ['{url.format(PLANTED)}']}}"]).config(RestEM)
