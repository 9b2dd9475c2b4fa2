"""Scored rollouts -> demonstrations."""

from collections import Counter
from itertools import islice

from storage.datasets import DatasetRef, read_columns, read_rows, write_rows
from storage.rows import Demonstration, ScoredRollout
from tasks import selection as rules
from tasks.caching import log_counts, step
from tasks.selection import Scored, Selection

SHOWN = 3  # completions quoted when nothing could be kept


class NothingKept(RuntimeError):
    """No rollout was good enough to train on."""


@step(version="2", rows=lambda scored, selection, iteration, marker: selection.target_rows or scored.rows)
def select_demonstrations(scored: DatasetRef, selection: Selection, iteration: int, marker: str) -> DatasetRef:
    """Keep the rewarded rollouts, de-duplicated and capped per prompt; every drop is counted by reason.

    Raises:
        NothingKept: there is nothing to train on; counts the reasons and quotes the first completions.
    """
    rows = map(Scored._make, read_columns(scored, ScoredRollout, Scored._fields))
    selected = rules.select_demonstrations(rows, selection, iteration, marker=marker)
    if not selected.demonstrations:
        raise NothingKept(_nothing_kept(scored))
    log_counts({**selected.counts, **+selected.drops})
    return write_rows(
        selected.demonstrations, Demonstration, step="demonstrations", parents=[scored], settings=selection.key()
    )


def _nothing_kept(scored: DatasetRef) -> str:
    reasons = Counter(row.reason for row in read_rows(scored, ScoredRollout))
    told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
    first = "\n".join(f"  {row.completion[-200:]!r}" for row in islice(read_rows(scored, ScoredRollout), SHOWN))
    return (
        f"step 'select_demonstrations' kept 0 of {scored.rows:,} rollouts ({told}); see {scored.name}. The first "
        f"{SHOWN} completions end in:\n{first}\nIf they look right, the marker or the template is not what the model "
        "writes; if they are cut, raise max_completion_tokens; else start from a better base or draw more rollouts."
    )
