"""What a policy is asked about rollouts as their judge, and how sure its answer is.

Rules of seed 0's second experiment (METHODS 3.4), without its faults (METHODS 3.6). One vocabulary of two labels is
trained, asked for and scored. A confidence is p(positive) / (p(positive) + p(negative)), from exact log-probs of the
whole labels, so labels of several tokens are fine. What is made of it: labels, mixtures, filters, calibrations.
"""

from collections.abc import Iterable, Sequence
from math import exp, isfinite
from string import Template
from typing import Literal

from pydantic import Field, model_validator

from models.specs import PromptTemplate, Settings
from storage.rows import JudgedRollout
from tasks.answers import trim_after_answer

JUDGED = "judged"
NO_LABEL = "no label"


class Judge(Settings):
    """What the judge is asked, and the two labels it may answer with. Seed 0: Correct and Incorrect."""

    not_in_key = frozenset({"maximum_undecided", "rollouts_per_shard"})

    text: str = (  # $prompt and $completion are filled in; it ends without a space (METHODS 2.6.13)
        "Is the final answer of this solution right? Say Correct or Incorrect.\n\n"
        "Question: $prompt\n\nSolution:\n$completion\n\nVerdict:"
    )
    positive: str = Field(default="Correct", min_length=1)
    negative: str = Field(default="Incorrect", min_length=1)
    label_tokens: Literal["one", "any"] = "any"  # one: refuse labels that are not a single token each
    minimum_label_mass: float = Field(default=0.01, ge=0, lt=1)  # p(positive) + p(negative); below, it said neither
    maximum_undecided: float = Field(default=0.2, ge=0, le=1)  # share of the rollouts it may leave undecided
    rollouts_per_shard: int = Field(default=4096, ge=1)  # judged at a time, and kept when the next ones fail

    @model_validator(mode="after")
    def _can_be_asked(self) -> "Judge":
        names = set(Template(self.text).get_identifiers())
        if names != {"prompt", "completion"}:
            raise ValueError(f"the judge's text is to hold $prompt and $completion and nothing else; found {names!r}")
        if self.text[-1] in " \t":
            raise ValueError(f"the judge's text ends in {self.text[-1]!r}, which a tokenizer would cut off; remove it")
        for label, other in ((self.positive, self.negative), (self.negative, self.positive)):
            if label != label.strip():
                raise ValueError(f"the label {label!r} begins or ends in white space; remove it")
            if other.startswith(label):
                raise ValueError(
                    f"the label {other!r} begins with the label {label!r}, so the shorter would always be the "
                    "likelier; choose labels of which neither begins the other"
                )
        return self


class Asking(Settings):
    """How rollouts are put before the judge."""

    judge: Judge
    template: PromptTemplate  # that solving uses; its system message is the judge's too
    marker: str

    @property
    def labels(self) -> tuple[str, str]:
        """Positive, negative."""
        return self.judge.positive, self.judge.negative


def judge_prompt(judge: Judge, prompt: str, completion: str, marker: str) -> str:
    """What the judge is asked about a completion, cut after its final answer; a `$` in either stays a `$`."""
    return Template(judge.text).substitute(prompt=prompt, completion=trim_after_answer(completion, marker))


def filled_template(template: PromptTemplate, prompt: str) -> str:
    """The user message that asks for a solution, as one text: rows of two tasks share the template `as_it_is`."""
    return Template(template.user).substitute(prompt=prompt)


def as_it_is(template: PromptTemplate) -> PromptTemplate:
    """The template for rows whose prompt is the whole user message already; the system message stays.

    Raises:
        ValueError: the prompt stands in the system message too, which judging has no place for.
    """
    if template.system is not None and "$" in template.system:
        raise ValueError(
            f"the system message holds a $: {template.system!r}; solving and judging share it, so put $prompt into "
            "template.user"
        )
    return PromptTemplate(system=template.system)


def label_faults(judge: Judge, probes: Iterable[Sequence[Sequence[float]]]) -> list[str]:
    """What is wrong with the labels for this tokenizer, from the token log-probs of (positive, negative) on probes.

    Labels that begin with the same token are told by the same log-prob there on every probe.
    """
    known = list(probes)
    lengths = [len(tokens) for tokens in known[0]]
    faults = []
    if judge.label_tokens == "one" and lengths != [1, 1]:
        told = ", ".join(f"{label!r} {n}" for label, n in zip((judge.positive, judge.negative), lengths, strict=True))
        faults.append(f"label_tokens is 'one' but the labels take so many tokens: {told}; choose others, or say 'any'")
    share_first = all(positive[:1] == negative[:1] for positive, negative in known)
    if share_first and (judge.label_tokens == "one" or 1 in lengths):
        faults.append(
            f"the labels {judge.positive!r} and {judge.negative!r} share their first token, so one token does not tell "
            "them apart; choose labels that begin differently"
        )
    return faults


def confidence(judge: Judge, positive_logprob: float, negative_logprob: float) -> float | None:
    """p(positive) / (p(positive) + p(negative)); None: the two together are less likely than `minimum_label_mass`."""
    if not (isfinite(positive_logprob) or isfinite(negative_logprob)):
        return None
    if exp(positive_logprob) + exp(negative_logprob) < judge.minimum_label_mass:
        return None
    difference = negative_logprob - positive_logprob
    return 1.0 / (1.0 + exp(difference)) if difference < 700 else 0.0


def sureness(row: JudgedRollout) -> float:
    """To order by: the confidence, and less than any where the judge did not say."""
    return -1.0 if row.confidence is None else row.confidence
