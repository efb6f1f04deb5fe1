"""``hpo status``: a study's trials, its best trial and its progress, also while a search runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpo.cli import options
from hpo.cli.start import console
from hpo.cli.which import chosen_study

if TYPE_CHECKING:
    import optuna

    from hpo.study import StudyFolder, StudyTable


@click.command()
@options.study_name
@options.as_json("Print everything as JSON.")
@options.runs
def status(name: str | None, as_json: bool, runs: Path) -> None:
    """Show a study's trials. Without NAME: the study last worked on. Works while a search runs.

    At a terminal, the table fits its width and leaves out the settings that matter least. In a pipe, it is
    whole: tab-separated values, then lines that begin with #."""
    from optuna.trial import TrialState

    from hpo.study import database_errors, open_study, ownership_of, study_table

    folder = chosen_study(name, runs, own=True)
    with database_errors(folder):
        study = open_study(folder)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        runners = ownership_of(folder).runners(trial.number for trial in running)
        table = study_table(study, folder, runners.get)
        if as_json:
            _print_json(folder, table)
        elif console().is_terminal:
            _print_table(study, folder, table)
        else:
            _print_tsv(study, folder, table)


def _print_json(folder: StudyFolder, table: StudyTable) -> None:
    from hpo.study import read_json
    from hpo.terminal import json_text, status_json

    click.echo(json_text(status_json(table, read_json(folder.confirmed))))


def _print_table(study: optuna.Study, folder: StudyFolder, table: StudyTable) -> None:
    from hpo.terminal import head_lines, reason_lines, status_table, study_line, wrapped

    screen = console()
    for line in (*head_lines(table), *_results(folder, table)):
        click.echo(wrapped(line, screen.width - 1))
    shown, left_out = status_table(table, screen.width)
    if table.rows:
        screen.print(shown)
    for line in (*left_out, *reason_lines(table), *_remarks(study, folder, table)):
        click.echo(wrapped(line, screen.width - 1))
    click.echo(wrapped(study_line(folder.name, table.now, table.kind), screen.width - 1))


def _print_tsv(study: optuna.Study, folder: StudyFolder, table: StudyTable) -> None:
    from hpo.terminal import head_lines, reason_lines, status_tsv, study_line

    for line in status_tsv(table):
        click.echo(line)
    lines = (
        *head_lines(table), *_results(folder, table), *reason_lines(table), *_remarks(study, folder, table)
    )  # fmt: skip
    for line in lines:
        click.echo(f"# {line.strip()}")
    click.echo(f"# {study_line(folder.name, table.now, table.kind)}")


def _results(folder: StudyFolder, table: StudyTable) -> Iterator[str]:
    """The confirmed result, then the best of the search."""
    from hpo.confirm import result_lines
    from hpo.terminal import best_lines

    yield from result_lines(folder, table.kind)
    yield from best_lines(table)


def _remarks(study: optuna.Study, folder: StudyFolder, table: StudyTable) -> Iterator[str]:
    """The convergence alert, the noise of the scores and what to do next."""
    from hpo.confirm import status_lines
    from hpo.study import learning_lines
    from trainer.text import clean_text

    if folder.alert.is_file():
        yield clean_text(folder.alert.read_text(encoding="utf-8").splitlines()[0])
    nothing = learning_lines(study, folder)
    yield from nothing
    yield from status_lines(study, folder, table, learned=not nothing)
