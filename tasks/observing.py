"""What the Prefect UI shows beside the task runs: tables of metrics and funnels, a report, and every run recorded."""

import contextlib
import json
import logging
import os
import time
import urllib.request
from datetime import datetime
from typing import Any
from uuid import UUID

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterName,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType
from prefect.context import FlowRunContext
from prefect.states import Crashed

from storage.experiments import Experiment, IterationRecord
from storage.locks import LockedError, exclusive
from tasks.serving import stopping

log = logging.getLogger("ratchet")

SETTLE_SECONDS = 15.0
BEGUN = [StateType.PENDING, StateType.RUNNING]
UNFINISHED = ("PENDING", "RUNNING", "SCHEDULED")


def publish_iteration(experiment: str, record: IterationRecord) -> None:
    """Artifacts of one iteration: its metrics and its funnel as tables. Without a flow run around it, nothing."""
    if FlowRunContext.get() is None:
        return
    key = _artifact_key(f"{experiment}-{record.label}")
    metrics = [
        {
            "split": split,
            "strategy": name,
            **{k: v if k in ("n", "k") else round(100 * v, 1) for k, v in figure.items()},
        }
        for split, figures in (("test", record.metrics), ("dev", record.dev_metrics))
        for name, figure in figures.items()
    ]
    decision = "the start" if record.decision is None else str(record.decision["reason"])
    create_table_artifact(metrics, key=f"{key}-metrics", description=f"{experiment}, {record.label}: {decision}")
    if record.funnel:
        rows = [{"stage": stage, "rows": rows} for stage, rows in record.funnel.items()]
        create_table_artifact(rows, key=f"{key}-funnel", description=f"{experiment}, {record.label}: rows left")


def publish_markdown(experiment: str, markdown: str) -> None:
    """The experiment's summary as a markdown artifact. Without a flow run around it, nothing."""
    if FlowRunContext.get() is not None:
        create_markdown_artifact(markdown, key=_artifact_key(f"{experiment}-report"))


def settle_dead_runs(experiment: str, *, by_name: bool) -> None:
    """Have Prefect show as Crashed the flow runs of this experiment whose process was killed, and their task runs.

    Nobody else would: a killed process tells nothing, and its runs would be shown as Running for ever. A run that is
    alive holds the experiment's lock, and then nothing is done.

    Args:
        by_name: also those that died before they could note their id; for a server that serves this home only.
    """
    with contextlib.suppress(LockedError), exclusive(f"experiment-{experiment}", wait_seconds=0):
        noted = [UUID(name) for name in Experiment(experiment).unsettled()]
        chosen = [FlowRunFilter(id=FlowRunFilterId(any_=noted))] if noted else []
        if by_name:
            chosen.append(FlowRunFilter(name=FlowRunFilterName(any_=[experiment])))
        with get_client(sync_client=True) as client:
            for one in chosen:
                one.state = FlowRunFilterState(type=FlowRunFilterStateType(any_=BEGUN))
                for flow_run in client.read_flow_runs(flow_run_filter=one):
                    _crash(client, flow_run.id)
                    log.warning("Prefect now shows flow run %s as Crashed: its process was killed", flow_run.id)


def _crash(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    crashed: State[Any] = Crashed(message="The process of this run was killed; a later run has gone on from there.")
    for task_run in client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))):
        if task_run.state_type in BEGUN:
            client.set_task_run_state(task_run.id, crashed, force=True)
    client.set_flow_run_state(flow_run_id, crashed, force=True)


def settle(since: datetime) -> None:
    """Wait until the server has recorded the end of every task run of the flow runs begun since.

    Stopped at once, it would lose the last ones. Those of a run that was stopped may never end, and are not waited for.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    EventsWorker.drain_all(timeout=SETTLE_SECONDS)
    APILogWorker.drain_all(timeout=SETTLE_SECONDS)
    deadline = time.monotonic() + SETTLE_SECONDS
    while (left := _unfinished_task_runs(since)) and time.monotonic() < deadline and not stopping.is_set():
        time.sleep(0.3)
    if left and not stopping.is_set():
        log.warning("Prefect has not recorded the end of %d task runs; the store has, and nothing is lost", left)


def _unfinished_task_runs(since: datetime) -> int:
    body = {
        "flow_runs": {"start_time": {"after_": since.isoformat()}},  # a kill leaves task runs of others unfinished
        "task_runs": {"state": {"type": {"any_": list(UNFINISHED)}}},
    }
    url = f"{os.environ['PREFECT_API_URL']}/task_runs/count"
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"content-type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        count: Any = json.load(answer)
    return int(count)


def _artifact_key(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
