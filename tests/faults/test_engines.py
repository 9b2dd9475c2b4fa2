"""Engines that fail: the rest is drawn, what fails is named, a prompt that always fails is set aside."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models import openai_engine
from models.specs import Fake, ModelRef, OpenAI, PromptTemplate, Sampling
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import Prompt, Rollout, ScoredRollout
from tasks import caching
from tasks.drawing import ShardsFailed
from tasks.sampling import sample_rollouts
from tasks.scoring import score_answers
from tasks.serving import close_engines, rollouts_generated
from tests.faults.harness import Driver, Place, in_ledger, stored
from tests.models.test_openai_engine import failing, ok, serving

pytestmark = pytest.mark.flow  # whole runs on the fake engine

FAILING = "79 + 45"  # the first of the small preset's training prompts
Answer = Callable[[int, dict[str, Any]], tuple[int, dict[str, str], bytes]]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(openai_engine, "FIRST_PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(caching, "RETRY_DELAYS_SECONDS", (0, 0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_engines()
    yield
    close_engines()


def prompts(count: int) -> DatasetRef:
    rows = (
        Prompt(prompt_id=f"p{n}", source="tests", prompt=f"What is {n} + 1?", answer=f"{n + 1}") for n in range(count)
    )
    return write_rows(rows, Prompt, step="prompts")


def sampled(count: int, engine: Fake | OpenAI, **settings: Any) -> DatasetRef:
    sampling = Sampling(rollouts_per_prompt=2, prompts_per_shard=4, temperature=0.8, top_k=-1, **settings)
    return sample_rollouts(ModelRef(name="fake:0.4"), prompts(count), PromptTemplate(), sampling, engine)


def asked(body: dict[str, Any]) -> str:
    text: str = body["messages"][-1]["content"]
    return text


def breaking(at: str, reply: Callable[[], tuple[int, dict[str, str], bytes]]) -> Answer:
    """An endpoint that answers all but one prompt."""
    return lambda number, body: reply() if at in asked(body) else ok("FINAL ANSWER: 3")


def truncated() -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Length": "5000"}, b'{"choices": [{"message"'


def hanging() -> tuple[int, dict[str, str], bytes]:
    time.sleep(1.0)
    return ok()


def none_of_them() -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps({"choices": [], "usage": {}}).encode()


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        pytest.param(lambda: failing(500, "it broke"), "HTTP 500: it broke", id="answers 500"),
        pytest.param(truncated, "RemoteProtocolError", id="truncates its stream"),
        pytest.param(none_of_them, "no complete choice in the reply", id="returns fewer than asked"),
        pytest.param(hanging, "ReadTimeout", id="hangs"),
    ],
)
@pytest.mark.timeout(60)
def test_an_endpoint_that_breaks_at_one_prompt_costs_only_this_prompt(
    reply: Callable[[], tuple[int, dict[str, str], bytes]], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(breaking("What is 6 + 1?", reply)) as server:
        engine = OpenAI(endpoints=(server.url,), max_retries=1, timeout_seconds=0.3)
        rows = list(read_rows(sampled(8, engine, maximum_error_rate=0.2), Rollout))
    assert len(rows) == 16
    assert [(row.prompt_id, row.completion) for row in rows if row.finish_reason == "error"] == [("p6", ""), ("p6", "")]
    assert "prompt p6 is set aside, for it failed 3 times alone" in caplog.text
    assert told in caplog.text


@pytest.mark.timeout(60)
def test_an_endpoint_that_is_down_sets_no_prompt_aside_and_names_the_shards() -> None:
    with serving(lambda number, body: ok("FINAL ANSWER: 3") if number < 8 else failing(503)) as server:
        with pytest.raises(ShardsFailed, match=r"of 2 shards failed(?s:.*)HTTP 503(?s:.*)Run the same command again"):
            sampled(8, OpenAI(endpoints=(server.url,), max_retries=1, concurrency=1), maximum_error_rate=1.0)
        server.answer = lambda number, body: ok("FINAL ANSWER: 3")
        before = len(server.bodies)
        rows = list(read_rows(sampled(8, OpenAI(endpoints=(server.url,), max_retries=1)), Rollout))
        assert {row.finish_reason for row in rows} == {"stop"}
        assert len(server.bodies) - before == 16 - 8  # those that were answered are not asked again


def test_a_prompt_set_aside_is_scored_as_undecided_and_not_tried_again() -> None:
    engine = Fake(fail_prompts=("What is 5 + 1?",))
    rollouts = sampled(8, engine, maximum_error_rate=0.125)  # 2 of 16 rows: just allowed
    drawn = rollouts_generated()
    scored = list(read_rows(score_answers(rollouts, prompts(8), "FINAL ANSWER:"), ScoredRollout))
    assert [(row.prompt_id, row.reward) for row in scored if row.reason == "engine error"] == [("p5", None)] * 2
    grown = list(read_rows(sampled(12, engine, maximum_error_rate=0.125), Rollout))
    assert sum(row.finish_reason == "error" for row in grown) == 2
    assert rollouts_generated() == drawn + 8  # four more prompts


def test_removing_the_part_has_a_prompt_that_was_set_aside_tried_again(ratchet_home: Path) -> None:
    sampled(8, Fake(fail_prompts=("What is 5 + 1?",)), maximum_error_rate=0.125)
    (part,) = ratchet_home.glob("ledger/*/part-*-set-aside.parquet")
    part.unlink()
    for record in ratchet_home.glob("steps/gather_rollouts/*.json"):
        record.unlink()
    rows = read_rows(sampled(8, Fake(), maximum_error_rate=0.125), Rollout)
    assert all(row.finish_reason != "error" for row in rows)


def test_prompts_set_aside_for_a_larger_sampling_may_be_too_many_for_a_smaller_one() -> None:
    engine = Fake(fail_prompts=("What is 1 + 1?",))
    sampled(16, engine, maximum_error_rate=0.07)  # 2 of 32 rows: 6 %
    with pytest.raises(ShardsFailed, match=r"failed at 2 of 8 rollouts(?s:.*)part-\*-set-aside.parquet is removed"):
        sampled(4, engine, maximum_error_rate=0.07)


@pytest.mark.flow
@pytest.mark.timeout(120)
def test_a_failed_run_names_shards_errors_and_the_command_and_the_next_draws_only_what_is_missing(
    driver: Driver, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    place = Place(tmp_path)
    failed = driver.run(place, "--set", f"engine.fail_prompts=['{FAILING}']")
    assert failed.status == 1
    assert "1 of 4 shards failed: [0]" in failed.output
    assert f"the fake engine was told to die at prompts that contain '{FAILING}'" in failed.output
    assert "the engine failed at 4 of 64 rollouts, and maximum_error_rate is 0.02" in failed.output
    assert "go on with:\n  ratchet run" in failed.output
    assert "--no-prefect-server" in failed.output.split("go on with:")[1]
    safe = in_ledger(place.home)
    assert driver.run(place).status == 0
    drawn = place.drawn()
    assert not set(drawn) & set(safe)
    assert sum(row[2] == 1 for row in drawn) == 4 * 4  # of the training prompts, those of the first shard
    assert stored(place.home) == unbroken


@pytest.mark.flow
@pytest.mark.timeout(120)
def test_a_run_goes_on_without_a_prompt_that_always_fails_and_counts_it(driver: Driver, tmp_path: Path) -> None:
    place = Place(tmp_path)
    settings = ("--set", f"engine.fail_prompts=['{FAILING}']", "--set", "sampling.maximum_error_rate=0.1")
    ended = driver.run(place, *settings, "--set", "dpo=null")
    assert ended.status == 0, ended.output
    assert "engine errors 4" in ended.output
    (record,) = (json.loads(file.read_text()) for file in place.home.glob("experiments/small/iterations/001.json"))
    assert record["drops"]["engine error"] == 4
