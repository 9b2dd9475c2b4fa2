"""Forked children of the sandbox's zygote: started at the next call, watched, stopped, and charged for.

Standard library only. Of a child only what it can know about the verifier it is at is believed: verdicts come in order,
and once it entered a verifier that is not plain, about that one alone.
"""

import os
import resource
import select
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

from tasks import sandbox_layers as layers
from tasks.sandbox_calls import (
    CHANNEL,
    DETAIL,
    ENTER,
    ERROR,
    FORBIDDEN,
    INVALID,
    MEMORY,
    NOTE,
    OUTCOMES,
    RECORD,
    TIMEOUT,
    VERDICT,
    Answer,
    Start,
    Task,
    serve,
)

TICK_SECONDS = 0.01  # how often a busy child is looked at
KILLS = 2  # a verifier stopped so often is not called again
FAULT, STARVED = 70, 71  # statuses of a child whose harness failed, or had no memory: its verifier brought it to that


class Walls(NamedTuple):
    """What stands around a child."""

    filter: layers.Filter | None
    first_process: bool  # of a namespace: all others in it are our children's
    host: int  # file descriptor that hangs up when the host is gone
    memory: Callable[[], int | None]  # bytes of address space now; None: unknown


class Stop(NamedTuple):
    """Why a child is killed, and the call it was at then."""

    answer: Answer
    position: tuple[int, int]


class Batch:
    """Verifiers under way: what is known of each call, and where a child is."""

    def __init__(self, walls: Walls, tasks: list[Task], limits: dict[str, Any]) -> None:
        self.walls, self.tasks, self.limits = walls, tasks, limits
        self.answers: list[list[Answer]] = [[] for _ in tasks]
        self.at = 0  # the verifier that is called; its next call is the first without an answer
        self.spent = [0.0] * len(tasks)
        self.kills = [0] * len(tasks)
        self._skip_finished()

    def run(self) -> list[list[Answer]]:
        """All answers, in order."""
        while self.at < len(self.tasks):
            Watch(self).run()
        return self.answers

    def accept(self, answer: Answer) -> None:
        """The answer to the next call."""
        self.answers[self.at].append(answer)
        self._skip_finished()

    def position(self) -> tuple[int, int]:
        """The next call: its verifier, and its number there."""
        return self.at, len(self.answers[self.at])

    def charge(self, answer: Answer, *, give_up: bool = False) -> None:
        """The next call ended its process; after too many, or when told so, its verifier's others count the same."""
        verifier = self.at
        outcome, detail = answer
        self.answers[verifier].append(answer)
        self.kills[verifier] += 1
        if give_up or self.kills[verifier] >= KILLS:
            told = detail if give_up else f"not called: stopped {KILLS} times before ({detail})"
            left = len(self.tasks[verifier].responses) - len(self.answers[verifier])
            self.answers[verifier] += [(outcome, told)] * left
        self._skip_finished()

    def _skip_finished(self) -> None:
        while self.at < len(self.tasks) and len(self.answers[self.at]) == len(self.tasks[self.at].responses):
            self.at += 1


class Watch:
    """One forked child, from its start to its end."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.walls, self.limits = batch, batch.walls, batch.limits
        self.token = os.urandom(16)
        self.entered: int | None = None  # the verifier it said it is at
        self.locked = False  # that verifier is not plain: nothing else is believed any more
        self.note = ""
        self.rest = b""
        self.violated = False

    def run(self) -> None:
        """Let it call what it may, and charge what it was stopped for."""
        batch = self.batch
        before = batch.position()
        memory = self.walls.memory()
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self._be_child(writer, memory)
        os.close(writer)
        os.set_blocking(self.reader, False)
        self.clock = (~self.pid << 3) | 2  # its CPU clock, CPUCLOCK_SCHED
        stop: Stop | None = None
        try:
            stop = self._wait()
        finally:
            status = self._end()
            self._drain()
            os.close(self.reader)
        self._settle(before, stop, status)

    def _be_child(self, writer: int, memory: int | None) -> NoReturn:
        leave, status = os._exit, FAULT
        try:
            os.dup2(writer, CHANNEL)
            os.closerange(CHANNEL + 1, 64)
            self._limit(memory)
            if self.walls.filter is not None:
                layers.die_with_parent()
                self.walls.filter.put_on()
            call = len(self.batch.answers[self.batch.at])
            serve(self.batch.tasks, Start(self.batch.at, call, self.token, self.limits["share"]))
            status = 0
        except MemoryError:
            status = STARVED
        finally:
            leave(status)
        raise AssertionError("a child came back")

    def _limit(self, base: int | None) -> None:
        megabytes = self.limits["memory_mb"]
        seconds = int(self.limits["verifier_seconds"]) * self.limits["share"] + 5  # should this process be gone
        layers.lower_limit(resource.RLIMIT_CPU, seconds)
        if base is not None:
            layers.lower_limit(resource.RLIMIT_AS, base + megabytes * 2**20)
        if self.walls.filter is None:
            layers.lower_limit(resource.RLIMIT_NPROC, 0)
            layers.lower_limit(resource.RLIMIT_NOFILE, 16)

    def _wait(self) -> Stop | None:
        """Why it must be killed, or None when it ended by itself."""
        poll = select.poll()
        poll.register(self.reader, 0)  # wakes up at its death alone
        poll.register(self.walls.host, 0)
        seen, call_wall, call_cpu, last = None, 0.0, 0.0, time.monotonic()
        while True:
            events = dict(poll.poll(TICK_SECONDS * 1000))
            if self.walls.host in events:  # the host is gone
                os.kill(self.pid, signal.SIGKILL)
                os._exit(1)
            if self.reader in events:
                return None
            self._drain()
            if self.violated or self._done():
                return None
            now, cpu = time.monotonic(), self._cpu()
            batch = self.batch
            if batch.position() != seen:
                seen, call_wall, call_cpu = batch.position(), now, cpu
            batch.spent[batch.at] += now - last
            last = now
            if answer := self._overdue(now - call_wall, cpu - call_cpu, batch.spent[batch.at]):
                return Stop(answer, batch.position())

    def _overdue(self, wall: float, cpu: float, spent: float) -> Answer | None:
        if cpu > self.limits["cpu_seconds"]:
            return TIMEOUT, f"used {self.limits['cpu_seconds']:g} s of CPU time"
        if wall > self.limits["wall_seconds"]:
            return TIMEOUT, f"took {self.limits['wall_seconds']:g} s"
        if spent > self.limits["verifier_seconds"]:
            return TIMEOUT, f"all calls of this verifier took {self.limits['verifier_seconds']:g} s"
        return None

    def _cpu(self) -> float:
        try:
            return time.clock_gettime(self.clock)
        except OSError:  # already dead, or no such clock here
            return 0.0

    def _end(self) -> int:
        """Kill it and whatever it started; its wait status."""
        os.kill(self.pid, signal.SIGKILL)  # no harm to one that is dead and not yet waited for
        status = os.waitpid(self.pid, 0)[1]
        if self.walls.first_process:  # all others in this namespace are its
            _quietly(lambda: os.kill(-1, signal.SIGKILL))
        elif self.walls.filter is None:
            _kill_strays()
        while _quietly(lambda: os.waitpid(-1, os.WNOHANG)[0]):
            pass
        return status

    def _drain(self) -> None:
        for _ in range(16):  # whoever floods must not hold us here
            if self.violated:
                return
            try:
                part = os.read(self.reader, 1 << 16)
            except BlockingIOError:
                return
            if not part:
                self.violated = bool(self.rest)
                return
            self.rest += part
            whole = len(self.rest) - len(self.rest) % RECORD.size
            for place in range(0, whole, RECORD.size):
                if not self._take(*RECORD.unpack_from(self.rest, place)):
                    self.violated = True
                    return
            self.rest = self.rest[whole:]

    def _done(self) -> bool:
        """Whether nothing that this child still does counts."""
        batch = self.batch
        return batch.at >= len(batch.tasks) or (self.locked and self.entered != batch.at)

    def _take(self, token: bytes, kind: bytes, verifier: int, call: int, outcome: int, size: int, text: bytes) -> bool:
        """Believe one record, or say False where it is none that this child may send."""
        batch = self.batch
        if token != self.token or size > DETAIL or batch.at >= len(batch.tasks) or verifier != batch.at:
            return kind == NOTE and token == self.token  # a deed after the last verdict
        if kind == ENTER and not self.locked and self.entered != verifier:
            self.entered, self.locked, self.note = verifier, call != 0, ""
            return True
        if self.entered != verifier:
            return False
        told = text[:size].decode("ascii", "replace")[: self.limits["detail_length"]]
        detail = "".join(letter if letter.isprintable() else " " for letter in told)
        if kind == NOTE:
            self.note = "".join(letter for letter in detail if letter.isalnum() or letter in "._")
            return True
        if kind == VERDICT and call == len(batch.answers[verifier]) and outcome < len(OUTCOMES):
            batch.accept((outcome, detail))
            return True
        return False

    def _settle(self, before: tuple[int, int], stop: Stop | None, status: int) -> None:
        batch = self.batch
        if self._done():
            return
        if self.violated:
            batch.charge((INVALID, "wrote to the result channel"), give_up=True)
        elif stop is not None:
            if stop.position == batch.position():  # else its answer came at the last moment
                batch.charge(stop.answer, give_up=batch.spent[batch.at] > self.limits["verifier_seconds"])
        elif os.WIFSIGNALED(status):
            batch.charge(self._death(os.WTERMSIG(status)))
        elif code := os.WEXITSTATUS(status):
            batch.charge((MEMORY if code == STARVED else ERROR, f"its process exited with status {code}"))
        elif before == batch.position():
            batch.charge((ERROR, "its process exited with status 0"))

    def _death(self, number: int) -> Answer:
        if number == signal.SIGSYS:
            return FORBIDDEN, f"not allowed in the sandbox{f': {self.note}' if self.note else ''}"
        if number == signal.SIGXCPU:
            return TIMEOUT, "used all its CPU time"
        if number == signal.SIGKILL:  # not by us
            return MEMORY, "its process was killed from outside, as for want of memory"
        return ERROR, f"its process was ended by {signal.Signals(number).name if number < 32 else f'signal {number}'}"


def _kill_strays() -> None:
    """What the child had started is ours now that it is gone. For the level without walls only."""
    listing = f"/proc/self/task/{os.getpid()}/children"
    while os.path.exists(listing):  # noqa: PTH110
        with open(listing, encoding="ascii") as children:  # noqa: PTH123
            strays = children.read().split()
        if not strays:
            return
        for stray in strays:
            _quietly(partial(os.kill, int(stray), signal.SIGKILL))
            _quietly(partial(os.waitpid, int(stray), 0))


def _quietly(call: Callable[[], Any]) -> Any:  # what the call gives; None where the system refuses
    try:
        return call()
    except OSError:
        return None
