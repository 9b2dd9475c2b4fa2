"""What the Prefect UI shows beside the task runs: tables of metrics and funnels, a report, and every run recorded."""

import json
import logging
import os
import time
import urllib.request
from datetime import datetime
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.context import FlowRunContext

from storage.experiments import IterationRecord
from tasks.serving import stopping

log = logging.getLogger("ratchet")

SETTLE_SECONDS = 15.0
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
