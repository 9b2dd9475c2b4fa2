"""Policy and prompts with gold answers -> rollouts, more of them where more are needed; and what they came to.

Rollouts are drawn in passes. Who gets more is decided after complete passes, from the rows that the pass wanted and
nothing else; a run that goes on after a kill goes through the same passes again, and finds most rows in the ledger.
"""

from collections import Counter
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

from models.specs import AnswerSampling, EngineSettings, ModelRef, PromptTemplate
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.ledger import DamagedPart, Ledger
from storage.rows import PassRate, Prompt, Rollout, ScoredRollout
from tasks.allotments import Tally, mean_pass_rate, next_pass, pass_rate, standing, tally
from tasks.answers import score_by_answer
from tasks.caching import log_counts, step
from tasks.isolating import read_checked
from tasks.planning import current_plan
from tasks.sampling import Drawing, ledger_key, sample_rollouts


class Allotted(NamedTuple):
    """What a sampling came to."""

    tallies: dict[str, Tally]  # by prompt_id, in the prompts' order
    passes: int
    standings: Counter[str]  # why prompts got no more


def sample_until_enough(
    policy: ModelRef,
    prompts: DatasetRef,
    template: PromptTemplate,
    sampling: AnswerSampling,
    engine: EngineSettings,
    marker: str,
    known: DatasetRef | None = None,
) -> DatasetRef:
    """Rollout rows in the prompts' order: as many of each as `sampling.adaptive` gives it; without it, all as many.

    Args:
        known: pass rates of earlier iterations.
    Raises:
        ShardsFailed: as `sample_rollouts`.
    """
    if sampling.adaptive is None:
        return sample_rollouts(policy, prompts, template, sampling.plain, engine)
    ask = (policy, prompts, template, sampling, engine, marker, known)
    if gather_allotted.lookup(*ask).found is not None or current_plan() is not None:
        return gather_allotted(*ask)
    try:
        _draw_passes(*ask)
        return gather_allotted(*ask)
    except DamagedPart:  # it is out of the way, and its rows are now missing
        _draw_passes(*ask)
        return gather_allotted(*ask)


@step(version="1", rows=lambda policy, prompts, template, sampling, *_: prompts.rows * sampling.rollouts_per_prompt)
def gather_allotted(
    policy: ModelRef,
    prompts: DatasetRef,
    template: PromptTemplate,
    sampling: AnswerSampling,
    engine: EngineSettings,
    marker: str,
    known: DatasetRef | None,
) -> DatasetRef:
    """Commit the rollouts that the prompts were given as one data set."""
    ledger = Ledger(ledger_key(policy, template, sampling, engine))
    allotted = _allot(ledger, prompts, sampling, marker, known, lambda _: None)
    wanted = {name: (1 << one.rollouts) - 1 for name, one in allotted.tallies.items()}
    errors: Counter[str] = Counter()
    rows = read_checked(ledger, wanted, sampling, errors)
    parents = [prompts] if known is None else [prompts, known]
    rollouts = write_rows(rows, Rollout, step="rollouts", parents=parents, settings={"sampling": sampling.key()})
    prompts_by_standing = {f"prompts {name}": count for name, count in sorted(allotted.standings.items())}
    log_counts({"sampled": rollouts.rows, "passes": allotted.passes, **prompts_by_standing})
    log_counts({"engine_errors": errors.total()} if errors.total() else {})
    return rollouts


@step(version="1", rows=lambda scored, *_: scored.rows)
def rate_prompts(scored: DatasetRef, known: DatasetRef | None, first: int, iteration: int) -> DatasetRef:
    """The pass rate of each prompt, as of when it was last sampled: now, or as known before.

    Args:
        first: rollouts with an index below this were drawn whatever came of them.
    """
    rows = groupby(read_rows(scored, ScoredRollout), key=lambda row: row.prompt_id)
    rates = [pass_rate(rollouts, first, iteration) for _, rollouts in rows]
    rated = {rate.prompt_id for rate in rates}
    earlier = [] if known is None else [row for row in read_rows(known, PassRate) if row.prompt_id not in rated]
    log_counts(
        {
            "pass rate, %": round(100 * mean_pass_rate(rates)),
            "prompts without a correct one": sum(not rate.correct for rate in rates),
            "prompts without an incorrect one": sum(not rate.incorrect for rate in rates),
        }
    )
    parents = [scored] if known is None else [scored, known]
    return write_rows([*rates, *earlier], PassRate, step="pass_rates", parents=parents)


def _draw_passes(
    policy: ModelRef,
    prompts: DatasetRef,
    template: PromptTemplate,
    sampling: AnswerSampling,
    engine: EngineSettings,
    marker: str,
    known: DatasetRef | None,
) -> None:
    drawing = Drawing(policy, list(read_rows(prompts, Prompt)), template, sampling.plain, engine)
    _allot(drawing.ledger, prompts, sampling, marker, known, lambda wanted: drawing.draw(wanted, [prompts, policy]))
    drawing.record()


def _allot(
    ledger: Ledger,
    prompts: DatasetRef,
    sampling: AnswerSampling,
    marker: str,
    known: DatasetRef | None,
    draw: Callable[[dict[str, int]], None],
) -> Allotted:
    """Go through the passes.

    Args:
        draw: sees to it that the ledger has these rollouts, a mask of indexes for each prompt.
    """
    gold = {row.prompt_id: row.answer or "" for row in read_rows(prompts, Prompt)}
    rates = {} if known is None else {row.prompt_id: row for row in read_rows(known, PassRate)}
    tallies = dict.fromkeys(gold, Tally(0, 0, 0))
    given, passes = dict.fromkeys(gold, sampling.first), 0
    while given:
        passes += 1
        wanted = {name: (1 << tallies[name].rollouts + count) - 1 for name, count in given.items()}
        draw(wanted)
        for prompt_id, rollouts in groupby(ledger.read(wanted), key=lambda row: row.prompt_id):
            tallies[prompt_id] = tally(score_by_answer(row, gold[prompt_id], marker) for row in rollouts)
        given = next_pass(tallies, rates, sampling, sampling.seed)
    return Allotted(tallies, passes, Counter(standing(one, sampling) for one in tallies.values()))
