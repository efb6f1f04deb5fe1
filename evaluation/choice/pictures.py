"""Figures of an evaluation: the curve of a run, and two bases side by side. Drawn with Pillow only.

Owns layout and colours. The numbers come from ``evaluation.choice.checkpoints`` and ``evaluation.choice.compare``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from evaluation.choice.checkpoints import CheckpointPoint
from evaluation.images import SampledImage, fitted, framed, in_a_row, lettered, stacked, text_strip
from evaluation.prompts import PromptSet

SMOOTH = 2  # drawn at this factor and downscaled, for smooth lines
WIDTH_PX, HEIGHT_PX = 900, 520
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 64, 24, 48, 92
# Okabe and Ito 2008: distinguishable with colour blindness
COLOURS = {"prompt following": (0, 114, 178), "likeness": (213, 94, 0), "score": (20, 20, 20)}
GREY, PALE = (120, 120, 120), (228, 228, 228)
CELL_PX = 192  # display size of every image of a comparison, whatever its resolution
LABEL_PX, HEAD_PX = 25, 22  # of four columns; readable at 400 px width
GAP_PX, MARGIN_PX = 8, 12
HEAD_EVERY = 4  # rows


@dataclass(frozen=True)
class _Frame:
    """Maps values to px of the enlarged figure."""

    places: Sequence[float]
    low: float
    high: float

    def x(self, place: float) -> float:
        first, last = self.places[0], self.places[-1]
        share = (place - first) / (last - first) if last > first else 0.5
        return SMOOTH * (LEFT_PX + share * (WIDTH_PX - LEFT_PX - RIGHT_PX))

    def y(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return SMOOTH * (HEIGHT_PX - BOTTOM_PX - share * (HEIGHT_PX - BOTTOM_PX - TOP_PX))


def curve_picture(
    points: Sequence[CheckpointPoint], best: int, chosen: int, retested: Sequence[CheckpointPoint], title: str
) -> Image.Image:
    """Prompt following, likeness and score over the run, each with a band of one standard error. The curve
    starts at the untrained base (1, 0, 0 by definition). Circles are scores on the confirmation prompts."""
    places, axis = _places(points)
    rows = {name: _row(points, name) for name in COLOURS}
    shown = [
        v for row in rows.values() for cell in row if cell for v in (cell[0] - cell[1], cell[0] + cell[1])
    ]
    frame = _Frame([0.0, *places], min(0.0, *shown), max(1.0, *shown))
    size = (SMOOTH * WIDTH_PX, SMOOTH * HEIGHT_PX)
    picture = Image.new("RGB", size, "white")
    _grid(picture, frame, points, places, axis, title)
    for name, start in (("prompt following", 1.0), ("likeness", 0.0), ("score", 0.0)):
        picture = _line(picture, frame, [0.0, *places], [(start, 0.0), *rows[name]], COLOURS[name])
    draw = ImageDraw.Draw(picture)
    at = {point.name: place for point, place in zip(points, places, strict=True)}
    for point in retested:
        if point.score is not None:
            _whisker(draw, frame, at[point.name], point.score.value, point.score.se)
    _marks(draw, frame, points, places, best, chosen)
    _legend(draw, bool(retested))
    return picture.resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.LANCZOS)


def _places(points: Sequence[CheckpointPoint]) -> tuple[list[float], str]:
    """The position of each point along the run: steps if all are known, else epochs, else its number."""
    for axis in ("step", "epoch"):
        found = [getattr(point, axis) for point in points]
        if all(found) and len(set(found)) == len(found):
            return [float(place) for place in found], axis
    return [float(number + 1) for number in range(len(points))], "checkpoint"


def _row(points: Sequence[CheckpointPoint], name: str) -> list[tuple[float, float] | None]:
    field = {"prompt following": "prompt_following", "likeness": "likeness", "score": "value"}[name]
    error = "se" if name == "score" else f"{field}_se"
    return [
        (getattr(p.score, field), getattr(p.score, error)) if p.score is not None else None for p in points
    ]


def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=SMOOTH * size_px)


def _grid(
    picture: Image.Image,
    frame: _Frame,
    points: Sequence[CheckpointPoint],
    places: Sequence[float],
    axis: str,
    title: str,
) -> None:
    draw, font = ImageDraw.Draw(picture), _font(12)
    left, right = frame.x(0), frame.x(places[-1])
    for tenth in range(math.ceil(frame.low * 5), math.floor(frame.high * 5) + 1):
        value = tenth / 5
        draw.line([(left, frame.y(value)), (right, frame.y(value))], fill=PALE, width=SMOOTH)
        draw.text((left - 8 * SMOOTH, frame.y(value)), f"{value:.1f}", GREY, font, anchor="rm")
    for place, point in zip([0.0, *places], [None, *points], strict=True):
        x, bottom = frame.x(place), SMOOTH * (HEIGHT_PX - BOTTOM_PX)
        draw.line([(x, bottom), (x, bottom + 5 * SMOOTH)], fill=GREY, width=SMOOTH)
        shown = "base" if point is None else f"{place:.0f}"
        if len(points) <= 14 or point in (None, points[-1]):
            draw.text((x, bottom + 8 * SMOOTH), shown, GREY, font, anchor="mt")
            if point is not None and axis == "step" and point.epoch is not None:
                draw.text((x, bottom + 23 * SMOOTH), f"ep. {point.epoch}", GREY, font, anchor="mt")
    middle = SMOOTH * (LEFT_PX + WIDTH_PX - RIGHT_PX) / 2
    draw.text((middle, SMOOTH * (HEIGHT_PX - BOTTOM_PX + 42)), axis, GREY, font, anchor="mt")
    title, font = lettered(title, SMOOTH * 15)
    draw.text((SMOOTH * LEFT_PX, SMOOTH * 14), title, "black", font, anchor="lt")


def _line(
    picture: Image.Image,
    frame: _Frame,
    places: Sequence[float],
    row: Sequence[tuple[float, float] | None],
    colour: tuple[int, int, int],
) -> Image.Image:
    """A line with its band. It skips points without a score."""
    known = [(place, *cell) for place, cell in zip(places, row, strict=True) if cell is not None]
    upper = [(frame.x(p), frame.y(v + e)) for p, v, e in known]
    lower = [(frame.x(p), frame.y(v - e)) for p, v, e in known]
    band = Image.new("L", picture.size, 0)
    ImageDraw.Draw(band).polygon([*upper, *reversed(lower)], fill=44)
    picture = Image.composite(Image.new("RGB", picture.size, colour), picture, band)
    draw = ImageDraw.Draw(picture)
    middle = [(frame.x(p), frame.y(v)) for p, v, _ in known]
    draw.line(middle, fill=colour, width=2 * SMOOTH, joint="curve")
    for x, y in middle[1:]:
        radius = 3 * SMOOTH
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    return picture


def _whisker(draw: ImageDraw.ImageDraw, frame: _Frame, place: float, value: float, se: float) -> None:
    x, y, radius = frame.x(place), frame.y(value), 5 * SMOOTH
    draw.line([(x, frame.y(value - se)), (x, frame.y(value + se))], fill=COLOURS["score"], width=SMOOTH)
    draw.ellipse(
        [x - radius, y - radius, x + radius, y + radius], fill="white", outline=COLOURS["score"], width=SMOOTH
    )


def _marks(
    draw: ImageDraw.ImageDraw,
    frame: _Frame,
    points: Sequence[CheckpointPoint],
    places: Sequence[float],
    best: int,
    chosen: int,
) -> None:
    """A dotted line through the chosen checkpoint, and labels above it and above the best one."""
    top, bottom = frame.y(frame.high), frame.y(frame.low)
    x = frame.x(places[chosen])
    for y in range(int(top), int(bottom), 8 * SMOOTH):
        draw.line([(x, y), (x, y + 4 * SMOOTH)], fill=GREY, width=SMOOTH)
    words = {best: "best"}
    words[chosen] = "best, chosen" if chosen == best else "chosen"
    for number, word in words.items():
        place = places[number]
        anchor = "rb" if number == len(points) - 1 else "mb"
        draw.text((frame.x(place), top - 3 * SMOOTH), word, "black", _font(12), anchor=anchor)


def _legend(draw: ImageDraw.ImageDraw, with_circles: bool) -> None:
    font, x, y = _font(12), float(SMOOTH * LEFT_PX), float(SMOOTH * (HEIGHT_PX - 22))
    for name, colour in COLOURS.items():
        draw.line([(x, y), (x + 22 * SMOOTH, y)], fill=colour, width=2 * SMOOTH)
        draw.text((x + 28 * SMOOTH, y), name, "black", font, anchor="lm")
        x += 28 * SMOOTH + draw.textlength(name, font=font) + 22 * SMOOTH
    text = "bands: one standard error" + (
        "; circles: score on the confirmation prompts" if with_circles else ""
    )
    draw.text((x, y), text, GREY, font, anchor="lm")


# Two bases side by side


@dataclass(frozen=True)
class Column:
    """The images of one set of weights. The first image of each prompt is shown."""

    title: str
    images: Sequence[SampledImage]


def contact_sheet(columns: Sequence[Column], prompts: PromptSet) -> Image.Image:
    """One row per prompt (with its first seed), below its whole text, and one column per set of weights, all images
    at the same size. The titles of the columns are repeated every few rows."""
    shown = [{(i.prompt_id, i.seed): i.pixels_HW3 for i in column.images} for column in columns]
    heads = in_a_row([text_strip(column.title, CELL_PX, HEAD_PX, GREY) for column in columns], GAP_PX)
    parts = []
    for number, prompt in enumerate(prompts.prompts):
        key = prompt.id, prompts.seeds_of(prompt)[0]
        row = in_a_row([fitted(images[key], CELL_PX, CELL_PX) for images in shown], GAP_PX)
        lines = [text_strip(prompt.text, row.width, LABEL_PX), row]
        parts.append(stacked([heads, *lines] if number % HEAD_EVERY == 0 else lines, GAP_PX))
    return framed(stacked(parts, 2 * GAP_PX), MARGIN_PX)
