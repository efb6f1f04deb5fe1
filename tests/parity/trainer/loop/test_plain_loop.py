"""The training loop equals a plain loop made of diffusers and torch parts: the same losses on the same noise,
and the same weights after every step."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from peft import LoraConfig, inject_adapter_in_model

from tests.tiny import SCHEDULER, tiny_base, tiny_config, tiny_pipeline, tiny_prepared
from trainer.adapters.adapter import inject
from trainer.adapters.dropout import keyed_generator
from trainer.data import epoch as epochs
from trainer.events import Step
from trainer.loop.loop import train

GAMMA = 5.0


def batches(config, prepared):
    """(images, noise, timesteps) of every micro-batch, drawn as in the loop: by image and epoch."""
    for epoch in range(config.max_train_epochs):
        for batch in epochs.epoch_batches(prepared.dataset, prepared.buckets, config, epoch):
            items = [prepared.dataset.items[index] for index in batch.items]
            generators = [keyed_generator(config.seed, epoch, item.sha256, 0) for item in items]
            timesteps = torch.stack([torch.randint(0, 1000, (), generator=g) for g in generators])
            noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
            yield items, noise, timesteps


def plain_loop(base, config, prepared, start):
    """Like diffusers' example scripts for LoRA (including text encoders), without this project's trainer."""
    unet, encoders = base.unet, base.text_encoders
    adapted = dict(zip(("unet", "text_encoder", "text_encoder_2"), (unet, *encoders), strict=False))
    parameters = []
    for component, model in adapted.items():
        names = base.lora_names()[component]
        settings = LoraConfig(
            r=config.network_dim, lora_alpha=config.network_alpha, target_modules=list(names)
        )
        inject_adapter_in_model(settings, model)
        for path, key in names.items():
            layer = model.get_submodule(path)
            for half, name in ((layer.lora_A, "lora_down"), (layer.lora_B, "lora_up")):
                half["default"].weight.data.copy_(start[f"{key}.{name}.weight"])
                parameters.append((f"{key}.{name}.weight", half["default"].weight))
    optimizer = torch.optim.AdamW([p for _, p in parameters], lr=config.learning_rate, weight_decay=0.01)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=4)
    noise_scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    pipeline = tiny_pipeline(base)
    losses = []
    for items, noise, timesteps in batches(config, prepared):
        latents = torch.stack([prepared.latents[item.sha256] for item in items])
        latents = latents * base.vae.config.scaling_factor
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        captions = [item.caption for item in items]
        if base.family == "sd15":
            ids = pipeline.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
            predicted = unet(noisy, timesteps, encoders[0](ids)[0]).sample
        else:
            states, _, pooled, _ = pipeline.encode_prompt(
                captions, device="cpu", do_classifier_free_guidance=False
            )
            time_ids = torch.tensor([[64, 64, 0, 0, 64, 64]] * len(items), dtype=torch.float32)
            added = {"text_embeds": pooled, "time_ids": time_ids}
            predicted = unet(noisy, timesteps, states, added_cond_kwargs=added).sample
        snr = compute_snr(noise_scheduler, timesteps)
        weights = torch.stack([snr, GAMMA * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / snr
        loss = torch.nn.functional.mse_loss(predicted.float(), noise, reduction="none")
        loss = (loss.mean(dim=(1, 2, 3)) * weights).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in parameters], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.detach().clone() for name, parameter in parameters}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_our_loop_is_the_plain_loop(family):
    config = tiny_config(
        min_snr_gamma=GAMMA, lr_warmup_steps=1, learning_rate=1e-2, optimizer_type="AdamW", weight_decay=0.01
    )
    base = tiny_base(family)
    prepared = tiny_prepared(base, config)
    adapter = inject(base, config)
    start = adapter.state()
    ours = [event.loss for event in train(config, base, adapter, prepared) if isinstance(event, Step)]
    state = adapter.state()
    adapter.remove()
    assert SCHEDULER["num_train_timesteps"] == 1000
    losses, weights = plain_loop(tiny_base(family), config, prepared, start)
    assert len(ours) == 4
    assert ours == pytest.approx(losses, rel=1e-5)
    moved = 0
    for name, weight in weights.items():
        torch.testing.assert_close(state[name], weight, rtol=1e-3, atol=2e-5)
        moved += not torch.equal(state[name], start[name])
    assert moved > len(weights) / 2
