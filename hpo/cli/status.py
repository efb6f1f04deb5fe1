"""``hpo status``: a study's trials, its best trial and its progress, also while a search runs."""

from __future__ import annotations

from pathlib import Path

import click

from hpo.cli import options
from hpo.cli.start import console
from hpo.cli.which import chosen_study


@click.command()
@options.study_name
@options.runs
def status(name: str | None, runs: Path) -> None:
    """Show a study's trials. Without NAME: the study last worked on. Works while a search runs."""
    from hpo.confirm import status_lines
    from hpo.study import TOTAL, database_errors, holder, learning_lines, open_study, standing
    from hpo.terminal import best_line, status_table, study_line

    folder = chosen_study(name, runs, own=True)
    with database_errors(folder):
        study = open_study(folder)
        now = standing(study, study.user_attrs.get(TOTAL, 0))
        screen = console()
        screen.print(status_table(study, lambda number: holder(folder.trial_lock(number).path)))
        if line := best_line(study, now):
            click.echo(line)
        if folder.alert.is_file():
            screen.print(
                folder.alert.read_text(encoding="utf-8").splitlines()[0], markup=False, highlight=False
            )
        for line in [*learning_lines(study, folder), *status_lines(study, folder)]:
            click.echo(line)
        click.echo(study_line(folder.name, now))
