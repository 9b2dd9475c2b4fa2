"""An experiment's records and data sets -> HTML, JSON and Prefect artifacts. Everything is read from the home."""

import io
import json
import textwrap
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from storage.committing import put_file
from storage.datasets import DatasetError, DatasetRef, read_rows
from storage.experiments import Experiment, IterationRecord
from storage.rows import ScoredRollout
from tasks.observing import publish_markdown
from tasks.planning import current_plan
from tasks.tables import calibration_table, held_out_losses, pair_table, published_rows, training_metrics
from tasks.yields import yields

SAMPLES_OF_A_KIND = 2
LABEL_WIDTH = 16  # characters of a policy's label in a plot, in a line
KINDS = {1.0: "right", 0.0: "wrong", None: "undecided"}


class Sample(NamedTuple):
    """A rollout shown in the report."""

    label: str
    kind: str
    row: ScoredRollout


def write_report(experiment: Experiment) -> Path:
    """Write report.html and report.json into the experiment's folder; the path of the former."""
    html = experiment.folder / "report.html"
    put_file(html, render(experiment), replace=True)
    put_file(experiment.folder / "report.json", json.dumps(facts(experiment), indent=1), replace=True)
    return html


def publish_report(experiment: Experiment) -> None:
    """Write the report, and show its gist in the Prefect UI; in a plan, nothing."""
    if current_plan() is not None:
        return
    path = write_report(experiment)
    rows = [f"| {record.label} | {_told(record)} | {_decided(record)} |" for record in experiment.iterations()]
    table = "\n".join(["| policy | test, % | gate |", "|---|---|---|", *rows])
    publish_markdown(experiment.name, f"# {experiment.name}\n\n{table}\n\nThe whole report: `{path}`\n")


def facts(experiment: Experiment) -> dict[str, Any]:
    """What `ratchet status --json` and report.json say of an experiment (DESIGN 11)."""
    state = experiment.state()
    return {
        "experiment": experiment.name,
        "state": state.state,
        "error": state.error,
        "run": state.run,
        "iterations": [record.model_dump() for record in experiment.iterations()],
        "steps": [
            record.model_dump(
                include={
                    "step",
                    "iteration",
                    "split",
                    "shard",
                    "state",
                    "cached",
                    "rows",
                    "digest",
                    "seconds",
                    "counts",
                    "detail",
                }
            )
            for record in experiment.steps(run=state.run)
        ],
    }


def render(experiment: Experiment) -> str:
    """The report as one self-contained HTML page."""
    from jinja2 import Environment

    iterations = experiment.iterations()
    config = experiment.config()
    page = Environment(autoescape=True).from_string(Path(__file__).with_name("report.html").read_text())
    return page.render(
        name=experiment.name,
        recipe=config.get("recipe", ""),
        state=experiment.state(),
        summary=_summary(iterations),
        strategies=strategies(iterations),
        iterations=iterations,
        percent=lambda share: f"{100 * share:.1f}",
        accuracy_plot=_accuracy_plot(iterations),
        loss_plot=_loss_plot(iterations),
        published=published_rows(config, iterations),
        published_of=config.get("published_of"),
        yields=yields(config, experiment.steps(run=experiment.state().run)),
        calibrations=[(record.label, table) for record in iterations if (table := calibration_table(record))],
        held_out_losses=list(held_out_losses(iterations)),
        pairs=[(record.label, told) for record in iterations if (told := pair_table(record))],
        samples=[sample for record in iterations for sample in _samples(record)],
        steps=experiment.steps(run=experiment.state().run),
        config=json.dumps(config, indent=1),
        references=json.dumps({i.label: {"policy": i.policy, **i.references} for i in iterations}, indent=1),
    )


def strategies(iterations: Sequence[IterationRecord]) -> list[str]:
    """All strategies that were measured, in the order of the config."""
    return list(dict.fromkeys(strategy for record in iterations for strategy in record.metrics))


def _summary(iterations: Sequence[IterationRecord]) -> Iterator[str]:
    if len(iterations) < 2:
        return
    first, last = iterations[0], [record for record in iterations if record.promoted][-1]
    gains = {
        strategy: last.metrics[strategy]["value"] - first.metrics[strategy]["value"]
        for strategy in last.metrics
        if strategy in first.metrics
    }
    told = ", ".join(f"{strategy} {100 * gain:+.1f}" for strategy, gain in gains.items())
    yield f"From {first.label} to {last.label}, the policy that stands now, in points: {told}."
    if gains.get("greedy", 1.0) < 0.5 * gains.get("mean@1", 0.0):
        yield (
            "Greedy accuracy rose less than half as much as that of a single sampled rollout: much of the gain is the "
            "format and a sharper distribution, not new problems solved."
        )


def _told(record: IterationRecord) -> str:
    return ", ".join(f"{strategy} {100 * metric['value']:.1f}" for strategy, metric in record.metrics.items())


def _decided(record: IterationRecord) -> str:
    return "start" if record.decision is None else str(record.decision["reason"])


def _samples(record: IterationRecord) -> Iterator[Sample]:
    if "scored" not in record.references:
        return
    left = dict.fromkeys(KINDS, SAMPLES_OF_A_KIND)
    try:
        for row in islice(read_rows(DatasetRef(**record.references["scored"]), ScoredRollout), 2000):
            if left.get(row.reward, 0):
                left[row.reward] -= 1
                yield Sample(record.label, KINDS[row.reward], row)
    except DatasetError:  # the data set was removed since; the figures stand all the same
        return


def _accuracy_plot(iterations: Sequence[IterationRecord]) -> Any:
    figure, (axes,) = _figure(columns=1)
    labels = [textwrap.fill(record.label, LABEL_WIDTH, break_long_words=False) for record in iterations]
    for strategy in strategies(iterations):
        known = [(n, record.metrics[strategy]) for n, record in enumerate(iterations) if strategy in record.metrics]
        values = [100 * metric["value"] for _, metric in known]
        below = [max(0.0, 100 * (metric["value"] - metric["low"])) for _, metric in known]
        above = [max(0.0, 100 * (metric["high"] - metric["value"])) for _, metric in known]
        axes.errorbar([n for n, _ in known], values, yerr=[below, above], marker="o", capsize=3, label=strategy)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)


def _loss_plot(iterations: Sequence[IterationRecord]) -> Any:
    curves = {
        record.label: [(row.optimizer_step, row.value) for row in training_metrics(record) if row.name == "loss"]
        for record in iterations
    }
    drawn = {label: points for label, points in curves.items() if points}
    if not drawn:
        return ""
    figure, all_axes = _figure(columns=len(drawn))
    for (label, points), axes in zip(drawn.items(), all_axes, strict=True):  # the scales have nothing in common
        axes.plot(*zip(*points, strict=True))
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("optimizer step")
    all_axes[0].set_ylabel("training loss")
    return _svg(figure)


def _figure(*, columns: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grey = "#80868b"  # readable on light and dark
    plt.rcParams.update({name: grey for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")})
    plt.rcParams.update({"axes.edgecolor": grey, "svg.hashsalt": "ratchet", "font.size": 10})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, columns, figsize=(10, 3.6 if columns == 1 else 2.4), squeeze=False)
    return figure, axes[0]


def _svg(figure: Any) -> Any:
    import matplotlib.pyplot as plt
    from markupsafe import Markup

    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])
