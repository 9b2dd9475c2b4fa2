"""Where rows come from: a hub data set, a JSONL or Parquet file, or the built-in problems. One shape comes out.

Before a hub is asked, the folder named by RATCHET_DATA is searched for `<id>/<split>.jsonl` or `.parquet`, with the
whole id ("openai/gsm8k") and with its last part ("gsm8k"), also in lower case, so that a machine without a network can
hold what it needs.
"""

import json
import os
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from storage.arithmetic import Arithmetic, Problem, make_problems
from storage.digests import file_sha256
from storage.formats import Formats, make_formatted

T = TypeVar("T")
_STAYING_HERE: ContextVar[bool] = ContextVar("staying_here", default=False)
SPLIT_NAMES = {"input_data": "train"}  # google-research's own file name for the IFEval prompts
PLACES = ("hub", "path", "arithmetic", "formats")
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # GSM8K's calculator notes: "48/2 = <<48/2=24>>24"


class NotAtHand(RuntimeError):
    """Rows are on a hub, and the hub is not to be asked just now."""


class Section(BaseModel):
    """Base of a source's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def chosen(self, *names: str) -> list[str]:
        """Which of these fields differ from their defaults; settings as they are stored state every field."""
        fields = type(self).model_fields
        return sorted(name for name in names if getattr(self, name) != fields[name].default)


class Columns(Section):
    """Which columns of the source to read; None: the source has none."""

    prompt: str = "prompt"
    answer: str | None = None
    completion: str | None = None
    turns: str | None = None  # chat messages: the first user turn and its reply are prompt and completion, no other is

    @model_validator(mode="after")
    def _turns_stand_alone(self) -> Self:
        if self.turns is not None and self.chosen("prompt", "completion"):
            raise ValueError("columns.turns holds prompt and completion; remove columns.prompt and columns.completion")
        return self


class RowRange(Section):
    """Rows start, start + 1, ..., stop - 1 of the source, counted from 0; stop None: to the end."""

    start: int = Field(default=0, ge=0)
    stop: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _is_not_empty(self) -> Self:
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"rows start at {self.start} and stop at {self.stop}, which leaves none; raise stop")
        return self


class Source(Section):
    """Where rows come from: exactly one of `hub`, `path` and the built-in ones; then which rows and columns of it."""

    hub: str | None = None  # data set id, for instance "openai/gsm8k"
    config: str | None = None
    split: str = "train"
    revision: str | None = None  # commit of the data set; None: unpinned
    path: str | None = None  # JSONL or Parquet, relative to the current directory
    arithmetic: Arithmetic | None = None
    formats: Formats | None = None
    columns: Columns = Columns()
    answer_after: str | None = Field(default=None, min_length=1)  # the answer is what follows this, its last occurrence
    strip_annotations: bool = True  # remove <<...>> from completions
    rows: RowRange | None = None  # taken first,
    shuffle_seed: int | None = None  # then shuffled,
    limit: int | None = Field(default=None, ge=1)  # then cut

    @model_validator(mode="after")
    def _names_one_place(self) -> Self:
        named = [name for name in PLACES if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"a source names exactly one of {', '.join(PLACES)}; found {named or 'none of them'}")
        foreign = self.chosen("config", "split", "revision")
        if foreign and self.hub is None:
            raise ValueError(f"{foreign} belong to a hub source, this one is {named[0]!r}; remove them")
        if named[0] in ("arithmetic", "formats") and self.chosen("columns", "answer_after"):
            raise ValueError(f"columns and answer_after do not apply to {named[0]} problems; remove them")
        if self.answer_after is not None and self.columns.answer is None:
            raise ValueError(
                f"answer_after is {self.answer_after!r} but columns.answer is null; name the column it is in"
            )
        return self


class SourceRow(NamedTuple):
    """One row of a source, as plain text."""

    line: int  # counted from 1, for messages
    prompt: str
    answer: str | None
    completion: str | None


def read_source(source: Source) -> Iterator[SourceRow]:
    """The rows of a source; streamed, unless they are to be shuffled.

    Raises:
        ValueError: the source is not there, or a row is not as `columns` and `answer_after` say.
        ConnectionError: the hub cannot be reached.
    """
    return _taken(source, _all_rows(source))


def read_records(source: Source) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The rows that `read_source` reads, with all their columns as they are, each with its line.

    Built-in problems have the columns prompt and completion, or prompt, chosen and rejected.
    """
    return _taken(source, _all_records(source))


@contextmanager
def staying_here() -> Iterator[None]:
    """Sources are read inside as far as their rows are on this machine; of others, reading raises NotAtHand."""
    token = _STAYING_HERE.set(True)
    try:
        yield
    finally:
        _STAYING_HERE.reset(token)


def is_at_hand(source: Source) -> bool:
    """Whether the rows are on this machine: made up, in a file, or in the cache of the `datasets` library."""
    if source.hub is None or _local_file(source) is not None:
        return True
    cache = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(cache) / "datasets")
    known = {_letters(path.name) for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()
    return _letters(source.hub) in known


def count_rows(source: Source) -> int:
    """How many rows `read_source` reads; of made-up ones and of those that are not at hand, how many are asked for."""
    made_up, bounds = source.arithmetic or source.formats, source.rows or RowRange()
    if made_up is not None:
        taken = max(0, min(made_up.problems, bounds.stop or made_up.problems) - bounds.start)
        return min(taken, source.limit or taken)
    asked = [*([bounds.stop - bounds.start] if bounds.stop else []), *([source.limit] if source.limit else [])]
    if asked and _STAYING_HERE.get() and not is_at_hand(source):
        return min(asked)
    return sum(1 for _ in read_source(source))


def source_name(source: Source) -> str:
    """A word or two for the `source` column: no path of this machine, and the same for the same place."""
    if source.hub is not None:
        return ":".join(part for part in (source.hub, source.config, source.split) if part)
    if source.path is not None:
        return Path(source.path).name
    if source.formats is not None:
        return f"formats:{source.formats.split}"
    assert source.arithmetic is not None  # _names_one_place
    return f"arithmetic:{source.arithmetic.kind}:{source.arithmetic.split}"


def source_key(source: Source) -> dict[str, JsonValue]:
    """What decides the rows, as plain JSON: files by their content, hub sets by id, config, split and revision.

    A hub set that RATCHET_DATA holds is a file: its content is known, a hub's unpinned revision is not.
    """
    place: dict[str, JsonValue] = {}
    if source.arithmetic is not None:
        place["arithmetic"] = source.arithmetic.model_dump(mode="json")
    elif source.formats is not None:
        place["formats"] = source.formats.model_dump(mode="json")
    elif (file := _local_file(source)) is not None:
        place["file"] = file_sha256(file)
    else:
        place = {"hub": source.hub, "config": source.config, "split": source.split, "revision": source.revision}
    places = {"config", "split", "revision", *PLACES}
    return {"name": source_name(source), **place, **source.model_dump(mode="json", exclude=places)}


def _taken(source: Source, rows: Iterator[T]) -> Iterator[T]:
    bounds = source.rows or RowRange()
    taken = islice(rows, bounds.start, bounds.stop)
    if source.shuffle_seed is not None:
        shuffled = list(taken)
        random.Random(f"{source.shuffle_seed}").shuffle(shuffled)
        taken = islice(shuffled, None)
    return islice(taken, source.limit)


def _all_rows(source: Source) -> Iterator[SourceRow]:
    if source.arithmetic is not None:
        for line, problem in enumerate(make_problems(source.arithmetic), start=1):
            yield SourceRow(line, problem.prompt, problem.answer, problem.completion)
        return
    if source.formats is not None:
        for line, formatted in enumerate(make_formatted(source.formats), start=1):
            yield SourceRow(line, formatted.prompt, None, formatted.completion)
        return
    file = _local_file(source)
    place = str(file) if file is not None else source_name(source)
    for line, record in _all_records(source):
        yield _source_row(record, line, source, place)


def _all_records(source: Source) -> Iterator[tuple[int, Mapping[str, object]]]:
    if source.arithmetic is not None:
        return enumerate(map(_problem_record, make_problems(source.arithmetic)), start=1)
    if source.formats is not None:
        made = make_formatted(source.formats)
        return enumerate(({"prompt": one.prompt, "completion": one.completion} for one in made), start=1)
    file = _local_file(source)
    return file_records(file) if file is not None else enumerate(_hub_records(source), start=1)


def _problem_record(problem: Problem) -> Mapping[str, object]:
    if problem.rejected is None:
        return {"prompt": problem.prompt, "completion": problem.completion}
    return {"prompt": problem.prompt, "chosen": problem.completion, "rejected": problem.rejected}


def _source_row(record: Mapping[str, object], line: int, source: Source, place: str) -> SourceRow:
    where = f"{place} row {line}"
    columns = source.columns
    first_prompt, first_reply = (None, None) if columns.turns is None else _first_turn(record, columns.turns, where)
    prompt = _text(record, columns.prompt, where) if first_prompt is None else first_prompt
    if not prompt.strip():
        raise ValueError(f"{where}: column {columns.prompt!r} is empty, expected a prompt; remove the row")
    answer = _text(record, columns.answer, where) if columns.answer is not None else None
    completion = _text(record, columns.completion, where) if columns.completion is not None else first_reply
    if answer is not None and source.answer_after is not None:
        _, marker, answer_part = answer.rpartition(source.answer_after)
        if not marker or not answer_part.strip():
            raise ValueError(
                f"{where}: expected an answer after {source.answer_after!r} in column {columns.answer!r}, "
                f"found {answer[-60:]!r}; correct the row or answer_after"
            )
        answer = answer_part.strip()
    if completion is not None and source.strip_annotations:
        completion = _ANNOTATION.sub("", completion)
    return SourceRow(line, prompt, answer, completion)


def _text(record: Mapping[str, object], column: str, where: str) -> str:
    if column not in record:
        raise ValueError(f"{where}: expected a column {column!r}, found {sorted(record)}; set `columns` of the source")
    value = record[column]
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} is {value!r}, expected text; convert the column or name another")
    return value


def _first_turn(record: Mapping[str, object], column: str, where: str) -> tuple[str, str]:
    """What the user says first, and what is said to that."""
    turns = record.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: column {column!r} is {turns!r:.80}, expected a list of messages; name another")
    said = [(turn.get("role"), turn.get("content")) for turn in turns if turn.get("role") != "system"]
    if [role for role, _ in said[:2]] != ["user", "assistant"] or not all(
        isinstance(text, str) for _, text in said[:2]
    ):
        raise ValueError(
            f"{where}: column {column!r} was expected to begin with a user message and its reply, found roles "
            f"{[role for role, _ in said[:2]]!r}; leave the row out"
        )
    return str(said[0][1]), str(said[1][1])


def _local_file(source: Source) -> Path | None:
    """The file to read, or None if the hub has to be asked."""
    if source.path is not None:
        path = Path(source.path).expanduser()
        if not path.is_file():
            raise ValueError(f"{source.path} is not a file in {Path.cwd()}; correct `path` of the source")
        return path
    folder = os.environ.get("RATCHET_DATA")
    if source.hub is None or not folder:
        return None
    last = source.hub.rpartition("/")[2]
    stems = [source.split, *(stem for stem, name in SPLIT_NAMES.items() if name == source.split)]
    files = [f"{stem}.{kind}" for stem in stems for kind in ("jsonl", "parquet")]
    candidates = [Path(folder) / name / file for name in (source.hub, last, last.lower()) for file in files]
    return next((path for path in candidates if path.is_file()), None)


def file_records(file: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The records of a JSONL or Parquet file, each with its line.

    Raises:
        ValueError: the file is neither, or a line is no record.
    """
    if file.suffix == ".jsonl":
        return _jsonl_records(file)
    if file.suffix == ".parquet":
        return enumerate(_parquet_records(file), start=1)
    raise ValueError(f"{file} ends with {file.suffix!r}, expected .jsonl or .parquet; convert it")


def _jsonl_records(file: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(
                    f"{file} line {number} is not JSON: {error}; found {line[:60]!r}; correct it"
                ) from error
            if not isinstance(record, dict):
                raise ValueError(f"{file} line {number} is {record!r}, expected an object of columns; correct it")
            yield number, record


def _parquet_records(file: Path) -> Iterator[Mapping[str, object]]:
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a Parquet file: {error}; download or write it again") from error
    with parquet:
        for batch in parquet.iter_batches(batch_size=1_000):
            yield from batch.to_pylist()


def _letters(name: str) -> str:
    """A data set's id, or its folder in the cache, so that the two compare equal ("HuggingFaceH4/ultrachat_200k")."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _hub_records(source: Source) -> Iterator[Mapping[str, object]]:
    if _STAYING_HERE.get() and not is_at_hand(source):
        raise NotAtHand(f"{source_name(source)} is not on this machine")
    import datasets

    if _STAYING_HERE.get():
        datasets.config.HF_HUB_OFFLINE = True

    file = f"<RATCHET_DATA>/{source.hub}/{source.split}.jsonl"
    try:
        loaded = datasets.load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
    except ConnectionError as error:
        raise ConnectionError(
            f"{source_name(source)} is not at hand and its hub cannot be reached: {error}; or put it at {file}"
        ) from error
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"{source_name(source)} cannot be loaded: {error}; correct hub, config, split or revision"
        ) from error
    yield from loaded
