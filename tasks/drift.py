"""What rollouts are like as a whole: how long, how often cut, how often the same, decided for what reasons."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tasks.metrics import is_correct


class Solved(NamedTuple):
    """Of a prompt's rollouts, how many are right."""

    rollouts: int
    correct: int

    def and_one(self, reward: float | None) -> "Solved":
        """With one rollout more, which got this reward."""
        return Solved(self.rollouts + 1, self.correct + is_correct(reward))

    @property
    def rate(self) -> float:
        """The share that is right."""
        return self.correct / self.rollouts


class RolloutTally:
    """Counts over the columns of rollouts, batch by batch; the rollouts of a prompt follow each other.

    What it holds grows with the different lengths and reasons there are, not with the rollouts.
    """

    def __init__(self) -> None:
        self.tokens: Counter[int] = Counter()  # length of a completion -> rollouts
        self.truncated = self.duplicates = 0
        self.reasons: Counter[tuple[str, bool]] = Counter()  # (reason, whether it was decided) -> rollouts
        self._ended: Counter[Solved] = Counter()  # of the prompts before the present one
        self._prompt, self._solved, self._texts = "", Solved(0, 0), set[str]()

    @property
    def rollouts(self) -> int:
        """All that were counted."""
        return self.tokens.total()

    @property
    def prompts(self) -> Counter[Solved]:
        """How many prompts have just so many rollouts and so many right ones."""
        return self._ended + Counter([self._solved] if self._texts else [])

    @property
    def undecided(self) -> int:
        """Rollouts whose scorer could not decide."""
        return sum(count for (_, decided), count in self.reasons.items() if not decided)

    @property
    def correct(self) -> int:
        """Rollouts that are right."""
        return sum(solved.correct * count for solved, count in self.prompts.items())

    def add(
        self,
        prompt_ids: Sequence[str],
        completions: Sequence[str],
        tokens: Sequence[int],
        finish_reasons: Sequence[str],
        verdicts: tuple[Sequence[float | None], Sequence[str]] | None,
    ) -> None:
        """Count a batch.

        Args:
            verdicts: rewards and reasons; None: these rollouts are not scored.
        """
        self.tokens.update(tokens)
        self.truncated += sum(reason == "length" for reason in finish_reasons)
        rewards: Sequence[float | None] = [None] * len(prompt_ids)
        if verdicts is not None:
            rewards = verdicts[0]
            decided = (reward is not None for reward in rewards)
            self.reasons.update(zip(verdicts[1], decided, strict=True))
        for prompt_id, completion, reward in zip(prompt_ids, completions, rewards, strict=True):
            if prompt_id != self._prompt:
                if self._texts:
                    self._ended[self._solved] += 1
                self._prompt, self._solved, self._texts = prompt_id, Solved(0, 0), set()
            text = completion.strip()
            self.duplicates += text in self._texts
            self._texts.add(text)
            self._solved = self._solved.and_one(reward)


def mean_length(tokens: Mapping[int, int]) -> float:
    """The mean of lengths, each standing there so many times."""
    return sum(length * count for length, count in tokens.items()) / sum(tokens.values())


def quantile(tokens: Mapping[int, int], share: float) -> int:
    """The smallest length that this share of the rollouts does not exceed; 0.5: the lower median."""
    wanted, seen = share * sum(tokens.values()), 0
    for length in sorted(tokens):
        seen += tokens[length]
        if seen >= wanted:
            return length
    raise ValueError("no rollouts were counted, so there is no length that half of them have")


class Change(NamedTuple):
    """How a prompt's share of right rollouts went from one policy to another."""

    prompt_id: str
    before: float
    after: float


def most_changed(
    before: Mapping[str, Solved], after: Mapping[str, Solved], most: int
) -> tuple[list[Change], list[Change]]:
    """The prompts that got better, and those that got worse: the largest changes first, at most so many of each.

    Only prompts that both have are compared; of equal changes the smaller id comes first.
    """
    changes = [Change(one, before[one].rate, after[one].rate) for one in before if one in after]
    gained = [change for change in changes if change.after > change.before]
    lost = [change for change in changes if change.after < change.before]
    return (
        sorted(gained, key=lambda change: (change.before - change.after, change.prompt_id))[:most],
        sorted(lost, key=lambda change: (change.after - change.before, change.prompt_id))[:most],
    )
