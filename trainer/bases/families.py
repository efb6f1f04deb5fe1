"""Properties of a base that are known before it is loaded: its family, and the bases with a short name.

Owns these data and which settings a family supports. Differences in computation are methods of the family
classes (``sd15``, ``sdxl``). Does not own the detection of families (``detect``) or the checks of a loaded
base (``trainer.data.preflight``). Does not import torch.
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
NOT_USED = ("clip_skip",)  # settings that the other family ignores, as in sd-scripts; the user is told


@dataclass(frozen=True)
class BaseFamily:
    """All differences between families that are data."""

    name: str
    title: str
    """The name in texts and in ``Setting.only``."""

    # Architecture
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    context_width: int
    """The width of the text states in cross-attention."""
    has_pooled_text: bool
    linear_projections: bool
    """Whether proj_in of a transformer block is a linear layer; otherwise it is a 1×1 convolution."""
    blocks: tuple[int, int, int]
    """Number of U-Net blocks for LoRA modules (down, middle, up), as counted by sd-scripts."""
    outer_blocks: int
    """Blocks without LoRA modules before and after these, which sd-scripts' block_dims lists too."""
    uses_clip_skip: bool
    half_vae: bool
    """Whether the VAE can run in fp16; otherwise it overflows (sd-scripts --no_half_vae)."""

    # Images
    resolution_px: int
    """The side of the square images that the published base was trained on."""
    short_side_px: int | None
    """Training images whose shorter side is smaller cause a warning."""

    # Detection
    pipelines: tuple[str, ...]
    """Pipeline classes of diffusers folders."""
    file_parts: Mapping[str, str]
    """What a single file must contain: key prefix → component."""
    model_marks: tuple[str, ...]
    """Texts that identify the family in the name of a model that is not on this machine."""
    lora_marks: tuple[str, ...]
    """Texts in tensor names that only LoRAs of this family have."""

    # Names in sd-scripts and in LoRA files
    text_prefixes: tuple[str, ...]
    """kohya's key prefix of each text encoder."""
    kohya_version: str
    """ss_base_model_version: other programs detect the family by it."""
    kohya_version_start: str
    kohya_architecture: str
    """modelspec.architecture of a LoRA."""
    kohya_implementation: str
    """modelspec.implementation."""
    kohya_script: str
    kohya_bucket_steps: int
    """sd-scripts stops unless bucket_reso_steps is a multiple of this."""

    @property
    def configs(self) -> Path:
        """The configurations of its networks, used for single files."""
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
    outer_blocks=0,
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
    outer_blocks=1,
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
# If a name matches two families, the later one counts: "sdxl-v1.5" is SDXL.
FAMILIES: dict[str, BaseFamily] = {family.name: family for family in (_SD15, _SDXL)}


@dataclass(frozen=True)
class KnownBase:
    """A base with a short name: a model on the hub, or a bundled miniature."""

    name: str
    family: str
    hub: str = ""
    """Its hub id; a miniature has none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its defaults where they differ from those of ``TrainConfig``."""
    schedule: Mapping[str, Any] = field(default_factory=dict)
    """Noise schedule settings that its files lack, under diffusers' names (prediction_type, rescale_betas_zero_snr)."""
    study: str = ""
    """The study that searches on it; if empty, it only receives transferred settings."""
    scorer: str = ""
    """The scorer of its images; if unset, the default for real images."""
    likeness: str = ""
    """The likeness encoder, likewise."""

    @property
    def is_miniature(self) -> bool:
        return not self.hub

    @property
    def folder(self) -> Path:
        """The folder with the weights of a miniature."""
        assert self.is_miniature, f"{self.name} is on the hub"
        return MINIATURE_WEIGHTS / self.name

    @property
    def configs(self) -> Path:
        """The configurations of its networks; no weights are needed."""
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
    """The base with this short name or hub id; None if there is none."""
    by_id = (base for base in KNOWN_BASES.values() if base.hub and base.hub == spec)
    return KNOWN_BASES.get(spec) or next(by_id, None)


def short_names() -> list[str]:
    """All short names, the bundled miniatures first."""
    return sorted(KNOWN_BASES, key=lambda name: not KNOWN_BASES[name].is_miniature)


def is_miniature(spec: str) -> bool:
    """Whether a name is that of a bundled miniature."""
    return spec in KNOWN_BASES and KNOWN_BASES[spec].is_miniature


def published_name(spec: str) -> str:
    """The hub id of a short name, for other programs; any other spec unchanged."""
    return (spec in KNOWN_BASES and KNOWN_BASES[spec].hub) or spec


# Settings that depend on the family


def check(config: TrainConfig, family: str, base: str) -> None:
    """Raise ConfigError for a setting of the other family. ``base`` is the name for the message."""
    usual, title = TrainConfig().as_dict(), FAMILIES[family].title
    for name, facts in SETTINGS.items():
        if facts.only in ("", title) or name in NOT_USED or getattr(config, name) == usual[name]:
            continue
        raise ConfigError(f"{name} is for {facts.only}, and {base} is {title}", f"leave {name} out")


def check_clip_skip(config: TrainConfig, family: str, base: str, layers: int) -> None:
    """Raise ConfigError for a clip_skip beyond the ``layers`` of the text encoder."""
    if FAMILIES[family].uses_clip_skip and config.clip_skip is not None and config.clip_skip > layers:
        raise ConfigError(
            f"clip_skip = {config.clip_skip}, but the text encoder of {base} has {layers} layers",
            f"set it to 1 to {layers}",
        )


def check_prediction(config: TrainConfig, base: str, prediction_type: str) -> None:
    """Raise ConfigError if the training target is not what the base's files say that it predicts: training for the
    other target would destroy it."""
    is_v = prediction_type == "v_prediction"
    if is_v and not config.v_parameterization:
        raise ConfigError(
            f"{base} predicts v, but v_parameterization is not set",
            "set v_parameterization = true (and zero_terminal_snr = true if the base was made with it)",
        )
    if config.v_parameterization and not is_v:
        raise ConfigError(
            f"v_parameterization is set, but {base} says that it predicts noise",
            "leave it out; a v-prediction base says so by a v_pred key or in scheduler_config.json",
        )


def passed_over(config: TrainConfig, family: str) -> list[str]:
    """One line for each setting that the family ignores."""
    if FAMILIES[family].uses_clip_skip or config.clip_skip is None:
        return []
    return [f"clip_skip = {config.clip_skip} is ignored: {family} always uses the second-to-last layer"]
