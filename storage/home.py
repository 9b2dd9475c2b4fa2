"""The home: the one folder that holds everything. Where it is comes from the environment, never from a preset."""

import os
from pathlib import Path


def home() -> Path:
    """The folder named by RATCHET_HOME, by default ./ratchet-home."""
    return Path(os.environ.get("RATCHET_HOME", "ratchet-home")).absolute()
