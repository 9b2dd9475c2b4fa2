"""Training in a child process: `run_job` in the parent, `python -m models.worker FOLDER` in the child.

The child ends when the training does, so that its memory, the accelerator's included, is free again. What it imports
takes longer than a small training, so the child of the next one may be started ahead (`get_ready`): it imports, and
waits for its folder on standard input.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from models.children import Child, environment, watch_lifeline
from models.jobs import PreferenceJob, SFTJob, TinyJob, TrainingJob, TrainingOutcome
from models.specs import Optimization

TEMPORARY = "ratchet-training-"
JOB, OUTCOME = "job.json", "outcome.json"
KILLED = (-9, 137)  # what the kernel's out-of-memory killer leaves behind
ADVICE = "lower per_device_batch_size or max_length; as it is, it would fail again"


class _Surroundings(NamedTuple):
    """What a process gets at its start and cannot change later."""

    folder: Path
    environment: dict[str, str]


class _Waiting(NamedTuple):
    surroundings: _Surroundings
    child: Child


_waiting: list[_Waiting] = []  # one at most


class TrainingError(RuntimeError):
    """A training failed. Trying again may help."""


class TrainingConfigurationError(TrainingError):
    """A training cannot work with these settings or rows, out-of-memory included; trying again would not help."""


def run_job(job: SFTJob | PreferenceJob | TinyJob, on_line: Callable[[str], None]) -> TrainingOutcome:
    """Run a training in a child process and wait for it.

    Args:
        on_line: called, in another thread, with each line the training prints.
    Raises:
        TrainingConfigurationError: the settings or the rows are at fault, or memory ran out.
        TrainingError: the child failed otherwise.
    """
    with _temporary_folder() as name:
        folder = Path(name)
        (folder / JOB).write_text(job.model_dump_json())
        child = _child(job, folder, on_line)
        try:
            status = child.wait()
        finally:
            child.end()
        return _read_outcome(job, folder / OUTCOME, status, child.tail())


def get_ready(job: SFTJob | PreferenceJob | TinyJob) -> None:
    """Start the child of the next training, expecting it to be like this one; another one ends it and starts its own.

    While it waits it takes half a gigabyte of memory, and nothing of an accelerator that it does not look at.
    """
    if not _waiting and not _launcher(_optimization(job)):
        surroundings = _surroundings(job)
        child = Child(["-m", "models.worker"], environment=surroundings.environment, on_line=lambda line: None)
        _waiting.append(_Waiting(surroundings, child))


def end_waiting() -> None:
    """End the child that waits for a training, if there is one."""
    while _waiting:
        child = _waiting.pop().child
        child.kill()
        child.end()


def main(arguments: Sequence[str]) -> int:
    """The child: run the job in the folder, and write what came of it beside it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("models").setLevel(logging.INFO)
    handed_over = SimpleQueue[str]()
    watch_lifeline(on_text=handed_over.put)
    folder = Path(arguments[0]) if arguments else _wait_for(handed_over)
    started = time.monotonic()
    job_file, outcome_file = folder / JOB, folder / OUTCOME
    job = TypeAdapter[SFTJob | PreferenceJob | TinyJob](TrainingJob).validate_json(job_file.read_text())
    try:
        outcome = _fit(job)
    except (MemoryError, ValueError, RuntimeError) as error:
        report = {"failure": _kind_of(error), "message": f"{type(error).__name__}: {error}"}
        _write_if_first(outcome_file, report)
        raise
    _write_if_first(outcome_file, outcome._asdict())
    logging.getLogger("models.worker").info(
        "trained on %s rows in %.1f s of %.1f s", f"{outcome.rows:,}", outcome.seconds, time.monotonic() - started
    )
    if not _optimization(job).report_to:  # trackers send their last figures at exit
        logging.shutdown()
        os._exit(0)  # torch takes a second to tear down what the kernel frees at once
    return 0


def _wait_for(folders: SimpleQueue[str]) -> Path:
    """The folder of a training; what trainings import is imported before."""
    from trl import DPOTrainer, SFTTrainer  # noqa: F401 # to have them

    folder = folders.get()
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    return Path(folder)


def _fit(job: SFTJob | PreferenceJob | TinyJob) -> TrainingOutcome:
    from models.tiny import build_tiny
    from models.trainers import fit_preferences, fit_sft

    if isinstance(job, SFTJob):
        return fit_sft(job)
    return fit_preferences(job) if isinstance(job, PreferenceJob) else build_tiny(job)


def _child(job: SFTJob | PreferenceJob | TinyJob, folder: Path, on_line: Callable[[str], None]) -> Child:
    """The one that waits, if it waits for a training like this, or a new one."""
    launcher, surroundings = _launcher(_optimization(job)), _surroundings(job)
    if _waiting and not launcher and _waiting[0].surroundings == surroundings:
        child = _waiting.pop().child
        if child.hand_over(str(folder), on_line):
            return child
        child.end()
    end_waiting()
    # datasets leaves temporary files behind in a child that is killed
    environment = {**surroundings.environment, "TMPDIR": str(folder)}
    return Child([*launcher, "-m", "models.worker", str(folder)], environment=environment, on_line=on_line)


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """A folder that is ours while we live: whoever finds it unlocked may remove it, and here those are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError), _locked(left):  # another user's, or that of a training under way
            shutil.rmtree(left)
    new = Path(tempfile.mkdtemp(prefix="ratchet-"))
    with _locked(new):
        folder = new.rename(new.with_name(f"{TEMPORARY}{new.name}"))  # locked when others see it
        try:
            yield str(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _kind_of(error: Exception) -> str:
    import torch

    text = str(error).lower()
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text or "out of memory" in text:
        return "memory"
    return "configuration" if isinstance(error, ValueError) else "other"


def _write_if_first(file: Path, report: dict[str, Any]) -> None:
    if os.environ.get("RANK", "0") == "0":
        file.write_text(json.dumps(report, default=str))


def _optimization(job: SFTJob | PreferenceJob | TinyJob) -> Optimization:
    return job.settings.training if isinstance(job, TinyJob) else job.settings


def _launcher(settings: Optimization) -> list[str]:
    """What comes before `-m models.worker`: nothing for one process, for that starts several seconds sooner."""
    if settings.accelerate_config is None:
        return []
    file = Path(settings.accelerate_config)
    if not file.is_file():
        raise TrainingConfigurationError(
            f"accelerate_config is {settings.accelerate_config!r}, which is not a file seen from {Path.cwd()}; "
            "write one with `accelerate config --config_file FILE`, or take one of deployments/accelerate"
        )
    return ["-m", "accelerate.commands.launch", "--config_file", str(file)]


def _surroundings(job: SFTJob | PreferenceJob | TinyJob) -> _Surroundings:
    more = {"TQDM_DISABLE": "1"}
    if (threads := _optimization(job).threads) is not None:
        more["OMP_NUM_THREADS"] = str(threads)
    if "wandb" in _optimization(job).report_to:
        more["WANDB_DISABLED"] = "false"
    offline = isinstance(job, TinyJob) or Path(job.weights).is_dir()
    return _Surroundings(Path.cwd(), environment(offline=offline, **more))


def _read_outcome(job: SFTJob | PreferenceJob | TinyJob, file: Path, status: int, tail: str) -> TrainingOutcome:
    report = json.loads(file.read_text()) if file.exists() else {}
    what = f"{job.kind} training of {job.output}"
    if report.get("failure") == "memory" or status in KILLED or "Signal 9" in tail:
        raise TrainingConfigurationError(f"{what} ran out of memory (exit status {status}): {ADVICE}.\n{tail}")
    if report.get("failure") == "configuration":
        raise TrainingConfigurationError(f"{what}: {report['message']}")
    if "failure" in report or status or not report:
        raise TrainingError(f"{what} failed with exit status {status}. Its last lines:\n{tail}")
    return TrainingOutcome(**{**report, "metrics": Path(report["metrics"])})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
