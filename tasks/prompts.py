"""Identity of prompts, templates with worked examples, and the overlap of training with held-out text."""

import hashlib
import random
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from string import Template

from pydantic import Field

from models.specs import PromptTemplate, Settings
from storage.rows import Demonstration

ID_CHARACTERS = 24  # hex: 96 bits, so that two of a billion prompts share one with a chance of 1 in 10^11
NGRAM = 13  # words, as in GPT-3's contamination study (arXiv:2005.14165, appendix C)

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # GSM8K's calculator calls
_PROMPT = re.compile(r"(?<!\$)(?:\$\$)*\$(?:prompt\b|\{prompt\})")


class FewShot(Settings):
    """Worked examples before the prompt. METHODS 2.3: five, for a base model."""

    examples: int = Field(default=5, ge=1)
    instruction: str = ""  # stands before them; the template's own text before $prompt follows it
    seed: int = Field(default=0, ge=0)


def prompt_id(source: str, text: str) -> str:
    """Identity of a prompt: 24 hex characters that depend on its source and on its text but for white space."""
    same = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.sha256(f"{source}\n{same}".encode(errors="surrogatepass")).hexdigest()[:ID_CHARACTERS]


def draw_examples(demonstrations: Sequence[Demonstration], few_shot: FewShot) -> list[Demonstration]:
    """Worked examples of different prompts, the same whatever the order of the demonstrations.

    Raises:
        ValueError: there are fewer prompts than examples are wanted.
    """
    first: dict[str, Demonstration] = {}
    for row in sorted(demonstrations, key=lambda row: (row.prompt_id, row.rollout_index or 0, row.completion)):
        first.setdefault(row.prompt_id, row)
    if len(first) < few_shot.examples:
        raise ValueError(
            f"few_shot.examples is {few_shot.examples} but the demonstrations are of {len(first)} prompts; lower it or "
            "use a source with more rows"
        )
    return random.Random(f"{few_shot.seed}:few-shot").sample(list(first.values()), few_shot.examples)


def few_shot_template(template: PromptTemplate, examples: Sequence[Demonstration], few_shot: FewShot) -> PromptTemplate:
    """The template with worked examples before the prompt, each written as the prompt is.

    The paragraph that holds `$prompt`, and what follows it, is repeated for each example; text above it stands once.
    A `$` in an example becomes `$$`. Calculator annotations are taken out of the completions (METHODS 1.3.4).

    Raises:
        ValueError: the template ends in a space, where a tokenizer would cut differently (METHODS 2.6.13), or holds a
            `$name` other than `$prompt`.
    """
    if template.user[-1] in " \t":
        raise ValueError(
            f"the user template ends in {template.user[-1]!r}: {template.user[-40:]!r}; a model is to begin with that "
            "space itself, so remove it or end the template on a newline"
        )
    above, ask = _split_at_prompt(template.user)
    instruction = [_escaped(few_shot.instruction.strip())] if few_shot.instruction.strip() else []
    worked = [_worked(ask, example) for example in examples]
    return template.model_copy(update={"user": "\n\n".join([*instruction, *above, *worked, ask])})


def without_annotations(completion: str) -> str:
    """The completion without GSM8K's calculator calls, for instance `<<48/2=24>>`."""
    return _ANNOTATION.sub("", completion)


def ngrams(text: str, n: int = NGRAM) -> set[str]:
    """The runs of n words of a text, lower case and without punctuation; of a shorter text, the whole of it."""
    words = re.findall(r"\w+", text.lower())
    if not words:
        return set()
    return {" ".join(words[start : start + n]) for start in range(max(1, len(words) - n + 1))}


def overlap(training: Iterable[str], held_out: Mapping[str, str], n: int = NGRAM) -> list[str]:
    """Ids of the held-out texts that share a run of n words with a training text, in their order.

    Args:
        training: any number of texts; they are streamed.
        held_out: id -> text; these are held in memory.
    """
    holders: dict[str, set[str]] = {}
    for identity, text in held_out.items():
        for gram in ngrams(text, n):
            holders.setdefault(gram, set()).add(identity)
    shared = {identity for text in training for gram in ngrams(text, n) for identity in holders.get(gram, ())}
    return [identity for identity in held_out if identity in shared]


def _split_at_prompt(user: str) -> tuple[list[str], str]:
    found = _PROMPT.search(user)
    if found is None:
        raise ValueError(f"the user template holds $$prompt, the text, but no $prompt: {user!r}; write one $")
    above, gap, _ = user[: found.start()].rpartition("\n\n")
    return ([above] if above.strip() else []), user[len(above) + len(gap) :]


def _worked(ask: str, example: Demonstration) -> str:
    try:
        asked = Template(ask).substitute(prompt=example.prompt.strip())
    except KeyError as error:
        raise ValueError(
            f"the user template holds ${error.args[0]}; only $prompt is filled in, $$ is a dollar"
        ) from error
    gap = "" if asked.endswith("\n") else "\n"
    return _escaped(f"{asked}{gap}{without_annotations(example.completion).strip()}")


def _escaped(text: str) -> str:
    return text.replace("$", "$$")
