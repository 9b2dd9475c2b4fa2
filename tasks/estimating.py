"""How long a planned run will take and how much it will write, from what this home remembers of earlier ones."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models.specs import Fake, ModelRef, Optimization, PromptTemplate, Sampling, Scripted, TinyModel
from storage.checkpoints import read_checkpoint_manifest
from storage.datasets import DatasetError, DatasetRef, read_manifest, read_rows
from storage.ledger import look_for
from storage.results import latest_results
from storage.rows import Prompt
from tasks import estimates as rules
from tasks.caching import references_in
from tasks.checking import parts
from tasks.planning import PlannedStep
from tasks.remembering import History, history_of
from tasks.sampling import ledger_key

RESULTS = 3  # of each step, the newest ones, whose sizes are looked at


class StepEstimate(NamedTuple):
    """What one planned step will take. None: not known."""

    rows: float | None  # that it will write
    tokens_drawn: float | None
    tokens_trained: float | None
    seconds: float | None
    bytes: float | None


NOTHING = StepEstimate(None, 0.0, 0.0, 0.0, 0.0)


class Estimate(NamedTuple):
    """What a run will take: each figure is of the steps it is known of, and says of how many it is not."""

    tokens_drawn: float
    tokens_trained: float
    seconds: float
    bytes: float
    unknown: dict[str, int]  # figure -> steps that it is not known of
    sources: dict[str, str]  # figure -> where it comes from
    steps: tuple[StepEstimate, ...]  # as planned


def estimate(config: Any, planned: Sequence[PlannedStep], prompt_tokens: float) -> Estimate:
    """What the planned steps will take.

    Args:
        prompt_tokens: of the first prompt, as a stand-in for all.
    """
    history = history_of(config)
    estimator = _Estimator(config, history, prompt_tokens)
    steps = tuple(estimator.of(step) for step in planned)
    figures = ("tokens_drawn", "tokens_trained", "seconds", "bytes")
    unknown = {name: count for name in figures if (count := sum(getattr(one, name) is None for one in steps))}
    totals = {name: sum(getattr(one, name) or 0.0 for one in steps) for name in figures}
    return Estimate(**totals, unknown=unknown, sources=_sources(history, estimator), steps=steps)


class _Estimator:
    """Goes through the planned steps in their order, and remembers how many rows each will have made."""

    def __init__(self, config: Any, history: History, prompt_tokens: float) -> None:
        self.config, self.history, self.prompt_tokens = config, history.past, prompt_tokens
        self.tiny = not isinstance(config.base, ModelRef)
        self.reused = 0  # rollouts that are in the ledger already
        self.assumed_size = False  # of some rows or models
        self._rows: dict[str, float] = {}
        self._started = False
        self._bytes: dict[str, float | None] = {}

    def of(self, step: PlannedStep) -> StepEstimate:
        """What one step will take; nothing, if it is cached."""
        if step.cached:
            if isinstance(step.made, DatasetRef):
                self._rows[step.made.digest] = step.made.rows
            return NOTHING
        sampling = next((one for one in step.arguments.values() if isinstance(one, Sampling)), None)
        training = next(_settings(step.arguments, Optimization), None)
        if sampling is not None:
            return self._of_sampling(step, sampling)
        return self._of_training(step, training) if training is not None else self._of_rows(step)

    def _of_sampling(self, step: PlannedStep, sampling: Sampling) -> StepEstimate:
        prompts = self._rows_read(step)
        if prompts is None:
            return self._made(step, StepEstimate(None, None, 0.0, None, None))
        rows = prompts * sampling.rollouts_per_prompt
        drawn = max(0.0, rows - self._in_ledger(step.arguments, sampling))
        mean = rules.completion_tokens(self.history, step.split)
        if mean is None:
            mean = sampling.max_completion_tokens * rules.ASSUMED_SHARE
        tokens, engine = drawn * mean, step.arguments.get("engine")
        if isinstance(engine, Fake | Scripted):
            seconds: float | None = rules.row_seconds(self.history, step.step, rows)
        else:
            seconds = rules.sampling_seconds(self.history, tokens, tiny=self.tiny, started=self._started)
        self._started = True
        told = self._bytes_a_row(step.step)
        if told is None:
            self.assumed_size = True
            told = (mean + self.prompt_tokens) * rules.BYTES_A_TOKEN
        return self._made(step, StepEstimate(rows, tokens, 0.0, seconds, told * (rows + drawn)))  # ledger and data set

    def _of_training(self, step: PlannedStep, training: Optimization) -> StepEstimate:
        rows = self._rows_read(step)
        size = self._model_bytes(step)
        if rows is None and training.max_steps is None:
            return StepEstimate(None, 0.0, None, None, size)
        steps = rules.optimizer_steps(rows or 0.0, training)
        mean = rules.completion_tokens(self.history, None) or self._assumed_completion()
        sides = 2 if step.step == "train_preferences" else 1
        tokens = min(self.prompt_tokens + mean, training.max_length) * sides * training.global_batch_size * steps
        if isinstance(self.config.engine, Fake):
            return StepEstimate(None, 0.0, 0.0, rules.row_seconds(self.history, step.step, rows or 0.0), size)
        seconds = rules.training_seconds(self.history, step.step, steps, tiny=self.tiny)
        return StepEstimate(None, 0.0, tokens, seconds, size)

    def _of_rows(self, step: PlannedStep) -> StepEstimate:
        read = self._rows_read(step)
        left = rules.share_left(self.history, step.step)
        at_most = None if step.rows is None else float(step.rows)
        rows = read * left if left is not None and read is not None else at_most
        if not isinstance(step.made, DatasetRef):
            return StepEstimate(None, 0.0, 0.0, 0.0, 0.0)
        past = [one for one in self.history if one.step == step.step]
        if rows is None and past:  # as many as it wrote before
            rows = sum(one.rows or 0 for one in past) / len(past)
        gone_through = read if rows is None else rows
        if gone_through is None or (_asks_a_model(step) and not past):
            return self._made(step, StepEstimate(rows, 0.0, 0.0, None, None))
        told = self._bytes_a_row(step.step)
        if told is None:
            self.assumed_size = True
            told = (self.prompt_tokens + self._assumed_completion()) * rules.BYTES_A_TOKEN
        seconds = rules.row_seconds(self.history, step.step, gone_through)
        return self._made(step, StepEstimate(rows, 0.0, 0.0, seconds, told * gone_through))

    def _made(self, step: PlannedStep, one: StepEstimate) -> StepEstimate:
        if one.rows is not None and isinstance(step.made, DatasetRef):
            self._rows[step.made.digest] = one.rows
        return one

    def _rows_read(self, step: PlannedStep) -> float | None:
        """Rows of the data sets that drive a step: of those it trains on all, of others the first."""
        given = [value for name, value in step.arguments.items() if name != "held_out"]
        refs = [ref for ref in references_in(tuple(given)) if isinstance(ref, DatasetRef)]
        if not refs or any(ref.digest not in self._rows for ref in refs):
            return None
        trains = next(_settings(step.arguments, Optimization), None) is not None
        return sum(self._rows[ref.digest] for ref in (refs if trains else refs[:1]))

    def _in_ledger(self, arguments: Mapping[str, Any], sampling: Sampling) -> int:
        policy, prompts, template = arguments["policy"], arguments["prompts"], arguments["template"]
        assert isinstance(template, PromptTemplate)
        try:
            known = {row.prompt_id for row in read_rows(prompts, Prompt)}
        except DatasetError:  # they are made first
            return 0
        key = ledger_key(policy, template, sampling, arguments["engine"])
        found = look_for(key, known, sampling.rollouts_per_prompt)
        self.reused += found
        return found

    def _assumed_completion(self) -> float:
        samplings = list(_settings({"config": self.config}, Sampling))
        longest = max((one.max_completion_tokens for one in samplings), default=0)
        return longest * rules.ASSUMED_SHARE

    def _bytes_a_row(self, step: str) -> float | None:
        """As the newest data sets of the step have them."""
        if step not in self._bytes:
            sizes, rows = 0, 0
            for found in latest_results(step, RESULTS):
                if isinstance(found.value, dict) and "row_type" in found.value:
                    ref = DatasetRef.model_validate(found.value)
                    sizes, rows = sizes + _size(ref), rows + ref.rows
            self._bytes[step] = sizes / rows if sizes else None
        return self._bytes[step]

    def _model_bytes(self, step: PlannedStep) -> float | None:
        if isinstance(self.config.engine, Fake):
            return 0.0
        for found in latest_results(step.step, RESULTS):
            if isinstance(found.value, dict) and (digest := found.value.get("adapter") or found.value.get("digest")):
                return float(sum(file.bytes for file in read_checkpoint_manifest(str(digest)).files))
        tiny = next(_settings({"base": self.config.base}, TinyModel), None)
        if tiny is not None:
            self.assumed_size = True
            return rules.tiny_bytes(tiny)
        folder = Path(self.config.base.name)
        return (
            float(sum(file.stat().st_size for file in folder.iterdir() if file.is_file())) if folder.is_dir() else None
        )


def _size(ref: DatasetRef) -> int:
    try:
        return sum(file.bytes for file in read_manifest(ref).files)
    except DatasetError:
        return 0


def _asks_a_model(step: PlannedStep) -> bool:
    return "engine" in step.arguments and not isinstance(step.arguments["engine"], Fake | Scripted)


def _settings(value: Any, kind: Any) -> Iterator[Any]:
    """The settings of one kind inside of arguments, a config among them."""
    for one in value.values():
        yield from (found for _, found in parts(one, kind))


def _sources(history: History, estimator: _Estimator) -> dict[str, str]:
    """Where each figure comes from, in words."""
    drawn = any(past.drawn for past in history.past)
    length = history.told if drawn else "half of max_completion_tokens a completion, assumed"
    ledger = f"; {estimator.reused:,} rollouts are in the ledger already" if estimator.reused else ""
    if history.past:
        speed = history.told
    elif isinstance(estimator.config.engine, Fake):
        speed = "a fake engine takes none; rows at the speed of a laptop, assumed"
    elif estimator.tiny:
        speed = "what the demo's tiny model takes on two CPU cores (docs/TINY.md), assumed"
    else:
        speed = "steps that only move rows; nothing of this base and engine has run in this home"
    size = "the newest data sets and models of each step"
    return {
        "tokens_drawn": length + ledger,
        "tokens_trained": f"optimizer steps x batch x (first prompt + completion); completions: {length}",
        "seconds": speed,
        "bytes": f"{rules.BYTES_A_TOKEN:g} bytes a token, assumed" if estimator.assumed_size else size,
    }
