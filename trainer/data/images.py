"""Reading training images safely, and bringing them to a bucket's size.

Owns opening a picture from an untrusted file (formats, pixel limit, rotation, odd colour modes) and its crop. Does not
own resizing (``trainer.data.resampling``).

Shapes: H W pixels; 3 colour channels; uint8.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from trainer.data.buckets import Fit
from trainer.data.resampling import resampled
from trainer.errors import DataError
from trainer.text import clean_text

IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
# Recognised by content, whatever the extension says; no format that runs other programs (EPS) or has no end
# (PSD).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
TRANSPARENT, TURNED, DEEP = "transparent", "turned", "16-bit"  # traits of an image
MAX_PIXELS = 178_956_970  # where Pillow calls an image a decompression bomb: 512 MiB as RGB
MAX_FILE_BYTES = 1 << 30  # no image below MAX_PIXELS needs more
# Pillow warns at half its limit; here the limit itself refuses.  Filters cannot be changed per thread.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Picture:
    """A decoded image: upright, RGB, with the sha256 of the file it came from.  ``alpha_HW`` is how opaque
    each pixel is (uint8), if the image says so.  ``mode`` is Pillow's name of the file's own colours."""

    pixels_HW3: np.ndarray
    sha256: str
    alpha_HW: np.ndarray | None = None
    mode: str = "RGB"
    is_turned: bool = False  # the file lies on its side and says so (EXIF)
    frames: int = 1

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height)"""
        height, width = self.pixels_HW3.shape[:2]
        return width, height

    @property
    def traits(self) -> tuple[str, ...]:
        """What is odd about the file, of what sd-scripts reads otherwise."""
        odd = {
            TRANSPARENT: self.alpha_HW is not None and bool((self.alpha_HW < 255).any()),
            TURNED: self.is_turned,
            DEEP: self.mode.startswith("I"),
        }
        return tuple(name for name, applies in odd.items() if applies)


def is_image(path: Path) -> bool:
    """Whether a file's ending says that it is an image that can be read."""
    return path.suffix.lower() in IMAGE_EXTENSIONS and not path.is_dir()


def read_picture(path: Path) -> Picture:
    """Decode an image file completely.  DataError names the file if it is broken, too large or no image."""
    shown = clean_text(str(path))
    try:
        if not path.is_file():
            raise DataError(f"{shown} is not a file", "remove it")
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            raise DataError(
                f"{shown} is {size_bytes / 1e9:.1f} GB", "training images are a few MB; shrink or remove it"
            )
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {shown}: {error.strerror}", "check that the file is there and readable"
        ) from error
    if not data:
        raise DataError(f"{shown} is empty", "replace or remove it")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            mode, frames = image.mode, int(getattr(image, "n_frames", 1))
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            upright = ImageOps.exif_transpose(image)
            pixels, alpha = _as_rgb(upright), _alpha(upright)
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{shown} has more than {MAX_PIXELS / 1e6:.0f} million pixels", "shrink or remove it"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"{shown} is not a PNG, JPEG, WebP or BMP image", "replace, convert or remove it"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes: OSError, SyntaxError, …
        raise DataError(
            f"{shown} is a corrupt image ({clean_text(str(error))})", "replace or remove it"
        ) from error
    return Picture(pixels, hashlib.sha256(data).hexdigest(), alpha, mode, is_turned, frames)


def fit_pixels(picture: Picture, fit: Fit, method: str | None = None) -> np.ndarray:
    """The picture resized and cropped to its bucket: uint8 (H, W, 3). ``method`` is resize_interpolation."""
    return fit_values(picture.pixels_HW3, fit, method)


def fit_values(pixels: np.ndarray, fit: Fit, method: str | None = None) -> np.ndarray:
    """``fit_pixels`` for any uint8 array (H, W) or (H, W, 3)."""
    size = (fit.resized_width_px, fit.resized_height_px)
    height, width = pixels.shape[:2]
    if (width, height) != size:
        pixels = resampled(pixels, *size, method)
    top, left = fit.crop_top_left
    return pixels[top : top + fit.bucket.height_px, left : left + fit.bucket.width_px]


def _alpha(image: Image.Image) -> np.ndarray | None:
    """uint8 (H, W), 255 is opaque; None for an image that has no transparency."""
    if not _is_layered(image):
        return None
    return np.array(image.convert("RGBA"))[..., 3]


def _is_layered(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _as_rgb(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of an image in any mode; what is transparent becomes white."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):  # 16-bit greyscale: Pillow's own conversion clips it
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if _is_layered(image):
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layered)
    return np.array(image.convert("RGB"))
