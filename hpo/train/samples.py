"""Sample images while training: sample_prompts drawn with the adapter in its current state.

Owns the names of the images. ``hpo.train.promptfile`` reads the prompts, ``evaluation.images.sampling`` draws them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.train.promptfile import SamplePrompt
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.files import write_atomic
from trainer.text import clean_text

if TYPE_CHECKING:
    from evaluation.images import SampledImage
    from trainer.bases import Base


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
    from trainer.adapters import computing

    how = SampleConfig(prompt.width, prompt.height, prompt.sample_steps, prompt.scale, batch_size=1)
    text = Prompt(prompt.prompt, prompt.prompt, "train-like")
    with torch.no_grad(), computing(base, *base.text_encoders):
        states = base.encode_text([prompt.prompt], config.clip_skip, config.max_token_length)
        negative = None
        if prompt.scale > 1:
            negative = base.encode_text([prompt.negative_prompt], config.clip_skip, config.max_token_length)
    with torch.no_grad():
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
