"""Datasets described in a file, in the form of sd-scripts' ``--dataset_config``: general, datasets, subsets.

Owns which of its keys are used, translated, ignored or refused, and the folders it describes.  A value is
looked up in the subset, then its dataset, then [general], then the run's settings.  ``trainer.data.dataset``
reads images and captions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.checks import Rule, check, check_known
from trainer.config import TrainConfig, check_value
from trainer.data.captions import shown
from trainer.data.dataset import Dataset, assemble, read_dataset, split_references
from trainer.data.folders import (
    HELD_OUT,
    KOHYA_FOLDER,
    MAX_REPEATS,
    FolderPart,
    held_out_of_subsets,
    images_in,
    subject_of,
)
from trainer.data.litter import litter_notes, visible
from trainer.errors import ConfigError, DataError, MissingData
from trainer.text import clean_text
from trainer.tomlfile import as_text, read_table

# Keys of a dataset that are settings of the whole run here: all datasets of a file must agree on them.
RUN_KEYS = {
    "resolution": "resolution",
    "batch_size": "train_batch_size",
    "enable_bucket": "enable_bucket",
    "min_bucket_reso": "min_bucket_reso",
    "max_bucket_reso": "max_bucket_reso",
    "bucket_reso_steps": "bucket_reso_steps",
    "bucket_no_upscale": "bucket_no_upscale",
    "validation_split": "validation_split",
    "validation_seed": "validation_seed",
}
# Keys of a subset that are settings an image may have for itself.
OWN_KEYS = (
    "caption_extension",
    "shuffle_caption",
    "keep_tokens",
    "keep_tokens_separator",
    "caption_separator",
    "secondary_separator",
    "enable_wildcard",
    "caption_prefix",
    "caption_suffix",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
    "token_warmup_min",
    "token_warmup_step",
    "flip_aug",
    "alpha_mask",
    "conditioning_data_dir",
)
PLACE_KEYS = ("image_dir", "num_repeats", "class_tokens", "is_reg")
WITHOUT_EFFECT = {
    "cache_info": "image sizes are read again for each run",
    "custom_attributes": "sd-scripts uses it for other models only",
}
# key → (values without an effect, why all other values are refused); sd-scripts accepts these in both of its files
PIXELS_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "color_aug": ((False,), "not supported: latents are cached and reused"),
    "random_crop": (
        (False,),
        "not supported: latents are cached and reused (sd-scripts refuses it with cached latents too)",
    ),
    "face_crop_aug_range": ((), "not supported: images are cropped around their centre"),
    "resize_interpolation": (
        (),
        "images are downscaled with area and upscaled with Lanczos, the defaults of sd-scripts",
    ),
}
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "metadata_file": ((), "captions are read from the caption files next to the images"),
    **PIXELS_REFUSED,
    "network_multiplier": ((1,), "the LoRA is always trained at full strength"),
}
REPEATS = Rule(low=1, high=MAX_REPEATS)
KNOWN = (*RUN_KEYS, *OWN_KEYS, *PLACE_KEYS, *WITHOUT_EFFECT, *REFUSED)


@dataclass(frozen=True)
class Subset:
    """One folder of images as the file describes it.  ``own`` are settings it has for itself."""

    image_dir: str
    num_repeats: int = 1
    class_tokens: str = ""
    is_reg: bool = False
    own: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class DatasetFile:
    """What a dataset file means: settings of the run, folders, and lines to read, one per key."""

    path: Path
    settings: Mapping[str, Any]
    subsets: tuple[Subset, ...]
    without_effect: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def require_all(self) -> DatasetFile:
        """Raise ConfigError if anything was refused."""
        if self.refused:
            raise ConfigError(
                f"{shown(self.path)} has settings that are not supported: {'; '.join(self.refused)}",
                "remove these lines if you do not need them",
            )
        return self


def is_dataset_table(table: Mapping[str, Any]) -> bool:
    """Whether a TOML file describes datasets (alone or beside settings)."""
    datasets = table.get("datasets")
    return isinstance(datasets, list) and any(isinstance(d, dict) and "subsets" in d for d in datasets)


def read_dataset_file(path: Path) -> DatasetFile:
    """Read a dataset file.  ConfigError for typing errors, bad values, and what cannot be told apart."""
    return _DatasetReading(Path(path), read_table(path)).result()


def read_training_data(
    config: TrainConfig,
    *,
    trigger: str | None = None,
    class_word: str | None = None,
    default_repeats: int = 1,
) -> Dataset:
    """The dataset of a run: dataset_config if it is set, else train_data_dir.

    With ``hold_out_references`` the references of a search are held out here, too.
    """
    found = _all_images(config, trigger, class_word, default_repeats)
    if not config.hold_out_references or found.held_out:
        return found
    training, references = split_references(found)
    said = f"{len(references.items)} images are held out to judge likeness with (hold_out_references)"
    return replace(training, held_out=references.items, notes=(*training.notes, said))


def _all_images(
    config: TrainConfig, trigger: str | None, class_word: str | None, default_repeats: int
) -> Dataset:
    if not config.dataset_config:
        if not config.train_data_dir:
            raise ConfigError("no images are given", "set train_data_dir, or give --data FOLDER")
        return read_dataset(
            Path(config.train_data_dir),
            config,
            trigger=trigger,
            class_word=class_word,
            default_repeats=default_repeats,
        )
    file = read_dataset_file(Path(config.dataset_config)).require_all()
    parts = [_part(subset) for subset in file.subsets]
    folders = [Path(subset.image_dir) for subset in file.subsets if not subset.is_reg]
    try:
        held_paths = held_out_of_subsets(folders)
        notes = litter_notes(dict.fromkeys(Path(subset.image_dir) for subset in file.subsets))
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}", "check its permissions") from error
    found = assemble(Path(config.dataset_config).parent, parts, notes, config, held_paths)
    return replace(found, trigger=trigger or found.trigger, class_word=class_word or found.class_word)


def _part(subset: Subset) -> FolderPart:
    folder = Path(subset.image_dir)
    if not folder.is_dir():
        raise MissingData(
            f"the folder {shown(folder)} does not exist", "correct image_dir in the dataset file"
        )
    try:
        images = images_in(folder, folder)
        inside = [path.name for path in visible(folder) if path.is_dir() and path.name != HELD_OUT]
    except OSError as error:
        raise DataError(f"cannot read {shown(folder)}: {error.strerror}", "check its permissions") from error
    if not images:
        hint = (
            f"image_dir is one folder of images, for example {shown(inside[0])}"
            if inside
            else "put images in it"
        )
        raise DataError(f"no images in {shown(folder)}", hint)
    trigger, class_word = subject_of(subset.class_tokens)
    named = KOHYA_FOLDER.fullmatch(folder.resolve().name)
    if named and not class_word:  # as a search of this folder would read it
        own = subject_of(named[2])
        trigger, class_word = own if trigger in (None, own[0]) else (trigger, own[1])
    return FolderPart(
        tuple(images),
        subset.num_repeats,
        trigger=trigger,
        class_word=class_word,
        words=subset.class_tokens,
        own=subset.own,
        is_reg=subset.is_reg,
        root=folder,
    )


@dataclass
class _DatasetReading:
    """One dataset file on its way to a DatasetFile."""

    path: Path
    table: Mapping[str, Any]
    without_effect: dict[str, None] = field(default_factory=dict)
    refused: dict[str, None] = field(default_factory=dict)

    def result(self) -> DatasetFile:
        general = self._section(self.table.get("general", {}), "[general]")
        datasets = self.table.get("datasets")
        if not isinstance(datasets, list) or not datasets:
            raise ConfigError(f"{shown(self.path)} has no [[datasets]]", "see docs/settings.md for its form")
        runs, subsets = [], []
        for number, dataset in enumerate(datasets, 1):
            where = f"[[datasets]] {number}"
            own = self._section(dataset, where)
            folders = own.pop("subsets", None)
            if not isinstance(folders, list) or not folders:
                raise ConfigError(f"{where} in {shown(self.path)} has no [[datasets.subsets]]", "add one")
            values = {**general, **own}
            runs.append(self._run(values))
            for place, folder in enumerate(folders, 1):
                given = self._section(folder, f"subset {place} of {where}")
                misplaced = [name for name in given if name in RUN_KEYS]
                if misplaced:
                    raise ConfigError(
                        f"{misplaced[0]} belongs to {where}, not to one of its subsets", "move it up"
                    )
                subsets.append(self._subset({**values, **given}, f"subset {place} of {where}"))
        return DatasetFile(
            self.path, self._common(runs), tuple(subsets), tuple(self.without_effect), tuple(self.refused)
        )

    def _section(self, section: Any, where: str) -> dict[str, Any]:
        if not isinstance(section, dict):
            raise ConfigError(f"{where} in {shown(self.path)} is not a table", "see docs/settings.md")
        for name, value in section.items():
            if name in WITHOUT_EFFECT:
                self.without_effect[f"{name}: {WITHOUT_EFFECT[name]}"] = None
            elif name in REFUSED:
                harmless, reason = REFUSED[name]
                if value not in harmless:
                    self.refused[f"{name} = {as_text(value)}: {reason}"] = None
            elif name != "subsets":
                check_known(
                    name,
                    KNOWN,
                    "setting",
                    f"{where} of {shown(self.path)}",
                    "sd-scripts has no such key in a dataset file",
                )
        return dict(section)

    def _run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the run that one dataset asks for."""
        found = {}
        for name, setting in RUN_KEYS.items():
            if name in values:
                value = values[name]
                if name == "resolution":
                    value = self._side(value)
                found[setting] = check_value(setting, value)
        return found

    def _side(self, value: Any) -> Any:
        if isinstance(value, list):
            if len(value) == 2 and value[0] == value[1]:
                return value[0]
            self.refused[
                f"resolution = {as_text(value)}: only squares; buckets keep aspect ratios at the same area"
            ] = None
            return TrainConfig().resolution
        return value

    def _common(self, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What all datasets ask for.  One latent is kept of each image, and a step has one batch size."""
        first = dict(runs[0])
        for number, other in enumerate(runs[1:], 2):
            for name, value in _differences(first, other):
                self.refused[
                    f"{name} of [[datasets]] {number} is {value}: all datasets of a run share one {name}"
                ] = None
        return first

    def _subset(self, values: Mapping[str, Any], where: str) -> Subset:
        folder = values.get("image_dir")
        if not isinstance(folder, str) or not folder:
            if "metadata_file" in values:
                return Subset("")
            raise ConfigError(f"{where} in {shown(self.path)} has no image_dir", "give its folder of images")
        repeats = check("num_repeats", values.get("num_repeats", 1), int, REPEATS, where)
        words = check("class_tokens", values.get("class_tokens", ""), str, where=where)
        is_reg = check("is_reg", values.get("is_reg", False), bool, where=where)
        own = {name: check_value(name, values[name]) for name in OWN_KEYS if name in values}
        extension = own.get("caption_extension")
        if extension and not extension.startswith("."):
            own["caption_extension"] = f".{extension}"  # as sd-scripts does
        if own.get("conditioning_data_dir"):
            own["masked_loss"] = True
        return Subset(folder, repeats, clean_text(words), is_reg, tuple(own.items()))


def _differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in sorted({*first, *other}):
        if first.get(name) != other.get(name):
            yield name, json.dumps(other.get(name, "not set"))
