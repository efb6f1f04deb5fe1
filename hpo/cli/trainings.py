"""``hpo plan``, ``train``, ``evaluate`` and ``compare``: commands that work on one training run or its settings."""

from __future__ import annotations

from pathlib import Path

import click

from hpo.cli import options
from hpo.cli.options import PATH, Finite
from hpo.cli.start import calm_libraries, console


@click.command()
@click.argument("file", type=PATH, required=False, metavar="[FILE]")
@options.base("sdxl, sd15, mini-sdxl, mini-sd15, a folder or a .safetensors file.")
@click.option(
    "--vram", type=Finite(0.1, 10_000), default=16.0, show_default=True, metavar="GB", help="GPU memory."
)
@options.sets()
@click.option(
    "--table", is_flag=True, help="Predict every SDXL run that users measured, as a table (takes minutes)."
)
@options.as_json("Print JSON.")
def plan(
    file: Path | None, base: str | None, vram: float, sets: tuple[str, ...], table: bool, as_json: bool
) -> None:
    """Predict the peak GPU memory of a training run. Also finds the changes that make FILE's settings fit.
    Needs no GPU, no weights and no images."""
    calm_libraries()
    from hpo.cli.plan import PlanRequest
    from hpo.cli.plan import plan as run

    request = PlanRequest(file=file, base=base, vram=vram, sets=sets, table=table, as_json=as_json)
    run(request, console(), click.echo)


@click.command()
@click.argument("file", type=PATH)
@click.option(
    "--dataset", type=PATH, metavar="FILE", help="Dataset file in the format of sd-scripts' --dataset_config."
)
@options.base("mini-sd15, mini-sdxl, sd15, sdxl, a hub id, a folder or a .safetensors file.")
@options.data("Training images to use instead of those in FILE.")
@options.sets()
@click.option(
    "--output", type=PATH, metavar="DIR", help="Folder for LoRA files. Default: from FILE, else output."
)
@options.device()
@click.option(
    "--dry-run", is_flag=True, help="Check everything and show what would be done. Needs no weights."
)
@click.option("--strict", is_flag=True, help="Settings of FILE that sd-scripts does not know are errors.")
@options.as_json("With --dry-run: print JSON.")
@options.notifies
@options.watched
def train(
    file: Path,
    dataset: Path | None,
    base: str | None,
    data: Path | None,
    sets: tuple[str, ...],
    output: Path | None,
    device: str | None,
    dry_run: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Train one LoRA from FILE. FILE: settings of this tool or of sd-scripts (TOML), a dataset file, a LoRA, or
    the folder of a run or trial. To resume after a stop, crash or power loss: hpo resume, or the same command again."""
    calm_libraries()
    from hpo.train import TrainRequest
    from hpo.train import train as run

    if as_json and not dry_run:
        raise click.UsageError("--json needs --dry-run")
    request = TrainRequest(
        file=file,
        dataset=dataset,
        sets=sets,
        output=output,
        data=data,
        base=base,
        device=device,
        dry_run=dry_run,
        strict=strict,
        as_json=as_json,
    )
    run(request, console(), click.echo)


@click.command(cls=options.Renamed, renamed={"--study": "--definition"})
@click.argument("run", type=PATH, metavar="RUN")
@options.judged_by
@options.notifies
@options.watched
def evaluate(
    run: Path,
    data: Path | None,
    references: Path | None,
    prompts: Path | None,
    clip: str | None,
    trigger: str | None,
    class_word: str | None,
    base: str,
    study: str | None,
    device: str | None,
) -> None:
    """Score every saved checkpoint of RUN and mark one as best. The chosen checkpoint is confirmed on other
    prompts and marked as best.safetensors. RUN: the output folder of hpo train, OUTPUT/name, a trial folder,
    or a folder of LoRA files. To resume an interrupted evaluation: hpo resume, or the same command again."""
    calm_libraries()
    from hpo.judge import evaluate as run_it
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
    run_it(run, inputs, console(), study)


@click.command(cls=options.Renamed, renamed={"--study": "--definition"})
@click.argument("run_a", type=PATH, metavar="RUN_A")
@click.argument("run_b", type=PATH, metavar="RUN_B")
@options.judged_by
@click.option(
    "--base-b",
    type=options.NAMED,
    default="",
    metavar="BASE",
    help="RUN_B's base model. Default: from the run.",
)
@click.option("--data-b", type=PATH, metavar="DIR", help="The images that RUN_B was trained on.")
@options.notifies
@options.watched
def compare(
    run_a: Path,
    run_b: Path,
    data: Path | None,
    references: Path | None,
    prompts: Path | None,
    clip: str | None,
    trigger: str | None,
    class_word: str | None,
    base: str,
    study: str | None,
    device: str | None,
    base_b: str,
    data_b: Path | None,
) -> None:
    """Compare the LoRAs of two runs on the same prompts. The runs may have different bases. RUN: as in hpo
    evaluate, or one LoRA file. Uses the marked checkpoint if there is one, else the final LoRA. --base,
    --data, --trigger and --class describe RUN_A; both runs use the prompts of RUN_A."""
    calm_libraries()
    from hpo.judge import compare as run_it
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
    run_it((run_a, run_b), inputs, console(), study, base_b, data_b)
