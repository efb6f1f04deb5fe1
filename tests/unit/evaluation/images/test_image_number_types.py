"""The two miniatures draw pictures in fp16, bf16 and fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluation.images.images import check_valid
from evaluation.images.sampling import default_config, sample
from evaluation.prompts.prompts import Prompt, PromptSet
from trainer.bases import load_base

PROMPTS = PromptSet(tuple(Prompt(text, text, "style") for text in ("a red figure on grass", "a cube")), (0,))


@pytest.mark.parametrize("base", ["mini-sd15", "mini-sdxl"])
def test_a_miniature_draws_about_the_same_in_every_number_type(base: str) -> None:
    drawn = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        said: list[str] = []
        loaded = load_base(base, dtype=dtype, say=said.append)
        images = sample(loaded, PROMPTS, default_config(loaded, steps=2))
        check_valid(images)
        drawn[dtype] = np.stack([image.pixels_HW3 for image in images]).astype(int)
        overflows = base == "mini-sd15" and dtype == torch.float16
        assert len(said) == overflows == loaded.vae_overflows
    for dtype in (torch.bfloat16, torch.float16):
        assert np.abs(drawn[dtype] - drawn[torch.float32]).mean() < 15  # 2 steps only
