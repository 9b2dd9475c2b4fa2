"""Deployments: what `ratchet deploy` makes of presets, and that it may be given again."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.utilities.schema_tools import validate
from prefect.utilities.templating import apply_values
from typer.testing import CliRunner

from flows.__main__ import app
from flows.deploying import DEAD_RUNS, deploy, deployment_of, prefect_yaml
from flows.forms import comments_of
from flows.presets import PresetError, known_presets
from flows.rest_em import rest_em
from models import fake_engine
from models.specs import Sampling
from storage.experiments import Experiment
from tests.flows.builders import PRESETS, REPOSITORY, SMOKE, config_of, train_noised

COMMITTED = REPOSITORY / "deployments" / "prefect.yaml"
NAME = "rest-em/rest-em-smoke"


def test_the_committed_prefect_yaml_holds_the_presets_as_they_are() -> None:
    made = prefect_yaml(known_presets(), pool="ratchet")
    again = "ratchet deploy --yaml >deployments/prefect.yaml"
    assert COMMITTED.read_text() == made, f"presets have changed; write it again: {again}"


def test_a_deployment_carries_its_preset_as_parameters_that_the_form_accepts_and_describes() -> None:
    one = deployment_of(SMOKE)
    assert one.parameters == {"config": yaml.safe_load(SMOKE.read_text()), "advance": True}
    assert one.description.startswith("The demo's flow on a fake model")
    sampling = one.form["definitions"]["Sampling"]["properties"]
    assert sampling["rollouts_per_prompt"]["minimum"] == 1
    assert "schedule" in one.form["properties"]["advance"]["description"]
    assert (
        one.form["definitions"]["RestEM"]["properties"]["marker"]["description"] == "the final answer stands after it"
    )


@pytest.mark.parametrize("preset", known_presets(), ids=lambda preset: "/".join(preset.parts[-2:]))
@pytest.mark.parametrize("ignore_required", [True, False], ids=["when it is deployed", "when it is run"])
def test_prefect_takes_every_presets_parameters(preset: Path, ignore_required: bool) -> None:
    one = deployment_of(preset)
    assert validate(one.parameters, one.form, raise_on_error=True, ignore_required=ignore_required) == []


def test_what_a_comment_says_of_a_setting_is_its_description() -> None:
    told = comments_of(Sampling)
    assert told
    assert set(told) <= set(Sampling.model_fields)
    assert not any(comment.startswith("#") for comment in told.values())


def test_two_presets_of_one_experiment_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    twin = tmp_path / "twin.yaml"
    twin.write_text(SMOKE.read_text())
    with pytest.raises(PresetError, match="several presets are of one experiment: rest-em-smoke"):
        list(deploy([SMOKE, twin], pool="ratchet", at_once=1, cron=None))


def test_a_preset_that_prefect_would_take_for_a_template_is_refused(tmp_path: Path) -> None:
    preset = tmp_path / "templated.yaml"
    preset.write_text(
        SMOKE.read_text().replace('name: "fake:0.4"', 'name: "fake:0.4", chat_template: "{{ eos_token }}"')
    )
    with pytest.raises(PresetError, match=r"would replace '{{ eos_token }}' by nothing; write {{ \(eos_token\) }}"):
        prefect_yaml([preset], pool="ratchet")
    assert deployment_of(preset).parameters["config"]["base"]["chat_template"] == "{{ eos_token }}"


def test_deploying_without_a_server_is_a_wrong_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    ran = CliRunner().invoke(app, ["deploy", str(SMOKE)])
    assert ran.exit_code == 2
    assert "PREFECT_API_URL is not set" in ran.output


@pytest.fixture
def deploying(prefect: str) -> Iterator[str]:
    """The server, rid of deployments afterwards, for schedules make runs that other tests would meet."""
    yield prefect
    for one in httpx.post(f"{prefect}/deployments/filter", json={}).json():
        assert httpx.delete(f"{prefect}/deployments/{one['id']}").status_code == 204
    scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    for run in httpx.post(f"{prefect}/flow_runs/filter", json=scheduled).json():
        assert httpx.delete(f"{prefect}/flow_runs/{run['id']}").status_code == 204


@pytest.mark.flow
def test_deploying_twice_changes_nothing_and_keeps_what_people_have_set(deploying: str) -> None:
    first = list(deploy([SMOKE], pool="tested", at_once=1, cron=None))
    assert [one.what for one in first] == ["work pool", "automation", "deployment"]
    found = deployed(deploying)
    assert found["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert found["global_concurrency_limit"]["limit"] == 1
    (schedule,) = found["schedules"]
    assert (schedule["schedule"]["cron"], schedule["active"]) == ("0 2 * * *", False)
    switched = httpx.patch(f"{deploying}/deployments/{found['id']}/schedules/{schedule['id']}", json={"active": True})
    assert switched.status_code == 204
    pool = httpx.patch(f"{deploying}/work_pools/tested", json={"concurrency_limit": 3})
    assert pool.status_code == 204

    second = list(deploy([SMOKE], pool="tested", at_once=1, cron=None))
    assert all(one.existed for one in second)
    again = deployed(deploying)
    assert again["id"] == found["id"]
    assert [(one["schedule"]["cron"], one["active"]) for one in again["schedules"]] == [("0 2 * * *", True)]
    assert httpx.get(f"{deploying}/work_pools/tested").json()["concurrency_limit"] == 3
    automations = httpx.post(f"{deploying}/automations/filter", json={"automations": {"name": {"any_": [DEAD_RUNS]}}})
    assert len(automations.json()) == 1

    list(deploy([SMOKE], pool="tested", at_once=1, cron="30 4 * * 1"))
    assert [(one["schedule"]["cron"], one["active"]) for one in deployed(deploying)["schedules"]] == [
        ("30 4 * * 1", True)
    ]


@pytest.mark.flow
def test_the_server_refuses_parameters_that_the_form_does_not_allow(deploying: str) -> None:
    list(deploy([SMOKE], pool="tested", at_once=1, cron=None))
    found = deployed(deploying)
    config = found["parameters"]["config"]
    for change, told in (
        ({"iterations": 0}, "less than the minimum of 1"),
        ({"iteration": 3}, "iteration"),
        ({"demonstrations": "some"}, "is not one of"),
    ):
        url = f"{deploying}/deployments/{found['id']}/create_flow_run"
        answer = httpx.post(url, json={"parameters": {"config": {**config, **change}}})
        assert answer.status_code in (409, 422), change
        assert told in answer.text
    assert not Experiment("rest-em-smoke").folder.exists()


@pytest.mark.flow
def test_runs_of_an_image_are_kubernetes_jobs_with_a_gpu_and_the_home_on_a_claim(deploying: str) -> None:
    list(deploy([SMOKE], pool="cluster", at_once=4, cron=None, image="registry.example/ratchet:cuda"))
    found, pool = deployed(deploying), httpx.get(f"{deploying}/work_pools/cluster").json()
    assert found["job_variables"]["image"] == "registry.example/ratchet:cuda"
    assert found["job_variables"]["env"]["RATCHET_HOME"] == "/ratchet-home"
    assert (pool["type"], pool["concurrency_limit"]) == ("kubernetes", 4)
    variables = pool["base_job_template"]["variables"]["properties"]
    defaults = {name: one["default"] for name, one in variables.items() if "default" in one}
    pod = apply_values(pool["base_job_template"]["job_configuration"], {**defaults, **found["job_variables"]})[
        "job_manifest"
    ]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"name": "home", "mountPath": "/ratchet-home"} in container["volumeMounts"]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "ratchet-home"}
    with pytest.raises(PresetError, match="'cluster' is of type 'kubernetes', and no --image needs 'process'"):
        list(deploy([SMOKE], pool="cluster", at_once=4, cron=None))


def test_what_the_image_holds_is_what_the_program_needs() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (REPOSITORY / "deployments/docker/Dockerfile").read_text(), re.MULTILINE)
    packages = {name for name in ("flows", "tasks", "models", "storage", "deployments", "requirements")}
    assert {name for names in copied for name in names.split()} == {
        "Makefile",
        "pyproject.toml",
        "README.md",
        *packages,
    }


def deployed(api: str) -> dict[str, Any]:
    """The deployment as the server has it."""
    found: dict[str, Any] = httpx.get(f"{api}/deployments/name/{NAME}").json()
    return found


def test_every_preset_becomes_a_deployment_of_its_own() -> None:
    assert len({deployment_of(preset).name for preset in known_presets()}) == len(list(PRESETS.glob("*/*.yaml")))


@pytest.mark.flow
def test_a_regression_fails_its_scheduled_run_and_no_more_are_scheduled_until_someone_says_so(
    deploying: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_engine, "train_fake", train_noised)
    list(deploy([SMOKE], pool="tested", at_once=1, cron="0 2 * * *"))
    created = httpx.post(f"{deploying}/deployments/{deployed(deploying)['id']}/create_flow_run", json={}).json()
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(UUID(created["id"]))
    asked = {"config": config_of(SMOKE), "advance": True}
    state: Any = run_flow(rest_em, flow_run=flow_run, parameters=asked, return_type="state")  # as a worker does
    assert state.is_failed()
    assert "iteration 1: Significantly worse: mean@1 fell from" in state.message
    assert deployed(deploying)["paused"] is True
    list(deploy([SMOKE], pool="tested", at_once=1, cron=None))
    assert deployed(deploying)["paused"] is True  # what has to be looked at stays so when presets are deployed again
