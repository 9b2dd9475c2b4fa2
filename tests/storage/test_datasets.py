"""Data sets: whole or not there, named by content, never fewer rows than written."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import datasets as hf_datasets
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import datasets
from storage.datasets import (
    DatasetError,
    DatasetRef,
    data_files,
    iter_batches,
    join_rows,
    read_manifest,
    read_rows,
    what_is_wrong,
)
from storage.datasets import write_rows as write
from storage.durable import attempt_name
from storage.home import home
from storage.rows import Prompt, Rollout, Row
from storage.schemas import row_types
from tests.storage.builders import flip_byte, prompts, rollout

LONG = "x" * 100_000
TEXTS = st.text(max_size=8) | st.sampled_from(["", "\x00", "a\x00b", "\U0001d518\U0001f642", LONG, "\r\n\t", "\ufeff"])
VALUES: dict[object, st.SearchStrategy[object]] = {
    str: TEXTS,
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
}
QUICK = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def any_row(row_type: type[Row]) -> st.SearchStrategy[Row]:
    columns = {name: any_value(kind) for name, kind in get_type_hints(row_type).items()}
    return st.builds(row_type, **columns)


def any_value(kind: object) -> st.SearchStrategy[object]:
    if kind is type(None):
        return st.none()
    if get_origin(kind) is list:
        return st.lists(VALUES[get_args(kind)[0]], max_size=3)
    return st.one_of(*map(any_value, get_args(kind))) if get_args(kind) else VALUES[kind]


def stored(rows: list[Prompt]) -> DatasetRef:
    return write(rows, Prompt, step="prompts")


@pytest.mark.parametrize("row_type", row_types().values(), ids=row_types().keys())
def test_each_row_type_survives_a_round_trip(row_type: type[Row]) -> None:
    @QUICK
    @given(st.lists(any_row(row_type), min_size=1, max_size=5))
    def round_trip(rows: list[Row]) -> None:
        ref = write(rows, row_type, step="round-trip")
        assert list(read_rows(ref, row_type)) == rows
        assert ref.rows == len(rows)

    round_trip()


def test_a_reference_survives_json() -> None:
    ref = stored(prompts(3))
    assert DatasetRef.model_validate_json(ref.model_dump_json()) == ref


def test_equal_rows_have_one_digest_whatever_the_batches_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = prompts(50)
    refs = [stored(rows)]
    # A file is full at a whole row group, and a row group at a whole batch: 7 + 7 + 7 rows are the first 20 or more.
    for batch, group, file, files in [(1, 1, 1, 50), (7, 7, 20, 3), (7, 21, 50, 1), (10, 10, 30, 2)]:
        monkeypatch.setattr(datasets, "BATCH_ROWS", batch)
        monkeypatch.setattr(datasets, "GROUP_ROWS", group)
        monkeypatch.setattr(datasets, "FILE_ROWS", file)
        monkeypatch.setenv("RATCHET_HOME", str(home().with_name(f"home-{batch}-{group}-{file}")))
        refs.append(stored(rows))
        assert list(read_rows(refs[-1], Prompt)) == rows
        assert len(data_files(refs[-1])) == files
    assert set(refs) == {refs[0]}


@QUICK
@given(st.lists(any_row(Prompt), min_size=1, max_size=4), st.lists(any_row(Prompt), min_size=1, max_size=4))
def test_other_rows_have_another_digest(rows: list[Prompt], others: list[Prompt]) -> None:
    assert (stored(rows).digest == stored(others).digest) == (rows == others)


def test_the_order_of_rows_and_an_empty_answer_change_the_digest() -> None:
    one, two = (
        Prompt(prompt_id="p", source="", prompt="ab", answer=""),
        Prompt(prompt_id="p", source="", prompt="a", answer="b"),
    )
    none = Prompt(prompt_id="p", source="", prompt="ab", answer=None)
    digests = {stored(rows).digest for rows in ([one, two], [two, one], [none, two], [one], [two])}
    assert len(digests) == 5


def test_where_one_text_ends_and_the_next_begins_changes_the_digest() -> None:
    cut = [
        [Prompt(prompt_id="p", source="", prompt=text, answer="") for text in texts]
        for texts in (("ab", "c"), ("a", "bc"))
    ]
    assert stored(cut[0]).digest != stored(cut[1]).digest


def test_provenance_does_not_change_the_digest_but_is_in_manifest_and_footer() -> None:
    parent = stored(prompts(2))
    ref = write([rollout()], Rollout, step="rollouts", parents=[parent], settings={"k": 3, "stop": ("a",)})
    assert read_manifest(ref).settings == {"k": 3, "stop": ["a"]}
    assert read_manifest(ref).parents == (parent,)
    footer = pq.read_metadata(data_files(ref)[0]).metadata
    assert json.loads(footer[b"ratchet.settings"]) == {"k": 3, "stop": ["a"]}
    assert json.loads(footer[b"ratchet.parents"])[0]["digest"] == parent.digest
    assert write([rollout()], Rollout, step="rollouts") == ref


def test_settings_that_are_not_json_are_refused_before_any_row_is_read() -> None:
    with pytest.raises(ValueError, match="only plain JSON"):
        write(iter(()), Prompt, step="prompts", settings={"where": Path()})


def test_no_rows_are_refused_and_leave_nothing() -> None:
    with pytest.raises(DatasetError, match="step 'prompts' has no rows"):
        stored([])
    assert list((home() / "datasets/prompts").iterdir()) == []


def test_an_interrupted_write_leaves_no_data_set() -> None:
    def rows() -> Iterator[Prompt]:
        yield from prompts(2500)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(rows(), Prompt, step="prompts")
    assert list((home() / "datasets/prompts").iterdir()) == []


def test_what_a_killed_writer_left_is_removed_by_the_next_one_and_the_living_are_spared() -> None:
    folder = home() / "datasets/prompts"
    mine, dead, far = attempt_name(), attempt_name().split("-"), attempt_name().split("-")
    dead[2], far[1:3] = "4194305", ["00000000", "4194305"]  # process ids on Linux end at 4194304
    for name in (mine, "-".join(dead), "-".join(far)):
        (folder / name).mkdir(parents=True)
    ref = stored(prompts(1))
    assert {path.name for path in folder.iterdir()} == {mine, "-".join(far), ref.digest}


def test_a_row_that_does_not_fit_names_the_step_and_the_column() -> None:
    bad = Prompt(prompt_id="p", source="s", prompt="\ud800", answer=None)
    with pytest.raises(DatasetError, match=r"step 'prompts' cannot store .*'prompt'"):
        stored([bad])


def test_reading_as_another_row_type_is_refused_at_once() -> None:
    ref = stored(prompts(1))
    with pytest.raises(DatasetError, match=rf"{ref.name} holds Prompt rows, Rollout rows were expected"):
        read_rows(ref, Rollout)


def test_a_damaged_file_is_found_on_reading_and_by_a_deep_check() -> None:
    ref = stored(prompts(10))
    flip_byte(data_files(ref)[0])
    assert what_is_wrong(ref) is None
    assert "part-00000.parquet is damaged" in (what_is_wrong(ref, deep=True) or "")
    with pytest.raises(DatasetError, match=r"part-00000.parquet is damaged.*run the same command again"):
        list(read_rows(ref, Prompt))
    assert stored(prompts(10)) == ref
    assert what_is_wrong(ref, deep=True) is None


@pytest.mark.parametrize("name", ["manifest.json", "part-00000.parquet"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_file_is_named_and_the_rewrite_repairs_it(name: str, damage: str) -> None:
    ref = stored(prompts(10))
    path = home() / ref.name / name
    whole = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(whole[:-9])
    assert name in (what_is_wrong(ref) or "")
    for read in (lambda: list(read_rows(ref, Prompt)), lambda: list(iter_batches(ref)), lambda: data_files(ref)):
        with pytest.raises(DatasetError, match=rf"{name}.*run the same command again"):
            read()
    assert stored(prompts(10)) == ref
    assert what_is_wrong(ref, deep=True) is None
    assert [path.name for path in (home() / "datasets/prompts").iterdir()] == [ref.digest]


def test_a_manifest_that_promises_other_rows_is_not_believed() -> None:
    ref = stored(prompts(10))
    manifest = home() / ref.name / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"rows": 10', '"rows": 11'))
    assert "describes" in (what_is_wrong(ref) or "")
    more = ref.model_copy(update={"rows": 11})
    with pytest.raises(DatasetError, match="holds 10 rows, its manifest says 11"):
        list(read_rows(more, Prompt))


def test_columns_can_be_read_alone() -> None:
    ref = stored(prompts(2500))
    batches = list(iter_batches(ref, ["prompt_id"]))
    assert [name for batch in batches for name in batch.schema.names] == ["prompt_id"] * len(batches)
    assert sum(batch.num_rows for batch in batches) == 2500


def test_stored_files_name_no_absolute_path_and_the_home_can_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = stored(prompts(4))
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in (home() / ref.name).iterdir())
    monkeypatch.setenv("RATCHET_HOME", str(home().rename(tmp_path / "moved")))
    assert list(read_rows(ref, Prompt)) == prompts(4)


@pytest.mark.parametrize("step", ["../up", "", ".hidden", "a/b"])
def test_a_step_name_cannot_leave_its_folder(step: str) -> None:
    with pytest.raises(ValueError, match="a step's name"):
        write(prompts(1), Prompt, step=step)


def test_the_datasets_library_reads_the_files(tmp_path: Path) -> None:
    ref = stored(prompts(3))
    files = [str(path) for path in data_files(ref)]
    loaded = hf_datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["answer"][:] == [None, "1", "2"]


@pytest.mark.parametrize(
    "part", [range(0, 25), range(0, 10), range(15, 17), range(3, 16), range(16, 24), range(24, 25)]
)
def test_a_part_is_read_from_the_files_that_hold_it(monkeypatch: pytest.MonkeyPatch, part: range) -> None:
    monkeypatch.setattr(datasets, "FILE_ROWS", 10)
    monkeypatch.setattr(datasets, "GROUP_ROWS", 5)
    monkeypatch.setattr(datasets, "BATCH_ROWS", 4)
    rows = prompts(25)
    ref = stored(rows)
    numbers = (range(0, 16), range(16, 25))  # groups of two batches, and a file ends with the group that fills it
    assert [file.rows for file in read_manifest(ref).files] == [16, 9]
    for file, held in zip(data_files(ref), numbers, strict=True):
        if not set(part) & set(held):
            file.unlink()
    assert list(read_rows(ref, Prompt, part)) == rows[part.start : part.stop]


def test_joined_parts_are_the_data_set_that_was_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = prompts(25)
    whole = stored(rows)
    parts = [write(rows[start:stop], Prompt, step="prompts_part") for start, stop in ((0, 7), (7, 8), (8, 25))]
    assert join_rows(parts, Prompt, step="prompts") == whole
    assert list(read_rows(whole, Prompt)) == rows
    flip_byte(data_files(parts[1])[0])
    with pytest.raises(DatasetError, match="is damaged: its sha256 is not the one in its manifest"):
        join_rows(parts, Prompt, step="prompts")
