"""Output texts of ``hpo confirm``, and those of ``hpo status`` about confirmation and noise.

Owns the wording only.  All numbers come from ``Confirmed``, from confirmed.json or from ``hpo.study.noise``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from hpo.study import CONFIRMATION, PROBES, StudyFolder, read_json
from hpo.terminal import after_search, clock, confirm_advice, confirmed_lines, short
from trainer.text import clean_text

if TYPE_CHECKING:
    import optuna

    from evaluation.score import Difference
    from hpo.confirm.outcome import Confirmed
    from hpo.study import StudyKind, StudyTable


def outcome_table(outcome: Confirmed) -> Table:
    """One row per configuration, best first, at most 80 columns wide, with the figures that the rule compares."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for name in ("trial", "search", "confirmed", "95 %", "behind best", "images", "time", ""):
        table.add_column(name, no_wrap=True, justify="right" if name != "" else "left")
    for row in outcome.rows:
        table.add_row(
            Text(str(row.number)),
            Text(f"{row.search_score:.3f}"),
            Text(f"{row.score:.3f}"),
            Text(f"{row.low:.2f} … {row.high:.2f}"),
            Text(plus_minus(row.behind) if row.behind else "–"),
            Text(f"{row.trained_images:.0f}"),
            Text(clock(row.train_seconds)),
            Text("winner" if row.number == outcome.winner else "equal" if row.tied else ""),
            style="bold" if row.number == outcome.winner else "",
        )
    return table


def plus_minus(what: Difference) -> str:
    """A difference and its standard error."""
    return f"{what.mean:.3f} ± {what.se:.3f}"


def signed(what: Difference, digits: int = 3) -> str:
    return f"{what.mean:+.{digits}f} ({what.low:+.{digits}f} … {what.high:+.{digits}f})"


def outcome_lines(outcome: Confirmed, source: StudyFolder, target: StudyFolder, *, kept: bool) -> list[str]:
    """The result as lines of text."""
    won = outcome.won
    lines = [f"trial {n}: infeasible in the confirmation: {why}" for n, why in outcome.troubles.items()]
    lines.append(
        f"confirmed: trial {won.number}, score {won.score:.4f} (95 % {won.low:.4f} … {won.high:.4f})"
    )
    lines += [f"  {clean_text(str(name))} = {short(value)}" for name, value in won.settings.items()]
    if chosen := _why_it_won(outcome):
        lines.append(f"  {chosen}")
    lines.append(_against_trial0(outcome))
    if outcome.shrinkage is not None:
        moved = "fell" if outcome.shrinkage >= 0 else "rose"
        text = "shrinkage: from search to confirmation, the scores of the selected trials "
        text += f"{moved} by {abs(outcome.shrinkage):.4f} on average"
        if outcome.expected is not None:
            text += f"; the search alone predicted {outcome.expected:.4f} for its best trial"
        lines.append(text)
    if outcome.train_freedom:
        lines.append(
            "training seed: the same settings trained with another seed change a score by about "
            f"{outcome.train_sd:.4f} (standard deviation in {sum(len(r.repeats) for r in outcome.rows)} trainings); "
            "the intervals include it"
        )
    else:
        lines.append("training seed: not varied, so the intervals cover prompts and sampling seeds only")
    if kept:
        lines.append(f"written: {source.confirmed}; runs: {target.root}")
    else:
        lines.append(
            f"{source.confirmed} was not replaced: it holds a confirmation with retraining; runs: {target.root}"
        )
    return [*lines, f"next: {after_search(source, won.number)}"]


def _why_it_won(outcome: Confirmed) -> str:
    """Why the winner is not the best score, or which others are equal to it.  Empty if it stands alone."""
    won, best = outcome.won, outcome.rows[0]
    if won.behind is not None:
        return (
            f"trial {best.number} has the best score ({best.score:.4f}); trial {won.number} is behind it by "
            f"{plus_minus(won.behind)}, which is within the noise, and sees {won.trained_images:.0f} images "
            f"instead of {best.trained_images:.0f}"
        )
    others = sorted(number for number in outcome.ties if number != won.number)
    if not others:
        return ""
    numbers, verb = ", ".join(map(str, others)), "are" if len(others) > 1 else "is"
    return f"trial{'s' if len(others) > 1 else ''} {numbers} {verb} equal within the noise and not clearly cheaper"


def _against_trial0(outcome: Confirmed) -> str:
    if outcome.beats_trial0 is None:
        return "trial 0 has no confirmed score, so it is unknown whether the search improved on the default settings"
    if not outcome.beats_trial0:
        return (
            "nothing beats trial 0 (the default settings): no 95 % interval of a difference to it is above 0"
        )
    over = outcome.won.over_trial0
    return f"over trial 0: {signed(over)}" if over else "trial 0 itself is the winner"


def result_lines(folder: StudyFolder, kind: StudyKind) -> list[str]:
    """The confirmed result of a search, or of the search that a confirmation repeats.  Empty without one."""
    if kind.word == CONFIRMATION:
        source = StudyFolder(folder.root.with_name(kind.of))
        found = read_json(source.confirmed)
        if found is None or found.get("confirmation") != folder.name:
            return []
        return confirmed_lines(source)
    return confirmed_lines(folder) if folder.confirmed.is_file() else []


def status_lines(
    study: optuna.Study, folder: StudyFolder, table: StudyTable, *, learned: bool = True
) -> list[str]:
    """The noise of the scores in this study, and how to go on.  ``learned``: hpo confirm would not refuse it."""
    from hpo.study import components
    from hpo.terminal import trial_lines

    kind = table.kind
    if kind.word == CONFIRMATION:
        source = StudyFolder(folder.root.with_name(kind.of))
        done = bool(result_lines(folder, kind))
        return [f"{'the search' if done else 'the result appears'}: hpo status {source.words}"]
    noise, best = components(study, folder), table.now.best
    lines = [noise.sentence(), noise.figures()] if noise else []
    if best:
        lines += [f"trial {best[0]}, extra metrics: {line}" for line in trial_lines(folder.trial(best[0]))]
    return lines if kind.word == PROBES or not learned else [*lines, *confirm_advice(folder, table.now)]
