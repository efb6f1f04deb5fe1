"""Stop: Ctrl-C, SIGTERM and SIGUSR1 as a flag that a long task checks between two steps."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from hpo.night import moved
from trainer.errors import Interrupted


class Stop:
    """The first signal stops after the current step, a second Ctrl-C at once.

    After SIGTERM and SIGUSR1 the command ends with ``Interrupted.TERMINATED``.  Slurm and systemd send them, sometimes
    twice, and kill by themselves what takes too long.

    ``on_ask`` runs inside the signal handler, possibly during a print, so it must not print through rich.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, on_ask: Callable[[], None]) -> None:
        self.asked = False
        self._by: int | None = None
        self._on_ask = on_ask
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Interrupted):
            self.mark(error)

    def mark(self, error: Interrupted) -> Interrupted:
        """Give an error the exit code for the signal."""
        if self._by not in (None, signal.SIGINT):
            error.exit_code = Interrupted.TERMINATED
        return error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.asked, self._by = True, number
        self._on_ask()

    def __call__(self) -> bool:
        """Whether to stop.  Asked between two steps, images or files, so the supervisor learns that there are some."""
        moved()
        return self.asked
