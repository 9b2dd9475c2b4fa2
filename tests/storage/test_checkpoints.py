"""Checkpoints: whole or not there, named by content."""

import os
import shutil
from pathlib import Path

import pytest

from storage.checkpoints import (
    checkpoint_path,
    commit_checkpoint,
    discard_scratch,
    folder_digest,
    read_checkpoint_manifest,
    scratch_folder,
    what_is_wrong_with_checkpoint,
)
from storage.datasets import DatasetError
from storage.home import home
from tests.storage.builders import flip_byte


def model(folder: Path, weights: bytes = b"weights") -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer/vocab.json").write_text("[]")
    return folder


def test_a_committed_folder_is_moved_under_its_digest_with_a_manifest(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    expected = folder_digest(folder)
    digest = commit_checkpoint(folder, step="train_sft", parents=["base"], settings={"lr": 0.1}, counts={"rows": 3})
    assert digest == expected == folder_digest(checkpoint_path(digest))
    assert not folder.exists()
    assert (checkpoint_path(digest) / "tokenizer/vocab.json").read_text() == "[]"
    manifest = read_checkpoint_manifest(digest)
    assert [file.name for file in manifest.files] == ["config.json", "model.safetensors", "tokenizer/vocab.json"]
    assert (manifest.parents, manifest.settings, manifest.counts) == (("base",), {"lr": 0.1}, {"rows": 3})
    assert str(tmp_path) not in manifest.model_dump_json()


def test_equal_files_are_one_checkpoint_and_others_another(tmp_path: Path) -> None:
    first = commit_checkpoint(model(tmp_path / "a"), step="train_sft")
    assert commit_checkpoint(model(tmp_path / "b"), step="train_sft") == first
    assert not (tmp_path / "b").exists()
    assert commit_checkpoint(model(tmp_path / "c", b"others"), step="train_sft") != first
    assert len(list((home() / "models").iterdir())) == 2


def test_hidden_files_do_not_change_the_digest_and_names_do(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    digest = folder_digest(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache/download.lock").touch()
    assert folder_digest(folder) == digest
    (folder / "config.json").rename(folder / "configuration.json")
    assert folder_digest(folder) != digest


def test_a_changed_file_changes_the_digest_of_its_folder(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    digest = folder_digest(folder)
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    os.utime(folder / "model.safetensors", (1, 1))
    assert folder_digest(folder) != digest


def test_a_damaged_checkpoint_is_named_and_replaced_by_a_whole_one(tmp_path: Path) -> None:
    digest = commit_checkpoint(model(tmp_path / "a"), step="train_sft")
    flip_byte(home() / "models" / digest / "model.safetensors")
    assert what_is_wrong_with_checkpoint(digest) is None
    assert "model.safetensors is damaged" in (what_is_wrong_with_checkpoint(digest, deep=True) or "")
    (home() / "models" / digest / "model.safetensors").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"model.safetensors has 0 bytes, its manifest says 7; run the same command"):
        checkpoint_path(digest)
    assert commit_checkpoint(model(tmp_path / "b"), step="train_sft") == digest
    assert what_is_wrong_with_checkpoint(digest, deep=True) is None


def test_without_a_manifest_there_is_no_checkpoint(tmp_path: Path) -> None:
    digest = commit_checkpoint(model(tmp_path / "a"), step="train_sft")
    (home() / "models" / digest / "manifest.json").unlink()
    assert "never finished" in (what_is_wrong_with_checkpoint(digest) or "")
    with pytest.raises(DatasetError, match=r"no manifest\.json"):
        read_checkpoint_manifest("0" * 32)


def test_links_are_stored_as_the_files_they_point_to(tmp_path: Path) -> None:
    blobs, folder = model(tmp_path / "blobs"), tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(blobs / "model.safetensors")
    digest = commit_checkpoint(folder, step="train_sft")
    shutil.rmtree(blobs)
    assert (checkpoint_path(digest) / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in (home() / "models").iterdir()] == [digest]


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="step 'train_sft' has no model files"):
        commit_checkpoint(tmp_path / "nothing", step="train_sft")
    with pytest.raises(ValueError, match="holds no model files"):
        folder_digest(tmp_path / "nothing")


def test_a_training_in_progress_keeps_its_folder_until_it_is_discarded(tmp_path: Path) -> None:
    (scratch_folder("key") / "checkpoint-200").mkdir()
    commit_checkpoint(model(scratch_folder("key") / "model"), step="train_sft")
    assert [path.name for path in scratch_folder("key").iterdir()] == ["checkpoint-200"]
    assert scratch_folder("../../key").parent == home() / "models"
    discard_scratch("key")
    assert list(scratch_folder("key").iterdir()) == []
