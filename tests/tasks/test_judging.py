"""Judging as steps, on the fake engine."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from math import log
from typing import Any

import pytest

from models.specs import Fake, ModelRef, OpenAI, PromptTemplate, Sampling
from storage.arithmetic import Arithmetic
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.experiments import StepRecord
from storage.hub import Source
from storage.rows import Calibration, Demonstration, JudgedRollout, Prompt, Rollout, ScoredRollout
from tasks import caching
from tasks.calibrating import calibrate, check_judge, evaluate_judgements
from tasks.calibrations import JudgeGate
from tasks.evaluating import evaluate_answers
from tasks.judgements import Asking, Judge
from tasks.judging import JudgeError, check_labels, judge_rollouts
from tasks.labelling import NothingPaired, hide_answers, label_by_confidence, pair_by_confidence
from tasks.labels import LabelFree
from tasks.loading import load_prompts
from tasks.mixing import load_both_tasks, mix_tasks
from tasks.mixtures import ClassMissing, Mixture
from tasks.recording import Progress, listening
from tasks.sampling import sample_rollouts
from tasks.scoring import score_answers
from tasks.selecting import select_demonstrations
from tasks.selection import Selection
from tests.flows.builders import heard
from tests.models.endpoints import Reply, likeliest, serving

pytestmark = pytest.mark.flow  # a library, a server or a run that takes too long for every save

MARKER = "FINAL ANSWER:"
POLICY = ModelRef(name="fake:0.5")
JUDGE = Judge(rollouts_per_shard=50)
ASKING = Asking(judge=JUDGE, template=PromptTemplate(), marker=MARKER)
SUMS = Source(arithmetic=Arithmetic(kind="sums", problems=20))
SAMPLING = Sampling(rollouts_per_prompt=8, temperature=0.8, max_completion_tokens=64)


def rollouts(prompts: DatasetRef | None = None) -> DatasetRef:
    return sample_rollouts(POLICY, prompts or load_prompts(SUMS, ()), PromptTemplate(), SAMPLING, Fake())


def score(ref: DatasetRef) -> DatasetRef:
    return score_answers(ref, load_prompts(SUMS, ()), MARKER)


def test_every_rollout_is_judged_in_order_and_its_confidence_kept() -> None:
    drawn = rollouts()
    with heard() as steps:
        verdicts = judge_rollouts(POLICY, drawn, ASKING, Fake())
    rows = list(read_rows(verdicts, JudgedRollout))
    assert len(rows) == 160
    assert [s.rows for s in steps if s.step == "judge_shard"] == [50, 50, 50, 10]
    assert all(row.confidence is not None and row.judge == POLICY.identity for row in rows)
    keys = [(row.prompt_id, row.rollout_index) for row in rows]
    assert keys == [(row.prompt_id, row.rollout_index) for row in read_rows(score(drawn), ScoredRollout)]


def test_judging_tells_how_far_it_is() -> None:
    drawn, told = rollouts(), list[Progress]()

    def listen(event: StepRecord | Progress) -> None:
        if isinstance(event, Progress) and event.step == "judge_rollouts":
            told.append(event)

    with listening(listen):
        judge_rollouts(POLICY, drawn, ASKING, Fake())
    assert {event.total for event in told} == {160}
    assert [event.done for event in told] == sorted(event.done for event in told)
    assert told[-1].done == 160


def test_shards_that_are_done_are_not_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "RETRY_DELAYS_SECONDS", (0.0,))
    drawn = rollouts()
    last = next(iter(reversed(list(read_rows(load_prompts(SUMS, ()), Prompt)))))
    with pytest.raises(Exception, match="told to die"):
        judge_rollouts(POLICY, drawn, ASKING, Fake(fail_prompts=(last.prompt,)))
    with heard() as steps:
        judge_rollouts(POLICY, drawn, ASKING, Fake())
    assert [s.cached for s in steps if s.step == "judge_shard"] == [True, True, True, False]


def test_a_judge_that_never_says_a_label_is_told_with_the_first_rollouts() -> None:
    asking = ASKING.model_copy(
        update={"judge": JUDGE.model_copy(update={"positive": "blau", "negative": "rot gelb grün"})}
    )
    asking = asking.model_copy(update={"judge": asking.judge.model_copy(update={"minimum_label_mass": 0.999})})
    with pytest.raises(JudgeError) as caught:
        judge_rollouts(POLICY, rollouts(), asking, Fake())
    assert "undecided (" in str(caught.value)
    assert "never says 'blau' or 'rot gelb grün'" in str(caught.value)
    assert str(caught.value).count("no label: ") == 3


def test_labels_of_several_tokens_are_refused_where_one_is_wanted() -> None:
    assert check_labels(POLICY, ASKING, Fake()) is True
    judge = Judge(positive="It is right", negative="No", label_tokens="one")
    with pytest.raises(JudgeError, match="'It is right' 3, 'No' 1"):
        check_labels(POLICY, ASKING.model_copy(update={"judge": judge}), Fake())


def test_the_label_free_path_gives_the_same_with_poisoned_gold() -> None:
    def path(prompts: DatasetRef) -> list[str]:
        verdicts = judge_rollouts(POLICY, rollouts(hide_answers(prompts)), ASKING, Fake())
        labelled = label_by_confidence(verdicts, LabelFree(minimum_votes=2))
        solve = select_demonstrations(labelled, Selection(), 3, MARKER)
        both = mix_tasks(solve, labelled, ASKING, Mixture(), 4, "train")
        pairs = pair_by_confidence(labelled, verdicts, 0.1, 5)
        return [ref.digest for ref in (verdicts, labelled, solve, both, pairs)]

    honest = load_prompts(SUMS, ())
    poison = (replace(row, answer="123456") for row in read_rows(honest, Prompt))
    poisoned = write_rows(poison, Prompt, step="prompts")
    assert poisoned.digest != honest.digest
    assert {row.answer for row in read_rows(hide_answers(honest), Prompt)} == {None}
    assert path(honest) == path(poisoned)


def test_both_tasks_are_mixed_and_some_prompts_held_out_of_both() -> None:
    scored = score(rollouts())
    solve = select_demonstrations(scored, Selection(max_per_prompt=2), 1, MARKER)
    mixture = Mixture(held_out_share=0.2)
    train, held_out = (
        list(read_rows(mix_tasks(solve, scored, ASKING, mixture, 1, part), Demonstration))
        for part in ("train", "held out")
    )
    assert {row.task for row in train} == {"solve", "judge"}
    assert not {row.prompt_id for row in train} & {row.prompt_id for row in held_out}
    judge_rows = [row for row in [*train, *held_out] if row.task == "judge"]
    assert sum(row.completion == "Correct" for row in judge_rows) * 2 == len(judge_rows)


def test_rollouts_of_one_kind_cannot_teach_judging() -> None:
    scored = score(rollouts())
    right = write_rows(
        (row for row in read_rows(scored, ScoredRollout) if row.reward == 1), ScoredRollout, step="scored"
    )
    solve = select_demonstrations(right, Selection(), 1, MARKER)
    with pytest.raises(ClassMissing, match="is wrong, and a judge is trained on both kinds"):
        mix_tasks(solve, right, ASKING, Mixture(), 1, "train")


def test_a_judge_is_calibrated_on_its_own_rollouts_and_on_those_of_another() -> None:
    drawn = rollouts()
    verdicts = judge_rollouts(POLICY, drawn, ASKING, Fake())
    ref = calibrate((score(drawn), score(drawn)), (verdicts, verdicts), ("own", "base"))
    rows = list(read_rows(ref, Calibration))
    assert {row.writer for row in rows} == {"own", "base"}
    assert check_judge(ref, JudgeGate()) is True
    with pytest.raises(JudgeError, match="may not label rollouts without gold answers: its AUROC"):
        check_judge(ref, JudgeGate(minimum_auroc=0.99))
    assert check_judge(ref, JudgeGate(minimum_auroc=0.99, go_on_anyway=True)) is False


def test_strategies_with_a_judge_stand_beside_the_others() -> None:
    drawn = rollouts()
    verdicts = judge_rollouts(POLICY, drawn, ASKING, Fake())
    evaluated = evaluate_answers((score(drawn),), (("maj@8",),))
    assert evaluate_judgements(evaluated, score(drawn), verdicts, 8, 0.5).rows == 3 * 20


def test_a_corpus_of_both_tasks_holds_as_many_right_as_wrong_judgements() -> None:
    mixed = Source(arithmetic=Arithmetic(problems=60, quality="mixed"))
    rows = list(read_rows(load_both_tasks(mixed, (mixed,), ASKING), Demonstration))
    labels = [row.completion for row in rows if row.task == "judge"]
    assert labels.count("Correct") == labels.count("Incorrect") > 0
    assert sum(row.task == "solve" for row in rows) == 60


def hosted(unknown: str = "") -> Callable[[int, dict[str, Any]], Reply]:
    """A hosted judge that is right with 0.8, and does not tell how likely its other label is where this text stands."""

    def answer(number: int, body: dict[str, Any]) -> Reply:
        text = body["messages"][-1]["content"]
        left, right, said = (int(one) for one in re.findall(r"(\d+) \+ (\d+)\?.*?(\d+)(?=\D*$)", text, re.DOTALL)[0])
        labels = ("Correct", "Incorrect") if left + right == said else ("Incorrect", "Correct")
        if unknown and unknown in text:
            return likeliest((labels[0], -0.001), ("Maybe", -9.0))
        return likeliest((labels[0], log(0.72)), (labels[1], log(0.18)), ("Maybe", log(0.1)))

    return answer


def test_an_endpoint_judges_by_the_labels_it_reports_and_what_it_leaves_out_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    drawn = rollouts()
    left_out = next(read_rows(drawn, Rollout))
    right = {(row.prompt_id, row.rollout_index): row.reward == 1 for row in read_rows(score(drawn), ScoredRollout)}
    with serving(hosted(left_out.prompt)) as server:
        engine = OpenAI(endpoints=(server.url,), scoring="top_logprobs")
        rows = list(read_rows(judge_rollouts(ModelRef(name="hosted"), drawn, ASKING, engine), JudgedRollout))
    assert len(rows) == 160
    for row in rows:
        if row.prompt_id == left_out.prompt_id:
            assert row.confidence is None
            assert re.fullmatch(r"not scored: '(Inc|C)orrect' is not among the 20 likeliest .* not known", row.reason)
        elif row.answer is not None:  # 0.72 / (0.72 + 0.18), or the other way round
            expected = 0.8 if right[row.prompt_id, row.rollout_index] else 0.2
            assert row.confidence == pytest.approx(expected)


def test_an_endpoint_that_tells_of_no_label_is_refused_before_anything_is_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with (
        serving(lambda number, body: likeliest(("Cor", -0.1), ("Inc", -2.5))) as server,
        pytest.raises(JudgeError, match=r"found: 'Cor', 'Inc'\. Choose labels that are one token each"),
    ):
        check_labels(ModelRef(name="m"), ASKING, OpenAI(endpoints=(server.url,), scoring="top_logprobs"))


def test_labels_that_share_their_first_token_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose tokens are of four letters: Valid and Valium both begin with Vali."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def answer(number: int, body: dict[str, Any]) -> Reply:
        last = body["messages"][-1]
        label = last["content"] if last["role"] == "assistant" else ""
        tokens = [label[at : at + 4] for at in range(0, len(label), 4)]
        places = [None, {"prompt": {"logprob": -1.0}}, *({token: {"logprob": -len(token) / 8}} for token in tokens)]
        choice = {"message": {"content": "x"}, "finish_reason": "length"}
        return 200, {}, json.dumps({"choices": [choice], "prompt_logprobs": places}).encode()

    judge = Judge(positive="Valid", negative="Valium", label_tokens="one")
    asking = ASKING.model_copy(update={"judge": judge})
    with serving(answer) as server, pytest.raises(JudgeError) as caught:
        check_labels(ModelRef(name="m"), asking, OpenAI(endpoints=(server.url,)))
    assert "the labels take so many tokens: 'Valid' 2, 'Valium' 2" in str(caught.value)
    assert "'Valid' and 'Valium' share their first token" in str(caught.value)
    assert "choose labels that begin differently" in str(caught.value)


def test_where_no_prompt_gives_a_pair_the_reasons_are_counted() -> None:
    verdicts = judge_rollouts(POLICY, rollouts(hide_answers(load_prompts(SUMS, ()))), ASKING, Fake())
    labelled = label_by_confidence(verdicts, LabelFree(minimum_votes=2))
    with pytest.raises(NothingPaired, match=r"made no pair of 20 prompts \(.*pair below minimum_margin \d+.*now 1\)"):
        pair_by_confidence(labelled, verdicts, 1.0, 5)


def test_a_judge_that_nothing_is_known_of_is_told() -> None:
    drawn = rollouts()
    unread = score_answers(drawn, load_prompts(SUMS, ()), "no such marker")
    verdicts = judge_rollouts(POLICY, drawn, ASKING, Fake())
    with pytest.raises(JudgeError, match="not one of 160 rollouts of the dev split was decided both by"):
        calibrate((unread,), (verdicts,), ("own",))
