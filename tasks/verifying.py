"""Where verifiers run: on cases and fillers before they are trusted, then on completions; always in tasks/sandbox."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import (
    CheckedVerifier,
    Instance,
    Prompt,
    Rollout,
    ScoredRollout,
    Verification,
    Verifier,
    VerifierCase,
)
from tasks import consistency, votes
from tasks.caching import log_counts, step
from tasks.consistency import KEPT, Consistency
from tasks.sandbox import Job, Limits, Verdict, run_verifiers
from tasks.serving import raise_if_stopping
from tasks.votes import Completing, Drawn, Voting

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
    by_instruction: dict[str, list[Verifier]] = {}
    for verifier in read_rows(verifiers, Verifier):
        by_instruction.setdefault(verifier.instruction_id, []).append(verifier)
    cases_of: dict[str, list[VerifierCase]] = {}
    for case in read_rows(cases, VerifierCase):
        cases_of.setdefault(case.instruction_id, []).append(case)

    def texts(instruction_id: str) -> list[str]:
        responses = [case.response for case in cases_of.get(instruction_id, ())]
        return list(dict.fromkeys([*settings.probes, *responses]))

    jobs = (Job(row.source, tuple(texts(row.instruction_id))) for group in by_instruction.values() for row in group)
    verdicts = in_order(jobs, limits)
    checked = []
    for instruction_id, group in by_instruction.items():
        found = {row.verifier_id: next(verdicts) for row in group}
        outcomes = {
            name: dict(zip(texts(instruction_id), (one.outcome for one in told), strict=True))
            for name, told in found.items()
        }
        isolation = next(one.isolation for told in found.values() for one in told)
        checked += consistency.cross_check(group, cases_of.get(instruction_id, []), outcomes, settings, isolation)
    counts = _counts(checked)
    log_counts(counts)
    if not counts["instructions_kept"]:
        raise NothingSurvives(_none_kept(checked, counts))
    return write_rows(checked, CheckedVerifier, step="checked", parents=[verifiers, cases], settings=settings.key())


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
    kept = _kept(checked)
    counts: Counter[str] = Counter()

    def jobs() -> Iterator[Job]:
        for instance, drawn in drawn_for(instances, Completions(plain, shown)):
            texts = tuple(one.rollout.completion for one in votes.distinct(drawn))
            for row in kept[instance.instruction_id] if texts else ():
                yield Job(row.source, texts)

    def rows() -> Iterator[Verification]:
        verdicts = in_order(jobs(), limits)
        for instance, drawn in drawn_for(instances, Completions(plain, shown)):
            asked = votes.distinct(drawn)
            for verifier in kept[instance.instruction_id] if asked else ():
                for one, verdict in zip(asked, next(verdicts), strict=True):
                    counts[verdict.outcome] += 1
                    yield _verification(instance, one, verifier, verdict)

    remaining = rows()
    first = next(remaining, None)
    if first is None:
        raise NothingSurvives(_none_asked(instances, Completions(plain, shown)))

    def all_rows() -> Iterator[Verification]:
        yield first
        yield from remaining

    parents = [ref for ref in (instances, checked, plain, shown) if ref is not None]
    reference = write_rows(all_rows(), Verification, step="verifications", parents=parents)
    log_counts(counts)
    return reference


@step(version="1")
def score_by_votes(
    instances: DatasetRef,
    plain: DatasetRef | None,
    shown: DatasetRef | None,
    verifications: DatasetRef,
    voting: Voting,
) -> DatasetRef:
    """Reward each completion with the share of its verifiers that it passes.

    Raises:
        NothingSurvives: too many completions have no reward; quotes the first.
    """
    instruction_of = {row.prompt_id: row.instruction_id for row in read_rows(instances, Instance)}
    trivial = votes.trivial_verifiers(read_rows(verifications, Verification), instruction_of, voting)
    isolation = next(read_rows(verifications, Verification)).isolation
    counts: Counter[str] = Counter()
    undecided: list[ScoredRollout] = []

    def rows() -> Iterator[ScoredRollout]:
        words = _Groups(read_rows(verifications, Verification))
        for instance, drawn in drawn_for(instances, Completions(plain, shown)):
            outcomes: dict[int, dict[str, str]] = {}
            for word in words.of(instance.prompt_id):
                outcomes.setdefault(word.rollout_index, {})[word.verifier_id] = word.outcome
            scored = votes.score_instance(instance, drawn, outcomes, trivial, voting, isolation)
            counts.update(votes.tally(scored))
            undecided.extend([row for row in scored if row.reward is None][: SHOWN - len(undecided)])
            yield from scored

    parents = [ref for ref in (instances, plain, shown, verifications) if ref is not None]
    reference = write_rows(rows(), ScoredRollout, step="scored", parents=parents, settings=voting.key())
    log_counts({**counts, **({"verifiers that accept everything": len(trivial)} if trivial else {})})
    if (without := reference.rows - _decided(reference)) > voting.maximum_undecided * reference.rows:
        raise NothingSurvives(_too_many_undecided(without, reference, counts, undecided, voting))
    return reference


def in_order(jobs: Iterable[Job], limits: Limits) -> Iterator[list[Verdict]]:
    """The verdicts of each job, in the jobs' order; a bounded number of jobs is under way."""
    with asyncio.Runner() as runner:
        verdicts = run_verifiers(jobs, limits)
        try:
            while True:
                raise_if_stopping()
                try:
                    yield runner.run(_next(verdicts))
                except StopAsyncIteration:
                    return
        finally:
            runner.run(_closed(verdicts))


def drawn_for(instances: DatasetRef, completions: Completions) -> Iterator[tuple[Instance, list[Drawn]]]:
    """Each instance with its completions, those drawn without a verifier in sight first; all come in one order."""
    plain, shown = (None if ref is None else _by_prompt(ref) for ref in completions)
    for instance in read_rows(instances, Instance):
        drawn = [] if plain is None else [Drawn(row, row.rollout_index, False) for row in next(plain)]
        start = len(drawn)
        if shown is not None:
            drawn += [Drawn(row, start + row.rollout_index, True) for row in next(shown)]
        assert not any(one.rollout.prompt_id != instance.prompt_id for one in drawn if not one.shown)
        yield instance, drawn


class _Groups:
    """Verifications by prompt, read once from front to back; prompts without any are asked about too."""

    def __init__(self, rows: Iterator[Verification]) -> None:
        self._rows = rows
        self._head = next(rows, None)

    def of(self, prompt_id: str) -> Iterator[Verification]:
        while self._head is not None and self._head.prompt_id == prompt_id:
            yield self._head
            self._head = next(self._rows, None)


async def _next(verdicts: AsyncIterator[list[Verdict]]) -> list[Verdict]:
    return await anext(verdicts)


async def _closed(verdicts: AsyncIterator[list[Verdict]]) -> None:
    close = getattr(verdicts, "aclose", None)
    if close is not None:
        await close()


def _by_prompt(rollouts: DatasetRef) -> Iterator[list[Rollout]]:
    for _, rows in groupby(read_rows(rollouts, Rollout), key=lambda row: row.prompt_id):
        yield list(rows)


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


def _none_kept(checked: Sequence[CheckedVerifier], counts: Counter[str]) -> str:
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


def _decided(scored: DatasetRef) -> int:
    return sum(row.reward is not None for row in read_rows(scored, ScoredRollout))


def _too_many_undecided(
    without: int, scored: DatasetRef, counts: Counter[str], first: Sequence[ScoredRollout], voting: Voting
) -> str:
    told = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
    quoted = "\n".join(f"  {row.reason}: {row.completion[:200]!r}" for row in first)
    return (
        f"{without:,} of {scored.rows:,} completions have no reward ({told}), and voting.maximum_undecided is "
        f"{voting.maximum_undecided:g}. The first:\n{quoted}\nWhere completions are truncated, raise "
        "max_completion_tokens; where verifiers broke, raise limits or consistency.minimum_verifiers; else raise "
        "voting.maximum_undecided."
    )
