"""What seed 2 repairs of SPIN: a judge's labels, and noise (METHODS 4.4). Each is an optional section of the config."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from flows.bases import TinyBase, TinyJudgingBase, is_tiny
from models.specs import EngineSettings, ModelRef, PromptTemplate, ReferenceNoise, Settings
from storage.datasets import DatasetRef
from tasks.asks import AnyAsk, LabelsAsk
from tasks.checking import Read
from tasks.comparing import compare_pairs, relabel_pairs
from tasks.comparisons import Labelling
from tasks.judgements import Asking, as_it_is
from tasks.judging import check_labels
from tasks.loading import load_demonstrations, open_folder
from tasks.mixing import load_both_tasks
from tasks.training import build_base


def _kind_of_judge(base: object) -> str:
    if isinstance(base, TinyBase):
        return "judging" if isinstance(base, TinyJudgingBase) else "tiny"
    judging = isinstance(base, dict) and "judged" in base
    return "judging" if judging else "tiny" if is_tiny(base) else "model"


JudgeModel = Annotated[
    Annotated[TinyJudgingBase, Tag("judging")] | Annotated[TinyBase, Tag("tiny")] | Annotated[ModelRef, Tag("model")],
    Discriminator(_kind_of_judge),
]


class PairJudge(Settings):
    """Repair 1: a judge's labels instead of "human is always better"."""

    base: JudgeModel
    engine: EngineSettings | None = None  # None: the policy's
    template: PromptTemplate = PromptTemplate()  # around what the judge is asked
    asks: AnyAsk = LabelsAsk()
    labelling: Labelling = Labelling()

    def reads(self) -> list[Read]:
        """The sources a tiny judge is made from."""
        if not isinstance(self.base, TinyBase):
            return []
        judged = self.base.judged if isinstance(self.base, TinyJudgingBase) else ()
        return [
            Read("judge.base.corpus", self.base.corpus, completions=True),
            *(Read("judge.base.judged", one, answers=True, completions=True) for one in judged),
        ]

    @model_validator(mode="after")
    def _a_tiny_judge_was_taught_what_it_is_asked(self) -> "PairJudge":
        taught = {TinyJudgingBase: "labels", TinyBase: "likelihood"}.get(type(self.base))
        if taught not in (None, self.asks.kind):
            raise ValueError(
                f"a tiny judge with a corpus of judgements (`judged`) says labels, one without knows likelihoods: this "
                f"one is for asks.kind {taught!r}, and it is {self.asks.kind!r}"
            )
        return self


class EmbeddingNoise(Settings):
    """NEFTune: uniform noise on the policy's embeddings while it is trained; the reference is clean (METHODS 7.4)."""

    alpha: float = Field(default=5.0, gt=0)


class RobustLabels(Settings):
    """The robust loss, with the flip rate that the judge finds among the pairs that are trained on."""


class NoisyReference(Settings):
    """Noise on the reference's logits of rejected sides (DNPO)."""

    pairs: Literal["all", "small margin"] = "all"  # small margin: the adaptive rule, by the judge's margin
    noise: ReferenceNoise = ReferenceNoise()


class Noise(Settings):
    """Repair 2, in four kinds; the seed does not say which one it used (METHODS 4.6)."""

    embedding: EmbeddingNoise | None = None
    robust: RobustLabels | None = None
    temperature: float | None = Field(default=None, gt=0)  # of the rollouts, instead of sampling.temperature
    reference: NoisyReference | None = None


def open_judge(settings: PairJudge, engine: EngineSettings, marker: str) -> ModelRef:
    """The model that judges; where it is to say labels, found able to.

    Args:
        engine: the policy's, for a judge that names none.
    """
    base, asks = settings.base, settings.asks
    if not isinstance(asks, LabelsAsk):
        if isinstance(base, ModelRef):
            return open_folder(base)
        return build_base(load_demonstrations(base.corpus, marker), base.tiny, settings.template)
    asking = Asking(judge=asks.judge, template=settings.template, marker=marker)
    if isinstance(base, TinyJudgingBase):
        corpus = load_both_tasks(base.corpus, base.judged, asking)
        judge = build_base(corpus, base.tiny, as_it_is(settings.template))
    else:
        assert isinstance(base, ModelRef)  # PairJudge sees to it
        judge = open_folder(base)
    check_labels(judge, asking, settings.engine or engine)
    return judge


def label_pairs(
    settings: PairJudge, judge: ModelRef, pairs: DatasetRef, engine: EngineSettings, marker: str
) -> dict[str, DatasetRef]:
    """The pairs as they were played, what the judge thinks of them, and what is left of them, some turned round."""
    compared = compare_pairs(judge, pairs, settings.asks, settings.template, settings.engine or engine, marker)
    return {"played": pairs, "compared": compared, "pairs": relabel_pairs(pairs, compared, settings.labelling)}
