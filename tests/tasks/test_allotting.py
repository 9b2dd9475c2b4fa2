"""Adaptive sampling on the fake engine: the same rows whatever the shards, the kills and what lies in the ledger."""

from pathlib import Path
from typing import Any

import pytest

from models.fake_engine import FakeEngine
from models.specs import Adaptive, AnswerSampling, Fake, ModelRef, PromptTemplate, Sampling
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import PassRate, Rollout
from tasks.allotting import rate_prompts, sample_until_enough
from tasks.answers import score_by_answer
from tasks.drawing import ShardsFailed, rollout_seed
from tasks.evaluating import evaluate_answers
from tasks.planning import planning
from tasks.sampling import sample_rollouts
from tasks.scoring import score_answers
from tasks.serving import rollouts_generated, stopping
from tests.flows.builders import heard
from tests.tasks.test_sampling import POLICY, refuse, sums

MARKER = "FINAL ANSWER:"
ONE_OF_EACH = Adaptive(first=2, more=2, wanted_correct=1, wanted_incorrect=1, cap=12)


def ask(
    prompts: DatasetRef,
    *,
    adaptive: Adaptive | None = ONE_OF_EACH,
    rollouts: int = 4,
    shard: int = 2,
    known: DatasetRef | None = None,
    policy: ModelRef = POLICY,
    **more: Any,
) -> DatasetRef:
    sampling = AnswerSampling(rollouts_per_prompt=rollouts, prompts_per_shard=shard, seed=7, adaptive=adaptive, **more)
    return sample_until_enough(policy, prompts, PromptTemplate(), sampling, Fake(), MARKER, known)


def counts(ref: DatasetRef) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in read_rows(ref, Rollout):
        found[row.prompt_id] = found.get(row.prompt_id, 0) + 1
    return found


def test_without_the_section_it_is_plain_sampling_with_the_same_key() -> None:
    plain = ask(sums(4), adaptive=None)
    with heard() as records:
        assert sample_rollouts(POLICY, sums(4), PromptTemplate(), AnswerSampling(rollouts_per_prompt=4, seed=7), Fake())
    assert counts(plain) == {f"p{n}": 4 for n in range(4)}
    assert [record.cached for record in records if record.step == "gather_rollouts"] == [True]


def test_engines_are_asked_with_plain_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[type] = []
    sample = FakeEngine.sample

    def noting(self: FakeEngine, requests: Any, sampling: Any) -> Any:
        asked.append(type(sampling))
        return sample(self, requests, sampling)

    monkeypatch.setattr(FakeEngine, "sample", noting)
    ask(sums(2), adaptive=None)
    ask(sums(2), temperature=0.9)
    assert set(asked) == {Sampling}  # what an engine's own process can read


def test_each_prompt_stops_after_the_pass_in_which_it_had_enough() -> None:
    """Replayed by hand from the plain rollouts of the same seeds, without a budget that could run out."""
    every = list(read_rows(ask(sums(12), adaptive=None, rollouts=12), Rollout))
    expected = {}
    for number in range(12):
        gold = str(11 + number)
        rewards = [score_by_answer(row, gold, MARKER).reward for row in every if row.prompt_id == f"p{number}"]
        lengths = [n for n in range(2, 13, 2) if {0.0, 1.0} <= set(rewards[:n])]
        expected[f"p{number}"] = min([*lengths, 12])
    drawn = rollouts_generated()
    found = ask(sums(12), rollouts=12)
    assert counts(found) == expected
    assert len(set(expected.values())) > 2  # else this shows nothing
    assert rollouts_generated() == drawn  # the ledger is the plain one's
    rows = list(read_rows(found, Rollout))
    assert [(row.prompt_id, row.rollout_index) for row in rows] == [
        (name, index) for name, count in expected.items() for index in range(count)
    ]
    assert rows == [row for row in every if row.rollout_index < expected[row.prompt_id]]
    assert all(row.seed == rollout_seed(7, row.prompt_id, row.rollout_index) for row in rows)


def test_no_more_is_drawn_than_plain_sampling_would_draw() -> None:
    found = ask(sums(12), rollouts=3)
    assert sum(counts(found).values()) == rollouts_generated() <= 12 * 3
    assert max(counts(found).values()) > 3  # what some did not need went to others
    assert min(counts(found).values()) == 2


def test_other_shards_and_another_home_make_the_same_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = ask(sums(9), shard=2)
    monkeypatch.setenv("RATCHET_HOME", str(tmp_path / "another-home"))
    assert ask(sums(9), shard=7) == here


def test_rows_that_lie_in_the_ledger_for_other_reasons_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ask(sums(9))
    monkeypatch.setenv("RATCHET_HOME", str(tmp_path / "another-home"))
    ask(sums(9), adaptive=None, rollouts=7)
    ask(sums(9), adaptive=Adaptive(first=3, more=1, wanted_correct=4, wanted_incorrect=0, cap=9), rollouts=5)
    assert ask(sums(9)) == here


def test_a_run_that_failed_in_a_later_pass_goes_on_there_and_makes_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ask(sums(12), rollouts=12)
    hungry = next(name for name, count in counts(here).items() if count > 4)
    text = f"{10 + int(hungry[1:])} + 1"
    monkeypatch.setenv("RATCHET_HOME", str(tmp_path / "another-home"))
    before = rollouts_generated()
    ask(sums(12), adaptive=None, rollouts=2)  # the first pass
    with monkeypatch.context() as patch, pytest.raises(ShardsFailed):
        refuse(patch, text)
        ask(sums(12), rollouts=12)
    assert before + 24 < rollouts_generated() < before + here.rows
    with heard() as records:
        assert ask(sums(12), rollouts=12) == here
    assert rollouts_generated() == before + here.rows  # none was drawn twice
    (total,) = [r for r in records if r.step == "sample_rollouts" and r.shard is None]
    assert total.rows == here.rows == total.counts["drawn"] + total.counts["reused"]
    shards = [r.shard for r in records if r.step == "sample_rollouts" and r.shard is not None]
    assert sorted(shards) == list(range(len(shards)))  # numbered on from pass to pass
    assert not stopping.is_set()


def test_a_damaged_part_is_drawn_again_and_the_passes_with_it(ratchet_home: Path) -> None:
    here = ask(sums(9))
    for part in sorted(ratchet_home.glob("ledger/*/part-*.parquet"))[:2]:
        part.write_bytes(b"damaged")
    for stored in [
        *ratchet_home.glob("steps/gather_allotted/*"),
        *ratchet_home.glob("datasets/rollouts/*/manifest.json"),
    ]:
        stored.unlink()
    assert ask(sums(9)) == here


def test_the_same_call_again_is_a_hit_and_other_settings_are_not() -> None:
    ask(sums(6))
    with heard() as records:
        ask(sums(6))
        ask(sums(6), adaptive=ONE_OF_EACH.model_copy(update={"cap": 10}))
    assert [r.cached for r in records if r.step == "gather_allotted"] == [True, False]


def test_known_pass_rates_say_who_gets_the_rest_of_the_budget() -> None:
    prompts = sums(12)
    before = ask(prompts, rollouts=12)
    rates = rate_prompts(score_answers(before, prompts, MARKER), None, 2, 1)
    known = {row.prompt_id: row for row in read_rows(rates, PassRate)}
    other = ModelRef(name="fake:0.5")  # with 12 rollouts left after the first pass
    without = counts(ask(prompts, rollouts=3, policy=other))
    with_known = counts(ask(prompts, rollouts=3, policy=other, known=rates))
    assert sum(without.values()) == sum(with_known.values()) == 36
    assert without != with_known

    def wrong_before(numbers: dict[str, int]) -> float:
        """How often the prompts that got more than the first pass were wrong before."""
        more = [known[name] for name, count in numbers.items() if count > 2]
        return sum(rate.incorrect / rate.rollouts for rate in more) / len(more)

    assert wrong_before(with_known) > wrong_before(without)


def test_pass_rates_of_prompts_that_were_not_drawn_are_kept() -> None:
    first = rate_prompts(score_answers(ask(sums(4)), sums(4), MARKER), None, 2, 1)
    second = rate_prompts(score_answers(ask(sums(2)), sums(2), MARKER), first, 2, 2)
    assert [(row.prompt_id, row.iteration) for row in read_rows(second, PassRate)] == [
        ("p0", 2),
        ("p1", 2),
        ("p2", 1),
        ("p3", 1),
    ]


def test_adaptive_rollouts_are_never_made_a_figure_of() -> None:
    scored = score_answers(ask(sums(12)), sums(12), MARKER)
    with pytest.raises(ValueError, match="sampling that stops on what it finds is biased"):
        evaluate_answers((scored,), (("mean@1",),))


def test_a_plan_draws_nothing_and_says_what_it_would_at_most() -> None:
    prompts = sums(5)
    with planning() as planned:
        ask(prompts)
    assert [(step.step, step.rows) for step in planned] == [("gather_allotted", 20)]
    assert rollouts_generated() == 0


def test_a_prompt_that_brings_the_engine_down_gets_no_further_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import caching

    monkeypatch.setattr(caching, "RETRY_DELAYS_SECONDS", ())
    sampling = AnswerSampling(rollouts_per_prompt=12, seed=7, adaptive=ONE_OF_EACH, maximum_error_rate=0.5)
    dying = Fake(fail_prompts=("12 + 1",))
    found = sample_until_enough(POLICY, sums(6), PromptTemplate(), sampling, dying, MARKER)
    failed = [row for row in read_rows(found, Rollout) if row.finish_reason == "error"]
    assert [(row.prompt_id, row.rollout_index) for row in failed] == [("p2", 0), ("p2", 1)]
    assert write_rows(list(read_rows(found, Rollout)), Rollout, step="rollouts") == found
