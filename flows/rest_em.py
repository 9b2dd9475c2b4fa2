"""ReST-EM: alternate sampling and retraining (Singh et al. 2023, arXiv:2312.06585; seed 0, experiment 1).

Where we differ. Every M-step starts from the base, as in the paper (the seed does not say). A gate on a dev split
decides whether a new policy is sampled next; the paper always goes on. As in the seed, a last stage trains the policy
by DPO on its own correct and incorrect rollouts; the broken DPO of the seed's code (METHODS 2.6) is not repeated.
"""

from typing import Literal

from prefect import flow
from pydantic import Field, model_validator

from flows.bases import Base, corpus_of, given, open_base
from models.specs import (
    SFT,
    AnswerSampling,
    EngineSettings,
    ModelRef,
    Preference,
    PromptTemplate,
    Settings,
)
from storage.hub import Source
from tasks.allotting import rate_prompts, sample_until_enough
from tasks.checking import Read, reads_of_splits
from tasks.evaluating import Evaluation, assess, load_held_out
from tasks.loading import draw_prompts, load_prompts
from tasks.metrics import parse_strategy
from tasks.pairing import pair_rollouts
from tasks.pairs import Pairing
from tasks.promoting import begin, promote
from tasks.promotion import Gate
from tasks.prompting import first_template
from tasks.prompts import FewShot
from tasks.recording import each_iteration, experiment_run, iteration
from tasks.reporting import publish_report
from tasks.sampling import shard_threads
from tasks.scoring import score_answers
from tasks.selecting import select_demonstrations
from tasks.selection import Selection
from tasks.suspecting import question_gold
from tasks.suspects import Suspicion
from tasks.training import train_preferences, train_sft


class FinalDPO(Settings):
    """The last stage: pairs from fresh rollouts of all training prompts."""

    sampling: AnswerSampling
    pairing: Pairing = Pairing()
    preference: Preference


class RestEM(Settings):
    """One ReST-EM experiment."""

    recipe: Literal["rest_em"]
    experiment: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: Base
    engine: EngineSettings
    marker: str = "FINAL ANSWER:"  # the final answer stands after it
    template: PromptTemplate = PromptTemplate()
    few_shot: FewShot | None = None  # worked examples for the base; trained policies are asked without
    train: Source
    dev: Source  # the gate decides on these
    test: Source  # reported only
    iterations: int = Field(ge=1)
    prompts_per_iteration: int | None = Field(default=None, ge=1)  # None: all, every time
    sampling: AnswerSampling
    suspicion: Suspicion = Suspicion()  # of gold answers that confident majorities contradict
    selection: Selection = Selection()
    target_rows: tuple[int, ...] | None = None  # demonstrations wanted, an iteration each; None: all that are kept
    demonstrations: Literal["latest", "all"] = "latest"  # the M-step trains on those of this iteration, or of all
    sft: SFT
    dpo: FinalDPO | None = None
    evaluation: Evaluation
    gate: Gate = Gate()
    seed: int = Field(default=0, ge=0)  # of everything drawn outside the engine; sampling has seeds of its own

    @model_validator(mode="after")
    def _a_target_for_each_iteration(self) -> "RestEM":
        if self.target_rows is not None and len(self.target_rows) != self.iterations:
            raise ValueError(f"{len(self.target_rows)} target_rows for {self.iterations} iterations; give one for each")
        return self

    @model_validator(mode="after")
    def _enough_rollouts_for_the_gate(self) -> "RestEM":
        parse_strategy(self.gate.strategy).check(self.evaluation.dev)
        return self

    def reads(self) -> list[Read]:
        """The sources this experiment reads, and what their rows must have."""
        return [*reads_of_splits(self, examples=self.few_shot is not None), *corpus_of(self.base)]

    def templates(self) -> dict[str, tuple[ModelRef | None, PromptTemplate]]:
        """How the base and the policies trained from it are prompted."""
        few_shot = first_template(self.template, self.few_shot, self.train, self.marker).template
        return {"base": (given(self.base), few_shot), "trained policies": (given(self.base), self.template)}

    def selection_of(self, iteration: int) -> Selection:
        """The selection with the target of this iteration, if it has one."""
        if self.target_rows is None:
            return self.selection
        return self.selection.model_copy(update={"target_rows": self.target_rows[iteration - 1]})


@flow(name="rest-em", flow_run_name="{config.experiment}", task_runner=shard_threads())
def rest_em(config: RestEM, *, advance: bool = False) -> ModelRef:
    """Alternate sampling and retraining; every M-step starts from the base model. Returns the policy that stands.

    Args:
        config: The experiment: its models, data, sampling, training and gate.
        advance: End after the first iteration that has something to do, as a schedule wants it.
    """
    with experiment_run(config.experiment, config.model_dump(mode="json"), advance=advance) as experiment:
        few_shot, examples = first_template(config.template, config.few_shot, config.train, config.marker)
        train = load_prompts(config.train, without=examples)
        held_out = load_held_out(config.dev, config.test)
        with iteration(0):
            base = open_base(config.base, config.template, config.marker)
            incumbent = assess(base, few_shot, held_out, config.evaluation, config.gate, config.engine, config.marker)
            begin(experiment, incumbent)
        kept, rates = [], None
        for number in each_iteration(range(1, config.iterations + 1)):
            drawn = draw_prompts(train, config.prompts_per_iteration or train.rows, number, config.seed)
            sampling = config.sampling.for_iteration(number)
            rollouts = sample_until_enough(
                incumbent.policy, drawn, incumbent.template, sampling, config.engine, config.marker, rates
            )  # E-step
            scored = score_answers(rollouts, drawn, config.marker)  # r(x, y)
            rates = rate_prompts(scored, rates, sampling.first, number)
            checks = question_gold(scored, drawn, config.suspicion)
            kept.append(select_demonstrations(scored, config.selection_of(number), number, config.marker))  # D_i
            chosen = tuple(kept) if config.demonstrations == "all" else (kept[-1],)
            policy = train_sft(base, chosen, config.template, config.sft)  # M-step, from the base
            challenger = assess(
                policy, config.template, held_out, config.evaluation, config.gate, config.engine, config.marker
            )
            made_from = {"scored": scored, "pass_rates": rates, "gold_checks": checks}
            incumbent = promote(experiment, f"iteration {number}", challenger, incumbent, config.gate, **made_from)
        if config.dpo is not None:
            with iteration(config.iterations + 1):
                sampling = config.dpo.sampling.for_iteration(config.iterations + 1)
                rollouts = sample_until_enough(
                    incumbent.policy, train, incumbent.template, sampling, config.engine, config.marker, rates
                )
                scored = score_answers(rollouts, train, config.marker)
                rates = rate_prompts(scored, rates, sampling.first, config.iterations + 1)
                checks = question_gold(scored, train, config.suspicion)
                pairs = pair_rollouts(scored, config.dpo.pairing, config.iterations + 1)
                policy = train_preferences(incumbent.policy, (pairs,), config.template, config.dpo.preference)
                challenger = assess(
                    policy, config.template, held_out, config.evaluation, config.gate, config.engine, config.marker
                )
                made_from = {"scored": scored, "pass_rates": rates, "gold_checks": checks}
                incumbent = promote(experiment, "dpo", challenger, incumbent, config.gate, **made_from)
    publish_report(experiment)
    return incumbent.policy
