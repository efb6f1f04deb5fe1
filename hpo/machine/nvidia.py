"""NVIDIA cards as the system shows them, without CUDA: device files and nvidia-smi.

Nothing here loads a driver into this process.  A driver that is half broken can hang or abort whoever calls it, so
it is asked through nvidia-smi, a process of its own with a time limit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.text import clean_text

SECONDS = 20.0  # for one answer: without persistence mode a driver with eight cards takes several seconds to wake up
WSL_SMI = "/usr/lib/wsl/lib/nvidia-smi"  # not on PATH in every distribution
# Files that exist if a card is passed to this system.  nvidiactl alone is enough; nvidia0 may need a first use.
TRACES = ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/nvidia0")
WSL_TRACES = (
    "dev/dxg",
    "usr/lib/wsl/lib/libcuda.so.1",
)  # both: dxg is there for the cards of other makers too
_FIELDS = ("index", "uuid", "name", "driver_version", "memory.total", "memory.used", "compute_cap")
MIB = 1 << 20


@dataclass(frozen=True)
class Card:
    """One line of nvidia-smi.  ``index`` is the driver's, which is not PyTorch's if CUDA_VISIBLE_DEVICES is set.

    ``capability``: (8, 9) for 8.9; None if this nvidia-smi does not know it.  Sizes in bytes; None: not told.
    """

    index: int
    uuid: str
    name: str
    driver: str
    total_bytes: int | None
    used_bytes: int | None
    capability: tuple[int, int] | None


@dataclass(frozen=True)
class User:
    """A process that uses a card.  ``used_bytes``: None under WSL, which does not tell."""

    uuid: str
    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True)
class Answer:
    """What nvidia-smi said: cards, and the reason why there are none."""

    cards: tuple[Card, ...] = ()
    reason: str = ""  # "" if it answered, and also if there is no nvidia-smi
    is_there: bool = False
    timed_out: bool = False


def is_wsl(root: Path = Path("/")) -> bool:
    """Whether this is Linux under Windows."""
    with contextlib.suppress(OSError):
        return "microsoft" in (root / "proc/version").read_text(errors="replace").lower()
    return False


def in_container(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a container, as far as it can be seen from inside."""
    marks = ("/.dockerenv", "/run/.containerenv")
    if any((root / mark.lstrip("/")).exists() for mark in marks) or "KUBERNETES_SERVICE_HOST" in environment:
        return True
    return environment.get("container", "wsl") != "wsl"  # systemd calls WSL a container


def traces(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Files that show that an NVIDIA card or its driver is there, as absolute paths.

    In a container only device files count: /proc shows the host's driver in containers that got no card too.
    """
    if in_container(root, environment):
        devices = [*sorted((root / "dev").glob("nvidia[0-9]*")), root / "dev/dxg"]
        return tuple(f"/dev/{device.name}" for device in devices if device.exists())
    if is_wsl(root):
        return (
            tuple(f"/{name}" for name in WSL_TRACES) if all((root / n).exists() for n in WSL_TRACES) else ()
        )
    return tuple(f"/{name}" for name in TRACES if (root / name).exists())


def smi() -> str | None:
    """The path of nvidia-smi."""
    found = shutil.which("nvidia-smi")
    return found or (WSL_SMI if os.access(WSL_SMI, os.X_OK) else None)


def ask(seconds: float = SECONDS) -> Answer:
    """The cards of this system.  Never raises."""
    path = smi()
    if path is None:
        return Answer()
    for fields in (_FIELDS, _FIELDS[:-1]):  # drivers before 510 do not know compute_cap
        code, output = run(
            [path, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"], seconds
        )
        if code is None:
            return Answer(reason=output.splitlines()[-1], is_there=True, timed_out=True)
        cards = tuple(card for line in output.splitlines() if (card := _card(line)) is not None)
        if code == 0 and cards:
            return Answer(cards, is_there=True)
        if "not a valid field" not in output:
            break
    said = next((line for line in output.splitlines() if line.strip()), "it lists no card")
    return Answer(reason=clean_text(said.strip())[:200], is_there=True)


def users(seconds: float = SECONDS) -> tuple[User, ...]:
    """The processes that compute on the cards.  Never raises; empty if that cannot be told."""
    path = smi()
    if path is None:
        return ()
    query = "--query-compute-apps=gpu_uuid,pid,process_name,used_memory"
    code, output = run([path, query, "--format=csv,noheader,nounits"], seconds)
    found = []
    for line in output.splitlines() if code == 0 else ():
        uuid, pid, name, used = (*map(str.strip, line.split(",", 3)), "", "", "", "")[:4]
        if pid.isdecimal():
            found.append(User(uuid, int(pid), clean_text(name)[:80], _mebibytes(used)))
    return tuple(found)


def run(words: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit code and output (both streams) of a command.  Without an end in time the code is None, and the last line
    says so."""
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return 127, f"{words[0]} cannot be started: {error}"
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output = ""
        # A process that waits for a driver inside the kernel cannot be killed, so it is not waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            output, _ = process.communicate(timeout=1)
        return None, f"{output}\nno answer within {seconds:.0f} s"
    return process.returncode, output


def _card(line: str) -> Card | None:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) < len(_FIELDS) - 1 or not parts[0].isdecimal():
        return None
    index, uuid, name, driver, total, used, *more = parts
    major, _, minor = more[0].partition(".") if more else ("", "", "")
    capability = (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
    return Card(
        int(index),
        clean_text(uuid)[:80],
        clean_text(name)[:80],
        clean_text(driver)[:40],
        _mebibytes(total),
        _mebibytes(used),
        capability,
    )


def _mebibytes(text: str) -> int | None:
    """Bytes.  ``[N/A]`` and ``[Not Supported]`` are None."""
    return int(text) * MIB if text.isdecimal() else None
