"""The out-of-memory ladder in a run of ``hpo train``: which rungs were taken, kept beside the run.

``trainer.memory.ladder`` decides which rung comes next.  ladder.jsonl has a line for each: its name, what
made it necessary, the settings it changes from and to, and the step after which it was taken.  What the
planner changes before the first step is one line as well.  The same command resumes with the rungs already
taken. A rung no longer counts once the user has changed its setting, nor do the rungs after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.config import SETTINGS, TrainConfig
from trainer.errors import ConfigError
from trainer.files import append_line, read_records
from trainer.memory import Rung, encoding_rung, next_rung


class RunLadder:
    """The settings of a run after its rungs. ``changed``: settings that a checkpoint may not have yet,
    because the rung was taken after it."""

    def __init__(
        self, path: Path, config: TrainConfig, say: Callable[[str], None], *, writes: bool = True
    ) -> None:
        self.path = path
        self.config = config
        self.tried: tuple[str, ...] = ()
        self.changed: frozenset[str] = frozenset()
        self._say = say
        self._writes = writes
        for row in read_records(path):
            if not self._again(row):
                break

    def step_down(self, why: str, step: int, *, encoding: bool = False) -> Rung | None:
        """Take the next rung, record it and report it. Returns None if none is left."""
        rung = encoding_rung(self.config) if encoding else next_rung(self.config, self.tried)
        if rung is not None:
            self.take(rung, why, step)
        return rung

    def take(self, rung: Rung, why: str, step: int) -> None:
        """Continue with a rung's settings. Its message may have several lines."""
        before, after = self.config.as_dict(), rung.config.as_dict()
        changes = {name: [before[name], after[name]] for name in after if before[name] != after[name]}
        for line in rung.says.splitlines():
            self._say(f"{why}, going on after step {step} with less: {line}")
        if self._writes:
            row = {"rung": rung.name, "why": why, "step": step, "changes": changes, "says": rung.says}
            row["time_utc"] = datetime.now(UTC).isoformat(timespec="seconds")
            append_line(self.path, json.dumps(row))
        self._move(rung.name, rung.config)
        self._note(changes, step)

    def _again(self, row: dict[str, Any]) -> bool:
        """Take a rung of an earlier call again if its settings still have their old values. Nothing to do if
        the user has already set the new ones."""
        changes = row.get("changes")
        if not isinstance(changes, dict) or not changes:
            return False
        sound = all(
            name in SETTINGS and isinstance(pair, list) and len(pair) == 2 for name, pair in changes.items()
        )
        if not sound or any(getattr(self.config, name) not in pair for name, pair in changes.items()):
            return False
        if all(getattr(self.config, name) == pair[1] for name, pair in changes.items()):
            self._note(changes, row.get("step"))
            return True
        try:
            config = self.config.with_values({name: pair[1] for name, pair in changes.items()})
        except ConfigError:
            return False
        self._move(str(row.get("rung", "")), config)
        self._note(changes, row.get("step"))
        for line in str(row.get("says", row.get("rung", ""))).splitlines():
            self._say(f"as before: {line}")
        return True

    def _move(self, name: str, config: TrainConfig) -> None:
        self.config = config
        self.tried = (*self.tried, name)

    def _note(self, changes: Iterable[str], step: Any) -> None:
        """Changes made before the first step are in every checkpoint."""
        if isinstance(step, int) and step > 0:
            self.changed |= frozenset(changes)
