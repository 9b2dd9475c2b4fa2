"""The sub-commands that put stored policies to work outside a run: evaluate, view-logprobs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flows.console import HomeOption, JsonOption, err, fail, out, print_json, use_home
from flows.presets import Preset, PresetError
from flows.server import importing_prefect
from flows.watching import Lines
from models.engine import EngineError
from models.specs import EngineSettings, ModelRef, PromptTemplate, Settings
from storage.datasets import DatasetError, read_manifest, read_rows
from storage.rows import BenchmarkMetric
from tasks.benchmarks import Benchmark, Benchmarks

SETTINGS = ("engine", "template", "benchmarks")  # what is taken from a preset, whatever its recipe

PolicyOption = Annotated[
    str, typer.Option("--policy", help="an experiment, experiment:<iteration>, a digest, a folder or a hub name")
]


class Measuring(Settings):
    """What a policy is measured with; every preset has it, and a file of these sections alone will do."""

    engine: EngineSettings
    template: PromptTemplate = PromptTemplate()
    benchmarks: Benchmarks | None = None


def evaluate(
    preset: Annotated[Path, typer.Argument(help="a preset: its engine, template and benchmarks are used")],
    policy: PolicyOption,
    task: Annotated[list[str] | None, typer.Option(help="this benchmark instead; may be given again")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="so many documents of each task only")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="a.b=c, over the preset")] = None,
    home_: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """Put a policy through benchmarks with lm-eval; what is answered already is reused."""
    use_home(home_)
    settings = read_measuring(preset, set_, task, limit)
    if settings.benchmarks is None:
        fail(f"{preset} has no `benchmarks` section; add one, or name benchmarks with --task", 2)
    with importing_prefect():
        from tasks.benchmarking import benchmark_faults, evaluate_benchmarks
    if faults := benchmark_faults(settings.benchmarks):
        fail("\n".join(faults), 2)
    named = named_policy(policy)
    with _working("The evaluation"):
        metrics = evaluate_benchmarks(named, settings.template, settings.benchmarks, settings.engine)
    rows = list(read_rows(metrics, BenchmarkMetric))
    samples = [parent.name for parent in read_manifest(metrics).parents]
    if json_:
        print_json({"metrics": metrics.name, "samples": samples, "rows": [asdict(row) for row in rows]})
        return
    out.print(benchmark_table(rows))
    for note in dict.fromkeys(row.note for row in rows if row.note):
        out.print(f"Note: {note}", soft_wrap=True)
    out.print(f"Figures: {metrics.name}\nAnswers: {', '.join(samples)}", soft_wrap=True)


@contextmanager
def _working(what: str) -> Iterator[None]:
    """Show steps as they end, close the engines at the end, and turn what may go wrong into a message."""
    from models.ifeval_libraries import BenchmarkError
    from tasks.recording import listening
    from tasks.serving import close_engines, stopping

    stopping.clear()
    with Lines(err) as lines, listening(lines):
        try:
            yield
        except KeyboardInterrupt:
            err.print("\nStopped; run the same command again to go on.", style="bold")
            raise typer.Exit(130) from None
        except (BenchmarkError, DatasetError, EngineError, ValueError, OSError) as error:
            fail(f"{what} failed: {error}\nWhat is done is kept; run the same command again to go on.", 1)
        finally:
            stopping.set()
            close_engines()


def read_measuring(
    preset: Path, overrides: list[str] | None, tasks: list[str] | None = None, limit: int | None = None
) -> Measuring:
    """The measuring sections of a preset, with the command line's benchmarks in their place."""
    try:
        read = Preset(preset, overrides or ())
        read.values = {name: value for name, value in read.values.items() if name in SETTINGS}
        if tasks:
            read.values["benchmarks"] = {"tasks": [{"task": name} for name in tasks]}
        settings = read.config(Measuring)
    except PresetError as error:
        fail(str(error), 2)
    if limit is None or settings.benchmarks is None:
        return settings
    limited: tuple[Benchmark, ...] = tuple(one.model_copy(update={"limit": limit}) for one in settings.benchmarks.tasks)
    return settings.model_copy(update={"benchmarks": Benchmarks(tasks=limited)})


def named_policy(reference: str) -> ModelRef:
    """The policy a user names; without one, the command fails and says what can be named."""
    from tasks.policies import policy_named

    try:
        return policy_named(reference)
    except (ValueError, DatasetError) as error:
        fail(str(error), 2)


def benchmark_table(rows: list[BenchmarkMetric]) -> Table:
    """The figures of whole benchmarks; those of a group's tasks are in the data set."""
    table = Table(title="Benchmarks, % (95 % interval)", title_justify="left")
    for heading in ("benchmark", "metric", "value", "n", "shots", "prompt"):
        table.add_column(heading, justify="right" if heading in ("value", "n", "shots") else "left", no_wrap=True)
    for row in rows:
        if row.task == row.benchmark:
            metric = row.metric if row.filter == "none" else f"{row.metric}, {row.filter}"
            value = f"{100 * row.value:.1f} ({100 * row.low:.1f} - {100 * row.high:.1f})"
            table.add_row(row.benchmark, metric, value, count_of(row), str(row.shots), row.rendering)
    return table


def count_of(row: BenchmarkMetric) -> str:
    """How many documents a figure is of, as a limit must be told."""
    cut = f", {row.cut_prompts} cut" if row.cut_prompts else ""
    return (f"{row.n:,}" if row.n == row.documents else f"{row.n:,} of {row.documents:,}") + cut


def view_logprobs(
    preset: Annotated[Path, typer.Argument(help="a preset: its engine and template are used")],
    rows: Annotated[str, typer.Argument(help="rollouts, demonstrations or pairs: datasets/<step>/<digest>")],
    policy: PolicyOption,
    reference: Annotated[
        str, typer.Option("--reference", help="the policy it is compared with, named in the same way")
    ],
    row: Annotated[
        list[str] | None, typer.Option(help="a prompt_id's beginning, /3 for its rollout 3; again for more")
    ] = None,
    first: Annotated[int, typer.Option("--first", "-n", min=1, help="so many rows, where none is named")] = 8,
    page: Annotated[Path | None, typer.Option("--out", help="where the page goes; else into the home's views")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="a.b=c, over the preset")] = None,
    home_: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """Show, as an HTML page, how much likelier each token of some rows is under one policy than under another."""
    use_home(home_)
    settings = read_measuring(preset, set_)
    from tasks.showing import dataset_named
    from tasks.token_pages import write_page

    with importing_prefect():
        from tasks.viewing import Choice, view_logprobs
    choice, policies = Choice(rows=tuple(row or ()), first=first), (named_policy(policy), named_policy(reference))
    with _working("The view"):
        compared = view_logprobs(*policies, dataset_named(rows), choice, settings.template, settings.engine)
        written = write_page(compared, policy, reference, page)
    if json_:
        print_json({"page": str(written), "tokens": compared.name, "rows": compared.rows})
        return
    out.print(f"Page: {written}\nNumbers: {compared.name}, {compared.rows:,} tokens", soft_wrap=True)
