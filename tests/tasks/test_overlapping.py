"""How much of what is trained on stands in held-out prompts."""

import pytest

from models.specs import ModelRef
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.experiments import StepRecord
from storage.results import StepResult, save_result
from storage.rows import Conversation, Demonstration, EvaluatedPrompt, Instance, Overlap, Pair, Prompt
from tasks.contamination import Questions
from tasks.overlapping import count_overlaps, measure_overlap, trained_on
from tests.tasks.builders import demonstration, evaluated, instance
from tests.tasks.test_costs import record

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"  # 14 words: 2 runs of 13


def prompts(*texts: str) -> DatasetRef:
    rows = [Prompt(prompt_id=text, source="tests", prompt=text, answer=None) for text in texts]
    return write_rows(rows, Prompt, step="prompts")


def demonstrations(*texts: str) -> DatasetRef:
    rows = [demonstration(f"d{n}", completion=text, prompt="asked") for n, text in enumerate(texts)]
    return write_rows(rows, Demonstration, step="demonstrations")


def told(trained: DatasetRef, dev: DatasetRef, test: DatasetRef) -> dict[str, tuple[int, int, int, int]]:
    """Of each split: training rows, those that share, held-out prompts, those that are shared."""
    return {
        row.split: (row.training_rows, row.sharing_rows, row.held_out_prompts, row.shared_prompts)
        for row in read_rows(count_overlaps.fn((trained,), (dev,), (test,)), Overlap)
    }


def all_evaluated(asked: DatasetRef) -> DatasetRef:
    """A policy that was asked all of these prompts."""
    rows = [evaluated(row.prompt_id, 1.0) for row in read_rows(asked, Prompt)]
    return write_rows(rows, EvaluatedPrompt, step="evaluated", parents=[asked])


def test_a_run_of_13_words_is_an_overlap_and_one_of_12_is_none() -> None:
    thirteen, twelve = " ".join(LONG.split()[1:14]), " ".join(LONG.split()[1:13])
    trained = demonstrations(f"He said: {thirteen.upper()}!", f"He said: {twelve} again", "nothing")
    assert told(trained, prompts(LONG), prompts("some other prompt altogether")) == {
        "dev": (3, 1, 1, 1),
        "test": (3, 0, 1, 0),
    }


def test_a_prompt_that_several_rows_share_is_counted_once_and_a_row_of_several_prompts_too() -> None:
    second = LONG.replace("fourteen", "fifteen")  # its first run of 13 words is the other's too
    trained = demonstrations(LONG, LONG)
    assert told(trained, prompts(LONG, second), prompts(LONG)) == {"dev": (2, 2, 2, 2), "test": (2, 2, 1, 1)}


def test_all_texts_that_are_trained_on_are_looked_at() -> None:
    chat = Conversation(
        prompt_id="c", roles=["user", "assistant"], contents=["hello", LONG], source="s", licence="l", line=1
    )
    pair = Pair(
        prompt_id="p",
        iteration=1,
        prompt="asked",
        chosen="yes",
        rejected=LONG,
        chosen_index=0,
        rejected_index=1,
        chosen_reward=1.0,
        rejected_reward=0.0,
        margin=1.0,
        rule="zip",
        swapped=False,
    )
    for trained in (write_rows([chat], Conversation, step="chats"), write_rows([pair], Pair, step="pairs")):
        assert told(trained, prompts(LONG), prompts("x y z"))["dev"] == (1, 1, 1, 1)


def made(step: str, key: str, value: DatasetRef | ModelRef, inputs: dict[str, object]) -> StepRecord:
    """A step that was done, in the store and as a record."""
    result = StepResult(
        step=step, key=key, version="1", key_parts={"inputs": inputs}, value=value.model_dump(), seconds=1.0
    )
    save_result(result)
    return record(step, key=key, digest=value.digest)


def test_what_a_policy_was_trained_on_is_found_by_the_step_that_made_it() -> None:
    policy, chosen, held_out = ModelRef(name="m", digest="e" * 32), demonstrations(LONG), demonstrations("apart")
    inputs = {
        "start": {"name": "b"},
        "demonstrations": [{"rows": chosen.digest}],
        "held_out": [{"rows": held_out.digest}],
    }
    steps = [
        made("select_demonstrations", "a" * 64, chosen, {}),
        made("mix_tasks", "b" * 64, held_out, {}),
        made("train_sft", "c" * 64, policy, inputs),
    ]
    assert trained_on(policy, steps) == [chosen]
    assert trained_on(ModelRef(name="fake:0.4"), steps) == []
    test, dev = prompts(LONG), prompts("some other prompt altogether")
    splits = [all_evaluated(dev), all_evaluated(test)]
    overlaps = measure_overlap(policy, steps, *splits)
    assert overlaps is not None
    assert {row.split: row.shared_prompts for row in read_rows(overlaps, Overlap)} == {"dev": 0, "test": 1}
    assert measure_overlap(ModelRef(name="fake:0.4"), steps, *splits) is None


def test_what_prompts_were_made_from_is_no_held_out_prompt_and_how_they_went_makes_no_difference() -> None:
    policy, trained, query = ModelRef(name="m", digest="e" * 32), demonstrations(LONG), prompts(LONG)
    steps = [
        made("select_demonstrations", "a" * 64, trained, {}),
        made("train_sft", "c" * 64, policy, {"demonstrations": [{"rows": trained.digest}]}),
    ]
    rhyme = Prompt(prompt_id="made", source="tests", prompt="Say it in rhyme.", answer=None)
    asked = write_rows([rhyme], Prompt, step="asked", parents=[query])
    instances = write_rows([instance("made")], Instance, step="instances", parents=[query])

    def measured(value: float) -> DatasetRef | None:
        rows = [evaluated("made", value)]
        went = write_rows(rows, EvaluatedPrompt, step="evaluated", parents=[instances, asked])
        return measure_overlap(policy, steps, went, went)

    right, wrong = measured(1.0), measured(0.0)
    assert right is not None and right == wrong
    told = [(row.split, row.held_out_prompts, row.shared_prompts) for row in read_rows(right, Overlap)]
    assert told == [("dev", 1, 0), ("test", 1, 0)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        pytest.param("Before it: what is 40 and 2? After it.", {"a", "b"}, id="two questions alike"),
        pytest.param("WHAT IS 40, AND 3", {"c"}, id="case and punctuation"),
        pytest.param("Name it", {"d"}, id="a short one, equal"),
        pytest.param("Name it now", set(), id="a short one within more"),
    ],
)
def test_all_questions_in_a_text_are_named(text: str, names: set[str]) -> None:
    asked = [("a", "What is 40 and 2?"), ("b", "what is 40 and 2"), ("c", "What is 40 and 3?"), ("d", "Name it.")]
    assert Questions(asked).all_in(text) == names
