"""Shards of CPU-heavy steps on a Dask cluster, through Prefect's task runner for Dask; each is stored when it is done.

    RATCHET_DASK=tcp://scheduler:8786    the cluster; its workers have this package, and RATCHET_HOME names the home
    RATCHET_SHARD_ROWS=2000              rows a shard, where a step's own choice does not fit the cluster

Neither enters a key: rows, digests and what is reused are those of a run without a cluster, which does all in this
process and imports no Dask. Sampling stays in this process, where the engine is. Workers run verifiers in a sandbox or
not at all, --allow-unsandboxed or not. Prefect does not show shards where its server is on loopback (a private one is)
and the cluster is not.
"""

import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.states import Completed

from storage.datasets import DatasetError, DatasetRef, what_is_wrong
from storage.home import home_name
from tasks.caching import Step, current_step, log_counts, task_run_name
from tasks.drawing import Meter, ShardsFailed, tell_failed
from tasks.recording import record_step
from tasks.serving import raise_if_stopping

R = TypeVar("R")
Futures = dict[int, Any]  # shard -> distributed.Future, or Prefect's around one; that library has no types

CLUSTER, SHARD_ROWS = "RATCHET_DASK", "RATCHET_SHARD_ROWS"
PATIENCE_SECONDS = 120.0  # with a cluster that has no worker
POLL_SECONDS = 0.1

log = logging.getLogger("ratchet")


class ClusterError(RuntimeError):
    """The Dask cluster cannot be used; nothing that was done is lost."""


def cluster_faults() -> Iterator[str]:
    """What is wrong with the variables that name a cluster, in words."""
    address, rows = os.environ.get(CLUSTER), os.environ.get(SHARD_ROWS, "1")
    if address is not None and not (urlsplit(address).scheme in ("tcp", "tls") and ":" in urlsplit(address).netloc):
        yield f"{CLUSTER} is {address!r}; give a scheduler's address, for instance tcp://10.0.0.7:8786, or unset it"
    if address is not None:
        try:
            import prefect_dask  # noqa: F401
        except ImportError as error:
            yield f"{CLUSTER} is set, but {error}; install prefect-dask (pip install 'ratchet-lm[dask]') or unset it"
    if not rows.isdecimal() or int(rows) < 1:
        yield f"{SHARD_ROWS} is {rows!r}; give a number of rows from 1 on, or unset it"


def cuts(rows: int, rows_per_shard: int) -> list[range]:
    """Numbers of the rows of each shard; one shard of all rows where no cluster is named."""
    if CLUSTER not in os.environ:
        return [range(rows)]
    size = int(os.environ.get(SHARD_ROWS, rows_per_shard))
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def workers_reach(api: str) -> bool:
    """Whether the cluster's workers can tell a Prefect server of their shards; one on loopback is for this machine."""
    return _is_loopback(os.environ[CLUSTER]) or not _is_loopback(api)


def spread(step: Step[Any, R], arguments: tuple[Any, ...], shards: Sequence[range]) -> list[R]:
    """What the step makes of each shard, called with the arguments and where the shard starts and stops.

    Its counts are added to those of the step that is running, whose name the shards bear.

    Raises:
        ShardsFailed: names the shards, their first errors and what to do; the others are stored.
        ClusterError: there is no such cluster, or it has no workers.
    """
    calls = [(*arguments, part.start, part.stop) for part in shards]
    meter = Meter(sum(map(len, shards)), 0, current_step())
    made: dict[int, R] = {}
    errors: dict[int, BaseException] = {}
    shown = _shown_in_prefect()
    with _cluster() as runner:
        futures: Futures = {
            number: _start(runner, step, call, number, shown=shown) for number, call in enumerate(calls)
        }
        for number, future in _as_they_end(runner.client, futures):
            try:
                made[number] = _record(step, calls[number], number, cached=future.result())
                meter.add(rows=len(shards[number]))
            except Exception as error:  # whatever one shard met, the others finish first; all are named below
                errors[number] = error
                record_step(current_step(), shard=number, failed=True, detail=f"{type(error).__name__}: {error}")
    if errors:
        raise ShardsFailed(tell_failed(errors, len(shards), kept="the others are stored", again="only these are done"))
    return [made[number] for number in range(len(shards))]


def _shown_in_prefect() -> bool:
    if FlowRunContext.get() is None:
        return False
    if workers_reach(os.environ.get("PREFECT_API_URL", "")):
        return True
    log.warning(
        "Prefect does not show the shards of %s: its server is on loopback, where Dask workers elsewhere cannot reach "
        "it; set PREFECT_API_URL to one that they can reach to see them",
        current_step(),
    )
    return False


@contextmanager
def _cluster() -> Iterator[Any]:
    from prefect_dask import DaskTaskRunner

    address = os.environ[CLUSTER]
    with DaskTaskRunner(address=address) as runner:
        try:
            runner.client.scheduler_info()
        except OSError as error:
            raise ClusterError(
                f"no Dask scheduler answers at {address} ({error}); start one there (dask scheduler), or correct or "
                f"unset {CLUSTER}, and run the same command again"
            ) from error
        yield runner


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _start(runner: Any, step: Step[Any, Any], call: tuple[Any, ...], number: int, *, shown: bool) -> Any:
    sent = {"step": step, "call": call, "run_home": f"{home_name()} on {platform.node()}"}
    if not shown:
        return runner.client.submit(_on_worker, **sent, pure=False)
    task: Task[Any, Any] = Task(
        fn=_in_task,
        name=current_step(),
        task_run_name=task_run_name(current_step(), number),
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    return runner.submit(task, parameters=sent)


def _as_they_end(client: Any, futures: Futures) -> Iterator[tuple[int, Any]]:
    """Each shard as it ends. What is under way is given up when the run is stopped, or the cluster has no workers."""
    waiting: Futures = {number: getattr(future, "wrapped_future", future) for number, future in futures.items()}
    shards, seen = len(futures), time.monotonic()
    try:
        while waiting:
            ended = [number for number, future in waiting.items() if future.done()]
            for number in ended:
                del waiting[number]
                yield number, futures.pop(number)  # held, it would be done again where its worker dies
            raise_if_stopping()
            if ended:
                continue
            if client.scheduler_info().get("workers"):  # without a scheduler there is no such entry
                seen = time.monotonic()
            elif time.monotonic() - seen > PATIENCE_SECONDS:
                raise ClusterError(
                    f"the Dask cluster at {os.environ[CLUSTER]} has had no worker for {PATIENCE_SECONDS:g} s, with "
                    f"{len(waiting)} of {shards} shards to be done; start some (dask worker) and run the same "
                    "command again: what is done is kept"
                )
            time.sleep(POLL_SECONDS)
    finally:
        if waiting:
            client.cancel(list(waiting.values()))


def _record(step: Step[Any, R], call: tuple[Any, ...], number: int, *, cached: bool) -> R:
    """What a shard made, told of as the store knows it.

    Raises:
        ClusterError: the store does not know it.
    """
    lookup = step.lookup(*call)
    if lookup.found is None:
        raise ClusterError(
            f"a Dask worker has done it, but the home {home_name()} does not have it ({lookup.missing}); start workers "
            "with RATCHET_HOME naming this home and with the same version of ratchet"
        )
    found, value = lookup.found, step.returned(lookup.found)
    log_counts(found.counts)
    record_step(  # without the digest: `ratchet gc` is to remove shards, once the whole is there
        current_step(),
        shard=number,
        cached=cached,
        rows=value.rows if isinstance(value, DatasetRef) else None,
        seconds=0.0 if cached else found.seconds,
        counts=found.counts,
    )
    return value


def _in_task(step: Step[Any, Any], call: tuple[Any, ...], run_home: str) -> Any:
    cached = _on_worker(step, call, run_home)
    return Completed(name="Cached", message="the shard was stored", data=True) if cached else False


def _on_worker(step: Step[Any, Any], call: tuple[Any, ...], run_home: str) -> bool:
    """Do a shard, in a Dask worker; whether it was stored before."""
    for reference in call:
        if isinstance(reference, DatasetRef) and (wrong := what_is_wrong(reference)):
            raise DatasetError(
                f"{wrong}, as the Dask worker {os.getpid()} on {platform.node()} sees its home {home_name()}; "
                f"the run's is {run_home}. Start workers with RATCHET_HOME naming the folder that is the same home"
            )
    return step.reuse_or_run(*call).cached
