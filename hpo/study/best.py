"""The best trial of a study: the confirmed winner where there is one, else the best of the search.

Owns this choice and the check that confirmed.json names a trial of the study.  Does not own the ranking
(``hpo.study.standing``) or the confirmation (``hpo.confirm``).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.study.folder import StudyFolder, read_json
from hpo.study.standing import standing
from trainer.errors import ConfigError

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class BestTrial:
    """A study's best trial.  ``how``: how it was confirmed; empty: the best of the search.  ``interval``: 95 % of the
    confirmed score, else None; ``se``: the standard error of a search score, else None.  ``settings``: those that
    were searched, with kohya's names.  ``beats_trial0``: None if that is not known."""

    number: int
    score: float
    settings: Mapping[str, Any]
    how: str = ""
    interval: tuple[float, float] | None = None
    se: float | None = None
    beats_trial0: bool | None = None

    @property
    def confirmed(self) -> bool:
        return bool(self.how)


def best_trial(study: optuna.Study, folder: StudyFolder) -> BestTrial:
    """The best trial.  Raises ConfigError if no trial has a score, or if confirmed.json is damaged."""
    trials = study.get_trials(deepcopy=False)
    found = confirmed_winner(folder, range(len(trials)))
    if found is not None:
        number = int(found["winner"])
        settings = trials[number].user_attrs.get("settings", {})
        try:
            low, high = map(float, found["interval"])
            beats = found.get("beats_trial0")
            return BestTrial(
                number,
                float(found["score"]),
                settings,
                how=str(found["how"]),
                interval=(low, high),
                beats_trial0=None if beats is None else bool(beats),
            )
        except (KeyError, TypeError, ValueError):
            raise _damaged(folder, "is damaged") from None
    best = standing(study, 0).best
    if best is None:
        raise ConfigError(
            f"study {folder.name} has no scored trial yet",
            f"continue the search; for its state: hpo status {folder.words}",
        )
    return BestTrial(best[0], best[1], trials[best[0]].user_attrs.get("settings", {}), se=best[2])


def confirmed_winner(folder: StudyFolder, numbers: Container[int]) -> Mapping[str, Any] | None:
    """The contents of confirmed.json; None without one.  Raises ConfigError if its winner is none of the trials."""
    found = read_json(folder.confirmed)
    if found is None:
        return None
    number = found.get("winner")
    if not isinstance(number, int) or number not in numbers:
        raise _damaged(folder, f"refers to trial {number}, which does not exist in the study")
    return found


def _damaged(folder: StudyFolder, what: str) -> ConfigError:
    return ConfigError(f"{folder.confirmed} {what}", f"confirm the study again: hpo confirm {folder.words}")
