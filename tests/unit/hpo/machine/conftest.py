"""A machine that is not there: files of a system, a fake nvidia-smi on PATH, and what PyTorch says of its cards."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hpo.machine import nvidia, registry

BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


class Machine:
    """``cards``: (name, capability) in PyTorch's order.  ``calls``: what was done with which card."""

    def __init__(self, patch: pytest.MonkeyPatch, place: Path) -> None:
        self.patch, self.place = patch, place
        self.calls: list[tuple[str, object]] = []
        self.lines: list[str] = []
        self.bin = place / "bin"
        self.bin.mkdir()

    def say(self, line: str) -> None:
        self.lines.append(line)

    def smi(self, script: str) -> None:
        """A program called nvidia-smi."""
        path = self.bin / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        self.patch.setenv("PATH", f"{self.bin}:/usr/bin:/bin")

    def has_traces(self, *found: str) -> None:
        self.patch.setattr(nvidia, "traces", lambda *_: found or ("/dev/nvidiactl",))

    def cards(self, *cards: tuple[str, tuple[int, int]], uuids: bool = True) -> None:
        """CUDA starts, with these cards."""

        def properties(index: int) -> types.SimpleNamespace:
            name, (major, minor) = cards[index]
            self.calls.append(("properties", index))
            uuid = {"uuid": f"uuid-{index}"} if uuids else {}
            return types.SimpleNamespace(name=name, major=major, minor=minor, **uuid)

        def zeros(*_: object, device: str) -> None:
            self.calls.append(("zeros", device))

        def mem_get_info(device: object = None) -> None:
            raise AssertionError(f"opens a context on {device}")

        self.has_traces()
        for name, value in {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: len(cards),
            "get_device_properties": properties,
            "get_arch_list": lambda: BUILT,
            "set_device": lambda index: self.calls.append(("set_device", index)),
            "mem_get_info": mem_get_info,
        }.items():
            self.patch.setattr(torch.cuda, name, value)
        self.patch.setattr(torch, "zeros", zeros)

    def broken(self, reason: str) -> None:
        """A card is there, and CUDA does not start."""

        def init() -> None:
            raise RuntimeError(reason)

        self.has_traces()
        self.patch.setattr(torch.cuda, "is_available", lambda: False)
        self.patch.setattr(torch.cuda, "init", init)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    monkeypatch.setenv(registry.FOLDER, str(tmp_path / "locks"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(nvidia, "WSL_SMI", str(tmp_path / "none"))
    held = dict(registry._OWN)
    registry._OWN.clear()
    made = Machine(monkeypatch, tmp_path)
    made.smi("exit 9")
    yield made
    for name, lock in registry._OWN.items():
        assert name.startswith(("gpu-", "worker-"))
        lock.release()
    registry._OWN.clear()
    registry._OWN.update(held)


@pytest.fixture
def system(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes files of a system and returns its root."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return tmp_path / "root"

    return write
