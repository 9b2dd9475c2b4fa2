"""What trainings read from Parquet: rows of prompts and completions, or of whole chats, as messages either way."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models.chat import chat_of, messages_of
from models.engine import Message
from models.specs import PromptTemplate


class Sides(NamedTuple):
    """A pair: what is replied to, and the two replies."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    more: tuple[Any, ...]  # the further columns that were asked for


def read_columns(files: Sequence[Path], columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """These columns of all rows of the Parquet files, in order."""
    import pyarrow.parquet as pq

    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(columns=list(columns)):
            yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def read_chats(files: Sequence[Path], template: PromptTemplate) -> Iterator[tuple[Message, ...]]:
    """The conversations to imitate, the last message being the assistant's."""
    for file in files:
        if _holds_chats(file):
            for roles, contents in read_columns((file,), ("roles", "contents")):
                yield chat_of(roles, contents, template.system)
        else:
            for prompt, completion in read_columns((file,), ("prompt", "completion")):
                yield (*messages_of(template, prompt), {"role": "assistant", "content": completion})


def read_sides(files: Sequence[Path], template: PromptTemplate, more: Sequence[str] = ()) -> Iterator[Sides]:
    """The pairs, in order."""
    for file in files:
        if _holds_chats(file):
            for roles, contents, chosen, rejected, *rest in read_columns(
                (file,), ("roles", "contents", "chosen", "rejected", *more)
            ):
                yield Sides(chat_of(roles, contents, template.system), chosen, rejected, tuple(rest))
        else:
            for prompt, chosen, rejected, *rest in read_columns((file,), ("prompt", "chosen", "rejected", *more)):
                yield Sides(messages_of(template, prompt), chosen, rejected, tuple(rest))


def _holds_chats(file: Path) -> bool:
    import pyarrow.parquet as pq

    return "roles" in pq.read_schema(file).names
