"""Sample images while training: sample_prompts as sd-scripts reads it, drawn with the adapter in its current
state. Owns the forms of the prompt file and the names of the images. ``evaluation.images.sampling`` draws them.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.files import write_atomic
from trainer.text import clean_text

if TYPE_CHECKING:
    from evaluation.images import SampledImage
    from trainer.bases import Base

STEPS, SCALE = 30, 7.5  # sd-scripts' own, where a prompt names none
MAX_FILE_BYTES = 1 << 20
# --w 512 and so on at the end of a line; the names of the keys in TOML and JSON files
_FLAGS = {
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("sample_steps", int),
    "l": ("scale", float),
    "n": ("negative_prompt", str),
}
_KEYS = {name: kind for name, kind in _FLAGS.values()} | {"prompt": str}
_OTHERS = {
    "g": "guidance_scale, which Flux models use",
    "ss": "a sampler; samples are drawn with DPM-Solver++ (2M)",
    "cn": "a ControlNet image",
    "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
}


@dataclass(frozen=True)
class SamplePrompt:
    """One picture to draw."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    seed: int
    sample_steps: int
    scale: float


def read_sample_prompts(path: Path, config: TrainConfig) -> list[SamplePrompt]:
    """The prompts of a .txt (one a line, # is a remark), .toml ([prompt] with [[prompt.subset]]) or .json file.
    Sizes default to the resolution, seeds to the run's.  Raises ConfigError for anything it does not understand."""
    shown = clean_text(str(path))
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{shown} is larger than 1 MB", "give a file with one prompt a line")
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".toml":
            table = tomllib.loads(text)["prompt"]
            common = {name: value for name, value in table.items() if name != "subset"}
            rows: list[Any] = [{**common, **subset} for subset in table["subset"]]
        elif path.suffix == ".json":
            rows = json.loads(text)
        else:
            rows = [line.strip() for line in text.splitlines() if line.strip() and line[0] != "#"]
    except OSError as error:
        raise ConfigError(f"cannot read {shown}: {error.strerror}", "correct sample_prompts") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(
            f"{shown} is no file of prompts", "write one prompt a line into a .txt file"
        ) from None
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{shown} has no prompts", "write one prompt a line")
    return [_prompt(row, config, shown) for row in rows]


def _prompt(row: Any, config: TrainConfig, shown: str) -> SamplePrompt:
    values: Mapping[str, Any] = _of_line(row, shown) if isinstance(row, str) else row
    if not isinstance(values, Mapping) or not isinstance(values.get("prompt"), str):
        raise ConfigError(f"a prompt in {shown} has no text", "correct it")
    for name, value in values.items():
        if name not in _KEYS:
            raise ConfigError(
                f"{clean_text(str(name))[:40]} of a prompt in {shown} is not built in", "remove it"
            )
        kind = _KEYS[name]
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ConfigError(f"{name} of a prompt in {shown} is no {kind.__name__}", "correct it")
    found = SamplePrompt(
        values["prompt"].strip(),
        values.get("negative_prompt", ""),
        values.get("width", config.size_px[0]) // 8 * 8,
        values.get("height", config.size_px[1]) // 8 * 8,
        values.get("seed", config.seed),
        values.get("sample_steps", STEPS),
        float(values.get("scale", SCALE)),
    )
    if not (8 <= found.width <= 8192 and 8 <= found.height <= 8192 and 1 <= found.sample_steps <= 1000):
        raise ConfigError(f"size or steps of a prompt in {shown} are out of range", "correct it")
    if not (1 <= found.scale <= 100 and 0 <= found.seed < 2**63):
        raise ConfigError(f"scale or seed of a prompt in {shown} is out of range", "correct it")
    return found


def _of_line(line: str, shown: str) -> dict[str, Any]:
    """``text --w 512 --h 768 --d 1 --s 20 --l 7 --n negative``"""
    text, *flags = line.split(" --")
    values: dict[str, Any] = {"prompt": text}
    for flag in flags:
        name, _, value = flag.strip().partition(" ")
        if name in _OTHERS:
            raise ConfigError(
                f"--{name} of a prompt in {shown} is {_OTHERS[name]}: not built in", "remove it"
            )
        if name not in _FLAGS:
            raise ConfigError(
                f"--{clean_text(name)[:20]} of a prompt in {shown} is not known",
                "known: --w --h --d --s --l --n",
            )
        key, kind = _FLAGS[name]
        try:
            values[key] = kind(value.strip())
        except ValueError:
            raise ConfigError(
                f"--{name} {clean_text(value)[:20]!r} in {shown} is no number", "correct it"
            ) from None
    return values


def draw_samples(
    base: Base, prompts: Sequence[SamplePrompt], config: TrainConfig, folder: Path, name: str
) -> dict[Path, SampledImage]:
    """Draw every prompt with the base in its current state, adapter included; PNG files ``name_00_seed.png``."""
    from evaluation.images import png_bytes

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for place, prompt in enumerate(prompts):
        image = _drawn(base, prompt, config)
        path = folder / f"{name}_{place:02d}_{prompt.seed}.png"
        write_atomic(path, png_bytes(image.pixels_HW3))
        drawn[path] = image
    return drawn


def _drawn(base: Base, prompt: SamplePrompt, config: TrainConfig) -> SampledImage:
    import torch

    from evaluation.images import SampleConfig, SampledImage, denoise, initial_noise
    from evaluation.prompts import Prompt

    how = SampleConfig(prompt.width, prompt.height, prompt.sample_steps, prompt.scale, batch_size=1)
    text = Prompt(prompt.prompt, prompt.prompt, "train-like")
    with torch.no_grad():
        states = base.encode_text([prompt.prompt], config.clip_skip, config.max_token_length)
        negative = None
        if prompt.scale > 1:
            negative = base.encode_text([prompt.negative_prompt], config.clip_skip, config.max_token_length)
        noise = initial_noise(base, [(text, prompt.seed)], how)
        pixels_BHW3, finite = base.decode_latents(denoise(base, noise, states, negative, how))
    return SampledImage(text.id, prompt.seed, pixels_BHW3[0], finite[0])


def drawn_lines(drawn: Mapping[Path, SampledImage]) -> list[str]:
    """What is said of drawn samples: where they are, and which of them show nothing."""
    from evaluation.images import INVALID_HINT, invalid_reason, invalid_words

    first = next(iter(drawn)).name
    several = len(drawn) > 1
    lines = [f"drawn: {len(drawn)} sample{'s' if several else ''}, {first}{' …' if several else ''}"]
    if words := invalid_words(list(drawn.values())):
        bad = ", ".join(path.name for path, image in drawn.items() if invalid_reason(image))
        lines.append(f"warning: {words}: {bad}; {INVALID_HINT}")
    return lines


def file_stem(output_name: str) -> str:
    """``output_name`` as the start of file names. Raises ConfigError if it cannot be one."""
    if not re.fullmatch(r"[^/\\\x00-\x1f\x7f.][^/\\\x00-\x1f\x7f]{0,127}", output_name):
        raise ConfigError(
            f"output_name {clean_text(output_name)[:80]!r} cannot be a file's name", "use letters and digits"
        )
    return output_name
