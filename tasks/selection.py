"""Which rollouts become demonstrations. Every row that does not has a reason, and every stage of the funnel a count."""

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Iterable
from operator import attrgetter
from typing import Literal, NamedTuple

from pydantic import Field

from models.specs import Settings
from storage.rows import Demonstration, ScoredRollout
from tasks.answers import trim_after_answer


class Scored(NamedTuple):
    """Of a scored rollout what selection and pairing look at: a million of these are read in a third of the time."""

    prompt_id: str
    rollout_index: int
    prompt: str
    completion: str
    finish_reason: str
    policy: str
    reward: float | None
    reason: str


AnyScored = Scored | ScoredRollout
Kept = dict[bytes, Demonstration]  # of one prompt: one for each different text


class Selection(Settings):
    """What is kept to learn from. The cap is ReST-EM's, at most 10 solutions a problem (arXiv:2312.06585)."""

    keep: Literal["rewarded", "all"] = "rewarded"  # all: the unfiltered control, right or wrong
    minimum_reward: float = Field(default=1.0, gt=0, le=1)
    deduplicate: bool = True
    max_per_prompt: int | None = Field(default=10, ge=1)
    target_rows: int | None = Field(default=None, ge=1)  # spread over as many prompts as there are
    trim_after_answer: bool = True  # what a completion says after its final answer is cut (METHODS 2.4)
    seed: int = Field(default=0, ge=0)


class Selected(NamedTuple):
    """`counts`: rows left after each stage, in order. `drops`: rows by reason; with "kept" they add up to "sampled"."""

    demonstrations: list[Demonstration]
    counts: dict[str, int]
    drops: Counter[str]


def select_demonstrations(
    scored: Iterable[AnyScored], settings: Selection, iteration: int, marker: str | None = None
) -> Selected:
    """Demonstrations ordered by (prompt_id, rollout_index), whatever the order of the rows.

    Rows are streamed; only those worth keeping are held in memory. Truncated and empty completions are never kept, not
    even in the unfiltered control, which else would compare lengths. "answered" counts what the scorer could decide;
    both it and "correct" count the unfiltered control's rows too, which do not depend on them.

    Args:
        marker: what the final answer stands after; None: completions have none, and are not trimmed.
    """
    marker = marker if settings.trim_after_answer else None
    counts = dict.fromkeys(("sampled", "answered", "correct", "after_deduplication", "after_cap", "kept"), 0)
    drops: Counter[str] = Counter()
    prompts: dict[str, Kept] = {}
    for row in scored:
        rewarded = row.reward is not None and row.reward >= settings.minimum_reward
        fault = _fault(row, rewarded=rewarded or settings.keep == "all")
        counts["sampled"] += 1
        counts["answered"] += row.reward is not None
        counts["correct"] += rewarded
        if fault is None:
            one = _demonstration(row, marker, iteration)
            _keep(prompts.setdefault(row.prompt_id, {}), one, settings, drops)
        else:
            drops[fault] += 1
    counts["after_deduplication"] = sum(map(len, prompts.values()))
    ranked = [
        (rank, row) for rows in prompts.values() for rank, row in enumerate(_capped(rows.values(), settings, drops))
    ]
    counts["after_cap"] = len(ranked)
    chosen = _up_to_target(ranked, settings, drops)
    counts["kept"] = len(chosen)
    chosen.sort(key=attrgetter("prompt_id", "rollout_index"))
    return Selected(chosen, counts, +drops)


def same_text(text: str) -> str:
    """What two texts share that differ in white space only."""
    return " ".join(text.split())


def _fault(row: AnyScored, *, rewarded: bool) -> str | None:
    if row.finish_reason == "length":
        return "truncated"
    if row.finish_reason == "error":
        return row.reason
    if not row.completion.strip():
        return "empty completion"
    return None if rewarded else row.reason


def _keep(kept: Kept, row: Demonstration, settings: Selection, drops: Counter[str]) -> None:
    text = same_text(row.completion) if settings.deduplicate else str(row.rollout_index)
    fingerprint = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
    twin = kept.setdefault(fingerprint, row)
    if twin is row:
        return
    drops["duplicate"] += 1
    if _index(row) < _index(twin):
        kept[fingerprint] = row


def _capped(rows: Collection[Demonstration], settings: Selection, drops: Counter[str]) -> list[Demonstration]:
    if len(rows) <= (settings.max_per_prompt or len(rows)) and settings.target_rows is None:
        return list(rows)  # none is over a limit, so their order does not matter
    shuffled = sorted(rows, key=_index)
    random.Random(f"{settings.seed}:{shuffled[0].prompt_id}").shuffle(shuffled)
    capped = shuffled[: settings.max_per_prompt]
    drops["over max_per_prompt"] += len(shuffled) - len(capped)
    return capped


def _up_to_target(
    ranked: list[tuple[int, Demonstration]], settings: Selection, drops: Counter[str]
) -> list[Demonstration]:
    if settings.target_rows is not None and len(ranked) > settings.target_rows:
        drops["over target_rows"] += len(ranked) - settings.target_rows
        # every prompt's first row comes before any prompt's second
        places = {row.prompt_id: random.Random(f"{settings.seed}:{row.prompt_id}").random() for _, row in ranked}
        ranked = sorted(ranked, key=lambda entry: (entry[0], places[entry[1].prompt_id], entry[1].prompt_id))
        ranked = ranked[: settings.target_rows]
    return [row for _, row in ranked]


def _index(row: Demonstration) -> int:
    assert row.rollout_index is not None  # it is a rollout's
    return row.rollout_index


def _demonstration(row: AnyScored, marker: str | None, iteration: int) -> Demonstration:
    return Demonstration(
        task="solve",
        prompt_id=row.prompt_id,
        rollout_index=row.rollout_index,
        iteration=iteration,
        prompt=row.prompt,
        completion=row.completion if marker is None else trim_after_answer(row.completion, marker),
        reward=row.reward,
        source=row.policy,
    )
