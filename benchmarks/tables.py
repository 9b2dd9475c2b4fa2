"""What all benchmarks share: a table on the terminal, the smoke preset run, a home for whole experiments."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
SMOKE = "deployments/presets/rest_em/smoke.yaml"


def show(title: str, rows: Sequence[tuple[str, str]], *notes: str) -> None:
    """Print a table of two columns, what was compared and how it came out, and notes below it."""
    width = max(len(what) for what, _ in rows)
    lines = [title, *(f"  {what:<{width}}  {told:>10}" for what, told in rows), *(f"  {note}" for note in notes)]
    sys.stdout.write("\n".join(lines) + "\n\n")


def run_smoke(home: Path, *options: str) -> float:
    """Run the smoke preset in a process of its own; the seconds it took."""
    command = [sys.executable, "-m", "flows", "run", SMOKE, "--home", str(home), *options]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the smoke run failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def told_by(*command: str, limit_seconds: float | None = None) -> dict[str, float]:
    """What a script that is run in a process of its own tells on its standard output: a JSON object, its last thing.

    Args:
        limit_seconds: that it may take.
    """
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=limit_seconds)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    measured: dict[str, float] = json.loads(done.stdout[done.stdout.rindex("{") :])
    return measured


@contextmanager
def experiments(doc: str | None, more: Callable[[argparse.ArgumentParser], object] = lambda _: None) -> Iterator[Any]:
    """The options of a script that runs whole experiments, in the home that they name or in one for the time being.

    Args:
        more: adds options of the script's own.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--home")
    parser.add_argument("--lock", help="hold this file's lock while models are at work")
    more(parser)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.home or stack.enter_context(tempfile.TemporaryDirectory(prefix="ratchet-bench-"))
        os.environ["RATCHET_HOME"] = str(folder)
        from flows.server import configure_prefect

        configure_prefect()
        yield options


def seconds(spent: float) -> str:
    """A time to read."""
    return f"{spent:.2f} s" if spent >= 0.1 else f"{1e3 * spent:.2f} ms"


def peer(name: str) -> bool:
    """Whether something to compare with can be imported: `make peers` puts them into .peers, outside the lock."""
    folder = str(REPOSITORY / ".peers")
    if folder not in sys.path:
        sys.path.append(folder)  # after ours, so that what both need is ours
    return importlib.util.find_spec(name) is not None
