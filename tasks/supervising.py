"""A supervisor's part: what it is asked, as prompts, and what is read off its replies, as rows. All of it is kept.

What it is asked are ordinary prompts, so that its replies are sampled like any rollouts: through the ledger, in shards,
each drawn once however often a run is killed.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from models.specs import EngineSettings, ModelRef, PromptTemplate, Sampling, Settings
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.digests import DIGEST_LENGTH, file_sha256
from storage.hub import Source, read_source, source_key, source_name
from storage.rows import (
    BackTranslation,
    CheckedVerifier,
    Instance,
    Instruction,
    Prompt,
    Rollout,
    ScoredRollout,
    Verifier,
    VerifierCase,
)
from tasks import instructions as proposing
from tasks import supervision as rules
from tasks import verifiers as writing
from tasks.caching import log_counts, step
from tasks.instructions import Combining, Length, Proposing, Read
from tasks.loading import open_folder
from tasks.prompts import ngrams
from tasks.sampling import sample_rollouts
from tasks.supervision import Relevance, Translating
from tasks.verifiers import WritingCases, WritingVerifiers

AS_IT_IS = PromptTemplate()  # the texts are whole already; a chat template is put around them by the engine


class SupervisorError(RuntimeError):
    """The supervisor's replies cannot be used; the message quotes the first and says what to change."""


class Supervisor(Settings):
    """The model that writes instructions, verifiers and cases, and the engine that serves it."""

    model: ModelRef
    engine: EngineSettings


class Queries(NamedTuple):
    """Queries to propose instructions for, and those that held-out instructions are put to."""

    train: DatasetRef
    dev: DatasetRef
    test: DatasetRef


def open_supervisor(supervisor: Supervisor | None, policy: ModelRef, engine: EngineSettings) -> Supervisor:
    """The supervisor, a script or folder named by its content; None: the policy supervises itself."""
    if supervisor is None:
        return Supervisor(model=policy, engine=engine)
    file = Path(supervisor.model.name)
    if file.is_file():
        named = {"digest": file_sha256(file)[:DIGEST_LENGTH], "path": str(file.absolute())}
        return supervisor.model_copy(update={"model": supervisor.model.model_copy(update=named)})
    return supervisor.model_copy(update={"model": open_folder(supervisor.model)})


def ask(supervisor: Supervisor, prompts: DatasetRef, sampling: Sampling) -> DatasetRef:
    """The supervisor's replies, as Rollout rows."""
    return sample_rollouts(supervisor.model, prompts, AS_IT_IS, sampling, supervisor.engine)


@step(version="1", rows=lambda source, length, between: sum(1 for _ in read_source(source)))
def load_queries(source: Source, length: Length, between: tuple[str, str] | None) -> DatasetRef:
    """The queries of a source that are neither too short nor too long, each once.

    Args:
        between: the query is what stands between these in the text, the first time; None: the whole text.
    """
    counts: Counter[str] = Counter()
    queries = list(queries_of(source, length, between, counts))
    log_counts(+counts)
    if not queries:
        told = ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
        raise SupervisorError(f"{source_name(source)} holds no query to use ({told}); see `length` and `between`")
    return write_rows(queries, Prompt, step="queries", settings=source_key(source))


def queries_of(
    source: Source, length: Length, between: tuple[str, str] | None, counts: Counter[str]
) -> Iterator[Prompt]:
    """The queries of a source; what is left out is counted."""

    def texts() -> Iterator[str]:
        for row in read_source(source):
            yield row.prompt if between is None else _between(row.prompt, *between)

    return proposing.queries_within(texts(), source_name(source), length, counts)


@step(version="1", rows=lambda queries, settings: queries.rows)
def ask_for_instructions(queries: DatasetRef, settings: Proposing) -> DatasetRef:
    """What the supervisor is asked about each query."""
    asked = (proposing.ask_for_instruction(query, settings) for query in read_rows(queries, Prompt))
    return write_rows(asked, Prompt, step="asked", parents=[queries], settings=settings.key())


@step(version="1", rows=lambda replies, queries, settings, evaluation: replies.rows)
def read_instructions(
    replies: DatasetRef, queries: DatasetRef, settings: Proposing, evaluation: DatasetRef | None
) -> DatasetRef:
    """Distinct instructions, each with the kinds of the evaluation's that it looks like.

    Args:
        evaluation: the evaluation's prompts, of which no instruction is to share 13 words; None: not looked at.
    Raises:
        SupervisorError: too many replies cannot be read, or none is left.
    """
    by_asking = {
        proposing.ask_for_instruction(query, settings).prompt_id: query for query in read_rows(queries, Prompt)
    }
    theirs = (
        {}
        if evaluation is None
        else {gram: f"13 words of {row.source}" for row in read_rows(evaluation, Prompt) for gram in ngrams(row.prompt)}
    )
    read, counts = Read(replies.rows, Counter(), []), Counter[str]()
    rows = list(proposing.instructions_of(read_rows(replies, Rollout), by_asking, settings, theirs, read, counts))
    _log(read, counts)
    for kind, count in Counter(kind for row in rows for kind in row.evaluation_types).most_common():
        log_counts({f"like the evaluation's: {kind}": count})
    _check(
        read,
        len(rows),
        settings.maximum_unreadable,
        "instruction",
        "Show the supervisor better proposing.examples, reword proposing.text, take a more capable supervisor, or "
        "raise proposing.maximum_unreadable.",
    )
    return write_rows(rows, Instruction, step="instructions", parents=[replies], settings=settings.key())


@step(version="1", rows=lambda instructions, settings: instructions.rows)
def ask_about_instructions(instructions: DatasetRef, settings: WritingVerifiers | WritingCases) -> DatasetRef:
    """What the supervisor is asked about each instruction, verifiers or cases."""
    asked = (writing.ask_about(row, settings) for row in read_rows(instructions, Instruction))
    return write_rows(asked, Prompt, step="asked", parents=[instructions], settings=settings.key())


@step(version="1", rows=lambda replies, instructions, settings: replies.rows)
def read_verifiers(replies: DatasetRef, instructions: DatasetRef, settings: WritingVerifiers) -> DatasetRef:
    """Distinct verifiers of each instruction; nothing of them has run yet.

    Raises:
        SupervisorError: too many replies hold none, or none is left.
    """
    read, counts = Read(replies.rows, Counter(), []), Counter[str]()
    asked = _by_asking(instructions, settings)
    rows = list(writing.verifiers_of(read_rows(replies, Rollout), asked, read, counts))
    _log(read, counts)
    _check(
        read,
        len(rows),
        settings.maximum_unreadable,
        "verifier",
        "A supervisor has to reply with one ```python block that defines evaluate(response): reword verifiers.text, "
        "raise verifiers.sampling.max_completion_tokens where replies are cut, take a more capable supervisor, or "
        "raise verifiers.maximum_unreadable.",
    )
    return write_rows(rows, Verifier, step="verifiers", parents=[replies], settings=settings.key())


@step(version="1", rows=lambda replies, instructions, settings: replies.rows)
def read_cases(replies: DatasetRef, instructions: DatasetRef, settings: WritingCases) -> DatasetRef:
    """Distinct cases of each instruction.

    Raises:
        SupervisorError: too many replies hold none, or none is left.
    """
    read, counts = Read(replies.rows, Counter(), []), Counter[str]()
    asked = _by_asking(instructions, settings)
    rows = list(writing.cases_of(read_rows(replies, Rollout), asked, read, counts))
    _log(read, counts)
    _check(
        read,
        len(rows),
        settings.maximum_unreadable,
        "case",
        'A supervisor has to reply with lines like {"response": "...", "result": true}: reword cases.text, raise '
        "cases.sampling.max_completion_tokens where replies are cut, take a more capable supervisor, or raise "
        "cases.maximum_unreadable.",
    )
    return write_rows(rows, VerifierCase, step="cases", parents=[replies], settings=settings.key())


@step(version="1", rows=lambda checked, settings: checked.rows)
def ask_back_translations(checked: DatasetRef, settings: Translating) -> DatasetRef:
    """What the supervisor is asked about each verifier that was kept."""
    asked = (rules.ask_back(row, settings) for row in read_rows(checked, CheckedVerifier) if row.kept)
    return write_rows(_once(asked), Prompt, step="asked", parents=[checked], settings=settings.key())


@step(version="1", rows=lambda checked, instructions, backs, settings: checked.rows)
def ask_to_compare(
    checked: DatasetRef, instructions: DatasetRef, backs: DatasetRef, settings: Translating
) -> DatasetRef:
    """What the supervisor is asked about each instruction beside what its verifier says it is.

    Raises:
        SupervisorError: no verifier could be translated back.
    """
    told, back_of = _instructions(instructions), _backs(backs)
    asked = [
        rules.ask_to_compare(told[row.instruction_id], text, settings)
        for row in read_rows(checked, CheckedVerifier)
        if row.kept and (text := _said(back_of[rules.ask_back(row, settings).prompt_id]))
    ]
    if not asked:
        raise SupervisorError(
            f"none of {backs.rows:,} replies says what its verifier checks; reword back_translation.text, take a more "
            "capable supervisor, or leave back_translation out"
        )
    return write_rows(_once(asked), Prompt, step="asked", parents=[checked, backs], settings=settings.key())


@step(version="1", rows=lambda checked, instructions, backs, compared, settings: checked.rows)
def read_comparisons(
    checked: DatasetRef, instructions: DatasetRef, backs: DatasetRef, compared: DatasetRef, settings: Translating
) -> DatasetRef:
    """How the instruction that each kept verifier says it checks fits the real one.

    Raises:
        SupervisorError: the supervisor left too many open.
    """
    told, back_of, verdict_of = _instructions(instructions), _backs(backs), _backs(compared)
    rows = []
    for row in read_rows(checked, CheckedVerifier):
        if not row.kept:
            continue
        instruction, back = told[row.instruction_id], back_of[rules.ask_back(row, settings).prompt_id]
        text = _said(back)
        asked = rules.ask_to_compare(instruction, text, settings).prompt_id if text else ""
        rows.append(rules.back_translation(row, instruction, back, verdict_of.get(asked)))
    reasons = Counter(row.verdict or row.reason for row in rows)
    log_counts(reasons)
    open_ = [row for row in rows if row.verdict is None]
    if len(open_) > settings.maximum_unreadable * len(rows):
        first = "\n".join(f"  {row.reason}: {row.back[:200]!r}" for row in open_[: proposing.SHOWN])
        raise SupervisorError(
            f"the supervisor left {len(open_):,} of {len(rows):,} back-translations open, and back_translation."
            f"maximum_unreadable is {settings.maximum_unreadable:g}. The first:\n{first}\n"
            "Reword back_translation.compare, take a more capable supervisor, or leave back_translation out."
        )
    return write_rows(rows, BackTranslation, step="back_translations", parents=[checked, backs, compared])


@step(version="1", rows=lambda checked, translations, settings, minimum_verifiers: checked.rows)
def drop_contradicted(
    checked: DatasetRef, translations: DatasetRef, settings: Translating, minimum_verifiers: int
) -> DatasetRef:
    """The verifiers, without those that check something else than their instruction asks for."""
    verdicts = {row.verifier_id: row for row in read_rows(translations, BackTranslation)}
    by_instruction: dict[str, list[CheckedVerifier]] = {}
    for row in read_rows(checked, CheckedVerifier):
        by_instruction.setdefault(row.instruction_id, []).append(row)
    rows = [
        row
        for group in by_instruction.values()
        for row in rules.after_translation(group, verdicts, settings, minimum_verifiers)
    ]
    log_counts(Counter(row.reason for row in rows))
    return write_rows(rows, CheckedVerifier, step="checked", parents=[checked, translations], settings=settings.key())


@step(version="1", rows=lambda instructions, checked, queries, split, settings: instructions.rows)
def combine_instances(
    instructions: DatasetRef, checked: DatasetRef, queries: DatasetRef, split: str, settings: Combining
) -> DatasetRef:
    """The instances of a split: its surviving instructions, each with queries.

    Raises:
        SupervisorError: too few instructions survived for three splits.
    """
    kept = {row.instruction_id for row in read_rows(checked, CheckedVerifier) if row.kept}
    surviving = [row for row in read_rows(instructions, Instruction) if row.instruction_id in kept]
    try:
        rows = list(proposing.combine(surviving, list(read_rows(queries, Prompt)), split, settings))
    except ValueError as error:
        raise SupervisorError(str(error)) from error
    log_counts({"instances": len(rows), "instructions_used": len({row.instruction_id for row in rows})})
    return write_rows(rows, Instance, step="instances", parents=[instructions, checked, queries])


@step(version="1", rows=lambda instances: instances.rows)
def ask_plainly(instances: DatasetRef) -> DatasetRef:
    """The instances as prompts, as they are trained on and evaluated with."""
    rows = (proposing.asked(row.prompt) for row in read_rows(instances, Instance))
    return write_rows(rows, Prompt, step="prompts", parents=[instances])


@step(version="1", rows=lambda scored, instances, settings, minimum: scored.rows)
def ask_the_judge(scored: DatasetRef, instances: DatasetRef, settings: Relevance, minimum: float) -> DatasetRef:
    """What the judge is asked about each different completion whose reward is at least the minimum.

    Raises:
        SupervisorError: there is none.
    """
    by_id = {row.prompt_id: row for row in read_rows(instances, Instance)}
    rows = (row for row in read_rows(scored, ScoredRollout) if row.reward is not None and row.reward >= minimum)
    asked = list(_once(rules.ask_the_judge(row, by_id[row.prompt_id], settings) for row in rows))
    if not asked:
        first = islice(read_rows(scored, ScoredRollout), proposing.SHOWN)
        told = "\n".join(f"  {row.reason}: {row.completion[:200]!r}" for row in first)
        raise SupervisorError(
            f"none of {scored.rows:,} completions passes {minimum:g} of its verifiers, so there is nothing to judge "
            f"and nothing to choose. The first:\n{told}\nStart from a policy that follows instructions at times, draw "
            "more completions, or lower pairing.chosen_minimum."
        )
    return write_rows(asked, Prompt, step="asked", parents=[scored], settings=settings.key())


@step(version="1", rows=lambda scored, instances, replies, settings: scored.rows)
def apply_judge(scored: DatasetRef, instances: DatasetRef, replies: DatasetRef, settings: Relevance) -> DatasetRef:
    """The scored completions, without a reward where they do not answer their query.

    Raises:
        SupervisorError: the judge gave too few numbers.
    """
    by_id = {row.prompt_id: row for row in read_rows(instances, Instance)}
    said = _backs(replies)
    mute = [row for row in said.values() if rules.read_rating(row.completion) is None]
    counts = Counter({"judged": len(said), "no number": len(mute)})
    if len(mute) > settings.maximum_unreadable * len(said):
        first = "\n".join(f"  {row.completion[:200]!r}" for row in mute[: proposing.SHOWN])
        raise SupervisorError(
            f"the judge gave no number from 0 to 10 in {len(mute):,} of {len(said):,} replies, and judge."
            f"maximum_unreadable is {settings.maximum_unreadable:g}. The first:\n{first}\n"
            "Reword judge.text, take a more capable supervisor, or leave judge out."
        )

    def rows() -> Iterator[ScoredRollout]:
        for row in read_rows(scored, ScoredRollout):
            asked = rules.ask_the_judge(row, by_id[row.prompt_id], settings)
            after = rules.judged(row, said.get(asked.prompt_id), settings)
            counts["refused"] += after is not row
            yield after

    reference = write_rows(rows(), ScoredRollout, step="scored", parents=[scored, replies], settings=settings.key())
    log_counts(+counts)
    return reference


def _between(text: str, before: str, after: str) -> str:
    _, found, rest = text.partition(before)
    return rest.partition(after)[0].strip() if found else ""


def _by_asking(instructions: DatasetRef, settings: WritingVerifiers | WritingCases) -> Mapping[str, Instruction]:
    return {writing.ask_about(row, settings).prompt_id: row for row in read_rows(instructions, Instruction)}


def _instructions(instructions: DatasetRef) -> dict[str, str]:
    return {row.instruction_id: row.instruction for row in read_rows(instructions, Instruction)}


def _backs(replies: DatasetRef) -> dict[str, Rollout]:
    """The first reply to each asking."""
    first: dict[str, Rollout] = {}
    for row in read_rows(replies, Rollout):
        first.setdefault(row.prompt_id, row)
    return first


def _said(reply: Rollout) -> str:
    return reply.completion.strip() if reply.finish_reason == "stop" else ""


def _once(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    seen: set[str] = set()
    for row in prompts:
        if row.prompt_id not in seen:
            seen.add(row.prompt_id)
            yield row


def _log(read: Read, counts: Counter[str]) -> None:
    unread = Counter({reason: count for reason, count in read.reasons.items() if reason != "read"})
    log_counts({"replies": read.replies, **+counts, **unread})


def _check(read: Read, kept: int, maximum: float, what: str, advice: str) -> None:
    if told := proposing.too_many_unreadable(read, kept, maximum, what, advice):
        raise SupervisorError(told)
