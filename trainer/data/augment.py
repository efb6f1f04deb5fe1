"""What is changed about an image each time it is trained: the place of its crop, its hue or its gamma.

Everything is a function of (seed, epoch, image, occurrence), so a resumed run sees the same images. Pure: no files, no
torch.  Shapes: H W pixels, 3 colour channels, uint8.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np

from trainer.config import TrainConfig
from trainer.data.buckets import Fit
from trainer.data.dataset import Item

DRAWN_ANEW = ("random_crop", "color_aug")  # settings for which a latent cannot be kept
# Of sd-scripts' AugHelper.color_aug (library/train_util.py)
COLOUR_SHARE = 0.33  # of the images are changed, half of them in hue, half in gamma
HUE_DEGREES = 16.0  # at most, either way: 8 of OpenCV's 180 steps
GAMMA = (0.95, 1.05)  # exponent of values 0 to 255, as they are


@dataclass(frozen=True)
class Colour:
    """A change of all pixels: ``hue_degrees`` turns the hue; each value becomes value ** ``gamma``."""

    hue_degrees: float = 0.0
    gamma: float = 1.0

    def apply(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """The changed pixels, uint8 (H, W, 3)."""
        if self.hue_degrees:
            return _turned(pixels_HW3, self.hue_degrees)
        if self.gamma != 1.0:
            table = np.clip(np.arange(256, dtype=np.float64) ** self.gamma, 0, 255).astype(np.uint8)
            return table[pixels_HW3]
        return pixels_HW3


def is_drawn_anew(item: Item, config: TrainConfig) -> bool:
    """Whether an item is another image each time, so that its latent cannot be kept."""
    return any(item.setting(config, name) for name in DRAWN_ANEW)


def drawn_crop(item: Item, config: TrainConfig, fit: Fit, draw: random.Random) -> Fit:
    """``fit`` with random_crop's place: any that keeps the bucket inside the image is as likely (sd-scripts'
    trim_and_resize_if_required)."""
    if not item.setting(config, "random_crop"):
        return fit
    left = draw.randint(0, fit.resized_width_px - fit.bucket.width_px)
    top = draw.randint(0, fit.resized_height_px - fit.bucket.height_px)
    return replace(fit, crop=(top, left))


def drawn_colour(item: Item, config: TrainConfig, draw: random.Random) -> Colour:
    """color_aug's change: none for two thirds of the images (sd-scripts' AugHelper.color_aug)."""
    if not item.setting(config, "color_aug") or draw.random() > COLOUR_SHARE:
        return Colour()
    if draw.random() > 0.5:
        return Colour(hue_degrees=draw.uniform(-HUE_DEGREES, HUE_DEGREES))
    return Colour(gamma=draw.uniform(*GAMMA))


def _turned(pixels_HW3: np.ndarray, degrees: float) -> np.ndarray:
    """Every pixel with its hue turned; saturation and value (HSV) stay.

    OpenCV, which sd-scripts uses, rounds hue to 2° and saturation to 1/255 in between.
    """
    values = pixels_HW3.astype(np.float32)
    top, low = values.max(axis=2), values.min(axis=2)
    spread = top - low
    safe = np.where(spread > 0, spread, 1)
    red, green, blue = (values[..., channel] for channel in range(3))
    hue = np.select(
        [top == red, top == green],
        [(green - blue) / safe, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    hue = hue + np.float32(degrees / 60)
    channels = []
    for offset in (5, 3, 1):  # f(n) = v − v·s·max(0, min(k, 4 − k, 1)), k = (n + h) mod 6
        k = (offset + hue) % 6
        channels.append(top - spread * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.rint(np.stack(channels, axis=2)).clip(0, 255).astype(np.uint8)
