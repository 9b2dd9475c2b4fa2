"""How far a judge can be trusted: its confidences beside the verdicts of gold answers."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from models.specs import Settings
from storage.rows import Calibration, JudgedRollout, ScoredRollout
from tasks.metrics import Interval, wilson

BINS = 10  # of equal width, for the expected calibration error
DIFFICULTIES = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))  # share of a prompt's rollouts that are right
RESAMPLES = 1_000  # of prompts, for an interval

WITHIN = "auroc within prompts"  # what a vote among the rollouts of one prompt can make use of
FIGURES = ("auroc", WITHIN, "ece", "accuracy", "mean confidence", "share correct")
WITH_INTERVAL = ("auroc", WITHIN, "accuracy")

Numbers = NDArray[np.float64]


class JudgeGate(Settings):
    """Whether a judge is good enough to label without gold: the 95 % interval of its AUROC on dev is above this."""

    minimum_auroc: float = Field(default=0.5, ge=0, lt=1)
    go_on_anyway: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A rollout's verdicts, by gold and by judge."""

    prompt_id: str
    correct: bool
    confidence: float


def verdicts(rows: Iterable[tuple[ScoredRollout, JudgedRollout]]) -> list[Verdict]:
    """Those decided by both sides."""
    return [
        Verdict(prompt_id=score.prompt_id, correct=score.reward == 1, confidence=verdict.confidence)
        for score, verdict in rows
        if score.reward is not None and verdict.confidence is not None
    ]


def calibration(known: Sequence[Verdict], judge: str, writer: str) -> Iterator[Calibration]:
    """All figures, and AUROC and accuracy also by how often a prompt is solved."""
    yield from _figures(known, judge, writer, "all", FIGURES)
    shares = _pass_rates(known)
    for number, (low, high) in enumerate(DIFFICULTIES):
        last = number == len(DIFFICULTIES) - 1
        part = [row for row in known if low <= shares[row.prompt_id] < high or (last and shares[row.prompt_id] == high)]
        group = f"solved {100 * low:.0f}-{100 * high:.0f} %"
        yield from _figures(part, judge, writer, group, ("auroc", "accuracy"))


def judge_faults(rows: Iterable[Calibration], gate: JudgeGate) -> str | None:
    """Why the judge may not label without gold, by its AUROC on its own rollouts; None: it may."""
    figure = next((r for r in rows if (r.writer, r.group, r.name) == ("own", "all", "auroc")), None)
    if figure is None:
        return "its AUROC is unknown: the rollouts of the dev split are all right, all wrong or all undecided"
    if figure.low is not None and figure.low > gate.minimum_auroc:
        return None
    low, high = (0.0 if end is None else end for end in (figure.low, figure.high))
    return (
        f"its AUROC on {figure.n:,} rollouts of {figure.prompts:,} dev prompts is {figure.value:.3f} ({low:.3f} to "
        f"{high:.3f}), not above {gate.minimum_auroc:g}: it cannot tell right from wrong"
    )


def auroc(correct: Sequence[bool], confidences: Sequence[float]) -> float | None:
    """Chance that a right rollout gets a higher confidence than a wrong one, ties half; None: one kind is missing."""
    weights = np.ones(len(correct))
    return _weighted_auroc(
        *_grouped(np.asarray(correct, dtype=bool), np.asarray(confidences, dtype=np.float64)), weights
    )


def auroc_within_prompts(known: Sequence[Verdict]) -> float | None:
    """The same for a right and a wrong rollout of one prompt, over all such pairs; None: there are none."""
    ids = sorted({row.prompt_id for row in known})
    return _by_weights(known, ids, WITHIN)(np.ones(len(ids)))


def expected_calibration_error(correct: Sequence[bool], confidences: Sequence[float], bins: int = BINS) -> float:
    """Mean distance of confidence and accuracy over bins of equal width, by their rollouts (Guo et al. 2017)."""
    right, sure = np.asarray(correct, dtype=np.float64), np.asarray(confidences, dtype=np.float64)
    places = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = np.abs(np.bincount(places, weights=right - sure, minlength=bins))
    return float(gaps.sum() / len(right))


def accuracy_at_half(correct: Sequence[bool], confidences: Sequence[float]) -> float:
    """Share of rollouts whose confidence is above 0.5 just where they are right."""
    return sum((sure > 0.5) is right for right, sure in zip(correct, confidences, strict=True)) / len(correct)


def _figures(
    known: Sequence[Verdict], judge: str, writer: str, group: str, names: Sequence[str]
) -> Iterator[Calibration]:
    if not known:
        return
    correct, sure = [row.correct for row in known], [row.confidence for row in known]
    values: dict[str, float | None] = {
        "auroc": auroc(correct, sure),
        WITHIN: auroc_within_prompts(known),
        "ece": expected_calibration_error(correct, sure),
        "accuracy": accuracy_at_half(correct, sure),
        "mean confidence": sum(sure) / len(sure),
        "share correct": sum(correct) / len(correct),
    }
    for name in names:
        value = values[name]
        if value is None:
            continue
        ends = _interval(known, name)
        prompts = len({row.prompt_id for row in known})
        yield Calibration(
            judge=judge,
            writer=writer,
            group=group,
            name=name,
            value=value,
            low=None if ends is None else ends.low,
            high=None if ends is None else ends.high,
            n=len(known),
            prompts=prompts,
        )


def _pass_rates(known: Sequence[Verdict]) -> Mapping[str, float]:
    total, right = Counter[str](), Counter[str]()
    for row in known:
        total[row.prompt_id] += 1
        right[row.prompt_id] += row.correct
    return {name: right[name] / count for name, count in total.items()}


def _interval(known: Sequence[Verdict], name: str) -> Interval | None:
    """95 % percentile interval over prompts, resampled whole: the rollouts of one prompt are no independent draws."""
    ids = sorted({row.prompt_id for row in known})
    if name not in WITH_INTERVAL or len(ids) < 2:
        return None
    if name == "accuracy" and len(ids) == len(known):
        return wilson(float(sum((row.confidence > 0.5) is row.correct for row in known)), len(known))
    figure = _by_weights(known, ids, name)
    generator = np.random.default_rng(0)
    drawn = (np.bincount(generator.integers(0, len(ids), len(ids)), minlength=len(ids)) for _ in range(RESAMPLES))
    values = [value for weights in drawn if (value := figure(weights.astype(np.float64))) is not None]
    if len(values) < RESAMPLES // 2:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(low), float(high))


def _by_weights(known: Sequence[Verdict], ids: Sequence[str], name: str) -> Callable[[Numbers], float | None]:
    """The figure as a function of how often each prompt counts."""
    places = {identity: place for place, identity in enumerate(ids)}
    owners = np.array([places[row.prompt_id] for row in known])
    correct = np.array([row.correct for row in known])
    sure = np.array([row.confidence for row in known])
    if name == "auroc":
        order, ties, right = _grouped(correct, sure)
        return lambda weights: _weighted_auroc(order, ties, right, weights[owners])
    if name == "accuracy":
        hits = owners[(sure > 0.5) == correct]
        parts, wholes = (np.bincount(each, minlength=len(ids)).astype(np.float64) for each in (hits, owners))
    else:
        parts, wholes = _in_order_by_prompt(owners, correct, sure)
    return lambda weights: float(weights @ parts / whole) if (whole := weights @ wholes) else None


def _in_order_by_prompt(owners: NDArray[np.intp], correct: NDArray[np.bool_], sure: Numbers) -> tuple[Numbers, Numbers]:
    """By prompt: its pairs of a right and a wrong rollout that are in order, ties half; and all such pairs."""
    in_order, pairs = np.zeros(owners.max() + 1), np.zeros(owners.max() + 1)
    for place in range(len(pairs)):
        right, wrong = (sure[(owners == place) & (correct == kind)] for kind in (True, False))
        pairs[place] = len(right) * len(wrong)
        in_order[place] = (right[:, None] > wrong).sum() + (right[:, None] == wrong).sum() / 2
    return in_order, pairs


def _grouped(correct: NDArray[np.bool_], sure: Numbers) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
    """(order by confidence, number of the tie each stands in, whether it is right), the last two in that order."""
    order = np.argsort(sure, kind="stable")
    ties = np.concatenate([[0], np.cumsum(np.diff(sure[order]) > 0)]).astype(np.intp)
    return order, ties[: len(order)], correct[order]


def _weighted_auroc(
    order: NDArray[np.intp], ties: NDArray[np.intp], right: NDArray[np.bool_], weights: Numbers
) -> float | None:
    sorted_weights = weights[order]
    positives = np.bincount(ties, weights=sorted_weights * right)
    negatives = np.bincount(ties, weights=sorted_weights * ~right)
    pairs = positives.sum() * negatives.sum()
    if not pairs:
        return None
    below = np.concatenate([[0.0], np.cumsum(negatives)[:-1]])
    return float((positives * (below + negatives / 2)).sum() / pairs)
