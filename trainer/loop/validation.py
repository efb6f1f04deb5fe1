"""The validation loss: measured the same way for every adapter of a base, so that values can be compared.

Plain squared error at fixed timesteps with fixed noise on images that are not trained on: no weighting, no
noise offset, no masks, no dropout, whatever a run trains with.  Noise depends on image, timestep and the
number below only – not on the run's seed – and captions are used as written.  sd-scripts' validation loss
goes through the run's own weights and noise, so its values cannot be compared between settings.

Shapes: B batch, C latent channels, h w latent sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from trainer.adapters import keyed_generator
from trainer.bases import Base, Sizes, TextStates
from trainer.config import TrainConfig
from trainer.data import Prepared
from trainer.loop import loss
from trainer.oom import Fitting

TIMESTEPS = (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)  # middles of ten equal parts of 1000
SEED = 20  # any number; part of what makes values comparable, so never changed


@torch.no_grad()
def validation_loss(base: Base, config: TrainConfig, split: Prepared) -> float:
    """Mean squared error over all images of ``split`` and ``TIMESTEPS``.  Of the settings only
    clip_skip and max_token_length matter, since the adapter will be used with them.  One image at a
    time, so batches change nothing. All timesteps of an image at once, or fewer from where memory runs out."""
    total = 0.0
    items = {item.sha256: item for item in split.dataset.items}.values()
    fitting = Fitting(len(TIMESTEPS))
    for item in items:
        latent = split.latents[item.key].to(base.device, torch.float32) * base.latent_scale
        noise_BCHW = torch.stack(
            [
                torch.randn(latent.shape, generator=keyed_generator("validation", SEED, item.sha256, step))
                for step in TIMESTEPS
            ]
        ).to(base.device)
        # text encoders that are not trained may be in RAM by now; what they give was encoded before
        known = {} if config.trains_text_encoder else split.states or {}
        cached = known.get(
            item.caption
        )  # not with a prefix, a suffix or wildcards: captions are used as written
        states = (cached or base.encode_captions([item.caption], config)).to(base.device)
        measured = partial(_share, base, latent, noise_BCHW, states, Sizes(*split.sizes[item.key]))
        total += sum(fitting.each(range(len(TIMESTEPS)), measured))
    return total / len(items)


def _share(
    base: Base,
    latent_CHW: Tensor,
    noise_BCHW: Tensor,
    states: TextStates,
    sizes: Sizes,
    rows: Sequence[int],
) -> float:
    """The error of an image at successive timesteps (numbers of ``TIMESTEPS``), as a share of its mean over all."""
    part = slice(rows[0], rows[-1] + 1)
    noise_BCHW = noise_BCHW[part]
    latents_BCHW = latent_CHW.expand(len(rows), *latent_CHW.shape)
    timesteps_B = torch.tensor(TIMESTEPS[part], device=base.device)
    alphas = base.alphas_cumprod.to(base.device)
    predicted_BCHW = base.predict(
        loss.add_noise(latents_BCHW, noise_BCHW, timesteps_B, alphas),
        timesteps_B,
        states.rows([0] * len(rows)),
        [sizes] * len(rows),
    )
    target_BCHW = noise_BCHW
    if base.prediction_type == "v_prediction":
        target_BCHW = loss.velocity(latents_BCHW, noise_BCHW, timesteps_B, alphas)
    mean = float((predicted_BCHW.float() - target_BCHW).square().mean())
    return mean * (len(rows) / len(TIMESTEPS))
