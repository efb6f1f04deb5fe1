"""What the installed PyTorch can do with a card: kernels for it, number types, and why CUDA does not start.

Owns the rules and the wording; everything it judges is handed to it, so that it needs neither torch nor a card.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

Capability = tuple[int, int]

BF16 = FLASH = TF32 = (8, 0)  # PyTorch's documentation of torch.cuda.is_bf16_supported, SDPA and allow_tf32
FP8 = (8, 9)  # Ada; torch._scaled_mm
# The oldest Linux driver of a CUDA generation (CUDA Toolkit Release Notes, "minor version compatibility").
OLDEST_DRIVER = {11: "450.80", 12: "525.60", 13: "580"}
WHEELS = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Trouble:
    """Why CUDA cannot be used, and what to do."""

    what: str
    todo: str


def shown(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


def has_kernels(arch_list: Sequence[str], capability: Capability) -> bool:
    """Whether a wheel has code for a card.  ``arch_list``: torch.cuda.get_arch_list().

    ``sm_86`` is machine code: it runs on 8.6 and later minor versions of 8. ``compute_90`` is PTX, which the driver
    compiles for any later card.  With a letter (``sm_90a``, ``sm_100f``) code is for that card, or for its family.
    """
    for name in arch_list:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if not found:
            continue
        kind, major, minor, letter = found.groups()
        built = (int(major), int(minor))
        if letter == "a":
            fits = built == capability
        elif kind == "sm" or letter == "f":
            fits = built[0] == capability[0] and built[1] <= capability[1]
        else:
            fits = built <= capability
        if fits:
            return True
    return False


def span(arch_list: Sequence[str]) -> str:
    """The cards a wheel has kernels for, for messages: 7.5 to 12.0."""
    numbers = sorted(
        (int(m[1]), int(m[2])) for name in arch_list if (m := re.search(r"_(\d+)(\d)[af]?$", name))
    )
    return f"{shown(numbers[0])} to {shown(numbers[-1])}" if numbers else "no card"


def no_kernels(name: str, capability: Capability, arch_list: Sequence[str]) -> Trouble:
    """The words for a card without kernels."""
    older = all(not has_kernels([arch], (capability[0], 9)) for arch in arch_list) and capability < (7, 5)
    todo = (
        "install a PyTorch for CUDA 12.6, the last one for such old cards: pip install torch "
        "--index-url https://download.pytorch.org/whl/cu126"
        if older
        else f"install the newest PyTorch for this card: {WHEELS}"
    )
    return Trouble(
        f"{name} has compute capability {shown(capability)}, but the installed PyTorch has kernels for "
        f"{span(arch_list)}",
        todo,
    )


def lacks(capability: Capability, precision: str = "auto") -> list[str]:
    """What a card cannot do, and what is used instead, in words.  ``precision``: mixed_precision, as what is not asked
    for is not missed."""
    found = []
    if capability < BF16 and precision == "auto":
        found.append("no bf16: fp16 is used where mixed_precision is auto")
    if capability < BF16 and precision == "bf16":
        found.append("no bf16: mixed_precision = bf16 is emulated and slow, auto uses fp16")
    if capability < FLASH:
        found.append("no flash attention: PyTorch's memory-efficient attention is used")
    return found


def explain(reason: str, cuda: str | None) -> Trouble:
    """The words for a reason that CUDA does not start.  ``reason``: PyTorch's or the driver's message; ``cuda``: the
    wheel's CUDA version.  Sources: the CUDA Runtime API's error codes, PyTorch's c10/cuda/CUDAFunctions.cpp."""
    text = reason.lower()
    version = f"CUDA {cuda}" if cuda else "CUDA"
    for needle, what, todo in _REASONS:
        if re.search(needle, text):
            major = int(cuda.partition(".")[0]) if cuda and cuda[0].isdecimal() else 0
            driver = OLDEST_DRIVER.get(major, "the newest one")
            return Trouble(what.format(version=version), todo.format(driver=driver, wheels=WHEELS))
    return Trouble(
        f"CUDA does not start: {textwrap.shorten(reason, 200, placeholder=' …')}"
        if reason
        else "CUDA finds no card",
        "restart the machine; if that does not help, install the NVIDIA driver again",
    )


_REASONS = (
    (
        r"driver.* too old|driver version is insufficient|error 35\b",
        "the NVIDIA driver is too old for this PyTorch ({version})",
        "update the driver to {driver} or newer, or install a PyTorch for an older CUDA: {wheels}",
    ),
    (
        r"error 804|forward compatibility",
        "a CUDA compatibility library (libcuda in a cuda-compat package) is in the way of the driver's own",
        "remove cuda/compat from LD_LIBRARY_PATH, uninstall cuda-compat, or update the driver to {driver}",
    ),
    (
        r"error 803|unsupported display driver|driver/library version mismatch|version mismatch",
        "the NVIDIA driver was updated while an older one is still loaded",
        "restart the machine",
    ),
    (
        r"error 802|not yet initialized",
        "the NVIDIA driver is not ready (on servers with NVSwitch the Fabric Manager is not running)",
        "start nvidia-fabricmanager, or wait and try again",
    ),
    (
        r"busy or unavailable|error 46\b",
        "the card is busy, or in a mode that lets only one process use it",
        "stop the other process (nvidia-smi shows it), or allow sharing: sudo nvidia-smi -c 0",
    ),
    (
        r"error 101|invalid device ordinal",
        "CUDA_VISIBLE_DEVICES names a GPU that does not exist",
        "unset CUDA_VISIBLE_DEVICES, or give it the numbers that nvidia-smi -L shows",
    ),
    (
        r"error 100\b|no cuda-capable device|no cuda gpus are available",
        "the driver is loaded, but no card is visible to this system",
        "in a container: start it with --gpus all; else look at CUDA_VISIBLE_DEVICES and nvidia-smi",
    ),
    (
        r"error 999|unknown error",
        "the driver reports an unknown error, as it often does after the machine was suspended",
        "sudo rmmod nvidia_uvm; sudo modprobe nvidia_uvm; or restart the machine",
    ),
    (
        r"out of memory|error 2\b",
        "the card has no memory left for one more process",
        "stop what uses it (nvidia-smi shows it)",
    ),
    (
        r"found no nvidia driver|libcuda|error 34\b|couldn't communicate with the nvidia driver",
        "the NVIDIA driver is not loaded",
        "in a container: start it with --gpus all; else install the driver ({driver} or newer) and restart",
    ),
    (
        r"not compiled with cuda|built without cuda|cpu only",
        "the installed PyTorch is built for the CPU only",
        "install one with CUDA: {wheels}",
    ),
    (
        r"no answer within",
        "the NVIDIA driver does not answer",
        "restart the machine; if it happens again, look for Xid in the output of dmesg",
    ),
)  # fmt: skip
