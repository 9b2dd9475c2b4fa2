"""Final answers found and matched per second on one core, against Math-Verify where `make peers` has put it.

    python benchmarks/bench_answers.py [--rows 7473]

On the solutions of GSM8K's training split if RATCHET_DATA, or shared/data beside the checkout, has it; else on made-up
word problems. Each solution is matched with its own gold answer and with the next row's, so each text comes twice; in a
run it comes as often as rollouts of a prompt agree.
"""

import argparse
import importlib
import os
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tables import REPOSITORY, peer, show

from storage.arithmetic import Arithmetic
from storage.hub import Columns, Source, read_source
from tasks.answers import answers_match, extract_answer, parse_answer

MARKER = "FINAL ANSWER:"
FORMS = (
    "{}",
    "{}.",
    "**{}**",
    "${}",
    "{}.00",
    "\\boxed{{{}}}",
    "The answer is {}",
    "{} apples",
)  # as models write them
Matcher = Callable[[str, str], bool]


class Case(NamedTuple):
    """A solution and a gold answer."""

    solution: str
    gold: str


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=7_473)
    source, cases = _cases(parser.parse_args().rows)
    speed, right = _measure(_ours, cases)
    limit, right_by_text = _measure(_by_text, cases)
    rows = [
        ("splitting at the marker and comparing text / ours, rows per second", f"{limit / speed:.1f}"),
        ("judged right by comparing text / by ours", f"{right_by_text / right:.3f}"),
    ]
    notes = [f"{len(cases):,} pairs of a solution and an answer, half of them right, from {source}"]
    notes.append(f"ours: {speed:,.0f} rows a second on one core; {right / len(cases):.1%} judged right")
    if peer("math_verify"):
        half = len(cases) // 2
        few = cases[:1_000] + cases[half : half + 1_000]
        theirs, _ = _measure(_math_verify(), few)
        rows.append(("ours / Math-Verify, rows per second", f"{speed / theirs:.0f}"))
        agreed, classes = _compared(_math_verify(), few)
        rows.append(("same verdict where both read the answer", f"{agreed:.2%}"))
        notes += [f"disagreement: {what}: {count}, for instance {one!r}" for what, (count, one) in classes.items()]
    else:
        notes.append("Math-Verify is not installed: `make peers` adds its rows")
    show("Answers extracted and matched", rows, *notes)


def _measure(match: Matcher, cases: list[Case]) -> tuple[float, int]:
    """Rows per second, the best of three rounds over different texts, and how many were judged right."""
    match(*cases[0])
    speeds, right = [], 0
    for turn in range(3):
        fresh = [Case(f"{solution} ", f"{gold}{' ' * turn}") for solution, gold in cases]  # no cache has seen it
        parse_answer.cache_clear()
        started = time.perf_counter()
        right = sum(match(*case) for case in fresh)
        speeds.append(len(cases) / (time.perf_counter() - started))
    return max(speeds), right


def _ours(solution: str, gold: str) -> bool:
    found = extract_answer(solution, MARKER)
    return found is not None and answers_match(found, gold)


def _by_text(solution: str, gold: str) -> bool:
    return solution.rpartition(MARKER)[2].strip() == gold.strip()


def _math_verify() -> Matcher:
    library = importlib.import_module("math_verify")

    def match(solution: str, gold: str) -> bool:
        return bool(library.verify(library.parse(gold), library.parse(solution)))

    return match


def _compared(theirs: Matcher, cases: list[Case]) -> tuple[float, dict[str, tuple[int, Case]]]:
    """The share of equal verdicts where ours could read the answer, and the others by how they differ."""
    read, classes = 0, dict[str, tuple[int, Case]]()
    for case in cases:
        found = extract_answer(case.solution, MARKER)
        verdict, other = _ours(*case), theirs(*case)
        if found is None or parse_answer(found) is None:
            kind = "ours cannot read it"
        else:
            read += 1
            kind = "" if verdict == other else f"ours says {'right' if verdict else 'wrong'}"
        if kind:
            count, first = classes.get(kind, (0, Case((found or case.solution)[-60:], case.gold)))
            classes[kind] = (count + 1, first)
    differing = sum(count for kind, (count, _) in classes.items() if kind.startswith("ours says"))
    return 1 - differing / read, classes


def _cases(count: int) -> tuple[str, list[Case]]:
    source, told = _source(count)
    rows = list(islice(read_source(source), count))
    gold = [str(row.answer) for row in rows]
    forms = [FORMS[number % len(FORMS)].format(answer) for number, answer in enumerate(gold)]
    steps = [str(row.completion).split("####")[0].rstrip() for row in rows]
    solutions = [f"{text}\n{MARKER} {form}" for text, form in zip(steps, forms, strict=True)]
    right = zip(solutions, gold, strict=True)
    wrong = zip(solutions, [*gold[1:], gold[0]], strict=True)
    return told, [Case(*pair) for pair in (*right, *wrong)]


def _source(count: int) -> tuple[Source, str]:
    folder = Path(os.environ.setdefault("RATCHET_DATA", str(REPOSITORY.parent / "shared" / "data")))
    if not any((folder / name).is_dir() for name in ("gsm8k", "openai/gsm8k")):
        return Source(arithmetic=Arithmetic(problems=count)), "made-up word problems"
    columns = Columns(prompt="question", answer="answer", completion="answer")
    return Source(hub="openai/gsm8k", config="main", columns=columns, answer_after="####"), "GSM8K's training split"


if __name__ == "__main__":
    main()
