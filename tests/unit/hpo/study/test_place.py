"""Addresses of database servers: what is accepted, and that a password goes nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpo.machine.registry import process_words
from hpo.study import place
from hpo.study.folder import StudyFolder
from hpo.study.place import Place, address, parsed, settle, shown, without_password
from hpo.study.storage import AT_OWN_RISK, create_study, open_study, require_local
from hpo.study.work import Invocation
from trainer.errors import ConfigError, MachineError, ToolError
from trainer.files import machine_id, sweep, write_new

URL = "postgresql+psycopg://luca:s3cret@db.lan:5433/hpo"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grpc://db.lan:13000", "grpc:// cannot be used"),
        ("sqlite:///s3cret.db", "--storage is for a database server"),
        ("oracle://u:s3cret@h/d", "cannot be oracle"),
        ("postgresql+psycopg://u:s3cret@h", "names no database"),
        ("postgresql+psycopg://h/d?password=s3cret", "has a password behind the ?"),
        ("postgresql+psycopg://u:s3cret@h:port/d", "cannot be read"),
        ("postgresql+psycopg://u:p@s3cret@h/d", "more than one @"),
        ("postgresql+psycopg://u:p@s3/s3cret@h/d", "more than one @"),
        ("mysql+pymysql://u@h:s3cret@h/d", "more than one @"),
    ],
)
def test_other_addresses_are_refused_without_repeating_them(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")) as refused:
        parsed(text)
    assert "s3cret" not in str(refused.value) + refused.value.hint and refused.value.hint


def test_a_driver_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymysql", None)
    monkeypatch.setattr(place.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="pymysql is not installed") as refused:
        parsed("mysql://u@h/d")
    assert refused.value.hint.endswith(".venv/bin/pip install -c constraints.txt '.[mysql]'")


def test_the_short_form_means_the_driver_that_is_installed() -> None:
    assert parsed("postgresql://u@h/d").drivername == "postgresql+psycopg"


def test_a_password_is_neither_stored_nor_shown(tmp_path: Path) -> None:
    assert without_password(parsed(URL)) == "postgresql+psycopg://luca@db.lan:5433/hpo"
    words = ("search", "luca", "--storage", URL, "--notify", "ntfy://t", "--trials=3")
    stored = Invocation(words, "/").stored
    assert stored == (
        "search",
        "luca",
        "--storage",
        "postgresql+psycopg://luca@db.lan:5433/hpo",
        "--trials=3",
    )
    joined = Invocation(("search", f"--storage={URL}"), "/").stored
    assert joined == ("search", "--storage", "postgresql+psycopg://luca@db.lan:5433/hpo")
    assert shown("nonsense:s3cret") == ""


def test_the_command_line_of_another_worker_is_shown_without_its_password() -> None:
    secret = URL.replace("s3cret", "p@s3cret/s3cret")  # as it may be typed by mistake
    options = ["--notify", "tgram://s3cret/1", "--notify=ntfy://s3cret", "--storage", secret]
    words = [sys.executable, "-c", "print(flush=True); input()", "hpo.cli", "search", *options]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline()  # it is itself by now
        said = process_words(other.pid)
    finally:
        other.communicate(b"\n")
    assert "--notify *** --notify=*** --storage postgresql" in said and "s3cret" not in said


def test_where_the_password_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Place("postgresql+psycopg://luca@db.lan:5433/hpo", "x", "0")
    monkeypatch.delenv(place.VARIABLE, raising=False)
    assert address(stored).password is None  # ~/.pgpass is read by the driver
    monkeypatch.setenv(place.VARIABLE, URL)
    assert address(stored).password == "s3cret"
    monkeypatch.setenv(place.VARIABLE, URL.replace("/hpo", "/another"))
    assert address(stored) == parsed(stored.url)  # the environment is about other studies
    monkeypatch.setenv(place.VARIABLE, URL)
    token = place.STORAGE.set("postgresql://luca@10.0.0.7/hpo")
    try:  # hpo resume repeats the command without its password
        assert (address(stored).host, address(stored).password) == ("10.0.0.7", "s3cret")
    finally:
        place.STORAGE.reset(token)


def test_a_study_in_a_file_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = StudyFolder(tmp_path)
    monkeypatch.setenv(place.VARIABLE, URL)
    new = place.chosen_place(folder)
    assert new is not None and (new.url, new.study) == (without_password(parsed(URL)), tmp_path.name)
    folder.database.touch()
    assert place.chosen_place(folder) is None  # the environment is for other studies
    token = place.STORAGE.set(URL)
    try:
        with pytest.raises(ConfigError, match="--storage cannot be used"):
            place.chosen_place(folder)
    finally:
        place.STORAGE.reset(token)


def test_of_two_workers_that_begin_at_once_one_says_where_the_study_is(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    assert write_new(folder.storage, "{}") and not write_new(folder.storage, "other")
    assert folder.storage.read_text() == "{}"
    folder.storage.unlink()
    first = Place("postgresql+psycopg://h/d", "x", "1")
    settle(folder, first)
    settle(folder, Place("postgresql+psycopg://h/d", "x", "2"))
    assert place.place_of(folder) == first
    assert [path.name for path in tmp_path.iterdir()] == ["storage.json"]


def test_a_file_on_a_network_disk_can_be_read_and_not_worked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, new = StudyFolder(tmp_path / "begun"), StudyFolder(tmp_path / "new")
    begun.root.mkdir()
    create_study(begun, {"direction": "maximize"})
    monkeypatch.setattr("hpo.study.storage.file_system", lambda path: "nfs4")
    assert open_study(begun).study_name == "begun"
    for folder, way in ((begun, "copy the folder to a local disk"), (new, "--storage postgresql+psycopg://")):
        with pytest.raises(MachineError, match=r"network disk \(nfs4\)") as refused:
            create_study(folder, {"direction": "maximize"})
        assert way in refused.value.hint and AT_OWN_RISK in refused.value.hint
    monkeypatch.setenv(AT_OWN_RISK, "1")
    assert create_study(begun, {"direction": "maximize"}).study_name == "begun"
    monkeypatch.delenv(AT_OWN_RISK)
    monkeypatch.setattr("hpo.study.storage.file_system", lambda path: "ext4")
    require_local(begun)


def test_files_that_another_machine_is_writing_are_not_swept(tmp_path: Path) -> None:
    """Its processes cannot be seen from here; a process of this machine with the same number may be dead."""
    other = tmp_path / f".tmp-{2**22 + 1}-{'0' * 8}-ab"
    own = tmp_path / f".tmp-{2**22 + 1}-{machine_id()}-ab"
    for path in (other, own):
        path.touch()
    assert sweep(tmp_path) == 1 and other.exists() and not own.exists()
    assert sweep(tmp_path, everyone=True) == 1 and not other.exists()


def test_a_damaged_storage_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "storage.json").write_text('{"url": "x"}')
    with pytest.raises(ToolError, match=r"storage\.json has no 'study'"):
        place.place_of(StudyFolder(tmp_path))


def test_an_at_sign_in_a_password_is_written_as_40() -> None:
    with pytest.raises(ConfigError) as refused:
        parsed("postgresql://u:p@ss@h/d")
    assert "%40" in refused.value.hint
    assert parsed("postgresql://u:p%40ss@h/d").password == "p@ss"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("postgresql://luca:s3cret@db.lan:5433/another", "postgresql+psycopg://luca@db.lan:5433/another"),
        ("mysql://luca:s3cret@db.lan:5433/hpo", "mysql+pymysql://luca@db.lan:5433/hpo"),
    ],
)
def test_another_database_than_the_studys_is_refused_and_never_used_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, names: str
) -> None:
    monkeypatch.delenv(place.VARIABLE, raising=False)
    monkeypatch.setattr(place.importlib.util, "find_spec", lambda name: object())
    folder, own = StudyFolder(tmp_path), Place(without_password(parsed(URL)), tmp_path.name, "0")
    settle(folder, own)
    token = place.STORAGE.set(given)
    try:
        with pytest.raises(ConfigError, match="but --storage names") as refused:
            place.chosen_place(folder)
        assert names in refused.value.message and own.url in refused.value.message
        assert "s3cret" not in str(refused.value)
        assert address(own) == parsed(own.url)  # as the source of --fork-from
    finally:
        place.STORAGE.reset(token)
    token = place.STORAGE.set(URL.replace("db.lan:5433", "localhost"))  # its own name for the same server
    try:
        assert place.chosen_place(folder) == own and address(own).password == "s3cret"
    finally:
        place.STORAGE.reset(token)
