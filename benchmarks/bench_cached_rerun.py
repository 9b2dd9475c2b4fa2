"""A finished experiment run again, when there is nothing left to do: against its first run, with and without Prefect.

    python benchmarks/bench_cached_rerun.py [--repeats 3]

The engine is a fake one that takes no time, and training takes none, so a first run is all overhead too: with a model,
the first run takes minutes or days, and the re-run what it takes here.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tables import REPOSITORY, run_smoke, seconds, show

ITERATIONS, PLAINLY = "iterations=3", "--no-prefect-server"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="re-runs of which the median counts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        plain, prefect = Path(folder) / "plain", Path(folder) / "prefect"
        first_plain, first_prefect = _run(plain, PLAINLY), _run(prefect)
        steps = _records(plain)
        turns = [(_start(), _run(plain, PLAINLY), _run(prefect)) for _ in range(options.repeats)]
        again = [*_records(plain)[len(steps) :], *_records(prefect)[len(steps) :]]
        if not all('"cached":true' in line for line in again):
            raise SystemExit("the re-run was to be all cached, but a step ran")
        found = len(again) // (2 * options.repeats)
    start, again_plain, again_prefect = (statistics.median(turn) for turn in zip(*turns, strict=True))
    rows = [
        ("cached re-run / first run, without Prefect", f"{again_plain / first_plain:.2f}"),
        ("cached re-run / first run, with Prefect", f"{again_prefect / first_prefect:.2f}"),
        ("cached re-run with Prefect / without", f"{again_prefect / again_plain:.2f}"),
        ("cached re-run without Prefect / start of Python and imports", f"{again_plain / start:.2f}"),
    ]
    note = f"{found} cached steps; re-run {seconds(again_plain)} without Prefect, {seconds(again_prefect)} with"
    show("Fully cached re-run of a finished three-iteration experiment", rows, note)


def _run(home: Path, *options: str) -> float:
    return run_smoke(home, "--set", ITERATIONS, *options)


def _records(home: Path) -> list[str]:
    return (home / "experiments/rest-em-smoke/steps.jsonl").read_text().splitlines()


def _start() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import flows.__main__, flows.rest_em"], cwd=REPOSITORY, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
