"""Rollouts drawn again after a kill -9 at 60 % of a sampling step; distilabel's pipeline on as many rows beside it.

    python benchmarks/bench_resume.py [--rows 20000] [--milliseconds 1]

No model takes part: an engine that takes its time is all that a kill can cost. Ours draws shards in eight threads.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tables import peer, show

PER_PROMPT = 8
SHARE = 0.6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--milliseconds", type=float, default=1.0, help="that a rollout takes")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sample(options.child, options.rows, options.milliseconds / 1000)
        return
    with tempfile.TemporaryDirectory() as folder:
        again = _killed_and_resumed(options, Path(folder), [__file__, "--child", folder])
    rows = [("ours, drawn again / all", again)]
    notes = [f"{options.rows:,} rollouts, killed at {SHARE:.0%}"]
    if peer("distilabel"):
        script = str(Path(__file__).with_name("distilabel_rows.py"))
        with tempfile.TemporaryDirectory() as folder:
            command = [script, "--use-cache", "--cache", folder, "--delay", str(options.milliseconds / 1000)]
            again = _killed_and_resumed(options, Path(folder), command)
        rows.append(("distilabel, drawn again / all", again))
        notes.append("distilabel in batches of 1,000, its cache on")
    else:
        notes.append("distilabel is not installed: `make peers` adds its row")
    show("Rollouts drawn again after kill -9", rows, *notes)


def sample(home: Path, rows: int, seconds: float) -> None:
    """One sampling step on the fake engine; `drawn.txt` says how many rollouts it has drawn, a line a process."""
    os.environ["RATCHET_HOME"] = str(home / "home")
    from models.specs import Fake, ModelRef, PromptTemplate, Sampling
    from storage.datasets import write_rows
    from storage.rows import Prompt
    from tasks.sampling import sample_rollouts
    from tasks.serving import rollouts_generated

    count = rows // PER_PROMPT
    asked = {f"{number:032x}": f"What is {number} + 1?" for number in range(count)}
    made = (Prompt(prompt_id=one, source="made up", prompt=text, answer=None) for one, text in asked.items())
    prompts = write_rows(made, Prompt, step="prompts")
    note = home / f"drawn-{os.getpid()}.txt"

    def tell() -> None:
        while True:
            note.write_text(str(rollouts_generated()))
            time.sleep(0.01)

    threading.Thread(target=tell, daemon=True).start()
    sampling = Sampling(rollouts_per_prompt=PER_PROMPT, prompts_per_shard=250)
    sample_rollouts(ModelRef(name="fake:0.5"), prompts, PromptTemplate(), sampling, Fake(seconds_per_request=seconds))
    note.write_text(str(rollouts_generated()))


def _killed_and_resumed(options: argparse.Namespace, folder: Path, command: list[str]) -> str:
    """Kill it at the share, run it again; the share of rows drawn more than once, or what came in between."""
    arguments = [sys.executable, *command, "--rows", str(options.rows)]
    first = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while _drawn(folder) < SHARE * options.rows:
        if first.poll() is not None:
            raise SystemExit(f"{command} ended before it could be killed, with exit code {first.returncode}")
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    second = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        second.wait(patience := 60 + 3 * options.rows * options.milliseconds / 1000)
    except subprocess.TimeoutExpired:
        os.killpg(second.pid, signal.SIGKILL)
        return f"not ended {patience:.0f} s after it was run again"
    if second.returncode:
        return f"failed when it was run again, with exit code {second.returncode}"
    again = _drawn(folder) - options.rows
    return f"{again / options.rows:.2%}"


def _drawn(folder: Path) -> int:
    return sum(int(line or 0) for file in folder.glob("drawn*.txt") for line in file.read_text().split())


if __name__ == "__main__":
    main()
