"""A policy and a benchmark -> its answers, scored by lm-eval; answers -> figures with their intervals.

Each task is a step of its own, all 57 of MMLU, so that a failed or killed one does not take the others with it.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
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
from tasks.drawing import Meter
from tasks.planning import current_plan
from tasks.serving import raise_if_stopping, serve


class Material(Settings):
    """What a benchmark's figures depend on beside its settings."""

    lm_eval: str  # version
    files: tuple[str, ...]  # of the documents on this machine: name and digest; empty: the hub's are taken
    sentences: str | None  # how IFEval tells sentences apart


class Part(Settings):
    """A task of a benchmark."""

    task: str  # lm-eval's name
    config: str | None  # configuration of its data set


def evaluate_benchmarks(
    policy: ModelRef, template: PromptTemplate, benchmarks: Benchmarks, engine: EngineSettings
) -> DatasetRef:
    """BenchmarkMetric rows of all the benchmarks, in their order.

    Raises:
        BenchmarkError: a benchmark's documents or libraries are not here; the others' answers are kept.
    """
    answered = answer_benchmarks(policy, template, benchmarks, engine)
    return summarise_benchmarks(answered, tuple(notes_of(one) for one in benchmarks.tasks))


def answer_benchmarks(
    policy: ModelRef, template: PromptTemplate, benchmarks: Benchmarks, engine: EngineSettings
) -> tuple[DatasetRef, ...]:
    """BenchmarkSample rows of each benchmark, in their order."""
    return tuple(evaluate_benchmark(policy, template, one, engine) for one in benchmarks.tasks)


def evaluate_benchmark(
    policy: ModelRef, template: PromptTemplate, benchmark: Benchmark, engine: EngineSettings
) -> DatasetRef:
    """BenchmarkSample rows: what the policy answered to each document, and what lm-eval makes of it."""
    answered = tuple(
        answer_benchmark(policy, template, benchmark, part, material_of(benchmark, part), engine)
        for part in _parts(benchmark)
    )
    return answered[0] if len(answered) == 1 else gather_answers(answered)


@step(version="1")
def answer_benchmark(
    policy: ModelRef,
    template: PromptTemplate,
    benchmark: Benchmark,
    part: Part,
    material: Material,
    engine: EngineSettings,
) -> DatasetRef:
    """Put the policy through one task of a benchmark."""
    served = serve(policy, engine)
    counts: Counter[str] = Counter()

    def rows() -> Iterator[BenchmarkSample]:
        for answer in _answers(_task_of(benchmark, part), served, template if benchmark.use_chat_template else None):
            counts["answers"] += 1
            counts["prompts cut"] += answer.cut_tokens > 0
            yield _sample(answer, benchmark, policy)

    settings = {
        "benchmark": benchmark.key(),
        "part": part.key(),
        "material": material.key(),
        "template": template.key(),
    }
    answered = write_rows(rows(), BenchmarkSample, step="benchmark_samples", settings=settings)
    log_counts(+counts)
    return answered


@step(version="1", rows=lambda answered: sum(one.rows for one in answered))
def gather_answers(answered: tuple[DatasetRef, ...]) -> DatasetRef:
    """The answers to all tasks of one benchmark."""
    rows = chain.from_iterable(read_rows(one, BenchmarkSample) for one in answered)
    return write_rows(rows, BenchmarkSample, step="benchmark_samples", parents=answered)


@step(version="1")
def summarise_benchmarks(answered: tuple[DatasetRef, ...], notes: tuple[str, ...]) -> DatasetRef:
    """The figures of each benchmark."""
    metrics = (
        metric
        for samples, note in zip(answered, notes, strict=True)
        for metric in figures(read_rows(samples, BenchmarkSample), note)
    )
    return write_rows(metrics, BenchmarkMetric, step="benchmark_metrics", parents=answered)


def material_of(benchmark: Benchmark, part: Part) -> Material:
    """What lies on this machine for a task of a benchmark, by its content.

    Raises:
        BenchmarkError: lm-eval, or what IFEval needs beside it, is not installed.
    """
    version = harness.version()
    sentences = _sentences() if benchmark.task == "ifeval" else None
    local = sorted(_local(benchmark, part.config).items())
    files = [f"{part.task}/{split} {file_sha256(file)}" for split, file in local]
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


def _task_of(benchmark: Benchmark, part: Part) -> harness.TaskToRun:
    known, splits = KNOWN[benchmark.task], _local(benchmark, part.config)
    return harness.TaskToRun(
        name=part.task,
        folder=known.folder,
        documents=partial(_read, splits) if splits else None,
        hub=f"data set {known.hub!r} was asked for; without a network, put its splits at "
        f"{places(known.hub, part.config)} and name that folder in RATCHET_DATA",
        revision=benchmark.revision,
        shots=benchmark.shots_used,
        limit=benchmark.limit,
        max_completion_tokens=benchmark.max_completion_tokens,
    )


def _parts(benchmark: Benchmark) -> list[Part]:
    """One, unless the benchmark is a group."""
    known = KNOWN[benchmark.task]
    if known.tasks is None:
        return [Part(task=benchmark.task, config=known.config)]
    names = harness.task_names(known.folder, known.tasks)
    return [Part(task=name, config=name.removeprefix(known.tasks)) for name in names]


def _local(benchmark: Benchmark, config: str | None) -> dict[str, Path]:
    known = KNOWN[benchmark.task]
    return local_splits(known.hub, config, config_optional=known.tasks is None)


def _split_faults(benchmark: Benchmark) -> Iterator[str]:
    known = KNOWN[benchmark.task]
    wanted = [known.split, *([known.examples] if known.examples and benchmark.shots_used else [])]
    for part in _parts(benchmark):
        name, config = part.task, part.config
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
    meter = Meter(0, 0, task.name, "requests")

    def tell(done: int, total: int) -> None:
        raise_if_stopping()
        meter.total = total
        meter.add(rows=done - meter.done)

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
