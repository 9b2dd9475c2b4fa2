"""Scoring and verifying on a Dask cluster of two workers on this machine, against this process alone.

    python benchmarks/bench_dask.py [--rows 1000000] [--instances 2000] [--workers 2]

The cluster is warm: its workers have been started and have imported the package, which a note tells the cost of. Both
ways give the same data set, which is checked. On one machine, workers share the cores that verifying uses all of
anyway; what more machines would add is not measured here.
"""

import argparse
import importlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import NamedTuple

from distributed import LocalCluster
from tables import REPOSITORY, show

from storage.datasets import DatasetRef, write_rows
from storage.home import home
from storage.rows import CheckedVerifier, Instance, Prompt, Rollout
from tasks.sandbox import Limits
from tasks.scoring import ROLLOUTS_PER_SHARD, score_answers
from tasks.spreading import CLUSTER, SHARD_ROWS
from tasks.verifying import INSTANCES_PER_SHARD, verify_rollouts

ROLLOUTS_PER_PROMPT = 16
VERIFIERS, COMPLETIONS = 4, 8  # of each instruction, of each instance
MARKER = "FINAL ANSWER:"


class Times(NamedTuple):
    """Seconds by the clock."""

    here: float
    on_cluster: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--instances", type=int, default=2_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RATCHET_HOME"] = folder
        few, many = _to_score(200), _to_score(options.rows)
        to_verify = _to_verify(options.instances)
        started = time.perf_counter()
        with LocalCluster(
            n_workers=options.workers, threads_per_worker=1, dashboard_address=None, silence_logs=logging.ERROR
        ) as cluster:
            with _on(cluster, 100):
                score_answers(*few, MARKER)
            cold = time.perf_counter() - started
            scoring = _both(cluster, lambda: score_answers(*many, MARKER), ROLLOUTS_PER_SHARD)
            verifying = _both(cluster, lambda: verify_rollouts(*to_verify, None, Limits()), INSTANCES_PER_SHARD)
    rows, calls = many[0].rows, options.instances * VERIFIERS * COMPLETIONS
    show(
        f"On {options.workers} Dask workers on a machine of {os.cpu_count()} cores",
        [
            (f"scoring {rows:,} rollouts, cluster / this process, rows per second", _ratio(scoring)),
            (f"verifying {calls:,} calls, cluster / this process, calls per second", _ratio(verifying)),
        ],
        f"scoring: {rows / scoring.here:,.0f} rows a second here, {rows / scoring.on_cluster:,.0f} on the cluster",
        f"verifying: {calls / verifying.here:,.0f} calls a second here, {calls / verifying.on_cluster:,.0f} there",
        f"starting the cluster and its workers' imports: {cold:.1f} s",
    )


def _ratio(times: Times) -> str:
    return f"{times.here / times.on_cluster:.2f}"


def _both(cluster: LocalCluster, work: Callable[[], DatasetRef], rows_per_shard: int) -> Times:
    """Seconds of the work in this process and on the cluster, each from nothing."""
    here, made = _timed(work)
    shutil.rmtree(home() / "steps")
    for parent in ("scored", "verifications"):
        shutil.rmtree(home() / "datasets" / parent, ignore_errors=True)
    with _on(cluster, rows_per_shard):
        there, again = _timed(work)
    if made != again:
        raise SystemExit(f"the cluster made {again}, this process {made}")
    return Times(here, there)


def _timed(work: Callable[[], DatasetRef]) -> tuple[float, DatasetRef]:
    started = time.perf_counter()
    made = work()
    return time.perf_counter() - started, made


class _on:
    """Inside, steps are done on the cluster."""

    def __init__(self, cluster: LocalCluster, rows_per_shard: int) -> None:
        self._variables = {CLUSTER: cluster.scheduler_address, SHARD_ROWS: str(rows_per_shard)}

    def __enter__(self) -> None:
        os.environ.update(self._variables)

    def __exit__(self, *raised: object) -> None:
        for name in self._variables:
            del os.environ[name]


def _to_score(count: int) -> tuple[DatasetRef, DatasetRef]:
    def rollouts() -> Iterator[Rollout]:
        for number in range(count):
            prompt, index = divmod(number, ROLLOUTS_PER_PROMPT)
            answer = prompt % 97 if number % 3 else prompt % 89
            text = f"{prompt} + {index} = {prompt + index}\nThen half of that is sold.\n{MARKER} {answer}"
            yield _rollout(f"p{prompt}", index, f"{text} apples" if number % 5 else f"{text}.00")

    rows = (Prompt(prompt_id=f"p{n}", source="bench", prompt=f"Add up {n}.", answer=str(n % 97)) for n in range(count))
    prompts = write_rows(islice(rows, -(-count // ROLLOUTS_PER_PROMPT)), Prompt, step="prompts")
    return write_rows(rollouts(), Rollout, step="rollouts"), prompts


def _to_verify(count: int) -> tuple[DatasetRef, DatasetRef, DatasetRef]:
    sys.path.append(str(REPOSITORY))  # the tests are not installed
    honest = importlib.import_module("tests.sandbox.honest").HONEST
    instructions = -(-count // 10)
    checked = (
        CheckedVerifier(
            verifier_id=f"v{number}",
            instruction_id=f"i{number // VERIFIERS}",
            source=f"{one.source}# {number}\n",
            kept=True,
            reason="kept",
            agreement=1.0,
            held_out_agreement=1.0,
            cases=8,
            isolation="bench",
        )
        for number, one in enumerate(islice(cycle(honest), instructions * VERIFIERS))
    )
    instances = (
        Instance(
            prompt_id=f"p{number}",
            instruction_id=f"i{number // 10}",
            query_id="q",
            prompt=f"Say {number}.",
            query="Say it.",
            instruction="Briefly.",
            split="train",
        )
        for number in range(count)
    )
    texts = cycle([text for one in honest for text in one.responses if text.isprintable()])
    drawn = (_rollout(f"p{n}", i, f"{next(texts)} {n} {i}") for n in range(count) for i in range(COMPLETIONS))
    return (
        write_rows(instances, Instance, step="instances"),
        write_rows(checked, CheckedVerifier, step="checked"),
        write_rows(drawn, Rollout, step="rollouts"),
    )


def _rollout(prompt_id: str, index: int, completion: str) -> Rollout:
    return Rollout(
        prompt_id=prompt_id,
        rollout_index=index,
        prompt=f"Prompt {prompt_id}, with a few words more than that.",
        completion=completion,
        prompt_tokens=12,
        completion_tokens=24,
        finish_reason="stop",
        cumulative_logprob=-3.5,
        seed=index,
        policy="bench",
    )


if __name__ == "__main__":
    main()
