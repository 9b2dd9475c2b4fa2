"""Row types: what every recipe reads and writes. One type per idea; recipes differ in order, not in vocabulary.

A row type *is* its Parquet schema (storage/schemas.py). Text here is plain: no chat template, no special tokens.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Base of all row types."""


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
    name: str  # "auroc", "ece", "accuracy", "mean confidence", "share correct"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction(Row):
    """A demand on a completion that a program can check. Key: instruction_id."""

    instruction_id: str  # hash of the instruction's text
    instruction: str
    query_id: str  # prompt_id of the query it was proposed for
    query: str
    evaluation_types: list[str]  # kinds of instructions of the evaluation that it looks like; empty: of none
    writer: str  # identity of the supervisor


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier(Row):
    """A program that says whether a completion follows an instruction. Key: verifier_id."""

    verifier_id: str  # hash of instruction and source
    instruction_id: str
    source: str  # Python; defines `evaluate(response)`
    writer: str  # identity of the supervisor


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierCase(Row):
    """A made-up response and whether it follows the instruction. Key: (instruction_id, response)."""

    instruction_id: str
    response: str
    expected: bool
    writer: str  # identity of the supervisor


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedVerifier(Row):
    """A verifier after the cross-check with the cases. Key: verifier_id."""

    verifier_id: str
    instruction_id: str
    source: str
    kept: bool
    reason: str  # "kept", "trivial: ...", "disagrees with the cases", "instruction: ...", ...
    agreement: float | None  # share of the first half of the cases it agrees with; None: there are none
    held_out_agreement: float | None  # of the other half; None: as above, or it had failed before
    cases: int  # both halves
    isolation: str  # of the sandbox it ran in


@dataclass(frozen=True, slots=True, kw_only=True)
class BackTranslation(Row):
    """What a verifier checks in the supervisor's words, and how that fits the instruction. Key: verifier_id."""

    verifier_id: str
    instruction_id: str
    instruction: str
    back: str  # the instruction as read off the verifier
    verdict: str | None  # "same", "different", "contradiction"; None: the supervisor did not say
    reason: str  # "compared", "truncated", "no verdict", ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance(Row):
    """A query with an instruction: what a completion is drawn for. Key: prompt_id."""

    prompt_id: str  # hash of the prompt
    instruction_id: str
    query_id: str  # prompt_id of the query
    prompt: str  # query and instruction, as trained on and evaluated with
    query: str
    instruction: str
    split: str  # "train", "dev" or "test"; an instruction is in one of them only


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification(Row):
    """One verifier's word on one completion; of equal completions, on the first.

    Key: (prompt_id, rollout_index, verifier_id).
    """

    prompt_id: str
    rollout_index: int
    verifier_id: str
    outcome: str  # "passed", "failed"; no verdict: "error", "timeout", "memory", "forbidden", "invalid"
    detail: str
    shown: bool  # a verifier's source stood in the prompt when the completion was drawn
    isolation: str  # of the sandbox
