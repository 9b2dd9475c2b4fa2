"""Code in the pages, kept as it is in its file.

A page holds `<!-- code FILE: FIRST -->` or `<!-- code FILE: FIRST ... LAST -->`, and below it the lines of that file
from the first that begins with FIRST to the next that begins with LAST. Several of one file are looked for in order.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
MARKER = re.compile(
    r"^<!-- code (?P<file>\S+): (?P<first>.+?)(?: \.\.\. (?P<last>.+?))? -->\n(?:```\w*\n.*?^```\n)?", re.M | re.S
)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml"}


class Excerpt(NamedTuple):
    """Lines `start` to `stop` of a file, counted from 1, both included."""

    file: str
    start: int
    stop: int


class ExcerptError(ValueError):
    """A marker names lines that its file does not have."""


def fill(page: str) -> str:
    """The page with the code of each marker as its file has it now."""
    excerpts = excerpts_of(page)

    def filled(marker: re.Match[str]) -> str:
        one = next(excerpts)
        lines = (REPOSITORY / one.file).read_text(encoding="utf-8").splitlines()[one.start - 1 : one.stop]
        head = marker[0].partition("\n")[0]
        return f"{head}\n```{LANGUAGES[Path(one.file).suffix]}\n{dedent(chr(10).join(lines)).rstrip()}\n```\n"

    return MARKER.sub(filled, page)


def excerpts_of(page: str) -> Iterator[Excerpt]:
    """What the markers of a page stand for, in order.

    Raises:
        ExcerptError: the file has no such line behind the last excerpt of it.
    """
    reached: dict[str, int] = {}
    for marker in MARKER.finditer(page):
        file, first, last = marker["file"], marker["first"], marker["last"]
        lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
        start = _line_of(first, lines, reached.get(file, 0), file)
        stop = start if last is None else _line_of(last, lines, start, file)
        reached[file] = stop
        yield Excerpt(file, start, stop)


def _line_of(beginning: str, lines: list[str], after: int, file: str) -> int:
    for number, line in enumerate(lines[after:], start=after + 1):
        if line.strip().startswith(beginning):
            return number
    raise ExcerptError(f"{file} has no line behind line {after} that begins with {beginning!r}; change the marker")
