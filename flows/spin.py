"""SPIN: a policy plays against human demonstrations (Chen et al. 2024, arXiv:2401.01335, algorithm 1; METHODS 4).

With the three repairs of seed 2, each an optional section: a judge that turns pairs round or drops them; noise; and
both together, by judged margin. Where we differ: one renderer writes what is sampled and what is trained on, both sides
obey one length cap and truncated rollouts are dropped, where the authors' code gave the policy a length to tell by; the
published iteration t is iteration t + 1 here, for iteration 0 is the base.
"""

from typing import Literal

from prefect import flow
from pydantic import Field, model_validator

from flows.bases import Base, corpus_of, given, open_base
from flows.repairs import Noise, PairJudge, label_pairs, open_judge
from models.specs import SFT, EngineSettings, ModelRef, Preference, PromptTemplate, Sampling, Settings
from storage.datasets import DatasetRef
from storage.hub import Source
from tasks.benchmarking import answer_benchmarks
from tasks.benchmarks import Benchmarks
from tasks.checking import Read
from tasks.comparing import estimate_flip_rate
from tasks.evaluating import Contender, Evaluation, HeldOut, assess, load_held_out
from tasks.headlining import evaluate_headlines
from tasks.loading import draw_prompts, load_demonstrations, load_prompts
from tasks.metrics import parse_strategy
from tasks.playing import describe_pairs, imitate_chosen, pair_with_gold
from tasks.promoting import begin, promote
from tasks.promotion import Gate
from tasks.recording import each_iteration, experiment_run, iteration, split
from tasks.reporting import publish_report
from tasks.sampling import sample_rollouts, shard_threads
from tasks.training import train_preferences, train_sft


class Spin(Settings):
    """One SPIN experiment."""

    recipe: Literal["spin"]
    experiment: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: Base
    engine: EngineSettings
    marker: str = "FINAL ANSWER:"  # the final answer stands after it
    template: PromptTemplate = PromptTemplate()
    demonstrations: Source
    dev: Source | None = None  # the gate decides on these
    test: Source | None = None  # reported only
    warm_up: SFT | None = None  # fine-tune the base on the demonstrations first; None: it is p_theta_0 already
    iterations: int = Field(ge=1)
    prompts_per_iteration: int | None = Field(default=None, ge=1)  # None: all, every time
    sampling: Sampling
    mix_last: int = Field(default=2, ge=1)  # pairs of so many iterations are trained on together
    judge: PairJudge | None = None
    noise: Noise = Noise()
    preference: Preference
    betas: tuple[float, ...] | None = None  # of each iteration; None: preference.beta
    learning_rates: tuple[float, ...] | None = None  # of each iteration; None: preference.learning_rate
    sft: SFT | None = None  # the control: imitate the chosen sides instead of preferring them
    evaluation: Evaluation | None = None  # on dev and test
    benchmarks: Benchmarks | None = None  # lm-eval's
    gate: Gate = Gate(promote="always")  # as published
    published: dict[str, dict[str, float | None]] | None = None  # policy -> strategy -> percent, shown beside ours
    seed: int = Field(default=0, ge=0)  # of everything drawn outside the engine; sampling has seeds of its own

    @model_validator(mode="after")
    def _fits_together(self) -> "Spin":
        held_out = {name: getattr(self, name) for name in ("dev", "test", "evaluation")}
        if missing := [name for name, given in held_out.items() if given is None]:
            if len(missing) < 3 or self.benchmarks is None or self.gate.promote != "always":
                raise ValueError(
                    f"{', '.join(missing)} missing: a policy is measured on dev and test as evaluation says, or on "
                    "benchmarks alone, which decide nothing, with gate.promote: always"
                )
        else:
            assert self.evaluation is not None
            parse_strategy(self.gate.strategy).check(self.evaluation.dev)
        for name in ("betas", "learning_rates"):
            given = getattr(self, name)
            if given is not None and len(given) != self.iterations:
                raise ValueError(f"{len(given)} {name} for {self.iterations} iterations; give one for each")
        if self.preference.lora is not None and not self.preference.lora.merge:
            raise ValueError(
                "preference.lora.merge is false, but an iteration's policy is merged before the next one gets an "
                "adapter, so that the model without it is the reference; set it to true"
            )
        noise = self.preference.embedding_noise, self.preference.reference_noise
        if noise != (None, None) or self.preference.label_smoothing:
            raise ValueError("noise is set under `noise`, not under `preference`; move it there")
        needs_a_judge = self.noise.robust or (self.noise.reference and self.noise.reference.pairs == "small margin")
        if needs_a_judge and self.judge is None:
            raise ValueError("noise.robust and noise by small margin go by a judge's margins, and there is no `judge`")
        if self.noise.robust and set(self.preference.loss_type) != {"sigmoid"}:
            raise ValueError("noise.robust takes the place of the sigmoid loss; set preference.loss_type: [sigmoid]")
        return self

    def reads(self) -> list[Read]:
        """The sources this experiment reads, and what their rows must have."""
        corpora = corpus_of(self.base) + ([] if self.judge is None else self.judge.reads())
        held_out = {"dev": self.dev, "test": self.test}
        return [
            Read("demonstrations", self.demonstrations, completions=True, apart=True),
            *(Read(name, one, answers=True, apart=True) for name, one in held_out.items() if one is not None),
            *corpora,
        ]

    def templates(self) -> dict[str, tuple[ModelRef | None, PromptTemplate]]:
        """How the policies are prompted."""
        return {"all policies": (given(self.base), self.template)}

    @property
    def noisy_below(self) -> float | None:
        """The judged margin below which a pair's reference is noised; None: there is no such rule."""
        reference = self.noise.reference
        by_margin = self.judge is not None and reference is not None and reference.pairs == "small margin"
        return self.judge.labelling.small_below if by_margin and self.judge is not None else None

    def sampling_of(self, iteration: int) -> Sampling:
        """How the rollouts of this iteration are drawn."""
        hotter = {} if self.noise.temperature is None else {"temperature": self.noise.temperature}
        return self.sampling.for_iteration(iteration).model_copy(update=hotter)

    def preference_of(self, iteration: int) -> Preference:
        """How this iteration is trained, but for a flip rate that is yet to be estimated."""
        update: dict[str, object] = {}
        if self.betas is not None:
            update["beta"] = self.betas[iteration - 1]
        if self.learning_rates is not None:
            update["learning_rate"] = self.learning_rates[iteration - 1]
        if self.noise.embedding is not None:
            update["embedding_noise"] = self.noise.embedding.alpha
        if (reference := self.noise.reference) is not None:
            update["reference_noise"] = reference.noise.model_copy(update={"below_margin": self.noisy_below})
        return self.preference.model_copy(update=update)

    def label_of(self, iteration: int) -> str:
        """The policy's name in the report, counted as the seed counts: "SPIN-iter0" is made by iteration 1."""
        noised = any(part is not None for _, part in self.noise)
        kinds = [*(["judged"] if self.judge else []), *(["noised"] if noised else [])]
        return " ".join([*kinds, f"{'SFT' if self.sft else 'SPIN'}-iter{iteration - 1}"])


@flow(name="spin", flow_run_name="{config.experiment}", task_runner=shard_threads())
def spin(config: Spin, *, advance: bool = False) -> ModelRef:
    """Play against the demonstrations; each policy's reference and opponent is the one before. Returns the last one.

    Args:
        config: The experiment: its models, demonstrations, repairs, training and gate.
        advance: End after the first iteration that has something to do, as a schedule wants it.
    """
    with experiment_run(config.experiment, config.model_dump(mode="json"), advance=advance) as experiment:
        demonstrations = load_demonstrations(config.demonstrations, config.marker)  # (x, y)
        prompts = load_prompts(config.demonstrations, without=())
        held_out = load_held_out(config.dev, config.test) if config.dev and config.test else None
        with iteration(0):
            base = open_base(config.base, config.template, config.marker)
            if config.warm_up is not None:
                base = train_sft(base, (demonstrations,), config.template, config.warm_up)
            standing = measure(config, base, held_out)  # p_theta_0
            begin(experiment, standing)
            judge = None if config.judge is None else open_judge(config.judge, config.engine, config.marker)
        recent: list[DatasetRef] = []
        for number in each_iteration(range(1, config.iterations + 1)):
            policy, sampling = standing.policy, config.sampling_of(number)
            drawn = draw_prompts(prompts, config.prompts_per_iteration or prompts.rows, number, config.seed)
            rollouts = sample_rollouts(policy, drawn, config.template, sampling, config.engine)  # y' ~ p_theta_t
            cap = sampling.max_completion_tokens
            pairs = pair_with_gold(rollouts, demonstrations, policy, config.template, cap, number)  # y against y'
            made_from = {"rollouts": rollouts, "pairs": pairs}
            if config.judge is not None and judge is not None:
                made_from |= label_pairs(
                    config.judge, judge, pairs, config.engine, config.marker
                )  # keep, swap or drop by margin
            recent = [*recent, made_from["pairs"]][-config.mix_last :]  # D_t and D_{t-1}
            policy = learn(config, policy, tuple(recent), number)  # theta_{t+1}
            made_from["pair_figures"] = describe(config, made_from, standing.policy)
            challenger = measure(config, policy, held_out)
            standing = promote(experiment, config.label_of(number), challenger, standing, config.gate, **made_from)
    publish_report(experiment)
    return standing.policy


def learn(config: Spin, policy: ModelRef, pairs: tuple[DatasetRef, ...], number: int) -> ModelRef:
    """Train the policy to prefer the chosen sides, its reference as it starts; or, as a control, to imitate them."""
    if config.sft is not None:
        return train_sft(policy, tuple(imitate_chosen(one, number) for one in pairs), config.template, config.sft)
    preference = config.preference_of(number)
    if config.noise.robust is not None and config.judge is not None:
        rate = estimate_flip_rate(pairs, config.judge.labelling.small_below)
        preference = preference.model_copy(update={"loss_type": ("robust",), "label_smoothing": rate})
    return train_preferences(policy, pairs, config.template, preference)


def measure(config: Spin, policy: ModelRef, held_out: HeldOut | None) -> Contender:
    """How a policy does on dev and test, and on benchmarks; without dev, the gate that lets all pass sees these."""
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
        test = evaluate_headlines(answered, None if contender is None else contender.test)
    return Contender(policy, config.template, test if contender is None else contender.dev, test)


def describe(config: Spin, made_from: dict[str, DatasetRef], policy: ModelRef) -> DatasetRef:
    """Figures of the pairs for the report."""
    labelling = None if config.judge is None else config.judge.labelling
    compared = made_from.get("compared")
    return describe_pairs(made_from["pairs"], policy, config.template, compared, labelling, config.noisy_below)
