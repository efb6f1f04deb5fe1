"""``hpo doctor``: the machine examined."""

from __future__ import annotations

from pathlib import Path

import click

from hpo.cli import options
from hpo.cli.start import calm_libraries, console, sign_of_life
from trainer.errors import MachineError

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


@click.command()
@options.as_json("Print JSON.")
@options.runs
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, runs: Path) -> None:
    """Check this machine: GPU, driver, PyTorch, memory, disk, clock. Every line says what was found and what to do.

    The exit code is 0 if hpo works here (also without a GPU), and 5 if something must be mended."""
    calm_libraries()
    from hpo.machine import as_json as in_json
    from hpo.machine import examine, lines
    from hpo.terminal import json_text

    sign_of_life("asking the driver and PyTorch …")
    report = examine(runs)
    if as_json:
        click.echo(json_text(in_json(report)))
    else:
        from rich.text import Text

        out = console()
        for line, state in lines(report):
            text = Text(line)
            if not line.startswith("   "):
                text.stylize(STYLES[state], 0, 2)
            out.print(text, soft_wrap=True)
    if not report.usable:
        ctx.exit(MachineError.exit_code)
