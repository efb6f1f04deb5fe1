"""Which preset a dataset asks for, and what a preset changes in a study file.

Owns the words that mean a style, and the effect of ``--preset`` on the sections.  Does not own the presets
(``hpo.study.sections``), the templates (``evaluation.prompts``) or the choice for a command (``hpo.search.choice``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.prompts import STYLE, TEMPLATES
from hpo.study.sections import PRESETS
from trainer.checks import suggestion
from trainer.errors import ConfigError

CHARACTER, STYLE_PRESET = "character", "style"
STYLE_WORD = "style"  # the class word of a style that has none
# The last word of a class that is a style: "10_vexa style", "art style", "10_vexa artstyle".
_STYLES = re.compile(r"(?:^|[\s_-])(?:(?:art)?styles?|aesthetic)$", re.IGNORECASE)
# A trigger without a class word that says so itself: "10_vexa_style", "10_vexastyle".
_STYLE_TRIGGER = re.compile(r"style$", re.IGNORECASE)

Sections = dict[str, dict[str, Any]]


def preset_of(trigger: str | None, class_word: str | None) -> str | None:
    """The preset that trigger and class word ask for; None if they do not say what the images show.

    A class word that is not a style is a subject.  Characters and objects are scored alike, so a subject is a
    character unless ``--preset object`` is given.
    """
    if class_word:
        return STYLE_PRESET if _STYLES.search(class_word.strip()) else CHARACTER
    return STYLE_PRESET if trigger and _STYLE_TRIGGER.search(trigger) else None


def check_preset(name: str) -> str:
    if name not in PRESETS:
        raise ConfigError(f"no preset {name}", suggestion(name, PRESETS) or "presets: " + ", ".join(PRESETS))
    return name


def use_preset(sections: Sections, preset: str) -> None:
    """Make the definition one of ``preset``.  Numbers of prompts that are those of the former preset become its own."""
    before = str(sections["study"].get("preset", CHARACTER))
    if before == check_preset(preset):
        return
    former = PRESETS.get(before)
    for section, counts in (("prompts", "counts"), ("confirmation", "confirm_counts")):
        if former is not None and sections[section].get("counts") == getattr(former, counts):
            del sections[section]["counts"]
    sections["study"]["preset"] = preset


def word_style(sections: Sections) -> None:
    """Word the prompts of a style as a style's: "a lighthouse, vexa style" and not "vexa style on a beach"."""
    preset = PRESETS.get(str(sections["study"].get("preset", CHARACTER)))
    if preset is None or not preset.style:
        return
    for section in ("prompts", "confirmation"):
        wording = f"{sections[section].get('words', 'natural')}{STYLE}"
        if wording in TEMPLATES:
            sections[section]["words"] = wording


def keep_wording(sections: Sections, before: Mapping[str, Any]) -> None:
    """Keep the wording of a study that was begun before styles had prompts of their own."""
    for section in ("prompts", "confirmation"):
        former = before.get(section, {}).get("words", "natural")
        if sections[section].get("words") == f"{former}{STYLE}":
            sections[section]["words"] = former


def default_study(usual: str, preset: str, shipped: Path) -> str:
    """The study file of a preset, or the usual one: sd15-style for sd15-character."""
    other = usual.replace(CHARACTER, preset)
    return other if (shipped / f"{other}.toml").is_file() else usual
