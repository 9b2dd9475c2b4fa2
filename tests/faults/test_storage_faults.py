"""Damage in the home: found, named, and repaired by running again exactly what is needed, or refused; never shorter."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.driver import Kill
from tests.faults.harness import KILLED, Driver, Place, in_ledger, leftovers, stored

pytestmark = [pytest.mark.flow, pytest.mark.timeout(120)]


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """A small file system of its own at the folder."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs takes root and the right to mount, which this process has not")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def one(home: Path, pattern: str) -> Path:
    return sorted(home.glob(pattern))[0]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def forget_file(folder: Path) -> None:
    """A manifest that names a file nobody has."""
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("part-00000", "part-00007"))


@pytest.fixture
def copy(whole: Place, tmp_path: Path) -> Place:
    """A copy of the unbroken run's home, at another path."""
    place = Place(tmp_path)
    shutil.copytree(whole.home, place.home)
    return place


def test_a_home_copied_to_another_path_is_all_there(driver: Driver, copy: Place, unbroken: dict[str, Any]) -> None:
    ended = driver.run(copy)
    assert ended.status == 0, ended.output
    assert copy.drawn() == []
    assert "runs again" not in ended.output
    assert all(" cached" in line for line in ended.output.splitlines() if " rows " in line)
    assert stored(copy.home) == unbroken


@pytest.mark.parametrize(
    ("pattern", "harm", "told", "runs_again"),
    [
        ("datasets/scored/*/part*", truncate, "bytes, its manifest says", "score_answers"),
        ("datasets/demonstrations/*/part*", flip, "part-00000.parquet is damaged", "select_demonstrations"),
        ("datasets/rollouts/*/part*", Path.unlink, "part-00000.parquet is missing", "gather_rollouts"),
        ("datasets/evaluated/*", forget_file, "part-00007.parquet is missing", "evaluate_answers"),
        ("datasets/prompts/*/manifest.json", truncate, "manifest.json cannot be read", "load_prompts"),
        ("datasets/drawn/*", shutil.rmtree, "is gone, or was never finished", "draw_prompts"),
        ("models/*/fake.json", flip, "fake.json is damaged", "train_"),
        ("models/*", shutil.rmtree, "is gone, or was never finished", "train_"),
        ("steps/pair_rollouts/*.json", truncate, "it is ignored and the step runs again", "pair_rollouts"),
        ("steps/decide_promotion/*.json", flip, "", ""),
    ],
    ids=lambda value: getattr(value, "__name__", value) or "any",
)
def test_damage_is_named_and_only_the_step_that_made_it_runs_again(
    pattern: str,
    harm: Callable[[Path], None],
    told: str,
    runs_again: str,
    driver: Driver,
    copy: Place,
    unbroken: dict[str, Any],
) -> None:
    harm(one(copy.home, pattern))
    ended = driver.run(copy)
    assert ended.status == 0, ended.output
    assert told in ended.output
    told_of = re.findall(r"^\d\d:\d\d:\d\d (it\d.*)", ended.output, re.MULTILINE)  # the lines of steps
    done = [step_of(line) for line in told_of if " s" in line]
    again = {step_of(line) for line in told_of if "cached" not in line}
    assert done
    if runs_again:
        assert all(name.startswith(runs_again) for name in again), again
    assert copy.drawn() == []
    assert stored(copy.home) == unbroken
    assert leftovers(copy) == []


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_rows_of_a_damaged_ledger_part_are_drawn_again(
    harm: Callable[[Path], None], driver: Driver, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    place = Place(tmp_path)
    killed = driver.run(place, kill=Kill("before", "rename", "ledger/*/part-*", 14))
    assert killed.status == KILLED
    part = max(place.home.glob("ledger/*/part-*"), key=lambda path: path.name)  # of the sampling that was cut short
    whole_ledger = in_ledger(place.home)
    lost = part.read_bytes()
    harm(part)
    ended = driver.run(place)
    assert ended.status == 0, ended.output
    if part.exists():  # a byte that holds no row
        assert harm is flip
    elif harm is not Path.unlink:
        assert f"{part.name} is damaged" in ended.output
        (aside,) = place.home.glob("ledger/*/.damaged-*")
        assert aside.name == f".damaged-{part.name}"
    assert stored(place.home) == unbroken
    part.parent.joinpath("part-of-before.parquet").write_bytes(lost)
    assert set(whole_ledger) <= set(in_ledger(place.home))


def test_a_full_disk_ends_the_run_with_its_reason_and_room_lets_it_go_on(
    driver: Driver, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    place = Place(tmp_path)
    with mounted(place.home, "400k"):
        full = driver.run(place)
        assert full.status == 1, full.output
        assert "No space left on device" in full.output
        assert "go on with:" in full.output
        remount(place.home, "size=64m")
        before = in_ledger(place.home)
        ended = driver.run(place)
        assert ended.status == 0, ended.output
        assert not set(before) & set(place.drawn())
        assert stored(place.home) == unbroken
        assert leftovers(place) == []


@pytest.mark.parametrize("kib", range(40, 400, 60))
def test_a_disk_that_is_full_at_any_point_loses_nothing(
    kib: int, driver: Driver, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    place = Place(tmp_path)
    with mounted(place.home, f"{kib}k"):
        assert driver.run(place).status == 1
        remount(place.home, "size=64m")
        ended = driver.run(place)
        assert ended.status == 0, ended.output
        assert stored(place.home) == unbroken
        assert leftovers(place) == []


def test_a_read_only_home_is_refused_before_anything_is_drawn(driver: Driver, tmp_path: Path) -> None:
    place = Place(tmp_path)
    with mounted(place.home, "1m"):
        remount(place.home, "ro")
        refused = driver.run(place)
        assert refused.status == 2
        told = f"the home {place.home}"
        assert told in refused.output
        assert "Read-only file system" in refused.output
        assert place.drawn() == []


def step_of(line: str) -> str:
    """The step that a line of the command's output is about: "it1 dev score_answers ..."."""
    return next(word for word in line.split()[1:] if word not in ("dev", "test"))
