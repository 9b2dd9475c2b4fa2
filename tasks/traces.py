"""What is told of one row followed through an experiment. All of it is plain JSON."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from tasks.lineage import Split

Became = Literal["demonstration", "judge row", "chosen", "rejected"]


class Told(BaseModel):
    """Base of what is told; all of it is plain JSON."""

    model_config = ConfigDict(frozen=True)


class TracedPrompt(Told):
    """Where the prompt stands."""

    dataset: str
    step: str
    iteration: int | None
    source: str
    prompt: str
    answer: str | None


class Verdict(Told):
    """What the scorer said."""

    dataset: str
    reward: float | None
    reason: str
    answer: str | None
    scorer: str


class Judgement(Told):
    """What a judge thinks of the rollout, without having seen the gold answer."""

    dataset: str
    judge_label: str  # as policy_label
    confidence: float | None  # that it is right; None: see reason
    reason: str


class Use(Told):
    """What a rollout became, or why it became nothing."""

    dataset: str
    iteration: int | None
    became: Became | None  # None: see why_not
    why_not: str | None
    times: int  # a side of a pair may be used more than once


class TracedRollout(Told):
    """One rollout, and what came of it."""

    dataset: str
    iteration: int | None
    split: Split
    rollout_index: int
    policy: str
    policy_label: str  # "base", "iteration 1"; the identity where no iteration has that policy
    seed: int
    finish_reason: str
    completion: str
    verdicts: tuple[Verdict, ...]
    judgements: tuple[Judgement, ...]
    uses: tuple[Use, ...]


class Training(Told):
    """A training that read rows of this prompt."""

    step: str
    iteration: int | None
    dataset: str
    rows: int  # of this prompt
    checkpoint: str
    label: str | None  # None: no iteration has this policy
    promoted: bool | None


class TracedEvaluation(Told):
    """What a strategy scored on the prompt."""

    label: str
    iteration: int
    split: Split
    strategy: str
    value: float
    rollouts: int
    k: int
    undecided: int
    answer: str | None


class GivenCompletion(Told):
    """A demonstration that was not sampled, but came with the source."""

    dataset: str
    source: str
    prompt: str
    completion: str


class ExperimentTrace(Told):
    """The row in one experiment, in the order in which things happened."""

    experiment: str
    prompts: tuple[TracedPrompt, ...]
    given: tuple[GivenCompletion, ...]
    rollouts: tuple[TracedRollout, ...]
    trainings: tuple[Training, ...]
    evaluations: tuple[TracedEvaluation, ...]
    gaps: tuple[str, ...]  # data sets that could not be read


class LedgerOnly(Told):
    """A rollout that was drawn, but no experiment that is shown has gathered it."""

    ledger: str
    rollout_index: int
    policy: str
    seed: int
    finish_reason: str
    completion: str


class Trace(Told):
    """All that the home knows of a prompt, or of one of its rollouts."""

    prompt_id: str
    rollout_index: int | None
    experiments: tuple[ExperimentTrace, ...]
    ledger_only: tuple[LedgerOnly, ...]
