"""Drawing rollouts into the ledger: what one shard does, whatever runs it."""

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from models.chat import messages_of
from models.engine import Completion, Request
from models.specs import EngineSettings, ModelRef, PromptTemplate, Sampling
from storage.ledger import Ledger, LedgerWriter
from storage.rows import Prompt, Rollout
from tasks.answers import verdict_on
from tasks.metrics import is_correct
from tasks.recording import Progress, ShardProgress, announce, current_iteration, current_run, current_split
from tasks.serving import raise_if_stopping, serve


class ShardsFailed(RuntimeError):
    """Some shards failed and the others are done; running again does only those."""


def tell_failed(errors: Mapping[int, BaseException], shards: int, *, kept: str, again: str) -> str:
    """The message of a ShardsFailed: which failed, with the first errors, and what to do.

    Args:
        kept: what the others have, for instance "the rows of the others are kept".
        again: what happens when the same command is run again.
    """
    first = "\n".join(
        f"  shard {number}: {type(error).__name__}: {error}" for number, error in list(errors.items())[:3]
    )
    return (
        f"{len(errors)} of {shards} shards failed: {sorted(errors)}; {kept}. First errors:\n{first}\n"
        f"Run the same command again, or retry this flow run, and {again}."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all shards of one sampling have in common."""

    policy: ModelRef
    template: PromptTemplate
    sampling: Sampling
    engine: EngineSettings
    ledger: Ledger
    writer: LedgerWriter  # into the ledger, of all shards
    meter: "Meter"
    wanted: dict[str, int]  # prompt_id -> mask of rollout indexes, in the ledger or not


class Meter:
    """Rows and tokens finished, of all shards and of each, announced about once a second."""

    def __init__(self, total: int, reused: int, step: str = "sample_rollouts", unit: str = "rollouts") -> None:
        self.total, self.reused, self.step, self.unit = total, reused, step, unit
        self.done, self.tokens = reused, 0
        self._shards: dict[int, Tally] = {}
        self._lock = threading.Lock()
        self._announced = 0.0

    def expect(self, shards: Mapping[int, "Tally"]) -> None:
        """Know of shards, by number, that are to be drawn on top of what is known already."""
        with self._lock:
            self._shards |= shards
            self.total += sum(tally.total for tally in shards.values())
            self.reused += sum(tally.done for tally in shards.values())
            self.done += sum(tally.done for tally in shards.values())

    def add(self, *, rows: int = 1, tokens: int = 0, shard: int | None = None, matches: bool | None = None) -> None:
        """Count rows that are finished, and the tokens that were written for them.

        Args:
            matches: whether the final answer is the gold one; None: there is none to compare with.
        """
        with self._lock:
            self.done += rows
            self.tokens += tokens
            if shard in self._shards:
                tally = self._shards[shard]
                tally.done, tally.tokens = tally.done + rows, tally.tokens + tokens
                tally.compared, tally.matching = tally.compared + (matches is not None), tally.matching + bool(matches)
            now = time.monotonic()
            if now - self._announced < 1.0 and self.done < self.total:
                return
            self._announced = now
            progress = Progress(
                step=self.step,
                iteration=current_iteration(),
                done=self.done,
                total=self.total,
                tokens=self.tokens,
                reused=self.reused,
                split=current_split(),
                unit=self.unit,
                shards=tuple(tally.progress(number) for number, tally in self._shards.items()),
            )
        announce(progress)


@dataclass(slots=True)
class Tally:
    """How far one shard is."""

    done: int
    total: int
    tokens: int = 0
    compared: int = 0
    matching: int = 0

    def progress(self, number: int) -> ShardProgress:
        """As it is announced."""
        return ShardProgress(
            number=number,
            done=self.done,
            total=self.total,
            tokens=self.tokens,
            compared=self.compared,
            matching=self.matching,
        )


@dataclass(slots=True)
class Shard:
    """Some prompts, and which of their rollouts are still wanted."""

    number: int
    prompts: list[Prompt]
    wanted: dict[str, int]  # prompt_id -> mask of rollout indexes not in the ledger
    rows: int  # that it sees to, in the ledger or not
    attempts: int = field(default=0)


def draw(job: Job, shard: Shard) -> Iterator[Rollout]:
    """Draw what a shard misses; each rollout is on its way to the ledger when it is yielded, and all are in the end."""
    prompts = {row.prompt_id: row for row in shard.prompts}
    requests = [
        request_for(job, prompts[prompt_id], index)
        for prompt_id, mask in shard.wanted.items()
        for index in range(mask.bit_length())
        if mask >> index & 1
    ]
    if not requests:
        return
    seeds = {request.key: request.seed for request in requests}
    engine = serve(job.policy, job.engine)
    try:
        for completion in engine.sample(requests, job.sampling):
            rollout = _rollout(completion, prompts, seeds[completion.key], job.policy)
            job.writer.add(rollout)
            matches = _matches(rollout, prompts[rollout.prompt_id])
            job.meter.add(tokens=completion.completion_tokens, shard=shard.number, matches=matches)
            yield rollout
            raise_if_stopping()
    finally:
        job.writer.flush()
    job.ledger.push_unpushed()


def missing(job: Job, wanted: dict[str, int]) -> dict[str, int]:
    """Of the rollouts wanted, those that are not in the ledger; prompts that miss none are left out."""
    present = job.ledger.present(wanted)
    left = {prompt_id: mask & ~present.get(prompt_id, 0) for prompt_id, mask in wanted.items()}
    return {prompt_id: mask for prompt_id, mask in left.items() if mask}


def request_for(job: Job, prompt: Prompt, index: int) -> Request:
    """What the engine is asked for one rollout."""
    return Request(
        key=f"{index}/{prompt.prompt_id}",
        messages=messages_of(job.template, prompt.prompt),
        seed=rollout_seed(job.sampling.seed, prompt.prompt_id, index),
    )


def not_drawn(job: Job, prompt: Prompt, index: int) -> Rollout:
    """The row of a rollout that the engine fails to draw."""
    return Rollout(
        prompt_id=prompt.prompt_id,
        rollout_index=index,
        prompt=prompt.prompt,
        completion="",
        prompt_tokens=0,
        completion_tokens=0,
        finish_reason="error",
        cumulative_logprob=None,
        seed=rollout_seed(job.sampling.seed, prompt.prompt_id, index),
        policy=job.policy.identity,
    )


def all_wanted(sampling: Sampling) -> int:
    """The mask of all rollouts that are wanted of a prompt."""
    return (1 << sampling.rollouts_per_prompt) - 1


def rollout_seed(run_seed: int, prompt_id: str, rollout_index: int) -> int:
    """The seed of one rollout, below 2**53 so that JSON carries it exactly."""
    digest = hashlib.sha256(f"{run_seed}:{prompt_id}:{rollout_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11


def _matches(rollout: Rollout, prompt: Prompt) -> bool | None:
    """Whether the final answer is the gold one, to be shown while rollouts are drawn; None: there is nothing to go by.

    What is undecided is no match, as selecting by answers would have it.
    """
    run = current_run()
    if prompt.answer is None or run is None or not run.marker:
        return None
    return is_correct(verdict_on(rollout.completion, rollout.finish_reason, prompt.answer, run.marker).reward)


def _rollout(completion: Completion, prompts: dict[str, Prompt], seed: int, policy: ModelRef) -> Rollout:
    index, prompt_id = completion.key.split("/", 1)
    return Rollout(
        prompt_id=prompt_id,
        rollout_index=int(index),
        prompt=prompts[prompt_id].prompt,
        completion=completion.text,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        finish_reason=completion.finish_reason,
        cumulative_logprob=completion.cumulative_logprob,
        seed=seed,
        policy=policy.identity,
    )
