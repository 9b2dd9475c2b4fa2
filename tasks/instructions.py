"""Instructions that a program can check: how a supervisor is asked for one, what is read off its reply, what is kept.

A *query* is a request before an instruction is added to it; the two together are a prompt (METHODS 5). The texts are
ours; they ask for what seed 4 asks for: a demand on the form, not on the style, that a short function can check.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from string import Template
from typing import NamedTuple

from pydantic import Field, field_validator, model_validator

from models.specs import Sampling, Settings
from storage.rows import Instruction, Prompt, Rollout
from tasks.prompts import prompt_id
from tasks.screening import Screening, evaluation_types
from tasks.selection import same_text

ASKED = "autoif"  # the source of every prompt made here
ID_CHARACTERS = 24
SHOWN = 3  # replies quoted in an error

_LEAD = re.compile(r"^\s*(?:[-*•]|\d+[.)])?\s*(?:\**instruction\**\s*:\**)?\s*", re.IGNORECASE)
_ABOUT_ITSELF = re.compile(
    r"^(?:sure|certainly|of course|here (?:is|are)|i (?:can|cannot|can't|will))\b", re.IGNORECASE
)


class Example(Settings):
    """A query and an instruction that goes with it, to show what is wanted."""

    query: str
    instruction: str


EXAMPLES = (
    Example(query="How do I keep basil alive?", instruction="Give exactly four steps, each on a line of its own."),
    Example(query="What is a glacier?", instruction="Write every number as a word, never in digits."),
    Example(query="Suggest a name for a cat.", instruction="Put the name between two stars, like *this*."),
    Example(query="Why is the sky blue?", instruction="Let no sentence be longer than twelve words."),
    Example(query="Plan a picnic for five people.", instruction="Begin every line with the same letter."),
    Example(query="Tell me about the moon.", instruction="Put a line of three dashes into the answer."),
)


class Proposing(Settings):
    """How instructions are proposed. Defaults: seed 4, one a query (METHODS 5.2)."""

    not_in_key = frozenset({"maximum_unreadable"})

    text: str = (
        "You write instructions about the form of an answer. Each has to fit the query before it, and a short Python "
        "function has to be able to check it from the answer's text alone: ask for something that can be counted or "
        "found, never for a tone or a style. Some that do:\n\n$examples\n\n"
        "Write one new instruction for this query, unlike those above, in one line and nothing else.\n\n"
        "Query: $query\nInstruction:"
    )
    examples: tuple[Example, ...] = Field(default=EXAMPLES, min_length=1)
    sampling: Sampling = Sampling(
        rollouts_per_prompt=1, temperature=1.0, top_k=-1, max_completion_tokens=512, stop=("\n",), seed=42
    )
    longest: int = Field(default=300, ge=10)  # characters
    maximum_unreadable: float = Field(default=0.5, ge=0, le=1)  # share of the replies that hold no instruction
    screening: Screening = Screening()

    _names = field_validator("text")(lambda text: with_names(text, {"examples", "query"}))


class Length(Settings):
    """How long a query may be, characters. Default: seed 4; its original takes 20 to 300."""

    shortest: int = Field(default=5, ge=1)
    longest: int = Field(default=200, ge=1)

    @model_validator(mode="after")
    def _leaves_some(self) -> "Length":
        if self.shortest > self.longest:
            raise ValueError(f"shortest is {self.shortest} and longest {self.longest}, which leaves none; swap them")
        return self


class Read(NamedTuple):
    """What was read off replies, how many there were, which gave nothing by reason, and the first of those."""

    replies: int
    reasons: Counter[str]
    offending: list[str]


def with_names(text: str, names: set[str]) -> str:
    """The template itself, if it holds these `$names` and no other.

    Raises:
        ValueError: it does not.
    """
    found = set(Template(text).get_identifiers())
    if found != names or not Template(text).is_valid():
        wanted = ", ".join(f"${name}" for name in sorted(names))
        raise ValueError(
            f"the text is to hold {wanted} and no other $name ($$ is a dollar sign); found {sorted(found)}"
        )
    return text


def with_a_prompt(text: str) -> str:
    """A text of ours as a template for prompts, to be looked at: the query is the prompt, the rest is named."""
    named = {"query": "$prompt", "instruction": "(an instruction)", "examples": "(the examples)"}
    for name, shown in named.items():
        text = text.replace(f"${{{name}}}", shown).replace(f"${name}", shown)
    return text


def queries_within(texts: Iterable[str], source: str, length: Length, counts: Counter[str]) -> Iterator[Prompt]:
    """Queries that are neither too short nor too long, each once."""
    seen: set[str] = set()
    for text in texts:
        counts["read"] += 1
        query_id = prompt_id(source, text)
        if not text.strip():
            counts["empty"] += 1
        elif len(text) < length.shortest:
            counts["too short"] += 1
        elif len(text) > length.longest:
            counts["too long"] += 1
        elif query_id in seen:
            counts["duplicate"] += 1
        else:
            seen.add(query_id)
            counts["queries"] += 1
            yield Prompt(prompt_id=query_id, source=source, prompt=text, answer=None)


def ask_for_instruction(query: Prompt, settings: Proposing) -> Prompt:
    """What the supervisor is asked about a query."""
    shown = "\n\n".join(f"Query: {one.query}\nInstruction: {one.instruction}" for one in settings.examples)
    return asked(Template(settings.text).substitute(examples=shown, query=query.prompt))


def asked(text: str) -> Prompt:
    """A text that is put to a model as it is; its id is that of the text."""
    return Prompt(prompt_id=prompt_id(ASKED, text), source=ASKED, prompt=text, answer=None)


def read_instruction(reply: Rollout, settings: Proposing) -> tuple[str | None, str]:
    """(instruction, "read"), or (None, why there is none)."""
    if reply.finish_reason == "error":
        return None, "engine error"
    if reply.finish_reason == "length":
        return None, "truncated"
    text = _LEAD.sub("", reply.completion.strip())
    if not text:
        return None, "empty"
    if "\n" in text.strip():
        return None, "more than one line"
    if len(text) > settings.longest:
        return None, "too long"
    if _ABOUT_ITSELF.match(text) or text.endswith("?"):
        return None, "prose"
    return text.strip(), "read"


def instructions_of(
    replies: Iterable[Rollout],
    queries: Mapping[str, Prompt],
    settings: Proposing,
    evaluation: Mapping[str, str],
    read: Read,
    counts: Counter[str],
) -> Iterator[Instruction]:
    """Distinct instructions, in the replies' order.

    Args:
        queries: what was asked, by the prompt_id of the asking -> query.
        evaluation: 13-gram -> kind, of the evaluation's own prompts.
    """
    seen = {instruction_key(example.instruction) for example in settings.examples}
    for reply in replies:
        text, reason = read_instruction(reply, settings)
        read.reasons[reason] += 1
        if text is None:
            if len(read.offending) < SHOWN:
                read.offending.append(f"{reason}: {reply.completion[:200]!r}")
            continue
        if instruction_key(text) in seen:
            counts["duplicate"] += 1
            continue
        seen.add(instruction_key(text))
        kinds = evaluation_types(text, settings.screening, evaluation)
        counts["like the evaluation's"] += bool(kinds)
        if kinds and settings.screening.action == "drop":
            continue
        counts["instructions"] += 1
        query = queries[reply.prompt_id]
        yield Instruction(
            instruction_id=identity(instruction_key(text)),
            instruction=text,
            query_id=query.prompt_id,
            query=query.prompt,
            evaluation_types=kinds,
            writer=reply.policy,
        )


def instruction_key(text: str) -> str:
    """What two instructions share that differ in letter case, white space and punctuation at the end only."""
    return same_text(text).casefold().rstrip(" .!;:")


def identity(*parts: str) -> str:
    """An id that depends on these texts only."""
    return hashlib.sha256("\x1f".join(parts).encode(errors="surrogatepass")).hexdigest()[:ID_CHARACTERS]


def too_many_unreadable(
    read: Read,
    kept: int,
    maximum: float,
    what: str,
    advice: str,
    is_read: Callable[[str], bool] = lambda r: r == "read",
) -> str | None:
    """What to say when too many replies could not be read; None: enough could be."""
    bad = sum(count for reason, count in read.reasons.items() if not is_read(reason))
    if kept and bad <= maximum * read.replies:
        return None
    told = ", ".join(f"{reason} {count:,}" for reason, count in read.reasons.most_common() if not is_read(reason))
    first = "\n".join(f"  {one}" for one in read.offending)
    return (
        f"{bad:,} of {read.replies:,} replies hold no {what} that can be read ({told or 'none'}), {kept:,} {what}s are "
        f"left, and maximum_unreadable is {maximum:g}. The first:\n{first}\n{advice}"
    )
