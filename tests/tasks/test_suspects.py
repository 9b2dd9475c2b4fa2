"""Gold answers that look wrong, with votes and shares worked out by hand."""

import logging

import pytest

from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import GoldCheck, Prompt, ScoredRollout
from tasks.planning import planning
from tasks.recording import Halted
from tasks.suspecting import SuspectAnswers, question_gold
from tasks.suspects import Suspicion, check_gold, suspect_share, told
from tests.flows.builders import heard
from tests.tasks.builders import scored


def votes(*answers: str | None, prompt_id: str = "p", gold: str = "7") -> list[ScoredRollout]:
    """Rollouts with these answers; None: no answer could be read."""
    rewards = [None if answer is None else float(answer == gold) for answer in answers]
    return [
        scored(n, reward, answer=answer, prompt_id=prompt_id)
        for n, (answer, reward) in enumerate(zip(answers, rewards, strict=True))
    ]


@pytest.mark.parametrize(
    ("answers", "verdict", "agreement"),
    [
        pytest.param(["7", "7", "7", "8"], "agrees", 0.75, id="three of four for gold"),
        pytest.param(["8", "8", "7", "8"], "suspect", 0.75, id="three of four against"),
        pytest.param(["8", "8.0", "$8", "7"], "suspect", 0.75, id="votes are by value"),
        pytest.param(["8", "8", "7", "7"], "unsure", 0.5, id="a tie"),
        pytest.param(["8", "8", "8"], "unsure", 1.0, id="three votes are too few"),
        pytest.param(["8", "8", "8", None, None], "unsure", 1.0, id="no answer is no vote"),
        pytest.param(["8", "8", "8", "8", None, None], "suspect", 1.0, id="nor does it take from the agreement"),
        pytest.param([None, None], "unsure", None, id="nobody votes"),
    ],
)
def test_verdict(answers: list[str | None], verdict: str, agreement: float | None) -> None:
    check = check_gold(votes(*answers), "7", Suspicion())
    assert (check.verdict, check.agreement, check.gold) == (verdict, agreement, "7")


def test_gold_is_compared_by_value() -> None:
    rows = votes("1,000", "1000", "1000.0", "$1000", gold="1000")
    assert check_gold(rows, "1000.00", Suspicion()).verdict == "agrees"


def test_the_share_is_of_the_prompts_that_could_be_checked() -> None:
    checks = [check_gold(votes(*answers), "7", Suspicion()) for answers in ("7777", "8888", "7777", "78", "89")]
    assert suspect_share(checks) == pytest.approx(1 / 3)
    assert told(checks) == (
        "Gold answers: 1 of the 3 prompts with a confident majority are contradicted by it (33.3 %); the other 2 could "
        "not be checked."
    )


def test_nothing_checked_is_not_nothing_wrong() -> None:
    checks = [check_gold(votes("7", "8"), "7", Suspicion())]
    assert suspect_share(checks) is None
    assert told(checks) == "Gold answers: none of 1 prompts has a confident majority, so none could be checked."


def two_of_four_wrong() -> tuple[DatasetRef, DatasetRef]:
    """Five prompts: two right gold answers, two that a majority contradicts, and one that none is sure of."""
    answers = {"a": "7777", "b": "8888", "c": "7777", "d": "9998", "e": "78"}
    prompts = (Prompt(prompt_id=name, source="tests", prompt=f"prompt {name}", answer="7") for name in answers)
    rows = (row for name, given in answers.items() for row in votes(*given, prompt_id=name))
    return write_rows(rows, ScoredRollout, step="scored"), write_rows(prompts, Prompt, step="prompts")


def test_the_estimate_is_told_before_training_and_every_prompt_has_a_row(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ratchet"), heard() as records:
        reference = question_gold(*two_of_four_wrong(), Suspicion())
    checks = list(read_rows(reference, GoldCheck))
    assert [(row.prompt_id, row.verdict, row.majority) for row in checks] == [
        ("a", "agrees", "7"),
        ("b", "suspect", "8"),
        ("c", "agrees", "7"),
        ("d", "suspect", "9"),
        ("e", "unsure", "7"),
    ]
    assert "2 of the 4 prompts with a confident majority are contradicted by it (50.0 %)" in caplog.text
    assert records[-1].counts == {"gold agrees": 2, "gold suspect": 2, "gold unsure": 1}


def test_more_suspects_than_allowed_halt_the_run_with_examples_and_are_stored_all_the_same() -> None:
    rows = two_of_four_wrong()
    with pytest.raises(SuspectAnswers) as caught:
        question_gold(*rows, Suspicion(most_suspect_share=0.4))
    message = str(caught.value)
    assert isinstance(caught.value, Halted)
    assert "gold '7', but 100 % of 4 rollouts say '8': 'prompt b'" in message
    assert "gold '7', but 75 % of 4 rollouts say '9': 'prompt d'" in message
    assert "most_suspect_share is 0.4" in message
    with heard() as records:
        question_gold(*rows, Suspicion(most_suspect_share=0.5))  # half of them is as many as allowed
    assert [record.cached for record in records] == [True]  # what is allowed is in no key


def test_a_plan_checks_no_gold_answer() -> None:
    scored_rows, prompts = two_of_four_wrong()
    with planning() as planned:
        question_gold(scored_rows, prompts, Suspicion(most_suspect_share=0.0))
    assert [(step.step, step.cached, step.rows) for step in planned] == [("check_gold", False, 5)]
