"""The contract of a source of proposals: what a worker works on, and what only the command that asked for it knows.

Owns what the worker asks.  Search, confirm and probes each answer in their own room (``hpo.search.sampled``,
``hpo.confirm.proposals``, ``hpo.transfer.probes.proposals``); how a trial is claimed, run and told is not theirs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hpo.study import SCORE, Result, TrialFolder
from trainer.config import TrainConfig

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Proposal:
    """A trial to be queued: its parameters, and its role if it has one."""

    values: Mapping[str, Any]
    role: str = ""


class Proposals(Protocol):
    """A study's next trial, its settings, and what follows from its result.

    What has an answer here is what most commands answer.  Everything up to ``refusal`` is asked with
    the study's lock held.
    """

    noun: str = "trial"  # what the user's lines call one
    objectives: tuple[str, ...] = (SCORE,)  # what the study is told of a result

    # What is next

    def needs_more(self, alive: int) -> bool:
        """Whether a dead worker's trial is to be gone on with while ``alive`` others are at work."""
        return True

    def wants(self, suggested: Mapping[str, Any]) -> bool:
        """Whether a dead worker's trial is one of those that this call is about."""
        return True

    @abstractmethod
    def queued(self) -> Iterator[Proposal | None]:
        """What to ask the study for, one after the other; None: what waits there, or else the sampler, decides."""

    @abstractmethod
    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Every parameter of the trial; one that was taken up again gets what it had."""

    def refusal(self, suggested: Mapping[str, Any], number: int) -> str:
        """Why a proposal becomes no trial; empty if it does."""
        return ""

    def over(self) -> str:
        """Why no further trial begins, whatever is next; empty while one may."""
        return ""

    # One trial

    @property
    @abstractmethod
    def total(self) -> int:
        """How many trials there will be, as the user is shown it."""

    @abstractmethod
    def config(self, suggested: Mapping[str, Any], number: int) -> TrainConfig:
        """The complete settings."""

    @abstractmethod
    def settings(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        """The settings to show."""

    def inactive(self, suggested: Mapping[str, Any]) -> tuple[str, ...]:
        """Parameters without effect beside the others."""
        return ()

    def attributes(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        """What the study keeps of the trial beside its settings."""
        return {}

    def begin(self, suggested: Mapping[str, Any]) -> None:
        """A trial was claimed and is about to be shown."""
        return

    def prepare(self, suggested: Mapping[str, Any], folder: TrialFolder) -> None:
        """Put into the trial's folder what its work finds there."""
        return

    def after(self, suggested: Mapping[str, Any], result: Result) -> None:
        """What follows from a result.  An error ends the worker."""
        return

    # The end

    def ended(self) -> str:
        """Why there was nothing left to claim."""
        return ""
