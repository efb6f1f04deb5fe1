"""The errors that are shown to users.

Every error has a ``message`` (what happened and where), a ``hint`` (what to do) and the exit code of the process.
The same mistake has the same code in every command: a name or a path that does not exist is 2, whatever it should have
been. The command line prints both lines without a traceback. Any other exception is a bug and keeps its traceback.

    ToolError                     1
    ├── ConfigError               2   a setting, a study file, a command line
    ├── DataError                 3   images, captions, folders that are there and cannot be used
    │   └── MissingData           2   named, but not there
    ├── ModelFileError            4   base models, LoRA files, scorers that are there and cannot be used
    │   └── MissingModel          2   named, but not there
    ├── MachineError              5   disk, locks, network, permissions, missing packages
    │   ├── DeviceLost                the GPU no longer answers this process
    │   ├── HostMemory                this process has used up the memory of the machine
    │   └── NoDevice                  the GPU that a worker was given is in use or cannot be used
    ├── SettingsFailure           6   caused by the settings: a search records an infeasible trial
    │   ├── Diverged                  persistent non-finite losses
    │   ├── OutOfMemory               not enough memory for these settings
    │   └── InvalidImages             black, uniform or non-finite images
    ├── StudyStopped              7   the study stopped after three equal failures in a row
    └── Interrupted             130   Ctrl-C: work is saved, the same command resumes; 75 after SIGTERM or SIGUSR1
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.text import clean_text

RESUME = "hpo resume, or the same command again"  # how to go on, for hints
MAX_LENGTH = 2000  # of a message: names and values from files can have any length


def install_with(extra: str) -> str:
    """How to install an optional part of this tool, for hints.  It is installed from its own folder, as the README does
    it: it is in no package index."""
    return f"in the folder of this tool, run: .venv/bin/pip install -c constraints.txt '.[{extra}]'"


class ToolError(Exception):
    """Base class of all errors that are shown to a user: what is wrong and what to do, a line each.

    ``commands`` are what the user can choose from, each printed on a line of its own, so that it can be copied.
    Messages can contain text from files, so all lines are made safe to print and log here.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "", commands: Sequence[str] = ()) -> None:
        self.message = _line(message)
        self.hint = _line(hint)
        self.commands = tuple(_line(command) for command in commands)
        super().__init__(self.message)

    def __str__(self) -> str:
        hint = " ".join((self.hint, "; ".join(self.commands))).strip()
        return f"{self.message} – {hint}" if hint else self.message


def first_line(error: BaseException) -> str:
    """The first line of another library's error message; its type if it has no message."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def _line(text: str) -> str:

    shown = clean_text(text[: MAX_LENGTH + 1])
    return shown if len(text) <= MAX_LENGTH else shown[:MAX_LENGTH] + " …"


class ConfigError(ToolError):
    """An invalid setting, study file or command line."""

    exit_code = 2


class DataError(ToolError):
    """Images, captions or folders that cannot be trained on."""

    exit_code = 3


class ModelFileError(ToolError):
    """A base model, LoRA file or scorer that cannot be loaded or does not fit."""

    exit_code = 4


class MissingData(DataError):
    """A folder or file of images that was named and does not exist."""

    exit_code = 2


class MissingModel(ModelFileError):
    """A base, LoRA or scorer that was named and does not exist."""

    exit_code = 2


class MachineError(ToolError):
    """A problem of the machine, not of the settings: disk, lock, network, permission or package."""

    exit_code = 5


class DeviceLost(MachineError):
    """The process cannot use its GPU any more, since a kernel failed. It has to end: the same command goes on."""


class HostMemory(MachineError):
    """This process has used up the memory of the machine. It has to end: a fresh one goes on."""


class NoDevice(MachineError):
    """The device that a worker was given is in use, or cannot be used. Another worker's device may be fine."""


class SettingsFailure(ToolError):
    """A failure caused by the settings. A search reports it to the sampler; it does not count as a crash."""

    exit_code = 6
    reason = "settings"


class Diverged(SettingsFailure):
    """The loss or the gradient stayed non-finite."""

    reason = "diverged"


class OutOfMemory(SettingsFailure):
    """The device ran out of memory with these settings. ``in_ram``: it was the memory of the machine, not of a GPU."""

    reason = "out_of_memory"
    in_ram = False


class InvalidImages(SettingsFailure):
    """The trained adapter produces black, uniform or non-finite images."""

    reason = "invalid_images"


class StudyStopped(ToolError):
    """The study stopped, because continuing would repeat the same failure."""

    exit_code = 7


class Interrupted(ToolError):
    """The user or the system requested a stop; all work so far is saved.

    ``TERMINATED`` is the exit code if it was the system: EX_TEMPFAIL of sysexits.h, "try again later"."""

    exit_code = 130
    TERMINATED = 75
