"""Whether training can begin with a LoRA file: its kind and its model, from the header alone.

Owns the check that ``hpo train --dry-run`` and the training share. Modules, ranks and alphas are compared when the
training begins (``lorafile.begin``), because that needs the base.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from trainer.adapters.contents import DORA, FULL, LOCON, LORA, NORM, Contents, no_lora, read_contents
from trainer.bases import FAMILIES
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.settings import NETWORK_TYPES
from trainer.text import clean_text

# What a file shows or the settings name → what its tensors are. LoCon is LoRA on convolutions too (conv_dim decides);
# LoRA-FA and DyLoRA are saved as LoRA.
_ALIKE = {LOCON: LORA, "LoRA-FA": LORA, "DyLoRA": LORA, FULL: "Full", NORM: "Norm"}


def check_start(config: TrainConfig, family: str | None = None) -> None:
    """Raise ModelFileError or ConfigError if ``network_weights`` is no LoRA, for another model than ``family``, or of a
    kind that these settings do not train."""
    path = Path(config.network_weights)
    contents = check_lora(path, family)
    name = f"network_weights {clean_text(path.name)}"
    _check_kind(name, contents, config)
    _check_rank(name, contents, config)


def check_lora(path: Path, family: str | None = None) -> Contents:
    """What the header of a LoRA file shows.  Raises ModelFileError or ConfigError for no LoRA, or one for another
    model than ``family``."""
    contents = read_contents(path)
    if not contents.is_lora:
        raise no_lora(path, contents)
    made_for = contents.made_for
    if family is not None and family not in made_for.families:
        raise ConfigError(
            f"{clean_text(path.name)} is a LoRA for {made_for.title} ({made_for.why}); "
            f"the base is {FAMILIES[family].title}",
            "use a LoRA that was trained on a base of this family",
        )
    return contents


def _check_kind(name: str, contents: Contents, config: TrainConfig) -> None:
    wanted = {_ALIKE.get(config.network_type, config.network_type)} | (
        {"Norm"} if config.train_norm else set()
    )
    counts = Counter(_ALIKE.get(kind, kind) for kind in contents.kinds.values())
    others = [
        f"{kind} ({count} module{'s' if count > 1 else ''})"
        for kind, count in counts.items()
        if kind not in wanted
    ]
    if others:
        only = next(iter(counts))
        is_trained = len(counts) == 1 and only in NETWORK_TYPES
        raise ConfigError(
            f"{name} holds {', '.join(others)}, and network_type is {config.network_type}",
            f"set network_type = {only}"
            if is_trained
            else "begin with a file of one kind that network_type can be, or merge this one into the base first",
        )
    if config.network_type == DORA and _is_per_output(contents):
        raise ConfigError(
            f"{name} has DoRA magnitudes per output, and this tool trains them per input",
            "go on with the tool that made it, or begin anew",
        )


def _check_rank(name: str, contents: Contents, config: TrainConfig) -> None:
    """The rank where the header alone tells it: a plain LoRA of one rank, and one rank in the settings."""
    own = config.dim_from_weights or config.block_dims or config.conv_dim is not None
    if (
        own
        or config.network_type != LORA
        or set(contents.kinds.values()) != {LORA}
        or len(contents.ranks) != 1
    ):
        return
    rank = next(iter(contents.ranks))
    if rank.isdigit() and int(rank) != config.network_dim:
        raise ConfigError(
            f"{name} has rank {rank}, and network_dim is {config.network_dim}",
            f"set network_dim = {rank} and network_alpha to what hpo inspect shows of it",
        )


def _is_per_output(contents: Contents) -> bool:
    """Whether a DoRA has one magnitude per output, as PEFT and by default LyCORIS store them."""
    for name in contents.keys.having("dora_scale", "magnitude"):
        tensors = contents.keys.modules[name].tensors
        shape = contents.shapes[tensors.get("dora_scale", tensors.get("magnitude", ""))]
        if "magnitude" in tensors or len(shape) == 1 or (shape[0] != 1 and shape[1] == 1):
            return True
    return False
