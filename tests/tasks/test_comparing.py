"""Judges of pairs: each way of asking, what failures become, and that nothing is asked twice."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest

from models.engine import Completion, EngineConfigurationError, EngineError, Message, Request
from models.specs import Fake, ModelRef, OpenAI, PromptTemplate, Sampling
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import Comparison, Pair
from tasks import caching, comparing
from tasks.asks import Asks, LabelsAsk, LikelihoodAsk, PairwiseAsk, RewardAsk, ScoresAsk
from tasks.comparing import compare_pairs, estimate_flip_rate, relabel_pairs
from tasks.comparisons import Labelling
from tasks.judging import JudgeError
from tasks.pairs import pair_with_gold
from tests.models.endpoints import Reply, likeliest, ok, serving
from tests.tasks.builders import demonstration, rollout

JUDGE, TEMPLATE, ENGINE = ModelRef(name="fake:0.9"), PromptTemplate(), Fake()


class Scripted:
    """An engine that answers by rules a test gives it, and counts what it is asked."""

    def __init__(self, writes: str = "", log_probs: dict[str, float] | None = None, fails: str = "") -> None:
        self.writes, self.log_probs, self.fails = writes, log_probs or {}, fails
        self.asked: list[str] = []

    def sample(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        for request in requests:
            self._note(request.messages)
            yield Completion(
                key=request.key,
                text=self.writes,
                prompt_tokens=1,
                completion_tokens=1,
                finish_reason="stop",
                cumulative_logprob=None,
            )

    def score(self, messages: Sequence[Message], continuations: Sequence[str]) -> list[list[float]]:
        self._note(messages)
        return [[self.log_probs.get(text, -9.0)] for text in continuations]

    def _note(self, messages: Sequence[Message]) -> None:
        self.asked.append(messages[-1]["content"])
        if self.fails == "refused" and "prompt b" in self.asked[-1]:
            raise EngineConfigurationError("the prompt is too long")
        if self.fails == "dead":
            raise EngineError("connection refused")


def pairs(*prompt_ids: str) -> DatasetRef:
    made = [
        one
        for prompt_id in prompt_ids
        for one in pair_with_gold(demonstration(prompt_id), [rollout(prompt_id=prompt_id)], 1).pairs
    ]
    return write_rows(made, Pair, step="pairs")


def judged(monkeypatch: pytest.MonkeyPatch, engine: Scripted, ref: DatasetRef, asks: Asks) -> list[Comparison]:
    monkeypatch.setattr(comparing, "serve", lambda *_: engine)
    monkeypatch.setattr(caching, "RETRY_DELAYS_SECONDS", (0, 0))
    asks_: Any = asks
    return list(read_rows(compare_pairs(JUDGE, ref, asks_, TEMPLATE, ENGINE, "FINAL ANSWER:"), Comparison))


def test_a_judge_that_always_says_the_first_is_taken_for_undecided_by_no_one_but_for_a_tie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Scripted(writes="A")
    (row,) = judged(monkeypatch, engine, pairs("a"), PairwiseAsk(read="text"))
    assert (row.margin, row.reason) == (0.0, "orders disagree")
    first, second = engine.asked
    assert first.index("human") < first.index("mine")
    assert second.index("mine") < second.index("human")


def test_pairwise_log_probs_are_averaged_over_both_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    class Prefers(Scripted):
        def score(self, messages: Sequence[Message], continuations: Sequence[str]) -> list[list[float]]:
            text = messages[-1]["content"]
            first_is_mine = text.index("mine") < text.index("human")
            share = 0.9 if first_is_mine else 0.4  # it likes the first place, and it likes "mine"
            from math import log

            return [[log(share)], [log(1 - share)]]

    (row,) = judged(monkeypatch, Prefers(), pairs("a"), PairwiseAsk())
    # For "human": 0.4 in first place, 1 - 0.9 in second; on average 0.25, a margin of -0.5.
    assert (row.chosen_reward, row.rejected_reward) == (pytest.approx(0.25), pytest.approx(0.75))
    assert row.margin == pytest.approx(-0.5)


def test_scores_are_read_from_text_and_what_cannot_be_read_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted(writes="Score: 8")
    (row,) = judged(monkeypatch, engine, pairs("a"), ScoresAsk(samples=3))
    assert (row.chosen_reward, row.margin) == (pytest.approx(0.8), pytest.approx(0.0))
    assert len(engine.asked) == 6  # three samples of each side
    lenient = ScoresAsk(maximum_undecided=1.0)
    (row,) = judged(monkeypatch, Scripted(writes="fine"), pairs("b"), lenient)
    assert (row.margin, row.reason) == (None, "no score")


def test_labels_come_from_exact_log_probs_and_equal_texts_are_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted(log_probs={"Correct": -0.1, "Incorrect": -2.5})
    two_rollouts = [rollout(0, "mine"), rollout(1, "mine too")]
    ref = write_rows(pair_with_gold(demonstration(), two_rollouts, 1).pairs, Pair, step="pairs")
    rows = judged(monkeypatch, engine, ref, LabelsAsk())
    assert [row.rejected_index for row in rows] == [0, 1]
    assert len(engine.asked) == 3  # the demonstration once, each rollout once
    # p(Correct) = 1 / (1 + e^-2.4) = 0.916827
    assert rows[0].chosen_reward == pytest.approx(0.916827, abs=1e-6)


def test_a_likelihood_is_figured_a_token_and_a_better_writer_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted(log_probs={"human": -0.1, "mine": -0.3})
    (row,) = judged(monkeypatch, engine, pairs("a"), LikelihoodAsk(temperature=0.2))
    assert row.chosen_reward == pytest.approx(0.731059, abs=1e-6)  # sigmoid of (0.3 - 0.1) / 0.2 = 1


def test_a_refused_question_is_an_undecided_pair_and_the_others_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted(log_probs={"Correct": -0.1}, fails="refused")
    rows = judged(monkeypatch, engine, pairs("a", "b"), LabelsAsk(maximum_undecided=0.5))
    assert rows[0].margin == 0.0
    assert (rows[1].margin, rows[1].chosen_reward) == (None, None)
    assert rows[1].reason == "not scored: the prompt is too long"


def test_too_many_undecided_pairs_stop_the_run_and_the_first_are_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JudgeError, match=r"left 1 of 1 pairs undecided \(no score 1\)[\s\S]*pair a/0: no score"):
        judged(monkeypatch, Scripted(writes="well"), pairs("a"), ScoresAsk())


def test_an_engine_that_stays_away_fails_the_step_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="failed at 2 of 2 requests"):
        judged(monkeypatch, Scripted(fails="dead"), pairs("a"), LabelsAsk())
    (row,) = judged(monkeypatch, Scripted(log_probs={"Correct": -0.1}), pairs("a"), LabelsAsk())
    assert row.reason == "judged"


def test_a_few_engine_errors_are_undecided_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = LabelsAsk(maximum_error_rate=1.0, maximum_undecided=1.0)
    (row,) = judged(monkeypatch, Scripted(fails="dead"), pairs("a"), allowed)
    assert (row.margin, row.reason) == (None, "engine error: connection refused")


def test_a_reward_model_gives_scores_and_texts_too_long_for_it_are_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def score(job: Any, on_line: Any) -> list[float | None]:
        asked.extend(job.texts)
        return [None if prompt == "prompt b" else {"human": 1.0, "mine": 3.0}[text] for prompt, text in job.texts]

    monkeypatch.setattr(comparing, "score_in_child", score)
    ref = compare_pairs(JUDGE, pairs("a", "b"), RewardAsk(maximum_undecided=0.5), TEMPLATE, ENGINE, "x")
    first, second = read_rows(ref, Comparison)
    # sigmoid(1 - 3) = 0.119203
    assert (first.chosen_reward, first.margin) == (
        pytest.approx(0.119203, abs=1e-6),
        pytest.approx(-0.761594, abs=1e-6),
    )
    assert (second.margin, second.reason) == (None, "longer than max_length")
    assert len(asked) == 4


def test_verdicts_turn_pairs_round_and_other_thresholds_need_no_new_judging(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted(log_probs={"human": -2.0, "mine": -0.1})
    monkeypatch.setattr(comparing, "serve", lambda *_: engine)
    ref = pairs("a")
    compared = compare_pairs(JUDGE, ref, LikelihoodAsk(), TEMPLATE, ENGINE, "x")
    (swapped,) = read_rows(relabel_pairs(ref, compared, Labelling()), Pair)
    assert (swapped.chosen, swapped.swapped) == ("mine", True)
    (kept,) = read_rows(relabel_pairs(ref, compared, Labelling(swap_at=None, between="keep")), Pair)
    assert (kept.chosen, kept.swapped) == ("human", False)
    assert estimate_flip_rate((relabel_pairs(ref, compared, Labelling()),), 0.1) == 0.0
    assert len(engine.asked) == 2


@pytest.mark.flow
def test_a_judge_behind_an_endpoint_scores_prefers_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    judge = ModelRef(name="a-judge")

    def answer(_: int, body: dict[str, Any]) -> Reply:
        text = body["messages"][-1]["content"]
        if "prompt refused" in text:
            return 400, {}, b'{"error": {"message": "the prompt is too long"}}'
        if body.get("top_logprobs"):
            return (
                likeliest(("A", -0.2), ("B", -1.8))
                if text.index("mine") < text.index("human")
                else likeliest(("B", -0.2), ("A", -1.8))
            )
        return ok("Score: 9" if "human" in text else "Score: 4")

    def compared(ref: DatasetRef, asks: Any, **settings: Any) -> list[Comparison]:
        with serving(answer) as server:
            engine = OpenAI(endpoints=(server.url,), **settings)
            return list(read_rows(compare_pairs(judge, ref, asks, TEMPLATE, engine, "x"), Comparison))

    scored, refused = compared(pairs("a", "refused"), ScoresAsk(samples=2, maximum_undecided=0.5))
    assert (scored.chosen_reward, scored.rejected_reward) == (pytest.approx(0.9), pytest.approx(0.4))
    assert scored.judge == judge.identity
    assert refused.margin is None
    assert refused.reason.startswith("not scored: ")
    (preferred,) = compared(pairs("a"), PairwiseAsk(), scoring="top_logprobs")
    # "mine" is better in both orders: e^-0.2 / (e^-0.2 + e^-1.8) = 0.832018 for it
    assert preferred.rejected_reward == pytest.approx(0.832018, abs=1e-6)
