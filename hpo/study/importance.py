"""How much each searched parameter matters for the score, as Optuna estimates it.

Owns the call of Optuna's default (PED-ANOVA, Watanabe et al. 2023, arXiv 2304.10255), and from how many trials on
its answer is given and trusted.  Does not own the weights of the columns of ``hpo status`` (``hpo.study.table``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.study.folder import StudyFolder
from hpo.study.standing import is_feasible, objective_of
from hpo.study.table import ENOUGH
from trainer.errors import ConfigError

FEWEST = 8  # finished trials before anything is shown: PED-ANOVA looks at the best tenth of them (assumed)


@dataclass(frozen=True)
class Importance:
    """Shares that add up to 1, the highest first.  ``trials``: finished ones that they are from, ``infeasible`` ones
    among them included."""

    shares: Mapping[str, float]
    trials: int
    infeasible: int

    @property
    def remark(self) -> str:
        """What to keep in mind about the table."""
        if self.trials < ENOUGH:
            return (
                f"a rough estimate: from {self.trials} trials; the order can change until there are about "
                f"{ENOUGH} of them"
            )
        return "an estimate: a small share does not mean that a setting has no effect outside of its range"


def importance(study: optuna.Study, folder: StudyFolder) -> Importance:
    """The importance of every searched parameter.  Raises ConfigError if there are too few trials to tell."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    go_on = f"continue the search; for its state: hpo status {folder.words}"
    if len(done) < FEWEST:
        count = {0: "no finished trial", 1: "1 finished trial"}.get(len(done), f"{len(done)} finished trials")
        raise ConfigError(f"too few trials to say what matters: study {folder.name} has {count}, {FEWEST} are needed",
                          go_on)  # fmt: skip
    values = {_value(trial) for trial in done}
    if len(values) < 2:
        raise ConfigError(
            f"nothing to say about what matters: all {len(done)} trials of study {folder.name} have the same score",
            f"see whether anything was learned: hpo status {folder.words}",
        )
    if not any(len({str(trial.params.get(name)) for trial in done}) > 1 for name in done[0].params):
        raise ConfigError(
            f"nothing to say about what matters: all {len(done)} trials have the same settings", go_on
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is experimental in Optuna
        target = _value if len(study.directions) > 1 else None
        shares = optuna.importance.get_param_importances(study, target=target)
    sound = {name: float(share) if math.isfinite(share) else 0.0 for name, share in shares.items()}
    ranked = dict(sorted(sound.items(), key=lambda item: (-item[1], item[0])))
    return Importance(ranked, len(done), sum(not is_feasible(trial) for trial in done))


def _value(trial: FrozenTrial) -> float:
    """What decides between trials; for an infeasible one, what Optuna was told."""
    value = objective_of(trial) if is_feasible(trial) else None
    if value is not None:
        return float(value)
    return min(trial.values) if trial.values else -math.inf
