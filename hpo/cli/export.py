"""``hpo export kohya``: a file, a LoRA or a run as sd-scripts' config.toml and dataset.toml.

Owns which family and which model name sd-scripts is told; the files are ``trainer.kohya.export``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.kohya import FAMILIES, family_of, read_train_file
from trainer.kohya import export as kohyaexport


def export_kohya(source: Path, folder: Path, places: dict[str, Any], say: Callable[[str], None]) -> None:
    """Write the files and say what differs and how to start."""
    file = read_train_file(source, places=places).require_all()
    spec = file.config.pretrained_model_name_or_path
    family, base = family_of(file), spec
    if spec in ("sd15", "sdxl"):
        from trainer.bases import HUB_NAMES

        base = HUB_NAMES[spec]
    elif spec in FAMILIES:
        say(
            f"note: {spec} comes with this tool and sd-scripts cannot load it; set pretrained_model_name_or_path"
        )
    if family == "sdxl" and file.config.clip_skip is not None:
        say("note: sd-scripts ignores clip_skip on SDXL, as this tool does")
    found = kohyaexport.to_kohya(file.config, family, base, folder, file.output_dir or "output")
    kohyaexport.write(found, folder)
    for note in found.notes:
        say(f"note: {note}")
    names = (kohyaexport.CONFIG, kohyaexport.DATASET, kohyaexport.COMMAND)
    say(f"written: {', '.join(str(folder / name) for name in names)}")
    say(found.command)
