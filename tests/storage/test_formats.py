"""The built-in sums with instructions about the form of the answer."""

import pytest

from storage.formats import ASKS, Formats, make_formatted
from storage.hub import Source, read_source, source_key, source_name


def met(prompt: str, completion: str) -> list[bool]:
    """Whether the completion does each of the two things that the prompt asks for."""
    demands = [part for part in prompt.split("\n")[1].split(".") if part]
    words = completion.split()
    found = []
    for demand in demands:
        word = demand.split(" word ")[1].split()[0]
        if demand.strip().startswith("Begin"):
            found.append(words[0] == word)
        elif demand.strip().startswith("End"):
            found.append(words[-1] == word)
        else:
            found.append(word in words)
    return found


def test_a_prompt_is_a_sum_and_two_demands_and_the_completion_holds_the_sum() -> None:
    for row in make_formatted(Formats(problems=50)):
        question, instruction = row.prompt.split("\n")
        numbers = [int(word.strip("?")) for word in question.split() if word.strip("?").isdigit()]
        assert str(sum(numbers)) in row.completion.split()
        assert sum(ask.partition("{")[0] in instruction for ask in ASKS.values()) == 2


@pytest.mark.parametrize("followed", [0.0, 0.6, 1.0])
def test_each_demand_is_met_with_the_chance_asked_for(followed: float) -> None:
    demands = [one for row in make_formatted(Formats(problems=1000, followed=followed)) for one in met(*row)]
    assert len(demands) == 2000
    assert abs(sum(demands) / 2000 - followed) < 0.05  # standard deviation: 0.011


def test_more_problems_continue_fewer_and_the_splits_share_no_sum() -> None:
    few, more = (list(make_formatted(Formats(problems=n))) for n in (20, 60))
    assert more[:20] == few
    tests = {row.prompt.split("\n")[0] for row in make_formatted(Formats(problems=60, split="test"))}
    assert not tests & {row.prompt.split("\n")[0] for row in more}


def test_it_is_a_source_like_any_other() -> None:
    source = Source(formats=Formats(problems=3, seed=1))
    rows = list(read_source(source))
    assert [(row.line, row.answer) for row in rows] == [(1, None), (2, None), (3, None)]
    assert source_name(source) == "formats:train"
    assert source_key(source) != source_key(Source(formats=Formats(problems=3, seed=2)))
    with pytest.raises(ValueError, match="columns and answer_after do not apply to formats problems"):
        Source.model_validate({"formats": {"problems": 3}, "columns": {"prompt": "text"}})
