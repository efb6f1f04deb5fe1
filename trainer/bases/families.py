"""What is known of a base before it is loaded: the facts of each family, and the bases that have a short name.

Data, and what settings mean on a family.  A difference between families that is no fact here is a method of their
classes (``sd15``, ``sdxl``); what a search or a transfer does with the facts is theirs.  Telling which family a file
belongs to is ``detect``'s; whether a loaded base can do what is asked is ``trainer.data.preflight``'s.  No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import SETTINGS, TrainConfig
from trainer.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"
MINIATURE_WEIGHTS = Path(__file__).parent / "miniature" / "weights"
MINIATURE_SCORER, MINIATURE_LIKENESS = "mini-clip", "mini-likeness"
NOT_USED = ("clip_skip",)  # settings that another family passes over, as sd-scripts does; it is said


@dataclass(frozen=True)
class BaseFamily:
    """Everything in which families differ and that is no computation."""

    name: str
    title: str
    """How texts and ``Setting.only`` call it."""

    # What it is made of
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    context_width: int
    """Of the text states that cross-attention reads."""
    has_pooled_text: bool
    linear_projections: bool
    """Whether proj_in of a transformer is a linear layer; otherwise it is a 1×1 convolution."""
    blocks: tuple[int, int, int]
    """Blocks of the U-Net that LoRA modules lie in: down, middle, up, as sd-scripts counts them."""
    uses_clip_skip: bool
    half_vae: bool
    """Whether the VAE can run in fp16; otherwise it overflows (sd-scripts --no_half_vae)."""

    # Pictures
    resolution_px: int
    """The side of the square images that the published base was made for."""
    short_side_px: int | None
    """Training images whose shorter side is below are worth a warning."""

    # How it is recognised
    pipelines: tuple[str, ...]
    """Classes of diffusers' folders."""
    file_parts: Mapping[str, str]
    """What a single file must hold: beginning of keys → what it is."""
    model_marks: tuple[str, ...]
    """Texts in the name of a model that is not here."""
    lora_marks: tuple[str, ...]
    """Texts in the names of tensors that only its LoRAs have."""

    # What sd-scripts and readers of LoRA files call it
    text_prefixes: tuple[str, ...]
    """kohya's key prefix of each text encoder."""
    kohya_version: str
    """ss_base_model_version: readers tell the family by it."""
    kohya_version_start: str
    kohya_architecture: str
    """modelspec.architecture of a LoRA."""
    kohya_implementation: str
    """modelspec.implementation."""
    kohya_script: str
    kohya_bucket_steps: int
    """sd-scripts stops unless this divides bucket_reso_steps."""

    @property
    def configs(self) -> Path:
        """The configurations of its networks: what a single file is read by."""
        return CONFIGS / self.name


_SD15 = BaseFamily(
    name="sd15",
    title="SD1.5",
    text_encoders=("text_encoder",),
    tokenizers=("tokenizer",),
    context_width=768,
    has_pooled_text=False,
    linear_projections=False,
    blocks=(12, 1, 12),
    uses_clip_skip=True,
    half_vae=True,
    resolution_px=512,
    short_side_px=None,
    pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    file_parts={"cond_stage_model.transformer.": "text encoder", "first_stage_model.": "VAE"},
    model_marks=("v1-5", "v1.5", "sd15", "sd1.5", "stable-diffusion-v1", "1.5"),
    lora_marks=(),
    text_prefixes=("lora_te",),
    kohya_version="sd_v1",
    kohya_version_start="sd_v1",
    kohya_architecture="stable-diffusion-v1/lora",
    kohya_implementation="diffusers",
    kohya_script="train_network.py",
    kohya_bucket_steps=64,
)
_SDXL = BaseFamily(
    name="sdxl",
    title="SDXL",
    text_encoders=("text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    context_width=2048,
    has_pooled_text=True,
    linear_projections=True,
    blocks=(9, 3, 9),
    uses_clip_skip=False,
    half_vae=False,
    resolution_px=1024,
    short_side_px=768,
    pipelines=("StableDiffusionXLPipeline",),
    file_parts={
        "conditioner.embedders.0.transformer.": "first text encoder",
        "conditioner.embedders.1.model.": "second text encoder",
        "first_stage_model.": "VAE",
    },
    model_marks=("xl",),
    lora_marks=(
        "lora_te1_",
        "lora_te2_",
        "text_encoder_2.",
        "_input_blocks_",
        "_middle_block_",
        "_output_blocks_",
    ),
    text_prefixes=("lora_te1", "lora_te2"),
    kohya_version="sdxl_base_v1-0",
    kohya_version_start="sdxl",
    kohya_architecture="stable-diffusion-xl-v1-base/lora",
    kohya_implementation="https://github.com/Stability-AI/generative-models",
    kohya_script="sdxl_train_network.py",
    kohya_bucket_steps=32,
)
# Where the marks of two are found, the later one counts: "sdxl-v1.5" is an SDXL.
FAMILIES: dict[str, BaseFamily] = {family.name: family for family in (_SD15, _SDXL)}


@dataclass(frozen=True)
class KnownBase:
    """A base with a short name: published on the hub, or a miniature that comes with this tool."""

    name: str
    family: str
    hub: str = ""
    """Its id on the hub; a miniature has none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What is usual for it where that is not the default of ``TrainConfig``."""
    schedule: Mapping[str, Any] = field(default_factory=dict)
    """What its files do not say of its noise, in diffusers' names (prediction_type, rescale_betas_zero_snr)."""
    study: str = ""
    """The study that searches on it; without one it takes settings that were found elsewhere."""
    scorer: str = ""
    """The encoder that its images are scored with; unset, the one for real pictures."""
    likeness: str = ""
    """The same for likeness."""

    @property
    def is_miniature(self) -> bool:
        return not self.hub

    @property
    def folder(self) -> Path:
        """Where a miniature's weights are."""
        assert self.is_miniature, f"{self.name} is on the hub"
        return MINIATURE_WEIGHTS / self.name

    @property
    def configs(self) -> Path:
        """The configurations of its networks; reading them needs no weights."""
        return self.folder if self.is_miniature else FAMILIES[self.family].configs


_MINIATURE_BUCKETS = {"min_bucket_reso": 32, "bucket_reso_steps": 32}
KNOWN_BASES: dict[str, KnownBase] = {
    base.name: base
    for base in (
        KnownBase("sd15", "sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", study="sd15-character"),
        KnownBase("sdxl", "sdxl", "stabilityai/stable-diffusion-xl-base-1.0", {"resolution": 1024}),
        KnownBase(
            "mini-sd15",
            "sd15",
            settings={"resolution": 64, **_MINIATURE_BUCKETS},
            study="mini",
            scorer=MINIATURE_SCORER,
            likeness=MINIATURE_LIKENESS,
        ),
        KnownBase(
            "mini-sdxl",
            "sdxl",
            settings={"resolution": 128, **_MINIATURE_BUCKETS},
            study="mini-sdxl",
            scorer=MINIATURE_SCORER,
            likeness=MINIATURE_LIKENESS,
        ),
    )
}


def known_base(spec: str) -> KnownBase | None:
    """The base that a short name or its hub id stands for."""
    by_id = (base for base in KNOWN_BASES.values() if base.hub and base.hub == spec)
    return KNOWN_BASES.get(spec) or next(by_id, None)


def short_names() -> list[str]:
    """Every short name, the miniatures first: they are at hand."""
    return sorted(KNOWN_BASES, key=lambda name: not KNOWN_BASES[name].is_miniature)


def is_miniature(spec: str) -> bool:
    """Whether a base is one of the miniatures that come with this tool, by its name."""
    return spec in KNOWN_BASES and KNOWN_BASES[spec].is_miniature


def published_name(spec: str) -> str:
    """A short name as the hub, and so every other program, knows it; any other base as it is."""
    return (spec in KNOWN_BASES and KNOWN_BASES[spec].hub) or spec


# What settings mean on a family


def check(config: TrainConfig, family: str, base: str) -> None:
    """ConfigError for a setting of the other family.  ``base`` is how the base is called."""
    usual, title = TrainConfig().as_dict(), FAMILIES[family].title
    for name, facts in SETTINGS.items():
        if facts.only in ("", title) or name in NOT_USED or getattr(config, name) == usual[name]:
            continue
        raise ConfigError(f"{name} is for {facts.only}, and {base} is {title}", f"leave {name} out")


def passed_over(config: TrainConfig, family: str) -> list[str]:
    """Lines on settings that the family does not use."""
    if FAMILIES[family].uses_clip_skip or config.clip_skip is None:
        return []
    return [f"clip_skip = {config.clip_skip} is not used: {family} always reads the last layer but one"]
