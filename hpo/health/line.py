"""The health of a run in one line of a terminal: the GPU, and what is not safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpo.study import GB
from trainer.text import clean_text

if TYPE_CHECKING:
    from hpo.health.health import Health


def health_line(health: Health, width: int = 79) -> str:
    """Empty on a machine without a GPU where all is well.  At most ``width`` characters."""
    if health.paused:
        return f"paused: {health.paused}"[:width]
    return fitted(figure_words(health.figures()), width)


def figure_words(figures: Mapping[str, Any], *, everything: bool = False) -> list[str]:
    """Figures of a row of health.jsonl, the most important first.  ``everything``: also those that are safe."""
    levels = figures.get("levels")
    levels = levels if isinstance(levels, dict) else {}
    found = []
    gpu = _gpu(figures)
    if gpu:
        found.append(gpu)
    elif figures.get("no_gpu"):
        found.append(f"GPU: {clean_text(str(figures['no_gpu']))[:40]}")
    for name, key, text in (
        ("ram_used", "ram_used", lambda value: f"RAM {value:.0f} %"),
        ("ram_available", "ram_available", lambda value: f"RAM {value / GB:.1f} GB left"),
        ("swap_used", "swap", lambda value: f"swap {value / GB:.1f} GB"),
        ("disk", "disk_free", lambda value: f"disk {value / GB:.1f} GB free"),
    ):
        value, level = _number(figures.get(key)), str(levels.get(name, ""))
        if value is not None and (level or everything):
            found.append(text(value) + _mark(level))
    said = (("slow", "slow steps"), ("swing", "loss swings"))
    found += [what for name, what in said if name in levels]
    return found


def fitted(parts: Sequence[str], width: int) -> str:
    """As many parts, from the first on, as fit."""
    line = ""
    for part in parts:
        longer = f"{line}, {part}" if line else part
        if len(longer) > width:
            break
        line = longer
    return line


def _gpu(figures: Mapping[str, Any]) -> str:
    levels = figures.get("levels") if isinstance(figures.get("levels"), dict) else {}
    assert isinstance(levels, dict)
    parts = []
    if (celsius := _number(figures.get("gpu_temperature"))) is not None:
        parts.append(f"{celsius:.0f} °C{_mark(str(levels.get('gpu_temperature', '')))}")
    if (busy := _number(figures.get("gpu_busy"))) is not None:
        parts.append(f"{busy:.0f} % busy")
    used, total = _number(figures.get("vram_used")), _number(figures.get("vram_total"))
    if used is not None and total:
        parts.append(f"{used / GB:.1f} of {total / GB:.1f} GB{_mark(str(levels.get('vram_used', '')))}")
    return f"GPU {', '.join(parts)}" if parts else ""


def _mark(level: str) -> str:
    return {"warn": " (!)", "danger": " (!!)"}.get(level, "")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
