"""What a run will take, from what earlier ones took."""

import pytest

from models.specs import SFT, TinyModel
from tasks.estimates import (
    Line,
    Past,
    completion_tokens,
    fit,
    optimizer_steps,
    row_seconds,
    sampling_seconds,
    share_left,
    tiny_bytes,
    told_bytes,
    told_seconds,
    training_seconds,
)


def drawn(rollouts: int, tokens: int, seconds: float = 1.0, split: str | None = None) -> Past:
    return Past("sample_rollouts", split, None, rollouts, rollouts, tokens, 0, seconds)


def trained(steps: int, seconds: float, step: str = "train_sft") -> Past:
    return Past(step, None, None, None, 0, 0, steps, seconds)


@pytest.mark.parametrize(
    ("points", "line"),
    [
        pytest.param([], None, id="nothing to go by"),
        pytest.param([(0.0, 5.0)], None, id="no units"),
        pytest.param([(4.0, 6.0)], Line(0.0, 1.5), id="one point: through the origin"),
        pytest.param([(4.0, 6.0), (4.0, 2.0)], Line(0.0, 1.0), id="one place: 8 s for 8 units"),
        pytest.param([(10.0, 12.0), (20.0, 14.0)], Line(10.0, 0.2), id="10 s to start and 0.2 s a unit"),
        # the line through them would begin at -6 s: 12 s for 12 units instead
        pytest.param([(4.0, 2.0), (8.0, 10.0)], Line(0.0, 1.0), id="no start below zero"),
        pytest.param([(1.0, 9.0), (3.0, 3.0)], Line(0.0, 3.0), id="more units never take less: 12 s for 4"),
    ],
)
def test_a_line_is_laid_through_what_was_seen(points: list[tuple[float, float]], line: Line | None) -> None:
    found = fit(points)
    assert found == line if line is None or found is None else found == pytest.approx(line)


def test_a_completion_is_as_long_as_those_of_its_split_were() -> None:
    history = [drawn(100, 1500, split="dev"), drawn(300, 9000), trained(10, 5.0)]
    assert completion_tokens(history, "dev") == 15.0
    assert completion_tokens(history, None) == 30.0
    assert completion_tokens(history, "test") == 26.25  # none of that split: 10,500 tokens of 400
    assert completion_tokens([trained(10, 5.0)], None) is None


def test_the_share_a_step_keeps_is_over_all_the_rows_it_saw() -> None:
    history = [Past("select", None, 3200, 383, 0, 0, 0, 0.1), Past("select", None, 800, 17, 0, 0, 0, 0.1)]
    assert share_left(history, "select") == 0.1  # 400 of 4,000
    assert share_left(history, "pair") is None
    assert share_left([Past("select", None, None, 383, 0, 0, 0, 0.1)], "select") is None


@pytest.mark.parametrize(
    ("rows", "settings", "steps"),
    [
        (383, {"global_batch_size": 16}, 24),  # 23 full batches and a rest
        (383, {"global_batch_size": 16, "epochs": 2}, 48),
        (383, {"global_batch_size": 16, "epochs": 0.5}, 12),
        (5, {"global_batch_size": 16}, 1),
        (383, {"max_steps": 7}, 7),
    ],
)
def test_optimizer_steps_follow_from_rows_and_batch(rows: int, settings: dict[str, float], steps: int) -> None:
    assert optimizer_steps(rows, SFT.model_validate(settings)) == steps


def test_sampling_takes_as_long_as_it_took() -> None:
    history = [drawn(100, 1000, 3.0), drawn(300, 3000, 5.0)]  # 2 s to start, and 1 s for 1,000 tokens
    assert sampling_seconds(history, 8000, tiny=False, started=True) == pytest.approx(10.0)


def test_the_start_of_an_engine_is_added_once() -> None:
    first = drawn(300, 3000, 12.0)._replace(starts=True)  # 7 s more than the 5 s that as many tokens take later
    history = [first, drawn(100, 1000, 3.0), drawn(300, 3000, 5.0)]
    assert sampling_seconds(history, 8000, tiny=False, started=False) == pytest.approx(17.0)
    assert sampling_seconds(history, 8000, tiny=False, started=True) == pytest.approx(10.0)
    assert sampling_seconds([first], 6000, tiny=False, started=False) == pytest.approx(
        24.0
    )  # 4 ms a token, start and all


def test_without_history_only_the_tiny_model_has_an_assumption() -> None:
    assert sampling_seconds([], 9000, tiny=True, started=False) == 16.0  # 15 s to start and 9,000 tokens a second
    assert sampling_seconds([], 9000, tiny=True, started=True) == 1.0
    assert sampling_seconds([], 9000, tiny=False, started=False) is None
    assert training_seconds([], "train_sft", 100, tiny=True) == pytest.approx(9 + 8.6)
    assert training_seconds([], "train_sft", 100, tiny=False) is None


def test_a_training_goes_by_trainings_of_its_kind() -> None:
    history = [
        trained(24, 11.2),
        trained(48, 13.6),
        trained(1000, 900.0, "train_preferences"),
    ]  # 8.8 s and 0.1 s a step
    assert training_seconds(history, "train_sft", 100, tiny=False) == pytest.approx(18.8)


def test_rows_are_moved_as_fast_as_they_were() -> None:
    assert row_seconds([Past("score", None, None, 1000, 0, 0, 0, 0.5)], "score", 4000) == 2.0
    assert row_seconds([], "score", 20_000) == 1.0  # 50 millionths of a second a row


def test_the_demos_model_takes_a_megabyte() -> None:
    # 2 x 770 x 64 = 98,560 for embeddings and head; 12 x 3 x 64 x 64 = 147,456; 4 bytes each
    assert tiny_bytes(TinyModel()) == 984_064


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0 s"), (59, "59 s"), (190, "3 min 10 s"), (7500, "2 h 5 min"), (360_000, "100 h 0 min")],
)
def test_seconds_are_told_in_the_unit_that_fits(seconds: float, told: str) -> None:
    assert told_seconds(seconds) == told


@pytest.mark.parametrize(
    ("size", "told"), [(12, "12 B"), (1234, "1.2 kB"), (56_700_000, "56.7 MB"), (345e9, "345 GB"), (2.5e12, "2.5 TB")]
)
def test_bytes_are_told_in_the_unit_that_fits(size: float, told: str) -> None:
    assert told_bytes(size) == told
