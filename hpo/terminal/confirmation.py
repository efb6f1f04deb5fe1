"""Lines about a study's confirmed result, or how to get one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo.study import StudyFolder, read_json
from hpo.terminal.following import after_search
from trainer.text import clean_text

if TYPE_CHECKING:
    from hpo.study import Standing


def confirmed_lines(folder: StudyFolder) -> list[str]:
    """The confirmed winner.  Empty if the study was not confirmed."""
    found = read_json(folder.confirmed)
    if found is None:
        return []
    try:
        low, high = found["interval"]
        text = f"confirmed ({found['how']}): trial {found['winner']}, score {found['score']:.4f}"
        text += f" (95 % {low:.4f} … {high:.4f})"
        if found["beats_trial0"] is False:
            text += "; no trial beats trial 0"
    except (KeyError, TypeError, ValueError):
        return [f"{folder.confirmed} is damaged; create it again with: hpo confirm {folder.words}"]
    return [clean_text(text)]


def confirm_advice(folder: StudyFolder, standing: Standing) -> list[str]:
    """How to confirm a search that was not confirmed yet, if it has a trial to confirm."""
    if folder.confirmed.is_file() or standing.best is None:
        return []
    if standing.only_baseline:
        return ["only trial 0 has a score, so there is nothing to confirm yet: continue the search"]
    return [f"scores above are search scores; confirm with: hpo confirm {folder.words}"]


def confirmed_trials(folder: StudyFolder) -> tuple[int, ...]:
    """The trials listed in confirmed.json.  Empty if the file is missing or damaged."""
    found = read_json(folder.confirmed) or {}
    try:
        return (*(int(row["number"]) for row in found["rows"]), *map(int, found["infeasible"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return ()


def end_lines(folder: StudyFolder, standing: Standing) -> tuple[list[str], str]:
    """The lines about the result at the end of a search, and the next command."""
    assert standing.best is not None
    best, known = standing.best[0], confirmed_trials(folder)
    if not known and standing.only_baseline:
        return confirm_advice(folder, standing), f"hpo status {folder.words}"
    if not known:
        return [
            "  The best search score is optimistic, because it was selected: it is not a",
            "  final result yet. hpo confirm trains with new seeds, scored on new prompts.",
        ], f"hpo confirm {folder.words}"
    lines = confirmed_lines(folder)
    if best in known:
        return [
            *lines,
            "  This is the final result; search scores are optimistic.",
        ], after_search(folder, int((read_json(folder.confirmed) or {}).get("winner", best)))
    return [
        *lines,
        f"  Trial {best} has a better search score but was not confirmed:",
        "  it is not a final result yet.",
    ], f"hpo confirm {folder.words}"
