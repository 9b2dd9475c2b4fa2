"""What verifiers say of completions -> rewards: the share of votes, or None with a reason."""

from collections import Counter
from collections.abc import Iterator, Sequence

from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import Instance, ScoredRollout, Verification
from tasks import votes
from tasks.caching import log_counts, step
from tasks.verifying import SHOWN, Completions, NothingSurvives, drawn_for
from tasks.votes import Voting


@step(version="1")
def score_by_votes(
    instances: DatasetRef,
    plain: DatasetRef | None,
    shown: DatasetRef | None,
    verifications: DatasetRef,
    voting: Voting,
) -> DatasetRef:
    """Reward each completion with the share of its verifiers that it passes.

    Raises:
        NothingSurvives: too many completions have no reward; quotes the first.
    """
    instruction_of = {row.prompt_id: row.instruction_id for row in read_rows(instances, Instance)}
    trivial = votes.trivial_verifiers(read_rows(verifications, Verification), instruction_of, voting)
    isolation = next(read_rows(verifications, Verification)).isolation
    counts: Counter[str] = Counter()
    undecided: list[ScoredRollout] = []

    def rows() -> Iterator[ScoredRollout]:
        words = _Groups(read_rows(verifications, Verification))
        for instance, drawn in drawn_for(instances, Completions(plain, shown)):
            outcomes: dict[int, dict[str, str]] = {}
            for word in words.of(instance.prompt_id):
                outcomes.setdefault(word.rollout_index, {})[word.verifier_id] = word.outcome
            scored = votes.score_instance(instance, drawn, outcomes, trivial, voting, isolation)
            counts.update(votes.tally(scored))
            undecided.extend([row for row in scored if row.reward is None][: SHOWN - len(undecided)])
            yield from scored

    parents = [ref for ref in (instances, plain, shown, verifications) if ref is not None]
    reference = write_rows(rows(), ScoredRollout, step="scored", parents=parents, settings=voting.key())
    log_counts({**counts, **({"verifiers that accept everything": len(trivial)} if trivial else {})})
    if (without := reference.rows - _decided(reference)) > voting.maximum_undecided * reference.rows:
        raise NothingSurvives(_too_many_undecided(without, reference, counts, undecided, voting))
    return reference


class _Groups:
    """Verifications by prompt, read once from front to back; prompts without any are asked about too."""

    def __init__(self, rows: Iterator[Verification]) -> None:
        self._rows = rows
        self._head = next(rows, None)

    def of(self, prompt_id: str) -> Iterator[Verification]:
        while self._head is not None and self._head.prompt_id == prompt_id:
            yield self._head
            self._head = next(self._rows, None)


def _decided(scored: DatasetRef) -> int:
    return sum(row.reward is not None for row in read_rows(scored, ScoredRollout))


def _too_many_undecided(
    without: int, scored: DatasetRef, counts: Counter[str], first: Sequence[ScoredRollout], voting: Voting
) -> str:
    told = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
    quoted = "\n".join(f"  {row.reason}: {row.completion[:200]!r}" for row in first)
    return (
        f"{without:,} of {scored.rows:,} completions have no reward ({told}), and voting.maximum_undecided is "
        f"{voting.maximum_undecided:g}. The first:\n{quoted}\nWhere completions are truncated, raise "
        "max_completion_tokens; where verifiers broke, raise limits or consistency.minimum_verifiers; else raise "
        "voting.maximum_undecided."
    )
