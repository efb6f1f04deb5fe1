"""What the values of a LoRA file show: modules that are not finite, modules that change nothing, and the alphas.

Owns the checks that need the tensors and no base.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from trainer.adapters.contents import Contents, listed
from trainer.adapters.keys import Name
from trainer.bases import FAMILIES

FLAGS = ("alpha", "on_input", "oft_R.scaled_oft", "scalar")  # parts of a single value
_LAYER = re.compile(r"encoder_layers_(\d+)_")
# One of these parts being zero makes ΔW zero.
_FACTORS = (
    ("lora_down.weight", "lora_up.weight"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
)


def value_notes(contents: Contents, tensors: Mapping[str, Tensor]) -> list[str]:
    """What the values of a file show: modules that are not finite, and modules that change nothing."""
    broken = broken_modules(contents, tensors)
    found = []
    if broken:
        names = [contents.keys.modules[name].written for name in broken]
        found.append(f"{len(broken)} of {len(contents.kinds)} modules hold NaN or infinity: {listed(names)}")
    zero = [name for name in contents.kinds if _changes_nothing(contents, tensors, name)]
    if len(zero) == len(contents.kinds) and zero:
        found.append("all modules are zero and change nothing: the file was not trained")
    elif zero:
        unused = f": the last layer of a text encoder, which {contents.made_for.title} does not use"
        why = unused if _unused(contents, zero) else ""
        found.append(f"{len(zero)} of {len(contents.kinds)} modules are zero and change nothing{why}")
    return found


def _unused(contents: Contents, zero: Sequence[Name]) -> bool:
    """Whether all are in the last layer of the first text encoder of a family without clip_skip, as SDXL: its output
    always comes from the layer before."""
    families = contents.made_for.families
    if len(families) != 1 or FAMILIES[families[0]].uses_clip_skip:
        return False
    if any(name.component != "text_encoder" for name in zero):
        return False
    layers = {name: _LAYER.match(name.path) for name in contents.kinds if name.component == "text_encoder"}
    last = max((int(layer[1]) for layer in layers.values() if layer), default=-1)
    return all((layer := layers[name]) is not None and int(layer[1]) == last for name in zero)


def broken_modules(contents: Contents, tensors: Mapping[str, Tensor]) -> list[Name]:
    """The modules with a value that is not finite."""
    return [
        name
        for name in contents.kinds
        if any(not is_finite(tensors[key]) for key in contents.keys.modules[name].tensors.values())
    ]


def alphas_of(contents: Contents, tensors: Mapping[str, Tensor]) -> Counter[str]:
    """Alpha → how many modules have it."""
    found: Counter[str] = Counter()
    for name in contents.kinds:
        if alpha := contents.keys.modules[name].tensors.get("alpha"):
            found[f"{float(tensors[alpha].float().mean()):g}"] += 1
    if without := len(contents.unscaled()):
        found["none (readers take the rank)"] = without
    return found


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are numbers."""
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


def _changes_nothing(contents: Contents, tensors: Mapping[str, Tensor], name: Name) -> bool:
    parts = contents.keys.modules[name].tensors
    if "dora_scale" in parts or "magnitude" in parts:
        return False
    for factors in _FACTORS:
        own = [tensors[parts[part]] for part in factors if part in parts]
        if own:
            return any(not bool(tensor.float().any()) for tensor in own)
    whole = [
        tensors[key]
        for part, key in parts.items()
        if part not in FLAGS and part not in ("set_weight", "ia3_l", "rescale")
    ]
    return bool(whole) and all(not bool(tensor.float().any()) for tensor in whole)
