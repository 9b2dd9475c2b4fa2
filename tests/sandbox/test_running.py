"""Many verifiers at once: order, memory, limits, and workers that are lost on the way."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from tasks import sandbox, sandbox_pool
from tasks.sandbox import Job, Limits, SandboxError, Verdict, run_verifier, run_verifiers
from tasks.sandbox_calls import Task
from tasks.sandbox_pool import Pool, Setup
from tasks.sandbox_watch import Batch, Stop, Walls, Watch
from tests.sandbox.running import PROGRAM, TOLD, collect, processes

REPOSITORY = Path(__file__).parents[2]
HONEST = "def evaluate(response):\n    return response == 'a'\n"
LOOP = "def evaluate(response):\n    while response == 'b': pass\n    return True\n"
HUNGRY = "def evaluate(response):\n    return len(response * (1 << 40 if response == 'b' else 1)) == 1\n"
SHORT = Limits(cpu_seconds=0.1, wall_seconds=1, memory_mb=64)


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(Setup())
    yield pool
    pool.close()


def outcomes(rows: list[list[Verdict]]) -> list[list[str]]:
    return [[verdict.outcome for verdict in row] for row in rows]


def test_verdicts_come_in_the_order_of_jobs_and_responses() -> None:
    jobs = [(f"def evaluate(response):\n    return int(response) == {n}\n", ("0", "1", "2")) for n in range(3)] * 30
    expected = [["passed" if m == n else "failed" for m in range(3)] for n in range(3)] * 30
    for workers in (1, 3):
        assert outcomes(collect(jobs, Limits(), workers)) == expected


def test_every_verdict_names_its_isolation() -> None:
    [verdict] = run_verifier(HONEST, ["a"])
    assert verdict == Verdict("passed", "", sandbox.isolation())


def test_no_responses_give_no_verdicts() -> None:
    assert run_verifier(HONEST, []) == []
    assert outcomes(collect([(HONEST, ()), (HONEST, ("a",)), (HONEST, ())], Limits())) == [[], ["passed"], []]


def test_a_hung_verifier_in_a_shared_process_costs_its_own_hung_calls_only() -> None:
    jobs = [(HONEST, ("a", "b")), (LOOP, ("a", "b", "a")), (HONEST, ("b", "a"))]
    expected = [["passed", "failed"], ["passed", "timeout", "passed"], ["failed", "passed"]]
    assert outcomes(collect(jobs, SHORT, workers=1)) == expected


def test_a_verifier_that_was_stopped_twice_is_not_called_again() -> None:
    row = run_verifier(LOOP, ["b", "a", "b", "a"], SHORT)
    assert [verdict.outcome for verdict in row] == ["timeout", "passed", "timeout", "timeout"]
    assert row[2].detail == "used 0.1 s of CPU time"
    assert row[3].detail.startswith("not called: stopped 2 times before")


def test_a_hungry_verifier_costs_its_own_hungry_calls_only() -> None:
    jobs = [(HONEST, ("a",)), (HUNGRY, ("a", "b", "a", "b", "b")), (HONEST, ("a",))]
    expected = [["passed"], ["passed", "memory", "passed", "memory", "memory"], ["passed"]]
    assert outcomes(collect(jobs, SHORT, workers=1)) == expected


def test_a_verifier_stops_when_all_its_calls_took_too_long() -> None:
    source = "import time\ndef evaluate(response):\n    time.sleep(0.15)\n    return True\n"
    row = run_verifier(source, ["a"] * 8, Limits(verifier_seconds=0.4))
    found = [verdict.outcome for verdict in row]
    assert found[0] == "passed"
    assert found[-1] == "timeout"
    assert "all calls of this verifier took 0.4 s" in row[-1].detail


def test_a_verdict_that_came_as_its_process_was_stopped_counts_and_the_next_call_is_not_charged() -> None:
    batch = Batch(Walls(None, False, 0, lambda: None), [Task(HONEST, ["a", "b"])], TOLD)
    watch = Watch(batch)
    late = Stop((3, "took 1 s"), batch.position())
    batch.accept((0, ""))  # read from the channel after the decision to stop
    watch._settle((0, 0), late, signal.SIGKILL)
    assert batch.answers == [[(0, "")]]
    watch._settle((0, 1), Stop((3, "took 1 s"), batch.position()), signal.SIGKILL)
    assert batch.answers == [[(0, ""), (3, "took 1 s")]]


@pytest.mark.parametrize(
    "body",
    [
        "string._seen = getattr(string, '_seen', 0) + 1\n    return string._seen == 1",
        "global_ = sys.modules\n    global_['seen'] = global_.get('seen', 0) + 1\n    return global_['seen'] == 1",
        "builtins.seen = getattr(builtins, 'seen', 0) + 1\n    return builtins.seen == 1",
        "re.__dict__['seen'] = re.__dict__.get('seen', 0) + 1\n    return re.seen == 1",
        "os.environ['seen'] = os.environ.get('seen', '') + 'x'\n    return os.environ['seen'] == 'x'",
        "evaluate.seen = getattr(evaluate, 'seen', 0) + 1\n    return evaluate.seen == 1",
    ],
    ids=["module-attribute", "sys.modules", "builtins", "module-dict", "environment", "function-attribute"],
)
def test_a_verifier_sees_nothing_of_its_earlier_calls(body: str) -> None:
    source = f"import builtins, os, re, string, sys\ndef evaluate(response):\n    {body}\n"
    assert [verdict.outcome for verdict in run_verifier(source, ["a"] * 3)] == ["passed"] * 3


@pytest.mark.flow
def test_chance_and_the_order_of_sets_are_the_same_in_every_process() -> None:
    body = "raise ValueError(str(random.random()) + ''.join({'ab', 'cd', 'ef', 'gh', 'ij'}))"
    source = f"import random\ndef evaluate(response):\n    {body}\n"
    told = set()
    for _ in range(2):
        pool = Pool(Setup())
        told |= {detail for _, detail in pool.run([(source, ("a", "b"))], TOLD)[0]}
        pool.close()
    assert len(told) == 1


@pytest.mark.flow
def test_a_worker_killed_under_way_is_replaced_and_its_verifiers_are_run_again(pool: Pool) -> None:
    slow = "import time\ndef evaluate(response):\n    time.sleep(0.3)\n    return response == 'a'\n"
    worker = pool._idle[0]
    timer = threading.Timer(0.15, worker._process.kill)
    timer.start()
    rows = pool.run([(HONEST, ("a", "b")), (slow, ("a", "b"))], TOLD)
    assert [[outcome for outcome, _ in row] for row in rows] == [["passed", "failed"]] * 2
    assert pool.replaced == 1
    assert worker._process.returncode is not None


@pytest.mark.flow
def test_a_worker_that_was_sent_much_is_replaced_by_a_fresh_one(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_pool, "BYTES_PER_WORKER", 100_000)
    worker = pool._idle[0]
    for text in ("a", "b" * 100_000, "a"):
        [[(outcome, _)]] = pool.run([(HONEST, (text,))], TOLD)
        assert outcome == ("passed" if text == "a" else "failed")
    assert worker._process.returncode is not None
    assert pool.replaced == 0


@pytest.mark.flow
def test_a_worker_whose_canary_fails_is_replaced_and_its_verifiers_are_run_again(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = pool._idle[0]
    ask = spoilt.ask
    turned = {"passed": "failed", "failed": "passed"}

    def lie(*arguments: object) -> list[list[tuple[str, str]]]:
        return [[(turned.get(outcome, outcome), detail) for outcome, detail in row] for row in ask(*arguments)]  # type: ignore[arg-type]

    monkeypatch.setattr(spoilt, "ask", lie)
    rows = pool.run([(HONEST, ("a", "b"))] * 3, TOLD)
    assert [[outcome for outcome, _ in row] for row in rows] == [["passed", "failed"]] * 3
    assert pool.replaced == 1


@pytest.mark.flow
def test_a_sandbox_whose_canary_never_comes_out_right_is_an_error(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_pool, "CANARY_OUTCOMES", ("failed", "failed", "failed"))
    with pytest.raises(SandboxError, match="known verdicts"):
        pool.run([(HONEST, ("a",))], TOLD)


@pytest.mark.flow
def test_a_closed_pool_starts_no_new_worker(pool: Pool) -> None:
    pool.close()
    with pytest.raises(SandboxError, match="closed"):
        pool.run([(HONEST, ("a",))], TOLD)


def test_only_a_window_of_jobs_is_read_ahead() -> None:
    read = 0

    def jobs() -> Iterator[Job]:
        nonlocal read
        for _ in range(10_000):
            read += 1
            yield Job(HONEST, ("a",))

    async def first() -> None:
        rows = run_verifiers(jobs(), workers=1)
        assert [verdict.outcome for verdict in await anext(rows)] == ["passed"]
        await rows.aclose()  # type: ignore[attr-defined]

    asyncio.run(first())
    assert read <= 4 * sandbox.BATCH_VERIFIERS  # the one asked for, two waiting, and the one that was too many


@pytest.mark.flow
def test_a_run_that_nobody_listens_to_any_more_ends_at_once() -> None:
    limits = Limits(cpu_seconds=60, wall_seconds=60, verifier_seconds=60)

    async def give_up() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                async for _ in run_verifiers([Job(LOOP, ("b",))] * 3, limits):
                    pass

    sandbox.isolation(limits)
    before, started = threading.active_count(), time.monotonic()
    asyncio.run(give_up())
    while threading.active_count() > before and time.monotonic() - started < 20:
        time.sleep(0.05)
    assert time.monotonic() - started < 20
    assert [verdict.outcome for verdict in run_verifier(HONEST, ["a"], limits)] == ["passed"]


def test_two_loops_share_the_workers_without_mixing_verdicts() -> None:
    found: dict[str, list[list[str]]] = {}

    def work(letter: str) -> None:
        source = f"def evaluate(response):\n    return response == {letter!r}\n"
        found[letter] = outcomes(collect([(source, ("a", "b"))] * 100, Limits()))

    threads = [threading.Thread(target=work, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"a": [["passed", "failed"]] * 100, "b": [["failed", "passed"]] * 100}


@pytest.mark.flow
def test_a_long_run_holds_no_more_memory_than_its_beginning() -> None:
    response = "word " * 2_000  # 10 kB; all jobs together are 24 MB, which nobody may keep
    jobs = (Job(HONEST + f"# {number}", (response, str(number))) for number in range(2_400))
    held: list[int] = []

    def memory() -> int:
        everybody = psutil.Process().children(recursive=True)
        ours = [one for one in everybody if PROGRAM in one.cmdline()]
        return sum(one.memory_info().rss for one in (psutil.Process(), *ours))

    async def watch() -> None:
        done = 0
        async for _ in run_verifiers(jobs, workers=1):
            done += 1
            if done in (400, 2_400):
                held.append(memory())

    asyncio.run(watch())
    assert held[1] - held[0] < 8 * 2**20


@pytest.mark.flow
def test_nothing_outlives_a_host_that_is_killed() -> None:
    program = (
        "import os, signal, threading\n"
        "from tasks.sandbox import Limits, isolation, run_verifier\n"
        "isolation()\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "limits = Limits(cpu_seconds=60, wall_seconds=60)\n"
        "run_verifier('def evaluate(response):\\n    while True: pass', ['a'], limits)\n"
    )
    before = processes()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while processes() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes() - before == set()


@pytest.mark.parametrize(
    "wrong",
    [{"wall_seconds": 0}, {"cpu_seconds": -1}, {"memory_mb": 1}, {"detail_length": 161}, {"required_layers": ("x",)}],
    ids=json.dumps,
)
def test_limits_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Limits(**wrong)  # type: ignore[arg-type]


def test_a_detail_is_no_longer_than_asked_for_and_plain_ASCII() -> None:
    source = "def evaluate(response):\n    raise ValueError(response)\n"
    [verdict] = run_verifier(source, ["é\x1b[31m" + "x" * 500], Limits(detail_length=20))
    assert verdict.outcome == "error"
    assert len(verdict.detail) == 20
    assert verdict.detail.isascii()
    assert verdict.detail.isprintable()
