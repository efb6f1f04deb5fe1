"""Ground truth: reads a scene's attributes back from pixels, without any learned model.

Owns the reading of background, object mask, colour, shape, place, size, pattern, relation and figure parts.
It is told what kind of scene to look for (single, pair, figure), never the answer. Every picture is read at
64 px. numpy + Pillow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.bases.miniature import world
from trainer.bases.miniature.world import Array, Scene

READ_PX = 64
CELLS = 20  # masks are compared on a grid of CELLS × CELLS over their bounding box
TEXTURE = 16.0  # how far a ground's texture moves its grey value
DIFFERENT = 28.0  # RGB distance from the ground from which a pixel belongs to an object
SMALLEST_AREA = 14  # pixels
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Blob:
    """One connected object: its mask and its bounding box (half open, in pixels)."""

    mask_HW: Mask
    top: int
    bottom: int
    left: int
    right: int

    @property
    def centre(self) -> tuple[float, float]:
        return (self.left + self.right) / 2 / READ_PX, (self.top + self.bottom) / 2 / READ_PX


def at_reading_size(image: NDArray[np.uint8] | Image.Image) -> Array:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture = picture.convert("RGB")
    if picture.size != (READ_PX, READ_PX):
        picture = picture.resize((READ_PX, READ_PX), Image.Resampling.BOX)
    return np.asarray(picture, np.float32)


def read_background(pixels_HW3: Array) -> str:
    """The ground that most pixels are nearest to, object colours competing."""
    palette = np.array(
        [*world.BACKGROUNDS.values(), *world.COLOURS.values(), *world.SECOND.values()], np.float32
    )
    distance = np.square(pixels_HW3[:, :, None] - palette).sum(-1)
    counts = np.bincount(distance.argmin(-1).ravel(), minlength=len(palette))[: len(world.BACKGROUNDS)]
    return list(world.BACKGROUNDS)[int(counts.argmax())]


def _spread(mask: Mask) -> Mask:
    padded = np.pad(mask, 1)
    out = padded[1:-1, 1:-1].copy()
    for dy in (0, 1, 2):
        for dx in (0, 1, 2):
            out |= padded[dy : dy + mask.shape[0], dx : dx + mask.shape[1]]
    return out


def _shrink(mask: Mask) -> Mask:
    return ~_spread(~mask)


def ground_colour(pixels_HW3: Array, background: str) -> Array:
    ground = np.asarray(world.BACKGROUNDS[background], np.float32)
    near = np.abs(pixels_HW3 - ground).max(-1) < 45
    return np.median(pixels_HW3[near], axis=0) if near.any() else ground


def object_mask(pixels_HW3: Array, ground_3: Array) -> Mask:
    """Where the picture differs from its ground by more than texture."""
    delta = pixels_HW3 - ground_3
    delta = delta - np.clip(delta.mean(-1, keepdims=True), -TEXTURE, TEXTURE)
    return np.sqrt(np.square(delta).sum(-1)) > DIFFERENT


def blobs(raw_HW: Mask) -> list[Blob]:
    """Connected objects, largest first; gaps of one or two pixels are closed."""
    mask_HW = _shrink(_spread(raw_HW))
    label = np.where(mask_HW, np.arange(1, mask_HW.size + 1).reshape(mask_HW.shape), 0)
    while True:
        padded = np.pad(label, 1)
        best = label
        for dy, dx in ((0, 1), (1, 0), (1, 2), (2, 1)):
            best = np.maximum(best, padded[dy : dy + label.shape[0], dx : dx + label.shape[1]])
        best = np.where(mask_HW, best, 0)
        best = np.where(mask_HW, best.ravel()[np.maximum(best - 1, 0)], 0)  # jump to the label of one's label
        if (best == label).all():
            break
        label = best
    found = []
    for value, area in zip(*np.unique(label[label > 0], return_counts=True), strict=True):
        if area >= SMALLEST_AREA:
            found.append((int(area), bounding_box(label == value)))
    return [blob for _, blob in sorted(found, key=lambda item: -item[0])]


def bounding_box(mask: Mask) -> Blob:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return Blob(mask, int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)


def _cells(mask: Mask, blob: Blob) -> Mask:
    """The mask inside the blob's box, sampled on the comparison grid."""
    y = blob.top + ((np.arange(CELLS) + 0.5) / CELLS * (blob.bottom - blob.top)).astype(int)
    x = blob.left + ((np.arange(CELLS) + 0.5) / CELLS * (blob.right - blob.left)).astype(int)
    return mask[np.ix_(y, x)]


@lru_cache(maxsize=1)
def _shape_templates() -> dict[str, list[tuple[Mask, float]]]:
    """Per shape: cells and box size in radii, as small and large objects of the reading size look."""
    out: dict[str, list[tuple[Mask, float]]] = {}
    x, y = world.grid(READ_PX)
    for shape in world.SHAPES:
        out[shape] = []
        for radius in (world.PAIR_RADIUS * 0.9, world.PAIR_RADIUS, world.SIZES["large"]):
            for shift in (0.0, 0.25 / READ_PX, 0.5 / READ_PX):
                mask = world.shape_field(shape, (x - 0.5 - shift) / radius, (y - 0.5 - shift) / radius) < 0
                blob = bounding_box(mask)
                extent = max(blob.bottom - blob.top, blob.right - blob.left) / READ_PX / radius
                out[shape].append((_cells(mask, blob), extent))
    return out


def _overlap(a: Mask, b: Mask) -> float:
    return float((a & b).sum()) / max(1.0, float((a | b).sum()))


def read_shape(blob: Blob, raw_HW: Mask) -> tuple[str, float]:
    """The best fitting shape and the object's radius in units of the picture.

    The mask is tried with its gaps closed (stripes near the ground's colour) and open (a small ring's hole).
    """
    scored = [
        (_overlap(cells, template), shape, extent)
        for cells in (_cells(blob.mask_HW, blob), _cells(blob.mask_HW & raw_HW, blob))
        for shape, templates in _shape_templates().items()
        for template, extent in templates
    ]
    _, shape, extent = max(scored)
    return shape, max(blob.bottom - blob.top, blob.right - blob.left) / READ_PX / extent


def _off_line(pixels: Array, colour: str) -> tuple[Array, Array]:
    """Distance of pixels from the line between a colour's two tones, and their place on it (0 = first tone)."""
    a = np.asarray(world.COLOURS[colour], np.float32)
    axis = np.asarray(world.SECOND[colour], np.float32) - a
    t = np.clip((pixels - a) @ axis / float(axis @ axis), 0, 1)
    return np.sqrt(np.square(pixels - a - t[..., None] * axis).sum(-1)), t


def read_colour(pixels_HW3: Array, mask_HW: Mask) -> str:
    """The colour on whose line of tones the pixels lie."""
    inner = _shrink(mask_HW)
    chosen = pixels_HW3[inner if inner.sum() >= 6 else mask_HW]

    def miss(colour: str) -> float:
        distance, t = _off_line(chosen, colour)
        return float(np.minimum(distance, 120).mean() + 12 * t.mean())

    return min(world.COLOURS, key=miss)


def has_hole(pixels_HW3: Array, blob: Blob, colour: str, ground_3: Array) -> bool:
    """Does the ground show in the middle of the object? (A blurred small ring's mask has no hole left.)"""
    y, x = (blob.top + blob.bottom) // 2, (blob.left + blob.right) // 2
    middle, _ = _off_line(pixels_HW3[y - 1 : y + 1, x - 1 : x + 1], colour)
    ground, _ = _off_line(ground_3, colour)
    return float(middle.mean()) > 0.5 * float(ground)


def read_pattern(pixels_HW3: Array, mask_HW: Mask, colour: str) -> str:
    inner = _shrink(mask_HW)
    inner = inner if inner.sum() >= 12 else mask_HW
    _, t_HW = _off_line(pixels_HW3, colour)
    t = t_HW[inner]
    if (t > 0.4).mean() < 0.1:
        return "plain"
    rows = inner.sum(1)
    means = np.divide((t_HW * inner).sum(1), rows, out=np.zeros(READ_PX, np.float32), where=rows > 0)
    explained = float((rows * np.square(means - t.mean())).sum() / max(1e-6, np.square(t - t.mean()).sum()))
    return "striped" if explained > 0.5 else "dotted"


def _nearest_place(x: float, y: float, vertical: float = 1.0) -> str:
    def miss(place: str) -> float:
        px, py = world.PLACES[place]
        return (x - px) ** 2 + (y - 0.5 - (py - 0.5) * vertical) ** 2

    return min(world.PLACES, key=miss)


def _read_thing(pixels_HW3: Array, blob: Blob, raw_HW: Mask, ground_3: Array) -> dict[str, str]:
    shape, radius = read_shape(blob, raw_HW)
    colour = read_colour(pixels_HW3, blob.mask_HW)
    if shape == "circle" and has_hole(pixels_HW3, blob, colour, ground_3):
        shape = "ring"
    size = min(world.SIZES, key=lambda s: abs(np.log(radius / world.SIZES[s])))
    return {"shape": shape, "colour": colour, "size": size}


@lru_cache(maxsize=1)
def _figure_templates() -> list[tuple[tuple[str, str, str], dict[str, Mask], Mask, float, float, float]]:
    """Parts on the comparison grid, silhouette, aspect, box height and the middle's offset, in half heights."""
    out = []
    x, y = world.grid(128)
    half = 0.4
    for body in world.BODIES:
        for head in world.HEADS:
            for hat in world.HATS:
                fields = world.figure_fields(body, head, hat, (x - 0.5) / half, (y - 0.5) / half)
                parts: dict[str, Mask] = {}
                for name, field in fields.items():  # later parts cover earlier ones
                    parts = {k: m & ~(field < 0) for k, m in parts.items()}
                    parts[name] = field < 0
                whole = np.any(list(parts.values()), axis=0)
                box = bounding_box(whole)
                height, width = box.bottom - box.top, box.right - box.left
                middle = ((box.top + box.bottom) / 2 / 128 - 0.5) / half
                cells = {k: _cells(m, box) for k, m in parts.items()}
                out.append(
                    (
                        (body, head, hat),
                        cells,
                        _cells(whole, box),
                        height / width,
                        height / 128 / half,
                        middle,
                    )
                )
    return out


def read_figure(pixels_HW3: Array, blob: Blob) -> dict[str, str]:
    silhouette = _cells(blob.mask_HW, blob)
    y = blob.top + ((np.arange(CELLS) + 0.5) / CELLS * (blob.bottom - blob.top)).astype(int)
    x = blob.left + ((np.arange(CELLS) + 0.5) / CELLS * (blob.right - blob.left)).astype(int)
    pixels = pixels_HW3[np.ix_(y, x)]
    palette = np.array(list(world.COLOURS.values()), np.float32)
    nearest = np.square(pixels[:, :, None] - palette).sum(-1).argmin(-1)
    aspect = (blob.bottom - blob.top) / (blob.right - blob.left)
    best: tuple[float, dict[str, str]] | None = None
    for (body, head, hat), parts, whole, template_aspect, height, middle in _figure_templates():
        colours, fit = {}, 0.0
        for name, cells in parts.items():
            winner = int(np.bincount(nearest[cells], minlength=len(palette)).argmax())
            colours[name] = list(world.COLOURS)[winner]
            fit += _overlap((nearest == winner) & silhouette, cells) / len(parts)
        same = sum(colours[a] == colours[b] for a, b in (("body", "head"), ("head", "hat")) if b in colours)
        score = _overlap(silhouette, whole) + fit - 0.5 * abs(np.log(aspect / template_aspect)) - 0.3 * same
        if best is None or score > best[0]:
            half = (blob.bottom - blob.top) / READ_PX / height
            size = min(world.FIGURE_SCALE, key=lambda s: abs(np.log(half / world.FIGURE_SCALE[s])))
            place = _nearest_place(blob.centre[0], blob.centre[1] - middle * half, 0.75)
            reading = {"body": body, "head": head, "hat": hat, "size": size, "place": place}
            reading |= {f"{name}_colour": colour for name, colour in colours.items()}
            best = (score, reading)
            stands = (blob.centre[0], blob.centre[1] - middle * half), half
    assert best is not None
    reading = best[1]
    return reading | {
        "head": min(world.HEADS, key=lambda h: _head_miss(pixels_HW3, reading | {"head": h}, *stands))
    }


def _head_miss(
    pixels_HW3: Array, reading: dict[str, str], middle_xy: tuple[float, float], half: float
) -> float:
    """How badly this figure, drawn where it seems to stand, fits the pixels around its head.

    A round and a square head differ by a few pixels only, so both are drawn and compared.
    """
    x, y = world.grid(READ_PX)
    rows = slice(
        max(0, int((middle_xy[1] - 0.6 * half) * READ_PX)), int((middle_xy[1] + 0.12 * half) * READ_PX) + 1
    )
    columns = slice(
        max(0, int((middle_xy[0] - 0.5 * half) * READ_PX)), int((middle_xy[0] + 0.5 * half) * READ_PX) + 1
    )
    window = pixels_HW3[rows, columns]
    ground = np.asarray(world.BACKGROUNDS[read_background(pixels_HW3)], np.float32)
    best = np.inf
    for dx in (-0.012, -0.006, 0.0, 0.006, 0.012):
        for dy in (-0.012, 0.0, 0.012):
            for scale in (0.95, 1.0, 1.05):
                u = (x[:, columns] - middle_xy[0] - dx) / (half * scale)
                v = (y[rows] - middle_xy[1] - dy) / (half * scale)
                canvas = np.broadcast_to(ground, window.shape).copy()
                fields = world.figure_fields(reading["body"], reading["head"], reading["hat"], u, v)
                for name, field in fields.items():
                    colour = reading.get(f"{name}_colour")
                    if colour is not None:
                        cover = world.coverage(field, 1.0 / (READ_PX * half))
                        world.paint(canvas, cover, world.COLOURS[colour])
                best = min(best, float(np.abs(canvas - window).mean()))
    return best


def read(image: NDArray[np.uint8] | Image.Image, kind: str) -> dict[str, str]:
    """What a picture shows, read as a single object, a pair or a figure. Missing objects leave keys out.

    A pair is read from left to right, or from top to bottom if it stands that way; its second object's
    keys end in _2.
    """
    pixels = at_reading_size(image)
    background = read_background(pixels)
    ground = ground_colour(pixels, background)
    raw = object_mask(pixels, ground)
    found = blobs(raw)
    out = {"background": background}
    if not found:
        return out
    if kind == "figure":
        return out | read_figure(pixels, _together(found))
    if kind == "single":
        out |= _read_thing(pixels, found[0], raw, ground)
        out["place"] = _nearest_place(*found[0].centre)
        out["pattern"] = read_pattern(pixels, found[0].mask_HW, out["colour"])
        return out
    if len(found) < 2:
        thing = _read_thing(pixels, found[0], raw, ground)
        return out | {"shape": thing["shape"], "colour": thing["colour"]}
    first, second = found[:2]
    dx, dy = second.centre[0] - first.centre[0], second.centre[1] - first.centre[1]
    if (dx if abs(dx) > abs(dy) else dy) < 0:
        first, second = second, first
    a, b = _read_thing(pixels, first, raw, ground), _read_thing(pixels, second, raw, ground)
    out |= {"shape": a["shape"], "colour": a["colour"], "shape_2": b["shape"], "colour_2": b["colour"]}
    out["relation"] = "left of" if abs(dx) > abs(dy) else "above"
    return out


def _together(found: list[Blob]) -> Blob:
    """A figure may fall apart at its neck: join the blobs that stand over one another."""
    main = found[0]
    mask = main.mask_HW
    for other in found[1:]:
        if abs(other.centre[0] - main.centre[0]) < 0.12 and abs(other.centre[1] - main.centre[1]) < 0.4:
            mask = mask | other.mask_HW
    return bounding_box(mask)


def expected(scene: Scene) -> dict[str, str]:
    """The scene in the keys of `read`."""
    out = {"background": scene.background}
    if scene.kind == "pair":
        first, second = scene.things
        relation = scene.relation
        if relation in ("below", "right of"):
            first, second = second, first
        out["relation"] = "above" if relation in ("above", "below") else "left of"
        return out | {
            "shape": first.shape,
            "colour": first.colour,
            "shape_2": second.shape,
            "colour_2": second.colour,
        }
    out |= {"place": scene.place, "size": scene.size}
    if scene.kind == "single":
        thing = scene.things[0]
        return out | {"shape": thing.shape, "colour": thing.colour, "pattern": thing.pattern}
    figure = scene.figure
    assert figure is not None
    out |= {"body": figure.body, "head": figure.head, "hat": figure.hat}
    out |= {"body_colour": figure.body_colour, "head_colour": figure.head_colour}
    return out if figure.hat == "none" else out | {"hat_colour": figure.hat_colour}


def check(image: NDArray[np.uint8] | Image.Image, scene: Scene) -> dict[str, bool]:
    """Per attribute: does the picture show what the scene says?

    In a pair the objects are matched to the caption's by their looks; the relation is then right if they
    stand as the caption says. `shape` and `colour` are right if both objects' are.
    """
    seen, want = read(image, scene.kind), expected(scene)
    if scene.kind != "pair":
        return {key: seen.get(key) == value for key, value in want.items()}

    def hits(swap: bool) -> dict[str, bool]:
        names = ("shape", "colour", "shape_2", "colour_2")
        other = ("shape_2", "colour_2", "shape", "colour")
        return {a: seen.get(b) == want[a] for a, b in zip(names, other if swap else names, strict=True)}

    straight, swapped = hits(False), hits(True)
    in_order = sum(straight.values()) >= sum(swapped.values())
    best = straight if in_order else swapped
    return {
        "background": seen["background"] == want["background"],
        "shape": best["shape"] and best["shape_2"],
        "colour": best["colour"] and best["colour_2"],
        "relation": in_order and seen.get("relation") == want["relation"],
    }
