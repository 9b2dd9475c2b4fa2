"""Step records: what a step produced, under the key of what went in. The store's own cache index.

home/steps/<step>/<key>.json     written last, put-if-absent
"""

import logging
from datetime import UTC, datetime
from heapq import nlargest
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from storage.committing import put_file
from storage.durable import remove_stale_attempts
from storage.fetching import fetch
from storage.home import home
from storage.names import checked_name

logger = logging.getLogger(__name__)


class StepResult(BaseModel):
    """One finished step: its key with every part spelled out, and what it produced."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    key: str
    version: str
    key_parts: dict[str, JsonValue]
    value: JsonValue  # a reference, or several
    counts: dict[str, int] = {}
    rows: int | None = None  # None: the step writes no rows
    seconds: float
    finished_at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))


def find_result(step: str, key: str) -> StepResult | None:
    """The record of a finished step, or None; one that cannot be read counts as absent, and a warning says why."""
    path = _path(step, key)
    found = _read(path) or (_read(path) if fetch(path) else None)
    if found is not None and (found.step, found.key) != (step, key):
        logger.warning("%s is the record of %s/%s; it is ignored and the step runs again", path, found.step, found.key)
        return None
    return found


def save_result(result: StepResult, *, replace: bool = False) -> StepResult:
    """Record a finished step, unless it is recorded already.

    Args:
        replace: overwrite the old record, because what it refers to is gone.
    Returns:
        The record that stands: the older one if there is one and `replace` is off.
    """
    path = _path(result.step, result.key)
    text = result.model_dump_json(indent=1)
    if not put_file(path, text, replace=replace):
        if earlier := find_result(result.step, result.key):
            return earlier
        put_file(path, text, replace=True)  # what was there cannot be read
    remove_stale_attempts(path.parent)
    return result


def latest_results(step: str, limit: int) -> list[StepResult]:
    """The newest records of a step, newest first."""
    folder = home() / "steps" / checked_name(step, "a step's name")
    records = [record for path in folder.glob("[!.]*.json") if (record := _read(path)) is not None]
    return nlargest(limit, records, key=lambda record: record.finished_at)


def _path(step: str, key: str) -> Path:
    return home() / "steps" / checked_name(step, "a step's name") / f"{checked_name(key, 'a step key')}.json"


def _read(path: Path) -> StepResult | None:
    try:
        return StepResult.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        logger.warning("%s cannot be read (%s); it is ignored and the step runs again", path, error.errors()[0]["msg"])
        return None
