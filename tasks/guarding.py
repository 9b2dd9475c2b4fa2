"""What training rows are kept apart from: the questions of benchmarks, and the prompts of dev and test."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from storage.benchmark_files import local_splits, places, read_split
from storage.datasets import DatasetRef, write_rows
from storage.digests import file_sha256
from storage.hub import Source, read_records
from storage.rows import Prompt
from tasks.benchmarks import KNOWN
from tasks.caching import step
from tasks.planning import current_plan
from tasks.prompts import prompt_id

log = logging.getLogger("ratchet")
Guarded = Literal["truthfulqa_mc2", "gsm8k"]
SPLITS: dict[Guarded, tuple[str, ...]] = {"gsm8k": ("train", "test"), "truthfulqa_mc2": ("validation",)}


class Guard(NamedTuple):
    """What rows are kept apart from."""

    questions: dict[str, DatasetRef]  # benchmark -> Prompt rows
    missing: tuple[str, ...]  # benchmarks that are not at hand, so that nothing could be kept apart from them
    held_out: tuple[DatasetRef, ...] = ()  # Prompt rows of dev and test, of which no row may hold one


def guard_against(benchmarks: tuple[Guarded, ...], held_out: tuple[DatasetRef, ...] = ()) -> Guard:
    """The questions of the benchmarks that rows are kept apart from: local copies, else the hub's."""
    questions, missing = dict[str, DatasetRef](), list[str]()
    for name in dict.fromkeys(benchmarks):
        known = KNOWN[name]
        files = local_splits(known.hub, known.config, config_optional=True)
        if files or current_plan() is not None or not (fault := _fault_of_hub(name)):
            digests = tuple(f"{split} {file_sha256(file)}" for split, file in sorted(files.items()))
            questions[name] = load_questions(name, digests)
            continue
        missing.append(name)
        log.warning(
            "OVERLAP NOT CHECKED: %s is not at hand, so rows that hold its questions stay in the training data and "
            "its figures cannot be trusted; put its splits at %s and name that folder in RATCHET_DATA (%s)",
            name,
            places(known.hub, known.config),
            fault,
        )
    return Guard(questions, tuple(missing), held_out)


@step(version="1")
def load_questions(benchmark: Guarded, files: tuple[str, ...]) -> DatasetRef:
    """The questions of all splits of a benchmark, as prompts.

    Args:
        files: name and digest of each local split; none: the hub is asked.
    """
    known = KNOWN[benchmark]
    if files:
        splits = local_splits(known.hub, known.config, config_optional=True)
        records: Iterator[Mapping[str, Any]] = (row for file in splits.values() for row in read_split(file))
    else:
        records = (row for source in _on_hub(benchmark) for _, row in read_records(source))
    texts = dict.fromkeys(str(row["question"]) for row in records)
    rows = (Prompt(prompt_id=prompt_id(benchmark, one), source=benchmark, prompt=one, answer=None) for one in texts)
    return write_rows(rows, Prompt, step="benchmark_questions", settings={"benchmark": benchmark})


def _on_hub(benchmark: Guarded) -> list[Source]:
    known = KNOWN[benchmark]
    return [Source(hub=known.hub, config=known.config, split=name) for name in SPLITS[benchmark]]


def _fault_of_hub(benchmark: Guarded) -> str:
    """Why the hub does not give a benchmark; empty: it does, and what it gave is kept by its library."""
    try:
        for source in _on_hub(benchmark):
            next(read_records(source), None)
    except (ConnectionError, ValueError) as error:
        return str(error)
    return ""
