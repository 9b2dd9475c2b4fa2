"""The share of a run's wall time that is neither engine nor trainer.

    python benchmarks/bench_overhead.py [EXPERIMENT [--home DIR]]

Of the last run of an experiment in a home; without one, of smoke runs whose fake engine takes 10 ms a rollout and
whose training takes no time. The share depends on how long the engine takes, so look at an experiment of your own.
"""

import argparse
import os
import tempfile
from collections import Counter
from datetime import datetime
from pathlib import Path

from tables import run_smoke, seconds, show

from storage.experiments import Experiment, StepRecord

ENGINE, TRAINERS = ("sample_rollouts",), ("train_", "build_")
REQUEST_SECONDS = 0.01


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?")
    parser.add_argument("--home")
    options = parser.parse_args()
    if options.home:
        os.environ["RATCHET_HOME"] = options.home
    if options.experiment:
        _show_shares(Experiment(options.experiment), f"the last run of {options.experiment}")
        return
    for title, extra in (("a smoke run without Prefect", ["--no-prefect-server"]), ("a smoke run with Prefect", [])):
        with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
            os.environ["RATCHET_HOME"] = folder
            run_smoke(Path(folder), "--set", f"engine.seconds_per_request={REQUEST_SECONDS}", *extra)
            _show_shares(Experiment("rest-em-smoke"), f"{title}, {1e3 * REQUEST_SECONDS:.0f} ms a rollout")


def _show_shares(experiment: Experiment, title: str) -> None:
    state = experiment.state()
    if state.finished_at is None:
        raise SystemExit(f"{experiment.name} has not ended its last run ({state.state}); name one that has")
    wall = (datetime.fromisoformat(state.finished_at) - datetime.fromisoformat(state.started_at)).total_seconds()
    spent: Counter[str] = Counter()
    for record in experiment.steps(run=state.run):
        if record.shard is None:  # a shard's time is part of its step's
            spent[_kind(record)] += record.seconds  # type: ignore[assignment]  # Counter adds any number
    others = {name: took for name, took in spent.most_common() if name not in ("engine", "trainer")}
    inside = sum(others.values())
    outside = max(0.0, wall - sum(spent.values()))
    rows = [
        ("engine", _share(spent["engine"], wall)),
        ("trainer", _share(spent["trainer"], wall)),
        ("neither", _share(inside + outside, wall)),
        *((f"  {name}", _share(took, wall)) for name, took in list(others.items())[:4]),
        ("  between steps: records, reports, the orchestrator", _share(outside, wall)),
    ]
    show(f"Share of the wall time of {title}", rows, f"wall time {seconds(wall)}, known to a second")


def _kind(record: StepRecord) -> str:
    if record.step in ENGINE:
        return "engine"
    return "trainer" if record.step.startswith(TRAINERS) else record.step


def _share(part: float, wall: float) -> str:
    return f"{part / wall:.1%}" if wall else "-"


if __name__ == "__main__":
    main()
