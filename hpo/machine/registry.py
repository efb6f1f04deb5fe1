"""Which processes of this user work on this machine: one lock per GPU, and one per living process.

The locks are kernel locks (``hpo.study.locks``): they end with their process, so nothing is left behind by a kill.
They are in one folder per user and machine.  It does not depend on how a process was started (terminal, cron,
systemd), so that all of them find each other.  Where the usual folder cannot be used, there is simply no agreement with
other processes: no command fails because of it, and ``hpo doctor`` says so. One that was set by hand must be usable:
without it two searches would share a GPU.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from hpo.study import Lock, holder
from trainer.errors import MachineError
from trainer.text import clean_text

FOLDER = "HPO_LOCKS"  # environment variable: another folder, for example one that several containers share
NOTIFY = "--notify"  # an option of every long command
_OWN: dict[str, Lock] = {}  # locks of this process: asking for the holder of an own lock would release it


def folder() -> Path | None:
    """The folder with the locks of this user; None if the usual one cannot be used or belongs to somebody else.
    Raises MachineError if one that was set by hand cannot be used."""
    place, trouble = _made()
    if not trouble:
        return place
    if os.environ.get(FOLDER):
        raise MachineError(
            f"the folder for locks cannot be used: {trouble}",
            f"set {FOLDER} to a folder that can be written, or unset it: without locks, processes would share a GPU",
        )
    return None


def folder_trouble(environment: Mapping[str, str] = os.environ) -> str:
    """Why there are no locks between the processes of this user, in words; "" if there are."""
    return _made(environment)[1]


def _made(environment: Mapping[str, str] = os.environ) -> tuple[Path, str]:
    """The folder for locks, made if it was not there, and why it cannot be used."""
    named = environment.get(FOLDER)
    place = Path(named) if named else Path("/tmp") / f"lora-hpo-{os.getuid()}"
    shown = f"{FOLDER}={clean_text(named)}" if named else str(place)
    try:
        place.mkdir(mode=0o700, parents=bool(named), exist_ok=True)
        found = place.stat() if named else place.lstat()
    except OSError as error:
        return place, f"{shown}: {error.strerror or error}"
    if not stat.S_ISDIR(found.st_mode):
        return place, f"{shown} is not a folder"
    if not named and found.st_uid != os.getuid():
        return place, f"{shown} belongs to another user"
    if not os.access(place, os.W_OK | os.X_OK):
        return place, f"{shown} cannot be written"
    return place, ""


def take_gpu(uuid: str) -> bool:
    """Take the lock of a GPU.  True if it is this process's now, or if there is no agreement with others."""
    return not uuid or _take(_gpu(uuid))


def has_gpu(uuid: str) -> bool:
    """Whether this process has taken the GPU before."""
    return _gpu(uuid) in _OWN


def leave_gpu(uuid: str) -> None:
    """Release the lock of a GPU."""
    if lock := _OWN.pop(_gpu(uuid), None):
        lock.release()


def user_of_gpu(uuid: str) -> str:
    """The process that has a GPU, in words; "" if no other process has it."""
    place, name = folder(), _gpu(uuid)
    if place is None or name in _OWN:
        return ""
    pid = holder(place / name)
    return process_words(pid) if pid is not None else ""


def process_words(pid: int) -> str:
    """A process for messages: its number, and its command if it is ours."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        at = next((n for n, word in enumerate(words) if word.endswith(("/hpo", "hpo.cli"))), None)
        if at is not None:
            said = " ".join(_without_secrets(words[at + 1 :]))
            return f"process {pid} (hpo {clean_text(said).strip()[:60]})"
    return f"process {pid}" if pid else "a process in another container"


def _without_secrets(words: list[str]) -> list[str]:
    """A command line without what precedes the last @ of an address, and without the URLs of --notify: other
    parts of them can be secret, too."""
    shown = [re.sub(r"://.*@", "://***@", word, flags=re.DOTALL) for word in words]
    for number, word in enumerate(words):
        if word.startswith(f"{NOTIFY}="):
            shown[number] = f"{NOTIFY}=***"
        elif number and words[number - 1] == NOTIFY:
            shown[number] = "***"
    return shown


def enter() -> int:
    """Register this process as working, once.  Returns how many work now, this one included."""
    place = folder()
    if place is None:
        return 1
    own = next((name for name in _OWN if name.startswith("worker-")), "")
    if not own:
        own = f"worker-{os.getpid()}-{os.urandom(4).hex()}.lock"  # numbers repeat in other containers
        if not _take(own):
            return 1
    with contextlib.suppress(OSError):
        os.utime(place / own)  # programs that clean /tmp remove what is old
    living = 1
    for path in place.glob("worker-*.lock"):
        if path.name in _OWN:
            continue
        if holder(path) is not None:
            living += 1
        else:
            with contextlib.suppress(OSError):
                path.unlink()  # its process has ended
    return living


def _take(name: str) -> bool:
    place = folder()
    if place is None or name in _OWN:
        return True
    lock = Lock(place / name)
    try:
        if not lock.try_acquire():
            return False
    except MachineError:  # a full disk, a file system without locks
        return True
    _OWN[name] = lock
    return True


def _gpu(uuid: str) -> str:
    return f"gpu-{''.join(letter for letter in uuid if letter.isalnum() or letter == '-')[:80]}.lock"


def _forget() -> None:
    """In a child made by fork: the locks are its parent's.  Its descriptors stay open; closing them would not matter
    to the parent."""
    _OWN.clear()


os.register_at_fork(after_in_child=_forget)
