"""What a RUN on the command line is: the LoRA files that one training left, in order, and its settings.

Owns finding them – of ``hpo train``, of a study's trial, of any program that names files as sd-scripts does –
and where their evaluation is kept.  Reads headers only.

    OUTPUT/name-000002.safetensors     after epoch 2          OUTPUT/name.safetensors   the result
    OUTPUT/name-step00000100.safetensors                      OUTPUT/name.run/          hpo train's own
    OUTPUT/best.safetensors            the mark of ``hpo evaluate``: a copy that names its source
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo.study import StudyFolder
from trainer.adapters import EPOCH, STEPS
from trainer.config import TrainConfig
from trainer.errors import ConfigError, ModelFileError
from trainer.kohya import RUN_CONFIG, read_train_file
from trainer.tensorfile import read_header
from trainer.text import clean_text

MARK_KEY = "lora_hpo_best_of"  # in best.safetensors: the name of the file it is a copy of
MARK = "best.safetensors"
EVALUATION = "evaluation"
_NAME = re.compile(r"(?P<name>.+?)(?:-(?P<epoch>\d{6})|-step(?P<step>\d{8}))?\.safetensors")
SHOWN = 8  # names in an error


@dataclass(frozen=True)
class Checkpoint:
    """One saved file.  ``epoch`` and ``step`` are what the file or its name says; None if neither does."""

    path: Path
    epoch: int | None
    step: int | None
    is_final: bool

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class RunFiles:
    """A run's files.  ``settings`` is what reads back how it was trained: a folder or a LoRA file."""

    name: str
    output: Path
    checkpoints: tuple[Checkpoint, ...]
    settings: Path
    trial: bool = False

    @property
    def evaluation(self) -> Path:
        """Where images and figures are kept."""
        return (self.output if self.trial else self.output / f"{self.name}.run") / EVALUATION

    @property
    def mark(self) -> Path:
        return self.output / MARK

    @property
    def study(self) -> StudyFolder | None:
        """The study that a trial belongs to, if its definition is there."""
        folder = StudyFolder(self.output.parent)
        return folder if self.trial and folder.facts.is_file() else None

    @property
    def finished(self) -> bool:
        """Whether the run's result is there, not only what it saved along the way."""
        return any(checkpoint.is_final for checkpoint in self.checkpoints)

    @property
    def own(self) -> bool:
        """Whether this tool's own settings are beside the files."""
        return self.settings.is_dir()

    def metadata(self) -> Mapping[str, str]:
        """Of the newest file."""
        return read_header(self.checkpoints[-1].path).metadata

    def config(self, base: str | None, data: Path | None) -> TrainConfig:
        """The settings it was trained with; --base and --data win.  A file that says nothing: the defaults."""
        places: dict[str, Any] = {"pretrained_model_name_or_path": base} if base else {}
        if data is not None or not self.own:  # a file names no folder of the machine it was made on
            places["train_data_dir"] = str(data or "")
        try:
            return read_train_file(self.settings, places=places).config
        except ModelFileError:
            if self.own:
                raise
            return TrainConfig().with_values(places)


def find_run(path: Path) -> RunFiles:
    """The run that ``path`` names: an output folder, a trial's folder, ``OUTPUT/name``, one of its files.

    Raises ConfigError if there is none, or more than one.
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
        f"there is no run {shown}",
        "give the output folder of hpo train, OUTPUT/name, a trial's folder, or a folder of LoRA files",
    )


def one_file(path: Path) -> Checkpoint | None:
    """The checkpoint that ``path`` itself is, if it is a file."""
    return _checkpoint(path) if path.is_file() else None


def is_mark(path: Path) -> bool:
    """Whether a file is a copy that this tool marked, not somebody's own."""
    return path.is_file() and MARK_KEY in read_header(path).metadata


def _in_folder(folder: Path, shown: str) -> RunFiles:
    if folder.suffix == ".run" and (folder / RUN_CONFIG).is_file():
        return find_run(folder.parent / folder.stem)
    groups = _groups(folder)
    if (folder / "params.json").is_file():
        if not groups:
            raise ConfigError(f"the trial in {shown} has no LoRA file", "let it finish: hpo search goes on")
        name = next(iter(groups))
        return RunFiles(name, folder, _sorted(groups[name]), folder, trial=True)
    if len(groups) > 1:
        names = ", ".join(clean_text(name) for name in list(groups)[:SHOWN])
        raise ConfigError(
            f"{shown} holds the LoRA files of {len(groups)} runs: {names}",
            f"name one: {shown}/{clean_text(next(iter(groups)))}",
        )
    if not groups:
        begun = sorted(path.stem for path in folder.glob("*.run") if (path / RUN_CONFIG).is_file())
        raise ConfigError(
            f"{shown} holds no LoRA file" + (f": {clean_text(begun[0])} has saved none yet" if begun else ""),
            "let the training save one" if begun else "give the output folder of hpo train",
        )
    ((name, paths),) = groups.items()
    return _run(folder, name, paths)


def _run(folder: Path, name: str, paths: list[Path]) -> RunFiles:
    own = folder / f"{name}.run"
    found = _sorted(paths)
    settings = own if (own / RUN_CONFIG).is_file() else found[-1].path
    return RunFiles(name, folder, found, settings)


def _groups(folder: Path) -> dict[str, list[Path]]:
    """Files by the name of their run, in alphabetical order.  Marks are nobody's checkpoints."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and path.is_file() and not (path.name == MARK and is_mark(path)):
            groups.setdefault(match["name"], []).append(path)
    return groups


def _sorted(paths: list[Path]) -> tuple[Checkpoint, ...]:
    """In the order of training; the result is the last."""
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
    except ModelFileError:  # a damaged file has a place on the curve and no score
        metadata = {}
    return Checkpoint(
        path,
        _whole(named["epoch"] or metadata.get(EPOCH)),
        _whole(named["step"] or metadata.get(STEPS)),
        not (named["epoch"] or named["step"]),
    )


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 10 else None
