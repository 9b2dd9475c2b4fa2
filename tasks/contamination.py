"""Whether a text holds a benchmark's question: a run of 13 words of it, or the whole of a shorter one."""

import re
from collections.abc import Iterable, Iterator

from tasks.prompts import NGRAM

KEY_WORDS = 4  # runs are looked up by their first words; of a shorter question, only an equal text is found
_WORD = re.compile(r"\w+")


class Questions:
    """The questions of one or more benchmarks, ready to be looked for."""

    def __init__(self, questions: Iterable[tuple[str, str]]) -> None:
        """(benchmark, question) of each; or any name, where it is to be told which questions a text holds."""
        self._runs: dict[tuple[str, ...], dict[tuple[str, ...], list[str]]] = {}
        self._short: dict[tuple[str, ...], list[str]] = {}
        for benchmark, text in questions:
            words = _words(text)
            if len(words) < KEY_WORDS:
                self._short.setdefault(words, []).append(benchmark)
            for start in range(max(1, len(words) - NGRAM + 1) if len(words) >= KEY_WORDS else 0):
                run = words[start : start + NGRAM]
                self._runs.setdefault(run[:KEY_WORDS], {}).setdefault(run, []).append(benchmark)

    def found_in(self, text: str) -> str:
        """The benchmark of which the text holds a question; empty: none."""
        return next(self._found(text), "")

    def all_in(self, text: str) -> frozenset[str]:
        """The names of all questions that the text holds."""
        return frozenset(self._found(text))

    def _found(self, text: str) -> Iterator[str]:
        words = _words(text)
        yield from self._short.get(words, ())
        for start in range(len(words) - KEY_WORDS + 1):
            for run, names in self._runs.get(words[start : start + KEY_WORDS], {}).items():
                if words[start : start + len(run)] == run:
                    yield from names


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))
