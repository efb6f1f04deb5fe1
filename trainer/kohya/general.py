"""Translate the settings of sd-scripts that concern neither the network nor the optimizer: places, resolution,
length, precision, samples, datasets.
"""

from __future__ import annotations

from typing import Any

from trainer.config import check_value
from trainer.errors import ConfigError
from trainer.kohya.keys import ZERO_IS_UNSET
from trainer.kohya.reading import Reading
from trainer.tomlfile import as_text

LATENT_PIXEL = 8  # image pixels for each pixel of the latents


def _places(reading: Reading) -> None:
    folder = reading.take("output_dir")
    if folder is not None:
        if not isinstance(folder, str):
            raise ConfigError(f"output_dir = {as_text(folder)} is not a folder", "write a path")
        reading.output_dir = folder


def _old_names(reading: Reading) -> None:
    if (extension := reading.take("caption_extention")) is not None:
        reading.given["caption_extension"] = extension
        reading.say("caption_extention", extension, "caption_extension")


def _resolution(reading: Reading) -> None:
    """A side, "side" or "width,height"; only squares, because resolution² is the area."""
    value = reading.take("resolution")
    if value is None:
        return
    sides = str(value).strip("[]()").split(",") if isinstance(value, str | list) else [value]
    try:
        numbers = [int(side) if isinstance(side, str) else check_value("resolution", side) for side in sides]
    except ValueError:
        hint = 'write for example 512 or "512,512"'
        raise ConfigError(f"resolution = {as_text(value)} is not a size", hint) from None
    if len(set(numbers)) != 1 or len(numbers) > 2:
        reading.refuse(
            "resolution", value, "only squares are supported; buckets keep aspect ratios at the same area"
        )
        return
    reading.given["resolution"] = numbers[0]
    if numbers[0] != value:
        reading.say("resolution", value, str(numbers[0]))


def _length(reading: Reading) -> None:
    """In sd-scripts, epochs override steps; here, steps override epochs."""
    epochs, steps = reading.take("max_train_epochs"), reading.take("max_train_steps")
    if epochs is not None:
        reading.given |= {"max_train_epochs": epochs, "max_train_steps": None}
        if steps is not None:
            reading.say("max_train_steps", steps, "ignored, because max_train_epochs is given")
    elif steps is not None:
        reading.given |= {"max_train_epochs": None, "max_train_steps": steps}
    ratio = reading.take("save_n_epoch_ratio")
    if ratio:
        if not isinstance(epochs, int) or not isinstance(ratio, int) or ratio < 1:
            reading.refuse(
                "save_n_epoch_ratio", ratio, "it needs max_train_epochs; use save_every_n_epochs instead"
            )
            return
        every = max(1, epochs // ratio)
        reading.left["save_every_n_epochs"] = every
        reading.say("save_n_epoch_ratio", ratio, f"save_every_n_epochs = {every}")


def _zeros(reading: Reading) -> None:
    """0 turns these settings off, as in sd-scripts or its GUIs."""
    for name in ZERO_IS_UNSET:
        value = reading.left.get(name)
        if not isinstance(value, bool) and value == 0:
            reading.take(name)
            reading.given[name] = None


def _near_misses(reading: Reading) -> None:
    """Values of front ends that sd-scripts takes without a check, or took once."""
    steps, tokens = reading.left.get("bucket_reso_steps"), reading.left.get("max_token_length")
    if isinstance(steps, int) and 0 < steps < LATENT_PIXEL and not isinstance(steps, bool):
        reading.left["bucket_reso_steps"] = LATENT_PIXEL
        why = "one pixel of the latents (older sd-scripts took it; today's ends with an error)"
        reading.say("bucket_reso_steps", steps, f"{LATENT_PIXEL}: {why}")
    if (
        isinstance(tokens, int) and 225 < tokens < 300
    ):  # strategy_base.py:_get_input_ids makes three parts of it too
        reading.left["max_token_length"] = 225
        reading.say("max_token_length", tokens, "225: three parts of 75 tokens, as in sd-scripts")


def _precision(reading: Reading) -> None:
    if reading.take("full_fp16"):
        reading.say("full_fp16", True, "mixed_precision = fp16; the weights of the LoRA stay in fp32")
        reading.given["mixed_precision"] = "fp16"
        reading.left.pop("mixed_precision", None)
    if reading.left.get("full_bf16"):
        reading.left["mixed_precision"] = "bf16"
    if reading.take("fp8_base_unet"):
        reading.say("fp8_base_unet", True, "fp8_base = true, with one scale per output of each layer")
        reading.given["fp8_base"] = True
        reading.left.pop("fp8_base", None)


def _attention(reading: Reading) -> None:
    for name in ("xformers", "mem_eff_attn"):
        if reading.take(name):
            reading.say(name, True, "SDPA, which gives the same result")


def _samples(reading: Reading) -> None:
    sampler = reading.take("sample_sampler")
    if sampler is not None:
        reading.say("sample_sampler", sampler, "sample images use DPM-Solver++ (2M)")


def _datasets(reading: Reading) -> None:
    """sd-scripts reads ``[[datasets]]`` only from its dataset_config. Settings in it here
    are refused, not ignored."""
    value = reading.take("datasets")
    if value is None:
        return
    asked = sorted(set(keys_inside(value)) - {"subsets", "image_dir"})
    if asked or not isinstance(value, list):
        reading.refuse(
            "datasets", ", ".join(asked) or value, "move these settings to the top level of the file"
        )
    else:
        reading.without_effect.append("datasets: the dataset is the folder given to this command")


def keys_inside(value: Any) -> list[str]:
    """The keys of the tables in a list, including nested lists of tables."""
    tables = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    pairs = [pair for table in tables for pair in table.items()]
    return [key for key, _ in pairs] + [key for _, inner in pairs for key in keys_inside(inner)]


TRANSLATIONS = (
    _places,
    _old_names,
    _resolution,
    _length,
    _zeros,
    _near_misses,
    _precision,
    _attention,
    _samples,
    _datasets,
)
