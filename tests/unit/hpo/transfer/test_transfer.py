"""transfer(): the known transfers (points A and B), each rule, and properties of every configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo.transfer.files import Places, kept_line, settings_text
from hpo.transfer.plan import GRID, DatasetFigures, TransferPlan, snap_down, updates_of
from hpo.transfer.profile import PRESETS, Profile, profiles_of, read_profile
from hpo.transfer.rates import rate_factors
from hpo.transfer.rules import rules_table, transfer
from tests.places import ROOT
from trainer.config import OPTIMIZER_NAMES, SCHEDULER_NAMES, SETTINGS, TOKEN_LENGTHS, TrainConfig
from trainer.data import Dataset, Item, batches_per_epoch, total_steps
from trainer.errors import ConfigError
from trainer.optimizers import OPTIMIZERS

FIGURES = DatasetFigures(images=120, samples=1200)
POINT_A = TrainConfig(
    learning_rate=1.3e-4,
    text_encoder_lr=8e-5,
    train_batch_size=4,
    gradient_accumulation_steps=3,
    max_train_epochs=18,
    network_dim=128,
    network_alpha=96,
    min_snr_gamma=5.0,
    lr_scheduler="cosine",
    optimizer_type="AdamW",
)
POINT_B = TrainConfig(
    learning_rate=3e-4,
    train_batch_size=8,
    gradient_accumulation_steps=2,
    max_train_epochs=12,
    network_dim=64,
    network_alpha=32,
    lr_scheduler="cosine_with_restarts",
    lr_scheduler_num_cycles=3,
    optimizer_type="AdamW8bit",
)


def changed(profile: Profile, **sections: dict[str, Any]) -> Profile:
    new = {name: dataclasses.replace(getattr(profile, name), **body) for name, body in sections.items()}
    return dataclasses.replace(profile, **new)


def of(plan: TransferPlan, *names: str) -> tuple[Any, ...]:
    return tuple(getattr(plan.config, name) for name in names)


BATCH = ("train_batch_size", "gradient_accumulation_steps")


# The known transfers


def test_point_a_comes_out_exactly() -> None:
    plan = transfer(POINT_A, FIGURES, read_profile("sdxl-16gb"))
    assert of(plan, "learning_rate", "text_encoder_lr", *BATCH) == (1e-4, 6e-5, 1, 8)
    assert of(plan, "max_train_epochs", "resolution", "optimizer_type") == (20, 1024, "AdamW8bit")
    kept = ("network_dim", "network_alpha", "min_snr_gamma", "lr_scheduler")
    assert of(plan, *kept) == (128, 96.0, 5.0, "cosine")
    assert plan.derived.effective_batch == (12, 8)
    assert plan.derived.updates[1] / plan.derived.updates[0] == pytest.approx(1.67, abs=0.005)
    assert plan.derived.integrated_rate == pytest.approx(1.28, abs=0.005)
    assert not plan.of_level("warn") and not plan.of_level("refuse")


def test_point_a_also_by_its_recorded_factors() -> None:
    profile = changed(read_profile("sdxl-16gb"), rate={"rule": "factor"})
    assert of(transfer(POINT_A, FIGURES, profile), "learning_rate", "text_encoder_lr") == (1e-4, 6e-5)


@pytest.mark.parametrize(
    ("preset", "rates", "batch", "updates", "integrated"),
    [
        ("conservative", (6e-5, 4e-5), (1, 4), 3.33, 1.54),
        ("balanced", (8e-5, 5e-5), (1, 6), 2.22, 1.37),
        ("aggressive", (1e-4, 6e-5), (1, 8), 1.67, 1.28),
    ],
)
def test_point_a_under_each_preset(
    preset: str, rates: tuple[float, float], batch: tuple[int, int], updates: float, integrated: float
) -> None:
    plan = transfer(POINT_A, FIGURES, read_profile("sdxl-16gb"), preset=preset)
    assert of(plan, "learning_rate", "text_encoder_lr") == rates and of(plan, *BATCH) == batch
    assert plan.config.vae_batch_size == PRESETS[preset].settings["vae_batch_size"]
    assert plan.config.gradient_checkpointing is (preset == "aggressive")
    assert plan.derived.updates[1] / plan.derived.updates[0] == pytest.approx(updates, abs=0.005)
    assert plan.derived.integrated_rate == pytest.approx(integrated, abs=0.005)


def test_point_b_comes_out_exactly_and_is_warned_of() -> None:
    plan = transfer(POINT_B, FIGURES, read_profile("sdxl-keep"))
    assert of(plan, "learning_rate", "text_encoder_lr", *BATCH) == (3e-4, 2e-4, 4, 2)
    assert of(plan, "max_train_epochs", "resolution", "max_token_length") == (12, 1024, 225)
    kept = ("network_dim", "network_alpha", "lr_scheduler", "lr_scheduler_num_cycles", "optimizer_type")
    assert of(plan, *kept) == (64, 32.0, "cosine_with_restarts", 3, "AdamW8bit")
    assert plan.config.min_snr_gamma is None
    assert plan.derived.integrated_rate == pytest.approx(2.0)
    assert "0.00042" in plan.of_level("warn")[0].text and not plan.of_level("refuse")


def test_point_b_below_16_gb_halves_the_batch_again() -> None:
    plan = transfer(POINT_B, FIGURES, read_profile("sdxl-keep").with_vram(12))
    assert of(plan, *BATCH) == (2, 4) and not plan.of_level("refuse")


def test_point_b_with_a_fifth_more_epochs() -> None:
    profile = changed(read_profile("sdxl-keep"), length={"epochs_factor": 1.2})
    plan = transfer(POINT_B, FIGURES, profile)
    assert plan.config.max_train_epochs == 15
    assert plan.derived.updates[1] / plan.derived.updates[0] == pytest.approx(2.5)


def test_point_b_under_the_square_root_rule() -> None:
    plan = transfer(POINT_B, FIGURES, changed(read_profile("sdxl-keep"), rate={"rule": "sqrt_batch"}))
    assert of(plan, "learning_rate", "text_encoder_lr") == (2e-4, 1.2e-4)
    assert plan.derived.integrated_rate == pytest.approx(1.33, abs=0.005)


# Rules


def test_a_longer_training_gets_a_lower_rate_by_the_rule_of_updates() -> None:
    """27 epochs of batch 8 instead of 18 of batch 12: × √(18 × 100 / (27 × 150))."""
    longer = changed(read_profile("sdxl-16gb"), length={"epochs_factor": 1.5}, rate={"rule": "sqrt_updates"})
    high = POINT_A.with_values({"learning_rate": 2.4e-4})
    plan = transfer(high, FIGURES, longer)
    assert plan.derived.updates == (1800, 4050)
    assert plan.config.learning_rate == 1.6e-4 == pytest.approx(2.4e-4 * (1800 / 4050) ** 0.5)
    reason = next(m.reason for m in plan.moves if m.rule == "lr.sqrt_updates")
    assert reason.startswith("updates 1800 → 4050: × √(1800/4050) = 0.667")
    assert rate_factors(plan, longer)[0] == pytest.approx(2 / 3)
    by_batch = changed(longer, rate={"rule": "sqrt_batch"})
    assert rate_factors(transfer(high, FIGURES, by_batch), by_batch)[0] == pytest.approx((8 / 12) ** 0.5)


def test_an_unchanged_training_keeps_its_rate_by_the_rule_of_updates() -> None:
    same = changed(read_profile("sdxl-keep"), rate={"rule": "sqrt_updates"})
    own = POINT_A.with_values(
        {"train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1.37e-4}
    )
    assert transfer(own, FIGURES, same).config.learning_rate == 1.37e-4


def test_below_12_gb_it_is_refused_by_the_profile() -> None:
    plan = transfer(POINT_A, FIGURES, read_profile("sdxl-16gb").with_vram(8))
    assert [f.about for f in plan.of_level("refuse")] == ["vram"]


def test_more_than_20_gb_take_two_images_at_once() -> None:
    assert of(transfer(POINT_A, FIGURES, read_profile("sdxl-16gb").with_vram(24)), *BATCH) == (2, 4)


def test_a_rate_far_above_every_published_one_is_refused() -> None:
    hot = POINT_A.with_values({"learning_rate": 6e-4})
    plan = transfer(hot, FIGURES, read_profile("sdxl-keep"))
    assert [f.about for f in plan.of_level("refuse")] == ["learning_rate"]


def test_the_exact_product_of_epochs_is_not_rounded_up() -> None:
    ten = POINT_A.with_values({"max_train_epochs": 10})  # 10 × 1.1 is 11.000000000000002
    assert transfer(ten, FIGURES, read_profile("sdxl-16gb")).config.max_train_epochs == 11


def test_steps_keep_the_number_of_images_seen() -> None:
    by_steps = POINT_A.with_values({"max_train_epochs": None, "max_train_steps": 1000})
    plan = transfer(by_steps, FIGURES, read_profile("sdxl-16gb"))
    assert plan.config.max_train_steps == 1650  # × 12 / 8 × 1.1
    (move,) = (m for m in plan.moves if m.key == "max_train_steps")
    assert (move.rule, move.reason) == (
        "steps.scale",
        "12,000 images seen × 1.1: an epoch has 100 updates in the search and 150 here",
    )
    by_epochs = transfer(POINT_A.with_values({"max_train_epochs": 10}), FIGURES, read_profile("sdxl-16gb"))
    assert by_epochs.derived.updates == plan.derived.updates, "the same length, given in epochs"


def test_warm_up_keeps_its_share_and_never_exceeds_a_tenth() -> None:
    profile = read_profile("sdxl-16gb")
    plan = transfer(POINT_A.with_values({"lr_warmup_steps": 90}), FIGURES, profile)  # of 1800
    assert plan.config.lr_warmup_steps == 150  # of 3000
    assert (
        transfer(POINT_A.with_values({"lr_warmup_steps": 1000}), FIGURES, profile).config.lr_warmup_steps
        == 300
    )
    assert (
        transfer(POINT_A.with_values({"lr_warmup_steps": 0.3}), FIGURES, profile).config.lr_warmup_steps
        == 0.1
    )


def test_a_smaller_alpha_raises_the_rate_by_its_root() -> None:
    profile = dataclasses.replace(read_profile("sdxl-keep"), settings={"network_alpha": 8.0})
    plan = transfer(POINT_B, FIGURES, profile)  # alpha 32 → 8: × 2
    assert plan.config.learning_rate == 6e-4
    assert [m.rule for m in plan.moves if m.key == "learning_rate"] == ["lr.alpha"]


def test_a_text_encoder_that_was_off_stays_off_and_can_be_cached() -> None:
    plan = transfer(POINT_A.with_values({"text_encoder_lr": 0.0}), FIGURES, read_profile("sdxl-16gb"))
    assert plan.config.network_train_unet_only and not plan.config.trains_text_encoder


def test_a_profile_can_leave_the_text_encoders_as_they_are() -> None:
    plan = transfer(POINT_A, FIGURES, changed(read_profile("sdxl-16gb"), rate={"text_encoder": "off"}))
    assert plan.config.network_train_unet_only and not plan.config.trains_text_encoder


def test_a_text_encoder_rate_is_capped_and_a_small_one_is_never_raised() -> None:
    profile = read_profile("sdxl-16gb")
    assert (
        transfer(POINT_A.with_values({"text_encoder_lr": 1e-3}), FIGURES, profile).config.text_encoder_lr
        == 8e-5
    )
    low = transfer(POINT_A.with_values({"text_encoder_lr": 1e-5}), FIGURES, profile)
    assert low.config.text_encoder_lr == 8e-6 and any(f.level == "note" for f in low.findings)


def test_prodigy_keeps_its_rate() -> None:
    prodigy = POINT_A.with_values({"optimizer_type": "Prodigy", "learning_rate": 1.0, "text_encoder_lr": 1.0})
    plan = transfer(prodigy, FIGURES, read_profile("sdxl-16gb"))
    assert of(plan, "learning_rate", "text_encoder_lr", "optimizer_type") == (1.0, 1.0, "Prodigy")
    assert not plan.of_level("warn")


def test_clip_skip_and_block_rates_are_dropped_with_the_reason() -> None:
    blocks = ",".join(["1"] * 12)
    plan = transfer(
        POINT_A.with_values({"clip_skip": 2, "down_lr_weight": blocks}), FIGURES, read_profile("sdxl-16gb")
    )
    assert of(plan, "clip_skip", "down_lr_weight") == (None, "")
    assert {m.key for m in plan.moves if m.rule == "family.drops"} == {"clip_skip", "down_lr_weight"}


def test_many_small_images_are_warned_of() -> None:
    figures = dataclasses.replace(FIGURES, small_share=0.31)
    assert transfer(POINT_A, figures, read_profile("sdxl-16gb")).of_level("warn")[0].about == "resolution"


def test_file_sizes_are_those_of_the_facts() -> None:
    """SDXL in fp16: 340 MB at dim 64, 456 MB with both text encoders; 681 and 912 MB at dim 128."""
    profile = read_profile("sdxl-16gb")
    found = []
    for dim in (64, 128):
        for text in (0.0, 8e-5):
            source = POINT_A.with_values(
                {"network_dim": dim, "network_alpha": dim / 2, "text_encoder_lr": text}
            )
            found.append(round((transfer(source, FIGURES, profile).derived.file_bytes or 0) / 1e6))
    assert found == [340, 456, 681, 912]


def test_time_follows_from_what_the_source_took() -> None:
    figures = dataclasses.replace(FIGURES, seconds_per_sample=0.1)
    plan = transfer(POINT_A, figures, read_profile("sdxl-16gb"))
    assert plan.derived.seconds == pytest.approx(20 * 1200 * 0.1 * 8.4 * 1.25)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as error:
        transfer(POINT_A, FIGURES, read_profile("sdxl-16gb"), preset="balance")
    assert "balanced" in error.value.hint


# Properties of every configuration

RATE = st.floats(1e-7, 5e-2)
NEEDED = {
    "piecewise_constant": "step_rules='1:100,0.1'",
    "RexAnnealingWarmRestarts": "gamma=0.9",
    "CosineAnnealingWarmupRestarts": "gamma=0.9",
    "CosineAnnealingWarmRestarts": "T_0=100",
    "CosineAnnealingLR": "T_max=100",
    "StepLR": "step_size=10",
    "MultiStepLR": "milestones=(10, 20)",
    "ExponentialLR": "gamma=0.99",
}
SCHEDULES = [(name, NEEDED.get(name, "")) for name in SCHEDULER_NAMES if name != "adafactor"]


@st.composite
def sd15(draw: st.DrawFn) -> TrainConfig:
    """Any valid SD1.5 configuration, as far as the rules look at it."""
    optimizer = draw(st.sampled_from(OPTIMIZER_NAMES))
    one_rate = OPTIMIZERS[optimizer].one_rate
    schedule, arguments = draw(st.sampled_from(SCHEDULES))
    values: dict[str, Any] = {
        "optimizer_type": optimizer,
        "learning_rate": 1.0 if one_rate else draw(RATE),
        "train_batch_size": draw(st.integers(1, 64)),
        "gradient_accumulation_steps": draw(st.integers(1, 64)),
        "max_train_epochs": draw(st.integers(1, 100_000)),
        "max_train_steps": draw(st.none() | st.integers(1, 10_000_000)),
        "network_dim": draw(st.integers(1, 256)),
        "network_alpha": draw(st.floats(0.5, 256)),
        "network_type": draw(st.sampled_from(["LoRA", "DoRA", "LoHa", "LoKr"])),
        "lr_warmup_steps": draw(st.floats(0, 0.99) | st.integers(0, 5000)),
        "lr_scheduler": schedule,
        "lr_scheduler_args": arguments,
        "lr_scheduler_min_lr_ratio": draw(st.floats(0, 1)),
        "max_token_length": draw(st.sampled_from((None, *TOKEN_LENGTHS))),
        "clip_skip": draw(st.none() | st.integers(1, 12)),
        "noise_offset": draw(st.floats(0, 1)),
        "network_train_unet_only": draw(st.booleans()),
        "mixed_precision": draw(st.sampled_from(SETTINGS["mixed_precision"].choices)),
        "v_parameterization": draw(st.booleans()),
        "down_lr_weight": draw(st.sampled_from(["", "sine", ",".join(["0.5"] * 12)])),
    }
    if one_rate:
        values |= {"down_lr_weight": "", "text_encoder_lr": draw(st.sampled_from([None, 0.0, 1.0]))}
    else:
        values["text_encoder_lr"] = draw(st.none() | st.just(0.0) | RATE)
        values["unet_lr"] = draw(st.none() | st.just(0.0) | RATE)
        if values["unet_lr"] == 0 and (values["text_encoder_lr"] == 0 or values["network_train_unet_only"]):
            values["unet_lr"] = None
    if values["v_parameterization"]:
        values["zero_terminal_snr"] = draw(st.booleans())
    return TrainConfig(**values)


PROFILES = [read_profile(name) for family in ("sdxl", "mini-sdxl") for name in profiles_of(family)]
ANY_PROFILE = st.builds(
    lambda profile, rule, text, vram: changed(profile, rate={"rule": rule, "text_encoder": text}).with_vram(
        vram
    ),
    st.sampled_from(PROFILES),
    st.sampled_from(["sqrt_updates", "sqrt_batch", "keep", "factor", "linear_batch"]),
    st.sampled_from(["inherit", "off"]),
    st.sampled_from([8.0, 12.0, 16.0, 24.0]),
)
ANY_FIGURES = st.builds(DatasetFigures, st.integers(1, 500), st.integers(1, 20_000), st.floats(0, 1))


@settings(max_examples=60, deadline=None)
@given(sd15(), ANY_FIGURES, ANY_PROFILE, st.sampled_from([None, *PRESETS]))
def test_every_configuration_gives_a_valid_one_within_the_limits_and_only_by_moves(
    source: TrainConfig, figures: DatasetFigures, profile: Profile, preset: str | None
) -> None:
    """C9 · weight 5 · A transfer loses a setting or leaves the limits of SDXL → Every SD1.5 configuration
    becomes a valid one for SDXL, and every change has its named rule.
    """
    plan = transfer(source, figures, profile, preset=preset)  # a TrainConfig is valid, or it is not made
    values = source.as_dict()
    for move in plan.moves:
        assert values[move.key] == move.old != move.new and move.rule and move.reason
        values[move.key] = move.new
    assert values == plan.config.as_dict()
    before, now = plan.derived.effective_batch
    assert now <= before
    limits, rate = profile.limits, plan.config.effective_unet_lr
    if plan.config.optimizer_type in ("AdamW", "AdamW8bit") and rate > 0:
        assert limits.learning_rate_low <= rate <= limits.learning_rate_high
        text = plan.config.effective_text_encoder_lr
        assert text <= profile.rate.text_encoder_cap * rate * (1 + 1e-9)
    assert (source.effective_unet_lr > 0) == (rate > 0)
    assert transfer(source, figures, profile, preset=preset) == plan


@given(st.floats(1e-12, 1e3))
def test_rates_snap_down_to_the_grid_by_a_quarter_at_most(value: float) -> None:
    snapped = snap_down(value)
    assert value * 0.74 < snapped <= value * (1 + 1e-9)
    assert any(f"{snapped:e}".startswith(f"{step:.6f}"[:8]) for step in GRID)
    assert snap_down(snapped) == snapped


def test_the_docs_describe_every_rule() -> None:
    text = (ROOT / "docs" / "transfer.md").read_text(encoding="utf-8")
    shown = text.split("<!-- rules: begin -->")[1].split("<!-- rules: end -->")[0]
    assert shown.strip() == rules_table()


@pytest.mark.parametrize(
    ("epochs", "samples", "kept"), [(1, 240, 5), (2, 240, 5), (20, 240, None), (3, 240, 5)]
)
def test_a_short_run_saves_enough_files_for_a_curve(epochs: int, samples: int, kept: int | None) -> None:
    source = TrainConfig().with_values({"train_batch_size": 4, "max_train_epochs": epochs})
    for name in ("mini-sdxl", "sdxl-16gb"):
        config = transfer(source, DatasetFigures(24, samples), read_profile(name)).config
        if name == "sdxl-16gb" and kept is None:
            assert (config.save_every_n_steps, config.save_every_n_epochs) == (None, 2)
            continue
        every, updates = config.save_every_n_steps, updates_of(config, samples)
        assert every is not None and config.save_every_n_epochs is None
        assert len({*range(every, updates, every), updates}) == 5


def four_buckets(folder: Path) -> Dataset:
    """An image in each of four buckets, five times."""
    shapes = [(64, 64), (64, 96), (96, 64), (64, 128)]
    return Dataset(
        folder, tuple(Item(Path(f"{n}.png"), "", 5, w, h, f"{n}") for n, (w, h) in enumerate(shapes))
    )


@pytest.mark.parametrize("profile", ["mini-sdxl", "sdxl-16gb", "sdxl-keep"])
def test_images_seen_are_scaled_by_the_batches_that_training_makes(tmp_path: Path, profile: str) -> None:
    data = four_buckets(tmp_path)
    source = TrainConfig().with_values({"train_batch_size": 4, "resolution": 64, "min_bucket_reso": 32,
                                        "bucket_reso_steps": 32, "max_train_epochs": 10})  # fmt: skip
    figures = DatasetFigures(4, 20, batches=lambda config: batches_per_epoch(config, data))
    steps = total_steps(source, data)
    in_steps = source.with_values({"max_train_epochs": None, "max_train_steps": steps})
    one, other = (transfer(config, figures, read_profile(profile)) for config in (source, in_steps))
    assert figures.length(source).steps_per_epoch > 5, "more than one bucket"
    assert other.config.max_train_epochs is None
    assert one.derived.updates == other.derived.updates


def test_the_files_of_a_length_in_steps_do_not_name_epochs() -> None:
    by_steps = POINT_A.with_values({"max_train_epochs": None, "max_train_steps": 1000})
    plan = transfer(by_steps, FIGURES, read_profile("sdxl-keep"))
    text = settings_text(plan, Places(Path("t"), "sdxl"), ())
    assert "max_train_steps = 1500" in text and "max_train_epochs" not in text
    assert "max_train_epochs" not in kept_line(plan) and "max_train_steps" not in kept_line(plan)


def test_steps_are_counted_in_the_batches_that_training_makes(tmp_path: Path) -> None:
    data = four_buckets(tmp_path)
    source = TrainConfig().with_values(
        {"train_batch_size": 4, "lr_warmup_steps": 8.0, "max_train_epochs": 10}
    )
    figures = DatasetFigures(4, 20, batches=lambda config: batches_per_epoch(config, data))
    plan = transfer(source, figures, read_profile("mini-sdxl"))
    for config, updates in zip((source, plan.config), plan.derived.updates, strict=True):
        assert updates == total_steps(config, data) > updates_of(config, 20)
    assert any(f"8 of {plan.derived.updates[0]} steps" in move.reason for move in plan.moves)
