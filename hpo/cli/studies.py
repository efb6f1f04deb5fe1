"""``hpo search``, ``confirm``, ``dashboard`` and ``transfer``: the commands that work on a study."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from hpo.cli import options
from hpo.cli.options import PATH, Finite
from hpo.cli.start import calm_libraries, console


@click.command()
@options.base(
    "mini-sd15, mini-sdxl, sd15, a hub id, a diffusers folder or a .safetensors file.", required=True
)
@options.data(
    "Images: kohya folders (10_name class), or images with .txt captions. The miniature brings its own."
)
@click.option(
    "--trials", type=click.IntRange(1, 10_000), default=30, show_default=True, help="The study's total."
)
@options.study("FILE.toml", "Study file, or the name of a shipped one.")
@click.option("--name", help="Name of the study's folder. Unset: made of the study file and the data.")
@options.sets("Fix a setting (network_dim=16), or change a part of the study file (sampling.steps=10).")
@options.clip("Scorer: an open_clip model with a tag or file, or a folder.")
@options.prompts
@options.references("Images to measure likeness with, instead of held-out ones.")
@options.trigger
@options.class_word("What the subject is (girl, style, vase). Unset: from the folder's name.")
@click.option(
    "--enqueue",
    type=PATH,
    metavar="FILE",
    help="A kohya configuration of your own, tried right after the usual settings.",
)
@click.option("--max-hours", type=Finite(min=0, min_open=True), help="Begin no trial after this time.")
@options.device()
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
@options.runs
def search(
    base: str,
    data: Path | None,
    trials: int,
    study: str | None,
    name: str | None,
    sets: tuple[str, ...],
    clip: str | None,
    prompts: Path | None,
    references: Path | None,
    trigger: str | None,
    class_word: str | None,
    enqueue: Path | None,
    max_hours: float | None,
    device: str | None,
    keep_best: int | None,
    notify: tuple[str, ...],
    stop_when_converged: bool,
    seed: int | None,
    runs: Path,
) -> None:
    """Search LoRA settings. The same command goes on with a study that was stopped, killed or unplugged."""
    calm_libraries()
    from hpo.search import SearchRequest
    from hpo.search import search as run
    from hpo.study import Inputs

    inputs = Inputs(
        base=base,
        data=data,
        clip=clip,
        prompts=prompts,
        references=references,
        trigger=trigger,
        class_word=class_word,
        device=device,
    )
    request = SearchRequest(
        inputs=inputs,
        trials=trials,
        study=study,
        name=name,
        sets=sets,
        enqueue=enqueue,
        max_hours=max_hours,
        keep_best=keep_best,
        notify=notify,
        stop_when_converged=stop_when_converged,
        seed=seed,
        runs=runs,
    )
    run(request, console())


@click.command()
@options.study_name
@click.option("--top", type=click.IntRange(1, 100), default=3, show_default=True, help="How many trials.")
@click.option("--seeds", type=click.IntRange(1, 20), default=2, show_default=True, help="Trainings of each.")
@click.option("--rescore-only", is_flag=True, help="Train nothing: score the saved LoRA files.")
@click.option("--yes", is_flag=True, help="Do not ask after showing the cost.")
@options.runs
def confirm(name: str | None, top: int, seeds: int, rescore_only: bool, yes: bool, runs: Path) -> None:
    """Confirm a study's best trials beside trial 0: fresh training seeds, prompts that the search did not
    use. The same command goes on with a confirmation that was stopped, killed or unplugged."""
    calm_libraries()
    from hpo.confirm import ConfirmRequest
    from hpo.confirm import confirm as run

    def ask() -> bool:
        return yes or not sys.stdin.isatty() or click.confirm("go on?", default=True)

    request = ConfirmRequest(name=name, top=top, seeds=seeds, rescore_only=rescore_only, runs=runs)
    run(request, console(), ask)


@click.command()
@options.study_name
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Beyond this machine: there is no password."
)
@options.runs
def dashboard(name: str | None, port: int, host: str, runs: Path) -> None:
    """Open optuna-dashboard on a study, with every trial's images. Works while a search runs."""
    from hpo.search import serve
    from hpo.study import find_folder

    try:
        serve(find_folder(name, runs), host, port, lambda text: click.echo(text))
    except KeyboardInterrupt:
        click.echo("")


@click.command()
@click.option("--to", "to", required=True, metavar="FAMILY", help="sdxl, or mini-sdxl for the miniature.")
@options.study("NAME", "The study that was searched. Unset: the last one.")
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
@options.device("For probes: cpu, cuda, cuda:1 … Unset: the GPU if there is one.")
@options.runs
def transfer(
    to: str,
    study: str | None,
    vram: float | None,
    profile: str | None,
    preset: str | None,
    probes: int,
    design: str | None,
    device: str | None,
    runs: Path,
) -> None:
    """Carry a study's best settings over to SDXL: a table of what changes and why, and the files of the run.
    With --probes the same command goes on with probes that were stopped."""
    calm_libraries()
    from hpo.transfer import TransferRequest, run

    request = TransferRequest(
        to=to,
        study=study,
        vram=vram,
        profile=profile,
        preset=preset,
        probes=probes,
        design=design,
        device=device,
        runs=runs,
    )
    run(request, console())
