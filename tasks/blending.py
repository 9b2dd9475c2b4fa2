"""Sources of chats -> one data set of conversations or of pairs, with every row that is left out counted and shown."""

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import Field, model_validator

from models import fake_engine
from models.chat import chat_of, load_tokenizer, render_conversation
from models.specs import ModelRef, Settings
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.hub import NotAtHand, Source, read_records, source_key, source_name
from storage.rows import ChatPair, Conversation, Prompt
from tasks import chats as rules
from tasks.caching import log_counts, step
from tasks.chats import ChatColumns, ChatFilter, Content, Origin
from tasks.contamination import Questions
from tasks.guarding import Guard, Guarded
from tasks.licences import doubt_about
from tasks.selection import same_text
from tasks.serving import local_model

log = logging.getLogger("ratchet")
ChatRow = TypeVar("ChatRow", Conversation, ChatPair)
SHOWN = 200  # characters of a row that is quoted in the log


class ChatSource(Settings):
    """One part of a mixture."""

    source: Source
    weight: float = Field(default=1.0, gt=0, le=1)  # the share of its rows that is taken, each row by a draw of its own
    columns: ChatColumns = ChatColumns()
    filters: ChatFilter = ChatFilter()
    maximum_rows: int | None = Field(default=None, ge=1)  # the first ones that are kept
    licence: str | None = None  # SPDX id; "own" for data of one's own
    accept_unclear_licence: bool = False

    @model_validator(mode="after")
    def _licence_is_clear_or_accepted(self) -> "ChatSource":
        if self.doubt and not self.accept_unclear_licence:
            raise ValueError(
                f"the licence of {source_name(self.source)} is not clear ({self.doubt}); state `licence` if you know "
                "it, or set accept_unclear_licence: true to use the rows all the same"
            )
        return self

    @property
    def doubt(self) -> str:
        """What is not clear about the licence; empty: nothing."""
        return "" if self.is_built_in else doubt_about(self.source.hub, self.licence)

    @property
    def is_built_in(self) -> bool:
        """Whether the rows are made up here."""
        return self.source.hub is None and self.source.path is None

    @property
    def licence_told(self) -> str:
        """What each row says of its licence."""
        stated = "own" if self.is_built_in else self.licence or "none stated"
        return f"unclear: {stated} ({self.doubt})" if self.doubt else stated

    def key(self) -> dict[str, Any]:
        """As any settings', the source by its content."""
        return {**super().key(), "source": source_key(self.source)}


class Mixture(Settings):
    """Several sources of conversations as one data set."""

    content: ClassVar[Content] = "conversations"

    sources: tuple[ChatSource, ...] = Field(min_length=1)
    seed: int = Field(default=42, ge=0)  # of the draws by weight
    # Benchmarks no row may hold a question of: TruthfulQA's are in UltraFeedback, GSM8K's in Orca sets (METHODS 6.6)
    apart_from: tuple[Guarded, ...] = ("truthfulqa_mc2", "gsm8k")

    @model_validator(mode="after")
    def _each_source_once(self) -> "Mixture":
        told = [str(source_key(entry.source)) for entry in self.sources if entry.source.path is None]
        if len(set(told)) != len(told):
            raise ValueError("two sources name the same rows, which would count twice; remove one")
        return self


class PairMixture(Mixture):
    """Several sources of pairs as one data set."""

    content: ClassVar[Content] = "pairs"


def blend(mixture: Mixture, guard: Guard, policy: ModelRef, system: str | None = None) -> DatasetRef:
    """Conversation or ChatPair rows of all sources, by the kind of mixture.

    Args:
        policy: its tokenizer counts for filters.max_tokens.
        system: what chats without a system text are trained with; it counts too.
    """
    for entry in mixture.sources:
        if entry.doubt:
            log.warning(
                "LICENCE: %s is used although its licence is not clear (%s); what is trained on it may not be yours to "
                "publish",
                source_name(entry.source),
                entry.doubt,
            )
    counts_tokens = any(entry.filters.max_tokens is not None for entry in mixture.sources)
    missing = tuple(name for name in guard.missing if name in mixture.apart_from)
    counter, spoken = (policy, system) if counts_tokens else (None, None)
    questions = tuple(guard.questions[name] for name in mixture.apart_from if name in guard.questions)
    return mix_chats(mixture, mixture.content, questions, guard.held_out, missing, counter, spoken)


@step(version="1")
def mix_chats(
    mixture: Mixture,
    content: Content,
    questions: tuple[DatasetRef, ...],
    held_out: tuple[DatasetRef, ...],
    unchecked: tuple[str, ...],
    policy: ModelRef | None,
    system: str | None,
) -> DatasetRef:
    """The rows of all sources in their order, each once.

    Raises:
        ValueError: a source lacks a column, or none of its rows is left.
    """
    asked = ((row.source, row.prompt) for ref in questions for row in read_rows(ref, Prompt))
    prompts = {same_text(row.prompt) for ref in held_out for row in read_rows(ref, Prompt)}
    blending = _Blending(mixture, Questions(asked), prompts, token_counter(policy, system) if policy else None)
    if content == "conversations":
        mixed = write_rows(
            blending.rows(content, rules.read_conversation), Conversation, step="conversations", settings=mixture.key()
        )
    else:
        pairs = blending.rows(content, rules.read_pair)
        mixed = write_rows(pairs, ChatPair, step="chat_pairs", settings=mixture.key())
    not_checked = {f"rows that could not be checked against {name}": mixed.rows for name in unchecked}
    log_counts({"kept" if content == "conversations" else "pairs": mixed.rows, **blending.drops, **not_checked})
    return mixed


def faults_of(mixture: Mixture) -> Iterator[str]:
    """What is wrong with the sources of a mixture, found by reading the first row of each; the key comes first."""
    for number, entry in enumerate(mixture.sources):
        key, name = f"sources[{number}]", source_name(entry.source)
        try:
            first = next(read_records(entry.source), None)
        except NotAtHand:  # a plan says so
            continue
        except (ValueError, OSError) as error:
            yield f"{key}: {error}"
            continue
        if first is None:
            yield f"{key}: {name} has no rows; see `rows` and `limit` of the source"
        elif missing := rules.missing_columns(first[1], entry.columns, entry.filters, mixture.content):
            yield f"{key}: {name} row {first[0]}: {missing}"


def first_prompt(mixture: Mixture) -> str:
    """What the user says first in the first sound row, to be looked at."""
    entry = mixture.sources[0]
    read = rules.read_pair if mixture.content == "pairs" else rules.read_conversation
    for line, record in read_records(entry.source):
        row = read(record, entry.columns, Origin(source_name(entry.source), "", line))
        if not isinstance(row, str):
            return row.contents[row.roles.index("user")]
    raise ValueError(f"{source_name(entry.source)} has no sound row")


def token_counter(policy: ModelRef, system: str | None) -> Callable[[list[str], list[str]], int]:
    """A function that counts the tokens of a whole chat, from roles and contents, as it is trained on."""
    local = local_model(policy)
    if fake_engine.is_fake(local.weights):
        return lambda roles, contents: sum(len(one["content"].split()) for one in chat_of(roles, contents, system))
    tokenizer = load_tokenizer(local.weights, policy.chat_template, policy.trust_remote_code, revision=policy.revision)

    def count(roles: list[str], contents: list[str]) -> int:
        return len(render_conversation(tokenizer, chat_of(roles, contents, system)).ids)

    return count


class _Blending:
    """One pass over all sources, and what it leaves out."""

    def __init__(
        self,
        mixture: Mixture,
        questions: Questions,
        held_out: set[str],
        count: Callable[[list[str], list[str]], int] | None,
    ) -> None:
        self.drops: Counter[str] = Counter()
        self._mixture, self._questions, self._held_out, self._count = mixture, questions, held_out, count
        self._seen: set[bytes] = set()

    def rows(
        self, content: Content, read: Callable[[Mapping[str, Any], ChatColumns, Origin], ChatRow | str]
    ) -> Iterator[ChatRow]:
        for entry in self._mixture.sources:
            name, kept, drops = source_name(entry.source), 0, Counter[str]()
            for line, record in read_records(entry.source):
                if missing := rules.missing_columns(record, entry.columns, entry.filters, content):
                    raise ValueError(f"{name} row {line}: {missing}")
                row = read(record, entry.columns, Origin(name, entry.licence_told, line))
                if isinstance(row, str) or (reason := self._unwanted(row, record, entry)):
                    reason = row if isinstance(row, str) else reason
                    drops[reason] += 1
                    if drops[reason] == 1 and reason != NOT_DRAWN:
                        log.warning("%s: dropped: %s, first in row %d: %.*s", name, reason, line, SHOWN, record)
                    continue
                kept += 1
                yield row
                if kept == entry.maximum_rows:
                    break
            log.info("%s: %d rows kept, %s", name, kept, dict(drops) or "none dropped")
            if not kept:
                raise ValueError(f"no row of {name} is left: {dict(drops) or 'it has none'}; correct the source or it")
            self.drops.update({f"{reason} in {name}": n for reason, n in drops.items()})

    def _unwanted(self, row: Conversation | ChatPair, record: Mapping[str, Any], entry: ChatSource) -> str:
        sides = [[row.chosen], [row.rejected]] if isinstance(row, ChatPair) else [[]]
        texts = [*row.contents, *(text for side in sides for text in side)]
        if reason := rules.filtered_out(row, record, entry.filters):
            return reason
        identity = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).digest()
        if random.Random(f"{self._mixture.seed}:{identity.hex()}").random() >= entry.weight:
            return NOT_DRAWN
        if identity in self._seen:
            return "stands there more than once"
        if any(same_text(text) in self._held_out for text in texts):
            return "holds a prompt of dev or test"
        if benchmark := next(filter(None, map(self._questions.found_in, texts)), ""):
            return f"holds a question of {benchmark}"
        limit = entry.filters.max_tokens
        if limit is not None and self._count is not None:
            roles = [row.roles if not side else [*row.roles, "assistant"] for side in sides]
            if max(self._count(who, [*row.contents, *side]) for who, side in zip(roles, sides, strict=True)) > limit:
                return "longer than max_tokens"
        self._seen.add(identity)
        return ""


NOT_DRAWN = "not drawn by its weight"
