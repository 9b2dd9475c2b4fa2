"""Iterative RPO: DPO with an NLL term on pairs of own rollouts, again and again (Pang et al. 2024, arXiv:2404.19733).

Where we differ: a prompt without a right rollout makes no pair, where the paper adds the gold solution; the NLL term is
a mean over the batch's tokens (TRL's), not over each completion's; a gate decides which policy is sampled next.
"""

from typing import Literal

from prefect import flow
from pydantic import Field

from flows.bases import Base, corpus_of, given, open_base
from models.specs import EngineSettings, ModelRef, Preference, PromptTemplate, Sampling, Settings
from storage.hub import Source
from tasks.checking import Read, reads_of_splits
from tasks.evaluating import Contender, Evaluation, HeldOut, assess
from tasks.loading import load_prompts
from tasks.pairing import pair_rollouts
from tasks.pairs import Pairing
from tasks.promoting import begin, promote
from tasks.promotion import Gate
from tasks.recording import each_iteration, experiment_run, iteration
from tasks.reporting import publish_report
from tasks.sampling import sample_rollouts, shard_threads
from tasks.scoring import score_answers
from tasks.training import train_preferences


class IterativeRPO(Settings):
    """One experiment of iterative RPO."""

    recipe: Literal["iterative_rpo"]
    experiment: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: Base
    engine: EngineSettings
    marker: str = "FINAL ANSWER:"  # the final answer stands after it
    template: PromptTemplate = PromptTemplate()
    train: Source
    dev: Source  # the gate decides on these
    test: Source  # reported only
    iterations: int = Field(default=4, ge=1)
    sampling: Sampling  # the paper: 30 a prompt at temperature 0.8
    pairing: Pairing  # the paper: walk, 10 a prompt
    preference: Preference  # the paper: losses sigmoid and sft, beta 0.1, learning rate 7e-7, batch 16
    evaluation: Evaluation
    gate: Gate = Gate()

    def reads(self) -> list[Read]:
        """The sources this experiment reads, and what their rows must have; checked before a run."""
        return [*reads_of_splits(self, examples=False), *corpus_of(self.base)]

    def templates(self) -> dict[str, tuple[ModelRef | None, PromptTemplate]]:
        """How the policies are prompted; shown by `ratchet plan`."""
        return {"all policies": (given(self.base), self.template)}

    def measure(self, policy: ModelRef, held_out: HeldOut) -> Contender:
        """How a policy does on dev and test."""
        return assess(policy, self.template, held_out, self.evaluation, self.gate, self.engine, self.marker)


@flow(name="iterative-rpo", flow_run_name="{config.experiment}", task_runner=shard_threads())
def iterative_rpo(config: IterativeRPO, *, advance: bool = False) -> ModelRef:
    """Prefer own right solutions to own wrong ones; each policy's reference is the one before. Returns what stands."""
    with experiment_run(config.experiment, config.model_dump(mode="json"), advance=advance) as experiment:
        train = load_prompts(config.train, without=())
        held_out = HeldOut(load_prompts(config.dev, without=()), load_prompts(config.test, without=()))
        with iteration(0):
            standing = config.measure(open_base(config.base, config.template, config.marker), held_out)  # M_0
            begin(experiment, standing)
        for number in each_iteration(range(1, config.iterations + 1)):
            policy, sampling = standing.policy, config.sampling.for_iteration(number)
            rollouts = sample_rollouts(policy, train, config.template, sampling, config.engine)  # y_i^n ~ M_t
            scored = score_answers(rollouts, train, config.marker)  # r_i^n
            pairs = pair_rollouts(scored, config.pairing, number)  # (y_w, y_l), K a prompt
            policy = train_preferences(policy, (pairs,), config.template, config.preference)  # M_t+1, from M_t
            challenger = config.measure(policy, held_out)
            standing = promote(experiment, f"iteration {number}", challenger, standing, config.gate, scored=scored)
    publish_report(experiment)
    return standing.policy
