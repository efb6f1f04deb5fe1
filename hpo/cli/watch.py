"""``hpo watch``: one screen for a command that runs elsewhere.  It only reads, so it can be ended at any time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpo.cli import options
from hpo.cli.folders import family, record_roots
from hpo.cli.start import console
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from hpo.health import Watched

EVERY_SECONDS = 2.0


@click.command()
@options.study_name
@options.as_json("Print one JSON object and end.")
@options.runs
def watch(name: str | None, as_json: bool, runs: Path) -> None:
    """Watch a command that runs elsewhere. That is in another terminal, or on another machine that sees the folder.
    Shows stage, trial, step, time left, the health of the machine and the last alerts. NAME: a study, or the output
    folder of hpo train. Default: what runs, else what ran last. Only reads files; Ctrl-C leaves the run alone."""
    from hpo.terminal import json_text, watch_json, watch_screen

    root = _root(name, runs)
    seen = _seen(root)
    if as_json:
        click.echo(json_text(watch_json(seen)))
        return
    screen = console()
    if not (screen.is_terminal and seen.is_running):
        screen.print(watch_screen(seen, min(screen.width, 100)))
        return
    from rich.live import Live

    try:
        with Live(console=screen, auto_refresh=False) as live:
            while True:
                live.update(watch_screen(seen, min(screen.width, 100)), refresh=True)
                if not seen.is_running:
                    return
                time.sleep(EVERY_SECONDS)
                seen = _seen(root)
    except KeyboardInterrupt:
        return


def _root(name: str | None, runs: Path) -> Path:
    from hpo.health import newest
    from hpo.study import StudyFolder

    found = list(record_roots(name, runs))
    root = newest(found)
    if root is None and name:  # a study of an earlier version has no such records
        root = next((one for one in found if StudyFolder(one).has_study), None)
    if root is None:
        raise ConfigError(
            f"no command is recorded in {name or runs}", "list the studies and their states: hpo studies"
        )
    return root


def _seen(root: Path) -> Watched:
    from hpo.health import watched
    from hpo.study import StudyFolder, resume_words

    study = StudyFolder(root)
    beside: Sequence[Path] = [one.root for one in family(study)[1:]] if study.has_study else ()
    return watched(root, f"hpo resume {resume_words(root)}", beside)
