"""The cross-check: which verifiers are kept, and why the others are not."""

import pytest
from pydantic import ValidationError

from storage.rows import CheckedVerifier, VerifierCase
from tasks.consistency import PROBES, Consistency, cross_check, halve
from tests.tasks.builders import case, verifier

PASSING = [case(f"good {n}", expected=True) for n in range(4)]
FAILING = [case(f"bad {n}", expected=False) for n in range(4)]
CASES = [*PASSING, *FAILING]


def says(name: str, response: str) -> str:
    """What the verifier of this name does with a response."""
    if name == "always":
        return "passed"
    if name == "never":
        return "failed"
    if name == "hangs":
        return "timeout"
    if name == "odd":
        return "invalid"
    if name == "only good 0":  # right on one passing case of four, and on all failing ones
        return "passed" if response == "good 0" else "failed"
    return "passed" if response.startswith("good") else "failed"


def check(
    *names: str, cases: list[VerifierCase] | None = None, settings: Consistency | None = None
) -> dict[str, CheckedVerifier]:
    cases = CASES if cases is None else cases
    outcomes = {
        name: {text: says(name, text) for text in [*PROBES, *(one.response for one in cases)]} for name in names
    }
    rows = cross_check([verifier(name) for name in names], cases, outcomes, settings or Consistency(), "tests")
    assert [row.verifier_id for row in rows] == list(names)
    return {row.verifier_id: row for row in rows}


def reasons(rows: dict[str, CheckedVerifier]) -> dict[str, str]:
    return {name: row.reason for name, row in rows.items()}


def test_verifiers_that_agree_with_the_cases_of_both_halves_are_kept() -> None:
    rows = check("one", "two")
    assert reasons(rows) == {"one": "kept", "two": "kept"}
    assert [(row.agreement, row.held_out_agreement, row.cases, row.isolation) for row in rows.values()] == [
        (1.0, 1.0, 8, "tests"),
        (1.0, 1.0, 8, "tests"),
    ]


def test_a_verifier_that_accepts_everything_it_is_shown_is_trivial() -> None:
    told = reasons(check("one", "two", "always"))
    assert told["always"] == "trivial: accepts the empty text, every filler and every case"
    assert told["one"] == told["two"] == "kept"


def test_verifiers_that_all_accept_everything_keep_no_instruction() -> None:
    assert not any(row.kept for row in check("always", "always too").values() if row.verifier_id == "always")


def test_one_verifier_alone_is_too_few() -> None:
    rows = check("one", "never", "hangs", "odd")
    assert reasons(rows) == {
        "one": "instruction: too few verifiers",
        "never": "disagrees with the cases",
        "hangs": "broke on every text: timeout",
        "odd": "broke on every text: invalid",
    }
    assert not any(row.kept for row in rows.values())


def test_fewer_than_two_verifiers_cannot_even_be_asked_for() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        Consistency(minimum_verifiers=1)


@pytest.mark.parametrize(
    ("cases", "reason"),
    [
        pytest.param([], "instruction: no cases", id="none"),
        pytest.param(FAILING, "instruction: too few passing cases", id="no passing one"),
        pytest.param(PASSING, "instruction: too few failing cases", id="no failing one"),
    ],
)
def test_cases_of_one_kind_only_vouch_for_nothing(cases: list[VerifierCase], reason: str) -> None:
    assert reasons(check("one", "two", cases=cases)) == {"one": reason, "two": reason}


def test_a_case_no_verifier_agrees_with_is_left_out() -> None:
    wrong = case("good but said to be bad", expected=False)
    rows = check("one", "two", cases=[*CASES, wrong])
    assert {row.cases for row in rows.values()} == {8}
    assert reasons(rows) == {"one": "kept", "two": "kept"}


def test_under_the_papers_rule_more_than_half_of_the_verifiers_have_to_agree_with_a_case() -> None:
    # "never" alone agrees with the wrong case: 1 of 3 is more than none, and not more than half
    wrong = case("good but said to be bad", expected=False)
    seed = check("one", "two", "never", cases=[*CASES, wrong])
    paper = check("one", "two", "never", cases=[*CASES, wrong], settings=Consistency(case_agreement=0.5))
    shares = [{row.agreement, row.held_out_agreement} for row in (seed["one"], paper["one"])]
    assert shares[1] == {1.0} and shares[0] != {1.0}


def test_a_verifier_that_fits_the_first_half_only_is_found_out_on_the_other() -> None:
    # dealt by a hash: whichever half "good 0" is in, the other holds passing cases that it rejects
    halves = halve(CASES)
    first = [one for one in halves.first if one.expected]
    for row in check("one", "two", "only good 0").values():
        if row.verifier_id == "only good 0":
            assert row.reason.startswith("disagrees with the")
    fitted = {"one", "two"}
    narrow = {text.response: "passed" if text in first else "failed" for text in CASES} | dict.fromkeys(
        PROBES, "failed"
    )
    outcomes = {name: {t: says(name, t) for t in [*PROBES, *(c.response for c in CASES)]} for name in fitted}
    rows = cross_check(
        [verifier("one"), verifier("two"), verifier("narrow")], CASES, outcomes | {"narrow": narrow}, Consistency(), "t"
    )
    assert {row.verifier_id: row.reason for row in rows}["narrow"] == "disagrees with the held-out cases"


def test_both_halves_hold_cases_whatever_their_order_and_one_of_each_kind_is_enough() -> None:
    halves = halve(CASES)
    assert [len(half) for half in halves] == [4, 4]
    assert halve(CASES[::-1]) == halves
    small = halve([PASSING[0], FAILING[0]])
    assert (small.first, small.held_out) == ([PASSING[0]], [FAILING[0]])


def test_a_verdict_on_a_case_that_is_no_boolean_does_not_agree() -> None:
    responses = [*PROBES, *(one.response for one in CASES)]
    shaky = {text: "error" if text.startswith("good") else "failed" for text in responses}
    outcomes = {"one": {text: says("one", text) for text in responses}, "shaky": shaky}
    rows = cross_check([verifier("one"), verifier("shaky")], CASES, outcomes, Consistency(), "tests")
    assert rows[1].reason == "disagrees with the cases"
    assert rows[1].agreement == 0.5
