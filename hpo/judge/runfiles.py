"""The RUN argument of the command line: the LoRA files of one training, in order, and its settings.

Owns finding the files (of ``hpo train``, of a trial, or of any tool that names files as sd-scripts does) and
the folder of their evaluation.  Reads file headers only.

    OUTPUT/name-000002.safetensors     after epoch 2          OUTPUT/name.safetensors   the final file
    OUTPUT/name-step00000100.safetensors                      OUTPUT/name.run/          state of ``hpo train``
    OUTPUT/best.safetensors            written by ``hpo evaluate``: a copy, with its source in the metadata
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo.study import StudyFolder
from hpo.terminal import command
from trainer.adapters import EPOCH, PRIVATE, STEPS, private
from trainer.config import TrainConfig
from trainer.errors import ConfigError, ModelFileError
from trainer.kohya import RUN_CONFIG, read_train_file
from trainer.tensorfile import read_header
from trainer.text import clean_text

MARK_KEY = "lora_hpo_best_of"  # metadata of best.safetensors: name of the file it was copied from
MARK = "best.safetensors"
EVALUATION = "evaluation"
_NAME = re.compile(r"(?P<name>.+?)(?:-(?P<epoch>\d{6})|-step(?P<step>\d{8}))?\.safetensors")
SHOWN = 8  # maximum number of names in an error message


@dataclass(frozen=True)
class Checkpoint:
    """One saved file.  ``epoch`` and ``step`` come from the file name or the metadata; None if unknown."""

    path: Path
    epoch: int | None
    step: int | None
    is_final: bool

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class RunFiles:
    """The files of a run.  ``settings``: where the training settings are read from, a folder or a LoRA file."""

    name: str
    output: Path
    checkpoints: tuple[Checkpoint, ...]
    settings: Path
    trial: bool = False

    @property
    def evaluation(self) -> Path:
        """The folder for images and results."""
        return (self.output if self.trial else self.output / f"{self.name}.run") / EVALUATION

    @property
    def mark(self) -> Path:
        return self.output / MARK

    @property
    def study(self) -> StudyFolder | None:
        """The study of a trial, if its study.json exists."""
        folder = StudyFolder(self.output.parent)
        return folder if self.trial and folder.facts.is_file() else None

    @property
    def finished(self) -> bool:
        """Whether the final file exists, and not only intermediate checkpoints."""
        return any(checkpoint.is_final for checkpoint in self.checkpoints)

    @property
    def own(self) -> bool:
        """Whether the settings files of this tool exist next to the LoRA files."""
        return self.settings.is_dir()

    def metadata(self) -> Mapping[str, str]:
        """The metadata of the newest file; with no_metadata, what its run kept of it."""
        return private.metadata_of(self.checkpoints[-1].path, self.output / f"{self.name}.run" / PRIVATE)

    def config(self, base: str | None, data: Path | None) -> TrainConfig:
        """The training settings, overridden by ``--base`` and ``--data``.  Defaults if the file has no metadata."""
        places: dict[str, Any] = {"pretrained_model_name_or_path": base} if base else {}
        if data is not None or not self.own:  # the metadata of a LoRA file contains no data folder
            places["train_data_dir"] = str(data or "")
        try:
            return read_train_file(self.settings, places=places).config
        except ModelFileError:
            if self.own:
                raise
            return TrainConfig().with_values(places)


def label(name: str) -> str:
    """A checkpoint's place in the training, from its file name: ``epoch 2``, ``step 100``, else ``final``."""
    match = _NAME.fullmatch(f"{name}.safetensors")
    for key in ("epoch", "step"):
        if match and match[key]:
            return f"{key} {int(match[key])}"
    return "final"


def find_run(path: Path) -> RunFiles:
    """The run at ``path``: an output folder, a trial folder, ``OUTPUT/name`` or one of its files.

    Raises ConfigError if there is no run, or more than one.
    """
    shown = clean_text(str(path))
    try:
        if path.is_dir():
            return _in_folder(path, shown)
        if path.parent.is_dir():
            match = _NAME.fullmatch(path.name)
            wanted = match["name"] if match and path.is_file() else path.name
            groups = _groups(path.parent)
            if wanted in groups:
                return _run(path.parent, wanted, groups[wanted])
    except OSError as error:
        raise ConfigError(f"cannot read {shown}: {error.strerror}", "check its permissions") from None
    raise ConfigError(
        f"no run found at {shown}",
        "give the output folder of hpo train, OUTPUT/name, a trial folder, or a folder with LoRA files",
    )


def one_file(path: Path) -> Checkpoint | None:
    """The checkpoint at ``path`` if it is a file, else None."""
    return _checkpoint(path) if path.is_file() else None


def is_mark(path: Path) -> bool:
    """Whether a file is a copy that this tool wrote as best.safetensors, and not a user's file."""
    return path.is_file() and MARK_KEY in read_header(path).metadata


def _in_folder(folder: Path, shown: str) -> RunFiles:
    if folder.suffix == ".run" and (folder / RUN_CONFIG).is_file():
        return find_run(folder.parent / folder.stem)
    groups = _groups(folder)
    if (folder / "params.json").is_file():
        if not groups:
            raise ConfigError(
                f"the trial in {shown} has no LoRA file", "let the trial finish; hpo search resumes it"
            )
        name = next(iter(groups))
        return RunFiles(name, folder, _sorted(groups[name]), folder, trial=True)
    if len(groups) > 1:
        names = ", ".join(clean_text(name) for name in list(groups)[:SHOWN])
        raise ConfigError(
            f"{shown} contains the LoRA files of {len(groups)} runs: {names}",
            f"choose one, for example {shown}/{clean_text(next(iter(groups)))}",
        )
    if not groups:
        begun = sorted(path.stem for path in folder.glob("*.run") if (path / RUN_CONFIG).is_file())
        raise ConfigError(
            f"{shown} contains no LoRA file"
            + (f": {clean_text(begun[0])} has saved none yet" if begun else ""),
            "wait until the training has saved one; if it was interrupted: "
            + command("hpo", "resume", folder / f"{begun[0]}.run")
            if begun
            else "give the output folder of hpo train",
        )
    ((name, paths),) = groups.items()
    return _run(folder, name, paths)


def _run(folder: Path, name: str, paths: list[Path]) -> RunFiles:
    own = folder / f"{name}.run"
    found = _sorted(paths)
    settings = own if (own / RUN_CONFIG).is_file() else found[-1].path
    return RunFiles(name, folder, found, settings)


def _groups(folder: Path) -> dict[str, list[Path]]:
    """Files grouped by run name, in alphabetical order.  Marked copies (best.safetensors) are ignored."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and path.is_file() and not (path.name == MARK and is_mark(path)):
            groups.setdefault(match["name"], []).append(path)
    return groups


def _sorted(paths: list[Path]) -> tuple[Checkpoint, ...]:
    """Checkpoints in training order; the final file is last."""
    found = [_checkpoint(path) for path in paths]
    by_step = all(checkpoint.step is not None for checkpoint in found)

    def place(checkpoint: Checkpoint) -> tuple[bool, int, int]:
        reached = checkpoint.step if by_step else checkpoint.epoch
        return checkpoint.is_final, reached or 0, checkpoint.step or 0

    return tuple(sorted(found, key=place))


def _checkpoint(path: Path) -> Checkpoint:
    match = _NAME.fullmatch(path.name)
    named = match.groupdict() if match else {"epoch": None, "step": None}
    try:
        metadata = read_header(path).metadata
    except ModelFileError:  # a damaged file stays in the list, but gets no score
        metadata = {}
    return Checkpoint(
        path,
        _whole(named["epoch"] or metadata.get(EPOCH)),
        _whole(named["step"] or metadata.get(STEPS)),
        not (named["epoch"] or named["step"]),
    )


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 10 else None
