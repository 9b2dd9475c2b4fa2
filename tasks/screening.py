"""Whether an instruction is like those that a policy is evaluated with: by their kinds, and by 13 words in a row."""

import re
from collections.abc import Mapping
from typing import Literal

from models.specs import Settings
from tasks.prompts import ngrams

# What IFEval's instructions are about (METHODS 5.6.12), by our own patterns: kind -> words that tell it.
EVALUATION_TYPES = {
    "keywords": r"\bkey ?words?\b|\b(?:include|mention|use|contain)\b.{0,30}\bwords?\b|\bforbidden\b"
    r"|\bavoid the words?\b",
    "letter frequency": r"\bletters?\b.{0,40}\b(?:times|at least|fewer|less|more|occur|appear)\b",
    "response language": r"\b(?:in|using) (?:only )?(?:English|German|French|Spanish|Hindi|Arabic|Chinese|Italian)\b",
    "length": r"\b(?:at (?:least|most)|fewer than|less than|more than|exactly|no more than)\b.{0,20}"
    r"\b(?:words?|sentences?|paragraphs?)\b",
    "placeholders": r"\bplaceholders?\b|\bsquare brackets\b",
    "postscript": r"\bpost ?script\b|\bP\.? ?S\.?",
    "bullet list": r"\bbullet(?:s|ed)?\b",
    "title": r"\btitle\b",
    "highlighted sections": r"\bhighlight|\bitalic|\bbold\b",
    "multiple sections": r"\bsections?\b",
    "json": r"\bJSON\b",
    "repeat the prompt": r"\brepeat\b.{0,30}\b(?:prompt|request|question|query)\b",
    "two responses": r"\btwo (?:different |separate )?(?:responses|answers)\b",
    "letter case": r"\b(?:upper|lower) ?-?case\b|\bcapital",
    "ending": r"\b(?:end|finish|close)\b.{0,30}\b(?:with|by)\b",
    "quotation": r"\bquotation marks?\b|\bdouble quotes\b",
    "no comma": r"\bcommas?\b",
}
_TYPES = {name: re.compile(pattern, re.IGNORECASE | re.DOTALL) for name, pattern in EVALUATION_TYPES.items()}


class Screening(Settings):
    """What is done about instructions like those of the evaluation. The seed did nothing: `mark` counts them."""

    action: Literal["mark", "drop"] = "mark"
    types: bool = True  # compare with the kinds of IFEval's instructions


def evaluation_types(text: str, screening: Screening, evaluation: Mapping[str, str]) -> list[str]:
    """The kinds of the evaluation's instructions that this one looks like, and whose 13 words it shares."""
    kinds = [name for name, pattern in _TYPES.items() if pattern.search(text)] if screening.types else []
    return kinds + sorted({evaluation[gram] for gram in ngrams(text) if gram in evaluation})
