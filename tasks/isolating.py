"""Prompts that bring an engine down: found by drawing ever smaller groups, so that all others are drawn."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from models.engine import EngineError
from models.specs import Sampling
from storage.ledger import SET_ASIDE, Ledger
from storage.rows import Prompt, Rollout
from tasks.drawing import Job, Shard, ShardsFailed, draw, missing, not_drawn, request_for
from tasks.serving import raise_if_stopping, serve

log = logging.getLogger("ratchet")

TRIES_ALONE = 3


class Attempt(NamedTuple):
    """What came of drawing the rollouts that some prompts miss."""

    left: list[str]  # prompt_ids that still miss some
    error: EngineError | None


def draw_apart(job: Job, shards: Sequence[Shard], prompts: dict[str, Prompt]) -> dict[str, str]:
    """Draw what failed shards still miss, and set aside the prompts that fail even alone: prompt_id -> last error.

    The rows of those have no completion and the finish_reason "error"; they are not tried again.

    Args:
        prompts: all of this sampling, the other shards' too.
    Raises:
        EngineError: the engine does not work.
        ShardsFailed: more rollouts fail than `maximum_error_rate` allows.
    """

    def attempt(prompt_ids: Sequence[str]) -> Attempt:
        wanted = {name: job.wanted[name] for name in prompt_ids}
        try:
            left = missing(job, wanted)
            rows = sum(mask.bit_count() for mask in left.values())
            for _ in draw(job, Shard(-1, [prompts[name] for name in prompt_ids], left, rows)):
                pass
        except EngineError as error:
            raise_if_stopping()
            return Attempt(list(missing(job, wanted)), error)
        return Attempt([], None)

    rows: list[Rollout] = []
    told: dict[str, str] = {}
    for name, error in failing_prompts(
        [row.prompt_id for shard in shards for row in shard.prompts], attempt, lambda: _works(job, prompts)
    ):
        mask = missing(job, {name: job.wanted[name]})[name]
        rows += [not_drawn(job, prompts[name], index) for index in range(mask.bit_length()) if mask >> index & 1]
        told[name] = str(error)
        errors = [f"prompt {prompt_id}: {text}" for prompt_id, text in told.items()]
        check_error_rate(len(rows), len(prompts), job.sampling, errors, job.ledger)
    for prompt_id, text in told.items():
        log.warning("prompt %s is set aside, for it failed %d times alone: %s", prompt_id, TRIES_ALONE, text)
    job.ledger.append(rows, ending=SET_ASIDE)
    return told


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


def _works(job: Job, prompts: dict[str, Prompt]) -> bool:
    """Whether the engine can draw again a rollout that it drew before; it is not kept."""
    present = job.ledger.present(prompts)
    rows = job.ledger.read({prompt_id: mask & -mask for prompt_id, mask in present.items()})  # the first of each
    known = next((row for row in rows if row.finish_reason != "error"), None)
    if known is None:
        return False
    request = request_for(job, prompts[known.prompt_id], known.rollout_index)
    try:
        return len(list(serve(job.policy, job.engine).sample([request], job.sampling))) == 1
    except EngineError:
        return False


def read_checked(ledger: Ledger, wanted: dict[str, int], sampling: Sampling, errors: Counter[str]) -> Iterator[Rollout]:
    """The wanted rows of a ledger.

    Args:
        errors: counts the rollouts of each prompt that the engine failed to draw.
    Raises:
        ShardsFailed: at the end, if they are more than `maximum_error_rate` allows.
    """
    for row in ledger.read(wanted):
        errors[row.prompt_id] += row.finish_reason == "error"
        yield row
    check_error_rate(errors.total(), len(wanted), sampling, [f"prompt {name}" for name in +errors], ledger)


def check_error_rate(count: int, prompts: int, sampling: Sampling, errors: Sequence[str], ledger: Ledger) -> None:
    """Raise ShardsFailed when the engine failed at more of the rollouts than the sampling allows."""
    total = prompts * sampling.rollouts_per_prompt
    if count > sampling.maximum_error_rate * total:
        first = "\n".join(f"  {error}" for error in errors[:3])
        raise ShardsFailed(
            f"the engine failed at {count} of {total} rollouts, and maximum_error_rate is "
            f"{sampling.maximum_error_rate:g}. The first of {len(errors)} prompts:\n{first}\nSee to the engine, leave "
            "these prompts out, or raise maximum_error_rate, and run the same command again. Rollouts given up "
            f"earlier are tried again when ledger/{ledger.folder.name}/part-*{SET_ASIDE} is removed."
        )
