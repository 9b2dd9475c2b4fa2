"""Honest verifiers get the verdicts worked out by hand, alone and in one process with all the others."""

import pytest

from tasks.sandbox import Limits, run_verifier
from tests.sandbox.honest import HONEST, Honest
from tests.sandbox.running import collect

OUTCOMES = {"+": "passed", "-": "failed", "!": "error"}


def expected(honest: Honest) -> list[str]:
    return [OUTCOMES[sign] for sign in honest.signs]


@pytest.mark.parametrize("honest", [pytest.param(one, id=one.name.replace(" ", "-")) for one in HONEST])
def test_an_honest_verifier_gets_the_verdicts_worked_out_by_hand(honest: Honest) -> None:
    verdicts = run_verifier(honest.source, list(honest.responses))
    assert [verdict.outcome for verdict in verdicts] == expected(honest), verdicts


@pytest.mark.parametrize("share", [1, 7, 1000])
def test_sharing_a_process_changes_no_verdict(share: int) -> None:
    jobs = [(one.source, one.responses) for one in (*HONEST, *reversed(HONEST))]
    rows = collect(jobs, Limits(verifiers_per_process=share), workers=1)
    found = [[verdict.outcome for verdict in row] for row in rows]
    assert found == [expected(one) for one in (*HONEST, *reversed(HONEST))]
