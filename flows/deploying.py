"""What a team's Prefect server gets: a work pool, a deployment a preset, and an automation that finds dead runs.

Everything is created where it is missing and brought up to date where it is there, so that `ratchet deploy` may be
given again at any time. What people decide in the UI stays: whether a schedule is on, and the limit of the work pool.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from flows.forms import form_of
from flows.presets import REPOSITORY, PresetError
from flows.recipes import Recipe
from flows.server import HEARTBEAT_SECONDS
from storage.home import home_name, home_url

TAG = "ratchet"
IN_IMAGE, HOME_IN_IMAGE = "/ratchet", "/ratchet-home"  # of deployments/docker/Dockerfile
NIGHTLY = "0 2 * * *"
DEAD_RUNS = "ratchet: a run that is not heard of any more has crashed"
UNHEARD_SECONDS = 4.0 * HEARTBEAT_SECONDS  # below three heartbeats, healthy runs are taken for dead (docs/PREFECT.md 2)
PLACEHOLDER = re.compile(r"{{\s*([\w.$-]+)\s*}}")
LIMIT = ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)  # a run that came too early is no loss


class Deployed(NamedTuple):
    """One thing on the server, and whether it was there before."""

    what: str
    name: str
    existed: bool


class Deployment(NamedTuple):
    """One preset as a deployment."""

    name: str  # the experiment's
    entrypoint: str
    parameters: dict[str, Any]
    tags: list[str]
    description: str
    flow: "Flow[..., Any]"
    form: dict[str, Any]


def deployment_of(preset: Path) -> Deployment:
    """A preset as a deployment; a scheduled run of it does one more iteration.

    Raises:
        PresetError: the preset cannot be used; the message lists every fault.
    """
    recipe = Recipe(preset)
    return Deployment(
        name=recipe.config.experiment,
        entrypoint=recipe.entrypoint,
        parameters={"config": recipe.values, "advance": True},
        tags=[TAG, recipe.config.recipe],
        description=_first_comment(preset),
        flow=recipe.flow,
        form=form_of(recipe.flow, type(recipe.config)),
    )


def deploy(
    presets: Sequence[Path], *, pool: str, at_once: int, cron: str | None, image: str | None = None
) -> Iterator[Deployed]:
    """Bring the server that PREFECT_API_URL names up to date, and say what was done, one thing after the other.

    Args:
        at_once: runs of the pool at a time, one an accelerator; for a pool that is not there yet.
        image: runs are Kubernetes jobs of this image, with one GPU; None: processes of a worker.
        cron: when the deployments run; None: nightly, and paused until someone turns the schedule on.
    Raises:
        PresetError: two presets are of one experiment, or one cannot be used, or the pool is of another type; then
            nothing was done.
    """
    deployments = [deployment_of(preset) for preset in presets]
    names = [one.name for one in deployments]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise PresetError(f"several presets are of one experiment: {', '.join(doubled)}; deploy one of them")
    with get_client(sync_client=True) as client:
        yield _work_pool(client, pool, at_once, kind="process" if image is None else "kubernetes")
        yield _watch_for_dead_runs(client)
        for one in deployments:
            yield _deploy_one(client, one, pool, cron, image)


def prefect_yaml(presets: Sequence[Path], *, pool: str) -> str:
    """The deployments as a prefect.yaml, for those who deploy with Prefect's own command.

    Raises:
        PresetError: a preset holds what that command would take for a placeholder of its own, and remove.
    """
    for preset in presets:
        if found := PLACEHOLDER.search(preset.read_text(encoding="utf-8")):
            told = f"write {{{{ ({found[1]}) }}}}, which means the same to Jinja"
            raise PresetError(f"{preset}: `prefect deploy` would replace {found[0]!r} by nothing; {told}")
    deployments = [
        {
            "name": one.name,
            "description": one.description,
            "entrypoint": one.entrypoint,
            "parameters": one.parameters,
            "tags": one.tags,
            "schedules": [{"cron": NIGHTLY, "timezone": "UTC", "slug": "nightly", "active": False}],
            "concurrency_limit": {"limit": 1, "collision_strategy": LIMIT.collision_strategy.value},
            "work_pool": {"name": pool, "job_variables": {"env": _settings_of_jobs()}},
        }
        for one in map(deployment_of, presets)
    ]
    directory = {"directory": "{{ $PWD }}"}
    pull = [{"prefect.deployments.steps.set_working_directory": directory}]
    return yaml.safe_dump({"name": "ratchet", "pull": pull, "deployments": deployments}, sort_keys=False, width=120)


def _work_pool(client: SyncPrefectClient, name: str, at_once: int, kind: str) -> Deployed:
    try:
        there = client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        if kind == "kubernetes":
            template = json.loads((REPOSITORY / "deployments" / "kubernetes" / "base-job-template.json").read_text())
        wanted = WorkPoolCreate(name=name, type=kind, base_job_template=template, concurrency_limit=at_once)
        client.create_work_pool(wanted)
        return Deployed("work pool", name, existed=False)
    if there.type != kind:
        asked = "no --image" if kind == "process" else "--image"
        raise PresetError(f"the work pool {name!r} is of type {there.type!r}, and {asked} needs {kind!r}; give --pool")
    return Deployed("work pool", name, existed=True)


def _watch_for_dead_runs(client: SyncPrefectClient) -> Deployed:
    """Prefect itself notices the death of a process only where its worker has lived on (docs/PREFECT.md 2)."""
    message = f"Nothing was heard of this run for {UNHEARD_SECONDS:.0f} s: its process is gone. Retry it to go on."
    automation = AutomationCore(
        name=DEAD_RUNS,
        description="Installed by `ratchet deploy`.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=UNHEARD_SECONDS),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, name=None, message=message, force=False)],
    )
    there = client.read_automations_by_name(DEAD_RUNS)
    if there:
        client.update_automation(there[0].id, automation.model_copy(update={"enabled": there[0].enabled}))
    else:
        client.create_automation(automation)
    return Deployed("automation", DEAD_RUNS, existed=bool(there))


def _deploy_one(client: SyncPrefectClient, one: Deployment, pool: str, cron: str | None, image: str | None) -> Deployed:
    schedule = DeploymentScheduleCreate(
        schedule=CronSchedule(cron=cron or NIGHTLY, timezone="UTC"), active=cron is not None
    )
    name = f"{one.flow.name}/{one.name}"
    folder, places = (
        (str(REPOSITORY), _places()) if image is None else (IN_IMAGE, {"RATCHET_HOME": home_url() or HOME_IN_IMAGE})
    )
    common: dict[str, Any] = {
        "description": one.description,
        "entrypoint": one.entrypoint,
        "parameters": one.parameters,
        "parameter_openapi_schema": one.form,
        "enforce_parameter_schema": True,
        "tags": one.tags,
        "work_pool_name": pool,
        "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": folder}}],
        "job_variables": {"env": _settings_of_jobs() | places, **({"image": image} if image else {})},
        "concurrency_limit": 1,  # two runs of one experiment never write at once
        "concurrency_options": LIMIT,
    }
    try:
        there = client.read_deployment_by_name(name)
    except ObjectNotFound:
        client.create_deployment(client.create_flow(one.flow), one.name, schedules=[schedule], **common)
        return Deployed("deployment", name, existed=False)
    common |= {} if cron is None else {"schedules": [schedule.model_dump(mode="json")]}
    client.update_deployment(there.id, DeploymentUpdate(**common))
    return Deployed("deployment", name, existed=True)


def _settings_of_jobs() -> dict[str, str]:
    """What a run in a worker needs of Prefect beyond what the worker's own environment says."""
    names = ("PREFECT_LOGGING_EXTRA_LOGGERS", "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "DO_NOT_TRACK")
    return {**{name: os.environ[name] for name in names}, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}


def _places() -> dict[str, str]:
    """Where runs read and write, on this machine; secrets stay in the worker's own environment."""
    data = os.environ.get("RATCHET_DATA")
    return {"RATCHET_HOME": home_name(), **({"RATCHET_DATA": data} if data else {})}


def _first_comment(preset: Path) -> str:
    lines = preset.read_text(encoding="utf-8").splitlines()
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return "\n".join(comment)
