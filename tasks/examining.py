"""A policy measured as a writer and, where it judges, as a judge: of its own rollouts, and of another policy's."""

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from models.specs import EngineSettings, ModelRef, PromptTemplate, Sampling, Settings
from storage.datasets import DatasetRef
from tasks.calibrating import calibrate, choose_filter, evaluate_judgements
from tasks.evaluating import Contender, Evaluation, HeldOut, evaluate_answers
from tasks.judgements import Asking
from tasks.judging import judge_rollouts
from tasks.promotion import Gate
from tasks.recording import split
from tasks.sampling import sample_rollouts
from tasks.scoring import score_answers

# maj@k with filter: only rollouts of more confidence vote; dev: of as much as does best on the dev split
FilterAbove = Annotated[float, Field(ge=0, le=1)] | Literal["dev"]


class Rated(NamedTuple):
    """Rollouts, and which of them are right by gold answers."""

    rollouts: DatasetRef
    scored: DatasetRef


class Examined(NamedTuple):
    """How a policy did, and its rollouts on the dev split."""

    contender: Contender
    dev: Rated
    judged: dict[str, DatasetRef]  # "calibration", if it judges


class Examination(Settings):
    """How policies are examined: all of them alike."""

    engine: EngineSettings
    asking: Asking
    evaluation: Evaluation
    gate: Gate
    filter_above: FilterAbove


def rate(
    policy: ModelRef,
    template: PromptTemplate,
    prompts: DatasetRef,
    sampling: Sampling,
    engine: EngineSettings,
    marker: str,
) -> Rated:
    """Sample a policy and score it by gold answers."""
    rollouts = sample_rollouts(policy, prompts, template, sampling, engine)
    return Rated(rollouts, score_answers(rollouts, prompts, marker))


def examine(
    policy: ModelRef,
    template: PromptTemplate,
    held_out: HeldOut,
    how: Examination,
    *,
    judges: bool = True,
    other: Rated | None = None,
) -> Examined:
    """Measure a policy on dev and test.

    Args:
        judges: whether it was trained to judge; only then are its judgements asked for.
        other: rollouts of another policy on the dev split, to tell self-preference by.
    """

    def rated(prompts: DatasetRef, sampling: Sampling) -> Rated:
        return rate(policy, template, prompts, sampling, how.engine, how.asking.marker)

    with split("dev"):
        dev = rated(held_out.dev, how.evaluation.dev)
        gated = evaluate_answers((dev.scored,), ((how.gate.strategy,),))
    with split("test"):
        passes = [rated(held_out.test, one.sampling) for one in how.evaluation.test]
        strategies = tuple(one.strategies for one in how.evaluation.test)
        test = evaluate_answers(tuple(one.scored for one in passes), strategies)
    contender = Contender(policy, template, gated, test)
    if not judges:
        return Examined(contender, dev, {})
    most = max(zip(how.evaluation.test, passes, strict=True), key=lambda one: one[0].sampling.rollouts_per_prompt)
    return _as_judge(contender, dev, other, most[1], most[0].sampling.rollouts_per_prompt, how)


def _as_judge(contender: Contender, dev: Rated, other: Rated | None, test: Rated, k: int, how: Examination) -> Examined:
    """The strategies that a judge takes part in, figured from the test pass of most rollouts."""

    def judged(rollouts: DatasetRef) -> DatasetRef:
        return judge_rollouts(contender.policy, rollouts, how.asking, how.engine)

    with split("dev"):
        written = {"own": dev} if other is None else {"own": dev, "base": other}
        verdicts = tuple(judged(one.rollouts) for one in written.values())
        calibration = calibrate(tuple(one.scored for one in written.values()), verdicts, tuple(written))
        above = choose_filter(dev.scored, verdicts[0]) if how.filter_above == "dev" else how.filter_above
    with split("test"):
        evaluated = evaluate_judgements(contender.test, test.scored, judged(test.rollouts), k, above)
    return Examined(contender._replace(test=evaluated), dev, {"calibration": calibration})
