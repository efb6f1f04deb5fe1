"""A search's plan within its budget, made anew from trials that took longer or shorter.  The clock is a number."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from hpo.search.cost import Cost, Ends
from hpo.search.within import Within
from hpo.study.folder import TOTAL, StudyFolder
from hpo.study.hours import Round
from hpo.study.pace import Pace
from hpo.study.storage import create_study
from hpo.study.worked import Stored, Worked, stored_hours

IMAGES, SAMPLES = 30, 100
PACE = Pace(sample_seconds=0.1, image_seconds=0.2)  # 16 s a trial
COST = Cost(
    steps=25,
    samples=SAMPLES,
    images=IMAGES,
    ends=Ends((20, 30), (80, 120), (80, 120)),
    pace=PACE,
    lora_bytes=0,
    trial_bytes=0,
    samples_sd=10,
    baseline_samples=SAMPLES,
)


class Search:
    """A study under a budget whose trials take as long as a test says."""

    def __init__(self, root: Path, hours: float = 0.1, most: int = 100, used: float = 0.0) -> None:
        self.folder = StudyFolder(root)
        self.folder.locks.mkdir(parents=True, exist_ok=True)
        self.study = create_study(self.folder, {"seed": "7"})
        self.seconds, self.said = 0.0, list[str]()
        bench: Any = SimpleNamespace(folder=self.folder, confirmation=SimpleNamespace(image_count=IMAGES))
        worked = Worked(self.folder, hours, now=lambda: 1e9 + self.seconds, tick=lambda: self.seconds)
        self.seconds = used
        self.within = Within(self.study, bench, worked, hours, most, 5.0, self.said.append)

    def trial(self, slower: float = 1.0) -> None:
        """One trial of mean length."""
        number, begun = len(self.study.get_trials(deepcopy=False)), datetime(2026, 1, 1)
        files, train, score = self.folder.trial(number), slower * 10.0, slower * 6.0
        files.root.mkdir()
        files.params.write_text(
            json.dumps({"train": {"train_batch_size": 4, "gradient_accumulation_steps": 1}})
        )
        ended = begun + timedelta(seconds=train + score)
        written = {"steps": SAMPLES // 4, "n_images": IMAGES, "train_seconds": train, "score_seconds": score,
                   "time_utc": ended.astimezone(UTC).isoformat()}  # fmt: skip
        files.result.write_text(json.dumps(written))
        made = optuna.trial.create_trial(state=TrialState.COMPLETE, value=0.1)
        made.datetime_start, made.datetime_complete = begun, ended
        self.study.add_trial(made)
        self.seconds += train + score

    def allows(self) -> bool:
        return self.within.allows(len(self.study.get_trials(deepcopy=False)), 0)


def test_the_plan_is_said_stored_and_kept(tmp_path: Path) -> None:
    search = Search(tmp_path / "study", used=20.0)
    line = search.within.begin(COST)[-1]
    search.within.store()
    planned = search.within.trials
    assert f"plan for 0.1 hours: {planned} trials, each about 0:16, then the confirmation: trial 0" in line
    assert search.study.user_attrs[TOTAL] == planned
    stored = stored_hours(search.study)
    assert stored is not None and stored.pace == PACE and stored.load_seconds == 5
    while search.allows():
        search.trial()
    assert len(search.study.get_trials(deepcopy=False)) == planned and not search.said
    assert 360 - 2 * 16 < search.seconds + search.within.confirm_seconds <= 360
    assert search.within.why == "no further trial fits into 0.1 hours"


def test_a_slower_machine_is_said_once_and_the_limit_is_kept(tmp_path: Path) -> None:
    search = Search(tmp_path / "study")
    search.within.begin(COST)
    before = search.within.trials
    while search.allows():
        search.trial(slower=2.0)
    done = len(search.study.get_trials(deepcopy=False))
    assert len(search.said) == 1
    expected = f"a trial takes about 0:32 (planned: 0:16), so {done} trials instead of {before}"
    assert expected in search.said[0]
    assert search.seconds + search.within.confirm_seconds <= 360
    assert search.study.user_attrs[TOTAL] == done == search.within.trials


def test_a_faster_machine_gets_more_trials_up_to_the_limit_of_trials(tmp_path: Path) -> None:
    search = Search(tmp_path / "study", most=30)
    search.within.begin(COST)
    before = search.within.trials
    assert before < 20
    while search.allows():
        search.trial(slower=0.25)
    assert len(search.study.get_trials(deepcopy=False)) == 30
    assert f"30 trials instead of {before}" in search.said[0]
    assert search.within.why == "30 trials are done, the limit of --trials"


def test_too_small_a_budget_is_said_and_trial_0_runs_but_no_other(tmp_path: Path) -> None:
    search = Search(tmp_path / "study", hours=0.01)
    first, *_ = search.within.begin(COST)
    assert (
        "two trials and their confirmation do not fit into 0.01 hours; they need about --hours 0.0" in first
    )
    assert search.allows()
    search.trial()
    assert not search.allows()


def test_only_trial_0_begins_once_the_time_is_used(tmp_path: Path) -> None:
    """Loading took all of it: without a trial nothing is known."""
    search = Search(tmp_path / "study", used=360.0)
    lines = search.within.begin(COST)
    assert any("two trials and their confirmation do not fit into 0.1 hours" in line for line in lines)
    assert search.within.trials == 1 and search.allows()
    search.trial()
    assert not search.allows()


def test_a_confirmation_that_another_process_has_begun_stays_begun(tmp_path: Path) -> None:
    search = Search(tmp_path / "study")
    search.within.begin(COST)
    for hours, kept in ((0.1, Round(2, 1)), (0.2, None)):  # another budget is another search
        Stored(hours, Round(2, 1), PACE, 5.0).write(search.study)
        search.within.store()
        stored = stored_hours(search.study)
        assert stored is not None and (stored.hours, stored.round) == (0.1, kept)


def test_a_worker_that_had_to_wait_plans_with_what_the_first_one_has_measured(tmp_path: Path) -> None:
    search = Search(tmp_path / "study")
    assert search.within.known is None
    Stored(0.1, None, PACE, 5.0).write(search.study)
    search.within.read()
    assert search.within.known == PACE


@pytest.mark.parametrize("pace", [None, PACE])
def test_without_an_estimate_the_first_trial_gives_one(tmp_path: Path, pace: Pace | None) -> None:
    search = Search(tmp_path / "study")
    lines = search.within.begin(Cost(**{**vars(COST), "pace": pace}))
    assert ("unknown" in lines[0]) is (pace is None)
    assert search.allows()
    search.trial()
    assert search.allows() and 10 < search.within.trials < 30
