"""Strategies that a judge takes part in: a vote of the rollouts it trusts, and the one it trusts most (METHODS 3.4)."""

from collections.abc import Iterable, Iterator, Sequence

from storage.rows import EvaluatedPrompt, JudgedRollout, ScoredRollout
from tasks.answers import answer_group
from tasks.judgements import sureness
from tasks.metrics import majority

FILTERS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # that a dev split may choose from


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
    best = max(answering, key=lambda row: sureness(row[1]))[0] if answering else None
    passed = [score for score, verdict in answering if sureness(verdict) > filter_above]
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
    """The confidence above which rollouts vote best on these dev prompts; the lowest of equals, 0 lets
    all vote that the judge did not give up on."""

    def right(filter_above: float) -> float:
        return sum(evaluate_judged(rows, len(rows), filter_above)[0].value for rows in prompts)

    return max(FILTERS, key=right)  # the first of equals
