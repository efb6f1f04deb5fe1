"""``hpo evaluate``: scores all saved checkpoints of a run, chooses one, confirms the choice and marks the file.

Owns the order of the steps, evaluation.json and best.safetensors.  Does not own the choice (see
``evaluation.choice.checkpoints``), scoring (see ``hpo.judge.judge``) or the terminal output (see
``hpo.judge.view``).  After an interruption or a kill, the same command resumes; finished images are kept.

    name.run/evaluation/evaluation.json, curve.png
    name.run/evaluation/<checkpoint>/search/, …/confirmation/     images and metrics
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hpo.health import Guard
from hpo.judge.outcome import Evaluated
from hpo.judge.runfiles import MARK_KEY, Checkpoint, RunFiles, find_run, is_mark, label
from hpo.judge.view import JudgeView
from hpo.machine import gpu_uuid
from hpo.study import Inputs, alone, recorded_at
from hpo.terminal import Stop, clock, command
from trainer.errors import ConfigError, InvalidImages, ModelFileError
from trainer.files import require_space, sha256_file, sweep_tree, write_atomic
from trainer.tensorfile import with_metadata

if TYPE_CHECKING:
    from evaluation.choice import CheckpointChoice, CheckpointPoint
    from evaluation.score import Anchors, Score
    from hpo.judge.judge import Judge

SEARCH, CONFIRMATION = "search", "confirmation"


def evaluate(path: Path, inputs: Inputs, console: Console, study: str | None = None) -> Path:
    """Score, choose, confirm and mark; returns the chosen file.

    ``study``: the study whose definition is used (``--definition``).  Raises ToolError, or Interrupted if stopped.
    """
    view = JudgeView(console)
    run = find_run(path)
    _check_mark(run)
    from hpo.judge import judge as judges  # loads torch, so all checks that do not need it come first

    judge = judges.load(run, inputs, view.say, named=study)
    damaged = _unfit(run, judge)
    record = recorded_at(run.evaluation, run.evaluation.parent, f"evaluate {run.name}")
    with drawing_alone(run), record as work, Stop(view.on_ask) as stop:
        view.should_stop = stop
        device = str(judge.evaluator.base.device)
        guard = Guard(
            judge.lookout,
            run.evaluation,
            view.say,
            name=f"evaluate {run.name}",
            device=device,
            uuid=gpu_uuid(device),
        )
        guard.begins(stage="evaluate")
        with view.guarded(guard):
            outcome = _judged(run, judge, damaged, view)
        _write(run, judge, outcome)
        view.show(outcome)
        chosen = run.checkpoints[outcome.final]
        if not run.trial:
            _mark(run, chosen, outcome)
            work.says = f"best: {run.mark} is a copy of {chosen.path.name}"
            view.say(work.says)
        if outcome.warning:
            view.say(outcome.warning)
        view.say(f"results: {run.evaluation / 'evaluation.json'}")
        if len(run.checkpoints) > 1:
            view.say(f"curve: {run.evaluation / 'curve.png'}")
        if line := following(run, path, inputs, study):
            view.say(f"next: {line}")
    return chosen.path


def _judged(run: RunFiles, judge: Judge, damaged: Mapping[str, str], view: JudgeView) -> Evaluated:
    from evaluation.choice import checkpoints
    from hpo.judge.judge import LORA_NAME

    count, prompts = len(run.checkpoints) - len(damaged), judge.evaluator.prompts
    view.pace.planned = (count + 1) * prompts.image_count
    if judge.confirmation is not None and count > 1:
        view.pace.planned += (min(checkpoints.FINALISTS, count) + 1) * judge.confirmation.image_count
    anchors = _anchors(judge, run, view)
    view.say(
        f"{count} checkpoint{'' if count == 1 else 's'} × {prompts.image_count} images ({prompts.size}), "
        f"{len(judge.reference_files)} references, {judge.evaluator.scorer.name}"
    )
    if before := sum((run.evaluation / c.name / SEARCH / LORA_NAME).is_file() for c in run.checkpoints):
        view.say(f"{before}/{count} checkpoints were scored before")
    points = [
        _unscored(checkpoint, damaged[checkpoint.name])
        if checkpoint.name in damaged
        else _point(run, checkpoint, judge, SEARCH, view)
        for checkpoint in run.checkpoints
    ]
    choice = checkpoints.choose(points, anchors)
    verdict = checkpoints.verdict(points, choice, finished=run.finished)
    tested = checkpoints.finalists(points, choice)
    if judge.confirmation is None or len(tested) < 2:
        word = "unconfirmed" if len(tested) > 1 else "only"
        return Evaluated(points, choice, verdict, tested, (), None, choice.chosen, word)
    view.say(
        f"confirming {len(tested)} of them with {judge.confirmation.image_count} images each for new prompts"
    )
    later = judge.on(judge.confirmation)
    fresh = _anchors(later, run, view)
    retested = [_point(run, run.checkpoints[n], later, CONFIRMATION, view) for n in tested]
    judge.evaluator = replace(
        judge.evaluator, sampling=later.evaluator.sampling
    )  # keeps a reduced batch size
    rechoice = checkpoints.choose(retested, fresh)
    final, word = checkpoints.confirmed(choice, tested, rechoice)
    return Evaluated(points, choice, verdict, tested, retested, rechoice, final, word)


def _unfit(run: RunFiles, judge: Judge) -> dict[str, str]:
    """Checkpoints that cannot be applied to the base: name → reason.  If none can, raises the last one's error."""
    found: dict[str, ModelFileError] = {}
    for checkpoint in run.checkpoints:
        try:
            judge.check(checkpoint.path)
        except ModelFileError as error:
            found[checkpoint.name] = error
    if len(found) == len(run.checkpoints):
        raise found[run.checkpoints[-1].name]
    return {name: error.message for name, error in found.items()}


def _anchors(judge: Judge, run: RunFiles, view: JudgeView) -> Anchors:
    images = judge.evaluator.prompts.image_count
    with view.drawing(f"untrained {judge.evaluator.base.name}", images) as on_image:
        anchors = judge.measure_anchors(run.evaluation, on_image)
    for problem in anchors.problems:
        view.say(f"warning: {problem}")
    return anchors


def _unscored(checkpoint: Checkpoint, reason: str, cause: str = "") -> CheckpointPoint:
    from evaluation.choice import CheckpointPoint

    return CheckpointPoint(checkpoint.name, checkpoint.epoch, checkpoint.step, None, reason, cause)


def _point(
    run: RunFiles, checkpoint: Checkpoint, judge: Judge, name: str, view: JudgeView
) -> CheckpointPoint:
    """Score a checkpoint on the prompts of ``judge``.  ``name``: the folder for images and metrics."""
    from evaluation.choice import SPOILED, UNCHANGED, CheckpointPoint
    from evaluation.images import Unchanged

    started = time.monotonic()
    try:
        with view.drawing(label(checkpoint.name), judge.evaluator.prompts.image_count) as on_image:
            folder = run.evaluation / checkpoint.name / name
            score = judge.score(checkpoint.path, folder, on_image)
    except InvalidImages as error:
        point = _unscored(checkpoint, error.message, SPOILED)
    except Unchanged:
        point = _unscored(
            checkpoint, "it has no effect: its images equal those of the untrained base", UNCHANGED
        )
    else:
        safety = score.safety
        if safety and safety.broken:  # such images are unusable, whatever their score
            point = _unscored(checkpoint, "; ".join(map(safety.says, safety.broken)), SPOILED)
        else:
            point = CheckpointPoint(checkpoint.name, checkpoint.epoch, checkpoint.step, score)
    said = point.reason or f"score {score.value:.4f} ± {score.se:.4f}"
    view.say(f"{label(checkpoint.name)} ({name} prompts): {said}, {clock(time.monotonic() - started)}")
    return point


@contextlib.contextmanager
def drawing_alone(run: RunFiles) -> Iterator[None]:
    """Lock the evaluation folder against other processes and delete incomplete files of a killed one."""
    with alone(run.evaluation / "lock", f"evaluates {run.name}"):
        sweep_tree(run.evaluation)
        yield


def following(run: RunFiles, path: Path, inputs: Inputs, named: str | None) -> str:
    """The comparison with the trial that the settings were transferred from, if its LoRA file is still there."""
    from hpo.judge.standard import transferred_from

    source = transferred_from(run)
    if source is None or not source.lora.is_file():
        return ""
    given = {
        "--clip": inputs.clip,
        "--prompts": inputs.prompts,
        "--references": inputs.references,
        "--base-b": inputs.base,
        "--data-b": inputs.data,
        "--definition": named,
        "--device": inputs.device,
    }
    flags = [word for flag, value in given.items() if value for word in (flag, value)]
    root = source.root.resolve()
    shown = root.relative_to(Path.cwd()) if root.is_relative_to(Path.cwd()) else root
    return command("hpo", "compare", shown, path, *flags)


# best.safetensors


def _check_mark(run: RunFiles) -> None:
    """Raise ConfigError before any work if best.safetensors exists and was not written by this tool."""
    if not run.trial and run.mark.exists() and not is_mark(run.mark):
        raise ConfigError(
            f"{run.mark} was not written by hpo evaluate, so it is not replaced",
            "rename or move that file",
        )


def _mark(run: RunFiles, chosen: Checkpoint, outcome: Evaluated) -> None:
    """Copy the chosen file to best.safetensors and record its source in the metadata."""
    point = outcome.points[outcome.final]
    assert point.score is not None
    source = sha256_file(chosen.path)
    require_space(run.output, chosen.path.stat().st_size)
    retest = next((p.score for p in outcome.retested if p.name == point.name), None)
    extra = {
        MARK_KEY: chosen.path.name,
        f"{MARK_KEY}_sha256": source,
        f"{MARK_KEY}_score": f"{(retest or point.score).value:.4f} ± {(retest or point.score).se:.4f}",
        f"{MARK_KEY}_prompts": CONFIRMATION if retest else SEARCH,
    }
    write_atomic(run.mark, with_metadata(chosen.path, extra))


# evaluation.json


def _write(run: RunFiles, judge: Judge, outcome: Evaluated) -> None:
    import numpy as np

    from evaluation.choice import curve_picture
    from evaluation.images import png_bytes

    write_atomic(run.evaluation / "evaluation.json", json.dumps(_values(run, judge, outcome), indent=1))
    if len(outcome.points) == 1:  # a single point is no curve
        (run.evaluation / "curve.png").unlink(missing_ok=True)
        return
    picture = curve_picture(
        outcome.points,
        outcome.choice.best,
        outcome.final,
        outcome.retested,
        f"{run.name} on {judge.evaluator.base.name}",
    )
    write_atomic(run.evaluation / "curve.png", png_bytes(np.asarray(picture)))


def _values(run: RunFiles, judge: Judge, outcome: Evaluated) -> dict[str, Any]:
    names, by = [point.name for point in outcome.points], judge.evaluator
    return {
        "run": run.name,
        "base": {"name": by.base.name, "identity": by.base.identity},
        "sampling": asdict(by.sampling),
        "scorer": {"name": by.scorer.name, "sha256": by.scorer.sha},
        "likeness": {"name": by.likeness.name, "sha256": by.likeness.sha},
        "formula": asdict(by.formula),
        "limits": judge.safeguards.limits.as_dict(),
        "references": [str(path) for path in judge.reference_files],
        SEARCH: {"prompts": by.prompts.hash, **_curve(outcome.points, outcome.choice)},
        CONFIRMATION: {
            "prompts": judge.confirmation.hash if judge.confirmation else None,
            **(_curve(outcome.retested, outcome.rechoice) if outcome.rechoice else {}),
        },
        "chosen": names[outcome.final],
        "chosen_file_sha256": sha256_file(run.checkpoints[outcome.final].path),
        "confirmation_says": outcome.word,
        "verdict": asdict(outcome.verdict),
        "warning": outcome.warning,
    }


def _curve(points: Sequence[CheckpointPoint], choice: CheckpointChoice) -> dict[str, Any]:
    rows = []
    for number, point in enumerate(points):
        lead = choice.lead[number]
        rows.append(
            {
                "checkpoint": point.name,
                "epoch": point.epoch,
                "step": point.step,
                "reason": point.reason,
                **_figures(point.score),
                "best_minus_this": asdict(lead) if lead else None,
                "within_one_se": number in choice.within,
            }
        )
    return {"checkpoints": rows, "best": points[choice.best].name, "earliest": points[choice.chosen].name}


def _figures(score: Score | None) -> dict[str, Any]:
    names = (
        *("value", "se", "prompt_following", "prompt_following_se", "likeness", "likeness_se"),
        *("clip_t", "clip_i", "n_images"),
    )
    figures: dict[str, Any] = {name: getattr(score, name) if score else None for name in names}
    return {**figures, "beside": beside_values(score) if score else []}


def beside_values(score: Score) -> list[dict[str, Any]]:
    """The extra metrics of other models, without the values of single images."""
    return [{"measure": f.measure, "model": f.model, "sha256": f.sha, "value": f.value} for f in score.beside]
