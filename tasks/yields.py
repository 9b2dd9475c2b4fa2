"""What AutoIF makes of its queries, stage by stage: ours, and what was published."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from storage.experiments import StepRecord
from storage.report_rows import ReportedFigure

# stage -> (step, its count); only what is made for training, not what held-out instructions are measured on
STAGES = {
    "queries": ("load_queries", "queries"),
    "instructions": ("read_instructions", "instructions"),
    "verifiers": ("read_verifiers", "verifiers"),
    "cases": ("read_cases", "cases"),
    "verifiers kept": ("check_verifiers", "verifiers_kept"),
    "instructions kept": ("check_verifiers", "instructions_kept"),
    "instances": ("combine_instances", "instances"),
    "completions": ("score_by_votes", "completions"),
    "passing": ("score_by_votes", "passing"),
    "mixed": ("score_by_votes", "mixed"),
    "failing": ("score_by_votes", "failing"),
    "pairs": ("pair_rollouts", "pairs"),
}
RATIO = "pass:fail"
HELD_OUT = ("dev", "test")


class Yield(NamedTuple):
    """Rows left after a stage, over all iterations; None: not done, or the publication does not say."""

    stage: str
    ours: float | None
    published: tuple[float | None, ...]  # as `columns` of the table


class YieldTable(NamedTuple):
    """The stages, and whose the published columns are."""

    columns: tuple[str, ...]
    rows: list[Yield]


def yields(config: Mapping[str, Any], steps: Iterable[StepRecord]) -> YieldTable | None:
    """Our yields beside those that the preset says were published; None: the recipe has none of these stages."""
    published: dict[str, dict[str, float | None]] = config.get("published_yields") or {}
    ours: dict[str, float] = {}
    for record in steps:
        if record.state != "completed" or record.split in HELD_OUT:
            continue
        for stage, (step, count) in STAGES.items():
            if record.step == step:
                ours[stage] = ours.get(stage, 0) + record.counts.get(count, 0)
    if "instructions" not in ours:
        return None
    if ours.get("failing"):
        ours[RATIO] = ours["passing"] / ours["failing"]
    stages = [*STAGES, RATIO]
    rows = [Yield(name, ours.get(name), tuple(one.get(name) for one in published.values())) for name in stages]
    return YieldTable(tuple(published), rows)


def figures_of_yields(config: Mapping[str, Any], steps: Iterable[StepRecord]) -> Iterator[ReportedFigure]:
    """Our yields as rows of a report; none where the recipe has none of these stages."""
    table = yields(config, steps)
    for row in table.rows if table else ():
        if row.ours is not None:
            yield ReportedFigure(
                iteration=None, label=None, about="yield", name=row.stage, value=row.ours, low=None, high=None, n=None
            )
