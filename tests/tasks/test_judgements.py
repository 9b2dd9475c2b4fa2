"""What a judge is asked, and how sure it is."""

from math import log

import pytest
from pydantic import ValidationError

from models.specs import PromptTemplate
from tasks.judgements import Judge, as_it_is, confidence, filled_template, judge_prompt, label_faults

MARKER = "FINAL ANSWER:"


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        pytest.param(log(0.6), log(0.2), 0.75, id="0.6 / (0.6 + 0.2)"),
        pytest.param(log(0.03), log(0.01), 0.75, id="little mass, the same ratio"),
        pytest.param(log(0.5), float("-inf"), 1.0, id="the other label is impossible"),
        pytest.param(float("-inf"), log(0.5), 0.0, id="the label is impossible"),
        pytest.param(log(0.004), log(0.005), None, id="0.9 % together, it said neither"),
        pytest.param(float("-inf"), float("-inf"), None, id="both impossible"),
        pytest.param(0.0, -2000.0, 1.0, id="no overflow"),
    ],
)
def test_confidence_is_the_share_of_the_positive_label(
    positive: float, negative: float, expected: float | None
) -> None:
    sure = confidence(Judge(), positive, negative)
    assert sure == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        pytest.param({"positive": "Right", "negative": "Right"}, "begins with", id="one label"),
        pytest.param({"positive": "Yes", "negative": "Yes, no"}, "neither begins the other", id="one begins the other"),
        pytest.param({"positive": " Yes"}, "white space", id="space"),
        pytest.param({"text": "Is it right? $completion"}, "$prompt and $completion", id="no prompt"),
        pytest.param({"text": "$prompt $completion $answer"}, "nothing else", id="another name"),
        pytest.param({"text": "$prompt $completion Verdict: "}, "tokenizer would cut", id="ends in a space"),
        pytest.param({"minimum_label_mass": 1.0}, "less than 1", id="mass out of range"),
        pytest.param({"maximum_undecided": 1.5}, "less than or equal to 1", id="share out of range"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Judge.model_validate(settings)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("label_tokens", "probes", "told"),
    [
        pytest.param("one", [[[-1.0], [-2.0]]], "", id="one token each"),
        pytest.param(
            "one", [[[-1.0], [-2.0, -0.1]]], "'Correct' 1, 'Incorrect' 2", id="two tokens where one is wanted"
        ),
        pytest.param("any", [[[-1.0], [-2.0, -0.1]]], "", id="two tokens are summed"),
        pytest.param("one", [[[-1.0], [-1.0]], [[-3.0], [-3.0]]], "share their first token", id="the same token"),
        pytest.param("any", [[[-1.0], [-1.0, -4.0]], [[-3.0], [-3.0, -1.0]]], "share their first", id="one begins"),
        pytest.param("any", [[[-1.0, -2.0], [-1.0, -4.0]]], "", id="whole labels that differ later are summed"),
        pytest.param("any", [[[-1.0], [-1.0]], [[-3.0], [-2.0]]], "", id="equal on one probe by chance"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_found(
    label_tokens: str, probes: list[list[list[float]]], told: str
) -> None:
    faults = "; ".join(label_faults(Judge.model_validate({"label_tokens": label_tokens}), probes))
    assert (told in faults) if told else not faults


def test_the_judge_sees_the_completion_up_to_its_answer_and_dollars_stay() -> None:
    judge = Judge(text="Q: $prompt\n$completion\nV:")
    asked = judge_prompt(judge, "It costs $5. $prompt?", "5 = 5\nFINAL ANSWER: 5\nQuestion: another", MARKER)
    assert asked == "Q: It costs $5. $prompt?\n5 = 5\nFINAL ANSWER: 5\nV:"


def test_a_filled_template_is_trained_through_a_template_that_adds_nothing() -> None:
    template = PromptTemplate(system="Be careful.", user="Question: $prompt\nSolution:")
    assert filled_template(template, "1 + $1?") == "Question: 1 + $1?\nSolution:"
    assert as_it_is(template) == PromptTemplate(system="Be careful.", user="$prompt")
    with pytest.raises(ValueError, match=r"put \$prompt into template.user"):
        as_it_is(PromptTemplate(system="About $prompt."))
