"""The work of one trial: train, save, score, and write result.json before the result is reported.

Owns the files of trial_NNNN/ and the classification of failures.  Does not own proposals, storage or the
order of trials (``hpo.search.worker``).

A trial is *infeasible* if its settings caused the failure: the sampler learns from it.  A trial is *failed* if the
machine or this tool caused the failure: this contains no information about the settings.  An interrupted trial
writes no result.  It resumes from its newest checkpoint or, once its LoRA is saved, with the missing images.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from optuna.exceptions import StorageInternalError

from evaluation.score import CLIPPED
from hpo.machine import share_threads
from hpo.night import DIED, need_a_fresh_process, reached, works_on
from hpo.search.looks import Looks, Stopped
from hpo.search.remedies import CHECKPOINTING, remedies_of, remedy_words, with_remedies
from hpo.study import (
    COMPLETE,
    FAILED,
    INFEASIBLE,
    PRUNED,
    ClaimLost,
    Result,
    TrialFolder,
    config_sha256,
    deciding,
    infeasible_value,
    settings_of,
    write_result,
)
from hpo.terminal import short
from hpo.train import StepLog, train_adapter
from trainer.adapters import COMMENT, CONFIG_KEY, dataset_metadata
from trainer.config import TrainConfig
from trainer.data import total_steps
from trainer.errors import (
    DeviceLost,
    HostMemory,
    Interrupted,
    MachineError,
    ModelFileError,
    OutOfMemory,
    SettingsFailure,
    ToolError,
)
from trainer.events import Finished, Skipped, Step
from trainer.files import append_line, read_records, sha256_file, sweep_tree
from trainer.memory import next_rung
from trainer.oom import named, out_of_memory_named
from trainer.text import clean_text

if TYPE_CHECKING:
    from evaluation.score import Safety, Score
    from hpo.search.workbench import Workbench
    from trainer.adapters import Adapter
    from trainer.events import Event

WEIGHT_CHANGE = (
    "weight_change"  # of the last row of train.jsonl, beside the event (``Adapter.weight_change``)
)


SAME = 1e-9  # relative difference of two numbers that were derived in different ways


class NoEffect(SettingsFailure):
    """The adapter is applied and finite, but so weak that it does not change any pixel."""

    reason = "no_effect"


class BeyondLimit(SettingsFailure):
    """The images are valid but break a limit: copies of training images, low diversity, a lost class prior, or
    nothing that can be recognised."""

    def __init__(self, score: Score, safety: Safety) -> None:
        self.score = score
        self.reason = safety.broken[0]
        super().__init__("; ".join(map(safety.says, safety.broken)), safety.advice)


class Watch(Protocol):
    """Receives the progress of a trial and can stop it."""

    def on_event(self, event: Event) -> None: ...
    def on_image(self, done: int, total: int) -> None: ...
    def should_stop(self) -> bool: ...


class Check(Protocol):
    """Raises ClaimLost if another worker may be at this trial (``hpo.study.Claimed.check``)."""

    def __call__(self, *, certain: bool = False) -> None: ...


def unshared(*, certain: bool = False) -> None:
    """The ``Check`` of a trial that no other process can take."""


@dataclass(frozen=True)
class Watched:
    """A watch, and the check before anything is written: two workers at one trial would write the same files."""

    watch: Watch
    check: Check
    folder: TrialFolder

    def on_event(self, event: Event) -> None:
        self.watch.on_event(event)

    def on_image(self, done: int, total: int) -> None:
        self.check()
        reached(f"images of {self.folder.root}", done)
        self.watch.on_image(done, total)

    def should_stop(self) -> bool:
        return self.watch.should_stop()


def failed(folder: TrialFolder, config: TrainConfig, reason: str, message: str) -> Result:
    """The result of a failed trial: it contains no information about the settings."""
    return _result(folder, config, _Ending(FAILED, None, reason=reason, message=message))


def run_trial(
    bench: Workbench,
    folder: TrialFolder,
    config: TrainConfig,
    watch: Watch,
    check: Check = unshared,
    looks: Looks | None = None,
) -> Result:
    """Start or resume the trial, write result.json, and delete the files needed only to resume.

    ``looks``: the trial is looked at while it is trained, and may be stopped.

    Raises Interrupted (progress is saved), and ClaimLost, after which nothing more is written.  Errors while writing
    result.json are not caught: the trial then has no result.
    """
    sweep_tree(folder.root)
    begun_with = _threads(folder) if bench.base.device.type == "cpu" else None
    threads = share_threads(begun_with)
    if begun_with not in (None, threads):
        _log(folder, f"begun with {begun_with} CPU threads, goes on with {threads}: the last bits may differ")
    _note(folder, "start", threads=threads)
    works_on(folder.starts)
    try:
        result = _work(bench, folder, config, Watched(watch, check, folder), looks)
    except (
        ClaimLost,
        StorageInternalError,
    ):  # no result: the worker takes the next, or connects again and resumes
        raise
    except Interrupted:
        _note(folder, "interrupted")
        raise
    except Stopped as stopped:
        _log(folder, stopped.message)
        result = _result(
            folder, config, _Ending(PRUNED, stopped.value, reason="behind", message=stopped.message)
        )
    except (DeviceLost, HostMemory) as error:  # every later trial of this process would fail too
        _log(folder, f"stopped: {error}")
        raise
    except SettingsFailure as error:
        _log(folder, f"infeasible: {error.reason}: {error}")
        below_zero = bench.evaluator.formula.below_zero
        ending = _Ending(
            INFEASIBLE,
            infeasible_value(below_zero),
            reason=error.reason,
            message=error.message,
            remedy=remedy_words(config, remedies_of(folder) or ()),
            score=error.score if isinstance(error, BeyondLimit) else None,
            below_zero=below_zero,
        )
        result = _result(folder, config, ending)
    except ToolError as error:
        _log(folder, f"failed: {error}")
        result = failed(folder, config, type(error).__name__, str(error))
    except Exception as error:
        _log(folder, traceback.format_exc())
        lost = named(error, "not enough memory", "close other programs")
        if isinstance(lost, DeviceLost):
            raise lost from None
        if isinstance(lost, OutOfMemory):
            need_a_fresh_process(lost)
        text = clean_text(str(error).strip().splitlines()[0] if str(error).strip() else "")[:200]
        result = failed(folder, config, f"crash:{type(error).__name__}", f"{text} (see {folder.log})")
    check(certain=True)
    write_result(folder, result)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    works_on(None)
    if result.reason == OutOfMemory.reason:
        bench.release()
    return result


def _work(
    bench: Workbench, folder: TrialFolder, config: TrainConfig, watch: Watched, looks: Looks | None
) -> Result:
    adapter, remedy = _trained(bench, folder, config, watch, looks)
    try:
        started = time.monotonic()
        score = _scored(bench, folder, adapter, config, watch)
        if score.safety and score.safety.broken:
            raise BeyondLimit(score, score.safety)
        seconds = time.monotonic() - started
    finally:
        adapter.remove()
    if not all(map(math.isfinite, (score.value, score.se, score.objective, score.objective_se))):
        raise ModelFileError(f"the score of trial {folder.number} is {score.value}", "see its metrics.json")
    ending = _Ending(
        COMPLETE,
        score.value,
        score=score,
        score_seconds=seconds,
        remedy=remedy,
        below_zero=score.formula.below_zero,
    )
    result = _result(folder, config, ending)
    _log(folder, f"score {score.value:.6f} ± {score.se:.6f}, objective {score.objective:.6f}")
    return result


def _trained(
    bench: Workbench, folder: TrialFolder, config: TrainConfig, watch: Watched, looks: Looks | None = None
) -> tuple[Adapter, str]:
    """The trained adapter in the base, rounded to its file's precision, and the memory remedy that was needed."""
    from trainer.adapters import lorafile

    if folder.lora.is_file():  # trained before, interrupted while scoring
        file = lorafile.read(folder.lora)
        remedy = _saved_remedy(folder, config, json.loads(file.metadata[CONFIG_KEY]))
        return lorafile.attach(bench.base, file), remedy
    remedies = remedies_of(folder)  # of an earlier process: without them it would run out of memory again
    if remedies is None:
        remedies, why = bench.remedies.first(config)
        if remedies:
            _log(folder, f"begins with {remedy_words(config, remedies)}: {why}")
            _note(folder, "remedy", remedies=remedies, why=why)
    while True:
        settled = with_remedies(config, remedies)
        try:
            with out_of_memory_named(settled):
                trained = _train(bench, folder, config, settled, watch, looks)
                return trained, remedy_words(config, remedies)
        except OutOfMemory as error:
            need_a_fresh_process(error)
            rung = next_rung(settled, remedies, keeps_result=True)
            bench.remedies.ran_out(folder.number, settled)
            if rung is None:
                raise
            why = error.message
        remedies = (*remedies, rung.name)
        words = remedy_words(config, remedies)
        _log(folder, f"{why}; retrying with {words}, which does not change the result")
        _note(folder, "remedy", remedies=remedies, why=why)
        bench.release()


def _saved_remedy(folder: TrialFolder, config: TrainConfig, saved: Mapping[str, Any]) -> str:
    """The memory remedy used to train a LoRA file.  Raises ModelFileError if its settings are not the trial's."""
    now, saved = deciding(config.as_dict()), deciding(saved)
    changed = sorted(name for name in now if not is_equal(saved.get(name), now[name]))
    if not set(changed) <= set(CHECKPOINTING):
        raise ModelFileError(
            f"{folder.lora} was trained with a different {', '.join(changed)}", "delete the file"
        )
    return remedy_words(config, remedies_of(folder) or ()) or ", ".join(changed)


def is_equal(one: Any, other: Any) -> bool:
    """Whether two values of a setting are equal.  Numbers may differ in their last digits: those of a trial that was
    taken over (``hpo.search.fork``) are derived anew from another space's parameters."""
    if one == other:
        return True
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
    return numbers and math.isclose(one, other, rel_tol=SAME)


def _train(
    bench: Workbench,
    folder: TrialFolder,
    config: TrainConfig,
    settled: TrainConfig,
    watch: Watched,
    looks: Looks | None,
) -> Adapter:
    """The trained adapter, also written to its file.  ``settled``: the settings with the remedies."""
    from trainer.adapters import lorafile
    from trainer.loop import Conduct
    from trainer.memory import step_work

    # as the LoRA's metadata has it
    config = config.with_values({name: getattr(settled, name) for name in CHECKPOINTING})

    def on_encoded(done: int, total: int) -> None:
        if watch.should_stop() and done < total:
            raise Interrupted(
                f"stopped after encoding image {done}/{total}", "run the same command again to resume"
            )

    log = StepLog(folder.steps)
    marks = looks.marks(total_steps(config, bench.data)) if looks else {}

    def on_event(event: Event, adapter: Adapter) -> None:
        watch.check()
        more = {WEIGHT_CHANGE: adapter.weight_change()} if isinstance(event, Finished) else {}
        log.write(event, **more)
        watch.on_event(event)
        if looks and isinstance(event, Step | Skipped) and event.step in marks:
            looks.after(event.step, marks[event.step])

    # the batches stay the same, however many images are computed at once (``trainer.loop.stepper``)
    how = Conduct(
        checkpoints=folder.checkpoints,
        should_stop=watch.should_stop,
        work_bytes=lambda: step_work(settled, bench.base_spec),
    )
    adapter = train_adapter(
        bench.base, settled, lambda adapter: (bench.prepared(config, on_encoded), how), on_event
    )
    try:
        adapter.round_to(config.save_precision)
        watch.check(certain=True)
        known = dataset_metadata(config, bench.data) | {COMMENT: f"trial {folder.number}"}
        lorafile.write(folder.lora, adapter, config, known)
    except BaseException:
        adapter.remove()
        raise
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return adapter


def _scored(
    bench: Workbench, folder: TrialFolder, adapter: Adapter, config: TrainConfig, watch: Watched
) -> Score:
    from evaluation.images import Heading, Unchanged
    from evaluation.score import evaluate_adapter

    def on_image(done: int, total: int) -> None:
        watch.on_image(done, total)
        if watch.should_stop() and done < total:
            raise Interrupted(
                f"stopped after image {done}/{total}; finished images are kept",
                "run the same command again to resume",
            )

    on_image(0, bench.prompts.image_count)
    try:
        return evaluate_adapter(
            bench.evaluator,
            folder.root,
            identity=f"{bench.base.identity}:{adapter.fingerprint()}",
            heading=Heading(f"{bench.folder.name}, trial {folder.number}", _searched(bench, config)),
            on_image=on_image,
        )
    except Unchanged:
        if _is_in_place(adapter, config):
            raise NoEffect(
                "the LoRA is applied but does not change any pixel",
                "try a higher learning_rate or more epochs",
            ) from None
        raise
    except OutOfMemory as error:
        need_a_fresh_process(error)
        # every trial generates the same images, so its settings are not the cause
        raise MachineError(error.message, error.hint) from None


def _searched(bench: Workbench, config: TrainConfig) -> dict[str, str]:
    """The settings of a trial that the study searches, in words."""
    names = [name for parameter in bench.study.space for name in settings_of(parameter.name)]
    return {name: short(getattr(config, name)) for name in dict.fromkeys(names)}


def _is_in_place(adapter: Adapter, config: TrainConfig) -> bool:
    """Whether every target module in the base has its LoRA, and all of them are active and finite."""
    from trainer.adapters import targets_of

    wanted = {target.key for target in targets_of(adapter.base, config)}
    for layer in adapter.layers:
        target = layer.target
        module: Any = adapter.base.components()[target.component].get_submodule(target.path)
        if module is not layer.wrapped or module.disable_adapters:
            return False
        wanted.discard(target.key)
    return not wanted and all(bool(tensor.isfinite().all()) for tensor in adapter.state().values())


def deaths_without_progress(folder: TrialFolder) -> tuple[int, str, str]:
    """How many processes in a row died in this trial without saving more progress, and why the last one did: its
    reason (``hpo.night.endings``) and a line about it, as far as their supervisor has noted it.

    A process that hung and saved when it was ended counts as dead.
    """
    count, saved, before = 0, None, (0, None)
    reason, why = "process_died", ""
    for row in read_records(folder.starts):
        event = row.get("event")
        if event == "remedy":
            continue
        if event == DIED:
            count, saved = before
            reason, why = str(row.get("reason", reason)), str(row.get("why", ""))
        elif event != "start":
            count, saved = 0, None
        else:
            count, saved = (count + 1 if row.get("saved") == saved else 1), row.get("saved")
            before, reason, why = (count, saved), "process_died", ""
    return (count if saved == _saved(folder) else 0), reason, why


def _threads(folder: TrialFolder) -> int | None:
    """The number of CPU threads that the trial was begun with; None if it begins now, or that was not noted."""
    noted = [row["threads"] for row in read_records(folder.starts) if isinstance(row.get("threads"), int)]
    return noted[0] if noted and noted[0] > 0 else None


def resumes_from(folder: TrialFolder) -> str:
    """Where an interrupted trial goes on, for the user."""
    if folder.lora.is_file():
        images = len(list((folder.root / "samples").glob("*.png")))
        return f"it is trained; {images} images are done" if images else "it is trained; its images come next"
    step = max((p.name for p in folder.checkpoints.glob("step-*")), default="").removeprefix("step-")
    return f"from step {int(step)}" if step.isdecimal() else "from its beginning"


def _saved(folder: TrialFolder) -> str:
    """A string that changes whenever the trial has saved more progress."""
    images = len(list((folder.root / "samples").glob("*.png")))
    steps = max((p.name for p in folder.checkpoints.glob("step-*")), default="")
    return f"{steps}:{folder.lora.is_file()}:{images}"


def _note(folder: TrialFolder, event: str, **more: Any) -> None:
    row = {"event": event, "saved": _saved(folder), "time_utc": _now(), **more}
    append_line(folder.starts, json.dumps(row))


def _log(folder: TrialFolder, text: str) -> None:
    for line in text.splitlines():
        append_line(folder.log, f"{_now()} {line}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class _Ending:
    """The outcome of a trial: its state, its value, and the reason."""

    state: str
    value: float | None
    score: Score | None = None
    score_seconds: float = 0.0
    reason: str = ""
    message: str = ""
    remedy: str = ""
    below_zero: str = CLIPPED


def _result(folder: TrialFolder, config: TrainConfig, ending: _Ending) -> Result:
    rows = list(read_records(folder.steps))
    kept = folder.lora.is_file()
    score = ending.score
    safety = score.safety if score else None
    measured = score if ending.state == COMPLETE else None
    return Result(
        number=folder.number,
        state=ending.state,
        value=ending.value,
        se=measured.se if measured else None,
        reason=ending.reason,
        message=clean_text(ending.message),
        config_sha256=config_sha256(config),
        lora=folder.lora.name if kept else "",
        lora_sha256=sha256_file(folder.lora) if kept else "",
        prompt_following=score.prompt_following if score else None,
        likeness=score.likeness if score else None,
        clip_t=score.clip_t if score else None,
        clip_i=score.clip_i if score else None,
        n_images=score.n_images if score else 0,
        steps=max((row["step"] for row in rows if row.get("event") in ("step", "skipped")), default=0),
        skipped_steps=sum(row.get("event") == "skipped" for row in rows),
        train_seconds=round(sum(row.get("seconds", 0.0) for row in rows), 3),
        score_seconds=round(ending.score_seconds, 3),
        remedy=ending.remedy,
        time_utc=_now(),
        copy_rate=safety.copy_rate if safety else None,
        diversity=safety.diversity if safety else None,
        prior=safety.prior if safety else None,
        strangeness=safety.strangeness if safety else None,
        amounts=dict(safety.amounts) if safety else {},
        weight_change=_weight_change(rows),
        beside=[
            {"measure": of.measure, "model": of.model, "value": of.value}
            for of in (score.beside if score else ())
        ],
        objective=measured.objective if measured else ending.value,
        objective_se=measured.objective_se if measured else None,
        below_zero=ending.below_zero,
        look_seconds=round(sum(row.get("seconds", 0.0) for row in read_records(folder.looks)), 3),
    )


def _weight_change(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """From the step log.  None if the training did not end, or an older version logged it."""
    found = [row[WEIGHT_CHANGE] for row in rows if WEIGHT_CHANGE in row]
    return float(found[-1]) if found and math.isfinite(found[-1]) else None
