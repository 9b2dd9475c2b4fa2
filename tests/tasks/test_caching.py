"""@step: what is reused, what is done again, and that it says why."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest

from models.specs import ModelRef, Sampling, Settings
from storage.checkpoints import commit_checkpoint
from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import Prompt
from tasks import caching
from tasks.caching import Step, current_key, key_part, log_counts, step
from tasks.planning import planning
from tests.flows.builders import heard, tree
from tests.storage.builders import flip_byte, prompts


class Wording(Settings):
    """Settings of the step under test."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"threads"})

    ending: str = "!"
    threads: int = 1


Reword = Step[[DatasetRef, Wording], DatasetRef]


class Counted(NamedTuple):
    """A step, and a list that grows with each call of its body."""

    step: Reword
    calls: list[str]


@pytest.fixture(autouse=True)
def no_other_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "STEPS", {})


def reword_step(version: str = "1") -> Counted:
    """A fresh step named `reword`, as another process or a later version of the code would define it."""
    caching.STEPS.pop("reword", None)
    calls: list[str] = []

    @step(version=version)
    def reword(source: DatasetRef, wording: Wording) -> DatasetRef:
        calls.append(current_key())
        rows = [
            Prompt(prompt_id=row.prompt_id, source="reworded", prompt=row.prompt + wording.ending, answer=row.answer)
            for row in read_rows(source, Prompt)
        ]
        log_counts({"reworded": len(rows)})
        return write_rows(rows, Prompt, step="reworded", parents=[source])

    return Counted(reword, calls)


def source(name: str = "prompts", count: int = 3) -> DatasetRef:
    return write_rows(prompts(count), Prompt, step=name)


def test_a_second_call_returns_the_stored_result_without_running() -> None:
    reword, calls = reword_step()
    first = reword(source(), Wording())
    with heard() as records:
        assert reword(source(), Wording()) == first
    assert len(calls) == 1
    assert [(r.step, r.cached, r.rows, r.digest) for r in records] == [("reword", True, 3, first.digest)]


def test_a_hit_tells_the_counts_of_the_first_time() -> None:
    reword, _ = reword_step()
    with heard() as records:
        reword(source(), Wording())
        reword(source(), Wording())
    assert [(record.cached, record.counts) for record in records] == [(False, {"reworded": 3}), (True, {"reworded": 3})]


def test_another_process_finds_the_result() -> None:
    first = reword_step().step(source(), Wording())
    again = reword_step()
    assert (again.step(source(), Wording()), again.calls) == (first, [])


def test_another_setting_is_a_miss() -> None:
    reword, calls = reword_step()
    assert reword(source(), Wording()) != reword(source(), Wording(ending="?"))
    assert len(calls) == 2


def test_a_setting_that_cannot_change_the_result_is_no_miss() -> None:
    reword, calls = reword_step()
    assert reword(source(), Wording()) == reword(source(), Wording(threads=8))
    assert len(calls) == 1


def test_other_rows_are_a_miss() -> None:
    reword, calls = reword_step()
    reword(source(count=3), Wording())
    reword(source(count=4), Wording())
    assert len(calls) == 2


def test_a_raised_version_is_a_miss() -> None:
    reword_step("1").step(source(), Wording())
    raised = reword_step("2")
    assert raised.step.lookup(source(), Wording()).missing == "not done yet"
    raised.step(source(), Wording())
    assert len(raised.calls) == 1


def test_equal_rows_of_another_origin_are_a_hit() -> None:
    reword, calls = reword_step()
    here, there = source("loaded"), source("drawn")
    assert here.name != there.name
    assert reword(here, Wording()) == reword(there, Wording())
    assert len(calls) == 1


def delete_part(home: Path, ref: DatasetRef) -> None:
    (home / ref.name / "part-00000.parquet").unlink()


def damage_part(home: Path, ref: DatasetRef) -> None:
    flip_byte(home / ref.name / "part-00000.parquet")


def cut_part(home: Path, ref: DatasetRef) -> None:
    part = home / ref.name / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-7])


def delete_manifest(home: Path, ref: DatasetRef) -> None:
    (home / ref.name / "manifest.json").unlink()


def delete_data_set(home: Path, ref: DatasetRef) -> None:
    shutil.rmtree(home / ref.name)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        pytest.param(delete_part, "part-00000.parquet is missing", id="a part is gone"),
        pytest.param(damage_part, "part-00000.parquet is damaged", id="a byte is flipped"),
        pytest.param(cut_part, "its manifest says", id="a part is cut"),
        pytest.param(delete_manifest, "has no manifest.json", id="the manifest is gone"),
        pytest.param(delete_data_set, "is gone", id="the data set is gone"),
    ],
)
def test_damaged_data_is_a_miss_that_says_why_and_is_repaired(
    harm: Callable[[Path, DatasetRef], None],
    told: str,
    ratchet_home: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reword, calls = reword_step()
    first = reword(source(), Wording())
    harm(ratchet_home, first)
    assert told in reword.lookup(source(), Wording()).missing
    with caplog.at_level(logging.WARNING, "ratchet"):
        assert reword(source(), Wording()) == first
    assert len(calls) == 2
    assert "reword runs again" in caplog.text
    assert told in caplog.text
    assert reword.lookup(source(), Wording()).found is not None
    assert len(list(read_rows(first, Prompt))) == 3
    reword(source(), Wording())
    assert len(calls) == 2


def test_a_removed_record_is_a_miss_that_finds_equal_rows_stored(ratchet_home: Path) -> None:
    reword, calls = reword_step()
    first = reword(source(), Wording())
    (record,) = (ratchet_home / "steps" / "reword").glob("*.json")
    record.unlink()
    assert reword.lookup(source(), Wording()).missing == "not done yet"
    assert reword(source(), Wording()) == first
    assert len(calls) == 2


@pytest.mark.parametrize("harm", ["flip", "delete"])
def test_a_damaged_checkpoint_is_a_miss(harm: str, ratchet_home: Path, tmp_path: Path) -> None:
    calls = []

    @step(version="1")
    def train(rows: DatasetRef) -> ModelRef:
        calls.append(rows)
        folder = tmp_path / f"model-{len(calls)}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"some weights")
        return ModelRef(name="trained", digest=commit_checkpoint(folder, step="train"))

    policy = train(source())
    assert train(source()) == policy
    weights = ratchet_home / "models" / str(policy.digest) / "model.safetensors"
    flip_byte(weights) if harm == "flip" else weights.unlink()
    assert "model.safetensors is" in train.lookup(source()).missing
    assert train(source()) == policy
    assert len(calls) == 2
    assert weights.read_bytes() == b"some weights"


def test_a_home_in_another_place_is_all_hits(
    ratchet_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reword, calls = reword_step()
    ref = source()
    first = reword(ref, Wording())
    shutil.move(ratchet_home, tmp_path / "elsewhere")
    monkeypatch.setenv("RATCHET_HOME", str(tmp_path / "elsewhere"))
    assert reword(ref, Wording()) == first
    assert len(list(read_rows(first, Prompt))) == 3
    assert len(calls) == 1


def test_a_step_that_fails_stores_nothing_and_says_so() -> None:
    @step(version="1")
    def breaks(rows: DatasetRef) -> DatasetRef:
        raise ValueError("this row is odd")

    with heard() as records:
        with pytest.raises(ValueError, match="this row is odd"):
            breaks(source())
        assert breaks.lookup(source()).found is None
    assert [(record.state, record.detail) for record in records] == [("failed", "this row is odd")]


def test_the_bare_function_does_not_need_a_store_of_results() -> None:
    @step(version="1")
    def keep(rows: DatasetRef) -> DatasetRef:
        return rows

    assert keep.fn(source()) == source()


@pytest.mark.parametrize("value", [Path("rows.parquet"), {"a": 1}, {"a"}, object()], ids=["path", "dict", "set", "any"])
def test_an_argument_without_an_exact_key_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="it takes references, settings and plain values"):
        key_part(value)


def test_the_key_knows_neither_shards_nor_where_the_weights_lie() -> None:
    assert key_part(Sampling(prompts_per_shard=1)) == key_part(Sampling(prompts_per_shard=999))
    assert key_part(ModelRef(name="a", digest="d", path="/here")) == key_part(ModelRef(name="b", digest="d"))
    assert key_part(ModelRef(name="a")) != key_part(ModelRef(name="a", revision="1234"))


def test_a_plan_says_what_would_run_and_why_and_writes_nothing(ratchet_home: Path) -> None:
    reword, calls = reword_step()
    ref = source()
    first = reword(ref, Wording())
    before = tree(ratchet_home)
    with planning() as planned:
        assert reword(ref, Wording()) == first
        unknown = reword(ref, Wording(ending="?"))
        reword(unknown, Wording())  # it reads what does not exist yet
    assert [(one.step, one.cached, one.why, one.rows) for one in planned] == [
        ("reword", True, "", 3),
        ("reword", False, "not done yet", None),
        ("reword", False, "not done yet", None),
    ]
    assert len(calls) == 1
    assert tree(ratchet_home) == before


def test_a_plan_in_an_empty_home_does_not_make_it(ratchet_home: Path) -> None:
    ref = DatasetRef(step="prompts", digest="0" * 32, row_type="Prompt", rows=3)
    with planning() as planned:
        reword_step().step(ref, Wording())
    assert [one.cached for one in planned] == [False]
    assert not ratchet_home.exists()


def test_a_plan_names_the_damage(ratchet_home: Path) -> None:
    reword, _ = reword_step()
    ref = source()
    delete_part(ratchet_home, reword(ref, Wording()))
    with planning() as planned:
        reword(ref, Wording())
    assert "part-00000.parquet is missing" in planned[0].why
