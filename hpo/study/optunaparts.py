"""What Optuna has no public way for: taking up a RUNNING trial again, and a trial's system attributes.

Owns every private name of Optuna that the tool uses.  A test fails when Optuna moves one of them, and another
when a private name of Optuna is used elsewhere.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.trial import FrozenTrial


def take_up(study: optuna.Study, frozen: FrozenTrial) -> optuna.Trial:
    """A RUNNING trial as ``ask`` handed it out: it suggests what it was asked for already, and can be told."""
    return optuna.trial.Trial(study, frozen._trial_id)


def set_system_attribute(trial: optuna.Trial, name: str, value: Any) -> None:
    """An attribute that Optuna and its dashboard keep for themselves.  ``value`` must be JSON."""
    trial.storage.set_trial_system_attr(trial._trial_id, name, value)
