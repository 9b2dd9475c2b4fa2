"""distilabel's pipeline on the rows of bench_rows.py, without a model: its steps have to lie in a module of their own.

    python benchmarks/distilabel_rows.py --rows 20000 --cache DIR [--batch 1000] [--use-cache] [--delay 0.001]

Prints JSON: CPU seconds of all its processes, wall seconds, and how many rows its sampling step was asked for.
"""

import argparse
import json
import resource
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

from tables import peer

assert peer("distilabel")
from bench_rows import MARKER, PER_PROMPT, made_up  # noqa: E402
from distilabel.pipeline import Pipeline  # noqa: E402
from distilabel.steps import GeneratorStep, Step, StepInput  # noqa: E402


class Load(GeneratorStep):  # type: ignore[misc]  # distilabel has no types
    """The prompts' rows; a row's completion comes along and is only shown by Draw."""

    rows: int

    def process(self, offset: int = 0) -> Any:
        batch: list[dict[str, Any]] = []
        for number, row in enumerate(made_up(self.rows)):
            if number < offset:
                continue
            batch.append(row)
            if len(batch) == self.batch_size or number == self.rows - 1:
                yield batch, number == self.rows - 1
                batch = []

    @property
    def outputs(self) -> list[str]:
        return list(next(made_up(PER_PROMPT)))


class Draw(Step):  # type: ignore[misc]
    """In the place of an engine: takes its time, and notes how many rows it was asked for."""

    delay: float
    note: str

    def process(self, inputs: StepInput) -> Any:
        time.sleep(self.delay * len(inputs))
        with Path(self.note).open("a") as lines:
            lines.write(f"{len(inputs)}\n")
        yield inputs


class Score(Step):  # type: ignore[misc]
    """Compares the final answer."""

    @property
    def outputs(self) -> list[str]:
        return ["reward"]

    def process(self, inputs: StepInput) -> Any:
        for row in inputs:
            gold = row["prompt"].split(":")[0].removeprefix("Problem ")
            row["reward"] = float(row["completion"].rpartition(MARKER)[2].strip() == gold)
        yield inputs


class Pair(Step):  # type: ignore[misc]
    """A wrong completion beside each right one of its prompt."""

    @property
    def outputs(self) -> list[str]:
        return ["pairs"]

    def process(self, inputs: StepInput) -> Any:
        for _, group in groupby(inputs, key=lambda row: row["prompt_id"]):
            members = list(group)
            bad = [row["completion"] for row in members if not row["reward"]]
            for row in members:
                row["pairs"] = bad[:1] if row["reward"] else []
        yield inputs


def main() -> None:
    """Run it and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=50, help="rows a batch; 50 is distilabel's own default")
    parser.add_argument("--use-cache", action="store_true")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds a row")
    options = parser.parse_args()
    note = options.cache / "drawn.txt"
    note.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with Pipeline(name="rows", cache_dir=options.cache) as pipeline:
        load, size = Load(rows=options.rows, batch_size=options.batch), {"input_batch_size": options.batch}
        load >> Draw(delay=options.delay, note=str(note), **size) >> Score(**size) >> Pair(**size)
    made = pipeline.run(use_cache=options.use_cache)
    assert len(made["default"]["train"]) == options.rows
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = {
        "cpu": children.ru_utime + children.ru_stime + time.process_time(),
        "wall": time.perf_counter() - started,
        "drawn": sum(map(int, note.read_text().split())) if note.exists() else 0,
    }
    sys.stdout.write("\n" + json.dumps(told))


if __name__ == "__main__":
    main()
