"""What is read off a supervisor's replies: Python that defines evaluate, and JSON lines; anything else by reason."""

from collections import Counter

import pytest

from storage.rows import Verifier, VerifierCase
from tasks.instructions import Read
from tasks.verifiers import (
    WritingCases,
    WritingVerifiers,
    ask_about,
    cases_of,
    read_cases,
    read_verifier,
    verifiers_of,
)
from tests.tasks.builders import instruction, rollout

CODE = "def evaluate(response):\n    return 'a' in response"
GOOD = f"```python\n{CODE}\n```"


def verifiers(*replies: str) -> tuple[list[Verifier], Counter[str], Counter[str], list[str]]:
    read, counts = Read(len(replies), Counter(), []), Counter[str]()
    rows = [rollout(n, text) for n, text in enumerate(replies)]
    return list(verifiers_of(rows, {"p": instruction()}, read, counts)), read.reasons, +counts, read.offending


def cases(*replies: str) -> tuple[list[VerifierCase], Counter[str], Counter[str]]:
    read, counts = Read(len(replies), Counter(), []), Counter[str]()
    rows = [rollout(n, text) for n, text in enumerate(replies)]
    return list(cases_of(rows, {"p": instruction()}, read, counts)), read.reasons, +counts


def test_the_verifiers_conversation_and_the_cases_conversation_know_nothing_of_each_other() -> None:
    about = instruction("End with Bye.")
    asked = [ask_about(about, settings).prompt for settings in (WritingVerifiers(), WritingCases())]
    assert all("End with Bye." in text and "query q" in text for text in asked)
    assert "evaluate" not in asked[1] and '"result"' not in asked[0]


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(GOOD, id="a fence"),
        pytest.param(f"Here it is.\n{GOOD}\nIt looks for an a.", id="text around it"),
        pytest.param(f"```\n{CODE}\n```", id="no language"),
        pytest.param(f"```py\n{CODE}", id="the stop string took the closing fence"),
        pytest.param(f"```js\nfunction evaluate() {{}}\n```\n{GOOD}", id="another language first"),
        pytest.param(f"```python\nprint(1)\n```\n{GOOD}", id="the second block"),
    ],
)
def test_the_first_block_that_defines_evaluate_is_the_verifier(reply: str) -> None:
    assert read_verifier(rollout(0, reply)) == (CODE, "read")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        pytest.param("I would look for the letter a.", "prose", id="prose"),
        pytest.param(CODE, "no code fence", id="no code fence"),
        pytest.param("```javascript\nfunction evaluate(r) {}\n```", "code in another language", id="another language"),
        pytest.param("```python\nfunction evaluate(r) { return true; }\n```", "not Python", id="mislabelled"),
        pytest.param("```python\ndef check(response):\n    return True\n```", "no evaluate", id="another name"),
        pytest.param("```python\nclass A:\n    def evaluate(self): ...\n```", "no evaluate", id="a method"),
        pytest.param(f"```python\n{'x = 1' * 5000}\n```", "too long", id="too long"),
        pytest.param(f"```python\nx = {'(' * 3000}\n```", "not Python", id="nested too deeply"),
        pytest.param("", "prose", id="empty"),
    ],
)
def test_a_reply_without_a_verifier_says_why(reply: str, reason: str) -> None:
    assert read_verifier(rollout(0, reply)) == (None, reason)


def test_a_cut_reply_holds_no_verifier() -> None:
    assert read_verifier(rollout(0, GOOD, finish_reason="length")).reason == "truncated"


def test_verifiers_that_differ_in_layout_and_comments_only_are_one() -> None:
    other = "```python\ndef evaluate(response):\n    # look for it\n\n    return ('a' in response)\n```"
    rows, reasons, counts, offending = verifiers(GOOD, other, GOOD, "No.", GOOD.replace("'a'", "'b'"))
    assert [row.source for row in rows] == [CODE, CODE.replace("'a'", "'b'")]
    assert reasons == {"read": 4, "prose": 1}
    assert counts == {"verifiers": 2, "duplicate": 2}
    assert offending == ["prose: 'No.'"]


@pytest.mark.parametrize(
    ("reply", "expected", "reasons"),
    [
        pytest.param('{"response": "a", "result": true}', [("a", True)], {"read": 1}, id="one"),
        pytest.param(
            '```json\n{"response": "a\\nb", "result": false},\n{"response": "c", "result": true}\n```',
            [("a\nb", False), ("c", True)],
            {"read": 2},
            id="in a fence, with commas",
        ),
        pytest.param('{"response": "a", "result": "true"}', [], {"result is no boolean": 1}, id="a string"),
        pytest.param('{"response": "a", "result": 1}', [], {"result is no boolean": 1}, id="a number"),
        pytest.param('{"response": 3, "result": true}', [], {"no response text": 1}, id="no text"),
        pytest.param('{"response": "a, "result": true}', [], {"broken JSON": 1}, id="broken"),
        pytest.param('{"response": "\\ud800", "result": true}', [], {"no response text": 1}, id="half a surrogate"),
        pytest.param("One follows, one does not.", [], {"prose": 1}, id="prose"),
        pytest.param(" ", [], {"empty": 1}, id="empty"),
    ],
)
def test_a_case_is_a_json_line_with_a_text_and_a_boolean(
    reply: str, expected: list[tuple[str, bool]], reasons: dict[str, int]
) -> None:
    assert read_cases(rollout(0, reply)) == (expected, reasons)


def test_of_a_cut_reply_the_whole_lines_count() -> None:
    reply = rollout(0, '{"response": "a", "result": true}\n{"response": "b", "res', finish_reason="length")
    assert read_cases(reply) == ([("a", True)], {"read": 1, "truncated": 1})


def test_a_response_expected_both_to_pass_and_to_fail_is_no_case() -> None:
    rows, reasons, counts = cases(
        '{"response": "a", "result": true}\n{"response": "b", "result": true}',
        '{"response": "a ", "result": false}',
        '{"response": "b", "result": true}\n{"response": "c", "result": nope}',
        "Well.",
    )
    assert [(row.response, row.expected) for row in rows] == [("b", True)]
    assert reasons == {"read": 3, "prose": 1}
    assert counts == {"cases": 1, "duplicate": 1, "expected both ways": 1, "line: broken JSON": 1}
