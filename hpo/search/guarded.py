"""A trial's view with a guard beside it: what the view sees, the guard sees too, and both can stop the trial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.health import Guard

if TYPE_CHECKING:
    from hpo.search.trial import Watch
    from trainer.events import Event


@dataclass(frozen=True)
class Guarded:
    """A ``Watch``.  The guard may hold up a step or an image: the GPU cools meanwhile."""

    view: Watch
    guard: Guard

    def on_event(self, event: Event) -> None:
        self.view.on_event(event)
        self.guard.on_event(event, self.view.should_stop)

    def on_image(self, done: int, total: int) -> None:
        self.view.on_image(done, total)
        self.guard.on_image(done, total, self.view.should_stop)

    def should_stop(self) -> bool:
        return self.view.should_stop() or self.guard.should_stop
