"""Sources -> Prompt and Demonstration data sets, and the model an experiment starts from.

Every fault of a source is found by reading it, before a model is loaded: `prompts_of` is also what the checks call.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from models.specs import ModelRef
from storage.checkpoints import folder_digest
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.hub import Source, SourceRow, count_rows, read_source, source_key, source_name
from storage.rows import Demonstration, Prompt
from tasks.answers import is_readable
from tasks.caching import log_counts, step
from tasks.prompts import prompt_id


def _rows_left(source: Source, without: tuple[str, ...]) -> int:
    return count_rows(source) - len(without)


@step(version="1", rows=_rows_left)
def load_prompts(source: Source, without: tuple[str, ...]) -> DatasetRef:
    """The prompts of a source but for those with these ids, the few-shot examples that is."""
    left_out = set(without)
    prompts = (prompt for prompt in prompts_of(source) if prompt.prompt_id not in left_out)
    log_counts({"few-shot examples left out": len(left_out)} if left_out else {})
    return write_rows(prompts, Prompt, step="prompts", settings=source_key(source))


@step(version="2", rows=lambda source, marker: count_rows(source))
def load_demonstrations(source: Source, marker: str) -> DatasetRef:
    """The prompts of a source with the completions it has for them."""
    return write_rows(demonstrations_of(source, marker), Demonstration, step="corpus", settings=source_key(source))


@step(version="1", rows=lambda prompts, count, iteration, seed: min(count, prompts.rows))
def draw_prompts(prompts: DatasetRef, count: int, iteration: int, seed: int) -> DatasetRef:
    """The prompts of one iteration: the next `count` of a shuffled row of all, from the start again at its end."""
    rows = list(read_rows(prompts, Prompt))
    random.Random(f"{seed}").shuffle(rows)
    start = (iteration - 1) * count
    drawn = [rows[n % len(rows)] for n in range(start, start + min(count, len(rows)))]
    return write_rows(drawn, Prompt, step="drawn", parents=[prompts])


def prompts_of(source: Source) -> Iterator[Prompt]:
    """The prompts of a source, checked.

    Raises:
        ValueError: a prompt is empty or stands there twice, or a gold answer cannot be read; names source and row.
    """
    name = source_name(source)
    lines: dict[str, int] = {}
    for row in read_source(source):
        identity = prompt_id(name, row.prompt)
        if identity in lines:
            raise ValueError(
                f"{name}: rows {lines[identity]} and {row.line} hold the same prompt (prompt_id {identity}), so their "
                f"rollouts could not be told apart; remove one: {row.prompt[:80]!r}"
            )
        lines[identity] = row.line
        if row.answer is not None and not is_readable(row.answer):
            raise ValueError(
                f"{name}: the gold answer of row {row.line} is {row.answer!r}, a number was expected; "
                "correct it, leave the row out, or set answer_after to the text that comes before the number"
            )
        yield Prompt(prompt_id=identity, source=name, prompt=row.prompt, answer=row.answer)


def demonstrations_of(source: Source, marker: str) -> Iterator[Demonstration]:
    """Prompts and completions of a source, the final answer after our marker.

    Raises:
        ValueError: a row has no completion.
    """
    name = source_name(source)
    for row in read_source(source):
        if row.completion is None:
            raise ValueError(f"{name}: row {row.line} has no completion; name its column in columns.completion")
        yield Demonstration(
            task="solve",
            prompt_id=prompt_id(name, row.prompt),
            rollout_index=None,
            iteration=0,
            prompt=row.prompt,
            completion=_with_our_marker(row, source.answer_after, marker),
            reward=None,
            source=name,
        )


def open_folder(ref: ModelRef) -> ModelRef:
    """A model that is a local folder, named by its content; any other as it is."""
    folder = Path(ref.name)
    if ref.digest or not folder.is_dir():
        return ref
    return ref.model_copy(update={"digest": folder_digest(folder), "path": str(folder.absolute())})


def _with_our_marker(row: SourceRow, theirs: str | None, marker: str) -> str:
    assert row.completion is not None
    if theirs is None or theirs == marker or theirs not in row.completion:
        return row.completion
    return f"{row.completion.rpartition(theirs)[0].rstrip()}\n{marker} {row.answer}"
