"""How a judge is asked about the two completions of a pair: five ways, each with what it needs to know."""

from string import Template
from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.specs import Settings
from tasks.judgements import Judge


class Asks(Settings):
    """What all ways of asking a judge have in common."""

    not_in_key = frozenset({"maximum_undecided", "maximum_error_rate", "pairs_per_shard"})

    maximum_undecided: float = Field(default=0.2, ge=0, le=1)  # share of the pairs it may leave undecided
    maximum_error_rate: float = Field(default=0.02, ge=0, le=1)  # share of the requests the engine may fail at
    pairs_per_shard: int = Field(default=2048, ge=1)  # judged at a time, and kept when the next ones fail


class LabelsAsk(Asks):
    """Each completion by itself: how likely the judge finds the positive label, from exact log-probs."""

    kind: Literal["labels"] = "labels"
    judge: Judge = Judge()


class LikelihoodAsk(Asks):
    """No question at all: how likely each completion is to a better writer, a token; Bradley-Terry makes it a share."""

    kind: Literal["likelihood"] = "likelihood"
    temperature: float = Field(default=0.2, gt=0)  # nats a token; a lead of so much is a share of 73 %


class PairwiseAsk(Asks):
    """Both completions at once, asked in both orders and averaged; orders that disagree make a tie (METHODS 4.6)."""

    kind: Literal["pairwise"] = "pairwise"
    text: str = (  # $prompt, $first and $second are filled in
        "Two completions of one prompt follow. Which one helps more? Say A or B and nothing else.\n\n"
        "Prompt:\n$prompt\n\nCompletion A:\n$first\n\nCompletion B:\n$second\n\nThe better one:"
    )
    first: str = Field(default="A", min_length=1)
    second: str = Field(default="B", min_length=1)
    read: Literal["logprobs", "text"] = "logprobs"  # text: for endpoints that tell no log-probs of given text
    max_completion_tokens: int = Field(default=8, ge=1)  # read: text
    minimum_label_mass: float = Field(default=0.01, ge=0, lt=1)  # read: logprobs; below, it said neither

    @model_validator(mode="after")
    def _can_be_asked(self) -> "PairwiseAsk":
        _check_names(self.text, {"prompt", "first", "second"})
        if self.first.startswith(self.second) or self.second.startswith(self.first):
            raise ValueError(
                f"of the labels {self.first!r} and {self.second!r} one begins the other, so they cannot be told apart"
            )
        return self


class ScoresAsk(Asks):
    """Each completion by itself: a number read from what the judge writes, averaged over some samples."""

    kind: Literal["scores"] = "scores"
    text: str = (  # $prompt and $completion are filled in
        "Rate how good this completion of the prompt is, from 0 (useless) to 10 (could not be better). Be strict about "
        "wrong facts.\n\nPrompt:\n$prompt\n\nCompletion:\n$completion\n\nAnswer with one line: Score: and the number."
    )
    highest: float = Field(default=10.0, gt=0)  # the lowest is 0
    samples: int = Field(default=3, ge=1)  # METHODS 4.4
    temperature: float = Field(default=0.7, ge=0)
    max_completion_tokens: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _can_be_asked(self) -> "ScoresAsk":
        _check_names(self.text, {"prompt", "completion"})
        return self


class RewardAsk(Asks):
    """A local reward model, that is one for sequence classification with one output; Bradley-Terry makes it a share."""

    not_in_key = Asks.not_in_key | {"batch_size"}

    kind: Literal["reward"] = "reward"
    max_length: int = Field(default=2048, ge=8)  # tokens, prompt and completion; longer ones are undecided
    batch_size: int = Field(default=8, ge=1)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"


AnyAsk = Annotated[LabelsAsk | LikelihoodAsk | PairwiseAsk | ScoresAsk | RewardAsk, Field(discriminator="kind")]


def _check_names(text: str, expected: set[str]) -> None:
    names = set(Template(text).get_identifiers())
    if names != expected:
        told = ", ".join(f"${name}" for name in sorted(expected))
        raise ValueError(f"the judge's text is to hold {told} and nothing else; found {sorted(names)!r}")
