"""A policy plays against the demonstrations: its rollouts -> pairs, their lengths, and the side to imitate (SPIN)."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby

from models import fake_engine
from models.chat import load_tokenizer, messages_of, render_completion
from models.specs import ModelRef, PromptTemplate
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import Comparison, Demonstration, Pair, PairFigure, Rollout
from tasks import comparisons as verdicts
from tasks import pairs as rules
from tasks.caching import log_counts, step
from tasks.comparisons import Labelling
from tasks.serving import local_model

_WORD = re.compile(r"\S+")


class NothingToLearn(RuntimeError):
    """No pair is left to train on."""


@step(version="1", rows=lambda rollouts, *_: rollouts.rows)
def pair_with_gold(
    rollouts: DatasetRef,
    demonstrations: DatasetRef,
    policy: ModelRef,
    template: PromptTemplate,
    max_completion_tokens: int,
    iteration: int,
) -> DatasetRef:
    """Each rollout against the demonstration of its prompt, both no longer than the same cap, all drops counted.

    A rollout at the cap was cut and is dropped; so is a demonstration that would not fit into it: else length alone
    would tell the sides apart (METHODS 4.6).

    Raises:
        NothingToLearn: no pair could be made; counts the reasons.
    """
    tokens = token_counter(policy, template)
    gold = {row.prompt_id: row for row in read_rows(demonstrations, Demonstration)}
    counts = Counter({"sampled": rollouts.rows, "pairs": 0})

    def pairs() -> Iterator[Pair]:
        for prompt_id, group in groupby(read_rows(rollouts, Rollout), key=lambda row: row.prompt_id):
            one, drawn = gold[prompt_id], list(group)
            if tokens(one.prompt, one.completion) > max_completion_tokens:
                counts["demonstration over max_completion_tokens"] += len(drawn)
                continue
            paired = rules.pair_with_gold(one, drawn, iteration)
            counts.update(paired.drops)
            counts["pairs"] += len(paired.pairs)
            yield from paired.pairs
        if not counts["pairs"]:
            told = ", ".join(f"{reason} {n:,}" for reason, n in counts.items() if reason not in ("sampled", "pairs"))
            raise NothingToLearn(
                f"step 'pair_with_gold' made no pair of {rollouts.rows:,} rollouts ({told}); where they are cut, raise "
                "sampling.max_completion_tokens; where the policy writes the demonstrations itself, SPIN has nothing "
                "left to teach it (METHODS 4.6)"
            )

    reference = write_rows(pairs(), Pair, step="pairs", parents=[rollouts, demonstrations])
    log_counts(counts)
    return reference


@step(version="1")
def describe_pairs(
    pairs: DatasetRef,
    policy: ModelRef,
    template: PromptTemplate,
    comparisons: DatasetRef | None,
    labelling: Labelling | None,
    noisy_below: float | None,
) -> DatasetRef:
    """Lengths of both sides as they are trained on, and what the judge made of the pairs, for the report."""
    tokens = token_counter(policy, template)
    rows = list(read_rows(pairs, Pair))
    figures = [
        *verdicts.lengths("chosen", [tokens(row.prompt, row.chosen) for row in rows]),
        *verdicts.lengths("rejected", [tokens(row.prompt, row.rejected) for row in rows]),
    ]
    if comparisons is not None and labelling is not None:
        compared = list(read_rows(comparisons, Comparison))
        figures += verdicts.label_figures(rows, compared, labelling, noisy_below)
    log_counts({row.name: int(row.value) for row in figures if row.about in ("judged", "pairs")})
    return write_rows(figures, PairFigure, step="pair_figures", parents=[pairs])


@step(version="1", rows=lambda pairs, iteration: pairs.rows)
def imitate_chosen(pairs: DatasetRef, iteration: int) -> DatasetRef:
    """The chosen sides as demonstrations, for the comparison with plain fine-tuning on the same prompts."""

    def demonstrations() -> Iterator[Demonstration]:
        for row in read_rows(pairs, Pair):
            yield Demonstration(
                task="solve",
                prompt_id=row.prompt_id,
                rollout_index=row.chosen_index,
                iteration=iteration,
                prompt=row.prompt,
                completion=row.chosen,
                reward=row.chosen_reward,
                source=f"chosen of {pairs.name}",
            )

    reference = write_rows(demonstrations(), Demonstration, step="imitated", parents=[pairs])
    log_counts({"kept": reference.rows})
    return reference


def token_counter(policy: ModelRef, template: PromptTemplate) -> Callable[[str, str], int]:
    """A function that counts a completion's tokens, the end of the turn included, as an engine does; by prompt too."""
    local = local_model(policy)
    if fake_engine.is_fake(local.weights):
        return lambda _, completion: len(_WORD.findall(completion))
    tokenizer = load_tokenizer(local.weights, policy.chat_template, policy.trust_remote_code, revision=policy.revision)
    return lambda prompt, completion: len(render_completion(tokenizer, messages_of(template, prompt), completion))
