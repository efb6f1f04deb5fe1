"""prompts.toml and confirmation.toml of a study folder: written once, kept, and never silently replaced.

Owns when one may stay, and that a study does not go on beside a prompts.toml that says what no trial drew.
Does not own their form (``evaluation.prompts.prompts``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from evaluation.prompts import CountTokens, PromptSet, load_prompts, save_prompts
from hpo.study.folder import StudyFolder
from trainer.errors import ConfigError


def read(path: Path, count_tokens: CountTokens = lambda text: 0) -> PromptSet:
    """One of these files: its trigger and class word stand in it.  Without ``count_tokens`` no text is too long."""
    return load_prompts(path, trigger=None, class_word=None, count_tokens=count_tokens)


def check_unedited(folder: StudyFolder, known: str) -> None:
    """Raise ConfigError unless prompts.toml has the study's hash, ``known`` (or how it begins), or is not there."""
    if not folder.prompts.is_file():
        return
    found = read(folder.prompts)
    if not found.hash.startswith(known):
        raise ConfigError(
            f"{folder.prompts} was edited: the study's prompts are {known[:16]}, the file's {found.hash[:16]}",
            "undo the change, or delete the file (it is written anew); a new study takes other prompts: "
            "--prompts FILE --name OTHER",
        )


def write(
    folder: StudyFolder,
    prompts: PromptSet,
    confirmation: PromptSet | None,
    count_tokens: CountTokens,
    say: Callable[[str], None],
) -> None:
    """What is not there yet.  A confirmation.toml is the user's to edit until ``hpo confirm`` has begun."""
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
            f"{folder.confirmation} holds other prompts than would be written today: it is kept, and hpo confirm "
            "draws it"
        )
