"""``hpo compare``: compares two runs on the same prompts, and each LoRA with its untrained base.

Owns which file of a run is compared, the tables, compare.json and the contact sheet.  Does not own the
computations (see ``evaluation.choice.compare``) or how a LoRA is scored (see ``hpo.judge.judge``).  Only one
base is loaded at a time.

    OUTPUT_B/name.run/evaluation/compare/<A>-<hash>/     compare.json, sheet.png
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpo.judge.evaluate import CONFIRMATION, beside_values, drawing_alone
from hpo.judge.runfiles import MARK_KEY, Checkpoint, RunFiles, find_run, is_mark, one_file
from hpo.judge.view import JudgeView
from hpo.study import Inputs, recorded_at
from hpo.terminal import Stop
from trainer.errors import InvalidImages
from trainer.files import make_folder, sha256_file, write_atomic
from trainer.tensorfile import read_header
from trainer.text import clean_text

if TYPE_CHECKING:
    from evaluation.choice import ComparedSide, Comparison
    from evaluation.images import SampledImage
    from evaluation.prompts import PromptSet
    from evaluation.score import Difference
    from hpo.judge.judge import Judge


EFFECTS = (
    "Base effect: how far the two untrained bases differ on these prompts. Adapter effect: how much more LoRA B adds "
    "to its base than LoRA A to its own. Together they are the difference between the LoRAs' images (last row)."
)


@dataclass(frozen=True)
class Measured:
    """One side of the comparison: its scores and the images for the contact sheet."""

    side: ComparedSide
    base: str
    base_identity: str
    size: str
    untrained: list[SampledImage]
    images: list[SampledImage]


def compare(
    paths: tuple[Path, Path],
    inputs: Inputs,
    console: Console,
    study: str | None = None,
    base_b: str = "",
    data_b: Path | None = None,
) -> Path:
    """Compare two runs; returns the folder with compare.json and sheet.png.

    ``study``: the study whose definition is used (``--definition``).
    """
    view = JudgeView(console)
    runs = find_run(paths[0]), find_run(paths[1])
    files = _file(paths[0], runs[0]), _file(paths[1], runs[1])
    from hpo.judge import judge as judges  # loads torch

    step = f"compare {files[0].name} {files[1].name}"
    place = runs[1].evaluation
    with recorded_at(place, place.parent, step, begun=False) as work:
        with Stop(view.on_ask) as stop:
            view.should_stop = stop
            first = judges.load(runs[0], inputs, view.say, named=study)
            if first.confirmation:
                first = first.on(first.confirmation)
            prompts = first.evaluator.prompts
            view.say(
                f"{files[0].path.name} against {files[1].path.name}: {prompts.image_count} images each "
                f"({prompts.size}), {first.evaluator.scorer.name}"
            )
            work.begun = True
            view.pace.planned = 4 * prompts.image_count  # each LoRA and its untrained base
            a = _measure(runs[0], files[0], first, view)
            first.free()
            # base, data and trigger belong to the second run; prompts, references and encoders are those of the first
            own = replace(inputs, base=base_b, data=data_b, trigger=None, class_word=None)
            second = judges.load(runs[1], own, view.say, named=study, like=first)
            b = _measure(runs[1], files[1], second, view)
            second.free()
        from evaluation.choice import compare as difference

        found = difference(a.side, b.side)
        folder = runs[1].evaluation / "compare" / f"{files[0].name}-{sha256_file(files[0].path)[:8]}"
        _write(folder, files, prompts, (a, b), found)
        _show(view, files, (a, b), found)
        view.say(f"results: {folder / 'compare.json'}")
        view.say(f"images side by side: {folder / 'sheet.png'}")
        chosen = is_mark(runs[1].mark) and read_header(runs[1].mark).metadata[MARK_KEY] == files[1].path.name
        view.say(f"LoRA B to use: {runs[1].mark if chosen else files[1].path}")
    return folder


def _file(path: Path, run: RunFiles) -> Checkpoint:
    """The file to compare: the given one, else the checkpoint marked as best, else the newest."""
    named = one_file(path)
    if named is not None:
        return named
    if is_mark(run.mark):
        source = read_header(run.mark).metadata[MARK_KEY]
        marked = [c for c in run.checkpoints if c.path.name == source]
        if marked:
            return marked[0]
    return run.checkpoints[-1]


def _measure(run: RunFiles, file: Checkpoint, judge: Judge, view: JudgeView) -> Measured:
    from evaluation.choice import ComparedSide

    base = judge.evaluator.base
    try:
        judge.check(file.path)
        with drawing_alone(run):
            count = judge.evaluator.prompts.image_count
            with view.drawing(f"untrained {base.name}", count) as on_image:
                anchors = judge.measure_anchors(run.evaluation, on_image)
            folder = run.evaluation / file.name / _set_name(judge)
            try:
                with view.drawing(file.name, count) as on_image:
                    score = judge.score(file.path, folder, on_image)
            except InvalidImages as error:
                raise InvalidImages(f"{file.path.name}: {error.message}", error.hint) from None
            untrained = judge.untrained_images(run.evaluation)
            images = judge.images(file.path, folder)
    except BaseException:
        judge.free()
        raise
    for problem in anchors.problems:
        view.say(f"warning: {base.name}: {problem}")
    if score.safety:
        for name in score.safety.broken:
            view.say(f"warning: {file.path.name}: {score.safety.says(name)}")
    sampling = judge.evaluator.sampling
    size = f"{sampling.width_px}×{sampling.height_px} px"
    return Measured(
        ComparedSide(score, replace(anchors, untouched=(), base_images=())),
        base.name,
        base.identity,
        size,
        untrained,
        images,
    )


def _set_name(judge: Judge) -> str:
    """The folder name for the images.  Images generated by ``hpo evaluate`` are reused; others get a new folder."""
    prompts = judge.evaluator.prompts
    return CONFIRMATION if prompts is judge.confirmation else f"compare-{prompts.hash[:8]}"


def _write(
    folder: Path,
    files: tuple[Checkpoint, Checkpoint],
    prompts: PromptSet,
    sides: tuple[Measured, Measured],
    found: Comparison,
) -> None:
    import numpy as np

    from evaluation.choice import Column, contact_sheet
    from evaluation.images import png_bytes

    columns = []
    for side, file in zip(sides, files, strict=True):
        columns += [
            Column(f"{side.base}, untrained", side.untrained),
            Column(f"{side.base}, {file.name}", side.images),
        ]
    sheet = contact_sheet(columns, prompts)
    make_folder(folder)
    write_atomic(folder / "compare.json", json.dumps(_values(files, prompts, sides, found), indent=1))
    write_atomic(folder / "sheet.png", png_bytes(np.asarray(sheet)))


def _values(
    files: tuple[Checkpoint, Checkpoint],
    prompts: PromptSet,
    sides: tuple[Measured, Measured],
    found: Comparison,
) -> dict[str, Any]:
    def one(file: Checkpoint, measured: Measured) -> dict[str, Any]:
        score = measured.side.score.as_dict()
        score.pop("per_image")
        score["beside"] = beside_values(measured.side.score)
        base = {"name": measured.base, "identity": measured.base_identity}
        return {"file": file.path.name, "sha256": sha256_file(file.path), "base": base, "score": score}

    return {
        "a": one(files[0], sides[0]),
        "b": one(files[1], sides[1]),
        "prompts": prompts.hash,
        "paired_by": "prompt",
        "anchored_b_minus_a": {name: asdict(value) for name, value in found.anchored.items()},
        "cosines": {
            row: {name: asdict(value) for name, value in values.items()}
            for row, values in found.cosines.items()
        },
        "beside_b_minus_a": {name: asdict(value) for name, value in found.beside.items()},
    }


def _show(
    view: JudgeView,
    files: tuple[Checkpoint, Checkpoint],
    sides: tuple[Measured, Measured],
    found: Comparison,
) -> None:
    from evaluation.choice import ANCHORED, COSINES, told_apart

    for letter, file, side in zip("AB", files, sides, strict=True):
        view.say(f"{letter}: {file.path.name} on {side.base}, {side.size}")
    table = _table("relative to its own base", "A", "B", "B − A", "95 %")
    a, b = (side.side.score for side in sides)
    fields = {"prompt following": "prompt_following", "likeness": "likeness", "score": "value"}
    for name in ANCHORED:
        value, low_high = found.anchored[name], _interval(found.anchored[name])
        pair = [f"{getattr(s, fields[name]):.3f}" for s in (a, b)]
        table.add_row(*map(Text, (name, *pair, f"{value.mean:+.3f}", low_high)))
    view.table(table)
    view.say(EFFECTS)
    table = _table("raw cosines", "following", "95 %", "likeness", "95 %")
    for row, values in found.cosines.items():
        cells = [c for name in COSINES for c in (f"{values[name].mean:+.3f}", _interval(values[name]))]
        table.add_row(*map(Text, (row, *cells)))
    view.table(table)
    if found.beside:
        table = _table("extra metrics, raw", "A", "B", "B − A", "95 %")
        known = [{f"{f.measure} {f.model}": f.value for f in s.beside} for s in (a, b)]
        for name, gain in found.beside.items():
            pair = [f"{of[name]:.4f}" for of in known]
            table.add_row(*map(Text, (clean_text(name), *pair, f"{gain.mean:+.4f}", _interval(gain, 4))))
        view.table(table)
    score = found.anchored["score"]
    if told_apart(score):
        better = "B" if score.mean > 0 else "A"
        view.say(f"relative to its own base, LoRA {better} is significantly better than the other")
    else:
        view.say("relative to their own bases, neither LoRA is significantly better on these prompts")


def _table(title: str, *names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(title, overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _interval(value: Difference, digits: int = 3) -> str:
    return f"{value.low:+.{digits}f} … {value.high:+.{digits}f}"
