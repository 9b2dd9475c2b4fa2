"""What a run looks like where there is no terminal."""

from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from flows import terminal
from flows.terminal import Lines
from tasks.recording import Progress


def progress(step: str, done: int, tokens: int) -> Progress:
    return Progress(step=step, iteration=1, done=done, total=160, tokens=tokens, reused=0)


def test_judging_has_a_speed_in_rollouts_and_sampling_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "PLAIN_SECONDS", 0.0)
    moments = iter([100.0, 102.0, 200.0, 202.0])
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    said = StringIO()
    for step, tokens in (("judge_rollouts", 0), ("sample_rollouts", 500)):
        lines = Lines(Console(file=said, width=120))
        lines(progress(step, 50, 0))
        lines(progress(step, 150, tokens))  # two seconds later
    assert "judge_rollouts: 150 of 160 rollouts, 50 rollouts/s" in said.getvalue()
    assert "sample_rollouts: 150 of 160 rollouts, 250 tokens/s" in said.getvalue()
