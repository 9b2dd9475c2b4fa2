"""Policy and prompts -> rollouts. One Prefect task run a shard; finished rows are safe in the ledger at once.

The ledger, not the shard, is what survives: after a kill, with other shards, with more prompts or more rollouts per
prompt, only the rows that are not there yet are drawn (DESIGN 3).
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from models.engine import EngineError
from models.specs import EngineSettings, ModelRef, PromptTemplate, Sampling
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.ledger import DamagedPart, Ledger
from storage.rows import Prompt, Rollout
from tasks.caching import Outcome, log_counts, start_task, step
from tasks.drawing import Job, Meter, Shard, ShardsFailed, all_wanted, draw, missing, tell_failed
from tasks.isolating import check_error_rate, draw_apart
from tasks.planning import current_plan
from tasks.recording import record_step
from tasks.serving import stopping

SHARDS_AT_ONCE = 8  # threads that feed one engine; its own batch is what limits the work in flight
T = TypeVar("T")

log = logging.getLogger("ratchet")


def shard_threads() -> TaskRunner[PrefectFuture[Any]]:
    """The task runner of a flow that samples: a thread a shard, so many at once."""
    runner: Any = ThreadPoolTaskRunner(max_workers=SHARDS_AT_ONCE)  # its futures are of a narrower class
    return runner  # type: ignore[no-any-return]


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
    wanted = {row.prompt_id: all_wanted(sampling) for row in read_rows(prompts, Prompt)}
    expected = len(wanted) * sampling.rollouts_per_prompt
    errors: Counter[str] = Counter()

    def checked() -> Iterator[Rollout]:
        for row in ledger.read(wanted):
            errors[row.prompt_id] += row.finish_reason == "error"
            yield row
        check_error_rate(errors.total(), len(wanted), sampling, [f"prompt {name}" for name in +errors], ledger)

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


def _run_shards(
    policy: ModelRef, prompts: DatasetRef, template: PromptTemplate, sampling: Sampling, engine: EngineSettings
) -> None:
    ledger = Ledger(ledger_key(policy, template, sampling, engine))
    rows = list(read_rows(prompts, Prompt))
    present = ledger.present({row.prompt_id for row in rows})
    shards = [
        Shard(number, part, {row.prompt_id: all_wanted(sampling) & ~present.get(row.prompt_id, 0) for row in part})
        for number, part in enumerate(_parts(rows, sampling.prompts_per_shard))
    ]
    total = len(rows) * sampling.rollouts_per_prompt
    wanted = sum(mask.bit_count() for shard in shards for mask in shard.wanted.values())
    job = Job(
        policy=policy,
        template=template,
        sampling=sampling,
        engine=engine,
        ledger=ledger,
        meter=Meter(total, total - wanted, shards={shard.number: _done_of(shard, sampling) for shard in shards}),
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
            set_aside = draw_apart(job, failed, {row.prompt_id: row for row in rows})
        except EngineError:
            raise ShardsFailed(_explain(errors, len(shards))) from None
        except ShardsFailed as gate:
            raise ShardsFailed(f"{_explain(errors, len(shards))}\n{gate}") from None
    elif errors:
        raise ShardsFailed(_explain(errors, len(shards)))
    drawn = job.meter.done - job.meter.reused
    counts = {"drawn": drawn, "reused": total - wanted, "tokens": job.meter.tokens}
    if set_aside:
        counts["engine_errors"] = wanted - drawn
    detail = "; ".join(f"prompt {prompt_id} set aside: {error}" for prompt_id, error in set_aside.items())
    seconds = time.monotonic() - started
    record_step("sample_rollouts", rows=total, seconds=seconds, counts=counts, cached=not wanted, detail=detail)


def _done_of(shard: Shard, sampling: Sampling) -> tuple[int, int]:
    """Rows of a shard that are in the ledger, and all of them."""
    total = len(shard.prompts) * sampling.rollouts_per_prompt
    return total - sum(mask.bit_count() for mask in shard.wanted.values()), total


def _shard_body(job: Job, shard: Shard) -> Callable[[], Outcome]:
    def body() -> Outcome:
        started = time.monotonic()
        shard.attempts += 1
        if shard.attempts > 1:  # what the last attempt finished is in the ledger
            shard.wanted = missing(job, shard.wanted)
        drawn = 0
        try:
            for _ in draw(job, shard):
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


def _parts(rows: Sequence[T], size: int) -> Iterator[list[T]]:
    remaining = iter(rows)
    while part := list(islice(remaining, size)):
        yield part


def _explain(errors: dict[int, Exception], shards: int) -> str:
    return tell_failed(errors, shards, kept="the rows of the others are kept", again="only what is missing is drawn")
