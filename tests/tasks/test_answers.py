"""Final answers: hand-labelled cases in answer_cases.json, properties, and the golds of GSM8K where it is at hand."""

import json
import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.rows import Rollout
from tasks.answers import (
    answer_group,
    answers_disagree,
    answers_match,
    extract_answer,
    find_answers,
    is_readable,
    parse_answer,
    read_any_answer,
    score_by_answer,
    trim_after_answer,
)

MARKER = "FINAL ANSWER:"
CASES = json.loads(Path(__file__).with_name("answer_cases.json").read_text(encoding="utf-8"))
DATA = Path(os.environ.get("RATCHET_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def rollout(completion: str, finish_reason: str = "stop") -> Rollout:
    return Rollout(
        prompt_id="p",
        rollout_index=3,
        prompt="How many?",
        completion=completion,
        prompt_tokens=2,
        completion_tokens=9,
        finish_reason=finish_reason,
        cumulative_logprob=-1.5,
        seed=0,
        policy="fake:tests",
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_hard_answer_gets_its_hand_written_verdict(case: dict[str, Any]) -> None:
    scored = score_by_answer(rollout(case["completion"]), case["gold"], case["marker"])
    assert scored.reason == case["expected"]
    assert scored.reward == {"match": 1.0, "mismatch": 0.0}.get(case["expected"])


NUMBERS = ["72", "-3", "1,000", "1000000", "0", "007", "12,34", "1,0000", ".00", ".0", ".5", "e5", "½"]
WORDS = [
    "The answer is",
    "more than",
    "half of",
    "apples",
    "a",
    "k",
    "dozen",
    "million",
    "squared",
    "not",
    "plus",
    "USD",
]
MARKS = [".", "**", "*", "$", "\\boxed{", "}", "%", "=", "/", "-", "_", "#", " ", "  ", "\n", "\u2009"]
PIECES = st.sampled_from([*NUMBERS, *WORDS, *MARKS])


@given(st.lists(PIECES, min_size=1, max_size=7).map("".join))
@settings(max_examples=2_000, deadline=None)
def test_the_short_way_reads_what_the_long_way_reads(text: str) -> None:
    assert parse_answer(text) == read_any_answer(text)


BITS = [
    "FINAL ANSWER:",
    "Final answer",
    "final",
    " ",
    "ANSWER",
    ":",
    "**",
    "_",
    "\t",
    "\n",
    "\\",
    "\\n",
    "7",
    "\r",
    "\x0b",
    "é",
    "K",
]


@given(st.lists(st.sampled_from(BITS), max_size=9).map("".join))
@settings(max_examples=2_000, deadline=None)
def test_the_short_way_finds_the_markers_and_lines_that_patterns_find(text: str) -> None:
    marker = re.compile(r"FINAL[ \t]+ANSWER[*_ \t]*:", re.IGNORECASE)
    line = re.compile(r"(?:[\s*_]|\\n)*([^\n\\]*(?:\\(?!n)[^\n\\]*)*)")
    lines = [line.match(text, found.end()) for found in marker.finditer(text)]
    assert find_answers(text, MARKER) == [found[1].rstrip() or None for found in lines if found]


def test_there_are_eighty_hard_cases_or_more() -> None:
    assert len(CASES) >= 80


def test_scored_rollout_keeps_the_rollout_and_names_the_scorer() -> None:
    scored = score_by_answer(rollout("FINAL ANSWER: $1,000"), "1000", MARKER)
    assert (scored.prompt_id, scored.rollout_index, scored.completion_tokens, scored.cumulative_logprob) == (
        "p",
        3,
        9,
        -1.5,
    )
    assert (scored.answer, scored.reward, scored.scorer) == ("$1,000", 1.0, "answer_match@1")


def test_truncated_rollout_is_undecided_even_with_the_right_answer() -> None:
    scored = score_by_answer(rollout("FINAL ANSWER: 72\nNow", finish_reason="length"), "72", MARKER)
    assert (scored.reward, scored.reason, scored.answer) == (None, "truncated", "72")


def test_unreadable_gold_answer_is_unscored() -> None:
    assert score_by_answer(rollout("FINAL ANSWER: 72"), "", MARKER).reward is None


def test_unreadable_answer_does_not_even_match_itself() -> None:
    assert not answers_match("a dozen", "a dozen")
    assert not answers_match("", "")


def test_first_marker_counts_and_a_second_one_is_noticed() -> None:
    text = "FINAL ANSWER: 72\nQuestion: more?\nFINAL ANSWER: 3"
    assert extract_answer(text, MARKER) == "72"
    assert answers_disagree(text, MARKER)
    assert not answers_disagree("FINAL ANSWER: 72\nFINAL ANSWER: 72.0", MARKER)


def test_one_thousand_is_one_vote_however_it_is_written() -> None:
    assert len({answer_group(text) for text in ("1,000", "1000.0", "$1000", "1 000", "2000/2", "10e2")}) == 1
    assert answer_group("many") is None
    assert answer_group(None) is None


def test_blank_marker_is_an_error_that_shows_it() -> None:
    with pytest.raises(ValueError, match=r"the answer marker is ' :'"):
        extract_answer("72", " :")


@pytest.mark.parametrize(
    ("completion", "trimmed"),
    [
        pytest.param("12 + 7 = 19\nFINAL ANSWER: 19\n\nQuestion: x", "12 + 7 = 19\nFINAL ANSWER: 19", id="runs on"),
        pytest.param("FINAL ANSWER:\n19 \nmore", "FINAL ANSWER:\n19", id="answer on the next line"),
        pytest.param("FINAL ANSWER: 19\\nmore", "FINAL ANSWER: 19", id="literal backslash-n"),
        pytest.param("No marker here. \n", "No marker here.", id="no marker"),
    ],
)
def test_trimming_ends_a_completion_after_its_answer(completion: str, trimmed: str) -> None:
    assert trim_after_answer(completion, MARKER) == trimmed


INTEGERS = st.integers(-(10**15), 10**15)
UNITS = st.sampled_from(["legos", "kg", "hours", "km/h", "dollars", "percent", "square feet", "m^2"])


@given(INTEGERS, UNITS)
def test_an_integer_matches_itself_however_it_is_dressed(value: int, unit: str) -> None:
    sign, size = "-" if value < 0 else "", abs(value)
    dressed = [
        f"{value:,}",
        f"{value}.00",
        f"{value}.",
        f"{sign}${size:,}",
        f"${value}",
        f"{value:,} {unit}",
        f"{value}%",
    ]
    dressed += [
        f"\\boxed{{{value}}}",
        f"${value}$",
        f"**{value}**",
        f"x = {value}",
        f"{2 * value}/2",
        f"{value:,}".replace(",", " "),
    ]
    for text in dressed:
        assert answers_match(extract_answer(f"Work.\nFINAL ANSWER: {text}\nmore", MARKER) or "", str(value)), text


@given(INTEGERS, INTEGERS)
def test_different_integers_never_match(left: int, right: int) -> None:
    assert answers_match(f"${left:,}", f"{right}.0") == (left == right)


@given(st.fractions())
def test_fractions_are_compared_exactly(value: Fraction) -> None:
    assert parse_answer(str(value)) == value


@given(st.text(), st.text())
def test_any_text_is_read_without_an_error_and_alike_from_both_sides(left: str, right: str) -> None:
    assert answers_match(left, right) == answers_match(right, left)
    assert is_readable(left) == answers_match(left, left)
    extract_answer(f"{left} {MARKER}{right}", MARKER)


@given(st.text(alphabet="0123456789 .,-+/$%e=\\{}()*x^½\n", max_size=300))
def test_answer_like_noise_is_read_without_an_error(text: str) -> None:
    parse_answer(text)
    trimmed = trim_after_answer(f"{MARKER}{text}", MARKER)
    assert extract_answer(trimmed, MARKER) == extract_answer(f"{MARKER}{text}", MARKER)


@pytest.mark.parametrize(
    "text", ["9" * 100_000, "1," * 50_000, " " * 100_000, "*" * 100_000, "\\n" * 50_000, "{" * 100_000]
)
def test_huge_answers_are_unreadable_at_once(text: str) -> None:
    assert not is_readable(extract_answer(f"{MARKER} {text}", MARKER) or "")


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gold_answer_of_gsm8k_is_readable(split: str) -> None:
    path = DATA / "gsm8k" / f"{split}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there; set RATCHET_DATA to a folder with gsm8k/{split}.jsonl")
    with path.open(encoding="utf-8") as lines:
        golds = [json.loads(line)["answer"].rpartition("####")[2] for line in lines]
    assert len(golds) == {"train": 7473, "test": 1319}[split]
    assert [gold for gold in golds if not is_readable(gold)] == []
