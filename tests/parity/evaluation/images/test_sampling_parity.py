"""Our sampler against diffusers' pipelines: same networks, embeddings, noise and solver."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from evaluation.images.sampling import denoise, initial_noise, make_scheduler
from evaluation.images.settings import SampleConfig
from evaluation.prompts.prompts import Prompt
from tests.tiny import SCHEDULER, tiny_base, tiny_pipeline
from trainer.bases.base import TextStates

CHUNK = [(Prompt("a red cat", "a red cat", "altered"), 0), (Prompt("a dog", "a dog", "altered"), 1)]


def diffusers_solver() -> DPMSolverMultistepScheduler:
    known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    return DPMSolverMultistepScheduler(
        **{k: SCHEDULER[k] for k in known}, algorithm_type="dpmsolver++", solver_order=2
    )


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(("cfg", "steps", "height"), [(7.0, 4, 0), (1.0, 3, 0), (5.0, 16, 24)])
@torch.no_grad()
def test_latents_equal_diffusers_pipeline(family: str, cfg: float, steps: int, height: int) -> None:
    base = tiny_base(family)
    side = base.native_resolution_px
    config = SampleConfig(width_px=side, height_px=side - height, steps=steps, cfg=cfg, negative="ugly")
    states = base.encode_text([p.text for p, _ in CHUNK])
    negative = base.encode_text(["ugly"]) if cfg > 1 else None
    noise = initial_noise(base, CHUNK, config)
    ours = denoise(base, noise, states, negative, config)

    pipeline = tiny_pipeline(base)
    pipeline.scheduler = diffusers_solver()
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        **embeddings(family, states, negative),
        latents=noise.clone(),
        guidance_scale=cfg,
        num_inference_steps=steps,
        height=config.height_px,
        width=config.width_px,
        output_type="latent",
    ).images
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def embeddings(family: str, states: TextStates, negative: TextStates | None) -> dict[str, torch.Tensor]:
    given = {"prompt_embeds": states.hidden_BLD}
    if negative:
        given["negative_prompt_embeds"] = negative.rows([0, 0]).hidden_BLD
    if family == "sdxl":
        given["pooled_prompt_embeds"] = states.pooled_BP
        if negative:
            given["negative_pooled_prompt_embeds"] = negative.rows([0, 0]).pooled_BP
    return given


@pytest.mark.parametrize("steps", [1, 8, 20, 25])
def test_timesteps_and_noise_levels_equal_diffusers_solver(steps: int) -> None:
    ours = make_scheduler(tiny_base("sd15"), SampleConfig(width_px=64, height_px=64, steps=steps))
    theirs = diffusers_solver()
    theirs.set_timesteps(steps)
    assert ours.timesteps.equal(theirs.timesteps) and int(ours.timesteps[0]) == 999
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_images_equal_diffusers_pipeline(family: str) -> None:
    base = tiny_base(family)
    side = base.native_resolution_px
    config = SampleConfig(width_px=side, height_px=side, steps=4)
    with torch.no_grad():
        states, negative = base.encode_text([p.text for p, _ in CHUNK]), base.encode_text([""])
        noise = initial_noise(base, CHUNK, config)
        ours, finite = base.decode_latents(denoise(base, noise, states, negative, config))
    pipeline = tiny_pipeline(base)
    pipeline.scheduler = diffusers_solver()
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        **embeddings(family, states, negative),
        latents=noise.clone(),
        guidance_scale=7.0,
        num_inference_steps=4,
        height=side,
        width=side,
        output_type="np",
    ).images
    assert all(finite)
    assert abs(ours.astype(float) - theirs * 255).max() <= 1.0
