"""Read configuration files of kohya and of this tool: a TOML file becomes a TrainConfig, and no
key is ignored silently.

Does not own the tables of keys; see ``trainer.kohya.keys``. Each key of sd-scripts belongs to one of four classes:
used under its own name, translated (reported), without effect here (listed), or refused because the result would
differ. Keys that sd-scripts does not know have no effect, as there, and are listed; in our own file they are an error.
Missing keys get kohya's defaults in a kohya file and ours in our own file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.checks import check_known
from trainer.config import SETTINGS, TrainConfig
from trainer.errors import ConfigError
from trainer.findings import piece
from trainer.kohya import general, networks, optimizers
from trainer.kohya.keys import KNOWN_KEYS, KOHYA_DEFAULTS, NO_EFFECT_REASON, REFUSED, WEIGHT_DECAY
from trainer.kohya.reading import Reading, is_one_of
from trainer.kohya.sections import join
from trainer.text import clean_text
from trainer.tomlfile import flat, read_table


@dataclass(frozen=True)
class KohyaFile:
    """A kohya file as settings of this tool. ``given`` are the settings that do not come from kohya's defaults. The
    lists contain one line per key for the user."""

    path: Path
    config: TrainConfig
    given: Mapping[str, Any]
    translated: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    output_dir: str | None = None

    def require_all(self) -> KohyaFile:
        """Raise ConfigError if any key was refused, because the result would differ from what the file requests."""
        require_none_refused(self.path, self.refused)
        return self


def require_none_refused(path: Path, refused: Sequence[str]) -> None:
    if refused:
        raise ConfigError(
            f"{clean_text(str(path))} has settings that are not supported: {'; '.join(refused)}",
            "remove these lines if you do not need them, or give --set KEY=none for each",
        )


def read_kohya(path: Path) -> KohyaFile:
    """Read a file for sd-scripts' ``--config_file``.  Raises ConfigError for unreadable files and invalid values."""
    joined = join(read_table(path))
    file = from_kohya(path, joined.values, sections=joined.sections)
    return replace(file, translated=(*joined.repeated, *file.translated))


def from_kohya(
    path: Path,
    settings: Mapping[str, Any],
    *,
    sections: Mapping[str, str] | None = None,
    ours: Mapping[str, Any] | None = None,
) -> KohyaFile:
    """Translate settings of sd-scripts; ``path`` is the file they come from, ``sections`` the section of each.
    ``ours`` are settings under our names that win over them. Only the final values are checked."""
    ours = ours or {}
    return _translated(Reading(Path(path), settings, sections, ours), ours)


def read_own(path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Read a file of this tool: (the configuration, the settings from the file). Missing
    settings get our defaults."""
    given = flat(path, read_table(path))
    return TrainConfig.of(known_only(Path(path), given)), given


def known_only(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of this tool. Raises ConfigError for an unknown one, with the most similar known one."""
    found = {}
    for name, value in given.items():
        with piece():
            check_known(name, SETTINGS, "setting", clean_text(str(path)), "see docs/settings.md")
            found[name] = value
    return found


def is_kohya(settings: Iterable[str]) -> bool:
    """Whether settings are in the form of sd-scripts: one of the keys exists only there, such as network_module."""
    return any(name in KNOWN_KEYS and name not in SETTINGS for name in settings)


TRANSLATIONS = (*general.TRANSLATIONS, *optimizers.TRANSLATIONS, *networks.TRANSLATIONS)


def _translated(reading: Reading, ours: Mapping[str, Any]) -> KohyaFile:
    for translate in TRANSLATIONS:
        with piece():
            translate(reading)
    _rest(reading)
    values = {**TrainConfig().as_dict(), **KOHYA_DEFAULTS}
    values["weight_decay"] = WEIGHT_DECAY[
        reading.given.get("optimizer_type", KOHYA_DEFAULTS["optimizer_type"])
    ]
    given = {**reading.given, **ours}
    config = TrainConfig.of({**values, **given})
    return KohyaFile(
        reading.path,
        config,
        {name: getattr(config, name) for name in given},
        tuple(reading.translated),
        tuple(reading.without_effect),
        tuple(reading.unknown),
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
