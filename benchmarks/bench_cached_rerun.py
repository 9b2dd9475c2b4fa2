"""A finished experiment run again, with nothing left to do: what that takes beyond the start of an interpreter.

    python benchmarks/bench_cached_rerun.py [--repeats 3]

With and without Prefect, against its first run; distilabel's cached re-run of a pipeline of as many rows beside it.
Interpreter start is told in two ways: Python alone, and Python with the imports that the command and its recipe take.
With Prefect there is a second interpreter to start, that of the server; how long a bare server takes is measured too.

The engine is a fake one that takes no time, and training takes none, so a first run is all overhead: with a model, the
first run takes minutes or days, and the re-run what it takes here.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tables import REPOSITORY, peer, run_smoke, seconds, show, told_by

ITERATIONS, PLAINLY = "iterations=3", "--no-prefect-server"
IMPORTS = "import flows.__main__, flows.server\nwith flows.server.importing_prefect():\n    import flows.rest_em"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="re-runs of which the median counts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as name:
        folder = Path(name)
        plain, prefect, server, theirs = (folder / part for part in ("plain", "prefect", "server", "distilabel"))
        first = {"plain": _run(plain, PLAINLY), "prefect": _run(prefect)}
        _bare_server(server)  # makes its database
        timed: dict[str, Callable[[], float]] = {
            "python": lambda: _python("pass"),
            "imports": lambda: _python(IMPORTS),
            "plain": lambda: _run(plain, PLAINLY),
            "server": lambda: _bare_server(server),
            "prefect": lambda: _run(prefect),
        }
        before, rollouts = _records(plain), _rollouts(plain)
        if peer("distilabel"):
            first["distilabel"] = _distilabel(theirs, rollouts)
            timed["distilabel"] = lambda: _distilabel(theirs, rollouts)
            timed["their imports"] = lambda: _python("import distilabel.pipeline, distilabel.steps")
        turns = [{what: measure() for what, measure in timed.items()} for _ in range(options.repeats)]
        again = [*_records(plain)[len(before) :], *_records(prefect)[len(before) :]]
        if not all(record["cached"] for record in again):
            raise SystemExit("the re-run was to be all cached, but a step ran")
        found = len(again) // (2 * options.repeats)
    _show(first, turns, f"{found} cached steps, {rollouts:,} rollouts; median of {options.repeats}, range in brackets")


def _show(first: dict[str, float], turns: list[dict[str, float]], note: str) -> None:
    spent = {what: statistics.median(turn[what] for turn in turns) for what in turns[0]}

    def beyond(what: str, start: str) -> str:
        differences = [turn[what] - turn[start] for turn in turns]
        return f"{statistics.median(differences):.2f} s [{min(differences):.2f}-{max(differences):.2f}]"

    rows = [
        ("cached re-run / first run, without Prefect", f"{spent['plain'] / first['plain']:.2f}"),
        ("  beyond Python alone", beyond("plain", "python")),
        ("  beyond Python and imports", beyond("plain", "imports")),
        ("cached re-run / first run, with a private Prefect server", f"{spent['prefect'] / first['prefect']:.2f}"),
        ("  beyond Python alone", beyond("prefect", "python")),
        ("  beyond Python and imports", beyond("prefect", "imports")),
        ("  beyond a bare Prefect server's first answer", beyond("prefect", "server")),
    ]
    if "distilabel" in spent:
        rows += [
            ("distilabel, cached re-run / first run", f"{spent['distilabel'] / first['distilabel']:.2f}"),
            ("  beyond Python alone", beyond("distilabel", "python")),
            ("  beyond Python and imports", beyond("distilabel", "their imports")),
        ]
    told = ", ".join(f"{what} {seconds(took)}" for what, took in spent.items())
    firsts = ", ".join(f"{what} {seconds(took)}" for what, took in first.items())
    show("Fully cached re-run of a finished three-iteration experiment", rows, note, told, f"first runs: {firsts}")


def _run(home: Path, *options: str) -> float:
    return run_smoke(home, "--set", ITERATIONS, *options)


def _records(home: Path) -> list[dict[str, object]]:
    lines = (home / "experiments/rest-em-smoke/steps.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _rollouts(home: Path) -> int:
    return sum(int(str(record["rows"])) for record in _records(home) if record["step"] == "gather_rollouts")


def _python(code: str) -> float:
    started = time.perf_counter()
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / ".peers")])
    environment = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, env=environment, capture_output=True)
    return time.perf_counter() - started


def _bare_server(home: Path) -> float:
    """Seconds until `prefect server start` answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    started = time.perf_counter()
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2).close()
            except OSError:
                time.sleep(0.02)
            else:
                return time.perf_counter() - started
        raise SystemExit(f"the bare Prefect server ended with {server.returncode}")
    finally:
        server.terminate()
        server.wait()


def _distilabel(cache: Path, rows: int) -> float:
    script = str(Path(__file__).with_name("distilabel_rows.py"))
    started = time.perf_counter()
    told_by(script, "--rows", str(rows), "--batch", "1000", "--cache", str(cache), "--use-cache")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
