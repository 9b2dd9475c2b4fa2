"""Object stores: whole objects, put-if-absent, and clear words where a URL cannot be a home."""

from pathlib import Path

import pytest

from flows.console import use_home
from storage import stores
from storage.home import home, home_name, home_url
from storage.opening import what_is_wrong_with_store
from storage.stores import Store, StoreError
from tests.storage.machines import store


def test_an_object_is_created_once(s3_home: str) -> None:
    assert store().create("steps/a.json", b"first")
    assert not store().create("steps/a.json", b"second")
    assert store().create("steps/a.json", b"first"), "the answer to our own first try may have been lost"
    assert store().read("steps/a.json") == b"first"


def test_objects_are_listed_read_and_removed_by_their_names_below_the_url(s3_home: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    store().upload(tmp_path / "file", "models/x/weights")
    store().write("models/x/config", b"{}")
    store().write("modelsx", b"not below models")
    assert {name: one.bytes for name, one in store().names("models").items()} == {
        "models/x/weights": 5,
        "models/x/config": 2,
    }
    assert store().download("models/x/weights", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"12345"
    assert store().read_many(["models/x/config", "none", "modelsx"]) == {
        "models/x/config": b"{}",
        "modelsx": b"not below models",
    }
    store().remove(["models/x/config", "none"])
    assert set(store().names()) == {"models/x/weights", "modelsx"}
    assert store().read("models/x/config") is None
    assert not store().download("none", tmp_path / "back")
    assert what_is_wrong_with_store() is None


def test_a_call_is_tried_again_while_the_network_fails(s3_home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PAUSES_SECONDS", (0.0, 0.0))
    there, failures = store(), iter([OSError("reset"), TimeoutError("slow")])
    real = there._fs.pipe_file

    def flaky(*arguments: object, **options: object) -> object:
        for error in failures:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(there._fs, "pipe_file", flaky)
    there.write("a", b"1")
    assert there.read("a") == b"1"
    monkeypatch.setattr(there._fs, "pipe_file", lambda *_, **__: (_ for _ in ()).throw(OSError("reset")))
    with pytest.raises(StoreError, match=r"/a could not be written \(OSError: reset\); .* nothing is lost"):
        there.write("a", b"1")


@pytest.mark.parametrize(
    "url",
    ["s3://KEY:hidden@bucket/p", "s3://hidden@bucket/p", "az://bucket/p?sig=hidden", "s3://bucket/p#hidden"],
)
def test_a_url_with_what_may_be_a_credential_is_refused_without_repeating_it(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RATCHET_CACHE", str(tmp_path))
    monkeypatch.setenv("RATCHET_HOME", url)
    with pytest.raises(ValueError, match="put credentials into the environment") as refused:
        home_url()
    assert "hidden" not in str(refused.value)
    assert "hidden" not in str(home())


def test_a_user_name_that_is_a_container_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_HOME", "abfss://container@account.dfs.core.windows.net/home/")
    assert home_name() == "abfss://container@account.dfs.core.windows.net/home"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("gs://bucket/home", "pip install gcsfs"),
        ("nothing://bucket/home", "fsspec knows no such scheme"),
        ("memory://home", "its driver has no put-if-absent"),
    ],
)
def test_a_url_that_cannot_be_a_home_is_refused_with_what_to_do(url: str, told: str) -> None:
    with pytest.raises(StoreError, match=told):
        Store(url)


def test_a_command_on_a_bucket_that_is_not_there_is_a_wrong_configuration(
    s3_home: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    with pytest.raises(typer.Exit) as ended:
        use_home("s3://no-such-bucket-here/home")
    assert ended.value.exit_code == 2
    assert "there is no such bucket" in capsys.readouterr().err


def test_a_store_that_lets_a_second_writer_in_is_found_out(s3_home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = store()
    monkeypatch.setattr(there, "_create", lambda path, content: there._fs.pipe_file(path, content))
    assert "lets one writer replace what another has just created" in str(what_is_wrong_with_store())
    assert there.names() == {}


def test_a_folder_can_be_a_store_and_a_home_that_is_a_folder_opens_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Store(f"file://{tmp_path}/shared")
    assert there.names() == {}
    assert there.create("locks/a/1.json", b"1")
    assert not there.create("locks/a/1.json", b"2")
    assert set(there.names("locks")) == {"locks/a/1.json"}
    monkeypatch.setattr(stores, "_opened", lambda url, _: pytest.fail(f"opened {url}"))
    assert stores.current_store() is None
