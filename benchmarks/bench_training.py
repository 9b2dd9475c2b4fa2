"""Tokens per second of training, and seconds of a whole step, through ours and through a bare TRL script.

    python benchmarks/bench_training.py [--what sft,dpo,padding] [--hidden 64,256] [--rounds 2] [--model FOLDER]

Same rows (GSM8K's solutions where RATCHET_DATA holds them, else made-up problems), model, batches, optimizer, schedule
and threads; the sides in turn, each in a process of its own. The script is bare_training.py, once as one writes it and
once set up as our step sets up its child: the allocator's environment and, on a CPU, a head that scores no prompts.
The first ratio is what a user gets, the second what our own lines, metrics and checkpoints cost.

Without --model, a Phi with random weights of each of these hidden sizes. Packed rows are compared with rows padded to
the longest of their batch, and to 384 tokens, which is what seed 0 did.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tables import REPOSITORY, show

LENGTH = 384  # tokens, seed 0's
BATCH = 16
WARMUP = {"sft": 0.05, "dpo": 0.1}
IMPORTING = 15  # seconds: what a run does between two trainings takes longer than what a training imports
# "second": not the first training of its run; "as ours": the script in our child's environment, scoring no prompts
SIDES = {
    "sft": ("ours", "bare", "as ours", "second"),
    "dpo": ("ours", "bare", "as ours"),
    "padding": ("packed", "ours", "to 384"),
}
Told = dict[str, float]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="sft,dpo,padding")
    parser.add_argument("--hidden", default="64,256")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--step", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        sys.stdout.write("\n" + json.dumps(through_our_step(**options.step)) + "\n")
        return
    for model in [options.model] if options.model else [int(size) for size in options.hidden.split(",")]:
        with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
            weights, lengths = prepare(Path(folder), model, options.rows)
            for what in options.what.split(","):
                told: dict[str, list[Told]] = {side: [] for side in SIDES[what]}
                for turn in range(options.rounds):
                    for side in SIDES[what][:: -1 if turn % 2 else 1]:
                        told[side].append(_measure(what, side, weights, Path(folder), lengths, options))
                title = f"Training, {what}, {model if options.model else f'hidden size {model}'}"
                rows = _padding_rows(told) if what == "padding" else _rows(told)
                about = (
                    f"{len(lengths)} rows of {sum(lengths) / len(lengths):.0f} tokens, {max(lengths)} at most; "
                    f"{options.threads} threads, best of {options.rounds} rounds"
                )
                show(title, rows, *(_said(side, told[side]) for side in told), about)


def prepare(folder: Path, model: Path | int, count: int) -> tuple[Path, list[int]]:
    """Write rows of at most LENGTH tokens as TRL wants them, and the model; its folder, and the rows' lengths."""
    from models.chat import load_tokenizer, render_conversation
    from models.specs import TinyModel
    from models.tiny import save_untrained

    solved = list(islice(_solutions(), 4 * count))
    if isinstance(model, int):
        shape: dict[str, Any] = {"hidden_size": model, "layers": 4, "heads": max(2, model // 32), "context": LENGTH}
        texts = (f"Instruct: {prompt}\nOutput:\n{completion}" for prompt, completion in solved)
        save_untrained(TinyModel(**shape, vocabulary=3000), texts, folder / "model")
        model = folder / "model"
    tokenizer = load_tokenizer(str(model), None, False)
    sft: list[dict[str, Any]] = []
    dpo: list[dict[str, Any]] = []
    lengths: list[int] = []
    for (prompt, right), (_, other) in zip(solved, solved[1:] + solved[:1], strict=True):
        asked = [{"role": "user", "content": prompt}]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (right, other))
        sizes = [len(render_conversation(tokenizer, asked + side).ids) for side in (chosen, rejected)]
        if max(sizes) <= LENGTH and len(sft) < count:
            sft.append({"prompt": asked, "completion": chosen})
            dpo.append({"prompt": asked, "chosen": chosen, "rejected": rejected})
            lengths.append(sizes[0])
    for kind, rows in (("sft", sft), ("dpo", dpo)):
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, lengths


def through_our_step(kind: str, model: str, rows: str, home: str, settings: dict[str, Any], second: bool) -> Told:
    """In a process that stands for the run: one step without Prefect, after another one if it is to be the second."""
    os.environ["RATCHET_HOME"] = home
    from models import worker
    from models.specs import SFT, ModelRef, Preference, PromptTemplate
    from storage.datasets import write_rows
    from storage.rows import Demonstration, Pair
    from tasks import training
    from tasks.loading import open_folder

    outcomes: list[tuple[Any, float]] = []

    def run_job(*arguments: Any, **named: Any) -> Any:
        outcome = worker.run_job(*arguments, **named)
        figures = [json.loads(line) for line in outcome.metrics.read_text().splitlines()]
        outcomes.append((outcome, [figure["value"] for figure in figures if figure["name"] == "loss"][-1]))
        return outcome

    training.run_job = run_job  # type: ignore[attr-defined]  # to see what came of it
    start, texts = open_folder(ModelRef(name=model)), _read(Path(rows))
    if kind == "dpo":
        pairs = (write_rows((_filled(Pair, n, text) for n, text in enumerate(texts)), Pair, step="pairs"),)

        def step(chosen: dict[str, Any]) -> ModelRef:
            return training.train_preferences(start, pairs, PromptTemplate(), Preference(**chosen))
    else:
        filled = (_filled(Demonstration, n, text) for n, text in enumerate(texts))
        solved = (write_rows(filled, Demonstration, step="demonstrations"),)

        def step(chosen: dict[str, Any]) -> ModelRef:
            return training.train_sft(start, solved, PromptTemplate(), SFT(**chosen))

    if second:
        step(settings | {"max_steps": 1})
        time.sleep(IMPORTING)
    started = time.perf_counter()
    step(settings)
    whole = time.perf_counter() - started
    outcome, loss = outcomes[-1]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"seconds": outcome.seconds, "tokens": outcome.tokens, "loss": loss, "whole": whole, "peak MiB": peak}


def _measure(what: str, side: str, model: Path, folder: Path, lengths: list[int], options: argparse.Namespace) -> Told:
    kind = "dpo" if what == "dpo" else "sft"
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as name:
        place = {"model": str(model), "rows": str(folder / f"{kind}.jsonl")}
        if side in ("ours", "second", "packed"):
            settings = _settings(kind, options) | (_packing(lengths) if side == "packed" else {})
            asked = {"kind": kind, **place, "home": name, "settings": settings, "second": side == "second"}
            return _run([__file__, "--step", json.dumps(asked)], name, {})
        steps = options.epochs * -(-len(lengths) // BATCH)
        more = {"steps": steps, "warmup": round(WARMUP[kind] * steps), "logging": max(1, min(25, steps // 20))}
        more |= {"batch": BATCH, "max-length": LENGTH} | ({"pad-to": LENGTH} if side == "to 384" else {})
        given = [f"--{name}={value}" for name, value in {**place, "output": f"{name}/model", **more}.items()]
        environment = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        if side != "bare":
            from models.children import environment as ours

            given, environment = [*given, "--completions-only"], ours(offline=True, **environment)
        started = time.perf_counter()
        told = _run([f"{REPOSITORY}/benchmarks/bare_training.py", kind, *given], name, environment)
        return told | {"whole": time.perf_counter() - started}


def _settings(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    common = {"global_batch_size": BATCH, "max_length": LENGTH, "epochs": options.epochs, "threads": options.threads}
    common |= {"warmup_ratio": WARMUP[kind]}
    if kind == "sft":
        return {**common, "learning_rate": 5e-4}
    loss = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0], "beta": 0.5}
    return {**common, **loss, "learning_rate": 1e-4, "schedule": "linear"}


def _packing(lengths: list[int]) -> dict[str, Any]:
    """As many tokens to an optimizer step as sixteen rows have."""
    return {"packing": True, "global_batch_size": max(1, round(BATCH * sum(lengths) / len(lengths) / LENGTH))}


def _run(arguments: list[str], scratch: str, environment: dict[str, str]) -> Told:
    own = {"HF_HOME": f"{scratch}/hub", "PYTHONPATH": str(REPOSITORY)}  # nothing is taken from an earlier round
    child = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment, **own},
    )
    peaks: list[float] = []
    watcher = threading.Thread(target=_watch_gpu, args=(child, peaks), daemon=True)
    watcher.start()
    out, errors = child.communicate()
    if child.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{errors[-3000:]}")
    watcher.join()
    told: Told = json.loads(out.splitlines()[-1])
    return told | ({"GPU MiB": max(peaks)} if peaks else {})


def _watch_gpu(child: subprocess.Popen[str], peaks: list[float]) -> None:
    """Note what is taken of the first GPU's memory, in MiB, until the child ends; nothing where there is none."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    while shutil.which(asked[0]) and child.poll() is None:
        peaks.append(float(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]))
        time.sleep(0.5)


def _rows(told: dict[str, list[Told]]) -> list[tuple[str, str]]:
    assert {one["tokens"] for told_of_one in told.values() for one in told_of_one} == {told["ours"][0]["tokens"]}
    rows = [
        ("ours / bare script, tokens per second", _ratio(told, "ours", "bare", _speed)),
        ("ours / script set up as ours, tokens per second", _ratio(told, "ours", "as ours", _speed)),
        ("seconds but for training, ours / bare", _ratio(told, "ours", "bare", _around)),
    ]
    if "second" in told:
        rows.append(("  the second training of a run / bare", _ratio(told, "second", "bare", _around)))
    rows.append(("seconds of the whole step / script", _ratio(told, "ours", "bare", _whole)))
    return [*rows, ("loss at the end, ours - bare", f"{told['ours'][0]['loss'] - told['bare'][0]['loss']:.5f}")]


def _padding_rows(told: dict[str, list[Told]]) -> list[tuple[str, str]]:
    return [
        ("packed / padded to 384, tokens of text per second", _ratio(told, "packed", "to 384", _speed)),
        ("padded to the longest of its batch / to 384", _ratio(told, "ours", "to 384", _speed)),
        ("packed / padded to the longest of its batch", _ratio(told, "packed", "ours", _speed)),
    ]


def _ratio(told: dict[str, list[Told]], one: str, other: str, of: Callable[[Told], float]) -> str:
    """Best round to best round, and the least and the most of the rounds' ratios."""
    ratios = sorted(of(a) / of(b) for a, b in zip(told[one], told[other], strict=True))
    return f"{_best(of, told[one]) / _best(of, told[other]):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def _best(of: Callable[[Told], float], told: Sequence[Told]) -> float:
    """Others' work on the machine only ever makes a round slower."""
    return (max if of is _speed else min)(map(of, told))


def _said(side: str, told: Sequence[Told]) -> str:
    speed, around, whole = (_best(of, told) for of in (_speed, _around, _whole))
    memory = ", ".join(f"{name} {max(one[name] for one in told):,.0f}" for name in told[0] if name.endswith("MiB"))
    loss = f"loss {told[0]['loss']:.4f}"
    return f"{side}: {speed:,.0f} tokens/s, {whole:.1f} s, of them {around:.1f} not of training; {loss}, {memory}"


def _speed(told: Told) -> float:
    return told["tokens"] / told["seconds"]


def _around(told: Told) -> float:
    return told["whole"] - told["seconds"]


def _whole(told: Told) -> float:
    return told["whole"]


def _solutions() -> Iterator[tuple[str, str]]:
    from storage.arithmetic import Arithmetic
    from storage.hub import Columns, Source, is_at_hand, read_source

    columns = Columns(prompt="question", answer="answer", completion="answer")
    gsm8k = Source(hub="openai/gsm8k", config="main", columns=columns, answer_after="####")
    source = gsm8k if is_at_hand(gsm8k) else Source(arithmetic=Arithmetic(problems=10_000))
    return ((row.prompt, row.completion or "") for row in read_source(source))


def _read(file: Path) -> list[dict[str, str]]:
    """TRL's rows with plain text in the place of messages."""
    rows = map(json.loads, file.read_text().splitlines())
    return [{name: messages[0]["content"] for name, messages in row.items()} for row in rows]


def _filled(row_type: Any, number: int, texts: dict[str, str]) -> Any:
    """A row of ours with these texts, and nothing known beside them."""
    known: dict[str, Any] = {"prompt_id": f"{number:032x}", "task": "solve", "iteration": 0, "source": "benchmark"}
    known |= {"rule": "zip", "swapped": False, **texts}
    return row_type(**{name: known.get(name) for name in row_type.__dataclass_fields__})


if __name__ == "__main__":
    main()
