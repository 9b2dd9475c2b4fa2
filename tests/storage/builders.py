"""Rows for tests, with only what a test cares about spelled out."""

from dataclasses import replace
from pathlib import Path

from storage.rows import Prompt, Rollout


def prompts(count: int, *, first: int = 0) -> list[Prompt]:
    """Prompts p0, p1, ...; every third has no answer."""
    numbers = range(first, first + count)
    return [
        Prompt(prompt_id=f"p{i}", source="test", prompt=f"What is {i}?", answer=str(i) if i % 3 else None)
        for i in numbers
    ]


_ROLLOUT = Rollout(
    prompt_id="p0",
    rollout_index=0,
    prompt="What is 1+1?",
    completion="It is 2.",
    prompt_tokens=7,
    completion_tokens=4,
    finish_reason="stop",
    cumulative_logprob=-0.5,
    seed=3,
    policy="fake@unpinned",
)


def rollout(prompt_id: str = "p0", rollout_index: int = 0, completion: str = "It is 2.") -> Rollout:
    """A rollout of that key."""
    return replace(_ROLLOUT, prompt_id=prompt_id, rollout_index=rollout_index, completion=completion)


def flip_byte(path: Path) -> None:
    """Damage a file in its middle without changing its size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
