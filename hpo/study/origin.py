"""The training_comment of a run with transferred settings: it names the study and the trial that they come from.

Owns its wording, and the reading of it and of the wording of earlier versions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FORMS = (
    re.compile(r"study (?P<study>.+), trial (?P<trial>\d+), transferred \(rules \S+\)"),
    re.compile(r"(?P<study>.+) trial (?P<trial>\d+), mapping \S+"),  # before rules 2
)


@dataclass(frozen=True)
class Origin:
    """The study and the trial whose settings were transferred."""

    study: str
    trial: int


def origin_comment(origin: Origin, rules: str) -> str:
    """The comment.  ``rules``: the version of the transfer rules."""
    return f"study {origin.study}, trial {origin.trial}, transferred (rules {rules})"


def origin_of(comment: str) -> Origin | None:
    """The origin that a comment names; None for the comment of any other run."""
    match = next(filter(None, (form.fullmatch(comment) for form in _FORMS)), None)
    return Origin(match["study"], int(match["trial"])) if match else None
