"""Collects the results of the finished confirmation runs by configuration and passes them to the decision.

Owns reading results and metrics.  Does not own the decision rule; see ``hpo.confirm.outcome``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial, TrialState

from hpo.confirm.outcome import RESCORED, ConfirmCandidate, Confirmed, Repeat, decide
from hpo.confirm.proposals import ConfirmProposals
from hpo.confirm.wanted import run_of
from hpo.study import components, is_feasible, read_json, score_of
from hpo.train import count_steps, images_seen
from trainer.errors import DataError

if TYPE_CHECKING:
    import optuna


def confirmed(searched_study: optuna.Study, runs: ConfirmProposals) -> Confirmed:
    """The outcome of all complete runs of the confirmed trials.  Raises DataError if none of them has a score."""
    asked = runs.asked
    scored = [
        float(score_of(t) or 0.0)
        for t in searched_study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if is_feasible(t) and score_of(t) is not None
    ]
    noise = components(searched_study, asked.source)
    own_se = noise.paired_se() / math.sqrt(2) if noise else 0.0
    candidates = [_candidate(trial, runs) for trial in asked.chosen.values()]
    found = decide(candidates, asked.trial0, asked.how, scored, own_se)
    if found is None:
        raise DataError(
            f"none of the trials {', '.join(map(str, asked.chosen))} got a score in the confirmation",
            f"show the runs with: hpo status {runs.bench.folder.words}",
        )
    return found


def _candidate(searched_trial: FrozenTrial, runs: ConfirmProposals) -> ConfirmCandidate:
    number, asked = searched_trial.number, runs.asked
    repeats, trouble = [], ""
    for trial in runs.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        run = run_of(trial.params)
        if run not in asked.wanted or run.of != number:
            continue
        if is_feasible(trial):
            repeats.append(_repeat(trial, runs))
        else:
            trouble = str(trial.user_attrs.get("reason", "infeasible"))
    params = read_json(asked.source.trial(number).params) or {}
    return ConfirmCandidate(
        number,
        params.get("train", {}),
        searched_trial.user_attrs.get("settings", {}),
        float(score_of(searched_trial) or 0.0),
        float(searched_trial.user_attrs.get("se", 0.0)),
        tuple(repeats),
        trouble,
    )


def _repeat(trial: FrozenTrial, runs: ConfirmProposals) -> Repeat:
    """One scored run.  The cost of a rescored run is that of its training in the search."""
    from evaluation.score import by_draw, read_score

    run, own = run_of(trial.params), runs.bench.folder.trial(trial.number)
    score = read_score(own.metrics)
    trained = runs.asked.source.trial(run.of) if runs.asked.how == RESCORED else own
    cost = read_json(trained.result) or {}
    config = runs.config(trial.params, trial.number)
    return Repeat(
        trial.number,
        run.train_seed,
        score.value,
        by_draw(score, runs.bench.anchors),
        float(cost.get("train_seconds", 0.0)),
        images_seen(count_steps(config, runs.bench.data), runs.bench.data),
        score.objective,
    )
