"""Queries, and the instructions that are read off a supervisor's replies."""

from collections import Counter

import pytest
from pydantic import ValidationError

from storage.rows import Prompt
from tasks.instances import Combining, combine, split_of
from tasks.instructions import (
    Example,
    Length,
    Proposing,
    Read,
    ask_for_instruction,
    instructions_of,
    queries_within,
    read_instruction,
    too_many_unreadable,
)
from tasks.prompts import ngrams
from tasks.screening import Screening, evaluation_types
from tests.tasks.builders import instruction, rollout

PROPOSING = Proposing(examples=(Example(query="Why?", instruction="Use a dash."),))


def query(name: str = "q") -> Prompt:
    return Prompt(prompt_id=name, source="tests", prompt=f"query {name}", answer=None)


def read_of(replies: list[str], settings: Proposing = PROPOSING) -> tuple[list[str], Counter[str], Counter[str]]:
    """The instructions read off these replies, the reasons and the counts."""
    read, counts = Read(len(replies), Counter(), []), Counter[str]()
    rows = [rollout(n, text) for n, text in enumerate(replies)]
    kept = instructions_of(rows, {"p": query()}, settings, {}, read, counts)
    return [row.instruction for row in kept], read.reasons, +counts


def test_queries_that_are_too_short_too_long_empty_or_there_already_are_counted() -> None:
    counts: Counter[str] = Counter()
    texts = ["What is a fjord?", "Hi", "x" * 21, "  ", "What is  a fjord?", "Why is it?"]
    kept = list(queries_within(texts, "tests", Length(shortest=5, longest=20), counts))
    assert [row.prompt for row in kept] == ["What is a fjord?", "Why is it?"]
    assert counts == {"read": 6, "queries": 2, "too short": 1, "too long": 1, "empty": 1, "duplicate": 1}


def test_a_length_that_leaves_no_query_is_refused() -> None:
    with pytest.raises(ValidationError, match="shortest is 9 and longest 8, which leaves none"):
        Length(shortest=9, longest=8)


def test_the_supervisor_is_shown_the_examples_and_then_the_query() -> None:
    asked = ask_for_instruction(query(), PROPOSING)
    assert "Query: Why?\nInstruction: Use a dash." in asked.prompt
    assert asked.prompt.endswith("Query: query q\nInstruction:")
    assert asked.prompt_id != ask_for_instruction(query("r"), PROPOSING).prompt_id


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        pytest.param("End with Bye.", ("End with Bye.", "read"), id="bare"),
        pytest.param(" Instruction: End with Bye.", ("End with Bye.", "read"), id="after a cue"),
        pytest.param("- **Instruction:** End with Bye.", ("End with Bye.", "read"), id="in a list, bold"),
        pytest.param("  ", (None, "empty"), id="empty"),
        pytest.param("Sure, here is one", (None, "prose"), id="talk"),
        pytest.param("What would you like?", (None, "prose"), id="a question back"),
        pytest.param("End with Bye.\nOr with Hi.", (None, "more than one line"), id="two lines"),
        pytest.param("x" * 301, (None, "too long"), id="too long"),
    ],
)
def test_an_instruction_is_one_line_about_the_answer(reply: str, expected: tuple[str | None, str]) -> None:
    assert read_instruction(rollout(0, reply), PROPOSING) == expected


@pytest.mark.parametrize(("reason", "told"), [("length", "truncated"), ("error", "engine error")])
def test_a_reply_that_did_not_end_is_no_instruction(reason: str, told: str) -> None:
    assert read_instruction(rollout(0, "End with", finish_reason=reason), PROPOSING) == (None, told)


def test_equal_instructions_and_those_of_the_examples_are_taken_once() -> None:
    kept, reasons, counts = read_of(["End with Bye.", "end  with bye", "use a dash", "Use a comma twice.", "Sure!"])
    assert kept == ["End with Bye.", "Use a comma twice."]
    assert reasons == {"read": 4, "prose": 1}
    assert counts == {"instructions": 2, "duplicate": 2, "like the evaluation's": 2}


def test_instructions_like_the_evaluations_are_dropped_when_that_is_asked_for() -> None:
    dropping = PROPOSING.model_copy(update={"screening": Screening(action="drop")})
    kept, _, counts = read_of(["End with Bye.", "Write nine lines."], dropping)
    assert kept == ["Write nine lines."]
    assert counts == {"instructions": 1, "like the evaluation's": 1}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Use at least 40 words.", "length"),
        ("Do not use any commas.", "no comma"),
        ("Wrap the answer in double quotes.", "quotation"),
        ("Answer in lowercase letters.", "letter case"),
        ("Finish your answer with the words take care.", "ending"),
        ("Return JSON.", "json"),
        ("Let the letter z occur three times.", "letter frequency"),
        ("Answer in German.", "response language"),
        ("Use three bullet points.", "bullet list"),
        ("Add a postscript.", "postscript"),
        ("First repeat the request, then answer.", "repeat the prompt"),
        ("Put a placeholder for the name.", "placeholders"),
        ("Mention the word lake.", "keywords"),
        ("Give two different responses.", "two responses"),
        ("Add a title in angle brackets.", "title"),
        ("Highlight two passages.", "highlighted sections"),
        ("Divide it into 3 sections.", "multiple sections"),
    ],
)
def test_each_kind_of_the_evaluations_instructions_is_recognised(text: str, kind: str) -> None:
    assert kind in evaluation_types(text, Screening(), {})


@pytest.mark.parametrize("text", ["Write nine lines.", "Put a star before the number.", "Rhyme every second line."])
def test_an_instruction_of_another_kind_is_none_of_the_evaluations(text: str) -> None:
    assert evaluation_types(text, Screening(), {}) == []


def test_thirteen_words_of_the_evaluations_prompts_are_recognised() -> None:
    theirs = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    grams = dict.fromkeys(ngrams(theirs), "13 words of ifeval")
    shared = "Well: " + " ".join(theirs.split()[:13]).upper()
    assert evaluation_types(shared, Screening(types=False), grams) == ["13 words of ifeval"]
    assert evaluation_types("one two three four", Screening(types=False), grams) == []


def test_no_instruction_is_in_two_splits_and_the_order_does_not_matter() -> None:
    rows = [instruction(f"i{n}") for n in range(20)]
    splits = split_of(rows, Combining(dev_share=0.1, test_share=0.2))
    assert Counter(splits.values()) == {"train": 14, "dev": 2, "test": 4}
    assert split_of(rows[::-1], Combining(dev_share=0.1, test_share=0.2)) == splits


def test_fewer_than_three_instructions_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="2 instructions cannot be split into train, dev and test; propose more"):
        split_of([instruction("a"), instruction("b")], Combining())


def test_an_instruction_keeps_the_query_it_was_proposed_for_and_gets_others_in_training_only() -> None:
    queries = [query(f"q{n}") for n in range(6)]
    rows = [instruction(f"i{n}", f"q{n}") for n in range(6)]
    settings = Combining(queries_per_instruction=3, held_out_queries=2)
    splits = split_of(rows, settings)
    train = list(combine(rows, queries, "train", settings))
    for row in rows:
        own = [one for one in train if one.instruction_id == row.instruction_id]
        if splits[row.instruction_id] != "train":
            assert own == []
            continue
        assert own[0].query_id == row.query_id
        assert len({one.query_id for one in own}) == 3
        assert own[0].prompt == f"query {row.query_id}\n{row.instruction}"
    held_out = list(combine(rows, [query("h1"), query("h2"), query("h3")], "test", settings))
    assert {splits[one.instruction_id] for one in held_out} == {"test"}
    assert len(held_out) == 2


def test_the_gate_says_how_many_replies_are_unreadable_quotes_three_and_says_what_to_change() -> None:
    read = Read(10, Counter({"read": 4, "prose": 5, "truncated": 1}), ["prose: 'Hm'"])
    told = too_many_unreadable(read, 4, 0.5, "verifier", "Reword it.")
    assert told is not None
    assert "6 of 10 replies hold no verifier that can be read (prose 5, truncated 1), 4 verifiers are left" in told
    assert "prose: 'Hm'" in told and told.endswith("Reword it.")
    assert too_many_unreadable(read, 4, 0.6, "verifier", "") is None
    assert too_many_unreadable(read, 0, 1.0, "verifier", "") is not None


@pytest.mark.parametrize("text", ["no names", "$query and $other", "$query $"])
def test_a_text_with_other_names_than_its_own_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match=r"the text is to hold \$examples, \$query and no other"):
        Proposing(text=text)
