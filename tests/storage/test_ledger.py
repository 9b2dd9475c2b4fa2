"""The ledger: what was sampled is kept, once, whatever ends the process."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from storage import durable
from storage import ledger as ledger_module
from storage.datasets import DatasetError
from storage.durable import attempt_name
from storage.ledger import DamagedPart, Ledger, LedgerWriter, look_for
from tests.storage.builders import rollout

ROOT = Path(__file__).parents[2]
KEY = {"policy": "fake", "sampling": {"temperature": 0.7, "seed": 3}}


def parts(ledger: Ledger) -> list[Path]:
    return sorted(ledger.folder.glob("part-*.parquet"))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_the_key_is_spelled_out_and_its_order_does_not_matter() -> None:
    ledger = Ledger(KEY)
    assert json.loads((ledger.folder / "key.json").read_text()) == KEY
    assert Ledger(dict(reversed(KEY.items()))).folder == ledger.folder
    assert Ledger({**KEY, "policy": "other"}).folder != ledger.folder


def test_present_tells_which_rollouts_are_there_over_all_parts() -> None:
    ledger = Ledger(KEY)
    assert ledger.present() == {}
    ledger.append([rollout("a", 0), rollout("a", 2), rollout("b", 70)])
    ledger.append([rollout("a", 1), rollout("c", 0)])
    assert Ledger(KEY).present() == {"a": 0b111, "b": 1 << 70, "c": 1}
    assert ledger.present({"b", "unknown"}) == {"b": 1 << 70}


def test_appending_nothing_writes_nothing() -> None:
    Ledger(KEY).append([])
    assert parts(Ledger(KEY)) == []


def test_rows_are_read_in_the_order_of_the_prompts_wanted_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(KEY)
    ledger.append([rollout("a", 1, "first"), rollout("b", 0), rollout("a", 1, "same part")])
    ledger.append([rollout("a", 1, "later part"), rollout("a", 0), rollout("b", 1), rollout("c", 5)])
    wanted = {"c": 1 << 5, "b": 0b11, "unused": 0, "a": 0b11}
    rows = list(ledger.read(wanted))
    assert [(row.prompt_id, row.rollout_index) for row in rows] == [("c", 5), ("b", 0), ("b", 1), ("a", 0), ("a", 1)]
    assert rows[-1].completion == "first"
    monkeypatch.setattr(ledger_module, "READ_ROWS", 1)  # a group for each prompt
    assert list(ledger.read(wanted)) == rows


def test_a_wanted_row_that_is_not_there_is_an_error_before_the_first_row() -> None:
    ledger = Ledger(KEY)
    ledger.append([rollout("a", 0)])
    with pytest.raises(DatasetError, match=r"1 of 2 prompts .* 'b' with rollout_index \[1, 3\]"):
        next(ledger.read({"a": 1, "b": 0b1010}))


def test_a_truncated_part_is_set_aside_with_a_warning_and_its_rows_are_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ledger = Ledger(KEY)
    ledger.append([rollout("a", 0)])
    ledger.append([rollout("b", 0)])
    part = parts(ledger)[0]
    part.write_bytes(part.read_bytes()[:-20])
    assert ledger.present() == {"b": 1}
    assert f"{part.name} is damaged" in caplog.text
    assert f"it is now .damaged-{part.name}, and its rows are drawn again" in caplog.text
    assert part.with_name(f".damaged-{part.name}").exists()


def test_a_flipped_byte_is_met_when_rows_are_read_or_changes_none_of_them() -> None:
    ledger = Ledger(KEY)
    row = rollout("a", 0, "a text that is too short to be compressed")
    ledger.append([row])
    (part,) = parts(ledger)
    content, damaged = part.read_bytes(), 0
    for place in (found.start() for found in re.finditer(b"too short", content)):  # in its page, and as a statistic
        part.write_bytes(content[:place] + b"T" + content[place + 1 :])
        assert ledger.present() == {"a": 1}  # the keys are whole
        try:
            assert list(ledger.read({"a": 1})) == [row]
        except DamagedPart as error:
            assert re.search(rf"{part.name} is damaged .*CRC", str(error))
            assert ledger.present() == {}
            damaged += 1
    assert damaged


def test_a_part_of_other_columns_is_refused() -> None:
    ledger = Ledger(KEY)
    ledger.append([rollout("a", 0)])
    part = parts(ledger)[0]
    pq.write_table(pq.read_table(part, partitioning=None).drop_columns(["completion"]), part)
    with pytest.raises(DatasetError, match=rf"{part.name} has columns .*remove that file"):
        list(ledger.read({"a": 1}))
    assert part.exists()


def test_unfinished_files_are_no_parts_and_those_of_the_dead_go_on_opening() -> None:
    ledger = Ledger(KEY)
    mine, dead = attempt_name(), attempt_name().split("-")
    dead[2] = "4194305"
    for name in (mine, "-".join(dead)):
        (ledger.folder / name).write_bytes(b"PAR1")
    assert Ledger(KEY).present() == {}
    assert {path.name for path in ledger.folder.iterdir()} == {"key.json", mine}


def test_the_writer_flushes_by_rows_and_at_the_end() -> None:
    ledger = Ledger(KEY)
    with LedgerWriter(ledger, flush_rows=2, flush_seconds=60) as writer:
        writer.add(rollout("a", 0))
        assert parts(ledger) == []
        writer.add(rollout("a", 1))
        assert len(parts(ledger)) == 1
        writer.add(rollout("a", 2))
    assert ledger.present() == {"a": 0b111}


def test_the_writer_flushes_finished_rows_when_an_exception_ends_it() -> None:
    with pytest.raises(KeyboardInterrupt), LedgerWriter(Ledger(KEY), flush_seconds=60) as writer:
        writer.add(rollout("a", 0))
        raise KeyboardInterrupt
    assert Ledger(KEY).present() == {"a": 1}


def test_the_writer_flushes_by_time_while_no_row_comes() -> None:
    ledger = Ledger(KEY)
    with LedgerWriter(ledger, flush_seconds=0.02) as writer:
        writer.add(rollout("a", 0))
        until(lambda: ledger.present() == {"a": 1})
        writer.add(rollout("a", 1))
        until(lambda: ledger.present() == {"a": 0b11})


def test_rows_that_could_not_be_stored_are_kept_for_the_next_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(KEY)
    with LedgerWriter(ledger, flush_rows=1, flush_seconds=60) as writer:
        with monkeypatch.context() as broken:
            broken.setattr(durable, "sync", lambda path: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                writer.add(rollout("a", 0))
        assert [path.name for path in ledger.folder.iterdir()] == ["key.json"]
    assert ledger.present() == {"a": 1}


def test_while_one_thread_waits_for_the_disk_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, at_the_disk, disk_is_done = Ledger(KEY), threading.Event(), threading.Event()
    sync = durable.sync

    def slow(path: Path) -> None:
        at_the_disk.set()
        assert disk_is_done.wait(10)
        sync(path)

    monkeypatch.setattr(durable, "sync", slow)
    with LedgerWriter(ledger, flush_rows=4, flush_seconds=60) as writer:
        first = threading.Thread(target=lambda: [writer.add(rollout("a", index)) for index in range(4)])
        first.start()
        assert at_the_disk.wait(10)
        for index in range(5):  # more than a part's worth, and yet no add waits
            writer.add(rollout("b", index))
        assert ledger.present() == {}
        disk_is_done.set()
        first.join()
        assert ledger.present() == {"a": 0b1111}
        writer.add(rollout("b", 5))
        assert ledger.present() == {"a": 0b1111, "b": 0b111111}
    assert len(parts(ledger)) == 2


def test_rows_of_many_threads_are_stored_once_each() -> None:
    ledger = Ledger(KEY)
    with LedgerWriter(ledger, flush_rows=7, flush_seconds=0.001) as writer, ThreadPoolExecutor(8) as pool:
        for shard in "abcdefgh":
            pool.submit(lambda shard=shard: [writer.add(rollout(shard, index)) for index in range(50)])
    rows = [row for part in parts(ledger) for row in pq.read_table(part).to_pylist()]
    stored = Counter((row["prompt_id"], row["rollout_index"]) for row in rows)
    assert stored == {(shard, index): 1 for shard in "abcdefgh" for index in range(50)}


def test_an_error_is_not_hidden_by_rows_that_the_disk_does_not_take(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = LedgerWriter(Ledger(KEY), flush_seconds=60)
    with pytest.raises(KeyError), writer:
        writer.add(rollout("a", 0))
        monkeypatch.setattr(durable, "sync", lambda path: (_ for _ in ()).throw(OSError("disk full")))
        raise KeyError("what went wrong")
    assert "1 finished rollouts could not be stored: disk full" in caplog.text


def test_a_process_killed_while_sampling_loses_only_rows_in_flight() -> None:
    script = """
import sys
from storage.ledger import DamagedPart, Ledger, LedgerWriter, look_for
from tests.storage.builders import rollout
with LedgerWriter(Ledger({"policy": "killed"}), flush_rows=3) as writer:
    for index in range(7):
        writer.add(rollout("a", index))
    print("ready", flush=True)
    sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdin and child.stdout
    with child.stdin, child.stdout:
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert Ledger({"policy": "killed"}).present() == {"a": 0b111111}


def test_looking_counts_the_rollouts_wanted_once_and_writes_nothing(ratchet_home: Path) -> None:
    assert look_for(KEY, {"p"}, 2) == 0
    assert not ratchet_home.exists()
    ledger = Ledger(KEY)
    ledger.append([rollout("p", 0), rollout("p", 1), rollout("q", 0)])
    ledger.append([rollout("p", 1), rollout("p", 2)])
    (ledger.folder / "part-9-damaged.parquet").write_bytes(b"torn")
    before = sorted(ledger.folder.iterdir())
    assert look_for(KEY, {"p"}, 2) == 2  # p/0 and p/1, which lies there twice; p/2 is not wanted
    assert sorted(ledger.folder.iterdir()) == before
