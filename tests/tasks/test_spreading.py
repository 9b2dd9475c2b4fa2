"""Shards on a Dask cluster: the rows of a run in one process, stored shard by shard, whatever dies meanwhile."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import Client, LocalCluster
from prefect.client.orchestration import get_client

import tasks.scoring
from flows.rest_em import rest_em
from storage.datasets import DatasetRef, read_manifest, read_rows, write_rows
from storage.experiments import Experiment, StepRecord
from storage.home import home
from storage.rows import (
    CheckedVerifier,
    Instance,
    Prompt,
    Rollout,
    Verification,
    Verifier,
    VerifierCase,
)
from tasks import spreading
from tasks.answers import Verdict, verdict_on
from tasks.consistency import Consistency
from tasks.drawing import ShardsFailed
from tasks.recording import Progress, listening
from tasks.sandbox import Limits, isolation
from tasks.scoring import score_answers
from tasks.serving import Stopped, stop, stopping
from tasks.spreading import ClusterError, cluster_faults, cuts, workers_reach
from tasks.verifying import NothingSurvives, check_verifiers, verify_rollouts
from tests.flows.builders import REPOSITORY, SMOKE, config_of, heard, run_plainly, stored
from tests.light import lighten
from tests.tasks.builders import case, instance, rollout, verifier

GOOD = "def evaluate(response):\n    return 'good' in response\n"
SLOW = "import time\ndef evaluate(response):\n    time.sleep(0.05)\n    return 'good' in response\n"
ENDS = ("Failed", "Completed")
READS_A_FILE = "def evaluate(response):\n    return bool(open('/etc/passwd').read())\n"


@contextmanager
def _cluster(patch: pytest.MonkeyPatch, **options: Any) -> Iterator[LocalCluster]:
    settings = {"threads_per_worker": 1, "dashboard_address": None, "silence_logs": logging.ERROR, **options}
    with dask.config.set({"distributed.comm.timeouts.connect": "2s"}), LocalCluster(**settings) as cluster:
        patch.setenv("RATCHET_DASK", cluster.scheduler_address)
        yield cluster


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """A cluster whose two workers are threads of this process."""
    with _cluster(monkeypatch, n_workers=2, processes=False) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def two_processes() -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch, _cluster(patch, n_workers=2, processes=True) as cluster:
        yield cluster


@pytest.fixture
def processes(two_processes: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> LocalCluster:
    """A cluster of two worker processes that have this test's home."""
    monkeypatch.setenv("RATCHET_DASK", two_processes.scheduler_address)
    give_home(two_processes, str(home()))
    return two_processes


def give_home(cluster: LocalCluster, folder: str) -> None:
    with Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
        client.run(lambda: os.environ.update(RATCHET_HOME=folder))


def to_score(count: int = 100) -> tuple[DatasetRef, DatasetRef]:
    """Four rollouts of each of `count` prompts, and the prompts; rollout 0 is right, 1 has no answer."""
    prompts = [Prompt(prompt_id=f"p{n}", source="s", prompt=f"prompt p{n}", answer=str(n)) for n in range(count)]
    texts = ["A: {}", "none", "A: {}1", "A: 0{}"]
    rollouts = (rollout(i, text.format(n), f"p{n}") for n in range(count) for i, text in enumerate(texts))
    return write_rows(rollouts, Rollout, step="rollouts"), write_rows(prompts, Prompt, step="prompts")


def to_verify(*sources: str, count: int = 12) -> tuple[DatasetRef, DatasetRef, DatasetRef]:
    """Two completions of each of `count` instances, and the verifiers of their instruction."""
    instances = write_rows((instance(f"p{n}") for n in range(count)), Instance, step="instances")
    checked = write_rows(
        [
            CheckedVerifier(
                verifier_id=f"v{n}",
                instruction_id="i",
                source=source,
                kept=True,
                reason="kept",
                agreement=1.0,
                held_out_agreement=1.0,
                cases=2,
                isolation="tests",
            )
            for n, source in enumerate(sources)
        ],
        CheckedVerifier,
        step="checked",
    )
    rows = (rollout(i, f"{text} {n}", f"p{n}") for n in range(count) for i, text in enumerate(["good", "bad"]))
    return instances, checked, write_rows(rows, Rollout, step="rollouts")


def forget(*steps: str) -> None:
    """As if these steps had never been run in this home."""
    for name in steps:
        shutil.rmtree(home() / "steps" / name, ignore_errors=True)


def in_process(patch: pytest.MonkeyPatch, *given: DatasetRef) -> tuple[DatasetRef, dict[str, int]]:
    """What scoring gives without a cluster, and its counts; forgotten again."""
    with patch.context() as without:
        without.delenv("RATCHET_DASK")
        with heard() as records:
            scored = score_answers(*given, "A:")
    forget("score_answers")
    shutil.rmtree(home() / "datasets" / "scored")
    return scored, records[-1].counts


def kill_once(cluster: LocalCluster, killed: list[psutil.Process], after_shards: int = 1) -> Any:
    """A listener that kills a worker, and notes its children, when so many shards are done."""

    def listen(event: StepRecord | Progress) -> None:
        nonlocal after_shards
        if isinstance(event, StepRecord) and event.shard is not None:
            after_shards -= 1
            if after_shards == 0:
                with Client(cluster, set_as_default=False) as client:
                    worker = psutil.Process(next(iter(client.run(os.getpid).values())))
                killed.extend([worker, *worker.children(recursive=True)])
                os.kill(worker.pid, signal.SIGKILL)

    return listen


@pytest.mark.parametrize("rows", [1, 7, 100, 399, 400], ids=lambda rows: f"{rows} rows a shard")
def test_shards_give_the_rows_and_counts_of_one_process(
    threads: LocalCluster, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    given = to_score(10 if rows == 1 else 100)
    expected, counts = in_process(monkeypatch, *given)
    monkeypatch.setenv("RATCHET_SHARD_ROWS", str(rows))
    with heard() as records:
        assert score_answers(*given, "A:") == expected
    whole = records[-1]
    assert (whole.step, whole.shard, whole.counts) == ("score_answers", None, counts)
    shards = [record for record in records if record.shard is not None]
    assert len(shards) == (0 if rows == 400 else -(-given[0].rows // rows))
    assert {record.digest for record in shards} <= {None}  # what a run's records name is never removed by `ratchet gc`
    assert [parent.step for parent in read_manifest(expected).parents] == ["rollouts", "prompts"]


def test_a_failed_shard_lets_the_others_finish_and_is_alone_in_being_done_again(
    threads: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = to_score()
    expected, _ = in_process(monkeypatch, *given)
    monkeypatch.setenv("RATCHET_SHARD_ROWS", "50")

    def broken(completion: str, finish_reason: str, gold: str, marker: str) -> Verdict:
        if gold in ("20", "99"):  # rows 80 and 396, in shards 1 and 7
            raise ValueError(f"no score for p{gold}")
        return verdict_on(completion, finish_reason, gold, marker)

    monkeypatch.setattr(tasks.scoring, "verdict_on", broken)
    with pytest.raises(ShardsFailed, match=r"2 of 8 shards failed: \[1, 7\]; the others are stored") as failure:
        score_answers(*given, "A:")
    assert "ValueError: no score for p20" in str(failure.value)
    monkeypatch.setattr(tasks.scoring, "verdict_on", verdict_on)
    with heard() as records:
        assert score_answers(*given, "A:") == expected
    done = sorted(record.shard for record in records if record.shard is not None and not record.cached)
    assert done == [1, 7]


def test_a_run_that_is_stopped_gives_up_what_is_not_done(
    threads: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = to_score()
    monkeypatch.setenv("RATCHET_SHARD_ROWS", "10")

    def stop_at_once(event: StepRecord | Progress) -> None:
        stop()

    with listening(stop_at_once), pytest.raises(Stopped):
        score_answers(*given, "A:")
    kept = len(list((home() / "steps" / "score_shard").glob("*.json")))
    assert 0 < kept < 40
    stopping.clear()
    with heard() as records:
        score_answers(*given, "A:")
    assert sum(record.cached for record in records if record.shard is not None) >= kept


def test_a_cluster_without_workers_is_told_of_and_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreading, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setenv("RATCHET_SHARD_ROWS", "100")
    given = to_score()
    with (
        _cluster(monkeypatch, n_workers=0, processes=False),
        pytest.raises(ClusterError, match=r"has had no worker for 0\.5 s, with 4 of 4 shards to be done"),
    ):
        score_answers(*given, "A:")


def test_an_address_where_no_scheduler_is_fails_at_once_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_DASK", "tcp://127.0.0.1:9")
    monkeypatch.setenv("RATCHET_SHARD_ROWS", "100")
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(ClusterError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9 .*RATCHET_DASK"),
    ):
        score_answers(*to_score(), "A:")


@pytest.mark.parametrize(
    ("cluster", "rows", "told"),
    [
        pytest.param(None, None, [], id="none"),
        pytest.param("tcp://10.0.0.7:8786", "10", [], id="an address"),
        pytest.param("tls://dask.example:8786", None, [], id="with TLS"),
        pytest.param("10.0.0.7:8786", None, ["RATCHET_DASK is '10.0.0.7:8786'; give a scheduler's"], id="no protocol"),
        pytest.param("tcp://10.0.0.7", None, ["RATCHET_DASK is 'tcp://10.0.0.7'; give a scheduler's"], id="no port"),
        pytest.param(None, "0", ["RATCHET_SHARD_ROWS is '0'; give a number"], id="no rows"),
        pytest.param(None, "many", ["RATCHET_SHARD_ROWS is 'many'; give a number"], id="no number"),
    ],
)
def test_faults_of_the_variables_are_found_before_a_run(
    monkeypatch: pytest.MonkeyPatch, cluster: str | None, rows: str | None, told: list[str]
) -> None:
    for name, value in (("RATCHET_DASK", cluster), ("RATCHET_SHARD_ROWS", rows)):
        if value is not None:
            monkeypatch.setenv(name, value)
    found = list(cluster_faults())
    assert len(found) == len(told) and all(one.startswith(start) for one, start in zip(found, told, strict=True))


@pytest.mark.parametrize(
    ("cluster", "api", "reached"),
    [
        ("tcp://127.0.0.1:8786", "http://127.0.0.1:4200/api", True),
        ("tcp://localhost:8786", "http://prefect.example:4200/api", True),
        ("tcp://10.0.0.7:8786", "http://prefect.example:4200/api", True),
        ("tcp://10.0.0.7:8786", "http://127.0.0.1:4200/api", False),
    ],
)
def test_workers_elsewhere_do_not_reach_a_server_on_loopback(
    monkeypatch: pytest.MonkeyPatch, cluster: str, api: str, reached: bool
) -> None:
    monkeypatch.setenv("RATCHET_DASK", cluster)
    assert workers_reach(api) is reached


def test_without_a_cluster_all_rows_are_one_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuts(10, 4) == [range(10)]
    monkeypatch.setenv("RATCHET_DASK", "tcp://10.0.0.7:8786")
    assert cuts(10, 4) == [range(4), range(4, 8), range(8, 10)]
    monkeypatch.setenv("RATCHET_SHARD_ROWS", "6")
    assert cuts(10, 4) == [range(6), range(6, 10)]


@pytest.mark.flow  # processes of its own
def test_verifiers_run_walled_in_on_worker_processes(processes: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    given = to_verify(GOOD, READS_A_FILE)
    with monkeypatch.context() as without:
        without.delenv("RATCHET_DASK")
        expected = verify_rollouts(*given, None, Limits())
    forget("verify_rollouts")
    monkeypatch.setenv("RATCHET_SHARD_ROWS", "5")
    assert verify_rollouts(*given, None, Limits()) == expected
    rows = list(read_rows(expected, Verification))
    assert {row.isolation for row in rows} == {isolation()} and "seccomp" in isolation()
    told = {name: {row.outcome for row in group} for name, group in groupby(sorted(rows, key=_name), key=_name)}
    assert told == {"v0": {"passed", "failed"}, "v1": {"forbidden"}}


@pytest.mark.flow  # processes of its own
def test_verifiers_are_checked_instruction_by_instruction_as_in_one_process(
    processes: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"i{n}" for n in range(5)]
    sources = [GOOD, f"# again\n{GOOD}", READS_A_FILE]
    verifiers = [replace(verifier(f"{i}{n}", i), source=text) for n, text in enumerate(sources) for i in names]
    cases = [
        case(f"{text} {n}", expected=text == "good", instruction_id=i)
        for i in names
        for n in range(4)
        for text in ("good", "bad")
    ]
    given = write_rows(verifiers, Verifier, step="verifiers"), write_rows(cases, VerifierCase, step="cases")
    with monkeypatch.context() as without, heard() as records:
        without.delenv("RATCHET_DASK")
        expected = check_verifiers(*given, Consistency(), Limits())
    forget("check_verifiers")
    monkeypatch.setenv("RATCHET_SHARD_ROWS", "2")
    with heard() as again:
        assert check_verifiers(*given, Consistency(), Limits()) == expected
    assert sum(row.kept for row in read_rows(expected, CheckedVerifier)) == 10
    assert again[-1].counts == records[-1].counts and records[-1].counts["instructions_kept"] == 5
    assert sorted(record.shard for record in again if record.shard is not None) == [0, 1, 2]


@pytest.mark.flow  # processes of its own
def test_a_worker_that_is_killed_half_way_loses_its_shard_to_another_and_leaves_no_sandbox(
    processes: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, killed = to_verify(SLOW, count=24), list[psutil.Process]()
    monkeypatch.setenv("RATCHET_SHARD_ROWS", "4")
    with listening(kill_once(processes, killed)):
        verified = verify_rollouts(*given, None, Limits())
    outcomes = [row.outcome for row in read_rows(verified, Verification)]
    assert outcomes == ["passed", "failed"] * 24
    assert len(killed) > 2  # the worker and its sandbox
    _, alive = psutil.wait_procs(killed, timeout=10)
    assert not [one.cmdline() for one in alive if one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.flow  # processes of its own
def test_a_worker_with_another_home_says_which(
    processes: LocalCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    give_home(processes, str(tmp_path / "elsewhere"))
    monkeypatch.setenv("RATCHET_SHARD_ROWS", "200")
    with pytest.raises(ShardsFailed, match=r"sees its home .*elsewhere; the run's is .*ratchet-home on"):
        score_answers(*to_score(), "A:")


@pytest.mark.flow  # processes of its own
@pytest.mark.parametrize(
    ("role", "told"),
    [
        pytest.param("worker", "has had no worker for 2 s, with 4 of 6 shards to be done", id="the only worker"),
        pytest.param("scheduler", "4 of 6 shards failed", id="the scheduler"),
    ],
)
def test_when_the_cluster_dies_half_way_the_run_fails_and_the_next_finishes_it_without_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, role: str, told: str
) -> None:
    given = to_verify(SLOW, count=24)
    monkeypatch.setenv("RATCHET_SHARD_ROWS", "4")
    monkeypatch.setattr(spreading, "PATIENCE_SECONDS", 2.0)
    with dask.config.set({"distributed.comm.timeouts.connect": "2s"}), _commands(monkeypatch, tmp_path) as processes:

        def kill_after_two(event: StepRecord | Progress) -> None:
            if isinstance(event, StepRecord) and event.shard == 1:
                processes[role].kill()

        began = time.monotonic()
        with listening(kill_after_two), pytest.raises((ClusterError, ShardsFailed), match=told):
            verify_rollouts(*given, None, Limits())
        assert time.monotonic() - began < 60
    monkeypatch.delenv("RATCHET_DASK")
    assert [row.outcome for row in read_rows(verify_rollouts(*given, None, Limits()), Verification)] == [
        "passed",
        "failed",
    ] * 24


@contextmanager
def _commands(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    """A scheduler and a worker started as users start them."""
    file = folder / "scheduler.json"
    dask_ = [sys.executable, "-m", "dask"]
    processes = {}
    try:
        listen = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
        processes["scheduler"] = subprocess.Popen([*dask_, *listen])
        while not file.exists():
            time.sleep(0.1)
        patch.setenv("RATCHET_DASK", json.loads(file.read_text())["address"])
        work = ["worker", os.environ["RATCHET_DASK"], "--nthreads", "1", "--no-nanny", "--no-dashboard"]
        processes["worker"] = subprocess.Popen([*dask_, *work], cwd=REPOSITORY)
        with Client(os.environ["RATCHET_DASK"], set_as_default=False) as client:
            client.wait_for_workers(1, timeout=60)
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


@pytest.mark.flow
def test_prefect_shows_the_shards_of_a_run_and_a_run_that_failed_there_goes_on(
    prefect: str, processes: LocalCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lighten(monkeypatch)
    config = config_of(SMOKE, "iterations=1")
    with monkeypatch.context() as elsewhere:
        elsewhere.delenv("RATCHET_DASK")
        elsewhere.setenv("RATCHET_HOME", str(tmp_path / "in one process"))
        expected = stored(run_plainly("iterations=1"))
    monkeypatch.setenv("RATCHET_SHARD_ROWS", "50")
    give_home(processes, str(tmp_path / "elsewhere"))
    with pytest.raises(ShardsFailed, match=r"4 of 4 shards failed: \[0, 1, 2, 3\]"):
        rest_em(config)
    give_home(processes, str(home()))
    rest_em(config)
    assert stored(Experiment(config.experiment)) == expected
    with get_client(sync_client=True) as client:
        shown = [(run.name, run.state_name) for run in client.read_task_runs() if " score_answers shard " in run.name]
    assert set(shown) >= {(f"it0 dev score_answers shard {n}", state) for n in range(4) for state in ENDS}


def test_completions_nobody_can_verify_are_told_of_on_a_cluster_too(
    threads: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances, checked, _ = to_verify(GOOD)
    empty = write_rows((rollout(0, "", f"p{n}") for n in range(12)), Rollout, step="rollouts")
    monkeypatch.setenv("RATCHET_SHARD_ROWS", "5")
    with pytest.raises(NothingSurvives, match="none of 12 completions can be verified"):
        verify_rollouts(instances, checked, empty, None, Limits())


def _name(row: Verification) -> str:
    return row.verifier_id
