"""Which walls stand where some cannot be had, and what is refused when too few do."""

import asyncio
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import sandbox
from tasks.sandbox import Job, Limits, SandboxError, isolation, run_verifier, run_verifiers
from tasks.sandbox_pool import ATTEMPTS, Pool, Setup
from tests.sandbox.running import TOLD, processes

pytestmark = pytest.mark.flow

REPOSITORY = Path(__file__).parents[2]
HONEST = ("def evaluate(response):\n    return response == 'a'\n", ("a", "b"))
only_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the denied system calls are x86_64's numbers")

# A program that is denied some system calls, as in a container, and then runs verifiers.
CONTAINED = """
import ctypes, json, logging, struct, sys
from tasks import sandbox_layers as layers
denied, allow, required = json.loads(sys.argv[1])
code = [(0x20, 0, 0, 0)]
for number in denied:
    code += [(0x15, 0, 1, number), (0x06, 0, 0, 0x50001)]
program = b"".join(struct.pack("=HBBI", *one) for one in [*code, (0x06, 0, 0, 0x7FFF0000)])
kept = ctypes.create_string_buffer(program)
header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(kept)))
layers._prctl(38, 1)
assert ctypes.CDLL(None).prctl(22, 2, header, 0, 0) == 0
logging.basicConfig()
from tasks.sandbox import Limits, SandboxError, isolation, run_verifier
limits = Limits(required_layers=tuple(required))
try:
    level = isolation(limits, allow_unsandboxed=allow)
    verdicts = run_verifier("def evaluate(response):\\n    return response == 'a'\\n", ["a", "b"], limits)
    print(json.dumps([level, [one.outcome for one in verdicts], verdicts[0].isolation]))
except SandboxError as error:
    print(json.dumps(["refused", str(error), ""]))
"""
UNSHARE, MOUNT, LANDLOCK, PRCTL = 272, 165, 444, 157  # the last puts the filter on, and more


def contained(
    denied: list[int], *, allow: bool = False, required: tuple[str, ...] = ("seccomp",)
) -> tuple[list[str], str]:
    """What came of it, and what was logged."""
    told = json.dumps([denied, allow, required])
    command = [sys.executable, "-c", CONTAINED, told]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("layers", [*ATTEMPTS, ("namespaces", "seccomp")], ids="+".join)
def test_each_level_holds_the_attacks_of_the_self_test(layers: tuple[str, ...]) -> None:
    pool = Pool(Setup(), [layers])
    try:
        assert pool.level in ("+".join(layers), "+".join(layers[1:]))  # without namespaces where there are none
        assert [[outcome for outcome, _ in row] for row in pool.run([HONEST], TOLD)] == [["passed", "failed"]]
    finally:
        pool.close()


@only_x86
@pytest.mark.parametrize("denied", [UNSHARE, MOUNT], ids=["unshare", "mount"])
def test_without_namespaces_the_other_walls_stand_and_it_is_told(denied: int) -> None:
    [level, outcomes, used], logged = contained([denied])
    assert (level, outcomes, used) == ("landlock+seccomp", ["passed", "failed"], "landlock+seccomp")
    assert "without namespaces" in logged
    assert "Operation not permitted" in logged


@only_x86
def test_seccomp_alone_is_enough_unless_more_is_required() -> None:
    [level, outcomes, _], _ = contained([UNSHARE, LANDLOCK])
    assert (level, outcomes) == ("seccomp", ["passed", "failed"])
    [answer, reason, _], _ = contained([UNSHARE, LANDLOCK], required=("landlock", "seccomp"))
    assert answer == "refused"
    assert "landlock required, but missing" in reason


@only_x86
def test_without_seccomp_nothing_runs_and_every_layer_tried_is_named() -> None:
    [answer, reason, _], _ = contained([PRCTL])
    assert answer == "refused"
    for attempt in ATTEMPTS:
        assert "+".join(attempt) in reason
    assert "--allow-unsandboxed" in reason


@only_x86
def test_unsandboxed_runs_when_allowed_by_name_and_every_verdict_says_so() -> None:
    [level, outcomes, used], logged = contained([PRCTL], allow=True)
    assert (level, outcomes, used) == ("none", ["passed", "failed"], "none")
    assert "UNSANDBOXED" in logged


def test_the_permission_to_run_unsandboxed_weakens_nothing_where_a_sandbox_can_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox._state, "unsandboxed_allowed", False)
    assert isolation(allow_unsandboxed=True).endswith("seccomp")


def test_an_unsandboxed_pool_still_stops_loops_and_kills_what_was_started(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ratchet"):
        pool = Pool(Setup(), [()])
    try:
        assert "UNSANDBOXED" in caplog.text
        before = processes()
        sources = ["while True: pass", "import os, time\n    os.fork() or time.sleep(99)\n    return True"]
        rows = pool.run([(f"def evaluate(response):\n    {body}\n", ("a",)) for body in sources] + [HONEST], TOLD)
        assert rows[0][0][0] == "timeout"
        assert [outcome for outcome, _ in rows[2]] == ["passed", "failed"]
        assert processes() == before
    finally:
        pool.close()


def test_it_needs_no_root() -> None:
    """Of what the pool and its child are made is the standard library alone, so any interpreter will do."""
    program = (
        "from tasks.sandbox_pool import Pool, Setup; pool = Pool(Setup()); "
        f"print(pool.level, pool.run([{HONEST!r}], {TOLD!r})); pool.close()"
    )
    for interpreter in (sys.executable, "/usr/bin/python3"):
        command = ["setpriv", "--reuid=61234", "--regid=61234", "--clear-groups", interpreter, "-B", "-c", program]
        if os.geteuid() != 0:
            command = [sys.executable, "-B", "-c", program]
        if not shutil.which(command[0]):
            continue
        done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)}, timeout=120)
        if "ermission denied" not in done.stderr and "No such file" not in done.stderr:
            level, _, answers = done.stdout.strip().partition(" ")
            assert level.endswith("seccomp"), done.stderr
            assert answers == "[[('passed', ''), ('failed', '')]]"
            return
    pytest.skip("root here, and no interpreter that other users may run")


def test_a_module_that_is_asked_for_is_there_and_another_is_missing() -> None:
    source = "import numpy\ndef evaluate(response):\n    return bool(numpy.array([1, 2]).sum() == 3)\n"
    missing = run_verifier(source, ["a"])[0]
    assert (missing.outcome, missing.detail) == ("error", "missing module numpy")
    assert run_verifier(source, ["a"], Limits(preload=("numpy",), memory_mb=512))[0].outcome == "passed"


def test_a_preload_that_cannot_be_imported_is_an_error_of_the_sandbox() -> None:
    with pytest.raises(SandboxError, match="no_such_module_here"):
        isolation(Limits(preload=("no_such_module_here",)))


def test_a_run_that_is_refused_reads_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "ATTEMPTS", ())
    monkeypatch.setattr(sandbox._state, "pools", {})

    def jobs() -> Iterator[Job]:
        raise AssertionError("a job was read")
        yield

    async def consume() -> None:
        async for _ in run_verifiers(jobs()):
            pass

    with pytest.raises(SandboxError):
        asyncio.run(consume())
