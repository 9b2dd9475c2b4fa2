"""What all benchmarks share: a table on the terminal, and the command run on the smoke preset."""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

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


def seconds(spent: float) -> str:
    """A time to read."""
    return f"{spent:.2f} s" if spent >= 0.1 else f"{1e3 * spent:.2f} ms"


def peer(name: str) -> bool:
    """Whether something to compare with can be imported: `make peers` puts them into .peers, outside the lock."""
    folder = str(REPOSITORY / ".peers")
    if folder not in sys.path:
        sys.path.append(folder)  # after ours, so that what both need is ours
    return importlib.util.find_spec(name) is not None
