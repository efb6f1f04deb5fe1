"""Every command reads a path as its user means it, and nothing is made in another place than it looks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hpo.cli.main import main
from hpo.cli.options import NAMED, PATH


def _all(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Parameter]]:
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _all(inner, (*words, name))
    for param in command.params:
        yield " ".join((*words, param.name or "")), param


def test_no_command_takes_a_path_without_reading_it_as_the_user_means_it() -> None:
    for name, param in _all(main):
        assert not isinstance(param.type, click.Path | click.File), name
        if param.metavar in ("DIR", "OUT", "OUT_DIR", "SRC", "FILE", "BASE", "RUN"):
            assert param.type in (PATH, NAMED), name


@pytest.mark.parametrize(
    "words",
    [
        ["train", "C:/a.toml"],
        ["inspect", "C:/a.safetensors"],
        ["plan", "--base", "C:/m.safetensors"],
        ["dataset", "check", "C:/ds"],
        ["dataset", "prepare", "ds", "C:/out"],
        ["search", "x", "--base", "mini-sd15", "--runs", "C:/runs"],
        ["export", "kohya", "a.toml", "C:/out"],
        ["compare", "C:/a", "b"],
    ],
)
def test_a_windows_path_is_named_before_anything_is_made(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and "is a Windows path" in result.output and "/mnt/c/" in result.output
    assert not list(tmp_path.iterdir())


def test_home_and_spaces_are_read_in_any_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    context = click.Context(main)
    assert PATH.convert("~/x", None, context) == tmp_path / "home/x"
    assert PATH.convert(" x ", None, context) == Path("x") and NAMED.convert("", None, context) == ""


@pytest.mark.parametrize("words", [["inspect", ""], ["dataset", "check", " "], ["train", ""]])
def test_an_empty_path_is_not_the_current_folder(words: list[str]) -> None:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and "is empty" in result.output
