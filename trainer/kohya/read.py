"""Read configuration files of kohya and of this tool: a TOML file becomes a TrainConfig, and no
key is ignored silently.

Owns reading and translating. Does not own the tables of keys; see ``trainer.kohya.keys``. Each key belongs to
one of four classes: used under its own name, translated (reported), without effect here (listed), or refused
because the result would differ. Unknown keys are treated as typos. Missing keys get kohya's defaults in a
kohya file and ours in our own file.

Section names have no meaning: setting names are unique, so any section is accepted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checks import check_known
from trainer.config import SETTINGS, TrainConfig, check_value
from trainer.errors import ConfigError
from trainer.findings import piece
from trainer.kohya import general, networks, optimizers, schedules
from trainer.kohya.keys import KNOWN_KEYS, KOHYA_DEFAULTS, NO_EFFECT_REASON, REFUSED, WEIGHT_DECAY
from trainer.kohya.reading import Reading, is_one_of
from trainer.text import clean_text
from trainer.tomlfile import flat, read_table


@dataclass(frozen=True)
class KohyaFile:
    """A kohya file as settings of this tool. ``given`` are the settings from the file; the rest of ``config``
    is kohya's defaults. The lists contain one line per key for the user."""

    path: Path
    config: TrainConfig
    given: Mapping[str, Any]
    translated: tuple[str, ...]
    without_effect: tuple[str, ...]
    refused: tuple[str, ...]
    differs: tuple[str, ...] = ()
    output_dir: str | None = None

    def require_all(self) -> KohyaFile:
        """Raise ConfigError if any key was refused, because the result would differ from what the file requests."""
        if self.refused:
            raise ConfigError(
                f"{clean_text(str(self.path))} has settings that are not supported: {'; '.join(self.refused)}",
                "remove these lines if you do not need them",
            )
        return self


def read_kohya(path: Path) -> KohyaFile:
    """Read a file for sd-scripts' ``--config_file``.  Raises ConfigError for unreadable files,
    typos and invalid values."""
    return from_kohya(path, flat(path, read_table(path)))


def from_kohya(path: Path, settings: Mapping[str, Any]) -> KohyaFile:
    """Translate settings of sd-scripts; ``path`` is the file they come from."""
    return _translated(
        Reading(Path(path), _known_only(Path(path), settings, KNOWN_KEYS, "sd-scripts has no such key"))
    )


def read_own(path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Read a file of this tool: (the configuration, the settings from the file). Missing
    settings get our defaults."""
    given = flat(path, read_table(path))
    return from_own(path, given), given


def from_own(path: Path, settings: Mapping[str, Any]) -> TrainConfig:
    """A configuration from settings of this tool, with our defaults for the rest."""
    known = _known_only(Path(path), settings, SETTINGS, "see docs/settings.md")
    return TrainConfig.of(known)


def is_kohya(settings: Iterable[str]) -> bool:
    """Whether settings are in the form of sd-scripts: one of the keys exists only there, such as network_module."""
    return any(name in KNOWN_KEYS and name not in SETTINGS for name in settings)


def _known_only(
    path: Path, given: Mapping[str, Any], known: Collection[str], otherwise: str
) -> dict[str, Any]:
    """The settings with known names. Raises ConfigError for an unknown one, with the most similar known one."""
    found = {}
    for name, value in given.items():
        with piece():
            check_known(name, known, "setting", clean_text(str(path)), otherwise)
            found[name] = value
    return found


TRANSLATIONS = (
    *general.TRANSLATIONS,
    *optimizers.TRANSLATIONS,
    *schedules.TRANSLATIONS,
    *networks.TRANSLATIONS,
)


def _translated(reading: Reading) -> KohyaFile:
    for translate in TRANSLATIONS:
        with piece():
            translate(reading)
    _rest(reading)
    values = {**TrainConfig().as_dict(), **KOHYA_DEFAULTS}
    values["weight_decay"] = WEIGHT_DECAY[
        reading.given.get("optimizer_type", KOHYA_DEFAULTS["optimizer_type"])
    ]
    values |= reading.given
    config, given = TrainConfig.of(values), {}
    for name, value in reading.given.items():
        with piece():
            given[name] = check_value(name, value)
    return KohyaFile(
        reading.path,
        config,
        given,
        tuple(reading.translated),
        tuple(reading.without_effect),
        tuple(reading.refused),
        tuple(reading.differs),
        reading.output_dir,
    )


def _rest(reading: Reading) -> None:
    """Keys without translation: used unchanged, refused, or without effect."""
    for name, value in reading.left.items():
        if name in SETTINGS:
            reading.given[name] = value
        elif name in REFUSED:
            harmless, reason = REFUSED[name]
            if not is_one_of(value, harmless):
                reading.refuse(name, value, reason)
        elif name in NO_EFFECT_REASON:
            reading.without_effect.append(f"{name}: {NO_EFFECT_REASON[name]}")
