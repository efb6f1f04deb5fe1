"""LoRA files, of every kind of adapter: kohya's and LyCORIS' keys out; theirs and diffusers' in.

Owns the file format only; see ``metadata`` for the metadata. The file holds what was scored, since the
adapter is rounded to the save precision first.  docs/adapters.md says which program reads what.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.adapters.adapter import MAGNITUDE, SAVE_DTYPES, Adapter, inject
from trainer.adapters.kinds import KINDS
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
    **{f".{ending}": ending for kind in ("LoHa", "LoKr") for ending in KINDS[kind].endings},
}
EXACT = ("alpha", MAGNITUDE)  # kept in fp32: half types cannot hold every alpha, and magnitudes nearly cancel


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
        for key, tensor in _with_unit_scales(adapter.state()).items()
    }
    training = {**training_metadata(adapter.base, config), **(more or {})}
    hashes = _file_hashes(tensors, training)
    write_atomic(path, to_bytes(tensors, {**training, **hashes, **own_metadata(adapter.base, config)}))


def read(path: Path) -> LoraFile:
    """Read a LoRA file of any kind, checking the header first. Anything else is refused."""
    header = read_header(path)
    foreign = [name for name in header.shapes if _ending(name) is None]
    if foreign or not header.shapes:
        raise ModelFileError(
            f"{path} holds more than a LoRA: {_listed(foreign)}" if foreign else f"{path} holds no tensors",
            "LoRA, LoCon, DoRA, LoHa and LoKr can be attached; Tucker forms, other kinds and full models cannot",
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
        if alpha is None:
            alpha = _default_alpha(file, module, rank)
        if not math.isfinite(alpha):
            raise _damaged(file, f"{module} has alpha {alpha}")
        if kind == "LoKr" and "lokr_w1" in parts and "lokr_w2" in parts:
            alpha = float(rank)
        # alpha 0 means the rank, as in sd-scripts
        targets.append(Target(component, path, key, rank, alpha or float(rank), kind))
        weights |= {f"{key}.{ending}": part for ending, part in parts.items() if ending != "alpha"}
    kinds = {target.kind for target in targets}
    if len(kinds) > 1:
        raise ModelFileError(
            f"{file.path.name} mixes {', '.join(sorted(kinds))}", "a file of one kind can be attached"
        )
    if unknown or not targets:
        raise ModelFileError(
            f"{len(unknown)} entries of {file.path.name} do not fit {base.name}: {_listed(unknown)}",
            "the file is partial, of another kind, or for another base",
        )
    return targets, weights


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
            state = {key: tensor for key, tensor in state.items() if key in wanted}
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
            if _size(state[key]) != _size(wanted[key])
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


def _size(tensor: Tensor) -> tuple[int, ...] | float:
    """A weight's shape, or an alpha's value."""
    return tuple(tensor.shape) if tensor.dim() else round(float(tensor), 4)


def _kind(parts: Mapping[str, Tensor]) -> str | None:
    """Which kind of adapter a module's tensors are, or None if they are of several or of none."""
    endings = parts.keys() - {"alpha", MAGNITUDE}
    for kind in ("LoRA", "LoHa", "LoKr"):
        if endings and endings <= set(KINDS[kind].endings):
            if MAGNITUDE not in parts:
                return kind
            return "DoRA" if kind == "LoRA" else None
    return None


def _fits(kind: str, parts: Mapping[str, Tensor], weight: Tensor) -> bool:
    """Whether a module's tensors are complete and belong to a weight of this shape."""
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
        if ending == "alpha":
            if part.numel() != 1:
                raise _damaged(file, f"{module} has {part.numel()} alphas")
        elif part.dim() < 2 or part.numel() == 0:
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
