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
from trainer.errors import ConfigError, MachineError
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
        from hpo.study import database_errors, open_study, unneeded

        found = []
        for part in self.parts:
            with database_errors(part):
                found += unneeded(open_study(part), part, self.keep)
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
    asked = list(_all(runs, keep_best)) if every else [_cleaning(chosen_study(name, runs), keep_best)]
    if not every:
        check_unused(asked[0].parts)
    found = {cleaning.name: cleaning.unneeded() for cleaning in asked}
    total = 0
    for cleaning in asked:
        total += _say(cleaning, found[cleaning.name])
    if not any(found.values()):
        click.echo("nothing to free")
        return
    if not agreed(f"delete these files and free {_megabytes(total)}?", yes=yes):
        return
    freed = sum(_delete(cleaning, one_of_many=every) for cleaning in asked)
    click.echo(f"freed {_megabytes(freed)}")


def _all(runs: Path, keep: int | None) -> Iterator[Cleaning]:
    from hpo.study import worked_on

    for one in worked_on(runs):
        cleaning = _cleaning(one.folder, keep)
        try:
            check_unused(cleaning.parts)
        except MachineError as error:
            click.echo(clean_text(f"{cleaning.name} is left alone: {error.message}"), err=True)
            continue
        yield cleaning


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
    text = f"{cleaning.name}: {_megabytes(total)} ({'; '.join(parts)}); the best {cleaning.keep} keep theirs"
    click.echo(wrapped(clean_text(text)))
    return total


def _delete(cleaning: Cleaning, *, one_of_many: bool) -> int:
    """Delete what is unneeded now, which may be less than what was said."""
    try:
        with cleaning.alone():
            found = cleaning.unneeded()
            for one in found:
                one.delete()
            return sum(one.size for one in found)
    except MachineError as error:
        if not one_of_many:
            raise
        click.echo(clean_text(f"{cleaning.name} is left alone: {error.message}"), err=True)
        return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
