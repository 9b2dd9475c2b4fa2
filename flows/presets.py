"""Presets: YAML that holds values only, read into a recipe's config with every error named by key and line."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

BRANCHES = {
    "vllm",
    "openai",
    "fake",
    "scripted",
    "tiny",
    "judging",
    "model",
    "labels",
    "likelihood",
    "pairwise",
    "scores",
    "reward",
}  # of our unions; part of pydantic's locations, not of the file
UNIONS = {"engine", "base", "asks"}  # the sections that are unions
C = TypeVar("C", bound=BaseModel)
Lines = dict[tuple[str | int, ...], int]


class PresetError(ValueError):
    """The preset cannot be used; the message lists every fault."""


class Preset:
    """A preset as written, with the overrides of the command line in place."""

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        self.path = path
        if not path.is_file():
            raise PresetError(f"there is no preset {str(path)!r}; those that come along: {', '.join(_known_presets())}")
        try:
            text = path.read_text(encoding="utf-8")
            self.values = yaml.safe_load(text)
            self.lines: Lines = dict(_lines(yaml.compose(text)))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise PresetError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(self.values, dict):
            raise PresetError(
                f"{path} holds {type(self.values).__name__}; expected keys and values, as `recipe: rest_em`"
            )
        for override in overrides:
            self._override(override)

    @property
    def recipe(self) -> str:
        """The recipe this preset is for."""
        return str(self.values.get("recipe", ""))

    def config(self, config_class: type[C]) -> C:
        """The recipe's config.

        Raises:
            PresetError: names each key at fault, its line, what is wrong and, for a misspelt one, what may be meant.
        """
        try:
            return config_class.model_validate(self.values)
        except ValidationError as error:
            faults = [self._fault(dict(fault), config_class) for fault in error.errors()]
            raise PresetError(f"{self.path} cannot be used:\n" + "\n".join(f"  {fault}" for fault in faults)) from error

    def _override(self, override: str) -> None:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise PresetError(f"--set {override!r} is no a.b=c; for instance --set sft.learning_rate=1e-4")
        *parents, last = name.split(".")
        place = self.values
        for parent in parents:
            place = place.setdefault(parent, {}) if isinstance(place, dict) else None
            if not isinstance(place, dict):
                raise PresetError(
                    f"--set {override!r}: {parent!r} of {name!r} is a value in {self.path}, not a section"
                )
        try:
            place[last] = _scalar(text)
        except yaml.YAMLError as error:
            raise PresetError(f"--set {override!r}: {text!r} is no YAML: {' '.join(str(error).split())}") from error

    def _fault(self, fault: dict[str, Any], config_class: type[BaseModel]) -> str:
        location = _in_the_file(fault["loc"])
        key = ".".join(map(str, location)) or "(the whole preset)"
        line = next((self.lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in self.lines), None)
        where = f"line {line}: {key}" if line else key
        if fault["type"] == "extra_forbidden":
            return f"{where}: there is no such key{_suggestion(str(location[-1]), fault['loc'], config_class)}"
        if fault["type"] == "missing":
            return f"{where}: is missing; add it"
        found = "" if isinstance(fault["input"], dict) else f"; found {fault['input']!r}"
        return f"{where}: {fault['msg'].removeprefix('Value error, ')}{found}"


def _scalar(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _lines(node: yaml.Node | None, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {key.value!r} stands there twice")
            seen.add(key.value)
            yield (*path, key.value), key.start_mark.line + 1
            yield from _lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*path, number), value.start_mark.line + 1
            yield from _lines(value, (*path, number))


def _in_the_file(location: Sequence[str | int]) -> tuple[str | int, ...]:
    """A location without the name of a union's branch, which pydantic puts after the section's."""
    kept: list[str | int] = []
    for n, part in enumerate(location):
        if n and part in BRANCHES and location[n - 1] in UNIONS:
            continue
        kept.append(part)
    return tuple(kept)


def _suggestion(key: str, location: Sequence[str | int], config_class: type[BaseModel]) -> str:
    known = _fields_at(location[:-1], config_class)
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(sorted(known))}" if known else ""


def _fields_at(location: Sequence[str | int], config_class: type[BaseModel]) -> list[str]:
    models: list[type[BaseModel]] = [config_class]
    for part in location:
        if isinstance(part, int):
            continue
        if part in BRANCHES and not any(part in model.model_fields for model in models):
            models = [model for model in models if part in model.__name__.lower()]  # "fake" -> Fake, "tiny" -> TinyBase
            continue
        annotations = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        models = [found for annotation in annotations for found in _models_in(annotation)]
    return [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _models_in(part)]


def _known_presets() -> list[str]:
    folder = Path(__file__).parents[1] / "deployments" / "presets"
    return sorted(str(path.relative_to(folder.parents[1])) for path in folder.glob("*/*.yaml"))
