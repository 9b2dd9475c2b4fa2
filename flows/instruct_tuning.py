"""Instruct tuning: SFT on mixed conversations, then APO or DPO on mixed pairs (seeds 1 and 3; METHODS 6).

APO is D'Oosterlinck et al. 2024, arXiv:2408.06266. Where we differ from the seeds: the loss is on what the assistant
writes, packed rows do not see each other, new chat tokens are trained, LoRA stays off the head, merging is in fp32, and
base, SFT and preference policy are measured alike, so that the last stage's own effect is seen.
"""

import logging
from typing import Literal

from prefect import flow
from pydantic import Field, model_validator

from flows.bases import Base, corpus_of, given, open_base
from flows.repairs import PairJudge, open_judge
from models.specs import SFT, EngineSettings, ModelRef, Preference, PromptTemplate, Sampling, Settings
from storage.datasets import DatasetRef
from storage.hub import Source
from tasks.anchoring import choose_anchor, draw_pair_prompts, pair_with_own
from tasks.benchmarking import answer_benchmarks
from tasks.benchmarks import Benchmarks
from tasks.blending import Mixture, PairMixture, blend
from tasks.checking import Read
from tasks.comparing import compare_pairs
from tasks.evaluating import Contender, Evaluation, HeldOut, assess, load_held_out
from tasks.guarding import Guarded, guard_against
from tasks.headlining import Gsm8kReading, evaluate_headlines
from tasks.metrics import parse_strategy
from tasks.promoting import begin, promote
from tasks.promotion import Gate
from tasks.recording import experiment_run, iteration, split
from tasks.reporting import publish_report
from tasks.sampling import sample_rollouts, shard_threads
from tasks.training import train_preferences, train_sft

log = logging.getLogger("ratchet")


class AutoAPO(Settings):
    """Choose apo_zero or apo_down: a judge compares the chosen texts with what the SFT policy writes itself."""

    judge: PairJudge
    sampling: Sampling = Sampling(rollouts_per_prompt=1)
    prompts: int = Field(default=200, ge=1)


class PreferenceStage(Settings):
    """The second stage. Its reference is the SFT policy, whose log-probs are computed once before training."""

    pairs: PairMixture
    training: Preference
    auto: AutoAPO | None = None

    @model_validator(mode="after")
    def _one_names_the_loss(self) -> "PreferenceStage":
        if self.auto is not None and self.training.loss_type != ("sigmoid",):
            raise ValueError("auto chooses the loss, and training.loss_type names one; remove one of the two")
        if self.training.lora is not None and not self.training.lora.merge:
            raise ValueError("training.lora.merge is false, but the recipe ends in a model folder; set it to true")
        return self


class InstructTuning(Settings):
    """One instruct-tuning experiment."""

    recipe: Literal["instruct_tuning"]
    experiment: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: Base
    engine: EngineSettings
    marker: str = "FINAL ANSWER:"  # the final answer stands after it, on dev and test
    system: str | None = None  # put before every chat that has no system text of its own
    conversations: Mixture
    sft: SFT
    preference: PreferenceStage | None = None
    dev: Source | None = None  # the gate decides on these
    test: Source | None = None  # reported only
    evaluation: Evaluation | None = None  # on dev and test
    benchmarks: Benchmarks | None = None  # lm-eval's
    gsm8k: Gsm8kReading = "flexible-extract"  # how its answers are read for the tables
    gate: Gate = Gate()
    published: dict[str, dict[str, float | None]] | None = None  # policy -> strategy -> percent, shown beside ours

    @model_validator(mode="after")
    def _fits_together(self) -> "InstructTuning":
        held_out = {name: getattr(self, name) for name in ("dev", "test", "evaluation")}
        if missing := [name for name, given in held_out.items() if given is None]:
            if len(missing) < 3 or self.benchmarks is None:
                raise ValueError(
                    f"{', '.join(missing)} missing: a policy is measured on dev and test as evaluation says, on "
                    "benchmarks, or on both"
                )
        elif self.evaluation is not None:
            parse_strategy(self.gate.strategy).check(self.evaluation.dev)
        if self.gate.maximum_benchmark_drop is not None and self.benchmarks is None:
            raise ValueError("gate.maximum_benchmark_drop is set, but there are no `benchmarks`; add some")
        if self.sft.lora is not None and not self.sft.lora.merge:
            raise ValueError("sft.lora.merge is false, but the next stage starts from a whole model; set it to true")
        return self

    @property
    def kept_apart_from(self) -> tuple[Guarded, ...]:
        """The benchmarks whose questions some of the rows may not hold."""
        pairs = () if self.preference is None else self.preference.pairs.apart_from
        return (*self.conversations.apart_from, *pairs)

    @property
    def template(self) -> PromptTemplate:
        """How all policies are prompted."""
        return PromptTemplate(system=self.system)

    def reads(self) -> list[Read]:
        """The sources this experiment reads beside its mixtures, and what their rows must have."""
        held_out = {"dev": self.dev, "test": self.test}
        corpora = corpus_of(self.base)
        if self.preference is not None and self.preference.auto is not None:
            corpora += self.preference.auto.judge.reads()
        return [*(Read(name, one, answers=True, apart=True) for name, one in held_out.items() if one), *corpora]

    def templates(self) -> dict[str, tuple[ModelRef | None, PromptTemplate]]:
        """How the policies are prompted."""
        base, chat = given(self.base), self.sft.chat_tokens
        if base is None or chat is None:
            return {"all policies": (base, self.template)}
        tuned = base.model_copy(update={"chat_template": chat.template})
        return {"base": (base, self.template), "trained policies": (tuned, self.template)}


@flow(name="instruct-tuning", flow_run_name="{config.experiment}", task_runner=shard_threads())
def instruct_tuning(config: InstructTuning, *, advance: bool = False) -> ModelRef:
    """Fine-tune, then train on pairs; base, SFT and preference policy are measured alike. Returns what stands.

    Args:
        config: The experiment: its models, data, training and gate.
        advance: End after the first stage that has something to do, as a schedule wants it.
    """
    with experiment_run(config.experiment, config.model_dump(mode="json"), advance=advance) as experiment:
        held_out = load_held_out(config.dev, config.test) if config.dev and config.test else None
        guard = guard_against(config.kept_apart_from, held_out or ())
        with iteration(0):
            base = measure(config, open_base(config.base, config.template, config.marker), held_out)
            begin(experiment, base)
        with iteration(1):
            conversations = blend(config.conversations, guard, base.policy, config.system)
            sft = measure(config, train_sft(base.policy, (conversations,), config.template, config.sft), held_out, base)
            standing = promote(experiment, "SFT", sft, base, config.gate, conversations=conversations)
        if config.preference is not None:
            with iteration(2):
                pairs = blend(config.preference.pairs, guard, sft.policy, config.system)
                training, made_from = choose_loss(config, config.preference, sft.policy, pairs)
                policy = train_preferences(sft.policy, (pairs,), config.template, training)  # reference: SFT
                challenger, label = measure(config, policy, held_out, base), f"SFT + {kind_of(training)}"
                standing = promote(experiment, label, challenger, standing, config.gate, **made_from)
    publish_report(experiment)
    return standing.policy


def choose_loss(
    config: InstructTuning, stage: PreferenceStage, policy: ModelRef, pairs: DatasetRef
) -> tuple[Preference, dict[str, DatasetRef]]:
    """How to train on the pairs, and what that and the record are made from."""
    if stage.auto is None:
        return stage.training, {"pairs": pairs}
    auto = stage.auto
    prompts = draw_pair_prompts(pairs, auto.prompts, auto.sampling.seed)
    rollouts = sample_rollouts(policy, prompts, config.template, auto.sampling, config.engine)
    own = pair_with_own(rollouts, pairs, 2)
    judge = open_judge(auto.judge, config.engine, config.marker)
    engine = auto.judge.engine or config.engine
    compared = compare_pairs(judge, own, auto.judge.asks, auto.judge.template, engine, config.marker)
    anchor = choose_anchor(compared)
    log.info("%s", anchor.reason)
    return stage.training.model_copy(update={"loss_type": (anchor.loss,)}), {"pairs": pairs, "compared": compared}


def kind_of(training: Preference) -> str:
    """The method's name in the report."""
    return "APO" if any(loss.startswith("apo_") for loss in training.loss_type) else "DPO"


def measure(
    config: InstructTuning, policy: ModelRef, held_out: HeldOut | None, base: Contender | None = None
) -> Contender:
    """How a policy does on dev and test and on benchmarks; without dev, the gate looks at the benchmarks alone."""
    contender = None
    if held_out is not None and config.evaluation is not None:
        contender = assess(
            policy, config.template, held_out, config.evaluation, config.gate, config.engine, config.marker
        )
    if config.benchmarks is None:
        assert contender is not None  # _fits_together
        return contender
    with split("test"):
        answered = answer_benchmarks(policy, config.template, config.benchmarks, config.engine)
        told, floor = evaluate_headlines(answered, None, config.gsm8k), None if base is None else base.benchmarks
        if contender is None:
            return Contender(policy, config.template, told, told, told, floor)
        test = evaluate_headlines(answered, contender.test, config.gsm8k)
        return contender._replace(test=test, benchmarks=told, floor=floor)
