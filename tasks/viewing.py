"""Stored texts and two policies -> the log-probability of every token under each, side by side."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from pydantic import Field

from models.chat import messages_of
from models.engine import ScoreRequest
from models.specs import EngineSettings, ModelRef, PromptTemplate, Settings
from storage.datasets import DatasetError, DatasetRef, read_rows, write_rows
from storage.rows import Demonstration, JudgedRollout, Pair, Rollout, ScoredRollout, TokenComparison, TokenScore, derive
from tasks.caching import log_counts, step
from tasks.serving import raise_if_stopping, serve

VIEWABLE = {kind.__name__: kind for kind in (Rollout, ScoredRollout, JudgedRollout, Demonstration, Pair)}


class Choice(Settings):
    """Which rows of a data set are looked at."""

    rows: tuple[str, ...] = ()  # beginnings of prompt_ids, with /3 behind it the rollout 3 only; empty: the first ones
    first: int = Field(default=8, ge=1)  # rows, unless `rows` names some


class Text(NamedTuple):
    """One text to be scored."""

    prompt_id: str
    rollout_index: int | None
    side: str
    about: str
    prompt: str
    completion: str
    finished: bool  # the policy ended it; else it was cut, and has no end of turn


def view_logprobs(
    policy: ModelRef,
    reference: ModelRef,
    rows: DatasetRef,
    choice: Choice,
    template: PromptTemplate,
    engine: EngineSettings,
) -> DatasetRef:
    """TokenComparison rows: every token of the chosen rows' texts under both policies.

    Raises:
        ValueError: nothing is chosen, or the rows are no texts of a policy.
        DatasetError: the policies do not share a tokenizer and a chat template.
    """
    scored = [score_tokens(one, rows, choice, template, engine) for one in (policy, reference)]
    return compare_tokens(*scored)


@step(version="1")
def score_tokens(
    policy: ModelRef, rows: DatasetRef, choice: Choice, template: PromptTemplate, engine: EngineSettings
) -> DatasetRef:
    """One policy's log-probabilities of the chosen rows, as it would be trained on them: end of turn included."""
    texts = chosen_texts(rows, choice)
    requests = [
        ScoreRequest(
            key=str(number),
            messages=messages_of(template, text.prompt),
            continuation=text.completion,
            rendering="finished" if text.finished else "apart",
            in_full=True,
            cut="right",
        )
        for number, text in enumerate(texts)
    ]
    found = {}
    for scored in serve(policy, engine).score_all(requests):
        raise_if_stopping()
        found[int(scored.key)] = scored

    def tokens() -> Iterator[TokenScore]:
        for number, text in enumerate(texts):
            scored = found[number]
            columns = zip(scored.token_ids, scored.texts, scored.logprobs, strict=True)
            for position, (token_id, token, logprob) in enumerate(columns):
                yield TokenScore(
                    sequence=number,
                    prompt_id=text.prompt_id,
                    rollout_index=text.rollout_index,
                    side=text.side,
                    about=text.about,
                    position=position,
                    is_prompt=position < scored.prompt_tokens,
                    token_id=token_id,
                    token=token,
                    logprob=logprob,
                    cut_tokens=scored.cut_tokens,
                    policy=policy.identity,
                )

    settings = {"choice": choice.key(), "template": template.key()}
    reference = write_rows(tokens(), TokenScore, step="token_scores", parents=[rows], settings=settings)
    log_counts({"texts": len(texts), **+Counter({"texts cut": sum(one.cut_tokens > 0 for one in found.values())})})
    return reference


@step(version="1", rows=lambda policy, reference: policy.rows)
def compare_tokens(policy: DatasetRef, reference: DatasetRef) -> DatasetRef:
    """The tokens of both, joined.

    Raises:
        DatasetError: they are not the same tokens.
    """
    if policy.rows != reference.rows:
        raise _differs(f"{policy.rows:,} and {reference.rows:,} tokens")

    def joined() -> Iterator[TokenComparison]:
        pairs = zip(read_rows(policy, TokenScore), read_rows(reference, TokenScore), strict=True)
        for mine, theirs in pairs:
            if (mine.sequence, mine.position, mine.token_id) != (theirs.sequence, theirs.position, theirs.token_id):
                raise _differs(f"token {mine.position} of text {mine.sequence} is {mine.token!r} and {theirs.token!r}")
            known = mine.logprob is not None and theirs.logprob is not None
            yield derive(
                TokenComparison,
                mine,
                policy_logprob=mine.logprob,
                reference_logprob=theirs.logprob,
                difference=mine.logprob - theirs.logprob if known else None,  # type: ignore[operator]  # both known
                reference=theirs.policy,
            )

    return write_rows(joined(), TokenComparison, step="token_comparisons", parents=[policy, reference])


def chosen_texts(rows: DatasetRef, choice: Choice) -> list[Text]:
    """The texts of the chosen rows: one of a rollout or demonstration, two of a pair.

    Raises:
        ValueError: nothing is chosen, or the rows are no texts of a policy.
    """
    if rows.row_type not in VIEWABLE:
        raise ValueError(f"{rows.name} holds {rows.row_type} rows; what can be looked at: {', '.join(VIEWABLE)}")
    all_rows: Iterator[Viewable] = read_rows(rows, VIEWABLE[rows.row_type])
    if not choice.rows:
        return [text for row in islice(all_rows, choice.first) for text in _texts_of(row)]
    meant = (text for row in all_rows for text in _texts_of(row))
    texts = [text for text in meant if any(_is_meant(text, wanted) for wanted in choice.rows)]
    by_wish = {wanted: [text for text in texts if _is_meant(text, wanted)] for wanted in choice.rows}
    if missing := [wanted for wanted, texts_meant in by_wish.items() if not texts_meant]:
        raise ValueError(
            f"{', '.join(missing)}: no row of {rows.name} has a prompt_id that begins so, or that rollout; "
            f"`ratchet show {rows.name}` shows some"
        )
    return [text for texts_meant in by_wish.values() for text in texts_meant]


Viewable = Rollout | ScoredRollout | JudgedRollout | Demonstration | Pair


def _is_meant(text: Text, wanted: str) -> bool:
    beginning, _, index = wanted.partition("/")
    return text.prompt_id.startswith(beginning) and index in ("", str(text.rollout_index))


def _texts_of(row: Viewable) -> list[Text]:
    if isinstance(row, Pair):
        chosen = _rewarded(row.chosen_reward)
        rejected = _rewarded(row.rejected_reward)
        return [
            Text(row.prompt_id, row.chosen_index, "chosen", chosen, row.prompt, row.chosen, True),
            Text(row.prompt_id, row.rejected_index, "rejected", rejected, row.prompt, row.rejected, True),
        ]
    about, finished = "", True
    if isinstance(row, Demonstration):
        about = _rewarded(row.reward)
    else:
        finished = row.finish_reason == "stop"
        if isinstance(row, ScoredRollout):
            about = f"{_rewarded(row.reward)}, {row.reason}"
        if not finished:
            about = ", ".join(filter(None, [about, "cut at its longest"]))
    return [Text(row.prompt_id, row.rollout_index, "completion", about, row.prompt, row.completion, finished)]


def _rewarded(reward: float | None) -> str:
    return "no reward" if reward is None else f"reward {reward:g}"


def _differs(found: str) -> DatasetError:
    return DatasetError(
        f"the two policies do not take the same text for the same tokens: {found}. Log-probabilities can only be "
        "compared token by token under one tokenizer and one chat template; compare policies of one base"
    )
