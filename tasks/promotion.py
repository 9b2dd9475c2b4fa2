"""The gate: does the candidate replace the incumbent? Decided by a paired test on a dev split, never on test."""

from collections.abc import Sequence
from statistics import mean
from typing import Literal, NamedTuple

from pydantic import Field

from models.specs import Settings
from storage.rows import EvaluatedPrompt
from tasks.metrics import PairedDifference, paired_difference


class Regression(Settings):
    """When a policy is so surely worse than the one it was to replace that a person is to look before there is more.

    The gate keeps such a policy from being used, so a run that someone watches goes on; a schedule, which nobody does,
    would spend its nights on what went wrong.
    """

    not_in_key = frozenset({"stops"})

    alpha: float = Field(default=0.01, gt=0, lt=1)  # of the one-sided test; strict, for it is made every iteration
    minimum_drop: float = Field(default=0.0, ge=0, lt=1)  # as a share; a smaller drop is none
    stops: Literal["schedules", "every run"] = "schedules"


class Gate(Settings):
    """When a new policy stands.

    `better`: the difference is above zero, and a one-sided paired test says so. `not_worse`: the difference as measured
    is no drop beyond `maximum_drop`; no test, since on few prompts hardly any policy can be shown not to be worse.
    Whatever of these is asked for, `maximum_benchmark_drop` holds too where benchmarks are run: as measured, no test.
    """

    not_in_key = frozenset({"regression"})  # whether to go on, not who stands; a step of its own finds it

    promote: Literal["better", "not_worse", "always"] = "better"
    strategy: str = "mean@1"
    alpha: float = Field(default=0.05, gt=0, lt=1)  # of the one-sided test
    maximum_drop: float = Field(default=0.01, ge=0, le=1)  # as a share: 0.01 is one point
    maximum_benchmark_drop: float | None = Field(default=None, ge=0, le=1)  # of any benchmark below the base's figure
    seed: int = Field(default=0, ge=0)  # of the resampling
    regression: Regression | None = Regression()  # None: no policy is so bad that anything stops


class Fall(NamedTuple):
    """Whether a policy is significantly worse than the incumbent, and what that looks like."""

    found: bool
    reason: str  # a sentence; empty where nothing was found
    p_value: float  # one-sided, that it is no worse
    fell: int  # prompts
    rose: int
    undecided_before: float  # share of the rollouts that had no answer to score
    undecided_after: float


class Decision(NamedTuple):
    """The verdict, a sentence that explains it, and its figures; difference is candidate - incumbent, as a share."""

    promoted: bool
    reason: str
    difference: float
    low: float  # 95 % interval
    high: float
    p_value: float  # one-sided
    n: int  # prompts


def decide(candidate: Sequence[EvaluatedPrompt], incumbent: Sequence[EvaluatedPrompt], gate: Gate) -> Decision:
    """Whether the candidate stands. Prompts are joined by id; rows of other strategies than the gate's are left out.

    Raises:
        ValueError: a side has no row of the strategy or two of one prompt, or the sides have different prompts.
    """
    new, old = _values(candidate, incumbent, gate)
    paired = paired_difference(new, old, gate.seed)
    promoted = _passes(paired, gate)
    return Decision(promoted, _sentence(paired, mean(old), mean(new), gate, promoted=promoted), *paired)


def find_regression(candidate: Sequence[EvaluatedPrompt], incumbent: Sequence[EvaluatedPrompt], gate: Gate) -> Fall:
    """Whether the candidate is significantly worse, by the gate's strategy and the same paired test turned round.

    Raises:
        ValueError: as `decide`.
    """
    assert gate.regression is not None  # else nobody asks
    after, before = _values(candidate, incumbent, gate)
    paired = paired_difference(before, after, gate.seed)
    fall = Fall(
        found=paired.difference > gate.regression.minimum_drop and paired.p_value < gate.regression.alpha,
        reason="",
        p_value=paired.p_value,
        fell=sum(is_now < was for was, is_now in zip(before, after, strict=True)),
        rose=sum(is_now > was for was, is_now in zip(before, after, strict=True)),
        undecided_before=_undecided(incumbent, gate),
        undecided_after=_undecided(candidate, gate),
    )
    return fall._replace(reason=_regression_sentence(fall, mean(before), mean(after), gate)) if fall.found else fall


def hold_to_benchmarks(
    decision: Decision, candidate: Sequence[EvaluatedPrompt], base: Sequence[EvaluatedPrompt], maximum_drop: float
) -> Decision:
    """The decision, turned down where a benchmark's figure is more than `maximum_drop` below the base's.

    Raises:
        ValueError: the two were not put through the same documents.
    """
    after, before = _documents(candidate), _documents(base)
    if after.keys() != before.keys() or any(after[name].keys() != before[name].keys() for name in after):
        raise ValueError("candidate and base were put through different benchmark documents; use the same limits")
    drops = {name: mean(before[name].values()) - mean(after[name].values()) for name in after}
    worst = max(drops, key=lambda name: drops[name])
    told = (
        f"{worst} went from {100 * mean(before[worst].values()):.1f} % to {100 * mean(after[worst].values()):.1f} % of "
        f"{len(after[worst]):,} documents, {-100 * drops[worst]:+.1f} points from the base, and a benchmark may fall "
        f"by {100 * maximum_drop:g}"
    )
    if drops[worst] <= maximum_drop + 1e-9:
        return decision._replace(reason=f"{decision.reason} Benchmarks: at worst, {told}.")
    said = decision.reason.removeprefix("Promoted: ").removeprefix("Not promoted: ")
    return decision._replace(promoted=False, reason=f"Not promoted: {told}. Otherwise: {said}")


def _undecided(rows: Sequence[EvaluatedPrompt], gate: Gate) -> float:
    of_strategy = [row for row in rows if row.strategy == gate.strategy]
    return sum(row.undecided for row in of_strategy) / max(1, sum(row.rollouts for row in of_strategy))


def _regression_sentence(fall: Fall, before: float, after: float, gate: Gate) -> str:
    assert gate.regression is not None
    return (
        f"Significantly worse: {gate.strategy} fell from {100 * before:.1f} % to {100 * after:.1f} % on the dev split "
        f"(one-sided p = {fall.p_value:.2g}, below {gate.regression.alpha:g}); {fall.fell:,} prompts fell and "
        f"{fall.rose:,} rose; rollouts without an answer to score went from {100 * fall.undecided_before:.1f} % to "
        f"{100 * fall.undecided_after:.1f} %."
    )


def _documents(rows: Sequence[EvaluatedPrompt]) -> dict[str, dict[str, float]]:
    by_name: dict[str, dict[str, float]] = {}
    for row in rows:
        by_name.setdefault(row.strategy, {})[row.prompt_id] = row.value
    return by_name


def _values(
    candidate: Sequence[EvaluatedPrompt], incumbent: Sequence[EvaluatedPrompt], gate: Gate
) -> tuple[list[float], list[float]]:
    """The candidate's and the incumbent's values, of the same prompts in the same order."""
    new, old = _by_prompt(candidate, gate, "candidate"), _by_prompt(incumbent, gate, "incumbent")
    if new.keys() != old.keys():
        raise ValueError(
            f"the gate compares the same prompts, but the candidate has {len(new)} and the incumbent {len(old)}, of "
            f"which {len(new.keys() & old.keys())} are shared; evaluate both on one dev split"
        )
    return [new[one] for one in sorted(new)], [old[one] for one in sorted(new)]


def _by_prompt(rows: Sequence[EvaluatedPrompt], gate: Gate, side: str) -> dict[str, float]:
    of_strategy = [row for row in rows if row.strategy == gate.strategy]
    values = {row.prompt_id: row.value for row in of_strategy}
    if not values or len(values) != len(of_strategy):
        raise ValueError(
            f"the gate wants one {gate.strategy!r} row a prompt of the {side}; found {len(of_strategy)} rows of "
            f"{len(values)} prompts among strategies {sorted({row.strategy for row in rows})!r}; set gate.strategy to "
            "one that is evaluated on dev"
        )
    return values


def _passes(paired: PairedDifference, gate: Gate) -> bool:
    if gate.promote == "better":
        return paired.difference > 0 and paired.p_value < gate.alpha
    return gate.promote == "always" or paired.difference >= -gate.maximum_drop - 1e-9  # shares are not exact


def _sentence(paired: PairedDifference, before: float, after: float, gate: Gate, *, promoted: bool) -> str:
    rules = {
        "better": f"p below {gate.alpha:g} and a rise are asked for",
        "not_worse": f"a drop of up to {100 * gate.maximum_drop:g} points is allowed",
        "always": "every policy is promoted",
    }
    return (
        f"{'Promoted' if promoted else 'Not promoted'}: {gate.strategy} went from {100 * before:.1f} % to "
        f"{100 * after:.1f} % on the same {paired.n:,} prompts, {100 * paired.difference:+.1f} points (95 % interval "
        f"{100 * paired.low:+.1f} to {100 * paired.high:+.1f}, one-sided p = {paired.p_value:.2g}); "
        f"{rules[gate.promote]}."
    )
