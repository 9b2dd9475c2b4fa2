"""The `ratchet` command: reads a preset, checks it, runs the recipe's flow and prints what came out.

Exit codes: 0 done, 1 the run failed, 2 the configuration is wrong (and nothing was written), 3 the run halted until a
person has looked (a regression, suspect gold answers), 130 stopped by Ctrl-C.
"""

import contextlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from flows import exporting, inspecting, measuring, planning
from flows.console import (
    HomeOption,
    JsonOption,
    PresetArgument,
    SetOption,
    err,
    fail,
    name_home,
    out,
    print_json,
    use_home,
)
from flows.planning import checked_recipe
from flows.presets import PresetError, known_presets
from flows.recipes import Recipe
from flows.server import (
    ServerError,
    ServerInWaiting,
    announced,
    importing_prefect,
    point_prefect_at,
    private_server,
    private_worker,
    served_address,
    server_in_waiting,
    unwatched,
)
from flows.terminal import iteration_tables, published_table, yield_table
from flows.watching import Lines
from storage.experiments import Experiment
from storage.leases import LeaseLostError
from storage.stores import StoreError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

POOL = "ratchet"
PoolOption = Annotated[str, typer.Option(help="the work pool")]


@app.command()
def run(
    preset: PresetArgument,
    set_: SetOption = None,
    home_: HomeOption = None,
    no_prefect_server: Annotated[
        bool, typer.Option("--no-prefect-server", help="run without Prefect: nothing to watch, same results")
    ] = False,
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="let generated verifiers run where no sandbox can be had")
    ] = False,
    advance: Annotated[
        bool, typer.Option("--advance", help="end after the first iteration that has something to do")
    ] = False,
    let_pass: Annotated[bool, typer.Option("--go-on", help="let the regressions on record pass, for good")] = False,
) -> None:
    """Run an experiment, or continue it: what is done already is reused."""
    use_home(home_)
    if allow_unsandboxed:
        from tasks.sandbox import isolation

        isolation(allow_unsandboxed=True)  # of this process, whatever the preset says; rows tell what they ran in
    flags = [*(["--allow-unsandboxed"] if allow_unsandboxed else []), *(["--advance"] if advance else [])]
    again = _command(preset, set_, home_, flags)
    with _prefect(plainly=no_prefect_server) as prefect:
        recipe = checked_recipe(preset, set_)
        experiment = Experiment(recipe.config.experiment)
        if let_pass:
            passed = ", ".join(experiment.let_pass()) or "nothing: there is no regression on record"
            err.print(f"Let pass: {passed}", markup=False)
        _run_to_an_end(recipe, prefect, again, advance=advance)
    from tasks.tables import published_rows
    from tasks.yields import yields

    records = experiment.iterations()
    for table in iteration_tables(records):
        out.print(table)
    if figures := published_rows(experiment.config(), records):
        out.print(published_table(figures))
    if found := yields(experiment.config(), experiment.steps(run=experiment.state().run)):
        out.print(yield_table(found))
    out.print(f"Report: {experiment.folder / 'report.html'}", soft_wrap=True)


for inspect in (
    inspecting.status,
    inspecting.show,
    inspecting.report,
    inspecting.why,
    inspecting.trace,
    inspecting.gc,
):
    app.command()(inspect)
app.command()(planning.plan)
app.command()(exporting.export)
app.command()(measuring.evaluate)
app.command()(measuring.view_logprobs)


@app.command()
def doctor(home_: HomeOption = None, json_: JsonOption = False) -> None:
    """Whether this machine has what a run needs, each thing with what to do about it."""
    name_home(home_)
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
def deploy(
    presets: Annotated[list[Path] | None, typer.Argument(help="presets; none: all that come along")] = None,
    pool: PoolOption = POOL,
    at_once: Annotated[int, typer.Option(help="runs of a new pool at a time: one an accelerator", min=1)] = 1,
    cron: Annotated[
        str | None, typer.Option(help='when each does one more iteration, UTC; else "0 2 * * *", turned off')
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="run as Kubernetes jobs of this image, a GPU each; else in workers' processes")
    ] = None,
    yaml_: Annotated[bool, typer.Option("--yaml", help="print a prefect.yaml instead; nothing is deployed")] = False,
    home_: HomeOption = None,
) -> None:
    """Give the server that PREFECT_API_URL names a work pool, a deployment a preset and a watch for dead runs."""
    use_home(home_)
    with importing_prefect():
        from flows.deploying import deploy, prefect_yaml

    chosen = presets or known_presets()
    try:
        if yaml_:
            out.print(prefect_yaml(chosen, pool=pool), markup=False, highlight=False, soft_wrap=True, end="")
            return
        if "PREFECT_API_URL" not in os.environ:
            fail("PREFECT_API_URL is not set; name the server to deploy to, or try it with `ratchet ui --worker`", 2)
        for one in deploy(chosen, pool=pool, at_once=at_once, cron=cron, image=image):
            out.print(f"{'brought up to date' if one.existed else 'created':<19}{one.what:<11}{one.name}", markup=False)
    except PresetError as error:
        fail(str(error), 2)
    out.print(f"Start a worker where the accelerator is: prefect worker start --pool {pool} --limit 1", soft_wrap=True)


@app.command()
def ui(
    worker: Annotated[bool, typer.Option("--worker", help="deploy all presets, and run what is scheduled")] = False,
    port: Annotated[int | None, typer.Option(help="of the server; by default a free one")] = None,
    pool: PoolOption = POOL,
    home_: HomeOption = None,
) -> None:
    """Serve the Prefect UI over the home's own database until Ctrl-C; runs started meanwhile show up in it."""
    use_home(home_)
    with importing_prefect(), contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        stack.enter_context(_interrupted_by_signals())
        try:
            address = stack.enter_context(private_server(port))
        except ServerError as error:
            fail(str(error), 1)
        stack.enter_context(announced(address))
        if worker:
            from flows.deploying import deploy

            for _ in deploy(known_presets(), pool=pool, at_once=1, cron=None):
                pass
            stack.enter_context(private_worker(pool))
        at_work = f"; a worker runs what is scheduled in the pool {pool!r}" if worker else ""
        out.print(f"Prefect UI: {address}{at_work}  (Ctrl-C ends it)", soft_wrap=True)
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
    try:
        app()
    except (StoreError, LeaseLostError) as error:
        err.print(str(error), style="red", markup=False)
        sys.exit(1)


@contextlib.contextmanager
def _prefect(*, plainly: bool) -> Iterator[ServerInWaiting | str | None]:
    """What is to record a run: the API of a server that is up already, which is the user's or that of `ratchet ui` over
    this home; else a private server, which gets ready inside, while the preset is read and checked."""
    if plainly:
        yield None
    elif given := os.environ.get("PREFECT_API_URL"):
        yield given
    elif address := served_address():
        yield f"{address}/api"
    else:
        with server_in_waiting() as server:
            yield server


def _run_to_an_end(recipe: Recipe, prefect: ServerInWaiting | str | None, again: str, *, advance: bool) -> None:
    """Run the flow and show it; one that does not finish ends the command.

    Args:
        again: the command line that goes on with the run.
    """
    from tasks.recording import Halted, listening
    from tasks.serving import close_engines, stop, stopping

    stopping.clear()
    plain = f"{again} --no-prefect-server"
    go_on = plain if prefect is None else again
    with _interrupted_by_signals(stop), Lines(err) as lines, listening(lines):
        try:
            _run_flow(recipe, prefect, advance=advance)
        except KeyboardInterrupt:
            told = f"\nStopped. Nothing that was finished is lost; go on with:\n  {go_on}"
            err.print(told, style="bold", markup=False)
            raise typer.Exit(130) from None
        except ServerError as error:
            fail(f"{error}\nGo on without it: {plain}", 1)
        except Halted as halted:
            fail(f"The run halted: {halted}", 3)
        except Exception as error:  # the one place that turns a failed run into a message and an exit code
            logging.getLogger("ratchet").debug("the run failed", exc_info=True)
            fail(f"The run failed: {error}\nWhat is done is kept; go on with:\n  {go_on}", 1)
        finally:
            stopping.set()
            close_engines()


def _run_flow(recipe: Recipe, prefect: ServerInWaiting | str | None, *, advance: bool) -> None:
    if prefect is None:
        err.print("Running without a Prefect server: there is no UI to watch, the results are the same.")
        recipe.flow.fn(recipe.config, advance=advance)
        return
    from tasks.observing import settle, settle_dead_runs

    if isinstance(prefect, str):
        err.print(f"Prefect: {prefect}")
        point_prefect_at(prefect)
        settle_dead_runs(recipe.config.experiment, by_name=False)
        recipe.flow(recipe.config, advance=advance)
        return
    with prefect.serving() as address, unwatched():
        err.print(f"Prefect UI: {address}")
        settle_dead_runs(recipe.config.experiment, by_name=True)
        started = datetime.now(UTC)
        try:
            recipe.flow(recipe.config, advance=advance)
        finally:
            settle(started)


def _command(preset: Path, overrides: list[str] | None, folder: str | None, flags: list[str]) -> str:
    """The command line that continues this run."""
    options = [part for override in overrides or () for part in ("--set", override)]
    return shlex.join(["ratchet", "run", str(preset), *options, *(["--home", folder] if folder else []), *flags])


@contextlib.contextmanager
def _interrupted_by_signals(first: Callable[[], None] = lambda: None) -> Iterator[None]:
    """SIGTERM does as Ctrl-C, and both call something first."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        first()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
