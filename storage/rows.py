"""Row types: what every recipe reads and writes. One type per idea; recipes differ in order, not in vocabulary.

A row type *is* its Parquet schema (storage/schemas.py). Text here is plain: no chat template, no special tokens.
"""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

R = TypeVar("R", bound="Row")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Base of all row types."""


def derive(row_type: type[R], row: Row, **more: Any) -> R:
    """A row of another type with what it has in common with this one, and more."""
    names = {field.name for field in fields(row)} - more.keys()
    return row_type(**{one.name: getattr(row, one.name) for one in fields(row_type) if one.name in names}, **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt(Row):
    """A text to answer, and its gold answer where there is one. Key: prompt_id."""

    prompt_id: str  # hash of source and text
    source: str  # where the row comes from, for instance "openai/gsm8k:train"
    prompt: str
    answer: str | None  # gold; None: the source has none


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(Row):
    """One sampled completion. Key: (prompt_id, rollout_index)."""

    prompt_id: str
    rollout_index: int
    prompt: str
    completion: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str  # "stop": the model ended it; "length": cut at max_completion_tokens; "error": none was drawn
    cumulative_logprob: float | None  # natural log, summed over the completion; None: the engine does not tell
    seed: int
    policy: str  # identity of the model that wrote it


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout(Row):
    """A rollout and its reward. Key: (prompt_id, rollout_index)."""

    prompt_id: str
    rollout_index: int
    prompt: str
    completion: str
    completion_tokens: int
    finish_reason: str
    cumulative_logprob: float | None
    policy: str
    answer: str | None  # the final answer found in the completion; None: there is none
    reward: float | None  # in [0, 1]; None: the scorer could not decide
    reason: str  # "match", "mismatch", "no final answer", "truncated", ...
    scorer: str  # name@version


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRollout(Row):
    """A rollout and what a judge thinks of it, without any gold answer. Key: (prompt_id, rollout_index)."""

    prompt_id: str
    rollout_index: int
    prompt: str
    completion: str
    completion_tokens: int
    finish_reason: str
    cumulative_logprob: float | None
    policy: str  # identity of the model that wrote the rollout
    answer: str | None  # the final answer found in the completion; None: there is none
    confidence: float | None  # that it is right, in [0, 1]; None: the judge did not say
    positive_logprob: float | None  # natural log, summed over the label's tokens
    negative_logprob: float | None
    judge: str  # identity of the model that judged
    reason: str  # "judged", "no label", "empty completion", "engine error", "not scored: ..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration(Row):
    """How far a judge can be trusted, one figure. Key: (judge, writer, group, name)."""

    judge: str  # identity of the model that judged
    writer: str  # "own": the judge's own rollouts; else whose they are
    group: str  # "all", or a range of difficulty: "solved 25-50 %"
    name: str  # "auroc", "auroc within prompts", "ece", "accuracy", "mean confidence", "share correct"
    value: float
    low: float | None  # 95 % interval over prompts; None: not figured
    high: float | None
    n: int  # rollouts
    prompts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration(Row):
    """A completion to imitate. Key: (task, prompt_id, iteration, rollout_index)."""

    task: str  # "solve": the completion answers the prompt; "judge": it says whether a rollout in the prompt is right
    prompt_id: str
    rollout_index: int | None  # None: not sampled (a human or procedural solution)
    iteration: int
    prompt: str
    completion: str
    reward: float | None
    source: str  # the policy that wrote it, or the data set it was taken from


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(Row):
    """Two completions of one prompt, one preferred. Names prompt, chosen, rejected are TRL's."""

    prompt_id: str
    iteration: int
    prompt: str
    chosen: str
    rejected: str
    chosen_index: int | None  # rollout_index; None: not sampled
    rejected_index: int | None
    chosen_reward: float | None
    rejected_reward: float | None
    margin: float | None  # chosen_reward - rejected_reward
    rule: str  # how the two were put together: "zip", "best_worst", "walk", "gold"
    swapped: bool  # a judge turned the pair round


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedPrompt(Row):
    """What one strategy scored on one held-out prompt. Key: (strategy, prompt_id)."""

    prompt_id: str
    strategy: str  # "greedy", "mean@1", "best-of-5 by likelihood", "pass@16", "maj@16", "maj@16 with filter", ...
    value: float  # in [0, 1]
    rollouts: int  # n: rollouts the strategy looked at
    k: int
    undecided: int  # of them, those whose scorer could not decide; they count as not correct
    answer: str | None  # what a voting or picking strategy answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric(Row):
    """A figure with its interval. Key: (split, strategy)."""

    split: str  # "dev" or "test"
    strategy: str
    value: float
    low: float  # 95 % interval
    high: float
    n: int  # prompts
    k: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMetric(Row):
    """One logged figure of a training run. Key: (optimizer_step, name)."""

    optimizer_step: int
    name: str  # TRL's: "loss", "rewards/margins", "mean_token_accuracy", ...
    value: float
