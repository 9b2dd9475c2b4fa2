"""A policy judges rollouts -> a confidence for each, stored, so that another threshold needs no new judging.

A judged rollout has no reward: what is made of it without gold answers cannot have read one.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import NamedTuple

from models.chat import messages_of
from models.engine import EngineConfigurationError, EngineError, UnknownProbability
from models.specs import EngineSettings, ModelRef
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import JudgedRollout, Rollout, derive
from tasks import judgements as rules
from tasks.answers import answers_disagree, extract_answer
from tasks.caching import log_counts, step, with_retries
from tasks.drawing import Meter
from tasks.judgements import JUDGED, NO_LABEL, Asking, Judge
from tasks.serving import raise_if_stopping, serve

CALLS_AT_ONCE = 128  # threads that share the engine, so that its batch stays full
SHOWN = 3  # rollouts quoted in an error
PROBES = ("What is 40 + 2?", "Name a number.", "How many days has a week?")


class JudgeError(RuntimeError):
    """The judge cannot be used as it is."""


class Asked(NamedTuple):
    """What the judge answered about one rollout, or why it did not."""

    logprobs: tuple[float, float] | None  # positive, negative
    reason: str


@step(version="1", assumed=True)
def check_labels(policy: ModelRef, asking: Asking, engine: EngineSettings) -> bool:
    """Whether the labels can be told apart by this tokenizer, before anything is sampled.

    Raises:
        JudgeError: they cannot; says why.
    """
    probes = _probes(policy, asking, engine)
    if faults := rules.label_faults(asking.judge, probes):
        raise JudgeError("judge: " + "; ".join(faults))
    log_counts({"tokens_positive": len(probes[0][0]), "tokens_negative": len(probes[0][1])})
    return True


def judge_rollouts(policy: ModelRef, rollouts: DatasetRef, asking: Asking, engine: EngineSettings) -> DatasetRef:
    """JudgedRollout rows in the rollouts' order. A kill or a failure loses the shard under way and no other.

    Raises:
        JudgeError: the judge left too many rollouts undecided; quotes the first.
    """
    starts = range(0, rollouts.rows, asking.judge.rollouts_per_shard)
    shards = tuple(judge_shard(policy, rollouts, start, asking, engine) for start in starts)
    return gather_judged(shards, asking.judge)


@step(version="1", rows=lambda policy, rollouts, start, asking, engine: rollouts.rows - start)
def judge_shard(
    policy: ModelRef, rollouts: DatasetRef, start: int, asking: Asking, engine: EngineSettings
) -> DatasetRef:
    """The verdicts on the rollouts from `start` on, `rollouts_per_shard` of them; equal texts are judged once."""
    rows = list(islice(read_rows(rollouts, Rollout), start, start + asking.judge.rollouts_per_shard))
    texts = Counter((row.prompt, row.completion) for row in rows if _can_be_judged(row))
    serve(policy, engine)
    meter = Meter(rollouts.rows, start, "judge_rollouts")
    meter.add(rows=len(rows) - texts.total())
    answers: dict[tuple[str, str], Asked] = {}

    def ask(text: tuple[str, str]) -> Asked:
        return _ask(policy, asking, engine, *text)

    ordered = sorted(texts)
    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        for text, answer in zip(ordered, pool.map(ask, ordered), strict=True):
            answers[text] = answer
            meter.add(rows=texts[text])
    judged = (_judged(row, answers.get((row.prompt, row.completion)), asking, policy) for row in rows)
    log_counts({"asked": len(ordered)})
    return write_rows(judged, JudgedRollout, step="judged_shard", parents=[rollouts], settings=asking.key())


@step(version="1", rows=lambda shards, judge: sum(shard.rows for shard in shards))
def gather_judged(shards: tuple[DatasetRef, ...], judge: Judge) -> DatasetRef:
    """The shards as one data set, if the judge decided enough of them."""
    reasons: Counter[str] = Counter()
    undecided: list[JudgedRollout] = []

    def rows() -> Iterator[JudgedRollout]:
        for row in chain.from_iterable(read_rows(shard, JudgedRollout) for shard in shards):
            reasons[row.reason] += 1
            if row.confidence is None and len(undecided) < SHOWN:
                undecided.append(row)
            yield row

    judged = write_rows(rows(), JudgedRollout, step="judged", parents=shards, settings=judge.key())
    log_counts(reasons)
    open_ = judged.rows - reasons[JUDGED]
    if open_ > judge.maximum_undecided * judged.rows:
        told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        first = "\n".join(f"  {row.reason}: {row.completion[-120:]!r}" for row in undecided)
        raise JudgeError(
            f"the judge left {open_:,} of {judged.rows:,} rollouts undecided ({told}), and judge.maximum_undecided is "
            f"{judge.maximum_undecided:g}. The first:\n{first}\nA judge that never says {judge.positive!r} or "
            f"{judge.negative!r} was not trained to: raise mixture.judge_rows_per_solve or sft.epochs, or correct the "
            "labels and judge.text."
        )
    return judged


def _probes(policy: ModelRef, asking: Asking, engine: EngineSettings) -> list[list[list[float]]]:
    """Log-probs of the labels' tokens on made-up rollouts; a judge that tells them of none cannot be used.

    Raises:
        JudgeError: it tells of none.
    """
    served, probes = serve(policy, engine), []
    for text in PROBES:
        try:
            probes.append(served.score(_messages(asking, text, f"{asking.marker} 42"), asking.labels))
        except UnknownProbability as error:
            unknown = error
    if not probes:
        found = ", ".join(map(repr, unknown.found))
        raise JudgeError(
            f"judge: {unknown} on any of {len(PROBES)} made-up rollouts; found: {found}. Choose labels that are one "
            "token each for this model and that judge.text asks for, or score with engine.scoring: prompt_logprobs"
        )
    return probes


def _ask(policy: ModelRef, asking: Asking, engine: EngineSettings, prompt: str, completion: str) -> Asked:
    """Log-probs of both labels; an engine that dies is started afresh, a rollout it refuses is told."""
    messages, labels = _messages(asking, prompt, completion), asking.labels
    raise_if_stopping()
    try:
        positive, negative = with_retries(lambda: serve(policy, engine).score(messages, labels), EngineError)
    except EngineConfigurationError as error:
        return Asked(None, f"not scored: {error}")
    return Asked((sum(positive), sum(negative)), JUDGED)


def _messages(asking: Asking, prompt: str, completion: str) -> tuple[dict[str, str], ...]:
    text = rules.judge_prompt(asking.judge, prompt, completion, asking.marker)
    return messages_of(rules.as_it_is(asking.template), text)


def _can_be_judged(row: Rollout) -> bool:
    return row.finish_reason != "error" and bool(row.completion.strip())


def _judged(row: Rollout, asked: Asked | None, asking: Asking, policy: ModelRef) -> JudgedRollout:
    if asked is None:
        asked = Asked(None, "engine error" if row.finish_reason == "error" else "empty completion")
    positive, negative = asked.logprobs or (None, None)
    sure = None if asked.logprobs is None else rules.confidence(asking.judge, *asked.logprobs)
    two_answers = answers_disagree(row.completion, asking.marker)
    return derive(
        JudgedRollout,
        row,
        answer=None if two_answers else extract_answer(row.completion, asking.marker),
        confidence=sure,
        positive_logprob=positive,
        negative_logprob=negative,
        judge=policy.identity,
        reason=NO_LABEL if asked.logprobs is not None and sure is None else asked.reason,
    )
