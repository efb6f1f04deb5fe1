"""Metadata files of sd-scripts' fine-tuning datasets (``metadata_file``, ``in_json``): captions and tags by image.

JSON is ``{"image": {"caption": …, "tags": …}}``, JSONL has ``{"image_path": …, "caption": …, "tags": …}`` on each line.
An image is an absolute path, or relative to image_dir; without an ending it is looked for with those of images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.data.captions import listed, shown
from trainer.data.folders import FolderPart
from trainer.data.images import IMAGE_EXTENSIONS
from trainer.errors import DataError, MissingData
from trainer.reading import read_small

MAX_FILE_BYTES = 1 << 28  # assumed: a million images with their captions


def metadata_part(
    file: Path, image_dir: Path | None, repeats: int, *, separator: str, wildcard: bool, **more: Any
) -> FolderPart:
    """The images of a metadata file with their captions. Raises DataError, naming all images that are not there or
    have neither caption nor tags.

    Caption and tags are joined by ``separator`` without a space; with ``wildcard`` each line of the caption gets the
    tags (sd-scripts' FineTuningDataset).
    """
    images, texts, tags, missing, empty = [], [], [], [], []
    for key, entry in _entries(file):
        path = _image(key, image_dir, file)
        if path is None:
            missing.append(key)
            continue
        text = joined(
            _text(entry, "caption", key, file), _text(entry, "tags", key, file), separator, wildcard
        )
        if not text.strip():
            empty.append(path)
        images.append(path)
        texts.append(text)
        tags.append(str(entry.get("tags") or ""))
    if missing:
        where = f" in {shown(image_dir)}" if image_dir else ""
        raise MissingData(
            f"{len(missing)} images of {shown(file)} are not there{where}: {listed([Path(key) for key in missing])}",
            "correct the paths, or set image_dir to the folder that they are relative to",
        )
    if empty:
        raise DataError(
            f"{len(empty)} images of {shown(file)} have neither caption nor tags: {listed(empty)}",
            "write what the images show, or remove them from the file",
        )
    if not images:
        raise DataError(f"{shown(file)} names no images", "make it again with sd-scripts' merge scripts")
    order = sorted(range(len(images)), key=lambda place: images[place])
    root = image_dir or Path(images[0].anchor)
    return FolderPart(
        tuple(images[place] for place in order),
        repeats,
        root=root,
        texts=tuple(texts[place] for place in order),
        tags=tuple(tags[place] for place in order),
        metadata=file.name,
        **more,
    )


def joined(caption: str, tags: str, separator: str, wildcard: bool) -> str:
    """A caption with its tags behind (sd-scripts' FineTuningDataset)."""
    if wildcard:
        if not tags:
            return caption
        tags = tags.replace("\n", separator)
        return "\n".join(f"{line}{separator}{tags}" for line in caption.split("\n") if line.strip()) or tags
    return separator.join(part for part in (caption, tags) if part)


def _entries(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        text = read_small(file, MAX_FILE_BYTES).decode("utf-8-sig")
        if file.suffix.lower() == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            found = [(line["image_path"], line) for line in lines]
        else:
            found = list(json.loads(text).items())
    except FileNotFoundError:
        raise MissingData(f"the metadata file {shown(file)} does not exist", "correct its path") from None
    except OSError as error:
        raise DataError(f"cannot read {shown(file)}: {error.strerror}", "check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(file)} is not UTF-8 text", "save it as UTF-8") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{shown(file)} is not a metadata file of sd-scripts",
            'its form is {"image.png": {"caption": "…", "tags": "…"}}',
        ) from error
    for key, entry in found:
        if not isinstance(key, str) or not isinstance(entry, dict):
            raise DataError(
                f"{shown(file)} has an entry that is not a table: {shown(str(key))[:80]}",
                'its form is {"image.png": {"caption": "…", "tags": "…"}}',
            )
        yield key, entry


def _text(entry: Mapping[str, Any], name: str, key: str, file: Path) -> str:
    value = entry.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{name} of {shown(key)[:80]} in {shown(file)} is not a text", 'write it in "…"')
    return value


def _image(key: str, image_dir: Path | None, file: Path) -> Path | None:
    """The file of an image; None if it is not there."""
    path = Path(key)
    if not path.is_absolute():
        if image_dir is None:
            raise DataError(
                f"{shown(file)} has relative paths ({shown(key)[:80]}) and no folder is given for them",
                "set image_dir (with in_json: train_data_dir) to the folder that they are relative to",
            )
        path = image_dir / path
    if path.is_file():
        return path
    for extension in sorted(IMAGE_EXTENSIONS):  # older metadata has names without an ending
        if (named := path.with_name(path.name + extension)).is_file():
            return named
    return None
