"""Keys that sd-scripts does not know. It ignores them without a word, so they have no effect here either, and each is
named with what it probably meant.
"""

from __future__ import annotations

from typing import Any

from trainer.checks import SHOWN, suggestion
from trainer.kohya.keys import KNOWN_KEYS
from trainer.text import clean_text
from trainer.tomlfile import as_text

# key → what it probably meant
UNKNOWN_MEANT: dict[str, str] = {
    "conv_dim": "belongs into network_args, where it would add 3×3 convolutions",
    "conv_alpha": "belongs into network_args, beside conv_dim",
    "sdxl": "the base's file says so",
    "lr_restart_cycles": "lr_scheduler_num_cycles is the number of restarts",
}
# Tables that look as if sd-scripts read them as one setting.
_LISTS = ("optimizer_args", "network_args", "lr_scheduler_args")


def meaning(name: str, value: Any, section: str = "") -> str:
    """One unknown key as a line: ``name = value: what it probably meant``."""
    if section in _LISTS:
        meant = f'belongs into a list: {section} = ["{clean_text(name)}={as_text(value)}"]'
    else:
        meant = (
            UNKNOWN_MEANT.get(name)
            or suggestion(name, sorted(KNOWN_KEYS))
            or "sd-scripts has no such setting"
        )
    return f"{clean_text(name)[:SHOWN]} = {as_text(value)}: {meant}"
