"""Sources: one shape of row, and every fault named with its place."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from storage.hub import Source, read_source, source_key, source_name

SHARED_DATA = Path(os.environ.get("RATCHET_DATA") or Path(__file__).parents[3] / "shared/data")
GSM8K = {
    "hub": "openai/gsm8k",
    "config": "main",
    "columns": {"prompt": "question", "answer": "answer", "completion": "answer"},
    "answer_after": "####",
}


def source(**fields: object) -> Source:
    return Source.model_validate(fields)


def jsonl(folder: Path, *lines: object, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


@pytest.mark.skipif(not (SHARED_DATA / "gsm8k").is_dir(), reason=f"GSM8K is not at hand: no gsm8k in {SHARED_DATA}")
def test_gsm8k_is_read_from_the_folder_of_data_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_DATA", str(SHARED_DATA))
    rows = list(read_source(source(**GSM8K)))
    assert len(rows) == 7473
    assert len(list(read_source(source(**GSM8K, split="test")))) == 1319
    assert rows[0].prompt.startswith("Natalia sold clips to 48 of her friends")
    assert (rows[0].line, rows[0].answer) == (1, "72")
    assert rows[0].completion is not None
    assert rows[0].completion.splitlines()[0] == "Natalia sold 48/2 = 24 clips in May."
    assert not any("<<" in (row.completion or "") for row in rows)
    assert "<<48/2=24>>" in (next(read_source(source(**GSM8K, strip_annotations=False))).completion or "")


def test_rows_are_cut_then_shuffled_then_limited(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"prompt": f"q{i}"} for i in range(20)))
    lines = [row.line for row in read_source(source(path=path, rows={"start": 5, "stop": 15}))]
    assert lines == list(range(6, 16))
    shuffled = [row.line for row in read_source(source(path=path, rows={"start": 5, "stop": 15}, shuffle_seed=1))]
    assert sorted(shuffled) == lines != shuffled
    first = read_source(source(path=path, rows={"start": 5, "stop": 15}, shuffle_seed=1, limit=3))
    assert [row.line for row in first] == shuffled[:3]


def test_parquet_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    records = [{"prompt": "q", "gold": "1"}, {"prompt": "r", "gold": "2"}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    columns = {"answer": "gold"}
    from_jsonl = list(read_source(source(path=jsonl(tmp_path, *records), columns=columns)))
    assert from_jsonl == list(read_source(source(path=str(tmp_path / "rows.parquet"), columns=columns)))
    assert [row.answer for row in from_jsonl] == ["1", "2"]


def test_the_answer_follows_the_last_marker(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "q", "gold": "#### 1\nno, #### 2 \n"})
    assert next(read_source(source(path=path, columns={"answer": "gold"}, answer_after="####"))).answer == "2"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param('{"prompt": ', r"rows.jsonl line 3 is not JSON: .*found b'\{\"prompt\": ", id="not JSON"),
        pytest.param("[1]", "rows.jsonl line 3 is .1., expected an object", id="not an object"),
        pytest.param({"question": "q"}, r"row 3: expected a column 'prompt', found \['question'\]", id="column"),
        pytest.param({"prompt": " \n", "gold": "#### 1"}, "row 3: column 'prompt' is empty", id="empty prompt"),
        pytest.param({"prompt": "q", "gold": 1}, "row 3: column 'gold' is 1, expected text", id="number"),
        pytest.param({"prompt": None, "gold": "#### 1"}, "row 3: column 'prompt' is None, expected text", id="null"),
        pytest.param({"prompt": "q", "gold": "# 1"}, "row 3: expected an answer after '####'", id="no marker"),
        pytest.param({"prompt": "q", "gold": "1 ####"}, "row 3: expected an answer after '####'", id="no answer"),
    ],
)
def test_a_faulty_row_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = jsonl(tmp_path, {"prompt": "q", "gold": "#### 1"}, "", line)
    with pytest.raises(ValueError, match=message):
        list(read_source(source(path=path, columns={"answer": "gold"}, answer_after="####")))


def test_bytes_that_are_not_utf_8_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        list(read_source(source(path=str(tmp_path / "rows.jsonl"))))


def test_a_missing_file_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl is not a file"):
        list(read_source(source(path="nowhere.jsonl")))
    (tmp_path / "rows.csv").touch()
    with pytest.raises(ValueError, match=r"ends with '.csv', expected .jsonl or .parquet"):
        list(read_source(source(path=str(tmp_path / "rows.csv"))))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        list(read_source(source(path=str(tmp_path / "rows.parquet"))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({}, "exactly one of hub, path, arithmetic, formats", id="none"),
        pytest.param({"hub": "a", "path": "b"}, "found .'hub', 'path'.", id="two"),
        pytest.param({"path": "a", "revision": "main"}, "belong to a hub source", id="revision of a file"),
        pytest.param({"path": "a", "answer_after": "####"}, "columns.answer is null", id="marker without column"),
        pytest.param({"path": "a", "rows": {"start": 3, "stop": 3}}, "leaves none", id="no rows"),
        pytest.param({"path": "a", "colums": {}}, "colums", id="misspelt"),
        pytest.param({"arithmetic": {"problems": 1}, "columns": {}}, "do not apply", id="columns of arithmetic"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        source(**fields)


def test_the_first_turn_of_a_chat_is_prompt_and_completion(tmp_path: Path) -> None:
    turns = [
        ("system", "Be kind."),
        ("user", "Hello?"),
        ("assistant", "Hello."),
        ("user", "And?"),
        ("assistant", "No."),
    ]
    chat = [{"role": role, "content": content} for role, content in turns]
    rows = list(read_source(source(path=jsonl(tmp_path, {"messages": chat}), columns={"turns": "messages"})))
    assert [(row.prompt, row.completion) for row in rows] == [("Hello?", "Hello.")]
    upside_down = jsonl(tmp_path, {"messages": chat[2:]}, name="other.jsonl")
    with pytest.raises(ValueError, match=r"row 1: .* found roles \['assistant', 'user'\]; leave the row out"):
        list(read_source(source(path=upside_down, columns={"turns": "messages"})))
    with pytest.raises(ValueError, match="expected a list of messages"):
        list(read_source(source(path=jsonl(tmp_path, {"messages": "Hello?"}), columns={"turns": "messages"})))
    with pytest.raises(ValidationError, match=r"remove columns\.prompt"):
        source(path="a", columns={"turns": "messages", "prompt": "question"})


def test_a_files_key_is_its_content_and_not_its_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    here = source(path=jsonl(tmp_path, {"prompt": "q"}))
    there = source(path=jsonl(tmp_path / "other", {"prompt": "q"}))
    changed = source(path=jsonl(tmp_path / "other", {"prompt": "r"}, name="changed.jsonl"))
    assert source_key(here) == source_key(there) != source_key(changed)
    assert str(tmp_path) not in json.dumps(source_key(here))
    assert source_key(here) != source_key(here.model_copy(update={"limit": 1}))


def test_a_hub_sets_key_is_its_name_and_revision_until_its_content_is_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RATCHET_DATA", raising=False)
    hub = source(hub="someone/sums", config="main", split="test", revision="abc")
    key = source_key(hub)
    assert (key["hub"], key["config"], key["split"], key["revision"]) == ("someone/sums", "main", "test", "abc")
    (tmp_path / "sums").mkdir()
    jsonl(tmp_path / "sums", {"prompt": "q"}, name="test.jsonl")
    monkeypatch.setenv("RATCHET_DATA", str(tmp_path))
    assert "file" in source_key(hub)
    assert [row.prompt for row in read_source(hub)] == ["q"]
    assert source_name(hub) == "someone/sums:main:test"


def test_ifevals_prompts_are_found_under_the_name_their_authors_gave_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ifeval").mkdir()
    jsonl(tmp_path / "ifeval", {"prompt": "No commas."}, name="input_data.jsonl")
    monkeypatch.setenv("RATCHET_DATA", str(tmp_path))
    assert [row.prompt for row in read_source(source(hub="google/IFEval"))] == ["No commas."]


def test_made_up_problems_come_in_the_same_shape() -> None:
    made = source(arithmetic={"problems": 3, "kind": "sums"}, limit=2)
    rows = list(read_source(made))
    assert [row.line for row in rows] == [1, 2]
    assert all(row.prompt and row.answer and row.completion for row in rows)
    assert source_name(made) == "arithmetic:sums:train"
