"""A home in an object store: what one machine commits, all have; what a kill or the network cuts off is made up for."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from storage import committing, leases
from storage.checkpoints import checkpoint_path, commit_checkpoint, what_is_wrong_with_checkpoint
from storage.collecting import collect_garbage
from storage.datasets import DatasetError, DatasetRef, data_files, read_manifest, read_rows, what_is_wrong, write_rows
from storage.experiments import Experiment, StepRecord, experiments
from storage.home import home, home_name
from storage.ledger import Ledger, LedgerWriter
from storage.opening import open_home
from storage.results import StepResult, find_result, latest_results, save_result
from storage.rows import Prompt
from storage.stores import StoreError
from tests.storage.builders import flip_byte, prompts, rollout
from tests.storage.machines import machine, store, unreachable

pytestmark = pytest.mark.usefixtures("s3_home")

KEY = {"policy": "fake", "sampling": {"temperature": 0.7, "seed": 3}}
DIGEST = "0" * 32


def some_rows(count: int = 5) -> DatasetRef:
    return write_rows(prompts(count), Prompt, step="prompts")


def result(key: str = "k" * 32, seconds: float = 1.0) -> StepResult:
    return StepResult(step="work", key=key, version="1", key_parts={}, value=None, seconds=seconds)


def step_record(number: int) -> StepRecord:
    return StepRecord(
        run="r",
        step=f"step {number}",
        iteration=0,
        shard=None,
        state="completed",
        cached=False,
        rows=None,
        digest=None,
        key=None,
        seconds=0.0,
        counts={},
        detail="",
        at="now",
    )


def test_a_data_set_and_a_checkpoint_of_one_machine_are_on_another_when_they_are_read(tmp_path: Path) -> None:
    with machine("one"):
        ref = some_rows()
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "weights").write_bytes(b"w" * 1000)
        digest = commit_checkpoint(tmp_path / "model", step="train")
    with machine("two") as copy:
        assert sorted(path.name for path in copy.glob("*/prompts/*/*")) == ["manifest.json"]
        assert what_is_wrong(ref, deep=True) is None
        assert what_is_wrong_with_checkpoint(digest, deep=True) is None
        assert sorted(path.name for path in copy.rglob("*") if path.is_file() and path.suffix != ".json") == [
            "opening.lock"
        ], "looking whether something is whole does not fetch it"
        assert list(read_rows(ref, Prompt)) == prompts(5)
        assert (checkpoint_path(digest) / "weights").read_bytes() == b"w" * 1000
    with machine("three"):
        assert len(data_files(ref)) == 1


def test_a_bucket_is_laid_out_as_a_home_that_other_tools_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine("one"):
        ref = some_rows()
        for name in store().names():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            store().download(name, tmp_path / "copy" / name)
    monkeypatch.setenv("RATCHET_HOME", str(tmp_path / "copy"))
    assert list(read_rows(ref, Prompt)) == prompts(5)


def test_an_upload_cut_off_before_its_manifest_is_invisible_and_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine("one"):
        with unreachable(monkeypatch, "upload", name="manifest.json"), pytest.raises(StoreError, match="no way"):
            some_rows()
        (folder,) = home().glob("datasets/prompts/[!.]*")
        ref = read_manifest(DatasetRef(step="prompts", digest=folder.name, row_type="Prompt", rows=5)).ref
        assert [name for name in store().names("datasets") if name.endswith(".parquet")]
    with machine("two"):
        assert what_is_wrong(ref) == f"{ref.name} is gone, or was never finished: it has no manifest.json"
    with machine("one"):
        assert committing.unpushed() == set()
    with machine("two"):
        assert list(read_rows(ref, Prompt)) == prompts(5)


def test_a_half_uploaded_data_set_is_made_whole_by_another_machine_that_makes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with machine("one"), unreachable(monkeypatch, "upload", name="manifest.json"), pytest.raises(StoreError):
        some_rows()
    (part,) = store().names("datasets")
    store().write(part, b"half")
    with machine("two"):
        ref = some_rows()
    with machine("three"):
        assert list(read_rows(ref, Prompt)) == prompts(5)


def test_what_the_network_kept_from_the_store_is_there_once_the_machine_starts_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with machine("one"):
        with unreachable(monkeypatch, "create"), pytest.raises(StoreError, match="no way through"):
            save_result(result())
        ledger = Ledger(KEY)
        with unreachable(monkeypatch, "upload"):
            with pytest.raises(StoreError, match="no way"), LedgerWriter(ledger) as writer:
                writer.add(rollout("a", 0))
            assert "is on this disk only, for now: no way through" in caplog.text
        assert len(list(ledger.folder.glob("part-*"))) == 1, "rows that the disk has are not written again"
    with machine("two"):
        assert find_result("work", "k" * 32) is None
        assert Ledger(KEY).present() == {}
    with machine("one"):
        pass
    with machine("two"):
        assert find_result("work", "k" * 32) == result().model_copy(
            update={"finished_at": latest_results("work", 1)[0].finished_at}
        )
        assert Ledger(KEY).present() == {"a": 1}


def test_what_a_process_is_about_to_commit_stays_noted_while_another_opens_the_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with machine("one"):
        folder = Ledger(KEY).folder
        with unreachable(monkeypatch, "upload"), committing.new_file(folder / "part-1.parquet") as attempt:
            open_home()
            attempt.write_bytes(b"rows")
        assert f"ledger/{folder.name}/part-1.parquet" not in store().names()
        open_home()
        assert f"ledger/{folder.name}/part-1.parquet" in store().names()
        assert committing.unpushed() == set()


def test_of_two_records_under_one_key_the_first_in_the_store_stands_on_both_machines() -> None:
    with machine("one"), machine("two"):
        pass
    with machine("two"):
        first = save_result(result(seconds=2.0))
    with machine("one") as copy:
        shutil.rmtree(copy / "steps")  # as if it had looked before the other was done
        assert save_result(result(seconds=1.0)) == first
        assert find_result("work", "k" * 32) == first


def test_a_record_that_another_machine_writes_meanwhile_is_found() -> None:
    with machine("one"):
        assert find_result("work", "k" * 32) is None
        with machine("two"):
            saved = save_result(result())
        assert find_result("work", "k" * 32) == saved


def test_rollouts_of_all_machines_are_in_the_ledger_of_each() -> None:
    for name, index in (("one", 0), ("two", 1)):
        with machine(name), LedgerWriter(Ledger(KEY)) as writer:
            writer.add(rollout("a", index))
    for name in ("one", "two", "three"):
        with machine(name):
            assert [row.rollout_index for row in Ledger(KEY).read({"a": 0b11})] == [0, 1]


def test_a_damaged_copy_is_fetched_again_and_nothing_is_made_anew() -> None:
    with machine("one"):
        ref = some_rows()
        flip_byte(data_files(ref)[0])
        assert what_is_wrong(ref, deep=True) is None
        assert list(read_rows(ref, Prompt)) == prompts(5)
        ledger = Ledger(KEY)
        ledger.append([rollout("a", 0)])
        (part,) = ledger.folder.glob("part-*")
        part.write_bytes(part.read_bytes()[:-20])
        assert ledger.present() == {"a": 1}


def test_an_object_damaged_in_the_store_counts_as_gone_and_is_made_anew() -> None:
    with machine("one"):
        ref = some_rows()
        (part,) = (name for name in store().names("datasets") if name.endswith(".parquet"))
        content = store().read(part) or b""
        store().write(part, content[:-1] + b"x")
    with machine("two"):
        with pytest.raises(DatasetError, match=r"part-00000.parquet is gone from s3://.* run the same command again"):
            list(read_rows(ref, Prompt))
        assert "has no manifest.json" in str(what_is_wrong(ref))
        assert some_rows() == ref
    with machine("three"):
        assert list(read_rows(ref, Prompt)) == prompts(5)


def test_a_ledger_part_damaged_in_the_store_is_drawn_again() -> None:
    with machine("one"):
        Ledger(KEY).append([rollout("a", 0)])
        (part,) = store().names(f"ledger/{Ledger(KEY).folder.name}").keys() - {
            f"ledger/{Ledger(KEY).folder.name}/key.json"
        }
        store().write(part, b"rubbish")
    with machine("two"):
        assert Ledger(KEY).present() == {}
        Ledger(KEY).append([rollout("a", 0)])
    with machine("three"):
        assert Ledger(KEY).present() == {"a": 1}


def test_the_record_of_an_experiment_is_the_same_everywhere_and_steps_come_in_pieces() -> None:
    with machine("one"):
        experiment = Experiment("x")
        experiment.begin("r", {"a": 1})
        for number in range(450):  # 200 a piece
            experiment.add_step(step_record(number))
        experiment.end("finished")
        assert [name for name in store().names("experiments/x/steps")] == [
            f"experiments/x/steps/0000{number}.jsonl" for number in range(3)
        ]
    with machine("two"):
        assert [one.name for one in experiments()] == ["x"]
        assert experiments()[0].config() == {"a": 1}
        assert [record.step for record in experiments()[0].steps()] == [f"step {number}" for number in range(450)]
        Experiment("x").begin("s", {"a": 2})
        Experiment("x").add_step(step_record(450))
        Experiment("x").end("finished")
    with machine("one"):
        assert Experiment("x").config() == {"a": 2}
        assert len(Experiment("x").steps()) == 451
        assert Experiment("x").state().run == "s"


def test_an_experiment_runs_as_long_as_its_lock_is_held_wherever_that_is() -> None:
    with machine("one"):
        with leases.leased("experiment-x", wait_seconds=0):
            Experiment("x").begin("r", {})
            with machine("two"):
                assert Experiment("x").state().state == "running"
        assert Experiment("x").state().state == "interrupted"


def test_garbage_is_removed_from_the_store_and_so_from_every_working_copy() -> None:
    with machine("one"):
        ref = some_rows()
        store().write(f"models/{DIGEST}/weights", b"an upload that was killed")
        time.sleep(1.0)  # the store tells whole seconds
    with machine("two") as copy:
        assert (copy / ref.name / "manifest.json").exists()
        (found,) = collect_garbage(older_than_days=0, delete=False)
        sizes = {name: one.bytes for name, one in store().names(ref.name).items()}
        assert (found.kind, found.name, found.bytes) == ("data set", ref.name, sum(sizes.values()))
        collect_garbage(older_than_days=0, delete=True)
        assert not (copy / ref.name).exists()
        assert store().names("datasets") == {}
        assert store().names("models") != {}, "it may still be under way; after a day it is garbage"
    with machine("one") as copy:
        assert not (copy / ref.name).exists()
        assert what_is_wrong(ref) is not None


def test_uploads_and_leases_that_nobody_touched_for_a_day_are_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine("one"):
        store().write(f"models/{DIGEST}/weights", b"12345")
        store().write("models/README", b"not ours to remove")
        store().write("locks/step-x/000000000001.json", b"{}")
        some_rows()
        now = time.time()
        monkeypatch.setattr("storage.collecting.time.time", lambda: now + 2 * 86_400)
        found = collect_garbage(older_than_days=1, delete=True)
        assert [(one.kind, one.name) for one in found if one.kind != "data set"] == [
            ("unfinished", f"models/{DIGEST}"),
            ("lock", "locks/step-x/000000000001.json"),
        ]
        assert set(store().names()) == {"home.json", "models/README"}


def test_a_bucket_that_was_emptied_takes_nothing_away_from_this_machine() -> None:
    with machine("one"):
        ref = some_rows()
        store().remove(list(store().names()))
    with pytest.raises(StoreError, match=r"is empty, or holds no home any more .* nothing was changed"), machine("one"):
        pass
    assert (home() / ref.name / "manifest.json").exists()


def test_a_working_copy_is_not_taken_for_that_of_another_home() -> None:
    with machine("one"):
        some_rows()
        store().write("home.json", json.dumps({"format": 1, "id": "another"}).encode())
    with pytest.raises(StoreError, match="holds another home than the one that"), machine("one"):
        pass


def test_looking_at_an_empty_home_writes_nothing_into_the_bucket() -> None:
    with machine("one"):
        assert experiments() == []
        assert store().names() == {}
    assert home_name() == os.environ["RATCHET_HOME"]


def test_what_another_process_of_this_machine_has_under_way_is_left_alone() -> None:
    with machine("one"), leases.leased("experiment-x", wait_seconds=0):
        Experiment("x").begin("r", {"a": 1})
        (home() / "experiments/x/state.json").write_text("newer than the store's")
        name = "locks/experiment-x/000000000001.json"
        theirs = json.loads(store().read(name) or b"") | {"pid": os.getppid()}  # a process that lives
        store().write(name, json.dumps(theirs).encode())
        open_home()
        assert (home() / "experiments/x/state.json").read_text() == "newer than the store's"
