"""The sandbox's child program: `python -P -s -S -B -X utf8 tasks/sandbox_zygote.py`, talking over its standard streams.

Standard library only. It walls itself in, imports what verifiers may want, and forks a child for each verifier (or for
several plain ones), which it watches, kills and replaces. It holds no secret, and believes a child only what the child
can say about the verifier it is at: verdicts come in order, and once a verifier that is not plain was entered, about
that one alone.
"""

import errno
import gc
import importlib
import importlib.machinery
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any, BinaryIO, NoReturn

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100,PTH120 - pathlib is slow to load
sys.path.insert(0, REPOSITORY)

from tasks import sandbox_layers as layers  # found only now
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

sys.path.remove(REPOSITORY)

FAULT = 70  # status of a child whose harness failed: a verifier can bring it to that, in its own process
TICK_SECONDS = 0.01  # how often a busy child is looked at
KILLS = 2  # a verifier stopped so often is not called again
ASK, TELL = 10, 11  # where standard input and output are moved, out of a child's reach
# What verifiers import; each megabyte more makes every fork slower. What is not here and not asked for is missing.
PRELOAD = (
    "_strptime abc array ast base64 binascii bisect calendar cmath collections collections.abc contextlib copy csv "
    "ctypes dataclasses datetime decimal difflib enum fnmatch fractions functools hashlib heapq hmac html html.parser "
    "inspect io itertools json keyword locale math mmap numbers operator os pathlib pickle pprint random re reprlib "
    "secrets select shutil signal socket statistics string stringprep struct subprocess tempfile textwrap threading "
    "time tokenize traceback types typing unicodedata urllib.parse uuid warnings weakref xml.etree.ElementTree zlib "
    "encodings.idna encodings.utf_16 encodings.utf_32 encodings.latin_1 encodings.ascii encodings.cp1252 "
    "encodings.punycode encodings.unicode_escape encodings.rot_13 encodings.hex_codec encodings.utf_8_sig"
).split()


def main() -> None:
    """Set up, say what walls stand, then answer one batch after the other until the input ends."""
    os.dup2(0, ASK)
    os.dup2(1, TELL)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    ask, tell = os.fdopen(ASK, "rb"), os.fdopen(TELL, "wb")
    try:
        zygote = Zygote(_receive(ask) or {})
    except Exception as error:  # whatever it is, the host must hear of it
        _send(tell, {"error": f"{type(error).__name__}: {error}"})
        return
    _send(tell, {"layers": zygote.layers, "missing": zygote.missing})
    os.dup2(null, 2)
    while (batch := _receive(ask)) is not None:
        tasks = [Task(*task) for task in batch["tasks"]]
        _send(tell, Batch(zygote, tasks, batch["limits"]).run())


class Zygote:
    """This process, walled in.

    Args:
        wanted: `layers`: the walls to put up; `preload`: more modules; `path`: where these are found.
    """

    def __init__(self, wanted: dict[str, Any]) -> None:
        self.layers: list[str] = []
        self.missing: dict[str, str] = {}
        self._statm = os.open("/proc/self/statm", os.O_RDONLY) if os.path.exists("/proc/self/statm") else None  # noqa: PTH110
        wanted_layers = wanted["layers"]
        if "namespaces" in wanted_layers and self._put_up("namespaces", layers.unshare):
            _become_first_process()
        _preload(wanted["preload"], wanted["path"])
        if "namespaces" in self.layers and not self._put_up("namespaces", layers.empty_root):
            self.layers.remove("namespaces")
        if sys.platform == "linux":
            layers.adopt_orphans()
            layers.drop_privileges()  # which also forgets whom to die with
        if os.getpid() == 1 and "namespaces" in wanted_layers:
            layers.die_with_parent()
        if "landlock" in wanted_layers:
            self._put_up("landlock", layers.restrict_files)
        self.filter: layers.Filter | None = None
        if "seccomp" in wanted_layers and self._put_up("seccomp", _try_filter):
            self.filter = layers.Filter()
        gc.collect()
        gc.disable()
        gc.freeze()

    def memory(self) -> int | None:
        """Bytes of address space, or None where the kernel does not say."""
        if self._statm is None:
            return None
        return int(os.pread(self._statm, 64, 0).split()[0]) * resource.getpagesize()

    def _put_up(self, layer: str, build: Any) -> bool:  # a function without arguments
        try:
            build()
        except OSError as error:
            self.missing[layer] = error.strerror or str(error)
            return False
        if layer not in self.layers:
            self.layers.append(layer)
        return True


class Batch:
    """Verifiers under way: what is known of each call, and where a child is."""

    def __init__(self, zygote: Zygote, tasks: list[Task], limits: dict[str, Any]) -> None:
        self.zygote, self.tasks, self.limits = zygote, tasks, limits
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

    def charge(self, verifier: int, answer: Answer, *, give_up: bool = False) -> None:
        """One call of this verifier ended its process; after too many, or when told so, all others count the same."""
        if verifier != self.at:
            return
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
        self.batch, self.zygote, self.limits = batch, batch.zygote, batch.limits
        self.token = os.urandom(16)
        self.entered: int | None = None  # the verifier it said it is at
        self.locked = False  # that verifier is not plain: nothing else is believed any more
        self.note = ""
        self.rest = b""
        self.violated = False

    def run(self) -> None:
        """Let it call what it may, and charge what it was stopped for."""
        batch = self.batch
        before = (batch.at, len(batch.answers[batch.at]))
        memory = self.zygote.memory()
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self._be_child(writer, memory)
        os.close(writer)
        os.set_blocking(self.reader, False)
        self.clock = (~self.pid << 3) | 2  # its CPU clock, CPUCLOCK_SCHED
        verdict: Answer | None = None
        try:
            verdict = self._wait()
        finally:
            status = self._end()
            self._drain()
            os.close(self.reader)
        self._settle(before, verdict, status)

    def _be_child(self, writer: int, memory: int | None) -> NoReturn:
        leave, status = os._exit, FAULT
        try:
            os.dup2(writer, CHANNEL)
            os.closerange(CHANNEL + 1, 64)
            if sys.platform == "linux":
                layers.die_with_parent()
            self._limit(memory)
            if self.zygote.filter is not None:
                self.zygote.filter.put_on()
            call = len(self.batch.answers[self.batch.at])
            serve(self.batch.tasks, Start(self.batch.at, call, self.token, self.limits["share"]))
            status = 0
        except MemoryError:
            status = MEMORY
        finally:
            leave(status)
        raise AssertionError("a child came back")

    def _limit(self, base: int | None) -> None:
        megabytes = self.limits["memory_mb"]
        seconds = int(self.limits["verifier_seconds"]) * self.limits["share"] + 5  # should this process be gone
        wanted = [(resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)]
        if base is not None:
            wanted.append((resource.RLIMIT_AS, base + megabytes * 2**20))
        for name, value in wanted:
            try:
                resource.setrlimit(name, (value, value))
            except (ValueError, OSError):  # already lower, or not known here
                continue
        if self.zygote.filter is None:
            _limit_processes()

    def _wait(self) -> Answer | None:
        """Why it must be killed, or None when it ended by itself."""
        poll = select.poll()
        poll.register(self.reader, 0)  # wakes up at its death alone
        poll.register(ASK, 0)
        seen, call_wall, call_cpu, last = None, 0.0, 0.0, time.monotonic()
        while True:
            events = dict(poll.poll(TICK_SECONDS * 1000))
            if ASK in events:  # the host is gone
                os.kill(self.pid, signal.SIGKILL)
                os._exit(1)
            if self.reader in events:
                return None
            self._drain()
            if self.violated:
                return None
            now, cpu = time.monotonic(), self._cpu()
            batch = self.batch
            if batch.at >= len(batch.tasks):
                continue
            at = (batch.at, len(batch.answers[batch.at]))
            if at != seen:
                seen, call_wall, call_cpu = at, now, cpu
            batch.spent[batch.at] += now - last
            last = now
            if answer := self._overdue(now - call_wall, cpu - call_cpu, batch.spent[batch.at]):
                return answer

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
        if "namespaces" in self.zygote.layers:  # this is the first process: all others here are its
            _quietly(lambda: os.kill(-1, signal.SIGKILL))
        elif self.zygote.filter is None:
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
                self.violated |= bool(self.rest) and not self.batch_done()
                return
            self.rest += part
            whole = len(self.rest) - len(self.rest) % RECORD.size
            for place in range(0, whole, RECORD.size):
                if not self._take(*RECORD.unpack_from(self.rest, place)):
                    self.violated = True
                    return
            self.rest = self.rest[whole:]

    def batch_done(self) -> bool:
        """Whether every call has its answer."""
        return self.batch.at >= len(self.batch.tasks)

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
        detail = text[:size].decode("ascii", "replace")[: self.limits["detail_length"]]
        if kind == NOTE:
            self.note = "".join(letter for letter in detail if letter.isalnum() or letter in "._")
            return True
        if kind == VERDICT and call == len(batch.answers[verifier]) and outcome < len(OUTCOMES):
            batch.accept((outcome, detail))
            return True
        return False

    def _settle(self, before: tuple[int, int], verdict: Answer | None, status: int) -> None:
        batch = self.batch
        if self.batch_done():
            return
        progress = (batch.at, len(batch.answers[batch.at])) != before
        current = self.entered if self.locked and self.entered is not None else batch.at
        if self.violated:
            batch.charge(current, (INVALID, "wrote to the result channel"), give_up=True)
        elif verdict is not None:
            whole = batch.spent[batch.at] > self.limits["verifier_seconds"]
            batch.charge(current, verdict, give_up=whole)
        elif os.WIFSIGNALED(status):
            batch.charge(current, self._death(os.WTERMSIG(status)))
        elif os.WEXITSTATUS(status) or not progress:
            code = os.WEXITSTATUS(status)
            batch.charge(current, (MEMORY if code == MEMORY else ERROR, f"its process exited with status {code}"))

    def _death(self, number: int) -> Answer:
        if number == signal.SIGSYS:
            return FORBIDDEN, f"not allowed in the sandbox{f': {self.note}' if self.note else ''}"
        if number == signal.SIGXCPU:
            return TIMEOUT, "used all its CPU time"
        return ERROR, f"its process was ended by {signal.Signals(number).name if number < 32 else f'signal {number}'}"


def _become_first_process() -> None:
    """Go on as process 1 of the new namespace; the process the host knows waits, and takes it along when it ends."""
    pid = os.fork()
    if pid:
        os.closerange(3, 64)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    layers.die_with_parent()


def _preload(more: list[str], path: list[str]) -> None:
    for name in PRELOAD:
        try:
            importlib.import_module(name)
        except ImportError:  # this Python was built without it, or a verifier has no use for it here
            continue
    sys.path[:] = [*sys.path, *path] if more else sys.path
    for name in more:
        importlib.import_module(name)
    import warnings

    warnings.simplefilter("ignore")
    # From here on an import finds what is loaded or built in, and touches no file.
    sys.meta_path[:] = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter]
    sys.path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()
    os.environ.clear()
    os.environ["TZ"] = "UTC0"  # else the C library would look for /etc/localtime
    if os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task")) != 1:  # noqa: PTH112,PTH208
        raise RuntimeError(f"preloading {more} started threads, and a process with threads must not fork")


def _try_filter() -> None:
    """Put the filter on a child that does nothing.

    Raises:
        OSError: it could not, or did not live to say so.
    """
    tried = layers.Filter()
    pid = os.fork()
    if not pid:
        code = 0
        try:
            tried.put_on()
        except OSError as error:
            code = error.errno or errno.EIO
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code, f"prctl(PR_SET_SECCOMP): {os.strerror(code) if code > 0 else f'ended by signal {-code}'}")


def _kill_strays() -> None:
    """What the child had started is ours now that it is gone. For the level without walls only."""
    listing = f"/proc/self/task/{os.getpid()}/children"
    while os.path.exists(listing):  # noqa: PTH110
        with open(listing, encoding="ascii") as children:  # noqa: PTH123
            strays = children.read().split()
        if not strays:
            return
        for stray in strays:
            _quietly(lambda stray=stray: os.kill(int(stray), signal.SIGKILL))  # type: ignore[misc]
            _quietly(lambda stray=stray: os.waitpid(int(stray), 0))  # type: ignore[misc]


def _limit_processes() -> None:
    for name, value in ((resource.RLIMIT_NPROC, 0), (resource.RLIMIT_NOFILE, 16)):
        _quietly(lambda name=name, value=value: resource.setrlimit(name, (value, value)))  # type: ignore[misc]


def _quietly(call: Any) -> Any:  # a function without arguments; None where the system refuses
    try:
        return call()
    except (OSError, ValueError):
        return None


def _receive(stream: BinaryIO) -> Any:  # JSON; None at the end
    size = stream.read(8)
    if len(size) < 8:
        return None
    body = stream.read(int.from_bytes(size, "big"))
    return json.loads(body)


def _send(stream: BinaryIO, message: object) -> None:
    body = json.dumps(message).encode("ascii")
    stream.write(len(body).to_bytes(8, "big") + body)
    stream.flush()


if __name__ == "__main__":
    main()
