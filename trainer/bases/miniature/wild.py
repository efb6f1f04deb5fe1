"""Pictures beyond the world's vocabulary: random composite creatures in random colours, and colour treatments.

The autoencoder sees them so that it can show subjects the world never named; the likeness encoder learns from
them to tell individuals apart. Owns only these random pictures; they have no captions. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainer.bases.miniature import world
from trainer.bases.miniature.world import Array

PART_KINDS: tuple[str, ...] = ("ellipse", "box", "polygon", "ring", "star", "cross", "triangle", "crescent")


@dataclass(frozen=True)
class Part:
    """One part of a creature: a shape at an offset, in units of the creature's radius."""

    kind: str
    x: float
    y: float
    w: float
    h: float
    turn: float
    corners: int
    rgb: tuple[float, float, float]
    pattern: str
    second: tuple[float, float, float]


@dataclass(frozen=True)
class Creature:
    """An individual: the same parts in the same colours wherever it stands."""

    parts: tuple[Part, ...]


def _colour(rng: np.random.Generator) -> tuple[float, float, float]:
    if rng.random() < 0.3:
        named = list(world.COLOURS.values())[int(rng.integers(len(world.COLOURS)))]
        return (float(named[0]), float(named[1]), float(named[2]))
    rgb = rng.random(3) ** 0.8 * 250
    return (float(rgb[0]), float(rgb[1]), float(rgb[2]))


def _part(rng: np.random.Generator, x: float, y: float, scale: float) -> Part:
    first = _colour(rng)
    pattern = "plain" if rng.random() < 0.75 else world.PATTERNS[1 + int(rng.integers(2))]
    w, h = scale * (0.7 + 0.6 * rng.random(2))
    kind = PART_KINDS[int(rng.integers(len(PART_KINDS)))]
    turn = float(rng.random() * 6.2832) if rng.random() < 0.4 else 0.0
    return Part(kind, x, y, float(w), float(h), turn, int(rng.integers(3, 8)), first, pattern, _colour(rng))


def sample_creature(rng: np.random.Generator) -> Creature:
    """One to five parts: a body, perhaps a head, a hat, ears, a mark."""
    draw = rng.random()
    if draw < 0.35:
        parts = [_part(rng, 0.0, 0.0, 0.85)]
        if rng.random() < 0.5:
            x, y = rng.random(2) * 0.5 - 0.25
            parts.append(_part(rng, x, y, 0.35))
        return Creature(tuple(parts))
    parts = [_part(rng, 0.0, 0.48, 0.5), _part(rng, 0.0, -0.25, 0.34)]
    if rng.random() < 0.5:
        parts.append(_part(rng, 0.0, -0.72, 0.28))
    if rng.random() < 0.5:
        side = float(0.25 + 0.2 * rng.random())
        where = float(-0.6 if rng.random() < 0.5 else 0.3)
        ear = _part(rng, -side, where, 0.18)
        mirrored = Part(
            ear.kind, side, ear.y, ear.w, ear.h, -ear.turn, ear.corners, ear.rgb, ear.pattern, ear.second
        )
        parts = [ear, mirrored, *parts] if rng.random() < 0.5 else [*parts, ear, mirrored]
    return Creature(tuple(parts))


def _field(part: Part, u: Array, v: Array) -> Array:
    du, dv = u - part.x, v - part.y
    if part.turn:
        c, s = float(np.cos(part.turn)), float(np.sin(part.turn))
        du, dv = c * du + s * dv, -s * du + c * dv
    du, dv = du / part.w, dv / part.h
    if part.kind == "ellipse":
        return np.sqrt(du * du + dv * dv) - 1.0
    if part.kind == "box":
        return world.box_field(du, dv, 0.9, 0.9)
    if part.kind == "crescent":
        return np.maximum(np.sqrt(du * du + dv * dv) - 1.0, 0.8 - np.sqrt((du - 0.5) ** 2 + dv * dv))
    if part.kind == "polygon":
        angles = np.arange(part.corners) * (2 * np.pi / part.corners)
        corners = [(float(np.sin(a)), float(-np.cos(a))) for a in angles]
        return world.polygon(du, dv, corners)
    return world.shape_field(part.kind, du, dv)


def render_creature(
    creature: Creature, rng: np.random.Generator, size_px: int = 64
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The creature somewhere, at some size, on some ground; and where it is."""
    name = list(world.BACKGROUNDS)[int(rng.integers(len(world.BACKGROUNDS)))]
    ground = world.render_background(name, int(rng.integers(1 << 30)), size_px)
    if rng.random() < 0.2:
        ground = ground + (rng.random(3) * 90 - 45).astype(np.float32)
    canvas = ground.copy()
    radius = 0.14 + 0.18 * rng.random()
    cx, cy = radius * 0.8 + (1 - radius * 1.6) * rng.random(2)
    x, y = world.grid(size_px)
    u, v = (x - cx) / radius, (y - cy) / radius
    for part in creature.parts:
        cover = world.coverage(_field(part, u, v) * min(part.w, part.h), 1.0 / (size_px * radius))
        colour = world.pattern_colours(part.pattern, part.rgb, part.second, u * radius, v * radius)  # type: ignore[arg-type]
        world.paint(canvas, np.broadcast_to(cover, (size_px, size_px)), colour)
    mask = np.abs(canvas - ground).sum(-1) > 24
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), mask


def treat(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random colour treatment of a whole picture: a tone curve through three random colours."""
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    stops = np.sort(rng.random(1)) * 0.6 + 0.2
    colours = np.array([_colour(rng) for _ in range(3)], np.float32)
    channels = [np.interp(grey, [0.0, float(stops[0]), 1.0], colours[:, c]) for c in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


def twin(creature: Creature, rng: np.random.Generator) -> Creature:
    """Nearly the same individual: one part has another colour."""
    parts = list(creature.parts)
    at = int(rng.integers(len(parts)))
    parts[at] = replace(parts[at], rgb=_colour(rng))
    return Creature(tuple(parts))
