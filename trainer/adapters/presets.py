"""Presets of LyCORIS: which modules of a base get an adapter, by class and by name.

Owns the table and preset files (LyCORIS lycoris/config.py, lycoris/kohya.py: apply_preset, create_modules). Classes and
names are those of sd-scripts' own U-Net. Does not own ranks (``targets``).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from trainer.bases import Base
from trainer.errors import ConfigError
from trainer.paths import user_path
from trainer.settings import LYCORIS_PRESETS
from trainer.text import clean_text
from trainer.tomlfile import read_table

# sd-scripts' class → diffusers' class, where they differ
_CLASSES = {"CrossAttention": "Attention"}


@dataclass(frozen=True)
class Preset:
    """``…_module``: classes, whose layers are all trained. ``…_name``: names of single modules. ``enable_conv``:
    whether 3×3 convolutions are trained. ``on_input``: names of modules whose IA³ scales the input."""

    enable_conv: bool = True
    unet_target_module: tuple[str, ...] = ()
    unet_target_name: tuple[str, ...] = ()
    text_encoder_target_module: tuple[str, ...] = ()
    text_encoder_target_name: tuple[str, ...] = ()
    use_fnmatch: bool = False
    on_input: tuple[str, ...] = ()


_BLOCKS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
_ENDS = ("conv_in", "conv_out")
_TIME = ("time_embedding.linear_1", "time_embedding.linear_2")
_TEXT = ("CLIPAttention", "CLIPMLP")
_FULL = Preset(
    unet_target_module=("Transformer2DModel", *_BLOCKS),
    unet_target_name=(*_ENDS, *_TIME),
    text_encoder_target_module=_TEXT,
)
_ATTN_MLP = Preset(
    enable_conv=False,
    unet_target_module=("Transformer2DModel",),
    text_encoder_target_module=_TEXT,
)
PRESETS: dict[str, Preset] = {
    "full": _FULL,
    "full-lin": Preset(
        enable_conv=False,
        unet_target_module=("Transformer2DModel", "ResnetBlock2D"),
        unet_target_name=_TIME,
        text_encoder_target_module=_TEXT,
    ),
    "attn-mlp": _ATTN_MLP,
    "attn-only": Preset(
        enable_conv=False,
        unet_target_module=("CrossAttention",),
        text_encoder_target_module=("CLIPAttention",),
    ),
    "unet-only": replace(_FULL, text_encoder_target_module=()),
    "unet-transformer-only": replace(_ATTN_MLP, text_encoder_target_module=()),
    "unet-convblock-only": Preset(unet_target_module=_BLOCKS, unet_target_name=_ENDS),
    # LyCORIS compares these names with the beginning of a path, so there they match nothing.
    "ia3": Preset(
        enable_conv=False,
        unet_target_name=("*.to_k", "*.to_v", "*.ff.net.2"),
        text_encoder_target_name=("*.k_proj", "*.v_proj", "*.mlp.fc2"),
        use_fnmatch=True,
        on_input=("*.mlp.fc2", "*.ff.net.2"),
    ),
}
assert tuple(PRESETS) == LYCORIS_PRESETS
# Keys of a preset file that say nothing about SD1.5 and SDXL.
_IGNORED = ("name",)


@dataclass(frozen=True)
class Chosen:
    """A module that a preset trains."""

    component: str
    path: str
    module: nn.Module
    on_input: bool = False


def preset_of(name: str) -> Preset:
    """A preset by its name, or from a TOML file in LyCORIS' form. Raises ConfigError for a file that asks for more than
    modules: another algorithm for some of them."""
    if name in PRESETS:
        return PRESETS[name]
    path = Path(user_path(name, "lycoris_preset"))
    table = dict(read_table(path))
    known = {field for field in Preset.__dataclass_fields__ if field != "on_input"}
    shown = f"the preset {clean_text(str(path))}"
    for key in ("module_algo_map", "name_algo_map"):
        if table.pop(key, None):
            raise ConfigError(
                f"{shown} has {key}, which trains some modules in another way",
                "remove it; all modules of a preset are trained alike",
            )
    for key in [key for key in table if key not in known]:
        if key not in _IGNORED:
            raise ConfigError(
                f"{shown} has an unknown key {clean_text(key)}", "use " + ", ".join(sorted(known))
            )
        del table[key]
    preset = Preset(**{key: _checked(shown, key, value) for key, value in table.items()})
    _check_patterns(shown, preset)
    return preset


def _check_patterns(shown: str, preset: Preset) -> None:
    for pattern in () if preset.use_fnmatch else (*preset.unet_target_name, *preset.text_encoder_target_name):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"{shown}: {clean_text(pattern)[:80]} is not a regular expression ({error})",
                "correct it, or set use_fnmatch = true for patterns such as *.to_k",
            ) from None


def _checked(shown: str, key: str, value: Any) -> Any:
    if key in ("enable_conv", "use_fnmatch"):
        if not isinstance(value, bool):
            raise ConfigError(f"{shown}: {key} is not true or false", "write true or false")
        return value
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"{shown}: {key} is not a list of texts", f'write {key} = ["…"]')
    return tuple(value)


def chosen(base: Base, preset: Preset) -> Iterator[Chosen]:
    """The linear layers, convolutions and norms of a preset, in module order, each once.

    Names are compared as in LyCORIS: equal, or a regular expression that matches from the beginning (with
    ``use_fnmatch`` a shell pattern).
    """
    networks = {name: part for name, part in base.components().items() if name != "vae"}
    for component, network in networks.items():
        is_unet = component == "unet"
        classes = preset.unet_target_module if is_unet else preset.text_encoder_target_module
        names = preset.unet_target_name if is_unet else preset.text_encoder_target_name
        owners = {_CLASSES.get(name, name) for name in classes}
        found: dict[str, None] = {}
        for path, module in network.named_modules():
            if type(module).__name__ in owners and not _matches(preset, names, base, component, path):
                found |= dict.fromkeys(inner for inner, _ in module.named_modules(prefix=path))
            elif path and _matches(preset, names, base, component, path):
                found[path] = None
        for path in found:
            module = network.get_submodule(path)
            if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm):
                on_input = bool(preset.on_input) and _matches(preset, preset.on_input, base, component, path)
                yield Chosen(component, path, module, on_input)


def _matches(preset: Preset, patterns: tuple[str, ...], base: Base, component: str, path: str) -> bool:
    if not patterns or not path:
        return False
    name = _name(base, component, path)
    if preset.use_fnmatch:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    return any(name == pattern or re.match(pattern, name) for pattern in patterns)


def _name(base: Base, component: str, path: str) -> str:
    """The path of a module in sd-scripts' networks; "" if they have no such module."""
    if component != "unet":
        return "text_model." + path.removeprefix("text_model.")
    try:
        return base.unet_name(path)
    except KeyError:
        return ""
