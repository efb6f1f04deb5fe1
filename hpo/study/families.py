"""Which families the settings of a search can be transferred to: the ``sources`` in ``studies/families/*.toml``.

Owns only this one key of those files.  Does not own the rest of them; see ``hpo.transfer.profile``.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from hpo.study.config import SHIPPED
from hpo.study.folder import StudyFolder, read_json
from trainer.bases import detect, is_miniature
from trainer.reading import MAX_SETTINGS_BYTES, read_small

FAMILIES = "families"


def kind_of_base(folder: StudyFolder) -> str:
    """The base of a study in the terms of a family's ``sources``: a miniature's name, else the base's family."""
    base = str((read_json(folder.facts) or {}).get("base", ""))
    if not base or is_miniature(base):
        return base
    return detect.family_of_spec(base) or base


def families_from(source: str) -> list[str]:
    """The families that settings from a search on ``source`` can be transferred to, the shipped ones first.

    As for ``--to``, a file in the current folder replaces the shipped one.  Unreadable files are left out.
    """
    shipped, own = (
        {path.stem: path for path in sorted((root / FAMILIES).glob("*.toml"))}
        for root in (SHIPPED, Path("studies"))
    )
    return [name for name, path in {**shipped, **own}.items() if source in _sources(path)]


def _sources(path: Path) -> list[str]:
    try:
        found = tomllib.loads(read_small(path, MAX_SETTINGS_BYTES).decode("utf-8-sig")).get("sources")
    except (OSError, ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []
