"""AutoIF: instructions, verifiers and cases written by a model, checked against each other, executed.

Dong et al. 2024 (arXiv:2406.13542) as seed 4 has it (METHODS 5): a query drives its instruction, completions are scored
by the share of verifiers they pass, pairs are zipped, DPO. Where we differ: verifiers run in a sandbox, are at least
two, and vouch for themselves on held-out cases that were written apart from them; one that broke has no vote; held-out
instructions measure the policy, and a gate decides whether it stands. The paper's SFT stage and its rewriting of
hand-written instructions are left out.
"""

from collections import Counter
from typing import Literal, NamedTuple

from prefect import flow
from pydantic import Field, model_validator

from flows.bases import Base, TinyBase, corpus_of, given, open_base
from models.specs import EngineSettings, ModelRef, Preference, PromptTemplate, Sampling, Settings
from storage.datasets import DatasetRef
from storage.hub import NotAtHand, Source
from tasks.benchmarking import evaluate_benchmarks
from tasks.benchmarks import Benchmarks
from tasks.checking import Read
from tasks.consistency import Consistency
from tasks.evaluating import Contender, Evaluation, evaluate_answers
from tasks.instances import Combining
from tasks.instructions import Length, Proposing, with_a_prompt
from tasks.loading import load_prompts, prompts_of
from tasks.metrics import parse_strategy
from tasks.pairing import pair_rollouts
from tasks.pairs import Pairing
from tasks.promoting import begin, promote
from tasks.promotion import Gate
from tasks.recording import each_iteration, experiment_run, iteration, split
from tasks.reporting import publish_report
from tasks.reviewing import (
    apply_judge,
    ask_back_translations,
    ask_the_judge,
    ask_to_compare,
    drop_contradicted,
    read_comparisons,
)
from tasks.sampling import sample_rollouts, shard_threads
from tasks.sandbox import Limits, SandboxError, isolation
from tasks.serving import give_back_accelerator
from tasks.supervising import (
    Queries,
    Supervisor,
    ask,
    ask_about_instructions,
    ask_for_instructions,
    ask_plainly,
    combine_instances,
    load_queries,
    open_supervisor,
    queries_of,
    read_cases,
    read_instructions,
    read_verifiers,
)
from tasks.supervision import Relevance, Translating
from tasks.training import train_preferences
from tasks.verifiers import WritingCases, WritingVerifiers
from tasks.verifying import Completions, check_verifiers, show_verifiers, verify_rollouts
from tasks.votes import Completing, Voting
from tasks.voting import score_by_votes

SUPERVISED = ("supervisor", "proposing", "verifiers", "cases", "back_translation", "judge")  # asked of the supervisor


class AutoIF(Settings):
    """One AutoIF experiment. Defaults are seed 4's (METHODS 5.2)."""

    recipe: Literal["autoif"]
    experiment: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: Base
    engine: EngineSettings
    supervisor: Supervisor | None = None  # None: the base itself
    template: PromptTemplate = PromptTemplate()  # for the policy
    queries: Source
    dev: Source  # queries that the gate's held-out instructions are put to
    test: Source  # queries for those that are reported only
    length: Length = Length()
    between: tuple[str, str] | None = None  # the query is what stands between these in the source's text
    proposing: Proposing = Proposing()
    evaluation_prompts: Source | None = None  # of which no instruction is to share 13 words, as IFEval's
    verifiers: WritingVerifiers = WritingVerifiers()
    cases: WritingCases = WritingCases()
    limits: Limits = Limits()
    consistency: Consistency = Consistency()
    back_translation: Translating | None = None
    combining: Combining = Combining()
    completing: Completing = Completing()
    voting: Voting = Voting()
    judge: Relevance | None = None
    pairing: Pairing = Pairing()
    dpo: tuple[Preference, ...] = Field(min_length=1)  # each trains the sampled policy on the same pairs
    iterations: int = Field(default=1, ge=1)  # each samples the policy that stands
    evaluation: Evaluation
    benchmarks: Benchmarks | None = None  # by lm-eval, reported only
    gate: Gate = Gate()
    published: dict[str, dict[str, float | None]] | None = None  # policy -> strategy -> percent, shown beside ours
    published_yields: dict[str, dict[str, float | None]] | None = None  # whose -> stage -> rows
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _each_policy_has_a_label_of_its_own(self) -> "AutoIF":
        labels = [self.label_of(number) for number in range(1, len(self.dpo) + 1)]
        if len(set(labels)) < len(labels):
            raise ValueError(f"dpo holds entries that the report could not tell apart: {labels}; give other betas")
        return self

    @model_validator(mode="after")
    def _can_be_measured(self) -> "AutoIF":
        parse_strategy(self.gate.strategy).check(self.evaluation.dev)
        for name in [self.gate.strategy, *(name for one in self.evaluation.test for name in one.strategies)]:
            if parse_strategy(name).kind == "maj":
                raise ValueError(f"{name!r} votes on answers, and completions have none here; use mean@1 or pass@k")
        return self

    @property
    def marker(self) -> str:
        """No completion has a final answer here."""
        return ""

    def reads(self) -> list[Read]:
        """The sources this experiment reads, and what their rows must have."""
        return [Read("queries", self.queries), Read("dev", self.dev), Read("test", self.test), *corpus_of(self.base)]

    def templates(self) -> dict[str, tuple[ModelRef | None, PromptTemplate]]:
        """How the policy and the supervisor are prompted; an instruction is not known yet."""
        policy = given(self.base)
        supervisor = policy if self.supervisor is None else self.supervisor.model
        instance = with_a_prompt(self.combining.text)
        user = self.template.user.replace("${prompt}", "$prompt").replace("$prompt", instance)
        asked = {"an instruction": self.proposing.text, "a verifier": self.verifiers.text, "cases": self.cases.text}
        return {
            "policy": (policy, self.template.model_copy(update={"user": user})),
            **{
                f"supervisor, for {what}": (supervisor, PromptTemplate(user=with_a_prompt(text)))
                for what, text in asked.items()
            },
        }

    def first_prompt(self) -> str:
        """The first query."""
        return next(queries_of(self.queries, self.length, self.between, Counter())).prompt

    def label_of(self, number: int) -> str:
        """What a policy is called in the report, by the number of its iteration."""
        iteration, place = divmod(number - 1, len(self.dpo))
        preference = self.dpo[place]
        nll = ", NLL" if "sft" in preference.loss_type else ""
        again = f", iteration {iteration + 1}" if self.iterations > 1 else ""
        return f"DPO, beta {preference.beta:g}{nll}{again}"

    def engine_of(self, name: str) -> EngineSettings:
        """The engine that the setting of this dotted name is for: the policy's or the supervisor's."""
        if self.supervisor is not None and name.partition(".")[0] in SUPERVISED:
            return self.supervisor.engine
        return self.engine

    def faults(self) -> list[str]:
        """What only this recipe can find wrong before it starts."""
        found = []
        if self.supervisor is None and isinstance(self.base, TinyBase):
            found.append("supervisor: a tiny base cannot write verifiers; name a supervisor")
        for name in ("queries", "dev", "test"):
            try:
                if next(queries_of(getattr(self, name), self.length, self.between, Counter()), None) is None:
                    found.append(f"{name}: the source has no query to use; see length, between and {name}.columns")
            except NotAtHand:  # a plan says so
                continue
            except (ValueError, OSError) as error:
                found.append(f"{name}: {error}")
        if self.evaluation_prompts is not None:
            try:
                for _ in prompts_of(self.evaluation_prompts):
                    pass
            except NotAtHand:
                pass
            except (ValueError, OSError) as error:
                found.append(f"evaluation_prompts: {error}")
        try:
            isolation(self.limits)
        except SandboxError as error:
            found.append(f"limits: {error}")
        return found


class Trusted(NamedTuple):
    """Instructions and the verifiers that were kept for them."""

    instructions: DatasetRef
    checked: DatasetRef


class HeldOut(NamedTuple):
    """Instances whose instructions no policy is trained on."""

    dev: DatasetRef
    test: DatasetRef


@flow(name="autoif", flow_run_name="{config.experiment}", task_runner=shard_threads())
def autoif(config: AutoIF, *, advance: bool = False) -> ModelRef:
    """Train a policy to follow instructions that programs check. Returns the policy that stands.

    Args:
        config: The experiment: its models, queries, what the supervisor is asked, checks, sampling, training and gate.
        advance: End after the first iteration that has something to do, as a schedule wants it.
    """
    with experiment_run(config.experiment, config.model_dump(mode="json"), advance=advance) as experiment:
        isolation(config.limits)  # without a sandbox nothing is begun, on whatever machine a schedule runs this
        base = open_base(config.base, config.template, config.marker)
        supervisor = open_supervisor(config.supervisor, base, config.engine)
        queries = Queries(
            load_queries(config.queries, config.length, config.between),
            *(load_held_out(config, name) for name in ("dev", "test")),
        )
        trusted = cross_checked(config, supervisor, queries.train)
        held_out = HeldOut(
            combine_held_out(config, trusted, queries.dev, "dev"),
            combine_held_out(config, trusted, queries.test, "test"),
        )
        instances = combine_instances(*trusted, queries.train, "train", config.combining)
        hand_over(config, supervisor)
        with iteration(0):
            incumbent = assess(config, base, trusted, held_out)
            begin(experiment, incumbent, **measure(config, base))
        for number in each_iteration(range(1, config.iterations * len(config.dpo) + 1)):
            place = (number - 1) % len(config.dpo)
            if place == 0:
                sampled = incumbent.policy
                sampling = config.completing.sampling.for_iteration(number)
                completions = complete(config, sampled, trusted, instances, sampling)  # N a query and instruction
                verified = verify_rollouts(instances, trusted.checked, *completions, config.limits)
                scored = score_by_votes(instances, *completions, verified, config.voting)  # pass rates
                if config.judge is not None:
                    scored = judge(config, config.judge, supervisor, scored, instances)
                pairs = pair_rollouts(scored, config.pairing, number)  # the shorter list is cycled
            policy = train_preferences(sampled, (pairs,), config.template, config.dpo[place])
            challenger = assess(config, policy, trusted, held_out)
            made = {"scored": scored, **measure(config, policy)}
            incumbent = promote(experiment, config.label_of(number), challenger, incumbent, config.gate, **made)
    publish_report(experiment)
    return incumbent.policy


def load_held_out(config: AutoIF, name: Literal["dev", "test"]) -> DatasetRef:
    """The queries of a held-out split."""
    with split(name):
        return load_queries(getattr(config, name), config.length, config.between)


def cross_checked(config: AutoIF, supervisor: Supervisor, queries: DatasetRef) -> Trusted:
    """Instructions with verifiers that hold on cases written apart from them."""
    with split("instructions"):
        evaluation = None if config.evaluation_prompts is None else load_prompts(config.evaluation_prompts, without=())
        asked = ask_for_instructions(queries, config.proposing)
        replies = ask(supervisor, asked, config.proposing.sampling)
        instructions = read_instructions(replies, queries, config.proposing, evaluation)
    with split("verifiers"):
        asked = ask_about_instructions(instructions, config.verifiers)
        verifiers = read_verifiers(ask(supervisor, asked, config.verifiers.sampling), instructions, config.verifiers)
    with split("cases"):
        asked = ask_about_instructions(instructions, config.cases)
        cases = read_cases(ask(supervisor, asked, config.cases.sampling), instructions, config.cases)
    checked = check_verifiers(verifiers, cases, config.consistency, config.limits)
    if config.back_translation is not None:
        with split("back-translation"):
            checked = translated_back(config, config.back_translation, supervisor, instructions, checked)
    return Trusted(instructions, checked)


def translated_back(
    config: AutoIF, settings: Translating, supervisor: Supervisor, instructions: DatasetRef, checked: DatasetRef
) -> DatasetRef:
    """The verifiers, less those whose instruction, read off them, contradicts the real one."""
    backs = ask(supervisor, ask_back_translations(checked, settings), settings.sampling)
    compared = ask(supervisor, ask_to_compare(checked, instructions, backs, settings), settings.sampling)
    translations = read_comparisons(checked, instructions, backs, compared, settings)
    return drop_contradicted(checked, translations, settings, config.consistency.minimum_verifiers)


def combine_held_out(config: AutoIF, trusted: Trusted, queries: DatasetRef, name: Literal["dev", "test"]) -> DatasetRef:
    """The instances of a held-out split."""
    with split(name):
        return combine_instances(*trusted, queries, name, config.combining)


def complete(
    config: AutoIF, policy: ModelRef, trusted: Trusted, instances: DatasetRef, sampling: Sampling
) -> Completions:
    """The policy's completions, drawn with and without a verifier in sight as `completing.show_verifier` says."""
    plain = config.completing.plain()
    shown = sampling.rollouts_per_prompt - plain
    drawn_plain = drawn_shown = None
    if plain:
        few = sampling.model_copy(update={"rollouts_per_prompt": plain})
        drawn_plain = sample_rollouts(policy, ask_plainly(instances), config.template, few, config.engine)
    if shown:
        few = sampling.model_copy(update={"rollouts_per_prompt": shown})
        prompts = show_verifiers(instances, trusted.checked, config.completing, config.seed)
        drawn_shown = sample_rollouts(policy, prompts, config.template, few, config.engine)
    return Completions(drawn_plain, drawn_shown)


def hand_over(config: AutoIF, supervisor: Supervisor) -> None:
    """Have the accelerator free for the other engine, where policy and supervisor have one each."""
    if supervisor.engine != config.engine:
        give_back_accelerator()


def judge(
    config: AutoIF, settings: Relevance, supervisor: Supervisor, scored: DatasetRef, instances: DatasetRef
) -> DatasetRef:
    """The scored completions, less the rewards of those that follow the instruction and do not answer the query."""
    hand_over(config, supervisor)
    with split("judge"):
        asked = ask_the_judge(scored, instances, settings, config.pairing.chosen_minimum)
        return apply_judge(scored, instances, ask(supervisor, asked, settings.sampling), settings)


def assess(config: AutoIF, policy: ModelRef, trusted: Trusted, held_out: HeldOut) -> Contender:
    """Measure a policy on held-out instructions; no verifier is ever in sight there."""

    def scored(instances: DatasetRef, sampling: Sampling) -> DatasetRef:
        rollouts = sample_rollouts(policy, ask_plainly(instances), config.template, sampling, config.engine)
        verified = verify_rollouts(instances, trusted.checked, rollouts, None, config.limits)
        # the same verifiers vote for every policy, whatever it writes, or figures could not be compared
        voting = config.voting.model_copy(update={"accepts_all_of": None, "maximum_undecided": 1.0})
        return score_by_votes(instances, rollouts, None, verified, voting)

    with split("dev"):
        dev = evaluate_answers((scored(held_out.dev, config.evaluation.dev),), ((config.gate.strategy,),))
    with split("test"):
        test = evaluate_answers(
            tuple(scored(held_out.test, one.sampling) for one in config.evaluation.test),
            tuple(one.strategies for one in config.evaluation.test),
        )
    return Contender(policy, config.template, dev, test)


def measure(config: AutoIF, policy: ModelRef) -> dict[str, DatasetRef]:
    """The policy's figures on the benchmarks, if there are to be any."""
    if config.benchmarks is None:
        return {}
    return {"benchmarks": evaluate_benchmarks(policy, config.template, config.benchmarks, config.engine)}
