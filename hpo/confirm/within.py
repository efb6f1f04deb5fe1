"""The confirmation within a time budget: ``hpo confirm`` for the best trials, as many as the time left allows.

Owns the choice of how many trials and seeds, from the measured seconds.  Does not own the confirmation itself
(``hpo.confirm.run``) or the time used so far (``hpo.study.worked``).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial
from rich.console import Console

from hpo.confirm.outcome import RETRAINED
from hpo.confirm.run import confirm
from hpo.confirm.wanted import (
    CHOSEN,
    Confirmation,
    ConfirmRequest,
    chosen_trials,
    confirmation_prompts,
    done_runs,
    wanted_runs,
)
from hpo.search import confirming
from hpo.study import (
    BASELINE,
    HOUR,
    ROLE,
    ROUNDS,
    Pace,
    Round,
    Stored,
    StudyFolder,
    Worked,
    fitting,
    measured,
    open_study,
    ownership_of,
    possible,
    read_json,
    samples_of,
    stored_hours,
)
from hpo.terminal import after_search, budget_line, clock, confirmed_lines, say

if TYPE_CHECKING:
    import optuna


def confirm_within(folder: StudyFolder, worked: Worked, device: str = CHOSEN, *, console: Console) -> None:
    """Confirm the study with what is left of its budget.  One process does it.  Raises ToolError.

    ``device``: of this process; study.json has that of the worker that wrote it last.
    """
    lock = folder.confirm_lock()
    if not lock.try_acquire():
        say(console, "another process confirms this study already")
        say(console, f"next: hpo status {folder.words}")
        return
    try:
        _confirm(open_study(folder), folder, worked, device, console)
    finally:
        lock.release()


def _confirm(study: optuna.Study, folder: StudyFolder, worked: Worked, device: str, console: Console) -> None:
    hours = worked.seconds / HOUR
    stored = stored_hours(study) or Stored(hours)
    if stored.round is not None and (done := _finished(study, folder, stored.round)):
        for line in (budget_line(hours, worked.used), *confirmed_lines(folder)):
            say(console, line)
        say(console, f"next: {after_search(folder, done)}")
        return
    most, _ = chosen_trials(study, folder, _request(folder, ROUNDS[0]))
    rounds = possible(sum(t.user_attrs.get(ROLE) != BASELINE for t in most), stored.round or ROUNDS[0])
    pace = measured(study, folder) or stored.pace
    seconds = {one: _seconds(study, folder, one, pace, stored.load_seconds) for one in rounds}
    found = fitting(worked.left, seconds.__getitem__, rounds)
    say(console, budget_line(hours, worked.used))
    if found is None:
        say(
            console,
            "too little time is left to confirm: trial 0 and the best trial, trained once each, take about "
            f"{clock(seconds[rounds[-1]])}; give more --hours, or confirm without a limit",
        )
        say(console, f"next: hpo confirm {folder.words}")
        return
    with ownership_of(folder, lambda text: say(console, text)).study():
        confirming(study, dataclasses.replace(stored, round=found))
    confirm(dataclasses.replace(_request(folder, found), device=device), console, lambda: True)


def _request(folder: StudyFolder, what: Round) -> ConfirmRequest:
    return ConfirmRequest(folder.name, top=what.top, seeds=what.seeds, runs=folder.root.parent)


def _finished(study: optuna.Study, folder: StudyFolder, what: Round) -> int | None:
    """The winner, if all runs of the confirmation are done and it was written."""
    request = _request(folder, what)
    chosen, _ = chosen_trials(study, folder, request)
    target = Confirmation(folder, {}, (), RETRAINED).target
    winner = (read_json(folder.confirmed) or {}).get("winner")
    if not isinstance(winner, int) or set(wanted_runs(chosen, study, request)) - done_runs(target):
        return None
    return winner


def _seconds(
    study: optuna.Study, folder: StudyFolder, what: Round, pace: Pace | None, load_seconds: float
) -> float:
    """What the confirmation still takes: loading, the untrained base, and the runs that are not done."""
    request = _request(folder, what)
    chosen, _ = chosen_trials(study, folder, request)
    asked = Confirmation(folder, {t.number: t for t in chosen}, (), RETRAINED)
    images, done = confirmation_prompts(folder).image_count, done_runs(asked.target)
    of = [asked.chosen[run.of] for run in wanted_runs(chosen, study, request) if run not in done]
    pace = pace or Pace(0.0, 0.0)
    base = 0.0 if asked.target.anchors.is_file() else images * pace.image_seconds
    return load_seconds + base + sum(pace.seconds(_samples(folder, trial), images) for trial in of)


def _samples(folder: StudyFolder, trial: FrozenTrial) -> int:
    own = folder.trial(trial.number)
    params, result = read_json(own.params) or {}, read_json(own.result) or {}
    try:
        return samples_of(params["train"], int(result["steps"]))
    except (KeyError, TypeError, ValueError):  # a damaged file: the confirmation itself says so
        return 0
