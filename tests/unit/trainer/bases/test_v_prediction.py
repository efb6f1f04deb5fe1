"""A v-prediction fine-tune needs no code: its files declare it, or an entry in the known bases."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from evaluation.images.sampling import SampleConfig, make_scheduler
from tests.singlefile import save_single_file
from tests.tiny import save_folder, tiny_base, tiny_config, tiny_prepared, tiny_tokenizer
from trainer.adapters.adapter import inject
from trainer.bases import families, load
from trainer.bases.assumed import said_prediction
from trainer.bases.base import Base
from trainer.bases.families import FAMILIES, KnownBase
from trainer.bases.load import load_base
from trainer.errors import ConfigError
from trainer.events import Step
from trainer.loop.loop import train
from trainer.memory.footprint import base_facts

V = {"prediction_type": "v_prediction"}
V_TO_PURE_NOISE = {**V, "rescale_betas_zero_snr": True}


def loss_and_velocity(base: Base, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """One step on one image: the reported loss, and the error against diffusers' velocity."""
    is_zero = bool(base.scheduler_config.get("rescale_betas_zero_snr"))
    config = tiny_config(v_parameterization=True, zero_terminal_snr=is_zero, max_train_epochs=1)
    prepared = tiny_prepared(base, config, images=1, repeats=2)
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    original = base.predict

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, *more: Any) -> torch.Tensor:
        calls.append((noisy, timesteps, original(noisy, timesteps, *more)))
        return calls[-1][2]

    monkeypatch.setattr(base, "predict", predict)
    adapter = inject(base, config)
    try:
        (step,) = [event for event in train(config, base, adapter, prepared) if isinstance(event, Step)]
    finally:
        adapter.remove()
    ((noisy, timesteps, predicted),) = calls
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=is_zero
    )
    (latent,) = prepared.latents.values()
    latents = latent.expand(2, -1, -1, -1) * base.latent_scale
    alphas = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noise = (noisy - alphas.sqrt() * latents) / (1 - alphas).sqrt()
    target = scheduler.get_velocity(latents, noise, timesteps)
    return step.loss, (predicted - target).square().mean().item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("markers", "metadata", "schedule"),
    [
        (("v_pred", "ztsnr"), {}, V_TO_PURE_NOISE),
        ((), {"modelspec.prediction_type": "v"}, V),
    ],
)
def test_a_single_file_that_says_so_is_trained_on_the_velocity(
    family: str,
    markers: tuple[str, ...],
    metadata: dict[str, str],
    schedule: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow = tiny_base(family, full_structure=True)
    save_folder(narrow, tmp_path / family)
    plain = save_single_file(narrow, tmp_path / "plain.safetensors")
    tuned = tmp_path / "tuned.safetensors"
    save_file({**load_file(plain), **{key: torch.zeros(0) for key in markers}}, tuned, metadata)
    # width, configurations and vocabulary of the narrow networks
    width = narrow.unet.config.cross_attention_dim
    monkeypatch.setattr(families, "CONFIGS", tmp_path)
    monkeypatch.setitem(FAMILIES, family, dataclasses.replace(FAMILIES[family], context_width=width))
    monkeypatch.setattr(load, "clip_tokenizer", lambda pad_id=None: tiny_tokenizer())

    base = load_base(str(tuned))
    assert base.scheduler_config == {**load_base(str(plain)).scheduler_config, **schedule}
    told, error = loss_and_velocity(base, monkeypatch)
    assert told == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("is_zero", [False, True])
def test_settings_decide_for_a_single_file_that_says_nothing(
    is_zero: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = tiny_base("sdxl", full_structure=True)
    save_folder(narrow, tmp_path / "sdxl")
    plain = save_single_file(narrow, tmp_path / "plain.safetensors")
    noise = tmp_path / "noise.safetensors"
    save_file(load_file(plain), noise, {"modelspec.prediction_type": "epsilon"})
    width = narrow.unet.config.cross_attention_dim
    monkeypatch.setattr(families, "CONFIGS", tmp_path)
    monkeypatch.setitem(FAMILIES, "sdxl", dataclasses.replace(FAMILIES["sdxl"], context_width=width))
    monkeypatch.setattr(load, "clip_tokenizer", lambda pad_id=None: tiny_tokenizer())

    settings = tiny_config(v_parameterization=True, zero_terminal_snr=is_zero)
    told: list[str] = []
    base = load_base(str(plain), settings=settings, say=told.append)
    zero = "with" if is_zero else "without"
    assert told == [
        f"plain.safetensors does not say what it predicts: v-prediction {zero} zero terminal SNR is assumed, "
        "because v_parameterization is set"
    ]
    usual = load_base(str(plain), settings=tiny_config())
    assert base.scheduler_config == {**usual.scheduler_config, **(V_TO_PURE_NOISE if is_zero else V)}
    assert base.identity != usual.identity
    loss, error = loss_and_velocity(base, monkeypatch)  # trained on the velocity
    assert loss == pytest.approx(error, rel=1e-3)
    solver = make_scheduler(base, SampleConfig(64, 64, steps=2))  # and sampled so
    assert solver.config.prediction_type == "v_prediction"

    assert load_base(str(noise), settings=settings).prediction_type == "epsilon"
    assert said_prediction(str(plain)) is None and said_prediction(str(noise)) == "epsilon"
    assert said_prediction("mini-sd15") == "epsilon"


def test_a_published_fine_tune_that_does_not_say_so_is_one_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_folder(tiny_base("sdxl"), tmp_path / "tiny")
    entry = KnownBase("anime-v", "sdxl", "somebody/anime-v", {"resolution": 1024}, V_TO_PURE_NOISE)
    monkeypatch.setitem(families.KNOWN_BASES, entry.name, entry)
    monkeypatch.setattr(load, "hub_folder", lambda repo, **_: {entry.hub: folder}[repo])

    for spec in (entry.name, entry.hub):
        base = load_base(spec)
        assert (base.name, base.family, base.prediction_type) == (spec, "sdxl", "v_prediction")
    assert base.identity != load_base(str(folder)).identity
    assert base_facts(entry.name).family == "sdxl"
    told, error = loss_and_velocity(base, monkeypatch)
    assert told == pytest.approx(error, rel=1e-3)
    with pytest.raises(ConfigError, match="predicts v, but v_parameterization is not set"):
        plain = tiny_config(max_train_epochs=1)
        next(iter(train(plain, base, inject(base, plain), tiny_prepared(base, plain))))
