"""What a begun study keeps although its study file says something else by now.

Owns the length in epochs of studies of a shipped file from before images seen were searched, and the form of prompts
that was decided when a study was begun.  A change of a user's own file is a changed definition, which
``hpo.study.unchanged`` reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.prompts import AUTO
from hpo.study.presets import Sections
from hpo.study.space.derived import IMAGES_SEEN

EPOCHS = "max_train_epochs"


def keep_as_begun(sections: Sections, before: Mapping[str, Any], *, shipped: bool) -> None:
    """Make the sections of a file, before ``--set``, those that the study was begun with.

    ``before``: the stored sections of the study.  ``shipped``: whether the file is this tool's.
    """
    if shipped:
        _keep_epochs(sections, before)
    for section in ("prompts", "confirmation"):
        if sections[section].get("words") == AUTO:  # decided when the study was begun
            sections[section]["words"] = before.get(section, {}).get("words", "natural")


def _keep_epochs(sections: Sections, before: Mapping[str, Any]) -> None:
    then, baseline = before.get("space", {}), before.get("baseline", {})
    if IMAGES_SEEN not in sections["space"] or IMAGES_SEEN in then or EPOCHS not in then:
        return
    sections["space"] = {
        **{EPOCHS if name == IMAGES_SEEN else name: body for name, body in sections["space"].items()},
        EPOCHS: then[EPOCHS],
    }
    sections["baseline"].pop(IMAGES_SEEN, None)
    if EPOCHS in baseline:
        sections["baseline"][EPOCHS] = baseline[EPOCHS]
