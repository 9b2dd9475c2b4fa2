"""Two more things a supervisor may be asked: what a verifier checks, and whether a completion answers its query.

Both are optional. Back-translation is the original's (METHODS 5.2): the instruction is written anew from the verifier
alone, and a verifier whose instruction contradicts the real one goes. The judge keeps completions that satisfy the form
and do not answer (METHODS 5.6.7) from being chosen; the original cuts at 8 of 10.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from string import Template
from typing import Literal

from pydantic import Field, field_validator

from models.specs import Sampling, Settings
from storage.rows import BackTranslation, CheckedVerifier, Instance, Prompt, Rollout, ScoredRollout
from tasks.instructions import asked, with_names

COMPARED = "compared"
_VERDICT = re.compile(r"\b(same|different|contradiction)\b", re.IGNORECASE)
_SCALE = re.compile(r"\b0\s*(?:to|-)\s*10\b|(?:\bout of|/)\s*10\b", re.IGNORECASE)
_RATING = re.compile(r"\b(?:10|[0-9])\b")


class Translating(Settings):
    """How verifiers are translated back and compared with their instructions."""

    not_in_key = frozenset({"maximum_unreadable"})

    text: str = (
        "Read this Python function. It checks whether an answer follows an instruction. Write the instruction, in one "
        "line and nothing else.\n\n```python\n$source\n```"
    )
    compare: str = (
        "Two instructions for the same answer:\n\n1. $instruction\n2. $back\n\nCan an answer follow both? Reply with "
        "one word. same: they ask for the same. different: they ask for different things, and both can be followed. "
        "contradiction: what follows one of them breaks the other."
    )
    sampling: Sampling = Sampling(rollouts_per_prompt=1, temperature=0.0, top_k=-1, max_completion_tokens=256, seed=45)
    drop: tuple[Literal["different", "contradiction"], ...] = ("contradiction",)
    maximum_unreadable: float = Field(default=0.5, ge=0, le=1)

    _text = field_validator("text")(lambda text: with_names(text, {"source"}))
    _compare = field_validator("compare")(lambda text: with_names(text, {"instruction", "back"}))


class Relevance(Settings):
    """How a completion is judged to answer its query; only completions that could be chosen are."""

    not_in_key = frozenset({"maximum_unreadable"})

    text: str = (
        "A query, and an answer to it that had to keep to a certain form. Leave the form aside. How well does the "
        "answer serve whoever asked? Reply with a whole number from 0, not at all, to 10, very well.\n\n"
        "Query: $query\n\nAnswer:\n$completion\n\nNumber:"
    )
    sampling: Sampling = Sampling(rollouts_per_prompt=1, temperature=0.0, top_k=-1, max_completion_tokens=8, seed=46)
    minimum: int = Field(default=8, ge=0, le=10)
    maximum_unreadable: float = Field(default=0.5, ge=0, le=1)

    _names = field_validator("text")(lambda text: with_names(text, {"query", "completion"}))


def ask_back(row: CheckedVerifier, settings: Translating) -> Prompt:
    """What the supervisor is asked about a verifier; it does not see the instruction."""
    return asked(Template(settings.text).substitute(source=row.source.strip("\n")))


def ask_to_compare(instruction: str, back: str, settings: Translating) -> Prompt:
    """What the supervisor is asked about two instructions."""
    return asked(Template(settings.compare).substitute(instruction=instruction, back=back))


def ask_the_judge(row: ScoredRollout, instance: Instance, settings: Relevance) -> Prompt:
    """What the supervisor is asked about a completion."""
    return asked(Template(settings.text).substitute(query=instance.query, completion=row.completion))


def back_translation(
    row: CheckedVerifier, instruction: str, back: Rollout, compared: Rollout | None
) -> BackTranslation:
    """What came of translating a verifier back; `compared` None: there was nothing to compare."""
    verdict, reason = None, "no back-translation"
    if compared is not None:
        found = _VERDICT.findall(compared.completion)
        verdict = found[-1].lower() if found else None
        reason = COMPARED if found else "no verdict"
    return BackTranslation(
        verifier_id=row.verifier_id,
        instruction_id=row.instruction_id,
        instruction=instruction,
        back=back.completion.strip(),
        verdict=verdict,
        reason=reason,
    )


def judged(row: ScoredRollout, reply: Rollout | None, settings: Relevance) -> ScoredRollout:
    """The row, without its reward where the judge does not find that it answers the query, or does not say."""
    if reply is None:
        return row
    rating = read_rating(reply.completion)
    if rating is None:
        return replace(row, reward=None, reason="judge gave no number")
    if rating < settings.minimum:
        return replace(row, reward=None, reason="does not answer the query")
    return row


def read_rating(text: str) -> int | None:
    """The first whole number from 0 to 10 that a judge says; the scale itself is none."""
    found = _RATING.search(_SCALE.sub(" ", text))
    return None if found is None else int(found[0])


def after_translation(
    rows: list[CheckedVerifier], verdicts: Mapping[str, BackTranslation], settings: Translating, minimum_verifiers: int
) -> list[CheckedVerifier]:
    """The verifiers of one instruction, less those that check something else."""
    dropped = {name: row.verdict for name, row in verdicts.items() if row.verdict in settings.drop}
    rows = [
        replace(row, kept=False, reason=f"back-translation: {dropped[row.verifier_id]}")
        if row.kept and row.verifier_id in dropped
        else row
        for row in rows
    ]
    if sum(row.kept for row in rows) >= minimum_verifiers:
        return rows
    return [replace(row, kept=False, reason="instruction: too few verifiers") if row.kept else row for row in rows]
