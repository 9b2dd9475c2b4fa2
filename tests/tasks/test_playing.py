"""Rollouts against demonstrations: one cap for both sides, the same renderer, and what is imitated instead."""

from pathlib import Path

import pytest

from models.specs import ModelRef, PromptTemplate
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import Comparison, Demonstration, Pair, PairFigure, Rollout
from tasks.comparisons import Labelling
from tasks.playing import describe_pairs, imitate_chosen, pair_with_gold, token_counter
from tests.models.tiny_fixture import save_tiny_model
from tests.tasks.builders import demonstration, rollout

POLICY, TEMPLATE = ModelRef(name="fake:0.4"), PromptTemplate()


def paired(rollouts: list[Rollout], demonstrations: list[Demonstration], cap: int = 5) -> DatasetRef:
    sampled = write_rows(rollouts, Rollout, step="rollouts")
    gold = write_rows(demonstrations, Demonstration, step="corpus")
    return pair_with_gold(sampled, gold, POLICY, TEMPLATE, cap, 3)


def test_both_sides_obey_one_cap() -> None:
    rollouts = [
        rollout(0, prompt_id="a"),
        rollout(0, prompt_id="b"),
        rollout(0, prompt_id="c", finish_reason="length"),
        rollout(0, prompt_id="d"),
    ]
    gold = [
        demonstration("a", "one two three four five"),
        demonstration("b", "one two three four five six"),  # over the cap of five words
        demonstration("c", "one"),
        demonstration("d", "mine"),  # the rollout's own text
    ]
    (pair,) = read_rows(paired(rollouts, gold), Pair)
    assert (pair.prompt_id, pair.chosen, pair.rejected) == ("a", "one two three four five", "mine")
    assert (pair.iteration, pair.rule, pair.swapped) == (3, "gold", False)


def test_lengths_of_both_sides_and_what_the_judge_made_of_them_are_told() -> None:
    ref = paired([rollout(0, "one two three")], [demonstration(completion="one")])
    figures = {
        (row.about, row.name): row.value
        for row in read_rows(describe_pairs(ref, POLICY, TEMPLATE, None, None, None), PairFigure)
    }
    assert figures["chosen", "tokens, mean"] == 1
    assert figures["rejected", "tokens, longest"] == 3
    assert {about for about, _ in figures} == {"chosen", "rejected"}
    told = Comparison(
        prompt_id="p",
        rejected_index=0,
        chosen_reward=0.52,
        rejected_reward=0.5,
        margin=0.02,
        reason="judged",
        judge="fake:judge",
    )
    compared = write_rows([told], Comparison, step="compared")
    figures = {
        (row.about, row.name): row.value
        for row in read_rows(describe_pairs(ref, POLICY, TEMPLATE, compared, Labelling(), 0.1), PairFigure)
    }
    assert figures["judged", "small margin"] == 1
    assert figures["pairs", "noised"] == 0  # these pairs carry no margin yet


def test_what_is_imitated_is_the_chosen_side() -> None:
    ref = paired([rollout(0, "mine")], [demonstration(completion="human")])
    (row,) = read_rows(imitate_chosen(ref, 3), Demonstration)
    assert (row.prompt, row.completion, row.iteration, row.task) == ("prompt p", "human", 3, "solve")


@pytest.mark.vllm
def test_tokens_are_counted_as_they_are_trained_on_with_the_end_of_the_turn(tmp_path: Path) -> None:
    from models.chat import load_tokenizer

    folder = save_tiny_model(tmp_path / "model", seed=0)
    count = token_counter(ModelRef(name=str(folder), path=str(folder), digest="d" * 32), TEMPLATE)
    alone = load_tokenizer(str(folder), None, False)("FINAL ANSWER: 7", add_special_tokens=False)["input_ids"]
    assert count("How many?", "FINAL ANSWER: 7") == len(alone) + 1
