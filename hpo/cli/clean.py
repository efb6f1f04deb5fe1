"""``hpo clean``: free the disk space of files that no trial needs any more.

Owns the question, and that no study is touched that a command works on.  Does not own which files are needed
(``hpo.study.retention``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpo.cli import options
from hpo.cli.folders import check_unused, family
from hpo.cli.which import agreed, chosen_study
from trainer.errors import ConfigError, ToolError
from trainer.text import clean_text

if TYPE_CHECKING:
    from hpo.study import StudyFolder, Unneeded


@dataclass(frozen=True)
class Cleaning:
    """A study with its confirmation and target trials, and how many trials keep their files."""

    parts: tuple[StudyFolder, ...]
    keep: int

    @property
    def name(self) -> str:
        return self.parts[0].name

    def unneeded(self) -> list[Unneeded]:
        """Raises ToolError for a study that cannot be read.  A part whose study was never begun has nothing."""
        from hpo.study import begun_study, database_errors, open_study, unneeded

        found = []
        for part in self.parts:
            with database_errors(part):
                study = open_study(part) if part == self.parts[0] else begun_study(part)
                if study is not None:
                    found += unneeded(study, part, self.keep)
        return found

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While no command works on it, and none can begin.  Raises MachineError otherwise."""
        from hpo.study import alone

        check_unused(self.parts)
        with contextlib.ExitStack() as held:
            for part in self.parts:
                held.enter_context(alone(part.locks / "use.lock", f"works on {part.name}"))
            check_unused(self.parts, held=True)
            yield


@click.command()
@options.study_name
@click.option("--all", "every", is_flag=True, help="All studies in --runs.")
@click.option(
    "--keep-best",
    type=click.IntRange(1, 10_000),
    metavar="K",
    help="Keep the files of the best K trials. Default: as in the search, else 3, which hpo confirm takes.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@options.runs
def clean(name: str | None, every: bool, keep_best: int | None, yes: bool, runs: Path) -> None:
    """Free disk space. Deletes LoRA files and drawn images of all but the best trials, and resume states that nothing
    needs. Says how much before it asks. Scores, metrics and grids of all trials stay, and everything of unfinished
    trials; a study that a command works on is left alone."""
    if every and name is not None:
        raise ConfigError("--all takes all studies, so no study can be named", "give one of the two")
    if every:
        from hpo.study import worked_on

        folders = [one.folder for one in worked_on(runs)]
    else:
        folders = [chosen_study(name, runs)]
    asked: list[tuple[Cleaning, list[Unneeded]]] = []
    for folder in folders:
        with _left_alone(folder) if every else contextlib.nullcontext():
            cleaning = _cleaning(folder, keep_best)
            check_unused(cleaning.parts)
            asked.append((cleaning, cleaning.unneeded()))
    total = sum(_say(cleaning, found) for cleaning, found in asked)
    if not any(found for _, found in asked):
        click.echo("nothing to free")
        return
    if not agreed(f"delete these files and free {_megabytes(total)}?", yes=yes):
        return
    freed = 0
    for cleaning, _ in asked:
        with _left_alone(cleaning.parts[0]) if every else contextlib.nullcontext():
            freed += _delete(cleaning)
    click.echo(f"freed {_megabytes(freed)}")


@contextlib.contextmanager
def _left_alone(folder: StudyFolder) -> Iterator[None]:
    """One study of several: a command works on it, or it cannot be read.  The others are cleaned all the same, and
    the exit code is 0, as that of ``hpo studies``."""
    try:
        yield
    except ToolError as error:
        click.echo(clean_text(f"{folder.name} is left alone: {error.message}"), err=True)


def _cleaning(folder: StudyFolder, keep: int | None) -> Cleaning:
    from hpo.study import usual_keep

    return Cleaning(tuple(family(folder)), usual_keep(folder) if keep is None else keep)


def _say(cleaning: Cleaning, found: Sequence[Unneeded]) -> int:
    """What would be deleted in one study; how many bytes that frees."""
    from hpo.terminal import wrapped

    if not found:
        return 0
    kinds = list(dict.fromkeys(one.kind for one in found))
    sizes = {kind: [one.size for one in found if one.kind == kind] for kind in kinds}
    parts = [
        f"{kind} of {len(of)} trial{'s'[: len(of) != 1]}, {_megabytes(sum(of))}" for kind, of in sizes.items()
    ]
    total = sum(one.size for one in found)
    keep = "the best trial keeps its" if cleaning.keep == 1 else f"the best {cleaning.keep} trials keep their"
    text = f"{cleaning.name}: {_megabytes(total)} ({'; '.join(parts)}); {keep} files"
    click.echo(wrapped(clean_text(text)))
    return total


def _delete(cleaning: Cleaning) -> int:
    """Delete what is unneeded now, which may be less than what was said.  Returns the bytes that this frees."""
    with cleaning.alone():
        found = cleaning.unneeded()
        for one in found:
            one.delete()
        return sum(one.size for one in found)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
