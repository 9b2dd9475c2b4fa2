"""Presets: YAML that holds values only, read into a recipe's config with every error named by key and line."""

import copy
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
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
Location = tuple[str | int, ...]
Lines = dict[Location, int]
STAND_INS: tuple[Any, ...] = (1, "stand-in", {})  # for what is required and wrong, to find out what else is wrong
MENDINGS = 12  # tries to make a preset valid, to look at the rest of it
_KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w+|\[\d+\])*")


REPOSITORY = Path(__file__).parents[1]


class PresetError(ValueError):
    """The preset cannot be used; the message lists every fault."""


class Preset:
    """A preset as written, with the overrides of the command line in place."""

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        self.path = path
        if not path.is_file():
            known = ", ".join(str(one.relative_to(REPOSITORY)) for one in known_presets())
            raise PresetError(f"there is no preset {str(path)!r}; those that come along: {known}")
        try:
            text = path.read_text(encoding="utf-8")
            self.values = yaml.safe_load(text)
            self.lines: Lines = dict(_lines(yaml.compose(text)))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise PresetError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(self.values, dict):
            raise PresetError(f"{path} holds {_kind_of(self.values)}; expected keys and values, as `recipe: rest_em`")
        for override in overrides:
            self._override(override)

    @property
    def recipe(self) -> str:
        """The recipe this preset is for."""
        return str(self.values.get("recipe", ""))

    def config(self, config_class: type[C], faults_of: Callable[[C], Sequence[str]] = lambda _: ()) -> C:
        """The recipe's config.

        Args:
            faults_of: finds more faults of a config, each in words after its key; also called, as far as that goes,
                where a key is wrong, so that all is told at once.
        Raises:
            PresetError: names each key at fault, its line, what is wrong and, for a misspelt one, what may be meant.
        """
        config, mended, found = self._mended(config_class)
        if config is not None:
            found += [self.located(fault) for fault in faults_of(config) if not _is_about(fault, mended)]
        if found or config is None:
            raise PresetError(f"{self.path} cannot be used:\n" + "\n".join(f"  {fault}" for fault in found))
        return config

    def _mended(self, config_class: type[C]) -> tuple[C | None, set[Location], list[str]]:
        """The config, with what is wrong left out or replaced; the places of that, and every fault."""
        values, mended, found = copy.deepcopy(self.values), set[Location](), list[str]()
        for attempt in range(MENDINGS):
            try:
                return config_class.model_validate(values), mended, found
            except ValidationError as error:
                for detail in error.errors():
                    fault: dict[str, Any] = dict(detail)
                    location = self._place(fault)
                    follows = attempt and _is_about(fault["msg"], mended)
                    if location not in mended and not follows:
                        found.append(self._fault(fault, config_class))
                    mended.add(location)
                    _mend(values, location, STAND_INS[attempt % len(STAND_INS)])
        return None, mended, found

    def located(self, fault: str) -> str:
        """The fault behind the line of the key that it begins with."""
        key = _KEY.match(fault)
        line = self._line(_location(key.group())) if key else None
        return fault if line is None else f"line {line}: {fault}"

    def _line(self, location: Location) -> int | None:
        """The line of a key, or else of the nearest section around it that is written out."""
        return next((self.lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in self.lines), None)

    def _place(self, fault: dict[str, Any]) -> Location:
        """Where a fault is: of a rule between the keys of a section, the first of them that the message names."""
        section = _in_the_file(fault["loc"])
        if fault["type"] != "value_error":
            return section
        told = fault["msg"].removeprefix("Value error, ")
        inside = [place for place in self.lines if place[: len(section)] == section and place != section]
        for word in _KEY.findall(told):
            wanted = _location(word)
            if found := [place for place in inside if place[-len(wanted) :] == wanted]:
                return min(found, key=len)
        return section

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
        told, line = fault["msg"].removeprefix("Value error, "), self._line(self._place(fault))
        where = f"line {line}: {key}" if line else key
        if fault["type"] == "extra_forbidden":
            return f"{where}: there is no such key{_suggestion(str(location[-1]), fault['loc'], config_class)}"
        if fault["type"] == "missing":
            return f"{where}: is missing; add it"
        found = "" if isinstance(fault["input"], dict) else f"; found {fault['input']!r}"
        return f"{where}: {told}{found}"


def known_presets() -> list[Path]:
    """The presets that come along."""
    return sorted((REPOSITORY / "deployments" / "presets").glob("*/*.yaml"))


def _kind_of(values: object) -> str:
    return "nothing" if values is None else type(values).__name__


def _scalar(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _lines(node: yaml.Node | None, path: Location = ()) -> Iterator[tuple[Location, int]]:
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


def _in_the_file(location: Sequence[str | int]) -> Location:
    """A location without the name of a union's branch, which pydantic puts after the section's."""
    kept: list[str | int] = []
    for n, part in enumerate(location):
        if n and part in BRANCHES and location[n - 1] in UNIONS:
            continue
        kept.append(part)
    return tuple(kept)


def _location(key: str) -> Location:
    """ "evaluation.test[0].sampling" -> ("evaluation", "test", 0, "sampling")."""
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"\w+", key))


def _mend(values: Any, location: Location, stand_in: Any) -> None:
    """Take a value away; where there is none, put another in its place."""
    if not location:
        return
    *parents, last = location
    try:
        for part in parents:
            values = values[part]
        if isinstance(values, dict) and last not in values:
            values[last] = copy.deepcopy(stand_in)
        else:
            del values[last]
    except (KeyError, IndexError, TypeError):  # the place is gone, or inside of what is no section
        return


def _is_about(fault: str, mended: set[Location]) -> bool:
    """Whether a fault may come of what was left out or put in for a key."""
    words = set(re.findall(r"\w+", fault))
    return any(str(location[-1]) in words for location in mended if location)


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
