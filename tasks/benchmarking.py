"""A policy and a benchmark -> its answers, scored by lm-eval; answers -> figures with their intervals.

Each benchmark is a step of its own, so that a failed one does not take the others with it.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from models import harness, ifeval_libraries
from models.engine import Engine
from models.ifeval_libraries import BenchmarkError
from models.specs import EngineSettings, ModelRef, PromptTemplate, Settings
from storage.benchmark_files import local_splits, places, read_split
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.digests import file_sha256
from storage.rows import BenchmarkMetric, BenchmarkSample
from tasks.benchmarks import KNOWN, Benchmark, Benchmarks, figures
from tasks.caching import log_counts, step
from tasks.planning import current_plan
from tasks.recording import Progress, announce, current_iteration
from tasks.serving import raise_if_stopping, serve


class Material(Settings):
    """What a benchmark's figures depend on beside its settings."""

    lm_eval: str  # version
    files: tuple[str, ...]  # of the documents on this machine: name and digest; empty: the hub's are taken
    sentences: str | None  # how IFEval tells sentences apart


def evaluate_benchmarks(
    policy: ModelRef, template: PromptTemplate, benchmarks: Benchmarks, engine: EngineSettings
) -> DatasetRef:
    """BenchmarkMetric rows of all the benchmarks, in their order.

    Raises:
        BenchmarkError: a benchmark's documents or libraries are not here; the others' answers are kept.
    """
    answered = tuple(evaluate_benchmark(policy, template, one, engine) for one in benchmarks.tasks)
    return summarise_benchmarks(answered, tuple(notes_of(one) for one in benchmarks.tasks))


def evaluate_benchmark(
    policy: ModelRef, template: PromptTemplate, benchmark: Benchmark, engine: EngineSettings
) -> DatasetRef:
    """BenchmarkSample rows: what the policy answered to each document, and what lm-eval makes of it."""
    return answer_benchmark(policy, template, benchmark, material_of(benchmark), engine)


@step(version="1")
def answer_benchmark(
    policy: ModelRef, template: PromptTemplate, benchmark: Benchmark, material: Material, engine: EngineSettings
) -> DatasetRef:
    """Put the policy through one benchmark."""
    served = serve(policy, engine)
    counts: Counter[str] = Counter()

    def rows() -> Iterator[BenchmarkSample]:
        for task in _tasks_of(benchmark):
            for answer in _answers(task, served, template if benchmark.use_chat_template else None):
                counts["answers"] += 1
                counts["prompts cut"] += answer.cut_tokens > 0
                yield _sample(answer, benchmark, policy)

    settings = {"benchmark": benchmark.key(), "material": material.key(), "template": template.key()}
    answered = write_rows(rows(), BenchmarkSample, step="benchmark_samples", settings=settings)
    log_counts(+counts)
    return answered


@step(version="1")
def summarise_benchmarks(answered: tuple[DatasetRef, ...], notes: tuple[str, ...]) -> DatasetRef:
    """The figures of each benchmark."""
    metrics = (
        metric
        for samples, note in zip(answered, notes, strict=True)
        for metric in figures(read_rows(samples, BenchmarkSample), note)
    )
    return write_rows(metrics, BenchmarkMetric, step="benchmark_metrics", parents=answered)


def material_of(benchmark: Benchmark) -> Material:
    """What lies on this machine for a benchmark, by its content.

    Raises:
        BenchmarkError: lm-eval, or what IFEval needs beside it, is not installed.
    """
    version = harness.version()
    sentences = _sentences() if benchmark.task == "ifeval" else None
    files = [
        f"{name}/{split} {file_sha256(file)}"
        for name, config in _parts(benchmark)
        for split, file in sorted(_local(benchmark, config).items())
    ]
    return Material(lm_eval=version, files=tuple(files), sentences=sentences)


def benchmark_faults(benchmarks: Benchmarks) -> list[str]:
    """What would keep benchmarks from being run, found before anything is; empty: nothing that can be seen from here.

    Whether the hub has the documents that are not on this machine is not asked.
    """
    try:
        harness.version()
    except BenchmarkError as error:
        return [str(error)]
    found = []
    for benchmark in benchmarks.tasks:
        if benchmark.task == "ifeval" and (missing := ifeval_libraries.missing_for_ifeval()):
            found.append(missing)
        found += [f"benchmark {benchmark.task!r}: {fault}" for fault in _split_faults(benchmark)]
    return found


def notes_of(benchmark: Benchmark) -> str:
    """What keeps a figure from being compared with others'; empty: nothing known."""
    if benchmark.task == "ifeval" and _sentences() == ifeval_libraries.STAND_IN:
        return (
            "NLTK's punkt_tab is not here and a simpler model told sentences apart, for the 64 of 541 prompts that "
            "count them or words in capitals; run `python -m nltk.downloader punkt_tab`, or put it into "
            "<RATCHET_DATA>/nltk_data/tokenizers/"
        )
    return ""


def _tasks_of(benchmark: Benchmark) -> Iterator[harness.TaskToRun]:
    known = KNOWN[benchmark.task]
    for name, config in _parts(benchmark):
        splits = _local(benchmark, config)
        yield harness.TaskToRun(
            name=name,
            folder=known.folder,
            documents=partial(_read, splits) if splits else None,
            hub=f"data set {known.hub!r} was asked for; without a network, put its splits at "
            f"{places(known.hub, config)} and name that folder in RATCHET_DATA",
            revision=benchmark.revision,
            shots=benchmark.shots_used,
            limit=benchmark.limit,
            max_completion_tokens=benchmark.max_completion_tokens,
        )


def _parts(benchmark: Benchmark) -> list[tuple[str, str | None]]:
    """(lm-eval's task, configuration of its data set), one unless the benchmark is a group."""
    known = KNOWN[benchmark.task]
    if known.tasks is None:
        return [(benchmark.task, known.config)]
    return [(name, name.removeprefix(known.tasks)) for name in harness.task_names(known.folder, known.tasks)]


def _local(benchmark: Benchmark, config: str | None) -> dict[str, Path]:
    known = KNOWN[benchmark.task]
    return local_splits(known.hub, config, config_optional=known.tasks is None)


def _split_faults(benchmark: Benchmark) -> Iterator[str]:
    known = KNOWN[benchmark.task]
    wanted = [known.split, *([known.examples] if known.examples and benchmark.shots_used else [])]
    for name, config in _parts(benchmark):
        here = _local(benchmark, config)
        if missing := [split for split in wanted if here and split not in here]:
            yield (
                f"{name} is on this machine without its split {', '.join(missing)} (there are: {', '.join(here)}); "
                f"put it at {places(known.hub, config)}, or remove the others and let the hub's be taken"
            )
        if not here and os.environ.get("HF_HUB_OFFLINE") == "1":
            yield (
                f"{name} is not on this machine and HF_HUB_OFFLINE is set; put its splits {', '.join(wanted)} at "
                f"{places(known.hub, config)} and name that folder in RATCHET_DATA"
            )


def _read(splits: Mapping[str, Path]) -> Mapping[str, harness.Records]:
    return {split: read_split(file) for split, file in splits.items()}


def _answers(task: harness.TaskToRun, served: Engine, template: PromptTemplate | None) -> list[harness.Answer]:
    last = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal last
        raise_if_stopping()
        if time.monotonic() - last >= 1.0 or done == total:
            last = time.monotonic()
            announce(
                Progress(
                    step=task.name,
                    iteration=current_iteration(),
                    done=done,
                    total=total,
                    tokens=0,
                    reused=0,
                    unit="requests",
                )
            )

    return harness.run_task(task, served, template, tell)


def _sample(answer: harness.Answer, benchmark: Benchmark, policy: ModelRef) -> BenchmarkSample:
    return BenchmarkSample(
        benchmark=benchmark.task,
        task=answer.task,
        document=answer.document,
        filter=answer.filter,
        roles=[message["role"] for message in answer.messages],
        contents=[message["content"] for message in answer.messages],
        continuations=answer.continuations,
        logprobs=answer.logprobs,
        completions=answer.completions,
        answers=answer.answers,
        target=answer.target,
        metrics=answer.metrics,
        values=answer.values,
        weights=answer.weights,
        cut_tokens=answer.cut_tokens,
        documents=answer.documents,
        limit=benchmark.limit,
        shots=benchmark.shots_used,
        policy=policy.identity,
    )


def _sentences() -> str:
    """How IFEval tells sentences apart here; a plan downloads nothing."""
    root = os.environ.get("RATCHET_DATA")
    folders = [Path(root, "nltk_data")] if root else []
    if current_plan() is not None:
        return ifeval_libraries.sentence_model_here(folders)
    may_download = os.environ.get("HF_HUB_OFFLINE") != "1"
    return ifeval_libraries.prepare_ifeval(folders, may_download=may_download)
