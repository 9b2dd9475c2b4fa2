"""The reward of a completion: the share of its instruction's verifiers that it passes, from what the sandbox saw.

Only "passed" and "failed" are votes. A verifier that broke has not voted; where too few are left, the reward is None
with the reason. Seed 4 counts a verifier that raised as a failure of the completion (METHODS 5.4).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from string import Template
from typing import Literal, NamedTuple

from pydantic import Field, field_validator

from models.specs import Sampling, Settings
from storage.rows import Instance, Prompt, Rollout, ScoredRollout, Verification
from tasks.consistency import VERDICT
from tasks.instructions import asked, identity, with_names
from tasks.selection import same_text

SCORER = "verifiers@1"
PASSED, MIXED, FAILED = "passed", "mixed", "failed"
Outcomes = Mapping[str, str]  # verifier_id -> what it did with a completion


class Completing(Settings):
    """How completions are drawn. Defaults: seed 4, which shows the policy a verifier (METHODS 5.3.4).

    What it is trained on never shows one; seed 4's first version showed none, nor does the paper.
    """

    show_verifier: Literal["never", "half", "always"] = "always"  # half: of each instance's completions
    shown_text: str = (
        "Answer the query and follow the instruction below it. This function will check whether you followed it; write "
        "an answer for a person, not for the function.\n\n```python\n$verifier\n```\n\n$query\n$instruction"
    )
    sampling: Sampling = Sampling(rollouts_per_prompt=8, temperature=1.0, top_k=-1, max_completion_tokens=1024)

    _names = field_validator("shown_text")(lambda text: with_names(text, {"verifier", "query", "instruction"}))

    def plain(self) -> int:
        """Completions of an instance that are drawn without a verifier in sight."""
        wanted = self.sampling.rollouts_per_prompt
        return {"never": wanted, "half": wanted - wanted // 2, "always": 0}[self.show_verifier]


class Voting(Settings):
    """When the verifiers' votes are a reward."""

    not_in_key = frozenset({"maximum_undecided"})

    minimum_votes: int = Field(default=2, ge=1)
    # A verifier that accepted all completions of its instruction, at least so many different ones, while another
    # rejected some, has no vote any more; None: it keeps it (METHODS 5.6.4).
    accepts_all_of: int | None = Field(default=4, ge=2)
    maximum_undecided: float = Field(default=0.5, ge=0, le=1)  # share of the completions without a reward


class Drawn(NamedTuple):
    """A completion of an instance, and whether a verifier's source stood in its prompt."""

    rollout: Rollout
    rollout_index: int  # among all completions of the instance
    shown: bool


def show_verifier(instance: Instance, sources: Sequence[str], settings: Completing, seed: int) -> Prompt:
    """The instance's prompt with the source of one of its verifiers, drawn at random."""
    place = int(identity(str(seed), instance.prompt_id), 16) % len(sources)
    return asked(
        Template(settings.shown_text).substitute(
            verifier=sources[place].strip("\n"), query=instance.query, instruction=instance.instruction
        )
    )


def undecidable(rollout: Rollout) -> str | None:
    """Why no verifier is asked about a completion; None: they are."""
    if rollout.finish_reason in ("length", "error"):
        return {"length": "truncated", "error": "engine error"}[rollout.finish_reason]
    return None if rollout.completion.strip() else "empty completion"


def distinct(drawn: Iterable[Drawn]) -> list[Drawn]:
    """The first of each different completion that verifiers can be asked about."""
    first: dict[str, Drawn] = {}
    for one in drawn:
        if undecidable(one.rollout) is None:
            first.setdefault(same_text(one.rollout.completion), one)
    return list(first.values())


def trivial_verifiers(
    verifications: Iterable[Verification], instruction_of: Mapping[str, str], voting: Voting
) -> frozenset[str]:
    """Ids of the verifiers that accepted every completion, where another of the same instruction did not.

    Args:
        instruction_of: prompt_id -> instruction_id.
    """
    if voting.accepts_all_of is None:
        return frozenset()
    passed, failed = Counter[str](), Counter[str]()
    instructions: dict[str, str] = {}
    for row in verifications:
        instructions[row.verifier_id] = instruction_of[row.prompt_id]
        (passed if row.outcome == "passed" else failed)[row.verifier_id] += 1
    rejecting = {instructions[name] for name in failed}
    return frozenset(
        name
        for name, count in passed.items()
        if not failed[name] and count >= voting.accepts_all_of and instructions[name] in rejecting
    )


def vote(outcomes: Outcomes, trivial: frozenset[str], voting: Voting) -> tuple[float | None, str]:
    """(pass rate, reason), or (None, what the verifiers did instead of voting)."""
    votes = [VERDICT[outcome] for name, outcome in outcomes.items() if outcome in VERDICT and name not in trivial]
    if len(votes) >= voting.minimum_votes:
        rate = sum(votes) / len(votes)
        return rate, PASSED if rate == 1 else FAILED if rate == 0 else MIXED
    broken = Counter(outcome for outcome in outcomes.values() if outcome not in VERDICT)
    if broken:
        return None, f"verifiers broke: {', '.join(sorted(broken))}"
    return None, "too few verifiers left"


def score_instance(
    instance: Instance,
    drawn: Sequence[Drawn],
    outcomes: Mapping[int, Outcomes],
    trivial: frozenset[str],
    voting: Voting,
    isolation: str,
) -> list[ScoredRollout]:
    """The rewards of an instance's completions; equal completions have equal rewards.

    Args:
        outcomes: by the index of the first completion of each text.
    """
    first = {same_text(one.rollout.completion): one.rollout_index for one in distinct(drawn)}
    rows = []
    for one in drawn:
        rollout, fault = one.rollout, undecidable(one.rollout)
        index = first.get(same_text(rollout.completion), -1)
        reward, reason = (None, fault) if fault else vote(outcomes.get(index, {}), trivial, voting)
        rows.append(
            ScoredRollout(
                prompt_id=instance.prompt_id,
                rollout_index=one.rollout_index,
                prompt=instance.prompt,
                completion=rollout.completion,
                completion_tokens=rollout.completion_tokens,
                finish_reason=rollout.finish_reason,
                cumulative_logprob=rollout.cumulative_logprob,
                policy=rollout.policy,
                answer=None,
                reward=reward,
                reason=reason,
                scorer=f"{SCORER}, {isolation}",
            )
        )
    return rows


def tally(rows: Sequence[ScoredRollout]) -> Counter[str]:
    """Stages and reasons of one instance's completions, for the log line; equal texts pass or fail once."""
    counts = Counter({"completions": len(rows)})
    texts = {same_text(row.completion): row for row in rows}.values()
    counts["passing"] = sum(row.reward == 1 for row in texts)
    counts["mixed"] = sum(row.reward is not None and 0 < row.reward < 1 for row in texts)
    counts["failing"] = sum(row.reward == 0 for row in texts)
    counts["duplicate"] = len(rows) - len(texts)
    counts.update(row.reason for row in rows if row.reward is None)
    decided = [row.reward for row in rows if row.reward is not None]
    if decided and min(decided) == 1:
        counts["instances where all completions pass"] = 1
    if decided and max(decided) == 0:
        counts["instances where no completion passes"] = 1
    return +counts
