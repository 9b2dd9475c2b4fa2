"""Steps around the supervisor: queries from a source, and instructions screened against an evaluation's prompts."""

import json
from collections import Counter
from pathlib import Path

import pytest

from models.engine import EngineConfigurationError
from models.specs import Fake, ModelRef, Scripted
from storage.datasets import read_rows, write_rows
from storage.hub import Columns, Source
from storage.rows import Instruction, Prompt, Rollout
from tasks.instructions import Length, Proposing
from tasks.screening import Screening
from tasks.supervising import (
    Supervisor,
    SupervisorError,
    ask_for_instructions,
    load_queries,
    open_supervisor,
    queries_of,
    read_instructions,
)
from tests.tasks.builders import rollout

TURNS = ("\n\nHuman: ", "\n\nAssistant:")


def dialogues(folder: Path, *texts: str) -> Source:
    file = folder / "dialogues.jsonl"
    file.write_text("".join(json.dumps({"chosen": text}) + "\n" for text in texts))
    return Source(path=str(file), columns=Columns(prompt="chosen"))


def queries(folder: Path, *texts: str, between: tuple[str, str] | None = None) -> tuple[list[str], Counter[str]]:
    counts: Counter[str] = Counter()
    found = [row.prompt for row in queries_of(dialogues(folder, *texts), Length(), between, counts)]
    return found, +counts


def test_the_query_of_a_dialogue_is_its_first_human_turn(tmp_path: Path) -> None:
    found, counts = queries(
        tmp_path,
        "\n\nHuman: What is a fjord?\n\nAssistant: A bay.\n\nHuman: Where is one?\n\nAssistant: Here.",
        "\n\nAssistant: I speak first.",
        "\n\nHuman: Hi\n\nAssistant: Hello.",
        between=TURNS,
    )
    assert found == ["What is a fjord?"]
    assert counts == {"read": 3, "queries": 1, "empty": 1, "too short": 1}


def test_without_marks_the_whole_text_is_the_query(tmp_path: Path) -> None:
    assert queries(tmp_path, "What is a fjord?")[0] == ["What is a fjord?"]


def test_a_source_without_a_query_to_use_says_what_its_rows_were(tmp_path: Path) -> None:
    with pytest.raises(SupervisorError, match=r"dialogues\.jsonl holds no query to use \(read 1, too short 1\)"):
        load_queries(dialogues(tmp_path, "Hm"), Length(), None)


def test_instructions_that_share_thirteen_words_with_the_evaluation_are_marked_or_dropped(tmp_path: Path) -> None:
    theirs = "Write a poem about the sea in which no line is longer than seven words and none rhymes"
    evaluation = write_rows(
        [Prompt(prompt_id="e", source="google/IFEval", prompt=theirs, answer=None)], Prompt, step="prompts"
    )
    asked_about = load_queries(dialogues(tmp_path, "What is a fjord?", "What is a delta?"), Length(), None)
    settings = Proposing(screening=Screening(types=False))
    asked = list(read_rows(ask_for_instructions(asked_about, settings), Prompt))
    said = ["A poem about the sea in which no line is longer than seven words", "Say it in nine lines."]
    replies = write_rows(
        [rollout(0, text, prompt_id=row.prompt_id) for row, text in zip(asked, said, strict=True)],
        Rollout,
        step="rollouts",
    )
    marked = list(read_rows(read_instructions(replies, asked_about, settings, evaluation), Instruction))
    assert [row.evaluation_types for row in marked] == [["13 words of google/IFEval"], []]
    assert [row.query for row in marked] == ["What is a fjord?", "What is a delta?"]
    dropping = settings.model_copy(update={"screening": Screening(types=False, action="drop")})
    (left,) = read_rows(read_instructions(replies, asked_about, dropping, evaluation), Instruction)
    assert left.instruction == "Say it in nine lines."


def test_a_script_is_known_by_its_content_and_the_policy_supervises_itself_where_none_is_named(tmp_path: Path) -> None:
    script = tmp_path / "script.yaml"
    script.write_text("rules: [{when: [a], replies: [b]}]")
    named = Supervisor(model=ModelRef(name=str(script)), engine=Scripted())
    first = open_supervisor(named, ModelRef(name="fake:0.4"), Fake()).model
    script.write_text("rules: [{when: [a], replies: [c]}]")
    second = open_supervisor(named, ModelRef(name="fake:0.4"), Fake()).model
    assert first.key() != second.key()
    assert str(tmp_path) not in json.dumps(first.key())
    own = open_supervisor(None, ModelRef(name="fake:0.4"), Fake())
    assert (own.model.name, own.engine) == ("fake:0.4", Fake())


def test_a_scripted_engine_cannot_score(tmp_path: Path) -> None:
    from models.engine import open_engine

    script = tmp_path / "script.yaml"
    script.write_text("rules: [{when: [a], replies: [b]}]")
    with open_engine(Scripted(), ModelRef(name=str(script))) as engine, pytest.raises(EngineConfigurationError):
        engine.score([{"role": "user", "content": "a"}], ["b"])
