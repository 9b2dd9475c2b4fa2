"""Training in a child process: `run_job` in the parent, `python -m models.worker JOB.json OUTCOME.json` in the child.

The child ends when the training does, so that its memory, the accelerator's included, is free again.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import Any

from pydantic import TypeAdapter

from models.children import Child, environment, watch_lifeline
from models.jobs import PreferenceJob, SFTJob, TinyJob, TrainingJob, TrainingOutcome
from models.specs import Optimization

TEMPORARY = "ratchet-training-"
KILLED = (-9, 137)  # what the kernel's out-of-memory killer leaves behind
ADVICE = "lower per_device_batch_size or max_length; as it is, it would fail again"


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
        job_file, outcome_file = Path(name) / "job.json", Path(name) / "outcome.json"
        job_file.write_text(job.model_dump_json())
        arguments = [*_launcher(_optimization(job)), "-m", "models.worker", str(job_file), str(outcome_file)]
        child = Child(arguments, environment=_environment(job, name), on_line=on_line)
        try:
            status = child.wait()
        finally:
            child.end()
        return _read_outcome(job, outcome_file, status, child.tail())


def main(arguments: Sequence[str]) -> int:
    """The child: run the job in the first file, write what came of it to the second."""
    watch_lifeline()
    started = time.monotonic()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("models").setLevel(logging.INFO)
    job_file, outcome_file = map(Path, arguments)
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


def _fit(job: SFTJob | PreferenceJob | TinyJob) -> TrainingOutcome:
    from models.tiny import build_tiny
    from models.trainers import fit_preferences, fit_sft

    if isinstance(job, SFTJob):
        return fit_sft(job)
    return fit_preferences(job) if isinstance(job, PreferenceJob) else build_tiny(job)


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """A folder that is ours while we live: whoever finds it unlocked may remove it, and here those are removed."""
    for left in Path(gettempdir()).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError), _locked(left):  # another user's, or that of a training under way
            shutil.rmtree(left)
    new = Path(mkdtemp(prefix="ratchet-"))
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


def _environment(job: SFTJob | PreferenceJob | TinyJob, scratch: str) -> dict[str, str]:
    more = {"TQDM_DISABLE": "1", "TMPDIR": scratch}  # datasets leaves temporary files behind in a child that is killed
    if (threads := _optimization(job).threads) is not None:
        more["OMP_NUM_THREADS"] = str(threads)
    if "wandb" in _optimization(job).report_to:
        more["WANDB_DISABLED"] = "false"
    return environment(offline=isinstance(job, TinyJob) or Path(job.weights).is_dir(), **more)


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
