"""Leases: one holder among machines, none after its death, and an old holder that notices when it is taken over."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from storage import leases
from storage.leases import LeaseLostError, check_leases, is_leased, leased
from storage.locks import LockedError, exclusive
from storage.stores import StoreError
from tests.storage.machines import store, unreachable

pytestmark = pytest.mark.flow  # seconds each: leases have to run out
ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from storage.locks import exclusive
with exclusive("experiment-x", wait_seconds=0):
    print("held", flush=True)
    sys.stdin.read()
"""
FIRST = "locks/experiment-x/000000000001.json"


@pytest.fixture(autouse=True)
def quick(s3_home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that expire in seconds; the store's clock has whole ones."""
    monkeypatch.setattr(leases, "SECONDS", 3.0)
    monkeypatch.setattr(leases, "SLACK_SECONDS", 1.0)
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.1)


def held_elsewhere(seconds: float = 3.0) -> None:
    """A machine that we know nothing of has just taken the lease, and gives no sign any more."""
    holder = {"pid": 7, "host": "far", "host_id": "other", "home": "/x", "command": "ratchet run", "since": "now"}
    content = {**holder, "token": "t", "seconds": seconds, "renewed": 0, "released": False}
    store().write(FIRST, json.dumps(content).encode())


def test_a_lock_excludes_another_working_copy_and_a_killed_holder_of_this_machine_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        monkeypatch.setenv("RATCHET_CACHE", str(tmp_path / "two"))
        message = rf"'experiment-x' is locked by process {child.pid} on .* taken for dead 3 s after its last sign"
        with pytest.raises(LockedError, match=message), exclusive("experiment-x", wait_seconds=0):
            pass
        assert is_leased("experiment-x")
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not is_leased("experiment-x")
        with exclusive("experiment-x", wait_seconds=0):
            assert is_leased("experiment-x")


def test_a_holder_elsewhere_that_gives_no_sign_is_taken_over_when_its_time_is_up() -> None:
    held_elsewhere()
    started = time.monotonic()
    with pytest.raises(LockedError, match="locked by process 7 on far"), exclusive("experiment-x", wait_seconds=0):
        pass
    with exclusive("experiment-x", wait_seconds=10):
        assert time.monotonic() - started > 1.5  # 3 s by a clock of whole seconds
        assert list(store().names("locks/experiment-x")) == ["locks/experiment-x/000000000002.json"]
        check_leases()


def test_a_lease_is_kept_for_longer_than_it_lasts() -> None:
    with leased("x", wait_seconds=0):
        time.sleep(4.0)
        check_leases()
        content = store().read("locks/x/000000000001.json")
        assert content is not None
        assert json.loads(content)["renewed"] >= 3
    content = store().read("locks/x/000000000001.json")
    assert content is not None
    assert json.loads(content)["released"]


def test_a_holder_that_was_taken_over_writes_no_more_and_names_who_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_keep", leases._held.append)  # as if this process had been stopped for a while
    with leased("experiment-x", wait_seconds=0):
        check_leases()
        taken = json.loads(store().read(FIRST) or b"") | {"pid": 8, "host": "far", "token": "other"}
        store().create(FIRST.replace("1.json", "2.json"), json.dumps(taken).encode())
        time.sleep(2.1)
        with pytest.raises(LeaseLostError, match=r"taken over by process 8 on far .* writes no more"):
            check_leases()
    check_leases()
    assert not json.loads(store().read(FIRST.replace("1.json", "2.json")) or b"")["released"]


def test_a_holder_that_wakes_late_goes_on_if_nobody_has_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_keep", leases._held.append)
    with leased("x", wait_seconds=0):
        time.sleep(3.1)
        with unreachable(monkeypatch, "write"), pytest.raises(StoreError, match="no way through"):
            check_leases()
        check_leases()


def test_a_holder_that_renews_while_it_is_taken_over_keeps_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    held_elsewhere()
    seen = leases._look(store(), "experiment-x", None)
    assert seen is not None
    held_elsewhere(seconds=4.0)  # it has written again since it was looked at
    assert leases._take(store(), "experiment-x", seen) is None
    assert list(store().names("locks/experiment-x")) == [FIRST]


def test_of_many_who_want_a_lease_one_at_a_time_has_it() -> None:
    inside, most, entered = 0, 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal inside, most, entered
        with leased("busy", wait_seconds=30):
            with lock:
                inside, entered = inside + 1, entered + 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, entered) == (1, 6)
    assert list(store().names("locks/busy")) == ["locks/busy/000000000006.json"]
