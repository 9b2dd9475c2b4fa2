"""How well gold answers that were made wrong are found, on the tiny preset's prompts, before anything is trained.

    python benchmarks/compare_suspects.py [--seeds 0,1,2] [--home DIR] [--lock FILE]

A known share of gold answers is moved by a few units, as `storage.arithmetic` has its own slips; the rollouts are of
the base, and of a policy trained on the base's own solutions by the right answers. Recall is of all wrong gold answers,
those included that no confident majority could check. The estimate is what a run tells: suspects among the prompts
checked. With the home of compare_adaptive.py, models and rollouts are reused.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, NamedTuple

from tables import experiments

if TYPE_CHECKING:
    from storage.datasets import DatasetRef
    from storage.rows import Prompt
    from tasks.suspects import Suspicion

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

SHARES = (0.0, 0.1, 0.3)
ROLLOUTS = (8, 16)
AGREEMENTS = (0.6, 0.75, 0.9)


class Found(NamedTuple):
    """What checking gold answers came to."""

    checked: int  # prompts with a confident majority
    suspects: int
    precision: float | None  # of the suspects, those whose gold answer was made wrong; None: there are none
    recall: float | None
    estimate: float


Key = tuple[str, int, float, float]  # policy, rollouts, agreement, share


def main() -> None:
    """Draw what is missing and print the table."""
    with experiments(__doc__) as options:
        from compare_spin import locked

        from tasks.serving import close_engines

        with locked(options.lock):
            told = [measure(seed) for seed in map(int, options.seeds.split(","))]
            close_engines()
    show(told)


def measure(seed: int) -> dict[Key, Found]:
    """Every policy, number of rollouts, threshold and share of wrong gold answers, with this seed."""
    from compare_adaptive import open_experiment

    from storage.datasets import read_rows, write_rows
    from storage.rows import Prompt
    from tasks.sampling import sample_rollouts
    from tasks.scoring import score_answers
    from tasks.selecting import select_demonstrations
    from tasks.suspects import Suspicion
    from tasks.training import train_sft

    config, base, prompts = open_experiment(seed)
    told: dict[Key, Found] = {}
    policy = base
    for iteration, name in enumerate(("base", "trained"), start=1):
        for count in ROLLOUTS:
            sampling = config.sampling.for_iteration(iteration).plain.model_copy(update={"rollouts_per_prompt": count})
            rollouts = sample_rollouts(policy, prompts, config.template, sampling, config.engine)
            for share in SHARES:
                spoilt = [spoil(row, share, seed) for row in read_rows(prompts, Prompt)]
                wrong = {row.prompt_id for row, is_wrong in spoilt if is_wrong}
                given = write_rows((row for row, _ in spoilt), Prompt, step="drawn")
                scored = score_answers(rollouts, given, config.marker)
                for agreement in AGREEMENTS:
                    suspicion = Suspicion(minimum_agreement=agreement)
                    told[name, count, agreement, share] = find(scored, given, suspicion, wrong)
        if name == "base":
            eight = config.sampling.for_iteration(iteration).plain
            rollouts = sample_rollouts(policy, prompts, config.template, eight, config.engine)
            scored = score_answers(rollouts, prompts, config.marker)
            kept = select_demonstrations(scored, config.selection, iteration, config.marker)
            policy = train_sft(base, (kept,), config.template, config.sft)
    return told


def spoil(prompt: "Prompt", share: float, seed: int) -> "tuple[Prompt, bool]":
    """The prompt, its gold answer moved with this chance; the larger the share, the more, and the same ones too."""
    from storage.arithmetic import SLIPS

    chance = random.Random(f"{seed}:{prompt.prompt_id}")
    if chance.random() >= share:
        return prompt, False
    return replace(prompt, answer=str(int(prompt.answer or "0") + chance.choice(SLIPS))), True


def find(scored: "DatasetRef", prompts: "DatasetRef", suspicion: "Suspicion", wrong: set[str]) -> Found:
    """Check the gold answers, and compare with what was done to them."""
    from storage.datasets import read_rows
    from storage.rows import GoldCheck
    from tasks.suspecting import question_gold
    from tasks.suspects import SUSPECT, UNSURE, suspect_share

    checks = list(read_rows(question_gold(scored, prompts, suspicion), GoldCheck))
    suspects = {row.prompt_id for row in checks if row.verdict == SUSPECT}
    return Found(
        checked=sum(row.verdict != UNSURE for row in checks),
        suspects=len(suspects),
        precision=len(suspects & wrong) / len(suspects) if suspects else None,
        recall=len(suspects & wrong) / len(wrong) if wrong else None,
        estimate=suspect_share(checks) or 0.0,
    )


def show(told: Sequence[dict[Key, Found]]) -> None:
    """Print means over seeds, and how far seeds differ, in percent."""
    lines = [f"means over {len(told)} seeds (sd), 400 prompts; wrong: share of gold answers made wrong, %"]
    lines.append(
        f"{'policy':9}{'n':>3}{'agreement':>10}{'wrong':>6}{'checked':>9}{'suspects':>9}"
        f"{'precision, %':>16}{'recall, %':>16}{'estimate, %':>16}"
    )
    for key in told[0]:
        runs = [one[key] for one in told]
        policy, count, agreement, share = key
        shares = [
            percent([value for run in runs if (value := getattr(run, name)) is not None])
            for name in ("precision", "recall", "estimate")
        ]
        lines.append(
            f"{policy:9}{count:3}{agreement:10.2f}{100 * share:6.0f}{mean(run.checked for run in runs):9.0f}"
            f"{mean(run.suspects for run in runs):9.1f}{''.join(f'{cell:>16}' for cell in shares)}"
        )
    sys.stdout.write("\n".join(lines) + "\n")


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation of shares, in percent."""
    if not values:
        return "-"
    return f"{100 * mean(values):.1f} ({100 * stdev(values) if len(values) > 1 else 0:.1f})"


if __name__ == "__main__":
    main()
