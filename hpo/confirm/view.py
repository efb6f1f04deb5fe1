"""The words of ``hpo confirm``, and of ``hpo status`` about confirmation and noise.

Owns wording.  Every figure comes from an Outcome, from confirmed.json or from ``hpo.study.noise``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from hpo.study import StudyFolder
from hpo.terminal import clock, confirmed_lines, short
from trainer.text import clean_text

if TYPE_CHECKING:
    import optuna

    from evaluation.score import Difference
    from hpo.confirm.outcome import Confirmed


def outcome_table(outcome: Confirmed) -> Table:
    """One row a configuration, best first, within 80 columns.  ``cost``: minutes of training a run."""
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
    """What was found, in sentences."""
    won = outcome.won
    lines = [f"trial {n}: infeasible when confirmed: {why}" for n, why in outcome.troubles.items()]
    lines.append(
        f"confirmed: trial {won.number}, score {won.score:.4f} (95 % {won.low:.4f} … {won.high:.4f})"
    )
    lines += [f"  {clean_text(str(name))} = {short(value)}" for name, value in won.settings.items()]
    if len(outcome.ties) > 1:
        alike = ", ".join(map(str, sorted(outcome.ties)))
        why = "the cheapest of them" if won.number != outcome.rows[0].number else "also the cheapest of them"
        if outcome.beats_trial0 and outcome.trial0 in outcome.ties:
            why += " that beats trial 0"
        lines.append(f"  trials {alike} cannot be told apart; {won.number} is {why}")
    lines.append(_against_trial0(outcome))
    if outcome.shrinkage is not None:
        moved = "fell" if outcome.shrinkage >= 0 else "rose"
        text = "shrinkage: from search to confirmation the selected trials "
        text += f"{moved} by {abs(outcome.shrinkage):.4f} on average"
        if outcome.expected is not None:
            text += f"; from the search alone its best was expected at {outcome.expected:.4f}"
        lines.append(text)
    if outcome.train_freedom:
        lines.append(
            f"training seed: a score's standard deviation is {outcome.train_sd:.4f} "
            f"({outcome.train_freedom} degrees of freedom); the intervals include it"
        )
    else:
        lines.append("training seed: not repeated, so the intervals cover prompts and sampling seeds only")
    if kept:
        lines.append(f"written: {source.confirmed}; runs: {target.root}")
    else:
        lines.append(f"{source.confirmed} keeps what was confirmed with fresh training; runs: {target.root}")
    return [*lines, f"next: hpo dashboard {target.words}"]


def _against_trial0(outcome: Confirmed) -> str:
    if outcome.beats_trial0 is None:
        return "trial 0 has no confirmed score: whether the search was worth it is not known"
    if not outcome.beats_trial0:
        return "nothing beats trial 0, the usual settings: no interval of a difference lies above 0"
    over = outcome.won.over_trial0
    return f"over trial 0: {signed(over)}" if over else "trial 0 itself is the winner"


def status_lines(study: optuna.Study, folder: StudyFolder) -> list[str]:
    """What a score of this study can and cannot say: the noise, and what is confirmed."""
    from hpo.confirm.wanted import searched
    from hpo.study import components, standing
    from hpo.terminal import trial_lines

    if (name := searched(folder.name)) is not None:
        return [
            f"runs that confirm {name}; what they say: hpo status {StudyFolder(folder.root.with_name(name)).words}"
        ]
    noise, best = components(study, folder), standing(study, 0).best
    lines = [noise.sentence(), noise.figures()] if noise else []
    if best:
        lines += [f"trial {best[0]}, beside its score: {line}" for line in trial_lines(folder.trial(best[0]))]
    return [*lines, *confirmed_lines(folder)]
