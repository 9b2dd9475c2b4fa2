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

ITERATIONS = "iterations=3"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="re-runs of which the median counts")
    options = parser.parse_args()
    first_plain, again_plain, steps = _measure(options.repeats, "--no-prefect-server")
    first_prefect, again_prefect, _ = _measure(options.repeats)
    start = statistics.median(_start() for _ in range(options.repeats))
    rows = [
        ("cached re-run / first run, without Prefect", f"{again_plain / first_plain:.2f}"),
        ("cached re-run / first run, with Prefect", f"{again_prefect / first_prefect:.2f}"),
        ("cached re-run with Prefect / without", f"{again_prefect / again_plain:.2f}"),
        ("cached re-run without Prefect / start of Python and imports", f"{again_plain / start:.2f}"),
    ]
    note = f"{steps} cached steps; re-run {seconds(again_plain)} without Prefect, {seconds(again_prefect)} with"
    show("Fully cached re-run of a finished three-iteration experiment", rows, note)


def _measure(repeats: int, *options: str) -> tuple[float, float, int]:
    """Seconds of the first run and of a re-run, and how many steps the latter found."""
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        home = Path(folder) / "home"
        first = run_smoke(home, "--set", ITERATIONS, *options)
        lines = home / "experiments/rest-em-smoke/steps.jsonl"
        before = len(lines.read_text().splitlines())
        again = [run_smoke(home, "--set", ITERATIONS, *options) for _ in range(repeats)]
        found = lines.read_text().splitlines()[before:]
        if not all('"cached":true' in line for line in found):
            raise SystemExit("the re-run was to be all cached, but a step ran")
        return first, statistics.median(again), len(found) // repeats


def _start() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import flows.__main__, flows.rest_em"], cwd=REPOSITORY, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
