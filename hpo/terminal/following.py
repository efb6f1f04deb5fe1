"""The command that follows a step, for its ``next:`` line: complete, so that it can be pasted."""

from __future__ import annotations

import shlex
from pathlib import Path

from hpo.study import StudyFolder, read_json
from trainer.bases import detect, is_miniature
from trainer.text import clean_text

# The family that a search on this base is transferred to: the `sources` of hpo/transfer/families/*.toml.
TARGETS = {"sd15": "sdxl", "mini-sd15": "mini-sdxl"}


def command(*words: str | Path) -> str:
    """A command line that can be pasted: ``command("hpo", "train", path)``."""
    return shlex.join(clean_text(str(word)) for word in words)


def after_search(folder: StudyFolder, winner: int) -> str:
    """What to do with a study's best settings: transfer them, or, from a search on the target itself, train them."""
    base = str((read_json(folder.facts) or {}).get("base", ""))
    kind = base if not base or is_miniature(base) else detect.family_of_spec(base) or base
    if target := TARGETS.get(kind):
        return f"hpo transfer {folder.words} --to {target}"
    return command("hpo", "train", folder.trial(winner).root)
