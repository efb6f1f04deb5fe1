"""Output texts of ``hpo confirm``, and those of ``hpo status`` about confirmation and noise.

Owns the wording only.  All numbers come from ``Confirmed``, from confirmed.json or from ``hpo.study.noise``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from hpo.study import StudyFolder
from hpo.terminal import after_search, clock, confirmed_lines, short
from trainer.text import clean_text

if TYPE_CHECKING:
    import optuna

    from evaluation.score import Difference
    from hpo.confirm.outcome import Confirmed


def outcome_table(outcome: Confirmed) -> Table:
    """One row per configuration, best first, at most 80 columns wide.  ``cost``: training time per run."""
    table = Table(box=None, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("trial", "search", "confirmed", "95 %", "over trial 0", "P(best)", "cost", ""):
        table.add_column(name, no_wrap=True, justify="right" if name != "" else "left")
    for row in outcome.rows:
        table.add_row(
            Text(str(row.number)),
            Text(f"{row.search_score:.3f}"),
            Text(f"{row.score:.3f}"),
            Text(f"{row.low:.2f} … {row.high:.2f}"),
            Text(signed(row.over_trial0, 2) if row.over_trial0 else "–"),
            Text(f"{row.p_best:.0%}"),
            Text(clock(row.train_seconds)),
            Text("winner" if row.number == outcome.winner else "tied" if row.tied else ""),
        )
    return table


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
    if len(outcome.ties) > 1:
        alike = ", ".join(map(str, sorted(outcome.ties)))
        why = "the cheapest of them" if won.number != outcome.rows[0].number else "also the cheapest of them"
        if outcome.beats_trial0 and outcome.trial0 in outcome.ties:
            why += " that beats trial 0"
        lines.append(f"  trials {alike} are tied (no significant difference); trial {won.number} is {why}")
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
            f"training seed: the standard deviation of a score between training seeds is {outcome.train_sd:.4f} "
            f"({outcome.train_freedom} degrees of freedom); the intervals include it"
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


def _against_trial0(outcome: Confirmed) -> str:
    if outcome.beats_trial0 is None:
        return "trial 0 has no confirmed score, so it is unknown whether the search improved on the default settings"
    if not outcome.beats_trial0:
        return (
            "nothing beats trial 0 (the default settings): no 95 % interval of a difference to it is above 0"
        )
    over = outcome.won.over_trial0
    return f"over trial 0: {signed(over)}" if over else "trial 0 itself is the winner"


def status_lines(study: optuna.Study, folder: StudyFolder) -> list[str]:
    """The noise of the scores in this study, and the state of the confirmation."""
    from hpo.confirm.wanted import searched
    from hpo.study import components, standing
    from hpo.terminal import trial_lines

    if (name := searched(folder.name)) is not None:
        return [
            f"this study confirms {name}; for the result: hpo status {StudyFolder(folder.root.with_name(name)).words}"
        ]
    noise, best = components(study, folder), standing(study, 0).best
    lines = [noise.sentence(), noise.figures()] if noise else []
    if best:
        lines += [f"trial {best[0]}, extra metrics: {line}" for line in trial_lines(folder.trial(best[0]))]
    return [*lines, *confirmed_lines(folder)]
