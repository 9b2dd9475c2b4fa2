"""Row types: what every recipe reads and writes. One type per idea; recipes differ in order, not in vocabulary.

A row type *is* its Parquet schema (storage/schemas.py). Text here is plain: no chat template, no special tokens.
"""

from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar

R = TypeVar("R", bound="Row")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Base of all row types."""


def derive(row_type: type[R], row: Row, **more: Any) -> R:
    """A row of another type with what it has in common with this one, and more."""
    shared = _shared(row_type, type(row))  # type: ignore[arg-type]  # mypy takes a row's hash for that of its type
    return row_type(**{name: getattr(row, name) for name in shared if name not in more}, **more)


@cache
def _shared(one: type[Row], other: type[Row]) -> list[str]:
    names = {field.name for field in fields(other)}
    return [field.name for field in fields(one) if field.name in names]


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
class PassRate(Row):
    """What the rollouts of a prompt came to when it was last sampled for training. Key: prompt_id.

    Adaptive sampling stops on what it finds, so `correct / rollouts` is biased; of the first rollouts it is not.
    """

    prompt_id: str
    iteration: int  # when that was
    rollouts: int
    correct: int
    incorrect: int
    undecided: int
    first_rollouts: int  # those that were drawn whatever came of them
    first_correct: int  # of these


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldCheck(Row):
    """What the rollouts of a prompt say of its gold answer. Key: prompt_id."""

    prompt_id: str
    prompt: str
    gold: str
    majority: str | None  # the answer that most of them give; None: no answer can be read
    agreement: float | None  # share of the votes for it
    votes: int  # rollouts with an answer that can be read
    verdict: str  # "agrees", "suspect": a confident majority says otherwise; "unsure": there is no confident majority


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
class Conversation(Row):
    """A chat to imitate; its last message is the assistant's. Key: prompt_id."""

    prompt_id: str  # hash of source and of all messages but the last
    roles: list[str]  # "system" (first, if at all), then "user" and "assistant" in turn
    contents: list[str]  # of each message
    source: str
    licence: str  # of the source, as its settings state it
    line: int  # in the source, counted from 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPair(Row):
    """Two replies to one chat, one preferred. Key: (prompt_id, line)."""

    prompt_id: str  # hash of source and messages
    roles: list[str]  # of the messages that are replied to; the last is the user's
    contents: list[str]
    chosen: str
    rejected: str
    source: str
    licence: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(Row):
    """What a judge thinks of both sides of a pair as it was made. Key: (prompt_id, rejected_index)."""

    prompt_id: str
    rejected_index: int | None
    chosen_reward: float | None  # in [0, 1]; None: the judge could not decide
    rejected_reward: float | None
    margin: float | None  # chosen_reward - rejected_reward; 0: a tie, also where both orders disagree
    reason: str  # "judged", "orders disagree", "no label", "no score", "not scored: ...", "engine error: ..."
    judge: str  # identity of the model that judged


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFigure(Row):
    """What the pairs of one iteration look like, one figure. Key: (about, name)."""

    about: str  # "chosen", "rejected": lengths of that side; "pairs"; "judged": pairs by what the judge's margin says
    name: str  # "tokens, mean", "swapped", "gold better", "small margin", ...
    value: float
    n: int  # rows it was figured from


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
class Overlap(Row):
    """How much of what a policy was trained on stands in the prompts of a held-out split too. Key: split."""

    split: str  # "dev" or "test"
    training_rows: int
    sharing_rows: int  # that share a run of words with a held-out prompt
    held_out_prompts: int
    shared_prompts: int  # that share one with a training row
    run_words: int  # of a prompt with fewer, the whole


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


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkSample(Row):
    """What a policy answered to one document of a benchmark. Key: (policy, benchmark, task, filter, document)."""

    benchmark: str  # "mmlu"
    task: str  # lm-eval's: "mmlu_astronomy"
    document: int  # its place in the split
    filter: str  # how the answer was read: "strict-match", "flexible-extract", "none"
    roles: list[str]  # of the messages put to the policy; "plain": one text without a chat template
    contents: list[str]
    continuations: list[str]  # the choices that were scored; empty where a completion was sampled
    logprobs: list[float]  # natural, summed over each continuation's tokens
    completions: list[str]
    answers: list[str]  # what the filter found in the completions
    target: str
    metrics: list[str]
    values: list[float]  # of each metric, in [0, 1]
    weights: list[int]  # what each value is the mean of: IFEval's instructions; else 1
    cut_tokens: int  # of the beginning of a prompt that was too long
    documents: int  # that the split holds
    limit: int | None  # of documents; None: all
    shots: int
    policy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkMetric(Row):
    """A figure of a benchmark with its interval. Key: (policy, benchmark, task, metric, filter)."""

    benchmark: str
    task: str  # the benchmark's name: over all of its tasks
    metric: str  # lm-eval's: "acc", "acc_norm", "exact_match", "prompt_level_strict_acc", ...
    filter: str
    value: float
    low: float  # 95 % interval over documents
    high: float
    n: int  # documents
    documents: int  # that the benchmark holds; n is smaller under a limit
    limit: int | None  # of documents a task; None: all
    shots: int
    rendering: str  # "chat template" or "plain"
    cut_prompts: int  # documents whose prompt was too long and lost its beginning
    note: str  # what else keeps the figure from being compared with others'; empty: nothing known
    policy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScore(Row):
    """How likely a policy finds one token of a text. Key: (policy, sequence, position)."""

    sequence: int  # its text, counted from 0
    prompt_id: str
    rollout_index: int | None
    side: str  # "completion", "chosen" or "rejected"
    about: str  # what is known of the text: "reward 1, match"
    position: int  # from 0, the prompt's tokens first
    is_prompt: bool
    token_id: int
    token: str  # its text; a character that several tokens make up stands at the last of them
    logprob: float | None  # natural, given all tokens before it; None: the very first
    cut_tokens: int  # of the text's end, which the engine's context does not hold
    policy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenComparison(Row):
    """One token of a text under two policies. Key: (policy, reference, sequence, position)."""

    sequence: int
    prompt_id: str
    rollout_index: int | None
    side: str
    about: str
    position: int
    is_prompt: bool
    token_id: int
    token: str
    policy_logprob: float | None
    reference_logprob: float | None
    difference: float | None  # policy_logprob - reference_logprob
    cut_tokens: int
    policy: str
    reference: str
