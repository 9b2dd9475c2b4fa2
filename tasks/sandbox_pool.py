"""The sandbox's child programs, kept warm: started at the strongest level that holds, and replaced when lost."""

import logging
import os
import tempfile
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from tasks.sandbox_selftest import ATTACKS, CANARY, CANARY_OUTCOMES, CANARY_RESPONSES
from tasks.sandbox_worker import Answer, Request, Run, Worker, WorkerLost

ALL_LAYERS = ("namespaces", "landlock", "seccomp")
ATTEMPTS: tuple[tuple[str, ...], ...] = (ALL_LAYERS, ("landlock", "seccomp"), ("seccomp",))
UNSANDBOXED = "none"
BYTES_PER_WORKER = 256 * 2**20  # of requests; then it is replaced, so that what its memory gained is given back
TEST_LIMITS = {"cpu_seconds": 0.3, "wall_seconds": 2.0, "verifier_seconds": 5.0, "memory_mb": 256, "detail_length": 160}

log = logging.getLogger("ratchet")


class SandboxError(RuntimeError):
    """The sandbox itself cannot be had, or broke. No verifier is to blame."""


class Setup(NamedTuple):
    """What a child program starts with."""

    preload: tuple[str, ...] = ()
    required: tuple[str, ...] = ("seccomp",)


class Pool:
    """Workers of one level, as many as are in use at a time.

    Args:
        attempts: layers to try together, strongest first; a last empty one means no sandbox at all.
    Raises:
        SandboxError: none of the attempts held the attacks of the self-test.
    """

    def __init__(self, setup: Setup, attempts: Sequence[tuple[str, ...]] = ATTEMPTS) -> None:
        self._setup = setup
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        self.replaced = 0  # workers lost or found spoilt
        self.layers, first = self._strongest(attempts)
        self._idle.append(first)

    @property
    def level(self) -> str:
        """What stands between a verifier and this machine, as stored in rows."""
        return "+".join(self.layers) or UNSANDBOXED

    def run(self, requests: Sequence[Request], limits: dict[str, Any], run: Run | None = None) -> list[list[Answer]]:
        """Answers to each request. What was under way when a worker was lost is done again, one by one.

        Raises:
            SandboxError: workers are lost, or the canary fails, whatever they run; or `run` was stopped.
        """
        run = run or Run()
        try:
            return self._attempt(requests, limits, run)
        except WorkerLost as error:
            if run.stopped:
                raise SandboxError(
                    "the run was stopped while verifiers were under way; they have no verdicts"
                ) from error
            log.warning("sandbox: a worker was replaced while it ran %d verifiers: %s", len(requests), error)
        alone = {**limits, "share": 1}
        return [self._alone(request, alone, run) for request in requests]

    def close(self) -> None:
        """End all workers, the busy ones too."""
        with self._lock:
            self._closed = True
            workers = [*self._idle, *self._busy]
            self._idle.clear()
        for worker in workers:
            worker.close()

    def _alone(self, request: Request, limits: dict[str, Any], run: Run) -> list[Answer]:
        try:
            return self._attempt([request], limits, run)[0]
        except WorkerLost as error:
            reason = str(error)
        try:
            self._attempt([], limits, run)
        except WorkerLost as error:
            raise SandboxError(
                f"the sandbox ({self.level}) lost a worker that ran only the verifier with known verdicts: {error}"
                "; look for a shortage of memory or processes on this machine, then run again"
            ) from error
        return [("error", f"the sandbox was lost twice on this verifier: {reason}"[: limits["detail_length"]])] * len(
            request[1]
        )

    def _attempt(self, requests: Sequence[Request], limits: dict[str, Any], run: Run) -> list[list[Answer]]:
        worker = self._take()
        try:
            with run.using(worker):
                answers = worker.ask([*requests, (CANARY, CANARY_RESPONSES)], limits)
            if tuple(outcome for outcome, _ in answers[-1]) != CANARY_OUTCOMES:
                raise WorkerLost(f"the verifier with a known verdict gave {answers[-1]}")
        except BaseException:
            self._discard(worker)
            raise
        self._give_back(worker)
        return answers[:-1]

    def _take(self) -> Worker:
        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox was closed while verifiers were still to be run")
            worker = self._idle.pop() if self._idle else None
        if worker is None:
            worker = Worker(self.layers, self._setup.preload)
            if worker.layers != self.layers:
                worker.close()
                raise WorkerLost(f"it came up with {worker.layers}, not {self.layers}: {worker.missing}")
        with self._lock:
            self._busy.add(worker)
        return worker

    def _give_back(self, worker: Worker) -> None:
        with self._lock:
            self._busy.discard(worker)
            kept = worker.bytes < BYTES_PER_WORKER and len(self._idle) < cores() and not self._closed
            if kept:
                self._idle.append(worker)
        if not kept:
            worker.close()

    def _discard(self, worker: Worker) -> None:
        with self._lock:
            self._busy.discard(worker)
            self.replaced += 1
        worker.close()

    def _strongest(self, attempts: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], Worker]:
        faults: list[str] = []
        for wanted in attempts:
            told = "+".join(wanted) or UNSANDBOXED
            try:
                worker = Worker(wanted, self._setup.preload)
            except WorkerLost as error:
                faults.append(f"{told}: the child program did not start: {error}")
                continue
            fault = self._lacking(worker) or (_self_test(worker) if wanted else None)
            if fault is None or not wanted:
                _tell_level(worker, faults)
                return worker.layers, worker
            worker.close()
            faults.append(f"{told}: {fault}")
        reasons = "\n".join(f"  {fault}" for fault in faults)
        raise SandboxError(
            f"no sandbox for generated code on this machine; tried\n{reasons}\n"
            "Run on Linux (x86_64) where seccomp is allowed (in a container, Docker's default profile will do) "
            "or, if you trust whoever writes the verifiers with all that this user may do, pass --allow-unsandboxed."
        )

    def _lacking(self, worker: Worker) -> str | None:
        lacking = [layer for layer in self._setup.required if layer not in worker.layers]
        if not lacking:
            return None
        told = "; ".join(f"{layer}: {reason}" for layer, reason in worker.missing.items()) or "not asked for"
        return f"{', '.join(lacking)} required, but missing ({told})"


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _self_test(worker: Worker) -> str | None:
    """What the worker failed to hold, or None."""
    with tempfile.NamedTemporaryFile(prefix="ratchet-sandbox-", suffix=".txt") as secret:
        requests = [(attack.source, (secret.name,)) for attack in ATTACKS]
        try:
            answers = worker.ask([*requests, (CANARY, CANARY_RESPONSES)], {**TEST_LIMITS, "share": 1})
        except WorkerLost as error:
            return f"lost in its self-test: {error}"
    for attack, [(outcome, detail)] in zip(ATTACKS, answers[:-1], strict=True):
        if outcome not in attack.held:
            return f"did not hold {attack.name}: {outcome} {detail}"
    if tuple(outcome for outcome, _ in answers[-1]) != CANARY_OUTCOMES:
        return f"an honest verifier came out wrong: {answers[-1]}"
    return None


def _tell_level(worker: Worker, faults: Sequence[str]) -> None:
    if not worker.layers:
        log.warning(
            "GENERATED CODE RUNS UNSANDBOXED, as allowed by name: it can do all that this user can. Tried:\n%s",
            "\n".join(faults),
        )
    elif lacking := [layer for layer in ALL_LAYERS if layer not in worker.layers]:
        told = "; ".join([*faults, *(f"{layer}: {reason}" for layer, reason in worker.missing.items())])
        log.warning("sandbox: %s; without %s (%s)", "+".join(worker.layers), ", ".join(lacking), told)
