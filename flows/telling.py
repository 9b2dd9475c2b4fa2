"""What `ratchet why`, `trace` and `gc` found, as lines to read."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from storage.collecting import Garbage

if TYPE_CHECKING:  # they import Prefect, which takes a second
    from tasks.explaining import Change, Explanation
    from tasks.traces import ExperimentTrace, Trace, TracedRollout


def why_lines(explained: "Sequence[Explanation]") -> Iterator[str]:
    """What changed between the last two runs of each call of a step."""
    for one in explained:
        call = f", call {one.position} of {one.positions}" if one.positions > 1 else ""
        where = "" if one.iteration is None else f" iteration {one.iteration}{call}"
        yield f"{one.step}{where}: {one.told}"
        for change in one.changes:
            yield f"    {_change(change)}"
        for cause in one.causes:
            where = "" if cause.iteration is None else f" of iteration {cause.iteration}"
            yield f"    because of {cause.step}{where}: {_change(cause)}"
        if one.ledger is not None:
            yield f"    the ledger had {one.ledger.in_ledger:,} of its rows, {one.ledger.drawn:,} were drawn"
        if one.damage is not None:
            yield f"    what it stored cannot be used: {one.damage}; the next run makes it again"
        if one.old is not None and one.verdict != "reused":
            yield f"    compared: run {one.old.run} of {one.old.at} with run {one.new.run} of {one.new.at}"


def trace_lines(trace: "Trace") -> Iterator[str]:
    """A row's way through each experiment."""
    picked = "" if trace.rollout_index is None else f", rollout {trace.rollout_index}"
    yield f"Prompt {trace.prompt_id}{picked}"
    for one in trace.experiments:
        yield f"{one.experiment}:"
        yield from _experiment_lines(one, whole=trace.rollout_index is not None)
    for row in trace.ledger_only:
        yield (
            f"  ledger/{row.ledger}: rollout {row.rollout_index} by {row.policy}, seed {row.seed}, "
            f"{row.finish_reason}: drawn, but in no data set of the runs above: {_short(row.completion)}"
        )


def garbage_lines(found: "Sequence[Garbage]", *, deleted: bool, older_than_days: float) -> Iterator[str]:
    """What can go or went, and how much room that makes."""
    for garbage in found:
        if garbage.kind == "lock":
            continue
        yield f"{garbage.kind:<12}{_size(garbage.bytes):>10}  {garbage.days:6.1f} days  {garbage.name}  ({garbage.why})"
    if locks := sum(garbage.kind == "lock" for garbage in found):
        yield f"{locks:,} lock files that nobody holds"
    told = f"{len(found):,} things, {_size(sum(garbage.bytes for garbage in found))}"
    if not found:
        yield f"nothing to remove: experiments refer to all that is older than {older_than_days:g} days"
    else:
        again = f"ratchet gc --delete --older-than {older_than_days:g}"
        yield f"removed {told}" if deleted else f"{told} could go; remove them with: {again}"


def _change(change: "Change") -> str:
    return f"{change.part}: {_side(change.old, change.old_from)} -> {_side(change.new, change.new_from)}"


def _side(value: Any, origin: str | None) -> str:
    return f"{value[:12]} ({origin})" if origin is not None else "none" if value is None else repr(value)


def _experiment_lines(one: "ExperimentTrace", *, whole: bool) -> Iterator[str]:
    for prompt in one.prompts:
        where = "" if prompt.iteration is None else f", iteration {prompt.iteration}"
        yield f"  prompt      {prompt.dataset} ({prompt.step}{where}) of {prompt.source}"
    for prompt in one.prompts[:1]:
        yield f"              {prompt.prompt}"
        yield f"              gold answer: {prompt.answer}"
    for given in one.given:
        yield f"  given       {given.dataset} of {given.source}: {_short(given.completion)}"
    for rollout in one.rollouts:
        yield from _rollout_lines(rollout, whole=whole)
    for training in one.trainings:
        stands = {None: "no iteration's policy", True: "promoted", False: "held back"}[training.promoted]
        yield f"  it{training.iteration} {training.step} read its rows ({training.rows}) in {training.dataset}"
        yield f"              -> models/{training.checkpoint}: {training.label or '?'}, {stands}"
    for figure in one.evaluations:
        said = "" if figure.answer is None else f", answer {figure.answer}"
        undecided = f", {figure.undecided} undecided" if figure.undecided else ""
        yield (
            f"  it{figure.iteration} {figure.split} {figure.strategy} of {figure.label}: {figure.value:.3f} "
            f"(n {figure.rollouts}, k {figure.k}{undecided}{said})"
        )
    for gap in one.gaps:
        yield f"  not read    {gap}"


def _rollout_lines(rollout: "TracedRollout", *, whole: bool) -> Iterator[str]:
    verdicts = [
        f"reward {'undecided' if one.reward is None else format(one.reward, 'g')} ({one.reason}), answer {one.answer}"
        for one in rollout.verdicts
    ]
    yield (
        f"  it{rollout.iteration} {rollout.split} rollout {rollout.rollout_index} by {rollout.policy_label}, "
        f"seed {rollout.seed}, {rollout.finish_reason}: {'; '.join(verdicts) or 'not scored'}"
    )
    if whole:
        yield f"              {rollout.dataset}"
        yield from (f"              | {line}" for line in rollout.completion.splitlines())
    else:
        yield f"              {_short(rollout.completion)}"
    for one in rollout.judgements:
        sure = f"confidence {one.confidence:.3f}" if one.confidence is not None else f"no confidence, {one.reason}"
        yield f"              judged by {one.judge_label}: {sure} that it is right, {one.dataset}"
    for use in rollout.uses:
        times = f", {use.times} times" if use.times > 1 else ""
        told = f"{use.became}{times}" if use.became else f"left out: {use.why_not}"
        yield f"              -> {told}, {use.dataset}"


def _short(text: str, characters: int = 100) -> str:
    line = " / ".join(text.split("\n"))
    return line if len(line) <= characters else f"... {line[-characters:]}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
