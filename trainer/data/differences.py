"""What differs from sd-scripts for these images and settings, in lines to read before a run.

Owns the lines about data, loss and order of training; docs/kohya-differences.md explains each. Differences of networks
and optimizers are said where they are translated (``trainer.kohya``). Pure.
"""

from __future__ import annotations

from collections import Counter

from trainer.config import TrainConfig
from trainer.data.buckets import Bucket
from trainer.data.captions import CaptionRules
from trainer.data.dataset import Dataset, Item
from trainer.data.epoch import assign_buckets
from trainer.data.images import DEEP, TRANSPARENT, TURNED

_IMAGES = {
    TRANSPARENT: "partly transparent: white is put behind; sd-scripts shows the colours that lie hidden",
    TURNED: "stored on the side: turned upright by the EXIF mark; sd-scripts trains what is stored",
    DEEP: "16-bit grey: shortened to 8 bits; sd-scripts clips the values, mostly to white",
}


def differences(config: TrainConfig, data: Dataset) -> tuple[str, ...]:
    """The lines that apply to these settings and images, in which the result is deliberately not that of
    sd-scripts. Raises DataError for images that fill no bucket."""
    return (
        *_of_images(data),
        *_of_steps(config, data),
        *_of_captions(config, data),
        *_of_noise(config, data),
    )


def _of_images(data: Dataset) -> list[str]:
    counts = Counter(trait for item in _distinct(data) for trait in item.traits)
    return [f"{_images(counts[trait])} {words}" for trait, words in _IMAGES.items() if counts[trait]]


def _distinct(data: Dataset) -> list[Item]:
    return list({item.path: item for item in data.items}.values())


def _images(count: int) -> str:
    return "one image is" if count == 1 else f"{count} images are"


def _of_steps(config: TrainConfig, data: Dataset) -> list[str]:
    if config.gradient_accumulation_steps == 1:
        return []
    buckets = assign_buckets(data.items, config)
    samples: Counter[tuple[int, Bucket]] = Counter()
    sizes = {}
    for item in data.items:
        place = (item.dataset, buckets[item.key])
        samples[place] += item.repeats
        sizes[place] = item.setting(config, "train_batch_size")
    found = []
    if any(count % sizes[place] for place, count in samples.items()):
        found.append(
            "a bucket's last batch has fewer images: each image of an optimizer step weighs the same; in sd-scripts "
            "each batch does, so an image in a small batch weighs more"
        )
    batches = sum(-(-count // sizes[place]) for place, count in samples.items())
    if batches % config.gradient_accumulation_steps:
        found.append(
            f"an epoch's last optimizer step has {batches % config.gradient_accumulation_steps} of "
            f"{config.gradient_accumulation_steps} batches: it is the mean of its images; sd-scripts divides it by "
            f"{config.gradient_accumulation_steps}, so it counts less"
        )
    return found


def _of_captions(config: TrainConfig, data: Dataset) -> list[str]:
    rules = [CaptionRules.of(config, own) for own in dict.fromkeys(item.own for item in data.items)]
    found = []
    if not config.trains_text_encoder and any(r.caption_prefix or r.caption_suffix for r in rules):
        found.append(
            "caption_prefix and caption_suffix are used, also where captions are encoded once; sd-scripts leaves them "
            "out with cache_text_encoder_outputs"
        )
    if any(rule.draws_tags and rule.caption_separator.strip() != "," for rule in rules):
        found.append(
            "shuffled tags keep caption_separator between them; sd-scripts before June 2026 puts a comma there"
        )
    return found


def _of_noise(config: TrainConfig, data: Dataset) -> list[str]:
    found = []
    drawn = [
        name
        for name, is_on in (
            ("noise_offset", config.noise_offset and config.noise_offset_random_strength),
            ("ip_noise_gamma", config.ip_noise_gamma and config.ip_noise_gamma_random_strength),
        )
        if is_on
    ]
    if drawn:
        found.append(
            f"random strength of {' and '.join(drawn)}: drawn for each image; sd-scripts draws it once for a batch"
        )
    if config.multires_noise_iterations:
        found.append(
            "multires noise: the factor of each layer is drawn for each image; sd-scripts draws it once for a batch"
        )
    if any(item.mask for item in data.items):
        found.append(
            "masks are cropped with their images; sd-scripts stretches them to the size of the bucket"
        )
    if any(item.setting(config, "random_crop") for item in data.items):
        found.append(
            "random_crop: SDXL is told where each crop is; sd-scripts tells it that of an uncropped image"
        )
    return found
