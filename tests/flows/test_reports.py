"""The report of every recipe, without a word about recipes in it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flows.recipes import RECIPES, Recipe
from storage.experiments import Experiment
from storage.report_rows import TABLES
from tasks.assembling import assemble
from tasks.reporting import write_report
from tests.flows.builders import PRESETS, REPOSITORY
from tests.light import lighten
from tests.tasks.test_reporting import Page

pytestmark = pytest.mark.flow
PARTS = {"metrics", "decisions", "rollouts", "pass_at_k", "overlaps", "costs", "runs", "lineage", "samples", "funnel"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_whole_report(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    lighten(monkeypatch)
    recipe = Recipe(PRESETS / name / "smoke.yaml")
    recipe.flow.fn(recipe.config)
    experiment = Experiment(recipe.config.experiment)
    page = Page(write_report(experiment).read_text())
    assert page.open == []
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    told: dict[str, Any] = json.loads((experiment.folder / "report.json").read_text())
    assert {table for table, rows in told["tables"].items() if rows} >= PARTS
    assert assemble(experiment).gaps == []
    assert {path.stem for path in (experiment.folder / "report").glob("*.parquet")} == set(TABLES)
    trained = [record.label for record in experiment.iterations()[1:]]
    assert [row["label"] for row in told["tables"]["overlaps"] if row["split"] == "test"] == trained
    prompts = {figure["n"] for record in experiment.iterations() for figure in record.metrics.values()}
    assert {row["held_out_prompts"] for row in told["tables"]["overlaps"] if row["split"] == "test"} == prompts


def test_no_module_of_the_report_knows_a_recipe() -> None:
    modules = ("reporting", "assembling", "tallying", "charts", "picking", "origins", "overlapping", "notices", "costs")
    for file in [*(REPOSITORY / "tasks" / f"{one}.py" for one in modules), REPOSITORY / "tasks" / "report.html"]:
        assert [name for name in RECIPES if re.search(rf"\b{name}\b", Path(file).read_text())] == []
