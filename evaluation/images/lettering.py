"""Text on pictures: a font that can show it, whole lines, and strips that are stacked to a sheet.

Pillow's built-in font (Aileron) has ASCII and a few signs. Other text is set in the first installed font that has
all its letters; without one, accents are dropped and other letters become ``?``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.text import clean_text

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]
BLACK, GREY, RED = (0, 0, 0), (100, 100, 100), (190, 0, 0)
# Usual names of fonts with many letters, looked for where the system keeps its fonts.
OTHER_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "DroidSansFallbackFull.ttf", "wqy-zenhei.ttc")
SIMPLER = str.maketrans({"–": "-", "—": "-", "×": "x", "→": ">"})
LACKING = "?"
TIED = "\u00a0"  # a space at which no line ends
LINE = 1.3  # height of a line, in font sizes


@lru_cache(maxsize=64)
def font_of(size_px: int, name: str = "") -> Font | None:
    """The built-in font, or an installed one; None if it is not installed."""
    if not name:
        return ImageFont.load_default(size=size_px)
    try:
        return ImageFont.truetype(name, size_px)
    except OSError:
        return None


@lru_cache(maxsize=4096)
def _has(name: str, letter: str) -> bool:
    font = font_of(24, name)
    assert font is not None
    drawn, box = font.getmask(letter), font.getmask("\uffff")  # no font has U+FFFF: it draws its empty box
    return letter == TIED or (drawn.size, bytes(drawn)) != (box.size, bytes(box))


def lettered(text: str, size_px: int) -> tuple[str, Font]:
    """``text`` as it can be shown, and the font for it."""
    text = clean_text(text)
    for name in ("", *OTHER_FONTS):
        font = font_of(size_px, name)
        shown = text if name else text.translate(SIMPLER)
        if font is not None and all(_has(name, letter) for letter in shown):
            return shown, font
    shown = "".join(_simpler(letter) for letter in text.translate(SIMPLER))
    font = font_of(size_px)
    assert font is not None
    return shown, font


def _simpler(letter: str) -> str:
    """A letter as the built-in font can show it: without its accent, or as LACKING."""
    if _has("", letter):
        return letter
    parts = (c for c in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(c))
    return "".join(c if _has("", c) else LACKING for c in parts)


def lines_of(text: str, width_px: float, font: Font) -> list[str]:
    """The whole text in lines of at most this width, broken at spaces; longer words anywhere."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width_px:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width_px:
                lines.append("")
            lines[-1] += letter
    return lines


def text_strip(text: str, width_px: int, size_px: int, colour: Colour = BLACK) -> Image.Image:
    """The whole text, wrapped, on white."""
    shown, font = lettered(text, size_px)
    lines = lines_of(shown, width_px, font)
    high_px = round(LINE * size_px)
    strip = Image.new("RGB", (width_px, high_px * len(lines)), "white")
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        draw.text((0, number * high_px), line.replace(TIED, " "), colour, font)
    return strip


def stacked(parts: Sequence[Image.Image], gap_px: int = 0) -> Image.Image:
    """Pictures below each other, left-aligned, on white."""
    size = max(p.width for p in parts), sum(p.height for p in parts) + gap_px * (len(parts) - 1)
    sheet = Image.new("RGB", size, "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height + gap_px
    return sheet


def in_a_row(parts: Sequence[Image.Image], gap_px: int) -> Image.Image:
    """Pictures side by side on white, aligned at the bottom."""
    size = sum(p.width for p in parts) + gap_px * (len(parts) - 1), max(p.height for p in parts)
    sheet = Image.new("RGB", size, "white")
    left = 0
    for part in parts:
        sheet.paste(part, (left, size[1] - part.height))
        left += part.width + gap_px
    return sheet


def framed(picture: Image.Image, margin_px: int) -> Image.Image:
    """The picture with a white margin."""
    sheet = Image.new("RGB", (picture.width + 2 * margin_px, picture.height + 2 * margin_px), "white")
    sheet.paste(picture, (margin_px, margin_px))
    return sheet


def fitted(pixels_HW3: np.ndarray, width_px: int, height_px: int) -> Image.Image:
    """An image in the middle of a cell. Small images are enlarged by whole factors, without smoothing, first."""
    picture = Image.fromarray(pixels_HW3)
    scale = min(width_px / picture.width, height_px / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    if scale > 1:
        picture = picture.resize(
            (picture.width * -int(-scale // 1), picture.height * -int(-scale // 1)), Image.Resampling.NEAREST
        )
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BOX if scale > 1 else Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (width_px, height_px), "white")
    cell.paste(picture, ((width_px - size[0]) // 2, (height_px - size[1]) // 2))
    return cell
