r"""Final answers: find the one in a completion, read it as an exact number, compare it with the gold one (METHODS 1.3).

An answer is read only when it can mean one number: `72`, `$1,000.00`, `12 + 7 = 19`, `\boxed{\frac{1}{2}}`, `5 kg`.
Anything else, several numbers, a range, a dozen, is unreadable. That is a class of its own, equal to nothing: where a
guess could be wrong, the rollout stays undecided and is counted (STYLE 1.4).
"""

import re
from collections.abc import Hashable
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from storage.rows import Rollout, ScoredRollout, derive

SCORER = "answer_match@1"
LONGEST_ANSWER = 200  # characters; a longer line is prose or a run-away number, and int() of it would be slow

Number = int | Fraction

CURRENCY = "$€£¥₹¢"
LETTER = r"[^\W\d_]"
UNSIGNED = r"(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:[ \u00a0\u2009\u202f][0-9]{3})+)(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
WORDS = rf"{LETTER}|(?<=\S)[-/](?={LETTER})|[\s.,:;'\"()\[\]%°{CURRENCY}]"

# What nine in ten answers look like, read without the patterns below and to the same value (tested).
_PLAIN = re.compile(
    r"\s*(?P<before>(?:[A-Za-z]{2,} )+)?(?P<boxed>\\boxed\{)?(?(before)|\$?)"
    r"(?P<number>-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,18}))(?:\.0+)?(?(boxed)\})"
    r"(?P<after>(?: [A-Za-z]{2,})+)?\.?(?:\*+|\s*)"
)
_LINE = re.compile(r"(?:[\s*_]|\\n)*(?P<line>[^\n\\]*(?:\\(?!n)[^\n\\]*)*)")
_NUMBER = re.compile(
    rf"(?P<sign>[-+][{CURRENCY}]?)?(?:(?P<whole>[0-9]+)\s(?=[1-9][0-9]*\s?/\s?[0-9]))?"
    rf"(?P<top>{UNSIGNED})(?:\s?/\s?(?P<bottom>{UNSIGNED}))?(?:[eE](?P<exponent>[-+]?[0-9]{{1,2}})(?![0-9]))?"
)
_BEFORE = re.compile(rf"(?:{WORDS})*(?<![\w.,])")
_AFTER = re.compile(rf"(?!\.\.|\s?[kKMBnxyzπ]\b)(?:-(?={LETTER})|\s?/\s?(?={LETTER}))?(?:{WORDS})*")
_CHANGES_THE_VALUE = re.compile(
    r"\b(?:or|not|minus|negative|pi|π|squared|cubed|and (?:an?|one|half)|dozens?|hundreds?|thousands?"
    r"|[mbtr]+illions?)\b",
    re.IGNORECASE,
)
_CHANGES_WHAT_FOLLOWS = re.compile(
    r"\b(?:than|least|most|over|under|above|below|plus|times|half(?: of)?|twice|double|triple|root of)\s*\Z",
    re.IGNORECASE,
)
_SEVERAL = re.compile(r"[,;](?![0-9]{3})|\b(?:and|or)\b|[0-9][A-Za-z]\b|[!<>≠≈~]\Z")  # left of an equals sign
_CODES = re.compile(rf"\b(?:USD?|EUR|GBP|INR|CAD|AUD|Rs\.?)\s?(?=-?[{CURRENCY}]?\.?[0-9])")
_SQUARE_UNITS = re.compile(r"\b([A-Za-z]{1,10})\s?(?:\^\s?\{?[23]\}?|[²³])|\b([cdk]?m)[23]\b")
_BOLD = re.compile(r"\*\*([^*]+)\*\*|\*\*(?=[\s.,])")
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*([0-9])([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<=[0-9])\s*(?=\\[dt]?frac)"), " "),  # 1\frac{1}{2} is a mixed number
    (re.compile(r"\\[dt]?frac\s*\{\s*([^{}]+?)\s*\}\s*\{\s*([^{}]+?)\s*\}"), r"\1/\2"),
    (re.compile(r"\\[,!]|\{,\}(?=[0-9]{3})"), "\u2009"),  # thousands separators in mathematics mode
    (re.compile(r"\\(?=[%$#])"), ""),
    (re.compile(r"\\(?:boxed|fbox|text(?:bf|it|rm)?|math(?:bf|it|rm)|left|right)\b|\\[;: ()\[\]]|~"), " "),
    (re.compile(r"\^\s?\{?\s?\\circ\b\s?\}?"), "°"),
    (re.compile(r"[{}]"), " "),
)
_SEPARATORS = re.compile(r"[^0-9.]")
_CHARACTERS = str.maketrans({"−": "-", "–": "-", "‐": "-", "‑": "-", "－": "-", "`": None})  # noqa: RUF001


class Verdict(NamedTuple):
    """What is found of one completion; the names are those of a ScoredRollout's columns."""

    answer: str | None
    reward: float | None
    reason: str


def extract_answer(completion: str, marker: str) -> str | None:
    r"""The text of the first final answer: from the marker to the end of its line, `None` where there is none.

    A literal backslash-n ends a line too (METHODS 2.6.1). Where nothing follows the marker on its line, the next line
    that is not blank counts. Letter case does not: a taught `FINAL ANSWER:` often comes back as `Final answer:`, and
    telling these apart would measure spelling.

    Raises:
        ValueError: the marker is blank.
    """
    return next(iter(find_answers(completion, marker)), None)


def find_answers(completion: str, marker: str) -> list[str | None]:
    """The text of each final answer, as `extract_answer` reads the first."""
    return [_text_at(completion, start) for start in _starts(completion, marker)]


def answers_disagree(completion: str, marker: str) -> bool:
    """Whether there are two final answers, and not of one value; an unreadable one agrees with nothing."""
    return _disagree(find_answers(completion, marker))


def trim_after_answer(completion: str, marker: str) -> str:
    """The completion up to the end of its first final answer; whole, where there is none (METHODS 2.4)."""
    starts = _starts(completion, marker)
    end = _span_at(completion, starts[0])[1] if starts else len(completion)
    return completion[:end].rstrip()


def answer_group(candidate: str | None) -> Hashable | None:
    """What a vote counts as one answer: the same key for "1,000" and "1000.0"; `None` for one that cannot be read."""
    return None if candidate is None else parse_answer(candidate)


def answers_match(candidate: str, gold: str) -> bool:
    """Whether both are the same exact rational; never, where one of them cannot be read."""
    value = parse_answer(candidate)
    return value is not None and value == parse_answer(gold)


def is_readable(gold: str) -> bool:
    """Whether an answer can be read at all, to check gold answers before a run."""
    return parse_answer(gold) is not None


@lru_cache(maxsize=2**16)  # the rollouts of a prompt answer in few ways, and its gold answer is asked for each of them
def parse_answer(text: str) -> Number | None:
    """The one number an answer can mean, exactly; percent signs, currencies and units are dropped. `None`: unreadable.

    Right of an equals sign counts: `x = 5` and `12 + 7 = 19` state their outcome there. Nothing else is worked out.
    """
    if plain := _PLAIN.fullmatch(text):
        before, _, number, after = plain.groups("")
        words = before + after
        return None if words and _changes(words, before) else int(number.replace(",", ""))
    return read_any_answer(text)


def read_any_answer(text: str) -> Number | None:
    """What `parse_answer` says of a text of any form, without its short way for plain ones."""
    if len(text) > LONGEST_ANSWER:
        return None
    stated = _right_of_equals(_without_markup(text))
    found = list(_NUMBER.finditer(stated))
    if len(found) != 1:
        return None
    before, after = stated[: found[0].start()], stated[found[0].end() :]
    if _BEFORE.fullmatch(before) is None or _AFTER.fullmatch(after) is None:
        return None
    words = f"{before} {after}"
    if _changes(words, before):
        return None
    if not words.isascii() and any(character.isnumeric() for character in words):  # ½, 三
        return None
    return _value(found[0])


def score_by_answer(rollout: Rollout, gold: str, marker: str) -> ScoredRollout:
    """The rollout with its verdict."""
    verdict = verdict_on(rollout.completion, rollout.finish_reason, gold, marker)
    return derive(ScoredRollout, rollout, **verdict._asdict(), scorer=SCORER)


def verdict_on(completion: str, finish_reason: str, gold: str, marker: str) -> Verdict:
    """Reward 1.0 where the final answer is the gold one, 0.0 where it is another number, `None` where that is open.

    Reasons: "match", "mismatch"; undecided: "truncated", "engine error", "no final answer", "two answers", "unreadable
    answer", "unreadable gold answer". A truncated completion is undecided even if an answer stands in it: it did not
    end there.
    """
    answers = find_answers(completion, marker)
    answer = answers[0] if answers else None
    if finish_reason == "length":
        return Verdict(answer, None, "truncated")
    if finish_reason == "error":
        return Verdict(answer, None, "engine error")
    if answer is None:
        return Verdict(None, None, "no final answer")
    if _disagree(answers):
        return Verdict(answer, None, "two answers")
    value, expected = parse_answer(answer), parse_answer(gold)
    if expected is None:
        return Verdict(answer, None, "unreadable gold answer")
    if value is None:
        return Verdict(answer, None, "unreadable answer")
    return Verdict(answer, 1.0, "match") if value == expected else Verdict(answer, 0.0, "mismatch")


class _Marker(NamedTuple):
    pattern: re.Pattern[str]
    plain: str  # in lower case, as it is nearly always written
    first: str  # its first word


@lru_cache(maxsize=64)
def _read_marker(marker: str) -> _Marker:
    words = marker.removesuffix(":").split()
    if not words:
        raise ValueError(f"the answer marker is {marker!r}, a text such as 'FINAL ANSWER:' or '####' was expected")
    colon = ":" if marker.endswith(":") else ""
    pattern = r"[ \t]+".join(map(re.escape, words)) + (colon and r"[*_ \t]*:")  # **FINAL ANSWER**: is a marker too
    return _Marker(re.compile(pattern, re.IGNORECASE), (" ".join(words) + colon).lower(), words[0].lower())


def _starts(completion: str, marker: str) -> list[int]:
    """Where each marker ends and its answer starts: what the pattern finds, in a third of the time."""
    pattern, plain, first = _read_marker(marker)
    if not (completion.isascii() and marker.isascii()):  # a letter's other case may not be ASCII, or be two letters
        return [found.end() for found in pattern.finditer(completion)]
    lowered = completion.lower()
    starts = []
    place = lowered.find(first)
    while place >= 0:
        end = place + len(plain)
        if not lowered.startswith(plain, place):
            found = pattern.match(completion, place)
            end = found.end() if found else -1
        if end >= 0:
            starts.append(end)
        place = lowered.find(first, max(end, place + 1))
    return starts


def _disagree(answers: list[str | None]) -> bool:
    if len(answers) < 2:
        return False
    values = {answer_group(answer) for answer in answers}
    return len(values) > 1 or None in values


def _span_at(completion: str, start: int) -> tuple[int, int]:
    end = completion.find("\n", start)
    end = len(completion) if end < 0 else end
    text = completion[start:end].lstrip(" \t*_")
    if text and not text[0].isspace() and "\\" not in completion[start:end]:  # nearly always, and quicker
        return end - len(text), end
    line = _LINE.match(completion, start)
    assert line is not None  # the pattern matches the empty text
    return line.span("line")


def _text_at(completion: str, start: int) -> str | None:
    begin, end = _span_at(completion, start)
    return completion[begin:end].rstrip() or None


def _without_markup(text: str) -> str:
    text = _BOLD.sub(r" \1 ", text.translate(_CHARACTERS))
    if "\\" in text or "{" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    return _CODES.sub("", _SQUARE_UNITS.sub(r"\1\2", text)).strip(" \t\r*_#")


def _right_of_equals(text: str) -> str:
    left, equals, right = text.rpartition("=")
    if not equals:
        return text
    first, _, middle = left.partition("=")
    several = _SEVERAL.search(left.rstrip()) or (first != left and re.search(LETTER, middle))
    return "" if several else right


def _changes(words: str, before: str) -> bool:
    """Whether words around a number make another one of it."""
    return bool(_CHANGES_THE_VALUE.search(words) or _CHANGES_WHAT_FOLLOWS.search(before))


def _value(found: re.Match[str]) -> Number | None:
    bottom = _decimal(found["bottom"] or "1")
    if bottom == 0:
        return None
    value = _decimal(found["top"]) if bottom == 1 else Fraction(_decimal(found["top"])) / bottom
    if found["whole"]:
        if value >= 1:  # 3 4/2 is no mixed number
            return None
        value += int(found["whole"])
    if found["exponent"]:
        value *= Fraction(10) ** int(found["exponent"])
    return -value if (found["sign"] or "").startswith("-") else value


def _decimal(digits: str) -> Number:
    whole, _, decimals = _SEPARATORS.sub("", digits).partition(".")
    return Fraction(int(whole + decimals), 10 ** len(decimals)) if decimals else int(whole)
