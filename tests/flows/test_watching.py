"""What a run looks like while it goes on, on a terminal and in a log file."""

import re
from collections.abc import Iterator
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from flows import watching
from flows.watching import Lines
from storage.experiments import StepRecord
from tasks.recording import Progress, ShardProgress

TIME = r"\d\d:\d\d:\d\d "


def progress(done: int, tokens: int, *shards: ShardProgress, step: str = "sample_rollouts", **more: object) -> Progress:
    known = {"step": step, "iteration": 1, "done": done, "total": 160, "tokens": tokens, "reused": 0, "shards": shards}
    return Progress(**known | more)  # type: ignore[arg-type] # built of names


def shard(number: int, done: int, *, total: int = 40, tokens: int = 100, matching: int = 0) -> ShardProgress:
    return ShardProgress(number=number, done=done, total=total, tokens=tokens, compared=done, matching=matching)


def record(step: str, number: int | None = None) -> StepRecord:
    return StepRecord(
        run="r", step=step, iteration=1, shard=number, state="completed", cached=False, rows=160, digest=None, key=None,
        seconds=2.0, counts={"drawn": 160}, detail="", at="2026-01-01",
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A clock that stands still until it is set."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: clock.now))
    yield clock


def test_judging_has_a_speed_in_rollouts_and_sampling_in_tokens_too(clock: SimpleNamespace) -> None:
    said = StringIO()
    for step, tokens in (("judge_rollouts", 0), ("sample_rollouts", 5000)):
        lines = Lines(Console(file=said, width=160))
        clock.now = 100.0
        lines(progress(50, 0, step=step))
        clock.now = 120.0
        lines(progress(150, tokens, step=step))  # 100 rollouts in 20 seconds; 10 are left
    assert "it1 judge_rollouts: 150 of 160 rollouts, 5.0 rollouts/s, 2 s left" in said.getvalue()
    assert "it1 sample_rollouts: 150 of 160 rollouts, 5.0 rollouts/s, 250 tokens/s, 2 s left" in said.getvalue()


def test_a_log_file_gets_a_line_with_the_time_every_ten_seconds_and_no_control_characters(
    clock: SimpleNamespace,
) -> None:
    said = StringIO()
    with Lines(Console(file=said, width=160)) as lines:
        for second in range(31):
            clock.now = 100.0 + second
            lines(progress(second, 10 * second, shard(0, second, matching=second // 2), shard(1, 0, tokens=0)))
        lines(record("sample_rollouts", 0))
        lines(record("sample_rollouts"))
    found = said.getvalue().splitlines()
    assert "\x1b" not in said.getvalue()
    assert "\r" not in said.getvalue()
    assert len(found) == 4  # after 10, 20 and 30 seconds, and the step itself; nothing of a shard that is done
    assert all(re.match(TIME, line) for line in found)
    # 30 rows in 30 seconds, 300 tokens; 15 of the 30 that were compared match; 130 rows are left
    assert "30 of 160 rollouts, 1.0 rollouts/s, 10 tokens/s, 50 % match, 2 min 10 s left; 0 of 2 shards" in found[2]
    assert found[3].endswith("2.0 s  drawn 160")


def test_a_terminal_shows_a_bar_for_all_and_for_each_shard_under_way(clock: SimpleNamespace) -> None:
    screen = Console(file=StringIO(), force_terminal=True, width=160)
    lines = Lines(screen)
    lines(progress(20, 200, shard(0, 20), shard(1, 0, tokens=0)))
    clock.now = 110.0
    lines(progress(60, 600, shard(0, 40), shard(1, 20, matching=5), shard(2, 0, tokens=0)))
    shown = {task.description.strip(): task.fields["told"] for task in lines._bars.tasks}
    assert list(shown) == ["sample_rollouts", "shard 1"]  # shard 0 is done, shard 2 has not begun
    # 40 rows and 400 tokens in 10 seconds; 5 of 60 compared match: 8 %; 100 rows are left
    assert shown["sample_rollouts"] == "60 of 160 rollouts, 4.0 rollouts/s, 40 tokens/s, 8 % match, 25 s left"
    assert shown["shard 1"] == "20/40, 25 % match"
    lines(record("sample_rollouts"))
    assert lines._bars.tasks == []


def test_many_shards_get_eight_bars_beside_that_of_all() -> None:
    lines = Lines(Console(file=StringIO(), force_terminal=True, width=160))
    lines(progress(40, 400, *(shard(number, 1) for number in range(40))))
    assert [task.description.strip() for task in lines._bars.tasks] == [
        "sample_rollouts", *(f"shard {n}" for n in range(8))
    ]  # fmt: skip


def test_a_training_shows_its_loss_and_what_is_left(clock: SimpleNamespace) -> None:
    said = StringIO()
    lines = Lines(Console(file=said, width=160))
    for step in (10, 20):
        clock.now += 10
        told = {"unit": "optimizer steps", "detail": "loss 0.5310, 1,200 tokens/s", "total": 60}
        lines(progress(step, 0, step="train_sft", **told))
    # 10 optimizer steps in 10 seconds, 40 are left
    assert "it1 train_sft: 20 of 60 optimizer steps, loss 0.5310, 1,200 tokens/s, 40 s left" in said.getvalue()


def test_a_failed_shard_is_told_at_once() -> None:
    said = StringIO()
    failed = record("sample_rollouts", 3).model_copy(update={"state": "failed", "detail": "the engine died"})
    Lines(Console(file=said, width=160))(failed)
    assert "sample_rollouts shard 3" in said.getvalue()
    assert "FAILED after 2.0 s: the engine died" in said.getvalue()
