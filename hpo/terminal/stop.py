"""Stop: Ctrl-C and SIGTERM as a flag that a long task checks between two steps."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


class Stop:
    """Handle Ctrl-C and SIGTERM: the first signal stops after the current step, the second stops at once.

    ``on_ask`` runs inside the signal handler, possibly during a print, so it must not print through rich.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, on_ask: Callable[[], None]) -> None:
        self.asked = False
        self._on_ask = on_ask
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._on_ask()

    def __call__(self) -> bool:
        return self.asked
