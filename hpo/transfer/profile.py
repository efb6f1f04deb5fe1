"""Profile and Family: what the transfer's rules work with, read from TOML and checked wholly.

Owns the files ``studies/families/NAME.toml`` (facts of a kind of base), ``studies/profiles/NAME.toml`` (what
is wanted on a card) and the presets.  What is done with them is ``hpo.transfer.rules``'s.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hpo.study import SHIPPED
from trainer.bases import FAMILIES
from trainer.config import TrainConfig, check_name, check_value, suggestion
from trainer.errors import ConfigError
from trainer.text import clean_text

RATE_RULES = ("sqrt_batch", "keep", "factor", "linear_batch")
TEXT_ENCODERS = ("inherit", "off")
MAX_BYTES = 100_000
# Settings that the rules themselves decide: a profile's [settings] cannot.
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


def _number(default: Any, low: float, high: float, *, none: bool = False) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "none": none})


def _word(default: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True)
class BatchRule:
    """[batch] at: another micro-batch from, or below, an amount of GPU memory."""

    train_batch_size: int = _number(1, 1, 1024)
    from_gb: float | None = _number(None, 0, 10_000, none=True)
    below_gb: float | None = _number(None, 0, 10_000, none=True)

    def holds(self, vram_gb: float) -> bool:
        return (self.from_gb is None or vram_gb >= self.from_gb) and (
            self.below_gb is None or vram_gb < self.below_gb
        )


@dataclass(frozen=True)
class BatchSection:
    """[batch].  A micro-batch of 0 is half of the source's."""

    train_batch_size: int = _number(1, 0, 1024)
    effective_batch_cap: int = _number(8, 1, 100_000)
    at: tuple[BatchRule, ...] = ()


@dataclass(frozen=True)
class RateSection:
    """[rate]: what becomes of the rates.  ``factor``s belong to the rule of that name."""

    rule: str = _word("sqrt_batch", RATE_RULES)
    factor: float = _number(0.77, 0.01, 10)
    text_encoder_factor: float = _number(0.75, 0.01, 10)
    text_encoder: str = _word("inherit", TEXT_ENCODERS)
    text_encoder_ratio: float = _number(0.67, 0.5, 0.8)
    text_encoder_cap: float = _number(0.8, 0.01, 1)


@dataclass(frozen=True)
class LengthSection:
    """[length]."""

    epochs_factor: float = _number(1.0, 0.1, 10)


@dataclass(frozen=True)
class OptimizerSection:
    """[optimizer]."""

    eight_bit: bool = False


@dataclass(frozen=True)
class ProfileLimits:
    """[limits] of AdamW's rates.  Normalised: learning_rate × √(alpha / 16).  Unset: no such limit."""

    learning_rate_low: float = _number(1e-8, 0, 10)
    learning_rate_high: float = _number(1.0, 0, 10)
    normalised_warn: float | None = _number(None, 0, 100, none=True)
    normalised_refuse: float | None = _number(None, 0, 100, none=True)
    text_encoder_lr_warn: float | None = _number(None, 0, 10, none=True)


@dataclass(frozen=True)
class Family:
    """Facts of a kind of base that settings depend on: one file of ``studies/families``."""

    name: str
    title: str = _word("")
    base: str = _word("")
    architecture: str = _word("sdxl", tuple(FAMILIES))
    sources: tuple[str, ...] = ()
    default_profile: str = _word("")
    native_resolution_px: int = _number(1024, 16, 4096)
    min_bucket_reso: int = _number(256, 16, 4096)
    max_bucket_reso: int = _number(2048, 16, 8192)
    bucket_reso_steps: int = _number(64, 8, 1024)
    small_image_px: int = _number(0, 0, 4096)
    text_encoders: int = _number(1, 1, 2)
    max_token_length: int | None = _number(None, 75, 225, none=True)
    half_vae: bool = True
    cost_of_a_sample: float = _number(1.0, 0.001, 10_000)
    drops: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    values_per_rank: Mapping[str, int] = field(default_factory=dict)
    community_default: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """What is wanted on a card: one file of ``studies/profiles``."""

    name: str
    family: Family
    title: str = _word("")
    vram_gb: float = _number(16.0, 1, 10_000)
    refuse_below_gb: float = _number(0.0, 0, 10_000)
    batch: BatchSection = BatchSection()
    rate: RateSection = RateSection()
    length: LengthSection = LengthSection()
    optimizer: OptimizerSection = OptimizerSection()
    settings: Mapping[str, Any] = field(default_factory=dict)
    limits: ProfileLimits = ProfileLimits()

    def with_vram(self, vram_gb: float) -> Profile:
        """The same wishes on a card of another size."""
        return dataclasses.replace(self, vram_gb=vram_gb)

    def micro_batch(self, source: int) -> int:
        """Images at once: by the card, else the profile's own, else half of the source's."""
        for step in self.batch.at:
            if step.holds(self.vram_gb):
                return min(step.train_batch_size, max(1, source))
        return self.batch.train_batch_size or max(1, source // 2)


@dataclass(frozen=True)
class LoaderPreset:
    """A named set of wishes (mission S3).  ``kohya`` are keys that only sd-scripts has."""

    effective_batch_cap: int
    settings: Mapping[str, Any]
    kohya: Mapping[str, Any]


def _preset(
    cap: int, vae: int, workers: int, persistent: bool, lowram: bool, checkpointing: bool
) -> LoaderPreset:
    loader = {
        "max_data_loader_n_workers": workers,
        "persistent_data_loader_workers": persistent,
        "lowram": lowram,
    }
    return LoaderPreset(cap, {"vae_batch_size": vae, "gradient_checkpointing": checkpointing}, loader)


# The users' table of presets: accumulation at micro-batch 1, VAE batch, workers, persistent, lowram, checkpointing.
PRESETS: Mapping[str, LoaderPreset] = MappingProxyType(
    {
        "conservative": _preset(4, 1, 1, False, True, False),
        "balanced": _preset(6, 2, 2, True, False, False),
        "aggressive": _preset(8, 4, 4, True, False, True),
    }
)


def read_family(name: str) -> Family:
    """A family by its name.  ConfigError names those that are known."""
    path = _find("families", name, "family", "--to")
    table = _table(path)
    return _checked(path, lambda: _family(path.stem, table))


def families_from(source: str) -> list[str]:
    """The shipped families that settings found on ``source`` can be carried over to."""
    found = sorted((SHIPPED / "families").glob("*.toml"))
    return [path.stem for path in found if source in _table(path).get("sources", ())]


def read_profile(spec: str) -> Profile:
    """A profile: a name, or a path to a TOML file.  ConfigError for the first thing wrong in it."""
    path = Path(spec) if spec.endswith(".toml") else _find("profiles", spec, "profile", "--profile")
    table = _table(path)
    return _checked(path, lambda: _profile(path.stem, table))


def profiles_of(family: str) -> list[str]:
    """The shipped profiles of a family."""
    found = sorted((SHIPPED / "profiles").glob("*.toml"))
    return [path.stem for path in found if _table(path).get("family") == family]


def _find(kind: str, name: str, what: str, flag: str) -> Path:
    """studies/KIND/NAME.toml: the current folder's wins over the shipped one."""
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
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{shown} is larger than 100 kB", "give a profile")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {shown}: {error.strerror}", "check the path") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{shown} is not valid TOML: {clean_text(str(error))}", "correct it") from None


def _checked(path: Path, read: Any) -> Any:
    try:
        return read()
    except ConfigError as error:
        raise ConfigError(f"{clean_text(path.name)}: {error.message}", error.hint) from None


def _family(name: str, table: Mapping[str, Any]) -> Family:
    body = dict(table)
    drops, notes = (_reasons(body.pop(where, {}), where) for where in ("drops", "notes"))
    ranks = _mapping(body.pop("values_per_rank", {}), "values_per_rank")
    known = ("unet", "text_encoders")
    for part, count in ranks.items():
        _known(part, known, "[values_per_rank]")
        _in_range(f"[values_per_rank] {part}", count, 1, 1e12, whole=True)
    default = _settings(body.pop("community_default", {}), "community_default")
    sources = body.pop("sources", [])
    if not isinstance(sources, list) or not all(isinstance(word, str) for word in sources):
        raise ConfigError("sources is not a list of names", 'write sources = ["sd15"]')
    own = {"drops": drops, "notes": notes, "values_per_rank": ranks}
    own["community_default"] = default
    family = _section(Family, body, "", name=name, sources=tuple(sources), **own)
    _require(family.base, "base", 'base = "sdxl"')
    _valid_together(
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
        raise ConfigError("family is missing", 'write family = "sdxl"')
    sections: dict[str, Any] = {
        "rate": _section(RateSection, body.pop("rate", {}), "rate"),
        "length": _section(LengthSection, body.pop("length", {}), "length"),
        "optimizer": _section(OptimizerSection, body.pop("optimizer", {}), "optimizer"),
        "limits": _section(ProfileLimits, body.pop("limits", {}), "limits"),
        "settings": _settings(body.pop("settings", {}), "settings"),
        "batch": _batch(body.pop("batch", {})),
        "family": read_family(family),
    }
    for setting in sections["settings"]:
        if setting in RULED:
            raise ConfigError(f"{setting} in [settings] is decided by the rules", "leave it out")
    _valid_together(sections["settings"])
    limits: ProfileLimits = sections["limits"]
    pairs = (
        ("learning_rate_low", limits.learning_rate_low, "learning_rate_high", limits.learning_rate_high),
        ("normalised_warn", limits.normalised_warn, "normalised_refuse", limits.normalised_refuse),
    )
    for low, least, high, most in pairs:
        if least is not None and most is not None and least > most:
            raise ConfigError(f"[limits] {low} {least:g} is above {high} {most:g}", "swap them")
    return _section(Profile, body, "", name=name, **sections)


def _batch(body: Any) -> BatchSection:
    body = dict(_mapping(body, "batch"))
    rows = body.pop("at", [])
    if not isinstance(rows, list):
        raise ConfigError("[batch] at is not a list", "write at = [{ below_gb = 16, train_batch_size = 2 }]")
    steps = []
    for row in rows:
        step = _section(BatchRule, row, "batch.at")
        if step.from_gb is None and step.below_gb is None:
            raise ConfigError("[batch] at has a row without from_gb and below_gb", "give one of both")
        steps.append(step)
    return _section(BatchSection, body, "batch", at=tuple(steps))


def _section(kind: Any, body: Any, where: str, **own: Any) -> Any:
    """A section's dataclass: every key known, every value of its type and in its range."""
    shown = f"[{where}] " if where else ""
    known = {f.name: f for f in fields(kind) if (f.name not in own and f.metadata) or f.type == "bool"}
    values: dict[str, Any] = {}
    for key, value in _mapping(body, where).items():
        _known(key, known, f"[{where}]" if where else "the file")
        f = known[key]
        if f.type == "bool":
            if not isinstance(value, bool):
                raise ConfigError(f"{shown}{key} = {value!r} is not true or false", "write true or false")
        elif "choices" in f.metadata:
            _text(shown + key, value)
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                raise ConfigError(
                    f"{shown}{key} = {clean_text(value)} is not known",
                    suggestion(value, f.metadata["choices"]) or ", ".join(f.metadata["choices"]),
                )
        else:
            low, high = f.metadata["low"], f.metadata["high"]
            value = _in_range(shown + key, value, low, high, whole="int" in str(f.type))
        values[key] = value
    return kind(**values, **own)


def _reasons(body: Any, where: str) -> Mapping[str, str]:
    """Setting → why."""
    for setting, reason in _mapping(body, where).items():
        check_name(setting)
        _text(f"[{where}] {setting}", reason)
    return body


def _settings(body: Any, where: str) -> dict[str, Any]:
    return {name: check_value(name, value) for name, value in _mapping(body, where).items()}


def _valid_together(values: Mapping[str, Any]) -> None:
    """Settings must be possible beside the usual ones."""
    TrainConfig().with_values(values)


def _mapping(body: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(body, Mapping):
        raise ConfigError(f"[{where}] is not a section", f"write [{where}] on a line of its own")
    return body


def _known(key: str, names: Iterable[str], where: str) -> None:
    names = list(names)
    if key not in names:
        raise ConfigError(
            f"unknown key {clean_text(key)} in {where}",
            suggestion(key, names) or "known: " + ", ".join(names),
        )


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name} = {value!r} is not a text", 'write "…"')


def _require(value: str, name: str, example: str) -> None:
    if not value:
        raise ConfigError(f"{name} is missing", f"write {example}")


def _in_range(name: str, value: Any, low: float, high: float, *, whole: bool) -> Any:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise ConfigError(
            f"{name} = {value!r} is not a {'whole ' if whole else ''}number", f"{low:g} to {high:g}"
        )
    if not low <= value <= high:
        raise ConfigError(f"{name} = {value} is outside its limits", f"from {low:g} to {high:g}")
    return value
