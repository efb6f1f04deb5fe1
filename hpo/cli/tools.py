"""``hpo inspect``, ``export`` and ``dataset``: the commands that look at files, or make files for other tools."""

from __future__ import annotations

from pathlib import Path

import click

from hpo.cli import options
from hpo.cli.options import PATH
from hpo.cli.start import calm_libraries, console
from trainer.bases import KNOWN_BASES


@click.command()
@click.argument("file", type=PATH)
@options.as_json("The same for scripts, with all metadata in full.")
def inspect(file: Path, as_json: bool) -> None:
    """Show what a LoRA file holds: kind, modules, ranks, alphas, settings, metadata. Any tool's files."""
    calm_libraries()
    import json

    from hpo.cli import inspect as inspectcmd

    facts = inspectcmd.inspect(file)
    if as_json:
        click.echo(json.dumps(inspectcmd.as_json(facts), indent=1))
    else:
        inspectcmd.show(console(), facts)


@click.group()
def export() -> None:
    """Settings for other tools."""


@export.command()
@click.argument("source", type=PATH, metavar="FILE")
@click.argument("folder", type=PATH, metavar="OUT_DIR")
@options.base("The base model, instead of the file's.")
@options.data("Images, instead of the file's.")
def kohya(source: Path, folder: Path, base: str | None, data: Path | None) -> None:
    """Write FILE (TOML, LoRA, run or trial folder) as sd-scripts' config.toml and dataset.toml into OUT_DIR."""
    calm_libraries()
    from hpo.cli.export import export_kohya
    from trainer.text import clean_text

    named = {"pretrained_model_name_or_path": base, "train_data_dir": data and str(data)}
    places = {name: value for name, value in named.items() if value}
    export_kohya(source, folder, places, lambda text: click.echo(clean_text(text)))


@click.group()
def dataset() -> None:
    """Datasets."""


@dataset.command()
@click.argument("subject", type=click.Choice(["character", "style", "object"]))
@click.argument("folder", type=PATH, metavar="DIR")
def demo(subject: str, folder: Path) -> None:
    """Write a demo subject for the miniature bases into DIR: 24 training images and 8 held out, 24 of the style."""
    import shlex

    from trainer.bases import write_subject
    from trainer.text import clean_text

    write_subject(subject, folder)
    place = shlex.quote(clean_text(str(folder)))
    click.echo(f"{subject} written; next: hpo search --base mini-sd15 --data {place} --trials 12")


@dataset.command()
@click.argument("folder", type=PATH, metavar="DIR")
@click.option(
    "--for",
    "base",
    type=click.Choice(list(KNOWN_BASES)),
    default="sd15",
    show_default=True,
    help="What will be trained: decides size and tokens.",
)
@options.trigger
@options.class_word("What the subject is. Unset: from the folder's name.")
@options.sets("A setting that training will have.")
@options.as_json("The same for scripts, with every file.")
def check(
    folder: Path, base: str, trigger: str | None, class_word: str | None, sets: tuple[str, ...], as_json: bool
) -> None:
    """Look for everything in DIR that would stop a training or spoil its result, and say what to do.

    Ends with 0 if DIR can be trained on, with 3 if not."""
    calm_libraries()
    from hpo.cli.dataset import DatasetRequest
    from hpo.cli.dataset import check as run

    request = DatasetRequest(
        folder=folder, base=base, trigger=trigger, class_word=class_word, sets=sets, as_json=as_json
    )
    run(request, console(), click.echo)


@dataset.command()
@click.argument("source", type=PATH, metavar="SRC")
@click.argument("folder", type=PATH, metavar="OUT")
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="How often an epoch shows each image.",
)
@click.option("--name", required=True, help="The trigger word: one word that the base does not know.")
@options.class_word("What the subject is: girl, style, vase …")
@click.option(
    "--held-out",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Images set apart in held_out/: never trained on, they judge the result.",
)
@click.option("--skip-corrupt", is_flag=True, help="Leave out images that cannot be read.")
def prepare(
    source: Path,
    folder: Path,
    repeats: int,
    name: str,
    class_word: str | None,
    held_out: int,
    skip_corrupt: bool,
) -> None:
    """Copy the images and captions of SRC into OUT as kohya's tools want them: OUT/10_name class/."""
    from hpo.cli.dataset import prepare as run
    from trainer.data import Wish

    wish = Wish(name, class_word or "", repeats, held_out, skip_corrupt)
    run(source, folder, wish, click.echo)
