"""What a LoRA file contains, from its header alone: kinds, ranks, components, the model it is for, and what is odd.

Owns the description that every command uses (inspect, compare, evaluate, network_weights).  Does not own the spelling
of keys (``keys``), the marks of models (``trainer.bases``), or the maths (``forms``).  Loads no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from trainer.adapters.keys import PRIOR, TEXT, TEXT_2, TEXT_3, UNET, Keys, Module, Name, read_keys
from trainer.adapters.otherfiles import what_is
from trainer.bases import FAMILIES, LoraLayer, MadeFor, made_for
from trainer.errors import ModelFileError
from trainer.reading import read_small
from trainer.text import clean_text

Shapes = Mapping[str, tuple[int, ...]]
LORA, LOCON, DORA, LOHA, LOKR = "LoRA", "LoCon", "DoRA", "LoHa", "LoKr"
FULL, NORM, IA3, OFT, BOFT, GLORA = "full differences", "norms", "IA3", "OFT", "BOFT", "GLoRA"
TLORA = "T-LoRA"
# Parts of a module → its kind.  The first entry with one of its parts counts.
_KINDS = (
    (("lora_down.weight", "lora_up.weight", "lora_mid.weight"), LORA),
    (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), LOHA),
    (("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"), LOKR),
    (("a1.weight", "a2.weight", "b1.weight", "b2.weight"), GLORA),
    (("oft_blocks", "oft_R.weight"), OFT),
    (("q_layer.weight", "p_layer.weight", "lambda_layer"), TLORA),
    (("ia3", "ia3_l"), IA3),
    (("w_norm", "b_norm"), NORM),
    (("diff", "diff_b", "set_weight"), FULL),
)
# Kinds → the parts that each module has.
_NEEDED = (
    ((LORA, LOCON, DORA), {"lora_down.weight", "lora_up.weight"}),
    ((LOHA,), {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    ((GLORA,), {"a1.weight", "a2.weight", "b1.weight", "b2.weight"}),
)
_TUCKER = ("lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2", "bm.weight")
# Parts that hold no weights of their own.
MARKERS = ("alpha", "on_input", "oft_R.scaled_oft", "scalar", "reshape_weight")
_COMPONENTS = {
    UNET: "U-Net",
    TEXT: "text encoder",
    TEXT_2: "second text encoder",
    TEXT_3: "third text encoder",
    PRIOR: "prior",
}
PEFT_KEY = "lora_adapter_metadata"  # where diffusers stores PEFT's settings
MAX_SETTINGS_BYTES = 1_000_000
SHOWN = 5  # how many names a message shows


@dataclass(frozen=True)
class Contents:
    """A LoRA file as its header shows it.  ``metadata`` has PEFT's settings beside the file's own."""

    shapes: Shapes
    metadata: Mapping[str, str]
    keys: Keys
    types: Mapping[str, str]
    own_metadata: Mapping[str, str]

    @cached_property
    def kinds(self) -> dict[Name, str]:
        """Module → the kind of its tensors, without modules that have none."""
        found = {name: kind_of_parts(self.keys.modules[name], self.shapes) for name in self.keys.modules}
        return {name: kind for name, kind in found.items() if kind}

    @cached_property
    def strays(self) -> tuple[str, ...]:
        """Tensors that are no part of a module."""
        without = (module for name, module in self.keys.modules.items() if name not in self.kinds)
        return (*self.keys.others, *(tensor for module in without for tensor in module.tensors.values()))

    @cached_property
    def made_for(self) -> MadeFor:
        """The model that it is for."""
        layers = [self._layer(name) for name in self.kinds]
        return made_for(layers, self.metadata)

    @cached_property
    def instead(self) -> str:
        """What the file is, if it is no LoRA: ``a full checkpoint``; "" if that is not known, or if it is a LoRA."""
        strays = self.strays
        if self.kinds and len(strays) < len(self.kinds):
            return ""
        return what_is({name: self.shapes[name] for name in strays})

    @property
    def is_lora(self) -> bool:
        """Whether it has modules, and not only as a small part of something else."""
        return bool(self.kinds) and not self.instead

    @cached_property
    def kind(self) -> str:
        """Its kinds in words: ``LoCon with a Tucker core + norms``."""
        counts = Counter(self.kinds.values())
        if counts[LOCON]:
            counts[LOCON] += counts.pop(LORA, 0)
        if counts[DORA] and not counts[LOCON]:
            counts[DORA] += counts.pop(LORA, 0)
        tucker = self.keys.having(*_TUCKER)
        words = []
        for kind, count in sorted(
            counts.items(), key=lambda item: (item[0] == NORM, item[0] == FULL, -item[1])
        ):
            if count:
                has_core = any(self.kinds.get(name) in (kind, LOCON) for name in tucker)
                decomposed = kind not in (LORA, LOCON, DORA) and any(
                    self.kinds.get(name) == kind for name in self.keys.having("dora_scale", "magnitude")
                )
                core = " with a Tucker core" if has_core and kind not in (NORM, FULL) else ""
                words.append(kind + core + (" with DoRA magnitudes" if decomposed else ""))
        return " + ".join(words)

    @cached_property
    def form(self) -> str:
        """How it spells its keys, in words."""
        names = [self.keys.modules[name] for name in self.kinds]
        spelled = " ".join(next(iter(module.tensors.values())) for module in names[:200])
        written = [module.written for module in names]
        if "_lora." in spelled:
            return "diffusers before 0.18 (attention processors)"
        if all(name.startswith("base_model.") for name in written):
            return "PEFT"
        if any(name.startswith(("lora_", "oft_")) for name in written):
            usual = any(mark in name for name in written for mark in ("_input_", "_middle_", "_output_"))
            named = any("_blocks_" in mark for f in self.made_for.families for mark in FAMILIES[f].lora_marks)
            return "kohya" + (" with diffusers' block names" if self._is_unet and named and not usual else "")
        if any(name.startswith("lycoris_") for name in written):
            return "LyCORIS without kohya's prefixes"
        if ".lora_A" in spelled or ".lora." in spelled or "lora_linear_layer" in spelled:
            return "diffusers" if ".lora_A" in spelled else "diffusers before 0.26"
        return "dotted names (as OneTrainer and ComfyUI write)"

    @cached_property
    def components(self) -> dict[str, int]:
        """Component in words → how many modules it has."""
        families = self.made_for.families
        two = self.keys_of(TEXT_2) or (families and all(len(FAMILIES[f].text_encoders) > 1 for f in families))
        words = _COMPONENTS | ({TEXT: "first text encoder"} if two else {})
        if not self.made_for.families and not self._is_unet:
            words = words | {UNET: "transformer"}
        counts = Counter(name.component for name in self.kinds)
        return {words[component]: counts[component] for component in words if counts[component]}

    @property
    def _is_unet(self) -> bool:
        return any(
            re.search(
                r"^(?:down|up|mid)_block\w*(?:attentions|resnets|samplers)_|^(?:in|out)put_blocks_\d",
                name.path,
            )
            for name in self.kinds
        )

    def keys_of(self, component: str) -> list[Name]:
        """The modules of a component."""
        return [name for name in self.kinds if name.component == component]

    @cached_property
    def ranks(self) -> Counter[str]:
        """Rank → how many modules have it; ``full`` for those without one."""
        return Counter(str(rank_of(self.keys.modules[name], self.shapes) or "full") for name in self.kinds)

    def unscaled(self) -> list[Name]:
        """The modules whose scale needs an alpha that the file does not have."""
        scaled = (LORA, LOCON, DORA, LOHA, LOKR, GLORA)
        return [
            name
            for name, kind in self.kinds.items()
            if kind in scaled
            and "alpha" not in self.keys.modules[name].tensors
            and rank_of(self.keys.modules[name], self.shapes) is not None
        ]

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a user of the file should know, one line each."""
        found = [self.made_for.conflict + ": the file decides"] if self.made_for.conflict else []
        found += self._on_alpha()
        found += self._on_rank()
        if self.keys.bundled:
            names = ", ".join(
                f"{clean_text(n)[:40]!r} ({', '.join(sorted(e))})" for n, e in self.keys.bundled.items()
            )
            found.append(
                f"it bundles the embeddings {names}: they are not attached, so prompts that use them are read as "
                "plain words"
            )
        if halves := self.incomplete():
            found.append(f"{_count(len(halves), 'module')} not complete: {listed(halves)}")
        if uneven := self.uneven():
            found.append(f"{_count(len(uneven), 'module')} with halves of different rank: {listed(uneven)}")
        if self.keys.twice:
            found.append(f"{len(self.keys.twice)} tensors are there twice: {listed(self.keys.twice)}")
        if self.strays:
            found.append(f"{len(self.strays)} tensors are no part of a LoRA: {listed(list(self.strays))}")
        return tuple(map(clean_text, found))

    def incomplete(self) -> list[str]:
        """Modules that lack a half, in the file's own spelling."""
        needed = {kind: parts for kinds, parts in _NEEDED for kind in kinds}
        modules = ((self.keys.modules[name], needed.get(kind, set())) for name, kind in self.kinds.items())
        return [module.written for module, parts in modules if not parts <= module.tensors.keys()]

    def uneven(self) -> list[str]:
        """Modules whose halves have different ranks, so that they cannot be multiplied, in the file's own spelling."""
        found = []
        for module in (self.keys.modules[name] for name in self.kinds):
            down, up = (
                self.shapes.get(module.tensors.get(part, ""), ())
                for part in ("lora_down.weight", "lora_up.weight")
            )
            if len(down) > 1 and len(up) > 1 and "lora_mid.weight" not in module.tensors and down[0] != up[1]:
                found.append(module.written)
        return found

    def _on_alpha(self) -> list[str]:
        without = self.unscaled()
        if not without or PEFT_KEY in self.metadata:
            return []
        said = ""
        dim, alpha = (_number(self.metadata.get(f"ss_network_{key}")) for key in ("dim", "alpha"))
        if dim and alpha and dim != alpha:
            said = f", though the metadata says alpha {alpha:g} of dim {dim:g}"
        alphas = any("alpha" in module.tensors for module in self.keys.modules.values())
        which = f"{_count(len(without), 'module')} without" if alphas else "no module has an"
        return [f"{which} alpha: readers take the rank (scale 1){said}"]

    def _on_rank(self) -> list[str]:
        dim = _number(self.metadata.get("ss_network_dim"))
        ranks = [rank for rank in self.ranks if rank != "full"]
        if dim is None or not ranks or f"{dim:g}" in ranks:
            return []
        return [f"the metadata says network_dim {dim:g}, its modules have rank {', '.join(ranks[:SHOWN])}"]

    def _layer(self, name: Name) -> LoraLayer:
        module = self.keys.modules[name]
        inner, outer, conv = _sides(module, self.shapes)
        return LoraLayer(name.component, name.path, module.written, inner, outer, conv)


def kind_of_parts(module: Module, shapes: Shapes) -> str:
    """The kind of a module's tensors; "" if it has none of a kind."""
    for parts, kind in _KINDS:
        if module.tensors.keys().isdisjoint(parts):
            continue
        if kind == LORA:
            if not module.tensors.keys().isdisjoint(("dora_scale", "magnitude")):
                return DORA
            down = shapes.get(module.tensors.get("lora_down.weight", ""), ())
            wide = "lora_mid.weight" in module.tensors or any(side > 1 for side in down[2:])
            return LOCON if wide else LORA
        if kind == OFT and len(shapes.get(module.tensors.get("oft_blocks", ""), ())) == 4:
            return BOFT
        return kind
    return ""


def rank_of(module: Module, shapes: Shapes) -> int | None:
    """The rank of a module: the side that its factors share; None for a full matrix."""
    for part in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "b2.weight"):
        shape = shapes.get(module.tensors.get(part, ""))
        if shape:
            return min(shape[:2]) if part == "b2.weight" else shape[0]
    return None


def peft_alpha(metadata: Mapping[str, str], component: str, module: str) -> tuple[float | None, bool]:
    """(alpha, whether the scale is alpha / √r) of a module in PEFT's settings: those that diffusers stores in a file,
    with a component before each name, or those that PEFT saved beside it. ValueError: they cannot be read."""
    try:
        settings = _peft_settings(metadata[PEFT_KEY])
        dot = f"{component}." if any(name.startswith(f"{component}.") for name in settings) else ""
        path = module.removeprefix("base_model.model.").removeprefix(f"{component}.")
        pattern = settings.get(f"{dot}alpha_pattern") or {}
        given = pattern.get(path, settings.get(f"{dot}lora_alpha", settings.get(f"{dot}alpha")))
        return None if given is None else float(given), bool(settings.get(f"{dot}use_rslora"))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError("no settings of PEFT") from error


@lru_cache(maxsize=2)
def _peft_settings(text: str) -> Any:
    """Parsed once for all modules of a file: a pattern of alphas may name each of them."""
    return json.loads(text)


def read_contents(path: Path) -> Contents:
    """What the header of a file shows.  Raises ModelFileError for what is no safetensors file.

    Settings that PEFT saved beside its file count as metadata: the file holds no alpha.
    """
    from trainer.tensorfile import read_header  # loads torch

    header = read_header(path)
    metadata = dict(header.metadata)
    beside = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and PEFT_KEY not in metadata and beside.is_file():
        with contextlib.suppress(OSError, ValueError):
            metadata[PEFT_KEY] = read_small(beside, MAX_SETTINGS_BYTES).decode("utf-8")
    return Contents(header.shapes, metadata, read_keys(header.shapes), header.types, header.metadata)


def no_lora(path: Path, contents: Contents) -> ModelFileError:
    """The error for a safetensors file without a LoRA."""
    if not contents.shapes:
        return ModelFileError(f"{path} holds no tensors", "give a LoRA file")
    if contents.instead:
        return ModelFileError(f"{path} contains no LoRA: it is {contents.instead}", "give a LoRA file")
    return ModelFileError(
        f"{path} contains no LoRA", f"give a LoRA file; the tensors here are {listed(contents.strays[:3])}"
    )


def listed(names: list[str] | tuple[str, ...]) -> str:
    """The first names of a list, shortened: a hostile file may hold very long ones."""
    shown = ", ".join(clean_text(name[:120]) for name in names[:SHOWN])
    return shown + (" …" if len(names) > SHOWN else "")


def _sides(module: Module, shapes: Shapes) -> tuple[int | None, int | None, bool | None]:
    """(input width, output width, is a convolution) of a module's layer, as far as its tensors show them."""

    def side(part: str, axis: int) -> int | None:
        shape = shapes.get(module.tensors.get(part, ""), ())
        return shape[axis] if len(shape) > max(axis, 0) else None

    inner = outer = None
    for part in ("lora_down.weight", "diff", "b2.weight"):
        inner = inner or side(part, 1)
    for part in ("lora_up.weight", "diff", "b1.weight", "hada_w1_a"):
        outer = outer or side(part, 0)
    if inner is None:
        inner = side("hada_w1_b", 1)
        first = side("lokr_w1", 1) or side("lokr_w1_b", 1)
        second = side("lokr_w2", 1) or side("lokr_w2_b", 1)
        inner = first * second if first and second else inner
    if outer is None:
        first = side("lokr_w1", 0) or side("lokr_w1_a", 0)
        second = side("lokr_w2", 0) or side("lokr_w2_a", 0)
        outer = first * second if first and second else None
    down = shapes.get(module.tensors.get("lora_down.weight", module.tensors.get("diff", "")))
    return inner, outer, len(down) == 4 if down else None


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
