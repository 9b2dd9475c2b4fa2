"""What the Prefect UI shows beside the task runs: tables of metrics and funnels, a report, and every run recorded."""

import contextlib
import json
import logging
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
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
from prefect.exceptions import PrefectException
from prefect.states import Crashed

from storage.experiments import Experiment, IterationRecord, StepRecord
from storage.locks import LockedError, exclusive
from tasks.serving import stopping

if TYPE_CHECKING:  # it imports this module
    from tasks.recording import Progress

log = logging.getLogger("ratchet")

SETTLE_SECONDS = 30.0  # the server is slow to note what it was told while other processes keep the machine busy
PROGRESS_SECONDS = 5.0  # between two updates of a progress artifact
BEGUN = [StateType.PENDING, StateType.RUNNING]
ENDED = ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]


class ProgressArtifacts:
    """Listens to a run and shows in Prefect how far a step is: a bar, with rows, speed and time left."""

    def __init__(self, experiment: str) -> None:
        self._experiment = experiment
        self._bars: dict[str, _Bar] = {}
        self._lock = threading.Lock()

    def __call__(self, event: "StepRecord | Progress") -> None:
        """Show one event; called from any thread that Prefect runs a task in."""
        if isinstance(event, StepRecord):
            return
        name = " ".join(f"{self._experiment} it{event.iteration} {event.split or ''} {event.step}".split())
        with self._lock:
            bar = self._bars.setdefault(name, _Bar(name, time.monotonic(), event.done))
            if time.monotonic() - bar.shown < PROGRESS_SECONDS and event.done < event.total:
                return
            bar.shown = time.monotonic()
            with _only_shown():
                bar.show(event)


@dataclass(slots=True)
class _Bar:
    name: str
    since: float
    done_before: int  # rows that were there when the step began
    shown: float = 0.0
    artifact: UUID | None = None

    def show(self, event: "Progress") -> None:
        seconds = max(time.monotonic() - self.since, 0.1)
        speed = (event.done - self.done_before) / seconds
        left = f", about {(event.total - event.done) / speed:,.0f} s left" if speed and event.done < event.total else ""
        there = f" ({event.reused:,} were there)" if event.reused else ""
        more = event.detail or f"{event.tokens / seconds:,.0f} tokens/s"
        rows = f"{event.done:,} of {event.total:,} {event.unit}{there}"
        told = f"{self.name}: {rows}, {speed:,.1f} a second, {more}{left}"
        percent = 100.0 * event.done / max(event.total, 1)
        if self.artifact is None:
            made = create_progress_artifact(percent, key=_artifact_key(self.name), description=told)
            self.artifact = made  # type: ignore[assignment] # its async twin is what the annotation means
        else:
            update_progress_artifact(self.artifact, progress=percent, description=told)


def name_flow_run(name: str) -> None:
    """Give the flow run around this code another name. Without one, nothing."""
    flow = FlowRunContext.get()
    if flow is not None and flow.flow_run is not None:
        with _only_shown(), get_client(sync_client=True) as client:
            client.update_flow_run(flow.flow_run.id, name=name)


def pause_deployment() -> None:
    """Have no more runs scheduled of the deployment that this flow run is of. Of none, nothing."""
    flow = FlowRunContext.get()
    if flow is None or flow.flow_run is None or flow.flow_run.deployment_id is None:
        return
    with _only_shown(), get_client(sync_client=True) as client:
        client.pause_deployment(flow.flow_run.deployment_id)
        log.warning("the deployment is paused; turn it on again in the UI once this is settled")


def publish_iteration(experiment: str, record: IterationRecord) -> None:
    """Artifacts of one iteration: its metrics and its funnel as tables. Without a flow run around it, nothing."""
    if FlowRunContext.get() is not None:
        with _only_shown():
            _create_tables(experiment, record)


def publish_markdown(experiment: str, markdown: str) -> None:
    """The experiment's summary as a markdown artifact. Without a flow run around it, nothing."""
    if FlowRunContext.get() is not None:
        with _only_shown():
            create_markdown_artifact(markdown, key=_artifact_key(f"{experiment}-report"))


@contextlib.contextmanager
def _only_shown() -> Iterator[None]:
    """What Prefect shows is no reason to lose a run: a server that fails or is away is noted, no more."""
    try:
        yield
    except (httpx.HTTPError, PrefectException) as error:
        log.warning("Prefect could not be told: %s", str(error).splitlines()[0])


def _create_tables(experiment: str, record: IterationRecord) -> None:
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
    made = [{"role": "policy", "reference": f"models/{record.policy['digest']}", "rows": ""}]
    made += [
        {"role": role, "reference": f"datasets/{ref['step']}/{ref['digest']}", "rows": ref["rows"]}
        for role, ref in record.references.items()
    ]
    create_table_artifact(
        made, key=f"{key}-made", description=f"{experiment}, {record.label}: `ratchet show REFERENCE`"
    )


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
    """Those that the server has no end of; it may have heard of one and of no state of it yet."""
    ours = {"flow_runs": {"start_time": {"after_": since.isoformat()}}}  # a kill leaves task runs of others unfinished
    ended = {**ours, "task_runs": {"state": {"type": {"any_": ENDED}}}}
    return _count_task_runs(ours) - _count_task_runs(ended)


def _count_task_runs(query: dict[str, Any]) -> int:
    url = f"{os.environ['PREFECT_API_URL']}/task_runs/count"
    request = urllib.request.Request(
        url, data=json.dumps(query).encode(), headers={"content-type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        count: Any = json.load(answer)
    return int(count)


def _artifact_key(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
