"""LoRA files, of every kind of adapter: kohya's and LyCORIS' keys out; theirs and diffusers' in.

Owns the file format only; see ``metadata`` for the metadata. The file holds what was scored, since the
adapter is rounded to the save precision first.  docs/adapters.md says which program reads what.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.adapters.adapter import MAGNITUDE, SAVE_DTYPES, Adapter, inject
from trainer.adapters.choice import IN_FILES, KINDS
from trainer.adapters.kinds import SCALAR
from trainer.adapters.metadata import own_metadata, training_metadata
from trainer.adapters.targets import Target
from trainer.bases import Base, detect
from trainer.config import TrainConfig
from trainer.errors import ConfigError, ModelFileError
from trainer.files import write_atomic
from trainer.tensorfile import load_tensors, read_header, to_bytes
from trainer.text import clean_text

SHOWN_KEYS = 5  # how many keys an error names
# What a tensor's name may end in → the ending that this tool writes.
ENDINGS = {
    ".lora_down.weight": "lora_down.weight",
    ".lora_up.weight": "lora_up.weight",
    ".lora_A.weight": "lora_down.weight",
    ".lora_B.weight": "lora_up.weight",
    ".lora.down.weight": "lora_down.weight",
    ".lora.up.weight": "lora_up.weight",
    ".lora_linear_layer.down.weight": "lora_down.weight",
    ".lora_linear_layer.up.weight": "lora_up.weight",
    ".alpha": "alpha",
    f".{MAGNITUDE}": MAGNITUDE,
    **{f".{ending}": ending for kind in IN_FILES for ending in (*KINDS[kind].endings, *KINDS[kind].extras)},
    ".on_input": "on_input",
}
ENDINGS = dict(sorted(ENDINGS.items(), key=lambda pair: -len(pair[0])))  # ".weight" is the last resort
EXACT = (
    "alpha",
    MAGNITUDE,
    "on_input",
)  # fp32: half types cannot hold every alpha, and magnitudes nearly cancel
CONSTANTS = ("alpha", "on_input")
_VECTORS = ("weight", "w_norm", "b_norm", "diff", "diff_b")  # which may have one axis


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read: its tensors under the file's own names, its metadata, and the family it is for."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    family: str


def write(path: Path, adapter: Adapter, config: TrainConfig, more: Mapping[str, str] | None = None) -> None:
    """Write the adapter as kohya's networks.lora or LyCORIS would, atomically.  Weights in save_precision,
    alphas and magnitudes in fp32.  The bytes depend on weights, settings and metadata only, not on time.
    ``more`` is metadata beside the settings, as ``dataset_metadata``.  No path of this machine gets into the
    file, since files are shared."""
    dtype = SAVE_DTYPES[config.save_precision]
    tensors = {
        key: tensor if key.endswith(EXACT) else tensor.to(dtype).contiguous()
        for key, tensor in _with_unit_scales(adapter.saved()).items()
    }
    training = {**training_metadata(adapter.base, config), **(more or {})}
    hashes = _file_hashes(tensors, training)
    write_atomic(path, to_bytes(tensors, {**training, **hashes, **own_metadata(adapter.base, config)}))


def read(path: Path) -> LoraFile:
    """Read a LoRA file of any kind, checking the header first. Anything else is refused."""
    header = read_header(path)
    foreign = [name for name in header.shapes if not _is_ours(name, header.shapes)]
    if foreign or not header.shapes:
        raise ModelFileError(
            f"{path} holds more than a LoRA: {_listed(foreign)}" if foreign else f"{path} holds no tensors",
            "LoRA files of kohya, LyCORIS and diffusers can be attached; full models cannot",
        )
    tensors = load_tensors(path)
    return LoraFile(path, tensors, header.metadata, family_of(header.metadata, header.shapes))


def attach(base: Base, file: LoraFile) -> Adapter:
    """Put a LoRA file into a base.  Every key must fit a module of the base, complete and in its shape."""
    return Adapter(base, *parts_of(base, file))


def parts_of(base: Base, file: LoraFile) -> tuple[list[Target], dict[str, Tensor]]:
    """The modules of a LoRA file, and its tensors under their kohya keys.  Raises ModelFileError as ``attach``."""
    if file.family != base.family:
        raise ModelFileError(
            f"{file.path.name} is a LoRA for {file.family}, the base {base.name} is {base.family}",
            "use it with a base of its own family",
        )
    known = _known_names(base)
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in file.tensors.items():
        ending = _ending(name)
        assert ending is not None
        module = name.removesuffix(ending)
        if module in known:
            if found.setdefault(module, {}).setdefault(ENDINGS[ending], tensor) is not tensor:
                raise _damaged(file, f"it has {module} twice")
        else:
            unknown.append(name)
    targets: list[Target] = []
    weights: dict[str, Tensor] = {}
    for module, parts in found.items():
        component, path, key = known[module]
        _check_numbers(file, module, parts)
        kind = _kind(parts)
        weight = base.components()[component].get_submodule(path).weight
        if kind is None or not _fits(kind, parts, weight):
            shapes = ", ".join(f"{ending} {tuple(part.shape)}" for ending, part in parts.items())
            unknown.append(f"{module} {shapes}")
            continue
        if any(target.key == key for target in targets):
            raise _damaged(file, f"it has {key} twice, under two names")
        alpha = float(parts["alpha"]) if "alpha" in parts else None
        rank = KINDS[kind].rank_of(parts, alpha)
        number = _constant(file, module, kind, parts, rank)
        if not math.isfinite(number):
            raise _damaged(file, f"{module} has alpha {number}")
        targets.append(Target(component, path, key, rank, number, kind))
        weights |= {f"{key}.{ending}": part for ending, part in parts.items() if ending not in CONSTANTS}
    if unknown or not targets:
        raise ModelFileError(
            f"{len(unknown)} entries of {file.path.name} do not fit {base.name}: {_listed(unknown)}",
            "the file is partial, of another kind, or for another base",
        )
    return targets, weights


def _constant(file: LoraFile, module: str, kind: str, parts: Mapping[str, Tensor], rank: int) -> float:
    """The number beside a module's tensors: its alpha, or what its kind has instead."""
    name = KINDS[kind].constant
    if name != "alpha":
        return float(parts[name]) if name in parts else 1.0
    if kind in ("OFT", "BOFT"):
        return float(parts["alpha"]) if "alpha" in parts else 0.0
    if kind == "LoKr" and "lokr_w1" in parts and "lokr_w2" in parts:
        return float(rank)
    alpha = float(parts["alpha"]) if "alpha" in parts else _default_alpha(file, module, rank)
    return alpha or float(rank)  # alpha 0 means the rank, as in sd-scripts


def begin(base: Base, config: TrainConfig) -> Adapter:
    """The adapter that training begins with: a fresh one, or the weights of network_weights.

    Raises ConfigError if the file has other modules, ranks or alphas than the settings. Nothing is padded or cut.
    """
    if not config.network_weights:
        return inject(base, config)
    name = clean_text(Path(config.network_weights).name)
    given = attach(base, read(Path(config.network_weights)))
    state = given.state()
    given.remove()
    adapter = inject(base, config)
    try:
        wanted = adapter.state()
        if config.dim_from_weights:  # it also tells modules that are not trained
            keys = {layer.target.key for layer in adapter.layers}
            state = {key: tensor for key, tensor in state.items() if key.partition(".")[0] in keys}
        state = _as_trained(adapter, state)
        if config.network_type == "DoRA":  # saved with alpha = rank, the rest of its scale in lora_up
            for key in [key for key in wanted if key.endswith(".alpha") and key in state]:
                up = key.removesuffix("alpha") + "lora_up.weight"
                state[up] = state[up] * (state[key] / wanted[key])
                state[key] = wanted[key]
        other = sorted(wanted.keys() ^ state.keys())
        if other:
            raise ConfigError(
                f"network_weights {name} has other tensors than these settings train: {_listed(other)}",
                "set network_type, network_dim, conv_dim, factor … to what hpo inspect shows of it",
            )
        unequal = [
            f"{key} {_size(state[key])} instead of {_size(wanted[key])}"
            for key in wanted
            if not key.endswith(f".{SCALAR}") and _size(state[key]) != _size(wanted[key])
        ]
        if unequal:
            raise ConfigError(
                f"network_weights {name} has another rank or alpha than these settings: {_listed(unequal)}",
                "set network_dim, network_alpha, conv_dim and conv_alpha to what hpo inspect shows of it",
            )
        adapter.load_state(state)
    except BaseException:
        adapter.remove()
        raise
    return adapter


def _as_trained(adapter: Adapter, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors in the parts that training has: DyLoRA's units, and the scalar of use_scalar."""
    found = dict(state)
    for layer in adapter.layers:
        start = f"{layer.target.key}."
        wanted = {ending: layer.weights[ending] for ending in layer.weights}
        if SCALAR not in wanted and layer.kind.endings:
            continue
        given = {key.removeprefix(start): found.pop(key) for key in [*found] if key.startswith(start)}
        constants = {ending: value for ending, value in given.items() if ending in CONSTANTS}
        tensors = {ending: value for ending, value in given.items() if ending not in CONSTANTS}
        try:
            parts = layer.kind.unfolded(tensors, wanted)
        except (KeyError, ValueError):
            parts = tensors
        found |= {start + ending: value for ending, value in (parts | constants).items()}
    return found


def _size(tensor: Tensor) -> tuple[int, ...] | float:
    """A weight's shape, or an alpha's value."""
    return tuple(tensor.shape) if tensor.dim() else round(float(tensor), 4)


def _kind(parts: Mapping[str, Tensor]) -> str | None:
    """Which kind of adapter a module's tensors are, or None if they are of several or of none."""
    endings = parts.keys() - {*CONSTANTS, MAGNITUDE}
    for name in IN_FILES:
        kind = KINDS[name]
        if not endings or not endings <= {*kind.endings, *kind.extras}:
            continue
        if name == "OFT" and parts["oft_blocks"].dim() == 4:
            continue
        if name == "IA3" and "on_input" not in parts:
            return None
        if MAGNITUDE not in parts:
            return name
        return "DoRA" if name == "LoRA" and "lora_mid.weight" not in parts else None
    return None


def _is_ours(name: str, names: Collection[str]) -> bool:
    """Whether a tensor is one of a LoRA of any kind. IA³ has a mere ".weight", with ".on_input" beside it."""
    ending = _ending(name)
    return ending is not None and (ending != ".weight" or name.removesuffix(ending) + ".on_input" in names)


def _fits(kind: str, parts: Mapping[str, Tensor], weight: Tensor) -> bool:
    """Whether a module's tensors are complete and belong to a weight of this shape."""
    parts = {ending: part for ending, part in parts.items() if ending not in CONSTANTS}
    if not parts.keys() >= set(KINDS[kind].endings) and kind != "LoKr":
        return False
    if MAGNITUDE in parts:
        ones = (1,) * (weight.dim() - 2)
        per_input, per_output = (1, weight.shape[1], *ones), (weight.shape[0], 1, *ones)
        if tuple(parts[MAGNITUDE].shape) not in (per_input, per_output):
            return False
    return KINDS[kind].fits(parts, weight)


def _with_unit_scales(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state whose DoRA modules have alpha = rank and their scale in lora_up: A1111 scales after the
    magnitude, the others before it, and a scale of 1 is the same for all."""
    tensors = dict(state)
    for name in state:
        if not name.endswith(f".{MAGNITUDE}"):
            continue
        key = name.removesuffix(f".{MAGNITUDE}")
        rank = float(state[f"{key}.lora_down.weight"].shape[0])
        alpha = float(state[f"{key}.alpha"])
        if alpha != rank:
            tensors[f"{key}.lora_up.weight"] = state[f"{key}.lora_up.weight"] * (alpha / rank)
            tensors[f"{key}.alpha"] = torch.tensor(rank)
    return tensors


def _known_names(base: Base) -> dict[str, tuple[str, str, str]]:
    """Every name a file may use for a module → (component, path, kohya key): kohya's, diffusers' with
    underscores under kohya's prefix (some SDXL writers), and diffusers' dotted."""
    known: dict[str, tuple[str, str, str]] = {}
    for component, network in base.components().items():
        for path, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm):
                with contextlib.suppress(KeyError):  # sd-scripts has no such module
                    known[base.key_of(component, path)] = (component, path, base.key_of(component, path))
    for table in (base.lora_names(), base.conv_names()):
        for component, names in table.items():
            for path, key in names.items():
                entry = (component, path, key)
                known[f"{component}.{path}"] = entry
                if component == "unet":
                    known["lora_unet_" + path.replace(".", "_")] = entry
                else:
                    known[f"{component}.text_model.{path.removeprefix('text_model.')}"] = entry
                known[key] = entry
    return known


def _ending(name: str) -> str | None:
    """The ending of a tensor's name, or None if it has none that a LoRA of any kind has."""
    return next((ending for ending in ENDINGS if name.endswith(ending)), None)


def family_of(metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The family that a LoRA is for (``detect.family_of_lora``)."""
    endings = ("lora_down.weight", "hada_w1_b")
    readers = [name for name in shapes if ENDINGS.get(_ending(name) or "") in endings]
    return detect.family_of_lora(metadata, shapes, readers)


def _check_numbers(file: LoraFile, module: str, parts: Mapping[str, Tensor]) -> None:
    """ModelFileError for what no module of a sound file has: empty, whole-number or non-finite tensors."""
    for ending, part in sorted(parts.items()):
        if ending in CONSTANTS:
            if part.numel() != 1:
                raise _damaged(file, f"{module} has {part.numel()} {ending}s")
        elif part.numel() == 0 or (part.dim() < 2 and ending not in _VECTORS):
            raise _damaged(file, f"{module} has {ending} of shape {tuple(part.shape)}")
        elif not part.is_floating_point():
            raise _damaged(file, f"{module} is not of floating-point numbers")
        elif not bool(part.float().isfinite().all()):
            raise _damaged(file, f"{module} is not finite")


def _default_alpha(file: LoraFile, module: str, rank: int) -> float:
    """Alpha of a module that has no alpha tensor: PEFT's settings in diffusers' metadata, else the rank (scale 1)."""
    try:
        settings = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
        component, _, path = module.partition(".")
        pattern = settings.get(f"{component}.alpha_pattern") or {}
        return float(pattern.get(path, settings.get(f"{component}.lora_alpha", rank)))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise _damaged(file, f"its lora_adapter_metadata gives {module} no alpha") from None


def _damaged(file: LoraFile, why: str) -> ModelFileError:
    return ModelFileError(f"{file.path.name} cannot be attached: {why}", "make or download it again")


def _file_hashes(tensors: dict[str, Tensor], training: Mapping[str, str]) -> dict[str, str]:
    """sshs_model_hash over the tensors' bytes, sshs_legacy_hash over 64 KiB at 1 MiB, both of a file that has
    only ss_* metadata (sd-scripts library/train_util.py, precalculate_safetensors_hashes)."""
    content = to_bytes(tensors, {k: v for k, v in training.items() if k.startswith("ss_")})
    header = int.from_bytes(content[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(content[8 + header :]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


def _listed(names: list[str]) -> str:
    """The first names of a list, shortened: a hostile file may hold very long ones."""
    shown = ", ".join(clean_text(name[:120]) for name in names[:SHOWN_KEYS])
    return shown + (" …" if len(names) > SHOWN_KEYS else "")
