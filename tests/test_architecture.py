"""Promises that hold for the repository as a whole; who may import whom is import-linter's to check."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flows.recipes import RECIPES, Recipe
from storage.datasets import DatasetRef
from tasks.caching import STEPS, step
from tasks.checking import faults
from tests.flows.builders import PRESETS, REPOSITORY

ALL_PRESETS = sorted(PRESETS.glob("*/*.yaml"))
NEED_GSM8K = [path for path in ALL_PRESETS if "hub: openai/gsm8k" in path.read_text()]
NEED_OPENHERMES = [path for path in ALL_PRESETS if "hub: teknium/OpenHermes-2.5" in path.read_text()]
NEED_ULTRACHAT = [path for path in ALL_PRESETS if "hub: HuggingFaceH4/ultrachat_200k" in path.read_text()]


@pytest.mark.parametrize("package", ["flows", "tasks", "models", "storage"])
def test_a_package_of_ours_is_the_one_in_this_repository(package: str) -> None:
    assert importlib.import_module(package).__path__ == [str(REPOSITORY / package)]


@pytest.mark.flow  # a process of its own
def test_importing_any_flow_or_the_command_loads_no_heavy_library() -> None:
    modules = ["flows.__main__", *(place.partition(":")[0] for place in RECIPES.values())]
    heavy = ("vllm", "torch", "trl", "transformers", "datasets", "accelerate", "peft", "matplotlib", "lm_eval", "dask")
    code = f"import sys, {', '.join(modules)}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"


def test_lm_eval_is_known_to_its_own_modules_only() -> None:
    files = [
        file for package in ("flows", "tasks", "models", "storage") for file in (REPOSITORY / package).glob("*.py")
    ]
    knowing = {file.stem for file in files if re.search(r"^\s*(from|import) lm_eval\b", file.read_text(), re.MULTILINE)}
    assert knowing == {"harness", "harness_model"}


def test_each_step_stands_under_its_own_name() -> None:
    assert {name: known.fn.__name__ for name, known in STEPS.items()} == {name: name for name in STEPS}
    assert {"load_prompts", "gather_rollouts", "score_answers", "train_sft", "decide_promotion"} <= set(STEPS)


def test_a_second_step_of_the_same_name_is_refused() -> None:
    def score_answers(scored: DatasetRef) -> DatasetRef:
        return scored

    with pytest.raises(ValueError, match="two steps are named 'score_answers'"):
        step(version="1")(score_answers)


def test_there_is_a_smoke_preset_for_each_recipe() -> None:
    assert {path.parent.name for path in ALL_PRESETS if path.name == "smoke.yaml"} == set(RECIPES)


@pytest.mark.parametrize("path", ALL_PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_preset_is_a_config_of_the_recipe_whose_folder_it_is_in(path: Path) -> None:
    config = Recipe(path).config
    assert config.recipe == path.parent.name


@pytest.mark.flow
@pytest.mark.parametrize("path", ALL_PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_preset_has_no_fault_where_its_data_is(
    path: Path, monkeypatch: pytest.MonkeyPatch, made_up_hub: Path
) -> None:
    if path in NEED_GSM8K:
        folder = os.environ.get("RATCHET_DATA") or str(REPOSITORY.parent / "shared" / "data")
        if not Path(folder, "gsm8k").is_dir():
            pytest.skip("GSM8K is not here; name the folder that holds it in RATCHET_DATA")
        monkeypatch.setenv("RATCHET_DATA", folder)
    if path in NEED_ULTRACHAT and not Path(os.environ.get("RATCHET_DATA", ""), "ultrachat_200k").is_dir():
        pytest.skip("UltraChat is not here; name the folder that holds it in RATCHET_DATA")
    if path in NEED_OPENHERMES and not Path(os.environ.get("RATCHET_DATA", ""), "teknium", "OpenHermes-2.5").is_dir():
        pytest.skip("OpenHermes and pairs are not here; name the folder that holds them in RATCHET_DATA")
    if "task: ifeval" in path.read_text():
        for library in ("immutabledict", "langdetect"):
            pytest.importorskip(library, reason=f"lm-eval's IFEval needs {library}")
    monkeypatch.chdir(REPOSITORY)
    assert faults(Recipe(path).config) == []
