"""Sources become prompts and demonstrations, or a message that names the row at fault."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from models.specs import ModelRef
from storage.arithmetic import Arithmetic
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.hub import Columns, RowRange, Source
from storage.rows import Demonstration, Prompt
from tasks.loading import demonstrations_of, draw_prompts, load_demonstrations, load_prompts, open_folder, prompts_of
from tests.storage.builders import prompts

SUMS = Source(arithmetic=Arithmetic(kind="sums", problems=6))


def jsonl(folder: Path, *rows: Mapping[str, object]) -> Source:
    """A source of these rows, with prompt, answer and completion in columns of these names."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(file), columns=Columns(answer="answer"))


def ids(ref: DatasetRef) -> list[str]:
    return [row.prompt_id for row in read_rows(ref, Prompt)]


def test_prompts_are_loaded_once_each_under_their_source() -> None:
    rows = list(read_rows(load_prompts(SUMS, without=()), Prompt))
    assert len({row.prompt_id for row in rows}) == 6
    assert {row.source for row in rows} == {"arithmetic:sums:train"}
    assert all(row.answer is not None for row in rows)


def test_few_shot_examples_are_left_out() -> None:
    every = ids(load_prompts(SUMS, without=()))
    assert ids(load_prompts(SUMS, without=(every[1], every[4]))) == [every[0], every[2], every[3], every[5]]


def test_rows_are_taken_from_start_to_before_stop() -> None:
    every = ids(load_prompts(SUMS, without=()))
    assert ids(load_prompts(SUMS.model_copy(update={"rows": RowRange(start=2, stop=4)}), without=())) == every[2:4]


def test_another_file_with_the_same_content_is_the_same_step(tmp_path: Path) -> None:
    rows = [{"prompt": "1 + 1?", "answer": "2"}]
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    first = load_prompts(jsonl(tmp_path / "here", *rows), without=())
    assert load_prompts.lookup(jsonl(tmp_path / "there", *rows), without=()).found is not None
    assert load_prompts(jsonl(tmp_path / "there", *rows), without=()) == first
    assert load_prompts.lookup(jsonl(tmp_path / "there", *rows, *rows), without=()).found is None


def test_an_unreadable_gold_answer_is_named_with_its_row(tmp_path: Path) -> None:
    source = jsonl(tmp_path, {"prompt": "1 + 1?", "answer": "2"}, {"prompt": "1 + 2?", "answer": "a few"})
    with pytest.raises(ValueError, match=r"the gold answer of row 2 is 'a few', a number was expected"):
        list(prompts_of(source))


def test_a_prompt_that_stands_there_twice_is_named_with_both_rows(tmp_path: Path) -> None:
    rows = [{"prompt": text, "answer": "2"} for text in ("1 + 1?", "2 + 0?", "1 + 1?")]
    with pytest.raises(ValueError, match=r"rows 1 and 3 hold the same prompt .* remove one: '1 \+ 1\?'"):
        list(prompts_of(jsonl(tmp_path, *rows)))


def test_an_empty_prompt_is_named_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 1: column 'prompt' is empty, expected a prompt"):
        list(prompts_of(jsonl(tmp_path, {"prompt": "  ", "answer": "2"})))


def test_a_demonstration_ends_with_our_marker_in_place_of_theirs(tmp_path: Path) -> None:
    source = jsonl(tmp_path, {"prompt": "3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"})
    source = source.model_copy(
        update={"columns": Columns(answer="answer", completion="answer"), "answer_after": "####"}
    )
    (row,) = demonstrations_of(source, "FINAL ANSWER:")
    assert row.completion == "3 + 4 = 7\nFINAL ANSWER: 7"
    assert (row.rollout_index, row.iteration, row.reward) == (None, 0, None)


def test_a_demonstration_without_a_completion_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1 has no completion; name its column in columns\.completion"):
        list(demonstrations_of(jsonl(tmp_path, {"prompt": "3 + 4?", "answer": "7"}), "FINAL ANSWER:"))


def test_a_corpus_has_a_completion_for_each_prompt() -> None:
    rows = list(read_rows(load_demonstrations(SUMS, "FINAL ANSWER:"), Demonstration))
    assert len(rows) == 6
    assert all("FINAL ANSWER:" in row.completion for row in rows)


def test_iterations_draw_one_prompt_after_the_other_and_then_start_again() -> None:
    every = write_rows(prompts(5), Prompt, step="prompts")
    first, second, third = (ids(draw_prompts(every, 2, iteration, 0)) for iteration in (1, 2, 3))
    assert len({*first, *second}) == 4
    (left,) = {"p0", "p1", "p2", "p3", "p4"} - {*first, *second}
    assert third == [left, first[0]]


def test_no_prompt_is_drawn_twice_in_one_iteration() -> None:
    every = write_rows(prompts(5), Prompt, step="prompts")
    assert sorted(ids(draw_prompts(every, 99, 3, 0))) == ["p0", "p1", "p2", "p3", "p4"]


def test_another_seed_draws_others() -> None:
    every = write_rows(prompts(50), Prompt, step="prompts")
    assert ids(draw_prompts(every, 10, 1, 0)) != ids(draw_prompts(every, 10, 1, 1))


def test_a_model_folder_is_named_by_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "fake.json").write_text('{"skill": 0.5}')
    shutil.copytree(folder, tmp_path / "copy")
    here, there = open_folder(ModelRef(name=str(folder))), open_folder(ModelRef(name=str(tmp_path / "copy")))
    assert here.digest == there.digest
    assert here.key() == there.key()
    assert here.path != there.path
    assert open_folder(ModelRef(name="microsoft/phi-2")) == ModelRef(name="microsoft/phi-2")
