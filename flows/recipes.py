"""The recipes there are, ours and those of packages, and a preset read into the config and the flow of its own."""

from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel

from flows.presets import Preset, PresetError
from flows.server import importing_prefect

# recipe -> module:flow, named here so that nothing heavy is imported to list them
RECIPES = {
    "rest_em": "flows.rest_em:rest_em",
    "generator_evaluator": "flows.generator_evaluator:generator_evaluator",
    "spin": "flows.spin:spin",
    "autoif": "flows.autoif:autoif",
    "instruct_tuning": "flows.instruct_tuning:instruct_tuning",
}
GROUP = "ratchet.recipes"  # entry points by which other packages bring recipes of their own (docs/new-recipe.md)


class Recipe:
    """A preset read into its recipe's config, with the flow that runs it."""

    def __init__(
        self,
        path: Path,
        overrides: list[str] | None = None,
        faults_of: Callable[[Any], Sequence[str]] = lambda _: (),
    ) -> None:
        preset = Preset(path, overrides or ())
        found = _recipe_of(preset)
        try:
            with importing_prefect():
                self.flow = found.load()
        except Exception as error:  # whatever a module of someone else's raises
            told = f"the recipe {preset.recipe!r} ({found.value}) cannot be loaded: {type(error).__name__}: {error}"
            raise PresetError(f"{path}: {told}") from error
        self.values: dict[str, Any] = preset.values  # as written
        self.config: Any = preset.config(_config_class(found, self.flow), faults_of)
        self.entrypoint = f"{found.module}.{found.attr}"


def _recipe_of(preset: Preset) -> EntryPoint:
    name = preset.recipe
    known = [EntryPoint(ours, place, GROUP) for ours, place in RECIPES.items()] + list(entry_points(group=GROUP))
    found = [one for one in known if one.name == name]
    if not found:
        names = ", ".join(dict.fromkeys(one.name for one in known))
        told = preset.located(f"recipe is {name!r}; this version has: {names}")
        raise PresetError(f"{preset.path} cannot be used:\n  {told}")
    if len(found) > 1:
        places = " and ".join(one.value for one in found)
        raise PresetError(
            f"{preset.path}: {len(found)} recipes are called {name!r}: {places}; rename one, or uninstall it"
        )
    return found[0]


def _config_class(found: EntryPoint, flow: Any) -> type[BaseModel]:
    """The settings that a flow takes, by the annotation of its first parameter."""
    hint = get_type_hints(getattr(flow, "fn", object)).get("config")
    if not (isinstance(hint, type) and issubclass(hint, BaseModel)):
        told = "a Prefect flow was expected whose first parameter is `config`, annotated with a settings class"
        raise PresetError(f"the recipe {found.name!r} is {found.value}, which is no recipe: {told}")
    return hint
