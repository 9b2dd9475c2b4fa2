"""Recipes of other packages: found by their entry point, run by the same command, every fault told."""

from pathlib import Path

import pytest
from prefect.flows import load_flow_from_entrypoint
from typer.testing import CliRunner

from flows.__main__ import app
from flows.presets import PresetError
from flows.recipes import Recipe
from storage.experiments import Experiment
from tests.flows.builders import REPOSITORY

EXAMPLE = REPOSITORY / "docs" / "examples" / "iterative_rpo"


def install(folder: Path, distribution: str, *entry_points: str) -> None:
    """Leave in the folder what pip would leave of a package that names these recipes."""
    metadata = folder / f"{distribution}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("\n".join(["[ratchet.recipes]", *entry_points]))


def preset_of(folder: Path, recipe: str) -> Path:
    """A preset that names a recipe and nothing else."""
    preset = folder / "preset.yaml"
    preset.write_text(f"recipe: {recipe}\n")
    return preset


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages can be installed in."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.mark.flow
def test_a_recipe_of_another_package_is_planned_run_and_found_done(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    install(site, "iterative-rpo-recipe", "iterative_rpo = iterative_rpo:iterative_rpo")
    preset = str(EXAMPLE / "smoke.yaml")
    planned = CliRunner().invoke(app, ["plan", preset])
    assert planned.exit_code == 0 and "0 of 39 steps are cached" in planned.stdout, planned.output
    done = CliRunner().invoke(app, ["run", preset, "--no-prefect-server"])
    assert done.exit_code == 0, done.output
    assert [record.label for record in Experiment("iterative-rpo-smoke").iterations()] == [
        "base",
        "iteration 1",
        "iteration 2",
    ]
    again = CliRunner().invoke(app, ["plan", preset])
    assert "39 of 39 steps are cached" in again.stdout
    assert load_flow_from_entrypoint(Recipe(Path(preset)).entrypoint).name == "iterative-rpo"  # what a worker does


def test_the_worked_example_is_under_80_lines() -> None:
    assert len((EXAMPLE / "iterative_rpo.py").read_text().splitlines()) < 80


def test_an_unknown_recipe_is_told_with_all_there_are(site: Path, tmp_path: Path) -> None:
    install(site, "mine", "mine = mine:mine")
    with pytest.raises(PresetError, match=r"recipe is 'ppo'; this version has: rest_em, .*, instruct_tuning, mine"):
        Recipe(preset_of(tmp_path, "ppo"))


def test_two_recipes_of_one_name_are_refused(site: Path, tmp_path: Path) -> None:
    install(site, "mine", "spin = mine:spin")
    with pytest.raises(PresetError, match=r"2 recipes are called 'spin': flows.spin:spin and mine:spin; rename one"):
        Recipe(preset_of(tmp_path, "spin"))


def test_a_recipe_that_cannot_be_imported_is_told_with_the_reason(site: Path, tmp_path: Path) -> None:
    install(site, "mine", "mine = broken_recipe:mine")
    (site / "broken_recipe.py").write_text("import a_library_that_is_not_there")
    told = r"'mine' \(broken_recipe:mine\) cannot be loaded: ModuleNotFoundError: No module named 'a_library"
    with pytest.raises(PresetError, match=told):
        Recipe(preset_of(tmp_path, "mine"))


def test_something_that_takes_no_settings_is_no_recipe(site: Path, tmp_path: Path) -> None:
    install(site, "mine", "mine = plain_recipe:mine")
    (site / "plain_recipe.py").write_text("def mine(config): ...")
    with pytest.raises(PresetError, match="'mine' is plain_recipe:mine, which is no recipe: a Prefect flow"):
        Recipe(preset_of(tmp_path, "mine"))
