"""Row types of a report's tables: what report.html shows, for programs. One Parquet file each.

    experiments/<name>/report/metrics.parquet, decisions.parquet, ...

Any tool reads them, for instance `pandas.read_parquet("experiments/rest-em-tiny/report/metrics.parquet")`. A table that
an experiment has nothing for is there and has no rows. `iteration` counts from 0, the base; `label` is what the report
calls the policy. Shares and accuracies are in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from math import isfinite

import pyarrow as pa
import pyarrow.parquet as pq

from storage.rows import Row
from storage.schemas import arrow_schema, batch_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedMetric(Row):
    """A policy's figure with its 95 % interval. Key: (iteration, split, strategy)."""

    iteration: int
    label: str
    promoted: bool
    split: str  # "dev" or "test"
    strategy: str
    value: float
    low: float
    high: float
    n: int  # prompts
    k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedDecision(Row):
    """What the gate said of a policy, by a paired test on the dev split. Key: iteration."""

    iteration: int
    label: str
    against: str  # label of the policy that stood
    promoted: bool
    rule: str  # "better", "not_worse" or "always"; "": the settings have no gate
    strategy: str
    difference: float  # challenger less incumbent
    low: float  # 95 % interval
    high: float
    p_value: float  # one-sided, that it is not better
    n: int  # prompts
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedStage(Row):
    """Rows that are left after a stage of an iteration, or were left out. Key: (iteration, stage, left_out)."""

    iteration: int
    label: str
    stage: str  # or the reason
    rows: int
    left_out: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedCurve(Row):
    """A point of a policy's pass@k on test, unbiased, with its 95 % band over prompts. Key: (iteration, k)."""

    iteration: int
    label: str
    k: int
    value: float
    low: float
    high: float
    prompts: int
    rollouts: int  # of a prompt (n)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedRollouts(Row):
    """What the rollouts of an iteration are like, as a whole. Key: (iteration, role)."""

    iteration: int
    label: str
    role: str  # "training": drawn to train this policy, so by the one before; "test": drawn by it on the test split
    dataset: str
    rollouts: int
    prompts: int
    mean_tokens: float  # of a completion
    median_tokens: int
    tenth_tokens: int  # one in ten is no longer
    ninetieth_tokens: int
    truncated: int
    duplicates: int  # of which an earlier rollout of the same prompt has the very text
    undecided: int | None  # None: not scored
    correct: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedReason(Row):
    """How many rollouts got a verdict for a reason. Key: (iteration, role, reason, decided)."""

    iteration: int
    label: str
    role: str
    reason: str
    decided: bool
    rollouts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedTraining(Row):
    """A figure that was logged while a policy was trained. Key: (iteration, name, optimizer_step)."""

    iteration: int
    label: str
    optimizer_step: int
    name: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedOverlap(Row):
    """How much of what a policy was trained on stands in held-out prompts too. Key: (iteration, split)."""

    iteration: int
    label: str
    split: str
    training_rows: int
    sharing_rows: int  # that share a run of words with a held-out prompt
    held_out_prompts: int
    shared_prompts: int  # that share one with a training row
    run_words: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedCost(Row):
    """What one kind of step cost over all runs of the experiment. Key: step."""

    step: str
    calls: int
    cached: int
    failed: int
    seconds: float  # paid, failures included
    saved_seconds: float  # what the cached calls took when they were done; of samplings from a ledger it is unknown
    engine_seconds: float  # of those paid, with an engine or a training at work
    accelerator_seconds: float | None  # these times the accelerators of the machine; None: of a run it is not known
    tokens: int  # that were sampled
    reused_rollouts: int  # that were in the ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedRun(Row):
    """One run of the experiment: what it cost and what it was made with. Key: run."""

    run: str
    state: str
    started_at: str
    finished_at: str | None
    seconds: float  # paid in steps
    engine_seconds: float
    accelerator_seconds: float | None
    tokens: int
    calls: int
    cached: int
    failed: int
    commit: str | None  # None: not run from a repository, or not recorded
    machine: str | None
    accelerators: int | None
    versions: list[str]  # "torch 2.13.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedPublished(Row):
    """A figure of a published table, as a share, and ours. Key: (label, strategy)."""

    label: str
    strategy: str
    published: float | None  # None: the publication leaves it open
    value: float | None  # None: not run here
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedFigure(Row):
    """A figure that only some recipes have. Key: (iteration, about, name)."""

    iteration: int | None  # None: over all of them
    label: str | None
    about: str  # "judge: own, all"; "pairs: chosen"; "yield"
    name: str
    value: float
    low: float | None  # 95 % interval
    high: float | None
    n: int | None  # rows it was figured from


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedSample(Row):
    """A rollout to read; of a prompt that got better or worse, the base's beside that of the policy that stands."""

    label: str
    kind: str  # "right", "wrong", "undecided", "improved", "worsened"
    prompt_id: str
    prompt: str
    completion: str
    reason: str
    rate: float | None  # share of the prompt's test rollouts that are right, of the base
    other_label: str | None
    other_completion: str | None
    other_reason: str | None
    other_rate: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedOrigin(Row):
    """A data set or model of the experiment and what it was made from. Key: name."""

    name: str  # "datasets/scored/26f1...", "models/91c0...", or a model's name on the hub
    kind: str  # "data set" or "model"
    step: str  # that made it
    iteration: int | None
    split: str | None  # None: training
    row_type: str | None
    rows: int | None
    there: bool  # whether it is still in the home
    parents: list[str]  # names


TABLES: dict[str, type[Row]] = {
    "metrics": ReportedMetric,
    "decisions": ReportedDecision,
    "funnel": ReportedStage,
    "pass_at_k": ReportedCurve,
    "rollouts": ReportedRollouts,
    "reasons": ReportedReason,
    "training": ReportedTraining,
    "overlaps": ReportedOverlap,
    "costs": ReportedCost,
    "runs": ReportedRun,
    "published": ReportedPublished,
    "figures": ReportedFigure,
    "samples": ReportedSample,
    "lineage": ReportedOrigin,
}


def parquet_of(rows: Sequence[Row], row_type: type[Row]) -> bytes:
    """The rows as a Parquet file; none make a file with columns and no rows."""
    schema = arrow_schema(row_type)
    batches = [batch_of(rows, row_type)] if rows else []
    sink = BytesIO()
    pq.write_table(pa.Table.from_batches(batches, schema=schema), sink, compression="zstd")
    return sink.getvalue()


def plain(row: Row) -> dict[str, object]:
    """A row as JSON has it, which knows no NaN and no infinity, as a training that went wrong may log: None."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in values.items()}
