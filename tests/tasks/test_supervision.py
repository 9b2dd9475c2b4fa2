"""Back-translation and the judge: what is read off the replies, and what it changes."""

from dataclasses import replace

import pytest

from storage.rows import BackTranslation, CheckedVerifier
from tasks.supervision import (
    Relevance,
    Translating,
    after_translation,
    ask_back,
    back_translation,
    judged,
    read_rating,
)
from tests.tasks.builders import rollout, scored


def checked(name: str, *, kept: bool = True) -> CheckedVerifier:
    return CheckedVerifier(
        verifier_id=name,
        instruction_id="i",
        source=f"# {name}",
        kept=kept,
        reason="kept" if kept else "disagrees with the cases",
        agreement=1.0,
        held_out_agreement=1.0,
        cases=4,
        isolation="tests",
    )


def translated(name: str, compared: str | None) -> BackTranslation:
    reply = None if compared is None else rollout(0, compared)
    return back_translation(checked(name), "End with Bye.", rollout(0, "Say Bye last."), reply)


def test_the_instruction_is_not_shown_when_a_verifier_is_translated_back() -> None:
    asked = ask_back(checked("one"), Translating()).prompt
    assert "# one" in asked and "End with Bye" not in asked


@pytest.mark.parametrize(
    ("reply", "verdict", "reason"),
    [
        ("same", "same", "compared"),
        ("They are not the same: contradiction.", "contradiction", "compared"),
        ("Different!", "different", "compared"),
        ("Yes.", None, "no verdict"),
        (None, None, "no back-translation"),
    ],
)
def test_the_last_of_the_three_words_is_the_verdict(reply: str | None, verdict: str | None, reason: str) -> None:
    row = translated("one", reply)
    assert (row.verdict, row.reason, row.back) == (verdict, reason, "Say Bye last.")


def test_a_contradicted_verifier_goes_and_one_alone_goes_with_it() -> None:
    rows = [checked("one"), checked("two"), checked("three", kept=False)]
    verdicts = {"one": translated("one", "contradiction"), "two": translated("two", "different")}
    left = after_translation(rows, verdicts, Translating(), 2)
    assert [row.reason for row in left] == [
        "back-translation: contradiction",
        "instruction: too few verifiers",
        "disagrees with the cases",
    ]
    assert not any(row.kept for row in left)
    both = {"one": translated("one", "same"), "two": translated("two", None)}  # unknown is no contradiction
    assert after_translation(rows, both, Translating(), 2) == rows


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("8", 8),
        ("Number: 10", 10),
        ("I would say 7.", 7),
        ("9/10", 9),
        ("0 to 10: 6", 6),
        ("15", None),
        ("eight", None),
        ("", None),
    ],
)
def test_the_first_whole_number_up_to_ten_is_the_rating(text: str, rating: int | None) -> None:
    assert read_rating(text) == rating


def test_a_completion_that_does_not_answer_or_was_not_rated_loses_its_reward() -> None:
    row, settings = scored(0, 1.0), Relevance(minimum=8)
    assert judged(row, rollout(0, "8"), settings) is row
    assert judged(row, None, settings) is row  # it was not asked about
    assert judged(row, rollout(0, "7"), settings) == replace(row, reward=None, reason="does not answer the query")
    assert judged(row, rollout(0, "Good."), settings) == replace(row, reward=None, reason="judge gave no number")
