"""A million rollouts written, scored, selected and paired, against distilabel and against plain pyarrow.

    python benchmarks/bench_rows.py [--rows 1000000] [--peer-rows 100000]

No model takes part: rollouts are made up, eight a prompt, three in eight right. Each side runs in a process of its own.
Distilabel (`make peers` installs it) puts the same rows through three steps that score, select and pair as ours do.
"""

import argparse
import gc
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tables import peer, show, told_by

MARKER = "FINAL ANSWER:"
PER_PROMPT = 8
STAGES = ("write", "score", "select", "pair")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--peer-rows", type=int, default=100_000)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        sys.stdout.write(json.dumps(SIDES[options.side](options.rows)))
        return
    few, many = _apart("ours", options.rows // 10), _apart("ours", options.rows)
    limit = _apart("pyarrow", options.rows)
    rows = [(f"ours / plain pyarrow, {stage}", f"{many[stage] / limit[stage]:.1f}") for stage in STAGES]
    total, least = (sum(side[stage] for stage in STAGES) for side in (many, limit))
    rows.append(("ours / plain pyarrow, all four", f"{total / least:.1f}"))
    rows.append(("ten times the rows / time", f"{total / sum(few[stage] for stage in STAGES):.1f}"))
    rows.append(("peak memory / 1 GiB", f"{many['peak MiB'] / 1024:.2f}"))
    notes = [f"ours: {options.rows / total:,.0f} rows a second of CPU time through all four, {options.rows:,} rows"]
    if peer("distilabel"):
        mine = options.rows / (total + many["make"])
        for batch, count in ((50, options.peer_rows // 10), (1_000, options.peer_rows)):
            rate = distilabel(count, batch)
            rows.append((f"ours / distilabel in batches of {batch:,}, rows per CPU second", f"{mine / rate:.0f}"))
            notes.append(f"distilabel: {rate:,.0f} of {count:,} rows in batches of {batch:,}, its start-up left out")
    else:
        notes.append("distilabel is not installed: `make peers` adds its row")
    show("Rollouts written, scored, selected and paired", rows, *notes)


def made_up(rows: int) -> Iterator[dict[str, Any]]:
    """Rollouts as they would come from an engine, in the order of their prompts."""
    text = "Ann has 3 apples and buys 4 more, then gives half of them to Bob who has 12. " * 3
    for number in range(rows // PER_PROMPT):
        for index in range(PER_PROMPT):
            steps = f"First we add {number} and {index}.\nThen we take away what is too much.\nStep {index}: see above."
            yield {
                "prompt_id": f"{number:032x}",
                "rollout_index": index,
                "prompt": f"Problem {number}: {text}",
                "completion": f"{steps}\n{MARKER} {number + index % 3}",
                "prompt_tokens": 60,
                "completion_tokens": 45,
                "finish_reason": "stop",
                "cumulative_logprob": -3.25 * index,
                "seed": PER_PROMPT * number + index,
                "policy": "d" * 32,
            }


def ours(rows: int) -> dict[str, float]:
    """CPU seconds of each stage as the pipeline does them, and the peak of memory."""
    from storage.datasets import write_rows
    from storage.rows import Prompt, Rollout
    from tasks.pairing import pair_rollouts
    from tasks.pairs import Pairing
    from tasks.scoring import score_answers
    from tasks.selecting import select_demonstrations
    from tasks.selection import Selection

    with tempfile.TemporaryDirectory() as home:
        os.environ["RATCHET_HOME"] = home
        gc.freeze()  # as a run does when it begins
        count = range(rows // PER_PROMPT)
        golds = (Prompt(prompt_id=f"{n:032x}", source="made up", prompt=f"{n}", answer=str(n)) for n in count)
        prompts = write_rows(golds, Prompt, step="prompts")
        spent = {"make": _timed(lambda: sum(1 for _ in made_up(rows)))[0]}
        rollouts = (Rollout(**row) for row in made_up(rows))
        spent["write"], written = _timed(lambda: write_rows(rollouts, Rollout, step="rollouts"))
        spent["write"] -= spent["make"]
        spent["score"], scored = _timed(lambda: score_answers(written, prompts, MARKER))
        spent["select"], _ = _timed(lambda: select_demonstrations(scored, Selection(), 1, MARKER))
        spent["pair"], _ = _timed(lambda: pair_rollouts(scored, Pairing(), 1))
    return spent | _peak()


def pyarrow(rows: int) -> dict[str, float]:
    """CPU seconds of the same with plain pyarrow: no digests, no reasons, text compared instead of numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.parquet") for name in STAGES}

        def write() -> None:
            every = made_up(rows)
            writer = None
            while batch := list(islice(every, 1_000)):
                table = pa.Table.from_pylist(batch)
                writer = writer or pq.ParquetWriter(files["write"], table.schema, compression="zstd")
                writer.write_table(table)
            assert writer is not None
            writer.close()

        def score() -> None:
            table = pq.read_table(files["write"])
            answer = pc.struct_field(pc.extract_regex(table["completion"], f"{MARKER} (?P<answer>.*)"), "answer")
            gold = pc.struct_field(pc.extract_regex(table["prompt"], "Problem (?P<gold>[0-9]+)"), "gold")
            reward = pc.cast(pc.equal(answer, gold), pa.float64())
            scored = table.append_column("answer", answer).append_column("reward", reward)
            pq.write_table(scored, files["score"], compression="zstd")

        def select() -> None:
            table = pq.read_table(files["score"])
            kept = table.filter(pc.equal(table["reward"], 1.0))
            distinct = kept.group_by(["prompt_id", "completion"], use_threads=False).aggregate(
                [("rollout_index", "min"), ("prompt", "first")]
            )
            pq.write_table(distinct, files["select"], compression="zstd")

        def pair() -> None:
            table = pq.read_table(files["score"], columns=["prompt_id", "prompt", "completion", "reward"])
            good, bad = (table.filter(pc.equal(table["reward"], reward)) for reward in (1.0, 0.0))
            sides = good.join(bad.drop_columns(["prompt"]), "prompt_id", join_type="inner", right_suffix="_rejected")
            pq.write_table(sides.slice(0, max(len(good), len(bad))), files["pair"], compression="zstd")

        made = _timed(lambda: sum(1 for _ in made_up(rows)))[0]
        spent = {name: _timed(stage)[0] for name, stage in zip(STAGES, (write, score, select, pair), strict=True)}
    return spent | {"write": spent["write"] - made} | _peak()


def distilabel(rows: int, batch: int) -> float:
    """Rows per second of CPU time, its start-up left out; 50 is its default for a batch."""
    script, seconds = Path(__file__).with_name("distilabel_rows.py"), []
    for count in (rows // 10, rows):
        with tempfile.TemporaryDirectory() as cache:
            command = (str(script), "--rows", str(count), "--batch", str(batch), "--cache", cache)
            seconds.append(told_by(*command)["cpu"])
    return (rows - rows // 10) / (seconds[1] - seconds[0])


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    outcome = work()
    return time.process_time() - started, outcome


def _peak() -> dict[str, float]:
    return {"peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _apart(side: str, rows: int) -> dict[str, float]:
    return told_by(__file__, "--side", side, "--rows", str(rows))


SIDES: dict[str, Callable[[int], dict[str, float]]] = {"ours": ours, "pyarrow": pyarrow}

if __name__ == "__main__":
    main()
