"""A policy as its own judge: what it is asked, how sure it is, what is concluded, and how far it can be trusted.

Rules of seed 0's second experiment (METHODS 3.4), without its faults (METHODS 3.6). One vocabulary of two labels is
trained, asked for and scored. A confidence is p(positive) / (p(positive) + p(negative)), from exact log-probs of the
whole labels, so labels of several tokens are fine. Nothing here but `join` and `calibration` sees a gold answer.
"""

import random
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, exp, isfinite
from operator import itemgetter
from string import Template
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from models.specs import PromptTemplate, Settings
from storage.rows import Calibration, Demonstration, EvaluatedPrompt, JudgedRollout, Pair, ScoredRollout
from tasks.answers import answer_group, trim_after_answer
from tasks.metrics import Interval, majority, wilson
from tasks.selection import same_text

JUDGED = "judged"
NO_LABEL = "no label"
BINS = 10  # of equal width, for the expected calibration error
DIFFICULTIES = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))  # share of a prompt's rollouts that are right
FILTERS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # that a dev split may choose from
RESAMPLES = 1_000  # of prompts, for an interval

Numbers = NDArray[np.float64]


class Judge(Settings):
    """What the judge is asked, and the two labels it may answer with. Seed 0: Correct and Incorrect."""

    not_in_key = frozenset({"maximum_undecided", "rollouts_per_shard"})

    text: str = (  # $prompt and $completion are filled in; it ends without a space (METHODS 2.6.13)
        "Is the final answer of this solution right? Say Correct or Incorrect.\n\n"
        "Question: $prompt\n\nSolution:\n$completion\n\nVerdict:"
    )
    positive: str = Field(default="Correct", min_length=1)
    negative: str = Field(default="Incorrect", min_length=1)
    label_tokens: Literal["one", "any"] = "any"  # one: refuse labels that are not a single token each
    minimum_label_mass: float = Field(default=0.01, ge=0, lt=1)  # p(positive) + p(negative); below, it said neither
    maximum_undecided: float = Field(default=0.2, ge=0, le=1)  # share of the rollouts it may leave undecided
    rollouts_per_shard: int = Field(default=4096, ge=1)  # judged at a time, and kept when the next ones fail

    @model_validator(mode="after")
    def _can_be_asked(self) -> "Judge":
        names = set(Template(self.text).get_identifiers())
        if names != {"prompt", "completion"}:
            raise ValueError(f"the judge's text is to hold $prompt and $completion and nothing else; found {names!r}")
        if self.text[-1] in " \t":
            raise ValueError(f"the judge's text ends in {self.text[-1]!r}, which a tokenizer would cut off; remove it")
        for label, other in ((self.positive, self.negative), (self.negative, self.positive)):
            if label != label.strip():
                raise ValueError(f"the label {label!r} begins or ends in white space; remove it")
            if other.startswith(label):
                raise ValueError(
                    f"the label {other!r} begins with the label {label!r}, so the shorter would always be the "
                    "likelier; choose labels of which neither begins the other"
                )
        return self


class LabelFree(Settings):
    """Which rollouts are taken for right and wrong without a gold answer (METHODS 3.4).

    majority: the answer with enough votes is right, all others wrong. top: the most confident rollout is right, the
    least confident of another answer wrong. classifier: confident rollouts vote; right is what wins, wrong what they
    are outvoted by or, where all agree, the least confident of another answer.
    """

    mode: Literal["majority", "top", "classifier"] = "classifier"
    minimum_votes: int = Field(default=6, ge=1)
    positive_threshold: float = Field(default=0.75, ge=0, le=1)  # the best of a prompt is at least so confident
    negative_threshold: float = Field(default=0.4, ge=0, le=1)  # the least confident at most (seed 0: never applied)
    filter_above: float = Field(default=0.5, ge=0, le=1)  # classifier: only those above vote

    @model_validator(mode="after")
    def _thresholds_are_apart(self) -> "LabelFree":
        if self.negative_threshold >= self.positive_threshold:
            raise ValueError(
                f"negative_threshold is {self.negative_threshold} and positive_threshold {self.positive_threshold}, so "
                "one rollout could be right and wrong; lower the first or raise the second"
            )
        return self


class Mixture(Settings):
    """How solving and judging are trained together. Judge rows are half positive, half negative.

    balance prompt: each prompt gives as many positive as negative rows, so that nothing can be learnt from how hard it
    looks; set: only the two sums are equal, and prompts that are always or never solved count too.
    """

    judge_rows_per_solve: float = Field(default=1.0, gt=0)
    judge_rows_per_prompt: int = Field(default=2, ge=1)  # of each label, at most
    balance: Literal["prompt", "set"] = "prompt"
    held_out_share: float = Field(default=0.05, ge=0, lt=1)  # of the prompts: not trained on, for the loss of each task
    seed: int = Field(default=0, ge=0)


class JudgeGate(Settings):
    """Whether a judge is good enough to label without gold: the 95 % interval of its AUROC on dev is above this."""

    minimum_auroc: float = Field(default=0.5, ge=0, lt=1)
    go_on_anyway: bool = False


class ClassMissing(ValueError):
    """There is nothing to tell apart: no rollout is right, or none is wrong."""


class Mixed(NamedTuple):
    """Rows of both tasks, and counts of them and of what was left out."""

    rows: list[Demonstration]
    counts: Counter[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A rollout's verdicts, by gold and by judge."""

    prompt_id: str
    correct: bool
    confidence: float


def judge_prompt(judge: Judge, prompt: str, completion: str, marker: str) -> str:
    """What the judge is asked about a completion, cut after its final answer; a `$` in either stays a `$`."""
    return Template(judge.text).substitute(prompt=prompt, completion=trim_after_answer(completion, marker))


def filled_template(template: PromptTemplate, prompt: str) -> str:
    """The user message that asks for a solution, as one text: rows of two tasks share the template `as_it_is`."""
    return Template(template.user).substitute(prompt=prompt)


def as_it_is(template: PromptTemplate) -> PromptTemplate:
    """The template for rows whose prompt is the whole user message already; the system message stays.

    Raises:
        ValueError: the prompt stands in the system message too, which judging has no place for.
    """
    if template.system is not None and "$" in template.system:
        raise ValueError(
            f"the system message holds a $: {template.system!r}; solving and judging share it, so put $prompt into "
            "template.user"
        )
    return PromptTemplate(system=template.system)


def label_faults(judge: Judge, probes: Iterable[Sequence[Sequence[float]]]) -> list[str]:
    """What is wrong with the labels for this tokenizer, from the token log-probs of (positive, negative) on probes.

    Labels that begin with the same token are told by the same log-prob there on every probe.
    """
    known = list(probes)
    lengths = [len(tokens) for tokens in known[0]]
    faults = []
    if judge.label_tokens == "one" and lengths != [1, 1]:
        told = ", ".join(f"{label!r} {n}" for label, n in zip((judge.positive, judge.negative), lengths, strict=True))
        faults.append(f"label_tokens is 'one' but the labels take so many tokens: {told}; choose others, or say 'any'")
    share_first = all(positive[:1] == negative[:1] for positive, negative in known)
    if share_first and (judge.label_tokens == "one" or 1 in lengths):
        faults.append(
            f"the labels {judge.positive!r} and {judge.negative!r} share their first token, so one token does not tell "
            "them apart; choose labels that begin differently"
        )
    return faults


def confidence(judge: Judge, positive_logprob: float, negative_logprob: float) -> float | None:
    """p(positive) / (p(positive) + p(negative)); None: the two together are less likely than `minimum_label_mass`."""
    if not (isfinite(positive_logprob) or isfinite(negative_logprob)):
        return None
    if exp(positive_logprob) + exp(negative_logprob) < judge.minimum_label_mass:
        return None
    difference = negative_logprob - positive_logprob
    return 1.0 / (1.0 + exp(difference)) if difference < 700 else 0.0


def label_by_confidence(rows: Sequence[JudgedRollout], settings: LabelFree) -> list[ScoredRollout]:
    """One prompt's rollouts with a reward the judge and the vote give: 1 right, 0 wrong, None neither, with a reason.

    Truncated rollouts and those without a readable answer are neither. Every `wrong` has another answer than the right
    ones (METHODS 3.6.4 and 3.6.5). Rewards are by index, so the order of the rows does not matter.
    """
    ordered = sorted(rows, key=lambda row: row.rollout_index)
    usable = [row for row in ordered if row.finish_reason == "stop" and answer_group(row.answer) is not None]
    rules = {"majority": _by_majority, "top": _by_top, "classifier": _by_classifier}
    told = rules[settings.mode](usable, settings) if usable else {}
    return [_labelled(row, *told.get(row.rollout_index, _neither(row)), settings.mode) for row in ordered]


def judge_rows(
    scored: Iterable[ScoredRollout], judge: Judge, mixture: Mixture, wanted: int, iteration: int, marker: str
) -> Mixed:
    """Rows to learn judging from: as many positive as negative, at most `wanted`, the same whatever the order.

    Raises:
        ClassMissing: all decided rollouts are right, or all are wrong.
    """
    counts: Counter[str] = Counter()
    classes: dict[bool, list[ScoredRollout]] = {True: [], False: []}
    by_prompt: dict[str, list[ScoredRollout]] = {}
    for row in scored:
        if row.finish_reason != "stop" or row.reward is None:
            counts["not judged in training: undecided"] += 1
        else:
            by_prompt.setdefault(row.prompt_id, []).append(row)
    for prompt_id in sorted(by_prompt):
        kinds = {right: _drawn(by_prompt[prompt_id], mixture, right=right) for right in classes}
        most = min(map(len, kinds.values())) if mixture.balance == "prompt" else None
        for right, drawn in kinds.items():
            classes[right] += drawn[:most]
            counts["judge rows over balance or ratio"] += len(drawn) - len(drawn[:most])
    if not (classes[True] and classes[False]):
        raise ClassMissing(_what_is_missing(by_prompt.values()))
    size = min(len(classes[True]), len(classes[False]), max(1, wanted // 2))
    rows = []
    for right, kind in classes.items():
        kept = sorted(kind, key=lambda row: _place(row, mixture))[:size]
        counts["judge rows over balance or ratio"] += len(kind) - size
        rows += [_judge_row(row, judge, iteration, marker, right=right) for row in kept]
    counts["judge_rows"] = len(rows)
    rows.sort(key=lambda row: (row.prompt_id, row.rollout_index or 0))
    return Mixed(rows, counts)


def held_out_prompts(prompt_ids: Iterable[str], mixture: Mixture) -> set[str]:
    """The prompts whose rows, of both tasks, are kept out of training for the loss of each task; at least one."""
    different = sorted(set(prompt_ids))
    random.Random(f"{mixture.seed}:held out").shuffle(different)
    return set(different[: ceil(mixture.held_out_share * len(different))])


def join(
    scored: Iterable[ScoredRollout], judged: Iterable[JudgedRollout]
) -> Iterator[tuple[ScoredRollout, JudgedRollout]]:
    """Each scored rollout with its verdict; both come in the order they were sampled.

    Raises:
        ValueError: they are not of the same rollouts.
    """
    for score, verdict in zip(scored, judged, strict=True):
        if (score.prompt_id, score.rollout_index) != (verdict.prompt_id, verdict.rollout_index):
            raise ValueError(
                f"rollout {score.rollout_index} of {score.prompt_id} is scored where {verdict.rollout_index} of "
                f"{verdict.prompt_id} is judged; judge and score the same rollouts"
            )
        yield score, verdict


def strategy_names(k: int) -> tuple[str, str]:
    """What the two strategies that need a judge are called."""
    return f"maj@{k} with filter", f"highest confidence of {k}"


def evaluate_judged(
    rows: Sequence[tuple[ScoredRollout, JudgedRollout]], k: int, filter_above: float
) -> list[EvaluatedPrompt]:
    """What the two strategies that need a judge score on one prompt (METHODS 3.4).

    Filter: those above vote; if there is none, the most confident answers alone. A rollout that was not judged has
    the lowest confidence; one without an answer neither votes nor answers, unless there is no other.
    """
    first = sorted(rows, key=lambda row: row[0].rollout_index)[:k]
    if len(first) < k or len({score.prompt_id for score, _ in first}) != 1:
        raise ValueError(f"the strategies with a judge need {k} rollouts of one prompt, found {len(first)}")
    answering = [(s, j) for s, j in first if s.reward is not None and answer_group(s.answer) is not None]
    best = max(answering, key=lambda row: _sure(row[1]))[0] if answering else None
    passed = [score for score, verdict in answering if _sure(verdict) > filter_above]
    filtered = majority(passed) if passed else best
    return [
        EvaluatedPrompt(
            prompt_id=first[0][0].prompt_id,
            strategy=name,
            value=0.0 if picked is None else picked.reward or 0.0,
            rollouts=k,
            k=k,
            undecided=sum(score.reward is None for score, _ in first),
            answer=None if picked is None else picked.answer,
        )
        for name, picked in zip(strategy_names(k), (filtered, best), strict=True)
    ]


def choose_filter(prompts: Sequence[Sequence[tuple[ScoredRollout, JudgedRollout]]]) -> float:
    """The confidence above which rollouts vote best on these dev prompts; the lowest of equals, 0 lets all vote."""

    def right(filter_above: float) -> float:
        return sum(evaluate_judged(rows, len(rows), filter_above)[0].value for rows in prompts)

    return max(FILTERS, key=right)  # the first of equals


def verdicts(rows: Iterable[tuple[ScoredRollout, JudgedRollout]]) -> list[Verdict]:
    """Those decided by both sides."""
    return [
        Verdict(prompt_id=score.prompt_id, correct=score.reward == 1, confidence=verdict.confidence)
        for score, verdict in rows
        if score.reward is not None and verdict.confidence is not None
    ]


def calibration(known: Sequence[Verdict], judge: str, writer: str) -> Iterator[Calibration]:
    """AUROC, ECE, accuracy at 0.5, mean confidence and share correct; the first and third also by difficulty."""
    yield from _figures(known, judge, writer, "all", ("auroc", "ece", "accuracy", "mean confidence", "share correct"))
    shares = _pass_rates(known)
    for number, (low, high) in enumerate(DIFFICULTIES):
        last = number == len(DIFFICULTIES) - 1
        part = [row for row in known if low <= shares[row.prompt_id] < high or (last and shares[row.prompt_id] == high)]
        group = f"solved {100 * low:.0f}-{100 * high:.0f} %"
        yield from _figures(part, judge, writer, group, ("auroc", "accuracy"))


def auroc(correct: Sequence[bool], confidences: Sequence[float]) -> float | None:
    """Chance that a right rollout gets a higher confidence than a wrong one, ties half; None: one kind is missing."""
    weights = np.ones(len(correct))
    return _weighted_auroc(
        *_grouped(np.asarray(correct, dtype=bool), np.asarray(confidences, dtype=np.float64)), weights
    )


def expected_calibration_error(correct: Sequence[bool], confidences: Sequence[float], bins: int = BINS) -> float:
    """Mean distance of confidence and accuracy over bins of equal width, by their rollouts (Guo et al. 2017)."""
    right, sure = np.asarray(correct, dtype=np.float64), np.asarray(confidences, dtype=np.float64)
    places = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = np.abs(np.bincount(places, weights=right - sure, minlength=bins))
    return float(gaps.sum() / len(right))


def accuracy_at_half(correct: Sequence[bool], confidences: Sequence[float]) -> float:
    """Share of rollouts whose confidence is above 0.5 just where they are right."""
    return sum((sure > 0.5) is right for right, sure in zip(correct, confidences, strict=True)) / len(correct)


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


def pair_by_confidence(
    rows: Sequence[tuple[ScoredRollout, JudgedRollout]], minimum_margin: float, iteration: int
) -> tuple[Pair | None, str]:
    """One prompt's most confident right rollout against the least confident wrong one, or None and why.

    Args:
        rows: as `label_by_confidence` took them for right and wrong, so the two have different answers.
    """
    sides = [
        [
            (verdict.confidence, score)
            for score, verdict in rows
            if score.reward == reward and verdict.confidence is not None
        ]
        for reward in (1.0, 0.0)
    ]
    if not all(sides):
        return None, "unpaired: " + ("neither" if not any(sides) else "right only" if sides[0] else "wrong only")
    (high, chosen), (low, rejected) = max(sides[0], key=itemgetter(0)), min(sides[1], key=itemgetter(0))
    if high - low < minimum_margin:
        return None, "pair below minimum_margin"
    pair = Pair(
        prompt_id=chosen.prompt_id,
        iteration=iteration,
        prompt=chosen.prompt,
        chosen=chosen.completion,
        rejected=rejected.completion,
        chosen_index=chosen.rollout_index,
        rejected_index=rejected.rollout_index,
        chosen_reward=high,
        rejected_reward=low,
        margin=high - low,
        rule="confidence",
        swapped=False,
    )
    return pair, "paired"


def _by_majority(rows: Sequence[JudgedRollout], settings: LabelFree) -> dict[int, tuple[float | None, str]]:
    winner, votes = _vote(rows)
    if votes < settings.minimum_votes:
        return {row.rollout_index: (None, "no majority") for row in rows}
    return {row.rollout_index: (1.0, "majority") if _group(row) == winner else (0.0, "minority") for row in rows}


def _by_top(rows: Sequence[JudgedRollout], settings: LabelFree) -> dict[int, tuple[float | None, str]]:
    judged = [row for row in rows if row.confidence is not None]
    if not judged or _sure(best := max(judged, key=_sure)) <= settings.positive_threshold:
        return {row.rollout_index: (None, "no confident rollout") for row in rows}
    told: dict[int, tuple[float | None, str]] = {row.rollout_index: (None, "between the ends") for row in rows}
    told[best.rollout_index] = (1.0, "most confident")
    return told | _least_confident(judged, _group(best), settings)


def _by_classifier(rows: Sequence[JudgedRollout], settings: LabelFree) -> dict[int, tuple[float | None, str]]:
    kept = [row for row in rows if _sure(row) > settings.filter_above]
    if not kept or max(map(_sure, kept)) < settings.positive_threshold:
        return {row.rollout_index: (None, "no confident rollout") for row in rows}
    winner, votes = _vote(kept)
    if votes < settings.minimum_votes:
        return {row.rollout_index: (None, "no majority") for row in rows}
    told: dict[int, tuple[float | None, str]] = {row.rollout_index: (None, "filtered out") for row in rows}
    for row in kept:
        told[row.rollout_index] = (1.0, "confident majority") if _group(row) == winner else (0.0, "outvoted")
    if all(_group(row) == winner for row in kept):
        told |= _least_confident([row for row in rows if row.confidence is not None], winner, settings)
    return told


def _least_confident(
    rows: Sequence[JudgedRollout], winner: Hashable, settings: LabelFree
) -> dict[int, tuple[float | None, str]]:
    others = [row for row in rows if _group(row) != winner]
    if not others or _sure(least := min(others, key=_sure)) > settings.negative_threshold:
        return {}
    return {least.rollout_index: (0.0, "least confident")}


def _vote(rows: Sequence[JudgedRollout]) -> tuple[Hashable, int]:
    return Counter(_group(row) for row in rows).most_common(1)[0]


def _group(row: JudgedRollout) -> Hashable:
    return answer_group(row.answer)


def _sure(row: JudgedRollout) -> float:
    return -1.0 if row.confidence is None else row.confidence


def _neither(row: JudgedRollout) -> tuple[None, str]:
    if row.finish_reason != "stop":
        return None, "truncated" if row.finish_reason == "length" else row.reason
    return None, "no final answer" if row.answer is None else "unreadable answer"


def _labelled(row: JudgedRollout, reward: float | None, reason: str, mode: str) -> ScoredRollout:
    return ScoredRollout(
        prompt_id=row.prompt_id,
        rollout_index=row.rollout_index,
        prompt=row.prompt,
        completion=row.completion,
        completion_tokens=row.completion_tokens,
        finish_reason=row.finish_reason,
        cumulative_logprob=row.cumulative_logprob,
        policy=row.policy,
        answer=row.answer,
        reward=reward,
        reason=reason,
        scorer=f"self_confidence_{mode}@1",
    )


def _what_is_missing(prompts: Iterable[Sequence[ScoredRollout]]) -> str:
    rewards = [{row.reward == 1 for row in rows} for rows in prompts]
    advice = "draw more rollouts or at a higher temperature, or use prompts of mixed difficulty"
    if len(set().union(*rewards)) == 2:
        return (
            f"none of {len(rewards):,} prompts has both a right and a wrong rollout, which mixture.balance 'prompt' "
            f"wants: {advice}, or set it to 'set'"
        )
    missing = "wrong" if {True} in rewards else "right"
    return (
        f"no decided rollout of {len(rewards):,} prompts is {missing}, and a judge is trained on both kinds: {advice}"
    )


def _place(row: ScoredRollout, mixture: Mixture) -> tuple[float, int]:
    """By prompt, so that what is kept stays balanced within each where it was."""
    return random.Random(f"{mixture.seed}:{row.prompt_id}").random(), row.rollout_index


def _drawn(rows: Sequence[ScoredRollout], mixture: Mixture, *, right: bool) -> list[ScoredRollout]:
    """Up to `judge_rows_per_prompt` different texts of one prompt and class, drawn by seed."""
    different: dict[str, ScoredRollout] = {}
    for row in sorted(rows, key=lambda row: row.rollout_index):
        if (row.reward == 1) is right:
            different.setdefault(same_text(row.completion), row)
    drawn = list(different.values())
    if drawn:
        random.Random(f"{mixture.seed}:{drawn[0].prompt_id}").shuffle(drawn)
    return drawn[: mixture.judge_rows_per_prompt]


def _judge_row(row: ScoredRollout, judge: Judge, iteration: int, marker: str, *, right: bool) -> Demonstration:
    return Demonstration(
        task="judge",
        prompt_id=row.prompt_id,
        rollout_index=row.rollout_index,
        iteration=iteration,
        prompt=judge_prompt(judge, row.prompt, row.completion, marker),
        completion=judge.positive if right else judge.negative,
        reward=1.0,  # of this row: the label is right; what it says of the rollout is the completion
        source=row.policy,
    )


def solve_row(row: Demonstration, template: PromptTemplate) -> Demonstration:
    """The row with the whole user message for its prompt, to stand beside judge rows."""
    return replace(row, prompt=filled_template(template, row.prompt))


def _pass_rates(known: Sequence[Verdict]) -> Mapping[str, float]:
    total, right = Counter[str](), Counter[str]()
    for row in known:
        total[row.prompt_id] += 1
        right[row.prompt_id] += row.correct
    return {name: right[name] / count for name, count in total.items()}


def _figures(
    known: Sequence[Verdict], judge: str, writer: str, group: str, names: Sequence[str]
) -> Iterator[Calibration]:
    if not known:
        return
    correct, sure = [row.correct for row in known], [row.confidence for row in known]
    values: dict[str, float | None] = {
        "auroc": auroc(correct, sure),
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


def _interval(known: Sequence[Verdict], name: str) -> Interval | None:
    """95 % percentile interval over prompts, resampled whole: the rollouts of one prompt are no independent draws."""
    ids = sorted({row.prompt_id for row in known})
    if name not in ("auroc", "accuracy") or len(ids) < 2:
        return None
    places = {identity: place for place, identity in enumerate(ids)}
    owners = np.array([places[row.prompt_id] for row in known])
    correct = np.array([row.correct for row in known])
    sure = np.array([row.confidence for row in known])
    if name == "accuracy" and len(ids) == len(known):
        return wilson(float(((sure > 0.5) == correct).sum()), len(known))
    order, groups, right = _grouped(correct, sure)
    hits = ((sure > 0.5) == correct).astype(np.float64)
    generator = np.random.default_rng(0)
    values = []
    for _ in range(RESAMPLES):
        weights = np.bincount(generator.integers(0, len(ids), len(ids)), minlength=len(ids))[owners].astype(np.float64)
        value = (
            _weighted_auroc(order, groups, right, weights)
            if name == "auroc"
            else float((weights * hits).sum() / weights.sum())
        )
        if value is not None:
            values.append(value)
    if len(values) < RESAMPLES // 2:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(low), float(high))


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
