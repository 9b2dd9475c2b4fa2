"""Scored rollouts and sources -> rows of solving and of judging, to be trained together."""

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from storage.datasets import DatasetRef, read_rows, write_rows
from storage.hub import Source, read_source
from storage.rows import Demonstration, ScoredRollout
from tasks import mixtures as rules
from tasks.answers import answers_match, extract_answer, is_readable
from tasks.caching import log_counts, step
from tasks.judgements import Asking, judge_prompt
from tasks.loading import demonstrations_of, prompts_of
from tasks.mixtures import Mixture


@step(version="1")
def mix_tasks(
    solve: DatasetRef,
    scored: DatasetRef,
    asking: Asking,
    mixture: Mixture,
    iteration: int,
    part: Literal["train", "held out"],
) -> DatasetRef:
    """Demonstrations of solving and of judging together, each prompt as its whole user message.

    Raises:
        ClassMissing: the scored rollouts are all right or all wrong.
    """
    demonstrations = list(read_rows(solve, Demonstration))
    wanted = round(mixture.judge_rows_per_solve * len(demonstrations))
    judging = rules.judge_rows(
        read_rows(scored, ScoredRollout), asking.judge, mixture, wanted, iteration, asking.marker
    )
    rows = [*(rules.solve_row(row, asking.template) for row in demonstrations), *judging.rows]
    held_out = rules.held_out_prompts((row.prompt_id for row in rows), mixture)
    kept = [row for row in rows if (row.prompt_id in held_out) is (part == "held out")]
    if part == "train":
        tasks = Counter(row.task for row in kept)
        told = {"solve_rows": tasks["solve"], "judge_rows": tasks["judge"], "held out": len(rows) - len(kept)}
        log_counts(told | {name: n for name, n in judging.counts.items() if name not in told and n})
    return write_rows(
        kept, Demonstration, step="multitask", parents=[solve, scored], settings={"mixture": mixture.key()}
    )


@step(version="1")
def load_both_tasks(corpus: Source, judged: tuple[Source, ...], asking: Asking) -> DatasetRef:
    """A base corpus of solutions, then as many judgements with the one label as with the other."""
    solve = [rules.solve_row(row, asking.template) for row in demonstrations_of(corpus, asking.marker)]
    judging = [row for source in judged for row in judgements_of(source, asking)]
    labels = Counter(row.completion for row in judging)
    each = min(labels[asking.judge.positive], labels[asking.judge.negative])
    seen: Counter[str] = Counter()
    balanced = []
    for row in judging:
        seen[row.completion] += 1
        if seen[row.completion] <= each:
            balanced.append(row)
    log_counts({"solve_rows": len(solve), "judge_rows": len(balanced), "over balance": len(judging) - len(balanced)})
    return write_rows([*solve, *balanced], Demonstration, step="corpus", settings=asking.key())


def judgements_of(source: Source, asking: Asking) -> Iterator[Demonstration]:
    """Judge rows from a source whose completions are right or wrong by its own gold answers."""
    marker = asking.marker
    for prompt, row in zip(prompts_of(source), read_source(source), strict=True):
        answer = extract_answer(row.completion or "", marker)
        if row.completion is None or row.answer is None or answer is None or not is_readable(answer):
            continue
        right = answers_match(answer, row.answer)
        yield Demonstration(
            task="judge",
            prompt_id=prompt.prompt_id,
            rollout_index=None,
            iteration=0,
            prompt=judge_prompt(asking.judge, row.prompt, row.completion, marker),
            completion=asking.labels[0 if right else 1],
            reward=None,
            source=prompt.source,
        )
