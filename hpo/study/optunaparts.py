"""Operations without a public Optuna API: resuming a RUNNING trial, and system attributes of a trial.

Owns every private Optuna name that the tool uses.  One test fails if Optuna changes one of them, and another
if a private Optuna name is used elsewhere.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.trial import FrozenTrial


def take_up(study: optuna.Study, frozen: FrozenTrial) -> optuna.Trial:
    """A RUNNING trial, as returned by ``ask``: it suggests its existing values again and can be told."""
    return optuna.trial.Trial(study, frozen._trial_id)


def set_system_attribute(trial: optuna.Trial, name: str, value: Any) -> None:
    """Set an internal attribute of Optuna or its dashboard.  ``value`` must be JSON-serializable."""
    trial.storage.set_trial_system_attr(trial._trial_id, name, value)
