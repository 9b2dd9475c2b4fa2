"""What became of a rollout: demonstration, judge row, side of a pair; or why it was left out."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from storage.datasets import DatasetRef
from storage.experiments import StepRecord
from storage.results import find_result
from storage.rows import Demonstration, JudgedRollout, Pair, Row, ScoredRollout
from tasks.lineage import Held, Sources
from tasks.omissions import why_not_a_judge_row, why_not_paired, why_not_paired_by_confidence, why_not_selected
from tasks.traces import Became, Use

R = TypeVar("R", bound=Row)
MIXTURE = "multitask"  # the data set that `mix_tasks` writes


class Made(NamedTuple):
    """The rows of one prompt in each data set that was made of its rollouts."""

    judged: Sequence[tuple[Held, list[JudgedRollout]]]
    scored: Sequence[tuple[Held, list[ScoredRollout]]]
    demonstrations: Sequence[tuple[Held, list[Demonstration]]]
    pairs: Sequence[tuple[Held, list[Pair]]]


def uses_of(sources: Sources, index: int, made: Made) -> Iterator[Use]:
    """What each selection, mixture and pairing that read the rollout's scores made of it."""
    for scored, rows in made.scored:
        mixtures = []
        for held, kept in _of_all(sources, Demonstration, made.demonstrations, scored.ref):
            if held.ref.step == MIXTURE:
                mixtures.append((held, [row for row in kept if row.task == "judge"]))
            else:
                yield _selected(sources, index, rows, held, kept)
        yield from _judge_rows(index, rows, mixtures)
        for held, pairs in _of_all(sources, Pair, made.pairs, scored.ref):
            yield from _paired(sources, index, rows, made.judged, held, pairs)


def _of_all(
    sources: Sources, row_type: type[R], known: Sequence[tuple[Held, list[R]]], parent: DatasetRef
) -> Iterator[tuple[Held, list[R]]]:
    """All data sets made of a parent, with the prompt's rows in them, which may be none."""
    rows = {held.ref: found for held, found in known}
    for held in sources.held(row_type):
        if parent in sources.parents(held.ref):
            yield held, rows.get(held.ref, [])


def _selected(
    sources: Sources, index: int, scored: Sequence[ScoredRollout], held: Held, kept: Sequence[Demonstration]
) -> Use:
    times = sum(row.rollout_index == index for row in kept)
    why_not = None if times else why_not_selected(index, scored, sources.settings(held.ref), _marker(held.record))
    return _use(held, "demonstration" if times else None, times, why_not)


def _judge_rows(
    index: int, scored: Sequence[ScoredRollout], mixtures: Sequence[tuple[Held, list[Demonstration]]]
) -> Iterator[Use]:
    """A prompt's judge rows are in one mixture: the one trained on, or the one held out of training."""
    with_rows = [(held, rows) for held, rows in mixtures if rows]
    for held, rows in with_rows or mixtures[:1]:
        times = sum(row.rollout_index == index for row in rows)
        yield _use(held, "judge row" if times else None, times, None if times else why_not_a_judge_row(index, scored))


def _paired(
    sources: Sources,
    index: int,
    scored: Sequence[ScoredRollout],
    judged: Sequence[tuple[Held, list[JudgedRollout]]],
    held: Held,
    pairs: Sequence[Pair],
) -> Iterator[Use]:
    sides: tuple[Became, Became] = ("chosen", "rejected")
    counts = [sum(getattr(pair, f"{side}_index") == index for pair in pairs) for side in sides]
    for side, times in zip(sides, counts, strict=True):
        if times:
            yield _use(held, side, times)
    if any(counts):
        return
    settings = sources.settings(held.ref)
    verdicts = [row for one, rows in judged if one.ref in sources.parents(held.ref) for row in rows]
    if verdicts:
        yield _use(held, None, 0, why_not_paired_by_confidence(index, scored, verdicts, settings))
    else:
        yield _use(held, None, 0, why_not_paired(index, scored, settings))


def _use(held: Held, became: Became | None, times: int, why_not: str | None = None) -> Use:
    return Use(dataset=held.ref.name, iteration=held.record.iteration, became=became, why_not=why_not, times=times)


def _marker(record: StepRecord) -> str | None:
    result = find_result(record.step, record.key) if record.key else None
    inputs = result.key_parts.get("inputs") if result else None
    marker = inputs.get("marker") if isinstance(inputs, dict) else None
    return marker if isinstance(marker, str) else None
