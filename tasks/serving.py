"""The engines of this process: opened at first need, kept warm, and given a new policy instead of a restart."""

import logging
import threading
from pathlib import Path

from models.children import kill_working_children
from models.engine import Engine, LocalModel, open_engine
from models.specs import EngineSettings, ModelRef
from models.worker import end_waiting
from storage.checkpoints import checkpoint_path

log = logging.getLogger("ratchet")

_open: dict[str, Engine] = {}
_lock = threading.Lock()
stopping = threading.Event()  # set when the command is ending: no engine is started any more


class Stopped(RuntimeError):
    """The run was told to stop; what a step met after that is no fault of its own."""


def stop() -> None:
    """Have everything under way end soon; finished rows are kept. May be called by a signal handler."""
    stopping.set()
    kill_working_children()


def raise_if_stopping() -> None:
    """Raise Stopped once the run has been told to stop."""
    if stopping.is_set():
        raise Stopped("the run was stopped; run the same command again to go on")


def serve(policy: ModelRef, settings: EngineSettings) -> Engine:
    """An engine that serves this policy, warm if one with these settings is open."""
    raise_if_stopping()
    key = settings.model_dump_json()
    with _lock:
        if key not in _open:
            _open[key] = open_engine(settings, None)
        _open[key].use(local_model(policy))
        return _open[key]


def local_model(ref: ModelRef) -> LocalModel:
    """Where a model's files are on this machine; a hub name stays a name.

    Raises:
        DatasetError: the checkpoint is not in this home.
    """
    weights = ref.path or (str(checkpoint_path(ref.digest)) if ref.digest else ref.name)
    return LocalModel(ref=ref, weights=weights, adapter=str(checkpoint_path(ref.adapter)) if ref.adapter else None)


def give_back_accelerator() -> None:
    """End the engines if they hold an accelerator, so that training gets it whole; on a CPU they stay warm."""
    if has_accelerator():
        close_engines()


def has_accelerator() -> bool:
    """Whether this machine has a GPU, as far as its device files tell."""
    return Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()


def close_engines() -> None:
    """End all engines of this process, and the child that waits for a training."""
    end_waiting()
    while _open:
        _, engine = _open.popitem()
        engine.close()


def rollouts_generated() -> int:
    """Rollouts the engines of this process have drawn, as they count themselves."""
    return sum(engine.generated() for engine in _open.values())
