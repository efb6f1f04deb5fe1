"""Tab completion, as the scripts of bash, zsh and fish ask for it: a process of its own, and real studies."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.study.folder import StudyFolder
from hpo.study.storage import create_study

# What the installed command does; the name of the program decides that of the variable.
HPO = "import sys; from hpo.cli.main import main; main(prog_name='hpo')"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/luca and runs/lisa, and other/lena."""
    found = tmp_path_factory.mktemp("completion")
    for name in ("runs/luca", "runs/lisa", "other/lena"):
        (found / name).mkdir(parents=True)
        create_study(StudyFolder(found / name), {})
    return found


def asked(place: Path, how: str, **more: str) -> str:
    root = str(Path(__file__).parents[4])
    done = subprocess.run(
        [sys.executable, "-c", HPO],
        cwd=place,
        env={**os.environ, "PYTHONPATH": root, "_HPO_COMPLETE": how, **more},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout


def completed(place: Path, line: str) -> set[str]:
    """What Tab offers at the end of a line in bash."""
    words = shlex.split(line)
    count = len(words) if line.endswith(" ") else len(words) - 1
    rows = asked(place, "bash_complete", COMP_WORDS=line, COMP_CWORD=str(count)).splitlines()
    return {value for kind, _, value in (row.partition(",") for row in rows) if kind == "plain"}


def test_commands_options_and_studies_are_completed(place: Path) -> None:
    assert completed(place, "hpo st") == {"status", "studies"}
    assert {"best", "importance", "clean", "export"} <= completed(place, "hpo ")
    assert completed(place, "hpo export ") == {"csv", "kohya", "parquet"}
    assert completed(place, "hpo best --") >= {"--toml", "--json", "--runs"}
    assert completed(place, "hpo best l") == {"luca", "lisa"}
    assert completed(place, "hpo export csv lu") == {"luca"}
    assert completed(place, "hpo clean --runs other ") == {"lena"}
    assert completed(place, "hpo search new --fork-from l") == {"luca", "lisa"}
    assert completed(place, "hpo search --preset o") == {"object"}


@pytest.mark.parametrize(
    ("shell", "registers"),
    [
        ("bash", "complete -o nosort -F _hpo_completion hpo"),
        ("zsh", "compdef _hpo_completion hpo"),
        ("fish", "complete --no-files --command hpo"),
    ],
)
def test_the_script_of_each_shell_registers_the_command(place: Path, shell: str, registers: str) -> None:
    assert registers in asked(place, f"{shell}_source")
