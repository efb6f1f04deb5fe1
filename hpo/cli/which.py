"""The NAME argument of every command: completion with Tab, and the question which study is meant.

Does not own the rule (``hpo.study.which``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from hpo.study import StudyFolder

T = TypeVar("T")


def chosen_study(name: str | None, runs: Path, *, own: bool = False) -> StudyFolder:
    """The ``StudyFolder`` that a command works on.

    ``own``: the command also works on a confirmation or on target trials; otherwise their study is used.  Says on
    standard error which study it is, unless it was named.  Raises ConfigError.
    """
    from hpo.study import SeveralStudies, find_folder, parent_of, study_folder
    from trainer.text import clean_text

    try:
        folder = find_folder(name, runs)
    except SeveralStudies as error:
        if not at_terminal():
            raise
        question = "several studies were worked on within a day:"
        from hpo.night import answered

        chosen = ask_which(
            question,
            [one.folder for one in error.worked],
            [f"{one.folder.name}, {one.says}" for one in error.worked],
        )
        answered(name=str(chosen.root.absolute()))
        return chosen
    parent = None if own else parent_of(folder)
    if parent is not None:
        found = study_folder(parent, folder.root.parent)
        if found.has_study:
            click.echo(f"study {clean_text(parent)}, which {clean_text(folder.name)} belongs to", err=True)
            return found
    if name is None:
        click.echo(f"study {clean_text(folder.name)}, the one last worked on", err=True)
    return folder


def new_study(name: str, runs: Path) -> tuple[str, Path]:
    """The name and runs folder of a study that may not exist yet: NAME, runs/NAME or a path inside a study."""
    from hpo.study import study_at

    path = Path(name)
    if "/" not in name:
        return name, runs
    found = study_at(path)
    if found is not None:
        return found.name, found.root.parent
    return (path.name, runs) if path.parent.resolve() == runs.resolve() else (name, runs)


def at_terminal() -> bool:
    """Whether a person can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


def ask_which(question: str, choices: Sequence[T], says: Sequence[str]) -> T:
    """Ask at the terminal which one is meant.  Enter takes the first."""
    from hpo.night import asking
    from trainer.text import clean_text

    click.echo(clean_text(question), err=True)
    for number, text in enumerate(says, 1):
        click.echo(f"  {number}  {clean_text(text)}", err=True)
    with asking():
        place = click.prompt("which one", type=click.IntRange(1, len(choices)), default=1, err=True)
    return choices[place - 1]


def asker() -> Callable[[str, tuple[str, ...]], str] | None:
    """What asks at the terminal: (question, what may be answered, the first by default; empty: any text; only "":
    any text or none) → the answer.  None if there is no terminal."""

    def ask(question: str, answers: tuple[str, ...]) -> str:
        from hpo.night import asking
        from trainer.text import clean_text

        kind, default = click.Choice(answers) if any(answers) else str, next(iter(answers), None)
        shown = clean_text(question)
        with asking():
            return str(click.prompt(shown, type=kind, default=default, show_default=bool(default), err=True))

    return ask if at_terminal() else None


def complete_name(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of studies in --runs that begin with the typed text, then files and folders."""
    from hpo.study import all_studies

    runs = ctx.params.get("runs") or Path("runs")
    names = [folder.name for folder in all_studies(Path(runs)) if folder.name.startswith(incomplete)]
    return [*map(CompletionItem, names), CompletionItem(incomplete, type="file")]


def agreed(question: str, *, yes: bool) -> bool:
    """Ask before something expensive or final.  The answer may come through a pipe.

    Without a terminal and without an answer on standard input, raises ConfigError that names --yes.
    """
    from hpo.night import answered, asking
    from trainer.errors import ConfigError
    from trainer.text import clean_text

    if yes:
        return True
    if at_terminal():
        with asking():
            said = click.confirm(question, default=False)
        if said:
            answered("--yes")
        else:
            click.echo("nothing was done", err=True)
        return said
    click.echo(f"{question} [y/N]: ", nl=False)
    for line in sys.stdin or ():
        answer = line.strip().lower()
        click.echo(clean_text(answer[:20]))
        if answer in ("y", "yes"):
            answered("--yes")
            return True
        if answer in ("", "n", "no"):
            click.echo("nothing was done", err=True)
            return False
        click.echo(f"{question} [y/N]: ", nl=False)
    click.echo("")
    raise ConfigError(
        "nothing was done: there is no terminal to ask at", "add --yes to go on without a question"
    )
