"""Mistakes in a command line: refused while parsing, in two lines, with exit code 2, before anything is loaded."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from hpo.cli import options
from hpo.cli.main import main
from hpo.transfer.probes.run import LEAST
from tests.tiny_search import draw_images
from trainer.errors import RESUME
from trainer.files import machine_error


def hpo(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), catch_exceptions=False)


def commands(
    group: click.Group, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


NUMBERS = [
    (words, option)
    for words, command in commands(main)
    for option in command.params
    if isinstance(option, click.Option) and isinstance(option.type, click.IntRange | click.FloatRange)
]


def two_lines(result: Result) -> list[str]:
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 2, result.output
    assert lines[0].startswith("error: ") and lines[1].startswith("hint: "), lines
    return lines


def test_every_number_has_a_lower_and_an_upper_limit() -> None:
    assert len(NUMBERS) >= 12
    plain = [
        (words, option.name)
        for words, command in commands(main)
        for option in command.params
        if option.type in (click.INT, click.FLOAT)
    ]
    assert plain == []
    for words, option in NUMBERS:
        assert isinstance(option.type, click.IntRange | click.FloatRange)
        assert option.type.min is not None and option.type.max is not None, (words, option.name)


@pytest.mark.parametrize(("words", "option"), NUMBERS, ids=lambda value: str(value)[:40])
def test_a_number_beyond_its_limits_is_refused_while_parsing(
    words: tuple[str, ...], option: click.Option
) -> None:
    assert isinstance(option.type, click.IntRange | click.FloatRange)
    beyond = [str(option.type.max + 1), str(option.type.min - 1), "9" * 5000, "x", "nan", ""]  # type: ignore[operator]
    for text in beyond:
        what, hint = two_lines(hpo(*words, option.opts[0], text))
        assert what.startswith(f"error: {option.opts[0]} ") and len(what) < 200
        assert "give" in hint


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        (
            ("transfer", "--to", "sdxl", "--trials", "1"),
            "--trials 1 is too few for a decision",
            "give 3 to 32",
        ),
        (
            ("transfer", "--to", "sdxl", "--design", "gird"),
            "--design gird is not known",
            "did you mean grid?",
        ),
        (("transfer",), "--to is missing", "transfer --help"),
        (("inspect",), "FILE is missing", "inspect --help"),
        (("dataset", "demo"), "SUBJECT is missing", "give one of character, style, object"),
        (("serch",), "there is no command serch", "did you mean search?"),
        (("dataset", "chek"), "there is no command chek", "did you mean check?"),
        (("search", "--bas", "sd15"), "there is no option --bas", "did you mean --base?"),
        (("train", "a.toml", "b.toml"), "unexpected extra argument (b.toml)", "train --help"),
        (("plan", "--vram"), "requires an argument", "--help"),
        (("--nope",), "there is no option --nope", "--help"),
        (("search", "--base", "sd15", "--device", "gpu"), "--device 'gpu' is not a device", "cuda:1"),
        (("evaluate", "run", "--device", "cuda:"), "--device 'cuda:' is not a device", "cuda:1"),
        (("search", "--base", "sd15", "--clip", ":openai"), "--clip ':openai' is not a scorer", "MODEL:TAG"),
        (("search", "--base", "sd15", "--clip", "ViT-B-32:"), "is not a scorer", "MODEL:TAG"),
        (("dataset", "demo", "charcter", "x"), "SUBJECT charcter is not known", "did you mean character?"),
    ],
)
def test_a_mistake_in_the_command_line_is_two_lines(words: tuple[str, ...], what: str, hint: str) -> None:
    lines = two_lines(hpo(*words))
    assert what in lines[0] and hint in lines[1], lines


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "no.safetensors"),
        ("inspect", "no"),
        ("train", "no.toml"),
        ("train", "no.toml", "--dry-run"),
        ("train", "no.safetensors"),
        ("train", "no"),
        ("plan", "no.toml"),
        ("plan", "no.safetensors"),
        ("plan", "--base", "no"),
        ("plan", "--base", "no.safetensors"),
        ("export", "kohya", "no.toml", "out"),
        ("export", "kohya", "no.safetensors", "out"),
        ("evaluate", "no"),
        ("compare", "no", "no2"),
        ("search", "--base", "no", "--data", "images"),
        ("search", "--base", "no.safetensors", "--data", "images"),
        ("search", "--base", "mini-sd15", "--data", "no"),
        ("search", "--base", "mini-sd15", "--references", "no"),
        ("search", "--base", "mini-sd15", "--prompts", "no"),
        ("search", "--base", "mini-sd15", "--enqueue", "no"),
        ("search", "--base", "mini-sd15", "--definition", "no"),
        ("search", "--base", "mini-sd15", "--clip", "no"),
        ("dataset", "check", "no"),
        ("dataset", "prepare", "no", "out", "--name", "x"),
        ("status", "no"),
        ("transfer", "--to", "no"),
    ],
    ids=" ".join,
)
def test_what_does_not_exist_has_one_code_in_every_command(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_images(tmp_path / "images" / "1_zkw figure", 10)
    monkeypatch.chdir(tmp_path)
    result = hpo(*words)
    lines = result.stderr.strip().splitlines()[-2:]  # before them, some commands say what they do
    assert result.exit_code == 2, result.output
    assert lines[0].startswith("error: ") and "no" in lines[0] and lines[1].startswith("hint: "), lines


def test_an_address_for_messages_is_a_secret_and_never_repeated() -> None:
    lines = two_lines(hpo("search", "--base", "sd15", "--notify", "token-1234"))
    assert "token" not in "".join(lines) and "ntfy://TOPIC" in lines[1]


def test_the_least_number_of_trials_is_what_the_designs_need() -> None:
    assert options.LEAST_TRIALS == LEAST


@pytest.mark.parametrize("group", [(), ("dataset",), ("export",)])
def test_the_list_of_commands_cuts_no_sentence(group: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(main, [*group, "--help"]).stdout
    commands = shown.partition("Commands:")[2].splitlines()
    assert commands and not [line for line in commands if line.endswith("...")]


def test_help_stays_help() -> None:
    for words in ((), ("dataset",)):
        assert "Usage:" in hpo(*words).output
    assert "--probes" not in hpo("transfer", "--help").output


def test_a_refusal_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from hpo.cli.main import main\n"
        "sys.argv = ['hpo', 'transfer', '--to', 'sdxl', '--trials', '2']\n"
        "try:\n    main()\nfinally:\n    print([m for m in ('torch', 'optuna') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 2 and shown.stdout.splitlines() == ["[]", "[]"], (
        "neither worker nor supervisor"
    )


@pytest.mark.parametrize("command", ["search", "confirm", "transfer", "train", "evaluate"])
def test_the_help_of_a_long_command_names_both_ways_to_resume(command: str) -> None:
    said = " ".join(CliRunner().invoke(main, [command, "--help"]).output.split())
    assert RESUME in said and RESUME in machine_error(OSError(errno.ENOSPC, "full"), Path("x")).hint


def test_ctrl_c_at_a_question_does_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """click raises Abort there, which is a RuntimeError."""

    def asks(**_: Any) -> None:
        raise click.Abort

    monkeypatch.setattr(main.commands["studies"], "callback", asks)
    found = hpo("studies")
    assert found.exit_code == 130 and found.stderr.strip() == "nothing was done"
