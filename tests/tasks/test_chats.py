"""Rows as data sets have them become one shape, or are dropped with a reason."""

from typing import Any

import pytest

from storage.rows import ChatPair, Conversation
from tasks.chats import ChatColumns, ChatFilter, Origin, filtered_out, missing_columns, read_conversation, read_pair

ORIGIN = Origin("set", "mit", 7)
PLAIN = ChatColumns()
WHOLE = ChatColumns(sides="conversations")


def said(*turns: str) -> list[dict[str, str]]:
    """Messages from "u: text", "a: text" and "s: text"."""
    names = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": names[turn[0]], "content": turn[3:]} for turn in turns]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi?", "completion": "Yes."},
        {"prompt": said("u: Hi?"), "completion": said("a: Yes.")},
        {"messages": said("u: Hi?", "a: Yes.")},
        {"messages": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]},
    ],
    ids=["text", "messages", "one list", "ShareGPT"],
)
def test_every_layout_of_a_demonstration_becomes_the_same_row(record: dict[str, Any]) -> None:
    row = read_conversation(record, PLAIN, ORIGIN)
    assert isinstance(row, Conversation)
    assert (row.roles, row.contents) == (["user", "assistant"], ["Hi?", "Yes."])
    assert (row.source, row.licence, row.line) == ("set", "mit", 7)


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}, PLAIN),
        ({"prompt": said("u: Hi?"), "chosen": said("a: Yes."), "rejected": said("a: No.")}, PLAIN),
        ({"prompt": "Hi?", "chosen": said("u: Hi?", "a: Yes."), "rejected": said("u: Hi?", "a: No.")}, WHOLE),
        ({"chosen": said("u: Hi?", "a: Yes."), "rejected": said("u: Hi?", "a: No.")}, WHOLE),
    ],
    ids=["text", "messages", "CLAIR's layout", "no prompt column"],
)
def test_every_layout_of_a_pair_becomes_the_same_row(record: dict[str, Any], columns: ChatColumns) -> None:
    row = read_pair(record, columns, ORIGIN)
    assert isinstance(row, ChatPair)
    assert (row.roles, row.contents, row.chosen, row.rejected) == (["user"], ["Hi?"], "Yes.", "No.")


def test_system_prompt_and_earlier_turns_are_kept() -> None:
    chat = said("s: Be kind.", "u: Hi?", "a: Yes.", "u: And?", "a: No.")
    row = read_conversation({"messages": chat}, PLAIN, ORIGIN)
    assert isinstance(row, Conversation)
    assert row.roles == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Hi?", "chosen": " ", "rejected": "No."}, "chosen is empty"),
        ({"prompt": "Hi?", "chosen": "Yes.", "rejected": ""}, "rejected is empty"),
        ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "Yes. "}, "chosen equals rejected"),
        ({"prompt": "Hi?", "chosen": said("a: Yes."), "rejected": said("a: No.")}, "text and messages mixed"),
        ({"prompt": said("u: Hi?"), "chosen": "Yes.", "rejected": "No."}, "text and messages mixed"),
        (
            {"prompt": said("u: Hi?"), "chosen": said("u: Hi?", "a: Yes."), "rejected": said("a: No.")},
            "prompt repeated inside chosen",
        ),
        (
            {"prompt": "What is two and two?", "chosen": "What is two and two? It is 4.", "rejected": "5"},
            "prompt repeated inside chosen",
        ),
        ({"prompt": said("s: Be kind."), "chosen": said("a: Yes."), "rejected": said("a: No.")}, "no user message"),
        ({"prompt": said("a: Hm."), "chosen": said("a: Yes."), "rejected": said("a: No.")}, "no user message"),
        ({"prompt": said("u: 1", "u: 2"), "chosen": said("a: Y"), "rejected": said("a: N")}, "roles out of order"),
        ({"prompt": "", "chosen": "Yes.", "rejected": "No."}, "a message is empty"),
        ({"prompt": "Hi?", "chosen": None, "rejected": "No."}, "chosen is empty"),
    ],
)
def test_bad_pair_is_dropped_with_its_reason(record: dict[str, Any], reason: str) -> None:
    assert read_pair(record, PLAIN, ORIGIN) == reason


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (said("s: Be kind."), "no user message"),
        (said("u: Hi?"), "ends without a reply"),
        (said("a: Yes.", "u: Hi?", "a: No."), "roles out of order"),
        (said("u: Hi?", "s: Be kind.", "a: Yes."), "roles out of order"),
        (said("u: Hi?", "a: "), "completion is empty"),
        ([{"role": "tool", "content": "x"}], "a role is none of system, user and assistant"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a message's content is not text"),
        ("Hi?", "text and messages mixed"),
        ([], "no user message"),
    ],
)
def test_bad_conversation_is_dropped_with_its_reason(messages: Any, reason: str) -> None:
    assert read_conversation({"messages": messages}, PLAIN, ORIGIN) == reason


def test_conversations_of_a_pair_must_reply_to_the_same_prompt() -> None:
    record = {"chosen": said("u: Hi?", "a: Yes."), "rejected": said("u: Ho?", "a: No.")}
    assert read_pair(record, WHOLE, ORIGIN) == "chosen and rejected reply to different prompts"


def test_a_short_prompt_may_begin_its_own_answer() -> None:
    record = {"prompt": "Hello", "chosen": "Hello there.", "rejected": "No."}
    assert isinstance(read_pair(record, PLAIN, ORIGIN), ChatPair)


def test_filters_look_at_turns_and_columns() -> None:
    row = read_conversation({"messages": said("u: 1", "a: 2", "u: 3", "a: 4")}, PLAIN, ORIGIN)
    assert isinstance(row, Conversation)
    assert filtered_out(row, {}, ChatFilter(minimum_turns=3)) == "fewer turns than minimum_turns"
    assert filtered_out(row, {}, ChatFilter(maximum_turns=1)) == "more turns than maximum_turns"
    assert filtered_out(row, {"lang": "fr"}, ChatFilter(equals={"lang": "en"})) == "lang is not 'en'"
    assert filtered_out(row, {"lang": "en"}, ChatFilter(equals={"lang": "en"}, minimum_turns=2, maximum_turns=2)) == ""
    with pytest.raises(ValueError, match="which no chat meets"):
        ChatFilter(minimum_turns=2, maximum_turns=1)


def test_missing_columns_are_named_with_what_is_there() -> None:
    told = missing_columns({"text": "x"}, PLAIN, ChatFilter(), "conversations")
    assert told.startswith("expected columns 'prompt', 'completion' (or 'messages' in their place), found ['text']")
    assert missing_columns({"chosen": 1, "rejected": 1}, PLAIN, ChatFilter(), "pairs") != ""
    assert missing_columns({"chosen": 1, "rejected": 1}, WHOLE, ChatFilter(), "pairs") == ""
    assert "'lang'" in missing_columns({"messages": []}, PLAIN, ChatFilter(equals={"lang": "en"}), "conversations")
