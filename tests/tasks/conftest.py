"""A finished experiment for tests that look at one: run once, copied into the home of each test that asks for it."""

import shutil
from pathlib import Path

import pytest

from storage.experiments import Experiment
from tests.flows.builders import run_plainly
from tests.light import lighten


@pytest.fixture(scope="session")
def smoke_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the smoke experiment of one iteration and a DPO stage. Not to be written to."""
    folder = tmp_path_factory.mktemp("smoke") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATCHET_HOME", str(folder))
        lighten(patch)
        run_plainly("iterations=1")
    return folder


@pytest.fixture
def smoke(smoke_home: Path, ratchet_home: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """The finished smoke experiment, in this test's own home; `run_plainly("iterations=1")` reuses all of it."""
    lighten(monkeypatch)
    shutil.copytree(smoke_home, ratchet_home)
    return Experiment("rest-em-smoke")
