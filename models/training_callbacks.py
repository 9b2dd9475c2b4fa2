"""What happens beside a training: sealed checkpoints to resume from, and metrics as JSON lines."""

import json
import logging
import re
import shutil
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger("models.trainers")

WHOLE = "whole.json"  # written last into a checkpoint: what it belongs to, and the size of each of its files


class TrainingLine(NamedTuple):
    """What a training says of itself now and then."""

    optimizer_step: int
    optimizer_steps: int  # in all
    told: str  # loss, margin, speed


def read_line(line: str) -> TrainingLine | None:
    """The line as `recorder` writes it; None: it is something else that was printed."""
    found = re.fullmatch(r"optimizer step (\d+) of (\d+): (.*)", line.strip())
    return TrainingLine(int(found[1]), int(found[2]), found[3]) if found else None


def last_whole_checkpoint(folder: Path, belongs_to: dict[str, Any]) -> Path | None:
    """The newest checkpoint whose files are all there and that this training wrote; others are removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        if _is_whole(checkpoint, belongs_to):
            return checkpoint
        logger.warning("%s is torn or of another training; it is removed", checkpoint)
        shutil.rmtree(checkpoint)
    return None


@cache
def sealer() -> Any:
    """The callback class that seals checkpoints; made here, since transformers is imported late."""
    from transformers import TrainerCallback

    class Sealer(TrainerCallback):  # type: ignore[misc] # untyped base
        """Seals each checkpoint once it is written in full, so that a torn one is never resumed from."""

        def __init__(self, trainer: Any, belongs_to: dict[str, Any]) -> None:
            self.trainer = trainer
            self.belongs_to = belongs_to

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not state.is_world_process_zero:
                return
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files = [path for path in checkpoint.rglob("*") if path.is_file()]
            sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
            seal = {"belongs_to": self.belongs_to, "files": sizes, "tokens": int(self.trainer._total_train_tokens)}
            (checkpoint / WHOLE).write_text(json.dumps(seal))

    return Sealer


@cache
def recorder() -> Any:
    """The callback class that records metrics; made here, since transformers is imported late."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):  # type: ignore[misc] # untyped base
        """Writes what the trainer logs as JSON lines, and one line a log for people."""

        def __init__(self, file: Path) -> None:
            self.file = file
            self.since = time.monotonic()
            self.tokens = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.since = time.monotonic()
            if state.is_world_process_zero:
                _forget_after(self.file, state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if not state.is_world_process_zero or "loss" not in logs:  # the summary at the end has no loss
                return
            figures = {name: float(value) for name, value in logs.items() if name != "epoch"}
            figures["tokens_per_second"] = self._speed(figures.get("num_tokens", 0.0))
            with self.file.open("a") as lines:
                for name, value in figures.items():
                    row = {"optimizer_step": state.global_step, "name": name, "value": value}
                    lines.write(json.dumps(row) + "\n")
            logger.info(_line(state.global_step, state.max_steps, figures))

        def _speed(self, tokens: float) -> float:
            now = time.monotonic()
            speed = (tokens - self.tokens) / max(now - self.since, 1e-9)
            self.since, self.tokens = now, tokens
            return max(speed, 0.0)

    return Recorder


def _is_whole(checkpoint: Path, belongs_to: dict[str, Any]) -> bool:
    try:
        seal = json.loads((checkpoint / WHOLE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    sizes = {name: (checkpoint / name).stat().st_size for name in seal["files"] if (checkpoint / name).is_file()}
    return bool(seal["belongs_to"] == json.loads(json.dumps(belongs_to)) and sizes == seal["files"])


def _line(step: int, steps: int, figures: dict[str, float]) -> str:
    shown = [f"loss {figures['loss']:.4f}"]
    if "rewards/margins" in figures:
        shown.append(f"margin {figures['rewards/margins']:.3f}, accuracy {figures['rewards/accuracies']:.2f}")
    return f"optimizer step {step} of {steps}: {', '.join(shown)}, {figures['tokens_per_second']:,.0f} tokens/s"


def _forget_after(metrics: Path, optimizer_step: int) -> None:
    """Keep the metrics up to the step that training goes on from."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["optimizer_step"] <= optimizer_step]
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_text("".join(f"{line}\n" for line in kept))
