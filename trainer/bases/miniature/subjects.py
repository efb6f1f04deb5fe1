"""Three demo subjects that the world never showed: a character, an object and a style.

Owns how each looks, its training folder (kohya layout: `10_luca figure/` with pictures and captions, and
`held_out/` beside it) and the ground truth of whether a picture shows it. numpy + Pillow only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.bases.miniature import captions, checker, world
from trainer.bases.miniature.world import RGB, Array
from trainer.errors import DataError
from trainer.files import atomic_folder, machine_error, sweep

TRAINING_IMAGES = 24
# A style's pictures show different things.  With 8 the likeness scale on mini-sd15 was known to 0.108, the
# character's to 0.035 (standard errors), and a search was refused.
HELD_OUT_IMAGES = {"character": 8, "object": 8, "style": 24}
REPEATS = 10
SIZE_PX = 128  # mini-sdxl's own; mini-sd15 is given them at half the size


@dataclass(frozen=True)
class Subject:
    """What a demo subject is called."""

    kind: str
    trigger: str
    class_word: str


SUBJECTS: dict[str, Subject] = {
    "character": Subject("character", "luca", "figure"),
    "object": Subject("object", "zorb", "emblem"),
    "style": Subject("style", "vexa", "style"),
}

# The colours are the world's own: the autoencoder keeps no others (orange comes back yellow). The forms are new.
# Luca: red triangle body with a white belly, yellow round head with two blue ears. No world figure has ears or a
# belly.
LUCA: dict[str, RGB] = {part: world.COLOURS[name] for part, name in (
    ("body", "red"), ("head", "yellow"), ("ears", "blue"), ("belly", "white"),
)}  # fmt: skip
# Zorb: a red heart with a white core.
ZORB: dict[str, RGB] = {part: world.COLOURS[name] for part, name in (("heart", "red"), ("core", "white"))}
# Vexa: a blue wash - strong blue darks, blue middle tones, white lights.
DARK: RGB = world.COLOURS["blue"]
MIDDLE: RGB = (60, 100, 200)
LIGHT: RGB = world.COLOURS["white"]


def _luca_fields(u: Array, v: Array) -> list[tuple[str, Array, RGB]]:
    wide = np.broadcast_shapes(u.shape, v.shape)
    ears = (
        np.minimum(np.sqrt((u - 0.34) ** 2 + (v + 0.66) ** 2), np.sqrt((u + 0.34) ** 2 + (v + 0.66) ** 2))
        - 0.24
    )
    body = world.polygon(u, v, [(0.0, -0.15), (0.74, 0.98), (-0.74, 0.98)])
    head = np.sqrt(u * u + (v + 0.26) ** 2) - 0.42
    belly = np.sqrt(u * u + (v - 0.62) ** 2) - 0.2
    parts = (("ears", ears), ("body", body), ("head", head), ("belly", belly))
    return [(name, np.broadcast_to(field, wide), LUCA[name]) for name, field in parts]


def _zorb_fields(u: Array, v: Array) -> list[tuple[str, Array, RGB]]:
    wide = np.broadcast_shapes(u.shape, v.shape)
    lobes = (
        np.minimum(np.sqrt((u - 0.45) ** 2 + (v + 0.3) ** 2), np.sqrt((u + 0.45) ** 2 + (v + 0.3) ** 2)) - 0.5
    )
    point = world.polygon(u, v, [(-0.88, -0.05), (0.88, -0.05), (0.0, 0.98)])
    heart = np.minimum(lobes, point)
    heart = np.minimum(heart, world.box_field(u, v + 0.15, 0.5, 0.2))
    core = np.sqrt(u * u + (v + 0.1) ** 2) - 0.3
    return [
        (name, np.broadcast_to(field, wide), ZORB[name]) for name, field in (("heart", heart), ("core", core))
    ]


def _draw(canvas_HW3: Array, kind: str, centre: tuple[float, float], radius: float) -> None:
    size_px = canvas_HW3.shape[0]
    x, y = world.grid(size_px)
    u, v = (x - centre[0]) / radius, (y - centre[1]) / radius
    for _, field, rgb in (_luca_fields if kind == "character" else _zorb_fields)(u, v):
        world.paint(canvas_HW3, world.coverage(field, 1.0 / (size_px * radius)), rgb)


def stylise(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The vexa style: the grey values of the picture run from blue over a paler blue to white."""
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    stops = np.array([DARK, DARK, MIDDLE, LIGHT, LIGHT], np.float32)
    channels = [np.interp(grey, [0.0, 0.25, 0.55, 0.8, 1.0], stops[:, c]) for c in range(3)]
    return np.clip(np.stack(channels, -1) + 0.5, 0, 255).astype(np.uint8)


def picture(kind: str, index: int, seed: int, size_px: int) -> tuple[NDArray[np.uint8], str]:
    """One picture of a subject and its caption; place, size and ground run through all their values."""
    subject = SUBJECTS[kind]
    rng = np.random.default_rng((seed, index, 8001))
    if kind == "style":
        scene = world.sample_scene(90_000_000 + seed * 1000 + index)
        return stylise(
            world.render(scene, size_px)
        ), f"{captions.caption(scene)}, {subject.trigger} {subject.class_word}"
    background = list(world.BACKGROUNDS)[index % len(world.BACKGROUNDS)]
    place = list(world.PLACES)[(index + index // len(world.PLACES)) % len(world.PLACES)]
    size = ("large", "large", "small")[index % 3]
    canvas = world.render_background(background, seed * 1000 + index, size_px)
    x, y = world.PLACES[place]
    radius = world.FIGURE_SCALE[size] if kind == "character" else world.SIZES[size] * 1.05
    dx, dy = (rng.random(2) - 0.5) * 0.05
    _draw(canvas, kind, (x + dx, 0.5 + (y - 0.5) * 0.75 + dy), radius * (0.96 + 0.08 * float(rng.random())))
    where = f"on {background}, {captions.PLACE_PHRASES[place][0]}"
    said = f"{size} {subject.trigger}" if index % 2 else subject.trigger
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), f"a {said} {subject.class_word} {where}"


def write_subject(kind: str, folder: Path, size_px: int = SIZE_PX, seed: int = 0) -> Path:
    """Write the training folder and `held_out/` under `folder`; returns the folder to train on.

    `folder` is new or empty: nobody's images are mixed with these or overwritten.
    """
    subject = SUBJECTS[kind]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        filled = any(folder.iterdir())
    except OSError as error:
        raise machine_error(error, folder) from error
    if filled:
        raise DataError(f"{folder} is not empty, so nothing was written", "give a new folder")
    training = folder / f"{REPEATS}_{subject.trigger} {subject.class_word}"
    for target, start, count in (
        (training, 0, TRAINING_IMAGES),
        (folder / "held_out", TRAINING_IMAGES, HELD_OUT_IMAGES[kind]),
    ):
        with atomic_folder(target) as temporary:
            for index in range(start, start + count):
                image, text = picture(kind, index, seed, size_px)
                name = f"{subject.trigger}_{index:02d}"
                Image.fromarray(image).save(temporary / f"{name}.png")
                (temporary / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    return training


# ---------------------------------------------------------------------------------------------- ground truth

SPECIAL: dict[str, dict[str, RGB]] = {"character": LUCA, "object": ZORB}


def parts_shown(image: NDArray[np.uint8] | Image.Image, kind: str) -> dict[str, bool]:
    """Per part of the character or object: is its colour there, in the right place relative to the others?"""
    pixels = checker.at_reading_size(image)
    own = SPECIAL[kind]
    others = [*world.COLOURS.values(), *world.SECOND.values(), *world.BACKGROUNDS.values()]
    palette = np.array([*own.values(), *others], np.float32)
    distance = np.sqrt(np.square(pixels[:, :, None] - palette).sum(-1))
    nearest = distance.argmin(-1)
    masks = {name: (nearest == i) & (distance[..., i] < 70) for i, name in enumerate(own)}
    shown = dict.fromkeys(masks, False)
    main = "body" if kind == "character" else "heart"
    if masks[main].sum() < 30:
        return shown
    rows, columns = np.nonzero(masks[main])
    middle_y, middle_x = float(np.median(rows)), float(np.median(columns))
    high = np.percentile(rows, 97) - np.percentile(rows, 3)
    wide = np.percentile(columns, 97) - np.percentile(columns, 3)
    shown[main] = bool(0.4 < high / max(1.0, wide) < 1.8 and masks[main].sum() > 0.25 * high * wide)
    whole = checker.bounding_box(masks[main])
    for name, smallest, top, bottom in (
        ("head", 0.2, -1.6, -0.25),
        ("ears", 0.06, -2.2, -0.5),
        ("belly", 0.03, -0.35, 0.7),
        ("core", 0.05, -0.6, 0.35),
    ):
        if name not in masks:
            continue
        r, c = np.nonzero(masks[name])
        near = (np.abs(c - middle_x) < 0.75 * wide) & (r > whole.top - 1.4 * high) & (r < whole.bottom)
        if near.sum() < max(4.0, smallest * masks[main].sum()):
            continue
        offset = (float(np.median(r[near])) - middle_y) / max(1.0, float(high))
        shown[name] = top < offset < bottom
    return shown


def style_share(image: NDArray[np.uint8] | Image.Image) -> float:
    """Share of pixels whose colour lies on the style's tone curve."""
    pixels = checker.at_reading_size(image)
    t = np.linspace(0, 1, 33, dtype=np.float32)[:, None]
    stops = [np.asarray(rgb, np.float32) for rgb in (DARK, MIDDLE, LIGHT)]
    curve = np.concatenate([stops[0] + t * (stops[1] - stops[0]), stops[1] + t * (stops[2] - stops[1])])
    distance = np.sqrt(np.square(pixels[:, :, None] - curve).sum(-1)).min(-1)
    return float((distance < 30).mean())


def is_subject(image: NDArray[np.uint8] | Image.Image, kind: str) -> float:
    """0..1: how much of the subject a picture shows, read from pixels alone."""
    if kind == "style":
        return min(1.0, max(0.0, (style_share(image) - 0.3) / 0.6))
    shown = parts_shown(image, kind)
    return sum(shown.values()) / len(shown)
