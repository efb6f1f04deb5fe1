"""The errors a user can cause or meet, and nothing else.

Every error carries what happened and where (``message``), what to do about it (``hint``) and the exit code of
the process.  The command line prints both lines and no traceback; anything that is not a ``ToolError`` is a
bug and keeps its traceback.

    ToolError                     1
    ├── ConfigError               2   a setting, a study file, a command line
    ├── DataError                 3   images, captions, folders
    ├── ModelFileError            4   base models, LoRA files, scorers
    ├── MachineError              5   disk, locks, network, permissions, missing packages
    ├── SettingsFailure           6   what the settings cause: a search records it as an infeasible result
    │   ├── Diverged                  non-finite losses that do not go away
    │   ├── OutOfMemory               the card is too small for these settings
    │   └── InvalidImages             black, uniform or non-finite pictures
    ├── StudyStopped              7   the study ended itself: three equal failures in a row
    └── Interrupted             130   Ctrl-C or a signal: work is saved, the same command goes on
"""

from __future__ import annotations

from trainer.text import clean_text

MAX_LENGTH = 2000  # of a message: names and values out of files can be of any length


class ToolError(Exception):
    """Base of all errors shown to a user as one line of what and one line of what to do.

    Texts from files reach messages, so both lines are made safe to print and to log here, once.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = _line(message)
        self.hint = _line(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} – {self.hint}" if self.hint else self.message


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its kind if it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def _line(text: str) -> str:

    shown = clean_text(text[: MAX_LENGTH + 1])
    return shown if len(text) <= MAX_LENGTH else shown[:MAX_LENGTH] + " …"


class ConfigError(ToolError):
    """A setting, a study file or a command line that cannot mean anything."""

    exit_code = 2


class DataError(ToolError):
    """Images, captions or folders that cannot be trained on."""

    exit_code = 3


class ModelFileError(ToolError):
    """A base model, LoRA file or scorer that cannot be loaded, or is not what it should be."""

    exit_code = 4


class MachineError(ToolError):
    """Disk, lock, network, permission or package trouble: the machine's fault, not the settings'."""

    exit_code = 5


class SettingsFailure(ToolError):
    """What a set of settings caused.  A search reports it to the sampler; it never counts as a crash."""

    exit_code = 6
    reason = "settings"


class Diverged(SettingsFailure):
    """The loss or the gradient stayed non-finite."""

    reason = "diverged"


class OutOfMemory(SettingsFailure):
    """The device ran out of memory with these settings."""

    reason = "out_of_memory"


class InvalidImages(SettingsFailure):
    """The trained adapter draws black, uniform or non-finite images."""

    reason = "invalid_images"


class StudyStopped(ToolError):
    """The study stopped itself, because going on would repeat the same failure."""

    exit_code = 7


class Interrupted(ToolError):
    """The user or the system asked to stop; everything up to here is saved."""

    exit_code = 130
