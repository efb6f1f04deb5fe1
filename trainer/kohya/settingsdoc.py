"""docs/settings.md, generated from the code: ``python -m trainer.kohya.settingsdoc > docs/settings.md``.

Owns the sections and wording of the page. Settings, limits and reasons come from the tables that the code uses.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.arguments import Argument
from trainer.arguments import as_text as arguments_text
from trainer.checks import Rule
from trainer.config import SETTINGS, TrainConfig
from trainer.kohya import keys as kohyakeys
from trainer.optimizers import OPTIMIZERS
from trainer.schedules import SCHEDULES

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
OPTIMIZERS_HEAD = """## Optimizers

`optimizer_type` takes these names in any case, and the full class names of the libraries as sd-scripts does
(`torch.optim.AdamW`, `lion_pytorch.Lion`, `schedulefree.AdamWScheduleFree` …). Nothing else is imported. sd-scripts
uses the same libraries, so a file gives the same updates. dadaptation and came-pytorch are not installed by default:
`pip install dadaptation came-pytorch`.

`optimizer_args` is written as in sd-scripts, `["betas=(0.9, 0.99)", "eps=1e-6"]`, or as one text,
`"betas=(0.9, 0.99) eps=1e-6"`. `weight_decay` is a setting of its own here; a file of sd-scripts has it in
`optimizer_args`. Arguments in the table have the defaults of the library. Where this tool uses others, they are listed
under *set here*; a file of sd-scripts gets those of the library.

"""
OPTIMIZERS_END = """
* *One rate*: U-Net, text encoders, blocks and lora_up must have the same learning rate or 0. The library ends the
  training otherwise.
* *No schedule*: the optimizer averages the weights instead (arXiv 2405.15682). `lr_scheduler` and `lr_warmup_steps`
  have no effect. Saved files, sample images and the validation loss use the averaged weights.
* Adafactor with `relative_step=True`, the default of sd-scripts, chooses its rate itself: learning rates above 0 and
  `lr_scheduler` have no effect.
* Prodigy: `safeguard_warmup` is True here if there is a warm-up, unless it is set.
* Paged optimizers keep their state in memory that CUDA can move to RAM. Updates are the same as without.
* LoRA+ (`loraplus_lr_ratio`, usually 16): lora_up is trained at a multiple of the rate. It has an effect on LoRA,
  LoCon, DoRA and DyLoRA only: the others have no lora_up, and LoRA-FA trains nothing else. 1 and 0 turn it off.

"""
SCHEDULES_HEAD = """## Schedules

`lr_scheduler` takes these names. A file of sd-scripts may have the class in `lr_scheduler_type`, as
`torch.optim.lr_scheduler.StepLR` or `LoraEasyCustomOptimizer.RexAnnealingWarmRestarts.RexAnnealingWarmRestarts`. The
rate of a step depends on its number only, so a resumed run has the rates of an uninterrupted one.

"""
SCHEDULES_END = """
`polynomial` ends at 1e-7 for the network with the highest rate, or at `lr_end` / `learning_rate` of each rate if
`lr_end` is set. sd-scripts always does the latter, with 1e-7, so a file of sd-scripts gets `lr_end=1e-07` where it
makes a difference. Without `first_cycle_max_steps`, a cycle has all steps / `lr_scheduler_num_cycles`.

"""
RULES = """## sd-scripts' other keys

[kohya.md](kohya.md) lists all options of sd-scripts and what becomes of each. A key that sd-scripts does not have is
listed with what it probably meant, and has no effect.
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
[kohya.md](kohya.md#dataset-files) lists all keys.
"""
SAMPLES = """## Sample prompts

`sample_prompts` is a .txt file with one prompt per line (lines that begin with # are remarks), a .toml or .json file as
in sd-scripts, or the prompts themselves: a list, or a text with one prompt per line. A line can end with
`--w 512 --h 768 --d 1 --s 30 --l 7.5 --n negative prompt`: width, height, seed, steps, CFG scale, negative prompt.
Sides are rounded down to multiples of 8, and are at least 64. Sample images are generated with DPM-Solver++ (2M),
whatever `--ss` names, and saved to `sample/` in the output folder.

Weights such as `(word:1.2)` act in captions only (`weighted_captions`); in sample prompts they are plain text,
unlike in sd-scripts.

A sample prompt never ends a training: what cannot be read or drawn is left out with a warning, and a missing file means
no sample images. `hpo train --dry-run` shows these warnings with their lines.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    names = list(SETTINGS)
    starts = [names.index(first) for first in SECTIONS.values()]
    for title, start, end in zip(SECTIONS, starts, [*starts[1:], len(names)], strict=True):
        parts.append(f"## {title}\n")
        parts.append(table(_HEADER, (_row(name) for name in names[start:end])))
    parts += [OPTIMIZERS_HEAD + _optimizer_table() + OPTIMIZERS_END]
    parts += [SCHEDULES_HEAD + _schedule_table() + SCHEDULES_END]
    parts += [RULES, DATASET_FORM, SAMPLES]
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


def _optimizer_table() -> str:
    rows = []
    for name, optimizer in OPTIMIZERS.items():
        ours = {key: value for key, value in optimizer.ours.items() if key in optimizer.arguments}
        ours = {key: value for key, value in ours.items() if value != optimizer.arguments[key].default}
        notes = ["one rate"] * optimizer.one_rate + ["no schedule"] * optimizer.is_schedule_free
        rows.append(
            (
                f"`{name}`",
                optimizer.full_name,
                _arguments(optimizer.arguments),
                arguments_text(ours),
                f"{optimizer.weight_decay:g}",
                ", ".join(notes),
            )
        )
    return table(("optimizer", "class", "arguments", "set here", "weight decay in sd-scripts", ""), rows)


def _schedule_table() -> str:
    rows = (
        (f"`{name}`", _arguments(schedule.arguments), "yes" if schedule.warms_up else "no", schedule.where)
        for name, schedule in SCHEDULES.items()
    )
    return table(
        ("lr_scheduler", "lr_scheduler_args", "lr_warmup_steps", "lr_scheduler_type in sd-scripts"), rows
    )


def _arguments(table: Mapping[str, Argument]) -> str:
    return ", ".join(
        f"{name} (needed)" if argument.is_needed else f"{name}={argument.default!r}"
        for name, argument in table.items()
        if not argument.choices or len(argument.choices) > 1
    )


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
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
