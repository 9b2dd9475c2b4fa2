"""What a run will take, from what earlier ones took; where there were none, from assumptions that are stated.

Nothing is made up: what neither history nor an assumption tells is None, and counted.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from models.specs import Optimization, TinyModel

ASSUMED_SHARE = 0.5  # of max_completion_tokens, where no completion was drawn yet
BYTES_A_TOKEN = 4.0  # of text, before compression
CHARACTERS_A_TOKEN = 4.0  # of English, where there is no tokenizer
SECONDS_A_ROW = 50e-6  # of a step that only reads and writes rows
# The demo's tiny model on two CPU cores (docs/TINY.md): the engine's start, its speed, a training's start, and what an
# optimizer step of 16 rows takes from scratch, in SFT and in DPO.
TINY_ENGINE_START_SECONDS = 15.0
TINY_TOKENS_A_SECOND = 9_000.0
TINY_TRAINING_START_SECONDS = 9.0
TINY_STEP_SECONDS = {"build_base": 0.043, "train_sft": 0.086, "train_preferences": 0.17}


class Past(NamedTuple):
    """One step of an earlier run that was done and not reused."""

    step: str
    split: str | None
    rows_in: int | None  # that it looked at; None: not recorded
    rows: int | None  # that it wrote
    drawn: int  # rollouts
    tokens: int  # of these rollouts
    optimizer_steps: int
    seconds: float
    starts: bool = False  # it was the first of its run to draw, so that the engine's start is in its time


class Line(NamedTuple):
    """Seconds as fixed + per_unit * units."""

    fixed: float
    per_unit: float

    def at(self, units: float) -> float:
        """Seconds for so many units."""
        return self.fixed + self.per_unit * units


def fit(points: Sequence[tuple[float, float]]) -> Line | None:
    """The line through (units, seconds), by least squares; through the origin where that would begin or go below it.

    Returns:
        None where there is nothing to go by.
    """
    count, units = len(points), sum(x for x, _ in points)
    if not units:
        return None
    origin = Line(0.0, sum(y for _, y in points) / units)
    spread = count * sum(x * x for x, _ in points) - units**2
    if spread <= 0:
        return origin
    slope = (count * sum(x * y for x, y in points) - units * sum(y for _, y in points)) / spread
    fixed = (sum(y for _, y in points) - slope * units) / count
    return Line(fixed, slope) if slope >= 0 and fixed >= 0 else origin


def completion_tokens(history: Sequence[Past], split: str | None) -> float | None:
    """Mean tokens of a completion: of those drawn for this split, or else of all; None: none was drawn."""
    drawn = [past for past in history if past.drawn]
    alike = [past for past in drawn if past.split == split] or drawn
    return sum(past.tokens for past in alike) / sum(past.drawn for past in alike) if alike else None


def share_left(history: Sequence[Past], step: str) -> float | None:
    """Rows that a step wrote for each that it looked at; None: it has not been recorded."""
    alike = [past for past in history if past.step == step and past.rows_in and past.rows is not None]
    looked_at = sum(past.rows_in or 0 for past in alike)
    return sum(past.rows or 0 for past in alike) / looked_at if looked_at else None


def optimizer_steps(rows: float, settings: Optimization) -> int:
    """Weight updates of a training on so many rows."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, ceil(ceil(rows / settings.global_batch_size) * settings.epochs))


def sampling_seconds(history: Sequence[Past], tokens: float, *, tiny: bool, started: bool) -> float | None:
    """Seconds to draw so many tokens; None: not known.

    Args:
        tiny: the policy is a tiny model of ours, for which there is an assumption.
        started: an earlier step of this run has started the engine.
    """
    drawn = [past for past in history if past.drawn]
    warm = [past for past in drawn if not past.starts]
    line = fit([(past.tokens, past.seconds) for past in warm or drawn])
    if line is not None:
        extra = [past.seconds - line.at(past.tokens) for past in drawn if past.starts and warm]
        return line.at(tokens) + (0.0 if started or not extra else max(0.0, sum(extra) / len(extra)))
    if not tiny:
        return None
    return tokens / TINY_TOKENS_A_SECOND + (0.0 if started else TINY_ENGINE_START_SECONDS)


def training_seconds(history: Sequence[Past], step: str, steps: int, *, tiny: bool) -> float | None:
    """Seconds of a training of so many optimizer steps; None: not known."""
    alike = [past for past in history if past.step == step and past.optimizer_steps]
    line = fit([(past.optimizer_steps, past.seconds) for past in alike])
    if line is not None:
        return line.at(steps)
    if not tiny or step not in TINY_STEP_SECONDS:
        return None
    return TINY_TRAINING_START_SECONDS + steps * TINY_STEP_SECONDS[step]


def row_seconds(history: Sequence[Past], step: str, rows: float) -> float:
    """Seconds of a step that reads and writes rows and asks no model."""
    line = fit([(past.rows, past.seconds) for past in history if past.step == step and past.rows])
    return rows * SECONDS_A_ROW if line is None else line.at(rows)


def tiny_bytes(tiny: TinyModel) -> float:
    """Bytes of a tiny model's weights, of 4 bytes each: embeddings and head, attention, and a fourfold MLP."""
    return 4.0 * (2 * tiny.vocabulary * tiny.hidden_size + 12 * tiny.layers * tiny.hidden_size**2)


def told_seconds(seconds: float) -> str:
    """For instance "48 s", "3 min 10 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def told_bytes(size: float) -> str:
    """For instance "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
