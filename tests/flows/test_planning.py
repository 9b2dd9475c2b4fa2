"""The plan: what it tells of a run before it begins, and that it leaves nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flows.__main__ import app
from flows.planning import make_plan
from flows.recipes import Recipe
from storage.experiments import Experiment
from storage.hub import staying_here
from tests.flows.builders import PRESETS, REPOSITORY, SMOKE, tree
from tests.models.tiny_fixture import save_tokenizer

SMOKES = sorted(path.parent.name for path in PRESETS.glob("*/smoke.yaml"))
TEMPLATE = (
    "{% for m in messages %}Q: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def told_of(preset: Path, *overrides: str) -> dict[str, Any]:
    """What a plan tells programs."""
    done = CliRunner().invoke(
        app, ["plan", str(preset), "--json", *(part for one in overrides for part in ("--set", one))]
    )
    assert done.exit_code == 0, done.output
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("recipe", SMOKES)
def test_each_recipe_is_planned_in_full_and_nothing_is_written(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "deployments").symlink_to(PRESETS.parent)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("RATCHET_HOME")  # the home would be ./ratchet-home
    before = tree(tmp_path)
    told = told_of(PRESETS / recipe / "smoke.yaml")
    assert tree(tmp_path) == before
    assert told["config"]["recipe"] == recipe
    assert {step["cached"] for step in told["steps"]} == {False}
    assert told["estimate"]["tokens_drawn"] > 0
    assert "assumed" in told["estimate"]["sources"]["tokens_drawn"]
    assert all(prompt["text"] for prompt in told["first_prompts"].values())


def test_the_command_leaves_no_home_behind_and_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from flows.__main__ import app; app(['plan', sys.argv[1]], standalone_mode=False); "
        "print('loaded', {'torch', 'vllm', 'transformers', 'datasets', 'nltk', 'pandas'} & sys.modules.keys())"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    del environment["RATCHET_HOME"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(SMOKE)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "loaded set()" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_resolved_configuration_is_printed_as_yaml_that_makes_the_same_experiment(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["plan", str(SMOKE)]).stdout.split("\n\n")[0]
    assert yaml.safe_load(printed)["sft"]["warmup_ratio"] == 0.05  # a default
    (tmp_path / "resolved.yaml").write_text(printed)
    assert Recipe(tmp_path / "resolved.yaml").config == Recipe(SMOKE).config


def test_a_hub_data_set_that_is_not_here_is_told_and_no_network_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RATCHET_DATA", raising=False)
    monkeypatch.setenv("HF_HOME", "/nowhere")
    told = told_of(PRESETS / "rest_em" / "phi2_gsm8k.yaml")
    assert told["to_download"] == ["openai/gsm8k:main:train", "openai/gsm8k:main:test"]
    rows = {step["step"]: step["rows"] for step in told["steps"]}
    assert (rows["load_prompts"], rows["gather_rollouts"]) == (None, None)  # of test: not known, which is not none
    assert told["steps"][0]["rows"] == 6973  # of train, at most: rows 0 to 6972 are asked for
    assert told["estimate"]["unknown"]["seconds"] > 0
    assert "its first prompt stands here" in told["first_prompts"]["base"]["text"]
    assert any("microsoft/phi-2" in line for line in told["licences"])


def test_prompts_are_counted_and_the_tokenizer_is_examined_where_there_is_one(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "phi"}')
    (model / "model.safetensors").write_bytes(b"weights")
    save_tokenizer(model, chat_template=TEMPLATE)
    told = told_of(SMOKE, f"base={{name: {model}}}", "engine={kind: vllm, max_model_len: 256}")
    first = told["first_prompts"]["base"]
    assert first["text"] == "Q: What is 58 + 24?"
    assert first["tokens"] > 4
    (examined,) = told["tokenizers"]
    assert "a turn ends with" in examined
    assert "trained as the last token and where sampling stops" in examined
    assert "no BOS" in examined or "BOS" in examined


@pytest.mark.flow
def test_a_plan_goes_by_what_earlier_runs_took(finished: Path) -> None:
    before = tree(finished)
    told = told_of(SMOKE, "iterations=3")
    assert tree(finished) == before
    records = [one for one in Experiment("rest-em-smoke").steps() if one.counts.get("drawn") and one.shard is None]
    training = [one for one in records if one.split is None]
    mean = sum(one.counts["tokens"] for one in training) / sum(one.counts["drawn"] for one in training)
    new = next(step for step in told["steps"] if step["iteration"] == 3 and step["step"] == "gather_rollouts")
    assert new["estimate"]["rows"] == 160  # 40 prompts x 4
    assert new["estimate"]["tokens_drawn"] == pytest.approx(160 * mean)
    assert told["estimate"]["sources"]["tokens_drawn"].startswith("earlier runs of rest-em-smoke")


@pytest.mark.flow
def test_rollouts_that_are_in_the_ledger_are_not_counted_again(finished: Path) -> None:
    # dev has 40 prompts x 4 rollouts; with 6 of each, 2 are missing
    told = told_of(SMOKE, "evaluation.dev.rollouts_per_prompt=6")
    dev = next(step for step in told["steps"] if step["step"] == "gather_rollouts" and step["iteration"] == 0)
    mean = next(
        one.counts["tokens"] / one.counts["drawn"]
        for one in [_sum(one for one in Experiment("rest-em-smoke").steps() if one.split == "dev")]
    )
    assert dev["estimate"]["tokens_drawn"] == pytest.approx(80 * mean)
    assert "rollouts are in the ledger already" in told["estimate"]["sources"]["tokens_drawn"]


def _sum(records: Any) -> Any:
    drawn = [one for one in records if one.counts.get("drawn") and one.shard is None]
    counts = {name: sum(one.counts[name] for one in drawn) for name in ("drawn", "tokens")}
    return drawn[0].model_copy(update={"counts": counts})


def test_what_is_planned_in_this_process_is_what_the_command_tells(ratchet_home: Path) -> None:
    with staying_here():
        made = make_plan(Recipe(SMOKE))
    assert [step.step for step in made.steps] == [step["step"] for step in told_of(SMOKE)["steps"]]
    assert not ratchet_home.exists()
