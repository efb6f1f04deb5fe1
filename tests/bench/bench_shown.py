"""Which images show nothing?  Records what tests/unit/evaluation/score/test_shown.py reads.

    python -m tests.bench.bench_shown record --images FOLDER    # ~6 minutes on one core; resumable
    python -m tests.bench.bench_shown table                     # the table of docs/evaluation.md

``record`` scores as a trial of the study is scored: the untrained base's images; distortions of them
(``tests.bench.distortions``); images that are sound but ignore every prompt; and the images of trained LoRAs. The LoRAs
are configurations of the recorded ranking study (``tests.bench.bench_ranking``): weak, good and overfitted ones and
those that destroyed the base. FOLDER keeps their images, so that a new limit can be measured without training. What the
ranking study recorded of all its configurations, prompt following, settles the others: it alone keeps them on the right
side of the limit.

The other subjects and mini-sdxl get only the distortions that leave nothing: what else remains depends on what an
encoder knows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from evaluation.images.images import SampledImage
from evaluation.images.sampling import sample
from evaluation.prompts.prompts import PromptSet
from evaluation.score.score import score
from hpo.search.workbench import Workbench, load
from hpo.study.config import Inputs, find_study, read_study
from hpo.study.folder import StudyFolder
from tests import ranking
from tests.bench.bench_ranking import proposals
from tests.bench.distortions import BLANK, DISTORTIONS, REPEATED, REPEATED_NOISE, distorted
from trainer.adapters import adapter as adapters
from trainer.bases.miniature import captions, checker, subjects
from trainer.config import TrainConfig
from trainer.files import append_line, read_records
from trainer.loop import loop

FILE = Path(__file__).parent.parent / "data" / "shown.jsonl"
BASE, DISTORTED, HEEDLESS, TRAINED = "untrained base", "distorted", "heedless", "trained"
MAIN = ("mini-sd15", "character")
SETS = (MAIN, ("mini-sd15", "style"), ("mini-sd15", "object"), ("mini-sdxl", "character"))
TRIALS = (6, 9, 17, 22, 24, 29)  # of the ranking study, on MAIN
HOT = (3, 10, 30)  # times the rates of configuration 9
FRESH = "new pictures of the subject, whatever the prompt"
SHUFFLED = "the base's images in another order"


@dataclass(frozen=True)
class Row:
    """One set of images, as it would be told: ``reason`` is empty for a feasible one.

    ``grounds``: share of images with the right background, as the checker reads it from pixels; None for the
    style, whose colours it does not know.
    """

    base: str
    subject: str
    name: str
    source: str
    prompt_following: float
    likeness: float
    strangeness: float
    diversity: float  # relative to the untrained base
    amounts: dict[str, float]
    reason: str
    grounds: float | None

    @property
    def amount(self) -> float:
        return self.amounts["shows_nothing"]


def bench_of(base: str, subject: str, folder: Path) -> Workbench:
    """The shipped study of a miniature on one of its demo subjects, with the anchors measured."""
    study = read_study(find_study(None, base), sets=[f"study.preset={subject}"])
    data = folder / "data"
    if not data.is_dir():
        subjects.write_subject(subject, data, study.train.resolution)
    bench = load(Inputs(base, data), study, StudyFolder(folder / "study"), print)
    bench.measure_anchors(print)
    return bench


def base_images(bench: Workbench) -> list[SampledImage]:
    """The images that the anchors were measured on."""
    by = bench.evaluator
    folder = bench.folder.base_images / "samples"
    return sample(by.base, by.prompts, by.sampling, folder, identity=by.base.identity, as_class=True)


def measured(bench: Workbench, images: Sequence[SampledImage], name: str, source: str, subject: str) -> Row:
    found = score(images, bench.evaluator)
    safety = found.safety
    assert safety is not None and safety.strangeness is not None
    assert safety.diversity is not None and safety.base_diversity is not None
    texts = {p.id: p.text for p in bench.prompts.prompts}
    grounds = float(np.mean([on_its_ground(i, texts[i.prompt_id]) for i in images]))
    return Row(
        base=bench.base_spec,
        subject=subject,
        name=name,
        source=source,
        prompt_following=round(found.prompt_following, 4),
        likeness=round(found.likeness, 4),
        strangeness=round(safety.strangeness, 4),
        diversity=round(safety.diversity / safety.base_diversity, 4),
        amounts={key: round(amount, 4) for key, amount in safety.amounts.items()},
        reason=(safety.broken or ("",))[0],
        grounds=None if subject == "style" else round(grounds, 3),
    )


def on_its_ground(image: SampledImage, text: str) -> bool:
    """Whether the background is the one that the prompt asks for."""
    asked = [name for name, phrases in captions.BACKGROUND_PHRASES.items() if phrases[0] in text]
    return not asked or checker.read_background(checker.at_reading_size(image.pixels_HW3)) == asked[0]


def trained(bench: Workbench, config: TrainConfig, file: Path) -> list[SampledImage]:
    """The images of a LoRA with these settings, kept in ``file``."""
    if file.is_file():
        return _read(file, bench.prompts)
    lora = adapters.inject(bench.base, config)
    try:
        for _ in loop.train(config, bench.base, lora, bench.prepared(config)):
            pass
        lora.round_to(config.save_precision)
        images = sample(bench.base, bench.prompts, bench.evaluator.sampling)
    finally:
        lora.remove()
    np.savez_compressed(file, pixels=np.stack([image.pixels_HW3 for image in images]))
    return images


def _read(file: Path, prompts: PromptSet) -> list[SampledImage]:
    pixels = np.load(file)["pixels"]
    return [SampledImage(p.id, seed, own) for (p, seed), own in zip(prompts.jobs, pixels, strict=True)]


def runs(bench: Workbench) -> Iterator[tuple[str, TrainConfig]]:
    """Names (as in the ranking study) and settings."""
    found = proposals(bench, max(TRIALS) + 1)
    yield "trial 0", bench.config(dict(bench.study.baseline), 0)
    for number in TRIALS:
        yield f"random {number}", bench.config(found[number], 0)
    config = bench.config(found[9], 0)
    rates = {name: rate for name in ranking.RATES if (rate := getattr(config, name)) is not None}
    for factor in HOT:
        values = {name: factor * rate for name, rate in rates.items()}
        yield f"random 9, rates × {factor}", config.with_values(values)


def heedless(name: str, images: Sequence[SampledImage], subject: str) -> list[SampledImage]:
    """Sound images that ignore the prompt: as an overfitted LoRA draws them, or those of other prompts."""
    if name == FRESH:
        side_px = images[0].pixels_HW3.shape[0]
        pixels = [subjects.picture(subject, 5000 + n, 7, side_px)[0] for n in range(len(images))]
    else:
        order = np.random.default_rng(0).permutation(len(images))
        pixels = [images[n].pixels_HW3 for n in order]
    return [replace(image, pixels_HW3=own) for image, own in zip(images, pixels, strict=True)]


def sets_of(bench: Workbench, subject: str, folder: Path) -> Iterator[tuple[str, str, list[SampledImage]]]:
    """Name, source and images of everything that is measured on a subject."""
    own, is_main = base_images(bench), (bench.base_spec, subject) == MAIN
    yield BASE, BASE, own
    for name in (*(DISTORTIONS if is_main else BLANK), REPEATED, REPEATED_NOISE):
        yield name, DISTORTED, distorted(name, own)
    for name in (FRESH, SHUFFLED):
        yield name, HEEDLESS, heedless(name, own, subject)
    for name, config in runs(bench) if is_main else ():
        file = folder / (name.replace(" ", "_").replace("×", "x") + ".npz")
        yield name, TRAINED, trained(bench, config, file)


def record(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    known = {(row.base, row.subject, row.name) for row in read(args.file)}
    for base, subject in SETS:
        folder = args.images / f"{base}-{subject}"
        folder.mkdir(parents=True, exist_ok=True)
        bench = bench_of(base, subject, folder)
        for name, source, images in sets_of(bench, subject, folder):
            if (base, subject, name) not in known:
                row = measured(bench, images, name, source, subject)
                append_line(args.file, json.dumps(vars(row)))
                print(base, subject, name, row.amount, row.reason, flush=True)


def read(path: Path = FILE) -> list[Row]:
    return [Row(**row) for row in read_records(path)]


def table(rows: Sequence[Row]) -> str:
    """The character's images on mini-sd15 one by one, noise and stripes of the others as ranges, the LoRAs."""
    lines = [
        "| images | prompt following | strangeness | likeness | diversity | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if (row.base, row.subject) == MAIN and row.source != TRAINED:
            lines.append(
                f"| {row.name} | {row.prompt_following:.2f} | {row.strangeness:.2f} | {row.likeness:.2f} "
                f"| {row.diversity:.2f} | {f'`{row.reason}`' if row.reason else 'feasible'} |"
            )
    lines += ["", "| noise and stripes | prompt following | strangeness | verdict |", "|---|---|---|---|"]
    for base, subject in SETS:
        group = [r for r in rows if (r.base, r.subject) == (base, subject) and r.name in BLANK]
        verdicts = " and ".join(sorted({f"`{r.reason}`" if r.reason else "feasible" for r in group}))
        lines.append(
            f"| {subject}, {base} | {_range([r.prompt_following for r in group])} "
            f"| {_range([r.strangeness for r in group])} | {verdicts} |"
        )
    lines += ["", "| trained LoRAs | prompt following | strangeness | verdict |", "|---|---|---|---|"]
    for row in rows:
        if row.source == TRAINED:
            lines.append(
                f"| {row.name} | {row.prompt_following:.2f} | {row.strangeness:.2f} "
                f"| {f'`{row.reason}`' if row.reason else 'feasible'} |"
            )
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["record", "table"])
    parser.add_argument("--images", type=Path, help="record: where the images of the LoRAs are kept")
    parser.add_argument("--file", type=Path, default=FILE)
    args = parser.parse_args(argv)
    if args.part == "table":
        print(table(read(args.file)))
    elif args.images is None:
        parser.error("record needs --images FOLDER")
    else:
        record(args)


if __name__ == "__main__":
    main(sys.argv[1:])
