"""Training one adapter and writing its log: what a trial and ``hpo train`` share.

Owns train.jsonl, and removes the adapter from the base when something goes wrong. Does not own the loop
(``trainer.loop.loop``) or what happens to the trained adapter (the caller).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.night import reached
from trainer.events import Rehearsed
from trainer.files import append_line, read_records, write_atomic

if TYPE_CHECKING:
    from trainer.adapters import Adapter
    from trainer.bases import Base
    from trainer.config import TrainConfig
    from trainer.data import Prepared
    from trainer.events import Event
    from trainer.loop import Conduct


class StepLog:
    """train.jsonl: one line per event. Lines after the checkpoint that a run resumes from are removed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fresh = True

    def write(self, event: Event, **more: Any) -> None:
        """Write an event and ``more`` figures down, but for the dry step, which is no part of the run."""
        if isinstance(event, Rehearsed):
            return
        values = {"event": type(event).__name__.lower(), **asdict(event), **more}
        if not values.get("others", True):
            del values["others"]
        values.pop("path", None)
        if self._fresh:
            first = values["steps"] + 1 if values["event"] == "finished" else values["step"]
            kept = [json.dumps(row) for row in read_records(self.path) if row.get("step", 0) < first]
            write_atomic(self.path, "".join(line + "\n" for line in kept))
            self._fresh = False
        append_line(self.path, json.dumps(values))
        reached(str(self.path), int(values.get("step") or values.get("steps") or 0))


def train_adapter(
    base: Base,
    config: TrainConfig,
    prepare: Callable[[Adapter], tuple[Prepared, Conduct]],
    on_event: Callable[[Event, Adapter], None],
    say: Callable[[str], None] = lambda line: None,
) -> Adapter:
    """A trained adapter, still in the base.  Goes on from a checkpoint; on an error the base is as before.

    ``prepare`` encodes images and captions with the fresh adapter in the base, and returns how the run is
    conducted (``trainer.loop.train``) beside them.  ``say`` gets a line if only a part of network_weights is used.
    """
    from trainer.adapters import lorafile
    from trainer.loop import loop

    adapter = lorafile.begin(base, config, say)
    try:
        prepared, how = prepare(adapter)
        with contextlib.closing(loop.train(config, base, adapter, prepared, how)) as events:
            for event in events:
                on_event(event, adapter)
    except BaseException:
        adapter.remove()
        raise
    return adapter
