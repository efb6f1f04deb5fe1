"""``hpo doctor``: what this machine has, what of it works, and what to do about the rest.

Owns the checks and their words.  Each check is guarded, and what can hang or abort a process (the driver, PyTorch,
bitsandbytes) is asked in a process of its own with a time limit.  Changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hpo.machine import nvidia, registry, wheel
from hpo.machine.device import VISIBLE, hides_all
from hpo.machine.threads import LIMITS, allowed_cores
from trainer.text import clean_text

OK, NOTE, PROBLEM = "ok", "note", "problem"
MARKS = {OK: "ok", NOTE: "–", PROBLEM: "!!"}
PROBE_SECONDS = 120.0  # importing torch from a cold disk takes up to a minute
GB = 1e9
# Assumed, to say it early; hpo search counts what a study needs before its first trial.
LEAST_FREE_DISK = 10 * GB
LEAST_HUB_DISK = 15 * GB  # SDXL in half precision is 7 GB; SD1.5 and the scorers come to it
LEAST_RAM = 12 * GB  # SDXL in half precision is loaded through RAM, beside the system
# hpo plan: SDXL at 1024 px, rank 32, batch 1, U-Net only, checkpointing, AdamW8bit, fp8_base (without fp8_base: 7.4)
LEAST_GPU = 4.9 * GB
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "open-clip-torch", "optuna", "safetensors")
DAY = 86_400.0
WRONG_YEAR = 1_735_689_600.0  # 2025-01-01: a clock before that is wrong, and no server's certificate is valid


@dataclass(frozen=True)
class Finding:
    """One line of the report.  ``todo`` is empty where nothing is to be done."""

    name: str
    found: str
    state: str = OK
    todo: str = ""


@dataclass(frozen=True)
class Report:
    """All findings.  ``usable``: whether commands work here, on ``device``."""

    findings: tuple[Finding, ...]
    device: str

    @property
    def usable(self) -> bool:
        return not any(finding.state == PROBLEM for finding in self.findings)


@dataclass(frozen=True)
class Evidence:
    """What was asked of the system, for the checks to judge."""

    runs: Path = Path("runs")
    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    smi: nvidia.Answer = field(default_factory=nvidia.Answer)
    users: tuple[nvidia.User, ...] = ()
    probe: Mapping[str, Any] = field(default_factory=dict)
    cards: tuple[Mapping[str, Any], ...] = ()  # as PyTorch sees them
    probe_failed: str = ""
    clock: str = ""  # what timedatectl says: yes, no, or nothing

    @property
    def traces(self) -> tuple[str, ...]:
        return nvidia.traces(self.root, self.environment)

    @property
    def has_card(self) -> bool:
        """Whether there is an NVIDIA card, usable or not."""
        return bool(self.traces or self.smi.cards or self.cards)


def examine(runs: Path = Path("runs")) -> Report:
    """Examine this machine.  Takes a few seconds, at most two minutes where a driver hangs.  Never raises."""
    with ThreadPoolExecutor(4) as pool:
        smi, users = pool.submit(nvidia.ask), pool.submit(nvidia.users)
        probe, clock = pool.submit(_probe), pool.submit(_clock_says)
        told, cards, failed = probe.result()
        evidence = Evidence(
            runs=runs,
            smi=smi.result(),
            users=users.result(),
            probe=told,
            cards=cards,
            probe_failed=failed,
            clock=clock.result(),
        )
    return judge(evidence)


def judge(evidence: Evidence) -> Report:
    """The findings for what was asked."""
    found: list[Finding] = []
    for check in CHECKS:
        try:
            found += check(evidence)
        except Exception as error:  # a check that fails is a finding, not the end of the report
            name = check.__name__.strip("_")
            found.append(Finding(name, f"this could not be checked: {type(error).__name__}: {error}", NOTE))
    device = _device(evidence)
    found.append(_verdict(evidence, device, any(finding.state == PROBLEM for finding in found)))
    cleaned = [Finding(clean_text(f.name), clean_text(f.found), f.state, clean_text(f.todo)) for f in found]
    return Report(tuple(cleaned), device)


def lines(report: Report, width: int = 80) -> Iterator[tuple[str, str]]:
    """The report as lines of text, each with the state of its finding."""
    indent = " " * 17
    for finding in report.findings:
        head = f"{MARKS[finding.state]:<3}{finding.name:<14}"
        for text, first, later in (
            (finding.found, head, indent),
            (finding.todo, f"{indent}→ ", f"{indent}  "),
        ):
            for line in textwrap.wrap(
                text, width - 1, initial_indent=first, subsequent_indent=later, break_on_hyphens=False
            ):
                yield line, finding.state


def as_json(report: Report) -> dict[str, Any]:
    return {
        "usable": report.usable,
        "device": report.device,
        "findings": [vars(finding) for finding in report.findings],
    }


# What is asked


def _probe() -> tuple[dict[str, Any], tuple[dict[str, Any], ...], str]:
    """What ``hpo.machine.probe`` told: parts by name, cards, and why it ended early."""
    from hpo.machine import probe

    words = [sys.executable, "-P", "-W", "ignore", str(probe.__file__)]
    code, output = nvidia.run(words, PROBE_SECONDS)
    return _read_probe(code, output)


def _read_probe(code: int | None, output: str) -> tuple[dict[str, Any], tuple[dict[str, Any], ...], str]:
    parts: dict[str, Any] = {}
    cards, other = [], ""
    for line in output.splitlines():
        try:
            row = json.loads(line)
            part = row.pop("part")
        except (ValueError, AttributeError, KeyError, TypeError):
            other = line.strip() or other
            continue
        if part == "card":
            cards.append(row)
        else:
            parts[part] = row
    failed = ""
    if code is None:
        failed = other
    elif code:
        told = parts.get("failed", {}).get("reason")
        failed = told or (f"ended by signal {-code}" if code < 0 else other or f"ended with code {code}")
    return parts, tuple(cards), _short(failed, 300)


def _clock_says() -> str:
    path = shutil.which("timedatectl")
    if path is None:
        return ""
    code, output = nvidia.run([path, "show", "-p", "NTPSynchronized", "--value"], 3)
    return output.strip() if code == 0 else ""


# The checks


def _system(e: Evidence) -> list[Finding]:
    kind = (
        "WSL" if nvidia.is_wsl(e.root) else "container" if nvidia.in_container(e.root, e.environment) else ""
    )
    found = f"Linux {platform.release()}{f', {kind}' if kind else ''}, {platform.machine()}"
    return [Finding("system", found)]


def _cpu(e: Evidence) -> list[Finding]:
    cores = allowed_cores(e.root)
    set_to = {name: e.environment[name] for name in LIMITS if e.environment.get(name)}
    limits = [f"{name}={value}" for name, value in set_to.items()]
    # OpenMP takes a list of numbers too, one for each level
    invalid = [name for name, value in set_to.items() if not re.fullmatch(r"\s*[1-9]\d*(\s*,.*)?", value)]
    if invalid:
        names = " and ".join(invalid)
        found = f"{cores} cores; {', '.join(limits)}: {names} is invalid, a number of threads is expected"
        return [Finding("CPU", found, NOTE, f"unset {names}, or set it to a number from 1")]
    if limits:
        return [
            Finding(
                "CPU",
                f"{cores} cores; {', '.join(limits)} is set",
                NOTE,
                "with it, hpo does not share the threads among its processes; unset it unless you need it",
            )
        ]
    return [Finding("CPU", f"{cores} cores")]


def _ram(e: Evidence) -> list[Finding]:
    rows = {}
    for line in (e.root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        rows[name] = int(value.split()[0]) * 1024
    total, free = rows["MemTotal"], rows.get("MemAvailable", rows.get("MemFree", 0))
    found = f"{total / GB:.1f} GB, {free / GB:.1f} GB of it available"
    if total < LEAST_RAM:
        todo = "enough for SD1.5; to load SDXL close other programs, or add swap"
        if nvidia.is_wsl(e.root):
            todo += "; WSL gets half of Windows's memory: raise memory= in %UserProfile%\\.wslconfig"
        return [Finding("RAM", found, NOTE, todo)]
    return [Finding("RAM", found)]


def _python(e: Evidence) -> list[Finding]:
    found, missing = [], []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    here = f"Python {platform.python_version()}; {', '.join(found)}"
    if missing:
        todo = "install this tool again: pip install -c constraints.txt ."
        return [Finding("software", f"{here}; missing: {', '.join(missing)}", PROBLEM, todo)]
    return [Finding("software", here)]


def _pytorch(e: Evidence) -> list[Finding]:
    about = e.probe.get("wheel")
    if about is None:
        todo = "install it again: pip install --force-reinstall torch"
        return [Finding("PyTorch", f"it cannot be imported: {e.probe_failed or 'no answer'}", PROBLEM, todo)]
    kind = (
        f"for CUDA {about['cuda']}"
        if about["cuda"]
        else f"for ROCm {about['hip']}"
        if about["hip"]
        else "for the CPU only"
    )
    built = e.probe.get("kernels", {}).get("built") or []
    kernels = f", kernels for {wheel.span(built)}" if built else ""
    found = f"{about['version']}, {kind}{kernels}"
    if not about["cuda"] and not about["hip"] and e.has_card:
        trouble = wheel.explain("not compiled with CUDA", None)
        return [Finding("PyTorch", found, PROBLEM, trouble.todo)]
    return [Finding("PyTorch", found)]


def _driver(e: Evidence) -> list[Finding]:
    cuda = (e.probe.get("wheel") or {}).get("cuda")
    if e.smi.cards:
        return [Finding("driver", f"NVIDIA {e.smi.cards[0].driver}")]
    if e.smi.is_there and not e.has_card:
        where = "this container" if nvidia.in_container(e.root, e.environment) else "this system"
        found = f"nvidia-smi is installed, but {where} has no NVIDIA device: {e.smi.reason}"
        return [Finding("driver", found, NOTE, "in a container: start it with --gpus all")]
    if e.smi.is_there:
        trouble = wheel.explain(e.smi.reason, cuda)
        found = f"nvidia-smi fails: {e.smi.reason}; {trouble.what}"
        return [Finding("driver", found, NOTE if e.cards else PROBLEM, trouble.todo)]
    if e.traces:
        found = f"{e.traces[0]} is there, but not nvidia-smi"
        todo = "install the driver's tools (nvidia-utils); in a container: start it with --gpus all"
        return [Finding("driver", found, NOTE, todo)]
    return []


def _cuda(e: Evidence) -> list[Finding]:
    """Whether CUDA starts."""
    about, said = e.probe.get("wheel"), e.probe.get("cuda")
    if about is None or not (about["cuda"] or about["hip"]):
        return []
    if said is None:
        trouble = wheel.explain(e.probe_failed, about["cuda"])
        found = f"CUDA does not start: PyTorch's process {e.probe_failed or 'ended'}"
        return [Finding("CUDA", found, PROBLEM, trouble.todo)]
    if said["available"]:
        return [Finding("CUDA", "it starts")]
    if not e.has_card:
        return []
    if hides_all(e.environment):
        todo = f"unset {VISIBLE} to use the GPU"
        return [Finding("CUDA", f"{VISIBLE}={e.environment[VISIBLE]!r} hides all GPUs", NOTE, todo)]
    trouble = wheel.explain(_first(said["reason"]), about["cuda"])
    return [Finding("CUDA", f"{trouble.what} ({_short(_first(said['reason']), 160)})", PROBLEM, trouble.todo)]


def _gpus(e: Evidence) -> list[Finding]:
    """Every card: what it is, whether it works, what it lacks, and who uses it."""
    found = []
    built = e.probe.get("kernels", {}).get("built") or []
    flash = bool(e.probe.get("kernels", {}).get("flash"))
    is_nvidia = bool((e.probe.get("wheel") or {}).get("cuda"))
    for card in e.cards:
        name, capability = f"cuda:{card['index']}", (card["capability"][0], card["capability"][1])
        size = f"{card['total_bytes'] / GB:.1f} GB"
        what = f"{card['name']}, {size}" + (
            f", compute capability {wheel.shown(capability)}" if is_nvidia else ""
        )
        if is_nvidia and built and not wheel.has_kernels(built, capability):
            trouble = wheel.no_kernels(str(card["name"]), capability, built)
            state, instead = PROBLEM, ""
            if (used := _device(e)) != "cpu":
                state, instead = NOTE, f"hpo uses {used} instead; for this card: "
            found.append(Finding(name, trouble.what, state, instead + trouble.todo))
            continue
        if not card["works"]:
            trouble = wheel.explain(_first(str(card["reason"])), e.probe["wheel"]["cuda"])
            found.append(
                Finding(
                    name,
                    f"{what}: {trouble.what} ({_short(_first(str(card['reason'])), 120)})",
                    PROBLEM,
                    trouble.todo,
                )
            )
            continue
        found.append(Finding(name, what))
        if is_nvidia:
            found.append(_abilities(name, capability, flash))
        found += _memory(name, card, e.users)
    if not e.cards:
        found += [
            Finding("GPU", f"{card.name}, seen by the driver, not by PyTorch", NOTE, _unseen(e))
            for card in e.smi.cards
        ]
    return found


def _unseen(e: Evidence) -> str:
    """What to do where the driver has a card and PyTorch sees none."""
    if hides_all(e.environment):
        return f"unset {VISIBLE} to use it"
    about = e.probe.get("wheel")
    if about is not None and not (about["cuda"] or about["hip"]):
        return "the line PyTorch says what to install"
    return "the lines PyTorch and CUDA say why, and what to do"


def _abilities(name: str, capability: wheel.Capability, flash: bool) -> Finding:
    has = {
        "bf16": capability >= wheel.BF16,
        "fp8 products": capability >= wheel.FP8,
        "flash attention": flash and capability >= wheel.FLASH,
        "TF32": capability >= wheel.TF32,
    }
    words = ", ".join(f"{what} {'yes' if there else 'no'}" for what, there in has.items())
    todo = "; ".join(wheel.lacks(capability))
    return Finding(name, words, NOTE if todo else OK, todo)


def _memory(name: str, card: Mapping[str, Any], users: tuple[nvidia.User, ...]) -> list[Finding]:
    total, free = float(card["total_bytes"]), float(card["free_bytes"] or 0)
    uuid = str(card["uuid"]).removeprefix("GPU-")
    who = [
        f"{user.name.rsplit('/', 1)[-1] or 'process'} ({user.pid}"
        + (f", {user.used_bytes / GB:.1f} GB)" if user.used_bytes else ")")
        for user in users
        if user.uuid.removeprefix("GPU-") == uuid
    ]
    found = f"{free / GB:.1f} of {total / GB:.1f} GB free" + (
        f"; used by {', '.join(who[:6])}" if who else ""
    )
    if free < LEAST_GPU <= total:
        todo = "close what uses the card: SDXL at 1024 px needs at least 4.9 GB, with fp8_base (hpo plan)"
        return [Finding(name, found, NOTE, todo)]
    if total < LEAST_GPU:
        return [Finding(name, found, NOTE, "enough for SD1.5; for SDXL see what fits: hpo plan --vram …")]
    return [Finding(name, found)]


def _wsl(e: Evidence) -> list[Finding]:
    if not nvidia.is_wsl(e.root) or not e.has_card:
        return []
    return [
        Finding(
            "WSL",
            "if GPU memory runs out, the Windows driver continues in system memory without an error, and steps take "
            "many times as long",
            NOTE,
            "NVIDIA Control Panel → Manage 3D settings → CUDA – Sysmem Fallback Policy → Prefer No Sysmem Fallback; "
            "a sudden jump of the step time is the only sign",
        )
    ]


def _bitsandbytes(e: Evidence) -> list[Finding]:
    about = e.probe.get("bitsandbytes")
    if about is None:
        if "bitsandbytes begins" not in e.probe:
            return []
        found = f"importing it ended the process: {e.probe_failed}"
        return [
            Finding(
                "bitsandbytes", found, PROBLEM, "install it again: pip install --force-reinstall bitsandbytes"
            )
        ]
    instead = 'or use optimizer_type = "AdamW", which needs no bitsandbytes'
    if not about["version"]:
        return [Finding("bitsandbytes", f"it cannot be imported: {_short(_first(about['reason']), 200)}", PROBLEM,
                        f"pip install --force-reinstall bitsandbytes, {instead}")]  # fmt: skip
    if about["cuda"]:
        return [Finding("bitsandbytes", f"{about['version']}, with its CUDA library")]
    if e.cards:
        reason = f": {_short(_first(about['reason']), 160)}" if about["reason"] else ""
        todo = f"pip install --upgrade bitsandbytes, {instead}"
        return [Finding("bitsandbytes", f"{about['version']}, without a CUDA library for this PyTorch{reason}",
                        NOTE, f"8-bit optimizers do not work on the GPU: {todo}")]  # fmt: skip
    return [Finding("bitsandbytes", f"{about['version']}, on the CPU (8-bit optimizers are slow there)")]


def _disks(e: Evidence) -> list[Finding]:
    found = []
    for name, place, least, worst, closed, what in (
        ("disk (runs)", e.runs, LEAST_FREE_DISK, PROBLEM, "change its permissions",
         "a study with SD1.5 takes several GB"),
        # a cache that cannot be written, or is full, still serves the models that are in it
        ("disk (models)", _hub(e.environment), LEAST_HUB_DISK, NOTE, "models that are there are used; to download "
         "others, change its permissions, or name another folder in HF_HOME", "downloaded bases and scorers are kept "
         "there: SDXL and a scorer take about 10 GB; HF_HOME names another folder"),
    ):  # fmt: skip
        there = place.absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        free = shutil.disk_usage(there).free
        said = f"{free / GB:.0f} GB free at {place}"
        if not os.access(there, os.W_OK | os.X_OK):
            found.append(Finding(name, f"{said}, but it cannot be written", worst, closed))
        elif free < least:
            state = worst if free < 1 * GB else NOTE
            found.append(Finding(name, said, state, f"free some space: {what}"))
        else:
            found.append(Finding(name, said))
    return found


def _hub(environment: Mapping[str, str]) -> Path:
    """The folder of huggingface_hub's cache, by its documented variables."""
    if named := environment.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    home = environment.get("HF_HOME") or str(
        Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    )
    return Path(home).expanduser() / "hub"


def _clock(e: Evidence) -> list[Finding]:
    now = time.time()
    todo = "set the clock: sudo timedatectl set-ntp true" + (
        ", or sudo hwclock -s after Windows was asleep" if nvidia.is_wsl(e.root) else ""
    )
    if now < WRONG_YEAR:
        found = f"it shows {time.strftime('%Y-%m-%d', time.gmtime(now))}: downloads fail"
        return [Finding("clock", found, PROBLEM, todo)]
    ahead = [
        path for path in (e.runs, *_newest(e.runs)) if path.exists() and path.stat().st_mtime > now + DAY
    ]
    if ahead:
        return [
            Finding("clock", f"{ahead[0]} was written in the future: the clock is or was wrong", NOTE, todo)
        ]
    if e.clock == "no":
        return [Finding("clock", "it is not synchronized with a time server", NOTE, todo)]
    return [Finding("clock", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)))]


def _locks(e: Evidence) -> list[Finding]:
    """Nothing where processes can agree on who uses which GPU."""
    trouble = registry.folder_trouble(e.environment)
    if not trouble:
        return []
    if e.environment.get(registry.FOLDER):
        todo = f"set {registry.FOLDER} to a folder that can be written, or unset it: commands stop here until then"
        return [Finding("locks", trouble, PROBLEM, todo)]
    todo = f"without locks two commands may use the same GPU: set {registry.FOLDER} to a folder that can be written"
    return [Finding("locks", trouble, NOTE, todo)]


def _newest(runs: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(runs.iterdir())[:200]
    return []


CHECKS: tuple[Callable[[Evidence], list[Finding]], ...] = (
    _system, _cpu, _ram, _disks, _locks, _clock, _python, _pytorch, _driver, _cuda, _gpus, _wsl, _bitsandbytes,
)  # fmt: skip


def _device(e: Evidence) -> str:
    """The first card that works."""
    built = e.probe.get("kernels", {}).get("built") or []
    is_nvidia = bool((e.probe.get("wheel") or {}).get("cuda"))
    for card in e.cards:
        fits = not (is_nvidia and built) or wheel.has_kernels(built, tuple(card["capability"]))
        if card["works"] and fits:
            return f"cuda:{card['index']}"
    return "cpu"


def _verdict(e: Evidence, device: str, troubled: bool) -> Finding:
    if device != "cpu":
        more = ", but see the lines marked !!" if troubled else ""
        return Finding("verdict", f"hpo uses {device}{more}", NOTE if troubled else OK)
    if e.has_card and not hides_all(e.environment):
        return Finding("verdict", "there is a GPU, and it cannot be used", NOTE, "see the lines marked !!")
    why = f"the GPUs are hidden ({VISIBLE})" if e.has_card else "no GPU was found"
    return Finding(
        "verdict",
        f"{why}: hpo runs on the CPU",
        NOTE,
        "the miniature bases take minutes (hpo search --base mini-sd15); SD1.5 and SDXL take hours to days on a CPU",
    )


def _first(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _short(text: str, length: int) -> str:
    """A text of at most so many characters, cut between words."""
    return textwrap.shorten(text, length, placeholder=" …")
