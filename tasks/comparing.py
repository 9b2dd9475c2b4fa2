"""A judge compares both sides of pairs -> comparisons; comparisons -> pairs kept, swapped or dropped.

Every verdict is stored, so that other thresholds need no new judging. What the judge cannot decide is a row with a
reason; an engine that fails at more than a few requests is a failure of the step, and nothing of it is kept.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import NamedTuple

from models.chat import messages_of
from models.engine import EngineConfigurationError, EngineError, Message, Request
from models.reward_models import RewardJob, score_in_child
from models.specs import EngineSettings, ModelRef, PromptTemplate, Sampling
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import Comparison, Pair
from tasks import comparisons as rules
from tasks.asks import AnyAsk, LabelsAsk, LikelihoodAsk, PairwiseAsk, RewardAsk, ScoresAsk
from tasks.caching import log_counts, step, with_retries
from tasks.comparisons import Labelling, Verdict
from tasks.judgements import confidence, judge_prompt
from tasks.judging import JudgeError
from tasks.playing import NothingToLearn
from tasks.serving import give_back_accelerator, local_model, raise_if_stopping, serve

CALLS_AT_ONCE = 128  # threads that share the engine, so that its batch stays full
SHOWN = 3  # pairs quoted in an error
TOO_LONG = "longer than max_length"

log = logging.getLogger("ratchet")


class Hearing(NamedTuple):
    """A judge and how it is asked."""

    judge: ModelRef
    asks: AnyAsk
    template: PromptTemplate  # what stands around the judge's text; for a reward model, around the prompt
    engine: EngineSettings
    marker: str


class Told(NamedTuple):
    """What an engine answered to one question, or why it did not."""

    value: float | None
    failure: str


def compare_pairs(
    judge: ModelRef, pairs: DatasetRef, asks: AnyAsk, template: PromptTemplate, engine: EngineSettings, marker: str
) -> DatasetRef:
    """Comparison rows in the pairs' order. A kill or a failure loses the shard under way and no other.

    Raises:
        JudgeError: the judge left too many pairs undecided; quotes the first.
    """
    starts = range(0, pairs.rows, asks.pairs_per_shard)
    shards = tuple(compare_shard(judge, pairs, start, asks, template, engine, marker) for start in starts)
    return gather_comparisons(shards, asks)


@step(version="1", rows=lambda judge, pairs, start, asks, *_: min(asks.pairs_per_shard, pairs.rows - start))
def compare_shard(
    judge: ModelRef,
    pairs: DatasetRef,
    start: int,
    asks: AnyAsk,
    template: PromptTemplate,
    engine: EngineSettings,
    marker: str,
) -> DatasetRef:
    """The verdicts on the pairs from `start` on, `pairs_per_shard` of them; equal questions are asked once."""
    rows = list(islice(read_rows(pairs, Pair), start, start + asks.pairs_per_shard))
    hearing = Hearing(judge, asks, template, engine, marker)
    verdicts = _by_reward_model(rows, hearing, asks) if isinstance(asks, RewardAsk) else _by_engine(rows, hearing)
    compared = (
        Comparison(
            prompt_id=row.prompt_id,
            rejected_index=row.rejected_index,
            chosen_reward=verdict.chosen,
            rejected_reward=verdict.rejected,
            margin=None if verdict.chosen is None or verdict.rejected is None else verdict.chosen - verdict.rejected,
            reason=verdict.reason,
            judge=judge.identity,
        )
        for row, verdict in zip(rows, verdicts, strict=True)
    )
    return write_rows(compared, Comparison, step="compared_shard", parents=[pairs], settings=asks.key())


@step(version="1", rows=lambda shards, asks: sum(shard.rows for shard in shards))
def gather_comparisons(shards: tuple[DatasetRef, ...], asks: AnyAsk) -> DatasetRef:
    """The shards as one data set, if the judge decided enough of them."""
    reasons: Counter[str] = Counter()
    undecided: list[Comparison] = []

    def rows() -> Iterator[Comparison]:
        for row in chain.from_iterable(read_rows(shard, Comparison) for shard in shards):
            reasons[row.reason] += 1
            if row.margin is None and len(undecided) < SHOWN:
                undecided.append(row)
            yield row

    compared = write_rows(rows(), Comparison, step="compared", parents=shards, settings=asks.key())
    log_counts(reasons)
    open_ = compared.rows - reasons[rules.JUDGED] - reasons[rules.DISAGREE]
    if open_ > asks.maximum_undecided * compared.rows:
        told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        first = "\n".join(f"  pair {row.prompt_id}/{row.rejected_index}: {row.reason}" for row in undecided)
        raise JudgeError(
            f"the judge left {open_:,} of {compared.rows:,} pairs undecided ({told}), and judge.asks.maximum_undecided "
            f"is {asks.maximum_undecided:g}. The first:\n{first}\nCorrect the text the judge is asked, or take a judge "
            "that answers it."
        )
    return compared


@step(version="1", rows=lambda pairs, comparisons, labelling: pairs.rows)
def relabel_pairs(pairs: DatasetRef, comparisons: DatasetRef, labelling: Labelling) -> DatasetRef:
    """Keep, swap or drop each pair by its judged margin; what is dropped is counted by reason.

    Raises:
        NothingToLearn: no pair is left; counts the reasons.
    """
    relabelled = rules.relabel_pairs(read_rows(pairs, Pair), read_rows(comparisons, Comparison), labelling)
    kept = relabelled.pairs
    if not kept:
        told = ", ".join(f"{reason} {n:,}" for reason, n in relabelled.drops.items())
        raise NothingToLearn(
            f"step 'relabel_pairs' dropped all {pairs.rows:,} pairs ({told}); see {comparisons.name}, and set "
            "judge.labelling to keep more or take a judge that tells the sides apart"
        )
    log_counts({"pairs": len(kept), "swapped": sum(pair.swapped for pair in kept), **relabelled.drops})
    return write_rows(kept, Pair, step="relabelled", parents=[pairs, comparisons], settings=labelling.key())


@step(version="1", assumed=0.2)
def estimate_flip_rate(pairs: tuple[DatasetRef, ...], ignore_below: float) -> float:
    """How often the judge says that a pair is the wrong way round, for the robust loss."""
    rate = rules.flip_rate(chain.from_iterable(read_rows(ref, Pair) for ref in pairs), ignore_below)
    log_counts({"flip rate, permille": round(1000 * rate)})
    return rate


def _by_engine(rows: list[Pair], hearing: Hearing) -> Iterator[Verdict]:
    """Ask every question that the pairs need once, then put the verdicts together."""
    asks = hearing.asks
    questions = dict.fromkeys(question for row in rows for question in _questions(row, asks))
    serve(hearing.judge, hearing.engine)
    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        answered = dict(zip(questions, pool.map(lambda question: _ask(hearing, question), questions), strict=True))
    broken = [told.failure for told in answered.values() if told.failure.startswith("engine error")]
    if len(broken) > asks.maximum_error_rate * len(answered):
        raise EngineError(
            f"the judge's engine failed at {len(broken):,} of {len(answered):,} requests, and "
            f"judge.asks.maximum_error_rate is {asks.maximum_error_rate:g}; the first: {broken[0]}"
        )
    log_counts({"asked": len(answered), **({"engine errors": len(broken)} if broken else {})})
    return (_verdict(asks, *(answered[question] for question in _questions(row, asks))) for row in rows)


def _questions(row: Pair, asks: AnyAsk) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    """Two questions a pair: (prompt, first, second), or (prompt, completion, "")."""
    if isinstance(asks, PairwiseAsk):
        return (row.prompt, row.chosen, row.rejected), (row.prompt, row.rejected, row.chosen)
    return (row.prompt, row.chosen, ""), (row.prompt, row.rejected, "")


def _verdict(asks: AnyAsk, one: Told, other: Told) -> Verdict:
    if failure := one.failure or other.failure:
        return Verdict(None, None, failure)
    if isinstance(asks, PairwiseAsk):
        return rules.both_orders(one.value, other.value)
    if isinstance(asks, LikelihoodAsk):
        return rules.bradley_terry(one.value, other.value, rules.NO_SCORE)
    missing = rules.NO_LABEL if isinstance(asks, LabelsAsk) else rules.NO_SCORE
    return rules.each_by_itself(one.value, other.value, missing)


def _ask(hearing: Hearing, question: tuple[str, str, str]) -> Told:
    """One question; an engine that dies is started afresh, one that stays away and what it refuses is told."""
    raise_if_stopping()
    try:
        return Told(with_retries(lambda: _answer(hearing, *question), EngineError), "")
    except EngineConfigurationError as error:
        return Told(None, f"not scored: {error}")
    except EngineError as error:
        return Told(None, f"engine error: {error}")


def _answer(hearing: Hearing, prompt: str, first: str, second: str) -> float | None:
    asks, engine = hearing.asks, serve(hearing.judge, hearing.engine)
    if isinstance(asks, LabelsAsk):
        messages = messages_of(hearing.template, judge_prompt(asks.judge, prompt, first, hearing.marker))
        positive, negative = engine.score(messages, (asks.judge.positive, asks.judge.negative))
        return confidence(asks.judge, sum(positive), sum(negative))
    if isinstance(asks, LikelihoodAsk):
        (tokens,) = engine.score(messages_of(hearing.template, prompt), (first,))
        return sum(tokens) / len(tokens) / asks.temperature if tokens else None
    if isinstance(asks, PairwiseAsk):
        messages = messages_of(hearing.template, rules.pairwise_prompt(asks, prompt, first, second))
        if asks.read == "logprobs":
            one, other = engine.score(messages, (asks.first, asks.second))
            return rules.share_of_first(asks, sum(one), sum(other))
        (choice,) = _write(hearing, messages, 1, 0.0, asks.max_completion_tokens)
        return rules.read_choice(asks, choice)
    assert isinstance(asks, ScoresAsk)
    messages = messages_of(hearing.template, rules.score_prompt(asks, prompt, first))
    written = _write(hearing, messages, asks.samples, asks.temperature, asks.max_completion_tokens)
    scores = [score for text in written if (score := rules.read_score(asks, text)) is not None]
    return sum(scores) / len(scores) if scores else None


def _write(hearing: Hearing, messages: tuple[Message, ...], samples: int, temperature: float, tokens: int) -> list[str]:
    sampling = Sampling(rollouts_per_prompt=1, temperature=temperature, top_k=-1, max_completion_tokens=tokens)
    requests = [Request(key=str(seed), messages=messages, seed=seed) for seed in range(samples)]
    return [completion.text for completion in serve(hearing.judge, hearing.engine).sample(requests, sampling)]


def _by_reward_model(rows: list[Pair], hearing: Hearing, asks: RewardAsk) -> Iterator[Verdict]:
    texts = tuple(
        dict.fromkeys(text for row in rows for text in ((row.prompt, row.chosen), (row.prompt, row.rejected)))
    )
    give_back_accelerator()
    local = local_model(hearing.judge)
    job = RewardJob(
        weights=local.weights,
        revision=hearing.judge.revision,
        chat_template=hearing.judge.chat_template,
        trust_remote_code=hearing.judge.trust_remote_code,
        template=hearing.template,
        texts=texts,
        **asks.model_dump(include={"max_length", "batch_size", "precision"}),
    )
    scores = dict(zip(texts, score_in_child(job, lambda line: log.info("%s", line)), strict=True))
    log_counts({"asked": len(texts)})
    return (
        rules.bradley_terry(scores[(row.prompt, row.chosen)], scores[(row.prompt, row.rejected)], TOO_LONG)
        for row in rows
    )
