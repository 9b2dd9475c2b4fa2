"""A policy and held-out prompts -> evaluated prompts, metrics, and the gate's decision."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from pydantic import Field, model_validator

from models.specs import EngineSettings, ModelRef, PromptTemplate, Sampling, Settings
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.hub import Source
from storage.rows import EvaluatedPrompt, Metric, ScoredRollout
from tasks.caching import step
from tasks.headlining import AVERAGE
from tasks.loading import load_prompts
from tasks.metrics import evaluate_prompt, parse_strategy, summarise
from tasks.promotion import Decision, Fall, Gate, Regression, decide, find_regression, hold_to_benchmarks
from tasks.recording import split
from tasks.sampling import sample_rollouts
from tasks.scoring import score_answers


class EvaluationPass(Settings):
    """Rollouts drawn once, and the strategies that are figured from them."""

    strategies: tuple[str, ...] = Field(min_length=1)  # "greedy", "mean@1", "pass@16", "maj@16", ...
    sampling: Sampling

    @model_validator(mode="after")
    def _has_enough_rollouts(self) -> "EvaluationPass":
        for name in self.strategies:
            parse_strategy(name).check(self.sampling)
        return self


class Evaluation(Settings):
    """How policies are measured: once on dev for the gate, and in as many passes as wanted on test for the report."""

    dev: Sampling
    test: tuple[EvaluationPass, ...] = Field(min_length=1)


class HeldOut(NamedTuple):
    """The prompts that no policy is trained on."""

    dev: DatasetRef
    test: DatasetRef


class Contender(NamedTuple):
    """A policy, the template it is prompted with, and how it did."""

    policy: ModelRef
    template: PromptTemplate
    dev: DatasetRef  # EvaluatedPrompt rows of the gate's strategy
    test: DatasetRef  # EvaluatedPrompt rows of all strategies
    benchmarks: DatasetRef | None = None  # EvaluatedPrompt rows of benchmarks, where the gate looks at them
    floor: DatasetRef | None = None  # the base's, which they may not be far below


def load_held_out(dev: Source, test: Source) -> HeldOut:
    """The prompts of both splits."""
    return HeldOut(load_prompts(dev, without=()), load_prompts(test, without=()))


def assess(
    policy: ModelRef,
    template: PromptTemplate,
    held_out: HeldOut,
    evaluation: Evaluation,
    gate: Gate,
    engine: EngineSettings,
    marker: str,
) -> Contender:
    """Sample, score and evaluate a policy on the dev split and on the test split."""

    def scored(prompts: DatasetRef, sampling: Sampling) -> DatasetRef:
        return score_answers(sample_rollouts(policy, prompts, template, sampling, engine), prompts, marker)

    with split("dev"):
        dev = evaluate_answers((scored(held_out.dev, evaluation.dev),), ((gate.strategy,),))
    with split("test"):
        test = evaluate_answers(
            tuple(scored(held_out.test, one.sampling) for one in evaluation.test),
            tuple(one.strategies for one in evaluation.test),
        )
    return Contender(policy, template, dev, test)


@step(version="1")
def evaluate_answers(scored: tuple[DatasetRef, ...], strategies: tuple[tuple[str, ...], ...]) -> DatasetRef:
    """One row a prompt and strategy; the n-th strategies look at the n-th scored rollouts.

    Raises:
        ValueError: prompts have different numbers of rollouts, as adaptive sampling leaves them.
    """
    rows = (
        evaluate_prompt(rollouts, parse_strategy(name))
        for reference, names in zip(scored, strategies, strict=True)
        for rollouts in _by_prompt(reference)
        for name in names
    )
    return write_rows(rows, EvaluatedPrompt, step="evaluated", parents=scored)


@step(version="1", assumed=Decision(True, "not decided yet", 0.0, 0.0, 0.0, 1.0, 0))
def decide_promotion(challenger: DatasetRef, incumbent: DatasetRef, gate: Gate) -> Decision:
    """Whether the challenger replaces the incumbent, by a paired test on the dev split."""
    return decide(list(read_rows(challenger, EvaluatedPrompt)), list(read_rows(incumbent, EvaluatedPrompt)), gate)


@step(version="1", assumed=Fall(False, "", 1.0, 0, 0, 0.0, 0.0))
def look_for_regression(challenger: DatasetRef, incumbent: DatasetRef, gate: Gate, regression: Regression) -> Fall:
    """Whether the challenger is significantly worse than the incumbent on the dev split."""
    asked = gate.model_copy(update={"regression": regression})  # which is in no gate's key
    return find_regression(
        list(read_rows(challenger, EvaluatedPrompt)), list(read_rows(incumbent, EvaluatedPrompt)), asked
    )


@step(version="1", assumed=Decision(True, "not decided yet", 0.0, 0.0, 0.0, 1.0, 0))
def decide_with_benchmarks(
    challenger: DatasetRef, incumbent: DatasetRef, benchmarks: DatasetRef, base_benchmarks: DatasetRef, gate: Gate
) -> Decision:
    """As `decide_promotion`, but a challenger whose benchmarks fall too far below the base's is turned down."""

    def figures(ref: DatasetRef) -> list[EvaluatedPrompt]:
        return [row for row in read_rows(ref, EvaluatedPrompt) if row.strategy != AVERAGE]

    assert gate.maximum_benchmark_drop is not None  # promote sees to it
    new, old = (list(read_rows(ref, EvaluatedPrompt)) for ref in (challenger, incumbent))
    held_to = figures(benchmarks), figures(base_benchmarks)
    return hold_to_benchmarks(decide(new, old, gate), *held_to, gate.maximum_benchmark_drop)


def metrics_of(evaluated: DatasetRef, split: str, seed: int) -> list[Metric]:
    """One figure with its interval for each strategy, in their order."""
    by_strategy: dict[str, list[EvaluatedPrompt]] = {}
    for row in read_rows(evaluated, EvaluatedPrompt):
        by_strategy.setdefault(row.strategy, []).append(row)
    return [summarise(rows, split, seed) for rows in by_strategy.values()]


def _by_prompt(scored: DatasetRef) -> Iterator[Sequence[ScoredRollout]]:
    number: int | None = None
    for prompt_id, group in groupby(read_rows(scored, ScoredRollout), key=lambda row: row.prompt_id):
        rollouts = list(group)
        if number not in (None, len(rollouts)):
            raise ValueError(
                f"{scored.name} has {number} rollouts of its first prompt and {len(rollouts)} of {prompt_id}: sampling "
                "that stops on what it finds is biased, and no figure is made of it; evaluate with as many of each"
            )
        number = len(rollouts)
        yield rollouts
