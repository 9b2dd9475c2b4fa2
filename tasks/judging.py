"""A policy judges rollouts -> confidences; confidences -> training rows, evaluated prompts and calibration.

Every confidence is stored, so that another threshold needs no new judging. A judged rollout has no reward: what is made
of it without gold answers cannot have read one.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, islice
from typing import Literal, NamedTuple

from models.chat import messages_of
from models.engine import EngineConfigurationError, EngineError
from models.specs import EngineSettings, ModelRef, PromptTemplate, Settings
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.hub import Source, read_source
from storage.rows import (
    Calibration,
    Demonstration,
    EvaluatedPrompt,
    JudgedRollout,
    Pair,
    Prompt,
    Rollout,
    ScoredRollout,
)
from tasks import judgements as rules
from tasks.answers import answers_disagree, answers_match, extract_answer, is_readable
from tasks.caching import RETRY_DELAYS_SECONDS, log_counts, step
from tasks.judgements import JUDGED, NO_LABEL, Judge, JudgeGate, LabelFree, Mixture
from tasks.loading import demonstrations_of, prompts_of
from tasks.serving import raise_if_stopping, serve, stopping

CALLS_AT_ONCE = 128  # threads that share the engine, so that its batch stays full
SHOWN = 3  # rollouts quoted in an error
PROBES = ("What is 40 + 2?", "Name a number.", "How many days has a week?")

log = logging.getLogger("ratchet")


class JudgeError(RuntimeError):
    """The judge cannot be used as it is."""


class Asking(Settings):
    """How rollouts are put before the judge."""

    judge: Judge
    template: PromptTemplate  # that solving uses; its system message is the judge's too
    marker: str


class Asked(NamedTuple):
    """What the judge answered about one rollout, or why it did not."""

    logprobs: tuple[float, float] | None  # positive, negative
    reason: str


@step(version="1", rows=lambda prompts: prompts.rows)
def hide_answers(prompts: DatasetRef) -> DatasetRef:
    """The prompts without their gold answers, for everything that is to be free of labels."""
    hidden = (
        Prompt(prompt_id=row.prompt_id, source=row.source, prompt=row.prompt, answer=None)
        for row in read_rows(prompts, Prompt)
    )
    return write_rows(hidden, Prompt, step="prompts", parents=[prompts])


@step(version="1", assumed=True)
def check_labels(policy: ModelRef, asking: Asking, engine: EngineSettings) -> bool:
    """Whether the labels can be told apart by this tokenizer, before anything is sampled.

    Raises:
        JudgeError: they cannot; says why.
    """
    served = serve(policy, engine)
    labels = (asking.judge.positive, asking.judge.negative)
    probes = [served.score(_messages(asking, text, f"{asking.marker} 42"), labels) for text in PROBES]
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
    texts = {(row.prompt, row.completion) for row in rows if row.finish_reason != "error" and row.completion.strip()}
    serve(policy, engine)

    def ask(text: tuple[str, str]) -> Asked:
        return _ask(policy, asking, engine, *text)

    ordered = sorted(texts)
    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        answers = dict(zip(ordered, pool.map(ask, ordered), strict=True))
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


@step(version="1", rows=lambda judged, settings: judged.rows)
def label_by_confidence(judged: DatasetRef, settings: LabelFree) -> DatasetRef:
    """Take rollouts for right or wrong by vote and confidence; no gold answer is read."""
    reasons: Counter[str] = Counter()

    def labelled() -> Iterator[ScoredRollout]:
        for rows in _by_prompt(read_rows(judged, JudgedRollout)):
            for row in rules.label_by_confidence(rows, settings):
                reasons[row.reason] += 1
                yield row

    reference = write_rows(labelled(), ScoredRollout, step="labelled", parents=[judged], settings=settings.key())
    log_counts(reasons)
    return reference


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
def pair_by_confidence(labelled: DatasetRef, judged: DatasetRef, minimum_margin: float, iteration: int) -> DatasetRef:
    """The most against the least confident rollout of each prompt; prompts with one side only are counted."""
    counts: Counter[str] = Counter()

    def pairs() -> Iterator[Pair]:
        joined = rules.join(read_rows(labelled, ScoredRollout), read_rows(judged, JudgedRollout))
        for _, group in groupby(joined, key=lambda row: row[0].prompt_id):
            pair, reason = rules.pair_by_confidence(list(group), minimum_margin, iteration)
            counts["pairs" if pair else reason] += 1
            if pair is not None:
                yield pair

    reference = write_rows(pairs(), Pair, step="pairs", parents=[labelled, judged])
    log_counts(counts)
    return reference


@step(version="1")
def evaluate_judgements(
    evaluated: DatasetRef, scored: DatasetRef, judged: DatasetRef, k: int, filter_above: float
) -> DatasetRef:
    """The evaluated prompts, and after them those of the two strategies that need a judge."""

    def rows() -> Iterator[EvaluatedPrompt]:
        yield from read_rows(evaluated, EvaluatedPrompt)
        joined = rules.join(read_rows(scored, ScoredRollout), read_rows(judged, JudgedRollout))
        for _, group in groupby(joined, key=lambda row: row[0].prompt_id):
            yield from rules.evaluate_judged(list(group), k, filter_above)

    log_counts({})
    return write_rows(rows(), EvaluatedPrompt, step="evaluated", parents=[evaluated, scored, judged])


@step(version="1", assumed=0.5)
def choose_filter(scored: DatasetRef, judged: DatasetRef) -> float:
    """The confidence above which rollouts are best let vote, chosen on the dev split."""
    joined = rules.join(read_rows(scored, ScoredRollout), read_rows(judged, JudgedRollout))
    chosen = rules.choose_filter([list(group) for _, group in groupby(joined, key=lambda row: row[0].prompt_id)])
    log_counts({"filter above, %": round(100 * chosen)})
    return chosen


@step(version="1")
def calibrate(scored: tuple[DatasetRef, ...], judged: tuple[DatasetRef, ...], writers: tuple[str, ...]) -> DatasetRef:
    """How far the judge can be trusted, on the rollouts of each of these writers."""

    def rows() -> Iterator[Calibration]:
        for score, verdict, writer in zip(scored, judged, writers, strict=True):
            known = rules.verdicts(rules.join(read_rows(score, ScoredRollout), read_rows(verdict, JudgedRollout)))
            judge = next(iter(read_rows(verdict, JudgedRollout))).judge
            log_counts({f"decided by both, {writer}": len(known)})
            yield from rules.calibration(known, judge, writer)

    return write_rows(rows(), Calibration, step="calibration", parents=[*scored, *judged])


@step(version="1", assumed=True)
def check_judge(calibration: DatasetRef, gate: JudgeGate) -> bool:
    """Whether the judge may label without gold answers.

    Raises:
        JudgeError: it may not, and the preset does not say to go on anyway.
    """
    fault = rules.judge_faults(read_rows(calibration, Calibration), gate)
    if fault is None:
        return True
    if gate.go_on_anyway:
        log.warning("the judge labels all the same, as judge_gate.go_on_anyway says: %s", fault)
        return False
    raise JudgeError(
        f"the judge may not label rollouts without gold answers: {fault}. Train it longer or on more judge rows "
        "(mixture, sft), draw more dev rollouts, or set label_free.gate.go_on_anyway: true. The stages with gold "
        "answers are done and recorded."
    )


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
            prompt=rules.judge_prompt(asking.judge, row.prompt, row.completion, marker),
            completion=asking.judge.positive if right else asking.judge.negative,
            reward=None,
            source=prompt.source,
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


def _ask(policy: ModelRef, asking: Asking, engine: EngineSettings, prompt: str, completion: str) -> Asked:
    """Log-probs of both labels; an engine that dies is started afresh, a rollout it refuses is told."""
    messages, labels = _messages(asking, prompt, completion), (asking.judge.positive, asking.judge.negative)
    for delay in (*RETRY_DELAYS_SECONDS, None):
        raise_if_stopping()
        try:
            positive, negative = serve(policy, engine).score(messages, labels)
        except EngineConfigurationError as error:
            return Asked(None, f"not scored: {error}")
        except EngineError:
            if delay is None:
                raise
            stopping.wait(delay)
        else:
            return Asked((sum(positive), sum(negative)), JUDGED)
    raise AssertionError("the last attempt returns or raises")


def _messages(asking: Asking, prompt: str, completion: str) -> tuple[dict[str, str], ...]:
    text = rules.judge_prompt(asking.judge, prompt, completion, asking.marker)
    return messages_of(rules.as_it_is(asking.template), text)


def _judged(row: Rollout, asked: Asked | None, asking: Asking, policy: ModelRef) -> JudgedRollout:
    if asked is None:
        asked = Asked(None, "engine error" if row.finish_reason == "error" else "empty completion")
    sure = None if asked.logprobs is None else rules.confidence(asking.judge, *asked.logprobs)
    return JudgedRollout(
        prompt_id=row.prompt_id,
        rollout_index=row.rollout_index,
        prompt=row.prompt,
        completion=row.completion,
        completion_tokens=row.completion_tokens,
        finish_reason=row.finish_reason,
        cumulative_logprob=row.cumulative_logprob,
        policy=row.policy,
        answer=None
        if answers_disagree(row.completion, asking.marker)
        else extract_answer(row.completion, asking.marker),
        confidence=sure,
        positive_logprob=None if asked.logprobs is None else asked.logprobs[0],
        negative_logprob=None if asked.logprobs is None else asked.logprobs[1],
        judge=policy.identity,
        reason=NO_LABEL if asked.logprobs is not None and sure is None else asked.reason,
    )


def _by_prompt(rows: Iterable[JudgedRollout]) -> Iterator[Sequence[JudgedRollout]]:
    for _, group in groupby(rows, key=lambda row: row.prompt_id):
        yield list(group)
