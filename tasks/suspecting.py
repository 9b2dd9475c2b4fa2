"""Scored rollouts -> what they say of the gold answers, before anything is trained on those."""

import logging
from itertools import groupby

from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import GoldCheck, Prompt, ScoredRollout
from tasks import suspects as rules
from tasks.caching import log_counts, step
from tasks.planning import current_plan
from tasks.recording import Halted
from tasks.suspects import SUSPECT, Suspicion

log = logging.getLogger("ratchet")

SHOWN = 3  # suspects quoted


class SuspectAnswers(Halted):
    """So many gold answers look wrong that nothing is to be trained on them."""


def question_gold(scored: DatasetRef, prompts: DatasetRef, suspicion: Suspicion) -> DatasetRef:
    """Check the gold answers against confident majorities, and tell what came of it; the checks, a row a prompt.

    Raises:
        SuspectAnswers: more are contradicted than `most_suspect_share` allows; quotes the first.
    """
    reference = check_gold(scored, prompts, suspicion)
    if current_plan() is None:
        checks = list(read_rows(reference, GoldCheck))
        log.info("%s See %s.", rules.told(checks), reference.name)
        share, most = rules.suspect_share(checks), suspicion.most_suspect_share
        if share is not None and most is not None and share > most:
            raise SuspectAnswers(_too_many(checks, reference, most))
    return reference


@step(version="1", rows=lambda scored, prompts, suspicion: prompts.rows)
def check_gold(scored: DatasetRef, prompts: DatasetRef, suspicion: Suspicion) -> DatasetRef:
    """What the rollouts of each prompt say of its gold answer."""
    gold = {row.prompt_id: row.answer or "" for row in read_rows(prompts, Prompt)}
    checks = [
        rules.check_gold(rollouts, gold[prompt_id], suspicion)
        for prompt_id, rollouts in groupby(read_rows(scored, ScoredRollout), key=lambda row: row.prompt_id)
    ]
    log_counts({f"gold {verdict}": sum(row.verdict == verdict for row in checks) for verdict in rules.VERDICTS})
    return write_rows(
        checks, GoldCheck, step="gold_checks", parents=[scored, prompts], settings={"suspicion": suspicion.key()}
    )


def _too_many(checks: list[GoldCheck], reference: DatasetRef, most: float) -> str:
    suspects = [row for row in checks if row.verdict == SUSPECT]
    first = "\n".join(
        f"  gold {row.gold!r}, but {100 * (row.agreement or 0):.0f} % of {row.votes} rollouts say {row.majority!r}: "
        f"{row.prompt[-200:]!r}"
        for row in suspects[:SHOWN]
    )
    return (
        f"{rules.told(checks)} suspicion.most_suspect_share is {most:g}. The first of them:\n{first}\n"
        f"All of them stand in {reference.name}, with the verdict {SUSPECT!r}. Nothing was trained on them: correct "
        "the gold answers or leave those prompts out; if they are right, and the policy errs, raise most_suspect_share."
    )
