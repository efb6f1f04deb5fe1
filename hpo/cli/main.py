"""The commands.  Each parses, calls one function and prints.  Importing them loads no torch, no Optuna."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpo.cli.finite import Finite
from trainer.bases import KNOWN_BASES
from trainer.errors import Interrupted, ToolError

if TYPE_CHECKING:
    from rich.console import Console

RUNS_HELP = "Folder that holds the studies."


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


def file_option(name: str, text: str) -> Callable[[Any], Any]:
    return click.option(name, type=click.Path(path_type=Path), metavar="FILE", help=text)


@main.command()
@click.option(
    "--base",
    required=True,
    metavar="BASE",
    help="mini-sd15, mini-sdxl, sd15, a hub id, a diffusers folder or a .safetensors file.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Images: kohya folders (10_name class), or images with .txt captions. The miniature brings its own.",
)
@click.option(
    "--trials", type=click.IntRange(1, 10_000), default=30, show_default=True, help="The study's total."
)
@click.option("--study", metavar="FILE.toml", help="Study file, or the name of a shipped one.")
@click.option("--name", help="Name of the study's folder. Unset: made of the study file and the data.")
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Fix a setting (network_dim=16), or change a part of the study file (sampling.steps=10).",
)
@click.option(
    "--clip", metavar="MODEL[:WEIGHTS]", help="Scorer: an open_clip model with a tag or file, or a folder."
)
@file_option("--prompts", "Your own prompts, one a line or TOML.")
@click.option(
    "--references",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Images to measure likeness with, instead of held-out ones.",
)
@click.option("--trigger", help="The subject's trigger word. Unset: from the folder's name.")
@click.option(
    "--class", "class_word", help="What the subject is (girl, style, vase). Unset: from the folder's name."
)
@file_option("--enqueue", "A kohya configuration of your own, tried right after the usual settings.")
@click.option("--max-hours", type=Finite(min=0, min_open=True), help="Begin no trial after this time.")
@click.option("--device", help="cpu, cuda, cuda:1 … Unset: the GPU if there is one.")
@click.option(
    "--keep-best", type=click.IntRange(1), metavar="K", help="Keep the LoRA files of the best K trials only."
)
@click.option(
    "--notify", multiple=True, metavar="URL", help="Tell this apprise URL of convergence. Also: HPO_NOTIFY."
)
@click.option(
    "--stop-when-converged", is_flag=True, help="End the search once more trials are unlikely to help."
)
@click.option("--seed", type=click.IntRange(0), help="Seed of the study. Unset: the study file's.")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help=RUNS_HELP
)
def search(
    base: str,
    data: Path | None,
    clip: str | None,
    prompts: Path | None,
    references: Path | None,
    trigger: str | None,
    class_word: str | None,
    device: str | None,
    **words: Any,
) -> None:
    """Search LoRA settings. The same command goes on with a study that was stopped, killed or unplugged."""
    calm_libraries()
    from hpo.search import SearchRequest
    from hpo.search import search as run
    from hpo.study import Inputs

    inputs = Inputs(base, data, clip, prompts, references, trigger, class_word, device)
    run(SearchRequest(inputs, **words), console())


@main.command()
@click.argument("name", required=False)
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help=RUNS_HELP
)
def status(name: str | None, runs: Path) -> None:
    """Show a study's trials. Without NAME: the study that changed last. Works while a search runs."""
    from hpo.confirm import status_lines
    from hpo.study import TOTAL, database_errors, find_folder, holder, open_study, standing
    from hpo.terminal import best_line, status_table, study_line

    folder = find_folder(name, runs)
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
        for line in status_lines(study, folder):
            click.echo(line)
        click.echo(study_line(folder.name, now))


@main.command()
@click.argument("name", required=False)
@click.option("--top", type=click.IntRange(1, 100), default=3, show_default=True, help="How many trials.")
@click.option("--seeds", type=click.IntRange(1, 20), default=2, show_default=True, help="Trainings of each.")
@click.option("--rescore-only", is_flag=True, help="Train nothing: score the saved LoRA files.")
@click.option("--yes", is_flag=True, help="Do not ask after showing the cost.")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help=RUNS_HELP
)
def confirm(yes: bool, **words: Any) -> None:
    """Confirm a study's best trials beside trial 0: fresh training seeds, prompts that the search did not
    use. The same command goes on with a confirmation that was stopped, killed or unplugged."""
    calm_libraries()
    from hpo.confirm import ConfirmRequest
    from hpo.confirm import confirm as run

    def ask() -> bool:
        return yes or not sys.stdin.isatty() or click.confirm("go on?", default=True)

    run(ConfirmRequest(**words), console(), ask)


@main.command()
@click.argument("name", required=False)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Beyond this machine: there is no password."
)
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help=RUNS_HELP
)
def dashboard(name: str | None, port: int, host: str, runs: Path) -> None:
    """Open optuna-dashboard on a study, with every trial's images. Works while a search runs."""
    from hpo.search import serve
    from hpo.study import find_folder

    try:
        serve(find_folder(name, runs), host, port, lambda text: click.echo(text))
    except KeyboardInterrupt:
        click.echo("")


@main.command()
@click.argument("file", type=click.Path(path_type=Path), required=False, metavar="[FILE]")
@click.option(
    "--base", metavar="BASE", help="sdxl, sd15, mini-sdxl, mini-sd15, a folder or a .safetensors file."
)
@click.option(
    "--vram",
    type=Finite(0.1, 1000),
    default=16.0,
    show_default=True,
    metavar="GB",
    help="Of the card.",
)
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="A setting that wins over the file.")
@click.option("--table", is_flag=True, help="Predict the users' table of SDXL trainings (minutes).")
@click.option("--json", "as_json", is_flag=True, help="The same for scripts.")
def plan(file: Path | None, **words: Any) -> None:
    """Predict the peak GPU memory of training with FILE's settings, and what makes it fit. Needs no GPU, no
    weights and no images."""
    calm_libraries()
    from hpo.cli.plan import PlanRequest
    from hpo.cli.plan import plan as run

    run(PlanRequest(file, **words), console(), click.echo)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--dataset",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A dataset file in the form of sd-scripts' --dataset_config.",
)
@click.option(
    "--base",
    metavar="BASE",
    help="mini-sd15, mini-sdxl, sd15, sdxl, a hub id, a folder or a .safetensors file.",
)
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="Images, instead of the file's.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="A setting that wins over the file.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for LoRA files. Unset: the file's, or output.",
)
@click.option("--device", help="cpu, cuda, cuda:1 … Unset: the GPU if there is one.")
@click.option(
    "--dry-run", is_flag=True, help="Check everything and show what would be done; needs no weights."
)
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the same for scripts.")
def train(file: Path, **words: Any) -> None:
    """Train one LoRA from FILE: settings of this tool or of sd-scripts (TOML), a dataset file, a LoRA, or the
    folder of a run or trial. The same command goes on with a run that was stopped, killed or unplugged."""
    calm_libraries()
    from hpo.train import TrainRequest
    from hpo.train import train as run

    if words["as_json"] and not words["dry_run"]:
        raise click.UsageError("--json goes with --dry-run")
    run(TrainRequest(file, **words), console(), click.echo)


@main.command()
@click.option("--to", "to", required=True, metavar="FAMILY", help="sdxl, or mini-sdxl for the miniature.")
@click.option("--study", metavar="NAME", help="The study that was searched. Unset: the last one.")
@click.option(
    "--vram",
    type=Finite(min=1, max=10_000),
    metavar="GB",
    help="The card's memory. Unset: the profile's (sdxl-16gb: 16).",
)
@click.option(
    "--profile", metavar="NAME", help="sdxl-16gb, sdxl-keep, or a FILE.toml of your own. Unset: the family's."
)
@click.option(
    "--preset", metavar="NAME", help="conservative, balanced or aggressive. Unset: the profile's own."
)
@click.option(
    "--probes",
    type=click.IntRange(0, 32),
    default=0,
    show_default=True,
    help="Short runs on the target that correct what the rules cannot know; 6 is usual, the seventh "
    "switches the text encoders.",
)
@click.option(
    "--design", type=click.Choice(["ladder", "grid"]), help="How probes are chosen. Unset: the better one."
)
@click.option("--device", help="For probes: cpu, cuda, cuda:1 … Unset: the GPU if there is one.")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help=RUNS_HELP
)
def transfer(**words: Any) -> None:
    """Carry a study's best settings over to SDXL: a table of what changes and why, and the files of the run.
    With --probes the same command goes on with probes that were stopped."""
    calm_libraries()
    from hpo.transfer import TransferRequest, run

    run(TransferRequest(**words), console())


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The same for scripts, with all metadata in full.")
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


def judge_options(command: Any) -> Any:
    """What hpo evaluate and hpo compare take from the command line instead of from the run."""
    for option in reversed(
        (
            click.option(
                "--data", type=click.Path(path_type=Path), metavar="DIR", help="The images it was trained on."
            ),
            click.option(
                "--references",
                type=click.Path(path_type=Path),
                metavar="DIR",
                help="Images it was not trained on, to measure likeness with. Unset: held_out/, or the study's.",
            ),
            file_option("--prompts", "Your own prompts, one a line or TOML."),
            click.option("--clip", metavar="MODEL[:WEIGHTS]", help="Scorer, as in hpo search."),
            click.option("--trigger", help="The subject's trigger word. Unset: from the folder's name."),
            click.option("--class", "class_word", help="What the subject is. Unset: from the folder's name."),
            click.option("--base", default="", metavar="BASE", help="The base model. Unset: the run's own."),
            click.option(
                "--study",
                metavar="NAME|FILE",
                help="By whose preset, [score], [limits] and prompts: a study file, as in hpo search, or "
                "runs/NAME. Unset: the study that the run comes from, else the base's usual one.",
            ),
            click.option("--device", help="cpu, cuda, cuda:1 … Unset: the GPU if there is one."),
        )
    ):
        command = option(command)
    return command


@main.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@judge_options
def evaluate(run: Path, study: str | None, **words: Any) -> None:
    """Score every saved checkpoint of RUN, choose one, confirm it on other prompts, mark it best.safetensors.
    RUN: the output folder of hpo train, OUTPUT/name, a trial's folder, or a folder of LoRA files. The same
    command goes on with an evaluation that was stopped, killed or unplugged."""
    calm_libraries()
    from hpo.judge import evaluate as run_it
    from hpo.study import Inputs

    run_it(run, Inputs(**words), console(), study)


@main.command()
@click.argument("run_a", type=click.Path(path_type=Path), metavar="RUN_A")
@click.argument("run_b", type=click.Path(path_type=Path), metavar="RUN_B")
@judge_options
@click.option("--base-b", default="", metavar="BASE", help="RUN_B's base model. Unset: the run's own.")
@click.option(
    "--data-b", type=click.Path(path_type=Path), metavar="DIR", help="The images RUN_B was trained on."
)
def compare(
    run_a: Path, run_b: Path, study: str | None, base_b: str, data_b: Path | None, **words: Any
) -> None:
    """Compare the LoRAs of two runs, perhaps on two bases, on the same prompts. RUN: as in hpo evaluate, or
    one LoRA file; the marked checkpoint is taken, else the result. --base, --data, --trigger and --class
    describe RUN_A, whose prompts both draw."""
    calm_libraries()
    from hpo.judge import compare as run_it
    from hpo.study import Inputs

    run_it((run_a, run_b), Inputs(**words), console(), study, base_b, data_b)


@main.group()
def export() -> None:
    """Settings for other tools."""


@export.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="FILE")
@click.argument("folder", type=click.Path(path_type=Path), metavar="OUT_DIR")
@click.option("--base", metavar="BASE", help="The base model, instead of the file's.")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="Images, instead of the file's.")
def kohya(source: Path, folder: Path, base: str | None, data: Path | None) -> None:
    """Write FILE (TOML, LoRA, run or trial folder) as sd-scripts' config.toml and dataset.toml into OUT_DIR."""
    calm_libraries()
    from hpo.cli.export import export_kohya
    from trainer.text import clean_text

    named = {"pretrained_model_name_or_path": base, "train_data_dir": data and str(data)}
    places = {name: value for name, value in named.items() if value}
    export_kohya(source, folder, places, lambda text: click.echo(clean_text(text)))


@main.group()
def dataset() -> None:
    """Datasets."""


@dataset.command()
@click.argument("subject", type=click.Choice(["character", "style", "object"]))
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
def demo(subject: str, folder: Path) -> None:
    """Write a demo subject for the miniature bases into DIR: 24 training images and 8 held out, 24 of the style."""
    import shlex

    from trainer.bases import write_subject
    from trainer.text import clean_text

    write_subject(subject, folder)
    place = shlex.quote(clean_text(str(folder)))
    click.echo(f"{subject} written; next: hpo search --base mini-sd15 --data {place} --trials 12")


@dataset.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--for",
    "base",
    type=click.Choice(list(KNOWN_BASES)),
    default="sd15",
    show_default=True,
    help="What will be trained: decides size and tokens.",
)
@click.option("--trigger", help="The subject's trigger word. Unset: from the folder's name.")
@click.option("--class", "class_word", help="What the subject is. Unset: from the folder's name.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="A setting that training will have.")
@click.option("--json", "as_json", is_flag=True, help="The same for scripts, with every file.")
def check(folder: Path, **words: Any) -> None:
    """Look for everything in DIR that would stop a training or spoil its result, and say what to do.

    Ends with 0 if DIR can be trained on, with 3 if not."""
    calm_libraries()
    from hpo.cli.dataset import DatasetRequest
    from hpo.cli.dataset import check as run

    run(DatasetRequest(folder, **words), console(), click.echo)


@dataset.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="SRC")
@click.argument("folder", type=click.Path(path_type=Path), metavar="OUT")
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="How often an epoch shows each image.",
)
@click.option("--name", required=True, help="The trigger word: one word that the base does not know.")
@click.option("--class", "class_word", help="What the subject is: girl, style, vase …")
@click.option(
    "--held-out",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Images set apart in held_out/: never trained on, they judge the result.",
)
@click.option("--skip-corrupt", is_flag=True, help="Leave out images that cannot be read.")
def prepare(source: Path, folder: Path, **words: Any) -> None:
    """Copy the images and captions of SRC into OUT as kohya's tools want them: OUT/10_name class/."""
    from hpo.cli.dataset import prepare as run

    run(source, folder, echo=click.echo, **words)


def console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def calm_libraries() -> None:
    """Before torch and its neighbours are imported: no progress bars, no advice meant for programmers."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
