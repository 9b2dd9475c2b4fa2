"""A supervisor's part: what it is asked, as prompts, and what is read off its replies, as rows. All of it is kept.

What it is asked are ordinary prompts, so that its replies are sampled like any rollouts: through the ledger, in shards,
each drawn once however often a run is killed.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from models.specs import EngineSettings, ModelRef, PromptTemplate, Sampling, Settings
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.digests import DIGEST_LENGTH, file_sha256
from storage.hub import Source, count_rows, read_source, source_key, source_name
from storage.rows import (
    CheckedVerifier,
    Instance,
    Instruction,
    Prompt,
    Rollout,
    Verifier,
    VerifierCase,
)
from tasks import instances as combining
from tasks import instructions as proposing
from tasks import verifiers as writing
from tasks.caching import log_counts, step
from tasks.instances import Combining
from tasks.instructions import Length, Proposing, Read
from tasks.loading import open_folder
from tasks.prompts import ngrams
from tasks.sampling import sample_rollouts
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


@step(version="1", rows=lambda source, length, between: count_rows(source))
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
    counts["instructions without a verifier"] = len(asked) - len({row.instruction_id for row in rows})
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
    counts["instructions without a case"] = len(asked) - len({row.instruction_id for row in rows})
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
        rows = list(combining.combine(surviving, list(read_rows(queries, Prompt)), split, settings))
    except ValueError as error:
        raise SupervisorError(str(error)) from error
    log_counts({"instances": len(rows), "instructions_used": len({row.instruction_id for row in rows})})
    return write_rows(rows, Instance, step="instances", parents=[instructions, checked, queries])


@step(version="1", rows=lambda instances: instances.rows)
def ask_plainly(instances: DatasetRef) -> DatasetRef:
    """The instances as prompts, as they are trained on and evaluated with."""
    rows = (proposing.asked(row.prompt) for row in read_rows(instances, Instance))
    return write_rows(rows, Prompt, step="prompts", parents=[instances])


def _between(text: str, before: str, after: str) -> str:
    _, found, rest = text.partition(before)
    return rest.partition(after)[0].strip() if found else ""


def _by_asking(instructions: DatasetRef, settings: WritingVerifiers | WritingCases) -> Mapping[str, Instruction]:
    return {writing.ask_about(row, settings).prompt_id: row for row in read_rows(instructions, Instruction)}


def _log(read: Read, counts: Counter[str]) -> None:
    unread = Counter({reason: count for reason, count in read.reasons.items() if reason != "read"})
    log_counts({"replies": read.replies, **+counts, **unread})


def _check(read: Read, kept: int, maximum: float, what: str, advice: str) -> None:
    if told := proposing.too_many_unreadable(read, kept, maximum, what, advice):
        raise SupervisorError(told)
