"""``hpo best`` and ``hpo importance``: what a study found.

Does not own which trial is the best (``hpo.study.best``), importance (``hpo.study.importance``) or the settings file
(``hpo.cli.export``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpo.cli import options
from hpo.cli.start import calm_libraries, console
from hpo.cli.which import chosen_study
from trainer.errors import ConfigError
from trainer.text import clean_text

if TYPE_CHECKING:
    from hpo.study import BestTrial, StudyFolder

BAR = 30  # columns


@click.command()
@options.study_name
@click.option(
    "--toml",
    "as_toml",
    is_flag=True,
    help="Print its settings as a file for sd-scripts' --config_file and for hpo train.",
)
@options.as_json("Print JSON.")
@options.runs
def best(name: str | None, as_toml: bool, as_json: bool, runs: Path) -> None:
    """Show a study's best trial and its settings. That is the confirmed winner, or the best of the search until there
    is one. To train with them: hpo best NAME --toml > best.toml; hpo train best.toml"""
    if as_toml and as_json:
        raise ConfigError("--toml and --json exclude each other", "give one of them")
    folder = chosen_study(name, runs)
    from hpo.study import best_trial, database_errors, open_study

    with database_errors(folder):
        found = best_trial(open_study(folder), folder)
    if as_json:
        from hpo.terminal import json_text

        click.echo(json_text(_json(folder, found)))
    elif as_toml:
        calm_libraries()
        from hpo.cli.export import as_kohya_file
        from hpo.terminal import command

        root = folder.trial(found.number).root
        try:
            text = as_kohya_file(root, _head(folder, found))
        except ConfigError as error:
            if "--base" not in error.hint:
                raise
            raise ConfigError(
                error.message, f"write it with {command('hpo', 'export', 'kohya', root)} OUT_DIR --base BASE"
            ) from None
        click.echo(text, nl=False)
    else:
        _print(folder, found)


def _print(folder: StudyFolder, found: BestTrial) -> None:
    from hpo.terminal import short, wrapped

    screen = console()
    lines = [f"study {folder.name}, {_which(found)}", f"  score {_score(found)}"]
    if found.beats_trial0 is False:
        lines.append("  no trial beats trial 0, the usual settings")
    lines += [f"  {name} = {short(value)}" for name, value in found.settings.items()]
    lora = folder.trial(found.number).lora
    if lora.is_file():
        lines.append(f"LoRA: {lora}")
    if not found.confirmed:
        lines.append(f"a search score is optimistic; to confirm it: hpo confirm {folder.words}")
    lines.append(f"all settings as a file: hpo best {folder.words} --toml > best.toml")
    for line in lines:
        click.echo(wrapped(clean_text(line), screen.width - 1))


def _which(found: BestTrial) -> str:
    how = f"confirmed ({found.how})" if found.confirmed else "the best of the search, not confirmed"
    return f"trial {found.number}: {how}"


def _score(found: BestTrial) -> str:
    if found.interval is not None:
        return f"{found.score:.4f} (95 % {found.interval[0]:.4f} … {found.interval[1]:.4f})"
    return f"{found.score:.4f} ± {found.se or 0.0:.4f}"


def _head(folder: StudyFolder, found: BestTrial) -> list[str]:
    return [f"study {folder.name}, {_which(found)}, score {_score(found)}"]


def _json(folder: StudyFolder, found: BestTrial) -> dict[str, object]:
    from hpo.study import read_json

    files = folder.trial(found.number)
    return {
        "study": folder.name,
        "trial": found.number,
        "confirmed": found.confirmed,
        "how": found.how or None,
        "score": found.score,
        "se": found.se,
        "interval": found.interval,
        "beats_trial0": found.beats_trial0,
        "settings": dict(found.settings),
        "train": (read_json(files.params) or {}).get("train"),
        "lora": files.lora if files.lora.is_file() else None,
    }


@click.command()
@options.study_name
@options.as_json("Print JSON.")
@options.runs
def importance(name: str | None, as_json: bool, runs: Path) -> None:
    """Show how much each setting matters. As Optuna estimates it from the scores of the trials (PED-ANOVA)."""
    folder = chosen_study(name, runs)
    from hpo.study import database_errors, open_study
    from hpo.study import importance as of
    from hpo.terminal import json_text, wrapped

    with database_errors(folder):
        found = of(open_study(folder), folder)
    if as_json:
        value = {
            "study": folder.name,
            "trials": found.trials,
            "infeasible": found.infeasible,
            "importance": dict(found.shares),
            "remark": found.remark,
        }
        click.echo(json_text(value))
        return
    screen = console()
    beside = f", {found.infeasible} of them infeasible" if found.infeasible else ""
    width = max(map(len, found.shares))
    click.echo(
        clean_text(f"study {folder.name}: importance for the score, from {found.trials} trials{beside}")
    )
    longest = max(found.shares.values()) or 1.0
    for parameter, share in found.shares.items():
        bar = "█" * round(min(BAR, screen.width - width - 9) * share / longest)
        click.echo(f"{clean_text(parameter):{width}}  {100 * share:3.0f} %  {bar}".rstrip())
    click.echo(wrapped(found.remark, screen.width - 1))
