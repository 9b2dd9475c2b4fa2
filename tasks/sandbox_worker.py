"""One child program of the sandbox, from its host's side: started, asked, and ended.

Standard library only, like all of the sandbox but its settings.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tasks.sandbox_calls import OUTCOMES

REPOSITORY = str(Path(__file__).parents[1])
PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop()); from tasks.sandbox_zygote import main; main()"
START_SECONDS = 60.0  # for a child program to be ready, on a busy machine
GRACE_SECONDS = 30.0  # a child program keeps to the limits itself; when it did not answer so long after, it is lost

Request = tuple[str, Sequence[str]]  # the source of a verifier, and responses
Answer = tuple[str, str]  # outcome and detail


class WorkerLost(Exception):
    """A child program ended, was late, or said what it must not."""


class Worker:
    """One child program.

    Raises:
        WorkerLost: it did not start.
    """

    def __init__(self, layers: Sequence[str], preload: Sequence[str]) -> None:
        # -P, -s, -S and an environment of ours isolate like -I, which would ignore PYTHONHASHSEED: with it, a verifier
        # that depends on the order of a set gives the same verdict today and tomorrow.
        command = [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", "-c", PROGRAM, REPOSITORY]
        environment = {"LC_ALL": "C.UTF-8", "TZ": "UTC0", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for us
        )
        self.bytes = 0
        path = [folder for folder in sys.path if folder] if preload else []
        try:
            hello = self._exchange({"layers": list(layers), "preload": list(preload), "path": path}, START_SECONDS)
            if not isinstance(hello, dict) or "error" in hello:
                raise WorkerLost(str(hello.get("error") if isinstance(hello, dict) else hello))
        except WorkerLost:
            self.close()
            raise
        self.layers: tuple[str, ...] = tuple(hello["layers"])
        self.missing: dict[str, str] = hello["missing"]

    def ask(self, requests: Sequence[Request], limits: dict[str, Any]) -> list[list[Answer]]:
        """The answers to each request.

        Raises:
            WorkerLost: there are none.
        """
        seconds = limits["verifier_seconds"] * len(requests) + GRACE_SECONDS
        tasks = [(source, list(responses)) for source, responses in requests]
        found = self._exchange({"tasks": tasks, "limits": limits}, seconds)
        try:
            answers = [[(OUTCOMES[code], str(detail)) for code, detail in row] for row in found]
        except (TypeError, ValueError, IndexError) as error:
            raise WorkerLost(f"its answer has another shape: {error}") from error
        if [len(row) for row in answers] != [len(responses) for _, responses in requests]:
            raise WorkerLost("its answer has another length")
        return answers

    def kill(self) -> None:
        """End it; whoever waits for its answer hears that it is lost."""
        self._process.kill()

    def close(self) -> None:
        """End it, and give back what it held here."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.close()

    def _exchange(self, message: object, seconds: float) -> Any:  # JSON
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        body = json.dumps(message).encode("ascii")
        self.bytes += len(body)
        alarm = threading.Timer(seconds, self._process.kill)
        alarm.daemon = True
        alarm.start()
        try:
            stdin.write(len(body).to_bytes(8, "big") + body)
            stdin.flush()
            size = stdout.read(8)
            answer = stdout.read(int.from_bytes(size, "big")) if len(size) == 8 else b""
            return json.loads(answer)
        except (OSError, ValueError) as error:
            raise WorkerLost(f"no answer: {error}; {self._last_words()}") from error
        finally:
            alarm.cancel()

    def _last_words(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            self._errors.seek(0)
            return self._errors.read()[-500:].decode("utf-8", "replace").strip() or "it left no message"
        return "it left no message"


class Run:
    """Requests that are stopped together, from another thread, by ending the workers that are at them."""

    def __init__(self) -> None:
        self.stopped = False
        self._workers: set[Worker] = set()

    def stop(self) -> None:
        """End what is under way; what was not begun is refused."""
        self.stopped = True
        for worker in tuple(self._workers):
            worker.kill()

    @contextlib.contextmanager
    def using(self, worker: Worker) -> Iterator[None]:
        """While this worker is at one of the requests."""
        self._workers.add(worker)
        try:
            if self.stopped:
                raise WorkerLost("its run was stopped")
            yield
        finally:
            self._workers.discard(worker)
