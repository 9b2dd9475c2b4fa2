"""Policy and prompts -> rollouts. One Prefect task run a shard; finished rows are safe in the ledger at once.

The ledger, not the shard, is what survives: after a kill, with other shards, with more prompts or more rollouts per
prompt, only the rows that are not there yet are drawn (DESIGN 3).
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from models.chat import messages_of
from models.engine import Completion, EngineError, Request
from models.specs import EngineSettings, ModelRef, PromptTemplate, Sampling
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.ledger import Ledger, LedgerWriter
from storage.rows import Prompt, Rollout
from tasks.caching import Outcome, log_counts, start_task, step
from tasks.planning import current_plan
from tasks.recording import Progress, announce, current_iteration, record_step
from tasks.serving import raise_if_stopping, serve, stopping

SHARDS_AT_ONCE = 8  # threads that feed one engine; its own batch is what limits the work in flight
T = TypeVar("T")


class ShardsFailed(RuntimeError):
    """Some shards failed and the others are done; running again does only those."""


def shard_threads() -> TaskRunner[PrefectFuture[Any]]:
    """The task runner of a flow that samples: a thread a shard, so many at once."""
    runner: Any = ThreadPoolTaskRunner(max_workers=SHARDS_AT_ONCE)  # its futures are of a narrower class
    return runner  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all shards of one sampling have in common."""

    policy: ModelRef
    template: PromptTemplate
    sampling: Sampling
    engine: EngineSettings
    ledger: Ledger
    meter: "Meter"


def sample_rollouts(
    policy: ModelRef, prompts: DatasetRef, template: PromptTemplate, sampling: Sampling, engine: EngineSettings
) -> DatasetRef:
    """Rollout rows: `rollouts_per_prompt` of each prompt, in the prompts' order.

    Raises:
        ShardsFailed: names the shards, their first errors and what to do; the rows of all others are kept.
    """
    done = gather_rollouts.lookup(policy, prompts, template, sampling, engine).found is not None
    if not done and current_plan() is None:
        _run_shards(policy, prompts, template, sampling, engine)
    return gather_rollouts(policy, prompts, template, sampling, engine)


def _as_many_as_wanted(
    policy: ModelRef, prompts: DatasetRef, template: PromptTemplate, sampling: Sampling, engine: EngineSettings
) -> int:
    return prompts.rows * sampling.rollouts_per_prompt


@step(version="1", rows=_as_many_as_wanted)
def gather_rollouts(
    policy: ModelRef, prompts: DatasetRef, template: PromptTemplate, sampling: Sampling, engine: EngineSettings
) -> DatasetRef:
    """Commit the wanted rows of the ledger as one data set."""
    ledger = Ledger(ledger_key(policy, template, sampling, engine))
    wanted = {row.prompt_id: _all(sampling) for row in read_rows(prompts, Prompt)}
    rollouts = write_rows(
        ledger.read(wanted), Rollout, step="rollouts", parents=[prompts], settings={"sampling": sampling.key()}
    )
    expected = len(wanted) * sampling.rollouts_per_prompt
    if rollouts.rows != expected:
        raise RuntimeError(f"ledger {ledger.folder.name} gave {rollouts.rows} of {expected} rows that were just there")
    log_counts({"sampled": rollouts.rows})
    return rollouts


def ledger_key(
    policy: ModelRef, template: PromptTemplate, sampling: Sampling, engine: EngineSettings
) -> dict[str, object]:
    """What decides a rollout, given prompt and index: neither the shard nor the set of prompts."""
    return {
        "policy": policy.key(),
        "template": template.key(),
        "decoding": sampling.decoding(),
        "engine": engine.key(),
    }


def rollout_seed(run_seed: int, prompt_id: str, rollout_index: int) -> int:
    """The seed of one rollout, below 2**53 so that JSON carries it exactly."""
    digest = hashlib.sha256(f"{run_seed}:{prompt_id}:{rollout_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11


class Meter:
    """Rows and tokens finished over all shards, announced about once a second."""

    def __init__(self, total: int, reused: int) -> None:
        self.total, self.reused = total, reused
        self.done, self.tokens = reused, 0
        self._lock = threading.Lock()
        self._announced = 0.0

    def add(self, completion: Completion) -> None:
        """Count one rollout."""
        with self._lock:
            self.done += 1
            self.tokens += completion.completion_tokens
            now = time.monotonic()
            if now - self._announced < 1.0 and self.done < self.total:
                return
            self._announced = now
            progress = Progress(
                step="sample_rollouts",
                iteration=current_iteration(),
                done=self.done,
                total=self.total,
                tokens=self.tokens,
                reused=self.reused,
            )
        announce(progress)


@dataclass(slots=True)
class Shard:
    """Some prompts, and which of their rollouts are still wanted."""

    number: int
    prompts: list[Prompt]
    wanted: dict[str, int]  # prompt_id -> mask of rollout indexes not in the ledger
    attempts: int = field(default=0)


def _run_shards(
    policy: ModelRef, prompts: DatasetRef, template: PromptTemplate, sampling: Sampling, engine: EngineSettings
) -> None:
    ledger = Ledger(ledger_key(policy, template, sampling, engine))
    rows = list(read_rows(prompts, Prompt))
    present = ledger.present({row.prompt_id for row in rows})
    shards = [
        Shard(number, part, {row.prompt_id: _all(sampling) & ~present.get(row.prompt_id, 0) for row in part})
        for number, part in enumerate(_parts(rows, sampling.prompts_per_shard))
    ]
    total = len(rows) * sampling.rollouts_per_prompt
    missing = sum(mask.bit_count() for shard in shards for mask in shard.wanted.values())
    job = Job(
        policy=policy,
        template=template,
        sampling=sampling,
        engine=engine,
        ledger=ledger,
        meter=Meter(total, total - missing),
    )
    errors: dict[int, Exception] = {}
    started = time.monotonic()
    with ThreadPoolExecutor(max_workers=SHARDS_AT_ONCE) as pool:
        futures = [
            start_task(
                _shard_body(job, shard),
                name="sample_rollouts",
                shard=shard.number,
                reads=[prompts, policy],
                retry_on=EngineError,
                pool=pool,
            )
            for shard in shards
        ]
        for shard, future in zip(shards, futures, strict=True):
            try:
                future.result()
            except Exception as error:  # whatever one shard met, the others finish first; all are named below
                errors[shard.number] = error
    if errors:
        raise ShardsFailed(_explain(errors, len(shards)))
    counts = {"drawn": missing, "reused": total - missing, "tokens": job.meter.tokens}
    record_step("sample_rollouts", rows=total, seconds=time.monotonic() - started, counts=counts, cached=not missing)


def _shard_body(job: Job, shard: Shard) -> Callable[[], Outcome]:
    def body() -> Outcome:
        started = time.monotonic()
        shard.attempts += 1
        if shard.attempts > 1:  # what the last attempt finished is in the ledger
            present = job.ledger.present(set(shard.wanted))
            shard.wanted = {key: mask & ~present.get(key, 0) for key, mask in shard.wanted.items()}
        drawn = 0
        try:
            for _ in _draw(job, shard):
                drawn += 1
        except Exception as error:
            if not stopping.is_set():  # else it is no fault of the shard
                seconds = time.monotonic() - started
                record_step(
                    "sample_rollouts", shard=shard.number, failed=True, rows=drawn, seconds=seconds, detail=str(error)
                )
            raise
        record_step(
            "sample_rollouts",
            shard=shard.number,
            cached=not drawn,
            rows=len(shard.prompts) * job.sampling.rollouts_per_prompt,
            seconds=time.monotonic() - started,
            counts={"drawn": drawn},
        )
        return Outcome(drawn, not drawn, f"all rows of {len(shard.prompts)} prompts were in the ledger")

    return body


def _draw(job: Job, shard: Shard) -> Iterator[Rollout]:
    prompts = {row.prompt_id: row for row in shard.prompts}
    requests = [
        Request(
            key=f"{index}/{prompt_id}",
            messages=messages_of(job.template, prompts[prompt_id].prompt),
            seed=rollout_seed(job.sampling.seed, prompt_id, index),
        )
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
            job.meter.add(completion)
            yield rollout
            raise_if_stopping()


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


def _all(sampling: Sampling) -> int:
    return (1 << sampling.rollouts_per_prompt) - 1


def _parts(rows: Sequence[T], size: int) -> Iterator[list[T]]:
    remaining = iter(rows)
    while part := list(islice(remaining, size)):
        yield part


def _explain(errors: dict[int, Exception], shards: int) -> str:
    first = "\n".join(
        f"  shard {number}: {type(error).__name__}: {error}" for number, error in list(errors.items())[:3]
    )
    return (
        f"{len(errors)} of {shards} shards failed: {sorted(errors)}; the rows of the others are kept. First errors:\n"
        f"{first}\nRun the same command again, or retry this flow run, and only what is missing is drawn."
    )
