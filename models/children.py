"""Child processes that cannot outlive us: engines and trainers each get one, so that ending it frees the accelerator.

The child's standard input is its lifeline: the kernel closes our end however we die, and a child that reads the end of
its input exits (`watch_lifeline`). PR_SET_PDEATHSIG would not do: it fires when the *thread* that started the child
ends, and steps run in threads that come and go.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import IO

KEPT_LINES = 60  # of a child's last output, for the error message when it dies
_working: "list[Child]" = []  # those that are killed when the run is stopped


def environment(*, offline: bool, **more: str) -> dict[str, str]:
    """Our environment for a child: no usage reports, no progress bars, and no network where none is needed."""
    quiet = {
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "WANDB_DISABLED": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        # Small tensors come and go all the time; without these, page faults double the system time (TINY.md).
        "MALLOC_MMAP_THRESHOLD_": "1073741824",
        "MALLOC_TRIM_THRESHOLD_": "1073741824",
        "MALLOC_TOP_PAD_": "268435456",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if offline:
        quiet |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**os.environ, **quiet, **more}


class Child:
    """A child process, its lifeline and its last lines of output.

    Args:
        arguments: after `python`, for instance ["-m", "models.worker", "job.json"].
        on_line: called in a thread of its own with each line the child prints.
        talks: True: standard input and output carry a protocol of the caller's, only standard error is read as lines.
        works: False: it is not killed when the run is stopped, for it is still needed then.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        environment: dict[str, str],
        on_line: Callable[[str], None],
        talks: bool = False,
        works: bool = True,
    ) -> None:
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._on_line = on_line
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if talks else subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours to pass on, and the whole group can be ended at once
        )
        if works:
            _working.append(self)
        lines = self.process.stderr if talks else self.process.stdout
        assert lines is not None
        # In the context of whoever started the child, so that what it says gets into that flow run's log.
        self._reader = threading.Thread(target=copy_context().run, args=(self._read_lines, lines), daemon=True)
        self._reader.start()

    def hand_over(self, text: str, on_line: Callable[[str], None] | None = None) -> bool:
        """Tell a child that waits for it this; False: it is there no more.

        Args:
            text: less than 4,096 bytes, which a pipe passes on in one piece.
            on_line: hears the child from now on.
        """
        self._on_line = on_line or self._on_line
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(text.encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        return self.process.poll() is None

    def wait(self) -> int:
        """The child's exit status, once it has ended and its output is read."""
        status = self.process.wait()
        self._reader.join(timeout=5)
        return status

    def end(self, *, patience_seconds: float = 10.0) -> None:
        """Close the lifeline, wait, and kill the group if it is still there."""
        with contextlib.suppress(ValueError):  # ended before
            _working.remove(self)
        if self.process.stdin and not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it may have gone already
                self.process.stdin.close()
        try:
            self.process.wait(timeout=patience_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join(timeout=5)

    def kill(self) -> None:
        """End the child and what it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self, lines: int = 15) -> str:
        """Its last lines of output, for an error message."""
        return "\n".join(list(self.last_lines)[-lines:])

    def _read_lines(self, stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode("utf-8", "replace").rstrip()
            if line:
                self.last_lines.append(line)
                self._on_line(line)


def kill_working_children() -> None:
    """Kill the engines and trainings at work; the calls that wait for them fail. Takes no lock, for signal handlers."""
    for child in list(_working):
        if child.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)


def watch_lifeline(*, with_group: bool = False, on_text: Callable[[str], None] = lambda text: None) -> None:
    """In a child that does not read its standard input otherwise: exit when that ends, because the parent is gone.

    Args:
        with_group: what the child has started in its process group is ended with it.
        on_text: called, in another thread, with what the parent hands over.
    """

    def watch() -> None:
        while told := os.read(0, 4096):
            on_text(told.decode())
        if with_group:
            os.killpg(0, signal.SIGKILL)
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()
