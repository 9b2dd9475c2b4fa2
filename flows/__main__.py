"""The `ratchet` command: reads a preset, checks it, runs the recipe's flow and prints what came out.

Exit codes: 0 done, 1 the run failed, 2 the configuration is wrong (and nothing was written), 130 stopped by Ctrl-C.
"""

import contextlib
import importlib
import logging
import os
import shlex
import signal
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from flows import inspecting
from flows.console import HomeOption, JsonOption, err, fail, out, print_json, use_home
from flows.presets import Preset, PresetError
from flows.server import ServerError, configure_prefect, private_server
from flows.terminal import Lines, iteration_tables, plan_table, published_table
from storage.experiments import Experiment

# recipe -> module; each module has a config class and a flow, named here so that nothing heavy is imported to list them
RECIPES = {
    "rest_em": ("flows.rest_em", "RestEM", "rest_em"),
    "generator_evaluator": ("flows.generator_evaluator", "GeneratorEvaluator", "generator_evaluator"),
}
COMING = ("spin", "autoif", "instruct_tuning")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

PresetArgument = Annotated[Path, typer.Argument(help="a preset, for instance deployments/presets/rest_em/tiny.yaml")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="a.b=c, over the preset; may be given again")]


class Recipe:
    """A preset read into its recipe's config, with the flow that runs it."""

    def __init__(self, path: Path, overrides: list[str] | None) -> None:
        preset = Preset(path, overrides or ())
        if preset.recipe not in RECIPES:
            coming = " (it comes with a later version)" if preset.recipe in COMING else ""
            raise PresetError(f"{path}: recipe is {preset.recipe!r}{coming}; this version has: {', '.join(RECIPES)}")
        module_name, config_name, flow_name = RECIPES[preset.recipe]
        configure_prefect()
        with warnings.catch_warnings():  # Prefect would make its folder while it is imported; ours is made when needed
            warnings.filterwarnings("ignore", message="Failed to create the Prefect home")
            module = importlib.import_module(module_name)
        self.config = preset.config(getattr(module, config_name))
        self.flow = getattr(module, flow_name)


@app.command()
def run(
    preset: PresetArgument,
    set_: SetOption = None,
    home_: HomeOption = None,
    no_prefect_server: Annotated[
        bool, typer.Option(help="run without Prefect: nothing to watch, same results")
    ] = False,
) -> None:
    """Run an experiment, or continue it: what is done already is reused."""
    use_home(home_)
    recipe = _checked(preset, set_)
    from tasks.recording import listening
    from tasks.serving import close_engines, stopping

    stopping.clear()
    again = _command(preset, set_, home_)
    plain = f"{again} --no-prefect-server"
    go_on = plain if no_prefect_server else again
    experiment = Experiment(recipe.config.experiment)
    with _stopping_at_signals(), Lines(err) as lines, listening(lines):
        try:
            _run_flow(recipe, plainly=no_prefect_server)
        except KeyboardInterrupt:
            told = f"\nStopped. Nothing that was finished is lost; go on with:\n  {go_on}"
            err.print(told, style="bold", markup=False)
            raise typer.Exit(130) from None
        except ServerError as error:
            fail(f"{error}\nGo on without it: {plain}", 1)
        except Exception as error:  # the one place that turns a failed run into a message and an exit code
            logging.getLogger("ratchet").debug("the run failed", exc_info=True)
            fail(f"The run failed: {error}\nWhat is done is kept; go on with:\n  {go_on}", 1)
        finally:
            stopping.set()
            close_engines()
    from tasks.tables import published_rows

    records = experiment.iterations()
    for table in iteration_tables(records):
        out.print(table)
    if figures := published_rows(experiment.config(), records):
        out.print(published_table(figures))
    out.print(f"Report: {experiment.folder / 'report.html'}", soft_wrap=True)


@app.command()
def plan(preset: PresetArgument, set_: SetOption = None, home_: HomeOption = None, json_: JsonOption = False) -> None:
    """Check everything, show what would run and what is cached; no model is loaded and nothing is written."""
    use_home(home_)
    recipe = _checked(preset, set_)
    from tasks.checking import first_prompts
    from tasks.planning import planning

    with planning() as planned:
        recipe.flow.fn(recipe.config)
    prompts = first_prompts(recipe.config)
    if json_:
        steps = [step._asdict() for step in planned]
        print_json({"config": recipe.config.model_dump(mode="json"), "steps": steps, "first_prompts": prompts})
        return
    out.print(plan_table(planned))
    for label, text in prompts.items():
        out.print(f"\n[bold]First prompt, {label}[/bold]")
        out.print(text, markup=False)


for inspect in (
    inspecting.status,
    inspecting.show,
    inspecting.report,
    inspecting.why,
    inspecting.trace,
    inspecting.gc,
):
    app.command()(inspect)


@app.command()
def doctor(home_: HomeOption = None, json_: JsonOption = False) -> None:
    """Whether this machine has what a run needs, each thing with what to do about it."""
    use_home(home_)
    from flows.doctor import examine

    findings = examine()
    if json_:
        print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            out.print(f"[{'green' if finding.good else 'red'}]{'ok ' if finding.good else 'BAD'}[/] {finding.text}")
    if not all(finding.good for finding in findings):
        raise typer.Exit(1)


@app.command()
def ui(home_: HomeOption = None) -> None:
    """Serve the Prefect UI over the home's own database until Ctrl-C, to look at runs that have ended."""
    use_home(home_)
    configure_prefect()
    with contextlib.suppress(KeyboardInterrupt), private_server() as address:
        out.print(f"Prefect UI: {address}  (Ctrl-C ends it)")
        signal.pause()


def main() -> None:
    """Entry point of the console script."""
    terminal = logging.StreamHandler()
    terminal.setLevel(os.environ.get("RATCHET_LOG", "WARNING").upper())
    if terminal.level > logging.DEBUG:  # Prefect's UI has them, with their tracebacks; the command says it in a line
        terminal.addFilter(lambda record: not record.name.startswith("prefect"))
    logging.basicConfig(format="%(message)s", handlers=[terminal])
    logging.getLogger("ratchet").setLevel(
        min(logging.INFO, terminal.level)
    )  # Prefect's log gets more than the terminal
    app()


def _run_flow(recipe: Recipe, *, plainly: bool) -> None:
    given = os.environ.get("PREFECT_API_URL")
    if plainly:
        err.print("Running without a Prefect server: there is no UI to watch, the results are the same.")
        recipe.flow.fn(recipe.config)
        return
    from tasks.observing import settle, settle_dead_runs

    if given:
        err.print(f"Prefect: {given}")
        settle_dead_runs(recipe.config.experiment, by_name=False)
        recipe.flow(recipe.config)
        return
    with private_server() as address:
        err.print(f"Prefect UI: {address}")
        settle_dead_runs(recipe.config.experiment, by_name=True)
        started = datetime.now(UTC)
        try:
            recipe.flow(recipe.config)
        finally:
            settle(started)


def _checked(path: Path, overrides: list[str] | None) -> Recipe:
    try:
        recipe = Recipe(path, overrides)
        from tasks.checking import faults

        found = faults(recipe.config)
    except PresetError as error:
        fail(str(error), 2)
    if found:
        fail(f"{path} cannot be run:\n" + "\n".join(f"  {fault}" for fault in found), 2)
    return recipe


def _command(preset: Path, overrides: list[str] | None, folder: str | None) -> str:
    """The command line that continues this run."""
    options = [part for override in overrides or () for part in ("--set", override)]
    return shlex.join(["ratchet", "run", str(preset), *options, *(["--home", folder] if folder else [])])


@contextlib.contextmanager
def _stopping_at_signals() -> Iterator[None]:
    """Ctrl-C ends a run within seconds, whatever its shards and trainings are at, and SIGTERM does as Ctrl-C."""
    from tasks.serving import stop

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        stop()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
