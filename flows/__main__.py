"""The `ratchet` command: reads a preset, checks it, runs the recipe's flow and prints what came out.

Exit codes: 0 done, 1 the run failed, 2 the configuration is wrong (and nothing was written), 130 stopped by Ctrl-C.
"""

import contextlib
import importlib
import json
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from flows.presets import Preset, PresetError
from flows.server import ServerError, configure_prefect, private_server
from flows.terminal import (
    Lines,
    garbage_lines,
    iteration_tables,
    plan_table,
    published_table,
    status_tables,
    trace_lines,
    why_lines,
)
from storage.datasets import DatasetError
from storage.experiments import Experiment, experiments
from storage.home import home

# recipe -> module; each module has a config class and a flow, named here so that nothing heavy is imported to list them
RECIPES = {
    "rest_em": ("flows.rest_em", "RestEM", "rest_em"),
    "generator_evaluator": ("flows.generator_evaluator", "GeneratorEvaluator", "generator_evaluator"),
}
COMING = ("spin", "autoif", "instruct_tuning")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
WIDTH = None if sys.stdout.isatty() else 140  # a log file is read in a wide window
out = Console(highlight=False, width=WIDTH)
err = Console(stderr=True, highlight=False, width=WIDTH, soft_wrap=True)

PresetArgument = Annotated[Path, typer.Argument(help="a preset, for instance deployments/presets/rest_em/tiny.yaml")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="a.b=c, over the preset; may be given again")]
HomeOption = Annotated[str | None, typer.Option("--home", help="where everything is kept; else RATCHET_HOME")]
JsonOption = Annotated[bool, typer.Option("--json", help="for programs")]
ExperimentOption = Annotated[str | None, typer.Option("--experiment", help="only this one")]


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
    _use_home(home_)
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
            _fail(f"{error}\nGo on without it: {plain}", 1)
        except Exception as error:  # the one place that turns a failed run into a message and an exit code
            logging.getLogger("ratchet").debug("the run failed", exc_info=True)
            _fail(f"The run failed: {error}\nWhat is done is kept; go on with:\n  {go_on}", 1)
        finally:
            stopping.set()
            close_engines()
    from tasks.reporting import published_rows

    records = experiment.iterations()
    for table in iteration_tables(records):
        out.print(table)
    if figures := published_rows(experiment.config(), records):
        out.print(published_table(figures))
    out.print(f"Report: {experiment.folder / 'report.html'}", soft_wrap=True)


@app.command()
def plan(preset: PresetArgument, set_: SetOption = None, home_: HomeOption = None, json_: JsonOption = False) -> None:
    """Check everything, show what would run and what is cached; no model is loaded and nothing is written."""
    _use_home(home_)
    recipe = _checked(preset, set_)
    from tasks.checking import first_prompts
    from tasks.planning import planning

    with planning() as planned:
        recipe.flow.fn(recipe.config)
    prompts = first_prompts(recipe.config)
    if json_:
        steps = [step._asdict() for step in planned]
        _print_json({"config": recipe.config.model_dump(mode="json"), "steps": steps, "first_prompts": prompts})
        return
    out.print(plan_table(planned))
    for label, text in prompts.items():
        out.print(f"\n[bold]First prompt, {label}[/bold]")
        out.print(text, markup=False)


@app.command()
def status(
    experiment: Annotated[str | None, typer.Argument(help="only this one")] = None,
    home_: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """Where the experiments of the home stand."""
    _use_home(home_)
    found = [_experiment(experiment)] if experiment else experiments()
    if json_:
        from tasks.reporting import facts

        _print_json([facts(one) for one in found])
        return
    if not found:
        out.print(f"no experiment in {home()} yet; start one with: ratchet run PRESET")
    for one in found:
        for table in status_tables(one):
            out.print(table)


@app.command()
def show(
    reference: Annotated[
        str, typer.Argument(help="datasets/<step>/<digest>, models/<digest>, or a digest's beginning")
    ],
    rows: Annotated[int, typer.Option("--rows", "-n", help="how many rows")] = 3,
    home_: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """What a data set or a model is, where it came from, and its first rows."""
    _use_home(home_)
    from tasks.showing import describe

    try:
        described = describe(reference, rows)
    except (DatasetError, ValueError) as error:
        _fail(str(error), 2)
    if json_:
        _print_json(described)
    else:
        out.print_json(json.dumps(described, ensure_ascii=False))


@app.command()
def why(
    step: Annotated[str, typer.Argument(help="a step as `ratchet status` lists it, for instance train_sft")],
    experiment: ExperimentOption = None,
    iteration: Annotated[
        int | None, typer.Option(help="only this one; else all that its last run went through")
    ] = None,
    home_: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """Why a step ran or was reused: which part of its key changed between its last two runs."""
    _use_home(home_)
    from tasks.explaining import explain

    try:
        explained = explain(step, experiment, iteration)
    except ValueError as error:
        _fail(str(error), 2)
    if json_:
        _print_json([one.model_dump(mode="json") for one in explained])
        return
    for line in why_lines(explained):
        out.print(line, markup=False, soft_wrap=True)


@app.command()
def trace(
    row: Annotated[str, typer.Argument(help="a prompt_id or its beginning; with /3 behind it, its rollout 3 only")],
    experiment: ExperimentOption = None,
    home_: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """Follow a row: prompt, rollouts, verdicts, what was learnt from it, which policy came of that, evaluation."""
    _use_home(home_)
    from tasks.tracing import trace as follow

    try:
        followed = follow(row, experiment)
    except ValueError as error:
        _fail(str(error), 2)
    if json_:
        _print_json(followed.model_dump(mode="json"))
        return
    for line in trace_lines(followed):
        out.print(line, markup=False, soft_wrap=True)


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="remove it; else it is only listed")] = False,
    older_than: Annotated[float, typer.Option(min=0, metavar="DAYS", help="leave alone what is younger")] = 7.0,
    home_: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """List, or remove, what no experiment refers to any more."""
    _use_home(home_)
    from storage.collecting import collect_garbage
    from storage.locks import LockedError

    try:
        found = collect_garbage(older_than_days=older_than, delete=delete)
    except LockedError as error:
        _fail(f"Nothing was removed: {error}", 1)
    if json_:
        _print_json({"deleted": delete, "garbage": [garbage._asdict() for garbage in found]})
        return
    for line in garbage_lines(found, deleted=delete, older_than_days=older_than):
        out.print(line, markup=False, soft_wrap=True)


@app.command()
def report(experiment: str, home_: HomeOption = None) -> None:
    """Write an experiment's HTML and JSON report again, from what is stored, and say where it is."""
    _use_home(home_)
    from tasks.reporting import write_report

    out.print(str(write_report(_experiment(experiment))))


@app.command()
def doctor(home_: HomeOption = None, json_: JsonOption = False) -> None:
    """Whether this machine has what a run needs, each thing with what to do about it."""
    _use_home(home_)
    from flows.doctor import examine

    findings = examine()
    if json_:
        _print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            out.print(f"[{'green' if finding.good else 'red'}]{'ok ' if finding.good else 'BAD'}[/] {finding.text}")
    if not all(finding.good for finding in findings):
        raise typer.Exit(1)


@app.command()
def ui(home_: HomeOption = None) -> None:
    """Serve the Prefect UI over the home's own database until Ctrl-C, to look at runs that have ended."""
    _use_home(home_)
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
        _fail(str(error), 2)
    if found:
        _fail(f"{path} cannot be run:\n" + "\n".join(f"  {fault}" for fault in found), 2)
    return recipe


def _experiment(name: str) -> Experiment:
    known = [one.name for one in experiments()]
    if name not in known:
        _fail(f"there is no experiment {name!r} in {home()}; there are: {', '.join(known) or 'none yet'}", 2)
    return Experiment(name)


def _command(preset: Path, overrides: list[str] | None, folder: str | None) -> str:
    """The command line that continues this run."""
    options = [part for override in overrides or () for part in ("--set", override)]
    return shlex.join(["ratchet", "run", str(preset), *options, *(["--home", folder] if folder else [])])


def _use_home(folder: str | None) -> None:
    if folder is not None:
        os.environ["RATCHET_HOME"] = folder


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


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _fail(message: str, code: int) -> NoReturn:
    err.print(message, style="red", markup=False)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
