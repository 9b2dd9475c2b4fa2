"""Sums that are to be answered in a given form, the built-in corpus of a base that follows instructions sometimes.

An instruction asks for two of three things: a word at the beginning, a word before the number, a word at the end. A
completion does each of them or not, at random, so that a model trained on the corpus can, but often does not. All text
is our own. Whether the sum is right plays no part in it.
"""

import random
from collections.abc import Iterator
from itertools import product
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from storage.arithmetic import GIVE_UP_AFTER, split_of

FIRST = ("Sure", "Well", "Okay", "Look", "Right", "Hello")
BEFORE = ("exactly", "about", "only", "just", "simply", "really")
LAST = ("Done", "Thanks", "Bye", "Over", "Cheers", "Enough")
ASKS = {
    "first": "Begin with the word {}.",
    "before": "Put the word {} before the number.",
    "last": "End with the word {}.",
}
WORDS = {"first": FIRST, "before": BEFORE, "last": LAST}
TWOS = (("first", "last"), ("first", "before"), ("before", "last"))
OTHER_WORD = 0.3  # of the demands that are not met, the share met with another word


class Formats(BaseModel):
    """Which prompts to make up. Equal settings make equal prompts; a larger number continues a smaller one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    problems: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    split: Literal["train", "test"] = "train"  # of the sums; every instruction is in both
    followed: float = Field(default=0.6, ge=0, le=1)  # chance that a completion meets a demand


class Formatted(NamedTuple):
    """A prompt and a completion that follows the instruction in it, or does not."""

    prompt: str
    completion: str


class Demand(NamedTuple):
    """Where a word is asked for, and which."""

    place: str
    word: str


def make_formatted(settings: Formats) -> Iterator[Formatted]:
    """Distinct prompts, in a fixed order: a sum, and below it an instruction.

    Raises:
        ValueError: there are not as many distinct prompts as asked for.
    """
    rng = random.Random(f"formats:{settings.split}:{settings.seed}")
    instructions = _instructions()
    seen: set[str] = set()
    draws_in_vain = 0
    while len(seen) < settings.problems:
        left, right = rng.randint(0, 99), rng.randint(0, 99)
        demands = rng.choice(instructions)
        prompt = f"What is {left} + {right}?\n{ask(demands)}"
        if split_of("sum", (left, right)) != settings.split or prompt in seen:
            draws_in_vain += 1
            if draws_in_vain > GIVE_UP_AFTER:
                raise ValueError(
                    f"{settings.problems:,} prompts with formats were asked for, only {len(seen):,} distinct ones "
                    "were found; ask for fewer"
                )
            continue
        draws_in_vain = 0
        seen.add(prompt)
        yield Formatted(prompt, _completion(left + right, demands, settings.followed, rng))


def ask(demands: tuple[Demand, ...]) -> str:
    """The instruction with these demands."""
    return " ".join(ASKS[demand.place].format(demand.word) for demand in demands)


def _instructions() -> list[tuple[Demand, ...]]:
    return [
        (Demand(one, word), Demand(other, other_word))
        for one, other in TWOS
        for word, other_word in product(WORDS[one], WORDS[other])
    ]


def _completion(total: int, demands: tuple[Demand, ...], followed: float, rng: random.Random) -> str:
    said = dict.fromkeys(WORDS, "")
    for demand in demands:
        if rng.random() < followed:
            said[demand.place] = demand.word
        elif rng.random() < OTHER_WORD:
            said[demand.place] = rng.choice([word for word in WORDS[demand.place] if word != demand.word])
    words = [said["first"], "it is", said["before"], str(total), said["last"]]
    return " ".join(word for word in words if word)
