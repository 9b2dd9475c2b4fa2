"""Step records, the names they are stored under, and digests of plain JSON."""

import logging
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.digests import canonical_json, digest_of
from storage.home import home
from storage.names import safe_name
from storage.results import StepResult, find_result, latest_results, save_result


def result(key: str = "k1", value: str = "first", minute: int = 0) -> StepResult:
    return StepResult(
        step="score_answers",
        key=key,
        version="1",
        key_parts={"settings": {"k": 1}},
        value={"digest": value},
        counts={"match": 3},
        seconds=0.5,
        finished_at=datetime(2026, 1, 1, 0, minute, tzinfo=UTC),
    )


def test_a_saved_result_is_found_and_others_are_not() -> None:
    assert find_result("score_answers", "k1") is None
    assert save_result(result()) == result()
    assert find_result("score_answers", "k1") == result()
    assert find_result("score_answers", "k2") is None


def test_the_first_result_stands_unless_it_is_to_be_replaced() -> None:
    save_result(result())
    assert save_result(result(value="second")) == result()
    assert find_result("score_answers", "k1") == result()
    assert save_result(result(value="third"), replace=True) == result(value="third")
    assert find_result("score_answers", "k1") == result(value="third")
    assert [path.name for path in (home() / "steps/score_answers").iterdir()] == ["k1.json"]


@pytest.mark.parametrize("text", ["", '{"step": "score_an', "[1]", '{"step": "x"}', "\udcff"])
def test_a_garbled_result_counts_as_absent_with_a_warning_and_is_replaced(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_result(result())
    (home() / "steps/score_answers/k1.json").write_text(text, errors="surrogateescape")
    with caplog.at_level(logging.WARNING):
        assert find_result("score_answers", "k1") is None
    assert "k1.json cannot be read" in caplog.text
    assert save_result(result(value="again")) == result(value="again")
    assert find_result("score_answers", "k1") == result(value="again")


def test_a_result_under_another_key_counts_as_absent(caplog: pytest.LogCaptureFixture) -> None:
    save_result(result("k1"))
    (home() / "steps/score_answers/k1.json").rename(home() / "steps/score_answers/k2.json")
    assert find_result("score_answers", "k2") is None
    assert "is the record of score_answers/k1" in caplog.text


def test_the_latest_results_come_newest_first() -> None:
    for minute in (2, 5, 1):
        save_result(result(f"k{minute}", minute=minute))
    assert [found.key for found in latest_results("score_answers", 2)] == ["k5", "k2"]
    assert latest_results("unknown", 2) == []


def test_canonical_json_sorts_keys_and_refuses_what_is_not_json() -> None:
    assert canonical_json({"b": (1, None), "a": "ä"}) == '{"a":"\\u00e4","b":[1,null]}'
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    for bad in ({1, 2}, float("nan"), object()):
        with pytest.raises(ValueError, match="only plain JSON"):
            canonical_json({"x": bad})


@given(st.text())
def test_a_safe_name_is_one_visible_path_segment(name: str) -> None:
    safe = safe_name(name)
    assert "/" not in safe and not safe.startswith(".") and 0 < len(safe.encode()) <= 120


def test_different_names_never_share_a_safe_name() -> None:
    assert len({safe_name(name) for name in ["a/b", "a-b", "a:b", "a b", "", "...", "/"]}) == 7
