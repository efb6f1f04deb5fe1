"""The miniature's world: captioned scenes of a few shapes, drawn by formula.

Owns the values of the world, the frozen scene dataclasses, the sampler (deterministic by seed) and the
renderer (any square size, anti-aliased). It does not put scenes into words (captions.py) nor judge pictures
(checker.py), does not know the demo subjects (subjects.py) and trains nothing (build.py). numpy only.

Coordinates are relative: x to the right and y down, both 0..1, so one scene is the same picture at any size.
Array names carry shapes: H, W pixels, 3 colour channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
RGB = tuple[int, int, int]

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS: dict[str, RGB] = {
    "red": (220, 30, 35),
    "green": (25, 175, 50),
    "blue": (35, 60, 225),
    "yellow": (250, 220, 30),
    "purple": (150, 40, 190),
    "cyan": (40, 215, 230),
    "white": (250, 250, 250),
    "black": (15, 15, 18),
}
# The second tone of striped and dotted objects: same hue, clearly darker (white, black: towards grey).
SECOND: dict[str, RGB] = {
    "red": (110, 10, 15),
    "green": (8, 85, 22),
    "blue": (12, 22, 115),
    "yellow": (165, 140, 5),
    "purple": (75, 15, 98),
    "cyan": (10, 115, 128),
    "white": (168, 168, 170),
    "black": (92, 92, 96),
}
# Muted and textured, so that no object colour is ever taken for one.
BACKGROUNDS: dict[str, RGB] = {
    "grass": (116, 144, 84),
    "sand": (206, 182, 140),
    "water": (104, 138, 170),
    "brick": (160, 104, 88),
    "stone": (138, 136, 134),
}
PLACES: dict[str, tuple[float, float]] = {
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.74),
    "centre": (0.5, 0.5),
}
SIZES: dict[str, float] = {"small": 0.165, "large": 0.24}  # radius
PATTERNS: tuple[str, ...] = ("plain", "striped", "dotted")
RELATIONS: tuple[str, ...] = ("above", "below", "left of", "right of")
PAIR_RADIUS = 0.17
FIGURE_SCALE: dict[str, float] = {"small": 0.24, "large": 0.31}  # half of the height
HEADS: tuple[str, ...] = ("round", "square")
BODIES: tuple[str, ...] = ("square", "triangle", "round")
HATS: tuple[str, ...] = ("none", "pointed", "flat")


@dataclass(frozen=True)
class Thing:
    """One shape."""

    shape: str
    colour: str
    pattern: str = "plain"


@dataclass(frozen=True)
class Figure:
    """A composite figure: body, head, perhaps a hat, each with its own colour."""

    body: str
    body_colour: str
    head: str
    head_colour: str
    hat: str = "none"
    hat_colour: str = ""


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows. `kind` is single, pair or figure; `seed` drives jitter and texture."""

    kind: str
    background: str
    seed: int
    place: str = "centre"
    size: str = "large"
    things: tuple[Thing, ...] = ()
    relation: str = ""
    figure: Figure | None = None


# --------------------------------------------------------------------------------------------- sampling


def pick(rng: np.random.Generator, options: Iterable[str]) -> str:
    names = tuple(options)
    return names[int(rng.integers(len(names)))]


def sample_thing(rng: np.random.Generator, *, plain: bool = False) -> Thing:
    pattern = "plain" if plain or rng.random() < 0.5 else PATTERNS[1 + int(rng.integers(2))]
    return Thing(pick(rng, SHAPES), pick(rng, COLOURS), pattern)


def sample_figure(rng: np.random.Generator) -> Figure:
    """Neighbouring parts never share a colour: they could not be told apart in the picture."""
    body_colour, head_colour, hat_colour = (list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:3])
    hat = pick(rng, HATS)
    return Figure(
        pick(rng, BODIES),
        body_colour,
        pick(rng, HEADS),
        head_colour,
        hat,
        "" if hat == "none" else hat_colour,
    )


def sample_scene(seed: int, kind: str | None = None) -> Scene:
    """The scene of this seed: 60 % single objects, 20 % pairs, 20 % figures."""
    rng = np.random.default_rng((seed, 7001))
    draw = rng.random()
    kind = kind or ("single" if draw < 0.6 else "pair" if draw < 0.8 else "figure")
    background = pick(rng, BACKGROUNDS)
    size = pick(rng, SIZES)
    place = pick(rng, PLACES)
    if kind == "single":
        return Scene(kind, background, seed, place, size, (sample_thing(rng),))
    if kind == "figure":
        return Scene(kind, background, seed, place, size, figure=sample_figure(rng))
    first, second = sample_thing(rng, plain=True), sample_thing(rng, plain=True)
    while second.colour == first.colour:
        second = sample_thing(rng, plain=True)
    return Scene(kind, background, seed, "centre", "small", (first, second), pick(rng, RELATIONS))


def neighbours(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with exactly one visible attribute changed: a hard negative for contrastive training."""

    def other(value: str, options: Iterable[str]) -> str:
        rest = tuple(o for o in options if o != value)
        return rest[int(rng.integers(len(rest)))]

    if scene.kind == "single":
        thing = scene.things[0]
        what = int(rng.integers(6))
        if what == 0:
            return replace(scene, background=other(scene.background, BACKGROUNDS))
        if what == 1:
            return replace(scene, place=other(scene.place, PLACES))
        if what == 2:
            return replace(scene, size=other(scene.size, SIZES))
        field, options = (("shape", SHAPES), ("colour", COLOURS), ("pattern", PATTERNS))[what - 3]
        changed = replace(thing, **{field: other(getattr(thing, field), options)})
        return replace(scene, things=(changed,))
    if scene.kind == "figure":
        figure = scene.figure
        assert figure is not None
        what = int(rng.integers(7))
        if what == 0:
            return replace(scene, background=other(scene.background, BACKGROUNDS))
        if what == 1:
            return replace(scene, place=other(scene.place, PLACES))
        used = {figure.body_colour, figure.head_colour, figure.hat_colour}
        free = tuple(c for c in COLOURS if c not in used)
        new = free[int(rng.integers(len(free)))]
        if what == 2:
            return replace(scene, figure=replace(figure, body_colour=new))
        if what == 3:
            return replace(scene, figure=replace(figure, head_colour=new))
        if what == 4:
            return replace(scene, figure=replace(figure, body=other(figure.body, BODIES)))
        if what == 5:
            return replace(scene, figure=replace(figure, head=other(figure.head, HEADS)))
        if figure.hat == "none":
            return replace(scene, figure=replace(figure, hat=other("none", HATS), hat_colour=new))
        return replace(scene, figure=replace(figure, hat_colour=new))
    first, second = scene.things
    what = int(rng.integers(5))
    if what == 0:
        return replace(scene, background=other(scene.background, BACKGROUNDS))
    if what == 1:
        return replace(scene, relation=other(scene.relation, RELATIONS))
    if what == 2:
        return replace(scene, things=(replace(first, shape=other(first.shape, SHAPES)), second))
    if what == 3:
        return replace(scene, things=(first, replace(second, shape=other(second.shape, SHAPES))))
    free = tuple(c for c in COLOURS if c not in (first.colour, second.colour))
    return replace(scene, things=(replace(first, colour=free[int(rng.integers(len(free)))]), second))


# --------------------------------------------------------------------------------------------- rendering

_GRIDS: dict[int, tuple[Array, Array]] = {}


def grid(size_px: int) -> tuple[Array, Array]:
    """Pixel centres as (x_1W, y_H1), broadcastable."""
    if size_px not in _GRIDS:
        axis = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px
        _GRIDS[size_px] = (axis[None, :], axis[:, None])
    return _GRIDS[size_px]


def polygon(u: Array, v: Array, corners: list[tuple[float, float]]) -> Array:
    """Distance-like field of a convex polygon (negative inside); corners in clockwise order as seen."""
    field = np.full(np.broadcast_shapes(u.shape, v.shape), -9.0, np.float32)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = float(np.hypot(x1 - x0, y1 - y0))
        nx, ny = (y1 - y0) / length, -(x1 - x0) / length
        np.maximum(field, (u - x0) * nx + (v - y0) * ny, out=field)
    return field


def box_field(u: Array, v: Array, half_w: float, half_h: float) -> Array:
    return np.maximum(np.abs(u) - half_w, np.abs(v) - half_h)


def shape_field(shape: str, u: Array, v: Array) -> Array:
    """Signed distance-like field of a unit shape at (u, v) in units of its radius."""
    if shape == "circle":
        return np.sqrt(u * u + v * v) - 0.95
    if shape == "ring":
        return np.abs(np.sqrt(u * u + v * v) - 0.72) - 0.27
    if shape == "square":
        return box_field(u, v, 0.84, 0.84)
    if shape == "triangle":
        return polygon(u, v, [(0.0, -0.98), (1.0, 0.82), (-1.0, 0.82)])
    if shape == "cross":
        return np.minimum(box_field(u, v, 1.0, 0.33), box_field(u, v, 0.33, 1.0))
    if shape == "star":
        angle = np.arctan2(u, -v)  # 0 is up
        sector = 2 * np.pi / 5
        a = np.abs(np.mod(angle + sector / 2, sector) - sector / 2)
        r = np.sqrt(u * u + v * v)
        px, py = r * np.cos(a), r * np.sin(a)
        outer, inner = 1.1, 0.5
        ix, iy = inner * np.cos(sector / 2), inner * np.sin(sector / 2)
        nx, ny = iy, outer - ix
        length = float(np.hypot(nx, ny))
        return ((px - outer) * nx + py * ny) / length
    raise ValueError(f"unknown shape {shape!r}")


def coverage(field: Array, pixel: float) -> Array:
    """Share of each pixel covered, from a distance field and the pixel's width in the same unit."""
    return np.clip(0.5 - field / pixel, 0.0, 1.0)


def paint(canvas_HW3: Array, cover_HW: Array, colour: Array | RGB) -> None:
    """Blend one colour (or one colour per pixel) over the canvas, in place."""
    canvas_HW3 += cover_HW[..., None] * (np.asarray(colour, np.float32) - canvas_HW3)


def render_background(name: str, seed: int, size_px: int) -> Array:
    """A muted, textured ground; the texture depends on the seed, the mean colour does not."""
    x, y = grid(size_px)
    rng = np.random.default_rng((seed, 7002))
    p = rng.random(6).astype(np.float32) * 6.2832
    if name == "grass":
        t = 0.6 * np.sin(75 * x + 3 * np.sin(9 * y + p[0]) + p[1]) * np.sin(17 * y + p[2]) + 0.4 * np.sin(
            13 * x + p[3]
        )
    elif name == "sand":
        t = np.sin(47 * x + p[0]) * np.sin(53 * y + p[1]) * 0.6 + 0.4 * np.sin(23 * (x - y) + p[2])
    elif name == "water":
        t = np.sin(34 * y + 1.6 * np.sin(8 * x + p[0]) + p[1]) + 0 * x
    elif name == "brick":
        row = np.floor(y * 8 + p[0])
        joint = np.abs(np.mod(y * 8 + p[0], 1.0) - 0.5) > 0.38
        side = np.abs(np.mod(x * 4 + 0.5 * np.mod(row, 2) + p[1], 1.0) - 0.5) > 0.44
        t = np.where(joint | side, 1.3, -0.35).astype(np.float32)
    elif name == "stone":
        t = np.sin(11 * x + 4 * np.sin(6 * y + p[0]) + p[1]) * np.sin(
            12 * y + 3 * np.sin(7 * x + p[2]) + p[3]
        )
    else:
        raise ValueError(f"unknown background {name!r}")
    base = np.asarray(BACKGROUNDS[name], np.float32)
    return base + 13.0 * np.broadcast_to(t, (size_px, size_px)).astype(np.float32)[..., None]


def pattern_colours(pattern: str, first: RGB, second: RGB, u: Array, v: Array) -> Array | RGB:
    """Colour of each pixel of a patterned object; (u, v) in units of the picture, from the object's centre."""
    if pattern == "plain":
        return first
    if pattern == "striped":
        t = np.clip(0.5 + 2.2 * np.sin(v * (2 * np.pi / 0.14)), 0, 1) + 0 * u
    elif pattern == "dotted":
        k = 2 * np.pi / 0.17
        t = np.clip(-0.3 + 2.0 * np.cos(u * k) * np.cos(v * k), 0, 1)
    else:
        raise ValueError(f"unknown pattern {pattern!r}")
    a, b = np.asarray(first, np.float32), np.asarray(second, np.float32)
    return a + t[..., None].astype(np.float32) * (b - a)


def draw_thing(
    canvas_HW3: Array,
    shape: str,
    centre: tuple[float, float],
    radius: float,
    pattern: str,
    first: RGB,
    second: RGB,
) -> None:
    size_px = canvas_HW3.shape[0]
    x, y = grid(size_px)
    u, v = x - centre[0], y - centre[1]
    cover = coverage(shape_field(shape, u / radius, v / radius), 1.0 / (size_px * radius))
    paint(canvas_HW3, cover, pattern_colours(pattern, first, second, u, v))


def figure_fields(body: str, head: str, hat: str, u: Array, v: Array) -> dict[str, Array]:
    """Fields of a figure's parts; (u, v) in units of half its height, origin at its middle."""
    wide = np.broadcast_shapes(u.shape, v.shape)
    parts: dict[str, Array] = {}
    if body == "square":
        parts["body"] = box_field(u, v - 0.53, 0.46, 0.45)
    elif body == "triangle":
        parts["body"] = polygon(u, v, [(0.0, -0.05), (0.66, 0.98), (-0.66, 0.98)])
    elif body == "round":
        parts["body"] = np.sqrt((u / 1.12) ** 2 + ((v - 0.5) / 1.0) ** 2) - 0.49
    else:
        raise ValueError(f"unknown body {body!r}")
    if head == "round":
        parts["head"] = np.sqrt(u * u + (v + 0.24) ** 2) - 0.34
    elif head == "square":
        parts["head"] = box_field(u, v + 0.24, 0.31, 0.31)
    else:
        raise ValueError(f"unknown head {head!r}")
    if hat == "pointed":
        parts["hat"] = polygon(u, v, [(0.0, -1.0), (0.42, -0.42), (-0.42, -0.42)])
    elif hat == "flat":
        parts["hat"] = np.minimum(box_field(u, v + 0.5, 0.58, 0.1), box_field(u, v + 0.68, 0.3, 0.2))
    elif hat != "none":
        raise ValueError(f"unknown hat {hat!r}")
    return {name: np.broadcast_to(field, wide) for name, field in parts.items()}


def figure_centre(scene: Scene) -> tuple[float, float]:
    """Figures are tall: at the top and bottom they stand less far out than a single shape."""
    x, y = PLACES[scene.place]
    return x, 0.5 + (y - 0.5) * 0.75


def render(scene: Scene, size_px: int = 64) -> NDArray[np.uint8]:
    """The picture as uint8 HW3."""
    canvas = render_background(scene.background, scene.seed, size_px)
    rng = np.random.default_rng((scene.seed, 7003))
    dx, dy = (rng.random(2) - 0.5) * 0.06
    if scene.kind == "pair":
        gap = 0.21 + 0.03 * rng.random()
        sign = -1 if scene.relation in ("above", "left of") else 1
        vertical = scene.relation in ("above", "below")
        for thing, s in zip(scene.things, (sign, -sign), strict=True):
            centre = (0.5 + dx + (0 if vertical else s * gap), 0.5 + dy + (s * gap if vertical else 0))
            draw_thing(
                canvas,
                thing.shape,
                centre,
                PAIR_RADIUS,
                thing.pattern,
                COLOURS[thing.colour],
                SECOND[thing.colour],
            )
    elif scene.kind == "figure":
        figure = scene.figure
        assert figure is not None
        half = FIGURE_SCALE[scene.size] * (0.96 + 0.08 * rng.random())
        cx, cy = figure_centre(scene)
        x, y = grid(size_px)
        fields = figure_fields(
            figure.body, figure.head, figure.hat, (x - cx - dx) / half, (y - cy - dy * 0.5) / half
        )
        colours = {"body": figure.body_colour, "head": figure.head_colour, "hat": figure.hat_colour}
        for name, field in fields.items():
            paint(canvas, coverage(field, 1.0 / (size_px * half)), COLOURS[colours[name]])
    else:
        (thing,) = scene.things
        cx, cy = PLACES[scene.place]
        radius = SIZES[scene.size] * (0.95 + 0.1 * rng.random())
        draw_thing(
            canvas,
            thing.shape,
            (cx + dx, cy + dy),
            radius,
            thing.pattern,
            COLOURS[thing.colour],
            SECOND[thing.colour],
        )
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def object_mask(image_HW3: NDArray[np.uint8], scene: Scene) -> NDArray[np.bool_]:
    """Where a clean render differs from its own background: the weight map of the autoencoder's loss."""
    ground = render_background(scene.background, scene.seed, image_HW3.shape[0])
    return np.abs(image_HW3.astype(np.float32) - ground).sum(-1) > 24
