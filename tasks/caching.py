"""@step: a function of references and settings whose result is stored once and reused for ever.

The store's own record is the truth (DESIGN 4). Prefect runs each step as a task and shows a hit as Cached, but none of
its caching is used: PREFECT.md 1 says which of its policies lie, and when. Without a flow run around it, a step runs
just the same, only unseen.
"""

import functools
import importlib
import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, get_type_hints

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.states import Completed
from prefect.utilities.annotations import quote
from pydantic import BaseModel, TypeAdapter

from models.specs import ModelRef, Settings
from storage import checkpoints, datasets, results
from storage.datasets import DatasetRef
from storage.digests import digest_of
from storage.hub import NotAtHand, Source, source_key
from storage.locks import exclusive
from tasks.planning import PlannedStep, current_plan
from tasks.recording import current_iteration, current_split, record_step
from tasks.serving import raise_if_stopping, stopping

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

log = logging.getLogger("ratchet")
_CALL: ContextVar["Call | None"] = ContextVar("call", default=None)
STEPS: dict[str, "Step[Any, Any]"] = {}

RETRY_DELAYS_SECONDS = (5, 20)


class Outcome(NamedTuple):
    """What a task body made, and whether it was there already."""

    value: Any
    cached: bool
    message: str


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the store knows of one call of a step."""

    key: str
    parts: dict[str, Any]
    found: results.StepResult | None
    missing: str  # why nothing can be reused; empty when something can


class Call(NamedTuple):
    """The step that is running."""

    step: str
    key: str
    counts: dict[str, int]


class Step(Generic[P, R]):
    """A cached step. Called, it runs as a Prefect task where a flow runs; `.fn` is the bare function."""

    def __init__(
        self, fn: Callable[P, R], version: str, rows: Callable[P, int | None] | None, assumed: R | None
    ) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn
        self._rows = rows
        self._assumed = assumed
        self.name = fn.__name__
        self.version = version
        self._signature = inspect.signature(fn)
        self._returns: TypeAdapter[R] = TypeAdapter(get_type_hints(fn)["return"])
        if self.name in STEPS:
            raise ValueError(f"two steps are named {self.name!r}; a step name is part of its key and must be unique")
        STEPS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        plan = current_plan()
        if plan is not None:
            return self._plan(plan, *args, **kwargs)

        def body() -> Outcome:
            return self.reuse_or_run(*args, **kwargs)

        future = start_task(body, name=self.name, reads=references_in([*args, *kwargs.values()]))
        value: R = future.result()
        return value

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return _step_named, (self.fn.__module__, self.name)  # a Dask worker imports it, as this process did

    def lookup(self, *args: P.args, **kwargs: P.kwargs) -> Lookup:
        """Whether this call's result is stored and whole, without running anything."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        inputs = {name: key_part(value) for name, value in bound.arguments.items()}
        parts = {"step": self.name, "version": self.version, "inputs": inputs}
        key = digest_of(parts)
        found = results.find_result(self.name, key)
        if found is None:
            return Lookup(key, parts, None, "not done yet")
        damage = what_is_wrong(self.returned(found), deep=current_plan() is None)
        return Lookup(key, parts, None if damage else found, damage or "")

    def returned(self, found: results.StepResult) -> R:
        """What a stored call of this step returned."""
        return self._returns.validate_python(found.value)

    def _plan(self, plan: list[PlannedStep], *args: P.args, **kwargs: P.kwargs) -> R:
        """Note what this call would do; its value is the stored one, or a placeholder that nothing is stored for."""
        lookup = self.lookup(*args, **kwargs)
        reads = [ref for ref in references_in([*args, *kwargs.values()]) if isinstance(ref, DatasetRef)]
        if lookup.found is not None:
            value = self.returned(lookup.found)
            rows = _shown(value).get("rows")
        else:
            unknown = {step.made.digest for step in plan if isinstance(step.made, DatasetRef) and step.rows is None}
            rows = None if unknown & {ref.digest for ref in reads} else self._rows_at_most(*args, **kwargs)
            value = self._placeholder(lookup.key, rows)
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        planned = PlannedStep(
            step=self.name,
            iteration=current_iteration(),
            cached=lookup.found is not None,
            why=lookup.missing,
            rows=rows,
            reads=", ".join(ref.step for ref in reads),
            split=current_split(),
            arguments=bound.arguments,
            made=value,
        )
        plan.append(planned)
        return value

    def _rows_at_most(self, *args: P.args, **kwargs: P.kwargs) -> int | None:
        try:
            return self._rows(*args, **kwargs) if self._rows else None
        except NotAtHand:
            return None

    def _placeholder(self, key: str, rows: int | None) -> R:
        returned = get_type_hints(self.fn)["return"]
        digest = digest_of({"planned": key})
        if returned is DatasetRef:
            return DatasetRef(step=self.name, digest=digest, row_type="planned", rows=rows or 1)  # type: ignore[return-value]
        if returned is ModelRef:
            return ModelRef(name=self.name, digest=digest)  # type: ignore[return-value]
        assert self._assumed is not None  # a step that returns neither says what a plan is to assume
        return self._assumed

    def reuse_or_run(self, *args: P.args, **kwargs: P.kwargs) -> Outcome:
        """The stored result, or a new one; in the task that is running, and not as one of its own."""
        lookup = self.lookup(*args, **kwargs)
        if lookup.found is None:
            with exclusive(f"step-{self.name}-{lookup.key[:24]}", wait_seconds=None):
                lookup = self.lookup(*args, **kwargs)  # another process may have done it meanwhile
                if lookup.found is None:
                    return self._produce(lookup, *args, **kwargs)
        found = lookup.found
        value = self.returned(found)
        checkpoints.discard_scratch(lookup.key)  # of a run that was killed just after it recorded the result
        record_step(self.name, cached=True, key=lookup.key, seconds=0.0, counts=found.counts, **_shown(value))
        return Outcome(value, True, f"reused {self.name}/{lookup.key[:12]} of {found.finished_at}")

    def _produce(self, lookup: Lookup, *args: P.args, **kwargs: P.kwargs) -> Outcome:
        if lookup.missing not in ("", "not done yet"):
            log.warning("%s runs again: %s", self.name, lookup.missing)
        counts: dict[str, int] = {}
        token = _CALL.set(Call(self.name, lookup.key, counts))
        started = time.monotonic()
        try:
            value = self.fn(*args, **kwargs)
        except BaseException as error:
            if not stopping.is_set():  # else it is no fault of the step
                seconds = time.monotonic() - started
                parts, told = lookup.parts, str(error)
                record_step(self.name, failed=True, key=lookup.key, key_parts=parts, seconds=seconds, detail=told)
            raise
        finally:
            _CALL.reset(token)
        seconds = time.monotonic() - started
        results.save_result(
            results.StepResult(
                step=self.name,
                key=lookup.key,
                version=self.version,
                key_parts=lookup.parts,
                value=self._returns.dump_python(value, mode="json"),
                counts=counts,
                seconds=round(seconds, 3),
            ),
            replace=lookup.missing != "not done yet",
        )
        checkpoints.discard_scratch(lookup.key)  # only now: a kill before this line goes on from what is in there
        again = lookup.missing.removeprefix("not done yet")  # `ratchet why` tells it
        record_step(self.name, key=lookup.key, seconds=seconds, counts=counts, detail=again, **_shown(value))
        return Outcome(value, False, "")


def _step_named(module: str, name: str) -> "Step[Any, Any]":
    importlib.import_module(module)
    return STEPS[name]


def step(
    *, version: str, rows: Callable[..., int | None] | None = None, assumed: Any = None
) -> Callable[[Callable[P, R]], Step[P, R]]:
    """Make a function a cached step.

    Args:
        rows: how many rows it will write at most, from its own arguments, for `ratchet plan`.
        assumed: what the plan assumes that it returns, where that is no reference.

    Key: sha256 of step name, version, settings and the content digests of the inputs. Raise the version when equal
    inputs should now give another result. Returned references are checked on each hit; missing or damaged data is a
    miss that says why.
    """
    return lambda fn: Step(fn, version, rows, assumed)


def log_counts(counts: Mapping[str, int]) -> None:
    """Add counts of rows by reason or stage to the record of the step that is running."""
    call = _CALL.get()
    if call is not None:
        for name, count in counts.items():
            call.counts[name] = call.counts.get(name, 0) + count


def current_step() -> str:
    """Name of the step that is running."""
    return _running().step


def current_key() -> str:
    """Key of the step that is running; names its scratch folder, so that a killed one finds it again."""
    return _running().key


def _running() -> Call:
    call = _CALL.get()
    if call is None:
        raise RuntimeError("no step is running here; call the step itself, not its .fn")
    return call


def start_task(
    body: Callable[[], Outcome],
    *,
    name: str,
    shard: int | None = None,
    reads: "Sequence[DatasetRef | ModelRef]" = (),
    retry_on: type[Exception] | None = None,
    pool: ThreadPoolExecutor | None = None,
) -> "Future[Any]":
    """Run the body as a Prefect task where a flow runs, else in the pool or at once; the future holds its value.

    Args:
        reads: what earlier tasks returned; Prefect draws its arrows from them.
        retry_on: this error is retried with back-off, by Prefect, so that each attempt can be seen.
    """
    if FlowRunContext.get() is not None:
        return _start_in_prefect(body, name=name, shard=shard, reads=reads, retry_on=retry_on)
    if pool is not None:
        return pool.submit(copy_context().run, lambda: (with_retries(body, retry_on) if retry_on else body()).value)
    done: Future[Any] = Future()
    done.set_result(body().value)
    return done


def task_run_name(name: str, shard: int | None) -> str:
    """For instance "it1 sample_rollouts shard 3", or "it1 dev score_answers"."""
    iteration, split = current_iteration(), current_split()
    parts = [f"it{iteration}" if iteration is not None else "", split or "", name]
    return " ".join(filter(None, [*parts, f"shard {shard}" if shard is not None else ""]))


def key_part(value: object) -> object:
    """What a cache key sees of an argument: content digests and plain settings, never a path."""
    if isinstance(value, DatasetRef):
        return {"rows": value.digest}
    if isinstance(value, Settings):
        return value.key()
    if isinstance(value, Source):
        return source_key(value)
    if isinstance(value, tuple | list):
        return [key_part(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a step got {value!r}; it takes references, settings and plain values, so that its key is exact")


def what_is_wrong(value: object, *, deep: bool = True) -> str | None:
    """Why a stored result cannot be reused; None when all the data it refers to is whole.

    Args:
        deep: read all of it, for else a flipped byte would stay a hit; a plan looks at names and sizes only.
    """
    for reference in references_in(value):
        if isinstance(reference, DatasetRef):
            damage = datasets.what_is_wrong(reference, deep=deep)
        else:
            digests = [digest for digest in (reference.digest, reference.adapter) if digest and not reference.path]
            told = (checkpoints.what_is_wrong_with_checkpoint(digest, deep=deep) for digest in digests)
            damage = next(filter(None, told), None)
        if damage:
            return damage
    return None


def references_in(value: object) -> Sequence[DatasetRef | ModelRef]:
    """The data sets and models inside of an argument or a result, at any depth."""
    if isinstance(value, DatasetRef | ModelRef):
        return [value]
    if isinstance(value, BaseModel):
        return [found for name in type(value).model_fields for found in references_in(getattr(value, name))]
    if isinstance(value, tuple | list):
        return [found for item in value for found in references_in(item)]
    return []


def _shown(value: object) -> dict[str, Any]:
    if isinstance(value, DatasetRef):
        return {"rows": value.rows, "digest": value.digest}
    if isinstance(value, ModelRef):
        return {"digest": value.adapter or value.digest}
    return {}


def _start_in_prefect(
    body: Callable[[], Outcome],
    *,
    name: str,
    shard: int | None,
    reads: Sequence[DatasetRef | ModelRef],
    retry_on: type[Exception] | None,
) -> "Future[Any]":
    options: dict[str, Any] = {}
    if retry_on is not None:
        options = {
            "retries": len(RETRY_DELAYS_SECONDS),
            "retry_delay_seconds": list(RETRY_DELAYS_SECONDS),
            "retry_condition_fn": _retry_condition(retry_on),
        }
    task = Task(
        fn=_run_in_task,
        name=name,
        task_run_name=task_run_name(name, shard),
        cache_policy=NO_CACHE,
        persist_result=False,
        **options,
    )
    wrapped: Any = quote(body)  # keeps Prefect from looking for futures inside it; the task gets the body itself
    return task.submit(wrapped, list(reads))  # type: ignore[return-value]  # its future has the same result()


def with_retries(call: Callable[[], T], retry_on: type[Exception]) -> T:
    """What Prefect does for a task, for a single call or where there is no Prefect: the last failure is raised."""
    for delay in RETRY_DELAYS_SECONDS:
        try:
            return call()
        except retry_on as error:
            raise_if_stopping()
            log.warning("trying again in %g s: %s", delay, error)
        stopping.wait(delay)
        raise_if_stopping()
    return call()


def _retry_condition(retry_on: type[Exception]) -> Callable[[Any, Any, Any], bool]:
    def is_transient(task: Any, run: Any, state: Any) -> bool:
        return not stopping.is_set() and isinstance(state.result(raise_on_failure=False), retry_on)

    return is_transient


def _run_in_task(body: Callable[[], Outcome], reads: list[DatasetRef | ModelRef]) -> Any:
    try:
        outcome = body()
    except Exception:
        raise_if_stopping()
        raise
    if outcome.cached:
        return Completed(name="Cached", message=outcome.message, data=outcome.value)
    return outcome.value
