"""Cross-consistency: verifiers and cases vouch for each other, and what vouches for everything vouches for nothing.

Seed 4's filter (METHODS 5.4) without its weakness (METHODS 5.6.4): the cases are cut in two halves, verifiers are
chosen by the first and have to hold on the second; two different verifiers must be left, and cases of both kinds.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import Field

from models.specs import Settings
from storage.rows import CheckedVerifier, Verifier, VerifierCase
from tasks.instructions import identity

Outcomes = Mapping[str, str]  # response -> what the verifier did with it
VERDICT = {"passed": True, "failed": False}
KEPT = "kept"

FILLER = "The river runs past the old mill, and nobody has counted how often the wheel has turned since spring."
PROBES = (  # fixed texts; a verifier that checks anything rejects one of them, or one of its cases
    "",
    FILLER,
    FILLER.upper(),
    "\n".join(f"{number}. {FILLER}" for number in range(1, 41)),
    '{"a": [1, 2], "b": null}',
)


class Consistency(Settings):
    """When an instruction's verifiers are trusted. Defaults are seed 4's where it has one (METHODS 5.2)."""

    case_agreement: float = Field(default=0.0, ge=0, lt=1)  # a case is kept if more than this share of verifiers agrees
    verifier_agreement: float = Field(default=0.8, gt=0, le=1)  # with the kept cases, of either half; the paper: > 0.5
    minimum_verifiers: int = Field(default=2, ge=2)  # the seed: 1, and any function that says yes passes
    minimum_passing: int = Field(default=1, ge=1)  # cases that follow the instruction, of both halves together
    minimum_failing: int = Field(default=1, ge=1)
    probes: tuple[str, ...] = Field(default=PROBES, min_length=1)


class Halves(NamedTuple):
    """The cases that verifiers are chosen by, and those that they have to hold on."""

    first: list[VerifierCase]
    held_out: list[VerifierCase]


def cross_check(
    verifiers: Sequence[Verifier],
    cases: Sequence[VerifierCase],
    outcomes: Mapping[str, Outcomes],
    settings: Consistency,
    isolation: str,
) -> list[CheckedVerifier]:
    """Every verifier of one instruction, kept or with the reason why not.

    Args:
        outcomes: verifier_id -> what it did with each case's response and with each probe.
    """
    reasons = {row.verifier_id: fault for row in verifiers if (fault := _fault(outcomes[row.verifier_id], settings))}
    sound = [row for row in verifiers if row.verifier_id not in reasons]
    halves = halve(cases)
    first = _agreed(halves.first, sound, outcomes, settings)
    agreement = {row.verifier_id: _share(first, outcomes[row.verifier_id]) for row in sound}
    chosen = [row for row in sound if (agreement[row.verifier_id] or 0.0) >= settings.verifier_agreement]
    held_out = _agreed(halves.held_out, chosen, outcomes, settings)
    confirmed = {row.verifier_id: _share(held_out, outcomes[row.verifier_id]) for row in chosen}
    kept = [row for row in chosen if (confirmed[row.verifier_id] or 0.0) >= settings.verifier_agreement]
    reasons |= {row.verifier_id: "disagrees with the cases" for row in sound if row not in chosen}
    reasons |= {row.verifier_id: "disagrees with the held-out cases" for row in chosen if row not in kept}
    if lacking := _too_few(cases, settings):
        reasons |= {row.verifier_id: f"instruction: {lacking}" for row in sound}
    elif lacking := _too_few([*first, *held_out], settings):
        reasons |= {row.verifier_id: f"instruction: {lacking} that verifiers agree with" for row in kept}
    elif len(kept) < settings.minimum_verifiers:
        reasons |= {row.verifier_id: "instruction: too few verifiers" for row in kept}
    return [
        CheckedVerifier(
            verifier_id=row.verifier_id,
            instruction_id=row.instruction_id,
            source=row.source,
            kept=row.verifier_id not in reasons,
            reason=reasons.get(row.verifier_id, KEPT),
            agreement=agreement.get(row.verifier_id),
            held_out_agreement=confirmed.get(row.verifier_id),
            cases=len(first) + len(held_out),
            isolation=isolation,
        )
        for row in verifiers
    ]


def halve(cases: Sequence[VerifierCase]) -> Halves:
    """The cases dealt out in turn, passing and failing ones in opposite turns, whatever order they come in."""
    dealt = sorted(cases, key=lambda row: identity(row.response))
    passing = [row for row in dealt if row.expected]
    failing = [row for row in dealt if not row.expected]
    first = [*passing[::2], *failing[1::2]]
    held_out = [*passing[1::2], *failing[::2]]
    return Halves(first, held_out)


def _fault(outcomes: Outcomes, settings: Consistency) -> str | None:
    """What disqualifies a verifier whatever the cases are."""
    if all(outcome == "passed" for outcome in outcomes.values()):
        return "trivial: accepts the empty text, every filler and every case"
    verdicts = [outcome for outcome in outcomes.values() if outcome in VERDICT]
    if not verdicts:
        worst = sorted(outcomes.values(), key=list(outcomes.values()).count)[-1]
        return f"broke on every text: {worst}"
    return None


def _agreed(
    cases: Sequence[VerifierCase],
    verifiers: Sequence[Verifier],
    outcomes: Mapping[str, Outcomes],
    settings: Consistency,
) -> list[VerifierCase]:
    """The cases that enough of these verifiers agree with."""
    return [
        case
        for case in cases
        if sum(agrees(outcomes[row.verifier_id], case) for row in verifiers) > settings.case_agreement * len(verifiers)
    ]


def agrees(outcomes: Outcomes, case: VerifierCase) -> bool:
    """Whether a verifier says of a case what was expected; one that broke on it does not."""
    return VERDICT.get(outcomes[case.response]) is case.expected


def _share(cases: Sequence[VerifierCase], outcomes: Outcomes) -> float | None:
    return sum(agrees(outcomes, case) for case in cases) / len(cases) if cases else None


def _too_few(cases: Sequence[VerifierCase], settings: Consistency) -> str | None:
    """What kind of cases an instruction lacks, if it lacks some."""
    if not cases:
        return "no cases"
    passing = sum(case.expected for case in cases)
    if passing < settings.minimum_passing:
        return "too few passing cases"
    return "too few failing cases" if len(cases) - passing < settings.minimum_failing else None
