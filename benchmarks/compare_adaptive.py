"""Adaptive sampling against plain sampling, on the tiny preset's prompts: pairs and demonstrations for what they cost.

    python benchmarks/compare_adaptive.py [--seeds 0,1,2] [--home DIR] [--lock FILE]

Each seed draws its own base, problems and rollouts. Both ways draw from one ledger, so that they see the same rollouts,
only not as many: differences are the rule's, not luck's. The second policy is trained from the base on its own
solutions; with known pass rates, what the base's sampling found decides with. Costs are completion tokens. "of plain"
is what plain sampling would pay for as many pairs, between the two numbers of rollouts that come next to it.
"""

import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, NamedTuple

from tables import experiments

if TYPE_CHECKING:
    from flows.rest_em import RestEM
    from models.specs import AnswerSampling, ModelRef
    from storage.datasets import DatasetRef

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PRESET = ROOT / "deployments" / "presets" / "rest_em" / "tiny.yaml"
SEEDED = (
    "seed",
    "sampling.seed",
    "sft.seed",
    "base.tiny.training.seed",
    "base.corpus.arithmetic.seed",
    "train.arithmetic.seed",
)
PLAIN = (2, 3, 4, 6, 8, 12, 16, 24, 32)
# correct and incorrect texts wanted, rollouts of a prompt on average, of the first pass and of each later one, the cap
ADAPTIVE = {
    "2 and 2, 8": (2, 2, 8, 4, 2, 32),
    "1 and 2, 8, none above": (1, 2, 8, 4, 2, 8),
    "1 and 2, 16, none above": (1, 2, 16, 4, 2, 16),
    "1 and 2, 8": (1, 2, 8, 2, 2, 32),
    "1 and 2, 16": (1, 2, 16, 4, 4, 32),
    "1 and 1, 8": (1, 1, 8, 2, 2, 32),
    "1 and 0, 4": (1, 0, 4, 1, 1, 32),
    "1 and 0, 2": (1, 0, 2, 1, 1, 32),
}


class Figures(NamedTuple):
    """What one way of sampling came to."""

    tokens: float
    rollouts: float
    pairs: float
    paired_prompts: float
    demonstrations: float
    solved_prompts: float


Told = dict[tuple[str, str], Figures]  # (policy, way) -> figures


def main() -> None:
    """Draw what is missing and print the tables."""
    with experiments(__doc__) as options:
        from compare_spin import locked

        from tasks.serving import close_engines

        told: list[Told] = []
        for seed in map(int, options.seeds.split(",")):
            with locked(options.lock):
                started = time.monotonic()
                told.append(measure(seed))
                close_engines()
            sys.stdout.write(f"seed {seed}: {time.monotonic() - started:.0f} s\n")
            sys.stdout.flush()
        show(told)


def measure(seed: int) -> Told:
    """All ways of sampling the base and a policy trained from it, with this seed."""
    from tasks.training import train_sft

    config, base, prompts = open_experiment(seed)
    told: Told = {}
    rates: dict[str, DatasetRef] = {}
    demonstrations = measure_policy(told, rates, "base", config, base, prompts, 1)
    trained = train_sft(base, (demonstrations,), config.template, config.sft)
    measure_policy(told, rates, "trained", config, trained, prompts, 2)
    return told


def open_experiment(seed: int) -> "tuple[RestEM, ModelRef, DatasetRef]":
    """The preset with this seed, its base, and the prompts of its first iteration."""
    from flows.bases import open_base
    from flows.presets import Preset
    from flows.rest_em import RestEM
    from tasks.loading import draw_prompts, load_prompts

    config = Preset(PRESET, [f"{name}={seed}" for name in SEEDED]).config(RestEM)
    base = open_base(config.base, config.template, config.marker)
    prompts = draw_prompts(load_prompts(config.train, without=()), config.prompts_per_iteration or 400, 1, config.seed)
    return config, base, prompts


def measure_policy(
    told: Told,
    rates: "dict[str, DatasetRef]",
    name: str,
    config: "RestEM",
    policy: "ModelRef",
    prompts: "DatasetRef",
    iteration: int,
) -> "DatasetRef":
    """Note the figures of each way; the demonstrations of the preset's own one, to train on.

    Args:
        rates: what each adaptive way knows of the prompts, read and brought up to date.
    """
    from tasks.allotting import rate_prompts, sample_until_enough
    from tasks.scoring import score_answers

    template, engine, marker = config.template, config.engine, config.marker
    kept: DatasetRef | None = None
    for way, sampling in ways(config.sampling.for_iteration(iteration)).items():
        known = rates.get(way)
        for label, given in ((way, None), (f"{way}, known", known)):
            if label != way and known is None:
                continue
            rollouts = sample_until_enough(policy, prompts, template, sampling, engine, marker, given)
            scored = score_answers(rollouts, prompts, marker)
            told[name, label], demonstrations = figures(rollouts, scored, config, iteration)
            if label == "plain 8":
                kept = demonstrations
            if sampling.adaptive is not None and label == way:
                rates[way] = rate_prompts(scored, None, sampling.first, iteration)
    assert kept is not None
    return kept


def ways(sampling: "AnswerSampling") -> "dict[str, AnswerSampling]":
    """The most first, so that all that follow are read from the ledger."""
    from models.specs import Adaptive

    plain = {f"plain {n}": sampling.model_copy(update={"rollouts_per_prompt": n}) for n in reversed(PLAIN)}
    adaptive = {}
    for name, (correct, incorrect, average, first, more, cap) in ADAPTIVE.items():
        section = Adaptive(first=first, more=more, wanted_correct=correct, wanted_incorrect=incorrect, cap=cap)
        update = {"rollouts_per_prompt": average, "adaptive": section}
        adaptive[name] = type(sampling).model_validate({**dict(sampling), **update})
    return plain | adaptive


def figures(
    rollouts: "DatasetRef", scored: "DatasetRef", config: "RestEM", iteration: int
) -> "tuple[Figures, DatasetRef]":
    """What the rollouts are good for, by the preset's own pairing and selection; and the demonstrations."""
    from storage.datasets import read_rows
    from storage.rows import Demonstration, Pair, Rollout
    from tasks.pairing import pair_rollouts
    from tasks.selecting import select_demonstrations

    assert config.dpo is not None  # the preset has it
    pairs = pair_rollouts(scored, config.dpo.pairing, iteration)
    kept = select_demonstrations(scored, config.selection, iteration, config.marker)
    told = Figures(
        tokens=sum(row.completion_tokens for row in read_rows(rollouts, Rollout)),
        rollouts=rollouts.rows,
        pairs=pairs.rows,
        paired_prompts=len({row.prompt_id for row in read_rows(pairs, Pair)}),
        demonstrations=kept.rows,
        solved_prompts=len({row.prompt_id for row in read_rows(kept, Demonstration)}),
    )
    return told, kept


def show(told: Sequence[Told]) -> None:
    """Print means over seeds, and how far seeds differ."""
    lines = [f"means over {len(told)} seeds, sd in brackets; 400 prompts; costs in thousands of completion tokens"]
    columns = f"{'tokens':>14}{'rollouts':>9}{'pairs':>13}{'prompts':>8}{'shown':>13}{'solved':>7}"
    for policy in ("base", "trained"):
        lines += ["", f"{policy:34}{columns}{'pairs, of plain':>20}{'shown, of plain':>20}"]
        for way in [way for name, way in told[0] if name == policy]:
            runs = [one[policy, way] for one in told]
            cells = [
                f"{spread([run.tokens / 1000 for run in runs]):>14}",
                f"{mean(run.rollouts for run in runs):9.0f}",
                f"{spread([run.pairs for run in runs], 0):>13}",
                f"{mean(run.paired_prompts for run in runs):8.0f}",
                f"{spread([run.demonstrations for run in runs], 0):>13}",
                f"{mean(run.solved_prompts for run in runs):7.0f}",
            ]
            if not way.startswith("plain"):
                cells += [f"{of_plain(told, policy, way, what):>20}" for what in ("pairs", "demonstrations")]
            lines.append(f"{way:34}{''.join(cells)}")
    sys.stdout.write("\n".join(lines) + "\n")


def of_plain(told: Sequence[Told], policy: str, way: str, what: str) -> str:
    """The tokens spent, as a share of what plain sampling would pay for as much, by seed: 1 is no gain."""
    shares = []
    for one in told:
        curve = [(getattr(one[policy, f"plain {n}"], what), one[policy, f"plain {n}"].tokens) for n in PLAIN]
        reached = getattr(one[policy, way], what)
        for (low, cheap), (high, dear) in pairwise(curve):
            if low <= reached <= high:
                price = cheap + (dear - cheap) * (reached - low) / max(1, high - low)
                shares.append(one[policy, way].tokens / price)
                break
    if len(shares) < len(told):
        return "outside"
    return spread(shares, 2)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.{digits}f} ({stdev(values) if len(values) > 1 else 0:.{digits}f})"


if __name__ == "__main__":
    main()
