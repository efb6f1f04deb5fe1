"""Operations without a public Optuna API: resuming a RUNNING trial, and system attributes of a trial.

Owns every private Optuna name that the tool uses.  One test fails if Optuna changes one of them, and another
if a private Optuna name is used elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

if TYPE_CHECKING:
    from sqlalchemy import Connection


def take_up(study: optuna.Study, frozen: FrozenTrial) -> optuna.Trial:
    """A RUNNING trial, as returned by ``ask``: it suggests its existing values again and can be told."""
    return optuna.trial.Trial(study, frozen._trial_id)


def state_of(trial: optuna.Trial | FrozenTrial, study: optuna.Study) -> TrialState:
    """The state of one trial, without reading the others."""
    return study._storage.get_trial(trial._trial_id).state


def within(trial: optuna.Trial, connection: Connection) -> optuna.Trial:
    """The same trial, and its study.  All that is written through it belongs to the connection's transaction."""
    from optuna.storages import RDBStorage
    from sqlalchemy.orm import scoped_session, sessionmaker

    study = trial.study
    usual = study._storage._backend  # type: ignore[attr-defined]
    assert isinstance(usual, RDBStorage)
    storage = object.__new__(RDBStorage)  # its constructor would connect again
    storage.__dict__.update(usual.__dict__)
    session = sessionmaker(bind=connection, join_transaction_mode="create_savepoint")
    storage.scoped_session = scoped_session(session)
    inside = optuna.study.Study(study.study_name, storage, study.sampler, study.pruner)
    return optuna.trial.Trial(inside, trial._trial_id)


def set_system_attribute(trial: optuna.Trial, name: str, value: Any) -> None:
    """Set an internal attribute of Optuna or its dashboard.  ``value`` must be JSON-serializable."""
    trial.storage.set_trial_system_attr(trial._trial_id, name, value)
