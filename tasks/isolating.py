"""Prompts that bring an engine down: found by drawing ever smaller groups, so that all others are drawn."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from models.engine import EngineError

TRIES_ALONE = 3


class Attempt(NamedTuple):
    """What came of drawing the rollouts that some prompts miss."""

    left: list[str]  # prompt_ids that still miss some
    error: EngineError | None


def failing_prompts(
    prompt_ids: Sequence[str], draw: Callable[[Sequence[str]], Attempt], works: Callable[[], bool]
) -> Iterator[tuple[str, EngineError]]:
    """Draw the prompts, and yield each that fails several times all by itself, with its last error.

    Args:
        draw: draws what these prompts miss; nothing else uses the engine meanwhile.
        works: whether the engine can draw what it drew before; if not, the engine is at fault and no prompt is.
    Raises:
        EngineError: the engine does not work.
    """
    groups = [list(prompt_ids)]
    while groups:
        left, error = draw(groups.pop())
        for _ in range(TRIES_ALONE - 1):
            if len(left) == 1:
                left, error = draw(left)
        if not left or error is None:
            continue
        if not works():
            raise error
        if len(left) == 1:
            yield left[0], error
        else:
            half = len(left) // 2
            groups += [left[half:], left[:half]]
