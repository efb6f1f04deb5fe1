"""``hpo resume``, ``studies`` and ``delete``, and the question which study is meant."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from hpo.cli import which
from hpo.cli.folders import _table
from hpo.cli.main import main
from hpo.study.folder import StudyFolder
from hpo.study.work import WORK
from tests.tiny_search import finished_runs
from trainer.errors import ConfigError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with one finished tiny study, named tiny."""
    return finished_runs(tmp_path_factory.mktemp("folders"), 2)


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hpo(*words: str, input: str | None = None) -> Result:
    return CliRunner().invoke(main, list(words), input=input, catch_exceptions=False)


def note(root: Path, words: list[str], state: str, *, hours_ago: float = 0, cwd: str = "") -> None:
    """A step in the record of a folder."""
    root.mkdir(parents=True, exist_ok=True)
    when = (datetime.now(UTC) - timedelta(hours=hours_ago)).isoformat()
    rows = [
        {
            "id": f"{hours_ago}",
            "event": "started",
            "step": words[0],
            "words": words,
            "cwd": cwd,
            "time_utc": when,
        },
        {"id": f"{hours_ago}", "event": state, "time_utc": when},
    ]
    with (root / WORK).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_resume_repeats_the_interrupted_command_in_its_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    note(here / "runs" / "tiny", ["status", "tiny"], "interrupted", cwd=str(here))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    result = hpo("resume", str(here / "runs" / "tiny" / "trial_0000"))
    assert result.exit_code == 0 and "study=tiny complete=2/2" in result.output
    first, second = result.stderr.splitlines()[:2]
    assert first.startswith("resuming: hpo status tiny (interrupted ") and second == f"in {here}"


def test_resume_of_a_run_outside_studies(here: Path) -> None:
    note(here / "output" / "luca.run", ["status", "tiny"], "failed", cwd=str(here))
    for words in ((), ("output",), ("output/luca.run",)):
        assert "study=tiny" in hpo("resume", *words).output


def test_resume_without_anything_to_resume(here: Path) -> None:
    result = hpo("resume")
    assert result.exit_code == 2 and "nothing was interrupted" in result.stderr
    note(here / "runs" / "tiny", ["status", "tiny"], "interrupted", hours_ago=2)
    note(here / "runs" / "tiny", ["status", "tiny"], "finished", hours_ago=1)
    assert hpo("resume", "tiny").exit_code == 2
    assert hpo("resume", "other").exit_code == 2


def test_resume_asks_which_of_two(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("runs/tiny", "runs/other")
    note(Path("runs/tiny"), ["status", "tiny"], "interrupted", hours_ago=2)
    note(Path("runs/other"), ["status", "other"], "interrupted", hours_ago=1)
    result = hpo("resume")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[1:] == [
        "hint: name one:",
        "  hpo resume runs/other",
        "  hpo resume runs/tiny",
    ]
    monkeypatch.setattr("hpo.cli.folders.at_terminal", lambda: True)
    result = hpo("resume", input="2\n")
    assert "study=tiny" in result.output and "2  hpo status tiny (interrupted" in result.stderr


def test_studies_lists_them_with_state_best_and_last_command(here: Path) -> None:
    note(Path("runs/tiny"), ["confirm", "tiny"], "interrupted")
    shutil.copytree("runs/tiny", "runs/broken")
    for path in Path("runs/broken").glob("study.db*"):
        path.unlink()
    Path("runs/broken/study.db").write_bytes(b"no database " * 1000)
    rows = {row["study"]: row for row in json.loads(hpo("studies", "--json").output)}
    tiny = rows["tiny"]
    assert (tiny["state"], tiny["last"], tiny["trials"], tiny["of"]) == ("interrupted", "confirm", 2, 2)
    assert tiny["score"] is not None and tiny["confirmed"] is False
    assert rows["broken"]["state"].startswith("cannot be read")
    lines = hpo("studies").output.splitlines()
    assert lines[0].split("\t")[:3] == ["study", "state", "trials"] and len(lines) == 3
    assert "no study in nowhere; start one: hpo search" in hpo("studies", "--runs", "nowhere").output


def test_the_table_of_studies_has_two_lines_a_study_at_most() -> None:
    row = {"study": "luca", "state": "finished", "trials": 5, "of": 5, "best": 2, "score": 0.386, "confirmed": False,
           "last": "compare lora_trial_2 luca_mini-sdxl-step00000036", "when": "2026-11-29T18:53+00:00"}  # fmt: skip
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    console.print(_table([row, {**row, "study": "mini-sd15-luca-photos"}]))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) <= 5 and max(map(len, lines)) <= 80
    assert "compare finished" in lines[1]


def test_delete_moves_a_study_and_what_belongs_to_it_to_the_trash(here: Path) -> None:
    confirm = StudyFolder(Path("runs/tiny__confirm"))
    shutil.copytree("runs/tiny", confirm.root)
    confirm.facts.write_text(json.dumps({"facts": {"confirms": "tiny"}}))
    shutil.copytree("runs/tiny", "runs/other")
    assert hpo("delete", "tiny", input="n\n").exit_code == 0 and Path("runs/tiny").is_dir()
    result = hpo("delete", "tiny")
    assert result.exit_code == 2 and "--yes" in result.stderr
    result = hpo("delete", "runs/tiny", input="y\n")
    assert (
        result.exit_code == 0
        and "runs/tiny, runs/tiny__confirm: " in result.output
        and " MB" in result.output
    )
    assert sorted(path.name for path in Path("runs").iterdir()) == [".trash", "other"]
    (trash,) = Path("runs/.trash").iterdir()
    assert sorted(path.name for path in trash.iterdir()) == ["tiny", "tiny__confirm"]
    back = next(line for line in result.output.splitlines() if "mv " in line).split("mv ")[1]
    assert back == f"{trash}/* runs/"
    assert "tiny" not in hpo("studies").output


def test_a_study_in_use_is_not_deleted(here: Path) -> None:
    code = "import sys, hpo.study.locks as l; from pathlib import Path\n"
    code += "with l.Lock(Path('runs/tiny/.locks/use.lock')).held(shared=True):\n"
    code += "    print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "held\n"
    result = hpo("delete", "tiny", "--yes")
    assert result.exit_code == 5 and f"process {process.pid}" in result.stderr and Path("runs/tiny").is_dir()
    process.stdin.close()
    process.wait()
    assert not Path("runs/.trash").exists()


def test_commands_for_a_search_take_the_study_of_a_confirmation(here: Path) -> None:
    confirm = StudyFolder(Path("runs/tiny__confirm"))
    shutil.copytree("runs/tiny", confirm.root)
    confirm.facts.write_text(json.dumps({"facts": {"confirms": "tiny"}}))
    result = hpo("confirm", "tiny__confirm", input="n\n")
    assert result.stderr.startswith("study tiny, which tiny__confirm belongs to")
    assert "study=tiny__confirm" in hpo("status", "tiny__confirm").output


@pytest.mark.parametrize(
    ("answer", "starts"), [("y\n", True), ("n\n", False), ("\n", False), ("what\nyes\n", True)]
)
def test_an_answer_comes_through_a_pipe(answer: str, starts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert which.agreed("start?", yes=False) is starts


def test_without_an_answer_nothing_expensive_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(ConfigError) as caught:
        which.agreed("start?", yes=False)
    assert "--yes" in caught.value.hint and which.agreed("start?", yes=True)


def test_tab_completes_names_of_studies(here: Path) -> None:
    from click.shell_completion import ShellComplete

    items = ShellComplete(main, {}, "hpo", "_HPO_COMPLETE").get_completions(["confirm"], "ti")
    assert [item.value for item in items if item.type == "plain"] == ["tiny"]


def test_old_names_of_options_still_work_and_say_the_new_ones(here: Path) -> None:
    result = hpo("transfer", "--to", "nowhere", "--study", "tiny")
    assert "note: --study is now an argument" in result.stderr
    result = hpo("search", "--base", "mini-sd15", "--study=nothing")
    assert "note: --study is now --definition" in result.stderr and "no study file nothing" in result.stderr


def test_only_what_is_named_is_deleted(here: Path) -> None:
    confirm = StudyFolder(Path("runs/tiny__confirm"))
    shutil.copytree("runs/tiny", confirm.root)
    confirm.facts.write_text(json.dumps({"facts": {"confirms": "tiny"}}))
    result = hpo("delete", "runs/tiny/trial_0001", "--yes")
    assert result.exit_code == 2 and "hpo delete tiny" in result.stderr
    assert hpo("delete", "tiny__confirm", "--yes").exit_code == 0
    assert Path("runs/tiny").is_dir() and not confirm.root.exists()


def test_without_standard_input_nothing_is_asked(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert not which.at_terminal()
    with pytest.raises(ConfigError):
        which.agreed("start?", yes=False)


def test_resume_finds_a_run_in_any_output_folder(here: Path) -> None:
    from hpo.study.work import INVOCATION, Invocation, recorded_at
    from trainer.errors import Interrupted

    token = INVOCATION.set(Invocation(("status", "tiny"), str(here)))
    root = here / "my loras" / "zed.run"
    root.mkdir(parents=True)
    with pytest.raises(Interrupted) as caught, recorded_at(root, root, "train zed"):
        raise Interrupted("stopped")
    INVOCATION.reset(token)
    assert caught.value.hint == f"hpo resume '{root}'"
    assert "study=tiny" in hpo("resume").output


def test_a_run_of_several_processes_is_not_resumed_with_one(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpo.study.work import INVOCATION, Invocation, recorded
    from trainer.errors import Interrupted

    monkeypatch.setenv("WORLD_SIZE", "2")
    token = INVOCATION.set(Invocation(("train", "a.toml"), str(here)))
    with pytest.raises(Interrupted), recorded(here / "runs" / "tiny", "train a"):
        raise Interrupted("stopped")
    INVOCATION.reset(token)
    result = hpo("resume", "tiny")
    assert result.exit_code == 2 and "torchrun --nproc-per-node 2 -m hpo.cli train a.toml" in result.stderr


def test_no_command_declares_an_option_twice() -> None:
    def all_of(group: click.Group) -> list[click.Command]:
        return [
            one
            for command in group.commands.values()
            for one in (all_of(command) if isinstance(command, click.Group) else [command])
        ]

    for command in all_of(main):
        names = [name for param in command.params for name in param.opts]
        assert len(names) == len(set(names)), command.name


def test_a_search_that_was_recorded_before_its_database_existed_is_one_command(here: Path) -> None:
    from hpo.study.work import INVOCATION, Invocation, recorded
    from trainer.errors import Interrupted

    token = INVOCATION.set(Invocation(("status", "tiny"), str(here)))
    fresh = here / "runs" / "fresh"
    (fresh / ".locks").mkdir(parents=True)
    with pytest.raises(Interrupted), recorded(fresh, "search"):
        raise Interrupted("stopped")
    INVOCATION.reset(token)
    assert "study=tiny" in hpo("resume").output  # not asked twice about the same folder
    shutil.copy("runs/tiny/study.db", fresh / "study.db")
    assert "study=tiny" in hpo("resume").output
