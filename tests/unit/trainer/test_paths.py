"""Paths that a user wrote: never another place than it looks."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.paths import user_path


def test_spaces_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert user_path(" TMP/outp ", "output_dir") == "TMP/outp"
    assert user_path("~/loras", "output_dir") == f"{tmp_path}/loras"
    assert user_path("~", "output_dir") == str(tmp_path)
    assert user_path("a b/c", "output_dir") == "a b/c" and user_path("", "x") == ""
    (tmp_path / "~x").mkdir()
    assert user_path("~x", "data") == "~x", "a folder that exists is meant"
    with pytest.raises(ConfigError, match="home folder of this user"):
        user_path("~nobody-at-all/x", "data")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (r"C:\Users\me\loras", "/mnt/c/Users/me/loras"),
        ("d:/loras", "/mnt/d/loras"),
        (r"out\loras", "write out/loras"),
        (r"\\nas\loras", "write //nas/loras"),
        ("%APPDATA%/x", "whole path"),
        ("$HOME/x", "whole path"),
        ("${HOME}/x", "whole path"),
        ("C:loras", "whole path"),
        ("file:///home/me/loras", "write /home/me/loras"),
        ("smb://nas/loras", "of this machine"),
        ("a" * 300, "shorter"),
        ("a\0b", "again"),
    ],
)
def test_a_path_of_another_system_is_refused_with_what_to_write(text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        user_path(text, "output_dir")
    assert "output_dir = " in caught.value.message and hint in caught.value.hint


def test_a_folder_whose_name_has_a_backslash_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a\\b").mkdir()
    assert user_path("a\\b", "data") == "a\\b"


@pytest.mark.parametrize("text", ["a" * 300, "~" + "/b" * 3000, "a\0b"])
def test_what_the_system_cannot_look_up_is_an_error_in_words(text: str) -> None:
    with pytest.raises(ConfigError, match=r"vae = .* (a name that is too long|holds a NUL)"):
        user_path(text, "vae")


def test_quotes_around_a_quoted_path_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert user_path("'my loras'", "output_dir") == "my loras"
    Path("'a'").mkdir()
    assert user_path("'a'", "data") == "'a'", "a folder that exists is meant"
