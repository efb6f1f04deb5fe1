"""The files of a transfer: transfer/FAMILY.toml, kohya-FAMILY/ and plan.md in the study's folder.

Owns their format.  Each file is replaced as a whole.  The settings file is written last, so that it never
exists with an older plan that does not match it.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from hpo.terminal import clock, short
from hpo.transfer.plan import Derived, SettingMove, TransferPlan
from hpo.transfer.profile import PRESETS, Profile
from trainer.bases import is_miniature, published_name
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.files import make_folder, write_atomic
from trainer.kohya import export as kohyaexport
from trainer.text import clean_text

WIDTH = 110
LENGTHS = ("max_train_epochs", "max_train_steps")
# Always written, even if equal to the default: what a reader looks for first.
ALWAYS = (
    "pretrained_model_name_or_path",
    "train_data_dir",
    "output_name",
    "resolution",
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_train_epochs",
    "learning_rate",
    "text_encoder_lr",
    "lr_scheduler",
    "optimizer_type",
    "network_dim",
    "network_alpha",
    "min_snr_gamma",
    "seed",
)


@dataclass(frozen=True)
class Places:
    """The paths of the files of a transfer."""

    root: Path
    family: str

    @property
    def settings(self) -> Path:
        return self.root / f"{self.family}.toml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.md"

    @property
    def kohya(self) -> Path:
        return self.root / f"kohya-{self.family}"

    @property
    def output(self) -> Path:
        return self.root / f"output-{self.family}"

    @property
    def train_command(self) -> str:
        return f"hpo train {shlex.quote(str(self.settings))}"


@dataclass(frozen=True)
class Contents:
    """What the files of a transfer are written from.  ``head``: lines on the origin of the settings."""

    plan: TransferPlan
    profile: Profile
    preset: str | None
    head: tuple[str, ...]


def write(contents: Contents, places: Places, more: Sequence[str]) -> list[str]:
    """Write all files; returns lines for the user.  ``more``: paragraphs for plan.md."""
    make_folder(places.root)
    said = _write_kohya(contents, places)
    write_atomic(places.plan, plan_text(contents, places, (*more, *said)))
    write_atomic(places.settings, settings_text(contents.plan, places, contents.head))
    return [f"written: {places.settings}, {places.plan}, {places.kohya}/", *said]


# transfer/sdxl.toml


def settings_text(plan: TransferPlan, places: Places, head: Sequence[str]) -> str:
    """The settings file for ``hpo train``, with the reason above each changed setting."""
    usual = TrainConfig().as_dict()
    by_key: dict[str, list[SettingMove]] = {}
    for move in plan.moves:
        by_key.setdefault(move.key, []).append(move)
    lines = [f"# {line}" for text in head for line in textwrap.wrap(clean_text(text), WIDTH - 2)]
    lines += ["#", f"# {clean_text(places.train_command)}", ""]
    lines += [f"output_dir = {_value(str(places.output.resolve()))}", ""]
    for key, value in plan.config.as_dict().items():
        moves = by_key.get(key, [])
        if not moves and key not in ALWAYS and value == usual[key]:
            continue
        lines += [""] if moves else []
        for move in moves:
            text = f"{shown(move.old)} → {shown(move.new)}  {move.rule}: {move.reason}"
            lines += [f"# {line}" for line in textwrap.wrap(clean_text(text), WIDTH - 2)]
        if value is None and key in LENGTHS:  # the other length is in the file
            continue
        if value is None:  # TOML has no null: a missing key is unset
            lines.append(f"# {key}: not set")
        elif key != "max_train_epochs" or plan.config.max_train_steps is None:
            lines.append(f"{key} = {_value(value)}")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    return tomlkit.item(value).as_string()


def shown(value: Any) -> str:
    """A value formatted for people."""
    if value is None or value == "":
        return "–"
    return short(value)


# Files for sd-scripts


def _write_kohya(contents: Contents, places: Places) -> list[str]:
    config, profile, preset = contents.plan.config, contents.profile, contents.preset
    base = published_name(profile.family.base)
    try:
        found = kohyaexport.to_kohya(
            config,
            profile.family.architecture,
            base,
            places.kohya.resolve(),
            str(places.output.resolve()),
        )
    except ConfigError as error:
        return [f"note: no files for sd-scripts: {error.message}"]
    extra: dict[str, Any] = dict(PRESETS[preset].kohya) if preset else {}
    if config.network_train_unet_only and not _captions_vary(config):
        extra["cache_text_encoder_outputs"] = True
    kohyaexport.write(
        kohyaexport.Export({**found.config, **extra}, found.dataset, found.command, found.notes), places.kohya
    )
    if is_miniature(profile.family.base):
        return [
            f"note: sd-scripts cannot load {profile.family.base}: {places.kohya}/ only shows what is written"
        ]
    said = [f"note: sd-scripts: {note}" for note in found.notes]
    return [*said, f"sd-scripts: {found.command}"]


def _captions_vary(config: TrainConfig) -> bool:
    rates = (
        config.caption_dropout_rate,
        config.caption_tag_dropout_rate,
        config.caption_dropout_every_n_epochs,
    )
    return config.shuffle_caption or config.enable_wildcard or any(rate > 0 for rate in rates)


# plan.md


def plan_text(contents: Contents, places: Places, more: Sequence[str]) -> str:
    """plan.md: origin, all moves, kept settings, figures, remarks and the next command."""
    plan, profile = contents.plan, contents.profile
    wish = f", preset {contents.preset}" if contents.preset else ""
    lines = [f"# Settings for {profile.family.title}", ""]
    lines += [*(_cell(text) + "  " for text in contents.head), f"Profile {profile.name}{wish}.", ""]
    lines += [
        "## Changes",
        "",
        "| setting | old | new | rule | reason | evidence |",
        "|---|---|---|---|---|---|",
    ]
    for move in plan.moves:
        cells = (move.key, shown(move.old), shown(move.new), move.rule, move.reason, move.evidence)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    lines += ["", f"Kept: {_cell(kept_line(plan))}.", "", "## Figures", ""]
    lines += [f"* {_cell(line)}" for line in derived_lines(plan.derived)]
    if plan.findings:
        lines += ["", "## Remarks", ""] + [f"* {f.level}: {_cell(f.text)}" for f in plan.findings]
    lines += ["", "## Next", "", "```", clean_text(places.train_command), "```", ""]
    lines += [_cell(text) + "\n" for text in more]
    lines.append(
        "The rules are an informed guess with named sources, not a measurement on these images. `--trials 6` measures. "
        "For what each rule does, see docs/transfer.md."
    )
    return "\n".join(lines) + "\n"


def kept_line(plan: TransferPlan) -> str:
    """The important settings that were not changed."""
    names = (
        *("network_dim", "network_alpha", "min_snr_gamma", "noise_offset", "lr_scheduler"),
        *("lr_scheduler_num_cycles", "optimizer_type", "weight_decay", "network_dropout"),
        *("learning_rate", "text_encoder_lr", *LENGTHS, "gradient_accumulation_steps"),
    )
    moved = {move.key for move in plan.moves}
    unused = "max_train_epochs" if plan.config.max_train_steps is not None else "max_train_steps"
    values = {name: getattr(plan.config, name) for name in names if name not in (*moved, unused)}
    if values.get("lr_scheduler") != "cosine_with_restarts":
        values.pop("lr_scheduler_num_cycles", None)
    return ", ".join(f"{name} {'off' if value is None else shown(value)}" for name, value in values.items())


def derived_lines(derived: Derived) -> list[str]:
    """The derived figures, one per line."""
    (before, now), (first, then) = derived.effective_batch, derived.updates
    lines = [
        f"images per update (effective batch): {_beside(now, before)}",
        f"updates: {_beside(then, first)}",
    ]
    share = derived.integrated_rate
    if share is not None and not 0.995 < share < 1.005:
        lines.append(
            f"how far the LoRA can move (learning rate × updates): {share:.2f} times that of the search"
        )
    if derived.file_bytes is not None:
        lines.append(f"LoRA file {derived.file_bytes / 1e6:.0f} MB")
    if derived.peak_bytes is not None:
        lines.append(f"predicted peak of GPU memory {derived.peak_bytes / 1e9:.1f} GB")
    if derived.seconds is not None:
        lines.append(
            f"predicted time {clock(derived.seconds)} on the machine of the search (from its seconds per sample)"
        )
    return lines


def _beside(now: int, before: int) -> str:
    return f"{now}, as in the search" if now == before else f"{now} ({before} in the search)"


def _cell(text: Any) -> str:
    return clean_text(str(text)).replace("|", "\\|")
