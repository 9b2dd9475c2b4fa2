"""How the base is prompted: worked examples drawn from the training source, and taken out of the sampling pool."""

from typing import NamedTuple

from models.specs import PromptTemplate
from storage.hub import NotAtHand, Source
from tasks.loading import demonstrations_of
from tasks.prompts import FewShot, draw_examples, few_shot_template


class FirstTemplate(NamedTuple):
    """The template for the base, and the prompt_ids of the examples in it."""

    template: PromptTemplate
    examples: tuple[str, ...]


def first_template(template: PromptTemplate, few_shot: FewShot | None, train: Source, marker: str) -> FirstTemplate:
    """The given template, behind worked examples if there are to be any."""
    if few_shot is None:
        return FirstTemplate(template, ())
    try:
        examples = draw_examples(list(demonstrations_of(train, marker)), few_shot)
    except NotAtHand:  # in a plan only, which says so
        return FirstTemplate(template, ())
    return FirstTemplate(few_shot_template(template, examples, few_shot), tuple(row.prompt_id for row in examples))
