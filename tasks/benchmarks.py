"""Benchmarks: which there are, how each is asked, and the figures made of a policy's answers."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import sqrt
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from models.specs import Settings
from storage.rows import BenchmarkMetric, BenchmarkSample
from tasks.metrics import Interval, interval_of_mean, paired_difference, wilson

BenchmarkName = Literal[
    "ifeval",
    "gsm8k",
    "mmlu",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
    "winogrande",
    "hellaswag",
    "arc_easy",
    "arc_challenge",
]


class Known(NamedTuple):
    """A benchmark as lm-eval 0.4.13 has it."""

    folder: str  # in lm_eval/tasks
    hub: str  # id of the data set
    config: str | None  # None: each task's own, which its name ends with
    split: str  # of its documents
    examples: str | None  # split of its worked examples; None: it takes none
    shots: int  # the usual number
    fixed: bool = False  # the task's own definition fixes the number of shots
    tasks: str | None = None  # it is a group: the beginning of its tasks' names


TRUTHFULQA = "truthfulqa/truthful_qa"
# Shots: the Open LLM Leaderboard's (METHODS 4.5), which had no ARC easy: lm-eval's own 0.
KNOWN: dict[str, Known] = {
    "ifeval": Known("ifeval", "google/IFEval", None, "train", None, 0, fixed=True),
    "gsm8k": Known("gsm8k", "openai/gsm8k", "main", "test", "train", 5),
    "mmlu": Known("mmlu/default", "cais/mmlu", None, "test", "dev", 5, tasks="mmlu_"),
    "truthfulqa_mc1": Known("truthfulqa", TRUTHFULQA, "multiple_choice", "validation", None, 0, fixed=True),
    "truthfulqa_mc2": Known("truthfulqa", TRUTHFULQA, "multiple_choice", "validation", None, 0, fixed=True),
    "winogrande": Known("winogrande", "allenai/winogrande", "winogrande_xl", "validation", "train", 5),
    "hellaswag": Known("hellaswag", "Rowan/hellaswag", None, "validation", "train", 10),
    "arc_easy": Known("arc", "allenai/ai2_arc", "ARC-Easy", "test", "train", 0),
    "arc_challenge": Known("arc", "allenai/ai2_arc", "ARC-Challenge", "test", "train", 25),
}


class Benchmark(Settings):
    """One benchmark, and how a policy is put through it."""

    task: BenchmarkName
    shots: int | None = Field(default=None, ge=0)  # None: the usual number
    limit: int | None = Field(default=None, ge=1)  # documents of each task; None: all. A limited figure is marked so
    use_chat_template: bool = True  # False: plain text, for base models
    max_completion_tokens: int | None = Field(default=None, ge=1)  # None: the task's own
    revision: str | None = None  # commit of the hub's data set; local files are known by their content

    @model_validator(mode="after")
    def _shots_can_be_set(self) -> "Benchmark":
        known = KNOWN[self.task]
        if known.fixed and self.shots not in (None, known.shots):
            raise ValueError(
                f"{self.task} is defined with {known.shots} shots and {self.shots} were asked for; remove `shots`"
            )
        return self

    @property
    def shots_used(self) -> int:
        """Worked examples before each document."""
        return KNOWN[self.task].shots if self.shots is None else self.shots


class Benchmarks(Settings):
    """The benchmarks of a recipe."""

    tasks: tuple[Benchmark, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _each_once(self) -> "Benchmarks":
        names = [benchmark.task for benchmark in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} stands there more than once; keep one of each")
        return self


def figures(samples: Iterable[BenchmarkSample], note: str = "") -> list[BenchmarkMetric]:
    """The figures of one benchmark: over all of its documents, then, where it is a group, for each of its tasks.

    As in lm-eval, every document of a group weighs the same.
    """
    cells: dict[tuple[str, str, str], list[_Cell]] = defaultdict(list)
    held: dict[str, int] = {}
    first: BenchmarkSample | None = None
    for sample in samples:
        first = first or sample
        held[sample.task] = sample.documents
        for metric, value, weight in zip(sample.metrics, sample.values, sample.weights, strict=True):
            cell = _Cell(value, weight, sample.cut_tokens > 0)
            for task in dict.fromkeys((sample.benchmark, sample.task)):
                cells[task, metric, sample.filter].append(cell)
    if first is None:
        return []
    held[first.benchmark] = sum(held.values())
    whole_first = sorted(cells.items(), key=lambda item: item[0][0] != first.benchmark)
    return [_figure(first, *key, found, held[key[0]], note) for key, found in whole_first]


class _Cell(NamedTuple):
    value: float
    weight: int
    cut: bool


def _figure(
    first: BenchmarkSample, task: str, metric: str, filter_: str, cells: Sequence[_Cell], held: int, note: str
) -> BenchmarkMetric:
    value, interval = weighted_mean([cell.value for cell in cells], [cell.weight for cell in cells])
    return BenchmarkMetric(
        benchmark=first.benchmark,
        task=task,
        metric=metric,
        filter=filter_,
        value=value,
        low=interval.low,
        high=interval.high,
        n=len(cells),
        documents=held,
        limit=first.limit,
        shots=first.shots,
        rendering="plain" if first.roles == ["plain"] else "chat template",
        cut_prompts=sum(cell.cut for cell in cells),
        note=note,
        policy=first.policy,
    )


def weighted_mean(values: Sequence[float], weights: Sequence[int]) -> tuple[float, Interval]:
    """The mean of all that the values are means of, and its 95 % interval over documents.

    Where weights differ (IFEval: instructions of a prompt), the documents are what varies, not the instructions: the
    variance is that of a ratio of two sums, by its linear approximation, put into Wilson's interval as a number of
    independent trials.
    """
    if set(weights) == {1}:
        return sum(values) / len(values), interval_of_mean(values)
    x, w = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    ratio, n = float((x * w).sum() / w.sum()), len(values)
    residuals = w * (x - ratio) / w.mean()
    error = sqrt(float((residuals**2).sum()) / (n * max(1, n - 1)))
    trials = ratio * (1 - ratio) / error**2 if error > 0 else n
    return ratio, wilson(ratio * trials, trials)


class Change(NamedTuple):
    """How one figure differs between two policies, on the same documents."""

    benchmark: str
    metric: str
    filter: str
    difference: float  # candidate - base
    low: float  # 95 % interval over documents
    high: float
    n: int  # documents


def changes(candidate: Iterable[BenchmarkSample], base: Iterable[BenchmarkSample]) -> list[Change]:
    """How a benchmark's figures changed, each with a paired interval; for a gate, and for ablations.

    Raises:
        ValueError: the two were not put through the same documents in the same way.
    """
    mine, theirs = _by_document(candidate), _by_document(base)
    if mine.keys() != theirs.keys() or not mine:
        raise ValueError(
            f"figures can only be compared on the same documents, filters, shots and rendering; of {len(mine):,} and "
            f"{len(theirs):,} answers {len(mine.keys() & theirs.keys()):,} are alike; evaluate both with equal settings"
        )
    differences: dict[tuple[str, str, str], list[tuple[float, int]]] = defaultdict(list)
    for key, sample in mine.items():
        columns = zip(sample.metrics, sample.values, theirs[key].values, sample.weights, strict=True)
        for metric, value, other, weight in columns:
            differences[sample.benchmark, metric, sample.filter].append((value - other, weight))
    return [_change(*key, found) for key, found in differences.items()]


def _by_document(samples: Iterable[BenchmarkSample]) -> dict[tuple[object, ...], BenchmarkSample]:
    return {(row.task, row.document, row.filter, row.shots, row.roles[0] == "plain"): row for row in samples}


def _change(benchmark: str, metric: str, filter_: str, found: Sequence[tuple[float, int]]) -> Change:
    mean_weight = sum(weight for _, weight in found) / len(found)
    weighted = [difference * weight / mean_weight for difference, weight in found]
    paired = paired_difference(weighted, [0.0] * len(weighted))
    return Change(benchmark, metric, filter_, paired.difference, paired.low, paired.high, len(found))
