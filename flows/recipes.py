"""The recipes there are, and a preset read into the config and the flow of its own."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flows.presets import Preset, PresetError
from flows.server import importing_prefect

# recipe -> module; each module has a config class and a flow, named here so that nothing heavy is imported to list them
RECIPES = {
    "rest_em": ("flows.rest_em", "RestEM", "rest_em"),
    "generator_evaluator": ("flows.generator_evaluator", "GeneratorEvaluator", "generator_evaluator"),
    "spin": ("flows.spin", "Spin", "spin"),
    "autoif": ("flows.autoif", "AutoIF", "autoif"),
    "instruct_tuning": ("flows.instruct_tuning", "InstructTuning", "instruct_tuning"),
}


class Recipe:
    """A preset read into its recipe's config, with the flow that runs it."""

    def __init__(
        self,
        path: Path,
        overrides: list[str] | None = None,
        faults_of: Callable[[Any], Sequence[str]] = lambda _: (),
    ) -> None:
        preset = Preset(path, overrides or ())
        if preset.recipe not in RECIPES:
            told = f"recipe is {preset.recipe!r}; this version has: {', '.join(RECIPES)}"
            raise PresetError(f"{path} cannot be used:\n  {preset.located(told)}")
        module_name, config_name, flow_name = RECIPES[preset.recipe]
        with importing_prefect():
            module = importlib.import_module(module_name)
        self.values: dict[str, Any] = preset.values  # as written
        self.config = preset.config(getattr(module, config_name), faults_of)
        self.flow = getattr(module, flow_name)
        self.entrypoint = f"{module_name}.{flow_name}"
