"""prompts.toml and confirmation.toml of a study folder: written once and never silently replaced.

Owns the rules for keeping existing files, and the check that prompts.toml contains the prompts that the
trials used. Does not own the file format; see ``evaluation.prompts.prompts``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from evaluation.prompts import CountTokens, PromptSet, load_prompts, save_prompts
from hpo.study.folder import StudyFolder, another_name
from trainer.errors import ConfigError


def read(path: Path, count_tokens: CountTokens = lambda text: 0) -> PromptSet:
    """Read one of these files; they contain trigger and class word.  Without ``count_tokens``,
    any length is valid."""
    return load_prompts(path, trigger=None, class_word=None, count_tokens=count_tokens)


def check_unedited(folder: StudyFolder, known: str) -> None:
    """Raise ConfigError if prompts.toml exists and its hash does not start with ``known``, the study's hash."""
    if not folder.prompts.is_file():
        return
    found = read(folder.prompts)
    if not found.hash.startswith(known):
        raise ConfigError(
            f"{folder.prompts} was edited: the study uses prompts {known[:16]}, the file contains {found.hash[:16]}",
            "undo the change, or delete the file (it is written again); to use other prompts, start a new study "
            + another_name("--prompts FILE"),
        )


def write(
    folder: StudyFolder,
    prompts: PromptSet,
    confirmation: PromptSet | None,
    count_tokens: CountTokens,
    say: Callable[[str], None],
) -> None:
    """Write the files that do not exist yet.  Users may edit confirmation.toml until ``hpo confirm`` has started."""
    if not folder.prompts.is_file():
        save_prompts(prompts, folder.prompts)
    if confirmation is None:
        return
    if not folder.confirmation.is_file():
        save_prompts(confirmation, folder.confirmation)
        return
    found = read(folder.confirmation, count_tokens)
    if found.hash != confirmation.hash:
        say(
            f"{folder.confirmation} differs from the prompts that would be generated now; it is kept, and "
            "hpo confirm uses it"
        )
