"""``hpo export kohya``: a file, a LoRA or a run as sd-scripts' config.toml and dataset.toml.

Owns which family and which model name sd-scripts is told; the files are ``trainer.kohya.export``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.bases import FAMILIES, is_miniature, published_name
from trainer.kohya import export as kohyaexport
from trainer.kohya import family_of, read_train_file


def export_kohya(source: Path, folder: Path, places: dict[str, Any], say: Callable[[str], None]) -> None:
    """Write the files and say what differs and how to start."""
    file = read_train_file(source, places=places).require_all()
    spec = file.config.pretrained_model_name_or_path
    family, base = family_of(file), published_name(spec)
    if is_miniature(spec):
        say(
            f"note: {spec} comes with this tool and sd-scripts cannot load it; set pretrained_model_name_or_path"
        )
    facts = FAMILIES[family]
    if not facts.uses_clip_skip and file.config.clip_skip is not None:
        say(f"note: sd-scripts ignores clip_skip on {facts.title}, as this tool does")
    found = kohyaexport.to_kohya(file.config, family, base, folder, file.output_dir or "output")
    kohyaexport.write(found, folder)
    for note in found.notes:
        say(f"note: {note}")
    names = (kohyaexport.CONFIG, kohyaexport.DATASET, kohyaexport.COMMAND)
    say(f"written: {', '.join(str(folder / name) for name in names)}")
    say(found.command)
