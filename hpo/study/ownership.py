"""Who does what in a study that several processes work on: one interface, for one machine and for several.

Owns the interface, its form for a study in its own file (kernel locks, ``hpo.study.locks``), and the choice between
that and leases in a database (``hpo.study.leases``).  Callers do not know which one they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from hpo.study.folder import StudyFolder
from hpo.study.locks import Holder, Lock, alone
from hpo.study.place import place_of

if TYPE_CHECKING:
    import optuna


class ClaimLost(Exception):
    """Another worker has taken over what this process was working on.  Its text is for the user."""


class Claimed(Protocol):
    """Something that one process at a time works on.  One object per process."""

    def try_acquire(self) -> bool: ...

    def release(self) -> None: ...

    def check(self, *, certain: bool = False) -> None:
        """Raise ClaimLost if another process may have taken over.  ``certain``: ask, although it was known just now."""

    def holder(self) -> Holder | None:
        """The process that works on it.  Not for one that this process works on."""

    def telling(self, trial: optuna.Trial) -> AbstractContextManager[optuna.Trial]:
        """The trial to report through.  Raises ClaimLost, and then nothing of the block is stored."""


class Ownership(Protocol):
    """What the processes of one study share among themselves."""

    def study(self) -> AbstractContextManager[None]:
        """The study lock: held while a trial is chosen.  Not reentrant."""

    def trial(self, number: int) -> Claimed: ...

    def base(self) -> Claimed:
        """Held while the untrained base is scored: other workers wait for the result instead of repeating it."""

    def alone(self, name: str, work: str, hint: str) -> AbstractContextManager[None]:
        """Run a block in one process at a time.  Raises MachineError if another one is in it."""

    def runners(self, numbers: Iterable[int]) -> dict[int, Holder | None]:
        """The process that runs each trial.  Not for trials of this process."""

    def survives(self, error: Exception) -> bool:
        """Whether an error of the database passes, such as a restart of its server."""


class FileOwnership:
    """Kernel locks in the study's folder, for processes of one machine."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder

    def study(self) -> AbstractContextManager[None]:
        return self._folder.study_lock().held()

    def trial(self, number: int) -> Lock:
        return self._folder.trial_lock(number)

    def base(self) -> Lock:
        return self._folder.base_lock()

    def alone(self, name: str, work: str, hint: str) -> AbstractContextManager[None]:
        return alone(self._folder.locks / f"{name}.lock", work, hint)

    def runners(self, numbers: Iterable[int]) -> dict[int, Holder | None]:
        return {number: self.trial(number).holder() for number in numbers}

    def survives(self, error: Exception) -> bool:
        return False


def ownership_of(folder: StudyFolder, say: Callable[[str], None] = lambda text: None) -> Ownership:
    """The form that the folder's study needs.  ``say`` is told when a server does not answer."""
    place = place_of(folder)
    if place is None:
        return FileOwnership(folder)

    from hpo.study.leases import Leases
    from hpo.study.server import server_of

    server = server_of(place)
    server.say = say
    return Leases(server.engine, place.study)
