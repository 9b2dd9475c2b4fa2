"""Gold answers that look wrong: a policy's rollouts agree on another one.

A policy that is sure of an answer errs too, so a suspect is a prompt to look at and no proof. Where the policy is not
sure, nothing can be said; those prompts are counted apart and are in no share.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from pydantic import Field

from models.specs import Settings
from storage.rows import GoldCheck, ScoredRollout
from tasks.answers import answer_group
from tasks.metrics import majority

VERDICTS = AGREES, SUSPECT, UNSURE = "agrees", "suspect", "unsure"


class Suspicion(Settings):
    """When a majority is confident, and how many gold answers it may contradict. The figures are ours."""

    not_in_key = frozenset({"most_suspect_share"})

    minimum_votes: int = Field(default=4, ge=1)  # rollouts with an answer that can be read
    minimum_agreement: float = Field(default=0.75, gt=0.5, le=1)  # share of the votes for the majority's answer
    most_suspect_share: float | None = Field(default=None, ge=0, le=1)  # of the prompts with a confident majority


def check_gold(scored: Iterable[ScoredRollout], gold: str, settings: Suspicion) -> GoldCheck:
    """What the rollouts of one prompt say of its gold answer. Votes and majority are those of maj@k."""
    rows = sorted(scored, key=lambda row: row.rollout_index)
    groups = [answer_group(row.answer) for row in rows if row.reward is not None]
    counts = Counter(group for group in groups if group is not None)
    picked, votes = majority(rows), counts.total()
    agreement = max(counts.values()) / votes if votes else None
    if agreement is None or votes < settings.minimum_votes or agreement < settings.minimum_agreement:
        verdict = UNSURE
    else:
        assert picked is not None  # there are votes
        verdict = AGREES if answer_group(picked.answer) == answer_group(gold) else SUSPECT
    return GoldCheck(
        prompt_id=rows[0].prompt_id,
        prompt=rows[0].prompt,
        gold=gold,
        majority=None if picked is None else picked.answer,
        agreement=agreement,
        votes=votes,
        verdict=verdict,
    )


def suspect_share(checks: Sequence[GoldCheck]) -> float | None:
    """Suspects among the prompts with a confident majority; None: there are no such prompts."""
    sure = [row for row in checks if row.verdict != UNSURE]
    return sum(row.verdict == SUSPECT for row in sure) / len(sure) if sure else None


def told(checks: Sequence[GoldCheck]) -> str:
    """The estimate in a sentence."""
    sure = sum(row.verdict != UNSURE for row in checks)
    share = suspect_share(checks)
    if share is None:
        return f"Gold answers: none of {len(checks):,} prompts has a confident majority, so none could be checked."
    suspects = sum(row.verdict == SUSPECT for row in checks)
    return (
        f"Gold answers: {suspects:,} of the {sure:,} prompts with a confident majority are contradicted by it "
        f"({100 * share:.1f} %); the other {len(checks) - sure:,} could not be checked."
    )
