"""The sub-commands that look at what is stored: status, show, report, why, trace, gc. None runs or trains anything."""

import json
from typing import Annotated

import typer

from flows.console import HomeOption, JsonOption, fail, out, print_json, use_home
from flows.telling import garbage_lines, trace_lines, why_lines
from flows.terminal import status_tables
from storage.datasets import DatasetError
from storage.experiments import Experiment, experiments
from storage.home import home_name

ExperimentOption = Annotated[str | None, typer.Option("--experiment", help="only this one")]


def status(
    experiment: Annotated[str | None, typer.Argument(help="only this one")] = None,
    home_: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """Where the experiments of the home stand."""
    use_home(home_)
    found = [experiment_named(experiment)] if experiment else experiments()
    if json_:
        from tasks.reporting import facts

        print_json([facts(one) for one in found])
        return
    if not found:
        out.print(f"no experiment in {home_name()} yet; start one with: ratchet run PRESET")
    for one in found:
        for table in status_tables(one):
            out.print(table)


def show(
    reference: Annotated[
        str, typer.Argument(help="datasets/<step>/<digest>, models/<digest>, or a digest's beginning")
    ],
    rows: Annotated[int, typer.Option("--rows", "-n", help="how many rows")] = 3,
    home_: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """What a data set or a model is, where it came from, and its first rows."""
    use_home(home_)
    from tasks.showing import describe

    try:
        described = describe(reference, rows)
    except (DatasetError, ValueError) as error:
        fail(str(error), 2)
    if json_:
        print_json(described)
    else:
        out.print_json(json.dumps(described, ensure_ascii=False))


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
    use_home(home_)
    from tasks.explaining import explain

    try:
        explained = explain(step, experiment, iteration)
    except ValueError as error:
        fail(str(error), 2)
    if json_:
        print_json([one.model_dump(mode="json") for one in explained])
        return
    for line in why_lines(explained):
        out.print(line, markup=False, soft_wrap=True)


def trace(
    row: Annotated[str, typer.Argument(help="a prompt_id or its beginning; with /3 behind it, its rollout 3 only")],
    experiment: ExperimentOption = None,
    home_: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """Follow a row: prompt, rollouts, verdicts, what was learnt from it, which policy came of that, evaluation."""
    use_home(home_)
    from tasks.tracing import trace as follow

    try:
        followed = follow(row, experiment)
    except ValueError as error:
        fail(str(error), 2)
    if json_:
        print_json(followed.model_dump(mode="json"))
        return
    for line in trace_lines(followed):
        out.print(line, markup=False, soft_wrap=True)


def gc(
    delete: Annotated[bool, typer.Option("--delete", help="remove it; else it is only listed")] = False,
    older_than: Annotated[float, typer.Option(min=0, metavar="DAYS", help="leave alone what is younger")] = 7.0,
    home_: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """List, or remove, what no experiment refers to any more."""
    use_home(home_)
    from storage.collecting import collect_garbage
    from storage.locks import LockedError

    try:
        found = collect_garbage(older_than_days=older_than, delete=delete)
    except LockedError as error:
        fail(f"Nothing was removed: {error}", 1)
    if json_:
        print_json({"deleted": delete, "garbage": [garbage._asdict() for garbage in found]})
        return
    for line in garbage_lines(found, deleted=delete, older_than_days=older_than):
        out.print(line, markup=False, soft_wrap=True)


def report(experiment: str, home_: HomeOption = None) -> None:
    """Write an experiment's HTML and JSON report again, from what is stored, and say where it is."""
    use_home(home_)
    from tasks.reporting import write_report

    out.print(str(write_report(experiment_named(experiment))))


def experiment_named(name: str) -> Experiment:
    """The experiment of this name in the home; without one, the command fails and lists those there are."""
    known = [one.name for one in experiments()]
    if name not in known:
        fail(f"there is no experiment {name!r} in {home_name()}; there are: {', '.join(known) or 'none yet'}", 2)
    return Experiment(name)
