"""Policy and prompts -> rollouts. One Prefect task run a shard; finished rows are safe in the ledger at once.

The ledger, not the shard, is what survives: after a kill, with other shards, with more prompts or more rollouts per
prompt, only the rows that are not there yet are drawn (DESIGN 3).
"""

import hashlib
import logging
import threading
import time
from collections import Counter
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
from storage.ledger import SET_ASIDE, DamagedPart, Ledger, LedgerWriter
from storage.rows import Prompt, Rollout
from tasks.caching import Outcome, log_counts, start_task, step
from tasks.isolating import TRIES_ALONE, Attempt, failing_prompts
from tasks.planning import current_plan
from tasks.recording import Progress, announce, current_iteration, record_step
from tasks.serving import raise_if_stopping, serve, stopping

SHARDS_AT_ONCE = 8  # threads that feed one engine; its own batch is what limits the work in flight
T = TypeVar("T")

log = logging.getLogger("ratchet")


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
    if done or current_plan() is not None:
        return gather_rollouts(policy, prompts, template, sampling, engine)
    _run_shards(policy, prompts, template, sampling, engine)
    try:
        return gather_rollouts(policy, prompts, template, sampling, engine)
    except DamagedPart:  # it is out of the way, and its rows are now missing
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
    expected = len(wanted) * sampling.rollouts_per_prompt
    errors: Counter[str] = Counter()

    def checked() -> Iterator[Rollout]:
        for row in ledger.read(wanted):
            errors[row.prompt_id] += row.finish_reason == "error"
            yield row
        _check_error_rate(errors.total(), len(wanted), sampling, [f"prompt {name}" for name in +errors], ledger)

    rollouts = write_rows(checked(), Rollout, step="rollouts", parents=[prompts], settings={"sampling": sampling.key()})
    if rollouts.rows != expected:
        raise RuntimeError(f"ledger {ledger.folder.name} gave {rollouts.rows} of {expected} rows that were just there")
    log_counts({"sampled": rollouts.rows, **({"engine_errors": errors.total()} if errors.total() else {})})
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
    set_aside: dict[str, str] = {}
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
    if errors and all(isinstance(error, EngineError) for error in errors.values()) and not stopping.is_set():
        failed = [shards[number] for number in errors]
        try:
            set_aside = _draw_apart(job, failed, {row.prompt_id: row for row in rows})
        except EngineError:
            raise ShardsFailed(_explain(errors, len(shards))) from None
        except ShardsFailed as gate:
            raise ShardsFailed(f"{_explain(errors, len(shards))}\n{gate}") from None
    elif errors:
        raise ShardsFailed(_explain(errors, len(shards)))
    drawn = job.meter.done - job.meter.reused
    counts = {"drawn": drawn, "reused": total - missing, "tokens": job.meter.tokens}
    if set_aside:
        counts["engine_errors"] = missing - drawn
    detail = "; ".join(f"prompt {prompt_id} set aside: {error}" for prompt_id, error in set_aside.items())
    seconds = time.monotonic() - started
    record_step("sample_rollouts", rows=total, seconds=seconds, counts=counts, cached=not missing, detail=detail)


def _shard_body(job: Job, shard: Shard) -> Callable[[], Outcome]:
    def body() -> Outcome:
        started = time.monotonic()
        shard.attempts += 1
        if shard.attempts > 1:  # what the last attempt finished is in the ledger
            shard.wanted = _missing(job, shard.wanted)
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
        _request(job, prompts[prompt_id], index)
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


def _draw_apart(job: Job, shards: Sequence[Shard], prompts: dict[str, Prompt]) -> dict[str, str]:
    """Draw what failed shards still miss, and set aside the prompts that fail even alone: prompt_id -> last error.

    The rows of those have no completion and the finish_reason "error"; they are not tried again.

    Args:
        prompts: all of this sampling, the other shards' too.
    Raises:
        EngineError: the engine does not work.
        ShardsFailed: more rollouts fail than `maximum_error_rate` allows.
    """

    def draw(prompt_ids: Sequence[str]) -> Attempt:
        wanted = dict.fromkeys(prompt_ids, _all(job.sampling))
        try:
            for _ in _draw(job, Shard(-1, [prompts[name] for name in prompt_ids], _missing(job, wanted))):
                pass
        except EngineError as error:
            raise_if_stopping()
            return Attempt(list(_missing(job, wanted)), error)
        return Attempt([], None)

    rows: list[Rollout] = []
    told: dict[str, str] = {}
    for name, error in failing_prompts(
        [row.prompt_id for shard in shards for row in shard.prompts], draw, lambda: _works(job, prompts)
    ):
        mask = _missing(job, {name: _all(job.sampling)})[name]
        rows += [_not_drawn(job, prompts[name], index) for index in range(mask.bit_length()) if mask >> index & 1]
        told[name] = str(error)
        errors = [f"prompt {prompt_id}: {text}" for prompt_id, text in told.items()]
        _check_error_rate(len(rows), len(prompts), job.sampling, errors, job.ledger)
    for prompt_id, text in told.items():
        log.warning("prompt %s is set aside, for it failed %d times alone: %s", prompt_id, TRIES_ALONE, text)
    job.ledger.append(rows, ending=SET_ASIDE)
    return told


def _missing(job: Job, wanted: dict[str, int]) -> dict[str, int]:
    """Of the rollouts wanted, those that are not in the ledger; prompts that miss none are left out."""
    present = job.ledger.present(wanted)
    left = {prompt_id: mask & ~present.get(prompt_id, 0) for prompt_id, mask in wanted.items()}
    return {prompt_id: mask for prompt_id, mask in left.items() if mask}


def _works(job: Job, prompts: dict[str, Prompt]) -> bool:
    """Whether the engine can draw again a rollout that it drew before; it is not kept."""
    present = job.ledger.present(prompts)
    rows = job.ledger.read({prompt_id: mask & -mask for prompt_id, mask in present.items()})  # the first of each
    known = next((row for row in rows if row.finish_reason != "error"), None)
    if known is None:
        return False
    request = _request(job, prompts[known.prompt_id], known.rollout_index)
    try:
        return len(list(serve(job.policy, job.engine).sample([request], job.sampling))) == 1
    except EngineError:
        return False


def _check_error_rate(count: int, prompts: int, sampling: Sampling, errors: Sequence[str], ledger: Ledger) -> None:
    total = prompts * sampling.rollouts_per_prompt
    if count > sampling.maximum_error_rate * total:
        first = "\n".join(f"  {error}" for error in errors[:3])
        raise ShardsFailed(
            f"the engine failed at {count} of {total} rollouts, and maximum_error_rate is "
            f"{sampling.maximum_error_rate:g}. The first of {len(errors)} prompts:\n{first}\nSee to the engine, leave "
            "these prompts out, or raise maximum_error_rate, and run the same command again. Rollouts given up "
            f"earlier are tried again when ledger/{ledger.folder.name}/part-*{SET_ASIDE} is removed."
        )


def _not_drawn(job: Job, prompt: Prompt, index: int) -> Rollout:
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


def _request(job: Job, prompt: Prompt, index: int) -> Request:
    return Request(
        key=f"{index}/{prompt.prompt_id}",
        messages=messages_of(job.template, prompt.prompt),
        seed=rollout_seed(job.sampling.seed, prompt.prompt_id, index),
    )


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
