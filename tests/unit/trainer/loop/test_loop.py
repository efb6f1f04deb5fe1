"""What the training loop promises: it learns, it is exact, it goes on where it stopped, it says what went wrong."""

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from diffusers import DDPMScheduler

from tests.tiny import SCHEDULER, in_type, tiny_base, tiny_config, tiny_prepared
from trainer.adapters.adapter import inject
from trainer.bases.base import Parts
from trainer.data import epoch as epochs
from trainer.data.steps import plan, total_steps
from trainer.errors import ConfigError, Diverged, Interrupted, OutOfMemory
from trainer.events import Finished, Saved, Skipped, Step
from trainer.loop import batches, loop
from trainer.loop.loop import Conduct, train


def run(base, config, *, images=4, repeats=1, **options):
    """Train a fresh adapter; returns (events, fingerprint)."""
    adapter = inject(base, config)
    try:
        events = list(
            train(config, base, adapter, tiny_prepared(base, config, images, repeats), Conduct(**options))
        )
        return events, adapter.fingerprint()
    finally:
        adapter.remove()


def stop_after(steps):
    """A should_stop that says yes at the n-th question."""
    asked = iter(range(1, 1_000_000))
    return lambda: next(asked) >= steps


def close(first, second, rtol):
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_training_reports_every_step_and_lowers_the_loss(family):
    base = tiny_base(family)
    config = tiny_config(
        max_train_epochs=20 if family == "sd15" else 5,
        learning_rate=3e-2,
        lr_scheduler="constant",
        min_snr_gamma=5.0,
    )
    events, _ = run(base, config)
    steps = [event for event in events if isinstance(event, Step)]
    epochs = config.max_train_epochs
    assert events[-1] == Finished(2 * epochs, 0)
    assert [step.step for step in steps] == list(range(1, 2 * epochs + 1))
    assert (steps[0].epoch, steps[-1].epoch) == (1, epochs)
    assert (steps[0].total_epochs, steps[0].total_steps) == (epochs, 2 * epochs)
    if family == "sd15":  # the narrow SDXL learns too slowly for so few steps
        first, last = (sum(s.loss for s in part) / 15 for part in (steps[:15], steps[-15:]))
        assert last < 0.95 * first
    assert all(step.grad_norm > 0 and step.seconds > 0 for step in steps)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_same_run_twice_is_bitwise_the_same(family):
    """C5 · weight 5 · The same settings and seed twice → Bitwise the same weights, on the same machine and CPU."""
    base = tiny_base(family)
    config = tiny_config(network_dropout=0.3, noise_offset=0.05)
    first, second = run(base, config), run(base, config)
    assert first[1] == second[1]
    assert [e.loss for e in first[0][:-1]] == [e.loss for e in second[0][:-1]]
    assert run(base, replace(config, seed=1))[1] != first[1]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_batch_of_four_equals_four_batches_of_one_accumulated(family):
    base = tiny_base(family)
    shared = {
        "lr_scheduler": "constant",
        "optimizer_type": "AdamW",
        "max_train_epochs": 3,
        "max_grad_norm": 0.0,
    }
    results = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        config = tiny_config(train_batch_size=batch, gradient_accumulation_steps=accumulation, **shared)
        adapter = inject(base, config)
        events = list(train(config, base, adapter, tiny_prepared(base, config)))
        results.append((events, adapter.state()))
        adapter.remove()
    for events, state in results[1:]:
        assert [e.loss for e in events[:-1]] == pytest.approx([e.loss for e in results[0][0][:-1]], rel=1e-4)
        for key, weights in state.items():
            # Of each tensor as a whole: AdamW divides by the root of the squared gradient, so where a gradient nearly
            # cancels, the order of additions (it differs between processors) shows as percents of one step's rate.
            other = results[0][1][key]
            assert float((weights - other).norm()) <= 5e-3 * float(other.norm()) + 1e-6, key


def test_the_last_group_of_an_epoch_is_weighted_by_its_true_count():
    """5 images, batch 1, accumulation 4: the second step has one image and must equal a batch of that one."""
    base = tiny_base("sd15")
    config = tiny_config(
        train_batch_size=1, gradient_accumulation_steps=4, max_train_epochs=1, learning_rate=1e-9
    )
    events, _ = run(base, config, images=5)
    steps = [event for event in events if isinstance(event, Step)]
    assert len(steps) == 2
    single, _ = run(base, replace(config, gradient_accumulation_steps=1), images=5)
    assert steps[1].loss == pytest.approx(single[4].loss, rel=1e-4)
    assert steps[1].grad_norm == pytest.approx(single[4].grad_norm, rel=1e-3)


def test_steps_are_counted_as_kohya_counts_them():
    base = tiny_base("sd15")
    config = tiny_config(train_batch_size=2, gradient_accumulation_steps=2, max_train_epochs=3)
    prepared = tiny_prepared(base, config, images=5, repeats=2)  # 10 samples, 5 batches, 3 steps an epoch
    assert total_steps(config, prepared.dataset) == 9
    assert total_steps(replace(config, max_train_steps=4), prepared.dataset) == 4
    assert plan(replace(config, max_train_steps=4), prepared.dataset).total_epochs == 2
    events, _ = run(base, replace(config, max_train_steps=4), images=5, repeats=2)
    assert events[-1] == Finished(4, 0)


def test_repeats_of_an_image_get_different_noise():
    base = tiny_base("sd15")
    config = tiny_config(train_batch_size=1, max_train_epochs=2, learning_rate=1e-9)
    events, _ = run(base, config, images=1, repeats=3)
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert len(set(losses)) == 6


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "Adafactor", "Prodigy", "Lion8bit"])
def test_a_run_that_was_stopped_twice_is_bitwise_the_run_that_never_stopped(optimizer, tmp_path):
    base = tiny_base("sd15")
    config = tiny_config(
        optimizer_type=optimizer,
        network_dropout=0.4,
        noise_offset=0.05,
        max_train_epochs=4,
        lr_warmup_steps=2,
        learning_rate=1.0 if optimizer == "Prodigy" else 1e-3,
        gradient_accumulation_steps=2,
        train_batch_size=1,
    )
    whole, expected = run(base, config)
    losses = []
    for steps in (3, 1):
        adapter = inject(base, config)
        how = Conduct(checkpoints=tmp_path / "checkpoints", should_stop=stop_after(steps))
        with pytest.raises(Interrupted, match="the checkpoint is saved"):
            for event in train(config, base, adapter, tiny_prepared(base, config), how):
                losses += [event.loss] if isinstance(event, Step) else []
        adapter.remove()
    events, fingerprint = run(base, config, checkpoints=tmp_path / "checkpoints")
    losses += [event.loss for event in events if isinstance(event, Step)]
    assert losses == [event.loss for event in whole if isinstance(event, Step)]
    assert fingerprint == expected


def test_stopping_without_a_checkpoint_folder_says_that_nothing_is_saved():
    base = tiny_base("sd15")
    with pytest.raises(Interrupted, match="after step 1/4: nothing is saved"):
        run(base, tiny_config(), should_stop=lambda: True)


def test_checkpoints_come_by_the_clock_and_the_one_before_stays_until_the_next_step(tmp_path):
    base = tiny_base("sd15")
    events, _ = run(base, tiny_config(), checkpoints=tmp_path, checkpoint_every_seconds=0)
    saved = [event for event in events if isinstance(event, Saved)]
    assert [event.step for event in saved] == [1, 2, 3, 4]
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["step-000003", "step-000004"]  # no step was made from the last one's weights yet
    events, _ = run(base, tiny_config(), checkpoints=tmp_path)
    assert events == [Finished(4, 0)]


def poison(base, monkeypatch, steps):
    """Let the base's prediction be NaN in the given calls."""
    calls = iter(range(1_000_000))
    predict = base.predict

    def poisoned(*args):
        number = next(calls)
        return predict(*args) * (float("nan") if number in steps else 1.0)

    monkeypatch.setattr(base, "predict", poisoned)


def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing(monkeypatch):
    """C1 · weight 5 · The loss or a gradient is not a number, once → The step is skipped and counted, and no
    weight changes.
    """
    base = tiny_base("sd15")
    config = tiny_config(max_train_epochs=3, lr_scheduler="constant")
    poison(base, monkeypatch, {2})
    events, _ = run(base, config)
    assert [type(event).__name__ for event in events] == [
        "Step",
        "Step",
        "Skipped",
        *["Step"] * 3,
        "Finished",
    ]
    assert events[2] == Skipped(3, "loss")
    assert events[-1] == Finished(6, 1)


def test_skipping_the_first_steps_leaves_the_adapter_as_injected(monkeypatch):
    base = tiny_base("sd15")
    config = tiny_config(max_train_steps=3)
    adapter = inject(base, config)
    before = adapter.fingerprint()
    poison(base, monkeypatch, {0, 1, 2})
    list(train(config, base, adapter, tiny_prepared(base, config)))
    assert adapter.fingerprint() == before


def test_ten_skipped_steps_in_a_row_are_a_divergence(monkeypatch):
    base = tiny_base("sd15")
    poison(base, monkeypatch, set(range(3, 100)))
    with pytest.raises(Diverged, match="10 steps in a row had no finite loss, up to 13"):
        run(base, tiny_config(max_train_epochs=20))


def diverge(base, config, folder, **options):
    """Train until it diverges; returns (hint, checkpoint names, weights after each step)."""
    adapter = inject(base, config)
    prints = {}
    try:
        with pytest.raises(Diverged) as caught:
            prepared = tiny_prepared(base, config)
            for event in train(config, base, adapter, prepared, Conduct(checkpoints=folder, **options)):
                prints[event.step] = adapter.fingerprint()
    finally:
        adapter.remove()
    return caught.value.hint, sorted(path.name for path in folder.glob("step-*")), prints


def weights_of(path, base, config):
    adapter = inject(base, config)
    adapter.load_state(safetensors.torch.load_file(path))
    fingerprint = adapter.fingerprint()
    adapter.remove()
    return fingerprint


def test_after_a_divergence_the_weights_of_the_last_finite_loss_are_kept_and_named(monkeypatch, tmp_path):
    """Steps 1 to 3 are applied; the loss with the weights after step 3 is not finite."""
    base = tiny_base("sd15")
    config = tiny_config(max_train_epochs=20)
    poison(base, monkeypatch, set(range(3, 100)))
    hint, names, prints = diverge(base, config, tmp_path, checkpoint_every_seconds=0)
    assert names == ["step-000002", "step-000003"]
    good = tmp_path / "step-000002" / "adapter.safetensors"
    assert f"--set network_weights={good}" in hint
    assert weights_of(good, base, config) == prints[2] != prints[3] == prints[13]

    for stop in (None, 3):  # the same command again, also one that was stopped meanwhile: no further
        if stop:
            with pytest.raises(Interrupted):
                run(base, config, checkpoints=tmp_path, should_stop=stop_after(stop))
        again = diverge(base, config, tmp_path, checkpoint_every_seconds=0)
        assert again[0] == hint and max(again[2]) == 13
        assert "step-000002" in again[1]


def test_a_divergence_without_a_good_checkpoint_names_none_and_saves_none(monkeypatch, tmp_path):
    base = tiny_base("sd15")
    config = tiny_config(max_train_epochs=20)
    poison(base, monkeypatch, set(range(3, 100)))
    hint, names, _ = diverge(base, config, tmp_path)
    assert names == [] and "no weights from before were saved" in hint
    poison(base, monkeypatch, set(range(100)))
    hint, names, _ = diverge(base, config, tmp_path, checkpoint_every_seconds=0)
    assert names == [] and "it is not the rate" in hint


def test_skips_that_are_not_in_a_row_are_no_divergence(monkeypatch):
    base = tiny_base("sd15")
    poison(base, monkeypatch, set(range(0, 100, 2)))
    events, _ = run(base, tiny_config(max_train_epochs=20))
    assert events[-1] == Finished(40, 20)


def test_a_full_device_is_named_and_the_adapter_can_still_be_removed(monkeypatch):
    base = tiny_base("sd15")

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(base, "predict", full)
    with pytest.raises(OutOfMemory, match="train_batch_size 2, resolution 64"):
        run(base, tiny_config())
    assert not hasattr(base.unet, "peft_config")


def test_a_full_device_while_the_optimizer_is_made_is_named(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("trainer.loop.optim.build_optimizer", full)
    with pytest.raises(OutOfMemory, match="train_batch_size 2, resolution 64"):
        run(tiny_base("sd15"), tiny_config())


def test_other_runtime_errors_stay_what_they_are(monkeypatch):
    base = tiny_base("sd15")

    def wrong(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(base, "predict", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(base, tiny_config())


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_gradient_checkpointing_changes_memory_not_the_result(family):
    base = tiny_base(family)
    config = tiny_config(network_dropout=0.3)
    _, plain = run(base, config)
    everything = [m for module in base.modules() for m in module.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in everything]
    _, recomputed = run(base, replace(config, gradient_checkpointing=True))
    assert plain == recomputed
    assert not any(m.training or getattr(m, "gradient_checkpointing", False) for m in everything)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in everything] == hooks


def test_bf16_trains_on_a_cpu_and_the_adapter_stays_fp32():
    base = tiny_base("sd15")
    config = tiny_config(mixed_precision="bf16", max_train_epochs=1)
    events, fingerprint = run(base, config)
    plain_events, plain = run(base, replace(config, mixed_precision="no"))
    assert fingerprint != plain
    assert events[0].loss == pytest.approx(plain_events[0].loss, rel=0.05)


def test_fp16_lowers_its_loss_scale_after_an_overflow_and_goes_on():
    base = tiny_base("sd15")
    config = tiny_config(mixed_precision="fp16", max_train_epochs=4)
    prepared = tiny_prepared(base, config)
    adapter = inject(base, config)
    stepper = loop.Stepper(config, adapter, prepared)
    scale = stepper.scaler.get_scale()
    stepper.adapter.trainable()[0].register_hook(lambda grad: grad * float("inf"))
    groups = loop._epoch_groups(config, prepared, 0)
    outcome = stepper.step(groups[0], 0, 0)
    assert outcome.skipped == "gradient"
    assert stepper.scaler.get_scale() == scale / 2
    adapter.remove()
    events, _ = run(base, config)
    assert events[-1].steps == 8
    assert sum(isinstance(event, Step) for event in events) > 0


def test_a_half_precision_base_cannot_compute_in_fp32():
    base = tiny_base("sd15")
    in_type(base, torch.bfloat16)
    with pytest.raises(ConfigError, match="the base was loaded in"):
        run(base, tiny_config(mixed_precision="no"))
    events, _ = run(base, tiny_config(mixed_precision="bf16"))
    assert events[-1] == Finished(4, 0)


def test_clipping_scales_the_update_and_reports_the_norm_before():
    base = tiny_base("sd15")
    config = tiny_config(optimizer_type="AdamW", max_train_steps=1, learning_rate=1e-3)
    free, _ = run(base, replace(config, max_grad_norm=0.0))
    clipped, _ = run(base, replace(config, max_grad_norm=1e-4))
    assert free[0].grad_norm == clipped[0].grad_norm > 1e-4


def test_text_encoders_that_are_not_trained_are_not_run(monkeypatch):
    base = tiny_base("sdxl")
    config = tiny_config(network_train_unet_only=True)
    prepared = tiny_prepared(base, config)
    adapter = inject(base, config)

    def forbidden(*args):
        raise AssertionError("a text encoder ran")

    monkeypatch.setattr(base, "encode_text", forbidden)
    events = list(train(config, base, adapter, prepared))
    assert isinstance(events[-1], Finished)
    assert events[0].text_encoder_lr == 0.0


def test_the_global_random_state_is_neither_used_nor_changed():
    base = tiny_base("sd15")
    torch.manual_seed(11)
    state = torch.get_rng_state()
    _, first = run(base, tiny_config(network_dropout=0.2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert run(base, tiny_config(network_dropout=0.2))[1] == first


def test_a_closed_generator_leaves_the_base_usable():
    base = tiny_base("sd15")
    config = tiny_config(gradient_checkpointing=True)
    adapter = inject(base, config)
    events = train(config, base, adapter, tiny_prepared(base, config))
    next(events)
    events.close()
    assert not any(getattr(m, "gradient_checkpointing", False) for m in base.unet.modules())
    assert all(weight.grad is None for weight in adapter.trainable())
    adapter.remove()


# Regularisation images, masks, timesteps, v-prediction, norms


def losses_of(base, config, prepared):
    adapter = inject(base, config)
    events = list(train(config, base, adapter, prepared))
    adapter.remove()
    return [event.loss for event in events if isinstance(event, Step)]


def test_regularisation_images_weigh_prior_loss_weight():
    base = tiny_base("sd15")
    config = tiny_config(train_batch_size=1, max_train_epochs=1, learning_rate=1e-9)
    prepared = tiny_prepared(base, config)
    items = prepared.dataset.items
    mixed = replace(prepared.dataset, items=(replace(items[0], is_reg=True), *items[1:]))
    order = [b.items[0] for b in epochs.epoch_batches(mixed, prepared.buckets, config, 0)]
    prepared.dataset = mixed
    plain = losses_of(base, config, prepared)
    halved = losses_of(base, replace(config, prior_loss_weight=0.5), prepared)
    for index, first, second in zip(order, plain, halved, strict=True):
        assert second == pytest.approx(first * (0.5 if index == 0 else 1.0), rel=1e-5)


def losses_now(stepper, micro):
    """The losses of a micro-batch of the first step."""
    return stepper._losses(stepper.batches.take(batches.StepPart(0, micro, 0, len(micro)), 0, 0))


def test_a_masked_image_is_trained_where_its_mask_is_white():
    """Half of one image's mask black: its loss is that half's share, and no other image's changes."""
    base = tiny_base("sd15")
    config = tiny_config(train_batch_size=4, max_train_epochs=1, learning_rate=1e-9)
    prepared = tiny_prepared(base, config)
    adapter = inject(base, config)
    stepper = loop.Stepper(config, adapter, prepared)
    micro = loop._epoch_groups(config, prepared, 0)[0][0]
    plain = losses_now(stepper, micro)
    left, right = torch.ones(8, 8), torch.ones(8, 8)
    left[:, 4:], right[:, :4] = 0.0, 0.0
    halves = []
    for mask in (left, right):
        prepared.masks = {micro[1].item.sha256: mask}
        halves.append(losses_now(stepper, micro))
    adapter.remove()
    torch.testing.assert_close(halves[0][1] + halves[1][1], plain[1])
    for row in (0, 2, 3):
        torch.testing.assert_close(halves[0][row], plain[row])


def test_only_the_timesteps_between_min_and_max_are_trained():
    base = tiny_base("sd15")
    config = tiny_config(min_timestep=200, max_timestep=210)
    prepared = tiny_prepared(base, config)
    adapter = inject(base, config)
    stepper = loop.Stepper(config, adapter, prepared)
    drawn = {
        int(
            stepper.batches._draw(
                batches.Sample(prepared.dataset.items[0], n), torch.zeros(4, 8, 8), 0
            ).timestep
        )
        for n in range(300)
    }
    adapter.remove()
    assert drawn == set(range(200, 210))


def test_each_noise_setting_changes_what_it_says_and_nothing_else():
    base = tiny_base("sd15")
    latent = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))

    def draw(**values):
        config = tiny_config(**values)
        adapter = inject(base, config)
        prepared = tiny_prepared(base, config)
        drawn = loop.Stepper(config, adapter, prepared).batches._draw(
            batches.Sample(prepared.dataset.items[0], 0), latent, 0
        )
        adapter.remove()
        return drawn

    plain = draw()
    assert torch.equal(plain.noise, plain.input_noise)
    perturbed = draw(ip_noise_gamma=0.1)
    assert torch.equal(perturbed.noise, plain.noise), "the target stays"
    extra = perturbed.input_noise - plain.noise
    assert extra.std() == pytest.approx(0.1, rel=0.2)
    varied = draw(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True)
    assert 0 < (varied.input_noise - plain.noise).std() < 0.1
    offset = draw(noise_offset=0.1).noise - plain.noise
    assert offset.flatten(1).std(1).max() < 1e-6
    weaker = draw(noise_offset=0.1, noise_offset_random_strength=True).noise - plain.noise
    ratio = weaker[:, 0, 0] / offset[:, 0, 0]
    assert 0 < ratio[0] < 1
    torch.testing.assert_close(ratio, ratio[:1].expand(4))
    adaptive = draw(noise_offset=0.1, adaptive_noise_scale=0.5).noise - plain.noise
    expected = (0.1 + 0.5 * latent.mean(dim=(1, 2)).abs()) / 0.1
    torch.testing.assert_close(adaptive[:, 0, 0] / offset[:, 0, 0], expected)
    coarse = draw(multires_noise_iterations=6)
    assert coarse.noise.std() == pytest.approx(1.0, abs=1e-4)
    assert torch.equal(coarse.noise, coarse.input_noise)
    assert {int(d.timestep) for d in (plain, perturbed, coarse)} == {int(plain.timestep)}


def v_base(**schedule):
    base = tiny_base("sd15")
    return type(base)(
        "tiny-v",
        "tiny-v",
        Parts(
            base.unet,
            base.vae,
            tuple(base.text_encoders),
            tuple(base.tokenizers),
            SCHEDULER | {"prediction_type": "v_prediction"} | schedule,
        ),
    )


def test_v_prediction_learns_the_velocity(monkeypatch):
    base = v_base()
    config = tiny_config(v_parameterization=True, train_batch_size=2, max_train_epochs=1, learning_rate=1e-9)
    prepared = tiny_prepared(base, config)
    seen = {}
    original = base.predict

    def predict(noisy, timesteps, states, sizes):
        seen.update(noisy=noisy, timesteps=timesteps, predicted=original(noisy, timesteps, states, sizes))
        return seen["predicted"]

    monkeypatch.setattr(base, "predict", predict)
    adapter = inject(base, config)
    stepper = loop.Stepper(config, adapter, prepared)
    micro = loop._epoch_groups(config, prepared, 0)[0][0]
    losses = losses_now(stepper, micro)
    adapter.remove()
    scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    latents = torch.stack([prepared.latents[s.item.sha256] for s in micro]) * base.latent_scale
    alphas = scheduler.alphas_cumprod[seen["timesteps"]].view(-1, 1, 1, 1)
    noise = (seen["noisy"] - alphas.sqrt() * latents) / (1 - alphas).sqrt()
    target = scheduler.get_velocity(latents, noise, seen["timesteps"])
    expected = (seen["predicted"] - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)


def test_zero_terminal_snr_trains_the_last_step_on_pure_noise(monkeypatch):
    base = v_base(rescale_betas_zero_snr=True)
    config = tiny_config(
        v_parameterization=True,
        zero_terminal_snr=True,
        min_timestep=999,
        min_snr_gamma=5.0,
        max_train_epochs=1,
    )
    prepared = tiny_prepared(base, config)
    adapter = inject(base, config)
    stepper = loop.Stepper(config, adapter, prepared)
    micro = loop._epoch_groups(config, prepared, 0)[0][0]
    seen = []
    original = base.predict
    monkeypatch.setattr(base, "predict", lambda noisy, *rest: seen.append(noisy) or original(noisy, *rest))
    losses = losses_now(stepper, micro)
    adapter.remove()
    noise = torch.stack([stepper.batches._draw(s, torch.zeros(4, 8, 8), 0).noise for s in micro])
    assert torch.equal(seen[0], noise)
    assert losses.isfinite().all()
    assert (losses > 0).all()


def test_a_base_is_not_trained_for_what_it_does_not_predict():
    with pytest.raises(ConfigError, match="predicts v, but v_parameterization is not set"):
        run(v_base(), tiny_config())
    with pytest.raises(ConfigError, match="says that it predicts noise"):
        run(tiny_base("sd15"), tiny_config(v_parameterization=True))


def test_norms_stay_below_scale_weight_norms():
    base = tiny_base("sd15")
    config = tiny_config(scale_weight_norms=0.01, learning_rate=1e-2, max_train_epochs=3)
    adapter = inject(base, config)
    list(train(config, base, adapter, tiny_prepared(base, config)))
    norms = [layer.delta().norm().item() for layer in adapter.layers]
    adapter.remove()
    assert max(norms) <= 0.01 * (1 + 1e-4)
    assert max(norms) > 0.0099, "the limit was reached, so this says something"


def test_a_step_without_any_module_changes_nothing():
    base = tiny_base("sd15")
    config = tiny_config(module_dropout=0.95, max_train_epochs=1)
    adapter = inject(base, config)
    adapter.layers = adapter.layers[:1]
    events = list(train(config, base, adapter, tiny_prepared(base, config)))
    adapter.remove()
    assert events[-1] == Finished(2, 0)


@pytest.mark.parametrize("kind", ["DoRA", "LoHa", "LoKr"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_kind_trains_and_recomputing_gives_the_same_weights(kind, family):
    base = tiny_base(family)
    dropout = {"network_dropout": 0.2} if kind == "DoRA" else {}
    config = tiny_config(network_type=kind, conv_dim=2, rank_dropout=0.2, module_dropout=0.2, **dropout)
    events, plain = run(base, config)
    assert all(isinstance(event, Step) for event in events[:-1])
    _, recomputed = run(base, replace(config, gradient_checkpointing=True))
    assert plain == recomputed
    bf16_events, _ = run(base, replace(config, mixed_precision="bf16"))
    assert bf16_events[0].loss == pytest.approx(events[0].loss, rel=0.05)
