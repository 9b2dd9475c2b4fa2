"""Sampling on the fake engine: no row is drawn twice, one bad shard does not take the others along."""

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from models.engine import EngineConfigurationError, Message
from models.fake_engine import FakeEngine
from models.specs import Fake, ModelRef, PromptTemplate, Sampling
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import Prompt, Rollout
from tasks import caching
from tasks.drawing import ShardsFailed, rollout_seed
from tasks.sampling import sample_rollouts
from tasks.serving import rollouts_generated, stop, stopping
from tests.flows.builders import heard

POLICY = ModelRef(name="fake:0.4")


def sums(count: int) -> DatasetRef:
    """Prompts "What is 10 + 1?", "What is 11 + 1?", ..."""
    rows = (
        Prompt(prompt_id=f"p{n}", source="tests", prompt=f"What is {10 + n} + 1?", answer=str(11 + n))
        for n in range(count)
    )
    return write_rows(rows, Prompt, step="prompts")


def sampled(
    prompts: DatasetRef,
    *,
    rollouts: int = 2,
    shard: int = 2,
    seed: int = 7,
    temperature: float = 0.8,
    engine: Fake | None = None,
    policy: ModelRef = POLICY,
) -> DatasetRef:
    sampling = Sampling(rollouts_per_prompt=rollouts, prompts_per_shard=shard, seed=seed, temperature=temperature)
    return sample_rollouts(policy, prompts, PromptTemplate(), sampling, engine or Fake())


def rows_of(ref: DatasetRef) -> list[Rollout]:
    return list(read_rows(ref, Rollout))


def test_each_prompt_gets_its_rollouts_in_the_order_of_the_prompts() -> None:
    rows = rows_of(sampled(sums(3)))
    assert [(row.prompt_id, row.rollout_index) for row in rows] == [(f"p{n}", i) for n in range(3) for i in range(2)]
    assert rollouts_generated() == 6
    assert {row.policy for row in rows} == {"fake:0.4@unpinned"}


def test_the_same_call_again_draws_nothing() -> None:
    first = sampled(sums(3))
    assert sampled(sums(3)) == first
    assert rollouts_generated() == 6


def test_more_rollouts_per_prompt_draw_only_what_is_new() -> None:
    few = rows_of(sampled(sums(3), rollouts=2))
    many = rows_of(sampled(sums(3), rollouts=5))
    assert rollouts_generated() == 15  # 3 * 2, then 3 * 3 more
    assert [row for row in many if row.rollout_index < 2] == few


def test_fewer_rollouts_per_prompt_draw_nothing() -> None:
    many = rows_of(sampled(sums(3), rollouts=4))
    few = rows_of(sampled(sums(3), rollouts=1))
    assert rollouts_generated() == 12
    assert few == [row for row in many if row.rollout_index == 0]


def test_more_prompts_draw_only_theirs() -> None:
    sampled(sums(3))
    sampled(sums(5))
    assert rollouts_generated() == 10  # 3 * 2, then 2 * 2 more


def test_other_shards_draw_nothing_and_make_the_same_rows() -> None:
    first = sampled(sums(6), shard=2)
    with heard() as records:
        assert sampled(sums(7), shard=7).rows == 14
    assert rollouts_generated() == 14  # 6 * 2, then those of the seventh prompt
    assert [(r.shard, r.counts.get("drawn")) for r in records if r.step == "sample_rollouts"] == [(0, 2), (None, 2)]
    assert sampled(sums(6), shard=5) == first


def test_a_shard_is_recorded_with_its_number_and_rows() -> None:
    with heard() as records:
        sampled(sums(5), shard=2)
    shards = sorted((r.shard, r.rows) for r in records if r.shard is not None)
    assert shards == [(0, 4), (1, 4), (2, 2)]
    assert [(r.rows, r.counts["drawn"]) for r in records if r.step == "sample_rollouts" and r.shard is None] == [
        (10, 10)
    ]


@pytest.mark.parametrize(
    "change",
    [{"seed": 8}, {"temperature": 0.5}, {"policy": ModelRef(name="fake:0.5")}],
    ids=["seed", "temperature", "policy"],
)
def test_what_decides_a_rollout_draws_all_anew(change: dict[str, object]) -> None:
    sampled(sums(3))
    sampled(sums(3), **change)  # type: ignore[arg-type]
    assert rollouts_generated() == 12


def test_a_failing_shard_lets_the_others_finish_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "12 + 1")  # the third prompt: the first of the second shard of three
    with heard() as records, pytest.raises(ShardsFailed) as caught:
        sampled(sums(6))
    told = str(caught.value)
    assert "1 of 3 shards failed: [1]" in told
    assert "shard 1: EngineConfigurationError: 'What is 12 + 1?' is too long" in told
    assert "Run the same command again" in told
    assert rollouts_generated() == 8  # both rows of prompts 0, 1, 4 and 5
    states = {r.shard: r.state for r in records if r.shard is not None}
    assert states == {0: "completed", 1: "failed", 2: "completed"}


def test_after_a_failed_shard_only_its_rows_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, "13 + 1")  # the fourth prompt: the end of the second shard
        with pytest.raises(ShardsFailed):
            sampled(sums(6))
    assert rollouts_generated() == 10  # the second shard had drawn the two rows of the third prompt
    with heard() as records:
        sampled(sums(6))
    assert {r.shard: r.counts["drawn"] for r in records if r.shard is not None} == {0: 0, 1: 2, 2: 0}
    assert {r.shard: r.cached for r in records if r.shard is not None} == {0: True, 1: False, 2: True}
    assert rollouts_generated() == 12


def test_two_failing_shards_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "10 + 1", "15 + 1")
    with pytest.raises(ShardsFailed, match=r"2 of 3 shards failed: \[0, 2\]"):
        sampled(sums(6))


def test_prompts_that_bring_the_engine_down_too_often_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "RETRY_DELAYS_SECONDS", ())
    dying = Fake(fail_prompts=("12 + 1",))
    with pytest.raises(ShardsFailed, match=r"the engine failed at 2 of 12 rollouts(?s:.*)told to die at prompts"):
        sampled(sums(6), engine=dying)
    assert sampled(sums(6)).rows == 12  # nothing was set aside: the engine works again, and all rows are drawn
    rows = rows_of(sampled(sums(6)))
    assert {row.finish_reason for row in rows} <= {"stop", "length"}


def refuse(patch: pytest.MonkeyPatch, *texts: str) -> None:
    """Have the fake engine refuse prompts that contain one of these texts, as if they were too long for it."""

    def refuse_failing(_engine: FakeEngine, messages: Sequence[Message]) -> None:
        for message in messages:
            if any(text in message["content"] for text in texts):
                raise EngineConfigurationError(f"{message['content']!r} is too long")

    patch.setattr(FakeEngine, "_refuse_failing", refuse_failing)


def test_a_stopped_run_keeps_its_rows_and_goes_on_later() -> None:
    threading.Timer(0.15, stop).start()
    with pytest.raises(ShardsFailed, match="Stopped: the run was stopped"):
        sampled(sums(8), rollouts=10, engine=Fake(seconds_per_request=0.02))  # 4 shards of 20 rows: 0.4 s if let
    drawn = rollouts_generated()
    assert 4 <= drawn < 80
    stopping.clear()
    assert sampled(sums(8), rollouts=10).rows == 80
    assert rollouts_generated() == 80


def test_every_rollout_has_a_seed_of_its_own_the_same_in_every_run() -> None:
    seeds = [row.seed for row in rows_of(sampled(sums(5), rollouts=4))]
    assert Counter(Counter(seeds).values()) == {1: 20}
    assert seeds == [rollout_seed(7, f"p{n}", i) for n in range(5) for i in range(4)]
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_an_iteration_draws_with_other_seeds() -> None:
    sampling = Sampling(seed=7)
    assert [sampling.for_iteration(n).seed for n in (1, 2)] == [8, 9]
    assert rollout_seed(8, "p0", 0) != rollout_seed(9, "p0", 0)


def test_equal_seeds_make_equal_data_sets_in_two_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = sampled(sums(5), shard=1)
    monkeypatch.setenv("RATCHET_HOME", str(tmp_path / "another-home"))
    there = sampled(sums(5), shard=4)
    assert here == there
    assert rollouts_generated() == 20
