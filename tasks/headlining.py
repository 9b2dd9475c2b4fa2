"""Benchmark answers -> the one figure of each benchmark that published tables show, as evaluated prompts.

So a benchmark stands beside strategies in the record, the report and the published table, none of which knows lm-eval.
"""

from collections import defaultdict
from collections.abc import Iterator

from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import BenchmarkSample, EvaluatedPrompt
from tasks.caching import log_counts, step

# What the Open LLM Leaderboard shows of each: metric, and how the answer was read.
HEADLINES = {
    "arc_challenge": ("acc_norm", "none"),
    "arc_easy": ("acc_norm", "none"),
    "hellaswag": ("acc_norm", "none"),
    "truthfulqa_mc1": ("acc", "none"),
    "truthfulqa_mc2": ("acc", "none"),
    "winogrande": ("acc", "none"),
    "mmlu": ("acc", "none"),
    "gsm8k": ("exact_match", "strict-match"),
    "ifeval": ("prompt_level_strict_acc", "none"),
}
AVERAGE = "average of tasks"  # each task weighs the same; its n is the number of tasks


@step(version="1")
def evaluate_headlines(answered: tuple[DatasetRef, ...], evaluated: DatasetRef | None) -> DatasetRef:
    """A row a document of each benchmark and one a task for their average, after what was evaluated otherwise."""

    def rows() -> Iterator[EvaluatedPrompt]:
        if evaluated is not None:
            yield from read_rows(evaluated, EvaluatedPrompt)
        means: dict[str, float] = {}
        for samples in answered:
            values: dict[str, list[float]] = defaultdict(list)
            for sample in read_rows(samples, BenchmarkSample):
                metric, filter_ = HEADLINES[sample.benchmark]
                if sample.filter == filter_ and metric in sample.metrics:
                    name = f"{sample.benchmark} ({sample.shots})"
                    values[name].append(sample.values[sample.metrics.index(metric)])
                    yield _row(f"{sample.task}/{sample.document}", name, values[name][-1])
            means |= {name: sum(told) / len(told) for name, told in values.items()}
        for name, value in means.items():
            yield _row(name, AVERAGE, value)
        log_counts({name: round(1000 * value) for name, value in means.items()})

    parents = [*answered, *([evaluated] if evaluated is not None else [])]
    return write_rows(rows(), EvaluatedPrompt, step="evaluated", parents=parents)


def _row(prompt_id: str, strategy: str, value: float) -> EvaluatedPrompt:
    return EvaluatedPrompt(
        prompt_id=prompt_id, strategy=strategy, value=value, rollouts=1, k=1, undecided=0, answer=None
    )
