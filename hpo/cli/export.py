"""Settings for sd-scripts: ``hpo export kohya`` writes a settings file, a LoRA or a run as config.toml and
dataset.toml, ``hpo best --toml`` a trial as one file.

Owns the choice of model family and model name for sd-scripts.  Does not own the files; see ``trainer.kohya.export``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.bases import FAMILIES, is_miniature, published_name
from trainer.kohya import TrainFile, family_of, read_train_file
from trainer.kohya import export as kohyaexport


def export_kohya(source: Path, folder: Path, places: dict[str, Any], say: Callable[[str], None]) -> None:
    """Write the files, then print the differences and the command that starts sd-scripts."""
    file, family, base, notes = _read(source, places)
    for note in notes:
        say(f"note: {note}")
    found = kohyaexport.to_kohya(file.config, family, base, folder, file.output_dir or "output")
    kohyaexport.write(found, folder)
    for note in found.notes:
        say(f"note: {note}")
    names = (kohyaexport.CONFIG, kohyaexport.DATASET, kohyaexport.COMMAND)
    say(f"written: {', '.join(str(folder / name) for name in names)}")
    say(found.command)


def as_kohya_file(trial: Path, head: Sequence[str]) -> str:
    """The settings of a trial as one file for sd-scripts' --config_file and for hpo train.  ``head``: its first lines.
    What differs in sd-scripts stands at the top of it, too."""
    file, family, base, notes = _read(trial, {})
    return kohyaexport.one_file(file.config, family, base, [*head, *notes])


def _read(source: Path, places: dict[str, Any]) -> tuple[TrainFile, str, str, list[str]]:
    """The settings, the model family, the base for sd-scripts, and notes about both."""
    file = read_train_file(source, places=places).require_all()
    spec = file.config.pretrained_model_name_or_path
    family, base = family_of(file), published_name(spec)
    notes = []
    if is_miniature(spec):
        notes.append(
            f"sd-scripts cannot load {spec}, which is part of this tool; set pretrained_model_name_or_path"
        )
    facts = FAMILIES[family]
    if not facts.uses_clip_skip and file.config.clip_skip is not None:
        notes.append(f"sd-scripts ignores clip_skip for {facts.title}, and so does this tool")
    return file, family, base, notes
