"""Profile and Family: the inputs of the transfer rules, read from TOML files and fully validated.

Owns the files ``studies/families/NAME.toml`` (properties of a model family), ``studies/profiles/NAME.toml``
(defaults for one GPU size) and the presets.  Does not own how they are used; see ``hpo.transfer.rules``.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hpo.study import SHIPPED
from trainer.bases import FAMILIES
from trainer.checks import read, section, setting, suggestion
from trainer.config import SETTINGS, TrainConfig, check_value
from trainer.errors import ConfigError
from trainer.reading import read_small
from trainer.text import clean_text

RATE_RULES = ("sqrt_batch", "sqrt_updates", "keep", "factor", "linear_batch")
TEXT_ENCODERS = ("inherit", "off")
MAX_BYTES = 100_000
# Settings that are decided by the rules and therefore not allowed in a profile's [settings].
RULED = frozenset(
    {
        "pretrained_model_name_or_path",
        "train_data_dir",
        "dataset_config",
        "output_name",
        "resolution",
        "train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "unet_lr",
        "text_encoder_lr",
        "text_encoder_lr1",
        "text_encoder_lr2",
        "network_train_unet_only",
        "max_train_epochs",
        "max_train_steps",
        "lr_warmup_steps",
        "optimizer_type",
    }
)


@dataclass(frozen=True)
class BatchRule:
    """[batch] at: a different micro-batch from, or below, a GPU memory size."""

    train_batch_size: int = setting(1, low=1, high=1024)
    from_gb: float | None = setting(None, low=0, high=10_000)
    below_gb: float | None = setting(None, low=0, high=10_000)

    def holds(self, vram_gb: float) -> bool:
        return (self.from_gb is None or vram_gb >= self.from_gb) and (
            self.below_gb is None or vram_gb < self.below_gb
        )


@dataclass(frozen=True)
class BatchSection:
    """[batch].  A micro-batch of 0 means half of the source's."""

    train_batch_size: int = setting(1, low=0, high=1024)
    effective_batch_cap: int = setting(8, low=1, high=100_000)
    at: tuple[BatchRule, ...] = ()


@dataclass(frozen=True)
class RateSection:
    """[rate]: how rates are converted.  ``factor`` and ``text_encoder_factor`` are used by the rule ``factor``."""

    rule: str = setting("sqrt_batch", choices=RATE_RULES)
    factor: float = setting(0.77, low=0.01, high=10)
    text_encoder_factor: float = setting(0.75, low=0.01, high=10)
    text_encoder: str = setting("inherit", choices=TEXT_ENCODERS)
    text_encoder_ratio: float = setting(0.67, low=0.5, high=0.8)
    text_encoder_cap: float = setting(0.8, low=0.01, high=1)


@dataclass(frozen=True)
class LengthSection:
    """[length]."""

    epochs_factor: float = setting(1.0, low=0.1, high=10)


@dataclass(frozen=True)
class OptimizerSection:
    """[optimizer]."""

    eight_bit: bool = setting(False)


@dataclass(frozen=True)
class ProfileLimits:
    """[limits] for AdamW's rates.  Normalised: learning_rate × √(alpha / 16).  None means no limit."""

    learning_rate_low: float = setting(1e-8, low=0, high=10)
    learning_rate_high: float = setting(1.0, low=0, high=10)
    normalised_warn: float | None = setting(None, low=0, high=100)
    normalised_refuse: float | None = setting(None, low=0, high=100)
    text_encoder_lr_warn: float | None = setting(None, low=0, high=10)


@dataclass(frozen=True)
class Family:
    """Properties of a model family that settings depend on: one file in ``studies/families``."""

    name: str
    title: str = setting("")
    base: str = setting("")
    architecture: str = setting("sdxl", choices=tuple(FAMILIES))
    sources: tuple[str, ...] = setting((), example='["sd15"]')
    default_profile: str = setting("")
    native_resolution_px: int = setting(1024, low=16, high=4096)
    min_bucket_reso: int = setting(256, low=16, high=4096)
    max_bucket_reso: int = setting(2048, low=16, high=8192)
    bucket_reso_steps: int = setting(64, low=8, high=1024)
    small_image_px: int = setting(0, low=0, high=4096)
    text_encoders: int = setting(1, low=1, high=2)
    max_token_length: int | None = setting(None, low=75, high=225)
    half_vae: bool = setting(True)
    cost_of_a_sample: float = setting(1.0, low=0.001, high=10_000)
    drops: Mapping[str, str] = setting({}, choices=tuple(SETTINGS))
    notes: Mapping[str, str] = setting({}, choices=tuple(SETTINGS))
    values_per_rank: Mapping[str, int] = setting({}, choices=("unet", "text_encoders"), low=1, high=1e12)
    community_default: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """The defaults for one GPU size: one file in ``studies/profiles``."""

    name: str
    family: Family
    title: str = setting("")
    vram_gb: float = setting(16.0, low=1, high=10_000)
    refuse_below_gb: float = setting(0.0, low=0, high=10_000)
    batch: BatchSection = BatchSection()
    rate: RateSection = RateSection()
    length: LengthSection = LengthSection()
    optimizer: OptimizerSection = OptimizerSection()
    settings: Mapping[str, Any] = field(default_factory=dict)
    limits: ProfileLimits = ProfileLimits()

    def with_vram(self, vram_gb: float) -> Profile:
        """The same profile for a different amount of GPU memory."""
        return dataclasses.replace(self, vram_gb=vram_gb)

    def micro_batch(self, source: int) -> int:
        """The micro-batch: by GPU memory, else the profile's default, else half of the source's."""
        for step in self.batch.at:
            if step.holds(self.vram_gb):
                return min(step.train_batch_size, max(1, source))
        return self.batch.train_batch_size or max(1, source // 2)


@dataclass(frozen=True)
class LoaderPreset:
    """A named set of loader and memory settings.  ``kohya``: keys that only sd-scripts has."""

    effective_batch_cap: int
    settings: Mapping[str, Any]
    kohya: Mapping[str, Any]


# Keys of a preset that only sd-scripts has.
_LOADER = ("max_data_loader_n_workers", "persistent_data_loader_workers", "lowram")
# Name, effective batch cap, VAE batch, checkpointing, then the values of _LOADER.  All values are assumed.
PRESETS: Mapping[str, LoaderPreset] = MappingProxyType(
    {
        name: LoaderPreset(
            cap,
            {"vae_batch_size": vae, "gradient_checkpointing": checkpointing},
            dict(zip(_LOADER, loader, strict=True)),
        )
        for name, cap, vae, checkpointing, loader in (
            ("conservative", 4, 1, False, (1, False, True)),
            ("balanced", 6, 2, False, (2, True, False)),
            ("aggressive", 8, 4, True, (4, True, False)),
        )
    }
)


def read_family(name: str) -> Family:
    """Read a family by name.  Raises ConfigError with the known names."""
    path = _find("families", name, "family", "--to")
    table = _table(path)
    return _checked(path, lambda: _family(path.stem, table))


def read_profile(spec: str) -> Profile:
    """Read a profile by name or from a TOML file.  Raises ConfigError for the first error in it."""
    path = Path(spec) if spec.endswith(".toml") else _find("profiles", spec, "profile", "--profile")
    table = _table(path)
    return _checked(path, lambda: _profile(path.stem, table))


def profiles_of(family: str) -> list[str]:
    """The shipped profiles of a family."""
    found = sorted((SHIPPED / "profiles").glob("*.toml"))
    return [path.stem for path in found if _table(path).get("family") == family]


def _find(kind: str, name: str, what: str, flag: str) -> Path:
    """The path of studies/KIND/NAME.toml; one in the current folder takes precedence over the shipped one."""
    known = sorted(path.stem for path in (SHIPPED / kind).glob("*.toml"))
    if "/" not in name and name not in ("", ".", ".."):
        for path in (Path("studies") / kind / f"{name}.toml", SHIPPED / kind / f"{name}.toml"):
            if path.is_file():
                return path
    hint = suggestion(name, known) or "known: " + ", ".join(known)
    raise ConfigError(f"no {what} {clean_text(name)} for {flag}", hint)


def _table(path: Path) -> dict[str, Any]:
    shown = clean_text(str(path))
    try:
        return tomllib.loads(read_small(path, MAX_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {shown}: {error.strerror}", "check the path") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{shown} is not valid TOML: {clean_text(str(error))}", "fix the file") from None


def _checked(path: Path, read: Any) -> Any:
    try:
        return read()
    except ConfigError as error:
        raise ConfigError(f"{clean_text(path.name)}: {error.message}", error.hint) from None


def _family(name: str, table: Mapping[str, Any]) -> Family:
    body = dict(table)
    default = _settings(body.pop("community_default", {}), "community_default")
    family = read(Family, body, name=name, community_default=default)
    if not family.base:
        raise ConfigError("base is missing", 'add base = "sdxl"')
    # these values must be valid together with the default settings
    TrainConfig().with_values(
        {
            "resolution": family.native_resolution_px,
            "min_bucket_reso": family.min_bucket_reso,
            "max_bucket_reso": family.max_bucket_reso,
            "bucket_reso_steps": family.bucket_reso_steps,
            "max_token_length": family.max_token_length,
            **default,
        }
    )
    return family


def _profile(name: str, table: Mapping[str, Any]) -> Profile:
    body = dict(table)
    family = body.pop("family", None)
    if not isinstance(family, str):
        raise ConfigError("family is missing", 'add family = "sdxl"')
    sections: dict[str, Any] = {
        "rate": read(RateSection, body.pop("rate", {}), "rate"),
        "length": read(LengthSection, body.pop("length", {}), "length"),
        "optimizer": read(OptimizerSection, body.pop("optimizer", {}), "optimizer"),
        "limits": read(ProfileLimits, body.pop("limits", {}), "limits"),
        "settings": _settings(body.pop("settings", {}), "settings"),
        "batch": _batch(body.pop("batch", {})),
        "family": read_family(family),
    }
    for key in sections["settings"]:
        if key in RULED:
            raise ConfigError(f"{key} is decided by the rules and not allowed in [settings]", "remove it")
    TrainConfig().with_values(sections["settings"])
    limits: ProfileLimits = sections["limits"]
    pairs = (
        ("learning_rate_low", limits.learning_rate_low, "learning_rate_high", limits.learning_rate_high),
        ("normalised_warn", limits.normalised_warn, "normalised_refuse", limits.normalised_refuse),
    )
    for low, least, high, most in pairs:
        if least is not None and most is not None and least > most:
            raise ConfigError(f"[limits] {low} {least:g} is above {high} {most:g}", "swap them")
    return read(Profile, body, name=name, **sections)


def _batch(body: Any) -> BatchSection:
    body = dict(section(body, "batch"))
    rows = body.pop("at", [])
    if not isinstance(rows, list):
        raise ConfigError("[batch] at is not a list", "use at = [{ below_gb = 16, train_batch_size = 2 }]")
    steps = []
    for row in rows:
        step = read(BatchRule, row, "batch.at")
        if step.from_gb is None and step.below_gb is None:
            raise ConfigError(
                "[batch] at has a row without from_gb and below_gb", "set at least one of the two"
            )
        steps.append(step)
    return read(BatchSection, body, "batch", at=tuple(steps))


def _settings(body: Any, where: str) -> dict[str, Any]:
    return {name: check_value(name, value) for name, value in section(body, where).items()}
