"""Aspect buckets: which size each image is trained at, by kohya's rules.

Owns the arithmetic from an image's size and the bucket settings to (bucket, size it is resized to, crop). Pure:
no files, no pixels.  The rules are those of sd-scripts' BucketManager, so the same folder gives the same buckets.

All sizes are (width, height) in px unless a name ends in ``_hw``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from trainer.config import TrainConfig
from trainer.errors import ConfigError

# Settings that decide at which size an image is trained. One of several datasets may have its own.
SIZE_SETTINGS = (
    "resolution",
    "resolution_height",
    "enable_bucket",
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_reso_steps",
    "bucket_no_upscale",
)
LATENT_CELL_PX = 8  # the VAEs of all supported families shrink a side by 8


@dataclass(frozen=True, order=True)
class Bucket:
    """A size that images are trained at."""

    width_px: int
    height_px: int

    def __str__(self) -> str:
        return f"{self.width_px}×{self.height_px}"


@dataclass(frozen=True)
class Fit:
    """How one image becomes its bucket: resized to this size, then cropped around the centre, or at ``crop`` (top,
    left)."""

    bucket: Bucket
    resized_width_px: int
    resized_height_px: int
    crop: tuple[int, int] | None = None

    @property
    def covers(self) -> bool:
        """Whether the resized image fills its bucket."""
        return (
            self.resized_width_px >= self.bucket.width_px and self.resized_height_px >= self.bucket.height_px
        )

    @property
    def crop_top_left(self) -> tuple[int, int]:
        """Rows and columns that the crop takes off in front."""
        if self.crop is not None:
            return self.crop
        return (
            (self.resized_height_px - self.bucket.height_px) // 2,
            (self.resized_width_px - self.bucket.width_px) // 2,
        )


@dataclass(frozen=True)
class BucketRules:
    """The settings that decide buckets, checked together."""

    width_px: int
    height_px: int
    enabled: bool
    shortest_px: int
    longest_px: int
    step_px: int
    no_upscale: bool

    @classmethod
    def of(cls, config: TrainConfig, own: tuple[tuple[str, Any], ...] = ()) -> BucketRules:
        """The rules in ``config``, and of the settings that one of several datasets has for itself (``own``);
        ConfigError if they contradict each other or the VAE."""
        return _rules(config, tuple(pair for pair in own if pair[0] in SIZE_SETTINGS))

    @classmethod
    def _checked(cls, config: TrainConfig) -> BucketRules:
        step = config.bucket_reso_steps
        width_px, height_px = config.size_px
        if config.enable_bucket and step % LATENT_CELL_PX:
            raise ConfigError(
                f"bucket_reso_steps = {step} is not a multiple of {LATENT_CELL_PX}", "use 64 or 32"
            )
        # sd-scripts rounds the shortest side down and the longest side up to whole steps.
        shortest = config.min_bucket_reso - config.min_bucket_reso % step
        longest = config.max_bucket_reso + -config.max_bucket_reso % step
        if config.enable_bucket and not config.bucket_no_upscale:
            if shortest > min(width_px, height_px):
                raise ConfigError(
                    f"min_bucket_reso {config.min_bucket_reso} is above resolution {min(width_px, height_px)}",
                    "lower min_bucket_reso, or set bucket_no_upscale = true, which does not use it",
                )
            if longest < max(width_px, height_px):
                raise ConfigError(
                    f"max_bucket_reso {config.max_bucket_reso} is below resolution {max(width_px, height_px)}",
                    "raise max_bucket_reso, or set bucket_no_upscale = true, which does not use it",
                )
        if config.enable_bucket and step > min(width_px, height_px):
            raise ConfigError(
                f"bucket_reso_steps {step} is above resolution {min(width_px, height_px)}",
                "lower bucket_reso_steps",
            )
        return cls(
            width_px,
            height_px,
            config.enable_bucket,
            max(shortest, step),
            longest,
            step,
            config.bucket_no_upscale,
        )

    @property
    def area_px(self) -> int:
        """The most pixels that a bucket has."""
        return self.width_px * self.height_px

    @property
    def size(self) -> str:
        """The resolution in words: 512, or 512×768."""
        return str(self.width_px) if self.width_px == self.height_px else f"{self.width_px}×{self.height_px}"

    def fit(self, width_px: int, height_px: int) -> Fit | None:
        """How an image of this size is trained; None if it is too small or too narrow to fill any bucket."""
        if self.enabled and self.no_upscale:
            width, height = self._shrunk(width_px, height_px)
            bucket = Bucket(width - width % self.step_px, height - height % self.step_px)
            return Fit(bucket, width, height) if bucket.width_px and bucket.height_px else None
        bucket = Bucket(self.width_px, self.height_px)
        if self.enabled:
            bucket = nearest_bucket(
                predefined_buckets(self.area_px, self.shortest_px, self.longest_px, self.step_px),
                width_px,
                height_px,
            )
        return Fit(bucket, *covering_size(width_px, height_px, bucket))

    def _shrunk(self, width_px: int, height_px: int) -> tuple[int, int]:
        """With bucket_no_upscale: the size an image is shrunk to.  One side becomes a whole number of steps –
        the side whose bucket then has the closer aspect ratio.  An image within the area keeps its size."""
        area = self.area_px
        if width_px * height_px <= area:
            return width_px, height_px
        aspect = width_px / height_px
        ideal_width = math.sqrt(area * aspect)
        by_width = self._whole_steps(ideal_width)
        by_height = self._whole_steps(area / ideal_width)
        error_by_width = _aspect_error(by_width, self._whole_steps(by_width / aspect), aspect)
        error_by_height = _aspect_error(self._whole_steps(by_height * aspect), by_height, aspect)
        if error_by_width < error_by_height:
            return by_width, int(by_width / aspect + 0.5)
        return int(by_height * aspect + 0.5), by_height

    def _whole_steps(self, size_px: float) -> int:
        rounded = int(size_px + 0.5)
        return rounded - rounded % self.step_px


def _aspect_error(width_px: int, height_px: int, aspect: float) -> float:
    """How far a bucket is from an image's aspect ratio; one without area is infinitely far."""
    return abs(width_px / height_px - aspect) if width_px and height_px else math.inf


@lru_cache(maxsize=64)
def _rules(config: TrainConfig, own: tuple[tuple[str, Any], ...]) -> BucketRules:
    return BucketRules._checked(config.with_values(dict(own)) if own else config)


@cache
def predefined_buckets(area_px: int, shortest_px: int, longest_px: int, step_px: int) -> tuple[Bucket, ...]:
    """All buckets of about this area between both side limits, sorted by width (sd-scripts'
    make_bucket_resolutions, for which only the area of a resolution matters)."""
    square = math.isqrt(area_px) // step_px * step_px
    buckets = {Bucket(square, square)}
    for width in range(shortest_px, longest_px + 1, step_px):
        height = min(longest_px, area_px // width // step_px * step_px)
        if height >= shortest_px:
            buckets |= {Bucket(width, height), Bucket(height, width)}
    return tuple(sorted(buckets))


def nearest_bucket(buckets: tuple[Bucket, ...], width_px: int, height_px: int) -> Bucket:
    """The bucket of exactly this size, else the one of nearest aspect ratio (the first of equals)."""
    exact = Bucket(width_px, height_px)
    if exact in buckets:
        return exact
    aspect = width_px / height_px
    return min(buckets, key=lambda bucket: abs(bucket.width_px / bucket.height_px - aspect))


def covering_size(width_px: int, height_px: int, bucket: Bucket) -> tuple[int, int]:
    """The smallest size of an image's shape that covers a bucket."""
    if width_px * bucket.height_px > bucket.width_px * height_px:
        scale = bucket.height_px / height_px
    else:
        scale = bucket.width_px / width_px
    return max(bucket.width_px, int(width_px * scale + 0.5)), max(
        bucket.height_px, int(height_px * scale + 0.5)
    )
