"""The command that follows a step, for its ``next:`` line: complete, so that it can be pasted."""

from __future__ import annotations

import shlex
from pathlib import Path

from hpo.study import StudyFolder, families_from, kind_of_base
from trainer.text import clean_text


def command(*words: str | Path) -> str:
    """A command line that can be pasted: ``command("hpo", "train", path)``.  A path inside the current folder is
    shown relative to it."""
    return shlex.join(clean_text(str(_from_here(word))) for word in words)


def _from_here(word: str | Path) -> str | Path:
    if not isinstance(word, Path) or not word.is_absolute():
        return word
    try:
        return word.relative_to(Path.cwd())
    except (ValueError, OSError):
        return word


def on_device(device: str | None) -> tuple[str, ...]:
    """The words of ``--device`` for the next command, if the user gave it to this one."""
    return ("--device", device) if device else ()


def after_search(folder: StudyFolder, winner: int) -> str:
    """What to do with a study's best settings: transfer them, or, from a search on the target itself, train them."""
    if targets := families_from(kind_of_base(folder)):
        return f"hpo transfer {folder.words} --to {command(targets[0])}"
    return command("hpo", "train", folder.trial(winner).root)
