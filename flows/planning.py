"""`ratchet plan`: all that can be known before a run. No model is loaded, no hub asked, nothing written."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from rich.table import Table

from flows.console import HomeOption, JsonOption, PresetArgument, SetOption, fail, out, print_json, use_home
from flows.presets import PresetError
from flows.recipes import Recipe
from storage.hub import staying_here

if TYPE_CHECKING:  # they import Prefect, which takes a second
    from tasks.estimating import Estimate
    from tasks.planning import PlannedStep
    from tasks.rehearsing import FirstPrompt

FIGURES = {
    "tokens_drawn": "tokens to sample",
    "tokens_trained": "tokens to train on",
    "seconds": "time",
    "bytes": "disk",
}


class Plan(NamedTuple):
    """What is known of a run before it begins."""

    config: dict[str, Any]  # every default filled in
    steps: "Sequence[PlannedStep]"
    estimate: "Estimate"
    first_prompts: "dict[str, FirstPrompt]"
    tokenizers: list[str]
    licences: list[str]
    to_download: list[str]

    def told(self) -> dict[str, Any]:
        """What programs are told."""
        steps = [
            {**step.told(), "estimate": one._asdict()}
            for step, one in zip(self.steps, self.estimate.steps, strict=True)
        ]
        estimate = {name: value for name, value in self.estimate._asdict().items() if name != "steps"}
        prompts = {stage: one._asdict() for stage, one in self.first_prompts.items()}
        return {**self._asdict(), "steps": steps, "estimate": estimate, "first_prompts": prompts}


def plan(preset: PresetArgument, set_: SetOption = None, home_: HomeOption = None, json_: JsonOption = False) -> None:
    """Check everything; show what would run, what is cached, what it takes and the first prompts. Writes nothing."""
    use_home(home_)
    with staying_here():
        made = make_plan(checked_recipe(preset, set_))
    if json_:
        print_json(made.told())
        return
    out.print(yaml.safe_dump(made.config, sort_keys=False, allow_unicode=True), markup=False, soft_wrap=True)
    out.print(plan_table(made))
    for line in plan_lines(made):
        out.print(line, markup=False, soft_wrap=True)


def checked_recipe(path: Path, overrides: list[str] | None) -> Recipe:
    """The preset's recipe; one with faults ends the command, and tells all of them."""
    try:
        return Recipe(path, overrides, _faults)
    except PresetError as error:
        fail(str(error), 2)


def make_plan(recipe: Recipe) -> Plan:
    """The plan of a recipe; call it where sources are read on this machine only."""
    from tasks import rehearsing
    from tasks.estimates import CHARACTERS_A_TOKEN
    from tasks.estimating import estimate
    from tasks.planning import planning

    with planning() as steps:
        recipe.flow.fn(recipe.config)
    base = rehearsing.built_base(steps)
    prompts = rehearsing.first_prompts(recipe.config, base)
    first = next(iter(prompts.values()))
    return Plan(
        config=recipe.config.model_dump(mode="json"),
        steps=steps,
        estimate=estimate(recipe.config, steps, float(first.tokens or len(first.text) / CHARACTERS_A_TOKEN)),
        first_prompts=prompts,
        tokenizers=rehearsing.tokenizer_checks(recipe.config, base),
        licences=rehearsing.licence_notices(recipe.config),
        to_download=rehearsing.not_at_hand(recipe.config),
    )


def plan_table(made: Plan) -> Table:
    """Each step that a run would take, by iteration: cached, or to be done and why.

    Steps in a row that differ in their figures alone, as a benchmark's tasks do, take one line.
    """
    cached_in_all = sum(step.cached for step in made.steps)
    table = Table(title=f"{cached_in_all} of {len(made.steps)} steps are cached", title_justify="left")
    for heading in ("iteration", "step", "state", "rows at most", "about", "reads"):
        table.add_column(heading, justify="right" if heading in ("rows at most", "about") else "left")
    both = zip(made.steps, made.estimate.steps, strict=True)
    for iteration, steps in groupby(both, key=lambda pair: pair[0].iteration):
        table.add_section()
        for (split, name, cached, why, reads), alike in groupby(steps, key=lambda pair: _line_of(pair[0])):
            group = list(alike)
            rows = [step.rows for step, _ in group if step.rows]
            seconds = [one.seconds for _, one in group if one.seconds is not None]
            table.add_row(
                "" if iteration is None else str(iteration),
                " ".join(filter(None, [split, name, f"x {len(group)}" if len(group) > 1 else ""])),
                "cached" if cached else f"runs: {why}",
                f"{sum(rows):,}" if rows else "",
                "" if cached else _told("seconds", sum(seconds) if len(seconds) == len(group) else None),
                reads,
                style="dim" if cached else None,
            )
    return table


def plan_lines(made: Plan) -> Iterator[str]:
    """What a plan tells beside its steps."""
    estimate = made.estimate
    yield "\nEstimate of what is left to do"
    for name, words in FIGURES.items():
        missing = estimate.unknown.get(name)
        known = _told(name, getattr(estimate, name)) if getattr(estimate, name) or not missing else ""
        more = f"not known of {missing} step{'s' if missing > 1 else ''}" if missing else ""
        yield f"  {words + ':':<20}{', '.join(filter(None, [known, more]))}  ({estimate.sources[name]})"
    for stage, prompt in made.first_prompts.items():
        size = f" ({prompt.tokens:,} tokens)" if prompt.tokens is not None else ""
        yield f"\nFirst prompt, {stage}{size}{f': {prompt.note}' if prompt.note else ''}"
        yield prompt.text
    for title, lines in (
        ("Tokenizers", made.tokenizers),
        ("Licences", made.licences),
        ("Not on this machine, so that their rows could not be looked at; a run downloads them", made.to_download),
    ):
        if lines:
            yield f"\n{title}"
            yield from (f"  {line}" for line in lines)


def _faults(config: Any) -> list[str]:
    from tasks.checking import faults
    from tasks.rehearsing import rehearsal_faults

    return faults(config) or rehearsal_faults(config)  # prompts are looked at once all else is sound


def _line_of(step: "PlannedStep") -> tuple[str | None, str, bool, str, str]:
    return step.split, step.step, step.cached, step.why, step.reads


def _told(figure: str, value: float | None) -> str:
    from tasks.estimates import told_bytes, told_seconds

    if value is None:
        return "not known"
    if figure == "seconds":
        return told_seconds(value)
    return told_bytes(value) if figure == "bytes" else f"{value:,.0f}"
