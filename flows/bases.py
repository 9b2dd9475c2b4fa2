"""What an experiment starts from: a model there is, or a tiny one that is built first."""

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from models.specs import ModelRef, PromptTemplate, Settings, TinyModel
from storage.hub import Source
from tasks.checking import Read
from tasks.loading import load_demonstrations, open_folder
from tasks.training import build_base


class TinyBase(Settings):
    """A tiny base model, built first from a corpus of demonstrations."""

    corpus: Source
    tiny: TinyModel = TinyModel()


class TinyJudgingBase(TinyBase):
    """A tiny base whose corpus holds judgements too; else 250,000 parameters have no idea of judging to start from."""

    judged: tuple[Source, ...] = Field(min_length=1)  # solutions that are right or wrong by their source's answers


def is_tiny(base: object) -> bool:
    """Whether a base, as settings or as written in a preset, is to be built."""
    return isinstance(base, TinyBase) or (isinstance(base, dict) and "corpus" in base)


def kind_of_base(base: object) -> str:
    """Which of the two kinds of base this is, as settings or as written in a preset."""
    return "tiny" if is_tiny(base) else "model"


Base = Annotated[
    Annotated[TinyBase, Tag("tiny")] | Annotated[ModelRef, Tag("model")],
    Discriminator(kind_of_base),
]


def open_base(base: TinyBase | ModelRef, template: PromptTemplate, marker: str) -> ModelRef:
    """The model the experiment starts from; a tiny one is built."""
    if isinstance(base, TinyBase):
        return build_base(load_demonstrations(base.corpus, marker), base.tiny, template)
    return open_folder(base)


def corpus_of(base: TinyBase | ModelRef) -> list[Read]:
    """What is read to build the base, if it is built."""
    return [Read("base.corpus", base.corpus, completions=True)] if isinstance(base, TinyBase) else []


def given(base: TinyBase | ModelRef) -> ModelRef | None:
    """The base, if it is there before the run."""
    return None if isinstance(base, TinyBase) else base
