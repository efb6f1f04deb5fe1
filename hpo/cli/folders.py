"""``hpo resume``, ``studies`` and ``delete``: commands on the folders of studies and runs.

Does not own the record of commands (``hpo.study.work``) or the choice of a study (``hpo.study.which``).
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpo.cli import options
from hpo.cli.start import console
from hpo.cli.which import agreed, ask_which, at_terminal, chosen_study, complete_name
from trainer.errors import ConfigError, MachineError, ToolError
from trainer.files import folder_bytes, machine_error
from trainer.text import clean_text

if TYPE_CHECKING:
    from rich.table import Table

    from hpo.study import Holder, Step, StudyFolder, WorkedOn

TRASH = ".trash"


@dataclass(frozen=True)
class Left:
    """A step that was interrupted or failed, and the folder that records it."""

    root: Path
    step: Step

    @property
    def command(self) -> str:
        many = ["torchrun", "--nproc-per-node", str(self.step.processes), "-m", "hpo.cli"]
        return shlex.join([*(many if self.step.processes > 1 else ["hpo"]), *self.step.words])

    @property
    def when(self) -> datetime:
        return self.step.when.astimezone()

    @property
    def says(self) -> str:
        state = self.step.state if self.step.ended_utc else "killed; started"
        return f"{self.command} ({state} {self.when:%-d %b %H:%M})"


@click.command()
@options.study_name
@click.option(
    "--notify", multiple=True, metavar="URL", help="As for the command itself: its URLs are not stored."
)
@options.runs
@click.pass_context
def resume(ctx: click.Context, name: str | None, notify: tuple[str, ...], runs: Path) -> None:
    """Go on with what was interrupted last. That is a search, confirm, transfer, train, evaluate or compare; it
    runs with its own arguments. NAME: a study, or the output folder of hpo train. Default: the last one of all."""
    left = _left(name, runs)
    if left.step.processes > 1:
        raise ConfigError(
            f"{left.says} ran on several GPUs, which hpo resume cannot start",
            f"in {left.step.cwd}, run: {left.command}",
        )
    group = ctx.find_root().command
    assert isinstance(group, click.Group)
    command = group.commands.get(left.step.words[0])
    takes = {param.name for param in command.params} if command else set()
    words = list(left.step.words)
    if "yes" in takes and "--yes" not in words:
        words.append("--yes")  # the question was answered when the command was started
    if "notify" in takes:
        words += [word for url in notify for word in ("--notify", url)]
    if left.step.notified and not notify and not os.environ.get("HPO_NOTIFY"):
        click.echo(
            "note: the URLs of --notify are not stored; give --notify again, or set HPO_NOTIFY", err=True
        )
    click.echo(clean_text(f"resuming: {left.says}"), err=True)
    if left.step.cwd and Path(left.step.cwd) != Path.cwd():
        try:
            os.chdir(left.step.cwd)
        except OSError:
            raise MachineError(
                f"cannot enter {left.step.cwd}, the folder in which the command was started",
                f"run: {left.command}",
            ) from None
        click.echo(clean_text(f"in {left.step.cwd}"), err=True)
    group.main(args=words, prog_name="hpo")


def _left(name: str | None, runs: Path) -> Left:
    """The step to go on with.  Raises ConfigError if nothing was interrupted, or if it is still running."""
    from hpo.study import RUNNING, steps, within_a_day

    roots = list(record_roots(name, runs))
    found = sorted((left for root in roots for left in _open(root)), key=lambda left: left.when, reverse=True)
    if not found:
        where = f" in {name}" if name else ""
        running = [step for root in roots for step in steps(root) if step.state == RUNNING]
        if running:
            raise ConfigError(
                f"nothing was interrupted{where}; {running[-1].step} is still running", "wait for it"
            )
        raise ConfigError(f"nothing was interrupted{where}", "list the studies and their states: hpo studies")
    newest = {left.root: left for left in reversed(found)}  # the last one of each folder
    rivals = within_a_day(sorted(newest.values(), key=lambda left: left.when, reverse=True))
    if len(rivals) == 1:
        return rivals[0]
    if not at_terminal():
        commands = [f"hpo resume {shlex.quote(str(left.root))}" for left in rivals]
        raise ConfigError(
            "several commands were interrupted within a day: " + "; ".join(left.says for left in rivals),
            "name one:",
            commands,
        )
    return ask_which("several commands were interrupted within a day", rivals, [left.says for left in rivals])


def _open(root: Path) -> list[Left]:
    from hpo.study import open_steps

    return [Left(root, step) for step in open_steps(root) if step.words]


def record_roots(name: str | None, runs: Path) -> Iterator[Path]:
    """The folders that can hold a record of commands: studies, and runs of ``hpo train``."""
    from hpo.study import WORK, find_folder, outside_studies, study_at, study_folder

    if name is None:
        yield from (path.parent for path in sorted(runs.glob(f"*/{WORK}")))
        yield from outside_studies()
        return
    path = Path(name)
    if "/" not in name and (study_folder(name, runs).root / WORK).is_file():
        yield study_folder(name, runs).root  # also a study whose first command was killed at once
    elif path.is_dir() and study_at(path) is None:
        yield path
        yield from (found.parent for found in sorted(path.glob(f"*.run/{WORK}")))
    else:
        yield find_folder(name, runs).root


@click.command()
@options.as_json("Print JSON.")
@options.runs
def studies(as_json: bool, runs: Path) -> None:
    """List the studies. Shows state, best score and last command; the study last worked on is first."""
    from hpo.terminal import json_text

    rows = [_row(one) for one in _worked_on(runs)]
    if as_json:
        click.echo(json_text(rows))
        return
    if not rows:
        click.echo(f"no study in {clean_text(str(runs))}; start one: hpo search --base mini-sd15 --trials 12")
        return
    screen = console()
    if not screen.is_terminal:
        click.echo("\t".join(rows[0]))
        for row in rows:
            click.echo("\t".join("" if value is None else clean_text(str(value)) for value in row.values()))
        return
    screen.print(_table(rows))


def _worked_on(runs: Path) -> list[WorkedOn]:
    from hpo.study import worked_on

    return worked_on(runs)


def _row(one: WorkedOn) -> dict[str, Any]:
    """One study as text and numbers.  ``best``: the confirmed score if there is one, else the best search score."""
    from hpo.study import TOTAL, database_errors, open_study, read_json, standing

    folder = one.folder
    row: dict[str, Any] = {"study": folder.name, "state": "", "trials": None, "of": None, "best": None, "score": None,
                           "confirmed": None, "last": one.step.step if one.step else "search",
                           "when": one.when.astimezone().isoformat(timespec="minutes")}  # fmt: skip
    try:
        with database_errors(folder):
            study = open_study(folder)
            now = standing(study, study.user_attrs.get(TOTAL, 0))
    except ToolError as error:
        return {**row, "state": f"cannot be read: {error.message}"}
    state = one.step.state if one.step else "finished" if not now.left else "interrupted"
    confirmed = read_json(folder.confirmed)
    row |= {"state": state, "trials": now.complete, "of": now.total}
    if now.best:
        row |= {"best": now.best[0], "score": round(now.best[1], 4), "confirmed": False}
    if confirmed is not None and isinstance(confirmed.get("score"), float):
        row |= {"best": confirmed.get("winner"), "score": round(confirmed["score"], 4), "confirmed": True}
    return row


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    longest = max(len(row["study"]) for row in rows)
    table.add_column("study", overflow="fold", min_width=min(longest, 24))
    for name in ("trials", "best", "score"):
        table.add_column(name, no_wrap=True)
    table.add_column("last command", overflow="fold")
    for row in rows:
        score = (
            ""
            if row["score"] is None
            else f"{row['score']:.4f}" + ("" if row["confirmed"] else " unconfirmed")
        )
        when = datetime.fromisoformat(row["when"])
        counts = "" if row["trials"] is None else f"{row['trials']}/{row['of']}"
        cells = (row["study"], counts, "" if row["best"] is None else f"trial {row['best']}", score,
                 f"{row['last'].split()[0]} {row['state']}, {when:%-d %b %H:%M}")  # fmt: skip
        table.add_row(*(Text(clean_text(str(cell))) for cell in cells))
    return table


@click.command()
@click.argument("name", shell_complete=complete_name)
@click.option("--yes", is_flag=True, help="Do not ask.")
@options.runs
def delete(name: str, yes: bool, runs: Path) -> None:
    """Move the study NAME to the trash. Takes its trials, its confirmation and its target trials along, and says how
    much disk space they take. Nothing is lost until the trash folder is deleted."""
    folder = chosen_study(name, runs, own=True)
    path = Path(name)
    if "/" in name and path.resolve() != folder.root.resolve():
        raise ConfigError(
            f"{name} is only a part of the study {folder.name}",
            f"to delete the whole study: hpo delete {folder.words}",
        )
    from hpo.study import StudyFolder, place_of

    parts = family(folder)
    check_unused(parts)
    size = sum(folder_bytes(part.root) for part in parts)
    names = ", ".join(clean_text(str(part.root)) for part in parts)
    click.echo(f"{names}: {size / 1e6:.1f} MB")
    if not agreed("move this to the trash?", yes=yes):
        return
    place = folder.root.parent / TRASH / f"{folder.name}-{datetime.now():%Y%m%d-%H%M%S}"
    _move(parts, place)
    shown = shlex.quote(str(place))
    click.echo(
        clean_text(f"moved to {place}; to get it back: mv {shown}/* {shlex.quote(str(folder.root.parent))}/")
    )
    click.echo(clean_text(f"to delete it for good and free {size / 1e6:.1f} MB: rm -r {shown}"))
    servers = [one for part in parts if (one := place_of(StudyFolder(place / part.name))) is not None]
    if servers:
        click.echo(
            "its trials are still in the database, and getting it back needs them; to delete them for good, too "
            "(if ~/.pgpass does not have the password, write it into the address, as USER:PASSWORD@HOST):"
        )
    for server in servers:
        words = ["optuna", "delete-study", "--study-name", server.study, "--storage", server.url]
        click.echo(clean_text(f"  {shlex.join(words)}"))


def check_unused(parts: Sequence[StudyFolder], *, held: bool = False) -> None:
    """Raise MachineError if a command is working on one of the folders.  ``held``: this process holds their locks."""
    from hpo.study import RUNNING, holder, steps

    for part in parts:
        for other in _on_other_machines(part):
            raise MachineError(f"{other.words} works on {part.name}", "stop it first: Ctrl-C")
        pid = None if held else holder(part.locks / "use.lock")  # asking for an own lock would release it
        running = [step.step for step in steps(part.root) if step.state == RUNNING]
        if pid is not None or running:
            what = f"process {pid} works" if pid is not None else f"hpo {running[-1]} is working"
            raise MachineError(f"{what} on {part.name}", "stop it first: Ctrl-C")


def _on_other_machines(part: StudyFolder) -> list[Holder]:
    """The workers of a study in a database server.  None if the server is gone: then nobody can work on it."""
    from optuna.trial import TrialState

    from hpo.study import begun_study, database_errors, ownership_of, place_of

    if place_of(part) is None:
        return []
    with contextlib.suppress(MachineError), database_errors(part):
        study = begun_study(part)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if study else []
        found = ownership_of(part).runners(trial.number for trial in running)
        return [runner for runner in found.values() if runner is not None]
    return []


def _move(parts: list[StudyFolder], place: Path) -> None:
    """Move all the folders, or none of them.  They stay locked meanwhile, so that no search begins in one."""
    from hpo.study import alone

    moved: list[StudyFolder] = []
    with contextlib.ExitStack() as held:
        for part in parts:
            held.enter_context(
                alone(part.locks / "use.lock", f"works on {part.name}", "stop it first: Ctrl-C")
            )
        try:
            place.mkdir(parents=True)
            for part in parts:
                os.rename(part.root, place / part.name)
                moved.append(part)
        except OSError as error:
            for part in moved:
                with contextlib.suppress(OSError):
                    os.rename(place / part.name, part.root)
            raise machine_error(error, place) from error


def family(folder: StudyFolder) -> list[StudyFolder]:
    """The study, and the confirmations and target trials that belong to it."""
    from hpo.study import all_studies, parent_of

    return [folder, *(one for one in all_studies(folder.root.parent) if parent_of(one) == folder.name)]
