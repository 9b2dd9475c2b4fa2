"""The engine that answers from a script."""

from pathlib import Path

import pytest

from models.engine import Completion, EngineConfigurationError, Request, open_engine
from models.scripted_engine import read_script
from models.specs import ModelRef, Sampling, Scripted

SCRIPT = r"""
rules:
  - when: ['Write', 'word (?P<first>\w+)']
    replies: ['$first, $last', 'only $first for $$5']
    choices: {last: [a, b]}
  - when: ['Write']
    replies: ['one two three STOP four']
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    file = tmp_path / "script.yaml"
    file.write_text(SCRIPT)
    return str(file)


def replies(script: str, prompt: str, count: int = 60, sampling: Sampling | None = None) -> list[Completion]:
    requests = [Request(key=str(n), messages=({"role": "user", "content": prompt},), seed=n) for n in range(count)]
    with open_engine(Scripted(), ModelRef(name=script)) as engine:
        drawn = list(engine.sample(requests, sampling or Sampling(temperature=1.0)))
        assert engine.generated() == count
    return drawn


def test_the_first_rule_that_fits_answers_with_what_it_found_and_chose(script: str) -> None:
    told = [one.text for one in replies(script, "Write\nthe word Bye")]
    assert set(told) == {"Bye, a", "Bye, b", "only Bye for $5"}
    assert told == [one.text for one in replies(script, "Write\nthe word Bye")]


def test_a_greedy_reply_is_one_and_the_same(script: str) -> None:
    assert len({one.text for one in replies(script, "Write the word Bye", sampling=Sampling(temperature=0))}) == 1


def test_stop_strings_and_the_token_limit_cut_a_reply(script: str) -> None:
    (stopped,) = replies(script, "Write", 1, Sampling(stop=("STOP",)))
    assert (stopped.text, stopped.finish_reason) == ("one two three ", "stop")
    (cut,) = replies(script, "Write", 1, Sampling(max_completion_tokens=2))
    assert (cut.text, cut.finish_reason, cut.completion_tokens) == ("one two", "length", 2)


def test_a_prompt_without_a_rule_is_quoted(script: str) -> None:
    with pytest.raises(EngineConfigurationError, match="has no rule for 'Sing'; add one"):
        replies(script, "Sing")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rules: []", "is no script: rules"),
        ("rules: [{when: ['('], replies: [a]}]", "is no script: rules.0.when.0"),
        ("rules: [{when: [a], reply: b}]", "is no script: rules.0"),
        ("rules: [", "cannot be read"),
        ("", "is no script"),
    ],
)
def test_a_file_that_is_no_script_is_refused(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "script.yaml"
    file.write_text(text)
    with pytest.raises(EngineConfigurationError) as caught:
        read_script(str(file))
    assert told in str(caught.value)


def test_a_name_that_a_rule_does_not_know_is_told(tmp_path: Path) -> None:
    file = tmp_path / "script.yaml"
    file.write_text("rules: [{when: [a], replies: ['$what']}]")
    with pytest.raises(EngineConfigurationError, match="neither finds nor chooses"):
        replies(str(file), "a")
