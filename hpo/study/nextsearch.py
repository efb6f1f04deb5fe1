"""The command of a study's last search, rewritten for a new study with changes.

Owns which recorded options go along, and how their paths are written from another folder.  Does not own the record
(``hpo.study.work``) or the changes (``hpo.study.changes``).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from hpo.study.folder import StudyFolder
from hpo.study.work import steps
from trainer.bases import KNOWN_BASES

# Options of hpo search: those without a value; those that take a path; those whose value may be a name or a path;
# those that do not fit the next search (--enqueue: a file with settings outside of the moved ranges); old names.
FLAGS = ("--stop-when-converged",)
PATHS, NAMES_OR_PATHS = ("--data", "--prompts", "--references"), ("--base", "--definition", "--clip")
LEFT_OUT = ("--enqueue", "--runs", "--name", "--fork-from")
FORK_FROM, TRIALS = "--fork-from", "--trials"
RENAMED = {"--study": "--definition"}


def next_search(
    folder: StudyFolder, changes: Sequence[str], *, fork: bool = False, trials: int | None = None
) -> str:
    """The study's last search, as a new study with the changes.  Empty if it was not recorded or there are none.

    ``fork``: the new study takes over the finished trials.  ``trials``: its ``--trials``; None: as before."""
    searches = [step for step in steps(folder.root) if step.words[:1] == ("search",)]
    if not changes or not searches:
        return ""
    names = (folder.root.with_name(f"{folder.name}-{n}") for n in range(2, 1000))
    new = StudyFolder(next(root for root in names if not root.exists()))
    words = [
        word
        for option in _options(searches[-1].words[1:])
        if not _is_changed(option, changes) and not (trials is not None and option[0] == TRIALS)
        for word in _moved_to_here(option, searches[-1].cwd)
    ]
    sets = [word for change in changes for word in ("--set", change)]
    more = [TRIALS, str(trials)] if trials is not None else []
    more += [FORK_FROM, folder.name] if fork else []
    return f"hpo search {new.words} {shlex.join([*words, *more, *sets])}"


def _is_changed(option: tuple[str, ...], changes: Sequence[str]) -> bool:
    """Whether the option is a ``--set`` of a value that a change sets anew."""
    names = {change.partition("=")[0].strip() for change in changes}
    return option[0] == "--set" and option[1].partition("=")[0].strip() in names


def _options(words: Sequence[str]) -> list[tuple[str, ...]]:
    """The options of a recorded search, with their values, that the next one takes.  NAME is left out, too."""
    found: list[tuple[str, ...]] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        name = RENAMED.get(name, name)
        if not word.startswith("--"):
            continue
        option = (name,) if name in FLAGS else (name, value if equals else next(rest, ""))
        if name not in LEFT_OUT:
            found.append(option)
    return found


def _moved_to_here(option: tuple[str, ...], cwd: str) -> tuple[str, ...]:
    """The option of a search that was started in ``cwd``, for the current folder: paths are made absolute."""
    there = Path(cwd)
    if not cwd or there == Path.cwd() or option[0] not in PATHS + NAMES_OR_PATHS:
        return option
    name, value = option
    if name in PATHS:
        return name, str(there / value)
    if name == "--base" and value in KNOWN_BASES:
        return option
    before, colon, path = value.rpartition(":") if name == "--clip" else ("", "", value)
    tries = (path, *((f"{path}.toml", f"studies/{path}.toml") if name == "--definition" else ()))
    found = next((there / one for one in tries if (there / one).exists()), None)
    return option if found is None else (name, f"{before}{colon}{found}")
