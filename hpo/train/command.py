"""``hpo train``: from the command line's words to a dry run or a run.

Owns how options become settings, and the notes on settings that have no effect in combination. Does not own
the run (``hpo.train.run``) or the dry run (``hpo.train.dryrun``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from hpo.health import Lookout
from hpo.study import origin_of, read_thresholds
from hpo.train import dryrun
from hpo.train import plan as trainplan
from hpo.train.samples import file_stem
from trainer import optimizers
from trainer.bases import FAMILIES, block_ranks, block_rates, families
from trainer.config import LYCORIS_PRESETS, TrainConfig
from trainer.data import read_dataset_file
from trainer.errors import ConfigError
from trainer.findings import Findings, piece
from trainer.kohya import TrainFile, known_family, read_train_file
from trainer.paths import user_path
from trainer.schedules import CYCLIC
from trainer.text import clean_text

OUTPUT = Path("output")  # where LoRA files go if neither the command nor the file names a folder


@dataclass(frozen=True)
class TrainRequest:
    """The arguments of ``hpo train``."""

    file: Path
    dataset: Path | None = None
    sets: tuple[str, ...] = ()
    output: Path | None = None
    data: Path | None = None
    base: str | None = None
    device: str | None = None
    dry_run: bool = False
    strict: bool = False
    as_json: bool = False

    @property
    def places(self) -> dict[str, Any]:
        named = {"pretrained_model_name_or_path": self.base, "train_data_dir": self.data and str(self.data)}
        return {name: value for name, value in named.items() if value}

    def output_of(self, file: TrainFile) -> Path:
        """Where LoRA files go."""
        named = str(self.output) if self.output else file.output_dir
        return Path(user_path(named, "--output" if self.output else "output_dir")) if named else OUTPUT


def train(request: TrainRequest, console: Console, echo: Callable[[str], None]) -> None:
    """Run the training, or describe it. Raises ToolError."""
    if request.dry_run:
        dryrun.dry_run(request, console, echo)
        return
    file = _checked(request, console)
    if os.environ.get("RANK", "0") != "0":  # one of several processes: only the first one prints
        console = Console(quiet=True)
    trainplan.show_lines(console, file)
    from hpo.train.run import run  # loads torch

    lookout = Lookout(read_thresholds(file.health))
    run(file.config, request.output_of(file), request.device, console, lookout)


def _checked(request: TrainRequest, console: Console) -> TrainFile:
    """The settings of a run. Everything that is wrong with them is shown at once, then raised."""
    findings = Findings()
    file = None
    with findings.looking():
        file = read_request(request)
    if file is not None:
        with findings.looking():
            check(file.config, known_family(file))
        with findings.looking():
            file.require_all()
    if len(findings.errors) > 1:
        trainplan.show_findings(console, findings.errors)
    findings.require_none()
    assert file is not None
    return file


def read_request(request: TrainRequest) -> TrainFile:
    """The settings that a command asks for, with notes on those that have no effect."""
    if request.dataset and request.data:
        raise ConfigError("--dataset and --data both say what is trained on", "give one of them")
    file = read_train_file(
        request.file,
        dataset=request.dataset,
        sets=request.sets,
        places=request.places,
        replaced=("output_dir",) if request.output else (),
    )
    with piece():
        read_thresholds(file.health)
    if request.strict:
        with piece():
            file.require_known()
    with piece():  # it reads the dataset file, too
        file = replace(file, without_effect=(*file.without_effect, *idle(file)))
    return file


def check(config: TrainConfig, family: str | None) -> None:
    """Raise for everything that can be refused before anything is loaded. ``family`` is None if unknown."""
    with piece():
        file_stem(config.output_name)
    with piece():
        optimizers.check_installed(config.optimizer_type)
    if config.lycoris_preset not in ("", *LYCORIS_PRESETS):
        from trainer.adapters import preset_of  # loads torch

        with piece():
            preset_of(config.lycoris_preset)
    if family is not None:
        with piece():
            families.check(config, family, clean_text(config.pretrained_model_name_or_path))
        with piece():
            block_rates(config, family)
        with piece():
            block_ranks(config, family)
        return
    errors = []
    for either in FAMILIES:
        try:
            block_rates(config, either)
            block_ranks(config, either)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == len(FAMILIES):
        raise errors[0]


# setting → (when it acts, what it waits for)
_WAITS: dict[str, tuple[Callable[[TrainConfig], bool], str]] = {
    "save_last_n_epochs": (lambda c: c.save_every_n_epochs is not None, "save_every_n_epochs"),
    "save_last_n_steps": (lambda c: c.save_every_n_steps is not None, "save_every_n_steps"),
    "sample_prompts": (
        lambda c: bool(c.sample_every_n_epochs or c.sample_every_n_steps or c.sample_at_first),
        "sample_every_n_epochs, sample_every_n_steps or sample_at_first",
    ),
    "huber_schedule": (lambda c: c.loss_type in ("huber", "smooth_l1"), "loss_type = huber"),
    "huber_c": (lambda c: c.loss_type in ("huber", "smooth_l1"), "loss_type = huber"),
    "huber_scale": (lambda c: c.loss_type in ("huber", "smooth_l1"), "loss_type = huber"),
    "multires_noise_discount": (lambda c: bool(c.multires_noise_iterations), "multires_noise_iterations"),
    "noise_offset_random_strength": (lambda c: c.noise_offset > 0, "noise_offset"),
    "ip_noise_gamma_random_strength": (lambda c: bool(c.ip_noise_gamma), "ip_noise_gamma"),
    "conv_alpha": (lambda c: c.conv_dim is not None, "conv_dim"),
    "keep_tokens": (
        lambda c: c.shuffle_caption or c.caption_tag_dropout_rate > 0 or c.token_warmup_step > 0,
        "shuffle_caption, caption_tag_dropout_rate or token_warmup_step",
    ),
    "token_warmup_min": (lambda c: c.token_warmup_step > 0, "token_warmup_step"),
    "validation_seed": (lambda c: c.validation_split > 0, "validation_split"),
    "factor": (lambda c: c.network_type == "LoKr", "network_type = LoKr"),
    "full_matrix": (lambda c: c.network_type == "LoKr", "network_type = LoKr"),
    "decompose_both": (lambda c: c.network_type == "LoKr" and not c.full_matrix, "LoKr without full_matrix"),
    "unbalanced_factorization": (lambda c: c.network_type == "LoKr", "network_type = LoKr"),
    "constraint": (lambda c: c.network_type in ("OFT", "BOFT"), "network_type = OFT or BOFT"),
    "rescaled": (lambda c: c.network_type in ("OFT", "BOFT"), "network_type = OFT or BOFT"),
    "oft_blocks": (lambda c: c.network_type == "OFT", "network_type = OFT"),
    "unit": (lambda c: c.network_type == "DyLoRA", "network_type = DyLoRA"),
    "rs_lora": (
        lambda c: c.network_type not in ("Full", "IA3", "OFT", "BOFT"),
        "a network_type with alpha and rank",
    ),
    "rank_dropout": (
        lambda c: c.network_type not in ("IA3", "BOFT", "GLoRA", "DyLoRA"),
        "another network_type than IA3, BOFT, GLoRA and DyLoRA",
    ),
    "rank_dropout_rows": (lambda c: c.rank_dropout > 0, "rank_dropout"),
    "base_weights_multiplier": (lambda c: bool(c.base_weights), "base_weights"),
    "prior_loss_weight": (lambda c: bool(c.reg_data_dir or c.dataset_config), "reg_data_dir"),
    "conditioning_data_dir": (lambda c: c.masked_loss, "masked_loss"),
    "lr_scheduler_num_cycles": (
        lambda c: c.has_schedule(*CYCLIC),
        "lr_scheduler = cosine_with_restarts, cosine_with_min_lr, warmup_stable_decay or one with restarts",
    ),
    "lr_scheduler_power": (lambda c: c.has_schedule("polynomial"), "lr_scheduler = polynomial"),
    "lr_warmup_steps": (lambda c: c.warms_up, "another lr_scheduler or optimizer_type, which warms up"),
    "lr_decay_steps": (lambda c: c.has_schedule("warmup_stable_decay"), "lr_scheduler = warmup_stable_decay"),
    "lr_scheduler_timescale": (lambda c: c.has_schedule("inverse_sqrt"), "lr_scheduler = inverse_sqrt"),
    "lr_scheduler_min_lr_ratio": (
        lambda c: c.has_schedule("cosine_with_min_lr", "warmup_stable_decay"),
        "lr_scheduler = cosine_with_min_lr or warmup_stable_decay",
    ),
    "lr_scheduler": (lambda c: c.has_schedule(c.lr_scheduler), "an optimizer_type that follows a schedule"),
    "lr_scheduler_args": (
        lambda c: c.has_schedule(c.lr_scheduler),
        "an optimizer_type that follows a schedule",
    ),
    **{
        name: (
            lambda c: c.network_type in ("LoRA", "LoCon", "DoRA", "DyLoRA"),
            "network_type = LoRA, LoCon, DoRA or DyLoRA",
        )
        for name in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
    },
    "checkpoint_blocks": (lambda c: c.gradient_checkpointing, "gradient_checkpointing"),
    "cpu_offload_checkpointing": (lambda c: c.gradient_checkpointing, "gradient_checkpointing"),
    "text_encoder_frozen": (lambda c: c.trains_text_encoder, "text encoders that are trained"),
    "text_encoder_lr": (lambda c: not c.network_train_unet_only, "network_train_unet_only = false"),
    "bucket_reso_steps": (lambda c: c.enable_bucket, "enable_bucket"),
    "bucket_no_upscale": (lambda c: c.enable_bucket, "enable_bucket"),
    "min_bucket_reso": (
        lambda c: c.enable_bucket and not c.bucket_no_upscale,
        "enable_bucket without bucket_no_upscale",
    ),
    "max_bucket_reso": (
        lambda c: c.enable_bucket and not c.bucket_no_upscale,
        "enable_bucket without bucket_no_upscale",
    ),
}


# What hpo transfer writes for its own reasons; a user who wrote neither is not told about it.
_BY_TRANSFER = ("min_bucket_reso", "max_bucket_reso")


def idle(file: TrainFile) -> list[str]:
    """Notes on settings that were given but need another setting to have an effect, in any folder of the dataset."""
    usual = TrainConfig().as_dict()
    written = _BY_TRANSFER if origin_of(file.config.training_comment) else ()
    forms = [file.config]
    if file.config.dataset_config:
        subsets = read_dataset_file(Path(file.config.dataset_config)).subsets
        forms += [file.config.with_values(dict(subset.own)) for subset in subsets]
    return [
        f"{name}: only used with {needed}"
        for name, (acts, needed) in _WAITS.items()
        if name in file.origins
        and name not in written
        and getattr(file.config, name) not in (usual[name], 0, None, "")
        and not any(map(acts, forms))
    ]
