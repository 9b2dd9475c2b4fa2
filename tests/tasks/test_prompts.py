"""Templates with worked examples, identity of prompts, and overlap."""

from string import Template

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.specs import PromptTemplate
from tasks.prompts import FewShot, draw_examples, few_shot_template, ngrams, overlap, prompt_id, without_annotations
from tests.tasks.builders import demonstration

ASK = PromptTemplate(system="Be brief.", user="Solve the problem.\n\nQuestion: $prompt\nSolution:")


def test_examples_stand_between_the_instruction_and_the_prompt() -> None:
    examples = [demonstration("a", "3 + 4 = <<3+4=7>>7\nFINAL ANSWER: 7 \n", prompt="3 + 4?")]
    template = few_shot_template(ASK, examples, FewShot(examples=1, instruction="You do sums."))
    assert template.user == (
        "You do sums.\n\nSolve the problem.\n\n"
        "Question: 3 + 4?\nSolution:\n3 + 4 = 7\nFINAL ANSWER: 7\n\n"
        "Question: $prompt\nSolution:"
    )
    assert template.system == "Be brief."


def test_plain_template_gives_prompt_and_completion_in_turn() -> None:
    assert (
        few_shot_template(PromptTemplate(), [demonstration("a", "7", prompt="3 + 4?")], FewShot()).user
        == "3 + 4?\n7\n\n$prompt"
    )


@given(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1))
def test_dollars_come_through_as_they_are(asked: str, told: str, prompt: str) -> None:
    example = demonstration("a", f"$$5 ${told}", prompt=f"${asked} $prompt ${{x}}")
    template = few_shot_template(PromptTemplate(user="Q: ${prompt}\nIn $$:\n"), [example], FewShot())
    filled = Template(template.user).substitute(prompt=prompt)
    expected = (
        f"Q: {example.prompt.strip()}\nIn $:\n{without_annotations(example.completion).strip()}\n\nQ: {prompt}\nIn $:\n"
    )
    assert filled == expected


@pytest.mark.parametrize(
    ("user", "message"),
    [
        pytest.param("Q: $prompt\nA: ", r"ends in ' '", id="trailing space"),
        pytest.param("Q: $prompt $topic", r"holds \$topic", id="another name"),
        pytest.param("Q: $$prompt", r"no \$prompt", id="escaped prompt"),
    ],
)
def test_template_that_cannot_be_filled_is_refused(user: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        few_shot_template(PromptTemplate(user=user), [demonstration()], FewShot())


def test_examples_are_drawn_alike_from_any_order_and_one_a_prompt() -> None:
    rows = [demonstration(prompt, text) for prompt in "abcdefgh" for text in ("one", "two")]
    drawn = draw_examples(rows, FewShot(examples=5, seed=1))
    assert drawn == draw_examples(rows[::-1], FewShot(examples=5, seed=1))
    assert len({row.prompt_id for row in drawn}) == 5
    assert drawn != draw_examples(rows, FewShot(examples=5, seed=2))


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"few_shot.examples is 5 but the demonstrations are of 1 prompts"):
        draw_examples([demonstration()], FewShot())


def test_prompt_id_sees_source_and_words_but_no_white_space() -> None:
    assert prompt_id("gsm8k", "How  many\n apples? ") == prompt_id("gsm8k", "How many apples?")
    assert prompt_id("gsm8k", "caf\u00e9") == prompt_id("gsm8k", "cafe\u0301")
    assert len({prompt_id("a", "x"), prompt_id("b", "x"), prompt_id("a", "X"), prompt_id("a", "x x")}) == 4
    assert len(prompt_id("gsm8k", "x")) == 24


def test_ngrams_run_over_case_and_punctuation() -> None:
    assert ngrams("One two, THREE four!", 3) == {"one two three", "two three four"}
    assert ngrams("One two.", 3) == {"one two"}
    assert ngrams(" ... ", 3) == set()


def test_overlap_names_the_held_out_texts_that_were_seen() -> None:
    words = [f"w{n}" for n in range(40)]
    held_out = {
        "seen": " ".join(words[5:20]),
        "twelve shared": " ".join([*words[:12], "other"]),
        "new": "quite another text",
    }
    # 15 words of "seen" stand in the training text in a row; of "twelve shared" one too few
    assert overlap([" ".join(words), "unrelated"], held_out) == ["seen"]
    assert overlap([" ".join(words)], held_out, n=12) == ["seen", "twelve shared"]
