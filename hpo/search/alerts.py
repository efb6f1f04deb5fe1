"""Convergence alerts: CONVERGENCE_ALERT.txt.

Owns the alert file (written atomically, withdrawn when the conditions no longer hold).  Does not own notifications;
see ``hpo.study.notify``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from hpo.study import ConvergenceVerdict, StudyFolder, TrialRow, read_json
from trainer.files import write_atomic
from trainer.text import clean_text

MEANING = {
    "converged": "more trials are unlikely to help: suggestions focus on one region, the best trials are equivalent",
    "plateau": "no recent gain above the noise, and suggestions focus on one region",
    "no_signal": "scoring noise hides the differences between trials: add prompts or seeds",
}
ALERTED = ("converged", "plateau")  # levels that write the file


def alert_text(
    folder: StudyFolder,
    verdict: ConvergenceVerdict,
    top: Sequence[TrialRow],
    best: TrialRow,
    *,
    withdrawn: str = "",
) -> str:
    """The text of the alert file.  ``grep "Best trial:"`` finds the line for scripts; ``hpo status`` shows it."""
    state = "withdrawn" if withdrawn else verdict.level
    meaning = "" if verdict.level == "none" else f" – {MEANING[verdict.level]}"
    lines = [
        f"Best trial: Trial {best.number}  score {best.value:.4f} ± {best.se:.4f}  ({state})",
        f"status: withdrawn – {withdrawn}, the search continues" if withdrawn else "status: active",
        f"level: {verdict.level}{meaning}",
        f"study: {folder.name}",
        f"time: {datetime.now(UTC).isoformat(timespec='seconds')}",
        "",
        *verdict.lines(),
        "",
        "best trials:",
        *(
            f"  Trial {row.number}  {row.value:.4f} ± {row.se:.4f}  "
            + ", ".join(f"{name}={clean_text(str(value))}" for name, value in row.settings.items())
            for row in top
        ),
        "",
        "The best search score is optimistic, because it was selected: confirm it with new seeds.",
        f"files: {folder.trial(best.number).root}",
        f"images: hpo dashboard {folder.words}",
        f"next: hpo {'status' if withdrawn else 'confirm'} {folder.words}",
    ]
    return "\n".join(map(clean_text, lines)) + "\n"


def update_alert(
    folder: StudyFolder, verdict: ConvergenceVerdict | None, rows: Mapping[int, TrialRow]
) -> str | None:
    """Update CONVERGENCE_ALERT.txt to the verdict.  Returns the new level to notify about, or None.

    Each level is notified once.  The alert is withdrawn if there is a new best trial or the conditions no longer
    hold; the file then gives the reason.  Once the file exists, it is kept up to date, active or withdrawn.
    """
    before = read_json(folder.convergence) or {}
    told, best_then = before.get("level"), before.get("best")
    if verdict is None:
        return None
    why, status = "", "active"
    if verdict.level not in ALERTED:
        if "status" not in before:
            return None
        status, why = "withdrawn", str(before.get("why", ""))
        if before["status"] == "active":
            why = f"the conditions for {told} no longer hold"
            if verdict.best != best_then:
                why = f"Trial {verdict.best} is better than Trial {best_then}"
    best, top = rows[verdict.best], [rows[n] for n in verdict.top[:5]]
    write_atomic(folder.alert, alert_text(folder, verdict, top, best, withdrawn=why))
    values = {**verdict.as_dict(), "status": status, "why": why}
    if status == "withdrawn":
        values["level"] = "none"
    write_atomic(folder.convergence, json.dumps(values, indent=1))
    if status == "withdrawn":
        return "withdrawn" if before["status"] == "active" else None
    return verdict.level if (told, best_then) != (verdict.level, verdict.best) else None
