"""``hpo search``, ``confirm``, ``dashboard`` and ``transfer``: commands that work on a study."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

import click
from click.core import ParameterSource

from hpo.cli import options
from hpo.cli.options import PATH, Finite
from hpo.cli.start import calm_libraries, console
from hpo.cli.which import agreed, asker, chosen_study, complete_name, new_study
from trainer.errors import ConfigError
from trainer.text import clean_text


@click.command(cls=options.Renamed, renamed={"--study": "--definition", "--name": ""})
@options.study_name
@options.base(
    "mini-sd15, mini-sdxl, sd15, a hub id, a diffusers folder or a .safetensors file.", required=True
)
@options.data(
    "Images: kohya folders (10_name class), or images with .txt captions. Default for a miniature: demo images."
)
@click.option(
    "--trials",
    type=click.IntRange(1, 10_000),
    help="Total number of trials in the study. Default: 30; with --hours as many as fit, and N at most.",
)
@click.option(
    "--hours",
    type=Finite(min=0, min_open=True, max=10_000),
    help="Time budget of search and confirmation together. Plans how many trials fit, and confirms the best "
    "ones in the time left. A command that was stopped goes on with what is left.",
)
@options.definition("FILE.toml", "Study file: what is searched. Or the name of a shipped study file.")
@options.sets("Fix a setting (network_dim=16), or change a value of the study file (sampling.steps=10).")
@options.clip("Scoring model: an open_clip model with a tag or file, or a folder.")
@options.prompts
@options.references("Images to measure likeness with, instead of held-out images.")
@options.trigger
@options.class_word("What the subject is (girl, style, vase). Default: from the folder name.")
@click.option(
    "--preset",
    type=click.Choice(["character", "style", "object"]),
    help="How the images are searched and scored. Default: style if the class word says so, else character.",
)
@click.option(
    "--enqueue",
    type=PATH,
    metavar="FILE",
    help="Your own kohya configuration, added as the trial after the baseline.",
)
@click.option(
    "--max-hours",
    type=Finite(min=0, min_open=True, max=10_000),
    help="Start no new trials after this many hours of this command. Plans nothing and confirms nothing; see --hours.",
)
@click.option(
    "--storage",
    type=options.STORAGE,
    metavar="URL",
    help="Keep a new study in a database server, for workers on several machines: postgresql+psycopg://USER@HOST/DB. "
    "Also: HPO_STORAGE. Default: a file.",
)
@options.device("cpu, cuda, cuda:1 … Default: every free GPU, one worker each.")
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Number of workers: processes that share the trials, each on a GPU of its own, or with --device cpu on an "
    "equal share of the cores. Default: one for each free GPU.",
)
@click.option(
    "--keep-best",
    type=click.IntRange(1, 10_000),
    metavar="K",
    help="Keep only the LoRA files of the best K trials.",
)
@click.option(
    "--stop-when-converged", is_flag=True, help="End the search when more trials are unlikely to help."
)
@click.option(
    "--fork-from",
    type=options.NAMED,
    metavar="STUDY",
    shell_complete=complete_name,
    help="Take over the finished trials of STUDY that fit. For a new study with a changed space.",
)
@click.option(
    "--from",
    "source",
    type=options.NAMED,
    metavar="STUDY",
    shell_complete=complete_name,
    help="Start from what STUDY, a search on SD1.5, knows: N whole training runs on the base, as "
    "hpo transfer STUDY --to BASE --trials N (default 6). Images, prompts and space are those of STUDY.",
)
@click.option("--seed", type=options.SEED, help="Seed of the study. Default: from the study file.")
@options.runs
@options.notifies
@options.watched
@click.pass_context
def search(
    ctx: click.Context,
    name: str | None,
    base: str,
    data: Path | None,
    trials: int | None,
    hours: float | None,
    study: str | None,
    sets: tuple[str, ...],
    clip: str | None,
    prompts: Path | None,
    references: Path | None,
    trigger: str | None,
    class_word: str | None,
    preset: str | None,
    enqueue: Path | None,
    max_hours: float | None,
    storage: str | None,
    device: str | None,
    workers: int | None,
    keep_best: int | None,
    stop_when_converged: bool,
    fork_from: str | None,
    source: str | None,
    seed: int | None,
    runs: Path,
) -> None:
    """Search LoRA settings. NAME: the name of the study; its files are in runs/NAME. Default: derived from the
    study file and the data. To resume after a stop, crash or power loss: hpo resume, or the same command again."""
    from hpo.cli.workers import as_worker, launching, role_taken

    worker = role_taken()
    calm_libraries()
    if source is not None:
        _search_from(source, base, trials, device, runs, _given(ctx))
        return
    from hpo.search import SearchRequest
    from hpo.search import search as run
    from hpo.study import STORAGE, Inputs

    if name is not None:
        name, runs = new_study(name, runs)
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
        hours=hours,
        keep_best=keep_best,
        stop_when_converged=stop_when_converged,
        seed=seed,
        runs=runs,
        preset=preset,
        ask=asker(),
        fork_from=fork_from,
        workers=workers,
        launch=launching(console()),
    )
    screen, then = console(), None
    if worker is not None:
        request, screen = as_worker(worker, request)
    if hours is not None:
        from hpo.confirm import confirm_within

        then = partial(confirm_within, console=screen)
    token = STORAGE.set(storage)
    try:
        with worker.errors_reported() if worker is not None else contextlib.nullcontext():
            run(request, screen, then)
    finally:
        STORAGE.reset(token)


# What --from can be combined with; the study decides the rest.
WITH_SOURCE = ("base", "trials", "device", "source", "runs", "notify", "notify_on", "hang_minutes")
USUAL_TRIALS = 6


def _given(ctx: click.Context) -> list[str]:
    """The options and arguments of the command line that --from cannot be combined with."""
    return [
        max(p.opts, key=len) if isinstance(p, click.Option) else "NAME"
        for p in ctx.command.params
        if p.name not in WITH_SOURCE
        and p.name is not None
        and ctx.get_parameter_source(p.name) == ParameterSource.COMMANDLINE
    ]


def _search_from(
    source: str, base: str, trials: int | None, device: str | None, runs: Path, others: list[str]
) -> None:
    """``hpo search --base BASE --from STUDY``: the target trials of ``hpo transfer``."""
    folder = chosen_study(source, runs)
    if others:
        raise ConfigError(
            f"--from takes images, prompts and settings from {folder.name}, so {', '.join(others)} cannot be given",
            "remove it; for a search that starts anew, remove --from",
        )
    from hpo.study import families_from, kind_of_base
    from hpo.transfer import TransferRequest, run

    families = families_from(kind_of_base(folder))
    if base not in families:
        known = f"use --base {' or '.join(families)}" if families else "give a study with a search on sd15"
        raise ConfigError(
            f"study {folder.name} cannot be the source of a search on {clean_text(base)}", known
        )
    number = USUAL_TRIALS if trials is None else trials
    request = TransferRequest(base, folder.name, trials=number, device=device, runs=folder.root.parent)
    run(request, console())


@click.command()
@options.study_name
@click.option(
    "--top", type=click.IntRange(1, 100), default=3, show_default=True, help="Number of trials to confirm."
)
@click.option(
    "--seeds", type=click.IntRange(1, 20), default=2, show_default=True, help="Training runs per trial."
)
@click.option("--rescore-only", is_flag=True, help="Skip training: score the saved LoRA files.")
@options.device("cpu, cuda, cuda:1 … Default: as in the search.")
@click.option("--yes", is_flag=True, help="Do not ask before starting.")
@options.anyway
@options.runs
@options.notifies
@options.watched
def confirm(
    name: str | None,
    top: int,
    seeds: int,
    rescore_only: bool,
    device: str | None,
    yes: bool,
    anyway: bool,
    runs: Path,
) -> None:
    """Confirm a study's best trials with new seeds and new prompts. Trial 0 is included for comparison. The
    search did not use these seeds and prompts. To resume an interrupted
    confirmation: hpo resume, or the same command again."""
    calm_libraries()
    folder = chosen_study(name, runs)
    from hpo.confirm import ConfirmRequest
    from hpo.confirm import confirm as run

    request = ConfirmRequest(
        name=folder.name,
        top=top,
        seeds=seeds,
        rescore_only=rescore_only,
        runs=folder.root.parent,
        anyway=anyway,
        device=device,
    )
    run(request, console(), lambda: agreed("start?", yes=yes))


@click.command()
@options.study_name
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port to listen on."
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on. There is no password."
)
@options.runs
def dashboard(name: str | None, port: int, host: str, runs: Path) -> None:
    """Open optuna-dashboard for a study. Shows the sample images of every trial. Works while a search runs."""
    from hpo.search import serve

    try:
        serve(chosen_study(name, runs, own=True), host, port, lambda text: click.echo(text))
    except KeyboardInterrupt:
        click.echo("")


@click.command(cls=options.Renamed, renamed={"--study": "", "--probes": "--trials"})
@options.study_name
@click.option(
    "--to",
    "to",
    required=True,
    metavar="FAMILY",
    help="Target model family: sdxl, or mini-sdxl for the miniature.",
)
@click.option(
    "--vram",
    type=Finite(min=1, max=10_000),
    metavar="GB",
    help="GPU memory. Default: from the profile (sdxl-16gb: 16).",
)
@click.option(
    "--profile",
    metavar="NAME",
    help="sdxl-16gb, sdxl-keep, or your own FILE.toml. Default: the profile of the family.",
)
@click.option(
    "--preset",
    metavar="NAME",
    help="Memory against speed: conservative (at most 4 images per update), balanced (6), or aggressive "
    "(8, and gradient checkpointing: less memory, slower steps). Default: from the profile.",
)
@click.option(
    "--trials",
    type=options.TargetTrials(),
    default=0,
    show_default=True,
    metavar="N",
    help="Number of target trials (training runs on the target that test and correct the rules' settings): 0, or "
    "3 to 32. Usual: 6. With the design model each is a whole run.",
)
@click.option(
    "--design",
    type=click.Choice(["model", "ladder", "grid"]),
    help="How the settings of the trials are chosen. model: whole runs, by a model of the search. ladder, grid: "
    "runs of a quarter of the length, at fixed steps of the rate. Default: model.",
)
@options.device("For --trials: cpu, cuda, cuda:1 … Default: the GPU if there is one.")
@options.anyway
@options.runs
@options.notifies
@options.watched
def transfer(
    name: str | None,
    to: str,
    vram: float | None,
    profile: str | None,
    preset: str | None,
    trials: int,
    design: str | None,
    device: str | None,
    anyway: bool,
    runs: Path,
) -> None:
    """Transfer the best settings of the study NAME to SDXL. Shows what changes and why, and writes the files for
    the run. To resume interrupted target trials: hpo resume, or the same command again."""
    calm_libraries()
    folder = chosen_study(name, runs)
    from hpo.transfer import TransferRequest, run

    request = TransferRequest(
        to=to,
        name=folder.name,
        vram=vram,
        profile=profile,
        preset=preset,
        trials=trials,
        design=design,
        device=device,
        runs=folder.root.parent,
        anyway=anyway,
    )
    run(request, console())
