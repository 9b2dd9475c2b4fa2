"""Where verifiers run: on cases and fillers before they are trusted, then on completions; always in tasks/sandbox."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import NamedTuple

from storage.datasets import DatasetRef, join_rows, read_rows, write_rows
from storage.rows import (
    CheckedVerifier,
    Instance,
    Prompt,
    Rollout,
    Verification,
    Verifier,
    VerifierCase,
)
from tasks import consistency, votes
from tasks.caching import log_counts, step
from tasks.consistency import KEPT, Consistency
from tasks.sandbox import Job, Limits, Verdict, run_verifiers
from tasks.serving import raise_if_stopping
from tasks.spreading import cuts, spread
from tasks.votes import Completing, Drawn

INSTRUCTIONS_PER_SHARD, INSTANCES_PER_SHARD = 50, 200  # a few thousand calls of verifiers: seconds of a core's work
SHOWN = 3  # verifiers or completions quoted in an error


class NothingSurvives(RuntimeError):
    """No verifier, or no completion, is left to go on with; the message says why and what to change."""


class Completions(NamedTuple):
    """What a policy wrote for instances, with and without a verifier in sight; None: nothing was drawn that way."""

    plain: DatasetRef | None
    shown: DatasetRef | None


@step(version="1", rows=lambda verifiers, cases, settings, limits: verifiers.rows)
def check_verifiers(verifiers: DatasetRef, cases: DatasetRef, settings: Consistency, limits: Limits) -> DatasetRef:
    """Every verifier, run on its instruction's cases and on the fillers, with whether it is kept and why not.

    Raises:
        NothingSurvives: no instruction has verifiers left; counts the reasons and quotes the first.
        SandboxError: the sandbox itself broke.
    """
    instructions = len({row.instruction_id for row in read_rows(verifiers, Verifier)})
    shards, parents = cuts(instructions, INSTRUCTIONS_PER_SHARD), [verifiers, cases]
    if len(shards) == 1:
        checked = _check(verifiers, cases, settings, limits, shards[0], "checked")
    else:
        parts = spread(check_shard, (verifiers, cases, settings, limits), shards)
        checked = join_rows(parts, CheckedVerifier, step="checked", parents=parents, settings=settings.key())
    if not any(row.kept for row in read_rows(checked, CheckedVerifier)):
        raise NothingSurvives(_none_kept(list(read_rows(checked, CheckedVerifier))))
    return checked


@step(version="1")
def check_shard(
    verifiers: DatasetRef, cases: DatasetRef, settings: Consistency, limits: Limits, start: int, stop: int
) -> DatasetRef:
    """The same for the instructions of these numbers, on a Dask cluster, in one sandbox for each of its threads."""
    return _check(verifiers, cases, settings, limits, range(start, stop), "checked_shard", workers=1)


@step(version="1", rows=lambda instances, checked, completing, seed: instances.rows)
def show_verifiers(instances: DatasetRef, checked: DatasetRef, completing: Completing, seed: int) -> DatasetRef:
    """The instances as prompts that show the source of one of their verifiers, in the instances' order."""
    sources = _kept(checked)
    prompts = (
        votes.show_verifier(row, [one.source for one in sources[row.instruction_id]], completing, seed)
        for row in read_rows(instances, Instance)
    )
    return write_rows(prompts, Prompt, step="shown", parents=[instances, checked], settings=completing.key())


@step(version="1")
def verify_rollouts(
    instances: DatasetRef,
    checked: DatasetRef,
    plain: DatasetRef | None,
    shown: DatasetRef | None,
    limits: Limits,
) -> DatasetRef:
    """What each verifier says of each different completion; truncated and empty ones are not asked about.

    Raises:
        NothingSurvives: there is no completion to ask about.
        SandboxError: the sandbox itself broke.
    """
    completions, shards = Completions(plain, shown), cuts(instances.rows, INSTANCES_PER_SHARD)
    if len(shards) == 1:
        parts = [_verify(instances, checked, completions, limits, shards[0], "verifications")]
    else:
        parts = spread(verify_shard, (instances, checked, plain, shown, limits), shards)
    verified = [part for part in parts if part is not None]
    if not verified:
        raise NothingSurvives(_none_asked(instances, completions))
    if len(shards) == 1:
        return verified[0]
    parents = [ref for ref in (instances, checked, plain, shown) if ref is not None]
    return join_rows(verified, Verification, step="verifications", parents=parents)


@step(version="1")
def verify_shard(
    instances: DatasetRef,
    checked: DatasetRef,
    plain: DatasetRef | None,
    shown: DatasetRef | None,
    limits: Limits,
    start: int,
    stop: int,
) -> DatasetRef | None:
    """The same for the instances of these numbers, on a Dask cluster, in one sandbox for each of its threads.

    None: there is no completion to ask about.
    """
    part, completions = range(start, stop), Completions(plain, shown)
    return _verify(instances, checked, completions, limits, part, "verifications_shard", workers=1)


def in_order(jobs: Iterable[Job], limits: Limits, workers: int | None = None) -> Iterator[list[Verdict]]:
    """The verdicts of each job, in the jobs' order; a bounded number of jobs is under way."""
    with asyncio.Runner() as runner:
        verdicts = run_verifiers(jobs, limits, workers)
        try:
            while True:
                raise_if_stopping()
                try:
                    yield runner.run(_next(verdicts))
                except StopAsyncIteration:
                    return
        finally:
            runner.run(_closed(verdicts))


def drawn_for(
    instances: DatasetRef, completions: Completions, part: range | None = None
) -> Iterator[tuple[Instance, list[Drawn]]]:
    """Each instance with its completions, those drawn without a verifier in sight first; all come in one order.

    Args:
        part: numbers of the instances wanted; None: all.
    """
    plain, shown = (None if ref is None else _by_prompt(ref, instances.rows, part) for ref in completions)
    for instance in read_rows(instances, Instance, part):
        drawn = [] if plain is None else [Drawn(row, row.rollout_index, False) for row in next(plain)]
        start = len(drawn)
        if shown is not None:
            drawn += [Drawn(row, start + row.rollout_index, True) for row in next(shown)]
        assert not any(one.rollout.prompt_id != instance.prompt_id for one in drawn if not one.shown)
        yield instance, drawn


async def _next(verdicts: AsyncIterator[list[Verdict]]) -> list[Verdict]:
    return await anext(verdicts)


async def _closed(verdicts: AsyncIterator[list[Verdict]]) -> None:
    close = getattr(verdicts, "aclose", None)
    if close is not None:
        await close()


def _by_prompt(rollouts: DatasetRef, prompts: int, part: range | None) -> Iterator[list[Rollout]]:
    if part is not None:
        each, uneven = divmod(rollouts.rows, prompts)  # sampling draws as many of each prompt
        assert not uneven
        part = range(part.start * each, part.stop * each)
    for _, rows in groupby(read_rows(rollouts, Rollout, part), key=lambda row: row.prompt_id):
        yield list(rows)


def _check(
    verifiers: DatasetRef,
    cases: DatasetRef,
    settings: Consistency,
    limits: Limits,
    part: range,
    step: str,
    *,
    workers: int | None = None,
) -> DatasetRef:
    by_instruction: dict[str, list[Verifier]] = {}
    for verifier in read_rows(verifiers, Verifier):
        by_instruction.setdefault(verifier.instruction_id, []).append(verifier)
    groups = dict(list(by_instruction.items())[part.start : part.stop])
    cases_of: dict[str, list[VerifierCase]] = {}
    for case in read_rows(cases, VerifierCase):
        cases_of.setdefault(case.instruction_id, []).append(case)

    def texts(instruction_id: str) -> list[str]:
        responses = [case.response for case in cases_of.get(instruction_id, ())]
        return list(dict.fromkeys([*settings.probes, *responses]))

    jobs = (Job(row.source, tuple(texts(row.instruction_id))) for group in groups.values() for row in group)
    verdicts = in_order(jobs, limits, workers)
    checked = []
    for instruction_id, group in groups.items():
        found = {row.verifier_id: next(verdicts) for row in group}
        outcomes = {
            name: dict(zip(texts(instruction_id), (one.outcome for one in told), strict=True))
            for name, told in found.items()
        }
        isolation = next(one.isolation for told in found.values() for one in told)
        checked += consistency.cross_check(group, cases_of.get(instruction_id, []), outcomes, settings, isolation)
    log_counts(_counts(checked))
    return write_rows(checked, CheckedVerifier, step=step, parents=[verifiers, cases], settings=settings.key())


def _verify(
    instances: DatasetRef,
    checked: DatasetRef,
    completions: Completions,
    limits: Limits,
    part: range,
    step: str,
    *,
    workers: int | None = None,
) -> DatasetRef | None:
    kept = _kept(checked)
    counts: Counter[str] = Counter()

    def jobs() -> Iterator[Job]:
        for instance, drawn in drawn_for(instances, completions, part):
            texts = tuple(one.rollout.completion for one in votes.distinct(drawn))
            for row in kept[instance.instruction_id] if texts else ():
                yield Job(row.source, texts)

    def rows() -> Iterator[Verification]:
        verdicts = in_order(jobs(), limits, workers)
        for instance, drawn in drawn_for(instances, completions, part):
            asked = votes.distinct(drawn)
            for verifier in kept[instance.instruction_id] if asked else ():
                for one, verdict in zip(asked, next(verdicts), strict=True):
                    counts[verdict.outcome] += 1
                    yield _verification(instance, one, verifier, verdict)

    remaining = rows()
    first = next(remaining, None)
    if first is None:
        return None
    parents = [ref for ref in (instances, checked, *completions) if ref is not None]
    reference = write_rows(chain([first], remaining), Verification, step=step, parents=parents)
    log_counts(counts)
    return reference


def _kept(checked: DatasetRef) -> dict[str, list[CheckedVerifier]]:
    kept: dict[str, list[CheckedVerifier]] = {}
    for row in read_rows(checked, CheckedVerifier):
        if row.kept:
            kept.setdefault(row.instruction_id, []).append(row)
    return kept


def _verification(instance: Instance, one: Drawn, verifier: CheckedVerifier, verdict: Verdict) -> Verification:
    return Verification(
        prompt_id=instance.prompt_id,
        rollout_index=one.rollout_index,
        verifier_id=verifier.verifier_id,
        outcome=verdict.outcome,
        detail=verdict.detail,
        shown=one.shown,
        isolation=verdict.isolation,
    )


def _counts(checked: Sequence[CheckedVerifier]) -> Counter[str]:
    counts = Counter("verifiers_kept" if row.reason == KEPT else row.reason for row in checked)
    instructions = {row.instruction_id for row in checked}
    kept = {row.instruction_id for row in checked if row.kept}
    counts["instructions_kept"] = len(kept)
    counts["instructions without a verifier left"] = len(instructions) - len(kept)
    return counts


def _none_kept(checked: Sequence[CheckedVerifier]) -> str:
    counts = _counts(checked)
    told = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common() if count)
    first = "\n".join(f"  {row.reason}: {row.source[:300]!r}" for row in checked[:SHOWN])
    return (
        f"no instruction has verifiers left after the cross-check of {len(checked):,} ({told}). The first:\n{first}\n"
        "Draw more verifiers and cases (sampling.rollouts_per_prompt of either), reword verifiers.text and cases.text, "
        "or lower consistency.verifier_agreement; minimum_verifiers cannot be below 2."
    )


def _none_asked(instances: DatasetRef, completions: Completions) -> str:
    drawn = [one.rollout for _, group in drawn_for(instances, completions) for one in group]
    reasons = Counter(votes.undecidable(rollout) for rollout in drawn)
    told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
    first = "\n".join(f"  {rollout.completion[-200:]!r}" for rollout in drawn[:SHOWN])
    return (
        f"none of {len(drawn):,} completions can be verified ({told}). The first end in:\n{first}\n"
        "Where they are cut, raise max_completion_tokens; where they are empty, see to the model's chat template."
    )
