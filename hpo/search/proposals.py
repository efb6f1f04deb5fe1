"""The interface between a worker and the command that supplies its trials.

Owns the protocol that a worker calls.  Search, confirm and probes each implement it in their own room
(``hpo.search.sampled``, ``hpo.confirm.proposals``, ``hpo.transfer.probes.proposals``).  Does not own how a
trial is claimed, run and reported (``hpo.search.worker``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hpo.study import SCORE, Result, Standing, TrialFolder, samples_of
from trainer.config import TrainConfig
from trainer.data import Dataset, total_steps

if TYPE_CHECKING:
    import optuna

    from hpo.search.looks import Looks


@dataclass(frozen=True)
class Proposal:
    """A trial to enqueue: its parameters, and its role if it has one."""

    values: Mapping[str, Any]
    role: str = ""


class Proposals(Protocol):
    """A study's next trial, its settings, and the actions after its result.

    Methods with a body here are defaults that most commands use.  The methods up to ``refusal`` are called
    with the study lock held.
    """

    noun: str = "trial"  # the word for one trial in messages
    objectives: tuple[str, ...] = (SCORE,)  # the values reported to Optuna

    # Choosing the next trial

    def needs_more(self, alive: int) -> bool:
        """Whether to resume a dead worker's trial while ``alive`` other trials are running."""
        return True

    def wants(self, suggested: Mapping[str, Any]) -> bool:
        """Whether a dead worker's trial belongs to this command."""
        return True

    @abstractmethod
    def queued(self) -> Iterator[Proposal | None]:
        """The next proposals, in order.  None: take an enqueued trial of the study, else ask the sampler."""

    @abstractmethod
    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Every parameter of the trial.  A resumed trial keeps its values."""

    def refusal(self, suggested: Mapping[str, Any], number: int) -> str:
        """The reason to reject a proposal; empty to accept it."""
        return ""

    def over(self) -> str:
        """The reason to start no more trials; empty to continue."""
        return ""

    def samples(self, config: TrainConfig, data: Dataset) -> int:
        """Training images shown in a trial with these settings (``hpo.study.samples_of``), for the time left."""
        return samples_of(config, total_steps(config, data))

    def samples_ahead(self, now: Standing) -> float | None:
        """Mean samples of a trial that has not started.  None: as those before."""
        return None

    def trials_ahead(self, now: Standing) -> int:
        """Trials that have not started."""
        return max(0, now.left - now.running)

    def later_seconds(self) -> float:
        """What follows the last trial in the same command."""
        return 0.0

    # One trial

    @property
    @abstractmethod
    def total(self) -> int:
        """The total number of trials, as shown to the user."""

    @abstractmethod
    def config(self, suggested: Mapping[str, Any], number: int) -> TrainConfig:
        """The complete settings."""

    @abstractmethod
    def settings(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        """The settings to show."""

    def inactive(self, suggested: Mapping[str, Any]) -> tuple[str, ...]:
        """Conditional parameters without effect in this proposal."""
        return ()

    def attributes(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        """Additional user attributes of the trial."""
        return {}

    def begin(self, suggested: Mapping[str, Any]) -> None:
        """Called after a trial is claimed, before it is shown."""
        return

    def prepare(self, suggested: Mapping[str, Any], folder: TrialFolder) -> None:
        """Write files that the trial needs into its folder."""
        return

    def looks(self, trial: optuna.Trial, folder: TrialFolder) -> Looks | None:
        """How the trial is looked at while it is trained.  None: it runs to its end."""
        return None

    def after(self, suggested: Mapping[str, Any], result: Result) -> None:
        """Called after each result.  An error ends the worker."""
        return

    # The end

    def ended(self) -> str:
        """The reason why there is nothing left to claim."""
        return ""
