"""``hpo transfer``: from the command-line arguments to a table, files and optional probes.

Owns the order of the steps and the output.  Does not own rules (see ``hpo.transfer.rules``), files (see
``hpo.transfer.files``) or probes (see ``hpo.transfer.probes.run``).  The memory planner runs last and can
change how a step is computed.
"""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpo.study import RUNS, StudyFolder, Work, recorded
from hpo.terminal import command, on_device, say, wrapped
from hpo.transfer import files as transferfile
from hpo.transfer.files import Places, derived_lines, kept_line, shown
from hpo.transfer.mapping import Transfer, make, planned, with_decision
from hpo.transfer.plan import SettingMove, TransferPlan
from hpo.transfer.profile import Profile, profiles_of, read_family, read_profile
from hpo.transfer.rules import MAPPING_VERSION
from hpo.transfer.source import find_source, read_source
from trainer.errors import ConfigError
from trainer.text import clean_text

WIDE = 130  # terminal width in columns from which the reason has a column of its own


@dataclass(frozen=True)
class TransferRequest:
    """The command-line arguments of ``hpo transfer``."""

    to: str
    name: str | None = None
    vram: float | None = None
    profile: str | None = None
    preset: str | None = None
    trials: int = 0
    design: str | None = None
    device: str | None = None
    runs: Path = RUNS
    anyway: bool = False


def run(request: TransferRequest, console: Console) -> None:
    """Map, print and write the settings; with probes, measure first.

    Raises ToolError.  Writes nothing if the result is refused.
    """
    if request.design and not request.trials:
        raise ConfigError("--design has no effect without trials on the target", "add --trials 6")
    profile = _profile(request)
    folder = find_source(request.name, request.runs, profile.family)
    with recorded(folder.root, f"transfer {request.to}", begun=False) as work:
        _transfer(folder, profile, request, console, work)


def _transfer(
    folder: StudyFolder, profile: Profile, request: TransferRequest, console: Console, work: Work
) -> None:
    source = read_source(folder, anyway=request.anyway)
    say(console, f"from {folder.name}, {source.says}")
    done = make(source, profile, request.preset, lambda text: say(console, text))
    show(console, done.plan)
    _check_refused(done.plan)
    from hpo.transfer.probes import consult

    work.begun = True
    places = Places(folder.root / "transfer", profile.family.name)
    more: list[str] = []
    if request.trials:
        # Written now, so that the settings are available during the probes and if they are interrupted.
        _write(done, places, request, ())
    found = consult(done, request, console)
    if found is not None:
        more = list(found.lines)
        for line in more:
            say(console, line)
        if found.values:
            before = len(done.plan.moves)
            plan = planned(with_decision(done, found.values, found.reason, found.evidence), profile)
            done = dataclasses.replace(done, plan=plan)
            show(console, plan, plan.moves[before:])
            _check_refused(plan)
    for line in _write(done, places, request, more):
        say(console, line)
    say(console, f"next: {command('hpo', 'train', places.settings, *on_device(request.device))}")


def _check_refused(plan: TransferPlan) -> None:
    if refused := plan.of_level("refuse"):
        raise ConfigError(
            "; ".join(finding.text for finding in refused),
            "use a different --profile or --vram, or search with other limits; see docs/transfer.md",
        )


def _profile(request: TransferRequest) -> Profile:
    family = read_family(request.to)
    profile = read_profile(request.profile or family.default_profile)
    if profile.family != family:
        known = ", ".join(profiles_of(family.name))
        raise ConfigError(
            f"profile {profile.name} is for {profile.family.name}, not for {family.name}",
            f"profiles for {family.name}: {known}",
        )
    return profile.with_vram(request.vram) if request.vram is not None else profile


# Terminal output


def show(console: Console, plan: TransferPlan, moves: tuple[SettingMove, ...] | None = None) -> None:
    """Print the moves (default: all) as a table, then kept settings, derived figures and remarks.

    Readable at 80 columns.
    """
    moves = plan.moves if moves is None else moves
    if console.width >= WIDE:
        console.print(_wide_table(moves))
    else:
        console.print(_narrow_table(moves, console.width))
    for line in wrapped(f"kept: {kept_line(plan)}", console.width - 1).splitlines():
        say(console, line)
    for line in derived_lines(plan.derived):
        say(console, line)
    for finding in plan.findings:
        say(console, f"{finding.level}: {finding.text}")


def _wide_table(moves: tuple[SettingMove, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for name in ("setting", "old", "new", "rule", "reason"):
        table.add_column(name, overflow="fold", no_wrap=name != "reason")
    for move in moves:
        table.add_row(*(Text(clean_text(cell)) for cell in _cells(move)))
    return table


def _narrow_table(moves: tuple[SettingMove, ...], width: int) -> Text:
    """Setting, old, new and rule in columns, with the reason below."""
    rows = [("setting", "old", "new", "rule", "")] + [_cells(move) for move in moves]
    widths = [max(len(row[n]) for row in rows) for n in range(3)]
    lines = []
    for row in rows:
        lines.append("  ".join(f"{row[n]:<{widths[n]}}" for n in range(3)) + f"  {row[3]}")
        lines += textwrap.wrap(row[4], width - 1, initial_indent="    ", subsequent_indent="    ")
    return Text("\n".join(lines))


def _cells(move: SettingMove) -> tuple[str, str, str, str, str]:
    reason = f"{move.reason} ({move.evidence})" if move.evidence else move.reason
    texts = (move.key, _end(shown(move.old)), _end(shown(move.new)), move.rule, reason)
    key, old, new, rule, reason = (clean_text(text) for text in texts)
    return key, old, new, rule, reason


def _end(text: str, most: int = 16) -> str:
    """The end of a long value, because the end of a path is its most useful part."""
    return text if len(text) <= most else "…" + text[-(most - 1) :]


# Writing


def _write(
    done: Transfer, places: Places, request: TransferRequest, more: tuple[str, ...] | list[str]
) -> list[str]:
    source = done.source
    head = (
        f"{done.profile.family.title}: settings of {source.folder.name}, {source.says}; "
        f"transfer rules, version {MAPPING_VERSION}",
    )
    return transferfile.write(
        transferfile.Contents(done.plan, done.profile, request.preset, head), places, more
    )
