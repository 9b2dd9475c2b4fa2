"""Procedural word problems and sums, the built-in source of the demo. All text is our own.

Problems are kept apart by their numbers: which split one belongs to is decided by a hash of its template and numbers,
so no training prompt shares both with a test prompt, whatever names and things they tell of.
"""

import hashlib
import random
import threading
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import accumulate, islice
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

MARKER = "FINAL ANSWER:"
LARGEST_NUMBER = 10  # in a word problem's text
LARGEST_VALUE = 60  # of any step of a word problem
TEST_SHARE = 5  # one problem in five is a test problem
MOST_STEPS = 3  # of a word problem
PLENTY = 60_000  # so many distinct word problems of up to three steps each split has, and more (tested)
GIVE_UP_AFTER = 5_000  # draws in a row that bring nothing new
REMEMBERED = 60_000  # stories of one kind: the splits of an experiment draw the same ones again and again

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jude")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stickers")
CONTAINERS = ("bags", "baskets", "boxes", "jars")
# How the completions of a base corpus are written, and how often (TINY.md): a model that can, but often does not.
MIX = {"right": 36, "bare_answer": 7, "no_marker": 30, "mistake": 27}
QUALITIES = {"right": {"right": 1}, "mixed": MIX, "wrong": {"mistake": 1, "slip": 1}}
SLIPS = (-10, -3, -2, -1, 1, 2, 3, 10)  # how far off one value of a slip is


class Arithmetic(BaseModel):
    """Which problems to make up. Equal settings make equal problems; a larger number continues a smaller one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["word_problems", "sums"] = "word_problems"
    problems: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    split: Literal["train", "test"] = "train"
    max_steps: int = Field(default=MOST_STEPS, ge=1, le=MOST_STEPS)  # word problems with more steps are left out
    # mixed: a base corpus, with mistakes and without the marker at times; wrong: a mistake or a slip in each, marked
    quality: Literal["right", "mixed", "wrong"] = "right"
    wrong_share: float = Field(default=0.0, ge=0, le=1)  # chance that a completion is of quality "wrong" instead
    pairs: bool = False  # each with a completion of quality "wrong" as well, to be rejected


class Problem(NamedTuple):
    """A made-up problem. `answer` is the right one, whatever the completion says."""

    prompt: str
    completion: str
    answer: str
    rejected: str | None = None  # a completion with a wrong answer, where pairs are asked for


class Earlier(NamedTuple):
    """An operand that is the value of an earlier step."""

    step: int


class Step(NamedTuple):
    """One line of a solution."""

    left: int | Earlier
    sign: Literal["+", "-", "*"]
    right: int | Earlier


class Story(NamedTuple):
    """A problem before it is solved. Template and numbers decide the split."""

    template: str
    numbers: tuple[int, ...]
    text: str
    steps: tuple[Step, ...]


def make_problems(settings: Arithmetic) -> Iterator[Problem]:
    """Distinct problems of one split, in a fixed order.

    Raises:
        ValueError: there are not as many distinct problems as asked for.
    """
    quality_rng = random.Random(f"quality:{settings.split}:{settings.seed}")
    made = 0
    for story in _stories(settings):
        spoilt = settings.wrong_share > 0 and quality_rng.random() < settings.wrong_share
        quality = _choose(quality_rng, QUALITIES["wrong" if spoilt else settings.quality])
        completion, answer = write_completion(story.steps, quality, quality_rng), str(_values(story.steps)[-1])
        if settings.pairs:
            wrong = _choose(quality_rng, QUALITIES["wrong"])
            yield Problem(story.text, completion, answer, write_completion(story.steps, wrong, quality_rng))
        else:
            yield Problem(story.text, completion, answer)
        made += 1
        if made == settings.problems:
            return
    raise ValueError(_too_few(settings, made))


def check_enough(settings: Arithmetic) -> None:
    """Find out whether there are as many distinct problems as asked for, without solving them.

    Raises:
        ValueError: there are not.
    """
    if settings.kind == "word_problems" and settings.max_steps == MOST_STEPS and settings.problems <= PLENTY:
        return
    found = sum(1 for _ in islice(_stories(settings), settings.problems))
    if found < settings.problems:
        raise ValueError(_too_few(settings, found))


def split_of(template: str, numbers: Sequence[int]) -> Literal["train", "test"]:
    """The split of every problem with this template and these numbers."""
    digest = hashlib.sha256(f"{template}:{','.join(map(str, numbers))}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else "train"


def write_completion(steps: Sequence[Step], quality: str, rng: random.Random) -> str:
    """A solution of the given quality, a key of `MIX` or "slip"; a mistake or slip always leads to a wrong answer."""
    if quality == "slip":
        return _with_a_slip(steps, rng)
    if quality == "mistake":
        steps, answer = _with_a_mistake(steps, rng)
    else:
        answer = _values(steps)[-1]
    ending = f"So it is {answer}." if quality == "no_marker" else f"{MARKER} {answer}"
    return "\n".join([ending] if quality == "bare_answer" else [*_lines(steps), ending])


def _too_few(settings: Arithmetic, found: int) -> str:
    return (
        f"{settings.problems:,} {settings.split} problems of kind {settings.kind!r} with at most "
        f"{settings.max_steps} steps were asked for, only {found:,} distinct ones were found; ask for fewer"
    )


class _Stories:
    """Distinct stories of one split, drawn when they are first asked for and then remembered."""

    def __init__(self, settings: Arithmetic) -> None:
        self._drawing = _draw_stories(settings)
        self._drawn: list[Story] = []
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Story]:
        place = 0
        while place < len(self._drawn) or self._draw_one_more(place):
            yield self._drawn[place]
            place += 1

    def _draw_one_more(self, place: int) -> bool:
        with self._lock:
            if place == len(self._drawn):  # else another thread has drawn it meanwhile
                self._drawn.extend(story for story in [next(self._drawing, None)] if story is not None)
            return place < len(self._drawn)


@lru_cache(maxsize=4)
def _remembered(settings: Arithmetic) -> _Stories:
    return _Stories(settings)


def _stories(settings: Arithmetic) -> Iterator[Story]:
    """The stories of these problems and more, whatever becomes of them; many are drawn anew, and not held in memory."""
    if settings.problems > REMEMBERED:
        return _draw_stories(settings)
    drawn_alike = Arithmetic(
        kind=settings.kind, problems=1, seed=settings.seed, split=settings.split, max_steps=settings.max_steps
    )
    return iter(_remembered(drawn_alike))


def _draw_stories(settings: Arithmetic) -> Iterator[Story]:
    """Distinct stories, until no more are found."""
    draw = _draw_sum if settings.kind == "sums" else _draw_word_problem
    rng = random.Random(f"{settings.kind}:{settings.split}:{settings.seed}")
    seen: set[str] = set()
    draws_in_vain = 0
    while draws_in_vain <= GIVE_UP_AFTER:
        story = draw(rng)
        if story.text in seen or not _belongs(story, settings):
            draws_in_vain += 1
            continue
        draws_in_vain = 0
        seen.add(story.text)
        yield story


def _belongs(story: Story, settings: Arithmetic) -> bool:
    if settings.kind == "word_problems":
        if not all(0 <= value <= LARGEST_VALUE for value in _values(story.steps)):
            return False
        if len(story.steps) > settings.max_steps:
            return False
    return split_of(story.template, story.numbers) == settings.split


def _choose(rng: random.Random, weights: dict[str, int]) -> str:
    """As rng.choices with these weights, whose checks and sums take three times as long."""
    names, cumulative = _cumulative(tuple(weights.items()))
    return names[bisect(cumulative, rng.random() * cumulative[-1], 0, len(names) - 1)]


@cache
def _cumulative(weights: tuple[tuple[str, int], ...]) -> tuple[list[str], list[float]]:
    return [name for name, _ in weights], list(accumulate(float(weight) for _, weight in weights))


def _values(steps: Sequence[Step]) -> list[int]:
    values: list[int] = []
    for step in steps:
        left, right = _number(step.left, values), _number(step.right, values)
        values.append(left + right if step.sign == "+" else left - right if step.sign == "-" else left * right)
    return values


def _number(operand: int | Earlier, values: Sequence[int]) -> int:
    return values[operand.step] if isinstance(operand, Earlier) else operand


def _lines(steps: Sequence[Step]) -> list[str]:
    values = _values(steps)
    return [
        f"{_number(step.left, values)} {step.sign} {_number(step.right, values)} = {value}"
        for step, value in zip(steps, values, strict=True)
    ]


def _with_a_mistake(steps: Sequence[Step], rng: random.Random) -> tuple[Sequence[Step], int]:
    """The steps with one mistake, carried through, and the wrong answer they lead to."""
    right = _values(steps)[-1]
    wrong = [(changed, answer) for changed, answer in _mistakes(steps) if answer != right]
    likely = [(changed, answer) for changed, answer in wrong if all(0 <= v <= LARGEST_VALUE for v in _values(changed))]
    return rng.choice(likely or wrong)


def _with_a_slip(steps: Sequence[Step], rng: random.Random) -> str:
    """The solution with one value miscounted and carried through."""
    while True:
        place, off = rng.randrange(len(steps)), rng.choice(SLIPS)
        values: list[int] = []
        lines = []
        for n, step in enumerate(steps):
            left, right = _number(step.left, values), _number(step.right, values)
            values.append(_values([Step(left, step.sign, right)])[0] + (off if n == place else 0))
            lines.append(f"{left} {step.sign} {right} = {values[-1]}")
        if min(values) >= 0 and values[-1] != _values(steps)[-1]:
            return "\n".join([*lines, f"{MARKER} {values[-1]}"])


def _mistakes(steps: Sequence[Step]) -> Iterator[tuple[Sequence[Step], int]]:
    """Every way to take a wrong operation, and to drop a step."""
    for place, step in enumerate(steps):
        for sign in ("+", "-", "*"):
            changed = [*steps[:place], step._replace(sign=sign), *steps[place + 1 :]]
            yield changed, _values(changed)[-1]
    for place in range(len(steps) if len(steps) > 1 else 0):
        fewer = _without(steps, place)
        yield fewer, _values(fewer)[-1]


def _without(steps: Sequence[Step], dropped: int) -> list[Step]:
    """The steps without one; what used its value takes its left operand instead."""

    def moved(operand: int | Earlier) -> int | Earlier:
        if not isinstance(operand, Earlier) or operand.step < dropped:
            return operand
        return moved(steps[dropped].left) if operand.step == dropped else Earlier(operand.step - 1)

    kept = [step for place, step in enumerate(steps) if place != dropped]
    return [Step(moved(step.left), step.sign, moved(step.right)) for step in kept]


def _draw_sum(rng: random.Random) -> Story:
    left, right = rng.randint(0, 99), rng.randint(0, 99)
    return Story("sum", (left, right), f"What is {left} + {right}?", (Step(left, "+", right),))


def _draw_word_problem(rng: random.Random) -> Story:
    return STORIES[_choose(rng, STORY_WEIGHTS)](rng)


def _draw_chain(rng: random.Random, events: int) -> Story:
    name, friend = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    numbers = [rng.randint(2, LARGEST_NUMBER)]
    sentences = [f"{name} has {numbers[0]} {things}."]
    steps: list[Step] = []
    kinds = []
    for event in range(events):
        kind = _choose(rng, {"more": 5, "fewer": 5, "times": 2})
        number = rng.randint(2, 3) if kind == "times" else rng.randint(1, LARGEST_NUMBER)
        sentences.append(rng.choice(EVENTS[kind]).format(name=name, friend=friend, number=number))
        sign = SIGNS[kind]
        steps.append(Step(Earlier(event - 1) if event else numbers[0], sign, number))
        numbers.append(number)
        kinds.append(kind)
    sentences.append(f"How many {things} does {name} have now?")
    return Story(f"chain:{','.join(kinds)}", tuple(numbers), " ".join(sentences), tuple(steps))


def _draw_more_than(rng: random.Random) -> Story:
    name, friend = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    number, more = rng.randint(2, LARGEST_NUMBER), rng.randint(1, LARGEST_NUMBER)
    text = (
        f"{name} has {number} {things}. {friend} has {more} more than {name}. "
        f"How many {things} do {name} and {friend} have together?"
    )
    return Story("more_than", (number, more), text, (Step(number, "+", more), Step(number, "+", Earlier(0))))


def _draw_times_as_many(rng: random.Random) -> Story:
    name, friend = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    number, times = rng.randint(2, LARGEST_NUMBER), rng.randint(2, 5)
    text = (
        f"{name} has {number} {things}. {friend} has {times} times as many as {name}. "
        f"How many {things} do {name} and {friend} have together?"
    )
    return Story("times_as_many", (number, times), text, (Step(number, "*", times), Step(number, "+", Earlier(0))))


def _draw_packed(rng: random.Random) -> Story:
    name = rng.choice(NAMES)
    things, containers = rng.choice(THINGS), rng.choice(CONTAINERS)
    packs, each, rest = rng.randint(2, LARGEST_NUMBER), rng.randint(2, LARGEST_NUMBER), rng.randint(1, LARGEST_NUMBER)
    kind = rng.choice(["left", "lost"])
    ending = f"{rest} more are left over." if kind == "left" else f"Then {name} loses {rest} of them."
    text = (
        f"{name} packs {packs} {containers} with {each} {things} each. {ending} "
        f"How many {things} does {name} have in all?"
    )
    steps = (Step(packs, "*", each), Step(Earlier(0), "+" if kind == "left" else "-", rest))
    return Story(f"packed:{kind}", (packs, each, rest), text, steps)


def _draw_cost(rng: random.Random) -> Story:
    name = rng.choice(NAMES)
    first, second = rng.sample([things for things in THINGS if things != "coins"], 2)
    count, price = rng.randint(2, 6), rng.randint(2, LARGEST_NUMBER)
    other_count, other_price = rng.randint(2, 6), rng.randint(2, LARGEST_NUMBER)
    text = (
        f"{name} buys {count} {first} for {price} coins each and {other_count} {second} for {other_price} coins each. "
        f"How many coins does {name} pay?"
    )
    steps = (Step(count, "*", price), Step(other_count, "*", other_price), Step(Earlier(0), "+", Earlier(1)))
    return Story("cost", (count, price, other_count, other_price), text, steps)


SIGNS: dict[str, Literal["+", "-", "*"]] = {"more": "+", "fewer": "-", "times": "*"}
EVENTS = {
    "more": ("{name} buys {number} more.", "{name} finds {number} more.", "{friend} gives {name} {number} more."),
    "fewer": ("{name} gives {number} to {friend}.", "{name} loses {number} of them.", "{name} sells {number} of them."),
    "times": ("Soon {name} has {number} times as many.", "Then {name} gets {number} times as many."),
}
STORIES: dict[str, Callable[[random.Random], Story]] = {
    "one_event": lambda rng: _draw_chain(rng, 1),
    "two_events": lambda rng: _draw_chain(rng, 2),
    "three_events": lambda rng: _draw_chain(rng, 3),
    "more_than": _draw_more_than,
    "times_as_many": _draw_times_as_many,
    "packed": _draw_packed,
    "cost": _draw_cost,
}
STORY_WEIGHTS = {
    "one_event": 16,
    "two_events": 20,
    "three_events": 18,
    "more_than": 10,
    "times_as_many": 10,
    "packed": 16,
    "cost": 10,
}
