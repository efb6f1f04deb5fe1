"""How long trials take: from what finished trials measured, whatever their length."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from hpo.study.folder import StudyFolder
from hpo.study.pace import Forecast, Pace, measured
from hpo.study.storage import create_study, open_study

A, B, C = 0.25, 0.5, 6.0  # seconds per sample, per image, of the rest
IMAGES = 32


def in_utc(local: datetime) -> str:
    """As the trials' files have it."""
    return local.astimezone(UTC).isoformat(timespec="seconds")


def made(
    root: Path,
    *lengths: int,
    slower: float = 1.0,
    started: timedelta = timedelta(),
    told: timedelta = timedelta(),
    **changes: Any,
) -> StudyFolder:
    """Trials of so many steps of 2 × 4 samples, each as long as A, B and C say; the last one ``slower``.

    ``started``, ``told``: how long after its claim each began, and how long after its result Optuna was told.
    """
    folder = StudyFolder(root)
    folder.locks.mkdir(parents=True)
    stored = create_study(folder, {"seed": "7"}, ("score",))
    for number, steps in enumerate(lengths):
        times = slower if number == len(lengths) - 1 else 1.0
        files, train, score = folder.trial(number), A * steps * 8 * times, B * IMAGES * times
        begun = datetime(2026, 1, 1)
        ended = begun + timedelta(seconds=train + score + C * times)
        files.root.mkdir()
        files.params.write_text(
            json.dumps({"train": {"train_batch_size": 4, "gradient_accumulation_steps": 2}})
        )
        result = {
            "steps": steps,
            "n_images": IMAGES,
            "train_seconds": train,
            "score_seconds": score,
            "time_utc": in_utc(ended),
            **changes,
        }
        files.result.write_text(json.dumps(result))
        files.starts.write_text(json.dumps({"event": "start", "time_utc": in_utc(begun + started)}) + "\n")
        stored.add_trial(
            optuna.trial.FrozenTrial(
                number=0, trial_id=0, state=TrialState.COMPLETE, value=0.5, values=None, params={}, distributions={},
                user_attrs={}, system_attrs={}, intermediate_values={}, datetime_start=begun,
                datetime_complete=ended + told,
            )
        )  # fmt: skip
    return folder


def pace_of(folder: StudyFolder) -> Pace | None:
    return measured(open_study(folder), folder)


def test_one_short_trial_is_enough_for_a_long_one(tmp_path: Path) -> None:
    pace = pace_of(made(tmp_path / "one", 10))
    assert pace is not None
    assert (pace.sample_seconds, pace.image_seconds, pace.other_seconds) == pytest.approx((A, B, C))
    assert pace.seconds(80 * 8, IMAGES) == pytest.approx(80 * 8 * A + IMAGES * B + C)
    assert pace.samples == 80


def test_the_newest_trials_count_most(tmp_path: Path) -> None:
    pace = pace_of(made(tmp_path / "s", 10, 10, 10, slower=2.0))
    assert pace is not None and 1.4 * A < pace.sample_seconds < 1.6 * A, "the mean of the three would be 1.33"


def test_a_resumed_trial_counts_with_what_it_measured_itself(tmp_path: Path) -> None:
    folder = made(tmp_path / "s", 10)
    folder.trial(0).starts.write_text(2 * (json.dumps({"event": "start"}) + "\n"))
    pace = pace_of(folder)
    assert pace is not None and pace.other_seconds == 0.0, (
        "the time between the two processes is not the trial's"
    )


NIGHT = timedelta(hours=10)


def test_the_night_between_a_result_and_its_telling_is_not_the_trials(tmp_path: Path) -> None:
    pace = pace_of(
        made(tmp_path / "told", 10, 10, told=NIGHT)
    )  # killed in between, and resumed the next morning
    assert pace is not None and C <= pace.other_seconds <= C + 1
    pace = pace_of(made(tmp_path / "claimed", 10, 10, started=NIGHT))  # killed after the claim
    assert pace is not None and pace.other_seconds == 0.0


@pytest.mark.parametrize(
    "changes", [{"n_images": 0}, {"steps": 0}, {"score_seconds": 0.0}, {"train_seconds": None}]
)
def test_trials_without_training_or_score_say_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert pace_of(made(tmp_path / "s", 10, **changes)) is None


def test_workers_share_the_trials_ahead() -> None:
    forecast = Forecast(
        Pace(A, B, C), samples=80, images=IMAGES, trials_ahead=6, samples_ahead=100, workers=2
    )
    own, each = 80 * A + IMAGES * B + C, 100 * A + IMAGES * B + C
    assert forecast.while_training(0, 10, None) == pytest.approx(own + 3 * each)
    assert forecast.while_training(5, 10, 8 * A) == pytest.approx(own - 40 * A + 3 * each)
    assert forecast.while_generating(IMAGES, IMAGES, B) == pytest.approx(C + 3 * each)
    slow = forecast.slowdown(10, 3 * 8 * A)
    assert slow == pytest.approx(3.0) and forecast.slowdown(10, A) == 1.0
    assert forecast.while_generating(0, IMAGES, None, slow) == pytest.approx(3 * IMAGES * B + C + 3 * each)
