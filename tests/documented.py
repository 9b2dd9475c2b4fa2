"""A clone and a virtual environment for the commands of the documentation, thrown away with the test."""

import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

from tests.benchmark_documents import write_documents
from tests.pages import REPOSITORY, Block, blocks

LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "ratchet-home", ".peers"
)
SCRIPTS = {"ratchet": "flows.__main__:main", "prefect": "prefect.cli:app", "pip": "pip._internal.cli.main:main"}
CONSOLE = "#!{python}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"


SECONDS_A_BLOCK = 1200.0  # many times what it takes, for machines that do other things too


class Clone:
    """What a reader has who has followed the quick start so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "ratchet"
        shutil.copytree(REPOSITORY, self.folder, ignore=LEFT_BEHIND)
        self._bin = _environment(self.folder / ".venv")
        self._documents = write_documents(folder / "documents")
        self._user = folder / "user"
        self._user.mkdir()

    def run(self, block: Block, timeout_seconds: float) -> None:
        """Run a block of commands, or of Python, as a reader would.

        Raises:
            AssertionError: it failed; names page and line, and quotes what it printed.
        """
        shell = ["bash", "-euo", "pipefail", "-c", block.text]
        command = shell if block.language == "sh" else [str(self._bin / "python"), "-c", block.text]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._variables(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_seconds,
        )
        assert done.returncode == 0, f"{block.name} ended with {done.returncode}:\n{block.text}\n{done.stdout[-4000:]}"

    def run_page(self, page: Path, *when: str) -> int:
        """Run a page's commands and Python, in order; returns how many blocks that were."""
        chosen = [
            one for one in blocks(page, "sh", "python") if one.runs in when and not one.marker.startswith("code ")
        ]
        for block in chosen:
            self.run(block, SECONDS_A_BLOCK)
        return len(chosen)

    def _variables(self) -> dict[str, str]:
        ours = {
            name: text for name, text in os.environ.items() if not name.startswith(("RATCHET_", "PREFECT_", "PIP_"))
        }
        return ours | {
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder),
            "RATCHET_DATA": str(self._documents),
            "HOME": str(self._user),
            "HF_HOME": str(self._user / "huggingface"),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }


def _environment(folder: Path) -> Path:
    """A virtual environment over this one's packages, so that what a page installs is gone with it."""
    venv.create(folder, with_pip=False, symlinks=True)
    bin_ = folder / "bin"
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "these.pth").write_text("".join(f"import site; site.addsitedir({one!r})\n" for one in sorted(here)))
    for name, place in SCRIPTS.items():
        module, _, function = place.partition(":")
        script = bin_ / name
        script.write_text(CONSOLE.format(python=bin_ / "python", module=module, function=function))
        script.chmod(0o755)
    for device in ("cpu", "cuda"):  # what `make` looks at: all is installed already
        (folder / f".torch-{device}").touch()
        (folder / f".ready-{device}").touch()
    return bin_
