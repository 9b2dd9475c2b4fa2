"""Why a step ran, or did not: its last two runs in an experiment, compared part by part of their keys.

A step may be called several times an iteration (rollouts for dev, test, ...). Calls are told apart by their place: the
iteration, and the position within it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from models.specs import ModelRef
from storage.checkpoints import read_checkpoint_manifest, what_is_wrong_with_checkpoint
from storage.datasets import DatasetError, DatasetRef, what_is_wrong
from storage.experiments import Experiment, StepRecord, experiments
from storage.home import home, home_name
from storage.results import StepResult, find_result

SAMPLING, GATHERING = "sample_rollouts", ("gather_rollouts", "gather_allotted")  # draws into a ledger; has the key
KEYED_AS = {SAMPLING: GATHERING, "judge_rollouts": ("gather_judged",)}  # what is asked for -> steps that have its key

_DIGEST = re.compile(r"[0-9a-f]{32}")
Verdict = Literal["first run", "reused", "same key", "changed", "unknown"]


class Change(BaseModel):
    """One part of a key that differs. None on a side: that run had no such part."""

    model_config = ConfigDict(frozen=True)

    step: str
    iteration: int | None
    part: str  # "sft.learning_rate", "demonstrations[0]", "step version"
    old: JsonValue
    new: JsonValue
    old_from: str | None  # of a digest: what made it
    new_from: str | None


class Drawn(BaseModel):
    """What a sampling found in the ledger, and what it had to draw."""

    model_config = ConfigDict(frozen=True)

    in_ledger: int
    drawn: int


class Explanation(BaseModel):
    """Two runs of one call of a step, compared."""

    model_config = ConfigDict(frozen=True)

    experiment: str
    step: str
    iteration: int | None
    position: int  # within the iteration, from 1
    positions: int  # calls of the step in this iteration
    verdict: Verdict
    told: str
    changes: tuple[Change, ...]  # of this step's own key
    causes: tuple[Change, ...]  # where changed inputs come from: what changed first, in steps before
    damage: str | None  # what is wrong now with what is stored; the next run makes it again
    ledger: Drawn | None  # None: no sampling took place
    old: StepRecord | None
    new: StepRecord


class Place(NamedTuple):
    """Where in a run a step was called."""

    iteration: int | None
    position: int


@dataclass(frozen=True, slots=True)
class _Visit:
    """One call of a step in one run."""

    number: int  # of its record among all of the experiment
    record: StepRecord
    drawn: Drawn | None


def explain(step: str, experiment: str | None = None, iteration: int | None = None) -> list[Explanation]:
    """The last two runs of each call of a step: those the step's last run made, or those of an iteration.

    Raises:
        ValueError: there is no such step, experiment or iteration; says which there are.
    """
    chosen = _experiment_of(step, experiment)
    records = chosen.steps()
    visits = _visits(records, KEYED_AS.get(step, (step,)))
    last_run = max((found for calls in visits.values() for found in calls), key=lambda visit: visit.number).record.run
    shown = {
        place: calls
        for place, calls in visits.items()
        if (calls[-1].record.run == last_run if iteration is None else place.iteration == iteration)
    }
    if not shown:
        known = sorted({place.iteration for place in visits if place.iteration is not None})
        raise ValueError(f"{step} never ran in iteration {iteration} of {chosen.name}; it ran in {known}")
    return [
        _explanation(chosen.name, place, calls, records, sum(one.iteration == place.iteration for one in shown))
        for place, calls in shown.items()
    ]


def references_in(value: JsonValue) -> Iterator[DatasetRef | ModelRef]:
    """The references in a stored result, however deep they lie."""
    if isinstance(value, list):
        yield from (found for item in value for found in references_in(item))
    elif isinstance(value, dict):
        if (reference := _reference(value)) is not None:
            yield reference
        else:
            yield from (found for item in value.values() for found in references_in(item))


def last_calls(records: Sequence[StepRecord]) -> dict[tuple[str, Place], StepRecord]:
    """The last completed record of each call of each step; a later run's stands over an earlier one's."""
    steps = dict.fromkeys(record.step for record in records if record.key is not None)
    found: dict[tuple[str, Place], StepRecord] = {}
    for step in steps:
        for place, calls in _visits(records, (step,)).items():
            done = [visit.record for visit in calls if visit.record.state == "completed"]
            if done:
                found[step, place] = done[-1]
    return found


def _experiment_of(step: str, name: str | None) -> Experiment:
    """The experiment asked for, else the one where the step ran last."""
    known = [one for one in experiments() if name is None or one.name == name]
    if not known:
        there = ", ".join(one.name for one in experiments()) or "none yet"
        raise ValueError(f"there is no experiment {name or ''!r} in {home_name()}; there are: {there}")
    recorded = KEYED_AS.get(step, (step,))
    ran = {one.name: max((r.at for r in one.steps() if r.step in recorded), default="") for one in known}
    chosen = max(known, key=lambda one: ran[one.name])
    if not ran[chosen.name]:
        steps = sorted({record.step for one in known for record in one.steps()})
        raise ValueError(f"no step {step!r} ran in {', '.join(ran)}; steps that did: {', '.join(steps) or 'none'}")
    return chosen


def _visits(records: Sequence[StepRecord], steps: Sequence[str]) -> dict[Place, list[_Visit]]:
    """Each call of a step, or of one that stands for it, with its record in each run that made it, in order."""
    visits: dict[Place, list[_Visit]] = {}
    counts: Counter[tuple[str, int | None]] = Counter()
    drawn: Drawn | None = None
    for number, record in enumerate(records):
        if record.shard is not None:
            continue
        if record.step == SAMPLING:
            drawn = Drawn(in_ledger=record.counts.get("reused", 0), drawn=record.counts.get("drawn", 0))
        if record.step in steps:
            counts[record.run, record.iteration] += 1
            place = Place(record.iteration, counts[record.run, record.iteration])
            visits.setdefault(place, []).append(_Visit(number, record, drawn if record.step in GATHERING else None))
        if record.step in GATHERING:
            drawn = None  # it belonged to this one
    return visits


def _explanation(
    experiment: str, place: Place, calls: Sequence[_Visit], records: Sequence[StepRecord], positions: int
) -> Explanation:
    new, old = calls[-1], calls[-2] if len(calls) > 1 else None
    changes, causes = _compared(old, new, records) if old is not None else ((), ())
    verdict = _verdict(old, new, changes)
    return Explanation(
        experiment=experiment,
        step=new.record.step,
        iteration=place.iteration,
        position=place.position,
        positions=positions,
        verdict=verdict,
        told=_told(verdict, old, new.record, changes),
        changes=changes,
        causes=causes,
        damage=_damage(new.record),
        ledger=new.drawn,
        old=old.record if old else None,
        new=new.record,
    )


def _verdict(old: _Visit | None, new: _Visit, changes: Sequence[Change]) -> Verdict:
    if old is None:
        return "first run"
    if old.record.key != new.record.key:
        return "changed" if changes else "unknown"
    return "reused" if new.record.cached else "same key"


def _told(verdict: Verdict, old: _Visit | None, new: StepRecord, changes: Sequence[Change]) -> str:
    failed = f"; it failed: {new.detail}" if new.state == "failed" else ""
    if verdict == "first run":
        reused = ", and was reused: other runs or experiments had stored it" if new.cached else ""
        return f"it has run once here{reused}; there is no earlier run to compare with{failed}"
    if verdict == "changed":
        stored = "; what it makes of that was stored already and was reused" if new.cached else ", so it ran"
        return f"{len(changes)} part{'s' * (len(changes) > 1)} of its key changed{stored}{failed}"
    if verdict == "unknown":
        return f"its key changed, but what one of the runs stored is gone, and with it the parts to compare{failed}"
    if verdict == "reused":
        return "nothing changed, and what was stored was reused"
    assert old is not None
    return f"nothing in its key changed, yet it ran again: {_why_again(old.record, new)}{failed}"


def _why_again(old: StepRecord, new: StepRecord) -> str:
    if old.state == "failed":
        return f"the run before had failed ({old.detail})"
    if new.state == "completed" and new.detail:
        return new.detail
    return "what it had stored was missing or damaged"


def _compared(old: _Visit, new: _Visit, records: Sequence[StepRecord]) -> tuple[tuple[Change, ...], tuple[Change, ...]]:
    if old.record.key == new.record.key:
        return (), ()
    before, after = _made(records[: old.number]), _made(records[: new.number])
    changes = tuple(_changes(old.record, new.record, before, after))
    causes: dict[str, Change] = {}
    for change in _first_causes(changes, before, after, set()):
        if change not in changes:
            causes.setdefault(change.model_dump_json(exclude={"iteration", "old_from", "new_from"}), change)
    return changes, tuple(causes.values())


def _made(records: Sequence[StepRecord]) -> dict[str, StepRecord]:
    """Digest -> the step that made it, or found it, last."""
    return {record.digest: record for record in records if record.digest is not None}


def _changes(
    old: StepRecord, new: StepRecord, before: dict[str, StepRecord], after: dict[str, StepRecord]
) -> Iterator[Change]:
    old_parts, new_parts = _key_parts(old), _key_parts(new)
    if old_parts is None or new_parts is None:
        return
    was, now = _leaves(old_parts), _leaves(new_parts)
    for part in [*was, *(part for part in now if part not in was)]:
        if was.get(part) != now.get(part):
            yield Change(
                step=new.step,
                iteration=new.iteration,
                part=part,
                old=was.get(part),
                new=now.get(part),
                old_from=_origin(was.get(part), before),
                new_from=_origin(now.get(part), after),
            )


def _first_causes(
    changes: Sequence[Change], before: dict[str, StepRecord], after: dict[str, StepRecord], seen: set[tuple[str, str]]
) -> Iterator[Change]:
    """The changes that are not themselves what a change before them led to."""
    for change in changes:
        old, new = before.get(str(change.old)), after.get(str(change.new))
        if old is None or new is None or old.step != new.step:
            yield change
        elif (pair := (str(change.old), str(change.new))) not in seen:
            seen.add(pair)
            earlier = list(_changes(old, new, before, after))
            yield from _first_causes(earlier, before, after, seen) if earlier else [change]


def _result(record: StepRecord) -> StepResult | None:
    return find_result(record.step, record.key) if record.key is not None else None


def _key_parts(record: StepRecord) -> dict[str, Any] | None:
    if record.key_parts is not None:
        return record.key_parts
    result = _result(record)
    return None if result is None else result.key_parts


def _leaves(key_parts: dict[str, Any]) -> dict[str, JsonValue]:
    leaves: dict[str, JsonValue] = {"step version": key_parts.get("version")}
    _add_leaves(leaves, "", key_parts.get("inputs"))
    return leaves


def _add_leaves(leaves: dict[str, JsonValue], path: str, value: JsonValue) -> None:
    if isinstance(value, dict) and list(value) == ["rows"] and _DIGEST.fullmatch(str(value["rows"])):
        leaves[path] = value["rows"]  # a data set
    elif isinstance(value, dict):
        for name, item in value.items():
            _add_leaves(leaves, f"{path}.{name}".lstrip("."), item)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for number, item in enumerate(value):
            _add_leaves(leaves, f"{path}[{number}]", item)
    else:
        leaves[path] = value


def _origin(value: JsonValue, made: dict[str, StepRecord]) -> str | None:
    """What made the thing of this digest: a step of this experiment, else what its manifest says."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        return None
    if (record := made.get(value)) is not None:
        parts = [record.step, "" if record.iteration is None else f"iteration {record.iteration}"]
        return ", ".join([part for part in parts if part] + ([f"{record.rows:,} rows"] if record.rows else []))
    for folder in home().glob(f"datasets/*/{value}"):
        return f"datasets/{folder.parent.name}"
    try:
        return read_checkpoint_manifest(value).step
    except DatasetError:
        return "not in this home"


def _damage(record: StepRecord) -> str | None:
    if record.state == "failed":
        return None
    if (result := _result(record)) is None:
        return f"steps/{record.step}/{record.key}.json is gone or cannot be read"
    return next((damage for ref in references_in(result.value) if (damage := _wrong(ref))), None)


def _wrong(reference: DatasetRef | ModelRef) -> str | None:
    if isinstance(reference, DatasetRef):
        return what_is_wrong(reference, deep=True)
    digests = [digest for digest in (reference.digest, reference.adapter) if digest and not reference.path]
    told = (what_is_wrong_with_checkpoint(digest, deep=True) for digest in digests)
    return next(filter(None, told), None)


def _reference(value: dict[str, Any]) -> DatasetRef | ModelRef | None:
    for kind in (DatasetRef, ModelRef):
        try:
            return kind.model_validate(value)
        except ValidationError:
            continue
    return None
