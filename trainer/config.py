"""TrainConfig: the settings of one training run, checked for contradictions, and values derived from them.

Owns the rules between settings, and derived values (learning rate per network, timesteps, images at once).
Does not own the settings (``trainer.settings``) or the sources of values (kohya files:
``trainer.kohya.read``; studies: ``hpo.study.config``). Never imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer import optimizers, schedules
from trainer.checks import suggestion
from trainer.errors import ConfigError
from trainer.findings import collecting, piece, report
from trainer.settings import LARGEST_DIM as LARGEST_DIM
from trainer.settings import LYCORIS_PRESETS as LYCORIS_PRESETS
from trainer.settings import OPTIMIZER_NAMES as OPTIMIZER_NAMES
from trainer.settings import SCHEDULER_NAMES as SCHEDULER_NAMES
from trainer.settings import SETTINGS as SETTINGS
from trainer.settings import TOKEN_LENGTHS as TOKEN_LENGTHS
from trainer.settings import WITHOUT_INFLUENCE as WITHOUT_INFLUENCE
from trainer.settings import ZERO_IS_UNSET as ZERO_IS_UNSET
from trainer.settings import Settings
from trainer.settings import check_name as check_name
from trainer.settings import check_value as check_value
from trainer.text import clean_text

# Settings of files and images, which can be checked although others contradict each other.
_CHECKED_ALONE = (
    "pretrained_model_name_or_path",
    "train_data_dir",
    "reg_data_dir",
    "dataset_config",
    "caption_extension",
    "enable_wildcard",
    "output_name",
    "sample_prompts",
    "network_weights",
    "v_parameterization",
    "vae",
)


@dataclass(frozen=True)
class TrainConfig(Settings):
    """All settings of one training run.  Frozen; ``with_values`` makes a changed, validated copy.

    Names are those of sd-scripts (kohya). Defaults are ours; a kohya file gets kohya's (``trainer.kohya.read``).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_train_epochs is None and self.max_train_steps is None:
            raise ConfigError("neither max_train_epochs nor max_train_steps is set", "set one of them")
        report(ConfigError(message, hint) for broken, message, hint in self._contradictions() if broken)
        report(_wrong_arguments(self))

    def _contradictions(self) -> Iterator[tuple[bool, str, str]]:
        """(whether it applies, what is wrong, what to do) for each contradiction between settings."""
        yield (
            self.min_bucket_reso > self.max_bucket_reso,
            f"min_bucket_reso {self.min_bucket_reso} is above max_bucket_reso {self.max_bucket_reso}",
            "set min_bucket_reso to at most max_bucket_reso",
        )
        yield (
            not self.trains_unet and not self.trains_text_encoder,
            "nothing is trained: all learning rates are 0",
            "set learning_rate, unet_lr or text_encoder_lr",
        )
        yield (
            optimizers.OPTIMIZERS[self.optimizer_type].one_rate and self._has_several_rates,
            f"{self.optimizer_type} adapts one learning rate and cannot use different rates for text encoders, blocks "
            "or lora_up",
            "set text_encoder_lr to learning_rate (usually 1.0) or to 0, and remove block multipliers and LoRA+",
        )
        yield (
            self.lr_scheduler == "adafactor" and not self.has_relative_steps,
            "lr_scheduler = adafactor is for Adafactor with relative steps",
            "set optimizer_type = Adafactor and optimizer_args = relative_step=True, or choose another lr_scheduler",
        )
        yield (
            self.max_token_length not in (None, *TOKEN_LENGTHS),
            f"max_token_length = {self.max_token_length} is not a supported length",
            "use 75, 150 or 225",
        )
        yield (
            self.network_type == "LoCon"
            and self.conv_dim is None
            and not (self.lycoris_preset or self.conv_block_dims or self.dim_from_weights),
            "network_type = LoCon trains 3×3 convolutions, but conv_dim is not set",
            f"set conv_dim, for example to {max(1, self.network_dim // 2)}",
        )
        yield (
            self.network_dropout > 0
            and (
                self.network_type not in ("LoRA", "LoCon", "DoRA", "LoRA-FA")
                or self.use_tucker
                or self.use_scalar
            ),
            f"network_dropout is not supported by {self.network_type}"
            + (", use_tucker and use_scalar" if self.use_tucker or self.use_scalar else "")
            + ", only by LoRA, LoCon and DoRA",
            "use rank_dropout or module_dropout",
        )
        yield (
            self.network_type not in ("LoRA", "LoCon", "LoHa", "LoKr", "GLoRA")
            and (self.use_tucker or self.use_scalar),
            f"use_tucker and use_scalar are not supported by {self.network_type}",
            "remove them, or use LoCon, LoHa or LoKr",
        )
        yield (
            self.network_type == "DyLoRA"
            and bool(self.network_dim % self.unit or (self.conv_dim or self.network_dim) % self.unit),
            f"unit {self.unit} does not divide network_dim and conv_dim",
            "use a rank that is a multiple of unit",
        )
        yield (
            self.network_type != "LoKr" and max(self.network_dim, self.conv_dim or 0) > LARGEST_DIM,
            f"network_dim or conv_dim is above {LARGEST_DIM}, which only LoKr takes (as full matrices)",
            f"use up to {LARGEST_DIM}, or network_type = LoKr",
        )
        yield (
            bool(self.lycoris_preset)
            and self.lycoris_preset not in LYCORIS_PRESETS
            and not self.lycoris_preset.lower().endswith(".toml"),
            f"lycoris_preset = {self.lycoris_preset} is not known",
            suggestion(self.lycoris_preset, LYCORIS_PRESETS)
            or "use a .toml file, or one of " + ", ".join(LYCORIS_PRESETS),
        )
        yield (
            self.dim_from_weights and not self.network_weights,
            "dim_from_weights has no file to take the ranks from",
            "set network_weights, or remove dim_from_weights",
        )
        blocks = self.block_dims or self.block_alphas or self.conv_block_dims or self.conv_block_alphas
        yield (
            bool(blocks) and bool(self.lycoris_preset),
            "block_dims and block_alphas are for the modules of networks.lora, but lycoris_preset is set",
            "remove one of them",
        )
        yield (
            self.lr_scheduler_num_cycles == 0
            and self.lr_scheduler in ("RexAnnealingWarmRestarts", "CosineAnnealingWarmupRestarts")
            and not schedules.arguments_of(self.lr_scheduler, self.lr_scheduler_args)[
                "first_cycle_max_steps"
            ],
            f"lr_scheduler_num_cycles = 0 gives {self.lr_scheduler} no length of a cycle",
            "set it to 1 or more, or first_cycle_max_steps in lr_scheduler_args",
        )
        yield (self.factor == 0, "factor = 0 is not valid", "use -1, or a whole number from 1")
        yield (
            self.first_timestep >= self.end_timestep,
            f"min_timestep {self.first_timestep} is not below max_timestep {self.end_timestep}",
            "leave at least one timestep to train",
        )
        yield (
            self.zero_terminal_snr and not self.v_parameterization,
            "zero_terminal_snr needs v_parameterization: noise prediction does not work at zero SNR",
            "set both for a v-prediction base, otherwise neither",
        )
        yield (
            self.scale_v_pred_loss_like_noise_pred and not self.v_parameterization,
            "scale_v_pred_loss_like_noise_pred needs v_parameterization",
            "remove it; it is for v-prediction bases",
        )
        yield (
            bool(self.v_pred_like_loss) and self.v_parameterization,
            "v_pred_like_loss is for noise prediction, but v_parameterization is set",
            "remove one of them",
        )
        yield (
            self.adaptive_noise_scale is not None and self.noise_offset == 0,
            "adaptive_noise_scale changes noise_offset, which is 0",
            "set noise_offset, for example to 0.05",
        )
        yield (
            self.masked_loss and not self.alpha_mask and not self.conditioning_data_dir,
            "masked_loss has no masks",
            "set conditioning_data_dir to a folder of masks, or alpha_mask = true for transparent images",
        )
        yield (
            self.text_encoder_frozen and not self.trains_unet,
            "text_encoder_frozen leaves nothing to train: the learning rate of the U-Net is 0",
            "remove it",
        )
        yield (
            not self.caption_separator,
            "caption_separator is empty",
            'use ","',
        )
        yield (
            self.full_bf16 and self.mixed_precision in ("no", "fp16"),
            f"full_bf16 needs bf16, but mixed_precision = {self.mixed_precision}",
            "set mixed_precision = bf16 or auto",
        )

    @property
    def _has_several_rates(self) -> bool:
        rates = {self.effective_unet_lr, *self.effective_text_encoder_lrs} - {0.0}
        blocks = self.down_lr_weight or self.mid_lr_weight or self.up_lr_weight
        return len(rates) > 1 or bool(blocks) or self.uses_loraplus

    @property
    def loraplus_ratios(self) -> tuple[float, float]:
        """The rate of lora_up relative to that of lora_down: (U-Net, text encoders). 0 and unset mean 1, as in
        sd-scripts (networks/lora.py:prepare_optimizer_params)."""
        common = self.loraplus_lr_ratio
        return (
            self.loraplus_unet_lr_ratio or common or 1.0,
            self.loraplus_text_encoder_lr_ratio or common or 1.0,
        )

    @property
    def uses_loraplus(self) -> bool:
        return self.loraplus_ratios != (1.0, 1.0)

    @property
    def has_relative_steps(self) -> bool:
        """Whether Adafactor chooses its rate itself: rates above 0 and the schedule have no effect."""
        return optimizers.has_relative_steps(self.optimizer_type, self.optimizer_args)

    @property
    def is_schedule_free(self) -> bool:
        """Whether the optimizer replaces the schedule: rates are constant (arXiv 2405.15682)."""
        return optimizers.OPTIMIZERS[self.optimizer_type].is_schedule_free

    def has_schedule(self, *names: str) -> bool:
        """Whether the rate follows one of these schedules."""
        return self.lr_scheduler in names and not (self.is_schedule_free or self.has_relative_steps)

    @property
    def warms_up(self) -> bool:
        """Whether lr_warmup_steps count: not with a schedule or an optimizer that has its own warm-up or none."""
        has_own = self.is_schedule_free or self.has_relative_steps
        return schedules.SCHEDULES[self.lr_scheduler].warms_up and not has_own

    @property
    def safeguards_warmup(self) -> bool:
        """Whether Prodigy gets safeguard_warmup if it is not set: with a warm-up, as its authors recommend."""
        return self.lr_warmup_steps > 0 and self.lr_scheduler != "constant"

    @property
    def _trains_unet_only(self) -> bool:
        return self.network_train_unet_only or self.lycoris_preset.startswith("unet-")

    @property
    def effective_unet_lr(self) -> float:
        """The learning rate of the U-Net (kohya: unet_lr, else learning_rate)."""
        return self.learning_rate if self.unet_lr is None else self.unet_lr

    @property
    def effective_text_encoder_lr(self) -> float:
        """The learning rate of the text encoders (kohya: text_encoder_lr, else learning_rate)."""
        if self._trains_unet_only:
            return 0.0
        return self.learning_rate if self.text_encoder_lr is None else self.text_encoder_lr

    @property
    def effective_text_encoder_lrs(self) -> tuple[float, float]:
        """The learning rates of SDXL's two text encoders; a base with one uses the first."""
        common = self.effective_text_encoder_lr
        if self._trains_unet_only:
            return 0.0, 0.0
        return (
            common if self.text_encoder_lr1 is None else self.text_encoder_lr1,
            common if self.text_encoder_lr2 is None else self.text_encoder_lr2,
        )

    @property
    def trains_unet(self) -> bool:
        return self.effective_unet_lr > 0

    @property
    def trains_text_encoder(self) -> bool:
        return max(self.effective_text_encoder_lrs) > 0

    @property
    def updates_text_encoder(self) -> bool:
        """Whether text encoders get gradients: they have a LoRA that is not frozen."""
        return self.trains_text_encoder and not self.text_encoder_frozen

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height) of the training resolution."""
        return self.resolution, self.resolution_height or self.resolution

    @property
    def effective_batch_size(self) -> int:
        """Images per optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def images_at_once(self) -> int:
        """Images per forward pass."""
        return min(self.train_batch_size, self.micro_batch_size or self.train_batch_size)

    @property
    def first_timestep(self) -> int:
        """The least noisy timestep that is trained (kohya: min_timestep, else 0)."""
        return 0 if self.min_timestep is None else self.min_timestep

    @property
    def end_timestep(self) -> int:
        """Timesteps below this are trained (kohya: max_timestep, else 1000)."""
        return 1000 if self.max_timestep is None else self.max_timestep

    def with_values(self, values: Mapping[str, Any]) -> TrainConfig:
        """A copy with ``values`` replaced. Raises ConfigError for unknown names, with a suggestion."""
        for name in values:
            check_name(name)
        return dataclasses.replace(self, **squared(values))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration with these values. While findings are collected (``trainer.findings``) all wrong values
        and contradictions are kept, and what remains is a configuration for the checks that follow."""
        if not collecting():
            return cls(**values)
        sound: dict[str, Any] = {}
        for name, value in values.items():
            with piece():
                check_name(name)
                sound[name] = check_value(name, value)
        with piece():
            return cls(**sound)
        return cls(**{name: sound[name] for name in _CHECKED_ALONE if name in sound})

    def as_dict(self) -> dict[str, Any]:
        """Setting → value, in declaration order. Values can be stored as JSON (unset values are None)."""
        return dataclasses.asdict(self)


def _wrong_arguments(config: TrainConfig) -> Iterator[ConfigError]:
    """An error for each argument of the optimizer or the schedule that does not fit."""
    kind, schedule = config.optimizer_type, config.lr_scheduler
    optimizer, wrong = optimizers.check(kind, config.optimizer_args)
    for name, value, reason in wrong:
        if name == "weight_decay":
            yield ConfigError(
                "optimizer_args weight_decay: it is a setting of its own here",
                f"write weight_decay = {value}",
            )
        else:
            yield _wrong_argument("optimizer_args", name, value, reason)
    if kind == "Adafactor" and optimizer.get("warmup_init") and not optimizer.get("relative_step"):
        yield ConfigError("optimizer_args warmup_init needs relative_step", "add relative_step=True")
    if config.is_schedule_free or config.has_relative_steps:
        return  # the schedule is not used
    found, wrong = schedules.check(schedule, config.lr_scheduler_args)
    for name, value, reason in wrong:
        yield _wrong_argument("lr_scheduler_args", name, value, reason)
    last = found.get("lr_end") if schedule == "polynomial" else None
    if last is not None and last >= config.learning_rate:
        yield ConfigError(
            f"polynomial ends at lr_end = {last:g}, which is not below learning_rate = "
            f"{config.learning_rate:g}",
            "raise learning_rate (unet_lr and text_encoder_lr do not count here), or give lr_scheduler_args lr_end",
        )
    if schedule == "cosine_with_min_lr":
        ratio = config.lr_scheduler_min_lr_ratio is not None
        if ratio == ("min_lr" in found):
            yield ConfigError(
                "cosine_with_min_lr needs one lowest rate, but "
                + ("lr_scheduler_min_lr_ratio and min_lr are both set" if ratio else "none is set"),
                "set lr_scheduler_min_lr_ratio, for example to 0.1, or lr_scheduler_args = min_lr=1e-6",
            )
        elif "min_lr" in found and config.learning_rate == 0:
            yield ConfigError(
                "min_lr is relative to learning_rate, which is 0", "set lr_scheduler_min_lr_ratio"
            )


def _wrong_argument(setting: str, name: str, value: Any, reason: str) -> ConfigError:
    what, _, hint = reason.partition("; ")
    shown = name if value is None else f"{name} = {value!r}"
    if not hint:
        return ConfigError(f"{setting} {clean_text(shown)[:120]} does not fit", what)
    return ConfigError(f"{setting} {clean_text(shown)[:120]}: {what}", hint)


def squared(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of which a new resolution without a height is a square, whatever it was before."""
    if "resolution" in values and "resolution_height" not in values:
        return {**values, "resolution_height": None}
    return dict(values)
