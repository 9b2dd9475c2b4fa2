"""What every test gets: a home of its own, so that none is served another's rows."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def ratchet_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home."""
    folder = tmp_path / "ratchet-home"
    monkeypatch.setenv("RATCHET_HOME", str(folder))
    return folder
