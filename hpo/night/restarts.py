"""When a worker that died is started again: after growing pauses, and at most three times without progress."""

from __future__ import annotations

from collections.abc import Sequence

PAUSES = (
    5.0,
    30.0,
    120.0,
)  # seconds before each restart; assumed: a driver recovers from a fault in some seconds


class Restarts:
    """The deaths of the processes at one post since its last progress.  ``pauses``: seconds, one for each restart."""

    def __init__(self, pauses: Sequence[float] | None = None) -> None:
        self.deaths = 0
        self._pauses = PAUSES if pauses is None else tuple(pauses)

    def progressed(self) -> None:
        """The worker has finished something: earlier deaths no longer count."""
        self.deaths = 0

    def died(self, *, in_trial: bool = False) -> float | None:
        """Seconds to wait before the next start; None if there is none.

        ``in_trial``: there is one start more, which gives up the trial (``hpo.search.worker``) and takes the next.
        """
        self.deaths += 1
        if self.deaths > len(self._pauses) + in_trial:
            return None
        return self._pauses[min(self.deaths, len(self._pauses)) - 1]
