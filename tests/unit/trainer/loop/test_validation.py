"""What the validation loss promises: the same number whatever a run trains with, another for another adapter."""

import pytest
import torch

from tests.tiny import tiny_base, tiny_config, tiny_prepared
from trainer.adapters.adapter import inject
from trainer.adapters.dropout import keyed_generator
from trainer.data.steps import Plan
from trainer.events import Step, Validated
from trainer.loop import loop
from trainer.loop.loop import Conduct, train
from trainer.loop.loss import add_noise
from trainer.loop.validation import TIMESTEPS, validation_loss

DIFFERENT = {
    "seed": 7,
    "min_snr_gamma": 5.0,
    "noise_offset": 0.1,
    "multires_noise_iterations": 4,
    "ip_noise_gamma": 0.1,
    "loss_type": "huber",
    "debiased_estimation_loss": True,
    "min_timestep": 300,
    "max_timestep": 600,
    "train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "caption_dropout_rate": 0.5,
    "shuffle_caption": True,
    "prior_loss_weight": 0.3,
}


def randomise(adapter):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapter.trainable():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_one_adapter_has_one_value_under_all_training_settings(family):
    base = tiny_base(family)
    plain, other = tiny_config(), tiny_config(**DIFFERENT)
    adapter = inject(base, plain)
    before = validation_loss(base, plain, tiny_prepared(base, plain))
    randomise(adapter)
    first = validation_loss(base, plain, tiny_prepared(base, plain))
    assert first == validation_loss(base, plain, tiny_prepared(base, plain))
    assert first == validation_loss(base, other, tiny_prepared(base, other))
    assert first != before


def test_it_is_the_plain_squared_error_of_the_noise():
    """Recomputed one timestep at a time: a mean over images and timesteps, nothing else in it."""
    base = tiny_base("sd15")
    config = tiny_config()
    split = tiny_prepared(base, config, images=2)
    errors = []
    for item in split.dataset.items:
        latent = (split.latents[item.sha256] * base.latent_scale)[None]
        for step in TIMESTEPS:
            noise = torch.randn(1, 4, 8, 8, generator=keyed_generator("validation", 20, item.sha256, step))
            at = torch.tensor([step])
            states = base.encode_text([item.caption])
            with torch.no_grad():
                predicted = base.predict(add_noise(latent, noise, at, base.alphas_cumprod), at, states, [])
            errors.append((predicted - noise).square().mean().item())
    assert validation_loss(base, config, split) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_training_tells_it_after_every_epoch_and_is_not_changed_by_it():
    base = tiny_base("sd15")
    config = tiny_config(max_train_epochs=3, network_dropout=0.3, module_dropout=0.2, learning_rate=1e-2)
    split = tiny_prepared(base, config, images=1)
    results = []
    for validate_on in (split, None):
        adapter = inject(base, config)
        events = list(
            train(config, base, adapter, tiny_prepared(base, config), Conduct(validate_on=validate_on))
        )
        results.append((events, adapter.fingerprint()))
        last = validation_loss(base, config, split)
        adapter.remove()
    told = [event for event in results[0][0] if isinstance(event, Validated)]
    assert [(event.epoch, event.step) for event in told] == [(1, 2), (2, 4), (3, 6)]
    assert told[-1].loss == last
    assert len({event.loss for event in told}) == 3
    assert results[0][1] == results[1][1]
    losses = [[e.loss for e in events if isinstance(e, Step)] for events, _ in results]
    assert losses[0] == losses[1]


def test_a_run_that_ends_inside_an_epoch_is_validated_at_its_end():
    assert loop._ends_epoch(Plan(4, 6, 2), 6)
    assert [step for step in range(1, 7) if loop._ends_epoch(Plan(4, 6, 2), step)] == [4, 6]


def test_captions_are_used_as_written_although_training_frames_them():
    """The cache holds what training reads; with a prefix that is another text."""
    base = tiny_base("sd15")
    config = tiny_config(network_train_unet_only=True)
    plain = validation_loss(base, config, tiny_prepared(base, config))
    framed = tiny_prepared(base, config)
    framed.states = {f"best, {caption}": states for caption, states in framed.states.items()}
    assert validation_loss(base, config.with_values({"caption_prefix": "best,"}), framed) == plain
