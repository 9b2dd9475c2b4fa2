"""Rewards by votes: what counts as one, when there are too few, and which completions nobody votes on."""

import pytest

from tasks.votes import (
    Completing,
    Drawn,
    Voting,
    distinct,
    score_instance,
    show_verifier,
    tally,
    trivial_verifiers,
    vote,
)
from tests.tasks.builders import instance, rollout, verification

VOTING = Voting()


def drawn(*texts: str, finish_reason: str = "stop") -> list[Drawn]:
    rows = [rollout(n, text, finish_reason=finish_reason) for n, text in enumerate(texts)]
    return [Drawn(row, n, False) for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        pytest.param("passed passed", (1.0, "passed"), id="all pass"),
        pytest.param("failed failed", (0.0, "failed"), id="all fail"),
        pytest.param("passed failed passed failed", (0.5, "mixed"), id="half"),
        pytest.param("passed failed error", (0.5, "mixed"), id="one that broke has no vote"),
        pytest.param("passed timeout", (None, "verifiers broke: timeout"), id="one vote is too few"),
        pytest.param("invalid memory forbidden", (None, "verifiers broke: forbidden, invalid, memory"), id="all broke"),
    ],
)
def test_the_reward_is_the_share_of_votes_and_unknown_where_they_are_too_few(
    outcomes: str, expected: tuple[float | None, str]
) -> None:
    by_verifier = {str(n): outcome for n, outcome in enumerate(outcomes.split())}
    assert vote(by_verifier, frozenset(), VOTING) == expected


def test_a_trivial_verifier_has_no_vote() -> None:
    outcomes = {"a": "failed", "b": "failed", "yes": "passed"}
    assert vote(outcomes, frozenset({"yes"}), VOTING) == (0.0, "failed")
    assert vote({"a": "failed", "yes": "passed"}, frozenset({"yes"}), VOTING) == (None, "too few verifiers left")


def test_a_verifier_that_accepts_all_completions_that_another_rejects_some_of_is_trivial() -> None:
    rows = [verification("yes", "passed", n) for n in range(4)]
    rows += [verification("strict", "failed" if n else "passed", n) for n in range(4)]
    assert trivial_verifiers(rows, {"p": "i"}, VOTING) == {"yes"}
    assert trivial_verifiers(rows[:3] + rows[4:], {"p": "i"}, VOTING) == frozenset()  # it has seen three texts only
    assert trivial_verifiers(rows, {"p": "i"}, Voting(accepts_all_of=None)) == frozenset()


def test_verifiers_that_agree_that_all_completions_pass_are_not_trivial() -> None:
    rows = [verification(name, "passed", n) for name in ("one", "two") for n in range(6)]
    assert trivial_verifiers(rows, {"p": "i"}, VOTING) == frozenset()


def test_completions_of_all_queries_of_an_instruction_show_that_a_verifier_is_trivial() -> None:
    rows = [verification("yes", "passed", 0, f"p{n}") for n in range(4)]
    rows += [verification("strict", "failed", 0, f"p{n}") for n in range(4)]
    assert trivial_verifiers(rows, {f"p{n}": "i" for n in range(4)}, VOTING) == {"yes"}
    assert trivial_verifiers(rows[:4], {f"p{n}": "i" for n in range(4)}, VOTING) == frozenset()


def test_equal_completions_are_verified_once_and_rewarded_alike() -> None:
    rows = drawn("yes Bye", "no", "yes  Bye")
    assert [one.rollout_index for one in distinct(rows)] == [0, 1]
    outcomes = {0: {"a": "passed", "b": "passed"}, 1: {"a": "failed", "b": "failed"}}
    scored = score_instance(instance(), rows, outcomes, frozenset(), VOTING, "tests")
    assert [(row.reward, row.reason) for row in scored] == [(1.0, "passed"), (0.0, "failed"), (1.0, "passed")]
    assert {row.prompt for row in scored} == {"prompt p"}
    assert {row.scorer for row in scored} == {"verifiers@1, tests"}
    assert tally(scored) == {"completions": 3, "passing": 1, "failing": 1, "duplicate": 1}


@pytest.mark.parametrize(
    ("text", "finish_reason", "reason"),
    [
        ("cut", "length", "truncated"),
        (" ", "stop", "empty completion"),
        ("", "error", "engine error"),
    ],
)
def test_no_verifier_is_asked_about_a_completion_that_is_none(text: str, finish_reason: str, reason: str) -> None:
    rows = drawn(text, finish_reason=finish_reason)
    assert distinct(rows) == []
    (scored,) = score_instance(instance(), rows, {}, frozenset(), VOTING, "tests")
    assert (scored.reward, scored.reason) == (None, reason)


def test_a_truncated_completion_is_not_rewarded_for_the_text_it_shares_with_a_whole_one() -> None:
    whole, cut = drawn("same")[0], Drawn(rollout(1, "same", finish_reason="length"), 1, False)
    outcomes = {0: {"a": "passed", "b": "passed"}}
    scored = score_instance(instance(), [whole, cut], outcomes, frozenset(), VOTING, "tests")
    assert [row.reward for row in scored] == [1.0, None]


def test_instances_where_all_or_no_completions_pass_are_counted() -> None:
    outcomes = [{0: {"a": outcome, "b": outcome}} for outcome in ("passed", "failed")]
    told = [tally(score_instance(instance(), drawn("x"), one, frozenset(), VOTING, "t")) for one in outcomes]
    assert told[0]["instances where all completions pass"] == 1
    assert told[1]["instances where no completion passes"] == 1


@pytest.mark.parametrize(("show", "plain"), [("never", 8), ("half", 4), ("always", 0)])
def test_a_verifier_is_shown_for_none_half_or_all_of_the_completions(show: str, plain: int) -> None:
    assert Completing.model_validate({"show_verifier": show}).plain() == plain


def test_the_verifier_shown_is_one_of_the_instances_own_and_the_same_every_time() -> None:
    shown = [show_verifier(instance(f"p{n}"), ["# one", "# two"], Completing(), 0).prompt for n in range(20)]
    assert {"# one" in text for text in shown} == {True, False}
    assert all(text.endswith("query\ninstruction i") for text in shown)
    assert shown == [show_verifier(instance(f"p{n}"), ["# one", "# two"], Completing(), 0).prompt for n in range(20)]
