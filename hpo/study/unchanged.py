"""What must stay as it is while a study goes on: the facts that it began with, compared with those of now."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.config import TrainConfig
from trainer.errors import ConfigError


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """One line for each fact that changed."""
    lines = []
    for name in [*before, *(n for n in now if n not in before)]:
        old, new = before.get(name), now.get(name)
        if not _same(name, old, new):
            lines.append(f"{name}: was {old or 'not there'}, is now {new or 'not there'}")
    return lines


def _same(name: str, old: str | None, new: str | None) -> bool:
    """A base is its contents, whatever it is called: the last word of its fact."""
    if name == "base" and old and new:
        return old.split()[-1] == new.split()[-1]
    return old == new


def check_unchanged(before: Mapping[str, str], now: Mapping[str, str], name: str) -> None:
    """Refuse to go on with a study that began with something else: its scores could not be compared."""
    known = {key: value for key, value in before.items() if key in now or key.startswith("[")}
    usual = {f"[train] {name}": str(value) for name, value in TrainConfig().as_dict().items()}
    # What an older version did not note cannot be compared; a setting that came later and has its default
    # changes nothing.
    now = {
        key: value
        for key, value in now.items()
        if key in before or (key.startswith("[") and usual.get(key) != value)
    }
    changed = difference(known, now)
    if changed:
        raise ConfigError(
            f"study {name} began with something else: " + "; ".join(changed[:5]),
            "give the new study another --name, or undo the change",
        )
