"""The options that several commands share, each declared once, and the types of their values.

Owns names, types and the help that is the same everywhere; an option whose help differs takes it as an
argument. Options of one command stand at that command.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Command], Command]
PATH = click.Path(path_type=Path)


class Finite(click.FloatRange):
    """click's FloatRange without nan and infinity: "nan" reads as a number, and no comparison refuses it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is no amount; give a number.", param, ctx)
        return number


def base(help: str, *, required: bool = False) -> Option:
    return click.option("--base", required=required, metavar="BASE", help=help)


def data(help: str) -> Option:
    return click.option("--data", type=PATH, metavar="DIR", help=help)


def references(help: str) -> Option:
    return click.option("--references", type=PATH, metavar="DIR", help=help)


def class_word(help: str) -> Option:
    return click.option("--class", "class_word", help=help)


def clip(help: str) -> Option:
    return click.option("--clip", metavar="MODEL[:WEIGHTS]", help=help)


def device(help: str = "cpu, cuda, cuda:1 … Unset: the GPU if there is one.") -> Option:
    return click.option("--device", help=help)


def study(metavar: str, help: str) -> Option:
    return click.option("--study", metavar=metavar, help=help)


def sets(help: str = "A setting that wins over the file.") -> Option:
    return click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help=help)


def as_json(help: str) -> Option:
    return click.option("--json", "as_json", is_flag=True, help=help)


prompts = click.option("--prompts", type=PATH, metavar="FILE", help="Your own prompts, one a line or TOML.")
trigger = click.option("--trigger", help="The subject's trigger word. Unset: from the folder's name.")
runs = click.option(
    "--runs", type=PATH, default=Path("runs"), show_default=True, help="Folder that holds the studies."
)
study_name = click.argument("name", required=False)


def judged_by(command: Command) -> Command:
    """What hpo evaluate and hpo compare take from the command line instead of from the run."""
    for option in reversed(
        (
            data("The images it was trained on."),
            references(
                "Images it was not trained on, to measure likeness with. Unset: held_out/, or the study's."
            ),
            prompts,
            clip("Scorer, as in hpo search."),
            trigger,
            class_word("What the subject is. Unset: from the folder's name."),
            click.option("--base", default="", metavar="BASE", help="The base model. Unset: the run's own."),
            study(
                "NAME|FILE",
                "By whose preset, [score], [limits] and prompts: a study file, as in hpo search, or "
                "runs/NAME. Unset: the study that the run comes from, else the base's usual one.",
            ),
            device(),
        )
    ):
        command = option(command)
    return command
