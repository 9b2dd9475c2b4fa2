"""Locks: one holder at a time, and none after its death."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from storage.locks import LockedError, exclusive

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from storage.locks import exclusive
with exclusive("gpu 0", wait_seconds=0):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_held_elsewhere_names_its_holder_and_is_free_once_the_holder_is_killed() -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdin and child.stdout
    with child.stdin, child.stdout:
        assert child.stdout.readline() == b"held\n"
        message = rf"'gpu 0' is locked by process {child.pid} on .* within 0 s"
        with pytest.raises(LockedError, match=message), exclusive("gpu 0", wait_seconds=0):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
        with exclusive("gpu 0", wait_seconds=2):
            pass


def test_threads_of_one_process_exclude_each_other_and_wait() -> None:
    order = list[str]()
    held = threading.Event()

    def hold() -> None:
        with exclusive("gpu", wait_seconds=0):
            held.set()
            time.sleep(0.05)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(5)
    with exclusive("gpu", wait_seconds=None):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_a_lock_is_free_after_an_error_and_locks_of_other_names_are_apart() -> None:
    with pytest.raises(ZeroDivisionError), exclusive("gpu", wait_seconds=0):
        raise ZeroDivisionError
    with ExitStack() as held:
        for name in ("gpu", "gpu/0", "gpu-0"):
            held.enter_context(exclusive(name, wait_seconds=0))
        with pytest.raises(LockedError, match=f"process {os.getpid()}"), exclusive("gpu", wait_seconds=0.15):
            pass
