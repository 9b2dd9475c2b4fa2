"""What is noted of the machine and the code that a run is made with."""

import platform
import subprocess
from pathlib import Path

from tasks.surroundings import accelerators, commit_of, surroundings


def test_versions_and_kind_of_machine_are_told_and_its_name_is_not() -> None:
    found = surroundings()
    assert found.versions["python"] == platform.python_version()
    assert {"torch", "transformers", "trl", "prefect"} <= set(found.versions)
    assert platform.node() not in found.model_dump_json()
    assert found.machine.startswith(platform.system())


def test_the_commit_is_told_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        named = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(["git", "-C", str(tmp_path), *named, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert commit_of(tmp_path) is None
    git("init", "-q")
    (tmp_path / "code.py").write_text("one")
    git("add", "code.py")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    assert commit_of(tmp_path) == commit
    (tmp_path / "new.txt").write_text("a file that is not tracked changes no code")
    assert commit_of(tmp_path) == commit
    (tmp_path / "code.py").write_text("two")
    assert commit_of(tmp_path) == f"{commit}+"


def test_accelerators_are_named_as_their_driver_does(tmp_path: Path) -> None:
    assert accelerators(tmp_path / "nothing") == ()
    for number in range(2):
        file = tmp_path / f"0000:0{number}:00.0" / "information"
        file.parent.mkdir()
        file.write_text(
            "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 1\nGPU UUID: \t GPU-1\nBus Location: \t 0000:00:00.0\n"
        )
    assert accelerators(tmp_path) == ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3")
