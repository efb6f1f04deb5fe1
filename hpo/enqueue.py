"""A user's own kohya configuration as a trial: --enqueue FILE.toml.

Owns reading the file's settings (any section: kohya's names are unique), the difference to what the study
fixes, and the proposal that means the file.  Does not queue anything (``hpo.search``).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpo.space import ZERO_IS_UNSET, settings_of
from hpo.study import ELSEWHERE, StudyConfig
from trainer.config import SETTINGS, check_value
from trainer.errors import ConfigError
from trainer.files import clean_text


def read_settings(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(settings known here, names that are not) of a kohya TOML file; sections are for the reader only."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "check --enqueue") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not valid TOML: {clean_text(str(error))}", "correct that place"
        ) from None
    known: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in _flat(table):
        if name not in SETTINGS:
            unknown.append(name)
        elif name not in ELSEWHERE:
            known[name] = None if name in ZERO_IS_UNSET and value == 0 else check_value(name, value)
    if not known:
        raise ConfigError(f"{path} holds no setting of this tool", "give a kohya training configuration")
    return known, unknown


def _flat(table: Mapping[str, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in table.items():
        if isinstance(value, Mapping):
            pairs += _flat(value)
        elif not isinstance(value, list):
            pairs.append((name, value))
    return pairs


def as_proposal(path: Path, config: StudyConfig, steps_of: Any) -> tuple[dict[str, Any], list[str]]:
    """The file as a proposal of the study's space, and lines on what of it does not apply here.

    ``steps_of(TrainConfig)`` tells the optimizer steps of a run: warm-up in steps becomes a share of them.
    """
    given, unknown = read_settings(path)
    decided = {setting for p in config.space for setting in settings_of(p.name)}
    searched = {name: value for name, value in given.items() if name in decided}
    complete = config.config(config.baseline).as_dict() | searched
    warmup = complete["lr_warmup_steps"]
    if "lr_warmup_steps" in searched and warmup >= 1:
        complete["lr_warmup_steps"] = 0
        length = steps_of(config.train.with_values({k: complete[k] for k in decided}))
        complete["lr_warmup_steps"] = warmup / length
    proposal = config.space.check(
        config.space.proposal(complete, config.baseline), f"--enqueue {clean_text(path.name)}"
    )
    notes = [
        f"{name} = {value} in {path.name} stays {getattr(config.train, name)}: the study does not search it"
        for name, value in given.items()
        if name not in decided and value != getattr(config.train, name)
    ]
    if unknown:
        notes.append(f"not used from {path.name}: " + ", ".join(map(clean_text, unknown)))
    return proposal, notes
