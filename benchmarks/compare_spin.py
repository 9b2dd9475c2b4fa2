"""SPIN's repairs against plain SPIN and against fine-tuning, on the tiny preset with a known share of wrong labels.

    python benchmarks/compare_spin.py [--seeds 0,1,2] [--arms plain,judge] [--home DIR] [--lock FILE]

Each seed draws its own base, demonstrations' rollouts and training; all its arms share the base, the judge and the test
problems. Differences from plain SPIN are paired by problem and averaged over seeds first, so their interval is over
problems: how far seeds differ stands beside it. With --home, finished arms are reused.
"""

import contextlib
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from tables import experiments

if TYPE_CHECKING:
    from storage.experiments import Experiment
    from storage.hub import Source

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PRESET = ROOT / "deployments" / "presets" / "spin" / "tiny.yaml"
PLAIN = ("judge=null", "noise={}")
BY_SIGN = "judge.labelling={swap_at: 0.02, small_below: 0.02}"  # whatever the judge finds better is chosen
KEEP_ALL = "judge.labelling={swap_at: null, small_below: 0.02, between: keep}"
LABELS = (  # a weaker judge: one that was taught to say Correct or Incorrect
    "judge.base={corpus: {arithmetic: {problems: 12000, seed: 7}}, judged: ["
    "{arithmetic: {problems: 24000, seed: 7}, rows: {start: 12000}}, "
    "{arithmetic: {problems: 36000, seed: 7, quality: wrong}, rows: {start: 24000}}], "
    "tiny: {training: {max_steps: 4000}}}",
    'judge.asks={kind: labels, judge: {text: "$prompt\\nOutput:\\n$completion\\nVerdict:", label_tokens: one}}',
)
SFT = "sft={learning_rate: 5.0e-4, epochs: 1, max_length: 192, threads: 1}"  # TINY.md's, over the same rows as often
ARMS: dict[str, tuple[str, ...]] = {
    "plain": PLAIN,
    "sft": (*PLAIN, SFT),
    "judge": (BY_SIGN, "noise={}"),
    "neftune": ("judge=null", "noise={embedding: {alpha: 5}}"),
    "robust": (KEEP_ALL, "noise={robust: {}}"),
    "temperature": ("judge=null", "noise={temperature: 1.3}"),
    "reference": ("judge=null", "noise={reference: {noise: {scale: 0.5}}}"),
    "learned": ("judge=null", "noise={reference: {noise: {scale: 0.5, learned: {}}}}"),
    "adaptive": (),
    "sft+judge": (BY_SIGN, "noise={}", SFT),
    "weak judge": (*LABELS, BY_SIGN, "noise={}"),
    "weak adaptive": (*LABELS, "judge.labelling={swap_at: 0.5, small_below: 0.1}"),
}
SEEDED = ("seed", "sampling.seed", "base.tiny.training.seed", "base.corpus.arithmetic.seed", "preference.seed")


class Arm(NamedTuple):
    """What one arm of one seed came to."""

    base: dict[str, dict[str, float]]  # strategy -> value, low, high
    policies: list[dict[str, dict[str, float]]]  # by iteration
    values: list[dict[str, float]]  # mean@1 of each test problem, by iteration
    pairs: list[dict[str, float]]  # pair figures, by iteration


def main() -> None:
    """Run what is missing and print the table."""
    with experiments(__doc__, lambda parser: parser.add_argument("--arms", default=",".join(ARMS))) as options:
        seeds = [int(seed) for seed in options.seeds.split(",")]
        told = {}
        for seed in seeds:
            for arm in options.arms.split(","):
                told[arm, seed] = run_arm(arm, seed, options.lock)
        show(told, options.arms.split(","), seeds)


def run_arm(arm: str, seed: int, lock: str | None = None) -> Arm:
    """Run the preset as this arm with this seed; what is stored in the home is reused."""
    from flows.presets import Preset
    from flows.spin import Spin, spin
    from storage.experiments import Experiment

    overrides = [*(f"{name}={seed}" for name in SEEDED), *ARMS[arm]]
    if SFT in ARMS[arm]:
        overrides.append(f"sft.seed={seed}")
    name = f"spin-tiny-{arm.replace(' ', '-').replace('+', '-')}-{seed}"
    config = Preset(PRESET, [*overrides, f"experiment={name}"]).config(Spin)
    with locked(lock):
        spin.fn(config)
    told = figures_of(Experiment(name), config.demonstrations)
    sys.stdout.write(f"seed {seed}, {arm}: {told.policies[-1]}\n")
    sys.stdout.flush()
    return told


def figures_of(experiment: "Experiment", demonstrations: "Source") -> Arm:
    """Read an experiment's record; the demonstrations' gold answers say what was wrong with its pairs."""
    from storage.datasets import DatasetRef, read_rows
    from storage.rows import EvaluatedPrompt, PairFigure
    from tasks.loading import prompts_of

    base, *policies = experiment.iterations()
    answers = {row.prompt_id: row.answer or "" for row in prompts_of(demonstrations)}
    values = [
        {
            row.prompt_id: row.value
            for row in read_rows(DatasetRef(**record.references["test"]), EvaluatedPrompt)
            if row.strategy == "mean@1"
        }
        for record in policies
    ]
    pairs = [
        {
            f"{row.about} {row.name}": row.value
            for row in read_rows(DatasetRef(**record.references["pair_figures"]), PairFigure)
        }
        | {"trained_on": record.funnel.get("trained_on", 0)}
        | truth_of(record.references, answers)
        for record in policies
    ]
    return Arm(base.metrics, [record.metrics for record in policies], values, pairs)


def truth_of(references: dict[str, Any], answers: dict[str, str]) -> dict[str, float]:
    """Shares by gold answers, which the recipe itself never reads: wrong chosen sides, and how often the judge errs."""
    from storage.datasets import DatasetRef, read_rows
    from storage.rows import Comparison, Pair
    from tasks.answers import answers_match, extract_answer

    def right(prompt_id: str, completion: str) -> bool:
        return answers_match(extract_answer(completion, "FINAL ANSWER:") or "", answers[prompt_id])

    pairs = list(read_rows(DatasetRef(**references["pairs"]), Pair))
    told = {"wrong chosen": mean(not right(row.prompt_id, row.chosen) for row in pairs)}
    told["right rejected"] = mean(right(row.prompt_id, row.rejected) for row in pairs)
    if "compared" in references:
        played = read_rows(DatasetRef(**references["played"]), Pair)
        judged = read_rows(DatasetRef(**references["compared"]), Comparison)
        known = [
            (row.margin > 0) is right(pair.prompt_id, pair.chosen)
            for pair, row in zip(played, judged, strict=True)
            if row.margin and right(pair.prompt_id, pair.chosen) is not right(pair.prompt_id, pair.rejected)
        ]
        told |= {"judge right": mean(known), "judge right, n": len(known)}
    return told


def show(told: dict[tuple[str, int], Arm], arms: list[str], seeds: list[int]) -> None:
    """Print how each arm's policies do, its last one's difference from plain SPIN, and its first pairs."""
    lines = [f"mean@1 on the test problems, %, mean over seeds {seeds} (and sd); the last one against plain, in points"]
    lines.append(f"{'arm':14}{'base':>7}{'iter0':>14}{'iter1':>14}{'greedy':>8}  {'against plain (95 %)':24}by seed")
    for arm in arms:
        runs = [told[arm, seed] for seed in seeds]
        columns = [[100 * run.policies[n]["mean@1"]["value"] for run in runs] for n in range(len(runs[0].policies))]
        base = mean(100 * run.base["mean@1"]["value"] for run in runs)
        greedy = mean(100 * run.policies[-1]["greedy"]["value"] for run in runs)
        cells = "".join(f"{mean(c):7.1f} ({stdev(c) if len(c) > 1 else 0:4.1f})" for c in columns)
        against = against_plain(told, arm, seeds) if arm != "plain" and ("plain", seeds[0]) in told else ""
        lines.append(f"{arm:14}{base:7.1f}{cells}{greedy:8.1f}  {against}")
    shown = ("trained_on", "wrong chosen", "right rejected", "pairs swapped", "pairs noised", "judge right")
    lengths = ("chosen tokens, mean", "rejected tokens, mean")
    lines += ["", f"the first iteration's pairs, mean over seeds: {', '.join((*shown, *lengths))}"]
    for arm in arms:
        cells = [
            f"{mean(told[arm, seed].pairs[0].get(name, 0.0) for seed in seeds):9.3g}"
            if name in told[arm, seeds[0]].pairs[0]
            else f"{'-':>9}"
            for name in (*shown, *lengths)
        ]
        lines.append(f"{arm:14}{''.join(cells)}")
    sys.stdout.write("\n".join(lines) + "\n")


def against_plain(told: dict[tuple[str, int], Arm], arm: str, seeds: list[int]) -> str:
    """The last policies' difference in mean@1, seeds averaged for each problem, with its interval over problems."""
    from tasks.metrics import paired_difference

    def averaged(name: str) -> list[float]:
        last = [told[name, seed].values[-1] for seed in seeds]
        return [mean(values[problem] for values in last) for problem in sorted(last[0])]

    difference = paired_difference(averaged(arm), averaged("plain"))
    by_seed = [
        100 * (told[arm, seed].policies[-1]["mean@1"]["value"] - told["plain", seed].policies[-1]["mean@1"]["value"])
        for seed in seeds
    ]
    interval = f"{100 * difference.difference:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
    return f"{interval:24}{' '.join(f'{one:+.1f}' for one in by_seed)}"


@contextlib.contextmanager
def locked(file: str | None) -> Iterator[None]:
    """Hold the lock of this file, if one is named."""
    if file is None:
        yield
        return
    with Path(file).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
