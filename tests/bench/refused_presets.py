"""Of the files that ``bench_presets`` refuses: at which do sd-scripts' own optimizer and schedule end as well?

    python -m tests.bench.bench_presets FOLDER --json VERDICTS
    python -m tests.bench.refused_presets VERDICTS SD_SCRIPTS

SD_SCRIPTS is a checkout of github.com/kohya-ss/sd-scripts; packages as for ``record_optimizers``. Its get_optimizer and
get_scheduler_fix are called with the settings of each refused TOML, and take a few steps. An error that only says that
a package is missing is no answer.
"""

from __future__ import annotations

import json
import logging
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit

from tests.bench.record_optimizers import USUAL, run, sd_scripts

RATES = ("learning_rate", "unet_lr", "text_encoder_lr")


def main(verdicts: Path, checkout: Path) -> None:
    logging.disable(logging.CRITICAL)
    space = sd_scripts(checkout)
    for verdict in json.loads(verdicts.read_text(encoding="utf-8")):
        path = Path(verdict["path"])
        if verdict["outcome"] == "refused" and path.suffix == ".toml":
            print(f"{path.parent.name}/{path.name}: {answer(path, space)}")


def answer(path: Path, space: dict[str, Any]) -> str:
    """What sd-scripts' functions do with a file."""
    table = _flat(tomllib.loads(path.read_text(encoding="utf-8")))
    settings = {name: value for name, value in table.items() if name in USUAL and name != "max_train_steps"}
    for name in RATES:
        if name in settings:
            first = settings[name][0] if isinstance(settings[name], list) else settings[name]
            settings[name] = float(first)
    try:
        told = run("", tomlkit.dumps(settings), space)["written"]
    except ImportError as error:
        return f"no answer ({error})"
    except Exception as error:
        return f"ends: {type(error).__name__}: {str(error)[:120]}"
    return f"trains with {told[:80]}"


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the sections of a file."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _flat(value) if isinstance(value, dict) else {name: value}
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
