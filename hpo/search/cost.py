"""Estimated cost of a study: updates, images, seconds, bytes, before the first trial and after it.

Owns the averages and the extremes over the search space, the timing of a few real steps, the size of files, the
disk space check, and the warnings about trials that are too short or too long.  Does not own the pace of finished
trials (``hpo.study.pace``).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpo.search.looks import look_images
from hpo.search.remedies import with_remedies
from hpo.search.workbench import Workbench
from hpo.study import (
    COUNTED,
    IMAGES_SEEN,
    Choice,
    Pace,
    StudyFolder,
    longer,
    measured,
    needed_images,
    needed_words,
    samples_of,
    set_words,
    settings_of,
    shorter,
    span,
)
from hpo.terminal import clock
from hpo.train import count_steps, images_seen
from trainer.adapters import adapter, count_weights
from trainer.config import TrainConfig
from trainer.data import total_steps
from trainer.errors import (
    ConfigError,
    DataError,
    DeviceLost,
    Interrupted,
    MachineError,
    ModelFileError,
    OutOfMemory,
    ToolError,
    first_line,
)
from trainer.events import Step
from trainer.files import folder_bytes, require_space
from trainer.loop import loop
from trainer.oom import out_of_memory_named

if TYPE_CHECKING:
    import optuna

PROBE_STEPS = 3  # the first step allocates; the last of three is timed
RESERVE_BYTES = 200_000_000  # kept free beside the study's files: checkpoints of the running trial (estimate)
BYTES_PER_PIXEL = 2.0  # of a sample PNG, if none was generated yet (estimate; photos need less)
GRID_SIDE_PX = 192  # of an image in grid.png; a copy of the grid is stored for the dashboard
GRID_GROWTH = (
    1.5  # of an image that is enlarged for the grid; 8 kB a caption (measured on grids of 64 px images)
)
CAPTION_BYTES = 8_000
ROW_BYTES = 250  # a step in train.jsonl, an image in metrics.json (measured)
DATABASE_BYTES = (
    130_000  # of a small study (measured); while it is open, most of it is in its write-ahead log
)
TENSOR_BYTES = 110  # a tensor in the header of a LoRA file (measured)
DRAWS = 64  # suggestions to average over
NIGHT_HOURS = 10.0  # what a whole search may take without a warning; --max-hours replaces it
LENGTHS = ("max_train_epochs", "max_train_steps", "train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Ends:
    """The shortest and the longest trial of the space: optimizer steps, training images seen, samples.

    ``samples`` (steps × effective batch) is what time depends on; regularization images are no images seen.
    """

    updates: tuple[int, int]
    seen: tuple[int, int]
    samples: tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """Average cost of one trial over the space, its extremes, and the size of its files.

    ``samples_sd``: how much the samples of a trial differ over the space.  ``baseline_samples``: of trial 0.
    """

    steps: float
    samples: float
    images: int
    ends: Ends
    pace: Pace | None
    lora_bytes: int
    trial_bytes: int  # without the LoRA
    samples_sd: float = 0.0
    baseline_samples: float = 0.0

    @property
    def trial_seconds(self) -> float | None:
        return self.pace.seconds(self.samples, self.images) if self.pace else None

    def mean_samples(self, pace: Pace | None, done: int, weight: int) -> float:
        """Of a trial that has not started: between the mean of the space, which counts as ``weight`` trials, and that
        of the ``done`` trials.  The sampler leaves the middle slowly."""
        if pace is None or pace.samples is None:
            return self.samples
        return (weight * self.samples + done * pace.samples) / (weight + done)

    def bytes_for(self, trials: int, keep_best: int | None) -> int:
        """The files of so many trials."""
        kept = trials if keep_best is None else min(trials, keep_best + 1)
        return kept * self.lora_bytes + trials * self.trial_bytes


def estimate(bench: Workbench, study: optuna.Study, *, probe: bool) -> Cost:
    """Average cost of a trial.  ``probe`` times three real steps of the baseline."""
    baseline = bench.config(bench.study.baseline, 0)
    drawn = [bench.study.config(draw) for draw in _draws(bench)]
    steps = [total_steps(config, bench.data) for config in drawn]
    samples = [samples_of(c, n) for c, n in zip(drawn, steps, strict=True)]
    pace = measured(study, bench.folder)
    if pace is None and probe:
        pace = probed_pace(bench, baseline)
    return Cost(
        steps=float(np.mean(steps)),
        samples=float(np.mean(samples)),
        images=bench.prompts.image_count + look_images(bench),
        ends=ends(bench),
        pace=pace,
        lora_bytes=round(float(np.mean([_lora_bytes(bench, config) for config in drawn]))),
        trial_bytes=_trial_bytes(bench, float(np.mean(steps))),
        samples_sd=float(np.std(samples)),
        baseline_samples=samples_of(baseline, total_steps(baseline, bench.data)),
    )


def ends(bench: Workbench) -> Ends:
    """The extremes over all combinations of the searched settings that decide how long a trial is."""
    deciding = [p for p in bench.study.space if set(settings_of(p.name)) & set(LENGTHS)]
    updates, seen, samples = [], [], []
    for values in itertools.product(*(p.domain.edges for p in deciding)):
        corner = dict(zip((p.name for p in deciding), values, strict=True))
        config = bench.study.config({**bench.study.baseline, **corner})
        run = count_steps(config, bench.data)
        updates.append(run.total_steps)
        seen.append(images_seen(run, bench.data))
        samples.append(samples_of(config, run.total_steps))
    return Ends((min(updates), max(updates)), (min(seen), max(seen)), (min(samples), max(samples)))


def check_disk(bench: Workbench, cost: Cost, trials: int, keep_best: int | None) -> None:
    """Raise MachineError if there is not enough disk space."""
    try:
        require_space(bench.folder.root, cost.bytes_for(trials, keep_best) + RESERVE_BYTES)
    except MachineError as error:
        raise MachineError(
            error.message, "free some space, or keep fewer LoRA files: --keep-best 5"
        ) from None


# What is said


def length_line(cost: Cost) -> str:
    """Updates and images seen at both ends of the space, and how long such trials take."""
    text = f"a trial: {span(cost.ends.updates)} updates, {span(cost.ends.seen)} training images seen"
    if cost.pace is None:
        return text
    low, high = (clock(cost.pace.seconds(samples, cost.images)) for samples in cost.ends.samples)
    return f"{text}, about {low if low == high else f'{low}–{high}'} with its {cost.images} images"


def warnings(bench: Workbench, cost: Cost, trials: int | None, max_hours: float | None) -> list[str]:
    """What is wrong with the shortest and the longest trial of the space: one line each.  ``trials``: None if a time
    budget decides how many there are."""
    found, needed = [], needed_images(bench.base_spec)
    low, high = cost.ends.seen
    if low < needed:
        which = "even the longest trial sees" if high < needed else "the shortest trial sees"
        sets = set_words(longer(bench.study, _per_unit(bench), needed))
        todo = f"; for longer trials: {sets}" if sets else ""
        then = "probably nothing is learned" if high < needed else "short trials may learn nothing"
        found.append(
            f"warning: {which} {high if high < needed else low:,} images, but {needed_words(needed)}: {then}{todo}"
        )
    if cost.pace is not None and trials is not None:
        found += _too_long(bench, cost, cost.pace, trials, max_hours)
    return found


def _too_long(bench: Workbench, cost: Cost, pace: Pace, trials: int, max_hours: float | None) -> list[str]:
    hours = NIGHT_HOURS if max_hours is None else max_hours
    share = hours * 3600 / trials
    longest, mean = pace.seconds(cost.ends.samples[1], cost.images), pace.seconds(cost.samples, cost.images)
    if longest <= share:
        return []
    night = "--max-hours" if max_hours is not None else "a night"
    what = f"the longest trial takes about {clock(longest)}; its share of {night} ({hours:g} h / {trials} trials) is "
    todo = []
    fit = (share - cost.images * pace.image_seconds - pace.other_seconds) / pace.sample_seconds
    if sets := set_words(shorter(bench.study, fit / cost.ends.samples[1])):
        todo.append(f"shorter trials: {sets}")
    if mean > share:
        todo.append(f"fewer trials: --trials {max(1, int(hours * 3600 / mean))}")
    tail = f"; {' or '.join(todo)}" if todo else ""
    fits = (
        "all trials together still fit" if mean <= share else f"all trials take about {clock(mean * trials)}"
    )
    return [f"warning: {what}{clock(share)}; {fits}{tail}"]


def after_first_line(bench: Workbench, study: optuna.Study, cost: Cost, trials: int, keep: int | None) -> str:
    """Time and disk, corrected by the finished trials.  Empty if none was scored."""
    pace = measured(study, bench.folder)
    done = study.get_trials(deepcopy=False, states=COUNTED)
    left = trials - len(done)
    if pace is None or left <= 0:
        return ""
    seconds = pace.seconds(cost.samples, cost.images)
    size = final_bytes(bench.folder, study, cost, trials, keep)
    return (
        f"measured: about {clock(seconds)} per trial, {clock(seconds * left)} for the {left} left; "
        f"{megabytes(size)} of disk in the end"
    )


# Bytes


def megabytes(size: float) -> str:
    return (
        f"{size / 1e6:.1f} MB"
        if size < 10e6
        else f"{size / 1e6:.0f} MB"
        if size < 10e9
        else f"{size / 1e9:.0f} GB"
    )


def final_bytes(folder: StudyFolder, study: optuna.Study, cost: Cost, trials: int, keep: int | None) -> int:
    """The size of the study's folder when all trials are done: what is there now, and the trials that are left.

    A trial needs what the finished ones need; its LoRA what LoRAs of the space need on average.
    """
    size = folder.database.stat().st_size if folder.database.is_file() else 0
    now = folder_bytes(folder.root) + max(0, DATABASE_BYTES - size)
    done = [t.number for t in study.get_trials(deepcopy=False, states=COUNTED)]
    if not done:
        return now + cost.bytes_for(trials, keep)
    loras = sum(folder.trial(n).lora.stat().st_size for n in done if folder.trial(n).lora.is_file())
    own = sum(folder_bytes(folder.trial(n).root) for n in done) - loras + folder_bytes(folder.artifacts)
    left = max(0, trials - len(done))
    kept = trials if keep is None else min(trials, keep + 1)
    return round(
        now - loras + left * own / len(done) + max(loras, loras + (kept - len(done)) * cost.lora_bytes)
    )


def _lora_bytes(bench: Workbench, config: TrainConfig) -> int:
    from trainer.adapters import targets_of

    weight = 4 if config.save_precision == "float" else 2
    return count_weights(bench.base, config) * weight + 3 * len(targets_of(bench.base, config)) * TENSOR_BYTES


def _trial_bytes(bench: Workbench, steps: float) -> int:
    """Images, grid and its copy, and rows of text.  PNG sizes are those of the untrained base's images."""
    sampling, images = bench.evaluator.sampling, bench.prompts.image_count
    drawn = [p.stat().st_size for p in (bench.folder.base_images / "samples").glob("*.png")]
    each = float(np.mean(drawn)) if drawn else sampling.width_px * sampling.height_px * BYTES_PER_PIXEL
    shrunk = min(GRID_GROWTH, (GRID_SIDE_PX / max(sampling.width_px, sampling.height_px)) ** 2)
    prompts = len(bench.prompts.prompts)
    shown = 2 * prompts * len(bench.prompts.seeds) + 4  # the trial's and the base's images, and references
    grid = shown * each * shrunk + prompts * CAPTION_BYTES + 10_000
    return round(images * (each + 2 * ROW_BYTES) + 2 * grid + steps * ROW_BYTES + 10_000)


# Time


def probed_pace(bench: Workbench, config: TrainConfig) -> Pace | None:
    """The pace before the first trial: of three steps, and of the untrained base's images.  None if one of them is not
    known: with images that take no time, every plan would be wrong."""
    seconds = _probe(bench, config)
    if seconds is None or bench.image_seconds is None:
        return None
    return Pace(seconds / samples_of(config, 1), bench.image_seconds)


def _probe(bench: Workbench, config: TrainConfig) -> float | None:
    """Measured seconds of one optimizer step, with the remedies that the trial would begin with.  None if it cannot be
    measured: a failed estimate never ends a study, since the trial knows more remedies and names what is wrong.  Raises
    ToolError only for what no trial could be trained on: settings, images or models that are wrong."""
    remedies, _ = bench.remedies.first(config)
    short = with_remedies(config, remedies).with_values({"max_train_steps": PROBE_STEPS})
    seconds = None
    try:
        with out_of_memory_named(short):
            seconds = _seconds(bench, short)
    except (DeviceLost, Interrupted, ConfigError, DataError, ModelFileError):
        raise
    except OutOfMemory:
        pass
    except ToolError as error:
        bench.base.say_once(f"time unknown: {error.message}")
    except Exception as error:
        bench.base.say_once(f"time unknown: {type(error).__name__}: {first_line(error)[:160]}")
    bench.release()
    return seconds


def _seconds(bench: Workbench, config: TrainConfig) -> float | None:
    prepared = bench.prepared(config)
    injected = adapter.inject(bench.base, config)
    try:
        steps = [e.seconds for e in loop.train(config, bench.base, injected, prepared) if isinstance(e, Step)]
    finally:
        injected.remove()
    return steps[-1] if steps else None


def _per_unit(bench: Workbench) -> float:
    """Training images seen per epoch, per step where steps are set, per image where images seen are searched (fewer
    than one where the last batch of a bucket is smaller)."""
    config = bench.study.config(bench.study.baseline)
    run = count_steps(config, bench.data)
    if IMAGES_SEEN in bench.study.baseline:
        return images_seen(run, bench.data) / (run.total_steps * config.effective_batch_size)
    epoch = float(sum(item.repeats for item in bench.data.items if not item.is_reg))
    return epoch if config.max_train_steps is None else epoch / run.steps_per_epoch


def _draws(bench: Workbench) -> list[dict[str, Any]]:
    """Random suggestions from the whole space, without the sampler."""
    random = np.random.default_rng(0)
    return [
        {
            p.name: p.domain.options[int(random.integers(len(p.domain.options)))]
            if isinstance(p.domain, Choice)
            else p.domain.from_unit(float(random.random()))
            for p in bench.study.space
        }
        for _ in range(DRAWS)
    ]
