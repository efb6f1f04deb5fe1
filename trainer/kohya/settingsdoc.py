"""docs/settings.md, generated from the code: ``python -m trainer.kohya.settingsdoc > docs/settings.md``.

Owns the sections and wording of the page. Settings, limits and reasons come from the tables that the code uses.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterable
from typing import Any

from trainer.checks import Rule
from trainer.config import SETTINGS, TrainConfig
from trainer.data import subsets
from trainer.kohya import keys as kohyakeys

# Title → first setting of the section, in the order of TrainConfig.
SECTIONS = {
    "Base model and dataset": "pretrained_model_name_or_path",
    "Images and captions": "resolution",
    "Training length and batch size": "train_batch_size",
    "Learning rates": "learning_rate",
    "Network": "network_type",
    "Loss": "min_snr_gamma",
    "Noise": "noise_offset",
    "Text encoder": "clip_skip",
    "Speed and memory": "mixed_precision",
    "Saving, sample images, logging": "save_every_n_epochs",
}
HEAD = """# Settings

All settings of `hpo train`, and of `[train]` and `[space]` in a study. Names are those of sd-scripts. This page is
generated from the code (`python -m trainer.kohya.settingsdoc > docs/settings.md`); a test checks that it is current.

`hpo train FILE` reads a TOML file of this tool or of sd-scripts (`--config_file`), a dataset file
(`--dataset_config`), a LoRA or the folder of a run. Section names in a TOML file have no meaning. A file with a key
that only sd-scripts has, such as `network_module`, is treated as a file of sd-scripts. Its missing settings get the
value in the column *sd-scripts*; in all other files, they get the value in the column *default*. `–` means not set.
sd-scripts has no default for the base, `resolution` and `seed`: the base must be given, and the other two get the
default of this tool. `hpo train FILE --dry-run` shows all values and where they come from.

Precedence, highest first: `--base`, `--data` and `--set`; the dataset file; the file; the defaults.
"""
RULES = """## sd-scripts' other keys

Each key of a file for sd-scripts is used (above), translated, without effect here, or refused because the result
would differ. A key that sd-scripts does not have is an error with the nearest name.
"""
DATASET_FORM = """## Dataset files

```toml
[general]
resolution = 512
caption_extension = ".txt"

[[datasets]]
batch_size = 2

[[datasets.subsets]]
image_dir = "images/zed"
num_repeats = 10
class_tokens = "zed girl"

[[datasets.subsets]]
image_dir = "images/girls"
is_reg = true
class_tokens = "girl"
```

A value is looked up in the subset first, then in its dataset, in `[general]`, and in the settings of the run.
"""
SAMPLES = """## Sample prompts

`sample_prompts` is a .txt file with one prompt per line, or a .toml or .json file as in sd-scripts. A line can end
with `--w 512 --h 768 --d 1 --s 30 --l 7.5 --n negative prompt`: width, height, seed, steps, CFG scale, negative
prompt. Sample images are generated with DPM-Solver++ (2M) and saved to `sample/` in the output folder.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    names = list(SETTINGS)
    starts = [names.index(first) for first in SECTIONS.values()]
    for title, start, end in zip(SECTIONS, starts, [*starts[1:], len(names)], strict=True):
        parts.append(f"## {title}\n")
        parts.append(_table(_HEADER, (_row(name) for name in names[start:end])))
    parts += [RULES, _kohya_table()]
    parts += [DATASET_FORM, _dataset_table(), SAMPLES]
    return "\n".join(parts)


_TYPES = typing.get_type_hints(TrainConfig)
_HEADER = ("setting", "meaning", "unit", "values", "default", "sd-scripts", "for")


def _row(name: str) -> tuple[str, ...]:
    facts = SETTINGS[name]
    default = getattr(TrainConfig(), name)
    theirs = kohyakeys.KOHYA_DEFAULTS.get(name, default)
    where = _shown(None if name in kohyakeys.NO_KOHYA_DEFAULT else theirs)
    if name in kohyakeys.NETWORK_ARGUMENTS:
        where += " (in network_args)"
    elif name == "weight_decay":
        where = "default of the optimizer (in optimizer_args)"
    elif name in kohyakeys.OURS_ALONE:
        where = "not available"
    return (
        f"`{name}`",
        facts.doc,
        facts.unit,
        _values(name, facts),
        _shown(default),
        where,
        facts.only or "both",
    )


def _values(name: str, facts: Rule) -> str:
    if facts.choices:
        return ", ".join(facts.choices)
    if _TYPES[name] is bool:
        return "true, false"
    if facts.low is None or facts.high is None:
        return "text"
    return f"{'above ' if facts.low_is_excluded else ''}{_number(facts.low)} to {_number(facts.high)}"


def _kohya_table() -> str:
    rows = [(f"`{name}`", "refused", reason) for name, (_, reason) in kohyakeys.REFUSED.items()]
    rows += [(f"`{name}`", "translated", "shown when the file is read") for name in kohyakeys.TRANSLATED]
    rows += [(f"`{name}`", "without effect", reason) for name, reason in kohyakeys.NO_EFFECT_REASON.items()]
    return _table(("key", "handling", "details"), sorted(rows))


def _dataset_table() -> str:
    of_run = "sets {} of the run; where datasets differ, of this dataset"
    rows = [(key, "used in a dataset", of_run.format(name)) for key, name in subsets.RUN_KEYS.items()]
    rows += [(key, "used in a subset", "for its images") for key in (*subsets.PLACE_KEYS, *subsets.OWN_KEYS)]
    rows += [(key, "refused", reason) for key, (_, reason) in subsets.REFUSED.items()]
    rows += [(key, "without effect", reason) for key, reason in subsets.WITHOUT_EFFECT.items()]
    named = ((f"`{key}`", *rest) for key, *rest in rows)
    return _table(("key", "handling", "details"), named)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return _number(value) if isinstance(value, int | float) else str(value)


def _number(value: float) -> str:
    """Whole numbers in full, others in short form."""
    return str(int(value)) if value == int(value) and abs(value) < 2**63 else f"{value:g}"


if __name__ == "__main__":
    sys.stdout.write(page())
