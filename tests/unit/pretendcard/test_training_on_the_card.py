"""Training on the pretend card, from an adapter to its last step: nothing mixes devices, and in fp32 the losses and the
trained weights are those of the CPU.

In bf16 and fp16 autocast differs between CPU and CUDA, so there the losses are near those of fp32.  The compact form is
part of every test run; the whole matrix is ``slow``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo.train.placement import Place
from tests.pretendcard import GB, State, pretend_card
from tests.tiny import tiny_base, tiny_config, tiny_prepared
from trainer.adapters import dropout, lorafile
from trainer.errors import OutOfMemory
from trainer.events import Event, Finished, Step, Validated
from trainer.loop import Conduct, loop

FROZEN = {"text_encoder_lr": 0.0}
OFFLOAD = {"gradient_checkpointing": True, "cpu_offload_checkpointing": True, "cpu_offload": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "frozen": FROZEN,
    "checkpointing": {"gradient_checkpointing": True},
    "offload": OFFLOAD,
    "offload, frozen": OFFLOAD | FROZEN,
    "offload, frozen on the way": OFFLOAD | {"text_encoder_frozen": True},
    "fp8": {"fp8_base": True},
    "fp8, offload, frozen": {"fp8_base": True} | OFFLOAD | FROZEN,
    "shuffled, offload, frozen": {"shuffle_caption": True} | OFFLOAD | FROZEN,
    "dropout": {"network_dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.2},
    "parts": {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "network_dropout": 0.1},
    "noise": {
        "noise_offset": 0.05,
        "multires_noise_iterations": 4,
        "ip_noise_gamma": 0.1,
        "min_snr_gamma": 5,
        "loss_type": "huber",
        "huber_schedule": "snr",
    },
    "norms": {"scale_weight_norms": 1.0},
    "long captions": {"max_token_length": 150},
    "channels last": {"opt_channels_last": True},
    "LoCon": {"network_type": "LoCon", "conv_dim": 2},
    "LoHa": {"network_type": "LoHa", "rank_dropout": 0.1},
    "LoKr": {"network_type": "LoKr"},
    "DoRA": {"network_type": "DoRA"},
    "8 bits": {"optimizer_type": "AdamW8bit"},
    "paged": {"optimizer_type": "PagedAdamW8bit"},
    "Prodigy": {"optimizer_type": "Prodigy", "learning_rate": 1.0, "text_encoder_lr": 1.0},
    "Adafactor": {"optimizer_type": "Adafactor"},
    "Lion": {"optimizer_type": "Lion"},
    "schedule-free": {"optimizer_type": "AdamWScheduleFree"},
    "CAME": {"optimizer_type": "CAME"},
}
TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPACT = [
    ("sd15", "no", "offload, frozen on the way"),
    ("sd15", "bf16", "offload, frozen on the way"),
    ("sd15", "no", "dropout"),
    ("sd15", "bf16", "checkpointing"),
    ("sd15", "full_bf16", "8 bits"),
    ("sdxl", "bf16", "fp8, offload, frozen"),
]
WHOLE = [
    *(("sd15", "no", name) for name in CASES),
    *(("sd15", kind, name) for kind in ("bf16", "full_bf16", "fp16") for name in list(CASES)[:9]),
    *(("sdxl", kind, name) for kind in ("no", "bf16") for name in list(CASES)[:9]),
]


def trained(
    device: str, family: str, kind: str, changes: dict[str, Any]
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of two steps after the dry one, as ``hpo train`` makes them after encoding."""
    full = kind == "full_bf16"
    config = tiny_config(
        max_train_epochs=1,
        **{
            "text_encoder_lr": 5e-4,
            "mixed_precision": "bf16" if full else kind,
            "full_bf16": full,
            **changes,
        },
    )
    base = tiny_base(family)
    prepared = tiny_prepared(base, config)
    if config.trains_text_encoder or config.shuffle_caption:
        prepared = dataclasses.replace(prepared, states=None)
    base.compute_dtype = TYPES[config.mixed_precision]
    for module in base.modules():
        nn.Module.to(module, base.compute_dtype)
    base.to(device)
    place = Place(base)
    place.prepare(config)
    adapter = lorafile.begin(base, config, lambda line: None)
    place.settle(config, prepared)
    how = Conduct(rehearse=True, validate_on=None if config.trains_text_encoder else prepared)
    events = list(loop.train(config, base, adapter, prepared, how))
    assert isinstance(events[-1], Finished) and events[-1].skipped == 0
    with base.card.phase("sample"):
        base.card.require(base.vae, *base.text_encoders)
        assert {module.device.type for module in (base.vae, *base.text_encoders)} == {
            torch.device(device).type
        }
    weights = adapter.state()
    adapter.remove()
    return [event.loss for event in events if isinstance(event, Step)], weights


def check(family: str, kind: str, name: str) -> None:
    plain, weights = trained("cpu", family, "no", CASES[name])
    with pretend_card(GB) as card, card.count() as counts:
        losses, there = trained("cuda", family, kind, CASES[name])
    assert there.keys() == weights.keys() and all(type(each) is Tensor for each in there.values())
    assert counts.launches > 500 and counts.syncs
    if kind == "no":
        assert losses == pytest.approx(plain, rel=1e-6)
        for key, value in weights.items():
            torch.testing.assert_close(there[key], value, rtol=1e-5, atol=1e-6)
    else:
        assert losses == pytest.approx(plain, rel=5e-3) and losses != plain


@pytest.mark.parametrize(("family", "kind", "name"), COMPACT)
def test_training_is_the_same_on_the_card(family: str, kind: str, name: str) -> None:
    check(family, kind, name)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind", "name"), [case for case in WHOLE if case not in COMPACT])
def test_every_kind_of_training_is_the_same_on_the_card(family: str, kind: str, name: str) -> None:
    check(family, kind, name)


def test_a_generator_of_the_wrong_device_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    original = dropout.keyed_generator
    monkeypatch.setattr(dropout, "keyed_generator", lambda *key, device="cpu": original(*key))
    trained("cpu", "sd15", "no", CASES["dropout"])  # on a CPU nobody sees it
    with pretend_card(GB), pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        trained("cuda", "sd15", "no", CASES["dropout"])


def test_a_tensor_left_on_the_cpu_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Place.settle

    def settle(self: Place, config: Any, prepared: Any) -> None:
        original(self, config, prepared)
        self.base.text_encoders[0].to("cpu")

    monkeypatch.setattr(Place, "settle", settle)
    trained("cpu", "sd15", "no", {})
    with pretend_card(GB), pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        trained("cuda", "sd15", "no", {})


def test_a_card_that_is_too_small_is_out_of_memory() -> None:
    with pretend_card(GB) as card:
        trained("cuda", "sd15", "no", {})
        peak = card.memories[0].peak
    with (
        pretend_card(int(peak * 0.9)),
        pytest.raises(OutOfMemory, match="out of memory at train_batch_size 2"),
    ):
        trained("cuda", "sd15", "no", {})


def run_with(
    card: State, folder: Path, changes: dict[str, Any], arm: Callable[[int], None]
) -> tuple[list[Event], dict[str, Tensor], OutOfMemory | None]:
    """Events, weights and the end of a run in fp32, validated every epoch; ``arm(step)`` follows each step."""
    config = tiny_config(
        **{"max_train_epochs": 3, "text_encoder_lr": 0.0, "mixed_precision": "no", **changes}
    )
    base = tiny_base("sd15")
    prepared = tiny_prepared(base, config)
    base.to("cuda")
    place = Place(base)
    place.prepare(config)
    adapter = lorafile.begin(base, config, lambda line: None)
    place.settle(config, prepared)
    events: list[Event] = []
    try:
        for event in loop.train(
            config, base, adapter, prepared, Conduct(checkpoints=folder, validate_on=prepared)
        ):
            events.append(event)
            if isinstance(event, Step):
                arm(event.step)
    except OutOfMemory as error:
        return events, adapter.state(), error
    finally:
        card.heal()
    return events, adapter.state(), None


def test_memory_that_runs_out_in_the_validation_ends_the_run_by_name_and_keeps_its_steps(
    tmp_path: Path,
) -> None:
    with pretend_card(GB) as card:
        events, _, error = run_with(
            card, tmp_path, {}, lambda step: card.run_out(3, times=1000) if step == 4 else None
        )
    assert error is not None and error.message == "out of memory in the validation after step 4"
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]


def test_a_validation_without_room_for_all_timesteps_takes_fewer(tmp_path: Path) -> None:
    with pretend_card(GB) as card:
        events, _, _ = run_with(card, tmp_path / "whole", {}, lambda step: None)
        again, _, error = run_with(
            card, tmp_path / "parts", {}, lambda step: card.run_out(60, times=2) if step == 4 else None
        )
    assert error is None
    whole, parts = ([event.loss for event in run if isinstance(event, Validated)] for run in (events, again))
    assert parts == pytest.approx(whole, rel=1e-5) and len(parts) == 3


def test_steps_of_a_schedule_free_optimizer_are_not_saved_in_the_middle(tmp_path: Path) -> None:
    """Its weights are computed to those for training and back, with other bits: what is saved must be what was."""
    free = {"optimizer_type": "AdamWScheduleFree", "learning_rate": 1e-2}
    with pretend_card(GB) as card:
        _, _, error = run_with(card, tmp_path, free, lambda step: card.run_out(400) if step == 3 else None)
    assert error is not None and "train_batch_size" in error.message
    assert not list(tmp_path.iterdir())
