"""Drawing rollouts into the ledger: what one shard does, whatever runs it."""

import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from models.chat import messages_of
from models.engine import Completion, Request
from models.specs import EngineSettings, ModelRef, PromptTemplate, Sampling
from storage.ledger import Ledger, LedgerWriter
from storage.rows import Prompt, Rollout
from tasks.recording import Progress, announce, current_iteration, current_split
from tasks.serving import raise_if_stopping, serve


class ShardsFailed(RuntimeError):
    """Some shards failed and the others are done; running again does only those."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all shards of one sampling have in common."""

    policy: ModelRef
    template: PromptTemplate
    sampling: Sampling
    engine: EngineSettings
    ledger: Ledger
    meter: "Meter"
    wanted: dict[str, int]  # prompt_id -> mask of rollout indexes, in the ledger or not


class Meter:
    """Rows and tokens finished over all shards, announced about once a second."""

    def __init__(self, total: int, reused: int, step: str = "sample_rollouts") -> None:
        self.total, self.reused, self.step = total, reused, step
        self.done, self.tokens = reused, 0
        self._lock = threading.Lock()
        self._announced = 0.0

    def expect(self, total: int, reused: int) -> None:
        """There is more to do than was known at the beginning."""
        with self._lock:
            self.total += total
            self.reused += reused
            self.done += reused

    def add(self, *, rows: int = 1, tokens: int = 0) -> None:
        """Count rows that are finished, and the tokens that were written for them."""
        with self._lock:
            self.done += rows
            self.tokens += tokens
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
            )
        announce(progress)


@dataclass(slots=True)
class Shard:
    """Some prompts, and which of their rollouts are still wanted."""

    number: int
    prompts: list[Prompt]
    wanted: dict[str, int]  # prompt_id -> mask of rollout indexes not in the ledger
    rows: int  # that it sees to, in the ledger or not
    attempts: int = field(default=0)


def draw(job: Job, shard: Shard) -> Iterator[Rollout]:
    """Draw what a shard misses; each rollout is on its way to the ledger when it is yielded."""
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
    with LedgerWriter(job.ledger) as writer:
        for completion in engine.sample(requests, job.sampling):
            rollout = _rollout(completion, prompts, seeds[completion.key], job.policy)
            writer.add(rollout)
            job.meter.add(tokens=completion.completion_tokens)
            yield rollout
            raise_if_stopping()


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
