"""The progress of a study, read from its database: counts, best, baseline, the history for convergence detection.

Owns the definitions of "best" and "feasible".  Does not own which files are kept (``hpo.study.retention``).  Does not
change the study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from hpo.study.config import StudyConfig
from hpo.study.convergence import TOP, TrialPoint
from hpo.study.folder import StudyFolder
from hpo.study.pace import Forecast
from hpo.study.sections import OBJECTIVE, SCORE
from trainer.errors import DataError

if TYPE_CHECKING:
    import optuna

    from evaluation.score import Anchors

ROLE, BASELINE, ENQUEUED = "role", "baseline", "enqueued"  # a trial's user attribute and its values
FORKED_FROM = "forked_from"  # a trial's user attribute: study and number of the trial that was taken over
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)  # trials that count towards --trials
DUPLICATE = "duplicate"  # prefix of the reason of a proposal that repeats an earlier trial


@dataclass(frozen=True)
class Standing:
    """A snapshot of the study.  Best and baseline are (number, score, standard error), or None.

    ``complete``: trials with a result; ``infeasible`` and ``pruned`` ones are among them.
    """

    total: int
    complete: int
    infeasible: int
    failed: int
    running: int
    best: tuple[int, float, float] | None
    baseline: tuple[int, float, float] | None
    forecast: Forecast | None = None  # of the trial that starts now, if its duration can be estimated
    duplicates: int = 0  # proposals that repeat an earlier trial; not counted as failed
    baseline_trouble: str = ""  # why the baseline has no score, if it has run
    only_baseline: bool = False  # whether no other trial has a score
    pruned: int = 0  # stopped in the middle of their training
    front: tuple[int, ...] = ()  # with two objectives: trials that no other trial beats in both

    @property
    def left(self) -> int:
        return max(0, self.total - self.complete)


def standing(study: optuna.Study, total: int) -> Standing:
    """Counts, best and baseline, from the database."""
    trials = study.get_trials(deepcopy=False)
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    feasible = [t for t in done if is_feasible(t)]
    scored = [t for t in feasible if score_of(t) is not None]
    best = max(scored, key=rank, default=None)
    baseline = next((t for t in feasible if t.user_attrs.get(ROLE) == BASELINE), None)
    twins = sum(map(is_duplicate, trials))
    pruned = sum(t.state == TrialState.PRUNED for t in trials)
    return Standing(
        total=total,
        complete=len(done) + pruned,
        infeasible=len(done) - len(feasible),
        failed=sum(t.state == TrialState.FAIL for t in trials) - twins,
        running=sum(t.state == TrialState.RUNNING for t in trials),
        best=_figures(best),
        baseline=_figures(baseline),
        duplicates=twins,
        baseline_trouble="" if baseline else _trouble(trials),
        only_baseline=bool(scored) and scored == [baseline],
        pruned=pruned,
        front=pareto_front(feasible) if len(study.directions) > 1 else (),
    )


def score_of(trial: FrozenTrial) -> float | None:
    """A trial's score, which is shown, also if its two parts are the objectives.  None unless it is complete."""
    return _figure(trial, SCORE)


def objective_of(trial: FrozenTrial) -> float | None:
    """What decides between trials: the score, continued below 0 if the study is told signed values."""
    own = _figure(trial, OBJECTIVE)
    return score_of(trial) if own is None else own


def is_above_base(trial: FrozenTrial) -> bool:
    """Whether a trial learned something for sure: two standard errors above 0, the score of the untrained base."""
    return (objective_of(trial) or 0.0) > 2 * float(trial.user_attrs.get("se", 0.0))


def _figure(trial: FrozenTrial, name: str) -> float | None:
    """A stored figure; for a single objective without it (older versions, the dashboard) the value told."""
    if not trial.values or trial.state == TrialState.PRUNED:  # its value is that of a look
        return None
    return trial.user_attrs.get(name, trial.values[0] if len(trial.values) == 1 else None)


def rank(trial: FrozenTrial) -> tuple[float, int]:
    """Sort key, higher is better: by objective; for equal objectives the earlier trial is better."""
    value = objective_of(trial)
    return (-np.inf if value is None else value), -trial.number


def pareto_front(feasible: Sequence[FrozenTrial]) -> tuple[int, ...]:
    """Numbers of the trials that no other trial dominates (as good in every objective and better in one)."""
    told = [(t.number, np.array(t.values)) for t in feasible if t.values]
    return tuple(
        number
        for number, own in told
        if not any((other >= own).all() and (other > own).any() for _, other in told)
    )


def _trouble(trials: list[FrozenTrial]) -> str:
    """Why the last attempt of the baseline has no score; empty if there is no finished attempt."""
    own = [t for t in trials if t.user_attrs.get(ROLE) == BASELINE and t.state.is_finished()]
    if not own:
        return ""
    outcome = "infeasible" if own[-1].state == TrialState.COMPLETE else "failed"
    return f"{outcome}: {own[-1].user_attrs.get('reason', 'no reason known')} (trial {own[-1].number})"


def is_duplicate(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and str(trial.user_attrs.get("reason", "")).startswith(DUPLICATE)


def is_feasible(trial: FrozenTrial) -> bool:
    return all(amount <= 0 for amount in trial.constraints.values())


def _figures(trial: FrozenTrial | None) -> tuple[int, float, float] | None:
    value = score_of(trial) if trial is not None else None
    if trial is None or value is None:
        return None
    return trial.number, value, float(trial.user_attrs.get("se", 0.0))


def history(
    study: optuna.Study, config: StudyConfig, folder: StudyFolder, anchors: Anchors
) -> tuple[list[TrialPoint], dict[int, TrialRow]]:
    """The feasible trials, as points for convergence detection (objectives) and as rows for the alert (scores)."""
    trials = [
        t
        for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if is_feasible(t) and score_of(t) is not None and t.params.keys() == config.baseline.keys()
    ]
    compared = sorted(trials, key=rank, reverse=True)[:TOP]
    points, rows = [], {}
    for t in trials:
        value, objective = score_of(t), objective_of(t)
        assert value is not None and objective is not None
        se = float(t.user_attrs.get("se", 0.0))
        objective_se = float(t.user_attrs.get(f"{OBJECTIVE}_se", se))
        prompts = by_prompt(folder.trial(t.number).metrics, anchors) if t in compared else ()
        points.append(TrialPoint(t.number, objective, objective_se, config.space.place(t.params), prompts))
        rows[t.number] = TrialRow(t.number, value, se, searched_settings(config, t.params))
    return points, rows


def by_prompt(metrics: Path, anchors: Anchors) -> tuple[float, ...]:
    """A trial's objective for each prompt that asks for the subject.  Empty without its metrics.json."""
    # Imported here because it loads torch, which hpo status does not need.
    from evaluation.score import anchored, objective, read_score

    try:
        score = read_score(metrics)
        rows = score.per_image
    except DataError:
        return ()
    ids = anchors.prompt_ids
    means = [[r for r in rows if r.prompt_id == p] for p in ids]
    if not all(means):
        return ()
    t_P = np.array([np.mean([r.clip_t for r in of]) for of in means])
    i_P = np.array([np.mean([r.clip_i for r in of]) for of in means])
    scores_P = objective(*anchored(t_P, i_P, anchors, np.eye(len(ids))), score.formula)
    return tuple(float(s) for s, asks in zip(scores_P, anchors.asks_for_subject, strict=True) if asks)


def searched_settings(config: StudyConfig, suggested: Mapping[str, Any]) -> dict[str, Any]:
    """The searched settings with kohya's names, without inactive ones."""
    return config.space.settings(suggested, config.train)


@dataclass(frozen=True)
class TrialRow:
    """A row of the table of best trials."""

    number: int
    value: float
    se: float
    settings: Mapping[str, Any]
