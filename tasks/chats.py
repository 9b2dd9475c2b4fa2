"""Rows of chats as data sets have them -> conversations and pairs in one shape, or the reason why a row is dropped.

Two layouts are read of each: text (`prompt` and `completion`; `prompt`, `chosen` and `rejected`), and lists of messages
in the same columns or in `messages`. A message is {role, content}, or {from, value} as ShareGPT writes it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from models.specs import Settings
from storage.rows import ChatPair, Conversation
from tasks.prompts import prompt_id

Content = Literal["conversations", "pairs"]
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
REPEATED_WORDS = 4  # a text shorter than this may well begin its own answer


class ChatColumns(Settings):
    """Where the chats stand. `messages` wins over `prompt` and `completion` where a row has it."""

    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    chosen: str = "chosen"
    rejected: str = "rejected"
    sides: Literal["replies", "conversations"] = "replies"  # conversations: chosen and rejected repeat their prompt


class ChatFilter(Settings):
    """Which rows of a source to keep."""

    max_tokens: int | None = Field(default=None, ge=1)  # of the whole chat as rendered; of a pair, its longer side
    minimum_turns: int = Field(default=1, ge=1)  # of the user
    maximum_turns: int | None = Field(default=None, ge=1)
    equals: dict[str, str | int | float | bool] = Field(default_factory=dict)  # column -> the value it must have

    @model_validator(mode="after")
    def _turns_are_in_order(self) -> "ChatFilter":
        if self.maximum_turns is not None and self.maximum_turns < self.minimum_turns:
            raise ValueError(
                f"minimum_turns is {self.minimum_turns} and maximum_turns {self.maximum_turns}, which no chat meets"
            )
        return self


class Origin(NamedTuple):
    """Where a row comes from."""

    source: str
    licence: str
    line: int  # counted from 1


class Chat(NamedTuple):
    """A chat as a row holds it, before it is known to be sound."""

    roles: list[str]
    contents: list[str]
    sides: tuple[str, ...]  # the last reply, or chosen and rejected


def read_conversation(record: Mapping[str, Any], columns: ChatColumns, origin: Origin) -> Conversation | str:
    """The conversation of a record, or why it is none."""
    if columns.messages in record:
        chat = _as_chat(_messages(record[columns.messages]))
    else:
        chat = _side_chat(record, (columns.completion,), columns)
    if isinstance(chat, str) or (fault := _fault(chat, ("completion",))):
        return chat if isinstance(chat, str) else fault
    return Conversation(
        prompt_id=prompt_id(origin.source, "\n".join(chat.contents)),
        roles=[*chat.roles, "assistant"],
        contents=[*chat.contents, chat.sides[0]],
        **origin._asdict(),
    )


def read_pair(record: Mapping[str, Any], columns: ChatColumns, origin: Origin) -> ChatPair | str:
    """The pair of a record, or why it is none."""
    chat = _side_chat(record, (columns.chosen, columns.rejected), columns)
    if isinstance(chat, str) or (fault := _fault(chat, ("chosen", "rejected"))):
        return chat if isinstance(chat, str) else fault
    chosen, rejected = chat.sides
    if chosen.strip() == rejected.strip():
        return "chosen equals rejected"
    return ChatPair(
        prompt_id=prompt_id(origin.source, "\n".join(chat.contents)),
        roles=chat.roles,
        contents=chat.contents,
        chosen=chosen,
        rejected=rejected,
        **origin._asdict(),
    )


def filtered_out(row: Conversation | ChatPair, record: Mapping[str, Any], filters: ChatFilter) -> str:
    """Why a row is not wanted; empty: it is. Its length in tokens is not looked at."""
    for column, value in filters.equals.items():
        if record.get(column) != value:
            return f"{column} is not {value!r}"
    turns = row.roles.count("user")
    if turns < filters.minimum_turns:
        return "fewer turns than minimum_turns"
    if filters.maximum_turns is not None and turns > filters.maximum_turns:
        return "more turns than maximum_turns"
    return ""


def missing_columns(record: Mapping[str, Any], columns: ChatColumns, filters: ChatFilter, content: Content) -> str:
    """Which columns a record lacks, in words; empty: none."""
    if content == "pairs":
        sides = [columns.chosen, columns.rejected]
        wanted = sides if columns.sides == "conversations" else [columns.prompt, *sides]
    else:
        wanted = [columns.messages] if columns.messages in record else [columns.prompt, columns.completion]
    wanted += list(filters.equals)
    if all(name in record for name in wanted):
        return ""
    also = f" (or {columns.messages!r} in their place)" if content == "conversations" else ""
    return (
        f"expected columns {', '.join(map(repr, wanted))}{also}, found {sorted(record)}; set `columns` of the source, "
        "or columns.sides: conversations where chosen and rejected hold whole conversations"
    )


def _side_chat(record: Mapping[str, Any], names: Sequence[str], columns: ChatColumns) -> Chat | str:
    """A chat from a column of the prompt and one for each reply, all text or all messages."""
    given, sides = record.get(columns.prompt), [record[name] for name in names]
    if columns.sides == "conversations" and len(names) == 2:
        return _common_chat([_messages(side) for side in sides])
    if isinstance(given, str):
        sides = ["" if side is None else side for side in sides]
    if len({isinstance(value, str) for value in (given, *sides)}) > 1:
        return "text and messages mixed"
    if isinstance(given, str):
        repeated = len(given.split()) >= REPEATED_WORDS
        if repeated and any(str(side).lstrip().startswith(given.strip()) for side in sides):
            return f"prompt repeated inside {names[0]}"
        return Chat(["user"], [given], tuple(sides))
    prompt, replies = _messages(given), [_messages(side) for side in sides]
    if isinstance(prompt, str):
        return prompt
    texts = []
    for reply in replies:
        if isinstance(reply, str):
            return reply
        if prompt and reply[: len(prompt)] == prompt:
            return f"prompt repeated inside {names[0]}"
        if [role for role, _ in reply] != ["assistant"]:
            return "a reply is not one assistant message"
        texts.append(reply[0][1])
    return Chat([role for role, _ in prompt], [text for _, text in prompt], tuple(texts))


def _common_chat(sides: Sequence[list[tuple[str, str]] | str]) -> Chat | str:
    whole = [_as_chat(side) for side in sides]
    for one in whole:
        if isinstance(one, str):
            return one
    first, second = (one for one in whole if isinstance(one, Chat))
    if (first.roles, first.contents) != (second.roles, second.contents):
        return "chosen and rejected reply to different prompts"
    return Chat(first.roles, first.contents, (*first.sides, *second.sides))


def _as_chat(messages: list[tuple[str, str]] | str) -> Chat | str:
    if isinstance(messages, str):
        return messages
    if all(role == "system" for role, _ in messages):
        return "no user message"
    if messages[-1][0] != "assistant":
        return "ends without a reply"
    before = messages[:-1]
    return Chat([role for role, _ in before], [text for _, text in before], (messages[-1][1],))


def _messages(value: object) -> list[tuple[str, str]] | str:
    """(role, content) of each message, or what is wrong with them."""
    if isinstance(value, str) or value is None or not isinstance(value, Sequence):
        return "text and messages mixed" if isinstance(value, str) else "no messages"
    found = []
    for message in value:
        if not isinstance(message, Mapping):
            return "a message is no object"
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role not in ROLES:
            return "a role is none of system, user and assistant"
        if not isinstance(content, str):
            return "a message's content is not text"
        found.append((ROLES[role], content))
    return found


def _fault(chat: Chat, names: Sequence[str]) -> str:
    for name, side in zip(names, chat.sides, strict=True):
        if not isinstance(side, str) or not side.strip():
            return f"{name} is empty"
    turns = chat.roles[1:] if chat.roles[:1] == ["system"] else chat.roles
    if "user" not in turns:
        return "no user message"
    if turns != [("user", "assistant")[place % 2] for place in range(len(turns))] or turns[-1] != "user":
        return "roles out of order"
    if any(not text.strip() for role, text in zip(chat.roles, chat.contents, strict=True) if role != "system"):
        return "a message is empty"
    return ""
