"""The home: the one place that holds everything. Where it is comes from the environment, never from a preset.

A home is a folder, or a place in an object store: then the store is the truth, and this machine works on a folder that
is a copy of it (storage/opening.py).
"""

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

NAMED_BY_USER = ("abfs", "abfss", "az", "wasb", "wasbs", "hdfs", "webhdfs")  # what stands before @ is no credential


def home() -> Path:
    """The folder to read from and write to: RATCHET_HOME, by default ./ratchet-home, or the working copy of a URL."""
    place = _place()
    return _working_copy(place) if "://" in place else Path(place).absolute()


def home_url() -> str | None:
    """The URL of a home in an object store; None: the home is a folder.

    Raises:
        ValueError: the URL holds what may be a credential.
    """
    place = _place()
    if "://" not in place:
        return None
    parts = urlsplit(place)
    told = "@" in parts.netloc and (parts.password is not None or parts.scheme not in NAMED_BY_USER)
    if told or parts.query or parts.fragment:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ValueError(
            f"the home's URL holds more than a place; give it as {shown}, and put credentials into the environment, "
            "where the store's own tools look for them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for instance)"
        )
    return place.rstrip("/")


def home_name() -> str:
    """The home as its user knows it."""
    return home_url() or str(home())


def _place() -> str:
    return os.environ.get("RATCHET_HOME", "ratchet-home")


def _working_copy(url: str) -> Path:
    """Below RATCHET_CACHE, or below the user's cache folder: a folder a URL."""
    url = url.rstrip("/")
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("RATCHET_CACHE") or Path(caches) / "ratchet").absolute()
    parts = urlsplit(url)
    plain = f"{parts.scheme}-{parts.netloc.rpartition('@')[2]}{parts.path}"
    readable = re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")[:60]
    return root / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
