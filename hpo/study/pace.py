"""How long trials take, measured from finished trials; and how long a study still takes.

    seconds of a trial = samples × a + images × b + c

``samples``: training images shown, optimizer steps × effective batch.  ``images``: images generated and scored.
``a`` and ``b`` come from the seconds that each trial measured itself, ``c`` (loading, saving, database) from the
difference to its whole time.  Trials of one study differ in length, so their mean alone says little about the next.

Owns these figures.  Does not own their wording (``hpo.terminal``) or the estimate before the first trial
(``hpo.search.cost``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from hpo.study.folder import StudyFolder, TrialFolder, read_json
from trainer.files import read_records

if TYPE_CHECKING:
    import optuna

    from trainer.config import TrainConfig

NEWEST = 20  # trials that the figures are taken from
AGING = 0.7  # weight of a trial relative to the next one: the machine may have become slower or faster


@dataclass(frozen=True)
class Pace:
    """Seconds per sample, per image, and of the rest of a trial.  ``samples``: mean of the measured trials."""

    sample_seconds: float
    image_seconds: float
    other_seconds: float = 0.0
    samples: float | None = None

    def seconds(self, samples: float, images: int) -> float:
        return samples * self.sample_seconds + images * self.image_seconds + self.other_seconds


@dataclass(frozen=True)
class Forecast:
    """What lies ahead when a trial starts.

    ``samples``: of this trial.  ``trials_ahead``: trials after the running ones, each with about ``samples_ahead``
    samples; ``workers`` share them.  ``later_seconds``: what follows the last trial in the same command.
    """

    pace: Pace
    samples: float
    images: int
    trials_ahead: int = 0
    samples_ahead: float = 0.0
    workers: int = 1
    later_seconds: float = 0.0

    @property
    def trial_seconds(self) -> float:
        """Of this trial, as estimated at its start."""
        return self.pace.seconds(self.samples, self.images)

    @property
    def after_seconds(self) -> float:
        """From the end of this trial to the end of the study."""
        trials = self.trials_ahead * self.pace.seconds(self.samples_ahead, self.images) / self.workers
        return trials + self.later_seconds

    def slowdown(self, total: int, step_seconds: float | None) -> float:
        """How many times slower this trial trains than expected; at least 1.  Its images will be slower, too."""
        expected = self.samples * self.pace.sample_seconds
        if step_seconds is None or expected <= 0:
            return 1.0
        return max(1.0, total * step_seconds / expected)

    def while_training(self, done: int, total: int, step_seconds: float | None) -> float:
        """Seconds to the end of the study after ``done`` of ``total`` steps.  ``step_seconds``: measured in this
        trial; None before its first step."""
        share = 1.0 - done / total if total else 1.0
        training = share * self.samples * self.pace.sample_seconds
        if step_seconds is not None and total:
            training = (total - done) * step_seconds
        return training + self.while_generating(0, self.images, None, self.slowdown(total, step_seconds))

    def while_generating(
        self, done: int, total: int, image_seconds: float | None, slowdown: float = 1.0
    ) -> float:
        """Seconds to the end of the study after ``done`` of ``total`` images.  ``image_seconds``: measured in this
        trial; scoring comes on top, so it only counts if it is slower than usual."""
        each = max(self.pace.image_seconds * slowdown, image_seconds or 0.0)
        return (total - done) * each + self.pace.other_seconds + self.after_seconds


def samples_of(train: Mapping[str, Any] | TrainConfig, steps: int) -> int:
    """Samples of so many steps.  The last batch of an epoch counts as a whole one."""
    values = train if isinstance(train, Mapping) else train.as_dict()
    return steps * int(values["train_batch_size"]) * int(values["gradient_accumulation_steps"])


def measured(study: optuna.Study, folder: StudyFolder) -> Pace | None:
    """The pace of the newest finished trials.  None if none was trained and scored."""
    found = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    rows = [_row(trial, folder.trial(trial.number)) for trial in found[-NEWEST:]]
    known = [row for row in rows if row is not None]
    if not known:
        return None
    weights = [AGING**age for age in reversed(range(len(known)))]
    samples, train, images, score, other = (
        sum(w * value for w, value in zip(weights, column, strict=True))
        for column in zip(*known, strict=True)
    )
    mean_samples = sum(row[0] for row in known) / len(known)
    return Pace(train / samples, score / images, other / sum(weights), mean_samples)


def _row(trial: FrozenTrial, folder: TrialFolder) -> tuple[float, float, float, float, float] | None:
    """(samples, seconds of training, images, seconds of scoring, seconds of the rest) of a trial."""
    result, params = read_json(folder.result) or {}, read_json(folder.params) or {}
    try:
        samples = samples_of(params["train"], int(result["steps"]))
        train, score = float(result["train_seconds"]), float(result["score_seconds"])
        images = int(result["n_images"])
    except (KeyError, TypeError, ValueError):
        return None
    if min(samples, images) < 1 or min(train, score) <= 0:  # not scored, or trained by another trial
        return None
    return (
        samples,
        train,
        images,
        score,
        max(0.0, _whole_seconds(trial, folder, result.get("time_utc"), train + score) - train - score),
    )


def _whole_seconds(trial: FrozenTrial, folder: TrialFolder, written_utc: object, otherwise: float) -> float:
    """From claim to result, if the trial ran in one go.

    A process that was killed before its first step, or before it told Optuna the result, leaves the rest to one that
    comes hours later.  So the files' times, which are whole seconds, are limits for Optuna's.
    """
    starts = [row for row in read_records(folder.starts) if row.get("event") == "start"]
    begun, ended = trial.datetime_start, trial.datetime_complete
    written = _as_optuna(written_utc)
    if len(starts) != 1 or begun is None or ended is None or written is None:
        return otherwise
    started = _as_optuna(starts[0].get("time_utc")) or begun
    return (min(ended, written + timedelta(seconds=1)) - max(begun, started)).total_seconds()


def _as_optuna(time_utc: object) -> datetime | None:
    """A time with its zone as Optuna stores it: local, without the zone.  None if it is not one."""
    try:
        return datetime.fromisoformat(str(time_utc)).astimezone().replace(tzinfo=None)
    except ValueError:
        return None
