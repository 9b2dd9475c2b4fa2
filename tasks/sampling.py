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
from storage.ledger import DamagedPart, Ledger, LedgerWriter
from storage.rows import Prompt, Rollout
from tasks.caching import Outcome, log_counts, start_task, step
from tasks.drawing import Job, Meter, Shard, ShardsFailed, Tally, all_wanted, draw, missing, tell_failed
from tasks.isolating import draw_apart, read_checked
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
    rows = read_checked(ledger, wanted, sampling, errors)
    rollouts = write_rows(rows, Rollout, step="rollouts", parents=[prompts], settings={"sampling": sampling.key()})
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


class Drawing:
    """Rollouts on their way into a ledger, in one go or several; shards are numbered on from one to the next."""

    def __init__(
        self,
        policy: ModelRef,
        prompts: Sequence[Prompt],
        template: PromptTemplate,
        sampling: Sampling,
        engine: EngineSettings,
    ) -> None:
        self._ask = (policy, template, sampling, engine)
        self._prompts = {row.prompt_id: row for row in prompts}
        self.ledger = Ledger(ledger_key(policy, template, sampling, engine))
        self._meter = Meter(0, 0)
        self._shards = 0
        self._missing = 0
        self._seen_to: dict[str, int] = {}  # prompt_id -> mask
        self._set_aside: dict[str, str] = {}
        self._started = time.monotonic()

    def draw(self, wanted: dict[str, int], reads: Sequence[DatasetRef | ModelRef]) -> None:
        """Draw what the ledger misses of these rollouts, a mask of indexes for each prompt.

        Raises:
            ShardsFailed: as `sample_rollouts`.
        """
        policy, template, sampling, engine = self._ask
        present = self.ledger.present(wanted)
        left = {prompt_id: mask & ~present.get(prompt_id, 0) for prompt_id, mask in wanted.items()}
        new = {prompt_id: mask & ~self._seen_to.get(prompt_id, 0) for prompt_id, mask in wanted.items()}
        self._seen_to |= wanted
        shards = [
            Shard(
                number=number,
                prompts=[self._prompts[prompt_id] for prompt_id in part],
                wanted={prompt_id: left[prompt_id] for prompt_id in part},
                rows=sum(new[prompt_id].bit_count() for prompt_id in part),
            )
            for number, part in enumerate(_parts(list(wanted), sampling.prompts_per_shard), start=self._shards)
        ]
        self._shards += len(shards)
        self._missing += sum(mask.bit_count() for mask in left.values())
        reused = {
            shard.number: sum((new[one] & ~mask).bit_count() for one, mask in shard.wanted.items()) for shard in shards
        }
        self._meter.expect({shard.number: Tally(reused[shard.number], shard.rows) for shard in shards})
        with LedgerWriter(self.ledger) as writer:
            job = Job(
                policy=policy,
                template=template,
                sampling=sampling,
                engine=engine,
                ledger=self.ledger,
                writer=writer,
                meter=self._meter,
                wanted=wanted,
            )
            self._set_aside |= self._run(job, shards, reads)

    def record(self) -> None:
        """Announce what was drawn in all."""
        meter = self._meter
        drawn = meter.done - meter.reused
        counts = {"drawn": drawn, "reused": meter.reused, "tokens": meter.tokens}
        if self._set_aside:
            counts["engine_errors"] = self._missing - drawn
        detail = "; ".join(f"prompt {prompt_id} set aside: {error}" for prompt_id, error in self._set_aside.items())
        seconds, cached = time.monotonic() - self._started, not self._missing
        record_step("sample_rollouts", rows=meter.total, seconds=seconds, counts=counts, cached=cached, detail=detail)

    def _run(self, job: Job, shards: Sequence[Shard], reads: Sequence[DatasetRef | ModelRef]) -> dict[str, str]:
        """Run the shards; the prompts that had to be set aside, with their errors."""
        errors: dict[int, Exception] = {}
        with ThreadPoolExecutor(max_workers=SHARDS_AT_ONCE) as pool:
            futures = [
                start_task(
                    _shard_body(job, shard),
                    name="sample_rollouts",
                    shard=shard.number,
                    reads=reads,
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
        if not errors:
            return {}
        told = _explain(errors, len(shards))
        if not all(isinstance(error, EngineError) for error in errors.values()) or stopping.is_set():
            raise ShardsFailed(told)
        failed = [shard for shard in shards if shard.number in errors]
        try:
            return draw_apart(job, failed, self._prompts)
        except EngineError:
            raise ShardsFailed(told) from None
        except ShardsFailed as gate:
            raise ShardsFailed(f"{told}\n{gate}") from None


def _run_shards(
    policy: ModelRef, prompts: DatasetRef, template: PromptTemplate, sampling: Sampling, engine: EngineSettings
) -> None:
    rows = list(read_rows(prompts, Prompt))
    drawing = Drawing(policy, rows, template, sampling, engine)
    drawing.draw({row.prompt_id: all_wanted(sampling) for row in rows}, [prompts, policy])
    drawing.record()


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
            rows=shard.rows,
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
