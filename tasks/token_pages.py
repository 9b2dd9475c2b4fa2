"""Compared tokens -> one self-contained HTML page: green where the policy finds a token likelier, red where less so."""

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from math import exp, fsum
from pathlib import Path
from typing import NamedTuple

from storage.committing import put_file
from storage.datasets import DatasetRef, read_rows
from storage.home import home
from storage.rows import TokenComparison

CLIP = 1.0  # nats; what differs more looks the same
SHORT_PROMPT = 60  # tokens; a longer prompt is folded
BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # Unicode's bidirectional classes


class ShownToken(NamedTuple):
    """A token as the page shows it."""

    text: str
    kind: str  # "up", "down", or "" for what has no difference or is the prompt's
    strength: str  # of the colour, 0 to 1
    facts: str  # position, token id, both log-probabilities; what the page's script shows on hover


class ShownText(NamedTuple):
    """One text, with its totals over the completion's tokens."""

    number: int
    name: str
    side: str
    about: str
    prompt: list[ShownToken]
    completion: list[ShownToken]
    policy: float  # summed log-probability
    reference: float
    difference: float
    mean: float  # a token
    width: str  # of its bar, in percent of half the scale
    cut_tokens: int

    @property
    def folded(self) -> bool:
        """Whether the prompt is shown only when asked for."""
        return len(self.prompt) > SHORT_PROMPT


def render_page(rows: Iterable[TokenComparison], policy: str, reference: str, origin: str) -> str:
    """The page.

    Args:
        policy, reference: what the two are called in it.
        origin: where the numbers are stored.
    """
    from jinja2 import Environment

    texts = shown_texts(rows)
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = page.from_string(Path(__file__).with_name("token_page.html").read_text(encoding="utf-8"))
    return template.render(
        texts=texts,
        policy=policy,
        reference=reference,
        origin=origin,
        clip=f"{CLIP:g}",
        signed=signed,
        tokens=sum(len(text.completion) for text in texts),
    )


def write_page(compared: DatasetRef, policy: str, reference: str, file: Path | None) -> Path:
    """Write the page of a data set of TokenComparison rows; where to.

    Args:
        file: None: into the home's folder of views, named by the data set.
    """
    path = file or home() / "views" / f"{compared.digest[:12]}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render_page(read_rows(compared, TokenComparison), policy, reference, compared.name)
    put_file(path, page, replace=True)
    return path


def shown_texts(rows: Iterable[TokenComparison]) -> list[ShownText]:
    """Each text with its tokens and totals; bars are as long as their totals are large, the largest one fully so."""
    texts = [_shown_text(list(tokens)) for _, tokens in groupby(rows, key=lambda row: row.sequence)]
    largest = max((abs(text.difference) for text in texts), default=0.0) or 1.0
    return [text._replace(width=f"{100 * abs(text.difference) / largest:.2f}") for text in texts]


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, zero without one."""
    text = f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return text[1:] if not float(f"{value:.{digits}f}") else text


def visible(text: str) -> str:
    """The text with what cannot be seen made visible: line ends get a mark, control characters their names.

    Characters that turn the direction of writing would reorder what stands around them; they are spelt out too.
    """
    return "".join(_visible(character) for character in text) or "\N{WHITE BULLET}"


def _visible(character: str) -> str:
    if character == "\n":
        return "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"
    if character == "\t":
        return "\N{RIGHTWARDS ARROW TO BAR}\t"
    if unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in BIDI_CONTROLS:
        return f"\N{MATHEMATICAL LEFT ANGLE BRACKET}U+{ord(character):04X}\N{MATHEMATICAL RIGHT ANGLE BRACKET}"
    return character


def _shown_text(tokens: Sequence[TokenComparison]) -> ShownText:
    first = tokens[0]
    completion = [token for token in tokens if not token.is_prompt]
    known = [token for token in completion if token.difference is not None]
    difference = fsum(token.difference or 0.0 for token in known)
    index = "" if first.rollout_index is None else f"/{first.rollout_index}"
    return ShownText(
        number=first.sequence + 1,
        name=f"{first.prompt_id[:12]}{index}",
        side=first.side,
        about=first.about,
        prompt=[_shown(token) for token in tokens if token.is_prompt],
        completion=[_shown(token) for token in completion],
        policy=fsum(token.policy_logprob or 0.0 for token in known),
        reference=fsum(token.reference_logprob or 0.0 for token in known),
        difference=difference,
        mean=difference / len(known) if known else 0.0,
        width="0",
        cut_tokens=first.cut_tokens,
    )


def _shown(token: TokenComparison) -> ShownToken:
    change = 0.0 if token.difference is None or token.is_prompt else max(-CLIP, min(CLIP, token.difference))
    kind = "up" if change > 0 else "down" if change < 0 else ""
    facts = "|".join(
        [
            str(token.position),
            str(token.token_id),
            *(_told(value) for value in (token.policy_logprob, token.reference_logprob)),
            "" if token.difference is None else signed(token.difference, 3),
            repr(token.token) if token.token else "part of a character that the next token ends",
        ]
    )
    return ShownToken(visible(token.token), kind, f"{abs(change) / CLIP:.3f}", facts)


def _told(logprob: float | None) -> str:
    return "unknown" if logprob is None else f"{signed(logprob, 3)}  ({100 * exp(logprob):.3g} %)"
