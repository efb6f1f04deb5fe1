"""``hpo``: the group of all commands, and what the tool's errors look like on a terminal.

Each command parses, calls one function and prints.  Importing them loads no torch, no Optuna.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from hpo.cli import status, studies, tools, trainings
from trainer.errors import Interrupted, ToolError


def print_error(error: ToolError) -> None:
    """What and where, and what to do: two lines, nothing in them that a terminal would act on."""
    from trainer.text import clean_text

    if isinstance(error, Interrupted):
        what, then = "", "next: "
    else:
        what, then = "error: ", "hint: "
    click.echo(what + clean_text(error.message), err=True)
    if error.hint:
        click.echo(then + clean_text(error.hint), err=True)


class Commands(click.Group):
    """click's group, with the tool's own errors as two lines and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ToolError as error:
            print_error(error)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped at once; the same command goes on", err=True)
            sys.exit(130)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(0)


def version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as installed

        click.echo(f"hpo {installed('lora-hpo')}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=version, help="Show the version."
)
def main() -> None:
    """Find the best LoRA settings for your images: search on SD1.5, score by images, never lose a trial."""


for command in (
    studies.search,
    status.status,
    studies.confirm,
    studies.dashboard,
    studies.transfer,
    trainings.plan,
    trainings.train,
    trainings.evaluate,
    trainings.compare,
    tools.inspect,
    tools.export,
    tools.dataset,
):
    main.add_command(command)
