"""``hpo inspect``, ``export`` and ``dataset``: commands that inspect files or write files for other tools."""

from __future__ import annotations

from pathlib import Path

import click

from hpo.cli import options
from hpo.cli.options import PATH
from hpo.cli.start import calm_libraries, console, sign_of_life
from hpo.cli.which import chosen_study
from trainer.bases import KNOWN_BASES


@click.command()
@click.argument("file", type=PATH)
@options.as_json("Print JSON, with the full metadata.")
def inspect(file: Path, as_json: bool) -> None:
    """Show what a LoRA file contains. Prints kind, modules, ranks, alphas, settings and metadata. Works with
    files from any tool."""
    calm_libraries()
    from hpo.cli import inspect as inspectcmd
    from hpo.terminal import json_text

    facts = inspectcmd.inspect(file)
    if as_json:
        click.echo(json_text(inspectcmd.as_json(facts)))
    else:
        inspectcmd.show(console(), facts)


@click.group()
def export() -> None:
    """Export settings or trials for other tools."""


@export.command()
@click.argument("source", type=PATH, metavar="FILE")
@click.argument("folder", type=PATH, metavar="OUT_DIR")
@options.base("Base model to use instead of the one in FILE.")
@options.data("Training images to use instead of those in FILE.")
def kohya(source: Path, folder: Path, base: str | None, data: Path | None) -> None:
    """Write sd-scripts' config.toml and dataset.toml to OUT_DIR. FILE: a TOML file, a LoRA, or the folder of
    a run or trial."""
    calm_libraries()
    from hpo.cli.export import export_kohya
    from trainer.text import clean_text

    named = {"pretrained_model_name_or_path": base, "train_data_dir": data and str(data)}
    places = {name: value for name, value in named.items() if value}
    export_kohya(source, folder, places, lambda text: click.echo(clean_text(text)))


@export.command()
@options.study_name
@click.option("--output", type=PATH, metavar="FILE", help="File to write. Default: standard output.")
@options.runs
def csv(name: str | None, output: Path | None, runs: Path) -> None:
    """Write a study's trials as CSV, one row a trial. Optuna's columns, then score parts, seconds and settings."""
    from hpo.cli.tables import write_csv

    write_csv(chosen_study(name, runs, own=True), output)


@export.command()
@options.study_name
@click.option("--output", type=PATH, metavar="FILE", help="File to write. Default: NAME.parquet.")
@options.runs
def parquet(name: str | None, output: Path | None, runs: Path) -> None:
    """Write a study's trials as a Parquet file, with the columns of hpo export csv. Needs pyarrow."""
    from hpo.cli.tables import write_parquet

    write_parquet(chosen_study(name, runs, own=True), output)


@click.group()
def dataset() -> None:
    """Check and prepare datasets."""


@dataset.command()
@click.argument("subject", type=click.Choice(["character", "style", "object"]))
@click.argument("folder", type=PATH, metavar="DIR")
def demo(subject: str, folder: Path) -> None:
    """Write demo images for the miniature bases to DIR. 24 for training and 8 held out (style: 24 held out)."""
    from hpo.terminal import command
    from trainer.bases import write_subject

    write_subject(subject, folder)
    preset = (
        ("--preset", subject) if subject == "object" else ()
    )  # its folder's name does not say that it is one
    following = command("hpo", "search", "--base", "mini-sd15", "--data", folder, "--trials", "12", *preset)
    click.echo(f"wrote the demo images ({subject})")
    click.echo(f"next: {following}")


@dataset.command()
@click.argument("folder", type=PATH, metavar="DIR")
@click.option(
    "--for",
    "base",
    type=click.Choice(list(KNOWN_BASES)),
    default="sd15",
    show_default=True,
    help="Base that will be trained. Sets the image size and token limits to check.",
)
@options.trigger
@options.class_word("What the subject is (girl, style, vase). Default: from the folder name.")
@options.sets("A training setting to check with.")
@options.as_json("Print JSON, with every file.")
def check(
    folder: Path, base: str, trigger: str | None, class_word: str | None, sets: tuple[str, ...], as_json: bool
) -> None:
    """Find problems in the images and captions of DIR. Lists everything that would stop training or harm its
    result, and how to fix it.

    The exit code is 0 if DIR can be trained on, and 3 if not."""
    calm_libraries()
    from hpo.cli.dataset import DatasetRequest
    from hpo.cli.dataset import check as run

    sign_of_life("reading the images …")
    request = DatasetRequest(
        folder=folder, base=base, trigger=trigger, class_word=class_word, sets=sets, as_json=as_json
    )
    run(request, console(), click.echo)


@dataset.command(cls=options.Renamed, renamed={"--name": "--trigger"})
@click.argument("source", type=PATH, metavar="SRC")
@click.argument("folder", type=PATH, metavar="OUT")
@click.option(
    "--repeats",
    type=click.IntRange(1, 10_000),
    default=10,
    show_default=True,
    help="How often each image is used per epoch.",
)
@click.option(
    "--trigger", required=True, help="The trigger word: one word that the base model does not know."
)
@options.class_word("What the subject is: girl, style, vase …")
@click.option(
    "--held-out",
    type=click.IntRange(0, 10_000),
    default=0,
    show_default=True,
    help="Number of images for held_out/: not used in training, only to score the result.",
)
@click.option("--skip-corrupt", is_flag=True, help="Skip images that cannot be read.")
def prepare(
    source: Path,
    folder: Path,
    repeats: int,
    trigger: str,
    class_word: str | None,
    held_out: int,
    skip_corrupt: bool,
) -> None:
    """Copy SRC to OUT in the folder layout of kohya's tools. Images and captions go to OUT/10_trigger class/."""
    from hpo.cli.dataset import prepare as run
    from trainer.data import Wish

    sign_of_life("copying the images …")
    wish = Wish(trigger, class_word or "", repeats, held_out, skip_corrupt)
    run(source, folder, wish, click.echo)
