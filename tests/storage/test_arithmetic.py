import random
import re
from collections import Counter
from typing import Literal

import pytest

from storage.arithmetic import MARKER, PLENTY, Arithmetic, Earlier, Step, make_problems, split_of, write_completion

# 12 + 7 = 19, then 19 * 2 = 38
TWO_STEPS = (Step(12, "+", 7), Step(Earlier(0), "*", 2))


def test_equal_settings_make_equal_problems_and_a_larger_number_continues_a_smaller_one() -> None:
    few = list(make_problems(Arithmetic(problems=20, quality="mixed")))
    many = list(make_problems(Arithmetic(problems=50, quality="mixed")))
    assert few == many[:20]
    assert few != list(make_problems(Arithmetic(problems=20, seed=1, quality="mixed")))


def test_quality_changes_completions_and_never_prompts_or_answers() -> None:
    right = list(make_problems(Arithmetic(problems=200)))
    mixed = list(make_problems(Arithmetic(problems=200, quality="mixed")))
    assert [(p.prompt, p.answer) for p in right] == [(p.prompt, p.answer) for p in mixed]
    assert [p.completion for p in right] != [p.completion for p in mixed]


@pytest.mark.parametrize("kind", ["word_problems", "sums"])
def test_every_line_of_a_right_completion_is_true_and_ends_in_the_answer(kind: str) -> None:
    for problem in make_problems(Arithmetic(kind=kind, problems=500)):  # type: ignore[arg-type] # parametrized
        *lines, last = problem.completion.splitlines()
        assert last == f"{MARKER} {problem.answer}"
        for line in lines:
            left, right = line.split(" = ")
            assert re.fullmatch(r"\d+ [-+*] \d+", left)
            assert eval(left) == int(right)
        assert lines[-1].endswith(f" = {problem.answer}")


def test_values_stay_between_0_and_60_and_numbers_in_the_text_up_to_10() -> None:
    for problem in make_problems(Arithmetic(problems=500)):
        assert all(0 <= int(number) <= 60 for number in re.findall(r"-?\d+", problem.completion))
        assert all(int(number) <= 10 for number in re.findall(r"\d+", problem.prompt))


@pytest.mark.flow  # seconds
@pytest.mark.parametrize("split", ["train", "test"])
def test_each_split_has_as_many_word_problems_as_need_no_counting(split: Literal["train", "test"]) -> None:
    made = make_problems(Arithmetic(problems=PLENTY, split=split, seed=5))
    assert len({problem.prompt for problem in made}) == PLENTY


@pytest.mark.parametrize("kind", ["word_problems", "sums"])
def test_prompts_are_distinct_and_splits_share_none(kind: str) -> None:
    prompts = {
        split: [p.prompt for p in make_problems(Arithmetic(kind=kind, problems=1_000, split=split))]  # type: ignore[arg-type] # parametrized
        for split in ("train", "test")
    }
    assert len({*prompts["train"]}) == len({*prompts["test"]}) == 1_000
    assert not {*prompts["train"]} & {*prompts["test"]}


def test_the_split_depends_on_template_and_numbers_only_and_a_fifth_is_test() -> None:
    splits = Counter(split_of("sum", (left, right)) for left in range(100) for right in range(100))
    assert splits["test"] / 10_000 == pytest.approx(0.2, abs=0.02)


def test_wrong_problems_are_the_right_ones_with_a_wrong_answer_behind_the_marker() -> None:
    right = list(make_problems(Arithmetic(problems=300)))
    wrong = list(make_problems(Arithmetic(problems=300, quality="wrong")))
    assert [(p.prompt, p.answer) for p in right] == [(p.prompt, p.answer) for p in wrong]
    for problem in wrong:
        assert MARKER in problem.completion
        assert problem.completion.rpartition(f"{MARKER} ")[2] != problem.answer


def test_a_slip_miscounts_one_value_and_carries_it_through() -> None:
    for seed in range(50):
        first, second, ending = write_completion(TWO_STEPS, "slip", random.Random(seed)).splitlines()
        left, right = (int(line.rpartition(" = ")[2]) for line in (first, second))
        assert second.startswith(f"{left} * 2 = ")
        assert (left != 19) + (right != 2 * left) == 1
        assert ending == f"{MARKER} {right}"
        assert right != 38


def test_a_mistake_is_carried_through_to_a_wrong_answer() -> None:
    rng = random.Random(0)
    completions = {write_completion(TWO_STEPS, "mistake", rng) for _ in range(100)}
    assert "12 - 7 = 5\n5 * 2 = 10\nFINAL ANSWER: 10" in completions  # wrong operation
    assert "12 + 7 = 19\nFINAL ANSWER: 19" in completions  # last step dropped
    assert "12 * 2 = 24\nFINAL ANSWER: 24" in completions  # first step dropped
    assert not any(completion.endswith(" 38") for completion in completions)


@pytest.mark.parametrize(
    ("quality", "expected"),
    [
        ("right", "12 + 7 = 19\n19 * 2 = 38\nFINAL ANSWER: 38"),
        ("bare_answer", "FINAL ANSWER: 38"),
        ("no_marker", "12 + 7 = 19\n19 * 2 = 38\nSo it is 38."),
    ],
)
def test_the_ways_a_completion_is_written(quality: str, expected: str) -> None:
    assert write_completion(TWO_STEPS, quality, random.Random(0)) == expected


def test_a_mixed_corpus_holds_the_shares_it_should() -> None:
    problems = list(make_problems(Arithmetic(problems=3_000, quality="mixed")))
    marked = sum(MARKER in problem.completion for problem in problems) / 3_000
    wrong = sum(problem.completion.split()[-1].rstrip(".") != problem.answer for problem in problems) / 3_000
    assert marked == pytest.approx(0.70, abs=0.03)
    assert wrong == pytest.approx(0.27, abs=0.03)


def test_a_known_share_of_completions_is_wrong_and_the_problems_stay_as_they_are() -> None:
    right = list(make_problems(Arithmetic(problems=1000)))
    spoilt = list(make_problems(Arithmetic(problems=1000, wrong_share=0.3)))
    assert [(p.prompt, p.answer) for p in right] == [(p.prompt, p.answer) for p in spoilt]
    wrong = sum(problem.completion.rpartition(f"{MARKER} ")[2] != problem.answer for problem in spoilt)
    assert 255 <= wrong <= 345  # three standard deviations of 14.5 around 300
    assert list(make_problems(Arithmetic(problems=50, wrong_share=1.0))) != list(make_problems(Arithmetic(problems=50)))


def test_fewer_steps_are_an_easier_problem() -> None:
    for problem in make_problems(Arithmetic(problems=100, max_steps=1)):
        assert len(problem.completion.splitlines()) == 2


def test_more_problems_than_there_are_is_an_error_that_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match=r"9,000 test problems .* only [12],\d{3} distinct ones"):
        list(make_problems(Arithmetic(kind="sums", problems=9_000, split="test")))
