"""The images of a run: of a dataset file, a metadata file or a folder.

Owns which of them a configuration means.  What a dataset file says is ``trainer.data.subsets``'; a folder is read by
``trainer.data.dataset``, a metadata file by ``trainer.data.metadata``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainer.config import TrainConfig
from trainer.data.captions import shown
from trainer.data.dataset import Dataset, assemble, read_dataset, split_references
from trainer.data.folders import (
    HELD_OUT,
    KOHYA_FOLDER,
    FolderPart,
    held_out_of_subsets,
    images_in,
    subject_of,
)
from trainer.data.litter import litter_notes, visible
from trainer.data.metadata import metadata_part
from trainer.data.subsets import Subset, read_dataset_file
from trainer.errors import ConfigError, DataError, MissingData


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
        if config.in_json:
            return _of_metadata(config, trigger, class_word)
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
    parts = [_part(subset, config) for subset in file.subsets]
    folders = [Path(s.image_dir) for s in file.subsets if s.image_dir and not s.is_reg]
    try:
        held_paths = held_out_of_subsets(folders)
        places = [Path(s.image_dir) for s in file.subsets if not s.metadata_file]
        notes = (*file.notes, *litter_notes(dict.fromkeys(places)))
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}", "check its permissions") from error
    found = assemble(Path(config.dataset_config).parent, parts, notes, config, held_paths)
    return replace(found, trigger=trigger or found.trigger, class_word=class_word or found.class_word)


def _of_metadata(config: TrainConfig, trigger: str | None, class_word: str | None) -> Dataset:
    """The dataset of in_json, whose images are relative to train_data_dir (sd-scripts' train_network.py)."""
    subset = Subset(config.train_data_dir, metadata_file=config.in_json)
    held_paths = held_out_of_subsets([Path(config.train_data_dir)] if config.train_data_dir else [])
    root = Path(config.train_data_dir or Path(config.in_json).parent)
    found = assemble(root, [_part(subset, config)], (), config, held_paths)
    return replace(found, trigger=trigger, class_word=class_word)


def _part(subset: Subset, config: TrainConfig) -> FolderPart:
    folder = Path(subset.image_dir)
    if subset.image_dir and not folder.is_dir():
        raise MissingData(
            f"the folder {shown(folder)} does not exist", "correct image_dir in the dataset file"
        )
    if subset.metadata_file:
        own = dict(subset.own)
        return metadata_part(
            Path(subset.metadata_file),
            folder if subset.image_dir else None,
            subset.repeats(config),
            separator=own.get("caption_separator", config.caption_separator),
            wildcard=own.get("enable_wildcard", config.enable_wildcard),
            own=subset.own,
            dataset=subset.dataset,
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
        meant = subject_of(named[2])
        trigger, class_word = meant if trigger in (None, meant[0]) else (trigger, meant[1])
    return FolderPart(
        tuple(images),
        subset.repeats(config),
        trigger=trigger,
        class_word=class_word,
        words=subset.class_tokens,
        own=subset.own,
        is_reg=subset.is_reg,
        root=folder,
        dataset=subset.dataset,
    )
