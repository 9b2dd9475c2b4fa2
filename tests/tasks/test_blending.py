"""Mixtures of sources: what is kept, what is dropped and how it is told."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.specs import ModelRef
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import ChatPair, Conversation, Prompt
from tasks.blending import Mixture, PairMixture, blend
from tasks.contamination import Questions
from tasks.guarding import Guard, guard_against
from tasks.licences import doubt_about

FAKE = ModelRef(name="fake:0.5")
NOTHING = Guard({}, ())
LONG = "If a train leaves the old station at nine and rides for three hours how far does it get in all"


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def entry(path: Path, **fields: Any) -> dict[str, Any]:
    return {"source": {"path": str(path)}, "licence": "mit", **fields}


def mixture(*sources: dict[str, Any], kind: type[Mixture] = Mixture, **fields: Any) -> Mixture:
    return kind.model_validate({"sources": list(sources), "apart_from": [], **fields})


def conversations(ref: DatasetRef) -> list[Conversation]:
    return list(read_rows(ref, Conversation))


def asked(*prompts: str) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": "yes"} for prompt in prompts]


def test_sources_stand_in_their_order_with_source_and_licence(tmp_path: Path) -> None:
    first, second = jsonl(tmp_path / "a.jsonl", *asked("1", "2")), jsonl(tmp_path / "b.jsonl", *asked("3"))
    mixed = mixture(entry(first), entry(second, licence="apache-2.0"))
    rows = conversations(blend(mixed, NOTHING, FAKE))
    assert [(row.contents[0], row.source, row.licence, row.line) for row in rows] == [
        ("1", "a.jsonl", "mit", 1),
        ("2", "a.jsonl", "mit", 2),
        ("3", "b.jsonl", "apache-2.0", 1),
    ]


def test_a_weight_takes_that_share_and_the_same_rows_whatever_their_order(tmp_path: Path) -> None:
    rows = asked(*(f"prompt {n}" for n in range(400)))
    forth, back = jsonl(tmp_path / "a" / "x.jsonl", *rows), jsonl(tmp_path / "b" / "x.jsonl", *reversed(rows))
    taken = [
        {row.contents[0] for row in conversations(blend(mixed, NOTHING, FAKE))}
        for mixed in (
            mixture(entry(forth, weight=0.25)),
            mixture(entry(back, weight=0.25)),
            mixture(entry(forth, weight=0.25), seed=43),
        )
    ]
    assert 70 <= len(taken[0]) <= 130  # 100 expected; 30 is 3.5 standard deviations of sqrt(400 / 4 * 3 / 4) = 8.7
    assert taken[0] == taken[1]
    assert taken[0] != taken[2]


def test_dropped_rows_are_counted_and_the_first_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = [
        {"prompt": "a", "chosen": "yes", "rejected": "no"},
        {"prompt": "b", "chosen": "same", "rejected": "same"},
        {"prompt": "c", "chosen": "same", "rejected": "same"},
        {"prompt": "a", "chosen": "yes", "rejected": "no"},
        {"prompt": "d", "chosen": "one two three four", "rejected": "no"},
    ]
    caplog.set_level("INFO")
    mixed = mixture(entry(jsonl(tmp_path / "a.jsonl", *pairs), filters={"max_tokens": 4}), kind=PairMixture)
    assert [row.chosen for row in read_rows(blend(mixed, NOTHING, FAKE), ChatPair)] == ["yes"]
    assert "a.jsonl: dropped: chosen equals rejected, first in row 2" in caplog.text
    assert "first in row 3" not in caplog.text
    assert "'chosen equals rejected': 2, 'stands there more than once': 1, 'longer than max_tokens': 1" in caplog.text


def test_the_system_text_that_a_chat_is_trained_with_counts_as_its_tokens(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]},
        {"messages": [{"role": "system", "content": "four"}, {"role": "user", "content": "one two"},
                      {"role": "assistant", "content": "three"}]},
    ]  # fmt: skip
    mixed = mixture(entry(jsonl(tmp_path / "a.jsonl", *chats), filters={"max_tokens": 4}))
    assert len(conversations(blend(mixed, NOTHING, FAKE))) == 2  # of 3 and 4 words
    (left,) = conversations(blend(mixed, NOTHING, FAKE, "Be very brief."))  # the first has 3 + 3 now
    assert left.roles[0] == "system"


def test_a_source_without_a_row_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"prompt": "b", "chosen": "same", "rejected": "same"})
    with pytest.raises(ValueError, match=r"no row of a.jsonl is left: \{'chosen equals rejected': 1\}"):
        blend(mixture(entry(file), kind=PairMixture), NOTHING, FAKE)


def test_maximum_rows_counts_rows_that_are_kept(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", *asked("", "1", "2", "3"))
    rows = conversations(blend(mixture(entry(file, maximum_rows=2)), NOTHING, FAKE))
    assert [row.contents[0] for row in rows] == ["1", "2"]


@pytest.mark.parametrize(
    ("hub", "licence", "doubt"),
    [
        ("HuggingFaceH4/ultrachat_200k", "mit", ""),
        (None, None, "no licence is stated"),
        ("a/b", "cc-by-nc-4.0", "'cc-by-nc-4.0' is none of"),
        ("rasyosef/OpenHermes-SLM-384k", "apache-2.0", "OpenHermes: none declared"),
    ],
)
def test_licence_is_clear_only_if_it_is_stated_and_known(hub: str | None, licence: str | None, doubt: str) -> None:
    assert doubt_about(hub, licence).startswith(doubt)
    assert bool(doubt_about(hub, licence)) == bool(doubt)


def test_unclear_licence_needs_a_leave_and_prints_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = jsonl(tmp_path / "a.jsonl", *asked("1"))
    with pytest.raises(ValidationError, match="accept_unclear_licence: true"):
        mixture(entry(file, licence=None))
    mixed = mixture(entry(file, licence=None, accept_unclear_licence=True))
    (row,) = conversations(blend(mixed, NOTHING, FAKE))
    assert row.licence == "unclear: none stated (no licence is stated)"
    assert "LICENCE: a.jsonl is used although" in caplog.text


def test_rows_with_a_benchmarks_question_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("RATCHET_DATA", str(tmp_path))
    jsonl(tmp_path / "gsm8k" / "main" / "test.jsonl", {"question": LONG, "answer": "#### 1"})
    jsonl(tmp_path / "truthful_qa" / "multiple_choice" / "validation.jsonl", {"question": "What do dogs dream of?"})
    part = LONG.split()[2:15]  # thirteen words of it
    prompts = ("1", f"Please: {' '.join(part)}, ok", f"Please: {' '.join(part[:12])}, ok", "Say: what do DOGS dream of")
    mixed = mixture(entry(jsonl(tmp_path / "a.jsonl", *asked(*prompts))), apart_from=["gsm8k", "truthfulqa_mc2"])
    guard = guard_against(mixed.apart_from)
    rows = conversations(blend(mixed, guard, FAKE))
    assert [row.contents[0] for row in rows] == [prompts[0], prompts[2]]
    free = mixed.model_copy(update={"apart_from": ()})  # another mixture's benchmarks are none of its business
    assert blend(free, guard, FAKE).rows == 4
    assert "'holds a question of gsm8k': 1, 'holds a question of truthfulqa_mc2': 1" in caplog.text


def test_a_benchmark_that_is_not_at_hand_is_told_loudly_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    caplog.set_level("INFO")
    monkeypatch.setenv("RATCHET_DATA", str(tmp_path))
    mixed = mixture(entry(jsonl(tmp_path / "a.jsonl", *asked("1", "2"))), apart_from=["gsm8k"])
    guard = guard_against(mixed.apart_from)
    assert guard.missing == ("gsm8k",)
    assert "OVERLAP NOT CHECKED: gsm8k is not at hand" in caplog.text
    blend(mixed, guard, FAKE)
    assert "rows that could not be checked against gsm8k" in caplog.text


def test_a_question_of_fewer_words_than_a_run_is_looked_for_whole() -> None:
    questions = Questions([("t", "Why is the sky blue?"), ("s", "Why so?")])
    assert questions.found_in("Tell me, why is the sky blue today") == "t"
    assert questions.found_in("why is the sky red") == ""
    assert questions.found_in("Why so") == "s"
    assert questions.found_in("Why so late") == ""


def test_prompts_of_dev_and_test_are_not_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    prompt = Prompt(prompt_id="p", source="dev", prompt="2  + 2?", answer="4")
    dev = write_rows([prompt], Prompt, step="prompts")
    mixed = mixture(entry(jsonl(tmp_path / "a.jsonl", *asked("1 + 1?", "2 + 2?"))))
    rows = conversations(blend(mixed, guard_against((), (dev,)), FAKE))
    assert [row.contents[0] for row in rows] == ["1 + 1?"]
    assert "'holds a prompt of dev or test': 1" in caplog.text
