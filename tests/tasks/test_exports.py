"""What other tools read, record by record, as their documentation has it (sources in tasks/exports.py)."""

import json
from pathlib import Path
from typing import Any

import pytest

from storage.rows import ChatPair, Conversation, Demonstration, Pair, Prompt, Rollout, Row
from tasks.exports import FORMATS, check_format, extra_files, how_to_use, record

GOLDEN = json.loads((Path(__file__).parent / "export_formats.json").read_text())
ORIGIN: dict[str, Any] = {"prompt_id": "p", "source": "set", "licence": "mit", "line": 1}
ROWS: dict[str, Row] = {
    "conversation": Conversation(
        roles=["system", "user", "assistant", "user", "assistant"],
        contents=["Be kind.", "Hi?", "Yes.", "And?", "No."],
        **ORIGIN,
    ),
    "demonstration": Demonstration(
        task="solve", prompt_id="p", rollout_index=0, iteration=1, prompt="2 + 2?", completion="4", reward=1.0,
        source="x",
    ),
    "chat pair": ChatPair(roles=["user"], contents=["Hi?"], chosen="Yes.", rejected="No.", **ORIGIN),
    "pair": Pair(
        prompt_id="p", iteration=1, prompt="2 + 2?", chosen="4", rejected="5", chosen_index=0, rejected_index=1,
        chosen_reward=1.0, rejected_reward=0.0, margin=1.0, rule="zip", swapped=False,
    ),
    "prompt": Prompt(prompt_id="p", source="set", prompt="2 + 2?", answer="4"),
}  # fmt: skip


@pytest.mark.parametrize(("format_", "kind"), [(f, k) for f in GOLDEN["records"] for k in GOLDEN["records"][f]])
def test_a_record_is_what_the_tool_reads(format_: str, kind: str) -> None:
    row = ROWS[kind]
    check_format(type(row), FORMATS[format_])
    assert record(row, FORMATS[format_], 3) == GOLDEN["records"][format_][kind]


@pytest.mark.parametrize(("format_", "kind"), [(f, k) for f in GOLDEN["files"] for k in GOLDEN["files"][f]])
def test_files_beside_the_data_are_what_the_tool_reads(format_: str, kind: str) -> None:
    assert extra_files(type(ROWS[kind]), FORMATS[format_], "mine") == GOLDEN["files"][format_][kind]


def test_every_format_says_how_it_is_read() -> None:
    for format_ in FORMATS.values():
        for row in ROWS.values():
            assert how_to_use(type(row), format_, "mine")


def test_json_lines_hold_a_row_as_it_is() -> None:
    assert record(ROWS["prompt"], "jsonl", 0) == {"prompt_id": "p", "source": "set", "prompt": "2 + 2?", "answer": "4"}


def test_what_a_format_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="Rollout rows are nothing that trl trains on"):
        check_format(Rollout, "trl")
    with pytest.raises(ValueError, match="axolotl has no format for prompts"):
        check_format(Prompt, "axolotl")
    check_format(Rollout, "jsonl")
    turns = ChatPair(roles=["system", "user"], contents=["a", "b"], chosen="c", rejected="d", **ORIGIN)
    with pytest.raises(ValueError, match="row 7 has a prompt of 2 messages, and verl reads pairs as plain text"):
        record(turns, "verl", 7)


@pytest.mark.vllm  # TRL itself
@pytest.mark.parametrize("kind", sorted(ROWS))
def test_trl_takes_its_records_for_conversations(kind: str) -> None:
    from trl.data_utils import is_conversational

    assert is_conversational(record(ROWS[kind], "trl", 0))
    assert isinstance(ROWS["pair"], Pair)
