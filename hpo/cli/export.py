"""``hpo export kohya``: write a settings file, a LoRA or a run as sd-scripts' config.toml and dataset.toml.

Owns the choice of model family and model name for sd-scripts.  Does not own the files; see ``trainer.kohya.export``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.bases import FAMILIES, is_miniature, published_name
from trainer.kohya import export as kohyaexport
from trainer.kohya import family_of, read_train_file


def export_kohya(source: Path, folder: Path, places: dict[str, Any], say: Callable[[str], None]) -> None:
    """Write the files, then print the differences and the command that starts sd-scripts."""
    file = read_train_file(source, places=places).require_all()
    spec = file.config.pretrained_model_name_or_path
    family, base = family_of(file), published_name(spec)
    if is_miniature(spec):
        say(
            f"note: sd-scripts cannot load {spec}, which is part of this tool; set pretrained_model_name_or_path"
        )
    facts = FAMILIES[family]
    if not facts.uses_clip_skip and file.config.clip_skip is not None:
        say(f"note: sd-scripts ignores clip_skip for {facts.title}, and so does this tool")
    found = kohyaexport.to_kohya(file.config, family, base, folder, file.output_dir or "output")
    kohyaexport.write(found, folder)
    for note in found.notes:
        say(f"note: {note}")
    names = (kohyaexport.CONFIG, kohyaexport.DATASET, kohyaexport.COMMAND)
    say(f"written: {', '.join(str(folder / name) for name in names)}")
    say(found.command)
