"""Memory savings in the training loop: dry step, bf16 weights, partial recomputation, offload, layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hpo.train import memory as runmemory
from hpo.train.ladder import RunLadder
from tests.tiny import tiny_base, tiny_config, tiny_prepared
from trainer import oom as memory
from trainer.adapters.adapter import inject
from trainer.adapters.dropout import keyed_generator
from trainer.compute.recompute import blocks_outermost_first, recomputing
from trainer.compute.speed import faster
from trainer.config import TrainConfig
from trainer.errors import ConfigError, Interrupted
from trainer.events import Rehearsed, Step
from trainer.loop import optim
from trainer.loop.loop import Conduct, train
from trainer.memory.footprint import base_facts, predict


def run(base, config, **options):
    """(events, adapter's fingerprint)"""
    adapter = inject(base, config)
    try:
        events = list(train(config, base, adapter, tiny_prepared(base, config), Conduct(**options)))
        return events, adapter.fingerprint()
    finally:
        adapter.remove()


def losses(events):
    return [event.loss for event in events if isinstance(event, Step)]


# The dry step


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "Prodigy"])
def test_a_dry_step_changes_nothing(optimizer):
    base = tiny_base("sd15")
    config = tiny_config(
        optimizer_type=optimizer,
        network_dropout=0.3,
        gradient_accumulation_steps=2,
        noise_offset=0.05,
        learning_rate=1.0 if optimizer == "Prodigy" else 1e-3,
    )
    plain, expected = run(base, config)
    state = torch.get_rng_state()
    events, fingerprint = run(base, config, rehearse=True)
    assert isinstance(events[0], Rehearsed) and events[0].peak_bytes is None and events[0].images == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint == expected
    assert losses(events) == losses(plain)


def test_a_dry_step_in_a_resumed_run_changes_nothing(tmp_path):
    base = tiny_base("sd15")
    config = tiny_config(max_train_epochs=3)
    _, expected = run(base, config)
    asked = iter(range(1, 100))
    with pytest.raises(Interrupted):
        run(base, config, checkpoints=tmp_path, should_stop=lambda: next(asked) >= 3, rehearse=True)
    assert run(base, config, checkpoints=tmp_path, rehearse=True)[1] == expected


def test_the_dry_step_is_at_the_largest_bucket():
    from trainer.loop.loop import _largest

    base = tiny_base("sd15")
    config = tiny_config(train_batch_size=1)
    prepared = tiny_prepared(base, config)
    wide = type(next(iter(prepared.buckets.values())))(64, 128)
    chosen = prepared.dataset.items[2].sha256
    prepared.buckets[chosen] = wide
    assert [sample.item.sha256 for sample in _largest(config, prepared)] == [chosen]


def test_what_the_dry_step_found_is_kept_and_a_cpu_claims_nothing(tmp_path):
    said: list[str] = []
    event = Rehearsed((64, 128), 2, 1.5, None)
    runmemory.remember(tmp_path / "memory.json", tiny_config(), event, tiny_base("sd15"), said.append)
    found = json.loads((tmp_path / "memory.json").read_text())
    assert (found["measured_bytes"], found["predicted_bytes"], found["device_bytes"]) == (None, None, None)
    assert (found["bucket_px"], found["images_at_once"]) == ([64, 128], 2)
    assert said == ["dry step: 2 × 64×128 px, 1.5 s; memory is measured on a GPU only"]


def rehearsed_on_a_card(tmp_path, process_bytes, card_peak_bytes):
    """The messages and stored values of a dry step."""
    said: list[str] = []
    config = TrainConfig(pretrained_model_name_or_path="mini-sd15", resolution=64)
    event = Rehearsed((64, 64), 1, 1.5, process_bytes, card_peak_bytes, 16_000_000_000)
    runmemory.remember(tmp_path / "memory.json", config, event, tiny_base("sd15"), said.append)
    return said, json.loads((tmp_path / "memory.json").read_text())


def test_the_prediction_is_compared_with_this_process_and_the_warning_is_about_the_whole_card(tmp_path):
    config = TrainConfig(pretrained_model_name_or_path="mini-sd15", resolution=64)
    predicted = predict(config, base_facts("mini-sd15")).peak_bytes
    said, found = rehearsed_on_a_card(tmp_path, predicted, 15_600_000_000)
    assert said[0].endswith("GB (+0%)")
    assert said[1].startswith("warning: 15.6 of the card's 16.0 GB are used, with other programs")
    assert (found["measured_bytes"], found["predicted_bytes"]) == (predicted, predicted)
    assert (found["card_peak_bytes"], found["device_bytes"]) == (15_600_000_000, 16_000_000_000)
    said, _ = rehearsed_on_a_card(tmp_path, predicted, 15_400_000_000)
    assert len(said) == 1


def test_what_loading_left_in_the_cache_is_given_back_before_the_dry_step_is_measured(monkeypatch):
    calls: list[str] = []
    for name in ("release", "forget_peak", "peak_bytes"):
        own = getattr(memory, name)
        monkeypatch.setattr(
            memory, name, lambda device, own=own, name=name: calls.append(name) or own(device)
        )
    run(tiny_base("sd15"), tiny_config(max_train_steps=1), rehearse=True)
    assert calls[:3] == ["release", "forget_peak", "peak_bytes"]


def test_a_card_is_full_above_98_percent_or_15_and_a_half_of_16_gb():
    assert runmemory.limit_bytes(16_000_000_000) == 15_500_000_000
    assert runmemory.limit_bytes(24_000_000_000) == 23_520_000_000
    assert runmemory.compared(9_720_000_000, 9_000_000_000) == ", predicted 9.00 GB (+8%)"


def test_the_plan_is_applied_said_and_remembered(tmp_path):
    """A GPU slightly too small for the settings."""
    config = TrainConfig(pretrained_model_name_or_path="mini-sd15", train_batch_size=4, resolution=128)
    before = predict(config, base_facts("mini-sd15")).peak_bytes
    said: list[str] = []
    ladder = RunLadder(tmp_path / "ladder.jsonl", config, said.append)
    runmemory.apply_plan(ladder, before, 0, said.append)
    assert ladder.config != config and ladder.config.effective_batch_size == config.effective_batch_size
    assert predict(ladder.config, base_facts("mini-sd15")).peak_bytes < before
    assert said[0].startswith("planning for ") and said[-1].startswith("planned for ")
    assert len((tmp_path / "ladder.jsonl").read_text().splitlines()) == 1
    again = RunLadder(tmp_path / "ladder.jsonl", config, said.append)
    assert again.config == ladder.config
    assert (
        not again.changed
    )  # checkpoints belong to the plan; a checkpoint with other settings is not resumed
    runmemory.apply_plan(again, before, 0, said.append)
    assert again.config == ladder.config
    by_hand = RunLadder(tmp_path / "ladder.jsonl", ladder.config, said.append)
    assert by_hand.config == ladder.config and not by_hand.tried
    otherwise = RunLadder(tmp_path / "ladder.jsonl", config.with_values({"train_batch_size": 8}), said.append)
    runmemory.apply_plan(
        otherwise, 1, 5, said.append
    )  # settings do not change when resuming from a checkpoint
    assert otherwise.tried == ("plan",)


def test_on_a_cpu_nothing_is_planned():
    assert runmemory.free_bytes("cpu") is None


# bf16 weights


def test_plain_bf16_loses_small_updates_and_stochastic_rounding_keeps_them_in_the_mean():
    """1,000 updates of 2⁻¹¹ on a weight of 1, whose neighbours in bf16 are 2⁻⁷ apart."""
    weights = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    plain = weights.detach().clone()
    for step in range(1000):
        plain += 2.0**-11
        with optim.in_fp32([weights], keyed_generator(1, step)):
            weights.data += 2.0**-11
    assert torch.equal(plain, torch.ones_like(plain))
    gained = float(weights.detach().float().mean() - 1)
    assert gained == pytest.approx(1000 * 2.0**-11, rel=0.02)


def test_what_bf16_can_hold_is_not_rounded_and_the_draw_decides():
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(optim.stochastic_bf16(exact.float(), keyed_generator(0)), exact)
    between = torch.randn(1000)
    first, again, other = (optim.stochastic_bf16(between, keyed_generator(n)) for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert float((first.float() - between).abs().max() / between.abs().max()) < 2.0**-7


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "Prodigy"])
def test_full_bf16_trains_and_a_stopped_run_is_bitwise_the_run_that_never_stopped(optimizer, tmp_path):
    base = tiny_base("sd15")
    config = tiny_config(
        optimizer_type=optimizer,
        full_bf16=True,
        mixed_precision="bf16",
        learning_rate=1.0 if optimizer == "Prodigy" else 1e-3,
    )
    adapter = inject(base, config)
    assert {weight.dtype for weight in adapter.trainable()} == {torch.bfloat16}
    before = adapter.fingerprint()
    adapter.remove()
    whole, expected = run(base, config)
    assert expected != before
    asked = iter(range(1, 100))
    with pytest.raises(Interrupted):
        run(base, config, checkpoints=tmp_path, should_stop=lambda: next(asked) >= 2)
    rest, fingerprint = run(base, config, checkpoints=tmp_path)
    assert fingerprint == expected
    assert losses(rest) == losses(whole)[2:]


def test_full_bf16_keeps_the_optimizers_memory_in_fp32():
    base = tiny_base("sd15")
    config = tiny_config(full_bf16=True, mixed_precision="bf16", max_train_steps=1)
    adapter = inject(base, config)
    from trainer.loop.batches import Sample
    from trainer.loop.stepper import Stepper

    prepared = tiny_prepared(base, config)
    stepper = Stepper(config, adapter, prepared)
    stepper.step([[Sample(prepared.dataset.items[0], 0)]], 0, 0)
    states = [s for state in stepper.optimizer.state.values() for s in state.values() if s.dim() > 0]
    assert states and {state.dtype for state in states} == {torch.float32}
    adapter.remove()


def test_full_bf16_in_fp16_is_refused():
    with pytest.raises(ConfigError, match="full_bf16"):
        tiny_config(full_bf16=True, mixed_precision="fp16")


# Blocks that recompute, offload, layouts: memory and speed, not the result


def recomputes(block):
    return any(getattr(module, "gradient_checkpointing", False) for module in block.modules())


@pytest.mark.parametrize("count", [1, 3, None])
def test_as_many_blocks_recompute_as_the_setting_says(count):
    base = tiny_base("sdxl")
    order = blocks_outermost_first(base.unet)
    config = tiny_config(gradient_checkpointing=True, checkpoint_blocks=count)
    with recomputing(base, config):
        found = [name for name in order if recomputes(base.unet.get_submodule(name))]
    assert found == order[: len(order) if count is None else count]
    assert not recomputes(base.unet)


@pytest.mark.parametrize(
    "values",
    [
        {"gradient_checkpointing": True, "checkpoint_blocks": 2},
        {"gradient_checkpointing": True, "cpu_offload_checkpointing": True},
        {"cpu_offload": True},
        {"micro_batch_size": 1},
        {"opt_channels_last": True},
    ],
)
def test_what_saves_memory_or_time_does_not_change_the_result(values):
    base = tiny_base("sd15")
    dropout = {"network_dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.2}
    config = tiny_config(max_train_epochs=1, max_token_length=150, **dropout)
    plain, _ = run(base, config)
    events, _ = run(base, config.with_values(values))
    assert losses(events) == pytest.approx(losses(plain), rel=1e-4)


def test_the_optimizers_state_is_elsewhere_between_steps_with_cpu_offload(monkeypatch):
    """With one device, moves are only recorded: to the device before the update, away after it."""
    base = tiny_base("sd15")
    moves = []
    move = optim.move_state
    monkeypatch.setattr(
        optim, "move_state", lambda opt, device: moves.append(str(device)) or move(opt, device)
    )
    run(base, tiny_config(cpu_offload=True, max_train_steps=2))
    assert moves == ["cpu", *["cpu", "cpu"] * 2]


def test_what_checkpointing_keeps_waits_in_ram_with_cpu_offload_checkpointing(monkeypatch):
    base = tiny_base("sd15")
    kept = []
    save = torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", lambda **how: kept.append(how) or save(**how))
    config = tiny_config(gradient_checkpointing=True, max_train_steps=1)
    run(base, config)
    assert not kept
    run(base, config.with_values({"cpu_offload_checkpointing": True}))
    assert len(kept) > 5 and not any(how["pin_memory"] for how in kept)


def test_channels_last_and_compiled_blocks_leave_the_base_as_it_was():
    base = tiny_base("sd15")
    config = tiny_config(opt_channels_last=True, torch_compile=True)
    weight = base.unet.conv_in.weight
    with faster(base, config, backend="eager"):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert any(m._compiled_call_impl is not None for m in base.unet.modules())
    assert base.unet.conv_in.weight is weight and weight.is_contiguous()
    assert all(m._compiled_call_impl is None for m in base.unet.modules())


def test_sdxl_trains_with_everything_at_once(tmp_path: Path):
    """225 tokens, separate rates for both text encoders, full bf16, no_half_vae, 8-bit Adam, min-SNR, noise
    offset, restarts, warm-up, some blocks recomputed, split batches, an fp8 base."""
    from trainer.adapters import lorafile
    from trainer.compute import fp8

    base = tiny_base("sdxl")
    config = tiny_config(
        max_token_length=225,
        text_encoder_lr1=4e-4,
        text_encoder_lr2=2e-4,
        full_bf16=True,
        mixed_precision="bf16",
        no_half_vae=True,
        optimizer_type="AdamW8bit",
        min_snr_gamma=5.0,
        noise_offset=0.05,
        lr_scheduler="cosine_with_restarts",
        lr_scheduler_num_cycles=3,
        lr_warmup_steps=1,
        gradient_checkpointing=True,
        checkpoint_blocks=3,
        micro_batch_size=1,
        gradient_accumulation_steps=2,
        opt_channels_last=True,
        fp8_base=True,
        min_timestep=50,
        max_timestep=950,
        max_train_epochs=3,
    )
    fp8.convert(base.unet)
    adapter = inject(base, config)
    before = adapter.state()
    prepared = tiny_prepared(base, config)
    prepared.states = None
    events = list(train(config, base, adapter, prepared, Conduct(rehearse=True)))
    steps = [event for event in events if isinstance(event, Step)]
    assert len(steps) == 3 and all(step.grad_norm > 0 for step in steps)
    moved = {k for k, tensor in adapter.state().items() if not torch.equal(tensor, before[k])}
    for prefix in ("lora_unet_", "lora_te1_", "lora_te2_"):
        assert any(key.startswith(prefix) for key in moved), prefix
    path = tmp_path / "lora.safetensors"
    adapter.round_to("bf16")
    lorafile.write(path, adapter, config)
    adapter.remove()
    assert len(lorafile.attach(tiny_base("sdxl"), lorafile.read(path)).layers) > 0
