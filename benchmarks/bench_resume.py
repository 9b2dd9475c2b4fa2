"""Rollouts drawn again after a kill -9 at 60 % of a sampling step; distilabel's pipeline on as many rows beside it.

    python benchmarks/bench_resume.py [--short 12000] [--long 40000]

No model takes part: an engine that takes its time is all that a kill can cost. Ours draws eight shards at once, one
rollout of each at a time: eight are in flight. Two steps, a short one of rollouts of 1.5 ms and one of about a minute.
"""

import argparse
import mmap
import os
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tables import peer, show

PER_PROMPT = 8
SHARE = 0.6
SHORT_SECONDS, LONG_SECONDS = 0.0015, 0.012  # that a rollout takes
BATCHES = (50, 1_000)  # of distilabel; the first is its default


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, default=12_000, help="rollouts of the short step")
    parser.add_argument("--long", type=int, default=40_000, help="rollouts of the long one")
    parser.add_argument("--rounds", type=int, default=3, help="of the short step")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--delay", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sample(options.child, options.rows, options.delay)
        return
    short = [ours(options.short, SHORT_SECONDS) for _ in range(options.rounds)]
    long = ours(options.long, LONG_SECONDS)
    rows = [
        (f"ours, {options.short:,} rollouts: drawn again / all", f"{statistics.median(short) / options.short:.2%}"),
        ("  rollouts", f"{statistics.median(short):.0f}"),
        (f"ours, {options.long:,} rollouts: drawn again / all", f"{long / options.long:.2%}"),
        ("  rollouts", f"{long}"),
    ]
    if peer("distilabel"):
        rows += [(f"distilabel, batches of {batch:,}", theirs(options.short, batch)) for batch in BATCHES]
    note = f"killed at {SHARE:.0%}; eight rollouts in flight; short step: {', '.join(map(str, short))} drawn again"
    show("Rollouts drawn again after kill -9", rows, note, "" if peer("distilabel") else "`make peers` adds distilabel")


def ours(rows: int, delay: float) -> int:
    """How many rollouts our step draws again."""
    with tempfile.TemporaryDirectory() as folder:
        command = [__file__, "--child", folder, "--rows", str(rows), "--delay", str(delay)]
        again = _killed_and_resumed(Path(folder), command, rows, patience_seconds=60 + rows * delay)
    if isinstance(again, str):
        raise SystemExit(f"ours {again}")
    return again


def theirs(rows: int, batch: int) -> str:
    """What comes of distilabel's pipeline."""
    script = str(Path(__file__).with_name("distilabel_rows.py"))
    with tempfile.TemporaryDirectory() as folder:
        command = [script, "--use-cache", "--cache", folder, "--rows", str(rows), "--delay", str(SHORT_SECONDS)]
        command += ["--batch", str(batch)]
        again = _killed_and_resumed(Path(folder), command, rows, patience_seconds=30 + 3 * rows * SHORT_SECONDS)
    return again if isinstance(again, str) else f"{again / rows:.2%}, {again:,} rollouts"


def sample(home: Path, rows: int, seconds: float) -> None:
    """One sampling step on the fake engine; `drawn-<pid>.count` says how many rollouts it has drawn, killed or not."""
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
    note = home / f"drawn-{os.getpid()}.count"
    note.write_bytes(bytes(8))
    with note.open("r+b") as file:
        counter = mmap.mmap(file.fileno(), 8)  # the kernel keeps what a killed process wrote there

    def tell() -> None:
        while True:
            struct.pack_into("<q", counter, 0, rollouts_generated())
            time.sleep(0.001)

    threading.Thread(target=tell, daemon=True).start()
    sampling = Sampling(rollouts_per_prompt=PER_PROMPT, prompts_per_shard=250)
    sample_rollouts(ModelRef(name="fake:0.5"), prompts, PromptTemplate(), sampling, Fake(seconds_per_request=seconds))
    struct.pack_into("<q", counter, 0, rollouts_generated())


def _killed_and_resumed(folder: Path, command: list[str], rows: int, *, patience_seconds: float) -> int | str:
    """Kill it at the share, run it again; how many rows were drawn more than once, or what came in between."""
    silent = {"start_new_session": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen([sys.executable, *command], **silent)  # type: ignore[call-overload]
    while _drawn(folder) < SHARE * rows:
        if first.poll() is not None:
            raise SystemExit(f"{command} ended before it could be killed, with exit code {first.returncode}")
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    second = subprocess.Popen([sys.executable, *command], **silent)  # type: ignore[call-overload]
    try:
        second.wait(patience_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(second.pid, signal.SIGKILL)
        return f"run again, it did not end in {patience_seconds:.0f} s"
    if second.returncode:
        return f"run again, it failed with exit code {second.returncode}"
    return _drawn(folder) - rows


def _drawn(folder: Path) -> int:
    theirs = sum(int(line) for file in folder.glob("drawn*.txt") for line in file.read_text().split())
    return theirs + sum(struct.unpack("<q", file.read_bytes() or bytes(8))[0] for file in folder.glob("drawn*.count"))


if __name__ == "__main__":
    main()
