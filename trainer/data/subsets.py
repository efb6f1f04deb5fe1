"""Datasets described in a file, in the form of sd-scripts' ``--dataset_config``: general, datasets, subsets.

Owns which of its keys are used, translated, ignored or refused, the folders it describes, and which settings each
[[datasets]] has for itself: it has buckets and batches of its own, as in sd-scripts.  A value is
looked up in the subset, then its dataset, then [general], then the run's settings.  ``trainer.data.training``
reads the images and captions.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.checks import Rule, check, check_known
from trainer.config import TrainConfig, check_value
from trainer.data.augment import DRAWN_ANEW
from trainer.data.captions import shown
from trainer.data.folders import (
    MAX_REPEATS,
)
from trainer.datasetforms import dataset_of
from trainer.errors import ConfigError
from trainer.findings import Findings, piece, report
from trainer.paths import user_path
from trainer.reading import MAX_SETTINGS_BYTES, read_small
from trainer.text import clean_text
from trainer.tomlfile import as_text, read_table

FACE_CROP = (
    "sd-scripts reads it only without buckets and without cached latents, for images named NAME_x_y_width_height; "
    "images are cropped around their centre"
)
# Keys of a dataset that are settings of the run here. Where datasets differ, their images have their own.
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
    "random_crop",
    "color_aug",
    "resize_interpolation",
)
# Keys of a subset that say which images it has → what they mean.
PLACE_KEYS = {
    "image_dir": "folder of the images",
    "metadata_file": "captions and tags of the images, JSON or JSONL",
    "num_repeats": "how often each image is used in an epoch",
    "class_tokens": "caption of images without a caption file",
    "is_reg": "regularisation images, weighted by prior_loss_weight",
}
WITHOUT_EFFECT = {
    "network_multiplier": "sd-scripts reads it, but its training script does not use it",
    "face_crop_aug_range": FACE_CROP,
    "cache_info": "image sizes are read again for each run",
    "custom_attributes": "only diff_output_preservation would have an effect",
}


def _keeps_base(attributes: Any) -> bool:
    """Whether custom_attributes ask for differential output preservation, the only one that sd-scripts reads for
    SD1.5 and SDXL (train_network.py: get_noise_pred_and_target): the base's own prediction is the target there."""
    return isinstance(attributes, dict) and bool(attributes.get("diff_output_preservation"))


_SIDES = ("resolution", "resolution_height")
REPEATS = Rule(low=0, high=MAX_REPEATS)
KNOWN = (*RUN_KEYS, *OWN_KEYS, *PLACE_KEYS, *WITHOUT_EFFECT)


@dataclass(frozen=True)
class Subset:
    """One folder of images, or the images of a metadata file, as the file describes them.  ``own`` are settings it has
    for itself; ``num_repeats`` None means dataset_repeats; ``dataset`` counts the [[datasets]]."""

    image_dir: str
    num_repeats: int | None = None
    class_tokens: str = ""
    is_reg: bool = False
    own: tuple[tuple[str, Any], ...] = ()
    metadata_file: str = ""
    dataset: int = 0

    def repeats(self, config: TrainConfig) -> int:
        """How often an image is used in an epoch."""
        return config.dataset_repeats if self.num_repeats is None else self.num_repeats


@dataclass(frozen=True)
class DatasetFile:
    """What a dataset file means: settings of the run, folders, and lines to read, one per key."""

    path: Path
    settings: Mapping[str, Any]
    subsets: tuple[Subset, ...]
    without_effect: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def require_all(self) -> DatasetFile:
        """Raise ConfigError if anything was refused."""
        if self.refused:
            raise ConfigError(
                f"{shown(self.path)} has settings that are not supported: {'; '.join(self.refused)}",
                "remove these lines if you do not need them",
            )
        return self


def read_dataset_file(path: Path) -> DatasetFile:
    """Read a dataset file, TOML or JSON.  ConfigError for typing errors, bad values, and what cannot be told apart."""
    return _DatasetReading(Path(path), _described(Path(path))).result()


def _described(path: Path) -> dict[str, Any]:
    """The dataset of a file, in the form of sd-scripts; also from a file of LoRA_Easy_Training_Scripts."""
    table = read_dataset_table(path)
    return dataset_of(table) or table


def read_dataset_table(path: Path) -> dict[str, Any]:
    """The content of a dataset file: JSON if its name says so (sd-scripts' load_user_config), else TOML."""
    if path.suffix.lower() != ".json":
        return read_table(path)
    try:
        table = json.loads(read_small(path, MAX_SETTINGS_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {shown(path)}: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{shown(path)} is not UTF-8 text (byte {error.start})", "save it as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{shown(path)} is not valid JSON: {clean_text(str(error))}", "correct it"
        ) from error
    if not isinstance(table, dict):
        raise ConfigError(f"{shown(path)} is not a table of settings", "see docs/settings.md for its form")
    return table


@dataclass
class _DatasetReading:
    """One dataset file on its way to a DatasetFile."""

    path: Path
    table: Mapping[str, Any]
    without_effect: dict[str, None] = field(default_factory=dict)
    refused: dict[str, None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def result(self) -> DatasetFile:
        general = self._section(self.table.get("general", {}), "[general]")
        datasets = self.table.get("datasets")
        if not isinstance(datasets, list) or not datasets:
            raise ConfigError(f"{shown(self.path)} has no [[datasets]]", "see docs/settings.md for its form")
        runs, subsets = [], []
        findings = Findings()
        for number, dataset in enumerate(datasets):
            where = f"[[datasets]] {number + 1}"
            with findings.looking():
                own = self._section(dataset, where)
                folders = own.pop("subsets", None)
                values = {**general, **own}
                runs.append(self._run(values))
                if not isinstance(folders, list) or not folders:
                    raise ConfigError(f"{where} in {shown(self.path)} has no [[datasets.subsets]]", "add one")
                subsets.append(self._subsets(folders, values, number))
        report(findings.errors)
        settings, own_settings = _common(runs)
        found = [
            replace(subset, own=(*subset.own, *own.items()))
            for group, own in zip(subsets, own_settings, strict=True)
            for subset in group
        ]
        for name in DRAWN_ANEW:  # the run's value says whether any image is encoded anew
            if any(dict(subset.own).get(name) for subset in found):
                settings[name] = True
                found = [replace(s, own=tuple(({name: False} | dict(s.own)).items())) for s in found]
        if not found:
            raise ConfigError(
                f"{shown(self.path)} has num_repeats = 0 everywhere", "give at least one folder 1"
            )
        return DatasetFile(
            self.path,
            settings,
            tuple(found),
            tuple(self.without_effect),
            tuple(self.refused),
            tuple(self.notes),
        )

    def _subsets(self, folders: list[Any], values: Mapping[str, Any], number: int) -> list[Subset]:
        """The subsets of a dataset. sd-scripts leaves out those with no repeats, and a folder or metadata file that
        was given before."""
        found: dict[str, Subset] = {}
        for place, folder in enumerate(folders, 1):
            where = f"subset {place} of [[datasets]] {number + 1}"
            subset = None
            with piece():
                given = self._section(folder, where)
                misplaced = [name for name in given if name in RUN_KEYS]
                if misplaced:
                    raise ConfigError(
                        f"{misplaced[0]} belongs to [[datasets]] {number + 1}, not to one of its subsets",
                        "move it up",
                    )
                subset = self._subset({**values, **given}, where, number)
            if subset is None:  # said already
                continue
            source = subset.metadata_file or str(Path(subset.image_dir).resolve())
            if subset.num_repeats == 0:
                self.notes.append(f"{where} is left out: num_repeats = 0")
            elif source in found:
                what = "metadata_file" if subset.metadata_file else "image_dir"
                self.notes.append(
                    f"{where} is left out: its {what} {shown(subset.metadata_file or subset.image_dir)} was given "
                    "before in this dataset, and sd-scripts uses only the first"
                )
            else:
                found[source] = subset
        return list(found.values())

    def _section(self, section: Any, where: str) -> dict[str, Any]:
        if not isinstance(section, dict):
            raise ConfigError(f"{where} in {shown(self.path)} is not a table", "see docs/settings.md")
        for name, value in section.items():
            if name == "custom_attributes" and _keeps_base(value):
                reason = "not supported: the LoRA is trained on these images too, not kept from changing them"
                self.refused[
                    f"custom_attributes = {as_text(value)}: diff_output_preservation is {reason}"
                ] = None
            elif name in WITHOUT_EFFECT:
                self.without_effect[f"{name}: {WITHOUT_EFFECT[name]}"] = None
            elif name != "subsets":
                with piece():
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
        found: dict[str, Any] = {}
        for name, setting in RUN_KEYS.items():
            if name not in values:
                continue
            with piece(), _named(setting, name, self.path):
                found |= (
                    sides(values[name])
                    if name == "resolution"
                    else {setting: check_value(setting, values[name])}
                )
        return found

    def _subset(self, values: Mapping[str, Any], where: str, number: int) -> Subset:
        folder, metadata = values.get("image_dir", ""), values.get("metadata_file", "")
        if not isinstance(metadata, str):
            raise ConfigError(f"metadata_file of {where} is not a path", 'write it in "…"')
        if not isinstance(folder, str) or not (folder or metadata):
            raise ConfigError(f"{where} in {shown(self.path)} has no image_dir", "give its folder of images")
        repeats, words, is_reg, own = None, "", False, {}
        with piece():
            repeats = check("num_repeats", values.get("num_repeats"), int | None, REPEATS, where)
        with piece():
            words = check("class_tokens", values.get("class_tokens", ""), str, where=where)
        with piece():
            is_reg = check("is_reg", values.get("is_reg", False), bool, where=where)
        for name in OWN_KEYS:
            if name in values:
                with piece():
                    own[name] = check_value(name, values[name])
        extension = own.get("caption_extension")
        if extension and not extension.startswith("."):
            own["caption_extension"] = f".{extension}"  # as sd-scripts does
        if own.get("conditioning_data_dir"):
            own["conditioning_data_dir"] = user_path(own["conditioning_data_dir"], "conditioning_data_dir")
            own["masked_loss"] = True
        return Subset(
            user_path(folder, "image_dir"),
            repeats,
            clean_text(words),
            is_reg,
            tuple(own.items()),
            user_path(metadata, "metadata_file"),
            number,
        )


@contextlib.contextmanager
def _named(setting: str, name: str, path: Path) -> Iterator[None]:
    """Errors inside name the key of the file (batch_size), not the setting that it becomes (train_batch_size)."""
    try:
        yield
    except ConfigError as error:
        message = error.message.replace(setting, name)
        raise ConfigError(
            f"{shown(path)}: {message}", error.hint.replace(f"{setting} =", f"{name} =")
        ) from None


def sides(value: Any) -> dict[str, int]:
    """A resolution as sd-scripts has it – 512, "512", "512,768", [512, 768] – as settings. Raises ConfigError."""
    given = str(value).strip(" []()").split(",") if isinstance(value, str) else value
    given = list(given) if isinstance(given, list | tuple) else [given]
    try:
        numbers = [int(side) if isinstance(side, str) else side for side in given]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 2:
        raise ConfigError(
            f"resolution = {as_text(value)} is not a size",
            'write for example 512 or "512,768" (width, height)',
        )
    width, height = (check_value("resolution", side) for side in (numbers[0], numbers[-1]))
    return {"resolution": width} if width == height else {"resolution": width, "resolution_height": height}


def _common(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(settings of the run, those that each dataset has for itself): what all datasets ask for is the run's. Where they
    differ the run has the largest resolution and batch size, which memory is planned for."""
    several = [{"resolution_height": None, **run} if "resolution" in run else run for run in runs]
    names = dict.fromkeys(name for run in several for name in run)
    differ = [name for name in names if len({run.get(name, "not given") for run in several}) > 1]
    if "resolution_height" in differ or "resolution" in differ:
        differ = [*(name for name in differ if not name.startswith("resolution")), *_SIDES]
    for name in {"resolution", "train_batch_size"} & set(differ):
        for number, run in enumerate(several, 1):
            if name not in run:
                key = next(key for key, setting in RUN_KEYS.items() if setting == name)
                raise ConfigError(
                    f"[[datasets]] {number} has no {key}, but another dataset has one",
                    f"write {key} in each of them, or in [general] for all",
                )
    settings = {name: value for name, value in runs[0].items() if name not in differ}
    if "resolution" in differ:
        largest = max(
            several, key=lambda run: run["resolution"] * (run["resolution_height"] or run["resolution"])
        )
        settings |= {name: largest[name] for name in _SIDES if largest[name] is not None}
    if "train_batch_size" in differ:
        settings["train_batch_size"] = max(run["train_batch_size"] for run in several)
    return settings, [{name: run[name] for name in differ if name in run} for run in several]
