"""One model that writes and judges (MartBakler/Phi-2-Self-Improvement; seed 0, experiment 2; METHODS 3).

Data set 1: rollouts of the base; 2: of the policy trained on 1, both checked by gold answers, both tasks trained. Data
set 3 (solving) and 4 (both tasks): rollouts of the same policy, taken for right or wrong by its own confidence. Then
DPO on data set 4. Where we differ: every SFT starts from the base (the seed does not say); the label-free stages get
prompts whose gold answers were removed, where the seed's converter filtered them by gold (METHODS 3.6.3); labels are
one vocabulary and confidences exact; a judge that is no better than chance on dev does not get to label; the dev split
and not the test split decides which policy stands. All data sets 2 to 4 are made by the policy of data set 1.
"""

from string import Template
from typing import Annotated, Literal, NamedTuple

from prefect import flow
from pydantic import Discriminator, Field, Tag, model_validator

from flows.bases import TinyJudgingBase, kind_of_base
from models.specs import SFT, AnswerSampling, EngineSettings, ModelRef, Preference, PromptTemplate, Settings
from storage.datasets import DatasetRef
from storage.hub import Source
from tasks.allotting import rate_prompts, sample_until_enough
from tasks.calibrating import check_judge
from tasks.calibrations import JudgeGate
from tasks.checking import Read, reads_of_splits
from tasks.evaluating import Evaluation, load_held_out
from tasks.examining import Examination, FilterAbove, examine
from tasks.judgements import Asking, Judge, as_it_is
from tasks.judging import check_labels, judge_rollouts
from tasks.labelling import hide_answers, label_by_confidence, pair_by_confidence
from tasks.labels import LabelFree
from tasks.loading import draw_prompts, load_prompts, open_folder
from tasks.metrics import parse_strategy
from tasks.mixing import load_both_tasks, mix_tasks
from tasks.mixtures import Mixture
from tasks.promoting import begin, promote
from tasks.promotion import Gate
from tasks.prompting import first_template
from tasks.prompts import FewShot
from tasks.recording import experiment_run, iteration
from tasks.reporting import publish_report
from tasks.sampling import sample_rollouts, shard_threads
from tasks.scoring import score_answers
from tasks.selecting import select_demonstrations
from tasks.selection import Selection
from tasks.suspecting import question_gold
from tasks.suspects import Suspicion
from tasks.training import build_base, train_preferences, train_sft

Base = Annotated[
    Annotated[TinyJudgingBase, Tag("tiny")] | Annotated[ModelRef, Tag("model")],
    Discriminator(kind_of_base),
]


class ConfidenceDPO(Settings):
    """The most confident rollout taken for right against the least confident one taken for wrong."""

    minimum_margin: float = Field(default=0.1, ge=0, le=1)  # of the two confidences
    preference: Preference

    @property
    def label(self) -> str:
        """As in the report."""
        return f"DPO (Dataset 4), {'+'.join(self.preference.loss_type)}"


class LabelFreeStages(Settings):
    """Data sets 3 and 4, without gold answers."""

    labelling: LabelFree = LabelFree()
    gate: JudgeGate = JudgeGate()
    dpo: tuple[ConfidenceDPO, ...] = ()


class GeneratorEvaluator(Settings):
    """One experiment of one model that writes and judges."""

    recipe: Literal["generator_evaluator"]
    experiment: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: Base
    engine: EngineSettings
    marker: str = "FINAL ANSWER:"
    template: PromptTemplate = PromptTemplate()
    few_shot: FewShot | None = None  # worked examples for the base; trained policies are asked without
    train: Source
    dev: Source  # the gates decide on these
    test: Source  # reported only
    prompts_per_stage: int | None = Field(default=None, ge=1)  # None: all, for data set 1 and for the others
    sampling: AnswerSampling  # data sets 1 and 2; the label-free stages have no answers to adapt to
    suspicion: Suspicion = Suspicion()  # of gold answers that confident majorities contradict
    selection: Selection = Selection()
    target_rows: tuple[int, int] | None = None  # solutions of data set 1, and of each other; None: all that are kept
    judge: Judge = Judge()
    mixture: Mixture = Mixture()
    sft: SFT
    label_free: LabelFreeStages | None = None
    evaluation: Evaluation
    filter_above: FilterAbove = 0.5
    gate: Gate = Gate()
    published: dict[str, dict[str, float | None]] | None = None  # policy -> strategy -> percent, shown beside ours
    published_of: str | None = None  # what model and data those are of
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _can_be_measured(self) -> "GeneratorEvaluator":
        parse_strategy(self.gate.strategy).check(self.evaluation.dev)
        as_it_is(self.template)
        if self.label_free is not None and self.label_free.labelling.mode != "top":
            votes, rollouts = self.label_free.labelling.minimum_votes, self.sampling.rollouts_per_prompt
            if votes > rollouts:
                raise ValueError(
                    f"label_free.labelling.minimum_votes is {votes} but sampling.rollouts_per_prompt {rollouts}, so no "
                    "answer could win; lower the first or raise the second"
                )
        return self

    @property
    def asking(self) -> Asking:
        """How rollouts are put before the judge."""
        return Asking(judge=self.judge, template=self.template, marker=self.marker)

    @property
    def examination(self) -> Examination:
        """How policies are examined."""
        return Examination(
            engine=self.engine,
            asking=self.asking,
            evaluation=self.evaluation,
            gate=self.gate,
            filter_above=self.filter_above,
        )

    def reads(self) -> list[Read]:
        """The sources this experiment reads, and what their rows must have."""
        corpora = []
        if isinstance(self.base, TinyJudgingBase):
            corpora = [
                Read("base.corpus", self.base.corpus, completions=True),
                *(Read("base.judged", one, answers=True, completions=True) for one in self.base.judged),
            ]
        return [*reads_of_splits(self, examples=self.few_shot is not None), *corpora]

    def templates(self) -> dict[str, tuple[ModelRef | None, PromptTemplate]]:
        """How the base, the policies trained from it and the judge are prompted."""
        ref = None if isinstance(self.base, TinyJudgingBase) else self.base
        few_shot = first_template(self.template, self.few_shot, self.train, self.marker).template
        asked = Template(self.judge.text).safe_substitute(completion="(a solution)")
        judge = as_it_is(self.template).model_copy(update={"user": asked})
        return {"base": (ref, few_shot), "trained policies": (ref, self.template), "judge": (ref, judge)}

    def selection_of(self, stage: int) -> Selection:
        """The selection with the target of data set 1, or of the others."""
        if self.target_rows is None:
            return self.selection
        return self.selection.model_copy(update={"target_rows": self.target_rows[min(stage, 2) - 1]})


class Rated(NamedTuple):
    """Scored rollouts, and what is recorded beside them."""

    scored: DatasetRef
    pass_rates: DatasetRef
    gold_checks: DatasetRef


@flow(name="generator-evaluator", flow_run_name="{config.experiment}", task_runner=shard_threads())
def generator_evaluator(config: GeneratorEvaluator, *, advance: bool = False) -> ModelRef:
    """Train one model to write and to judge, then to learn from its own judgement. Returns the policy that stands.

    Args:
        config: The experiment: its models, data, sampling, judging, training and gate.
        advance: End after the first iteration that has something to do, as a schedule wants it.
    """
    with experiment_run(config.experiment, config.model_dump(mode="json"), advance=advance) as experiment:
        few_shot, examples = first_template(config.template, config.few_shot, config.train, config.marker)
        train = load_prompts(config.train, without=examples)
        held_out = load_held_out(config.dev, config.test)
        how = config.examination
        with iteration(0):
            base = open_base(config)
            check_labels(base, config.asking, config.engine)
            start = examine(base, few_shot, held_out, how, judges=isinstance(config.base, TinyJudgingBase))
            begin(experiment, start.contender, **start.judged)
        standing = start.contender

        with iteration(1):
            drawn = draw_prompts(train, config.prompts_per_stage or train.rows, 1, config.seed)
            rated = rate(config, base, few_shot, drawn, 1)
            first = train_both(config, base, rated.scored, 1)  # data set 1 -> M1
            one = examine(first, config.template, held_out, how, other=start.dev)
            standing = promote(
                experiment, "SFT Dataset 1", one.contender, standing, config.gate, **rated._asdict(), **one.judged
            )
        with iteration(2):
            drawn = draw_prompts(train, config.prompts_per_stage or train.rows, 2, config.seed)
            rated = rate(config, first, config.template, drawn, 2, rated.pass_rates)
            second = train_both(config, base, rated.scored, 2)  # data set 2 -> M2
            two = examine(second, config.template, held_out, how, other=start.dev)
            standing = promote(
                experiment, "SFT Dataset 2", two.contender, standing, config.gate, **rated._asdict(), **two.judged
            )
        if config.label_free is not None:
            publish_report(experiment)  # should the judge be refused, what there is can be read
            check_judge(one.judged["calibration"], config.label_free.gate)
            with iteration(3):
                judged, labelled = label_without_gold(config, first, drawn, config.label_free.labelling)
                solve = select_demonstrations(labelled, config.selection_of(3), 3, config.marker)  # data set 3
                third = train_sft(base, (solve,), config.template, config.sft)
                three = examine(third, config.template, held_out, how, judges=False)
                standing = promote(experiment, "SFT Dataset 3", three.contender, standing, config.gate, scored=labelled)
            with iteration(4):
                fourth = train_both(config, base, labelled, 4)  # data set 4
                four = examine(fourth, config.template, held_out, how, other=start.dev)
                standing = promote(
                    experiment, "SFT Dataset 4", four.contender, standing, config.gate, scored=labelled, **four.judged
                )
            for number, dpo in enumerate(config.label_free.dpo, start=5):
                with iteration(number):
                    pairs = pair_by_confidence(labelled, judged, dpo.minimum_margin, number)
                    policy = train_preferences(fourth, (pairs,), config.template, dpo.preference)
                    last = examine(policy, config.template, held_out, how, other=start.dev)
                    standing = promote(experiment, dpo.label, last.contender, standing, config.gate, **last.judged)
    publish_report(experiment)
    return standing.policy


def open_base(config: GeneratorEvaluator) -> ModelRef:
    """The model the experiment starts from."""
    if isinstance(config.base, TinyJudgingBase):
        corpus = load_both_tasks(config.base.corpus, config.base.judged, config.asking)
        return build_base(corpus, config.base.tiny, as_it_is(config.template))
    return open_folder(config.base)


def rate(
    config: GeneratorEvaluator,
    policy: ModelRef,
    template: PromptTemplate,
    prompts: DatasetRef,
    stage: int,
    known: DatasetRef | None = None,
) -> Rated:
    """Rollouts of a policy, scored by gold answers, and what they say of prompts and gold answers."""
    sampling = config.sampling.for_iteration(stage)
    rollouts = sample_until_enough(policy, prompts, template, sampling, config.engine, config.marker, known)
    scored = score_answers(rollouts, prompts, config.marker)
    rates = rate_prompts(scored, known, sampling.first, stage)
    return Rated(scored, rates, question_gold(scored, prompts, config.suspicion))


def label_without_gold(
    config: GeneratorEvaluator, policy: ModelRef, prompts: DatasetRef, labelling: LabelFree
) -> tuple[DatasetRef, DatasetRef]:
    """Rollouts judged by their own writer, and what is taken for right and wrong; no gold answer is in reach."""
    hidden = hide_answers(prompts)
    sampling = config.sampling.plain.for_iteration(2)  # the rollouts of data set 2, from the ledger
    rollouts = sample_rollouts(policy, hidden, config.template, sampling, config.engine)
    judged = judge_rollouts(policy, rollouts, config.asking, config.engine)
    return judged, label_by_confidence(judged, labelling)


def train_both(config: GeneratorEvaluator, base: ModelRef, scored: DatasetRef, stage: int) -> ModelRef:
    """Train solving and judging on rollouts that are right or wrong, from the base."""
    solve = select_demonstrations(scored, config.selection_of(stage), stage, config.marker)
    mixed = mix_tasks(solve, scored, config.asking, config.mixture, stage, "train")
    held_out = (
        (mix_tasks(solve, scored, config.asking, config.mixture, stage, "held out"),)
        if config.mixture.held_out_share
        else ()
    )
    return train_sft(base, (mixed,), as_it_is(config.template), config.sft, held_out)
