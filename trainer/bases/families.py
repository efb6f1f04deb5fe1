"""What settings mean on a family of bases, before a base is loaded.

Owns which settings belong to one family only; whether a loaded base can do what is asked is
``trainer.data.preflight``'s.
"""

from __future__ import annotations

from trainer.config import SETTINGS, TrainConfig
from trainer.errors import ConfigError

KIND = {"sd15": "SD1.5", "sdxl": "SDXL"}  # family → how Setting.only names it
NOT_USED = ("clip_skip",)  # settings that the other family passes over, as sd-scripts does; it is said


def check(config: TrainConfig, family: str, base: str) -> None:
    """ConfigError for a setting of the other family.  ``base`` is how the base is called."""
    usual = TrainConfig().as_dict()
    for name, facts in SETTINGS.items():
        if facts.only in ("", KIND[family]) or name in NOT_USED or getattr(config, name) == usual[name]:
            continue
        raise ConfigError(f"{name} is for {facts.only}, and {base} is {KIND[family]}", f"leave {name} out")


def passed_over(config: TrainConfig, family: str) -> list[str]:
    """Lines on settings that the family does not use."""
    if family != "sdxl" or config.clip_skip is None:
        return []
    return [f"clip_skip = {config.clip_skip} is not used: {family} always reads the last layer but one"]
