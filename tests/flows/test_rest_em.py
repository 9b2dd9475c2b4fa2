"""ReST-EM end to end: under Prefect on the fake engine, as a command that is stopped and killed, and on real parts."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from flows.presets import PresetError
from flows.rest_em import RestEM, rest_em
from models import fake_engine
from models.engine import EngineConfigurationError, Message
from models.fake_engine import FakeEngine
from models.specs import ModelRef
from storage.checkpoints import checkpoint_path, commit_checkpoint, what_is_wrong_with_checkpoint
from storage.experiments import Experiment
from tasks.observing import settle
from tasks.recording import Halted
from tests.flows.builders import (
    MARK,
    PRESETS,
    REPOSITORY,
    SMOKE,
    config_of,
    damaged,
    heard,
    processes_marked,
    stored,
)

TINY = PRESETS / "rest_em" / "tiny.yaml"
SAMPLE = "sample_rollouts"
# Four policies on dev (40 prompts of 4), test (40 greedily, 40 of 4); two iterations of 160 rows; DPO's 240.
ROWS_OF_A_WHOLE_RUN = 4 * (160 + 40 + 160) + 2 * 160 + 240
RATCHET = [sys.executable, "-m", "flows"]


class Recorded(NamedTuple):
    """What Prefect recorded of a flow run."""

    state: str
    message: str
    tasks: dict[str, list[str]]  # task run name -> names of its runs' final states, as they were started


class Ran(NamedTuple):
    """A finished `ratchet` command."""

    status: int
    out: str
    err: str
    left: list[str]  # processes of it that are still there


def recorded(api: str, since: datetime) -> Recorded:
    """The one flow run that began since then."""
    settle(since)
    (run,) = found(api, "flow_runs", {"flow_runs": {"start_time": {"after_": since.isoformat()}}})
    tasks: dict[str, list[str]] = {}
    for one in found(api, "task_runs", {"task_runs": {"flow_run_id": {"any_": [run["id"]]}}}):
        tasks.setdefault(one["name"], []).append(one["state_name"])
    return Recorded(run["state"]["name"], run["state"]["message"] or "", tasks)


def found(api: str, what: str, query: dict[str, Any]) -> list[dict[str, Any]]:
    """All objects of a kind that a query finds; a page holds 200."""
    everything: list[dict[str, Any]] = []
    sort = {"task_runs": "EXPECTED_START_TIME_ASC", "flow_runs": "START_TIME_ASC", "artifacts": "CREATED_DESC"}[what]
    while page := httpx.post(f"{api}/{what}/filter", json={**query, "sort": sort, "offset": len(everything)}).json():
        everything += page
    return everything


def run_in_prefect(api: str, config: RestEM) -> Recorded:
    """Run the flow and return what was recorded of it; a failed one too."""
    since = datetime.now(UTC)
    rest_em(config, return_state=True)
    return recorded(api, since)


def executed(record: Recorded) -> list[str]:
    """Names of the task runs that were not served from the store."""
    return sorted(name for name, states in record.tasks.items() if states != ["Cached"] * len(states))


@pytest.fixture(scope="module")
def undisturbed(smoke_run: Path) -> dict[str, Any]:
    """What the smoke preset stores when nothing goes wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATCHET_HOME", str(smoke_run))
        return stored(Experiment("rest-em-smoke"))


@pytest.mark.flow
def test_a_run_is_recorded_in_prefect_and_a_second_one_is_all_cached(prefect: str, undisturbed: dict[str, Any]) -> None:
    first = run_in_prefect(prefect, config_of(SMOKE))
    assert first.state == "Completed"
    assert set(Counter(state for states in first.tasks.values() for state in states)) == {"Completed"}
    assert {f"it1 sample_rollouts shard {number}" for number in range(4)} <= set(first.tasks)  # 40 prompts, 10 a shard
    assert {"load_prompts", "it0 test evaluate_answers", "it2 train_sft", "it3 train_preferences"} <= set(first.tasks)
    assert stored(Experiment("rest-em-smoke")) == undisturbed
    newest_last = reversed(found(prefect, "artifacts", {}))  # other tests leave some of the same names in the server
    check_artifacts({one["key"]: one for one in newest_last})

    second = run_in_prefect(prefect, config_of(SMOKE))
    assert (second.state, executed(second)) == ("Completed", [])
    assert set(first.tasks) - set(second.tasks) == {name for name in first.tasks if " shard " in name}
    assert stored(Experiment("rest-em-smoke")) == undisturbed


def check_artifacts(artifacts: dict[str, dict[str, Any]]) -> None:
    """Metrics of each policy, funnels of those that were trained, and the report are there to be seen."""
    labels = ("base", "iteration-1", "iteration-2", "dpo")
    assert {f"rest-em-smoke-{label}-metrics" for label in labels} <= set(artifacts)
    assert {f"rest-em-smoke-{label}-funnel" for label in labels[1:]} <= set(artifacts)
    table = json.loads(artifacts["rest-em-smoke-base-metrics"]["data"])
    assert [row["strategy"] for row in table if row["split"] == "test"] == ["greedy", "mean@1", "pass@4", "maj@4"]
    report = artifacts["rest-em-smoke-report"]
    assert report["type"] == "markdown"
    assert "| iteration 2 |" in report["data"]


@pytest.mark.flow
def test_after_training_failed_once_only_training_and_what_follows_runs(
    prefect: str, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fake_engine, "train_fake", _out_of_memory)
        failed = run_in_prefect(prefect, config_of(SMOKE))
    assert (failed.state, failed.tasks["it1 train_sft"]) == ("Failed", ["Failed"])
    assert "the accelerator is full" in failed.message
    assert Experiment("rest-em-smoke").state().state == "failed"
    assert [r.step for r in Experiment("rest-em-smoke").steps() if r.state == "failed"] == ["train_sft"]

    again = run_in_prefect(prefect, config_of(SMOKE))
    assert again.state == "Completed"
    for name, states in failed.tasks.items():
        if "sample_rollouts" not in name:  # where all rows are stored, no shard is started
            expected = ["Completed"] if name == "it1 train_sft" else ["Cached"] * len(states)
            assert (name, again.tasks[name][: len(states)]) == (name, expected)
    assert "Cached" not in {state for name in ("it2 train_sft", "it3 train_preferences") for state in again.tasks[name]}
    assert stored(Experiment("rest-em-smoke")) == undisturbed


def _out_of_memory(*_: object) -> None:
    raise RuntimeError("the accelerator is full")


@pytest.mark.flow
def test_a_failed_shard_fails_the_flow_with_its_number_and_runs_alone_the_next_time(
    prefect: str, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _refuse(patch, third_prompt_of_iteration_one())
        failed = run_in_prefect(prefect, config_of(SMOKE))
    assert failed.state == "Failed"
    assert "1 of 4 shards failed: [0]" in failed.message
    assert "this prompt is too long" in failed.message
    for number in range(4):
        expected = ["Failed" if number == 0 else "Completed"]
        assert failed.tasks[f"it1 sample_rollouts shard {number}"] == expected

    again = run_in_prefect(prefect, config_of(SMOKE))
    assert again.state == "Completed"
    first = [again.tasks[f"it1 sample_rollouts shard {number}"][0] for number in range(4)]
    assert first == ["Completed", "Cached", "Cached", "Cached"]
    shards = [r for r in Experiment("rest-em-smoke").steps() if (r.step, r.iteration, r.shard) == (SAMPLE, 1, 0)]
    assert [(r.state, r.counts.get("drawn")) for r in shards[:2]] == [("failed", None), ("completed", 32)]  # 40 less 8
    assert stored(Experiment("rest-em-smoke")) == undisturbed


def _refuse(patch: pytest.MonkeyPatch, text: str) -> None:
    def refuse_failing(_engine: FakeEngine, messages: Sequence[Message]) -> None:
        if any(text in message["content"] for message in messages):
            raise EngineConfigurationError("this prompt is too long")

    patch.setattr(FakeEngine, "_refuse_failing", refuse_failing)


def third_prompt_of_iteration_one() -> str:
    """The text of the third prompt that iteration 1 draws: in its first shard, and not asked for in iteration 0."""
    from storage.datasets import read_rows
    from storage.rows import Prompt
    from tasks.loading import draw_prompts, load_prompts

    config = config_of(SMOKE)
    drawn = draw_prompts(load_prompts(config.train, without=()), 40, 1, config.seed)
    return list(read_rows(drawn, Prompt))[2].prompt


@pytest.mark.flow
def test_the_shards_of_every_pass_are_task_runs_and_a_second_run_is_all_cached(prefect: str) -> None:
    config = config_of(SMOKE, "sampling.adaptive={first: 2, more: 2, wanted_correct: 1, wanted_incorrect: 1, cap: 8}")
    first = run_in_prefect(prefect, config)
    assert first.state == "Completed"
    steps = Experiment("rest-em-smoke").steps()
    shards = sorted(
        r.shard for r in steps if (r.step, r.iteration) == (SAMPLE, 1) and r.shard is not None and not r.split
    )
    assert len(shards) > 4  # the first pass has 4: 40 prompts, 10 a shard
    assert shards == list(range(len(shards)))
    assert {f"it1 sample_rollouts shard {number}" for number in shards} <= set(first.tasks)
    with heard() as records:
        assert run_in_prefect(prefect, config).state == "Completed"
    assert [record.step for record in records if not record.cached] == []


@pytest.mark.parametrize(
    "override",
    [
        "evaluation.dev.adaptive={first: 2}",
        "evaluation.test=[{strategies: [mean@1], sampling: {rollouts_per_prompt: 4, adaptive: {first: 2}}}]",
    ],
    ids=["dev", "test"],
)
def test_evaluation_cannot_be_adaptive(override: str) -> None:
    with pytest.raises(PresetError, match="adaptive: there is no such key"):
        config_of(SMOKE, override)


def ratchet(*arguments: object, home: Path, mark: str = "", seconds: float = 120, **variables: str) -> Ran:
    """Run the command to its end, as a user would."""
    process = start(*arguments, home=home, mark=mark or uuid.uuid4().hex, **variables)
    out, err = process.communicate(timeout=seconds)
    return Ran(process.returncode, out, err, processes_marked(mark) if mark else [])


def start(*arguments: object, home: Path, mark: str, **variables: str) -> "subprocess.Popen[str]":
    """Start the command; it and all that it starts carry the mark."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return subprocess.Popen(
        [*RATCHET, *map(str, arguments), "--home", str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**ours, MARK: mark, "PYTHONUNBUFFERED": "1", **variables},
    )


@pytest.mark.flow
def test_the_command_starts_its_own_server_prints_what_came_out_and_leaves_no_process(
    ratchet_home: Path, undisturbed: dict[str, Any]
) -> None:
    done = ratchet("run", SMOKE, home=ratchet_home, mark=uuid.uuid4().hex)
    assert done.status == 0, done.err
    assert re.search(r"Prefect UI: http://127\.0\.0\.1:\d+", done.err)
    for shown in ("Accuracy on the test split", "What became of the rollouts", "iteration 2"):
        assert shown in done.out
    assert f"Report: {ratchet_home}/experiments/rest-em-smoke/report.html" in done.out
    assert done.left == []
    assert "Traceback" not in done.err
    assert stored(Experiment("rest-em-smoke")) == undisturbed
    assert (ratchet_home / "prefect" / "prefect.db").is_file()


@pytest.mark.flow
def test_a_failed_run_is_told_once_and_without_a_traceback(prefect_server: str, ratchet_home: Path) -> None:
    since = datetime.now(UTC)
    api = f"{prefect_server}/api"
    nothing = "base.name=fake:0.0"
    done = ratchet("run", SMOKE, "--set", nothing, home=ratchet_home, PREFECT_API_URL=api)
    assert done.status == 1
    assert f"Prefect: {api}" in done.err
    assert "The run failed: step 'select_demonstrations' kept 0 of 160 rollouts" in done.err
    assert done.err.count("kept 0 of") == 2  # the step's own line, and the run's
    assert "Traceback" not in done.err
    (run,) = found(api, "flow_runs", {"flow_runs": {"start_time": {"after_": since.isoformat()}}})
    tasks = found(api, "task_runs", {"task_runs": {"flow_run_id": {"any_": [run["id"]]}}})
    assert (run["state_type"], Counter(task["state_type"] for task in tasks)["FAILED"]) == ("FAILED", 1)
    assert {task["state_type"] for task in tasks} == {"COMPLETED", "FAILED"}  # a server that stays hears of every end


@pytest.mark.flow
@pytest.mark.parametrize(
    ("number", "options", "status"),
    [
        pytest.param(signal.SIGINT, [], 130, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, ["--no-prefect-server"], 130, id="SIGTERM"),
        pytest.param(signal.SIGKILL, [], -9, id="kill -9"),
    ],
)
def test_a_run_that_is_stopped_while_it_samples_goes_on_where_it_was(
    number: signal.Signals, options: list[str], status: int, ratchet_home: Path, undisturbed: dict[str, Any]
) -> None:
    mark = uuid.uuid4().hex
    slow = ["--set", "engine.seconds_per_request=0.02"]
    process = start("run", SMOKE, *slow, *options, home=ratchet_home, mark=mark)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "it0 dev  score_answers" in line:  # dev is drawn, 160 rows; 4 s of rollouts on test come next
                break
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == status, err
    assert left_after(mark) == []
    assert Experiment("rest-em-smoke").state().state == "interrupted"
    assert 160 <= ledger_rows(ratchet_home) < ROWS_OF_A_WHOLE_RUN
    if number != signal.SIGKILL:
        assert "Stopped. Nothing that was finished is lost; go on with:" in err
        assert f"run {SMOKE} {shlex.join(slow)} --home {ratchet_home}" in err
        assert "FAILED" not in err

    again = ratchet("run", SMOKE, "--no-prefect-server", home=ratchet_home)
    assert again.status == 0, again.err
    assert stored(Experiment("rest-em-smoke")) == undisturbed
    assert ledger_rows(ratchet_home) == ROWS_OF_A_WHOLE_RUN  # no row was drawn twice


def left_after(mark: str, seconds: float = 5.0) -> list[str]:
    """Processes with the mark that are still there a little later: a killed run cannot wait for its children."""
    deadline = time.monotonic() + seconds
    while (left := processes_marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def ledger_rows(home: Path) -> int:
    """Rollouts in all ledgers of a home, each paid for once."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(part).num_rows for part in home.glob("ledger/*/part-*.parquet"))


SMALL = (  # the demo, cut down until it takes a minute
    "base.corpus.arithmetic.problems=4000",
    "base.tiny.training.max_steps=400",
    "train.rows={start: 20000, stop: 20064}",
    "dev={arithmetic: {problems: 32, split: test}, rows: {start: 16}}",
    "test={arithmetic: {problems: 32, split: test}, rows: {stop: 16}}",
    "prompts_per_iteration=64",
    "sampling.prompts_per_shard=16",
    "sampling.rollouts_per_prompt=16",
    "dpo.sampling.rollouts_per_prompt=16",
    "evaluation.dev.rollouts_per_prompt=2",
    "evaluation.test=[{strategies: [mean@1], sampling: {rollouts_per_prompt: 2, max_completion_tokens: 64}}]",
    "gate.promote=always",
)


@pytest.mark.vllm
def test_the_demo_runs_on_real_parts_with_one_engine_start(ratchet_home: Path) -> None:
    mark = uuid.uuid4().hex
    options = [part for setting in SMALL for part in ("--set", setting)]
    process = start("run", TINY, *options, home=ratchet_home, mark=mark)
    engines: set[int] = set()
    watcher = threading.Thread(target=_note_engines, args=(process, mark, engines))
    watcher.start()
    out, err = process.communicate(timeout=400)
    watcher.join()
    assert process.returncode == 0, err[-3000:]
    assert left_after(mark) == []
    assert len(engines) == 1

    experiment = Experiment("rest-em-tiny")
    records = experiment.iterations()
    assert [record.label for record in records] == ["base", "iteration 1", "iteration 2", "dpo"]
    assert damaged(experiment) == []
    assert len({record.policy["digest"] for record in records}) == 4
    assert all(what_is_wrong_with_checkpoint(record.policy["digest"], deep=True) is None for record in records)
    assert 0 < records[3].funnel["trained_on"] <= records[3].funnel["pairs"]
    assert "What became of the rollouts" in out
    assert Counter(states_of_task_runs(ratchet_home)) == {"COMPLETED": len(states_of_task_runs(ratchet_home))}


def _note_engines(process: "subprocess.Popen[str]", mark: str, engines: set[int]) -> None:
    """Collect the ids of the vLLM processes that the command starts, until it ends."""
    while process.poll() is None:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "models.vllm_server" in child.cmdline() and child.environ().get(MARK) == mark:
                    engines.add(child.pid)
        time.sleep(0.5)


def states_of_task_runs(home: Path) -> list[str]:
    """The final state of every task run in the private server's database."""
    with contextlib.closing(sqlite3.connect(home / "prefect" / "prefect.db")) as database:
        return [state for (state,) in database.execute("select state_type from task_run")]


GUARDED = (
    *(one for one in SMALL if not one.startswith(("dev=", "gate.", "base.tiny", "evaluation.dev"))),
    "base.tiny.training.max_steps=800",
    "dev={arithmetic: {problems: 300, split: test}, rows: {start: 100}}",
    "evaluation.dev.rollouts_per_prompt=4",
    "dpo=null",
    "sampling.adaptive={first: 4, more: 4, cap: 32}",
)


def save_noised(weights: Path, folder: Path, scale: float) -> None:
    """A copy of a model with noise on every weight, so many times as wide as the weights of its tensor."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(weights, folder, ignore=shutil.ignore_patterns("manifest.json"))
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    noised = {
        name: one + scale * one.std() * torch.randn(one.shape, generator=generator) if one.numel() > 1 else one
        for name, one in tensors.items()
    }
    save_file(noised, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.vllm
@pytest.mark.slow  # a minute
def test_a_schedule_halts_at_a_policy_whose_weights_are_noised(
    monkeypatch: pytest.MonkeyPatch, ratchet_home: Path
) -> None:
    config = config_of(TINY, *GUARDED)

    def train_noised(base: ModelRef, *_: object) -> ModelRef:
        folder = ratchet_home / "models" / ".scratch-noised" / "model"
        folder.parent.mkdir()
        save_noised(checkpoint_path(str(base.digest)), folder, 1.0)
        return ModelRef(name="noised", digest=commit_checkpoint(folder, step="train_sft", parents=[str(base.digest)]))

    monkeypatch.setattr("flows.rest_em.train_sft", train_noised)
    with pytest.raises(Halted) as caught:
        rest_em.fn(config, advance=True)
    base, spoilt = Experiment("rest-em-tiny").iterations()
    assert (spoilt.promoted, Experiment("rest-em-tiny").state().state) == (False, "halted")
    assert base.dev_metrics["mean@1"]["value"] > spoilt.dev_metrics["mean@1"]["value"]
    assert spoilt.regression is not None
    assert spoilt.regression["p_value"] < 0.001
    assert str(spoilt.regression["reason"]) in str(caught.value)
    assert "Significantly worse" in (ratchet_home / "experiments" / "rest-em-tiny" / "report.json").read_text()
    assert spoilt.funnel["sampled"] <= 64 * 16  # adaptive sampling, on the real engine
    assert {"pass_rates", "gold_checks"} <= set(spoilt.references)
