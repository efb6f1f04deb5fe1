"""LoRA files of every tool: read, and put into a base.

What an adapter class computes is attached as an adapter; every other form as a difference of the weights
(``forms``), so that images show what the file does. Nothing is left out in silence: what does not fit is refused by
name, and what is only told is in ``LoraFile.notes``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from trainer.adapters.adapter import Adapter
from trainer.adapters.contents import PEFT_KEY, Contents, listed, no_lora, peft_alpha, read_contents
from trainer.adapters.difference import Differences, fits
from trainer.adapters.forms import READABLE, Change, Misfit, Plain, read_form
from trainer.adapters.keys import Name
from trainer.adapters.names import Place, places_of
from trainer.adapters.targets import Target
from trainer.adapters.values import FLAGS, broken_modules, is_finite, value_notes
from trainer.bases import FAMILIES, Base
from trainer.errors import ModelFileError
from trainer.tensorfile import load_tensors

_SIDES = (
    "diff_b",
    "w_norm",
    "b_norm",
    "magnitude",
    "dora_scale",
    "rescale",
    "ia3",
    "ia3_l",
    "lora_up.bias",
    "lora_down.bias",
)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read: its tensors under the file's own names, and what its header shows."""

    path: Path
    tensors: dict[str, Tensor]
    contents: Contents

    @property
    def metadata(self) -> dict[str, str]:
        """The file's metadata."""
        return {
            name: text for name, text in self.contents.metadata.items() if name in self.contents.own_metadata
        }

    @property
    def family(self) -> str:
        """The family it is for; "" if it fits several, or none of this tool's."""
        families = self.contents.made_for.families
        return families[0] if len(families) == 1 else ""

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a user of the file should know, one line each."""
        return (*self.contents.notes, *value_notes(self.contents, self.tensors))

    def parts(self, name: Name) -> dict[str, Tensor]:
        """The tensors of a module, by part."""
        return {part: self.tensors[key] for part, key in self.contents.keys.modules[name].tensors.items()}


class Attached(Adapter):
    """An adapter from a file, and the differences beside it."""

    def __init__(
        self, base: Base, targets: Iterable[Target], weights: Mapping[str, Tensor], differences: Differences
    ) -> None:
        self.differences = differences
        super().__init__(base, targets, weights)

    def state(self) -> dict[str, Tensor]:
        """The tensors of the adapter and of the differences: kohya key → fp32 copy on CPU."""
        return super().state() | self.differences.state()

    def remove(self) -> None:
        """Take all of it out of the base."""
        super().remove()
        self.differences.remove()


def read(path: Path) -> LoraFile:
    """Read a LoRA file of any tool, checking the header first.  Raises ModelFileError that names what it is instead."""
    contents = read_contents(path)
    if not contents.is_lora:
        raise no_lora(path, contents)
    if strays := [name for name in contents.strays if math.prod(contents.shapes[name]) > 1]:
        raise ModelFileError(
            f"{path} holds more than a LoRA: {listed(strays)}",
            "these tensors cannot be attached, so its images would not be those of the file; hpo inspect shows all",
        )
    return LoraFile(path, load_tensors(path), contents)


def check_values(path: Path) -> None:
    """Raise ModelFileError for a LoRA file that no base can be given: modules without a half or with halves of
    different rank, values that are not finite, whole numbers as weights. For a dry run: it needs no base."""
    file = read(path)
    for names, what in (
        (file.contents.incomplete(), "not complete"),
        (file.contents.uneven(), "of uneven rank"),
    ):
        if names:
            raise damaged(
                file, f"{len(names)} of {len(file.contents.kinds)} modules are {what}: {listed(names)}"
            )
    _check_finite(file)
    for name in file.contents.kinds:
        _check_numbers(file, file.contents.keys.modules[name].written, file.parts(name))


def attach(base: Base, file: LoraFile, *, cores: bool = False) -> Attached:
    """Put a LoRA file into a base.  Every module must fit one of the base, complete and in its shape.  ``cores``:
    Tucker cores stay tensors of their own, as ``use_tucker`` trains them."""
    return _all_of(base, file, cores).attached(base)


def parts_of(base: Base, file: LoraFile) -> tuple[list[Target], dict[str, Tensor]]:
    """The modules of a LoRA file that can be trained, and their tensors under kohya's keys.  Raises ModelFileError as
    ``attach``, and for forms that are only differences."""
    found = _all_of(base, file, cores=False)
    if found.changes:
        raise ModelFileError(
            f"{len(found.changes)} modules of {file.path.name} have a form that cannot be trained: "
            f"{listed(list(found.changes))}",
            "begin without this file",
        )
    return found.parts()


def _all_of(base: Base, file: LoraFile, cores: bool) -> _Found:
    """What a file does to each layer of a base."""
    _check_whole(base, file)
    found = _Found()
    places = places_of(base)
    unknown: list[str] = []
    for name, kind in file.contents.kinds.items():
        module = file.contents.keys.modules[name]
        place = places.get(name)
        if place is None:
            unknown += module.tensors.values()
            continue
        parts = file.parts(name)
        _check_numbers(file, module.written, parts)
        if place.key in found.places:
            raise damaged(file, f"it has {place.key} twice, under two names")
        one_trainer = not module.written.startswith("base_model.")
        try:
            with torch.no_grad():
                alpha = _alpha(file, name, parts)
                plain, change = read_form(
                    kind, parts, place.layer, alpha, one_trainer=one_trainer, cores=cores
                )
                if change is not None and not fits(place.layer, change):
                    raise Misfit(name.path)
        except Misfit:
            shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in parts.items())
            unknown.append(f"{module.written} {shapes}")
            continue
        found.add(place, plain, change)
    if unknown or not found.places:
        raise ModelFileError(
            f"{len(unknown)} entries of {file.path.name} do not fit {base.name}: {listed(unknown)}",
            "the file is partial, of another kind, or for another base",
        )
    return found


def _check_whole(base: Base, file: LoraFile) -> None:
    """ModelFileError for a file of which nothing can be attached."""
    made_for, kinds = file.contents.made_for, file.contents.kinds
    if base.family not in made_for.families:
        raise ModelFileError(
            f"{file.path.name} is a LoRA for {made_for.title} ({made_for.why}); "
            f"the base {base.name} is {FAMILIES[base.family].title}",
            "use it with a base of its own family",
        )
    if others := sorted({kind for kind in kinds.values() if kind not in READABLE}):
        raise ModelFileError(
            f"{file.path.name} holds {', '.join(others)}, whose effect depends on how its training began",
            "ask its maker for a file of LoRA or full differences",
        )
    _check_finite(file)
    if file.contents.keys.twice:
        raise damaged(file, f"it has {file.contents.keys.twice[0]} twice, under two names")


class _Found:
    """What a file does to the layers of a base, before it is attached."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.plain: dict[str, Plain] = {}
        self.changes: dict[str, Change] = {}

    def add(self, place: Place, plain: Plain | None, change: Change | None) -> None:
        self.places[place.key] = place
        if plain is not None:
            self.plain[place.key] = plain
        if change is not None:
            self.changes[place.key] = change

    def parts(self) -> tuple[list[Target], dict[str, Tensor]]:
        """The targets of an adapter, and its tensors."""
        targets: list[Target] = []
        weights: dict[str, Tensor] = {}
        for key, plain in self.plain.items():
            place = self.places[key]
            targets.append(Target(place.component, place.path, key, plain.rank, plain.alpha, plain.kind))
            weights |= {f"{key}.{ending}": tensor for ending, tensor in plain.tensors.items()}
        return targets, weights

    def attached(self, base: Base) -> Attached:
        differences = Differences()
        try:
            for key, change in self.changes.items():
                differences.add(base, key, self.places[key].layer, change)
            return Attached(base, *self.parts(), differences)
        except BaseException:
            differences.remove()
            raise


def damaged(file: LoraFile, why: str) -> ModelFileError:
    """The error for a file whose content cannot be right."""
    return ModelFileError(f"{file.path.name} cannot be attached: {why}", "make or download it again")


def _check_finite(file: LoraFile) -> None:
    broken = broken_modules(file.contents, file.tensors)
    if broken:
        first = file.contents.keys.modules[broken[0]]
        alpha = file.tensors.get(first.tensors.get("alpha", ""))
        if len(broken) == 1 and alpha is not None and not is_finite(alpha):
            raise damaged(file, f"{first.written} has alpha {float(alpha.flatten()[0])}")
        raise damaged(
            file,
            f"{len(broken)} of {len(file.contents.kinds)} modules hold NaN or infinity: {first.written} is not finite",
        )


def _check_numbers(file: LoraFile, module: str, parts: Mapping[str, Tensor]) -> None:
    """ModelFileError for what no module of a sound file has: empty tensors, or whole numbers as weights."""
    for part, tensor in sorted(parts.items()):
        if part in FLAGS:
            if tensor.numel() != 1:
                what = f"{tensor.numel()} alphas" if part == "alpha" else f"{part} of {tensor.numel()} values"
                raise damaged(file, f"{module} has {what}")
        elif tensor.numel() == 0 or (tensor.dim() < 2 and part not in _SIDES):
            raise damaged(file, f"{module} has {part} of shape {tuple(tensor.shape)}")
        elif not tensor.is_floating_point():
            raise damaged(file, f"{module} is not of floating-point numbers")


def _alpha(file: LoraFile, name: Name, parts: Mapping[str, Tensor]) -> float | None:
    """A module's alpha: its own, else from PEFT's settings; None for the rank.

    With rsLoRA the scale is alpha / √r, so the alpha of the usual scale is alpha · √r.
    """
    if "alpha" in parts:
        return float(parts["alpha"].flatten()[0])
    if PEFT_KEY not in file.contents.metadata:
        return None
    module = file.contents.keys.modules[name].written
    try:
        alpha, is_rs = peft_alpha(file.contents.metadata, name.component, module)
    except ValueError:
        raise damaged(file, f"its lora_adapter_metadata gives {module} no alpha") from None
    if alpha is not None and is_rs and "lora_down.weight" in parts:
        alpha *= math.sqrt(parts["lora_down.weight"].shape[0])
    return alpha
