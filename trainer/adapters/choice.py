"""KINDS: every kind of adapter by its name, and the one that settings ask for."""

from __future__ import annotations

from typing import Protocol

from trainer.adapters.kinds import Kind, LoHa, LoKr, LoRA
from trainer.adapters.morekinds import BOFT, IA3, OFT, DyLoRA, Full, GLoRA, LoRAFA, Norm
from trainer.config import TrainConfig

KINDS: dict[str, Kind] = {
    "LoRA": LoRA(),
    "LoCon": LoRA(),
    "DoRA": LoRA(),
    "LoHa": LoHa(),
    "LoKr": LoKr(),
    "LoRA-FA": LoRAFA(),
    "DyLoRA": DyLoRA(),
    "GLoRA": GLoRA(),
    "IA3": IA3(),
    "OFT": OFT(),
    "BOFT": BOFT(),
    "Full": Full(),
    "Norm": Norm(),
}
# The kinds that tensors of a file can be told to be: the others are saved as one of these.
IN_FILES = ("LoRA", "LoHa", "LoKr", "GLoRA", "OFT", "BOFT", "Full", "Norm", "IA3")


class Named(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def alpha(self) -> float: ...


def kind_for(config: TrainConfig, target: Named) -> Kind:
    """The kind of a target, with the options of these settings."""
    return kind_of(config, target.kind, on_input=target.kind == "IA3" and target.alpha != 0)


def kind_of(config: TrainConfig, name: str = "", *, on_input: bool = False) -> Kind:
    """The kind that these settings train, or another one with the same options."""
    match name or config.network_type:
        case "LoKr":
            return LoKr(
                config.factor,
                full_matrix=config.full_matrix,
                decompose_both=config.decompose_both,
                unbalanced=config.unbalanced_factorization,
                use_tucker=config.use_tucker,
                use_scalar=config.use_scalar,
            )
        case "LoHa":
            return LoHa(config.use_tucker, config.use_scalar)
        case "LoRA" | "LoCon" | "DoRA":
            return LoRA(config.use_tucker, config.use_scalar)
        case "GLoRA":
            return GLoRA(config.use_scalar)
        case "DyLoRA":
            return DyLoRA(config.unit)
        case "IA3":
            return IA3(on_input)
        case "OFT":
            return OFT(config.rescaled, config.oft_blocks)
        case "BOFT":
            return BOFT(config.rescaled)
        case other:
            return KINDS[other]
