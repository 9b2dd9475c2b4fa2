"""Garbage: what no experiment refers to goes, what one refers to never does."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.__main__ import app
from storage.collecting import Garbage, collect_garbage
from storage.durable import attempt_name
from storage.experiments import Experiment
from storage.home import home
from storage.ledger import Ledger
from storage.locks import LockedError, exclusive
from tests.flows.builders import heard, run_plainly, tree
from tests.light import lighten
from tests.storage.builders import rollout

pytestmark = pytest.mark.flow  # whole runs on the fake engine

SMALL = ("iterations=1", "dpo=null")


@pytest.fixture(scope="module")
def small_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one finished experiment. Not to be written to."""
    folder = tmp_path_factory.mktemp("small") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATCHET_HOME", str(folder))
        lighten(patch)
        run_plainly(*SMALL)
    return folder


@pytest.fixture
def small(small_home: Path, ratchet_home: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """The finished experiment, in this test's own home."""
    lighten(monkeypatch)
    shutil.copytree(small_home, ratchet_home)
    return Experiment("rest-em-smoke")


def collect(older_than_days: float = 0, *, delete: bool = True) -> list[Garbage]:
    return collect_garbage(older_than_days=older_than_days, delete=delete)


def names() -> set[str]:
    """Everything the home keeps by name: data sets, models, ledgers, step records."""
    patterns = ("datasets/*/*", "models/*", "ledger/*", "steps/*/*")
    return {path.relative_to(home()).as_posix() for pattern in patterns for path in home().glob(pattern)}


def aged(path: Path, days: float = 30) -> Path:
    """The same path, as if nobody had written to it for so long."""
    then = time.time() - days * 86_400
    for part in (*path.rglob("*"), path):
        os.utime(part, (then, then))
    return path


@pytest.mark.parametrize("other", ["sampling.seed=7", "base.name=fake:0.6", "selection.keep=all"])
def test_what_a_removed_experiment_had_for_itself_goes_and_the_other_is_all_cached(
    small: Experiment, other: str
) -> None:
    alone = names()
    removed = run_plainly("experiment=removed", other, *SMALL)
    assert names() > alone
    shutil.rmtree(removed.folder)
    collect()
    assert names() == alone
    with heard() as steps:
        run_plainly(*SMALL)
    assert steps and all(step.cached for step in steps)


def test_nothing_goes_while_all_experiments_are_there(small: Experiment) -> None:
    run_plainly("sampling.seed=7", *SMALL)  # the same experiment: its history is kept too
    before = names()
    assert {garbage.kind for garbage in collect()} == {"lock"}
    assert names() == before


def test_without_delete_nothing_changes(small: Experiment) -> None:
    shutil.rmtree(small.folder)
    before = {name: seen for name, seen in tree(home()).items() if not name.startswith("locks")}
    kinds = {garbage.kind for garbage in collect(delete=False)}
    assert kinds == {"step record", "data set", "model", "ledger", "lock"}
    assert {name: seen for name, seen in tree(home()).items() if not name.startswith("locks")} == before


def test_young_things_stay_and_so_does_what_they_mention(small: Experiment) -> None:
    shutil.rmtree(small.folder)
    assert collect(1) == []
    for folder in ("datasets", "models", "ledger", "steps"):
        aged(home() / folder)
    (trained,) = home().glob("steps/train_sft/*.json")
    os.utime(trained)
    collect(1)
    assert {name.split("/")[1] for name in names() if name.startswith("datasets")} == {
        "demonstrations",
        "scored",
        "rollouts",
        "drawn",
        "prompts",
    }
    assert [path.name for path in home().glob("models/*")] == [json.loads(trained.read_text())["value"]["digest"]]


def test_a_running_experiment_refuses_the_collection(small: Experiment) -> None:
    shutil.rmtree(small.folder)
    before = names()
    with exclusive("experiment-rest-em-smoke", wait_seconds=0), pytest.raises(LockedError, match="rest-em-smoke"):
        collect()
    assert names() == before


@pytest.mark.parametrize(
    ("policy", "state", "kept"), [("fake:0.4", "failed", 1), ("fake:0.9", "failed", 0), ("fake:0.4", "finished", 0)]
)
def test_rollouts_in_progress_stay_while_their_experiment_is_unfinished(policy: str, state: str, kept: int) -> None:
    experiment = Experiment("one")
    experiment.begin("run", {"base": {"name": "fake:0.4"}})
    experiment.end("failed" if state == "failed" else "finished")
    Ledger({"policy": {"name": policy, "revision": None}, "decoding": {"seed": 3}}).append([rollout()])
    collect()
    assert len(list(home().glob("ledger/*"))) == kept


def test_a_ledger_without_a_readable_key_stays() -> None:
    ledger = Ledger({"policy": {"name": "x"}})
    (ledger.folder / "key.json").write_text("{")
    collect()
    assert ledger.folder.is_dir()


def test_unfinished_work_goes_when_it_is_old_and_nobody_needs_it(small: Experiment) -> None:
    (done,) = (path.stem for path in home().glob("steps/train_sft/*.json"))
    old = [
        home() / "datasets/scored" / attempt_name(),
        home() / f"models/.scratch-{done}",
        home() / "models/.scratch-x",
    ]
    new = home() / "datasets/prompts" / attempt_name()
    for folder in (*old, new):
        folder.mkdir()
        (folder / "part").write_text("x")
    for folder in old:
        aged(folder)
    assert {garbage.name for garbage in collect(7)} == {path.relative_to(home()).as_posix() for path in old}
    assert new.is_dir() and not any(path.exists() for path in old)


def test_a_training_in_progress_stays_while_an_experiment_is_unfinished() -> None:
    scratch = home() / "models/.scratch-x"
    scratch.mkdir(parents=True)
    aged(scratch)
    experiment = Experiment("one")
    experiment.begin("run", {})
    experiment.end("interrupted")
    collect(7)
    assert scratch.is_dir()


def test_a_lock_that_is_held_stays_and_one_that_is_free_goes() -> None:
    with exclusive("step-free", wait_seconds=0):
        pass
    with exclusive("step-held", wait_seconds=0):
        collect()
        assert [path.name for path in (home() / "locks").iterdir()] == ["step-held.lock"]


def test_who_waited_for_a_lock_that_was_removed_makes_it_anew() -> None:
    path = home() / "locks/step-x.lock"
    taken, seen = threading.Event(), list[bool]()

    def wait_for_it() -> None:
        taken.set()
        with exclusive("step-x", wait_seconds=10):
            seen.append(path.exists())

    waiter = threading.Thread(target=wait_for_it)
    with exclusive("step-x", wait_seconds=0):
        waiter.start()
        taken.wait(10)
        time.sleep(0.05)  # it has the file open by now
        path.unlink()
    waiter.join(10)
    assert seen == [True]


def test_files_of_other_hands_are_left_alone() -> None:
    for name in ("models/my-model", "datasets/mine/rows", "notes"):
        (home() / name).mkdir(parents=True)
    assert collect() == []


def test_the_command_lists_first_and_removes_when_told(small: Experiment) -> None:
    shutil.rmtree(small.folder)
    listed = CliRunner().invoke(app, ["gc", "--older-than", "0"]).stdout
    assert "could go; remove them with: ratchet gc --delete" in listed and "datasets/scored/" in listed
    assert names()
    assert "removed" in CliRunner().invoke(app, ["gc", "--older-than", "0", "--delete"]).stdout
    assert not names()
    with exclusive("experiment-x", wait_seconds=0):
        assert CliRunner().invoke(app, ["gc"]).exit_code == 1
